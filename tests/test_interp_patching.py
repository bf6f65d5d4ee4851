"""Patching: what must hold exactly, TransformerLens's own helpers as oracles, and the gradient's estimate beside the truth."""

import copy
from pathlib import Path

import pytest
import tiny
import torch
from prompt_pairs import induction_pairs, one_batch, random_pairs
from scipy.stats import spearmanr
from transformer_lens import patching as oracle
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

from stoney_rl.errors import StoneyError
from stoney_rl.interp import patching
from stoney_rl.interp.circuit import regions
from stoney_rl.interp.hooked import Batch, HookedModel, hook_model, left_padded, load_hooked
from stoney_rl.interp.pairs import PairBatch
from stoney_rl.interp.patching import Effects, attribute, mean_gap, patch, span_groups, token_groups

INDUCTION = Path(__file__).with_name("induction")


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def model(request) -> HookedModel:
    return tiny.lively(request.param)


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    return tiny.lively("llama")


@pytest.fixture(scope="module")
def induction() -> HookedModel:
    return load_hooked(str(INDUCTION))


@pytest.fixture(scope="module")
def pairs() -> PairBatch:
    return one_batch(random_pairs([5, 7, 7, 10]))


@pytest.fixture(scope="module")
def copying(induction) -> PairBatch:
    return one_batch(induction_pairs(16, 12, vocabulary=range(2, induction.d_vocab)))


# Activation patching


def test_patching_all_of_the_first_residual_gives_exactly_one(model, pairs):
    effects = patch(model, pairs, "resid_pre")
    assert effects.values.shape == (4, 2)
    gap = effects.clean - effects.corrupt
    assert torch.equal(effects.values[:, 0], gap) and gap.abs().min() > 1e-4
    assert torch.allclose(effects.values[:, 1], gap, atol=1e-5)  # what follows the first layer's input is all of it too
    assert torch.equal(patch(model, pairs, "embedding").values[:, 0], gap)


@pytest.mark.parametrize("site", patching.SITES)
def test_patching_a_prompt_into_itself_gives_exactly_zero(llama, pairs, site):
    same = PairBatch(pairs.clean, pairs.clean, pairs.answer, pairs.wrong)
    for groups in (None, token_groups(same)):
        values = patch(llama, same, site, groups=groups).values
        assert not values.nan_to_num().any()


ORACLES = {
    ("resid_pre", True): oracle.get_act_patch_resid_pre,
    ("attn_out", True): oracle.get_act_patch_attn_out,
    ("mlp_out", True): oracle.get_act_patch_mlp_out,
    ("head", False): oracle.get_act_patch_attn_head_out_all_pos,
    ("head", True): oracle.get_act_patch_attn_head_out_by_pos,
}


@pytest.mark.parametrize(("site", "by_position"), ORACLES)
def test_effects_are_those_of_transformer_lens(model, site, by_position):
    pairs = one_batch(random_pairs([5, 5]))
    _, cache = model.bridge.run_with_cache(pairs.clean.ids)
    expected = ORACLES[site, by_position](
        model.bridge, pairs.corrupt.ids, cache, pairs.difference, reduce="none", baseline=True
    )
    effects = patch(model, pairs, site, groups=token_groups(pairs) if by_position else None)
    assert torch.allclose(effects.values, expected.effect().movedim(-1, 0), atol=2e-6)
    assert torch.allclose(effects.corrupt, expected.baseline, atol=1e-6)
    assert effects.values.abs().max() > 1e-3


def alone(pairs: PairBatch, row: int) -> PairBatch:
    kept = pairs.clean.mask[row].bool()
    rows = (Batch(batch.ids[row, kept][None], batch.mask[row, kept][None]) for batch in (pairs.clean, pairs.corrupt))
    return PairBatch(*rows, pairs.answer[row : row + 1], pairs.wrong[row : row + 1])


@pytest.mark.parametrize("by_position", [False, True])
def test_a_padded_batch_is_each_pair_alone(model, pairs, by_position):
    width = pairs.clean.ids.shape[1]
    sites = ["head", "attn_out", "neuron"]

    def measured(batch: PairBatch) -> list[Effects]:
        groups = token_groups(batch) if by_position else None
        estimates = attribute(model, batch, sites, groups=groups, steps=2)
        return [patch(model, batch, "head", groups=groups), *(estimates[site] for site in sites)]

    together = measured(pairs)
    for row in range(len(pairs)):
        single = alone(pairs, row)
        padding = width - single.clean.ids.shape[1]
        for many, one in zip(together, measured(single), strict=True):
            values = many.values[row]
            if by_position:
                assert values[:, :padding].isnan().all()
                values = values[:, padding:]
            assert torch.allclose(values, one.values[0], atol=1e-5)


def test_several_patches_a_pass_are_one_patch_a_pass(llama, pairs, monkeypatch):
    together = patch(llama, pairs, "head", groups=token_groups(pairs))
    monkeypatch.setattr(patching, "ROWS_PER_PASS", 1)
    assert torch.allclose(
        together.values, patch(llama, pairs, "head", groups=token_groups(pairs)).values, atol=1e-6, equal_nan=True
    )


