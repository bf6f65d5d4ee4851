"""Attention measures: golden values on patterns written by hand, TransformerLens's head detector as an oracle, and the
heads of a model that is known to copy with them."""

import math
from pathlib import Path

import pytest
import tiny
import torch
from sklearn.metrics import roc_auc_score

from stoney_rl.checkpoints import read_stage
from stoney_rl.errors import StoneyError
from stoney_rl.interp.attention import (
    MEASURES,
    attention_patterns,
    by_word,
    copy_accuracy,
    entropy,
    head_scores,
    repeated_random_tokens,
)
from stoney_rl.interp.hooked import Batch, hook_model, left_padded, load_hooked, random_hooked

FIXTURE = Path(__file__).parent / "induction"
ROWS = [[30, 31, 32, 30, 31, 33, 31], [40, 41, 42, 43], [50, 51]]


@pytest.fixture(scope="module")
def copier():
    return load_hooked(str(FIXTURE))


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def model(request):
    return hook_model(tiny.model(request.param), tiny.tokenizer(), request.param)


class WrittenByHand:
    """Stands in for a hooked model of one layer, whose heads look where the test says. patterns [row, head, query, key]."""

    n_layers, device = 1, torch.device("cpu")

    def __init__(self, patterns):
        self.patterns = patterns

    def run(self, batch, read, stop_at_layer):
        return {hook: function(self.patterns) for hook, function in read.items()}


def scores_of(patterns, ids, mask=None):
    """What head_scores makes of patterns of one row [head, query, key]: measure -> list, a value a head."""
    ids = torch.tensor([ids])
    batch = Batch(ids, torch.ones_like(ids) if mask is None else torch.tensor([mask]))
    report = head_scores(WrittenByHand(torch.stack(patterns)[None]), batch)
    assert all(value.shape == (1, 1, len(patterns)) and value.dtype == torch.float32 for value in report.values())
    return {measure: value[0, 0].tolist() for measure, value in report.items()}


def looking_at(*keys):
    """The pattern whose query q spends all its attention on key keys[q]."""
    return torch.nn.functional.one_hot(torch.tensor(keys), len(keys)).float()


def uniform(length):
    return torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None]


# Golden values


def test_entropy_is_1_for_an_even_look_and_0_for_a_look_at_one_token():
    report = scores_of([uniform(5), looking_at(0, 0, 0, 1, 4)], [5, 6, 7, 8, 9])
    assert report["entropy"] == pytest.approx([1, 0], abs=1e-6)


def test_entropy_by_hand():
    """Queries 1 and 2 spend (3/4, 1/4) and (1/2, 1/2, 0): H / log 2 = 0.8112781, H / log 3 = 0.6309298."""
    pattern = torch.tensor([[1, 0, 0], [0.75, 0.25, 0], [0.5, 0.5, 0]])
    assert entropy(pattern[None, None], torch.ones(1, 3)).item() == pytest.approx((0.8112781 + 0.6309298) / 2)


def test_heads_that_do_one_thing():
    """A B C A B C: each head of the test does one thing at every query where that thing can be done."""
    report = scores_of(
        [
            looking_at(0, 0, 0, 0, 0, 0),  # at the first token
            looking_at(0, 0, 1, 2, 3, 4),  # at the token before
            looking_at(0, 1, 2, 1, 2, 3),  # at what followed the earlier occurrence
            looking_at(0, 1, 2, 0, 1, 2),  # at the earlier occurrence
        ],
        [5, 6, 7, 5, 6, 7],
    )
    assert report["sink"] == pytest.approx([1, 1 / 5, 0, 1 / 5])
    assert report["previous_token"] == pytest.approx([1 / 5, 1, 0, 0])
    assert report["induction"] == pytest.approx([0, 0, 1, 0])
    assert report["duplicate_token"] == pytest.approx([1 / 3, 0, 0, 1])
    assert report["distance"] == pytest.approx([15 / 5, 1, 6 / 5, 9 / 5])


def test_a_token_that_comes_three_times():
    """A x A y A: the last A has two earlier ones and two followers; attention to both counts, the mean is over 2 queries."""
    last = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15])
    pattern = torch.cat([uniform(5)[:4], last[None]])
    report = scores_of([pattern], [5, 6, 5, 7, 5])
    assert report["duplicate_token"] == pytest.approx([(1 / 3 + 0.1 + 0.3) / 2])
    assert report["induction"] == pytest.approx([(1 / 3 + 0.2 + 0.25) / 2])


def test_induction_is_attention_to_q_minus_length_plus_1(copier):
    length = 12
    batch = repeated_random_tokens(copier, 3, length, seed=5)
    patterns = attention_patterns(copier, batch)
    queries = torch.arange(length, 2 * length)
    report = head_scores(copier, batch)
    torch.testing.assert_close(report["induction"], patterns[..., queries, queries - length + 1].mean(-1))
    torch.testing.assert_close(report["duplicate_token"], patterns[..., queries, queries - length].mean(-1))
    torch.testing.assert_close(report["previous_token"], patterns.diagonal(-1, -2, -1).mean(-1))
    torch.testing.assert_close(report["sink"], patterns[..., 1:, 0].mean(-1))


