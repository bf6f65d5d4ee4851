"""The lexicon that is extracted from rows beside what the rows state: precision and recall of forms, glosses, classes.

    python benchmarks/lexicon.py
    python benchmarks/lexicon.py --dataset rows/ --labels benchmarks/lexicon_labels.jsonl

Without --labels: --num_rows rows of English prose about the planted (invented) language, whose statements are known.
With --labels: rows of --dataset that somebody has labelled, a line each: {"source": "rows.jsonl:12", "forms": [{"form":
..., "gloss": ... or null, "pos": ... or null}]}; source is the row's file and line. All rows of the data set are read
by the annotation, those with labels are scored. benchmarks/lexicon_labels.jsonl labels 80 rows about Stoney Nakoda, by
reading alone, blind to the code and its output, without knowledge of the language; its words are veiled (hashes), so
that it holds none of the rows' text. --veil makes such a file of plain labels.

A pair of form and gloss is right if the row states that gloss for the form: equal without case, edge punctuation and
leading articles or "to", or one with all content words of the other. Forms and parts of speech must be equal (case
folded, labels in the singular). Intervals: 95 %, bootstrap over rows.

Writes --output: what was measured, under "planted" or "labels"; what else the file holds is kept ("labels_first": the
labels before anyone had looked at the errors). Numbers only: no form, gloss or text of any row.
Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: its own folder would hide the standard library's `inspect`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


import argparse
import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping

from benchmarks import measure
from stoney_rl import checkpoints, cli
from stoney_rl.errors import StoneyError
from stoney_rl.glosses import RowFacts, content_words, extract_facts, normalize_pos
from stoney_rl.text import fold

RESAMPLES = 2000
KINDS = ("forms", "glosses", "pos")
Fact = tuple[str, str | None, str | None]  # form, gloss, part of speech

# Sixteen letters for hexadecimal digits: no ending of an English word can be made of them.
_CONSONANTS = str.maketrans("0123456789abcdef", "bcdfghjkmnpqrtvw")
_LEADING = re.compile(r"^(?:(?:an?|the|to)\s+)+")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--num_rows", type=cli.positive_int, default=2000, help="rows about the planted language")
    parser.add_argument("--num_lexemes", type=cli.positive_int, default=1000, help="stems of the planted language")
    parser.add_argument("--seed", type=cli.non_negative_int, default=0, help="of the planted rows and the bootstrap")
    parser.add_argument("--dataset", help="file or folder of rows that --labels speaks of")
    parser.add_argument("--labels", help="file of hand labels, plain or veiled")
    parser.add_argument("--veil", metavar="FILE", help="only write --labels veiled: hashes for words, fit to be shared")
    parser.add_argument("--output", default="results/inspect-lexicon.json", help="file of the results")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    if args.veil:
        if not args.labels:
            raise StoneyError("--veil: writes --labels veiled; name them")
        write_veiled(args.veil, read_labels(args.labels)[0])
        print(f"{args.veil}: the labels of {args.labels}, veiled")
        return
    if bool(args.dataset) != bool(args.labels):
        raise StoneyError("--dataset and --labels belong together: give both, or neither for the planted language")
    output = Path(args.output)
    if output.is_dir():
        raise StoneyError(f"--output {args.output}: a directory; name a file")
    kept = _previous(output)

    from stoney_rl import data, lexemes

    if args.labels:
        name = "labels"
        truth, are_veiled = read_labels(args.labels)
        rowset = data.load_rows(args.dataset)
        annotated = [row for row in lexemes.annotate(rowset.rows) if row.source in truth]
        missing = sorted(truth.keys() - {row.source for row in annotated})
        if missing:
            raise StoneyError(f"{args.labels}: {len(missing)} sources are not in {args.dataset}, such as {missing[0]}")
        by_key = {row.source: row for row in annotated}
        sha256 = rowset.sha256
    else:
        from stoney_rl.planted import PlantedLanguage
        from stoney_rl.planted_prose import prose_rows

        name = "planted"
        rows, stated = prose_rows(PlantedLanguage(args.seed, args.num_lexemes), args.num_rows, args.seed)
        truth = {row.id: [] for row in rows}
        for fact in stated:
            truth[fact.row_id].append((fact.form, fact.gloss, fact.pos))
        by_key = {row.id: row for row in lexemes.annotate(rows)}
        sha256 = data.dataset_sha256(rows)

    started = time.perf_counter()
    predicted = {key: extract_facts(row) for key, row in by_key.items()}
    seconds = time.perf_counter() - started
    if args.labels and are_veiled:
        predicted = {key: veiled_facts(facts) for key, facts in predicted.items()}
    results = evaluate_extraction(predicted, truth, seed=args.seed)
    print(table(results))
    print(f"{len(predicted):,} rows, {seconds / len(predicted) * 1e6:.0f} microseconds a row")

    # Names of files, not paths: the record says nothing about a machine.
    arguments = {key: Path(value).name if isinstance(value, str) else value for key, value in vars(args).items()}
    report = checkpoints.describe_stage(
        "inspect-lexicon",
        arguments=arguments,
        seed=args.seed,
        machine=measure.machine(1),
        data_sha256=sha256,
        n=len(predicted),
        seconds=seconds,
        results=results,
    )
    report["command"] = "lexicon.py --dataset DATASET --labels LABELS" if args.labels else "lexicon.py"
    output.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_json(output, kept | {name: report})
    print(f"{args.output}: the same, with versions and machine")


def _previous(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.keys() - {"planted", "labels", "labels_first"}:
        raise StoneyError(f"--output {path}: not a result of this script; name another file")
    return found


def veil(text: str) -> str:
    """A word or form as twelve consonants that stand for its SHA-256: to be compared, not to be read."""
    digest = hashlib.sha256(fold(text).encode()).hexdigest()[:12]
    return digest.translate(_CONSONANTS)


def veiled(fact: Fact) -> Fact:
    """The fact with hashes for the form and for the gloss's content words, which are what ``same_gloss`` compares."""
    form, gloss, pos = fact
    return veil(form), " ".join(sorted(map(veil, content_words(gloss)))) if gloss else gloss, pos


