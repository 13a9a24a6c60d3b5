"""How a block of a transformer computes: its operators in execution order, and where the operands of each come from.

Read off a running model, not written down per architecture. Inside a `with Flow(lm, see)` block every module of the
blocks and every torch function between them is watched (hooks and a `TorchFunctionMode`; nothing is patched). Each
tensor carries the names of the operators it was made by, and an operator is

    norm         a module that holds parameters and is no linear
    linear       a linear of the architecture's row (models/arch.py); fused experts are two and an activation
    rotary       queries and keys that position embeddings went into, at the moment they meet
    product      QKᵀ, and PV: inside of `scaled_dot_product_attention`, or multiplied out by the model itself
    softmax      between the two
    activation   a module without parameters that changes what it is given
    multiply     of two tensors made by different operators: act(gate) · up
    add          of two tensors made by different operators: residual sums, shared and routed experts

Views, scales, masks and copies are none. `see` may give another result in place of an operator's own, and the model
goes on with it: what is quantised one operator at a time is quantised here.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from sqviz.models.lm import LM
from sqviz.observe.flow_attention import BIAS, Attended, attend
from sqviz.observe.flow_paths import Paths, linear_paths
from sqviz.observe.hooks import body

Kind = Literal["norm", "linear", "rotary", "product", "softmax", "activation", "multiply", "add"]
INPUT = "input"
"""What stands for the block's own input, the residual stream, among sources."""
POSITIONS = "@positions"
_MARKS = {"position_embeddings": POSITIONS, "position_ids": POSITIONS, "alibi": BIAS, "position_bias": BIAS}
_ADDS = frozenset(("add", "__add__", "__radd__", "add_", "__iadd__"))
_MULTIPLIES = frozenset(("mul", "__mul__", "__rmul__", "mul_", "__imul__", "multiply"))
_PRODUCTS = frozenset(("matmul", "__matmul__", "bmm", "baddbmm"))


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator of a block.

    Attributes:
        name: its path in the block, "mlp.down_proj"; "rotary", "qk", "softmax", "pv", "multiply" or "add" where it is
            no module, with a number behind it from the second one on.
        kind: see above.
        sources: names of the operators that made its operands, in execution order; "input" is the block's own input.
        biased: a softmax with positions added to its logits (ALiBi).
    """

    name: str
    kind: Kind
    sources: tuple[str, ...]
    biased: bool = False


See = Callable[[int, Operator, tuple[Any, ...], Any], Any]
"""see(block, operator, operands, result) → another result, or None to leave it.

