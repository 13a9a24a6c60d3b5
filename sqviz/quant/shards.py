"""The weights of a model as safetensors files of limited size, made and written one file at a time.

    model.safetensors                              if all fit into one file
    model-00001-of-00003.safetensors, …            else, with model.safetensors.index.json: {tensor: file}

Names are those of the checkpoints that others read, as `save_pretrained` writes them: transformers keeps a mixture's
experts fused in memory and apart on disk ("…experts.3.w1.weight"), and knows some modules by other names than the
files do. A converted copy (16 bit, INT8) exists only of the tensors of one file at a time.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sqviz.errors import SqvizError
from sqviz.tensorfile import write_tensors

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """What one tensor of a model becomes in the files: itself in another dtype, codes and steps, experts apart.

    Attributes:
        bytes: size of each tensor that is written, by its name.
        make: makes these tensors, in the same order.
    """

    bytes: Mapping[str, int]
    make: Callable[[], dict[str, Tensor]]


def kept(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model that a checkpoint holds, by their names in the model; tied ones once. No copies.

    Raises `SqvizError` if tensors are tied that the configuration does not tie, or are not in memory.
    """
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    absent = [name for name, tensor in tensors.items() if tensor.is_meta]
    if absent:
        raise SqvizError(
            f"{absent[0]} and {len(absent) - 1} more are not in memory. Load the model without offloading."
        )
    try:
        return dict(remove_tied_weights_from_state_dict(tensors, model))
    except RuntimeError as error:
        raise SqvizError(f"some weights are one tensor though the configuration does not tie them: {error}") from error


def on_disk(model: nn.Module, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor as it stands in a checkpoint: under its name there, fused experts one by one. Views where possible."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, {name: tensor})


def floating(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype | None) -> Piece:
    """A tensor that stays as it is, or becomes `dtype` if it is a floating-point one.

    Making it raises `SqvizError` if values become infinite in `dtype`.
    """
    to = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype

    def make() -> dict[str, Tensor]:
        return {found: _cast(part, to, found) for found, part in on_disk(model, name, tensor).items()}

    shapes = on_disk(model, name, torch.empty_like(tensor, dtype=to, device="meta"))
    return Piece({found: part.nbytes for found, part in shapes.items()}, make)


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    made = tensor.to(dtype)
    narrower = dtype == torch.float16 and tensor.dtype != dtype
    if narrower and bool((made.isinf() & tensor.isfinite()).any()):
        raise SqvizError(
            f"dtype='float16': {name} reaches {float(tensor.abs().max()):.3g}, float16 ends at 65504. Take 'bfloat16'."
        )
    return made


def parse_size(size: int | str, what: str = "max_shard_size") -> int:
    """Bytes from a number or from "5GB", "200MiB". Raises `SqvizError` for anything else."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", str(size).upper())
    if isinstance(size, str) and match and float(match[1]) > 0:
        return math.ceil(float(match[1]) * UNITS[match[2]])
    raise SqvizError(
        f"{what}={size!r}: a number of bytes above 0 is needed, or one with a unit, such as '5GB', '200MB'."
    )


def write_shards(
    pieces: Sequence[Piece], folder: Path, largest_bytes: int, metadata: dict[str, str], step: Callable[[int], None]
) -> list[str]:
    """Write all pieces; the names of the files, in order.

    Args:
        pieces: what to write.
        folder: where.
        largest_bytes: how large a file may be; one tensor that is larger has a file of its own.
        metadata: goes into the header of every file.
        step: called with the bytes of each tensor once it is made; may raise.

    Raises `OSError` if a file cannot be written.
    """
    split = list(_split(pieces, largest_bytes))
    count = len(split)
    names = (
        [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]
    )
    made = (item for piece in pieces for item in piece.make().items())
    for file, wanted in zip(names, split, strict=True):
        tensors: dict[str, Tensor] = {}
        for expected in wanted:
            name, tensor = next(made)
            assert name == expected, f"{name} was made where {expected} was planned"
            tensors[name] = tensor.detach().cpu().contiguous()
            step(tensor.nbytes)
        write_tensors(tensors, metadata, folder / file)
    if count == 1:
        return names
    total = sum(size for piece in pieces for size in piece.bytes.values())
    places = {name: file for file, wanted in zip(names, split, strict=True) for name in wanted}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return [*names, "model.safetensors.index.json"]


def _split(pieces: Sequence[Piece], largest_bytes: int) -> Iterator[list[str]]:
    """Names of the tensors of each file: one after the other, as long as they fit."""
    names: list[str] = []
    filled = 0
    for name, size in ((name, size) for piece in pieces for name, size in piece.bytes.items()):
        if names and filled + size > largest_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names
