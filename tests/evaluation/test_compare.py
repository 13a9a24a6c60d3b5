"""Methods side by side: the parts by hand, and what a crash or a cancel leaves."""

import json

import pytest
import torch

import sqviz
from sqviz.errors import SqvizError
from sqviz.evaluation import compare as module
from sqviz.evaluation.compare import method_bytes
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
    assert set(table.panels) == {"perplexity: perplexity", "weights, MB"}


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
    monkeypatch.setattr(module, "evaluate", None)  # nothing may be evaluated again
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
    assert "not finished" in repr(table)
    assert run(lm, tmp_path).complete


def test_a_damaged_row_is_made_again(lm, tmp_path):
    run(lm, tmp_path)
    for path in tmp_path.glob("*.json"):
        path.write_text('{"format": "sqviz.compare/1"')
    assert run(lm, tmp_path).complete
    assert all(json.loads(path.read_text())["format"] == module.FORMAT for path in tmp_path.glob("*.json"))


def test_a_method_that_the_model_cannot_have_says_why_and_the_others_go_on(tmp_path):
    table = run(tiny("MixtralForCausalLM"), tmp_path, (sqviz.LLM_INT8, sqviz.W8A8))
    assert "skip=" in table["LLM.int8()"].error
    assert table["LLM.int8()"].evaluation is None
    assert table["W8A8"].evaluation is not None
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert "why not" in repr(table)


def test_two_methods_of_one_name_are_refused(lm, tmp_path):
    with pytest.raises(SqvizError, match="W8A8"):
        run(lm, tmp_path, (sqviz.W8A8, sqviz.W8A8))
    with pytest.raises(SqvizError, match="no method"):
        run(lm, tmp_path, (sqviz.W8A8,))["O1"]


def test_a_live_table_fills_in_its_cell(tmp_path):
    """In a real kernel: one output, updated once per row."""
    import nbformat
    from nbclient import NotebookClient

    code = f"""
import torch
import sqviz
from sqviz.models.tiny import tiny
ids = torch.arange(3, 123)
lm = tiny("LlamaForCausalLM")
table = sqviz.compare(lm, [sqviz.W8A8], text=ids, calibration=ids, length=40, latency=False, live=True,
                      folder={str(tmp_path)!r}, progress=False)
"""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(book, timeout=120).execute()
    (output,) = book.cells[0].outputs
    assert "W8A8" in output["data"]["text/html"]
    assert "none" in output["data"]["text/html"]
