"""The trainer: the same loss as TRL's, checkpoints that are whole or absent, an order of rows that can be resumed."""

import json
import types

import pytest
import tiny

from stoney_rl import checkpoints, corpus, prompts
from stoney_rl.errors import StoneyError

ASKED = ["What is ba?", "Say wa.", "And what, pray, is the form of kolâ in a longer question?"]
ANSWERS = ["ba", "It is wâ.", "kolâḵa!"]


@pytest.fixture(scope="module", autouse=True)
def training():
    from stoney_rl import training

    return training


def batch(seed=0, rows=3, width=20):
    """Random token ids with labels on a random stretch of each row."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 259, (rows, width), generator=generator)
    labels = ids.clone()
    for row in range(rows):
        start, end = sorted(torch.randint(1, width, (2,), generator=generator).tolist())
        labels[row, :start] = labels[row, end + 1 :] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def fused(architecture, *, ours):
    from trl.trainer.utils import add_fused_lm_head

    from stoney_rl import training

    model = tiny.model(architecture)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if ours:
        training._score_answers_only(model)
    return model


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("chunk", [512, 4], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("count", [None, 50])
def test_the_loss_is_trl_s(architecture, chunk, count, training, monkeypatch):
    import torch

    monkeypatch.setattr(training, "HEAD_CHUNK", chunk)
    theirs, ours = fused(architecture, ours=False), fused(architecture, ours=True)
    assert theirs.forward.__func__ is not ours.forward.__func__
    inputs = batch()
    assert chunk == 512 or (inputs["labels"][:, 1:] != -100).sum() > 2 * chunk
    expected = theirs(**inputs, fused_lm_head=True, num_items_in_batch=count)
    got = ours(**inputs, fused_lm_head=True, num_items_in_batch=count)
    assert abs(got.loss - expected.loss) < 1e-6
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-6, rtol=1e-6)
    assert torch.equal(got.is_top1.bool(), expected.is_top1.bool())
    assert torch.equal(got.label_mask, expected.label_mask)
    expected.loss.backward()
    got.loss.backward()
    wanted = gradients(theirs)
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_loss_is_the_plain_model_s(architecture):
    inputs = batch(seed=1)
    plain = tiny.model(architecture)(**inputs).loss
    got = fused(architecture, ours=True)(**inputs, fused_lm_head=True).loss
    assert abs(got - plain) < 1e-6


def test_gemma2_keeps_trl_s_head(training):
    """It caps its logits; and Gemma 3, whose config has the field but no value, does not."""
    model = fused("gemma2", ours=False)
    forward = model.forward
    training._score_answers_only(model)
    assert model.forward == forward
    assert model.config.final_logit_softcapping == 30.0
    model = fused("gemma3", ours=False)
    forward = model.forward
    training._score_answers_only(model)
    assert model.forward != forward


def test_without_the_flag_the_model_is_itself():
    import torch

    inputs = batch()
    plain, ours = tiny.model()(**inputs), fused("llama", ours=True)(**inputs)
    assert torch.equal(plain.logits, ours.logits) and torch.equal(plain.loss, ours.loss)


def test_a_batch_without_an_answer_has_no_loss_and_no_gradient():
    inputs = batch()
    inputs["labels"][:] = -100
    model = fused("llama", ours=True)
    output = model(**inputs, fused_lm_head=True)
    output.loss.backward()
    assert output.loss == 0 and not output.is_top1.any()
    assert all(not gradient.any() for gradient in gradients(model).values() if gradient is not None)


# The trainer as train_lora.py builds it.


def examples(copies=4):
    tokenizer = tiny.tokenizer()
    prompts.prepare_tokenizer(tokenizer)
    ends = prompts.end_of_turn_ids(tokenizer)
    asked = [[{"role": "user", "content": question}] for question in ASKED * copies]
    return tokenizer, [
        prompts.encode_example(tokenizer, prompt, answer, ends)
        for prompt, answer in zip(asked, ANSWERS * copies, strict=True)
    ]


SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}


@pytest.fixture
def build(tmp_path, training):
    def build(model=None, **options):
        from datasets import Dataset
        from peft import LoraConfig
        from trl import SFTConfig

        tokenizer, rows = examples()
        options = SAVING | {"max_steps": 7, "logging_steps": 1} | options
        trainer = training.AnswerTrainer(
            model=model or tiny.model(layers=1),
            args=SFTConfig(
                output_dir=str(tmp_path / "out"),
                max_length=None,
                per_device_train_batch_size=3,
                report_to="none",
                use_cpu=True,
                bf16=False,
                data_seed=0,
                **options,
            ),
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows[:3]),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"),
        )
        training.quiet_progress(trainer)
        return trainer

    return build


def test_a_batch_trains_the_answers_and_no_padding(build):
    trainer = build(train_sampling_strategy="sequential")
    tokenizer = trainer.processing_class
    (first, *_) = trainer.get_train_dataloader()
    trained = first["labels"] != -100
    assert [tokenizer.decode(ids[mask]) for ids, mask in zip(first["input_ids"], trained, strict=True)] == [
        answer + "<|im_end|>" for answer in ANSWERS
    ]
    padding = first["attention_mask"] == 0
    assert padding.any()
    assert (first["input_ids"][padding] == tokenizer.pad_token_id).all() and not (padding & trained).any()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (first["input_ids"][~padding] != tokenizer.pad_token_id).all()


def test_only_the_adapter_is_trained(build):
    trainer = build()
    names = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
    assert len(names) == 2 * 7 and all("lora_" in name for name in names)


def checkpoint_names(trainer):
    from pathlib import Path

    return sorted(path.name for path in Path(trainer.args.output_dir).iterdir() if path.name != "README.md")


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


def test_checkpoints_are_whole_and_the_last_two_are_kept(build, tmp_path):
    trainer = build()
    trainer.train()
    assert checkpoint_names(trainer) == ["checkpoint-6", "checkpoint-7"]
    for name in checkpoint_names(trainer):
        assert {path.name for path in (tmp_path / "out" / name).iterdir()} == CHECKPOINT_FILES
    assert json.loads((tmp_path / "out/checkpoint-6/trainer_state.json").read_text())["global_step"] == 6


def test_the_best_checkpoint_is_kept_under_its_name_and_loaded(build, tmp_path):
    # A rate that rises makes the first evaluation the best.
    trainer = build(
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        save_total_limit=1,
        learning_rate=30.0,
        lr_scheduler_type="constant",
        max_steps=6,
    )
    trainer.train()
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    best = min(losses, key=losses.get)
    assert best != 6
    assert set(checkpoint_names(trainer)) >= {f"checkpoint-{best}"}
    state = json.loads((tmp_path / "out" / f"checkpoint-{best}" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "out" / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-5)


def test_a_save_that_fails_leaves_no_checkpoint(build, monkeypatch):
    trainer = build(max_steps=4)
    save = type(trainer)._save_optimizer_and_scheduler

    def fail(self, directory):
        if self.state.global_step == 4:
            raise OSError("No space left on device")
        save(self, directory)

    monkeypatch.setattr(type(trainer), "_save_optimizer_and_scheduler", fail)
    with pytest.raises(StoneyError, match=r"checkpoint 4 can't be written \(No space left .* MiB free\); .* --resume"):
        trainer.train()
    assert checkpoint_names(trainer) == ["checkpoint-2"]


def rl_trainer(kind, training, directory, **options):
    """TRL's trainer of that kind with whole checkpoints, on a tiny model."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    common = {"output_dir": str(directory), "report_to": "none", "use_cpu": True, "bf16": False} | SAVING | options
    tokenizer, rows = examples()
    trainer = type("Whole", (training.WholeCheckpoints, getattr(trl, f"{kind}Trainer")), {})
    if kind == "GRPO":
        return trainer(
            model=tiny.model(layers=1),
            args=trl.GRPOConfig(
                per_device_train_batch_size=4,
                num_generations=2,
                max_completion_length=4,
                generation_kwargs={"min_new_tokens": 4},  # the count is the same whatever is drawn
                **common,
            ),
            reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
            train_dataset=Dataset.from_list([{"prompt": ASKED[0]}] * 4),
            processing_class=tokenizer,
        )
    pairs = [{"chosen_ids": row["input_ids"], "rejected_ids": row["input_ids"][:-2]} for row in rows]
    config = tiny.model(layers=1).config
    config.num_labels = 1
    return trainer(
        model=AutoModelForSequenceClassification.from_config(config),
        args=trl.RewardConfig(per_device_train_batch_size=3, max_length=None, **common),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("kind", ["SFT", "Reward", "GRPO"])
def test_tokens_are_counted_and_the_count_goes_on_after_a_resume(build, training, tmp_path, kind):
    """From a checkpoint at step 4, between the records of steps 3 and 6. Each batch has the same tokens."""
    options = {"logging_steps": 3, "max_steps": 6, "train_sampling_strategy": "sequential"}
    make = build if kind == "SFT" else lambda **options: rl_trainer(kind, training, tmp_path / "out", **options)
    counts = []
    for checkpoint in (None, str(tmp_path / "out" / "checkpoint-4")):
        trainer = make(**options)
        trainer.train(resume_from_checkpoint=checkpoint)
        counts.append([log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log])
    answers = sum(len(row["input_ids"]) for row in examples(copies=1)[1])
    a_step = {"SFT": answers, "Reward": 2 * answers - 3 * 2, "GRPO": 4 * (len(ASKED[0].encode()) + 4)}[kind]
    assert counts == [[3 * a_step, 6 * a_step]] * 2


def test_rows_of_like_length_share_a_batch_in_an_order_of_seed_and_epoch(training):
    import torch

    rows = {"input_ids": [[0] * (1 + 7 * number % 40) for number in range(40)]}
    args = types.SimpleNamespace(
        data_seed=5, train_batch_size=2, gradient_accumulation_steps=2, world_size=1,
        train_sampling_strategy="group_by_length",
    )  # fmt: skip
    trainer = types.SimpleNamespace(args=args, state=types.SimpleNamespace(epoch=0.0), num_rows=40)

    def order(seed, epoch, noise):
        args.data_seed, trainer.state.epoch = seed, epoch
        torch.manual_seed(noise)  # the global generator has no say
        return list(training._Order(trainer, rows))

    first = order(5, 0.0, noise=1)
    assert sorted(first) == list(range(40)) and len(training._Order(trainer, rows)) == 40
    assert first == order(5, 0.0, noise=2) == order(5, 0.75, noise=3)  # resumed inside the epoch
    assert first != order(5, 1.0, noise=1) and first != order(6, 0.0, noise=1)
    assert order(5, None, noise=1) == first  # before the first step
    lengths = [len(rows["input_ids"][number]) for number in first]
    spread = [max(lengths[i : i + 4]) - min(lengths[i : i + 4]) for i in range(4, 40, 4)]
    assert max(spread) < 25 and sum(spread) / len(spread) < 15  # four at random: 24 on average


# What is saved is what was trained.


@pytest.fixture
def adapter(tmp_path):
    """A random adapter on a saved base, as train_lora.py leaves it."""
    import torch
    from peft import LoraConfig, get_peft_model

    base = tiny.checkpoint(tmp_path / "base", layers=1)
    torch.manual_seed(0)
    model = tiny.model(layers=1)
    model.name_or_path = str(base)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2, init_lora_weights=False)
    model = get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    checkpoints.write_json(tmp_path / "adapter" / corpus.SPLIT_FILE, {})
    return model, tmp_path / "adapter"


