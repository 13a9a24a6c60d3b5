"""Prints what numba-cuda makes of the kernels for named GPUs, as JSON; run by test_numba_cuda.py. No GPU, no driver."""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import nvidia
from cuda.core import Program, ProgramOptions
from numba import cuda, float32, int8, int32
from sqviz_kernels import numba_cuda_int8 as kernels

matrix, vector, words = float32[:, ::1], float32[::1], int32[:, ::1]
SIGNATURES = {
    "quantise_rows": (matrix, vector, int8[:, ::1], vector),
    "linear_tiles": (words, words, vector, vector, vector, matrix),
}
tool = next(path for folder in nvidia.__path__ for path in Path(folder).glob("*/bin/nvdisasm"))
found = []
for capability in ((7, 5), (8, 0), (9, 0), (10, 0), (12, 0)):
    for name, signature in SIGNATURES.items():
        ptx, _ = cuda.compile_ptx(getattr(kernels, name).py_func, signature, cc=capability)
        options = ProgramOptions(arch=f"sm_{capability[0]}{capability[1]}")
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(Program(ptx, "ptx", options).compile("cubin").code)
            file.flush()
            code = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
        counts = {
            op: len(re.findall(rf"\b{op}\b", code)) for op in ("IDP\\.4A\\.S8\\.S8", "STL", "LDL", "FFMA", "FADD")
        }
        counts["BAR"] = len(re.findall(r"\bBAR\.SYNC", code))
        row = {"capability": capability, "kernel": name, "dp4a": ptx.count("dp4a.s32.s32"), **counts}
        found.append(row | {"divisions": sorted(set(re.findall(r"div\.\S+", ptx)))})
print(json.dumps(found))
