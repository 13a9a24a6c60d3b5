"""What weights take: a model is built on the meta device, where tensors have shapes and no memory, and counted.

A configuration of 530 billion weights takes a second and no memory. The parameters come apart into

    linears       of the blocks: what a scheme quantises, in the dtype where there is none; their steps
    embeddings    of tokens, and lm_head; one matrix where they are tied
    rest          norms, biases, learned positions, a mixture's router: always in the dtype

Buffers are not counted. Quantised weights are packed without gaps; a step is a float32, and so is a zero point.

Tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053): a linear that a norm feeds is split by its rows, one that
reads what those made (o_proj, down_proj) by its input channels; rows of keys and values follow their heads (kv_bytes);
embeddings are split by tokens. MLA's projections to latents and everything in `rest` lie on every device.
"""

import collections
import copy
import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import nn

from sqviz.errors import UnknownArchitecture
from sqviz.evaluation.kv_bytes import STEP_BYTES, heads_of
from sqviz.models.arch import ARCHS
from sqviz.models.convert import class_name
from sqviz.models.explain import explained
from sqviz.models.linears import experts, groups, weight
from sqviz.models.lm import LM
from sqviz.quant.linear import is_router
from sqviz.quant.schemes import Scheme

HEAD_BITS = 8
_KEYS_AND_VALUES = ("k_proj", "v_proj")
_FUSED = ("query_key_value", "c_attn", "Wqkv", "qkv_proj")
_TO_LATENTS = ("q_a_proj", "kv_a_proj_with_mqa")


