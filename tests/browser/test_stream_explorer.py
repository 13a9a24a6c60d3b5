"""The live stream in JupyterLab: buttons, sliders and sources; what the lanes show is what Python computed."""

import json

import pytest

pytestmark = pytest.mark.browser

SETUP = """import json, torch
from sqviz.models.tiny import tiny
from sqviz.streaming.perplexity import streaming_perplexity
from sqviz.widgets.stream_explorer import explore_stream
from sqviz.streaming.policies import *
lm = tiny("LlamaForCausalLM")
ids = torch.randint(3, 131, (20_000,), generator=torch.Generator().manual_seed(1))
view = explore_stream(lm, ids, sinks=4, recent=28)"""


def told(lab, expression: str):
    return json.loads(lab.run(f"print(json.dumps({expression}))"))


def lane(page, name: str):
    return page.locator(f".st-lane[data-lane={name}]")


@pytest.fixture
def lab(lab_page):
    found = lab_page([SETUP, "view"], width=1100, height=1000)
    found.run_all()
    found.page.get_by_role("button", name="Start", exact=True).wait_for()
    return found


def test_start_pause_and_every_token_as_it_was_computed(lab, screenshots):
    page = lab.page
    page.get_by_role("button", name="Start", exact=True).click()
    for name in ("dense", "window", "sinks"):
        lane(page, name).locator(".st-token").nth(60).wait_for(timeout=60_000)
    page.get_by_role("button", name="Pause", exact=True).click()
    page.get_by_role("button", name="Go on", exact=True).wait_for()
    page.wait_for_timeout(500)
    page.screenshot(path=screenshots / "stream_light.png")
    for name, policy in (("dense", "Dense()"), ("window", "Window(32)"), ("sinks", "Sinks(4, 28)")):
        count = told(lab, f"view.tracks[{name!r}].count")
        shown = (
            lane(page, name)
            .locator(".st-token")
            .evaluate_all("all => all.map(one => [one.token.position, one.token.nll])")
        )
        assert [at for at, _ in shown] == list(range(max(1, count - 399), count + 1))
        nll = told(lab, f"streaming_perplexity(lm, ids[:{count + 1}], {policy}).nll.tolist()")
        assert [value for _, value in shown] == pytest.approx(nll[shown[0][0] - 1 :], abs=3e-4)
        said = lane(page, name).locator(".st-numbers").inner_text()
        assert said.startswith(f"{count:,} tokens · perplexity ")
    page.get_by_role("button", name="Go on", exact=True).click()
    before = told(lab, "view.tracks['sinks'].count")
    page.wait_for_timeout(500)
    assert told(lab, "view.tracks['sinks'].count") > before
    page.get_by_role("button", name="Reset", exact=True).click()
    page.get_by_role("button", name="Start", exact=True).wait_for()
    page.wait_for_function("() => !document.querySelector('.st-lane')")


def test_sliders_and_boxes_act_while_it_runs(lab):
    page = lab.page
    page.locator("label", has_text="Dense").locator("input").uncheck()
    page.get_by_role("button", name="Start", exact=True).click()
    lane(page, "sinks").locator(".st-token").nth(80).wait_for(timeout=60_000)
    page.locator("label", has_text="window").last.locator("input").evaluate(
        "input => { input.value = 12; input.dispatchEvent(new Event('input', { bubbles: true })); }"
    )
    for _ in range(100):
        if told(lab, "view._lanes['sinks']._reader.cache.kept") == 16:  # one step after the policy is there
            break
        page.wait_for_timeout(100)
    assert told(lab, "repr(view._lanes['sinks'].policy)") == "Sinks(4, 12)"
    assert told(lab, "view._lanes['sinks']._reader.cache.kept") in (15, 16)  # 15 while a step is under way
    assert lane(page, "dense").count() == 0
    page.locator("label", has_text="Dense").locator("input").check()
    lane(page, "dense").locator(".st-token").nth(5).wait_for(timeout=60_000)
    page.get_by_role("button", name="Pause", exact=True).click()


def hover_slot(page, name: str, slot: int, room: int) -> list[str]:
    """The tooltip over one slot of a lane's cache of so many."""
    canvas = lane(page, name).locator("canvas").first
    canvas.scroll_into_view_if_needed()
    frame = canvas.bounding_box()
    page.mouse.move(frame["x"] + 4 + (slot + 0.5) * min(12, (frame["width"] - 8) / room), frame["y"] + 7)
    page.wait_for_timeout(100)
    return page.locator(".sqviz-tip:visible").inner_text().splitlines()


def test_slots_say_what_they_hold_and_stop_frees_them(lab, screenshots):
    page = lab.page
    page.get_by_role("button", name="Start", exact=True).click()
    lane(page, "sinks").locator(".st-token").nth(60).wait_for(timeout=60_000)
    page.get_by_role("button", name="Pause", exact=True).click()
    page.get_by_role("button", name="Go on", exact=True).wait_for()
    told(lab, "view.wait(10)")
    page.wait_for_timeout(500)
    count = told(lab, "view.tracks['sinks'].count")
    first = count - 28  # 28 recent tokens, the latest of them the one that predicted the last
    assert hover_slot(page, "sinks", 2, 32) == [
        f"slot 2: token 2 “#{told(lab, 'ids[2].item()')}”",
        "an attention sink, kept for good",
        "position 2 inside the cache, 2 in the text",
    ]
    assert hover_slot(page, "sinks", 4, 32) == [
        f"slot 4: token {first} “#{told(lab, f'ids[{first}].item()')}”",
        "leaves with the next token",
        f"position 4 inside the cache, {first} in the text",
    ]
    assert hover_slot(page, "sinks", 31, 32)[1] == "leaves when 28 more tokens have come"
    dense = told(lab, "view.tracks['dense'].count")
    assert hover_slot(page, "dense", 9, dense)[1] == "nothing leaves this cache"
    page.screenshot(path=screenshots / "stream_slots.png")
    tokens = lane(page, "sinks").locator(".st-token").count()
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_role("button", name="Start again", exact=True).wait_for()
    assert told(lab, "[len(view._lanes), view.state]") == [0, "ended"]
    assert told(lab, "sum(len(m._forward_pre_hooks) for m in lm.model.modules())") == 0
    assert lane(page, "sinks").locator(".st-token").count() == tokens
    page.get_by_role("button", name="Start again", exact=True).click()
    page.get_by_role("button", name="Pause", exact=True).wait_for()
    lane(page, "sinks").locator(".st-token").nth(20).wait_for(timeout=60_000)


