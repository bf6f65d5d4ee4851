"""Preference pairs: files as people write them, pairs made of gold answers, and splits that leak nothing.

All words are invented.
"""

import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from stoney_rl import corpus, split
from stoney_rl.data import write_jsonl
from stoney_rl.errors import StoneyError
from stoney_rl.lexemes import contains_form
from stoney_rl.planted import PlantedLanguage
from stoney_rl.rewards import attacks, preferences
from stoney_rl.rewards.composite import Task
from stoney_rl.rewards.knowledge import Knowledge
from stoney_rl.rewards.preferences import CORRUPTIONS, GRADED, KEEP_THE_FORM, KINDS, bootstrap, load_pairs, split_pairs


def write(path: Path, lines: list) -> Path:
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines),
        encoding="utf-8",
    )
    return path


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


# Files.


def test_a_file_as_people_write_them(tmp_path):
    asked = turn("user", "What is gather?")
    lines = [
        {"prompt": "What is gather?", "chosen": "ta\u0302lo", "rejected": "talo", "kind": "no diacritic", "id": 7},
        {"prompt": [asked], "chosen": [turn("assistant", "tâlo")], "rejected": [turn("assistant", "mîva")], "id": "b"},
        {"chosen": [asked, turn("assistant", "tâlo")], "rejected": [asked, turn("assistant", "liẖ")], "annotator": "A"},
        {"prompt": "What is gather?", "chosen": [asked, turn("assistant", "tâlo")], "rejected": "no", "comment": "x"},
        {"prompt": [turn("system", "Be brief."), asked], "chosen": "tâlo", "rejected": "well", "lexemes": ["tâlo"], "id": "b"},
    ]  # fmt: skip
    file = load_pairs(write(tmp_path / "pairs.jsonl", lines))
    assert not file.quarantine
    assert [pair.id for pair in file.pairs] == ["7", "b", "pairs.jsonl:3", "pairs.jsonl:4", "b#2"]
    assert {pair.chosen for pair in file.pairs} == {"tâlo"}  # NFC, whatever was written
    assert [pair.rejected for pair in file.pairs] == ["talo", "mîva", "liẖ", "no", "well"]
    assert all(pair.row.prompt == [asked] for pair in file.pairs)
    assert [pair.kind for pair in file.pairs] == ["no diacritic", *["unnamed"] * 4]
    assert file.pairs[2].row.metadata == {"annotator": "A"} and file.pairs[3].row.metadata == {"comment": "x"}
    assert file.pairs[4].row.metadata == {"system": "Be brief."} and file.pairs[4].row.lexemes == ["tâlo"]
    assert file.files[0]["rows"] == 5


def test_bad_lines_are_set_aside_with_their_numbers(tmp_path):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    other = [turn("user", "q"), turn("assistant", "b")]
    bad = {
        2: ("{not json", "JSON"),
        3: ({"prompt": "p", "chosen": "a"}, r"^missing column: rejected \(found prompt, chosen\)$"),
        4: (good | {"chosen": " "}, "^chosen is empty: expected text$"),
        5: (good | {"rejected": 3}, "^rejected is a number: expected text$"),
        6: (good | {"rejected": "a "}, "^chosen and rejected are the same: "),
        7: ({"chosen": "a", "rejected": "b"}, "^prompt is missing: "),
        8: (good | {"rejected": other}, "^prompts differ: "),
        9: ([1, 2], "^not an object: "),
        10: (good | {"prompt": "a\u0000b"}, "^NUL character: "),
        11: (good | {"kind": ["x"]}, "^kind is not text: "),
        12: (good | {"chosen": [turn("narrator", "x")]}, "^unknown role: "),
        13: (good | {"chosen": []}, "."),
    }
    lines = [good, *[line for line, _ in bad.values()], good | {"chosen": "c"}]
    file = load_pairs(write(tmp_path / "pairs.jsonl", lines))
    assert [pair.chosen for pair in file.pairs] == ["a", "c"]
    assert [one.line for one in file.quarantine] == list(bad)
    for one in file.quarantine:
        assert re.search(bad[one.line][1], one.reason), (one.line, one.reason)
        assert one.source == "pairs.jsonl"
    assert "12 lines are none, the first: pairs.jsonl line 2" in preferences.describe(file)


