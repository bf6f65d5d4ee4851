"""Parts moved between checkpoints: exactly those, put back bit for bit; a planted change is located and recovered."""

import copy

import numpy as np
import pytest
import tiny
import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp.closure import (
    REST,
    answer_log_probability,
    closure,
    moved,
    pair_difference,
    parts_of,
    weight_attribution,
)
from stoney_rl.interp.pairs import PromptPair
from stoney_rl.interp.significance import halves

ROWS = [[30, 31, 32, 33, 34], [40, 41, 42], [50, 51, 52, 53, 54, 55]]


def disturbed(model, scale, seed=1):
    """A copy with noise in every weight, ``scale`` times as large as the weight."""
    later, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in later.parameters():
            weight += scale * weight.std().nan_to_num(1) * torch.randn(weight.shape, generator=generator)
            weight += scale * 0.1 * torch.randn(weight.shape, generator=generator)  # biases start at 0
    return later


def logits(model):
    with torch.no_grad():
        return [model(torch.tensor([row])).logits for row in ROWS]


def same(one, other):
    return all(map(torch.equal, one, other))


def examples(n, seed=0, prompt=6, answer=3):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for place in range(n):
        ids = torch.randint(3, 259, (prompt + place % 3 + answer,), generator=generator).tolist()
        rows.append((ids, [-100] * (len(ids) - answer) + ids[-answer:]))
    return rows


# Parts


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_weight_is_in_one_part(architecture):
    model = tiny.model(architecture)
    found = parts_of(model)
    assert list(found) == [("attention", 0), ("mlp", 0), ("attention", 1), ("mlp", 1), REST]
    names = [name for part in found.values() for name in part]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(f".{layer}." in name for (_, layer), part in found.items() if layer is not None for name in part)
    assert all(".mlp." in name for layer in (0, 1) for name in found["mlp", layer])
    assert all(".self_attn." in name for layer in (0, 1) for name in found["attention", layer])


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_moving_none_all_and_back_is_exact(architecture):
    """Grouped queries, biases (Qwen2), fused projections (Phi-3), norms on heads (Qwen3), tied embeddings (Gemma)."""
    earlier = tiny.model(architecture)
    later = disturbed(earlier, 0.5)
    before, target = logits(earlier), logits(later)
    weights, places = copy.deepcopy(earlier.state_dict()), [p.data_ptr() for p in earlier.parameters()]
    assert max(float((a - b).abs().max()) for a, b in zip(before, target, strict=True)) > 0.01
    with moved(earlier, later, []) as model:
        assert model is earlier and same(logits(model), before)
    with moved(earlier, later, parts_of(earlier)):
        assert same(logits(earlier), target)
    with pytest.raises(KeyboardInterrupt), moved(earlier, later, [("mlp", 0), REST]):
        assert not same(logits(earlier), before)
        raise KeyboardInterrupt
    assert [p.data_ptr() for p in earlier.parameters()] == places
    assert all(torch.equal(weight, weights[name]) for name, weight in earlier.state_dict().items())
    assert same(logits(earlier), before) and same(logits(later), target)


def test_tied_embeddings_move_together_and_stay_tied():
    earlier = tiny.model("gemma")
    later = disturbed(earlier, 0.5)
    assert "lm_head.weight" not in parts_of(earlier)[REST]
    with moved(earlier, later, [REST]):
        for model_weight in (earlier.lm_head.weight, earlier.model.embed_tokens.weight):
            assert torch.equal(model_weight, later.lm_head.weight)
    assert earlier.lm_head.weight is earlier.model.embed_tokens.weight


def test_exactly_the_named_parts_are_moved():
    earlier = tiny.model()
    later = disturbed(earlier, 0.5)
    chosen = [("mlp", 1), ("attention", 0)]
    with moved(earlier, later, chosen):
        for part, names in parts_of(earlier).items():
            for name in names:
                source = later if part in chosen else tiny.model()
                assert torch.equal(earlier.get_parameter(name), source.get_parameter(name)), name


def test_moves_can_be_nested():
    earlier, later = tiny.model(), disturbed(tiny.model(), 0.5)
    before = logits(earlier)
    with moved(earlier, later, [("mlp", 0)]):
        inner = logits(earlier)
        with moved(earlier, disturbed(tiny.model(), 1.0, seed=5), [("mlp", 0), REST]):
            pass
        assert same(logits(earlier), inner)
    assert same(logits(earlier), before)


# Behaviours


