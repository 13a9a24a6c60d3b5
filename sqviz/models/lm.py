"""`LM`: a causal language model, its tokenizer, and what sqviz knows about its architecture. Immutable.

A transformation (smooth, quantise) makes a new `LM` from `share(lm.model)`: a copy of the module tree whose parameters
and buffers are the very same tensors. Replacing a parameter in the copy leaves the original as it was and costs the
memory of that one parameter.
"""

import copy
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sqviz.models.arch import Arch

NO_SCALES: Mapping[str, Tensor] = MappingProxyType({})


@dataclasses.dataclass(frozen=True, eq=False)
class LM:
    """A causal language model as sqviz sees it.

    Attributes:
        model: the transformers model, in eval mode. sqviz never changes it.
        tokenizer: its tokenizer, or None; without one, text has to be given as token ids.
        arch: its row of the architecture table.
        scales: smoothing factors s already folded into the weights, by linear name; each [channel], or
            [expert channel] for fused experts. Empty for an untouched model.
        note: one line on how this model came about, shown by `repr`.
        history: the same as plain data, a record for each change of the weights, in order; see `quant/recipe.py`.
    """

    model: nn.Module
    tokenizer: Any
    arch: "Arch"
    scales: Mapping[str, Tensor] = dataclasses.field(default_factory=lambda: NO_SCALES)
    note: str = ""
    history: tuple[Mapping[str, Any], ...] = ()

    @property
    def config(self) -> Any:
        """The transformers configuration of the text model."""
        return self.model.config.get_text_config()  # type: ignore[union-attr, operator]

    @property
    def blocks(self) -> list[nn.Module]:
        """The model's blocks, in order."""
        return list(self.model.get_submodule(self.arch.blocks).children())

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter lies."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's first parameter."""
        return next(self.model.parameters()).dtype

    @property
    def name(self) -> str:
        """The id or path it was loaded from, or its class."""
        return str(getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__)

    def replace(self, **changes: Any) -> "LM":
        """A new `LM` with some fields changed."""
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        count += sum(getattr(module, "stands_for", 0) for module in self.model.modules())  # weights as INT8 codes
        size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
        dtype = str(self.dtype).removeprefix("torch.")
        note = f", {self.note}" if self.note else ""
        return f"LM({self.name}: {type(self.model).__name__}, {size} parameters, {dtype} on {self.device}{note})"


def share(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters and buffers are the same tensors as the original's.

    Tied weights stay tied. Hooks of the original are not carried over. Replace what has to change in the copy
    (`module.weight = nn.Parameter(...)`); never write into a tensor in place, and never `.to(dtype)` the copy: torch
    does that in place, to the original's tensors.
    """
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for module in twin.modules():
        for hooks in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, hooks).clear()
        # transformers' own hooks, by which it records hidden states, are gone as well: it has to install them anew
        module.__dict__.pop("_output_capturing_hooks_installed", None)
    return twin.eval()


def unshare(model: nn.Module) -> None:
    """Give a twin parameters of its own over the same memory: `.half()` or `.to(…)` then leave the original as it was.

    Tied weights stay tied; a parameter of a special kind, such as a packed one, is left as it is.
    """
    own: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if type(parameter) is not nn.Parameter or parameter.is_inference():
                continue
            if id(parameter) not in own:
                twin = own[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
                twin.__dict__.update(parameter.__dict__)  # transformers notes there what is initialised
            module._parameters[name] = own[id(parameter)]
