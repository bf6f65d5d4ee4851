"""What kind of miss is it? Each answer that lacks a form it was asked for gets exactly one class.

A row is a miss if its answer lacks one of the forms asked for (``lexemes.contains_form``, as form accuracy counts). Of a
row that asks for several, each missing form is compared, and the first class below that fits one of them is the row's.

An answer's *attempts* are its words that look like the language's (``knowledge.language_words``), are not of the question
and are not of a wanted form that is there; if some of them are quoted or hold a letter outside ASCII, only those, so that
an unlisted name in an English sentence is no attempt. In order of precedence, with examples of the planted language
(invented words; the form asked for is tâloṯel, 'they gather', of the stem tâlo):

    empty                no letter in the answer
    truncated            cut at the token limit inside the form: the last word is its beginning            ... "tâloṯ
    diacritic only       same base letters, other marks                                                    taloṯel
    look-alike letter    the same but for letters of another code point and the same shape (UTS #39)       tâlоṯel, Cyrillic о
    affix                the stem as it should be, an affix wrong, missing or too many                     tâloẖov, tâlo
    stem                 the affixes as they should be, the stem wrong or missing                          mîvaṯel, ṯel
    other attested form  every attempt is a word of the lexicon, the question or the reference             mîvaẖov
    invented form        some attempt is attested nowhere                                                  zûgefe
    truncated            no attempt before the token limit
    refusal              no attempt, and the answer says that it can't or does not know                    I don't know.
    incomplete           no attempt, but another of the forms asked for is there
    (the classes affix to invented form once more, for an answer that only repeats words of the question)
    English only         nothing of the language                                                           It means many people.

Affix and stem need the segmentation of the wanted form, which a lexicon may not give: without one such a miss is another
attested or an invented form. Affixes are compared without their marks (the planted liẖ- and lîẖ- are one prefix), and a
reduplicated part is right if it copies the beginning of the stem that was given. What is English is decided by a word
list: a name or a typing mistake of an answer without quotes counts as an attempt.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from stoney_rl import terminal
from stoney_rl.errors import StoneyError
from stoney_rl.inspection.orthography import _shapes, _strip_marks
from stoney_rl.lexemes import contains_form, quoted_forms
from stoney_rl.lexicon import LexiconEntry
from stoney_rl.metrics.retrieval import question_of
from stoney_rl.rewards.knowledge import Knowledge, folded_words, is_of_the_language, language_words
from stoney_rl.text import fold, normalize, words

HIT, MISS, NO_FORM, UNSCORED = "hit", "miss", "no form asked", "unscored"

# Class -> what a person reads; the order is that of every listing.
CLASSES = {
    "diacritic only": "the right letters with other marks",
    "look-alike letter": "a letter of another code point that looks the same",
    "affix": "the right stem; an affix is wrong, missing or too many",
    "stem": "the right affixes; the stem is wrong or missing",
    "other attested form": "words of the language, but not the one asked for",
    "invented form": "a word that neither the lexicon nor the row attests",
    "incomplete": "another of the forms asked for is there, nothing stands for this one",
    "English only": "nothing of the language",
    "refusal": "the answer says that it can't or does not know",
    "truncated": "cut at the token limit before the form was complete",
    "empty": "no letter at all",
}
FORM_WANTED, MEANING_ASKED, OTHER_KIND, UNKNOWN = "form wanted", "meaning asked", "other", "unknown"
KIND_KEYS = ("category", "question_type")
POS_KEYS = ("pos", "part_of_speech")

SHORT = 3  # words: so short an answer is the form, whatever language its spelling looks like
MIN_STEM = 3  # letters: a shorter stem stands in many words by chance
MIN_AFFIXES = 2  # letters of all affixes together, likewise
# Edits per letter up to which an attested form counts as near; one edit is always near.
NEAR = 1 / 3

_MARK = "\u0300-\u036f"
# As ``text.words``, but with digits, which may stand for letters: tâl0.
_TOKEN = re.compile(f"[^\\W_][{_MARK}]*(?:['\\-]?[^\\W_][{_MARK}]*)*")
_REFUSAL = re.compile(
    r"\b(?:(?:i'm|i am) (?:\w+ )?sorry|apologi[sz]e|(?:can(?:not|'t| not)|could(?: not|n't)|unable to|not able to) (?:\w+ ){0,2}"
    r"(?:answer|provide|translate|help|give|tell|say|find|determine|assist)"
    r"|(?:do not|don't|does not|doesn't) (?:\w+ ){0,2}(?:know|have)|not (?:sure|certain|familiar|aware)|as an ai"
    r"|no (?:information|data|knowledge|record|answer))\b",
    re.IGNORECASE,
)
# A question for a meaning, not one that gives the meaning and asks for something else.
_MEANING = re.compile(
    r"\b(?:(?:do|does|did|would|could|might)\b[^.?!]*\bmean|meanings? of|meant by|translat\w+|defin(?:e|ition of)|in english)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Attested:
    """The lexicon as errors are looked up in it.

    ``spelling``: folded form -> form, the form in most rows first, then the alphabet. ``pos``: folded form -> its most
    frequent part of speech, where one is known.
    """

    knowledge: Knowledge
    spelling: dict[str, str]
    pos: dict[str, str]
    _found: dict[str, tuple[str, int] | None] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, entries: Sequence[LexiconEntry]) -> "Attested":
        """The entries of a lexicon (``lexicon.read_lexicon``). Raises ``StoneyError`` if there is none."""
        if not entries:
            raise StoneyError("error classes: the lexicon is empty, so that every form would count as invented")
        ranked = sorted(entries, key=lambda entry: (-entry.count, fold(entry.form)))
        return cls(
            Knowledge.of(entries),
            {fold(entry.form): entry.form for entry in ranked},
            {fold(entry.form): entry.pos[0][0] for entry in ranked if entry.pos},
        )

    def nearest(self, word: str) -> tuple[str, int] | None:
        """(form, edits) of the attested form with the fewest edits to the folded ``word``; None if none is near.

        Edits are letters inserted, deleted or replaced (Levenshtein), a letter with its marks being one where Unicode
        has it composed. Near are up to ``NEAR`` edits for each letter of ``word``, at least one. Of equals, the form in
        more rows, then the alphabet.
        """
        if word not in self._found:
            from rapidfuzz import process
            from rapidfuzz.distance import Levenshtein

            cap = max(1, int(NEAR * len(word)))
            # Of equals extractOne keeps the first, which is the one in most rows.
            best = process.extractOne(word, self.spelling.keys(), scorer=Levenshtein.distance, score_cutoff=cap)
            self._found[word] = (self.spelling[best[0]], int(best[1])) if best else None
        return self._found[word]


def classify(rows: Sequence[dict], attested: Attested, *, metadata: Mapping[str, Mapping] | None = None) -> list[dict]:
    """The error of each prediction row (``predictions.record``), in order.

    Each is {"id", "status" (hit, miss, no form asked, unscored: there is no prediction), "class" (of ``CLASSES``; None
    unless a miss), "wanted" (the missing form that the class is about), "given" (what stands for it in the answer, if
    anything; both folded), "nearest" ([{"given", "form", "edits"}], one for each invented word that has an attested neighbour),
    "seen" (seen, unseen or unknown), "pos", "kind"}. ``metadata``: row id -> the row's metadata; a part of speech or a
    category that it names (``POS_KEYS``, ``KIND_KEYS``) comes before what the lexicon says or the question suggests.
    Raises ``StoneyError`` for rows that lack a field.
    """
    metadata = metadata or {}
    return [_error(row, attested, metadata.get(row.get("id"), {}), index) for index, row in enumerate(rows)]


def counts(errors: Sequence[dict]) -> dict:
    """How often each class occurs, in all and by group.

    Returns {"rows", "asked" (hits + misses), "hits", "misses", "no_form", "unscored", "classes": {class: misses}, "by":
    {"seen" | "pos" | "kind": {value: {"asked", "hits", "misses", "no_form", "unscored", "classes"}}}}.
    """
    return {
        "rows": len(errors),
        **_tally(errors),
        "by": {
            key: {
                value: _tally([error for error in errors if error[key] == value])
                for value, _ in Counter(error[key] for error in errors).most_common()
            }
            for key in ("seen", "pos", "kind")
        },
    }


def as_text(counted: dict, name: str) -> str:
    """What a person reads of ``counts``: the classes of one system's misses, for seen and unseen rows apart."""
    groups = {"all": counted} | counted["by"]["seen"]
    asked, misses = counted["asked"], counted["misses"]
    lines = [f"{name}: {misses} of {asked} answers lack a form they were asked for."]
    found = {label: number for label, number in counted["classes"].items() if number}
    if found:
        ranked = sorted(found, key=lambda label: -found[label])
        cells = [
            [label, *(f"{group['classes'][label]}" for group in groups.values()), CLASSES[label]] for label in ranked
        ]
        total = ["of rows that ask for a form", *(str(group["asked"]) for group in groups.values()), ""]
        lines += terminal.grid(["miss", *groups, "what it is"], [*cells, total], rules=len(cells))
    left = {"ask for no form": counted["no_form"], "have no prediction": counted["unscored"]}
    lines += [f"Without a class, because they {what}: {number}." for what, number in left.items() if number]
    return "\n".join(lines)


