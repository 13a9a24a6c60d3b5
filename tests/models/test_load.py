"""load and wrap: every kind of source, device and dtype, and every way in which it can go wrong."""

import copy
import json
import shutil

import pytest
import torch
from torch import nn

import sqviz
from sqviz.errors import DownloadError, SqvizError, UnknownArchitecture


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny model that a test may spoil."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def logits(model):
    return model(torch.arange(20)[None]).logits


# --- sources


def test_a_folder(tiny_folder, tiny_llama):
    lm = sqviz.load(tiny_folder)
    assert torch.equal(logits(lm.model), logits(tiny_llama))
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert lm.name == str(tiny_folder)
    assert lm.tokenizer.decode(lm.tokenizer("a fox")["input_ids"]) == "a fox"
    assert lm.arch is sqviz.ARCHS["LlamaForCausalLM"]


def test_a_gguf_file(tiny_gguf, tiny_llama, tiny_tokenizer):
    lm = sqviz.load(tiny_gguf)
    torch.testing.assert_close(logits(lm.model), logits(tiny_llama), rtol=1e-5, atol=1e-5)
    assert lm.tokenizer("13 lazy\n\n1 dog")["input_ids"] == tiny_tokenizer("13 lazy\n\n1 dog")["input_ids"]
    assert lm.arch is sqviz.ARCHS["LlamaForCausalLM"]
    assert copy.deepcopy(lm.model).to(torch.float64).dtype == torch.float64  # it no longer counts as quantised


def test_a_gguf_in_half_precision(tiny_gguf):
    assert sqviz.load(tiny_gguf, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["model.safetensors", "other-name.safetensors"])
def test_a_safetensors_file_with_its_config_beside_it(folder, tiny_llama, name):
    (folder / "model.safetensors").rename(folder / name)
    lm = sqviz.load(folder / name)
    assert torch.equal(logits(lm.model), logits(tiny_llama))
    assert lm.tokenizer is not None
    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight


def test_a_folder_without_tokenizer_loads_without_one(folder):
    for file in folder.glob("*token*"):
        file.unlink()
    assert sqviz.load(str(folder)).tokenizer is None


def test_the_class_that_is_built_decides_not_what_the_config_calls_itself(folder):
    config = json.loads((folder / "config.json").read_text())
    config.pop("architectures")
    (folder / "config.json").write_text(json.dumps(config))
    assert sqviz.load(folder).arch is sqviz.ARCHS["LlamaForCausalLM"]


# --- device and dtype


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_auto_on_the_cpu(tiny_llama, tmp_path, stored):
    copy.deepcopy(tiny_llama).to(stored).save_pretrained(tmp_path / "half")
    expected = torch.float64 if stored == torch.float64 else torch.float32
    assert sqviz.load(tmp_path / "half", device="cpu").dtype == expected


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float64", "torch.float32"])
def test_dtype_asked_for(tiny_folder, dtype):
    found = sqviz.load(tiny_folder, dtype=dtype).dtype
    assert str(found).endswith(str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("dtype", ["int8", "half precision", torch.int64, None])
def test_a_dtype_that_is_none(tiny_folder, dtype):
    with pytest.raises(SqvizError, match=r"dtype=.*'auto', 'float32', 'bfloat16'"):
        sqviz.load(tiny_folder, dtype=dtype)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpu:cpu"])
def test_a_device_that_is_not_here(tiny_folder, device):
    with pytest.raises(SqvizError, match=rf"device='{device}' cannot be used here.*sqviz doctor"):
        sqviz.load(tiny_folder, device=device)


# --- what goes wrong


def test_unknown_architecture_is_said_before_weights_are_read(folder):
    from transformers import MambaConfig

    MambaConfig().save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"not a weight file: reading it would raise something else")
    with pytest.raises(UnknownArchitecture, match=r"MambaForCausalLM.*LlamaForCausalLM.*To add it"):
        sqviz.load(folder)


def test_a_model_that_is_no_language_model(folder):
    from transformers import ViTConfig

    ViTConfig().save_pretrained(folder)
    with pytest.raises(UnknownArchitecture, match="vit"):
        sqviz.load(folder)


