"""What is known about the language: attested words, and how forms are built. It comes from data, never from code."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from stoney_rl import prepared
from stoney_rl.errors import StoneyError
from stoney_rl.lexemes import is_listed_english
from stoney_rl.lexicon import LexiconEntry, read_lexicon
from stoney_rl.text import fold, words

LEXICON_FILE = "lexicon.jsonl"
_BOUNDARY = re.compile("[-~]")  # between morphs, and between a reduplicated part and its stem


@dataclass(frozen=True)
class Knowledge:
    """``attested``: every word of every form, folded. ``forms``: the forms, in the lexicon's order.

    ``segments``: folded form -> its morphs in order, for the forms whose segmentation the lexicon gives.
    ``stems``: folded form -> its stem, likewise.
    """

    attested: frozenset[str]
    forms: tuple[str, ...] = ()
    segments: dict[str, tuple[str, ...]] = field(default_factory=dict)
    stems: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Iterable[LexiconEntry]) -> "Knowledge":
        """What the entries of a lexicon say."""
        attested, forms, segments, stems = set(), [], {}, {}
        for entry in entries:
            key = fold(entry.form)
            forms.append(entry.form)
            attested.update(words(key))
            if entry.segmentation and entry.stem:
                segments[key] = tuple(fold(morph) for morph in _BOUNDARY.split(entry.segmentation))
                stems[key] = fold(entry.stem)
        return cls(frozenset(attested), tuple(forms), segments, stems)


def load_knowledge(path: str | Path) -> Knowledge:
    """The knowledge in a prepared directory, or in a lexicon file. Raises ``StoneyError`` if there is none."""
    path = Path(path)
    if path.is_dir():
        if not prepared.is_prepared(path):
            raise StoneyError(
                f"{path}: no prepared dataset directory; make one with: python inspect_hf_dataset.py --output_dir {path}"
            )
        path = path / LEXICON_FILE
    return Knowledge.of(read_lexicon(path))


@lru_cache(maxsize=1 << 18)
def is_of_the_language(word: str) -> bool:
    """Whether a folded word looks like one of the language: it has a letter that English lacks, or is not English.

    A word that both languages spell alike counts as English: it is neither a hit nor an invention.
    """
    return not is_listed_english(word)


def language_words(text: str) -> list[str]:
    """The words of ``text`` that look like the language's, folded, in order, each as often as it stands there."""
    return [word for word in words(fold(text)) if is_of_the_language(word)]
