"""A fuzzer for the reader: whole files of every kind, mutated, through ``load_rows``.

    python tests/fuzz_reader.py --files 10000 --seed 0        # about two minutes on one core; exit code 1 on a violation
    python tests/fuzz_reader.py --seed 0 --only 4711          # one file again

What must hold for each file:

1. ``load_rows`` returns, or raises StoneyError with one printable line. Nothing else, no crash, no hang.
2. No good row is lost. A row that no edit touched comes back equal (texts, metadata, line number), in its place:
   - *lines* (.jsonl, .ndjson, JSON lines in a .json): touched is a line that an edit reaches, its end and the end of the
     line before it included. All other lines are promised, unless the first bytes become those of another encoding or
     of a parquet, gzip or zip file.
     In UTF-16 and UTF-32 an edit that shifts the code units ends the promise there: all that follows is other text.
   - *CSV*: the same for records, under an untouched header. Not promised is a record that a touched one swallows whole:
     where the csv module, started at a line of the touched text, reads one record of the right width that runs on into
     it. (A quote that is opened and never closed costs its line only.)
   - *JSON arrays*, on one line, one element a line or indented: the same for elements, after an untouched opening. Not
     promised is what lies inside of a complete JSON value that begins in the touched text and runs on.
   - *compressed*: the promise of what is inside if the container is whole. A damaged container with a checksum (.gz .bz2
     .xz .zip, .zst with one) is refused, or all that is promised inside comes back. Damaged .parquet has no such promise.
3. What is not read is accounted for: one row or one quarantined line for each line that is not blank (lines), for each
   element (valid arrays), for each row (parquet that is not damaged).
4. Peak memory and time are bounded: MEMORY_LIMIT above what the process held before, SECONDS_LIMIT a file. Every 400th
   file is a bomb: small, and 100 MB or more when it is taken at its word.

All is drawn from ``random.Random(f"{seed}/{index}")``: a file depends on its seed and number only.
"""

import argparse
import bz2
import csv
import gzip
import io
import json
import lzma
import multiprocessing
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from stoney_rl import data  # noqa: E402
from stoney_rl.errors import StoneyError  # noqa: E402

MEMORY_LIMIT = 800 * 2**20  # bytes of resident memory that reading one file may add
SECONDS_LIMIT = 10.0  # of processor time
HANG_SECONDS = 120.0  # then the process that reads is stopped
BOMB_EVERY = 400

WORDS = ("tâlo", "mîva", "ẖûne", "ṯaro", "hûte", "zîno", "a-ẖe", "ûpa'")  # invented
TEXTS = ("a, b", 'said "so"', "x; y | z", "[1] {2}", "back\\slash", "tab\there", "two\nlines", "😀", "")
SCHEMAS = ("question/answer", "prompt/completion", "instruction/output", "messages")


@dataclass
class Expected:
    """A row as it must come back."""

    question: str
    answer: str
    metadata: dict


@dataclass
class Piece:
    """A stretch of a text file: a row as written, or what stands between rows (``expected`` is None)."""

    text: str
    expected: Expected | None = None
    touched: bool = False


@dataclass
class File:
    """One file of a case: its bytes, and what is promised of it.

    promised: (row, line or None) in order. total: how many rows and quarantined lines it must give together, if known.
    lines: which lines they are. whole: whether the container is.
    """

    name: str
    content: bytes
    promised: list[tuple[Expected, int | None]] = field(default_factory=list)
    total: int | None = None
    lines: list[int] | None = None
    whole: bool = True


@dataclass
class Case:
    """What one call of ``load_rows`` reads: a file, or the .zip or folder ``name`` with several."""

    kind: str
    name: str
    files: list[File]
    edits: list[str]
    content: bytes | None = None  # of the .zip that holds the files
    whole: bool = True
    write: Callable[[Path], None] | None = None


# Rows


def make_row(draw: random.Random, schema: str, number: int, flat: bool) -> tuple[dict, Expected]:
    """A source row and what ``load_rows`` makes of it; ``flat``: for a table, whose cells are all texts."""
    word = draw.choice(WORDS)
    extra = draw.choice(TEXTS) if draw.random() < 0.4 else "plain"
    question = f"What does '{word}{number}' mean? {extra}".strip()
    answer = f"{draw.choice(WORDS)} {number}: {draw.choice(TEXTS)} (invented) end."
    metadata = {"pair_id": str(number) if flat else number, "note": draw.choice(TEXTS)}
    if not flat and draw.random() < 0.3:
        metadata["by"] = {"who": [word, number, None, 0.5], "ok": True}
    if schema == "messages":
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if draw.random() < 0.5:
            turns.insert(0, {"role": "system", "content": f"Be brief, {word}."})
        row = {"messages": json.dumps(turns, ensure_ascii=False) if flat else turns, **metadata}
        if len(turns) == 3:
            metadata = {**metadata, "system": turns[0]["content"]}
    else:
        first, second = schema.split("/")
        row = {first: question, second: answer, **metadata}
    return row, Expected(question, answer, metadata)


