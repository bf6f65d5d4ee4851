"""chrF++, exact match, form accuracy, pass@k, the retrieval baseline and the report. Words like liẖtâlo are invented."""

import itertools
import json
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest

from stoney_rl import terminal
from stoney_rl.errors import StoneyError
from stoney_rl.metrics import chrf, comparison, exact, forms, measure, pass_at_k, report, retrieval, suite
from stoney_rl.metrics.score import Score, row_mean

METRICS = {name: suite.STRING_METRICS[name] for name in report.HEADLINE}

# (hypothesis, reference, chrF++): worked out by hand with the formula of Popović 2017, beta = 2, effective order.
BY_HAND = [
    ("tâlo", "tâlo", 100.0),
    ("abc", "xyz", 0.0),
    # characters 2/3, 1/2, 0; word 0: four orders, precision = recall = 7/24
    ("abc", "abd", 100 * 7 / 24),
    # characters 2/2 of 2/4 and 1/1 of 1/3, word 0: P = 2/3, R = 5/18, F = 5PR / (4P + R) = 50/159
    ("ab", "abab", 100 * 50 / 159),
    # the same pair the wrong way round: P = 5/18, R = 2/3, F = 25/48
    ("abab", "ab", 100 * 25 / 48),
    # no order that the hypothesis is long enough for: nothing to average, 0
    ("", "tâlo", 0.0),
]

# As printed by `sacrebleu -m chrf --chrf-word-order 2 -w 4` 2.6.0 for each pair on its own.
BY_SACREBLEU = [
    ("You say liẖtâlo.", "You say liẖtâlo.", 100.0),
    ("You say vuẖtâlo.", "You say liẖtâlo.", 56.8006),
    ("liẖtâlo", "The form is liẖtâlo, from tâlo.", 21.3361),
    ("tâtâlo tâtâlo tâtâlo", "tâtâlo", 60.2919),
    ("litalo", "liẖtâlo", 15.4307),
]


def sacrebleu_score(predictions, references):
    from sacrebleu.metrics import CHRF

    return CHRF(word_order=2).corpus_score(predictions, [references]).score


def sentences(n, seed=0):
    rng = random.Random(seed)
    letters = "aâeiîuûlvfmntḵẖṯ' -.\""
    return ["x" + "".join(rng.choice(letters) for _ in range(rng.randint(0, 60))) for _ in range(n)]


@pytest.mark.parametrize(("hypothesis", "reference", "expected"), BY_HAND)
def test_chrf_golden_by_hand(hypothesis, reference, expected):
    assert chrf.chrf(predictions=[hypothesis], references=[reference])["score"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("hypothesis", "reference", "expected"), BY_SACREBLEU)
def test_chrf_golden_by_sacrebleu(hypothesis, reference, expected):
    score = chrf.chrf(predictions=[hypothesis], references=[reference])["score"]
    assert round(score, 4) == expected
    assert score == sacrebleu_score([hypothesis], [reference])


def test_chrf_equals_sacrebleu_to_the_last_digit():
    predictions, references = sentences(80, seed=1), sentences(80, seed=2)
    predictions[3] = ""
    counts = chrf.statistics(predictions=predictions, references=references)
    assert counts.shape == (80, 24)
    for rows in (slice(None), slice(0, 1), slice(5, 31)):
        expected = sacrebleu_score(predictions[rows], references[rows])
        assert float(chrf.score_from_counts(counts[rows].sum(axis=0))) == expected
    by_row = chrf.score_from_counts(counts)
    assert by_row.tolist() == [sacrebleu_score([p], [r]) for p, r in zip(predictions, references, strict=True)]


def test_chrf_swapped_lists_score_differently_and_need_keywords():
    assert (
        chrf.chrf(predictions=["ab"], references=["abab"])["score"]
        != chrf.chrf(predictions=["abab"], references=["ab"])["score"]
    )
    with pytest.raises(TypeError):
        chrf.chrf(["ab"], ["abab"])


def test_chrf_normalises_both_sides():
    composed, decomposed = "liẖtâlo dada's", "lih\u0331ta\u0302lo dada\u2019s\u200b "
    assert composed != decomposed
    assert chrf.chrf(predictions=[decomposed], references=[composed])["score"] == 100.0
    assert chrf.chrf(predictions=["tâlo"], references=["talo"])["score"] < 60, "a diacritic is a different letter"
    assert chrf.chrf(predictions=["Tâlo"], references=["tâlo"])["score"] < 100, "case counts"


