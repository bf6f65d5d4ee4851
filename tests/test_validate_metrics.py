"""Gold broken on purpose, and whether metrics notice. The rows are those of the planted language: its words are invented."""

import json
import random
import time
import unicodedata
from itertools import pairwise

import pytest

from stoney_rl import predictions
from stoney_rl.errors import StoneyError
from stoney_rl.metrics import corruption, validation
from stoney_rl.metrics.mauve import Featurizer
from stoney_rl.metrics.score import Score, row_mean
from stoney_rl.metrics.suite import STRING_METRICS, comet_metric, mauve_metric
from stoney_rl.planted import PlantedLanguage
from stoney_rl.rewards.knowledge import Knowledge
from stoney_rl.text import fold, normalize, words


@pytest.fixture(scope="module")
def language():
    return PlantedLanguage(seed=0, num_lexemes=60)


@pytest.fixture(scope="module")
def rows(language):
    drawn = random.Random(0).sample(language.rows(rules_per_lexeme=4, templates_per_fact=1), 200)
    return [predictions.record(row, None, None) for row in drawn]


@pytest.fixture(scope="module")
def knowledge(language, tmp_path_factory):
    from stoney_rl.lexicon import read_lexicon
    from stoney_rl.planted import write_lexicon

    path = tmp_path_factory.mktemp("lexicon") / "lexicon.jsonl"
    write_lexicon(path, language.lexicon())
    return Knowledge.of(read_lexicon(path))


@pytest.fixture(scope="module")
def report(rows, knowledge):
    started = time.process_time()
    found = validation.validate(STRING_METRICS, rows, knowledge, seed=0)
    assert time.process_time() - started < 10, "200 rows take seconds"
    return found


def nfd(text):
    return unicodedata.normalize("NFD", text)


def bases(text):
    return [c for c in nfd(text) if not unicodedata.combining(c)]


def marks(text):
    return [c for c in nfd(text) if unicodedata.combining(c)]


SENTENCES = ["You say Liẖtâloṯel, from “tâlo”.", "vuẖtâlo", "Mîva, or lîẖmîva?", "They gather 12."]


@pytest.fixture(scope="module")
def small():
    from stoney_rl.lexicon import LexiconEntry

    return Knowledge.of(
        [
            LexiconEntry("liẖtâloṯel", stem="tâlo", segmentation="liẖ-tâlo-ṯel"),
            LexiconEntry("vuẖtâlo", stem="tâlo", segmentation="vuẖ-tâlo"),
            LexiconEntry("lîẖmîva", stem="mîva", segmentation="lîẖ-mîva"),
            LexiconEntry("tâtâlo", stem="tâlo", segmentation="tâ~tâlo"),
        ]
    )


@pytest.mark.parametrize("kind", corruption.KINDS)
def test_levels_are_graded_nested_and_repeatable(kind, small):
    texts = SENTENCES * 30
    broken = corruption.corrupt(texts, kind, seed=1, knowledge=small)
    assert broken.at(0) == [normalize(text) for text in texts]
    changed = [
        {i for i, (a, b) in enumerate(zip(texts, broken.at(level), strict=True)) if normalize(a) != b}
        for level in validation.LEVELS
    ]
    assert all(lower <= higher for lower, higher in pairwise(changed))
    units = sum(draw < 0.5 for row in broken.rows for _, new, draw in row if new is not None)
    assert units / broken.units == pytest.approx(0.5, abs=0.12)
    again = corruption.corrupt(texts, kind, seed=1, knowledge=small)
    assert again == broken
    assert corruption.corrupt(texts, kind, seed=2, knowledge=small).at(0.5) != broken.at(0.5)


def test_a_unit_breaks_above_its_draw():
    row = (("a", "b", 0.1), ("a", "b", 0.5), ("a", None, 0.0), ("a", "b", 0.9))
    broken = corruption.Corruption("letters", (row,))
    assert [broken.at(level) for level in (0, 0.1, 0.5, 0.51, 1)] == [["aaaa"], ["aaaa"], ["baaa"], ["bbaa"], ["bbab"]]


