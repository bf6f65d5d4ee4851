"""Weights & Biases in every stage, and never in its way.

``start`` decides the mode (as told; otherwise online if a key is found, else offline), says so in one line, and gives
a ``Tracker``. Whatever W&B does afterwards (down, slow, refusing, disk full), no method of the tracker raises: the
first failure of a kind is printed once, all are counted in ``tracker.failures``, and the work goes on. An online run
that loses its server keeps its data in ``tracker.directory``, as an offline run does; ``offline.sync`` uploads it later.

Nothing that looks like a secret reaches W&B: see ``redact``. Code, git state, console output and the environment are
not recorded. Files of an artifact are uploaded from where they lie, so they must stay there until they are synced.

    tracker = tracking.start("sft", vars(args), mode=args.wandb_mode, name="stoney_lora_ckpt")
    trainer = Trainer(..., callbacks=[tracker.callback()])   # with report_to="none"
    reference = tracker.artifact("stoney_lora_merged", "model", "stoney_lora_merged")
    tracker.finish()
"""

import atexit
import collections
import contextlib
import datetime
import fnmatch
import json
import os
import queue
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from stoney_rl import checkpoints, distributed, offline
from stoney_rl.errors import StoneyError

if TYPE_CHECKING:
    import argparse

DEFAULT_PROJECT = "stoney-rl"
REDACTED = "[redacted]"
NO_KEY = "no key found: run `wandb login` or set WANDB_API_KEY"
STEP_KEY = "train/global_step"
# Artifacts that no later stage starts from. Their type becomes part of their name, as they are often named after a model.
REPORT_TYPES = ("inspection", "evaluation", "analysis", "comparison")
# What every stage's config holds under the same names, None where a stage has no such thing (see ``start_stage``).
COMMON_CONFIG = (
    "stage", "model", "dataset", "dataset_revision", "data_sha256", "split_seed", "test_fraction", "validation_fraction",
    "seed", "git_commit", "versions", "world_size", "parent_runs", "used_artifacts",
)  # fmt: skip

# Seconds. A server that does not answer a one-line query in KNOCK is not one to wait for; START bounds the whole of an
# online start; a call that asks the server (a table, an artifact's name) holds training up for CALL at the most.
KNOCK_SECONDS = 10.0
START_SECONDS = 20.0
CALL_SECONDS = 20.0
# How long finish() waits for a server that has stopped answering, and for uploads to one that does answer.
LOST_SECONDS = 60.0
FINISH_SECONDS = 3600.0
# How long the server may take to show that a run has ended.
SHOWN_SECONDS = 30.0
# A kill loses what was logged in the last so many seconds: wandb's own default, 15, may reach back before a checkpoint.
FLUSH_SECONDS = 0.1

_active: list["Tracker"] = []
_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
_NEVER_UPLOADED = (".env", ".env.*", ".netrc", "_netrc", "*.pem", "id_rsa*", "id_ed25519*", ".git", "__pycache__")
_WANDB_THREADS = ("wandb-", "NetStatThr")
_WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com", "forge.coreweave.com")


# Secrets


def redact(value: Any, environ: Mapping[str, str] | None = None) -> Any:
    """A JSON-able copy of ``value`` without its secrets.

    A dict entry is replaced by '[redacted]' when its name looks like a secret's (``is_secret_name``) and it holds
    text; any text loses the values of the environment's secrets and whatever has the shape of a key or of a password
    in a URL. Paths and unknown objects become text, tuples and sets become lists.
    """
    return _redact(value, secret_values(environ))