def test_what_a_row_cannot_show_is_nan_and_not_0():
    report = scores_of([uniform(3)], [5, 6, 7])
    assert math.isnan(report["induction"][0]) and math.isnan(report["duplicate_token"][0])
    assert not any(math.isnan(report[measure][0]) for measure in ("entropy", "sink", "previous_token", "distance"))
    assert all(math.isnan(value[0]) for value in scores_of([torch.ones(1, 1)], [5]).values())


def test_padding_that_looks_like_text_does_not_count():
    """The padding has the id of a token of the text, and its queries look about evenly, as they do in real models."""
    padded = torch.full((5, 5), 1 / 5)
    padded[2:] = torch.nn.functional.pad(uniform(3), (2, 0))
    short, long = scores_of([uniform(3)], [5, 6, 5]), scores_of([padded], [5, 5, 5, 6, 5], [0, 0, 1, 1, 1])
    assert {name: long[name] for name in MEASURES} == {name: pytest.approx(short[name]) for name in MEASURES}


# TransformerLens's own detector


@pytest.mark.parametrize("head", ["previous_token_head", "duplicate_token_head", "induction_head"])
def test_agrees_with_transformer_lens_head_detector(copier, head):
    """detect_head divides the same sum by all queries; ours by those that have a token to look at."""
    from transformer_lens.head_detector import detect_head

    text = "A B C D E F G H I J A B C D E F G H I J D D Q A"
    ids = copier.bridge.to_tokens(text)[0].tolist()  # not the tokenizer's: the bridge has its own idea of a BOS
    ours = head_scores(copier, left_padded([ids], copier.pad_token_id))[head.removesuffix("_head")][0]
    theirs = detect_head(copier.bridge, text, head)
    repeated = sum(token in ids[:query] for query, token in enumerate(ids))
    with_target = len(ids) - 1 if head == "previous_token_head" else repeated
    torch.testing.assert_close(ours * with_target / len(ids), theirs)


# Every architecture


def test_rows_sum_to_1_and_padding_is_0(model):
    batch = left_padded(ROWS, model.pad_token_id)
    patterns = attention_patterns(model, batch)
    assert patterns.shape == (3, 2, 4, 7, 7) and patterns.dtype == torch.float32
    for row, ids in enumerate(ROWS):
        first = 7 - len(ids)
        torch.testing.assert_close(patterns[row, ..., first:, :].sum(-1), torch.ones(2, 4, len(ids)))
        assert not patterns[row, ..., :first, :].any() and not patterns[row, ..., :first].any()


def test_a_padded_batch_equals_each_row_alone(model):
    together = head_scores(model, left_padded(ROWS, model.pad_token_id))
    patterns = attention_patterns(model, left_padded(ROWS, model.pad_token_id))
    assert list(together) == list(MEASURES)
    for row, ids in enumerate(ROWS):
        alone = left_padded([ids], model.pad_token_id)
        for measure, value in head_scores(model, alone).items():
            torch.testing.assert_close(together[measure][row], value[0], atol=1e-5, rtol=0, equal_nan=True)
        first = 7 - len(ids)
        expected = attention_patterns(model, alone)[0]
        torch.testing.assert_close(patterns[row, ..., first:, first:], expected, atol=1e-5, rtol=0)


def test_chosen_layers_in_their_order(copier):
    batch = repeated_random_tokens(copier, 2, 6, seed=0)
    torch.testing.assert_close(attention_patterns(copier, batch, [1, 0]), attention_patterns(copier, batch).flip(1))
    with pytest.raises(StoneyError, match=r"blocks\.2\.attn\.hook_pattern"):
        attention_patterns(copier, batch, [2])


def test_the_report_takes_one_forward_pass(copier, monkeypatch):
    passes = []
    original = copier.bridge.run_with_hooks
    monkeypatch.setattr(copier.bridge, "run_with_hooks", lambda *args, **kw: passes.append(1) or original(*args, **kw))
    head_scores(copier, repeated_random_tokens(copier, 2, 6, seed=0))
    assert len(passes) == 1


# By word


def test_by_word_by_hand():
    """Words of 1, 2 and 1 tokens. The second word's row: keys of (0.6, 0.4, 0) and (0.2, 0.3, 0.5), summed, then averaged."""
    pattern = torch.tensor([[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.2, 0.3, 0.4]])
    expected = torch.tensor([[1, 0, 0], [0.4, 0.6, 0], [0.1, 0.5, 0.4]])
    torch.testing.assert_close(by_word(pattern, [(0, 1), (1, 3), (3, 4)]), expected)


