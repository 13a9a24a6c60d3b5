"""`smooth`: move the outliers of activations into weights, exactly (SmoothQuant, thesis ch. 3.3).

    Y = (X diag(s)⁻¹)(diag(s) Wᵀ),    s_j = max|X_j|^α / max|W_j|^(1−α)                       (thesis eq. 3.3, 3.4)

max|X_j| comes from a capture, max|W_j| is over all linears that read X. Dividing X by s is folded into what produces
X (see `models/folds.py`), so the smoothed model has the same modules and the same cost. The thesis folds into norms
only (`folds="norm"`): the inputs of attention and of the MLP. `folds="all"` adds the exact folds into earlier linears:
what o_proj reads (into the value rows) and what down_proj reads (into up_proj, or through a relu). With one step
per weight tensor, a row of the earlier linear that is multiplied by 1/s > 1 costs all others: `folds="outliers"` folds
into linears only what stands out, s'_j = max(1, s_j / median s), so that no row grows.

Order. Linear folds come first: they divide rows of weights (v_proj, up_proj) whose columns the norm folds then
multiply. s of each fold is computed from the weights as they are at that moment, so it balances the weights that the
result has. Linear folds do not touch each other's columns, nor norm folds each other's.

Simplifications: s = 1 for a channel that never fires (max|X_j| = 0) or is never read (max|W_j| = 0), and s is kept
within [1e-5, 1e5]. Arithmetic in float32 (float64 for a float64 model), results in the model's dtype.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sqviz.errors import CannotFold, NonFinite, NoSuchLayer, SqvizError
from sqviz.models.folds import divide_input, multiply_weights, producer_rows, scale_shape, tie, weight_absmax, wide
from sqviz.models.linears import Group, holder
from sqviz.models.lm import LM, share
from sqviz.quant.equivalence import check_equivalence
from sqviz.quant.found_alpha import FoundAlpha
from sqviz.quant.kept_sinks import refresh
from sqviz.quant.plain import check_floating
from sqviz.quant.plan import Alpha, Folds, Step, check_alpha, plan
from sqviz.quant.recipe import smoothing_record
from sqviz.quant.scaled_linear import divide_online
from sqviz.quant.schemes import Scheme

SMALLEST, LARGEST = 1e-5, 1e5  # s is kept between these


class HasAbsmax(Protocol):
    """What smoothing reads of a capture; `sqviz.Magnitudes` has it."""

    @property
    def scales(self) -> Mapping[str, Tensor]:
        """The factors that were folded into the model when it was captured, by linear name."""

    def absmax(self, name: str) -> Float[Tensor, "*expert channel"]:
        """max|X| per channel of the input of the linear `name`."""


def smoothing_scale(
    x_absmax: Float[Tensor, "*expert channel"], w_absmax: Float[Tensor, "*expert channel"], alpha: float
) -> Float[Tensor, "*expert channel"]:
    """s_j = max|X_j|^α / max|W_j|^(1−α), thesis eq. 3.4; 1 where either maximum is 0, kept within [1e-5, 1e5].

    Raises:
        SqvizError: `alpha` is outside [0, 1].
    """
    alpha = check_alpha(alpha)
    alive = (x_absmax > 0) & (w_absmax > 0)
    s = torch.where(alive, x_absmax, 1).pow(alpha) / torch.where(alive, w_absmax, 1).pow(1 - alpha)
    return s.clamp(SMALLEST, LARGEST)


def smooth(
    lm: LM,
    magnitudes: HasAbsmax,
    alpha: Alpha,
    *,
    folds: Folds | None = None,
    online: bool = False,
    check: bool = True,
    scheme: Scheme | None = None,
) -> LM:
    """A model with smoother activations and the same logits. `lm` stays as it was; unchanged weights are shared.

    Args:
        lm: the model.
        magnitudes: what `sqviz.capture` returned, for this model or for one it was smoothed from.
        alpha: migration strength in [0, 1]. One number; or {pattern: α} with glob patterns over names of linears
            ("*.down_proj", "model.layers.3.*"; linears that share an input share α; the last matching pattern counts,
            None leaves out); or a callable that gets a `Group` and returns α, or None to leave it. "auto" searches,
            see `sqviz.search_alpha`, which also keeps what it finds.
        folds: "norm" smooths the inputs of attention and MLP by folding into norms, as the thesis does; "all" also
            folds into earlier linears where that is exact; "outliers" does so for the half of the channels with the
            larger s, dividing them alone. None: those that strengths were searched for, for "auto" what
            `search_alpha` takes for the scheme, else "norm".
        online: divide inputs that cannot be folded at run time (`ScaledLinear`), instead of raising. With
            `folds="norm"` that means the inputs of attention and MLP, and whatever a pattern names.
        check: compare the logits before and after.
        scheme: what the model will be quantised by; for "auto" only.

    Returns:
        The smoothed `LM`; its `scales` hold, for every linear, the product of all s that its input was divided by, and
        its `history` how strongly it was smoothed and on which text.

    Raises:
        SqvizError: α is outside [0, 1], statistics and model differ in size, the model is quantised already, or
            strengths were found for more folds than `folds`.
        NoSuchLayer: a pattern matches nothing, or `magnitudes` lacks a linear.
        CannotFold: what was asked for has no exact fold; the message names the linear and why.
        NonFinite: a captured maximum is NaN or infinite.
        NotEquivalent: the logits changed (`check`).
    """
    check_floating(lm, "smooth")
    if alpha == "auto":
        alpha = _searched(lm, magnitudes, scheme, folds)
    folds = _folds(alpha, folds)
    steps = plan(lm, alpha, folds, online)
    refuse_tied(lm, steps)
    after, scales = lm.replace(model=share(lm.model), note=_note(lm, alpha, folds, online)), dict(lm.scales)
    with torch.no_grad():
        for step in sorted(steps, key=lambda step: step.group.fold_kind == "norm"):
            s = _apply(after, step, _input_absmax(lm, magnitudes, step.group), folds).cpu()
            scales.update({name: scales.get(name, 1) * s for name in step.group.consumers})
    record = smoothing_record(alpha, steps, folds, online, magnitudes)
    after = after.replace(scales=scales, history=(*lm.history, record))
    refresh(after)
    if check:
        check_equivalence(lm, after)
    return after


def _searched(lm: LM, magnitudes: HasAbsmax, scheme: Scheme | None, folds: Folds | None) -> Alpha:
    from sqviz.observe.magnitudes import Magnitudes
    from sqviz.quant.alpha import search_alpha

    if scheme is None:
        raise SqvizError(
            'alpha="auto" searches for one scheme: give scheme=…, such as sqviz.SMOOTHQUANT_O1, or α as a number.'
        )
    if not isinstance(magnitudes, Magnitudes):
        raise SqvizError(f'alpha="auto" needs what sqviz.capture returned, not a {type(magnitudes).__name__}.')
    return search_alpha(lm, magnitudes, scheme, folds=folds)


def _folds(alpha: Alpha, folds: Folds | None) -> Folds:
    """The folds to make: as asked for, or those that go with α. Raises `SqvizError` if these are others."""
    own = alpha.folds if isinstance(alpha, FoundAlpha) else "norm"
    if own != "norm" and folds not in (None, own):
        raise SqvizError(
            f"folds={folds!r}: these strengths were found with folds={own!r}, and mean something else without. Leave "
            f"folds out, or search anew: sqviz.search_alpha(lm, m, scheme, folds={folds!r})."
        )
    return folds or own


def _apply(
    after: LM, step: Step, x_absmax: Float[Tensor, "*expert channel"], folds: Folds
) -> Float[Tensor, "*expert channel"]:
    """Rescale one group in `after.model` and return the s that was applied."""
    w_absmax = weight_absmax(after, step.group)
    x_absmax = x_absmax.to(w_absmax).expand_as(w_absmax)
    if step.online:
        s = smoothing_scale(x_absmax, w_absmax, step.alpha)
        applied = [divide_online(after.model, name, s) for name in step.group.consumers]
        return applied[0]
    if step.group.fold_kind == "linear":
        rows = producer_rows(after, step.group)
        x_absmax, w_absmax = tie(x_absmax, rows), tie(w_absmax, rows)
    s = smoothing_scale(x_absmax, w_absmax, step.alpha)
    if step.group.fold_kind == "linear" and folds == "outliers":
        s = _outliers(s, (x_absmax > 0) & (w_absmax > 0))
    s = divide_input(after.model, after, step.group, s)
    multiply_weights(after.model, step.group, s)
    return s


def _outliers(
    s: Float[Tensor, "*expert channel"], alive: Bool[Tensor, "*expert channel"]
) -> Float[Tensor, "*expert channel"]:
    """max(1, s_j / median s) for the channels that fire and are read, which alone make the median; 1 for the others."""
    median = s.where(alive, torch.nan).nanmedian(-1, keepdim=True).values
    return (s / median).clamp(min=1).where(alive, 1.0)


def _input_absmax(lm: LM, magnitudes: HasAbsmax, group: Group) -> Float[Tensor, "*expert channel"]:
    """max|X| of the group's input as it is in `lm`, that is, with the factors folded since the capture divided out."""
    try:
        absmax = wide(torch.as_tensor(magnitudes.absmax(group.name)).detach())
    except KeyError as error:
        raise NoSuchLayer(
            f"the magnitudes hold nothing for {group.name!r}; capture {lm.name} itself: sqviz.capture(lm, text)"
        ) from error
    shape = scale_shape(lm, group)
    if tuple(absmax.shape) not in (shape, shape[-1:]):
        raise SqvizError(
            f"the magnitudes of {group.name!r} have shape {tuple(absmax.shape)}, its input has {shape}: "
            f"they belong to another model than {lm.name}"
        )
    if not absmax.isfinite().all():
        where = int((~absmax.isfinite()).flatten().nonzero()[0])
        raise NonFinite(
            f"max|X| of {group.name!r} is {float(absmax.flatten()[where])} in channel {where % shape[-1]}; "
            "capture again in float32 or bfloat16, or on other text"
        )
    then, now = magnitudes.scales.get(group.name), lm.scales.get(group.name)
    absmax = absmax if then is None else absmax * then.to(absmax)
    return absmax if now is None else absmax / now.to(absmax)


