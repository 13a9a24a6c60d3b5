"""What the tests of generation share: prompts, generate()'s own tokens, and tokenizers for tiny models.

The tokenizers have no merges: every byte is a token, so that most characters span several.
"""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sqviz.models.lm import LM
from sqviz.models.tiny import tiny
from sqviz.streaming.policies import Sinks

PROMPT = torch.randint(3, 131, (9,), generator=torch.Generator().manual_seed(5))
SMALL = Sinks(2, 6)
CHAT = [{"role": "user", "content": "hé 😀"}]
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def mute(name: str = "LlamaForCausalLM") -> LM:
    """A tiny model without tokenizer and without an end token."""
    return tiny(name, eos_token_id=None)


def speaking() -> LM:
    """A tiny model whose tokens are bytes."""
    return tiny("LlamaForCausalLM", vocab_size=261, eos_token_id=None).replace(tokenizer=byte_level())


def generated(lm: LM, prompt: torch.Tensor, count: int, **options) -> list[int]:
    """The tokens that transformers' generate() adds; greedily unless told otherwise."""
    options = {"do_sample": False, "pad_token_id": 0, **options}
    with torch.no_grad():
        return lm.model.generate(prompt[None], max_new_tokens=count, **options)[0, len(prompt) :].tolist()


def tokens(steps) -> list[int]:
    """The ids of these steps."""
    return [step.token for step in steps]


def byte_level(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """As GPT-2 and SmolLM2 spell: 5 special tokens, then the 256 bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, template)


def byte_fallback(words: tuple[str, ...] = ("▁a", "▁cat", "s", "▁")) -> PreTrainedTokenizerFast:
    """As Llama 2 spells: a few words with a mark for the blank before them, bytes for all else."""
    listed = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {token: index for index, token in enumerate(listed)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finished(tokenizer, None)


def _finished(tokenizer: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    wrapped.chat_template = template
    return wrapped
