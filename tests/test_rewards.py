"""The reward: each term against values worked out by hand, and every attack below an honest answer.

All forms of the language are invented, but for the rows under real_data.
"""

import os
import random
import re
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stoney_rl import lexemes
from stoney_rl.data import Row, load_rows
from stoney_rl.errors import StoneyError
from stoney_rl.lexicon import LexiconEntry, build_lexicon
from stoney_rl.metrics import chrf
from stoney_rl.planted import RULES, PlantedLanguage, segments
from stoney_rl.planted_prose import prose_rows
from stoney_rl.rewards import terms
from stoney_rl.rewards.attacks import ATTACKS, NULL_POLICIES, REFERENCES, Ground, alternatives, said
from stoney_rl.rewards.completions import Completion, parse
from stoney_rl.rewards.composite import DEFAULT_WEIGHTS, JUDGES, TERMS, Composite, Task
from stoney_rl.rewards.knowledge import Knowledge, language_words, load_knowledge
from stoney_rl.rewards.probe import TOLERANCE, sample
from stoney_rl.rewards.similarity import encoder_similarity
from stoney_rl.text import normalize, words

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = Path(os.environ.get("STONEY_REAL_DATA") or ROOT.parent / "shared" / "data")
README = ROOT / "stoney_rl" / "rewards" / "README.md"
CLOSE = 1e-9
# Below this weight of R_dict a list with the right form in it can be more like the reference than an honest answer is.
LEAST_ANCHOR = 0.05
# Above this weight of P_hall the penalty is worth more than what stripped diacritics save (README, "weights").
LEAST_PENALTY = 0.1


def read_tables(text):
    """The tables of a Markdown text: for each a list of {column: cell}."""
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        header, _, *lines = [
            [cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()
        ]
        tables.append([dict(zip(header, line, strict=True)) for line in lines])
    return tables


TABLES = read_tables(README.read_text(encoding="utf-8"))


def quoted(cell):
    return re.findall("`([^`]*)`", cell)


LEXICON = [
    LexiconEntry(
        form=quoted(line["form"])[0], stem=quoted(line["stem"])[0], segmentation=quoted(line["segmentation"])[0]
    )
    for table in TABLES
    if "segmentation" in table[0]
    for line in table
]
KNOWLEDGE = Knowledge.of(LEXICON)


def make_task(question="Sue?", reference="liẖtâlo", wanted=("liẖtâlo",), task_id="t"):
    allowed = frozenset([*language_words(question), *language_words(reference)])
    return Task(task_id, question, reference, tuple(wanted), allowed)


def score(text, task=None, knowledge=KNOWLEDGE, **options):
    return Composite(knowledge, **options).score([task or make_task()], [text])[0]


# -- the trace and the answer


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("tâlo", None, "tâlo"),
        ("", None, ""),
        ("  \n ", None, ""),
        ("<think>a b</think> tâlo ", "a b", "tâlo"),
        ("a b</think>tâlo", "a b", "tâlo"),  # opened in the prompt
        ("</think>tâlo", "", "tâlo"),
        ("<think></think>tâlo", "", "tâlo"),
        ("<think>a</think>", "a", ""),
        ("<think>a tâlo", "a tâlo", ""),  # never closed
        ("tâlo <think>a", "tâlo a", ""),  # what comes before an unclosed trace is no answer either
        ("<think>a</think>tâlo<think>b", "a tâlo b", ""),
        ("<think>a<think>b</think>tâlo", "a b", "tâlo"),  # nested
        ("<think>a<think>b</think>c</think>tâlo", "a b c", "tâlo"),
        ("<think>a</think>b<think>c</think>tâlo", "a b c", "tâlo"),  # several: only what follows the last is the answer
        ("<THINK>a</THINK>tâlo", None, "<THINK>a</THINK>tâlo"),
        ("tâlo\x00", None, ""),
        ("<think>\x1b[2K</think>tâlo", None, ""),
        ("tâlo\ud800", None, ""),
        ("tâlo\t\r\nmîva", None, "tâlo\t\nmîva"),  # tab and line ends are no controls
        ("<th\u200bink>a</think>tâlo", "a", "tâlo"),  # a tag with an invisible character in it is one
    ],
)
def test_parse(text, reasoning, answer):
    found = parse(text)
    spaced = None if found.reasoning is None else " ".join(found.reasoning.split())
    assert (spaced, found.answer) == (reasoning, answer)


def test_a_mark_on_a_tag_is_read_alike_in_every_unicode_form():
    """ ">" and U+0338 are one letter in NFC: without the composition first, NFD would have an answer and NFC none."""
    text = "<think>a</think>\u0338tâlo"
    assert parse(text) == parse(unicodedata.normalize("NFC", text)) == Completion("a</think\u226ftâlo", "")


# -- R_lex


@pytest.mark.parametrize(
    ("answer", "reference", "question", "expected"),
    [
        ("tâlo", "tâlo", "Sue?", 1.0),
        # letters 3/4, pairs 2/3, triples 1/2, fours 0/1, words 0/1, the same both ways: their mean
        ("tâla", "tâlo", "Sue?", (3 / 4 + 2 / 3 + 1 / 2) / 5),
        ("", "tâlo", "Sue?", 0.0),
        ("zzz", "tâlo", "Sue?", 0.0),
        # the question shares 2 of 2 letters and 1 of 1 pairs with 4 and 3, no word: precision 2/3, recall 5/18, so
        # f = 5 PR / (4P + R) = 50/159
        ("tâ", "tâlo", "tâ", 0.0),
        ("tâla", "tâlo", "tâ", (23 / 60 - 50 / 159) / (109 / 159)),
        ("zzz", "tâlo", "tâ", 0.0),  # below the floor is no debt
        ("tâlo", "tâlo", "tâlo", None),  # the question is its own answer
        ("42.", "42.", "Sue?", None),  # a reference without a word can't be matched
        ("anything", "???", "Sue?", None),
        ("TÂLO", "tâlo", "Sue?", 0.0),  # case counts here: chrF++ is of the surface
    ],
)
def test_lexical(answer, reference, question, expected):
    assert terms.lexical([answer], [reference], [question]) == [pytest.approx(expected, abs=1e-12)]


