"""Many tests at once: intervals, p and findings of simulated effects, and of models that can have learnt nothing."""

import itertools

import numpy as np
import pytest
import scipy.stats
import tiny

from stoney_rl.errors import StoneyError
from stoney_rl.interp.significance import difference, effects, halves, random_floor, sign_flip_p


def clustered(rng, clusters: int, columns: int, skewed: bool = True):
    """Two examples a cluster, without any effect: mean 0; exponential (skewness 2) or normal, correlated columns."""
    draw = (lambda *shape: rng.exponential(size=shape) - 1) if skewed else (lambda *shape: rng.normal(size=shape))
    shared = draw(clusters, columns) + 0.5 * draw(clusters, 1)
    return np.repeat(shared, 2, axis=0) + 0.2 * draw(2 * clusters, columns), np.repeat(np.arange(clusters), 2)


def no_more_than_chance(count: int, runs: int) -> bool:
    """Whether so many of ``runs`` with a finding are not unlikely (p >= 5 %) if a run has one with 5 %."""
    return scipy.stats.binom.sf(count - 1, runs, 0.05) >= 0.05


# What is computed


def test_sign_flips_are_every_pattern_where_clusters_are_few():
    sums = np.random.default_rng(0).normal(loc=0.5, size=(6, 3))
    signs = np.array(list(itertools.product([1, -1], repeat=6)))
    expected = (np.abs(signs @ sums) >= np.abs(sums.sum(axis=0)) - 1e-12).mean(axis=0)
    assert sign_flip_p(sums, trials=32, seed=0) == pytest.approx(expected)
    assert sign_flip_p(sums, trials=31, seed=0) != pytest.approx(expected)  # one too few: drawn at random


def test_sign_flips_of_all_positive_sums_have_the_least_p():
    assert sign_flip_p(np.ones((10, 1)), trials=512, seed=0) == pytest.approx([2 / 2**10])
    drawn = sign_flip_p(np.full((40, 1), 0.1), trials=999, seed=0)
    assert drawn == pytest.approx([1 / 1000])


def test_one_column_agrees_with_the_t_test_on_symmetric_values():
    values = np.random.default_rng(3).normal(loc=0.2, size=(80, 1))
    result = effects(values, range(80), seed=0)
    expected = scipy.stats.ttest_1samp(values[:, 0], 0)
    low, high = expected.confidence_interval(0.95)
    assert result.mean[0] == pytest.approx(values.mean())
    assert expected.pvalue * 0.8 < result.p[0] < expected.pvalue * 3  # half as many clusters a resample: cautious
    assert (result.low[0], result.high[0]) == pytest.approx((low, high), abs=0.04)


def test_copies_of_an_example_in_one_cluster_add_nothing():
    values = np.random.default_rng(0).normal(loc=0.3, size=(20, 4))
    once = effects(values, range(20), seed=0)
    copied = effects(np.repeat(values, 5, axis=0), np.repeat(np.arange(20), 5), seed=0)
    for name in ("mean", "low", "high", "p", "q"):
        assert getattr(copied, name) == pytest.approx(getattr(once, name)), name
    assert (copied.n, copied.clusters) == (100, 20)
    as_if_independent = effects(np.repeat(values, 5, axis=0), range(100), seed=0)
    assert (as_if_independent.p < once.p).all()


def test_clusters_of_unequal_size_weigh_by_their_examples():
    values = np.concatenate([np.full(50, 1.0), np.linspace(-1, 1, 12)])
    result = effects(values, [0] * 50 + list(range(1, 13)), seed=0)
    assert result.mean == pytest.approx(50 / 62)
    assert result.mean.shape == ()


def test_columns_keep_their_shape_and_do_not_see_each_other():
    values = np.random.default_rng(0).normal(size=(30, 2, 4))
    whole, one = effects(values, range(30), seed=0), effects(values[:, 1, 3], range(30), seed=0)
    assert whole.mean.shape == whole.q.shape == whole.found.shape == (2, 4)
    assert (whole.p[1, 3], whole.low[1, 3]) == pytest.approx((float(one.p), float(one.low)))


def test_q_is_corrected_for_all_columns():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40, 50))
    result = effects(values, range(40), seed=0)
    order = result.p.argsort()
    steps = result.p[order] * 50 / np.arange(1, 51)  # Benjamini and Hochberg: the least of this and all later ranks
    assert result.q[order] == pytest.approx(np.minimum.accumulate(steps[::-1])[::-1].clip(max=1))