def as_table(rows: Sequence[dict], errors: Sequence[dict]) -> tuple[list[str], list[list]]:
    """(columns, lines) of the misses alone, for ``tracking`` tables."""
    columns = ["id", "class", "seen", "pos", "kind", "prompt", "reference", "prediction", "wanted", "given", "nearest"]
    lines = [
        [
            *(error[key] for key in columns[:5]),
            question_of(row["prompt"]),
            row["reference"],
            row["prediction"],
            error["wanted"],
            error["given"],
            ", ".join(near["form"] for near in error["nearest"]),
        ]
        for row, error in zip(rows, errors, strict=True)
        if error["status"] == MISS
    ]
    return columns, lines


def _tally(errors: Sequence[dict]) -> dict:
    status = Counter(error["status"] for error in errors)
    classes = Counter(error["class"] for error in errors)
    return {
        "asked": status[HIT] + status[MISS],
        "hits": status[HIT],
        "misses": status[MISS],
        "no_form": status[NO_FORM],
        "unscored": status[UNSCORED],
        "classes": {label: classes[label] for label in CLASSES},
    }


def _error(row: dict, attested: Attested, metadata: Mapping, index: int) -> dict:
    absent = [key for key in ("id", "prompt", "reference", "prediction", "seen", "forms") if key not in row]
    if absent:
        raise StoneyError(f"predictions[{index}]: no {', '.join(absent)}; every row needs it")
    forms, text, question = row["forms"] or [], row["prediction"], question_of(row["prompt"])
    error = {
        "id": row["id"],
        "status": HIT if forms else NO_FORM,
        "class": None,
        "wanted": None,
        "given": None,
        "nearest": [],
        "seen": {True: "seen", False: "unseen"}.get(row["seen"], UNKNOWN),
        "pos": _named(metadata, POS_KEYS) or _pos([*forms, *(row.get("lexemes") or [])], attested),
        "kind": _named(metadata, KIND_KEYS) or _kind(question, forms),
    }
    if text is None:
        return error | {"status": UNSCORED}
    missing = [form for form in forms if not contains_form(text, form)]
    if not missing:
        return error
    answer = _Answer.of(row, missing)
    label, wanted, given = next(_classes(answer, attested.knowledge))
    nearest = _nearest(answer, attested) if label == "invented form" else []
    return error | {"status": MISS, "class": label, "wanted": wanted, "given": given, "nearest": nearest}