VALUES = (
    None,
    True,
    0,
    -1.5,
    "",
    "  ",
    [],
    {},
    [1],
    {"a": {}},
    "\x00",
    "\ufffd",
    "\ud800",
    float("nan"),
    10**30,
    "x" * 3000,
)
JUNK = (
    "", " ", "{", "}", "[", "]", '"', ",", "null", "nan", "[]", "{}", "// note", "<<<<<<< HEAD", "{'question': 'q'}",
    '{"question": "q", "answer": "a"', '{"question": "q" "answer": "a"}', '{"question": 1e999, "answer": "a"}',
    '{"question": "q", "answer": "\\ud83d"}', '{"question": "q", "answer": "\\u00"}', "q,a", 'q,"a', '"q', '"q","a",', "\t",
    '{"data": [', '{"train": [{"question": "q",', "],", "}]", "[[", '[{"a": [', "-", "1", "1" * 5000, "[" * 3000, '{"a":' * 3000,
    "\u2028", "\ufeff", "question,answer", '{"question": "q", "question": "r", "answer": NaN}',
)  # fmt: skip
INSERTS = (
    b"\x00", b'"', b"'", b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\n", b"\r", b"\r\n", b"\n\n", b"\xff", b"\xc0\xaf",
    b"\xed\xa0\x80", b"\xe1\xba", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\x1a", b"\x0c", b"\x85", b"\xe2\x80\xa8",
    b"1e999", b"9" * 400, b"1" * 5000, b"[" * 400, b"[" * 30000, b'{"a":' * 2000, b'"' * 99, b"\x00" * 64, b"PAR1", b"\x1f\x8b",
    b"PK\x03\x04", b"NaN", b"-Infinity", b"\\u0000", b"\\ud800", b"a" * 20000, b"\t", b";", b"|", b"]}", b'"]', b'"},\n{"',
)  # fmt: skip


def change_value(draw: random.Random, row: dict) -> dict:
    """``row`` with one key or value of another kind."""
    row = dict(row)
    key = draw.choice(list(row))
    what = draw.random()
    if what < 0.2:
        del row[key]
    elif what < 0.3:
        row[key.upper() if draw.random() < 0.5 else key + "\x00"] = row.pop(key)
    elif what < 0.4:
        row = {"row": row}
    elif what < 0.5 and isinstance(row.get("messages"), list):
        turns = [dict(turn) for turn in row["messages"]]
        turn = draw.choice(turns)
        turn[draw.choice(["role", "content", "x"])] = draw.choice(VALUES)
        row["messages"] = draw.choice([turns, turns[::-1], turns[:1], turns * 2])
    elif what < 0.6:
        row["metadata"] = draw.choice(VALUES)
        row["id"] = draw.choice(VALUES)
    else:
        row[key] = draw.choice(VALUES)
    return row


# Text files


def edit_rows(draw: random.Random, rows: list, write: Callable[[dict], str], edits: list[str]) -> list[Piece]:
    """The rows as pieces, after edits of whole rows: junk in place of one, none, two, another order, other values."""
    pieces = [Piece(write(row), expected) for row, expected in rows]
    for _ in range(draw.choice((0, 0, 1, 1, 2, 5))):
        at = draw.randrange(len(pieces))
        what = draw.choice(("junk", "drop", "twice", "swap", "value", "value"))
        edits.append(f"{what} row {at}")
        if what == "junk":
            pieces[at] = Piece(draw.choice(JUNK), touched=True)
        elif what == "drop" and len(pieces) > 2:
            del pieces[at]
        elif what == "twice":
            pieces.insert(at, Piece(pieces[at].text, pieces[at].expected, pieces[at].touched))
        elif what == "swap":
            other = draw.randrange(len(pieces))
            pieces[at], pieces[other] = pieces[other], pieces[at]
        elif at < len(rows):
            pieces[at] = Piece(write(change_value(draw, rows[at][0])), touched=True)
    return pieces


def json_text(row: dict, indent: int | None = None) -> str:
    text = json.dumps(row, ensure_ascii=False, indent=indent)
    return json.dumps(row, indent=indent) if "\ud800" in text else text


def csv_text(row: dict, delimiter: str, quoting: int, end: str) -> str:
    buffer = io.StringIO()
    cells = ["".join(cell if cell.isascii() or cell != "\ud800" else "?" for cell in str(v)) for v in row.values()]
    csv.writer(buffer, delimiter=delimiter, quoting=quoting, lineterminator=end).writerow(cells)
    return buffer.getvalue()


@dataclass
class Encoded:
    """A text file after edits of its bytes: spans of its pieces in the new bytes, touched ones marked."""

    content: bytes
    pieces: list[tuple[int, int, Piece]]  # start, end in content; a touched piece's span is what became of it
    shifted: int | None  # where the code units of a wide encoding lose step


ENCODINGS = ("utf-8",) * 12 + ("bom",) * 2 + ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")


