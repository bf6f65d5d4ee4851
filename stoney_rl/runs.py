"""Runs that survive: what makes two runs the same one, the directory of an unfinished run, and whether one is done."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from stoney_rl import checkpoints, distributed, tracking
from stoney_rl.errors import StoneyError

if TYPE_CHECKING:
    import argparse

    from stoney_rl import cli

IDENTITY_FILE = "identity.json"
TRACKING_FILE = "tracking.json"
MEASURED = "measured"  # folder in which an analysis keeps what it has measured


def default_output(name: str) -> str:
    """Where a stage writes unless told: ``name``; a run that ``wandb agent`` started, to a directory of its own.

    For 'stoney_lora_ckpt' that is ``sweeps/<sweep>/<run>_ckpt``: the runs of a sweep must not meet in one place.
    """
    sweep, run = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    return f"sweeps/{sweep}/{run}_{name.rpartition('_')[2]}" if sweep and run else name


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

    ``outputs``: what the run writes, its main output first. With ``resume`` this very run's unfinished directory goes
    before an older output: it was begun to replace that. Processes that torchrun has started again
    after a failure resume, whatever they were told. Of several processes rank 0 decides; a node that does not see its
    directory gets one of its own. Raises ``StoneyError`` as ``is_finished`` and ``open_partial`` do.
    """
    say = print if distributed.is_main() else (lambda *_: None)
    resume = resume or distributed.is_restarted()

    def finished() -> bool:
        partial = partial_directory(outputs[0])
        done = _holds(outputs, identity) and not _is_newer(partial, outputs[0])
        if resume and _is_unfinished(partial, identity) and not done:
            return False
        if overwrite and distributed.is_restarted() and done:  # it ended, and other processes failed after that
            return True
        if not is_finished(outputs, identity, overwrite=overwrite):
            return False
        if done and _read(partial / IDENTITY_FILE) == identity:  # of a kill at the very end
            hold(partial)
            shutil.rmtree(partial)
        return True

    def opened() -> Path:
        return open_partial(outputs[0], identity, resume=resume, overwrite=overwrite)

    if distributed.on_main(finished):
        names = " and ".join(map(str, outputs))
        say(f"{names}: trained with these arguments on this data already (--overwrite trains again)")
        return None
    partial = distributed.on_main(opened)
    if not distributed.shares_disk(partial) and os.environ["LOCAL_RANK"] == "0":
        opened()
    if resume:
        last = distributed.share_checkpoint(partial)
        say(f"--resume: continuing after {last}" if last else "--resume: nothing yet; starting")
    return partial


def end(partial: Path) -> None:
    """Wait until rank 0 has published its outputs; a node that shares no disk with it drops its working directory."""
    distributed.wait_for_everyone()
    if not distributed.is_main() and os.environ.get("LOCAL_RANK") == "0":
        shutil.rmtree(partial, ignore_errors=True)
    release(partial)


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
    if _holds(outputs, identity, record):
        return True
    raise StoneyError(f"{present[0]}: holds another run; choose another --output_dir, or --overwrite to replace it")


def open_partial(output: Path, identity: dict, *, resume: bool, overwrite: bool) -> Path:
    """Make or reopen the directory of the unfinished run, and hold it as long as this process lives.

    One that holds no checkpoint, no answers and no measurements yet is made anew. Raises ``StoneyError`` if there is one
    that does and neither ``resume`` nor ``overwrite`` is said, if it was started with other arguments, if another process
    holds it, and if it cannot be written.
    """
    partial = partial_directory(output)
    if partial.exists():
        hold(partial)
        if not _holds_work(partial) or (overwrite and not (resume and _is_unfinished(partial, identity))):
            shutil.rmtree(partial)
    if partial.exists():
        before = _read(partial / IDENTITY_FILE)
        if not resume:
            raise StoneyError(f"{partial}: an unfinished run; --resume continues it, --overwrite starts again")
        if before is not None and before != identity:
            raise StoneyError(
                f"{partial}: started with other values of {', '.join(_differing(before, identity))}; "
                "give the same ones to continue, or --overwrite to start again"
            )
    try:
        partial.mkdir(parents=True, exist_ok=True)
        checkpoints.write_json(partial / IDENTITY_FILE, identity)
    except OSError as error:
        raise StoneyError(f"--output_dir: cannot write {partial} ({error.strerror}); choose another") from error
    hold(partial)
    return partial


def reopen(output: Path) -> None:
    """Make a finished ``output`` that lost files the unfinished run that it was, with what it holds. Raises ``StoneyError`` where
    another one has that place."""
    partial = partial_directory(output)
    if partial.exists():
        raise StoneyError(f"{output}: incomplete, and {partial} is there too; remove one of them")
    output.rename(partial)


_held: dict[Path, int] = {}


def hold(directory: Path) -> None:
    """Lock ``directory`` for this process, or raise ``StoneyError`` if another has it: two would spoil each other's work."""
    release(directory)
    place = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(place)
        raise StoneyError(f"{directory}: another process is writing there; wait for it, end it, or choose another "
                          "--output_dir") from error  # fmt: skip
    except OSError:  # a file system without locks
        pass
    _held[directory.resolve()] = place


def release(partial: Path) -> None:
    """Let another process write to the directory of an unfinished run; the end of this process does the same."""
    if place := _held.pop(partial.resolve(), None):
        os.close(place)


def last_checkpoint(partial: Path) -> Path | None:
    """The unfinished run's newest ``checkpoint-<step>``; by construction it is whole."""
    return max(partial.glob("checkpoint-*"), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The number of updates after which a ``checkpoint-<step>`` was saved."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def start_tracking(
    stage: str,
    args: "argparse.Namespace",
    partial: Path,
    *,
    model: str,
    data: dict | None,
    also: Iterable[str | None] = (),
) -> "tracking.Tracker":
    """``tracking.start_stage`` for the run in ``partial``: a resumed run goes on in the W&B run that it began."""
    before = _read(partial / TRACKING_FILE) or {}
    tracker = tracking.start_stage(
        stage,
        args,
        name=partial.name.removesuffix(".partial"),
        model=model,
        data=data,
        also=also,
        group=before.get("group"),
        resume_id=before.get("run_id"),
    )
    if distributed.is_main():
        checkpoints.write_json(partial / TRACKING_FILE, {"run_id": tracker.run_id, "group": tracker.group})
    return tracker


def _holds(outputs: list[Path], identity: dict, record: str = checkpoints.STAGE_FILE) -> bool:
    """Whether all ``outputs`` are there, by the run of that identity."""
    whole = all(path.exists() for path in outputs)
    return whole and (_read(outputs[0] / record) or {}).get("identity") == identity


def _is_newer(partial: Path, output: Path) -> bool:
    """Whether ``partial`` has a checkpoint that was saved after ``output`` was finished."""
    last = last_checkpoint(partial)
    return last is not None and last.stat().st_mtime_ns > (output / checkpoints.STAGE_FILE).stat().st_mtime_ns


def _is_unfinished(partial: Path, identity: dict) -> bool:
    """Whether ``partial`` holds checkpoints of the run of that identity."""
    return _holds_work(partial) and _read(partial / IDENTITY_FILE) == identity


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
