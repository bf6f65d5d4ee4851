"""What a comparison says of its numbers: intervals, what would have been seen, sentences that say no more than they may."""

from types import SimpleNamespace

import numpy as np
import pytest

from stoney_rl.interp import verdicts
from stoney_rl.interp.analysis import Measured
from stoney_rl.interp.compare import Settings


def test_wilsons_interval_by_hand():
    """8 of 10, as in Newcombe 1998 (Statistics in Medicine 17, 857): 0.4902 to 0.9433."""
    found = verdicts._share_of(np.array([1.0] * 8 + [0.0] * 2), range(10))
    assert found == {
        "value": 0.8,
        "low": pytest.approx(0.4902, abs=1e-4),
        "high": pytest.approx(0.9433, abs=1e-4),
        "n": 10,
    }
    everything = verdicts._share_of(np.ones(10), range(10))
    assert everything["low"] == pytest.approx(0.7225, abs=1e-4) and everything["high"] == pytest.approx(1)


def test_what_would_have_been_seen_counts_clusters():
    values = np.array([1.0, 2.0, 3.0, 6.0])
    # Standard error sqrt(14 / 3 / 4), t of 3 degrees of freedom: 0.978 for 80 %, 3.182 for 5 % two-sided.
    alone = verdicts._detectable(values, list("abcd"))
    assert alone == pytest.approx((0.978 + 3.182) * (14 / 12) ** 0.5, abs=0.01)
    # Each value twice in one cluster says no more than once.
    assert verdicts._detectable(np.repeat(values, 2), list("aabbccdd")) == pytest.approx(alone)
    assert verdicts._detectable(np.ones(4), list("abcd")) is None and verdicts._detectable(values, list("aaaa")) is None


@pytest.mark.parametrize(
    ("low", "high", "bounds", "is_null"),
    [
        (0.1, 0.4, "[0.10, 0.40]", False),
        (-0.1, 0.4, "[-0.10, 0.40]", True),
        (0.1, None, "[0.10, ∞]", False),
        (-0.1, None, "[-0.10, ∞]", True),
        (None, -0.1, "[−∞, -0.10]", False),
        (None, None, "", False),
        (-0.001, 0.2, "[0.00, 0.20]", True),
    ],
)
def test_intervals_without_an_end(low, high, bounds, is_null):
    assert verdicts._bounds(low, high) == bounds
    said = verdicts._unseen({"low": low, "high": high, "detectable": 0.3}, ".2f")
    assert said == ("; 0.30 would have been seen" if is_null else "")


def shared(missing, interval, share=0.5):
    return SimpleNamespace(share=share, missing=missing, missing_interval=interval, correlation=0.5)


@pytest.fixture
def sentence(monkeypatch):
    monkeypatch.setattr(verdicts, "asdict", vars)

    def say(natural, cut, scrambled):
        found = {
            ("lexicon", "english"): natural, ("english_split", "lexicon"): cut,
            ("english", "english_split"): natural, ("lexicon", "lexicon_scrambled"): scrambled,
        }  # fmt: skip
        return verdicts.tokens_or_language(found)["answer"][0]

    return say


def test_a_difference_goes_with_the_tokens_only_where_cut_english_has_none(sentence):
    natural, none = shared(0.6, (0.55, 0.65)), shared(0.0, (-0.1, 0.1))
    whole = "so the difference goes with the tokens; nothing more is found, where 15% may be left"
    assert whole in sentence(natural, shared(0.05, (-0.05, 0.15)), none)
    partly = sentence(natural, shared(0.4, (0.35, 0.45)), none)
    assert whole not in partly and "a part of the difference goes with the tokens; 40% is left" in partly
    assert "nearer, but not apart by more than these pairs can show" in sentence(natural, shared(0.5, (0.4, 0.6)), none)


def test_nothing_is_said_of_the_words_without_an_interval(sentence):
    natural, cut = shared(0.6, (0.55, 0.65)), shared(0.0, (-0.1, 0.1))
    said = "which parts are used does not show that they are words"
    assert said in sentence(natural, cut, shared(0.0, (-0.1, 0.1)))
    assert said not in sentence(natural, cut, shared(0.0, None))
    assert said not in sentence(natural, cut, shared(0.3, (0.2, 0.4)))


def test_a_head_that_changed_less_than_between_seeds_has_not():
    noise = np.random.default_rng(0).normal(scale=0.02, size=(12, 1, 2)).astype(np.float32)

    def localised(first, second):
        heads = noise + np.array([[first, second]], dtype=np.float32)
        arrays = {"family/heads": heads, "family/mlps": heads[..., 0], "family/neurons": heads}
        return {"localise": Measured(arrays=arrays)}

    measured = {"earlier": localised(0, 0), "main": localised(1, 0.3), "twin": localised(1.1, 0.8)}
    floor = verdicts._between_seeds(measured, "main", "twin", "family")
    assert floor == pytest.approx(0.5, abs=0.01)  # the second head's; that of 'main' moved by 0.3
    pairs = [SimpleNamespace(cluster=str(n // 2)) for n in range(24)]
    plan = SimpleNamespace(choosing=lambda name: pairs, seed=0)

    def changed(least):
        return verdicts._units(plan, measured, None, ("earlier", "main"), "family", least)["changed"]

    assert (changed(0.0), changed(floor)) == (2, 1)


@pytest.mark.parametrize(
    ("cells", "draws", "said"),
    [
        (25, 100, "takes 5 of 25 cells at the least p"),  # 25 / 101 / 0.05 = 4.95
        (4, 100, "takes 1 of 4 cells at the least p"),
        (4, 10, "can't be reached"),  # p is 1/11 at least
    ],
)
def test_what_a_star_takes(cells, draws, said):
    assert said in verdicts._starred(
        dict.fromkeys(range(cells), "a cell"), SimpleNamespace(settings=Settings(draws=draws))
    )


def test_an_interaction_that_no_effect_could_reach_is_said_to_be_undecided():
    plan = SimpleNamespace(reference="lexicon")
    one = SimpleNamespace(value=0.1, low=-0.1, high=0.3, found=False, floor=1.4, detectable=1.5)
    assert "1.50 would have been seen, which is more than there can be" in verdicts._crossed(
        ("lexicon", "english"), one, plan
    )
    one.detectable = 0.5
    said = verdicts._crossed(("lexicon", "english"), one, plan)
    assert "0.50 would have been seen" in said and "more than there can be" not in said
