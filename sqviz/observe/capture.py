"""`capture`: one pass of text through the model, every linear's input reduced while it flows.

Per segment: a forward pass with hooks (hooks.py), the reduction inside the hook (reduce.py), and of the input itself
nothing kept but the map of the first segment. The model runs without its head. On the CPU the reduction takes a few
percent of the
pass, less than the head that is left out: `make bench` prints both.
"""

import dataclasses
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sqviz.corpus.segments import as_segments
from sqviz.errors import SqvizError
from sqviz.models.linears import Group, experts, folded_scales, groups, weight
from sqviz.models.lm import LM
from sqviz.observe.hooks import body, watch
from sqviz.observe.magnitudes import QUANTILES, TOP_TOKENS, GroupInfo, InputStats, Magnitudes, TopToken, WeightStats
from sqviz.observe.pieces import token_texts
from sqviz.observe.recorder import MapRecorder, Recorder
from sqviz.observe.reduce import Reduced, to_half
from sqviz.progress import Bar, CancelToken
from sqviz.progress import progress as progress_bar

WEIGHT_BINS = 128
CHUNK_ELEMENTS = 1 << 20  # of a weight, reduced at a time: the temporaries stay in the cache


def capture(
    lm: LM,
    text: Any,
    *,
    samples: int | None = 128,
    length: int = 512,
    seed: int = 0,
    batch: int = 1,
    map_tokens: int = 256,
    cancel: CancelToken | None = None,
    progress: bool = True,
) -> Magnitudes:
    """Statistics of every linear's input over a text, and of every weight.

    Args:
        lm: the model; left as it was.
        text: a str, `sqviz.text(...)`, a list of str, a path, or token ids (a LongTensor of one dimension).
        samples: how many segments of the text to read, at most; None: all. The thesis takes 512 sentences (§3.4.1).
        length: tokens per segment.
        seed: of the order in which documents are drawn.
        batch: segments per forward pass. The result does not depend on it beyond rounding.
        map_tokens: how many rows the map of the first segment has at most.
        cancel: stops the capture, within one layer's time; so do the progress bar's button and Ctrl-C.
        progress: draw a bar.

    Raises:
        NonFinite: an input of a linear has a NaN or an infinity; the message names linear and segment.
        TextTooShort, NoTokenizer, SqvizError: the text or a number does not fit; see `corpus.segments.as_segments`.
        Cancelled: on request; nothing is left of the capture, and everything else is as it was.
    """
    for name, value in {"batch": batch, "map_tokens": map_tokens}.items():
        if value < 1:
            raise SqvizError(f"{name}={value}: at least 1 is needed")
    chosen = []
    for segment in as_segments(lm, text, samples, length, seed):
        chosen.append(segment)
        if cancel is not None:
            cancel.check("capture")
    segments = torch.stack(chosen)
    with progress_bar(len(segments), "capture", unit="segments", cancel=cancel, show=progress) as bar:
        recorder = _run(lm, segments, batch, map_tokens, bar)
        weights = _weights(lm, groups(lm), bar)
        return _assemble(lm, segments, recorder, weights)


def with_maps(lm: LM, magnitudes: Magnitudes, *, map_tokens: int = 256) -> Magnitudes:
    """The capture with the maps of all linears, for one that was saved without (the one that ships was).

    Costs one pass of the first segment. `lm` has to be the model that was captured.
    """
    recorder = MapRecorder(map_tokens, magnitudes.length)
    with torch.no_grad(), watch(lm, recorder.see, routed=recorder.see_routed):
        body(lm)(magnitudes.tokens[None, : magnitudes.length].to(lm.device), use_cache=False)
    inputs: dict[str, InputStats] = {}
    for group in magnitudes.groups:
        stats = dataclasses.replace(magnitudes.inputs[group.name], map=recorder.maps[group.name])
        inputs |= dict.fromkeys(group.consumers, stats)
    weights = {
        name: dataclasses.replace(stats, map=weight_stats(weight(lm, name)).map)
        for name, stats in magnitudes.weights.items()
    }
    return dataclasses.replace(magnitudes, inputs=inputs, weights=weights)


def _run(lm: LM, segments: Int[Tensor, "segment token"], batch: int, map_tokens: int, bar: Bar) -> Recorder:
    """All segments through the model; one step of the bar per segment."""
    with ExitStack() as stack:
        threads = torch.get_num_threads()
        pool = stack.enter_context(ThreadPoolExecutor(threads - 1)) if threads > 1 else None
        recorder = Recorder(
            segments.numel(),
            segments.shape[1],
            map_tokens,
            lm.device,
            pool,
            threads,
            lambda: bar.cancel.check(bar.what),
        )
        # no_grad, not inference_mode: a model may keep a tensor of this pass (rope tables), and must still be trainable
        stack.enter_context(torch.no_grad())
        stack.enter_context(watch(lm, recorder.see, routed=recorder.see_routed))
        for ids in segments.split(batch):
            recorder.advance(ids.numel())
            body(lm)(ids.to(lm.device), use_cache=False)
            recorder.check_finite()
            bar.step(len(ids))
    return recorder


