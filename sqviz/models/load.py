"""`load` and `wrap`: from a name, a folder, a file or a model at hand to an `LM`.

Nothing is ever unpickled and no code that comes with a model is ever run: safetensors and GGUF only,
`trust_remote_code` stays False. The architecture is looked up before any weight is read.
"""

import contextlib
import copy
import gc
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sqviz.errors import SqvizError, UnknownArchitecture
from sqviz.models import convert, embedded
from sqviz.models.arch import ARCHS, Arch, arch_of
from sqviz.models.explain import explained, not_unpickled
from sqviz.models.lm import LM, share
from sqviz.progress import CancelToken

DTYPES = ("float32", "bfloat16", "float16", "float64")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "merges.txt")


def load(
    source: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    cancel: CancelToken | None = None,
) -> LM:
    """A causal language model, ready to be looked at: in eval mode, without gradients.

    Args:
        source: None: the embedded SmolLM2-135M-Instruct, fetched once. Else a hub id ("facebook/opt-125m"), a folder
            in transformers' format, a `.gguf` file, or a `.safetensors` file with its config.json beside it.
        device: "auto": a CUDA GPU if there is one, else the CPU. Else any torch device ("cuda:1", "mps", …).
        dtype: "auto": the checkpoint's own on a GPU; on the CPU a half-precision checkpoint becomes float32, which
            is exact, and faster there than half precision for most sizes. Else "float32", "bfloat16", …
        cancel: stops the first fetching of the embedded model.

    Raises:
        UnknownArchitecture: the architecture table has no row for it; no weight was read.
        DownloadError: the embedded model or the hub could not be reached; the message says what to do.
        SqvizError: no such file, only pickled weights, a truncated file, an unknown device or dtype.
    """
    place, kind = _device(device), _dtype(dtype)
    with _quick_imports():
        if source is None:
            folder = embedded.fetch(cancel=cancel)
            with _quiet_bars():
                return _from_folder(folder, embedded.SMOLLM2.name, place, kind)
        path = Path(source).expanduser()
        if path.is_dir():
            return _from_folder(path, str(source), place, kind)
        if path.is_file():
            return _from_file(path, place, kind)
        if not isinstance(source, str) or not HUB_ID.fullmatch(source) or path.suffix in (".gguf", ".safetensors"):
            raise SqvizError(
                f"there is no file or folder {str(source)!r}, and it is no hub id either (those look like "
                "'facebook/opt-125m'). Check the path, or call sqviz.load() for the embedded model"
            )
        return _from_hub(source, place, kind)


def wrap(model: nn.Module, tokenizer: Any = None) -> LM:
    """An `LM` around a transformers model at hand. The model itself is not touched.

    A model in eval mode is used as it is (`lm.model is model`). One in training mode is left in it: the `LM` then holds
    a copy of the module tree in eval mode, which shares all its tensors, because dropout would falsify every number.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer; without one, text has to be given as token ids.

    Raises:
        SqvizError: not a transformers model.
        UnknownArchitecture: the architecture table has no row for its class.
    """
    if isinstance(model, str | os.PathLike):
        raise SqvizError(f"wrap takes a model, not the name of one: sqviz.load({str(model)!r}) loads it")
    if not isinstance(model, nn.Module) or not hasattr(getattr(model, "config", None), "get_text_config"):
        raise SqvizError(
            f"wrap takes a transformers causal language model, not a {type(model).__name__}. Load one with "
            "transformers.AutoModelForCausalLM.from_pretrained(...), or use sqviz.load(...)"
        )
    arch = _arch_of_class(model)
    if any(module.training for module in model.modules()):
        return LM(share(model), tokenizer, arch, note="eval-mode copy of a model in training mode, sharing its weights")
    return LM(model, tokenizer, arch)


def _arch_of_class(model: nn.Module) -> Arch:
    """The row of the model's class, or of the nearest class that it is derived from."""
    names = [kind.__name__ for kind in type(model).__mro__]
    config = copy.copy(model.config)
    config.architectures = [next((name for name in names if name in ARCHS), names[0])]  # type: ignore[union-attr]
    return arch_of(config)


