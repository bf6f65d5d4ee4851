"""The trainer against TRL's own, and what it adds: groups that teach nothing don't pull. All words are invented."""

import json

import planted_rewards
import pytest
import tiny
import torch
from transformers import GenerationConfig, TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from stoney_rl import grpo, prompts, records
from stoney_rl.rewards.composite import Composite, Score, Task
from stoney_rl.rewards.plugins import Plugin

END = 2
QUESTIONS = ["tâlo?", "What is mîva, then?", "Say sûke.", "nâpi: how many of them?", "rîlu", "kûwe or pâti?"]


class Weights(TrainerCallback):
    """A copy of the trainable weights after every update, by step, and the logs of each."""

    def __init__(self):
        self.after, self.logs = {}, {}

    def on_step_end(self, args, state, control, model, **_):
        self.after[state.global_step] = weights(model)

    def on_log(self, args, state, control, logs, **_):
        self.logs.setdefault(state.global_step, dict(logs))


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def reward(function=planted_rewards.lottery):
    """A function of planted_rewards as TRL calls it, on the decoded tokens: texts that differ earn differently."""

    def call(completion_ids, **columns):
        texts = [[{"role": "assistant", "content": repr(ids)}] for ids in completion_ids]
        return function(**columns | {"completions": texts})

    return call


