"""Checkpoint directories are whole or absent, and what they compute is recorded."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from stoney_rl import checkpoints
from stoney_rl.errors import StoneyError

REPOSITORY = Path(__file__).resolve().parent.parent


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def put(directory, text):
    directory.mkdir(exist_ok=True)
    (directory / "file").write_text(text)


# Written whole or not at all.


def test_staged_appears_at_the_end_under_its_name(tmp_path):
    final = tmp_path / "deep" / "model"
    with checkpoints.staged(final) as work:
        put(work, "new")
        assert not final.exists() and work.parent == final.parent and work.name.startswith(".model.tmp-")
    assert (final / "file").read_text() == "new"
    assert names(final.parent) == ["model"]


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), checkpoints.staged(tmp_path / "model") as work:
        put(work, "half")
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_an_exception_keeps_what_was_to_be_replaced(tmp_path):
    put(tmp_path / "model", "old")
    with pytest.raises(KeyboardInterrupt), checkpoints.staged(tmp_path / "model", overwrite=True) as work:
        put(work, "half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["model"] and (tmp_path / "model/file").read_text() == "old"


def test_an_existing_directory_is_replaced_only_when_told(tmp_path):
    put(tmp_path / "model", "old")
    with pytest.raises(StoneyError, match="model exists already.*--overwrite"), checkpoints.staged(tmp_path / "model"):
        pytest.fail("entered")
    assert (tmp_path / "model/file").read_text() == "old"
    with checkpoints.staged(tmp_path / "model", overwrite=True) as work:
        assert names(work) == []
        put(work, "new")
        assert (tmp_path / "model/file").read_text() == "old"  # until the end
    assert names(tmp_path) == ["model"] and (tmp_path / "model/file").read_text() == "new"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StoneyError, match="file/model: cannot write there"),
        checkpoints.staged(tmp_path / "file/model"),
    ):
        pytest.fail("entered")


def killed(code, *argv):
    done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_kill_leaves_a_hidden_directory_that_the_next_call_removes(tmp_path):
    killed(
        "import os, signal, sys; from pathlib import Path; from stoney_rl import checkpoints\n"
        "with checkpoints.staged(Path(sys.argv[1])) as work:\n"
        "    (work / 'file').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)",
        tmp_path / "model",
    )
    (left,) = names(tmp_path)
    assert left.startswith(".model.tmp-")
    (tmp_path / ".model2.tmp-1").mkdir()  # another directory's
    with checkpoints.staged(tmp_path / "model") as work:
        put(work, "new")
    assert names(tmp_path) == [".model2.tmp-1", "model"]


@pytest.mark.parametrize("moment", ["os.rename", "shutil.rmtree"])
def test_a_kill_in_publish_leaves_no_half_directory(tmp_path, moment):
    """Killed after the old directory moved away, or while it was being deleted: the next publish succeeds."""
    put(tmp_path / "model", "old")
    put(tmp_path / "work", "new")
    killed(
        "import os, shutil, signal, sys; from pathlib import Path; from stoney_rl import checkpoints\n"
        f"module, name = {moment.split('.')[0]}, '{moment.split('.')[1]}'\n"
        "real, calls = getattr(module, name), []\n"
        "def fatal(*args, **kwargs):\n"
        "    if name == 'rename' and not calls: calls.append(1); return real(*args, **kwargs)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "setattr(module, name, fatal)\n"
        "checkpoints.publish(Path(sys.argv[1]) / 'work', Path(sys.argv[1]) / 'model')",
        tmp_path,
    )
    expected = {"os.rename": [".model.tmp-old", "work"], "shutil.rmtree": [".model.tmp-old", "model"]}
    assert names(tmp_path) == expected[moment]
    if moment == "shutil.rmtree":
        assert (tmp_path / "model/file").read_text() == "new"
        put(tmp_path / "work", "newer")
    checkpoints.publish(tmp_path / "work", tmp_path / "model")
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model/file").read_text() == {"os.rename": "new", "shutil.rmtree": "newer"}[moment]


def test_write_json_replaces_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    checkpoints.write_json(path, {"form": "îyû"})
    assert "îyû" in path.read_text(encoding="utf-8") and json.loads(path.read_text(encoding="utf-8")) == {"form": "îyû"}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        checkpoints.write_json(path, {"form": "new"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"form": "îyû"}


# stage.json and lineage.


def test_read_stage(tmp_path):
    assert checkpoints.read_stage(tmp_path) is None
    checkpoints.write_json(tmp_path / "stage.json", {"stage": "sft"})
    assert checkpoints.read_stage(tmp_path) == {"stage": "sft"}
    for text, said in (("{", "not readable as JSON"), ("[1]", "expected a JSON object, found a list")):
        (tmp_path / "stage.json").write_text(text)
        with pytest.raises(StoneyError, match=said):
            checkpoints.read_stage(tmp_path)


def test_describe_stage_is_json_and_says_what_was_run():
    stage = checkpoints.describe_stage("sft", arguments={"seed": 3}, seed=3, parent={"path": "base"})
    assert json.loads(json.dumps(stage)) == stage
    assert (stage["stage"], stage["seed"], stage["arguments"], stage["parent"]) == (
        "sft",
        3,
        {"seed": 3},
        {"path": "base"},
    )
    assert set(stage["versions"]) >= {"python", "torch", "transformers", "peft", "trl"}
    assert stage["created"].endswith("+00:00")


def test_lineage_follows_parents_to_the_base(tmp_path):
    base, first, second = (tmp_path / name for name in ("base", "first", "second"))
    for directory in (base, first, second):
        directory.mkdir()
    data = {"source": "rows.jsonl", "sha256": "0123456789"}
    for directory, parent in ((first, base), (second, first)):
        stage = {"stage": "sft", "data": data, "fingerprint": {"sha256": "abcdefghij"}, "parent": {"path": str(parent)}}
        checkpoints.write_json(directory / "stage.json", stage)
    assert checkpoints.lineage(second) == [
        f"{second}: sft, data rows.jsonl (01234567), logits abcdefgh",
        f"{first}: sft, data rows.jsonl (01234567), logits abcdefgh",
        f"{base} (not made by this pipeline)",
    ]
    checkpoints.write_json(first / "stage.json", {"stage": "sft", "parent": {"path": str(second)}})
    assert len(checkpoints.lineage(second)) == 2  # a circle ends


# The fingerprint: what the weights compute.


def test_probe_input_ids_are_fixed_and_within_the_vocabulary():
    ids = checkpoints.probe_input_ids(259)
    assert (ids.shape, str(ids.dtype)) == ((4, 16), "torch.int64")
    assert ids[0, :3].tolist() == [13, (7919 + 13) % 259, (2 * 7919 + 13) % 259] == [13, 162, 52]
    assert ids.max() < 259 and len(set(ids.flatten().tolist())) == 64
    assert checkpoints.probe_input_ids(3).max() == 2


def test_fingerprint_is_of_the_function_not_of_the_mode():
    import torch

    model = tiny.model(layers=1)
    model.train()
    mark = checkpoints.fingerprint(model)
    assert model.training
    assert mark == checkpoints.fingerprint(tiny.model(layers=1)) == json.loads(json.dumps(mark))
    assert (mark["dtype"], len(mark["sample"]), len(mark["sha256"])) == ("float32", 256, 64)
    logits = checkpoints.probe_logits(model)
    assert (logits.shape, logits.dtype) == ((4, 16, 259), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):  # the trainer's
        assert torch.equal(checkpoints.probe_logits(model), logits)


def test_fingerprint_tells_one_changed_weight():
    import torch

    model = tiny.model(layers=1)
    mark = checkpoints.fingerprint(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] += 0.1
    changed = checkpoints.fingerprint(model)
    assert changed["sha256"] != mark["sha256"]
    assert 0 < checkpoints.logit_difference(mark, changed) < 1
    assert checkpoints.logit_difference(mark, mark) == 0
    assert checkpoints.logit_difference(mark, {"sample": [0.0]}) == float("inf")


@pytest.fixture
def recorded(tmp_path):
    model = tiny.model(layers=1)
    checkpoints.write_json(tmp_path / "stage.json", {"fingerprint": checkpoints.fingerprint(model)})
    return tmp_path, model


def test_check_fingerprint_returns_the_fresh_one(recorded):
    directory, model = recorded
    assert checkpoints.check_fingerprint(directory, model) == checkpoints.fingerprint(model)


def test_check_fingerprint_refuses_changed_weights(recorded):
    import torch

    directory, model = recorded
    with torch.no_grad():
        model.lm_head.weight += 0.01
    with pytest.raises(StoneyError, match=r"logits differ by [\d.e-]+ from those recorded.*make the checkpoint again"):
        checkpoints.check_fingerprint(directory, model)


def test_check_fingerprint_forgives_another_machine_s_rounding_and_another_dtype(recorded):
    import torch

    directory, model = recorded
    with torch.no_grad():
        model.lm_head.weight *= 1 + 1e-6
    checkpoints.check_fingerprint(directory, model)
    checkpoints.check_fingerprint(directory, model.to(torch.bfloat16))


def test_check_fingerprint_without_a_record(tmp_path):
    model = tiny.model(layers=1)
    assert checkpoints.check_fingerprint(tmp_path, model)["sha256"] == checkpoints.fingerprint(model)["sha256"]


def test_the_work_of_a_running_process_is_left_alone(tmp_path):
    """Only what a dead process left is removed; a directory that appeared meanwhile is not replaced."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    alive = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (tmp_path / f".model.tmp-{alive.pid}").mkdir()
        (tmp_path / f".model.tmp-{done.pid}").mkdir()
        with (
            pytest.raises(StoneyError, match="written by another process meanwhile"),
            checkpoints.staged(tmp_path / "model"),
        ):
            assert (tmp_path / f".model.tmp-{alive.pid}").exists()
            assert not (tmp_path / f".model.tmp-{done.pid}").exists()
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "theirs").write_text("whole")
    finally:
        alive.kill()
        alive.wait()
    assert (tmp_path / "model" / "theirs").read_text() == "whole"
