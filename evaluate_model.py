"""Evaluate a checkpoint on rows it was not trained on, beside baselines, with intervals.

    python evaluate_model.py --model_path stoney_lora_merged --baseline base --baseline retrieval
    python evaluate_model.py --model_path stoney_rl_grpo --num_samples 400
    python evaluate_model.py --model_path checkpoints/smollm2-135m --dataset data/planted/rows.jsonl

Reads: a checkpoint directory (adapter or merged) or hub id, and the rows that its stage.json names, or --dataset.
Splits the rows as training did, checks that no evaluated row was trained on, and reports seen and unseen lexemes apart.
Baselines: another checkpoint, an earlier output directory of this script, 'base' (the model that training started
from) or 'retrieval' (the answer of the nearest training row: what memory alone can do).
Writes --output_dir: results.json, predictions.jsonl, results.png, and a folder for each baseline. An interrupted run
continues where it stopped; a finished one is shown again.
Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

import argparse
import hashlib
import time
from pathlib import Path

from stoney_rl import checkpoints, cli, runs, tracking
from stoney_rl.errors import StoneyError
from stoney_rl.models import ModelSource, find_model, resolve_unpublished
from stoney_rl.predictions import PREDICTIONS_FILE

DEFAULT_DATASET = "HarleyCooper/StoneyNakoda45k"
RETRIEVAL = "retrieval"
RESULTS_FILE, SUMMARY_FILE = "results.json", "summary.txt"
# Arguments that change nothing in the result.
NOT_IDENTITY = {"overwrite", "config", "batch_size", "output_dir", "model_path", "baseline"}
EXAMPLES = 10
MIN_RESAMPLES = 100  # as metrics.intervals asks for, but before anything is generated


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model_path", required=True, help="checkpoint directory (adapter or merged) or hub id")
    parser.add_argument("--baseline", action="append", default=[], help="repeatable; see above")
    parser.add_argument("--output_dir", help="default: evaluation/<model>-<split>")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results in the output directory")

    data = parser.add_argument_group("rows")
    data.add_argument("--dataset", help=f"default: the checkpoint's own, else {DEFAULT_DATASET}")
    data.add_argument("--dataset_revision", help="hub revision of the dataset")
    data.add_argument("--split", choices=["test", "validation", "train", "all"], default="test",
                      help="train and all include training rows: memory, not ability")  # fmt: skip
    data.add_argument(
        "--num_samples", type=cli.positive_int, help="rows, drawn by --seed, seen and unseen in proportion"
    )
    cli.add_split_flags(data, "the checkpoint's own")

    generation = parser.add_argument_group("generation (greedy)")
    generation.add_argument(
        "--batch_size", type=cli.positive_int, default=16, help="prompts at a time; changes no answer in fp32"
    )
    generation.add_argument("--max_new_tokens", type=cli.positive_int, default=128, help="tokens an answer at most")
    generation.add_argument("--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
                            help="auto: bf16 on a GPU, fp32 on a CPU")  # fmt: skip

    statistics = parser.add_argument_group("statistics")
    statistics.add_argument("--seed", type=cli.non_negative_int, default=0, help="sampling of rows and bootstrap")
    statistics.add_argument("--resamples", type=cli.positive_int, default=2000, help="bootstrap resamples")
    cli.add_tracking_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    if args.resamples < MIN_RESAMPLES:
        raise StoneyError(f"--resamples {args.resamples}: expected at least {MIN_RESAMPLES}; 1,000 to 2,000 are usual")
    tracking.load_env()

    # 1. The systems: the model and its baselines.
    model_name, notice = resolve_unpublished(args.model_path)
    if notice:
        print(notice)
    source = find_model(model_name)
    for line in checkpoints.lineage(Path(source.name)):
        print(f"  {line}")
    systems: dict[str, ModelSource | Path | str] = {short_name(source.name): source}
    for baseline in args.baseline:
        name, baseline_source = find_baseline(baseline, source)
        if name in systems:
            raise StoneyError(f"--baseline {baseline}: a second system called {name}; give each folder its own name")
        systems[name] = baseline_source

    # 2. The rows: split as in training, none of them trained on.
    from stoney_rl import corpus, data, predictions

    held_out = corpus.held_out(
        source.name,
        args.split,
        dataset=args.dataset,
        default_dataset=DEFAULT_DATASET,
        revision=args.dataset_revision,
        num_samples=args.num_samples,
        seed=args.seed,
        split_seed=args.split_seed,
        test_fraction=args.test_fraction,
        validation_fraction=args.validation_fraction,
    )
    print(data.describe(held_out.corpus.rowset), *held_out.notes, sep="\n")
    check_baselines(systems, held_out, args)
    output = Path(args.output_dir or Path("evaluation") / f"{short_name(source.name)}-{args.split}")
    identity = runs.identify(
        vars(args),
        NOT_IDENTITY,
        systems={name: describe_system(system) for name, system in systems.items()},
        data_sha256=held_out.corpus.rowset.sha256,
    )
    if args.overwrite and output.exists() and not (output / RESULTS_FILE).exists():
        raise StoneyError(
            f"--overwrite: {output} is not an evaluation (no {RESULTS_FILE}); choose another --output_dir"
        )
    if runs.is_finished([output], identity, overwrite=args.overwrite, record=RESULTS_FILE):
        print((output / SUMMARY_FILE).read_text(encoding="utf-8"))
        print(f"{output}/: evaluated with these settings already (--overwrite evaluates again)")
        return
    partial = runs.open_partial(output, identity, resume=True, overwrite=args.overwrite)

    # 3. One pass of generation for each system.
    from stoney_rl.metrics import report, retrieval

    parent = checkpoints.tracked(source.name)
    tracker = tracking.start_stage("evaluate_model", args, name=output.name, group=parent.get("group"))
    tracker.use_artifact(parent.get("artifact"))
    answers, seconds = {}, {}
    for name, system in systems.items():
        started = time.monotonic()
        folder = partial if system is source else partial / "baselines" / name
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / PREDICTIONS_FILE
        done = predictions.read(path)
        todo = [row for row in held_out.rows if row.id not in done]
        if done and todo:
            print(f"{name}: {len(done)} answers are there already, {len(todo)} to go")
        if isinstance(system, Path):
            predictions.append(path, predictions.from_earlier(system, todo, held_out.seen))
        elif system == RETRIEVAL:
            found = retrieval.retrieve_answers(held_out.corpus.split.train, [row.question for row in todo])
            predictions.append(
                path,
                [
                    predictions.record(row, text, held_out.seen.get(row.id))
                    for row, text in zip(todo, found, strict=True)
                ],
            )
        elif todo:
            predictions.from_model(
                name,
                system,
                todo,
                held_out.seen,
                path,
                dtype=args.dtype,
                max_new_tokens=args.max_new_tokens,
                batch_size=args.batch_size,
            )
        done = predictions.read(path)
        answers[name] = [done[row.id] for row in held_out.rows]
        seconds[name] = round(time.monotonic() - started, 1)

    # 4. Scores, comparisons, and what a person reads.
    scores = {name: report.score(answers[name], seed=args.seed, resamples=args.resamples) for name in systems}
    main_name = next(iter(systems))
    comparisons = [
        report.compare(
            answers[name], answers[main_name], seed=args.seed, resamples=args.resamples, names=(name, main_name)
        )
        for name in list(systems)[1:]
    ]
    results = checkpoints.describe_stage(
        "evaluation",
        arguments=vars(args),
        seed=args.seed,
        identity=identity,
        lineage=checkpoints.lineage(Path(source.name)),
        data=held_out.corpus.describe() | {"certificate": held_out.corpus.split.certificate},
        training_rows_scored=held_out.trained,
        n=len(held_out.rows),
        systems=scores,
        comparisons=comparisons,
        truncated={name: sum(row["truncated"] for row in answers[name]) for name in systems},
        seconds=seconds,
        wandb={"run_id": tracker.run_id, "group": tracker.group, "url": tracker.url},
    )
    text = summary(results, answers)
    (partial / SUMMARY_FILE).write_text(text + "\n", encoding="utf-8")
    report.plot(
        {name: scores[name] for name in [*list(systems)[1:], main_name]},
        partial / "results.png",
        title=f"{main_name}: {args.split} split, n = {len(held_out.rows)}",
    )
    checkpoints.write_json(partial / RESULTS_FILE, results)
    checkpoints.publish(partial, output)
    print(text)
    print(f"\n{output}/: {RESULTS_FILE}, {PREDICTIONS_FILE}, {SUMMARY_FILE}, results.png")

    for name, score in scores.items():
        for group, metrics in score["groups"].items():
            for metric, entry in metrics.items():
                if entry["value"] is not None:
                    tracker.log({f"{name}/{group}/{metric}": entry["value"]})
    columns = ["id", "seen", "prompt", "reference", *systems]
    tracker.table("predictions", columns, table_rows(answers, columns[4:]))
    tracker.image("results", output / "results.png")
    tracker.artifact(output.name, "evaluation", str(output))
    tracker.finish()


def short_name(name: str) -> str:
    return (Path(name).resolve() if Path(name).is_dir() else Path(name)).name


def find_baseline(baseline: str, source: ModelSource) -> tuple[str, "ModelSource | Path | str"]:
    """The baseline's name, and what it is: a model, an earlier output directory, or the retrieval baseline."""
    if baseline == RETRIEVAL:
        return RETRIEVAL, RETRIEVAL
    if baseline == "base":
        stage = checkpoints.read_stage(Path(source.name)) if Path(source.name).is_dir() else None
        base = source.base or (stage or {}).get("base_model")
        if not base or (stage and stage["stage"] == "base"):
            raise StoneyError(f"--baseline base: {source.name} does not say what it was trained from; name the model")
        base = checkpoints.locate(base, Path(source.name))
        trained = (stage or {}).get("arguments", {})
        return short_name(base), find_model(base, revision=None if Path(base).is_dir() else trained.get("revision"))
    path = Path(baseline)
    if path.is_dir() and (path / RESULTS_FILE).exists():
        if not (path / PREDICTIONS_FILE).exists():
            raise StoneyError(f"--baseline {baseline}: has {RESULTS_FILE} but no {PREDICTIONS_FILE}; evaluate it again")
        return short_name(baseline), path
    return short_name(baseline), find_model(resolve_unpublished(baseline)[0])


