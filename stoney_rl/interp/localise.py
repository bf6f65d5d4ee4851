"""Which heads, MLPs and neurons carry a family of prompts, and are they that family's own?

    values = {name: attribute_parts(model, pairs) for name, pairs in choosing.items()}     # families of prompt pairs
    shared = overlap(values["a"], clusters["a"], values["b"], clusters["b"], seed=0)
    everyones = common(map(strongest, values.values()))
    sets = {name: strongest(found, without=everyones) for name, found in values.items()}
    losses = matrix(model, reporting, sets, stand_in(model, choosing), without=everyones, seed=0)  # other pairs
    cells(losses, seed=0), interactions(losses, seed=0)

m is a pair's logit difference on its clean prompt, answer minus wrong (pairs.py). Parts are chosen on one half of the
pairs, and what is said of them is measured on the other: see ``significance.halves``.

1. Attribution: patching.attribute, integrated gradients along the path of inputs (EAP-IG, arXiv 2403.17806).
2. A family's set: the parts of largest |mean attribution|. Heads and MLPs compete with each other, neurons among
   themselves; 5 % of the one, 1 % of the other (1 % of units in arXiv 2411.02280, of neurons in 2402.16438).
3. Overlap of two families' sets, between chance and ceiling. Chance: parts change places within their layer (MLPs, one a
   layer, over the layers), as layers differ for every family. Ceiling: what two halves of one family share.
4. Knock-out, in earnest: a set's activations are replaced by their mean over all families (ablation.py). The loss is
   m - m without the set, logits: positive where the set was needed.
5. The matrix: every set's loss in every family, beside random sets with as many parts of each kind in each layer.
6. Interaction (double dissociation): what A loses more from its own set than from B's, plus what B does, each as a share
   of the family's own gap, m clean - m corrupt, so that families with large logits don't look more damaged. Without any
   knowledge of the answer m is 0 on both prompts, so a share of 0.5 is all that can be lost by forgetting.
7. True patching of single parts, for how well the estimates of (1) rank them.

Models with a norm behind attention and MLP (Gemma 2 and 3) are refused: their heads and neurons don't add up.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from tqdm import tqdm

from stoney_rl.errors import StoneyError
from stoney_rl.interp import ablation, significance
from stoney_rl.interp.ablation import HOOKS, Edits, Replacement
from stoney_rl.interp.hooked import HookedModel
from stoney_rl.interp.pairs import PromptPair, batched, swapped
from stoney_rl.interp.patching import ROWS_PER_PASS, attribute, mean_gap
from stoney_rl.metrics.intervals import CONFIDENCE, MIN_UNITS

PART_SITES = {"heads": "head", "mlps": "mlp_out", "neurons": "neuron"}
COMPONENTS, NEURONS = ("heads", "mlps"), ("neurons",)
SHARES = {COMPONENTS: 0.05, NEURONS: 0.01}
# On SmolLM2-135M (8 pairs of 'lookup_english') mean attributions rank as with 20 steps, Spearman: heads and MLPs 0.95
# with 1 step, 0.77 with 2, 0.985 with 3, 0.994 with 5; neurons 0.70, 0.76, 0.89, 0.95. Of the strongest 15 components
# 7, 13, 13, 15 are the same. Where attention flips on the way, 3 steps can miss a part: a planted head (tests, seed 2) has
# 0.4 with 3 steps and 3.4 with 20. ``rank_agreement`` with true patching tells.
STEPS = 3
POWER = 0.8
# The least interaction that is called one, shares of the gap (0.5 is all that forgetting costs): our choice.
SMALLEST = 0.05

Values = Mapping[str, torch.Tensor]
Families = Mapping[str, Sequence[PromptPair]]


# 1. Attribution


def attribute_parts(
    model: HookedModel,
    pairs: Sequence[PromptPair],
    *,
    kinds: Iterable[str] = (*COMPONENTS, *NEURONS),
    batch_size: int = ROWS_PER_PASS,
    steps: int = STEPS,
) -> dict[str, torch.Tensor]:
    """What each part gives to the answer, estimated (1); logits, float32 on the CPU.

    'heads' [pair, layer, head], 'mlps' [pair, layer], 'neurons' [pair, layer, neuron]. A pair and its swapped pair have
    the same values: the path is walked the other way, and m has the other sign. So one of the two is computed. Beyond the
    result no more than a batch is held. Raises ``StoneyError`` for a post-norm model, an unknown kind, no pairs.
    """
    refuse_post_norm(model)
    places = _mirrored(pairs)
    distinct = [pairs[same[0]] for same in places]
    widths = {"heads": (model.n_heads,), "mlps": (), "neurons": (model.d_mlp,)}
    kinds = tuple(kinds)
    if not pairs or not set(kinds) <= set(widths):
        raise StoneyError(
            f"attribution of {', '.join(kinds)} in {len(pairs)} pairs; expected {', '.join(widths)}; 1 pair"
        )
    values = {kind: torch.empty(len(pairs), model.n_layers, *widths[kind]) for kind in kinds}
    for chunk, batch in batched(distinct, batch_size, model.pad_token_id):
        found = attribute(model, batch, [PART_SITES[kind] for kind in kinds], steps=steps)
        for row, pair in enumerate(chunk):
            for kind in kinds:
                values[kind][places[pair]] = found[PART_SITES[kind]].values[row]
    return values


def _mirrored(pairs: Sequence[PromptPair]) -> list[list[int]]:
    """Places in ``pairs`` of pairs that are the same or each other's swapped pair, of each distinct one a list."""
    places: dict[tuple, list[int]] = {}
    for place, pair in enumerate(pairs):
        mirror = (pair.corrupt, pair.clean, pair.wrong, pair.answer)
        if mirror not in places:
            mirror = (pair.clean, pair.corrupt, pair.answer, pair.wrong)
        places.setdefault(mirror, []).append(place)
    return list(places.values())


