"""Runs whose data waits on this machine: what their files hold, and how they get to W&B later, with their lineage.

A run that was offline, or lost its server, or was killed, leaves ``wandb/[offline-]run-<start>-<id>/run-<id>.wandb``. A
resumed run leaves several, one for each start, all with its id. ``wandb sync`` replays each such file behind what the
server has of that run, so they must come in order of time; it cannot replay which artifacts a run used, because an
offline run cannot record that. ``sync`` does both: uploads in order, then links each run to its inputs.

An online run's file does not hold its artifacts either. Beside the file lie marks: ``.synced`` is wandb's own;
``.unsynced``: an online run that has not ended well, so that something may be missing at the server; ``.unlinked``: inputs
that are not yet links at the server; ``.unlogged``: the artifacts of an online run that may not have arrived.
"""

import contextlib
import json
import os
import shlex
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoney_rl.errors import StoneyError

if TYPE_CHECKING:
    import wandb

# wandb notes the machine's state every 15 s: a file without an end that is older than this has lost its process.
STILL_WRITTEN_SECONDS = 60.0
ENDED = "ended"  # in the mark 'unsynced' of a run whose process is done with it
# How long a resumed run waits for the upload of its earlier parts.
EARLIER_SECONDS = 120.0


@dataclass(frozen=True)
class KeptRun:
    """One start of a run, as its local files tell it.

    ``used``: references of the artifacts that it was made from; ``exit_code``: None if it did not come to its end.
    """

    directory: Path
    run_id: str
    project: str
    entity: str
    group: str
    job_type: str
    used: tuple[str, ...]
    exit_code: int | None

    @property
    def running(self) -> bool:
        """Whether a process seems to be still writing it."""
        mark = _mark(self.directory, "unsynced")
        ended = self.exit_code is not None or (mark.exists() and mark.read_text() == ENDED)
        return not ended and time.time() - _file(self.directory).stat().st_mtime < STILL_WRITTEN_SECONDS


def sync(folder: Path, api: "wandb.Api") -> list[str]:
    """Upload what waits in the ``wandb/`` folder, in order of time, and link the runs to their inputs.

    Says what it does; returns one line for each run or link that did not get there, [] if all did. Runs that are still
    being written are left alone. Raises ``StoneyError`` if there is no such folder.
    """
    if not folder.is_dir():
        raise StoneyError(f"{folder}: no such folder; runs are kept in ./wandb, or in wandb/ below WANDB_DIR")
    kept, problems = [], []
    for directory in filter(_waits, _directories(folder)):
        try:
            run = read_run(directory)
        except ValueError as error:
            problems.append(f"{directory.name}: not uploaded: {error}")
            continue
        if run and run.running:
            print(f"{directory.name}: still running, left alone", flush=True)
        elif run:
            kept.append(run)
    waiting = [run.directory for run in kept if _unsynced(run.directory)]
    print(
        f"{folder}: {len(waiting)} runs to upload, {sum(bool(run.used) for run in kept)} to link to inputs", flush=True
    )
    failed = upload(waiting)
    problems += [f"{directory.name}: not uploaded; see above, and run this again" for directory in failed]
    for run in kept:
        if run.directory not in failed:
            problems += _log_artifacts(run)
    for run in kept:  # when all artifacts are there
        if run.directory not in failed:
            problems += _link(run, api)
    return problems


def upload(directories: list[Path], timeout: float | None = None) -> list[Path]:
    """``wandb sync`` of runs, which puts those of one id in order of time; returns those that did not get through."""
    if directories:
        command = [sys.executable, "-m", "wandb", "sync", "--include-online", *map(str, directories)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, env=os.environ | {"WANDB_MODE": "online"}, timeout=timeout, check=False)
    failed = [directory for directory in directories if not _mark(directory, "synced").exists()]
    for directory in set(directories) - set(failed):
        unmark(directory, "unsynced")
    return failed


def upload_earlier(root: Path, run_id: str) -> None:
    """Upload what earlier starts of the run left below ``root``/wandb: once it goes on, that would come too late, behind it.

    Raises ``ConnectionError`` if something did not get through in ``EARLIER_SECONDS``.
    """
    directories = [
        directory for directory in _directories(root / "wandb")
        if directory.name.endswith(f"-{run_id}") and _unsynced(directory) and read_run(directory)
    ]  # fmt: skip
    failed = upload(directories, EARLIER_SECONDS)
    if failed:
        raise ConnectionError(f"{failed[0].name} is still here; {sync_command(root / 'wandb')} uploads it")


def wandb_root(directory: str | Path | None = None) -> Path:
    """The folder below which wandb keeps its ``wandb/``: as told, else WANDB_DIR, else the working directory."""
    return Path(directory or os.environ.get("WANDB_DIR") or ".").absolute()


