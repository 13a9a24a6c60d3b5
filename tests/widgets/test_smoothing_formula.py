"""The page's arithmetic against Python's: s(α), log codes, shifting and pooling cells, the error curve, packs.

smoothing_formula.js runs in node, or in Chromium where there is no node.
"""

import base64
import itertools
import json
import math
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sqviz.widgets
from sqviz.quant.smooth import LARGEST, SMALLEST, smoothing_scale
from sqviz.widgets.smoothing_pack import pack, unpack
from sqviz.widgets.view import decode_log, encode_log

FORMULA = (Path(sqviz.widgets.__file__).parent / "smoothing_formula.js").read_text(encoding="utf-8")
READ = "const f32 = (text) => new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);"
ULP = 2.0**-23

Evaluate = Callable[[str], Any]


@pytest.fixture(scope="session")
def javascript() -> Evaluate:
    """Runs smoothing_formula.js followed by an expression, and returns its value through JSON."""
    node = shutil.which("node")
    if node is None:
        return _in_chromium()

    def run(expression: str) -> Any:
        script = f"{FORMULA}\n{READ}\nconsole.log(JSON.stringify({expression}));"
        done = subprocess.run([node, "-e", script], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def _in_chromium() -> Evaluate:
    playwright = pytest.importorskip("playwright.sync_api", reason="neither node nor playwright is here")
    path = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if path is None:
        pytest.skip("neither node nor a Chromium is here")

    def run(expression: str) -> Any:
        with playwright.sync_playwright() as started:
            browser = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
            try:
                return browser.new_page().evaluate(f"(() => {{ {FORMULA}\n{READ}\nreturn {expression}; }})()")
            finally:
                browser.close()

    return run


def as_js(values: Any) -> str:
    data = np.ascontiguousarray(np.asarray(values, dtype="<f4")).tobytes()
    return f'f32("{base64.b64encode(data).decode()}")'


def vectors(seed: int, channels: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima over the whole of float32: ordinary ones, outliers, zeros, denormals, what drives s into its clamps."""
    rng = np.random.default_rng(seed)
    x = (10.0 ** rng.uniform(-3, 3.5, channels)).astype(np.float32)
    w = (10.0 ** rng.uniform(-4, 1, channels)).astype(np.float32)
    x[:64] = 10.0 ** rng.uniform(-44, 38, 64)
    w[32:96] = 10.0 ** rng.uniform(-44, 38, 64)
    x[100:110], w[105:115] = 0.0, 0.0
    x[200], w[200] = 1e-45, 1e-45
    return torch.from_numpy(x), torch.from_numpy(w)


@pytest.mark.parametrize("seed", range(3))
def test_s_of_alpha_is_the_same_in_page_and_python(javascript, seed):
    x, w = vectors(seed)
    alphas = [0.0, 0.01, 0.25, 0.5, 0.55, 0.85, 0.99, 1.0]
    script = f"""(() => {{
      const x = logs({as_js(x)}), w = logs({as_js(w)});
      return {alphas}.map((alpha) => [...smoothingScale(x, w, alpha)]);
    }})()"""
    page = torch.tensor(javascript(script), dtype=torch.float64)
    for alpha, ours in zip(alphas, page, strict=True):
        python = smoothing_scale(x, w, alpha)
        exact = smoothing_scale(x.double(), w.double(), alpha)
        assert ((ours - exact).abs() <= 1.01 * ULP / 2 * exact).all()  # the page computes in double and rounds once
        # Python divides powers in float32: a few units in the last place, and α itself is rounded, times a logarithm.
        logarithms = (x.clamp(min=1e-45).double().log().abs() + w.clamp(min=1e-45).double().log().abs()) / 2
        ulps = 4 + torch.where((x > 0) & (w > 0), logarithms, 0)
        assert ((ours - python.double()).abs() <= ulps * ULP * python.double()).all()
        assert (ours[100:115] == 1.0).all()
        assert ours.min() >= np.float32(SMALLEST)
        assert ours.max() <= LARGEST
    assert page.min() == pytest.approx(SMALLEST)  # the clamps were reached
    assert page.max() == LARGEST


@pytest.mark.parametrize("bounds", [(-3.0, 3.5), (-8.0, -7.9), (0.0, 8.0)])
def test_decoding_log_codes(javascript, bounds):
    codes = list(range(256))
    values = javascript(f"{codes}.map((code) => decodeLog(code, {list(bounds)}))")
    assert values == pytest.approx(decode_log(np.array(codes), *bounds).tolist(), rel=1e-9)
    back = javascript(f"{codes[1:]}.map((code) => codeOf(decodeLog(code, {list(bounds)}), {list(bounds)}))")
    assert back == pytest.approx(codes[1:], abs=1e-6)


@pytest.mark.parametrize(("channels", "columns"), [(48, 48), (48, 64), (101, 32), (1000, 7)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_pooling_after_scaling_keeps_every_outlier(javascript, channels, columns, sign):
    """What the page shows in a pixel is the largest |x|/s (or |w|·s) of the channels and tokens under it."""
    rng = np.random.default_rng(channels + columns)
    rows, shown = 24, 8
    x = (10.0 ** rng.uniform(-2, 2, (rows, channels))).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = 0.0
    s = (10.0 ** rng.uniform(-1.5, 1.5, channels)).astype(np.float32)
    lo, hi = -2.0, 2.0
    codes = encode_log(x, lo, hi)
    script = f"""(() => {{
      const range = [{lo}, {hi}], shifts = codeShifts({as_js(s)}, range, {sign});
      const pooled = poolRows(Uint8Array.from({codes.reshape(-1).tolist()}), {rows}, {channels}, {shown});
      const columns = Math.min({channels}, {columns});
      const cells = new Int16Array(pooled.rows * columns), most = new Int16Array(pooled.rows);
      shiftCells(pooled.codes, pooled.rows, {channels}, shifts, columns, cells, most);
      return {{ rows: pooled.rows, columns, cells: [...cells], most: [...most] }};
    }})()"""
    page = javascript(script)
    assert (page["rows"], page["columns"]) == (shown, min(channels, columns))
    scaled = np.where(codes > 0, decode_log(codes, lo, hi) * s.astype(np.float64) ** sign, 0.0)
    by_row = scaled.reshape(shown, rows // shown, channels).max(1)
    edges = [math.floor(p * channels / page["columns"]) for p in range(page["columns"] + 1)]
    wanted = np.stack([by_row[:, a:b].max(1) for a, b in itertools.pairwise(edges)], 1)
    cells = np.array(page["cells"]).reshape(shown, -1)
    got = np.where(cells > -32768, 10.0 ** (lo + (cells - 1) / 254 * (hi - lo)), 0.0)
    half_step = 10 ** ((hi - lo) / 508)
    assert ((got == 0) == (wanted == 0)).all()
    alive = wanted > 0
    assert (np.maximum(got[alive] / wanted[alive], wanted[alive] / got[alive]) <= half_step * 1.0001).all()
    assert page["most"] == cells.max(1).tolist()


def test_a_row_of_zeros_is_lost_whatever_the_step(javascript):
    script = """(() => {
      const cells = new Int16Array(8), most = new Int16Array(2);
      shiftCells(Uint8Array.of(0, 0, 0, 0, 9, 0, 0, 0), 2, 4, new Int16Array(4), 4, cells, most);
      const ground = { top: most, stride: 1, part: null, below: 100 };
      const painted = paintCells(cells, 2, 4, ground, shadesOf(100, new Uint32Array(256), 7), new Uint32Array(8));
      return [[...most], countLost(cells, 2, 4, ground), painted];
    })()"""
    most, counted, painted = javascript(script)
    assert (most[1], counted, painted) == (9, 7, 7)


def test_painting_colours_by_the_distance_from_what_shares_the_step(javascript):
    script = """(() => {
      const lut = Uint32Array.from({ length: 256 }, (_, i) => i), out = new Uint32Array(6);
      const shades = shadesOf(102, lut, 999), cells = Int16Array.of(200, 150, 97, 90, 300, -32768);
      const byRow = { top: Int16Array.of(200, 192), stride: 1, part: null, below: 102 };
      const byColumn = { top: Int16Array.of(200, 300, 199), stride: 0, part: Int32Array.of(0, 1, 2), below: 102 };
      return [byRow, byColumn].map((ground) =>
        [paintCells(cells, 2, 3, ground, shades, out), [...out], countLost(cells, 2, 3, ground)]);
    })()"""
    rows, columns = javascript(script)
    # (102 − distance) · 255/102; a distance beyond 102 is lost; what exceeds its (static) top gets the last colour
    assert rows == [2, [255, 130, 999, 0, 255, 999], 2]
    assert columns == [3, [255, 999, 0, 999, 255, 999], 3]


@settings(deadline=None, derandomize=True, max_examples=6)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 600), st.sampled_from([None, 40, -32768 + 4096]), st.data())
def test_painting_in_one_pass_is_shifting_and_painting(javascript, rows, channels, below, fixed, data):
    codes = data.draw(st.lists(st.integers(0, 255), min_size=rows * channels, max_size=rows * channels))
    shifts = data.draw(st.lists(st.integers(-1500, 1500), min_size=channels, max_size=channels))
    one, two = javascript(
        f"""(() => {{
      const codes = Uint8Array.from({codes}), shifts = Int16Array.from({shifts}), shades = shadesOf({below}, LUT, 999);
      const [rows, channels, below] = [{rows}, {channels}, {below}];
      const cells = new Int16Array(codes.length), most = new Int16Array(rows), a = new Uint32Array(codes.length);
      shiftCells(codes, rows, channels, shifts, channels, cells, most);
      const top = {json.dumps(fixed)} ?? Math.max(...most), b = a.slice();
      const ground = {{ top: Int16Array.of(top), stride: 0, part: null, below }};
      const known = {json.dumps(fixed)} ?? topOf(tallest(codes, rows, channels), shifts);
      return [[top, paintCells(cells, rows, channels, ground, shades, a), ...a],
              [known, paintCodes(codes, rows, channels, shifts, known, below, shades, b), ...b]];
    }})()""".replace("LUT", "Uint32Array.from({ length: 256 }, (_, i) => i)")
    )
    assert one == two


ALPHAS = [k / 20 for k in range(21)]


@settings(deadline=None, derandomize=True, max_examples=4)
@given(
    places=st.lists(st.floats(0, 1), min_size=20, max_size=200).map(lambda found: [0.0, 0.05, 0.3, 1.0, *found]),
    logarithms=st.lists(st.floats(-20, 3), min_size=21, max_size=21),
)
def test_the_error_between_swept_values_is_read_off_in_logarithms(javascript, places, logarithms):
    errors = np.exp(logarithms).tolist()
    ours = javascript(f"{places}.map((alpha) => errorAt({ALPHAS}, {errors}, alpha))")
    assert ours == pytest.approx(np.exp(np.interp(places, ALPHAS, logarithms)).tolist(), rel=1e-9)


def test_an_unswept_neighbour_gives_no_number(javascript):
    errors = "[0.1, 0.2, NaN, ...new Array(18).fill(0.3)]"
    assert javascript(f"errorAt({ALPHAS}, {errors}, 0.07)") is None  # NaN in JSON
    assert javascript(f"errorAt({ALPHAS}, {errors}, 0.05)") == 0.2


def test_the_sweet_spot_is_where_the_error_stays_within_a_tenth_of_the_best(javascript):
    errors = [math.exp(abs(alpha - 0.6)) for alpha in ALPHAS]  # log-linear around 0.6: the edges lie at ln(1.1)
    spot = javascript(f"sweetSpot({ALPHAS}, {errors})")
    assert spot["best"] == pytest.approx(0.6)
    assert [spot["lo"], spot["hi"]] == pytest.approx([0.6 - math.log(1.1), 0.6 + math.log(1.1)])
    assert javascript(f"sweetSpot({ALPHAS}, new Array(21).fill(NaN))") is None
    flat = javascript(f"sweetSpot({ALPHAS}, new Array(21).fill(0.5))")
    assert [flat["lo"], flat["hi"]] == [0, 1]
    falling = javascript(f"sweetSpot({ALPHAS}, {[2.0 - alpha for alpha in ALPHAS]})")
    assert falling["hi"] == 1


def test_sqnr_of_a_relative_error(javascript):
    assert javascript("sqnrDb(0.01)") == pytest.approx(40.0)


def test_packs_read_the_same_on_both_sides(javascript):
    arrays = {
        "codes": np.arange(13, dtype=np.uint8),
        "values": np.array([1.5, -2.25, 0.0], dtype="<f4"),
        "order": np.array([3, -1], dtype="<i4"),
    }
    data = pack({"group": "α · näme", "range": [-1.5, 2.0]}, arrays) + pack(
        {"group": "second"}, {"codes": np.zeros(0, np.uint8)}
    )
    (header, back), (second, empty) = unpack(data)
    assert header == {"group": "α · näme", "range": [-1.5, 2.0]}
    assert all(np.array_equal(back[name], arrays[name]) for name in arrays)
    assert (second, empty["codes"].size) == ({"group": "second"}, 0)
    text = base64.b64encode(b"\0\0\0" + data).decode()  # at an odd place in its buffer, as a kernel message may have it
    page = javascript(
        f'unpackAll(new DataView(Uint8Array.from(atob("{text}"), (c) => c.charCodeAt(0)).buffer, 3))'
        ".map((p) => [p.group, [...p.codes], p.values ? [...p.values] : [], p.order ? [...p.order] : []])"
    )
    assert page == [["α · näme", list(range(13)), [1.5, -2.25, 0.0], [3, -1]], ["second", [], [], []]]
    assert struct.unpack_from("<I", data)[0] % 8 == 0
