"""Looking things up in a capture, keeping it in a file, and showing it as text."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sqviz import tensorfile
from sqviz.errors import NoSuchLayer, SqvizError
from sqviz.models.tiny import tiny
from sqviz.observe import store
from sqviz.observe.capture import capture
from sqviz.observe.first import MAPPED
from sqviz.observe.magnitudes import InputStats, Magnitudes, WeightStats

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def captured() -> Magnitudes:
    lm = tiny("LlamaForCausalLM")
    tokens = torch.randint(3, 131, (40,), generator=torch.Generator().manual_seed(0))
    scales = {DOWN: torch.rand(53)}
    return capture(lm.replace(scales=scales), tokens, length=20, progress=False)


@pytest.fixture(scope="module")
def mixture() -> Magnitudes:
    tokens = torch.randint(3, 131, (40,), generator=torch.Generator().manual_seed(0))
    return capture(tiny("MixtralForCausalLM"), tokens, length=20, progress=False)


def assert_equal(one: object, other: object, rel: float = 0, where: str = "") -> None:
    """Of nested dataclasses, mappings, tuples and tensors; tensors within `rel`."""
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor)
        assert one.dtype == other.dtype, where
        floor = 1e-3 * float(one.abs().max()) if rel and one.numel() else 0.0  # of what is kept in short form
        torch.testing.assert_close(one, other, rtol=rel, atol=rel * floor)
    elif dataclasses.is_dataclass(one):
        assert type(one) is type(other)
        for field in dataclasses.fields(one):
            assert_equal(getattr(one, field.name), getattr(other, field.name), rel, f"{where}.{field.name}")
    elif isinstance(one, dict):
        assert isinstance(other, dict)
        assert list(one) == list(other), where
        for key in one:
            assert_equal(one[key], other[key], rel, f"{where}[{key}]")
    else:
        assert one == other, where


# --- looking things up ---


def test_a_layer_is_found_by_name_by_its_end_and_by_block(captured: Magnitudes) -> None:
    assert captured.group(DOWN).name == DOWN
    assert captured.group("1.mlp.down_proj").name == DOWN
    assert captured.group("layers.1.mlp.up_proj").name == "model.layers.1.mlp.gate_proj"
    ratios = {group.name: captured.inputs[group.name].outlier_ratio for group in captured.groups if group.block == 1}
    assert captured.group(1).name == max(ratios, key=lambda name: ratios[name])
    assert torch.equal(captured.absmax("1.mlp.down_proj"), captured.inputs[DOWN].absmax)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("model.layers.1.mlp.down_prj", r"'model\.layers\.1\.mlp\.down_prj' fits no linear.*mlp\.down_proj"),
        ("down_proj", r"fits several linears: model\.layers\.0\.mlp\.down_proj, model\.layers\.1"),
        ("own_proj", r"fits no linear"),
        (2, r"layer=2: there are blocks 0 to 1"),
        (-1, r"layer=-1: there are blocks 0 to 1"),
    ],
)
def test_a_layer_that_is_not_there(captured: Magnitudes, layer: int | str, message: str) -> None:
    for look in (captured.group, captured.surface, captured.heatmap, captured.has_map):
        with pytest.raises(NoSuchLayer, match=message):
            look(layer)


def test_a_map_that_was_left_out(captured: Magnitudes, tmp_path: Path) -> None:
    captured.save(tmp_path / "some", maps=(DOWN,))
    some = Magnitudes.load(tmp_path / "some")
    assert some.has_map(DOWN)
    assert not some.has_map("0.mlp.down_proj")
    assert len(some.inputs["model.layers.0.mlp.down_proj"].map) == 0
    assert some.inputs["model.layers.0.mlp.down_proj"].map.shape[1] == 53
    with pytest.raises(NoSuchLayer, match=rf"holds no token map of model\.layers\.0\.mlp\.down_proj, only of {DOWN};"):
        some.heatmap("0.mlp.down_proj")


def test_absmax_is_the_larger_of_both_ends(captured: Magnitudes) -> None:
    stats = captured.inputs[DOWN]
    assert (stats.minimum < 0).any()
    assert torch.equal(stats.absmax, torch.stack([stats.minimum.abs(), stats.maximum.abs()]).amax(0))


# --- keeping ---


@pytest.mark.parametrize("which", ["captured", "mixture"])
def test_what_is_saved_is_loaded(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    magnitudes: Magnitudes = request.getfixturevalue(which)
    path = tmp_path / "capture.safetensors"
    magnitudes.save(path)
    again = Magnitudes.load(str(path))
    assert_equal(magnitudes, again)
    for group in again.groups:
        assert all(again.inputs[name] is again.inputs[group.name] for name in group.consumers)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("which", ["captured", "mixture"])
def test_a_compact_file_is_smaller_and_near(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    magnitudes: Magnitudes = request.getfixturevalue(which)
    magnitudes.save(tmp_path / "full")
    magnitudes.save(tmp_path / "compact", compact=True)
    assert (tmp_path / "compact").stat().st_size < 0.6 * (tmp_path / "full").stat().st_size
    again = Magnitudes.load(tmp_path / "compact")
    for name in magnitudes.names:
        before, after = magnitudes.inputs[name], again.inputs[name]
        assert_equal(dataclasses.replace(before, top=()), dataclasses.replace(after, top=()), rel=0.03)
        torch.testing.assert_close(before.absmax, after.absmax, rtol=1e-3, atol=1e-6)
        assert before.top == after.top
        w = dataclasses.replace(magnitudes.weights[name], map=magnitudes.weights[name].map[:0])
        assert_equal(w, dataclasses.replace(again.weights[name], map=again.weights[name].map[:0]), rel=0.03)
        assert len(again.weights[name].map) <= 32
        largest = again.weights[name].map.amax(0).float()
        torch.testing.assert_close(largest, magnitudes.weights[name].channel_absmax, rtol=0.03, atol=1e-5)


def test_numbers_beyond_half_precision_stay_finite_in_a_compact_file(captured: Magnitudes, tmp_path: Path) -> None:
    stats = dataclasses.replace(captured.inputs[DOWN], maximum=torch.full((53,), 1e6), minimum=torch.full((53,), -1e6))
    magnitudes = dataclasses.replace(captured, inputs={**captured.inputs, DOWN: stats})
    magnitudes.save(tmp_path / "x", compact=True)
    assert Magnitudes.load(tmp_path / "x").inputs[DOWN].absmax.unique().tolist() == [65504.0]


def test_a_file_that_is_none(tmp_path: Path, captured: Magnitudes) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        Magnitudes.load(tmp_path / "nowhere")
    (tmp_path / "text").write_text("not a safetensors file")
    with pytest.raises(SqvizError, match=r"text' is damaged, or no safetensors file"):
        Magnitudes.load(tmp_path / "text")
    save_file({"weight": torch.zeros(3)}, tmp_path / "model")
    with pytest.raises(SqvizError, match=r"model' is a safetensors file, but not a capture"):
        Magnitudes.load(tmp_path / "model")
    captured.save(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for length in (0, 5, 1000, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(SqvizError, match="is damaged"):
            Magnitudes.load(tmp_path / "cut")


def test_a_file_of_a_later_version_or_with_a_broken_table(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({}, path, metadata={"format": store.FORMAT, "version": str(store.VERSION + 1), "table": "{}"})
    with pytest.raises(SqvizError, match=r"of version 2 .* up to 1: update sqviz"):
        Magnitudes.load(path)
    tables = ("{}", "[", json.dumps({"inputs": [], "groups": [{"name": "x", "consumers": []}], "top": []}))
    for table in tables:
        save_file({}, path, metadata={"format": store.FORMAT, "version": "1", "table": table})
        with pytest.raises(SqvizError, match="is damaged"):
            Magnitudes.load(path)


def test_a_save_that_fails_leaves_the_old_file(
    tmp_path: Path, captured: Magnitudes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "capture"
    captured.save(path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorfile, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        captured.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["capture"]
    with pytest.raises(FileNotFoundError):
        captured.save(tmp_path / "no" / "such" / "folder")


def test_a_disk_that_is_full_for_the_writer_itself(tmp_path: Path, captured: Magnitudes) -> None:
    """In a child whose files may not grow beyond 4 kB: the writer's own error, not one made up here."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from sqviz import Magnitudes; m = Magnitudes.load(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: m.save(sys.argv[2])\n"
        "except OSError as error: print('OSError:', error)\n"
    )
    captured.save(tmp_path / "a")
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a", tmp_path / "b"], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("OSError:"), run.stdout + run.stderr
    assert os.listdir(tmp_path) == ["a"]


