"""Batched generation whose answers are those of one prompt at a time."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
) -> Iterator[list[Completion]]:
    """Greedy completions of ``prompts`` (token ids), one list a batch, longest prompts first.

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
        with torch.inference_mode(), _only_config(model, config):
            output = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
            )[:, width:].tolist()
        yield [_completion(index, tokens, tokenizer, ends) for index, tokens in zip(batch, output, strict=True)]


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
