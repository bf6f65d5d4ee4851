"""Debiased CKA: its invariances, independence, and the same positions in both models."""

import numpy as np
import pytest
import tiny
import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp.hooked import hook_model, left_padded
from stoney_rl.interp.significance import effects
from stoney_rl.interp.similarity import _drawn_positions, _hsic, cka, cka_by_cluster, layer_similarity


def rotation(rng, width: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(width, width)))[0]


def test_unbiased_hsic_is_the_mean_over_quadruples():
    """Song et al. 2012, theorem 2: the mean of K_ij (L_ij + L_qr - 2 L_iq) over all distinct i, j, q, r."""
    import itertools

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 2)), rng.normal(size=(6, 3))
    k, l = x @ x.T, y @ y.T  # noqa: E741
    terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in itertools.permutations(range(6), 4)]
    assert _hsic(k, l) == pytest.approx(np.mean(terms))


def test_self_is_one_and_rotation_scale_and_shift_change_nothing():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 8)) @ np.diag(np.arange(1, 9))
    y = x @ rng.normal(size=(8, 5)) + rng.normal(size=(50, 5))
    assert cka(x, x) == pytest.approx(1, abs=1e-12)
    assert cka(x, 3 * x @ rotation(rng, 8) + 100) == pytest.approx(1, abs=1e-9)
    assert cka(x, y) == pytest.approx(cka(y, x))
    assert cka(-0.01 * x @ rotation(rng, 8) - 7, y @ rotation(rng, 5) * 40) == pytest.approx(cka(x, y))
    assert 0.2 < cka(x, y) < 0.99
    stretched = x * np.array([100, 1, 1, 1, 1, 1, 1, 1])
    assert cka(stretched, y) != pytest.approx(cka(x, y), abs=0.01)  # linear maps in general do change it


def test_independent_activations_are_about_zero_with_more_dimensions_than_tokens():
    rng = np.random.default_rng(0)
    values = [cka(rng.normal(size=(40, 400)), rng.normal(size=(40, 300))) for _ in range(20)]
    assert np.mean(values) == pytest.approx(0, abs=0.02)
    x, y = rng.normal(size=(40, 400)), rng.normal(size=(40, 300))
    k, l = (one - one.mean(axis=0) for one in (x, y))  # noqa: E741
    biased = np.linalg.norm(k.T @ l) ** 2 / np.linalg.norm(k.T @ k) / np.linalg.norm(l.T @ l)
    assert biased > 0.8  # what the usual estimate says of the same


def test_what_does_not_vary_has_no_similarity():
    x = np.random.default_rng(0).normal(size=(10, 3))
    assert cka(x, np.ones((10, 3))) is None
    assert cka_by_cluster(x, np.ones((10, 3)), range(10)) is None


def test_jackknife_values_have_its_mean_and_spread():
    """Over 60 draws of 30 clusters, CKA scatters as the standard error of the pseudo-values' mean says."""
    rng, values, errors = np.random.default_rng(0), [], []
    for _ in range(60):
        own = rng.normal(size=(30, 6))
        x = np.repeat(own, 3, axis=0) + 0.3 * rng.normal(size=(90, 6))
        y = np.repeat(own @ np.diag([3, 1, 1, 0, 0, 0]) + rng.normal(size=(30, 6)), 3, axis=0)
        pseudo = cka_by_cluster(x, y, np.repeat(np.arange(30), 3))
        values.append(cka(x, y))
        errors.append(pseudo.std(ddof=1) / np.sqrt(30))
        assert pseudo.mean() == pytest.approx(values[-1], abs=0.1)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.3)


@pytest.fixture(scope="module")
def corpus():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 259, (3 + n % 6,), generator=generator).tolist() for n in range(24)]
    return rows, [left_padded(rows[start : start + 9], 0) for start in (0, 9, 18)]


def test_drawn_positions_are_tokens_behind_the_first_and_every_one_without_a_cap(corpus):
    rows, batches = corpus
    masks, labels = _drawn_positions(batches, range(24), 10**6, seed=0)
    # Rows are padded on the left: their first tokens are where the mask begins.
    expected = [[[0] * (mask.shape[1] - len(row) + 1) + [1] * (len(row) - 1) for row in rows[start : start + 9]]
                for start, mask in zip((0, 9, 18), masks, strict=True)]  # fmt: skip
    assert [mask.int().tolist() for mask in masks] == expected
    assert labels == [n for n, row in enumerate(rows) for _ in row[1:]]
    masks, labels = _drawn_positions(batches, range(24), 20, seed=0)
    assert sum(int(mask.sum()) for mask in masks) == len(labels) == 20
    assert not any((mask & ~batch.mask.bool()).any() for mask, batch in zip(masks, batches, strict=True))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_model_is_like_itself_on_every_layer(architecture, corpus):
    model = hook_model(tiny.model(architecture), tiny.tokenizer())
    found = layer_similarity(model, model, corpus[1], range(24), seed=0)
    assert found.shape == (24, 2)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 1, atol=1e-5)


def test_padded_batches_give_what_rows_alone_give(corpus):
    rows, batches = corpus
    one, other = (hook_model(tiny.model(seed=seed), tiny.tokenizer()) for seed in (0, 1))
    alone = [left_padded([row], 0) for row in rows]
    np.testing.assert_allclose(
        layer_similarity(one, other, batches, range(24), seed=0),
        layer_similarity(one, other, alone, range(24), seed=0),
        atol=1e-5,
    )


def test_models_of_other_seeds_are_less_alike_than_a_model_that_was_nudged(corpus):
    """Widths differ in the first: that is allowed."""
    base, changed = tiny.model(seed=0), tiny.model(seed=0)
    with torch.no_grad():
        for weight in changed.parameters():
            weight += 0.002 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    base, changed, stranger = (
        hook_model(model, tiny.tokenizer()) for model in (base, changed, tiny.model(seed=7, width=64))
    )
    nudged = effects(layer_similarity(base, changed, corpus[1], range(24), seed=0), range(24), seed=0)
    strange = effects(layer_similarity(base, stranger, corpus[1], range(24), seed=0), range(24), seed=0)
    assert (nudged.low > strange.high).all()
    assert (nudged.mean < 1).all()


def test_what_does_not_fit_is_refused(corpus):
    x = np.random.default_rng(0).normal(size=(10, 3))
    with pytest.raises(StoneyError, match="same four tokens"):
        cka(x, x[1:])
    with pytest.raises(StoneyError, match="same four tokens"):
        cka(x[:3], x[:3])
    with pytest.raises(StoneyError, match="10 labels of 1 clusters"):
        cka_by_cluster(x, x, ["a"] * 10)
    with pytest.raises(StoneyError, match="largest cluster"):
        cka_by_cluster(x, x, ["a"] * 7 + ["b"] * 3)
    two, three = (hook_model(tiny.model(layers=layers), tiny.tokenizer()) for layers in (2, 3))
    with pytest.raises(StoneyError, match="layers can't be matched"):
        layer_similarity(two, three, corpus[1], range(24), seed=0)
    with pytest.raises(StoneyError, match="3 labels"):
        layer_similarity(two, two, corpus[1], "abc", seed=0)