texts = st.one_of(
    st.text(st.characters(), max_size=60),  # lone surrogates and controls among them
    st.lists(
        st.sampled_from(
            [
                "<think>",
                "</think>",
                "liẖtâlo",
                "tâlo",
                "mîva",
                "TÂLO",
                "mîvalo",
                "the verb ",
                " ",
                "\n",
                "-",
                "'",
                "\u0302",
            ]
            + ["\u0331", "\u0338", "\x00", "\u200b", "\u2019", "e\u0301", "ﬁ", "İ", "ß", "한", "\U0001f600", ". ", "42"]
        ),
        max_size=14,
    ).map("".join),
    st.sampled_from(["word " * 2000, "â" * 10_000, "liẖtâlo " * 500, "a-" * 5000, "<think>" * 2000, "\u0302" * 10_000]),
)
readable = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40).map(normalize)


@given(answer=readable, reference=readable.filter(bool), question=readable)
@settings(max_examples=60, deadline=None)
def test_lexical_is_chrf_of_the_metrics(answer, reference, question):
    """The counts of a reference are kept between calls: the score must stay the one that metrics.chrf gives."""
    counts = chrf.statistics(predictions=[answer, question], references=[reference] * 2)
    score, floor = chrf.score_from_counts(counts) / 100
    expected = max(0.0, (score - floor) / (1 - floor)) if words(reference) and floor < 1 else None
    assert terms.lexical([answer], [reference], [question]) == [pytest.approx(expected, abs=1e-12)]


# -- R_sem


def vectors(given):
    table = {"a": (1, 0), "b": (0.6, 0.8), "c": (-1, 0), "d": (0, 1), " ": (1, 0), "long": (2, 0)}
    return np.array([table[text] for text in given], dtype=np.float32)


def test_semantic():
    answers = ["a", "b", "c", "d", "", "a", "long"]
    references = ["a", "a", "a", "a", "a", "42", "a"]
    # cosines 1, 0.6, -1 and 0; no answer; a reference without a word; what a vector too long would give is cut
    expected = [1.0, pytest.approx(0.6), 0.0, 0.0, 0.0, None, 1.0]
    assert terms.semantic(answers, references, answers, encoder_similarity(vectors)) == expected


def test_semantic_is_off_without_an_encoder():
    assert terms.semantic(["a", "b"], ["a", "a"], ["a", "a"], None) == [None, None]
    assert terms.semantic(["a"], ["42"], ["a"], lambda *_: pytest.fail("nothing to compare")) == [None]


def test_semantic_gives_each_text_its_place():
    seen = lambda *columns: [float(row == ("asked", "said", "gold")) for row in zip(*columns, strict=True)]  # noqa: E731
    assert terms.semantic(["x", "said"], ["42", "gold"], ["y", "asked"], seen) == [None, 1.0]


# -- R_dict and hit


@pytest.mark.parametrize(
    ("answer", "wanted", "expected"),
    [
        ("liẖtâlo", ["liẖtâlo"], 1.0),
        ('One says "LIẖTÂLO".', ["liẖtâlo"], 1.0),
        ("lihtalo", ["liẖtâlo"], 0.0),  # diacritics are exact, and nothing attests this
        # one of two words named is right, and the other one tries: 1/2 + 1/2 of 0.1
        ("liẖtâlo or mîva", ["liẖtâlo"], 0.55),
        ("liẖtâlo or mîva or mîva", ["liẖtâlo"], 0.55),  # different words count
        ("liẖtâlo or mîva or tâtâlo", ["liẖtâlo"], 1 / 3 + 2 / 3 * 0.1),
        ("liẖtâlo or mîvalo", ["liẖtâlo"], 0.5),  # an invented word does not try
        # five others: 1/6, and the attempt of five words is worth 3/5
        ("liẖtâlo mîva tâtâlo tâloṯel liẖtâloṯel tâlo", ["liẖtâlo"], 1 / 6 + 5 / 6 * 0.06),
        ("liẖtâlo has the prefix liẖ-, not the suffix -ṯel", ["liẖtâlo"], 1.0),  # affixes explain it
        # one of two asked for; with a wrong one beside it; with two, one of three named
        ("liẖtâlo", ["liẖtâlo", "tâloṯel"], 0.5),
        ("tâloṯel, liẖtâlo", ["liẖtâlo", "tâloṯel"], 1.0),
        ("liẖtâlo, mîva", ["liẖtâlo", "tâloṯel"], 0.55),
        ("liẖtâlo, mîva, tâtâlo", ["liẖtâlo", "tâloṯel"], 1 / 3 + 2 / 3 * 0.1),
        # three times is a sentence that explains; a fourth is one word too many
        ("liẖtâlo " * 3, ["liẖtâlo"], 1.0),
        ("liẖtâlo " * 4, ["liẖtâlo"], 0.5),
        # a phrase: its words in their order, whatever stands between; its words alone are neither right nor others
        ("tâlo, mîva", ["tâlo mîva"], 1.0),
        ("mîva tâlo", ["tâlo mîva"], 0.0),
        # no wanted form: an attested one tries, up to three words; an invented one beside it spoils it
        ("mîva", ["liẖtâlo"], 0.1),
        ("mîva tâtâlo tâloṯel", ["liẖtâlo"], 0.1),
        ("mîva tâtâlo tâloṯel liẖtâloṯel", ["liẖtâlo"], 0.1 * 3 / 4),
        ("mîva mîvalo", ["liẖtâlo"], 0.0),
        ("I don't know.", ["liẖtâlo"], 0.0),
        ("", ["liẖtâlo"], 0.0),
        ("tâlo", ["liẖtâlo"], 0.1),
        ("liẖtâlo", ["tâlo"], 0.1),  # tâlo is not in liẖtâlo
        ("anything", [], None),
    ],
)
def test_dictionary(answer, wanted, expected):
    assert terms.dictionary([answer], ["?"], [wanted], [[]], KNOWLEDGE) == [pytest.approx(expected)]


