"""Runs that survive: what makes two runs the same one, the directory of an unfinished run, and whether one is done."""

import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from stoney_rl import checkpoints, tracking
from stoney_rl.errors import StoneyError

if TYPE_CHECKING:
    import argparse

    from stoney_rl import cli

IDENTITY_FILE = "identity.json"
TRACKING_FILE = "tracking.json"
MEASURED = "measured"  # folder in which an analysis keeps what it has measured


def is_main() -> bool:
    """Whether this process writes and prints: rank 0 under torchrun, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def partial_directory(output: Path) -> Path:
    """Where a stage works until its output is whole: ``<output>.partial``, beside it."""
    return output.with_name(output.name + ".partial")


def check_outputs(outputs: dict[str, str], inputs: dict[str, str | None], problems: "cli.Problems") -> None:
    """Add to ``problems`` each output directory that can't be one, by the flag that names it.

    It is a file, two are the same, or it holds something that must outlive it, since it is replaced whole: an input (by
    the flag that names it, or a description), the current folder, another output.
    """
    places = {flag: Path(path).resolve() for flag, path in outputs.items()}
    kept = inputs | {"the current folder": "."}
    for number, (flag, place) in enumerate(places.items()):
        path = outputs[flag]
        above = next(parent for parent in (place, *place.parents) if parent.exists())
        if not above.is_dir():
            problems.add(f"{flag}: {path} {'is' if above == place else 'lies below'} a file; choose a directory")
        elif not os.access(above, os.W_OK):
            problems.add(f"{flag}: {path} can't be written; choose another directory")
        for other in list(places)[:number]:
            if places[other] == place:
                problems.add(f"{flag}: {path} is the directory of {other} too; choose another")
        held = [
            name
            for name, given in kept.items()
            if given and Path(given).exists() and Path(given).resolve().is_relative_to(place)
        ]
        for name in held + [other for other, elsewhere in places.items() if place in elsewhere.parents]:
            problems.add(f"{flag}: {path} holds {name}, which it would replace; choose another directory")


def identify(arguments: dict, ignored: set[str], **inputs: object) -> dict:
    """What makes two runs the same: every argument that changes the result, and the inputs' hashes; plain JSON."""
    kept = {key: value for key, value in arguments.items() if key not in ignored and not key.startswith("wandb_")}
    return json.loads(json.dumps({"arguments": kept, **inputs}))


def begin(outputs: list[Path], identity: dict, *, resume: bool, overwrite: bool) -> Path | None:
    """Open the working directory of a training run and say whether it starts or continues; None if it is done.

    ``outputs``: what the run writes, its main output first. Raises ``StoneyError`` as ``is_finished`` and
    ``open_partial`` do.
    """
    say = print if is_main() else (lambda *_: None)
    if is_finished(outputs, identity, overwrite=overwrite):
        leftover = partial_directory(outputs[0])
        if is_main() and _read(leftover / IDENTITY_FILE) in (None, identity):  # of a kill at the very end
            shutil.rmtree(leftover, ignore_errors=True)
        names = " and ".join(map(str, outputs))
        say(f"{names}: trained with these arguments on this data already (--overwrite trains again)")
        return None
    partial = open_partial(outputs[0], identity, resume=resume, overwrite=overwrite)
    if resume:
        last = last_checkpoint(partial)
        say(f"--resume: continuing after {last}" if last else "--resume: nothing yet; starting")
    return partial


def is_finished(outputs: list[Path], identity: dict, *, overwrite: bool, record: str = checkpoints.STAGE_FILE) -> bool:
    """Whether ``outputs`` hold this very run, by the 'identity' that the first one's ``record`` file tells.

    Raises ``StoneyError`` if something else stands in their place and ``overwrite`` is false. Where only later outputs
    exist beside an unfinished run, a kill came between two renames: not finished, to be written again.
    """
    present = [path for path in outputs if path.exists()]
    if overwrite or not present:
        return False
    if not outputs[0].exists() and partial_directory(outputs[0]).is_dir():
        return False
    if len(present) == len(outputs) and (_read(outputs[0] / record) or {}).get("identity") == identity:
        return True
    raise StoneyError(f"{present[0]}: holds another run; choose another --output_dir, or --overwrite to replace it")


