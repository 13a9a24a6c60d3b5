"""The experiments of the thesis's chapter 4 on the embedded model; about half an hour on two cores.

    python -m benchmarks.chapter4 [figure41 table41 table42 table45 table46 figure47 figure48]

Prints Markdown tables, those of benchmarks/README.md. Perplexities do not depend on the machine; figure48 is timed and
wants a quiet one. ARC itself (Table 4.5) needs the hub: `--arc hub:allenai/ai2_arc/ARC-Easy/test`; without it, 60
school questions written for this purpose are asked five times each, their choices in another order every time.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas

import sqviz
from sqviz.streaming.policies import Policy

QUESTIONS = Path(__file__).parent / "data" / "questions.jsonl"
TIMES = 5
TOKENS = 16_384
Given = argparse.Namespace


def show(title: str, frame: pandas.DataFrame) -> None:
    """A Markdown table."""
    print(f"\n### {title}\n")
    names = [frame.index.name or "", *map(str, frame.columns)]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for label, row in frame.iterrows():
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row]
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


def perplexities(lm: sqviz.LM, ids, policies: Mapping[str, Policy], limit: int = TOKENS) -> pandas.DataFrame:
    """Perplexity of the same text under each."""
    found = sqviz.compare_policies(lm, ids, policies, limit=limit)
    return found.to_frame()[["perplexity", "last quarter", "tokens"]].rename_axis("cache")


def figure41(lm: sqviz.LM, ids, _: Given) -> None:
    """Perplexity against position: dense far beyond the trained context, window and sinks of 256, recomputation."""
    trained, stop = lm.config.max_position_embeddings, 12_288
    policies = sqviz.four_policies(256)
    slow = policies.pop("window, recomputed")
    found = dict(sqviz.compare_policies(lm, ids, policies, limit=stop).results)
    found["window, recomputed"] = sqviz.streaming_perplexity(lm, ids[:1024], slow)
    ends = (256, 512, 1024, 4096, trained, 10_240, stop)
    rows = {
        label: {
            f"{begin:,} … {end:,}": (
                float(result.nll[begin : end - 1].mean().exp()) if len(result.nll) >= end - 1 else ""
            )
            for begin, end in zip((0, *ends), ends, strict=False)
        }
        for label, result in found.items()
    }
    show(
        f"Figure 4.1: perplexity of the tokens between two positions; trained with {trained:,}",
        pandas.DataFrame.from_dict(rows, orient="index"),
    )


def table41(lm: sqviz.LM, ids, _: Given) -> None:
    """Are sinks about position or about content?"""
    rows = {
        label: sqviz.streaming_perplexity(lm, ids[:TOKENS], policy)
        for label, policy in sqviz.sink_counts(256, (0, 4)).items()
    }
    breaks = sqviz.with_line_breaks(lm, ids[:TOKENS], 4)
    rows['4 "\\n" + 252'] = sqviz.streaming_perplexity(lm, breaks, sqviz.Sinks(4, 252))
    show(
        "Table 4.1: the first four tokens replaced by line breaks",
        pandas.DataFrame({"perplexity": {label: result.perplexity for label, result in rows.items()}}),
    )


def table42(lm: sqviz.LM, ids, _: Given) -> None:
    """How many sinks?"""
    show("Table 4.2: number of sinks", perplexities(lm, ids, sqviz.sink_counts(256)))


def table46(lm: sqviz.LM, ids, _: Given) -> None:
    """Does a larger cache help?"""
    show("Table 4.6: size of the cache", perplexities(lm, ids, sqviz.cache_sizes((128, 256, 512, 1024, 2048))))


def table45(lm: sqviz.LM, _: object, given: Given) -> None:
    """Multiple choice as one endless stream."""
    with tempfile.TemporaryDirectory() as folder:
        stream = sqviz.arc_stream(lm, given.arc or _asked_again(Path(folder)))
    rows = {"one-shot, each question alone": sqviz.score_alone(lm, stream)}
    for label, policy in (("window 1024", sqviz.Window(1024)), ("4 + 1020", sqviz.Sinks(4, 1020))):
        rows[label] = sqviz.score_answers(lm, stream, policy)
    frame = {label: {"accuracy %": 100 * float(right.double().mean())} for label, right in rows.items()}
    show(
        f"Table 4.5: {given.arc or QUESTIONS.name}, {len(stream.answers)} questions in {len(stream.ids):,} tokens",
        pandas.DataFrame.from_dict(frame, orient="index"),
    )


def _asked_again(folder: Path) -> Path:
    """The questions `TIMES` times over, in other orders, with other letters for the right choices."""
    chance, lines = random.Random(0), []
    asked = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    for _ in range(TIMES):
        chance.shuffle(asked)
        for question in asked:
            choices = question["choices"]
            right, texts = choices["text"][choices["label"].index(question["answerKey"])], list(choices["text"])
            chance.shuffle(texts)
            key = choices["label"][texts.index(right)]
            lines.append(json.dumps(question | {"choices": choices | {"text": texts}, "answerKey": key}))
    file = folder / "questions.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def figure47(lm: sqviz.LM, _: object, __: Given) -> None:
    """StreamEval: exact match against position, answers 20 lines back; then how far back with which cache."""
    stream = sqviz.streameval(lm, 1000)
    policies = {"dense": sqviz.Dense(), "window 1024": sqviz.Window(1024), "4 + 1020": sqviz.Sinks(4, 1020)}
    at, ends = stream.answers[:, 0], (1024, 2048, 4096, 8192, 12_288, len(stream.ids))
    rows = {}
    for label, policy in policies.items():
        right = sqviz.score_answers(lm, stream, policy).double()
        rows[label] = {
            f"{begin:,} … {end:,}": 100 * float(right[(at >= begin) & (at < end)].mean())
            for begin, end in zip((0, *ends), ends, strict=False)
        }
    title = f"Figure 4.7: StreamEval, exact match in % by position; {len(at)} questions"
    show(title, pandas.DataFrame.from_dict(rows, orient="index"))
    rows = {}
    for back in (1, 5, 20, 60):
        stream = sqviz.streameval(lm, 300, back=back)
        rows[back] = {
            label: 100 * float(sqviz.score_answers(lm, stream, policy).double().mean())
            for label, policy in sqviz.cache_sizes((256, 512, 1024, 2048)).items()
        }
    title = "StreamEval: exact match in % by lines between fact and question, and cache; 300 lines"
    show(title, pandas.DataFrame.from_dict(rows, orient="index").rename_axis("lines back"))


def figure48(lm: sqviz.LM, ids, given: Given) -> None:
    """Latency and memory against cache size."""
    found = sqviz.stream_cost(lm, tokens=ids)
    frame = found.to_frame().reset_index(level="policy")
    show("Figure 4.8: cost of a token", frame[["policy", "milliseconds", "of a dense step", "peak MB", "cache MB"]])
    if given.pictures:
        (given.pictures / "stream-cost.png").write_bytes(found.to_png())


EXPERIMENTS: dict[str, Callable[[sqviz.LM, object, Given], None]] = {
    run.__name__: run for run in (figure41, table41, table42, table45, table46, figure47, figure48)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(EXPERIMENTS), help=", ".join(EXPERIMENTS))
    parser.add_argument("--arc", help="a JSONL file in ARC's form, or hub:dataset/config/split")
    parser.add_argument("--pictures", type=Path, help="a folder for pictures")
    given = parser.parse_args()
    if unknown := set(given.names) - set(EXPERIMENTS):
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(EXPERIMENTS)}")
    lm = sqviz.load()
    ids = sqviz.text().tokens(lm.tokenizer, TOKENS)
    print(f"{lm}, the first {TOKENS:,} tokens of the embedded text")
    for name in given.names:
        EXPERIMENTS[name](lm, ids, given)


if __name__ == "__main__":
    main()
