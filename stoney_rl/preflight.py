"""What a run will do, before it does it: the plan of a GRPO step, groups that will teach nothing, the time on a CPU.

Importing this module loads no torch.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoney_rl import memory
from stoney_rl.errors import StoneyError

if TYPE_CHECKING:
    import argparse

    from transformers import PretrainedConfig

    from stoney_rl.grpo import GroupTrainer
    from stoney_rl.models import ModelSource

# Completions scored at a time on a device, unless told: a packed group of 16 fits wherever the model does.
MICRO_BATCH = 16


@dataclass(frozen=True)
class BatchPlan:
    """How a step's completions are spread. ``prompts``: different ones a step; ``per_device``: completions at a time."""

    prompts: int
    per_device: int
    accumulation: int


def plan_batch(batch_size: int, group_size: int, devices: int = 1, micro_batch_size: int | None = None) -> BatchPlan:
    """Spread ``batch_size`` completions a step, in groups of ``group_size``, over devices and accumulation.

    Raises ``StoneyError`` for numbers that don't go into one another, with the nearest that do.
    """
    if group_size < 2:
        raise StoneyError(f"--group_size {group_size}: a group of one has nothing to compare with; use at least 2")
    unit = math.lcm(group_size, devices)
    if batch_size % unit:
        below, sizes = batch_size // unit * unit, [size for size in range(2, batch_size + 1) if batch_size % size == 0]
        fitting = sorted(sizes, key=lambda size: abs(size - group_size))[:2]
        groups = " or ".join(map(str, sorted(fitting))) if batch_size % devices == 0 else ""
        near = " or ".join(str(size) for size in (below, below + unit) if size)
        raise StoneyError(
            f"--batch_size {batch_size}: completions a step must be a multiple of --group_size {group_size}"
            + (f" and of {devices} devices" if devices > 1 else "")
            + f"; nearest: --batch_size {near}"
            + (f", or --group_size {groups}" if groups else "")
        )
    local = batch_size // devices
    divisors = [size for size in range(1, local + 1) if local % size == 0]
    if micro_batch_size is None:
        whole = [size for size in divisors if size % group_size == 0 or group_size % size == 0]
        below = max(size for size in whole if size <= MICRO_BATCH)
        above = min((size for size in whole if size > MICRO_BATCH), default=below)
        # A group whose size has no good divisor, such as 17, is taken whole.
        micro_batch_size = below if 2 * below >= min(MICRO_BATCH, local) else above
    elif micro_batch_size not in divisors:
        fitting = sorted(divisors, key=lambda size: abs(size - micro_batch_size))[:2]
        raise StoneyError(
            f"--micro_batch_size {micro_batch_size}: does not divide the {local} completions of a device; "
            f"nearest: {' or '.join(map(str, sorted(fitting)))}"
        )
    return BatchPlan(batch_size // group_size, micro_batch_size, local // micro_batch_size)


def foresee_sft(
    args: "argparse.Namespace",
    source: "ModelSource",
    examples: list[dict],
    *,
    updates: int,
    accumulation: int,
    devices: int,
) -> list[str]:
    """What ``train_lora.py`` says before it loads the weights: memory, and on a CPU the time that the run will take.

    ``examples``: the tokenised training rows; ``accumulation``: batches of --batch_size rows an update and device.
    """
    config = memory.read_config(source.name, source.revision)
    setup = memory.setup(args, devices=devices, length=max(len(example["input_ids"]) for example in examples))
    try:
        needed = memory.sft_memory(config, setup)
    except StoneyError as error:  # a forecast is no reason to end a run
        return [f"memory: {error}"]
    lines = [memory.verdict(needed, setup), memory.merge_line(config)]
    if not memory.fits(needed.peak):
        lines += [f"  {line}" for line in memory.proposals(config, setup, accumulation)]
    if setup.device == "cpu":
        tokens = statistics.fmean(len(example["input_ids"]) for example in examples)
        answers = statistics.fmean(sum(label != -100 for label in example["labels"]) for example in examples)
        layers, head = cpu_speed(config, setup)
        seconds = updates * accumulation * setup.batch_size * (tokens * layers + answers * head)
        lines.append(f"time on this CPU: about {spoken(seconds)}, by a layer and the LM head timed just now")
    return lines


def cpu_speed(config: "PretrainedConfig", setup: "memory.Setup") -> tuple[float, float]:
    """Seconds a token that training takes in all layers, and seconds a token with a label in the LM head; measured now.

    One real layer with its adapter, forward and backward, on a row of ``setup.length`` tokens, and the head with as many
    words as fit a moment: what they take times the number of layers and of words. The second of two passes counts. The
    run's own random numbers stay untouched.
    """
    import torch

    from stoney_rl.training import score_tokens

    config = config.get_text_config()
    words = min(config.vocab_size, 8192)
    with torch.random.fork_rng(devices=[]):
        model = memory.adapted(config, setup, 1, device="cpu", vocab_size=words, pad_token_id=None)
        ids = torch.randint(words, (1, setup.length))
    for _ in range(2):
        with torch.autocast("cpu", dtype=setup.autocast, enabled=setup.autocast is not None):
            started = time.perf_counter()
            hidden = model.get_base_model().base_model(input_ids=ids, use_cache=False).last_hidden_state
            half = time.perf_counter()
            states = hidden[0].detach().requires_grad_()
            log_probs, *_ = score_tokens(model.get_output_embeddings(), states, ids[0])
        log_probs.sum().backward()
        scored = time.perf_counter()
        hidden.backward(torch.ones_like(hidden))
        layer = half - started + time.perf_counter() - scored
    return (
        layer * config.num_hidden_layers / setup.length,
        (scored - half) * config.vocab_size / words / setup.length,
    )


def spoken(seconds: float) -> str:
    """A duration to two figures or so: '40 s', '12 minutes', '5.5 hours', '3.2 days'."""
    for unit, size in (("days", 86400), ("hours", 3600)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{max(1, round(seconds))} s"


@dataclass(frozen=True)
class Sampled:
    """A few groups of completions. ``without_spread``: groups whose completions all earn the same, or can't be scored.

    ``silence``: what an empty answer to the same prompts earns, on average; None where it can't be scored.
    """

    groups: int
    without_spread: int
    truncated: float
    tokens: list[int]
    rewards: list[float]
    seconds: float
    examples: list[tuple[str, float | None]]
    silence: float | None = None

    @property
    def silence_pays(self) -> bool:
        """Whether the policy would earn more by saying nothing than it does: what it learns first may be silence."""
        return self.silence is not None and bool(self.rewards) and statistics.fmean(self.rewards) < self.silence

    def __str__(self) -> str:
        mean = f"mean reward {statistics.fmean(self.rewards):.3f}" if self.rewards else "no completion could be scored"
        return (
            f"{self.without_spread} of {self.groups} groups have no spread and would teach nothing, "
            f"{self.truncated:.0%} of the completions cut at the limit, "
            f"{statistics.fmean(self.tokens):.0f} tokens a completion (longest {max(self.tokens)}), {mean}"
        )


def sample_groups(
    trainer: "GroupTrainer", prompts: Sequence[list[dict]], tasks: Sequence, scorer: Callable, group_size: int
) -> Sampled:
    """Sample one group for each prompt from the policy as it is; the run's own random numbers stay untouched."""
    import torch

    from stoney_rl.grpo import SPREAD

    started = time.monotonic()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        written = [trainer.encode(prompt) for prompt in prompts for _ in range(group_size)]
        drawn, _ = trainer._generate_single_turn(written, None, {}, group_size)
    texts = [trainer.decode(ids) for ids in drawn]
    totals = [score["total"] for score in scorer([task for task in tasks for _ in range(group_size)], texts)]
    silent = [score["total"] for score in scorer(tasks, [""] * len(tasks)) if score["total"] is not None]
    groups = [totals[start : start + group_size] for start in range(0, len(totals), group_size)]
    known = [[value for value in group if value is not None] for group in groups]
    return Sampled(
        groups=len(groups),
        without_spread=sum(not group or max(group) - min(group) <= SPREAD for group in known),
        truncated=statistics.fmean(ids[-1] not in trainer.eos_token_ids for ids in drawn),
        tokens=[len(ids) for ids in drawn],
        rewards=[value for group in known for value in group],
        silence=statistics.fmean(silent) if silent else None,
        seconds=time.monotonic() - started,
        examples=list(zip(texts[:group_size], totals[:group_size], strict=True)),
    )
