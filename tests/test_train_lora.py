"""train_lora.py from end to end on a tiny model: what it writes, what it refuses, and what a kill leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from complete import COMPLETE

import train_lora
from stoney_rl import checkpoints, corpus, data, models, planted, runs
from stoney_rl.errors import StoneyError

REPOSITORY = Path(__file__).resolve().parent.parent
# 42 training rows, 16 an update: three updates an epoch, and a checkpoint every two, so that steps 2 and 4 lie inside
# the first and the second epoch.
ARGUMENTS = [
    *("--model", "base", "--dataset", "rows.jsonl", "--test_fraction", "0.2", "--validation_fraction", "0.1"),
    *("--batch_size", "8", "--gradient_accumulation_steps", "2", "--max_steps", "8", "--save_steps", "2"),
    *("--eval_steps", "3", "--learning_rate", "1e-2", "--lora_rank", "4", "--wandb_mode", "disabled"),
]
ADAPTER_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "checkpoint-6",
    "checkpoint-8",
    "identity.json",
    "quarantine.jsonl",
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
    "split.json",
    "stage.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
CHECKPOINT_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_args.bin",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny base model and 60 rows of an invented language."""
    directory = tmp_path_factory.mktemp("inputs")
    tiny.checkpoint(directory / "base", layers=1)
    rows = planted.PlantedLanguage(seed=0, num_lexemes=20).rows(rules_per_lexeme=3, templates_per_fact=1)
    assert len(rows) == 60
    data.write_jsonl(directory / "rows.jsonl", rows)
    return directory


@pytest.fixture(scope="module")
def environment():
    """What train_lora.py sees; module-wide, because whole runs are shared between tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("WANDB", "HF_"))]:
            patch.delenv(name)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield patch


@pytest.fixture
def here(inputs, environment, tmp_path, monkeypatch):
    """The working directory: base/ and rows.jsonl, and nothing else."""
    return enter(tmp_path, inputs, monkeypatch)


def enter(directory, inputs, patch):
    shutil.copytree(inputs, directory, dirs_exist_ok=True)
    patch.chdir(directory)
    return directory


def train(*argv, name="run"):
    train_lora.main([*ARGUMENTS, "--output_dir", f"{name}_ckpt", *argv])


def refusal(*argv, **options):
    with pytest.raises(StoneyError) as error:
        train(*argv, **options)
    return str(error.value)


def names(directory):
    return {path.name for path in Path(directory).iterdir()}


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def weights(directory, file="model.safetensors"):
    from safetensors.torch import load_file

    return load_file(Path(directory) / file)


def same_adapter(one, other, atol=0.0):
    import torch

    first, second = (weights(directory, "adapter_model.safetensors") for directory in (one, other))
    assert first.keys() == second.keys()
    return all(torch.allclose(first[name], second[name], rtol=0, atol=atol) for name in first)


def curve(directory):
    """Everything logged before the summary, step by step, but for the clock's readings."""
    logs = read(Path(directory) / "trainer_state.json")["log_history"]
    clock = ("runtime", "per_second")
    return [
        {key: value for key, value in log.items() if not key.endswith(clock)} for log in logs if "train_loss" not in log
    ]


def snapshot(directory):
    return {path: path.stat().st_mtime_ns for path in sorted(Path(directory).rglob("*"))}


# One whole run.


@pytest.fixture(scope="module")
def trained(inputs, environment, tmp_path_factory):
    """A finished run, to be read only."""
    directory = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        enter(directory, inputs, patch)
        train()
    return directory


def test_what_is_written(trained):
    assert names(trained) == {"base", "rows.jsonl", "run_ckpt", "run_merged"}
    assert names(trained / "run_ckpt") == ADAPTER_FILES
    assert names(trained / "run_merged") == MERGED_FILES
    for step in (6, 8):
        assert names(trained / f"run_ckpt/checkpoint-{step}") == CHECKPOINT_FILES


def test_the_adapter_is_the_one_at_the_end_of_training(trained):
    assert same_adapter(trained / "run_ckpt", trained / "run_ckpt/checkpoint-8")
    assert not same_adapter(trained / "run_ckpt", trained / "run_ckpt/checkpoint-6")


