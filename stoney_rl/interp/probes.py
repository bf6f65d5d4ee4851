"""What can be read off an activation by a straight cut, and how much of that is the probe's own doing.

1. Activations [n, d] of one hook at each row's last token (``last_vectors``).
2. The examples are split into folds with no cluster (lexeme) in two of them and the labels spread evenly; each example is
   predicted once, by a probe that saw none of its cluster. TransformerLens's ``fit_sparse_probe`` splits by example,
   which lets a probe recognise the lexeme.
3. Logistic regression on features standardised by the training folds alone, L2 as scikit-learn sets it.
4. Control (Hewitt and Liang, 1909.03368): each type (a word form, say) gets a label drawn at random, as often as the true
   ones occur, and the same probe learns that. Accuracy less control accuracy is the selectivity: what a probe only
   memorises, it memorises for the control too. Where types are the clusters, none can be memorised, and the control
   is what guessing gives.

A label that a probe finds is there to be read; whether the model reads it only patching or steering can tell.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from stoney_rl.errors import StoneyError
from stoney_rl.interp.hooked import Batch, HookedModel

FOLDS = 5


@dataclass(frozen=True)
class Probe:
    """``correct`` and ``control_correct``: 0 or 1 for each example, float32 [n]; ``majority``: the share of the most frequent label.

    ``selectivity`` [n] is their difference, for ``significance.effects`` with the clusters that the folds were made of.
    """

    correct: np.ndarray
    control_correct: np.ndarray
    majority: float

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def selectivity(self) -> np.ndarray:
        return self.correct - self.control_correct


def probe(
    features,
    labels: Sequence[Hashable],
    clusters: Sequence[Hashable],
    *,
    seed: int,
    types: Sequence[Hashable] | None = None,
) -> Probe:
    """Probe ``features`` [n, d] for ``labels`` [n], out of fold; see the module's docstring.

    ``clusters`` [n]: what depends on one another; ``types`` [n]: what the control labels go by (the clusters). Raises
    ``StoneyError`` for lengths that differ, fewer than two labels, and a label in fewer clusters than there are folds.
    """
    features = np.asarray(features, dtype=np.float32)
    labels, clusters = _numbered(labels), _numbered(clusters)
    types = clusters if types is None else _numbered(types)
    _check(features, labels, clusters, types)
    control = _control_labels(labels, types, seed)
    folds = _folds(labels, clusters, seed)
    counts = np.bincount(labels)
    return Probe(
        _correct(features, labels, folds), _correct(features, control, folds), float(counts.max() / counts.sum())
    )


def last_vectors(model: HookedModel, batches: Iterable[Batch], hooks: Sequence[str]) -> dict[str, np.ndarray]:
    """Of each hook with one vector a position, the vectors at the rows' last tokens, float32 [row, d], in order."""
    import torch

    runs = [
        model.run(batch, read=dict.fromkeys(hooks, lambda vectors: vectors[:, -1].float().cpu())) for batch in batches
    ]
    if not runs:
        raise StoneyError("vectors: no batch was given")
    return {hook: torch.cat([run[hook] for run in runs]).numpy() for hook in hooks}


def _correct(features: np.ndarray, labels: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Whether each example's label is predicted by the probe of its fold, float32 [n]."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    correct = np.zeros(len(labels), dtype=np.float32)
    for train, test in folds:
        if len(np.unique(labels[train])) == 1:  # a control label may be missing from a fold
            correct[test] = labels[test] == labels[train][0]
            continue
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        correct[test] = classifier.fit(features[train], labels[train]).predict(features[test]) == labels[test]
    return correct


def _folds(labels: np.ndarray, clusters: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(n_splits=FOLDS, shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros(len(labels)), labels, clusters))


def _control_labels(labels: np.ndarray, types: np.ndarray, seed: int) -> np.ndarray:
    """A label for each type: that of an example drawn at random."""
    return np.random.default_rng(seed).choice(labels, size=types.max() + 1)[types]


def _numbered(names: Sequence[Hashable]) -> np.ndarray:
    return np.unique(np.asarray([str(name) for name in names]), return_inverse=True)[1]


def _check(features: np.ndarray, labels: np.ndarray, clusters: np.ndarray, types: np.ndarray) -> None:
    if features.ndim != 2 or len({len(features), len(labels), len(clusters), len(types)}) != 1:
        raise StoneyError(
            f"probe: features {features.shape}, {len(labels)} labels, {len(clusters)} clusters, {len(types)} types; "
            "expected [n, d] and n of each"
        )
    if not np.isfinite(features).all():
        raise StoneyError("probe: features are not finite")
    spread = [len(np.unique(clusters[labels == label])) for label in range(labels.max() + 1)]
    if len(spread) < 2 or min(spread) < FOLDS:
        raise StoneyError(
            f"probe: {len(spread)} labels, the rarest in {min(spread)} clusters; "
            f"expected two labels or more, each in at least {FOLDS} clusters"
        )
