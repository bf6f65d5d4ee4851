"""Rows for training and for evaluation: what was trained on is recorded, and never evaluated on."""

import dataclasses
import json
import unicodedata

import pytest

from stoney_rl import checkpoints, corpus, data, lexemes, planted
from stoney_rl.data import Row
from stoney_rl.errors import StoneyError


def row(question, answer="an answer", *, row_id="r", forms=(), before=(), **metadata):
    turns = [{"role": role, "content": text} for role, text in before]
    return Row(
        id=row_id,
        source="x.jsonl:1",
        prompt=[*turns, {"role": "user", "content": question}],
        completion=[{"role": "assistant", "content": answer}],
        lexemes=list(forms),
        metadata=metadata,
    )


@pytest.fixture(scope="module")
def rows():
    """144 rows of an invented language of 24 verbs."""
    return planted.PlantedLanguage(seed=5, num_lexemes=24).rows(rules_per_lexeme=3, templates_per_fact=2)


@pytest.fixture(scope="module")
def source(rows, tmp_path_factory):
    return data.write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


def train(directory, prepared, **fields):
    """A directory that says it was trained on ``prepared``; there are no weights in it."""
    directory.mkdir()
    stage = {"stage": "sft", "data": prepared.describe(), **fields}
    checkpoints.write_json(directory / checkpoints.STAGE_FILE, stage)
    checkpoints.write_json(directory / corpus.SPLIT_FILE, prepared.training_record())
    return str(directory)


def held_out(checkpoint, split="test", **options):
    options = {"dataset": None, "default_dataset": "missing", **options}
    return corpus.held_out(checkpoint, split, **options)


# Hashes.


def test_a_row_is_known_again_whatever_its_file_order_or_unicode_form():
    asked = 'What does "tâlo" mean?'
    known = corpus.row_hash(row(asked))
    assert known == corpus.row_hash(row(unicodedata.normalize("NFD", asked), row_id="another"))
    assert known == corpus.row_hash(row('what does  "TÂLO" mean?'))
    assert known == corpus.row_hash(row(asked, "another answer"))  # the question was trained on all the same
    assert known != corpus.row_hash(row('What does "talo" mean?'))
    assert known != corpus.row_hash(row('What does "tâla" mean?'))
    assert len(known) == 16


def test_all_turns_of_a_prompt_count():
    first = row("And now?", before=[("user", "one"), ("assistant", "two")])
    other = row("And now?", before=[("user", "one"), ("assistant", "three")])
    assert corpus.row_hash(first) != corpus.row_hash(other) != corpus.row_hash(row("And now?"))


def test_a_form_is_known_again_as_the_split_compares_forms():
    assert corpus.form_hash("Tâlo") == corpus.form_hash(unicodedata.normalize("NFD", "tâlo"))
    assert corpus.form_hash("tâlo-tâ") == corpus.form_hash("tâlo tâ")
    assert corpus.form_hash("tâlo") != corpus.form_hash("talo")


# What is recorded.


def test_describe_is_enough_to_make_the_same_split_again(source):
    first = corpus.prepare(source, split_seed=3, test_fraction=0.2, validation_fraction=0.1)
    described = json.loads(json.dumps(first.describe()))
    again = corpus.prepare(described["source"], **described["split"])
    assert described["split"] == {"split_seed": 3, "test_fraction": 0.2, "validation_fraction": 0.1}
    assert again.split.certificate == first.split.certificate
    assert [row.id for row in again.split.test] == [row.id for row in first.split.test]
    assert (described["rows"], described["quarantined"]) == (144, 0)
    other = corpus.prepare(source, split_seed=4, test_fraction=0.2, validation_fraction=0.1)
    assert [row.id for row in other.split.test] != [row.id for row in first.split.test]