def check_baselines(systems: dict, held_out: "corpus.HeldOut", args: argparse.Namespace) -> None:  # noqa: F821
    """Raise ``StoneyError``, before anything is generated, for a baseline that can't be compared on these rows."""
    from stoney_rl import corpus, predictions

    for name, system in systems.items():
        if isinstance(system, Path):
            predictions.from_earlier(system, held_out.rows, held_out.seen)
        elif isinstance(system, ModelSource) and args.split in ("test", "validation"):
            record = corpus.training_record(system.name)
            trained = corpus.trained_rows(held_out.rows, record) if record else []
            if trained:
                raise StoneyError(f"--baseline {name}: was trained on {len(trained)} of these rows; choose another")


def describe_system(system: "ModelSource | Path | str") -> dict:
    """What identifies a system: its path, and the fingerprint of its weights, where recorded, or of its answers."""
    if isinstance(system, ModelSource):
        stage = checkpoints.read_stage(Path(system.name)) if Path(system.name).is_dir() else None
        return {"path": system.name, "fingerprint": ((stage or {}).get("fingerprint") or {}).get("sha256")}
    answers = system / PREDICTIONS_FILE if isinstance(system, Path) else None
    digest = hashlib.sha256(answers.read_bytes()).hexdigest() if answers else None
    return {"path": str(system), "fingerprint": digest}


