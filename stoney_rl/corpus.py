"""From a source to train, validation and test rows: what every stage that needs rows calls."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stoney_rl.data import Row, RowSet, load_rows
from stoney_rl.lexemes import annotate
from stoney_rl.split import Split, split_rows
from stoney_rl.text import fold

SPLIT_FILE = "split.json"


@dataclass(frozen=True)
class Corpus:
    """``rowset``: what was read and what was quarantined; ``split``: the lexeme-disjoint split of its rows."""

    rowset: RowSet
    split: Split

    def describe(self) -> dict:
        """The ``data`` entry of ``stage.json``: no row's text, everything needed to make the same split again."""
        certificate = self.split.certificate
        return {
            "source": self.rowset.source,
            "sha256": self.rowset.sha256,
            "files": self.rowset.files,
            "rows": len(self.rowset.rows),
            "quarantined": len(self.rowset.quarantine),
            "split": {key: certificate[key] for key in ("seed", "test_fraction", "validation_fraction")},
        }

    def training_record(self) -> dict:
        """The content of ``split.json``: the certificate, and hashes of what was trained on (no text)."""
        return {
            "certificate": self.split.certificate,
            "training_rows": sorted(row_hash(row) for row in self.split.train),
            "training_lexemes": sorted({form_hash(form) for row in self.split.train for form in row.lexemes}),
        }


def row_hash(row: Row) -> str:
    """Identifies a question and answer whatever file, order or Unicode form they come in: 16 hex digits of SHA-256."""
    return hashlib.sha256(f"{fold(row.question)}\0{fold(row.answer)}".encode()).hexdigest()[:16]


def form_hash(form: str) -> str:
    """Identifies a form: 16 hex digits of SHA-256 over its folded spelling."""
    return hashlib.sha256(fold(form).encode()).hexdigest()[:16]


def prepare(
    source: str | Path,
    *,
    revision: str | None = None,
    seed: int = 0,
    test_fraction: float = 0.1,
    validation_fraction: float = 0.05,
) -> Corpus:
    """Read, annotate and split ``source``. Raises ``StoneyError`` for bad input or data too small to split."""
    rowset = load_rows(source, revision=revision)
    split = split_rows(
        annotate(rowset.rows), seed=seed, test_fraction=test_fraction, validation_fraction=validation_fraction, data_sha256=rowset.sha256
    )
    return Corpus(rowset, split)


def trained_rows(rows: Iterable[Row], record: dict) -> list[Row]:
    """Those of ``rows`` that the checkpoint with this ``split.json`` was trained on."""
    hashes = set(record["training_rows"])
    return [row for row in rows if row_hash(row) in hashes]
