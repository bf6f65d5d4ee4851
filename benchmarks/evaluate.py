"""Answering held-out prompts: batches of like length (stoney_rl.generation) beside one prompt at a time, and lm-eval.

    python benchmarks/evaluate.py
    python benchmarks/evaluate.py --lm_eval_python .venv-lm-eval/bin/python --repeats 3
    python benchmarks/evaluate.py --model stoney_lora_merged --dataset rows.jsonl --max_new_tokens 64

One at a time is the plain loop around transformers' `model.generate` that a user would write; lm-eval is
lm-evaluation-harness's HF backend, in an environment of its own (benchmarks/README.md makes it). All are greedy, in fp32,
on the same prompts, each in a process of its own, in turn, --repeats times. Time is tokenising and generation, after a
first short answer that is not counted; loading is outside of it. Reports samples and tokens a second, peak memory, and how
many answers equal those of one prompt at a time, in text and number of tokens (lm-eval tells the text alone).

Writes --output, without the text of any row.
Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: its own folder would hide the standard library's `inspect`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


import argparse
import json
import statistics
import subprocess
import time
from importlib.metadata import version

from benchmarks import measure
from stoney_rl import checkpoints, cli
from stoney_rl.errors import StoneyError
from stoney_rl.models import find_model

ONE_BY_ONE = "one by one"
LM_EVAL_VERSION = "0.4.13"
MAKE_LM_EVAL = (
    "python -m venv .venv-lm-eval && .venv-lm-eval/bin/python -m pip install -c requirements.txt "
    f"'lm-eval[hf]=={LM_EVAL_VERSION}'"
)
WORKER = Path(__file__).with_name("lm_eval_worker.py")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model", default="checkpoints/smollm2-135m", help="checkpoint directory or hub id")
    parser.add_argument("--dataset", default="data/planted/rows.jsonl", help="file or folder of rows")
    parser.add_argument("--output", default="results/benchmark-evaluate.json", help="file of the results")
    parser.add_argument("--num_samples", type=cli.positive_int, default=64, help="rows, drawn by --seed")
    parser.add_argument("--max_new_tokens", type=cli.positive_int, default=32, help="tokens an answer at most")
    parser.add_argument("--batch_sizes", type=cli.positive_int, nargs="+", default=[8, 16, 32], help="of the batches")
    parser.add_argument(
        "--lm_eval_python", metavar="PATH", help="Python that has lm-eval; without it, lm-eval is left out"
    )
    parser.add_argument("--repeats", type=cli.positive_int, default=1, help="runs of each, in turn")
    parser.add_argument("--threads", type=cli.positive_int, default=measure.usable_cores(), help="torch threads")
    parser.add_argument("--seed", type=cli.non_negative_int, default=0, help="choice of rows")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    find_model(args.model)
    if Path(args.output).is_dir():
        raise StoneyError(f"--output {args.output}: a directory; name a file")
    lm_eval_versions = check_lm_eval(args.lm_eval_python) if args.lm_eval_python else None
    machine = measure.machine(args.threads)
    print(f"{machine['cpu']}, {machine['cores']} cores, torch threads {args.threads}")
    notice = measure.load_notice(machine["load"], machine["cores"])
    if notice:
        print(notice)
    sha256, questions = measure.in_process(choose_prompts, args.dataset, args.num_samples, args.seed)

    shared = (args.max_new_tokens, args.threads)
    ways = {ONE_BY_ONE: (answer, args.model, questions, None, *shared)}
    for size in dict.fromkeys(args.batch_sizes):
        ways[f"batches of {size}"] = (answer, args.model, questions, size, *shared)
        if args.lm_eval_python:
            ways[f"lm-eval, {size}"] = (answer_lm_eval, args.lm_eval_python, args.model, questions, size, *shared)
    runs: dict[str, list[dict]] = {name: [] for name in ways}
    for repeat in range(args.repeats):
        for name, (side, *inputs) in ways.items():
            runs[name].append(measure.in_process(side, f"{repeat + 1}/{args.repeats} {name}", *inputs))

    results = {name: summarise(entries, runs[ONE_BY_ONE][0]["answers"]) for name, entries in runs.items()}
    for size in args.batch_sizes if args.lm_eval_python else ():
        ours, theirs = f"batches of {size}", f"lm-eval, {size}"
        results[theirs]["identical_to_ours"] = identical(runs[theirs], runs[ours][0]["answers"])
        results[ours]["speed_over_lm_eval_each"] = [
            b["seconds"] / a["seconds"] for a, b in zip(runs[ours], runs[theirs], strict=True)
        ]
    report = checkpoints.describe_stage(
        "benchmark-evaluate",
        arguments=vars(args),
        seed=args.seed,
        machine=machine,
        lm_eval_versions=lm_eval_versions,
        data_sha256=sha256,
        n=len(questions),
        results=results,
    )
    print(table(results))
    if notice:
        print(notice)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_json(Path(args.output), report)
    print(f"{args.output}: the same, with every run, versions and machine")


def check_lm_eval(python: str) -> dict[str, str]:
    """Versions of what generates there. Raises ``StoneyError`` without lm-eval, or if it would run on other libraries."""
    packages = ["lm_eval", "torch", "transformers"]
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    try:
        done = subprocess.run([python, "-I", "-c", code, *packages], capture_output=True, text=True)
    except OSError as error:
        raise StoneyError(
            f"--lm_eval_python {python}: can't be run ({error.strerror}); make the environment with: {MAKE_LM_EVAL}"
        ) from error
    versions = done.stdout.split()
    if done.returncode or len(versions) != len(packages):
        raise StoneyError(f"--lm_eval_python {python}: has no lm-eval; make its environment with: {MAKE_LM_EVAL}")
    there = dict(zip(packages, versions, strict=True))
    for package in ("torch", "transformers"):
        if there[package] != (here := version(package)):
            raise StoneyError(
                f"--lm_eval_python {python}: {package} {there[package]}, but {here} here, so libraries would be "
                f"compared and not what uses them; make its environment with: {MAKE_LM_EVAL}"
            )
    return there


def choose_prompts(dataset: str, number: int, seed: int) -> tuple[str, list[list[dict]]]:
    """Hash of the rows, and the chat messages of ``number`` of them. Raises ``StoneyError`` if there are too few."""
    import random

    from stoney_rl import data

    rowset = data.load_rows(dataset)
    if number > len(rowset.rows):
        raise StoneyError(f"--num_samples {number}: {dataset} has {len(rowset.rows)} rows; ask for no more")
    rows = random.Random(seed).sample(rowset.rows, number)
    return rowset.sha256, [list(row.prompt) for row in rows]


def answer(
    label: str, model_name: str, questions: list[list[dict]], batch_size: int | None, limit: int, threads: int
) -> dict:
    """Load, answer every question, and tell the seconds, the peak memory and the answers' token ids and texts.

    ``batch_size`` None: one by one. Runs in a process of its own.
    """
    import torch
    from tqdm import tqdm

    from stoney_rl import generation, models, prompts

    torch.set_num_threads(threads)
    source = find_model(model_name)
    tokenizer = models.load_tokenizer(source)
    prompts.prepare_tokenizer(tokenizer)
    ends = prompts.end_of_turn_ids(tokenizer)
    model = models.load_model(source, torch.float32).to(models.device())
    one_by_one(model, tokenizer, prompts.encode_prompt(tokenizer, questions[0]), ends, 2)

    texts: list[str] = [""] * len(questions)
    lengths = [0] * len(questions)
    with tqdm(total=len(questions), desc=label, unit="row") as bar:
        started = time.perf_counter()
        ids = [prompts.encode_prompt(tokenizer, question) for question in questions]
        if batch_size is None:
            for index, prompt in enumerate(ids):
                texts[index], lengths[index] = one_by_one(model, tokenizer, prompt, ends, limit)
                bar.update()
        else:
            for batch in generation.generate(
                model, tokenizer, ids, ends=ends, max_new_tokens=limit, batch_size=batch_size
            ):
                for done in batch:
                    texts[done.index], lengths[done.index] = done.text, done.tokens
                bar.update(len(batch))
        seconds = time.perf_counter() - started
    gpu = torch.cuda.is_available()
    return {
        "seconds": seconds,
        "tokens": sum(lengths),
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else measure.peak_bytes(),
        "memory": "GPU" if gpu else "resident",
        "answers": list(zip(texts, lengths, strict=True)),
    }


def answer_lm_eval(
    label: str, python: str, model_name: str, questions: list[list[dict]], batch_size: int, limit: int, threads: int
) -> dict:
    """As ``answer``, by lm-evaluation-harness from the very same text; without the number of tokens, which it keeps."""
    from stoney_rl import models, prompts

    source = find_model(model_name)
    tokenizer = models.load_tokenizer(source)
    prompts.prepare_tokenizer(tokenizer)
    request = {
        "model": {
            "pretrained": source.base or source.name,
            "peft": source.name if source.kind == "adapter" else None,
            "tokenizer": tokenizer.name_or_path,
            "revision": source.revision or "main",
        },
        "prompts": [
            (prompts.render_prompt(tokenizer, row), prompts.encode_prompt(tokenizer, row)) for row in questions
        ],
        "ends": sorted(prompts.end_of_turn_ids(tokenizer)),
        "batch_size": batch_size,
        "max_new_tokens": limit,
        "threads": threads,
    }
    print(label, file=sys.stderr)
    done = subprocess.run([python, "-I", WORKER], input=json.dumps(request), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise StoneyError(f"{label}: failed with code {done.returncode}; what it wrote stands above")
    run = json.loads(done.stdout)
    return run | {"tokens": None, "answers": [(text, None) for text in run["answers"]]}


def one_by_one(model: object, tokenizer: object, prompt: list[int], ends: set[int], limit: int) -> tuple[str, int]:
    """The answer's text and number of tokens, as a plain loop around ``model.generate`` gets them."""
    import torch

    inputs = torch.tensor([prompt], device=model.device)
    output = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
    )[0, len(prompt) :].tolist()
    kept = output[:-1] if output and output[-1] in ends else output
    return tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip(), len(kept)


