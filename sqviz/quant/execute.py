"""Making a model that executes in integers: its linears become products of codes (w8a8.py), fused where that is exact.

What can be fused is found by trying, not by class: a norm is taken over if it computes RMSNorm or LayerNorm, an MLP if
it computes down(SiLU(gate(x)) · up(x)), both on numbers of their own.
"""

from collections.abc import Hashable, Iterable
from typing import Any, NoReturn, cast

import torch
from jaxtyping import Float
from sqviz_kernels import spec
from sqviz_kernels.backend import Backend
from sqviz_kernels.spec import Norm as NormKind
from torch import Tensor, nn
from torch.nn import functional as F

from sqviz.errors import SqvizError
from sqviz.models.arch import Norm
from sqviz.models.linears import Group, experts, weight
from sqviz.models.lm import LM, unshare
from sqviz.quant import step_attention
from sqviz.quant.calibration import Calibration
from sqviz.quant.granularity import PerChannel, PerTensor, PerToken
from sqviz.quant.plain import check_experts, is_plain
from sqviz.quant.quantize import Quantized, quantize_tensor
from sqviz.quant.scaled_linear import ScaledLinear
from sqviz.quant.schemes import Scheme
from sqviz.quant.w8a8 import (
    Product,
    Site,
    W8A8Embedding,
    W8A8Linear,
    W8A8Norm,
    gated,
    merged,
)
from sqviz.quant.w8a8_experts import Stack, W8A8Experts

TRIED = 1e-3
"""Largest relative difference between a module and what it is taken for; half precision is tried in float32."""


def check_executable(scheme: Scheme) -> None:
    """Raise `SqvizError` if integers alone cannot compute this scheme, naming what stands in the way."""
    troubles = []
    if not isinstance(scheme.activation, PerTensor | PerToken):
        troubles.append(f"activation={scheme.activation!r}: PerTensor() or PerToken() is needed")
    if not isinstance(scheme.weight, PerTensor | PerChannel):
        troubles.append(f"weight={scheme.weight!r}: PerTensor() or PerChannel() is needed")
    if not scheme.symmetric:
        troubles.append("symmetric=False: products of codes with zero points are not executed")
    if scheme.outliers is not None:
        troubles.append(f"outliers={scheme.outliers}: channels kept in floating point are not executed")
    if scheme.clip is not None and not scheme.static:
        troubles.append(f"clip={scheme.clip!r} with static=False: kernels take a dynamic step up to the largest value")
    if scheme.bits != 8:
        troubles.append(f"bits={scheme.bits}: activations are executed in 8 bits")
    if troubles:
        raise SqvizError(
            f"{scheme!r} cannot be executed in integers: {'; '.join(troubles)} (a step can stand outside of an integer "
            "sum only if it is the same for all channels). Use backend='simulate'."
        )


