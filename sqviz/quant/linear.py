"""`quantize`: a model whose linears compute in integers, really or acted out in floating point (thesis §3.1, eq. 3.2).

Every linear Y = X Wᵀ of the blocks becomes X̂ Ŵᵀ, with Ŵ quantised once and X̂ at every forward pass.

    backend="simulate"   both come back to the model's dtype before the product (simulate.py): any scheme, any size of
                         integer, no gain in speed or memory
    any other            codes are multiplied, sums are exact integers, weights are kept as INT8 and nothing else
                         (execute.py): schemes whose steps can stand outside of the sum

Both differ by the rounding of their floating-point part only. Biases, norms, attention products and embeddings stay as
they are unless asked for, and so does a mixture's router: it decides *which* experts run, costs next to nothing, and
the published kernels leave it in floating point too.

Fused experts: each expert's Ŵ has steps of its own, the input of the first product is quantised once for all experts,
that of the second one expert by expert. Per-tensor dynamic steps span whatever one forward pass holds, a batch too.
"""

import fnmatch
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from sqviz_kernels.dispatch import backend_for
from torch import nn

from sqviz.errors import NoSuchLayer, SqvizError
from sqviz.models.linears import Group, experts, groups, no_such_layer, weight
from sqviz.models.lm import LM, share
from sqviz.progress import CancelToken
from sqviz.progress import progress as progress_bar
from sqviz.quant import int8_attention
from sqviz.quant.calibration import Calibration
from sqviz.quant.execute import Executor, check_executable, finish
from sqviz.quant.granularity import PerGroup
from sqviz.quant.schemes import Scheme
from sqviz.quant.simulate import Simulator

if TYPE_CHECKING:
    from sqviz.observe.magnitudes import Magnitudes

Step = Callable[..., None]


def quantize(
    lm: LM,
    scheme: Scheme,
    magnitudes: "Magnitudes | None" = None,
    backend: str = "simulate",
    skip: str | Iterable[str] = (),
    *,
    head: bool = False,
    attention: bool = False,
    cancel: CancelToken | None = None,
    progress: bool = False,
) -> LM:
    """A new `LM` whose linears compute as `scheme` says. `lm` stays as it was; unchanged tensors are shared with it.

    Args:
        lm: the model, smoothed beforehand or not. Its linears must not be quantised yet.
        scheme: granularities, bits, static or dynamic.
        magnitudes: from `sqviz.capture`, for the steps of a static scheme and for ranges that are clipped. May come
            from before or after smoothing: the recorded extrema of every channel are divided by the smoothing factors
            that were folded in since. Only `ClipTokens` and `ClipValues` want a capture of `lm` itself.
        backend: "simulate": integers acted out in floating point. "auto": executed by the best backend there is for the
            model's device. Or one by name, see `sqviz.backends()`.
        skip: glob patterns over names of linears that stay in floating point, such as "*.down_proj".
        head: also quantise lm_head, one step per token of its vocabulary, its input per token; a tied embedding then
            reads its rows from the INT8 head. Not with "simulate".
        attention: also compute QKᵀ and PV from codes, queries, keys and values per token and head (thesis Figure 3.3).
        cancel: stops the work between two linears.
        progress: show a progress bar (billions of weights take a while).

    Raises:
        SqvizError: the scheme needs calibration and `magnitudes` are missing or another model's; an unknown backend; a
            scheme that cannot be executed in integers; groups that do not divide the channels of a linear; a linear is
            quantised already or of a kind that is not known.
        Unavailable: the backend cannot run on this machine; the message says why.
        NoSuchLayer: a pattern matches nothing.
        NonFinite: a weight holds a NaN or an infinity.
        Cancelled: stopped through `cancel`.
    """
    if not isinstance(scheme, Scheme):
        raise SqvizError(f"scheme={scheme!r}: a sqviz.Scheme is needed, such as sqviz.SMOOTHQUANT_O1.")
    calibration = Calibration(lm, scheme, magnitudes, cancel)
    return quantize_calibrated(calibration, backend, skip, head=head, attention=attention, progress=progress)


