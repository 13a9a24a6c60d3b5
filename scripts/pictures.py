"""Make the pictures of the read-me: the views on the embedded model, drawn by Chromium from their exported pages.

    .venv/bin/python scripts/pictures.py            # writes docs/pictures/*.png

Needs a Chromium (`sqviz doctor` says where it is looked for).
"""

import argparse
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

import sqviz
from sqviz.doctor import find_chromium
from sqviz.widgets.stream_explorer import StreamExplorer

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PAINT_MS = 2000  # until fonts, the first frame and its follow-ups are on screen
TOKENS = 160
LINEAR = "model.layers.12.self_attn.q_proj"


def photograph(browser: Browser, page_file: Path, picture: Path, scheme: str, width: int, height: int) -> None:
    """Open an exported page in light or dark and save what is seen, at twice the resolution."""
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=2)
    page.goto(page_file.as_uri())
    page.add_style_tag(content="#page-theme { display: none }")
    page.wait_for_timeout(PAINT_MS)
    page.screenshot(path=picture, full_page=True)
    page.close()
    print(f"{picture}  {picture.stat().st_size / 1e3:.0f} kB")


def streams(lm: sqviz.LM) -> StreamExplorer:
    """Three lanes that have read long enough for the window to break."""
    view = sqviz.explore_stream(lm, sinks=4, recent=60)
    view.start()
    while min((track.count for track in view.tracks.values()), default=0) < TOKENS or len(view.tracks) < 3:
        view.wait(0.5)
    view.pause()
    view.wait()
    return view


def main() -> None:
    """Draw every picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "pictures")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    lm, magnitudes = sqviz.load(), sqviz.Magnitudes.embedded()
    explorer, lanes = sqviz.explore_smoothing(lm, magnitudes, linear=LINEAR), streams(lm)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        page = Path(folder) / "explorer.html"
        explorer.to_html(page, linears="*.self_attn.q_proj", budget_bytes=40_000_000)
        for scheme in ("light", "dark"):
            photograph(browser, page, args.output / f"explorer-{scheme}.png", scheme, 1240, 700)
        page = Path(folder) / "outliers.html"
        magnitudes.outliers().to_html(page)
        photograph(browser, page, args.output / "outliers.png", "light", 1100, 700)
        for name, view, width in (("attention", sqviz.attention_maps(lm).heatmap(), 1100), ("streams", lanes, 1240)):
            view.to_html(page)
            photograph(browser, page, args.output / f"{name}.png", "light", width, 700)
        browser.close()
    explorer.close()
    lanes.close()


if __name__ == "__main__":
    main()
