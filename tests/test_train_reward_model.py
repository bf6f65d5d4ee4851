"""train_reward_model.py from end to end on a tiny model, what a reward-model directory promises, and the measures.

All words are invented.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import tiny

import train_reward_model
from stoney_rl import checkpoints, corpus, models, planted, prepared
from stoney_rl.data import Row, write_jsonl
from stoney_rl.errors import StoneyError
from stoney_rl.rewards import reward_model
from stoney_rl.rewards.composite import Task
from stoney_rl.rewards.preferences import Pair
from stoney_rl.rewards.reward_model import find_reward_model, load_reward_model, measure

REPOSITORY = Path(__file__).resolve().parent.parent
# 54 training pairs, 8 an update: checkpoints at steps 4, 8 and 12, inside of epochs of 7 updates.
ARGUMENTS = [
    *("--model", "base", "--dataset", "pairs.jsonl", "--test_fraction", "0.25", "--validation_fraction", "0.1"),
    *("--batch_size", "8", "--max_steps", "40", "--save_steps", "4", "--eval_steps", "10", "--learning_rate", "1e-2"),
    *("--lora_rank", "4", "--output_dir", "reward", "--wandb_mode", "disabled"),
]
FILES = {
    "chat_template.jinja",
    "config.json",
    "model.safetensors",
    "predictions.jsonl",
    "quarantine.jsonl",
    "results.json",
    "results.png",
    "split.json",
    "stage.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
}


def human_pairs() -> list[dict]:
    """84 judgements, as a person's form would write them: better answers say tâlo, worse ones mîva."""
    return [
        {
            "prompt": f"Question {number}: which word is it?",
            "chosen": f"It is tâlo{' indeed' * (number % 3)}.",
            "rejected": [{"role": "assistant", "content": f"It is mîva{' indeed' * (number % 4)}."}],
            "kind": "wrong word" if number % 2 else "wrong word, again",
            "annotator": "A",
        }
        for number in range(84)
    ]


@pytest.fixture(scope="module")
def environment():
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("WANDB", "HF_"))]:
            patch.delenv(name)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield patch


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny base model, judgements with one bad line among them, and rows with a lexicon and a prepared directory."""
    directory = tmp_path_factory.mktemp("inputs")
    tiny.checkpoint(directory / "base", layers=1)
    config = read(directory / "base/config.json") | {"pad_token_id": None}  # as in most language models
    checkpoints.write_json(directory / "base/config.json", config)
    lines = [json.dumps(pair, ensure_ascii=False) for pair in human_pairs()]
    lines.insert(3, '{"prompt": "a judgement without answers"}')
    (directory / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    language = planted.PlantedLanguage(0, 30)
    write_jsonl(directory / "rows.jsonl", language.rows(rules_per_lexeme=2, templates_per_fact=1))
    planted.write_lexicon(directory / "lexicon.jsonl", language.lexicon())
    made = corpus.prepare(directory / "rows.jsonl", test_fraction=0.2, validation_fraction=0.1)
    with checkpoints.staged(directory / "prepared") as work:
        prepared.write(work, made.rowset, made.split)
        shutil.copy(directory / "lexicon.jsonl", work)
        stage = {"stage": prepared.STAGE, "data": made.describe(), "files": prepared.file_hashes(work)}
        checkpoints.write_json(work / checkpoints.STAGE_FILE, stage)
    return directory


@pytest.fixture
def here(inputs, environment, tmp_path, monkeypatch):
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*argv):
    train_reward_model.main([*ARGUMENTS, *argv])


def refusal(*argv):
    with pytest.raises(StoneyError) as error:
        train(*argv)
    return str(error.value)


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def names(directory):
    return {path.name for path in Path(directory).iterdir()}


def weights(directory):
    from safetensors.torch import load_file

    return load_file(Path(directory) / "model.safetensors")


def same_weights(one, other):
    import torch

    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def curve(directory):
    logs = read(Path(directory) / "trainer_state.json")["log_history"]
    clock = ("runtime", "per_second")
    return [{key: log[key] for key in log if not key.endswith(clock)} for log in logs if "train_loss" not in log]


# One whole run on a human file as it is.


@pytest.fixture(scope="module")
def trained(inputs, environment, tmp_path_factory):
    """A finished run, to be read only, and the probe scores of the model that was in the trainer's memory."""
    from stoney_rl import training

    directory = tmp_path_factory.mktemp("trained")
    in_memory = {}
    with pytest.MonkeyPatch.context() as patch:
        shutil.copytree(inputs, directory, dirs_exist_ok=True)
        patch.chdir(directory)
        check = training.check_saved_adapter

        def watched(model, where):
            in_memory["scores"] = checkpoints.probe_logits(model)
            check(model, where)

        patch.setattr(training, "check_saved_adapter", watched)
        train("--dtype", "fp32")
    return directory / "reward", in_memory["scores"]