def test_stage_json_tells_how_it_was_made(trained, inputs):
    stages = [read(trained / name / "stage.json") for name in ("run_ckpt", "run_merged")]
    assert [stage["kind"] for stage in stages] == ["adapter", "merged"]
    assert stages[1]["adapter"] == "run_ckpt"
    rows = corpus.prepare(inputs / "rows.jsonl", test_fraction=0.2, validation_fraction=0.1)
    for stage in stages:
        assert (stage["stage"], stage["seed"], stage["base_model"]) == ("sft", 0, "base")
        assert stage["arguments"]["learning_rate"] == 1e-2 and stage["arguments"]["lora_rank"] == 4
        assert stage["data"]["sha256"] == rows.rowset.sha256
        assert (stage["data"]["rows"], stage["data"]["quarantined"]) == (60, 0)
        assert stage["data"]["split"] == {"split_seed": 0, "test_fraction": 0.2, "validation_fraction": 0.1}
        assert stage["parent"] == {
            "path": "base",
            "fingerprint": checkpoints.fingerprint(tiny.model(layers=1))["sha256"],
        }
        assert stage["training"]["steps"] == 8
        assert stage["training"]["eval_loss"] == curve(trained / "run_ckpt")[-1]["eval_loss"]
        assert {"created", "command", "versions", "git_commit", "precision", "wandb", "identity"} <= stage.keys()
    assert stages[0]["fingerprint"]["dtype"] == "float32"


def test_split_json_says_what_was_trained_on_without_its_text(trained, inputs):
    rows = corpus.prepare(inputs / "rows.jsonl", test_fraction=0.2, validation_fraction=0.1)
    for name in ("run_ckpt", "run_merged"):
        record = read(trained / name / "split.json")
        assert record == json.loads(json.dumps(rows.training_record()))
        assert [len(corpus.trained_rows(split, record)) for split in (rows.split.train, rows.split.test)] == [42, 0]
        text = (trained / name / "split.json").read_text(encoding="utf-8")
        for row in rows.rowset.rows:
            assert row.question not in text and row.answer not in text and row.lexemes[0] not in text


def test_the_trainer_is_given_the_training_split_alone(here, monkeypatch):
    from stoney_rl import training

    given = {}

    def watch(self, *args, **options):
        given.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(training.AnswerTrainer, "__init__", watch)
    with pytest.raises(KeyboardInterrupt):
        train()
    split = corpus.prepare("rows.jsonl", test_fraction=0.2, validation_fraction=0.1).split
    tokenizer = tiny.tokenizer()
    for name, rows in (("train_dataset", split.train), ("eval_dataset", split.validation)):
        texts = [tokenizer.decode(ids) for ids in given[name]["input_ids"]]
        assert len(texts) == len(rows) > 0
        assert all(row.question in text and row.answer in text for row, text in zip(rows, texts, strict=True))


def test_the_loss_was_recorded_and_fell(trained):
    logs = curve(trained / "run_ckpt")
    losses = [log["loss"] for log in logs if "loss" in log]
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert [log["step"] for log in logs if "eval_loss" in log] == [3, 6, 8]


def test_the_merged_model_stands_alone_and_equals_the_adapter(trained, monkeypatch):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(trained)
    adapted = models.load_model(models.find_model("run_ckpt"), torch.float32)
    base = models.load_model(models.find_model("base"), torch.float32)
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it fails
    merged = AutoModelForCausalLM.from_pretrained(trained / "run_merged", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "run_merged")
    ids = torch.tensor([tokenizer("What is the form?")["input_ids"]])
    with torch.no_grad():
        assert (merged(ids).logits - adapted(ids).logits).abs().max() < 1e-5
        assert (merged(ids).logits - base(ids).logits).abs().max() > 1e-2
    assert tokenizer.chat_template == tiny.CHATML and tokenizer.pad_token == "<|endoftext|>"


def test_both_fingerprints_are_those_of_the_files(trained, monkeypatch):
    import torch

    monkeypatch.chdir(trained)
    for name in ("run_ckpt", "run_merged"):
        fresh = checkpoints.check_fingerprint(Path(name), models.load_model(models.find_model(name), torch.float32))
        assert fresh == checkpoints.read_stage(Path(name))["fingerprint"]


