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
import json
import random
import time
from pathlib import Path

from stoney_rl import checkpoints, cli
from stoney_rl.errors import StoneyError
from stoney_rl.models import ModelSource, find_model, resolve_unpublished

DEFAULT_DATASET = "HarleyCooper/StoneyNakoda45k"
RETRIEVAL = "retrieval"
RESULTS_FILE, PREDICTIONS_FILE = "results.json", "predictions.jsonl"
EXAMPLES = 10


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
    data.add_argument("--test_fraction", type=cli.fraction, help="default: the checkpoint's own, else 0.1")
    data.add_argument("--validation_fraction", type=cli.fraction, help="default: the checkpoint's own, else 0.05")
    data.add_argument("--split_seed", type=cli.non_negative_int, help="default: the checkpoint's own, else 0")

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

    # 1. The systems: the model and its baselines.
    model_name, notice = resolve_unpublished(args.model_path)
    if notice:
        print(notice)
    source = find_model(model_name)
    for line in checkpoints.lineage(Path(source.name)):
        print(f"  {line}")
    systems = {short_name(source.name): source}
    for baseline in args.baseline:
        name, baseline_source = find_baseline(baseline, source)
        if name in systems:
            raise StoneyError(f"--baseline {baseline}: a second system called {name}; give each folder its own name")
        systems[name] = baseline_source

    # 2. The rows: split as in training, none of them trained on.
    corpus_, rows, seen, record = select_rows(args, source)
    settings = {
        "model": describe_system(source),
        "baselines": {name: describe_system(system) for name, system in list(systems.items())[1:]},
        "data_sha256": corpus_.rowset.sha256,
        **{key: getattr(args, key) for key in ("split", "num_samples", "seed", "resamples", "max_new_tokens", "dtype")},
    }
    output = Path(args.output_dir or Path("evaluation") / f"{short_name(source.name)}-{args.split}")
    if show_finished(output, settings, args):
        return
    partial = open_partial(output, settings, args)

    # 3. One pass of generation for each system.
    from stoney_rl import tracking
    from stoney_rl.metrics import report

    tracker = tracking.start(
        "evaluate_model",
        vars(args),
        mode=args.wandb_mode,
        project=args.wandb_project,
        entity=args.wandb_entity,
        group=args.wandb_group or ((checkpoints.read_stage(Path(source.name)) or {}).get("wandb") or {}).get("group"),
        name=args.wandb_name or output.name,
    )
    tracker.use_artifact(short_name(source.name))
    predictions, timings = {}, {}
    for position, (name, system) in enumerate(systems.items()):
        started = time.monotonic()
        folder = partial if position == 0 else partial / "baselines" / name
        predictions[name] = predict(name, system, rows, seen, corpus_, folder, args)
        timings[name] = round(time.monotonic() - started, 1)

    # 4. Scores, comparisons, and what a person reads.
    scores = {name: report.score(predictions[name], seed=args.seed, resamples=args.resamples) for name in systems}
    main_name = next(iter(systems))
    comparisons = [
        report.compare(
            predictions[name], predictions[main_name], seed=args.seed, resamples=args.resamples, names=(name, main_name)
        )
        for name in list(systems)[1:]
    ]
    results = checkpoints.describe_stage(
        "evaluation",
        arguments=vars(args),
        seed=args.seed,
        settings=settings,
        lineage=checkpoints.lineage(Path(source.name)),
        data=corpus_.describe() | {"certificate": corpus_.split.certificate},
        training_rows_scored=count_trained(rows, record, args.split),
        n=len(rows),
        systems=scores,
        comparisons=comparisons,
        truncated={name: sum(row["truncated"] for row in predictions[name]) for name in systems},
        seconds=timings,
        wandb={"run_id": tracker.run_id, "group": tracker.group, "url": tracker.url},
    )
    text = summary(results, predictions)
    (partial / "summary.txt").write_text(text + "\n", encoding="utf-8")
    report.plot(
        {name: scores[name] for name in [*list(systems)[1:], main_name]},
        partial / "results.png",
        title=f"{main_name}: {args.split} split, n = {len(rows)}",
    )
    checkpoints.write_json(partial / RESULTS_FILE, results)
    checkpoints.publish(partial, output)
    print(text)
    print(f"\n{output}/: {RESULTS_FILE}, {PREDICTIONS_FILE}, summary.txt, results.png")

    for name, score in scores.items():
        for group, metrics in score["groups"].items():
            for metric, entry in metrics.items():
                if entry["value"] is not None:
                    tracker.log({f"{name}/{group}/{metric}": entry["value"]})
    columns = ["id", "seen", "prompt", "reference", *systems]
    tracker.table("predictions", columns, table_rows(predictions, columns[4:]))
    tracker.image("results", output / "results.png")
    tracker.artifact(output.name, "evaluation", str(output))
    tracker.finish()


