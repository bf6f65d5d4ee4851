"""Data files to records: which files a folder or archive holds, and what each line, element or row of them says.

A record that can't be read carries its reason and costs nothing else. What costs a whole file (permissions, a corrupt
archive, an unknown header) is an error: one of ``file_errors()``, or StoneyError where there is more to say.
"""

import csv
import io
import json
import os
import re
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stoney_rl.errors import StoneyError

if TYPE_CHECKING:
    import zipfile

DATA_EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
ROW_LIMIT = 10 * 2**20  # characters; a longer row is set aside
FILE_LIMIT = 256 * 2**20  # bytes after decompression, for what must be held whole: .json and compressed .parquet
COLUMN_LIMIT = 1000  # of a .csv file; each column is an entry in the metadata of each row
DEPTH_LIMIT = 50  # levels of nesting; Python's own JSON encoder gives up at a depth that varies

# Known columns, in the order in which they are looked for.
SCHEMAS = (
    ("messages",),
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
)
SCHEMA_KEYS = frozenset(key for keys in SCHEMAS for key in keys)
OWN_KEYS = frozenset(("id", "source", "prompt", "completion", "lexemes", "metadata"))  # Row.to_dict
WANTED = "question/answer, prompt/completion, prompt/response, instruction/output or messages"

# Files that stages, exporters and trainers write next to data, and that hold no rows.
NOT_ROWS = frozenset(
    (
        "stage.json",
        "certificate.json",
        "lexicon.jsonl",
        "quarantine.jsonl",
        "findings.jsonl",
        "dropped.jsonl",
        "report.json",
        "results.json",
        "predictions.jsonl",
        "dataset_info.json",
        "dataset_infos.json",
        "dataset_dict.json",
        "state.json",
    )
)
# The words that mark a file as one split, as the hub has them: train-00000-of-00001.parquet, valid.jsonl, dev/a.csv.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_CONTAINER_KEYS = frozenset(("data", "rows", "examples", *SPLIT_WORDS))
TOO_LONG = f"too long: a row of more than {ROW_LIMIT} characters"
TOO_DEEP = f"nested too deeply: more than {DEPTH_LIMIT} levels"

_UNDECODED = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of bytes that are not UTF-8
_DECODER = json.JSONDecoder()
_BLANK = re.compile(r"\s*")
_BLANK_OR_COMMA = re.compile(r"[\s,]*")
_FIRST_KEY = re.compile(r'\{\s*("[^"\n]{1,60}")')
_NOT_INSIDE = r"(?<![:\[])(?<![:\[]\s)"  # what stands after a colon, or first in a list, is inside of a row
_KNOWN_FIRST_KEY = re.compile(rf'{_NOT_INSIDE}\{{\s*"(?:id|{"|".join(sorted(SCHEMA_KEYS))})"\s*:')


@dataclass(slots=True)
class Record:
    """One row as read: ``value``, or the ``problem`` for which there is none.

    line: where the row begins, 1-based; the row's number for parquet. text: how it was written, or a function that
    says so. split: the split that a .json file's own structure names.
    """

    line: int
    value: object
    text: str | Callable[[], str]
    problem: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class DataFile:
    """One readable file: ``name`` as shown, ``kind`` its data extension, ``open`` gives its decompressed bytes."""

    name: str
    path: Path
    kind: str
    split: str | None
    open: Callable[[], io.BufferedIOBase]


def printable(text: object) -> str:
    """``text`` fit for a one-line message: no control characters, nothing that UTF-8 can't hold."""
    return "".join(char if char.isprintable() else "\ufffd" for char in str(text))


