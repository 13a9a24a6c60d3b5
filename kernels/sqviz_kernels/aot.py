"""Compiles every Triton launch for named GPUs, without one, and reads the machine code.

    python -m sqviz_kernels.aot                        a table for every target and candidate tile
    python -m sqviz_kernels.aot sm_90 gfx942 --first   only these targets, only the first tile of each table
    python -m sqviz_kernels.aot sm_80 --only "linear, decode" --json out.json

What is compiled is what would be launched: the operations are called on a `Recorder`, whose tensors have shapes and no
contents, and what Triton would specialise on (16-byte alignment, sizes divisible by 16, sizes of 1) is read off the
arguments. A tile is wrong for a family if it spills registers, takes more shared memory than a program may have, misses
the tensor cores, or loads byte by byte: `Machine.faults` lists that. How fast it is only a device can say.

Triton brings its own assembler and disassembler; no CUDA toolkit is needed.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sqviz_kernels.aot_record import OPERATIONS, Launch, record
from sqviz_kernels.tiles import SHARED, Tile


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for: Triton's backend, architecture, warp size; row of the tile table; the INT8 instruction."""

    backend: str
    arch: int | str
    warp: int
    family: str
    mma: str


TARGETS = {
    "sm_80": Target("cuda", 80, 32, "sm_80", r"IMMA\.16832\.S8\.S8"),
    "sm_86": Target("cuda", 86, 32, "sm_86", r"IMMA\.16832\.S8\.S8"),
    "sm_89": Target("cuda", 89, 32, "sm_86", r"IMMA\.16832\.S8\.S8"),
    "sm_90": Target("cuda", 90, 32, "sm_90", r"IGMMA\.\S*S8|IMMA\.16832\.S8\.S8"),
    "sm_100": Target("cuda", 100, 32, "sm_100", r"UTCIMMA|IMMA\.16832\.S8\.S8"),
    "sm_120": Target("cuda", 120, 32, "sm_120", r"IMMA\.16832\.S8\.S8"),
    "gfx90a": Target("hip", "gfx90a", 64, "gfx", r"v_mfma_i32_\w+i8"),
    "gfx942": Target("hip", "gfx942", 64, "gfx", r"v_mfma_i32_\w+i8"),
}


@dataclasses.dataclass
class Machine:
    """What a launch became.

    Attributes:
        mma: INT8 tensor-core instructions.
        spills: stores of registers that did not fit.
        wide, middle, narrow: loads of 16 bytes, of 8, of one or two.
        short: rows of so few channels that a warp cannot load 16 bytes a lane.
        fused: fused multiply-adds of float32. (A division rounded as IEEE says is made of those; so where there is one,
            their number says nothing.)
        shared: bytes of shared memory.
        error: the compiler's, "" if it had none.
    """

    target: str
    operation: str
    kernel: str
    tile: Tile | None
    mma: dict[str, int] = dataclasses.field(default_factory=dict)
    spills: int = 0
    wide: int = 0
    middle: int = 0
    narrow: int = 0
    fused: int = 0
    shared: int = 0
    short: bool = False
    error: str = ""

    def faults(self) -> list[str]:
        """What is wrong with it, in words; empty if nothing is."""
        if self.error:
            return [self.error]
        limit = SHARED[TARGETS[self.target].family]
        found = [f"{self.spills} registers spilled"] if self.spills else []
        found += [f"{self.shared} bytes shared, {limit} allowed"] if self.shared > limit else []
        found += ["no INT8 tensor-core instruction"] if self.tile and not self.mma else []
        found += ["no loads of 8 or 16 bytes"] if not self.short and not self.wide + self.middle else []
        found += [f"{self.narrow} loads of one or two bytes"] if self.tile and self.narrow else []
        adds = self.kernel == "linear_tiles" and self.operation != "linear to codes"
        return found + ([f"{self.fused} fused multiply-adds"] if adds and self.fused else [])