def sync_command(folder: Path) -> str:
    """The command that uploads what waits in ``folder``."""
    default = folder.absolute() == wandb_root() / "wandb"
    return "python wandb_sample.py --sync" + ("" if default else f" {shlex.quote(str(folder))}")


def mark(directory: Path, name: str, content: str = "") -> None:
    """Set the mark ``name`` of a run: 'unsynced' or 'unlinked'."""
    _mark(directory, name).write_text(content)


def unmark(directory: Path, name: str) -> None:
    _mark(directory, name).unlink(missing_ok=True)


def read_run(directory: Path) -> KeptRun | None:
    """What the files in ``directory`` tell of the run; None if they hold nothing, as after a kill at the very start."""
    run, used, exit_code = None, [], None
    for record in records(_file(directory)):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
        exit_code = record.exit.exit_code if kind == "exit" else exit_code
        updates = record.run.config.update if kind == "run" else record.config.update if kind == "config" else ()
        for item in updates:
            if "used_artifacts" in (item.key, *item.nested_key):
                used = json.loads(item.value_json)
    if run is None:
        return None
    return KeptRun(directory, run.run_id, run.project, run.entity, run.run_group, run.job_type, tuple(used), exit_code)


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of a .wandb transaction file.

    Its format is LevelDB's log (github.com/google/leveldb/blob/main/doc/log_format.md) behind a 7-byte header: blocks
    of 32 KiB, chunks of (CRC-32 of what follows but the length 4 bytes, length 2, type 1: whole, first, middle, last).
    wandb's own process may still be writing: a record whose end is not in the file yet is left out. Raises ValueError
    for other files, and for a chunk that its checksum does not fit.
    """
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    if data[:4] != b":W&B":
        raise ValueError(f"{path} is not a .wandb file")
    position, partial = 7, b""
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        if room < 7 or kind == 0:
            position += room
            continue
        end = position + 7 + length
        if end > len(data):
            return
        if zlib.crc32(data[position + 6 : end]) != checksum:
            raise ValueError(f"{path} is damaged: the checksum at byte {position} is wrong")
        partial += data[position + 7 : end]
        position = end
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(partial)
            yield record
            partial = b""


def _log_artifacts(run: KeptRun) -> list[str]:
    """Log what an online run logged in vain, by going on with it; a line if that failed."""
    from stoney_rl import tracking

    if not _mark(run.directory, "unlogged").exists():
        return []
    tracker = tracking.start(
        run.job_type,
        {},
        mode="online",
        project=run.project,
        entity=run.entity or None,
        group=run.group,
        directory=run.directory.parent.parent,
        resume_id=run.run_id,
    )
    for given in json.loads(_mark(run.directory, "unlogged").read_text(encoding="utf-8")):
        tracker.artifact(**given)
    tracker.finish(exit_code=1 if run.exit_code is None else run.exit_code)
    if tracker.mode != "online" or tracker.failures:
        return [f"{run.directory.name}: its artifacts did not arrive ({', '.join(tracker.failures) or tracker.reason})"]
    unmark(run.directory, "unlogged")
    return []


def _link(run: KeptRun, api: "wandb.Api") -> list[str]:
    """Declare the run's inputs at the server; a line for each that failed."""
    problems = []
    for name in run.used:
        try:
            remote = api.run("/".join(filter(None, (run.entity, run.project, run.run_id))))
            missing = [remote.entity, remote.project][: 2 - name.count("/")]
            remote.use_artifact(api.artifact("/".join([*missing, name])))
        except Exception as error:  # the client and the server have many ways to say no
            problems.append(f"{run.directory.name}: not linked to {name}: {' '.join(str(error).split())[:200]}")
    if not problems:
        unmark(run.directory, "unlinked")
    return problems


def _directories(folder: Path) -> list[Path]:
    """Run directories in ``folder``, in order of their starts."""
    found = [path.parent for path in folder.glob("*run-*/run-*.wandb")]
    return sorted(found, key=lambda path: path.name.removeprefix("offline-"))


def _waits(directory: Path) -> bool:
    return _unsynced(directory) or any(_mark(directory, name).exists() for name in ("unlinked", "unlogged"))


def _unsynced(directory: Path) -> bool:
    """Whether something of the run may be missing at the server."""
    waits = directory.name.startswith("offline-") or _mark(directory, "unsynced").exists()
    return waits and not _mark(directory, "synced").exists()


def _file(directory: Path) -> Path:
    return next(directory.glob("run-*.wandb"))


def _mark(directory: Path, name: str) -> Path:
    return directory / f"run-{directory.name.rpartition('-')[2]}.wandb.{name}"
