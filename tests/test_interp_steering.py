"""Steering moves a planted answer more than random pushes do, alone where it is told to, and not at all at alpha 0."""

import pytest
import tiny
import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp.hooked import hook_model, left_padded
from stoney_rl.interp.pairs import PairBatch
from stoney_rl.interp.significance import effects
from stoney_rl.interp.steering import direction, random_directions, steer, steering_effects

PLUS, MINUS, ANSWER, WRONG = 40, 41, 200, 201
HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def planted():
    """A random model that answers ANSWER after PLUS and WRONG after MINUS: their unembeddings are the embeddings of these."""
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight[ANSWER] = model.model.embed_tokens.weight[PLUS]
        model.lm_head.weight[WRONG] = model.model.embed_tokens.weight[MINUS]
    return hook_model(model, tiny.tokenizer())


def texts(last: int, seed: int, count: int = 16):
    generator = torch.Generator().manual_seed(seed)
    return left_padded(
        [torch.randint(50, 150, (2 + n % 4,), generator=generator).tolist() + [last] for n in range(count)], 0
    )


def scored(batch) -> PairBatch:
    rows = len(batch)
    return PairBatch(batch, batch, torch.full((rows,), ANSWER), torch.full((rows,), WRONG))


def test_direction_is_the_difference_of_the_means(planted):
    plus, minus = texts(PLUS, 0), texts(MINUS, 1)
    expected = [planted.run(batch, read=[HOOK])[HOOK][:, -1].mean(dim=0) for batch in (plus, minus)]
    found = direction(planted, [plus], [minus], 0)
    torch.testing.assert_close(found, expected[0] - expected[1], atol=1e-6, rtol=0)
    alone = [left_padded([row[mask.bool()].tolist()], 0) for row, mask in zip(plus.ids, plus.mask, strict=True)]
    torch.testing.assert_close(direction(planted, alone, [minus], 0), found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_alpha_zero_changes_no_bit_and_padding_no_row(architecture):
    model = hook_model(tiny.model(architecture), tiny.tokenizer())
    batch = texts(PLUS, 0, count=4)
    vector = direction(model, [batch], [texts(MINUS, 1)], 1)
    plain = model.run(batch).logits
    for positions in (None, batch.mask.bool()):
        steered = model.run(batch, edit={"blocks.1.hook_resid_post": steer(vector, 0.0, positions)}).logits
        assert torch.equal(steered, plain)
    together = steering_effects(model, scored(batch), 0, vector[None], 2.0, batch.mask.bool())
    for row in range(4):
        alone = left_padded([batch.ids[row, batch.mask[row].bool()].tolist()], 0)
        found = steering_effects(model, scored(alone), 0, vector[None], 2.0, alone.mask.bool())
        torch.testing.assert_close(found[0], together[row], atol=1e-5, rtol=0)


def test_only_the_named_positions_are_pushed(planted):
    batch, vector = texts(PLUS, 0), torch.arange(32.0)
    before = planted.run(batch, read=[HOOK])[HOOK]
    last = planted.run(batch, read=[HOOK], edit={HOOK: steer(vector, 0.5)})[HOOK]
    torch.testing.assert_close(last[:, -1] - before[:, -1], (0.5 * vector).expand(16, 32), atol=1e-5, rtol=0)
    assert torch.equal(last[:, :-1], before[:, :-1])
    chosen = torch.zeros_like(batch.mask, dtype=torch.bool)
    chosen[3, -2] = True
    one = planted.run(batch, read=[HOOK], edit={HOOK: steer(vector, 0.5, chosen)})[HOOK]
    assert (one != before).any(dim=-1).nonzero().tolist() == [[3, batch.ids.shape[1] - 2]]


def test_the_planted_direction_beats_random_ones_on_other_texts(planted):
    vector = direction(planted, [texts(PLUS, 0)], [texts(MINUS, 1)], 0)
    others = torch.cat([vector[None], random_directions(vector, 30, seed=0)])
    found = steering_effects(planted, scored(texts(99, 2, count=20)), 0, others, 1.0)
    assert found.shape == (20, 31)
    assert found.dtype == torch.float32
    assert (found[:, 0] > found[:, 1:].max(dim=1).values).all()
    assert effects(found[:, 0] - found[:, 1:].mean(dim=1), range(20), seed=0).found
    back = steering_effects(planted, scored(texts(99, 2, count=20)), 0, vector[None], -1.0)
    assert (back < 0).all()


def test_random_directions_have_the_length_and_no_preference():
    vector = torch.arange(32.0)
    drawn = random_directions(vector, 4000, seed=0)
    torch.testing.assert_close(drawn.norm(dim=1), vector.norm().expand(4000))
    assert drawn.mean(dim=0).abs().max() < 0.08 * vector.norm()
    assert torch.equal(drawn, random_directions(vector, 4000, seed=0))


def test_what_does_not_fit_is_refused(planted):
    batch = texts(PLUS, 0)
    with pytest.raises(StoneyError, match="no layer 2; layers go from 0 to 1"):
        direction(planted, [batch], [batch], 2)
    with pytest.raises(StoneyError, match="without texts"):
        direction(planted, [batch], [], 0)
    with pytest.raises(StoneyError, match=r"expected \[direction, 32\]"):
        steering_effects(planted, scored(batch), 0, torch.zeros(32), 1.0)
