"""Tracking against fakes, and against a real wandb client that talks to a stub server on loopback."""

import importlib.machinery
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from wandb_stub import WandbStub

from stoney_rl import tracking
from stoney_rl.errors import StoneyError

REPOSITORY = Path(__file__).resolve().parent.parent
# What is stuck in these tests is stuck for 30 s and longer: a wait that ends before this was bounded, however busy the machine.
BOUNDED_SECONDS = 25
KEY = "plantedkey" * 4  # 40 characters, as wandb wants them
HUB_TOKEN = "hf_" + "PlantedHubToken" * 2


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No W&B or hub setting of this machine, an empty home, an empty working directory."""
    for name in list(os.environ):
        if name.startswith(("WANDB", "HF_", "RANK")) or name in ("NETRC", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tracking, "_active", [])


@pytest.fixture
def stub():
    with WandbStub() as server:
        yield server


def run_script(tmp_path, body: str, *argv: str, **env: str) -> subprocess.CompletedProcess:
    """A Python process of its own in tmp_path/work, with the real wandb."""
    script = tmp_path / "script.py"
    script.write_text("import sys, os, time\nfrom stoney_rl import tracking\n" + textwrap.dedent(body))
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "PYTHONPATH": str(REPOSITORY), **env}
    return subprocess.run(
        [sys.executable, str(script), *argv],
        cwd=tmp_path / "work", env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


# Imports


def test_importing_it_loads_neither_wandb_nor_torch():
    code = "import sys; from stoney_rl import tracking; print([m for m in ('wandb', 'torch', 'requests', 'dotenv') "
    done = subprocess.run(
        [sys.executable, "-c", code + "if m in sys.modules])"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


# Secrets


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("api_key", "abc", True),
        ("WANDB_API_KEY", "abc", True),
        ("apiKey", "abc", True),
        ("HFToken", "abc", True),
        ("hf-token", "abc", True),
        ("client_secret", 12345, True),
        ("db.password", "x", True),
        ("keys", ["abc"], True),
        ("access_tokens", ["abc"], True),
        ("token", {"value": "abc"}, True),
        ("use_auth_token", True, False),
        ("api_key", None, False),
        ("max_new_tokens", 64, False),
        ("max_completion_tokens", "64", False),
        ("num_tokens", 10, False),
        ("eos_token", "<|im_end|>", False),
        ("pad_token_id", "2", False),
        ("stop_tokens", ["</s>"], False),
        ("tokenizer", "SmolLM2", False),
        ("tokenizer_name", "SmolLM2", False),
        ("num_key_value_heads", 4, False),
        ("learning_rate", 1e-3, False),
        ("monitor", "eval/loss", False),
    ],
)
def test_secret_names(name, value, secret):
    assert tracking.is_secret_name(name, value) is secret


def test_redact_takes_secrets_out_and_leaves_the_rest():
    environ = {"WANDB_API_KEY": KEY, "HF_TOKEN": HUB_TOKEN, "PATH": "/usr/bin:/bin", "MY_SECRET": "short", "HOME": "/x"}
    given = {
        "lr": 1e-3,
        "api_key": "anything",
        "path": Path("/usr/bin"),
        "nested": [{"password": "x", "note": f"run with {KEY} please"}],
        "remote": "https://user:pw@example.org/repo.git",
        "argument": "--hub=hf_" + "b" * 30,
        "eos_token": "</s>",
        "pair": (1, None, True),
        "commit": "0123456789abcdef0123456789abcdef01234567",
        f"by {KEY}": 1,
        "short word stays": "short",
        "score": np.float32(0.5),
        "scores": np.array([1, 2]),
    }
    assert tracking.redact(given, environ) == {
        "lr": 1e-3,
        "api_key": "[redacted]",
        "path": "/usr/bin",
        "nested": [{"password": "[redacted]", "note": "run with [redacted] please"}],
        "remote": "https://[redacted]@example.org/repo.git",
        "argument": "--hub=[redacted]",
        "eos_token": "</s>",
        "pair": [1, None, True],
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "by [redacted]": 1,
        "short word stays": "short",
        "score": 0.5,
        "scores": [1, 2],
    }


def test_netrc_passwords_are_known_secrets(tmp_path):
    (tmp_path / "home/.netrc").write_text("machine example.org\n  login u\n  password netrcpassword1\n")
    assert tracking.redact("x netrcpassword1 y") == "x [redacted] y"


def test_artifact_files_leave_out_what_is_excluded_and_what_keeps_secrets(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    root = tmp_path / "checkpoint"
    for name in ("model.safetensors", "stage.json", "checkpoint-10/model.safetensors", ".env", "deep/.netrc",
                 "deep/checkpoint-5/a", "deep/er/b.txt", "deep/.git/config", "key.pem"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("text")
    (root / "notes.txt").write_text(f"token {HUB_TOKEN}")
    found = tracking.artifact_files(root, ["checkpoint-*"])
    assert [name for name, _ in found] == ["deep/er/b.txt", "model.safetensors", "stage.json"]
    assert "notes.txt holds a secret" in capsys.readouterr().out
    assert tracking.artifact_files(root / "stage.json") == [("stage.json", root / "stage.json")]
    names = [name for name, _ in tracking.artifact_files(root, ["deep/er"])]
    assert "deep/er/b.txt" not in names and "checkpoint-10/model.safetensors" in names


# Environment, key, mode


def test_env_file_fills_what_is_not_set(tmp_path, monkeypatch):
    Path(".env").write_text(f"WANDB_API_KEY={KEY}\nWANDB_PROJECT=from-file\nWANDB_MODE=\n# HF_TOKEN=x\n")
    monkeypatch.setenv("WANDB_PROJECT", "from-environment")
    monkeypatch.setenv("WANDB_API_KEY", "")  # empty counts as not set
    assert tracking.load_env() == ["WANDB_API_KEY"]
    assert os.environ["WANDB_API_KEY"] == KEY and os.environ["WANDB_PROJECT"] == "from-environment"
    assert "WANDB_MODE" not in os.environ and "HF_TOKEN" not in os.environ
    assert tracking.load_env(tmp_path / "elsewhere") == []


def test_env_example_explains_every_variable_and_sets_none():
    from dotenv import dotenv_values

    text = (REPOSITORY / ".env.example").read_text(encoding="utf-8")
    assert dict(dotenv_values(REPOSITORY / ".env.example")) == {}  # a copy that nobody edits changes nothing
    source = (REPOSITORY / "stoney_rl/tracking.py").read_text(encoding="utf-8")
    read = set(re.findall(r"""environ\S*[\[(]"(WANDB_\w+)\"""", source))
    read -= {"WANDB_SERVICE", "WANDB_DISABLED", "WANDB_SWEEP_ID"}  # set by wandb, or out of date
    assert len(read) > 8
    wanted = read | {"WANDB_BASE_URL", "HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT"}
    assert wanted - set(re.findall(r"^#(\w+)=", text, re.MULTILINE)) == set()


