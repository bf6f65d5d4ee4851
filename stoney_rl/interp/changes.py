"""What training changed: two checkpoints of one architecture, an earlier and a later one (base, SFT, GRPO).

    names = "checkpoints/smollm2-135m", "stoney_lora_merged"
    base, sft = (load_model(find_model(name), torch.float32) for name in names)
    changes = weight_changes(base, sft)                                     # one for each weight: size, spectrum, rank
    grouped(changes, "layer"), grouped(changes, "module")
    hooked = [load_hooked(name) for name in names]
    decode(mean_difference(*hooked, batches), hooked[1], seed=0).up         # tokens that the later model is pushed to

    # The floor: the same call on two seeds of one training says how far checkpoints differ that mean the same.
    floor = weight_changes(sft_seed_0, sft_seed_1)

1. Weights: norm of the change W' - W beside that of W, its singular values, its stable rank ||.||_F^2 / ||.||_2^2
   (Rudelson and Vershynin, math/0503442) and effective rank, exp of the entropy of the normalised singular values (Roy
   and Vetterli 2007, EUSIPCO). Every change that is stored is rounded, and the rounding has full rank. Independent
   errors of at most u |w'| (u: half the spacing of floats at 1) have a spectral norm of about u (largest norm of a row
   of W' + largest of a column) or less (Seginer 2000; Bandeira and van Handel, 1408.6185): singular values below that
   are no part of a rank.
2. Representations: 1 - CKA of the residual streams, layer by layer (similarity.py).
3. Mean difference of the residual streams over the tokens of texts, decoded to tokens by the final norm's weight and
   the unembedding. Narrow fine-tuning leaves a trace there that can be read even in texts of another kind (Minder et
   al., 2510.13900, who look at a text's first few tokens: ``first``). Their causal steering is steering.py's.
4. Heads, MLPs and neurons: effects of the same pairs in both models (patching.py), tested in each, and the difference.

Hooked models for 2 and 3, plain transformers models without adapters for 1. Which of these changes matter for a
behaviour is closure.py's. Identical checkpoints give exactly 0 everywhere.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp import significance, similarity
from stoney_rl.interp.closure import BLOCK, Part, matching, part_of
from stoney_rl.interp.hooked import Batch, HookedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT = 64  # singular values, the largest
TOP = 10  # tokens a direction decodes to


# Weights


@dataclass(frozen=True)
class WeightChange:
    """One weight matrix; a vector (a norm's weight, a bias) counts as a matrix of one row.

    ``layer``: None outside the layers. ``module``: the last part of its name, such as 'q_proj', 'q_proj.bias',
    'embed_tokens'. ``size``: ||W||_F of the earlier model; ``change``: ||W' - W||_F; ``relative``: their ratio, None
    where W is 0 and W' is not. ``spectral``: ||W' - W||_2. ``singular_values`` [at most KEPT] of W' - W, largest first.
    ``rounding``: what rounding alone may give a singular value (see the module). ``rank``: how many are above it;
    ``effective_rank`` of those, None if there is none. ``stable_rank`` counts all; None without a change.
    """

    name: str
    part: Part
    layer: int | None
    module: str
    shape: tuple[int, ...]
    size: float
    change: float
    relative: float | None
    spectral: float
    rounding: float
    rank: int
    stable_rank: float | None
    effective_rank: float | None
    singular_values: np.ndarray


def weight_changes(earlier: "PreTrainedModel", later: "PreTrainedModel") -> list[WeightChange]:
    """The change of every weight, in the model's order; weights that are tied count once.

    The decompositions are the work: half a minute for SmolLM2 on one core; for a model of billions use a GPU.
    Raises ``StoneyError`` for models with adapters that are not merged, and weights of other names, shapes or dtypes.
    """
    return [_weight_change(name, *weights) for name, weights in matching(earlier, later).items()]


def _weight_change(name: str, earlier: torch.Tensor, later: torch.Tensor) -> WeightChange:
    # In float64: the decomposition's own rounding in float32 is as large as that of the weights.
    before, after = (weight.double().view(-1, weight.shape[-1]) for weight in (earlier, later))
    difference = after - before
    size, rounding = float(before.norm()), _rounding(after)
    if difference.any():
        values = torch.linalg.svdvals(difference).cpu().numpy()
    else:
        values = np.zeros(min(difference.shape))
    change, spectral = float(np.sqrt((values**2).sum())), float(values[0])
    real = values[values > rounding]
    part, block = part_of(name), BLOCK.search(name)
    return WeightChange(
        name=name,
        part=part,
        layer=int(block[1]) if block else None,
        module=".".join(name.removesuffix(".weight").split(".")[-2 if name.endswith(".bias") else -1 :]),
        shape=tuple(earlier.shape),
        size=size,
        change=change,
        relative=_ratio(change, size),
        spectral=spectral,
        rounding=rounding,
        rank=len(real),
        stable_rank=(change / spectral) ** 2 if spectral else None,
        effective_rank=_effective_rank(real),
        singular_values=values[:KEPT],
    )


def _rounding(weight: torch.Tensor) -> float:
    """Largest spectral norm that rounding may have in ``weight`` [row, column].

    Its precision is the coarsest that holds it exactly: a bf16 checkpoint may have been opened in fp32.
    """
    coarse = (torch.bfloat16, torch.float16, torch.float32)
    dtype = next((one for one in coarse if torch.equal(weight.to(one).to(weight.dtype), weight)), weight.dtype)
    return float(torch.finfo(dtype).eps / 2 * (weight.norm(dim=1).max() + weight.norm(dim=0).max()))


def _effective_rank(values: np.ndarray) -> float | None:
    if not len(values):
        return None
    shares = values / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _ratio(change: float, size: float) -> float | None:
    if change == 0:
        return 0.0
    return change / size if size else None


@dataclass(frozen=True)
class GroupChange:
    """``weights`` of a group, how many of them ``changed``; ``relative``: norm of all their changes over that of all of
    them (None: they were 0); ``share`` of the squared norm of the whole model's change; ``effective_rank``: median of
    those that have one, else None."""

    weights: int
    changed: int
    relative: float | None
    share: float
    effective_rank: float | None


def grouped(changes: Sequence[WeightChange], by: str) -> dict:
    """By 'module', 'layer' or 'part': the value of that field -> what changed in all weights that share it."""
    if by not in ("module", "layer", "part"):
        raise StoneyError(f"weights can't be grouped by {by!r}; expected module, layer or part")
    groups: dict[Hashable, list[WeightChange]] = {}
    for one in changes:
        groups.setdefault(getattr(one, by), []).append(one)
    total = sum(one.change**2 for one in changes)
    return {key: _group(members, total) for key, members in groups.items()}


def _group(members: Sequence[WeightChange], total: float) -> GroupChange:
    squared, size = sum(one.change**2 for one in members), sum(one.size**2 for one in members)
    ranks = [one.effective_rank for one in members if one.effective_rank is not None]
    return GroupChange(
        weights=len(members),
        changed=sum(one.change > 0 for one in members),
        relative=_ratio(math.sqrt(squared), math.sqrt(size)),
        share=squared / total if total else 0.0,
        effective_rank=float(np.median(ranks)) if ranks else None,
    )


# Representations


def representation_changes(
    earlier: HookedModel,
    later: HookedModel,
    batches: Sequence[Batch],
    clusters: Sequence[Hashable],
    *,
    seed: int,
    cap: int = similarity.CAP,
) -> np.ndarray:
    """1 - CKA of the residual streams behind each layer, float32 [cluster, layer].

    Jackknife pseudo-values, whose mean is the change; less than 1e-7 is not seen. Arguments and errors as
    ``similarity.layer_similarity``.
    """
    return 1 - similarity.layer_similarity(earlier, later, batches, clusters, seed=seed, cap=cap)


@dataclass(frozen=True)
class MeanDifference:
    """``values`` [text, layer, d_model]: mean over a text's tokens of h' - h, the residual streams behind each layer of
    the later and the earlier model; ``norms`` [text, layer]: mean over them of ||h||. float64; NaN for a text without
    tokens."""

    values: torch.Tensor
    norms: torch.Tensor

    def consistency(self) -> torch.Tensor:
        """Cosine of each text's difference with the mean of the others', [text, layer], for ``significance.effects``.

        About 0 where each text differs in its own way; 0 without a difference. Texts without tokens are left out.
        """
        values = self.values[self.scored]
        return torch.cosine_similarity(values, values.sum(0) - values, dim=-1)

    @property
    def scored(self) -> torch.Tensor:
        """Which texts have tokens, bool [text]."""
        return self.norms.isfinite().all(1)


def mean_difference(
    earlier: HookedModel, later: HookedModel, batches: Sequence[Batch], *, skip: int = 1, first: int | None = None
) -> MeanDifference:
    """Mean difference of the residual streams on the same texts, rows of all batches in order.

    ``skip``: tokens left out at a text's beginning; the very first one draws attention, and its huge vector would be
    most of any mean. ``first``: how many tokens after these; None: all. Raises ``StoneyError`` for models of other
    shapes.
    """
    if (earlier.n_layers, earlier.d_model) != (later.n_layers, later.d_model):
        raise StoneyError(
            f"{earlier.name} has {earlier.n_layers} layers of width {earlier.d_model}, {later.name} {later.n_layers} "
            f"of {later.d_model}: give two checkpoints of one architecture"
        )
    parts = []
    for batch in batches:
        number = batch.mask.cumsum(1) - 1
        real = (batch.mask == 1) & (number >= skip) & (number < (math.inf if first is None else skip + first))
        weights = real.double() / real.sum(1, keepdim=True)  # 0 / 0, NaN, where there is none
        before, after = (_text_means(model, batch, weights) for model in (earlier, later))
        parts.append((after[..., :-1] - before[..., :-1], before[..., -1]))
    return MeanDifference(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _text_means(model: HookedModel, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sums over positions of the residual stream, then of its norm: [text, layer, d_model + 1]."""
    weights = weights.to(model.device)

    def summed(stream: torch.Tensor) -> torch.Tensor:
        stream = stream.double()
        stream = torch.cat([stream, stream.norm(dim=-1, keepdim=True)], dim=-1)
        return torch.einsum("tp,tpd->td", weights, stream).cpu()

    hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(model.n_layers)]
    run = model.run(batch, read=dict.fromkeys(hooks, summed), stop_at_layer=model.n_layers)  # no logits
    return torch.stack([run[hook] for hook in hooks], dim=1)


