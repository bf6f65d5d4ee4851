"""Answering held-out prompts: batches of like length (stoney_rl.generation) beside one prompt at a time.

    python benchmarks/evaluate.py
    python benchmarks/evaluate.py --model stoney_lora_merged --dataset rows.jsonl --max_new_tokens 64

One at a time is the plain loop around transformers' `model.generate` that a user would write. Both are greedy, in fp32,
on the same prompts, each in a process of its own, in turn, --repeats times. Time is generation alone, after a first
short answer that is not counted; loading is outside of it. Reports samples and tokens a second, peak memory, and how many
answers equal those of one prompt at a time, in text and number of tokens.

Writes --output, without the text of any row.
Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: its own folder would hide the standard library's `inspect`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


import argparse
import statistics
import time

from benchmarks import measure
from stoney_rl import checkpoints, cli
from stoney_rl.errors import StoneyError
from stoney_rl.models import find_model

ONE_BY_ONE = "one by one"


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model", default="checkpoints/smollm2-135m", help="checkpoint directory or hub id")
    parser.add_argument("--dataset", default="data/planted/rows.jsonl", help="file or folder of rows")
    parser.add_argument("--output", default="results/benchmark-evaluate.json", help="file of the results")
    parser.add_argument("--num_samples", type=cli.positive_int, default=64, help="rows, drawn by --seed")
    parser.add_argument("--max_new_tokens", type=cli.positive_int, default=32, help="tokens an answer at most")
    parser.add_argument("--batch_sizes", type=cli.positive_int, nargs="+", default=[8, 16, 32], help="of the batches")
    parser.add_argument("--repeats", type=cli.positive_int, default=1, help="runs of each, in turn")
    parser.add_argument("--threads", type=cli.positive_int, default=measure.usable_cores(), help="torch threads")
    parser.add_argument("--seed", type=cli.non_negative_int, default=0, help="choice of rows")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    find_model(args.model)
    if Path(args.output).is_dir():
        raise StoneyError(f"--output {args.output}: a directory; name a file")
    machine = measure.machine(args.threads)
    print(f"{machine['cpu']}, {machine['cores']} cores, torch threads {args.threads}")
    notice = measure.load_notice(machine["load"], machine["cores"])
    if notice:
        print(notice)
    sha256, questions = measure.in_process(choose_prompts, args.dataset, args.num_samples, args.seed)

    ways = {ONE_BY_ONE: None} | {f"batches of {size}": size for size in dict.fromkeys(args.batch_sizes)}
    runs: dict[str, list[dict]] = {name: [] for name in ways}
    for repeat in range(args.repeats):
        for name, batch_size in ways.items():
            label = f"{repeat + 1}/{args.repeats} {name}"
            runs[name].append(
                measure.in_process(answer, label, args.model, questions, batch_size, args.max_new_tokens, args.threads)
            )

    expected = runs[ONE_BY_ONE][0]["answers"]
    results = {name: summarise(entries, expected) for name, entries in runs.items()}
    report = checkpoints.describe_stage(
        "benchmark-evaluate",
        arguments=vars(args),
        seed=args.seed,
        machine=machine,
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
    ids = [prompts.encode_prompt(tokenizer, question) for question in questions]
    model = models.load_model(source, torch.float32).to(models.device())
    one_by_one(model, tokenizer, ids[0], ends, 2)

    texts: list[str] = [""] * len(ids)
    lengths = [0] * len(ids)
    with tqdm(total=len(ids), desc=label, unit="row") as bar:
        started = time.perf_counter()
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
    """Medians over the repeats; ``identical``: answers with the same text and length as ``expected``, least of all runs."""
    seconds = statistics.median(entry["seconds"] for entry in entries)
    return {
        "samples_per_second": len(expected) / seconds,
        "tokens_per_second": entries[0]["tokens"] / seconds,
        "seconds": seconds,
        "seconds_each": [entry["seconds"] for entry in entries],
        "peak_bytes": max(entry["peak_bytes"] for entry in entries),
        "memory": entries[0]["memory"],
        "identical": min(
            sum(ours == theirs for ours, theirs in zip(entry["answers"], expected, strict=True)) for entry in entries
        ),
        "of": len(expected),
    }


def table(results: dict) -> str:
    slowest = results[ONE_BY_ONE]["seconds"]
    lines = ["", f"{'':15} {'samples/s':>9} {'tokens/s':>9} {'speed':>6} {'s (range)':>13} {'peak MB':>8}  identical"]
    for name, entry in results.items():
        spread = f"{min(entry['seconds_each']):.1f}-{max(entry['seconds_each']):.1f}"
        lines.append(
            f"{name:15} {entry['samples_per_second']:9.2f} {entry['tokens_per_second']:9.1f} "
            f"{slowest / entry['seconds']:5.2f}x {spread:>13} {entry['peak_bytes'] / 1e6:8.0f}  "
            f"{entry['identical']} of {entry['of']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
