"""Inspecting a dataset: inspect_hf_dataset.py beside the plain way, `load_dataset` and a Python loop for each figure.

    python benchmarks/inspect.py
    python benchmarks/inspect.py --num_rows 20000 --sizes 5000 10000

The rows are generated: English prose about the planted (invented) language, with 1 % exact and 1 % near copies planted.
The plain way loads them with `datasets.load_dataset`, then loops: exact copies by a dictionary, near copies with
datasketch's MinHash and LSH, questions asked twice, forms of the answer in the question, letters with a Counter, tokens
row by row with the prompt format of training, mojibake with ftfy. Where there is no library for a figure (the forms and
glosses of a row, the split by lexeme) it calls this project's functions row by row. It leaves out look-alikes, words that
differ in diacritics, the test of initial letters, plots, the report and the prepared files, so it has less to do; nor are
its imports counted. Each side runs in a process of its own, in turn.

--sizes runs inspect_hf_dataset.py alone on fewer rows too, to show how its cost grows. Needs datasketch (in
requirements-dev.txt). Writes --output: seconds, peak memory, and the figures that both sides must agree on.
Exit codes: 0 done, 1 the two sides disagree, 2 bad input, 130 interrupted.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: its own folder would hide the standard library's `inspect`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import os
import random
import subprocess
import tempfile
import time

from benchmarks import measure
from stoney_rl import checkpoints, cli
from stoney_rl.errors import StoneyError

REPOSITORY = Path(__file__).resolve().parent.parent
OURS, PLAIN = "inspect_hf_dataset.py", "load_dataset and loops"
FIGURES = (
    *("rows", "forms", "glosses", "parts_of_speech", "exact_duplicates", "near_duplicates", "questions", "echoes"),
    *("tokens", "rows_cut", "irregular"),
)


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--num_rows", type=cli.positive_int, default=150_000, help="rows, generated")
    parser.add_argument(
        "--sizes", type=cli.positive_int, nargs="*", default=[37_500, 75_000], help="smaller runs of ours"
    )
    parser.add_argument("--tokenizer", default="checkpoints/smollm2-135m", help="checkpoint directory or hub id")
    parser.add_argument("--max_length", type=cli.positive_int, default=160, help="tokens a row; some rows are longer")
    parser.add_argument("--seed", type=cli.non_negative_int, default=0, help="of the rows and the copies")
    parser.add_argument("--output", default="results/benchmark-inspect.json", help="file of the results")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = cli.parse_args(build_parser(), argv)
    if not Path(args.tokenizer).is_dir():
        raise StoneyError(f"--tokenizer {args.tokenizer}: not here; make it with: python prepare_base_model.py")
    machine = measure.machine(1)
    notice = measure.load_notice(machine["load"], machine["cores"])
    with tempfile.TemporaryDirectory() as folder, measure.ending_tidily():
        sizes = sorted({*(size for size in args.sizes if size < args.num_rows), args.num_rows})
        for size in sizes:
            measure.in_process(write_rows, str(Path(folder) / f"{size}.jsonl"), size, args.seed)
        ours = {}
        for size in sizes:
            print(f"{OURS}: {size:,} rows ...", flush=True)
            ours[size] = run_ours(Path(folder), size, args)
        print(f"{PLAIN}: {args.num_rows:,} rows ...", flush=True)
        path = str(Path(folder) / f"{args.num_rows}.jsonl")
        plain = measure.in_process(run_plain, path, folder, args.tokenizer, args.max_length)
    whole = ours[args.num_rows]
    agree = {name: whole["figures"][name] == plain["figures"][name] for name in FIGURES}
    # Both are MinHash: datasketch's bands for 0.8 miss a few per cent of the pairs.
    near = plain["figures"]["near_duplicates"] / max(1, whole["figures"]["near_duplicates"])
    agree["near_duplicates"] = 0.9 <= near <= 1
    result = checkpoints.describe_stage(
        "benchmark-inspect",
        arguments=vars(args),
        seed=args.seed,
        machine=machine,
        results={OURS: {str(size): run for size, run in ours.items()}, PLAIN: {str(args.num_rows): plain}},
        agree=agree,
        speed=round(plain["seconds"] / whole["seconds"], 2),
    )
    print(table(ours, plain, args.num_rows))
    if notice:
        print(notice)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_json(Path(args.output), result)
    print(f"{args.output}: the same, with versions and machine")
    differing = [name for name, same in agree.items() if not same]
    if differing:
        print(f"the two sides disagree on {', '.join(differing)}")
        return 1
    return 0


def write_rows(path: str, number: int, seed: int) -> None:
    """``number`` question/answer rows as JSON lines: 98 % different ones, then 1 % exact and 1 % near copies of some."""
    from stoney_rl.planted import PlantedLanguage
    from stoney_rl.planted_prose import prose_rows

    copies = number // 100
    rows, _ = prose_rows(PlantedLanguage(seed, max(20, number // 15)), number - 2 * copies, seed)
    records = [{"question": row.question, "answer": row.answer} for row in rows]
    chosen = random.Random(seed).sample(records, 2 * copies)
    records += [{**record} for record in chosen[:copies]]
    records += [{**record, "answer": record["answer"] + " Indeed so."} for record in chosen[copies:]]
    with open(path, "w", encoding="utf-8") as out:
        for number, record in enumerate(records):
            out.write(json.dumps(record | {"pair_id": number}, ensure_ascii=False) + "\n")


def run_ours(folder: Path, size: int, args: argparse.Namespace) -> dict:
    """Seconds, peak resident bytes and figures of the stage itself, started as a user starts it."""
    output = folder / f"prepared-{size}"
    command = [sys.executable, str(REPOSITORY / "inspect_hf_dataset.py"), "--dataset", str(folder / f"{size}.jsonl")]
    command += ["--tokenizer", args.tokenizer, "--max_length", str(args.max_length), "--output_dir", str(output)]
    started = time.monotonic()
    process = subprocess.Popen([*command, "--wandb_mode", "disabled"], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    if os.waitstatus_to_exitcode(status):
        raise StoneyError(f"{OURS}: failed on {size:,} rows; its output stands above")
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    sections = report["sections"]
    repeats, tokens = sections["repeats"], sections["lengths"]["tokens"]
    return {
        "seconds": seconds,
        "peak_bytes": usage.ru_maxrss * measure._RSS_UNIT,
        "figures": {
            "rows": sections["schema"]["rows"],
            "forms": sections["lexicon"]["forms"],
            "exact_duplicates": repeats["exact_duplicates"]["count"],
            "near_duplicates": repeats["near_duplicates"]["count"],
            "questions": repeats["questions"]["different"],
            "echoes": repeats["forms_of_the_answer_in_the_question"]["all"]["count"],
            "tokens": tokens["total"],
            "glosses": sections["lexicon"]["with_gloss"],
            "parts_of_speech": sections["lexicon"]["with_pos"],
            "irregular": sum(f["count"] for f in report["findings"] if f["kind"] in ("not_nfc", "mojibake")),
            "rows_cut": tokens["rows_cut"],
        },
    }


def run_plain(path: str, folder: str, tokenizer_name: str, max_length: int) -> dict:
    """The same figures as a researcher computes them in a notebook. Runs in a process of its own."""
    import re
    import unicodedata
    from collections import Counter, defaultdict

    from datasets import disable_progress_bars, load_dataset
    from datasketch import MinHash, MinHashLSH
    from ftfy.badness import is_bad
    from tqdm import tqdm
    from transformers import AutoTokenizer

    from stoney_rl import prompts
    from stoney_rl.data import Row
    from stoney_rl.glosses import extract_facts
    from stoney_rl.inspection.repeats import PERMUTATIONS, SHINGLE
    from stoney_rl.lexemes import contains_form, english_test, extract_lexemes
    from stoney_rl.split import split_rows
    from stoney_rl.text import fold

    started, spent = time.monotonic(), {}

    def lap(name: str) -> None:
        spent[name] = round(time.monotonic() - started - sum(spent.values()), 2)

    def as_row(row: dict, forms: list[str]) -> Row:
        turns = [[{"role": role, "content": row[key]}] for role, key in (("user", "question"), ("assistant", "answer"))]
        return Row(str(row["pair_id"]), "", *turns, forms, {})

    disable_progress_bars()
    rows = list(load_dataset("json", data_files=path, split="train", cache_dir=f"{folder}/cache"))
    lap("load")

    is_english = english_test(f"{row['question']}\n{row['answer']}" for row in rows)
    lexemes = [extract_lexemes(row["question"], row["answer"], is_english) for row in tqdm(rows, "forms")]
    lap("forms")

    glosses, labels = defaultdict(Counter), defaultdict(Counter)
    for row, forms in zip(tqdm(rows, "glosses"), lexemes, strict=True):
        facts = extract_facts(as_row(row, forms))
        for form, gloss in facts.glosses:
            glosses[fold(form)][fold(gloss)] += 1
        for form, label in facts.pos:
            labels[fold(form)][label] += 1
    lap("glosses")

    seen, exact = set(), 0
    questions, echoes = defaultdict(set), 0
    letters: Counter[str] = Counter()
    prose: Counter[str] = Counter()
    characters, irregular = [], 0
    for row, forms in zip(tqdm(rows, "texts"), lexemes, strict=True):
        question, answer = (
            re.sub(r"[^\w\u0300-\u036f]+", " ", fold(row[key])).strip() for key in ("question", "answer")
        )
        exact += (question, answer) in seen
        seen.add((question, answer))
        questions[question].add(answer)
        asked = [form for form in forms if contains_form(row["answer"], form)]
        echoes += bool(asked) and all(contains_form(row["question"], form) for form in asked)
        letters.update(letter for form in forms for letter in fold(form))
        characters.append((len(row["question"]), len(row["answer"]), len(row["answer"].encode())))
        for text in (row["question"], row["answer"]):
            prose.update(fold(text))
            irregular += not unicodedata.is_normalized("NFC", text) or is_bad(text)
    lap("texts")

    lsh, near = MinHashLSH(threshold=0.8, num_perm=PERMUTATIONS), 0
    shingles_of = []
    met = set()
    for number, row in enumerate(tqdm(rows, "near copies")):
        text = fold(f"{row['question']}\n{row['answer']}")
        shingles = {text[at : at + SHINGLE] for at in range(len(text) - SHINGLE + 1)}
        signature = MinHash(num_perm=PERMUTATIONS)
        signature.update_batch([shingle.encode() for shingle in shingles])
        shingles_of.append(text)
        if text not in met:
            for other in lsh.query(signature):
                theirs = {shingles_of[other][at : at + SHINGLE] for at in range(len(shingles_of[other]) - SHINGLE + 1)}
                same_forms = {fold(form) for form in lexemes[other]} == {fold(form) for form in lexemes[number]}
                if same_forms and len(shingles & theirs) >= 0.8 * len(shingles | theirs):
                    near += 1
                    break
            lsh.insert(number, signature)
        met.add(text)
    lap("near copies")

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    prompts.prepare_tokenizer(tokenizer)
    ends = prompts.end_of_turn_ids(tokenizer)
    lengths = []
    for row in tqdm(rows, "tokens"):
        prompt = [{"role": "user", "content": row["question"]}]
        lengths.append(len(prompts.encode_example(tokenizer, prompt, row["answer"], ends)["input_ids"]))
    lap("tokens")

    split_rows([as_row(row, forms) for row, forms in zip(rows, lexemes, strict=True)])
    lap("split")
    return {
        "seconds": time.monotonic() - started,
        "seconds_of": spent,
        "peak_bytes": measure.peak_bytes(),
        "figures": {
            "rows": len(rows),
            "forms": len({fold(form) for forms in lexemes for form in forms}),
            "exact_duplicates": exact,
            "near_duplicates": near,
            "questions": len(questions),
            "echoes": echoes,
            "tokens": sum(lengths),
            "glosses": len(glosses),
            "parts_of_speech": len(labels),
            "irregular": irregular,
            "rows_cut": sum(length > max_length for length in lengths),
        },
    }


def table(ours: dict[int, dict], plain: dict, number: int) -> str:
    lines = ["", f"{'':24} {'rows':>8} {'seconds':>8} {'rows/s':>8} {'peak MB':>8}"]
    for name, size, run in [*((OURS, size, run) for size, run in ours.items()), (PLAIN, number, plain)]:
        lines.append(
            f"{name:24} {size:8,} {run['seconds']:8.1f} {size / run['seconds']:8.0f} {run['peak_bytes'] / 1e6:8.0f}"
        )
    lines.append(f"{OURS} is {plain['seconds'] / ours[number]['seconds']:.1f}x as fast on {number:,} rows.")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