def test_contradictions_are_counted(tmp_path):
    one = {"prompt": "p", "chosen": "a", "rejected": "b"}
    lines = [one, one, {"prompt": "P", "chosen": "b", "rejected": "a"}, {"prompt": "q", "chosen": "b", "rejected": "a"}]
    assert preferences.describe(load_pairs(write(tmp_path / "p.jsonl", lines))).endswith(
        "; 1 are contradicted by another pair."
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.jsonl", None, "absent.jsonl does not exist; expected a file or folder of preference pairs"),
        ("notes.md", "x", "notes.md is of no kind that can be read"),
        ("empty.jsonl", "", "empty.jsonl has no preference pair; expected prompt, chosen and rejected"),
        ("rows.jsonl", '{"question": "q", "answer": "a"}', r"line 1: missing column: chosen.*need --bootstrap"),
        ("bad.jsonl.gz", "not gzip", "bad.jsonl.gz can't be read: "),
    ],
)
def test_files_that_are_none(tmp_path, monkeypatch, name, content, said):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(StoneyError, match=said):
        load_pairs(name)


def test_what_is_written_is_read_again(tmp_path, made):
    path = write(tmp_path / "pairs.jsonl", [pair.to_dict() for pair in made.test])
    back = load_pairs(path).pairs
    assert [(pair.id, pair.row.prompt, pair.chosen, pair.rejected, pair.kind, pair.row.lexemes) for pair in back] == [
        (pair.id, pair.row.prompt, pair.chosen, pair.rejected, pair.kind, pair.row.lexemes) for pair in made.test
    ]


# Splits of files.


def human(number: int) -> list[dict]:
    """Two pairs on each of ``number`` prompts, about stems that stand unquoted."""
    stems = PlantedLanguage(0, number).stems
    return [
        {
            "prompt": f"Say something with {stem} in it.",
            "chosen": f"Here is {stem}. {n}",
            "rejected": f"Here is none. {n}",
        }
        for stem in stems
        for n in range(2)
    ]


def test_a_file_is_split_by_prompt(tmp_path):
    pairs = split_pairs(load_pairs(write(tmp_path / "p.jsonl", human(20))), test_fraction=0.2, validation_fraction=0.1)
    assert [len(part) for part in (pairs.train, pairs.validation, pairs.test)] == [28, 4, 8]
    assert not pairs.by_lexeme and pairs.describe()["split_by"] == "prompt"
    prompts = [{pair.row.question for pair in part} for part in (pairs.train, pairs.validation, pairs.test)]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 20
    assert pairs.corpus.split.certificate["overlaps"] == {"prompts_in_two_splits": 0}


def test_the_split_by_prompt_does_not_depend_on_the_order(tmp_path):
    lines = human(20)
    first = split_pairs(load_pairs(write(tmp_path / "p.jsonl", lines)))
    random.Random(1).shuffle(lines)
    second = split_pairs(load_pairs(write(tmp_path / "q.jsonl", lines)))
    assert {pair.row.question for pair in first.test} == {pair.row.question for pair in second.test}
    other = split_pairs(load_pairs(tmp_path / "p.jsonl"), split_seed=1)
    assert {pair.row.question for pair in other.test} != {pair.row.question for pair in first.test}


def test_with_a_lexicon_the_split_is_by_lexeme(tmp_path):
    lines = human(30)
    # Only the rejected answers name a second stem: a training pair must not show it either.
    stems = PlantedLanguage(0, 30).stems
    for at in range(0, 30, 2):
        lines[2 * at]["rejected"] = f"Here is {stems[at + 1]}."
    knowledge = Knowledge.of(PlantedLanguage(0, 30).lexicon())
    file = load_pairs(write(tmp_path / "p.jsonl", lines))
    pairs = split_pairs(file, knowledge, test_fraction=0.3)
    assert pairs.by_lexeme and pairs.corpus.split.certificate["overlaps"]["test_unseen_in_train"] == 0
    unseen = {form for pair in pairs.test if not pairs.seen[pair.id] for form in pair.row.lexemes}
    assert len(unseen) >= 8
    for pair in pairs.train:
        for text in (pair.row.question, pair.chosen, pair.rejected):
            assert not any(contains_form(text, form) for form in unseen)