def refuse_post_norm(model: HookedModel) -> None:
    """Raise ``StoneyError`` for Gemma 2 and 3 (``HookedModel.post_norm``)."""
    if model.post_norm:
        raise StoneyError(
            f"{model.name}: a norm stands behind attention and MLP, so heads and neurons don't add up; "
            "families can't be compared by parts in this architecture"
        )


# 2. Sets


@dataclass(frozen=True)
class PartSet:
    """Parts of a model: heads (layer, head), MLPs (layer), neurons (layer, neuron), each in ascending order."""

    heads: tuple[tuple[int, int], ...] = ()
    mlps: tuple[int, ...] = ()
    neurons: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.heads) + len(self.mlps) + len(self.neurons)

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        """(kind, layer, index in the layer); an MLP's index is 0."""
        yield from (("heads", layer, head) for layer, head in self.heads)
        yield from (("mlps", layer, 0) for layer in self.mlps)
        yield from (("neurons", layer, neuron) for layer, neuron in self.neurons)


def part_set(parts: Iterable[tuple[str, int, int]]) -> PartSet:
    """The set of these (kind, layer, index)."""
    parts = sorted({(kind, int(layer), int(index)) for kind, layer, index in parts})
    return PartSet(
        heads=tuple((layer, index) for kind, layer, index in parts if kind == "heads"),
        mlps=tuple(layer for kind, layer, _ in parts if kind == "mlps"),
        neurons=tuple((layer, index) for kind, layer, index in parts if kind == "neurons"),
    )


def strongest(
    values: Values, kinds: Sequence[str] = COMPONENTS, share: float | None = None, *, without: PartSet | None = None
) -> PartSet:
    """The ``share`` of the parts of these ``kinds`` together with the largest |mean over pairs|, at least one.

    ``share``: SHARES, unless given. ``without``: parts that are passed over, see ``common``. Raises ``StoneyError`` for
    kinds that ``values`` lacks or SHARES does not know, and where fewer parts are left than the share asks for.
    """
    columns, parts = _columns(values, kinds)
    k, left_out = _count(kinds, share, len(parts)), set(without or ())
    chosen = [parts[place] for place in _top(columns.mean(0)[None], len(parts))[0]]
    chosen = [part for part in chosen if part not in left_out]
    if len(chosen) < k:
        raise StoneyError(f"{k} strongest of {len(chosen)} parts; leave fewer out, or ask for a smaller share")
    return part_set(chosen[:k])


def common(sets: Iterable[PartSet]) -> PartSet:
    """The parts that all ``sets`` have.

    A part that every family needs can hide all others. MLP 0 of SmolLM2-135M is among the strongest of any family, and
    without it alone m falls to chance: a set that has it costs everything everywhere, no interaction can be seen, and no
    random set is like it. So: ``overlap`` of all parts, and the matrix of sets chosen ``without`` the common ones.
    """
    return part_set(set.intersection(*map(set, sets)))


def _columns(values: Values, kinds: Sequence[str]) -> tuple[np.ndarray, list[tuple[str, int, int]]]:
    """All parts of these kinds side by side [pair, part], and what each is: (kind, layer, index)."""
    if missing := [kind for kind in kinds if kind not in values]:
        raise StoneyError(f"no values of {', '.join(missing)}; there are {', '.join(values)}")
    tables = {kind: np.asarray(values[kind]).reshape(*values[kind].shape[:2], -1) for kind in kinds}
    parts = [(kind, *place) for kind, table in tables.items() for place in np.ndindex(table.shape[1:])]
    return np.concatenate([table.reshape(len(table), -1) for table in tables.values()], axis=1), parts


def _count(kinds: Sequence[str], share: float | None, parts: int) -> int:
    if share is None and tuple(kinds) not in SHARES:
        raise StoneyError(f"which share of {', '.join(kinds)}? Only {SHARES} are set; give one")
    share = SHARES[tuple(kinds)] if share is None else share
    if not 0 < share <= 1:
        raise StoneyError(f"share={share}: expected a share of the parts, above 0 and at most 1")
    return max(1, round(share * parts))


