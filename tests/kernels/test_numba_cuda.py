"""The numba.cuda kernels: simulated against the definition, and compiled for named GPUs. No GPU needed."""

import importlib.util
import json

import pytest
from own_process import HERE, all_pass, run

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("the extra 'gpu' is not installed: make setup EXTRAS=dev,gpu", allow_module_level=True)


def test_simulated_kernels_give_what_the_definition_says_and_a_missing_barrier_shows():
    all_pass("simulated_checks.py", least=12, NUMBA_ENABLE_CUDASIM="1")


@pytest.fixture(scope="module")
def compiled():
    said = run(str(HERE / "numba_compiled.py"))
    assert said.returncode == 0, said.stderr[-3000:]
    return json.loads(said.stdout)


@pytest.mark.parametrize("capability", [[7, 5], [8, 0], [9, 0], [10, 0], [12, 0]], ids=str)
def test_compiled_kernels_use_dp4a_and_spill_nothing(compiled, capability):
    rows = {row["kernel"]: row for row in compiled if row["capability"] == capability}
    assert set(rows) == {"quantise_rows", "linear_tiles"}
    for row in rows.values():
        assert row["STL"] == row["LDL"] == 0
    product = rows["linear_tiles"]
    assert product["dp4a"] == product["IDP\\.4A\\.S8\\.S8"] == 16  # one for each word of a row of the tile
    assert product["BAR"] == 2
    assert product["FFMA"] == 0  # the bias is not merged with the scaling
    assert product["FADD"] == 1
    assert rows["quantise_rows"]["divisions"] == ["div.rn.f32"]


def test_the_simulator_is_no_backend():
    code = "from sqviz_kernels.numba_cuda_int8 import NumbaCuda; print(NumbaCuda.why_not())"
    assert "NUMBA_ENABLE_CUDASIM=1 is set" in run("-c", code, NUMBA_ENABLE_CUDASIM="1").stdout
