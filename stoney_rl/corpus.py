"""From a source to train, validation and test rows: what every stage that needs rows calls."""

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stoney_rl import prepared
from stoney_rl.checkpoints import locate, read_stage
from stoney_rl.data import Row, RowSet, load_rows
from stoney_rl.errors import StoneyError
from stoney_rl.lexemes import annotate
from stoney_rl.split import Split, mention_key, row_forms, split_rows
from stoney_rl.text import fold

SPLIT_FILE = "split.json"
SPLIT_DEFAULTS = {"split_seed": 0, "test_fraction": 0.1, "validation_fraction": 0.05}


@dataclass(frozen=True)
class Corpus:
    """``rowset``: what was read and what was quarantined; ``split``: the lexeme-disjoint split of its rows."""

    rowset: RowSet
    split: Split

    @property
    def split_arguments(self) -> dict:
        """Seed and fractions of the split, by the names of the flags that set them."""
        certificate = self.split.certificate
        return {
            "split_seed": certificate["seed"],
            "test_fraction": certificate["test_fraction"],
            "validation_fraction": certificate["validation_fraction"],
        }

    def describe(self) -> dict:
        """The ``data`` entry of ``stage.json``: no row's text, everything needed to make the same split again."""
        return {
            "source": self.rowset.source,
            "revision": self.rowset.revision,
            "sha256": self.rowset.sha256,
            "files": self.rowset.files,
            "rows": len(self.rowset.rows),
            "quarantined": len(self.rowset.quarantine),
            "split": self.split_arguments,
        }

    def training_record(self) -> dict:
        """The content of ``split.json``: the certificate, and hashes of what was trained on (no text)."""
        return {
            "certificate": self.split.certificate,
            "training_rows": sorted(row_hash(row) for row in self.split.train),
            "training_lexemes": sorted({form_hash(form) for row in self.split.train for form in _mentioned(row)}),
        }


def row_hash(row: Row) -> str:
    """Identifies a row by its prompt, all turns of it, in any file, order or Unicode form: 16 hex digits of SHA-256.

    Not by its answer: a question that was trained on with another answer was trained on.
    """
    turns = [f"{message['role']} {fold(message['content'])}" for message in row.prompt]
    return hashlib.sha256("\0".join(turns).encode()).hexdigest()[:16]


def form_hash(form: str) -> str:
    """Identifies a form as the split compares forms (``split.mention_key``): 16 hex digits of SHA-256."""
    return hashlib.sha256(mention_key(form).encode()).hexdigest()[:16]


def _mentioned(row: Row) -> set[str]:
    """What the row teaches something about: its forms, and every word of its messages."""
    texts = [mention_key(message["content"]) for message in [*row.prompt, *row.completion]]
    return row_forms(row).union(*(text.split() for text in texts))


def prepare(
    source: str | Path,
    *,
    revision: str | None = None,
    split_seed: int | None = None,
    test_fraction: float | None = None,
    validation_fraction: float | None = None,
) -> Corpus:
    """Read, annotate and split ``source``, or take a prepared directory as it is.

    Seed and fractions that are None are the prepared directory's own, else ``SPLIT_DEFAULTS``. Raises ``StoneyError``
    for bad input, data too small to split, and seed or fractions that contradict a prepared directory.
    """
    asked = {"split_seed": split_seed, "test_fraction": test_fraction, "validation_fraction": validation_fraction}
    given = {key: value for key, value in asked.items() if value is not None}
    if prepared.is_prepared(source):
        if revision is not None:
            raise StoneyError(f"revision {revision!r} was given, but {source} is local; leave the revision out")
        corpus = Corpus(*prepared.read(source))
        for key, value in given.items():
            if value != corpus.split_arguments[key]:
                raise StoneyError(
                    f"--{key} {value}: {source} was prepared with {corpus.split_arguments[key]}; leave the flag out, "
                    "or prepare the data again"
                )
        return corpus
    rowset = load_rows(source, revision=revision)
    return Corpus(rowset, split_as(annotate(rowset.rows), rowset.sha256, **(SPLIT_DEFAULTS | given)))


def split_as(
    rows: list[Row], data_sha256: str, *, split_seed: int, test_fraction: float, validation_fraction: float
) -> Split:
    """The split of annotated ``rows`` for a stage's arguments. Raises ``StoneyError`` as ``split_rows`` does."""
    return split_rows(
        rows,
        seed=split_seed,
        test_fraction=test_fraction,
        validation_fraction=validation_fraction,
        data_sha256=data_sha256,
    )


def trained_rows(rows: Iterable[Row], record: dict) -> list[Row]:
    """Those of ``rows`` whose prompt the checkpoint with this ``training_record`` was trained on."""
    hashes = set(record["training_rows"])
    return [row for row in rows if row_hash(row) in hashes]


def as_trained(
    checkpoint: str, *, dataset: str | None, default_dataset: str, revision: str | None = None, **asked: object
) -> tuple[Corpus, dict]:
    """The rows that ``checkpoint`` was trained on, split as its training split them, or others with the same arguments.

    ``dataset``: None for the training's own, or ``default_dataset`` for a model that this pipeline did not train.
    ``asked``: split seed and fractions, None to take the training's. Returns the corpus and the ``data`` entry of the
    checkpoint's ``stage.json``, {} without one. Raises ``StoneyError`` if ``asked`` contradicts the training.
    """
    stage = (read_stage(Path(checkpoint)) if Path(checkpoint).is_dir() else None) or {}
    trained_on = stage.get("data") or {}
    recorded = locate(trained_on["source"], Path(checkpoint)) if trained_on else None
    source = dataset or recorded or default_dataset
    given = {key: value for key, value in asked.items() if value is not None}
    if trained_on and source in (recorded, trained_on["source"]):
        for key, value in given.items():
            if value != trained_on["split"][key]:
                raise StoneyError(
                    f"--{key} {value}: {checkpoint} was trained with {trained_on['split'][key]}; leave the flag out"
                )
        revision = revision or trained_on.get("revision")
    return prepare(source, revision=revision, **(trained_on.get("split", {}) | given)), trained_on