def _top(profiles: np.ndarray, k: int) -> np.ndarray:
    """Places of the k largest |values| of each profile [profile, part]; of equal ones the first."""
    return np.argsort(-np.abs(profiles), axis=1, kind="stable")[:, :k]


def _stratum(kind: str, layer: int) -> tuple[str, int]:
    """What a part may change places with: heads and neurons with those of their layer, an MLP with any other."""
    return (kind, 0) if kind == "mlps" else (kind, layer)


# 3. Overlap


@dataclass(frozen=True)
class Overlap:
    """Two families' sets of ``k`` parts each; shares are of k.

    ``share``, ``jaccard``: of what both have. ``chance``, ``p``: mean share of sets whose parts change places within
    their layer, and the probability that they share as much; ``chance_anywhere``, ``p_anywhere``: in the whole model
    (the plain hypergeometric). ``halves``: share of a half of A with a half of B; ``ceiling``: of two halves of one
    family, with as many clusters. ``missing``: ceiling - halves: what being another family costs. ``share_interval``,
    ``missing_interval``: 95 %, None with fewer than ten clusters.
    ``correlation``: Spearman of the mean attributions, signed, of all parts; ``halves_correlation`` and
    ``ceiling_correlation`` as above. ``clusters``: that each half has.
    """

    k: int
    share: float
    share_interval: tuple[float, float] | None
    jaccard: float
    chance: float
    p: float
    chance_anywhere: float
    p_anywhere: float
    halves: float
    ceiling: float
    missing: float
    missing_interval: tuple[float, float] | None
    correlation: float
    halves_correlation: float
    ceiling_correlation: float
    clusters: int
    halvings: int
    seed: int


def overlap(
    values_a: Values,
    clusters_a: Sequence[Hashable],
    values_b: Values,
    clusters_b: Sequence[Hashable],
    kinds: Sequence[str] = COMPONENTS,
    *,
    share: float | None = None,
    halvings: int = 200,
    seed: int,
) -> Overlap:
    """How many of their strongest parts two families share; ``values`` of ``attribute_parts``, a label for each pair.

    Chance is computed, not drawn: with parts changing places within a layer the number shared there is hypergeometric,
    and layers don't depend on one another. Half a family is a noisier sample than all of it, so ceiling and ``halves``
    are compared at the same number of clusters: in each of ``halvings`` both families are cut in two at random; within a
    family the two halves, between the families all four combinations. The intervals are of these halvings: the spread
    of a half's mean around the whole's is that of the whole's around the truth (delete-half jackknife, Shao and Wu
    1989). A bootstrap sample repeats clusters, and both share and ceiling would be biased by that.
    Raises ``StoneyError`` for other parts in one family than in the other, labels that don't fit, and fewer than four
    clusters.
    """
    (a, parts), (b, parts_b) = _columns(values_a, kinds), _columns(values_b, kinds)
    if parts != parts_b:
        raise StoneyError(f"overlap: {len(parts)} and {len(parts_b)} parts; expected values of the same model")
    k = _count(kinds, share, len(parts))
    tops = _top(np.stack([a.mean(0), b.mean(0)]), k)
    shared = len(np.intersect1d(*tops))
    strata = [_stratum(kind, layer) for kind, layer, _ in parts]
    chance, p = _chance(strata, *tops, shared)
    anywhere, p_anywhere = _chance([0] * len(parts), *tops, shared)

    size = min(len(set(clusters_a)), len(set(clusters_b))) // 2
    rng = np.random.default_rng(seed)
    labelled = ((a, clusters_a), (b, clusters_b))
    profiles = np.concatenate([_half_means(*family, size, halvings, rng) for family in labelled], axis=1)
    agreement = np.stack([_agreement(four, k) for four in profiles])  # [halving, (share, correlation), half, half]
    within = (agreement[:, :, 0, 1] + agreement[:, :, 2, 3]) / 2
    between = agreement[:, :, :2, 2:].mean((2, 3))
    (ceiling, ceiling_correlation), (half, half_correlation) = within.mean(0), between.mean(0)
    around, missing = agreement[:, 0, 0, 2], within[:, 0] - between[:, 0]
    enough = 2 * size >= MIN_UNITS
    return Overlap(
        k=k,
        share=shared / k,
        share_interval=_interval(np.clip(shared / k + around - around.mean(), 0, 1)) if enough else None,
        jaccard=shared / (2 * k - shared),
        chance=chance / k,
        p=p,
        chance_anywhere=anywhere / k,
        p_anywhere=p_anywhere,
        halves=float(half),
        ceiling=float(ceiling),
        missing=float(ceiling - half),
        missing_interval=_interval(missing) if enough else None,
        correlation=float(_agreement(np.stack([a.mean(0), b.mean(0)]), k)[1, 0, 1]),
        halves_correlation=float(half_correlation),
        ceiling_correlation=float(ceiling_correlation),
        clusters=size,
        halvings=halvings,
        seed=seed,
    )


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return float(low), float(high)