def table_rows(answers: dict[str, list[dict]], names: list[str]) -> list[list]:
    first = answers[names[0]]
    return [
        [
            row["id"],
            row["seen"],
            row["prompt"],
            row["reference"],
            *(answers[name][i]["prediction"] for name in names),
        ]
        for i, row in enumerate(first)
    ]


def summary(results: dict, answers: dict[str, list[dict]]) -> str:
    """What is printed: examples, the table, and the verdict in words. The baselines come first, the model last."""
    from stoney_rl.metrics import report

    model_name, *baselines = answers
    shown = [*baselines, model_name]
    lines = [
        "",
        report.examples_table({name: answers[name] for name in shown}, n=EXAMPLES, seed=results["seed"]),
        "",
        report.metric_table({name: results["systems"][name] for name in shown}, comparisons=results["comparisons"]),
        "",
    ]
    if RETRIEVAL in answers:
        lines.append(f"{RETRIEVAL}: no model; it repeats the answer of the most similar training question.")
    lines += [
        report.verdict(comparison, metric=metric)
        for comparison in results["comparisons"]
        for metric in ("chrf", "form")
    ]
    split = results["arguments"]["split"]
    if split in ("train", "all"):
        trained = results["training_rows_scored"]
        count = "an unknown number" if trained is None else trained
        lines.append(f"--split {split}: {count} of these rows were trained on. The numbers show memory, not ability.")
    cut = {name: count for name, count in results["truncated"].items() if count}
    if cut:
        limit = results["arguments"]["max_new_tokens"]
        listed = ", ".join(f"{name} {count}" for name, count in cut.items())
        lines.append(f"Answers cut at {limit} tokens (--max_new_tokens): {listed} of {results['n']}.")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
