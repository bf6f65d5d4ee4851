"""Can the figures be believed? Every identity that must hold if they are right, measured on the very model they are about.

    values = measure(model, pairs)              # key of INVARIANTS -> number, None where it does not apply
    failed(values, model.dtype)                 # what is not right

A wrong hook, a transposed matrix or an adapter that was not merged changes no shape and raises nothing: the figure is
drawn, and wrong. Each of them breaks one of these identities.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from stoney_rl import checkpoints
from stoney_rl.errors import StoneyError
from stoney_rl.interp import attention, attribution, lens, patching
from stoney_rl.interp.hooked import TOLERANCE, Batch, HookedModel, left_padded
from stoney_rl.interp.pairs import PairBatch, PromptPair, batched


@dataclass(frozen=True)
class Invariant:
    """``limit``: what the value may be at most, in fp32; in a half precision, or where ``rounds`` is false, see ``limit_in``."""

    name: str
    meaning: str
    limit: float
    rounds: bool = True

    def limit_in(self, dtype: torch.dtype) -> float:
        """Rounding grows with the precision; identities that no rounding touches (0) stay as they are."""
        return max(self.limit, 5 * TOLERANCE[dtype]) if self.rounds and dtype.itemsize < 4 else self.limit


# All but the ones that say otherwise are shares: of the largest logit, or of what the sum should give.
INVARIANTS = {
    "logits": Invariant(
        "hooked = checkpoint",
        "Largest difference between the hooked model's logits and the checkpoint's own, as a share of the largest logit.",
        checkpoints.LOGIT_TOLERANCE,
    ),
    "merged": Invariant(
        "merged = adapter",
        "The same between the merged copy that is hooked and the adapter on its base.",
        checkpoints.LOGIT_TOLERANCE,
    ),
    "recorded": Invariant(
        "checkpoint = what was saved",
        "The same between the logits now and those that were recorded when the checkpoint was saved.",
        100 * checkpoints.LOGIT_TOLERANCE,
    ),
    "padding": Invariant(
        "padding changes nothing",
        "Largest difference of a prompt's logits alone and in a batch of longer ones, as a share of the largest logit.",
        5 * checkpoints.LOGIT_TOLERANCE,
    ),
    "attention": Invariant(
        "attention adds up to 1",
        "Largest distance from 1 of what a token spends on all tokens before it, over all heads.",
        1e-5,
    ),
    "components": Invariant(
        "components = logit difference",
        "Embedding, attention and MLPs of all layers against the model's own logit difference: largest error, as a share.",
        1e-4,
    ),
    "heads": Invariant(
        "heads = their attention", "The heads of each layer against what their attention contributes, as a share.", 1e-4
    ),
    "neurons": Invariant(
        "neurons = their MLP", "The neurons of each layer against what their MLP contributes, as a share.", 1e-4
    ),
    "lens": Invariant(
        "last lens = the model",
        "Largest difference between the lens after the last layer and the model, in the answers' log-probabilities (nats).",
        1e-4,
    ),
    "write_back": Invariant(
        "writing back what was read",
        "Largest change of a logit when every head and MLP gets the activation that was read from it: must be exactly 0.",
        0.0,
        rounds=False,
    ),
    "patch_all": Invariant(
        "patching everything = 1",
        "Distance from 1 of the share that comes back when all embeddings are those of the clean prompt.",
        1e-5,
    ),
    "replace_all": Invariant(
        "the empty circuit = the corrupt prompt",
        "Largest difference of logits between the corrupt prompt and the clean one with everything replaced, as a share.",
        checkpoints.LOGIT_TOLERANCE,
    ),
    "gradients": Invariant(
        "attributions add up",
        "Attribution patching of all embeddings against the clean-corrupt differences: error of the sum, as a share of them.",
        0.05,
    ),
    "left_behind": Invariant(
        "nothing is left behind",
        "Largest change of a logit after all of these measurements: must be exactly 0.",
        0.0,
        rounds=False,
    ),
}  # fmt: skip


def measure(model: HookedModel, pairs: Sequence[PromptPair], *, most: int = 4) -> dict[str, float | None]:
    """The value of each of INVARIANTS on the first ``most`` pairs; None where it does not apply to this model.

    About 30 forward passes. Raises ``StoneyError`` without pairs.
    """
    if not pairs:
        raise StoneyError("the invariants are measured on prompt pairs; give at least one")
    chosen = list(pairs[:most])
    _, batch = batched(chosen, most, model.pad_token_id)[0]
    before = model.run(batch.clean).logits
    scale = max(1.0, float(before.abs().max()))
    sums = attribution.completeness(model, batch.clean, batch.answer, batch.wrong)
    fidelity = model.fidelity
    fidelity_scale = max(1.0, fidelity.scale)
    values = {
        "logits": fidelity.hooked / fidelity_scale,
        "merged": None if fidelity.merged is None else fidelity.merged / fidelity_scale,
        "recorded": None if fidelity.recorded is None else fidelity.recorded / fidelity_scale,
        "padding": _padding(model, chosen) / scale,
        "attention": _attention(model, batch.clean),
        "components": sums.components,
        "heads": sums.heads,
        "neurons": sums.neurons,
        "lens": _lens(model, batch, before),
        "write_back": _replaced(model, batch.corrupt, batch.corrupt),
        "patch_all": _patch_all(model, batch),
        "replace_all": _replaced(model, batch.clean, batch.corrupt) / scale,
        "gradients": _gradients(model, batch),
    }
    after = model.run(batch.clean).logits
    return values | {"left_behind": float((after - before).abs().max())}


def failed(values: Mapping[str, float | None], dtype: torch.dtype) -> list[str]:
    """A line for each invariant that does not hold; NaN holds nothing."""
    return [
        f"{INVARIANTS[key].name}: {value:.3g}, at most {INVARIANTS[key].limit_in(dtype):.3g} is right"
        for key, value in values.items()
        if value is not None and not value <= INVARIANTS[key].limit_in(dtype)
    ]


def _padding(model: HookedModel, pairs: Sequence[PromptPair]) -> float:
    longest = max(len(pair.clean) for pair in pairs)
    short = list(pairs[0].clean)
    together = left_padded([short, [*short, *short][: longest + 3]], model.pad_token_id)
    alone = model.run(left_padded([short], model.pad_token_id)).logits[0]
    return float((model.run(together).logits[0, -len(short) :] - alone).abs().max())


def _attention(model: HookedModel, batch: Batch) -> float:
    real = batch.mask.bool()
    sums = attention.attention_patterns(model, batch).sum(-1)
    return float((sums.permute(0, 3, 1, 2)[real] - 1).abs().max())


def _lens(model: HookedModel, pairs: PairBatch, logits: torch.Tensor) -> float:
    targets = torch.stack([pairs.answer, pairs.wrong], dim=1)
    read = lens.logit_lens(model, pairs.clean, targets=targets, top_k=1).target_log_probabilities[:, -1, 0]
    said = logits[:, -1].float().log_softmax(-1).cpu().gather(1, targets)
    return float((read - said).abs().max())


def _replaced(model: HookedModel, batch: Batch, source: Batch) -> float:
    """Largest difference of logits between ``source`` and ``batch`` with all that ``source``'s heads and MLPs wrote."""
    hooks = ["blocks.0.hook_resid_pre"]
    for layer in range(model.n_layers):
        hooks += [f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_mlp_out"]
    run = model.run(source, read=hooks)
    edits = {hook: (lambda _, kept=run[hook]: kept.clone()) for hook in hooks}
    return float((model.run(batch, edit=edits).logits - run.logits).abs().max())


def _patch_all(model: HookedModel, pairs: PairBatch) -> float | None:
    effects = patching.patch(model, pairs, "embedding")
    gap = (effects.clean - effects.corrupt).abs()
    kept = gap > 1e-3 * gap.max()  # of a pair without a difference there is no share
    if not kept.any():
        return None
    share = effects.values.flatten(1).sum(1) / (effects.clean - effects.corrupt)
    return float((share[kept] - 1).abs().max())


def _gradients(model: HookedModel, pairs: PairBatch) -> float | None:
    """With as many steps as every estimate takes."""
    effects = patching.attribute(model, pairs, ["embedding"])["embedding"]
    gaps = effects.clean - effects.corrupt
    return float((effects.values.sum() - gaps.sum()).abs() / gaps.abs().sum()) if gaps.any() else None
