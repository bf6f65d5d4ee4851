"""Schema, lengths and split of an inspection, against counts made by hand. All words are invented."""

import pytest
import tiny

from stoney_rl import prompts
from stoney_rl.data import Quarantined, Row, RowSet
from stoney_rl.inspection import lengths, schema, splits
from stoney_rl.planted import PlantedLanguage
from stoney_rl.split import split_rows


def row(number, question, answer, lexemes=(), **metadata):
    prompt, completion = [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]
    return Row(f"r-{number}", f"rows.jsonl:{number}", prompt, completion, list(lexemes), metadata)


def rowset(rows, quarantine=()):
    return RowSet(rows, list(quarantine), "0" * 64, [{"path": "rows.jsonl", "rows": len(rows)}], "rows.jsonl")


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny.tokenizer()
    prompts.prepare_tokenizer(made)
    return made


def test_metadata_coverage_by_hand():
    rows = [
        row(1, "Q", "A", ["tâlo"], level=1, topic="kin", tags=[]),
        row(2, "Q", "A", ["mîva"], level=2, topic="kin", tags=["x"]),
        row(3, "Q", "A", [], level="three", topic=""),
        row(4, "Q", "A", [], topic=None),
    ]
    section = schema.find(rowset(rows), rows)
    columns = {column["column"]: column for column in section.figures["metadata"]}
    assert list(columns) == ["level", "topic", "tags"]  # most rows first, then by name
    level, topic, tags = (columns[name] for name in ("level", "topic", "tags"))
    assert (level["rows"], level["missing"], level["types"]) == (3, 1, {"int": 2, "str": 1})
    assert (topic["rows"], topic["empty"], topic["values"]) == (3, 1, {"kin": 2, "": 1})
    assert (tags["rows"], tags["empty"], tags["distinct"]) == (2, 1, 2)
    without = next(finding for finding in section.findings if finding.kind == "rows_without_forms")
    assert without.row_ids == ("r-3", "r-4") and (without.count, without.total) == (2, 4)


def test_a_column_with_many_values_is_counted_not_listed():
    rows = [row(number, "Q", "A", code=f"c{number}") for number in range(schema.MAX_VALUES + 1)]
    column = schema.find(rowset(rows), rows).figures["metadata"][0]
    assert column["distinct"] == schema.MAX_VALUES + 1 and column["values"] is None
    column = schema.find(rowset(rows[1:]), rows[1:]).figures["metadata"][0]
    assert len(column["values"]) == schema.MAX_VALUES


def test_quarantine_by_reason_with_lines():
    bad = [Quarantined("a.jsonl", line, reason, "") for line, reason in ((3, "no x: y"), (9, "empty"), (12, "no x: z"))]
    section = schema.find(rowset([row(1, "Q", "A", ["tâlo"])], bad), [row(1, "Q", "A", ["tâlo"])])
    assert section.figures["quarantined"] == {
        "no x": {"rows": 2, "lines": ["a.jsonl:3", "a.jsonl:12"]},
        "empty": {"rows": 1, "lines": ["a.jsonl:9"]},
    }
    finding = section.findings[0]
    assert (finding.kind, finding.severity, finding.count, finding.total) == ("quarantined_rows", "failure", 3, 4)


def test_lengths_and_cuts_by_hand(tokenizer):
    """One token a byte and 20 of the chat format, 16 of them before the answer and its end: 34 + answer + 1."""
    rows = [row(1, "abcd", "ab"), row(2, "â", "ṯẖ"), row(3, "abcdefgh" * 5, "abc")]
    section = lengths.find(rows, 30, tokenizer)
    tokens = section.figures["tokens"]
    # question bytes + answer bytes + 20: 4 + 2, 2 + 6, 40 + 3
    assert tokens["row"]["percentiles"]["0"] == 26 and tokens["row"]["percentiles"]["50"] == 28
    assert tokens["max_length_for_all"] == 63 and tokens["total"] == 26 + 28 + 63
    assert (tokens["rows_cut"], tokens["answers_cut"], tokens["answers_lost"]) == (1, 0, 1)
    assert lengths.find(rows, 62, tokenizer).figures["tokens"]["answers_cut"] == 1
    assert lengths.find(rows, 63, tokenizer).findings == []
    finding = section.findings[0]
    assert finding.kind == "cut_answers" and finding.row_ids == ("r-3",)
    assert section.figures["answer"]["characters"]["percentiles"]["100"] == 3
    assert section.figures["answer"]["bytes"]["percentiles"]["100"] == 6


