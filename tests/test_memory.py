"""What training will need of memory: by hand, beside what a real run takes, and what is proposed where it is too much."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from complete import also_complete

from benchmarks import memory as benchmark
from stoney_rl import memory
from stoney_rl.errors import StoneyError
from stoney_rl.memory import Memory, Setup, sft_memory

REPOSITORY = Path(__file__).resolve().parent.parent
GIB = 2**30
LORA = {"r": 4, "target_modules": "all-linear"}


def given(**options) -> Setup:
    base = {"batch_size": 2, "length": 16, "weights": torch.float32, "autocast": None, "device": "cpu", "lora": LORA}
    return Setup(**(base | options))


@pytest.fixture(scope="module")
def config():
    """Two Llama layers of width 32, MLP 64, 4 heads and 2 key-value heads of 8, vocabulary 259."""
    return tiny.model().config


def test_weights_and_adapter_by_hand(config):
    found = sft_memory(config, given())
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32  # q and o, k and v, the MLP, two norms
    assert found.weights == 4 * (2 * layer + 2 * 259 * 32 + 32)
    inputs_and_outputs = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)
    assert found.adapter == 4 * 4 * 4 * 2 * inputs_and_outputs  # weight, gradient, two moments; fp32; rank; layers
    assert found.buckets == found.sampling == 0
    assert found.peak == found.weights + found.adapter + found.learning


def test_bytes_a_weight(config):
    full, half = (sft_memory(config, given(weights=dtype)).weights for dtype in (torch.float32, torch.bfloat16))
    assert full == 2 * half
    packed = sft_memory(config, given(weights=torch.bfloat16, load_in_4bit=True))
    linear = 2 * (
        32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64
    )  # two layers; the embedding, the head and the norms stay bf16
    assert packed.weights == pytest.approx(half - linear * (2 - (4 + 0.127) / 8), abs=16)
    assert packed.adapter == sft_memory(config, given()).adapter / 2  # TRL holds it in bf16 then


def test_a_checkpointed_layer_keeps_its_input_alone(config):
    def kept(layers, **options):
        return memory._count(config, given(**options), layers)[2]

    # Of the fp32 hidden states that come in, and nothing else: batch, tokens, width.
    assert kept(2) - kept(1) == 4 * 2 * 16 * 32
    assert kept(2, gradient_checkpointing=False) - kept(1, gradient_checkpointing=False) > 10 * 4 * 2 * 16 * 32


def test_autocast_keeps_a_copy_of_the_weights_until_the_backward_pass(config):
    def kept(layers, autocast):
        # One token: next to nothing but weights.
        return memory._count(config, given(batch_size=1, length=1, autocast=autocast, gradient_checkpointing=False), layers)[2]  # fmt: skip

    linear = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64
    adapter = 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    more = (kept(2, torch.bfloat16) - kept(1, torch.bfloat16)) - (kept(2, None) - kept(1, None))
    assert more == pytest.approx(2 * (linear + adapter), rel=0.1)


def test_eager_attention_is_quadratic_in_the_length(config):
    def kept(length, attention):
        setup = given(length=length, attn_implementation=attention, gradient_checkpointing=False)
        return memory._count(config, setup, 1)[2]

    for length in (256, 512):
        # fp32, batch 2, 4 heads. Eager keeps the softmax; the fused kernel keeps its mask, the same for all heads, in fp32,
        # and the logarithm of each row's sum.
        scores, mask, sums = 4 * 2 * 4 * length**2, 4 * 2 * length**2, 4 * 2 * 4 * length
        assert kept(length, "eager") - kept(length, "sdpa") == scores - mask - sums


@pytest.mark.parametrize(
    ("flags", "sharding"),
    [([], "ddp"), (["--fsdp"], "fsdp"), (["--deepspeed", "zero2"], "zero2"), (["--deepspeed", "mine.json"], "ddp")],
)
def test_the_flags_say_how_the_model_is_sharded(flags, sharding):
    import train_lora
    from stoney_rl import memory

    args = train_lora.build_parser().parse_args(flags)
    assert memory.setup(args, devices=4).sharding == sharding


def test_sharding(config):
    alone = sft_memory(config, given())
    ddp = sft_memory(config, given(devices=4))
    assert ddp == Memory(alone.weights, alone.adapter, alone.learning, buckets=alone.adapter // 4)
    zero2 = sft_memory(config, given(devices=4, sharding="zero2"))
    assert (zero2.weights, zero2.adapter) == (alone.weights, alone.adapter // 4 + alone.adapter * 3 // 4 // 4)
    deep = tiny.model(layers=8).config
    whole, fsdp = (sft_memory(deep, given(devices=4, sharding=name)) for name in ("ddp", "fsdp"))
    layer = 4 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32)
    assert fsdp == sft_memory(deep, given(devices=4, sharding="zero3"))
    assert (fsdp.weights, fsdp.adapter) == (whole.weights // 4 + 2 * layer, whole.adapter // 4)


def test_the_head_on_a_gpu_by_hand(config):
    on_gpu = {"device": "cuda", "weights": torch.bfloat16, "autocast": torch.bfloat16}
    tokens = 2 * 15
    assert memory.head_bytes(config, given(**on_gpu)) == 2 * tokens * 259 + (2 * 2 + 4) * tokens * 32
    wide = memory.shape("Qwen/Qwen2.5-7B-Instruct")
    tiles = memory.head_bytes(wide, given(**on_gpu, batch_size=16, length=1025))
    assert tiles == 2 * 4096 * 32768 + 8 * 16 * 1024 * 3584


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_architecture_grows_with_what_it_is_given(architecture):
    config = tiny.model(architecture).config
    before = sft_memory(config, given())
    for more in ({"batch_size": 4}, {"length": 32}, {"gradient_checkpointing": False}):
        assert sft_memory(config, given(**more)).learning > before.learning, more
    assert sft_memory(config, given(lora=LORA | {"r": 8})).adapter == 2 * before.adapter


def test_no_weights_are_made_or_read(monkeypatch):
    """A 7B model in a hundredth of its 30 GB, and a folder with a config and nothing else."""
    before = psutil.Process().memory_info().rss
    found = sft_memory(memory.shape("Qwen/Qwen2.5-7B-Instruct"), given())
    assert found.weights == pytest.approx(4 * 7_615_616_512, rel=1e-6)  # the published number of parameters
    assert psutil.Process().memory_info().rss - before < 0.3 * GIB


def test_published_sizes():
    sizes = {name.split("/")[1]: memory.number_of_weights(memory.shape(name)) for name in memory.SHAPES}
    assert sizes == {
        "Qwen2.5-7B-Instruct": 7_615_616_512,
        "Phi-3-mini-4k-instruct": 3_821_079_552,
        "Qwen2.5-1.5B-Instruct": 1_543_714_304,
        "Qwen2.5-0.5B-Instruct": 494_032_768,
        "SmolLM2-135M-Instruct": 134_515_008,
    }
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)


def test_the_config_alone_is_read(tmp_path, config):
    config.save_pretrained(tmp_path)
    assert sft_memory(memory.read_config(str(tmp_path)), given()) == sft_memory(config, given())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StoneyError, match="config.json cannot be read"):
        memory.read_config(str(tmp_path))


def test_the_merge_by_hand(config):
    weights = sum(weight.numel() for weight in tiny.model().parameters())
    assert memory.merge_bytes(config) == 4 * (weights + 2 * 32 * 64)


# Logits of more than the 32 MiB below which glibc keeps a freed block: what it keeps is in no prediction.
SMALL = {
    "vocab_size": 32768,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("checkpointing", [also_complete(True), False])
def test_the_prediction_holds_within_a_fifth(checkpointing, tmp_path):
    """A real run in a process of its own, of a model whose memory is well above the libraries' noise."""
    code = f"""
import json, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from benchmarks import memory
from transformers import AutoConfig
real = memory.config_of
heads = dict(num_attention_heads=8, num_key_value_heads=4)
memory.config_of = lambda name: real(name) if name == "tiny" else AutoConfig.for_model("llama", **{SMALL!r}, **heads)
case = dict(model="small", batch_size=4, length=128, gradient_checkpointing={checkpointing})
print(memory.MARK + json.dumps(memory.run_case(case, "cpu", steps=2, seed=0)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith(benchmark.MARK))
    found = json.loads(line.removeprefix(benchmark.MARK))
    assert found["measured_bytes"] > 300 * 2**20
    assert 0.8 < found["ratio"] < 1.2, found


# What is said, and proposed.


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 24 GiB by name, of which some are free."""

    def set_free(gib: float) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(gib * GIB), 24 * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Imaginary 24")

    return set_free