def test_the_next_stage_names_its_parent(trained, inputs, environment, tmp_path, monkeypatch):
    enter(tmp_path, inputs, monkeypatch)
    shutil.copytree(trained / "run_merged", "run_merged")
    train("--model", "run_merged", "--max_steps", "1", name="second")
    stage = read("second_merged/stage.json")
    assert stage["parent"] == {
        "path": "run_merged",
        "fingerprint": read("run_merged/stage.json")["fingerprint"]["sha256"],
    }
    assert [line.split(":")[0] for line in checkpoints.lineage(Path("second_merged"))] == [
        "second_merged",
        "run_merged",
        "base (not made by this pipeline)",
    ]


def test_without_a_merge_the_adapter_is_the_same_and_merges_later(trained, here):
    import torch

    from stoney_rl import training

    train("--no-merge")
    assert names(here) == {"base", "rows.jsonl", "run_ckpt"} and names(here / "run_ckpt") == ADAPTER_FILES
    assert same_adapter(here / "run_ckpt", trained / "run_ckpt")
    mine, other = (read(directory / "run_ckpt/stage.json") for directory in (here, trained))
    assert (mine["kind"], mine["fingerprint"]) == ("adapter", other["fingerprint"])
    later = training.merged(models.find_model("run_ckpt"), here / "later")
    merged, expected = weights(later.name), weights(trained / "run_merged")
    assert merged.keys() == expected.keys() and all(torch.equal(merged[name], expected[name]) for name in merged)
    before = snapshot(here)
    train("--no-merge")  # done already
    assert snapshot(here) == before
    assert "holds another run" in refusal()


def test_a_hub_model_at_a_revision_is_merged_at_that_revision(here, environment, monkeypatch):
    """main is another model than v1: an adapter of v1 that is merged onto main is not what was trained."""
    from huggingface_hub import constants

    hub = here / "hub" / "models--owner--name"
    for number, revision in enumerate(("main", "v1")):
        (hub / "refs").mkdir(parents=True, exist_ok=True)
        (hub / "refs" / revision).write_text(str(number) * 40)
        tiny.checkpoint(hub / "snapshots" / (str(number) * 40), layers=1, seed=number)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    train("--model", "owner/name", "--revision", "v1", "--max_steps", "1", "--dtype", "fp32")
    assert models.find_model("run_ckpt").revision == "v1"
    embeddings = [weights(path)["model.embed_tokens.weight"] for path in (hub / "snapshots" / ("1" * 40), "run_merged")]
    assert (embeddings[0] == embeddings[1]).all()  # no adapter is on them
    assert read("run_ckpt/adapter_config.json")["base_model_name_or_path"] == "owner/name"


