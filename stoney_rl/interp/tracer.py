"""Watch a model while it trains: attention heads, lens and neurons every N updates, in the bits of a run without.

    tracer.watch(trainer, examples, directory, every=25, seed=0, tracker=tracker)     # before trainer.train()
    found = tracer.read(directory)                                                    # afterwards, or meanwhile
    found.steps, found["induction"]                                                   # [step], [step, row, layer, head]

1. The first trace is of the model as training begins, the last of the one that is kept; see ``live`` for what is in one.
2. The neurons to follow are chosen at the first trace and stay.
3. Rank 0 alone traces and writes. A run that resumes drops the traces of the steps that it trains again.

<directory>/trace.jsonl has a line for each trace: step, seconds that it took, and what ``summary`` says.
<directory>/trace/ has probe.json, see ``Trace``, and step-<step>.npz with the arrays of ``live.trace``. probe.json and the
patterns are about held-out rows: they stay out of what is uploaded.
"""

import contextlib
import io
import json
import os
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import Trainer, TrainerCallback

from stoney_rl import checkpoints, records
from stoney_rl.errors import StoneyError
from stoney_rl.interp import live
from stoney_rl.tracking import Tracker

TRACE_FILE, TRACE_FOLDER, PROBE_FILE = "trace.jsonl", "trace", "probe.json"
MEASURES = ("entropy", "sink", "previous_token", "induction")


def summary(found: dict[str, np.ndarray]) -> dict[str, float | None]:
    """The numbers of a trace that fit in a line; None for one that is not finite."""
    values = {
        "mean_entropy": found["entropy"].mean(),
        "mean_sink": found["sink"].mean(),
        "max_previous_token": found["previous_token"].mean(0).max(),
        "max_induction": found["induction"].mean(0).max(),
        "median_depth": np.median(found["depth"]),
        "answer_log_prob": found["log_prob"][:, -1].mean(),
    }
    return {name: float(value) if np.isfinite(value) else None for name, value in values.items()}


def watch(
    trainer: Trainer, examples: Sequence[dict], directory: Path, *, every: int, seed: int, tracker: Tracker
) -> None:
    """Let a ``Tracer`` watch ``trainer``, on a probe of ``examples``. Raises ``StoneyError`` as both do."""
    probe = live.make_probe(examples, trainer.processing_class, seed)
    trainer.add_callback(Tracer(trainer, probe, directory, every=every, seed=seed, tracker=tracker))


