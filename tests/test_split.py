"""The lexeme-disjoint split: what it promises, checked by other means than its own. All forms are invented."""

import json
import os
import random
import re
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stoney_rl import split as split_module
from stoney_rl.data import Row, load_rows
from stoney_rl.errors import StoneyError
from stoney_rl.lexemes import annotate
from stoney_rl.planted import PlantedLanguage
from stoney_rl.split import _mention_words, _plain, certify, mention_key, row_forms, split_rows
from stoney_rl.text import fold, normalize

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = Path(os.environ.get("STONEY_REAL_DATA") or ROOT.parent / "shared" / "data")
SYLLABLES = ["tâ", "lo", "mî", "va", "dû", "fe", "go", "zâ"]


def word(number):
    """The invented word with this number: one for each, none inside another (all of four syllables)."""
    return "".join(SYLLABLES[number // 8**place % 8] for place in range(4))


def row(row_id, question, answer, lexemes=(), **metadata):
    return Row(
        id=str(row_id),
        source=f"test:{row_id}",
        prompt=[{"role": "user", "content": question}],
        completion=[{"role": "assistant", "content": answer}],
        lexemes=list(lexemes),
        metadata={"language": "planted (invented)", **metadata} if "form" in metadata else metadata,
    )


def rows_about(groups):
    """A row for each group of word numbers, which quotes all its words."""
    return [
        row(at, f"Row {at}: what of {' and '.join(map(word, group))}?", "Gather.", map(word, group))
        for at, group in enumerate(groups)
    ]


def pairs(lexemes=30, wordings=4):
    return rows_about([[at % lexemes] for at in range(lexemes * wordings)])


def mentions(item, form):
    """Whether ``item`` mentions ``form``: the plainest reading that holds for these tests' texts."""
    texts = [turn["content"] for turn in [*item.prompt, *item.completion]] + item.lexemes
    clean = ["".join(c if c.isalnum() else " " for c in unicodedata.normalize("NFC", t).casefold()) for t in texts]
    return any(f" {form} " in f" {' '.join(text.split())} " for text in clean)


def assert_promises_hold(rows, split):
    parts = [split.train, split.validation, split.test, split.dropped]
    assert Counter(item.id for part in parts for item in part) == Counter(item.id for item in rows)
    order = {item.id: at for at, item in enumerate(rows)}
    for part in parts:
        assert [item.id for item in part] == sorted((item.id for item in part), key=order.get)
    assert split.train
    assert set(split.seen) == {item.id for item in [*split.validation, *split.test]}
    for item in [*split.validation, *split.test]:
        forms = row_forms(item)
        assert forms
        in_training = [any(mentions(other, form) for other in split.train) for form in forms]
        assert all(in_training) if split.seen[item.id] else not any(in_training)
    for item in split.test:
        if not split.seen[item.id]:
            assert not any(mentions(other, form) for other in split.validation for form in row_forms(item))
    prompts = [{item.question.casefold() for item in part} for part in parts[:3]]
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])
    assert not any(split.certificate["overlaps"].values())
    json.dumps(split.certificate)


def unseen(split, part):
    return [item for item in part if not split.seen[item.id]]


def test_shares_and_certificate():
    rows = pairs(lexemes=50, wordings=4)
    split = split_rows(rows, seed=3, data_sha256="abc")
    assert_promises_hold(rows, split)
    certificate = split.certificate
    # Four rows a lexeme: 20 unseen test rows are five lexemes; two lexemes come nearest to 10 validation rows.
    assert certificate["counts"] == {
        "train": 142,
        "validation": {"unseen": 8, "seen": 10},
        "test": {"unseen": 20, "seen": 20},
        "dropped": 0,
        "without_lexemes": 0,
    }
    assert certificate["requested"]["validation"] == {"unseen": 10, "seen": 10}
    assert certificate["lexemes"]["all"] == 50
    assert (certificate["lexemes"]["test_unseen"], certificate["lexemes"]["validation_unseen"]) == (5, 2)
    assert (certificate["seed"], certificate["test_fraction"], certificate["data_sha256"]) == (3, 0.1, "abc")
    text = json.dumps(certificate, ensure_ascii=False)
    assert not any(word(at) in text for at in range(50))


