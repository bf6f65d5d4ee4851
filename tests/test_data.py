import gzip
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from stoney_rl.data import (
    Quarantined,
    Row,
    RowSet,
    dataset_sha256,
    describe,
    load_rows,
    write_jsonl,
    write_quarantine,
)
from stoney_rl.errors import StoneyError

ROOT = Path(__file__).resolve().parent.parent


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def one(tmp_path: Path, row: dict) -> Row:
    (found,) = load_rows(write(tmp_path / "rows.jsonl", row)).rows
    return found


def turn(role: str, content: object) -> dict:
    return {"role": role, "content": content}


QA = {"question": "What is 'hûte' (invented)?", "answer": "A word."}

# name: (source row, prompt, answer, metadata)
SCHEMAS = {
    "question/answer": (
        {"question": "Q?", "answer": "A.", "pair_id": 7, "by": {"who": ["x"]}},
        [turn("user", "Q?")],
        "A.",
        {"pair_id": 7, "by": {"who": ["x"]}},
    ),
    "prompt/completion": ({"prompt": "Q?", "completion": "A."}, [turn("user", "Q?")], "A.", {}),
    "prompt/response": ({"prompt": "Q?", "response": "A.", "n": 1}, [turn("user", "Q?")], "A.", {"n": 1}),
    "instruction/output": ({"instruction": "Say it.", "output": "A."}, [turn("user", "Say it.")], "A.", {}),
    "instruction/input/output": (
        {"instruction": "Say it.", "input": "word", "output": "A."},
        [turn("user", "Say it.\n\nword")],
        "A.",
        {},
    ),
    "instruction, empty input": (
        {"instruction": "Say it.", "input": "", "output": "A."},
        [turn("user", "Say it.")],
        "A.",
        {"input": ""},
    ),
    "messages": (
        {"messages": [turn("system", "Be kind."), turn("user", "Q?"), turn("assistant", "A.")]},
        [turn("user", "Q?")],
        "A.",
        {"system": "Be kind."},
    ),
    "several turns": (
        {"messages": [turn("user", "1"), turn("assistant", "2"), turn("user", "3"), turn("assistant", "4")]},
        [turn("user", "1"), turn("assistant", "2"), turn("user", "3")],
        "4",
        {},
    ),
    "content parts": (
        {
            "messages": [
                turn("user", [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]),
                turn("assistant", "A."),
            ]
        },
        [turn("user", "What is it?")],
        "A.",
        {},
    ),
    "turns in prompt and completion": (
        {"prompt": [turn("system", "S"), turn("user", "Q?")], "completion": [turn("assistant", "A.")]},
        [turn("user", "Q?")],
        "A.",
        {"system": "S"},
    ),
    "turns in prompt, text in completion": (
        {"prompt": [turn("user", "Q?")], "completion": "A."},
        [turn("user", "Q?")],
        "A.",
        {},
    ),
    "columns of another schema left null": (
        {"question": "Q?", "answer": "A.", "messages": None, "prompt": None},
        [turn("user", "Q?")],
        "A.",
        {},
    ),
    "system column and system turn": (
        {"system": "One. ", "messages": [turn("system", "Two."), turn("user", "Q?"), turn("assistant", "A.")]},
        [turn("user", "Q?")],
        "A.",
        {"system": "One.\nTwo."},
    ),
    "metadata of its own": (
        {"question": "Q?", "answer": "A.", "metadata": {"x": 1}, "source": "a recording"},
        [turn("user", "Q?")],
        "A.",
        {"x": 1, "source": "a recording"},
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(tmp_path, name):
    source, prompt, answer, metadata = SCHEMAS[name]
    row = one(tmp_path, source)
    assert row.prompt == prompt
    assert row.completion == [turn("assistant", answer)]
    assert row.metadata == metadata
    assert row.source == "rows.jsonl:1"
    assert row.id == ("rows-7" if "pair_id" in source else "rows.jsonl:1")
    assert row.lexemes == []
    assert (row.question, row.answer) == (prompt[-1]["content"], answer)


def test_contents_and_lexemes_are_normalised(tmp_path):
    row = one(
        tmp_path,
        {
            "question": "  n\u0061\u0302zude\u2019s\r\nt\u0331?\u200b ",
            "answer": "x\ufeff",
            "lexemes": ["h\u0331a", " "],
        },
    )
    assert row.question == "nâzude's\nṯ?"
    assert row.answer == "x"
    assert row.lexemes == ["ẖa"]


def test_what_normalising_repairs_is_noted(tmp_path):
    path = write(
        tmp_path / "rows.jsonl",
        {**QA, "id": "regular", "note": "it\u2019s\r"},  # metadata is left as it is
        {"question": " Q? ", "answer": "na\u0302zude", "id": "x"},
        {**QA, "id": "x", "answer": "it\u2019s\u200b it"},
        {"prompt": [turn("system", "a\rb"), turn("user", "Q?")], "completion": [turn("assistant", "A.")], "id": "s"},
        {"instruction": "Say.", "input": "a\u00adb", "output": "A.", "id": "i"},
        {**QA, "lexemes": ["ba", "dada\u02bcs"], "id": "l"},
        {"question": "it\u2019s", "answer": "", "id": "quarantined"},
    )
    rowset = load_rows(path)
    assert rowset.irregular == {
        "x": ("not NFC",),
        "x#2": ("apostrophe U+2019", "invisible U+200B"),
        "s": ("line end",),
        "i": ("invisible U+00AD",),
        "l": ("apostrophe U+02BC",),
    }
    again = load_rows(write_jsonl(tmp_path / "own" / "again.jsonl", rowset.rows))
    assert again.rows == rowset.rows and again.irregular == {}


def test_the_line_ends_of_a_csv_file_are_not_those_of_its_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'question,answer\r\n"One\r\nand two?",It\xe2\x80\x99s.\r\n"Q?",A.\r\n')
    rowset = load_rows(path)
    assert [row.question for row in rowset.rows] == ["One\nand two?", "Q?"]
    assert rowset.irregular == {"rows.csv:2": ("apostrophe U+2019",)}


def test_ids(tmp_path):
    rows = load_rows(
        write(
            tmp_path / "a.jsonl",
            {**QA, "id": "x"},
            {**QA, "id": "x"},
            {**QA, "id": "x#2"},
            {**QA, "id": "x"},
            {**QA, "id": 5},
            {**QA, "pair_id": 5},
            {**QA, "id": None},
            {**QA, "id": ["no"]},
            {**QA, "id": " y "},
        )
    ).rows
    assert [row.id for row in rows] == ["x", "x#2", "x#2#2", "x#3", "a-5", "a-5#2", "a.jsonl:7", "a.jsonl:8", "y"]
    assert [row.metadata.get("original_id") for row in rows] == [None, "x", "x#2", "x", None, "a-5", None, None, None]
    assert rows[7].metadata["id"] == ["no"]
    taken = load_rows(write(tmp_path / "b.jsonl", {**QA, "id": "x#2"}, {**QA, "id": "x"}, {**QA, "id": "x"})).rows
    assert [row.id for row in taken] == ["x#2", "x", "x#3"]


def test_a_column_called_metadata(tmp_path):
    """An object is unfolded into the metadata, unless a column of the row has the name; text is a column like others."""
    assert one(tmp_path, {**QA, "topic": "x", "metadata": "note"}).metadata == {"topic": "x", "metadata": "note"}
    assert one(tmp_path, {**QA, "topic": "x", "metadata": {"by": 1}}).metadata == {"topic": "x", "by": 1}
    taken = {"topic": "y"}
    assert one(tmp_path, {**QA, "topic": "x", "metadata": taken}).metadata == {"topic": "x", "metadata": taken}


def test_written_rows_come_back_unchanged(tmp_path):
    first = load_rows(write(tmp_path / "a.jsonl", *(source for source, *_ in SCHEMAS.values()), {**QA, "id": "rows-7"}))
    path = write_jsonl(tmp_path / "out" / "b.jsonl", first.rows)
    again = load_rows(path)
    assert again.rows == first.rows
    assert again.sha256 == first.sha256 == dataset_sha256(first.rows)
    assert first.rows[0].source == again.rows[0].source == "a.jsonl:1"
    assert Row.from_dict(first.rows[0].to_dict()) == first.rows[0]
    assert list(json.loads(path.read_text(encoding="utf-8").splitlines()[0])) == [
        "id",
        "source",
        "prompt",
        "completion",
        "lexemes",
        "metadata",
    ]
    assert [entry.name for entry in path.parent.iterdir()] == ["b.jsonl"]


def test_from_dict_refuses_what_is_no_row():
    with pytest.raises(StoneyError, match="not a row: missing columns"):
        Row.from_dict({"id": "1"})


def test_hash_by_hand():
    row = Row("1", "s:1", [turn("user", "q")], [turn("assistant", "ẖ")], ["ẖ"], {})
    import hashlib

    text = (
        '{"completion":[{"content":"ẖ","role":"assistant"}],"id":"1","lexemes":["ẖ"],"metadata":{},'
        '"prompt":[{"content":"q","role":"user"}],"source":"s:1"}\n'
    )
    assert dataset_sha256([row]) == hashlib.sha256(text.encode()).hexdigest()
    other = Row("2", "s:2", row.prompt, row.completion, [], {})
    assert dataset_sha256([row, other]) != dataset_sha256([other, row])


def test_folder_mixes_schemas_and_kinds(tmp_path):
    write(tmp_path / "b.jsonl", {"messages": [turn("user", "b"), turn("assistant", "A")]})
    (tmp_path / "a.csv").write_text("Question,answer,note\na,A,x\n", encoding="utf-8")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.json").write_text(json.dumps([{"prompt": "cd", "completion": "A"}]), encoding="utf-8")
    with zipfile.ZipFile(tmp_path / "e.zip", "w") as archive:
        archive.writestr("y/2.jsonl", json.dumps({"question": "e2", "answer": "A"}))
        archive.writestr("1.tsv", "question\tanswer\ne1\tA\n")
        archive.writestr("3.jsonl.gz", gzip.compress(json.dumps({"question": "e3", "answer": "A"}).encode()))
    # No rows in any of these.
    for name in ("stage.json", "lexicon.jsonl", "quarantine.jsonl", ".hidden.jsonl", "notes.txt", ".git/x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not rows", encoding="utf-8")
    rowset = load_rows(tmp_path)
    assert [(row.question, row.source) for row in rowset.rows] == [
        ("a", "a.csv:2"),
        ("b", "b.jsonl:1"),
        ("cd", "c/d.json:1"),
        ("e1", "e.zip/1.tsv:2"),
        ("e3", "e.zip/3.jsonl.gz:1"),
        ("e2", "e.zip/y/2.jsonl:1"),
    ]
    assert rowset.quarantine == []
    assert rowset.rows[0].metadata == {"note": "x"}
    assert [file["path"] for file in rowset.files][:2] == ["a.csv", "b.jsonl"]
    assert {file["sha256"] for file in rowset.files if "e.zip" in file["path"]} == {rowset.files[-1]["sha256"]}
    # A skipped name is read when it is asked for by name.
    with pytest.raises(StoneyError, match="no good row"):
        load_rows(tmp_path / "lexicon.jsonl")


def test_csv_cells_that_hold_lists(tmp_path):
    import csv

    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["messages", "question", "answer", "lexemes"])
        writer.writerow([json.dumps([turn("user", "Q"), turn("assistant", "A")]), "", "", '["ẖa", "ba"]'])
        writer.writerow(["", "Q2", "A2", "ẖa; ba"])
        writer.writerow(["[{", "", "", ""])
    rowset = load_rows(tmp_path / "rows.csv")
    assert [(row.question, row.answer, row.lexemes) for row in rowset.rows] == [
        ("Q", "A", ["ẖa", "ba"]),
        ("Q2", "A2", ["ẖa", "ba"]),
    ]
    assert rowset.quarantine[0].reason.startswith("a cell that should hold a JSON list does not")


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.table(
        {
            "messages": [[turn("user", "Q1"), turn("assistant", "A1")], None],
            "question": [None, "Q2"],
            "answer": [None, "A2"],
            "pair_id": pa.array([None, 2], pa.int64()),
            "lexemes": [["ẖa"], None],
        }
    )
    path = tmp_path / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(table, path)
    (tmp_path / "copy.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))
    for name in (path.name, "copy.parquet.gz"):
        rowset = load_rows(tmp_path / name)
        assert [(row.question, row.answer, row.lexemes) for row in rowset.rows] == [
            ("Q1", "A1", ["ẖa"]),
            ("Q2", "A2", []),
        ]
        assert [row.source for row in rowset.rows] == [f"{name}:1", f"{name}:2"]
        assert rowset.rows[1].id == f"{name.split('.')[0]}-2"
        assert rowset.rows[0].metadata == {}


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (None, ["dev", "test", "train0", "train1", "both", "valid", "rest"]),
        ("train", ["train0", "train1"]),
        ("validation", ["dev", "valid"]),
        ("dev", ["dev", "valid"]),
        ("TEST", ["test"]),
    ],
)
def test_split_by_name(tmp_path, split, expected):
    for name, question in (
        ("a/dev/x.jsonl", "dev"),
        ("b_test.jsonl", "test"),
        ("data/train-00000-of-00002.jsonl", "train0"),
        ("data/train-00001-of-00002.jsonl", "train1"),
        ("test-and-train.jsonl", "both"),
        ("valid.jsonl", "valid"),
        ("words-latest.jsonl", "rest"),
    ):
        write(tmp_path / name, {"question": question, "answer": "A"})
    assert [row.question for row in load_rows(tmp_path, split=split).rows] == expected