def test_another_adapter_on_disk_is_noticed(adapter, training):
    import torch
    from safetensors.torch import load_file, save_file

    model, directory = adapter
    training.check_saved_adapter(model, directory)
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "lora_B" in name)[0, 0] += 1e-6
    with pytest.raises(StoneyError, match="1 saved tensors differ from the trained ones"):
        training.check_saved_adapter(model, directory)
    saved = load_file(directory / "adapter_model.safetensors")
    save_file(saved | {"more": torch.zeros(1)}, directory / "adapter_model.safetensors")
    with pytest.raises(StoneyError, match="differ from the trained"):
        training.check_saved_adapter(model, directory)


def test_save_merged_records_both_fingerprints(adapter, training, tmp_path):
    import torch

    model, directory = adapter
    training.save_merged(directory, tmp_path / "merged", {"stage": "sft"}, dtype=torch.bfloat16)
    adapted, merged = (checkpoints.read_stage(path) for path in (directory, tmp_path / "merged"))
    assert (adapted["kind"], merged["kind"], merged["adapter"]) == ("adapter", "merged", str(directory))
    assert adapted["fingerprint"] == checkpoints.fingerprint(model)
    assert merged["fingerprint"]["dtype"] == "bfloat16"
    assert 0 < checkpoints.logit_difference(adapted["fingerprint"], merged["fingerprint"]) < 0.05