# --- showing ---


def test_repr_says_what_was_captured(captured: Magnitudes) -> None:
    largest = max(captured.names, key=lambda name: float(captured.absmax(name).max()))
    assert repr(captured) == (
        f"Magnitudes(tiny/LlamaForCausalLM: 2 blocks, 14 linears with 8 inputs; 2 × 20 tokens; largest input "
        f"{float(captured.absmax(largest).max()):.4g} at {captured.group(largest).name})"
    )


def test_the_table_is_plain_html_and_escapes_text(captured: Magnitudes) -> None:
    top = dataclasses.replace(captured.inputs[DOWN].top[0], text="<script>alert(1)</script>")
    inputs = {name: dataclasses.replace(stats, top=(top,)) for name, stats in captured.inputs.items()}
    bundle = dataclasses.replace(captured, inputs=inputs)._repr_mimebundle_(include=None, exclude=None)
    assert bundle["text/plain"] == repr(captured)
    assert "<script" not in bundle["text/html"]
    assert "&lt;script&gt;" in bundle["text/html"]
    assert "style" not in bundle["text/html"]
    assert bundle["text/html"].count("<tr>") == 1 + 8
    first = 8 * (top.position == 0)
    assert f"at a segment's first token in {first} of these and {first / 8:.0%} of all" in bundle["text/html"]


