"""`SurfaceView`: |X| over token × channel and |W| beside it, before and after smoothing, as surfaces to turn by hand.

The thesis's Figure 3.2. One plotly figure with four scenes; JupyterLab draws it from the notebook file itself, so it
stays rotatable after the kernel is gone. Where there is no plotly, the notebook shows the still.
"""

import base64
import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from sqviz.observe.magnitudes import Magnitudes
from sqviz.plots.surface import Panel, surface_figure
from sqviz.plots.template import Theme
from sqviz.quant.plan import check_alpha
from sqviz.widgets.heatmap import HeatmapView, Maps, maps_of
from sqviz.widgets.still import Still, have_pillow, number
from sqviz.widgets.surface_still import draw_surfaces
from sqviz.widgets.view import build_page, read_files

CONFIG = {"displaylogo": False, "responsive": True}


class SurfaceView:
    """Four surfaces: |X| and |W| of a linear, and |X| / s and s · |W| at `alpha`. Shown by being a cell's last value.

    `heatmap()` gives the same data as a 2-D heatmap with an α slider; `figure()` the plotly figure, to change at will.
    """

    def __init__(self, maps: Maps, alpha: float = 0.5, *, model: str = "") -> None:
        """From `maps`; most call `SurfaceView.of`.

        Raises:
            ValueError: a map is missing, so there is no surface.
        """
        self.maps, self.alpha, self.model = maps, check_alpha(alpha), model
        self.panels = _panels(maps, self.alpha)

    @classmethod
    def of(cls, magnitudes: Magnitudes, name: str | int, alpha: float = 0.5) -> "SurfaceView":
        """The surfaces of one linear of a capture.

        Args:
            magnitudes: the capture.
            name: the linear, or as in `Magnitudes.surface`.
            alpha: migration strength of the smoothed half.

        Raises:
            NoSuchLayer: `name` fits nothing.
            SqvizError: `alpha` is outside [0, 1].
        """
        return cls(maps_of(magnitudes, name), alpha, model=magnitudes.model)

    @property
    def title(self) -> str:
        """What the figure shows."""
        return f"{self.maps.name} before and after smoothing" + (f" · {self.model}" if self.model else "")

    def figure(self, theme: Theme = "either") -> go.Figure:
        """The plotly figure, for a light page, a dark page, or (as shown in the notebook) for either."""
        return surface_figure(self.panels, self.title, theme)

    def heatmap(self, **state: Any) -> HeatmapView:
        """The same magnitudes as a 2-D heatmap, every token and channel; `state` as in `HeatmapView.of`."""
        return HeatmapView(self.maps, model=self.model, **({"alpha": self.alpha} | state))

    def still(self) -> Still:
        """The four surfaces as a picture, drawn without a browser."""
        return draw_surfaces(self.panels, self.title)

    def to_png(self, path: str | Path | None = None) -> bytes | Path:
        """The still as a PNG: bytes, or written to `path`. Needs Pillow."""
        data = self.still().png()
        if path is None:
            return data
        Path(path).write_bytes(data)
        return Path(path)

    def to_html(self, path: str | Path | None = None) -> str | Path:
        """A self-contained page (5 MB: plotly.js is in it) with the surfaces and, below them, the heatmap.

        Args:
            path: where to write it; None returns the text of the page.
        """
        from plotly.offline import get_plotlyjs

        figure = self.figure().to_html(full_html=False, include_plotlyjs=False, config=CONFIG, div_id="surfaces")
        below = self.heatmap()
        script = f"<script>\n{read_files(('surface_page.js',))}\n</script>"
        head = f"<script>window.PlotlyConfig = {{MathJaxConfig: 'local'}};</script>\n<script>{get_plotlyjs()}</script>"
        page = build_page(
            self.title, str(below._esm), str(below._css), below.page_state(), head=head, above=figure + script
        )
        if path is None:
            return page
        Path(path).write_text(page, encoding="utf-8")
        return Path(path)

    def __repr__(self) -> str:
        return f"SurfaceView({self.title!r}, alpha={self.alpha})"

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        figure = json.loads(self.figure().to_json(validate=False))
        data = {"application/vnd.plotly.v1+json": figure | {"config": CONFIG}, "text/plain": repr(self)}
        metadata: dict[str, Any] = {}
        if have_pillow():
            still = self.still()
            data["image/png"] = base64.b64encode(still.png()).decode("ascii")
            metadata["image/png"] = {"width": still.width, "height": still.height}
        return data, metadata


def _panels(maps: Maps, alpha: float) -> list[Panel]:
    """|X| and |W|, and below them the same after smoothing; without the lower row where no one s holds."""
    units = {"x": maps.x_units, "w": maps.w_units}
    rows = {"x": "token", "w": "output"}
    panels = []
    for smoothed in (False, True) if maps.one_scale else (False,):
        for which, plain, scaled in (("x", "|X|", "|X| / s"), ("w", "|W|", "s · |W|")):
            values = maps.operand(which, alpha if smoothed else None)
            symbol = scaled if smoothed else plain
            title = f"{symbol} {f'at α = {alpha:g}' if smoothed else 'as it is'}: up to {number(float(values.max()))}"
            panels.append(Panel(values, title, symbol, rows[which], units[which]))
    return panels