def test_what_can_change_nothing_takes_no_pass(llama, monkeypatch):
    pairs = one_batch(random_pairs([9]))
    first = int((pairs.clean.ids != pairs.corrupt.ids).nonzero()[0, 1])
    monkeypatch.setattr(patching, "ROWS_PER_PASS", 1)
    passes = []
    run = HookedModel.run
    monkeypatch.setattr(HookedModel, "run", lambda *args, **options: passes.append(1) or run(*args, **options))
    values = patch(llama, pairs, "head", groups=token_groups(pairs)).values
    # Two runs of the prompts; then, in each layer, each head at each position from the first difference on. Layer 0's
    # heads at positions whose own token is the same differ too: what they look at differs.
    assert len(passes) == 2 + 2 * 4 * (9 - first)
    # Of the last layer's heads, those at the last position alone reach the answer.
    assert not values[:, :, :first].any() and not values[:, 1, :-1].any()
    assert values[:, 0, first:].all() and values[:, 1, -1].all()


def test_groups_are_patched_together_and_padding_never(llama, pairs):
    whole = patch(llama, pairs, "mlp_out")
    one = 1 - pairs.clean.mask  # that padding has a number of its own does not make it a group
    grouped = patch(llama, pairs, "mlp_out", groups=one)
    assert grouped.values.shape == (4, 2, 1) and torch.equal(grouped.values[..., 0], whole.values)


def test_words_are_groups_and_a_prompt_without_a_word_has_none(llama, pairs):
    spans = [[(0, 2), (2, 5)], [(0, 7)], [(1, 3), (4, 7)], [(0, 4), (4, 6), (6, 10)]]
    groups = span_groups(pairs, spans)
    assert groups[0].tolist() == [-1] * 5 + [0, 0, 1, 1, 1]
    assert groups[2].tolist() == [-1] * 3 + [-1, 0, 0, -1, 1, 1, 1]
    values = attribute(llama, pairs, ["resid_pre"], groups=groups)["resid_pre"].values
    tokens = attribute(llama, pairs, ["resid_pre"], groups=token_groups(pairs))["resid_pre"].values
    assert values.shape == (4, 2, 3)
    assert values.isnan()[:, 0].tolist() == [
        [False, False, True],
        [False, True, True],
        [False, False, True],
        [False] * 3,
    ]
    for row, word, columns in [(0, 1, slice(7, 10)), (2, 0, slice(4, 6)), (3, 2, slice(6, 10))]:
        assert torch.allclose(values[row, :, word], tokens[row, :, columns].sum(-1), atol=1e-6)


# Shares


def test_a_pair_without_a_gap_does_not_blow_up_its_share():
    clean, corrupt = torch.tensor([2.0, 1.0, 3.0, 2.0]), torch.tensor([-2.0, 1.0, -3.0, -2.0])  # gaps 4, 0, 6, 4
    effects = Effects(torch.tensor([[2.0], [0.5], [2.5], [2.0]]), clean, corrupt)
    assert mean_gap(clean, corrupt) == 3.5
    assert effects.share().flatten().tolist() == pytest.approx([2 / 3.5, 0.5 / 3.5, 2.5 / 3.5, 2 / 3.5])
    assert effects.share().mean() == pytest.approx(0.5)  # 7 recovered of 14


@pytest.mark.parametrize("gaps", [[-1.0], [0.0, 0.0], [-1.0, -2.0, -1.5], [5.0, -4.9, 0.2, -0.1]])
def test_without_a_gap_there_is_no_share(gaps):
    gaps = torch.tensor(gaps)
    assert Effects(gaps[:, None], gaps, torch.zeros_like(gaps)).share() is None


# Attribution patching


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_over_the_embeddings_estimates_add_up_to_the_gap(architecture, pairs):
    model = hook_model(tiny.model(architecture), tiny.tokenizer(), architecture)
    effects = attribute(model, pairs, ["embedding"], steps=10)["embedding"]
    gap = effects.clean - effects.corrupt
    assert (effects.values[:, 0] - gap).abs().sum() / gap.abs().sum() < 0.01


def test_the_steeper_the_path_the_more_steps_it_takes(induction, copying):
    """Half way, attention to B turns into attention to D: a gradient there says nothing about the whole."""
    effects = {steps: attribute(induction, copying, ["embedding"], steps=steps)["embedding"] for steps in (1, 10, 40)}
    gap = (effects[1].clean - effects[1].corrupt).sum()
    errors = {steps: float((found.values.sum() / gap - 1).abs()) for steps, found in effects.items()}
    assert errors[1] > 0.5 and errors[10] < 0.2 and errors[40] < 0.01


