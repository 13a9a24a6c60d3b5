"""The child of smoothing_peers.py for torchao: its SmoothQuant prototype, every linear of the blocks (peer_scoring.py).

torchao divides the input of each linear at run time, by an s of its own: nothing is folded, o_proj and down_proj are
smoothed as well. For static steps it keeps every calibration input: its observer that runs along (`use_running_absmax`)
fails there in 0.18.0, where it takes the arguments of the quantiser for a dictionary.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torchao.prototype.smoothquant import SmoothQuantConfig, SmoothQuantObservedLinear
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    PerRow,
    PerTensor,
    quantize_,
)

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.peer_scoring import Question, serve


def quantise(model: nn.Module, question: Question, calibration: list[Tensor]) -> nn.Module:
    dynamic = question["activations"] == "dynamic"
    base = (
        Int8DynamicActivationInt8WeightConfig(granularity=PerRow())
        if dynamic
        else Int8StaticActivationInt8WeightConfig(granularity=[PerTensor(), PerRow()])
    )
    options = {"base_config": base, "alpha": question["alpha"], "use_running_absmax": dynamic}
    quantize_(
        model,
        SmoothQuantConfig(step="prepare", **options),
        lambda module, name: isinstance(module, nn.Linear) and name != "lm_head",
    )
    with torch.no_grad():
        for ids in calibration:
            model(input_ids=ids[None], use_cache=False)
    quantize_(
        model,
        SmoothQuantConfig(step="convert", **options),
        lambda module, _: isinstance(module, SmoothQuantObservedLinear),
    )
    return model


if __name__ == "__main__":
    serve(quantise, ["torchao"])
