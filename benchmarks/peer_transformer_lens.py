"""The child of attention.py for TransformerLens: forward passes of its bridge, bare or with attention scores cached.

Arguments: folder of the model, number of threads. Reads {"what", "batches"}: "bare" for forward passes over these token
ids, "cache" for the same with the scores cached, "average" for their average over all sentences. Answers {"seconds"},
and after "average" also {"mean"}: of the average over what queries may see, to compare with what others find.
"""

import functools
import json
import os
import sys
import time
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

SCORES = "attn.hook_attn_scores"


def with_scores(bridge: Any, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """The scores before the softmax by layer, [batch head query key]."""
    _, cache = bridge.run_with_cache(batch, names_filter=lambda name: name.endswith(SCORES))
    return dict(cache.items())


def averages(bridge: Any, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """[head query key] of each layer, averaged over all sentences."""
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        for name, scores in with_scores(bridge, batch).items():
            sums[name] = sums.get(name, 0) + scores.sum(0)
    return [one / sum(len(batch) for batch in batches) for one in sums.values()]


@torch.inference_mode()
def answer(bridge: Any, question: dict[str, Any]) -> dict[str, float]:
    batches = [torch.tensor(batch) for batch in question["batches"]]
    start = time.perf_counter()
    if question["what"] == "average":
        found = averages(bridge, batches)
        seconds = time.perf_counter() - start
        seen = torch.ones(found[0].shape[-2:]).tril().bool()
        return {"seconds": seconds, "mean": torch.stack(found)[..., seen].double().mean().item()}
    for batch in batches:
        (bridge if question["what"] == "bare" else functools.partial(with_scores, bridge))(batch)
    return {"seconds": time.perf_counter() - start}


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # what libraries print is no answer
    torch.set_num_threads(int(sys.argv[2]))
    bridge, trouble = None, ""
    try:
        bridge = TransformerBridge.boot_transformers(sys.argv[1], device="cpu")
    except Exception as error:  # noqa: BLE001 - told to the one who asks
        trouble = f"it cannot load the model: {type(error).__name__}: {error}"
    for line in sys.stdin:
        try:
            found: dict[str, Any] = answer(bridge, json.loads(line)) if bridge is not None else {"error": trouble}
        except Exception as error:  # noqa: BLE001
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
