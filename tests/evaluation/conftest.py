"""A tiny model that reads text: a byte-pair tokenizer trained on the questions in `data`, with merges across words."""

from pathlib import Path

import pytest

from sqviz.models.tiny import tiny

DATA = Path(__file__).parent / "data"


def byte_pairs(bos="<s>", add_bos=False):
    """A tokenizer with byte-level pairs, an EOS token and perhaps a BOS token, which it may add by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train([str(file) for file in sorted(DATA.glob("*.jsonl"))], trainer)
    if add_bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def data():
    """The folder with questions."""
    return DATA


@pytest.fixture(scope="session")
def make_reader():
    """Makes a tiny model with that tokenizer; arguments as `tiny`, and `bos`, `add_bos` of the tokenizer."""

    def make(name="LlamaForCausalLM", *, bos="<s>", add_bos=False, **rest):
        tokenizer = byte_pairs(bos, add_bos)
        rest = {"max_position_embeddings": 256, **rest}
        if name.startswith("GPT2"):
            rest["n_positions"] = rest.pop("max_position_embeddings")
        return tiny(name, vocab_size=len(tokenizer), **rest).replace(tokenizer=tokenizer)

    return make


@pytest.fixture(scope="session")
def reader(make_reader):
    """A tiny Llama that reads text, 256 tokens at once."""
    return make_reader()