@dataclasses.dataclass(frozen=True)
class Linear:
    """Linears of one name and shape.

    Attributes:
        name: path in the block.
        out, channels: shape of the weight.
        copies: experts that are fused; 1 for an ordinary linear.
        split: what tensor parallelism splits: "rows", "channels" or "nothing".
        kv_rows: rows that make keys and values.
        router: it chooses among experts and is never quantised.
    """

    name: str
    out: int
    channels: int
    copies: int = 1
    split: Literal["rows", "channels", "nothing"] = "rows"
    kv_rows: int = 0
    router: bool = False

    def held(self, devices: int, kv_share: Fraction) -> tuple[int, int]:
        """(rows, channels) on a device that holds this share of the key/value heads."""
        if self.split == "nothing":
            return self.out, self.channels
        if self.split == "channels":
            return self.out, -(-self.channels // devices)
        return -(-(self.out - self.kv_rows) // devices) + -(-self.kv_rows * kv_share // 1), self.channels


@dataclasses.dataclass(frozen=True)
class WeightBytes:
    """Bytes on one device: weights of linears, their steps, embeddings and head, and the rest."""

    linears: int
    steps: int
    embeddings: int
    rest: int


@dataclasses.dataclass(frozen=True)
class Weights:
    """The parameters of a model, counted.

    Attributes:
        parameters: how many; tied ones once.
        linears: those of the blocks, and how many there are of each.
        vocabulary, hidden: shape of the embedding.
        embedding: elements of the embedding of tokens.
        head: elements of lm_head that are not the embedding's; 0 if tied.
        rest: elements of everything else.
        learned_positions: it has a table of them, and no vectors beyond.
        known: it has a row in `ARCHS`; without one the linears were told by their type.
    """

    parameters: int
    linears: tuple[tuple[Linear, int], ...]
    vocabulary: int
    hidden: int
    embedding: int
    head: int
    rest: int
    learned_positions: bool
    known: bool

    def bytes(
        self, scheme: Scheme | None, itemsize: int, devices: int, kv_share: Fraction, *, head: bool
    ) -> WeightBytes:
        """Bytes on the fullest device. `head`: lm_head is INT8, and a tied embedding reads it."""
        linears = steps = 0
        rest = self.rest * itemsize
        for linear, count in self.linears:
            rows, channels = linear.held(devices, kv_share)
            elements, copies = rows * channels, count * linear.copies
            if linear.router:
                rest += copies * elements * itemsize
            elif scheme is None or scheme.weight is None:
                linears += copies * elements * itemsize
            else:
                linears += copies * -(-elements * scheme.bits_of_weights // 8)
                made = scheme.weight.step_shape((rows, channels), of="weight")
                steps += copies * made[0] * made[1] * STEP_BYTES * (1 if scheme.symmetric else 2)
        rows = -(-self.vocabulary // devices)
        embeddings = (self.embedding + self.head) // self.vocabulary * rows * itemsize
        if head:
            kept = 0 if not self.head else self.embedding
            embeddings = kept // self.vocabulary * rows * itemsize + rows * self.hidden * HEAD_BITS // 8
            steps += rows * STEP_BYTES
        return WeightBytes(linears, steps, embeddings, rest)


def on_meta(config: Any) -> nn.Module:
    """The causal language model of a configuration, on the meta device. The configuration is left as it is.

    Raises:
        UnknownArchitecture: transformers builds no causal language model of it.
        SqvizError: it cannot be built, with transformers' reason.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config.get_text_config())
    if not class_name(config):
        raise UnknownArchitecture(
            f"{type(config).__name__} ({config.model_type!r}): transformers has no causal language model for it"
        )
    with explained(config.model_type), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, attn_implementation="eager")


def weights_of(config: Any) -> Weights:
    """Count the parameters of the model that a transformers configuration describes.

    Raises:
        UnknownArchitecture: not a causal language model, or no row in `ARCHS` and no blocks that linears are found in.
    """
    model = on_meta(config)
    name = type(model).__name__
    found = _known(LM(model, None, ARCHS[name])) if name in ARCHS else _by_type(model)
    counted = tuple(collections.Counter(found).items())
    table, output = model.get_input_embeddings().weight, model.get_output_embeddings()  # type: ignore[operator]
    tied = output is None or output.weight is table
    total = sum(parameter.numel() for parameter in model.parameters())
    head = 0 if tied else output.weight.numel()
    linears = sum(linear.copies * linear.out * linear.channels * count for linear, count in counted)
    return Weights(
        parameters=total,
        linears=counted,
        vocabulary=table.shape[0],
        hidden=model.config.hidden_size,  # type: ignore[union-attr, arg-type]
        embedding=table.numel(),
        head=head,
        rest=total - linears - table.numel() - head,
        learned_positions=_has_positions(model),
        known=name in ARCHS,
    )


def _known(lm: LM) -> Iterator[Linear]:
    """The linears that the model's row in `ARCHS` names."""
    for group in groups(lm):
        prefix = f"{lm.arch.blocks}.{group.block}."
        for name in group.consumers:
            yield _linear(lm.model, name, prefix, reads_block=group.entry, router=is_router(lm, group, name))


def _by_type(model: nn.Module) -> Iterator[Linear]:
    """The linears of a model without a row: every one, and every stack of experts, in its longest list of blocks."""
    layers = model.config.num_hidden_layers  # type: ignore[union-attr]
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    place = next((name for name, blocks in lists.items() if len(blocks) == layers), None)
    if place is None:
        raise UnknownArchitecture(
            f"{type(model).__name__} has no row in sqviz.models.arch.ARCHS, and no list of its {layers} blocks was "
            f"found either; known: {', '.join(sorted(ARCHS))}"
        )
    for index, block in enumerate(lists[place]):
        prefix = f"{place}.{index}."
        for path, module in block.named_modules():
            if isinstance(module, nn.Linear) or hasattr(module, "nf"):
                yield _linear(model, prefix + path, prefix)
        for path, parameter in block.named_parameters():
            if parameter.ndim == 3:
                yield _linear(model, prefix + path, prefix)


def _linear(model: nn.Module, name: str, prefix: str, *, reads_block: bool = True, router: bool = False) -> Linear:
    stacked, fused = weight(model, name), experts(model, name)
    copies = fused or 1
    out, channels = stacked.shape[0] // copies, stacked.shape[1]
    leaf = name.rpartition(".")[2]
    split: Literal["rows", "channels", "nothing"] = "rows" if reads_block else "channels"
    if router or leaf in _TO_LATENTS:
        split = "nothing"
    kv_rows = 0
    if leaf in _KEYS_AND_VALUES:
        kv_rows = out
    elif leaf in _FUSED:
        heads = heads_of(model.config)
        kv_rows = heads.keys * (heads.key_dim + heads.value_dim)
    return Linear(name.removeprefix(prefix), out, channels, copies, split, kv_rows, router)


def _has_positions(model: nn.Module) -> bool:
    """Whether there is a table of learned positions: an embedding that is not that of the tokens."""
    tokens = model.get_input_embeddings()  # type: ignore[operator]
    return any(isinstance(module, nn.Embedding) and module is not tokens for module in model.modules())