def test_dictionary_does_not_count_what_the_question_and_the_reference_have():
    assert terms.dictionary(["liẖtâlo from tâlo"], ["?"], [["liẖtâlo"]], [["tâlo"]], KNOWLEDGE) == [1.0]
    assert terms.dictionary(["tâlo"], ["?"], [["liẖtâlo"]], [["tâlo"]], KNOWLEDGE) == [0.0]  # copied, not tried


def test_a_reference_that_repeats_its_form_is_a_right_answer():
    often = "liẖtâlo " * 5
    assert terms.dictionary([often], [often], [["liẖtâlo"]], [[]], KNOWLEDGE) == [1.0]
    assert score(often.strip(), make_task(reference=often.strip())).total == pytest.approx(1)


def test_precision():
    answers = ["liẖtâlo", "tâlo", "liẖtâlo mîva", "liẖtâlo mîva", "liẖtâlo " * 5, "", "liẖ- liẖtâlo", "anything"]
    wanted = [["liẖtâlo"]] * 3 + [["liẖtâlo", "mîva"], *[["liẖtâlo"]] * 3, []]
    expected = [1.0, 0.0, 1 / 2, 1.0, 1 / 3, 0.0, 1.0, None]
    nothing = [[]] * len(answers)
    assert terms.precision(answers, ["?"] * len(answers), wanted, nothing, KNOWLEDGE) == expected
    assert terms.precision(["liẖtâlo mîva"], ["?"], [["liẖtâlo"]], [["mîva"]], KNOWLEDGE) == [1.0]  # allowed


def test_hit():
    answers = ["liẖtâlo", "tâlo", "liẖtâlo", "anything"]
    wanted = [["liẖtâlo"], ["liẖtâlo"], ["liẖtâlo", "mîva"], []]
    assert terms.hit(answers, wanted) == [1.0, 0.0, 0.5, None]


# -- R_morph


@pytest.mark.parametrize(
    ("answer", "wanted", "expected"),
    [
        ("liẖtâlo", ["liẖtâlo"], 1.0),  # prefix
        ("LIẖTÂLO!", ["liẖtâlo"], 1.0),
        ("tâlo", ["liẖtâlo"], 0.0),
        ("lihtâlo", ["liẖtâlo"], 0.0),  # the prefix without its line is another
        ("liẖtalo", ["liẖtâlo"], 0.0),  # and so is the stem
        ("liẖmîva", ["liẖtâlo"], 0.0),  # right prefix, wrong stem
        ("liẖ-tâlo", ["liẖtâlo"], 0.0),  # the hyphen stands where the prefix should
        ("tâloṯel", ["tâloṯel"], 1.0),  # suffix
        ("ṯeltâlo", ["tâloṯel"], 0.0),  # a suffix in front
        ("tâloṯelwa", ["tâloṯel"], 1.0),  # a further suffix: R_dict, not R_morph, asks for the very form
        ("liẖtâloṯel", ["liẖtâloṯel"], 1.0),
        ("liẖtâlo", ["liẖtâloṯel"], 0.5),
        ("tâloṯel", ["liẖtâloṯel"], 0.5),
        ("tâlo liẖ ṯel", ["liẖtâloṯel"], 0.0),  # the affixes apart from the stem
        ("tâlo, tâloṯel", ["liẖtâloṯel"], 0.5),  # the best word counts
        ("tâtâlo", ["tâtâlo"], 1.0),  # reduplication
        ("tâlo", ["tâtâlo"], 0.0),
        ("lâtâlo", ["tâtâlo"], 0.0),
        ("liẖtâlo", ["liẖtâlo", "tâtâlo"], 0.5),  # the mean
        ("liẖtâlo", ["liẖtâlo", "mîva"], 1.0),  # a form without affixes neither adds nor takes
        ("mîva", ["mîva"], None),  # an empty list of affixes
        ("unheard", ["unheard"], None),  # a form that the lexicon does not build
        ("liẖtâlo", [], None),
        ("", ["liẖtâlo"], 0.0),
    ],
)
def test_morphology(answer, wanted, expected):
    assert terms.morphology([answer], [wanted], KNOWLEDGE) == [pytest.approx(expected)]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("woliẖtâloṯelvu", 1.0),
        ("liẖtâloṯel", 2 / 4),  # those beside the stem
        ("wotâlovu", 0.0),  # an outer affix without the inner one is not in its place
        ("liẖwotâlovuṯel", 0.0),
        ("woliẖtâlovu", 2 / 4),
    ],
)
def test_affixes_stand_side_by_side(answer, expected):
    known = Knowledge.of([LexiconEntry("woliẖtâloṯelvu", stem="tâlo", segmentation="wo-liẖ-tâlo-ṯel-vu")])
    assert terms.morphology([answer], [["woliẖtâloṯelvu"]], known) == [expected]