def test_what_is_written(trained):
    directory, _ = trained
    assert names(directory) == FILES
    assert not directory.with_name("reward.partial").exists()


def test_it_learns_a_preference_that_can_be_learned(trained):
    results = read(trained[0] / "results.json")
    found = results["groups"][results["headline"]]
    assert results["headline"] == "all" and found["n"] == 21
    assert found["accuracy"]["value"] > 0.9 and found["accuracy"]["low"] > 0.7
    assert {kind: entry["n"] for kind, entry in found["kinds"].items()} == {
        kind: sum(line["kind"] == kind for line in predictions(trained[0]))
        for kind in ("wrong word", "wrong word, again")
    }
    assert found["above_length"]["value"] > 0.2 and found["calibration"]["ece"] < 0.3


def predictions(directory):
    return [json.loads(line) for line in (directory / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_test_pair_keeps_its_scores_and_its_annotator(trained):
    lines = predictions(trained[0])
    found = read(trained[0] / "results.json")["groups"]["all"]
    assert len(lines) == found["n"] and {line["annotator"] for line in lines} == {"A"}
    right = sum(line["score_chosen"] > line["score_rejected"] for line in lines)
    assert right / len(lines) == pytest.approx(found["accuracy"]["value"])


def test_the_bad_line_is_set_aside(trained):
    (line,) = (trained[0] / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    bad = json.loads(line)
    assert (bad["source"], bad["line"]) == ("pairs.jsonl", 4) and bad["reason"].startswith("missing column: chosen")
    assert read(trained[0] / "stage.json")["data"]["quarantined"] == 1


def test_stage_json_tells_how_it_was_made(trained):
    stage = find_reward_model(trained[0])
    assert (stage["stage"], stage["kind"], stage["base_model"], stage["seed"]) == ("reward", "reward model", "base", 0)
    fingerprint = checkpoints.fingerprint(tiny.model(layers=1))["sha256"]
    assert stage["parent"] == {"path": "base", "fingerprint": fingerprint}
    assert stage["data"]["split_by"] == "prompt" and stage["data"]["pairs"] == {
        "train": 55,
        "validation": 8,
        "test": 21,
    }
    assert stage["data"]["split"] == {"split_seed": 0, "test_fraction": 0.25, "validation_fraction": 0.1}
    assert stage["training"]["steps"] == 40 and stage["reward"]["pairs"] == 55
    assert {
        "created",
        "command",
        "arguments",
        "versions",
        "git_commit",
        "wandb",
        "identity",
        "precision",
    } <= stage.keys()
    record = read(trained[0] / "split.json")
    assert len(record["training_rows"]) == 55 and record["certificate"]["overlaps"] == {"prompts_in_two_splits": 0}


def test_what_was_saved_is_what_was_trained(trained):
    import torch

    source = models.ModelSource("model", str(trained[0]))
    model = reward_model.load_scorer(source, torch.float32)
    assert (checkpoints.probe_logits(model) - trained[1]).abs().max() < 1e-5
    assert trained[1].abs().max() > 1e-3
    assert checkpoints.fingerprint(model) == read(trained[0] / "stage.json")["fingerprint"]
    assert (model.config.num_labels, model.config.pad_token_id) == (1, 0)


def test_files_that_hold_another_model_are_not_published(here, monkeypatch):
    from safetensors.torch import save_file
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    def spoiled(self, directory, **options):
        save(self, directory, **options)
        if (Path(directory) / "model.safetensors").exists():
            held = weights(directory)
            save_file(held | {"score.weight": held["score.weight"] * 1.01}, Path(directory) / "model.safetensors",
                      metadata={"format": "pt"})  # fmt: skip

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spoiled)
    assert "the saved weights give other scores than the merged model; is the disk full?" in refusal("--max_steps", "1")
    assert not Path("reward").exists()


# The reward, as GRPO and probe_rewards.py call it.


@pytest.fixture(scope="module")
def reward(trained):
    return load_reward_model(trained[0], batch_size=3)


def test_rewards_lie_in_their_range_and_order_the_answers(reward):
    texts = ["It is tâlo.", "It is mîva.", "tâlo", "x" * 90, "<think>mîva</think>It is tâlo."]
    values = reward(["Question 200: which word is it?"] * len(texts), texts)
    assert all(-1 <= value <= 1 for value in values)
    assert values[0] > 0.3 and values[1] < -0.3
    assert values[4] == pytest.approx(values[0], abs=1e-5)  # only what follows the trace is the answer


def test_the_reward_is_tanh_of_the_standardised_score(reward, trained):
    line = predictions(trained[0])[0]
    scale = read(trained[0] / "stage.json")["reward"]
    (value,) = reward([line["prompt"]], [line["chosen"]])
    assert value == pytest.approx(math.tanh((line["score_chosen"] - scale["mean"]) / scale["scale"]), abs=1e-5)
    assert reward_model.RewardModel(None, None, mean=1.0, scale=2.0).squash(3.0) == pytest.approx(0.761594, abs=1e-6)


def test_prompts_may_be_tasks_texts_or_messages(reward):
    question = "Question 200: which word is it?"
    turns = [{"role": "user", "content": question}]
    row = Row("1", "f:1", turns, [{"role": "assistant", "content": "It is tâlo."}], [], {})
    plain = Task("1", question, "It is tâlo.", (), frozenset())
    values = reward([question, turns, Task.of(row), plain], ["It is tâlo."] * 4)
    assert values == pytest.approx([values[0]] * 4, abs=1e-6)
    earlier = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}, *turns]
    assert reward([earlier], ["It is tâlo."]) != pytest.approx(values[:1], abs=1e-6)