def plain(error: BaseException) -> str:
    """An exception as part of one line, without the path, which the caller names."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(" ".join(text.split()))[:200] or type(error).__name__


def file_errors() -> tuple[type[Exception], ...]:
    """What opening or reading a damaged file raises."""
    import lzma
    import zipfile

    return OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile


def name_parts(name: str) -> tuple[str, str, str]:
    """(stem, data extension, compression) of a file name: 'rows.jsonl.gz' is ('rows', '.jsonl', '.gz')."""
    lower = name.lower()
    compression = next((extension for extension in COMPRESSIONS if lower.endswith(extension)), "")
    stem = name[: len(name) - len(compression)]
    kind = next((extension for extension in DATA_EXTENSIONS if stem.lower().endswith(extension)), "")
    return stem[: len(stem) - len(kind)], kind, compression


def is_data_name(name: str) -> bool:
    """Whether a file of this name can hold rows."""
    return bool(name_parts(name)[1]) or name.lower().endswith(".zip")


def split_of(name: str) -> str | None:
    """The split that a relative path names; the file's own name counts before its folders'."""
    for part in reversed(name.split("/")):
        named = {SPLIT_WORDS[word] for word in re.findall("[a-z]+", part.lower()) if word in SPLIT_WORDS}
        if len(named) == 1:
            return named.pop()
    return None


def files_at(path: Path, name: str) -> Iterator[DataFile]:
    """The data file at ``path``, shown as ``name``, or for a .zip each data file in it."""
    if path.exists() and not path.is_file():
        raise StoneyError(f"{name} is not a regular file; copy its contents into one")
    if name.lower().endswith(".zip"):
        yield from _zip_members(path, name)
        return
    _, kind, compression = name_parts(path.name)
    yield DataFile(name, path, kind, split_of(name), lambda: _decompressed(path.open("rb"), compression))


def files_in(folder: Path) -> Iterator[DataFile]:
    """The data files below ``folder``, sorted by path; links are followed.

    Left out are hidden files, NOT_ROWS, and folders that a stage of this pipeline wrote (they hold a stage.json).
    """
    paths, seen = [], set()

    def stop(error: OSError) -> None:
        raise StoneyError(f"{printable(error.filename)} can't be read: {plain(error)}; check its permissions")

    for root, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        real = os.path.realpath(root)
        if real in seen:  # a link to a folder above, or a second link
            folders.clear()
            continue
        seen.add(real)
        if "stage.json" in names and Path(root) != Path(folder):  # an output of this pipeline, kept beside the data
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        paths += [
            Path(root, name)
            for name in names
            if not name.startswith(".") and name not in NOT_ROWS and is_data_name(name)
        ]
    named = sorted((path.relative_to(folder).as_posix(), path) for path in paths)
    for name, path in named:
        yield from files_at(path, printable(name))


class _Archive:
    """A .zip archive that stays open between its members: to open it is to read its directory, all of it.

    One is open at a time. It closes when another is read, or when the last DataFile that knows it is gone.
    """

    _latest: "weakref.ref[_Archive] | None" = None

    def __init__(self, path: Path):
        self._path, self._zip = path, None

    def get(self) -> "zipfile.ZipFile":
        import zipfile

        if self._zip is None:
            latest = _Archive._latest and _Archive._latest()
            if latest is not None:
                latest.close()
            self._zip, _Archive._latest = zipfile.ZipFile(self._path), weakref.ref(self)
        return self._zip

    def lists(self, count: int) -> bool:
        """Whether the archive says that it holds ``count`` files; zipfile reads a damaged directory as a shorter one.

        The number is in the end record, at most 64 KiB before the end (APPNOTE.TXT, 4.3.16); 0xFFFF refers to zip64.
        """
        with self._path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - (1 << 16) - 22))
            tail = stream.read()
        at = tail.rfind(b"PK\x05\x06")
        said = int.from_bytes(tail[at + 10 : at + 12], "little")
        return said in (count % (1 << 16), 0xFFFF)

    def close(self) -> None:
        if self._zip is not None:
            self._zip.close()  # a member that is being read keeps the file open for as long as it needs it
            self._zip = None


def _check_name(archive: _Archive, member: "zipfile.ZipInfo", name: str) -> None:
    """Raise StoneyError if a member has another name where its data are: damage must not hide a data file."""
    import zipfile

    try:
        archive.get().open(member).close()
    except zipfile.BadZipFile as error:
        raise StoneyError(f"{name} can't be read as a zip archive: {plain(error)}; check that it is whole") from None
    except (OSError, ValueError, NotImplementedError, RuntimeError):
        pass  # encrypted, or of a compression that is unknown here: not a file with rows


def _zip_members(path: Path, name: str) -> Iterator[DataFile]:
    import struct
    import zipfile

    broken = (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError, struct.error)
    archive = _Archive(path)
    try:
        members = sorted(archive.get().infolist(), key=lambda member: member.filename)
        if not archive.lists(len(members)):
            raise zipfile.BadZipFile("its directory does not list as many files as it says")
    except broken as error:
        raise StoneyError(f"{name} can't be read as a zip archive: {plain(error)}; check that it is whole") from None

    def opener(member: zipfile.ZipInfo, compression: str) -> Callable[[], io.BufferedIOBase]:
        def opened() -> io.BufferedIOBase:
            try:
                raw = archive.get().open(member)
            except broken as error:
                raise OSError(plain(error)) from None
            return _decompressed(raw, compression)

        return opened

    found = False
    for member in members:
        parts = member.filename.split("/")
        _, kind, compression = name_parts(parts[-1])
        if not kind or parts[-1] in NOT_ROWS or any(part.startswith((".", "__MACOSX")) for part in parts):
            _check_name(archive, member, name)
            continue
        inside = printable(f"{name}/{member.filename}")
        if member.flag_bits & 1:
            raise StoneyError(f"{inside} is encrypted; unpack the archive and give the folder")
        found = True
        yield DataFile(inside, path, kind, split_of(member.filename) or split_of(name), opener(member, compression))
    if not found:
        raise StoneyError(f"{name} holds no data file; expected one of {' '.join(DATA_EXTENSIONS)} inside")


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a .zst file. zstandard's own reader takes a truncated file for a short one."""

    def __init__(self, raw: io.BufferedIOBase):
        import zstandard

        self._raw, self._new, self._error = raw, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
        self._frame, self._inside = self._new(), False
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            # Small steps: one compressed byte can stand for tens of thousands.
            data = self._input or self._raw.read(2048)
            if not data:
                if self._inside:
                    raise EOFError("the compressed data ends before its end marker")
                return 0
            try:
                self._output = memoryview(self._frame.decompress(data))  # a slice of it costs nothing
            except self._error as error:
                raise OSError(str(error)) from None
            self._input, self._inside = self._frame.unused_data, not self._frame.eof
            if self._frame.eof:
                self._frame = self._new()
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def _decompressed(raw: io.BufferedIOBase, compression: str) -> io.BufferedIOBase:
    if compression == ".gz":
        import gzip

        return gzip.GzipFile(fileobj=raw)
    if compression == ".bz2":
        import bz2

        return bz2.BZ2File(raw)
    if compression == ".xz":
        import lzma

        return lzma.LZMAFile(raw)
    if compression == ".zst":
        try:
            return io.BufferedReader(_ZstdStream(raw))
        except ImportError:
            raise StoneyError("reading .zst needs the package zstandard: pip install zstandard==0.25.0") from None
    return raw


