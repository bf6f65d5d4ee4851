"""The stages tied together by W&B: artifacts, config and links of whole pipelines, what faults and kills leave, secrets.

The server is a stub on loopback; the stages are the real scripts on a tiny model, the language is an invented one.
"""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from complete import also_complete
from wandb_stub import WandbStub

import analyze_with_tlens
import compare_reasoning
import evaluate_model
import inspect_hf_dataset
import prepare_base_model
import train_grpo
import train_lora
import wandb_sample
from stoney_rl import artifacts, checkpoints, cli, data, offline, planted, tracking
from stoney_rl.errors import StoneyError

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in REPOSITORY.glob("*.py"))
KEY = "plantedkey" * 4  # 40 characters, as wandb wants them
SECRETS = {"WANDB_API_KEY": KEY, "HF_TOKEN": "hf_" + "PlantedToken" * 3, "MY_SERVICE_PASSWORD": "planted pass word 17"}
GROUP = "one-pipeline"
STEPS = list(range(1, 7))
SFT = [
    *("--batch_size", "8", "--max_steps", "6", "--save_steps", "2", "--eval_steps", "0", "--learning_rate", "1e-2"),
    *("--lora_rank", "2", "--output_dir", "sft_ckpt"),
]
EVALUATION = ["--num_samples", "4", "--max_new_tokens", "4", "--resamples", "100"]


def clean_environment(patch: pytest.MonkeyPatch, home: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB", "HF_", "RANK"))]:
        patch.delenv(name)
    for name, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "0"}.items():
        patch.setenv(name, value)
    patch.setenv("HOME", str(home))
    patch.setattr(tracking, "CALL_SECONDS", 1.0)
    patch.setattr(tracking, "LOST_SECONDS", 2.0)
    patch.setattr(tracking, "SHOWN_SECONDS", 2.0)


@pytest.fixture(scope="module")
def stub():
    import wandb

    wandb.teardown()  # what other tests of this process have set up knows another server
    with WandbStub() as server:
        yield server
    wandb.teardown()


@pytest.fixture(scope="module")
def pipeline(stub, tmp_path_factory):
    """The folder of a pipeline that ran online, stage after stage, in one group."""
    place = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        clean_environment(patch, place)
        patch.chdir(place)
        for name, value in {"WANDB_BASE_URL": stub.url, "WANDB_API_KEY": KEY, "WANDB_RUN_GROUP": GROUP}.items():
            patch.setenv(name, value)
        tiny.checkpoint(Path("tiny"), layers=1)
        rows = planted.PlantedLanguage(seed=0, num_lexemes=20).rows(rules_per_lexeme=3, templates_per_fact=1)
        data.write_jsonl(Path("rows.jsonl"), rows)
        prepare_base_model.main(["--source", "tiny", "--output_dir", "base"])
        inspect_hf_dataset.main([
            *("--dataset", "rows.jsonl", "--output_dir", "prepared"),
            *("--test_fraction", "0.2", "--validation_fraction", "0.2"),
        ])  # fmt: skip
        train_lora.main(["--model", "base", "--dataset", "prepared", *SFT])
        train_grpo.main([
            *("--lora_path", "sft_merged", "--dataset", "prepared", "--output_dir", "grpo", "--lora_rank", "2"),
            *("--batch_size", "4", "--group_size", "2", "--max_steps", "1", "--eval_steps", "0", "--eval_prompts", "2"),
            *("--preflight_prompts", "0", "--probe_samples", "4", "--allow_broken_reward"),
            *("--max_completion_length", "4"),
        ])  # fmt: skip
        evaluate_model.main(["--model_path", "grpo", "--baseline", "base", *EVALUATION])
        analyze_with_tlens.main([
            *("--model_path", "grpo", "--tasks", "attention", "--random_models", "0"),
            *("--num_pairs", "4", "--families", "lookup"),
        ])  # fmt: skip
        compare_reasoning.main([
            *("--model_path", "grpo", "--compare", "sft_merged", "--families", "english", "arithmetic"),
            *("--controls", "--quick", "--num_pairs", "16", "--random_sets", "2"),
        ])  # fmt: skip
    return place


