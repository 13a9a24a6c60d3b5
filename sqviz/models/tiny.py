"""Tiny random models, one per row of `ARCHS` and layout: the test bench of everything that depends on the architecture.

No hub, no tokenizer, a few milliseconds each. Sizes are odd on purpose (no powers of two), queries are grouped where
the architecture can, and outlier channels are planted as real models have them: a few channels of every producer's
output are 64 × larger, and the weights that read them smaller by nearly as much, so that the model stays well
conditioned.
"""

import math
from typing import Any

import torch
from torch import nn

from sqviz.errors import UnknownArchitecture
from sqviz.models.arch import arch_of
from sqviz.models.folds import divide_input, multiply_weights, producer_rows, scale_shape
from sqviz.models.linears import groups
from sqviz.models.lm import LM

OUTLIER = 64.0  # how much larger a planted channel is
_PLANTED = (1, 5)  # the channels it is planted in

_VOCABULARY = {"vocab_size": 131, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHORT = {
    **_VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 96,
}
_GATED = {**_SHORT, "num_key_value_heads": 2, "intermediate_size": 53}
_FALCON = {**_SHORT, "ffn_hidden_size": 53}
_OPT = {**_SHORT, "ffn_dim": 53, "word_embed_proj_dim": 48}
_GPT = {**_VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_inner": 53, "n_positions": 96}
_BLOOM = {**_VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 6}
_MPT = {**_VOCABULARY, "d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 96}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_routed_experts": 5}  # grouped product: 16-byte rows
_LATENT = {"kv_lora_rank": 22, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 7}
_DEEPSEEK = {**_SHORT, **_MOE, **_LATENT, "intermediate_size": 53, "n_shared_experts": 1, "first_k_dense_replace": 1}
_UNTIED = {"tie_word_embeddings": False}
_TIED = {"tie_word_embeddings": True}

_CONFIGS: dict[str, dict[str, Any]] = {
    "OPTForCausalLM": {**_OPT, **_TIED},
    "OPTForCausalLM/post-ln": {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 22},
    "OPTForCausalLM/gelu": {**_OPT, **_UNTIED, "activation_function": "gelu"},
    "BloomForCausalLM": {**_BLOOM, **_TIED},
    "BloomForCausalLM/post-residual": {**_BLOOM, "apply_residual_connection_post_layernorm": True},
    "GPTNeoXForCausalLM": {**_SHORT, "intermediate_size": 53, "rotary_pct": 0.5},
    "GPTNeoXForCausalLM/sequential-relu": {
        **_SHORT,
        **_TIED,
        "intermediate_size": 53,
        "use_parallel_residual": False,
        "hidden_act": "relu",
    },
    "GPT2LMHeadModel": {**_GPT, **_TIED},
    "GPT2LMHeadModel/relu": {**_GPT, **_UNTIED, "activation_function": "relu"},
    "GPTJForCausalLM": {**_GPT, "rotary_dim": 4},
    "MptForCausalLM": {**_MPT, **_TIED},
    "MptForCausalLM/clip-qkv": {**_MPT, "attn_config": {"clip_qkv": 0.5}},
    "FalconForCausalLM/7b": {**_FALCON, "multi_query": True, "parallel_attn": True},
    "FalconForCausalLM/old-multi-head": {**_FALCON, "multi_query": False, "bias": True},
    "FalconForCausalLM/rw": {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    "FalconForCausalLM/rw-multi-query": {**_FALCON, "parallel_attn": False, "alibi": True, "activation": "relu"},
    "FalconForCausalLM/new-two-norms": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "FalconForCausalLM/new-one-norm": {
        **_FALCON,
        **_UNTIED,
        "new_decoder_architecture": True,
        "num_kv_heads": 3,
        "num_ln_in_parallel_attn": 1,
    },
    "LlamaForCausalLM": {**_GATED, **_UNTIED},
    "LlamaForCausalLM/tied-bias": {**_GATED, **_TIED, "attention_bias": True, "mlp_bias": True, "head_dim": 10},
    "MistralForCausalLM": {**_GATED, "sliding_window": 7},
    "MixtralForCausalLM": {**_GATED, "intermediate_size": 24, "num_local_experts": 5, "num_experts_per_tok": 2},
    "Qwen2ForCausalLM": {**_GATED, **_TIED},
    "Qwen3ForCausalLM": {**_GATED, "head_dim": 10},
    "Gemma2ForCausalLM": {**_GATED, "head_dim": 10, "sliding_window": 7},
    "Gemma3ForCausalLM": {**_GATED, "head_dim": 10, "sliding_window": 7},
    "PhiForCausalLM": {**_GATED, "qk_layernorm": True},
    "PhiForCausalLM/relu": {**_GATED, "hidden_act": "relu"},
    "Phi3ForCausalLM": {**_GATED},
    "GlmForCausalLM": {**_GATED, "head_dim": 8, "attention_bias": True},
    "Glm4ForCausalLM": {**_GATED, "head_dim": 8},
    "CohereForCausalLM": {**_GATED, "use_qk_norm": True},
    "Cohere2ForCausalLM": {**_GATED, "head_dim": 8, "sliding_window": 7},
    "Olmo2ForCausalLM": {**_GATED},
    "DeepseekV2ForCausalLM": {**_DEEPSEEK, "q_lora_rank": 14},
    "DeepseekV2ForCausalLM/lite": {**_DEEPSEEK, "q_lora_rank": None},
}

TINY: tuple[str, ...] = tuple(_CONFIGS)
"""Ids for `tiny`: an architecture, and after a slash one of its layouts."""


def tiny(
    architecture: str, *, seed: int = 0, outliers: bool = True, dtype: torch.dtype = torch.float32, **overrides: Any
) -> LM:
    """A tiny random model without tokenizer, the same for the same arguments; the global random state is left alone.

    Args:
        architecture: an id of `TINY`, or an architecture, which means its first id: "FalconForCausalLM".
        seed: of the weights.
        outliers: plant outlier channels in the inputs of linears.
        dtype: of the weights.
        **overrides: entries of the transformers configuration that replace the ones here.

    Raises:
        UnknownArchitecture: there is no such id.
    """
    name = next((known for known in TINY if known == architecture or known.partition("/")[0] == architecture), None)
    if name is None:
        raise UnknownArchitecture(f"no tiny model {architecture!r}; there are: {', '.join(TINY)}")
    import transformers

    cls = getattr(transformers, name.partition("/")[0])
    config = cls.config_class(**{**_CONFIGS[name], **overrides}, architectures=[cls.__name__])
    config._name_or_path = f"tiny/{name}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).eval()
        _randomise(model)
    lm = LM(model, None, arch_of(config))
    if outliers:
        _plant(lm)
    model.to(dtype)
    return lm


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Weights of a size that trained models have, so that no layer is negligible or saturated."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.min() == parameter.max():  # a norm's gain at 0 or 1, or a bias at 0
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif isinstance(module, nn.Embedding):
                parameter.normal_()
            else:
                fan_in = parameter.shape[0 if hasattr(module, "nf") else -1]
                parameter.normal_(std=1 / math.sqrt(fan_in))


@torch.no_grad()
def _plant(lm: LM) -> None:
    """Make a few channels of every foldable input much larger, and what reads them smaller by nearly as much."""
    for group in groups(lm):
        if group.fold is None:
            continue
        shape = scale_shape(lm, group)
        outlier = torch.ones(shape)
        outlier[..., list(_PLANTED)] = OUTLIER
        if group.fold_kind == "linear":
            rows = producer_rows(lm, group)
            outlier = torch.where(torch.isin(rows, rows[outlier.flatten() > 1]).view(shape), OUTLIER, 1.0)
        applied = divide_input(lm.model, lm, group, 1 / outlier)
        multiply_weights(lm.model, group, applied * torch.where(outlier > 1, 4.0, 1.0))
