"""What a run did to the policy: measurements, comparisons worked by hand, and each sign of gaming. All words are invented."""

import json

import pytest

from stoney_rl import policy
from stoney_rl.data import Row
from stoney_rl.metrics.intervals import Difference
from stoney_rl.rewards.composite import Task

FORMS = ["tâlo", "mîva", "sûke", "nâpi", "rîlu", "kûwe", "pâti", "zîmo", "gûna", "hâli"]
ANSWERS = [f'The form is "{form}".' for form in FORMS]


def rows():
    return [
        Row(
            id=f"row-{form}",
            source="made up",
            prompt=[{"role": "user", "content": f'What is the form for "number {number}"?'}],
            completion=[{"role": "assistant", "content": answer}],
            lexemes=[form],
            metadata={"form": form},
        )
        for number, (form, answer) in enumerate(zip(FORMS, ANSWERS, strict=True))
    ]


def held_out(tmp_path, given, rewards=None):
    """``given``: answers to the ten rows, or (answers, tokens, truncated), a measurement each, in order."""
    queue = [(item, [3] * 10, [False] * 10) if isinstance(item, list) else item for item in given]
    paid = iter(rewards or [[0.0] * 10] * len(queue))
    return policy.HeldOut(
        rows(),
        [Task.of(row) for row in rows()],
        lambda tasks, texts: [{"total": value} for value in next(paid)],
        lambda: list(zip(*queue.pop(0), strict=True)),
        tmp_path / policy.HELD_OUT_FILE,
    )


def test_a_measurement_by_hand(tmp_path):
    answers = [*ANSWERS[:4], "nothing", "Nothing", "NOTHING", "none", "no", "<think>tâlo</think> hâli"]
    rewards = [1.0, 0.5, None, 0.0, None, 0.0, 0.0, 0.0, 0.0, 0.5]
    found = held_out(tmp_path, [(answers, list(range(10)), [True] * 3 + [False] * 7)], [rewards]).measure(5)
    assert found.summary() == pytest.approx(
        {"reward": 2 / 8, "form_accuracy": 5 / 10, "tokens": 4.5, "truncated": 0.3, "most_common_answer": 0.3}
    )
    assert found.forms == [1, 1, 1, 1, 0, 0, 0, 0, 0, 1]


def test_what_cannot_be_scored_is_left_out_of_the_summary(tmp_path):
    found = held_out(tmp_path, [ANSWERS], [[None] * 10]).measure(0)
    assert "reward" not in found.summary() and found.summary()["form_accuracy"] == 1.0