def _redact(value: Any, known: Sequence[str]) -> Any:
    if isinstance(value, str):
        return _scrub(value, known)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {
            _scrub(str(name), known): REDACTED if is_secret_name(str(name), item) else _redact(item, known)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [_redact(item, known) for item in value]
    if type(value).__module__.split(".")[0] in ("numpy", "torch"):
        return _redact(value.tolist(), known)
    if hasattr(value, "__dict__") and type(value).__name__ == "Namespace":
        return _redact(vars(value), known)
    return _scrub(str(value), known)


_SECRET_WORDS = ("secret", "secrets", "password", "passwords", "passwd", "passphrase", "credential", "credentials")
_SPECIAL_TOKENS = {"pad", "eos", "bos", "unk", "sep", "cls", "mask", "stop", "image", "special", "added", "additional"}
_COUNTED_TOKENS = {"max", "min", "num", "n", "total", "new", "per", "prompt", "completion"}


def is_secret_name(name: str, value: Any = "text") -> bool:
    """Whether an entry called ``name`` that holds ``value`` is to be kept from W&B.

    Names are taken apart at underscores, dashes, dots and capitals. 'secret', 'password' and the like always count;
    'key' and 'token' only when the value holds text, and not for what a language model calls a token
    (``eos_token``, ``pad_token_id``, ``max_new_tokens``). When in doubt it is a secret.
    """
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    if value is None or isinstance(value, bool):
        return False
    if any(word.endswith(_SECRET_WORDS) for word in words):
        return True
    if not _holds_text(value):
        return False
    if any(word.endswith(("key", "keys")) for word in words):
        return True
    tokens = [word for word in words if word.endswith(("token", "tokens"))]
    if not tokens or words[-1] in ("id", "ids") or _SPECIAL_TOKENS & set(words):
        return False
    return not (tokens == ["tokens"] and _COUNTED_TOKENS & set(words))


def _holds_text(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_text(item) for item in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return any(_holds_text(item) for item in value)
    return not isinstance(value, bool | int | float) and value is not None


def secret_values(environ: Mapping[str, str] | None = None) -> list[str]:
    """The secrets this process knows: values of environment variables with a secret's name, and netrc passwords."""
    environ = os.environ if environ is None else environ
    found = {value for name, value in environ.items() if len(value) >= 8 and is_secret_name(name)}
    found |= {password for _, password in _netrc_entries(environ) if len(password) >= 8}
    return sorted(found, key=len, reverse=True)


_KEY_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|wandb_v\d+_[A-Za-z0-9_]{20,}|local-[0-9a-f]{40}|sk-[A-Za-z0-9_-]{20,}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16})\b|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


def _scrub(text: str, known: Sequence[str]) -> str:
    for secret in known:
        text = text.replace(secret, REDACTED)
    return _KEY_SHAPES.sub(REDACTED, text)


# Environment, key, mode