def test_split_by_key_of_a_json_file(tmp_path):
    path = tmp_path / "rows.json"
    rows = {"train": [{"question": "1", "answer": "A"}], "test": [{"question": "2", "answer": "A"}, {"question": "3"}]}
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    assert [row.question for row in load_rows(path).rows] == ["1", "2"]
    rowset = load_rows(path, split="test")
    assert [row.question for row in rowset.rows] == ["2"]
    assert len(rowset.quarantine) == 1
    with pytest.raises(StoneyError, match="has no split 'validation': it has test, train; "):
        load_rows(path, split="validation")


def test_split_that_is_not_there(tmp_path):
    write(tmp_path / "rows.jsonl", QA)
    for split in ("train", "test"):
        with pytest.raises(StoneyError, match=f"no split '{split}': its files are not named by split; .*leave"):
            load_rows(tmp_path, split=split)
    write(tmp_path / "test.jsonl", QA)
    with pytest.raises(StoneyError, match="no split 'train': it has test;"):
        load_rows(tmp_path, split="train")
    with pytest.raises(StoneyError, match="unknown split 'holdout'; expected train, validation or test"):
        load_rows(tmp_path, split="holdout")


def test_sources_that_do_not_exist(tmp_path):
    write(tmp_path / "stoney_qa.jsonl", QA)
    with pytest.raises(StoneyError, match=r"stony_qa.jsonl does not exist; near it: stoney_qa.jsonl; expected a file"):
        load_rows(tmp_path / "stony_qa.jsonl")
    with pytest.raises(StoneyError, match=r"no/such/x.jsonl does not exist: of its folders, "):
        load_rows(tmp_path / "no" / "such" / "x.jsonl")
    with pytest.raises(StoneyError, match="or a hub id such as HarleyCooper/synthetic_stoney_data"):
        load_rows("nonsense")
    with pytest.raises(StoneyError, match="the data source is empty"):
        load_rows(" ")
    (tmp_path / "none").mkdir()
    with pytest.raises(StoneyError, match="holds no data file"):
        load_rows(tmp_path / "none")
    with pytest.raises(StoneyError, match="is local; leave the revision out"):
        load_rows(tmp_path, revision="main")
    for strange in ("\0", "a\nb", "x" * 5000, "~nobody-of-this-name/x.jsonl"):
        with pytest.raises(StoneyError, match=r"\A[^\n]*\Z"):
            load_rows(strange)


