"""GRPO (https://arxiv.org/abs/2402.03300) through TRL's trainer, with what a run on little data and one device needs.

- a group's prompt is computed once (``prefix``), after a check on the first batch that this changes nothing;
- a group whose completions all earn the same, or can't be scored, does not pull the policy: not by a rounding error
  divided by a standard deviation of zero, not by the KL term, and a step without any other group changes no weight;
- checkpoints are whole, and a run that resumes from one goes on as if it had not been stopped;
- every completion, with what each term of the reward gave it, is kept in ``rollouts.jsonl``.

Importing this module loads torch.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import RepeatSampler, split_tensor_dict

from stoney_rl import generation, prefix, records
from stoney_rl.errors import StoneyError
from stoney_rl.policy import HeldOut
from stoney_rl.rewards import plugins
from stoney_rl.rewards.composite import Composite, Task
from stoney_rl.training import WholeCheckpoints

ROLLOUTS_FILE, METRICS_FILE = "rollouts.jsonl", "metrics.jsonl"
_DIVERGED = "update {}: the policy diverged, its numbers are not finite; start again with a lower --learning_rate"
SPREAD = 1e-6  # rewards of a group that differ by less are the same number, rounded
# Mean difference of log-probabilities, shared against written out: rounding of fp32, and of bf16 with its 8 bits.
SHARING_TOLERANCE = {"fp32": 1e-4, "less": 0.05}


def reward_functions(
    rewards: Sequence[plugins.Plugin], composite: Composite, tasks: Sequence[Task], decode: Callable[[list[int]], str]
) -> list[Callable]:
    """``rewards`` as TRL calls reward functions; rows name their task by its number in the column ``task``.

    The composite's terms go to TRL's logs: mean, spread (standard deviation inside a group, averaged over groups) and
    the share that could not be scored, and to the table of completions.
    """

    def of_composite(completion_ids, task, log_extra, log_metric, **_):
        asked = [tasks[number] for number in task]
        scores = composite.score(asked, [decode(ids) for ids in completion_ids])
        for name in scores[0].values:
            values = [score.values[name] for score in scores]
            log_extra(name, values)
            known = [value for value in values if value is not None]
            log_metric(f"terms/{name}/unscored", 1 - len(known) / len(values))
            if known:
                log_metric(f"terms/{name}/mean", statistics.fmean(known))
                log_metric(f"terms/{name}/spread", spread_in_groups(task, values))
        return [score.total for score in scores]

    def of_plugin(plugin: plugins.Plugin) -> Callable:
        def call(completion_ids, task, **_):
            return plugins.call(plugin, [tasks[number] for number in task], [decode(ids) for ids in completion_ids])

        return call

    functions = []
    for plugin in rewards:
        function = of_composite if plugin.call is None else of_plugin(plugin)
        function.__name__ = plugin.name
        functions.append(function)
    return functions


def spread_in_groups(groups: Sequence[int], values: Sequence[float | None]) -> float:
    """The standard deviation of ``values`` inside a group, averaged over the groups that have a value."""
    members: dict[int, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        if value is not None:
            members.setdefault(group, []).append(value)
    return statistics.fmean(statistics.pstdev(found) for found in members.values()) if members else 0.0


class GroupTrainer(WholeCheckpoints, GRPOTrainer):
    """TRL's ``GRPOTrainer`` as the module's docstring says.

    ``encode``: chat messages -> token ids, ``decode``: token ids -> text, the same as in SFT and evaluation.
    """

    def __init__(
        self, *args: object, encode: Callable[[list[dict]], list[int]], decode: Callable, **kwargs: object
    ) -> None:
        self.encode, self.decode = encode, decode
        self.learns = True
        super().__init__(*args, **kwargs)
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.shares_prefixes = prefix.can_share(base) and not sharded
        self.sharing_reach = prefix.reach(base)
        self.sharing_difference: float | None = None
        if self.shares_prefixes:
            prefix.score_packed(base, self.temperature)
        self.steps_between_resumable = math.lcm(self.num_iterations, self.args.logging_steps)
        self.add_callback(_OnlyWhereSomethingWasLearned(self))

    def create_model_card(self, *args: object, **kwargs: object) -> None:
        """No card in each checkpoint: stage.json says more."""

    # Order of the prompts: from seed and epoch alone, so that a run that resumes in a later epoch draws it again.

    def _get_train_sampler(self, dataset: object = None) -> RepeatSampler:
        return _Prompts(
            self,
            data_source=dataset or self.train_dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    # Sampling

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], None, dict]:
        return [self.encode(prompt) for prompt in prompts], None, {}

    def _generate_single_turn(self, prompt_ids: list, *args: object, **kwargs: object) -> tuple[list, None]:
        if self.use_vllm or self.use_transformers_continuous_batching or not self.shares_prefixes:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            generation_kwargs=self.generation_kwargs,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as model:
            try:
                drawn = prefix.sample(model, prompt_ids, self.generation_config, pad=self._tokenizer.pad_token_id)
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise StoneyError(_DIVERGED.format(self.state.global_step)) from error
            drawn = drawn.tolist()
        return [_up_to_the_end(tokens, set(self.eos_token_ids)) for tokens in drawn], None

    # Rewards, and which groups they tell apart

    def _calculate_rewards(
        self, inputs: list, prompts: list, completions: list, completion_ids_list: list
    ) -> torch.Tensor:
        self._log_completion_extra("id", [row["id"] for row in inputs])
        self._log_completion_extra("text", [self.decode(ids) for ids in completion_ids_list])
        self._log_completion_extra("tokens", [len(ids) for ids in completion_ids_list])
        self._log_completion_extra("truncated", [ids[-1] not in self.eos_token_ids for ids in completion_ids_list])
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.model.training:
            self._informative = informative(
                rewards, self.reward_weights.to(rewards.device), self.num_generations, self.multi_objective_aggregation
            )
            for name, values in zip(self.reward_func_names, rewards.T, strict=True):
                self._metrics["train"][f"rewards/{name}/unscored"].append(values.isnan().float().mean().item())
            self._metrics["train"]["zero_spread"].append(1 - self._informative.float().mean().item())
        return rewards

    def _generate_and_score_completions(self, inputs: list) -> dict:
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            first = self.accelerator.process_index * len(inputs)
            rows = self._informative[first : first + len(inputs)]
            output["advantages"] = output["advantages"] * rows
            output["completion_mask"] = output["completion_mask"] * rows[:, None]
            learned_from = self.accelerator.reduce(output["completion_mask"].sum(), reduction="sum")
            self.learns = bool(learned_from)  # not if all of a group's completions are masked as truncated, either
        return output

    def _prepare_inputs(self, generation_batch: list) -> dict:
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        every = self.args.steps_per_generation * self.num_iterations
        if self._step % every == 0 or self._buffered_inputs is None:
            scored = self._generate_and_score_completions(generation_batch)
            # Not shuffled as in TRL: the completions of a prompt stay together and share it.
            self._buffered_inputs = split_tensor_dict(scored, self.args.steps_per_generation)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    # Loss

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **other: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        def plain(model: torch.nn.Module) -> tuple:
            return super(GroupTrainer, self)._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **other
            )

        if not self.shares_prefixes or input_ids.size(1) > self.sharing_reach:
            return plain(model)
        if self.sharing_difference is None and attention_mask[:, -logits_to_keep:].any():
            self._check_sharing(input_ids, attention_mask, logits_to_keep, plain)
            if not self.shares_prefixes:
                return plain(model)
        step = batch_size or len(input_ids)
        parts = [
            self._shared(model, input_ids[start : start + step], attention_mask[start : start + step], logits_to_keep)
            for start in range(0, len(input_ids), step)
        ]
        log_probs, entropies = (torch.cat(part) for part in zip(*parts, strict=True))
        return log_probs, entropies if compute_entropy else None, None

    def _shared(
        self, model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies [row, completion]; rows without an unmasked completion are not computed."""
        nothing = not attention_mask[:, -length:].any()
        if nothing and self.accelerator.num_processes > 1:  # every process must run the model, or the others wait
            attention_mask = attention_mask.clone()
            attention_mask[0, -length:] = 1
        packed = prefix.pack(input_ids, attention_mask, length)
        shape = (len(input_ids), length)
        if packed is None:
            weights = (weight for weight in self.model.parameters() if weight.requires_grad)
            return sum(weight.sum() for weight in weights) * 0 + torch.zeros(
                shape, device=input_ids.device
            ), torch.zeros(shape, device=input_ids.device)
        with self.accelerator.autocast():
            return prefix.log_probs(model, packed, shape)

    @torch.no_grad()
    def _check_sharing(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int, plain: Callable
    ) -> None:
        """Compute the first batch both ways; share prompts from then on if the two agree."""
        mask = attention_mask[:, -length:].float()
        shared, _ = self._shared(self.model, input_ids, attention_mask, length)
        difference = ((shared - plain(self.model)[0]).abs() * mask).sum() / mask.sum()
        self.sharing_difference = float(difference)
        exact = self.model.dtype == torch.float32 and self.accelerator.mixed_precision == "no"
        self.shares_prefixes = self.sharing_difference <= SHARING_TOLERANCE["fp32" if exact else "less"]

    def _compute_loss(self, model: torch.nn.Module, inputs: dict) -> torch.Tensor:
        metrics = self._metrics["train" if self.model.training else "eval"]
        before = {name: len(values) for name, values in metrics.items()}
        loss = super()._compute_loss(model, inputs)
        if not self.accelerator.reduce(inputs["completion_mask"].sum(), reduction="sum"):
            for name, values in metrics.items():  # the mean over no token is no zero
                del values[before.get(name, 0) :]
        return loss