def test_letters_change_and_keep_their_marks_and_capitals():
    broken = corruption.corrupt(SENTENCES, "letters", seed=0)
    assert broken.units == sum(c.isalpha() for text in SENTENCES for c in bases(text))
    for text, new in zip(SENTENCES, broken.at(1), strict=True):
        assert [a != b for a, b in zip(bases(text), bases(new), strict=True)] == [c.isalpha() for c in bases(text)]
        assert marks(text) == marks(new)
        assert [c.isupper() for c in bases(text)] == [c.isupper() for c in bases(new)]


def test_diacritics_go_and_nothing_else():
    broken = corruption.corrupt(SENTENCES, "diacritics", seed=0)
    assert broken.units == 4 + 2 + 4
    assert ["".join(bases(text)) for text in SENTENCES] == broken.at(1)


def test_affixes_change_and_stems_stay(small):
    broken = corruption.corrupt([*SENTENCES, "tâtâlo"], "affixes", seed=0, knowledge=small)
    assert broken.units == 2 + 1 + 1 + 1
    first, second, third, fourth, fifth = broken.at(1)
    word = words(first)[2]
    assert first.startswith("You say ") and first.endswith(", from “tâlo”.")
    assert word.endswith("tâlo"), "the only suffix there is has no other to become, so it goes"
    assert fold(word).removesuffix("tâlo") in ("vuẖ", "lîẖ", "tâ")
    assert second.endswith("tâlo") and second.removesuffix("tâlo") in ("liẖ", "lîẖ", "tâ")
    assert third.startswith("Mîva, or ") and third.endswith("mîva?") and third != SENTENCES[2]
    assert fourth == SENTENCES[3]
    assert fifth.endswith("tâlo") and fifth != "tâtâlo"
    # An unbroken morph keeps the capital that the text gave it.
    assert any(
        "Liẖtâlo" in corruption.corrupt(SENTENCES, "affixes", seed=s, knowledge=small).at(0.5)[0] for s in range(9)
    )
    assert corruption.corrupt(SENTENCES, "affixes", seed=0).units == 0


def test_words_and_answers_come_from_the_set():
    pool = {fold(word) for text in SENTENCES for word in words(text)}
    broken = corruption.corrupt(SENTENCES, "words", seed=0)
    for text, new in zip(SENTENCES, broken.at(1), strict=True):
        assert [fold(a) != fold(b) for a, b in zip(words(text), words(new), strict=True)] == [True] * len(words(text))
        assert {fold(word) for word in words(new)} <= pool
    assert broken.at(1)[3].endswith(" 12.")
    answers = corruption.corrupt(SENTENCES, "answers", seed=0).at(1)
    assert all(new != old and new in map(normalize, SENTENCES) for old, new in zip(SENTENCES, answers, strict=True))


def test_nothing_to_break():
    assert corruption.corrupt(["12", "12"], "letters", seed=0).units == 0
    assert corruption.corrupt(["same", "same"], "answers", seed=0).units == 0
    assert corruption.corrupt(["same", "Same"], "words", seed=0).units == 0
    with pytest.raises(StoneyError, match="corruption 'vowels': expected one of letters, diacritics"):
        corruption.corrupt(["a"], "vowels", seed=0)


def test_string_metrics_on_the_planted_language(report):
    verdicts = {
        name: {kind: one["verdict"] for kind, one in found["kinds"].items()}
        for name, found in report["metrics"].items()
    }
    falls = dict.fromkeys(corruption.KINDS, "falls")
    assert verdicts == {
        "chrf": falls,
        "bleu": falls,
        "exact": falls,
        "form": falls,
        "morphology_error_rate": falls,
        # Marks can't be judged on other letters.
        "diacritic_error_rate": dict.fromkeys(corruption.KINDS, "unscored") | {"diacritics": "falls"},
        # Words and answers of the set are attested.
        "hallucinated_form_rate": falls | {"words": "flat", "answers": "flat"},
    }
    assert report["n"] == 200
    assert report["left_out"] == 0
    form = report["metrics"]["form"]["kinds"]["answers"]
    assert form["values"][0] == 1
    assert form["values"][-1] == 0
    for value, low, high in zip(form["values"], form["low"], form["high"], strict=True):
        assert low <= value <= high
    assert form["n"] == [200] * 5
    # Each word is one form here, so the share of broken words is the share of wrong forms.
    expected = [1 - level for level in validation.LEVELS]
    assert report["metrics"]["form"]["kinds"]["words"]["values"] == pytest.approx(expected, abs=0.09)


