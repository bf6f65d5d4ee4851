"""Does an evaluation come out the same again? From its own directory alone and, where they are there, from rows and models.

1. The predictions files are those that were scored (SHA-256), and ``measure`` makes the recorded numbers of them.
2. Where the rows and a system's checkpoint can be found, it answers again, and the answers are the recorded ones.

What can't be checked is said, and is no difference.
"""

import json
import tempfile
from pathlib import Path

from stoney_rl import checkpoints, corpus, predictions
from stoney_rl.errors import StoneyError
from stoney_rl.lexicon import LEXICON_FILE, read_lexicon
from stoney_rl.metrics import measure, systems

SHOWN = 20  # differences that are printed
# Arguments of the script that say which rows, and how they were answered.
ROWS = ("dataset", "num_samples", "seed", "split_seed", "test_fraction", "validation_fraction")
GENERATION = ("dtype", "max_new_tokens", "batch_size", "num_generations", "temperature", "seed")


def verify(results_file: Path, default_dataset: str) -> int:
    """Print what was checked and what differs; return the exit code: 0 for equal, 1 if anything differs.

    ``default_dataset``: what the script evaluates a model on that names no rows of its own. Raises ``StoneyError`` for a file
    that is no results.json of an evaluation, or that has lost its predictions.
    """
    results, output = _read(results_file), results_file.parent
    answers = {name: list(predictions.read(output / one["file"]).values()) for name, one in results["answers"].items()}
    differ = [
        f"{one['file']}: not the file that was scored"
        for one in results["answers"].values()
        if predictions.sha256(output / one["file"]) != one["sha256"]
    ]
    unchecked: list[str] = []
    differ += _answered_again(results, answers, output, default_dataset, unchecked)
    differ += _scored_again(results, answers, output, unchecked)
    for line in unchecked:
        print(f"not checked: {line}")
    for line in differ[:SHOWN]:
        print(f"✗ {line}")
    if len(differ) > SHOWN:
        print(f"... and {len(differ) - SHOWN} more")
    now = checkpoints.describe_stage("evaluation", arguments={})["versions"]
    for name, version in results["versions"].items() if differ else ():
        if now.get(name) != version:
            print(f"{name}: it was {version} then, and is {now.get(name)} now")
    verdict = f"differences: {len(differ)}" if differ else "equal: what was checked comes out the same again"
    print(f"{results_file}: {verdict} (n = {results['n']}, systems: {', '.join(answers)})")
    return 1 if differ else 0


def _read(path: Path) -> dict:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoneyError(
            f"--verify {path}: not readable as JSON ({error}); give an evaluation's results.json"
        ) from error
    if not isinstance(results, dict) or not results.keys() >= {"scoring", "answers", "systems", "identity"}:
        raise StoneyError(f"--verify {path}: no results.json of an evaluation, or of an older version; evaluate again")
    missing = [one["file"] for one in results["answers"].values() if not (path.parent / one["file"]).is_file()]
    if missing:
        raise StoneyError(f"--verify {path}: {', '.join(missing)} is missing beside it; copy it back")
    return results


def _scored_again(results: dict, answers: dict[str, list[dict]], output: Path, unchecked: list[str]) -> list[str]:
    """A line for each number that is not made again of the answers; what can't be made goes to ``unchecked``."""
    scoring, failed = results["scoring"], dict(results["unavailable"])
    entries = read_lexicon(output / LEXICON_FILE) if scoring["lexicon_sha256"] else []
    if entries and measure.lexicon_sha256(entries) != scoring["lexicon_sha256"]:
        return [f"{LEXICON_FILE}: not the lexicon that was used"]
    optional: dict[str, measure.Opened] = {}
    for metric, key in measure.MODELS.items():
        if scoring[key] and metric not in failed:
            try:
                optional |= measure.optional_metrics(**{key: checkpoints.locate(scoring[key], output)})
            except StoneyError as error:
                failed[metric] = str(error)
    numbers, _ = measure.measure(
        answers,
        entries,
        optional,
        seed=results["seed"],
        resamples=scoring["resamples"],
        validate=scoring["validate_metrics"],
    )
    failed |= numbers.pop("unavailable")
    unchecked += [f"{metric}: {why}" for metric, why in failed.items()]
    recorded = {key: results.get(key) for key in numbers}
    return measure.differences(_without(recorded, failed), _without(numbers, failed))


def _without(numbers: object, metrics: dict) -> object:
    """``numbers`` without what is about ``metrics``."""
    if not isinstance(numbers, dict):
        return numbers
    return {key: _without(value, metrics) for key, value in numbers.items() if key not in metrics}


def _answered_again(
    results: dict, answers: dict[str, list[dict]], output: Path, default_dataset: str, unchecked: list[str]
) -> list[str]:
    """A line for each system that now answers otherwise; which ones can't be asked again goes to ``unchecked``."""
    arguments = results["arguments"]
    try:
        held_out = corpus.held_out(
            checkpoints.locate(arguments["model_path"], output),
            arguments["split"],
            default_dataset=default_dataset,
            revision=arguments["dataset_revision"],
            **{key: arguments[key] for key in ROWS},
        )
    except StoneyError as error:
        unchecked.append(f"whether the systems answer so again: the rows can't be read ({error})")
        return []
    if held_out.corpus.rowset.sha256 != results["data"]["sha256"]:
        return [f"{held_out.corpus.rowset.source}: not the rows that were evaluated"]
    differ = []
    with tempfile.TemporaryDirectory() as folder:
        for name, described in results["identity"]["systems"].items():
            try:
                system = systems.find_again(described, output)
                fresh = predictions.complete(
                    Path(folder) / name, name, system, held_out, **{key: arguments[key] for key in GENERATION}
                )
            except StoneyError as error:
                unchecked.append(f"whether {name} answers so again: {error}")
                continue
            told = {row["id"]: (row["prediction"], row.get("samples")) for row in answers[name]}
            other = [row["id"] for row in fresh if told.get(row["id"]) != (row["prediction"], row.get("samples"))]
            if other or len(told) != len(fresh):
                example = f", such as {other[0]}" if other else ""
                differ.append(f"{name}: {len(other)} of {len(fresh)} rows are answered otherwise now{example}")
    return differ
