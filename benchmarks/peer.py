"""Tom Aarsen's attention_sinks 0.4.0, on the same weights and the same torch, in a virtual environment of its own.

It needs transformers 4.34.0, so it runs in another process, build/attention_sinks/, which is made on the first use and
needs PyPI. `Peer` sends it steps one at a time: while it works, this process waits.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import sqviz

HOME = Path("build/attention_sinks")
NEEDS = (
    f"torch=={torch.__version__.split('+')[0]}",
    "attention_sinks==0.4.0",
    "transformers==4.34.0",
    "numpy<2",
    "einops",
)


class Unavailable(Exception):
    """The other environment could not be made; says why."""


class Peer:
    """The other process: a model, and a cache of the size asked for."""

    def __init__(self, lm: sqviz.LM) -> None:
        """Raises `Unavailable` if the environment cannot be made or the model cannot be loaded there."""
        python = _environment()
        folder = _model(lm)
        child = Path(__file__).with_name("peer_step.py")
        with (HOME / "log.txt").open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [str(python), str(child), str(folder), str(torch.get_num_threads())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def fill(self, size: int) -> tuple[int, int]:
        """Fill the caches; returns the keys that a step of each attends to: with sinks, dense."""
        kept, dense = self._ask(f"fill {size}").split()[1:]
        return int(kept), int(dense)

    def step(self, turn: int) -> float:
        """Seconds of one step with sinks, on its clock."""
        return float(self._ask(f"step {turn}"))

    def dense(self, turn: int) -> float:
        """Seconds of one plain step on transformers 4.34, on its clock."""
        return float(self._ask(f"dense {turn}"))

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()

    def _ask(self, what: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            lines = (HOME / "log.txt").read_text(encoding="utf-8").strip().splitlines()
            raise Unavailable(f"attention_sinks ended: {lines[-1] if lines else 'it said nothing'}")
        return answer


def _environment() -> Path:
    python = HOME / "venv" / "bin" / "python"
    if python.exists() and not subprocess.run([python, "-c", "import attention_sinks"], capture_output=True).returncode:
        return python
    print(f"making {HOME}/venv for attention_sinks 0.4.0 …", flush=True)
    HOME.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", HOME / "venv"], check=True)
    made = subprocess.run([python, "-m", "pip", "install", "-q", *NEEDS], capture_output=True, text=True)
    if made.returncode:
        raise Unavailable(f"pip could not install {' '.join(NEEDS)}: {made.stderr.strip().splitlines()[-1]}")
    return python


def _model(lm: sqviz.LM) -> Path:
    """The weights as transformers 4.34 reads them."""
    folder = HOME / "model"
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