@pytest.fixture
def place(pipeline, stub, tmp_path, monkeypatch):
    """An empty working directory on the machine of someone who can reach the server."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    clean_environment(monkeypatch, tmp_path / "home")
    monkeypatch.setenv("WANDB_BASE_URL", stub.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def run_of(stub: WandbStub, directory: Path) -> dict:
    record = directory / (evaluate_model.RESULTS_FILE if directory.parent.name == "evaluation" else "stage.json")
    return stub.runs[json.loads(record.read_text())["wandb"]["run_id"]]


def config_of(run: dict) -> dict:
    return {name: entry["value"] for name, entry in run["config"].items() if name != "_wandb"}


def graph(stub: WandbStub, group: str) -> set[tuple[str, str, str]]:
    """(artifact, 'into' or 'out of', stage) for every link of the group's runs; tables, W&B's own artifacts, left out."""
    stage = {name: run["job_type"] for name, run in stub.runs.items() if run["group"] == group}
    used = {(reference.partition(":")[0], "into", stage[run]) for run, reference in stub.used if run in stage}
    made = {
        (each["name"], "out of", stage[each["run"]])
        for each in stub.artifacts
        if each["run"] in stage and each["type"] != "run_table" and each["state"] == "COMMITTED"
    }
    return used | made


def trained_steps(run: dict) -> list[int]:
    return [row["train/global_step"] for row in run["history"] if "train/loss" in row]


# Names, types, config, links


def test_every_stage_is_in_one_group_and_the_graph_leads_from_data_and_base_to_the_results(pipeline, stub):
    assert graph(stub, GROUP) == {
        ("base", "out of", "prepare_base_model"),
        ("prepared", "out of", "inspect_hf_dataset"),
        *((name, "into", "train_lora") for name in ("base", "prepared")),
        *((name, "out of", "train_lora") for name in ("sft_ckpt", "sft_merged")),
        *((name, "into", "train_grpo") for name in ("sft_merged", "prepared")),
        *((name, "out of", "train_grpo") for name in ("grpo_ckpt", "grpo")),
        # GRPO's --baseline base is the model that it started from
        *((name, "into", "evaluate_model") for name in ("grpo", "sft_merged", "prepared")),
        ("grpo-test-evaluation", "out of", "evaluate_model"),
        *((name, "into", "analyze_with_tlens") for name in ("grpo", "prepared")),
        ("grpo-analysis", "out of", "analyze_with_tlens"),
        *((name, "into", "compare_reasoning") for name in ("grpo", "sft_merged", "prepared")),
        ("grpo-comparison", "out of", "compare_reasoning"),
    }
    types = {each["name"]: each["type"] for each in stub.artifacts if each["type"] != "run_table"}
    assert types == {
        "base": "base", "prepared": "dataset", "sft_ckpt": "adapter", "sft_merged": "model", "grpo_ckpt": "adapter",
        "grpo": "model", "grpo-test-evaluation": "evaluation", "grpo-analysis": "analysis",
        "grpo-comparison": "comparison",
    }  # fmt: skip


def test_every_type_that_a_script_logs_or_takes_is_in_the_table():
    logged = set()
    for script in SCRIPTS:
        for node in ast.walk(ast.parse((REPOSITORY / script).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "artifact" and len(node.args) == 3:
                logged.add(ast.unparse(node.args[1]))
    assert logged - {"stage['stage']"} == {
        repr(kind) for kind in artifacts.TYPES if kind not in ("dataset", "inspection")
    }
    assert {inspect_hf_dataset.prepared.STAGE, inspect_hf_dataset.REPORT_STAGE} == {"dataset", "inspection"}
    taken = {*artifacts.ANY_MODEL, *artifacts.ROWS, *artifacts.REWARD_MODELS}
    assert taken <= set(artifacts.TYPES) and not taken & set(tracking.REPORT_TYPES)


def test_the_same_things_have_the_same_names_in_every_stages_config(pipeline, stub):
    runs = {run["job_type"]: config_of(run) for run in stub.runs.values() if run["group"] == GROUP}
    assert len(runs) == 7
    for stage, config in runs.items():
        assert set(tracking.COMMON_CONFIG) <= set(config) and config["stage"] == stage
        assert config["git_commit"] == checkpoints.git_commit() and config["world_size"] == 1
        assert config["versions"]["torch"] and not any("error" in name for name in config)
    of_data = {stage: config for stage, config in runs.items() if stage != "prepare_base_model"}
    for key in ("data_sha256", "split_seed", "test_fraction", "validation_fraction"):
        assert len({config[key] for config in of_data.values()}) == 1 and None not in {c[key] for c in of_data.values()}
    assert [runs[stage]["model"] for stage in list(runs)[2:]] == ["base", "sft_merged", *3 * ["grpo"]]
    assert runs["train_grpo"]["dataset"] == runs["evaluate_model"]["dataset"] == "prepared"


def test_runs_and_reports_link_to_the_runs_that_they_come_from(pipeline, stub):
    url = {
        name: checkpoints.read_stage(pipeline / name)["wandb"]["url"]
        for name in ("base", "prepared", "sft_merged", "grpo")
    }
    assert config_of(run_of(stub, pipeline / "sft_ckpt"))["parent_runs"] == [url["base"], url["prepared"]]
    assert config_of(run_of(stub, pipeline / "evaluation/grpo-test"))["parent_runs"] == [
        url["grpo"], url["prepared"], url["sft_merged"],
    ]  # fmt: skip
    summary = (pipeline / "evaluation/grpo-test/summary.txt").read_text(encoding="utf-8")
    pages = [pipeline / folder / "grpo/report.html" for folder in ("analysis", "comparison")]
    for page in (page.read_text(encoding="utf-8") for page in pages):
        assert all(url[name] in summary and url[name] in page for name in ("grpo", "sft_merged", "base"))


# --wandb_artifact


def test_a_stage_starts_from_artifacts_where_neither_model_nor_data_nor_parents_are(place, stub, capsys):
    evaluate_model.main([
        *("--wandb_artifact", "grpo", "stub-entity/stoney-rl/prepared:v0", "--output_dir", "grpo-test", *EVALUATION),
    ])  # fmt: skip
    root = Path("artifacts/stub-entity/stoney-rl")
    results = json.loads(Path("grpo-test/results.json").read_text())
    assert results["arguments"]["model_path"] == str(root / "grpo-v0")
    assert results["arguments"]["dataset"] == str(root / "prepared-v0")
    run = run_of_results(stub, results)
    assert run["group"] == GROUP  # inherited through the artifact
    assert config_of(run)["used_artifacts"] == ["stub-entity/stoney-rl/grpo:v0", "stub-entity/stoney-rl/prepared:v0"]
    assert {used for user, used in stub.used if user == run["name"]} == {"grpo:v0", "prepared:v0"}
    assert checkpoints.lineage(root / "grpo-v0")[1] == "sft_merged"  # which is not here
    assert "grpo: downloading stub-entity/stoney-rl/grpo:v0" in capsys.readouterr().out


def run_of_results(stub: WandbStub, results: dict) -> dict:
    return stub.runs[results["wandb"]["run_id"]]


@pytest.fixture
def versions(stub, place):
    """Artifact 'tuned', a model, in two versions, of which the first is the best."""
    stub.artifacts[:] = [each for each in stub.artifacts if each["name"] != "tuned"]
    Path("tuned").mkdir()
    for number in range(2):
        Path("tuned/model.safetensors").write_bytes(bytes([number]) * 1000)
        with tracking.start("train_lora", {}) as tracker:
            tracker.artifact("tuned", "model", "tuned", aliases=["best"] if number == 0 else [])
    shutil.rmtree("tuned")
    return stub


def forget_key(monkeypatch) -> None:
    import wandb

    monkeypatch.delenv("WANDB_API_KEY")
    wandb.teardown()  # it keeps the settings that it first saw


TAKES = {"model": artifacts.WHOLE_MODELS, "dataset": artifacts.ROWS}


def test_aliases_and_versions_and_what_is_here_already(versions, monkeypatch):
    root = Path("artifacts/stub-entity/stoney-rl")
    assert artifacts.fetch("tuned:best", TAKES) == (root / "tuned-v0", "model")
    assert artifacts.fetch("tuned", TAKES)[0] == root / "tuned-v1"
    assert artifacts.fetch("stoney-rl/tuned:v1", TAKES)[0] == root / "tuned-v1"
    for number in range(2):
        assert (root / f"tuned-v{number}/model.safetensors").read_bytes() == bytes([number]) * 1000
    # Roll the alias back and forth: what it means now is asked for, and nothing is downloaded twice.
    monkeypatch.setattr(artifacts, "_download", lambda *_: pytest.fail("downloaded again"))
    for artifact in versions.artifacts:
        if artifact["name"] == "tuned":
            artifact["aliases"] = ["best"] if artifact["version"] == 1 else []
    assert artifacts.fetch("tuned:best", TAKES)[0] == root / "tuned-v1"
    assert checkpoints.tracked(str(root / "tuned-v1"))["artifact"] == "stub-entity/stoney-rl/tuned:v1"
    # Offline an alias is what it was when it was downloaded.
    assert artifacts.fetch("tuned:best", TAKES, mode="offline")[0] == root / "tuned-v0"
    with pytest.raises(
        StoneyError, match="tuned:v7: offline, and not downloaded before; run once with --wandb_mode onl"
    ):
        artifacts.fetch("tuned:v7", TAKES, mode="offline")


def test_an_artifact_that_cannot_be_had_is_one_line_and_leaves_nothing(versions, monkeypatch):
    def refused(name: str, said: str, **options) -> None:
        with pytest.raises(StoneyError, match=said) as caught:
            artifacts.fetch(name, TAKES, **options)
        assert "\n" not in str(caught.value) and str(caught.value).startswith(f"--wandb_artifact {name}: ")
        assert [path for path in Path().rglob("artifacts/*/*/*") if not path.name.endswith(".lock")] == []

    refused("no name", "expected name, name:alias")
    refused("tuned:worst", "stub-entity/stoney-rl does not give it .*'tuned:worst' not found")
    refused(
        "grpo-test-evaluation", r"of type evaluation; this stage takes model or base \(--model\), dataset \(--dataset\)"
    )
    versions.behaviour = 500
    refused("tuned", "answers HTTP 500; try again later")
    versions.behaviour = 401
    refused("tuned", "refuses the key")
    versions.behaviour = "ok"
    versions.storage_says["model.safetensors"] = 500  # which the client repeats for half an hour
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "STALL_SECONDS", 4.0)
        refused("tuned", "did not arrive whole .*nothing came for 4 s")
    versions.storage_says["model.safetensors"] = 404
    refused("tuned", "did not arrive whole")
    versions.storage_says.clear()
    stored = next(
        path for path in versions.storage if path.endswith("model.safetensors") and versions.storage[path][:1] == b"\1"
    )
    whole = versions.storage[stored]
    versions.storage[stored] = whole[:500]
    refused("tuned", "did not arrive whole .*Digest mismatch")
    versions.storage[stored] = whole
    forget_key(monkeypatch)
    refused("tuned", "no key found")


def test_an_artifact_and_the_flag_that_it_fills_are_too_much(versions):
    parser = evaluate_model.build_parser()
    with pytest.raises(StoneyError, match="tuned: would set --model_path, which was given too"):
        cli.parse_stage(parser, ["--wandb_artifact", "tuned", "--model_path", "mine"])
    with pytest.raises(StoneyError, match="tuned:v0: --model_path is tuned already"):
        cli.parse_stage(parser, ["--wandb_artifact", "tuned", "tuned:v0"])
    assert cli.parse_stage(parser, ["--wandb_artifact", "tuned"]).model_path.endswith("tuned-v1")


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name not in ("wandb_sample.py", "run_sweep.py")])
def test_every_stage_takes_artifacts_for_flags_that_it_has(script):
    parser = __import__(script.removesuffix(".py")).build_parser()
    flags = {action.dest for action in parser._actions}
    assert "wandb_artifact" in flags and parser.artifact_inputs and set(parser.artifact_inputs) <= flags


# Faults of the server, while a model is trained


@pytest.fixture(scope="module")
def weights(pipeline):
    return sha256(pipeline / "sft_ckpt/adapter_model.safetensors")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Each breaks the server, and gives what happens at which step, and how the server is mended when training has ended.


def down_at_the_start(stub):
    stub.stop()
    return {}, stub.start


def errors_for_a_while(stub):
    return {2: lambda: setattr(stub, "behaviour", 500), 4: lambda: setattr(stub, "behaviour", "ok")}, lambda: None


def errors_to_the_end(stub):
    return {2: lambda: setattr(stub, "behaviour", 500)}, lambda: setattr(stub, "behaviour", "ok")


def turned_away_for_a_while(stub):
    """A client that is told 403 gives up its stream for good, and ends as if all were well."""
    return {2: lambda: setattr(stub, "stream_says", 403)}, lambda: setattr(stub, "stream_says", "ok")


def slow(stub):
    stub.delay = 0.2
    return {}, lambda: setattr(stub, "delay", 0.0)


def dies(stub):
    return {2: stub.stop}, stub.start


def dies_and_comes_back(stub):
    return {2: stub.stop, 4: stub.start}, lambda: None


@pytest.mark.parametrize(
    ("fault", "lost_at_the_end"),
    [
        (down_at_the_start, True),
        also_complete(errors_for_a_while, False),
        also_complete(turned_away_for_a_while, True),
        also_complete(slow, False),
        also_complete(errors_to_the_end, True),
        also_complete(dies, True),
        pytest.param(dies_and_comes_back, False, marks=pytest.mark.slow),
    ],
)
def test_a_fault_of_the_server_changes_no_weight_and_loses_no_history(
    fault, lost_at_the_end, pipeline, weights, place, stub, monkeypatch, capsys
):
    for name in ("base", "prepared"):
        shutil.copytree(pipeline / name, name)
    then, mend = fault(stub)
    log = tracking.Tracker.log

    def log_and_break(self, metrics, step=None):
        log(self, metrics, step)
        if step in then and "train/loss" in metrics:
            then.pop(step)()

    monkeypatch.setattr(tracking.Tracker, "log", log_and_break)
    try:
        assert train_lora.main(["--model", "base", "--dataset", "prepared", *SFT]) is None  # exit code 0
    finally:
        mend()
    out = capsys.readouterr().out
    run_id = checkpoints.read_stage(Path("sft_ckpt"))["wandb"]["run_id"]
    before = sorted(set(trained_steps(stub.run(run_id))))
    assert (before != STEPS) == lost_at_the_end and ("python wandb_sample.py --sync" in out) == lost_at_the_end
    assert wandb_sample.main(["--sync"]) == 0
    after = trained_steps(stub.run(run_id))
    assert sorted(set(after)) == STEPS and after[-1] == STEPS[-1]
    made = {each["name"] for each in stub.artifacts if each["run"] == run_id and each["state"] == "COMMITTED"}
    assert made == {"sft_ckpt", "sft_merged"}
    assert {used for user, used in stub.used if user == run_id} == {"base:v0", "prepared:v0"}
    assert wandb_sample.main(["--sync"]) == 0 and trained_steps(stub.run(run_id)) == after  # nothing is sent twice
    assert sha256(Path("sft_ckpt/adapter_model.safetensors")) == weights
    print(json.dumps({"fault": fault.__name__, "steps": len(STEPS), "at_the_server": before, "after_sync": after}))


# Kills, offline runs, secrets: the real commands in processes of their own

KILLED = """
import os, sys
import train_lora
from stoney_rl import tracking
log = tracking.Tracker.log
def log_and_die(self, metrics, step=None):
    log(self, metrics, step)
    if step == 5:
        os.kill(os.getpid(), 9)