def test_describe(tmp_path):
    rowset = load_rows(
        write(tmp_path / "a.jsonl", QA, {"question": 1, "answer": "x"}, {"question": 2, "answer": "x"}, {})
    )
    assert describe(rowset) == (
        f"1 rows from {tmp_path / 'a.jsonl'} (a.jsonl 1); 3 quarantined (question is a number 2, no known columns 1); "
        f"sha256 {rowset.sha256[:12]}."
    )
    noted = RowSet(rowset.rows, [], rowset.sha256, rowset.files, "x/y", notes=["Cached."])
    assert describe(noted).endswith("none quarantined; sha256 " + rowset.sha256[:12] + ". Cached.")


def test_writing_is_all_or_nothing(tmp_path):
    path = write_quarantine(tmp_path / "q.jsonl", [Quarantined("a.jsonl", 3, "empty", "ẖ")])
    before = path.read_text(encoding="utf-8")
    assert json.loads(before) == {"source": "a.jsonl", "line": 3, "reason": "empty", "text": "ẖ"}

    def failing():
        yield Quarantined("a.jsonl", 4, "empty", "")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        write_quarantine(path, failing())
    assert path.read_text(encoding="utf-8") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["q.jsonl"]
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(StoneyError, match=r"folder.jsonl can't be written: Is a directory"):
        write_jsonl(tmp_path / "folder.jsonl", [])
    with pytest.raises(StoneyError, match=r"can't be written"):
        write_jsonl(path / "under_a_file.jsonl", [])


def test_import_loads_nothing_heavy():
    code = (
        "import sys, stoney_rl.data; "
        "print([m for m in ('torch', 'pandas', 'datasets', 'pyarrow', 'numpy', 'huggingface_hub', 'zstandard') "
        "if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.real_data
def test_real_rows():
    folder = Path(os.environ.get("STONEY_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real rows at {folder}")
    rowset = load_rows(folder)
    assert [(file["path"], file["rows"]) for file in rowset.files] == [
        ("stoney_messages.jsonl", 500),
        ("stoney_qa.jsonl", 500),
    ]
    assert len(rowset.rows) == len({row.id for row in rowset.rows}) == 1000
    assert rowset.quarantine == []
    assert all(row.metadata["system"] for row in rowset.rows[:500])
    assert all(row.id == f"stoney_qa-{row.metadata['pair_id']}" for row in rowset.rows[500:])
    assert any("ẖ" in row.answer for row in rowset.rows)