def encode(draw: random.Random, pieces: list[Piece], encoding: str, edits: list[str], count: int) -> Encoded:
    """Encode the pieces, then make ``count`` edits of bytes. A piece is touched if an edit reaches it or its borders."""
    codec = {"bom": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(encoding, encoding)
    mark = {"bom": b"\xef\xbb\xbf", "utf-16": b"\xff\xfe", "utf-32": b"\xff\xfe\0\0"}.get(encoding, b"")
    unit = {"utf-8": 1, "utf-16-le": 2, "utf-16-be": 2, "utf-32-le": 4, "utf-32-be": 4}[codec]
    parts = [piece.text.encode(codec, "replace") for piece in pieces]
    content, spans, start = mark + b"".join(parts), [], len(mark)
    for part in parts:
        spans.append((start if spans else 0, start + len(part)))  # the mark belongs to the first piece
        start += len(part)
    changes: list[tuple[int, int, bytes]] = []  # start, end, what stands there instead
    for _ in range(count):
        at = draw.randrange(len(content) + 1) if draw.random() < 0.95 else draw.randrange(min(9, len(content)))
        size = draw.choice((1, 1, 1, 2, 4, 30, 200))
        old = content[at : at + size]
        what = draw.choice(
            ("flip", "flip", "delete", "insert", "insert", "insert", "overwrite", "double", "swap", "cut")
        )
        end = min(at + size, len(content))
        if what == "flip":
            end = min(at + 1, len(content))
            new = bytes(byte ^ (1 << draw.randrange(8)) for byte in content[at:end])
        elif what == "delete":
            new = b""
        elif what == "insert":
            end, new = at, draw.choice(INSERTS)
        elif what == "overwrite":
            new = draw.randbytes(end - at)
        elif what == "double":
            end, new = at, old
        elif what == "swap":
            new = old[::-1]
        else:
            if draw.random() < 0.7:
                continue
            end, new = len(content), b""
        if any(at <= other_end and other <= end for other, other_end, _ in changes):
            continue  # edits do not meet
        edits.append(f"{what} at {at}, {end - at} bytes to {len(new)}")
        changes.append((at, end, new))
    changes.sort()

    def moved(position: int) -> int:
        return position + sum(len(new) - (end - at) for at, end, new in changes if end <= position)

    shifts = [at for at, end, new in changes if unit > 1 and ((len(new) - (end - at)) % unit or len(new) != end - at)]
    found = []
    for (start, end), piece in zip(spans, pieces, strict=True):
        reached = [(at, stop) for at, stop, _ in changes if at <= end and start <= stop]
        touched = piece.touched or bool(reached)
        new_start = moved(start) if not reached else moved(min([start, *(at for at, _ in reached)]))
        found.append((new_start, moved(end), Piece(piece.text, piece.expected, touched)))
    for at, end, new in reversed(changes):
        content = content[:at] + new + content[end:]
    return Encoded(content, found, min(shifts) if shifts else None)


def same_encoding(content: bytes, encoding: str) -> bool:
    """Whether the first bytes still say what they said."""
    if encoding == "utf-8" or encoding == "bom":
        wide = re.match(rb"(?s)[^\0]\0|\0", content[:8]) or b"\0" in content[:8]
        return not wide and not content.startswith((b"PAR1", b"\x1f\x8b", b"PK\x03\x04"))
    return False  # said by the caller: the first bytes of a wide file are touched or not


def decoded(content: bytes, encoding: str) -> str:
    if encoding in ("utf-8", "bom"):
        return content.decode("utf-8", "surrogateescape")
    return content.decode(encoding, "replace")


def text_file(draw: random.Random, kind: str, name: str, edits: list[str], number: int) -> File:
    """A text file of ``kind``, mutated, and its promises."""
    schema = draw.choice(SCHEMAS)
    encoding = draw.choice(ENCODINGS)
    table = kind in ("csv", "tsv")
    count = 1 if kind == "one row" else draw.randrange(2, 14)
    rows = [make_row(draw, schema, number * 100 + n, table) for n in range(1, count + 1)]
    edits.append(f"{kind}, {schema}, {encoding}, {count} rows")
    delimiter = ""
    opening = Piece("")
    if table:
        delimiter = "\t" if kind == "tsv" else draw.choice(",,,;\t|")
        quoting, end = draw.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)), draw.choice(("\n", "\n", "\r\n"))
        keys = list(rows[0][0])
        opening = Piece(csv_text({key: key for key in keys}, delimiter, quoting, end))
        pieces = edit_rows(draw, rows, lambda row: csv_text(row, delimiter, quoting, end), edits)
        for piece in pieces:
            if not piece.text.endswith("\n"):
                piece.text += end
        pieces = [opening, *pieces]
    elif kind in ("lines", "json lines"):
        end = draw.choice(("\n", "\n", "\r\n"))
        pieces = edit_rows(draw, rows, json_text, edits)
        for piece in pieces:
            piece.text += end
    else:
        indent = 2 if kind == "indented array" else None
        between = {"array on one line": ", ", "indented array": ",\n  "}.get(kind, ",\n")
        begin, close = {
            "data object": ('{"version": {"a": [1]},\n"data": [\n', '\n],\n"end": null}\n'),
            "split object": ('{"train": [\n', "\n]}\n"),
            "one row": ("", ""),
            "indented array": ("[\n  ", "\n]\n"),
            "array on one line": ("[", "]"),
        }.get(kind, ("[\n", "\n]\n"))
        pieces = edit_rows(draw, rows, lambda row: json_text(row, indent).replace("\n", "\n  "), edits)
        for piece in pieces[:-1]:
            piece.text += between
        opening = Piece(begin)
        pieces = [opening, *pieces, Piece(close)]
    made = encode(draw, pieces, encoding, edits, draw.choice((0, 0, 1, 1, 1, 2, 3, 8)))
    file = File(name, made.content)
    promise(file, kind, encoding, made, delimiter, len(rows[0][0]))
    return file


