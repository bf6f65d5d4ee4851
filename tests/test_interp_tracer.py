"""The live tracer: a run that is watched is the run that is not, to the last bit, and what is seen is what is there.

All words are invented.
"""

import contextlib
import json
import os
import random
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import train_grpo
import train_lora
from stoney_rl import cli, data, planted, records
from stoney_rl.errors import StoneyError
from stoney_rl.interp import attention, lens, live, tracer
from stoney_rl.interp.hooked import Batch, hook_model

INDUCTION = Path(__file__).parent / "induction"


def examples(lengths=(9, 14, 11, 20, 30, 12), start=5):
    """Random texts of the tiny tokenizer; the answer begins at ``start``."""
    rng = random.Random(0)
    rows = [[rng.randrange(3, 259) for _ in range(length)] for length in lengths]
    return [{"input_ids": ids, "labels": [-100] * start + ids[start:]} for ids in rows]


@pytest.fixture(scope="module")
def probe():
    return live.make_probe(examples(), tiny.tokenizer(), seed=0)


def with_adapter(architecture="llama", **options):
    """A model in training as the stages have it: LoRA with dropout and random B, frozen base, checkpointing."""
    model = tiny.with_adapter(architecture, lora_dropout=0.3, **options)
    if architecture == "gemma2":
        model.config.final_logit_softcapping = 1.0  # so low that leaving it out shows
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    return model.train()