def _named(metadata: Mapping, keys: Sequence[str]) -> str | None:
    return next((metadata[key] for key in keys if isinstance(metadata.get(key), str) and metadata[key].strip()), None)


def _pos(forms: Sequence[str], attested: Attested) -> str:
    return next((attested.pos[key] for key in map(fold, forms) if key in attested.pos), UNKNOWN)


def _kind(question: str, forms: Sequence[str]) -> str:
    if forms:
        return FORM_WANTED
    return MEANING_ASKED if _MEANING.search(question) else OTHER_KIND


@dataclass(frozen=True)
class _Answer:
    """What the classes are told from. ``attempts``, ``copied`` (words of the question) and ``own`` are folded words."""

    text: str
    truncated: bool
    missing: list[str]
    partly: bool  # another of the forms asked for is there
    attempts: list[str]
    copied: list[str]
    own: frozenset[str]  # words of the question and of the reference

    @classmethod
    def of(cls, row: dict, missing: Sequence[str]) -> "_Answer":
        text = normalize(row["prediction"])
        question = frozenset(folded_words(question_of(row["prompt"])))
        there = {word for form in row["forms"] if form not in missing for word in folded_words(form)}
        given = list(dict.fromkeys(language_words(text)))
        attempts = [word for word in given if word not in question and word not in there]
        quoted = _quoted_words(text)
        return cls(
            text,
            bool(row.get("truncated")),
            [fold(form) for form in missing],
            len(missing) < len(row["forms"]),
            [word for word in attempts if word in quoted or not word.isascii()] or attempts,
            [word for word in given if word in question],
            question | frozenset(folded_words(row["reference"])),
        )

    def attests(self, word: str, knowledge: Knowledge) -> bool:
        return knowledge.has(word) or word in self.own


_Found = tuple[str, str, str | None]  # class, missing form, what was given for it


