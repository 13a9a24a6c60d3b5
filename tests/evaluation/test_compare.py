"""Methods side by side: the parts by hand, and what a crash or a cancel leaves."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile

import pytest
import torch

import sqviz
from sqviz.errors import Cancelled, SqvizError, Unavailable
from sqviz.evaluation import compare as module
from sqviz.evaluation import method_rows
from sqviz.evaluation.method_rows import FORMAT, read_row
from sqviz.evaluation.method_runner import method_bytes, stops_in_a_pass
from sqviz.models.linears import linear_names, weight
from sqviz.models.tiny import tiny

GENERATOR = torch.Generator().manual_seed(1)
CALIBRATION = torch.randint(3, 131, (8 * 40,), generator=GENERATOR)
SCORED = torch.randint(3, 131, (6 * 40,), generator=GENERATOR)
ROWS = (sqviz.W8A8, sqviz.Method("smooth", sqviz.SMOOTHQUANT_O3, 0.5), sqviz.LLM_INT8)


@pytest.fixture
def lm():
    return tiny("LlamaForCausalLM")


def run(lm, folder, rows=ROWS, **more):
    given = {"text": SCORED, "calibration": CALIBRATION, "length": 40, "latency": False, "progress": False, **more}
    return sqviz.compare(lm, rows, folder=folder, **given)


def forbidden(*_, **__):
    raise AssertionError("nothing may be evaluated again")


def test_a_search_is_made_once_for_scores_and_for_latency(lm, tmp_path, monkeypatch):
    from sqviz.evaluation import method_runner

    searches = []

    def search(*given, **named):
        searches.append(given[2])
        return sqviz.search_alpha(*given, "layer", **named)

    monkeypatch.setattr(method_runner, "search_alpha", search)
    rows = (sqviz.Method("searched", sqviz.SMOOTHQUANT_O1, "auto"),)
    table = run(lm, tmp_path, rows, latency=True)
    assert searches == [sqviz.SMOOTHQUANT_O1]
    assert table["searched"].milliseconds > 0
    m = sqviz.capture(lm, CALIBRATION, length=40, progress=False)
    found = sqviz.search_alpha(lm, m, sqviz.SMOOTHQUANT_O1, "layer", progress=False)
    byhand = sqviz.perplexity(sqviz.quantize(sqviz.smooth(lm, m, found), sqviz.SMOOTHQUANT_O1), SCORED, 40)
    assert table["searched"].evaluation["perplexity"].value == pytest.approx(byhand, rel=1e-6)
    run(lm, tmp_path, (rows[0], sqviz.W8A8), length=40, limit=2)
    assert len(searches) == 1, "other scores of the same method want the same strengths"


def test_rows_are_what_the_parts_give(lm, tmp_path):
    table = run(lm, tmp_path)
    assert [row.name for row in table.rows] == ["none", "W8A8", "smooth", "LLM.int8()"]
    assert table.complete
    m = sqviz.capture(lm, CALIBRATION, length=40, progress=False)
    smooth = sqviz.smooth(lm, m, 0.5)
    models = {
        "none": lm,
        "W8A8": sqviz.quantize(lm, sqviz.W8A8),
        "smooth": sqviz.quantize(smooth, sqviz.SMOOTHQUANT_O3, m),
        "LLM.int8()": sqviz.quantize(lm, sqviz.LLM_INT8),
    }
    for name, model in models.items():
        expected = sqviz.perplexity(model, SCORED, 40)
        assert table[name].evaluation["perplexity"].value == pytest.approx(expected, rel=1e-6)
    frame = table.to_frame()
    assert frame.loc["W8A8", "perplexity perplexity: change"].endswith("%")
    assert "W8A8" in repr(table)
    assert "LLM.int8()" in table._repr_mimebundle_()["text/html"]
    assert table.to_png().startswith(b"\x89PNG")


def test_latency_is_measured_where_a_method_can_be_executed(lm, tmp_path):
    text = SCORED.repeat(2)
    table = run(lm, tmp_path, (sqviz.SMOOTHQUANT_LLAMA, sqviz.LLM_INT8), latency=True, text=text, samples=4, length=30)
    executed, not_executed = table["SmoothQuant-Llama"], table["LLM.int8()"]
    assert executed.milliseconds > 0 < executed.itself
    assert not_executed.milliseconds is None


def test_sizes_are_counted_weight_by_weight(lm):
    linears = set(linear_names(lm))
    total = sum(p.numel() for p in lm.model.parameters())
    inside = sum(weight(lm, name).numel() for name in linears)
    outs = sum(weight(lm, name).shape[0] for name in linears)
    assert method_bytes(lm, sqviz.Method("none")) == 2 * total
    assert method_bytes(lm, sqviz.Method("a", sqviz.W8A8)) == 2 * (total - inside) + inside + 4 * len(linears)
    assert method_bytes(lm, sqviz.Method("b", sqviz.LLM_INT8)) == 2 * (total - inside) + inside + 4 * outs
    skipped = weight(lm, "model.layers.0.mlp.down_proj").numel()
    one = sqviz.Method("c", sqviz.W8A8, skip=("model.layers.0.mlp.down_proj",))
    assert method_bytes(lm, one) == 2 * (total - inside + skipped) + inside - skipped + 4 * (len(linears) - 1)


def test_finished_rows_are_kept_and_read_again(lm, tmp_path, monkeypatch):
    first = run(lm, tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 4
    monkeypatch.setattr(module, "evaluate", forbidden)
    again = run(lm, tmp_path)
    assert again.to_frame().equals(first.to_frame())
    assert again["W8A8"].evaluation["perplexity"].items.equal(first["W8A8"].evaluation["perplexity"].items)


@pytest.mark.parametrize("what", ["weights", "method", "calibration", "text"])
def test_what_a_row_depends_on_makes_a_new_one(lm, tmp_path, what):
    rows = (sqviz.Method("smooth", sqviz.SMOOTHQUANT_O3, 0.5),)
    run(lm, tmp_path, rows)
    before = len(list(tmp_path.glob("*.json")))
    if what == "weights":
        other = tiny("LlamaForCausalLM")
        with torch.no_grad():
            other.model.lm_head.weight[0, 0] += 0.01
        run(other, tmp_path, rows)
    elif what == "method":
        run(lm, tmp_path, (sqviz.Method("smooth", sqviz.SMOOTHQUANT_O3, 0.6),))
    else:
        run(lm, tmp_path, rows, **{what: SCORED.flip(0)})
    assert len(list(tmp_path.glob("*.json"))) > before


def test_a_crash_keeps_the_rows_before_it(lm, tmp_path, monkeypatch):
    real, calls = module.evaluate, []

    def crash(model, **given):
        calls.append(model)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return real(model, **given)

    monkeypatch.setattr(module, "evaluate", crash)
    with pytest.raises(RuntimeError):
        run(lm, tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2
    table = run(lm, tmp_path)
    assert table.complete
    assert len(calls) == 5  # two rows were there already


def test_a_cancel_returns_the_rows_so_far(lm, tmp_path):
    cancel, seen = sqviz.CancelToken(), []

    def on_row(table):
        seen.append(len(table.rows))
        if len(table.rows) == 2:
            cancel.cancel()

    table = run(lm, tmp_path, cancel=cancel, on_row=on_row)
    assert seen == [1, 2]
    assert [row.name for row in table.rows] == ["none", "W8A8"]
    assert not table.complete
    assert table.missing == ("smooth", "LLM.int8()")
    assert "2 of 4 methods" in repr(table)
    assert run(lm, tmp_path).complete


def test_a_cancel_before_the_first_row_returns_an_empty_table(lm, tmp_path):
    cancel = sqviz.CancelToken()
    cancel.cancel()
    table = run(lm, tmp_path, cancel=cancel)
    assert (table.rows, table.complete) == ((), False)
    assert "no row is finished" in repr(table)
    assert len(table.to_frame()) == 0
    assert "no row is finished" in table._repr_mimebundle_()["text/html"]


def test_a_cancel_is_heard_inside_a_pass_and_leaves_no_hook(lm):
    cancel = sqviz.CancelToken()
    blocks = lm.model.get_submodule("model.layers")
    handle = blocks[0].register_forward_pre_hook(lambda *_: cancel.cancel())
    with pytest.raises(Cancelled), torch.no_grad(), stops_in_a_pass(lm, cancel):
        lm.model(input_ids=SCORED[None, :40])
    handle.remove()
    assert all(not module._forward_pre_hooks for module in lm.model.modules())


DAMAGED = ['{"format": "sqviz.compare/1"', "", "[]", "7", "\x00\xff", "MISSING", "TEXT", "OTHER FORMAT"]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_row_is_made_again(lm, tmp_path, content):
    first = run(lm, tmp_path, ROWS[:1])
    for path in tmp_path.glob("*.json"):
        held = json.loads(path.read_text())
        changed = {
            "MISSING": json.dumps({k: v for k, v in held.items() if k != "bytes"}),
            "TEXT": json.dumps(held | {"bytes": "many"}),
            "OTHER FORMAT": json.dumps(held | {"format": "sqviz.compare/99"}),
        }
        path.write_bytes(changed.get(content, content).encode("latin-1"))
        assert read_row(path) is None
    again = run(lm, tmp_path, ROWS[:1])
    assert again.to_frame().equals(first.to_frame())
    assert all(json.loads(path.read_text())["format"] == FORMAT for path in tmp_path.glob("*.json"))


def test_a_damaged_capture_is_made_again(lm, tmp_path):
    rows = (sqviz.Method("smooth", sqviz.SMOOTHQUANT_O3, 0.5),)
    first = run(lm, tmp_path, rows)
    (capture,) = tmp_path.glob("*.safetensors")
    capture.write_bytes(capture.read_bytes()[:100])
    for path in tmp_path.glob("*.json"):
        path.unlink()
    assert run(lm, tmp_path, rows).to_frame().equals(first.to_frame())


def test_a_row_kept_under_another_name_is_shown_under_the_new_one(lm, tmp_path, monkeypatch):
    run(lm, tmp_path, (sqviz.Method("one", sqviz.W8A8),))
    monkeypatch.setattr(module, "evaluate", forbidden)
    assert [row.name for row in run(lm, tmp_path, (sqviz.Method("other", sqviz.W8A8),)).rows] == ["none", "other"]


def test_the_model_itself_comes_first_wherever_it_is_named(lm, tmp_path):
    table = run(lm, tmp_path, (sqviz.W8A8, sqviz.Method("as it is")))
    assert [row.name for row in table.rows] == ["as it is", "W8A8"]


def test_a_folder_that_cannot_be_written_to_is_named_before_anything_runs(lm, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, "evaluate", forbidden)
    with pytest.raises(SqvizError, match=r"folder='.*file/rows'.*could not be kept.*Give a folder"):
        run(lm, tmp_path / "file" / "rows")
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(SqvizError, match=r"folder='.*locked'.*Permission denied"):
        run(lm, tmp_path / "locked")


def refuse(*_, **__):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_disk_that_fills_up_is_named_and_the_rows_before_stay(lm, tmp_path, monkeypatch):
    real, written = method_rows.write_bytes, []

    def full(content, path):
        written.append(path)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(content, path)

    monkeypatch.setattr(method_rows, "write_bytes", full)
    with pytest.raises(SqvizError, match=r"'smooth' could not be written.*No space left.*make room"):
        run(lm, tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert run(lm, tmp_path).complete


PROCESS = """
import os, signal, sys, torch, sqviz
from sqviz.models.tiny import tiny
torch.set_num_threads(1)
g = torch.Generator().manual_seed(1)
calibration, scored = torch.randint(3, 131, (320,), generator=g), torch.randint(3, 131, (240,), generator=g)
rows = (sqviz.W8A8, sqviz.Method("smooth", sqviz.SMOOTHQUANT_O3, 0.5), sqviz.LLM_INT8)
def told(table):
    if len(table.rows) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