def test_the_report_is_json_and_repeatable(report, rows, knowledge):
    metrics = {name: STRING_METRICS[name] for name in ("chrf", "form")}
    found = [validation.validate(metrics, rows, knowledge, seed=0) for _ in range(2)]
    for one in found:
        for metric in one["metrics"].values():
            assert metric.pop("seconds_per_1000") > 0
    assert found[0] == found[1]
    assert found[0]["metrics"]["chrf"]["kinds"] == report["metrics"]["chrf"]["kinds"]
    assert json.loads(json.dumps(report)) == report


def by_right(value):
    """A metric whose row value is ``value(is the answer the gold one, its row number)``."""

    def metric(predictions, gold):
        pairs = zip(predictions, gold.references, strict=True)
        return row_mean([value(normalize(p) == normalize(r), i) for i, (p, r) in enumerate(pairs)], "test")

    return metric


def whole_set(at):
    """A metric of the set: ``at`` maps the share of right answers to (value, spread)."""

    def metric(predictions, gold):
        pairs = list(zip(predictions, gold.references, strict=True))
        value, spread = at(sum(normalize(p) == normalize(r) for p, r in pairs) / len(pairs))
        return Score(
            value,
            (),
            len(pairs),
            0,
            "test",
            "too few" if value is None else "",
            (value, value + spread) if value is not None else None,
        )

    return metric


PLANTED_FAULTS = {
    "honest": (by_right(lambda right, _: float(right)), "falls", ""),
    "constant": (by_right(lambda *_: 0.7), "flat", "gets worse by 0, which may be chance"),
    "noise": (by_right(lambda right, i: random.Random(f"{right} {i}").random()), "flat", "which may be chance"),
    "backwards": (by_right(lambda right, _: 1 - right), "improves", "it gets better from 0% to 10% broken"),
    "numb": (by_right(lambda right, i: 0.9 + (0.04 + 0.01 * (i % 3)) * right), "flat", "only, of the 0.9"),
    "speechless": (by_right(lambda *_: None), "unscored", "too few rows have a value both before and after"),
    "rarely": (by_right(lambda right, i: float(right) if i < 9 else None), "unscored", "too few rows have a value"),
    "set": (whole_set(lambda right: (right, 0.01)), "falls", ""),
    "set_backwards": (whole_set(lambda right: (1 - right, 0.01)), "improves", "it gets better from"),
    "set_wide": (whole_set(lambda right: (0.5 + 0.2 * right, 0.3)), "flat", "may be chance"),
    "set_at_once": (
        whole_set(lambda right: (float(right == 1), 0.0)),
        "saturates",
        "100% of the fall comes with the first 10%",
    ),
    "set_withheld": (whole_set(lambda _: (None, 0)), "unscored", "too few"),
}


@pytest.mark.parametrize("name", PLANTED_FAULTS)
def test_a_planted_fault_is_found_and_named(name, rows):
    metric, verdict, reason = PLANTED_FAULTS[name]
    found = validation.validate({"planted": metric}, rows, seed=0)["metrics"]["planted"]["kinds"]
    assert found["answers"]["verdict"] == verdict
    assert reason in found["answers"]["reason"]
    assert bool(reason) == bool(found["answers"]["reason"])
    assert not found["answers"]["reason"].endswith("; ")
    assert found["affixes"]["verdict"] == "absent", "without a lexicon there is no affix to break"


def test_mauve_is_withheld_with_its_own_reason(rows):
    import numpy as np

    featurizer = Featurizer(
        "lengths", lambda texts: np.array([[len(text), text.count("a"), 1] for text in texts], float)
    )
    found = validation.validate({"mauve": mauve_metric(featurizer)}, rows[:40], seed=0)["metrics"]["mauve"]["kinds"]
    assert found["answers"]["verdict"] == "unscored"
    assert found["answers"]["reason"] == "withheld: 40 texts are too few for 50 buckets"
    assert found["answers"]["values"] == [None] * 5