def test_the_training_record_holds_hashes_of_the_training_rows_and_no_text(source, rows):
    prepared = corpus.prepare(source)
    record = prepared.training_record()
    assert len(record["training_rows"]) == len(prepared.split.train) > 0
    assert corpus.trained_rows(rows, record) == [row for row in rows if row in prepared.split.train]
    assert not corpus.trained_rows(prepared.split.test + prepared.split.validation, record)
    text = json.dumps(record, ensure_ascii=False)
    assert not any(row.question in text or row.lexemes[0] in text or row.metadata["form"] in text for row in rows)


def test_the_record_knows_every_form_that_training_mentions(source):
    prepared = corpus.prepare(source)
    known = set(prepared.training_record()["training_lexemes"])
    for row_ in prepared.split.train:
        # The stem is the lexeme; the form that is asked for stands only in the answer and the metadata.
        assert {corpus.form_hash(row_.lexemes[0]), corpus.form_hash(row_.metadata["form"])} <= known
    for row_ in [*prepared.split.test, *prepared.split.validation]:
        assert (corpus.form_hash(row_.lexemes[0]) in known) == prepared.split.seen[row_.id]
    said = [row("Say it", 'One says "vûmo ẖâle" or sâne.', forms=["vûmo ẖâle"])]
    split = dataclasses.replace(prepared.split, train=said)
    known = corpus.Corpus(prepared.rowset, split).training_record()["training_lexemes"]
    for form, mentioned in [("vûmo ẖâle", True), ("ẖâle", True), ("sâne", True), ("sân", False), ("vûmo", True)]:
        assert (corpus.form_hash(form) in known) == mentioned, form


# Rows to evaluate on.


def test_an_untrained_model_gets_the_split_that_was_asked_for(source, tmp_path):
    prepared = corpus.prepare(source, split_seed=2, test_fraction=0.2)
    for split in ("train", "validation", "test"):
        found = held_out(str(tmp_path), split, dataset=str(source), split_seed=2, test_fraction=0.2)
        assert found.rows == getattr(prepared.split, split)
        assert found.trained is None
        assert found.notes == [] if split in ("validation", "test") else "memory" in found.notes[0]
        assert all(found.seen[row.id] for row in found.rows) or split != "train"
    assert len(held_out(str(tmp_path), "all", dataset=str(source)).rows) > len(prepared.split.train)


def test_a_trained_model_gets_its_own_test_rows(source, tmp_path):
    prepared = corpus.prepare(source, split_seed=1, test_fraction=0.2)
    found = held_out(train(tmp_path / "tuned", prepared))
    assert found.rows == prepared.split.test and found.trained == 0 and found.notes == []
    assert {row.id: found.seen[row.id] for row in found.rows} == {
        row.id: prepared.split.seen[row.id] for row in prepared.split.test
    }
    both = held_out(str(tmp_path / "tuned"), "all")
    assert both.trained == len(prepared.split.train) and "memory" in both.notes[0]
    assert len(both.rows) == both.trained + len(prepared.split.validation) + len(prepared.split.test)


@pytest.mark.parametrize(("flag", "value"), [("split_seed", 7), ("test_fraction", 0.3), ("validation_fraction", 0.2)])
def test_another_split_than_the_trainings_is_refused(source, tmp_path, flag, value):
    checkpoint = train(tmp_path / "tuned", corpus.prepare(source))
    with pytest.raises(StoneyError, match=f"--{flag} {value}: .*leave the flag out"):
        held_out(checkpoint, **{flag: value})
    same = {"split_seed": 0, "test_fraction": 0.1, "validation_fraction": 0.05}
    assert held_out(checkpoint, **{flag: same[flag]}).rows


def test_a_training_row_among_the_test_rows_is_refused(source, tmp_path, monkeypatch):
    prepared = corpus.prepare(source)
    checkpoint = train(tmp_path / "tuned", prepared)
    record = prepared.training_record()
    record["training_rows"].append(corpus.row_hash(prepared.split.test[0]))
    checkpoints.write_json(tmp_path / "tuned" / corpus.SPLIT_FILE, record)
    with pytest.raises(StoneyError, match="1 of the test rows were trained on"):
        held_out(checkpoint)

    checkpoints.write_json(tmp_path / "tuned" / corpus.SPLIT_FILE, prepared.training_record())
    assert held_out(checkpoint).rows
    broken = dataclasses.replace(prepared.split, test=[*prepared.split.test, *prepared.split.train[:3]])
    monkeypatch.setattr(corpus, "split_rows", lambda *_, **__: broken)
    with pytest.raises(StoneyError, match="3 of the test rows were trained on"):
        held_out(checkpoint)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"certificate": {}}', "nonsense"])
