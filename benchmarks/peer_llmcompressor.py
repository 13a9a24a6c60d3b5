"""The child of smoothing_peers.py and fold_peers.py for llm-compressor: SmoothQuantModifier, then round to nearest.

It folds into norms, as the thesis does: inputs of attention and MLP. Static steps come from `static_minmax`, the
extrema of all calibration inputs as in sqviz and torchao; its default, a moving average of them, is asked for by
{"observer": "minmax"}.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.peer_scoring import Question, serve

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}  # between the imports: llmcompressor prints when imported

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers import Modifier  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier  # noqa: E402
from torch import Tensor, nn  # noqa: E402


def quantise(model: nn.Module, question: Question, calibration: list[Tensor]) -> nn.Module:
    if question["activations"] == "dynamic":
        modifier = QuantizationModifier(targets="Linear", ignore=["lm_head"], scheme="W8A8")
    else:
        inputs = QuantizationArgs(
            **INT8, strategy="tensor", dynamic=False, observer=question.get("observer", "static_minmax")
        )
        scheme = QuantizationScheme(
            targets=["Linear"], weights=QuantizationArgs(**INT8, strategy="channel"), input_activations=inputs
        )
        modifier = QuantizationModifier(ignore=["lm_head"], config_groups={"group_0": scheme})
    smoothing = [] if question["alpha"] is None else [SmoothQuantModifier(smoothing_strength=question["alpha"])]
    return run(model, [*smoothing, modifier], calibration)


def smooth(model: nn.Module, calibration: list[Tensor]) -> nn.Module:
    return run(model, [SmoothQuantModifier()], calibration)


def run(model: nn.Module, recipe: list[Modifier], calibration: list[Tensor]) -> nn.Module:
    ids = [segment.tolist() for segment in calibration]
    return oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}),
        recipe=recipe,
        num_calibration_samples=len(ids),
        max_seq_length=len(ids[0]),
        shuffle_calibration_samples=False,
    )


if __name__ == "__main__":
    serve(quantise, ["llmcompressor", "compressed-tensors"], smooth)
