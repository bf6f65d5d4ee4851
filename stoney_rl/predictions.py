"""Predictions files: one JSON line a row with what was asked, what was expected and what a system answered."""

from pathlib import Path
from typing import TYPE_CHECKING

from stoney_rl import checkpoints, records
from stoney_rl.errors import StoneyError
from stoney_rl.models import ModelSource
from stoney_rl.records import append

if TYPE_CHECKING:
    from stoney_rl.data import Row

PREDICTIONS_FILE = "predictions.jsonl"


def record(
    row: "Row", text: str | None, seen: bool | None, *, tokens: int | None = None, truncated: bool = False
) -> dict:
    """One line: id, prompt, reference, prediction, seen; the forms asked for (None: the row asks for none) and lexemes."""
    from stoney_rl import lexemes

    return {
        "id": row.id,
        "prompt": row.question,
        "reference": row.answer,
        "prediction": text,
        "seen": seen,
        "forms": lexemes.target_forms(row) or None,
        "lexemes": row.lexemes,
        "tokens": tokens,
        "truncated": truncated,
    }


def read(path: Path) -> dict[str, dict]:
    """Whole lines by row id (see ``records.read``); {} if there is no file.

    Raises ``StoneyError`` for a file that holds anything else.
    """
    try:
        return {line["id"]: line for line in records.read(path)}
    except (ValueError, KeyError, TypeError) as error:
        raise StoneyError(
            f"{path}: not a predictions file ({error!r}); delete it or choose another directory"
        ) from error


def from_earlier(directory: Path, rows: list["Row"], seen: dict[str, bool]) -> list[dict]:
    """The answers to ``rows`` of an earlier evaluation, as new records: ``seen`` is the caller's.

    Raises ``StoneyError`` if it lacks some of the rows, or asked or expected something else under their ids.
    """
    earlier = read(directory / PREDICTIONS_FILE)
    missing = [row.id for row in rows if row.id not in earlier]
    if missing:
        raise StoneyError(
            f"{directory}: no answer to {len(missing)} of these {len(rows)} rows, such as {missing[0]}; "
            "evaluate it on the same rows"
        )
    found = []
    for row in rows:
        line = earlier[row.id]
        if (line.get("prompt"), line.get("reference")) != (row.question, row.answer):
            raise StoneyError(f"{directory}: row {row.id} has another prompt or reference there; evaluate it again")
        truncated = bool(line.get("truncated"))
        found.append(
            record(row, line.get("prediction"), seen.get(row.id), tokens=line.get("tokens"), truncated=truncated)
        )
    return found


def from_model(
    name: str,
    source: ModelSource,
    rows: list["Row"],
    seen: dict[str, bool],
    path: Path,
    *,
    dtype: str,
    max_new_tokens: int,
    batch_size: int,
) -> None:
    """Generate answers to ``rows`` and append them to ``path`` batch by batch, with a progress bar called ``name``."""
    from tqdm import tqdm

    from stoney_rl import generation, models, prompts

    tokenizer = models.load_tokenizer(source)
    prompts.prepare_tokenizer(tokenizer)
    model = models.load_model(source, models.inference_dtype(dtype))
    checkpoints.check_fingerprint(Path(source.name), model)
    batches = generation.generate(
        model.to(models.device()),
        tokenizer,
        [prompts.encode_prompt(tokenizer, row.prompt) for row in rows],
        ends=prompts.end_of_turn_ids(tokenizer),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    with tqdm(total=len(rows), desc=f"{name}: answers", unit="row") as bar:
        for batch in batches:
            lines = []
            for done in batch:
                row = rows[done.index]
                lines.append(record(row, done.text, seen.get(row.id), tokens=done.tokens, truncated=done.truncated))
            append(path, lines)
            bar.update(len(batch))
