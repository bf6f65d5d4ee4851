"""What carries the answer: activations put from one prompt into the other, and a gradient's estimate of all at once.

    pairs = batched(prompt_pairs, 16, model.pad_token_id)[0][1]
    heads = patch(model, pairs, "head")                          # one forward pass a head: the truth
    estimate = attribute(model, pairs, ["head", "mlp_out"])      # every head and MLP in a few passes
    heads.values[pair, layer, head], heads.share()               # logits; share of the clean-corrupt gap

m is a pair's logit difference, answer minus wrong (pairs.py): high on the clean prompt, low on the corrupt one.

Activation patching, denoising (arXiv 2309.16042):
1. Run both prompts; keep a site's activations of both.
2. For each layer and unit there (a head, a group of positions): run the corrupt prompt with that unit's clean activation.
3. Its effect is m_patched - m_corrupt, in logits.

Attribution patching with integrated gradients (arXiv 2310.10348; the path of inputs is EAP-IG's, arXiv 2403.17806):
1. Run both prompts; keep the difference a_clean - a_corrupt at every site.
2. Move the embeddings from corrupt to clean in ``steps`` equal parts; in the middle of each, take dm/da at every site.
3. Its effect is estimated as (a_clean - a_corrupt) . mean of dm/da: all units in 2 forward passes and ``steps`` forward
   and backward ones. Over the embeddings the estimates add up to m_clean - m_corrupt.

TransformerLens's ``get_act_patch_*`` and ``attribution_patch`` (one step) are the oracles in the tests. They take no
attention mask, so no rows of unequal length, no groups of positions, and they run what can change nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp.hooked import Batch, HookedModel
from stoney_rl.interp.pairs import PairBatch

SITES = {
    "embedding": "blocks.0.hook_resid_pre",
    "resid_pre": "blocks.{}.hook_resid_pre",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "head": "blocks.{}.attn.hook_z",
    "neuron": "blocks.{}.mlp.hook_post",
}
UNITS = ("head", "neuron")  # sites with more than one unit a position
# Smaller batches leave the processor waiting: SmolLM2's pass takes half the time a row at 16 rows as it does at one.
ROWS_PER_PASS = 16
# What the estimates over the embeddings then miss of the gap: on SmolLM2 (8 pairs) 2 % with 5 steps, 0.6 % with 8. Where
# attention flips on the way the path is steep: on the model of tests/induction some 10 % with 10, 0.1 % with 40, and the
# heads rank alike.
STEPS = 5


@dataclass(frozen=True)
class Effects:
    """``values``: m_patched - m_corrupt or its estimate, logits, float32 [pair, layer] (the embedding is one layer), then [group] if groups of
    positions were asked for, then [head] or [neuron] at these sites; NaN where a pair has no token of the group.
    ``clean``, ``corrupt``: m of the two prompts [pair].
    """

    values: torch.Tensor
    clean: torch.Tensor
    corrupt: torch.Tensor

    def share(self) -> torch.Tensor | None:
        """``values`` over the mean gap; the mean over pairs is then (m_patched - m_corrupt) / (m_clean - m_corrupt).

        None where there is no gap to recover (see ``mean_gap``). A pair's own gap may be near zero; the mean's is not.
        """
        gap = mean_gap(self.clean, self.corrupt)
        return None if gap is None else self.values / gap


def mean_gap(clean: torch.Tensor, corrupt: torch.Tensor) -> float | None:
    """Mean of m_clean - m_corrupt, logits; None if it isn't above twice its standard error (one pair: above zero)."""
    gaps = (clean - corrupt).double()
    error = float(gaps.std() / len(gaps) ** 0.5) if len(gaps) > 1 else 0.0
    mean = float(gaps.mean())
    return mean if mean > 2 * error else None


def token_groups(pairs: PairBatch) -> torch.Tensor:
    """Each position a group of its own, int64 [pair, position]: its column in the batch; -1 for padding."""
    columns = torch.arange(pairs.clean.ids.shape[1]).expand_as(pairs.clean.ids)
    return columns.masked_fill(pairs.clean.mask == 0, -1)