def test_unreadable_env_file_is_one_line():
    Path(".env").write_bytes(b"A=\xff\xfe\n")
    with pytest.raises(StoneyError, match=r"\.env: cannot be read .*NAME=value"):
        tracking.load_env()


def test_key_places(tmp_path, monkeypatch):
    url = "https://api.wandb.ai"
    assert tracking.find_key(url) == ("", "")
    assert tracking.find_key(url, settings_key="k") == ("wandb's settings", "k")
    netrc = tmp_path / "home/.netrc"
    netrc.write_text(f"machine my.server:8080\n login user\n password {KEY}\n")
    assert tracking.find_key(url) == ("", "")  # another server's key is no key
    assert tracking.find_key("http://my.server:8080") == (str(netrc), KEY)
    netrc.write_text(f"machine api.wandb.ai\n login user\n password {KEY}\n")
    assert tracking.find_key("https://api.forge.coreweave.com") == (str(netrc), KEY)  # the same service, renamed
    monkeypatch.setenv("WANDB_API_KEY", KEY + "2")
    assert tracking.find_key(url) == ("WANDB_API_KEY", KEY + "2")
    assert tracking.find_key(url, ["WANDB_API_KEY"]) == ("WANDB_API_KEY in .env", KEY + "2")


@pytest.mark.parametrize(
    ("flag", "variable", "settings", "key", "mode", "why"),
    [
        (None, None, None, "WANDB_API_KEY", "online", "key from WANDB_API_KEY"),
        (None, None, "online", "", "offline", "no key found"),
        ("online", None, None, "", "offline", "as told: online, but no key"),
        ("online", "offline", None, "k", "online", "key from k"),
        ("offline", "online", None, "k", "offline", "as told"),
        ("disabled", "online", None, "k", "disabled", "as told"),
        (None, "offline", None, "k", "offline", "WANDB_MODE=offline"),
        (None, "dryrun", None, "k", "offline", "WANDB_MODE=dryrun"),
        (None, "disabled", None, "k", "disabled", "WANDB_MODE=disabled"),
        (None, "ONLINE", "offline", "k", "online", "key from k"),
        (None, "", None, "k", "online", "key from k"),
        (None, None, "offline", "k", "offline", "wandb's settings"),
    ],
)
def test_mode_decision(flag, variable, settings, key, mode, why):
    environ = {} if variable is None else {"WANDB_MODE": variable}
    got, reason = tracking.decide_mode(flag, environ, settings, key)
    assert got == mode and why in reason