@dataclass(frozen=True)
class Decoded:
    """What a mean difference says, beside what the scatter among texts alone would say; [layer, ...].

    ``size`` [layer]: norm of the mean difference over the mean norm of the earlier stream. ``up``, ``down`` [layer,
    TOP]: ids of the tokens it raises and lowers most, ``up_values``, ``down_values``: by how much, in logits for a
    final norm that divides by 1. ``agreement`` [layer]: share of these lists that two disjoint halves of the texts have
    in common. ``floor_...``: the same of half the difference between two halves of the texts, which scatters as the
    mean does and has no mean (size, agreement: over ``draws`` splits; lists: of the first). Without a difference sizes,
    values and agreement are 0 and ids -1. ``texts`` with tokens; ``left_out``: without.

    Agreement says that the direction is no accident of these texts, not that its tokens mean anything: in SmolLM2 with
    a random change of 2 % in every matrix two thirds of them agree. Compare with what two seeds of one training give.
    """

    size: np.ndarray
    up: np.ndarray
    down: np.ndarray
    up_values: np.ndarray
    down_values: np.ndarray
    agreement: np.ndarray
    floor_size: np.ndarray
    floor_up: np.ndarray
    floor_down: np.ndarray
    floor_up_values: np.ndarray
    floor_down_values: np.ndarray
    floor_agreement: np.ndarray
    texts: int
    left_out: int
    draws: int
    seed: int


