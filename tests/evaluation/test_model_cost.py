"""What models cost: every model in turns, the first as the measure, bad input told."""

import pytest
import torch

from sqviz.errors import Cancelled, SqvizError, TextTooShort
from sqviz.evaluation.model_cost import ModelCost, ModelCostRow, model_cost
from sqviz.models.tiny import tiny
from sqviz.progress import CancelToken
from sqviz.quant.linear import quantize
from sqviz.quant.schemes import SMOOTHQUANT_LLAMA

IDS = torch.randint(3, 131, (200,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def cost():
    lm = tiny("LlamaForCausalLM")
    int8 = quantize(lm, SMOOTHQUANT_LLAMA, backend="auto", attention=True, head=True)
    return model_cost({"float32": lm, "INT8": int8}, IDS, batch=2, length=30, rounds=2)


def test_every_model_is_measured(cost):
    assert [row.name for row in cost.rows] == ["float32", "INT8"]
    assert all(row.context > 0 and row.step > 0 for row in cost.rows)
    lm = tiny("LlamaForCausalLM").model
    assert cost.rows[0].bytes == 4 * sum(tensor.numel() for tensor in (*lm.parameters(), *lm.buffers()))
    assert cost.rows[1].bytes < cost.rows[0].bytes


def test_it_shows_itself(cost, tmp_path):
    frame = cost.to_frame()
    assert list(frame.index) == ["float32", "INT8"]
    assert frame["× faster"].iloc[0] == 1
    bundle = cost._repr_mimebundle_()
    assert {"image/svg+xml", "application/vnd.plotly.v1+json", "text/plain"} <= set(bundle)
    assert "one more token, ms" in bundle["image/svg+xml"]
    assert len(cost.figure().data) == 3
    assert cost.to_png(tmp_path / "cost.png").stat().st_size > 1000


def test_bars_say_what_they_are_of_the_first():
    rows = (ModelCostRow("a", 200.0, 20.0, 10_000_000), ModelCostRow("b", 50.0, 5.0, 2_500_000))
    texts = ModelCost(rows, 1, 512, "cpu").figure().data[0].text
    assert list(texts) == ["200", "50 (0.25 ×)"]


def test_bad_input_is_told():
    lm = tiny("LlamaForCausalLM")
    with pytest.raises(SqvizError, match="at least one"):
        model_cost({}, IDS)
    with pytest.raises(SqvizError, match="rounds=0"):
        model_cost({"a": lm}, IDS, rounds=0)
    with pytest.raises(TextTooShort, match="200 tokens"):
        model_cost({"a": lm}, IDS, batch=3, length=90)
    stop = CancelToken()
    stop.cancel()
    with pytest.raises(Cancelled):
        model_cost({"a": lm}, IDS, length=20, cancel=stop)