def veiled_facts(facts: RowFacts) -> RowFacts:
    """What was extracted, veiled as the labels are."""
    return RowFacts(
        tuple(map(veil, facts.forms)),
        tuple(veiled((form, gloss, None))[:2] for form, gloss in facts.glosses),
        tuple((veil(form), pos) for form, pos in facts.pos),
    )


def write_veiled(path: str | Path, labels: Mapping[str, Iterable[Fact]]) -> None:
    """Write labels that hold no word of the rows. Raises StoneyError if the file can't be written."""
    lines = [
        {"source": source, "veiled": True}
        | {"forms": [dict(zip(("form", "gloss", "pos"), veiled(fact), strict=True)) for fact in facts]}
        for source, facts in labels.items()
    ]
    try:
        Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise StoneyError(f"--veil {path}: can't be written ({error.strerror}); name another file") from None


def read_labels(path: str | Path) -> tuple[dict[str, list[Fact]], bool]:
    """source -> (form, gloss, part of speech) of each labelled row, and whether they are veiled.

    Raises StoneyError, with the line, for a bad one.
    """
    labels: dict[str, list[Fact]] = {}
    kinds = set()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise StoneyError(f"--labels {path} can't be read; expected JSON lines in UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            facts = [(one["form"], one.get("gloss"), one.get("pos")) for one in value["forms"]]
            if not all(isinstance(form, str) and form.strip() for form, _, _ in facts):
                raise ValueError
            labels.setdefault(value["source"], []).extend(facts)
            kinds.add(bool(value.get("veiled")))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise StoneyError(f'--labels {path} line {number}: expected {{"source": ..., "forms": [...]}}') from None
    if not labels:
        raise StoneyError(f"--labels {path} has no label")
    if len(kinds) > 1:
        raise StoneyError(f"--labels {path}: some lines are veiled and some are not; expected one kind")
    return labels, kinds.pop()


def same_gloss(one: str, other: str) -> bool:
    """Equal after folding, without leading articles or *to*, or one with all the content words of the other."""
    a, b = (_LEADING.sub("", fold(gloss).strip(" .,;:!?\"'")) for gloss in (one, other))
    if a == b:
        return True
    a_words, b_words = content_words(one), content_words(other)
    return a_words <= b_words or b_words <= a_words


def evaluate_extraction(
    predicted: Mapping[str, RowFacts], truth: Mapping[str, Iterable[Fact]], *, seed: int = 0
) -> dict:
    """Precision, recall and F1 of forms, (form, gloss) and (form, part of speech), over the rows of ``truth``.

    predicted: row key -> what was extracted; a row without any may be left out. truth: row key -> what it states. Each
    score is None where there is nothing to score. ``interval`` is the 95 % bootstrap over rows, ``rows`` their number.
    """
    counts: dict[str, list[tuple[int, int, int, int]]] = {kind: [] for kind in KINDS}
    nothing = RowFacts((), (), ())
    for key, facts in truth.items():
        facts, found = list(facts), predicted.get(key, nothing)
        counts["forms"].append(_overlap({fold(form) for form in found.forms}, {fold(form) for form, _, _ in facts}))
        counts["glosses"].append(
            _overlap(
                {(fold(form), fold(gloss)) for form, gloss in found.glosses},
                {(fold(form), fold(gloss)) for form, gloss, _ in facts if gloss},
                lambda a, b: a[0] == b[0] and same_gloss(a[1], b[1]),
            )
        )
        counts["pos"].append(
            _overlap(
                {(fold(form), normalize_pos(pos)) for form, pos in found.pos},
                {(fold(form), normalize_pos(pos)) for form, _, pos in facts if pos},
            )
        )
    return {kind: _score(rows, seed) for kind, rows in counts.items()}


def _overlap(found: set, stated: set, same=None) -> tuple[int, int, int, int]:
    """(found that is right, found, stated that was found, stated)."""
    if same is None:
        return len(found & stated), len(found), len(found & stated), len(stated)
    right = sum(any(same(one, other) for other in stated) for one in found)
    met = sum(any(same(one, other) for one in found) for other in stated)
    return right, len(found), met, len(stated)


def _score(rows: list[tuple[int, int, int, int]], seed: int) -> dict:
    right, found, met, stated = (sum(column) for column in zip(*rows, strict=True)) if rows else (0, 0, 0, 0)
    precision, recall = right / found if found else None, met / stated if stated else None
    both = precision is not None and recall is not None
    return {
        "rows": len(rows),
        "found": found,
        "found_right": right,
        "stated": stated,
        "stated_found": met,
        "precision": precision,
        "precision_interval": _interval(rows, 0, 1, seed) if found else None,
        "recall": recall,
        "recall_interval": _interval(rows, 2, 3, seed) if stated else None,
        "f1": (2 * precision * recall / (precision + recall) if precision + recall else 0.0) if both else None,
    }


def _interval(rows: list[tuple[int, int, int, int]], part: int, whole: int, seed: int) -> list[float]:
    import numpy as np

    from stoney_rl.metrics.intervals import resample

    sums = np.asarray(rows, dtype=np.float64)[:, [part, whole]]
    samples = resample(sums, lambda s: s[..., 0] / np.maximum(s[..., 1], 1), seed=seed, resamples=RESAMPLES)
    return [float(value) for value in np.percentile(samples, [2.5, 97.5])]


def table(results: dict) -> str:
    lines = ["", f"{'':10} {'precision':>26} {'recall':>26} {'found':>7} {'stated':>7}"]
    for kind, entry in results.items():
        cells = [_cell(entry[name], entry[f"{name}_interval"]) for name in ("precision", "recall")]
        lines.append(f"{kind:10} {cells[0]:>26} {cells[1]:>26} {entry['found']:7,} {entry['stated']:7,}")
    return "\n".join(lines)


def _cell(value: float | None, interval: list[float] | None) -> str:
    return "-" if value is None or interval is None else f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


if __name__ == "__main__":
    cli.run(main)