def build(tmp_path, *, kind=grpo.GroupTrainer, reward_func=None, adapter=0.3, questions=QUESTIONS, **options):
    """A trainer of a tiny model whose adapter is not zero, so that it is not at its reference."""
    from datasets import Dataset
    from peft import LoraConfig

    config = {
        "max_steps": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_generations": 4,
        "max_completion_length": 6, "learning_rate": 0.1, "lr_scheduler_type": "constant", "optim": "sgd",
        "beta": 0.0, "loss_type": "dapo", "temperature": 0.9, "seed": 7, "data_seed": 7, "epsilon_high": 0.28,
    } | options  # fmt: skip
    config.setdefault("steps_per_generation", config["gradient_accumulation_steps"])
    tokenizer = tiny.tokenizer()
    prompts.prepare_tokenizer(tokenizer)
    set_seed(7)
    model = tiny.model()
    model.generation_config = GenerationConfig(eos_token_id=[END], pad_token_id=tokenizer.pad_token_id)

    def decode(ids):
        return tokenizer.decode([token for token in ids if token != END]).strip()

    own = {}
    if kind is not GRPOTrainer:
        own = {"encode": lambda prompt: prompts.encode_prompt(tokenizer, prompt), "decode": decode}
    watched = Weights()
    rows = [
        {"prompt": [{"role": "user", "content": text}], "id": f"row-{at}", "task": at}
        for at, text in enumerate(questions)
    ]
    trainer = kind(
        model=model,
        reward_funcs=reward_func or reward(),
        args=GRPOConfig(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, logging_steps=1, save_strategy="no",
            remove_unused_columns=False, gradient_checkpointing=False, dataloader_pin_memory=False, disable_tqdm=True,
            **config,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"),
        callbacks=[watched],
        **own,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.copy_(adapter * torch.randn(weight.shape, generator=generator))
    trainer.watched = watched
    return trainer


def trained(*args, **options):
    trainer = build(*args, **options)
    before = weights(trainer.model)
    trainer.train()
    trainer.watched.after[0] = before
    return trainer


def difference(one, other):
    assert one.keys() == other.keys() and len(one) > 8
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def moved(trainer, step, since=None):
    after = trainer.watched.after
    return difference(after[step], after[step - 1 if since is None else since])


# Beside TRL's own trainer.


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_one_step_is_that_of_trl(tmp_path, beta):
    theirs = trained(tmp_path, kind=GRPOTrainer, beta=beta)
    ours = trained(tmp_path, beta=beta)
    assert list(ours._logs["advantages"]) == pytest.approx(list(theirs._logs["advantages"]), abs=1e-6)
    for name in ("prompt", "completion"):
        assert list(ours._logs[name]) == list(theirs._logs[name])
    assert ours.shares_prefixes and ours.sharing_difference < 1e-5
    assert ours.watched.logs[1]["zero_spread"] == 0
    assert difference(ours.watched.after[1], theirs.watched.after[1]) < 1e-6
    assert moved(ours, 1) > 1e-4
    for name in ("reward", "entropy", "completions/mean_length", *(["kl"] if beta else [])):
        assert ours.watched.logs[1][name] == pytest.approx(theirs.watched.logs[1][name], abs=1e-5)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
def test_sharing_changes_nothing(tmp_path, loss_type):
    """Over several steps, with updates on old completions, and groups cut by the accumulation."""
    options = {"loss_type": loss_type, "beta": 0.1, "max_steps": 4, "num_iterations": 2}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    shared = trained(tmp_path, **options)
    apart = build(tmp_path, **options)
    apart.shares_prefixes = False
    apart.train()
    assert shared.sharing_difference is not None and apart.sharing_difference is None
    for step in (1, 4):
        assert difference(shared.watched.after[step], apart.watched.after[step]) < 1e-5
    assert moved(shared, 4, since=1) > 1e-3


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_eight_at_once_are_two_four_times(tmp_path, loss_type):
    """One prompt's answers earn all the same. (bnpo averages over each micro-batch's own tokens, so it differs.)"""
    options = {"loss_type": loss_type, "beta": 0.1, "max_steps": 2}
    options["reward_func"] = on("row-3", planted_rewards.constant)
    once = trained(tmp_path, **options)
    often = trained(tmp_path, **options, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert difference(once.watched.after[2], often.watched.after[2]) < 1e-6
    assert moved(once, 2) > 1e-4
    assert sorted(once.watched.logs[step]["zero_spread"] for step in (1, 2)) == [0, 0.5]


def test_where_both_ways_disagree_prompts_are_not_shared(tmp_path, monkeypatch):
    pack = grpo.prefix.pack

    def blind(*args):
        packed = pack(*args)
        packed.allowed.copy_(torch.eye(packed.allowed.size(-1)).bool().expand_as(packed.allowed))
        return packed

    monkeypatch.setattr(grpo.prefix, "pack", blind)
    mistaken = trained(tmp_path)
    monkeypatch.undo()
    assert not mistaken.shares_prefixes and mistaken.sharing_difference > 1e-3
    assert difference(mistaken.watched.after[1], trained(tmp_path).watched.after[1]) < 1e-6


def test_rows_longer_than_a_sliding_window_are_not_packed(tmp_path, monkeypatch):
    trainer = build(tmp_path)
    trainer.sharing_reach = 20
    monkeypatch.setattr(grpo.prefix, "log_probs", lambda *_: pytest.fail("packed"))
    trainer.train()
    assert difference(trainer.watched.after[1], trained_plainly(tmp_path)) < 1e-6


def trained_plainly(tmp_path):
    trainer = build(tmp_path)
    trainer.shares_prefixes = False
    trainer.train()
    return trainer.watched.after[1]


# Nothing to learn.


def after_step(step, function, before=planted_rewards.lottery):
    """``before`` up to ``step``, then ``function``."""

    def call(trainer_state, **columns):
        return (before if trainer_state.global_step < step else function)(**columns)

    return reward(call)


def on(row, function, otherwise=planted_rewards.lottery):
    """``function`` for the completions of ``row``, ``otherwise`` for the others."""

    def call(id, **columns):
        values = zip(id, function(**columns), otherwise(**columns), strict=True)
        return [one if name == row else other for name, one, other in values]

    return reward(call)


@pytest.mark.parametrize("function", ["zero", "constant", "nothing"])
@pytest.mark.parametrize("group_size", [4, 16])
def test_a_reward_without_spread_changes_no_bit(tmp_path, function, group_size):
    """After two steps that built up Adam's momentum, with KL and weight decay, in four micro-batches."""
    trainer = trained(
        tmp_path, reward_func=after_step(2, getattr(planted_rewards, function)), optim="adamw_torch", weight_decay=0.1,
        beta=0.1, max_steps=4, per_device_train_batch_size=group_size // 2, gradient_accumulation_steps=4,
        learning_rate=1e-2, num_generations=group_size,
    )  # fmt: skip
    assert moved(trainer, 1) > 1e-3 and moved(trainer, 2) > 1e-3
    assert moved(trainer, 4, since=2) == 0
    assert [trainer.watched.logs[step]["zero_spread"] for step in (1, 2, 3, 4)] == [0, 0, 1, 1]


def test_what_no_token_taught_is_not_logged_as_zero(tmp_path):
    logs = trained(tmp_path, reward_func=after_step(1, planted_rewards.zero), beta=0.1, max_steps=2).watched.logs
    for name in ("kl", "entropy", "clip_ratio/region_mean"):
        assert logs[1][name] is not None and logs[2].get(name) is None
    assert logs[1]["entropy"] > 1 and logs[2]["reward"] == 0


def test_a_micro_batch_without_a_token_does_not_thin_the_mean(tmp_path):
    """The entropy is that of the tokens that teach, not halved by the prompt that teaches nothing."""
    options = {"reward_func": on("row-1", planted_rewards.zero), "questions": QUESTIONS[:2]}
    whole = trained(tmp_path, **options).watched.logs[1]
    halves = trained(tmp_path, **options, per_device_train_batch_size=4, gradient_accumulation_steps=2).watched.logs[1]
    assert whole["zero_spread"] == halves["zero_spread"] == 0.5
    assert halves["entropy"] == pytest.approx(whole["entropy"], rel=1e-5)


def answered(tmp_path, completions, **options):
    """Weights after a step on two prompts, four ``completions`` of each given, of row-0 first."""
    trainer = build(tmp_path, questions=QUESTIONS[:2], beta=0.2, shuffle_dataset=False, **options)
    trainer._generate_single_turn = lambda *_: (completions, None)
    trainer.train()
    return trainer.watched.after[1]


LIVE = [[10, 11, END], [12, 13, 14, END], [15, END], [16, 17, 18, 19, 20, 21]]
DEAD = [[30, 31, 32, END], [33, END], [34, 35, END], [36, 37, 38, 39, 40, 41]]
OTHER = [[50, 51, 52, END], [53, END], [54, 55, END], [56, 57, 58, 59, 60, 61]]


@pytest.mark.parametrize(
    ("function", "loss_type"),
    [("constant", "dapo"), ("nothing", "dapo")]
    + [("zero", loss) for loss in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")],
)
def test_a_group_without_spread_does_not_pull(tmp_path, function, loss_type):
    """With a KL term, whatever it says; only its number of tokens counts, in the loss's average."""
    options = {"reward_func": on("row-1", getattr(planted_rewards, function)), "loss_type": loss_type}
    one, other = (answered(tmp_path, LIVE + dead, **options) for dead in (DEAD, OTHER))
    assert difference(one, other) < 1e-8


def test_a_group_with_spread_pulls(tmp_path):
    assert difference(*(answered(tmp_path, LIVE + other) for other in (DEAD, OTHER))) > 1e-4


def test_a_completion_that_cannot_be_scored_does_not_pull(tmp_path):
    """Nor does it count as 0 in its group's mean: the last of four here, another text of the same length."""

    def unscored(completions, **_):
        return [[0.1, 0.2, 0.6, None][at % 4] for at in range(len(completions))]

    texts = [LIVE, [*LIVE[:3], [70, 71, 72, 73, 74, 75]]]
    one, other = (answered(tmp_path, found + DEAD, reward_func=reward(unscored)) for found in texts)
    assert difference(one, other) < 1e-8


def test_answers_that_were_cut_off_can_be_left_out(tmp_path):
    """Where all were, there is nothing to learn from, though the rewards differ: momentum does not move it either."""
    endless = [[number, number + 1] for number in range(100, 116, 2)]

    def trainer(**options):
        found = build(tmp_path, questions=QUESTIONS[:2], beta=0.2, max_steps=2, optim="adamw_torch", **options)
        given = [LIVE + DEAD, endless]
        found._generate_single_turn = lambda *_: (given.pop(0), None)
        found.train()
        return found

    assert moved(trainer(mask_truncated_completions=True), 2) == 0
    assert moved(trainer(), 2) > 1e-3


NAN = float("nan")


@pytest.mark.parametrize(
    ("rewards", "weights", "summed", "normalised"),
    [
        ([[1, 0], [2, 0]], [1, 1], [1, 1], [1, 1]),
        ([[1, 2], [2, 1]], [1, 1], [0, 0], [1, 1]),  # the sum is the same, each by itself is not
        ([[1, 2], [2, 1]], [1, 2], [1, 1], [1, 1]),
        ([[0.3, 5], [0.3 + 1e-8, 5]], [1, 1], [0, 0], [0, 0]),  # rounding
        ([[NAN, 0], [NAN, 1]], [1, 1], [1, 1], [1, 1]),
        ([[NAN, NAN], [1, 2]], [1, 1], [0, 0], [0, 0]),  # one that is scored has nothing to compare with
        ([[NAN, NAN], [NAN, NAN]], [1, 1], [0, 0], [0, 0]),
        ([[NAN, 2], [2, NAN]], [1, 1], [0, 0], [0, 0]),  # neither function tells the two apart
        ([[NAN, 1], [2, NAN]], [1, 1], [1, 1], [0, 0]),
        ([[NAN, NAN], [1, 0], [2, 0]], [1, 1], [0, 1, 1], [0, 1, 1]),
    ],
)
def test_informative_by_hand(rewards, weights, summed, normalised):
    """Alone, and in front of a group that has spread and behind one that has none."""
    given, factors, size = torch.tensor(rewards, dtype=torch.float32), torch.tensor(weights).float(), len(rewards)
    live, dead = torch.zeros(size, 2), torch.ones(size, 2)
    live[0, 0] = 1
    for aggregation, expected in (("sum_then_normalize", summed), ("normalize_then_sum", normalised)):
        assert grpo.informative(given, factors, size, aggregation).tolist() == expected
        three = grpo.informative(torch.cat([dead, given, live]), factors, size, aggregation)
        assert three.tolist() == [0] * size + expected + [1] * size


# What is written down.


def test_spread_inside_of_groups():
    """Groups 1: 0 and 1, a deviation of 0.5; 2: 3 alone, 0; 3: nothing scored."""
    assert grpo.spread_in_groups([1, 2, 1, 3, 2], [0.0, 3.0, 1.0, None, None]) == pytest.approx(0.25)
    assert grpo.spread_in_groups([1, 1], [None, None]) == 0.0


def task(number):
    return Task(f"row-{number}", f"question {number}", "reference", ("tâlo",), frozenset())


def test_reward_functions_as_trl_calls_them():
    asked, extra, metrics = [], {}, {}

    class Fixed(Composite):
        def __init__(self):
            pass

        def score(self, tasks, texts):
            asked.extend(zip([task.id for task in tasks], texts, strict=True))
            values = [{"R_lex": 0.0, "R_cot": None}, {"R_lex": 0.5, "R_cot": None}, {"R_lex": None, "R_cot": None}]
            return [Score(total, value) for total, value in zip([0.1, 0.2, None], values, strict=True)]

    plugins = [Plugin("composite", 1.0, None), Plugin("some:length", 0.5, planted_rewards.length)]
    functions = grpo.reward_functions(plugins, Fixed(), [task(0), task(1)], lambda ids: "x" * ids[0])
    assert [function.__name__ for function in functions] == ["composite", "some:length"]
    given = {"completion_ids": [[1], [2], [3]], "task": [1, 1, 0], "prompts": [], "log_extra": extra.__setitem__,
             "log_metric": metrics.__setitem__}  # fmt: skip
    assert functions[0](**given) == [0.1, 0.2, None]
    assert asked == [("row-1", "x"), ("row-1", "xx"), ("row-0", "xxx")]
    assert extra == {"R_lex": [0.0, 0.5, None], "R_cot": [None, None, None]}
    assert metrics == pytest.approx({
        "terms/R_lex/unscored": 1 / 3, "terms/R_lex/mean": 0.25, "terms/R_lex/spread": 0.25, "terms/R_cot/unscored": 1.0,
    })  # fmt: skip
    assert functions[1](**given) == [0.01, 0.02, 0.03]


def test_every_completion_is_recorded(tmp_path):
    trainer = build(tmp_path, max_steps=3, reward_func=reward(planted_rewards.sometimes))
    tables = []
    record = grpo.Record(trainer, tmp_path, table_steps=2, on_table=lambda *table: tables.append(table))
    trainer.add_callback(record)
    trainer.train()
    lines = records.read(tmp_path / grpo.ROLLOUTS_FILE)
    assert [line["step"] for line in lines] == [1] * 8 + [2] * 8 + [3] * 8
    metrics = records.read(tmp_path / grpo.METRICS_FILE)
    assert [line["step"] for line in metrics] == [1, 2, 3]
    assert None in [line["call"] for line in lines]
    for step in (1, 2, 3):
        mine = [line for line in lines if line["step"] == step]
        assert len({line["id"] for line in mine[:4]}) == len({line["id"] for line in mine[4:]}) == 1
        paid = [line["call"] for line in mine if line["call"] is not None]
        assert metrics[step - 1]["reward"] == pytest.approx(sum(paid) / len(paid))
        for line in mine:
            assert line["prompt"] == QUESTIONS[int(line["id"].removeprefix("row-"))]
            assert line["tokens"] <= 6 and (not line["truncated"] or line["tokens"] == 6)
            assert line["call"] is not None or line["advantage"] == 0
    assert len(tables) == 1 and tables[0][0] == list(lines[0])
    assert tables[0][1] == [list(line.values()) for line in lines[8:16]]
    json.dumps(lines, allow_nan=False)


def test_lines_of_steps_to_come_are_dropped(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert records.read(path) == records.keep_steps(path, 3) == []
    records.append(path, [{"step": step, "text": "a\u2028b\u0085c"} for step in (1, 2, 3, 3)])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "te')  # a kill
    kept = records.keep_steps(path, 2)
    assert [line["step"] for line in kept] == [1, 2] == [line["step"] for line in records.read(path)]
    assert kept[0]["text"] == "a\u2028b\u0085c" and path.read_text(encoding="utf-8").endswith("}\n")


# Order of the prompts, and sampling beside the run.


def order(trainer, epoch):
    trainer.state.epoch = epoch
    return list(trainer._get_train_sampler())


def test_the_order_of_an_epoch_follows_from_seed_and_epoch(tmp_path):
    trainer = build(tmp_path, max_steps=1)
    first, second = order(trainer, 0), order(trainer, 1.0)
    assert first != second and sorted(set(first)) == sorted(set(second)) == list(range(6))
    again = build(tmp_path, max_steps=1)
    assert order(again, 1.6) == second  # resumed inside the second epoch, which it did not begin
    assert first[:4] == [first[0]] * 4 and first[0] != first[4]


def test_sampling_before_training_leaves_the_draws_alone(tmp_path):
    from stoney_rl.preflight import sample_groups

    trainer = build(tmp_path)
    before = weights(trainer.model)
    state = torch.random.get_rng_state()
    asked = [[{"role": "user", "content": text}] for text in QUESTIONS[:3]]

    def score(tasks, texts):
        if texts == [""] * 3:  # what silence earns
            return [{"total": value} for value in (0.5, 0.9, None)]
        assert [one.id for one in tasks] == ["row-0"] * 4 + ["row-1"] * 4 + ["row-2"] * 4
        return [{"total": value} for value in [0, 0, 0, 1, 0.3, 0.3, 0.3, 0.3, None, None, None, None]]

    sampled = sample_groups(trainer, asked, [task(number) for number in range(3)], score, 4)
    assert (sampled.groups, sampled.without_spread, len(sampled.tokens)) == (3, 2, 12)
    assert sampled.rewards == [0, 0, 0, 1, 0.3, 0.3, 0.3, 0.3] and len(sampled.examples) == 4
    assert sampled.silence == pytest.approx(0.7) and sampled.silence_pays  # the mean of what was sampled is 0.275
    assert 0 <= sampled.truncated <= 1 and max(sampled.tokens) <= 6
    assert torch.random.get_rng_state().equal(state)
    assert difference(weights(trainer.model), before) == 0 and not trainer._logs["prompt"]
    trainer.train()
    assert difference(trainer.watched.after[1], trained(tmp_path).watched.after[1]) == 0


def test_greedy_answers_are_those_of_one_prompt_at_a_time(tmp_path):
    trainer = build(tmp_path)
    trainer.model.train()
    asked = [trainer.encode([{"role": "user", "content": text}]) for text in QUESTIONS]
    many, single = (
        grpo.greedy_answers(trainer, asked, max_new_tokens=5, batch_size=size) for size in (4, 1)
    )  # fmt: skip
    assert many == single and len(many) == 6 and trainer.model.training
    assert {tokens for _, tokens, truncated in many if truncated} <= {5}