Operands of a module are its arguments; of "qk" Q [… query dim], K [… key dim] and the factor of their product, whose
result is −∞ where a mask is known to hide it; of "pv" P [… query key] and V [… key dim]. "rotary" results in Q and K.
Both products inside of experts are given (hidden, choice, share) and what the experts return.
"""


class Flow(TorchFunctionMode):
    """Calls `see` for every operator of every block, or of one block, at every forward pass inside of the `with`."""

    def __init__(self, lm: LM, see: See, block: int | None = None, paths: Paths | None = None) -> None:
        """Watch `lm`; `paths` are `linear_paths(lm)`, where they are known already."""
        super().__init__()
        self._paths = paths
        self._lm, self._see, self._only = lm, see, block
        self._block, self._depth = -1, 0
        self._origin: dict[
            int, tuple[Tensor, frozenset[str]]
        ] = {}  # by id; the tensor is held so that the id stays its
        self._lowest = torch.finfo(lm.dtype).min / 2
        self._thread = threading.get_ident()
        self._undo = contextlib.ExitStack()
        self.operators: dict[int, list[Operator]] = {}
        """Of each block, as the latest pass went through them."""

    def __enter__(self) -> "Flow":
        named = linear_paths(self._lm) if self._paths is None else self._paths
        for index, block in enumerate(self._lm.blocks):
            if self._only in (None, index):
                self._watch_block(index, block, named[index])
        super().__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        self._undo.close()
        self._origin.clear()

    # --- modules ---

    def _watch_block(self, index: int, block: nn.Module, named: Mapping[str, bool]) -> None:
        watched = [
            block.register_forward_pre_hook(lambda _, args, kwargs: self._begin(index, args, kwargs), with_kwargs=True),
            block.register_forward_hook(lambda *_: self._end(index), always_call=True),
        ]
        for path, module in block.named_modules():
            inside = any(path.startswith(f"{one}.") for one in named)
            if not path or inside or (path not in named and list(module.children())):
                continue
            after = self._after_experts if named.get(path) else self._after
            kind = "linear" if path in named else "norm" if list(module.parameters(recurse=False)) else "activation"
            watched += [
                module.register_forward_pre_hook(lambda *_: self._deeper(), prepend=True),
                module.register_forward_hook(
                    lambda _, args, kwargs, result, path=path, kind=kind, after=after: after(
                        path, kind, (*args, *kwargs.values()), result
                    ),
                    with_kwargs=True,
                ),
            ]
        for handle in watched:
            self._undo.callback(handle.remove)

    def _begin(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if threading.get_ident() != self._thread:
            return  # another thread uses the same model
        self._block, self._depth = index, 0
        self._origin.clear()
        self.operators[index] = []
        for tensor in _tensors(args[:1] or kwargs["hidden_states"]):
            self.keep(tensor, frozenset([INPUT]))
        for name, mark in _MARKS.items():
            for tensor in _tensors(kwargs.get(name)):
                self.keep(tensor, frozenset([mark]))

    def _end(self, index: int) -> None:
        if threading.get_ident() == self._thread and self._block == index:
            self._block = -1
            self._origin.clear()

    def _deeper(self) -> None:
        if self._here():
            self._depth += 1

    def _after(self, path: str, kind: Kind, operands: tuple[Any, ...], result: Any) -> Any:
        if not self._here():
            return None
        try:
            if kind == "activation" and not _changes(operands, result):
                self._pass_on(operands, result)
                return None
            return self.found(path, kind, operands, result)[0]
        finally:
            self._depth -= 1

    def _after_experts(self, path: str, kind: Kind, operands: tuple[Any, ...], result: Tensor) -> Any:
        """Both products of fused experts and the activation between them."""
        if not self._here():
            return None
        try:
            up, act, down = f"{path}.gate_up_proj", f"{path}.act_fn", f"{path}.down_proj"
            chosen = self.origin(operands[1:])
            result, _ = self.found(up, "linear", operands, result, self.origin(operands[:1]))
            result, _ = self.found(act, "activation", operands, result, frozenset([up]))
            return self.found(down, "linear", operands, result, frozenset([act]) | chosen)[0]
        finally:
            self._depth -= 1

    def _here(self) -> bool:
        return self._block >= 0 and threading.get_ident() == self._thread

    # --- functions ---

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called for every torch function of the pass."""
        kwargs = kwargs or {}
        if self._block < 0 or self._depth or threading.get_ident() != self._thread:
            return func(*args, **kwargs)
        if func is scaled_dot_product_attention:
            return self._attention(func, args, kwargs)
        name = getattr(func, "__name__", "")
        operands = (*args, *kwargs.values())
        before = self.origin(operands)
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor | tuple | list):
            return result
        if name in _PRODUCTS and (pair := self._pair(args, kwargs)):
            return self._product(pair, kwargs.get("alpha", 1.0), before, result)
        if name == "softmax" and any(one.startswith("qk") for one in before):
            return self.found("softmax", "softmax", operands[:1], result, before)[0]
        kind: Kind | None = "add" if name in _ADDS else "multiply" if name in _MULTIPLIES else None
        if kind and self._two_made(operands[:2]):
            return self.found(kind, kind, operands[:2], result, before)[0]
        if name == "__setitem__" or (name.endswith("_") and name[-2:] != "__"):
            self._written(args[0], before)
        self._pass_on(operands, result, before)
        return result

    def _attention(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Three operators, or four, that one function computes; its own result stands where `see` changed nothing."""
        given, turned = Attended.of(*args, **kwargs), False
        if POSITIONS in self.origin((given.query, given.key)):
            query, key, turned = self._rotated(given.query, given.key)
            given = dataclasses.replace(given, query=query, key=key)
        made, changed = attend(given, self._lowest, self)
        result = made if turned or changed else func(*args, **kwargs)
        self.keep(result, self.origin((made,)))
        return result

    def _rotated(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Q and K as they meet, and whether `see` changed them."""
        before = self.origin((query, key))
        (query, key), changed = self.found("rotary", "rotary", (query, key), (query, key), before)
        return query, key, changed

    def _pair(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
        """The two factors of a matrix product of tensors that the block made."""
        factors = [*args, *(kwargs[key] for key in ("batch1", "batch2", "mat2", "other") if key in kwargs)][-2:]
        return (factors[0], factors[1]) if len(factors) == 2 and all(map(self._made, factors)) else None

    def _product(self, pair: tuple[Tensor, Tensor], alpha: float, before: frozenset[str], result: Any) -> Tensor:
        """QKᵀ or PV as the model multiplies it out itself, whatever is added to it besides."""
        left, right = pair
        operands: tuple[Any, ...] = pair
        name = "pv" if any(one.startswith("softmax") for one in self.origin((left,))) else "qk"
        if name == "qk":
            key = right.transpose(-1, -2)
            self.keep(key, self.origin((right,)))
            turned = False
            if POSITIONS in before:
                old = alpha * (left @ right)
                left, key, turned = self._rotated(left, key)
            operands, right = (left, key, alpha), key.transpose(-1, -2)
        plain = alpha * (left @ right)
        if name == "qk" and turned:
            result = result + (plain - old)
        made = self.origin(operands) | before & {BIAS}
        new, changed = self.found(name, "product", operands, plain, made)
        if changed:
            result = result + (new - plain)
        self.keep(result, self.origin((new,)))
        return result

    # --- where tensors come from ---

    def found(
        self, name: str, kind: Kind, operands: tuple[Any, ...], result: Any, origin: frozenset[str] | None = None
    ) -> tuple[Any, bool]:
        """Note an operator, ask what its result shall be, and note that it made it. (result, whether another one)."""
        noted = self.operators[self._block]
        origin = self.origin(operands) if origin is None else origin
        known = [one.name for one in noted]
        count = sum(one.partition("#")[0] == name for one in known)
        order = [INPUT, *known]
        sources = tuple(sorted((one for one in origin if one[0] != "@"), key=order.index))
        biased = kind == "softmax" and BIAS in origin
        operator = Operator(name if not count else f"{name}#{count + 1}", kind, sources, biased)
        noted.append(operator)
        here, self._block = self._block, -1  # what `see` computes is no part of the model
        try:
            new = self._see(here, operator, operands, result)
        finally:
            self._block = here
        made = frozenset([operator.name]) | (origin & {BIAS} if kind == "product" else frozenset())
        for tensor in _tensors(result if new is None else new):
            self.keep(tensor, made)
        return (result, False) if new is None else (new, True)

    def origin(self, values: Any) -> frozenset[str]:
        """The names of all operators that made these tensors, and the marks they carry."""
        found = (self._origin.get(id(tensor)) for tensor in _tensors(values))
        return frozenset().union(*(one[1] for one in found if one is not None))

    def keep(self, tensor: Tensor, origin: frozenset[str]) -> None:
        """Note that a tensor was made by these operators."""
        self._origin[id(tensor)] = (tensor, origin)

    def _pass_on(self, operands: Any, result: Any, origin: frozenset[str] | None = None) -> None:
        origin = self.origin(operands) if origin is None else origin
        if origin:
            for tensor in _tensors(result):
                self.keep(tensor, origin)

    def _written(self, target: Tensor, origin: frozenset[str]) -> None:
        """Something was put into a tensor: whatever shares its memory holds it too."""
        base = target if target._base is None else target._base
        place = base.untyped_storage().data_ptr()
        known = [one for one, _ in self._origin.values() if one.untyped_storage().data_ptr() == place]
        for tensor in (base, *known):
            self.keep(tensor, self.origin((tensor,)) | origin)

    def _made(self, value: Any) -> bool:
        return isinstance(value, Tensor) and any(one[0] != "@" for one in self.origin((value,)))

    def _two_made(self, operands: tuple[Any, ...]) -> bool:
        """Whether two operators, or an operator and the residual stream, meet here."""
        if len(operands) != 2 or not all(map(self._made, operands)):
            return False
        left, right = (frozenset(name for name in self.origin((one,)) if name[0] != "@") for one in operands)
        return left != right


def operators_of(lm: LM) -> tuple[tuple[Operator, ...], ...]:
    """The operators of every block, from one forward pass over a few tokens. `lm` is left as it was."""
    tokens = torch.arange(4, 12, device=lm.device) % lm.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    with torch.no_grad(), Flow(lm, lambda *_: None) as flow:
        body(lm)(tokens[None], use_cache=False)
    return tuple(tuple(flow.operators[index]) for index in range(len(lm.blocks)))


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def _changes(operands: tuple[Any, ...], result: Any) -> bool:
    """Whether a module without parameters computes something: dropout, for one, does not here."""
    given = next(_tensors(operands), None)
    if given is None or not isinstance(result, Tensor) or given.shape != result.shape:
        return False
    return given is not result and not torch.equal(given, result)
