"""lm-evaluation-harness's part of evaluate.py, run by the Python of an environment that has it.

    .venv-lm-eval/bin/python -I benchmarks/lm_eval_worker.py < request.json > answer.json

``-I`` keeps this folder off the import path, where inspect.py would hide the standard library's. The request: ``model``
(arguments of ``HFLM``), ``prompts`` (each its text and token ids), ``ends`` (ids of the tokens that end a turn),
``batch_size``, ``max_new_tokens``, ``threads``. The answer: ``seconds``, ``peak_bytes``, ``memory``, and ``answers``,
a text for each prompt.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measure


def main() -> None:
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")  # for the answer alone: what libraries print goes to stderr
    os.dup2(2, 1)
    json.dump(answer(json.load(sys.stdin)), stdout)
    stdout.close()


def answer(request: dict) -> dict:
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(request["threads"])
    gpu = torch.cuda.is_available()
    harness = HFLM(
        **request["model"],
        device="cuda" if gpu else "cpu",
        dtype="float32",
        batch_size=request["batch_size"],
        add_bos_token=False,  # the chat template wrote it
    )
    different = sum(harness.tok_encode(text) != ids for text, ids in request["prompts"])
    if different:
        sys.exit(f"lm-eval makes other token ids of {different} of {len(request['prompts'])} prompts")

    stops = [harness.tok_decode([end], skip_special_tokens=False) for end in request["ends"]]

    def generate(texts: list[str], limit: int) -> list[str]:
        # `until` alone would not cut at a special token: it is looked for in text from which those are gone.
        options = {"until": stops, "eos_token_id": request["ends"], "do_sample": False, "max_gen_toks": limit}
        return harness.generate_until(
            [Instance("generate_until", {}, (text, dict(options)), index) for index, text in enumerate(texts)]
        )

    texts = [text for text, _ in request["prompts"]]
    generate(texts[:1], 2)
    started = time.perf_counter()
    answers = generate(texts, request["max_new_tokens"])
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else measure.peak_bytes(),
        "memory": "GPU" if gpu else "resident",
        "answers": [text.strip() for text in answers],
    }


if __name__ == "__main__":
    main()
