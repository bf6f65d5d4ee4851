"""train_grpo.py from end to end on a tiny model: what it writes and refuses, what a kill leaves, how bad rewards show.

All words are invented.
"""

import json
import math
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

import train_grpo
import train_lora
from stoney_rl import checkpoints, cli, corpus, data, models, planted, records
from stoney_rl.errors import StoneyError
from stoney_rl.preflight import BatchPlan

REPOSITORY = Path(__file__).resolve().parent.parent
SPLIT = ("--test_fraction", "0.2", "--validation_fraction", "0.2")
# 4 prompts an update; with prompt_limit 5 updates an epoch, so that steps 2 and 4 lie inside of the first epoch, 6 and 8
# inside of the second.
ARGUMENTS = [
    *("--lora_path", "sft_merged", "--batch_size", "16", "--group_size", "4", "--micro_batch_size", "8"),
    *("--max_steps", "8", "--save_steps", "2", "--eval_steps", "3", "--eval_prompts", "6", "--table_steps", "4"),
    *("--max_completion_length", "6", "--learning_rate", "1e-2", "--lora_rank", "4", "--dtype", "fp32"),
    *("--preflight_prompts", "2", "--probe_samples", "12", "--output_dir", "out", "--wandb_mode", "disabled"),
    *("--reward", "composite", "--reward", "planted_rewards:unreadable=0.1"),
]
ADAPTER_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "held_out.jsonl",
    "identity.json",
    "metrics.jsonl",
    "quarantine.jsonl",
    "report.json",
    "report.png",
    "report.txt",
    "rollouts.jsonl",
    "split.json",
    "stage.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tracking.json",
    "trainer_state.json",
    "training_args.bin",
}
MERGED_FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "report.json",
    "report.png",
    "report.txt",
    "split.json",
    "stage.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def ending_early(directory):
    """A tiny model that ends a third of its answers at the first token, and so on: all its states share a direction."""
    import torch

    tiny.checkpoint(directory, layers=1)
    model = models.load_model(models.find_model(str(directory)), torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.05
        model.lm_head.weight[2] += 5 / 32  # a state has width 32 and values around 1: e^5 against 258 others
    model.save_pretrained(directory)


@pytest.fixture(scope="module")
def environment():
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("WANDB", "HF_"))]:
            patch.delenv(name)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        patch.setenv("CUDA_VISIBLE_DEVICES", "0")
        yield patch


@pytest.fixture(scope="module")
def inputs(environment, tmp_path_factory):
    """base/, rows.jsonl, and what train_lora.py makes of them: sft_ckpt/ and sft_merged/."""
    directory = tmp_path_factory.mktemp("inputs")
    ending_early(directory / "base")
    rows = planted.PlantedLanguage(seed=0, num_lexemes=20).rows(rules_per_lexeme=3, templates_per_fact=1)
    data.write_jsonl(directory / "rows.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        train_lora.main([
            *("--model", "base", "--dataset", "rows.jsonl", *SPLIT, "--max_steps", "1", "--learning_rate", "1e-3"),
            *("--lora_rank", "2", "--output_dir", "sft_ckpt", "--wandb_mode", "disabled", "--dtype", "fp32"),
        ])  # fmt: skip
        shutil.rmtree("sft_ckpt/checkpoint-1")
    return directory


@pytest.fixture(scope="module")
def prompt_limit(inputs):
    """``--max_prompt_length``, so that 20 to 23 training prompts are left."""
    from stoney_rl import prompts

    tokenizer = tiny.tokenizer()
    prompts.prepare_tokenizer(tokenizer)
    lengths = sorted(len(prompts.encode_prompt(tokenizer, row.prompt)) for row in splits(inputs).train)
    assert lengths[19] < lengths[23]
    return ["--max_prompt_length", str(lengths[19])]


def splits(directory):
    return corpus.prepare(directory / "rows.jsonl", test_fraction=0.2, validation_fraction=0.2).split


@pytest.fixture
def here(inputs, tmp_path, monkeypatch):
    """The working directory: the inputs, and nothing else."""
    return enter(tmp_path, inputs, monkeypatch)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """The report's picture is a third of a short run; the shared run ``trained`` draws it."""
    from stoney_rl import policy

    monkeypatch.setattr(policy, "plot", lambda *_, title: _[-1].write_bytes(b""))


