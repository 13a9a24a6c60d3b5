"""The sink explorer in JupyterLab: sliders, clicks and keys choose sinks; the page shows what Python computed."""

import json

import pytest

pytestmark = pytest.mark.browser

SETUP = """import json, torch
from sqviz.models.tiny import tiny
from sqviz.widgets.sink_explorer import explore_sinks
lm = tiny("LlamaForCausalLM")
view = explore_sinks(lm, torch.randint(3, 131, (70,), generator=torch.Generator().manual_seed(1)), sinks=2, recent=9)"""


def state(lab) -> dict:
    """What the kernel holds once it has come to rest."""
    told = "[view.recent, list(view.chosen), view.code, view.scores['sinks']['policy']]"
    code = f"assert view.wait(60)\nprint(json.dumps({told}))"
    return dict(zip(("recent", "chosen", "code", "policy"), json.loads(lab.run(code)), strict=True))


def wait_for(lab, **expected) -> None:
    for _ in range(50):
        found = state(lab)
        if all(found[name] == value for name, value in expected.items()):
            return
        lab.page.wait_for_timeout(100)
    assert found == expected


def slide(page, label: str, value: int) -> None:
    page.locator("label", has_text=label).locator("input").evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input', { bubbles: true })); }", value
    )


@pytest.mark.parametrize(("theme", "width"), [("light", 1100), ("dark", 620)])
def test_sliders_clicks_and_keys_choose_sinks(theme, width, lab_page, screenshots):
    lab = lab_page([SETUP, "view"], theme=theme, width=width, height=1000)
    lab.run_all()
    page = lab.page
    page.locator(".sx-token").first.wait_for()
    wait_for(lab, recent=9, chosen=[0, 1], policy="Sinks(2, 9)")
    slide(page, "sinks", 4)
    wait_for(lab, chosen=[0, 1, 2, 3], policy="Sinks(4, 9)")
    slide(page, "window", 20)
    wait_for(lab, recent=20, policy="Sinks(4, 20)")
    page.locator(".sx-token").nth(0).click()
    wait_for(lab, chosen=[1, 2, 3], policy="Sinks(3, 20, positions=(1, 2, 3))")
    page.locator(".sx-token").nth(0).focus()
    for key in ("ArrowRight", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    wait_for(lab, chosen=[1, 2, 3, 11])
    pressed = page.evaluate(
        "[...document.querySelectorAll('.sx-token[aria-pressed=true]')].map(b => Number(b.dataset.at))"
    )
    assert pressed == [1, 2, 3, 11]
    page.wait_for_function("() => !document.querySelector('.sx-numbers').innerText.includes('…')")
    code = state(lab)["code"]
    assert (
        page.locator(".sx-code").inner_text()
        == code
        == "cache = sqviz.SinkCache(lm, sqviz.Sinks(4, 20, positions=(1, 2, 3, 11)))"
    )
    behind = json.loads(
        lab.run(
            "from sqviz.widgets.sink_explorer import _values\n"
            "found = [_values(view.scores[name])[24:] for name in ('dense', 'window', 'sinks')]\n"
            "print(json.dumps([float(values.double().mean().exp()) for values in found]))"
        )
    )
    page.wait_for_timeout(300)
    shown = [float(text) for text in page.locator(".sx-numbers b").all_inner_texts()]
    assert shown == pytest.approx(behind, rel=0.01)
    page.locator(".sx-token").nth(30).hover()
    nll = json.loads(
        lab.run("print(json.dumps([float(_values(view.scores[n])[29]) for n in ('dense', 'window', 'sinks')]))")
    )
    lines = page.locator(".sqviz-tip:visible").inner_text().splitlines()
    assert [float(line.split()[-2]) for line in lines[1:4]] == pytest.approx(nll, abs=0.01, rel=0.01)
    page.screenshot(path=screenshots / f"sink_explorer_{theme}_{width}.png")


def test_text_is_shown_and_never_run(view_page):
    """Whatever a tokenizer makes of a text: markup, right to left, half characters."""
    import torch

    from sqviz.models.tiny import tiny
    from sqviz.widgets.sink_explorer import explore_sinks

    words = [
        "<img src=x onerror=alert(1)>",
        "שלום",
        "👩‍🚀",
        "\ufffd",
        "·the",
        "</script><script>alert(2)</script>",
        "↵",
    ]
    view = explore_sinks(tiny("LlamaForCausalLM"), torch.arange(3, 31), sinks=2, recent=9)
    assert view.wait(60)
    view.about = view.about | {"tokens": words * 4}
    page = view_page(view)
    assert page.locator(".sx-token").all_inner_texts()[:7] == words
    assert page.locator(".sqviz img, .sqviz script").count() == 0
    assert "No kernel" in page.locator(".sqviz").inner_text()
    view.close()


def test_the_sliders_of_a_page_work_without_a_kernel(view_page):
    import torch

    from sqviz.models.tiny import tiny
    from sqviz.streaming.perplexity import streaming_perplexity
    from sqviz.streaming.policies import Sinks, Window
    from sqviz.widgets.sink_explorer import explore_sinks

    lm, ids = tiny("LlamaForCausalLM"), torch.arange(3, 103)
    view = explore_sinks(lm, ids, sinks=2, recent=8)
    assert view.wait(60)
    page = view_page(view)
    for count, recent, policy in ((4, 8, Sinks(4, 8)), (0, 8, Window(8)), (0, 16, Window(16)), (8, 32, Sinks(8, 32))):
        slide(page, "window", recent)
        slide(page, "sinks", count)
        assert page.locator(".sx-code").inner_text() == f"cache = sqviz.SinkCache(lm, sqviz.{policy!r})"
        expected = streaming_perplexity(lm, ids, policy).nll[count + recent :].double().mean().exp()
        assert float(page.locator(".sx-numbers b").last.inner_text()) == pytest.approx(float(expected), rel=0.01)
    slide(page, "sinks", 5)  # was not computed: the nearest that was
    assert "Sinks(4, 32)" in page.locator(".sx-code").inner_text()
    view.close()
