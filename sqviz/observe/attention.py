"""Where attention goes: maps of every layer and head, averaged over many short texts or of one long text.

    attention_maps(lm)                                  thesis Figure 1.4: 256 sentences of 16 tokens, logits
    attention_maps(lm, "a long text …", sentences=None)   one text, pooled to at most 128 × 128 cells per head

One pass over the text, reduced layer by layer while it flows (attention_tap.py): full maps of all heads are never kept,
nothing of the model is replaced, and any softmax attention will do. Beside the maps stand what they come down to: the
share of attention that each key gets, the entropy, and how large the same tokens' activations are.
"""

import dataclasses
import json
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sqviz.corpus.segments import Text, as_segments, as_tokens
from sqviz.errors import NonFinite, SqvizError
from sqviz.models.lm import LM
from sqviz.observe.attention_tap import LOT, Scores, Tap
from sqviz.observe.hooks import body
from sqviz.observe.pieces import token_texts
from sqviz.progress import CancelToken
from sqviz.progress import progress as progress_bar
from sqviz.tensorfile import write_tensors

if TYPE_CHECKING:
    from sqviz.widgets.attention import AttentionView

CELLS = 128
SINKS = 4
TOKENS_PER_PASS = 512
FORMAT, VERSION = "sqviz-attention", 1
_TENSORS = ("maps", "share", "entropy", "norms", "tokens")


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionMaps:
    """Attention of every layer and head.

    Attributes:
        maps: mean over the sentences of the logits q·k·scale (Figure 1.4) or of the probabilities; NaN where no query
            of a cell may look at its keys. Cells of more than one token hold their largest value.
        logits: whether `maps` holds logits.
        share: part of its attention that a query gives to each key, averaged over queries and sentences; the first
            `SINKS` queries, which have no choice, are left out. Sums to 1 over keys.
        entropy: of a query's attention, in nats, averaged over the same queries.
        norms: largest |x| of each token's hidden state behind each layer, averaged over sentences.
        tokens: ids of the first sentence, or of the text.
        token_texts: how they read.
        cell: tokens per row and column of a cell.
        sentences: how many were averaged.
        model: name of the model.
    """

    maps: Float[Tensor, "layer head row column"]
    logits: bool
    share: Float[Tensor, "layer head key"]
    entropy: Float[Tensor, "layer head"]
    norms: Float[Tensor, "layer token"]
    tokens: Int64[Tensor, " token"]
    token_texts: tuple[str, ...]
    cell: int
    sentences: int
    model: str

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.maps.shape[0]

    @property
    def heads(self) -> int:
        """Query heads per layer."""
        return self.maps.shape[1]

    @property
    def length(self) -> int:
        """Tokens per sentence."""
        return self.share.shape[2]

    def sink_mass(self, first: int = SINKS) -> Float[Tensor, "layer head"]:
        """Share of attention on the first keys."""
        return self.share[:, :, :first].sum(-1)

    def heatmap(self, lm: LM | None = None, **state: Any) -> "AttentionView":
        """All layers and heads as small multiples; given the model, an opened head is shown token by token.

        `state`: initial traits of `AttentionView`, such as `sort="sink"`.
        """
        from sqviz.widgets.attention import AttentionView

        return AttentionView(self, lm, **state)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return self.heatmap()._repr_mimebundle_(**kwargs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, in place of what may be there once it is complete.

        Raises `OSError` if it cannot be written; what was there stays.
        """
        table = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in _TENSORS and field.name != "token_texts"
        }
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "table": json.dumps(table),
            "token_texts": json.dumps(self.token_texts),
        }
        write_tensors({name: getattr(self, name).contiguous() for name in _TENSORS}, metadata, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "AttentionMaps":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            SqvizError: it holds no attention maps, is damaged, or is of another version.
        """
        if not Path(path).exists():
            raise FileNotFoundError(f"there is no file {str(path)!r}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if (metadata.get("format"), metadata.get("version")) != (FORMAT, str(VERSION)):
                    found = f"{metadata.get('format', 'another kind of file')} {metadata.get('version', '')}".strip()
                    raise SqvizError(f"{str(path)!r} is {found}; this sqviz reads {FORMAT} {VERSION}")
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
            table = json.loads(metadata["table"])
            return cls(**tensors, **table, token_texts=tuple(json.loads(metadata["token_texts"])))
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as broken:
            raise SqvizError(f"{str(path)!r} is damaged ({broken})") from broken

    def __repr__(self) -> str:
        what = "logits" if self.logits else "probabilities"
        return (
            f"AttentionMaps({self.model}: {self.layers} layers x {self.heads} heads, {what} over {self.sentences} x "
            f"{self.length} tokens)"
        )


def attention_maps(
    lm: LM,
    text: Text | None = None,
    *,
    sentences: int | None = 256,
    length: int | None = None,
    logits: bool = True,
    cells: int = CELLS,
    seed: int = 0,
    cancel: CancelToken | None = None,
    progress: bool = False,
) -> AttentionMaps:
    """Attention of every layer and head, over many sentences or over one text (thesis Figures 1.4 and 4.2).

    Args:
        lm: the model; left as it was.
        text: a text, source, list, path or ids; the embedded text by default.
        sentences: pieces of `length` tokens to average over, at most; None: the whole text as one.
        length: tokens of each sentence, 16 by default; of one text as many as it has and the model was trained with.
        logits: mean of the logits before the softmax; otherwise of the probabilities.
        cells: most rows and columns of a map; longer texts are pooled, each cell its largest value.
        seed: of the order in which documents are drawn.
        cancel: stops the work between two layers.
        progress: show a progress bar.

    Raises:
        SqvizError: a model without softmax attention in some layer; numbers that leave nothing to show.
        TextTooShort: not even one sentence.
        NonFinite: NaN among the scores.
        Cancelled: stopped through `cancel`.
    """
    if cells < 1 or (sentences is not None and sentences < 1) or (length is not None and length < 1):
        raise SqvizError(f"cells={cells}, sentences={sentences}, length={length}: at least 1 is needed")
    if text is None:
        from sqviz.corpus.source import text as embedded

        text = embedded()
    if sentences is None:
        trained = getattr(lm.config, "max_position_embeddings", None)
        most = [number for number in (length, trained) if isinstance(number, int)]
        batch = as_tokens(lm, text, min(most, default=None))[None]
        if batch.shape[1] == 0:
            raise SqvizError("the text has no token")
    else:
        batch = torch.stack(list(as_segments(lm, text, sentences, length or 16, seed)))
    sums = _Sums(lm, batch.shape[1], len(batch), logits, cells)
    passes = batch.split(max(1, TOKENS_PER_PASS // batch.shape[1]))
    with progress_bar(len(batch), "attention maps", unit="sentences", cancel=cancel, show=progress) as bar:

        def see(scores: Scores) -> None:
            if cancel is not None:
                cancel.check("attention maps")
            sums.add(scores)

        with torch.no_grad(), Tap(lm, see) as tap, _norms(lm, sums):
            for part in passes:
                body(lm)(input_ids=part.to(lm.device), use_cache=False)
                tap.check()
                bar.step(len(part))
    return sums.result(batch[0])


def head_scores(
    lm: LM, tokens: Int64[Tensor, " token"], layer: int, head: int, *, logits: bool = True
) -> Float[Tensor, "query key"]:
    """One head's map of one text, token by token; the model runs up to this layer only. −∞ / 0 beyond the mask."""
    found: list[Tensor] = []

    def see(scores: Scores) -> None:
        if scores.layer == layer:
            found.extend(part[0, head].cpu() for _, part in scores.lots())
            raise _Enough

    with torch.no_grad(), Tap(lm, see) as tap:
        try:
            body(lm)(input_ids=tokens[None].to(lm.device), use_cache=False)
            tap.check()
        except _Enough:
            pass
    if not found:
        raise SqvizError(f"{lm.name} has no layer {layer}")
    scores = torch.cat(found)
    return scores if logits else scores.softmax(-1)


class _Enough(Exception):
    """The layer was seen; the rest of the pass is not needed."""


class _Sums:
    """What is kept of all sentences while they flow."""

    def __init__(self, lm: LM, length: int, sentences: int, logits: bool, cells: int) -> None:
        self.lm, self.length, self.sentences, self.logits = lm, length, sentences, logits
        self.cell = -(-length // cells)
        self.skip = min(SINKS, length - 1)
        self.maps: dict[int, Tensor] = {}
        self.share: dict[int, Tensor] = {}
        self.entropy: dict[int, Tensor] = {}
        self.norms: dict[int, Tensor] = {}

    def add(self, scores: Scores) -> None:
        """One layer of one pass."""
        rows: list[Tensor] = []
        shares = entropies = torch.zeros(())
        size = max(1, LOT // self.cell) * self.cell
        for first, part in scores.lots(size):
            if bool(torch.isnan(part).any()):
                raise NonFinite(
                    f"layer {scores.layer} of {self.lm.name} has NaN attention scores. Load it in float32 or bfloat16"
                )
            chances = part.softmax(-1)
            shown = part if self.logits else chances.masked_fill(part == -torch.inf, -torch.inf)
            rows.append(_pool(shown, self.cell).sum(0))
            settled = chances[:, :, max(0, self.skip - first) :]
            shares = shares + settled.sum((0, 2))
            entropies = entropies - torch.special.xlogy(settled, settled).sum((0, 2, 3))
        for name, value in (("maps", torch.cat(rows, 1)), ("share", shares), ("entropy", entropies)):
            _accumulate(getattr(self, name), scores.layer, value)

    def add_norms(self, layer: int, hidden: Float[Tensor, "batch token channel"]) -> None:
        """The hidden states behind one layer."""
        _accumulate(self.norms, layer, hidden.float().abs().amax(-1).sum(0))

    def result(self, tokens: Int64[Tensor, " token"]) -> AttentionMaps:
        """All layers."""
        layers = sorted(self.maps)
        stack = lambda sums: torch.stack([sums[layer] for layer in layers]).cpu()  # noqa: E731
        queries = (self.length - self.skip) * self.sentences
        maps = stack(self.maps) / self.sentences
        return AttentionMaps(
            maps=maps.masked_fill_(maps == -torch.inf, torch.nan).float(),
            logits=self.logits,
            share=(stack(self.share) / queries).float(),
            entropy=(stack(self.entropy) / queries).float(),
            norms=(stack(self.norms) / self.sentences).float(),
            tokens=tokens,
            token_texts=token_texts(self.lm.tokenizer, tokens.tolist()),
            cell=self.cell,
            sentences=self.sentences,
            model=self.lm.name,
        )


def _accumulate(sums: dict[int, Tensor], layer: int, value: Any) -> None:
    sums[layer] = value if layer not in sums else sums[layer] + value


def _pool(x: Float[Tensor, "batch head query key"], cell: int) -> Float[Tensor, "batch head row column"]:
    """The largest value of each cell; what is beyond the edges does not count."""
    if cell == 1:
        return x
    batch, head, query, key = x.shape
    x = torch.nn.functional.pad(x, (0, -key % cell, 0, -query % cell), value=-torch.inf)
    return x.view(batch, head, x.shape[2] // cell, cell, x.shape[3] // cell, cell).amax((3, 5))


class _norms:
    """Hooks on the blocks for as long as the `with` block lasts."""

    def __init__(self, lm: LM, sums: _Sums) -> None:
        self._lm, self._sums, self._thread = lm, sums, threading.get_ident()
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for index, block in enumerate(self._lm.blocks):

            def after(_: Any, __: Any, output: Any, index: int = index) -> None:
                if threading.get_ident() == self._thread:  # another thread may use the same model
                    self._sums.add_norms(index, output[0] if isinstance(output, tuple) else output)

            self._handles.append(block.register_forward_hook(after))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