def _chance(strata: Sequence[Hashable], top_a: np.ndarray, top_b: np.ndarray, shared: int) -> tuple[float, float]:
    """Mean number that two such sets share if their parts change places within strata; the p of ``shared`` or more."""
    from scipy.stats import hypergeom

    counts: dict[Hashable, list[int]] = defaultdict(lambda: [0, 0, 0])
    for column, places in enumerate((range(len(strata)), top_a, top_b)):
        for place in places:
            counts[strata[place]][column] += 1
    probability = np.ones(1)
    for n, of_a, of_b in counts.values():
        if of_a and of_b:
            here = hypergeom.pmf(np.arange(min(of_a, of_b) + 1), n, of_a, of_b)
            probability = np.convolve(probability, here)
    return float(np.arange(len(probability)) @ probability), float(min(1.0, probability[shared:].sum()))


def _half_means(
    values: np.ndarray, clusters: Sequence[Hashable], size: int, halvings: int, rng: np.random.Generator
) -> np.ndarray:
    """Mean profiles of two disjoint random sets of ``size`` clusters each, [halving, 2, part]."""
    if len(clusters) != len(values) or size < 2:
        raise StoneyError(
            f"overlap: {len(values)} pairs with {len(clusters)} labels of {len(set(clusters))} clusters; expected a label "
            "for each pair, and four clusters or more in each family"
        )
    number = {label: place for place, label in enumerate(dict.fromkeys(clusters))}
    unit = np.array([number[label] for label in clusters])
    order = np.stack([rng.permutation(len(number)) for _ in range(halvings)])
    half = np.stack([order[:, unit] < size, (order[:, unit] >= size) & (order[:, unit] < 2 * size)], axis=1)
    weights = half / half.sum(2, keepdims=True)  # [halving, 2, pair]
    return (weights.reshape(-1, len(unit)).astype(np.float32) @ values).reshape(halvings, 2, -1)


def _agreement(profiles: np.ndarray, k: int) -> np.ndarray:
    """Share of the k strongest parts that each two profiles [profile, part] have in common, and their Spearman
    correlation: [(share, correlation), profile, profile]."""
    from scipy.stats import rankdata

    member = np.zeros(profiles.shape, dtype=np.float32)
    np.put_along_axis(member, _top(profiles, k), 1, axis=1)
    return np.stack([member @ member.T / k, np.corrcoef(rankdata(profiles, axis=1))])


# 4. Knock-out


def stand_in(model: HookedModel, families: Families, *, batch_size: int = ROWS_PER_PASS) -> Replacement:
    """What takes the place of parts: their mean over the tokens of each family's clean prompts, averaged over families.

    One stand-in for all families: the same intervention in every cell of the matrix, in which no family's own mean is
    favoured. With family B's own mean a set would keep telling the model that this is B, and A's set knocked out on B
    would take away less than on A for that reason alone. The price: the mean of unlike families is like none of them,
    so any set does some damage; the random sets show how much. Give the choosing pairs, so that nothing is taken from
    the prompts that are reported on.
    """
    refuse_post_norm(model)
    return _average([(1.0, _mean_over(model, pairs, batch_size)) for pairs in families.values()])


def _mean_over(model: HookedModel, pairs: Sequence[PromptPair], batch_size: int) -> Replacement:
    batches = [batch.clean for _, batch in batched(pairs, batch_size, model.pad_token_id)]
    return _average([(float(batch.mask.sum()), ablation.means(model, batch, HOOKS)) for batch in batches])


def _average(weighted: Sequence[tuple[float, Replacement]]) -> Replacement:
    total = sum(weight for weight, _ in weighted)
    return {hook: sum(weight / total * means[hook] for weight, means in weighted) for hook in weighted[0][1]}


def knock_out(
    model: HookedModel,
    pairs: Sequence[PromptPair],
    sets: Sequence[PartSet],
    reference: Replacement,
    *,
    batch_size: int = ROWS_PER_PASS,
) -> torch.Tensor:
    """What every pair loses without each set: m - m without it on the clean prompt, logits, float32 [pair, set].

    ``reference``: ``stand_in``, or another replacement of ablation.py that is the same for all rows and positions. A pass
    is filled with rows of different sets. Raises ``StoneyError`` for a post-norm model and parts that it lacks.
    """
    jobs = [(pair, number) for number in range(len(sets)) for pair in range(len(pairs))]
    without = _m_without(model, pairs, sets, reference, jobs, batch_size)
    return _m_clean(model, pairs, batch_size)[:, None] - without.view(len(sets), len(pairs)).T


def _m_clean(model: HookedModel, pairs: Sequence[PromptPair], batch_size: int) -> torch.Tensor:
    return _m_without(model, pairs, [PartSet()], {}, [(pair, 0) for pair in range(len(pairs))], batch_size)


