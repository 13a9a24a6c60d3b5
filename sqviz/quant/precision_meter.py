"""What one operator of a block does when it alone is quantised: to its own output, the block's, the model's.

Everything is the model's own forward pass, watched and changed at one operator (observe/flow.py):

    linears        the module that `sqviz.quantize(…, backend="simulate")` would put in their place
    QKᵀ, PV        products of codes (attention_products.py), after positions were put in, probabilities included
    the others     computed as they are, and their result rounded to integers with dynamic steps of the scheme's
                   activations: what it would cost to hand it on in INT8
"""

import dataclasses
import functools
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sqviz.models.linears import experts, groups, weight
from sqviz.models.lm import LM, share
from sqviz.observe.flow import Flow, Operator
from sqviz.observe.flow_paths import linear_paths
from sqviz.quant.attention_products import mix, scores
from sqviz.quant.block import Blocks
from sqviz.quant.calibration import Calibration
from sqviz.quant.divergence import Divergence
from sqviz.quant.granularity import PerToken
from sqviz.quant.linear import is_router, quantize_calibrated
from sqviz.quant.quantize import fake_quantize
from sqviz.quant.schemes import Scheme
from sqviz.quant.simulate import Simulator
from sqviz.quant.simulated import InputQuantizer, SimulatedExperts


@dataclasses.dataclass(frozen=True)
class Seen:
    """One operator in the measured text.

    Attributes:
        local: mean_t ‖ŷ_t − y_t‖² / ‖y_t‖² of its own output; NaN where it has none that could be rounded.
        operands: name → (largest magnitude, how many rows of it have a step of their own, shape of one segment).
        largest: magnitude in its result.
    """

    local: float
    operands: dict[str, tuple[float, int, tuple[int, ...]]]
    largest: float