table = sqviz.compare(tiny("LlamaForCausalLM"), rows, text=scored, calibration=calibration, length=40, latency=False,
                      progress=False, folder=sys.argv[1], on_row=told)
print(table.to_frame().to_json())
"""


def process(folder, killed_at=0):
    command = [sys.executable, "-c", PROCESS, str(folder), str(killed_at)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_keeps_its_rows_and_another_goes_on(lm, tmp_path, monkeypatch):
    died = process(tmp_path, killed_at=2)
    died.communicate(timeout=120)
    assert died.returncode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert len(kept) == 2
    real, scored = module.evaluate, []
    monkeypatch.setattr(module, "evaluate", lambda model, **given: (scored.append(model.note), real(model, **given))[1])
    table = run(lm, tmp_path)
    assert table.complete
    assert len(scored) == 2  # the two that were missing
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_two_processes_in_one_folder_do_each_other_no_harm(lm, tmp_path):
    both = [process(tmp_path), process(tmp_path)]
    shown = [one.communicate(timeout=180)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0]
    assert shown[0] == shown[1]
    assert shown[0].strip() == run(lm, tmp_path).to_frame().to_json()
    left = {path.suffix for path in tmp_path.iterdir()}
    assert left == {".json", ".safetensors"}


def test_a_method_that_the_model_cannot_have_says_why_and_the_others_go_on(tmp_path):
    table = run(tiny("MixtralForCausalLM"), tmp_path, (sqviz.LLM_INT8, sqviz.W8A8))
    assert "skip=" in table["LLM.int8()"].error
    assert table["LLM.int8()"].evaluation is None
    assert table["W8A8"].evaluation is not None
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert "why not" in repr(table)
    assert "cannot: " in table._repr_mimebundle_()["text/html"]


def test_what_cannot_be_executed_here_is_scored_all_the_same(lm, tmp_path, monkeypatch):
    real = sqviz.Method.apply

    def apply(method, lm, calibrate, backend="simulate", **given):
        if backend != "simulate":
            raise Unavailable("no backend can run on this machine")
        return real(method, lm, calibrate, backend, **given)

    monkeypatch.setattr(sqviz.Method, "apply", apply)
    table = run(lm, tmp_path, (sqviz.SMOOTHQUANT_LLAMA,), latency=True)
    row = table["SmoothQuant-Llama"]
    assert row.evaluation is not None
    assert (row.milliseconds, row.untimed) == (None, "no backend can run on this machine")


def test_two_methods_of_one_name_are_refused(lm, tmp_path):
    with pytest.raises(SqvizError, match="W8A8"):
        run(lm, tmp_path, (sqviz.W8A8, sqviz.W8A8))
    with pytest.raises(SqvizError, match="no method"):
        run(lm, tmp_path, (sqviz.W8A8,))["O1"]


LIVE = """
import torch
import sqviz
from sqviz.models.tiny import tiny
ids = torch.arange(3, 123)
lm = tiny("LlamaForCausalLM")
def live(**given):
    return sqviz.compare(lm, [sqviz.W8A8], text=ids, calibration=ids, length=40, latency=False, live=True,
                         folder={folder!r}, **given)