def promise(file: File, kind: str, encoding: str, made: Encoded, delimiter: str, width: int) -> None:
    """Fill in what is promised of a text file; see the module's docstring."""
    content, pieces = made.content, made.pieces
    narrow = encoding in ("utf-8", "bom")
    unit = 1 if narrow else 4 if "32" in encoding else 2
    first = pieces[0][2]
    edited_head = content[:8] != b"".join(piece.text.encode("utf-8") for *_, piece in pieces[:2])[:8]
    if narrow and edited_head and not same_encoding(content, encoding):
        return
    if not narrow and (first.touched or content[:8].count(0) < 4):
        return  # its first bytes say the encoding
    newline = {1: b"\n", 2: "\n".encode("utf-16-be" if "be" in encoding else "utf-16-le")}.get(
        unit, "\n".encode("utf-32-be" if "be" in encoding else "utf-32-le")
    )
    array = kind not in ("lines", "json lines", "csv", "tsv")
    if not array and newline not in content[: 1 << 16]:
        return  # then a carriage return may end lines
    if (array or table_kind(kind)) and first.touched:
        return
    kept = [index for index, (_, _, piece) in enumerate(pieces) if piece.expected and not piece.touched]
    if made.shifted is not None:
        kept = [index for index in kept if pieces[index][1] < made.shifted]
    if narrow and array:
        kept = [index for index in kept if not swallowed_json(content, pieces, index)]
    elif not narrow and array and any(piece.touched for *_, piece in pieces):
        reached = min(index for index, (_, _, piece) in enumerate(pieces) if piece.touched)
        kept = [index for index in kept if index < reached]
    if table_kind(kind):
        if narrow:
            kept = [index for index in kept if not swallowed_csv(content, pieces, index, delimiter, width)]
        elif any(piece.touched for *_, piece in pieces):
            reached = min(index for index, (_, _, piece) in enumerate(pieces) if piece.touched)
            kept = [index for index in kept if index < reached]
    for index in kept:
        start, _, piece = pieces[index]
        before = content[:start]
        line = None
        if array and b"\r" in content:
            pass  # it ends a line where the text is read as an array, and none where it is read as JSON lines
        elif narrow or made.shifted is None or start < made.shifted:
            line = 1 + (before.count(newline) if narrow else decoded_lines(before, encoding))
        file.promised.append((piece.expected, line))
    if kind == "lines" and narrow:
        text = decoded(content.removeprefix(b"\xef\xbb\xbf"), encoding)
        file.lines = [n for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        file.total = len(file.lines)
    elif array and narrow and kind not in ("one row", "json lines"):
        try:
            whole = json.loads(content.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return
        if isinstance(whole, list):
            file.total = len(whole)


def table_kind(kind: str) -> bool:
    return kind in ("csv", "tsv")


def decoded_lines(before: bytes, encoding: str) -> int:
    return before.decode(encoding, "replace").count("\n")


def touched_before(pieces: list, index: int) -> list[tuple[int, int]]:
    """The spans of the touched pieces before piece ``index``."""
    return [(start, end) for start, end, piece in pieces[:index] if piece.touched]


def swallowed_json(content: bytes, pieces: list, index: int) -> bool:
    """Whether a complete JSON value that begins in touched text runs on into piece ``index``."""
    decoder = json.JSONDecoder()
    text = content.decode("latin-1").replace("\r", "\n")  # one character a byte: positions stay what they are
    for start, end in touched_before(pieces, index):
        for at in range(start, min(end, start + 3000)):
            if text.startswith(("[" * 50, '{"a":' * 10), at):
                continue  # an insert that nothing closes
            if text[at] in '{["':
                try:
                    _, stop = decoder.raw_decode(text, at)
                except (ValueError, RecursionError):
                    continue
                if stop > pieces[index][0]:
                    return True
    return False


def swallowed_csv(content: bytes, pieces: list, index: int, delimiter: str, width: int) -> bool:
    """Whether one record of ``width`` cells that begins at a line of touched text runs on into piece ``index``."""
    for start, end in touched_before(pieces, index):
        line = content.rfind(b"\n", 0, start) + 1
        while line <= end:
            text = content[line:].decode("utf-8", "surrogateescape")
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            try:
                cells = next(reader)
            except (csv.Error, StopIteration):
                cells = []
            if len(cells) == width:
                taken = text.split("\n")[: reader.line_num]
                if line + len("\n".join(taken).encode("utf-8", "surrogateescape")) > pieces[index][0]:
                    return True
            following = content.find(b"\n", line)
            if following < 0:
                break
            line = following + 1
    return False


# Parquet


def parquet_file(draw: random.Random, name: str, edits: list[str], number: int, damaged: float) -> File:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = draw.choice(SCHEMAS)
    rows = [make_row(draw, schema, number * 100 + n, False) for n in range(1, draw.randrange(2, 14))]
    for row, expected in rows:
        row.pop("by", None), expected.metadata.pop("by", None)
    touched = set()
    texts = [key for key in rows[0][0] if key not in ("messages", "pair_id")]
    for _ in range(draw.choice((0, 0, 1, 2))):
        at = draw.randrange(len(rows))
        rows[at][0][draw.choice(texts)] = draw.choice((None, "", " ", "\x00", "\ufffd", "x" * 3000))
        touched.add(at)
    edits.append(f"parquet, {schema}, {len(rows)} rows, values changed in {sorted(touched)}")
    columns = {key: [row[key] for row, _ in rows] for key in rows[0][0]}
    buffer = io.BytesIO()
    pq.write_table(
        pa.table(columns),
        buffer,
        compression=draw.choice(("snappy", "zstd", "none", "gzip")),
        row_group_size=draw.choice((2, 1000)),
        use_dictionary=draw.random() < 0.5,
    )
    file = File(name, buffer.getvalue(), total=len(rows))
    file.promised = [(expected, at + 1) for at, (_, expected) in enumerate(rows) if at not in touched]
    if draw.random() < damaged:
        file.content = damage(draw, file.content, edits, tail=draw.random() < 0.5)
        file.promised, file.total = [], None
    return file


# Containers


def pack(draw: random.Random, compression: str, content: bytes, name: str) -> tuple[bytes, bool]:
    """``content`` compressed, and whether the result has a checksum over it."""
    if compression == ".gz":
        if draw.random() < 0.3 and len(content) > 2:
            middle = len(content) // 2
            return gzip.compress(content[:middle], mtime=0) + gzip.compress(content[middle:], mtime=0), True
        return gzip.compress(content, mtime=0), True
    if compression == ".bz2":
        return bz2.compress(content), True
    if compression == ".xz":
        return lzma.compress(content, preset=0), True
    if compression == ".zst":
        import zstandard

        checked = draw.random() < 0.5
        return zstandard.ZstdCompressor(write_checksum=checked).compress(content), checked
    return content, False


def damage(draw: random.Random, content: bytes, edits: list[str], tail: bool = False) -> bytes:
    """``content`` with one to three edits; ``tail``: near its end, where .parquet and .zip have their directories."""
    made = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 3))):
        low = max(0, len(made) - 300) if tail else 0
        at = draw.randrange(low, len(made)) if len(made) > low else 0
        if draw.random() < 0.15:
            at = draw.randrange(min(len(made), 24) or 1)  # the header
        what = draw.choice(("flip", "flip", "flip", "cut", "delete", "insert", "zero", "overwrite", "append", "head"))
        if what == "flip" and made:
            made[at] ^= 1 << draw.randrange(8)
        elif what == "cut":
            del made[at:]
        elif what == "delete":
            del made[at : at + draw.choice((1, 4, 50))]
        elif what == "insert":
            made[at:at] = draw.choice(INSERTS)[:64]
        elif what == "zero":
            made[at : at + 8] = bytes(len(made[at : at + 8]))
        elif what == "overwrite":
            made[at : at + 8] = draw.choice((b"\xff" * 8, b"\x7f" * 8, draw.randbytes(8)))[: len(made[at : at + 8])]
        elif what == "append":
            made += draw.choice((b"\x00" * 16, b"junk", content[: draw.randrange(1, 40)]))
        elif what == "head":
            del made[: draw.choice((1, 2, 10))]
        edits.append(f"damage: {what} at {at}")
    return bytes(made)