def enter(directory, inputs, patch):
    shutil.copytree(inputs, directory, dirs_exist_ok=True)
    patch.chdir(directory)
    return directory


def train(*argv):
    train_grpo.main([*ARGUMENTS, *argv])


def without(flag):
    """ARGUMENTS without ``flag`` and its value, wherever it stands."""
    gone = {at for at, token in enumerate(ARGUMENTS) if token == flag}
    return [token for at, token in enumerate(ARGUMENTS) if not {at, at - 1} & gone]


def paid_by(*rewards):
    """ARGUMENTS with other rewards."""
    return [*without("--reward"), *(token for reward in rewards for token in ("--reward", reward))]


def refusal(*argv, base=ARGUMENTS):
    with pytest.raises(StoneyError) as error:
        train_grpo.main([*base, *argv])
    return str(error.value)


def names(directory):
    return {path.name for path in Path(directory).iterdir()}


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def tensors(path):
    from safetensors.torch import load_file

    return load_file(path)


def story(directory):
    """Everything that a run wrote down about its training, but for the clock's readings."""
    lines = {name: records.read(Path(directory) / f"{name}.jsonl") for name in ("metrics", "rollouts", "held_out")}
    lines["metrics"] = [{key: value for key, value in line.items() if key != "step_time"} for line in lines["metrics"]]
    return lines


def same_weights(one, other):
    first, second = (tensors(Path(directory) / "adapter_model.safetensors") for directory in (one, other))
    assert first.keys() == second.keys()
    return all((first[name] == second[name]).all() for name in first)


def at_step(step, call, reached=lambda trainer, *_: trainer.state.global_step):
    """``call``, interrupted in ``step``."""

    def stop(*args, **kwargs):
        if reached(*args) == step:
            raise KeyboardInterrupt
        return call(*args, **kwargs)

    return stop


# One whole run.


@pytest.fixture(scope="module")
def trained(inputs, prompt_limit, tmp_path_factory):
    """A finished run, to be read only."""
    directory = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        enter(directory, inputs, patch)
        train(*prompt_limit)
    return directory


def test_what_is_written(trained, inputs):
    assert names(trained) == names(inputs) | {"out", "out_ckpt"}
    assert names(trained / "out_ckpt") == ADAPTER_FILES | {"checkpoint-6", "checkpoint-8"}
    assert names(trained / "out") == MERGED_FILES


def test_what_is_saved_is_the_policy(trained, monkeypatch):
    """The adapter on its base, the merged model, and both fingerprints: one function, which is not the parent's."""
    import torch

    monkeypatch.chdir(trained)
    adapted, merged, parent = (
        models.load_model(models.find_model(name), torch.float32) for name in ("out_ckpt", "out", "sft_merged")
    )
    for name, model in (("out_ckpt", adapted), ("out", merged)):
        assert checkpoints.fingerprint(model) == checkpoints.read_stage(Path(name))["fingerprint"]
    logits = [checkpoints.probe_logits(model) for model in (adapted, merged, parent)]
    assert (logits[0] - logits[1]).abs().max() < 1e-5 and (logits[0] - logits[2]).abs().max() > 1e-2
    assert same_weights("out_ckpt", "out_ckpt/checkpoint-8") and not same_weights("out_ckpt", "out_ckpt/checkpoint-6")


def test_the_lineage_and_what_evaluation_needs(trained, monkeypatch):
    monkeypatch.chdir(trained)
    assert [line.partition(",")[0] for line in checkpoints.lineage(Path("out"))] == [
        "out: grpo",
        "sft_merged: sft",
        "base (not made by this pipeline)",
    ]
    stage = read("out/stage.json")
    assert stage["parent"] == {
        "path": "sft_merged",
        "fingerprint": read("sft_merged/stage.json")["fingerprint"]["sha256"],
    }
    assert (stage["kind"], stage["adapter"], stage["training"]["steps"]) == ("merged", "out_ckpt", 8)
    assert stage["reward"]["functions"] == "1 composite + 0.1 planted_rewards:unreadable"
    assert stage["reward"]["problems"] == []
    held_out = corpus.held_out("out", "test", dataset=None, default_dataset="nowhere")
    assert [row.id for row in held_out.rows] == [row.id for row in splits(trained).test] and held_out.trained == 0


