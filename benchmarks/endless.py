"""One text of a million tokens and more through one cache (thesis Figure 4.3); about three quarters of an hour.

    python -m benchmarks.endless [--tokens 1048576] [--cache 256]

Can be killed at any time: started again, it goes on from build/stream/. Writes benchmarks/results/endless.csv: for
every `ROW` tokens, the perplexity of these and of all so far, tokens per second, and the memory of the process; and
draws it (docs/pictures/endless.png; `--draw` does that alone).
"""

import argparse
import csv
from pathlib import Path

import torch

import sqviz
from sqviz.streaming.perplexity import StreamPerplexity
from sqviz.widgets.streams_still import cost_still

ROW = 16_384
FILE = Path(__file__).parent / "results" / "endless.csv"
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "endless.png"
HEAD = ("tokens", "perplexity", "perplexity so far", "tokens per second", "resident MB")


def rows(result: StreamPerplexity) -> list[tuple[float, ...]]:
    """The file's rows."""
    of_row, so_far = result.within(ROW), result.running
    found, before = [], torch.zeros(3, dtype=torch.float64)
    for mark in result.trace:
        if int(mark[0]) % ROW == 0:
            at = int(mark[0]) - 2  # the last one predicted
            speed = (mark[0] - before[0]) / (mark[1] - before[1])
            found.append((int(mark[0]), float(of_row[at]), float(so_far[at]), float(speed), float(mark[2]) / 1e6))
            before = mark
    return found


def draw() -> None:
    """The picture of what the file holds."""
    with FILE.open(encoding="utf-8") as file:
        found = [[float(value) for value in row] for row in list(csv.reader(file))[1:]]
    here, all_so_far = f"{ROW:,} tokens at a time", "all tokens so far"
    curve = {name: [(row[0] / 1000, row[k]) for row in found] for k, name in enumerate(HEAD)}
    panels = {
        "perplexity": {here: curve["perplexity"], all_so_far: curve["perplexity so far"]},
        "tokens per second": {here: curve["tokens per second"]},
        "resident memory, MB": {here: curve["resident MB"]},
    }
    title = "One text through one cache: SmolLM2-135M, 4 sinks and 252 recent keys"
    PICTURE.write_bytes(
        cost_still(
            panels,
            title,
            "two cores, float32, blocks of 256; dips in speed: other work on the machine",
            "thousand tokens read",
            log=False,
        ).png()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--cache", type=int, default=256)
    parser.add_argument("--draw", action="store_true", help="draw what is there; run nothing")
    given = parser.parse_args()
    if given.draw:
        draw()
        return
    lm = sqviz.load()
    ids = sqviz.text().tokens(lm.tokenizer, given.tokens)
    policy, last = sqviz.Sinks(4, given.cache - 4), [0]

    def see(read: int, nll: torch.Tensor) -> None:
        if read - last[0] >= ROW:
            last[0] = read
            print(f"{read:10,d} tokens: perplexity {nll.double().mean().exp():.3f}", flush=True)

    checkpoint = Path("build/stream") / f"endless_{len(ids)}_{given.cache}.safetensors"
    result = sqviz.streaming_perplexity(lm, ids, policy, checkpoint=checkpoint, every_seconds=60, on_block=see)
    print(result)
    FILE.parent.mkdir(exist_ok=True)
    with FILE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEAD)
        writer.writerows([f"{value:.6g}" if i else value for i, value in enumerate(row)] for row in rows(result))
    draw()


if __name__ == "__main__":
    main()
