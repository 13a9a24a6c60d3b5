"""The live stream when something happens to its kernel, its tab, its notebook; and 10 MB of pasted text."""

import json

import pytest

pytestmark = pytest.mark.browser

SETUP = """import dataclasses, json, tokenizers, torch
from transformers import PreTrainedTokenizerFast
from sqviz.models.tiny import tiny
from sqviz.streaming.perplexity import streaming_perplexity
from sqviz.widgets.stream_explorer import explore_stream
from sqviz.streaming.policies import *
words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0} | {f"w{i}": i for i in range(1, 131)}, unk_token="?"))
words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
lm = dataclasses.replace(tiny("LlamaForCausalLM"), tokenizer=PreTrainedTokenizerFast(tokenizer_object=words))
ids = torch.randint(3, 131, (20_000,), generator=torch.Generator().manual_seed(1))
view = explore_stream(lm, ids, lanes=["sinks"], sinks=4, recent=28)"""
GONE = "The kernel that computes this view has ended or was restarted. Run the cell again."


def told(lab, expression: str):
    return json.loads(lab.run(f"print(json.dumps({expression}))"))


def started(lab):
    lab.run_all()
    lab.page.get_by_role("button", name="Start", exact=True).click()
    lab.page.locator(".st-token").nth(60).wait_for(timeout=60_000)


def control(lab, what: str) -> None:
    """ "interrupt" or "restart" the kernel."""
    lab.page.evaluate(
        "what => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel[what]().then(() => null)", what
    )


def grows(lab, page) -> bool:
    counts = [told(lab, "view.tracks['sinks'].count")]
    for _ in range(50):
        page.wait_for_timeout(100)
        counts.append(told(lab, "view.tracks['sinks'].count"))
        if counts[-1] > counts[0]:
            return True
    return False


def test_an_interrupt_ends_the_cell_and_not_the_stream(lab_page):
    lab = lab_page([SETUP, "view"], width=1000)
    started(lab)
    lab.page.evaluate(
        """() => { const { kernel } = window.jupyterapp.shell.currentWidget.sessionContext.session;
            window.reply = null;
            const future = kernel.requestExecute({ code: 'import time; time.sleep(100)' });
            future.done.then(reply => { window.reply = reply.content; }); }"""
    )
    lab.page.wait_for_timeout(1000)
    control(lab, "interrupt")
    lab.page.wait_for_function("() => window.reply?.ename === 'KeyboardInterrupt'", timeout=30_000)
    control(lab, "interrupt")  # and once while no cell runs
    assert grows(lab, lab.page)
    lab.page.get_by_role("button", name="Pause", exact=True).click()
    lab.page.get_by_role("button", name="Go on", exact=True).wait_for()
    count = told(lab, "(view.wait(10), view.tracks['sinks'].count)[1]")
    expected = told(lab, f"streaming_perplexity(lm, ids[:{count + 1}], Sinks(4, 28)).perplexity")
    assert told(lab, "view.tracks['sinks'].perplexity") == pytest.approx(expected, rel=1e-4)


def test_a_restarted_kernel_is_said_and_the_text_stays(lab_page, screenshots):
    lab = lab_page([SETUP, "view"], width=1000)
    started(lab)
    note = lab.page.get_by_text(GONE)
    assert not note.is_visible()
    control(lab, "restart")
    note.wait_for(state="visible", timeout=60_000)
    assert lab.page.locator(".st-token").count() > 60
    lab.page.screenshot(path=screenshots / "stream_restarted.png")
    lab.page.wait_for_function(
        "() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'", timeout=60_000
    )
    started(lab)
    assert not lab.page.get_by_text(GONE).is_visible()


def test_a_tab_that_is_closed_and_opened_again_finds_its_stream(lab_page):
    lab = lab_page([SETUP, "view"], width=1000)
    started(lab)
    lab.save()
    before = told(lab, "view.tracks['sinks'].count")
    context = lab.page.context
    lab.page.close()  # the kernel goes on
    lab.page = context.new_page()
    lab.open()
    assert told(lab, "view.state") == "running"
    assert told(lab, "view.tracks['sinks'].count") > before
    lab.page.evaluate("() => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = 1; }")
    lab.command("notebook:run-cell")
    lab.page.locator(".st-token").nth(60).wait_for(timeout=60_000)
    lab.page.get_by_role("button", name="Pause", exact=True).click()
    lab.page.get_by_role("button", name="Go on", exact=True).wait_for()
    lab.page.wait_for_timeout(500)
    shown = lab.page.locator(".st-token").evaluate_all("all => all.map(one => [one.token.position, one.token.nll])")
    count = told(lab, "view.tracks['sinks'].count")
    assert shown[-1][0] == count
    nll = told(lab, f"streaming_perplexity(lm, ids[:{count + 1}], Sinks(4, 28)).nll.tolist()")
    assert [value for _, value in shown] == pytest.approx(nll[shown[0][0] - 1 :], abs=3e-4)


def test_a_saved_notebook_without_its_kernel_shows_a_picture(lab_page):
    lab = lab_page([SETUP, "view.start(); view.wait(3); view.pause()", "view"], width=1000)
    lab.run_all()
    saved = json.loads(lab.save().read_text())
    data = next(o["data"] for cell in saved["cells"] for o in cell["outputs"] if "image/png" in o.get("data", {}))
    assert len(data["image/png"]) > 5000


def test_ten_megabytes_of_pasted_text(lab_page):
    """Longer than one message to a kernel may be; it arrives whole, and the notebook still answers."""
    lab = lab_page([SETUP, "view"], width=1000)
    lab.run_all()
    page = lab.page
    page.get_by_text("Another text").click()
    page.get_by_label("Text to read, or prompt").evaluate(
        "area => { area.value = ('w1 😀 ' + 'x'.repeat(93) + '\\n').repeat(102_000); }"
    )
    page.get_by_role("button", name="Read it", exact=True).click()
    page.get_by_text("the rest was left out").wait_for(timeout=120_000)
    assert told(lab, "view.about['source']") == "pasted text"
    text = "('w1 😀 ' + 'x' * 93 + '\\n') * 102_000"
    expected = told(lab, f"lm.tokenizer(({text})[:10_000_000])['input_ids'].__len__()")
    assert told(lab, "view.about['tokens']") == expected
    page.get_by_role("button", name="Start", exact=True).click()
    page.locator(".st-token").nth(20).wait_for(timeout=60_000)