def short_name(name: str) -> str:
    return Path(name).name


def find_baseline(baseline: str, source: ModelSource) -> tuple[str, "ModelSource | Path | str"]:
    """The baseline's name, and what it is: a model, an earlier output directory, or the retrieval baseline."""
    if baseline == RETRIEVAL:
        return RETRIEVAL, RETRIEVAL
    if baseline == "base":
        stage = checkpoints.read_stage(Path(source.name)) if Path(source.name).is_dir() else None
        base = source.base or (stage or {}).get("base_model")
        if not base or (stage and stage["stage"] == "base"):
            raise StoneyError(f"--baseline base: {source.name} does not say what it was trained from; name the model")
        return short_name(base), find_model(base)
    path = Path(baseline)
    if path.is_dir() and (path / RESULTS_FILE).exists():
        if not (path / PREDICTIONS_FILE).exists():
            raise StoneyError(f"--baseline {baseline}: has {RESULTS_FILE} but no {PREDICTIONS_FILE}; evaluate it again")
        return path.name, path
    return short_name(baseline), find_model(resolve_unpublished(baseline)[0])


def describe_system(system: "ModelSource | Path | str") -> dict:
    """What identifies a system: its path, and the fingerprint of its weights where one is recorded."""
    if isinstance(system, ModelSource):
        stage = checkpoints.read_stage(Path(system.name)) if Path(system.name).is_dir() else None
        return {"path": system.name, "fingerprint": ((stage or {}).get("fingerprint") or {}).get("sha256")}
    return {"path": str(system), "fingerprint": None}


def select_rows(args: argparse.Namespace, source: ModelSource) -> tuple["corpus.Corpus", list, dict, dict | None]:  # noqa: F821
    """The corpus, the rows to evaluate, which of them are seen, and the training record of the model, if any.

    Raises ``StoneyError`` if a row of a held-out split was trained on.
    """
    from stoney_rl import corpus, data

    stage = checkpoints.read_stage(Path(source.name)) if Path(source.name).is_dir() else None
    trained_on = (stage or {}).get("data") or {}
    dataset = args.dataset or trained_on.get("source") or DEFAULT_DATASET
    defaults = {"seed": 0, "test_fraction": 0.1, "validation_fraction": 0.05} | trained_on.get("split", {})
    asked = {
        "seed": args.split_seed,
        "test_fraction": args.test_fraction,
        "validation_fraction": args.validation_fraction,
    }
    for key, value in asked.items():
        if value is not None:
            if (
                key in trained_on.get("split", {})
                and value != trained_on["split"][key]
                and dataset == trained_on["source"]
            ):
                flag = "--split_seed" if key == "seed" else f"--{key}"
                raise StoneyError(
                    f"{flag} {value}: the checkpoint was trained with {trained_on['split'][key]}; leave it out"
                )
            defaults[key] = value
    prepared = corpus.prepare(dataset, revision=args.dataset_revision, **defaults)
    print(data.describe(prepared.rowset))
    split = prepared.split
    record_path = Path(source.name) / corpus.SPLIT_FILE
    record = json.loads(record_path.read_text(encoding="utf-8")) if record_path.exists() else None
    seen = dict(split.seen)
    parts = {"test": split.test, "validation": split.validation, "train": split.train}
    rows = [*split.train, *split.validation, *split.test] if args.split == "all" else parts[args.split]
    same_data = record is None or record["certificate"]["ids_sha256"] == split.certificate["ids_sha256"]
    if not same_data:
        print(f"{dataset}: other rows than {source.name} was trained on; seen and unseen go by its training lexemes")
        known = set(record["training_lexemes"])
        seen = {row.id: any(corpus.form_hash(form) in known for form in row.lexemes) for row in rows}
    if args.split not in ("train", "all"):
        trained = corpus.trained_rows(rows, record) if record else []
        if trained and same_data:
            raise StoneyError(
                f"{dataset}: {len(trained)} of the {args.split} rows were trained on; the split is broken"
            )
        if trained:
            print(f"{dataset}: {len(trained)} rows were trained on and are left out")
            rows = [row for row in rows if row not in trained]
    else:
        print(f"--split {args.split}: these are rows that a model was or may be trained on; the numbers show memory")
        seen |= {row.id: True for row in split.train}
    if not rows:
        raise StoneyError(f"{dataset}: no row is left in the {args.split} split; choose another split or more data")
    return prepared, draw(rows, seen, args.num_samples, args.seed), seen, record