tracking.Tracker.log = log_and_die
train_lora.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def interrupted(pipeline, tmp_path_factory, warm_python):
    """(folder, what was printed) of an SFT run that was killed after 5 of 6 steps and resumed, and its evaluation, all
    offline, with secrets in .env."""
    root = tmp_path_factory.mktemp("interrupted")
    work = root / "work"
    (root / "home").mkdir()
    work.mkdir()
    for name in ("base", "prepared"):
        shutil.copytree(pipeline / name, work / name)
    text = "".join(f'{name}="{value}"\n' for name, value in SECRETS.items())
    (work / ".env").write_text(text + "WANDB_MODE=offline\nWANDB_RUN_GROUP=later\n")
    env = {"PATH": os.environ["PATH"], "HOME": str(root / "home"), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1",
           "HF_HUB_OFFLINE": "1"}  # fmt: skip

    def run(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run([warm_python, *command], cwd=work, env=env, capture_output=True, text=True, timeout=300)

    sft = ["--model", "base", "--dataset", "prepared", *SFT]
    done = [
        run("-c", KILLED, *sft),
        run(str(REPOSITORY / "train_lora.py"), *sft, "--resume"),
        run(str(REPOSITORY / "evaluate_model.py"), "--model_path", "sft_merged", *EVALUATION),
    ]
    assert [each.returncode for each in done] == [-9, 0, 0], "\n".join(each.stderr[-2000:] for each in done)
    return root, "".join(each.stdout + each.stderr for each in done)


def test_a_key_in_the_env_file_is_nowhere_else(interrupted):
    root, said = interrupted
    files = [path for path in root.rglob("*") if path.is_file() and path != root / "work/.env"]
    kinds = {path.suffix for path in files}
    assert {".wandb", ".json", ".safetensors", ".bin", ".txt", ".png", ".log"} <= kinds
    for name, secret in SECRETS.items():
        assert secret not in said, name
        assert [str(path) for path in files if secret.encode() in path.read_bytes()] == [], name


def test_offline_runs_are_synced_in_order_and_linked_as_online_ones(
    interrupted, pipeline, stub, place, monkeypatch, capsys
):
    root, _ = interrupted
    shutil.copytree(root / "work", "there", symlinks=True)
    # The artifacts' files are looked for where they lay: in root/work, which is still there.
    monkeypatch.chdir("there")
    Path(".env").unlink()
    run_id = checkpoints.read_stage(Path("sft_ckpt"))["wandb"]["run_id"]
    parts = sorted(Path("wandb").glob(f"offline-run-*-{run_id}"))
    assert len(parts) == 2  # one for each start
    os.utime(parts[0] / f"run-{run_id}.wandb")  # it has no end, and might be running
    assert wandb_sample.main(["--sync"]) == 0
    assert f"{parts[0].name}: still running, left alone" in capsys.readouterr().out
    stub.runs.pop(run_id)
    for path in Path("wandb").glob("*/*.synced"):
        path.unlink()
    os.utime(parts[0] / f"run-{run_id}.wandb", (0, 0))
    assert wandb_sample.main(["--sync"]) == 0
    run = stub.runs[run_id]
    # checkpoint-4 was the last one: step 5 was done twice, and none is missing
    assert trained_steps(run) in ([1, 2, 3, 4, 5, 5, 6], [1, 2, 3, 4, 5, 6])
    assert run["exitcode"] == 0 and run["group"] == "later"
    stages = ("train_lora", "evaluate_model")
    expected = {
        (name.replace("grpo", "sft_merged"), way, stage) for name, way, stage in graph(stub, GROUP) if stage in stages
    }
    expected.discard(("sft_merged-test-evaluation", "into", "evaluate_model"))
    assert graph(stub, "later") == expected
    sent = b"".join(stub.bodies)
    assert not any(secret.encode() in sent for secret in SECRETS.values())


def test_a_killed_online_run_is_completed_before_it_goes_on(place, stub):
    """The server did not get what the killed process had in hand; what its file holds is sent before the resumed part."""
    body = f"""
        import os, sys, time
        sys.path.insert(0, {str(REPOSITORY)!r})
        from stoney_rl import tracking
        tracker = tracking.start("sft", {{}}, resume_id="killed")
        for step in (1, 2, 3):
            tracker.log({{"train/loss": 1.0}}, step)
        time.sleep(3 * tracking.FLUSH_SECONDS)
        os.kill(os.getpid(), 9)
    """
    script = "\n".join(line.strip() if "step)" not in line else "    " + line.strip() for line in body.splitlines())
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60).returncode == -9
    assert trained_steps(stub.run("killed")) in ([], [1, 2, 3])
    tracker = tracking.start("sft", {}, resume_id="killed")
    for step in (3, 4):
        tracker.log({"train/loss": 1.0}, step)
    tracker.finish()
    run = stub.runs["killed"]
    assert trained_steps(run)[-5:] == [1, 2, 3, 3, 4] and run["exitcode"] == 0
    assert [row["_step"] for row in run["history"]] == sorted({row["_step"] for row in run["history"]})
    assert offline.sync_command(Path("wandb").absolute()) == "python wandb_sample.py --sync"


