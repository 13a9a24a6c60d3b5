"""`Shown`: how a result of an evaluation shows itself and is saved."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects

    from sqviz.widgets.still import Still


class Shown:
    """A result with a plotly `figure` for where scripts run, and the same picture as a `still` for where none can."""

    def figure(self) -> "plotly.graph_objects.Figure":
        """The plotly figure. A subclass makes it."""
        raise NotImplementedError(f"{type(self).__name__} makes no figure")

    def still(self) -> "Still":
        """The picture of `figure`, drawn without a browser. A subclass draws it."""
        raise NotImplementedError(f"{type(self).__name__} draws no still")

    def to_html(self, path: str | Path | None = None) -> str | Path:
        """A page with the figure: self-contained, no network. Written to `path`; None returns its text."""
        from sqviz.widgets.saved import saved

        return saved(self.figure().to_html(include_plotlyjs=True), path)

    def to_png(self, path: str | Path | None = None) -> bytes | Path:
        """The same picture as a PNG, drawn without a browser. Written to `path`; None returns the bytes.

        Raises:
            ImportError: without Pillow, saying how to get it.
        """
        from sqviz.widgets.saved import saved

        return saved(self.still().png(), path)

    def to_svg(self, path: str | Path | None = None) -> str | Path:
        """The same picture as an SVG, drawn without a browser. Written to `path`; None returns its text."""
        from sqviz.widgets.saved import saved

        return saved(self.still().svg(), path)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        from plotly.io import renderers

        # An SVG for where plotly is not: a PNG would be shown by plotly's own extension of JupyterLab, figure or not.
        bundle = dict(renderers["plotly_mimetype"].to_mimebundle(self.figure().to_dict()))
        return bundle | {"image/svg+xml": self.still().svg(), "text/plain": repr(self)}