def _m_without(
    model: HookedModel,
    pairs: Sequence[PromptPair],
    sets: Sequence[PartSet],
    reference: Replacement,
    jobs: Sequence[tuple[int, int]],
    batch_size: int,
    *,
    progress: str | None = None,
) -> torch.Tensor:
    """m on the clean prompt of a pair without a set, for each job (pair, set), float32 [job]."""
    refuse_post_norm(model)
    masks = [_masks(parts, reference) for parts in sets]
    found = torch.empty(len(jobs))
    batches = batched([pairs[pair] for pair, _ in jobs], batch_size, model.pad_token_id)
    for chunk, batch in tqdm(batches, desc=progress, unit="batch", delay=3, disable=progress is None):
        edit = _row_edits(reference, [masks[jobs[job][1]] for job in chunk])
        found[chunk] = batch.difference(model.run(batch.clean, edit=edit, last=True).logits).cpu()
    return found


def _masks(parts: PartSet, reference: Replacement) -> dict[str, torch.Tensor]:
    """Which parts are replaced at each hook: bool [head, 1], [1] for an MLP, [neuron]."""
    ablation.ablate(reference, heads=parts.heads, mlps=parts.mlps, neurons=parts.neurons)  # refuses what isn't there
    masks: dict[str, torch.Tensor] = {}
    for kind, layer, index in parts:
        hook = f"blocks.{layer}.{HOOKS[kind]}"
        if reference[hook].ndim != (2 if kind == "heads" else 1):
            raise StoneyError(f"{hook}: what stands in must be the same at all positions; use stand_in, means or zeros")
        shape = {"heads": (*reference[hook].shape[:-1], 1), "mlps": (1,), "neurons": reference[hook].shape}[kind]
        masks.setdefault(hook, torch.zeros(shape, dtype=torch.bool))[index] = True
    return masks


def _row_edits(reference: Replacement, masks: Sequence[Mapping[str, torch.Tensor]]) -> Edits:
    """Edits after which row r of a batch lacks what ``masks[r]`` names, and nothing else."""

    def edit(hook: str, none: torch.Tensor):
        where = torch.stack([mask.get(hook, none) for mask in masks])[:, None].to(reference[hook].device)
        return lambda activation: torch.where(where, reference[hook].to(activation.dtype), activation)

    empty = {hook: torch.zeros_like(mask) for one in masks for hook, mask in one.items()}
    return {hook: edit(hook, none) for hook, none in empty.items()}


# 5. The matrix


@dataclass(frozen=True)
class Losses:
    """What families lose without sets, logits, positive where a set was needed.

    ``own[A][B]`` [pair of B]: without A's set. ``random[A][B]`` [set, drawn]: without random sets like A's, each in a few
    pairs of B, ``drawn[B]`` [set, drawn], which are the same for every A. ``clean[B]``, ``corrupt[B]``: m of the two
    prompts [pair of B]; ``clusters[B]``: a label for each pair. ``sets[A]``; ``random_sets[A]``.
    """

    own: dict[str, dict[str, torch.Tensor]]
    random: dict[str, dict[str, torch.Tensor]]
    drawn: dict[str, np.ndarray]
    clean: dict[str, torch.Tensor]
    corrupt: dict[str, torch.Tensor]
    clusters: dict[str, list[str]]
    sets: dict[str, PartSet]
    random_sets: dict[str, list[PartSet]]

    def gap(self, family: str) -> float | None:
        """Mean m_clean - m_corrupt, logits; None where there is none to lose (``patching.mean_gap``)."""
        return mean_gap(self.clean[family], self.corrupt[family])

    def share(self, ablated: str, measured: str) -> np.ndarray | None:
        """``own`` over the measured family's gap, float64 [pair]; None without a gap.

        The gap is a mean over the same pairs and as uncertain: pair i enters as r + (loss_i - r gap_i) / gap, with the share r = mean
        loss / gap. The mean is r, and the scatter that of a ratio (delta method; Deng et al. 2018, 1803.06336).
        """
        gap = self.gap(measured)
        if gap is None:
            return None
        loss = self.own[ablated][measured].double().numpy()
        gaps = (self.clean[measured].double() - self.corrupt[measured].double()).numpy()
        share = loss.mean() / gap
        return share + (loss - share * gaps) / gap

    def random_means(self, ablated: str, measured: str) -> np.ndarray | None:
        """Of each random set the mean over its few pairs, over the gap, float64 [set]; None without a gap."""
        gap = self.gap(measured)
        return None if gap is None else self.random[ablated][measured].double().numpy().mean(1) / gap