class Tracer(TrainerCallback):
    """Traces before training, every ``every`` updates, and at the end; see the module's docstring.

    With ``load_best_model_at_end`` the last trace is of the weights that are kept, at their step. Numbers and, at the
    end, a table of heads go to ``tracker``. What can't be written ends the tracing, not the training. Raises
    ``StoneyError`` as ``live.check`` does, and for a model whose weights are sharded over processes.
    """

    def __init__(
        self,
        trainer: Trainer,
        probe: live.Probe,
        directory: Path,
        *,
        every: int,
        seed: int,
        tracker: Tracker | None = None,
    ) -> None:
        self.trainer, self.probe, self.directory = trainer, probe, Path(directory)
        self.every, self.seed, self.tracker = every, seed, tracker
        self.steps: set[int] = set()
        self.stopped = False
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise StoneyError("--trace_every: weights are sharded over processes, no process can trace; leave it out")
        live.check(trainer.model, probe)

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.is_world_process_zero:
            with self._going_on():
                self._begin(state.global_step)
            self._trace(state.global_step)

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.is_world_process_zero and state.global_step % self.every == 0:
            self._trace(state.global_step)

    def on_train_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.is_world_process_zero:
            kept = state.best_global_step if args.load_best_model_at_end else None
            self._trace(kept or state.global_step)
            if self.tracker and not self.stopped:
                self.tracker.table("trace/heads", *heads_table(read(self.directory)))

    def _begin(self, step: int) -> None:
        """Drop what is after ``step``; choose the neurons, or find again which ones were chosen."""
        folder = self.directory / TRACE_FOLDER
        folder.mkdir(exist_ok=True)
        self.steps = {line["step"] for line in records.keep_steps(self.directory / TRACE_FILE, step)}
        for path in folder.glob("step-*.npz"):
            if int(path.stem.removeprefix("step-")) not in self.steps:
                path.unlink()
        if (folder / PROBE_FILE).exists():
            self.neurons = json.loads((folder / PROBE_FILE).read_text(encoding="utf-8"))["neurons"]
            return
        self.neurons = live.choose_neurons(self.trainer.model, self.probe, self.seed)
        texts = [
            {"ids": text, "answer": start} for text, start in zip(self.probe.texts, self.probe.starts, strict=True)
        ]
        described = {"texts": texts, "answer_tokens": self.probe.answer_tokens(), "neurons": self.neurons}
        checkpoints.write_json(folder / PROBE_FILE, described | {"repeated": self.probe.repeated.tolist()})

    def _trace(self, step: int) -> None:
        if self.stopped or step in self.steps:
            return
        started = time.monotonic()
        found = live.trace(self.trainer.model, self.probe, [(layer, index) for layer, index, _ in self.neurons])
        numbers = summary(found)
        with self._going_on():
            _save(self.directory / TRACE_FOLDER / f"step-{step}.npz", found)
            seconds = round(time.monotonic() - started, 2)
            records.append(self.directory / TRACE_FILE, [{"step": step, "seconds": seconds, **numbers}])
            self.steps.add(step)
        if self.tracker:
            self.tracker.log({f"trace/{name}": value for name, value in numbers.items() if value is not None}, step)

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.stopped = True
            print(f"{self.directory}: the trace can't be written ({error}); training goes on without", flush=True)


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Compressed, and under its name only when it is whole."""
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    half = path.with_suffix(".tmp")
    half.write_bytes(packed.getbuffer())
    os.replace(half, path)


# Afterwards


@dataclass(frozen=True)
class Trace:
    """A run's traces, in order of their steps; ``trace[name]`` [step, ...] is what ``live.trace`` calls ``name``.

    lines: what trace.jsonl says of each. probe: texts (token ids, where the answer begins), repeated (token ids),
    answer_tokens ([text, position]), neurons ([layer, index, why]). files: the arrays of each, which are read when asked
    for: two texts' patterns are 2 MB a step for SmolLM2.
    """

    lines: list[dict]
    probe: dict
    files: list[Path]

    @property
    def steps(self) -> list[int]:
        return [line["step"] for line in self.lines]

    @property
    def names(self) -> list[str]:
        with np.load(self.files[0]) as arrays:
            return arrays.files

    def __getitem__(self, name: str) -> np.ndarray:
        return np.stack([_load(file, name) for file in self.files])


def _load(file: Path, name: str) -> np.ndarray:
    with np.load(file) as arrays:
        return arrays[name]


def read(directory: str | Path) -> Trace:
    """The traces in a training run's directory, finished or not. Raises ``StoneyError`` if there is none."""
    directory = Path(directory)
    folder = directory / TRACE_FOLDER
    try:
        text = (directory / TRACE_FILE).read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a run that is still going may be in the middle of a line
        lines = sorted((json.loads(line) for line in whole.splitlines()), key=lambda line: line["step"])
        if not lines:
            raise StoneyError(f"{directory / TRACE_FILE}: no trace yet")
        probe = json.loads((folder / PROBE_FILE).read_text(encoding="utf-8"))
        files = [folder / f"step-{line['step']}.npz" for line in lines]
        for file in files:
            np.load(file).close()
    except FileNotFoundError as error:
        raise StoneyError(f"{directory}: no trace ({error.filename}); train with --trace_every") from error
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise StoneyError(f"{directory}: its trace is damaged ({error})") from error
    return Trace(lines, probe, files)


def heads_table(found: Trace) -> tuple[list[str], list[list]]:
    """(columns, rows): each head's measures at the first and the last trace, means over texts or rows."""
    means = {name: [_load(found.files[at], name).mean(axis=0) for at in (0, -1)] for name in MEASURES}
    columns = ["layer", "head"] + [f"{name} {when}" for name in MEASURES for when in ("first", "last")]
    places = np.ndindex(means["entropy"][0].shape)
    return columns, [[*at, *(float(means[name][when][at]) for name in MEASURES for when in (0, -1))] for at in places]