def test_interval_covers_the_mean_of_skewed_clusters():
    rng, covered = np.random.default_rng(0), 0.0
    for seed in range(15):
        values, clusters = clustered(rng, 20, 40)
        result = effects(values, clusters, seed=seed)
        covered += ((result.low <= 0) & (result.high >= 0)).mean() / 15
    assert 0.93 <= covered <= 0.99


def test_constant_columns():
    result = effects(np.column_stack([np.zeros(12), np.full(12, 0.3)]), range(12), seed=0)
    assert result.p == pytest.approx([1, 2 / 2**12])
    assert np.isnan(result.low).all()
    assert np.isnan(result.high).all()
    assert result.found.tolist() == [False, True]


def test_difference_is_that_of_the_paired_examples():
    rng = np.random.default_rng(0)
    hard = rng.normal(scale=10, size=(40, 1))  # how hard an example is, for both models
    a, b = hard + rng.normal(size=(40, 3)), hard + rng.normal(size=(40, 3)) + [0, 0, 3]
    assert difference(a, b, range(40), seed=0).found[2]
    assert not effects(b, range(40), seed=0).found[2]
    assert difference(a, b, range(40), seed=0).mean == pytest.approx((b - a).mean(axis=0))
    assert not difference(a, a, range(40), seed=0).found.any()


# What is found


def test_nothing_is_found_in_skewed_clusters_where_sign_flips_alone_would_find_something():
    runs, rng, found, found_by_flips = 100, np.random.default_rng(0), 0, 0
    for seed in range(runs):
        values, clusters = clustered(rng, 20, 96)
        found += effects(values, clusters, seed=seed).found.any()
        p = sign_flip_p(values.reshape(20, 2, -1).sum(axis=1), trials=10_000, seed=seed)
        found_by_flips += (scipy.stats.false_discovery_control(p) <= 0.05).any()
    print(f"runs with a finding: {found} of {runs}; by sign flips alone {found_by_flips}")
    assert found <= 0.05 * runs
    assert not no_more_than_chance(found_by_flips, runs)


def test_planted_effects_are_found_and_few_others():
    rng = np.random.default_rng(0)
    right = wrong = 0
    for seed in range(6):
        values, clusters = clustered(rng, 40, 128)
        values[:, :12] += 1.2  # about one standard deviation of a cluster's mean
        found = effects(values, clusters, seed=seed).found
        right, wrong = right + found[:12].sum(), wrong + found[12:].sum()
    assert right >= 0.9 * 72
    assert wrong <= 0.1 * (right + wrong)


def test_floor_holds_back_what_random_models_give():
    values = np.random.default_rng(0).normal(loc=[0.5, 2.0], scale=0.3, size=(40, 2))
    assert effects(values, range(40), seed=0).found.tolist() == [True, True]
    floor = random_floor([np.full((5, 3), -0.2), np.full((5, 3), -1.0) + [0, 0.1, 0.4]])
    assert floor == 1.0
    assert effects(values, range(40), seed=0, floor=floor).found.tolist() == [False, True]
    assert effects(values, range(40), seed=0, floor=[0.1, 5.0]).found.tolist() == [True, False]


def test_nine_clusters_find_nothing_and_say_so():
    result = effects(np.full((90, 2), 3.0), np.arange(90) % 9, seed=0)
    assert not result.found.any()
    assert result.q is None
    assert result.note == "9 clusters: too few to find anything, 10 are needed"
    assert effects(np.full((90, 2), 3.0), np.arange(90) % 10, seed=0).note == ""


def test_halves_share_no_cluster_and_hold_every_row():
    clusters = [f"lexeme {index % 7}" for index in range(40)]
    one, other = halves(clusters, seed=0)
    assert sorted([*one, *other]) == list(range(40))
    assert not {clusters[row] for row in one} & {clusters[row] for row in other}
    assert len({clusters[row] for row in one}) == 3
    assert one.tolist() == halves(clusters, seed=0)[0].tolist() != halves(clusters, seed=1)[0].tolist()


def test_best_of_many_columns_shrinks_on_the_other_half():
    values, clusters = clustered(np.random.default_rng(0), 40, 256)
    one, other = halves(clusters, seed=0)
    best = np.abs(values[one].mean(axis=0)).argsort()[-8:]
    chosen, reported = np.abs(values[one].mean(axis=0)[best]).mean(), np.abs(values[other].mean(axis=0)[best]).mean()
    assert reported < 0.5 * chosen
    assert not effects(values[other][:, best], clusters[other], seed=0).found.any()