def _encoding(head: bytes) -> str:
    """A file's encoding from its first bytes: a byte order mark, else where its zero bytes fall, else UTF-8."""
    if head.startswith(b"\xef\xbb\xbf"):
        return "utf-8-sig"
    # In a wide encoding what is ASCII has zero bytes; without them a mark is the damage of one row.
    marks = (
        (b"\xff\xfe\x00\x00", "utf-32"),
        (b"\x00\x00\xfe\xff", "utf-32"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    )
    for mark, encoding in marks if 16 * head.count(0) >= len(head) else ():
        if head.startswith(mark):
            return encoding
    # Without a mark: rows start with ASCII ('{', '[', a header), whose other bytes are zero (RFC 4627, section 3).
    for pattern, encoding in (
        (rb"[^\0]\0\0\0[^\0]\0\0\0", "utf-32-le"),
        (rb"\0\0\0[^\0]\0\0\0[^\0]", "utf-32-be"),
        (rb"[^\0]\0[^\0]\0[^\0]\0", "utf-16-le"),
        (rb"\0[^\0]\0[^\0]\0[^\0]", "utf-16-be"),
    ):
        if re.match(pattern, head):
            return encoding
    return "utf-8"


def _open_text(file: DataFile, universal: bool = False) -> tuple[io.TextIOWrapper, str]:
    """``file`` as text, and what ends its lines: ``\\n``, or ``\\r`` in a file that has no other.

    Bytes that are not UTF-8 become lone surrogates, so that one bad line does not cost the file. With ``universal``
    all line ends are read as ``\\n``.
    """
    with file.open() as stream:
        head = stream.read(1 << 16)
    for magic, what in ((b"PAR1", "a parquet file"), (b"\x1f\x8b", "gzip data"), (b"PK\x03\x04", "a zip archive")):
        if head.startswith(magic):
            raise StoneyError(f"{file.name} holds {what}; give it the extension that says so")
    encoding = _encoding(head)
    utf8 = encoding.startswith("utf-8")
    end = "\r" if utf8 and b"\r" in head and b"\n" not in head else "\n"
    errors = "surrogateescape" if utf8 else "replace"
    stream = io.TextIOWrapper(file.open(), encoding=encoding, errors=errors, newline=None if universal else end)
    return stream, end


def _lines(stream: io.TextIOWrapper, end: str) -> Iterator[tuple[int, str, bool]]:
    """(line number, text, too long) of each line; of one over ROW_LIMIT only the start is kept."""
    number = 0
    while text := stream.readline(ROW_LIMIT + 1):
        number += 1
        long = len(text) > ROW_LIMIT and not text.endswith(end)
        if long:
            text = text[:200]
            while (more := stream.readline(1 << 20)) and not more.endswith(end):
                pass
        yield number, text, long


def _not_utf8(text: str) -> str | None:
    """The reason, if ``text`` holds bytes that were not UTF-8."""
    found = None if text.isascii() else _UNDECODED.search(text)
    if found is None:
        return None
    return f"not valid UTF-8: byte 0x{ord(found[0]) - 0xDC00:02x} at character {found.start() + 1}"


def _json_problem(error: Exception) -> str:
    """The reason for an error that decoding JSON raised."""
    if isinstance(error, RecursionError):
        return TOO_DEEP
    if not isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {plain(error)}"
    if error.msg.startswith("Unterminated string") or not error.doc[error.pos :].strip():
        return "truncated JSON: the text ends inside a value"
    return f"not valid JSON: {error.msg} at character {error.pos + 1}"


def _json_record(line: int, text: str) -> Record:
    """The record of one JSON value written as ``text``, which may end in a comma."""
    text = text.strip().lstrip("\ufeff")
    problem = _not_utf8(text)
    if "\x00" in text:
        problem = f"NUL character: at character {text.index(chr(0)) + 1}"
    if problem:
        return Record(line, None, text, problem)
    try:
        value, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError) as error:
        return Record(line, None, text, _json_problem(error))
    if end < len(text) and text[end:].strip() not in ("", ","):
        return Record(line, None, text, f"not valid JSON: more text after the value, at character {end + 1}")
    return Record(line, value, text)