def test_the_same_run_again_does_nothing(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    before = snapshot(trained)
    for more in ([], ["--resume"], ["--save_steps", "5", "--logging_steps", "2"]):  # none of them changes the result
        train(*more)
        assert "trained with these arguments on this data already" in capsys.readouterr().out
    assert snapshot(trained) == before


def test_another_run_does_not_take_its_place(trained, monkeypatch):
    monkeypatch.chdir(trained)
    before = snapshot(trained)
    for more in (["--seed", "1"], ["--max_steps", "9"], ["--seed", "1", "--resume"]):
        assert refusal(*more) == (
            "run_ckpt: holds another run; choose another --output_dir, or --overwrite to replace it"
        )
    assert "run_merged: holds another run" in refusal("--merged_dir", "run_merged", name="other")
    assert snapshot(trained) == before


def test_other_data_are_another_run(trained, inputs, environment, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "copy"))
    rows = (inputs / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("rows.jsonl").unlink()
    Path("rows.jsonl").write_text("".join(rows[:-1]), encoding="utf-8")
    assert "holds another run" in refusal()


def test_overwrite_replaces_both(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(trained, tmp_path / "copy"))
    train("--overwrite", "--max_steps", "1", "--seed", "3")
    assert names(".") == {"base", "rows.jsonl", "run_ckpt", "run_merged"}
    assert names("run_ckpt") == ADAPTER_FILES - {"checkpoint-6", "checkpoint-8"} | {"checkpoint-1"}
    assert names("run_merged") == MERGED_FILES
    assert [read(f"{name}/stage.json")["seed"] for name in ("run_ckpt", "run_merged")] == [3, 3]


# Variants of a run.


def test_eight_rows_at_once_are_two_rows_four_times(here):
    options = ("--no-group_by_length", "--dtype", "fp32", "--max_steps", "4", "--no-gradient_checkpointing")
    one = ("--batch_size", "8", "--gradient_accumulation_steps", "1")
    other = ("--batch_size", "2", "--gradient_accumulation_steps", "4")
    train(*options, *one, name="one")
    train(*options, *other, name="other")
    assert same_adapter("one_ckpt", "other_ckpt", atol=1e-5)
    assert not same_adapter("one_ckpt", "other_ckpt/checkpoint-2", atol=1e-3)


def test_twice_the_updates_take_no_more_room(trained, here):
    """But for the record of the losses; and nothing is left behind that the run does not name."""

    def sizes(directory):
        files = [path for path in Path(directory).rglob("*") if path.is_file() and "base" not in path.parts]
        kept = [path for path in files if path.name not in ("rows.jsonl", "trainer_state.json", "identity.json")]
        return sorted(path.stat().st_size for path in kept if path.name != "stage.json")

    train("--max_steps", "16")
    assert names(here) == {"base", "rows.jsonl", "run_ckpt", "run_merged"}
    long, short = sizes("."), sizes(trained)
    assert len(long) == len(short)
    assert sum(long) == pytest.approx(sum(short), rel=0.001)


def test_early_stopping_keeps_the_best(here):
    # At this rate the model gets worse after a while.
    train("--early_stopping_patience", "1", "--eval_steps", "1", "--learning_rate", "3", "--max_steps", "30")
    losses = [log["eval_loss"] for log in curve("run_ckpt") if "eval_loss" in log]
    best = losses.index(min(losses)) + 1
    assert best < len(losses) < 30
    assert same_adapter("run_ckpt", f"run_ckpt/checkpoint-{best}")
    assert read("run_ckpt/stage.json")["training"]["eval_loss"] == min(losses)


def test_bad_rows_stay_here(here, environment, monkeypatch):
    """They are set aside in the adapter's directory, and their text is not uploaded with it."""
    from stoney_rl import tracking

    uploads = []
    start = tracking.start_stage

    def watched(*args, **options):
        tracker = start(*args, **options)
        tracker.artifact = lambda name, kind, path, exclude=(): uploads.extend(
            Path(path).name + "/" + file for file, _ in tracking.artifact_files(path, exclude)
        )
        return tracker

    monkeypatch.setattr(tracking, "start_stage", watched)
    rows = Path("rows.jsonl").read_text(encoding="utf-8")
    Path("more.jsonl").write_text(rows + '{"question": "no answer to this"}\n', encoding="utf-8")
    train("--dataset", "more.jsonl", "--max_steps", "1")
    assert "no answer to this" in Path("run_ckpt/quarantine.jsonl").read_text(encoding="utf-8")
    assert read("run_ckpt/stage.json")["data"]["quarantined"] == 1
    kept_here = {"quarantine.jsonl", "checkpoint-1"}
    expected = {f"run_ckpt/{name}" for name in ADAPTER_FILES - {"checkpoint-6", "checkpoint-8"} - kept_here}
    assert {name for name in uploads if name.startswith("run_ckpt/")} <= expected
    assert {"run_ckpt/adapter_model.safetensors", "run_merged/model.safetensors"} <= set(uploads)


# What is refused, before anything is loaded.


def test_every_problem_is_told_at_once(here):
    (here / "file").write_text("")
    said = refusal(
        *("--merged_dir", "file", "--global_batch_size", "7", "--num_gpus", "2", "--early_stopping_patience", "3"),
        *("--eval_steps", "0", "--test_fraction", "0"),
    )
    assert [line.split(":")[0] for line in said.splitlines()] == [
        "--merged_dir",
        "--global_batch_size and --gradient_accumulation_steps",
        "--num_gpus",
        "--early_stopping_patience",
        "--test_fraction and --validation_fraction",
    ]
    assert names(here) == {"base", "rows.jsonl", "file"}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--merged_dir", "run_ckpt"], "--merged_dir: run_ckpt is the directory of --output_dir too"),
        (["--merged_dir", "run_ckpt/merged"], "--output_dir: run_ckpt holds --merged_dir, which it would replace"),
        (["--merged_dir", "."], "--merged_dir: . holds --dataset, which it would replace"),
        (["--output_dir", "out", "--merged_dir", "base"], "--merged_dir: base holds --model, which it would replace"),
        (["--output_dir", ".."], "--output_dir: .. holds the current folder"),
    ],
)
def test_no_output_replaces_an_input(here, argv, said):
    before = snapshot(here)
    for more in ([], ["--overwrite"]):
        assert said in refusal(*argv, *more)
    assert snapshot(here) == before


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--nope"], "unrecognized arguments: --nope"),
        (["--batch", "8"], "unrecognized arguments: --batch"),
        (["--batch_size", "0"], "expected an integer of at least 1, got 0"),
        (["--config", "none.yaml"], "none.yaml: No such file"),
        (["--config", "unknown.yaml"], "unknown.yaml: unknown key 'learning_rat' (did you mean 'learning_rate'?)"),
        (["--config", "wrong.yaml"], "wrong.yaml: gradient_checkpointing: expected true or false, got 'often'"),
    ],
)
def test_bad_flags_end_with_2(here, argv, said, capsys):
    (here / "unknown.yaml").write_text("learning_rat: 1.0e-4\n")
    (here / "wrong.yaml").write_text("gradient_checkpointing: often\n")
    with pytest.raises(SystemExit) as ended:
        train(*argv)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_config_sets_what_the_command_line_does_not(here, monkeypatch):
    (here / "run.yaml").write_text("learning_rate: 1e-5\nlora_rank: 2\nlora_target_modules: [q_proj]\n")
    seen = []
    monkeypatch.setattr(train_lora, "check_args", lambda args: seen.append(args) or exec("raise StoneyError('enough')"))
    refusal("--config", "run.yaml")
    (args,) = seen
    assert (args.learning_rate, args.lora_rank, args.lora_target_modules) == (1e-2, 4, ["q_proj"])