def test_code_that_comes_with_a_model_is_never_run(folder):
    bomb = folder / "modeling_bomb.py"
    bomb.write_text("raise SystemExit('code of the model was run')")
    config = {"model_type": "bomb", "auto_map": {"AutoConfig": "modeling_bomb.C", "AutoModelForCausalLM": "x.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownArchitecture, match="never runs"):
        sqviz.load(folder)


def test_pickled_weights_are_not_read(folder):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    (folder / "model.safetensors").unlink()
    import pickle

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SqvizError, match=r"no \.safetensors file.*never read.*save_pretrained"):
        sqviz.load(folder)
    with pytest.raises(SqvizError, match=r"pytorch_model\.bin.*never read"):
        sqviz.load(folder / "pytorch_model.bin")


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.999])
def test_a_truncated_weight_file(folder, keep):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    with pytest.raises(SqvizError, match="truncated or altered"):
        sqviz.load(folder)


@pytest.mark.parametrize("keep", [10, 0.3, 0.9])
def test_a_truncated_gguf(tiny_gguf, tmp_path, keep):
    data = tiny_gguf.read_bytes()
    short = tmp_path / "short.gguf"
    short.write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    with pytest.raises(SqvizError, match=r"cannot read .*short\.gguf.*complete"):
        sqviz.load(short)


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(SqvizError, match=r"no config\.json.*notes\.txt"):
        sqviz.load(tmp_path)


@pytest.mark.parametrize("source", ["./no/such/folder", "/no/such", "nothing.gguf", "a b", "one/two/three"])
def test_a_path_that_is_not_there(source):
    with pytest.raises(SqvizError, match=r"no file or folder .*embedded model"):
        sqviz.load(source)


def test_a_hub_that_cannot_be_reached():
    with pytest.raises(DownloadError, match=r"facebook/opt-125m.*local folder.*HF_HUB_OFFLINE.*sqviz\.load\(\)"):
        sqviz.load("facebook/opt-125m")


# --- wrap


def test_wrap_keeps_the_very_model(tiny_llama, tiny_tokenizer, recwarn):
    before = {name: p.clone() for name, p in tiny_llama.state_dict().items()}
    attributes = sorted(tiny_llama.__dict__)
    lm = sqviz.wrap(tiny_llama, tiny_tokenizer)
    assert lm.model is tiny_llama
    assert lm.tokenizer is tiny_tokenizer
    assert sqviz.wrap(tiny_llama).tokenizer is None
    assert sorted(tiny_llama.__dict__) == attributes
    assert all(torch.equal(before[name], p) for name, p in tiny_llama.state_dict().items())
    assert len(recwarn) == 0


def test_a_model_in_training_mode_stays_in_it_and_is_looked_at_without_dropout(tiny_llama):
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(tiny_llama.config)
    config.attention_dropout = 0.5
    config.architectures = None
    model = LlamaForCausalLM(config).train()
    lm = sqviz.wrap(model)
    assert model.training
    assert model.model.layers[0].self_attn.training
    assert not any(module.training for module in lm.model.modules())
    assert torch.equal(logits(lm.model), logits(lm.model))
    assert lm.model.model.layers[0].mlp.up_proj.weight is model.model.layers[0].mlp.up_proj.weight
    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight


def test_a_class_derived_from_a_known_one(tiny_llama):
    from transformers import LlamaForCausalLM

    class OurLlama(LlamaForCausalLM):
        pass

    assert sqviz.wrap(OurLlama(tiny_llama.config)).arch is sqviz.ARCHS["LlamaForCausalLM"]


@pytest.mark.parametrize("thing", [None, 3, nn.Linear(2, 2), {"model": 1}])
def test_wrap_takes_only_models(thing):
    with pytest.raises(SqvizError, match="wrap takes a transformers causal language model"):
        sqviz.wrap(thing)


def test_wrap_points_to_load_for_a_name():
    with pytest.raises(SqvizError, match=r"sqviz\.load\('gpt2'\)"):
        sqviz.wrap("gpt2")


def test_wrap_of_a_model_without_a_head(tiny_llama):
    with pytest.raises(UnknownArchitecture, match="LlamaModel"):
        sqviz.wrap(tiny_llama.model)