def test_a_sync_that_cannot_be_says_why(place, stub, monkeypatch, capsys):
    with pytest.raises(StoneyError, match="nowhere: no such folder; runs are kept in ./wandb"):
        wandb_sample.main(["--sync", "nowhere"])
    stub.behaviour = 500
    assert wandb_sample.main(["--sync"]) == wandb_sample.EXIT_NO_SERVER
    stub.behaviour = "ok"
    # An input that nobody uploaded: the run arrives, the missing link is told, and tried again the next time.
    with tracking.start("evaluate_model", {}, mode="offline") as tracker:
        tracker.use_artifact("never-uploaded:v0")
    capsys.readouterr()
    for _ in range(2):
        assert wandb_sample.main(["--sync"]) == wandb_sample.EXIT_MISSING
        assert re.search(r"not linked to never-uploaded:v0: .*not found", capsys.readouterr().out)
    assert stub.runs[tracker.run_id]["exitcode"] == 0
    damaged = next(tracker.directory.glob("*.wandb"))
    damaged.write_bytes(damaged.read_bytes()[:-3] + b"xyz")
    assert wandb_sample.main(["--sync"]) == wandb_sample.EXIT_MISSING and "is damaged" in capsys.readouterr().out
    forget_key(monkeypatch)
    assert wandb_sample.main(["--sync"]) == wandb_sample.EXIT_NO_KEY
