"""The lexeme-disjoint split: train, validation and test, and a certificate that nothing leaked.

A held-out row is *unseen* if no training row mentions any of its forms, and *seen* if training rows mention all of
them, in other wordings. The difference between a model's scores on the two is what it memorised.

What counts as a mention. The forms of a row are its ``lexemes`` and its ``lexemes.planted_form``. A row mentions a form
that is among its own forms, or that stands in one of them or in one of its messages, quoted or not, as whole words
after ``text.fold``; in doubt it is a mention: a hyphen separates words here and a possessive 's is dropped, so
``tâlo-like`` and ``tâlo's`` mention (the invented) *tâlo*. A form of several words is mentioned by those words in that
order, and not by one of them: otherwise a particle that many phrases share would chain all phrases together, and no
phrase could be held out. The certificate counts the unseen rows of which a single word does occur in training
(``unseen_rows_sharing_a_word``). Where such a particle is a row's form by itself, every phrase mentions it, so it is
too costly to hold out. System messages are not counted: one is the same for a whole source.

How rows are chosen. Rows with the same prompt move as one unit. Forms and units make a graph:

1. Connected components are held out whole, in an order drawn from the seed, until the unseen rows are as many as asked.
2. If that is not enough, components are cut: a form with those that mostly stand beside it (a stem with its inflected
   forms), then the forms of one unit, are held out, cheapest cuts first. A unit that mentions a held-out form beside others
   can be neither trained on nor tested: it is dropped, and counted.
3. Seen rows are drawn from the units that are left, each only if training still mentions all its forms without it.

Rows without lexemes are never held out. The draw hashes the seed with the prompts and the forms, so it does not
depend on the order of the rows, their ids, or the process.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import chain
from typing import TYPE_CHECKING

from stoney_rl.errors import StoneyError
from stoney_rl.lexemes import is_too_long, planted_form
from stoney_rl.text import fold, normalize

if TYPE_CHECKING:
    from stoney_rl.data import Row

SPLIT_VERSION = 1
MIN_ROWS = 20

# Rows that may be dropped for each row gained, when components are cut. Cuts within one step are taken in drawn order:
# taking the very cheapest first would hold out nothing but the rarest forms.
_DROPS_PER_GAIN = (0.25, 0.5, 1.0, 2.0)
# Bound on the work of cutting, in mentions looked at: forms with more mentions than their share are never held out.
_WORK = 20_000_000


@dataclass
class Split:
    """What ``split_rows`` returns. The lists are in source order; ``seen`` has each validation and test row by id."""

    train: list["Row"]
    validation: list["Row"]
    test: list["Row"]
    dropped: list["Row"]
    seen: dict[str, bool]
    certificate: dict


@dataclass
class _Unit:
    """Rows with the same prompt. ``forms``: of all of them, or empty if one has none (then they are training rows)."""

    key: str
    rows: list[int]
    forms: frozenset[str]
    mentions: frozenset[str]


def mention_key(form: str) -> str:
    """``form`` as the split compares it: folded, words one space apart, hyphens as spaces, without possessive 's."""
    return " ".join(_mention_words(normalize(form)))


_form_key = cache(mention_key)  # one string for a form in however many rows


def row_forms(row: "Row") -> frozenset[str]:
    """The forms that ``row`` is about, as ``mention_key``s: its lexemes, and the form that a planted row asks for."""
    forms = [*row.lexemes, planted_form(row) or ""]
    return frozenset([key for form in forms if not is_too_long(str(form)) and (key := _form_key(str(form)))])


# A word as text.words has it, but for the hyphen.
_WORD = re.compile(r"[^\W\d_]+[\u0300-\u036f]*(?:'?[^\W\d_]+[\u0300-\u036f]*)*")
_BETWEEN_PUNCTUATION = re.compile(r"[\w\u0300-\u036f]+")


