"""Neurons: their attribution sums to the MLP's, their examples are the corpus's highest, the telling ones are found."""

import numpy as np
import pytest
import sklearn.metrics
import tiny
import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp import neurons as module
from stoney_rl.interp.hooked import Batch, HookedModel, hook_model, left_padded
from stoney_rl.interp.neurons import (
    attribution_of,
    auroc,
    auroc_components,
    choose_by_attribution,
    neuron_records,
    neuron_values,
    separating_neurons,
)  # fmt: skip
from stoney_rl.interp.pairs import PairBatch

ADDITIVE = [name for name in tiny.ARCHITECTURES if name not in ("gemma2", "gemma3")]
ROWS = [[5, 6, 7], [100, 101, 102, 103, 104, 105], [9], [50, 60, 70, 80]]


def hooked(architecture: str = "llama", seed: int = 0) -> HookedModel:
    """With norm weights that are not 1, so that forgetting them shows."""
    model = tiny.model(architecture, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight = model.model.norm.weight
        weight += 0.5 * torch.randn(weight.shape, generator=generator)
    return hook_model(model, tiny.tokenizer())


@pytest.fixture(scope="module")
def llama():
    return hooked()


@pytest.fixture(scope="module")
def pairs():
    clean = left_padded(ROWS, 0)
    return PairBatch(clean, clean, torch.tensor([20, 30, 40, 50]), torch.tensor([21, 31, 41, 51]))


def everyone(model, layer):
    return [(layer, index) for index in range(model.d_mlp)]


# Attribution


@pytest.mark.parametrize("architecture", ADDITIVE)
def test_neurons_sum_to_what_their_mlp_does_for_the_answer(architecture, pairs):
    """Oracle: the logit difference less what it is when the last MLP's output is taken out behind the final norm's scale."""
    model = hooked(architecture)
    hooks = ["blocks.1.hook_mlp_out", "blocks.1.hook_resid_post", "ln_final.hook_scale"]
    run = model.run(pairs.clean, read=hooks)
    written, residual, scale = (run[name] for name in hooks)
    whole = ((residual / scale * model.final_norm_weight) @ model.W_U)[:, -1]
    without = (((residual - written) / scale * model.final_norm_weight) @ model.W_U)[:, -1]
    rows = torch.arange(4)
    effect = whole - without
    expected = effect[rows, pairs.answer] - effect[rows, pairs.wrong]
    found = attribution_of(model, pairs, everyone(model, 1)).sum(dim=1)
    assert found.shape == (4,)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_neurons_attribution_is_what_its_removal_costs_behind_a_fixed_scale(llama, pairs):
    """One neuron of the last layer set to zero: the change of the logit difference, times the ratio of the norm's scales."""
    layer, index = 1, 17
    scale = llama.run(pairs.clean, read=["ln_final.hook_scale"])
    keep = (torch.arange(llama.d_mlp) != index).float()
    cut = llama.run(
        pairs.clean, read=["ln_final.hook_scale"], edit={f"blocks.{layer}.mlp.hook_post": lambda post: post * keep}
    )
    ratio = cut["ln_final.hook_scale"][:, -1, 0] / scale["ln_final.hook_scale"][:, -1, 0]
    expected = pairs.difference(scale.logits) - pairs.difference(cut.logits) * ratio
    found = attribution_of(llama, pairs, [(layer, index)])[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_padding_changes_no_rows_attribution_or_value(llama, pairs):
    chosen = [(1, 3), (0, 7), (1, 60)]
    together = attribution_of(llama, pairs, chosen)
    for row, ids in enumerate(ROWS):
        batch = left_padded([ids], 0)
        alone = PairBatch(batch, batch, pairs.answer[row : row + 1], pairs.wrong[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], attribution_of(llama, alone, chosen), rtol=0, atol=1e-5)
    alone = [neuron_values(llama, [left_padded([ids], 0)], chosen) for ids in ROWS]
    np.testing.assert_allclose(neuron_values(llama, [pairs.clean], chosen), np.concatenate(alone), atol=1e-5)


def test_chosen_neurons_are_those_of_largest_mean_attribution(llama, pairs):
    whole = torch.cat([attribution_of(llama, pairs, everyone(llama, layer)) for layer in (0, 1)], dim=1)
    order = whole.mean(dim=0).abs().argsort(descending=True)[:5].tolist()
    expected = [(place // llama.d_mlp, place % llama.d_mlp) for place in order]
    halves = [_rows(pairs, slice(0, 1)), _rows(pairs, slice(1, 4))]
    assert choose_by_attribution(llama, halves, 5) == expected
    assert {layer for layer, _ in choose_by_attribution(llama, [pairs], 5, layers=[1])} == {1}


def _rows(pairs, rows):
    batch = Batch(pairs.clean.ids[rows], pairs.clean.mask[rows])
    return PairBatch(batch, batch, pairs.answer[rows], pairs.wrong[rows])


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_attribution_is_refused_behind_a_norm_but_values_are_not(architecture, pairs):
    model = hook_model(tiny.model(architecture), tiny.tokenizer())
    with pytest.raises(StoneyError, match="don't add up"):
        attribution_of(model, pairs, [(0, 0)])
    assert neuron_values(model, [pairs.clean], [(0, 0), (1, 5)]).shape == (4, 2)


# Examples


def test_records_are_the_corpus_extremes_and_means(llama):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 259, (4 + n % 5,), generator=generator).tolist() for n in range(12)]
    batches = [left_padded(rows[start : start + 5], 0) for start in (0, 5, 10)]
    chosen = [(1, 3), (0, 7)]
    records = neuron_records(llama, batches, chosen, k=4, seed=0, window=2)
    for record, (layer, index) in zip(records, chosen, strict=True):
        name = f"blocks.{layer}.mlp.hook_post"
        values = [llama.run(left_padded([row], 0), read=[name])[name][0, :, index] for row in rows]
        flat = torch.cat(values)
        assert record.positions == len(flat)
        assert record.mean == pytest.approx(float(flat.mean()), abs=1e-6)
        assert record.positive == pytest.approx(float((flat > 0).float().mean()))
        expected = sorted(((float(row.max()), n) for n, row in enumerate(values)), reverse=True)[:4]
        assert [(pytest.approx(example.value, abs=1e-5), example.example) for example in record.top] == expected
        lowest = sorted((float(row.min()), n) for n, row in enumerate(values))[:4]
        assert [(pytest.approx(example.value, abs=1e-5), example.example) for example in record.bottom] == lowest
        for example in [*record.top, *record.bottom, *record.random]:
            row = rows[example.example]
            assert example.value == pytest.approx(float(values[example.example][example.position]), abs=1e-5)
            assert example.tokens[example.offset] == row[example.position]
            around = slice(max(0, example.position - 2), example.position + 3)
            assert list(example.tokens) == row[around]
            assert example.values == pytest.approx(values[example.example][around].tolist(), abs=1e-5)


def test_random_examples_are_drawn_evenly_from_positions_and_never_from_padding(llama):
    rows = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21]]
    drawn = [neuron_records(llama, [left_padded(rows, 0)], [(0, 0)], k=1, seed=seed)[0].random[0] for seed in range(64)]
    share = np.mean([example.example == 0 for example in drawn])
    assert share == pytest.approx(0.8, abs=0.15)  # 8 of 10 positions; 3 standard errors
    assert {example.position for example in drawn if example.example == 1} == {0, 1}