def test_chrf_signature_and_suspicion():
    found = chrf.chrf(predictions=["tâlo", "mîva"], references=["tâlo", "mîva"])
    assert found["suspicious"] is True
    assert found["n"] == 2
    assert found["signature"].startswith("chrF2++|nrefs:1|case:mixed|eff:yes|nc:6|nw:2|space:no|version:2.")
    assert found["signature"].endswith("|norm:nfc+apostrophe")
    assert chrf.chrf(predictions=["tâlo", "mîve"], references=["tâlo", "mîva"])["suspicious"] is False


@pytest.mark.parametrize(
    ("predictions", "references", "words"),
    [
        (["a", "b"], ["a"], "2 predictions but 1 references"),
        (["a", "b"], [["a", "b"]], "not sacreBLEU's list of reference streams"),
        (["a"], [["a"]], "references[0]: expected a string, got a list"),
        ([], [], "empty"),
        ("ab", ["a", "b"], "predictions: expected a list of strings"),
        (["a", None], ["a", "b"], "predictions[1]: expected a string, got NoneType"),
        (["a", "b"], ["a", 3], "references[1]: expected a string, got int"),
        (["a", "b"], ["a", " \u200b"], "references[1] is empty"),
        (iter(["a"]), ["a"], "expected a list"),
    ],
)
@pytest.mark.parametrize("metric", [chrf.chrf, exact.exact_match])
def test_bad_lists_are_refused(metric, predictions, references, words):
    with pytest.raises(StoneyError) as error:
        metric(predictions=predictions, references=references)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_exact_match():
    values = exact.exact_match(
        predictions=["ta\u0302lo ", "tâlo.", "Tâlo", "talo", ""], references=["tâlo", "tâlo", "tâlo", "tâlo", "tâlo"]
    )
    assert values == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_form_accuracy_is_a_share_and_none_where_nothing_is_asked():
    values = forms.form_accuracy(
        predictions=[
            'You say "liẖtâlo".',  # asked form, whole word
            "liẖtâloṯel",  # only inside a longer word
            "tâlo and mîva",  # one of two
            "litalo",  # diacritics dropped
            "tâlo tâlo",  # asked twice, counts once: one of two
            "anything",
            "anything",
            "",
        ],
        targets=[["liẖtâlo"], ["liẖtâlo"], ["tâlo", "nûfe"], ["liẖtâlo"], ["tâlo", "Tâlo", "mîva"], [], None, ["tâlo"]],
    )
    assert values == [1.0, 0.0, 0.5, 0.0, 0.5, None, None, 0.0]
    assert forms.count_unscored(values) == 2


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ([["a"], ["b"]], "1 predictions but 2 lists"),
        (["tâlo"], "targets[0]: expected a list of forms or None, got str"),
        ([["tâlo", " "]], "expected forms with letters, got ' '"),
        ([["7"]], "expected forms with letters"),
    ],
)
def test_form_accuracy_refuses(targets, words):
    with pytest.raises(StoneyError) as error:
        forms.form_accuracy(predictions=["tâlo"], targets=targets)
    assert words in str(error.value)


# An invented language of two rules: I = liẖ-, they = -ṯel.
STEMS = {"gather": "tâlo", "swim": "mîva", "carry": "nûfe", "whistle": "bâliva", "dig": "zîlo", "hum": "kûfa"}
NEW_STEMS = {"weave": "gâfo", "float": "jîlu", "bend": "pûvi", "spin": "dâle"}


def planted_rows(stems):
    return [
        SimpleNamespace(question=f'The stem for "{gloss}" is {stem}. How do you say "{who} {gloss}"?', answer=form)
        for gloss, stem in stems.items()
        for who, form in (("I", "liẖ" + stem), ("they", stem + "ṯel"))
    ]


def test_retrieval_remembers_training_rows_and_knows_no_rule():
    train, unseen = planted_rows(STEMS), planted_rows(NEW_STEMS)
    for rows, expected in ((train, 1.0), (unseen, 0.0)):
        answers = retrieval.retrieve_answers(train, [row.question for row in rows])
        hits = forms.form_accuracy(predictions=answers, targets=[[row.answer] for row in rows])
        assert sum(hits) / len(hits) == expected