def test_wrong_mode_is_one_line():
    with pytest.raises(StoneyError, match="WANDB_MODE=ofline: expected online, offline or disabled"):
        tracking.decide_mode(None, {"WANDB_MODE": "ofline"}, None, "")
    with pytest.raises(StoneyError, match="expected online, offline or disabled"):
        tracking.decide_mode("banana", {}, None, "")


def test_group(monkeypatch):
    made = tracking.run_group()
    assert made.startswith("pipeline-20") and made != tracking.run_group()
    monkeypatch.setenv("WANDB_SWEEP_ID", "abcd1234")
    assert tracking.run_group() == "sweep-abcd1234"
    monkeypatch.setenv("WANDB_RUN_GROUP", "from-env")
    assert tracking.run_group() == "from-env" and tracking.run_group("given") == "given"


def test_knock_is_bounded_and_says_what_it_saw(stub):
    assert tracking.knock(stub.url, KEY, 5) == ("ok", "stub-entity")
    for status, state in ((401, "refused"), (403, "refused"), (500, "down"), (404, "down")):
        stub.behaviour = status
        assert tracking.knock(stub.url, KEY, 5)[0] == state
    stub.behaviour = "hang"
    began = time.monotonic()
    assert tracking.knock(stub.url, KEY, 0.5) == ("down", f"{stub.url} did not answer in 0 s")
    assert time.monotonic() - began < BOUNDED_SECONDS
    assert tracking.knock("http://127.0.0.1:9", KEY, 5) == ("down", "http://127.0.0.1:9 cannot be reached")


# Against a fake wandb: every way of failing


class FakeRun:
    """Records what reaches it; ``broken`` names methods that raise."""

    def __init__(self, directory, broken=()):
        self.id, self.url, self.entity = "fakeid", "http://fake/run", "fake"
        self.settings = types.SimpleNamespace(sync_dir=str(directory))
        self.config = self.summary = self
        self.rows, self.broken, self.exit_code = [], set(broken), "not finished"

    def _call(self, method, value):
        if method in self.broken:
            raise ConnectionError(f"{method} is broken")
        self.rows.append(value)

    def log(self, row):
        self._call("log", row)

    def update(self, values, **_):
        self._call("update", values)

    def log_artifact(self, artifact, aliases):
        self._call("log_artifact", aliases)

    def use_artifact(self, name):
        self._call("use_artifact", name)

    def define_metric(self, *_, **__):
        pass

    def finish(self, exit_code):
        self._call("finish", exit_code)
        self.exit_code = exit_code