def test_morphology_of_a_form_of_two_words():
    known = Knowledge.of([LexiconEntry(form="afelâ liẖtâlo", stem="tâlo", segmentation="afelâ -liẖ-tâlo")])
    assert terms.morphology(['"afelâ liẖtâlo".'], [["afelâ liẖtâlo"]], known) == [1.0]


# -- P_hall


@pytest.mark.parametrize(
    ("answer", "allowed", "expected"),
    [
        ("liẖtâlo", [], 0.0),
        ("LIẖTÂLO", [], 0.0),
        ("mîvalo", [], 1.0),
        ("liẖtâlo, mîvalo", [], 0.5),
        ("mîvalo mîvalo tâlo", [], 2 / 3),  # each as often as it stands there
        ("mîvalo", ["mîvalo"], 0.0),  # the question or the reference has it
        ("the prefix liẖ- before tâlo", [], 0.0),  # an affix that the lexicon names is no invention
        ("the prefix loẖ- before tâlo", [], 0.5),
        ("I gather wood", [], None),  # no word of the language
        ("", [], None),
        ("42 !?", [], None),
    ],
)
def test_hallucination(answer, allowed, expected):
    assert terms.hallucination([answer], [allowed], KNOWLEDGE) == [pytest.approx(expected)]


# -- R_cot


@pytest.mark.parametrize(
    ("trace", "answer", "expected"),
    [
        (None, "liẖtâlo", None),
        ("", "liẖtâlo", 0.0),
        ("...", "liẖtâlo", 0.0),
        ("tâlo takes liẖ-: liẖtâlo", "liẖtâlo", 1.0),
        ("the verb", "liẖtâlo", 0.0),  # names no form, the answer does
        ("the verb", "yes", 1.0),
        ("tâlo, mîvalo, liẖtâlo", "liẖtâlo", 2 / 3),  # one of three words is nobody's
        ("tâlo", "liẖtâlo", 0.0),  # arrives somewhere else
        ("liẖtâlo mîva", "liẖtâlo tâtâlo", 0.5),  # arrives at one of two
        ("liẖtâlo liẖtâlo", "mîva", 0.0),  # the right form, and another answer
        ("liẖtâlo", "", 0.0),
        ("liẖtâlo" + " word" * 199, "liẖtâlo", 1.0),  # 200 words
        ("liẖtâlo" + " word" * 299, "liẖtâlo", 0.5),  # 300: 2 - 300/200
        ("liẖtâlo" + " word" * 399, "liẖtâlo", 0.0),
        ("liẖtâlo" + " word" * 5000, "liẖtâlo", 0.0),
    ],
)
def test_reasoning(trace, answer, expected):
    assert terms.reasoning([trace], [answer], [[]], KNOWLEDGE) == [pytest.approx(expected)]


def test_reasoning_may_use_the_words_of_the_question():
    assert terms.reasoning(["mîvalo: liẖtâlo"], ["liẖtâlo"], [["mîvalo"]], KNOWLEDGE) == [1.0]


# -- R_brev


@pytest.mark.parametrize(
    ("length", "reference", "expected"),
    [
        (0, 100, 0.0),
        (1, 100, 1.0),
        (220, 100, 1.0),  # 120 more than 100 is more than twice 100
        (330, 100, 0.5),  # 2 - 330/220
        (440, 100, 0.0),
        (10_000, 100, 0.0),
        (400, 200, 1.0),  # twice 200 is more than 120 more
        (600, 200, 0.5),
    ],
)
def test_brevity(length, reference, expected):
    assert terms.brevity(["x" * length], ["y" * reference]) == [pytest.approx(expected)]


# -- the composite


def values(**given):
    return dict.fromkeys([*TERMS, "hit"]) | {"R_brev": 1.0, "precision": given.get("hit")} | given


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # W = 0.3 + 0.3 + 0.1: R_sem and R_cot are None
        (values(R_lex=1.0, R_dict=1.0, R_morph=1.0, hit=1.0), 1.0),
        (values(R_lex=0.5, R_dict=0.7, R_morph=1.0, P_hall=0.5, hit=1.0), (0.15 + 0.1 + 0.21) / 0.7 - 0.15),
        # half of the words named, or of the forms asked for: a quarter of the likeness; half of the length term on both
        (values(R_lex=0.5, R_dict=0.5, R_morph=1.0, hit=1.0, precision=0.5), (0.25 * 0.25 + 0.15) / 0.7),
        (values(R_lex=0.5, R_dict=0.5, R_morph=1.0, hit=0.25, precision=0.5), (0.25 / 16 + 0.15) / 0.7),
        (values(R_lex=0.5, R_dict=0.7, R_morph=1.0, R_brev=0.5, hit=0.5), (0.25 * 0.25 + 0.21) * 0.5 / 0.7),
        # no wanted form: likeness earns nothing, and an attempt is an attempt at any length
        (values(R_lex=0.9, R_dict=0.1, R_morph=0.5, R_brev=0.5, hit=0.0), 0.03 / 0.7),
        (values(R_lex=0.9, R_dict=0.0, R_morph=0.5, P_hall=1.0, hit=0.0), -0.3),
        # a trace has its share where a form is wanted, and as much of it as R_lex where none is
        (values(R_lex=0.5, R_cot=0.5, R_dict=1.0, hit=1.0), (0.15 + 0.05 + 0.3) / 0.7),
        (values(R_lex=0.5, R_cot=1.0), (0.15 + 0.1 * 0.5) / 0.4),
        (values(R_lex=0.0, R_cot=1.0), 0.0),
        (values(R_lex=0.5, R_sem=0.8), (0.15 + 0.16) / 0.5),
        # nothing says what the answer is worth
        (values(), None),
        (values(R_cot=1.0, P_hall=0.0), None),
    ],
)
def test_total(given, expected):
    assert Composite(KNOWLEDGE)._total(given) == (None if expected is None else pytest.approx(expected))