class Executor:
    """Replaces the linears of a shared copy of one model."""

    def __init__(self, lm: LM, model: nn.Module, calibration: Calibration, backend: Backend) -> None:
        """Take note.

        Args:
            lm: the model, as it was.
            model: a shared copy of it, to be changed.
            calibration: static steps and clips, for a scheme that `check_executable` lets pass.
            backend: who computes.
        """
        self.lm, self.model, self.calibration, self.backend = lm, model, calibration, backend
        self.scheme = calibration.scheme
        self.share: spec.Share = "token" if isinstance(self.scheme.activation, PerToken) else "tensor"

    def group(self, group: Group, names: Iterable[str]) -> None:
        """Replace these linears of a group, all of them ordinary ones."""
        for divisor, together in self._by_divisor(names):
            step = self._steps(together[0])[0]
            site = Site(self.backend, self.share, step, divisor, together)
            for some, pair in self._products(together):
                linears = merged(self.backend, site, [self._codes(name) for name in some], gated=pair)
                for name, linear in zip(some, linears, strict=True):
                    self.model.set_submodule(name, linear)
            if divisor is None and isinstance(group.fold, Norm):
                self._norm(group.fold, site)

    def experts(self, path: str, skipped: set[str]) -> None:
        """Replace fused experts."""
        module: Any = self.lm.model.get_submodule(path)
        if isinstance(module, W8A8Experts):
            raise SqvizError(f"{path} is quantised already. Quantise the model it was made from instead.")
        check_experts(module, path)
        up, down = f"{path}.gate_up_proj", f"{path}.down_proj"
        x = torch.linspace(-3, 3, 2 * module.down_proj.shape[-1], device=module.down_proj.device)[None]
        with torch.no_grad():
            gate, raised = x.chunk(2, -1)
            silu = _close(type(module)._apply_gate(module, x), F.silu(gate) * raised)
        front = module.gate_up_proj if up in skipped else self._stack(up, silu and down not in skipped)
        back = module.down_proj if down in skipped else self._stack(down, gated=False)
        self.model.set_submodule(path, W8A8Experts(module, front, back, silu))

    def _stack(self, name: str, gated: bool) -> Stack:
        """One product per expert."""
        matrices = weight(self.lm, name).detach().unflatten(0, (experts(self.lm, name), -1))
        products = []
        for index, matrix in enumerate(matrices):
            found = self._quantized(name, matrix, index)
            packed = self.backend.pack(found.values, found.step.flatten(), None, gated)
            products.append(Product(self.backend, packed))
        return Stack([Site(self.backend, self.share, step, None, (name,)) for step in self._steps(name)], products)

    def head(self) -> None:
        """Replace the head, and the embedding too where they are tied; the head's input is quantised per token."""
        head = cast(nn.Module, self.lm.model.get_output_embeddings())  # type: ignore[operator]
        embedding = cast(nn.Module, self.lm.model.get_input_embeddings())  # type: ignore[operator]
        if type(head) is not nn.Linear:
            raise SqvizError(f"head=True: the head is a {type(head).__name__}, not a plain linear; use head=False.")
        found = quantize_tensor(head.weight.detach(), PerChannel(), of="weight", name="the head's weight")
        site = Site(self.backend, "token", names=("lm_head",))
        linear = merged(self.backend, site, [(found.values, found.step, head.bias)])[0]
        self.model.set_output_embeddings(linear)  # type: ignore[operator]
        if embedding.weight is head.weight:
            if type(embedding) is not nn.Embedding:
                raise SqvizError(f"head=True: the tied embedding is a {type(embedding).__name__}; use head=False.")
            self.model.set_input_embeddings(W8A8Embedding(linear, self.lm.dtype))  # type: ignore[operator]

    def mlp(self, path: str) -> None:
        """Fuse a gated MLP whose linears are replaced by now."""
        module = self.model.get_submodule(path)
        children = dict(module.named_children())
        front = children.get("gate_up_proj", children.get("gate_proj"))
        back = children.get("down_proj")
        if not isinstance(front, W8A8Linear) or not isinstance(back, W8A8Linear):
            return
        if front.product.gated and back.site.divisor is None:
            module.__class__ = gated(cast(Hashable, type(module)))
            # not as children: they are there already, under their own names
            module.__dict__.update(front=front, back=back)

    def _codes(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """W̄, its steps and the bias of a linear."""
        module = self.lm.model.get_submodule(name)
        bias: Any = getattr(module, "bias", None)
        matrix = weight(self.lm, name).detach()
        if isinstance(module, W8A8Linear):
            raise SqvizError(f"{name} is quantised already. Quantise the model it was made from instead.")
        if not is_plain(module, matrix, bias):
            raise SqvizError(
                f"{name} is a {type(module).__name__}, which sqviz cannot execute in integers. Leave it in floating "
                f"point: skip={[name]!r}."
            )
        found = self._quantized(name, matrix)
        return found.values, found.step, bias

    def _quantized(self, name: str, matrix: Float[Tensor, "out channel"], expert: int | None = None) -> Quantized:
        assert self.scheme.weight is not None
        return quantize_tensor(
            matrix,
            self.scheme.weight,
            self.scheme.bits_of_weights,
            clip=self.calibration.weight_clip(name, matrix, expert),
            of="weight",
            name=f"the weight of {name}",
        )

    def _steps(self, name: str) -> list[Float[Tensor, "1"] | None]:
        """The static step of the input of a linear, or one per fused expert; [None] if dynamic."""
        return [None if grid is None else grid[0].reshape(1) for grid in self.calibration.grids(name)]

    def _by_divisor(self, names: Iterable[str]) -> list[tuple[Tensor | None, list[str]]]:
        """The names, those together that divide their input by the same s or by none."""
        found: list[tuple[Tensor | None, list[str]]] = []
        for name in names:
            module = self.lm.model.get_submodule(name)
            s = module.input_scale if isinstance(module, ScaledLinear) else None
            for other, together in found:
                if other is s or (other is not None and s is not None and torch.equal(other, s)):
                    together.append(name)
                    break
            else:
                found.append((s, [name]))
        return found

    def _products(self, names: list[str]) -> list[tuple[list[str], bool]]:
        """Which of these make one product each, and whether it is one of gates and ups."""
        pair: list[str] = []
        rest: list[str] = []
        for name in names:
            parent, _, leaf = name.rpartition(".")
            fused = leaf in ("gate_proj", "up_proj", "gate_up_proj") and self._is_gated(parent, names)
            (pair if fused else rest).append(name)
        return [(some, fused) for some, fused in ((rest, False), (pair, True)) if some]

    def _is_gated(self, path: str, names: list[str]) -> bool:
        """Whether the module computes down(SiLU(gate(x)) · up(x)), and all of its front is among the names."""
        module = self.lm.model.get_submodule(path)
        front = [child for child in ("gate_proj", "up_proj", "gate_up_proj") if hasattr(module, child)]
        if front not in (["gate_proj", "up_proj"], ["gate_up_proj"]) or not hasattr(module, "down_proj"):
            return False
        if any(f"{path}.{child}" not in names for child in front):
            return False
        first, down = getattr(module, front[0]), module.down_proj
        if not isinstance(first, nn.Linear) or not isinstance(down, nn.Linear):
            return False
        x = torch.linspace(-1, 1, first.in_features, dtype=first.weight.dtype, device=first.weight.device)[None]
        with torch.no_grad():
            made = torch.cat([getattr(module, child)(x) for child in front], -1)
            gate, up = made.chunk(2, -1)
            return _close(module(x), down(F.silu(gate) * up))

    def _norm(self, fold: Norm, site: Site) -> None:
        """Let the norm leave the codes of its output, if it is one that the kernels compute."""
        norm = self.model.get_submodule(fold.path)
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if isinstance(norm, W8A8Norm) or not isinstance(eps, float):
            return
        gain = cast(Tensor, norm.weight).detach().float() + float(fold.plus_one)
        bias = getattr(norm, "bias", None)
        x = torch.linspace(-2, 3, len(gain), device=gain.device)[None].to(cast(Tensor, norm.weight).dtype)
        kinds: tuple[NormKind, ...] = ("rms", "layer")
        for kind in kinds:
            with torch.no_grad():
                if _close(norm(x), spec.norm(x, gain, bias, eps, kind)):
                    self.model.set_submodule(fold.path, W8A8Norm(norm, kind, eps, fold.plus_one, site))
                    return


def finish(model: nn.Module) -> None:
    """What an executed model gets last: a fast floating-point head and cached step, parameters that may be
    converted without touching the model it was made from, and no way to save what cannot be loaded.
    """
    ease_head(model)
    step_attention.use(model)
    unshare(model)
    for module in model.modules():
        if hasattr(module, "save_pretrained"):  # the model, and the base model inside of it
            module.__dict__.update(save_pretrained=_refuse_to_save, push_to_hub=_refuse_to_save)


def _refuse_to_save(*_: Any, **__: Any) -> NoReturn:
    raise SqvizError(
        "save_pretrained and push_to_hub would write packed INT8 codes that transformers cannot load. "
        "sqviz.save_int8(lm, folder) writes this model, and sqviz.load_int8(folder) reads it; for floats, save the one "
        "it was quantised from."
    )


def ease_head(model: nn.Module) -> None:
    """Let a floating-point head read rows that lie side by side.

    oneDNN's bfloat16 product takes 50 ms a row, in place of 4 ms for all, where a row's stride is not its length, as in
    the last tokens that `logits_to_keep=1` cuts out of a prompt (torch 2.13, 576 × 49152).
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(head, nn.Linear):
        head.register_forward_pre_hook(_side_by_side)


def _side_by_side(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (arguments[0].clone(memory_format=torch.contiguous_format), *arguments[1:])


def _close(got: Any, expected: Tensor) -> bool:
    """Whether it is a tensor that differs by rounding only."""
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        return False
    tolerance = TRIED if got.dtype in (torch.float32, torch.float64) else 20 * TRIED
    return bool((got.float() - expected.float()).norm() <= tolerance * expected.float().norm())
