"""run_sweep.py from end to end: on a program that answers at once, and beside the real `wandb agent` on a tiny model."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import yaml
from sweep_stub import SweepStub

import run_sweep
from stoney_rl import data, planted, records, runs
from stoney_rl.errors import StoneyError

REPOSITORY = Path(__file__).resolve().parent.parent
# A stage that trains nothing: its loss is |rate - 0.3|, nan for rate 9, and it fails for rank 13. Beside `slow`, a trial
# writes a checkpoint and waits to be ended; each start is noted in `starts`.
PROGRAM = f"""
import json, math, os, sys, time
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
from stoney_rl import checkpoints, cli
def build_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--no-merge", action="store_true")
    parser.add_argument("--output_dir", default="out_ckpt")
    parser.add_argument("--resume", action="store_true")
    return parser
def main():
    args = build_parser().parse_args()
    output, partial = Path(args.output_dir), Path(args.output_dir + ".partial")
    with open("starts", "a") as file:
        file.write(f"{{args.rate}} {{'resumed' if (partial / 'checkpoint-1').exists() else 'new'}} {{args.resume}}\\n")
    if args.rank == 13:
        print("loading", flush=True)
        raise RuntimeError("no room for rank 13" if not Path("room").exists() else "still no room")
    (partial / "checkpoint-1").mkdir(parents=True, exist_ok=True)
    if Path("slow").exists():
        print("waiting", os.getpid(), flush=True)
        time.sleep(120)
    loss = math.nan if args.rate == 9 else abs(args.rate - 0.3)
    (partial / "adapter_model.safetensors").write_bytes(bytes(1000))
    history = [{{"loss": 2.0, "step": 1}}, {{"eval_loss": loss, "step": 1}}]
    (partial / "trainer_state.json").write_text(json.dumps({{"log_history": history}}))
    checkpoints.write_json(partial / "stage.json", {{"stage": "sft", "training": {{"eval_loss": loss}}}})
    partial.rename(output)
    if not args.no_merge:
        output.with_name(output.name.removesuffix("_ckpt") + "_merged").mkdir()
if __name__ == "__main__":
    main()
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "stage.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def write(*, rates=(0.1, 0.2, 0.9), ranks=(1,), name="s.yaml", **keys):
    content = {"program": "stage.py", "method": "grid", "metric": {"name": "eval/loss", "goal": "minimize"}}
    content |= {"parameters": {"rate": {"values": list(rates)}, "rank": {"values": list(ranks)}}} | keys
    Path(name).write_text(yaml.safe_dump(content, sort_keys=False))


def run(*argv):
    try:
        run_sweep.main(["s.yaml", "--output_dir", "out", *argv])
    finally:
        runs.release(Path("out"))  # as the end of its process does


def test_two_sweeps_do_not_share_a_directory():
    write()
    run("--num_runs", "1")
    runs.hold(Path("out"))
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import run_sweep; from stoney_rl import cli; cli.run(run_sweep.main)"
    done = subprocess.run([sys.executable, "-c", code, "s.yaml", "--output_dir", "out"], capture_output=True, text=True)
    runs.release(Path("out"))
    assert done.returncode == 2 and "out: another process is writing there" in done.stderr
    assert list(table()) == [1]


def refusal(*argv):
    with pytest.raises(StoneyError) as error:
        run(*argv)
    return str(error.value)


def last():
    return {record["trial"]: record for record in records.read(Path("out/trials.jsonl"))}


def starts():
    return Path("starts").read_text().splitlines()


def models():
    return sorted(path.name for path in Path("out").iterdir() if path.is_dir())


def table():
    with open("out/table.csv", newline="") as file:
        return {int(row["trial"]): row for row in csv.DictReader(file)}


# What is written