def decode(found: MeanDifference, model: HookedModel, *, seed: int, draws: int = 10) -> Decoded:
    """Decode by the final norm's weight and the unembedding of ``model`` (the later one: what its readers would see).

    ``words.token_labels`` makes ids readable. Raises ``StoneyError`` with fewer than four texts that have tokens.
    """
    values, norms = found.values[found.scored], found.norms[found.scored].mean(0)
    if len(values) < 4:
        raise StoneyError(
            f"mean difference: {len(values)} texts with tokens, expected at least four, to split them twice"
        )
    whole = _top(model, values.mean(0))
    agreements, floors, sizes = [], [], []
    for draw in range(draws):
        quarters = [values[rows].mean(0) for rows in _quarters(len(values), seed + draw)]
        noise = [_top(model, (quarters[place] - quarters[place + 1]) / 2) for place in (0, 2)]
        halves = [_top(model, (quarters[place] + quarters[place + 1]) / 2) for place in (0, 2)]
        agreements.append(_agreement(*halves))
        floors.append(_agreement(*noise))
        scatter = (quarters[0] + quarters[1] - quarters[2] - quarters[3]) / 4
        sizes.append(scatter.norm(dim=-1) / norms)
        if draw == 0:
            floor = _top(model, scatter)
    return Decoded(
        size=(values.mean(0).norm(dim=-1) / norms).numpy(),
        **whole,
        agreement=np.mean(agreements, axis=0),
        floor_size=torch.stack(sizes).mean(0).numpy(),
        **{f"floor_{name}": array for name, array in floor.items()},
        floor_agreement=np.mean(floors, axis=0),
        texts=len(values),
        left_out=int((~found.scored).sum()),
        draws=draws,
        seed=seed,
    )


def _quarters(n: int, seed: int) -> list[np.ndarray]:
    """Four disjoint quarters of n rows; the first two are one half."""
    return [half[rows] for half in significance.halves(range(n), seed) for rows in significance.halves(half, seed)]


