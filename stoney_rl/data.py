"""Rows: every source of training data becomes one schema, and what can't be read is set aside with its reason.

    rowset = load_rows("HarleyCooper/synthetic_stoney_data")      # a hub id
    rowset = load_rows("data/")                                   # a folder, any mix of the schemas below
    rowset = load_rows("rows.jsonl.gz", split="train")
    print(describe(rowset))

Files: .jsonl .ndjson .json .csv .tsv .parquet, each also as .gz .bz2 .xz .zst, and .zip with any of them inside.
Schemas: ``question``/``answer``, ``prompt``/``completion``, ``prompt``/``response``, ``instruction``/``output`` (with
an optional ``input``), ``messages``, and this module's own (``Row.to_dict``). Files of one source may differ in schema.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stoney_rl.errors import StoneyError
from stoney_rl.reading import (
    COMPRESSIONS,
    DATA_EXTENSIONS,
    DEPTH_LIMIT,
    OWN_KEYS,
    SCHEMA_KEYS,
    SCHEMAS,
    SPLIT_WORDS,
    TOO_DEEP,
    WANTED,
    DataFile,
    Record,
    file_errors,
    files_at,
    files_in,
    is_data_name,
    name_parts,
    plain,
    printable,
    read_records,
)
from stoney_rl.text import irregularities, normalize

KNOWN_HUB_IDS = (
    "HarleyCooper/synthetic_stoney_data",
    "HarleyCooper/synthetic-stoney-data",
    "HarleyCooper/StoneyNakoda45k",
)
HUB_TIMEOUT = 10.0  # seconds until the hub counts as out of reach
HUB_TRIES = 4  # requests for one thing, with huggingface_hub's pauses of 1, 2, 4, 8 seconds between them

_BAD_CHARACTER = re.compile("[\x00\ufffd\ud800-\udfff]")
_CANONICAL = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
_EXPECTED_SOURCE = (
    f"expected a file ({' '.join(DATA_EXTENSIONS)}, also {' '.join(COMPRESSIONS)} .zip), a folder of such files, "
    f"or a hub id such as {KNOWN_HUB_IDS[0]}"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One example: ``completion`` is the reply to ``prompt``, both as chat messages with normalised contents.

    id: unique in a RowSet. source: ``<file name>:<line>``, 1-based (the row number for parquet).
    prompt: ``[{"role": "user", "content": ...}, ...]`` without a system message, which goes to ``metadata["system"]``.
    completion: ``[{"role": "assistant", "content": ...}]``. lexemes: the language's forms that the row is about, empty
    unless the source names them (see ``lexemes.annotate``). metadata: whatever else the source row held, JSON-able.
    """

    id: str
    source: str
    prompt: list[dict]
    completion: list[dict]
    lexemes: list[str]
    metadata: dict

    @property
    def question(self) -> str:
        """The content of the last user turn."""
        return next(turn["content"] for turn in reversed(self.prompt) if turn["role"] == "user")

    @property
    def answer(self) -> str:
        return self.completion[0]["content"]

    def to_dict(self) -> dict:
        return {
            "id": self.id,
            "source": self.source,
            "prompt": self.prompt,
            "completion": self.completion,
            "lexemes": self.lexemes,
            "metadata": self.metadata,
        }

    @classmethod
    def from_dict(cls, value: dict) -> "Row":
        """The inverse of ``to_dict``. Raises StoneyError if ``value`` is not such a dictionary."""
        try:
            return _own_row(value, set())
        except _BadRowError as error:
            raise StoneyError(f"not a row: {error}; expected the keys {', '.join(sorted(OWN_KEYS))}") from None


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A row that could not be read: ``source`` is its file, ``line`` is 1-based, ``text`` its first 200 characters.

    ``reason`` is a kind, which ``describe`` counts by, then ``": "`` and the detail.
    """

    source: str
    line: int
    reason: str
    text: str


@dataclass
class RowSet:
    """What ``load_rows`` returns.

    sha256: ``dataset_sha256(rows)``. files: one dictionary a file, in reading order: ``path`` (relative to the source),
    ``sha256`` (of the file's bytes; of the archive for a member of a .zip), ``split`` (or None), ``rows``,
    ``quarantined``. source: what was asked for. revision: the commit read, for a hub id. notes: what the user should
    know. irregular: row id -> what normalising repaired in the row's texts (``text.irregularities``), sorted; rows that
    needed no repair are absent.
    """

    rows: list[Row]
    quarantine: list[Quarantined]
    sha256: str
    files: list[dict]
    source: str
    revision: str | None = None
    notes: list[str] = field(default_factory=list)
    irregular: dict[str, tuple[str, ...]] = field(default_factory=dict)


class _BadRowError(Exception):
    """One row is bad; the message is the quarantine reason."""


def _canonical(row: Row) -> bytes:
    """One row as canonical JSON: keys sorted, no spaces, UTF-8. Raises _BadRowError if they can't hold it."""
    try:
        return _CANONICAL.encode(row.to_dict()).encode()
    except UnicodeEncodeError:
        raise _BadRowError("lone surrogate: a character that UTF-8 can't hold") from None
    except ValueError:
        raise _BadRowError("NaN or Infinity: not a value that JSON has") from None


def dataset_sha256(rows: Iterable[Row]) -> str:
    """SHA-256 over the rows' canonical JSON, one line each; another order is another hash."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(_canonical(row) + b"\n")
    return digest.hexdigest()


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _check_characters(text: str, what: str) -> None:
    found = _BAD_CHARACTER.search(text)
    if found is None:
        return
    if found[0] == "\x00":
        raise _BadRowError(f"NUL character: in {what}")
    if found[0] == "\ufffd":
        raise _BadRowError(f"undecodable character: U+FFFD in {what}; the text was damaged before it was written")
    raise _BadRowError(f"lone surrogate: U+{ord(found[0]):04X} in {what}")


def _content(value: object, what: str, repairs: set[str]) -> str:
    """The normalised text of one cell or turn; ``value`` may also be a list of ``{"type": "text", "text": ...}``.

    What was repaired is added to ``repairs``.
    """
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise _BadRowError(f'{what} is a list: expected text, or parts like {{"type": "text", "text": ...}}')
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise _BadRowError(f"{what} is {_kind(value)}: expected text")
    _check_characters(value, what)
    text = normalize(value)
    if not text:
        raise _BadRowError(f"{what} is empty: expected text")
    if text != value.strip():
        repairs |= irregularities(value)
    return text


def _conversation(turns: object, metadata: dict, repairs: set[str]) -> tuple[list[dict], list[dict]]:
    """(prompt, completion) of a list of turns; the system message goes into ``metadata``."""
    if not isinstance(turns, list):
        raise _BadRowError(f"messages is {_kind(turns)}: expected a list of turns")
    messages, system = [], []
    for turn in turns:
        if not isinstance(turn, dict):
            raise _BadRowError(f"a turn is {_kind(turn)}: expected an object with role and content")
        role = turn.get("role")
        if role == "system":
            if messages:
                raise _BadRowError("system turn after the first turn: only the first turn may be one")
            if turn.get("content") not in ("", None, []):
                system.append(_content(turn["content"], "the system turn", repairs))
        elif role == "user":
            messages.append({"role": "user", "content": _content(turn.get("content"), "a user turn", repairs)})
        elif role == "assistant":
            content = _content(turn.get("content"), "an assistant turn", repairs)
            messages.append({"role": "assistant", "content": content})
        else:
            shown = printable(repr(role))[:40]
            raise _BadRowError(f"unknown role: {shown}; expected system, user or assistant")
    if not any(message["role"] == "assistant" for message in messages):
        raise _BadRowError("no assistant turn: there is nothing to learn from")
    if messages[-1]["role"] != "assistant":
        raise _BadRowError("the last turn is not the assistant's: expected the reply last")
    if len(messages) < 2 or messages[-2]["role"] != "user":
        raise _BadRowError("no user turn before the reply: expected one")
    if system:
        if _filled(metadata.get("system")):
            system.insert(0, _content(metadata["system"], "system", repairs))
        metadata["system"] = "\n".join(system)
    return messages[:-1], messages[-1:]


def _lexemes(value: object, repairs: set[str]) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):  # a CSV cell
        value = _cell_list(value) if value.lstrip().startswith("[") else value.split(";")
    if not isinstance(value, list) or not all(isinstance(form, str) for form in value):
        raise _BadRowError("lexemes is not a list of texts: expected one")
    for form in value:
        _check_characters(form, "lexemes")
        repairs |= irregularities(form)
    return [form for form in map(normalize, value) if form]


def _cell_list(text: str) -> object:
    """A list written as JSON in one cell of a CSV file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _BadRowError("a cell that should hold a JSON list does not: expected one") from None


def _cell_object(text: str) -> object:
    """What a cell that may hold a JSON object holds; the text itself where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _check_depth(metadata: dict) -> None:
    level = [value for value in metadata.values() if isinstance(value, dict | list)]
    for _ in range(DEPTH_LIMIT):
        if not level:
            return
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
    raise _BadRowError(TOO_DEEP)


def _own_row(value: dict, repairs: set[str]) -> Row:
    """The Row of a dictionary with exactly OWN_KEYS; id and source are kept."""
    if not isinstance(value, dict) or set(value) != OWN_KEYS:
        raise _BadRowError("missing columns: not the keys of a row")
    for key in ("id", "source"):
        if not isinstance(value[key], str) or not value[key].strip():
            raise _BadRowError(f"{key} is not a name: expected text")
        _check_characters(value[key], key)
    if not isinstance(value["metadata"], dict):
        raise _BadRowError(f"metadata is {_kind(value['metadata'])}: expected an object")
    metadata = dict(value["metadata"])
    _check_depth(metadata)
    turns = _turns(value["prompt"], "user", repairs) + _turns(value["completion"], "assistant", repairs)
    prompt, completion = _conversation(turns, metadata, repairs)
    return Row(value["id"], value["source"], prompt, completion, _lexemes(value["lexemes"], repairs), metadata)


def _turns(value: object, role: str, repairs: set[str]) -> list:
    """A prompt or completion cell as turns: a list is taken as it is, a text becomes one turn."""
    if isinstance(value, list):
        return value
    return [{"role": role, "content": _content(value, "prompt" if role == "user" else "completion", repairs)}]


def _filled(value: object) -> bool:
    return value is not None and value != "" and value != []


def _schema(value: dict) -> tuple[str, ...]:
    """The known columns of ``value`` to read. Columns that only other rows of the file fill are passed over."""
    for keys in SCHEMAS:
        if _filled(value.get(keys[0])) and _filled(value.get(keys[-1])):
            return keys
    for keys in SCHEMAS:
        if keys[0] in value and keys[-1] in value:
            return keys
    found = printable(", ".join(map(str, value)))[:100] or "nothing"
    for question, answer in SCHEMAS[1:]:
        for there, absent in ((question, answer), (answer, question)):
            if there in value:
                raise _BadRowError(f"missing column: {there} without {absent} (found {found})")
    raise _BadRowError(f"no known columns: found {found}; expected {WANTED}")


def _to_row(value: object, source: str, stem: str, repairs: set[str]) -> Row:
    """The Row of one source row. ``source`` is ``<file name>:<line>``; see _content for ``repairs``. Raises _BadRowError."""
    if not isinstance(value, dict):
        raise _BadRowError(f"not an object: {_kind(value)}, where a row was expected")
    if "metadata" in value and OWN_KEYS <= value.keys() <= OWN_KEYS | {"seen"}:
        own = {key: value[key] for key in OWN_KEYS}
        if isinstance(own["metadata"], str):  # of a prepared directory's parquet file
            own["metadata"] = _cell_object(own["metadata"])
        if isinstance(own["metadata"], dict):
            return _own_row(own, repairs)
    keys = _schema(value)
    nested = value.get("metadata")
    unfold = isinstance(nested, dict) and not nested.keys() & value.keys()
    metadata = dict(nested) if unfold else {}
    for key, extra in value.items():
        used = key in keys or key == "lexemes" or (key == "metadata" and unfold)
        if not used and extra is not None and (key not in SCHEMA_KEYS or _filled(extra)):
            metadata[key] = extra
    _check_depth(metadata)

    if keys == ("messages",):
        turns = value["messages"]
        if isinstance(turns, str):  # a CSV cell
            turns = _cell_list(turns)
        prompt, completion = _conversation(turns, metadata, repairs)
    elif keys[0] == "prompt":
        # 'prompt' and 'completion' may each be a text or a list of turns, as in TRL.
        turns = _turns(value["prompt"], "user", repairs) + _turns(value[keys[1]], "assistant", repairs)
        prompt, completion = _conversation(turns, metadata, repairs)
    else:
        question = _content(value[keys[0]], keys[0], repairs)
        if keys[0] == "instruction" and _filled(value.get("input")):
            question += "\n\n" + _content(metadata.pop("input"), "input", repairs)
        prompt = [{"role": "user", "content": question}]
        completion = [{"role": "assistant", "content": _content(value[keys[1]], keys[1], repairs)}]
    lexemes = _lexemes(value.get("lexemes"), repairs)
    name = _source_id(metadata, stem) or source
    _check_characters(name, "id")
    return Row(name, source, prompt, completion, lexemes, metadata)


def _source_id(metadata: dict, stem: str) -> str | None:
    """The id that the source gave, if any: a text ``id`` as it is; a number, or ``pair_id``, after the file's stem."""
    given = metadata.get("id")
    if isinstance(given, str) and given.strip():
        return metadata.pop("id").strip()
    for key in ("id", "pair_id"):
        given = metadata.get(key)
        if isinstance(given, int | str) and not isinstance(given, bool) and str(given).strip():
            return f"{stem}-{str(given).strip()}"
    return None


class _Loader:
    """Collects rows over the files of one source."""

    def __init__(self):
        self.rows: list[Row] = []
        self.quarantine: list[Quarantined] = []
        self.files: list[dict] = []
        self.irregular: dict[str, tuple[str, ...]] = {}
        self.splits: set[str] = set()  # all that were met, read or not
        self._digest = hashlib.sha256()
        self._ids: dict[str, int] = {}  # id -> how many rows asked for it
        self._file_hashes: dict[Path, str] = {}

    def read(self, file: DataFile, split: str | None) -> None:
        """Read ``file``; with ``split``, only its records of that split. Raises StoneyError if it can't be read."""
        before = len(self.rows), len(self.quarantine)
        stem = name_parts(file.name.rsplit("/", 1)[-1])[0]
        try:
            for record in read_records(file):
                here = record.split or file.split
                if here:
                    self.splits.add(here)
                if split is None or here == split:
                    self._take(record, file, stem)
            digest = self._file_hash(file.path)
        except file_errors() as error:
            raise StoneyError(f"{file.name} can't be read: {plain(error)}; {_remedy(error)}") from None
        rows, quarantined = len(self.rows) - before[0], len(self.quarantine) - before[1]
        if split is None or rows or quarantined:
            self.files.append(
                {
                    "path": file.name,
                    "sha256": digest,
                    "split": file.split,
                    "rows": rows,
                    "quarantined": quarantined,
                }
            )

    def _take(self, record: Record, file: DataFile, stem: str) -> None:
        repairs: set[str] = set()
        try:
            if record.problem:
                raise _BadRowError(record.problem)
            row = self._unique(_to_row(record.value, f"{file.name}:{record.line}", stem, repairs))
            canonical = _canonical(row)
        except _BadRowError as problem:
            self.quarantine.append(Quarantined(file.name, record.line, str(problem), _sample(record.text)))
            return
        self._ids.setdefault(row.id, 1)
        self._digest.update(canonical + b"\n")
        self.rows.append(row)
        if file.kind in (".csv", ".tsv"):
            repairs.discard("line end")  # inside a quoted cell stands what ends the file's lines
        if repairs:
            self.irregular[row.id] = tuple(sorted(repairs))

    def _unique(self, row: Row) -> Row:
        if row.id not in self._ids:
            return row
        number = self._ids[row.id] + 1
        while f"{row.id}#{number}" in self._ids:
            number += 1
        self._ids[row.id] = number
        metadata = {**row.metadata, "original_id": row.id}
        return Row(f"{row.id}#{number}", row.source, row.prompt, row.completion, row.lexemes, metadata)

    def _file_hash(self, path: Path) -> str:
        if path not in self._file_hashes:
            with path.open("rb") as stream:
                self._file_hashes[path] = hashlib.file_digest(stream, "sha256").hexdigest()
        return self._file_hashes[path]

    def sha256(self) -> str:
        """``dataset_sha256`` of the rows so far."""
        return self._digest.hexdigest()


def _sample(text) -> str:
    """The first 200 characters of a record as text that UTF-8 can hold."""
    shown = text if isinstance(text, str) else text()
    return shown[:200].rstrip("\r\n").encode("utf-8", "backslashreplace").decode()


def _remedy(error: BaseException) -> str:
    if isinstance(error, PermissionError):
        return "check its permissions"
    if isinstance(error, FileNotFoundError):
        return "the file, or what the link points to, is missing"
    return "check that it is whole and is what its extension says, or fetch it again"


def load_rows(source: str | Path, *, split: str | None = None, revision: str | None = None) -> RowSet:
    """Read all rows of ``source``: a file, a folder or a dataset's id on the Hugging Face hub.

    split: 'train', 'validation' or 'test' reads only the files named so (or the arrays of that name in a .json file).
    revision: branch, tag or commit, for a hub id only.

    A row that can't be read goes to ``RowSet.quarantine`` and costs nothing else. Raises StoneyError if the source does
    not exist or can't be reached, if a file can't be read at all, or if there is not one good row.
    """
    asked = printable(source).strip()
    if not asked:
        raise StoneyError(f"the data source is empty; {_EXPECTED_SOURCE}")
    wanted = _split_name(split)
    try:
        path = Path(source).expanduser()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, no such user, a closed folder above it
        raise StoneyError(f"{asked[:200]} can't be looked up: {plain(error)}; {_EXPECTED_SOURCE}") from None
    hub_id = None if exists or isinstance(source, Path) else _hub_id(source.strip())
    download = None
    if hub_id:
        try:
            download = _download(hub_id, revision)
        except StoneyError as error:
            if not path.parent.is_dir():
                raise
            raise StoneyError(f"{error}; nor is there a local file or folder of that name{_near(path)}") from None
        path = download.folder
    elif not exists:
        raise StoneyError(_not_found(asked, path))
    elif revision is not None:
        raise StoneyError(f"revision {revision!r} was given, but {asked} is local; leave the revision out")

    files = _find_files(path, asked, bool(download))
    loader = _Loader()
    loader.splits = {file.split for file in files if file.split}
    for file in files:
        # A .json file that is not named for a split may hold several under their names.
        if wanted in (None, file.split) or (file.split is None and file.kind == ".json"):
            loader.read(file, wanted)
    if wanted and not loader.rows and not loader.quarantine:
        have = f"it has {', '.join(sorted(loader.splits))}" if loader.splits else "its files are not named by split"
        raise StoneyError(f"{asked} has no split {wanted!r}: {have}; name one that exists, or leave the split out")
    if not loader.rows:
        raise StoneyError(_no_rows(asked, loader.quarantine))
    rowset = RowSet(loader.rows, loader.quarantine, loader.sha256(), loader.files, asked, irregular=loader.irregular)
    if download:
        rowset.revision, rowset.notes = download.commit, download.notes
    return rowset


def _split_name(split: str | None) -> str | None:
    if split is None:
        return None
    if split.strip().lower() not in SPLIT_WORDS:
        raise StoneyError(f"unknown split {split!r}; expected train, validation or test")
    return SPLIT_WORDS[split.strip().lower()]


def _find_files(path: Path, asked: str, from_hub: bool) -> list[DataFile]:
    if from_hub or path.is_dir():  # the hub's folder for a repository without data files does not even exist
        files = list(files_in(path)) if path.is_dir() else []
        if not files:
            raise StoneyError(f"{asked} holds no data file; expected {' '.join(DATA_EXTENSIONS)} in it or below it")
        return files
    if not path.is_file():
        raise StoneyError(f"{asked} is neither a file nor a folder; {_EXPECTED_SOURCE}")
    if not is_data_name(path.name):
        raise StoneyError(f"{asked} is of no kind that can be read; {_EXPECTED_SOURCE}")
    return list(files_at(path, printable(path.name)))


def _no_rows(asked: str, quarantine: list[Quarantined]) -> str:
    if not quarantine:
        return f"{asked} is empty: no rows; expected {WANTED}"
    first = quarantine[0]
    counts = ", ".join(f"{kind} {count:,}" for kind, count in _kinds(quarantine).most_common(3))
    first = f"{first.source} line {first.line}: {first.reason}"
    return f"{asked} has no good row; {len(quarantine):,} bad ({counts}); the first: {first}; expected {WANTED}"


def _not_found(asked: str, path: Path) -> str:
    """What to say of a path that does not exist: what is near it, what would work."""
    above = path.parent
    if above.is_dir():
        return f"{asked[:200]} does not exist{_near(path)}; {_EXPECTED_SOURCE}"
    while not above.is_dir() and above != above.parent:
        above = above.parent
    return f"{asked[:200]} does not exist: of its folders, {printable(above)} is the last that does; {_EXPECTED_SOURCE}"


def _near(path: Path) -> str:
    """'; near it: ...' with names in the folder of ``path`` that resemble its own, or ''."""
    import difflib

    try:
        names = [entry.name for entry in os.scandir(path.parent) if not entry.name.startswith(".")]
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"; near it: {', '.join(map(printable, near))}" if near else ""


def _hub_id(text: str) -> str | None:
    """``owner/name`` if ``text`` is a dataset's hub id or hub address, and is not named like a data file."""
    for prefix in ("https://huggingface.co/datasets/", "hf://datasets/"):
        if text.startswith(prefix):
            text = text.removeprefix(prefix).rstrip("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*", text) or is_data_name(text):
        return None
    return text


@dataclass(frozen=True)
class _Download:
    folder: Path
    commit: str
    notes: list[str]


class _GaveUpError(Exception):
    """The hub was asked HUB_TRIES times for one thing."""


@contextlib.contextmanager
def _impatient_hub() -> Iterator[None]:
    """Let huggingface_hub come to an end, whatever the hub does.

    Left to itself it waits for some answers without limit (timeout=None), and starts a file that breaks off anew for as
    long as bytes come. The client factory is its own setting for both. HF_HUB_DOWNLOAD_TIMEOUT, in seconds, holds where
    it is longer than HUB_TIMEOUT.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import _http

    asked: Counter = Counter()

    def limit(request) -> None:
        longest = max(HUB_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT)
        given = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            step: min(given.get(step) or longest, longest) for step in ("connect", "read", "write", "pool")
        }
        asked[request.method, str(request.url)] += 1
        if asked[request.method, str(request.url)] > HUB_TRIES:
            raise _GaveUpError

    before = _http._GLOBAL_CLIENT_FACTORY

    def factory():
        client = before()
        client.event_hooks["request"].append(limit)
        return client

    set_client_factory(factory)
    try:
        yield
    finally:
        set_client_factory(before)


def _download(hub_id: str, revision: str | None) -> _Download:
    """The data files of a dataset repository, in the hub's cache. Raises StoneyError that says what to do.

    The files are then read as they are: load_dataset refuses a repository whose files differ in their columns
    (DatasetGenerationError, or its DatasetGenerationCastError). If the hub can't be reached, or breaks off, a cached copy is used, and a note says so.
    A hub that falls silent is given up after at most a minute; one from which bytes keep coming is not.
    """
    import difflib
    import errno

    import httpx2
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [f"*{kind}{compression}" for kind in DATA_EXTENSIONS for compression in ("", *COMPRESSIONS)] + ["*.zip"]
    wanted = {"repo_id": hub_id, "repo_type": "dataset", "revision": revision, "allow_patterns": patterns}
    try:
        with _impatient_hub():
            commit = HfApi().dataset_info(hub_id, revision=revision, timeout=HUB_TIMEOUT).sha
            # The commit first, then its name: until all files are there, the name stands for the copy from before.
            snapshot_download(**{**wanted, "revision": commit}, etag_timeout=HUB_TIMEOUT)
            folder = Path(snapshot_download(**wanted, etag_timeout=HUB_TIMEOUT))
        return _Download(folder, folder.name, [])
    except HFValidationError:
        raise StoneyError(f"{hub_id} is neither a local path nor a valid hub id; {_EXPECTED_SOURCE}") from None
    except GatedRepoError:
        raise StoneyError(
            f"{hub_id} is gated: accept its terms at https://huggingface.co/datasets/{hub_id}, then log in with "
            "'hf auth login' or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        near = difflib.get_close_matches(hub_id, KNOWN_HUB_IDS, n=1, cutoff=0.7)
        near = [name for name in near if name != hub_id]
        hint = f" (near it: {near[0]})" if near else ""
        raise StoneyError(
            f"{hub_id} is not on the Hugging Face hub, or is private: check the spelling{hint}; "
            "if it is private, log in with 'hf auth login' or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise StoneyError(f"{hub_id} has no revision {revision!r}; give a branch, tag or commit that it has") from None
    except DisabledRepoError:
        raise StoneyError(f"{hub_id} has been disabled by the hub; use another source") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, RuntimeError, _GaveUpError) as error:
        if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # why it looked for a local entry
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403):
            raise StoneyError(
                f"{hub_id}: the hub refused access ({status}): log in with 'hf auth login' or set HF_TOKEN to a token "
                "that may read it"
            ) from None
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.ENOSPC, errno.EROFS, errno.EDQUOT):
            raise StoneyError(
                f"{hub_id} can't be stored: {plain(error)}; make room, or set HF_HOME to a folder that can be written"
            ) from None
        if isinstance(error, OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE is set"
        elif status is not None:
            reason = f"the hub answered with status {status}"
        elif isinstance(error, httpx2.TimeoutException):
            reason = f"the hub did not answer within {HUB_TIMEOUT:.0f} seconds"
        elif isinstance(error, _GaveUpError):
            reason = f"the hub broke off or did not answer {HUB_TRIES} times"
        elif isinstance(error, OSError) and not isinstance(error, httpx2.HTTPError) and error.errno is None:
            reason = f"the download failed ({plain(error).split('. ')[0]})"
        else:
            reason = "the hub can't be reached"
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
        reason = "what answered does not speak as the hub does (a network's login page? see HF_ENDPOINT and HF_TOKEN)"
    return _cached(hub_id, wanted, reason)


def _cached(hub_id: str, wanted: dict, reason: str) -> _Download:
    """What the hub's cache holds of a repository. Raises StoneyError if that is nothing or not all of it."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, IncompleteSnapshotError, LocalEntryNotFoundError

    at = f" at revision {wanted['revision']!r}" if wanted["revision"] else ""
    remedy = "try again with a connection, or give a local file or folder"
    try:
        folder = Path(snapshot_download(**wanted, local_files_only=True))
    except IncompleteSnapshotError:
        raise StoneyError(f"{hub_id}{at}: {reason}, and the cached copy lacks some of its files; {remedy}") from None
    except LocalEntryNotFoundError:
        raise StoneyError(f"{hub_id}{at}: {reason}, and there is no cached copy; {remedy}") from None
    note = f"{hub_id}: {reason}; this is the cached copy of commit {folder.name[:12]}"
    try:
        get_cached_repo_tree(hub_id, repo_type="dataset", revision=folder.name)
    except CachedRepoTreeNotFoundError:
        note += ", and whether it holds all of the files can't be told"
    print(note, file=sys.stderr)
    return _Download(folder, folder.name, [note + "."])


def write_lines(path: str | Path, lines: Iterable[bytes]) -> Path:
    """Write ``lines`` to ``path`` by way of a temporary name, so that a file with its final name is whole."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as stream:
                for line in lines:
                    stream.write(line + b"\n")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise StoneyError(f"{path} can't be written: {plain(error)}; give a path that can") from None
    return path


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> Path:
    """Write rows as JSON lines that ``load_rows`` reads back unchanged. Raises StoneyError if it can't be written."""
    return write_lines(path, (json.dumps(row.to_dict(), ensure_ascii=False).encode() for row in rows))


def write_quarantine(path: str | Path, quarantine: Iterable[Quarantined]) -> Path:
    """Write quarantined rows as JSON lines (source, line, reason, text). Raises StoneyError if it can't be written."""
    fields = ("source", "line", "reason", "text")
    return write_lines(
        path,
        (json.dumps({key: getattr(q, key) for key in fields}, ensure_ascii=False).encode() for q in quarantine),
    )


def _kinds(quarantine: list[Quarantined]) -> Counter:
    return Counter(bad.reason.split(": ")[0] for bad in quarantine)


def describe(rowset: RowSet) -> str:
    """One paragraph: rows, files, what was quarantined and why, and the hash."""
    files = ", ".join(f"{file['path']} {file['rows']:,}" for file in rowset.files[:5])
    if len(rowset.files) > 5:
        files += f" and {len(rowset.files) - 5} more"
    text = f"{len(rowset.rows):,} rows from {rowset.source} ({files}); "
    if rowset.quarantine:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in _kinds(rowset.quarantine).most_common())
        text += f"{len(rowset.quarantine):,} quarantined ({kinds})"
    else:
        text += "none quarantined"
    text += f"; sha256 {rowset.sha256[:12]}."
    return " ".join([text, *rowset.notes])
