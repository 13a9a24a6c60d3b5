"""`View`: the base of every sqviz widget. One self-contained script, arrays as bytes, and four ways to be seen.

* live: an anywidget in JupyterLab, Notebook 7, VS Code, Colab;
* `to_html()`: a page that opens from disk with no kernel and no network, running the very same script;
* `to_png()`: a still, drawn in Python without a browser. It also rides along in the notebook's output, so that GitHub,
  nbviewer, nbconvert and an untrusted JupyterLab, which have no widget to show, show the picture. (A trusted JupyterLab
  that has lost the kernel lets ipywidgets speak first, "model not found"; with its setting *Save Widget State
  Automatically* the view itself comes back, working.)
* `to_svg()`: the same still as lines and text, for papers and slides.

A subclass names its files, which lie beside this one and are joined in the order given:

    class HeatmapView(View):
        _scripts = ("draw.js", "cells.js", "heatmap.js")  # plain functions; the last: `export default { render }`
        _styles = ("base.css",)
        cells = traitlets.Bytes().tag(sync=True)  # every synced trait goes into the page

        def still(self) -> Still: ...                     # the picture; see still.py
"""

import base64
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import anywidget
import numpy as np
import traitlets
from jaxtyping import Float, UInt8

from sqviz.widgets.saved import saved
from sqviz.widgets.still import Still, have_pillow

FOLDER = Path(__file__).parent


def read_files(names: tuple[str, ...]) -> str:
    """The named files of this folder, joined in order."""
    return "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in names)


class View(anywidget.AnyWidget):
    """An interactive picture in a notebook; saved as a page (`to_html`) or as a picture (`to_png`, `to_svg`)."""

    _scripts: ClassVar[tuple[str, ...]] = ()
    _styles: ClassVar[tuple[str, ...]] = ("base.css",)

    title = traitlets.Unicode("").tag(sync=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "_scripts" in cls.__dict__:  # not in the class that anywidget derives for each instance
            cls._esm, cls._css = read_files(cls._scripts), read_files(cls._styles)
        super().__init_subclass__(**kwargs)

    def still(self) -> Still:
        """The picture of the present state. A subclass draws it."""
        raise NotImplementedError(f"{type(self).__name__} draws no still")

    def page_state(self) -> dict[str, Any]:
        """Every synced trait that is the subclass's own, as an exported page needs it."""
        inherited = set(anywidget.AnyWidget.class_trait_names())
        own = [n for n in self.trait_names(sync=True) if not n.startswith("_") and n not in inherited]
        return {name: getattr(self, name) for name in sorted(own)}

    def page_head(self) -> str:
        """What an exported page needs in its head besides the view's own files: a library, say."""
        return ""

    def to_html(self, path: str | Path | None = None) -> str | Path:
        """A self-contained page with this view as it is now: no kernel, no network.

        Args:
            path: where to write it; None returns the text of the page.

        Returns:
            The path written, or the page.
        """
        title = self.title or type(self).__name__
        page = build_page(title, str(self._esm), str(self._css), self.page_state(), self.page_head())
        return saved(page, path)

    def to_png(self, path: str | Path | None = None) -> bytes | Path:
        """A PNG of this view as it is now, drawn without a browser. Needs Pillow.

        Args:
            path: where to write it; None returns the bytes.

        Raises:
            ImportError: without Pillow, saying how to get it.
        """
        return saved(self.still().png(), path)

    def to_svg(self, path: str | Path | None = None) -> str | Path:
        """An SVG of this view as it is now, drawn without a browser: one file, its text can be selected and edited.

        Args:
            path: where to write it; None returns the text of the SVG.

        Returns:
            The path written, or the SVG.
        """
        return saved(self.still().svg(), path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.title!r})"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data, metadata = super()._repr_mimebundle_(**kwargs)
        if have_pillow():
            still = self.still()
            data["image/png"] = base64.b64encode(still.png()).decode("ascii")
            metadata["image/png"] = {"width": still.width, "height": still.height}
        return data, metadata


def plain_state(value: Any) -> Any:
    """A trait's value as JSON. Bytes become {"base64": ...}; the page makes a DataView, as live widgets do."""
    if isinstance(value, bytes | bytearray | memoryview):
        return {"base64": base64.b64encode(value).decode("ascii")}
    if isinstance(value, Mapping):
        return {str(key): plain_state(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_state(item) for item in value]
    return value


def script_json(value: Any) -> str:
    """JSON that can stand inside a <script> element whatever it holds: no `<` is left to close the element."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def build_page(title: str, script: str, style: str, state: Mapping[str, Any], head: str = "") -> str:
    """The exported page: `script` is a view's module, `state` its traits; `head` goes in as it is."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>
{read_files(("page.css",))}
{style}
</style>
{head}
</head>
<body>
<main id="view"></main>
<script type="application/json" id="state">{script_json(plain_state(state))}</script>
<script type="application/json" id="module">{script_json(script)}</script>
<script>
{read_files(("page_model.js", "page.js"))}
</script>
</body>
</html>
"""


# ---- arrays on their way to the page -------------------------------------------------------------------------------


def float32_bytes(values: Any) -> bytes:
    """Little-endian float32, as draw.js `float32` reads it. Takes a tensor or an array of any shape."""
    return np.ascontiguousarray(np.asarray(values, dtype="<f4")).tobytes()


def code_range(*arrays: Any, decades: float = 8.0) -> tuple[float, float]:
    """(lo, hi), the log10 range for codes of these non-negative arrays; at most `decades` long, the small end cut."""
    positive = [values[values > 0] for values in (np.asarray(a, dtype=np.float32) for a in arrays)]
    hi = max((float(p.max()) for p in positive if p.size), default=1.0)
    lo = min((float(p.min()) for p in positive if p.size), default=1.0)
    top = float(np.log10(hi)) + 1e-6
    return max(float(np.log10(lo)), top - decades) - 1e-6, top


def encode_log(values: Any, lo: float, hi: float) -> UInt8[np.ndarray, "..."]:
    """Magnitudes as uint8 log codes: 0 for zero, k in 1..255 for 10^(lo + (k - 1)/254 · (hi - lo)), rounded to nearest.

    The relative error is at most 10^((hi - lo)/508) - 1: 2.8 % over six decades. What lies below 10^lo by more than
    half a step becomes 0.
    """
    magnitude = np.asarray(values, dtype=np.float32)
    with np.errstate(divide="ignore"):
        code = np.rint((np.log10(magnitude) - lo) * (254.0 / (hi - lo))) + 1.0
    return np.where(magnitude > 0, np.clip(code, 0, 255), 0).astype(np.uint8)


def decode_log(codes: Any, lo: float, hi: float) -> Float[np.ndarray, "..."]:
    """The values that codes stand for: the inverse of `encode_log`."""
    code = np.asarray(codes, dtype=np.float64)
    return np.where(code > 0, 10.0 ** (lo + (code - 1.0) / 254.0 * (hi - lo)), 0.0)
