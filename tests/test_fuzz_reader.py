"""Mutated files through the reader (``fuzz_reader``), what it found, and that it finds what is put there."""

import itertools
import json
import time
import zipfile

import fuzz_reader
import pytest

from stoney_rl import data, reading
from stoney_rl.data import load_rows
from stoney_rl.errors import StoneyError


def good(number: int) -> dict:
    return {"question": f"What is 'tâlo{number}'?", "answer": f"Word {number} (invented)."}


def dumps(number: int) -> str:
    return json.dumps(good(number), ensure_ascii=False)


def questions(path) -> list[int]:
    """The numbers of the good rows that come back, each with its own answer."""
    rows = load_rows(path).rows
    numbers = [int(row.question.removeprefix("What is 'tâlo").removesuffix("'?")) for row in rows]
    assert [row.answer for row in rows] == [good(number)["answer"] for number in numbers]
    return numbers


def test_mutated_files():
    """A short run; the long one is 10,000 files: python tests/fuzz_reader.py."""
    outcomes = list(fuzz_reader.run(1, list(range(398))))
    assert [outcome for outcome in outcomes if outcome.violations] == []
    assert len(outcomes) == 398
    # It is not all refusals, nor all whole files.
    assert sum(outcome.promised for outcome in outcomes if outcome.result == "read") > 1000
    assert sum(outcome.quarantined for outcome in outcomes) > 100
    assert 50 < sum(outcome.result != "read" for outcome in outcomes) < 200


@pytest.mark.parametrize(
    "name", ["zst, one line", "gz, json brackets", "zip of many members", "csv, a million columns"]
)
def test_bombs(tmp_path, name):
    file_name, write, _ = fuzz_reader.BOMBS[name]
    case = fuzz_reader.Case(f"bomb: {name}", file_name, [], [name], write=write)
    assert fuzz_reader.run_case(case, tmp_path).violations == []


def test_a_case_depends_on_its_seed_and_number_only():
    first, again, other = (fuzz_reader.make_case(seed, 60) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert {fuzz_reader.make_case(0, index).kind for index in range(75)} >= {"zip", "folder", "csv.xz", "parquet.zst"}


def run_some(folder, count: int, *kinds: str) -> list[str]:
    """The violations in the first ``count`` files of these kinds, or of any."""
    found = []
    indexes = (
        index
        for index in itertools.count()
        if not kinds or fuzz_reader.KINDS[index % len(fuzz_reader.KINDS)][0] in kinds
    )
    for index in itertools.islice(indexes, count):
        place = folder / str(index)
        place.mkdir()
        found += fuzz_reader.run_case(fuzz_reader.make_case(0, index), place, index).violations
    return found


def test_it_notices_a_lost_row(tmp_path, monkeypatch):
    plain_json_record = reading._json_record

    def forgetful(line, text):
        return plain_json_record(line, "" if line == 3 else text)

    monkeypatch.setattr(reading, "_json_record", forgetful)
    assert any("a good row is lost" in violation for violation in run_some(tmp_path, 10, "lines"))


def test_it_notices_a_row_that_is_dropped_in_silence(tmp_path, monkeypatch):
    take = data._Loader._take

    def forgetful(self, record, *rest):
        if not record.problem:
            take(self, record, *rest)

    monkeypatch.setattr(data._Loader, "_take", forgetful)
    found = run_some(tmp_path, 40, "lines", "array")
    assert any("quarantined, of" in violation for violation in found)


def test_it_notices_a_row_that_is_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "normalize", lambda text: text.replace("mîva", "miva").strip())
    assert any("a good row is lost" in violation for violation in run_some(tmp_path, 20, "lines"))


def test_it_notices_a_wrong_line_number(tmp_path, monkeypatch):
    line = reading._JsonText.line
    monkeypatch.setattr(reading._JsonText, "line", lambda self, position: line(self, position) + 1)
    assert any("one like it is at" in violation for violation in run_some(tmp_path, 10, "array"))


