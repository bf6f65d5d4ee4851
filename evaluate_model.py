"""Evaluate a checkpoint on rows it was not trained on, beside baselines, with intervals.

    python evaluate_model.py --model_path stoney_lora_merged --baseline base --baseline retrieval
    python evaluate_model.py --model_path stoney_rl_grpo --num_samples 400
    python evaluate_model.py --model_path stoney_rl_grpo --baseline checkpoints/smollm2-135m --baseline base \\
        --run_comet --run_mauve --validate_metrics
    python evaluate_model.py --model_path checkpoints/smollm2-135m --dataset data/planted/rows.jsonl
    python evaluate_model.py --verify evaluation/stoney_rl_grpo-test/results.json

Reads: a checkpoint directory (adapter or merged) or hub id, and the rows that its stage.json names, or --dataset.
Splits the rows as training did, checks that no evaluated row was trained on, and reports seen and unseen lexemes apart.
Baselines, in the order in which they were trained: another checkpoint, an earlier output directory of this script, 'base'
(the model that training started from: of GRPO the SFT model) or 'retrieval' (the answer of the nearest training row: what
memory alone can do).
Writes --output_dir: results.json, predictions.jsonl, lexicon.jsonl, summary.txt, results.png, errors.html, with baselines
comparison.png and a folder for each, with --validate_metrics validation.png. An interrupted run continues where it
stopped; a finished one is shown again, or scored again where other metrics are asked for: no answer is generated twice.
--verify makes the numbers again from that directory, and the answers too where rows and checkpoint are still there.
Exit codes: 0 done, 1 --verify found a difference, 2 bad input, 130 interrupted.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

from stoney_rl import artifacts, checkpoints, cli, runs, terminal, tracking
from stoney_rl.errors import StoneyError
from stoney_rl.metrics.systems import RESULTS_FILE, check, describe, find_all, first_ancestor, short_name
from stoney_rl.models import ModelSource, find_model, resolve_unpublished
from stoney_rl.predictions import PREDICTIONS_FILE, RETRIEVAL

DEFAULT_DATASET = "HarleyCooper/StoneyNakoda45k"
DEFAULT_COMET = "Unbabel/wmt22-comet-da"
DEFAULT_TEMPERATURE = 0.8
SUMMARY_FILE = "summary.txt"
# Arguments that say how answers are scored, and not which; a change of them generates nothing.
SCORING = {"resamples", "lexicon", "run_comet", "comet_model", "run_mauve", "mauve_featurizer", "validate_metrics"}
# Arguments that change no answer.
NOT_IDENTITY = SCORING | {
    "overwrite", "config", "batch_size", "output_dir", "model_path", "baseline", "verify", "comet_timeout",
}  # fmt: skip
EXAMPLES = 5
MIN_RESAMPLES = 100  # as metrics.intervals asks for, but before anything is generated


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model_path", help="checkpoint directory (adapter or merged) or hub id")
    parser.add_argument("--baseline", action="append", default=[], help="repeatable; see above")
    parser.add_argument("--output_dir", help="default: evaluation/<model>-<split>")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results in the output directory")
    parser.add_argument("--verify", metavar="RESULTS.json", help="make these numbers again, and say what differs")

    data = parser.add_argument_group("rows")
    data.add_argument("--dataset", help=f"default: the checkpoint's own, else {DEFAULT_DATASET}")
    data.add_argument("--dataset_revision", help="hub revision of the dataset")
    data.add_argument("--split", choices=["test", "validation", "train", "all"], default="test",
                      help="train and all include training rows: memory, not ability")  # fmt: skip
    data.add_argument(
        "--num_samples", type=cli.positive_int, help="rows, drawn by --seed, seen and unseen in proportion"
    )
    cli.add_split_flags(data, "the checkpoint's own")

    generation = parser.add_argument_group("generation")
    generation.add_argument(
        "--batch_size", type=cli.positive_int, default=16, help="prompts at a time; changes no answer in fp32"
    )
    generation.add_argument("--max_new_tokens", type=cli.positive_int, default=128, help="tokens an answer at most")
    generation.add_argument("--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
                            help="auto: bf16 on a GPU, fp32 on a CPU")  # fmt: skip
    generation.add_argument("--num_generations", type=cli.non_negative_int, default=0,
                            help="answers sampled beside the greedy one, for pass@k; all else is about the greedy one")  # fmt: skip
    generation.add_argument(
        "--temperature", type=cli.positive_float, help=f"of the sampled answers; default: {DEFAULT_TEMPERATURE}"
    )

    metrics = parser.add_argument_group("metrics (see stoney_rl/metrics/README.md)")
    metrics.add_argument("--lexicon", help="lexicon file, or prepared directory; default: the prepared directory's own, "
                                           "else made of the training rows")  # fmt: skip
    metrics.add_argument("--run_comet", action="store_true", help="COMET, which has seen no Stoney (needs make comet)")
    metrics.add_argument("--comet_model", help=f"folder, .ckpt file or hub id; default: {DEFAULT_COMET}")
    metrics.add_argument("--comet_timeout", type=cli.positive_float, default=600.0,
                         help="seconds for 128 rows, after which COMET is left out")  # fmt: skip
    metrics.add_argument("--run_mauve", action="store_true", help="MAUVE; needs about 1,000 rows to say anything")
    metrics.add_argument("--mauve_featurizer", metavar="DIR",
                         help="model whose states are its features; default: the one that all training started from")  # fmt: skip
    metrics.add_argument("--validate_metrics", action="store_true",
                         help="break gold answers on purpose: which metrics notice? scores 21 times as many rows")  # fmt: skip

    statistics = parser.add_argument_group("statistics")
    statistics.add_argument(
        "--seed", type=cli.non_negative_int, default=0, help="drawing of rows and samples, bootstrap"
    )
    statistics.add_argument("--resamples", type=cli.positive_int, default=2000, help="bootstrap resamples")
    cli.add_tracking_flags(parser, {"model_path": artifacts.ANY_MODEL, "dataset": artifacts.ROWS})
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = cli.parse_stage(parser, argv)
    if args.verify:
        from stoney_rl.metrics import verification

        return verification.verify(Path(args.verify), DEFAULT_DATASET)
    if not args.model_path:
        parser.error("the following arguments are required: --model_path, or --verify")
    tracking.load_env()

    # 1. The systems: the model and its baselines. The metrics that need models of their own.
    model_name, notice = resolve_unpublished(args.model_path)
    if notice:
        print(notice)
    source = find_model(model_name)
    for line in checkpoints.lineage(Path(source.name)):
        print(f"  {line}")
    systems = find_all(source, args.baseline)
    optional = check_metrics(args, source)

    # 2. The rows: split as in training, none of them trained on. What is known of the language.
    from stoney_rl import corpus, data, lexicon, predictions
    from stoney_rl.metrics import comparison, error_page, errors, measure, report, validation

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
    check(systems, held_out, args.split)
    entries = read_entries(args.lexicon, held_out)
    output = Path(args.output_dir or Path("evaluation") / f"{short_name(source.name)}-{args.split}")
    identity = runs.identify(
        vars(args),
        NOT_IDENTITY,
        systems={name: describe(system) for name, system in systems.items()},
        data_sha256=held_out.corpus.rowset.sha256,
    )
    scoring = {
        "resamples": args.resamples,
        "lexicon_sha256": measure.lexicon_sha256(entries) if entries else None,
        "comet_model": args.comet_model,
        "mauve_featurizer": args.mauve_featurizer,
        "validate_metrics": args.validate_metrics,
    }
    if args.overwrite and output.exists() and not (output / RESULTS_FILE).exists():
        raise StoneyError(
            f"--overwrite: {output} is not an evaluation (no {RESULTS_FILE}); choose another --output_dir"
        )
    answered = runs.is_finished([output], identity, overwrite=args.overwrite, record=RESULTS_FILE)
    earlier = json.loads((output / RESULTS_FILE).read_text(encoding="utf-8")) if answered else None
    if earlier and is_scored(earlier, scoring, output):
        print((output / SUMMARY_FILE).read_text(encoding="utf-8"))
        print(f"{output}/: evaluated with these settings already (--overwrite evaluates again)")
        return 0
    partial = runs.open_partial(output, identity, resume=not args.overwrite, overwrite=args.overwrite)
    if earlier:
        print(f"{output}/: answered already; only the metrics are computed")
        predictions.copy(output, partial)

    # 3. One pass of generation for each system.
    others = [system.name for system in systems.values() if isinstance(system, ModelSource) and system is not source]
    tracker = runs.start_tracking(
        "evaluate_model", args, partial, model=source.name, data=held_out.corpus.describe(), also=others
    )
    answers, files, seconds = {}, {}, {}
    for name, system in systems.items():
        started = time.monotonic()
        path = (partial if system is source else partial / "baselines" / name) / PREDICTIONS_FILE
        answers[name] = predictions.complete(
            path,
            name,
            system,
            held_out,
            dtype=args.dtype,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            num_generations=args.num_generations,
            temperature=args.temperature,
            seed=args.seed,
        )
        files[name] = {"file": str(path.relative_to(partial)), "sha256": predictions.write(path, answers[name])}
        seconds[name] = round(time.monotonic() - started, 1)

    # 4. Scores, comparisons, errors, and what a person reads.
    numbers, found = measure.measure(
        answers, entries, optional, seed=args.seed, resamples=args.resamples, validate=args.validate_metrics
    )
    main_name = next(iter(systems))
    results = checkpoints.describe_stage(
        "evaluation",
        arguments=vars(args),
        seed=args.seed,
        identity=identity,
        scoring=scoring,
        lineage=checkpoints.lineage(Path(source.name)),
        data=held_out.corpus.describe() | {"certificate": held_out.corpus.split.certificate},
        training_rows_scored=held_out.trained,
        n=len(held_out.rows),
        answers=files,
        **numbers,
        truncated={name: sum(row["truncated"] for row in answers[name]) for name in systems},
        seconds=earlier["seconds"] if earlier else seconds,
        wandb=tracker.record,
    )
    text = summary(results, answers)
    (partial / SUMMARY_FILE).write_text(text + "\n", encoding="utf-8")
    title = f"{main_name}: {args.split} split, n = {len(held_out.rows)}"
    scores = numbers["systems"]
    report.plot({name: scores[name] for name in [*list(systems)[1:], main_name]}, partial / "results.png", title=title)
    if entries:
        lexicon.write_lexicon(partial / lexicon.LEXICON_FILE, entries)
        error_page.write(partial / "errors.html", answers, found, title=title)
    if numbers["comparison"]:
        comparison.plot(numbers["comparison"], partial / "comparison.png", title=title)
    if numbers["validity"]:
        validation.plot(numbers["validity"], partial / "validation.png")
    checkpoints.write_json(partial / RESULTS_FILE, results)
    checkpoints.publish(partial, output)
    print(text)
    print(f"\n{output}/: {', '.join(sorted(path.name for path in output.iterdir() if path.is_file()))}")

    # 5. The same to W&B.
    for name, score in scores.items():
        for group, metrics in score["groups"].items():
            for metric, entry in metrics.items():
                if entry["value"] is not None:
                    tracker.log({f"{name}/{group}/{metric}": entry["value"]})
    asked = ["id", "seen", "prompt", "reference"]
    told = [
        [row[0][key] for key in asked] + [one["prediction"] for one in row]
        for row in zip(*answers.values(), strict=True)
    ]
    tracker.table("predictions", [*asked, *answers], told)
    for name, classified in found.items():
        tracker.table(f"errors/{name}", *errors.as_table(answers[name], classified))
    for picture in sorted(output.glob("*.png")):
        tracker.image(picture.stem, picture)
    if found:
        tracker.html("errors", output / "errors.html")
    tracker.artifact(output.name, "evaluation", str(output))
    tracker.finish()
    return 0


def check_metrics(args: argparse.Namespace, source: ModelSource) -> "dict[str, measure.Opened]":  # noqa: F821
    """COMET and MAUVE as far as asked for; fills in the defaults of their models, and of the temperature.

    Raises ``StoneyError`` with every problem at once. A COMET environment that is missing is told now, and is none.
    """
    from stoney_rl.metrics import comet, measure
    from stoney_rl.rewards.flags import attempt

    problems = cli.Problems()
    if args.resamples < MIN_RESAMPLES:
        problems.add(f"--resamples {args.resamples}: expected at least {MIN_RESAMPLES}; 1,000 to 2,000 are usual")
    if args.temperature and not args.num_generations:
        problems.add("--temperature: greedy answers have none; it goes with --num_generations")
    if args.num_generations:
        args.temperature = args.temperature or DEFAULT_TEMPERATURE
    for flag, run in (("comet_model", "run_comet"), ("mauve_featurizer", "run_mauve")):
        if getattr(args, flag) and not getattr(args, run):
            problems.add(f"--{flag}: goes with --{run}; add it")
    if args.lexicon and not Path(args.lexicon).exists():
        problems.add(f"--lexicon {args.lexicon}: no such file or directory")
    if args.run_comet:
        args.comet_model = args.comet_model or DEFAULT_COMET
        attempt(problems, comet.find_checkpoint, args.comet_model, flag="--comet_model ")
        if not comet.PYTHON.exists():
            print("--run_comet: its environment is missing; the other metrics come out without it (make comet)")
    if args.run_mauve and not args.mauve_featurizer:
        args.mauve_featurizer = first_ancestor(source)
        if args.mauve_featurizer:
            print(f"--run_mauve: features of {args.mauve_featurizer} (--mauve_featurizer chooses another model)")
        else:
            problems.add(f"--run_mauve: {source.name} does not say what it was trained from; add --mauve_featurizer")
    problems.raise_if_any()
    return measure.optional_metrics(
        comet_model=args.comet_model, comet_timeout=args.comet_timeout, mauve_featurizer=args.mauve_featurizer
    )


def read_entries(path: str | None, held_out: "corpus.HeldOut") -> "list[lexicon.LexiconEntry]":  # noqa: F821
    """The entries of --lexicon, else of the prepared directory, else what the training rows say; and says which."""
    from stoney_rl import lexicon, prepared

    dataset, train = held_out.corpus.rowset.source, held_out.corpus.split.train
    if path is None and not prepared.is_prepared(dataset):
        entries = lexicon.build_lexicon(train)
        print(
            f"lexicon: {len(entries):,} forms that the {len(train):,} training rows mention; --lexicon gives a better one"
        )
        return entries
    found = lexicon.lexicon_path(path or dataset)
    entries = lexicon.read_lexicon(found)
    print(f"lexicon: {found}, {len(entries):,} forms")
    return entries


def is_scored(earlier: dict, scoring: dict, output: Path) -> bool:
    """Whether the results in ``output`` have all the numbers asked for. Raises ``StoneyError`` if they would lose some."""
    before, failed = earlier["scoring"], earlier["unavailable"]
    flags = {"comet": ("comet_model", "--run_comet"), "mauve": ("mauve_featurizer", "--run_mauve"),
             "validity": ("validate_metrics", "--validate_metrics")}  # fmt: skip
    lost = [flag for name, (key, flag) in flags.items() if before[key] and not scoring[key] and name not in failed]
    if lost:
        raise StoneyError(f"{output}: was scored with {' '.join(lost)}; give that again to keep it, or --overwrite")
    return before == scoring and not failed


def summary(results: dict, answers: dict[str, list[dict]]) -> str:
    """What is printed: examples, tables, and the verdict in words last. The baselines come first, the model last."""
    from stoney_rl.metrics import comparison, errors, report, validation

    model_name, *baselines = answers
    shown = [*baselines, model_name]
    parts = [
        "\n" + report.examples_table({name: answers[name] for name in shown}, n=EXAMPLES, seed=results["seed"]),
        report.metric_table({name: results["systems"][name] for name in shown}),
    ]
    if results["validity"]:
        parts.append(validation.as_text(results["validity"]))
    if results["errors"]:
        parts.append(errors.as_text(results["errors"][model_name], model_name))
    if results["comparison"]:
        parts.append(comparison.difference_table(results["comparison"]))
    tracked = [line for line in results["lineage"] if ", run http" in line]
    if tracked:
        parts.append("\n".join(["W&B runs that made this model:", *(f"  {line}" for line in tracked)]))
    lines = [f"{metric.upper()} is not in these numbers. {why}" for metric, why in results["unavailable"].items()]
    if RETRIEVAL in answers:
        lines.append(f"{RETRIEVAL}: no model; it repeats the answer of the most similar training question.")
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
    if lines:
        parts.append("\n".join(lines))
    if results["comparison"]:
        parts.append(comparison.verdicts(results["comparison"], about=model_name))
    counted = results["errors"] or {}
    if counted and counted[model_name]["asked"]:
        hits = ", ".join(f"{name} {counted[name]['hits']}" for name in shown)
        sentence = (
            f"Answers with every word of the language that they were asked for, of {counted[model_name]['asked']}: {hits}. "
            "chrF++ is likeness to the expected answer as a whole, most of which may be English."
        )
        parts.append("\n".join(terminal.wrap(sentence, shutil.get_terminal_size((100, 24)).columns, "  ")))
    return "\n\n".join(parts)


if __name__ == "__main__":
    cli.run(main)
