"""Pushing a model along a direction: does what can be read off the residual stream also move the answer?

1. Direction: mean of the residual stream at the last tokens of the one group of texts, less that of the other
   (Turner et al. 2308.10248; Rimsky et al. 2312.06681; Marks and Tegmark 2310.06824).
2. Steering: h + alpha (mean+ - mean-) behind a layer, at the positions that are named.
3. Effect: change of logit[answer] - logit[wrong], for each row, on rows that the direction was not made from.
4. Beside it random directions of the same length: any push changes something.
"""

from collections.abc import Sequence

import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp.hooked import Batch, Edit, HookedModel
from stoney_rl.interp.pairs import PairBatch


def direction(model: HookedModel, positive: Sequence[Batch], negative: Sequence[Batch], layer: int) -> torch.Tensor:
    """Mean residual vector behind ``layer`` at the last tokens of ``positive`` less that of ``negative``, float32 [d_model]."""
    return _mean(model, positive, layer) - _mean(model, negative, layer)


def steer(vector: torch.Tensor, alpha: float, positions: torch.Tensor | None = None) -> Edit:
    """An edit of residual vectors [row, position, d_model]: h + ``alpha`` ``vector`` [d_model].

    ``positions``: bool [row, position], e.g. ``batch.mask.bool()`` for all tokens; None: each row's last token.
    """

    def edit(residual: torch.Tensor) -> torch.Tensor:
        push = alpha * vector.to(residual)
        if positions is None:
            return torch.cat([residual[:, :-1], residual[:, -1:] + push], dim=1)
        return torch.where(positions.to(residual.device)[..., None], residual + push, residual)

    return edit


def random_directions(vector: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """``count`` directions of the length of ``vector`` [d_model], evenly over the sphere, float32 [count, d_model]."""
    drawn = torch.randn(count, len(vector), generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm(dim=1, keepdim=True) * vector.norm().cpu()


def steering_effects(
    model: HookedModel,
    pairs: PairBatch,
    layer: int,
    vectors: torch.Tensor,
    alpha: float,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """What steering behind ``layer`` along each of ``vectors`` [direction, d_model] adds to logit[answer] - logit[wrong]
    of the clean prompts: float32 [pair, direction], in logits. A pass a direction; ``positions`` as in ``steer``.

    The direction against random ones, for ``significance.effects``: ``found[:, 0] - found[:, 1:].mean(dim=1)``.
    """
    if vectors.ndim != 2 or vectors.shape[1] != model.d_model:
        raise StoneyError(f"steering: vectors {tuple(vectors.shape)}, expected [direction, {model.d_model}]")
    hook = _hook(model, layer)
    before = pairs.difference(model.run(pairs.clean).logits)
    after = [
        pairs.difference(model.run(pairs.clean, edit={hook: steer(vector, alpha, positions)}).logits)
        for vector in vectors
    ]
    return (torch.stack(after, dim=1) - before[:, None]).cpu()


def _mean(model: HookedModel, batches: Sequence[Batch], layer: int) -> torch.Tensor:
    hook, total, rows = _hook(model, layer), torch.zeros(model.d_model, dtype=torch.float64), 0
    for batch in batches:
        total += model.run(batch, read={hook: lambda vectors: vectors[:, -1].double().sum(dim=0).cpu()})[hook]
        rows += len(batch)
    if not rows:
        raise StoneyError("direction: a group without texts, expected at least one in each")
    return (total / rows).float()


def _hook(model: HookedModel, layer: int) -> str:
    if not 0 <= layer < model.n_layers:
        raise StoneyError(f"{model.name}: no layer {layer}; layers go from 0 to {model.n_layers - 1}")
    return f"blocks.{layer}.hook_resid_post"