def test_weights():
    assert score("mîva", weights={"R_dict": 2.0}).total == pytest.approx(0.1)  # W is 2 too
    assert score("mîvalo", weights={"R_dict": 1.0, "P_hall": 0.5}).total == -0.5
    assert (
        score("tâlo", make_task("Sue?", "It is to go", ()), weights={"R_dict": 1.0}).total is None
    )  # it asks for none


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"R_lexx": 1.0}, "no term R_lexx"),
        ({"R_lex": -0.1}, "at least 0"),
        ({"R_lex": float("nan")}, "at least 0"),
        ({"R_lex": float("inf")}, "at least 0"),
        ({}, "above 0"),
        ({"R_lex": 0.0, "P_hall": 1.0}, "above 0"),
        ({"R_cot": 1.0}, "above 0"),  # a trace alone says nothing about the answer
    ],
)
def test_weights_that_are_no_reward(weights, message):
    with pytest.raises(StoneyError, match=message) as caught:
        Composite(KNOWLEDGE, weights)
    assert "\n" not in str(caught.value)


def test_what_could_not_be_scored_is_counted():
    composite = Composite(KNOWLEDGE)
    tasks = [make_task(), make_task("Sue?", "It is to go.", ()), make_task("Sue?", "42.", ())]
    composite.score(tasks, ["liẖtâlo"] * 3)
    composite.score(tasks[:1], ["yes"])
    assert composite.scored == 4
    # R_dict, and R_morph, of the two rows that want no form; P_hall of "yes"; R_lex and the whole of "42."
    expected = {"R_lex": 1, "R_sem": 4, "R_cot": 4, "R_dict": 2, "R_morph": 2, "P_hall": 1, "total": 1}
    assert dict(composite.unscored) == expected


def test_lists_of_different_lengths_are_an_error():
    with pytest.raises(StoneyError, match="2 completions for 1 tasks"):
        Composite(KNOWLEDGE).score([make_task()], ["a", "b"])
    assert Composite(KNOWLEDGE).score([], []) == []


def test_a_trace_in_front_of_any_answer_is_not_paid_for():
    silent, unreadable = make_task("Sue?", "It means to gather.", ()), make_task("Sue?", "42.", ())
    assert score("<think>Let me see.</think>Who knows?", silent).total < 0.05
    assert score("<think>Let me see.</think>42.", unreadable).total is None


# Terms, examples and numbers of the README are those of the code.
EXAMPLES = [(list(line)[-1], line) for table in TABLES if "completion" in table[0] for line in table]


@pytest.mark.parametrize(("term", "line"), EXAMPLES, ids=[f"{term}-{n}" for n, (term, _) in enumerate(EXAMPLES)])
def test_examples_of_the_readme(term, line):
    (question,), (reference,), (completion,) = (quoted(line[key]) for key in ("question", "reference", "completion"))
    found = score(completion, make_task(question, reference, quoted(line["wanted"])))
    value = found.total if term == "R" else found.values[term]
    assert line[term] == ("None" if value is None else f"{value:.3f}")


def test_the_readme_has_an_example_of_every_term_but_the_encoders():
    assert len(LEXICON) == 6
    assert {term for term, _ in EXAMPLES} == {"R", *TERMS} - {"R_sem"}
    formula = README.read_text(encoding="utf-8").split("```")[1]
    for name, weight in DEFAULT_WEIGHTS.items():
        assert re.search(rf"{weight} (?:G · )?{name}\b", formula)


# -- what holds for any text

TASKS = [
    make_task('What is "I gather", if "tâlo" means "to gather"?', '"liẖtâlo".'),
    make_task("How do you say both?", "Say liẖtâlo or tâloṯel.", ("liẖtâlo", "tâloṯel")),
    make_task('What does "mîva" mean?', '"mîva" means "to sleep".', ()),
    make_task("How many?", "42.", ()),
]


@given(text=texts, task=st.sampled_from(TASKS), weights=st.fixed_dictionaries(dict.fromkeys(TERMS, st.floats(0, 1))))
@example(text="\ud800", task=TASKS[0], weights=DEFAULT_WEIGHTS)
@settings(max_examples=150, deadline=None)
def test_ranges(text, task, weights):
    weights = weights | {"R_lex": max(weights["R_lex"], 0.01)}
    found = score(text, task, weights=weights)
    for name, value in found.values.items():
        assert value is None or (isinstance(value, float) and 0 <= value <= 1), name
    assert found.total is None or -weights["P_hall"] - CLOSE <= found.total <= 1 + CLOSE
    assert (found.total is None) == (task is TASKS[3])


@given(text=texts, task=st.sampled_from(TASKS))
@settings(max_examples=150, deadline=None)
def test_unicode_forms_score_the_same(text, task):
    assert score(unicodedata.normalize("NFD", text), task) == score(unicodedata.normalize("NFC", text), task)
    assert score(unicodedata.normalize("NFD", text), task) == score(text, task)


@given(batch=st.lists(st.tuples(texts, st.sampled_from(TASKS)), min_size=1, max_size=6), seed=st.randoms())
@settings(max_examples=40, deadline=None)
def test_a_completion_is_scored_alone(batch, seed):
    """Neither the order of the rows nor what else is in the batch changes a score."""
    alone = [score(text, task) for text, task in batch]
    order = list(range(len(batch)))
    seed.shuffle(order)
    together = Composite(KNOWLEDGE).score([batch[at][1] for at in order], [batch[at][0] for at in order])
    assert together == [alone[at] for at in order]


