"""What begins, what continues, what is done already, and the W&B run that a resumed run goes on in."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from stoney_rl import checkpoints, runs, tracking
from stoney_rl.errors import StoneyError

REPOSITORY = Path(__file__).resolve().parent.parent
IDENTITY = {"arguments": {"seed": 0, "rank": 4}, "data_sha256": "a"}


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [Path("adapter"), Path("merged")]


def begin(outputs, identity=IDENTITY, *, resume=False, overwrite=False):
    return runs.begin(outputs, identity, resume=resume, overwrite=overwrite)


def finish(outputs, identity=IDENTITY):
    for path in outputs:
        path.mkdir()
    checkpoints.write_json(outputs[0] / checkpoints.STAGE_FILE, {"identity": identity})


def test_each_run_of_a_sweep_writes_to_a_place_of_its_own(monkeypatch):
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert runs.default_output("stoney_lora_ckpt") == "stoney_lora_ckpt"
    monkeypatch.setenv("WANDB_RUN_ID", "run7")  # set by hand, without a sweep
    assert runs.default_output("stoney_lora_ckpt") == "stoney_lora_ckpt"
    monkeypatch.setenv("WANDB_SWEEP_ID", "abcd1234")
    assert runs.default_output("stoney_lora_ckpt") == "sweeps/abcd1234/run7_ckpt"


def test_a_run_begins_continues_and_is_done(outputs, capsys):
    partial = begin(outputs, resume=True)
    assert partial == Path("adapter.partial") and partial.is_dir()
    (partial / "checkpoint-9").mkdir()
    (partial / "checkpoint-10").mkdir()
    with pytest.raises(StoneyError, match="an unfinished run; --resume continues it"):
        begin(outputs)
    with pytest.raises(StoneyError, match="started with other values of --rank, data_sha256;"):
        begin(outputs, {"arguments": {"seed": 0, "rank": 8}, "data_sha256": "b"}, resume=True)
    assert begin(outputs, resume=True) == partial and runs.last_checkpoint(partial).name == "checkpoint-10"
    finish(outputs)
    assert begin(outputs) is None
    assert capsys.readouterr().out.splitlines() == [
        "--resume: nothing yet; starting",
        "--resume: continuing after adapter.partial/checkpoint-10",
        "adapter and merged: trained with these arguments on this data already (--overwrite trains again)",
    ]
    assert not partial.exists()  # a kill between the last rename and the tidying left it


@pytest.mark.parametrize("identity", [IDENTITY, IDENTITY | {"data_sha256": "b"}])
def test_an_interrupted_overwrite_goes_on_and_the_old_output_stays_until_then(outputs, identity):
    """Also where the old output is of the same arguments."""
    finish(outputs)
    checkpoint = begin(outputs, identity, overwrite=True) / "checkpoint-1"
    checkpoint.mkdir()
    assert begin(outputs) is None and checkpoint.is_dir()  # what stands there is done
    for overwrite in (False, True):
        assert begin(outputs, identity, resume=True, overwrite=overwrite) == checkpoint.parent
        assert checkpoint.is_dir()
    assert all(path.is_dir() for path in outputs)
    begin(outputs, identity, overwrite=True)
    assert not checkpoint.exists()


def test_two_processes_do_not_write_to_one_place(outputs):
    partial = begin(outputs, resume=True)
    (partial / "checkpoint-1").mkdir()
    code = f"from stoney_rl import runs; from pathlib import Path; runs.hold(Path({str(partial)!r}))"
    other = [sys.executable, "-c", code]
    refused = subprocess.run(other, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert "another process is writing there" in refused.stderr and refused.returncode
    runs.release(partial)
    assert not subprocess.run(other, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}).returncode


def test_what_torchrun_starts_again_goes_on_and_overwrites_nothing(outputs, monkeypatch, capsys):
    partial = begin(outputs, overwrite=True)
    (partial / "checkpoint-7").mkdir()
    with pytest.raises(StoneyError, match="an unfinished run"):
        begin(outputs)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert begin(outputs, overwrite=True) == partial and (partial / "checkpoint-7").is_dir()
    assert "continuing after adapter.partial/checkpoint-7" in capsys.readouterr().out
    finish(outputs)
    os.utime(partial / "checkpoint-7", ns=(2**62, 2**62))
    assert begin(outputs, overwrite=True) == partial  # the old output is not taken for the new one
    shutil.rmtree(partial)
    assert begin(outputs, overwrite=True) is None  # published, and another process failed after that


def test_a_resumed_run_goes_on_in_its_wandb_run(outputs, monkeypatch):
    calls = []

    def start_stage(stage, told, *, group, **options):
        calls.append({"group": told or group, **options})
        return types.SimpleNamespace(run_id=f"r{len(calls) - 1}", group=told or group)

    monkeypatch.setattr(tracking, "start_stage", start_stage)
    partial = begin(outputs)
    for group in ("told", None):  # --wandb_group at the start, and left out at --resume
        runs.start_tracking("train", group, partial, model="model", data={"source": "rows"})
    assert [(call["name"], call["group"], call["resume_id"]) for call in calls] == [
        ("adapter", "told", None),
        ("adapter", "told", "r0"),
    ]
    assert calls[0]["model"] == "model" and calls[0]["data"] == {"source": "rows"}