def _read_jsonl(file: DataFile) -> Iterator[Record]:
    stream, end = _open_text(file)
    with stream:
        for number, text, long in _lines(stream, end):
            if long:
                yield Record(number, None, text, TOO_LONG)
            elif not text.isspace():
                yield _json_record(number, text)


def _read_json(file: DataFile) -> Iterator[Record]:
    """An array of rows, an object that holds such arrays (``data``, ``train``, ...), one row, or in fact JSON lines."""
    stream, _ = _open_text(file, universal=True)
    with stream:
        text = stream.read(FILE_LIMIT + 1)
    if len(text) > FILE_LIMIT:
        raise StoneyError(f"{file.name} is too large to be read as one JSON value; write it as JSON lines (.jsonl)")
    start = _BLANK.match(text).end()
    if start == len(text):
        return
    line_end = text.find("\n", start)
    first = text[start : line_end if line_end >= 0 else None].rstrip()
    several = line_end >= 0 and not text[line_end:].isspace()
    if several and not first.endswith(",") and _json_record(1, first).problem is None:
        in_lines = True
    elif text[start] == "[":
        in_lines = False
        yield from _JsonText(text).array(start + 1)
    elif text[start] == "{":
        in_lines = yield from _JsonText(text).object(start)
    else:
        in_lines = True
    if in_lines:
        del text
        yield from _read_jsonl(file)