def test_estimates_rank_heads_as_patching_does(induction, copying):
    for groups in (None, regions(copying)):
        truth = patch(induction, copying, "head", groups=groups).values.nanmean(0)
        estimate = attribute(induction, copying, ["head"], groups=groups)["head"].values.nanmean(0)
        matters = truth.abs() > 1e-3  # below that patching sees its rounding
        assert matters.sum() >= 5 and spearmanr(truth[matters], estimate[matters]).statistic >= 0.8


def test_one_step_at_the_corrupt_prompt_is_transformer_lens_attribution(llama, monkeypatch):
    pairs = one_batch(random_pairs([6]))
    llama.bridge.requires_grad_(True)  # what it takes gradients through
    monkeypatch.setattr(patching, "midpoints", lambda steps: [0.0])
    ours = attribute(llama, pairs, ["embedding", "head", "mlp_out"], groups=token_groups(pairs))
    result = attribution_patch(
        llama.bridge, pairs.clean.ids, pairs.corrupt.ids, lambda logits: pairs.difference(logits).sum(),
        EdgeAttributionConfig(granularity="node"),
    )  # fmt: skip
    llama.bridge.requires_grad_(False)
    kinds = {"embed": "embedding", "attn_head_out": "head", "mlp_out": "mlp_out"}
    assert len(result.node_scores) == 6 * (1 + 2 * 5)
    for node, score in result.node_scores.items():
        values = ours[kinds[node.kind]].values[0, node.layer or 0, node.position]
        value = values if node.head is None else values[node.head]
        assert float(value) == pytest.approx(score, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("site", ["embedding", "head", "neuron"])
def test_gradients_are_finite_differences(model, site):
    pairs = one_batch(random_pairs([6, 9]))
    hook = patching.SITES[site].format(0)
    ends = [model.run(batch, read=[hook, patching.SITES["embedding"]]) for batch in (pairs.clean, pairs.corrupt)]
    between = [run[patching.SITES["embedding"]] for run in ends]
    gradient = patching.gradients_between(model, pairs, *between, 0.3, [hook])[hook]
    middle = torch.lerp(between[1], between[0], 0.3)
    edits = {patching.SITES["embedding"]: lambda _: middle}
    here = model.run(pairs.corrupt, read=[hook], edit=edits)[hook]
    direction = torch.randn(here.shape, generator=torch.Generator().manual_seed(0)) * here.std()

    def metric(step: float) -> torch.Tensor:
        moved = edits | {hook: lambda _: here + step * direction}
        return pairs.difference(model.run(pairs.corrupt, edit=moved).logits)

    step = 1e-3
    measured = (metric(step) - metric(-step)) / (2 * step)
    expected = (gradient * direction).flatten(1).sum(1)
    assert ((measured - expected).abs() / expected.abs()).max() < 1e-2


def test_neurons_and_heads_of_a_layer_add_up_to_what_it_writes_unless_a_norm_stands_between(model, pairs):
    estimates = attribute(model, pairs, ["head", "neuron", "attn_out", "mlp_out"], groups=token_groups(pairs), steps=2)
    assert estimates["neuron"].values.shape == (4, 2, 10, model.d_mlp)
    for parts, whole in [("head", "attn_out"), ("neuron", "mlp_out")]:
        expected = estimates[whole].values
        found = estimates[parts].values.sum(-1)
        rounding = 1e-5 * float(expected.nan_to_num().abs().max())
        assert torch.allclose(found, expected, atol=rounding, equal_nan=True) == (not model.post_norm)


def test_measuring_leaves_the_model_as_it_was(llama, pairs):
    before = copy.deepcopy(llama.bridge.state_dict())
    patch(llama, pairs, "head")
    attribute(llama, pairs, ["neuron"])
    assert all(torch.equal(value, before[key]) for key, value in llama.bridge.state_dict().items())
    assert not any(point.fwd_hooks for point in llama.bridge.hook_dict.values())


# Refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, pairs: patch(model, pairs, "heads"), "no site is called 'heads'; there are embedding, "),
        (lambda model, pairs: attribute(model, pairs, ["head"], steps=0), "steps=0"),
        (lambda model, pairs: patch(model, pairs, "head", groups=torch.zeros(4, 3, dtype=torch.int64)), "groups must"),
        (lambda model, pairs: patch(model, pairs, "head", groups=-torch.ones_like(pairs.clean.ids)), "groups must"),
        (lambda model, pairs: span_groups(pairs, [[(0, 1)]]), "1 lists of spans for 4 pairs"),
    ],
)
def test_bad_input_is_named(llama, pairs, call, message):
    with pytest.raises(StoneyError, match=message):
        call(llama, pairs)


def test_prompts_of_unequal_length_are_refused(llama):
    pairs = PairBatch(
        left_padded([[5, 6, 7], [8, 9]], 0),
        left_padded([[5, 6, 7], [7, 8, 9]], 0),
        torch.tensor([3, 4]),
        torch.tensor([4, 3]),
    )
    with pytest.raises(StoneyError, match="as many tokens"):
        patch(llama, pairs, "head")