# Two groups of texts


def test_auroc_is_scikit_learns_and_its_components_have_its_mean():
    rng = np.random.default_rng(0)
    values, labels = rng.normal(size=(60, 5)).round(1), np.array([0, 1, 1] * 20)
    values[labels == 1, 2] += 0.7
    expected = [sklearn.metrics.roc_auc_score(labels, values[:, column]) for column in range(5)]
    assert auroc(values, labels) == pytest.approx(expected)
    components = auroc_components(values, labels)
    assert components.shape == (60, 5)
    assert components.mean(axis=0) + 0.5 == pytest.approx(expected)


def test_auroc_components_have_its_variance():
    """300 draws of AUROC scatter as the standard error of the components' mean says."""
    rng, labels = np.random.default_rng(0), np.array([0] * 60 + [1] * 20)
    draws = rng.normal(size=(300, 80)) * np.where(labels == 1, 2, 1) + labels
    components = auroc_components(draws.T, labels)
    said = np.sqrt((components.var(axis=0, ddof=1) / 80).mean())
    assert (auroc(draws.T, labels)).std() == pytest.approx(said, rel=0.15)


def test_neurons_that_tell_planted_groups_apart_are_found_on_the_other_half(llama, monkeypatch):
    """The groups: above and below the median of neuron (1, 11) on 80 random rows; no other neuron knows them as well."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 259, (80, 4), generator=generator).tolist()
    batches = [left_padded(rows[start : start + 32], 0) for start in (0, 32, 64)]
    values = neuron_values(llama, batches, [(1, 11)])[:, 0]
    labels = (values > np.median(values)).astype(int)
    found = separating_neurons(llama, batches, labels, range(80), count=3, seed=0)
    assert found.neurons[0] == (1, 11)
    assert found.chosen[0] == 1.0
    assert found.reported.mean[0] == pytest.approx(0.5)
    assert found.reported.found[0]
    assert found.reported.clusters == 40
    monkeypatch.setattr(module, "_CELLS", 1)  # one layer at a time
    again = separating_neurons(llama, batches, labels, range(80), count=3, seed=0)
    assert again.neurons == found.neurons


def test_random_groups_have_telling_neurons_only_on_the_half_they_were_chosen_on(llama):
    generator = torch.Generator().manual_seed(0)
    batch = left_padded(torch.randint(3, 259, (80, 4), generator=generator).tolist(), 0)
    found = separating_neurons(llama, [batch], [0, 1] * 40, range(80), count=5, seed=0)
    assert (np.abs(found.chosen - 0.5) > 0.19).all()
    assert np.abs(found.reported.mean).mean() < 0.15
    assert not found.reported.found.any()


# What is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, pairs: attribution_of(model, pairs, [(2, 0)]), "no neuron 0 in layer 2; layers go from 0 to 1"),
        (lambda model, pairs: neuron_values(model, [pairs.clean], [(0, 64)]), "neurons from 0 to 63"),
        (lambda model, pairs: neuron_values(model, [pairs.clean], []), "none given"),
        (lambda model, pairs: neuron_records(model, [], [(0, 0)], k=1, seed=0), "no rows"),
        (lambda model, pairs: separating_neurons(model, [pairs.clean], [0, 1], "ab", count=1, seed=0), "2 for 4 rows"),
        (lambda model, pairs: separating_neurons(model, [pairs.clean], [1] * 4, "abcd", count=1, seed=0), "0 and 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(llama, pairs, call, message):
    with pytest.raises(StoneyError, match=message):
        call(llama, pairs)
