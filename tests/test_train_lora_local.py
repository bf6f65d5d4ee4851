"""train_lora_local.py: the preset, what it says about memory and time, what it refuses, and that train_lora.py trains."""

import json

import pytest
import tiny
import torch

import train_lora
import train_lora_local
from stoney_rl import checkpoints, data, memory, planted, preflight
from stoney_rl.errors import StoneyError

GIB = 2**30
SHORT = ["--model", "base", "--dataset", "rows.jsonl", "--max_steps", "1", "--eval_steps", "0", "--wandb_mode", "disabled"]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A tiny base model and 60 rows of an invented language, and nothing else."""
    tiny.checkpoint(tmp_path / "base", layers=1)
    rows = planted.PlantedLanguage(seed=0, num_lexemes=20).rows(rules_per_lexeme=3, templates_per_fact=1)
    data.write_jsonl(tmp_path / "rows.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)


def test_the_documented_preset():
    args = train_lora_local.build_parser().parse_args([])
    assert {name: getattr(args, name) for name in ("model", "dataset", "output_dir", "merged_dir", "lora_rank", "lora_alpha")} == {
        "model": "microsoft/Phi-3-mini-4k-instruct",
        "dataset": "HarleyCooper/StoneyNakoda45k",
        "output_dir": "stoney_lora_phi3_local_ckpt",
        "merged_dir": None,
        "lora_rank": 16,
        "lora_alpha": 32,
    }  # fmt: skip
    assert (args.batch_size, args.max_length) == (2, 512)
    train_lora.check_args(args)
    assert args.merged_dir == "stoney_lora_phi3_local_merged"
    shown = train_lora_local.build_parser().format_help()
    assert "Phi-3-mini-4k-instruct)" in shown and "default: 8, or from --global_batch_size" in shown
    assert "default: 4, or from" in train_lora.build_parser().format_help()


def test_every_flag_is_one_of_train_lora():
    def known(module):
        return {option for action in module.build_parser()._actions for option in action.option_strings}

    assert known(train_lora_local) - known(train_lora) == {"--ignore_memory"}
    assert known(train_lora) <= known(train_lora_local)


@pytest.mark.parametrize(
    ("argv", "accumulation"),
    [([], 8), (["--gradient_accumulation_steps", "3"], 3), (["--global_batch_size", "10"], 5)],
)
def test_rows_an_update(argv, accumulation, monkeypatch):
    seen = []
    monkeypatch.setattr(train_lora, "train", seen.append)
    monkeypatch.setattr(train_lora_local, "check_memory", lambda *_, **__: None)
    train_lora_local.main(argv)
    assert train_lora.accumulation_steps(seen[0], 1) == accumulation
    assert not hasattr(seen[0], "ignore_memory")


def test_a_run_says_what_it_needs_and_trains(here, capsys):
    train_lora_local.main(SHORT)
    lines = capsys.readouterr().out.splitlines()
    first = next(line for line in lines if line.startswith(memory.device_line().split(":")[0]))
    assert "predicted peak with 2 x 512 tokens" in first and first.endswith(": fits")
    assert lines.index(first) < lines.index(next(line for line in lines if line.startswith("60 rows from rows.jsonl")))
    assert any(line.startswith("merging in fp32 at the end takes ") for line in lines)
    assert torch.cuda.is_available() or any(line.startswith("time on this CPU: about ") for line in lines)
    assert "batch: 2 a device x 1 device(s) x 8 accumulated = 16 rows an update; 1 updates" in lines
    stage = checkpoints.read_stage(here / "stoney_lora_phi3_local_ckpt")
    assert stage["stage"] == "sft" and stage["arguments"]["lora_alpha"] == 32
    assert checkpoints.read_stage(here / "stoney_lora_phi3_local_merged")["kind"] == "merged"
    # The same command again: done already, for the memory flag is no part of the run.
    train_lora_local.main([*SHORT, "--ignore_memory"])
    assert "trained with these arguments on this data already" in capsys.readouterr().out


def test_too_little_memory_is_refused_with_ways_out_before_anything_is_read(here, little_memory, capsys, monkeypatch):
    (here / "rows.jsonl").unlink()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Imaginary 24")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 24 * GIB))
    before = sorted(here.rglob("*"))
    with pytest.raises(StoneyError) as error:
        train_lora_local.main(SHORT)
    first, *ways, last = str(error.value).splitlines()
    assert first.startswith("base: will not fit here (") and "0 MiB free" in first
    assert len(ways) == 2 and all(": predicted peak " in way and way.startswith("--") for way in ways)
    assert "--max_length 256 --batch_size 1 --gradient_accumulation_steps 16" in ways[0]
    assert last == "--ignore_memory: go on all the same"
    assert "GPU Imaginary 24: 0 MiB of 24.0 GiB free" in capsys.readouterr().out
    assert sorted(here.rglob("*")) == before


def test_it_goes_on_when_told(here, little_memory, capsys):
    train_lora_local.main([*SHORT, "--ignore_memory"])
    said = capsys.readouterr().out
    assert "will not fit" in said and (here / "stoney_lora_phi3_local_merged/model.safetensors").exists()


def test_train_lora_warns_and_goes_on(here, little_memory, capsys):
    train_lora.main([*SHORT, "--output_dir", "run_ckpt"])
    said = capsys.readouterr().out
    assert "  --batch_size 1 --gradient_accumulation_steps 16: predicted peak" in said  # 4 x 4 rows
    assert "will not fit" in said and "  --model HuggingFaceTB/SmolLM2-135M-Instruct: predicted peak" in said
    assert (here / "run_merged").is_dir()


def test_a_config_that_is_no_model_is_refused(here):
    (here / "base/config.json").write_text(json.dumps({"model_type": "no such model"}))
    with pytest.raises(StoneyError, match="base: its config.json cannot be read"):
        train_lora_local.main(SHORT)


# How long it will take.


def a_setup(config, length):
    return memory.Setup(
        batch_size=1, length=length, weights=torch.float32, autocast=None, device="cpu", lora={"r": 4, "target_modules": "all-linear"}
    )  # fmt: skip


def test_the_time_grows_with_layers_and_words(monkeypatch):
    """A clock that ticks once a reading: each part takes as long, whatever this machine is doing."""
    ticks = iter(range(1000))
    monkeypatch.setattr(preflight.time, "perf_counter", lambda: float(next(ticks)))
    config = tiny.model(layers=2).config
    # A pass reads the clock four times: 1 s forward, 1 s for the head, 1 s backward.
    assert preflight.cpu_speed(config, a_setup(config, 10)) == (2 * 2 / 10, 1 / 10)
    config.num_hidden_layers, config.vocab_size = 6, 3 * 8192
    assert preflight.cpu_speed(config, a_setup(config, 10)) == (2 * 6 / 10, 3 / 10)


def test_timing_leaves_the_random_numbers_alone():
    config = tiny.model().config
    torch.manual_seed(3)
    before = torch.get_rng_state()
    layers, head = preflight.cpu_speed(config, a_setup(config, 32))
    assert torch.equal(torch.get_rng_state(), before)
    assert 0 < layers < 1 and 0 < head < 1


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "1 s"), (89, "89 s"), (90, "2 minutes"), (3600, "60 minutes"), (5400, "1.5 hours"), (200_000, "2.3 days")],
)  # fmt: skip
def test_durations(seconds, said):
    assert preflight.spoken(seconds) == said