def test_cuts_are_those_of_training(tokenizer):
    """As many rows as train_lora.py itself cuts and leaves out."""
    import train_lora

    rows = PlantedLanguage(0, 20).rows()
    ends = prompts.end_of_turn_ids(tokenizer)
    for limit in (80, 100, 110, 120):
        kept, said = train_lora.encode(rows, tokenizer, ends, limit)
        tokens = lengths.find(rows, limit, tokenizer).figures["tokens"]
        assert f"{tokens['rows_cut']} longer" in said and f"{tokens['answers_lost']} of them" in said
        assert len(kept) == len(rows) - tokens["answers_lost"]


def test_tokens_a_word_by_hand(tokenizer):
    """A word costs its bytes and the space before it. 'ṯel' is a piece of the language: neither it nor English."""
    rows = [row(1, 'Say "tâlo".', 'It is "tâlo", not "dova". The ending ṯel is cut.', ["tâlo", "dova"])]
    words = lengths.find(rows, 512, tokenizer).figures["words"]
    assert words["language"]["types"] == 2 and words["language"]["occurrences"] == 3
    assert words["language"]["tokens_a_word"] == (6 + 5) / 2
    assert words["language_marked"]["tokens_a_word"] == 6
    # say it is not the ending is cut: distinct say it is not the ending cut
    assert words["english"]["types"] == 7
    assert words["english"]["tokens_a_word"] == round((4 + 3 + 3 + 4 + 4 + 7 + 4) / 7, 3)
    assert words["ratio"] == round(5.5 / words["english"]["tokens_a_word"], 3)


def test_without_a_tokenizer_only_tokens_are_missing():
    section = lengths.find([row(1, "abcd", "ab")], 30, None, "no hub")
    assert section.figures["tokens"] is None and section.figures["no_tokens"] == "no hub"
    assert section.figures["question"]["characters"]["mean"] == 4


def test_what_a_part_of_the_split_misses():
    rows = PlantedLanguage(1, 120).rows(rules_per_lexeme=2, templates_per_fact=1)
    split = split_rows(rows, seed=1)
    test = {item.id for item in split.test}
    # A kind that half of the rows have, all of them outside test; one that no training row has; one too rare to expect.
    train = [item.id for item in split.train]
    for item in rows:
        common = item.id not in test and int(item.id.split("-")[2]) % 2
        item.metadata["level"] = "common" if common else "held" if item.id not in train else "other"
    rare = next(item for item in split.train if item.metadata["level"] == "other")
    rare.metadata["level"] = "rare"
    section = splits.find(split, rows, {})
    parts = section.figures["parts"]
    assert parts["test"]["misses"]["kinds"] == ["level=common", "level=other"]
    assert parts["train"]["misses"]["kinds"] == ["level=held"]
    assert sum(part["rows"] for part in parts.values()) + section.figures["dropped"] == len(rows)
    assert parts["train"]["unseen"] == parts["train"]["seen"] == 0
    in_training = {lexeme[0] for item in split.train for lexeme in item.lexemes}
    whole = {lexeme[0] for item in rows for lexeme in item.lexemes}
    assert parts["train"]["misses"]["initials"] == sorted(whole - in_training)
    small = next(finding for finding in section.findings if finding.kind == "small_test_split")
    assert small.count == parts["test"]["unseen"] < splits.MIN_UNSEEN
