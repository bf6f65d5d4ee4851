"""The systems of an evaluation: the model, an earlier model, an earlier evaluation, or the retrieval baseline."""

from pathlib import Path
from typing import TYPE_CHECKING

from stoney_rl import checkpoints
from stoney_rl.errors import StoneyError
from stoney_rl.models import ModelSource, find_model, resolve_unpublished
from stoney_rl.predictions import PREDICTIONS_FILE, RETRIEVAL, sha256

if TYPE_CHECKING:
    from stoney_rl.corpus import HeldOut

RESULTS_FILE = "results.json"

System = ModelSource | Path | str  # a model, the directory of an evaluation, or RETRIEVAL


def short_name(name: str) -> str:
    """What a checkpoint directory or hub id is called in tables."""
    return (Path(name).resolve() if Path(name).is_dir() else Path(name)).name


def find_all(source: ModelSource, baselines: list[str]) -> dict[str, System]:
    """The model ``source`` and its ``--baseline``s by name. Raises ``StoneyError`` for one that is missing or there twice."""
    systems: dict[str, System] = {short_name(source.name): source}
    for baseline in baselines:
        name, system = _find_baseline(baseline, source)
        if name in systems:
            raise StoneyError(f"--baseline {baseline}: a second system called {name}; give each folder its own name")
        systems[name] = system
    return systems


def _find_baseline(baseline: str, source: ModelSource) -> tuple[str, System]:
    if baseline == RETRIEVAL:
        return RETRIEVAL, RETRIEVAL
    if baseline == "base":
        base = base_of(source)
        if not base:
            raise StoneyError(f"--baseline base: {source.name} does not say what it was trained from; name the model")
        revision = None if Path(base).is_dir() else _stage(source.name).get("arguments", {}).get("revision")
        return short_name(base), find_model(base, revision=revision)
    path = Path(baseline)
    if path.is_dir() and (path / RESULTS_FILE).exists():
        if not (path / PREDICTIONS_FILE).exists():
            raise StoneyError(f"--baseline {baseline}: has {RESULTS_FILE} but no {PREDICTIONS_FILE}; evaluate it again")
        return short_name(baseline), path
    return short_name(baseline), find_model(resolve_unpublished(baseline)[0])


def base_of(source: ModelSource) -> str | None:
    """What the model was trained from, as its adapter or stage.json says; None for a base model."""
    stage = _stage(source.name)
    base = source.base or stage.get("base_model")
    return checkpoints.locate(base, Path(source.name)) if base and stage.get("stage") != "base" else None


def first_ancestor(source: ModelSource) -> str | None:
    """The model that all training of ``source`` started from, as far back as the stage.json files lead."""
    found, current = None, base_of(source)
    while current:
        found, current = current, base_of(find_model(current)) if Path(current).is_dir() else None
    return found


def _stage(name: str) -> dict:
    return (checkpoints.read_stage(Path(name)) if Path(name).is_dir() else None) or {}


def check(systems: dict[str, System], held_out: "HeldOut", split: str) -> None:
    """Raise ``StoneyError``, before anything is generated, for a system that can't be compared on these rows."""
    from stoney_rl import corpus, predictions

    for name, system in systems.items():
        if isinstance(system, Path):
            predictions.from_earlier(system, held_out.rows, held_out.seen)
        elif isinstance(system, ModelSource) and split in ("test", "validation"):
            record = corpus.training_record(system.name)
            trained = corpus.trained_rows(held_out.rows, record) if record else []
            if trained:
                raise StoneyError(f"--baseline {name}: was trained on {len(trained)} of these rows; choose another")


def describe(system: System) -> dict:
    """What identifies a system: its kind and path, and the fingerprint of its weights, where recorded, or of its answers."""
    if isinstance(system, ModelSource):
        return {
            "kind": "model",
            "path": system.name,
            "revision": system.revision if system.kind == "hub" else None,
            "fingerprint": (_stage(system.name).get("fingerprint") or {}).get("sha256"),
        }
    if isinstance(system, Path):
        return {"kind": "evaluation", "path": str(system), "fingerprint": sha256(system / PREDICTIONS_FILE)}
    return {"kind": RETRIEVAL, "path": None, "fingerprint": None}


def find_again(described: dict, beside: Path) -> "ModelSource | str":
    """The system that ``describe`` described in the directory ``beside``. Raises ``StoneyError`` if it is not there any more."""
    if described["kind"] == RETRIEVAL:
        return RETRIEVAL
    if described["kind"] != "model":
        raise StoneyError(f"{described['path']}: an earlier evaluation; verify it by itself")
    source = find_model(checkpoints.locate(described["path"], beside), revision=described["revision"])
    if describe(source)["fingerprint"] != described["fingerprint"]:
        raise StoneyError(f"{source.name}: another checkpoint than the one that was evaluated")
    return source
