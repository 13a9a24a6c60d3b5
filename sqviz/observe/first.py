"""Makes `first.safetensors`: the small capture that ships, with which a notebook's first cell draws at once.

    python -m sqviz.observe.first [PATH]

The embedded model over 8 segments of 256 tokens of the embedded text: vectors of every linear, maps of a few. Run it
again when the format (store.py), the embedded model or what a capture holds has changed.
"""

import sys
from pathlib import Path

PATH = Path(__file__).with_name("first.safetensors")
SAMPLES, LENGTH, MAP_TOKENS = 8, 256, 128
MAPPED = (
    "model.layers.10.self_attn.q_proj",
    "model.layers.10.mlp.gate_proj",
    "model.layers.11.mlp.down_proj",
    "model.layers.28.self_attn.q_proj",
    "model.layers.28.mlp.gate_proj",
    "model.layers.28.mlp.down_proj",
)


def make(path: Path = PATH) -> Path:
    """Capture the embedded model and write the compact file."""
    import sqviz

    magnitudes = sqviz.capture(sqviz.load(), sqviz.text(), samples=SAMPLES, length=LENGTH, map_tokens=MAP_TOKENS)
    magnitudes.save(path, compact=True, maps=MAPPED)
    return path


if __name__ == "__main__":
    made = make(Path(sys.argv[1]) if sys.argv[1:] else PATH)
    print(f"{made}: {made.stat().st_size / 1e6:.1f} MB")