def _classes(answer: _Answer, knowledge: Knowledge) -> Iterator[_Found]:
    """The classes that fit, in order of precedence."""
    first = answer.missing[0]
    if not words(answer.text):
        yield "empty", first, None
        return
    if answer.truncated:
        last = words(fold(answer.text))[-1]
        cut = fold(answer.text).endswith(last)
        yield from (("truncated", form, last) for form in answer.missing if cut and form.startswith(last))
    yield from _misspelt(answer)
    yield from _other_words(answer, answer.attempts, knowledge)
    if answer.truncated:
        yield "truncated", first, None
    if _REFUSAL.search(answer.text):
        yield "refusal", first, None
    if answer.partly:
        yield "incomplete", first, None
    yield from _other_words(answer, answer.copied, knowledge)
    yield "English only", first, None


def _misspelt(answer: _Answer) -> Iterator[_Found]:
    """The missing form in the right letters with other marks, then in letters of the same shape."""
    tokens, quoted = _TOKEN.findall(fold(answer.text)), _quoted_words(answer.text)

    def windows(form: str) -> Iterator[str]:
        """Runs of as many words as ``form`` has that may be meant for one: an English spelling only where it is quoted."""
        width = len(form.split())
        for start in range(len(tokens) - width + 1):
            run = tokens[start : start + width]
            if len(tokens) <= SHORT or any(word in quoted or is_of_the_language(word) for word in run):
                yield " ".join(run)

    pairs = [(form, run) for form in answer.missing for run in windows(" ".join(_TOKEN.findall(form)))]
    yield from (("diacritic only", *pair) for pair in pairs if _same(*pair, _strip_marks) and not _same(*pair, _shape))
    yield from (("look-alike letter", *pair) for pair in pairs if _same(*pair, _bare_shape))


def _same(first: str, second: str, key: Callable[[str], str]) -> bool:
    return key(first) == key(second)


@lru_cache(maxsize=1 << 16)
def _shape(text: str) -> str:
    """``text`` (folded) with each letter in the shape that a reader sees (UTS #39), decomposed."""
    return "".join(_shapes(letter)[0] for letter in re.findall(f".[{_MARK}]*", text))


@lru_cache(maxsize=1 << 16)
def _bare_shape(text: str) -> str:
    return _strip_marks(_shape(text))


def _other_words(answer: _Answer, given: Sequence[str], knowledge: Knowledge) -> Iterator[_Found]:
    """What ``given`` words are to the missing forms: another affix, another stem, another word, or no word at all."""
    pairs = [(form, word) for form in answer.missing for word in given]
    yield from (("affix", *pair) for pair in pairs if _has_stem(*pair, knowledge))
    yield from (("stem", *pair) for pair in pairs if _has_affixes(*pair, knowledge))
    invented = [word for word in given if not answer.attests(word, knowledge)]
    if invented:
        yield "invented form", answer.missing[0], invented[0]
    elif given:
        yield "other attested form", answer.missing[0], given[0]


def _has_stem(form: str, word: str, knowledge: Knowledge) -> bool:
    """Whether ``word`` is built on the stem of ``form``: as the lexicon says, or because the stem stands in it."""
    stem = knowledge.stems.get(form)
    if stem is None or word in knowledge.stems:
        return stem is not None and knowledge.stems[word] == stem
    return len(stem) >= MIN_STEM and stem in word


def _has_affixes(form: str, word: str, knowledge: Knowledge) -> bool:
    """Whether ``word`` is what ``form`` would be with another stem, or with none."""
    stem, segments = knowledge.stems.get(form), knowledge.segments.get(form, ())
    if stem not in segments:
        return False
    at = len(segments) - 1 - segments[::-1].index(stem)  # of a reduplicated stem, the whole one is the last
    before, after = (_strip_marks("".join(part)) for part in (segments[:at], segments[at + 1 :]))
    bare = _strip_marks(word)
    if len(before) + len(after) < MIN_AFFIXES or not bare.endswith(after):
        return False
    rest = bare.removesuffix(after)
    if before and _strip_marks(stem).startswith(before):  # a copy, of whatever stem was given
        size = len(before)
        return 2 * size < len(rest) and rest[:size] == rest[size : 2 * size]
    return rest.startswith(before)


def _nearest(answer: _Answer, attested: Attested) -> list[dict]:
    """The attested neighbour of each invented word."""
    invented = [word for word in answer.attempts or answer.copied if not answer.attests(word, attested.knowledge)]
    found = {word: attested.nearest(word) for word in invented}
    return [{"given": word, "form": near[0], "edits": near[1]} for word, near in found.items() if near]


def _quoted_words(text: str) -> frozenset[str]:
    return frozenset(word for span in quoted_forms(text) for word in _TOKEN.findall(fold(span)))
