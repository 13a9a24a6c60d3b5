"""The linears of a loaded model, resolved from its row in `ARCHS`: which read the same tensor, and their weights.

A linear is named by its path in the model: "model.layers.3.mlp.down_proj". It may be an `nn.Linear`, transformers'
`Conv1D` (weight stored transposed), a mixture's router, or a parameter [expert out channel] that fuses the experts'
linears; `weight` shows all of them as [out channel]. Embeddings and lm_head are not among them.
"""

import dataclasses
import difflib
from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor, nn

from sqviz.errors import NoSuchLayer
from sqviz.models.arch import HOMOGENEOUS, Fold, Input, Norm, Through
from sqviz.models.lm import LM


@dataclasses.dataclass(frozen=True)
class Group:
    """The linears that read one and the same tensor; smoothing gives them one s.

    Attributes:
        name: the first consumer; it stands for the group wherever one name is needed.
        block: index of the block.
        kind: path of the first consumer relative to the block, the same in every block: "mlp.down_proj".
        consumers: absolute names of all linears that read the tensor.
        fold: how the tensor can be rescaled exactly (paths absolute), or None.
        reason: why it cannot, in words; "" if it can.
        entry: it is what attention or MLP reads first; these the thesis smooths by default.
    """

    name: str
    block: int
    kind: str
    consumers: tuple[str, ...]
    fold: Fold | None
    reason: str = ""
    entry: bool = False

    @property
    def fold_kind(self) -> str:
        """ "norm" (folds into a norm), "linear" (into an earlier linear) or "" (cannot be folded)."""
        if self.fold is None:
            return ""
        return "norm" if isinstance(self.fold, Norm) else "linear"

    @property
    def title(self) -> str:
        """For people: "3 · self_attn.q_proj + k_proj + v_proj"."""
        head, *rest = self.consumers
        parent = head.rpartition(".")[0]
        shown = [name.removeprefix(f"{parent}.") for name in rest]
        shown = [name.rpartition(".")[2] if name.count(".") > 1 else name for name in shown]
        return f"{self.block} · {' + '.join([self.kind, *shown])}"


def groups(lm: LM) -> tuple[Group, ...]:
    """Every group of linears in the model's blocks, in execution order.

    Raises:
        NoSuchLayer: the model lacks a module that its row in `ARCHS` names.
    """
    return tuple(
        _resolve(lm, line, index)
        for index, block in enumerate(lm.blocks)
        for line in lm.arch.inputs
        if line.holds(lm.config) and (not line.where or _exists(block, line.where))
    )


def linear_names(lm: LM) -> tuple[str, ...]:
    """Names of all linears in the model's blocks, in execution order."""
    return tuple(name for group in groups(lm) for name in group.consumers)


def _resolve(lm: LM, line: Input, index: int) -> Group:
    prefix = f"{lm.arch.blocks}.{index}."
    consumers = tuple(prefix + path for path in line.consumers)
    for name in consumers:
        holder(lm.model, name)
    reason = line.reason or _obstacle(lm, line, prefix)
    fold = None if reason or line.fold is None else dataclasses.replace(line.fold, path=prefix + line.fold.path)
    entry = line.entry or isinstance(line.fold, Norm)
    return Group(consumers[0], index, line.consumers[0], consumers, fold, reason, entry)


def _obstacle(lm: LM, line: Input, prefix: str) -> str:
    """Why this model, though its row has a fold here, cannot be folded; "" if it can."""
    fold = line.fold
    if isinstance(fold, Norm) and getattr(lm.model.get_submodule(prefix + fold.path), "weight", None) is None:
        return f"the norm {fold.path} has no weight to divide"
    if isinstance(fold, Through) and (activation := getattr(lm.config, fold.activation)) not in HOMOGENEOUS:
        return f"{activation} between {fold.path} and {line.consumers[0]} is not homogeneous"
    return ""


# --- weights ---


def holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module and the attribute that hold the weight of the linear `name`.

    Raises:
        NoSuchLayer: nothing in the model has this name; the message lists near ones.
    """
    parent, _, leaf = name.rpartition(".")
    if _exists(model, parent):
        module = model.get_submodule(parent)
        found = getattr(module, leaf, None)
        if isinstance(found, nn.Parameter):
            return module, leaf
        if isinstance(found, nn.Module) and getattr(found, "weight", None) is not None:
            return found, "weight"
    raise no_such_layer(name, [known for known, _ in model.named_modules()])


def no_such_layer(name: str, known: Iterable[str]) -> NoSuchLayer:
    """The error for a name or pattern that matches nothing, with the names that come near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.4) or known[:4]
    return NoSuchLayer(f"{name!r} matches nothing in the model; near: {', '.join(near)}")


def weight(lm: LM | nn.Module, name: str) -> Float[Tensor, "out channel"]:
    """The weight of the linear `name` as [out channel]: a view, however it is stored.

    Experts fused into one tensor are stacked: [expert · out, channel], see `experts`.

    Raises:
        NoSuchLayer: the model has no such linear.
    """
    module, attribute = holder(lm.model if isinstance(lm, LM) else lm, name)
    stored = getattr(module, attribute)
    if stored.ndim == 3:
        return stored.flatten(0, 1)
    return stored.T if _is_transposed(module) else stored


def experts(lm: LM | nn.Module, name: str) -> int:
    """How many experts the linear `name` fuses: the leading axis of its storage. 0 for an ordinary linear."""
    module, attribute = holder(lm.model if isinstance(lm, LM) else lm, name)
    stored = getattr(module, attribute)
    return stored.shape[0] if stored.ndim == 3 else 0


def folded_scales(lm: LM) -> dict[str, Float[Tensor, "*expert channel"]]:
    """`lm.scales` as far as they show in what arrives at each linear: without the s that it divides by itself, online.

    For statistics of inputs seen from outside: X as seen · folded_scales = X of the model that was never smoothed.
    """
    found = {}
    for name, s in lm.scales.items():
        online = getattr(holder(lm.model, name)[0], "input_scale", None)
        found[name] = s if online is None else s / online.to(s)
    return found


def set_weight(model: nn.Module, name: str, new: Float[Tensor, "out channel"]) -> None:
    """Give the linear `name` of a shared copy (`models.lm.share`) a new weight, stored as the old one was.

    The old tensor is replaced, not written to; dtype and device of the old one are kept.
    """
    module, attribute = holder(model, name)
    old = getattr(module, attribute)
    new = new.T.contiguous() if _is_transposed(module) else new.reshape(old.shape)
    replace_parameter(module, attribute, new)


def replace_parameter(module: nn.Module, attribute: str, new: Tensor) -> None:
    """Put `new`, in the old one's dtype, into a new parameter of a shared copy."""
    old = getattr(module, attribute)
    setattr(module, attribute, nn.Parameter(new.to(old.dtype), requires_grad=old.requires_grad))


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, whose weight is [channel out]; known by its `nf` (number of outputs)."""
    return hasattr(module, "nf")


def _exists(module: nn.Module, path: str) -> bool:
    for part in filter(None, path.split(".")):
        found = getattr(module, part, None)
        if found is None:
            return False
        module = found
    return True
