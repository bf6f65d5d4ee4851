"""chrF++, exact match, form accuracy, the retrieval baseline and the report. Words like liẖtâlo are invented."""

import json
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest

from stoney_rl import terminal
from stoney_rl.errors import StoneyError
from stoney_rl.metrics import chrf, exact, forms, report, retrieval

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


def test_score_groups_values_and_signatures():
    rows = prediction_rows(48, right=lambda index: index % 2 == 0)
    results = report.score(rows, seed=3, resamples=500)
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
    assert results["suspicious"] is False
    assert results == report.score(rows, seed=3, resamples=500)
    assert json.loads(json.dumps(results)) == results


def test_score_counts_what_it_cannot_score():
    rows = prediction_rows(20, right=lambda index: True)
    rows[0]["prediction"] = None
    rows[1]["reference"] = "\u200b"
    rows[2]["forms"] = []
    rows[3]["prediction"] = ""
    rows[4]["seen"] = None
    table = report.score(rows, seed=0, resamples=200)["groups"]
    counted = {metric: (entry["n"], entry["unscored"]) for metric, entry in table["all"].items()}
    assert counted == {"chrf": (18, 2), "exact": (18, 2), "form": (17, 3)}
    assert table["all"]["exact"]["value"] == pytest.approx(17 / 18), "an empty answer is a wrong answer"
    assert table["seen"]["exact"]["n"] + table["unseen"]["exact"]["n"] == 17
    by_row = report.score_rows(rows)
    assert by_row[0] == {"id": "r0", "chrf": None, "exact": None, "form": None}
    assert by_row[2] == {"id": "r2", "chrf": 100.0, "exact": 1.0, "form": None}
    assert by_row[3] == {"id": "r3", "chrf": 0.0, "exact": 0.0, "form": 0.0}


def test_score_with_nothing_to_score_says_none():
    rows = [row | {"prediction": None} for row in prediction_rows(4)]
    entry = report.score(rows, seed=0, resamples=200)["groups"]["all"]["chrf"]
    assert (entry["value"], entry["low"], entry["n"], entry["unscored"]) == (None, None, 0, 4)
    only_seen = report.score(prediction_rows(4, seen=lambda index: True), seed=0, resamples=200)
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
        (lambda rows: rows.clear(), "expected a list of rows with at least one row"),
    ],
)
def test_score_refuses(change, words):
    rows = prediction_rows(4)
    change(rows)
    with pytest.raises(StoneyError) as error:
        report.score(rows, seed=0, resamples=200)
    assert words in str(error.value)


def test_lexeme_clusters_join_through_shared_forms():
    labels = report.lexeme_clusters(
        [["tâlo"], ["mîva", "TA\u0302LO"], [], ["nûfe"], ["nûfe", "mîva"], None, [""], [""]]
    )
    assert labels == [0, 0, 2, 0, 0, 5, 6, 7]


def test_compare_and_verdict_better_worse_and_unclear():
    base = prediction_rows(96)
    tuned = prediction_rows(96, right=lambda index: index % 3 != 0)
    better = report.compare(base, list(reversed(tuned)), seed=0, resamples=1000)
    entry = better["groups"]["unseen"]["form"]
    assert entry["difference"] == pytest.approx(32 / 48)
    assert 0.45 < entry["low"] < entry["difference"] < entry["high"] < 0.85
    assert entry["conclusive"] is True
    assert entry["p"] <= 2 * 2 / 1001
    chrf_entry = better["groups"]["unseen"]["chrf"]
    unseen = [[row for row in rows if row["seen"] is False] for rows in (base, tuned)]
    expected = [sacrebleu_score([r["prediction"] for r in rows], [r["reference"] for r in rows]) for rows in unseen]
    assert chrf_entry["difference"] == expected[1] - expected[0]
    sentence = report.verdict(better)
    assert sentence.startswith("On lexemes never trained on, tuned is better than base by ")
    assert f"{chrf_entry['difference']:.1f} chrF++ points (95% interval {chrf_entry['low']:.1f} to " in sentence
    assert sentence.endswith("n = 48): the difference is not chance.")

    worse = report.compare(tuned, base, seed=0, resamples=1000)
    mirrored = worse["groups"]["unseen"]["form"]
    assert (mirrored["difference"], mirrored["low"], mirrored["high"]) == pytest.approx(
        (-entry["difference"], -entry["high"], -entry["low"])
    )
    low, high = -mirrored["high"], -mirrored["low"]
    assert (
        f"tuned is worse than base by 0.67 in form accuracy (95% interval {low:.2f} to {high:.2f}, n = 48)"
        in report.verdict(worse, metric="form")
    )
    assert "n = 96 in 48 lexeme groups" in report.verdict(worse, group="all", metric="form")

    same = report.compare(base, base, seed=0, resamples=1000)["groups"]["all"]
    for entry in same.values():
        assert (entry["difference"], entry["p"], entry["conclusive"]) == (0.0, 1.0, False)
        assert entry["low"] < 0 < entry["high"]
    once = prediction_rows(96, right=lambda index: index == 1)
    unclear = report.verdict(report.compare(base, once, seed=0, resamples=1000), metric="exact")
    assert "differs from base by +0.02 in exact match" in unclear
    assert "it may be chance" in unclear
    assert "not chance" not in unclear