def test_prompts_are_training_rows_and_no_others(trained):
    rollouts = records.read(trained / "out_ckpt/rollouts.jsonl")
    split = splits(trained)
    used, training = {line["id"] for line in rollouts}, {row.id for row in split.train}
    assert 20 <= len(used) <= 23 and used < training
    assert not used & {row.id for row in [*split.validation, *split.test]}
    questions = {row.id: row.question for row in split.train}
    assert all(line["prompt"] == questions[line["id"]] for line in rollouts)
    epochs = [{line["id"] for line in rollouts if first < line["step"] <= last} for first, last in ((0, 5), (5, 8))]
    assert [len(epoch) for epoch in epochs] == [20, 12]  # each prompt once an epoch


def test_every_completion_and_every_term_is_there(trained):
    rollouts = records.read(trained / "out_ckpt/rollouts.jsonl")
    assert [line["step"] for line in rollouts] == [step for step in range(1, 9) for _ in range(16)]
    columns = {"step", "id", "prompt", "completion", "composite", "planted_rewards:unreadable", "R_lex", "R_sem", "R_cot",
               "R_dict", "R_morph", "P_hall", "R_brev", "hit", "precision", "tokens", "truncated", "advantage"}  # fmt: skip
    assert all(line.keys() == columns for line in rollouts)
    assert all(line["R_sem"] is None for line in rollouts)  # no encoder
    for start in range(0, len(rollouts), 4):
        assert len({line["id"] for line in rollouts[start : start + 4]}) == 1
    truncated = [line["truncated"] for line in rollouts]
    assert any(truncated) and not all(truncated)
    assert all(line["tokens"] == 6 for line in rollouts if line["truncated"])