@dataclass(frozen=True)
class HeldOut:
    """Rows to evaluate: ``seen`` by row id; ``trained``: how many of them the model was trained on, None if unknown."""

    corpus: Corpus
    rows: list[Row]
    seen: dict[str, bool]
    trained: int | None
    notes: list[str]


def held_out(
    checkpoint: str,
    split: str,
    *,
    dataset: str | None,
    default_dataset: str,
    revision: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    **asked: object,
) -> HeldOut:
    """The rows on which to evaluate ``checkpoint``, split as its training was.

    ``split``: 'train', 'validation', 'test' or 'all'; ``asked``: split seed and fractions, None to take the training's.
    For other data than the model was trained on, rows that it was trained on are left out and seen goes by its training
    lexemes. Raises ``StoneyError`` if a row of a held-out split was trained on all the same, if ``asked`` contradicts the
    training, or if no row is left.
    """
    prepared, trained_on = as_trained(
        checkpoint, dataset=dataset, default_dataset=default_dataset, revision=revision, **asked
    )
    source = prepared.rowset.source
    parts = prepared.split
    record = training_record(checkpoint)
    rows = {"train": parts.train, "validation": parts.validation, "test": parts.test}.get(split)
    if rows is None:
        rows = [*parts.train, *parts.validation, *parts.test]
    seen, notes = dict(parts.seen) | {row.id: True for row in parts.train}, []
    if record is None and trained_on:
        raise StoneyError(f"{checkpoint}: trained, but {SPLIT_FILE} is missing; copy it back or make it again")
    same = record is None or all(
        record["certificate"][key] == parts.certificate[key] for key in ("data_sha256", "ids_sha256")
    )
    if record:
        known = set(record["training_lexemes"])
        seen = {
            row.id: (same and seen[row.id]) or any(form_hash(form) in known for form in row_forms(row)) for row in rows
        }
    if not same:
        notes.append(f"{source}: not the rows {checkpoint} was trained on; 'seen' goes by the forms it was trained on")
    trained = trained_rows(rows, record) if record else None
    if split in ("train", "all"):
        notes.append(
            f"--split {split}: rows that a model was or may be trained on; the numbers show memory, not ability"
        )
    elif trained and same:
        raise StoneyError(
            f"{source}: {len(trained)} of the {split} rows were trained on, by {checkpoint} or a checkpoint that it comes "
            "from; evaluate on other rows with --dataset"
        )
    elif trained:
        left_out = {row.id for row in trained}
        rows = [row for row in rows if row.id not in left_out]
        trained = []
        notes.append(f"{source}: {len(left_out)} rows were trained on and are left out")
    if not rows:
        raise StoneyError(f"{source}: no row is left in the {split} split; choose another split or more data")
    if num_samples and num_samples > len(rows):
        notes.append(f"--num_samples {num_samples}: the {split} split has {len(rows)} rows; all of them are used")
    rows = draw(rows, seen, num_samples, seed)
    return HeldOut(prepared, rows, seen, None if trained is None else len(trained_rows(rows, record)), notes)


def training_record(checkpoint: str) -> dict | None:
    """The ``split.json`` of a checkpoint directory that this pipeline trained; None for other models.

    The rows and forms that its ancestors were trained on are added, as far as their directories still exist.
    """
    record = _read_record(Path(checkpoint) / SPLIT_FILE)
    current, visited = checkpoint, set()
    while record and current and Path(current).is_dir() and Path(current).resolve() not in visited:
        visited.add(Path(current).resolve())
        inherited = _read_record(Path(current) / SPLIT_FILE) or {}
        for key in ("training_rows", "training_lexemes"):
            record[key] = sorted({*record[key], *inherited.get(key, ())})
        parent = ((read_stage(Path(current)) or {}).get("parent") or {}).get("path")
        current = locate(parent, Path(current)) if parent else None
    return record


def _read_record(path: Path) -> dict | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoneyError(f"{path}: not readable as JSON ({error}); make the checkpoint again") from error
    if not isinstance(record, dict) or not record.keys() >= {"certificate", "training_rows", "training_lexemes"}:
        raise StoneyError(f"{path}: not the record of a training; make the checkpoint again")
    return record


def draw(rows: list[Row], seen: dict[str, bool], number: int | None, seed: int) -> list[Row]:
    """``number`` of the rows at random (None: all), seen and unseen in proportion, in their first order."""
    if number is None or number >= len(rows):
        return rows
    generator = random.Random(seed)
    unseen_rows = [row for row in rows if not seen.get(row.id)]
    seen_rows = [row for row in rows if seen.get(row.id)]
    share = round(number * len(unseen_rows) / len(rows))
    chosen = {row.id for row in generator.sample(unseen_rows, share) + generator.sample(seen_rows, number - share)}
    return [row for row in rows if row.id in chosen]