"""


def outputs(folder, *cells):
    """Outputs of cells of a notebook behind `LIVE`, run in a kernel; the widgets' state is not kept."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    made = [nbformat.v4.new_code_cell(code) for code in (LIVE.format(folder=str(folder)), *cells)]
    book = nbformat.v4.new_notebook(cells=made)
    with contextlib.suppress(CellExecutionError):
        NotebookClient(book, timeout=120, store_widget_state=False).execute()
    return [cell.outputs for cell in book.cells[1:]]


def test_a_live_table_stays_in_its_cell_as_html_that_needs_no_kernel(tmp_path):
    ((output,), (again,)) = outputs(tmp_path, "table = live()", "table")
    assert set(output["data"]) == {"text/html", "text/plain"}
    plain = output["data"]["text/html"].split("<style>")[0]
    assert "W8A8" in plain
    assert "none" in plain
    assert "<script" not in plain
    assert "2 of 2 methods" in output["data"]["text/plain"]
    assert "W8A8" in again["data"]["text/html"]


def test_a_live_table_gives_way_to_the_one_that_its_cell_returns(tmp_path):
    ((live, result),) = outputs(tmp_path, "live()")
    assert set(live["data"]) == {"text/plain"}
    assert "2 of 2 methods" in live["data"]["text/plain"]
    assert "W8A8" in result["data"]["text/html"]


def test_a_live_table_that_an_error_ends_keeps_its_rows_and_says_which(tmp_path):
    ((output, error),) = outputs(tmp_path, "def f(table):\n    raise RuntimeError('out of memory')\nlive(on_row=f)")
    assert error["ename"] == "RuntimeError"
    assert "RuntimeError: out of memory" in output["data"]["text/html"].split("<style>")[0]
    assert "not computed" in output["data"]["text/html"]
    assert "1 of 2 methods" in output["data"]["text/plain"]
