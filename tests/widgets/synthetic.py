"""A small capture made of random numbers, with outlier channels planted, for the tests of the views."""

import math

import numpy as np
import torch

from sqviz.observe.magnitudes import QUANTILES, GroupInfo, InputStats, Magnitudes, TopToken, WeightStats
from sqviz.quant.found_alpha import FoundAlpha, Tried

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
WORDS = ("·the", "·people", "·of", "↵", "·“union”", "·and", ".", "·<b>", "</script>", "·state")


def magnitudes(
    blocks: int = 3, channels: int = 96, length: int = 64, bins: int = 32, outs: int = 80, outlier: float = 300.0
) -> Magnitudes:
    """`blocks` × 4 groups; channel 7 peaks at `outlier` · (1 + block) on token 1, 41 at half of it, 3 is dead."""
    random = np.random.default_rng(0)
    inputs, weights, groups = {}, {}, []
    texts = tuple(WORDS[i % len(WORDS)] for i in range(length))
    for block in range(blocks):
        for kind in KINDS:
            name = f"model.layers.{block}.{kind}"
            width = channels * 2 if kind == "mlp.down_proj" else channels
            stats = _input(random, width, length, bins, outlier * (1 + block), texts)
            consumers = [name.replace("q_proj", f"{k}_proj") for k in "qkv"] if kind.endswith("q_proj") else [name]
            for consumer in consumers:
                inputs[consumer] = stats
                weights[consumer] = _weight(random, width, outs)
            fold = "linear" if kind in ("self_attn.o_proj", "mlp.down_proj") else "norm"
            groups.append(GroupInfo(name, block, kind, tuple(consumers), fold))
    return Magnitudes(inputs, weights, tuple(groups), torch.arange(length), length, texts, "synthetic")


def found_alpha(blocks: int = 4) -> FoundAlpha:
    """What a search might find. Block 0 has no o_proj; block 1 leaves down_proj alone."""
    kinds = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    alphas = {
        f"model.layers.{block}.{kind}": None if (block, kind) == (1, "mlp.down_proj") else (block + 2 * place) % 10 / 10
        for block in range(blocks)
        for place, kind in enumerate(kinds)
        if (block, kind) != (0, "self_attn.o_proj")
    }
    tried = (Tried("logits", 0.1234, 0.11, 0.0321), Tried("flat 0.5", 0.5), Tried("layer", 0.75, 0.09, 0.04))
    return FoundAlpha(alphas, "logits", "sqviz.SMOOTHQUANT_O2", "all", "model & <more>", "0" * 64, tried)


def _pool(values: np.ndarray, bins: int) -> torch.Tensor:
    size = math.ceil(len(values) / bins)
    return torch.from_numpy(np.stack([values[i : i + size].max(0) for i in range(0, len(values), size)])).half()


def _input(
    random: np.random.Generator, width: int, length: int, bins: int, outlier: float, texts: tuple[str, ...]
) -> InputStats:
    x = np.abs(random.standard_normal((length, width))).astype(np.float32)
    x[:, 7] *= outlier / 20
    x[:, 41] *= outlier / 40
    x[1, 7], x[1, 41] = outlier, outlier / 2
    x[:, 3] = 0
    order = [int(token) for token in np.argsort(-x.max(1))[:16]]
    absmax = torch.from_numpy(x.max(0))
    return InputStats(
        minimum=-absmax,
        maximum=absmax,
        mean=torch.from_numpy(x.mean(0)),
        quantiles=torch.from_numpy(np.quantile(x, QUANTILES, axis=0).astype(np.float32)),
        tensor_quantiles=torch.from_numpy(np.quantile(x, QUANTILES).astype(np.float32)),
        token_absmax=torch.from_numpy(x.max(1)),
        channel_token=torch.from_numpy(np.where(x.max(0) > 0, x.argmax(0), -1).astype(np.int32)),
        top=tuple(TopToken(float(x[t].max()), int(x[t].argmax()), t, texts[t], t) for t in order),
        map=_pool(x, bins),
    )


def _weight(random: np.random.Generator, width: int, outs: int) -> WeightStats:
    w = np.abs(random.standard_normal((outs, width))).astype(np.float32) * 0.04
    return WeightStats(torch.from_numpy(w.max(0)), torch.from_numpy(w.max(1)), _pool(w, 128))