class Meter:
    """Measures the operators of one model under one scheme on some segments. The model stays as it was."""

    def __init__(self, calibration: Calibration, segments: Int64[Tensor, "segment token"]) -> None:
        self.lm, self.scheme, self.calibration = calibration.lm, calibration.scheme, calibration
        self.segments = segments
        self.held = held(self.scheme)
        self.routers = {
            name for group in groups(self.lm) for name in group.consumers if is_router(self.lm, group, name)
        }
        self._paths = linear_paths(self.lm)
        self._simulator = Simulator(self.lm, self.scheme, calibration)
        self._twins: dict[tuple[int, str], nn.Module] = {}
        self._own = self.lm.replace(model=share(self.lm.model))  # others may be using the model
        self._blocks = Blocks(self.lm, segments)
        self._divergence = Divergence(self.lm, segments)

    # --- the three questions ---

    def look(self, block: int) -> dict[str, Seen]:
        """Every operator of a block by itself: operands, and the error of its own output."""
        found: dict[str, list[Seen]] = {}

        def see(_: int, operator: Operator, operands: tuple[Any, ...], result: Any) -> None:
            found.setdefault(operator.name, []).append(self._seen(block, operator, operands, result))

        self._twins.clear()
        self._blocks.error(self.lm, block)  # its outputs as they are
        with torch.no_grad(), Flow(self.lm, see, block, self._paths):
            self._blocks.error(self.lm, block)
        return {name: _mean(parts) for name, parts in found.items()}

    def in_block(self, block: int, name: str) -> float:
        """mean_t ‖ŷ_t − y_t‖² / ‖y_t − x_t‖² of what the block adds to the residual stream x, as quant/block.py."""
        self._blocks.error(self.lm, block)
        with torch.no_grad(), self._only(name, block):
            return self._blocks.error(self.lm, block)

    def in_model(self, name: str, block: int | None = None) -> float:
        """KL(p ‖ p̂) of the next token in nats, with this operator quantised in one block, or in all that have it."""
        with self._only(name, block, self._own):
            found = self._divergence(self._own, since=block or 0)
        if block is None:
            self._twins.clear()
        return max(0.0, found)  # rounding leaves ±1e-7 of nothing

    def together(self, attention: bool) -> float:
        """KL(p ‖ p̂) of the model with everything quantised that the scheme quantises."""

        def see(block: int, operator: Operator, operands: tuple[Any, ...], result: Any) -> Any:
            return self.quantised(block, operator, operands, result) if operator.kind == "product" else None

        whole = quantize_calibrated(self.calibration)
        if not attention:
            return self._divergence(whole)
        with Flow(whole, see, paths=self._paths):
            return self._divergence(whole)

    def _only(self, name: str, block: int | None, model: LM | None = None) -> Flow:
        def see(index: int, operator: Operator, operands: tuple[Any, ...], result: Any) -> Any:
            return self.quantised(index, operator, operands, result) if operator.name == name else None

        return Flow(self.lm if model is None else model, see, block, self._paths)

    # --- one operator ---

    def quantised(self, block: int, operator: Operator, operands: tuple[Any, ...], result: Any) -> Any:
        """The operator's result if it were quantised; None where it cannot be."""
        path = self.path(block, operator.name)
        if path in self.routers:
            return None
        if self._of_experts(block, operator):
            return self._twin(block, operator)(*operands)
        if operator.kind == "linear":
            return self._twin(block, operator)(operands[0])
        if operator.kind == "product":
            product = scores(*operands) if operator.name.startswith("qk") else mix(*operands)
            hidden = torch.isneginf(result)
            return (
                product.to(result.dtype).masked_fill(hidden, -torch.inf) if bool(hidden.any()) else product.to(result)
            )
        if isinstance(result, tuple):
            return tuple(self._held(one) for one in result)
        return self._held(result)

    def path(self, block: int, name: str) -> str:
        """The name of an operator in the model, if it is a module or a parameter."""
        return f"{self.lm.arch.blocks}.{block}.{name}"

    def _held(self, result: Tensor) -> Tensor:
        granularity = self.held.activation
        assert granularity is not None
        return fake_quantize(result, granularity, self.held.bits, self.held.symmetric, of="activation", name="a result")

    def _twin(self, block: int, operator: Operator) -> nn.Module:
        key = block, operator.name
        if key not in self._twins:
            path = self.path(*key)
            if not self._of_experts(block, operator):
                self._twins[key] = self._simulator.build(path, path, set())
            elif operator.kind == "linear":
                parent, _, leaf = path.rpartition(".")
                other = {"gate_up_proj": "down_proj", "down_proj": "gate_up_proj"}[leaf]
                self._twins[key] = self._simulator.build(path, parent, {f"{parent}.{other}"})
            else:
                module: Any = self.lm.model.get_submodule(path.rpartition(".")[0])
                inner = [InputQuantizer(self.held, path) for _ in range(module.num_experts)]
                self._twins[key] = SimulatedExperts(module, module.gate_up_proj, module.down_proj, None, inner)
        return self._twins[key]

    def _of_experts(self, block: int, operator: Operator) -> bool:
        """Whether it is one of the products of fused experts, or the activation between them."""
        parent = self.path(block, operator.name).rpartition(".")[0]
        return operator.kind in ("linear", "activation") and any(
            name.rpartition(".")[0] == parent for name in self._fused
        )

    @functools.cached_property
    def _fused(self) -> set[str]:
        return {name for group in groups(self.lm) for name in group.consumers if experts(self.lm, name)}

    # --- what is noted of it ---

    def _seen(self, block: int, operator: Operator, operands: tuple[Any, ...], result: Any) -> Seen:
        if self._of_experts(block, operator):
            module = self.lm.model.get_submodule(self.path(block, operator.name).rpartition(".")[0])
            x, result, new = _inside(module, self._twin(block, operator), operator, *operands[:2])
            operands = operands[:1] if operator.name.endswith("gate_up_proj") else (x,)
        else:
            new = self.quantised(block, operator, operands, result)
        local = float("nan") if new is None else relative(operator, result, new)
        noted = {label: _noted(tensor) for label, tensor in self._named(block, operator, operands).items()}
        made = result if isinstance(result, tuple) else (result,)
        largest = max(float(one[torch.isfinite(one)].abs().max()) for one in made if one.is_floating_point())
        return Seen(local, noted, largest)

    def _named(self, block: int, operator: Operator, operands: tuple[Any, ...]) -> dict[str, Tensor]:
        if operator.kind == "linear":
            path = self.path(block, operator.name)
            w, count = weight(self.lm, path).detach(), experts(self.lm, path)
            return {"X": operands[0], "W": w.unflatten(0, (count, -1)) if count else w}
        if operator.name.startswith("qk"):
            return {"Q": operands[0], "K": operands[1]}
        if operator.kind == "product":
            return {"P": operands[0], "V": operands[1]}
        inputs = [one for one in operands if isinstance(one, Tensor) and one.is_floating_point()]
        return {"X" if len(inputs) == 1 else f"X{at + 1}": one for at, one in enumerate(inputs)}


