"""What training changed in weights, representations and units: planted changes are found, no change is exactly 0."""

import copy
import math

import numpy as np
import pytest
import tiny
import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp.changes import (
    TOP,
    MeanDifference,
    decode,
    grouped,
    mean_difference,
    representation_changes,
    top_shared,
    unit_changes,
    weight_changes,
)
from stoney_rl.interp.hooked import hook_model, left_padded

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def edited(model, **changes):
    """A copy with ``changes`` (name, '__' for '.' -> tensor) added to its weights."""
    later = copy.deepcopy(model)
    with torch.no_grad():
        for name, change in changes.items():
            later.get_parameter(name.replace("__", ".")).add_(change)
    return later


def with_singular_values(shape, values, seed=0):
    """A matrix of this shape with exactly these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(side, len(values), generator=generator, dtype=torch.float64))[0] for side in shape
    )
    return (left * torch.tensor(values, dtype=torch.float64)) @ right.T


def by_name(changes):
    return {one.name: one for one in changes}


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 259, (4 + n % 5,), generator=generator).tolist() for n in range(24)]
    return rows, [left_padded(rows[start : start + 8], 0) for start in (0, 8, 16)]


# Weights


def test_a_known_change_has_its_norms_and_ranks():
    """Singular values 3 and 1: ||.||_F^2 = 10, stable rank 10 / 9, entropy of (3/4, 1/4) = 0.562335, exp 1.754765."""
    base = tiny.model()
    later = edited(base, **{Q_PROJ.replace(".", "__"): with_singular_values((32, 32), [3.0, 1.0])})
    found = by_name(weight_changes(base, later))
    one = found.pop(Q_PROJ)
    assert (one.layer, one.module, one.part, one.shape, one.rank) == (1, "q_proj", ("attention", 1), (32, 32), 2)
    assert one.change == pytest.approx(math.sqrt(10), rel=1e-5)
    assert one.relative == pytest.approx(math.sqrt(10) / float(base.get_parameter(Q_PROJ).norm()), rel=1e-5)
    assert one.spectral == pytest.approx(3, rel=1e-5)
    assert one.stable_rank == pytest.approx(10 / 9, rel=1e-5)
    assert one.effective_rank == pytest.approx(1.754765, rel=1e-5)
    np.testing.assert_allclose(one.singular_values, [3, 1, *[0] * 30], atol=1e-5)
    assert all(other.change == 0 for other in found.values())


def test_vectors_are_matrices_of_one_row():
    base = tiny.model("qwen2")
    bias = torch.arange(32.0)
    later = edited(base, model__layers__0__self_attn__q_proj__bias=bias, model__norm__weight=torch.full((32,), 0.5))
    found = by_name(weight_changes(base, later))
    one, norm = found["model.layers.0.self_attn.q_proj.bias"], found["model.norm.weight"]
    assert (one.module, one.rank, one.effective_rank) == ("q_proj.bias", 1, 1) and len(one.singular_values) == 1
    assert one.change == one.spectral == pytest.approx(float(bias.norm()))
    assert one.relative is None  # it was 0 before
    assert (norm.module, norm.part, norm.layer, norm.relative) == ("norm", ("rest", None), None, pytest.approx(0.5))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_identical_checkpoints_have_changed_in_nothing(architecture):
    model = tiny.model(architecture)
    found = weight_changes(model, copy.deepcopy(model))
    assert len(found) == len(list(model.parameters()))  # tied embeddings once
    for one in found:
        assert (one.change, one.relative, one.spectral, one.rank) == (0, 0, 0, 0), one.name
        assert one.stable_rank is None and one.effective_rank is None and not one.singular_values.any()
    for by in ("module", "layer", "part"):
        for group in grouped(found, by).values():
            assert (group.changed, group.relative, group.share, group.effective_rank) == (0, 0, 0, None)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_an_adapter_shows_its_rank_there_and_nowhere_else(architecture, seed):
    from peft import LoraConfig, get_peft_model

    targets = ["gate_up_proj"] if architecture == "phi3" else ["up_proj"]
    base, rank, layer = tiny.model(architecture, seed=seed), seed + 1, seed % 2
    config = LoraConfig(r=rank, target_modules=targets, layers_to_transform=[layer], task_type="CAUSAL_LM")
    adapted = get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    with pytest.raises(StoneyError, match="the later model has an adapter that is not merged"):
        weight_changes(base, adapted.eval())
    found = weight_changes(base, adapted.merge_and_unload())
    (there,) = [one for one in found if one.change]
    assert (there.part, there.module, there.rank) == (("mlp", layer), targets[0], rank)
    assert (there.singular_values > there.rounding).sum() == rank
    by_part = grouped(found, "part")
    assert by_part["mlp", layer].share == 1 and by_part["mlp", layer].changed == 1
    assert sum(group.changed for group in by_part.values()) == 1


def test_groups_add_up():
    base, noise = tiny.model(), torch.Generator().manual_seed(0)
    later = edited(
        base,
        **{
            name.replace(".", "__"): 0.01 * torch.randn(weight.shape, generator=noise)
            for name, weight in base.named_parameters()
        },
    )
    found = weight_changes(base, later)
    whole = math.sqrt(
        sum(float((a - b).detach().norm()) ** 2 for a, b in zip(base.parameters(), later.parameters(), strict=True))
    )
    for by in ("module", "layer", "part"):
        groups = grouped(found, by)
        assert sum(group.weights for group in groups.values()) == len(found) == 21
        assert sum(group.share for group in groups.values()) == pytest.approx(1)
    one = grouped(found, "layer")[0]
    own = [(n, w.detach()) for n, w in base.named_parameters() if ".layers.0." in n]
    changed = math.sqrt(sum(float((later.get_parameter(n).detach() - w).norm()) ** 2 for n, w in own))
    assert one.relative == pytest.approx(changed / math.sqrt(sum(float(w.norm()) ** 2 for _, w in own)), rel=1e-5)
    assert one.share == pytest.approx((changed / whole) ** 2, rel=1e-5)
    with pytest.raises(StoneyError, match="can't be grouped by 'head'"):
        grouped(found, "head")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(32, 32), (400, 24)])
def test_rounding_is_no_part_of_a_rank(dtype, shape):
    """Stored in ``dtype``, opened in fp32: rounding gives a change of rank 2 full rank, and has rank 0 itself."""
    from stoney_rl.interp.changes import _weight_change

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[:, 3] *= 30  # columns of very different size, as trained models have
    weight[7] *= 30
    step = torch.finfo(dtype).eps * float(weight.norm())
    change = with_singular_values(shape, [6 * step, 2 * step]).float()
    one = _weight_change("x.weight", weight, (weight + change).to(dtype).float())
    assert one.rank == 2 and one.singular_values[2] > 0
    alone = _weight_change("x.weight", weight.double(), weight.to(dtype).double())
    if dtype != torch.float32:
        assert alone.change > 0 and (alone.singular_values > 0).all()
    assert (alone.rank, alone.effective_rank) == (0, None)


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (lambda: tiny.model(width=64), "model.embed_tokens.weight: 259x32 float32 on cpu earlier, 259x64 float32"),
        (lambda: tiny.model().double(), "259x32 float64 on cpu later; expected the same of both"),
        (lambda: tiny.model(layers=3), "only the later one has model.layers.2"),
        (lambda: tiny.model("gemma"), "only the earlier one has lm_head.weight .*untied"),
        (lambda: tiny.model().train(), "the later model is in training mode"),
    ],
)
def test_models_that_cannot_be_compared_are_refused(later, message):
    with pytest.raises(StoneyError, match=message):
        weight_changes(tiny.model(), later())


# Representations


@pytest.mark.parametrize("architecture", ["llama", "phi3", "qwen2", "gemma2"])
def test_identical_checkpoints_represent_and_write_the_same(architecture, texts):
    """Two copies, each with hooks of its own: exactly 0, not nearly."""
    one, other = (hook_model(tiny.model(architecture), tiny.tokenizer()) for _ in range(2))
    changes = representation_changes(one, other, texts[1], range(24), seed=0)
    assert changes.shape == (24, 2) and not changes.any()
    found = mean_difference(one, other, texts[1])
    assert found.values.shape == (24, 2, 32) and not found.values.any() and not found.consistency().any()
    read = decode(found, other, seed=0)
    for name in ("size", "up_values", "down_values", "agreement", "floor_size", "floor_agreement"):
        assert not getattr(read, name).any(), name
    assert (read.up == -1).all() and (read.down == -1).all()


def test_a_nudged_model_represents_otherwise_from_that_layer_on(texts):
    base = tiny.model()
    later = edited(base, model__layers__1__mlp__down_proj__weight=with_singular_values((32, 64), [5.0] * 8))
    one, other = (hook_model(model, tiny.tokenizer()) for model in (base, later))
    changes = representation_changes(one, other, texts[1], range(24), seed=0).mean(axis=0)
    assert changes[0] == 0 and 0.001 < changes[1] < 1


# Mean difference


def test_the_mean_difference_is_that_of_the_models_own_hidden_states(texts):
    base, later = tiny.model(seed=0), tiny.model(seed=1)
    found = mean_difference(
        *(hook_model(model, tiny.tokenizer()) for model in (base, later)), texts[1], skip=2, first=2
    )
    for place, row in enumerate(texts[0]):
        with torch.no_grad():
            h, h_later = (m(torch.tensor([row]), output_hidden_states=True).hidden_states[1][0] for m in (base, later))
        torch.testing.assert_close(found.values[place, 0].float(), (h_later - h)[2:4].mean(0), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(found.norms[place, 0].float(), h[2:4].norm(dim=1).mean(), atol=1e-6, rtol=1e-4)


def planted(token, strength=1.0):
    """Earlier and later, whose embeddings all have the direction added that the unembedding reads as ``token``."""
    base = tiny.model(seed=3)
    direction = base.lm_head.weight[token] / base.lm_head.weight[token].norm()
    later = edited(base, model__embed_tokens__weight=strength * direction)
    return [hook_model(model, tiny.tokenizer()) for model in (base, later)]


@pytest.mark.parametrize("token", [50, 123, 200])
def test_a_planted_direction_is_read_as_its_token(token, texts):
    one, other = planted(token)
    read = decode(mean_difference(one, other, texts[1]), other, seed=0)
    assert (read.up[:, 0] == token).all() and read.up.shape == read.down.shape == (2, TOP)
    assert (read.agreement > 0.6).all() and (read.size > 5 * read.floor_size).all()
    assert (read.up_values[:, 0] > 5 * np.abs(read.floor_up_values[:, 0])).all()
    back = decode(mean_difference(other, one, texts[1]), one, seed=0)
    assert (back.down[:, 0] == token).all()
    assert (read.texts, read.left_out) == (24, 0)


def test_decoding_is_by_the_final_norm_and_the_unembedding():
    model = tiny.lively("gemma")  # whose norm has a factor of 1 + weight
    with torch.no_grad():
        model.bridge.ln_final.weight.copy_(torch.linspace(-3, 3, 32))
    direction = torch.randn(4, 2, 32, generator=torch.Generator().manual_seed(0)).double()
    read = decode(MeanDifference(direction, torch.ones(4, 2)), model, seed=0)
    expected = (direction.mean(0).float() * (1 + torch.linspace(-3, 3, 32))) @ model.W_U
    np.testing.assert_array_equal(read.up, expected.topk(TOP).indices)
    np.testing.assert_allclose(read.up_values, expected.topk(TOP).values, rtol=1e-4)
    np.testing.assert_array_equal(read.down, (-expected).topk(TOP).indices)
    np.testing.assert_allclose(read.down_values, -(-expected).topk(TOP).values, rtol=1e-4)


def test_scatter_without_a_mean_is_no_more_than_its_floor():
    """Differences of 400 texts drawn around 0 in each of 30 layers; then around a common vector."""
    model = hook_model(tiny.model(), tiny.tokenizer())
    noise = torch.randn(400, 30, 32, generator=torch.Generator().manual_seed(0)).double()
    null = decode(MeanDifference(noise, torch.ones(400, 30)), model, seed=0, draws=5)
    assert null.size.mean() == pytest.approx(null.floor_size.mean(), rel=0.05)
    assert null.size.mean() == pytest.approx(math.sqrt(32 / 400), rel=0.05)
    assert null.agreement.mean() == pytest.approx(null.floor_agreement.mean(), abs=0.03)
    assert null.up_values[:, 0].mean() == pytest.approx(null.floor_up_values[:, 0].mean(), rel=0.15)
    assert MeanDifference(noise, torch.ones(400, 30)).consistency().mean().abs() < 0.01
    real = MeanDifference(noise + torch.randn(32, generator=torch.Generator().manual_seed(1)), torch.ones(400, 30))
    found = decode(real, model, seed=0, draws=5)
    assert found.agreement.min() > 0.6 > 0.2 > found.floor_agreement.max()
    assert real.consistency().mean() > 0.5
    again = decode(real, model, seed=0, draws=5)
    assert all(np.array_equal(getattr(found, name), getattr(again, name)) for name in ("agreement", "floor_up"))


def test_texts_without_tokens_are_left_out_and_counted():
    one, other = planted(50)
    batch = left_padded([[5], [5, 6, 7], [7, 8], [9], [9, 10, 11, 12], [13, 14]], 0)
    found = mean_difference(one, other, [batch])
    assert found.scored.tolist() == [False, True, True, False, True, True]
    assert found.values[[0, 3]].isnan().all() and found.consistency().shape == (4, 2)
    assert (decode(found, other, seed=0).texts, decode(found, other, seed=0).left_out) == (4, 2)
    with pytest.raises(StoneyError, match="3 texts with tokens, expected at least four"):
        decode(mean_difference(one, other, [left_padded([[5, 6], [7, 8], [9, 1], [3]], 0)]), other, seed=0)
    with pytest.raises(StoneyError, match="give two checkpoints of one architecture"):
        mean_difference(one, hook_model(tiny.model(width=64), tiny.tokenizer()), [batch])


# Units


def head_values(means, seed, n=40):
    """[pair, layer, head] with exactly these means and a scatter of 0.1."""
    noise = np.random.default_rng(seed).normal(size=(n, *np.shape(means)))
    return np.array(means) + 0.1 * (noise - noise.mean(axis=0))


def test_heads_gained_lost_kept_turned_and_undecided():
    """The last: 0.07 is found, 0.03 is not, with a standard error of 0.016; but their difference isn't found either."""
    earlier = head_values([[0.0, 1.0, 1.0, 1.0, 0.0, 0.03]], seed=0)
    later = head_values([[1.0, 0.0, 0.5, -1.0, 0.0, 0.07]], seed=1)
    found = unit_changes(earlier, later, np.repeat(range(20), 2), seed=0)
    assert found.gained.tolist() == [[True, False, False, False, False, False]]
    assert found.lost.tolist() == [[False, True, False, False, False, False]]
    assert found.kept.tolist() == [[False, False, True, False, False, False]]
    assert found.turned.tolist() == [[False, False, False, True, False, False]]
    assert found.undecided.tolist() == [[False, False, False, False, False, True]]
    assert found.difference.mean[0, 0] == pytest.approx(1, abs=0.1)
    back = unit_changes(later, earlier, np.repeat(range(20), 2), seed=0)
    assert np.array_equal(back.gained, found.lost) and np.array_equal(back.lost, found.gained)


