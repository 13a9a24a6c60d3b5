"""`quantize`: a model whose linears compute as if in integers, simulated in floating point (thesis §3.1, equation 3.2).

Every linear Y = X Wᵀ of the blocks becomes X̂ Ŵᵀ: Ŵ is quantised once, X̂ at every forward pass, both come back to the
model's dtype before the product. That is what an integer kernel computes, except that products are summed in floating
point here. Biases, norms, attention products, embeddings and lm_head stay as they are, and so does a mixture's router:
it decides *which* experts run, costs next to nothing, and the published kernels leave it in floating point too.

Fused experts: each expert's Ŵ has steps of its own, the input of the first product is quantised once for all experts,
that of the second one expert by expert. Per-tensor dynamic steps span whatever one forward pass holds, a batch too.
"""

import fnmatch
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sqviz.errors import NoSuchLayer, SqvizError
from sqviz.models.linears import Group, experts, groups, no_such_layer, weight
from sqviz.models.lm import LM, share
from sqviz.progress import CancelToken
from sqviz.progress import progress as progress_bar
from sqviz.quant.quantize import fake_quantize, step_and_zero
from sqviz.quant.scaled_linear import ScaledLinear
from sqviz.quant.schemes import Scheme
from sqviz.quant.simulated import Grid, InputQuantizer, SimulatedExperts, SimulatedLinear

if TYPE_CHECKING:
    from sqviz.observe.magnitudes import InputStats, Magnitudes


def quantize(
    lm: LM,
    scheme: Scheme,
    magnitudes: "Magnitudes | None" = None,
    backend: str = "simulate",
    skip: str | Iterable[str] = (),
    *,
    cancel: CancelToken | None = None,
    progress: bool = False,
) -> LM:
    """A new `LM` whose linears compute as `scheme` says. `lm` stays as it was; unchanged tensors are shared with it.

    Args:
        lm: the model, smoothed beforehand or not. Its linears must not be quantised yet.
        scheme: granularities, bits, static or dynamic.
        magnitudes: from `sqviz.capture`, for the steps of a static scheme. May come from before or after smoothing:
            the recorded extrema of every channel are divided by the smoothing factors that were folded in since.
        backend: "simulate": integers acted out in floating point.
        skip: glob patterns over names of linears that stay in floating point, such as "*.down_proj".
        cancel: stops the work between two linears.
        progress: show a progress bar (billions of weights take a while).

    Raises:
        SqvizError: the scheme is static and `magnitudes` is missing or is another model's; an unknown backend; a linear
            is quantised already or of a kind that is not known.
        NoSuchLayer: a pattern matches nothing.
        NonFinite: a weight holds a NaN or an infinity.
        Cancelled: stopped through `cancel`.
    """
    if not isinstance(scheme, Scheme):
        raise SqvizError(f"scheme={scheme!r}: a sqviz.Scheme is needed, such as sqviz.SMOOTHQUANT_O1.")
    if backend != "simulate":
        raise SqvizError(f"backend={backend!r}: available is 'simulate' (integers acted out in floating point).")
    if scheme.static and magnitudes is None:
        raise SqvizError(
            f"{scheme!r} is static: its steps come from calibration. Give the magnitudes: "
            "m = sqviz.capture(lm, text); sqviz.quantize(lm, scheme, m). Or use static=False."
        )
    pairs = [(group, name) for group in groups(lm) for name in group.consumers]
    skipped = _matching(skip, [name for _, name in pairs])
    model = share(lm.model)
    builder = _Builder(lm, scheme, magnitudes)
    done: set[str] = set()
    with progress_bar(len(pairs), "quantising", unit="linears", cancel=cancel, show=progress) as bar:
        for group, name in pairs:
            path = name.rpartition(".")[0] if experts(lm, name) else name
            if name not in skipped and path not in done and not is_router(lm, group, name):
                done.add(path)
                model.set_submodule(path, builder.build(name, path, skipped))
            bar.step()
    note = "; ".join(filter(None, [lm.note, scheme.describe()]))
    return lm.replace(model=model, note=note)


def is_router(lm: LM, group: Group, name: str) -> bool:
    """Whether the linear `name` chooses among the fused experts beside it that read the same tensor."""
    beside = name.rpartition(".")[0]
    for other in group.consumers:
        count = experts(lm, other)
        if count and other != name and other.rpartition(".")[0].rpartition(".")[0] == beside:
            return not experts(lm, name) and weight(lm, name).shape[0] == count
    return False


