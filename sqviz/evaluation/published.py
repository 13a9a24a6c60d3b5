"""Configurations of models that are spoken of and cannot be fetched here, as transformers configurations.

    sqviz.footprint("mt-nlg-530b")

Shapes only: what weights and caches take follows from them. Each row names where its numbers are from. Two models have
no class in transformers and stand in the nearest one that has matrices of the same shapes; their rows say what differs.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from sqviz.errors import SqvizError

_OPT_PAPER = "Zhang et al. 2022 (arXiv:2205.01068), Table 1; vocabulary as in the released checkpoints"


@dataclasses.dataclass(frozen=True)
class Published:
    """One model.

    Attributes:
        title: its name as the papers write it.
        config_class: the configuration class of transformers.
        entries: of the configuration.
        source: where the numbers are from.
        differs: what the class has otherwise than the model; "" if nothing.
    """

    title: str
    config_class: str
    entries: Mapping[str, Any]
    source: str
    differs: str = ""

    def config(self) -> Any:
        """The transformers configuration."""
        import transformers

        return getattr(transformers, self.config_class)(**self.entries)


def _opt(title: str, hidden: int, layers: int, heads: int) -> Published:
    entries = {
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
    }
    return Published(title, "OPTConfig", entries, _OPT_PAPER)


def _llama(title: str, source: str, *sizes: int) -> Published:
    """`sizes`: hidden, intermediate, layers, heads, key/value heads, vocabulary."""
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    entries = dict(zip(names, sizes, strict=True)) | {"max_position_embeddings": 4096, "tie_word_embeddings": False}
    return Published(title, "LlamaConfig", entries, source)


_LLAMA_2 = "Touvron et al. 2023 (arXiv:2307.09288), and config.json of the released checkpoints"

PUBLISHED: dict[str, Published] = {
    "opt-6.7b": _opt("OPT-6.7B", 4096, 32, 32),
    "opt-13b": _opt("OPT-13B", 5120, 40, 40),
    "opt-30b": _opt("OPT-30B", 7168, 48, 56),
    "opt-66b": _opt("OPT-66B", 9216, 64, 72),
    "opt-175b": _opt("OPT-175B", 12288, 96, 96),
    "bloom-176b": Published(
        "BLOOM-176B",
        "BloomConfig",
        {"hidden_size": 14336, "n_layer": 70, "n_head": 112, "vocab_size": 250880},
        "Le Scao et al. 2022 (arXiv:2211.05100), Table 3; vocabulary as in the released checkpoint",
    ),
    "glm-130b": Published(
        "GLM-130B",
        "GlmConfig",
        {
            "hidden_size": 12288,
            "intermediate_size": 32768,
            "num_hidden_layers": 70,
            "num_attention_heads": 96,
            "num_key_value_heads": 96,
            "head_dim": 128,
            "vocab_size": 150528,
            "max_position_embeddings": 2048,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "pad_token_id": None,
        },
        "Zeng et al. 2022 (arXiv:2210.02414) and configs/model_glm_130b.sh of its repository",
        "the later GLM's class: no biases of norms, of the MLP and of the attention's output, below 0.01 % of all",
    ),
    "mt-nlg-530b": Published(
        "MT-NLG 530B",
        "GPT2Config",
        {"n_embd": 20480, "n_layer": 105, "n_head": 128, "n_positions": 2048, "vocab_size": 51200},
        "Smith et al. 2022 (arXiv:2201.11990), section 2; GPT-2's 50257 tokens, padded to a multiple of 1024",
        "GPT-2's class: a transformer of the same layout",
    ),
    "llama-2-7b": _llama("Llama-2-7B", _LLAMA_2, 4096, 11008, 32, 32, 32, 32000),
    "llama-2-70b": _llama("Llama-2-70B", _LLAMA_2, 8192, 28672, 80, 64, 8, 32000),
    "deepseek-67b": _llama(
        "DeepSeek 67B", "config.json of deepseek-ai/deepseek-llm-67b-base", 8192, 22016, 95, 64, 8, 102400
    ),
    "deepseek-v2": Published(
        "DeepSeek-V2",
        "DeepseekV2Config",
        {
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 160,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1536,
            "first_k_dense_replace": 1,
            "vocab_size": 102400,
            "max_position_embeddings": 163840,
        },
        "DeepSeek-AI 2024 (arXiv:2405.04434), section 3.1.2, and config.json of deepseek-ai/DeepSeek-V2",
    ),
}
"""The models, by the name that `sqviz.footprint` takes."""


def published(name: str) -> Published:
    """The model of this name, capitals or not.

    Raises:
        SqvizError: there is none; the message lists near names.
    """
    key = name.strip().lower().replace(" ", "-")
    if key in PUBLISHED:
        return PUBLISHED[key]
    near = difflib.get_close_matches(key, PUBLISHED, n=4, cutoff=0.5) or list(PUBLISHED)
    raise SqvizError(
        f"{name!r} is no folder and none of the published models; near: {', '.join(near)}. A hub id carries its owner: "
        "'openai-community/gpt2'. A transformers configuration or an LM can be given as well"
    )
