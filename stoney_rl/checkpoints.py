"""The checkpoint directory: complete in itself, written whole or not at all, and traceable to its parent.

A directory with its final name is whole: it is written beside it under a temporary name and renamed. ``stage.json``
says how it was made; ``fingerprint`` says which function the weights compute.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from stoney_rl.errors import StoneyError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


STAGE_FILE = "stage.json"
ARTIFACT_FILE = "artifact.json"  # of a directory that was downloaded: which artifact it is
# Two fp32 computations of the same function differ by rounding alone: merged and adapter logits stay within this.
LOGIT_TOLERANCE = 1e-5
_PROBE_SHAPE = (4, 16)
_SAMPLE_SIZE = 256
_VERSIONED = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "sacrebleu", "wandb")


@contextlib.contextmanager
def staged(final: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside ``final``; on success it becomes ``final``, on any failure it disappears.

    Raises ``StoneyError`` if ``final`` exists and ``overwrite`` is false. A kill leaves at most a hidden
    ``.<name>.tmp-<pid>``, which the next call removes.
    """
    final = Path(final)
    if final.exists() and not overwrite:
        raise StoneyError(f"{final} exists already: choose another directory or pass --overwrite")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        for stale in final.parent.glob(f".{final.name}.tmp-*"):
            if not _is_running(stale.name.rsplit("-", 1)[1]):
                shutil.rmtree(stale)
        work = final.parent / f".{final.name}.tmp-{os.getpid()}"
        work.mkdir()
    except OSError as error:
        raise StoneyError(f"{final}: cannot write there ({error.strerror}); choose another directory") from error
    try:
        yield work
        if final.exists() and not overwrite:
            raise StoneyError(f"{final} was written by another process meanwhile; choose another directory")
        publish(work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_running(pid: str) -> bool:
    """Whether the process with that number is alive and is not this one."""
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def publish(work: Path, final: Path) -> None:
    """Give the finished directory ``work`` its final name, in place of an older directory if there is one."""
    replaced = final.parent / f".{final.name}.tmp-old"
    if replaced.exists():  # left by a kill in the last line
        shutil.rmtree(replaced)
    if final.exists():
        os.rename(final, replaced)
    os.rename(work, final)
    shutil.rmtree(replaced, ignore_errors=True)


def write_json(path: Path, content: object) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, with the same promise."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def describe_stage(stage: str, *, arguments: dict, seed: int | None = None, **fields: object) -> dict:
    """The content of ``stage.json``: what was run, with what, on what. ``fields``: parent, base_model, data, ..."""
    return {
        "stage": stage,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "arguments": arguments,
        "seed": seed,
        "versions": versions(),
        "git_commit": git_commit(),
        **fields,
    }


def weights_id(name: str) -> str | None:
    """Tells the weights in directory ``name`` from others of that name: None for a hub id, whose revision does.

    The recorded fingerprint; without one a SHA-256 of each weight file's size, first and last MiB.
    """
    directory = Path(name)
    if not directory.is_dir():
        return None
    recorded = (read_stage(directory) or {}).get("fingerprint")
    if recorded:
        return recorded["sha256"]
    digest = hashlib.sha256()
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")]):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{path.name} {size}".encode())
            for start in {0, max(0, size - 2**20)}:
                file.seek(start)
                digest.update(file.read(2**20))
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of Python and the libraries that a result depends on."""
    return {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in _VERSIONED}


def git_commit() -> str | None:
    """Of this code; None where it is not under git."""
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def read_stage(directory: Path) -> dict | None:
    """The directory's ``stage.json``, or None for a checkpoint that this pipeline did not make.

    Raises ``StoneyError`` if the file is there but is not a JSON object.
    """
    path = Path(directory) / STAGE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoneyError(f"{path}: not readable as JSON ({error}); make the checkpoint again") from error
    if not isinstance(content, dict):
        raise StoneyError(
            f"{path}: expected a JSON object, found a {type(content).__name__}; make the checkpoint again"
        )
    return content


def tracked(name: str) -> dict:
    """The W&B run that made the directory ``name``, for a later stage; {} for what was not made under tracking.

    The 'wandb' entry of its record (run_id, group, url, project, entity), and 'artifact', the reference under which
    ``Tracker.use_artifact`` finds it: of a downloaded artifact its full name, else '<project>/<directory>:<run id>'.
    """
    directory = Path(name)
    if not directory.is_dir():
        return {}
    run = (read_stage(directory) or {}).get("wandb") or {}
    if (directory / ARTIFACT_FILE).exists():
        return run | {"artifact": json.loads((directory / ARTIFACT_FILE).read_text(encoding="utf-8"))["artifact"]}
    if not run.get("run_id"):
        return run
    project = f"{run['project']}/" if run.get("project") else ""
    return run | {"artifact": f"{project}{directory.name}:{run['run_id']}"}


def locate(name: str, beside: Path) -> str:
    """A model or data name recorded in the directory ``beside``, as it can be opened from here.

    Names are recorded as the user gave them, relative to where the stage was started; from another working directory
    they are looked for below the folders above ``beside``. Names that are found nowhere (hub ids) come back unchanged.
    """
    places = [Path(), *Path(beside).resolve().parents]
    return next((str(place / name) for place in places if (place / name).exists()), name)


def lineage(directory: Path) -> list[str]:
    """One line for each ancestor that still exists, youngest first: stage, path, data, fingerprint, page of its run."""
    lines: list[str] = []
    seen: set[Path] = set()
    current: Path | None = Path(directory)
    while current is not None and current.resolve() not in seen:
        seen.add(current.resolve())
        stage = read_stage(current) if current.is_dir() else None
        if stage is None:
            lines.append(f"{current} (not made by this pipeline)" if current.is_dir() else str(current))
            break
        parts = [f"{current}: {stage['stage']}"]
        if stage.get("data"):
            parts.append(f"data {stage['data']['source']} ({stage['data']['sha256'][:8]})")
        if stage.get("fingerprint"):
            parts.append(f"logits {stage['fingerprint']['sha256'][:8]}")
        if (stage.get("wandb") or {}).get("url"):
            parts.append(f"run {stage['wandb']['url']}")
        lines.append(", ".join(parts))
        parent = (stage.get("parent") or {}).get("path")
        current = Path(locate(parent, current)) if parent else None
    return lines


def probe_input_ids(vocab_size: int) -> "torch.Tensor":
    """The fixed probe batch, int64 [4, 16]: token ids spread over the vocabulary, the same for every tokenizer."""
    import torch

    rows, columns = _PROBE_SHAPE
    index = torch.arange(rows * columns, dtype=torch.int64)
    return (index * 7919 + 13).remainder(vocab_size).view(rows, columns)  # 7919 is prime: no short cycles


def probe_logits(model: "PreTrainedModel") -> "torch.Tensor":
    """Logits of ``model`` on the probe batch, float32 on the CPU, [4, 16, vocabulary]. Leaves the model as it was."""
    import torch

    was_training = model.training
    model.eval()
    ids = probe_input_ids(model.config.get_text_config().vocab_size).to(model.device)
    try:
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float().cpu()
    finally:
        model.train(was_training)


def fingerprint(model: "PreTrainedModel") -> dict:
    """What the weights compute: a hash of the probe logits, and 256 of them for a comparison with a tolerance.

    ``sha256`` is bit-exact, so it identifies weights on one machine and library version; ``sample`` (float32 values at
    fixed positions) compares them anywhere.
    """
    logits = probe_logits(model)
    flat = logits.flatten()
    step = max(1, flat.numel() // _SAMPLE_SIZE)
    return {
        "sha256": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "sample": flat[::step][:_SAMPLE_SIZE].tolist(),
    }


def logit_difference(a: dict, b: dict) -> float:
    """Largest absolute difference of two fingerprints' sampled logits; infinite if their vocabularies differ."""
    if len(a["sample"]) != len(b["sample"]):
        return float("inf")
    return max(abs(x - y) for x, y in zip(a["sample"], b["sample"], strict=True))


def check_fingerprint(directory: Path, model: "PreTrainedModel") -> dict:
    """Prove that ``model`` computes what ``directory``'s ``stage.json`` recorded; return the fresh fingerprint.

    Compared only in the dtype it was recorded in. Raises ``StoneyError`` on a difference above rounding: the weights
    were changed, or an adapter was put on the wrong base.
    """
    fresh = fingerprint(model)
    recorded = (read_stage(directory) or {}).get("fingerprint")
    if recorded and recorded["dtype"] == fresh["dtype"] == "float32":
        scale = max(1.0, max(abs(value) for value in recorded["sample"]))
        difference = logit_difference(recorded, fresh)
        # A hundred times the rounding of one machine: other BLAS libraries sum in another order.
        if difference > 100 * LOGIT_TOLERANCE * scale:
            raise StoneyError(
                f"{directory}: its logits differ by {difference:.2g} from those recorded when it was saved; "
                "its weights or its base model were changed: make the checkpoint again"
            )
    return fresh
