"""GGUF files: read with transformers, and converted once to safetensors, which load a hundred times faster.

    python -m sqviz.models.convert FILE.gguf FOLDER        # the folder loads with sqviz.load(FOLDER)

Weights are dequantised to float32, exactly: a Q4_1 block is d·q + m with float16 d and m, which float16 and bfloat16
cannot hold (of SmolLM2-135M's 134.5 M weights they would change 56 M and 107 M).
"""

import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

STEPS = ("reading the tokenizer", "reading the weights", "writing safetensors", "done")


def read_gguf(path: Path, dtype: "torch.dtype | None" = None) -> tuple[Any, Any]:
    """The model (float32 unless said) and tokenizer in a GGUF file; the model no longer counts as quantised.

    The architecture is looked up before the weights are read.

    Raises:
        UnknownArchitecture: the architecture table has no row for it.
        ValueError: transformers cannot read this kind of GGUF.
    """
    with parsed_once():
        tokenizer = gguf_tokenizer(path)
        return gguf_model(path, dtype), tokenizer


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """Within this context a GGUF header is parsed once, not four times: 49 k tokens and merges take 4 s each time."""
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def gguf_tokenizer(path: Path) -> Any:
    """The tokenizer in a GGUF file, chat template included."""
    import gguf
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    fields = gguf.GGUFReader(str(path)).fields
    kind = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else ""
    if kind == "smollm":  # transformers passes this field by: digits stand alone ("\n\n1" starts with the token "\n\n")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    context = next((field.contents() for name, field in fields.items() if name.endswith(".context_length")), None)
    if context:
        tokenizer.model_max_length = int(context)
    return tokenizer


def gguf_model(path: Path, dtype: "torch.dtype | None" = None) -> Any:
    """The model in a GGUF file, dequantised to `dtype` (float32 unless said), in eval mode."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sqviz.models.arch import arch_of

    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    config.architectures = [class_name(config)]
    arch_of(config)
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype or torch.float32)
    model.config.architectures = config.architectures
    for holder, names in ((model.config, ("quantization_config", "_is_quantized")), (model, ("hf_quantizer",))):
        for name in names:
            if hasattr(holder, name):
                delattr(holder, name)
    model.is_quantized = False
    return model.eval()


def class_name(config: Any) -> str:
    """The class that transformers would build for causal language modelling, "" if it has none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if isinstance(found, tuple | list):
        found = found[0] if found else None
    return found.__name__ if found is not None else ""


def convert(path: Path, folder: Path, name: str) -> None:
    """Write config, float32 safetensors and tokenizer of a GGUF file into `folder`; print each step as it starts."""
    with parsed_once():
        _say(0)
        tokenizer = gguf_tokenizer(path)
        _say(1)
        model = gguf_model(path)
    model.config._name_or_path = name
    _say(2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _say(3)


def _say(step: int) -> None:
    print(f"step {step} {STEPS[step]}", flush=True)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else Path(sys.argv[1]).stem)