@pytest.mark.parametrize("architecture", ["llama", "phi3", "mistral", "gemma2"])
def test_log_probabilities_are_the_models_own_row_by_row(architecture):
    model, rows = disturbed(tiny.model(architecture), 3.0), examples(7)
    expected = []
    for ids, labels in rows:
        with torch.no_grad():
            found = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected.append(sum(float(found[at - 1, ids[at]]) for at in range(len(ids)) if labels[at] != -100) / 3)
    behaviour = answer_log_probability(rows, 0, batch_size=3)
    with torch.no_grad():
        torch.testing.assert_close(behaviour(model, range(7)), torch.tensor(expected), atol=1e-5, rtol=1e-5)
        some = behaviour(model, [5, 0, 5])
    torch.testing.assert_close(some, torch.tensor([expected[5], expected[0], expected[5]]), atol=1e-5, rtol=1e-5)


def test_answers_of_different_lengths_and_units_of_their_own():
    model = disturbed(tiny.model(), 3.0)
    rows = [*examples(2, answer=1), *examples(2, answer=5)]
    with torch.no_grad():
        a_token = answer_log_probability(rows, 0)(model, range(4))
        a_byte = answer_log_probability(rows, 0, lengths=[2, 4, 10, 20])(model, range(4))
    torch.testing.assert_close(a_token * torch.tensor([1 / 2, 1 / 4, 5 / 10, 5 / 20]), a_byte)


def test_pairs_are_scored_behind_the_clean_prompt():
    model = disturbed(tiny.model(), 3.0)
    pairs = [
        PromptPair((5, 6, 7)[: 2 + n % 2], (9, 6, 7)[: 2 + n % 2], 20 + n, 30, "c", "f", ("",) * 4) for n in range(5)
    ]
    with torch.no_grad():
        found = pair_difference(pairs, 0, batch_size=2)(model, [4, 1, 0])
        for value, pair in zip(found, [pairs[4], pairs[1], pairs[0]], strict=True):
            last = model(torch.tensor([pair.clean])).logits[0, -1]
            assert float(value) == pytest.approx(float(last[pair.answer] - last[30]), abs=1e-5)


@pytest.mark.parametrize(
    ("rows", "lengths", "message"),
    [
        ([([5, 6], [5, 6])], None, "example 0: expected a prompt"),
        ([([5, 6], [-100, 6]), ([5, 6], [-100, -100])], None, "example 1: expected a prompt"),
        ([([5, 6], [-100, 6])], [0], "lengths: 1 for 1 examples"),
        ([([5, 6], [-100, 6])], [1, 2], "lengths: 2 for 1 examples"),
    ],
)
def test_examples_without_prompt_or_answer_are_refused(rows, lengths, message):
    with pytest.raises(StoneyError, match=message):
        answer_log_probability(rows, 0, lengths=lengths)


# Attribution


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_attributions_add_up_to_the_gap(architecture):
    earlier = disturbed(tiny.model(architecture), 3.0, seed=2)
    later = disturbed(earlier, 0.03)
    found = weight_attribution(earlier, later, answer_log_probability(examples(8), 0), range(8))
    assert found.values.shape == (8, 5) and found.parts == tuple(parts_of(earlier))
    assert np.abs(found.values).sum(axis=0).min() > 0
    np.testing.assert_allclose(found.values.sum(axis=1), found.gap, atol=0.01 * np.abs(found.gap).max())