def test_the_frame_has_a_row_per_linear(captured: Magnitudes) -> None:
    frame = captured.to_frame().set_index("linear")
    assert tuple(frame.index) == captured.names
    row = frame.loc["model.layers.1.mlp.up_proj"]
    absmax = captured.absmax("model.layers.1.mlp.up_proj")
    assert row["kind"] == "mlp.up_proj"
    assert (row["block"], row["channels"], row["out"]) == (1, 48, 53)
    assert row["absmax"] == pytest.approx(float(absmax.max()))
    assert row["outlier_ratio"] == pytest.approx(float(absmax.max() / absmax.median()))
    assert absmax[row["outlier_channel"]] == absmax.max()
    assert row["top_token"] == captured.inputs["model.layers.1.mlp.gate_proj"].top[0].text


def test_how_many_inputs_peak_at_a_first_token(captured: Magnitudes) -> None:
    places = [int(captured.inputs[group.name].token_absmax.argmax()) % captured.length for group in captured.groups]
    assert captured.first_token_share == places.count(0) / len(places)
    frame = captured.outlier_tokens()
    leads = frame.loc[frame["position"] == 0, "leads"].sum()
    assert captured.first_token_share == leads / len(captured.groups)
    assert Magnitudes({}, {}, (), torch.arange(4), 2).first_token_share == 0


def test_a_dead_input_has_no_ratio() -> None:
    zeros = torch.zeros(3)
    stats = InputStats(zeros, zeros, zeros, zeros[None], zeros, zeros, zeros.int(), (), zeros.half()[None])
    empty = Magnitudes({}, {}, (), torch.arange(4), 2)
    assert stats.outlier_ratio == 0
    assert repr(empty) == "Magnitudes(: 0 blocks, 0 linears with 0 inputs; 2 × 2 tokens)"
    assert WeightStats(zeros, zeros, zeros.half()[None]).expert_absmax is None


# --- the one that ships ---


def test_the_embedded_capture() -> None:
    m = Magnitudes.embedded()
    assert len(m.names) == 210
    assert len(m.groups) == 120
    assert [group.name for group in m.groups if m.has_map(group.name)] == list(MAPPED)
    assert all(len(m.weights[name].map) > 0 for group in MAPPED for name in m.group(group).consumers)
    down = m.inputs["model.layers.28.mlp.down_proj"]
    assert float(down.absmax.max()) > 2000
    assert float(down.absmax.median()) < 10
    assert down.top[0].position == 0
    assert len(m.token_texts) == m.length
    for stats in m.inputs.values():
        for field in ("minimum", "maximum", "mean", "quantiles", "token_absmax"):
            assert getattr(stats, field).isfinite().all()
        assert stats.absmax.min() > 0
    first = Path(store.__file__).with_name("first.safetensors")
    assert first.stat().st_size < 3.2e6


def test_the_embedded_capture_is_read_without_model_code() -> None:
    code = (
        "import sys, sqviz; m = sqviz.Magnitudes.embedded(); m._repr_mimebundle_()\n"
        "print([name for name in ('transformers', 'numba', 'pandas', 'plotly') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.embedded
def test_the_embedded_capture_is_what_its_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of its segments, that is: all take long."""
    import sqviz
    from sqviz.observe import first

    lm, shipped = sqviz.load(), Magnitudes.embedded()
    segments = sqviz.capture(
        lm, shipped.tokens, samples=2, length=first.LENGTH, map_tokens=first.MAP_TOKENS, progress=False
    )
    for name in MAPPED:
        a, b = shipped.inputs[name], segments.inputs[name]
        torch.testing.assert_close(a.map.float(), b.map.float(), rtol=0.04, atol=1e-2 * float(b.map.max()))
        count = 2 * first.LENGTH
        torch.testing.assert_close(a.token_absmax[:count], b.token_absmax, rtol=0.04, atol=0.0)
        assert (a.absmax >= 0.99 * b.absmax).all()
    assert shipped.token_texts == segments.token_texts
    text = sqviz.text().segments(lm.tokenizer, first.LENGTH, first.SAMPLES)
    assert torch.equal(torch.cat(list(text)), shipped.tokens)