def draw(rows: list, seen: dict, number: int | None, seed: int) -> list:
    """``number`` of the rows at random, seen and unseen in proportion, in their first order."""
    if number is None or number >= len(rows):
        if number and number > len(rows):
            print(f"--num_samples {number}: the split has {len(rows)} rows; all of them are used")
        return rows
    generator = random.Random(seed)
    groups = [[row for row in rows if not seen.get(row.id)], [row for row in rows if seen.get(row.id)]]
    share = [round(number * len(groups[0]) / len(rows))]
    share.append(number - share[0])
    chosen = {row.id for group, size in zip(groups, share, strict=True) for row in generator.sample(group, size)}
    return [row for row in rows if row.id in chosen]


def count_trained(rows: list, record: dict | None, split: str) -> int | str:
    """How many of the evaluated rows the model was trained on; 'unknown' for a model without a training record."""
    from stoney_rl import corpus

    if record is None:
        return 0 if split in ("test", "validation") else "unknown"
    return len(corpus.trained_rows(rows, record))


def show_finished(output: Path, settings: dict, args: argparse.Namespace) -> bool:
    """Print the summary of an earlier run with these settings. Raises ``StoneyError`` if another run's results stand there."""
    if args.overwrite or not output.exists():
        return False
    try:
        before = json.loads((output / RESULTS_FILE).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError):
        before = None
    if before != json.loads(json.dumps(settings)):
        raise StoneyError(f"{output}: holds other results; choose another --output_dir, or --overwrite to replace them")
    print((output / "summary.txt").read_text(encoding="utf-8"))
    print(f"{output}/: evaluated with these settings already (--overwrite evaluates again)")
    return True


def open_partial(output: Path, settings: dict, args: argparse.Namespace) -> Path:
    """The directory of the unfinished evaluation; predictions of an interrupted run with other settings are dropped."""
    import shutil

    partial = output.with_name(output.name + ".partial")
    marker = partial / "settings.json"
    wanted = json.loads(json.dumps(settings))
    try:
        same = json.loads(marker.read_text(encoding="utf-8")) == wanted
    except (OSError, ValueError):
        same = False
    try:
        if partial.exists() and (args.overwrite or not same):
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        checkpoints.write_json(marker, wanted)
    except OSError as error:
        raise StoneyError(f"--output_dir: cannot write {partial} ({error.strerror}); choose another") from error
    return partial