def test_a_whole_sweep(capsys):
    write(command=["${env}", "${interpreter}", "${program}", "${args}", "--no-merge"])
    run()
    said = capsys.readouterr().out
    assert [record["results"]["eval/loss"] for record in last().values()] == pytest.approx([0.2, 0.1, 0.6])
    assert [row["rate"] for row in table().values()] == ["0.1", "0.2", "0.9"]
    assert float(table()[2]["eval/loss"]) == pytest.approx(0.1)
    summary = Path("out/summary.txt").read_text(encoding="utf-8")
    assert summary in said and "3 of 3 trials: 3 finished, 0 failed" in summary
    rows = [line.split()[0] for line in summary.splitlines() if re.match(r"\d+ +0\.", line)]
    assert rows == ["2", "1", "3"]  # best first
    assert Path("out/plot.png").read_bytes().startswith(b"\x89PNG")
    assert models() == ["trial-002"] and "the best model is out/trial-002" in said
    assert "out/trial-001: deleted, trial 2 is better" in said
    curve = json.loads(Path("out/trial-001.trainer_state.json").read_text())["log_history"]
    assert curve[-1]["eval_loss"] == pytest.approx(0.2)
    assert not [path for path in Path("out").iterdir() if path.name.startswith(".")]


def test_the_best_runs_command_runs(capsys):
    write(command=["${interpreter}", "${program}", "${args}", "--no-merge", "--resume"])
    run()
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("python "))
    assert command == "python stage.py --rate=0.2 --rank=1"
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True)
    assert json.loads(Path("out_ckpt/stage.json").read_text())["training"]["eval_loss"] == pytest.approx(0.1)
    assert Path("out_merged").is_dir()


def test_keep_all_keeps_every_model(capsys):
    write()
    run("--keep", "all")
    assert models() == [f"trial-00{number}{kind}" for number in (1, 2, 3) for kind in ("", "_merged")]
    assert "deleted" not in capsys.readouterr().out
    run()  # the best alone is wanted now
    assert models() == ["trial-002", "trial-002_merged"] and len(starts()) == 3


def test_the_best_so_far_is_never_deleted(monkeypatch):
    write(rates=(0.9, 0.2, 0.3, 0.1), command=["${interpreter}", "${program}", "${args}", "--no-merge"])
    kept = []
    tidy = run_sweep.tidy

    def watch(*args):
        kept.append(models())
        tidy(*args)
        kept.append(models())

    monkeypatch.setattr(run_sweep, "tidy", watch)
    run()
    one, two, three, four = (f"trial-00{number}" for number in (1, 2, 3, 4))
    assert kept == [[], [], [one], [one], [one, two], [two], [two, three], [three], [three, four], [three]]


def test_maximize_and_the_grids_limit():
    write(metric={"name": "eval/loss", "goal": "maximize"})
    run("--num_runs", "2")
    assert len(last()) == 2 and models() == ["trial-001", "trial-001_merged"]
    run("--num_runs", "3")  # more trials of the same sweep
    assert len(last()) == 3 and len(starts()) == 3 and models() == ["trial-003", "trial-003_merged"]


def test_a_diverged_trial_is_never_the_best():
    write(rates=(9, 0.1))
    run()
    assert last()[1]["results"]["eval/loss"] is None and models() == ["trial-002", "trial-002_merged"]
    assert "diverged" in Path("out/summary.txt").read_text() and table()[1]["eval/loss"] == ""


def test_trials_share_a_group(monkeypatch):
    Path("stage.py").write_text(PROGRAM.replace("def main():", "def main():\n    print(os.environ['WANDB_RUN_GROUP'])"))
    write(rates=(0.1,))
    run()
    assert "\nsweep-out\n" in Path("out/trial-001.log").read_text()
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    run("--overwrite")
    assert "\nmine\n" in Path("out/trial-001.log").read_text()


# What goes wrong