graphs = st.lists(st.lists(st.integers(0, 60), min_size=0, max_size=3, unique=True), min_size=20, max_size=120)


@settings(max_examples=40, deadline=None)
@given(graphs, st.integers(0, 3), st.sampled_from([(0.1, 0.05), (0.2, 0.0), (0.3, 0.05)]), st.data())
def test_promises_hold_on_any_graph(groups, seed, fractions, data):
    rows = rows_about(groups)
    # Some rows mention words that they don't list, some are asked twice, some list a phrase.
    for at, item in enumerate(rows):
        extra = data.draw(st.sampled_from([0, 0, 0, 0, 1, 2, 3]))
        if extra == 1:
            answer = f"Like {word(data.draw(st.integers(0, 60)))}."
            rows[at] = replace(item, completion=[{"role": "assistant", "content": answer}])
        elif extra == 2 and at:
            rows[at] = replace(item, prompt=rows[at - 1].prompt)
        elif extra == 3:
            rows[at] = replace(item, lexemes=[*item.lexemes, f"{word(at % 5)} {word(at % 7)}"])
    try:
        split = split_rows(rows, seed=seed, test_fraction=fractions[0], validation_fraction=fractions[1])
    except StoneyError as error:
        assert "can be held out" in str(error) or "no row names a form" in str(error)
        assume(False)
    assert_promises_hold(rows, split)
    wanted = split.certificate["requested"]["test"]["unseen"]
    assert len(unseen(split, split.test)) <= max(wanted * 1.1, len(rows) / 4)


@given(
    st.lists(st.text(alphabet="ab'-_ 1\u0331\u0301,âÂß\u2019\n", max_size=20), max_size=4),
    st.text("ab'-â \u0331", max_size=6),
)
def test_both_readings_agree_on_what_a_mention_is(texts, form):
    # The assignment reads word lists, certify plain strings: were they to differ, certify would refuse good splits.
    for text in [*texts, form]:
        assert _plain(fold(text)).split() == _mention_words(fold(text))


words_letter_by_letter = re.compile(r"[^\W\d_][\u0300-\u036f]*(?:'?[^\W\d_][\u0300-\u036f]*)*")


@given(st.text(alphabet="ab'-_ 1\u0331\u0301,âÂß\u2019\n\t\u3000\u0345", max_size=30))
def test_a_text_read_in_pieces_is_read_whole(text):
    expected = [word.removesuffix("'s") for word in words_letter_by_letter.findall(fold(text))]
    assert _mention_words(normalize(text)) == _plain(normalize(text)).split() == expected


def test_an_apostrophe_by_itself_parts_no_phrase():
    phrase = f"{word(500)} {word(501)}"
    rows = [*pairs(), row("whole", "A phrase?", f"{phrase}.", [phrase])]
    for parted in (f"{word(500)} ' {word(501)}", f"{word(500)}-'-{word(501)}"):
        other = row("parted", "And here?", f"It is {parted}.", [word(502)])
        for seed in range(10):
            split = split_rows([*rows, other], seed=seed, test_fraction=0.3, seen_fraction=0.3)
            assert_promises_hold([*rows, other], split)
        with pytest.raises(StoneyError, match="test_unseen_in_train 1 "):
            certify([*rows[:-1], other], [], rows[-1:], {"whole": False})


