"""What is known about the language: attested words, and how forms are built. It comes from data, never from code."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from stoney_rl import prepared
from stoney_rl.errors import StoneyError
from stoney_rl.lexemes import is_listed_english
from stoney_rl.lexicon import LexiconEntry, lexicon_path, read_lexicon
from stoney_rl.text import fold, words

_BOUNDARY = re.compile("[-~]")  # between morphs, and between a reduplicated part and its stem


@dataclass(frozen=True)
class Knowledge:
    """``attested``: every word of every form, folded. ``forms``: the forms, in the lexicon's order.

    ``morphs``: the pieces that forms are built of, folded: a text that explains a form names them. ``segments``: folded form -> its morphs in order, for the forms whose segmentation the lexicon gives.
    ``stems``: folded form -> its stem, likewise.
    """

    attested: frozenset[str]
    forms: tuple[str, ...] = ()
    morphs: frozenset[str] = frozenset()
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
        morphs = frozenset(morph for parts in segments.values() for morph in parts)
        return cls(frozenset(attested), tuple(forms), morphs, segments, stems)

    @property
    def sha256(self) -> str:
        """Tells this knowledge from any other."""
        known = [sorted(self.attested), self.forms, sorted(self.segments.items()), sorted(self.stems.items())]
        return hashlib.sha256(repr(known).encode()).hexdigest()

    def has(self, word: str) -> bool:
        """Whether a folded word is one of the language, or a morph of one."""
        return word in self.attested or word in self.morphs


def load_knowledge(path: str | Path) -> Knowledge:
    """The knowledge in a prepared directory, or in a lexicon file. Raises ``StoneyError`` if there is none."""
    path = Path(path)
    if path.is_dir() and not prepared.is_prepared(path):
        raise StoneyError(
            f"{path}: no prepared dataset directory; make one with: python inspect_hf_dataset.py --output_dir {path}"
        )
    return Knowledge.of(read_lexicon(lexicon_path(path)))


@lru_cache(maxsize=1 << 18)
def is_of_the_language(word: str) -> bool:
    """Whether a folded word looks like one of the language: it has a letter that English lacks, or is not English.

    A word that both languages spell alike counts as English: it is neither a hit nor an invention.
    """
    return not is_listed_english(word)


@lru_cache(maxsize=1 << 12)  # more texts than a batch has: each term asks about each of them
def folded_words(text: str) -> tuple[str, ...]:
    """The words of ``text``, folded, in order."""
    return tuple(words(fold(text)))


@lru_cache(maxsize=1 << 12)
def language_words(text: str) -> tuple[str, ...]:
    """The words of ``text`` that look like the language's, folded, in order, each as often as it stands there."""
    return tuple(word for word in folded_words(text) if is_of_the_language(word))