def load_env(directory: str | Path | None = None) -> list[str]:
    """Put what ``.env`` in the working directory sets into the environment; what is set there already wins.

    Empty values count as not set. Returns the names whose value is the file's, also on a second call. Raises StoneyError when the file
    cannot be read.
    """
    path = Path(directory or ".") / ".env"
    if not path.is_file():
        return []
    from dotenv import dotenv_values

    try:
        values = dotenv_values(path, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StoneyError(f"{path}: cannot be read ({error}); expected NAME=value lines as in .env.example") from None
    taken = [name for name, value in values.items() if value and os.environ.get(name) in (None, "", value)]
    os.environ.update({name: values[name] for name in taken})
    return taken


def _netrc_path(environ: Mapping[str, str]) -> Path:
    if environ.get("NETRC"):
        return Path(environ["NETRC"]).expanduser()
    home = Path(environ.get("HOME") or Path.home())
    return home / "_netrc" if not (home / ".netrc").exists() and (home / "_netrc").exists() else home / ".netrc"


def _netrc_entries(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    import netrc

    try:
        return [(host, entry[2]) for host, entry in netrc.netrc(_netrc_path(environ)).hosts.items() if entry[2]]
    except (OSError, netrc.NetrcParseError, RuntimeError):
        return []


def find_key(base_url: str, from_env_file: Sequence[str] = (), settings_key: str | None = None) -> tuple[str, str]:
    """Where a W&B key was found, and the key: ('', '') if there is none. Looks where wandb itself looks."""
    if os.environ.get("WANDB_API_KEY"):
        place = "WANDB_API_KEY in .env" if "WANDB_API_KEY" in from_env_file else "WANDB_API_KEY"
        return place, os.environ["WANDB_API_KEY"].strip()
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "WANDB_IDENTITY_TOKEN_FILE", ""
    host = urlsplit(base_url).netloc
    hosts = _WANDB_HOSTS if host in _WANDB_HOSTS else (host,)
    for machine, password in _netrc_entries(os.environ):
        if machine in hosts:
            return str(_netrc_path(os.environ)), password
    return ("wandb's settings", settings_key) if settings_key else ("", "")


def decide_mode(told: str | None, environ: Mapping[str, str], settings_mode: str | None, key_place: str) -> list[str]:
    """[mode, why], from the flag, WANDB_MODE, wandb's settings and whether a key was found, in this order.

    Raises StoneyError for a WANDB_MODE that is no mode.
    """
    mode, by = told, "as told"
    if told is not None and told not in ("online", "offline", "disabled"):
        raise StoneyError(f"tracking mode {told!r}: expected online, offline or disabled")
    if mode is None and environ.get("WANDB_MODE"):
        mode, by = _MODES.get(environ["WANDB_MODE"].strip().lower()), f"WANDB_MODE={environ['WANDB_MODE']}"
        if mode is None:
            raise StoneyError(f"{by}: expected online, offline or disabled; correct it in the environment or in .env")
    if mode is None and environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        mode, by = "disabled", "WANDB_DISABLED is set"
    if mode is None and _MODES.get(settings_mode or "") in ("offline", "disabled"):
        mode, by = _MODES[settings_mode], "wandb's settings say so"
    if mode not in (None, "online"):
        return [mode, by]
    if not key_place:
        return ["offline", f"{by}: online, but {NO_KEY}" if mode else NO_KEY]
    return ["online", f"key from {key_place}"]


def run_group(group: str | None = None) -> str:
    """The pipeline's W&B group: as given, else WANDB_RUN_GROUP, else the sweep's, else a new 'pipeline-<utc>-<4 hex>'."""
    if group or os.environ.get("WANDB_RUN_GROUP"):
        return group or os.environ["WANDB_RUN_GROUP"]
    if os.environ.get("WANDB_SWEEP_ID"):
        return f"sweep-{os.environ['WANDB_SWEEP_ID']}"
    now = datetime.datetime.now(datetime.UTC)
    return f"pipeline-{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"


# The server


def knock(base_url: str, key: str, timeout: float = KNOCK_SECONDS) -> tuple[str, str]:
    """Ask a W&B server who the key belongs to: (state, detail), within ``timeout`` seconds.

    States: 'ok' (detail: the account's default entity), 'refused' (it does not take the key), 'down' (no answer, too
    slow, or a server error), 'unclear' (such as a certificate that Python does not know; wandb itself may get by).
    """
    answer: list[tuple[str, str]] = []
    thread = threading.Thread(target=lambda: answer.append(_knock(base_url, key, timeout)), daemon=True)
    thread.start()
    thread.join(timeout)  # a name server that hangs is not bounded by the request's own timeout
    return answer[0] if answer else ("down", f"{base_url} did not answer in {timeout:.0f} s")


def _knock(base_url: str, key: str, timeout: float) -> tuple[str, str]:
    import requests

    url = base_url.rstrip("/") + "/graphql"
    try:
        reply = requests.post(
            url, json={"query": "query Viewer { viewer { id entity } }"}, auth=("api", key), timeout=timeout
        )
    except requests.exceptions.SSLError as error:
        return "unclear", f"{base_url}: {type(error).__name__}"
    except requests.Timeout:
        return "down", f"{base_url} did not answer in {timeout:.0f} s"
    except requests.ConnectionError:
        return "down", f"{base_url} cannot be reached"
    except (requests.RequestException, ValueError, UnicodeError) as error:
        return "unclear", f"{base_url}: {type(error).__name__}"
    if reply.status_code in (401, 403):
        return "refused", f"{base_url} refuses the key (HTTP {reply.status_code})"
    if reply.status_code != 200:
        hint = "; is WANDB_BASE_URL right?" if reply.status_code == 404 else ""
        return "down", f"{base_url} answers HTTP {reply.status_code}{hint}"
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        viewer = reply.json()["data"]["viewer"]
        return "ok", viewer.get("entity") or ""
    return "unclear", f"{base_url} does not say whose key it is"


@dataclass(frozen=True)
class Server:
    """The W&B server that this process would talk to, and as whom. ``key_place`` and ``key`` are '' without a key;
    ``settings_mode`` is what wandb's settings say of the mode."""

    base_url: str
    key_place: str
    key: str
    entity: str | None
    project: str
    settings_mode: str | None


def find_server(entity: str | None = None, project: str | None = None) -> Server:
    """As told, else by the environment and ``.env``, else by wandb's settings. Raises StoneyError for an unreadable .env."""
    from_file = load_env()
    import wandb

    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value]:
        del os.environ[name]  # wandb takes an empty WANDB_MODE for a mode
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    if not _active:
        os.environ.pop("WANDB_SERVICE", None)  # a parent process's own wandb service: it may end before we do
    settings = wandb.setup(wandb.Settings(silent=True)).settings
    place, key = find_key(settings.base_url, from_file, settings.api_key)
    return Server(
        settings.base_url,
        place,
        key,
        entity or os.environ.get("WANDB_ENTITY") or settings.entity,
        project or os.environ.get("WANDB_PROJECT") or settings.project or DEFAULT_PROJECT,
        settings.mode,
    )


# The tracker


def start(
    stage: str,
    config: Mapping[str, Any],
    *,
    mode: str | None = None,
    project: str | None = None,
    entity: str | None = None,
    group: str | None = None,
    name: str | None = None,
    directory: str | Path | None = None,
    resume_id: str | None = None,
    job_type: str | None = None,
    tags: Iterable[str] | None = None,
    timeout: float = START_SECONDS,
) -> "Tracker":
    """Begin a W&B run for ``stage`` and print one line: mode, why, and where to look or how to sync later.

    ``mode`` is 'online', 'offline', 'disabled' or None (decide). ``directory`` holds wandb's own files (default:
    WANDB_DIR, else the working directory). ``resume_id`` continues the run of that id. ``timeout`` (seconds) bounds
    the wait for the server. Only rank 0 of a distributed run tracks.

    Raises StoneyError for a WANDB_MODE that is no mode or an unreadable .env, before anything was started; nothing
    that W&B does makes it raise.
    """
    load_env()
    config = dict(redact(config)) | {"stage": stage}
    tracker = Tracker(mode="disabled", group=run_group(group), run_id=resume_id)
    if not distributed.is_main():
        tracker.reason = "only rank 0 tracks"
        return tracker
    told, tracker.reason = decide_mode(mode, os.environ, None, "?")
    if told == "disabled":
        print(f"tracking: W&B is disabled ({tracker.reason})", flush=True)
        return tracker
    try:
        import wandb

        root = offline.wandb_root(directory)
        # Where files wait for their upload: with the run, not in a home directory that may be small or read-only.
        os.environ.setdefault("WANDB_DATA_DIR", str(root / "wandb"))
        server = find_server(entity, project)
        tracker.base_url, tracker.key_place, tracker._key = server.base_url, server.key_place, server.key
        chosen, tracker.reason = decide_mode(mode, os.environ, server.settings_mode, server.key_place)
        if chosen == "disabled":
            print(f"tracking: W&B is disabled ({tracker.reason})", flush=True)
            return tracker
        _check_writable(root)
        tracker.entity, tracker.project = server.entity, server.project
        options = {
            "project": tracker.project,
            "entity": tracker.entity,
            "group": redact(tracker.group),
            "name": redact(name),
            "dir": str(root),
            "job_type": job_type or stage,
            "tags": redact(list(tags)) if tags is not None else None,
            "config": config,
            "id": resume_id,
            "resume": "allow" if resume_id else None,
            "reinit": "create_new",  # one tracker, one run, and no global wandb.run for others to write to
        }
        if chosen == "online":
            chosen = tracker._open_online(wandb, options, timeout)
            if chosen == "offline" and not _active:
                _end_service()  # it may still hold the run's id, and would retry
                wandb.setup(wandb.Settings(silent=True))
        if chosen == "offline":
            tracker._open(wandb, options, "offline", timeout)
    except StoneyError:
        raise
    except Exception as error:
        tracker.mode, tracker._run = "disabled", None
        tracker.failures["start"] += 1
        tracker.reason = _one_line(error)
        print(f"tracking: W&B is disabled, the run goes on without it ({tracker.reason})", flush=True)
        return tracker
    print(tracker._opening_line(), flush=True)
    _active.append(tracker)
    atexit.register(tracker._at_exit)
    return tracker


def start_stage(
    stage: str,
    args: "argparse.Namespace",
    *,
    name: str,
    model: str | None = None,
    data: Mapping[str, Any] | None = None,
    also: Iterable[str | None] = (),
    group: str | None = None,
    resume_id: str | None = None,
    timeout: float = START_SECONDS,
) -> "Tracker":
    """``start`` with a stage's arguments, its place in the pipeline and the config that all stages share.

    ``model`` is what the stage starts from, ``data`` the description of its rows (``Corpus.describe``), ``also`` the
    directories of other inputs. Inputs that were made under tracking are noted as used. The group is --wandb_group, else
    ``group`` (of the run that is resumed), else WANDB_RUN_GROUP, else that of the first input that has one. --wandb_name
    wins over ``name``.
    """
    data = data or {}
    made = [checkpoints.tracked(each) for each in (model, data.get("source"), *also) if each]
    inherited = next((run["group"] for run in made if run.get("group")), None)
    tracker = start(
        stage,
        vars(args) | _common_config(args, model, data) | {"parent_runs": [_address(run) for run in made if run]},
        mode=args.wandb_mode,
        project=args.wandb_project,
        entity=args.wandb_entity,
        group=args.wandb_group or group or os.environ.get("WANDB_RUN_GROUP") or inherited,
        name=args.wandb_name or name,
        resume_id=resume_id,
        timeout=timeout,
    )
    for run in made:
        tracker.use_artifact(run.get("artifact"))
    return tracker


def _common_config(args: "argparse.Namespace", model: str | None, data: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``COMMON_CONFIG`` that a stage knows before it starts."""
    return {
        "model": model,
        "dataset": data.get("source"),
        "dataset_revision": data.get("revision"),
        "data_sha256": data.get("sha256"),
        **dict.fromkeys(("split_seed", "test_fraction", "validation_fraction")),
        **(data.get("split") or {}),
        "seed": getattr(args, "seed", None),
        "git_commit": checkpoints.git_commit(),
        "versions": checkpoints.versions(),
        "world_size": distributed.world_size(),
        "used_artifacts": [],
    }


def _address(run: Mapping[str, Any]) -> str:
    """Where to find a run that ``checkpoints.tracked`` describes: its page, else its artifact or its id."""
    return run.get("url") or run.get("artifact") or run.get("run_id") or ""


class Tracker:
    """One W&B run, or none. No method raises because of W&B.

    ``mode`` 'online', 'offline' or 'disabled'; ``url`` the run's page (None unless online); ``run_id``; ``group``;
    ``directory`` the run's local files (None if disabled); ``reason`` why the mode is what it is; ``key_place`` where a
    key was found ('' if nowhere); ``failures`` a Counter: kind of call -> how often it failed.
    """

    def __init__(self, *, mode: str, group: str, run_id: str | None = None) -> None:
        self.mode = mode
        self.group = group
        self.run_id = run_id
        self.url: str | None = None
        self.directory: Path | None = None
        self.project: str | None = None
        self.entity: str | None = None
        self.base_url = ""
        self.reason = ""
        self.key_place = ""
        self.failures: collections.Counter[str] = collections.Counter()
        self._run: Any = None
        self._key = ""
        self._used: list[str] = []
        self._artifacts: list[Any] = []
        self._unlogged: list[dict] = []
        self._worker = _Worker()
        self._finish_limit = FINISH_SECONDS

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers (or short texts) by name; ``step`` is the optimizer step that the charts are drawn over.

        The step is a metric of its own (``train/global_step``): W&B drops what is logged for a step that has passed,
        which resuming and a late evaluation would both run into.
        """

        def send() -> None:
            row = {key: redact(value) if isinstance(value, str) else value for key, value in metrics.items()}
            self._run.log(row if step is None else row | {STEP_KEY: int(step)})

        self._guard("log", send)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the run's final values."""
        self._guard("summary", lambda: self._run.summary.update(redact(values)))

    def table(self, key: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Log a table; cells are numbers, texts or None, anything else becomes text."""

        def send() -> None:
            import wandb

            known = secret_values()
            data = [[_redact(cell, known) for cell in row] for row in rows]
            data = [[str(cell) if isinstance(cell, list | dict) else cell for cell in row] for row in data]
            self._run.log({key: wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)})

        self._in_turn("table", send)

    def image(self, key: str, path: str | Path) -> None:
        """Log a picture file."""

        def send() -> None:
            import wandb

            self._run.log({key: wandb.Image(str(path))})

        self._in_turn("image", send)

    def html(self, key: str, path: str | Path) -> None:
        """Log an HTML file."""

        def send() -> None:
            import wandb

            text = redact(Path(path).read_text(encoding="utf-8"))
            self._run.log({key: wandb.Html(text, inject=False)})

        self._in_turn("html", send)

    def artifact(
        self,
        name: str,
        type: str,
        path: str | Path,
        *,
        aliases: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
        exclude: Sequence[str] = (),
    ) -> str | None:
        """Upload a file or a directory as a new version of artifact ``name``; the upload goes on in the background.

        ``exclude`` are globs on paths relative to ``path`` ('checkpoint-*' leaves such a folder out); files that keep
        secrets (.env, .netrc, key files, small files that hold a known secret) are always left out. Files are not
        copied: they must not change until ``finish``, or until they are synced if offline.

        Returns the reference that ``use_artifact`` of a later stage takes ('name:<run id>', good once uploaded), or
        None if there is none.
        """
        if type in REPORT_TYPES and type not in name:
            name = f"{name}-{type}"  # such as analysis/grpo/: W&B refuses a name that another type has
        clean = re.sub(r"[^A-Za-z0-9_.-]+", "-", redact(name)).strip("-") or "artifact"

        def send() -> str:
            import wandb

            files = artifact_files(path, exclude)
            if not files:
                raise FileNotFoundError(f"{path}: no file to upload")
            artifact = wandb.Artifact(clean, type=type, metadata=redact(dict(metadata or {})))
            for relative, file in files:
                artifact.add_file(str(file), name=relative, policy="immutable", skip_cache=True)
            self._run.log_artifact(artifact, aliases=["latest", self.run_id, *aliases])
            self._artifacts.append(artifact)
            return reference

        reference = f"{clean}:{self.run_id}"
        if self.mode == "online":
            given = {"name": name, "type": type, "path": str(Path(path).absolute()), "aliases": list(aliases)}
            self._unlogged.append(given | {"metadata": redact(dict(metadata or {})), "exclude": list(exclude)})
            self._guard("local files", lambda: offline.mark(self.directory, "unlogged", json.dumps(self._unlogged)))
        return self._in_turn("artifact", send, pending=reference)

    def use_artifact(self, name: str | None) -> None:
        """Note that this run was made from an artifact ('name:alias', or 'entity/project/name:alias').

        Online it becomes a link in W&B's lineage graph; always it is listed in the config as ``used_artifacts``, which
        is what an offline run can keep, and of which ``offline.sync`` makes the link.
        """
        if not name or name in self._used:
            return
        self._used.append(name)
        self._guard(
            "lineage",
            lambda: self._run.config.update({"used_artifacts": redact(list(self._used))}, allow_val_change=True),
        )
        self._guard("local files", lambda: offline.mark(self.directory, "unlinked"))
        if self.mode == "online":
            self._in_turn("use_artifact", lambda: self._run.use_artifact(name))

    def finish(self, exit_code: int = 0) -> None:
        """End the run and wait for its uploads: as long as the server answers (an hour at most, or
        WANDB_FINISH_TIMEOUT seconds), a minute if it does not. What was not uploaded stays in ``directory``.

        ``exit_code`` 0 marks the run finished, anything else failed. A process that ends without calling this has
        failed.
        """
        if self._run is None:
            return
        run, artifacts = self._run, self._artifacts

        def end() -> None:
            if self.mode == "online":
                for artifact in artifacts:
                    self._attempt("artifact upload", artifact.wait)
            self._attempt("finish", lambda: run.finish(exit_code=exit_code))
            if self.mode == "online" and not self.failures["finish"]:
                self._attempt("upload", self._check_shown)

        done = self._worker.submit(end)
        began = alive = told = time.monotonic()
        try:
            while not done.wait(min(5.0, LOST_SECONDS)):
                now = time.monotonic()
                if self.mode == "online" and knock(self.base_url, self._key, 5.0)[0] != "down":
                    alive = now
                if now - alive > LOST_SECONDS or now - began > self._finish_limit:
                    self.failures["finish"] += 1
                    break
                if now - told > 30.0:
                    told = now
                    print(f"tracking: still uploading to W&B ({now - began:.0f} s)", flush=True)
        except KeyboardInterrupt:
            self._run = None
            _end_service()
            raise
        _active[:] = [tracker for tracker in _active if tracker is not self]
        if self.failures["finish"] and not _active:
            _end_service()
            done.wait(5.0)
        self._run = None
        # wandb's own process does not tell when it could not write.
        self._attempt("local files", lambda: _check_room(self.directory))
        if self.mode == "online":
            self._attempt("local files", self._mark_what_is_missing)
        if self.mode != "online":
            print(
                f"tracking: this run is kept in {_short(self.directory)}; upload it with: {self.sync_command}",
                flush=True,
            )
        elif any(self.failures[kind] for kind in ("finish", "artifact", "artifact upload", "upload", "use_artifact")):
            print(f"tracking: not all was uploaded; upload what is kept with: {self.sync_command}", flush=True)
        else:
            print(f"tracking: look at {self.url}", flush=True)

    def _mark_what_is_missing(self) -> None:
        """Leave the marks by which ``offline.sync`` knows what did not get to the server."""
        missing = {
            "unsynced": ("finish", "upload"),
            "unlogged": ("finish", "artifact", "artifact upload", "upload"),
            "unlinked": ("finish", "use_artifact"),
        }
        for name, kinds in missing.items():
            if not any(self.failures[kind] for kind in kinds):
                offline.unmark(self.directory, name)
            elif name == "unsynced":
                offline.mark(self.directory, name, offline.ENDED)

    def _check_shown(self) -> None:
        """Raise unless the server knows that the run has ended: wandb gives up on a server that turns it away in
        mid-run (a quota, a key that was withdrawn), and does not say so."""
        import wandb

        api = wandb.Api({"base_url": self.base_url}, api_key=self._key or None, timeout=10)
        deadline = time.monotonic() + SHOWN_SECONDS
        while api.run(f"{self.entity}/{self.project}/{self.run_id}").state == "running":
            if time.monotonic() > deadline:
                raise ConnectionError("the server did not get the end of the run")
            time.sleep(1.0)
            api.flush()

    @property
    def record(self) -> dict[str, str | None]:
        """What ``stage.json`` keeps of the run, and ``checkpoints.tracked`` gives to later stages."""
        names = ("run_id", "group", "url", "project", "entity")
        return {name: getattr(self, name) for name in names}

    @property
    def sync_command(self) -> str:
        """The command that uploads this run, and the others that wait beside it, with their lineage."""
        return offline.sync_command(self.directory.parent) if self.directory else ""

    def callback(self) -> Any:
        """A transformers.TrainerCallback that sends the trainer's logs here; use it with report_to='none'."""
        from transformers import TrainerCallback

        tracker = self

        class TrackerCallback(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
                if logs and state.is_world_process_zero:
                    tracker.log({chart_name(key): value for key, value in logs.items()}, state.global_step)
                    if control.should_save and tracker.mode != "disabled":
                        time.sleep(
                            2 * FLUSH_SECONDS
                        )  # no checkpoint without its history: what comes after it is redone

        return TrackerCallback()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.finish(exit_code=0 if kind is None else 1)

    # Opening

    def _open_online(self, wandb: Any, options: dict, timeout: float) -> str:
        """The mode after an attempt to go online: 'offline', with the reason, where the server does not let us."""
        if self._key:
            state, detail = knock(self.base_url, self._key, min(timeout, KNOCK_SECONDS))
            if state in ("down", "refused"):
                self.failures["start"] += 1
                self.reason = detail
                return "offline"
        if options["id"]:
            self._attempt(
                "upload of the run's earlier part", lambda: offline.upload_earlier(Path(options["dir"]), options["id"])
            )
        try:
            self._open(wandb, options, "online", timeout)
        except Exception as error:
            self.failures["start"] += 1
            self.reason = f"W&B did not start: {_one_line(error)}"
            return "offline"
        return "online"

    def _open(self, wandb: Any, options: dict, mode: str, timeout: float) -> None:
        """``wandb.init`` in ``mode``, given up after ``timeout`` seconds and a little. Raises what it raises."""
        limit = float(os.environ.get("WANDB_FINISH_TIMEOUT") or FINISH_SECONDS)
        settings = {
            "console": "off",
            "disable_code": True,
            "save_code": False,
            "disable_git": True,
            "disable_job_creation": True,
            "init_timeout": timeout,
            "finish_timeout": limit,
            "silent": True,
            "x_disable_meta": any(redact(arg) != arg for arg in sys.argv),
            "x_transaction_log_flush_interval": FLUSH_SECONDS,
        }
        outcome: list[Any] = []
        abandoned = threading.Event()

        def init() -> None:
            try:
                run = wandb.init(mode=mode, settings=wandb.Settings(**settings), **options)
            except BaseException as error:
                outcome.append(error)
                return
            outcome.append(run)
            if abandoned.is_set():
                self._attempt("start", lambda: run.finish(exit_code=1))

        thread = threading.Thread(target=init, daemon=True)
        thread.start()
        thread.join(timeout + 15.0)  # wandb allows itself ten seconds on top of init_timeout
        if not outcome:
            abandoned.set()
            raise TimeoutError(f"wandb.init did not return in {timeout + 15:.0f} s")
        if isinstance(outcome[0], BaseException):
            if isinstance(outcome[0], Exception):
                raise outcome[0]
            raise RuntimeError(f"wandb.init ended with {type(outcome[0]).__name__}")
        run = outcome[0]
        self._run, self.mode, self.run_id, self._finish_limit = run, mode, run.id, limit
        self.directory = Path(run.settings.sync_dir)
        self.url = run.url if mode == "online" else None
        self.entity = run.entity or self.entity
        if mode == "online":
            self._attempt("local files", lambda: offline.mark(self.directory, "unsynced"))
            # wandb asks the server before it logs a table or an artifact. With this answer kept it can do without.
            with contextlib.suppress(Exception):
                run._public_api()
        self._attempt("log", lambda: run.define_metric(STEP_KEY))
        self._attempt("log", lambda: run.define_metric("*", step_metric=STEP_KEY, step_sync=True))

    def _opening_line(self) -> str:
        line = f"tracking: W&B {self.mode} ({self.reason}), group {self.group}"
        return f"{line}: {self.url}" if self.mode == "online" else f"{line}; upload it later with: {self.sync_command}"

    # Calling W&B

    def _guard(self, kind: str, call: Callable[[], Any]) -> Any:
        return self._attempt(kind, call) if self._run is not None else None

    def _attempt(self, kind: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (Exception, SystemExit) as error:
            self.failures[kind] += 1
            if self.failures[kind] == 1:
                print(f"tracking: W&B {kind} failed, the run goes on ({_one_line(error)})", flush=True)
            return None

    def _in_turn(self, kind: str, call: Callable[[], Any], pending: Any = None) -> Any:
        """A call that may ask the server: in the background thread, awaited for CALL_SECONDS unless it is behind.

        Returns what the call returned, None if it failed, ``pending`` if it is still under way.
        """
        if self._run is None:
            return None
        result: list[Any] = []
        behind = self._worker.busy()
        done = self._worker.submit(lambda: result.append(self._attempt(kind, call)))
        if not behind and not done.wait(CALL_SECONDS):
            print(f"tracking: W&B is slow; what was logged waits in the background ({kind})", flush=True)
        return result[0] if result else pending

    def _at_exit(self) -> None:
        self.finish(exit_code=1)  # who does not get to call finish() has failed


class _Worker:
    """One daemon thread that makes calls in order."""

    def __init__(self) -> None:
        self._calls: queue.Queue[tuple[Callable[[], None], threading.Event]] = queue.Queue()
        self._last: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def submit(self, call: Callable[[], None]) -> threading.Event:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        self._last = threading.Event()
        self._calls.put((call, self._last))
        return self._last

    def busy(self) -> bool:
        return self._last is not None and not self._last.is_set()

    def _work(self) -> None:
        while True:
            call, done = self._calls.get()
            try:
                call()
            finally:
                done.set()


def artifact_files(path: str | Path, exclude: Sequence[str] = ()) -> list[tuple[str, Path]]:
    """(name in the artifact, file) for a file or a directory, without what is excluded and what keeps secrets."""
    root = Path(path)
    if root.is_file():
        return [(root.name, root)]
    patterns = (*exclude, *_NEVER_UPLOADED)
    known = [value.encode() for value in secret_values()]
    found = []
    for file in sorted(root.rglob("*")):
        relative = file.relative_to(root)
        ancestors = [relative, *relative.parents][:-1]  # from the file up to its topmost folder
        names = [part for place in ancestors for part in (place.name, place.as_posix())]
        if not file.is_file() or any(fnmatch.fnmatch(name, glob) for name in names for glob in patterns):
            continue
        if known and file.stat().st_size < 2**20 and any(secret in file.read_bytes() for secret in known):
            print(f"tracking: {file} holds a secret and is not uploaded", flush=True)
            continue
        found.append((relative.as_posix(), file.absolute()))
    return found


def chart_name(key: str) -> str:
    """'eval_loss' -> 'eval/loss', 'loss' -> 'train/loss': the sections W&B draws, as transformers names them."""
    for section in ("eval", "test"):
        if key.startswith(section + "_"):
            return f"{section}/{key.removeprefix(section + '_')}"
    return key if "/" in key else f"train/{key}"


def _check_writable(root: Path) -> None:
    """Raise OSError where wandb could not write: it would not say so."""
    place = root / "wandb"
    place.mkdir(parents=True, exist_ok=True)
    _check_room(place)
    probe = place / f".writable-{os.getpid()}"
    try:
        probe.touch()
    finally:
        probe.unlink(missing_ok=True)


def _check_room(place: Path) -> None:
    if shutil.disk_usage(place).free < 2**20:
        raise OSError(f"less than 1 MiB is free at {place}: what is logged is not kept")


def _end_service() -> None:
    """End this process's wandb service, which would otherwise retry and hold up the interpreter's exit."""
    report = threading.excepthook

    def quiet_excepthook(caught: Any) -> None:
        if caught.thread is None or not caught.thread.name.startswith(_WANDB_THREADS):
            report(caught)

    if getattr(report, "__name__", "") != quiet_excepthook.__name__:
        threading.excepthook = quiet_excepthook  # wandb's own threads notice that their service is gone

    def end() -> None:
        from wandb.sdk import wandb_setup

        with contextlib.suppress(Exception):
            wandb_setup.singleton()._connection._proc._process.kill()
        with contextlib.suppress(Exception, SystemExit):
            wandb_setup.teardown()

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    thread.join(10.0)


def _short(path: Path) -> str:
    """The path as the user would type it: relative where it lies below the working directory."""
    with contextlib.suppress(ValueError, OSError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def _one_line(error: BaseException) -> str:
    if type(error).__name__ in ("MailboxClosedError", "HandleAbandonedError"):
        return "wandb's service process has ended"
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return redact(text if len(text) < 300 else text[:300] + " ...")
