"""Where a long stream stands, as one safetensors file: its cache, its results so far, and what run they belong to.

A file of another model, text, policy or version is refused, so that two runs are never mixed.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sqviz.errors import SqvizError
from sqviz.models.lm import LM
from sqviz.quant import int8_attention
from sqviz.streaming.plan import State
from sqviz.tensorfile import write_tensors

if TYPE_CHECKING:
    from sqviz.streaming.cache import SinkCache

FORMAT, VERSION = "sqviz-stream", 2
_HASHED = 64  # values of each parameter that go into the fingerprint of a model


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A file, and what its run is about: policy, method, block, model (an `LM`) and ids (the tokens)."""

    path: Path
    about: dict[str, Any]

    def write(self, cache: "SinkCache | None", tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        """Replace the file. Raises `OSError` if it cannot be written; the old one is then still there."""
        kept = {f"result/{name}": x.contiguous().clone() for name, x in tensors.items()}
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "run": json.dumps(self._run()),
            "numbers": json.dumps(numbers),
        }
        if cache is not None:
            kept |= cache_tensors(cache)
            metadata["state"] = json.dumps(_plain(cache.state) | {"length": cache.length, "rows": cache.rows})
        write_tensors(kept, metadata, self.path)

    def read(self, cache: "SinkCache | None") -> tuple[dict[str, Tensor], dict[str, float]] | None:
        """Fill `cache` and return the results so far; None if there is no file.

        Raises `SqvizError` for a file of another run, of another version, or damaged.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            self._check(metadata)
            if cache is not None:
                fill_cache(cache, tensors, json.loads(metadata["state"]))
            numbers = json.loads(metadata["numbers"])
        except (SafetensorError, KeyError, json.JSONDecodeError) as broken:
            raise SqvizError(
                f"{str(self.path)!r} is damaged, or no checkpoint ({broken}); delete it to start anew"
            ) from broken
        results = {name.removeprefix("result/"): x for name, x in tensors.items() if name.startswith("result/")}
        return results, numbers

    def _run(self) -> dict[str, Any]:
        lm: LM = self.about["model"]
        return self.about | {
            "model": fingerprint(lm),
            "ids": hashlib.sha256(self.about["ids"].numpy().tobytes()).hexdigest(),
        }

    def _check(self, metadata: dict[str, str]) -> None:
        if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
            found = f"{metadata.get('format', 'no format')} {metadata.get('version', '')}".strip()
            raise SqvizError(
                f"{str(self.path)!r} is {found}; this sqviz reads {FORMAT} {VERSION}. Delete it to start anew"
            )
        there, here = json.loads(metadata["run"]), self._run()
        differs = [name for name in here if here[name] != there.get(name)]
        if differs:
            raise SqvizError(
                f"{str(self.path)!r} belongs to another run: its {', '.join(differs)} differ. Give another file, or "
                "delete this one to start anew"
            )


def fingerprint(lm: LM) -> str:
    """A hash of class, dtype, note and some values of every parameter; of weights kept as codes too."""
    how = f" {lm.note}" * bool(lm.note) + " INT8 attention" * int8_attention.uses(lm)
    found = hashlib.sha256(f"{type(lm.model).__name__} {lm.dtype}{how}".encode())
    kept = lm.model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in lm.model.named_buffers() if name in kept]
    for name, tensor in (*lm.model.named_parameters(), *buffers):
        values = tensor.detach().flatten()[:_HASHED].double().cpu()
        found.update(f"{name} {tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return found.hexdigest()


def cache_tensors(cache: "SinkCache") -> dict[str, Tensor]:
    """The stores and sinks of all layers, by name."""
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(cache.layers):
        for which, store in enumerate(layer.stores):
            found |= {f"store/{index}/{which}/{part}": x.contiguous() for part, x in enumerate(store.tensors)}
        found |= {f"sinks/{index}/{which}": x.contiguous() for which, x in enumerate(layer.sinks)}
    return found


def fill_cache(cache: "SinkCache", tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """The inverse of `cache_tensors`, into an empty cache."""
    device = cache.lm.device
    for index, layer in enumerate(cache.layers):
        if f"sinks/{index}/0" not in tensors:
            continue
        layer.sinks = [tensors[f"sinks/{index}/{which}"].to(device) for which in (0, 1)]
        layer.stores = [layer.store_for(sinks.to(cache.lm.dtype)) for sinks in layer.sinks]
        for which, store in enumerate(layer.stores):
            store.load([tensors[f"store/{index}/{which}/{part}"].to(device) for part in range(len(store.tensors))])
        layer.dtype, layer.device, layer.is_initialized = layer.stores[0].dtype, device, True
        layer.base = int(state["base"])
    cache.length, cache.rows = int(state["length"]), int(state["rows"])
    pads = None if state["pads"] is None else torch.tensor(state["pads"])
    sinks = torch.tensor(state["sinks"], dtype=torch.long).reshape(state["sink_shape"])
    cache.state = State(state["seen"], state["base"], state["held"], pads, sinks)


def _plain(state: State) -> dict[str, Any]:
    return {
        "seen": state.seen,
        "base": state.base,
        "held": state.held,
        "pads": None if state.pads is None else state.pads.tolist(),
        "sinks": state.sinks.flatten().tolist(),
        "sink_shape": list(state.sinks.shape),
    }