def test_retrieval_takes_chat_messages_ties_and_strangers():
    train = [SimpleNamespace(question="same words", answer=answer) for answer in ("first", "second")]
    train.append(SimpleNamespace(question="other things", answer="third"))
    chat = [
        {"role": "user", "content": "other things"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "same words"},
    ]
    assert retrieval.retrieve_answers(train, [chat, "Same words!", "the other thing", "ûûûû", ""]) == [
        "first",
        "first",
        "third",
        "",
        "",
    ]
    assert retrieval.retrieve_answers(train, []) == []
    many = ["same words", "other things"] * 100  # more than one block
    assert retrieval.retrieve_answers(train, many) == ["first", "third"] * 100
    with pytest.raises(StoneyError, match="no training rows"):
        retrieval.retrieve_answers([], ["a"])
    with pytest.raises(StoneyError, match="user message"):
        retrieval.retrieve_answers(train, [[{"role": "assistant", "content": "ok"}]])


def prediction_rows(n=48, right=lambda index: False, seen=lambda index: index % 2 == 0):
    """Two rows for each of n / 2 invented lexemes; ``right`` rows carry the reference, others the bare stem."""
    rows = []
    for index in range(n):
        stem = "tâ" + "bdfgklmnpstvz"[index // 2 % 13] + "aeiou"[index // 26 % 5]
        reference = f"You say liẖ{stem}."
        rows.append(
            {
                "id": f"r{index}",
                "prompt": [{"role": "user", "content": f"The stem is {stem}. How do you say I?"}],
                "reference": reference,
                "prediction": reference if right(index) else f"You say {stem}.",
                "seen": seen(index),
                "forms": [f"liẖ{stem}"],
                "lexemes": [stem],
            }
        )
    return rows


def score(rows, *, seed=0, resamples=200, **more):
    """The scores of rows by the three headline metrics, and by ``more``: name -> Score."""
    scores = suite.score_rows(METRICS, rows) if rows else {}
    return comparison.score(comparison.table("tuned", rows, scores | more), seed=seed, resamples=resamples)


def test_score_groups_values_and_signatures():
    rows = prediction_rows(48, right=lambda index: index % 2 == 0)
    results = score(rows, seed=3, resamples=500)
    assert results["group_sizes"] == {"all": 48, "seen": 24, "unseen": 24}
    values = {group: {m: e["value"] for m, e in table.items()} for group, table in results["groups"].items()}
    assert values["seen"] == {"chrf": 100.0, "exact": 1.0, "form": 1.0}
    assert values["unseen"]["exact"] == values["unseen"]["form"] == 0.0
    assert values["all"]["exact"] == 0.5
    wrong = [row for row in rows if row["seen"] is False]
    assert values["unseen"]["chrf"] == sacrebleu_score(
        [row["prediction"] for row in wrong], [row["reference"] for row in wrong]
    )
    entry = results["groups"]["unseen"]["exact"]
    assert entry["n"] == 24
    assert entry["units"] == 24
    assert entry["low"] == 0.0
    assert entry["high"] == pytest.approx(1 - 0.025 ** (1 / 24)), "none of 24 right is not certainty"
    assert results["groups"]["all"]["exact"]["units"] == 24, "two rows of one lexeme are one unit"
    for metric, entry in results["groups"]["all"].items():
        assert entry["signature"].endswith("by:lexeme|bs:500|seed:3"), metric
        assert entry["low"] <= entry["value"] <= entry["high"]
    assert results == score(rows, seed=3, resamples=500)
    assert json.loads(json.dumps(results)) == results


def test_score_counts_what_it_cannot_score():
    rows = prediction_rows(20, right=lambda index: True)
    rows[0]["prediction"] = None
    rows[1]["reference"] = "\u200b"
    rows[2]["forms"] = []
    rows[3]["prediction"] = ""
    rows[4]["seen"] = None
    table = score(rows)["groups"]
    counted = {metric: (entry["n"], entry["unscored"]) for metric, entry in table["all"].items()}
    assert counted == {"chrf": (18, 2), "exact": (18, 2), "form": (17, 3)}
    assert table["all"]["exact"]["value"] == pytest.approx(17 / 18), "an empty answer is a wrong answer"
    assert table["seen"]["exact"]["n"] + table["unseen"]["exact"]["n"] == 17


def test_a_metric_of_the_whole_set_has_a_spread_and_no_groups():
    rows = prediction_rows(8)
    mauve = Score(0.9, (), 8, 0, "MAUVE|seeds:5", "biased: too few", (0.85, 0.93))
    results = score(rows, mauve=mauve)
    entry = results["groups"]["all"]["mauve"]
    assert (entry["value"], entry["spread"], entry["low"], entry["signature"]) == (
        0.9,
        [0.85, 0.93],
        None,
        "MAUVE|seeds:5",
    )
    assert not {"mauve"} & {*results["groups"]["seen"], *results["groups"]["unseen"]}
    table = report.metric_table({"base": results, "tuned": results}, width=200)
    assert "MAUVE          all     8  0        0.90 {0.85, 0.93}" in table
    assert "MAUVE, base, tuned: biased: too few." in table, "a note that all share is told once"
    assert "{a, b}: the least and the greatest value over the metric's own seeds" in table


def test_score_with_nothing_to_score_says_none():
    rows = [row | {"prediction": None} for row in prediction_rows(4)]
    entry = score(rows)["groups"]["all"]["chrf"]
    assert (entry["value"], entry["low"], entry["n"], entry["unscored"]) == (None, None, 0, 4)
    only_seen = score(prediction_rows(4, seen=lambda index: True))
    assert only_seen["groups"]["unseen"]["exact"]["value"] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[1].pop("seen"), "predictions[1]: no seen"),
        (lambda rows: rows[1].update(id="r0"), "the id is there twice"),
        (lambda rows: rows[1].update(prediction=["tâlo"]), "prediction: expected a string or None, got list"),
        (lambda rows: rows[1].update(reference=None), "reference: expected a string, got NoneType"),
        (lambda rows: rows[1].update(seen="no"), "seen: expected true, false or null, got 'no'"),
        (lambda rows: rows[1].update(forms="tâlo"), "forms: expected a list of forms or None, got str"),
        (lambda rows: rows[1].update(lexemes="tâlo"), "lexemes: expected a list of strings"),
        (lambda rows: rows.clear(), "'tuned' has no rows"),
    ],
)
def test_score_refuses(change, words):
    rows = prediction_rows(4)
    scores = suite.score_rows(METRICS, rows)
    change(rows)
    with pytest.raises(StoneyError) as error:
        comparison.table("tuned", rows, scores)
    assert words in str(error.value)