def test_a_page_that_comes_back_shows_the_same(lab, screenshots):
    page = lab.page
    page.get_by_role("button", name="Start", exact=True).click()
    lane(page, "sinks").locator(".st-token").nth(100).wait_for(timeout=60_000)
    page.get_by_role("button", name="Pause", exact=True).click()
    page.get_by_role("button", name="Go on", exact=True).wait_for()
    page.wait_for_timeout(500)
    tokens = "all => all.map(one => one.token.nll)"
    before = lane(page, "sinks").locator(".st-token").evaluate_all(tokens)
    lab.command("notebook:clear-all-cell-outputs")
    page.wait_for_function("() => !document.querySelector('.st-lane')")
    lab.theme("dark")
    page.evaluate("() => { const n = window.jupyterapp.shell.currentWidget.content; n.activeCellIndex = 1; }")
    lab.command("notebook:run-cell")
    lane(page, "sinks").locator(".st-token").nth(len(before) - 1).wait_for(timeout=60_000)
    assert lane(page, "sinks").locator(".st-token").evaluate_all(tokens) == before
    page.wait_for_timeout(500)
    page.screenshot(path=screenshots / "stream_dark.png")


def test_a_page_without_a_kernel_shows_where_it_stood_and_runs_nothing(view_page, screenshots):
    import dataclasses

    import torch

    from sqviz.models.tiny import tiny
    from sqviz.streaming.lane import LaneStep
    from sqviz.streaming.reader import CacheView
    from sqviz.widgets.stream_explorer import explore_stream
    from sqviz.widgets.stream_track import Track

    words = ["<img src=x onerror=alert(1)>", "שלום", "👩‍🚀", "\ufffd", "</script>"]
    view = explore_stream(tiny("LlamaForCausalLM"), torch.arange(3, 103))
    track = Track()
    cache = CacheView((0, 1, 2, 3), 10, 61, 56, 256, 1_000_000)
    step = LaneStep(0, 0, "", 2.0, ((words[0], 0.4), (words[1], 0.2)), cache, 0.06)
    for at in range(100):
        track.add(dataclasses.replace(step, position=at + 1, text=words[at % 5], nll=at % 9), 0.06)
    view._tracks = {"sinks": track}
    page = view_page(view, width=620, theme="dark")
    assert lane(page, "sinks").locator(".st-token").all_inner_texts()[:5] == words
    assert page.locator(".sqviz img").count() == 0
    lane(page, "sinks").locator(".st-token").nth(99).hover()
    assert f"40.0 % “{words[0]}”" in page.locator(".sqviz-tip:visible").inner_text()
    assert page.locator(".sqviz img").count() == 0
    assert page.get_by_role("button", name="Start", exact=True).is_disabled()
    assert "no kernel" in page.locator(".sqviz-note").first.inner_text()
    sparks = lane(page, "sinks").locator(".st-sparks canvas")
    assert sparks.evaluate_all("all => all.map(one => one.values.length)") == [0, 100, 1]
    text = lane(page, "sinks").locator(".st-text")
    assert text.evaluate("t => t.scrollHeight - t.scrollTop - t.clientHeight") <= 1  # the latest tokens are in view
    page.screenshot(path=screenshots / "stream_page_dark.png", full_page=True)
    view.close()


def test_a_page_stays_small_over_twenty_thousand_tokens(lab):
    """Tokens of text, points of the curve and nodes of the page are bounded; what is left are the latest."""
    page = lab.page
    code = """from sqviz.streaming.lane import LaneStep
from sqviz.streaming.reader import CacheView
from sqviz.widgets.stream_track import Track
track, at = Track(), 0
def tell(batches):
    global at
    for _ in range(batches):
        for _ in range(100):
            at += 1
            cache = CacheView((0, 1, 2, 3), max(0, at - 28), at - 1, 32, 32, 1000)
            track.add(LaneStep(at, 5, "word ", at % 7, (("other", 0.5),), cache, 0.001), 0.001)
        view.send({"kind": "steps", "lanes": {"sinks": track.news()}, "machine": view._machine()})
tell(20)"""
    lab.run(code)
    tokens = lane(page, "sinks").locator(".st-token")
    last = "position => [...document.querySelectorAll('.st-token')].at(-1)?.token.position === position"
    page.wait_for_function(last, arg=2000, timeout=60_000)
    nodes = page.evaluate("() => document.getElementsByTagName('*').length")
    lab.run("tell(180)")
    page.wait_for_function(last, arg=20_000, timeout=60_000)
    assert tokens.count() == 400
    assert tokens.first.evaluate("one => one.token.position") == 19_601
    points = page.locator(".sqviz canvas").first.evaluate("c => c.lanes().sinks")
    assert 700 <= len(points) <= 1500
    assert points[-1][0] > 19_900
    assert page.evaluate("() => document.getElementsByTagName('*').length") <= nodes + 20
    assert lane(page, "sinks").locator(".st-sparks canvas").nth(1).evaluate("c => c.values.length") <= 120