unit, any_weight = st.floats(0, 1), st.floats(0, 100)


@given(
    weights=st.fixed_dictionaries(dict.fromkeys(TERMS, any_weight)).filter(lambda w: any(w[n] for n in JUDGES)),
    attack=st.fixed_dictionaries({"R_lex": unit, "R_sem": unit, "R_morph": unit, "R_brev": unit, "P_hall": unit}),
    trace=st.none() | unit,
    tried=st.floats(0, terms.ATTEMPT),
    answer=st.fixed_dictionaries({"R_lex": unit, "R_sem": unit}),
    off=st.sets(st.sampled_from(["R_sem", "R_morph", "R_lex"])),
)
@settings(max_examples=300)
def test_on_rows_that_want_a_form_any_weights_keep_the_order(weights, attack, trace, tried, answer, off):
    """Whatever else an attack without the form earns, an honest miss earns as much, and a right answer no less.

    What is ``off`` (no encoder, no segmentation, a question that is its own answer) is off for all answers to a row.
    """
    none = dict.fromkeys(off)
    composite = Composite(KNOWLEDGE, weights)
    attack = composite._total(values(**attack | {"R_cot": trace, "R_dict": tried, "hit": 0.0} | none))
    miss = composite._total(values(**{"R_lex": 0.0, "R_sem": 0.0, "R_morph": 0.0, "R_dict": 0.1, "hit": 0.0} | none))
    right = composite._total(values(**answer | {"R_morph": 1.0, "R_dict": 1.0, "P_hall": 0.0, "hit": 1.0} | none))
    if miss is None:  # all weight is on what is off
        assert attack is None and right is None
    else:
        assert attack <= miss + CLOSE
        assert miss <= right + CLOSE


# -- the attacks, on every row


class Field:
    """Everything that every attack and every reference says about the rows, scored once."""

    def __init__(self, rows, knowledge, seed=0, number=None):
        self.knowledge = knowledge
        tasks = [Task.of(row) for row in rows]
        self.tasks = sample(tasks, number or len(tasks), seed)
        ground = Ground(tasks, knowledge, random.Random(seed))
        self.texts, self.scores = {}, {}
        for name, make in {**REFERENCES, **ATTACKS, **NULL_POLICIES}.items():
            texts = {at: text for at, task in enumerate(self.tasks) if (text := make(task, ground)) is not None}
            found = Composite(knowledge).score([self.tasks[at] for at in texts], list(texts.values()))
            self.texts[name], self.scores[name] = texts, dict(zip(texts, found, strict=True))

    def totals(self, name, composite=None):
        composite = composite or Composite(self.knowledge)
        return {at: composite._total(found.values) for at, found in self.scores[name].items()}

    def check(self, name, composite=None, rows=None):
        """No row on which ``name`` is above the honest answer; none without the form on which it is above a miss."""
        earned, honest, miss, gold = (
            self.totals(which, composite) for which in (name, "honest answer", "honest miss", "gold")
        )
        for at in earned if rows is None else [at for at in earned if at in rows]:
            assert earned[at] <= honest[at] + CLOSE, (name, self.tasks[at], self.texts[name][at])
            assert earned[at] <= gold[at] + CLOSE
            if self.tasks[at].wanted and self.scores[name][at].values["hit"] < 1 and at in miss:
                assert earned[at] <= miss[at] + CLOSE, (name, self.tasks[at], self.texts[name][at])


@pytest.fixture(scope="module")
def planted():
    rows = lexemes.annotate(load_rows(ROOT / "data" / "planted" / "rows.jsonl").rows)
    return Field(rows, load_knowledge(ROOT / "data" / "planted" / "lexicon.jsonl"), number=100)


@pytest.fixture(scope="module")
def prose():
    rows = lexemes.annotate(prose_rows(PlantedLanguage(0, 120), 150)[0])
    return Field(rows, Knowledge.of(build_lexicon(rows)))


@pytest.fixture(scope="module")
def large():
    """45,000 forms with their segmentations."""
    built = [(segments(stem, rule), stem) for stem in PlantedLanguage(0, 6500).stems for rule in ("citation", *RULES)]
    return Knowledge.of(
        LexiconEntry("".join(parts), stem=stem, segmentation="-".join(parts)) for parts, stem in built[:45_000]
    )


@pytest.fixture(scope="module")
def real():
    if not REAL_DATA.is_dir():
        pytest.skip("no real rows here")
    rows = lexemes.annotate(load_rows(REAL_DATA).rows)
    return Field(rows, Knowledge.of(build_lexicon(rows)), number=300)


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_on_planted_rows(planted, attack):
    assert len(planted.texts[attack]) > 80
    planted.check(attack)


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_on_prose(prose, attack):
    # A lexicon that is built from rows segments nothing, so two attacks can't be made.
    assert (len(prose.texts[attack]) > 60) == (attack not in ("right affix, wrong stem", "right stem, no affix"))
    prose.check(attack)


@pytest.mark.real_data
@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_on_real_rows(real, attack):
    real.check(attack)


