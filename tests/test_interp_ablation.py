"""Ablations: what is replaced is what was named, nothing else, in any order; and the copying model loses what it must."""

from pathlib import Path

import pytest
import tiny
import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp.ablation import HOOKS, ablate, compose, draws, effects, means, zeros
from stoney_rl.interp.attention import copy_accuracy, repeated_random_tokens
from stoney_rl.interp.hooked import hook_model, left_padded, load_hooked

ROWS = [[30, 31, 32, 30, 31, 33, 31], [40, 41, 42, 43], [50, 51]]
FIXTURE = Path(__file__).parent / "induction"
REFERENCE = [[60, 61, 62, 63, 64], [70, 71], [80, 81, 82]]
KINDS = tuple(HOOKS)
# Parts of every kind, several at one hook.
SOME = {"heads": [(0, 1), (1, 0), (1, 3)], "mlps": [1], "neurons": [(0, 5), (0, 6)]}


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def model(request):
    return hook_model(tiny.model(request.param), tiny.tokenizer(), request.param)


@pytest.fixture(scope="module")
def llama():
    return hook_model(tiny.model(), tiny.tokenizer(), "llama")


def batches(model):
    return left_padded(ROWS, model.pad_token_id), left_padded(REFERENCE, model.pad_token_id)


def last_logits(logits):
    """Something that every part has a hand in: the logit of token 7 at the last position, [row]."""
    return logits[:, -1, 7]


def read(model, batch, hook, edit=None):
    return model.run(batch, read=[hook], edit=edit)[hook]


# What is replaced, and by what


def test_an_empty_set_changes_nothing_at_all(model):
    batch, reference = batches(model)
    assert ablate(means(model, reference)) == {} == compose() == compose({}, {})
    assert torch.equal(effects(model, batch, last_logits, [{}, ablate(zeros(model))]), torch.zeros(3, 2))


def test_without_heads_and_mlps_only_the_embedding_is_left(model):
    """Nothing else writes into the residual stream, so the logits are those of the bare embedding."""
    batch, _ = batches(model)
    layers, heads = range(model.n_layers), range(model.n_heads)
    every = ablate(zeros(model), heads=[(layer, head) for layer in layers for head in heads], mlps=layers)
    run = model.run(batch, read=["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"], edit=every)
    torch.testing.assert_close(run["blocks.1.hook_resid_post"], run["blocks.0.hook_resid_pre"])


def test_a_head_is_taken_away_and_the_others_are_not(model):
    """In the layer itself the output falls by z W_O of that head: bias and the other heads stay (no norm in between)."""
    if model.post_norm:
        pytest.skip("a norm stands between the heads and what their layer writes")
    batch, _ = batches(model)
    hook, real = "blocks.1.hook_attn_out", batch.mask.bool()
    edit = ablate(zeros(model), heads=[(1, 2)])
    lost = read(model, batch, hook) - read(model, batch, hook, edit)
    expected = read(model, batch, "blocks.1.attn.hook_z")[:, :, 2] @ model.W_O(1)[2]
    torch.testing.assert_close(lost[real], expected[real], atol=1e-5, rtol=1e-4)


def test_means_are_over_the_tokens_that_are_not_padding(model):
    _, reference = batches(model)
    found = means(model, reference, KINDS)
    for kind, hook in HOOKS.items():
        for layer in range(model.n_layers):
            name = f"blocks.{layer}.{hook}"
            tokens = [read(model, left_padded([ids], 0), name)[0] for ids in REFERENCE]
            torch.testing.assert_close(found[name], torch.cat(tokens).mean(0), atol=1e-5, rtol=1e-4, msg=kind)


def test_draws_are_tokens_of_the_reference_the_same_for_all_parts(llama):
    batch, reference = batches(llama)
    found = draws(llama, reference, batch, seed=1, kinds=KINDS)
    real = reference.mask.bool()
    chosen = []
    for hook, drawn in found.items():
        assert drawn.shape == read(llama, batch, hook).shape
        tokens = read(llama, reference, hook)[real].flatten(1)
        distance = torch.cdist(drawn.flatten(2).flatten(0, 1), tokens)
        assert distance.min(1).values.max() < 1e-4
        chosen.append(distance.argmin(1))
    assert all(torch.equal(one, chosen[0]) for one in chosen)
    assert len(set(chosen[0].tolist())) > 3
    assert torch.equal(draws(llama, reference, batch, seed=1)[hook_z(0)], found[hook_z(0)])
    assert not torch.equal(draws(llama, reference, batch, seed=2)[hook_z(0)], found[hook_z(0)])


def test_draws_have_the_means_that_means_have(llama):
    """1,792 draws of 10 tokens: within a tenth of a standard deviation (four standard errors)."""
    reference = left_padded(REFERENCE, 0)
    drawn = draws(llama, reference, left_padded([ROWS[0]] * 256, 0), seed=0)[hook_z(1)].flatten(0, 1)
    assert ((drawn.mean(0) - means(llama, reference)[hook_z(1)]).abs() < 0.1 * drawn.std(0)).all()


def hook_z(layer):
    return f"blocks.{layer}.attn.hook_z"