def state(model):
    """Everything about a model that tracing might change."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "weights": {name: weight.clone() for name, weight in model.state_dict().items()},
        "gradients": {name: weight.grad for name, weight in model.named_parameters()},
        "trainable": {name: weight.requires_grad for name, weight in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: [list(getattr(module, kind)) for kind in hooks] for name, module in model.named_modules()},
        "methods": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "config": model.config.to_dict() | {"kernel": model.config._attn_implementation},
        "random": [torch.random.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()],
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# The model stays as it is


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_model_is_left_as_it_was(architecture, probe):
    model = with_adapter(architecture)
    model.get_base_model().base_model.layers[1].eval()  # modes that differ between modules stay different
    before = state(model)
    live.check(model, probe)
    neurons = live.choose_neurons(model, probe, seed=0)
    live.trace(model, probe, [neuron[:2] for neuron in neurons])
    assert same(state(model), before)


def test_gradients_that_wait_for_an_update_stay(probe):
    model = with_adapter()
    model(torch.tensor(probe.texts[:1])).logits.sum().backward()
    before = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    live.choose_neurons(model, probe, seed=0)
    live.trace(model, probe)
    after = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert before and same(after, before)


def test_an_error_inside_leaves_it_as_it_was_too(probe, monkeypatch):
    model = with_adapter()
    before = state(model)
    monkeypatch.setattr(attention, "entropy", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        live.trace(model, probe)
    assert same(state(model), before)


# What is seen is what is there


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_trace_says_what_the_hooked_model_says(architecture, probe):
    """Of an adapter with dropout, in training mode: the merged copy under TransformerLens is the oracle."""
    model = with_adapter(architecture)
    neurons = [neuron[:2] for neuron in live.choose_neurons(model, probe, seed=0)]
    found = live.trace(model, probe, neurons)
    hooked = hook_model(model, tiny.tokenizer())

    def close(ours, theirs, atol=1e-5):
        theirs = np.asarray(theirs, dtype=np.float32)
        assert ours.shape == theirs.shape and np.abs(ours - theirs).max() < atol

    repeated = attention.head_scores(hooked, Batch(probe.repeated, torch.ones_like(probe.repeated)))
    for name in ("previous_token", "induction"):
        close(found[name], repeated[name])
    read_off, depths = [], []
    for number, (text, start) in enumerate(zip(probe.texts, probe.starts, strict=True)):  # unpadded
        ids = torch.tensor([text])
        batch = Batch(ids, torch.ones_like(ids))
        scores = attention.head_scores(hooked, batch)
        for name in ("entropy", "sink"):
            close(found[name][number], scores[name][0])
        positions = range(start - 1, min(start + live.ANSWER_TOKENS, len(text)) - 1)
        targets = ids[:, start : start + live.ANSWER_TOKENS, None]
        reading = lens.logit_lens(hooked, batch, positions=positions, targets=targets)
        read_off.append(reading.target_log_probabilities[0, :, :, 0].T)
        depths.append(lens.settled_depth(reading)[0])
        if number < live.SHOWN:
            close(found[f"pattern_{number}"], attention.attention_patterns(hooked, batch)[0], 1e-3)  # half precision
            run = hooked.run(batch, read={f"blocks.{layer}.mlp.hook_post": torch.clone for layer in (0, 1)})
            close(
                found[f"activation_{number}"],
                torch.stack([run[f"blocks.{layer}.mlp.hook_post"][0, :, index] for layer, index in neurons]),
            )
    close(found["log_prob"], torch.cat(read_off))
    close(found["depth"], torch.cat(depths))


def test_the_repeated_tokens_are_those_of_the_attention_report(probe):
    hooked = hook_model(tiny.model(), tiny.tokenizer())
    batch = attention.repeated_random_tokens(hooked, live.REPEATED_ROWS, live.REPEATED_TOKENS, seed=0)
    assert torch.equal(batch.ids, probe.repeated)


def test_chosen_neurons_are_those_with_the_largest_first_order_effect(probe):
    model = with_adapter()
    chosen = live.choose_neurons(model, probe, seed=0)
    hooked = hook_model(model, tiny.tokenizer())
    hooks = ["blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"]
    effects = torch.zeros(2, 64)
    for text, start in zip(probe.texts, probe.starts, strict=True):
        ids = torch.tensor([text])
        answer = range(start, min(start + live.ANSWER_TOKENS, len(text)))

        def log_prob(logits, answer=answer, text=text):
            return sum(logits[0, at - 1].log_softmax(-1)[text[at]] for at in answer)

        found = hooked.gradients(Batch(ids, torch.ones_like(ids)), log_prob, at=hooks)
        products = [found.activations[hook] * found.gradients[hook] for hook in hooks]
        effects += torch.stack([product[0].sum(0).abs() for product in products])
    best = {divmod(at, 64) for at in effects.flatten().topk(live.NEURONS).indices.tolist()}
    assert {(layer, index) for layer, index, why in chosen if why == "top"} == best
    random_ones = {(layer, index) for layer, index, why in chosen if why == "random"}
    assert len(random_ones) == live.NEURONS and not random_ones & best
    assert chosen == sorted(chosen) and chosen == live.choose_neurons(model, probe, seed=0)
    assert {neuron for neuron in live.choose_neurons(model, probe, seed=1) if neuron[2] == "top"} < set(chosen)


def test_measures_worked_out_by_hand():
    mask = torch.tensor([[0, 1, 1, 1]])
    pattern = torch.zeros(1, 2, 4, 4)
    pattern[0, 0, 1:, 1] = 1  # head 0 looks at the row's first token, from padding too
    pattern[0, 0, 0, 1] = 1
    pattern[0, 1] = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0.5, 0.5, 0], [0, 0.2, 0.3, 0.5]])
    scores = attention.pattern_scores(Batch(torch.arange(4)[None], mask))(pattern)
    assert scores[0, :, attention.MEASURES.index("sink")].tolist() == pytest.approx([1, 0.35])
    top = torch.tensor([[7, 7, 7], [7, 8, 7], [8, 7, 7], [1, 2, 3]])
    assert lens.first_lasting(top == top[:, -1:]).tolist() == [0, 2, 1, 2]


@pytest.mark.skipif(not (INDUCTION / "model.safetensors").exists(), reason="the fixture is not made")
def test_heads_that_are_known_are_found():
    """The committed model copies: one head of layer 0 looks at the token before, heads of layer 1 at what followed."""
    from stoney_rl import models

    source = models.find_model(str(INDUCTION))
    tokenizer, model = models.load_tokenizer(source), models.load_model(source, torch.float32)
    rows = [{"input_ids": list(range(5, 15)), "labels": [-100] * 4 + list(range(9, 15))}]
    found = live.trace(model, live.make_probe(rows, tokenizer, seed=0))
    previous, induction = (found[name].mean(0) for name in ("previous_token", "induction"))
    assert previous[0].max() > 0.5 and previous[1].max() < 0.2
    assert induction[1].max() > 0.5 and induction[0].max() < 0.2


# The probe


def test_the_probe_is_short_held_out_and_fixed_by_the_seed():
    rows = examples(lengths=range(8, 48))
    one, again, other = (live.make_probe(rows, tiny.tokenizer(), seed) for seed in (0, 0, 1))
    assert one.texts == again.texts and torch.equal(one.repeated, again.repeated)
    assert one.texts != other.texts and not torch.equal(one.repeated, other.repeated)
    assert len(set(one.texts)) == live.TEXTS and max(map(len, one.texts)) < 28
    assert {tuple(row["input_ids"]) for row in rows} > set(one.texts) and set(one.starts) == {5}
    assert one.repeated.shape == (live.REPEATED_ROWS, 2 * live.REPEATED_TOKENS)
    assert torch.equal(one.repeated[:, : live.REPEATED_TOKENS], one.repeated[:, live.REPEATED_TOKENS :])
    assert one.repeated.min() > 2  # 0 to 2 are special
    assert live.Probe(((1, 2, 3, 4, 5, 6), (1, 2)), (1, 1), one.repeated).answer_tokens() == [
        (0, 1), (0, 2), (0, 3), (0, 4), (1, 1),
    ]  # fmt: skip


def test_without_held_out_rows_there_is_no_probe():
    with pytest.raises(StoneyError, match="--trace_every: no held-out row"):
        live.make_probe([], tiny.tokenizer(), seed=0)


# What can't be traced is told before anything is trained


def test_a_model_that_computes_more_behind_its_layers_is_refused(probe, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "granite", vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=4.0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    trainer = types.SimpleNamespace(model=model, is_fsdp_enabled=False, is_deepspeed_enabled=False)
    with pytest.raises(StoneyError, match="GraniteForCausalLM computes more than norm and LM head"):
        tracer.Tracer(trainer, probe, tmp_path, every=1, seed=0)


def test_a_model_of_other_parts_is_refused_before_training(here, capsys):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", vocab_size=259, n_embd=32, n_layer=1, n_head=2, n_positions=1024)
    AutoModelForCausalLM.from_config(config).save_pretrained("gpt2")
    tiny.tokenizer().save_pretrained("gpt2")
    with pytest.raises(StoneyError, match="--trace_every: GPT2LMHeadModel is not built of the parts"):
        sft("--model", "gpt2", "--trace_every", "1")
    assert not list(here.glob("run_ckpt*/checkpoint-*"))


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_sharded_weights_are_refused(kind, probe, tmp_path):
    trainer = types.SimpleNamespace(is_fsdp_enabled=kind == "fsdp", is_deepspeed_enabled=kind == "deepspeed")
    with pytest.raises(StoneyError, match="sharded"):
        tracer.Tracer(trainer, probe, tmp_path, every=1, seed=0)


# The callback by itself


class Tracking:
    def __init__(self):
        self.logged, self.tables = [], []

    def log(self, numbers, step):
        self.logged.append((step, numbers))

    def table(self, *table):
        self.tables.append(table)


def run_of(steps, directory, probe, *, begin=0, every=2, main=True, best=None, tracking=None, speed=0.1):
    """The callback's calls in a run whose training moves a token's unembedding, at ``speed``."""
    torch.manual_seed(0)
    model = with_adapter()
    trainer = types.SimpleNamespace(model=model, is_fsdp_enabled=False, is_deepspeed_enabled=False)
    watcher = tracer.Tracer(trainer, probe, directory, every=every, seed=0, tracker=tracking)
    args = types.SimpleNamespace(load_best_model_at_end=best is not None)
    at = types.SimpleNamespace(global_step=begin, is_world_process_zero=main, best_global_step=best)
    watcher.on_train_begin(args, at, None)
    for step in range(begin + 1, steps + 1):
        at.global_step = step
        with torch.no_grad():
            model.get_base_model().lm_head.weight[5].fill_(speed * step)
        watcher.on_step_end(args, at, None)
    watcher.on_train_end(args, at, None)
    return watcher


def test_traces_come_at_the_start_every_n_updates_and_at_the_end(tmp_path, probe):
    tracking = Tracking()
    run_of(5, tmp_path, probe, tracking=tracking)
    found = tracer.read(tmp_path)
    assert found.steps == [0, 2, 4, 5] == [step for step, _ in tracking.logged]
    assert {path.name for path in tmp_path.iterdir()} == {"trace.jsonl", "trace"}
    files = {path.name for path in (tmp_path / "trace").iterdir()}
    assert files == {"probe.json", *(f"step-{step}.npz" for step in found.steps)}
    assert found["entropy"].shape == (4, 4, 2, 4) and found["induction"].shape == (4, 4, 2, 4)
    assert found["log_prob"].shape == (4, 16, 3) and found["depth"].shape == (4, 16)
    lengths = [len(text["ids"]) for text in found.probe["texts"]]
    assert found["pattern_1"].shape == (4, 2, 4, lengths[1], lengths[1]) and found["pattern_1"].dtype == np.float16
    assert found["activation_0"].shape == (4, 16, lengths[0]) and len(found.probe["neurons"]) == 16
    assert [tuple(text["ids"]) for text in found.probe["texts"]] == list(probe.texts)
    assert found.probe["answer_tokens"] == [list(place) for place in probe.answer_tokens()]

    line = found.lines[2]
    assert line["mean_entropy"] == pytest.approx(found["entropy"][2].mean(), abs=1e-6)
    assert line["max_induction"] == pytest.approx(found["induction"][2].mean(0).max(), abs=1e-6)
    assert line["answer_log_prob"] == pytest.approx(found["log_prob"][2, :, -1].mean(), abs=1e-6)
    assert len({line["answer_log_prob"] for line in found.lines}) == 4  # the weight moved
    numbers = {f"trace/{name}" for name in line.keys() - {"step", "seconds"}}
    assert all(logged.keys() == numbers for _, logged in tracking.logged)
    ((key, columns, rows),) = tracking.tables
    assert (key, len(rows), len(columns)) == ("trace/heads", 8, len(rows[0])) and columns[:3] == [
        "layer",
        "head",
        "entropy first",
    ]
    assert rows[6][:2] == [1, 2] and rows[6][-1] == pytest.approx(found["induction"][-1, :, 1, 2].mean())


def test_a_resumed_run_goes_on_where_its_checkpoint_was(tmp_path, probe):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    run_of(6, tmp_path / "whole", probe, every=1)
    run_of(2, tmp_path / "cut", probe, every=1)
    run_of(4, tmp_path / "cut", probe, begin=2, every=1, speed=0.5)  # as no run goes twice on a GPU
    with (tmp_path / "cut/trace.jsonl").open("a") as file:
        file.write('{"step": 5, "sec')  # killed while it wrote
    (tmp_path / "cut/trace/step-5.npz").write_bytes(b"half")
    chosen = tracer.read(tmp_path / "cut").probe["neurons"]
    run_of(6, tmp_path / "cut", probe, begin=2, every=1)
    whole, cut = tracer.read(tmp_path / "whole"), tracer.read(tmp_path / "cut")
    assert cut.steps == whole.steps == [0, 1, 2, 3, 4, 5, 6] and cut.probe["neurons"] == chosen
    assert cut.names == whole.names and {"entropy", "depth", "pattern_0", "activation_1"} < set(whole.names)
    assert all(np.array_equal(cut[name], whole[name]) for name in whole.names)


def test_only_rank_zero_traces(tmp_path, probe):
    run_of(4, tmp_path, probe, main=False)
    assert not list(tmp_path.iterdir())


def test_the_last_trace_is_of_what_is_kept(tmp_path, probe):
    run_of(5, tmp_path, probe, best=3, every=2)
    assert tracer.read(tmp_path).steps == [0, 2, 3, 4]


def test_a_full_disk_ends_the_tracing_and_not_the_training(tmp_path, probe, monkeypatch, capsys):
    append, calls = records.append, []

    def full(path, lines):
        calls.append(path)
        if len(calls) > 1:
            with path.open("a") as file:
                file.write('{"step"')
            raise OSError(28, "No space left on device")
        append(path, lines)

    monkeypatch.setattr(records, "append", full)
    tracking = Tracking()
    run_of(6, tmp_path, probe, tracking=tracking)
    said = [line for line in capsys.readouterr().out.splitlines() if "trace" in line]
    assert len(calls) == 2 and len(said) == 1
    assert said[0].startswith(f"{tmp_path}: the trace can't be written ([Errno 28]") and "training goes on" in said[0]
    assert tracer.read(tmp_path).steps == [0] and [step for step, _ in tracking.logged] == [0, 2]


def test_what_is_not_finite_is_none(probe):
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    numbers = tracer.summary(live.trace(model, probe))
    assert numbers["answer_log_prob"] is None and 0 < numbers["mean_entropy"] <= 1
    assert "NaN" not in json.dumps(numbers)


def test_reading_what_is_not_there(tmp_path, probe):
    with pytest.raises(StoneyError, match=r"no trace \(.*trace.jsonl\); train with --trace_every"):
        tracer.read(tmp_path)
    (tmp_path / "trace.jsonl").write_text('{"st')
    with pytest.raises(StoneyError, match="no trace yet"):
        tracer.read(tmp_path)
    run_of(1, tmp_path, probe)
    (tmp_path / "trace/step-1.npz").write_bytes(b"PK half of it")
    with pytest.raises(StoneyError, match="its trace is damaged"):
        tracer.read(tmp_path)


# In the stages


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    tiny.checkpoint(directory / "base", layers=2)
    rows = planted.PlantedLanguage(seed=0, num_lexemes=20).rows(rules_per_lexeme=3, templates_per_fact=1)
    data.write_jsonl(directory / "rows.jsonl", rows)
    return directory


@pytest.fixture
def here(inputs, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("WANDB", "HF_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMON = ("--dataset", "rows.jsonl", "--test_fraction", "0.2", "--validation_fraction", "0.2", "--learning_rate", "1e-2",
          "--lora_rank", "4", "--dtype", "fp32", "--wandb_mode", "disabled")  # fmt: skip


def sft(*argv, name="run"):
    train_lora.main([
        *("--model", "base", "--batch_size", "4", "--gradient_accumulation_steps", "2", "--max_steps", "4"),
        *("--save_steps", "2", "--eval_steps", "2", "--lora_dropout", "0.3", "--neftune_noise_alpha", "5"),
        *(*COMMON, "--output_dir", f"{name}_ckpt", *argv),
    ])  # fmt: skip


def grpo(*argv, name="run"):
    train_grpo.main([
        *("--lora_path", "base", "--batch_size", "8", "--group_size", "4", "--max_steps", "4", "--save_steps", "2"),
        *("--eval_steps", "2", "--eval_prompts", "4", "--max_completion_length", "6", "--preflight_prompts", "0"),
        *("--probe_samples", "12", "--allow_broken_reward"),
        *(*COMMON, "--output_dir", name, "--adapter_dir", f"{name}_ckpt", *argv),
    ])  # fmt: skip


@contextlib.contextmanager
def killed_after(step):
    """The run is interrupted at the end of an update, after its trace."""
    original = tracer.Tracer.on_step_end

    def interrupt(self, args, at, control, **kwargs):
        original(self, args, at, control, **kwargs)
        if at.global_step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tracer.Tracer, "on_step_end", interrupt)
        yield


def what_was_computed(name):
    """Every logged number but the clock's, and the adapter."""
    from safetensors.torch import load_file

    logs = json.loads(Path(f"{name}_ckpt/trainer_state.json").read_text())["log_history"]
    clock = ("runtime", "per_second", "step_time", "train_loss")
    curve = [
        {key: value for key, value in log.items() if not key.endswith(clock)} for log in logs if "train_loss" not in log
    ]
    return curve, load_file(f"{name}_ckpt/adapter_model.safetensors")


