"""Which backends there are, which of them run here, and which one to take."""

import functools
import importlib

import torch

from sqviz.errors import SqvizError, Unavailable
from sqviz_kernels.backend import Backend

_HOMES = {
    "vnni": ("cpu_vnni", "Vnni"),
}
"""Backends by name, the best first: where each is defined."""


@functools.cache
def _kind(name: str) -> type[Backend]:
    module, kind = _HOMES[name]
    return getattr(importlib.import_module(f"sqviz_kernels.{module}"), kind)


@functools.cache
def backends() -> dict[str, str | None]:
    """Every backend by name, the best of each device first: None if it runs here, else why it does not."""
    return {name: _kind(name).why_not() for name in _HOMES}


def get(name: str) -> Backend:
    """The backend of this name. Raises `SqvizError` for an unknown one, `Unavailable` with the reason."""
    if name not in _HOMES:
        raise SqvizError(f"backend={name!r}: there are 'simulate', 'auto', {', '.join(map(repr, _HOMES))}.")
    if (why := backends()[name]) is not None:
        raise Unavailable(f"backend={name!r} cannot run here: {why}.")
    return _kind(name)()


def backend_for(name: str, device: torch.device) -> Backend:
    """The backend of this name, or for "auto" the best that runs on the device. Raises as `get` does."""
    if name != "auto":
        backend = get(name)
        if backend.device != device.type:
            raise SqvizError(f"backend={name!r} computes on {backend.device}, and the model is on {device}.")
        return backend
    for each, why in backends().items():
        if why is None and _kind(each).device == device.type:
            return get(each)
    raise Unavailable(f"no INT8 backend runs on {device} here: {backends()}. Use backend='simulate'.")