# Texts are folded and read in pieces, as white space cuts them: most pieces of a text are those of other texts too.
@lru_cache(maxsize=1 << 15)
def _words_of(piece: str) -> tuple[str, ...]:
    return tuple(word.removesuffix("'s") for word in _WORD.findall(fold(piece)))


@lru_cache(maxsize=1 << 15)
def _without_punctuation(piece: str) -> str:
    return " ".join(_BETWEEN_PUNCTUATION.findall(fold(piece)))


def _mention_words(text: str) -> list[str]:
    """The words of a normalised text, as ``mention_key`` has them."""
    return list(chain.from_iterable(map(_words_of, text.split())))


def _contents(row: "Row") -> list[str]:
    """The messages of ``row``, prompt first."""
    return [normalize(str(message["content"])) for message in [*row.prompt, *row.completion]]


def _prompt_key(row: "Row", contents: list[str]) -> str:
    """The same for prompts that differ only in case, white space and punctuation."""
    turns = zip(row.prompt, contents, strict=False)
    cleaned = [(turn["role"], filter(None, map(_without_punctuation, text.split()))) for turn, text in turns]
    return "\n".join([f"{role} {' '.join(text)}" for role, text in cleaned])


def _draw(seed: int, purpose: str, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{purpose}\0{key}".encode()).digest()


def _union(sets: list[frozenset[str]]) -> frozenset[str]:
    return sets[0].union(*sets[1:]) if len(sets) > 1 else sets[0]


def _units(rows: Sequence["Row"], forms: list[frozenset[str]]) -> list[_Unit]:
    """The units of ``rows``, in order of their first rows. ``forms``: ``row_forms`` of each row."""
    universe = {form: form for form in frozenset().union(*forms)}
    lengths: dict[str, set[int]] = defaultdict(set)  # first word of a form -> the numbers of words of such forms
    for form in universe:
        parts = form.split()
        lengths[parts[0]].add(len(parts))

    def mentioned(text: str) -> list[str]:
        words = _mention_words(text)
        starts = [at for at, word in enumerate(words) if word in lengths]
        candidates = [" ".join(words[at : at + length]) for at in starts for length in lengths[words[at]]]
        return [universe[candidate] for candidate in candidates if candidate in universe]

    mentioned_by_form = cache(mentioned)  # a form can hold another
    by_prompt: dict[str, list[int]] = defaultdict(list)
    mentions: list[frozenset[str]] = []
    for index, row in enumerate(rows):
        contents = _contents(row)
        by_prompt[_prompt_key(row, contents)].append(index)
        found = forms[index].union(*map(mentioned, contents), *map(mentioned_by_form, forms[index]))
        mentions.append(forms[index] if len(found) == len(forms[index]) else found)

    units = []
    for key, members in by_prompt.items():
        own = [forms[index] for index in members]
        units.append(
            _Unit(key, members, _union(own) if all(own) else frozenset(), _union([mentions[at] for at in members]))
        )
    return units


def _components(units: list[_Unit], mentioned_by: dict[str, list[int]]) -> list[frozenset[str]]:
    """The forms of each connected component in which every unit has forms."""
    parent = list(range(len(units)))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    for members in mentioned_by.values():
        for other in members[1:]:
            parent[root(other)] = root(members[0])
    forms: dict[int, set[str]] = defaultdict(set)
    without: set[int] = set()
    for index, unit in enumerate(units):
        forms[root(index)] |= unit.forms
        if not unit.forms:
            without.add(root(index))
    return [frozenset(found) for at, found in forms.items() if at not in without]


def _families(units: list[_Unit], mentioned_by: dict[str, list[int]]) -> list[frozenset[str]]:
    """Each form with those that most of the time are mentioned beside it: a stem with its inflected forms."""
    families = []
    for members in mentioned_by.values():
        beside = Counter(other for index in members for other in units[index].mentions)
        families.append(frozenset(other for other, count in beside.items() if 2 * count > len(mentioned_by[other])))
    return families


class _Assignment:
    """Which unit goes where: ``place[unit]`` is None (still free), "test", "validation", "train" or "dropped"."""

    def __init__(self, units: list[_Unit], seed: int):
        self.units = units
        self.sizes = [len(unit.rows) for unit in units]
        self.own = [unit.forms for unit in units]
        self.seed = seed
        self.place: list[str | None] = [None] * len(units)
        self.mentioned_by: dict[str, list[int]] = defaultdict(list)
        for index, unit in enumerate(units):
            for form in unit.mentions:
                self.mentioned_by[form].append(index)
        self.components = _components(units, self.mentioned_by)
        self.held: dict[str, str] = {}  # form -> the split that it is held out for
        self.held_for: dict[str, set[str]] = defaultdict(set)  # the same, by split

    @cached_property
    def parts(self) -> tuple[list[frozenset[str]], list[frozenset[str]]]:
        """What is held out where whole components do not suffice."""
        return _families(self.units, self.mentioned_by), self.own

    def _size(self, indices: Iterable[int]) -> int:
        return sum(map(self.sizes.__getitem__, indices))

    def _effect(self, forms: frozenset[str], split: str, reusable: set[int]) -> tuple[set[int], set[int]]:
        """(units that become unseen rows of ``split``, units to drop) if ``forms`` were held out too.

        ``reusable``: units that were dropped for this split, and that more held-out forms can turn into unseen rows.
        """
        new = {form for form in forms if form not in self.held}
        touched = set().union(*(self.mentioned_by[form] for form in new))
        movable = [index for index in touched if self.place[index] is None or index in reusable]
        held = self.held_for[split]
        held |= new
        gained = {index for index in movable if self.own[index] and self.own[index] <= held}
        held -= new
        return gained, {index for index in movable if index not in gained and index not in reusable}

    def _cost(self, forms: frozenset[str], split: str, reusable: set[int]) -> tuple[int, int, set[int], set[int]]:
        """(rows gained, rows lost, units gained, units dropped); a dropped row that is gained after all counts as -1."""
        gained, dropped = self._effect(forms, split, reusable)
        return self._size(gained), self._size(dropped) - self._size(gained & reusable), gained, dropped

    def _candidates(self, candidates: Iterable[frozenset[str]], split: str, purpose: str) -> list[frozenset[str]]:
        """``candidates`` that hold no form held out for another split, each once, in drawn order."""
        free = {forms for forms in candidates if forms and all(self.held.get(form, split) == split for form in forms)}
        return sorted(free, key=lambda forms: _draw(self.seed, f"{split} {purpose}", "\n".join(sorted(forms))))

    def hold_out_unseen(self, split: str, wanted: int) -> int:
        """Give ``split`` about ``wanted`` unseen rows; returns how many it got, 0 if no form can be held out."""
        slack = wanted // 10
        got, reusable = 0, set()

        def take(forms: frozenset[str], gained: set[int], dropped: set[int]) -> None:
            nonlocal got
            self.held.update(dict.fromkeys(forms, split))
            self.held_for[split].update(forms)
            for index in gained:
                self.place[index] = split
            for index in dropped:
                self.place[index] = "dropped"
            reusable.difference_update(gained)
            reusable.update(dropped)
            got += self._size(gained)

        smallest: tuple[int, frozenset[str], set[int]] | None = None
        for forms in self._candidates(self.components, split, "components"):
            gained, dropped = self._effect(forms, split, reusable)
            size = self._size(gained)
            if dropped or not size:  # another split has been cut out of it
                continue
            if got + size <= wanted + slack:
                take(forms, gained, dropped)
            elif smallest is None or size < smallest[0]:
                smallest = (size, forms, gained)
            if got >= wanted:
                return got

        for parts in self.parts:
            candidates = self._candidates(parts, split, "cuts")
            most_mentions = max(50, _WORK // max(1, len(candidates)))
            ranked = []
            for position, forms in enumerate(candidates):
                if sum(len(self.mentioned_by[form]) for form in forms) <= most_mentions:
                    size, lost, _, _ = self._cost(forms, split, reusable)
                    rank = next((r for r, most in enumerate(_DROPS_PER_GAIN) if lost <= most * size), None)
                    if size and rank is not None:
                        ranked.append((rank, position, forms))
            for rank, _, forms in sorted(ranked, key=lambda entry: entry[:2]):
                if got >= wanted - slack:
                    return got
                size, lost, gained, dropped = self._cost(forms, split, reusable)
                if 0 < size <= wanted + slack - got and lost <= _DROPS_PER_GAIN[rank] * size:
                    take(forms, gained, dropped)
        if got == 0 and smallest and 4 * smallest[0] <= self._size(range(len(self.units))):
            take(smallest[1], smallest[2], set())
        return got

    def hold_out_seen(self, wanted: dict[str, int]) -> dict[str, int]:
        """Give each split up to ``wanted`` rows whose forms training still mentions; everything else is training."""
        in_training = Counter(
            form for index, unit in enumerate(self.units) if self.place[index] is None for form in unit.mentions
        )
        free = [index for index, unit in enumerate(self.units) if self.place[index] is None and unit.forms]
        free.sort(key=lambda index: _draw(self.seed, "seen", self.units[index].key))
        got = dict.fromkeys(wanted, 0)
        for index in free:
            unit = self.units[index]
            # The split that is furthest from what it wants.
            split = min(wanted, key=lambda name: got[name] / wanted[name] if wanted[name] else 1.0)
            if got[split] >= wanted[split]:
                break
            if all(in_training[form] >= 2 for form in unit.mentions):
                in_training.subtract(unit.mentions)
                self.place[index] = f"{split} seen"
                got[split] += len(unit.rows)
        return got


def _check(rows: Sequence["Row"], test: float, validation: float, seen: float) -> None:
    if not (0 < test < 1 and 0 <= validation < 1 and 0 <= seen < 1):
        raise StoneyError(
            f"split: test_fraction {test}, validation_fraction {validation}, seen_fraction {seen}: "
            "each must lie between 0 and 1 (validation and seen may be 0)"
        )
    held_out = (test + validation) * (1 + seen / test)
    if held_out > 0.8:
        raise StoneyError(
            f"split: test_fraction {test}, validation_fraction {validation} and seen_fraction {seen} hold out "
            f"{held_out:.0%} of the rows, unseen and seen ones; give smaller fractions, 80% together at most"
        )
    if len(rows) < MIN_ROWS:
        raise StoneyError(f"split: {len(rows)} rows are too few for a split by lexeme; give at least {MIN_ROWS}")
    twice = [row_id for row_id, count in Counter(row.id for row in rows).items() if count > 1]
    if twice:
        raise StoneyError(
            f"split: {len(twice)} row ids occur more than once, such as {min(twice)!r}; ids must be unique"
        )
    if not any(map(row_forms, rows)):
        raise StoneyError(
            'split: no row names a form of the language; quote the forms in the rows, or give each row its "lexemes"'
        )


def split_rows(
    rows: Sequence["Row"],
    *,
    seed: int = 0,
    test_fraction: float = 0.1,
    validation_fraction: float = 0.05,
    seen_fraction: float | None = None,
    data_sha256: str | None = None,
) -> Split:
    """Split ``rows`` by lexeme; see the module's docstring for how.

    test_fraction, validation_fraction: unseen rows of each split, as a share of all rows. seen_fraction: seen test
    rows, as a share of all rows (default: ``test_fraction``); validation gets seen rows in the same proportion. Unseen
    rows come within 10% of their share, as far as the lexemes allow; seen rows are as many as there are:
    ``certificate["requested"]`` and ``["counts"]`` show both. data_sha256: ``RowSet.sha256``, for the certificate.

    The certificate is JSON-able and holds no row text. Raises StoneyError for fewer than 20 rows, impossible fractions,
    repeated ids, rows without lexemes, and data in which no lexeme can be held out.
    """
    seen_fraction = test_fraction if seen_fraction is None else seen_fraction
    _check(rows, test_fraction, validation_fraction, seen_fraction)
    requested = {
        "test": {"unseen": max(1, round(test_fraction * len(rows))), "seen": round(seen_fraction * len(rows))},
        "validation": {
            "unseen": round(validation_fraction * len(rows)),
            "seen": round(validation_fraction * seen_fraction / test_fraction * len(rows)),
        },
    }
    forms = {row.id: row_forms(row) for row in rows}
    units = _units(rows, list(forms.values()))
    assignment = _Assignment(units, seed)
    for name, wanted in requested.items():
        got = assignment.hold_out_unseen(name, wanted["unseen"]) if wanted["unseen"] else 0
        if wanted["unseen"] and not got:
            raise StoneyError(
                f"split: no lexeme of these {len(rows)} rows can be held out for {name} "
                f"({wanted['unseen']} rows wanted): too many rows mention each one; give more rows or another fraction"
            )
    assignment.hold_out_seen({name: wanted["seen"] for name, wanted in requested.items()})

    place = {
        index: where or "train" for unit, where in zip(units, assignment.place, strict=True) for index in unit.rows
    }
    parts: dict[str, list[Row]] = {"train": [], "validation": [], "test": [], "dropped": []}
    seen: dict[str, bool] = {}
    for index, row in enumerate(rows):
        name, _, kind = place[index].partition(" ")
        parts[name].append(row)
        if name in ("validation", "test"):
            seen[row.id] = kind == "seen"
    if not parts["train"]:
        raise StoneyError(
            f"split: nothing is left to train on of {len(rows)} rows; give smaller fractions or more rows"
        )

    held_out = {name: [row for row in parts[name] if not seen[row.id]] for name in ("validation", "test")}
    certificate = {
        "split_version": SPLIT_VERSION,
        "seed": seed,
        "test_fraction": test_fraction,
        "validation_fraction": validation_fraction,
        "seen_fraction": seen_fraction,
        "data_sha256": data_sha256,
        "rows": len(rows),
        "requested": requested,
        "counts": {
            "train": len(parts["train"]),
            **{
                name: {"unseen": len(held_out[name]), "seen": len(parts[name]) - len(held_out[name])}
                for name in ("validation", "test")
            },
            "dropped": len(parts["dropped"]),
            "without_lexemes": sum(not found for found in forms.values()),
        },
        "lexemes": {
            name: len(frozenset().union(*(forms[row.id] for row in part)))
            for name, part in (
                ("all", rows),
                ("train", parts["train"]),
                ("validation_unseen", held_out["validation"]),
                ("test_unseen", held_out["test"]),
            )
        },
        **certify(parts["train"], parts["validation"], parts["test"], seen),
        "ids_sha256": {
            name: hashlib.sha256("\n".join(sorted(row.id for row in part)).encode()).hexdigest()
            for name, part in parts.items()
        },
    }
    return Split(parts["train"], parts["validation"], parts["test"], parts["dropped"], seen, certificate)


# The certificate's check: it reads the rows again, by other means than the assignment (a search in plain strings).


_STRAY_MARK = re.compile(r"(^|[^\w\u0300-\u036f]|[\d_])[\u0300-\u036f]+")
_NO_LETTER = re.compile(r"[^\w'\u0300-\u036f]|[\d_]|''+")


@lru_cache(maxsize=1 << 15)
def _plain_piece(piece: str) -> str:
    parts = _NO_LETTER.sub(" ", _STRAY_MARK.sub(r"\1 ", fold(piece))).split()
    return " ".join([word for part in parts if (word := part.strip("'").removesuffix("'s"))])


def _plain(text: str) -> str:
    """The words of a normalised text with a space around each, in the wide reading of the module's docstring."""
    return f" {' '.join(filter(None, map(_plain_piece, text.split())))} "


@cache
def _plain_form(form: str) -> str:
    return _plain(normalize(form))


def _plain_forms(row: "Row") -> list[str]:
    forms = [_plain_form(str(form)) for form in [*row.lexemes, planted_form(row) or ""]]
    return [form for form in forms if form.strip()]


class _Reading:
    """Rows read as plain strings: their ``prompts``, and of ``forms`` those that they mention and the ``words``."""

    def __init__(self, rows: Iterable["Row"], forms: Iterable[list[str]] = ()):
        self.prompts: set[str] = set()
        self.words: set[str] = set()
        self.mentioned: set[str] = set()
        wanted = set().union(*forms)
        common = Counter(word for form in wanted for word in form.split())
        sought: dict[str, list[str]] = defaultdict(list)  # by the word that fewest forms have; what is found goes
        for form in wanted:
            sought[min(form.split(), key=common.get)].append(form)
        for row in rows:
            contents = _contents(row)
            self.prompts.add(_prompt_key(row, contents))
            text = "|".join([*map(_plain, contents), *_plain_forms(row)])
            words = common.keys() & text.split()
            self.words |= words
            for word in words & sought.keys():
                found = [form for form in sought[word] if form in text]
                if found:
                    self.mentioned.update(found)
                    sought[word] = [form for form in sought[word] if form not in self.mentioned]


def certify(
    train: Sequence["Row"], validation: Sequence["Row"], test: Sequence["Row"], seen: dict[str, bool]
) -> dict[str, dict]:
    """Check a split by reading its rows again; returns ``overlaps`` (all zero) and ``unseen_rows_sharing_a_word``.

    The overlaps: unseen rows of test and of validation with a form that training mentions; unseen test rows with a form
    that validation mentions; seen rows with a form that training does not mention; ids and prompts that two splits
    have; held-out rows without a flag or without a form. Raises StoneyError if one is not zero.
    """
    parts = (train, validation, test)
    unseen = {
        name: [_plain_forms(row) for row in part if seen.get(row.id) is False]
        for name, part in (("validation", validation), ("test", test))
    }
    of_seen = [_plain_forms(row) for row in [*validation, *test] if seen.get(row.id)]
    training = _Reading(train, [*unseen["validation"], *unseen["test"], *of_seen])
    validating = _Reading(validation, unseen["test"])

    def count_leaks(rows: list[list[str]], where: _Reading) -> int:
        return sum(not where.mentioned.isdisjoint(found) for found in rows)

    def count_shared(sets: list[set[str]]) -> int:
        return sum(map(len, sets)) - len(set().union(*sets))

    overlaps = {
        "test_unseen_in_train": count_leaks(unseen["test"], training),
        "validation_unseen_in_train": count_leaks(unseen["validation"], training),
        "test_unseen_in_validation": count_leaks(unseen["test"], validating),
        "seen_not_in_train": sum(not training.mentioned.issuperset(found) for found in of_seen),
        "ids_in_two_splits": count_shared([{row.id for row in part} for part in parts]),
        "prompts_in_two_splits": count_shared([training.prompts, validating.prompts, _Reading(test).prompts]),
        "rows_without_flag_or_form": sum(row.id not in seen or not _plain_forms(row) for row in [*validation, *test]),
    }
    if any(overlaps.values()):
        found = ", ".join(f"{name} {count}" for name, count in overlaps.items() if count)
        raise StoneyError(f"split: not disjoint: {found} (all must be 0); split the rows again with split_rows")
    return {
        "overlaps": overlaps,
        "unseen_rows_sharing_a_word": {
            name: sum(any(not training.words.isdisjoint(form.split()) for form in found) for found in rows)
            for name, rows in unseen.items()
        },
    }
