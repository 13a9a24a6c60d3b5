"""How much memory a model takes per device, for any configuration, without its weights (thesis Tables 3.8 and 3.10).

    sqviz.footprint("mt-nlg-530b", [None, sqviz.SMOOTHQUANT_O3], devices=8)
    sqviz.fewest_devices("opt-175b", sqviz.SMOOTHQUANT_O3, gib=80)

    weights (weight_bytes.py) + keys and values (kv_bytes.py) + activations (activation_bytes.py)

Weights are counted on the meta device and exact, keys and values are arithmetic and exact, activations are an estimate.
What a process takes besides is not counted: the context of the driver, libraries and their workspaces, buffers for
communication, what an allocator keeps. What FasterTransformer took in the thesis is 0.4 to 3.4 GiB per GPU more than
the sum for short texts. "GB" are GiB there: OPT-30B's weights alone are 59.9 GB or 55.8 GiB, and 57 were measured.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypedDict, Unpack, overload

import torch

from sqviz.errors import SqvizError
from sqviz.evaluation.footprint_case import Case, Measured, resolve
from sqviz.evaluation.footprint_result import GIB, Footprint, Footprints
from sqviz.quant.schemes import Scheme


class Options(TypedDict, total=False):
    """What `footprint` also takes; see `footprint_case.Case`."""

    dtype: str | torch.dtype
    kv_bits: int | None
    latents: bool
    head: bool
    probabilities: bool
    all_logits: bool


@overload
def footprint(
    source: Any,
    scheme: Scheme | None = None,
    batch: int = 1,
    length: int = 2048,
    devices: int = 1,
    **options: Unpack[Options],
) -> Footprint: ...


@overload
def footprint(
    source: Any,
    scheme: Sequence[Scheme | None],
    batch: int = 1,
    length: int = 2048,
    devices: int = 1,
    **options: Unpack[Options],
) -> Footprints: ...


def footprint(
    source: Any,
    scheme: Scheme | Sequence[Scheme | None] | None = None,
    batch: int = 1,
    length: int = 2048,
    devices: int = 1,
    *,
    dtype: str | torch.dtype = "float16",
    kv_bits: int | None = None,
    latents: bool = True,
    head: bool = False,
    probabilities: bool = False,
    all_logits: bool = False,
) -> Footprint | Footprints:
    """What a model takes, per device, without loading it. A 530-billion-weight configuration takes a second.

    Args:
        source: a transformers configuration, an `LM` (what its configuration takes, not what it holds), a folder or a
            hub id, or a published model: "opt-175b", "bloom-176b", "mt-nlg-530b", … (`published.PUBLISHED`).
        scheme: how the blocks' linears are quantised; None: they stay in `dtype`. Several in a list: a `Footprints`.
        batch: sequences.
        length: tokens in each, read at once and then held in the cache.
        devices: over how many the model is split by tensor parallelism; a divisor of the number of heads.
        dtype: of weights that are not quantised, of activations, and of keys and values unless `kv_bits` is given.
        kv_bits: bits of cached keys and values: 2 to 8, with a float32 step per token and head, or 16.
        latents: MLA (DeepSeek) caches its latents, as transformers 5.23 does; False: keys and values of every head.
        head: lm_head is INT8 too, and a tied embedding reads its rows, as with `sqviz.quantize(…, head=True)`.
        probabilities: attention is not fused, so that it makes its scores and probabilities.
        all_logits: the logits of all tokens are made, not only those of the last.

    Raises:
        SqvizError: no such model, with near names; numbers out of range; devices that do not divide the heads; more
            tokens than there are learned positions; layers that keep something else than keys and values.
        UnknownArchitecture: not a causal language model, or no blocks of linears are found in it.
        DownloadError: the hub could not be reached.
    """
    schemes = [scheme] if isinstance(scheme, Scheme) or scheme is None else scheme
    _check_schemes(schemes)
    case = Case(
        batch=batch,
        length=length,
        devices=devices,
        dtype=dtype,
        kv_bits=kv_bits,
        latents=latents,
        head=head,
        probabilities=probabilities,
        all_logits=all_logits,
    )
    model = resolve(source)
    rows = tuple(_footprint(model, each, case) for each in schemes)
    return rows[0] if isinstance(scheme, Scheme) or scheme is None else Footprints(rows)


def fewest_devices(
    source: Any,
    scheme: Scheme | None = None,
    batch: int = 1,
    length: int = 2048,
    *,
    gib: float = 80.0,
    **options: Unpack[Options],
) -> Footprint:
    """The footprint on the fewest devices that it fits into: 1, 2, 4, 8, … as servers have them.

    Args:
        source, scheme, batch, length: as for `footprint`.
        gib: memory of one device to spare, in GiB (2³⁰ bytes); a GPU of "80 GB" has 80.
        **options: the keyword arguments of `footprint`.

    Raises:
        SqvizError: it does not fit into as many as its heads can be split over; and what `footprint` raises.
    """
    _check_schemes([scheme])
    case = Case(batch, length, **options)
    model = resolve(source)
    allowed = [count for count in model.heads.fitting() if count & (count - 1) == 0]
    for count in allowed:
        found = _footprint(model, scheme, dataclasses.replace(case, devices=count))
        if found.fits(gib):
            return found
    raise SqvizError(
        f"{model.name} takes {found.per_device / GIB:.3g} GiB on each of {count} devices and {gib:g} are allowed; its "
        f"{model.heads.queries} heads cannot be split over more, in powers of two. Give fewer tokens, kv_bits=8, or a "
        "scheme of fewer bits"
    )


def _check_schemes(schemes: Any) -> None:
    several = isinstance(schemes, list | tuple) and len(schemes) > 0
    if not several or any(each is not None and not isinstance(each, Scheme) for each in schemes):
        raise SqvizError(
            f"scheme={schemes!r}: a sqviz.Scheme such as sqviz.SMOOTHQUANT_O3, None, or a list of at least one"
        )


def _footprint(model: Measured, scheme: Scheme | None, case: Case) -> Footprint:
    weights, cache, activations = model.bytes(scheme, case)
    return Footprint(
        name=model.name,
        scheme=scheme,
        batch=case.batch,
        length=case.length,
        devices=case.devices,
        dtype=case.dtype_name,
        kv_bits=case.bits_of_cache,
        parameters=model.weights.parameters,
        linears=weights.linears,
        steps=weights.steps,
        embeddings=weights.embeddings,
        rest=weights.rest,
        cache=cache,
        activations=activations,
        notes=model.notes(case),
    )