def test_lexeme_clusters_join_through_shared_forms():
    labels = report.lexeme_clusters(
        [["tâlo"], ["mîva", "TA\u0302LO"], [], ["nûfe"], ["nûfe", "mîva"], None, [""], [""]]
    )
    assert labels == [0, 0, 2, 0, 0, 5, 6, 7]


def test_examples_refuse_other_rows():
    def examples(tuned):
        return report.examples_table({"base": prediction_rows(6), "tuned": tuned}, width=80)

    with pytest.raises(StoneyError, match=r"1 rows of 'base' have no prediction of 'tuned' \(first id: 'r5'\)"):
        examples(prediction_rows(5))
    with pytest.raises(StoneyError, match="1 rows of 'tuned' have no prediction of 'base'"):
        examples([*prediction_rows(6), prediction_rows(7)[6]])
    other = prediction_rows(6)
    other[2]["reference"] = "You say mîva."
    with pytest.raises(StoneyError, match="row 'r2': reference differs"):
        examples(other)


def three_systems(n=48):
    systems = {
        "base": prediction_rows(n),
        "tuned": prediction_rows(n, right=lambda index: index % 3 != 0),
        "retrieval": prediction_rows(n, right=lambda index: index % 4 == 0),
    }
    return systems, {name: score(rows, resamples=300) for name, rows in systems.items()}