def test_it_serves_as_a_reward_plug_in(reward):
    from stoney_rl.rewards import plugins

    tasks = [Task(str(n), "Question 200: which word is it?", "It is tâlo.", (), frozenset()) for n in range(2)]
    texts = ["It is tâlo.", "It is mîva."]
    values = plugins.call(plugins.Plugin("reward_model", 1.0, reward.reward_model), tasks, texts)
    assert values == reward(tasks, texts) and values[0] > values[1]


def test_the_probe_attacks_it(trained, capsys):
    """By itself, or beside the composite; a reward learned from a few judgements about other words can be gamed."""
    import probe_rewards

    argv = ["--num_samples", "10", "--wandb_mode", "disabled", "--reward_model", str(trained[0])]
    assert probe_rewards.main(argv) == 1
    out = capsys.readouterr().out
    assert "reward_model" in out and "R_dict" not in out
    probe_rewards.main([*argv, "--reward", "composite", "--reward_model_weight", "0.01"])
    assert "R_dict" in capsys.readouterr().out
    with pytest.raises(StoneyError, match="--reward_model "):
        probe_rewards.main([*argv[:-1], "nowhere"])


def test_a_score_does_not_depend_on_its_neighbours(reward):
    texts = ["It is tâlo.", "It is mîva and so on and so on.", "no", "It is tâlo. " * 5]
    together = reward(["Which?"] * 4, texts)
    alone = [reward(["Which?"], [text])[0] for text in texts]
    assert together == pytest.approx(alone, abs=1e-5)


def test_nfd_scores_as_nfc(reward):
    nfd = unicodedata.normalize("NFD", "It is tâlo.")
    assert nfd != "It is tâlo."
    composed, decomposed, bare = reward(["Which?"] * 3, ["It is tâlo.", nfd, "It is talo."])
    assert composed == pytest.approx(decomposed, abs=1e-6) and composed != pytest.approx(bare, abs=1e-4)


@pytest.mark.parametrize("text", ["", " \n", "<think>tâlo", "tâlo\x00", "?!", "tâlo " * 400])
def test_what_says_nothing_or_is_not_read_earns_least(reward, text):
    assert reward(["Which?"], [text]) == [-1.0]


def test_a_prompt_that_cannot_be_read_is_not_scored(reward):
    assert reward(["Which? " * 300, "Which?"], ["tâlo", ""]) == [None, -1.0]
    assert reward([], []) == []
    with pytest.raises(StoneyError, match="2 prompts but 1 texts"):
        reward(["a", "b"], ["c"])


# Directories that are none.


