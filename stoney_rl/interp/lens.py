"""The logit lens: what a model would say if it stopped at a layer, and from which layer on it says what it ends with.

    reading = logit_lens(model, pairs.clean, targets=torch.stack([pairs.answer, pairs.wrong], 1))
    reading.top_ids, reading.kl            # [row, layer, position, ...]; layer 0 is the embedding
    answer_depth(reading)                  # [row, position], in layers

1. h_l is the residual stream after l layers: h_0 the embedding, h_n what the final norm reads; p is the model's output.
2. Logit lens (nostalgebraist 2020): softmax(unembed(final_norm(h_l))), soft cap included; at l = n it is p.
3. With a tuned lens, h_l is first translated into what the last layer would write (see tuned_lens).
4. Depth: the first layer from which on the answer stays what it is at the end.

A few vectors and one layer at a time: [row, layer, position, vocabulary] never exists. One unembedding gives all of it;
TransformerLens's ``logit_lens``, the oracle of the tests, gives top tokens or targets, and no divergence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp.hooked import Batch, Edit, HookedModel

if TYPE_CHECKING:
    from stoney_rl.interp.tuned_lens import TunedLens

CHUNK = 64  # vectors that are unembedded at once: 64 x 49,152 logits of SmolLM2 are 13 MB


@dataclass(frozen=True)
class LensReading:
    """What the lens shows, on the CPU, at every layer from 0 (the embedding) to n_layers (the model's own output).

    float32 [row, layer, position]: ``entropy`` of the lens's distribution and ``kl``, KL(p || lens), both in nats.
    [row, layer, position, k]: ``top_ids`` (int64, likeliest first), ``top_probabilities``. [row, layer, position,
    target], the last axis empty without targets: ``target_log_probabilities`` (nats), ``target_ranks`` (int64; 0 is the
    likeliest, equals don't count). At padding, numbers are NaN and ids and ranks -1.
    """

    entropy: torch.Tensor
    kl: torch.Tensor
    top_ids: torch.Tensor
    top_probabilities: torch.Tensor
    target_log_probabilities: torch.Tensor
    target_ranks: torch.Tensor


def logit_lens(
    model: HookedModel,
    batch: Batch,
    *,
    positions: Sequence[int] = (-1,),
    targets: torch.Tensor | None = None,
    top_k: int = 5,
    tuned: "TunedLens | None" = None,
    ranks: bool = True,
) -> LensReading:
    """The lens at ``positions`` of every row; ``tuned`` translates the streams first.

    ``positions``: indices into the padded rows; count from the end (-1 is each row's last token). ``targets``: token ids
    whose probability and rank are wanted, int64 [row, target] for all positions, or [row, position, target]. ``ranks``:
    without them (-1) twenty targets take half the time. Formulas and sources: see the module. Raises ``StoneyError``
    for positions, targets, a ``top_k`` or a tuned lens that don't fit.
    """
    positions = list(positions)
    if tuned and tuned.bias.shape != (model.n_layers, model.d_model):
        raise StoneyError(f"{model.name}: the tuned lens is of a model of another shape; fit one to this model")
    targets = _checked_targets(model, batch, positions, targets, top_k)
    streams = residual_streams(model, batch, lambda stream: stream[:, positions].flatten(0, 1))
    chunks = zip(streams.split(CHUNK, dim=1), targets.flatten(0, 1).split(CHUNK), strict=True)
    parts = [_read(model, vectors, ids.to(model.device), top_k, tuned, ranks) for vectors, ids in chunks]
    is_token = batch.mask[:, positions].bool().cpu()
    return LensReading(*(_by_row(torch.cat(field, dim=1), is_token) for field in zip(*parts, strict=True)))


def settled_depth(reading: LensReading) -> torch.Tensor:
    """The first layer from which on the likeliest token is the final one, float32 [row, position].

    0: the embedding says it already; n_layers: only the last layer does. NaN at padding.
    """
    top = reading.top_ids[..., 0]
    return first_lasting((top == top[:, -1:]) & (top >= 0))


def answer_depth(reading: LensReading) -> torch.Tensor:
    """The first layer from which on target 0 (the answer) is likelier than target 1 (the wrong one), [row, position].

    float32; NaN where it is not so at the end, and at padding. Raises ``StoneyError`` with fewer than two targets.
    """
    if reading.target_ranks.shape[-1] < 2:
        raise StoneyError("the depth of an answer needs targets: the answer first, then the wrong one")
    log_probabilities = reading.target_log_probabilities
    return first_lasting(log_probabilities[..., 0] > log_probabilities[..., 1])


# Reading


def residual_streams(model: HookedModel, batch: Batch, select: Edit) -> torch.Tensor:
    """``select`` of the residual stream [row, position, d_model] -> [vector, d_model]; all layers: [layer, vector, d_model]."""
    hooks = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.n_layers)]
    hooks.append(f"blocks.{model.n_layers - 1}.hook_resid_post")
    run = model.run(batch, read=dict.fromkeys(hooks, select), stop_at_layer=model.n_layers)  # no logits: a fourth less
    return torch.stack([run[hook] for hook in hooks])


def _read(
    model: HookedModel,
    streams: torch.Tensor,
    targets: torch.Tensor,
    top_k: int,
    tuned: "TunedLens | None",
    with_ranks: bool,
) -> list[torch.Tensor]:
    """The fields of ``LensReading`` in their order, each [layer, vector, ...], from streams [layer, vector, d_model]."""
    final = log_probabilities(model, streams[-1])
    layers = []
    for layer, stream in enumerate(streams):
        lens = log_probabilities(model, tuned.translate(stream, layer) if tuned else stream)
        top = lens.topk(top_k)
        of_targets = lens.gather(-1, targets)
        ranks = (lens[:, None] > of_targets[..., None]).sum(-1) if with_ranks else torch.full_like(targets, -1)
        entropy = -(lens.exp() * lens).sum(-1)
        layers.append((entropy, kl_divergence(final, lens), top.indices, top.values.exp(), of_targets, ranks))
    return [torch.stack(field).cpu() for field in zip(*layers, strict=True)]


def log_probabilities(model: HookedModel, streams: torch.Tensor) -> torch.Tensor:
    """log softmax(unembed(final_norm(.))), float32 [vector, vocabulary], soft cap included."""
    with torch.no_grad():
        logits = model.unembed(streams[None].to(model.dtype))[0]  # the norm wants [row, position, d_model]
        return model.bridge.adapter.apply_output_logits_transform(logits).float().log_softmax(-1)


def kl_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats over the last axis, from log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def _by_row(field: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """[layer, row x position, ...] as [row, layer, position, ...], padding blanked by ``is_token`` [row, position]."""
    field = field.unflatten(1, is_token.shape).transpose(0, 1)
    shown = is_token[:, None, :].reshape(len(is_token), 1, -1, *[1] * (field.ndim - 3))
    return field.where(shown, float("nan") if field.is_floating_point() else -1)


def first_lasting(holds: torch.Tensor) -> torch.Tensor:
    """From bool [row, layer, position]: the first layer from which on it holds to the end, or NaN; [row, position]."""
    lasting = holds.int().flip(1).cumprod(1).sum(1)
    return (holds.shape[1] - lasting).float().where(lasting > 0, float("nan"))


def _checked_targets(
    model: HookedModel, batch: Batch, positions: list[int], targets: torch.Tensor | None, top_k: int
) -> torch.Tensor:
    """Targets as int64 [row, position, target]."""
    rows, width = batch.ids.shape
    if not positions or not all(-width <= position < width for position in positions):
        raise StoneyError(f"positions {positions}: give one or more of {-width}..{width - 1}, as rows are {width} wide")
    if not 1 <= top_k <= model.d_vocab:
        raise StoneyError(f"top_k is {top_k}: expected 1..{model.d_vocab}")
    if targets is None:
        return torch.zeros((rows, len(positions), 0), dtype=torch.int64)
    if targets.ndim == 2:
        targets = targets[:, None].expand(-1, len(positions), -1)
    if targets.shape[:-1] != (rows, len(positions)) or not bool(((targets >= 0) & (targets < model.d_vocab)).all()):
        raise StoneyError(
            f"targets: expected token ids below {model.d_vocab}, [{rows}, target] or [{rows}, {len(positions)}, target], "
            f"got the shape {list(targets.shape)} or ids beyond"
        )
    return targets
