"""wandb_sample.py as a user runs it, against a stub server on loopback: its exit codes and what it says."""

import os
import shutil
import struct
import subprocess
import sys
import types
import zlib
from pathlib import Path

import pytest
from wandb_stub import WandbStub

import wandb_sample
from stoney_rl import offline

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


def test_help_names_the_exit_codes(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        wandb_sample.main(["--help"])
    shown = capsys.readouterr().out
    for code in ("  0  ", "  2  ", "  3  ", "  4  ", "  5  ", "--timeout", "--wandb_mode"):
        assert code in shown


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
    # The whole of the timeout is waited for; it bounds the start too, which a busy machine makes slow.
    done = sample(tmp_path, "--timeout", "10", WANDB_BASE_URL=stub.url, WANDB_API_KEY=KEY)
    said = lines(done)
    assert done.returncode == 5, done.stdout
    assert said["metric"] == "arrived"
    assert all(said[what].startswith("NOT arrived: ") for what in ("table", "image", "artifact"))


@pytest.mark.parametrize(("behaviour", "says"), [(401, "refuses the key"), (500, "answers HTTP 500")])
def test_4_server_refuses(tmp_path, stub, behaviour, says):
    stub.behaviour = behaviour
    done = sample(tmp_path, WANDB_BASE_URL=stub.url, WANDB_API_KEY=KEY)
    assert done.returncode == 4 and says in lines(done)["server"], done.stdout
    assert [lines(done)[what] for what in WHAT] == ["written"] * 4


def test_4_nothing_listens(tmp_path):
    done = sample(tmp_path, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=KEY)
    assert done.returncode == 4 and "cannot be reached" in lines(done)["server"], done.stdout


def test_3_no_key(tmp_path):
    done = sample(tmp_path)
    said = lines(done)
    assert done.returncode == 3 and said["key"] == "none found", done.stdout
    assert [said[what] for what in WHAT] == ["written"] * 4
    folder = Path(said["look in"])
    assert folder.is_dir() and said["upload with"] == "python wandb_sample.py --sync"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A finished offline run; its files are to be read only."""
    return sample(tmp_path_factory.mktemp("offline"), "--wandb_mode", "offline")


def test_0_offline_was_asked_for(tmp_path, kept):
    by_variable = sample(tmp_path, WANDB_MODE="offline", WANDB_API_KEY=KEY)
    for done in (kept, by_variable):
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


# Reading a transaction file that wandb's own process may still be writing


def log_file(*payloads: bytes) -> tuple[bytes, list[int]]:
    """A .wandb file of these records, and where each one ends: a writer of LevelDB's log format, from its description."""
    data, ends = b":W&B\xe1\xbe\x00", []
    for payload in payloads:
        begun = False
        while True:
            room = 32768 - len(data) % 32768
            if room < 7:
                data += bytes(room)
                continue
            piece, payload = payload[: room - 7], payload[room - 7 :]
            kind = {(False, True): 1, (False, False): 2, (True, False): 3, (True, True): 4}[begun, not payload]
            body = bytes([kind]) + piece
            data += struct.pack("<IH", zlib.crc32(body), len(piece)) + body
            begun = True
            if not payload:
                break
        ends.append(len(data))
    return data, ends


@pytest.fixture(scope="module")
def records() -> list[bytes]:
    """Serialized records: three short ones around one that is longer than two blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2 as proto

    texts = ["first", "x" * 70_000, "third", "last"]
    return [
        proto.Record(num=number, output_raw=proto.OutputRawRecord(line=text)).SerializeToString()
        for number, text in enumerate(texts, start=1)
    ]


def test_a_torn_file_gives_the_records_that_are_whole(tmp_path, records):
    data, ends = log_file(*records)
    path = tmp_path / "run.wandb"
    # Every length around the ends of records and blocks, and some between.
    seams = [7, *ends, 32768, 65536]
    lengths = {seam + near for seam in seams for near in range(-12, 13)} | set(range(7, len(data), 997))
    for length in sorted(length for length in lengths if 7 <= length <= len(data)):
        path.write_bytes(data[:length])
        read = [record.SerializeToString() for record in offline.records(path)]
        assert read == records[: sum(end <= length for end in ends)], f"{length} of {len(data)} bytes"


def test_a_damaged_record_is_an_error_and_never_a_wrong_value(tmp_path, records):
    data, ends = log_file(*records)
    path = tmp_path / "run.wandb"
    for position in (7, ends[0] - 1, ends[0] + 10, 40_000, ends[2] - 1):  # checksums and payloads
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ValueError, match=r"run\.wandb is damaged: the checksum at byte \d+ is wrong"):
            list(offline.records(path))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"run\.wandb is not a \.wandb file"):
        list(offline.records(path))


def test_a_real_runs_file_says_more_the_more_of_it_is_there(tmp_path, kept):
    folder = tmp_path / "run"
    shutil.copytree(lines(kept)["look in"], folder)
    (path,) = folder.glob("run-*.wandb")
    mark = (folder / "sample/note.txt").read_text(encoding="utf-8").split()[-1]
    tracker = types.SimpleNamespace(directory=folder, run_id=path.stem.removeprefix("run-"))
    data, before = path.read_bytes(), set(WHAT)
    for length in [*range(0, len(data), 31), len(data)]:
        path.write_bytes(data[:length])
        missing = set(wandb_sample.written(tracker, mark))
        assert missing <= before, f"{length} of {len(data)} bytes"
        before = missing
    assert before == set()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert all("is damaged" in why for why in wandb_sample.written(tracker, mark).values())


def test_what_is_not_written_yet_is_waited_for(tmp_path, monkeypatch, capsys):
    tracker = types.SimpleNamespace(
        mode="offline", reason="as told", failures={"start": 0}, key_place="", entity=None, project="p",
        directory=tmp_path, sync_command="wandb sync", finish=lambda: None,
    )  # fmt: skip
    answers = [{"metric": "not in the run's files"}, {"metric": "not in the run's files"}, {}]
    monkeypatch.setattr(wandb_sample.tracking, "start_stage", lambda *_, **__: tracker)
    monkeypatch.setattr(wandb_sample, "send", lambda *_: {})
    monkeypatch.setattr(wandb_sample, "written", lambda *_: answers.pop(0))
    assert wandb_sample.main([]) == 0
    assert "metric:      written" in capsys.readouterr().out and answers == []
