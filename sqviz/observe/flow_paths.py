"""The blocks of a model and the linears in each, as paths: what a `Flow` watches."""

from collections.abc import Mapping

from sqviz.models.linears import experts, groups
from sqviz.models.lm import LM

Paths = Mapping[int, Mapping[str, bool]]
"""By block: path of each linear, or of the module that fuses experts, and whether it is the latter."""


def linear_paths(lm: LM) -> Paths:
    """The modules of every block that are linears or fuse those of experts."""
    found: dict[int, dict[str, bool]] = {}
    for group in groups(lm):
        for name in group.consumers:
            fused = bool(experts(lm, name))
            path = name.rpartition(".")[0] if fused else name
            found.setdefault(group.block, {})[path.removeprefix(f"{lm.arch.blocks}.{group.block}.")] = fused
    return found
