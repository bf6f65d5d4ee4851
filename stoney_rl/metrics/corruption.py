"""Gold answers broken in graded steps: the input of ``validation.validate``, whose errors are known because they were made.

Every unit of a kind (a letter, an affix, ...) gets a replacement and one random number from the seed. At ``level`` the units whose
number is below it are replaced: about that share of them, none at 0, all at 1; a higher level breaks whatever a lower one broke.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from stoney_rl.errors import StoneyError
from stoney_rl.metrics.error_rates import letters
from stoney_rl.rewards.knowledge import Knowledge
from stoney_rl.text import fold, normalize, words

# kind -> what happens to each unit.
KINDS = {
    "letters": "a letter becomes another letter of the answers and keeps its marks",
    "diacritics": "a marked letter loses its marks",
    "affixes": "an affix becomes another affix from the same side of the stem",
    "words": "a word becomes another word of the answers",
    "answers": "the answer becomes another row's answer",
}

# A piece of text, and what it is broken into; None for what lies between the units.
Piece = tuple[str, str | None]


@dataclass(frozen=True)
class Corruption:
    """The answers cut into pieces: for each row (text, replacement or None, draw) in order."""

    kind: str
    rows: tuple[tuple[tuple[str, str | None, float], ...], ...]

    @property
    def units(self) -> int:
        """How many letters, affixes, ... there are to break."""
        return sum(broken is not None for row in self.rows for _, broken, _ in row)

    def at(self, level: float) -> list[str]:
        """The answers with about the share ``level`` of the units broken."""
        return [
            normalize("".join(text if broken is None or draw >= level else broken for text, broken, draw in row))
            for row in self.rows
        ]


def corrupt(references: Sequence[str], kind: str, *, seed: int, knowledge: Knowledge | None = None) -> Corruption:
    """``references`` ready to be broken; affixes are those that ``knowledge`` names, so without it there are none.

    Raises StoneyError for an unknown kind.
    """
    if kind not in KINDS:
        raise StoneyError(f"corruption {kind!r}: expected one of {', '.join(KINDS)}")
    rng = random.Random(f"{kind} {seed}")
    texts = [normalize(text) for text in references]
    pieces = _PIECES[kind](texts, knowledge or Knowledge(frozenset()), rng)
    return Corruption(kind, tuple(tuple((text, broken, rng.random()) for text, broken in row) for row in pieces))


def _letters(texts: Sequence[str], _: Knowledge, rng: random.Random) -> Iterator[list[Piece]]:
    alphabet = sorted({base.lower() for text in texts for base, _ in letters(text) if base.isalpha()})
    for text in texts:
        row: list[Piece] = []
        for base, marks in letters(text):
            other = _other(alphabet, base, rng) if base.isalpha() else None
            if other is not None:
                other = (other.upper() if base.isupper() else other) + marks
            row.append((base + marks, other))
        yield row


def _diacritics(texts: Sequence[str], _: Knowledge, rng: random.Random) -> Iterator[list[Piece]]:
    for text in texts:
        yield [(base + marks, base if marks else None) for base, marks in letters(text)]


def _words(texts: Sequence[str], _: Knowledge, rng: random.Random) -> Iterator[list[Piece]]:
    pool = [word for text in texts for word in words(text)]
    for text in texts:
        yield _by_word(text, lambda word: [(word, _other(pool, word, rng))])


def _affixes(texts: Sequence[str], knowledge: Knowledge, rng: random.Random) -> Iterator[list[Piece]]:
    sides = {key: _sides(morphs, knowledge.stems[key]) for key, morphs in knowledge.segments.items()}
    inventory = {
        side: sorted(
            {m for key, ms in knowledge.segments.items() for m, s in zip(ms, sides[key], strict=True) if s == side}
        )
        for side in ("before", "after")
    }

    def morphs_of(word: str) -> list[Piece]:
        morphs, row = knowledge.segments.get(fold(word), ()), []
        if sum(map(len, morphs)) != len(word):
            return [(word, None)]
        for morph, side in zip(morphs, sides[fold(word)], strict=True):
            # Cut from the word, not copied from the lexicon, so that its capitals stay.
            text, word = word[: len(morph)], word[len(morph) :]
            row.append((text, (_other(inventory[side], morph, rng) or "") if side else None))
        return row

    for text in texts:
        yield _by_word(text, morphs_of)


def _sides(morphs: Sequence[str], stem: str) -> list[str | None]:
    """For each morph the side of the stem that it is on, None for the stem; of a reduplicated stem, the last is the stem."""
    if stem not in morphs:
        return [None] * len(morphs)
    at = len(morphs) - 1 - list(morphs)[::-1].index(stem)
    return ["before" if index < at else "after" if index > at else None for index in range(len(morphs))]


def _answers(texts: Sequence[str], _: Knowledge, rng: random.Random) -> Iterator[list[Piece]]:
    for text in texts:
        yield [(text, _other(texts, text, rng))]


_PIECES: dict[str, Callable[[Sequence[str], Knowledge, random.Random], Iterator[list[Piece]]]] = {
    "letters": _letters,
    "diacritics": _diacritics,
    "affixes": _affixes,
    "words": _words,
    "answers": _answers,
}


def _by_word(text: str, cut: Callable[[str], list[Piece]]) -> list[Piece]:
    """``text`` with each word cut by ``cut`` and what lies between the words as it is."""
    row, start = [], 0
    for word in words(text):
        at = text.index(word, start)
        row += [(text[start:at], None), *cut(word)]
        start = at + len(word)
    return [*row, (text[start:], None)]


def _other(pool: Sequence[str], one: str, rng: random.Random) -> str | None:
    """A random entry of ``pool`` that is not ``one`` when folded; None if there is none."""
    for _ in range(20):
        found = rng.choice(pool)
        if fold(found) != fold(one):
            return found
    others = [entry for entry in pool if fold(entry) != fold(one)]
    return rng.choice(others) if others else None