def span_groups(pairs: PairBatch, spans: Sequence[Sequence[tuple[int, int]]]) -> torch.Tensor:
    """Words as groups, int64 [pair, position]: a word's number in its prompt; -1 for padding and between spans.

    ``spans``: for each pair the token ranges (start, end) of its words, counted from the prompt's own first token.
    """
    if len(spans) != len(pairs):
        raise StoneyError(f"{len(spans)} lists of spans for {len(pairs)} pairs; give one a pair")
    groups = torch.full_like(pairs.clean.ids, -1)
    for row, words in enumerate(spans):
        padding = int((pairs.clean.mask[row] == 0).sum())
        for number, (start, end) in enumerate(words):
            groups[row, padding + start : padding + end] = number
    return groups


def patch(model: HookedModel, pairs: PairBatch, site: str, *, groups: torch.Tensor | None = None) -> Effects:
    """Activation patching of every unit of ``site`` (a key of SITES) by a forward pass each; see the module.

    ``groups`` int64 [pair, position] (``token_groups``, ``span_groups``): positions of the same number are patched
    together, -1 never; without it, all positions. Units that the two prompts share exactly are 0 without a pass.
    Raises ``StoneyError`` for another site, groups of another shape, and prompts that don't fit each other.
    """
    hooks = _hooks(model, [site])
    groups, by_group = _checked(pairs, groups)
    clean, corrupt = (model.run(batch, read=hooks, last=True) for batch in (pairs.clean, pairs.corrupt))
    m_clean, m_corrupt = pairs.difference(clean.logits).cpu(), pairs.difference(corrupt.logits).cpu()
    layers = []
    for hook in hooks:
        units = clean[hook].shape[2] if site in UNITS else 1
        selections = _selections(groups, units).to(model.device)
        if site == "head":
            selections = selections[..., None]
        effects = _patched(model, pairs, hook, clean[hook], corrupt[hook], selections, m_corrupt)
        layers.append(effects.view(len(pairs), -1, units))
    return Effects(_shaped(torch.stack(layers, 1), groups, by_group, site), m_clean, m_corrupt)


def attribute(
    model: HookedModel,
    pairs: PairBatch,
    sites: Iterable[str],
    *,
    groups: torch.Tensor | None = None,
    steps: int = STEPS,
) -> dict[str, Effects]:
    """Attribution patching with integrated gradients, all ``sites`` (keys of SITES) from the same passes; see the module.

    ``groups`` as in ``patch``. ``steps``: points on the path; with one, a single gradient half way. Raises as ``patch``.
    """
    sites = list(sites)
    hooks = _hooks(model, sites)
    groups, by_group = _checked(pairs, groups)
    clean, corrupt = (
        model.run(batch, read=[SITES["embedding"], *hooks], last=True) for batch in (pairs.clean, pairs.corrupt)
    )
    totals: dict[str, torch.Tensor] = {}
    path = midpoints(steps)
    for alpha in path:
        gradients = gradients_between(
            model, pairs, clean[SITES["embedding"]], corrupt[SITES["embedding"]], alpha, hooks
        )
        for hook in hooks:
            product = ((clean[hook] - corrupt[hook]) * gradients[hook]).float()
            if not hook.endswith("hook_post"):  # a neuron is a number; what else there is, a vector
                product = product.sum(-1)
            pooled = _pooled(product.view(*groups.shape, -1), groups)
            totals[hook] = totals.get(hook, 0) + pooled / len(path)
    m_clean, m_corrupt = pairs.difference(clean.logits).cpu(), pairs.difference(corrupt.logits).cpu()
    return {
        site: Effects(
            _shaped(torch.stack([totals[hook] for hook in _hooks(model, [site])], 1), groups, by_group, site),
            m_clean,
            m_corrupt,
        )
        for site in sites
    }


def midpoints(steps: int) -> list[float]:
    """Where on the path from corrupt (0) to clean (1) gradients are taken: the midpoint rule."""
    if steps < 1:
        raise StoneyError(f"steps={steps}: a path needs at least one")
    return [(step + 0.5) / steps for step in range(steps)]


