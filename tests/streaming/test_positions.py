"""Rows of position schemes, and the two pieces of arithmetic: turning keys, and ALiBi's bias."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import STREAMED, model, text

from sqviz.errors import SqvizError, UnknownArchitecture
from sqviz.models.arch import ARCHS
from sqviz.models.tiny import tiny
from sqviz.streaming.positions import Alibi, Rotary, angles, bias, frequencies, limit_of, scheme_of, slopes, turn


def rotary_of(lm) -> Rotary:
    scheme = scheme_of(lm)
    assert isinstance(scheme, Rotary)
    return scheme


def test_every_architecture_has_a_row():
    for name in ARCHS:
        lm = tiny(name)
        if name in ("OPTForCausalLM", "GPT2LMHeadModel"):
            with pytest.raises(SqvizError, match=r"learns an embedding for each absolute position.*such as Llama"):
                scheme_of(lm)
        else:
            assert isinstance(scheme_of(lm), Rotary | Alibi)
    assert isinstance(scheme_of(tiny("FalconForCausalLM/7b")), Rotary)
    assert isinstance(scheme_of(tiny("FalconForCausalLM/rw")), Alibi)


def test_an_unknown_architecture_says_where_a_row_goes():
    lm = tiny("LlamaForCausalLM")
    stranger = lm.replace(arch=type(lm.arch)("NewForCausalLM", lm.arch.blocks, lm.arch.inputs))
    with pytest.raises(UnknownArchitecture, match=r"NewForCausalLM encodes positions; add a row to sqviz\.streaming\."):
        scheme_of(stranger)


@pytest.mark.parametrize("name", [name for name in STREAMED if not isinstance(scheme_of(tiny(name)), Alibi)])
def test_a_key_turned_on_is_the_key_of_a_later_place(name: str):
    """Seen from outside: keys that the model itself gives the cache for the same hidden states, 23 places later."""
    lm = model(name)
    scheme, keys = rotary_of(lm), [[], []]
    for start, found in ((2, keys[0]), (25, keys[1])):
        with torch.no_grad():
            past = lm.model(input_ids=text(9)[None], position_ids=torch.arange(start, start + 9)[None]).past_key_values
        found.append(past.layers[0].keys if scheme.tensor == "keys" else past.layers[0].values)
    omega = frequencies(lm, scheme, 0)
    assert omega is not None
    moved = turn(keys[0][0], angles(torch.tensor([23]), omega, lm.dtype), scheme.pairs)
    torch.testing.assert_close(moved, keys[1][0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(keys[0][0], keys[1][0], atol=1e-2)


def test_layers_without_rotary_positions_have_no_frequencies():
    lm = model("Cohere2ForCausalLM", layer_types=["sliding_attention", "full_attention"])
    assert [frequencies(lm, rotary_of(lm), layer) is None for layer in (0, 1)] == [False, True]


def test_layer_types_with_frequencies_of_their_own():
    lm = model("Gemma3ForCausalLM", layer_types=["sliding_attention", "full_attention"])
    local, whole = (frequencies(lm, rotary_of(lm), layer) for layer in (0, 1))
    assert local.shape == whole.shape == (5,)
    assert not torch.allclose(local, whole)


pairs = st.sampled_from(["halves", "neighbours"])


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 4), st.integers(0, 3), st.lists(st.integers(-300, 300), min_size=1, max_size=4), pairs)
def test_turning_against_complex_numbers(count: int, rest: int, places: list[int], kind: str):
    x = torch.randn(2, 3, len(places), 2 * count + rest, dtype=torch.float64)
    omega = torch.logspace(0, -3, count, dtype=torch.float64)
    got = turn(x, angles(torch.tensor(places), omega, torch.float64), kind)
    even, odd = (
        (slice(0, count), slice(count, 2 * count)) if kind == "halves" else (slice(0, None, 2), slice(1, None, 2))
    )
    head = x[..., : 2 * count]
    turned = torch.complex(head[..., even], head[..., odd]) * torch.exp(1j * torch.tensor(places)[:, None] * omega)
    torch.testing.assert_close(got[..., : 2 * count][..., even], turned.real)
    torch.testing.assert_close(got[..., : 2 * count][..., odd], turned.imag)
    assert torch.equal(got[..., 2 * count :], x[..., 2 * count :])


def test_turning_is_done_in_float32_at_least_and_angles_are_exact_far_out():
    omega = torch.tensor([1.0], dtype=torch.float64)
    cos, sin = angles(torch.tensor([10**7]), omega, torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.float32
    assert float(cos) == pytest.approx(float(torch.tensor(1e7, dtype=torch.float64).cos()), abs=1e-7)
    x = torch.randn(1, 1, 1, 2).bfloat16()
    got = turn(x, (cos, sin), "halves")
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, turn(x.float(), (cos, sin), "halves").bfloat16())


# --- how far positions can be counted ---


def test_most_positions_that_one_set_of_angles_serves():
    rope = {"rope_theta": 10000.0, "factor": 2.0}
    long = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 40}
    expected = {
        "default": None,
        "linear": None,
        "dynamic": 95,  # at 96 it does not go back to its first angles
        "longrope": 40,
    }
    for kind, limit in expected.items():
        lm = tiny(
            "LlamaForCausalLM", rope_parameters={**rope, **(long if kind == "longrope" else {}), "rope_type": kind}
        )
        assert limit_of(lm, scheme_of(lm)) == limit
    for name, limit in (("GPTJForCausalLM", 96), ("BloomForCausalLM", None), ("Gemma3ForCausalLM", None)):
        assert limit_of(tiny(name), scheme_of(tiny(name))) == limit


# --- ALiBi ---


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 7, 8, 12, 16, 71])
def test_slopes_are_those_of_the_models_own_code(heads: int):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    ones, places, device = torch.ones(1, 9, dtype=torch.long), torch.arange(9)[None, None], torch.device("cpu")
    lm = tiny("BloomForCausalLM", n_head=heads, hidden_size=2 * heads, outliers=False)
    own = bias(places, slopes(lm, "bloom", device), "bloom", torch.float32)
    assert torch.equal(own[0, :, 0], build_alibi_tensor(ones, heads, torch.float32)[:, 0])
    own = bias(places, slopes(lm, "falcon", device), "falcon", torch.float32)
    assert torch.equal(own[0, :, 0], falcon(ones, heads, torch.float32)[:, 0])
    lm = tiny("MptForCausalLM", n_heads=heads, d_model=2 * heads, outliers=False)
    own = bias(places - 8, slopes(lm, "mpt", device), "mpt", torch.float32)
    assert torch.equal(own[0], build_mpt_alibi_tensor(heads, 9))
