"""Probes find what was planted, fall to chance where nothing was, and can't win by recognising a cluster."""

import numpy as np
import pytest
import tiny

from stoney_rl.errors import StoneyError
from stoney_rl.interp.hooked import hook_model, left_padded
from stoney_rl.interp.probes import _folds, last_vectors, probe
from stoney_rl.interp.significance import effects


def planted(rng, clusters: int = 60, each: int = 4, width: int = 16, strength: float = 3.0):
    """Features with a cluster's own vector in them; its label lies along a random direction. Labels by cluster."""
    labels = np.arange(clusters) % 2
    direction = rng.normal(size=width)
    direction *= strength / np.linalg.norm(direction)
    own = rng.normal(size=(clusters, width)) + np.outer(labels - 0.5, direction)
    features = np.repeat(own, each, axis=0) + 0.3 * rng.normal(size=(clusters * each, width))
    return features, np.repeat(labels, each), np.repeat(np.arange(clusters), each)


def test_planted_label_is_found_and_the_control_is_not():
    """Along the planted direction the two groups lie 3 standard deviations apart: the best cut is right in Phi(1.5) = 93 %."""
    features, labels, clusters = planted(np.random.default_rng(0), clusters=200)
    found = probe(features, labels, clusters, seed=0)
    assert found.accuracy == pytest.approx(0.93, abs=0.05)
    assert found.control_correct.mean() == pytest.approx(0.5, abs=0.1)
    assert found.majority == 0.5
    assert found.selectivity.shape == (800,)
    result = effects(found.selectivity, clusters, seed=0)
    assert result.found
    assert result.low > 0.2


def test_shuffled_labels_fall_to_chance():
    rng = np.random.default_rng(0)
    accuracies = []
    for seed in range(10):
        features, labels, clusters = planted(rng)
        accuracies.append(probe(features, rng.permutation(labels[::4])[clusters], clusters, seed=seed).accuracy)
    assert np.mean(accuracies) == pytest.approx(0.5, abs=0.06)  # 600 clusters: 3 standard errors


def test_a_cluster_can_not_be_recognised():
    """Its own vector tells a cluster exactly, and random labels go by cluster: split by example, a probe would be right."""
    features, _, clusters = planted(np.random.default_rng(0), clusters=40, each=6, width=64)
    labels = np.random.default_rng(1).permutation(np.arange(40) % 2)[clusters]
    grouped = probe(features, labels, clusters, seed=0)
    by_example = probe(features, labels, range(len(labels)), seed=0)
    assert by_example.accuracy > 0.95
    assert grouped.accuracy < 0.7


def test_control_shows_what_a_probe_memorises():
    """Types that occur in every cluster can be memorised: the control rises as high as a label that goes by type."""
    rng = np.random.default_rng(0)
    types, clusters = np.tile(np.arange(30), 10), np.repeat(np.arange(10), 30)
    features = rng.normal(size=(30, 64))[types] + 0.1 * rng.normal(size=(300, 64))
    found = probe(features, (types % 2), clusters, seed=0, types=types)
    assert found.accuracy > 0.95
    assert found.control_correct.mean() > 0.95
    assert abs(found.selectivity.mean()) < 0.05


def test_each_example_is_predicted_once_by_a_probe_without_its_cluster():
    _, labels, clusters = planted(np.random.default_rng(0))
    folds = _folds(labels, clusters, seed=0)
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(len(labels)))
    for train, test in folds:
        assert not set(clusters[train]) & set(clusters[test])
        assert labels[test].mean() == pytest.approx(0.5, abs=0.1)


def test_scale_and_shift_of_a_feature_change_nothing():
    features, labels, clusters = planted(np.random.default_rng(0))
    moved = features * np.logspace(-3, 3, 16) + np.linspace(-50, 50, 16) * np.logspace(-3, 3, 16)
    expected = probe(features, labels, clusters, seed=0).correct
    assert (probe(moved, labels, clusters, seed=0).correct != expected).mean() < 0.01


def test_standardisation_sees_the_training_folds_alone(monkeypatch):
    import sklearn.preprocessing

    seen = []

    class Recorded(sklearn.preprocessing.StandardScaler):
        def fit(self, features, *arguments, **options):
            seen.append(len(features))
            return super().fit(features, *arguments, **options)

    monkeypatch.setattr(sklearn.preprocessing, "StandardScaler", Recorded)
    features, labels, clusters = planted(np.random.default_rng(0))
    probe(features, labels, clusters, seed=0)
    assert seen == [len(train) for train, _ in _folds(labels, clusters, seed=0)] * 2


def test_names_of_labels_and_more_than_two():
    features, _, clusters = planted(np.random.default_rng(0), clusters=90)
    three = np.array(["noun", "verb", "particle"])[clusters % 3]
    features = features + 4 * np.eye(16)[clusters % 3]
    found = probe(features, three, [f"lexeme {cluster}" for cluster in clusters], seed=0)
    assert found.accuracy > 0.8
    assert found.majority == pytest.approx(1 / 3)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_last_vectors_are_those_of_each_row_alone(architecture):
    model = hook_model(tiny.model(architecture), tiny.tokenizer())
    rows = [[5, 6, 7, 8], [9], [10, 11]]
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_mid"]
    together = last_vectors(model, [left_padded(rows[:2], 0), left_padded(rows[2:], 0)], hooks)
    for hook in hooks:
        alone = np.stack([model.run(left_padded([row], 0), read=[hook])[hook][0, -1].numpy() for row in rows])
        assert together[hook].dtype == np.float32
        np.testing.assert_allclose(together[hook], alone, atol=1e-5)


def test_what_does_not_fit_is_refused():
    features, labels, clusters = planted(np.random.default_rng(0))
    with pytest.raises(StoneyError, match="239 labels"):
        probe(features, labels[1:], clusters, seed=0)
    with pytest.raises(StoneyError, match="1 labels, the rarest in 60"):
        probe(features, labels * 0, clusters, seed=0)
    with pytest.raises(StoneyError, match="the rarest in 4 clusters"):
        probe(features, clusters < 4, clusters, seed=0)
    with pytest.raises(StoneyError, match="not finite"):
        probe(features * np.inf, labels, clusters, seed=0)
    model = hook_model(tiny.model(), tiny.tokenizer())
    with pytest.raises(StoneyError, match="no batch"):
        last_vectors(model, [], ["blocks.0.hook_resid_post"])