def test_floors_are_those_of_effects_and_of_differences():
    earlier, later = head_values([[0.0, 0.0]], seed=0), head_values([[0.5, 1.0]], seed=1)
    clusters = np.repeat(range(20), 2)
    assert unit_changes(earlier, later, clusters, seed=0, floor=0.7).gained.tolist() == [[False, True]]
    found = unit_changes(earlier, later, clusters, seed=0, seed_floor=0.7)
    assert found.gained.tolist() == [[False, True]] and found.undecided.tolist() == [[True, False]]


def test_the_same_values_change_no_unit():
    values = head_values([[0.0, 1.0], [0.5, 0.0]], seed=0)
    found = unit_changes(values, values.copy(), np.repeat(range(20), 2), seed=0)
    assert not found.difference.mean.any() and found.kept.tolist() == [[False, True], [True, False]]
    assert not (found.gained | found.lost | found.turned | found.undecided).any()


def test_shared_top_neurons_by_hand():
    """10 neurons, the top 2 of each: both shared has a chance of 1 / C(10, 2); one shared or more, 17 / 45."""
    earlier = np.tile([9.0, -8, 1, 1, 1, 1, 1, 1, 1, 1], (4, 1))[:, None]
    other = np.tile([9.0, 1, -8, 1, 1, 1, 1, 1, 1, 1], (4, 1))[:, None]
    same = top_shared(earlier, earlier, "aabb", seed=0, share=0.2)
    assert (same.units, same.count, same.shared, same.expected) == (10, 2, 2, 0.4)
    assert same.p == pytest.approx(1 / 45) and (same.across, same.within) == (1, 1)
    half = top_shared(earlier, other, "aabb", seed=0, share=0.2)
    assert half.shared == 1 and half.p == pytest.approx(17 / 45) and (half.across, half.within) == (0.5, 1)
    assert top_shared(earlier, other, "aaaa", seed=0).across is None
    assert top_shared(earlier, np.abs(earlier), "aabb", seed=0, share=0.2).shared == 2  # the size counts, not the sign


