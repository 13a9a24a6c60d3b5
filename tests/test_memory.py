"""The peak is that of the work: what came and went in between is seen, what came before is not."""

import sys

import psutil
import pytest
import torch

from sqviz import memory
from sqviz.memory import peak_memory

MB = 1_000_000
CPU = torch.device("cpu")


def use(megabytes: int) -> torch.Tensor:
    return torch.ones(megabytes * MB // 4)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel keeps a peak that can be reset on Linux only")
def test_what_came_and_went_is_seen():
    del_me = use(900)
    del del_me
    with peak_memory(CPU) as nothing:
        pass
    with peak_memory(CPU) as peak:
        use(300)
    assert nothing.bytes is not None
    assert 280 * MB < peak.bytes - nothing.bytes < 330 * MB


def test_without_the_kernels_help_it_is_what_is_there_at_the_end(monkeypatch):
    monkeypatch.setattr(memory, "_reset", lambda: False)
    with peak_memory(CPU) as peak:
        kept = use(300)
    assert abs(peak.bytes - psutil.Process().memory_info().rss) < 50 * MB
    del kept


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_what_was_allocated():
    with peak_memory(torch.device("cuda")) as peak:
        torch.ones(300 * MB // 4, device="cuda")
    assert peak.bytes >= 300 * MB
