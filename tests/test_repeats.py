"""Repeats, contradictions and answers given away. All language forms are invented, but for the rows under real_data."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stoney_rl.data import Row, load_rows
from stoney_rl.errors import StoneyError
from stoney_rl.inspection import repeats
from stoney_rl.inspection.findings import FAILURE, NOTE
from stoney_rl.lexemes import annotate
from stoney_rl.planted import PlantedLanguage
from stoney_rl.planted_prose import prose_rows

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = Path(os.environ.get("STONEY_REAL_DATA") or ROOT.parent / "shared" / "data")


def rows_of(*pairs, lexemes=None):
    """Rows r0, r1, ... of (question, answer); ``lexemes``, if given, one list for each."""
    return [
        Row(
            id=f"r{number}",
            source=f"test:{number + 1}",
            prompt=[{"role": "user", "content": question}],
            completion=[{"role": "assistant", "content": answer}],
            lexemes=list(lexemes[number]) if lexemes else [],
            metadata={},
        )
        for number, (question, answer) in enumerate(pairs)
    ]


def found(rows, **options):
    """Kind -> {row id: detail}."""
    section = repeats.find(rows, **options)
    return {finding.kind: dict(zip(finding.row_ids, finding.details, strict=True)) for finding in section.findings}


# Exact duplicates


def test_exact_duplicates_differ_in_case_space_and_punctuation_alone():
    rows = rows_of(
        ("What does `tâlo` mean?", "It means 'gather'."),
        ('what  does "TÂLO"\nmean', "It means: 'gather'"),
        ("What does `talo` mean?", "It means 'gather'."),  # a diacritic is another letter
    )
    assert found(rows)["exact_duplicates"] == {"r1": "same as r0"}


def test_signs_between_numbers_are_not_punctuation():
    rows = rows_of(("What is 3 + 4?", "7."), ("What is 3 * 4?", "12."), ("What is 3.4?", "A number."))
    assert found(rows) == {}
    assert "exact_duplicates" in found(rows_of(("What is 3 + 4?", "7."), ("what is 3+4", "7")))


def test_all_turns_of_a_prompt_count():
    first, second = rows_of(("And in the plural?", '"tâloṯel"'), ("And in the plural?", '"mîvaṯel"'))
    earlier = [{"role": "user", "content": "What is tâlo?"}, {"role": "assistant", "content": "A verb."}]
    first = Row(first.id, first.source, [*earlier, *first.prompt], first.completion, [], {})
    assert found([first, second]) == {}


# Near duplicates

LONG = 'In the story that is told at night, what does the invented word "{}" mean when "{}" is said of a child?'
REPLY = 'Here it means "{}", and nobody in the story would say it of a stranger or of an animal.'


def test_the_rows_of_one_template_are_no_duplicates():
    pairs = [(LONG.format(form, form), REPLY.format(gloss)) for form, gloss in (("tâlo", "lean"), ("mîva", "sing"))]
    assert found(annotate(rows_of(*pairs))).get("near_duplicates") is None
    # The similarity alone would call them copies: without a form, and with the same quotes, they are.
    assert "near_duplicates" in found(rows_of(*[(q.replace('"', ""), a.replace('"', "")) for q, a in pairs]))


@pytest.mark.parametrize(
    ("form", "gloss", "duplicate"),
    [
        ("tâlo", "to lean", True),
        ("talo", "to lean", True),  # a diacritic left out
        ("tâlov", "to lean", True),  # a letter more
        ("tâlu", "to lean", True),
        ("tâluv", "to lean", False),  # two letters: another word
        ("tâlo", "lean", True),
        ("tâlo", "to leean", True),  # a typing mistake
        ("tâlo", "to learn", False),  # a letter apart as well, but another English word
        ("tâlo", "to sing", False),
    ],
)
def test_forms_and_glosses_decide(form, gloss, duplicate):
    rows = rows_of(
        (LONG.format("tâlo", "tâlo"), REPLY.format("to lean")),
        (LONG.format(form, form).replace("at night", "at noon"), REPLY.format(gloss)),
        lexemes=[["tâlo"], [form]],
    )
    assert ("near_duplicates" in found(rows)) == duplicate


def test_a_wording_in_another_order_is_a_near_duplicate():
    rows = PlantedLanguage(0, 1).rows(rules_per_lexeme=1, templates_per_fact=6)
    near = found(rows)["near_duplicates"]
    assert rows[0].id not in near and len(near) >= 4
    similarity, _, original = next(iter(near.values())).split()
    assert 0.8 <= float(similarity) < 1 and original in {row.id for row in rows}
    # Six rules of one verb are six facts.
    facts = PlantedLanguage(0, 30).rows(rules_per_lexeme=6, templates_per_fact=1)
    assert "near_duplicates" not in found(facts)


def test_the_similarity_is_the_jaccard_similarity_of_shingles():
    # " ab abcd " and " ab abce ": 3-character shingles " ab" "ab " "b a" "abc" and "bcd" "cd " against "bce" "ce ".
    rows = rows_of(("ab", "abcd"), ("ab", "abce"))
    assert found(rows, threshold=0.5)["near_duplicates"] == {"r1": "0.50 like r0"}
    assert "near_duplicates" not in found(rows, threshold=0.51)


def test_copies_are_found_among_many_rows_of_their_template():
    names = ["".join((a, "â", b, "o")) for a in "bdgkmnprst" for b in "fvlz"]
    pairs = [(LONG.format(name, name), "Nobody in the story would say it of a stranger.") for name in names]
    copies = [(question.replace("at night", "at noon"), answer) for question, answer in pairs]
    near = found(rows_of(*pairs, *copies, lexemes=[[name] for name in names] * 2))["near_duplicates"]
    assert {copy: detail.split()[-1] for copy, detail in near.items()} == {
        f"r{number + len(names)}": f"r{number}" for number in range(len(names))
    }
    # Without forms all are in one bucket, whose first rows each row is compared with.
    text = "How many people came to the feast that was held at the end of the long winter in the year {}?{}"
    years = [(text.format(year, ""), "Nobody has counted them.") for year in range(1900, 1920)]
    near = found(rows_of(*years, (text.format(1900, " Say it!"), "Nobody has counted them.")))["near_duplicates"]
    assert list(near) == ["r20"] and near["r20"].endswith(" like r0")


def test_numbers_are_claims():
    text = "How many people came to the feast that was held at the end of the long winter in the year {}?"
    rows = rows_of((text.format(1901), "Nobody has counted them."), (text.format(1902), "Nobody has counted them."))
    assert found(rows) == {}


def test_clusters():
    text = "The story of the long winter says that the snow was deep and that nobody left the house until spring came{}"
    rows = rows_of(
        *[("Tell it.", text.format(end)) for end in (".", " again.", " back again.")], ("Why?", "Who knows.")
    )
    figures = repeats.find(rows).figures["near_duplicates"]
    assert (figures["count"], figures["clusters"], figures["largest_cluster"]) == (2, 1, 3)


def test_the_probability_of_a_candidate():
    # 16 bands of 4: 1 - (1 - 0.8^4)^16 = 1 - 0.5904^16
    assert repeats.bands(0.8) == (16, 4)
    assert repeats.candidate_probability(0.8, 16, 4) == pytest.approx(1 - 0.5904**16)
    assert all(repeats.candidate_probability(t / 100, *repeats.bands(t / 100)) >= 0.995 for t in range(10, 101))
    assert repeats.bands(0.5) == (32, 2)


@pytest.mark.parametrize("threshold", [0, -1, 1.01, float("nan")])
def test_a_threshold_out_of_range(threshold):
    with pytest.raises(StoneyError, match="threshold is .*give a similarity"):
        repeats.find([], threshold=threshold)


# Contradictions


@pytest.mark.parametrize(
    ("question", "one", "other", "detail"),
    [
        ('How do you say "to gather"?', 'You say "tâlo".', 'It is "mîva".', "against r0: mîva / tâlo"),
        ('What does "tâlo" mean?', 'It means "to gather".', '"tâlo" is "to sing".', "against r0: sing / gather"),
        ('What does "tâlo" mean?', 'It means "I sing".', 'It means "you sing".', "against r0: you sing / i sing"),
        ('Is "tâlo" a verb?', "Yes, it is.", "No, it is not.", "against r0: no / yes"),
        (
            'What is "tâlo"?',
            "A verb of motion.",
            "Some kind of fish.",
            "against r0: Some kind of fish. / A verb of motion.",
        ),
        # the same in other words, more than the other says, or only compared with something else
        ('How do you say "to gather"?', 'You say "tâlo".', "The word for it is `tâlo`.", None),
        ('How do you say "to gather"?', 'You say "tâlo".', 'Say "mîva" or "tâlo".', None),
        ('How do you say "to gather"?', 'Say "tâlo", not "mîva".', 'Say "tâlo", not "kûfa".', None),
        ('What does "tâlo" mean?', 'It means "to gather".', '"gather", an "active verb".', None),
        ('What does "tâlo" mean?', 'An "active verb": "to sing".', 'It means "sing", a "stative verb".', None),
        ('What is "tâlo"?', "It is a verb of motion.", "A verb of slow motion, I think.", None),
    ],
)
def test_contradictions(question, one, other, detail):
    rows = annotate(rows_of((question, one), (question.lower(), other)))
    contradictions = found(rows).get("contradictions")
    assert (contradictions or {}).get("r1") == detail
    if detail:
        assert contradictions["r0"].startswith("against r1: ")


def test_all_rows_of_a_contradictory_question_are_named_and_counted():
    question = 'How do you say "to gather"?'
    rows = annotate(
        rows_of(
            *[(question, f'You say "{form}".') for form in ("tâlo", "mîva", "tâlo")],
            ("How does one sing?", "Well."),
            ("How does one sing?", "Well!"),
        )
    )
    section = repeats.find(rows)
    contradictions = next(finding for finding in section.findings if finding.kind == "contradictions")
    assert contradictions.row_ids == ("r0", "r1", "r2") and contradictions.severity == FAILURE
    assert section.figures["questions"] == {
        "different": 2,
        "asked_more_than_once": 2,
        "always_with_the_same_answer": 1,
        "with_other_answers": 1,
    }


# Free rewards


def test_an_answer_that_repeats_its_question():
    rows = rows_of(
        ("What is the plural here?", 'What is the plural HERE: it is "tâloṯel".'),
        ("What is the plural here?", "The plural here is what it is."),
        ("What is that?", "What is that? A verb."),  # three words stand in an answer by chance
    )
    assert found(rows)["answer_repeats_question"] == {"r0": ""}


@pytest.mark.parametrize(
    ("question", "answer", "kind", "detail"),
    [
        ('How would you say "to gather" (hint: "tâlo")?', 'You would say "tâlo".', "gives", "given: tâlo"),
        ('Which invented word, like "tâlo", means "to gather"?', '"tâlo".', "gives", "given: tâlo"),
        ('Translate "to gather" into the invented language; "tâlo" will do.', 'It is "tâlo".', "gives", "given: tâlo"),
        ('What class has "tâlo", a noun of place?', "A noun of place.", "gives", "given: A noun of place."),
        ('Which fits, "tâlo" or "mîva"?', '"tâlo" fits.', "offers", "offered among others: tâlo"),
        ('Which term, "tâlo" (verb) or "mîva" (verb), would you use?', 'Use "tâlo", as "mîva" is "sing".', "offers",
         "offered among others: tâlo, mîva"),
        ('"tâlo" and "tâloṯel" are known. Which form is right, that is "mîva"?', '"mîva".', "gives", "given: mîva"),
        # English is asked for, or something about the forms
        ('What does "tâlo" mean?', '"tâlo" means "to gather".', None, None),
        ('How would you translate the invented term "tâlo" into English?', '"tâlo" is "to gather".', None, None),
        ('Which word is "tâlo" in English?', '"tâlo" is "gather".', None, None),
        ('What English word translates "tâlo"?', '"tâlo" is "gather".', None, None),
        ('How do "tâlo" and "mîva" differ?', '"tâlo" is "gather", "mîva" is "sing".', None, None),
        ('What difference is there between the terms "tâlo" and "mîva"?', '"tâlo" is short, "mîva" long.', None, None),
        ('"tâlo" and "mîva" translate to "sing". What distinguishes these two verbs?', '"tâlo", "mîva": age.', None, None),
        ('What type of noun is "tâlo"?', '"tâlo" is alienable.', None, None),
        ('How would you say "to gather"?', 'You would say "tâlo".', None, None),
        ('The verb "tâlo" means "gather". What is the form for "I gather"?', '"liẖtâlo".', None, None),
        ('Is "tâlo" right or not?', "Not.", None, None),
    ],
)  # fmt: skip
def test_questions_that_hold_their_answer(question, answer, kind, detail):
    by_kind = found(annotate(rows_of((question, answer))))
    held = {name: list(by_kind[f"question_{name}_answer"].values()) for name in ("gives", "offers")
            if f"question_{name}_answer" in by_kind}  # fmt: skip
    assert held == ({kind: [detail]} if kind else {})


def test_a_planted_row_is_asked_for_its_form():
    row = PlantedLanguage(0, 1).rows(rules_per_lexeme=1, templates_per_fact=1)[0]
    assert found([row]) == {}
    prompt = [{"role": "user", "content": f"{row.question} Not {row.metadata['form']}?"}]
    leaked = Row(row.id, row.source, prompt, row.completion, row.lexemes, row.metadata)
    assert found([leaked])["question_gives_answer"] == {row.id: f"given: {row.metadata['form']}"}


def test_what_an_echo_earns():
    rows = annotate(
        rows_of(
            ('What does "tâlo" mean?', '"tâlo" means "to gather".'),
            ('What is the plural of "tâlo"?', '"tâloṯel" is the plural of "tâlo".'),
            ('How do you say "to gather"?', '"tâlo".'),
            ("Who speaks the invented language?", "Nobody."),
        )
    )
    section = repeats.find(rows)
    (echo,) = section.findings
    assert (echo.kind, echo.severity, echo.row_ids, echo.details) == ("echo_earns_forms", NOTE, ("r0",), ("tâlo",))
    shares = section.figures["forms_of_the_answer_in_the_question"]
    assert {name: share["count"] for name, share in shares.items()} == {
        "all": 1, "some": 1, "none": 1, "no_form_in_answer": 1,
    }  # fmt: skip
    assert all(share["share"] == 0.25 for share in shares.values())


# The whole


def test_clean_rows_have_no_failures():
    rows = annotate(prose_rows(PlantedLanguage(7, 300), 3000, 7)[0])
    assert [finding.kind for finding in repeats.find(rows).findings if finding.severity == FAILURE] == []


def test_no_rows_and_rows_without_words():
    assert repeats.find([]).findings == []
    assert repeats.find(rows_of(("?", "!"), ("!", "?"), ("", ""))).findings == []


def test_the_same_section_in_every_process():
    code = (
        "from stoney_rl.planted import PlantedLanguage\n"
        "from stoney_rl.inspection import repeats\n"
        "import sys; assert not {'numpy', 'rensa', 'rapidfuzz'} & set(sys.modules)\n"
        "print(repr(repeats.find(PlantedLanguage(1, 40).rows())))"
    )
    outputs = set()
    for seed in ("0", "1"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        outputs.add(
            subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        )
    assert len(outputs) == 1 and "near_duplicates" in outputs.pop()


def seconds(rows):
    began = time.process_time()
    repeats.find(rows)
    return time.process_time() - began


@pytest.mark.parametrize("trap", ["one question", "one template", "one form", "one gloss"])
def test_the_cost_grows_with_the_rows(trap):
    rng = random.Random(0)
    names = ["".join(rng.choice("bdgkmnprst") + rng.choice("aeiou") for _ in range(4)) for _ in range(6000)]

    def rows(count):
        story = "In the book of tales about the village by the river, what is said of {} and the winter?"
        pairs, lexemes = [], []
        for name in names[:count]:
            question, answer = story.format(name), "That the snow was deep."
            if trap == "one question":
                question, answer = "Who is it?", f"It is {name}."
            elif trap == "one gloss":
                question, answer = f'Is "{name}" right for "gather"?', "Yes."
            pairs.append((question, answer))
            lexemes.append({"one form": ["tâlo"], "one gloss": [name]}.get(trap, []))
        return rows_of(*pairs, lexemes=lexemes)

    seconds(rows(100))
    # All pairs of four times the rows would cost sixteen times as much.
    assert min(seconds(rows(6000)) for _ in range(2)) < 8 * seconds(rows(1500)) + 0.5


def test_one_enormous_row():
    words = " ".join("".join(random.Random(at).choices("bdgkmnaeiou", k=6)) for at in range(150_000))
    rows = rows_of(("What?", words), ("What?", words + " more"), (words, "x"), ("'\"`" * 300_000, "which " * 100_000))
    assert seconds(rows) < 10
    # Compared by the first MAX_CHARACTERS of the prompt and of the answer.
    assert found(rows)["near_duplicates"] == {"r1": "1.00 like r0", "r2": "1.00 like r0"}


@pytest.mark.real_data
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no real rows here")
def test_real_rows():
    section = repeats.find(annotate(load_rows(str(REAL_DATA)).rows))
    assert [finding.kind for finding in section.findings] == ["question_offers_answer", "echo_earns_forms"]
    # 17 of the 1,000 are multiple choice, all of them read; no question gives its answer away.
    assert section.findings[0].count == 17
    assert section.figures["forms_of_the_answer_in_the_question"]["all"]["share"] == pytest.approx(0.47, abs=0.01)