def test_noise_shares_no_more_across_models_than_chance_and_within_says_what_could_be():
    """A tenth of 2,000 neurons carry the same in both; noise hides them in part, equally across and within."""
    rng = np.random.default_rng(0)
    means = np.where(np.arange(2000) < 200, 1.0, 0.0)
    earlier, later = (means + 2 * rng.normal(size=(40, 2000)) for _ in range(2))
    found = top_shared(earlier, later, range(40), seed=0, share=0.1)
    assert found.across == pytest.approx(found.within, abs=0.05) and 0.3 < found.within < 0.6
    strangers = top_shared(earlier, 2 * rng.normal(size=(40, 2000)), range(40), seed=0, share=0.1)
    assert strangers.shared == pytest.approx(strangers.expected, abs=12) and strangers.p > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((4, 3)), np.ones((4, 2)), "aabb"), r"shapes \(4, 3\) and \(4, 2\), 4 labels"),
        ((np.ones((4, 3)), np.ones((4, 3)), "aab"), "3 labels"),
    ],
)
def test_values_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(StoneyError, match=message):
        top_shared(*arguments, seed=0)
    with pytest.raises(StoneyError, match="share=0"):
        top_shared(np.ones((4, 3)), np.ones((4, 3)), "aabb", seed=0, share=0)