def matrix(
    model: HookedModel,
    families: Families,
    sets: Mapping[str, PartSet],
    reference: Replacement,
    *,
    without: PartSet | None = None,
    draws: int = 100,
    few: int = 4,
    batch_size: int = ROWS_PER_PASS,
    seed: int,
) -> Losses:
    """Knock out each of ``sets`` and ``draws`` random sets like it, and measure every family: its reporting pairs.

    A set is measured in all pairs, a random one in ``few`` pairs of each family: that is what time allows, and 100 sets of
    4 say more about sets than 5 of 80. Each draws its pairs anew, so that all take part equally. ``without``: parts that no
    random set has either, if ``sets`` were chosen without them. Rows of the matrix don't depend on one another: with
    ``sets`` of one family the result has that row, the same numbers as among others.
    Raises ``StoneyError`` as ``knock_out``, for a family without pairs and for no draws.
    """
    if empty := [name for name, pairs in families.items() if not pairs]:
        raise StoneyError(f"{empty[0]}: a family without pairs; nothing can be measured in it")
    if draws < 1 or few < 1:
        raise StoneyError(f"draws={draws}, few={few}: expected at least one random set and one pair")
    pairs = [pair for family in families.values() for pair in family]
    sizes = [len(family) for family in families.values()]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    drawn = {name: _drawn(size, draws, few, _rng(seed, name)) for name, size in zip(families, sizes, strict=True)}
    jobs = [_jobs(*place, of) for *place, of in zip(starts, sizes, drawn.values(), strict=True)]
    flat = [job for family in jobs for job in family]
    m_clean, m_corrupt = _m_both(model, pairs, batch_size)
    own, random, random_sets = {}, {}, {}
    for ablated, parts in sets.items():
        rng = _rng(seed, f"sets like {ablated}")
        random_sets[ablated] = [matched(parts, model, rng, without=without) for _ in range(draws)]
        remaining = _m_without(
            model, pairs, [parts, *random_sets[ablated]], reference, flat, batch_size, progress=f"without {ablated}"
        )
        lost = m_clean[[pair for pair, _ in flat]] - remaining
        by_family = dict(zip(families, lost.split([len(family) for family in jobs]), strict=True))
        own[ablated] = {name: by_family[name][: len(family)] for name, family in families.items()}
        random[ablated] = {
            name: by_family[name][len(family) :].view(drawn[name].shape) for name, family in families.items()
        }
    return Losses(
        own=own,
        random=random,
        drawn=drawn,
        clean=dict(zip(families, m_clean.split(sizes), strict=True)),
        corrupt=dict(zip(families, m_corrupt.split(sizes), strict=True)),
        clusters={name: [pair.cluster for pair in family] for name, family in families.items()},
        sets=dict(sets),
        random_sets=random_sets,
    )


def _jobs(start: int, size: int, drawn: np.ndarray) -> list[tuple[int, int]]:
    """(pair, set) of a family whose pairs begin at ``start``: set 0 in all of them, the others where they are drawn."""
    own = [(start + pair, 0) for pair in range(size)]
    return own + [(start + pair, 1 + number) for number, row in enumerate(drawn.tolist()) for pair in row]


def _m_both(model: HookedModel, pairs: Sequence[PromptPair], batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """m on the clean and on the corrupt prompts [pair]. The corrupt one is minus the swapped pair's on its clean one."""
    mirrored = [swapped(pair) for pair in pairs]
    distinct = list(dict.fromkeys([*pairs, *mirrored]))
    place = {pair: number for number, pair in enumerate(distinct)}
    m = _m_clean(model, distinct, batch_size)
    return m[[place[pair] for pair in pairs]], -m[[place[pair] for pair in mirrored]]


def matched(parts: PartSet, model: HookedModel, rng: np.random.Generator, *, without: PartSet | None = None) -> PartSet:
    """A random set with as many heads and neurons in each layer, and as many MLPs (a layer has only one).

    None of ``parts`` is in it where there are enough others that are not in ``without``.
    """
    places = {"heads": range(model.n_heads), "mlps": range(model.n_layers), "neurons": range(model.d_mlp)}
    own, left_out = _by_stratum(parts), _by_stratum(without or ())
    chosen = []
    for (kind, layer), taken in own.items():
        closed = taken | left_out[kind, layer]
        free = rng.permutation([place for place in places[kind] if place not in closed])
        for place in [*free, *rng.permutation(sorted(taken))][: len(taken)]:
            chosen.append((kind, place, 0) if kind == "mlps" else (kind, layer, place))
    return part_set(chosen)


def _by_stratum(parts: Iterable[tuple[str, int, int]]) -> dict[tuple[str, int], set[int]]:
    """The places that ``parts`` have in each stratum: of an MLP the layer, of others the index in the layer."""
    places: dict[tuple[str, int], set[int]] = defaultdict(set)
    for kind, layer, index in parts:
        places[_stratum(kind, layer)].add(layer if kind == "mlps" else index)
    return places


def _rng(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, *name.encode()])