def gradients_between(
    model: HookedModel, pairs: PairBatch, clean: torch.Tensor, corrupt: torch.Tensor, alpha: float, at: Sequence[str]
) -> dict[str, torch.Tensor]:
    """dm/da of each pair at the hooks ``at``, in their shapes, with the embeddings corrupt + alpha (clean - corrupt)."""
    return model.gradients(
        pairs.corrupt,
        lambda logits: pairs.difference(logits).sum(),
        at=at,
        edit={SITES["embedding"]: lambda _: torch.lerp(corrupt, clean, alpha)},
        last=True,
    ).gradients


def _hooks(model: HookedModel, sites: Iterable[str]) -> list[str]:
    unknown = [site for site in sites if site not in SITES]
    if unknown:
        raise StoneyError(f"no site is called {unknown[0]!r}; there are {', '.join(SITES)}")
    return list(dict.fromkeys(SITES[site].format(layer) for site in sites for layer in range(model.n_layers)))


def _checked(pairs: PairBatch, groups: torch.Tensor | None) -> tuple[torch.Tensor, bool]:
    """Groups for every position, and whether they were asked for."""
    if not torch.equal(pairs.clean.mask, pairs.corrupt.mask):
        raise StoneyError("clean and corrupt prompts must have as many tokens, so that their positions fit each other")
    if groups is None:
        return pairs.clean.mask - 1, False  # one group, 0; padding -1
    if groups.shape != pairs.clean.ids.shape or int(groups.max()) < 0:
        raise StoneyError(
            f"groups must number the positions of {tuple(pairs.clean.ids.shape)}, from 0; got {tuple(groups.shape)} "
            f"with largest number {int(groups.max())}"
        )
    return groups.masked_fill(pairs.clean.mask == 0, -1), True


def _members(groups: torch.Tensor) -> torch.Tensor:
    """Whether a position belongs to a group, bool [group, pair, position]."""
    return groups == torch.arange(int(groups.max()) + 1)[:, None, None]


def _selections(groups: torch.Tensor, units: int) -> torch.Tensor:
    """What each patch replaces, bool [patch, pair, position, unit]; patches are groups x units."""
    members = _members(groups)[:, None, :, :, None]
    return (members & torch.eye(units, dtype=torch.bool)[None, :, None, None, :]).flatten(0, 1)


def _patched(
    model: HookedModel,
    pairs: PairBatch,
    hook: str,
    clean: torch.Tensor,
    corrupt: torch.Tensor,
    selections: torch.Tensor,
    m_corrupt: torch.Tensor,
) -> torch.Tensor:
    """m_patched - m_corrupt [pair, patch] for patches of the activation at one hook; several patches a pass."""
    different = clean != corrupt
    active = [patch for patch, selection in enumerate(selections) if (selection & different).any()]
    effects = torch.zeros(len(selections), len(pairs))
    at_once = max(1, ROWS_PER_PASS // len(pairs))
    for start in range(0, len(active), at_once):
        chunk = active[start : start + at_once]
        copies, where = _repeated(pairs, len(chunk)), selections[chunk].flatten(0, 1)
        source = torch.cat([clean] * len(chunk))
        logits = model.run(
            copies.corrupt, edit={hook: lambda a, w=where, s=source: torch.where(w, s, a)}, last=True
        ).logits
        effects[chunk] = copies.difference(logits).cpu().view(len(chunk), -1) - m_corrupt
    return effects.T


def _repeated(pairs: PairBatch, times: int) -> PairBatch:
    """All pairs, then all again."""
    return PairBatch(
        *(Batch(batch.ids.repeat(times, 1), batch.mask.repeat(times, 1)) for batch in (pairs.clean, pairs.corrupt)),
        pairs.answer.repeat(times),
        pairs.wrong.repeat(times),
    )


def _pooled(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Sums over each group's positions [pair, group, unit] on the CPU, from [pair, position, unit]."""
    return torch.einsum("gpt,ptu->pgu", _members(groups).to(values), values).cpu()


def _shaped(values: torch.Tensor, groups: torch.Tensor, by_group: bool, site: str) -> torch.Tensor:
    """[pair, layer, group, unit] without the axes that were not asked for; NaN for groups that a pair lacks."""
    absent = ~_members(groups).any(-1).T  # [pair, group]
    values = values.masked_fill(absent[:, None, :, None], torch.nan)
    values = values if site in UNITS else values.squeeze(3)
    return values if by_group else values.squeeze(2)