class _JsonText:
    """A text that holds rows as one JSON value, and the way on after a row that can't be read."""

    def __init__(self, text: str):
        self._text = text
        self._position, self._line = 0, 1
        self._opening: tuple[str, str] | None = None  # of the last good row: what is before it on its line, its start

    def line(self, position: int) -> int:
        """The line number of ``position``; positions rise from call to call."""
        self._line += self._text.count("\n", self._position, position)
        self._position = max(self._position, position)
        return self._line

    def _decode(self, position: int) -> tuple[object, int]:
        """The value at ``position`` and where it ends.

        It is decoded in a piece of the text that grows until it is large enough: a JSONDecodeError counts all lines
        before it, so that in the whole text a file of bad rows would cost its square.
        """
        for size in (2**12, 2**16, 2**20, 2**24, len(self._text)):
            piece = self._text[position : position + size]
            # What was found close to the end of the piece may be due to the cut.
            sure = size - 16 if position + size < len(self._text) else size + 1
            try:
                value, end = _DECODER.raw_decode(piece)
            except json.JSONDecodeError as error:
                if sure > size or (error.pos < sure and not error.msg.startswith("Unterminated string")):
                    raise
            else:
                if end < sure:
                    break
        return value, position + end

    def _opening_at(self, position: int) -> tuple[str, str]:
        """How a row at ``position`` begins: its line's indentation, if it is the first on its line, and its first key."""
        before = self._text[
            max(self._text.rfind("\n", max(0, position - 200), position) + 1, position - 200) : position
        ]
        first = _FIRST_KEY.match(self._text, position)
        return (before if not before.strip() else "", first[1] if first else "")

    def _next_row(self, position: int) -> int:
        """Where a row after ``position`` seems to begin, or -1.

        That is a line that starts as the line at ``position`` or as that of the last good row, or the first key that
        one of them starts with; where there is none, and before the first good row, an object that starts with a known
        column.
        """
        openings = [self._opening_at(position), *([self._opening] if self._opening else [])]
        indents = "|".join(sorted({re.escape(indent) for indent, _ in openings}))
        keys = sorted({rf"{_NOT_INSIDE}\{{\s*{re.escape(key)}" for _, key in openings if key})
        known = [] if self._opening else [_KNOWN_FIRST_KEY.pattern]
        found = re.compile("|".join([rf"\n(?:{indents})\{{", *keys, *known])).search(self._text, position + 1)
        found = found or _KNOWN_FIRST_KEY.search(self._text, position + 1)
        return found.start() if found else -1

    def array(
        self, position: int, split: str | None = None, closed: bool = True, inside: bool = False
    ) -> Iterator[Record]:
        """The values from ``position`` to the closing bracket, or without one to the end; returns where they end.

        ``inside``: of an object, so that more may follow. A bracket after which rows go on is a bad row like others.
        """
        text = self._text
        while True:
            position = _BLANK_OR_COMMA.match(text, position).end()
            if position >= len(text):
                if closed:
                    yield Record(
                        self.line(position), None, text[-200:], "truncated JSON: the array is not closed", split
                    )
                return position
            if closed and text[position] == "]":
                after = _BLANK_OR_COMMA.match(text, position + 1).end()
                if after == len(text) or (inside and text[after] in '"}'):
                    return position + 1
                reason, end = "not valid JSON: more text after the end of the array", after
                if text[after] not in "{[":
                    end = self._next_row(after)
                yield Record(self.line(position), None, text[position : position + 200], reason, split)
                if end < 0:
                    return len(text)
                position = end
                continue
            try:
                value, end = self._decode(position)
            except (ValueError, RecursionError) as error:
                end, reason = self._next_row(position), _json_problem(error)
                if end < 0 and not reason.startswith("truncated"):
                    reason += "; the rest of the file is not read"
                yield Record(self.line(position), None, text[position : position + 200], reason, split)
                if end < 0:
                    return len(text)
            else:
                written = text[position:end]
                problem = TOO_LONG if len(written) > ROW_LIMIT else _not_utf8(written)
                if problem is None and isinstance(value, dict) and not SCHEMA_KEYS.isdisjoint(value):
                    self._opening = self._opening_at(position)
                yield Record(self.line(position), None if problem else value, written, problem, split)
            position = end

    def object(self, start: int) -> Iterator[Record]:
        """The rows of a text that starts with '{': those in its arrays, else the object itself and any that follow it.

        Returns True, and yields nothing, if there is no whole JSON object: the text may be JSON lines, the first one
        bad.
        """
        text, position, held, split = self._text, start + 1, False, None
        while True:
            try:
                begin = position = _BLANK_OR_COMMA.match(text, position).end()
                if text.startswith("}", position):
                    if not held:
                        yield from self.array(start, closed=False)
                        return False
                    position = _BLANK.match(text, position + 1).end()
                    if position == len(text):
                        return False
                    begin = position
                    raise ValueError("more text after the object that holds the rows")
                key, position = self._decode(position)
                position = _BLANK.match(text, position).end()
                if not isinstance(key, str) or not text.startswith(":", position):
                    raise ValueError("expected a key and a colon")
                position = _BLANK.match(text, position + 1).end()
                rows = key.lower() in _CONTAINER_KEYS and text.startswith("[", position)
                if not rows:
                    begin = position
                    _, position = self._decode(position)
                    continue
                held, split, position = True, SPLIT_WORDS.get(key.lower()), position + 1
            except (ValueError, RecursionError) as error:
                if not held:
                    return True
                yield Record(self.line(begin), None, text[begin : begin + 200], _json_problem(error), split)
                position = begin if text.startswith("{", begin) else self._next_row(begin)
                if position < 0:
                    return False
            position = yield from self.array(position, split, inside=True)
            if position == len(text):  # it was cut off, and said so
                return False