def test_it_notices_a_traceback_and_a_long_message(tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("no")

    with monkeypatch.context() as patch:
        patch.setattr(reading, "_not_utf8", broken)
        assert any("not a StoneyError" in violation for violation in run_some(tmp_path / "a", 3))
    monkeypatch.setattr(data, "_no_rows", lambda *_: "two\nlines")
    assert any("not one short printable line" in violation for violation in run_some(tmp_path / "b", 20, "one row"))


@pytest.fixture(autouse=True)
def folders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()


def test_it_notices_time_and_memory(tmp_path, monkeypatch):
    held = []

    def wasteful(*_, **__):
        held.append(bytearray(b"x") * (900 * 2**20))
        raise StoneyError("no")

    with monkeypatch.context() as patch:
        patch.setattr(data, "load_rows", wasteful)
        assert any("MiB more" in violation for violation in run_some(tmp_path / "a", 1))
    held.clear()
    monkeypatch.setattr(fuzz_reader, "SECONDS_LIMIT", 0.0)
    assert any(violation.startswith("took ") for violation in run_some(tmp_path / "b", 1))


def test_it_notices_a_crash_and_a_hang_and_goes_on(monkeypatch):
    import os

    plain_run_case = fuzz_reader.run_case

    def strange(case, folder, index):
        if index == 1:
            os._exit(3)
        if index == 2:
            time.sleep(60)
        return plain_run_case(case, folder, index)

    monkeypatch.setattr(fuzz_reader, "run_case", strange)
    monkeypatch.setattr(fuzz_reader, "HANG_SECONDS", 2)
    outcomes = list(fuzz_reader.run(0, [0, 1, 2, 3]))
    assert [(outcome.index, outcome.violations) for outcome in outcomes] == [
        (0, []),
        (1, ["the process crashed with exit code 3"]),
        (2, ["it hangs"]),
        (3, []),
    ]


def test_a_failing_input_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fuzz_reader, "SECONDS_LIMIT", -1.0)
    assert fuzz_reader.main(["--files", "2", "--first", "7", "--seed", "5", "--keep", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "VIOLATION seed 5 file 7" in told
    case = fuzz_reader.make_case(5, 7)
    assert (tmp_path / "5-7" / case.name).read_bytes() == case.files[0].content
    assert "seed 5 file 7" in (tmp_path / "5-7" / "violations.txt").read_text(encoding="utf-8")


# What it found.


@pytest.mark.parametrize("first", ["question\ranswer", "question,answer\r,x", "a\rb"])
def test_a_header_with_a_carriage_return(tmp_path, first):
    path = tmp_path / "rows.csv"
    path.write_text(f"{first}\nq,a\n", encoding="utf-8", newline="")
    with pytest.raises(StoneyError, match="names no known columns"):
        load_rows(path)


@pytest.mark.parametrize("name", ["x\x00", "\ufffd", "\ud800"])
def test_an_id_that_could_not_be_read_back(tmp_path, name):
    path = tmp_path / "rows.jsonl"
    path.write_text(dumps(1) + "\n" + json.dumps({**good(2), "id": name}) + "\n", encoding="utf-8")
    rowset = load_rows(path)
    assert len(rowset.rows) == 1
    assert rowset.quarantine[0].reason.endswith("in id") or "in id;" in rowset.quarantine[0].reason
    path.write_text(json.dumps({**good(2), "pair_id": name}) + "\n" + dumps(1), encoding="utf-8")
    assert questions(path) == [1]


def test_a_first_line_that_starts_like_utf_16(tmp_path):
    path = tmp_path / "rows.jsonl"
    for mark in (b"\xfe\xff", b"\xff\xfe"):
        path.write_bytes(mark + dumps(1).encode() + b"\n" + dumps(2).encode() + b"\n")
        assert questions(path) == [2]


@pytest.mark.parametrize(
    ("stray", "after"),
    [
        ("],", ""),
        ("],,", ""),
        ("]", ""),
        ("]}", ""),
        ("]},", ""),
        ("]]", ""),
        ("", "]"),
        ("", "] tail"),
    ],
)
@pytest.mark.parametrize("form", ["array", "object"])
def test_a_stray_bracket_costs_no_row(tmp_path, form, stray, after):
    path = tmp_path / "rows.json"
    begin, end = ("[\n", "\n]") if form == "array" else ('{"data": [\n', "\n]}")
    path.write_text(f"{begin}{dumps(1)},\n{stray}\n{dumps(2)},\n{dumps(3)}{end}{after}", encoding="utf-8")
    assert questions(path) == [1, 2, 3]
    assert load_rows(path).quarantine


@pytest.mark.parametrize(
    "broken", ['{"question": nan}', "{'question': 1}", '{"question": "q', '{"x": [}', "note", "{", "["]
)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_array_on_one_line_goes_on_after_a_broken_element(tmp_path, broken, at):
    path = tmp_path / "rows.json"
    elements = [dumps(1), dumps(2)]
    elements.insert(at, broken)
    path.write_text("[" + ", ".join(elements) + "]", encoding="utf-8")
    assert questions(path) == [1, 2]
    assert load_rows(path).quarantine


@pytest.mark.parametrize(
    "broken", ['{"a":' * 2000, '{"question": {"question": ' * 30 + "nan", "[" * 3000, '{"x": [' * 200]
)
@pytest.mark.parametrize("between", [", ", ",\n"])
def test_a_broken_element_is_quarantined_once(tmp_path, broken, between):
    path = tmp_path / "rows.json"
    path.write_text("[" + between.join([dumps(1), broken, dumps(2)]) + "]", encoding="utf-8")
    assert questions(path) == [1, 2]
    assert len(load_rows(path).quarantine) == 1


def test_an_indented_array_goes_on_after_an_element_that_is_not_indented(tmp_path):
    path = tmp_path / "rows.json"
    rows = json.dumps([good(1), good(2), good(3)], indent=2, ensure_ascii=False)
    path.write_text(rows.replace("  {\n", '{"x" 1},\n  {\n'), encoding="utf-8")
    assert questions(path) == [1, 2, 3]


def test_the_time_for_broken_elements_is_that_of_their_number(tmp_path):
    """It was that of its square: an error of Python's decoder counts the lines of the text before it."""
    path = tmp_path / "rows.json"
    path.write_text("[\n" + "{'question': 'q', 'answer': 'a'},\n" * 40_000 + dumps(1) + "\n]", encoding="utf-8")
    start = time.process_time()
    assert questions(path) == [1]
    assert time.process_time() - start < 20  # about 1; before, 60


@pytest.mark.parametrize("length", [4070, 4080, 4090, 4094, 4096, 4100, 65530, 2**20, 2**20 + 40])
def test_values_of_any_length_are_decoded_whole(tmp_path, length):
    """The decoder sees pieces of 4 KiB, 64 KiB, ... characters: a row that ends about there is the same row."""
    path = tmp_path / "rows.json"
    for extra in range(0, 40, 3):
        row = {**good(1), "note": "x" * (length - 60 - extra), "n": -1.5e-07}
        path.write_text(f"[\n{json.dumps(row)},\n12.5e3,\n{dumps(2)}\n]", encoding="utf-8")
        rowset = load_rows(path)
        assert rowset.rows[0].metadata == {"note": row["note"], "n": -1.5e-07}
        assert [bad.reason.split(",")[0] for bad in rowset.quarantine] == ["not an object: a number"]
        assert questions(path) == [1, 2]


def test_a_zip_of_many_members_is_opened_once(tmp_path, monkeypatch):
    """To open an archive is to read its directory: once for each member would be the square of their number."""
    for name in ("a.zip", "b.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for number in range(50):
                archive.writestr(f"{number:02}.jsonl", dumps(number))
    opened = []

    class Counted(zipfile.ZipFile):
        def __init__(self, path, *rest):
            opened.append(path.name)
            super().__init__(path, *rest)

    monkeypatch.setattr(zipfile, "ZipFile", Counted)
    assert questions(tmp_path) == [*range(50), *range(50)]
    assert opened == ["a.zip", "b.zip", "a.zip", "b.zip"]  # to list the members, and to read them


def test_a_zip_whose_directory_hides_a_data_file(tmp_path):
    path = tmp_path / "rows.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", dumps(1))
        archive.writestr("b.jsonl", dumps(2))
        archive.writestr("notes.txt", "no rows")
    assert questions(path) == [1, 2]
    content = path.read_bytes()
    at = content.rindex(b"b.jsonl")
    path.write_bytes(content[:at] + b"b.jsoXl" + content[at + 7 :])
    with pytest.raises(StoneyError, match=r"^rows.zip can't be read as a zip archive: File name in directory"):
        load_rows(path)


def test_a_zip_whose_directory_is_read_as_a_shorter_one(tmp_path):
    path = tmp_path / "rows.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", dumps(1))
        archive.writestr("b.jsonl", dumps(2))
        archive.comment = b"two files"
    content = bytearray(path.read_bytes())
    assert questions(path) == [1, 2]
    entry = content.index(b"PK\x01\x02")
    content[entry + 32] = 46 + len("b.jsonl")  # the first entry's comment: all of the second entry
    path.write_bytes(content)
    assert zipfile.ZipFile(path).namelist() == ["a.jsonl"]
    with pytest.raises(
        StoneyError, match="its directory does not list as many files as it says; check that it is whole"
    ):
        load_rows(path)


def test_a_parquet_row_over_the_limit(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    long = {"question": "q" * (reading.ROW_LIMIT + 1), "answer": "a"}
    pyarrow.parquet.write_table(pa.Table.from_pylist([good(1), long, good(2)]), path)
    assert questions(path) == [1, 2]
    assert [(bad.line, bad.reason, len(bad.text)) for bad in load_rows(path).quarantine] == [(2, reading.TOO_LONG, 200)]


def test_headers_that_are_no_headers(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    names = ",".join(map(str, range(reading.COLUMN_LIMIT)))
    path.write_text(f"question,answer,{names}\nq,a\n", encoding="utf-8")
    with pytest.raises(StoneyError, match=r"^rows.csv has 1,002 columns, more than 1,000; keep those that matter$"):
        load_rows(path)
    monkeypatch.setattr(reading, "ROW_LIMIT", 1000)
    path.write_text("question,answer," + "x" * 2000 + "\nq,a,b\n", encoding="utf-8")
    with pytest.raises(StoneyError, match="the first line is longer than 1000 characters; expected a header"):
        load_rows(path)