def _from_folder(folder: Path, name: str, device: torch.device, dtype: torch.dtype | None) -> LM:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise SqvizError(
            f"the folder {str(folder)!r} has no config.json, so it is no model in transformers' format; it holds "
            f"{', '.join(sorted(path.name for path in folder.iterdir())[:8]) or 'nothing'}"
        )
    if (folder / "sqviz_int8.json").exists():
        raise SqvizError(f"{str(folder)!r} holds a model that executes in integers: sqviz.load_int8({str(folder)!r})")
    if not any(folder.glob("*.safetensors")):
        raise not_unpickled(folder)
    with explained(name):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        return _build(str(folder), config, name, device, dtype, with_tokenizer=_has_tokenizer(folder))


def _from_file(path: Path, device: torch.device, dtype: torch.dtype | None) -> LM:
    if path.suffix == ".gguf":
        try:
            model, tokenizer = convert.read_gguf(path, dtype)
        except UnknownArchitecture:
            raise
        except (ValueError, KeyError, IndexError, OSError, struct.error) as error:
            raise SqvizError(
                f"cannot read {str(path)!r} as GGUF ({error}). Is it complete? Compare its length and checksum with "
                "those where it came from"
            ) from error
        model.config._name_or_path = str(path)
        return LM(_settle(model, device), tokenizer, arch_of(model.config))
    if path.suffix == ".safetensors":
        if path.name != "model.safetensors":
            return _from_single(path, device, dtype)
        return _from_folder(path.parent, str(path), device, dtype)
    raise SqvizError(
        f"cannot load {str(path)!r}: sqviz.load takes a folder, a .gguf file or a .safetensors file. Pickled weights "
        "(.bin, .pt) are never read, because unpickling runs whatever code is in them"
    )


def _from_single(path: Path, device: torch.device, dtype: torch.dtype | None) -> LM:
    """A safetensors file under a name of its own, with the config.json beside it."""
    from safetensors.torch import load_file
    from transformers import AutoConfig

    if not (path.parent / "config.json").is_file():
        raise SqvizError(f"there is no config.json beside {str(path)!r}; put the model's configuration there")
    with explained(str(path)):
        config = AutoConfig.from_pretrained(str(path.parent), trust_remote_code=False)
        tokenizer = _has_tokenizer(path.parent)
        return _build(str(path.parent), config, str(path), device, dtype, tokenizer, weights=load_file(path))


def _from_hub(name: str, device: torch.device, dtype: torch.dtype | None) -> LM:
    from transformers import AutoConfig

    with explained(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        return _build(name, config, name, device, dtype, with_tokenizer=None)


def _build(
    place: str,
    config: Any,
    name: str,
    device: torch.device,
    dtype: torch.dtype | None,
    with_tokenizer: bool | None,
    weights: dict[str, torch.Tensor] | None = None,
) -> LM:
    """Look the architecture up, then read the weights. `with_tokenizer=None`: try, a hub repository may have none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoTokenizer

    config.architectures = [convert.class_name(config) or f"{config.model_type} (no causal language model)"]
    arch = arch_of(config)
    options: dict[str, Any] = {"config": config, "dtype": _checkpoint_dtype(config, device, dtype)}
    if weights is not None:
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(None, state_dict=weights, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(place, use_safetensors=True, trust_remote_code=False, **options)
    model.config._name_or_path = name
    tokenizer = None
    if with_tokenizer is not False:
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except OSError:
            if with_tokenizer:
                raise
    return LM(_settle(model, device), tokenizer, arch)


def _settle(model: Any, device: torch.device) -> nn.Module:
    return model.to(device).eval().requires_grad_(False)


def _checkpoint_dtype(config: Any, device: torch.device, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    own = config.get_text_config().dtype or config.dtype
    own = own if isinstance(own, torch.dtype) else torch.float32
    return own if device.type != "cpu" or own == torch.float64 else torch.float32


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _device(device: str | torch.device) -> torch.device:
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SqvizError(
            f"device={str(device)!r} cannot be used here ({str(error).splitlines()[0]}). Take 'auto' or 'cpu'; "
            "`sqviz doctor` lists what this machine has"
        ) from error
    return found


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None stands for "auto"."""
    if dtype == "auto":
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise SqvizError(f"dtype={dtype!r} is not one of 'auto', {', '.join(map(repr, DTYPES))}")
    return getattr(torch, name)


@contextlib.contextmanager
def _quick_imports() -> Iterator[None]:
    """No garbage collection meanwhile: it takes a quarter of the time of importing transformers."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def _quiet_bars() -> Iterator[None]:
    """Without transformers' bar, for a load that takes a fraction of a second."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()
