"""How each architecture tells its attention where a token stands, as rows of data: what streaming has to move.

    Rotary    keys (and queries) are turned by angles p·ω, before they reach the cache. Only differences of p count, so
              a key in the cache may be turned on: R(p')k = R(p' − p)·R(p)k.
    Alibi     a bias slope·p is added to the scores of the key at p. Nothing in the cache depends on p.
    Learned   the embedding of the absolute position is mixed into the hidden state: the cache cannot be renumbered.

p is the place inside the cache (thesis §4.3.2, "positions within the cache").
"""

import dataclasses
import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sqviz.errors import SqvizError, UnknownArchitecture
from sqviz.models.lm import LM


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary embedding (RoPE).

    Attributes:
        pairs: which two dimensions turn together: "halves" (d, d + n/2) or "neighbours" (2d, 2d + 1).
        tensor: which of the two tensors given to the cache is turned; MLA caches (latent, turned key).
        layer_type: only layers of this type turn their keys; "" for all.
        module: attribute of the base model that holds `inv_freq`; "" if the frequencies are GPT-J's 10000^(-2d/n).
    """

    pairs: Literal["halves", "neighbours"] = "halves"
    tensor: Literal["keys", "values"] = "keys"
    layer_type: str = ""
    module: str = "rotary_emb"


@dataclasses.dataclass(frozen=True)
class Alibi:
    """Linear bias on the scores.

    Attributes:
        attention: path of a block's attention module, which is given the bias.
        form: whose arithmetic: "bloom", "falcon" (bfloat16 slopes), "mpt".
    """

    attention: str
    form: Literal["bloom", "falcon", "mpt"]


@dataclasses.dataclass(frozen=True)
class Learned:
    """Learned absolute positions."""


Scheme = Rotary | Alibi | Learned

_ROWS: dict[str, Scheme] = {
    "OPTForCausalLM": Learned(),
    "GPT2LMHeadModel": Learned(),
    "BloomForCausalLM": Alibi("self_attention", "bloom"),
    "MptForCausalLM": Alibi("attn", "mpt"),
    "GPTNeoXForCausalLM": Rotary(),
    "GPTJForCausalLM": Rotary("neighbours", module=""),
    "FalconForCausalLM": Rotary(),
    "LlamaForCausalLM": Rotary(),
    "MistralForCausalLM": Rotary(),
    "MixtralForCausalLM": Rotary(),
    "Qwen2ForCausalLM": Rotary(),
    "Qwen3ForCausalLM": Rotary(),
    "Gemma2ForCausalLM": Rotary(),
    "Gemma3ForCausalLM": Rotary(),
    "PhiForCausalLM": Rotary(),
    "Phi3ForCausalLM": Rotary(),
    "GlmForCausalLM": Rotary("neighbours"),
    "Glm4ForCausalLM": Rotary("neighbours"),
    "CohereForCausalLM": Rotary("neighbours"),
    "Cohere2ForCausalLM": Rotary("neighbours", layer_type="sliding_attention"),
    "Olmo2ForCausalLM": Rotary(),
    "DeepseekV2ForCausalLM": Rotary("neighbours", tensor="values"),
}
_FALCON_RW = Alibi("self_attention", "falcon")
_SWITCHING = ("dynamic", "longrope")  # frequencies that change with the length of the text


def scheme_of(lm: LM) -> Rotary | Alibi:
    """The row for a model.

    Raises:
        UnknownArchitecture: there is none.
        SqvizError: learned absolute positions, which streaming cannot renumber.
    """
    scheme = _ROWS.get(lm.arch.name)
    if scheme is None:
        raise UnknownArchitecture(
            f"streaming does not know how {lm.arch.name} encodes positions; add a row to sqviz.streaming.positions"
        )
    if lm.arch.name == "FalconForCausalLM" and lm.config.alibi:
        return _FALCON_RW
    if isinstance(scheme, Learned):
        raise SqvizError(
            f"{lm.arch.name} learns an embedding for each absolute position and mixes it into every hidden state. Keys "
            "in the cache cannot be renumbered, so StreamingLLM does not apply (thesis §4.3.2: it needs relative "
            "positions, RoPE or ALiBi). Use a model such as Llama, Pythia, Falcon, MPT or BLOOM"
        )
    return scheme


def limit_of(lm: LM, scheme: Rotary | Alibi) -> int | None:
    """Most positions that can be counted with one set of angles; None without a limit."""
    if isinstance(scheme, Alibi):
        return None
    if not scheme.module:
        return int(lm.config.max_position_embeddings)  # GPT-J looks its angles up in a table
    kinds = _kinds(lm)
    if not kinds & {*_SWITCHING}:
        return None
    original = [p.get("original_max_position_embeddings") for p in _parameters(lm)]
    most = int(min(filter(None, [*original, lm.config.max_position_embeddings])))
    return most - ("dynamic" in kinds)  # which goes back to its first angles below that length only


def frequencies(lm: LM, scheme: Rotary, layer: int) -> Float[Tensor, " pair"] | None:
    """ω of a layer in radians per position, float64; None if the layer does not turn its keys."""
    config = lm.config
    kinds = getattr(config, "layer_types", None)
    kind = kinds[layer] if kinds else ""
    if scheme.layer_type and kind != scheme.layer_type:
        return None
    if not scheme.module:
        count = config.rotary_dim or config.hidden_size
        return 1.0 / 10000 ** (torch.arange(0, count, 2, dtype=torch.int64).float() / count).double()
    rotary = getattr(_base(lm), scheme.module)
    prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
    original = "original_" if _kinds(lm) & {*_SWITCHING} else ""  # `inv_freq` is whatever the last text needed
    return getattr(rotary, f"{prefix}{original}inv_freq").detach().double()


Angles = tuple[Float[Tensor, "*rest position pair"], Float[Tensor, "*rest position pair"]]


def angles(places: Int[Tensor, "*rest position"], omega: Float[Tensor, " pair"], dtype: torch.dtype) -> Angles:
    """cos and sin of places·ω: computed in float64, given in the dtype that `turn` works in for tensors of `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angle = places.to(omega)[..., None] * omega
    return angle.cos().to(wide), angle.sin().to(wide)


def turn(x: Float[Tensor, "*rest position dim"], by: Angles, pairs: str) -> Float[Tensor, "*rest position dim"]:
    """x turned on by these angles; in float32 at least, returned in the dtype of x.

    Dimensions beyond twice the number of frequencies are left alone (partial rotary).
    """
    cos, sin = (part.to(x.device) for part in by)
    a, b, rest = _split(x.to(cos.dtype), cos.shape[-1], pairs)
    return _join(a * cos - b * sin, b * cos + a * sin, rest, pairs).to(x.dtype)


def _split(x: Tensor, count: int, pairs: str) -> tuple[Tensor, Tensor, Tensor]:
    turned, rest = x[..., : 2 * count], x[..., 2 * count :]
    if pairs == "halves":
        return turned[..., :count], turned[..., count:], rest
    return turned[..., 0::2], turned[..., 1::2], rest


def _join(a: Tensor, b: Tensor, rest: Tensor, pairs: str) -> Tensor:
    turned = [a, b] if pairs == "halves" else [torch.stack((a, b), -1).flatten(-2)]
    return torch.cat([*turned, rest.expand(*turned[0].shape[:-1], -1)], -1)


def slopes(lm: LM, form: str, device: torch.device) -> Float[Tensor, " head"]:
    """ALiBi's slope of every head, as the model's own code rounds it."""
    heads = int(getattr(lm.config, "n_heads", None) or lm.config.num_attention_heads)
    if form == "mpt":
        most = 2 ** math.ceil(math.log2(heads))
        found = 1.0 / torch.pow(2, torch.arange(1, most + 1).float() * (lm.config.attn_config.alibi_bias_max / most))
        return (found if most == heads else torch.cat([found[1::2], found[::2]])[:heads]).to(device)
    most = 2 ** math.floor(math.log2(heads))
    base = torch.tensor(2 ** (-(2 ** -(math.log2(most) - 3))))
    found = torch.pow(base, torch.arange(1, 1 + most, dtype=torch.int32))
    if most != heads:
        extra = torch.tensor(2 ** (-(2 ** -(math.log2(2 * most) - 3))))
        odd = torch.arange(1, 1 + 2 * min(most, heads - most), 2, dtype=torch.int32)
        found = torch.cat([found, torch.pow(extra, odd)])
    return found.to(device)


def bias(
    places: Int[Tensor, "batch query key"], slope: Float[Tensor, " head"], form: str, dtype: torch.dtype
) -> Float[Tensor, "batch head query key"]:
    """What ALiBi adds to the scores of keys at these places, as the model's own code rounds it."""
    if form == "falcon":
        return (slope.bfloat16()[:, None, None] * places[:, None]).to(dtype)
    found = slope[:, None, None] * places[:, None]
    return found if form == "mpt" else found.to(dtype)


def _parameters(lm: LM) -> list[dict[str, Any]]:
    found = getattr(lm.config, "rope_parameters", None) or {}
    return [found] if "rope_type" in found else [p for p in found.values() if isinstance(p, dict)]


def _kinds(lm: LM) -> set[str]:
    return {str(p.get("rope_type")) for p in _parameters(lm)}


def _base(lm: LM) -> nn.Module:
    base: Any = lm.model.base_model
    return base
