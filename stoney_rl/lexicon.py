"""The lexicon of a dataset: what its rows say about each form of the language (``glosses``), form by form.

rows = lexemes.annotate(load_rows("rows.jsonl").rows)
entries = build_lexicon(rows)                # form, glosses, parts of speech, count, sources
write_lexicon("lexicon.jsonl", entries)
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stoney_rl.data import Row, write_lines
from stoney_rl.errors import StoneyError
from stoney_rl.glosses import facts_by_key, fold
from stoney_rl.text import normalize

LEXICON_FILE = "lexicon.jsonl"  # in a prepared directory, and in an evaluation's


@dataclass(frozen=True, slots=True)
class LexiconEntry:
    """One form. ``glosses`` and ``pos`` are (text, number of rows that say so), most frequent first.

    form: its most frequent spelling. count: rows that mention it. sources: ``row.source`` of all of those, in order.
    stem, segmentation: None unless a lexicon that was read names them.
    """

    form: str
    glosses: tuple[tuple[str, int], ...] = ()
    pos: tuple[tuple[str, int], ...] = ()
    count: int = 0
    sources: tuple[str, ...] = ()
    stem: str | None = None
    segmentation: str | None = None


def _ranked(counts: Counter[str]) -> list[tuple[str, int]]:
    """Most frequent first; of equals, the one with fewer capitals, then the alphabet."""
    return sorted(counts.items(), key=lambda item: (-item[1], sum(map(str.isupper, item[0])), item[0]))


class _Draft:
    __slots__ = ("glosses", "pos", "sources", "spellings")

    def __init__(self) -> None:
        self.spellings: Counter[str] = Counter()
        self.glosses: dict[str, Counter[str]] = {}
        self.pos: Counter[str] = Counter()
        self.sources: list[str] = []

    def entry(self) -> LexiconEntry:
        totals = Counter()
        for spellings in self.glosses.values():
            totals[_ranked(spellings)[0][0]] += spellings.total()
        return LexiconEntry(
            form=_ranked(self.spellings)[0][0],
            glosses=tuple(_ranked(totals)),
            pos=tuple(_ranked(self.pos)),
            count=len(self.sources),
            sources=tuple(self.sources),
        )


def build_lexicon(rows: Sequence[Row]) -> list[LexiconEntry]:
    """The forms that annotated ``rows`` mention, sorted by ``text.fold`` of the form.

    Spellings that fold alike are one form; glosses that fold alike are one gloss. A row counts once for each.
    """
    drafts: dict[str, _Draft] = {}
    for row in rows:
        forms, facts = facts_by_key(row)
        for key, form in forms.items():
            draft = drafts.setdefault(key, _Draft())
            draft.spellings[form] += 1
            draft.sources.append(row.source)
        for (key, gloss_key), gloss in facts.glosses.items():
            drafts[key].glosses.setdefault(gloss_key, Counter())[gloss] += 1
        for key, pos in facts.pos:
            drafts[key].pos[pos] += 1
    return [drafts[key].entry() for key in sorted(drafts)]


def write_lexicon(path: str | Path, entries: Iterable[LexiconEntry]) -> Path:
    """Write entries as JSON lines that ``read_lexicon`` reads back unchanged. Raises StoneyError if it can't.

    Keys: form, gloss and pos (the most frequent, or null), count, glosses, parts_of_speech, sources; also stem and
    segmentation where they are known.
    """
    return write_lines(path, (json.dumps(_to_dict(entry), ensure_ascii=False).encode() for entry in entries))


def _to_dict(entry: LexiconEntry) -> dict:
    value = {
        "form": entry.form,
        "gloss": entry.glosses[0][0] if entry.glosses else None,
        "pos": entry.pos[0][0] if entry.pos else None,
        "count": entry.count,
        "glosses": [{"gloss": gloss, "rows": rows} for gloss, rows in entry.glosses],
        "parts_of_speech": [{"pos": pos, "rows": rows} for pos, rows in entry.pos],
        "sources": list(entry.sources),
    }
    known = {"stem": entry.stem, "segmentation": entry.segmentation}
    return value | {key: text for key, text in known.items() if text is not None}


def lexicon_path(path: str | Path) -> Path:
    """The lexicon file that ``path`` is, or that lies in the directory ``path``."""
    path = Path(path)
    return path / LEXICON_FILE if path.is_dir() else path


def read_lexicon(path: str | Path) -> list[LexiconEntry]:
    """The entries of a lexicon file, in its order: one that ``write_lexicon`` wrote, or any JSON lines with ``form``.

    Only ``form`` is needed; ``gloss``, ``pos`` and the other keys are read where they are given, and keys that are not
    known are passed over. Lines with the same form (by ``text.fold``) become one entry. Raises StoneyError, with the
    line, for what is no such line, and for a file without entries.
    """
    merged: dict[str, LexiconEntry] = {}
    try:
        with Path(path).open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    entry = _from_line(line, f"{path} line {number}")
                    key = fold(entry.form)
                    merged[key] = _merge(merged[key], entry) if key in merged else entry
    except OSError as error:
        raise StoneyError(f"{path} can't be read: {error.strerror}; expected a lexicon in JSON lines") from None
    except UnicodeDecodeError:
        raise StoneyError(f"{path} is not UTF-8 text; expected a lexicon in JSON lines") from None
    if not merged:
        raise StoneyError(f'{path} has no entry; expected JSON lines such as {{"form": "tâlo", "gloss": "to gather"}}')
    return list(merged.values())


def _from_line(line: str, where: str) -> LexiconEntry:
    example = 'expected {"form": ..., "gloss": ...} with texts'
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise StoneyError(f"{where} is not JSON; {example}") from None
    if not isinstance(value, dict):
        raise StoneyError(f"{where} is not an object; {example}")

    def text(key: str) -> str | None:
        found = value.get(key)
        if found is not None and not isinstance(found, str):
            raise StoneyError(f"{where}: {key} is not a text; {example}")
        return normalize(found) or None if found is not None else None

    def counted(key: str, name: str, first: str | None) -> tuple[tuple[str, int], ...]:
        found = value.get(key)
        if found is None:
            return ((first, 0),) if first else ()
        if not isinstance(found, list) or not all(
            isinstance(one, dict) and isinstance(one.get(name), str) and _is_count(one.get("rows")) for one in found
        ):
            raise StoneyError(
                f'{where}: {key} is not a list of {{"{name}": ..., "rows": ...}}; write it so, or leave it out'
            )
        return tuple((normalize(one[name]), one["rows"]) for one in found)

    form = text("form")
    if form is None:
        raise StoneyError(f"{where} has no form; {example}")
    count, sources = value.get("count"), value.get("sources")
    if count is not None and not _is_count(count):
        raise StoneyError(f"{where}: count is not a number of rows; write one, or leave it out")
    if sources is not None and not (isinstance(sources, list) and all(isinstance(one, str) for one in sources)):
        raise StoneyError(f"{where}: sources is not a list of texts; write one, or leave it out")
    return LexiconEntry(
        form=form,
        glosses=counted("glosses", "gloss", text("gloss")),
        pos=counted("parts_of_speech", "pos", text("pos")),
        count=count or 0,
        sources=tuple(sources or ()),
        stem=text("stem"),
        segmentation=text("segmentation"),
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _merge(first: LexiconEntry, second: LexiconEntry) -> LexiconEntry:
    """Two lines about one form: what each says, the first line first; rows and sources are those of both."""

    def union(a: tuple[tuple[str, int], ...], b: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
        total: dict[str, tuple[str, int]] = {}
        for text, rows in (*a, *b):
            spelling, before = total.get(fold(text), (text, 0))
            total[fold(text)] = (spelling, before + rows)
        return tuple(sorted(total.values(), key=lambda one: -one[1]))

    return LexiconEntry(
        form=first.form,
        glosses=union(first.glosses, second.glosses),
        pos=union(first.pos, second.pos),
        count=first.count + second.count,
        sources=tuple(dict.fromkeys((*first.sources, *second.sources))),
        stem=first.stem or second.stem,
        segmentation=first.segmentation or second.segmentation,
    )