def test_metrics_are_what_the_rollouts_say(trained):
    rollouts = records.read(trained / "out_ckpt/rollouts.jsonl")
    metrics = records.read(trained / "out_ckpt/metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(1, 9))
    for line in metrics:
        mine = [one for one in rollouts if one["step"] == line["step"]]
        groups = [mine[start : start + 4] for start in range(0, 16, 4)]
        for term in ("R_lex", "R_sem", "R_dict", "P_hall", "hit"):
            known = [one[term] for one in mine if one[term] is not None]
            assert line[f"terms/{term}/unscored"] == pytest.approx(1 - len(known) / 16)
            assert (f"terms/{term}/mean" in line) == bool(known)
            if known:
                assert line[f"terms/{term}/mean"] == pytest.approx(statistics.fmean(known), abs=1e-6)
                found = [[one[term] for one in group if one[term] is not None] for group in groups]
                spread = statistics.fmean(statistics.pstdev(values) for values in found if values)
                assert line[f"terms/{term}/spread"] == pytest.approx(spread, abs=1e-6)
        totals = [[one["composite"] + 0.1 * one["planted_rewards:unreadable"] for one in group] for group in groups]
        assert line["reward"] == pytest.approx(statistics.fmean(map(statistics.fmean, totals)), abs=1e-6)
        assert line["zero_spread"] == statistics.fmean(max(group) - min(group) <= 1e-6 for group in totals)
        assert line["completions/clipped_ratio"] == pytest.approx(statistics.fmean(one["truncated"] for one in mine))
        assert line["completions/mean_length"] == pytest.approx(statistics.fmean(one["tokens"] for one in mine))
        for group, paid in zip(groups, totals, strict=True):
            scale = statistics.stdev(paid) + 1e-4
            expected = [(value - statistics.fmean(paid)) / scale for value in paid]
            assert [one["advantage"] for one in group] == pytest.approx(expected, abs=1e-2)
        assert line["kl"] >= 0 and 0 < line["entropy"] < math.log(259)


def test_held_out_answers_are_measured(trained):
    report = read(trained / "out_ckpt/report.json")
    lines = records.read(trained / "out_ckpt/held_out.jsonl")
    assert [line["step"] for line in lines] == [0, 3, 6, 8] and all(len(line["answers"]) == 6 for line in lines)
    assert (report["n"], report["steps"]) == (6, [0, 8])
    first, last = (statistics.fmean(lines[at]["rewards"]) for at in (0, -1))
    reward = report["measures"]["reward"]
    assert (reward["before"], reward["after"]) == pytest.approx((first, last))
    assert reward["difference"]["value"] == pytest.approx(last - first)
    text = (trained / "out/report.txt").read_text(encoding="utf-8")
    assert "\ngreedy answers to 6 held-out prompts" in text and "did not move" not in text
    assert (trained / "out/report.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_run_again_does_nothing(trained, prompt_limit, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    train(*prompt_limit, "--resume", "--save_steps", "4")
    assert "trained with these arguments on this data already" in capsys.readouterr().out
    assert "out_ckpt: holds another run" in refusal(*prompt_limit, "--seed", "1")


# Where it starts from.


def started(argv, said, capsys):
    """What one update prints, and the finished stage."""
    train_grpo.main([*argv, "--max_steps", "1", "--overwrite"])
    printed = capsys.readouterr().out
    assert said in printed
    return read("out/stage.json")


def test_the_named_command(here, capsys):
    """64 completions a step, 16 of a prompt, from the adapter: its merged model is what is trained on."""
    argv = [*without("--micro_batch_size"), "--lora_path", "sft_ckpt", "--batch_size", "64", "--group_size", "16"]
    stage = started(argv, "step: 64 completions = 4 prompts x 16; 16 at a time x 1 device(s) x 4 accumulated; 1 updates", capsys)  # fmt: skip
    assert len(records.read(Path("out_ckpt/rollouts.jsonl"))) == 64
    assert stage["base_model"] == "sft_merged" and stage["parent"]["path"] == "sft_ckpt"
    assert [line.partition(",")[0] for line in checkpoints.lineage(Path("out"))][:2] == ["out: grpo", "sft_ckpt: sft"]
    assert "out_parent" not in names(here)


def test_from_an_adapter_alone(here, capsys):
    """Of another tool, say: no stage.json, no merged model. It is merged in fp32 first."""
    import torch

    for name in ("stage.json", "split.json"):
        Path("sft_ckpt", name).unlink()
    shutil.rmtree("sft_merged")
    argv = ["--lora_path", "sft_ckpt", "--dataset", "rows.jsonl", *SPLIT]
    stage = started([*ARGUMENTS, *argv], "sft_ckpt: an adapter alone; merged in fp32 into out_parent", capsys)
    assert stage["base_model"] == "out_parent" and stage["parent"]["path"] == "sft_ckpt"
    parent, adapter = (models.load_model(models.find_model(name), torch.float32) for name in ("out_parent", "sft_ckpt"))
    assert (checkpoints.probe_logits(parent) - checkpoints.probe_logits(adapter)).abs().max() < 1e-5
    assert stage["parent"]["fingerprint"] == read("out_parent/stage.json")["fingerprint"]["sha256"]


def test_held_out_rows_were_never_trained_on(here, monkeypatch):
    """On other rows than the parent's, what it was trained on may fall into the validation split: it is not measured."""
    from stoney_rl import policy

    measured = []

    def watch(rows, *_):
        measured.extend(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(policy, "HeldOut", watch)
    before = splits(here)
    rows = planted.PlantedLanguage(seed=0, num_lexemes=20).rows(rules_per_lexeme=3, templates_per_fact=1)
    extra = planted.PlantedLanguage(seed=1, num_lexemes=20).rows(rules_per_lexeme=3, templates_per_fact=1)
    data.write_jsonl(here / "more.jsonl", [*extra, *rows])
    argv = ["--dataset", "more.jsonl", *SPLIT, "--eval_prompts", "100"]
    with pytest.raises(KeyboardInterrupt):
        train(*argv)
    trained_on = {corpus.row_hash(row) for row in before.train}
    validation = corpus.prepare("more.jsonl", test_fraction=0.2, validation_fraction=0.2).split.validation
    expected = [row.id for row in validation if corpus.row_hash(row) not in trained_on]
    assert sorted(row.id for row in measured) == sorted(expected) and 0 < len(expected) < len(validation)


# The reward.


def test_a_broken_reward_is_refused(here, capsys, monkeypatch):
    before = names(here)
    monkeypatch.setattr(sys, "argv", ["train_grpo.py"])
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: train_grpo.main(paid_by("planted_rewards:length")))
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("train_grpo.py: error: ") for line in said) and len(said) > 1
    assert "the reward can be gamed: " in said[0] and "--allow_broken_reward" in said[-1]
    assert names(here) <= before | {"out_ckpt.partial", "planted_rewards.py"}
    assert not names(here) & {"out", "out_ckpt"}
    train("--max_steps", "1")  # it is not in the way
    assert names("out") == MERGED_FILES


def test_a_forced_hack_is_seen_in_the_report(here, capsys):
    """Paid for length alone, a base model whose answers ended at once never ends them.

    Differences count from ten lexemes on, so one row of each.
    """
    rows = planted.PlantedLanguage(seed=0, num_lexemes=60).rows(rules_per_lexeme=1, templates_per_fact=1)
    data.write_jsonl(here / "one_each.jsonl", rows)
    train_grpo.main([*paid_by("planted_rewards:length"), "--allow_broken_reward", "--max_steps", "12",
                     "--batch_size", "32", "--micro_batch_size", "32", "--learning_rate", "3e-2", "--kl_penalty", "0",
                     "--lora_path", "base", "--dataset", "one_each.jsonl", "--validation_fraction", "0.3",
                     "--eval_prompts", "40", "--eval_steps", "0"])  # fmt: skip
    assert "✗ the reward can be gamed: " in capsys.readouterr().out
    rollouts = records.read(Path("out_ckpt/rollouts.jsonl"))
    first, last = (statistics.fmean(line["tokens"] for line in rollouts if line["step"] == step) for step in (1, 12))
    assert last > 1.5 * first
    text = Path("out/report.txt").read_text(encoding="utf-8")
    assert "✗ sign of gaming or collapse: the reward rose by " in text
    assert "did not clearly rise with it: what is paid is not what is wanted" in text
    assert "✗ trained on a reward that can be gamed: " in text
    assert "times as long: 0 and 6 tokens" in text and "of the answers never end, 0% before" in text
    stage = read("out/stage.json")
    assert stage["reward"]["problems"] and stage["parent"]["path"] == stage["base_model"] == "base"


def test_a_reward_that_pays_nothing_moves_nothing_and_says_so(here, capsys, monkeypatch):
    """Nor does a resumed run forget what the probe said of its reward."""
    from stoney_rl import grpo

    argv = [*paid_by("planted_rewards:zero"), "--allow_broken_reward", "--weight_decay", "0.1"]
    argv += ["--max_steps", "2", "--save_steps", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(grpo.GroupTrainer, "_save_checkpoint", at_step(2, grpo.GroupTrainer._save_checkpoint))
        with pytest.raises(KeyboardInterrupt):
            train_grpo.main(argv)
    said = capsys.readouterr().out
    train_grpo.main([*argv, "--resume"])
    printed = capsys.readouterr().out
    assert "2 of 2 groups have no spread" in said and "no group can teach anything" in said
    assert "continuing after out_ckpt.partial/checkpoint-1" in printed
    assert any(
        "as much as an honest answer" in problem or "same for every" in problem
        for problem in read("out/stage.json")["reward"]["problems"]
    )
    assert (
        "✗ the policy did not move: no update changed a weight; in no step did the completions of any prompt earn different"
        in printed
    )
    assert "did not move" in Path("out/report.txt").read_text(encoding="utf-8")
    parent, policy = (tensors(f"{name}/model.safetensors") for name in ("sft_merged", "out"))
    assert all((parent[name] == policy[name]).all() for name in parent)
    for line in records.read(Path("out_ckpt/metrics.jsonl")):
        assert line["zero_spread"] == 1 and line.get("kl") is None and line.get("entropy") is None
    lines = records.read(Path("out_ckpt/held_out.jsonl"))
    assert lines[0]["answers"] == lines[-1]["answers"]


def test_a_reward_that_fails_is_named(here):
    assert "--reward planted_rewards:fails: failed on" in refusal(base=paid_by("planted_rewards:fails"))
    assert not names(here) & {"out", "out_ckpt"}


# Bad input.


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--batch_size", "60", "--group_size", "16"], "nearest: --batch_size 48 or 64, or --group_size 12 or 15"),
        (["--micro_batch_size", "3"], "--micro_batch_size 3: does not divide the 16 completions"),
        (["--group_size", "1"], "--group_size 1: a group of one"),
        (["--kl_penalty", "-1"], "--kl_penalty -1.0: expected a number of at least 0"),
        (["--kl_penalty", "nan"], "--kl_penalty nan: expected a number of at least 0"),
        (["--num_iterations", "3"], "--save_steps 2: must be a multiple of --num_iterations 3"),
        (["--logging_steps", "4"], "--save_steps 2: must be a multiple of --logging_steps 4"),
        (["--validation_fraction", "0"], "--validation_fraction: must be above 0"),
        (["--num_gpus", "2"], "--num_gpus: only with --multi_gpu"),
        (["--reward", "nowhere:nothing"], "--reward nowhere:nothing: nowhere can't be imported"),
        (["--reward_weights", "R_lex=-1"], "expected numbers of at least 0"),
        (["--output_dir", "sft_merged"], "--output_dir: sft_merged holds --lora_path, which it would replace"),
        (["--adapter_dir", "out"], "--adapter_dir: out is the directory of --output_dir too"),
        (["--use_vllm"], "--use_vllm: vllm is not installed"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(here, argv, said):
    before = names(here)
    assert said in refusal(*argv)
    assert names(here) == before


def test_every_problem_is_told_at_once(here):
    said = refusal("--batch_size", "60", "--group_size", "16", "--kl_penalty", "-1", "--num_gpus", "2")
    assert [line.split(":")[0] for line in said.splitlines()] == ["--batch_size 60", "--kl_penalty -1.0", "--num_gpus"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--lora_path", "sft_merge"], "sft_merge: no such checkpoint directory (did you mean sft_merged?)"),
        (["--test_fraction", "0.3"], "--test_fraction 0.3: sft_merged was trained with 0.2; leave the flag out"),
        (["--dataset", "none.jsonl"], "none.jsonl"),
        (["--lexicon", "none.jsonl"], "none.jsonl"),
        (["--max_prompt_length", "3"], "--batch_size 16: 4 prompts a step, but only 0 to train on"),
        (["--optim", "hope"], "hope is not a valid OptimizerNames"),
        (["--lora_target_modules", "qkv_proj"], "--lora_target_modules qkv_proj: the model has down_proj"),
    ],
)
def test_what_is_refused_when_it_is_found(here, argv, said):
    message = refusal(*argv)
    assert said in message and "\n" not in message
    assert not names(here) & {"out", "out_ckpt"}


def test_bad_flags_end_with_2(here, capsys):
    (here / "unknown.yaml").write_text("kl_penality: 0.1\n")
    for argv, said in (
        (["--nope"], "unrecognized arguments: --nope"),
        (["--loss_type", "ppo"], "invalid choice: 'ppo'"),
        (["--config", "unknown.yaml"], "unknown key 'kl_penality' (did you mean 'kl_penalty'?)"),
    ):
        with pytest.raises(SystemExit) as ended:
            train(*argv)
        assert ended.value.code == 2 and said in capsys.readouterr().err


def test_config_sets_what_the_command_line_does_not(here, monkeypatch):
    (here / "run.yaml").write_text("kl_penalty: 0.5\nbatch_size: 32\nreward_weights: [R_lex=0.7]\nuse_vllm: false\n")
    seen = []
    monkeypatch.setattr(
        train_grpo, "check_args", lambda args, devices: seen.append(args) or exec("raise KeyboardInterrupt")
    )
    with pytest.raises(KeyboardInterrupt):
        train("--config", "run.yaml")
    (args,) = seen
    assert (args.kl_penalty, args.batch_size, args.reward_weights, args.use_vllm) == (0.5, 16, ["R_lex=0.7"], False)


def plan(devices, *argv):
    args = train_grpo.build_parser().parse_args(argv)
    return train_grpo.check_args(args, devices)[2]


def test_the_plan_of_the_named_command(here):
    assert plan(1, "--batch_size", "64", "--group_size", "16") == plan(1) == BatchPlan(4, 16, 4)
    assert plan(4) == BatchPlan(4, 16, 1)
    with pytest.raises(StoneyError, match="and of 3 devices; nearest: --batch_size 48 or 96"):
        plan(3)


def test_help_is_quick_and_loads_no_torch(environment):
    script = (
        "import sys, train_grpo\ntrain_grpo.build_parser().format_help()\n"
        "assert not {'torch', 'transformers', 'trl', 'numpy', 'wandb'} & sys.modules.keys()"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_wandb_gets_the_terms_and_the_completions(here, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(here))
    train("--wandb_mode", "offline", "--max_steps", "4", "--logging_steps", "1")
    (run,) = (here / "wandb").glob("offline-run-*")
    (table,) = (run / "files/media/table").glob("completions*.table.json")  # every --table_steps 4
    table = read(table)
    assert table["columns"] == list(records.read(Path("out_ckpt/rollouts.jsonl"))[0])
    assert len(table["data"]) == 16 and {line[0] for line in table["data"]} == {4}
    names = {b"terms/R_lex/mean", b"terms/R_lex/spread", b"terms/R_sem/unscored", b"zero_spread", b"held_out/reward",
             b"clipped_ratio", b"entropy", b"kl"}  # fmt: skip
    missing, until = names, time.monotonic() + 60
    while missing and time.monotonic() < until:  # W&B's own process writes the file when it gets to it
        logged = b"".join(path.read_bytes() for path in run.glob("*.wandb"))
        missing = {name for name in names if name not in logged}
        time.sleep(0.2)
    assert not missing
    assert read("out/stage.json")["wandb"]["run_id"] in run.name


# Runs that stop, and go on.

KILLER = """
import json, os, signal, sys
import datasets, matplotlib.figure, peft, torch, transformers, trl
import train_grpo
from stoney_rl import checkpoints, grpo

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name, when=lambda *args: True, half=None):
    real = getattr(owner, name)
    def fatal(*args, **kwargs):
        if when(*args):
            if half:
                half(real, *args, **kwargs)
            die()
        return real(*args, **kwargs)
    setattr(owner, name, fatal)

def half_a_file(real, content, path, *args, **kwargs):
    real(content, path, *args, **kwargs)
    os.truncate(path, os.path.getsize(path) // 2)

def arm(moment, step):
    trainer = grpo.GroupTrainer
    if moment == "step":
        before(trainer, "training_step", lambda self, *_: self.state.global_step == step)
    elif moment == "save":  # half an optimizer.pt
        now = []
        before(trainer, "_save_optimizer_and_scheduler", lambda self, *_: now.append(self.state.global_step))
        before(torch, "save", lambda *_: now and now[-1] == step, half_a_file)
    elif moment == "publish":  # the merged model published, the adapter not
        before(checkpoints, "publish", lambda work, final: final.name.endswith("_ckpt"))

for moment, step, argv in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        arm(moment, step)
        train_grpo.main(argv)
        os._exit(0)
    print("ENDED", os.waitpid(child, 0)[1], flush=True)
"""

TWICE = ("--num_iterations", "2")
# What is killed where, and the checkpoint that remains to resume from.
KILLS = {
    "in a step": ((), "step", 3, 2),
    "in a step of the second epoch": ((), "step", 7, 6),
    "in a save": ((), "save", 6, 4),
    "in a second update on the same answers": (TWICE, "step", 5, 4),
    "between the two outputs": ((), "publish", None, 8),
}


@pytest.fixture(scope="module")
def killed(inputs, prompt_limit, tmp_path_factory):
    """Every run of KILLS, killed: {name: directory}."""
    directory = tmp_path_factory.mktemp("killed")
    jobs, places = [], {}
    with pytest.MonkeyPatch.context() as patch:
        enter(directory, inputs, patch)
        for number, (name, (more, moment, step, _)) in enumerate(KILLS.items()):
            jobs.append((moment, step, [*ARGUMENTS, *prompt_limit, *more, "--output_dir", f"{number}/out"]))
            places[name] = directory / str(number)
        done = subprocess.run(
            [sys.executable, "-c", KILLER, json.dumps(jobs)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    ended = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ENDED")]
    assert ended == [str(int(signal.SIGKILL))] * len(jobs), done.stderr[-3000:]
    return directory, places


@pytest.fixture(scope="module")
def twice(inputs, prompt_limit, tmp_path_factory):
    """A whole run with two updates on each step's completions."""
    directory = tmp_path_factory.mktemp("twice")
    with pytest.MonkeyPatch.context() as patch:
        enter(directory, inputs, patch)
        train(*prompt_limit, *TWICE)
    return directory


def assert_the_same_run(one, other):
    """To the last bit: every line and every weight; and each step once."""
    assert story(one) == story(other)
    assert same_weights(one, other)
    assert [line["step"] for line in story(one)["metrics"]] == list(range(1, 9))


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_resumes_exactly(name, killed, trained, request, prompt_limit, capsys, monkeypatch):
    more, moment, _, last = KILLS[name]
    directory, places = killed
    place = places[name]
    assert names(place) == {"out_ckpt.partial"} | ({"out"} if moment == "publish" else set())
    left = [int(path.name.split("-")[1]) for path in (place / "out_ckpt.partial").glob("checkpoint-*")]
    assert max(left) == last
    monkeypatch.chdir(directory)
    capsys.readouterr()
    train(*prompt_limit, *more, "--output_dir", f"{place.name}/out", "--resume")
    assert f"continuing after {place.name}/out_ckpt.partial/checkpoint-{last}" in capsys.readouterr().out
    assert names(place) == {"out", "out_ckpt"} and names(place / "out_ckpt") == names(trained / "out_ckpt")
    whole = request.getfixturevalue("twice") if more else trained
    assert_the_same_run(place / "out_ckpt", whole / "out_ckpt")
    merged = [tensors(path / "out/model.safetensors") for path in (place, whole)]
    assert all((merged[0][key] == merged[1][key]).all() for key in merged[1])
    reports = [read(path / "out/report.json") for path in (place, whole)]
    assert [report.pop("training")["steps"] for report in reports] == [8, 8] and reports[0] == reports[1]


@pytest.mark.parametrize(
    ("owner", "name", "step"),
    [
        ("GroupTrainer", "_calculate_rewards", 5),
        ("HeldOutRewards", "_measure", 6),
        ("GroupTrainer", "_save_checkpoint", 4),
    ],
)
def test_an_interrupted_run_resumes_exactly(owner, name, step, here, trained, prompt_limit):
    """Just before it pays, measures or saves in ``step``; what this step wrote down is written again."""
    from stoney_rl import grpo

    with pytest.MonkeyPatch.context() as patch:
        stopped = getattr(grpo, owner)
        reached = {"reached": lambda _, now: now} if owner == "HeldOutRewards" else {}
        patch.setattr(stopped, name, at_step(step, getattr(stopped, name), **reached))
        with pytest.raises(KeyboardInterrupt):
            train(*prompt_limit)
    assert not names(here) & {"out", "out_ckpt"}
    train(*prompt_limit, "--resume")
    assert_the_same_run(here / "out_ckpt", trained / "out_ckpt")


def test_an_unfinished_run_is_neither_lost_nor_mixed_with_another(here, prompt_limit):
    from stoney_rl import grpo

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.GroupTrainer, "training_step", at_step(3, grpo.GroupTrainer.training_step))
        with pytest.raises(KeyboardInterrupt):
            train(*prompt_limit)
    assert refusal(*prompt_limit) == (
        "out_ckpt.partial: an unfinished run; --resume continues it, --overwrite starts again"
    )
    said = refusal(*prompt_limit, "--resume", "--kl_penalty", "0.3", "--reward", "planted_rewards:zero")
    assert "out_ckpt.partial: started with other values of " in said and "--kl_penalty" in said and "--reward" in said
