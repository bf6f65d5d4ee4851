"""Know the data before paying for a GPU: inspect a dataset, and prepare it for the stages that follow.

    python inspect_hf_dataset.py
    python inspect_hf_dataset.py --dataset my_rows/ --tokenizer checkpoints/smollm2-135m --output_dir prepared
    python inspect_hf_dataset.py --dataset my_rows/ --strict --allow initial_letter_gap
    python inspect_hf_dataset.py --dataset my_rows/ --drop exact_duplicates --drop near_duplicates --output_dir prepared

Reads: rows from a hub id, a file or a folder (any mix of the known schemas).
Writes: inspection/<dataset>/ with report.html, report.json, report.txt, findings.jsonl, lexicon.jsonl, quarantine.jsonl and
plots/; with --output_dir the same there, and train, validation and test rows as parquet with their certificate: a
directory that every later stage takes as --dataset. The same source, seed and arguments give the same files, but for
the date and the W&B run in stage.json.
Exit codes: 0 done, 1 with --strict if there are findings that would spoil training or a claim, 2 bad input,
130 interrupted.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stoney_rl import artifacts, checkpoints, cli, prepared, runs, tracking
from stoney_rl.errors import StoneyError
from stoney_rl.inspection.findings import DROPPABLE, FAILURE, FAILURES
from stoney_rl.models import DEFAULT_MODEL, ModelSource, find_model, resolve_unpublished

DEFAULT_DATASET = "HarleyCooper/StoneyNakoda45k"
REPORT_STAGE = "inspection"  # of a directory without prepared rows
# Arguments that change nothing in the result.
NOT_IDENTITY = {"config", "overwrite", "strict", "allow"}
EXIT_FINDINGS = 1


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    paths = parser.add_argument_group("input and output")
    paths.add_argument("--dataset", default=DEFAULT_DATASET, help="hub id, file or folder of rows")
    paths.add_argument("--dataset_revision", help="hub revision of the dataset")
    paths.add_argument(
        "--split", choices=["train", "validation", "test"], help="only the source's rows of this split; default: all"
    )
    paths.add_argument("--output_dir", help="write the prepared dataset directory there")
    paths.add_argument("--overwrite", action="store_true", help="replace an earlier output directory")

    checks = parser.add_argument_group("what is checked")
    checks.add_argument("--tokenizer", help=f"checkpoint, tokenizer folder or hub id; default: {DEFAULT_MODEL}")
    checks.add_argument("--max_length", type=cli.positive_int, default=512, help="tokens a row; longer rows are cut")
    checks.add_argument(
        "--near_duplicate_threshold", type=cli.fraction, default=0.8, help="Jaccard similarity of character shingles"
    )
    checks.add_argument("--seed", type=cli.non_negative_int, default=0, help="of the MinHash permutations")
    checks.add_argument(
        "--strict", action="store_true", help="exit code 1 if a finding would spoil training or a claim"
    )
    checks.add_argument("--allow", action="append", default=[], choices=FAILURES, metavar="FINDING",
                        help=f"repeatable; --strict lets it pass: {', '.join(FAILURES)}")  # fmt: skip

    data = parser.add_argument_group("the prepared rows")
    data.add_argument("--drop", action="append", default=[], choices=DROPPABLE, metavar="FINDING",
                      help=f"repeatable; leave its rows out, to the quarantine: {', '.join(DROPPABLE)}")  # fmt: skip
    cli.add_split_flags(data, "a prepared source's own")
    cli.add_tracking_flags(parser, {"dataset": artifacts.ROWS})
    return parser


def main(argv: list[str] | None = None) -> int:
    args = cli.parse_stage(build_parser(), argv)
    check_args(args)
    tracking.load_env()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing is forked here
    output = Path(args.output_dir or Path("inspection") / report_name(args.dataset))
    overwrite = may_replace(output, args)
    tokenizer_source = find_tokenizer(args.tokenizer) if args.tokenizer else None

    # 1. The rows, and whether they were inspected like this before.
    from stoney_rl import corpus, data, lexemes

    earlier = prepared.read(args.dataset) if prepared.is_prepared(args.dataset) else None
    rowset = earlier[0] if earlier else data.load_rows(args.dataset, split=args.split, revision=args.dataset_revision)
    print(data.describe(rowset), flush=True)
    identity = runs.identify(vars(args), NOT_IDENTITY, data_sha256=rowset.sha256)
    if finished(output, identity, args):
        print((output / "report.txt").read_text(encoding="utf-8"))
        print(f"{output}/: inspected with these settings already (--overwrite inspects again)")
        return exit_code(json.loads((output / "report.json").read_text(encoding="utf-8")), args)
    # Opened before the work, so that a place that can't be written is heard of at once.
    with checkpoints.staged(output, overwrite=overwrite) as work:
        rows = rowset.rows if earlier else step("forms", lambda: lexemes.annotate(rowset.rows))

        # 2. What is in them, and what is wrong with them.
        from stoney_rl import lexicon
        from stoney_rl.inspection import coverage, lengths, meanings, orthography, repeats, report, schema, splits
        from stoney_rl.text import fold

        tokenizer, why_not = load_tokenizer(tokenizer_source)
        # Tokenizing runs outside Python's lock: a second core counts tokens while this one goes on.
        pool = ThreadPoolExecutor(1)
        tokens = pool.submit(lengths.find, rows, args.max_length, tokenizer, why_not)
        entries = step("lexicon", lambda: lexicon.build_lexicon(rows))
        gloss_of = {fold(entry.form): entry.glosses[0][0] for entry in entries if entry.glosses}
        sections = [
            step("schema", lambda: schema.find(rowset, rows)),
            step("repeats", lambda: repeats.find(rows, threshold=args.near_duplicate_threshold, seed=args.seed)),
            step("orthography", lambda: orthography.find(rowset, rows, glosses=gloss_of)),
            step("meanings", lambda: meanings.find(entries, rows)),
            step("coverage", lambda: coverage.find({fold(entry.form): entry.count for entry in entries})),
            step("lengths", tokens.result),
        ]

        # 3. The split of the rows that are kept.
        kept, rows = report.leave_out(rowset, rows, sections, args.drop)
        asked = {key: getattr(args, key) for key in corpus.SPLIT_DEFAULTS if getattr(args, key) is not None}
        try:
            split = earlier[1] if earlier else step(
                "split", lambda: corpus.split_as(rows, kept.sha256, **(corpus.SPLIT_DEFAULTS | asked))
            )  # fmt: skip
        except StoneyError as error:
            if args.output_dir:
                raise
            split = None
            sections.append(splits.impossible(str(error), rows))
        else:
            pos_of = {fold(entry.form): entry.pos[0][0] for entry in entries if entry.pos}
            sections.append(splits.find(split, rows, pos_of))

        # 4. The directory.
        summary = report.summarise(rowset, sections, arguments=identity["arguments"], kept=len(kept.rows))
        text = report.as_text(summary, entries)
        described = corpus.Corpus(kept, split).describe() if split else None
        tracker = tracking.start_stage("inspect_hf_dataset", args, name=output.name, data=described)
        if args.output_dir:
            prepared.write(work, kept, split)
        report.write(work, summary, text, sections, entries, kept)
        stage = checkpoints.describe_stage(
            prepared.STAGE if args.output_dir else REPORT_STAGE,
            arguments=vars(args),
            seed=args.seed,
            data=described,
            files=prepared.file_hashes(work),
            identity=identity,
            wandb=tracker.record,
        )
        checkpoints.write_json(work / checkpoints.STAGE_FILE, stage)
    print(text)
    print(f"\n{output}/: report.html, report.json, findings.jsonl, lexicon.jsonl, plots/"
          + (f"; rows to train on: --dataset {output}" if args.output_dir else ""))  # fmt: skip

    report.track(tracker, output, summary, entries)
    tracker.artifact(output.name, stage["stage"], str(output))
    tracker.finish()
    return exit_code(summary, args)


def check_args(args: argparse.Namespace) -> None:
    """Raise ``StoneyError`` with every problem of the arguments that can be seen before anything is read."""
    problems = cli.Problems()
    if args.output_dir is not None and not args.output_dir.strip():
        problems.add("--output_dir: is empty; name a directory, or leave the flag out for a report alone")
    for flag in ("test_fraction", "validation_fraction"):
        value = getattr(args, flag)
        if value is not None and not 0 < value < 1:
            problems.add(f"--{flag} {value:g}: expected a share above 0 and below 1")
    if args.drop and not args.output_dir:
        problems.add("--drop: leaves rows out of a prepared directory; name one with --output_dir")
    if not args.near_duplicate_threshold:
        problems.add(
            "--near_duplicate_threshold 0: every row is like every other; expected a number above 0, such as 0.8"
        )
    if args.allow and not args.strict:
        problems.add("--allow: only with --strict, which it makes milder")
    if prepared.is_prepared(args.dataset):
        for flag in ("output_dir", "split", "test_fraction", "validation_fraction", "split_seed"):
            if getattr(args, flag) is not None:
                problems.add(f"--{flag}: {args.dataset} is prepared already; give its source to prepare it otherwise")
    source = Path(args.dataset)
    if args.output_dir and source.is_dir() and Path(args.output_dir).resolve().is_relative_to(source.resolve()):
        problems.add(f"--output_dir: {args.output_dir} lies in the dataset; choose a directory beside it")
    elif args.output_dir and source.exists() and source.resolve().is_relative_to(Path(args.output_dir).resolve()):
        problems.add(f"--output_dir: {args.output_dir} holds the dataset, which it would replace; choose another")
    problems.raise_if_any()


def report_name(dataset: str) -> str:
    """The name under inspection/ for a dataset: its path or hub id with dashes, so that two files called rows.csv differ."""
    return re.sub(r"[^\w.-]+", "-", dataset)[-80:].strip("-.") or "dataset"


def may_replace(output: Path, args: argparse.Namespace) -> bool:
    """Whether what stands at ``output`` may go: with --overwrite, or an earlier report on the same dataset.

    Raises ``StoneyError`` for what this script did not make.
    """
    if not output.exists():
        return False
    stage = (checkpoints.read_stage(output) if output.is_dir() else None) or {}
    if stage.get("stage") not in (prepared.STAGE, REPORT_STAGE):
        raise StoneyError(f"{output}: was not made by this script; choose another --output_dir")
    same = (stage.get("arguments") or {}).get("dataset") == args.dataset
    return args.overwrite or (stage["stage"] == REPORT_STAGE and not args.output_dir and same)


def finished(output: Path, identity: dict, args: argparse.Namespace) -> bool:
    """Whether ``output`` is the result of these arguments on these rows."""
    stage = checkpoints.read_stage(output) if output.is_dir() else None
    if not args.overwrite and stage and stage.get("identity") == identity:
        return True
    return runs.is_finished([output], identity, overwrite=may_replace(output, args))


def find_tokenizer(name: str) -> ModelSource:
    """A checkpoint, or a folder with a tokenizer and no weights. Raises ``StoneyError`` as ``find_model`` does."""
    if Path(name).is_dir() and (Path(name) / "tokenizer.json").exists() and not (Path(name) / "config.json").exists():
        return ModelSource("model", name)
    return find_model(resolve_unpublished(name)[0])


def load_tokenizer(source: ModelSource | None) -> tuple[object | None, str]:
    """(tokenizer, ""), or (None, why there is none) where no tokenizer was asked for and the default is out of reach."""
    from stoney_rl import models, prompts

    try:
        tokenizer = models.load_tokenizer(source or find_model(DEFAULT_MODEL))
    except StoneyError as error:
        if source:
            raise
        return None, f"tokens were not counted ({error}); name a tokenizer with --tokenizer"
    prompts.prepare_tokenizer(tokenizer)
    return tokenizer, ""


def step(name: str, call: Callable) -> object:
    """The result of ``call``, with a line on stderr that says what is being done."""
    print(f"inspecting: {name} ...", file=sys.stderr, flush=True)
    return call()


def exit_code(summary: dict, args: argparse.Namespace) -> int:
    """1 where --strict finds a failure that neither --allow lets pass nor --drop has left out."""
    passed = {*args.allow, *args.drop}
    failing = [found for found in summary["findings"] if found["severity"] == FAILURE and found["kind"] not in passed]
    if args.strict and failing:
        print(f"--strict: {', '.join(found['kind'] for found in failing)} (--allow FINDING lets one pass)")
        return EXIT_FINDINGS
    return 0


if __name__ == "__main__":
    cli.run(main)