def test_verdict_for_too_few_and_for_none():
    few_base, few_tuned = prediction_rows(16), prediction_rows(16, right=lambda index: True)
    few = report.compare(few_base, few_tuned, seed=0, resamples=1000)
    assert few["groups"]["unseen"]["exact"]["low"] > 0
    assert "rests on 8 independent lexeme groups and at least 10 are needed: inconclusive" in report.verdict(
        few, metric="exact"
    )
    three = [prediction_rows(8, right=lambda index, k=k: index == k) for k in (1, 3)]
    assert "too few rows" in report.verdict(report.compare(*three, seed=0, resamples=1000), metric="exact")
    seen_only = [prediction_rows(20, seen=lambda index: True) for _ in range(2)]
    assert "no row could be scored" in report.verdict(report.compare(*seen_only, seed=0, resamples=200))


def test_compare_refuses_other_rows():
    base = prediction_rows(6)
    with pytest.raises(StoneyError, match=r"1 rows of 'base' have no prediction of 'tuned' \(first id: 'r5'\)"):
        report.compare(base, prediction_rows(5), seed=0)
    with pytest.raises(StoneyError, match="1 rows of 'tuned' have no prediction of 'base'"):
        report.compare(prediction_rows(5), base, seed=0)
    other = prediction_rows(6)
    other[2]["reference"] = "You say mîva."
    with pytest.raises(StoneyError, match="row 'r2': reference differs"):
        report.compare(base, other, seed=0)


def three_systems(n=48):
    systems = {
        "base": prediction_rows(n),
        "tuned": prediction_rows(n, right=lambda index: index % 3 != 0),
        "retrieval": prediction_rows(n, right=lambda index: index % 4 == 0),
    }
    return systems, {name: report.score(rows, seed=0, resamples=300) for name, rows in systems.items()}


@pytest.mark.parametrize("width", [78, 106, 150])
def test_metric_table(width):
    systems, results = three_systems()
    comparison = report.compare(systems["base"], systems["tuned"], seed=0, resamples=300)
    table = report.metric_table(results, comparisons=[comparison], width=width)
    lines = table.splitlines()
    header = lines[0].split()
    assert header[:7] == ["metric", "rows", "n", "lexemes", "base", "tuned", "retrieval"]
    assert header[7:] == ([] if width == 78 else ["tuned", "−", "base"])
    assert table.count("tuned − base") == 1
    entry = results["tuned"]["groups"]["unseen"]["form"]
    interval = f"[{entry['low']:.2f}, {entry['high']:.2f}]"
    assert (f"{entry['value']:.2f} {interval}" in table) == (width == 150)
    assert interval in table
    assert "*" in table
    assert "another training seed is not covered" in " ".join(table.split())
    assert all(terminal.display_width(line) <= width or "|" in line for line in lines)
    assert lines[-3:] == [entry["signature"] for entry in results["base"]["groups"]["all"].values()]


def test_metric_table_reports_unscored_suspicious_and_other_rows():
    rows = prediction_rows(20, right=lambda index: True)
    rows[0]["prediction"] = None
    table = report.metric_table({"tuned": report.score(rows, seed=0, resamples=200)}, width=120)
    assert "tuned: 1 of 20 rows unscored for chrF++." in table
    assert "were the references passed as predictions?" in table
    results = {str(n): report.score(prediction_rows(n), seed=0, resamples=200) for n in (4, 6)}
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
    marked = {"exact": 1.0, "form": 0.0}, {"exact": 0.0, "form": 1.0}, {"exact": 0.0, "form": 0.5}
    assert [report._mark(values) for values in marked] == ["✗", "✓", "~"]
    assert report._mark({"exact": 1.0, "form": None}) == "✓"
    assert report._mark({"exact": None, "form": None}) == "?"


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
    unscored = report.score([row | {"prediction": None} for row in prediction_rows(4)], seed=0, resamples=200)
    assert report.plot({"tuned": unscored}, tmp_path / "none.png").exists()


def test_importing_metrics_loads_nothing_heavy():
    code = (
        "import sys, stoney_rl.metrics.report, stoney_rl.metrics.retrieval, stoney_rl.metrics.intervals;"
        "print([m for m in ('numpy', 'scipy', 'sklearn', 'sacrebleu', 'matplotlib', 'torch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
