"""Broken inputs, kind by format: nothing but StoneyError escapes, every bad row has its line, every good row is kept."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stoney_rl import reading
from stoney_rl.data import load_rows, write_jsonl, write_quarantine
from stoney_rl.errors import StoneyError


def good(number: int) -> dict:
    return {"question": f"What is word {number}?", "answer": f"It is 'ẖaṯû{number}' (invented)."}


def dumps(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def chat(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": "text"} for role in roles]}


# name: (the row as JSON text, how its reason begins). All of these are JSON, or lines that hold their error in.
BAD_VALUES = {
    "question is a number": (dumps({"question": 5, "answer": "a"}), "question is a number"),
    "question is a float": (dumps({"question": 0.5, "answer": "a"}), "question is a number"),
    "question is a bool": (dumps({"question": True, "answer": "a"}), "question is true or false"),
    "question is an object": (dumps({"question": {"a": 1}, "answer": "a"}), "question is an object"),
    "question is a list": (dumps({"question": ["a"], "answer": "a"}), "question is a list"),
    "question is null": (dumps({"question": None, "answer": "a"}), "question is null"),
    "answer is null": (dumps({"question": "q", "answer": None}), "answer is null"),
    "answer is a list of parts, one an image": (
        dumps({"question": "q", "answer": [{"type": "text", "text": "a"}, {"type": "image"}]}),
        "answer is a list",
    ),
    "no answer": (dumps({"question": "q"}), "missing column: question without answer"),
    "no question": (dumps({"answer": "a", "pair_id": 3}), "missing column: answer without question"),
    "other columns": (dumps({"text": "a"}), "no known columns: found text"),
    "empty object": (b"{}", "no known columns: found nothing"),
    "empty question": (dumps({"question": "", "answer": "a"}), "question is empty"),
    "blank answer": (dumps({"question": "q", "answer": " \t \u00a0"}), "answer is empty"),
    "invisible answer": (dumps({"question": "q", "answer": "\u200b\ufeff"}), "answer is empty"),
    "NUL": (rb'{"question": "q\u0000", "answer": "a"}', "NUL character: in question"),
    "lone surrogate": (rb'{"question": "q", "answer": "a \ud83d b"}', "lone surrogate: U+D83D in answer"),
    "lone low surrogate": (rb'{"question": "q \udcee", "answer": "a"}', "lone surrogate: U+DCEE in question"),
    "surrogate in metadata": (rb'{"question": "q", "answer": "a", "by": "\ud800"}', "lone surrogate"),
    "replacement character": (dumps({"question": "q", "answer": "a \ufffd"}), "undecodable character: U+FFFD"),
    "an array": (b"[1, 2]", "not an object: a list"),
    "a text": (b'"text"', "not an object: text"),
    "a number": (b"17", "not an object: a number"),
    "null": (b"null", "not an object: null"),
    "messages is an object": (dumps({"messages": {"role": "user"}}), "messages is an object"),
    "messages is empty": (dumps({"messages": []}), "no assistant turn"),
    "a turn is null": (dumps({"messages": [None]}), "a turn is null"),
    "content is null": (
        dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}]}),
        "an assistant turn is null",
    ),
    "no content": (dumps({"messages": [{"role": "user"}]}), "a user turn is null"),
    "no assistant": (dumps(chat("system", "user")), "no assistant turn"),
    "trailing user": (dumps(chat("user", "assistant", "user")), "the last turn is not the assistant's"),
    "no user": (dumps(chat("system", "assistant")), "no user turn before the reply"),
    "two replies": (dumps(chat("user", "assistant", "assistant")), "no user turn before the reply"),
    "late system": (dumps(chat("user", "system", "assistant")), "system turn after the first turn"),
    "unknown role": (dumps(chat("user", "tool", "assistant")), "unknown role: 'tool'"),
    "role is a list": (dumps({"messages": [{"role": ["user"], "content": "q"}]}), "unknown role"),
    "NaN": (b'{"question": "q", "answer": "a", "score": NaN}', "NaN or Infinity"),
    "too large a float": (b'{"question": "q", "answer": "a", "score": 1e999}', "NaN or Infinity"),
    "lexemes is a number": (dumps({**good(0), "lexemes": 3}), "lexemes is not a list of texts"),
    "lexemes holds null": (dumps({**good(0), "lexemes": [None]}), "lexemes is not a list of texts"),
    "deep metadata": (b'{"question": "q", "answer": "a", "m": ' + b"[" * 60 + b"]" * 60 + b"}", "nested too deeply"),
    "prompt is a number": (dumps({"prompt": 1, "completion": "c"}), "prompt is a number"),
    "instruction without output": (dumps({"instruction": "i", "input": "x"}), "missing column: instruction"),
    "own row, id a number": (
        dumps({"id": 1, "source": "s:1", "prompt": [], "completion": [], "lexemes": [], "metadata": {}}),
        "id is not a name",
    ),
    "own row, no turns": (
        dumps({"id": "1", "source": "s:1", "prompt": [], "completion": [], "lexemes": [], "metadata": {}}),
        "no assistant turn",
    ),
}
# Lines that are no JSON; in an array they may cost what follows, so they are tried as lines only.
BAD_LINES = {
    "cut in a value": (b'{"question": "q", "answer": "a', "truncated JSON"),
    "cut after a comma": (b'{"question": "q",', "truncated JSON"),
    "cut after a brace": (b"{", "truncated JSON"),
    "single quotes": (b"{'question': 'q', 'answer': 'a'}", "not valid JSON"),
    "two objects": (dumps(good(1)) + dumps(good(2)), "not valid JSON: more text after the value"),
    "prose": (b"this is a note", "not valid JSON"),
    "Python's None": (b'{"question": None, "answer": "a"}', "not valid JSON"),
    "raw tab in a text": (b'{"question": "a\tb", "answer": "a"}', "not valid JSON"),
    "Latin-1": ('{"question": "q", "answer": "nâ"}'.encode("latin-1"), "not valid UTF-8: byte 0xe2"),
    "raw surrogate": (b'{"question": "q", "answer": "\xed\xa0\x80"}', "not valid UTF-8: byte 0xed"),
    "overlong UTF-8": (b'{"question": "q", "answer": "\xc0\xaf"}', "not valid UTF-8"),
    "cut UTF-8": (b'{"question": "q", "answer": "\xe1\xba"}', "not valid UTF-8"),
    "raw NUL": (b'{"question": "q\x00", "answer": "a"}', "NUL character"),
    "only NULs": (b"\x00\x00\x00\x00", "NUL character"),
    "very deep": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "very deep object": (b'{"question":' * 50_000, "nested too deeply"),
    "a number of 5,000 digits": (b'{"question": ' + b"1" * 5000 + b', "answer": "a"}', "not valid JSON"),
    "conflict marker": (b"<<<<<<< HEAD", "not valid JSON"),
}


def zst(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    return zstandard.ZstdCompressor().compress(data)


def zipped(data: bytes, name: str = "rows.jsonl") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
        archive.writestr("__MACOSX/._rows.jsonl", b"\x00")
    return buffer.getvalue()


def as_is(data: bytes) -> bytes:
    return data


LINE_FORMATS = {
    "rows.jsonl": as_is,
    "rows.ndjson": as_is,
    "rows.json": as_is,
    "rows.jsonl.gz": gzip.compress,
    "rows.jsonl.bz2": bz2.compress,
    "rows.jsonl.xz": lzma.compress,
    "rows.jsonl.zst": zst,
    "rows.zip": zipped,
    "crlf.jsonl": lambda data: data.replace(b"\n", b"\r\n"),
    "bom.jsonl": lambda data: b"\xef\xbb\xbf" + data,
}


def check(path, lines: dict[int, str], kept: int) -> None:
    """Bad rows are exactly ``lines`` (number: start of the reason), and the good rows 1..kept all came through."""
    rowset = load_rows(path)
    assert {bad.line: bad.reason[: len(lines.get(bad.line, ""))] for bad in rowset.quarantine} == lines
    assert len(rowset.quarantine) == len(lines)
    assert all(len(bad.text) <= 1200 and bad.source for bad in rowset.quarantine)  # 200 characters, some escaped
    assert [(row.question, row.answer) for row in rowset.rows] == [
        (good(number)["question"], good(number)["answer"]) for number in range(1, kept + 1)
    ]
    assert sum(file["quarantined"] for file in rowset.files) == len(lines)
    again = load_rows(write_jsonl(path.with_name("again.jsonl"), rowset.rows))
    assert again.sha256 == rowset.sha256
    written = write_quarantine(path.with_name("quarantine.jsonl"), rowset.quarantine).read_text(encoding="utf-8")
    assert [json.loads(line)["line"] for line in written.splitlines()] == list(lines)


@pytest.mark.parametrize("form", LINE_FORMATS)
@pytest.mark.parametrize("kind", [*BAD_VALUES, *BAD_LINES])
def test_bad_line(tmp_path, kind, form):
    bad, reason = (BAD_VALUES | BAD_LINES)[kind]
    lines = [dumps(good(1)), bad, dumps(good(2)), b"", b"  ", bad, dumps(good(3))]
    path = tmp_path / form
    path.write_bytes(LINE_FORMATS[form](b"\n".join(lines) + b"\n"))
    check(path, {2: reason, 6: reason}, 3)


@pytest.mark.parametrize("kind", [*BAD_VALUES, *BAD_LINES])
def test_bad_first_and_last_line(tmp_path, kind):
    bad, reason = (BAD_VALUES | BAD_LINES)[kind]
    for name in ("rows.jsonl", "rows.json"):
        path = tmp_path / name
        path.write_bytes(b"\n".join([bad, dumps(good(1)), dumps(good(2)), bad]))
        if name == "rows.jsonl" or bad[:1] not in b"[{" or kind in ("an array", "empty object"):
            check(path, {1: reason, 4: reason}, 2)
        elif kind != "two objects":  # the first line decides how a .json file is read; the good rows are kept anyhow
            assert [row.question for row in load_rows(path).rows] == [good(1)["question"], good(2)["question"]]


@pytest.mark.parametrize("form", ["array", "data", "train", "one line"])
@pytest.mark.parametrize("kind", BAD_VALUES)
def test_bad_element(tmp_path, kind, form):
    bad, reason = BAD_VALUES[kind]
    elements = [dumps(good(1)), bad, dumps(good(2)), bad]
    path = tmp_path / "rows.json"
    if form == "one line":
        path.write_bytes(b"[" + b", ".join(elements) + b"]")
        rowset = load_rows(path)
        assert [row.question for row in rowset.rows] == [good(1)["question"], good(2)["question"]]
        assert [(found.line, found.reason.startswith(reason)) for found in rowset.quarantine] == [(1, True)] * 2
        return
    opening = {"array": b"[", "data": b'{"version": {"a": [1]},\n"data": [', "train": b'{"train": ['}[form]
    closing = {"array": b"]\n", "data": b'],\n"end": null}', "train": b"]}"}[form]
    path.write_bytes(opening + b"\n" + b",\n\n".join(elements) + b"\n" + closing)
    first = 3 if form == "data" else 2
    check(path, {first + 2: reason, first + 6: reason}, 2)


@pytest.mark.parametrize("indent", [0, 2])
@pytest.mark.parametrize(
    "broken",
    ['"answer": "a', '"answer": }', "'answer': 1", '"answer": "a" "b": 1', '"answer": ' + "[" * 5000, '"a\tb": 1'],
)
def test_an_array_goes_on_after_a_broken_element(tmp_path, broken, indent):
    rows = json.dumps([good(1), good(2), good(3)], ensure_ascii=False, indent=indent).split("\n")
    at = next(number for number, line in enumerate(rows) if '"answer"' in line and number > 3)
    rows[at] = broken
    path = tmp_path / "rows.json"
    path.write_text("\n".join(rows), encoding="utf-8")
    rowset = load_rows(path)
    assert [row.question for row in rowset.rows] == [good(1)["question"], good(3)["question"]]
    assert [(bad.line, bad.source) for bad in rowset.quarantine] == [(6, "rows.json")]
    assert rowset.rows[1].source == "rows.json:10"


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("form", ["array", "data", "one line"])
def test_truncated_array(tmp_path, form, keep):
    rows = [good(number) for number in range(1, 21)]
    text = json.dumps({"data": rows} if form == "data" else rows, indent=None if form == "one line" else 1)
    cut = text[: int(len(text) * keep)]
    path = tmp_path / "rows.json"
    path.write_text(cut, encoding="utf-8")
    rowset = load_rows(path)
    whole = cut.count("}") - cut.count('{"data"')
    assert [row.question for row in rowset.rows] == [row["question"] for row in rows[:whole]]
    assert [bad.reason.split(":")[0] for bad in rowset.quarantine] == ["truncated JSON"]
    assert rowset.quarantine[0].line >= cut.count("\n", 0, cut.rfind("{")) + 1


# name: (the row as written with commas, how its reason begins)
BAD_CSV = {
    "too few cells": ("q only", "ragged row: 1 cells under a header of 2"),
    "too many cells": ("q,a,b", "ragged row: 3 cells under a header of 2"),
    "empty question": (",a", "question is empty"),
    "empty answer": ("q,", "answer is empty"),
    "blank answer": ("q,   ", "answer is empty"),
    "NUL": ("q\x00,a", "NUL character: in question"),
    "replacement character": ("q,\ufffd", "undecodable character"),
    "text after a quote": ('"q"x,a', "not valid CSV"),
    "text after a quoted answer": ('q,"a" (b)', "not valid CSV"),
}
CSV_FORMATS = {
    "rows.csv": (",", as_is),
    "semicolons.csv": (";", as_is),
    "tabs.csv": ("\t", as_is),
    "rows.csv.gz": (",", gzip.compress),
    "bars.csv": ("|", as_is),
    "rows.zip": (",", lambda data: zipped(data, "inner/rows.csv")),
    "crlf.csv": (",", lambda data: data.replace(b"\n", b"\r\n")),
    "bom.csv": (",", lambda data: b"\xef\xbb\xbf" + data),
}


def csv_row(number: int, delimiter: str, end: str = "\n") -> str:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter, lineterminator=end).writerow(good(number).values())
    return buffer.getvalue()


@pytest.mark.parametrize("form", CSV_FORMATS)
@pytest.mark.parametrize("kind", BAD_CSV)
def test_bad_csv_row(tmp_path, kind, form):
    delimiter, pack = CSV_FORMATS[form]
    bad, reason = BAD_CSV[kind]
    if delimiter == "\t" and reason == "not valid CSV":
        pytest.skip("tab-separated files may hold bare quotes")
    bad = bad.replace(",", delimiter) + "\n"
    text = ["question,answer\n".replace(",", delimiter), csv_row(1, delimiter), bad, csv_row(2, delimiter), "\n", bad]
    path = tmp_path / form
    path.write_bytes(pack("".join([*text, csv_row(3, delimiter)]).encode()))
    check(path, {3: reason, 6: reason}, 3)


def test_csv_line_numbers_count_lines_inside_quotes(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\n"one\ntwo\nthree","a"\nq\n"four\nfive",b\nq,\n', encoding="utf-8")
    rowset = load_rows(path)
    assert [(row.source, row.question) for row in rowset.rows] == [
        ("rows.csv:2", "one\ntwo\nthree"),
        ("rows.csv:6", "four\nfive"),
    ]
    assert [(bad.line, bad.reason.split(":")[0]) for bad in rowset.quarantine] == [
        (5, "ragged row"),
        (8, "answer is empty"),
    ]


@pytest.mark.parametrize("rest", [3, 2000])
def test_a_quote_that_is_never_closed_costs_one_line(tmp_path, rest):
    path = tmp_path / "rows.csv"
    rows = "".join(csv_row(number, ",") for number in range(2, rest))
    path.write_text("question,answer\n" + csv_row(1, ",") + 'q,"never closed\n' + rows, encoding="utf-8")
    check(path, {3: "not valid CSV: a quote is not closed"}, rest - 1)


def test_a_quote_closed_in_a_later_row_costs_one_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f'question,answer\n{csv_row(1, ",")}q,"open\n{csv_row(2, ",")}"{"x"}",y\n', encoding="utf-8")
    rowset = load_rows(path)
    assert [row.question for row in rowset.rows] == [good(1)["question"], good(2)["question"], "x"]
    assert [bad.line for bad in rowset.quarantine] == [3]


def test_csv_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"question,answer\n" + csv_row(1, ",").encode() + b"q,n\xe2\n" + csv_row(2, ",").encode())
    check(path, {3: "not valid UTF-8: byte 0xe2 at character 4"}, 2)


def test_tab_separated_rows_may_hold_bare_quotes(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text('question\tanswer\nq1\t"hûte" (invented) is a word\n"q\t2"\ta\nq3\t"open\n', encoding="utf-8")
    rowset = load_rows(path)
    assert [(row.question, row.answer) for row in rowset.rows] == [
        ("q1", '"hûte" (invented) is a word'),
        ("q\t2", "a"),
        ("q3", '"open'),
    ]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "array.json"])
def test_a_row_over_the_limit_is_quarantined(tmp_path, monkeypatch, name):
    monkeypatch.setattr(reading, "ROW_LIMIT", 5000)
    path = tmp_path / name
    rows = [good(1), {"question": "q", "answer": "a" * 6000}, good(2)]
    if name == "rows.csv":
        text = "question,answer\n" + csv_row(1, ",") + "q," + "a" * 6000 + "\n" + csv_row(2, ",")
    elif name == "array.json":
        text = "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]"
    else:
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(text, encoding="utf-8")
    check(path, {3 if name in ("rows.csv", "array.json") else 2: "too long"}, 2)


def test_a_line_over_the_limit_is_not_held(tmp_path):
    import tracemalloc

    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(dumps(good(1)) + b"\n" + b'{"question": "')
        for _ in range(100):
            stream.write(b"a" * 2**20)
        stream.write(b'", "answer": "a"}\n' + dumps(good(2)))
    tracemalloc.start()
    check(path, {2: "too long"}, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * reading.ROW_LIMIT  # the line is 100 MiB


def parquet(path, columns: dict) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table(columns), path, row_group_size=2)


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        (None, "a", "question is null"),
        ("q", None, "answer is null"),
        ("", "a", "question is empty"),
        ("q", "  ", "answer is empty"),
        ("q\x00", "a", "NUL character: in question"),
        ("q", "\ufffd", "undecodable character"),
    ],
)
def test_bad_parquet_row(tmp_path, question, answer, reason):
    rows = [good(1), {"question": question, "answer": answer}, good(2), {"question": question, "answer": answer}]
    path = tmp_path / "rows.parquet"
    parquet(path, {key: [row[key] for row in rows] for key in ("question", "answer")})
    check(path, {2: reason, 4: reason}, 2)


def test_parquet_cells_that_are_not_utf8_or_that_python_has_no_value_for(tmp_path):
    pa = pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    answers = [good(1)["answer"].encode(), b"n\xe2", good(2)["answer"].encode()]
    stamps = pa.array([1, 2**62 + 1, 3], pa.timestamp("ns"))
    questions = [good(1)["question"], "q", good(2)["question"]]
    parquet(
        path,
        {"question": questions, "answer": _unchecked(pa, answers), "when": stamps, "score": [0.5, 1.0, float("nan")]},
    )
    check(path, {2: "not valid UTF-8: in column answer"}, 2)
    rows = load_rows(path).rows
    assert rows[0].metadata["score"] == 0.5
    assert "score" not in rows[1].metadata
    assert rows[0].metadata["when"].startswith("1970-01-01")


def _unchecked(pa, values: list[bytes]):
    """A string array over bytes that nobody checked."""
    array = pa.array(values, pa.binary())
    return pa.StringArray.from_buffers(len(array), array.buffers()[1], array.buffers()[2])


def test_parquet_row_numbers_run_on_over_batches(tmp_path):
    answers = [good(number)["answer"] for number in range(1, 3001)]
    questions = [good(number)["question"] for number in range(1, 3001)]
    path = tmp_path / "rows.parquet"
    parquet(
        path, {"question": [*questions[:2500], "", *questions[2500:]], "answer": [*answers[:2500], "", *answers[2500:]]}
    )
    check(path, {2501: "question is empty"}, 3000)


def test_parquet_column_name_that_is_not_utf8(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet(path, {"question": ["q"], "answer": ["a"], "remarks": ["r"]})
    path.write_bytes(path.read_bytes().replace(b"remarks", b"rem\x94rks"))
    with pytest.raises(StoneyError, match=r"rows.parquet can't be read: a column's name is not UTF-8"):
        load_rows(path)


def test_parquet_column_of_numbers(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet(path, {"question": [1, 2], "answer": ["a", "b"]})
    with pytest.raises(StoneyError, match=r"no good row; 2 bad .question is a number 2."):
        load_rows(path)


ROWS = b"\n".join(dumps(good(number)) for number in range(1, 4)) + b"\n"
MANY = b"".join(os.urandom(50).hex().join(('{"question": "q', '", "answer": "a"}\n')).encode() for _ in range(2000))


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 20]) + data[middle + 20 :]


# name: (file name, its bytes, what the message must hold)
WHOLE_FILE = {
    "empty .jsonl": ("rows.jsonl", b"", "is empty"),
    "empty .json": ("rows.json", b"", "is empty"),
    "empty .csv": ("rows.csv", b"", "is empty"),
    "empty .parquet": ("rows.parquet", b"", "can't be read"),
    "empty .gz": ("rows.jsonl.gz", b"", "is empty"),
    "empty .zip": ("rows.zip", b"", "zip archive"),
    "empty .xz": ("rows.jsonl.xz", b"", "rows.jsonl.xz"),
    "empty .bz2": ("rows.jsonl.bz2", b"", "rows.jsonl.bz2"),
    "empty .zst": ("rows.jsonl.zst", b"", "is empty"),
    "blank .jsonl": ("rows.jsonl", b"\n \n\t\n", "is empty"),
    "blank .json": ("rows.json", b"\n \n", "is empty"),
    "only a BOM": ("rows.jsonl", b"\xef\xbb\xbf", "is empty"),
    "empty array": ("rows.json", b"[]", "is empty"),
    "empty data": ("rows.json", b'{"data": []}', "is empty"),
    "header only": ("rows.csv", b"question,answer\n", "is empty"),
    "no header": ("rows.csv", b"What is it?,It is a word.\n", "names no known columns"),
    "half a header": ("rows.csv", b"question,reply\nq,a\n", "names no known columns"),
    "header twice the same": ("rows.csv", b"question,answer,answer\nq,a,b\n", "2 columns are named 'answer'"),
    "all rows bad": ("rows.jsonl", b'{"question": 1}\nnope\n', "no good row; 2 bad"),
    "an array of texts": ("rows.json", b'["a", "b"]', "not an object"),
    "a config": ("rows.json", b'{"lr": 1}', "no known columns: found lr"),
    "columns of lists": ("rows.json", b'{"question": ["q"], "answer": ["a"]}', "question is a list"),
    "HTML": ("rows.jsonl", b"<!DOCTYPE html>\n<html>\n<body>404</body>\n", "rows.jsonl line 1: not valid JSON"),
    "LFS pointer": ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "line 1"),
    "gzip without the extension": ("rows.jsonl", gzip.compress(ROWS), "holds gzip data"),
    "zip without the extension": ("rows.jsonl", zipped(ROWS), "holds a zip archive"),
    "parquet without the extension": ("rows.csv", b"PAR1 and so on", "holds a parquet file"),
    "no gzip": ("rows.jsonl.gz", ROWS, "can't be read"),
    "no bzip2": ("rows.jsonl.bz2", ROWS, "can't be read"),
    "no xz": ("rows.jsonl.xz", ROWS, "can't be read"),
    "no zstd": ("rows.jsonl.zst", ROWS, "can't be read"),
    "no zip": ("rows.zip", ROWS, "zip archive"),
    "no parquet": ("rows.parquet", ROWS, "can't be read"),
    "truncated gzip": ("rows.jsonl.gz", gzip.compress(MANY)[:-2000], "can't be read"),
    "truncated bzip2": ("rows.jsonl.bz2", bz2.compress(MANY)[:-2000], "can't be read"),
    "truncated xz": ("rows.jsonl.xz", lzma.compress(MANY)[:-2000], "can't be read"),
    "truncated zstd": ("rows.jsonl.zst", lambda: zst(MANY)[:-2000], "can't be read"),
    "truncated zip": ("rows.zip", zipped(MANY)[:-2000], "zip archive"),
    "damaged gzip": ("rows.jsonl.gz", damaged(gzip.compress(MANY)), "can't be read"),
    "damaged bzip2": ("rows.jsonl.bz2", damaged(bz2.compress(MANY)), "can't be read"),
    "damaged xz": ("rows.jsonl.xz", damaged(lzma.compress(MANY)), "can't be read"),
    "damaged zip": ("rows.zip", damaged(zipped(MANY)), "can't be read"),
    "zip without data": ("rows.zip", zipped(b"hello", "readme.txt"), "holds no data file"),
    "unknown extension": ("rows.txt", ROWS, "of no kind that can be read"),
    "no extension": ("rows", ROWS, "of no kind that can be read"),
    "xlsx": ("rows.xlsx", zipped(ROWS), "of no kind that can be read"),
    "tar": ("rows.tar.gz", gzip.compress(ROWS), "of no kind that can be read"),
}


@pytest.mark.parametrize("kind", WHOLE_FILE)
def test_bad_file(tmp_path, kind):
    name, data, message = WHOLE_FILE[kind]
    path = tmp_path / name
    path.write_bytes(data() if callable(data) else data)
    with pytest.raises(StoneyError) as caught:
        load_rows(path)
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    # In a folder of good files, a file that can't be read is named, and one without good rows costs nothing else.
    (tmp_path / "a.jsonl").write_bytes(ROWS)
    try:
        rows = load_rows(tmp_path).rows
    except StoneyError as error:
        assert name in str(error)
    else:
        assert [row.question for row in rows] == [good(number)["question"] for number in range(1, 4)]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(ROWS)
    (tmp_path / "b.jsonl").write_bytes(ROWS)
    (tmp_path / "b.jsonl").chmod(0)
    with pytest.raises(StoneyError, match=r"b.jsonl can't be read: Permission denied; check its permissions"):
        load_rows(tmp_path)


def test_permission_error_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(ROWS)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "a.jsonl")

    monkeypatch.setattr(type(tmp_path), "open", refuse)
    with pytest.raises(StoneyError, match=r"^a.jsonl can't be read: Permission denied; check its permissions$"):
        load_rows(tmp_path / "a.jsonl")


def test_a_fifo_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    (tmp_path / "a.jsonl").write_bytes(ROWS)
    with pytest.raises(StoneyError, match="neither a file nor a folder"):
        load_rows(tmp_path / "rows.jsonl")
    with pytest.raises(StoneyError, match=r"rows.jsonl is not a regular file"):
        load_rows(tmp_path)


def test_a_broken_link_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(ROWS)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(StoneyError, match=r"b.jsonl can't be read: .*what the link points to, is missing"):
        load_rows(tmp_path)


def test_a_link_to_a_folder_above_ends(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "up").symlink_to(tmp_path)
    (tmp_path / "inner" / "a.jsonl").write_bytes(ROWS)
    assert len(load_rows(tmp_path).rows) == 3


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_wide_encodings(tmp_path, encoding, name):
    text = (
        "question,answer\n" + csv_row(1, ",") + "q\n" if name == "rows.csv" else ROWS.decode().split("\n")[0] + "\n{\n"
    )
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    if name == "rows.json":
        assert [row.answer for row in load_rows(path).rows] == [good(1)["answer"]]
    else:
        check(path, {3 if name == "rows.csv" else 2: ""}, 1)


def test_old_mac_line_ends(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(ROWS.replace(b"\n", b"\r") + b"{\r")
    check(tmp_path / "rows.jsonl", {4: "truncated JSON"}, 3)
    (tmp_path / "rows.csv").write_text(
        "question,answer\r" + csv_row(1, ",", "\r") + "q\r", encoding="utf-8", newline=""
    )
    check(tmp_path / "rows.csv", {3: "ragged row"}, 1)


_LINES = st.lists(
    st.tuples(
        st.booleans(),  # mutated
        st.lists(
            st.tuples(st.integers(0, 200), st.sampled_from("deciw"), st.binary(min_size=1, max_size=3)),
            min_size=1,
            max_size=4,
        ),
    ),
    min_size=1,
    max_size=8,
)


def mutate(line: bytes, edits: list[tuple[int, str, bytes]]) -> bytes:
    data = bytearray(line)
    for position, edit, new in edits:
        position %= len(data) + 1
        if edit == "d":
            del data[position : position + len(new)]
        elif edit == "e":
            data[position : position + len(new)] = new
        elif edit == "c":
            del data[position:]
        elif edit == "i":
            data[position:position] = new
        else:
            data[position:position] = rb'"[]{}\,:'[new[0] % 8 :][:1]
    return bytes(data).replace(b"\n", b" ")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=_LINES, name=st.sampled_from(["rows.jsonl", "rows.json"]))
def test_fuzzed_lines(tmp_path, plan, name):
    lines = [mutate(dumps(good(n)), edits) if bad else dumps(good(n)) for n, (bad, edits) in enumerate(plan)]
    untouched = [good(n)["answer"] for n, (bad, _) in enumerate(plan) if not bad]
    path = tmp_path / name
    path.write_bytes(b"\n".join(lines))
    try:
        rowset = load_rows(path)
    except StoneyError as error:
        assert "\n" not in str(error)
        assert not untouched
        return
    answers = [row.answer for row in rowset.rows]
    assert [answer for answer in answers if answer in untouched][: len(untouched)] == untouched
    if name == "rows.jsonl" and not lines[0].startswith(b"\xef\xbb\xbf"):
        filled = [n for n, line in enumerate(lines, 1) if line.decode(errors="surrogateescape").strip()]
        assert (
            sorted([int(row.source.rsplit(":", 1)[1]) for row in rowset.rows] + [q.line for q in rowset.quarantine])
            == filled
        )


_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", " ", "x", "\x00", "ẖ", "[1]"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "text", "a"]), inner, max_size=2)
    ),
    max_leaves=3,
)
_TURN = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": _VALUE})
_KEYS = sorted(reading.SCHEMA_KEYS | reading.OWN_KEYS | {"input", "system", "pair_id", "original_id", "x"})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from(_KEYS), _VALUE | st.text(max_size=3) | st.lists(_TURN | _VALUE, max_size=4)),
        min_size=1,
        max_size=4,
    )
)
def test_any_values(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(json.dumps(row).encode() for row in [good(1), *rows]))
    rowset = load_rows(path)
    assert rowset.rows[0].answer == good(1)["answer"]
    assert len(rowset.rows) + len(rowset.quarantine) == 1 + len(rows)
    assert len({row.id for row in rowset.rows}) == len(rowset.rows)
    again = load_rows(write_jsonl(tmp_path / "again.jsonl", rowset.rows))
    assert again.rows == rowset.rows


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=300) | st.text(alphabet='{}[]",:\n\\a1 ;\t', max_size=60).map(str.encode),
    name=st.sampled_from([f"r{kind}" for kind in (*reading.DATA_EXTENSIONS, *LINE_FORMATS)] + ["r.zip", "r.csv.gz"]),
)
def test_any_bytes(tmp_path, data, name):
    path = tmp_path / name
    path.write_bytes(data)
    try:
        load_rows(path)
    except StoneyError as error:
        assert "\n" not in str(error)
