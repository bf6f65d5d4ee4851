"""What a GRPO run will do, before it does it: the plan of a step, its memory, and groups that will teach nothing.

Importing this module loads no torch.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoney_rl.errors import StoneyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stoney_rl.grpo import GroupTrainer

FP32 = 4  # bytes
# Completions scored at a time on a device, unless told: a packed group of 16 fits wherever the model does.
MICRO_BATCH = 16
_MIB = 2**20


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


@dataclass(frozen=True)
class Memory:
    """Bytes expected on one device. ``peak``: what is always there, and the larger of sampling and learning."""

    weights: int
    adapter: int
    sampling: int
    learning: int

    @property
    def peak(self) -> int:
        return self.weights + self.adapter + max(self.sampling, self.learning)

    def __str__(self) -> str:
        parts = ("weights", "adapter", "sampling", "learning")
        listed = ", ".join(f"{name} {getattr(self, name) / _MIB:,.0f}" for name in parts)
        return f"about {self.peak / _MIB:,.0f} MiB a device ({listed})"


def expected_memory(
    model: "PreTrainedModel",
    plan: BatchPlan,
    *,
    group_size: int,
    prompt_tokens: int,
    completion_tokens: int,
    shares_prefixes: bool,
    gradient_checkpointing: bool,
) -> Memory:
    """What a step will need for prompts and completions of these lengths; an estimate, from the model's shape.

    Adapter: weights, gradients and Adam's two moments in fp32. Sampling: the key-value cache, and four copies of a
    step's logits. Learning: activations of one micro-batch (with checkpointing one hidden state a layer, and one layer's
    own), and three copies of a chunk of logits.
    """
    from stoney_rl.training import HEAD_CHUNK

    config = model.config.get_text_config()
    width, layers = config.hidden_size, config.num_hidden_layers
    head_width = getattr(config, "head_dim", None) or width // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    element = model.dtype.itemsize
    parameters = list(model.parameters())
    trained = sum(weight.numel() for weight in parameters if weight.requires_grad)
    local = plan.per_device * plan.accumulation
    cache = 2 * layers * heads * head_width * element * local * (prompt_tokens + completion_tokens)
    prompts = max(1, plan.per_device // group_size) if shares_prefixes else plan.per_device
    tokens = prompts * prompt_tokens + plan.per_device * completion_tokens
    a_layer = tokens * (16 * width + 6 * config.intermediate_size) * FP32
    kept = layers * tokens * width * FP32 + a_layer if gradient_checkpointing else layers * a_layer
    chunk = min(HEAD_CHUNK, plan.per_device * completion_tokens)
    return Memory(
        weights=sum(weight.numel() * weight.element_size() for weight in parameters if not weight.requires_grad),
        adapter=4 * trained * FP32,
        sampling=cache + 4 * local * config.vocab_size * FP32,
        learning=kept + 3 * chunk * config.vocab_size * FP32,
    )


def free_memory() -> int:
    """Bytes that are free on the GPU, or available on a machine without one."""
    import psutil
    import torch

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


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