def held(scheme: Scheme) -> Scheme:
    """How results of operators that stay in 16 bit are rounded when asked what that would cost: dynamically."""
    return Scheme(None, scheme.activation or PerToken(), bits=scheme.bits, symmetric=scheme.symmetric)


def relative(operator: Operator, y: Any, new: Any) -> float:
    """mean_t ‖ŷ_t − y_t‖² / ‖y_t‖² over tokens t, y_t all that the operator makes for one: every head, every output.

    Logits count where a query may look.
    """
    before, after = (_rows(operator, one) for one in (y, new))
    if operator.name.startswith("qk"):
        logits = y if y.ndim == 3 else y[0]
        seen = (torch.isfinite(logits) & torch.ones_like(logits, dtype=torch.bool).tril(_before(logits))).movedim(-2, 0)
        before, after = (torch.where(seen.flatten(1), one, 0.0) for one in (before, after))
    size = before.square().sum(-1)
    return float(((after - before).square().sum(-1) / torch.where(size == 0, 1.0, size)).mean())


def _rows(operator: Operator, result: Any) -> Float[Tensor, "token value"]:
    """One row per token, in float64."""
    if operator.kind == "rotary":
        return torch.cat([_rows(dataclasses.replace(operator, kind="product"), one) for one in result], -1)
    if operator.kind in ("product", "softmax"):  # [… head token value]
        return result.double().flatten(0, -3).movedim(-2, 0).flatten(1)
    return result.double().flatten(0, -2)


def _before(logits: Tensor) -> int:
    """How many keys stand before the first query: kept sinks."""
    return logits.shape[-1] - logits.shape[-2]


def _inside(
    module: Any, twin: Any, operator: Operator, hidden: Float[Tensor, "token channel"], choice: Int64[Tensor, "..."]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one operator inside of fused experts: input, output, output when quantised; a row per token and expert."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    x_hat = hidden if twin.outer is None else twin.outer(hidden)
    for expert in choice.unique().tolist():
        token = (choice == expert).nonzero(as_tuple=True)[0]
        x, up = hidden[token], hidden[token] @ module.gate_up_proj[expert].T
        if operator.name.endswith("gate_up_proj"):
            found.append((x, up, x_hat[token] @ twin.gate_up_proj[expert].T))
            continue
        inner = module._apply_gate(up)
        rounded = inner if twin.inner is None else twin.inner[expert](inner)
        if operator.kind == "activation":
            found.append((up, inner, rounded))
        else:
            found.append((inner, inner @ module.down_proj[expert].T, rounded @ twin.down_proj[expert].T))
    x, y, new = (torch.cat(parts) for parts in zip(*found, strict=True))
    return x, y, new


def _noted(tensor: Tensor) -> tuple[float, int, tuple[int, ...]]:
    """Largest magnitude, rows, shape. Heads of keys that stand for several of queries are counted once."""
    finite = tensor[torch.isfinite(tensor)]
    shape = tuple(tensor.shape)
    heads = tensor.flatten(0, -3).flatten(1) if tensor.ndim > 2 else tensor[None]
    distinct = len(torch.unique(heads, dim=0)) if len(heads) > 1 else 1
    return float(finite.abs().max()) if finite.numel() else 0.0, distinct * shape[-2], shape


def _mean(parts: list[Seen]) -> Seen:
    """Of several segments: the mean error, the largest magnitudes."""
    first = parts[0]
    operands = {
        label: (max(part.operands[label][0] for part in parts), rows, shape)
        for label, (_, rows, shape) in first.operands.items()
    }
    local = sum(part.local for part in parts) / len(parts)
    return Seen(local, operands, max(part.largest for part in parts))
