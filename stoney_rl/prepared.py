"""The prepared dataset directory: rows that were read, annotated and split once, for every later stage to take.

    prepared/
        train.parquet  validation.parquet  test.parquet     rows; ``metadata`` is JSON text, ``seen`` is null in train
        dropped.jsonl                                       rows that mention a held-out form beside others: in no split
        certificate.json  lexicon.jsonl  quarantine.jsonl  findings.jsonl  report.json  report.html  report.txt  plots/
        stage.json                                          how it was made, and the SHA-256 of the files above

``corpus.prepare`` takes such a directory in the place of a source; ``datasets.load_dataset`` reads its three splits.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from stoney_rl import checkpoints
from stoney_rl.data import Row, RowSet, write_jsonl, write_quarantine
from stoney_rl.errors import StoneyError
from stoney_rl.split import Split

STAGE = "dataset"
CERTIFICATE_FILE = "certificate.json"
DROPPED_FILE = "dropped.jsonl"
SPLITS = ("train", "validation", "test")
_BATCH = 10_000  # rows written or read at a time


def is_prepared(path: str | Path) -> bool:
    """Whether ``path`` is a prepared directory. Raises ``StoneyError`` if its stage.json can't be read."""
    return Path(path).is_dir() and (checkpoints.read_stage(Path(path)) or {}).get("stage") == STAGE


def write(directory: Path, rowset: RowSet, split: Split) -> None:
    """Write rows, certificate and quarantine into the existing ``directory``; the same rows give the same bytes."""
    for name in SPLITS:
        _write_parquet(directory / f"{name}.parquet", getattr(split, name), split.seen)
    write_jsonl(directory / DROPPED_FILE, split.dropped)
    write_quarantine(directory / "quarantine.jsonl", rowset.quarantine)
    checkpoints.write_json(directory / CERTIFICATE_FILE, split.certificate)


def file_hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below ``directory`` but stage.json, by relative path, sorted."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != checkpoints.STAGE_FILE)
    return {path.relative_to(directory).as_posix(): _sha256(path) for path in paths}


def read(directory: str | Path) -> tuple[RowSet, Split]:
    """Rows and split of a prepared directory, as they were when it was made.

    ``RowSet.sha256`` is that of the source's rows, so a checkpoint trained on the source and one trained on its
    prepared directory recognise each other's rows. Raises ``StoneyError`` if a file is missing or has been changed.
    """
    directory = Path(directory)
    stage = checkpoints.read_stage(directory) or {}
    recorded = stage.get("files") or {}
    needed = [f"{name}.parquet" for name in SPLITS] + [DROPPED_FILE, CERTIFICATE_FILE]
    again = f"prepare it again: python {stage.get('command', 'inspect_hf_dataset.py')} --overwrite"
    for name in needed:
        if not (directory / name).is_file():
            raise StoneyError(f"{directory}: {name} is missing; {again}")
        if _sha256(directory / name) != recorded.get(name):
            raise StoneyError(f"{directory / name}: not what was written when the data was prepared; {again}")
    certificate = json.loads((directory / CERTIFICATE_FILE).read_text(encoding="utf-8"))
    parts, seen = {}, {}
    for name in SPLITS:
        parts[name], flags = _read_parquet(directory / f"{name}.parquet")
        seen |= {row_id: flag for row_id, flag in flags.items() if flag is not None}
    with (directory / DROPPED_FILE).open(encoding="utf-8") as lines:
        dropped = [Row.from_dict(json.loads(line)) for line in lines]
    files = [
        {"path": name, "sha256": recorded[name], "split": name.split(".")[0], "rows": len(parts[name.split(".")[0]])}
        | {"quarantined": 0}
        for name in needed[: len(SPLITS)]
    ]
    made_of = stage["data"]
    rowset = RowSet(
        rows=[*parts["train"], *parts["validation"], *parts["test"], *dropped],
        quarantine=[],
        sha256=made_of["sha256"],
        files=files,
        source=str(directory),
        notes=[f"Prepared from {made_of['source']}: {len(dropped):,} rows in no split."],
    )
    return rowset, Split(parts["train"], parts["validation"], parts["test"], dropped, seen, certificate)


def _schema():
    import pyarrow

    turns = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
    return pyarrow.schema(
        [
            ("id", pyarrow.string()),
            ("source", pyarrow.string()),
            ("prompt", turns),
            ("completion", turns),
            ("lexemes", pyarrow.list_(pyarrow.string())),
            ("metadata", pyarrow.string()),
            ("seen", pyarrow.bool_()),
        ]
    )


def _write_parquet(path: Path, rows: Sequence[Row], seen: dict[str, bool]) -> None:
    import pyarrow
    import pyarrow.parquet

    schema = _schema()
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, len(rows), _BATCH):
            batch = [
                row.to_dict()
                | {"metadata": json.dumps(row.metadata, ensure_ascii=False, sort_keys=True), "seen": seen.get(row.id)}
                for row in rows[start : start + _BATCH]
            ]
            writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))


def _read_parquet(path: Path) -> tuple[list[Row], dict[str, bool | None]]:
    import pyarrow.parquet

    rows, seen = [], {}
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=_BATCH):
        for value in batch.to_pylist():
            seen[value["id"]] = value.pop("seen")
            rows.append(Row.from_dict(value | {"metadata": json.loads(value["metadata"])}))
    return rows, seen


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
