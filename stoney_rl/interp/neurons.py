"""MLP neurons: what each one does for an answer, which ones tell two groups of texts apart, and where they fire.

1. A neuron's value is what goes into the MLP's output matrix, ``mlp.hook_post``: gate times up projection in the models
   here, so it can be strongly negative, and the sign of what it writes turns with it.
2. Attribution of a pair's answer: value x (W_out . direction) / sigma at the last position, with
   direction = final_norm_weight * (W_U[answer] - W_U[wrong]) and sigma the final norm's scale (Elhage et al. 2021,
   https://transformer-circuits.pub/2021/framework; Geva et al. 2203.14680). Over the neurons of a layer it sums to the
   direct effect of the layer's MLP on logit[answer] - logit[wrong].
3. Two groups: AUROC of each neuron's value at the last token of each text (a word, say), chosen on one half of the
   clusters and reported on the other, where the best of many thousand fall back to what they are worth.
4. Examples: the highest, the lowest, and as many at random: only beside random ones do top examples say something about
   a neuron (Bolukbasi et al. 2104.07143).

A neuron is (layer, index). Memory: one value a row (position -1) of a few layers at a time, or of chosen neurons alone;
never all positions of a layer's neurons beyond the pass that makes them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp import attribution
from stoney_rl.interp.hooked import Batch, HookedModel
from stoney_rl.interp.pairs import PairBatch
from stoney_rl.interp.probes import last_vectors
from stoney_rl.interp.significance import Effects, effects, halves

Neuron = tuple[int, int]
_CELLS = 2**26  # values of neurons held at once, 256 MB


# What neurons do for an answer


def attribution_of(model: HookedModel, pairs: PairBatch, neurons: Sequence[Neuron]) -> torch.Tensor:
    """What each neuron adds to logit[answer] - logit[wrong] of the clean prompts, float32 [pair, neuron], in logits.

    The direct path alone, with the norm's scale as it is. Raises ``StoneyError`` for models with a norm behind the MLP
    (Gemma 2 and 3: what neurons write is rescaled as a whole) and neurons that aren't there.
    """
    _check(model, neurons)
    by_layer = _attributions(model, pairs, sorted({layer for layer, _ in neurons}))
    return torch.stack([by_layer[layer][:, index] for layer, index in neurons], dim=1)


def choose_by_attribution(
    model: HookedModel, batches: Iterable[PairBatch], count: int, layers: Sequence[int] | None = None
) -> list[Neuron]:
    """The ``count`` neurons of ``layers`` (all) whose mean attribution over the pairs is largest in size, largest first.

    Report them on other pairs (``significance.halves``): they were the best of many on these. Raises as
    ``attribution_of``.
    """
    layers = list(range(model.n_layers)) if layers is None else list(layers)
    _check(model, [(layer, 0) for layer in layers])
    total = torch.zeros(len(layers), model.d_mlp)
    for pairs in batches:
        by_layer = _attributions(model, pairs, layers)
        total += torch.stack([by_layer[layer].sum(dim=0) for layer in layers])
    return _largest(total.abs(), layers, count)


def _attributions(model: HookedModel, pairs: PairBatch, layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """Of each layer, [pair, d_mlp]."""
    values = attribution.neuron_attribution(model, pairs.clean, pairs.answer, pairs.wrong, layers)
    return {layer: values[:, place] for place, layer in enumerate(layers)}


# Which neurons tell two groups of texts apart


@dataclass(frozen=True)
class Separation:
    """``neurons``, best first; ``chosen`` [neuron]: AUROC on the half they were chosen on; ``reported``: of AUROC - 0.5
    on the other half, in their order. AUROC: the chance that a text of the second group (label 1) has the higher value."""

    neurons: list[Neuron]
    chosen: np.ndarray
    reported: Effects


def separating_neurons(
    model: HookedModel,
    batches: Sequence[Batch],
    labels: Sequence[int],
    clusters: Sequence,
    *,
    count: int,
    seed: int,
    layers: Sequence[int] | None = None,
) -> Separation:
    """The ``count`` neurons of ``layers`` (all) whose AUROC is farthest from 0.5, by their value at each row's last token.

    ``labels`` 0 or 1 and ``clusters``: one for each row of all batches, in order. The layers are passed in groups, each
    with a pass over all rows, if their values need more than 256 MB. Raises ``StoneyError`` for labels that don't fit or
    a half without both groups.
    """
    layers = list(range(model.n_layers)) if layers is None else list(layers)
    _check(model, [(layer, 0) for layer in layers])
    labels = _checked_labels(labels, sum(map(len, batches)))
    one, other = halves(clusters, seed)
    group = max(1, _CELLS // (len(labels) * model.d_mlp))
    found = []
    for start in range(0, len(layers), group):
        values = last_vectors(model, batches, [_hook(layer) for layer in layers[start : start + group]])
        found += [auroc(layer_values[one], labels[one]) for layer_values in values.values()]
    found = np.stack(found)
    neurons = _largest(torch.from_numpy(np.abs(found - 0.5)), layers, count)
    values = neuron_values(model, batches, neurons)[other]
    components = auroc_components(values, labels[other])
    reported = effects(components, [clusters[row] for row in other], seed=seed)
    return Separation(neurons, np.array([found[layers.index(layer), index] for layer, index in neurons]), reported)


def neuron_values(model: HookedModel, batches: Iterable[Batch], neurons: Sequence[Neuron]) -> np.ndarray:
    """Value of each neuron at each row's last token, float32 [row, neuron], rows of all batches in order."""
    _check(model, neurons)
    return torch.cat([_all_values(model, batch, neurons)[:, -1] for batch in batches]).numpy()