def _drawn(pairs: int, draws: int, few: int, rng: np.random.Generator) -> np.ndarray:
    """``few`` different pairs for each draw, int64 [draw, few]; all pairs about equally often."""
    few = min(few, pairs)
    blocks = -(-draws // (pairs // few))
    return np.concatenate([rng.permutation(pairs)[: pairs // few * few].reshape(-1, few) for _ in range(blocks)])[
        :draws
    ]


@dataclass(frozen=True)
class Cell:
    """What family ``measured`` loses without the set of ``ablated``, shares of its gap.

    ``loss``: mean, with its interval ``low``, ``high`` (None with few clusters). ``random``: mean over random sets like
    it; ``random_high``: the 95th percentile of theirs. ``p``: ``random_p``; ``q``: corrected over all cells;
    ``found``: q <= 0.05.
    """

    ablated: str
    measured: str
    loss: float
    low: float | None
    high: float | None
    random: float
    random_high: float
    p: float
    q: float
    found: bool
    n: int
    clusters: int
    draws: int


def cells(losses: Losses, *, seed: int) -> dict[tuple[str, str], Cell | None]:
    """Every cell of the matrix, (ablated, measured); None where the measured family has no gap.

    With R random sets no p is below 1 / (R + 1): for a lone finding among K cells, draw 20 K of them.
    """
    found: dict[tuple[str, str], dict | None] = {}
    for ablated in losses.own:
        for measured in losses.clean:
            share, random = losses.share(ablated, measured), losses.random_means(ablated, measured)
            if share is None:
                found[ablated, measured] = None
                continue
            result = significance.effects(share[:, None], losses.clusters[measured], seed=seed)
            bounds = [None if bound is None else float(bound[0]) for bound in (result.low, result.high)]
            found[ablated, measured] = {
                "loss": float(share.mean()), "low": bounds[0], "high": bounds[1], "random": float(random.mean()),
                "random_high": float(np.percentile(random, 95)), "p": random_p(share.mean(), random),
                "n": len(share), "clusters": result.clusters, "draws": len(random),
            }  # fmt: skip
    tested = [key for key, cell in found.items() if cell is not None]
    corrected = dict(zip(tested, _false_discovery([found[key]["p"] for key in tested]), strict=True))
    return {
        key: None if cell is None else Cell(*key, **cell, q=corrected[key], found=corrected[key] <= significance.LEVEL)
        for key, cell in found.items()
    }


def random_p(loss: float, random: np.ndarray) -> float:
    """One-sided p that a random set costs as much as ``loss``: (1 + those that do) / (1 + all).

    ``loss`` is a mean over all pairs, a random set's over a few, which scatters more: the set has to stand out from a
    wider distribution than that of sets, so p errs towards caution. Taking the scatter of pairs out again would need the
    variance between sets as a difference of two estimates; where that comes out small the null shrinks to a point, and
    everything is found.
    """
    return float((1 + (np.asarray(random) >= loss).sum()) / (1 + len(random)))


def _false_discovery(p: Sequence[float]) -> list[float]:
    from scipy.stats import false_discovery_control

    return false_discovery_control(p).tolist() if len(p) else []


# 6. Interaction


@dataclass(frozen=True)
class Interaction:
    """Of two families: (D[A, A] - D[B, A]) + (D[B, B] - D[A, B]), D[S, F] the share of F's gap lost without S's set.

    ``value``, positive if each set hurts its own family more; ``low``, ``high``: 95 % interval; ``p``, two-sided; ``q``,
    corrected over all pairs of families. ``floor``: the 95th percentile of the same between random sets like the two, and
    never below ``SMALLEST``: two sets chosen on different pairs are hardly ever the same to the last neuron, and with enough
    pairs any difference is found.
    ``found``: q <= 0.05, and ``value`` above the floor. ``detectable``: the smallest interaction that these pairs would
    have shown with a power of 80 %, for a lone one among all that were tested. None where it can't be said (few
    clusters; for ``detectable`` also sets that are the same, or nearly, so that nothing scatters). ``a``, ``b``: the two
    terms.
    """

    value: float
    a: float
    b: float
    low: float | None
    high: float | None
    p: float | None
    q: float | None
    found: bool
    floor: float
    detectable: float | None
    n: int
    clusters: int
    draws: int
    note: str = ""


def interactions(losses: Losses, *, seed: int) -> dict[tuple[str, str], Interaction | None]:
    """The interaction of every two families that have a set; None where one of them has no gap.

    Interval and p are ``significance.effects`` over the clusters of both families' reporting pairs. The value is a sum of
    two means; each pair enters as value + N/n_F (d - mean d), with d its own difference, n_F the pairs of its family and
    N of both (and a factor near 1, see ``_deviations``): the mean is the sum of the means, and that the two families'
    means are unlike is not taken for scatter.
    """
    found: dict[tuple[str, str], dict | None] = {}
    for a, b in combinations([name for name in losses.own if name in losses.clean], 2):
        found[a, b] = _interaction(losses, a, b, seed)
    tested = [key for key, one in found.items() if one is not None and one["p"] is not None]
    corrected = dict(zip(tested, _false_discovery([found[key]["p"] for key in tested]), strict=True))
    finished: dict[tuple[str, str], Interaction | None] = {}
    for key, one in found.items():
        if one is None:
            finished[key] = None
            continue
        error, q = one.pop("error"), corrected.get(key)
        is_found = q is not None and q <= significance.LEVEL and one["value"] > one["floor"]
        reach = None if one["low"] is None else one["value"] - one["low"]
        detectable = _detectable(reach, error, one["clusters"], len(tested), one["floor"])
        finished[key] = Interaction(**one, q=q, found=is_found, detectable=detectable)
    return finished


def _interaction(losses: Losses, a: str, b: str, seed: int) -> dict | None:
    if losses.gap(a) is None or losses.gap(b) is None:
        return None
    of_a = losses.share(a, a) - losses.share(b, a)
    of_b = losses.share(b, b) - losses.share(a, b)
    value, n = of_a.mean() + of_b.mean(), len(of_a) + len(of_b)
    labels_a, labels_b = losses.clusters[a], losses.clusters[b]
    centred = np.concatenate([n * _deviations(of_a, labels_a), n * _deviations(of_b, labels_b)])
    labels = [*labels_a, *labels_b]
    result = significance.effects((value + centred)[:, None], labels, seed=seed)
    low, high, p = (None if array is None else float(array[0]) for array in (result.low, result.high, result.p))
    sums: dict[str, float] = defaultdict(float)
    for label, part in zip(labels, centred, strict=True):
        sums[label] += part
    random = losses.random_means(a, a) - losses.random_means(b, a)
    random += losses.random_means(b, b) - losses.random_means(a, b)
    return {
        "value": float(value), "a": float(of_a.mean()), "b": float(of_b.mean()), "low": low, "high": high, "p": p,
        "floor": max(SMALLEST, float(np.percentile(random, 95))), "n": n, "clusters": result.clusters, "draws": len(random),
        "note": result.note, "error": float(np.sqrt(sum(total**2 for total in sums.values())) / n),
    }  # fmt: skip


def _deviations(values: np.ndarray, labels: Sequence[Hashable]) -> np.ndarray:
    """What each pair adds to the mean's error [pair]: (d - mean d) / n. Its own mean is nearer to a sample than the true
    one is, which C / (C - 1) of its clusters makes up for, as in any variance."""
    units = len(set(labels))
    return (values - values.mean()) / len(values) * (units / max(units - 1, 1)) ** 0.5


def _detectable(reach: float | None, error: float, clusters: int, tests: int, floor: float) -> float | None:
    """The effect that is found with a power of 80 %: beyond what decides, by what four of five samples reach.

    What decides is the floor or the interval's lower half, ``reach``, made longer for ``tests`` tests: wider than the
    standard error ``error`` alone would have it, as the interval is cautious.
    """
    from scipy.stats import t

    if reach is None or not reach > 0:
        return None
    longer = t.isf(significance.LEVEL / tests / 2, clusters - 1) / t.isf(significance.LEVEL / 2, clusters - 1)
    return float(max(longer * reach, floor) + t.ppf(POWER, clusters - 1) * error)


# 7. True patching


def true_patching(
    model: HookedModel,
    pairs: Sequence[PromptPair],
    parts: PartSet,
    *,
    batch_size: int = ROWS_PER_PASS,
) -> torch.Tensor:
    """The truth of single parts: m_patched - m_corrupt of the corrupt prompt with one part's clean activation, logits,
    float32 [pair, part], in the order of ``parts``; a forward pass for each. Raises as ``knock_out``."""
    refuse_post_norm(model)
    parts = list(parts)
    found = torch.empty(len(pairs), len(parts))
    for chunk, batch in batched(pairs, batch_size, model.pad_token_id):
        hooks = [f"blocks.{layer}.{HOOKS[kind]}" for kind, layer, _ in parts]
        clean, m_corrupt = (
            model.run(batch.clean, read=hooks, last=True),
            batch.difference(model.run(batch.corrupt, last=True).logits),
        )
        for column, ((kind, _, index), hook) in enumerate(zip(parts, hooks, strict=True)):
            edit = _restored(clean[hook], kind, index)
            patched = batch.difference(model.run(batch.corrupt, edit={hook: edit}, last=True).logits)
            found[chunk, column] = (patched - m_corrupt).cpu()
    return found


def _restored(clean: torch.Tensor, kind: str, index: int):
    units = torch.arange(1 if kind == "mlps" else clean.shape[2], device=clean.device)
    where = units == index
    where = where[:, None] if kind == "heads" else where
    return lambda activation: torch.where(where, clean, activation)


def rank_agreement(estimates: torch.Tensor, truth: torch.Tensor) -> float | None:
    """Spearman of the parts' means, of estimates and truth both [pair, part]; None for fewer than three parts."""
    from scipy.stats import spearmanr

    if estimates.shape[1] < 3:
        return None
    return float(spearmanr(estimates.mean(0), truth.mean(0)).statistic)


def of_parts(values: Values, parts: PartSet) -> torch.Tensor:
    """The columns of ``values`` (``attribute_parts``) that belong to ``parts``, in their order, [pair, part]."""
    return torch.stack(
        [values[kind][:, layer] if kind == "mlps" else values[kind][:, layer, index] for kind, layer, index in parts], 1
    )