def predict(
    name: str,
    system: "ModelSource | Path | str",
    rows: list,
    seen: dict,
    corpus_: object,
    folder: Path,
    args: argparse.Namespace,
) -> list[dict]:
    """One system's answers to ``rows``, as prediction records, from where an interrupted run stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PREDICTIONS_FILE
    done = read_predictions(path)
    todo = [row for row in rows if row.id not in done]
    if isinstance(system, Path):
        earlier = read_predictions(system / PREDICTIONS_FILE)
        missing = [row.id for row in todo if row.id not in earlier]
        if missing:
            raise StoneyError(f"--baseline {system}: no answer to {len(missing)} of these rows, such as {missing[0]}")
        append_predictions(path, [earlier[row.id] for row in todo])
    elif system == RETRIEVAL:
        from stoney_rl.metrics import retrieval

        answers = retrieval.retrieve_answers(corpus_.split.train, [row.question for row in todo])
        append_predictions(path, [prediction(row, text, seen) for row, text in zip(todo, answers, strict=True)])
    elif todo:
        if done:
            print(f"{name}: {len(done)} answers are there already, {len(todo)} to go")
        generate_predictions(name, system, todo, seen, path, args)
    done = read_predictions(path)
    return [done[row.id] for row in rows]


def generate_predictions(
    name: str, system: ModelSource, rows: list, seen: dict, path: Path, args: argparse.Namespace
) -> None:
    from tqdm import tqdm

    from stoney_rl import generation, models, prompts

    tokenizer = models.load_tokenizer(system)
    prompts.prepare_tokenizer(tokenizer)
    model = models.load_model(system, models.inference_dtype(args.dtype))
    if Path(system.name).is_dir():
        checkpoints.check_fingerprint(Path(system.name), model)
    model.to(models.device())
    encoded = [prompts.encode_prompt(tokenizer, row.prompt) for row in rows]
    batches = generation.generate(
        model,
        tokenizer,
        encoded,
        ends=prompts.end_of_turn_ids(tokenizer),
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
    )
    with tqdm(total=len(rows), desc=f"{name}: answers", unit="row") as bar:
        for batch in batches:
            append_predictions(
                path, [prediction(rows[c.index], c.text, seen, tokens=c.tokens, truncated=c.truncated) for c in batch]
            )
            bar.update(len(batch))


def prediction(row: object, text: str, seen: dict, *, tokens: int | None = None, truncated: bool = False) -> dict:
    from stoney_rl import lexemes

    return {
        "id": row.id,
        "prompt": row.question,
        "reference": row.answer,
        "prediction": text,
        "seen": seen.get(row.id),
        "forms": lexemes.target_forms(row) or None,
        "lexemes": row.lexemes,
        "tokens": tokens,
        "truncated": truncated,
    }


def append_predictions(path: Path, records: list[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_predictions(path: Path) -> dict[str, dict]:
    """Whole lines of a predictions file by row id; a last line cut by a kill is cut off the file too."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    try:
        records = [json.loads(line) for line in whole.decode("utf-8").splitlines() if line]
        return {record["id"]: record for record in records}
    except (ValueError, KeyError, TypeError) as error:
        raise StoneyError(
            f"{path}: not a predictions file ({error!r}); delete it or choose another directory"
        ) from error


def table_rows(predictions: dict[str, list[dict]], names: list[str]) -> list[list]:
    first = predictions[names[0]]
    return [
        [
            row["id"],
            row["seen"],
            row["prompt"],
            row["reference"],
            *(predictions[name][i]["prediction"] for name in names),
        ]
        for i, row in enumerate(first)
    ]


def summary(results: dict, predictions: dict[str, list[dict]]) -> str:
    """What is printed: examples, the table, and the verdict in words. The baselines come first, the model last."""
    from stoney_rl.metrics import report

    model_name, *baselines = predictions
    shown = [*baselines, model_name]
    lines = [
        "",
        report.examples_table({name: predictions[name] for name in shown}, n=EXAMPLES, seed=results["seed"]),
        "",
        report.metric_table({name: results["systems"][name] for name in shown}, comparisons=results["comparisons"]),
        "",
    ]
    if RETRIEVAL in predictions:
        lines.append(f"{RETRIEVAL}: no model; it repeats the answer of the most similar training question.")
    lines += [
        report.verdict(comparison, metric=metric)
        for comparison in results["comparisons"]
        for metric in ("chrf", "form")
    ]
    if results["training_rows_scored"]:
        lines.append(
            f"Training rows among these: {results['training_rows_scored']}. The numbers show memory, not ability."
        )
    cut = {name: count for name, count in results["truncated"].items() if count}
    if cut:
        limit = results["arguments"]["max_new_tokens"]
        listed = ", ".join(f"{name} {count}" for name, count in cut.items())
        lines.append(f"Answers cut at {limit} tokens (--max_new_tokens): {listed} of {results['n']}.")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
