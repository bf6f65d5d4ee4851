"""Prompt pairs: two prompts of equal length that ask for different answers, scored at the first token that differs.

A Stoney word takes several tokens and two words often begin alike, so a pair is never scored on 'the answer token'. The
tokens that both answers begin with are put behind both prompts; what follows is where the answers part, and there

    difference = logit[answer] - logit[wrong]

is positive for a model that knows the clean prompt's answer, and negative on the corrupt prompt for one that knows that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stoney_rl.interp.hooked import Batch, left_padded


@dataclass(frozen=True)
class PromptPair:
    """``clean`` and ``corrupt``: token ids, as many of the one as of the other, up to the scored token.

    ``answer``: the id that the clean prompt asks for; ``wrong``: the one that the corrupt prompt asks for. ``cluster``:
    pairs that share it depend on one another (a lexeme). ``texts``: clean prompt, corrupt prompt, answer, wrong answer,
    for people.
    """

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answer: int
    wrong: int
    cluster: str
    family: str
    texts: tuple[str, str, str, str]


@dataclass(frozen=True)
class PairBatch:
    """Pairs as tensors. The rows of ``clean`` and ``corrupt`` fit each other position by position."""

    clean: Batch
    corrupt: Batch
    answer: torch.Tensor  # int64 [pair]
    wrong: torch.Tensor

    def __len__(self) -> int:
        return len(self.answer)

    def difference(self, logits: torch.Tensor) -> torch.Tensor:
        """logit[answer] - logit[wrong] at the last position, float32 [pair], from logits [pair, position, vocabulary]."""
        last = logits[:, -1].float()
        rows = torch.arange(len(self), device=last.device)
        return last[rows, self.answer.to(last.device)] - last[rows, self.wrong.to(last.device)]


def batched(pairs: Sequence[PromptPair], size: int, pad_token_id: int) -> list[tuple[list[int], PairBatch]]:
    """Batches of at most ``size`` pairs of similar length, each with the pairs' positions in ``pairs``."""
    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index].clean))
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    return [(chunk, _as_batch([pairs[index] for index in chunk], pad_token_id)) for chunk in chunks]


def _as_batch(pairs: Sequence[PromptPair], pad_token_id: int) -> PairBatch:
    return PairBatch(
        left_padded([pair.clean for pair in pairs], pad_token_id),
        left_padded([pair.corrupt for pair in pairs], pad_token_id),
        torch.tensor([pair.answer for pair in pairs]),
        torch.tensor([pair.wrong for pair in pairs]),
    )
