"""Some inputs of every linear, for what is fitted to them: the largest of each calibration segment, and random ones."""

import dataclasses
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sqviz.models.linears import Group, experts
from sqviz.models.lm import LM
from sqviz.observe.hooks import Routing, body, watch
from sqviz.progress import CancelToken

SEGMENTS = 4
LARGEST = 6
RANDOM = 42


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Inputs of the linears of a model.

    Attributes:
        shared: [row channel] by the name of the group's first linear.
        by_expert: the same for the second linear of fused experts, one tensor per expert; empty for one that got no
            token.
    """

    shared: dict[str, Float[Tensor, "row channel"]]
    by_expert: dict[str, list[Float[Tensor, "row channel"]]]

    def of(self, group: Group, expert: int | None = None) -> Float[Tensor, "row channel"]:
        """Inputs of a group, or of one of its experts where these read inputs of their own."""
        if group.name in self.by_expert:
            each = self.by_expert[group.name]
            return torch.cat(each) if expert is None else each[expert]
        return self.shared[group.name]

    def divided(self, scales: Mapping[str, Float[Tensor, "*expert channel"]]) -> "Rows":
        """X / s: the inputs of a model that was smoothed further by these s, by linear name."""

        def by(name: str, x: Tensor, expert: int | None = None) -> Tensor:
            s = scales.get(name)
            if s is None:
                return x
            return x / (s if expert is None or s.ndim == 1 else s[expert]).to(x)

        return Rows(
            {name: by(name, x) for name, x in self.shared.items()},
            {name: [by(name, x, e) for e, x in enumerate(each)] for name, each in self.by_expert.items()},
        )


def sample_rows(
    lm: LM, segments: Int64[Tensor, "segment token"], *, seed: int = 0, cancel: CancelToken | None = None
) -> Rows:
    """The LARGEST and RANDOM other inputs of every linear from each segment. `lm` is left as it was.

    Raises `Cancelled` between two segments.
    """
    generator = torch.Generator().manual_seed(seed)
    shared: dict[str, list[Tensor]] = {}
    by_expert: dict[str, list[list[Tensor]]] = {}

    def see(group: Group, x: Float[Tensor, "token channel"]) -> None:
        shared.setdefault(group.name, []).append(_some(x, generator))

    def see_routed(group: Group, x: Float[Tensor, "row channel"], routing: Routing) -> None:
        each = by_expert.setdefault(group.name, [[x[:0]] for _ in range(experts(lm, group.name))])
        for expert in routing.expert.unique().tolist():
            each[expert].append(_some(x[routing.expert == expert], generator))

    with torch.no_grad(), watch(lm, see, routed=see_routed):
        for segment in segments:
            if cancel is not None:
                cancel.check("sampling the inputs of linears")
            body(lm)(segment[None].to(lm.device), use_cache=False)
    return Rows(
        {name: torch.cat(parts) for name, parts in shared.items()},
        {name: [torch.cat(parts) for parts in each] for name, each in by_expert.items()},
    )


def _some(x: Float[Tensor, "token channel"], generator: torch.Generator) -> Float[Tensor, "row channel"]:
    if len(x) <= LARGEST + RANDOM:
        return x.clone()
    order = x.abs().amax(1).argsort(descending=True)
    rest = order[LARGEST:]
    drawn = torch.randperm(len(rest), generator=generator)[:RANDOM].to(rest.device)
    return x[torch.cat([order[:LARGEST], rest[drawn]])]