class _Builder:
    """Makes the simulated module for each linear of one model."""

    def __init__(self, lm: LM, scheme: Scheme, magnitudes: "Magnitudes | None") -> None:
        self.lm, self.scheme = lm, scheme
        self.magnitudes = magnitudes if scheme.static else None

    def build(self, name: str, path: str, skipped: set[str]) -> nn.Module:
        module = self.lm.model.get_submodule(path)
        if isinstance(module, SimulatedLinear | SimulatedExperts):
            raise SqvizError(f"{name} is quantised already. Quantise the model it was made from instead.")
        if path != name:
            return self._experts(module, path, skipped)
        smoothing = module.input_scale if isinstance(module, ScaledLinear) else None
        bias: Any = getattr(module, "bias", None)
        if not _is_plain(module, weight(self.lm, name), bias):
            raise SqvizError(
                f"{name} is a {type(module).__name__}, which sqviz cannot simulate. Leave it in floating point: "
                f"skip={[name]!r}."
            )
        return SimulatedLinear(self._weight(name), bias, self._quantizers(name)[0], smoothing)

    def _experts(self, module: Any, path: str, skipped: set[str]) -> nn.Module:
        plain = getattr(module, "has_gate", False) and hasattr(type(module), "_apply_gate")
        if not plain or module.is_transposed or module.has_bias or getattr(module, "has_post_expert_norm", False):
            raise SqvizError(
                f"{path}: the inside of {type(module).__name__} cannot be quantised; known are gated experts with "
                f"weights [expert out channel] and no bias. Leave them in floating point: skip={path + '.*'!r}."
            )
        up, down = f"{path}.gate_up_proj", f"{path}.down_proj"
        outer = None if up in skipped else self._quantizers(up)[0]
        inner = [None] if down in skipped else self._quantizers(down)
        if len(inner) == 1:
            inner = inner * module.num_experts
        return SimulatedExperts(
            module,
            module.gate_up_proj if up in skipped else self._weight(up),
            module.down_proj if down in skipped else self._weight(down),
            outer,
            None if inner[0] is None else [one for one in inner if one is not None],
        )

    def _weight(self, name: str) -> Float[Tensor, "*expert out channel"]:
        """Ŵ; for fused experts each expert's on its own."""
        original, count = weight(self.lm, name).detach(), experts(self.lm, name)
        matrices = original.unflatten(0, (count, -1)) if count else original[None]
        if self.scheme.weight is None:
            return matrices if count else original
        new = torch.stack(
            [
                fake_quantize(
                    matrix,
                    self.scheme.weight,
                    self.scheme.bits_of_weights,
                    self.scheme.symmetric,
                    of="weight",
                    name=f"the weight of {name}",
                )
                for matrix in matrices
            ]
        )
        return new if count else new[0]

    def _quantizers(self, name: str) -> list[InputQuantizer | None]:
        """One quantiser of the input of `name`, or one per expert where experts have smoothing factors of their own."""
        if self.scheme.activation is None:
            return [None]
        if self.magnitudes is None:
            return [InputQuantizer(self.scheme, name)]
        return [InputQuantizer(self.scheme, name, grid) for grid in self._grids(name, self.magnitudes)]

    def _grids(self, name: str, magnitudes: "Magnitudes") -> list[Grid]:
        """Static steps (and zero points) from the recorded extrema and what was folded in since."""
        stats = magnitudes.inputs.get(name)
        channels = weight(self.lm, name).shape[1]
        if stats is None or stats.minimum.shape[-1] != channels:
            held = "nothing" if stats is None else f"{stats.minimum.shape[-1]} channels"
            raise SqvizError(
                f"magnitudes of {magnitudes.model} hold {held} for {name}, which has {channels} channels: they come "
                "from another model. Capture them from this one: sqviz.capture(lm, text)."
            )
        now, then = self.lm.scales.get(name), magnitudes.scales.get(name)
        since = torch.ones(1, channels)
        if now is not None:
            since = since * now.float().cpu().reshape(-1, channels)  # [1 channel] or [expert channel]
        if then is not None:
            since = since / then.float().cpu().reshape(-1, channels)
        low, high = _bounds(stats)
        assert self.scheme.activation is not None
        grids: list[Grid] = []
        for extrema in torch.stack(torch.broadcast_tensors(low / since, high / since), 1):  # [2 channel] each
            bounds = self.scheme.activation.extrema(extrema, "activation")
            step, zero = step_and_zero(*bounds, self.scheme.bits, self.scheme.symmetric)
            grids.append((step.to(self.lm.device), None if zero is None else zero.to(self.lm.device)))
        return grids


def _is_plain(module: nn.Module, matrix: Float[Tensor, "out channel"], bias: Tensor | None) -> bool:
    """Whether the module computes X Wᵀ + b and nothing else; `ScaledLinear`'s division is known."""
    forward = type(module).forward
    if forward in (nn.Linear.forward, ScaledLinear.forward):
        return True
    if not isinstance(module, nn.Linear) and not hasattr(module, "nf"):  # nf: transformers' Conv1D
        return False
    x = torch.linspace(-1, 1, matrix.shape[1], dtype=matrix.dtype, device=matrix.device)[None]
    with torch.no_grad():
        expected, got = nn.functional.linear(x, matrix, bias), module(x)
    return isinstance(got, Tensor) and bool(torch.allclose(got, expected, rtol=1e-2, atol=1e-3))


def _bounds(stats: "InputStats") -> tuple[Float[Tensor, "expert_or_1 channel"], Float[Tensor, "expert_or_1 channel"]]:
    """The recorded minimum and maximum per channel: one row, or one per fused expert with an input of its own.

    An expert that calibration sent no token takes the extrema over all experts.
    """
    low, high = stats.minimum[None].float(), stats.maximum[None].float()
    if stats.expert_absmax is None:
        return low, high
    idle = torch.zeros(len(stats.expert_absmax), dtype=torch.bool)
    if stats.expert_tokens is not None:
        idle = stats.expert_tokens == 0
    reach = torch.where(idle[:, None], stats.absmax, stats.expert_absmax)
    return torch.maximum(low, -reach), torch.minimum(high, reach)


def _matching(patterns: str | Iterable[str], names: Sequence[str]) -> set[str]:
    """The names that one of the glob patterns matches. Raises `NoSuchLayer` for a pattern that matches none."""
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            error: NoSuchLayer = no_such_layer(pattern, names)
            raise error
        found.update(matched)
    return found