class _CsvLines:
    """The lines of a CSV file for csv.reader, with the power to give a record's lines back."""

    def __init__(self, stream: io.TextIOWrapper, end: str):
        self._lines, self._waiting = _lines(stream, end), []
        self.begin()

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        if self.size > ROW_LIMIT:  # a quote that is never closed would take the rest of the file
            raise csv.Error("unexpected end of data")
        line = self._waiting.pop() if self._waiting else next(self._lines)
        self.taken.append(line)
        self.size += len(line[1])
        return line[1]

    def begin(self) -> None:
        """Start a record."""
        self.taken: list[tuple[int, str, bool]] = []
        self.size = 0

    def give_back(self) -> None:
        """Give back the record's lines but its first."""
        self._waiting.extend(reversed(self.taken[1:]))


def _read_csv(file: DataFile) -> Iterator[Record]:
    """Rows under a header. ``line`` is where a record begins; a bad record costs its first line, not those after it."""
    stream, end = _open_text(file)
    limit = csv.field_size_limit(2 * ROW_LIMIT)  # the limit is on whole rows, below
    try:
        with stream:
            yield from _csv_records(file, _CsvLines(stream, end))
    finally:
        csv.field_size_limit(limit)


def _csv_records(file: DataFile, lines: _CsvLines) -> Iterator[Record]:
    first = next((text for text in lines if text.strip()), None)
    if first is None:
        return
    if lines.taken[-1][2]:
        raise StoneyError(f"{file.name}: the first line is longer than {ROW_LIMIT} characters; expected a header")
    header, delimiter = _csv_header(file, first)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.begin()
        problem = None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines.give_back()
            what = "a quote is not closed" if "unexpected end" in str(error) else plain(error)
            problem = f"not valid CSV: {what}"
            del lines.taken[1:]
            # Tab-separated files are often written without quoting, and a cell may then start with a quotation mark.
            cells = lines.taken[0][1].rstrip("\r\n").split("\t")
            if delimiter == "\t" and len(cells) == len(header):
                problem = None
        number, text, long = lines.taken[0]
        if problem is None and not any(cell.strip() for cell in cells):
            continue
        if long or lines.size > ROW_LIMIT:
            problem = TOO_LONG
        text = "".join(line[1] for line in lines.taken)
        problem = problem or _not_utf8(text)
        if problem is None and len(cells) != len(header):
            problem = f"ragged row: {len(cells)} cells under a header of {len(header)}"
        yield Record(number, None if problem else dict(zip(header, cells, strict=True)), text, problem)


