"""The child of peer.py: decode steps of attention_sinks 0.4.0, timed when told to. Runs on transformers 4.34.

Reads lines "fill SIZE" and "step" or "dense", writes "ready", or the seconds of the step. The first argument is the
folder of the model, the second one the number of threads.
"""

import sys
import time

import torch
from attention_sinks import AutoModelForCausalLM
from transformers import AutoModelForCausalLM as Plain

SINKS, MARGIN = 4, 16


def main() -> None:
    folder, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    models: dict = {}
    caches: dict = {}
    ids = torch.randint(10, 40_000, (8192,), generator=torch.Generator().manual_seed(0))
    for line in sys.stdin:
        what, *rest = line.split()
        with torch.inference_mode():
            if what == "fill":
                size = int(rest[0])
                models["step"] = AutoModelForCausalLM.from_pretrained(
                    folder, attention_sink_size=SINKS, attention_sink_window_size=size - SINKS - 1
                ).eval()
                models["dense"] = Plain.from_pretrained(folder).eval()
                caches["step"] = models["step"](ids[None, : size - 1]).past_key_values
                for turn in range(MARGIN):  # now the oldest keys leave
                    given = {"past_key_values": caches["step"], "use_cache": True}
                    caches["step"] = models["step"](ids[turn].view(1, 1), **given).past_key_values
                caches["dense"] = models["dense"](ids[None, : size - 1]).past_key_values
                keys = {name: cache[0][0].shape[2] for name, cache in caches.items()}
                print(f"ready {keys['step'] + 1} {keys['dense'] + 1}", flush=True)  # and the current token
                continue
            start = time.perf_counter()
            found = models[what](ids[int(rest[0])].view(1, 1), past_key_values=caches[what], use_cache=True)
            seconds = time.perf_counter() - start
            if what == "step":  # the dense cache stays as long as it is
                caches[what] = found.past_key_values
            print(seconds, flush=True)


if __name__ == "__main__":
    main()
