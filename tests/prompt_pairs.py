"""Prompt pairs of random tokens, for tests of what is measured on pairs."""

import random
from collections.abc import Sequence

from stoney_rl.interp.pairs import PairBatch, PromptPair, batched


def random_pairs(lengths: Sequence[int], *, vocabulary: range = range(10, 250), seed: int = 0) -> list[PromptPair]:
    """Two random prompts of each length that differ in two tokens, the last never, with random answers."""
    draw = random.Random(seed)
    pairs = []
    for number, length in enumerate(lengths):
        clean = draw.choices(vocabulary, k=length)
        corrupt = list(clean)
        for position in draw.sample(range(1, length - 1), 2):
            corrupt[position] = draw.choice([token for token in vocabulary if token != clean[position]])
        answer, wrong = draw.sample(vocabulary, 2)
        pairs.append(PromptPair(tuple(clean), tuple(corrupt), answer, wrong, str(number), "random", ("",) * 4))
    return pairs


def induction_pairs(n: int, length: int, *, vocabulary: range, seed: int = 0) -> list[PromptPair]:
    """A sequence of ``length`` different tokens and the beginning of its repetition, '.. A B .. C D .. | .. A': next is B.

    In the corrupt prompt A and C have changed places before the repetition, '.. C B .. A D .. | .. A': next is D. Only
    what stands before B and before D differs: a model must look one token back there, and then find the place that
    follows its last token by what was seen (induction, Olsson et al. 2022).
    """
    draw = random.Random(seed)
    pairs = []
    for number in range(n):
        clean = draw.sample(vocabulary, length)
        first, second = sorted(draw.sample(range(1, length - 1, 2), 2))
        corrupt = list(clean)
        corrupt[first], corrupt[second] = clean[second], clean[first]
        repetition = clean[: first + 1]
        answer, wrong = clean[first + 1], clean[second + 1]
        pairs.append(
            PromptPair(
                (*clean, *repetition), (*corrupt, *repetition), answer, wrong, str(number), "induction", ("",) * 4
            )
        )
    return pairs


def one_batch(pairs: Sequence[PromptPair], pad_token_id: int = 0) -> PairBatch:
    """All pairs in one batch, in their order."""
    (indices, batch), *more = batched(sorted(pairs, key=lambda pair: len(pair.clean)), len(pairs), pad_token_id)
    assert not more and indices == list(range(len(pairs)))
    return batch