def test_a_damaged_or_missing_record_is_refused(source, tmp_path, content):
    checkpoint = train(tmp_path / "tuned", corpus.prepare(source))
    (tmp_path / "tuned" / corpus.SPLIT_FILE).write_text(content)
    with pytest.raises(StoneyError, match=r"split\.json: not .*make the checkpoint again"):
        held_out(checkpoint)
    (tmp_path / "tuned" / corpus.SPLIT_FILE).unlink()
    with pytest.raises(StoneyError, match=r"tuned: trained, but split\.json is missing"):
        held_out(checkpoint)


def test_changed_rows_with_the_same_ids_are_other_rows(rows, source, tmp_path):
    checkpoint = train(tmp_path / "tuned", corpus.prepare(source))
    changed = data.write_jsonl(
        tmp_path / "rows.jsonl",
        [dataclasses.replace(r, completion=[{"role": "assistant", "content": r.answer + " Yes."}]) for r in rows],
    )
    found = held_out(checkpoint, dataset=str(changed))
    assert "not the rows" in found.notes[0]
    assert not corpus.trained_rows(found.rows, corpus.training_record(checkpoint))


def test_on_other_data_trained_rows_are_left_out_and_seen_goes_by_the_training(rows, source, tmp_path):
    prepared = corpus.prepare(source)
    checkpoint = train(tmp_path / "tuned", prepared)
    news = planted.PlantedLanguage(seed=9, num_lexemes=24).rows(rules_per_lexeme=3, templates_per_fact=2)
    old = [
        dataclasses.replace(
            r,
            id=f"old-{i}",
            prompt=[{"role": "user", "content": unicodedata.normalize("NFD", r.question)}],
            completion=[{"role": "assistant", "content": r.answer + " That is it."}],
        )
        for i, r in enumerate(rows)
    ]
    other = data.write_jsonl(tmp_path / "other.jsonl", [*old, *news])
    found = held_out(checkpoint, dataset=str(other), test_fraction=0.3)
    trained = {r.question for r in prepared.split.train}
    assert found.trained == 0 and not trained & {r.question for r in found.rows}
    assert "not the rows" in found.notes[0] and "rows were trained on and are left out" in found.notes[1]
    wanted = corpus.prepare(other, test_fraction=0.3).split.test
    left_out = [r for r in wanted if r.question in trained]
    assert len(found.rows) == len(wanted) - len(left_out) < len(wanted)

    texts = [turn["content"] for r in prepared.split.train for turn in [*r.prompt, *r.completion]]
    for r in found.rows:
        forms = [*r.lexemes, r.metadata["form"]]
        assert found.seen[r.id] == any(lexemes.contains_form(text, form) for text in texts for form in forms)
    assert {found.seen[r.id] for r in found.rows} == {True, False}


def test_on_other_data_a_row_about_no_form_is_not_called_unseen_for_its_training_split(source, tmp_path):
    """--split all on other data: the training split there is not what the model was trained on."""
    checkpoint = train(tmp_path / "tuned", corpus.prepare(source))
    news = planted.PlantedLanguage(seed=9, num_lexemes=24).rows(rules_per_lexeme=3, templates_per_fact=2)
    found = held_out(checkpoint, "all", dataset=str(data.write_jsonl(tmp_path / "other.jsonl", news)))
    assert found.trained == 0
    assert not any(found.seen[r.id] for r in found.rows)


