"""The modules of a model that executes in integers: Y = diag(Δ_x) X̄ W̄ᵀ diag(Δ_w) + b (thesis equation 3.2).

    W8A8Linear      a linear: quantises its input, multiplies codes, brings the sums back
    W8A8Norm        a norm that also leaves the codes of its output, made in the same pass over the data
    GatedMLP        down(SiLU(gate(x)) · up(x)), gate and up in one product, codes and not floats in between
    W8A8Embedding   an embedding that reads the rows of a tied INT8 head

Linears that read the same tensor are one product: the first one asked computes it for all. Codes and products travel
with the tensor they were made from (`Carried`), so nothing is quantised twice and nothing outlives its input.

The arithmetic is the backend's (kernels/sqviz_kernels); the rest of the model stays in its own dtype. Fused experts
are in w8a8_experts.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int, Int8
from sqviz_kernels.backend import Backend, Codes, Packed, opaque
from sqviz_kernels.spec import Norm, Share
from torch import Tensor, nn

from sqviz.errors import SqvizError
from sqviz.quant.plain import Integer


class Carried:
    """What was computed from a tensor and travels with it: its codes, and products made of them.

    Attributes:
        site: which quantiser made the codes.
        codes: the codes of the tensor's rows.
        products: by product, its result [row out].
        version: of the tensor when the codes were made; a tensor written to since has other codes.
    """

    __slots__ = ("codes", "products", "site", "version")

    def __init__(self, site: "Site", codes: Codes, version: int | None) -> None:
        self.site, self.codes, self.version = site, codes, version
        self.products: dict[int, Tensor] = {}


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


class Fixed(nn.Module):
    """Base of modules whose tensors keep their dtype and place: steps and packed codes are what they are."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Fixed":
        for name, buffer in self._buffers.items():
            if buffer is not None and fn(buffer[:0]).device != buffer.device:
                raise SqvizError(
                    f"{type(self).__name__}.{name} was packed for {buffer.device}. Move the model before quantising "
                    "it: sqviz.quantize(lm_on_that_device, scheme, …)."
                )
        return self


def at_hand(module: nn.Module, **parts: Any) -> None:
    """Let a module find its parts as any object does: nn.Module's own search takes longer than a small product."""
    for name, part in parts.items():
        module.__dict__[name] = part