def _weights(lm: LM, every: Iterable[Group], bar: Bar) -> dict[str, WeightStats]:
    stats = {}
    for group in every:
        for name in group.consumers:
            inner = experts(lm, name) if name == group.name else 0  # experts that are not first share one input
            stats[name] = weight_stats(weight(lm, name), inner)
            bar.cancel.check(bar.what)
    return stats


@torch.no_grad()
def weight_stats(w: Float[Tensor, "out channel"], experts: int = 0) -> WeightStats:
    """Reduce a weight, some rows at a time: no copy of it is made.

    Args:
        w: on any device, of any float dtype.
        experts: if w stacks so many experts whose inputs differ, absmax per expert too.
    """
    run = max(1, -(-len(w) // WEIGHT_BINS))  # rows per bin of the map
    rows = max(1, CHUNK_ELEMENTS // max(w.shape[1] * run, 1)) * run
    bins, outs = [], []
    for chunk in w.split(rows):
        magnitude = chunk.abs()
        outs.append(magnitude.amax(1))
        whole = len(magnitude) // run * run
        bins.append(magnitude[:whole].view(-1, run, w.shape[1]).amax(1))
        if whole < len(magnitude):
            bins.append(magnitude[whole:].amax(0, keepdim=True))
    pooled = torch.cat(bins)
    return WeightStats(
        channel_absmax=pooled.amax(0).to("cpu", torch.float32),
        out_absmax=torch.cat(outs).to("cpu", torch.float32),
        map=to_half(pooled),
        expert_absmax=w.view(experts, -1, w.shape[1]).abs().amax(1).to("cpu", torch.float32) if experts else None,
    )


def _assemble(
    lm: LM, segments: Int[Tensor, "segment token"], recorder: Recorder, weights: dict[str, WeightStats]
) -> Magnitudes:
    tokens = segments.flatten()
    reduced = {name: reducer.finish(QUANTILES) for name, reducer in recorder.reducers.items()}
    top = {name: _top(stats) for name, stats in reduced.items()}
    ids = sorted({int(tokens[token]) for entries in top.values() for _, _, token in entries})
    texts = dict(zip(ids, token_texts(lm.tokenizer, ids), strict=True))
    infos: list[GroupInfo] = []
    inputs: dict[str, InputStats] = {}
    for group in groups(lm):
        tops = tuple(
            TopToken(value, channel, token, texts[int(tokens[token])], token % segments.shape[1])
            for value, channel, token in top[group.name]
        )
        stats = _input_stats(lm, group, recorder, reduced[group.name], tops)
        inputs |= dict.fromkeys(group.consumers, stats)
        infos.append(
            GroupInfo(group.name, group.block, group.kind, group.consumers, group.fold_kind, group.reason, group.title)
        )
    return Magnitudes(
        inputs=inputs,
        weights=weights,
        groups=tuple(infos),
        tokens=tokens,
        length=segments.shape[1],
        token_texts=token_texts(lm.tokenizer, segments[0].tolist()),
        model=lm.name,
        scales={name: scale.detach().to("cpu", copy=True) for name, scale in folded_scales(lm).items()},
    )


def _input_stats(lm: LM, group: Group, recorder: Recorder, reduced: Reduced, top: tuple[TopToken, ...]) -> InputStats:
    absmax, counts = recorder.expert_absmax.get(group.name), recorder.expert_tokens.get(group.name)
    every = range(experts(lm, group.name))
    dead = torch.zeros_like(reduced.minimum)
    return InputStats(
        minimum=reduced.minimum,
        maximum=reduced.maximum,
        mean=reduced.mean,
        quantiles=reduced.quantiles,
        tensor_quantiles=reduced.tensor_quantiles,
        token_absmax=reduced.token_absmax,
        channel_token=reduced.channel_token,
        top=top,
        map=recorder.first.maps[group.name],
        expert_absmax=torch.stack([absmax[e].cpu() if e in absmax else dead for e in every]) if absmax else None,
        expert_tokens=torch.tensor([counts.get(e, 0) for e in every]) if counts else None,
    )


def _top(reduced: Reduced) -> list[tuple[float, int, int]]:
    """(value, channel, token) of the largest tokens."""
    values, tokens = reduced.token_absmax.topk(min(TOP_TOKENS, len(reduced.token_absmax)))
    channels = reduced.token_channel[tokens]
    return list(zip(values.tolist(), channels.tolist(), tokens.tolist(), strict=True))
