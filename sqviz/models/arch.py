"""`ARCHS`: per architecture, one row of plain data: which linears read the same tensor, and how it can be rescaled.

Smoothing (thesis ch. 3.3) divides the input of a linear by s per channel and multiplies the columns of its weight by s.
The division costs nothing when whatever produced the input can absorb it exactly. A row therefore lists, in execution
order, every tensor of a block that linears read (`Input`), *all* linears that read it, and its producer (`Fold`):

    Norm      a norm: weight (and bias) / s. `plus_one` is Gemma's gain of 1 + w, where w becomes (1 + w)/s − 1.
    Value     the value rows of the attention's projection: softmax·V is linear in V. Query heads that share a value
              head (GQA) share s. The layouts of fused projections are told apart by `layout`.
    Up        the ungated half of a gated MLP, act(gate) · up: linear in up.
    Through   fc1 of a plain MLP, if the activation named in the config is positively homogeneous: relu(x/s) =
              relu(x)/s.

An input without an exact fold has `fold=None` and a reason in words. Every reader of a norm's output has to be listed:
where something else reads it too (post-LN residuals), nothing can be folded into that norm.

To add an architecture: read its modelling file in transformers, add a row here and a configuration in `models/tiny.py`;
`tests/quant/test_smooth.py` then checks that logits stay the same for every fold of the row.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from sqviz.errors import UnknownArchitecture

# transformers' names of the activations with act(x/s) = act(x)/s for every s > 0
HOMOGENEOUS = ("relu", "leaky_relu", "linear")


class Set:
    """In `when`: any value but None, False and 0."""


class Unset:
    """In `when`: None, False, 0, or absent."""


@dataclasses.dataclass(frozen=True)
class Norm:
    """Producer: the norm at `path` (relative to the block), with gain w, or 1 + w if `plus_one`."""

    path: str
    plus_one: bool = False


@dataclasses.dataclass(frozen=True)
class Value:
    """Producer: the value rows of the linear at `path`.

    layout: "own" a v_proj of its own · "stacked" all queries, all keys, all values · "interleaved" for each key/value
    head its queries, its key, its value (BLOOM, NeoX, each Falcon) · "latent" for each head its key, its value
    (DeepSeek's MLA).
    """

    path: str
    layout: Literal["own", "stacked", "interleaved", "latent"] = "own"


@dataclasses.dataclass(frozen=True)
class Up:
    """Producer: the last rows of the linear at `path`, as many as the consumer has channels.

    That is all of an up_proj, or half of a fused gate_up_proj; per expert where experts are fused.
    """

    path: str


@dataclasses.dataclass(frozen=True)
class Through:
    """Producer: the linear at `path`, through the activation that the config names under the key `activation`."""

    path: str
    activation: str


Fold = Norm | Value | Up | Through


@dataclasses.dataclass(frozen=True)
class Input:
    """One tensor of a block and the linears that read it.

    Attributes:
        consumers: paths of all linears that read it, relative to the block.
        fold: how it can be rescaled exactly, or None.
        reason: why it cannot, if `fold` is None.
        entry: it is what attention or MLP reads first; these the thesis smooths by default. Implied by a `Norm`.
        when: values of config entries (dotted paths) for which this line holds; `Set` and `Unset` are allowed.
        where: the line holds only in blocks that have a module or parameter at this path.
    """

    consumers: tuple[str, ...]
    fold: Fold | None = None
    reason: str = ""
    entry: bool = False
    when: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    where: str = ""

    def holds(self, config: Any) -> bool:
        """Whether `config` has the values that this line is for."""
        return all(_matches(_lookup(config, key), wanted) for key, wanted in self.when.items())


@dataclasses.dataclass(frozen=True)
class Arch:
    """One row: where the blocks are, and what is read in each of them.

    Attributes:
        name: the class, as `config.architectures` gives it.
        blocks: path of the list of blocks.
        inputs: the tensors that linears of a block read, in execution order.
    """

    name: str
    blocks: str
    inputs: tuple[Input, ...]


def _lookup(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else getattr(config, part, None)
    return config


def _matches(value: Any, wanted: Any) -> bool:
    if wanted is Set or wanted is Unset:
        return bool(value) == (wanted is Set)
    return value == wanted


# --- lines that several rows share ---

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_O = Input(("self_attn.o_proj",), Value("self_attn.v_proj"))
_DOWN = Input(("mlp.down_proj",), Up("mlp.up_proj"))
_FUSED_DOWN = Input(("mlp.down_proj",), Up("mlp.gate_up_proj"))

_LLAMA = (Input(_QKV, Norm("input_layernorm")), _O, Input(_GATE_UP, Norm("post_attention_layernorm")), _DOWN)
_GEMMA = (  # post_attention_layernorm stands between o_proj and the residual sum here, not before the MLP
    Input(_QKV, Norm("input_layernorm", plus_one=True)),
    _O,
    Input(_GATE_UP, Norm("pre_feedforward_layernorm", plus_one=True)),
    _DOWN,
)
_GLM = (  # GLM-4's post_self_attn_layernorm and post_mlp_layernorm stand after o_proj and down_proj: not touched
    Input(_QKV, Norm("input_layernorm")),
    _O,
    Input(("mlp.gate_up_proj",), Norm("post_attention_layernorm")),
    _FUSED_DOWN,
)
_PHI3 = (
    Input(("self_attn.qkv_proj",), Norm("input_layernorm")),
    Input(("self_attn.o_proj",), Value("self_attn.qkv_proj", "stacked")),
    Input(("mlp.gate_up_proj",), Norm("post_attention_layernorm")),
    _FUSED_DOWN,
)
_COHERE = (Input(_QKV + _GATE_UP, Norm("input_layernorm")), _O, _DOWN)  # attention and MLP in parallel, one norm

_NO_PRE_NORM = "no norm stands before it: it is the residual stream itself, which later blocks read as well"
_OLMO2 = (
    Input(_QKV, reason=_NO_PRE_NORM, entry=True),
    _O,
    Input(_GATE_UP, reason=_NO_PRE_NORM, entry=True),
    _DOWN,
)

_EXPERTS = Input(("mlp.experts.down_proj",), Up("mlp.experts.gate_up_proj"), where="mlp.experts")
_MIXTRAL = (
    Input(_QKV, Norm("input_layernorm")),
    _O,
    Input(("mlp.gate", "mlp.experts.gate_up_proj"), Norm("post_attention_layernorm")),  # the router reads it too
    _EXPERTS,
)
_SHARED = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
_DEEPSEEK_V2 = (
    Input(("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"), Norm("input_layernorm"), when={"q_lora_rank": None}),
    Input(("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), Norm("input_layernorm"), when={"q_lora_rank": Set}),
    Input(("self_attn.q_b_proj",), Norm("self_attn.q_a_layernorm"), when={"q_lora_rank": Set}),
    Input(("self_attn.kv_b_proj",), Norm("self_attn.kv_a_layernorm")),
    Input(("self_attn.o_proj",), Value("self_attn.kv_b_proj", "latent")),
    Input(_GATE_UP, Norm("post_attention_layernorm"), where="mlp.gate_proj"),  # the first, dense blocks
    dataclasses.replace(_DOWN, where="mlp.up_proj"),
    Input(("mlp.gate", "mlp.experts.gate_up_proj", *_SHARED), Norm("post_attention_layernorm"), where="mlp.experts"),
    _EXPERTS,
    Input(("mlp.shared_experts.down_proj",), Up("mlp.shared_experts.up_proj"), where="mlp.shared_experts"),
)

_RESIDUAL = "the residual sum reads the norm's output as well"
_OPT_PRE = {"do_layer_norm_before": True}
_OPT_POST = {"do_layer_norm_before": False}  # opt-350m
_OPT = (
    Input(_QKV, Norm("self_attn_layer_norm"), when=_OPT_PRE),
    Input(_QKV, reason=f"post-LN block: {_RESIDUAL}", entry=True, when=_OPT_POST),
    Input(("self_attn.out_proj",), Value("self_attn.v_proj")),
    Input(("fc1",), Norm("final_layer_norm"), when=_OPT_PRE),
    Input(("fc1",), reason=f"post-LN block: {_RESIDUAL}", entry=True, when=_OPT_POST),
    Input(("fc2",), Through("fc1", "activation_function")),
)

_FC1, _FC2 = "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
_BLOOM_POST = "apply_residual_connection_post_layernorm"
_BLOOM_QKV = "self_attention.query_key_value"
_BLOOM = (
    Input((_BLOOM_QKV,), Norm("input_layernorm"), when={_BLOOM_POST: Unset}),
    Input((_BLOOM_QKV,), reason=f"{_BLOOM_POST}: {_RESIDUAL}", entry=True, when={_BLOOM_POST: Set}),
    Input(("self_attention.dense",), Value(_BLOOM_QKV, "interleaved")),
    Input((_FC1,), Norm("post_attention_layernorm"), when={_BLOOM_POST: Unset}),
    Input((_FC1,), reason=f"{_BLOOM_POST}: {_RESIDUAL}", entry=True, when={_BLOOM_POST: Set}),
    Input((_FC2,), reason=f"gelu between {_FC1} and {_FC2} is not homogeneous"),
)
_GPT_NEOX = (  # with use_parallel_residual too, attention and MLP have a norm each
    Input(("attention.query_key_value",), Norm("input_layernorm")),
    Input(("attention.dense",), Value("attention.query_key_value", "interleaved")),
    Input((_FC1,), Norm("post_attention_layernorm")),
    Input((_FC2,), Through(_FC1, "hidden_act")),
)
_GPT2 = (
    Input(("attn.c_attn",), Norm("ln_1")),
    Input(("attn.c_proj",), Value("attn.c_attn", "stacked")),
    Input(("mlp.c_fc",), Norm("ln_2")),
    Input(("mlp.c_proj",), Through("mlp.c_fc", "activation_function")),
)
_GPTJ = (
    Input(("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"), Norm("ln_1")),
    Input(("attn.out_proj",), Value("attn.v_proj")),
    Input(("mlp.fc_out",), Through("mlp.fc_in", "activation_function")),
)
_MPT = (
    Input(("attn.Wqkv",), Norm("norm_1")),
    Input(("attn.out_proj",), Value("attn.Wqkv", "stacked"), when={"attn_config.clip_qkv": Unset}),
    Input(("attn.out_proj",), reason="clip_qkv clips the values at a fixed height", when={"attn_config.clip_qkv": Set}),
    Input(("ffn.up_proj",), Norm("norm_2")),
    Input(("ffn.down_proj",), reason="gelu between ffn.up_proj and ffn.down_proj is not homogeneous"),
)
_PHI = (
    Input((*_QKV, "mlp.fc1"), Norm("input_layernorm")),
    Input(("self_attn.dense",), Value("self_attn.v_proj")),
    Input(("mlp.fc2",), Through("mlp.fc1", "hidden_act")),
)

_FALCON_QKV = "self_attention.query_key_value"
_TWO_NORMS = {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2}  # 40B, 180B
_ONE_NORM = {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}  # Falcon2-11B
_PARALLEL = {"new_decoder_architecture": Unset, "parallel_attn": True}  # 7B
_SEQUENTIAL = {"new_decoder_architecture": Unset, "parallel_attn": False}  # RW
_FALCON = (
    Input((_FALCON_QKV,), Norm("ln_attn"), when=_TWO_NORMS),
    Input((_FALCON_QKV, _FC1), Norm("input_layernorm"), when=_ONE_NORM),
    Input((_FALCON_QKV, _FC1), Norm("input_layernorm"), when=_PARALLEL),
    Input((_FALCON_QKV,), Norm("input_layernorm"), when=_SEQUENTIAL),
    Input(("self_attention.dense",), Value(_FALCON_QKV, "interleaved")),
    Input((_FC1,), Norm("ln_mlp"), when=_TWO_NORMS),
    Input((_FC1,), Norm("post_attention_layernorm"), when=_SEQUENTIAL),
    Input((_FC2,), Through(_FC1, "activation")),
)

ARCHS: dict[str, Arch] = {
    name: Arch(name, blocks, inputs)
    for name, blocks, inputs in (
        ("OPTForCausalLM", "model.decoder.layers", _OPT),
        ("BloomForCausalLM", "transformer.h", _BLOOM),
        ("GPTNeoXForCausalLM", "gpt_neox.layers", _GPT_NEOX),
        ("GPT2LMHeadModel", "transformer.h", _GPT2),
        ("GPTJForCausalLM", "transformer.h", _GPTJ),
        ("MptForCausalLM", "transformer.blocks", _MPT),
        ("FalconForCausalLM", "transformer.h", _FALCON),
        ("LlamaForCausalLM", "model.layers", _LLAMA),
        ("MistralForCausalLM", "model.layers", _LLAMA),
        ("MixtralForCausalLM", "model.layers", _MIXTRAL),
        ("Qwen2ForCausalLM", "model.layers", _LLAMA),
        ("Qwen3ForCausalLM", "model.layers", _LLAMA),
        ("Gemma2ForCausalLM", "model.layers", _GEMMA),
        ("Gemma3ForCausalLM", "model.layers", _GEMMA),
        ("PhiForCausalLM", "model.layers", _PHI),
        ("Phi3ForCausalLM", "model.layers", _PHI3),
        ("GlmForCausalLM", "model.layers", _GLM),
        ("Glm4ForCausalLM", "model.layers", _GLM),
        ("CohereForCausalLM", "model.layers", _COHERE),
        ("Cohere2ForCausalLM", "model.layers", _COHERE),
        ("Olmo2ForCausalLM", "model.layers", _OLMO2),
        ("DeepseekV2ForCausalLM", "model.layers", _DEEPSEEK_V2),
    )
}


def arch_of(config: Any) -> Arch:
    """The row for a transformers configuration, by `config.architectures[0]`.

    Raises:
        UnknownArchitecture: there is no such row; the message names the known ones and how to add one.
    """
    names = getattr(config, "architectures", None) or ["(config.architectures is empty)"]
    if names[0] in ARCHS:
        return ARCHS[names[0]]
    raise UnknownArchitecture(
        f"no row for architecture {names[0]!r}; known: {', '.join(sorted(ARCHS))}. To add it, put a row into "
        "sqviz.models.arch.ARCHS: the path of its blocks and, for each tensor that linears read, all its readers and "
        "its producer"
    )
