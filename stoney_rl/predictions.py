"""Predictions files: one JSON line a row with what was asked, what was expected and what a system answered."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from stoney_rl import checkpoints, records
from stoney_rl.errors import StoneyError
from stoney_rl.models import ModelSource
from stoney_rl.records import append

if TYPE_CHECKING:
    from stoney_rl.corpus import HeldOut
    from stoney_rl.data import Row

PREDICTIONS_FILE = "predictions.jsonl"
RETRIEVAL = "retrieval"  # the baseline that is no model


def record(
    row: "Row",
    text: str | None,
    seen: bool | None,
    *,
    tokens: int | None = None,
    truncated: bool = False,
    samples: dict | None = None,
) -> dict:
    """One line: id, prompt, reference, prediction, seen; the forms asked for (None: the row asks for none) and lexemes.

    metadata: what the row itself says of its part of speech and kind. ``samples``: {"temperature", "texts"} of answers that
    were drawn beside the prediction, if any were.
    """
    from stoney_rl import lexemes
    from stoney_rl.metrics.errors import KIND_KEYS, POS_KEYS

    found = {
        "id": row.id,
        "prompt": row.question,
        "reference": row.answer,
        "prediction": text,
        "seen": seen,
        "forms": lexemes.target_forms(row) or None,
        "lexemes": row.lexemes,
        "metadata": {key: row.metadata[key] for key in (*POS_KEYS, *KIND_KEYS) if key in row.metadata},
        "tokens": tokens,
        "truncated": truncated,
    }
    return found | {"samples": samples} if samples else found


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


def write(path: Path, lines: Iterable[dict]) -> str:
    """Put ``lines`` in the place of the file, whole or not at all; return its SHA-256."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("", encoding="utf-8")
    append(partial, lines)
    partial.replace(path)
    return sha256(path)


def sha256(path: Path) -> str:
    """The hash that identifies a predictions file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def copy(old: Path, new: Path) -> None:
    """Copy the predictions files below the directory ``old`` to their places below ``new``, where there are none yet."""
    for path in old.rglob(PREDICTIONS_FILE):
        target = new / path.relative_to(old)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def complete(
    path: Path, name: str, system: "ModelSource | Path | str", held_out: "HeldOut", **generation: object
) -> list[dict]:
    """The answers of ``system`` to the held-out rows, in their order; those that ``path`` lacks are added to it.

    ``system``: a model, the directory of an earlier evaluation, or ``RETRIEVAL``. ``generation``: the keywords of
    ``from_model``. Raises ``StoneyError`` as ``read``, ``from_earlier`` and ``from_model`` do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    done = read(path)
    todo = [row for row in held_out.rows if row.id not in done]
    if done and todo:
        print(f"{name}: {len(done)} answers are there already, {len(todo)} to go")
    if isinstance(system, Path):
        append(path, from_earlier(system, todo, held_out.seen))
    elif system == RETRIEVAL:
        append(path, from_retrieval(held_out, todo))
    elif todo:
        from_model(name, system, todo, held_out.seen, path, **generation)
    done = read(path)
    return [done[row.id] for row in held_out.rows]


def from_retrieval(held_out: "HeldOut", rows: list["Row"]) -> list[dict]:
    """The answers of the nearest training rows (``metrics.retrieval``)."""
    from stoney_rl.metrics import retrieval

    texts = retrieval.retrieve_answers(held_out.corpus.split.train, [row.question for row in rows])
    return [record(row, text, held_out.seen.get(row.id)) for row, text in zip(rows, texts, strict=True)]


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
        rest = {"tokens": line.get("tokens"), "truncated": bool(line.get("truncated")), "samples": line.get("samples")}
        found.append(record(row, line.get("prediction"), seen.get(row.id), **rest))
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
    num_generations: int = 0,
    temperature: float = 1.0,
    seed: int = 0,
) -> None:
    """Generate answers to ``rows`` and append them to ``path`` batch by batch, with a progress bar called ``name``.

    The prediction is the greedy answer; ``num_generations`` more are drawn at ``temperature`` in the same pass. A sample
    depends on ``seed``, its row and its number alone.
    """
    from tqdm import tqdm

    from stoney_rl import generation, models, prompts

    tokenizer = models.load_tokenizer(source)
    prompts.prepare_tokenizer(tokenizer)
    model = models.load_model(source, models.inference_dtype(dtype))
    checkpoints.check_fingerprint(Path(source.name), model)
    answers = 1 + num_generations
    encoded = [prompts.encode_prompt(tokenizer, row.prompt) for row in rows]
    batches = generation.generate(
        model.to(models.device()),
        tokenizer,
        [prompt for prompt in encoded for _ in range(answers)],
        ends=prompts.end_of_turn_ids(tokenizer),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seeds=[_sample_seed(seed, row.id, number) for row in rows for number in range(answers)],
        temperature=temperature,
    )
    waiting: dict[int, dict] = {}  # row -> number -> completion, until all of the row's are there
    with tqdm(total=len(rows), desc=f"{name}: answers", unit="row") as bar:
        for batch in batches:
            for done in batch:
                waiting.setdefault(done.index // answers, {})[done.index % answers] = done
            whole = [index for index, found in waiting.items() if len(found) == answers]
            lines = []
            for index in whole:
                greedy, *drawn = (done for _, done in sorted(waiting.pop(index).items()))
                samples = {"temperature": temperature, "texts": [done.text for done in drawn]} if drawn else None
                rest = {"tokens": greedy.tokens, "truncated": greedy.truncated, "samples": samples}
                lines.append(record(rows[index], greedy.text, seen.get(rows[index].id), **rest))
            append(path, lines)
            bar.update(len(lines))


def _sample_seed(seed: int, row_id: str, number: int) -> int | None:
    """The seed of a row's sample ``number``, from 1; None for the greedy answer, which is number 0."""
    key = json.dumps([seed, row_id, number]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:7], "big") if number else None