@pytest.mark.parametrize(
    ("values", "clusters", "floor", "message"),
    [
        (np.zeros((3, 2)), [0, 1], 0, "2 labels for 3 examples"),
        (np.array([[1.0, np.nan], [np.inf, 0], [0, 0]]), [0, 1, 2], 0, "2 of 3 examples are not finite"),
        (np.zeros((0, 2)), [], 0, "at least one example"),
        (np.zeros((3, 2)), [0, 1, 2], [1, 2, 3], "does not fit"),
    ],
)
def test_what_does_not_fit_is_refused(values, clusters, floor, message):
    with pytest.raises(StoneyError, match=message):
        effects(values, clusters, seed=0, floor=floor)


def test_halves_and_floor_need_something_to_work_on():
    with pytest.raises(StoneyError, match="1 cluster"):
        halves(["a", "a"], seed=0)
    with pytest.raises(StoneyError, match="at least one model"):
        random_floor([])
    with pytest.raises(StoneyError, match="same examples"):
        difference(np.zeros((2, 3)), np.zeros((3, 3)), [0, 1, 2], seed=0)


# A model with random weights has learnt nothing

PAIRS, MODELS = 24, 20


def head_effects(model, pairs) -> np.ndarray:
    """Change of the logit difference when one head's clean output is put into the corrupt prompt, [pair, layer, head]."""
    import torch

    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.n_layers)]
    clean = model.run(pairs.clean, read=names)
    before = pairs.difference(model.run(pairs.corrupt).logits)

    def patched(name, head):
        here = (torch.arange(model.n_heads) == head)[:, None]
        after = model.run(pairs.corrupt, edit={name: lambda z: torch.where(here, clean[name], z)})
        return pairs.difference(after.logits) - before

    found = [torch.stack([patched(name, head) for head in range(model.n_heads)], dim=-1) for name in names]
    return torch.stack(found, dim=1).numpy()


def random_pairs(seed: int, alike: bool = False):
    """Pairs of random prompts with random answers; ``alike``: all ask for one answer and differ at one token."""
    import torch

    from stoney_rl.interp.hooked import Batch
    from stoney_rl.interp.pairs import PairBatch

    rng = torch.Generator().manual_seed(seed)
    clean, corrupt = torch.randint(3, 259, (2, PAIRS, 6), generator=rng)
    answers = torch.randint(3, 259, (2, PAIRS), generator=rng)
    if alike:
        corrupt = torch.cat([clean[:, :-1], corrupt[:1, -1:].expand(PAIRS, 1)], dim=1)
        clean[:, -1], answers = clean[0, -1], answers[:, :1].expand(2, PAIRS)
    return PairBatch(Batch(clean, torch.ones_like(clean)), Batch(corrupt, torch.ones_like(clean)), *answers)


@pytest.fixture(scope="session")
def random_models():
    from stoney_rl.interp.hooked import hook_model

    return [hook_model(tiny.model(seed=seed), tiny.tokenizer()) for seed in range(MODELS)]


def test_random_models_give_findings_in_at_most_one_test_of_twenty(random_models):
    found = [
        effects(head_effects(model, random_pairs(seed)), range(PAIRS), seed=seed).found
        for seed, model in enumerate(random_models)
    ]
    assert np.stack(found).mean() <= 0.05  # of 160 tests
    assert no_more_than_chance(sum(one.any() for one in found), MODELS)


def test_random_models_have_effects_of_their_own_on_pairs_that_are_alike_and_the_floor_holds_them_back(random_models):
    values = [head_effects(model, random_pairs(seed, alike=True)) for seed, model in enumerate(random_models)]
    bare = [effects(one, range(PAIRS), seed=0).found for one in values]
    assert (
        np.mean([one.any() for one in bare]) > 0.5
    )  # true effects of chance weights: no test can tell them from learning
    floors = [random_floor(values[:index] + values[index + 1 :]) for index in range(MODELS)]
    found = [effects(one, range(PAIRS), seed=0, floor=floor).found for one, floor in zip(values, floors, strict=True)]
    assert np.stack(found).mean() <= 0.05
    assert np.mean([one.any() for one in found]) <= 0.05
