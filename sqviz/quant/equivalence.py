"""`check_equivalence`: two models must give the same logits. Smoothing moves numbers between tensors, no more.

The measure is max|Δ logits| / max|logits| on a short fixed sequence of tokens. A wrong fold shows as 0.1 to 1 (dividing
a norm whose output the residual reads: 0.65; Gemma's gain taken for w: 0.2), rounding as the dtype's epsilon times what
the depth makes of it. Two departures:

    float64   transformers computes norms, softmax and routers in float32 even there. During the check those casts are
              lifted, so that it is exact to 1e-10 whatever the architecture.
    float16, bfloat16   every rescaled weight is rounded anew, and a mixture's router may send a token elsewhere. The
              maximum is taken per token, and the median token counts: a wrong fold disturbs all of them.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sqviz.errors import NotEquivalent
from sqviz.models.lm import LM, share

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest relative error by dtype of the model. Half precision rounds every rescaled weight: only blunders show
there."""

_HALF = (torch.float16, torch.bfloat16)
_TOKENS = 24


class _NoFloat32(TorchFunctionMode):
    """Within it, casts of float64 tensors to float32 do nothing, and a softmax of them in float32 is one in float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.float and not args[0].is_floating_point():
            return args[0].double()  # positions, which rotary embeddings multiply with float64 frequencies
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def probe(lm: LM) -> Int[Tensor, "batch token"]:
    """The fixed sequence that models are compared on: ids spread over the vocabulary."""
    vocabulary = lm.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = (torch.arange(_TOKENS) * 7919 + 17) % vocabulary
    return ids[None].to(lm.device)


@torch.inference_mode()
def logits(model: nn.Module, ids: Int[Tensor, "batch token"]) -> Float[Tensor, "batch token vocabulary"]:
    """The model's logits; all of it in float64 if its parameters are float64."""
    if next(model.parameters()).dtype != torch.float64:
        return model(ids, use_cache=False).logits
    twin = share(model)
    twin.config._experts_implementation = "eager"  # type: ignore[union-attr] # the grouped product has no float64
    with _NoFloat32():
        return twin(ids, use_cache=False).logits


def _relative_error(
    expected: Float[Tensor, "batch token vocabulary"], got: Float[Tensor, "batch token vocabulary"], median: bool
) -> float:
    by_token = (got - expected).abs().amax(-1).flatten()
    error = by_token.median() if median and bool(by_token.isfinite().all()) else by_token.max()
    return float(error / expected.abs().max())


def check_equivalence(before: LM, after: LM, tolerance: float | None = None) -> float:
    """Compare the logits of two models on a short fixed sequence of tokens.

    Args:
        before: the reference.
        after: what must be the same function.
        tolerance: largest relative error; by default that of the dtype in `TOLERANCE`.

    Returns:
        The relative error, max|Δ logits| / max|logits|; in half precision that of the median token.

    Raises:
        NotEquivalent: the error is above the tolerance, or not finite.
    """
    ids = probe(before)
    limit = TOLERANCE[before.dtype] if tolerance is None else tolerance
    expected, got = logits(before.model, ids), logits(after.model, ids)
    error = _relative_error(expected.double(), got.double(), median=before.dtype in _HALF)
    if not error <= limit:
        dtype = str(before.dtype).removeprefix("torch.")
        raise NotEquivalent(
            f"the logits changed by {error:.2g} of their maximum, more than the {limit:.2g} that rounding in {dtype} "
            f"explains ({before.name}). If the architecture's row in ARCHS is right, load the model in float32, or "
            "pass check=False to accept it"
        )
    return error
