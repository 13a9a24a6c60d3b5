"""A small capture made of random numbers, with outlier channels planted, for the tests of the views."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
WORDS = (" the", " people", " of", "\n", " “union”", " and", ".", " <b>", "Ġ", " state")


@dataclasses.dataclass
class Synthetic:
    """The fields of `Magnitudes` that the views read."""

    inputs: dict[str, Any]
    weights: dict[str, Any]
    groups: tuple[Any, ...]
    tokens: np.ndarray
    length: int
    token_texts: tuple[str, ...]
    model: str = "synthetic"
    scales: dict[str, Any] = dataclasses.field(default_factory=dict)

    def fold_weight_absmax(self, name: str) -> np.ndarray:
        group = next(g for g in self.groups if name in g.consumers)
        return np.max([self.weights[consumer].channel_absmax for consumer in group.consumers], axis=0)


def magnitudes(
    blocks: int = 3, channels: int = 96, length: int = 64, bins: int = 32, outs: int = 80, outlier: float = 300.0
) -> Synthetic:
    """`blocks` × 4 groups; channel 7 peaks at `outlier` · (1 + block) on token 1, channel 41 at half of it."""
    random = np.random.default_rng(0)
    inputs, weights, groups = {}, {}, []
    texts = tuple(WORDS[i % len(WORDS)] for i in range(length))
    for block in range(blocks):
        for kind in KINDS:
            name = f"model.layers.{block}.{kind}"
            width = channels * 2 if kind == "mlp.down_proj" else channels
            inputs[name] = _input(random, width, length, bins, outlier * (1 + block), texts)
            consumers = [name.replace("q_proj", f"{k}_proj") for k in "qkv"] if kind.endswith("q_proj") else [name]
            for consumer in consumers:
                inputs[consumer] = inputs[name]
                weights[consumer] = _weight(random, width, outs)
            fields = {"name": name, "block": block, "kind": kind, "consumers": tuple(consumers)}
            groups.append(SimpleNamespace(**fields, fold_kind="norm", reason=""))
    return Synthetic(inputs, weights, tuple(groups), np.arange(length), length, texts)


def _pool(values: np.ndarray, bins: int) -> np.ndarray:
    size = math.ceil(len(values) / bins)
    return np.stack([values[i : i + size].max(0) for i in range(0, len(values), size)])


def _input(random: Any, width: int, length: int, bins: int, outlier: float, texts: tuple[str, ...]) -> Any:
    x = np.abs(random.standard_normal((length, width))).astype(np.float32)
    x[:, 7] *= outlier / 20
    x[:, 41] *= outlier / 40
    x[1, 7], x[1, 41] = outlier, outlier / 2
    x[:, 3] = 0  # a dead channel
    order = np.argsort(-x.max(1))[:16]
    top = tuple(
        SimpleNamespace(
            value=float(x[t].max()), channel=int(x[t].argmax()), token=int(t), text=texts[t], position=int(t)
        )
        for t in order
    )
    return SimpleNamespace(
        absmax=x.max(0),
        quantiles=np.quantile(x, (0.5, 0.9, 0.99, 0.999, 0.9999), axis=0).astype(np.float32),
        token_absmax=x.max(1),
        channel_token=np.where(x.max(0) > 0, x.argmax(0), -1).astype(np.int32),
        top=top,
        map=_pool(x, bins).astype(np.float16),
        exact=x,
    )


def _weight(random: Any, width: int, outs: int) -> Any:
    w = np.abs(random.standard_normal((outs, width))).astype(np.float32) * 0.04
    return SimpleNamespace(channel_absmax=w.max(0), out_absmax=w.max(1), map=_pool(w, 128).astype(np.float16))
