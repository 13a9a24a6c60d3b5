"""Which backends there are, which of them run here, and which one to take."""

import functools
import importlib

import torch

from sqviz.errors import SqvizError, Unavailable
from sqviz_kernels.backend import Backend
from sqviz_kernels.gpu import why_no_gpu

_HOMES = {
    "vnni": ("cpu_vnni", "Vnni"),
    "onednn": ("cpu_onednn", "OneDnn"),
    "plain": ("cpu_plain", "Plain"),
    "triton": ("triton_launch", "Triton"),
    "cublaslt": ("gpu_library", "CublasLt"),
    "numba-cuda": ("numba_cuda_int8", "NumbaCuda"),
}
"""Backends by name, the best of each device first: where each is defined."""
_ON_GPU = ("triton", "cublaslt", "numba-cuda")


def _kind(name: str) -> type[Backend]:
    module, kind = _HOMES[name]
    return getattr(importlib.import_module(f"sqviz_kernels.{module}"), kind)


@functools.cache
def _why_not(name: str) -> str | None:
    if name in _ON_GPU and (why := why_no_gpu()) is not None:
        return why  # without importing a GPU compiler for it
    try:
        return _kind(name).why_not()
    except Exception as error:  # noqa: BLE001  a broken installation raises what it likes
        what = "'sqviz[gpu]'" if name in _ON_GPU else "sqviz"
        return f"importing it fails with {type(error).__name__}: {error}; pip install --force-reinstall {what}"


def backends() -> dict[str, str | None]:
    """Every INT8 backend by name, the best of each device first: None if it runs here, else why not and what helps.

    Tried once per process: the first call takes a moment (numba is imported, oneDNN multiplies the extremes), and never
    raises.
    """
    return {name: _why_not(name) for name in _HOMES}


def get(name: str) -> Backend:
    """The backend of this name. Raises `SqvizError` for an unknown one, `Unavailable` with the reason."""
    if name not in _HOMES:
        raise SqvizError(f"backend={name!r}: there are 'simulate', 'auto', {', '.join(map(repr, _HOMES))}.")
    if (why := _why_not(name)) is not None:
        raise Unavailable(f"backend={name!r} cannot run here: {why}.")
    return _kind(name)()


def backend_for(name: str, device: torch.device) -> Backend:
    """The backend of this name, or for "auto" the best that runs on the device. Raises as `get` does."""
    if name != "auto":
        backend = get(name)
        if backend.device != device.type:
            raise SqvizError(f"backend={name!r} computes on {backend.device}, and the model is on {device}.")
        return backend
    for each in _HOMES:
        if device.type == ("cuda" if each in _ON_GPU else "cpu") and _why_not(each) is None:
            return get(each)
    raise Unavailable(f"no INT8 backend runs on {device} here: {backends()}. Use backend='simulate'.")


def best(device: torch.device) -> Backend | None:
    """The best backend that runs on a device, or None."""
    try:
        return backend_for("auto", device)
    except Unavailable:
        return None
