"""What a table of methods shows, computed a second time from its rows."""

import json
import math
import sys
from pathlib import Path

import pandas
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "widgets"))
import synthetic_methods

from sqviz.errors import SqvizError
from sqviz.evaluation.method_sheet import sheet_of
from sqviz.evaluation.method_table import MethodRow
from sqviz.evaluation.result import Evaluation
from sqviz.evaluation.scores import Score, score


@pytest.fixture(scope="module")
def table():
    return synthetic_methods.table()


def test_columns_have_units_help_and_a_direction(table):
    columns = {column["key"]: column for column in table.sheet()["columns"]}
    assert list(columns) == [
        "perplexity perplexity",
        "change perplexity perplexity",
        "hellaswag acc",
        "change hellaswag acc",
        "size",
        "time",
        "faster",
        "perplexity bits_per_byte",
    ]
    assert all(column["help"] for column in columns.values())
    assert [columns[key]["unit"] for key in ("change perplexity perplexity", "hellaswag acc", "size", "time")] == [
        "%",
        "%",
        "MB",
        "ms",
    ]
    assert columns["hellaswag acc"]["better"] == "higher"


def test_cells_are_what_the_scores_give(table):
    for row, shown in zip(table.rows, table.sheet()["rows"], strict=True):
        assert shown["cells"]["size"]["value"] == pytest.approx(row.bytes / 1e6)
        if row.evaluation is None:
            assert shown["state"] == "cannot"
            assert shown["why"] == row.error
            continue
        first, here = table.rows[0].evaluation["perplexity"], row.evaluation["perplexity"]
        assert shown["cells"]["perplexity perplexity"]["value"] == pytest.approx(here.value)
        if row is table.rows[0]:
            assert "change perplexity perplexity" not in shown["cells"]
            continue
        cell = shown["cells"]["change perplexity perplexity"]
        assert cell["value"] == pytest.approx(100 * (here.value / first.value - 1))
        assert cell["low"] <= cell["value"] <= cell["high"]
        points = shown["cells"]["change hellaswag acc"]["value"]
        gained = row.evaluation["hellaswag"].items - table.rows[0].evaluation["hellaswag"].items
        assert points == pytest.approx(100 * float(gained.mean()))


def test_tone_is_the_verdict(table):
    rows = {row["name"]: row["cells"].get("change perplexity perplexity") for row in table.sheet()["rows"]}
    assert rows["W8A8"]["tone"] == "worse"
    assert rows["kept sinks"]["tone"] == "noise"
    assert "noise" in rows["kept sinks"]["note"]


def test_speed_is_against_the_model_in_the_same_run(table):
    rows = {row["name"]: row["cells"] for row in table.sheet()["rows"]}
    assert rows["W8A8"]["faster"]["value"] == pytest.approx(97 / 31)
    assert rows["none"]["time"]["value"] == 97
    assert "median" in rows["none"]["time"]["note"]
    assert "time" not in rows["LLM.int8()"]
    untimed = synthetic_methods.table(timed=False).sheet()
    assert "time" not in {column["key"] for column in untimed["columns"]}


def test_the_sheet_is_json_even_for_a_model_that_broke():
    whole = score("perplexity", "perplexity", torch.tensor([10.0, 12.0]), content="a", seconds=1.0)
    broken = score("perplexity", "perplexity", torch.tensor([2000.0, 900.0]), content="a", seconds=1.0)
    rows = [MethodRow(n, "", Evaluation("m", (s,)), 1, None, None) for n, s in (("none", whole), ("broken", broken))]
    assert math.isinf(broken.value)
    cells = json.loads(json.dumps(sheet_of(rows), allow_nan=False))["rows"][1]["cells"]
    assert cells["perplexity perplexity"] == {
        "value": None,
        "text": "∞",
        "note": cells["perplexity perplexity"]["note"],
    }
    assert cells["change perplexity perplexity"]["value"] is None


def test_a_metric_that_is_no_sum_over_items_has_a_value_and_no_change():
    made = [
        MethodRow(
            name, "", Evaluation("m", (Score("t", "f1", value, 5, None, True, None, None, "a", 1.0),)), 1, None, None
        )
        for name, value in (("none", 0.5), ("other", 0.25))
    ]
    cells = sheet_of(made)["rows"][1]["cells"]
    assert cells["t f1"]["value"] == 0.25
    assert "change t f1" not in cells


def test_frame_has_the_same_numbers(table):
    frame = table.to_frame()
    shown = {row["name"]: row["cells"] for row in table.sheet()["rows"]}
    for name in ("W8A8", "SmoothQuant-Llama"):
        assert frame.loc[name, "perplexity perplexity"] == pytest.approx(shown[name]["perplexity perplexity"]["value"])
        change = shown[name]["change perplexity perplexity"]
        assert frame.loc[name, "perplexity perplexity: change"] == change["text"]
        assert frame.loc[name, "perplexity perplexity: 95 % interval"] == change["interval"]
        assert frame.loc[name, "× faster"] == pytest.approx(shown[name]["faster"]["value"])
    assert pandas.isna(frame.loc["none", "128 tokens, ms"])


def test_figure_has_a_point_per_method_that_has_both_numbers(table):
    size, latency = table.figure(), table.figure("latency")
    assert [point.name for point in size.data] == [row.name for row in table.rows if row.evaluation]
    assert [point.name for point in latency.data] == ["none", "W8A8", "SmoothQuant-O3", "SmoothQuant-Llama"]
    assert size.data[1].x[0] == pytest.approx(162.9)
    assert latency.layout.xaxis.title.text == "128 tokens, ms (lower is better)"
    with pytest.raises(SqvizError, match="latency=True"):
        synthetic_methods.table(timed=False).figure("latency")
    with pytest.raises(SqvizError, match="against='speed'"):
        table.figure("speed")
