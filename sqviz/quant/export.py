"""`export`: a model as a folder that other programs read.

    "smoothed"             floating point, as `save_pretrained` writes it: transformers, vLLM and sqviz.load read it.
                           A smoothed model (thesis §3.3) has the modules of the one it was made from, so nothing else
                           is needed.
    "compressed-tensors"   W8A8: INT8 codes with their steps, for vLLM's INT8 kernels (compressed.py).

Beside the weights stands `sqviz.json`, the recipe: versions, scheme, how strongly what was smoothed, the hash of the
calibration's tokens, what a search found (recipe.py). It is in the header of every safetensors file too. The folder is
there whole or not at all, and weights are converted one file at a time.
"""

import copy
import dataclasses
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sqviz.errors import SqvizError
from sqviz.models.lm import LM
from sqviz.models.load import DTYPES
from sqviz.progress import CancelToken
from sqviz.progress import progress as progress_bar
from sqviz.quant.calibration import Calibration
from sqviz.quant.compressed import Layout, check_scheme, lay_out
from sqviz.quant.folder import filled, new_place, write_companions
from sqviz.quant.ordinary import check_ordinary
from sqviz.quant.recipe import calibration_record, scales_hash
from sqviz.quant.schemes import Scheme
from sqviz.quant.shards import floating, kept, parse_size, write_shards

if TYPE_CHECKING:
    from sqviz.observe.magnitudes import Magnitudes

Format = Literal["smoothed", "compressed-tensors"]
RECIPE, RECIPE_FORMAT = "sqviz.json", 1
THESIS = "Guangxuan Xiao, Efficient Deployment Algorithms for Large Language Models, MIT, 2024, chapter 3"
SLACK_BYTES = 20_000_000  # configuration, tokenizer, file headers


@dataclasses.dataclass(frozen=True, repr=False)
class Exported:
    """What `export` wrote. `str` and `os.fspath` give the folder.

    Attributes:
        folder: where it is.
        format: "smoothed" or "compressed-tensors".
        dtype: of what is in floating point, "bfloat16".
        quantised: names of the linears that are in INT8.
        bytes: size of all files.
        files: their names.
        notes: what not every reader can do, for people.
    """

    folder: Path
    format: Format
    dtype: str
    quantised: tuple[str, ...]
    bytes: int
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __fspath__(self) -> str:
        return str(self.folder)

    def __str__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        codes = f"{len(self.quantised)} linears in INT8, the rest in {self.dtype}" if self.quantised else self.dtype
        head = f"{self.folder}: {self.format}, {codes}, {len(self.files)} files, {self.bytes / 1e6:.1f} MB"
        return "\n".join([head, *(f"note: {note}" for note in self.notes)])