def test_certify_finds_each_of_the_phrases_that_share_a_word():
    def phrase(*numbers):
        return " ".join(map(word, numbers))

    groups = [(1, 0), (2, 0), (0, 3), (0,), (5, 6, 0), (9, 8), (11, 12), (12, 11, 12)]
    test = [row(f"t{at}", f"Test {at}?", "Gather.", [phrase(*group)]) for at, group in enumerate(groups)]
    train = [
        row("a", "First?", f"{phrase(1, 0, 3)} and {phrase(0, 2)}, {phrase(11, 12)}."),
        row("b", f"Is it {phrase(5, 6)}?", f"{phrase(0)}."),
        row("c", "Third?", f"{phrase(12)}, {phrase(11, 12)}: {phrase(1)}.", [phrase(1, 0)]),
    ]
    # Not there: (2 0), whose words have another order; (5 6 0), cut by the end of a message; (9 8).
    with pytest.raises(StoneyError, match="test_unseen_in_train 5 "):
        certify(train, [], test, {item.id: False for item in test})
    absent = [test[at] for at in (1, 4, 5)]
    assert certify(train, [], absent, {item.id: False for item in absent})["unseen_rows_sharing_a_word"]["test"] == 2
    with pytest.raises(StoneyError, match="seen_not_in_train 3 "):
        certify(train, [], test, {item.id: True for item in test})


def test_determined_by_the_rows_not_by_order_ids_or_process():
    rows = rows_about([[at % 40, at * 7 % 97 + 100] if at % 3 else [at % 40] for at in range(160)])
    split = split_rows(rows, seed=1)
    shuffled = rows[:]
    random.Random(0).shuffle(shuffled)
    again = split_rows(shuffled, seed=1)
    assert {item.id for item in again.test} == {item.id for item in split.test}
    assert again.seen == split.seen
    assert again.certificate == split.certificate
    renamed = split_rows([replace(item, id=f"x{item.id}") for item in rows], seed=1)
    assert [item.id for item in renamed.test] == [f"x{item.id}" for item in split.test]
    # Another seed draws other rows, unseen and seen.
    other = split_rows(rows, seed=2)
    for kind in (False, True):
        one, two = ({row_id for row_id, seen in item.seen.items() if seen is kind} for item in (split, other))
        assert len(one & two) < len(one) / 2

    code = (
        "import sys, json; sys.path[:0] = ['tests']\n"
        "from test_split import rows_about, split_rows\n"
        "rows = rows_about([[at % 40, at * 7 % 97 + 100] if at % 3 else [at % 40] for at in range(160)])\n"
        "print(json.dumps(split_rows(rows, seed=1).certificate))"
    )
    for hash_seed in ("1", "2"):
        out = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert json.loads(out) == split.certificate


def sabotaged(change):
    rows = pairs()
    split = split_rows(rows)
    parts = {
        "train": split.train[:],
        "validation": split.validation[:],
        "test": split.test[:],
        "seen": dict(split.seen),
    }
    change(parts, unseen(split, split.test)[0])
    return parts


def leak(text="", lexemes=(), row_id="leak", question="Another question?", **metadata):
    return lambda parts, victim: parts["train"].insert(
        0,
        row(
            row_id,
            question.format(form=victim.lexemes[0], question=victim.question),
            text.format(form=victim.lexemes[0], caps=victim.lexemes[0].upper()),
            [form.format(form=victim.lexemes[0]) for form in lexemes],
            **{key: value.format(form=victim.lexemes[0]) for key, value in metadata.items()},
        ),
    )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("test_unseen_in_train", leak('It is "{form}".')),
        ("test_unseen_in_train", leak("{caps}, unquoted")),
        ("test_unseen_in_train", leak("the {form}'s use")),
        ("test_unseen_in_train", leak("a {form}-like thing")),
        ("test_unseen_in_train", leak("No.", question="Is it {form}?")),
        ("test_unseen_in_train", leak("No.", lexemes=["{form}"])),
        ("test_unseen_in_train", leak("No.", form="{form}")),
        ("prompts_in_two_splits", leak("No.", question="  {question}!!  ")),
        (
            "validation_unseen_in_train",
            lambda parts, victim: parts["train"].append(
                row(
                    "leak",
                    "Another?",
                    " ".join(item.lexemes[0] for item in parts["validation"] if not parts["seen"][item.id]),
                )
            ),
        ),
        (
            "test_unseen_in_validation",
            lambda parts, victim: parts["validation"].append(
                replace(parts["validation"][0], completion=victim.prompt, id="leak")
            ),
        ),
        ("ids_in_two_splits", lambda parts, victim: parts["train"].append(row(victim.id, "Another?", "No."))),
        ("seen_not_in_train", lambda parts, victim: parts["seen"].update({victim.id: True})),
        ("test_unseen_in_train", lambda parts, victim: parts["seen"].update(dict.fromkeys(parts["seen"], False))),
        ("rows_without_flag_or_form", lambda parts, victim: parts["seen"].pop(victim.id)),
        ("rows_without_flag_or_form", lambda parts, victim: parts["test"].append(row("new", "Why?", "No."))),
    ],
)
def test_certify_catches_sabotage(name, change):
    parts = sabotaged(change)
    with pytest.raises(StoneyError, match=rf"not disjoint: .*{name} \d+"):
        certify(**parts)