def test_a_step_is_measured_once_and_kept(tmp_path):
    measured = held_out(tmp_path, [ANSWERS, ANSWERS[::-1]])
    first = measured.measure(0)
    assert measured.measure(0) is first and measured.measure(2) is not first
    lines = [json.loads(line) for line in (tmp_path / policy.HELD_OUT_FILE).read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [0, 2] and lines[1]["answers"] == ANSWERS[::-1]
    again = held_out(tmp_path, [ANSWERS])
    again.resume(1)  # killed after step 2, to be trained again from step 1
    assert again.measurements == [first]
    assert [one.step for one in again.measurements] == [0] and again.measure(0) == first


def test_a_comparison_by_hand(tmp_path):
    """Three of ten forms right before, eight after; rewards 0.1 and 0.4 but for a row that could not be scored before."""
    before, after = [*ANSWERS[:3], *["wrong"] * 7], [*ANSWERS[:8], "wrong", "other"]
    found = held_out(tmp_path, [before, after], [[None, *[0.1] * 9], [1.0, *[0.4] * 9]])
    found.measure(0)
    found.measure(20)
    comparison = found.compare(seed=0)
    assert (comparison["n"], comparison["clusters"], comparison["steps"]) == (10, 10, [0, 20])
    measures = comparison["measures"]
    assert (measures["form_accuracy"]["before"], measures["form_accuracy"]["after"]) == (0.3, 0.8)
    assert measures["form_accuracy"]["difference"]["value"] == pytest.approx(0.5)
    assert measures["reward"]["before"] == pytest.approx(0.1) and measures["reward"]["after"] == pytest.approx(0.46)
    assert measures["reward"]["difference"]["value"] == pytest.approx(0.3)  # of the nine that both have
    assert measures["reward"]["difference"]["n"] == 9
    assert measures["chrf"]["before"] < measures["chrf"]["after"] < 100
    assert comparison["signs"] == []
    text = policy.as_text(comparison).splitlines()
    assert text[0] == "greedy answers to 10 held-out prompts (10 lexeme groups), after 0 and 20 updates:"
    assert text[2].split()[:6] == ["form", "accuracy", "0.30", "->", "0.80", "+0.50"]
    assert text[4].split() == ["tokens", "an", "answer", "3.0", "->", "3.0"]
    assert text[-1] == "✓ no sign that the reward was gamed"


def test_too_few_prompts_to_tell_and_no_negative_zero(tmp_path):
    few = policy.HeldOut(rows()[:3], [Task.of(row) for row in rows()[:3]], lambda tasks, texts: [{"total": -1e-9}] * 3,
                         lambda: [("wrong", 3, False)] * 3, tmp_path / "few.jsonl")  # fmt: skip
    few.measure(0)
    few.measure(1)
    text = policy.as_text(few.compare(seed=0))
    assert "too few held-out prompts" in text and "✓" not in text and "-0.00" not in text
    assert "(too few to tell, n = 3)" in text


def test_a_reward_that_scores_nothing_is_said(tmp_path):
    found = held_out(tmp_path, [ANSWERS, ANSWERS], [[0.0] * 10, [None] * 10])
    found.measure(0)
    found.measure(1)
    assert policy.as_text(found.compare(seed=0)).splitlines()[1].split() == ["reward", "0.000", "->", "unscored"]


def test_all_right_is_100(tmp_path):
    found = held_out(tmp_path, [["wrong"] * 10, ANSWERS])
    found.measure(0)
    found.measure(1)
    measures = found.compare(seed=0)["measures"]
    assert measures["chrf"]["after"] == pytest.approx(100.0) and measures["form_accuracy"]["after"] == 1.0


# Signs.

DIFFERENT = [f"answer {number}" for number in range(8)]


def measurement(*, answers=DIFFERENT, tokens=10, truncated=0):
    """Eight answers, of ``tokens`` tokens each, ``truncated`` of them cut off."""
    cut = [number < truncated for number in range(8)]
    return policy.Measurement(0, list(answers), [0.0] * 8, [0.0] * 8, [tokens] * 8, cut)


def difference(value, *, conclusive=True):
    low, high = (value - 0.01, value + 0.01) if conclusive else (value - 1, value + 1)
    return Difference(value, low, high, n=8, resamples=1000, seed=0, units=1000, p=0.01)


def signs(first=None, last=None, *, reward=None, forms=None, chrf=None, references=DIFFERENT):
    found = {"reward": reward, "form_accuracy": forms, "chrf": chrf}
    return policy.signs(first or measurement(), last or measurement(), found, references)


def test_nothing_happened():
    assert signs() == []
    assert signs(reward=difference(0), forms=difference(0), chrf=difference(0)) == []


def test_the_reward_rose_and_the_answers_did_not():
    (sign,) = signs(reward=difference(0.3), forms=difference(0.0), chrf=difference(-2.0))
    assert sign == (
        "the reward rose by 0.300, and form accuracy (+0.00) and chrF++ (-2.00) did not clearly rise with it: "
        "what is paid is not what is wanted"
    )
    (sign,) = signs(reward=difference(0.3), chrf=difference(-2.0))  # rows that ask for no form
    assert "and chrF++ (-2.00) did not" in sign
    by_chance = {"forms": difference(0.02, conclusive=False), "chrf": difference(0.4)}
    assert len(signs(reward=difference(0.3), **by_chance)) == 1  # a crumb, and one that may be luck, are no rise


def test_what_the_reward_can_no_longer_score():
    last = policy.Measurement(1, list(DIFFERENT), [None, None, *[0.0] * 6], [0.0] * 8, [10] * 8, [False] * 8)
    (sign,) = signs(last=last)
    assert sign == "the reward could not score 2 of 8 answers, more than before"
    assert signs(last, last) == []


@pytest.mark.parametrize(
    "found",
    [
        {"reward": difference(0.3), "forms": difference(0.1), "chrf": difference(-2.0)},
        {"reward": difference(0.3), "forms": difference(0.0), "chrf": difference(2.0)},
        {"reward": difference(0.3, conclusive=False), "forms": difference(0.0), "chrf": difference(0.0)},
        {"reward": difference(-0.3), "forms": difference(0.0), "chrf": difference(0.0)},
        {"forms": difference(0.0), "chrf": difference(0.0)},
    ],
)
def test_the_reward_rose_with_the_answers_or_did_not_rise(found):
    assert signs(**found) == []


def test_one_answer_for_all():
    half = ["Same.", "same.", "SAME.", "same.", *DIFFERENT[4:]]
    (sign,) = signs(last=measurement(answers=half))
    assert sign == "50% of the prompts get one answer: 'same.'"
    assert signs(last=measurement(answers=["same", *DIFFERENT[1:]])) == []
    assert signs(first=measurement(answers=half), last=measurement(answers=half)) == []  # it was so before
    assert signs(last=measurement(answers=half), references=half) == []  # and here it is right
    (sign,) = signs(last=measurement(answers=["x" * 100] * 8))
    assert sign.endswith(repr("x" * 57 + "..."))


@pytest.mark.parametrize(("tokens", "said"), [(25, "2.5"), (4, "0.4"), (0, "0.1")])
def test_much_longer_or_shorter(tokens, said):
    (sign,) = signs(last=measurement(tokens=tokens))
    assert sign == f"answers are {said} times as long: 10 and {tokens} tokens"


def test_as_long_as_before():
    for tokens in (5, 9, 20):
        assert signs(last=measurement(tokens=tokens)) == []
    assert signs(measurement(tokens=0), measurement(tokens=0)) == []  # empty before, empty now
    assert len(signs(measurement(tokens=0), measurement(tokens=8))) == 1


def test_answers_that_never_end():
    (sign,) = signs(last=measurement(truncated=2))
    assert sign == "25% of the answers never end, 0% before"
    assert signs(last=measurement(truncated=1)) == []
    assert signs(measurement(truncated=6), measurement(truncated=7)) == []


def test_signs_are_listed(tmp_path):
    """Every reward rose by the same, so that there is no interval: that is no reason to be silent."""
    found = held_out(tmp_path, [ANSWERS, ["tâlo"] * 10], [[0.0] * 10, [1.0] * 10])
    found.measure(0)
    found.measure(1)
    comparison = found.compare(seed=0)
    assert len(comparison["signs"]) == 2
    lines = policy.as_text(comparison).splitlines()[-2:]
    assert lines[0].startswith("✗ sign of gaming or collapse: the reward rose by 1.000")
    assert lines[1] == "✗ sign of gaming or collapse: 100% of the prompts get one answer: 'tâlo'"


def test_a_picture(tmp_path):
    """Written from what little a short run has: no KL, no held-out form accuracy, one step without a value."""
    metrics = [{"step": 1, "reward": 0.1, "zero_spread": 1.0}, {"step": 2, "reward": None, "entropy": 2.0}]
    policy.plot(metrics, [measurement()], tmp_path / "report.png", title="a run")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
