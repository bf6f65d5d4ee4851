"""W&B artifacts as the inputs of a stage: what each type is, which flag it fills, and how it gets here whole.

Every stage logs its output directory as an artifact of that directory's name and of one of ``TYPES``. With
``--wandb_artifact NAME`` a later stage, here or on another machine, starts from it: 'name' (its newest version),
'name:v3', 'name:best' (any alias), 'project/name:alias' or 'entity/project/name:alias'. It is downloaded once to
``artifacts/<entity>/<project>/<name>-v<version>/``, where ``artifact.json`` says what it is; ``checkpoints.tracked`` reads
that, so the lineage goes on. A version that is there already is not asked for again, and can be used offline.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from stoney_rl import checkpoints, distributed, tracking
from stoney_rl.errors import StoneyError

if TYPE_CHECKING:
    import wandb

# What each type of artifact holds, and the stage that logs it.
TYPES = {
    "dataset": "a prepared dataset directory, from inspect_hf_dataset.py --output_dir",
    "inspection": "a report on a dataset, from inspect_hf_dataset.py",
    "base": "a base model, from prepare_base_model.py",
    "adapter": "a LoRA adapter, from train_lora.py or train_grpo.py",
    "model": "a merged model, from train_lora.py or train_grpo.py",
    "reward_model": "a reward model, from train_reward_model.py",
    "evaluation": "results, from evaluate_model.py",
    "analysis": "results, from analyze_with_tlens.py",
    "comparison": "results, from compare_reasoning.py",
    "sample": "a few bytes, from wandb_sample.py",
}
# What a flag takes: a model to train on, any model that answers, rows, a reward.
WHOLE_MODELS = ("model", "base")
ANY_MODEL = (*WHOLE_MODELS, "adapter")
ROWS = ("dataset",)
REWARD_MODELS = ("reward_model",)

FOLDER = Path("artifacts")
# Seconds: for one answer of the server, and for a download in which nothing comes any more.
API_SECONDS = 20
STALL_SECONDS = 60.0
_DOWNLOAD = (
    "import sys, wandb; url, name, root = sys.argv[1:]; "
    f"wandb.Api({{'base_url': url}}, timeout={API_SECONDS}).artifact(name).download(root=root, skip_cache=True)"
)
_REFERENCE = re.compile(r"(?:(?:([\w.-]+)/)?([\w.-]+)/)?([\w.-]+)(?::([^/:]+))?")


@dataclass(frozen=True)
class Reference:
    """``entity`` and ``project`` are None where the name leaves them out; ``alias`` is 'latest' then."""

    entity: str | None
    project: str | None
    name: str
    alias: str

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """Raises ``StoneyError`` for a text that names no artifact."""
        match = _REFERENCE.fullmatch(text)
        if match is None:
            raise StoneyError(
                f"--wandb_artifact {text}: expected name, name:alias, name:v3 or entity/project/name:alias"
            )
        return cls(match[1], match[2], match[3], match[4] or "latest")

    @property
    def is_version(self) -> bool:
        return re.fullmatch(r"v\d+", self.alias) is not None


def take(args: argparse.Namespace, inputs: Mapping[str, Sequence[str]], defaults: Mapping[str, object]) -> None:
    """Download ``args.wandb_artifact`` and put each directory into the flag of ``inputs`` that takes its type.

    ``inputs``: the types that each flag takes, by its name; ``defaults``: the flags' defaults. Raises ``StoneyError``
    for an artifact that can't be had or is of a type that the stage can't use, and for a flag that would be set twice.
    """
    filled: dict[str, str] = {}
    for name in args.wandb_artifact or []:
        directory, kind = fetch(
            name, inputs, mode=args.wandb_mode, entity=args.wandb_entity, project=args.wandb_project
        )
        flag = next(flag for flag, types in inputs.items() if kind in types)
        if flag in filled:
            raise StoneyError(f"--wandb_artifact {name}: --{flag} is {filled[flag]} already; give one of them")
        if getattr(args, flag) != defaults.get(flag):
            raise StoneyError(f"--wandb_artifact {name}: would set --{flag}, which was given too; leave one out")
        filled[flag] = name
        setattr(args, flag, str(directory))


def fetch(
    text: str,
    inputs: Mapping[str, Sequence[str]],
    *,
    mode: str | None = None,
    entity: str | None = None,
    project: str | None = None,
) -> tuple[Path, str]:
    """The directory of an artifact, downloaded if it is not here yet, and its type.

    Raises ``StoneyError``, with nothing left behind, for a name that is none, for a type that no flag of ``inputs``
    takes, for no key, a server that is down or slow or refuses, a version that does not exist, and files that do not
    arrive as they were logged. Processes that want the same one wait for each other.
    """
    from filelock import FileLock

    wanted = Reference.parse(text)
    server = tracking.find_server(entity, project)
    here = _downloaded(wanted, server)
    offline = tracking.decide_mode(mode, os.environ, server.settings_mode, "?")[0] == "offline"
    if here and (offline or wanted.is_version):
        directory, record = here
        _check_type(text, record["type"], inputs)
        say(
            f"{text}: {directory}, downloaded {record['downloaded'][:10]}"
            + (" (offline: not asked again)" if offline else "")
        )
        return directory, record["type"]
    if offline:
        raise StoneyError(
            f"--wandb_artifact {text}: offline, and not downloaded before; run once with --wandb_mode online, or give "
            "the directory itself by its flag"
        )
    artifact = _find(text, wanted, server)
    _check_type(text, artifact.type, inputs)
    final = _place(artifact)
    final.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(final.parent / f".{final.name}.lock"):
        if not final.exists():
            say(f"{text}: downloading {_full_name(artifact)}, {artifact.size / 2**20:,.1f} MiB")
            _download(text, artifact, server.base_url, final)
    say(f"{text}: {final}")
    return final, artifact.type


def say(line: str) -> None:
    if distributed.is_main():
        print(line, flush=True)


def _check_type(text: str, kind: str, inputs: Mapping[str, Sequence[str]]) -> None:
    if not any(kind in types for types in inputs.values()):
        takes = ", ".join(f"{' or '.join(types)} (--{flag})" for flag, types in inputs.items())
        raise StoneyError(f"--wandb_artifact {text}: is of type {kind}; this stage takes {takes}")


def _downloaded(wanted: Reference, server: tracking.Server) -> tuple[Path, dict] | None:
    """The newest downloaded directory that ``wanted`` means or, when it was downloaded, meant, and its record."""
    owner, project = wanted.entity or server.entity or "*", wanted.project or server.project
    found = []
    for path in FOLDER.glob(f"{owner}/{project}/*/{checkpoints.ARTIFACT_FILE}"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["name"] == wanted.name and wanted.alias in (record["version"], *record["aliases"]):
            found.append((record["downloaded"], path.parent, record))
    return max(found, key=lambda each: each[0])[1:] if found else None


def _find(text: str, wanted: Reference, server: tracking.Server) -> "wandb.Artifact":
    import requests
    import wandb

    if not server.key_place:
        raise StoneyError(f"--wandb_artifact {text}: {tracking.NO_KEY}")
    state, detail = tracking.knock(server.base_url, server.key) if server.key else ("unclear", "")
    if state in ("down", "refused"):
        raise StoneyError(f"--wandb_artifact {text}: {detail}; try again later, or give a directory by its flag")
    owner = wanted.entity or server.entity or detail
    place = f"{owner}/{wanted.project or server.project}"
    try:
        api = wandb.Api({"base_url": server.base_url}, api_key=server.key or None, timeout=API_SECONDS)
        return api.artifact(f"{place}/{wanted.name}:{wanted.alias}")
    except (wandb.errors.Error, requests.RequestException, ValueError, TypeError) as error:
        raise StoneyError(
            f"--wandb_artifact {text}: {place} does not give it ({_one_line(error)}); check name and alias, or write "
            "entity/project/name:alias"
        ) from error


def _place(artifact: "wandb.Artifact") -> Path:
    """The directory for an artifact's version; the parts of its name are cleaned, as they come from a server."""
    parts = [artifact.entity, artifact.project, f"{_name(artifact)}-{artifact.version}"]
    return FOLDER.joinpath(*(re.sub(r"[^\w.-]+", "-", part).lstrip(".") or "_" for part in parts))


