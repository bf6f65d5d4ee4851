"""BLEU, the error rates, the suite and the evaluate.Metric files. Words like liẖtâlo are invented."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from stoney_rl.errors import StoneyError
from stoney_rl.lexicon import LexiconEntry, write_lexicon
from stoney_rl.metrics import bleu, error_rates, suite
from stoney_rl.metrics.score import row_mean
from stoney_rl.rewards.knowledge import Knowledge

MODULES = Path(__file__).parent.parent / "stoney_rl/metrics/modules"

# (hypothesis, reference, BLEU): worked out by hand with the formula of Papineni et al. 2002.
BLEU_BY_HAND = [
    ("a b c d e", "a b c d e", 100.0),
    # precisions 4/5, 3/4, 2/3, 1/2; their product is 1/5
    ("a b c d e", "a b c d f", 100 * 0.2**0.25),
    # precisions 1; the hypothesis is short: exp(1 - 6/4)
    ("a b c d", "a b c d e f", 100 * 2.718281828459045**-0.5),
    ("g h i j", "a b c d", 0.0),
    ("", "a b c d", 0.0),
]

ENTRIES = [
    LexiconEntry("tâlo", stem="tâlo", segmentation="tâlo"),
    LexiconEntry("liẖtâlo", stem="tâlo", segmentation="liẖ-tâlo"),
    LexiconEntry("liẖtâloṯel", stem="tâlo", segmentation="liẖ-tâlo-ṯel"),
    LexiconEntry("tâtâlo", stem="tâlo", segmentation="tâ~tâlo"),
    LexiconEntry("mîva", stem="mîva", segmentation="mîva"),
]
KNOWLEDGE = Knowledge.of(ENTRIES)

# (prediction, asked forms, diacritic error rate): wrong letters / letters with a mark in either, counted by hand.
DIACRITICS = [
    ("tâlo", ["tâlo"], 0.0),
    ("ta\u0302lo", ["tâlo"], 0.0),
    ("One says TÂLO.", ["tâlo"], 0.0),
    ("talo", ["tâlo"], 1.0),
    ("tälo", ["tâlo"], 1.0),
    ("liẖtalo", ["liẖtâlo"], 1 / 2),
    ("lîẖtâlo", ["liẖtâlo"], 1 / 3),  # one mark too many
    ("talo or tâlo", ["tâlo"], 0.0),  # the better of two places
    ("talo and mîva", ["tâlo", "mîva"], 1 / 2),
    ("talo, mîva", ["tâlo mîva"], 1 / 2),  # one form of two words
    ("talo or so", ["tâlo", "mîva"], 1.0),  # only the form that is there can be judged
    ("mîva", ["tâlo"], None),  # other base letters
    ("tâloṯel", ["tâlo"], None),  # inside a longer word
    ("fâno", ["fano"], None),  # a form without marks
    ("tâlo", [], None),
    ("tâlo", None, None),
    ("", ["tâlo"], None),
]

# (prediction, asked forms, morphology error rate)
MORPHOLOGY = [
    ("liẖtâloṯel", ["liẖtâloṯel"], 0.0),
    ("tâloṯel", ["liẖtâloṯel"], 0.5),
    ("tâlo", ["liẖtâloṯel"], 1.0),
    ("liẖmîvaṯel", ["liẖtâloṯel"], 1.0),  # the right affixes on a wrong stem
    ("liẖtaloṯel", ["liẖtâloṯel"], 1.0),  # so is a stem without its mark
    ("tâlo", ["tâtâlo"], 1.0),
    ("liẖtâlo", ["liẖtâlo", "tâtâlo"], 0.5),
    ("tâlo", ["tâlo"], None),  # no affix to get wrong
    ("nûfeṯel", ["nûfeṯel"], None),  # not in the lexicon
    ("tâlo", None, None),
]

# (prediction, question, reference, hallucinated-form rate)
HALLUCINATION = [
    ("liẖtâlo", "Sue?", "liẖtâlo", 0.0),
    ("liẖtâlo, not mîvalo", "Sue?", "liẖtâlo", 0.5),
    ("lihtâlo", "Sue?", "liẖtâlo", 1.0),
    ("nûfe", "Is it nûfe?", "liẖtâlo", 0.0),  # the row's own word
    ("nûfe", "Sue?", "nûfe", 0.0),
    ("I don't know.", "Sue?", "liẖtâlo", None),
    ("", "Sue?", "liẖtâlo", None),
]


def library_bleu(predictions, references, **options):
    from sacrebleu.metrics import BLEU

    return BLEU(**options).corpus_score(predictions, [references]).score


def corpus_bleu(predictions, references):
    counts = bleu.statistics(predictions=predictions, references=references)
    return float(bleu.score_from_counts(counts.sum(axis=0)))


@pytest.mark.parametrize(("hypothesis", "reference", "expected"), BLEU_BY_HAND)
def test_bleu_golden_by_hand(hypothesis, reference, expected):
    assert corpus_bleu([hypothesis], [reference]) == pytest.approx(expected, abs=1e-9)


def test_bleu_equals_sacrebleu_to_the_last_digit():
    predictions = ["You say liẖtâlo to a man.", "tâlo", "", "You gather wood, and 1.5 fish.", "One says “mîva”."]
    references = ["You say vuẖtâlo to a man.", "tâlo", "mîva", "They gather wood and 1.5 fish.", "One says “mîva”."]
    counts = bleu.statistics(predictions=predictions, references=references)
    assert counts.shape == (5, 10)
    assert corpus_bleu(predictions, references) == library_bleu(predictions, references)
    by_row = bleu.score_from_counts(counts, sentence=True).tolist()
    pairs = zip(predictions, references, strict=True)
    assert by_row == [library_bleu([p], [r], effective_order=True) for p, r in pairs]
    assert by_row[1] == pytest.approx(100), "a right answer of one word is right"
    assert bleu.signature() == "BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0|norm:nfc+apostrophe"


def test_bleu_normalises_and_refuses():
    assert corpus_bleu(["a b c lih\u0331ta\u0302lo"], ["a b c liẖtâlo"]) == pytest.approx(100)
    with pytest.raises(StoneyError, match="1 predictions but 2 references"):
        bleu.statistics(predictions=["a"], references=["a", "b"])
    with pytest.raises(StoneyError, match="references\\[0\\] is empty"):
        bleu.statistics(predictions=["a"], references=[" "])


def test_diacritic_error_rate_by_hand():
    predictions, targets, expected = map(list, zip(*DIACRITICS, strict=True))
    assert error_rates.diacritic_error_rate(predictions=predictions, targets=targets) == pytest.approx(expected)


def test_letters_join_to_the_text_again():
    from stoney_rl.text import normalize

    text = "liẖtâlo, Ế ṯ̂ 'x'"  # two marks on one letter keep their order
    assert error_rates.letters("tâ") == (("t", ""), ("a", "\u0302"))
    assert normalize("".join(base + marks for base, marks in error_rates.letters(text))) == normalize(text)


def test_morphology_error_rate_by_hand():
    predictions, targets, expected = map(list, zip(*MORPHOLOGY, strict=True))
    found = error_rates.morphology_error_rate(predictions=predictions, targets=targets, knowledge=KNOWLEDGE)
    assert found == pytest.approx(expected)


def test_hallucinated_form_rate_by_hand():
    predictions, questions, references, expected = map(list, zip(*HALLUCINATION, strict=True))
    found = error_rates.hallucinated_form_rate(
        predictions=predictions, questions=questions, references=references, knowledge=KNOWLEDGE
    )
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: error_rates.diacritic_error_rate(predictions=["a"], targets=[["a"], ["b"]]), "1 predictions but 2"),
        (lambda: error_rates.diacritic_error_rate(predictions=["a"], targets=["tâlo"]), "expected a list of forms"),
        (
            lambda: error_rates.morphology_error_rate(predictions=[], targets=[], knowledge=KNOWLEDGE),
            "nothing to score",
        ),
        (
            lambda: error_rates.hallucinated_form_rate(
                predictions=["a", "b"], references=["a", "b"], questions=["a"], knowledge=KNOWLEDGE
            ),
            "2 predictions but 1 questions",
        ),
    ],
)
def test_error_rates_refuse(call, words):
    with pytest.raises(StoneyError) as error:
        call()
    assert words in str(error.value)


class Scorer:
    """A stand-in for a COMET worker that keeps what it was asked."""

    signature = "COMET|tiny"

    def score(self, sources, hypotheses, references):
        self.asked = sources, hypotheses, references
        return [0.25 * len(hypothesis) for hypothesis in hypotheses]


def test_comet_gets_its_columns_in_the_right_places():
    scorer = Scorer()
    gold = suite.Gold(references=["mîva", "tâlo"], questions=["Swim?", "Gather?"])
    found = suite.comet_metric(scorer)(["m", "tâ"], gold)
    assert scorer.asked == (["Swim?", "Gather?"], ["m", "tâ"], ["mîva", "tâlo"])
    assert (found.value, found.rows, found.n) == (0.375, (0.25, 0.5), 2)
    assert found.signature == "COMET|tiny|avg:row"
    scorer.score = lambda *texts: [0.5]
    with pytest.raises(StoneyError, match="1 scores for 2 rows"):
        suite.comet_metric(scorer)(["m", "t"], gold)
    with pytest.raises(StoneyError, match="2 predictions but 1 questions"):
        suite.comet_metric(scorer)(["m", "t"], suite.Gold(references=["m", "t"], questions=["Swim?"]))


def rows():
    return [
        {"prompt": "Gather?", "reference": "liẖtâlo", "prediction": "liẖtâlo", "forms": ["liẖtâlo"]},
        {"prompt": "Gather?", "reference": "liẖtâlo", "prediction": None, "forms": ["liẖtâlo"]},
        {"prompt": "Swim?", "reference": " \u200b", "prediction": "mîva", "forms": None},
        {"prompt": "Gather?", "reference": "liẖtâlo", "prediction": "liẖtalo", "forms": ["liẖtâlo"]},
        {"prompt": "Mean?", "reference": "It means to swim.", "prediction": "To swim.", "forms": None},
    ]


def test_score_rows_counts_what_it_cannot_score():
    found = suite.score_rows(suite.STRING_METRICS, rows(), KNOWLEDGE)
    assert list(found) == list(suite.STRING_METRICS)
    assert {name: (score.n, score.unscored) for name, score in found.items()} == {
        "chrf": (3, 2),
        "bleu": (3, 2),
        "exact": (3, 2),
        "form": (2, 3),
        "diacritic_error_rate": (2, 3),
        "morphology_error_rate": (2, 3),
        "hallucinated_form_rate": (2, 3),
    }
    assert found["exact"].rows == (1.0, None, None, 0.0, 0.0)
    assert found["form"].rows == (1.0, None, None, 0.0, None)
    assert found["diacritic_error_rate"].rows == (0.0, None, None, 0.5, None)
    assert found["morphology_error_rate"].value == 0.5
    assert found["hallucinated_form_rate"].value == 0.5
    assert found["chrf"].rows[1] is None
    kept = [row for row in rows() if row["prediction"] and row["reference"].strip(" \u200b")]
    predictions, references = [row["prediction"] for row in kept], [row["reference"] for row in kept]
    assert found["bleu"].value == library_bleu(predictions, references)


def test_score_rows_without_lexicon_or_answers():
    found = suite.score_rows(suite.STRING_METRICS, rows())
    for name in ("morphology_error_rate", "hallucinated_form_rate"):
        assert found[name].value is None
        assert found[name].unscored == 5
        assert found[name].note == "no lexicon was given"
    nothing = suite.score_rows(suite.STRING_METRICS, [row | {"prediction": None} for row in rows()], KNOWLEDGE)
    assert {(score.value, score.n, score.unscored) for score in nothing.values()} == {(None, 0, 5)}


def test_row_mean_and_result():
    score = row_mean([1.0, None, 0.0, 0.5], "s")
    assert (score.value, score.n, score.unscored) == (0.5, 3, 1)
    assert score.as_dict("x") == {"x": 0.5, "n": 3, "unscored": 1, "signature": "s", "rows": [1.0, None, 0.0, 0.5]}
    assert row_mean([None], "s", note="why").as_dict("x")["note"] == "why"


@pytest.fixture(scope="module")
def modules_cache(tmp_path_factory):
    """One folder for all tests: evaluate imports its copies from the first folder that it was given."""
    return tmp_path_factory.mktemp("evaluate_modules")


@pytest.fixture
def load(tmp_path, modules_cache, monkeypatch):
    """Load a module by its path, with caches in temporary folders and every connection refused."""
    import socket

    import evaluate

    def refuse(*_):
        raise AssertionError("a metric reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", modules_cache)
    return lambda name: evaluate.load(str(MODULES / f"{name}.py"), cache_dir=str(tmp_path / "cache"))


PREDICTIONS = ["You say liẖtâlo.", "talo, nofa", "mîva"]
REFERENCES = ["You say liẖtâlo.", "tâlo", "You say liẖtâloṯel."]
TARGETS = [["liẖtâlo"], ["tâlo"], ["liẖtâloṯel"]]
QUESTIONS = ["I gather?", "Gather?", "They gather?"]
COLUMNS = {
    "chrf": {"references": REFERENCES},
    "bleu": {"references": REFERENCES},
    "exact_match": {"references": REFERENCES},
    "form_accuracy": {"targets": TARGETS},
    "diacritic_error_rate": {"targets": TARGETS},
    "morphology_error_rate": {"targets": TARGETS, "lexicon": ENTRIES},
    "hallucinated_form_rate": {"references": REFERENCES, "questions": QUESTIONS, "lexicon": ENTRIES},
    "comet": {"references": REFERENCES, "questions": QUESTIONS, "scorer": Scorer()},
}
KEYS = {"exact_match": "exact", "form_accuracy": "form"}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_module_loads_by_path_offline_and_equals_the_suite(name, load, tmp_path):
    columns = dict(COLUMNS[name])
    if "lexicon" in columns:
        columns["lexicon"] = str(write_lexicon(tmp_path / "lexicon.jsonl", ENTRIES))
    found = load(name).compute(predictions=PREDICTIONS, **columns)
    gold = suite.Gold(references=REFERENCES, targets=TARGETS, questions=QUESTIONS, knowledge=KNOWLEDGE)
    metric = suite.comet_metric(Scorer()) if name == "comet" else suite.STRING_METRICS[KEYS.get(name, name)]
    assert found == metric(PREDICTIONS, gold).as_dict(KEYS.get(name, name))
    assert found["n"] + found["unscored"] == len(found["rows"]) == 3


def test_the_mauve_module_takes_a_model_folder(load, tmp_path):
    folder = tiny.checkpoint(tmp_path / "tiny")
    found = load("mauve").compute(predictions=PREDICTIONS, references=REFERENCES, featurizer=str(folder))
    assert (found["mauve"], found["n"]) == (None, 3)
    assert found["note"] == "withheld: 3 texts are too few for 50 buckets"
    assert found["signature"].startswith("MAUVE|features:tiny:")


def test_every_metric_has_a_module():
    files = {path.stem for path in MODULES.glob("*.py")} - {"__init__", "base"}
    assert files == {*COLUMNS, "mauve"}
    assert {KEYS.get(name, name) for name in files} == {*suite.STRING_METRICS, "comet", "mauve"}


@pytest.mark.parametrize(
    ("name", "columns", "words"),
    [
        ("chrf", {"predictions": ["a"], "references": ["a", "b"]}, "1 predictions but 2 references"),
        ("chrf", {"predictions": ["a", "b"], "references": [["a", "b"]]}, "not sacreBLEU's list of reference streams"),
        ("chrf", {"predictions": ["a", "b"], "references": ["a", 3]}, "references[1]: expected a string, got int"),
        ("bleu", {"predictions": "ab", "references": ["a", "b"]}, "predictions: expected a list of strings"),
        ("exact_match", {"predictions": [], "references": []}, "nothing to score"),
        ("exact_match", {"predictions": ["a"], "references": [" "]}, "references[0] is empty"),
        ("form_accuracy", {"predictions": ["a"], "targets": ["tâlo"]}, "expected a list of forms or None, got str"),
    ],
)
def test_a_module_refuses_what_evaluate_would_take(name, columns, words, load):
    with pytest.raises(StoneyError) as error:
        load(name).compute(**columns)
    assert words in str(error.value)


def test_a_module_refuses_unknown_options(load):
    with pytest.raises(TypeError, match="word_order"):
        load("chrf").compute(predictions=["a"], references=["a"], word_order=0)


def test_importing_the_suite_loads_nothing_heavy():
    code = (
        "import sys, stoney_rl.metrics.suite, stoney_rl.metrics.validation;"
        "print([m for m in ('numpy', 'sacrebleu', 'evaluate', 'mauve', 'matplotlib', 'torch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


README_LINES = [
    [cell.strip().strip("`") for cell in line.strip("|\n").split("|")]
    for line in (MODULES.parent / "README.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| `") and line.rstrip("| ").endswith(("None", "00", "33"))
]


def test_the_examples_of_the_readme():
    """answer | asked form | (segmentation |) value"""
    assert len(README_LINES) == 8
    for prediction, form, *segmentation, value in README_LINES:
        expected = None if value == "None" else pytest.approx(float(value), abs=5e-4)
        if segmentation:
            entry = LexiconEntry(form, stem="mîva" if form == "mîva" else "tâlo", segmentation=segmentation[0])
            found = error_rates.morphology_error_rate(
                predictions=[prediction], targets=[[form]], knowledge=Knowledge.of([entry])
            )
        else:
            found = error_rates.diacritic_error_rate(predictions=[prediction], targets=[[form]])
        assert found == [expected], (prediction, form)


def test_the_command_of_the_readme(load):
    text = (MODULES.parent / "README.md").read_text(encoding="utf-8")
    shown = text.partition("metric.compute(")[2].splitlines()
    options = eval(f"dict({shown[0]}")
    options["lexicon"] = str(MODULES.parents[2] / options["lexicon"])
    found = load("morphology_error_rate").compute(**options)
    assert shown[1].removeprefix("# ") == str(found | {"signature": "morphology-error|..."})