def test_no_reward_model(inputs, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "prepared"):
        shutil.copytree(inputs / name, name)
    Path("half.partial").mkdir()
    for name, said in (
        ("absent", r"^absent: no such reward-model directory; make it with: python train_reward_model.py$"),
        ("half", r"^half: no such reward-model directory; finish the run in half.partial with --resume$"),
        ("base", r"^base: no reward model but not made by this pipeline; make one with: .*train_reward_model.py"),
        ("prepared", "^prepared: no reward model but a checkpoint of stage 'dataset'"),
    ):
        with pytest.raises(StoneyError, match=said):
            load_reward_model(name)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_an_incomplete_directory_names_what_is_missing(trained, tmp_path, name):
    copy = shutil.copytree(trained[0], tmp_path / "copy")
    (copy / name).unlink()
    with pytest.raises(StoneyError, match=f"not a complete reward model, {name} missing"):
        load_reward_model(copy)


def test_a_stage_without_a_scale_is_refused(trained, tmp_path):
    copy = shutil.copytree(trained[0], tmp_path / "copy")
    for broken in ({}, {"mean": 0.0, "scale": 0.0, "max_length": 512}, {"mean": None, "scale": 1.0, "max_length": 512}):
        checkpoints.write_json(copy / "stage.json", read(trained[0] / "stage.json") | {"reward": broken})
        with pytest.raises(StoneyError, match="its mean and scale in stage.json missing"):
            load_reward_model(copy)


@pytest.mark.parametrize("tensor", ["score.weight", "model.layers.0.mlp.down_proj.weight"])
def test_weights_that_were_changed_are_refused(trained, tmp_path, tensor):
    from safetensors.torch import save_file

    copy = shutil.copytree(trained[0], tmp_path / "copy")
    changed = weights(copy)
    changed[tensor] = changed[tensor] + 0.05
    save_file(changed, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StoneyError, match="differ by .* from those recorded when it was saved"):
        load_reward_model(copy)


# Pairs made of rows.


@pytest.mark.parametrize("data", [["--dataset", "prepared"], ["--dataset", "rows.jsonl", "--lexicon", "lexicon.jsonl"]])
def test_bootstrap(here, data, capsys):
    fractions = ["--test_fraction", "0.2", "--validation_fraction", "0.1"]  # as prepared
    train(*data, *fractions, "--bootstrap", "--pairs_per_row", "2", "--max_steps", "3", "--seed", "3")
    assert names("reward") == FILES
    stage, results = read("reward/stage.json"), read("reward/results.json")
    assert stage["data"]["split_by"] == "lexeme" and not any(
        read("reward/split.json")["certificate"]["overlaps"].values()
    )
    assert results["headline"] == "unseen" and list(results["groups"])[-1] == "all"
    assert (
        sum(results["groups"][name]["n"] for name in ("seen", "unseen") if name in results["groups"])
        == (results["groups"]["all"]["n"])
    )
    assert "lexemes never trained on" in capsys.readouterr().out
    load_reward_model("reward")


