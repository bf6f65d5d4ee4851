"""Prompts that a group of completions shares are computed once: in sampling, and in the forward and backward pass.

GRPO samples G completions of one prompt. Written out one row each, the prompt is computed G times, and on short answers
that is most of the work. Here a group is one packed row

    prompt | completion 1 | completion 2 | ... | completion G

in which a token sees the prompt and what stands before it in its own completion: same positions, same log-probabilities,
same gradients as separate rows (Prefix Grouper, https://arxiv.org/abs/2506.05433). Only completion tokens are projected
through the LM head. Sampling fills the key-value cache from each prompt once and copies it.

Importing this module loads torch.
"""

import functools
import math
import types
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from stoney_rl import training


@dataclass(frozen=True)
class Packed:
    """Groups of completions as the model reads them.

    input_ids, position_ids: int64 [group, token]. allowed: bool [group, 1, token, token], query may see key.
    picks: int64 [completion token], where in the flattened [group * token] the state that predicts it is. targets: int64
    [completion token]. places: (row, column) of each in the [row, completion] tensor that was packed.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    allowed: torch.Tensor
    picks: torch.Tensor
    targets: torch.Tensor
    places: tuple[torch.Tensor, torch.Tensor]


def pack(input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int) -> Packed | None:
    """Pack rows [row, prompt + completion], prompts padded on the left and completions on the right, by prompt.

    Rows whose completion is masked whole are left out; None if that is every row.
    """
    width = input_ids.size(1) - completion_length
    rows: dict[tuple[int, ...], list[int]] = {}
    mask = attention_mask.bool()
    for row in mask[:, width:].any(dim=1).nonzero().flatten().tolist():
        rows.setdefault(tuple(input_ids[row, :width][mask[row, :width]].tolist()), []).append(row)
    if not rows:
        return None
    groups = [_Group(prompt, members, input_ids, mask, width) for prompt, members in rows.items()]
    length = max(len(group.ids) for group in groups)
    device = input_ids.device
    ids, positions, owners = (
        pad_sequence([torch.tensor(getattr(group, name)) for group in groups], batch_first=True, padding_value=fill)
        for name, fill in (("ids", 0), ("positions", 0), ("owners", -1))
    )
    earlier = torch.ones(length, length).tril().bool()
    mine = owners[:, :, None] == owners[:, None, :]
    allowed = earlier & (mine | (owners[:, None, :] == 0))  # 0 is the prompt, -1 padding, which sees itself
    picks = [at + number * length for number, group in enumerate(groups) for at in group.picks]
    targets, places_row, places_column = (
        [value for group in groups for value in getattr(group, name)] for name in ("targets", "rows", "columns")
    )
    return Packed(
        ids.to(device),
        positions.to(device),
        allowed[:, None].to(device),
        torch.tensor(picks, device=device),
        torch.tensor(targets, device=device),
        (torch.tensor(places_row, device=device), torch.tensor(places_column, device=device)),
    )


class _Group:
    """One packed row, as lists. ``owners``: 0 for a token of the prompt, k for one of the k-th completion."""

    def __init__(
        self, prompt: tuple[int, ...], members: list[int], input_ids: torch.Tensor, mask: torch.Tensor, width: int
    ) -> None:
        self.ids, self.positions, self.owners = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        self.picks: list[int] = []
        self.targets: list[int] = []
        self.rows: list[int] = []
        self.columns: list[int] = []
        for number, row in enumerate(members, start=1):
            tokens = input_ids[row, width:][mask[row, width:]].tolist()
            start = len(self.ids)
            self.picks += [len(prompt) - 1, *range(start, start + len(tokens) - 1)]
            self.targets += tokens
            self.rows += [row] * len(tokens)
            self.columns += range(len(tokens))
            self.ids += tokens
            self.positions += range(len(prompt), len(prompt) + len(tokens))
            self.owners += [number] * len(tokens)


def score_packed(model: PreTrainedModel, temperature: float) -> None:
    """Let ``model(..., picks=, targets=)`` give the log-probabilities of packed completion tokens, in place.

    The output's ``log_probs`` and ``entropy`` (nats) are [completion token]; the logits are divided by ``temperature``.
    """
    forward_before = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, picks=None, targets=None, **kwargs):
        if picks is None:
            return forward_before(*args, **kwargs)
        hidden = self.base_model(*args, use_cache=False, **kwargs).last_hidden_state.flatten(0, 1)[picks]
        log_probs, entropy, _ = training.score_tokens(self.get_output_embeddings(), hidden, targets, temperature)
        return FusedCausalLMOutput(log_probs=log_probs, entropy=entropy)

    model.forward = types.MethodType(forward, model)


def log_probs(model: torch.nn.Module, packed: Packed, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies [row, completion] of the packed tokens, 0 where none was packed."""
    attention = packed.allowed
    if _attention(model) != "sdpa":  # the eager kernel adds its mask to the scores
        attention = torch.zeros(attention.shape, device=attention.device).masked_fill(~attention, float("-inf"))
        attention = attention.to(next(model.parameters()).dtype)
    output = model(
        input_ids=packed.input_ids,
        attention_mask=attention,
        position_ids=packed.position_ids,
        picks=packed.picks,
        targets=packed.targets,
    )
    blank = output.log_probs.new_zeros(shape)
    return blank.index_put(packed.places, output.log_probs), blank.index_put(packed.places, output.entropy)


def can_share(model: PreTrainedModel) -> bool:
    """Whether the model takes a mask of its own and keeps its logits as the LM head gives them."""
    return _attention(model) in ("sdpa", "eager") and not training.rescales_logits(model.config.get_text_config())


def reach(model: PreTrainedModel) -> float:
    """How many tokens a row may have so that every layer sees all of them: a sliding window's, or infinite.

    A mask that is given takes the window's place: in a longer row a token would see what the layer should not.
    """
    return getattr(model.config.get_text_config(), "sliding_window", None) or math.inf


def _attention(model: torch.nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


@torch.no_grad()
def sample(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig, *, pad: int
) -> torch.Tensor:
    """One completion of each of ``prompts`` (token ids; equal ones share their prefill): int64 [prompt, token].

    What follows the end of a completion is padding. The draws are those of ``model.generate`` on the written-out batch.
    """
    device = next(model.parameters()).device
    unique = list(dict.fromkeys(map(tuple, prompts)))
    where = {prompt: at for at, prompt in enumerate(unique)}
    ids, mask = _left_padded(unique, pad)
    ids, mask = ids.to(device), mask.to(device)
    copies = torch.tensor([where[tuple(prompt)] for prompt in prompts], device=device)
    cache = DynamicCache(config=model.config)
    if ids.size(1) > 1:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        causal = model.get_base_model() if isinstance(model, PeftModel) else model
        causal.base_model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            past_key_values=cache,
            use_cache=True,
        )
        cache.batch_select_indices(copies)
    output = model.generate(
        input_ids=ids[copies], attention_mask=mask[copies], past_key_values=cache, generation_config=config
    )
    return output[:, ids.size(1) :]


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = [torch.tensor(prompt) for prompt in prompts]
    padded = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True, padding_side="left")
    return padded, mask
