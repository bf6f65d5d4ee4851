"""Running one command or one function in a process of its own, and what that process took: time, memory, updates.

Imports nothing heavy: on Linux a child's peak memory counts from the memory of the process that started it.
"""

import contextlib
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from stoney_rl.errors import StoneyError

# transformers' bar of updates, which has no name in front of it: "  25%|##5  | 3/12 [00:05<00:15,  1.68s/it]".
_BAR = re.compile(r"(?:^|[\r\n])\s*\d+%\|[^|\r\n]*\| *(\d+)/(\d+) \[")
_TAIL = 400  # characters kept between two reads, so that a bar that arrives in two pieces is seen
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux


@dataclass(frozen=True)
class Run:
    """What one process took. Seconds since it was started; bytes of resident memory of its largest process.

    ``updates[n]`` is when update n was done, ``updates[0]`` when training began; ``peak_training_bytes`` is the peak up
    to the last update (None where /proc does not tell).
    """

    seconds: float
    updates: list[float]
    peak_bytes: int
    peak_training_bytes: int | None
    cpu_seconds: float

    @property
    def training_seconds(self) -> float:
        return self.updates[-1] - self.updates[0]

    @property
    def update_seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.updates, self.updates[1:], strict=False)]


def run_training(command: list[str], *, updates: int, env: dict[str, str], progress: Callable[[int], None]) -> Run:
    """Run a command that trains with transformers' ``Trainer``, and take its times from its progress bar.

    Both sides are timed the same way, from outside and without changing either: the bar is drawn when training begins
    and after each update. ``progress`` is called with the number of updates done. Raises ``StoneyError`` with the end
    of the output if the command fails or shows no such bar.
    """
    env = {key: value for key, value in env.items() if not key.startswith("TQDM_") and key != "COLUMNS"}
    env |= {"TQDM_MININTERVAL": "0", "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env,
        start_new_session=True,
    )  # fmt: skip
    times: dict[int, float] = {}
    peak_training, log, recent = None, "", ""
    try:
        while chunk := os.read(process.stdout.fileno(), 65536):
            now = time.monotonic() - started
            text = chunk.decode("utf-8", errors="replace")
            log = (log + text)[-20_000:]
            recent += text
            for done, total in _BAR.findall(recent):
                if int(total) == updates and int(done) not in times:
                    times[int(done)] = now
                    progress(int(done))
                    if int(done) == updates:
                        peak_training = _high_water(process.pid)
            recent = recent[-_TAIL:]
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if process.returncode is None:  # interrupted: take the whole process group along
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
    if process.returncode:
        raise StoneyError(f"{_short(command)}: failed with code {process.returncode}; its output ended:\n{_end(log)}")
    missing = [step for step in range(updates + 1) if step not in times]
    if missing:
        raise StoneyError(
            f"{_short(command)}: its progress bar did not show update {missing[0]} of {updates}; its output ended:\n"
            f"{_end(log)}"
        )
    return Run(
        seconds=time.monotonic() - started,
        updates=[times[step] for step in range(updates + 1)],
        peak_bytes=usage.ru_maxrss * _RSS_UNIT,
        peak_training_bytes=peak_training,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
    )


def in_process(function: Callable, *args: object) -> object:
    """``function(*args)`` in a fresh process, so that neither its imports nor its memory stay behind."""
    # At Ctrl-C the worker just ends: the traceback that Python would print there says nothing.
    quietly = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_DFL)}
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), **quietly) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool as error:
            raise StoneyError(f"{function.__name__}: its process was killed; is the memory full?") from error


@contextlib.contextmanager
def ending_tidily() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end the program as Ctrl-C does: children are killed and temporary folders removed."""

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def peak_bytes() -> int:
    """The largest resident memory of this process so far, bytes."""
    # What getrusage gives begins, on Linux, with the peak of the process that started this one.
    return _vm_high_water(os.getpid()) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(threads: int) -> dict:
    """What the numbers depend on. ``load``: processes that wanted a core in the last minute, before the benchmark."""
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "torch_threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "load": round(os.getloadavg()[0], 2),
    }


def load_notice(load: float, cores: int) -> str | None:
    """A line for the user where other processes take so much of the machine that the numbers mean little."""
    if load < 0.25 * cores:
        return None
    return (
        f"This machine is busy: load {load:.1f} on {cores} cores before the benchmark. Times will be too long and "
        "unsteady; the comparison is worth little."
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _high_water(root: int) -> int | None:
    """Peak resident bytes of the largest process among ``root`` and its descendants; None without /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold anything; state and parent follow its last one.
            parents[int(path.parent.name)] = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):  # ended meanwhile
            continue
    family, grown = {root}, True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in family} - family
        family |= children
        grown = bool(children)
    return max((peak for pid in family if (peak := _vm_high_water(pid)) is not None), default=None)


def _vm_high_water(pid: int) -> int | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _short(command: list[str]) -> str:
    return " ".join(Path(part).name if index < 2 else part for index, part in enumerate(command[:3]))


def _end(log: str) -> str:
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", log) if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-15:])
