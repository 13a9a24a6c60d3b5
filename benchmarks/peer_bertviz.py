"""The child of attention.py for bertviz: a text's attention, and the page that its model_view makes of it.

Arguments: folder of the model, number of threads. Reads {"ids", "tokens", "html"}: ids and words of a text, and where
to write the page. Answers {"forward", "view", "bytes"}: seconds of the forward pass with `output_attentions`, seconds
of `model_view` and of writing, and the size of the page.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bertviz import model_view
from transformers import AutoModelForCausalLM


def answer(model: torch.nn.Module, question: dict[str, Any]) -> dict[str, float]:
    start = time.perf_counter()
    with torch.inference_mode():
        found = model(torch.tensor([question["ids"]]), output_attentions=True, use_cache=False).attentions
    forward = time.perf_counter()
    page = model_view(found, question["tokens"], html_action="return").data
    Path(question["html"]).write_text(page, encoding="utf-8")
    view = time.perf_counter()
    return {"forward": forward - start, "view": view - forward, "bytes": Path(question["html"]).stat().st_size}


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr  # what libraries print is no answer
    torch.set_num_threads(int(sys.argv[2]))
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options).eval()
    for line in sys.stdin:
        try:
            found: dict[str, Any] = answer(model, json.loads(line))
        except Exception as error:  # noqa: BLE001 - told to the one who asked
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