HINT = "" if importlib.util.find_spec("bitsandbytes") else " (after: pip install bitsandbytes)"
ON_GPU = {"device": "cuda", "weights": torch.bfloat16, "autocast": torch.bfloat16, "lora": {"r": 16, "target_modules": "all-linear"}}  # fmt: skip


def test_the_verdict(gpu):
    gpu(10)
    needed = Memory(weights=8 * GIB, adapter=GIB // 2, learning=GIB // 2)
    assert memory.verdict(needed, given()) == (
        "GPU Imaginary 24: 10.0 GiB of 24.0 GiB free; predicted peak with 2 x 16 tokens 9.0 GiB (weights 8.0 GiB, "
        "adapter and optimizer 512 MiB, activations 512 MiB): fits"
    )
    gpu(9.5)  # the margin is part of what must be free
    assert memory.verdict(needed, given()).endswith(": will not fit")


def test_the_line_of_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert memory.device_line().startswith("CPU, ") and memory.device_line().endswith(" free")
    assert memory.free_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_a_change_that_is_enough_is_proposed_alone(gpu, monkeypatch):
    setup, phi3 = given(**ON_GPU, batch_size=16, length=1024), memory.shape("microsoft/Phi-3-mini-4k-instruct")
    needed = sft_memory(phi3, setup).peak
    gpu(needed / GIB)
    lines = list(memory.proposals(phi3, setup, accumulation=2))
    flags = [line.split(": predicted peak ")[0] for line in lines]
    assert flags == [
        f"--load_in_4bit{HINT}",
        "--max_length 256",
        "--batch_size 1 --gradient_accumulation_steps 32",  # the same 32 rows an update
        "--model Qwen/Qwen2.5-1.5B-Instruct",
    ]
    peaks = [float(line.rsplit(" ", 2)[1]) for line in lines]
    assert all(peak < needed / GIB for peak in peaks)
    assert peaks[1] == pytest.approx(sft_memory(phi3, given(**ON_GPU, batch_size=16, length=256)).peak / GIB, abs=0.051)


def test_changes_that_are_not_enough_are_proposed_together(gpu):
    setup, phi3 = given(**ON_GPU, length=512, gradient_checkpointing=False), memory.shape("microsoft/Phi-3-mini-4k-instruct")  # fmt: skip
    gpu(3.2)
    first, last = memory.proposals(phi3, setup, accumulation=8)
    assert first.startswith(
        f"--load_in_4bit{HINT} --gradient_checkpointing --max_length 256 --batch_size 1 "
        "--gradient_accumulation_steps 16: predicted peak "
    )
    assert "too much" not in first and "too much" not in last
    gpu(0.01)
    assert [line.endswith(", still too much") for line in memory.proposals(phi3, setup, 8)] == [True, True]


def test_4_bits_are_proposed_without_a_hint_where_they_are_installed_and_not_on_a_cpu(gpu, monkeypatch):
    import importlib.machinery

    spec = importlib.machinery.ModuleSpec("bitsandbytes", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert memory._changes(given(**ON_GPU), 1)[0][0] == "--load_in_4bit"
    assert not any("4bit" in flags for flags, _ in memory._changes(given(), 1))


def test_the_merge_is_said_to_be_too_much(monkeypatch, config):
    assert memory.merge_line(config).endswith("MiB of RAM")
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=1000))
    assert memory.merge_line(config).endswith("are available: the merge may be killed")