def informative(
    rewards: torch.Tensor, weights: torch.Tensor, group_size: int, aggregation: str = "sum_then_normalize"
) -> torch.Tensor:
    """Which completions can teach something: bool [completion] from ``rewards`` [completion, function], NaN unscored.

    A completion that some function scored, in a group whose scored rewards differ by more than ``SPREAD``: the weighted
    sum, or with ``normalize_then_sum`` any function's.
    """
    scored = ~torch.isnan(rewards).all(dim=1)
    judged = rewards
    if aggregation == "sum_then_normalize":
        judged = (rewards * weights).nansum(dim=1, keepdim=True).masked_fill(~scored[:, None], float("nan"))
    grouped = judged.view(-1, group_size, judged.size(1))
    highest = grouped.nan_to_num(nan=float("-inf")).amax(dim=1)
    lowest = grouped.nan_to_num(nan=float("inf")).amin(dim=1)
    return (highest - lowest > SPREAD).any(dim=1).repeat_interleave(group_size) & scored


def _up_to_the_end(tokens: list[int], ends: set[int]) -> list[int]:
    """``tokens`` up to the first that ends a turn, that one included."""
    return tokens[: next((at for at, token in enumerate(tokens) if token in ends), len(tokens)) + 1]


class _Prompts(RepeatSampler):
    """TRL's sampler, which draws the order of an epoch anew from its seed and the epoch's number."""

    def __init__(self, trainer: GRPOTrainer, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + int(self.trainer.state.epoch or 0))
        return super().__iter__()