def test_certify_passes_near_misses():
    parts = sabotaged(leak("{form}ẖov and xi{form} are other words"))
    assert not any(certify(**parts)["overlaps"].values())


def test_certify_finds_a_phrase_whose_words_stand_alone_too():
    first, second = word(500), word(501)
    victim = row("victim", "What is it?", f"{first} {second}.", [f"{first} {second}"])
    alone = [row("1", f"{first}?", second), row("3", f"{second} {first}?", f"{first}, no. {second}")]
    assert not any(certify([alone[0]], [], [victim], {"victim": False})["overlaps"].values())
    assert certify([alone[0]], [], [victim], {"victim": False})["unseen_rows_sharing_a_word"]["test"] == 1
    leaked = row("2", "Which?", f"The {first.upper()} - {second}.")
    with pytest.raises(StoneyError, match="test_unseen_in_train 1 "):
        certify([alone[0], leaked, alone[0]], [], [victim], {"victim": False})


def test_a_column_named_form_is_no_form_of_other_data():
    item = row("1", "What is it?", "A verb.", ["tâlo"])
    assert row_forms(replace(item, metadata={"form": "verb"})) == {"tâlo"}
    assert row_forms(replace(item, metadata={"form": "liẖtâlo", "language": "planted (invented)"})) == {
        "tâlo",
        "liẖtâlo",
    }


def test_split_rows_runs_certify(monkeypatch):
    def refuse(*args):
        raise StoneyError("not disjoint")

    monkeypatch.setattr(split_module, "certify", refuse)
    with pytest.raises(StoneyError, match="not disjoint"):
        split_rows(pairs())


def test_a_phrase_is_mentioned_whole_and_a_particle_chains_nothing():
    # Each phrase holds "ne", which is also a row's own form.
    rows = [
        row(at, f"What is {word(at)} ne {word(at + 200)}?", "Gather.", [f"{word(at)} ne {word(at + 200)}"])
        for at in range(60)
    ]
    rows.append(row("particle", "What is ne?", "A particle.", ["ne"]))
    split = split_rows(rows, seed=0)
    assert_promises_hold(rows, split)
    assert split.certificate["counts"]["test"]["unseen"] == 6
    assert split.certificate["counts"]["dropped"] == 0
    assert split.seen.get("particle") is not False
    # "ne" of the six held-out phrases does occur in training, and the certificate says so.
    assert split.certificate["unseen_rows_sharing_a_word"]["test"] == 6