def test_a_human_file_is_split_by_lexeme_with_a_lexicon(here):
    stems = planted.PlantedLanguage(0, 30).stems
    lines = [
        {"prompt": f"Say {stem}. {n}", "chosen": f"It is {stem}.", "rejected": f"No. {n}"}
        for stem in stems
        for n in (1, 2)
    ]
    Path("judged.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    train("--dataset", "judged.jsonl", "--lexicon", "prepared", "--max_steps", "2")
    assert read("reward/results.json")["headline"] == "unseen"
    assert read("reward/stage.json")["data"]["split_by"] == "lexeme"


# Runs that stop.


@pytest.fixture
def unfinished(here, monkeypatch):
    """A run that stopped after the checkpoint at step 4."""
    trainer = reward_model.pair_trainer()
    step = trainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train("--dtype", "fp32")
    assert names(here) & {"reward", "reward.partial"} == {"reward.partial"}
    return here


def test_resume_is_exact(unfinished, trained, capsys):
    assert refusal("--dtype", "fp32") == (
        "reward.partial: an unfinished run; --resume continues it, --overwrite starts again"
    )
    assert "started with other values of --seed" in refusal("--dtype", "fp32", "--resume", "--seed", "1")
    train("--dtype", "fp32", "--resume")
    assert "continuing after reward.partial/checkpoint-4" in capsys.readouterr().out
    assert curve("reward") == curve(trained[0])  # to the last bit
    assert same_weights("reward", trained[0])
    ours, theirs = (read(Path(name) / "stage.json") for name in ("reward", trained[0]))
    assert ours["reward"] == theirs["reward"] and ours["accuracy"] == theirs["accuracy"]
    assert names("reward") == FILES and not Path("reward.partial").exists()


KILLER = """
import os, signal, sys
from stoney_rl import checkpoints
import train_reward_model
real = checkpoints.publish
def die(work, final):
    if sys.argv[1] == "after":
        real(work, final)
    os.kill(os.getpid(), signal.SIGKILL)
checkpoints.publish = die
train_reward_model.main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_at_the_end(here, trained, moment, capsys):
    """Between measuring and publishing, and between publishing and clearing away the checkpoints."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, moment, *ARGUMENTS, "--dtype", "fp32"],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert Path("reward").exists() == (moment == "after") and Path("reward.partial").exists()
    train("--dtype", "fp32", "--resume")
    said = capsys.readouterr().out
    assert ("trained with these arguments on this data already" in said) == (moment == "after")
    assert names("reward") == FILES and not Path("reward.partial").exists()
    assert same_weights("reward", trained[0]) and curve("reward") == curve(trained[0])


def test_a_finished_run_is_not_run_again_nor_replaced(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(trained[0].parent, tmp_path / "copy"))
    train("--dtype", "fp32", "--save_steps", "9")
    assert "trained with these arguments on this data already" in capsys.readouterr().out
    assert "reward: holds another run" in refusal("--dtype", "fp32", "--seed", "1")
    Path("pairs.jsonl").write_text("".join(Path("pairs.jsonl").read_text().splitlines(True)[:-1]))
    assert "reward: holds another run" in refusal("--dtype", "fp32")
    train("--dtype", "fp32", "--overwrite", "--max_steps", "1")
    assert read("reward/stage.json")["training"]["steps"] == 1


def test_a_reward_model_is_no_language_model(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(trained[0].parent, tmp_path / "copy"))
    assert refusal("--model", "reward", "--output_dir", "new") == (
        "reward: a reward model already; start from a language model"
    )


# What is refused, before anything is loaded.


def test_every_problem_is_told_at_once(here):
    (here / "file").write_text("")
    argv = [
        "--output_dir",
        "file",
        "--dataset",
        "prepared",
        "--test_fraction",
        "0",
        "--dataset_revision",
        "x",
        "--resamples",
    ]
    assert [line.split(":")[0] for line in refusal(*argv, "9").splitlines()] == [
        "--output_dir",
        "--dataset",
        "--dataset_revision",
        "--test_fraction and --validation_fraction",
        "--resamples 9",
    ]
    assert names(here) == {"base", "pairs.jsonl", "rows.jsonl", "lexicon.jsonl", "prepared", "file"}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--dataset", ""], "--dataset: give preference pairs, or rows or a prepared directory with --bootstrap"),
        (["--dataset", "rows.jsonl"], "rows.jsonl has no preference pair; the first of 60 bad lines"),
        (["--dataset", "rows.jsonl", "--bootstrap"], "--bootstrap: rows.jsonl has no lexicon: give one with --lexicon"),
        (["--dataset", "none.jsonl"], "none.jsonl does not exist"),
        (["--output_dir", "."], "--output_dir: . holds --model, which it would replace"),
        (["--model", "bases"], "bases: no such checkpoint directory (did you mean base?)"),
        (["--max_length", "9"], "--max_length 9: no pair of the train split is within it; raise it"),
        (["--optim", "hope"], "hope is not a valid OptimizerNames"),
        (["--lora_target_modules", "qkv"], "--lora_target_modules qkv: the model has "),
    ],
)
def test_bad_input(here, argv, said):
    assert said in refusal(*argv)
    assert not Path("reward").exists()