def test_a_failed_trial_is_recorded_and_tried_again(capsys):
    write(ranks=(13, 1), rates=(0.1, 0.2))
    run()
    failed = {trial: record["error"] for trial, record in last().items() if record["state"] == "failed"}
    assert failed == {1: "RuntimeError: no room for rank 13", 2: "RuntimeError: no room for rank 13"}
    assert table()[1]["error"] == failed[1]
    assert "2 failed: RuntimeError: no room for rank 13" in capsys.readouterr().out
    Path("room").touch()
    Path("starts").unlink()
    run()
    assert len(starts()) == 2 and last()[2]["error"] == "RuntimeError: still no room"


def test_no_trial_with_a_result_is_an_error():
    write(ranks=(13,))
    assert "no trial ended with a finite eval/loss" in refusal()
    assert len(table()) == 3


def test_a_killed_trial_is_told_from_a_failed_one():
    Path("stage.py").write_text(PROGRAM.replace("raise RuntimeError(", "os.kill(os.getpid(), 9), ("))
    write(ranks=(13, 1), rates=(0.1,))
    run()
    assert last()[1]["error"] == "killed by SIGKILL"


def test_a_metric_that_is_never_logged_stops_the_sweep_and_loses_nothing():
    write(metric={"name": "eval_loss"})
    message = "metric 'eval_loss' was never logged by trial 1; logged: train/loss, train/step, eval/loss, eval/step"
    assert message.replace(", eval/step", "") in refusal()
    assert message.replace(", eval/step", "") in refusal() and len(starts()) == 1  # at once, the second time
    write()
    run()
    assert len(starts()) == 3 and len(last()) == 3


def test_another_sweep_is_not_mixed_in(here):
    write()
    run()
    before = last()
    write(rates=(0.1, 0.5))
    assert "out: holds another sweep (parameters differ); choose another --output_dir" in refusal()
    assert "(method, seed, parameters differ)" in refusal("--method", "random", "--num_runs", "2")
    assert last() == before
    run("--overwrite")
    assert len(last()) == 2