def test_an_architecture_that_cannot_be_built_gets_one_line(config):
    with pytest.raises(StoneyError, match=r"^llama: its memory can't be foreseen \(") as error:
        sft_memory(config, given(lora={"r": 4, "target_modules": ["nothing"]}))
    assert "\n" not in str(error.value)


# The benchmark.


def test_cases_and_devices_are_checked(tmp_path):
    for argv, message in (
        (["--steps", "1"], "--steps 1: AdamW's moments"),
        (["--output", str(tmp_path / "no" / "x.json")], "there is no folder"),
        (["--device", "cuda"], "torch sees no GPU here"),
        (["--cases", "phi3"], "--cases phi3: not on a cpu; there: smollm2, "),
    ):
        if torch.cuda.is_available() and "cpu" in message + str(argv):
            continue
        with pytest.raises(StoneyError, match=message):
            benchmark.main(argv)


def test_results_of_the_other_device_stay(tmp_path, monkeypatch):
    output = tmp_path / "results.json"
    before = {"case": "phi3", "device": "cuda", "machine": "Imaginary", **vars(benchmark.GPU["phi3"]), "failed": "lost"}
    output.write_text(json.dumps({"results": [before]}))
    monkeypatch.setattr(benchmark.measure, "in_process", lambda *_: {"device": "cpu", "name": "a CPU"})
    measured = {"predicted_bytes": 110, "measured_bytes": 100, "ratio": 1.1}
    monkeypatch.setattr(benchmark, "measure_case", lambda case, *_: measured)
    benchmark.main(["--cases", "smollm2", "--output", str(output)])
    results = json.loads(output.read_text())["results"]
    assert results[0] == before
    assert (results[1]["case"], results[1]["ratio"], results[1]["batch_size"]) == ("smollm2", 1.1, 2)


def test_a_case_that_fails_or_takes_too_long_is_told(monkeypatch):
    args = benchmark.build_parser().parse_args(["--time_limit", "0.01"])
    assert benchmark.measure_case(benchmark.CPU["smollm2"], "cpu", args) == {"failed": "not done in 0.01 s"}
    args = benchmark.build_parser().parse_args([])
    monkeypatch.setattr(benchmark, "__file__", "/no/such/script.py")
    assert benchmark.measure_case(benchmark.CPU["smollm2"], "cpu", args)["failed"].startswith("exit code 2: ")
