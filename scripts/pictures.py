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

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PAINT_MS = 2000  # until fonts, the first frame and its follow-ups are on screen
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


def main() -> None:
    """Draw every picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "pictures")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    magnitudes = sqviz.Magnitudes.embedded()
    explorer = sqviz.explore_smoothing(sqviz.load(), magnitudes, linear=LINEAR)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        page = Path(folder) / "explorer.html"
        explorer.to_html(page, linears="*.self_attn.q_proj", budget_bytes=40_000_000)
        for scheme in ("light", "dark"):
            photograph(browser, page, args.output / f"explorer-{scheme}.png", scheme, 1240, 700)
        page = Path(folder) / "outliers.html"
        magnitudes.outliers().to_html(page)
        photograph(browser, page, args.output / "outliers.png", "light", 1100, 700)
        browser.close()
    explorer.close()


if __name__ == "__main__":
    main()