TEXT_KINDS = {
    "lines": (".jsonl", ".ndjson"),
    "json lines": (".json",),
    "array": (".json",),
    "indented array": (".json",),
    "array on one line": (".json",),
    "data object": (".json",),
    "split object": (".json",),
    "one row": (".json",),
    "csv": (".csv",),
    "tsv": (".tsv",),
}
COMPRESSIONS = ("", ".gz", ".bz2", ".xz", ".zst")
KINDS = [(kind, compression) for kind in (*TEXT_KINDS, "parquet") for compression in COMPRESSIONS]
KINDS += [("lines", ""), ("csv", ""), ("array", ""), ("parquet", "")] * 2 + [("zip", "")] * 4 + [("folder", "")] * 4


def any_file(
    draw: random.Random, kind: str, compression: str, stem: str, edits: list[str], number: int, damaged: float = 0.3
) -> File:
    if kind == "parquet":
        file = parquet_file(draw, f"{stem}.parquet", edits, number, 2 * damaged)
    else:
        file = text_file(draw, kind, stem + draw.choice(TEXT_KINDS[kind]), edits, number)
    file.name += compression
    file.content, checked = pack(draw, compression, file.content, file.name)
    if compression and draw.random() < damaged:
        file.content, file.whole = damage(draw, file.content, edits), False
        if not checked:
            file.promised, file.total, file.lines = [], None, None
    return file


def make_case(seed: int, index: int) -> Case:
    """The case of this number: deterministic."""
    draw = random.Random(f"{seed}/{index}")
    if index % BOMB_EVERY == BOMB_EVERY - 1:
        return bomb(draw, index // BOMB_EVERY)
    kind, compression = KINDS[index % len(KINDS)]
    edits: list[str] = []
    if kind not in ("zip", "folder"):
        file = any_file(draw, kind, compression, "rows", edits, 1)
        return Case(kind + compression, file.name, [file], edits)
    files = []
    for number in range(1, draw.randrange(2, 5)):
        inner, inner_compression = draw.choice(KINDS[: len(TEXT_KINDS) * 5 + 5])
        stem = f"{number}-rows" if draw.random() < 0.5 else f"{number}/rows"
        files.append(any_file(draw, inner, inner_compression, stem, edits, number, 0.03))
    case = Case(kind, "rows.zip" if kind == "zip" else "folder", files, edits)
    if kind == "zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", draw.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED))) as archive:
            for file in files:
                archive.writestr(zipfile.ZipInfo(file.name), file.content)
        case.content = buffer.getvalue()
        if draw.random() < 0.3:
            case.content, case.whole = damage(draw, case.content, edits, tail=draw.random() < 0.5), False
    return case


# Bombs: small files that are large when they are taken at their word


def repeated(stream, block: bytes, megabytes: int) -> None:
    for _ in range(megabytes * 2**20 // len(block)):
        stream.write(block)


GOOD = b'{"question": "q", "answer": "a"}\n'


def bomb_line(compression: str, block: bytes, name: str, megabytes: int = 150) -> Callable[[Path], None]:
    """One good row, then one line of ``block`` over and over, then a good row."""

    def write(path: Path) -> None:
        import zstandard

        with path.open("wb") as raw:
            opened = {
                ".gz": lambda: gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=1, mtime=0),
                ".bz2": lambda: bz2.BZ2File(raw, "wb", compresslevel=1),
                ".xz": lambda: lzma.LZMAFile(raw, "wb", preset=0),  # noqa: SIM115
                ".zst": lambda: zstandard.ZstdCompressor(level=1).stream_writer(raw, closefd=False),
            }[compression]()
            with opened as stream:
                stream.write(b"question,answer\nq,a\n" if ".csv" in name else GOOD)
                repeated(stream, block, megabytes)
                stream.write(b"\n" + (b"q2,a2\n" if ".csv" in name else GOOD))

    return write


def bomb_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a.jsonl", GOOD)
        with archive.open("b.jsonl", "w") as stream:
            stream.write(GOOD)
            repeated(stream, b"\x00" * 2**16, 200)
        with archive.open("c.csv", "w") as stream:
            stream.write(b"question,answer\nq,a\n")
            repeated(stream, b"x," * 2**15, 100)