def _csv_header(file: DataFile, line: str) -> tuple[list[str], str]:
    """The column names and the delimiter: the first of , ; tab | (tab first for .tsv) that gives known columns."""
    preferred = "\t" if file.kind == ".tsv" else ","
    for delimiter in sorted(",;\t|", key=lambda delimiter: delimiter != preferred):
        try:
            names = [cell.strip() for cell in next(csv.reader([line.lstrip("\ufeff")], delimiter=delimiter))]
        except csv.Error:  # a carriage return in its middle
            continue
        names = [name.lower() if name.lower() in SCHEMA_KEYS | OWN_KEYS else name for name in names]
        if any(set(keys) <= set(names) for keys in SCHEMAS):
            break
    else:
        found = printable(line.strip())[:100]
        raise StoneyError(f"{file.name}: the first line names no known columns: {found!r}; expected {WANTED}")
    if len(names) > COLUMN_LIMIT:
        raise StoneyError(f"{file.name} has {len(names):,} columns, more than {COLUMN_LIMIT:,}; keep those that matter")
    names = [name or f"column {number}" for number, name in enumerate(names, 1)]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise StoneyError(f"{file.name}: {count} columns are named {printable(name)!r}; rename all but one")
    return names, delimiter


def _read_parquet(file: DataFile) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    with file.open() as stream:
        held = stream
        if not isinstance(getattr(stream, "raw", None), io.FileIO):  # compressed or in an archive: can't be searched
            held = io.BytesIO(stream.read(FILE_LIMIT + 1))
            if held.getbuffer().nbytes > FILE_LIMIT:
                raise StoneyError(f"{file.name} is too large to be read from its archive; unpack it")
        number = 0
        try:
            for batch in pyarrow.parquet.ParquetFile(held).iter_batches(batch_size=1024, use_threads=False):
                yield from _batch_records(batch, number)
                number += batch.num_rows
        except UnicodeDecodeError:
            raise OSError("a column's name is not UTF-8") from None
        except (pyarrow.ArrowException, OverflowError) as error:
            raise OSError(plain(error)) from None


def _batch_records(batch, before: int) -> Iterator[Record]:
    """The rows of one pyarrow RecordBatch; ``before`` rows of the file came earlier."""
    try:
        values = batch.to_pylist()
    except (ValueError, TypeError, OverflowError, ImportError):  # some cell; find it
        values = [_cells(batch, index) for index in range(batch.num_rows)]
    some_long = batch.nbytes > ROW_LIMIT
    for number, value in enumerate(values, before + 1):
        if isinstance(value, str):
            yield Record(number, None, "", value)
            continue
        if some_long and len(text := json.dumps(value, ensure_ascii=False, default=str)) > ROW_LIMIT:
            yield Record(number, None, text[:200], TOO_LONG)
            continue
        for key, cell in value.items():
            if isinstance(cell, float) and cell != cell:  # what pandas writes for a missing value
                value[key] = None
            elif key not in SCHEMA_KEYS and not isinstance(cell, str | int | float | None):
                value[key] = json.loads(json.dumps(cell, default=str))
        yield Record(number, value, lambda value=value: json.dumps(value, ensure_ascii=False, default=str))


def _cells(batch, index: int) -> dict | str:
    """One row of a RecordBatch, or the reason why it can't be read. A cell Python has no value for is kept as text."""
    value = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value[name] = column[index].as_py()
        except UnicodeDecodeError:
            return f"not valid UTF-8: in column {printable(name)}"
        except (ValueError, TypeError, OverflowError, ImportError):
            value[name] = str(column[index])
    return value


_READERS = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def read_records(file: DataFile) -> Iterator[Record]:
    """The records of ``file`` in order. Raises StoneyError or one of ``file_errors()``."""
    return _READERS[file.kind](file)
