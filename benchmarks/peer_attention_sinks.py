"""The child of peer.py: decode steps of attention_sinks 0.4.0, timed when told to. Runs on transformers 4.34.

Arguments: folder of the model, number of threads. Reads {"what": "fill", "size"}, which fills the caches and answers
with the keys that a step of each attends to, and {"what": "step" | "dense", "turn"}, answered with {"seconds"}.
"""

import json
import os
import sys
import time

import torch
from attention_sinks import AutoModelForCausalLM
from transformers import AutoModelForCausalLM as Plain

SINKS, MARGIN = 4, 16
IDS = torch.randint(10, 40_000, (8192,), generator=torch.Generator().manual_seed(0))
models: dict = {}
caches: dict = {}


def fill(folder: str, size: int) -> dict[str, int]:
    models["step"] = AutoModelForCausalLM.from_pretrained(
        folder, attention_sink_size=SINKS, attention_sink_window_size=size - SINKS - 1
    ).eval()
    models["dense"] = Plain.from_pretrained(folder).eval()
    caches["step"] = models["step"](IDS[None, : size - 1]).past_key_values
    for turn in range(MARGIN):  # now the oldest keys leave
        given = {"past_key_values": caches["step"], "use_cache": True}
        caches["step"] = models["step"](IDS[turn].view(1, 1), **given).past_key_values
    caches["dense"] = models["dense"](IDS[None, : size - 1]).past_key_values
    return {name: cache[0][0].shape[2] + 1 for name, cache in caches.items()}  # and the current token


def step(what: str, turn: int) -> dict[str, float]:
    start = time.perf_counter()
    found = models[what](IDS[turn].view(1, 1), past_key_values=caches[what], use_cache=True)
    seconds = time.perf_counter() - start
    if what == "step":  # the dense cache stays as long as it is
        caches[what] = found.past_key_values
    return {"seconds": seconds}


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # what libraries print is no answer
    torch.set_num_threads(int(sys.argv[2]))
    for line in sys.stdin:
        asked = json.loads(line)
        with torch.inference_mode():
            filling = asked["what"] == "fill"
            found = fill(sys.argv[1], asked["size"]) if filling else step(asked["what"], asked["turn"])
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