def test_a_merge_that_changes_the_logits_is_refused(adapter, training, tmp_path, monkeypatch):
    import torch
    from peft import PeftModel

    merge = PeftModel.__getattr__

    def spoilt(self, name):
        found = merge(self, name)
        if name != "merge_and_unload":
            return found

        def merge_and_spoil():
            model = found()
            with torch.no_grad():
                model.lm_head.weight[20] *= 1.01
            return model

        return merge_and_spoil

    monkeypatch.setattr(PeftModel, "__getattr__", spoilt)
    with pytest.raises(StoneyError, match="after merging"):
        training.save_merged(adapter[1], tmp_path / "merged", {"stage": "sft"}, dtype=torch.float32)
    assert not (tmp_path / "merged").exists()


def test_a_file_that_holds_another_model_is_refused(adapter, training, tmp_path, monkeypatch):
    import torch
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    def save_spoilt(self, directory, **options):
        with torch.no_grad():
            self.lm_head.weight[20] += 1e-4
            save(self, directory, **options)
            self.lm_head.weight[20] -= 1e-4

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_spoilt)
    with pytest.raises(StoneyError, match="the saved weights compute other logits"):
        training.save_merged(adapter[1], tmp_path / "merged", {"stage": "sft"}, dtype=torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_target_modules(training):
    model = tiny.model("phi3", layers=1)
    assert training.target_modules(model, ["all-linear"]) == "all-linear"
    assert training.target_modules(model, ["qkv_proj", "o_proj"]) == ["qkv_proj", "o_proj"]
    with pytest.raises(StoneyError, match="--lora_target_modules q_proj: the model has down_proj, gate_up_proj"):
        training.target_modules(model, ["q_proj", "o_proj"])
    with pytest.raises(StoneyError, match="lm_head"):
        training.target_modules(model, ["lm_head", "o_proj"])