def _download(text: str, artifact: "wandb.Artifact", base_url: str, final: Path) -> None:
    with checkpoints.staged(final) as work:
        try:
            _receive(_full_name(artifact), base_url, work)
            artifact.verify(root=str(work))
        except (ConnectionError, ValueError) as error:
            raise StoneyError(
                f"--wandb_artifact {text}: did not arrive whole ({_one_line(error)}); try again"
            ) from error
        record = {
            "artifact": _full_name(artifact),
            "name": _name(artifact),
            "version": artifact.version,
            "type": artifact.type,
            "aliases": list(artifact.aliases),
            "digest": artifact.digest,
            "downloaded": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        checkpoints.write_json(work / checkpoints.ARTIFACT_FILE, record)


def _receive(name: str, base_url: str, work: Path) -> None:
    """Download in a process of its own: the client repeats what a server refuses for half an hour, in threads that can't
    be ended. Raises ``ConnectionError`` if that fails, or if no byte comes for ``STALL_SECONDS``."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-c", _DOWNLOAD, base_url, name, str(work)], stdout=subprocess.DEVNULL, stderr=said
        )
        try:
            size, changed = 0, time.monotonic()
            while process.poll() is None:
                time.sleep(0.2)
                now = sum(path.stat().st_size for path in list(work.rglob("*")) if path.is_file())
                size, changed = (now, time.monotonic()) if now != size else (size, changed)
                if time.monotonic() - changed > STALL_SECONDS:
                    raise ConnectionError(f"nothing came for {STALL_SECONDS:.0f} s after {size / 2**20:,.1f} MiB")
        except OSError as error:
            raise ConnectionError(_one_line(error)) from error
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
            raise ConnectionError(lines[-1] if lines else f"the download ended with code {process.returncode}")


def _name(artifact: "wandb.Artifact") -> str:
    return artifact.name.partition(":")[0]


def _full_name(artifact: "wandb.Artifact") -> str:
    """With its version: what an alias means changes."""
    return f"{artifact.entity}/{artifact.project}/{_name(artifact)}:{artifact.version}"


def _one_line(error: BaseException) -> str:
    return tracking.redact(" ".join(str(error).split())[:200] or type(error).__name__)