def test_words_spend_as_much_attention_as_tokens(model):
    patterns = attention_patterns(model, left_padded(ROWS, model.pad_token_id))
    assert by_word(patterns[0], [(0, 3), (3, 5), (5, 7)]).shape == (2, 4, 3, 3)
    for row, spans in enumerate([[(0, 3), (3, 5), (5, 7)], [(3, 4), (4, 7)], [(5, 6), (6, 7)]]):
        words = by_word(patterns[row], spans)
        torch.testing.assert_close(words.sum(-1), torch.ones(words.shape[:-1]))


def test_by_word_of_single_tokens_changes_nothing(copier):
    pattern = attention_patterns(copier, repeated_random_tokens(copier, 1, 4, seed=0))[0]
    torch.testing.assert_close(by_word(pattern, [(n, n + 1) for n in range(8)]), pattern)


@pytest.mark.parametrize(
    "spans",
    [[], [(0, 2), (3, 4)], [(0, 2), (1, 4)], [(0, 2), (2, 3)], [(0, 5)], [(0, 0), (0, 4)], [(-1, 4)], [(2, 4), (0, 2)]],
)
def test_spans_that_lose_attention_are_refused(spans):
    with pytest.raises(StoneyError, match="word spans must follow each other"):
        by_word(uniform(4), spans)


def test_words_that_leave_out_tokens_in_front_are_refused():
    with pytest.raises(StoneyError, match="tokens before it take part"):
        by_word(uniform(4), [(1, 4)])


# Repeated random tokens


def test_repeated_random_tokens(copier):
    batch = repeated_random_tokens(copier, 50, 20, seed=3)
    first, second = batch.ids.chunk(2, dim=1)
    assert torch.equal(first, second) and batch.mask.all()
    assert all(len(set(row)) == 20 for row in first.tolist())
    assert {token for row in first.tolist() for token in row} == set(range(2, 66))  # 0 and 1 are special
    assert torch.equal(batch.ids, repeated_random_tokens(copier, 50, 20, seed=3).ids)
    assert not torch.equal(batch.ids, repeated_random_tokens(copier, 50, 20, seed=4).ids)


@pytest.mark.parametrize(("n", "length"), [(1, 65), (1, 1), (0, 4)])
def test_repeats_that_cannot_be_made_are_refused(copier, n, length):
    with pytest.raises(StoneyError, match="at least 1 row of 2 to 64 tokens"):
        repeated_random_tokens(copier, n, length, seed=0)


def test_copy_accuracy_by_hand():
    """Second halves B C of (A B C A B C): one of two right, and both; what comes before does not count."""
    ids = torch.tensor([[1, 2, 3, 1, 2, 3]] * 2)
    predicted = torch.tensor([[0, 0, 0, 2, 0, 0], [0, 0, 0, 2, 3, 0]])
    logits = torch.nn.functional.one_hot(predicted, 4).float()
    assert copy_accuracy(logits, Batch(ids, torch.ones_like(ids))).tolist() == [0.5, 1.0]


# The model whose heads are known. Which head does what is told by what the model loses without it (stage.json), not by
# where the head looks: make_induction_model.py measured that, and test_interp_ablation.py measures it again.


@pytest.fixture(scope="module")
def found(copier):
    batch = repeated_random_tokens(copier, 32, 24, seed=7)
    return {measure: value.mean(0).flatten() for measure, value in head_scores(copier, batch).items()}


def test_the_fixture_is_complete_small_and_copies(copier):
    assert sum(file.stat().st_size for file in FIXTURE.iterdir()) < 600_000
    batch = repeated_random_tokens(copier, 64, 24, seed=7)
    assert copy_accuracy(copier.run(batch).logits, batch).mean() > 0.99
    assert read_stage(FIXTURE)["measured"]["accuracy"] > 0.99


def test_the_previous_token_head_is_found(found):
    lost = [head["accuracy_lost_without"] for head in read_stage(FIXTURE)["measured"]["heads"].values()]
    assert sum(loss > 0.5 for loss in lost) == 1
    assert roc_auc_score([loss > 0.5 for loss in lost], found["previous_token"]) == 1.0
    assert found["previous_token"][0] > 0.6 and found["previous_token"][1:].max() < 0.1


def test_induction_heads_are_found_in_layer_1(found):
    assert roc_auc_score([0] * 4 + [1] * 4, found["induction"]) == 1.0
    assert found["induction"][4:].min() > 0.6 and found["induction"][:4].max() < 0.1


@pytest.mark.parametrize("seed", range(4))
def test_no_heads_are_found_before_training(copier, seed):
    """Untrained heads look about evenly: a query at q spends 1 / (q + 1) on any one token."""
    fresh = random_hooked(copier, seed)
    report = head_scores(fresh, repeated_random_tokens(copier, 32, 24, seed=7))
    queries = torch.arange(24, 48)
    even = (1 / (queries + 1)).mean().item()
    assert report["induction"].mean(0).max() < 2 * even < 0.06
    assert report["previous_token"].mean(0).max() < 0.2
    assert report["entropy"].min() > 0.95
