"""Models in integers on disk: what is read computes what was written, and no float weights come back."""

import json

import pytest
import torch
from sqviz_kernels.dispatch import backends

from sqviz.errors import SqvizError
from sqviz.models.load import load
from sqviz.models.tiny import TINY, tiny
from sqviz.observe.capture import capture
from sqviz.quant.checkpoint import load_int8, save_int8
from sqviz.quant.linear import quantize
from sqviz.quant.schemes import SMOOTHQUANT_LLAMA, SMOOTHQUANT_O1, SMOOTHQUANT_O3
from sqviz.quant.smooth import smooth

IDS = torch.randint(3, 131, (2, 40), generator=torch.Generator().manual_seed(5))
STREAM = torch.randint(3, 131, (400,), generator=torch.Generator().manual_seed(6))


def logits(lm):
    with torch.no_grad():
        return lm.model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", TINY)
def test_what_is_read_is_what_was_written(name, tmp_path):
    lm = quantize(tiny(name), SMOOTHQUANT_LLAMA, backend="auto")
    back = load_int8(save_int8(lm, tmp_path / "model"))
    assert torch.equal(logits(back), logits(lm))
    assert back.note == lm.note
    assert {n: type(m).__name__ for n, m in back.model.named_modules()} == {
        n: type(m).__name__ for n, m in lm.model.named_modules()
    }


@pytest.mark.parametrize("name", ["LlamaForCausalLM/tied-bias", "MixtralForCausalLM", "Phi3ForCausalLM"])
def test_static_steps_attention_and_head(name, tmp_path):
    original = tiny(name)
    magnitudes = capture(original, STREAM, samples=4, length=64)
    lm = quantize(original, SMOOTHQUANT_O3, magnitudes, backend="auto", head=True, attention=True)
    back = load_int8(save_int8(lm, tmp_path / "deep" / "model"))
    assert torch.equal(logits(back), logits(lm))
    for backend in [name for name, why in backends().items() if why is None and name != "vnni"]:
        other = load_int8(tmp_path / "deep" / "model", backend=backend)
        assert float((logits(other) - logits(lm)).norm() / logits(lm).norm()) < 0.05


def test_skipped_linears_and_online_scaling(tmp_path):
    original = tiny("OPTForCausalLM/gelu")
    magnitudes = capture(original, STREAM, samples=4, length=64)
    smoothed = smooth(original, magnitudes, 0.5, folds="all", online=True)
    lm = quantize(smoothed, SMOOTHQUANT_O1, backend="auto", skip="*.0.fc1")
    assert torch.equal(logits(load_int8(save_int8(lm, tmp_path / "model"))), logits(lm))


def test_a_mixture_in_part(tmp_path):
    lm = quantize(tiny("MixtralForCausalLM"), SMOOTHQUANT_LLAMA, backend="auto", skip="*.experts.down_proj")
    assert torch.equal(logits(load_int8(save_int8(lm, tmp_path / "model"))), logits(lm))


def test_bfloat16_stays(tmp_path):
    original = tiny("LlamaForCausalLM")
    for parameter in original.model.parameters():
        parameter.data = parameter.data.bfloat16()
    original.model.config.dtype = torch.bfloat16
    lm = quantize(original, SMOOTHQUANT_LLAMA, backend="auto", head=True)
    back = load_int8(save_int8(lm, tmp_path / "model"))
    assert back.dtype == torch.bfloat16
    assert torch.equal(logits(back), logits(lm))


def test_what_is_wrong_is_told_and_nothing_is_lost(tmp_path):
    lm = quantize(tiny("LlamaForCausalLM"), SMOOTHQUANT_LLAMA, backend="auto")
    folder = save_int8(lm, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SqvizError, match="there already"):
        save_int8(lm, folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SqvizError, match="backend='auto'"):
        save_int8(tiny("LlamaForCausalLM"), tmp_path / "float")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(SqvizError, match="sqviz_int8"):
        load_int8(tmp_path)
    with pytest.raises(SqvizError, match="load_int8"):
        load(folder)
    structure = json.loads((folder / "sqviz_int8.json").read_text())
    (folder / "sqviz_int8.json").write_text(json.dumps(structure | {"format": 99}))
    with pytest.raises(SqvizError, match="format 99"):
        load_int8(folder)
    structure["products"][0]["linears"][0] = "model.layers.0.self_attn.z_proj"
    (folder / "sqviz_int8.json").write_text(json.dumps(structure))
    with pytest.raises(SqvizError, match=r"z_proj\.codes"):
        load_int8(folder)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    lm = quantize(tiny("LlamaForCausalLM"), SMOOTHQUANT_LLAMA, backend="auto")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("sqviz.quant.checkpoint.write_tensors", full)
    with pytest.raises(OSError, match="no space"):
        save_int8(lm, tmp_path / "model")
    assert not list(tmp_path.iterdir())