def test_an_error_rate_gets_worse_upwards(rows):
    def rate(flip):
        def metric(predictions, gold):
            pairs = zip(predictions, gold.references, strict=True)
            return row_mean([float((normalize(p) != normalize(r)) ^ flip) for p, r in pairs], "rate", scale=(1.0, 0.0))

        return metric

    found = validation.validate({"rate": rate(False), "flipped": rate(True)}, rows, seed=0)["metrics"]
    assert found["rate"]["kinds"]["words"]["verdict"] == "falls"
    assert found["flipped"]["kinds"]["words"]["verdict"] == "improves"


def test_a_deaf_comet_is_marked_and_one_beyond_its_scale_is_not_refused(rows):
    class Scorer:
        signature = "COMET|tiny"

        def __init__(self, value):
            self.value = value

        def score(self, sources, hypotheses, references):
            return [self.value(h, r) for h, r in zip(hypotheses, references, strict=True)]

    metrics = {
        "comet": comet_metric(Scorer(lambda h, r: 0.6)),
        "wide": comet_metric(Scorer(lambda h, r: 1.2 if h == r else -0.3)),
    }
    found = validation.validate(metrics, rows, seed=0)
    deaf = found["metrics"]["comet"]["kinds"]["letters"]
    assert deaf["verdict"] == "flat"
    assert deaf["reason"].endswith("its model has not been trained on this language")
    assert found["metrics"]["wide"]["kinds"]["answers"]["verdict"] == "falls"
    assert "✗ comet, letters: from gold to all broken it gets worse by 0" in validation.as_text(found, width=200)


def test_exact_match_saturates_on_long_answers():
    texts = [" ".join(f"w{chr(97 + i % 26)}{chr(97 + j)}" for j in range(20)) for i in range(40)]
    rows = [{"prompt": "?", "reference": f"{text} {i}", "forms": None} for i, text in enumerate(texts)]
    found = validation.validate({name: STRING_METRICS[name] for name in ("exact", "chrf")}, rows, seed=0)["metrics"]
    assert found["exact"]["kinds"]["letters"]["verdict"] == "saturates"
    assert "one wrong letter makes the whole answer wrong" in found["exact"]["kinds"]["letters"]["reason"]
    assert found["chrf"]["kinds"]["letters"]["verdict"] == "falls"


def test_text_says_what_passed_and_why_not(report):
    text = validation.as_text(report, width=160)
    lines = text.splitlines()
    assert lines[0].split() == ["metric", *corruption.KINDS, "per", "1,000"]
    chrf = next(line for line in lines if line.startswith("chrf"))
    assert chrf.count("✓ 100 →") == 5
    assert "✗ hallucinated_form_rate, words: " in text
    assert "the words that are put in are attested, only wrong here" in text
    assert "? diacritic_error_rate, letters: " in text
    assert "n = 200, seed 0" in text
    assert "~ gets worse, but at once" not in text, "a mark that does not occur is not explained"
    assert [line for line in lines if line.startswith(("chrF2++|", "BLEU|"))]


def test_rows_without_a_reference_are_left_out_and_counted(rows):
    found = validation.validate({"exact": STRING_METRICS["exact"]}, [*rows, rows[0] | {"reference": " "}], seed=0)
    assert (found["n"], found["left_out"]) == (200, 1)
    assert "1 rows without a reference were left out." in validation.as_text(found)
    for metrics, given in (({}, rows), (STRING_METRICS, []), (STRING_METRICS, [rows[0] | {"reference": ""}])):
        with pytest.raises(StoneyError, match="at least one metric and one row with a reference"):
            validation.validate(metrics, given, seed=0)


def test_plot_is_whole_or_absent(report, tmp_path):
    path = validation.plot(report, tmp_path / "validity.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert [file.name for file in tmp_path.iterdir()] == ["validity.png"]
    assert path.read_bytes() == validation.plot(report, tmp_path / "again.png").read_bytes()
    with pytest.raises(StoneyError, match="can't write"):
        validation.plot(report, tmp_path / "nowhere" / "validity.png")


def test_plot_of_one_metric_without_values(rows, tmp_path):
    silent = validation.validate({"planted": PLANTED_FAULTS["speechless"][0]}, rows, seed=0)
    assert validation.plot(silent, tmp_path / "none.png").exists()
