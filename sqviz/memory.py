"""The most memory that a piece of work took, measured: on the GPU by torch's allocator, on the CPU by the system."""

import ctypes
import ctypes.util
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Attributes: bytes, the most memory in use during the work, all that was there before included; None before."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the work inside the `with` block: allocated memory of a GPU, resident memory of the process on a CPU.

    On Linux the kernel keeps the peak; elsewhere what is resident at the end stands for it.
    """
    peak = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    _give_back()
    kept = _reset()
    yield peak
    peak.bytes = _high_water() if kept else psutil.Process().memory_info().rss


def _give_back() -> None:
    """Have the C library return what was freed: its reserve would hide that less is needed."""
    if sys.platform == "linux" and (name := ctypes.util.find_library("c")):
        library = ctypes.CDLL(name)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)


def _reset() -> bool:
    """Whether the system's high-water mark of resident memory could be set to what is resident now."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return _STATUS.exists()


def _high_water() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
