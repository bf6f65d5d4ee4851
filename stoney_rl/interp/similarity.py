"""How alike two models represent the same tokens: debiased linear CKA, layer by layer.

1. The same positions are read in both models: at most ``cap`` tokens, drawn at random among all but padding and each text's
   first, which draws attention: its huge vector would be most of any sum of squares (Sun et al. 2024, 2402.17762).
2. Linear CKA = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) of the Gram matrices X X^T and Y Y^T (Kornblith et al.,
   1905.00414). It does not change when either is rotated, shifted, or multiplied by a number.
3. HSIC in its unbiased form (Song et al. 2012, JMLR 13, equation 5): the usual one grows with d / n, so that independent
   activations with more dimensions than tokens would look alike. The value can be a little below zero.
4. Texts, not tokens, are independent: the jackknife leaves one cluster of texts out at a time, and gives one value a
   cluster for ``significance.effects``.
5. A few directions with huge values, where there are some still, make up most of linear CKA: read it beside a probe.

Memory: ``cap`` vectors a layer and model, and Gram matrices [cap, cap] of one layer.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from stoney_rl.errors import StoneyError
from stoney_rl.interp.hooked import Batch, HookedModel

CAP = 1000  # tokens: 8 MB a Gram matrix, 2.3 MB of vectors a layer of SmolLM2


def cka(x, y) -> float | None:
    """Debiased linear CKA of ``x`` [n, d] and ``y`` [n, e], rows of the same tokens. None where either does not vary.

    Raises ``StoneyError`` for different or fewer than four rows.
    """
    return _cka(*_grams(x, y))


def cka_by_cluster(x, y, clusters: Sequence[Hashable]) -> np.ndarray | None:
    """Jackknife pseudo-values of ``cka``, float32 [cluster], in order of first appearance: G cka - (G - 1) cka without g.

    Their mean is the CKA less most of its bias, their spread its uncertainty (Efron and Tibshirani 1993, chapter 11).
    None where it is not defined. Raises ``StoneyError`` as ``cka``, and for fewer than two clusters.
    """
    x_gram, y_gram = _grams(x, y)
    labels = np.asarray([str(label) for label in clusters])
    names = list(dict.fromkeys(labels))
    if len(labels) != len(x_gram) or len(names) < 2:
        raise StoneyError(
            f"cka: {len(labels)} labels of {len(names)} clusters for {len(x_gram)} tokens; expected two or more"
        )
    whole = _cka(x_gram, y_gram)
    kept = [np.flatnonzero(labels != name) for name in names]
    if min(map(len, kept)) < 4:
        raise StoneyError("cka: fewer than four tokens are left without the largest cluster")
    without = [_cka(x_gram[np.ix_(rows, rows)], y_gram[np.ix_(rows, rows)]) for rows in kept]
    if whole is None or None in without:
        return None
    return (len(names) * whole - (len(names) - 1) * np.array(without)).astype(np.float32)


def layer_similarity(
    model_a: HookedModel,
    model_b: HookedModel,
    batches: Sequence[Batch],
    clusters: Sequence[Hashable],
    *,
    seed: int,
    cap: int = CAP,
) -> np.ndarray:
    """Pseudo-values of the CKA of both models' residual streams behind each layer, float32 [cluster, layer].

    ``clusters``: a label for each row of all batches. The models need equally many layers and the same token ids; widths
    may differ. Clusters none of whose tokens were drawn are left out, as are texts of one token. Raises ``StoneyError`` if the numbers of layers
    differ, and where a layer's activations don't vary.
    """
    if model_a.n_layers != model_b.n_layers:
        raise StoneyError(
            f"{model_a.name} has {model_a.n_layers} layers, {model_b.name} {model_b.n_layers}: layers can't be matched"
        )
    if len(clusters) != sum(map(len, batches)):
        raise StoneyError(f"clusters: {len(clusters)} labels, expected one for each row of all batches")
    drawn, labels = _drawn_positions(batches, clusters, cap, seed)
    found = [
        cka_by_cluster(x, y, labels)
        for x, y in zip(_vectors(model_a, batches, drawn), _vectors(model_b, batches, drawn), strict=True)
    ]
    if any(values is None for values in found):
        raise StoneyError("cka: activations of a layer don't vary over these tokens")
    return np.stack(found, axis=1)


def _drawn_positions(batches: Sequence[Batch], clusters: Sequence[Hashable], cap: int, seed: int):
    """Of each batch a bool mask [row, position] of the tokens that are read, and the cluster label of each, in order."""
    import torch

    tokens = torch.cat([_after_first(batch).flatten() for batch in batches]).nonzero()[:, 0].numpy()
    chosen = np.random.default_rng(seed).permutation(tokens)[:cap]
    flat = torch.zeros(sum(batch.mask.numel() for batch in batches), dtype=torch.bool)
    flat[torch.from_numpy(chosen)] = True
    masks = [
        part.view_as(batch.mask)
        for part, batch in zip(flat.split([batch.mask.numel() for batch in batches]), batches, strict=True)
    ]
    rows = torch.cat([mask.sum(dim=1) for mask in masks]).tolist()
    return masks, [label for label, count in zip(clusters, rows, strict=True) for _ in range(count)]


def _after_first(batch: Batch):
    return (batch.mask == 1) & (batch.mask.cumsum(1) > 1)


def _vectors(model: HookedModel, batches: Sequence[Batch], masks: Sequence) -> list[np.ndarray]:
    """Of each layer, [token, d_model]."""
    import torch

    hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(model.n_layers)]
    runs = []
    for batch, mask in zip(batches, masks, strict=True):
        here = mask.to(model.device)
        read = dict.fromkeys(hooks, lambda vectors, here=here: vectors[here].float().cpu())
        runs.append(model.run(batch, read=read, last=True))
    return [torch.cat([run[hook] for run in runs]).numpy() for hook in hooks]


def _grams(x, y) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 4:
        raise StoneyError(
            f"cka: shapes {x.shape} and {y.shape}; expected [n, d] and [n, e] of the same four tokens or more"
        )
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)  # changes nothing but the rounding
    return x @ x.T, y @ y.T


def _cka(x_gram: np.ndarray, y_gram: np.ndarray) -> float | None:
    own = _hsic(x_gram, x_gram), _hsic(y_gram, y_gram)
    if min(own) <= 0:
        return None
    return float(_hsic(x_gram, y_gram) / np.sqrt(own[0] * own[1]))


def _hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741 (the paper's letters)
    """Unbiased HSIC of two Gram matrices [n, n], n >= 4; their diagonals do not count:

    (tr(K L) + 1'K1 1'L1 / ((n-1)(n-2)) - 2 1'K L1 / (n-2)) / (n (n-3))
    """
    n = len(k)
    k_diagonal, l_diagonal = k.diagonal(), l.diagonal()
    k_rows, l_rows = k.sum(axis=0) - k_diagonal, l.sum(axis=0) - l_diagonal
    product = np.einsum("ij,ij->", k, l) - k_diagonal @ l_diagonal
    total = product + k_rows.sum() * l_rows.sum() / ((n - 1) * (n - 2)) - 2 * (k_rows @ l_rows) / (n - 2)
    return total / (n * (n - 3))
