"""`SurfaceView`: |X| over token × channel and |W| beside it, before and after smoothing, as surfaces to turn by hand.

The thesis's Figure 3.2, one plotly figure with four scenes. Its layout is made here (plots/surface.py), its heights in
the page, from the codes that the heatmap below it shows; so α needs no kernel. plotly.js (5 MB) is never part of a
widget's state, and so of no notebook: the page asks for it once per window, and an exported page has it in its head.
"""

import json
from typing import Any

import plotly.graph_objects as go
import traitlets

from sqviz.observe.magnitudes import Magnitudes
from sqviz.plots.surface import COLUMNS, ROWS, Panel, surface_figure
from sqviz.plots.template import Theme
from sqviz.quant.plan import check_alpha
from sqviz.widgets.heatmap import SCRIPTS, HeatmapView, Maps, maps_of
from sqviz.widgets.still import Still, number
from sqviz.widgets.surface_still import draw_surfaces
from sqviz.widgets.view import float32_bytes


class SurfaceView(HeatmapView):
    """|X| and |W| of a linear, and |X| / s and s · |W| at `alpha`; see `Magnitudes.surface`.

    Traits: those of `HeatmapView`, and `heights`: "own" (each surface its own height scale), "same" (before and after
    on one) or "log". `figure()` is the plotly figure, to change at will; `heatmap()` the heatmap alone.
    """

    _scripts = (*SCRIPTS, "surface.js")

    figure_json = traitlets.Dict().tag(sync=True)
    x_peak = traitlets.Bytes().tag(sync=True)
    w_peak = traitlets.Bytes().tag(sync=True)
    heights = traitlets.Enum(["own", "same", "log"], "own").tag(sync=True)

    def __init__(self, maps: Maps, *, model: str = "", **state: Any) -> None:
        """From `maps`; `state` sets traits. Most call `SurfaceView.of`.

        Raises:
            ValueError: a map is missing, so there is no surface.
        """
        if maps.x is None or maps.w is None:
            raise ValueError(f"there is no token map of {maps.name}: capture with map_tokens > 0")
        check_alpha(state.get("alpha", 0.5))
        super().__init__(maps, model=model, **state)
        self.title = f"{maps.name} before and after smoothing" + (f" · {model}" if model else "")
        self.meta = self.meta | {"limits": [ROWS, COLUMNS]}
        self.x_peak, self.w_peak = float32_bytes(maps.x.max(0)), float32_bytes(maps.w.max(0))
        self.figure_json = _without_heights(self.figure())
        self.on_msg(self._answer)

    @classmethod
    def of(cls, magnitudes: Magnitudes, name: str | int, alpha: float = 0.5, **state: Any) -> "SurfaceView":
        """The surfaces of one linear of a capture.

        Args:
            magnitudes: the capture.
            name: the linear, or as in `Magnitudes.surface`.
            alpha: migration strength of the smoothed half.
            state: initial values of other traits.

        Raises:
            NoSuchLayer: `name` fits nothing.
            SqvizError: `alpha` is outside [0, 1].
        """
        return cls(maps_of(magnitudes, name), model=magnitudes.model, alpha=alpha, **state)

    def figure(self, theme: Theme = "either") -> go.Figure:
        """The plotly figure at the present α, with exact heights; for a light page, a dark one, or either."""
        return surface_figure(panels_of(self.maps, self.alpha), self.title, theme)

    def heatmap(self, **state: Any) -> HeatmapView:
        """The same magnitudes as a heatmap alone; `state` as in `HeatmapView.of`."""
        return HeatmapView(self.maps, model=self.meta["model"], **({"alpha": self.alpha} | state))

    def still(self) -> Still:
        """The surfaces at the present α as a picture, drawn without a browser."""
        return draw_surfaces(panels_of(self.maps, self.alpha), self.title)

    def page_head(self) -> str:
        """plotly.js, for the exported page."""
        return f"<script>\n{_plotly_script()}\n</script>"

    def _answer(self, _widget: Any, content: dict[str, Any], _buffers: Any) -> None:
        """Send plotly.js to the page that asks for it."""
        if content.get("need") == "plotly":
            self.send({"plotly": True}, [_plotly_script().encode()])


def _plotly_script() -> str:
    """plotly.js, told not to look for MathJax on the network."""
    from plotly.offline import get_plotlyjs

    return f"window.PlotlyConfig = {{MathJaxConfig: 'local'}};\n{get_plotlyjs()}"


def _without_heights(figure: go.Figure) -> dict[str, Any]:
    """The figure as JSON without its heights and colours, which the page computes."""
    bare: dict[str, Any] = json.loads(figure.to_json(validate=False))
    for trace in bare["data"]:
        del trace["z"], trace["surfacecolor"]
    return bare


def panels_of(maps: Maps, alpha: float) -> list[Panel]:
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