def test_a_lexicon_that_knows_no_word_is_refused(tmp_path):
    file = load_pairs(write(tmp_path / "p.jsonl", human(20)))
    with pytest.raises(StoneyError, match="--lexicon: none of its forms stands in the pairs"):
        split_pairs(file, Knowledge(frozenset(), ("ẖẖẖâ",)))


def test_too_few_prompts(tmp_path):
    with pytest.raises(StoneyError, match="9 prompts are too few for a split; give pairs on at least 10"):
        split_pairs(load_pairs(write(tmp_path / "p.jsonl", human(9))))


# Corruptions.


@pytest.fixture
def task():
    return Task("1", 'What is "to gather" for me?', '"liẖtâlo".', ("liẖtâlo",), frozenset())


@pytest.fixture
def ground():
    forms = ("tâlo", "liẖtâlo", "tâloṯel", "mîva", "liẖmîva")
    segments = {"liẖtâlo": ("liẖ", "tâlo"), "tâloṯel": ("tâlo", "ṯel"), "tâlo": ("tâlo",), "mîva": ("mîva",)}
    stems = {"tâlo": "tâlo", "liẖtâlo": "tâlo", "tâloṯel": "tâlo", "mîva": "mîva", "liẖmîva": "mîva"}
    families = {"tâlo": ["tâlo", "liẖtâlo", "tâloṯel"], "mîva": ["mîva", "liẖmîva"]}
    knowledge = Knowledge(frozenset(forms), forms, segments=segments, stems=stems)
    return preferences._Ground((), knowledge, random.Random(0), families)


@pytest.mark.parametrize(
    ("kind", "possible"),
    [
        ("one diacritic", {'"lihtâlo".', '"liẖtalo".'}),
        ("diacritics stripped", {'"lihtalo".'}),
        ("right stem, another affix", {'"tâlo".', '"tâloṯel".'}),
        ("right stem, no affix", {'"tâlo".'}),
        ("right affix, wrong stem", {'"liẖmîva".'}),
        ("another form", {'"tâlo".', '"tâloṯel".', '"mîva".', '"liẖmîva".'}),
        ("right, repeated", {" ".join(['"liẖtâlo".'] * n) for n in (2, 3, 4, 5)}),
        ("prompt echoed", {'What is "to gather" for me?'}),
    ],
)
def test_corruptions_by_hand(kind, possible, task, ground):
    found = {preferences._rejected(kind, task, ground) for _ in range(50)}
    assert found and found <= possible
    assert len(found) == len(possible)


def test_a_form_without_diacritics_gets_one(task, ground):
    plain = replace(task, wanted=("mo",), reference='"mo".')
    assert {preferences.one_diacritic(plain, ground) for _ in range(30)} == {'"m̂o".', '"mô".'}


def test_an_answer_that_keeps_the_form_is_not_called_worse(task, ground):
    given = replace(task, question='Is it "liẖtâlo"?')
    assert preferences._rejected("prompt echoed", given, ground) is None
    assert preferences._rejected("right, repeated", given, ground)


def test_forms_of_several_words_are_found_whole():
    find = preferences._FormFinder(("tâlo", "mîva tâlo", "of the"))
    assert find("Say Mîva, tâlo. Of the rest: mîva.") == ["mîva tâlo", "tâlo"]  # "of the" is English too
    assert preferences._mentions("a mîva-tâlo of it", frozenset({"mîva tâlo"}))
    assert not preferences._mentions("a mîva of tâlo", frozenset({"mîva tâlo"}))


def test_a_row_that_asks_for_no_form_has_no_corrupted_form(task, ground):
    prose = replace(task, wanted=(), reference="It means to gather.")
    made = {kind for kind in CORRUPTIONS if kind != "another row's gold" and preferences._rejected(kind, prose, ground)}
    assert made == {
        "right, repeated",
        "right, then rambling",
        "cut short",
        "prompt echoed",
        "fluent English",
        "shuffled",
    }


# Pairs made of rows.


@pytest.fixture(scope="module")
def language():
    return PlantedLanguage(0, 40)


