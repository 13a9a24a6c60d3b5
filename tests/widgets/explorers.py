"""Smoothing explorers of a tiny model, for the tests of the view here and in tests/browser."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

import sqviz
from sqviz.models.tiny import tiny
from sqviz.quant.error import ALPHAS
from sqviz.widgets.smoothing import SmoothingExplorer, explore_smoothing

WAIT = 120.0  # seconds; only a hang comes near it


def ids(count: int = 96, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 131, (count,), generator=torch.Generator().manual_seed(seed))


@functools.cache
def tiny_lm() -> Any:
    return tiny("LlamaForCausalLM", num_hidden_layers=3)


@functools.cache
def tiny_capture() -> sqviz.Magnitudes:
    return sqviz.capture(tiny_lm(), ids(192, seed=1), samples=6, length=32, progress=False)


@contextmanager
def explorers() -> Iterator[Any]:
    """Gives a function that opens explorers, and closes them in the end: their threads must end too."""
    opened: list[SmoothingExplorer] = []

    def make(lm: Any = None, magnitudes: Any = None, **settings: Any) -> SmoothingExplorer:
        settings.setdefault("text", ids())
        opened.append(explore_smoothing(lm or tiny_lm(), magnitudes or tiny_capture(), **settings))
        return opened[-1]

    try:
        yield make
    finally:
        for explorer in opened:
            explorer.close()
            explorer._engine.worker.join(WAIT)
    assert not any(explorer._engine.worker.alive for explorer in opened)


def settle(explorer: SmoothingExplorer) -> SmoothingExplorer:
    """Wait until it has nothing left to do."""
    assert explorer._engine.worker.wait(WAIT)
    return explorer


def sweeps(explorer: SmoothingExplorer) -> np.ndarray:
    """[linear, α…, without smoothing]"""
    return np.frombuffer(explorer.sweeps, "<f4").reshape(-1, len(ALPHAS) + 1)
