"""Whether a model is what its configuration makes, so that weights and configuration alone bring it back."""

import copy
from collections.abc import Sequence
from typing import Any

from sqviz.errors import SqvizError
from sqviz.models.lm import LM
from sqviz.quant import int8_attention
from sqviz.quant.kept_sinks import sinks_of
from sqviz.quant.scaled_linear import ScaledLinear


def check_ordinary(lm: LM) -> None:
    """Raise `SqvizError` unless the model is what its configuration makes: modules, names and shapes."""
    modules = dict(lm.model.named_modules())
    scaled = [name for name, module in modules.items() if isinstance(module, ScaledLinear)]
    if scaled:
        raise SqvizError(
            f"{_listed(scaled)} divide their input at run time, and no checkpoint has a place for that. Smooth without "
            "online=True: sqviz.smooth(lm, magnitudes, alpha, folds='all') folds wherever that is exact."
        )
    if sinks_of(lm) is not None:
        raise SqvizError(
            "the model keeps sinks (sqviz.keep_sinks), which no checkpoint has a place for. Export the one from before."
        )
    own = [name for name, module in modules.items() if type(module).__module__.startswith("sqviz.")]
    if own or int8_attention.uses(lm):
        raise SqvizError(
            f"the model is quantised already ({_listed(own or ['its attention'])}). Export the one that it was made "
            "from, with scheme=… for its codes; sqviz.save_int8 writes one that executes in integers."
        )
    _check_like_new(lm.model)


def _check_like_new(model: Any) -> None:
    """Raise `SqvizError` unless a model made anew from the configuration has tensors of the same names and shapes."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=True):
        new = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), trust_remote_code=False)
    made, there = ({name: tuple(t.shape) for name, t in one.state_dict().items()} for one in (new, model))
    odd = sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))
    if odd:
        name = odd[0]
        raise SqvizError(
            f"the model is not what its configuration makes: {name} is {there.get(name, 'missing')} and would be "
            f"{made.get(name, 'missing')} ({len(odd)} such tensors). Put lm.model.config right, or undo the change."
        )
    odd = sorted(name for name, tensor in model.named_parameters() if not tensor.is_floating_point())
    if odd:
        raise SqvizError(
            f"{_listed(odd)} are not in floating point: the model was loaded quantised. Load it in floats."
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
