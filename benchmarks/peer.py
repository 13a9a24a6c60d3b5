"""Tom Aarsen's attention_sinks 0.4.0, with the same weights and torch, in a process of its own (peer_process.py).

It needs transformers 4.34.0. `Peer` sends it steps one at a time.
"""

import json
from pathlib import Path
from typing import Any

import sqviz
from benchmarks.peer_process import BUILD, PeerProcess, Unavailable

NAME = "attention_sinks"
NEEDS = ("attention_sinks==0.4.0", "transformers==4.34.0", "numpy<2", "einops")


class Peer:
    """The other process: a model, and a cache of the size asked for."""

    def __init__(self, lm: sqviz.LM) -> None:
        """Raises `Unavailable` if the environment cannot be made or the model cannot be loaded there."""
        self._process = PeerProcess(NAME, NEEDS, _model(lm))

    def fill(self, size: int) -> tuple[int, int]:
        """Fill the caches; returns the keys that a step of each attends to: with sinks, dense."""
        kept = self._process.ask(what="fill", size=size)
        return kept["step"], kept["dense"]

    def step(self, turn: int) -> float:
        """Seconds of one step with sinks, on its clock."""
        return float(self._process.ask(what="step", turn=turn)["seconds"])

    def dense(self, turn: int) -> float:
        """Seconds of one plain step on transformers 4.34, on its clock."""
        return float(self._process.ask(what="dense", turn=turn)["seconds"])

    def close(self) -> None:
        """End the process."""
        self._process.close()


def _model(lm: sqviz.LM) -> Path:
    """The weights as transformers 4.34 reads them."""
    folder = BUILD / NAME / "model"
    model: Any = lm.model
    model.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise Unavailable(f"transformers 4.34 has no {rope['rope_type']} rotary embedding")
    config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    config["torch_dtype"] = config.pop("dtype", "float32")
    file.write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder
