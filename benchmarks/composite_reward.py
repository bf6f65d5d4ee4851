"""The composite reward as a plain function for `trl grpo --reward_funcs benchmarks.composite_reward.composite`.

The lexicon is the file that STONEY_BENCHMARK_LEXICON names; the dataset's column ``row`` holds each row as JSON.
"""

import functools
import json
import os

from stoney_rl.data import Row
from stoney_rl.rewards.composite import Composite, Task
from stoney_rl.rewards.knowledge import load_knowledge


def composite(completions: list, row: list[str], **kwargs: object) -> list[float | None]:
    """The reward of each completion, with TRL's signature."""
    texts = [completion[-1]["content"].strip() for completion in completions]
    return [score.total for score in _composite().score([_task(line) for line in row], texts)]


@functools.cache
def _composite() -> Composite:
    return Composite(load_knowledge(os.environ["STONEY_BENCHMARK_LEXICON"]))


@functools.cache
def _task(line: str) -> Task:
    return Task.of(Row.from_dict(json.loads(line)))
