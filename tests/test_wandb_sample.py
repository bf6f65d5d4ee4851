"""wandb_sample.py as a user runs it, against a stub server on loopback: its exit codes and what it says."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from wandb_stub import WandbStub

REPOSITORY = Path(__file__).resolve().parent.parent
KEY = "plantedkey" * 4  # 40 characters, as wandb wants them
WHAT = ("metric", "table", "image", "artifact")


@pytest.fixture
def stub():
    with WandbStub() as server:
        yield server


def sample(tmp_path: Path, *argv: str, **env: str) -> subprocess.CompletedProcess:
    """Run the script in an empty folder with an empty home; the key must show nowhere."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir(exist_ok=True)
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "wandb_sample.py"), *argv],
        cwd=tmp_path / "work", env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert KEY not in done.stdout + done.stderr and KEY[-4:] not in done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    return done


def lines(done: subprocess.CompletedProcess) -> dict[str, str]:
    pairs = (line.split(":", 1) for line in done.stdout.splitlines() if not line.startswith("tracking:"))
    return {name: text.strip() for name, text in pairs}


def test_help_is_quick_and_names_the_exit_codes():
    fastest = 9.0
    for _ in range(3):
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "wandb_sample.py", "--help"], cwd=REPOSITORY, capture_output=True, text=True
        )
        fastest = min(fastest, time.monotonic() - began)
    assert done.returncode == 0 and fastest < 0.5
    for code in ("  0  ", "  2  ", "  3  ", "  4  ", "  5  ", "--timeout", "--wandb_mode"):
        assert code in done.stdout


def test_0_everything_arrived(tmp_path, stub):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/.env").write_text(f"WANDB_API_KEY={KEY}\nWANDB_PROJECT=my-project\n")
    done = sample(tmp_path, WANDB_BASE_URL=stub.url)
    said = lines(done)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [said[what] for what in WHAT] == ["arrived"] * 4
    assert said["key"] == "found: WANDB_API_KEY in .env" and said["server"] == f"{stub.url} answers"
    assert (said["entity"], said["project"]) == ("stub-entity", "my-project")
    (run,) = stub.runs
    assert said["look at"] == f"{stub.url}/stub-entity/my-project/runs/{run}"


def test_5_what_did_not_arrive_is_named(tmp_path, stub):
    stub.behaviour = "drop files"  # metrics do not travel as files
    done = sample(tmp_path, "--timeout", "5", WANDB_BASE_URL=stub.url, WANDB_API_KEY=KEY)
    said = lines(done)
    assert done.returncode == 5, done.stdout
    assert said["metric"] == "arrived"
    assert all(said[what].startswith("NOT arrived: ") for what in ("table", "image", "artifact"))


@pytest.mark.parametrize(("behaviour", "says"), [(401, "refuses the key"), (500, "answers HTTP 500")])
def test_4_server_refuses(tmp_path, stub, behaviour, says):
    stub.behaviour = behaviour
    done = sample(tmp_path, "--timeout", "5", WANDB_BASE_URL=stub.url, WANDB_API_KEY=KEY)
    assert done.returncode == 4 and says in lines(done)["server"], done.stdout
    assert [lines(done)[what] for what in WHAT] == ["written"] * 4


def test_4_nothing_listens(tmp_path):
    done = sample(tmp_path, "--timeout", "5", WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=KEY)
    assert done.returncode == 4 and "cannot be reached" in lines(done)["server"], done.stdout


def test_3_no_key(tmp_path):
    done = sample(tmp_path)
    said = lines(done)
    assert done.returncode == 3 and said["key"] == "none found", done.stdout
    assert [said[what] for what in WHAT] == ["written"] * 4
    folder = Path(said["look in"])
    assert folder.is_dir() and said["upload with"] == f"wandb sync wandb/{folder.name}"


@pytest.mark.parametrize(
    ("argv", "env"), [(["--wandb_mode", "offline"], {}), ([], {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY})]
)
def test_0_offline_was_asked_for(tmp_path, argv, env):
    done = sample(tmp_path, *argv, **env)
    assert done.returncode == 0 and [lines(done)[what] for what in WHAT] == ["written"] * 4, done.stdout


def test_0_disabled_was_asked_for(tmp_path):
    done = sample(tmp_path, "--wandb_mode", "disabled")
    assert done.returncode == 0 and lines(done) == {"mode": "disabled (as told)"}
    assert not (tmp_path / "work/wandb").exists()


def test_5_nothing_can_be_written(tmp_path):
    (tmp_path / "a_file").write_text("")
    done = sample(tmp_path, WANDB_DIR=str(tmp_path / "a_file/below"))
    assert done.returncode == 5 and "a_file" in lines(done)["mode"], done.stdout


@pytest.mark.parametrize(
    ("argv", "env", "says"),
    [
        (["--timeout", "0"], {}, "expected a number above 0"),
        (["--wandb_mod", "offline"], {}, "unrecognized arguments"),
        ([], {"WANDB_MODE": "ofline"}, "WANDB_MODE=ofline: expected online, offline or disabled"),
    ],
)
def test_2_bad_arguments(tmp_path, argv, env, says):
    done = sample(tmp_path, *argv, **env)
    assert done.returncode == 2 and says in done.stderr and not (tmp_path / "work/wandb").exists()