def test_an_unquoted_phrase_in_another_row_is_a_mention():
    rows = pairs()
    phrase = f"{word(500)} {word(501)}"
    rows.append(row("phrase", "What is it?", f"It is '{phrase}'.", [phrase]))
    rows.append(row("other", "No lexeme here?", f"Yes: {phrase.upper()}, unquoted."))
    for seed in range(20):
        split = split_rows(rows, seed=seed, test_fraction=0.3)
        assert_promises_hold(rows, split)
        # The row without lexemes is a training row, or it is dropped because the phrase is held out.
        assert "other" in {item.id for item in [*split.train, *split.dropped]}
        assert split.seen.get("phrase") is not False or "other" in {item.id for item in split.dropped}


def test_unicode_forms_and_case_are_one_form():
    rows = [row(2 * at, f"What is {word(at)}? ({at})", "Gather.", [word(at)]) for at in range(40)] + [
        row(2 * at + 1, f"Say {unicodedata.normalize('NFD', word(at)).upper()}.", "So.", [word(at).title()])
        for at in range(40)
    ]
    split = split_rows(rows)
    assert_promises_hold(rows, split)
    assert split.certificate["lexemes"]["all"] == 40
    test = {int(item.id) // 2 for item in unseen(split, split.test)}
    assert len(test) == 4 and len(unseen(split, split.test)) == 8
    assert mention_key("Tâlo-Mîva's") == "tâlo mîva" == mention_key(unicodedata.normalize("NFD", " tâlo  mîva "))


def test_same_question_goes_to_one_side():
    rows = []
    for at in range(60):
        rows.append(row(f"{at}a", f"What is it, number {at}?", f"{word(at)}.", [word(at)]))
        rows.append(row(f"{at}b", f"what is it -- number  {at}", f"{word(at + 100)}.", [word(at + 100)]))
        rows.append(row(f"{at}c", f"What is it, number {at}?", f"{word(at)}.", [word(at)]))
    split = split_rows(rows)
    assert_promises_hold(rows, split)
    side = {item.id: name for name in ("train", "validation", "test") for item in getattr(split, name)}
    for at in range(60):
        assert side[f"{at}a"] == side[f"{at}b"] == side[f"{at}c"]
    assert len(unseen(split, split.test)) == 18
    # Both rows of a question are alone with their lexemes: none can be seen.
    assert not any(split.seen.values())


def test_rows_without_lexemes_are_never_held_out():
    rows = pairs() + [row(f"none{at}", f"Why, {at}?", "So.") for at in range(50)]
    split = split_rows(rows, test_fraction=0.2)
    assert {f"none{at}" for at in range(50)} <= {item.id for item in split.train}
    assert split.certificate["counts"]["without_lexemes"] == 50


def test_one_component_is_cut_with_few_drops():
    # 40 stems of 10 rows, and 30 rows that compare neighbours: all one component.
    groups = [[at % 40] for at in range(400)] + [[at, at + 1] for at in range(39)]
    rows = rows_about(groups)
    split = split_rows(rows, seed=5, validation_fraction=0.0)
    assert_promises_hold(rows, split)
    counts = split.certificate["counts"]
    assert 40 <= counts["test"]["unseen"] <= 48
    # Each of the four or five held-out stems drops at most its two comparisons.
    assert 1 <= counts["dropped"] <= 10


def test_a_stem_is_cut_with_its_inflected_forms():
    # Each planted row asks one of five forms of a stem; comparisons join all stems into one component.
    rows = []
    for stem in range(30):
        for at in range(20):
            form = f"{word(stem)}{'abcde'[at % 5]}"
            rows.append(row(f"{stem}.{at}", f"{at}: form of {word(stem)}?", f"{form}.", [word(stem)], form=form))
        other = word((stem + 1) % 30)
        rows.append(row(f"{stem}.x", f"Is {word(stem)} like {other}?", "No.", [word(stem), other]))
    split = split_rows(rows)
    assert_promises_hold(rows, split)
    counts = split.certificate["counts"]
    assert counts["test"]["unseen"] == 60 and counts["test"]["seen"] == 63
    assert counts["dropped"] <= 2 * 5


def test_seen_planted_rows_are_facts_that_training_words_otherwise():
    rows = PlantedLanguage(num_lexemes=40, seed=0).rows()
    split = split_rows(rows)
    trained = {item.metadata["form"] for item in split.train}
    stems = {item.metadata["stem"] for item in split.train}
    for item in split.test:
        assert (item.metadata["form"] in trained) is split.seen[item.id]
        assert (item.metadata["stem"] in stems) is split.seen[item.id]
    counts = split.certificate["counts"]["test"]
    assert counts["unseen"] >= 0.08 * len(rows) and counts["seen"] >= 0.08 * len(rows)
    assert split.certificate["counts"]["dropped"] == 0


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (pairs(lexemes=19, wordings=1), {}, "19 rows are too few .* at least 20"),
        ([], {}, "0 rows are too few"),
        (pairs(), {"test_fraction": 0.0}, "test_fraction 0.0.*between 0 and 1"),
        (pairs(), {"test_fraction": 1.5}, "between 0 and 1"),
        (pairs(), {"validation_fraction": -0.1}, "between 0 and 1"),
        (pairs(), {"test_fraction": float("nan")}, "between 0 and 1"),
        (pairs(), {"test_fraction": 0.4, "validation_fraction": 0.2}, "hold out 120% of the rows"),
        (pairs(lexemes=1, wordings=40), {}, "no lexeme of these 40 rows can be held out for test"),
        ([row(at, f"Why, {at}?", "So.") for at in range(30)], {}, "no row names a form of the language; quote"),
        (pairs() + pairs(), {}, "120 row ids occur more than once, such as '0'"),
    ],
)
def test_impossible_splits_are_refused(rows, options, message):
    with pytest.raises(StoneyError, match=message) as caught:
        split_rows(rows, **options)
    assert "\n" not in str(caught.value)


