"""Batched generation whose answers are those of one prompt at a time, sampled ones too."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Completion:
    """``index``: position of its prompt; ``truncated``: the token limit came before the end of the turn."""

    index: int
    text: str
    tokens: int
    truncated: bool


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: list[list[int]],
    *,
    ends: set[int],
    max_new_tokens: int,
    batch_size: int,
    seeds: Sequence[int | None] | None = None,
    temperature: float = 1.0,
) -> Iterator[list[Completion]]:
    """Completions of ``prompts`` (token ids), one list a batch, longest prompts first, like ones in the order given.

    ``seeds``: for each prompt None, for the greedy completion, or the seed of one that is drawn at ``temperature``;
    without them all are greedy.

    Prompts of like length share a batch, padded on the left and masked, so padding changes nothing: in fp32 the
    answers equal those of batches of one. ``ends`` are the token ids that end a turn. Memory runs out, if at all, in
    the first batch.
    """
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
    )
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = len(prompts[batch[0]])
        ids = torch.full((len(batch), width), tokenizer.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for line, index in enumerate(batch):
            prompt = torch.tensor(prompts[index])
            ids[line, width - len(prompt) :] = prompt
            mask[line, width - len(prompt) :] = 1
        drawn = [seeds[index] for index in batch] if seeds else []
        with torch.inference_mode(), _only_config(model, config):
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                logits_processor=[_GumbelNoise(drawn, temperature)] if any(seed is not None for seed in drawn) else [],
            )[:, width:].tolist()
        yield [_completion(index, tokens, tokenizer, ends) for index, tokens in zip(batch, output, strict=True)]


class _GumbelNoise:
    """Makes the largest logit of a line a draw from softmax(logits / temperature), by Gumbel noise on it.

    See Maddison, Tarlow and Minka 2014, https://arxiv.org/abs/1411.0030. Every line draws from a generator of its own, so
    that a sample depends on its prompt and seed alone, not on what shares its batch; transformers' own sampling has one.
    """

    def __init__(self, seeds: Sequence[int | None], temperature: float) -> None:
        import torch

        self.temperature = temperature
        self.generators = {
            line: torch.Generator().manual_seed(seed) for line, seed in enumerate(seeds) if seed is not None
        }

    def __call__(self, input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        """``scores``: the next token's logits [line, vocabulary]; those of greedy lines stay as they are."""
        import torch

        noisy = scores.clone()
        for line, generator in self.generators.items():
            waiting = torch.empty(scores.shape[1]).exponential_(generator=generator)  # -log of it is Gumbel noise
            noisy[line] -= self.temperature * waiting.clamp_min(1e-30).log().to(scores.device)
        return noisy


@contextlib.contextmanager
def _only_config(model: "PreTrainedModel", config: "GenerationConfig") -> Iterator[None]:
    """Hide the model's own generation config, which may sample or penalise: transformers fills what is unset from it."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _completion(index: int, tokens: list[int], tokenizer: "PreTrainedTokenizerBase", ends: set[int]) -> Completion:
    length = next((position for position, token in enumerate(tokens) if token in ends), None)
    kept = tokens if length is None else tokens[:length]
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    return Completion(index, text, len(kept), truncated=length is None)
