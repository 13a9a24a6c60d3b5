import json

import numpy as np
import pytest

from sqviz.plots.surface import COLUMNS, ROWS, Panel, log_levels, surface_figure
from sqviz.plots.template import SERIES, template


def panels(rows: int = 300, columns: int = 700) -> list[Panel]:
    values = np.random.default_rng(0).random((rows, columns)).astype(np.float32)
    values[123, 456] = 1000.0
    names = [("before x", "|X|"), ("before w", "|W|"), ("after x", "|X| / s"), ("after w", "s · |W|")]
    return [Panel(values * (i + 1), title, symbol, "token", 2) for i, (title, symbol) in enumerate(names)]


def test_four_panels_are_four_scenes_of_one_figure() -> None:
    figure = surface_figure(panels(), "a linear")
    assert [trace.type for trace in figure.data] == ["surface"] * 4
    assert [trace.scene for trace in figure.data] == ["scene", "scene2", "scene3", "scene4"]
    assert [note.text for note in figure.layout.annotations] == [f"<b>{panel.title}</b>" for panel in panels()]
    assert figure.layout.title.text == "a linear"


def test_surfaces_are_shrunk_and_keep_the_outlier_in_height_and_place() -> None:
    trace = surface_figure(panels()).data[0]
    heights = np.asarray(trace.z)
    assert heights.shape == (ROWS, COLUMNS)
    assert heights.max() == 1000.0
    row, column = np.unravel_index(heights.argmax(), heights.shape)
    token, channel = np.asarray(trace.y), np.asarray(trace.x)
    assert token[row] <= 2 * 123 < token[row + 1]  # two tokens to a row
    assert channel[column] <= 456 < channel[column + 1]


def test_axes_say_what_they_show_and_what_was_pooled() -> None:
    scene = surface_figure(panels()).layout.scene3
    assert scene.zaxis.title.text == "|X| / s"
    assert scene.xaxis.title.text == "input channel (max of 4)"  # 700 channels on 192 columns
    assert scene.yaxis.title.text == "token (max of 8)"  # 300 rows of 2 on 96


def test_the_one_scale_button_takes_before_and_after_together() -> None:
    buttons = surface_figure(panels()).layout.updatemenus[0].buttons
    same = buttons[1].args[0]
    assert same["scene.zaxis.range"] == same["scene3.zaxis.range"] == [0.0, 3000.0]
    assert same["scene2.zaxis.range"] == same["scene4.zaxis.range"] == [0.0, 4000.0]


@pytest.mark.parametrize("values", [np.zeros((3, 4), np.float32), np.full((3, 4), 2.0, np.float32)])
def test_flat_or_dead_surfaces_are_drawn(values: np.ndarray) -> None:
    assert log_levels(values).shape == values.shape
    figure = surface_figure([Panel(values, "flat", "|X|", "token")])
    json.loads(figure.to_json())


def test_colours_follow_the_logarithm() -> None:
    values = np.geomspace(1.0, 1e4, 101).reshape(1, -1).astype(np.float32)
    levels = log_levels(values)[0]
    assert levels[-1] == 255
    assert np.all(np.diff(levels.astype(int)) >= 0)
    assert abs(int(levels[50]) - 127) <= 3  # 100 is half way between 1 and 10 000


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(
    ("theme", "papers"), [("light", ["#ffffff"]), ("dark", ["#111111"]), ("either", ["#ffffff", "#111111"])]
)
def test_text_and_series_can_be_told_from_the_paper(theme: str, papers: list[str]) -> None:
    ink = template(theme).layout.font.color  # type: ignore[arg-type]
    for paper in papers:
        assert contrast(ink, paper) >= 4.0
        assert min(contrast(colour, paper) for colour in SERIES[theme]) >= 3.0 - 0.5 * (theme == "either")


def test_an_unknown_theme_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"theme='sepia'.*'light', 'dark', 'either'"):
        template("sepia")  # type: ignore[arg-type]