def _count(pattern: str, text: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for match in re.findall(pattern, text):
        found[match] = found.get(match, 0) + 1
    return found


def _sass(cubin: bytes) -> str:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout


def compile_launch(launch: Launch, target: str, **options: Any) -> Machine:
    """Compile for a target; `options` override those of the launcher."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    where = TARGETS[target]
    tile = launch.tile
    short = launch.constants.get("BLOCK", 4096) < 256
    found = Machine(target, launch.operation, launch.kernel.__name__, tile, short=short)
    attributes = {(launch.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(fn=launch.kernel, signature=launch.signature, constexprs=launch.constants, attrs=attributes)
    given = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": False} | options
    try:
        code = triton.compile(source, target=GPUTarget(where.backend, where.arch, where.warp), options=given)
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises is the finding
        found.error = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        return found
    found.shared = code.metadata.shared
    if where.backend == "cuda":
        text = _sass(code.asm["cubin"])
        found.spills = len(re.findall(r"\bSTL\b", text))
        found.wide = len(re.findall(r"\bLDG\S*\.128\b|\bLDGSTS\S*\.128\b|\bUBLKCP\b", text))
        found.middle = len(re.findall(r"\bLDG\S*\.64\b|\bLDGSTS\S*\.64\b", text))
        found.narrow = len(re.findall(r"\bLDG\S*\.[US](?:8|16)\b", text))
        found.fused = len(re.findall(r"\bFFMA\b", text))
    else:
        text = code.asm["amdgcn"]
        found.spills = sum(map(int, re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)))
        found.wide = len(re.findall(r"\b(?:global|buffer)_load_(?:dwordx4|b128)\b", text))
        found.middle = len(re.findall(r"\b(?:global|buffer)_load_(?:dwordx2|b64)\b", text))
        found.narrow = len(re.findall(r"\b(?:global|buffer)_load_[us](?:byte|short)\w*", text))
        found.fused = len(re.findall(r"\bv_(?:pk_)?fma(?:c|ak|mk)?_f32", text))
    found.mma = _count(where.mma, text)
    return found


def _compile(job: tuple[str, tuple[str, ...], tuple[Tile, ...], bool, int]) -> Machine:
    target, operations, tiles, every, index = job
    return compile_launch(record(TARGETS[target].family, operations, tiles, every)[index], target)


def machine_code(
    targets: Iterable[str],
    operations: Iterable[str] = (),
    tiles: tuple[Tile, ...] = (),
    every: bool = True,
    workers: int = 2,
) -> list[Machine]:
    """Compile what the operations launch on each target, `workers` at a time."""
    names = tuple(operations)
    jobs = [
        (target, names, tiles, every, index)
        for target in targets
        for index in range(len(record(TARGETS[target].family, names, tiles, every)))
    ]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile, jobs))


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if anything is at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=list(TARGETS), metavar="target", help=", ".join(TARGETS))
    parser.add_argument(
        "--only", action="append", default=[], choices=list(OPERATIONS), help="an operation; repeatable"
    )
    parser.add_argument("--tile", help="rows,out,channels,warps,stages instead of the table's candidates")
    parser.add_argument("--first", action="store_true", help="only the first tile of each table")
    parser.add_argument("--json", help="write what was found to this file")
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 is set: nothing can be compiled; unset it")
        return 2
    tiles = (Tile(*map(int, given.tile.split(","))),) if given.tile else ()
    found = machine_code(given.targets or TARGETS, given.only, tiles, not given.first)
    heads = ["target", "operation", "kernel", "tile", "INT8 instruction", "spills", "loads of 16, 8, 1–2 bytes"]
    heads += ["shared", "at fault"]
    print("|", " | ".join(heads), "|")
    print("|", " | ".join("---" for _ in heads), "|")
    for each in found:
        tile = "" if each.tile is None else "{}×{}×{}, {} warps, {} stages".format(*each.tile)
        mma = ", ".join(f"{count} {name}" for name, count in each.mma.items())
        loads = f"{each.wide}, {each.middle}, {each.narrow}"
        columns = (each.target, each.operation, each.kernel, tile, mma, each.spills, loads, each.shared)
        print("|", " | ".join(map(str, columns)), "|", "; ".join(each.faults()), "|")
    if given.json:
        rows = [dataclasses.asdict(each) | {"faults": each.faults()} for each in found]
        Path(given.json).write_text(json.dumps(rows, indent=1))
    return int(any(each.faults() for each in found))


if __name__ == "__main__":
    sys.exit(main())