class Site(Fixed):
    """How the input of one group of linears is quantised.

    Attributes:
        backend: who does it.
        share: what shares a dynamic step: "token" or "tensor".
        step: the static step [1], or None.
        divisor: s [channel] by which the input is divided first (online smoothing), or None.
        names: the linears, for error messages.
    """

    step: Tensor | None
    divisor: Tensor | None

    def __init__(
        self,
        backend: Backend,
        share: Share,
        step: Float[Tensor, "1"] | None = None,
        divisor: Float[Tensor, " channel"] | None = None,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.backend, self.share, self.names = backend, share, tuple(names)
        self.register_buffer("step", step)
        self.register_buffer("divisor", divisor)
        at_hand(self, step=step, divisor=divisor)

    def carried(self, x: Float[Tensor, "*rows channel"]) -> Carried:
        """The codes that travel with X, made now if there are none. Raises `NonFinite`."""
        found = getattr(x, "_sqviz_codes", None)
        if found is not None and found.site is self and found.version == _version(x):
            return found
        codes = self.backend.quantise(x.reshape(-1, x.shape[-1]), self.step, self.share, self.divisor)
        return self.attach(x, codes)

    def attach(self, x: Float[Tensor, "*rows channel"], codes: Codes) -> Carried:
        """Let codes travel with X."""
        carried = Carried(self, codes, _version(x))
        x._sqviz_codes = carried  # type: ignore[attr-defined]
        return carried

    def extra_repr(self) -> str:
        """For printing a model."""
        how = "static" if self.step is not None else f"dynamic per {self.share}"
        return f"{how}, on {self.backend.name}" + (", input divided by s" if self.divisor is not None else "")


class Product(Fixed):
    """The packed weights of the linears that read one tensor, stacked.

    Attributes:
        backend: whose layout it is.
        values, step, bias: see `Packed`.
        out, channels, gated: see `Packed`.
    """

    values: Tensor
    step: Tensor
    bias: Tensor | None

    def __init__(self, backend: Backend, packed: Packed) -> None:
        super().__init__()
        self.backend = backend
        self.out, self.channels, self.gated, self.extras = packed.out, packed.channels, packed.gated, len(packed.extra)
        self.register_buffer("values", packed.values)
        self.register_buffer("step", packed.step)
        self.register_buffer("bias", packed.bias)
        for index, extra in enumerate(packed.extra):
            self.register_buffer(f"extra_{index}", extra)
        self._packed: Packed | None = None

    @property
    def stands_for(self) -> int:
        """Weights of the original linears."""
        return self.out * self.channels

    @property
    def packed(self) -> Packed:
        """The weight as the backend wants it."""
        if self._packed is None:
            extra = tuple(getattr(self, f"extra_{index}") for index in range(self.extras))
            self._packed = Packed(self.values, self.step, self.bias, self.out, self.channels, extra, self.gated)
        return self._packed

    def codes(self) -> Int8[Tensor, "out channel"]:
        """W̄ of all linears, stacked."""
        return self.backend.unpack(self.packed)

    def of(self, carried: Carried, dtype: torch.dtype) -> Float[Tensor, "row out"]:
        """All outputs, computed once per input."""
        found = carried.products.get(id(self))
        if found is None or found.dtype != dtype:
            found = carried.products[id(self)] = self.backend.linear(carried.codes, self.packed, dtype)
        return found


class W8A8Linear(Integer, nn.Module):
    """One linear in integers: rows `start` … `stop` − 1 of a product.

    Attributes:
        in_features, out_features: as in `nn.Linear`.
        site: how its input is quantised, shared with the linears that read the same tensor.
        product: its weight, stacked with theirs.
    """

    def __init__(self, site: Site, product: Product, start: int, stop: int) -> None:
        super().__init__()
        self.in_features, self.out_features = product.channels, stop - start
        self.site, self.product, self.start, self.stop = site, product, start, stop
        self._whole = stop - start == product.out
        at_hand(self, site=site, product=product)

    @property
    def weight(self) -> Float[Tensor, "out channel"]:
        """Ŵ = Δ_w · W̄ in float32, made anew at every look."""
        step = self.product.step.expand(self.product.out)
        rows = slice(self.start, self.stop)
        return self.product.codes()[rows].float() * step[rows, None]

    @property
    def bias(self) -> Float[Tensor, " out"] | None:
        """b."""
        return None if self.product.bias is None else self.product.bias[self.start : self.stop]

    @opaque
    def forward(self, x: Float[Tensor, "*rows channel"]) -> Float[Tensor, "*rows out"]:
        """[… channel] → [… out], in the dtype of X. Raises `NonFinite`."""
        carried = self.site.carried(x)
        if self._whole:  # nobody to share it with: the caller may write to it
            y = self.product.backend.linear(carried.codes, self.product.packed, x.dtype)
        else:
            y = self.product.of(carried, x.dtype)[:, self.start : self.stop]
        return y.view(*x.shape[:-1], self.out_features) if x.ndim != 2 else y

    def extra_repr(self) -> str:
        """For printing a model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class W8A8Norm(nn.Module):
    """RMSNorm or LayerNorm of X, with the codes of the result for the linears that read it.

    Attributes:
        weight, bias: of the norm it stands for, the very same parameters.
        plus_one: the gain is 1 + weight.
    """

    bias: Tensor | None

    def __init__(self, original: nn.Module, kind: Norm, eps: float, plus_one: bool, site: Site) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, original.weight)
        self.register_parameter("bias", cast(nn.Parameter | None, getattr(original, "bias", None)))
        self.kind, self.eps, self.plus_one = kind, eps, plus_one
        self.site = site
        self._gain: tuple[Any, Tensor, Tensor | None] | None = None
        at_hand(self, site=site)

    @opaque
    def forward(self, x: Float[Tensor, "*rows channel"]) -> Float[Tensor, "*rows channel"]:
        """The normalised X, in its dtype, its codes travelling with it. Raises `NonFinite`."""
        gain, bias = self._vectors()
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        codes = self.site.backend.norm_quantise(
            x.reshape(-1, x.shape[-1]),
            gain,
            bias,
            self.eps,
            self.kind,
            self.site.step,
            self.site.share,
            out=y.view(-1, x.shape[-1]),
        )
        self.site.attach(y, codes)
        return y

    def _vectors(self) -> tuple[Float[Tensor, " channel"], Float[Tensor, " channel"] | None]:
        """Gain and bias in float32, kept as long as the parameter is the same."""
        if self._gain is None or self._gain[0] is not self.weight:
            gain = self.weight.detach().float() + float(self.plus_one)
            self._gain = (self.weight, gain, None if self.bias is None else self.bias.detach().float())
        return self._gain[1], self._gain[2]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "W8A8Norm":
        self._gain = None
        return cast(W8A8Norm, super()._apply(fn, recurse))

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._gain = None
        super()._load_from_state_dict(*arguments)

    def extra_repr(self) -> str:
        """For printing a model."""
        return f"{self.kind}, {len(self.weight)}, eps={self.eps}"


class GatedMLP(nn.Module):
    """Mixed into the class of a gated MLP: down(SiLU(gate(x)) · up(x)), with nothing but codes between the products.

    The children stay where they are; one that is hooked is called, so what is seen there is what is computed.

    Attributes:
        front: the linear, or one of the two, whose product holds gates and ups.
        back: the linear that reads the gated product.
    """

    front: W8A8Linear
    back: W8A8Linear

    @opaque
    def forward(self, x: Float[Tensor, "*rows channel"]) -> Float[Tensor, "*rows channel"]:
        """[… channel] → [… channel]. Raises `NonFinite`."""
        for child in self._modules.values():
            if child is not None and (child._forward_hooks or child._forward_pre_hooks):
                return super().forward(x)
        inner = self.back.site
        carried = self.front.site.carried(x)
        codes = inner.backend.gated(carried.codes, self.front.product.packed, inner.step, inner.share)
        return inner.backend.linear(codes, self.back.product.packed, x.dtype).view(
            *x.shape[:-1], self.back.out_features
        )


@functools.cache
def gated(original: type[nn.Module]) -> type[nn.Module]:
    """The class of a gated MLP, fused."""
    return type(f"W8A8{original.__name__}", (GatedMLP, original), {"__module__": __name__})


class W8A8Embedding(nn.Module):
    """An embedding whose rows are those of an INT8 head: Δ_w · W̄, in the dtype of the model, converted with it."""

    head: W8A8Linear

    def __init__(self, head: W8A8Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.__dict__["head"] = head  # not as a child: it is one of the model's already
        self.dtype = dtype
        self.num_embeddings, self.embedding_dim = head.out_features, head.in_features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "W8A8Embedding":
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    @property
    def weight(self) -> Float[Tensor, "token channel"]:
        """All rows, made anew at every look."""
        return self.head.weight.to(self.dtype)

    @opaque
    def forward(self, ids: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows channel"]:
        """The rows of these tokens."""
        product = self.head.product
        codes = product.backend.rows(product.packed, ids.flatten())
        step = product.step.expand(product.out)[ids.flatten()]
        return (codes.float() * step[:, None]).to(self.dtype).unflatten(0, ids.shape)


def merged(
    backend: Backend,
    site: Site,
    parts: Sequence[tuple[Int8[Tensor, "out channel"], Float[Tensor, " out_or_1"], Tensor | None]],
    gated: bool = False,
) -> list[W8A8Linear]:
    """Linears that read one tensor as one product: (codes, step, bias) of each."""
    sizes = [len(codes) for codes, _, _ in parts]
    bias = None
    if any(b is not None for _, _, b in parts):
        bias = torch.cat(
            [torch.zeros(n) if b is None else b.detach().float() for n, (_, _, b) in zip(sizes, parts, strict=True)]
        )
    one = len(parts) == 1 and parts[0][1].numel() == 1
    step = (
        parts[0][1].reshape(1)
        if one
        else torch.cat([s.flatten().expand(n) for n, (_, s, _) in zip(sizes, parts, strict=True)])
    )
    product = Product(backend, backend.pack(torch.cat([codes for codes, _, _ in parts]), step, bias, gated))
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [W8A8Linear(site, product, end - size, end) for size, end in zip(sizes, ends, strict=True)]