def summarise(entries: list[dict], expected: list[tuple[str, int]]) -> dict:
    """Medians over the repeats; ``identical``: answers that equal ``expected``, least of all runs."""
    seconds = statistics.median(entry["seconds"] for entry in entries)
    tokens = entries[0]["tokens"]
    return {
        "samples_per_second": len(expected) / seconds,
        "tokens_per_second": None if tokens is None else tokens / seconds,
        "seconds": seconds,
        "seconds_each": [entry["seconds"] for entry in entries],
        "peak_bytes": max(entry["peak_bytes"] for entry in entries),
        "memory": entries[0]["memory"],
        "identical": identical(entries, expected),
        "of": len(expected),
    }


def identical(entries: list[dict], expected: list[tuple[str, int]]) -> int:
    """Answers whose text, and number of tokens where a side tells it, are as ``expected``: least of all runs."""
    return min(
        sum(
            text == wanted and tokens in (None, length)
            for (text, tokens), (wanted, length) in zip(entry["answers"], expected, strict=True)
        )
        for entry in entries
    )


def table(results: dict) -> str:
    slowest = results[ONE_BY_ONE]["seconds"]
    lines = ["", f"{'':15} {'samples/s':>9} {'tokens/s':>9} {'speed':>6} {'s (range)':>13} {'peak MB':>8}  identical"]
    for name, entry in results.items():
        spread = f"{min(entry['seconds_each']):.1f}-{max(entry['seconds_each']):.1f}"
        rate = entry["tokens_per_second"]
        lines.append(
            f"{name:15} {entry['samples_per_second']:9.2f} {'-' if rate is None else format(rate, '.1f'):>9} "
            f"{slowest / entry['seconds']:5.2f}x {spread:>13} {entry['peak_bytes'] / 1e6:8.0f}  "
            f"{entry['identical']} of {entry['of']}"
            + (f" ({entry['identical_to_ours']} as ours)" if "identical_to_ours" in entry else "")
        )
    for name, entry in results.items():
        if ratios := entry.get("speed_over_lm_eval_each"):
            lines.append(
                f"{name}: {statistics.median(ratios):.2f}x lm-eval's speed ({min(ratios):.2f}-{max(ratios):.2f})"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
