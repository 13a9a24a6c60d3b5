"""Runs checks in a process of their own: some need an environment variable before anything is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run(*arguments: str, timeout: int = 400, **environment: str) -> subprocess.CompletedProcess:
    """`python arguments`, with these environment variables and without those that would change what is tested."""
    cleared = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "NUMBA_"))}
    return subprocess.run(
        [sys.executable, *arguments], env=cleared | environment, capture_output=True, text=True, timeout=timeout
    )


def all_pass(file: str, least: int, **environment: str) -> None:
    """Every check of a file passes, none is skipped, and there are as many as there should be."""
    options = ["-q", "-p", "no:cacheprovider", "-o", f"python_files={file}"]
    found = run("-m", "pytest", *options, str(HERE / file), **environment)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    passed = re.search(r"(\d+) passed", found.stdout)
    assert passed is not None
    assert int(passed[1]) >= least
    assert "skipped nothing" in found.stdout
