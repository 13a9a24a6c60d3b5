"""The strengths of the literature: every row is found again by a config as its model has it, with its source."""

from types import SimpleNamespace

import pytest

import sqviz
from sqviz.errors import SqvizError
from sqviz.models.tiny import tiny
from sqviz.quant.published_alpha import PUBLISHED_ALPHAS, alpha_preset


def config(model_type, hidden_size, **fields):
    return SimpleNamespace(model_type=model_type, hidden_size=hidden_size, **fields)


LLAMA_1 = {"vocab_size": 32000, "max_position_embeddings": 2048}
LLAMA_2 = {"vocab_size": 32000, "max_position_embeddings": 4096}
LLAMA_3 = {"vocab_size": 128256, "max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("given", "alpha", "model", "source"),
    [
        (config("llama", 4096, **LLAMA_2), 0.85, "Llama-2-7B", "Table 3.7"),
        (config("llama", 5120, **LLAMA_2), 0.85, "Llama-2-13B", "Table 3.7"),
        (config("llama", 8192, **LLAMA_2), 0.9, "Llama-2-70B", "Table 3.7"),
        (config("llama", 4096, **LLAMA_3), 0.85, "Llama-3-8B", "README"),
        (config("llama", 8192, **LLAMA_3), 0.85, "Llama-3-70B", "README"),
        (config("llama", 6656, **LLAMA_1), 0.8, "LLaMA-30B", "Table 3.6"),
        (config("mistral", 4096), 0.8, "Mistral-7B", "Table 3.7"),
        (config("mixtral", 4096), 0.8, "Mixtral-8x7B", "Table 3.7"),
        (config("falcon", 4544), 0.6, "Falcon-7B", "Table 3.7"),
        (config("falcon", 8192), 0.7, "Falcon-40B", "Table 3.7"),
        (config("opt", 768), 0.5, "OPT, all sizes", "§3.4.1"),
        (config("bloom", 14336), 0.5, "BLOOM, all sizes", "§3.4.1"),
        (config("glm", 12288), 0.75, "GLM-130B", "§3.4.1"),
    ],
)
def test_each_model_gets_its_own(given, alpha, model, source):
    found = alpha_preset(given)
    assert (found.alpha, found.model, found.exact) == (alpha, model, True)
    assert source in found.source
    assert str(found).startswith(f"α = {alpha:g} for {model}")
    assert "nearest" not in str(found)


def test_a_model_without_a_row_gets_the_nearest_of_its_family_and_is_told_so():
    found = sqviz.alpha_preset(tiny("LlamaForCausalLM"))
    assert (found.model, found.alpha, found.exact) == ("Llama-2-7B", 0.85, False)
    assert "nearest of its family" in str(found)
    assert alpha_preset(config("falcon", 14848)).model == "Falcon-40B"  # 180B
    assert alpha_preset(config("mistral", 5120)).exact is False


def test_an_unknown_family_is_told_which_there_are():
    with pytest.raises(SqvizError, match=r"'qwen3'.*opt, bloom, glm, llama.*alpha_curve.*search_alpha"):
        alpha_preset(tiny("Qwen3ForCausalLM"))
    with pytest.raises(SqvizError, match=r"alpha_preset\('llama'\).*transformers config"):
        alpha_preset("llama")


def test_every_row_says_what_it_was_found_for():
    for row in PUBLISHED_ALPHAS:
        assert 0 < row.alpha < 1
        assert row.scheme
        assert row.source.startswith(("thesis §", "thesis Table", "README of smoothquant"))
    names = [row.model for row in PUBLISHED_ALPHAS]
    assert len(set(names)) == len(names)