@pytest.fixture(scope="module")
def rows(language, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_jsonl(path, language.rows(rules_per_lexeme=2, templates_per_fact=2))
    return corpus.prepare(path, test_fraction=0.2, validation_fraction=0.1)


@pytest.fixture(scope="module")
def knowledge(language):
    return Knowledge.of(language.lexicon())


@pytest.fixture(scope="module")
def made(rows, knowledge):
    return bootstrap(rows, knowledge, pairs_per_row=4, seed=0)


def test_every_kind_is_there_and_about_as_often(made):
    counts = Counter(pair.kind for pair in made.train)
    assert set(counts) == set(KINDS)
    assert max(counts.values()) - min(counts.values()) <= 0.3 * max(counts.values())
    assert preferences.kinds_of(made.train) == list(KINDS)


def test_chosen_is_right_and_rejected_is_not(made):
    for pair in [*made.train, *made.validation, *made.test]:
        form = pair.row.metadata["form"]
        assert contains_form(pair.chosen, form) == (pair.kind not in GRADED)
        assert contains_form(pair.rejected, form) == (pair.kind in KEEP_THE_FORM)
    honest = Counter(pair.row.id for pair in made.train if pair.chosen.startswith("For this one says"))
    assert set(honest.values()) == {2} and len(honest) == len({pair.row.id for pair in made.train})  # two of four


def test_a_miss_is_an_attested_form(made, knowledge):
    misses = [pair for pair in made.train if pair.kind in GRADED]
    assert misses and all(any(contains_form(pair.chosen, form) for form in knowledge.forms) for pair in misses)


def test_style_does_not_tell_the_sides_apart(made):
    """A corruption of the form keeps the chosen answer's wording: only the form differs."""
    for pair in made.train:
        if pair.kind in list(CORRUPTIONS)[:8]:
            assert pair.chosen.startswith("For this one says") == pair.rejected.startswith("For this one says")


def test_pairs_keep_the_split_of_the_rows(made, rows):
    for name in ("train", "validation", "test"):
        assert {pair.row.id for pair in getattr(made, name)} == {row.id for row in getattr(rows.split, name)}
        assert all(count <= 4 for count in Counter(pair.row.id for pair in getattr(made, name)).values())
    assert all(made.seen[pair.id] == rows.split.seen[pair.row.id] for pair in made.test)
    assert made.describe()["sha256"] == rows.rowset.sha256


def test_no_training_pair_shows_a_held_out_form(made, rows, knowledge):
    held = {form for row in rows.split.test if not rows.split.seen[row.id] for form in split.row_forms(row)}
    held |= {key for key, stem in knowledge.stems.items() if stem in held}  # other forms of held-out stems
    assert len(held) > 20
    for pair in made.train:
        for text in (pair.row.question, pair.chosen, pair.rejected):
            assert held.isdisjoint(split.mention_key(text).split()), pair
    assert not any(made.corpus.split.certificate["overlaps"].values())


def test_corruptions_of_unseen_rows_use_words_never_trained_on(made, rows):
    """Otherwise a wrong form could be told by having been trained on."""
    trained = {form for row in rows.split.train for form in row.lexemes}
    for pair in made.test:
        if not made.seen[pair.id] and pair.kind in ("another form", "another row's gold"):
            assert not any(contains_form(pair.rejected, form) for form in trained)


def test_the_certificate_would_catch_a_leak(rows, knowledge, monkeypatch):
    monkeypatch.setattr(preferences, "_about", lambda knowledge, held, inside: knowledge)
    monkeypatch.setattr(attacks, "_other_form", lambda task, ground: ground.rng.choice(ground.knowledge.forms))
    assert not any(bootstrap(rows, knowledge).corpus.split.certificate["overlaps"].values())  # another kind is drawn
    monkeypatch.setattr(preferences, "_mentions", lambda text, forms: False)
    with pytest.raises(StoneyError, match="split: not disjoint"):
        bootstrap(rows, knowledge)


def test_the_same_seed_gives_the_same_pairs(rows, knowledge, made):
    assert bootstrap(rows, knowledge, seed=0).sha256 == made.sha256
    assert bootstrap(rows, knowledge, seed=1).sha256 != made.sha256
    assert len(bootstrap(rows, knowledge, pairs_per_row=1).train) == len(rows.split.train)