@pytest.mark.parametrize("width", [78, 106, 150])
def test_metric_table(width):
    _, results = three_systems()
    table = report.metric_table(results, width=width)
    lines = table.splitlines()
    header = lines[0].split()
    assert header == ["metric", "rows", "n", "lexemes", "base", "tuned", "retrieval"]
    entry = results["tuned"]["groups"]["unseen"]["form"]
    interval = f"[{entry['low']:.2f}, {entry['high']:.2f}]"
    assert (f"{entry['value']:.2f} {interval}" in table) == (width > 78)
    assert interval in table
    assert "another training seed is not covered" in " ".join(table.split())
    assert all(terminal.display_width(line) <= width or "|" in line for line in lines)
    assert lines[-3:] == [entry["signature"] for entry in results["base"]["groups"]["all"].values()]


def test_metric_table_reports_unscored_suspicious_and_other_rows():
    rows = prediction_rows(20, right=lambda index: True)
    rows[0]["prediction"] = None
    rows[1]["forms"] = None
    table = report.metric_table({"tuned": score(rows)}, width=120)
    assert "tuned: rows without a score, of 20: chrF++ 1, exact match 1, form accuracy 2." in table
    assert "were the references passed as predictions?" in table
    results = {str(n): score(prediction_rows(n)) for n in (4, 6)}
    with pytest.raises(StoneyError, match="scored on other rows"):
        report.metric_table(results)


def test_examples_table_marks_wraps_and_is_not_picked_by_score():
    systems, _ = three_systems()
    systems["tuned"][1]["prediction"] = None
    for rows in systems.values():
        for row in rows:
            row["prompt"] = "ques\u0331tion word " * 30
    text = report.examples_table(systems, n=10, seed=1, width=60)
    assert text.startswith("10 of 48 test rows, drawn at random (seed 1).")
    assert text.count("expected") == 10
    assert text.count("its words were never trained on") == 5
    assert all(terminal.display_width(line) <= 60 for line in text.splitlines())
    assert "✓ You say liẖ" in text
    assert "✗ You say tâ" in text
    assert text.count("…") == 10
    every = report.examples_table(systems, n=100, width=60)
    assert every.count("expected") == 48
    assert "? (no answer)" in every
    shuffled = {name: list(reversed(rows)) for name, rows in systems.items() if name != "base"}
    assert report.examples_table({"base": systems["base"], **shuffled}, n=10, seed=1, width=60) == text


def test_marks():
    assert [report._mark(*pair) for pair in [(1.0, 0.0), (0.0, 1.0), (0.0, 0.5)]] == ["✗", "✓", "~"]
    assert report._mark(1.0, None) == "✓"
    assert report._mark(None, None) == "?"


# pass@k.


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_one(n):
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [1] * right + [0] * (n - right)
        draws = list(itertools.combinations(samples, k))
        assert pass_at_k.pass_at_k(n, right, k) == pytest.approx(sum(map(max, draws)) / len(draws))


def test_pass_at_k_is_unbiased():
    """Ten samples, each right with probability 0.3: on average the estimate is the chance that one of four is."""
    rng = random.Random(0)
    counts = [sum(rng.random() < 0.3 for _ in range(10)) for _ in range(20_000)]
    mean = sum(pass_at_k.pass_at_k(10, right, 4) for right in counts) / len(counts)
    assert mean == pytest.approx(1 - 0.7**4, abs=0.005)
    plain = sum(1 - (1 - right / 10) ** 4 for right in counts) / len(counts)
    assert plain < mean - 0.02, "the plain plug-in estimate is too low"


def test_pass_at_k_of_rows():
    rows = prediction_rows(4)
    for row, right in zip(rows, (0, 1, 3, 3), strict=True):
        texts = [row["reference"] if number < right else "You say liẖ." for number in range(3)]
        row["samples"] = {"temperature": 0.8, "texts": texts}
    rows[3]["forms"] = None
    scores = pass_at_k.scores(rows)
    assert list(scores) == ["pass@1", "pass@2", "pass@3"]
    assert scores["pass@1"].rows == (0.0, pytest.approx(1 / 3), 1.0, None)
    assert scores["pass@2"].rows == (0.0, pytest.approx(2 / 3), 1.0, None)
    assert (scores["pass@3"].value, scores["pass@3"].n, scores["pass@3"].unscored) == (pytest.approx(2 / 3), 3, 1)
    assert scores["pass@2"].signature.startswith("pass@2|samples:3|temperature:0.8|right:all-forms|")
    rows[2]["forms"] = [*rows[2]["forms"], "mîva"]
    assert pass_at_k.scores(rows)["pass@1"].rows[2] == 0, "right is every asked form"
    assert pass_at_k.scores(prediction_rows(4)) == {}
    rows[0]["samples"]["texts"].append("liẖ")
    with pytest.raises(StoneyError, match="different samples"):
        pass_at_k.scores(rows)
    with pytest.raises(StoneyError, match="pass@4: expected 1 to 3 of the 3 samples"):
        pass_at_k.pass_at_k(3, 1, 4)