@pytest.mark.parametrize("kind", KINDS)
def test_the_named_parts_are_replaced_and_no_others(model, kind):
    batch, reference = batches(model)
    edit = ablate(means(model, reference, KINDS), **{kind: SOME[kind]})
    replaced = means(model, reference, KINDS)
    for hook, function in edit.items():
        before = read(model, batch, hook)
        after, layer = function(before), int(hook.split(".")[1])
        indices = (
            [part[1] for part in SOME[kind] if part != layer and part[0] == layer] if kind != "mlps" else slice(None)
        )
        dimension = after.ndim - (2 if kind == "heads" else 1)
        expected = before.clone().movedim(dimension, 0)
        expected[indices] = replaced[hook].expand_as(before).movedim(dimension, 0)[indices]
        assert torch.equal(after, expected.movedim(0, dimension)) and not torch.equal(after, before)


# Sets of parts


def test_order_does_not_matter_and_groups_are_what_their_parts_are(model):
    batch, reference = batches(model)
    replacement = draws(model, reference, batch, seed=0, kinds=KINDS)
    singles = [ablate(replacement, **{kind: [part]}) for kind, parts in SOME.items() for part in parts]
    at_once, one_by_one, backwards = effects(
        model, batch, last_logits, [ablate(replacement, **SOME), compose(*singles), compose(*reversed(singles))]
    ).unbind(1)
    assert torch.equal(at_once, one_by_one) and torch.equal(at_once, backwards) and at_once.abs().min() > 0


def test_kinds_of_replacement_compose(llama):
    batch, reference = batches(llama)
    edit = compose(ablate(zeros(llama), heads=[(0, 1)]), ablate(means(llama, reference), heads=[(0, 2)], mlps=[0]))
    before = read(llama, batch, hook_z(0))
    after = edit[hook_z(0)](before)
    assert not after[:, :, 1].any()
    torch.testing.assert_close(after[:, :, 2], means(llama, reference)[hook_z(0)][2].expand_as(after[:, :, 2]))
    assert torch.equal(after[:, :, [0, 3]], before[:, :, [0, 3]])


def test_a_padded_batch_equals_each_row_alone(model):
    batch, reference = batches(model)
    edits = [ablate(means(model, reference, KINDS), **SOME), ablate(zeros(model), heads=[(0, 0)])]
    together = effects(model, batch, last_logits, edits)
    assert together.shape == (3, 2) and together.dtype == torch.float32
    for row, ids in enumerate(ROWS):
        alone = effects(model, left_padded([ids], model.pad_token_id), last_logits, edits)
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"heads": [(0, 4)]}, "has parts 0 to 3, not 4"),
        ({"heads": [(0, -1)]}, "has parts 0 to 3, not -1"),
        ({"heads": [(2, 0)]}, r"nothing stands in for blocks\.2\.attn\.hook_z; .* heads and mlps of layers 0 to 1"),
        ({"mlps": [-1]}, r"nothing stands in for blocks\.-1\.hook_mlp_out"),
        ({"neurons": [(0, 0)]}, r"nothing stands in for blocks\.0\.mlp\.hook_post"),
    ],
)
def test_parts_that_are_not_there_are_refused(llama, parts, message):
    with pytest.raises(StoneyError, match=message):
        ablate(zeros(llama), **parts)


def test_unknown_kinds_are_refused(llama):
    with pytest.raises(StoneyError, match="no kind of part is called 'head'; known are heads, mlps, neurons"):
        zeros(llama, ["head"])


# The model whose heads are known: what it loses


@pytest.fixture(scope="module")
def copier():
    return load_hooked(str(FIXTURE))


@pytest.fixture(scope="module")
def lost(copier):
    """By how much accuracy falls, for a list of edits: 64 rows, the mean over them."""
    rows = repeated_random_tokens(copier, 64, 24, seed=7)
    return lambda edits: -effects(copier, rows, lambda logits: copy_accuracy(logits, rows), edits).mean(0)


@pytest.fixture(scope="module")
def reference(copier):
    return repeated_random_tokens(copier, 64, 24, seed=8)


def test_one_previous_token_head_carries_the_copying(copier, lost, reference):
    losses = lost([ablate(means(copier, reference), heads=[(0, head)]) for head in range(4)])
    assert losses.max() > 0.6 and losses.sort().values[-2] < 0.1


def test_induction_heads_hide_one_another(copier, lost, reference):
    """Any one of them costs next to nothing, all of them everything: ablate groups."""
    replacement, heads = means(copier, reference), [(1, head) for head in range(4)]
    assert lost([ablate(replacement, heads=[head]) for head in heads]).max() < 0.02
    assert lost([ablate(replacement, heads=heads)]) > 0.9


def test_every_kind_of_replacement_tells_the_same(copier, lost, reference):
    rows = repeated_random_tokens(copier, 64, 24, seed=7)
    found = set()
    for replacement in (zeros(copier), means(copier, reference), draws(copier, reference, rows, seed=0)):
        losses = lost([ablate(replacement, heads=[(0, head)]) for head in range(4)])
        assert losses.max() > 0.5
        found.add(int(losses.argmax()))
    assert len(found) == 1