@pytest.fixture
def uploads(monkeypatch):
    """The names of the files that a stage uploads."""
    from stoney_rl import tracking

    found = []
    start = tracking.start_stage

    def watched(*args, **options):
        tracker = start(*args, **options)
        tracker.artifact = lambda name, kind, path, exclude=(): found.extend(
            file for file, _ in tracking.artifact_files(path, exclude)
        )
        return tracker

    monkeypatch.setattr(tracking, "start_stage", watched)
    return found


@pytest.mark.parametrize("train", [sft, grpo])
def test_a_run_that_is_watched_is_the_run_that_is_not(train, here, uploads, monkeypatch):
    """Losses and weights to the last bit, with dropout and noise; the one that is watched is killed, too, and goes on."""
    from stoney_rl import policy

    monkeypatch.setattr(policy, "plot", lambda *_, title: _[-1].write_bytes(b""))
    train(name="plain")
    with killed_after(3):
        train("--trace_every", "1", name="watched")
    before = tracer.read("watched_ckpt.partial")
    assert before.steps == list(range(4))  # one more than its checkpoint
    before_kill = {name: before[name] for name in before.names}
    train("--trace_every", "1", "--resume", name="watched")

    (curve, adapter), (watched_curve, watched_adapter) = map(what_was_computed, ("plain", "watched"))
    assert sum("loss" in log for log in curve) == 4
    assert any(weight.any() for name, weight in adapter.items() if "lora_B" in name)
    assert watched_curve == curve and same(watched_adapter, adapter)
    assert not Path("plain_ckpt/trace").exists() and not Path("plain_ckpt/trace.jsonl").exists()
    found = tracer.read("watched_ckpt")
    assert found.steps == list(range(5)) and found.probe == before.probe
    assert all(np.array_equal(found[name][:4], before_kill[name]) for name in found.names)  # one made again
    assert len({line["answer_log_prob"] for line in found.lines}) > 2  # what is traced moved

    tokenizer = tiny.tokenizer()
    questions = {row.question for row in held_out_rows()}
    for text in found.probe["texts"]:
        assert any(question in tokenizer.decode(text["ids"][: text["answer"]]) for question in questions)
    assert "adapter_model.safetensors" in uploads and not [name for name in uploads if name.startswith("trace/")]


def held_out_rows():
    from stoney_rl import corpus

    return corpus.prepare("rows.jsonl", test_fraction=0.2, validation_fraction=0.2).split.validation


@pytest.mark.parametrize("stage", [train_lora, train_grpo])
def test_the_flag(stage):
    def parsed(*argv):
        return cli.parse_args(stage.build_parser(), list(argv)).trace_every

    assert (parsed(), parsed("--trace_every"), parsed("--trace_every", "7")) == (0, 25, 7)
    assert "trace_every" in stage.NOT_IDENTITY
    with pytest.raises(SystemExit):
        parsed("--trace_every", "-1")