@pytest.mark.parametrize("where", ["planted", "prose", pytest.param("real", marks=pytest.mark.real_data)])
def test_references_on_every_row(where, request):
    """Gold earns 1 and nothing more is earned; a right answer in other words beats a miss, and what says nothing."""
    field = request.getfixturevalue(where)
    gold, honest, traced, miss = (field.totals(name) for name in REFERENCES)
    assert all(total == pytest.approx(1) for total in gold.values())
    assert all(honest[at] <= gold[at] + CLOSE and traced[at] <= gold[at] + CLOSE for at in gold)
    assert all(0 < miss[at] < honest[at] for at in miss)
    for at, task in enumerate(field.tasks):  # a trace that leads to the answer does no harm, and pays where a form is
        assert traced[at] >= honest[at] - CLOSE if task.wanted else traced[at] == pytest.approx(honest[at])
    for name in NULL_POLICIES:
        assert max(field.totals(name).values()) < 0.25
        assert np.mean(list(field.totals(name).values())) < 0.02


@pytest.mark.parametrize("where", ["planted", "prose", pytest.param("real", marks=pytest.mark.real_data)])
def test_nfd_earns_what_nfc_earns(where, request):
    field = request.getfixturevalue(where)
    for name in ("gold", "honest answer", "honest miss", "diacritics stripped"):
        texts = field.texts[name]
        tasks = [field.tasks[at] for at in texts]
        decomposed = [unicodedata.normalize("NFD", text) for text in texts.values()]
        assert decomposed != list(texts.values()) or name == "diacritics stripped"
        assert Composite(field.knowledge).score(tasks, decomposed) == list(field.scores[name].values())


weight_sets = st.fixed_dictionaries(
    dict.fromkeys(TERMS, st.sampled_from([0.0, 1.0]) | st.floats(0, 1)) | {"P_hall": st.floats(LEAST_PENALTY, 1)}
).filter(lambda weights: weights["R_lex"] > 0)  # without it, and without an encoder, half of the prose can't be scored


@given(weights=weight_sets)
@settings(max_examples=12, deadline=None)
@pytest.mark.parametrize("where", ["planted", "prose", pytest.param("real", marks=pytest.mark.real_data)])
def test_no_attack_wins_whatever_the_weights(where, request, weights):
    field = request.getfixturevalue(where)
    for name in ATTACKS:
        anchored = {"R_dict": max(weights["R_dict"], LEAST_ANCHOR)} if name == "alternatives listed" else {}
        field.check(name, Composite(field.knowledge, weights | anchored))


@given(penalty=st.sampled_from([0.0, 1.0]) | st.floats(0, 1), weights=weight_sets)
@settings(max_examples=12, deadline=None)
def test_on_rows_that_want_a_form_the_penalty_does_not_matter(prose, penalty, weights):
    rows = {at for at, task in enumerate(prose.tasks) if task.wanted}
    assert len(rows) > 50
    for name in ATTACKS:
        prose.check(name, Composite(prose.knowledge, weights | {"P_hall": penalty, "R_lex": 0.0, "R_dict": 0.1}), rows)


