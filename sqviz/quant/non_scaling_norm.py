"""Norms without a gain: the half of Outlier Suppression (Wei et al. 2022, "Gamma Migration") that changes the model.

A norm's gain γ magnifies the outliers of its output; the output without it is smoother. As in smoothing (thesis eq.
3.3) the linears that read it take over what the norm no longer does:

    X = X' diag(γ),    Y = X Wᵀ = X' (W diag(γ))ᵀ

which is smoothing with s = |γ| in place of equation 3.4, so signs stay with the norm. The other half, clipping by
token, is a matter of the scheme: `sqviz.OUTLIER_SUPPRESSION`. Left out: its fine stage, which learns steps by gradient.
"""

from typing import cast

import torch
from torch import Tensor

from sqviz.models.arch import Norm
from sqviz.models.folds import divide_input, multiply_weights, wide
from sqviz.models.linears import groups
from sqviz.models.lm import LM, share
from sqviz.quant.equivalence import check_equivalence
from sqviz.quant.kept_sinks import refresh
from sqviz.quant.plain import check_floating
from sqviz.quant.plan import Step
from sqviz.quant.smooth import refuse_tied


def non_scaling_norms(lm: LM, *, check: bool = True) -> LM:
    """A model whose norms have a gain of ±1 wherever linears alone read them, and the same logits.

    Args:
        lm: the model; it stays as it was, and unchanged weights are shared.
        check: compare the logits before and after.

    Raises:
        SqvizError: the model is quantised already.
        CannotFold: a weight that would be rescaled is tied to another.
        NotEquivalent: the logits changed (`check`).
    """
    check_floating(lm, "take the gain out of")
    chosen = [group for group in groups(lm) if isinstance(group.fold, Norm)]
    refuse_tied(lm, tuple(Step(group, 1.0, online=False) for group in chosen))
    after, scales = lm.replace(model=share(lm.model)), dict(lm.scales)
    with torch.no_grad():
        for group in chosen:
            assert isinstance(group.fold, Norm)
            weight = cast(Tensor, after.model.get_submodule(group.fold.path).weight).detach()
            gain = (wide(weight) + float(group.fold.plus_one)).abs()
            s = divide_input(after.model, after, group, torch.where(gain == 0, 1, gain))
            multiply_weights(after.model, group, s)
            scales.update({name: scales.get(name, 1) * s.cpu() for name in group.consumers})
    note, history = f"{lm.note}, norms without gain".removeprefix(", "), (*lm.history, {"did": "non_scaling_norms"})
    after = after.replace(scales=scales, note=note, history=history)
    refresh(after)
    if check:
        check_equivalence(lm, after)
    return after