@pytest.fixture
def fake_wandb(monkeypatch, tmp_path):
    """``wandb`` replaced by a fake whose init does what ``fake.init`` says for the mode."""
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    settings = types.SimpleNamespace(
        base_url="http://127.0.0.1:9", api_key=None, mode="online", entity=None, project=None
    )
    fake.setup = lambda *_: types.SimpleNamespace(settings=settings)
    fake.Settings = lambda **given: given
    fake.calls = []
    fake.run = FakeRun(tmp_path / "run")
    fake.behave = lambda mode: fake.run

    def init(**given):
        fake.calls.append(given)
        return fake.behave(given["mode"])

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    shown = types.SimpleNamespace(run=lambda _: types.SimpleNamespace(state="finished"), flush=lambda: None)
    fake.Api = lambda *_, **__: shown
    monkeypatch.setattr(tracking, "_end_service", lambda: None)
    monkeypatch.setattr(tracking.atexit, "register", lambda _: None)
    monkeypatch.setattr(tracking, "knock", lambda *_: ("ok", "fake"))
    (tmp_path / "run").mkdir()
    return fake


def test_what_init_is_given(fake_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    tracker = tracking.start(
        "sft", {"lr": 1, "hub_token": "x", "note": KEY}, name="out", group="g", tags=["a", KEY], resume_id="abc", directory="d"
    )  # fmt: skip
    given = fake_wandb.calls[0]
    assert given["config"] == {"lr": 1, "hub_token": "[redacted]", "note": "[redacted]", "stage": "sft"}
    assert (given["id"], given["resume"], given["mode"]) == ("abc", "allow", "online")
    assert (given["project"], given["group"], given["name"], given["job_type"]) == ("stoney-rl", "g", "out", "sft")
    assert given["tags"] == ["a", "[redacted]"]
    settings = given["settings"]
    assert settings["save_code"] is False and settings["disable_git"] is True and settings["console"] == "off"
    assert (tracker.mode, tracker.url, tracker.group, tracker.run_id) == ("online", "http://fake/run", "g", "fakeid")


def test_online_init_that_raises_goes_offline(fake_wandb, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)

    def behave(mode):
        if mode == "online":
            raise PermissionError("project is read-only")
        return fake_wandb.run

    fake_wandb.behave = behave
    tracker = tracking.start("sft", {})
    out = capsys.readouterr().out
    assert tracker.mode == "offline" and tracker.url is None
    assert out.count("\n") == 1 and "project is read-only" in out and "wandb_sample.py --sync" in out and KEY not in out


def test_init_that_hangs_goes_offline(fake_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    release, late = threading.Event(), FakeRun("late")
    fake_wandb.behave = lambda mode: (release.wait(30) and late) if mode == "online" else fake_wandb.run
    join = threading.Thread.join
    monkeypatch.setattr(threading.Thread, "join", lambda self, timeout=None: join(self, min(timeout or 1, 1)))
    began = time.monotonic()
    tracker = tracking.start("sft", {}, timeout=0.1)
    assert tracker.mode == "offline" and "did not return" in tracker.reason
    assert time.monotonic() - began < BOUNDED_SECONDS
    release.set()
    deadline = time.monotonic() + BOUNDED_SECONDS
    while late.exit_code == "not finished" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert late.exit_code == 1 and tracker.mode == "offline"  # the run that came too late is closed, and not used


def test_when_even_offline_fails_the_tracker_is_disabled_and_harmless(fake_wandb, capsys, tmp_path):
    def behave(mode):
        raise SystemExit(1)

    fake_wandb.behave = behave
    tracker = tracking.start("sft", {})
    assert tracker.mode == "disabled" and capsys.readouterr().out.count("\n") == 1
    tracker.log({"a": 1}, step=1)
    tracker.summary({"a": 1})
    tracker.table("t", ["a"], [[1]])
    tracker.image("i", "no such file")
    tracker.html("h", "no such file")
    assert tracker.artifact("a", "model", tmp_path) is None
    tracker.use_artifact("a:latest")
    tracker.finish()
    assert capsys.readouterr().out == ""


def test_unwritable_directory_is_said_once(fake_wandb, capsys):
    Path("a_file").write_text("")
    tracker = tracking.start("sft", {}, directory="a_file/below")
    out = capsys.readouterr().out
    assert tracker.mode == "disabled" and out.count("\n") == 1 and "a_file" in out and not fake_wandb.calls


def test_full_disk_is_said(fake_wandb, monkeypatch, capsys):
    monkeypatch.setattr(tracking.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    assert tracking.start("sft", {}).mode == "disabled"
    assert "less than 1 MiB is free" in capsys.readouterr().out


def test_no_method_raises_and_each_kind_is_said_once(fake_wandb, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    fake_wandb.Table = fake_wandb.Image = fake_wandb.Html = fake_wandb.Artifact = lambda *_, **__: FakeArtifact()
    fake_wandb.run.broken = {"log", "update", "log_artifact", "use_artifact", "finish"}
    tracker = tracking.start("sft", {})
    capsys.readouterr()
    (tmp_path / "page.html").write_text("<b>page</b>")
    for _ in range(3):
        tracker.log({"a": 1}, step=1)
        tracker.summary({"a": 1})
        tracker.table("t", ["a"], [[1]])
        tracker.image("i", "picture.png")
        tracker.html("h", tmp_path / "page.html")
        assert tracker.artifact("a", "model", tmp_path / "page.html") is None
        tracker.artifact("a", "model", tmp_path / "missing")
    tracker.use_artifact("other:latest")
    tracker.log("not a dict", step="not a number")  # a caller's mistake ends no training either
    lines = capsys.readouterr().out.splitlines()
    assert dict(tracker.failures) == {
        "log": 4, "summary": 3, "table": 3, "image": 3, "html": 3, "artifact": 6, "lineage": 1, "use_artifact": 1,
    }  # fmt: skip
    assert len(lines) == 8 and all("the run goes on" in line for line in lines)
    tracker.finish()
    tracker.finish()
    assert tracker.failures["finish"] == 1
    tracker.log({"a": 1})


class FakeArtifact:
    def add_file(self, *_, **__):
        pass

    def wait(self):
        pass


def test_a_stuck_call_does_not_hold_up_training(fake_wandb, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(tracking, "CALL_SECONDS", 0.2)
    release = threading.Event()
    fake_wandb.Table = lambda **_: release.wait(30) and "table"
    tracker = tracking.start("sft", {})
    began = time.monotonic()
    for _ in range(5):
        tracker.table("t", ["a"], [[1]])
        tracker.log({"loss": 1})
    assert time.monotonic() - began < BOUNDED_SECONDS
    assert fake_wandb.run.rows == [{"loss": 1}] * 5  # numbers go past the queue
    assert capsys.readouterr().out.count("W&B is slow") == 1
    release.set()
    tracker.finish()
    assert fake_wandb.run.rows[5:] == [{"t": "table"}] * 5 + [0]  # late, not lost


def test_only_rank_0_tracks(fake_wandb, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    tracker = tracking.start("sft", {}, mode="offline")
    tracker.log({"a": 1})
    assert tracker.mode == "disabled" and not fake_wandb.calls and capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert tracking.start("sft", {}, mode="offline").mode == "offline"


def test_callback_sends_the_trainers_logs(fake_wandb):
    tracker = tracking.start("sft", {}, mode="offline")
    callback = tracker.callback()
    state = types.SimpleNamespace(is_world_process_zero=True, global_step=7)
    going_on = types.SimpleNamespace(should_save=False)
    callback.on_log(
        None, state, going_on, logs={"loss": 0.5, "eval_loss": 0.25, "rewards/chrf": 1.0, "eval_rewards/x": 2}
    )
    callback.on_log(None, types.SimpleNamespace(is_world_process_zero=False, global_step=8), going_on, logs={"loss": 1})
    assert fake_wandb.run.rows == [
        {"train/loss": 0.5, "eval/loss": 0.25, "rewards/chrf": 1.0, "eval/rewards/x": 2, "train/global_step": 7}
    ]
    from transformers import TrainerCallback

    assert isinstance(callback, TrainerCallback)


# Against the real wandb, and a server on loopback

USE_EVERYTHING = """
    from PIL import Image
    tracker = tracking.start("sft", {"lr": 0.25, "api_key": "x" * 9, "note": os.environ.get("PLANTED_KEY", "-")}, resume_id=RESUME)
    tracker.log({"loss": 2.0, "text": "key " + os.environ.get("PLANTED_KEY", "-")}, step=5)
    tracker.table("rows", ["a", "b"], [[1, os.environ.get("PLANTED_KEY", "-")], ["two", None]])
    Image.new("RGB", (4, 4)).save("picture.png")
    tracker.image("picture", "picture.png")
    open("page.html", "w").write("<b>page " + os.environ.get("PLANTED_KEY", "-") + "</b>")
    tracker.html("page", "page.html")
    os.remove("page.html")
    os.makedirs("model/checkpoint-3", exist_ok=True)
    for name in ("weights.bin", "checkpoint-3/weights.bin"):
        open("model/" + name, "w").write("weights")
    reference = tracker.artifact("my model", "model", "model", metadata={"key": "k", "n": 1}, exclude=["checkpoint-*"])
    tracker.summary({"score": 0.75})
    tracker.finish()
    print("REFERENCE", reference, dict(tracker.failures))
""".replace("RESUME", "'myrun'")


def test_online_everything_arrives(tmp_path, stub):
    # wandb would record the remote of a git repository, and upload what is not committed.
    for command in ("init -q", f"remote add origin https://user:{KEY}@example.org/x.git"):
        subprocess.run(["git", *command.split()], cwd=tmp_path / "work", check=True)
    done = run_script(tmp_path, USE_EVERYTHING, KEY, WANDB_BASE_URL=stub.url, WANDB_API_KEY=KEY, PLANTED_KEY=KEY,
                      WANDB_RUN_GROUP="one pipeline")  # fmt: skip
    assert done.returncode == 0 and "REFERENCE my-model:myrun {}" in done.stdout, done.stdout + done.stderr
    run = stub.runs["myrun"]
    assert run["project"] == "stoney-rl" and run["group"] == "one pipeline" and run["exitcode"] == 0
    assert run["config"]["lr"]["value"] == 0.25 and run["config"]["api_key"]["value"] == "[redacted]"
    assert run["history"][0]["loss"] == 2.0 and run["history"][0]["train/global_step"] == 5
    assert run["summary"]["score"] == 0.75
    table = json.loads(stub.storage["run/myrun/" + run["summary"]["rows"]["path"]])
    assert table["columns"] == ["a", "b"] and table["data"] == [[1, "[redacted]"], ["two", None]]
    assert stub.storage["run/myrun/" + run["summary"]["picture"]["path"]].startswith(b"\x89PNG")
    artifact = next(a for a in stub.artifacts if a["name"] == "my-model")
    assert artifact["files"] == ["weights.bin"] and artifact["state"] == "COMMITTED"
    assert set(artifact["aliases"]) == {"latest", "myrun"}
    names = [name for name in stub.storage if "diff.patch" in name or name.startswith("run/myrun/code")]
    assert names == []
    # The key was used to log in, and appears in nothing that was sent or kept.
    shutil.rmtree(tmp_path / "work/.git")
    assert stub.keys == {KEY}
    sent = b"".join(stub.bodies)
    assert b"0.25" in sent and KEY.encode() not in sent
    assert_no_key_under(tmp_path, KEY)

    # A later stage: lineage, and the same run resumed where it stopped.
    more = """
        tracker = tracking.start("grpo", {"lr": 0.5})
        tracker.use_artifact("my-model:myrun")
        tracker.finish()
        tracker = tracking.start("sft", {"lr": 0.25}, resume_id="myrun")
        tracker.log({"loss": 1.0}, step=6)
        tracker.finish()
        print(dict(tracker.failures))
    """
    done = run_script(tmp_path, more, WANDB_BASE_URL=stub.url, WANDB_API_KEY=KEY)
    assert done.returncode == 0 and "{}" in done.stdout, done.stdout + done.stderr
    (user, used), *rest = stub.used
    assert used == "my-model:v0" and user != "myrun" and rest == []
    assert stub.runs[user]["config"]["used_artifacts"]["value"] == ["my-model:myrun"]
    assert [row["loss"] for row in run["history"] if "loss" in row] == [2.0, 1.0]


def assert_no_key_under(root: Path, key: str) -> None:
    files = [path for path in root.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [str(path) for path in files if key.encode() in path.read_bytes()] == []


def test_offline_keeps_everything_but_the_key_and_can_be_synced(tmp_path, stub):
    env = {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY, "HF_TOKEN": HUB_TOKEN, "PLANTED_KEY": HUB_TOKEN}
    for _ in range(2):  # the second continues the first
        done = run_script(tmp_path, USE_EVERYTHING, HUB_TOKEN, **env)
        assert done.returncode == 0 and "REFERENCE my-model:myrun {}" in done.stdout, done.stdout + done.stderr
    folders = sorted((tmp_path / "work/wandb").glob("offline-run-*-myrun"))
    assert len(folders) == 2 and done.stdout.count("python wandb_sample.py --sync\n") == 2  # at the start and the end
    assert_no_key_under(tmp_path, KEY)
    assert_no_key_under(tmp_path, HUB_TOKEN)

    for folder in folders:
        synced = subprocess.run(
            [Path(sys.executable).parent / "wandb", "sync", str(folder)],
            env=os.environ | {"WANDB_BASE_URL": stub.url, "WANDB_API_KEY": KEY}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert synced.returncode == 0, synced.stderr
    run = stub.runs["myrun"]
    assert [row["loss"] for row in run["history"] if "loss" in row] == [2.0, 2.0]
    assert run["summary"]["score"] == 0.75 and run["exitcode"] == 0
    assert [a["version"] for a in stub.artifacts if a["name"] == "my-model"] == [0, 1]


@pytest.mark.parametrize(
    ("behaviour", "timeout", "says"),
    [(401, 30, "refuses the key (HTTP 401)"), (500, 30, "answers HTTP 500"), ("hang", 2, "did not answer in 2 s")],
)
def test_server_that_fails_at_the_start_means_offline(tmp_path, stub, behaviour, timeout, says):
    stub.behaviour = behaviour
    body = """
        tracker = tracking.start("sft", {}, timeout=float(sys.argv[1]))
        tracker.log({"loss": 1.0})
        tracker.finish()
        print(tracker.mode, dict(tracker.failures))
    """
    done = run_script(tmp_path, body, str(timeout), WANDB_BASE_URL=stub.url, WANDB_API_KEY=KEY)
    assert done.returncode == 0 and done.stdout.count("tracking:") == 2, done.stdout + done.stderr
    assert says in done.stdout and "offline {'start': 1}" in done.stdout and "wandb_sample.py --sync" in done.stdout
    assert "Traceback" not in done.stderr


def test_run_that_the_server_refuses_goes_offline_under_the_same_id(tmp_path, stub):
    stub.operations_say["UpsertBucket"] = 403
    body = """
        tracker = tracking.start("sft", {}, resume_id="myrun")
        tracker.log({"loss": 1.0})
        tracker.finish()
        print(tracker.mode, tracker.run_id, tracker.directory.name)
    """
    done = run_script(tmp_path, body, WANDB_BASE_URL=stub.url, WANDB_API_KEY=KEY)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "offline myrun offline-run-" in done.stdout, done.stdout


def test_artifact_that_the_server_refuses_is_said_at_the_end(tmp_path, stub):
    stub.operations_say["CreateArtifact"] = 403  # such as a storage quota; the client learns of it in the background
    body = """
        open("weights.bin", "w").write("weights")
        tracker = tracking.start("sft", {}, resume_id="myrun")
        tracker.artifact("weights", "model", "weights.bin")
        tracker.log({"loss": 1.0})
        tracker.finish()
        print(dict(tracker.failures))
    """
    done = run_script(tmp_path, body, WANDB_BASE_URL=stub.url, WANDB_API_KEY=KEY)
    assert done.returncode == 0 and "{'artifact upload': 1}" in done.stdout, done.stdout + done.stderr
    assert "artifact upload failed, the run goes on" in done.stdout and "python wandb_sample.py --sync" in done.stdout
    assert stub.runs["myrun"]["history"][0]["loss"] == 1.0 and stub.runs["myrun"]["exitcode"] == 0


def test_server_that_dies_in_mid_run_does_not_hold_up_the_end(tmp_path, stub):
    body = """
        tracking.LOST_SECONDS = tracking.CALL_SECONDS = 1
        tracker = tracking.start("sft", {})
        tracker.log({"loss": 1.0})
        print("READY", flush=True)
        sys.stdin.readline()
        tracker.log({"loss": 2.0})
        tracker.table("rows", ["a"], [[1]])
        began = time.monotonic()
        tracker.finish()
        assert time.monotonic() - began < 30
        print(tracker.mode, tracker.failures["finish"] > 0)
    """
    script = tmp_path / "script.py"
    script.write_text("import sys, os, time\nfrom stoney_rl import tracking\n" + textwrap.dedent(body))
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, str(script)], cwd=tmp_path / "work", env=env | {"WANDB_BASE_URL": stub.url, "WANDB_API_KEY": KEY},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    head = ""
    while "READY" not in head:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        head += line
    stub.behaviour = 500
    out, err = process.communicate("\n", timeout=90)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert "online True" in out and "upload what is kept with: python wandb_sample.py --sync" in out, out


def test_wandbs_process_dying_does_not_end_the_run(tmp_path):
    body = """
        tracker = tracking.start("sft", {})
        from wandb.sdk import wandb_setup
        wandb_setup.singleton()._connection._proc._process.kill()
        deadline = time.monotonic() + 30  # until the client notices that its service is gone
        while tracker.failures["log"] < 3 and time.monotonic() < deadline:
            tracker.log({"loss": 1.0})
            time.sleep(0.1)
        tracker.finish()
        print(tracker.failures["log"])
    """
    done = run_script(tmp_path, body)
    assert done.returncode == 0 and done.stdout.endswith("3\n"), done.stdout + done.stderr
    assert done.stdout.count("W&B log failed") == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr


def test_a_run_that_nobody_finishes_ends_with_the_process(tmp_path, stub):
    body = """
        tracker = tracking.start("sft", {}, resume_id="myrun")
        tracker.log({"loss": 1.0})
        sys.exit(3)  # as cli.run does for bad input
    """
    done = run_script(tmp_path, body, WANDB_BASE_URL=stub.url, WANDB_API_KEY=KEY)
    assert done.returncode == 3, done.stderr
    assert stub.runs["myrun"]["exitcode"] == 1 and stub.runs["myrun"]["history"][0]["loss"] == 1.0