def bomb_many_members(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(3000):
            archive.writestr(f"{number:05}.jsonl", GOOD)


def bomb_text(text: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(text()) and None


def bomb_parquet(path: Path) -> None:
    """A parquet file of a few kilobytes with 100 MB of one text in a dictionary page."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"question": ["q" * 2**27, "q"], "answer": ["a", "b"]})
    pq.write_table(table, path, compression="zstd")


def bomb_parquet_sizes(path: Path) -> None:
    """A parquet file whose footer declares sizes of up to 2**60: each long varint in it made longer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table({"question": ["q" * 200] * 300, "answer": ["a" * 200] * 300}), buffer, compression="none")
    content = bytearray(buffer.getvalue())
    footer = int.from_bytes(content[-8:-4], "little")
    for at in range(len(content) - 8 - footer, len(content) - 12):
        if content[at] & 0x80 and not content[at + 1] & 0x80:  # a varint of two bytes
            content[at : at + 2] = b"\xff\x7f"
    path.write_bytes(bytes(content))


# name: (file name, writer, how many rows must come back, or None where the file is refused)
BOMBS: dict[str, tuple[str, Callable[[Path], None], int | None]] = {
    "gz, one line": ("rows.jsonl.gz", bomb_line(".gz", b"a" * 2**16, ".jsonl"), 2),
    "gz, NULs": ("rows.jsonl.gz", bomb_line(".gz", b"\0" * 2**16, ".jsonl"), 2),
    "bz2, one line": ("rows.jsonl.bz2", bomb_line(".bz2", b"a" * 2**16, ".jsonl"), 2),
    "xz, brackets": ("rows.jsonl.xz", bomb_line(".xz", b"[" * 2**16, ".jsonl"), 2),
    "zst, one line": ("rows.jsonl.zst", bomb_line(".zst", b"a" * 2**16, ".jsonl"), 2),
    "zst, letters of two bytes": ("rows.jsonl.zst", bomb_line(".zst", "ẖ".encode() * 2**15, ".jsonl"), 2),
    "zst, csv": ("rows.csv.zst", bomb_line(".zst", b"x," * 2**15, ".csv"), 2),
    "gz, csv quote": ("rows.csv.gz", bomb_line(".gz", b'"x' * 2**15, ".csv"), 2),
    "gz, csv lines in a quote": (
        "rows.csv.gz",
        bomb_line(".gz", b'q,"x\n' + (b"q," + b"a" * 2000 + b"\n") * 50, ".csv", 60),
        None,
    ),
    "gz, json of one line": ("rows.json.gz", bomb_line(".gz", b"a" * 2**16, ".json"), 2),
    "gz, json brackets": ("rows.json.gz", bomb_line(".gz", b"[" * 2**16, ".json"), 2),
    "gz, json over the limit": ("rows.json.gz", bomb_line(".gz", b" " * 2**20, ".json", 3000), None),
    "gz, parquet over the limit": ("rows.parquet.gz", bomb_line(".gz", b" " * 2**20, ".jsonl", 3000), None),
    "zip": ("rows.zip", bomb_zip, 3),
    "zip of many members": ("rows.zip", bomb_many_members, 3000),
    "json, deep": ("rows.json", bomb_text(lambda: b'[\n{"question": "q", "answer": "a"},\n' + b"[" * 20_000_000), 1),
    "json, deep objects": ("rows.json", bomb_text(lambda: b'{"a":' * 4_000_000), None),
    "json, many broken elements": (
        "rows.json",
        bomb_text(lambda: b"[" + GOOD + b",\n{'question': 'q', 'answer': 'a'}" * 100_000 + b",\n" + GOOD + b"]"),
        2,
    ),
    "json, many broken elements on many lines": (
        "rows.json",
        bomb_text(lambda: b"[\n" + b'{\n  "question": "q",\n  answer: "a"\n},\n' * 60_000 + GOOD + b"]"),
        1,
    ),
    "csv, a million columns": (
        "rows.csv",
        bomb_text(lambda: b"question,answer," + b",".join(b"%d" % n for n in range(10**6)) + b"\nq,a" + b"," * 10**6),
        None,
    ),
    "csv, columns without names": ("rows.csv", bomb_text(lambda: b"question,answer" + b"," * 10**6 + b"\nq,a\n"), None),
    "csv, a header over the limit": (
        "rows.csv",
        bomb_text(lambda: b"question,answer," + b"x" * (11 * 2**20) + b"\nq,a,b\n"),
        None,
    ),
    "csv, quotes that stay open": (
        "rows.csv",
        bomb_text(lambda: b"question,answer\n" + b'"q,a\n' * 500 + b"q,a\n" * 100_000),
        None,
    ),
    "parquet, one text": ("rows.parquet", bomb_parquet, 1),
    "parquet, declared sizes": ("rows.parquet", bomb_parquet_sizes, None),
}


def bomb(draw: random.Random, number: int) -> Case:
    names = list(BOMBS)
    name = names[number % len(names)]
    file_name, write, _ = BOMBS[name]
    return Case(f"bomb: {name}", file_name, [], [name], write=write)


# Running


def place(case: Case, folder: Path) -> Path:
    """Write the case below ``folder``; what to give ``load_rows``."""
    target = folder / case.name
    if case.write:
        case.write(target)
    elif case.content is not None:
        target.write_bytes(case.content)
    elif case.kind == "folder":
        for file in case.files:
            path = target / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.content)
    else:
        target.write_bytes(case.files[0].content)
    return target