def test_the_unpublished_id_gets_its_notice_without_a_network(here, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = refusal("--model", "deepseek-ai/DeepSeek-R1-Zero-7B")
    told = "deepseek-ai/DeepSeek-R1-Zero-7B was never published; using deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    assert capsys.readouterr().out.splitlines()[0] == told
    assert said.startswith("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B: HF_HUB_OFFLINE is set")


def test_a_missing_model_names_what_is_near_and_what_makes_it(here):
    assert refusal("--model", "bases") == "bases: no such checkpoint directory (did you mean base?)"
    assert refusal("--model", "checkpoints/smollm2-135m").endswith("make it with: python prepare_base_model.py")


def test_an_adapter_is_no_base(trained, monkeypatch):
    monkeypatch.chdir(trained)
    assert refusal("--model", "run_ckpt", name="new") == "run_ckpt: an adapter; train on its merged directory instead"


def test_a_parent_that_was_changed_is_refused(trained, here):
    """Its weights are not those that its stage.json describes."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(trained / "run_merged", "parent")
    weights = load_file("parent/model.safetensors")
    weights["lm_head.weight"] *= 1.01
    save_file(weights, "parent/model.safetensors", metadata={"format": "pt"})
    assert "parent: its logits differ by" in refusal("--model", "parent")


def test_nothing_to_train_on(here):
    assert refusal("--max_length", "3") == "--max_length 3: no row has an answer within it; raise it"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--lr_scheduler_type", "sideways"], "sideways is not a valid SchedulerType"),
        (["--optim", "hope"], "hope is not a valid OptimizerNames"),
        (["--lora_target_modules", "qkv_proj"], "--lora_target_modules qkv_proj: the model has down_proj"),
    ],
)
def test_names_that_do_not_exist(here, argv, said):
    assert said in refusal(*argv)
    train("--max_steps", "1")  # and the refused run is not in the way
    assert names("run_merged") == MERGED_FILES


# Batch arithmetic.


def accumulation(world_size, *argv):
    args = train_lora.build_parser().parse_args(argv)
    return train_lora.accumulation_steps(args, world_size)


@pytest.mark.parametrize(
    ("world_size", "argv", "expected"),
    [
        (1, [], 4),
        (1, ["--gradient_accumulation_steps", "3"], 3),
        (1, ["--batch_size", "4", "--global_batch_size", "32"], 8),
        (4, ["--batch_size", "4", "--global_batch_size", "32"], 2),
        (2, ["--batch_size", "1", "--global_batch_size", "2"], 1),
    ],
)
def test_accumulation(world_size, argv, expected):
    assert accumulation(world_size, *argv) == expected


@pytest.mark.parametrize(
    ("world_size", "wanted", "nearest"), [(1, "30", "28 or 32"), (2, "30", "24 or 32"), (2, "5", "8"), (1, "1", "4")]
)
def test_a_global_batch_that_cannot_be_met_names_the_nearest(world_size, wanted, nearest):
    with pytest.raises(StoneyError) as error:
        accumulation(world_size, "--batch_size", "4", "--global_batch_size", wanted)
    assert str(error.value) == (
        f"--global_batch_size {wanted}: not a multiple of 4 rows x {world_size} device(s); nearest: {nearest}"
    )


def test_a_global_batch_that_cannot_be_met_is_told_with_the_other_problems(here):
    argv = [*ARGUMENTS, "--output_dir", "run_ckpt", "--global_batch_size", "9", "--num_gpus", "2"]
    at = argv.index("--gradient_accumulation_steps")
    del argv[at : at + 2]
    with pytest.raises(StoneyError) as error:
        train_lora.main(argv)
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["--global_batch_size 9", "--num_gpus"]


def test_long_rows_are_cut_and_counted():
    from stoney_rl import prompts

    tokenizer = tiny.tokenizer()
    prompts.prepare_tokenizer(tokenizer)
    ends = prompts.end_of_turn_ids(tokenizer)
    rows = planted.PlantedLanguage(seed=0, num_lexemes=8).rows(rules_per_lexeme=1, templates_per_fact=1)[:3]
    whole, told = train_lora.encode(rows, tokenizer, ends, 10_000)
    assert told == "0 longer than 10000 tokens and cut, 0 of them left out"
    starts = [example["labels"].count(-100) for example in whole]
    lengths = [len(example["input_ids"]) for example in whole]
    # One token short of the longest row; then up to the first answer token of the row whose prompt is shortest.
    cut, told = train_lora.encode(rows, tokenizer, ends, max(lengths) - 1)
    assert len(cut) == 3 and told.startswith(f"{lengths.count(max(lengths))} longer")
    assert max(len(example["labels"]) for example in cut) == max(lengths) - 1
    kept, told = train_lora.encode(rows, tokenizer, ends, min(starts) + 1)
    assert [example["labels"][-1] for example in kept] == [
        example["labels"][start] for example, start in zip(whole, starts, strict=True) if start == min(starts)
    ]
    assert told.endswith(f", {3 - len(kept)} of them left out")


# Killed runs. A process that has imported everything forks one child for each job; the child kills itself.

KILLER = """
import json, os, shutil, signal, sys
import datasets, peft, torch, transformers, trl
import train_lora
from stoney_rl import checkpoints, training

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

def half_a_folder(real, path, *args, **kwargs):
    os.remove(os.path.join(path, sorted(os.listdir(path))[0]))

def arm(moment, step):
    trainer = training.AnswerTrainer
    if moment == "step":
        before(trainer, "training_step", lambda self, *_: self.state.global_step == step)
    elif moment == "save":  # half an optimizer.pt
        now = []
        before(trainer, "_save_optimizer_and_scheduler", lambda self, *_: now.append(self.state.global_step))
        before(torch, "save", lambda *_: now and now[-1] == step, half_a_file)
    elif moment == "rotate":  # the oldest checkpoint half deleted
        before(training.shutil, "rmtree", lambda path, *_: path.name == f".old-{step}", half_a_folder)
    elif moment == "merge":  # the merged weights written, its tokenizer not
        before(transformers.PreTrainedTokenizerBase, "save_pretrained", lambda self, path: ".tmp-" in str(path))
    elif moment == "publish":  # the merged model published, the adapter not
        before(checkpoints, "publish", lambda work, final: final.name.endswith("_ckpt"))

for moment, step, argv in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        arm(moment, step)
        train_lora.main(argv)
        os._exit(0)
    print("ENDED", os.waitpid(child, 0)[1], flush=True)
"""

CONFIGURATIONS = {
    "default": [],
    "default, dropout": ["--lora_dropout", "0.1"],
    "fp32, random order": ["--dtype", "fp32", "--no-group_by_length"],
    "fp32, random order, dropout": ["--dtype", "fp32", "--no-group_by_length", "--lora_dropout", "0.1"],
    "early stopping": ["--early_stopping_patience", "2", "--eval_steps", "1", "--learning_rate", "3", "--max_steps", "30"],
}  # fmt: skip
# What is killed when, and the checkpoint that remains to resume from.
KILLS = {
    "in a step, default": ("default", "step", 5, 4),
    "in a step, default, dropout": ("default, dropout", "step", 5, 4),
    "in a step, fp32, random order": ("fp32, random order", "step", 5, 4),
    "in a step, fp32, random order, dropout": ("fp32, random order, dropout", "step", 5, 4),
    "before the first save": ("default", "step", 1, None),
    "in a save": ("default", "save", 6, 4),
    "in the last save": ("default", "save", 8, 6),
    "in a rotation": ("default", "rotate", 2, 6),
    "in the last rotation": ("default", "rotate", 4, 8),
    "in the merge": ("default", "merge", None, 8),
    "between the two outputs": ("default", "publish", None, 8),
    # After the first of the two losses without a new best, and after the second: negative steps count from the end.
    "early stopping, in a step": ("early stopping", "step", -1, -1),
    "early stopping, after the stop": ("early stopping", "publish", None, 0),
}


if not COMPLETE:  # other orders of the rows and dropout: make test-complete
    KILLS = {name: kill for name, kill in KILLS.items() if "random order" not in name and name != "in the last save"}


@pytest.fixture(scope="module")
def uninterrupted(inputs, trained, environment, tmp_path_factory):
    """Whole runs of CONFIGURATIONS, each made when it is first asked for."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        enter(directory, inputs, patch)
    made = {"default": trained / "run_ckpt"}

    def get(configuration):
        if configuration not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(directory)
                train(*CONFIGURATIONS[configuration], name=str(len(made)))
            made[configuration] = directory / f"{len(made)}_ckpt"
        return made[configuration]

    return get


def last_step(directory):
    return read(Path(directory) / "trainer_state.json")["global_step"]


@pytest.fixture(scope="module")
def killed(inputs, environment, uninterrupted, tmp_path_factory):
    """Every run of KILLS, killed: {name: directory}."""
    directory = tmp_path_factory.mktemp("killed")
    jobs, places = [], {}
    with pytest.MonkeyPatch.context() as patch:
        enter(directory, inputs, patch)
        for number, (name, (configuration, moment, step, _)) in enumerate(KILLS.items()):
            if step is not None and step < 0:
                step += last_step(uninterrupted(configuration))
            argv = [*ARGUMENTS, "--output_dir", f"{number}/run_ckpt", *CONFIGURATIONS[configuration]]
            jobs.append((moment, step, argv))
            places[name] = directory / str(number)
        done = subprocess.run(
            [sys.executable, "-c", KILLER, json.dumps(jobs)],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    ended = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ENDED")]
    assert ended == [str(int(signal.SIGKILL))] * len(jobs), done.stderr[-3000:]
    return directory, places


def resume(killed, name, *more):
    directory, places = killed
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        output = f"{places[name].name}/run_ckpt"
        train("--output_dir", output, *CONFIGURATIONS[KILLS[name][0]], "--resume", *more)


def assert_whole(directory):
    """Every directory with a final name holds all its files, and each can be read."""
    import torch
    from safetensors.torch import load_file

    for path in Path(directory).iterdir():
        if path.name == "run_merged":
            assert names(path) == MERGED_FILES
            checkpoints.check_fingerprint(path, models.load_model(models.find_model(str(path)), torch.float32))
        elif path.name == "run_ckpt":
            assert {name for name in names(path) if not name.startswith("checkpoint-")} == {
                name for name in ADAPTER_FILES if not name.startswith("checkpoint-")
            }
            checkpoints.read_stage(path)
        else:
            assert path.name == "run_ckpt.partial" or path.name.startswith(".run_merged.tmp-")
    for path in Path(directory).glob("*/checkpoint-*"):
        assert names(path) == CHECKPOINT_FILES
        load_file(path / "adapter_model.safetensors")
        for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.load(path / file, weights_only=False)
        assert read(path / "trainer_state.json")["global_step"] == int(path.name.split("-")[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_leaves_only_whole_directories_and_resumes_exactly(name, killed, uninterrupted, capsys):
    import torch

    configuration, moment, _, last = KILLS[name]
    place = killed[1][name]
    assert ("run_merged" in names(place)) == (moment == "publish")
    assert "run_ckpt" not in names(place) and "run_ckpt.partial" in names(place)
    assert_whole(place)
    expected = uninterrupted(configuration)
    if configuration == "early stopping":
        last += last_step(expected)
    left = [int(path.name.split("-")[1]) for path in (place / "run_ckpt.partial").glob("checkpoint-*")]
    assert max(left, default=None) == last

    capsys.readouterr()
    resume(killed, name)
    said = capsys.readouterr().out
    assert f"continuing after {place.name}/run_ckpt.partial/checkpoint-{last}" in said if last else "starting" in said
    assert names(place) == {"run_ckpt", "run_merged"}
    assert names(place / "run_ckpt") == names(expected)
    assert_whole(place)
    assert curve(place / "run_ckpt") == curve(expected)  # to the last bit
    assert same_adapter(place / "run_ckpt", expected)
    merged = expected.with_name(expected.name.replace("_ckpt", "_merged"))
    weights = [
        models.load_model(models.find_model(str(path)), torch.float32).state_dict()
        for path in (place / "run_merged", merged)
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
    stages = [read(path / "stage.json")["training"] for path in (place / "run_ckpt", expected)]
    assert [stage.pop("seconds") >= 0 for stage in stages] == [True, True]
    assert stages[0] == stages[1]


@pytest.fixture
def unfinished(here, monkeypatch):
    """A run that stopped after its first checkpoint."""
    from stoney_rl import training

    def stop(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        step = training.AnswerTrainer.training_step
        patch.setattr(training.AnswerTrainer, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train()
    assert names(here) == {"base", "rows.jsonl", "run_ckpt.partial"}
    runs.release(Path("run_ckpt.partial"))  # as the end of its process would
    return here


def test_an_unfinished_run_is_neither_lost_nor_mixed_with_another(unfinished):
    before = snapshot(unfinished)
    assert refusal() == "run_ckpt.partial: an unfinished run; --resume continues it, --overwrite starts again"
    said = refusal("--resume", "--learning_rate", "1e-3", "--lora_rank", "8")
    assert "run_ckpt.partial: started with other values of --lora_rank, --learning_rate;" in said
    rows = Path("rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("fewer.jsonl").write_text("".join(rows[:-1]), encoding="utf-8")
    assert "started with other values of --dataset, data_sha256;" in refusal("--resume", "--dataset", "fewer.jsonl")
    assert "run_ckpt.partial holds an unfinished run: finish it with --resume" in refusal("--model", "run_ckpt")
    Path("fewer.jsonl").unlink()
    assert snapshot(unfinished) == before


@pytest.mark.slow
def test_resume_in_a_new_process_with_other_saving_and_logging(unfinished, trained, warm_python):
    """What changes no result may differ; and the command line does the same as ``main``."""
    argv = [*ARGUMENTS, "--output_dir", "run_ckpt", "--resume", "--save_steps", "3"]
    done = subprocess.run([warm_python, REPOSITORY / "train_lora.py", *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert curve("run_ckpt") == curve(trained / "run_ckpt")
    assert same_adapter("run_ckpt", trained / "run_ckpt")


def test_overwrite_starts_an_unfinished_run_again(unfinished, trained):
    train("--overwrite")
    assert names(".") == {"base", "rows.jsonl", "run_ckpt", "run_merged"}
    assert same_adapter("run_ckpt", trained / "run_ckpt")


def test_resume_without_an_unfinished_run_starts(here, capsys):
    train("--resume", "--max_steps", "1")
    assert "--resume: nothing yet; starting" in capsys.readouterr().out
    assert names("run_merged") == MERGED_FILES