def test_an_example_has_its_own_values_and_a_group_their_mean():
    earlier = disturbed(tiny.model(), 3.0, seed=2)
    later = disturbed(earlier, 0.1)
    behaviour = answer_log_probability(examples(6), 0)
    each = weight_attribution(earlier, later, behaviour, range(6))
    alone = weight_attribution(earlier, later, behaviour, [4])
    np.testing.assert_allclose(each.values[4], alone.values[0], rtol=1e-3, atol=1e-6)
    together = weight_attribution(earlier, later, behaviour, range(6), rows_per_gradient=4)
    np.testing.assert_allclose(together.values[:4], each.values[:4].mean(0)[None].repeat(4, 0), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(together.values[4:], each.values[4:].mean(0)[None].repeat(2, 0), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(together.gap, each.gap)


def test_a_small_change_is_worth_what_moving_it_gives():
    """To first order, each part's value is the effect of moving it alone; in float64, as effects are small."""
    earlier = disturbed(tiny.model(), 3.0, seed=2).double()
    later = disturbed(earlier, 3e-4)
    behaviour = answer_log_probability(examples(4), 0)
    found = weight_attribution(earlier, later, behaviour, range(4))
    for place, part in enumerate(found.parts):
        with torch.no_grad():
            before = behaviour(earlier, range(4))
            with moved(earlier, later, [part]):
                effect = (behaviour(earlier, range(4)) - before).double()
        np.testing.assert_allclose(found.values[:, place], effect, atol=0.05 * float(effect.abs().max()))


def test_more_points_do_for_a_longer_path():
    """Noise of 10 % in weights that let attention choose is a long way: 12 points are exact there, one is not."""
    earlier = disturbed(tiny.model(), 3.0, seed=2)
    later, behaviour = disturbed(earlier, 0.1), answer_log_probability(examples(8), 0)
    one, twelve = (weight_attribution(earlier, later, behaviour, range(8), steps=steps) for steps in (1, 12))
    error = [np.abs(found.values.sum(1) - found.gap).max() / np.abs(found.gap).max() for found in (one, twelve)]
    assert error[0] > 0.1 and error[1] < 0.001


def test_attribution_leaves_the_model_as_it_was():
    earlier = tiny.model()
    later = disturbed(earlier, 0.5)
    earlier.lm_head.weight.requires_grad_(False)
    before = logits(earlier)
    asked = [p.requires_grad for p in earlier.parameters()]

    def broken(model, rows):
        if torch.is_grad_enabled():
            raise RuntimeError("inside")
        return torch.zeros(len(rows))

    weight_attribution(earlier, later, answer_log_probability(examples(2), 0), range(2))
    with pytest.raises(RuntimeError, match="inside"):
        weight_attribution(earlier, later, broken, range(2))
    assert same(logits(earlier), before) and [p.requires_grad for p in earlier.parameters()] == asked
    assert all(p.grad is None for p in earlier.parameters())


def test_behaviours_that_cannot_be_used_are_refused():
    earlier, later = tiny.model(), disturbed(tiny.model(), 0.5)
    with pytest.raises(StoneyError, match="gives no gradient"):
        weight_attribution(earlier, later, lambda model, rows: torch.zeros(len(rows)), range(2))
    with pytest.raises(StoneyError, match="as many finite numbers"):
        weight_attribution(earlier, later, lambda model, rows: torch.full((len(rows),), torch.nan), range(2))
    with pytest.raises(StoneyError, match=r"no part is called \('mlp', 2\)"), moved(earlier, later, [("mlp", 2)]):
        pass


# Closure


def with_adapter_in(earlier, layer, seed, rank=2):
    """``earlier`` with a LoRA adapter in the MLP of one layer, merged."""
    from peft import LoraConfig, get_peft_model

    targets = ["gate_up_proj", "down_proj"] if "phi3" in earlier.config.model_type else ["up_proj", "down_proj"]
    config = LoraConfig(r=rank, target_modules=targets, layers_to_transform=[layer], task_type="CAUSAL_LM")
    adapted = get_peft_model(copy.deepcopy(earlier), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return adapted.eval().merge_and_unload()


def preferred_by(model, n):
    """Prompts, each answered by the token that ``model`` finds likeliest: a behaviour that it is better at."""
    rows = []
    for ids, _ in examples(n, seed=9, answer=1):
        with torch.no_grad():
            best = int(model(torch.tensor([ids[:-1]])).logits[0, -1].argmax())
        rows.append(([*ids[:-1], best], [-100] * (len(ids) - 1) + [best]))
    return rows


def closed(earlier, later, rows, sizes=(1, 2, 5), clusters=None, **options):
    clusters = [place // 2 for place in range(len(rows))] if clusters is None else clusters
    one, other = halves(clusters, 0)
    options = {"draws": 4, "seed": 0} | options
    return closure(earlier, later, answer_log_probability(rows, 0), one, other, clusters, sizes=sizes, **options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_an_adapter_in_one_layer_is_located_and_is_the_whole_gap(architecture, seed):
    earlier, layer = tiny.model(architecture, seed=seed, layers=3), (seed + 1) % 3
    later = with_adapter_in(earlier, layer, seed)
    found = closed(earlier, later, preferred_by(later, 24), sizes=(1, 2, 7), reverse_draws=4, steps=12)
    assert found.ranking[0] == ("mlp", layer) and found.gap > 0
    assert found.attribution.completeness == pytest.approx(1, abs=0.01)
    first, *_, everything = found.points
    assert first.parts == (("mlp", layer),)
    for point in found.points:
        assert point.recovered.value == point.lost.value == 1
    assert set(first.random_recovered) <= {0, 1} and 0 in first.random_recovered
    np.testing.assert_array_equal(first.random_recovered, first.random_lost)
    assert first.beyond.value == pytest.approx(1 - first.random_recovered.mean())
    assert first.p == (1 + (first.random_recovered == 1).sum()) / 5
    assert everything.p is None and everything.beyond is None
    np.testing.assert_array_equal(everything.moved, found.later)
    np.testing.assert_array_equal(everything.removed, found.earlier)
    others = [part for part in parts_of(earlier) if part != ("mlp", layer)]
    with torch.no_grad(), moved(earlier, later, others):
        assert same(logits(earlier), logits(tiny.model(architecture, seed=seed, layers=3)))


def test_random_sets_have_as_many_attentions_and_mlps():
    from stoney_rl.interp.closure import _random_set, _sets_like

    parts = list(parts_of(tiny.model(layers=4)))
    like = [("mlp", 0), ("mlp", 1), ("attention", 2), REST]
    drawn = [_random_set(parts, like, np.random.default_rng(seed)) for seed in range(200)]
    assert all(sorted(kind for kind, _ in one) == ["attention", "mlp", "mlp", "rest"] for one in drawn)
    assert all(len(set(one)) == 4 for one in drawn)
    assert len({frozenset(one) for one in drawn}) == _sets_like(parts, like) == 4 * 6 * 1


def test_shares_are_of_sums_and_intervals_by_cluster():
    """Both parts matter here, so that shares are neither 0 nor 1."""
    earlier = tiny.model(seed=1)
    later = with_adapter_in(with_adapter_in(earlier, 0, 1), 1, 2)
    found = closed(earlier, later, preferred_by(later, 40))
    point = found.points[0]
    assert found.gap == pytest.approx((found.later - found.earlier).mean())
    share = (point.moved - found.earlier).sum() / (found.later - found.earlier).sum()
    assert point.recovered.value == pytest.approx(share)
    assert point.recovered.units == 10 and point.recovered.low < share < point.recovered.high
    assert point.lost.value == pytest.approx((found.later - point.removed).sum() / (found.later - found.earlier).sum())
    assert point.random_moved.shape == (4, 20) and point.random_removed.shape == (0, 20)
    assert found.points[1].recovered.value == pytest.approx(1, abs=0.2)
    again = closed(earlier, later, preferred_by(later, 40))
    np.testing.assert_array_equal(point.random_moved, again.points[0].random_moved)


def test_what_training_made_worse_is_recovered_too():
    earlier = tiny.model(seed=1)
    later = with_adapter_in(earlier, 1, 2)
    found = closed(later, earlier, preferred_by(later, 24), sizes=(1,))
    assert found.gap < 0 and found.ranking[0] == ("mlp", 1) and found.points[0].recovered.value == 1


def test_identical_checkpoints_have_no_gap_at_all():
    model, rows = tiny.model(), examples(12)
    found = closed(model, copy.deepcopy(model), rows)
    assert found.gap is None and found.points == () and "differs by 0 on average" in found.note
    assert not (found.later - found.earlier).any()
    assert not found.attribution.values.any() and not found.attribution.gap.any()
    assert found.attribution.completeness is None


def test_a_gap_that_is_no_more_than_scatter_is_none():
    """Every other example gains what its neighbour loses: over clusters of one, no gap; all of one sign, a gap."""
    earlier = tiny.model(seed=1)
    later = with_adapter_in(earlier, 1, 2)
    rows = preferred_by(later, 24)

    def alternating(model, numbers):
        values = answer_log_probability(rows, 0)(model, numbers)
        return values * torch.tensor([1.0 if number % 2 else -1.0 for number in numbers])

    options = {"sizes": (1,), "draws": 1, "seed": 0}
    found = closure(earlier, later, alternating, range(12), range(12, 24), list(range(24)), **options)
    assert found.gap is None and "not beyond twice the standard error" in found.note and found.points == ()


def test_a_gap_of_few_clusters_is_judged_by_clusters():
    """12 examples in 2 clusters that go apart: no gap, though 12 independent ones would show one."""
    from stoney_rl.interp.closure import _gap

    later = np.array([1.0] * 9 + [-0.2] * 3)
    assert _gap(np.zeros(12), later, list(range(12))) == pytest.approx(0.7)
    assert _gap(np.zeros(12), later, [0] * 9 + [1] * 3) is None
    assert _gap(later, np.zeros(12), list(range(12))) == pytest.approx(-0.7)


def test_what_cannot_be_closed_is_refused():
    earlier, rows = tiny.model(), examples(12)
    later = disturbed(earlier, 0.5)
    with pytest.raises(StoneyError, match="size 6, expected from 1 to 5"):
        closed(earlier, later, rows, sizes=(6,))
    behaviour = answer_log_probability(rows, 0)
    with pytest.raises(StoneyError, match="1 clusters are in both halves, such as 'a'"):
        closure(earlier, later, behaviour, [0, 1], [2, 3], "abac", sizes=(1,), draws=1, seed=0)
    other = tiny.model().config
    other.rope_parameters = {"rope_type": "default", "rope_theta": 3.0}
    rotated = type(earlier)(other).eval()
    rotated.load_state_dict(later.state_dict())
    with pytest.raises(StoneyError, match=r"gives logits that differ by .*config\.json"):
        closed(disturbed(earlier, 3.0), disturbed(rotated, 3.0), rows)