def auroc(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """AUROC of each column [k] of ``values`` [n, k] for labels 0 and 1 [n], ties half: (sum of ranks of 1 - m(m+1)/2) / (m (n-m))."""
    from scipy.stats import rankdata

    positive = _both(labels)
    m, rest = positive.sum(), (~positive).sum()
    return (rankdata(values, axis=0)[positive].sum(axis=0) - m * (m + 1) / 2) / (m * rest)


def auroc_components(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """AUROC - 0.5 as a mean over examples, [n, k], so that its interval and p can be taken by cluster.

    An example's share is its placement: of how many of the other group it is on the right side (the structural
    components of DeLong, DeLong and Clarke-Pearson 1988, Biometrics 44(3)). Its deviation from the AUROC counts n / m for
    a group of m, so that the variance of the mean is theirs.
    """
    from scipy.stats import rankdata

    positive = _both(labels)
    among_all = rankdata(values, axis=0)
    placement = np.empty_like(among_all)
    for group in (positive, ~positive):
        below = (among_all[group] - rankdata(values[group], axis=0)) / (~group).sum()
        placement[group] = below if group is positive else 1 - below
    area = placement[positive].mean(axis=0)
    share = np.where(positive, 1 / positive.mean(), 1 / (~positive).mean())[:, None]
    return area - 0.5 + share * (placement - area)


# Where neurons fire


@dataclass(frozen=True)
class Example:
    """A neuron's ``value`` at ``position`` (0: the first token that is not padding) of the ``example``-th row.

    ``tokens``: the ids around it; ``tokens[offset]`` is the one at ``position``. ``values``: the neuron's at each of them.
    """

    example: int
    position: int
    value: float
    tokens: tuple[int, ...]
    offset: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class NeuronRecord:
    """``mean`` of the values and share of them that are ``positive`` over ``positions`` tokens; examples, at most one a row.

    ``top``: highest first; ``bottom``: lowest first; ``random``: drawn among all positions.
    """

    neuron: Neuron
    mean: float
    positive: float
    positions: int
    top: list[Example]
    bottom: list[Example]
    random: list[Example]


def neuron_records(
    model: HookedModel, batches: Iterable[Batch], neurons: Sequence[Neuron], *, k: int, seed: int, window: int = 10
) -> list[NeuronRecord]:
    """Over a corpus in one pass: of each neuron, mean, share of positive values, and ``k`` top, bottom and random examples.

    ``window``: how many tokens are kept on each side. Rows count on through all batches. Holds a batch and
    3 k examples a neuron. Raises ``StoneyError`` for neurons that aren't there and a corpus without rows.
    """
    _check(model, neurons)
    generator = torch.Generator().manual_seed(seed)
    total, positive = torch.zeros(2, len(neurons), dtype=torch.float64)
    positions = rows = 0
    kept: dict[str, list[list[tuple[float, Example]]]]  # of each neuron: what they are ordered by, and they
    kept = {name: [[] for _ in neurons] for name in ("top", "bottom", "random")}
    for batch in batches:
        values, real = _all_values(model, batch, neurons), batch.mask.bool()
        total += values[real].double().sum(dim=0)
        positive += (values[real] > 0).sum(dim=0)
        chance = torch.rand(real.shape, generator=generator)[..., None].expand_as(values)
        for name, order in (("top", values), ("bottom", -values), ("random", chance)):
            order = order.masked_fill(~real[..., None], -torch.inf)
            _keep_best(kept[name], order, values, batch, rows, k, window)
        positions, rows = positions + int(real.sum()), rows + len(batch)
    if not positions:
        raise StoneyError("neurons: the corpus has no rows")
    mean, share = (total / positions).tolist(), (positive / positions).tolist()
    return [
        NeuronRecord(
            neuron, mean[column], share[column], positions,
            **{name: [example for _, example in kept[name][column]] for name in kept},
        )
        for column, neuron in enumerate(neurons)
    ]  # fmt: skip


def _all_values(model: HookedModel, batch: Batch, neurons: Sequence[Neuron]) -> torch.Tensor:
    """[row, position, neuron] of the chosen neurons; no others leave the pass."""
    columns = _columns(neurons)
    read = {_hook(layer): _picked(indices) for layer, indices in columns.items()}
    run = model.run(batch, read=read, stop_at_layer=max(columns) + 1)
    return torch.stack([run[_hook(layer)][..., columns[layer].index(index)] for layer, index in neurons], dim=-1)


def _keep_best(
    kept: list[list], order: torch.Tensor, values: torch.Tensor, batch: Batch, rows: int, k: int, window: int
) -> None:
    """Put each row's best position by ``order`` [row, position, neuron] in among the ``kept`` of each neuron, the k best."""
    best, where = order.max(dim=1)  # [row, neuron]
    top = best.topk(min(k, len(batch)), dim=0).indices.T.tolist()
    for column, chosen in enumerate(top):
        new = []
        for row in chosen:
            example = _example(batch, rows, row, int(where[row, column]), values[row, :, column], window)
            new.append((float(best[row, column]), example))
        kept[column] = sorted(kept[column] + new, key=lambda pair: -pair[0])[:k]


def _example(batch: Batch, rows: int, row: int, position: int, values: torch.Tensor, window: int) -> Example:
    """Row ``row`` of a batch before which ``rows`` were read, around ``position`` of the padded row; ``values`` [position]."""
    real = batch.mask[row].bool()
    tokens, values = batch.ids[row, real].tolist(), values[real].tolist()
    position -= len(real) - len(tokens)
    start = max(0, position - window)
    around = slice(start, position + window + 1)
    return Example(
        rows + row, position, values[position], tuple(tokens[around]), position - start, tuple(values[around])
    )


# Shared


def _hook(layer: int) -> str:
    return f"blocks.{layer}.mlp.hook_post"


def _last(activation: torch.Tensor) -> torch.Tensor:
    return activation[:, -1].float().cpu()


def _picked(indices: list[int]):
    return lambda activation: activation[..., indices].float().cpu()


def _columns(neurons: Sequence[Neuron]) -> dict[int, list[int]]:
    """Layer -> indices of its neurons."""
    columns: dict[int, list[int]] = {}
    for layer, index in neurons:
        columns.setdefault(layer, []).append(index)
    return columns


def _largest(size: torch.Tensor, layers: Sequence[int], count: int) -> list[Neuron]:
    """(layer, index) of the ``count`` largest of ``size`` [layer, d_mlp]."""
    flat = size.flatten().topk(min(count, size.numel())).indices.tolist()
    return [(layers[place // size.shape[1]], place % size.shape[1]) for place in flat]


def _check(model: HookedModel, neurons: Sequence[Neuron]) -> None:
    if not neurons:
        raise StoneyError("neurons: none given, expected (layer, index) of at least one")
    for layer, index in neurons:
        if not (0 <= layer < model.n_layers and 0 <= index < model.d_mlp):
            raise StoneyError(
                f"{model.name}: no neuron {index} in layer {layer}; layers go from 0 to {model.n_layers - 1}, "
                f"neurons from 0 to {model.d_mlp - 1}"
            )


def _checked_labels(labels: Sequence[int], rows: int) -> np.ndarray:
    labels = np.asarray(labels)
    if len(labels) != rows:
        raise StoneyError(f"labels: {len(labels)} for {rows} rows: expected one for each row of all batches")
    _both(labels)
    return labels


def _both(labels: np.ndarray) -> np.ndarray:
    """Which labels are 1; refuses others than 0 and 1, and a group without examples."""
    positive = np.asarray(labels) == 1
    if not np.isin(labels, (0, 1)).all() or positive.all() or not positive.any():
        raise StoneyError("labels: expected 0 and 1, each at least once (in each half of the clusters)")
    return positive
