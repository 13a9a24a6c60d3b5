"""Other people's software beside ours: each in an environment and a process of its own, asked one thing at a time.

The environment, build/NAME/venv, is made on the first use and needs PyPI. The script that runs there reads questions,
one JSON object a line, and answers each with another; while it works, this process waits.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

import sqviz

BUILD = Path("build")


class Unavailable(Exception):
    """The other environment could not be made, or what runs there has ended; says why."""


class PeerProcess:
    """A script of this folder, running in the environment build/`name`."""

    def __init__(self, name: str, needs: Sequence[str], folder: Path) -> None:
        """Start peer_`name`.py with the model in `folder`; `needs`: what to install, such as "bertviz==1.4.1".

        Raises `Unavailable` if the environment cannot be made.
        """
        self.name, self._log = name, BUILD / name / "log.txt"
        python = environment(name, needs)
        script = Path(__file__).with_name(f"peer_{name}.py")
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [str(python), "-P", str(script), str(folder), str(torch.get_num_threads())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )

    def ask(self, **question: Any) -> dict[str, Any]:
        """Its answer. Raises `Unavailable`, with its last words, if it ends or reports an error."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            code = self._process.wait()
            raise Unavailable(f"{self.name} ended with {code}: {lines[-1] if lines else 'it said nothing'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Unavailable(f"{self.name}: {answer['error']}")
        return answer

    def ask_measured(self, **question: Any) -> tuple[dict[str, Any], int | None]:
        """Its answer, and by how many bytes its resident memory grew meanwhile; None where no system tells."""
        folder = Path(f"/proc/{self._process.pid}")
        before = psutil.Process(self._process.pid).memory_info().rss
        try:
            (folder / "clear_refs").write_text("5")  # the high-water mark starts again
        except OSError:
            return self.ask(**question), None
        answer = self.ask(**question)
        line = next(line for line in (folder / "status").read_text().splitlines() if line.startswith("VmHWM"))
        return answer, 1024 * int(line.split()[1]) - before

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()


def environment(name: str, needs: Sequence[str]) -> Path:
    """The Python of build/`name`/venv, with these packages, the first in the version asked for, and this torch."""
    home = BUILD / name
    python = home / "venv" / "bin" / "python"
    package, _, version = needs[0].partition("==")
    check = f"from importlib.metadata import version; assert version({package!r}) == {version!r}"
    if python.exists() and not subprocess.run([python, "-c", check], capture_output=True).returncode:
        return python
    print(f"making {home}/venv for {needs[0]} …", file=sys.stderr, flush=True)
    home.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", home / "venv"], check=True)
    wanted = [f"torch=={torch.__version__.split('+')[0]}", *needs]
    made = subprocess.run([python, "-m", "pip", "install", "-q", *wanted], capture_output=True, text=True)
    if made.returncode:
        raise Unavailable(f"pip could not install {' '.join(wanted)}: {(made.stderr.strip().splitlines() or [''])[-1]}")
    return python


def model_folder(lm: sqviz.LM) -> Path:
    """The model and its tokenizer as `from_pretrained` reads them."""
    folder = BUILD / "peer_model"
    if not (folder / "tokenizer_config.json").exists():
        for part in (lm.model, lm.tokenizer):
            saved: Any = part
            saved.save_pretrained(folder)
    return folder