def memory(reset: bool = False) -> int:
    """Peak resident bytes since the last reset. Where Linux's /proc is absent: of the process's whole life."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass
class Outcome:
    """What one case gave: violations (none is good), and figures for the summary."""

    index: int
    kind: str
    result: str  # "read", or how the refusal begins
    rows: int = 0
    promised: int = 0
    quarantined: int = 0
    seconds: float = 0.0
    memory: int = 0
    violations: list[str] = field(default_factory=list)


def run_case(case: Case, folder: Path, index: int = 0) -> Outcome:
    """Read one case and check it."""
    path = place(case, folder)
    outcome = Outcome(index, case.kind, "read")
    before = memory(reset=True)
    start = time.process_time()  # the bound is on the reader's work: other processes do not count
    rowset = None
    try:
        rowset = data.load_rows(path)
    except StoneyError as error:
        outcome.result = refusal(str(error))
        check_message(str(error), case, outcome.violations)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome.result = "traceback"
        outcome.violations.append("not a StoneyError: " + "".join(traceback.format_exception(error))[-1500:])
    outcome.seconds = time.process_time() - start
    outcome.memory = max(0, memory() - before)
    if outcome.seconds > SECONDS_LIMIT:
        outcome.violations.append(f"took {outcome.seconds:.1f} s")
    if outcome.memory > MEMORY_LIMIT:
        outcome.violations.append(f"took {outcome.memory / 2**20:.0f} MiB more")
    if rowset is not None:
        outcome.rows, outcome.quarantined = len(rowset.rows), len(rowset.quarantine)
        outcome.promised = sum(len(file.promised) for file in case.files)
        outcome.violations += check_rowset(rowset, index)
        if case.write:
            wanted = BOMBS[case.edits[0]][2]
            if wanted is not None and len(rowset.rows) != wanted:
                outcome.violations.append(f"{len(rowset.rows)} rows came back of {wanted} good ones")
        for file in case.files:
            outcome.violations += check_file(rowset, file, case)
    elif case.write and BOMBS[case.edits[0]][2] is not None:
        outcome.violations.append(f"refused: {outcome.result}")
    return outcome


def refusal(message: str) -> str:
    """The kind of a message: without names, numbers and details."""
    for kind in (
        "has no good row", "is empty", "names no known columns", "can't be read as a zip archive", "can't be read",
        "columns are named", "holds no data file", "is encrypted", "holds gzip data", "holds a parquet file",
        "holds a zip archive", "is too large", "too many columns", "columns, more than",
    ):  # fmt: skip
        if kind in message:
            return kind
    return message[:80]


def check_message(message: str, case: Case, violations: list[str]) -> None:
    if not message.isprintable() or len(message) > 1500:
        violations.append(f"the message is not one short printable line: {message[:300]!r}")
    if case.whole and case.kind != "folder" and all(file.whole for file in case.files):
        promised = sum(len(file.promised) for file in case.files)
        lost = [file.name for file in case.files if file.promised and file.name in message]
        if promised and (lost or len(case.files) == 1 or "no good row" in message):
            violations.append(f"{promised} good rows are lost: {message[:300]}")
    elif case.kind == "folder":
        for file in case.files:
            if file.promised and file.whole and message.startswith(file.name + " "):
                violations.append(f"{file.name} has good rows, and is refused: {message[:300]}")


def check_rowset(rowset, index: int) -> list[str]:
    """What holds for every RowSet."""
    found = []
    if len({row.id for row in rowset.rows}) != len(rowset.rows):
        found.append("ids are not unique")
    if sum(file["rows"] for file in rowset.files) != len(rowset.rows):
        found.append("the files' rows do not add up")
    if sum(file["quarantined"] for file in rowset.files) != len(rowset.quarantine):
        found.append("the files' quarantined lines do not add up")
    for bad in rowset.quarantine[:1000]:
        if not bad.reason.isprintable() or len(bad.reason) > 600 or not bad.source or bad.line < 1:
            found.append(f"a quarantine reason is not one short line: {bad.reason[:200]!r}")
            break
    if index % 10 == 0 and len(rowset.rows) < 1000:
        with tempfile.TemporaryDirectory() as folder:
            data.write_quarantine(Path(folder, "quarantine.jsonl"), rowset.quarantine).read_text(encoding="utf-8")
            path = data.write_jsonl(Path(folder, "again.jsonl"), rowset.rows)
            try:
                again = data.load_rows(path)
            except StoneyError as error:
                return [*found, f"the rows do not come back from write_jsonl: {error}"]
            if again.rows != rowset.rows or again.sha256 != rowset.sha256:
                found.append("the rows do not come back from write_jsonl")
    return found


def check_file(rowset, file: File, case: Case) -> list[str]:
    """What is promised of one file of a case that was read."""
    prefix = f"{case.name}/" if case.kind == "zip" else ""
    name = prefix + file.name
    rows = [row for row in rowset.rows if row.source.rsplit(":", 1)[0] == name]
    bad = [line for line in rowset.quarantine if line.source == name]
    found = []
    came = iter(rows)
    for expected, line in file.promised:
        for row in came:
            if same(row, expected) and (line is None or row.source == f"{name}:{line}"):
                break
        else:
            there = [row.source for row in rows if same(row, expected)]
            found.append(
                f"{name} line {line}: a good row is lost: {expected.question!r}"
                + (f" (one like it is at {', '.join(there)})" if there else "")
                + (
                    f"; quarantined: {[(q.line, q.reason[:60]) for q in bad[:4]]}"
                    if bad
                    else "; nothing is quarantined"
                )
            )
            break
    if not found and file.total is not None and len(rows) + len(bad) != file.total:
        found.append(f"{name}: {len(rows)} rows and {len(bad)} quarantined, of {file.total}")
    if not found and file.lines is not None:
        lines = sorted([int(row.source.rsplit(":", 1)[1]) for row in rows] + [line.line for line in bad])
        if lines != file.lines:
            found.append(f"{name}: lines {lines} are accounted for, of {file.lines}")
    return found


def same(row, expected: Expected) -> bool:
    metadata = {key: value for key, value in row.metadata.items() if key not in ("original_id",)}
    return row.question == expected.question and row.answer == expected.answer and metadata == expected.metadata


def _work(seed: int, indexes: list[int], connection) -> None:
    """The reading process: one Outcome for each index."""
    with tempfile.TemporaryDirectory(prefix="fuzz-reader-") as folder:
        for index in indexes:
            place = Path(folder, str(index))
            place.mkdir()
            connection.send(("start", index))
            connection.send(("done", run_case(make_case(seed, index), place, index)))
            shutil.rmtree(place)
    connection.send(("end", None))


def run(seed: int, indexes: list[int]) -> Iterator[Outcome]:
    """Read the cases in another process, which may crash or hang: that is a violation, and the next case goes on."""
    context = multiprocessing.get_context("fork")
    waiting = list(indexes)
    while waiting:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(seed, waiting, sender), daemon=True)
        process.start()
        sender.close()
        current = waiting[0]
        while True:
            try:
                told = receiver.poll(HANG_SECONDS)
                what, value = receiver.recv() if told else ("hang", None)
            except EOFError:
                what, value = "crash", None
            if what == "start":
                current = value
            elif what == "done":
                yield value
                waiting = waiting[waiting.index(current) + 1 :]
            else:
                break
        if what == "end":
            process.join()
            return
        process.kill()
        process.join()
        reason = "it hangs" if what == "hang" else f"the process crashed with exit code {process.exitcode}"
        yield Outcome(current, make_case(seed, current).kind, what, violations=[reason])
        waiting = waiting[waiting.index(current) + 1 :]


def keep(seed: int, outcome: Outcome, folder: Path) -> Path:
    """Write the failing input, and beside it what is wrong."""
    place_in = folder / f"{seed}-{outcome.index}"
    place_in.mkdir(parents=True, exist_ok=True)
    case = make_case(seed, outcome.index)
    path = place(case, place_in)
    (place_in / "violations.txt").write_text(
        "\n".join([f"seed {seed} file {outcome.index} ({case.kind})", *case.edits, "", *outcome.violations]) + "\n",
        encoding="utf-8",
        errors="backslashreplace",
    )
    return path


def summary(outcomes: list[Outcome]) -> str:
    """A table by kind, then the kinds of refusals and the extremes."""
    groups = defaultdict(list)
    for outcome in outcomes:
        groups["bombs" if outcome.kind.startswith("bomb") else re.sub(r"\.(gz|bz2|xz|zst)$", "", outcome.kind)].append(
            outcome
        )
    lines = [
        f"{'kind':<20}{'files':>7}{'read':>7}{'refused':>9}{'rows':>9}{'promised':>10}{'quarantined':>13}{'violations':>12}"
    ]
    for kind, group in [*groups.items(), ("all", outcomes)]:
        read = [outcome for outcome in group if outcome.result == "read"]
        lines.append(
            f"{kind:<20}{len(group):>7}{len(read):>7}{len(group) - len(read):>9}{sum(o.rows for o in group):>9}"
            f"{sum(o.promised for o in read):>10}{sum(o.quarantined for o in group):>13}"
            f"{sum(bool(o.violations) for o in group):>12}"
        )
    refused = Counter(outcome.result for outcome in outcomes if outcome.result != "read")
    lines.append("refused: " + ", ".join(f"{what} {count}" for what, count in refused.most_common()))
    for title, group in (
        ("mutated files", [o for o in outcomes if not o.kind.startswith("bomb")]),
        ("bombs", groups["bombs"]),
    ):
        if group:
            slow, large = max(group, key=lambda o: o.seconds), max(group, key=lambda o: o.memory)
            lines.append(
                f"{title}: slowest {slow.seconds:.2f} s (file {slow.index}, {slow.kind}); "
                f"most memory {large.memory / 2**20:.0f} MiB more (file {large.index}, {large.kind})"
            )
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Mutated files through the reader.", allow_abbrev=False)
    parser.add_argument("--files", type=int, default=10_000, help="how many files")
    parser.add_argument("--first", type=int, default=0, help="the number of the first file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="read this one file again, and say what it is")
    parser.add_argument("--keep", type=Path, help="where failing inputs are written; default: a temporary folder")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    folder = args.keep or Path(tempfile.gettempdir(), "fuzz-reader-failures")
    indexes = [args.only] if args.only is not None else list(range(args.first, args.first + args.files))
    outcomes, start = [], time.perf_counter()
    for outcome in run(args.seed, indexes):
        outcomes.append(outcome)
        if outcome.violations:
            path = keep(args.seed, outcome, folder)
            print(
                f"VIOLATION seed {args.seed} file {outcome.index} ({outcome.kind}): {outcome.violations[0]}\n  {path}",
                flush=True,
            )
        if len(outcomes) % 500 == 0:
            bad = sum(bool(o.violations) for o in outcomes)
            print(f"{len(outcomes)} files, {bad} violations, {time.perf_counter() - start:.0f} s", flush=True)
    if args.only is not None:
        print("\n".join([*make_case(args.seed, args.only).edits, repr(outcomes[0])]))
    print(summary(outcomes))
    bad = sum(bool(outcome.violations) for outcome in outcomes)
    print(f"seed {args.seed}: {len(outcomes)} files, {bad} with violations, {time.perf_counter() - start:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
