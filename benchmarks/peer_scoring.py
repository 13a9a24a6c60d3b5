"""What the children of smoothing_peers.py share: they read questions, quantise a model anew for each, and score it.

Scored by sqviz's own `segment_nll`, imported from this checkout: it knows torch and the model's forward pass only, so
it runs on whatever transformers the environment has. Arguments: folder of the model, number of threads. Reads
{"activations", "alpha", "calibration", "held", "length", …}: "dynamic" (per token) or "static" (per tensor), α or null
for no smoothing, segments of ids, ids to score; "activations" null leaves the model as it is. Answers {"nll": per
segment, "seconds", "versions"}. fold_peers.py asks {"fold": id of a tiny model} instead: what smoothing alone does to
its logits, {"change": relative to the largest, "touched": parameters that are other ones now, "versions"}.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sqviz.evaluation.perplexity import segment_nll
from sqviz.models.lm import LM
from sqviz.models.tiny import tiny
from sqviz.quant.equivalence import logits, probe

Question = dict[str, Any]
Quantiser = Callable[[nn.Module, Question, list[Tensor]], nn.Module]
Smoother = Callable[[nn.Module, list[Tensor]], nn.Module]


ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print, some when they are imported, is no answer: import this module first


def serve(quantise: Quantiser, packages: Sequence[str], smooth: Smoother | None = None) -> None:
    """Answer until the questions end. `quantise` gets a fresh float32 model, the question and calibration segments;
    `smooth` a model and segments.
    """
    torch.set_num_threads(int(sys.argv[2]))
    for line in sys.stdin:
        try:
            question = json.loads(line)
            fold = smooth is not None and "fold" in question
            found = _folded(question["fold"], smooth) if fold else _scored(question, quantise)
            found["versions"] = {name: version(name) for name in ("torch", "transformers", *packages)}
        except Exception as error:  # noqa: BLE001 - told to the one who asked
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=ANSWERS, flush=True)


def _scored(question: Question, quantise: Quantiser) -> dict[str, Any]:
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    if question["activations"] is not None:
        model = quantise(model, question, [torch.tensor(ids) for ids in question["calibration"]])
    lm = LM(model, None, cast(Any, None))  # what reads logits asks for no architecture
    scored = [float(nll.double().sum()) for nll in segment_nll(lm, torch.tensor(question["held"]), question["length"])]
    return {"nll": scored, "seconds": time.perf_counter() - start}


def _folded(name: str, smooth: Smoother) -> dict[str, Any]:
    lm = tiny(name)
    lm.model.config._name_or_path = sys.argv[1]  # a tokenizer is looked for there
    before, kept = logits(lm.model, probe(lm)), {key: tensor.clone() for key, tensor in lm.model.named_parameters()}
    after = smooth(lm.model, list(torch.arange(3 * 48).mul(37).remainder(128).add(3).view(3, 48)))
    touched = sum(not torch.equal(tensor, kept.get(key, tensor)) for key, tensor in after.named_parameters())
    change = float((logits(after, probe(lm)) - before).abs().max() / before.abs().max())
    return {"change": change, "touched": touched}