def _top(model: HookedModel, directions: torch.Tensor) -> dict[str, np.ndarray]:
    """Of directions [layer, d_model] the TOP tokens both ways; ids -1 where a direction is zero."""
    directions = directions.to(model.device, model.W_U.dtype)
    logits = (directions * model.final_norm_weight) @ model.W_U
    found = {}
    for name, sign in (("up", 1), ("down", -1)):
        top = (sign * logits).topk(min(TOP, logits.shape[-1]))
        ids = top.indices.masked_fill(~directions.any(-1, keepdim=True), -1)
        found |= {name: ids.cpu().numpy(), f"{name}_values": sign * top.values.float().cpu().numpy() + 0.0}  # no -0
    return found


def _agreement(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> np.ndarray:
    """Share of the tokens in both lists of the one that are in the other's, [layer]."""
    shared = [
        [len(set(a) & set(b) - {-1}) / len(a) for a, b in zip(one[name], other[name], strict=True)]
        for name in ("up", "down")
    ]
    return np.mean(shared, axis=0)


# Heads, MLPs and neurons


@dataclass(frozen=True)
class UnitChanges:
    """``earlier``, ``later``: the units' effects in each model; ``difference``: later minus earlier. Masks in a unit's
    shape:

    ``gained``: found in the later model, not in the earlier, larger there, and the difference found; ``lost``: the
    reverse; ``kept``: found in both with one sign; ``turned``: with opposite signs; ``undecided``: found in one model,
    not in the other, but no difference is found: that one test passed and another did not shows no change.
    """

    earlier: significance.Effects
    later: significance.Effects
    difference: significance.Effects
    gained: np.ndarray
    lost: np.ndarray
    kept: np.ndarray
    turned: np.ndarray
    undecided: np.ndarray


def unit_changes(earlier, later, clusters: Sequence[Hashable], *, seed: int, floor=0.0, seed_floor=0.0) -> UnitChanges:
    """Which units training gained and lost, from their effects on the same pairs in both models, [pair, layer, ...].

    ``floor``: for an effect, from models with random weights; ``seed_floor``: for a difference, from two seeds of one
    training; each a number or an array that broadcasts to a unit's place. Raises as ``significance.difference``.
    """
    before, after = (significance.effects(values, clusters, seed=seed, floor=floor) for values in (earlier, later))
    difference = significance.difference(earlier, later, clusters, seed=seed, floor=seed_floor)
    same_sign, grew = before.mean * after.mean > 0, np.abs(after.mean) > np.abs(before.mean)
    one_only = before.found ^ after.found
    gained = after.found & one_only & difference.found & grew
    lost = before.found & one_only & difference.found & ~grew
    both = before.found & after.found
    return UnitChanges(
        before, after, difference, gained, lost, both & same_sign, both & ~same_sign, one_only & ~gained & ~lost
    )


@dataclass(frozen=True)
class TopShared:
    """The ``count`` units of the largest |mean| in each model, out of ``units``: ``shared`` are in both, ``expected``
    by chance (count^2 / units), ``p`` of as many or more (hypergeometric, units taken as independent).

    ``across``: mean share of the top units on one half of the clusters in one model that are top on the other half in
    the other model; ``within``: the same in one model, both models averaged: what is shared where nothing changed. None
    with fewer than two clusters.
    """

    units: int
    count: int
    shared: int
    expected: float
    p: float
    across: float | None
    within: float | None


def top_shared(earlier, later, clusters: Sequence[Hashable], *, seed: int, share: float = 0.01) -> TopShared:
    """How far both models agree on their top units, from effects on the same pairs [pair, layer, neuron].

    For neurons, of which there are too many to test each. Raises ``StoneyError`` for values of different shapes, and a
    ``share`` that is not above 0 and at most 1.
    """
    from scipy.stats import hypergeom

    before, after = (np.asarray(values, dtype=np.float64) for values in (earlier, later))
    if before.shape != after.shape or len(before) != len(clusters):
        raise StoneyError(
            f"values of two models: shapes {before.shape} and {after.shape}, {len(clusters)} labels of clusters; "
            "expected the same pairs and units, and a label for each pair"
        )
    if not 0 < share <= 1:
        raise StoneyError(f"share={share}: expected the share of units that are top, above 0 and at most 1")
    before, after = before.reshape(len(before), -1), after.reshape(len(after), -1)
    units = before.shape[1]
    count = max(1, round(share * units))

    def common(one: np.ndarray, other: np.ndarray) -> int:
        tops = (np.argsort(-np.abs(values.mean(axis=0)), kind="stable")[:count] for values in (one, other))
        return len(np.intersect1d(*tops))

    shared, across, within = common(before, after), None, None
    if len(set(clusters)) > 1:
        a, b = significance.halves(clusters, seed)
        across = (common(before[a], after[b]) + common(before[b], after[a])) / (2 * count)
        within = (common(before[a], before[b]) + common(after[a], after[b])) / (2 * count)
    p = float(hypergeom.sf(shared - 1, units, count, count))
    return TopShared(units, count, shared, count**2 / units, p, across, within)