def said_by_hedger(task, ground):
    """(all alternatives with the wanted forms, each alternative by itself): None where there is no other form."""
    others = alternatives(task, ground)
    return others and (
        said([*task.wanted, *others]),
        [said([form, *task.wanted[1:]]) for form in (task.wanted[0], *others)],
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("where", ["planted", "prose", pytest.param("real", marks=pytest.mark.real_data)])
def test_naming_every_alternative_earns_no_more_than_guessing_one(where, seed, request):
    field = request.getfixturevalue(where)
    ground = Ground(field.tasks, field.knowledge, random.Random(seed))
    composite, gains = Composite(field.knowledge), []
    for task in field.tasks:
        if said_by := said_by_hedger(task, ground):
            hedged, guesses = said_by
            total, *guessed = (one.total for one in composite.score([task] * (1 + len(guesses)), [hedged, *guesses]))
            gains.append(total - np.mean(guessed))
    assert len(gains) > 60 and np.mean(gains) < 0
    # Real forms share words with each other and with English, which are not seen as alternatives: one row of 140.
    assert sum(gain > CLOSE for gain in gains) <= (TOLERANCE * len(gains) if where == "real" else 0)


@given(
    asked=st.integers(1, 4),
    named=st.integers(2, 9),
    invented=st.integers(0, 8),
    given=st.fixed_dictionaries({"R_lex": unit, "R_sem": unit, "R_cot": st.none() | unit}),
    weights=st.fixed_dictionaries(dict.fromkeys(TERMS, any_weight)).filter(lambda w: any(w[n] for n in JUDGES)),
)
@settings(max_examples=100, deadline=None)
def test_any_weights_make_a_list_worth_no_more_than_a_guess(asked, named, invented, given, weights):
    """The last of ``asked`` forms is not known; it is one of ``named`` candidates, of which ``invented`` are nobody's.

    Whoever lists all candidates earns at most what naming one of them at random earns on average, if the sentence is as
    like the reference. R_morph is 1 for the right form and 0 for another.
    """
    known = [f"tâ{'ko' * n}" for n in range(1, asked)]
    candidates = [f"mî{'ko' * n}" for n in range(1, named + 1)]
    wrong = candidates[1:]
    attested = frozenset([*known, candidates[0], *wrong[min(invented, len(wrong)) :]])
    task = make_task("Sue?", " ".join([*known, candidates[0]]), [*known, candidates[0]])
    composite = Composite(Knowledge(attested), weights)

    def total(forms):
        (scored,) = composite.score([task], [" ".join([*known, *forms])])
        right = float(candidates[0] in forms)
        return composite._total(scored.values | given | {"R_brev": 1.0, "R_morph": (asked - 1 + right) / asked})

    assert total(candidates) <= np.mean([total([form]) for form in candidates]) + 1e-7


def test_alternatives():
    task = make_task()
    ground = Ground([task], KNOWLEDGE, random.Random(0))
    assert sorted(alternatives(task, ground)) == ["liẖtâloṯel", "tâlo", "tâloṯel", "tâtâlo"]  # of the stem tâlo
    asked = make_task("Is tâlo right?")  # a form that the question names is no guess
    assert sorted(alternatives(asked, ground)) == ["liẖtâloṯel", "tâloṯel", "tâtâlo"]
    assert ATTACKS["alternatives listed"](task, ground).startswith('For this one says "liẖtâlo", "')
    assert alternatives(make_task("Sue?", "It is to go.", ()), ground) == []
    # without stems: forms that begin alike, but none that holds the wanted one
    bare = Knowledge.of(map(LexiconEntry, ["liẖtâlo", "liẖmîva", "liẖtâlo tâlo", "mîva"]))
    assert alternatives(task, Ground([task], bare, random.Random(0))) == ["liẖmîva"]


def test_a_right_answer_may_explain_itself():
    """Words of the question and the reference, and affixes, are no alternatives: nothing of the reward is lost."""
    task = make_task("What is the form of tâlo?", '"liẖtâlo", as in liẖmîva.')
    plain, explained = 'It is "liẖtâlo".', 'It is "liẖtâlo": the prefix liẖ- before tâlo, as in liẖmîva.'
    for text in (plain, explained):
        found = score(text, task)
        assert (found.values["precision"], found.values["R_dict"], found.values["P_hall"] or 0) == (1, 1, 0)
    assert score(explained, task).total > 0.6


def test_attacks_walk_the_lexicon_once(large):
    """45,000 forms and 100 tasks: the walks cost a fraction of a second of this process, not one each."""
    tasks = [make_task(reference=form, wanted=(form,)) for form in large.forms[:140] if form in large.segments]
    ground = Ground(tasks, large, random.Random(0))
    walking = ("right affix, wrong stem", "invented form", "alternatives listed")
    start = time.process_time()
    made = {name: [text for task in tasks if (text := ATTACKS[name](task, ground))] for name in walking}
    assert time.process_time() - start < 0.7  # measured: 0.15
    assert all(len(set(texts)) >= 100 for texts in made.values())


def test_a_reference_that_holds_its_form_twice_is_attacked_whole():
    """An attack that leaves a wanted form in its place, here with a capital, is no attack: the form earns its share."""
    task = make_task("Sue?", "Liẖtâlo is it: liẖtâlo.")
    ground = Ground([task], Knowledge.of([*LEXICON]), random.Random(0))
    assert ATTACKS["right stem, no affix"](task, ground) is None
    assert ATTACKS["right affix, wrong stem"](task, ground) is None
    assert ATTACKS["right stem, no affix"](make_task(reference="It is liẖtâlo."), ground) == "It is tâlo."
    assert ATTACKS["right affix, wrong stem"](make_task(reference="It is liẖtâlo."), ground) == "It is liẖmîva."


def test_padding_is_longer_than_any_reference():
    task = make_task(reference="liẖtâlo " + "A long story. " * 500)
    assert score(ATTACKS["gold, padded"](task, None), task).total < 0.1


def test_a_large_batch_against_a_large_lexicon_is_quick(large):
    """1,024 completions, 64 groups of 16, against 45,000 forms: seconds of this process, so that neighbours don't matter."""
    assert len(large.forms) == 45_000
    rows = lexemes.annotate(prose_rows(PlantedLanguage(0, 120), 64)[0])
    group = [task for task in map(Task.of, rows) for _ in range(16)]
    rng = random.Random(0)
    texts = [f"{rng.choice(large.forms)}: {normalize(task.reference)[rng.randrange(20) :]}" for task in group]
    start = time.process_time()
    Composite(large).score(group, texts)
    assert time.process_time() - start < 1.5  # measured: 0.3


def test_task_of_a_row():
    row = Row(
        id="r",
        source="x:1",
        prompt=[{"role": "user", "content": "Is tâlo a verb?"}, {"role": "assistant", "content": "Yes, like mîva."}]
        + [{"role": "user", "content": "And I gather?"}],
        completion=[{"role": "assistant", "content": "liẖtâlo"}],
        lexemes=["tâlo", "liẖtâlo"],
        metadata={"level": 2},
    )
    task = Task.of(row)
    assert (task.question, task.reference, task.wanted) == ("And I gather?", "liẖtâlo", ("liẖtâlo",))
    assert task.allowed == {"tâlo", "mîva", "liẖtâlo"}  # of the whole conversation
    assert task.columns == {"level": 2, "lexemes": row.lexemes, "prompts": row.prompt}
    assert hash(task)


def test_knowledge_of_a_lexicon():
    assert KNOWLEDGE.forms == ("tâlo", "liẖtâlo", "tâloṯel", "liẖtâloṯel", "tâtâlo", "mîva")
    assert KNOWLEDGE.segments["tâtâlo"] == ("tâ", "tâlo")
    assert KNOWLEDGE.segments["liẖtâloṯel"] == ("liẖ", "tâlo", "ṯel")
    assert KNOWLEDGE.morphs == {"tâlo", "liẖ", "ṯel", "tâ", "mîva"}
    bare = Knowledge.of([LexiconEntry(form="Tâlo mîva")])
    assert (bare.attested, bare.segments, bare.morphs) == ({"tâlo", "mîva"}, {}, frozenset())


def test_knowledge_comes_from_a_file_or_a_prepared_directory(tmp_path):
    assert len(load_knowledge(ROOT / "data" / "planted" / "lexicon.jsonl").forms) == 1155
    with pytest.raises(StoneyError, match="no prepared dataset"):
        load_knowledge(tmp_path)
    with pytest.raises(StoneyError, match="can't be read"):
        load_knowledge(tmp_path / "none.jsonl")
