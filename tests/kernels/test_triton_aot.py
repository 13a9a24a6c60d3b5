"""What Triton makes of the kernels for named GPUs, read from the machine code: no GPU needed.

Every operation, with the first tile of each table; `python -m sqviz_kernels.aot` does all tiles.
"""

import json
import re

import pytest
import torch
from own_process import run

pytest.importorskip("triton", reason="the extra 'gpu' is not installed: make setup EXTRAS=dev,gpu")

from sqviz_kernels import aot, aot_record
from sqviz_kernels.tiles import SHARED, Tile, family, linear_tiles, product_tiles

TARGETS = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"]
SQUARE = Tile(128, 128, 64, 8, 3)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Target -> what every operation became, in rows of the command's table."""
    path = tmp_path_factory.mktemp("aot") / "found.json"
    said = run("-m", "sqviz_kernels.aot", *TARGETS, "--first", "--json", str(path))
    rows = json.loads(path.read_text()) if path.exists() else []
    assert rows, said.stderr[-3000:]
    assert said.returncode == int(any(row["faults"] for row in rows))
    return {target: [row for row in rows if row["target"] == target] for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_spills_loads_by_bytes_or_merges_the_epilogue(compiled, target):
    rows = compiled[target]
    assert {row["operation"] for row in rows} == set(aot_record.OPERATIONS)
    assert not [row for row in rows if row["faults"]]
    for row in rows:
        assert row["spills"] == 0
        assert row["shared"] <= SHARED[aot.TARGETS[target].family]
        if row["kernel"] == "linear_tiles":
            assert row["wide"] > 0
            assert row["fused"] == 0 or row["operation"] == "linear to codes"  # it divides


INSTRUCTION = {"sm_90": "IGMMA", "sm_100": "UTCIMMA|IMMA", "gfx942": "v_mfma_i32"}


@pytest.mark.parametrize("target", TARGETS)
def test_products_run_on_the_tensor_cores(compiled, target):
    products = [row for row in compiled[target] if row["tile"]]
    assert {row["kernel"] for row in products} == {"linear_tiles", "batched_tiles"}
    for row in products:
        assert sum(row["mma"].values()) > 0
        if row["operation"] == "linear":
            assert re.match(INSTRUCTION.get(target, "IMMA"), next(iter(row["mma"])))


def one(target, operation="linear", tile=SQUARE, **options):
    """The first product of an operation, with this tile."""
    launches = aot_record.record(aot.TARGETS[target].family, [operation], (tile,))
    return aot.compile_launch(next(each for each in launches if each.tile), target, **options)


def test_a_tile_with_too_few_warps_is_found_to_spill():
    assert one("sm_80", tile=SQUARE._replace(n=256)).faults() == []
    found = one("sm_80", tile=SQUARE._replace(n=256, warps=4))
    assert found.spills > 500
    assert found.faults() == [f"{found.spills} registers spilled"]


def test_a_merged_epilogue_is_found():
    assert one("sm_80").fused == 0
    found = one("sm_80", enable_fp_fusion=True)
    assert found.faults() == [f"{found.fused} fused multiply-adds"]


def test_a_tile_that_does_not_fit_into_shared_memory_is_found():
    found = one("sm_86", "linear to sums", Tile(128, 128, 128, 8, 5))
    assert found.faults() == [f"{found.shared} bytes shared, {SHARED['sm_86']} allowed"]


def test_channels_that_are_not_padded_are_found():
    recorder = aot_record.Recorder("sm_80", (SQUARE,))
    recorder.linear(aot_record._codes(512, 1001), aot_record._weight(512, 1001))
    found = aot.compile_launch(next(iter(recorder.launches.values())), "sm_80")
    assert re.search(r"\d+ loads of one or two bytes", "; ".join(found.faults()))


def test_what_a_device_cannot_do_is_found():
    assert "Error" in one("sm_80", tile=SQUARE._replace(k=16)).error  # int8 products are 32 channels deep


def test_the_backend_asks_for_bfloat16_rounded_to_even_and_ieee_division():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def ptx(operation):
        launch = aot_record.record("sm_80", [operation], every=False)[0]
        aligned = {(launch.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
        source = ASTSource(fn=launch.kernel, signature=launch.signature, constexprs=launch.constants, attrs=aligned)
        return triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": False}).asm["ptx"]

    assert "cvt.rn.bf16" in ptx("linear, static")
    divisions = set(re.findall(r"div\.\S+", ptx("quantise")))
    assert divisions == {"div.rn.f32"}


def test_every_target_has_its_row_in_the_tables():
    for target in aot.TARGETS.values():
        for rows in (1, 16, 17, 4096):
            assert linear_tiles(target.family, rows)
            assert product_tiles(target.family, rows)
            assert all(tile.m * tile.n <= 128 * 128 for tile in linear_tiles(target.family, rows, large=False))
    assert family(torch.device("cpu")) in SHARED
    assert {target.family for target in aot.TARGETS.values()} == set(SHARED)


def test_the_command_refuses_to_compile_what_would_be_interpreted():
    found = run("-m", "sqviz_kernels.aot", "sm_80", TRITON_INTERPRET="1")
    assert found.returncode == 2
    assert "unset it" in found.stdout