class _OnlyWhereSomethingWasLearned(TrainerCallback):
    """No update, not even by momentum or weight decay, in a step none of whose groups tells completions apart.

    Raises ``StoneyError`` for gradients that are not finite, before they reach the weights and a checkpoint.
    """

    def __init__(self, trainer: GroupTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: object, model: torch.nn.Module, **kwargs: object) -> None:
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        if self.trainer.accelerator.scaler is None and not all(bool(one.isfinite().all()) for one in gradients):
            raise StoneyError(_DIVERGED.format(self.trainer.state.global_step + 1))
        if not self.trainer.learns and self.trainer.accelerator.scaler is None:
            for weight in model.parameters():
                weight.grad = None


class Record(TrainerCallback):
    """Writes ``rollouts.jsonl`` (a line for each completion) and ``metrics.jsonl`` (one for each log) to ``directory``.

    ``on_table``: (columns, rows) of a step's completions, every ``table_steps`` updates. After a resume, lines of steps
    that are trained again are dropped.
    """

    def __init__(self, trainer: GroupTrainer, directory: Path, *, table_steps: int, on_table: Callable) -> None:
        self.trainer, self.directory, self.table_steps, self.on_table = trainer, directory, table_steps, on_table

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.is_world_process_zero:
            for name in (ROLLOUTS_FILE, METRICS_FILE):
                records.keep_steps(self.directory / name, state.global_step)

    def on_log(self, args: object, state: object, control: object, logs: dict | None = None, **kwargs: object) -> None:
        if state.is_world_process_zero and logs and "train_runtime" not in logs:  # the summary is no step's
            records.append(self.directory / METRICS_FILE, [{"step": state.global_step, **logs}])

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.is_world_process_zero:
            lines = self.completions(state.global_step)
            if (state.global_step - 1) % self.trainer.num_iterations == 0:  # else those of the step before, again
                records.append(self.directory / ROLLOUTS_FILE, lines)
            if state.global_step % self.table_steps == 0 and lines:
                self.on_table(list(lines[0]), [list(line.values()) for line in lines])

    def completions(self, step: int) -> list[dict]:
        """The completions that the last step learned from, with what each reward and term gave."""
        logs = self.trainer._logs
        columns = {"id": logs["extra"]["id"], "prompt": [prompt[-1]["content"] for prompt in logs["prompt"]]}
        columns["completion"] = logs["extra"]["text"]
        columns |= {
            name: [None if value != value else value for value in values] for name, values in logs["rewards"].items()
        }
        columns |= {name: values for name, values in logs["extra"].items() if name not in ("id", "text")}
        columns["advantage"] = logs["advantages"]
        return [{"step": step} | dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True)]


class HeldOutRewards(TrainerCallback):
    """Measures the policy on held-out prompts before training, every ``every`` updates (0: never between), and at the end."""

    def __init__(self, held_out: HeldOut, every: int, log: Callable[[dict, int], None]) -> None:
        self.held_out, self.every, self.log = held_out, every, log

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.is_world_process_zero:
            self.held_out.resume(state.global_step)
            if state.global_step == 0:
                self._measure(0)

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        due = self.every and state.global_step % self.every == 0
        if state.is_world_process_zero and (due or state.global_step >= state.max_steps):
            self._measure(state.global_step)

    def _measure(self, step: int) -> None:
        found = self.held_out.measure(step).summary()
        self.log({f"held_out/{name}": value for name, value in found.items()}, step)


def greedy_answers(
    trainer: GroupTrainer, prompts: Sequence[list[int]], *, max_new_tokens: int, batch_size: int
) -> list[tuple[str, int, bool]]:
    """(text, tokens, truncated) of the policy's greedy answer to each prompt, as evaluation generates it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    was_training = model.training
    model.eval()
    answers: list = [None] * len(prompts)
    try:
        for batch in generation.generate(
            model,
            trainer._tokenizer,
            prompts,
            ends=set(trainer.eos_token_ids),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        ):
            for done in batch:
                answers[done.index] = (done.text, done.tokens, done.truncated)
    finally:
        model.train(was_training)
    return answers