@pytest.mark.parametrize(
    ("argv", "said"), [(["--nope"], "unrecognized arguments: --nope"), (["--pairs_per_row", "0"], "at least 1, got 0")]
)
def test_bad_flags_end_with_2(here, argv, said, capsys):
    with pytest.raises(SystemExit) as ended:
        train(*argv)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_bad_pairs_are_refused_before_torch_is_loaded(here):
    (here / "torch.py").write_text("raise AssertionError('torch was imported before the pairs were read')")
    argv = [sys.executable, REPOSITORY / "train_reward_model.py", *ARGUMENTS, "--dataset", "rows.jsonl"]
    done = subprocess.run(argv, env=os.environ | {"PYTHONPATH": str(here)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("train_reward_model.py: error: rows.jsonl has no preference pair")


# The measures, by hand.


def pair(number, chosen, rejected, kind="k", lexemes=()):
    prompt = [{"role": "user", "content": f"q{number}"}]
    row = Row(str(number), "f:1", prompt, [{"role": "assistant", "content": chosen}], list(lexemes), {})
    return Pair(str(number), row, rejected, kind)


def test_calibration_by_hand():
    three = math.log(3)  # sigmoid(log 3) = 0.75
    found = reward_model.calibration([three, three, three, -three])
    assert found["ece"] == pytest.approx(0)
    assert found["nll"] == pytest.approx((3 * math.log(4 / 3) + math.log(4)) / 4)
    (used,) = [one for one in found["bins"] if one["n"]]
    assert (used["n"], used["accuracy"], used["low"], used["high"]) == (4, 0.75, 0.75, 0.8)
    assert used["confidence"] == pytest.approx(0.75)
    nine = math.log(9)  # sigmoid(log 9) = 0.9, right half of the time
    assert reward_model.calibration([nine, -nine])["ece"] == pytest.approx(0.4)
    assert reward_model.calibration([nine, -nine, three, three])["ece"] == pytest.approx(0.5 * 0.4 + 0.5 * 0.25)
    assert reward_model.calibration([0.0])["ece"] == 0  # a tie claims nothing
    assert reward_model.calibration([1e6])["nll"] == 0 and reward_model.calibration([-1000.0])["nll"] == 1000


def test_measures_by_hand():
    pairs = [
        pair(1, "tâlo", "mî", "a"),  # longer by 2, right
        pair(2, "tâlo", "mîvanu", "a"),  # shorter by 2, right
        pair(3, "tâlo", "mîva!!!", "b"),  # shorter by 3, wrong
        pair(4, "tâlo", "mîva", "b"),  # as long, a tie
    ]
    found = measure(pairs, [2.0, 2.0, 0.0, 1.0], [1.0, 0.0, 3.0, 1.0], seed=0)
    assert found["accuracy"]["value"] == (1 + 1 + 0 + 0.5) / 4
    assert (found["longer"]["value"], found["shorter"]["value"]) == ((1 + 0.5) / 4, (2 + 0.5) / 4)
    assert found["above_length"]["value"] == pytest.approx(0.625 - 0.625) and not found["above_length"]["conclusive"]
    assert {kind: (entry["value"], entry["n"]) for kind, entry in found["kinds"].items()} == {
        "a": (1, 2),
        "b": (0.25, 2),
    }
    assert found["length"]["chosen_longer"]["value"] == 1 and found["length"]["chosen_shorter"]["value"] == 0.5
    # margins 1, 2, -3, 0 rank 3, 4, 1, 2; differences in length 2, -2, -3, 0 rank 4, 2, 1, 3: rho = 1 - 6 * 6 / 60
    assert found["length"]["margin"] == pytest.approx(0.4)


def test_a_score_that_is_length_is_seen():
    pairs = [pair(n, "tâlo" * (1 + n % 4), "mîva" + "!" * (1 + n % 2), lexemes=[f"w{n // 2}"]) for n in range(40)]
    found = measure(pairs, [len(p.chosen) for p in pairs], [len(p.rejected) for p in pairs], seed=0)
    assert found["accuracy"]["value"] == found["longer"]["value"] and found["above_length"]["value"] == 0
    assert found["length"]["score"] == pytest.approx(1) and found["length"]["margin"] == pytest.approx(1)
    assert found["length"]["chosen_longer"]["value"] == 1 and found["length"]["chosen_shorter"]["value"] == 0
    assert found["accuracy"]["units"] == 20  # two pairs share a lexeme: they are right or wrong together
    assert measure(pairs, [1.0] * 40, [1.0] * 40, seed=0)["length"]["score"] is None


def test_pairs_on_one_prompt_are_one_unit():
    pairs = [pair(n // 4, "a", "b", lexemes=()) for n in range(40)]
    assert measure(pairs, [1.0] * 40, [0.0] * 40, seed=0)["accuracy"]["units"] == 10


def test_measure_wants_a_score_for_each_pair():
    with pytest.raises(StoneyError, match="1 pairs, 2 and 1 scores"):
        measure([pair(1, "a", "b")], [1.0, 2.0], [1.0], seed=0)