def quantize_calibrated(
    calibration: Calibration,
    backend: str = "simulate",
    skip: str | Iterable[str] = (),
    *,
    head: bool = False,
    attention: bool = False,
    progress: bool = False,
) -> LM:
    """`quantize` for a model and a scheme whose calibration is there already. Arguments and errors as there."""
    lm, scheme, cancel = calibration.lm, calibration.scheme, calibration.cancel
    pairs = [(group, name) for group in groups(lm) for name in group.consumers]
    skipped = matching(skip, [name for _, name in pairs])
    _check_groups(lm, scheme, [name for group, name in pairs if name not in skipped and not is_router(lm, group, name)])
    make = _simulated if backend == "simulate" else _executed
    with progress_bar(len(pairs), "quantising", unit="linears", cancel=cancel, show=progress) as bar:
        model = make(lm, calibration, backend, skipped, head, bar.step)
        if attention:
            int8_attention.use(lm, model, None if backend == "simulate" else backend_for(backend, lm.device))
    note = "; ".join(filter(None, [lm.note, scheme.describe() + ("" if backend == "simulate" else ", executed")]))
    return lm.replace(model=model, note=note)


def _simulated(lm: LM, calibration: Calibration, backend: str, skipped: set[str], head: bool, step: Step) -> nn.Module:
    if head:
        raise SqvizError("head=True is for models that execute in integers: give backend='auto'.")
    model, simulator = share(lm.model), Simulator(lm, calibration.scheme, calibration)
    done: set[str] = set()
    for group in groups(lm):
        for name in group.consumers:
            path = name.rpartition(".")[0] if experts(lm, name) else name
            if name not in skipped and path not in done and not is_router(lm, group, name):
                done.add(path)
                model.set_submodule(path, simulator.build(name, path, skipped))
            step()
    return model


def _executed(lm: LM, calibration: Calibration, backend: str, skipped: set[str], head: bool, step: Step) -> nn.Module:
    check_executable(calibration.scheme)
    model = share(lm.model)
    executor = Executor(lm, model, calibration, backend_for(backend, lm.device))
    parents: dict[str, None] = {}
    fused: set[str] = set()
    for group in groups(lm):
        names = [name for name in group.consumers if name not in skipped and not is_router(lm, group, name)]
        for path in (name.rpartition(".")[0] for name in names if experts(lm, name)):
            if path not in fused:
                fused.add(path)
                executor.experts(path, skipped)
        plain = [name for name in names if not experts(lm, name)]
        executor.group(group, plain)
        parents.update(dict.fromkeys(name.rpartition(".")[0] for name in plain))
        step(len(group.consumers))
    for path in parents:
        executor.mlp(path)
    if head:
        executor.head()
    finish(model)
    return model


def _check_groups(lm: LM, scheme: Scheme, names: Sequence[str]) -> None:
    """Raise `SqvizError` for groups that leave some channels of a linear over; one group may hold a whole row."""
    channels = {name: weight(lm, name).shape[1] for name in names}
    for granularity in (scheme.weight, scheme.activation):
        if not isinstance(granularity, PerGroup):
            continue
        for name, count in channels.items():
            if count > granularity.size and count % granularity.size:
                common = math.gcd(*channels.values())
                sizes = [size for size in range(2, min(common, 256) + 1) if common % size == 0]
                fitting = f"groups of {', '.join(map(str, sizes))} divide all" if sizes else "no size divides all"
                raise SqvizError(
                    f"{granularity!r} leaves {count % granularity.size} of the {count} channels of {name} over: "
                    f"{fitting}. Change the size, or leave linears out with skip=…"
                )


def is_router(lm: LM, group: Group, name: str) -> bool:
    """Whether the linear `name` chooses among the fused experts beside it that read the same tensor."""
    beside = name.rpartition(".")[0]
    for other in group.consumers:
        count = experts(lm, other)
        if count and other != name and other.rpartition(".")[0].rpartition(".")[0] == beside:
            return not experts(lm, name) and weight(lm, name).shape[0] == count
    return False


def matching(patterns: str | Iterable[str], names: Sequence[str]) -> set[str]:
    """The names that one of the glob patterns matches. Raises `NoSuchLayer` for a pattern that matches none."""
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            error: NoSuchLayer = no_such_layer(pattern, names)
            raise error
        found.update(matched)
    return found