def refuse_tied(lm: LM, steps: tuple[Step, ...]) -> None:
    """Raise `CannotFold` if a tensor to be rescaled has a second owner, which would see its values change."""
    owners: dict[int, list[str]] = {}
    for name, parameter in lm.model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for step in steps:
        touched = [holder(lm.model, name) for name in step.group.consumers]
        if step.group.fold is not None and not step.online:
            producer: nn.Module = holder(lm.model, step.group.fold.path)[0]
            touched.append((producer, "weight"))
        for module, attribute in touched:
            names = owners.get(id(getattr(module, attribute, None)), [])
            if len(names) > 1:
                raise CannotFold(
                    f"{step.group.name}: {' and '.join(names)} are one tensor; rescaling it for one would change the "
                    "other. Leave it out of alpha, or untie them first"
                )


def _note(lm: LM, alpha: Alpha, folds: Folds, online: bool) -> str:
    if isinstance(alpha, Mapping):
        shown = "{" + ", ".join(f"{pattern}: {value}" for pattern, value in alpha.items()) + "}"
    else:
        shown = getattr(alpha, "__name__", "per layer") if callable(alpha) else f"{alpha:g}"
    linear = {"norm": "", "all": " with linear folds", "outliers": " with linear folds of outliers"}[folds]
    extra = linear + ("", " and online scaling")[online]
    return f"{lm.note}, smoothed α={shown}{extra}".removeprefix(", ")