def export(
    lm: LM,
    folder: str | Path,
    format: Format | None = None,
    *,
    scheme: Scheme | None = None,
    magnitudes: "Magnitudes | None" = None,
    skip: str | Iterable[str] = (),
    dtype: str | torch.dtype = "auto",
    max_shard_size: int | str = "5GB",
    cancel: CancelToken | None = None,
    progress: bool = False,
) -> Exported:
    """Write a model into a new folder that transformers and vLLM read. `lm` stays as it was.

    Args:
        lm: a floating-point model, smoothed or not.
        folder: where; it must not be there yet, or be empty.
        format: "smoothed" (floating point) or "compressed-tensors" (W8A8). None: the latter if there is a scheme.
        scheme: how to quantise, for "compressed-tensors": per-channel or per-tensor weights, per-token or per-tensor
            inputs, 8 bits, symmetric. The codes are those of `sqviz.quantize(lm, scheme, magnitudes, skip=skip)`.
        magnitudes: from `sqviz.capture`, for a scheme that needs calibration. Else it may be given for the recipe,
            which names the capture that the model was smoothed by anyhow.
        skip: glob patterns over names of linears that stay in floating point, such as "*.down_proj".
        dtype: of what is written in floating point: "bfloat16", "float16", "float32" …; "auto": as the model is. Codes
            are made from the weights as they are in `lm`.
        max_shard_size: bytes of one file at most, as a number or "5GB"; so much memory is needed on top of the model.
        cancel: stops the export between two tensors; nothing is left then.
        progress: show a progress bar.

    Raises:
        SqvizError: something is in the folder; format and scheme do not fit; the model is quantised already, divides
            inputs at run time, or else is not what its configuration makes; the scheme or a linear has no place in
            the format; an unknown dtype; the disk has too little room.
        NoSuchLayer: a pattern of `skip` matches nothing.
        NonFinite: a weight to be quantised holds a NaN or an infinity.
        OSError: the folder cannot be written.
        Cancelled: stopped through `cancel`.
    """
    target, format, to, largest = check_request(folder, format, scheme, skip, dtype, max_shard_size)
    check_ordinary(lm)
    layout = _lay_out(lm, scheme, magnitudes, skip, to, cancel)
    recipe = _recipe(lm, format, scheme, magnitudes, layout, to)
    total = sum(size for piece in layout.pieces for size in piece.bytes.values())
    with (
        filled(target, total + SLACK_BYTES) as part,
        progress_bar(total, f"exporting {target.name}", unit="B", cancel=cancel, show=progress) as bar,
    ):
        bar.step(0)
        metadata = {"format": "pt", "sqviz": json.dumps(recipe, sort_keys=True)}
        write_shards(layout.pieces, part, largest, metadata, bar.step)
        write_companions(lm, part, _config(lm, layout, to))
        (part / RECIPE).write_text(json.dumps(recipe, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        files = {path.relative_to(part).as_posix(): path.stat().st_size for path in part.rglob("*") if path.is_file()}
    return Exported(
        target, format, recipe["dtype"], layout.quantised, sum(files.values()), tuple(sorted(files)), layout.notes
    )


# --- what was asked for ---


def check_request(
    folder: str | Path,
    format: str | None,
    scheme: Scheme | None,
    skip: str | Iterable[str],
    dtype: str | torch.dtype,
    max_shard_size: int | str,
) -> tuple[Path, Format, torch.dtype | None, int]:
    """What can be told without the model: folder, format, dtype (None: as it is), bytes of a file.

    Raises `SqvizError` as `export` does.
    """
    found = new_place(folder), _format(format, scheme, skip), _dtype(dtype), parse_size(max_shard_size)
    if scheme is not None:
        check_scheme(scheme)
    return found


def _format(format: str | None, scheme: Scheme | None, skip: str | Iterable[str]) -> Format:
    if scheme is not None and not isinstance(scheme, Scheme):
        raise SqvizError(f"scheme={scheme!r}: a sqviz.Scheme is needed, such as sqviz.SMOOTHQUANT_LLAMA.")
    if format not in (None, "smoothed", "compressed-tensors"):
        raise SqvizError(f"format={format!r}: 'smoothed' or 'compressed-tensors' is allowed.")
    if format == "smoothed" and scheme is not None:
        raise SqvizError(
            f"format='smoothed' is floating point, and scheme={scheme!r} was given: leave scheme out, or take "
            "format='compressed-tensors'."
        )
    if format == "compressed-tensors" and scheme is None:
        raise SqvizError("format='compressed-tensors' needs a scheme, such as scheme=sqviz.SMOOTHQUANT_LLAMA.")
    if scheme is None and skip:
        raise SqvizError(f"skip={skip!r} goes with a scheme: without one nothing is quantised.")
    return "smoothed" if scheme is None else "compressed-tensors"


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None stands for "auto"."""
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return None
    if name not in DTYPES:
        raise SqvizError(f"dtype={dtype!r} is not one of 'auto', {', '.join(map(repr, DTYPES))}")
    return getattr(torch, name)


# --- what is written ---


def _lay_out(
    lm: LM,
    scheme: Scheme | None,
    magnitudes: "Magnitudes | None",
    skip: str | Iterable[str],
    dtype: torch.dtype | None,
    cancel: CancelToken | None,
) -> Layout:
    if scheme is not None:
        return lay_out(Calibration(lm, scheme, magnitudes, cancel), skip, dtype)
    pieces = tuple(floating(lm.model, name, tensor, dtype) for name, tensor in kept(lm.model).items())
    return Layout(pieces, {}, (), ())


def _config(lm: LM, layout: Layout, dtype: torch.dtype | None) -> Any:
    """The model's configuration, for what is in the folder."""
    config: Any = copy.deepcopy(lm.model.config)
    config.dtype = lm.dtype if dtype is None else dtype
    config.architectures = [type(lm.model).__name__]
    if layout.config:
        config.quantization_config = layout.config
    return config


def _recipe(
    lm: LM,
    format: Format,
    scheme: Scheme | None,
    magnitudes: "Magnitudes | None",
    layout: Layout,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """How the folder came about, as plain data."""
    import transformers

    from sqviz import __version__

    return {
        "recipe_format": RECIPE_FORMAT,
        "format": format,
        "versions": {
            "sqviz": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "reference": THESIS,
        "model": lm.name,
        "note": lm.note,
        "dtype": str(lm.dtype if dtype is None else dtype).removeprefix("torch."),
        "scheme": None if scheme is None else scheme.as_code(),
        "quantised": len(layout.quantised),
        "ignored": layout.config.get("ignore", []),
        "history": list(lm.history),
        "smoothing": {"linears": len(lm.scales), "sha256": scales_hash(lm)} if lm.scales else None,
        "calibration": None if magnitudes is None else calibration_record(magnitudes),
        "notes": list(layout.notes),
    }