def test_what_a_parent_was_trained_on_counts_too(source, tmp_path):
    first = corpus.prepare(source)
    parent = train(tmp_path / "sft", first)
    news = planted.PlantedLanguage(seed=9, num_lexemes=24).rows(rules_per_lexeme=3, templates_per_fact=2)
    second = corpus.prepare(data.write_jsonl(tmp_path / "other.jsonl", news))
    child = train(tmp_path / "grpo", second, parent={"path": parent})
    record = corpus.training_record(child)
    assert len(record["training_rows"]) == len(first.split.train) + len(second.split.train)
    assert held_out(child).rows == second.split.test

    found = held_out(child, dataset=str(source), split_seed=8, test_fraction=0.3)
    trained = {r.id for r in first.split.train}
    assert found.rows and not trained & {r.id for r in found.rows}
    assert any(r.id in trained for r in corpus.prepare(source, split_seed=8, test_fraction=0.3).split.test)
    for r in found.rows:
        assert found.seen[r.id] == any(r.lexemes == t.lexemes for t in first.split.train)

    third = train(tmp_path / "again", corpus.prepare(source, split_seed=8), parent={"path": parent})
    with pytest.raises(StoneyError, match=r"were trained on, by .*again or a checkpoint that it comes from"):
        held_out(third)


def test_a_parent_is_found_from_another_working_directory(source, tmp_path, monkeypatch):
    first, second = corpus.prepare(source), corpus.prepare(source, split_seed=8)
    train(tmp_path / "sft", first)
    child = train(tmp_path / "grpo", second, parent={"path": "sft"})  # as recorded when started in tmp_path
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    record = corpus.training_record(child)
    assert set(first.training_record()["training_rows"]) <= set(record["training_rows"])


def test_no_row_left_is_said(source, tmp_path):
    checkpoint = train(tmp_path / "tuned", corpus.prepare(source, validation_fraction=0))
    with pytest.raises(StoneyError, match="no row is left in the validation split"):
        held_out(checkpoint, "validation")


# Samples.


def pool(unseen, seen):
    rows = [row(str(i), row_id=f"r{i}") for i in range(unseen + seen)]
    return rows, {r.id: i % (unseen + seen) >= unseen for i, r in enumerate(rows)}


@pytest.mark.parametrize(
    ("unseen", "seen", "number", "expected"),
    [(30, 10, 20, (15, 5)), (30, 10, 4, (3, 1)), (7, 7, 10, (5, 5)), (1, 99, 10, (0, 10)), (99, 1, 99, (98, 1)), (5, 0, 3, (3, 0)), (0, 5, 4, (0, 4))],
)  # fmt: skip
def test_a_sample_is_in_proportion_and_in_order(unseen, seen, number, expected):
    rows, flags = pool(unseen, seen)
    drawn = corpus.draw(rows, flags, number, seed=0)
    assert (sum(not flags[r.id] for r in drawn), sum(flags[r.id] for r in drawn)) == expected
    assert drawn == [r for r in rows if r in drawn]


def test_a_sample_is_possible_at_every_size():
    for unseen, seen in [(1, 1), (2, 7), (13, 4), (3, 3)]:
        rows, flags = pool(unseen, seen)
        for number in range(1, unseen + seen + 3):
            assert len(corpus.draw(rows, flags, number, seed=1)) == min(number, unseen + seen)


def test_a_sample_goes_by_the_seed():
    rows, flags = pool(30, 30)
    first = [r.id for r in corpus.draw(rows, flags, 20, seed=0)]
    assert first == [r.id for r in corpus.draw(rows, flags, 20, seed=0)]
    assert first != [r.id for r in corpus.draw(rows, flags, 20, seed=1)]
    assert corpus.draw(rows, flags, None, seed=0) is rows


def test_more_samples_than_rows_are_all_rows_and_said(source, tmp_path):
    checkpoint = train(tmp_path / "tuned", corpus.prepare(source))
    every = held_out(checkpoint)
    found = held_out(checkpoint, num_samples=4000)
    assert found.rows == every.rows and "all of them are used" in found.notes[0]
    assert len(held_out(checkpoint, num_samples=6).rows) == 6