def test_a_directory_that_is_no_sweep_is_left_alone():
    write()
    Path("out").mkdir()
    Path("out/thesis.tex").touch()
    for argv in ((), ("--overwrite",)):
        assert "out holds something else than a sweep" in refusal(*argv)
    assert [path.name for path in Path("out").iterdir()] == ["thesis.tex"] and not Path("starts").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_ends_the_trial_and_leaves_a_whole_table(number, code):
    write()
    run("--num_runs", "1")
    Path("slow").touch()
    command = [sys.executable, str(REPOSITORY / "run_sweep.py"), "s.yaml", "--output_dir", "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = Path("out/trial-002.log")
    child = wait_for(lambda: log.exists() and re.search(r"^waiting (\d+)$", log.read_text(), re.MULTILINE))
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == code and "Traceback" not in errors
    wait_for(lambda: not Path(f"/proc/{child[1]}").exists())
    assert list(table()) == [1] and list(last()) == [1]
    assert Path("out/trial-002.partial/checkpoint-1").exists()
    Path("slow").unlink()
    run()
    assert starts()[2:] == ["0.2 resumed True", "0.9 new True"] and models() == ["trial-002", "trial-002_merged"]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


# Beside the real agent


@pytest.fixture(scope="session")
def both(tmp_path_factory, warm_python):
    """The same file, by `wandb sweep` and `wandb agent` against the stub, and by run_sweep.py: (stub, directory).

    The file is the project's own with another model, other rows and a small grid; its command and metric stay.
    """
    directory = tmp_path_factory.mktemp("both")
    tiny.checkpoint(directory / "base", layers=1)
    data.write_jsonl(
        directory / "rows.jsonl",
        planted.PlantedLanguage(seed=0, num_lexemes=20).rows(rules_per_lexeme=3, templates_per_fact=1),
    )
    content = yaml.safe_load((REPOSITORY / "sweep.yaml").read_text(encoding="utf-8"))
    fixed = {"model": "base", "dataset": "rows.jsonl", "test_fraction": 0.2, "validation_fraction": 0.1, "max_steps": 2,
             "batch_size": 8, "lora_rank": 4, "dtype": "fp32", "use_rslora": True, "use_dora": False}  # fmt: skip
    content |= {"program": str(REPOSITORY / "train_lora.py"), "method": "grid"}
    content["parameters"] = {name: {"value": value} for name, value in fixed.items()} | {
        "learning_rate": {"values": [0.001, 0.01, 0.03]},
    }
    (directory / "sweep.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    (directory / "home").mkdir()
    programs = Path(sys.executable).parent
    env = {
        "PATH": f"{warm_python.parent}:{programs}:{os.environ['PATH']}",
        "HOME": str(directory / "home"),
        "OMP_NUM_THREADS": "1",
    }
    env |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}

    def call(*command, **more):
        done = subprocess.run(command, cwd=directory, env=env | more, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    with SweepStub() as stub, ThreadPoolExecutor() as pool:
        account = {"WANDB_BASE_URL": stub.url, "WANDB_API_KEY": "plantedkey" * 4}
        here = pool.submit(call, warm_python, str(REPOSITORY / "run_sweep.py"), "sweep.yaml", WANDB_MODE="disabled")
        said = call("wandb", "sweep", "sweep.yaml", **account)
        agent = re.search(r"wandb agent (\S+/stoney-rl/\S+)", said)[1]
        call("wandb", "agent", agent, **account)
        here.result()
        yield stub, directory


def canonical(parameters):
    return json.dumps(parameters, sort_keys=True)


@pytest.mark.slow
def test_the_agent_and_run_sweep_train_the_same_runs_and_find_the_same_best(both):
    stub, directory = both
    (given,) = (sweep["given"] for sweep in stub.sweeps.values())
    done = records.read(directory / "sweeps/sweep/trials.jsonl")
    assert sorted(map(canonical, given.values())) == sorted(canonical(record["parameters"]) for record in done)
    theirs = {canonical(given[name]): run["summary"]["eval/loss"] for name, run in stub.runs.items()}
    ours = {canonical(record["parameters"]): record["results"]["eval/loss"] for record in done}
    assert theirs == pytest.approx(ours, abs=1e-6)
    assert len(set(ours.values())) == 3  # else 'the same' would say little
    best = min(theirs, key=theirs.get)
    assert min(ours, key=ours.get) == best
    summary = (directory / "sweeps/sweep/summary.txt").read_text(encoding="utf-8")
    command = next(line for line in summary.splitlines() if line.startswith("python "))
    assert f"--learning_rate={json.loads(best)['learning_rate']} " in command + " " and "--no-merge" not in command


@pytest.mark.slow
def test_each_run_of_the_agent_joins_the_sweep_in_a_directory_of_its_own(both):
    stub, directory = both
    (name,) = stub.sweeps
    given = stub.sweeps[name]["given"]
    assert set(stub.runs) == set(given) and len(given) == 3
    for run in stub.runs.values():
        assert (run["sweep"], run["project"], run["exitcode"]) == (name, "stoney-rl", 0)
        assert (run["group"], run["display"]) == (f"sweep-{name}", f"{run['name']}_ckpt")
        config = {key: entry["value"] for key, entry in run["config"].items() if "value" in entry}
        assert given[run["name"]].items() <= config.items()
        assert len([row for row in run["history"] if "eval/loss" in row]) == 2
    written = sorted(path.name for path in (directory / "sweeps" / name).iterdir())
    assert written == [f"{run}_ckpt" for run in sorted(given)]  # no merged models
    stages = [json.loads((directory / "sweeps" / name / f"{run}_ckpt/stage.json").read_text()) for run in given]
    assert [stage["wandb"]["run_id"] for stage in stages] == list(given)
    assert [artifact["name"] for artifact in stub.artifacts] == [f"{run}_ckpt" for run in given]
