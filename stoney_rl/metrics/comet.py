"""COMET (Rei et al. 2020, https://aclanthology.org/2020.emnlp-main.213) from a worker in an environment of its own.

    with CometScorer("Unbabel/wmt22-comet-da") as comet:
        scores = comet.score(questions, answers, references)

unbabel-comet needs older libraries than the rest: `make comet` installs it into .venv-comet/, where comet_worker.py loads
the model once and scores what this side sends. COMET.md describes the models, the protocol and what COMET can't say.
"""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from stoney_rl.errors import StoneyError
from stoney_rl.metrics.checks import NORM_SIGNATURE, check_pairs, check_texts
from stoney_rl.text import normalize

PROTOCOL = 1
# Of the pinned environment. Versions before 2.2.4 score some published models differently, so that another one is refused.
COMET_VERSION = "2.2.7"
ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-comet" / "bin" / "python"
WORKER = Path(__file__).with_name("comet_worker.py")
REQUEST_ROWS = 128  # rows sent at a time: what the timeout is for, and how often the progress bar moves
CLOSE_SECONDS = 10  # for the worker to end by itself
USES = ("required", "optional", "unused")  # of references, as a model tells it
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class CometScorer:
    """A COMET model in a worker process that lives as long as the ``with`` block.

    model: a hub id, a .ckpt file, or a folder that holds hparams.yaml and checkpoints/model.ckpt. python: the COMET
    environment's interpreter. batch_size: rows a forward pass; changes no score beyond rounding. timeout: seconds for one
    request of up to ``REQUEST_ROWS`` rows; start_timeout: seconds to load the model, its download included.

    Making one checks what is on disk and starts nothing. Once in the block it has ``references``, 'required', 'optional' or
    'unused' (a reference-free model such as CometKiwi), and ``signature``: versions, model, SHA-256 of its weights.
    Raises ``StoneyError`` there and in ``score``: no environment, no such model, one that is gated or can't be loaded, a
    worker that dies, hangs, or answers something else than it was asked.
    """

    def __init__(
        self,
        model: str,
        *,
        python: str | Path = PYTHON,
        batch_size: int = 16,
        timeout: float = 600.0,
        start_timeout: float = 3600.0,
    ) -> None:
        self.model, self.python = str(model), Path(python)
        self.batch_size, self.timeout, self.start_timeout = batch_size, timeout, start_timeout
        if not os.access(self.python, os.X_OK):
            raise StoneyError(f"COMET: its environment is missing ({self.python}); make it with: make comet")
        self._checkpoint = find_checkpoint(self.model)
        self.references = self.signature = None  # known once the worker has loaded the model
        self._process: subprocess.Popen | None = None
        self._requests = 0

    def __enter__(self) -> "CometScorer":
        self._log = tempfile.TemporaryFile()
        # -I: neither PYTHONPATH nor this folder, whose comet.py would hide the package, is on the worker's import path.
        # A session of its own: Ctrl-C is for this side to handle, and what the worker starts can be ended with it.
        try:
            self._process = subprocess.Popen(
                [self.python, "-I", WORKER, "--model", self._checkpoint],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            raise StoneyError(
                f"COMET: {self.python} can't be run ({error.strerror}); make it with: make comet"
            ) from error
        try:
            self._meet(self._exchange(None, self.start_timeout))
        except BaseException:  # __exit__ is not called for what happens here
            self._end()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._process is not None and kind is None:
            self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(CLOSE_SECONDS)
        self._end()

    def score(
        self, sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str] | None = None
    ) -> list[float]:
        """COMET's score of each row, in the rows' order: usually 0 to 1, but the model does not bound it.

        The source is what was asked, the hypothesis the answer, the reference the gold answer; all are normalised.
        References are left out for a model that doesn't use them. An empty hypothesis is scored like any other text.
        Raises ``StoneyError`` for lists that don't fit together, and for missing references that the model requires.
        """
        texts = self._checked(sources, hypotheses, references)
        from tqdm import tqdm

        scores: list[float] = []
        with tqdm(
            total=len(sources), desc="COMET", unit="row", leave=False, disable=len(sources) <= REQUEST_ROWS
        ) as bar:
            for start in range(0, len(sources), REQUEST_ROWS):
                part = {name: column and column[start : start + REQUEST_ROWS] for name, column in texts.items()}
                scores += self._request(part)
                bar.update(len(part["sources"]))
        return scores

    def _checked(
        self, sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[str] | None
    ) -> dict[str, list[str] | None]:
        if references is None and self.references == "required":
            raise StoneyError(f"COMET {self.model}: scores against references, and got none; pass them")
        if self.references == "unused":
            references = None
        check_texts("sources", sources)
        check_texts("hypotheses", hypotheses)
        if references is not None:
            check_pairs(hypotheses, references)
        if len(sources) != len(hypotheses):
            raise StoneyError(
                f"{len(sources)} sources but {len(hypotheses)} hypotheses: expected one source for each, in the same order"
            )
        columns = {"sources": sources, "hypotheses": hypotheses, "references": references}
        return {name: column and [normalize(text) for text in column] for name, column in columns.items()}

    def _request(self, texts: dict[str, list[str] | None]) -> list[float]:
        self._requests += 1
        request = {"id": self._requests, **texts, "batch": self.batch_size}
        answer = self._exchange(request, self.timeout)
        if answer.get("id") != request["id"]:
            raise self._failure(f"answered request {answer.get('id')!r} where it was sent {request['id']}")
        if "error" in answer:
            raise StoneyError(f"COMET {self.model}: {answer['error']}")
        scores, rows = answer.get("scores"), len(texts["sources"])
        if not isinstance(scores, list) or len(scores) != rows:
            raise self._failure(f"gave something else than {rows} scores for {rows} rows")
        bad = [row for row, score in enumerate(scores) if not isinstance(score, float) or not math.isfinite(score)]
        if bad:
            raise self._failure(f"gave {scores[bad[0]]!r} as a score, for {texts['hypotheses'][bad[0]][:40]!r}")
        return scores

    def _meet(self, hello: dict) -> None:
        """Take the worker's introduction; refuse one that can't load the model, or another version of either side."""
        if hello.get("protocol") != PROTOCOL:
            raise self._failure(
                f"speaks protocol {hello.get('protocol')!r}, not {PROTOCOL}; use the one beside this client"
            )
        if "error" in hello:
            raise StoneyError(f"COMET {self.model}: {hello['error']}")
        if hello.get("comet") != COMET_VERSION:
            raise self._failure(
                f"has unbabel-comet {hello.get('comet')}, whose scores may differ; {COMET_VERSION} comes with: make comet"
            )
        if hello.get("references") not in USES or not isinstance(hello.get("sha256"), str):
            raise self._failure("did not say how it uses references, or which weights it has")
        self.references = hello["references"]
        self.signature = (
            f"COMET|version:{COMET_VERSION}|model:{self.model}|sha256:{hello['sha256'][:16]}|refs:{self.references}|"
            f"{NORM_SIGNATURE}"
        )

    def _exchange(self, request: dict | None, seconds: float) -> dict:
        """Send ``request``, if there is one, and read a line; end a worker that takes longer than ``seconds``."""
        process = self._process
        if process is None:
            raise StoneyError(
                f"COMET {self.model}: the worker has ended; start it in a new `with CometScorer(...)` block"
            )
        late = threading.Event()

        def stop() -> None:
            late.set()
            _kill(process)  # which ends a write or a read that waits for it

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            if request is not None:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if late.is_set():
            longer = "a longer start_timeout" if request is None else "a longer timeout or a smaller batch_size"
            raise self._failure(f"gave no answer for {seconds:g} s; set {longer}")
        if not line.endswith("\n"):
            raise self._failure(self._cause_of_death())
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._failure(f"wrote {line[:60]!r} where a JSON object was expected")
        return answer

    def _cause_of_death(self) -> str:
        try:
            code = self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its output"
        if code < 0:
            name = signal.Signals(-code).name
            return f"was killed ({name})" + ("; was there memory enough?" if name == "SIGKILL" else "")
        self._log.seek(0)
        said = self._log.read().decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "")
        return f"ended with exit code {code}" + (f": {last[:200]}" if last else "")

    def _failure(self, what: str) -> StoneyError:
        self._end()
        return StoneyError(f"COMET {self.model}: the worker {what}")

    def _end(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        _kill(process)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):  # what could not be sent is still in its buffer
                pipe.close()
        self._log.close()


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def find_checkpoint(model: str) -> str:
    """The absolute path of a local COMET checkpoint's .ckpt file, or ``model`` itself if it is a hub id.

    Raises ``StoneyError`` for a path that does not exist and for a checkpoint that lacks a file.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "checkpoints" / "model.ckpt"
        if not path.is_file():
            raise StoneyError(f"COMET {model}: not a COMET checkpoint, no checkpoints/model.ckpt in it")
    elif not path.exists():
        if _HUB_ID.fullmatch(model) and not path.parent.is_dir():
            return model
        raise StoneyError(
            f"COMET {model}: no such file or folder; expected a .ckpt file, a folder that holds checkpoints/model.ckpt, or "
            "a hub id such as Unbabel/wmt22-comet-da"
        )
    path = path.resolve()
    hparams = path.parent.parent / "hparams.yaml"
    if not hparams.is_file():
        raise StoneyError(f"COMET {model}: no {hparams}, which says what kind of model it is; copy it there")
    return str(path)