# The same numbers again.


def test_differences_name_the_place_and_pass_over_rounding_and_time():
    recorded = {"a": [1.0, {"b": 2, "c": None}], "seconds_per_1000": 5, "n": 3, "d": True}
    assert measure.differences(recorded, {"a": (1.0 + 1e-9, {"b": 2, "c": None}), "n": 3, "d": True}) == []
    changed = {"a": [1.0, {"b": 2.1, "c": 0.0}], "n": 3, "d": 1.5}
    assert measure.differences(recorded, changed) == [
        "a[1].b: recorded 2, now 2.1",
        "a[1].c: recorded null, now 0.0",
        "d: recorded true, now 1.5",
    ]
    assert measure.differences({"a": [1]}, {"a": [1, 2]}) == ["a: recorded [1], now [1, 2]"]
    assert measure.differences({"a": 1}, {"b": 1}) == ["a: recorded 1, now null", "b: recorded null, now 1"]


def test_a_metric_whose_model_fails_is_left_out_of_every_system(capsys):
    rows = prediction_rows(24)

    class Failing:
        def __init__(self, calls):
            self.left = calls

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __call__(self, predictions, gold):
            self.left -= 1
            if self.left < 0:
                raise StoneyError("COMET m: the worker was killed (SIGKILL)")
            return row_mean([1.0] * len(predictions), "comet")

    def numbers(calls):
        options = {"seed": 0, "resamples": 200, "validate": False}
        return measure.measure({"b": rows, "a": rows}, [], {"comet": lambda: Failing(calls)}, **options)[0]

    whole, failed = numbers(2), numbers(1)
    assert whole["unavailable"] == {} and "comet" in whole["systems"]["a"]["groups"]["unseen"]
    assert failed["unavailable"] == {"comet": "COMET m: the worker was killed (SIGKILL)"}
    assert "the worker was killed" in capsys.readouterr().out
    for system in ("a", "b"):
        del whole["systems"][system]["groups"]["all"]["comet"]
        assert failed["systems"][system]["groups"]["all"] == whole["systems"][system]["groups"]["all"]
    assert failed["comparison"]["systems"] == ["a", "b"] and failed["errors"] == {}


def test_wrap_counts_columns_not_code_points():
    assert terminal.wrap("x\u0331y\u0331 z\u0331w\u0331", 5) == ["x\u0331y\u0331 z\u0331w\u0331"]
    assert terminal.wrap("x\u0331y\u0331z\u0331w\u0331", 2) == ["x\u0331y\u0331", "z\u0331w\u0331"]
    assert terminal.wrap("ab cd\nef", 5) == ["ab cd", "ef"]
    assert terminal.wrap("", 5) == [""]
    assert terminal.wrap("ab cd", 2, hanging="") == ["ab", "cd"]
    assert terminal.cut("ab cd ef gh", 5, 1) == ["ab …"]
    assert terminal.display_width("語a") == 3


def test_plot_is_whole_or_absent(tmp_path):
    _, results = three_systems()
    path = report.plot(results, tmp_path / "scores.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert [file.name for file in tmp_path.iterdir()] == ["scores.png"]
    with pytest.raises(StoneyError, match="can't write"):
        report.plot(results, tmp_path / "nowhere" / "scores.png")
    unscored = score([row | {"prediction": None} for row in prediction_rows(4)])
    assert report.plot({"tuned": unscored}, tmp_path / "none.png").exists()


def test_importing_metrics_loads_nothing_heavy():
    code = (
        "import sys, stoney_rl.metrics.report, stoney_rl.metrics.retrieval, stoney_rl.metrics.intervals;"
        "print([m for m in ('numpy', 'scipy', 'sklearn', 'sacrebleu', 'matplotlib', 'torch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