def test_small_data():
    rows = pairs(lexemes=5, wordings=4)
    split = split_rows(rows, validation_fraction=0.0)
    assert_promises_hold(rows, split)
    # Two rows were asked for; the smallest lexeme has four.
    assert len(unseen(split, split.test)) == 4
    assert split.validation == []


def test_seen_fraction():
    rows = pairs()
    assert not any(split_rows(rows, seen_fraction=0.0).seen.values())
    assert split_rows(rows, seen_fraction=0.2).certificate["counts"]["test"] == {"unseen": 12, "seen": 24}


@pytest.mark.parametrize(
    "groups",
    [
        lambda count: [[at // 3] for at in range(count)],
        lambda count: [[at // 3, at // 3 + 1] for at in range(count)],  # a chain
        lambda count: [[at // 3, 4000] if at % 2 else [at // 3] for at in range(count)],  # one lexeme in half the rows
        lambda count: [[at * 7 % (count // 3), at * 31 % (count // 3)] for at in range(count)],
    ],
)
def test_near_linear_time(groups):
    def seconds(lexemes):
        rows = rows_about([[*dict.fromkeys(group)] for group in groups(3 * lexemes)])
        start = time.process_time()
        split_rows(rows)
        return time.process_time() - start

    seconds(100)
    # All-pairs work would take 16 times as long for four times the rows.
    assert min(seconds(2000) for _ in range(2)) < 10 * min(seconds(500) for _ in range(2))


@pytest.mark.real_data
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no real rows here: set STONEY_REAL_DATA")
def test_real_rows():
    rowset = load_rows(REAL_DATA)
    split = split_rows(annotate(rowset.rows), test_fraction=0.15, data_sha256=rowset.sha256)
    assert not any(certify(split.train, split.validation, split.test, split.seen)["overlaps"].values())
    counts = split.certificate["counts"]
    assert 135 <= counts["test"]["unseen"] <= 165
    assert counts["test"]["seen"] >= 40
    assert counts["train"] >= 700
    assert counts["dropped"] <= 10
    text = json.dumps(split.certificate, ensure_ascii=False)
    assert not any(form in text for item in split.test for form in item.lexemes if len(form) > 12)