def open_partial(output: Path, identity: dict, *, resume: bool, overwrite: bool) -> Path:
    """Make or reopen the directory of the unfinished run.

    One that holds no checkpoint, no answers and no measurements yet is made anew. Raises ``StoneyError`` if there is one
    that does and neither ``resume`` nor ``overwrite`` is said, if it was started with other arguments, and if it cannot be
    written.
    """
    partial = partial_directory(output)
    if partial.exists() and is_main() and (overwrite or not _holds_work(partial)):
        shutil.rmtree(partial)
    if partial.exists() and is_main():
        before = _read(partial / IDENTITY_FILE)
        if not resume:
            raise StoneyError(f"{partial}: an unfinished run; --resume continues it, --overwrite starts again")
        if before is not None and before != identity:
            raise StoneyError(
                f"{partial}: started with other values of {', '.join(_differing(before, identity))}; "
                "give the same ones to continue, or --overwrite to start again"
            )
    if is_main():
        try:
            partial.mkdir(parents=True, exist_ok=True)
            checkpoints.write_json(partial / IDENTITY_FILE, identity)
        except OSError as error:
            raise StoneyError(f"--output_dir: cannot write {partial} ({error.strerror}); choose another") from error
    return partial


def last_checkpoint(partial: Path) -> Path | None:
    """The unfinished run's newest ``checkpoint-<step>``; by construction it is whole."""
    found = sorted(partial.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    return found[-1] if found else None


def start_tracking(
    stage: str, args: "argparse.Namespace", partial: Path, *, inputs: Iterable[str]
) -> "tracking.Tracker":
    """``tracking.start_stage`` for the run in ``partial``: a resumed run goes on in the W&B run it began.

    ``inputs``: the model and data that the run starts from. Those that were made under tracking are noted as used, and
    the first of them that has a group gives it.
    """
    before = _read(partial / TRACKING_FILE) or {}
    made = [checkpoints.tracked(name) for name in inputs]
    tracker = tracking.start_stage(
        stage,
        args,
        name=partial.name.removesuffix(".partial"),
        group=next((run["group"] for run in (before, *made) if run.get("group")), None),
        resume_id=before.get("run_id"),
    )
    for run in made:
        tracker.use_artifact(run.get("artifact"))
    if is_main():
        checkpoints.write_json(partial / TRACKING_FILE, {"run_id": tracker.run_id, "group": tracker.group})
    return tracker


def relaunch_on_gpus(number: int | None) -> None:
    """Replace this process by torchrun with one process a GPU (all GPUs if ``number`` is None).

    Raises ``StoneyError`` if there are fewer GPUs than asked for, saying how many there are.
    """
    import torch

    available = torch.cuda.device_count()
    if not available or (number or 0) > available:
        asked = f"{number} GPUs asked for" if number else "GPUs asked for"
        remedy = f"use --num_gpus {available}" if available else "leave out --multi_gpu to train on the CPU"
        raise StoneyError(f"--multi_gpu: {asked}, {available} found on this machine; {remedy}")
    sys.stdout.flush()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number or available}"]
    os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])


def _holds_work(partial: Path) -> bool:
    return last_checkpoint(partial) is not None or any(
        any(partial.rglob(name)) for name in ("predictions.jsonl", f"{MEASURED}/**/*.json")
    )


def _read(path: Path) -> dict | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _differing(before: dict, now: dict) -> list[str]:
    old, new = before.get("arguments", {}), now["arguments"]
    names = [f"--{key}" for key in new if old.get(key) != new[key]]
    return names + [key for key in now if key != "arguments" and before.get(key) != now[key]]
