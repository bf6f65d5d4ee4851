"""Rows that repeat each other, contradict each other, or give their answer away.

- Exact and near duplicates count some facts twice, and a copy in the test split is a leak.
- Contradictions: one question with answers that make different claims; no model can learn both.
- A question that holds its own answer, and an answer that holds its question, teach copying, and later pay a reward
  for it. A multiple choice question that names the right form beside a wrong one is only noted
  (``question_offers_answer``). ``echo_earns_forms`` is the widest note: repeating the question earns every form of the
  answer, whatever it asks.

Near duplicates are found by MinHash over character shingles with banding (Leskovec, Rajaraman and Ullman, *Mining of
Massive Datasets*, 3rd ed., ch. 3.3-3.4), and each candidate is checked by the exact Jaccard similarity. Likeness alone
would call all rows of one template copies: ``What does "tâlo" mean?`` and ``What does "mîva" mean?`` (invented words)
are different facts. So the rows must be about the same forms, up to a spelling variant, and must not differ in what
they quote or in a number. The forms are in the key of a bucket, and a row is compared with a bounded number of the rows
in it, so the cost grows with the rows and not with their square.
"""

import re
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING

from stoney_rl.errors import StoneyError
from stoney_rl.inspection.findings import FAILURE, MAX_EXAMPLES, NOTE, Finding, Section
from stoney_rl.lexemes import is_listed_english, planted_form, quoted_forms
from stoney_rl.text import fold

if TYPE_CHECKING:
    import numpy as np

    from stoney_rl.data import Row

NAME = "repeats"

# Characters. The book's advice for long documents is 5 to 9, so that no shingle is in most of them; here the forms tell rows
# apart, and short shingles bear the edits of a short text better: of three edits in a question and its answer mostly a
# similarity of 0.8 or more is left.
SHINGLE = 3
PERMUTATIONS = 64
# Longer texts are compared by their beginning: one row of a million characters must not cost as much as the others.
MAX_CHARACTERS = 20_000
MIN_QUESTION_WORDS = 4  # a shorter question stands in an answer by chance
_MIN_CANDIDATE_PROBABILITY = 0.995  # at the threshold: how many bands there are follows from it
_CHUNK_CHARACTERS = 500_000
# A row is compared with the first and the last few rows before it in a bucket, and with the likeliest of all those.
_FIRST, _LAST, _MOST_CANDIDATES = 4, 2, 8
_ESTIMATE_SLACK = 0.15  # three standard errors of a similarity of 0.8 estimated from 64 permutations
_MAX_SKELETON = 80  # letters; forms longer than this together are not searched for a missing letter
_CLAIM_SETS = 16  # answers to one question that each further answer is compared with

# Letters and digits with their combining marks, joined inside by apostrophes or hyphens: text.words with digits.
_TOKEN = re.compile(r"[^\W_][\u0300-\u036f]*(?:['\-]?[^\W_][\u0300-\u036f]*)*")
_PUNCTUATION = re.compile(r"[^\w\u0300-\u036f]+")
# What stands between two numbers is no punctuation: 3 - 4 is not 3 + 4, and 1.5 is not 15.
_BETWEEN_NUMBERS = re.compile(r"(?<=[\d)])\s*([-+*/^%=<>×÷·.,:])\s*(?=[\d(])")
_NUMBER = re.compile(r"\d+")
_MARKS = re.compile("[\u0300-\u036f]")

_GLOSS_STOPWORDS = frozenset("a an the to be is are of".split())  # noqa: SIM905
# Negations and pronouns are not here: "not to gather" and "you gather" say something else than "to gather".
_STOPWORDS = _GLOSS_STOPWORDS | frozenset(
    """this that these those it its in on at for from with as by and or which what who was were been being have has had
    do does did can could would should will may might must also so just there here would'nt""".split()  # noqa: SIM905
)
_GRAMMAR = frozenset(
    """verb noun adverb adjective pronoun postposition preposition conjunction particle interjection phrase clause
    causative prefix suffix infix stem root active stative passive transitive intransitive impersonal reflexive reciprocal
    alienable inalienable proper singular plural first second third person indirect direct object subject form word
    term""".split()  # noqa: SIM905
)

_KIND = (
    r"(?:words?|terms?|phrases?|expressions?|forms?|verbs?|nouns?|adverbs?|adjectives?|pronouns?|stems?|options?|entry)"
)
_NO_KIND = r"(?! (?:class|classification|category|type|ending))"
# Between "which" and "term" only adjectives: an auxiliary, a preposition, a determiner or a kind ("what type of noun")
# asks for something else.
_ADJECTIVE = (
    r"(?:(?!(?:do|does|did|is|are|was|were|can|could|might|may|would|should|will|has|have|in|between|for|to|from|about|with"
    r"|within|and|or|regarding|if|when|this|these|that|those|the|kinds?|types?|sorts?|parts?|english|pattern)\b)[\w'*-]+ )"
)
_CAN = r"(?:would|do|does|could|can|might|should)"
_PERSON = (
    r"(?:you|one|we|i|they|he|she|someone|somebody|speakers|"
    r"(?:an?|the) (?:[\w-]+ ){0,3}?(?:speaker|learner|person|elder|student))(?: of (?:\w+ ){1,3}?\w+)?"
)
_ASKS_WHICH = re.compile(
    rf"\b(?:which|what) {_ADJECTIVE}{{0,5}}?{_KIND}\b{_NO_KIND}"
    rf"|\bwhich (?:one|two|of (?:the|these|those)|(?:\w+ ){{0,2}}elements?|{_CAN} (?:you|one|we)|fits|suits|is (?:better|best))\b"
    rf"|\bwhat (?:is|are|would be) the (?:(?!english\b)[\w'-]+ ){{0,3}}?(?:{_KIND}|translation|equivalent) (?:for|that|meaning|of|behind)\b"
    rf"|\b(?:give|name|choose|pick|select|write|find|derive) (?:me )?(?:the|an?|one) {_ADJECTIVE}{{0,4}}?{_KIND}\b"
    rf"|\bhelp with the {_ADJECTIVE}{{0,4}}?{_KIND}\b"
)
_ASKS_HOW = re.compile(
    rf"\bhow {_CAN} {_PERSON} (?:\w+ly ){{0,2}}(?:say|express|call|refer to|translate|render|put|ask|tell|greet|name|describe|convey|phrase)\b"
    r"|\bhow (?:is|are|would|can|could|does) .*\b(?:rendered|translated|said|called|expressed|sound) (?:in|into) "
    rf"|\bwhat {_CAN} (?!they |he |she ){_PERSON} (?:\w+ly ){{0,2}}(?:say|use|call)\b"
    rf"|\bwrite .* as an? {_ADJECTIVE}{{0,3}}{_KIND}\b"
    r"|\bwhat would .* be in |\b(?:want|wants|wish|wishes) to say\b"
    r"|\bwhat does the (?:result|form) (?:look|sound) like\b|\b(?:answer|solution|hint|tip)(?: is|:) "
    r"|\bdoes the (?:\w+ )?(?:dictionary|glossary|lexicon) (?:offer|give|have|list)\b"
    r"|(?:^|[,;:] |\bplease |\byou )(?:directly )?translate\b.*\b(?:into|to|in) "
)
_ASKS_ENGLISH = re.compile(
    r"\b(?:in|into|to) english\b"
    r"|\btranslate the (?!english)[\w' -]*?(?:word|term|phrase|verb|noun|expression|adverb|adjective)\b(?! for\b)"
)
_ASKS_ABOUT = re.compile(r"\b(?:differences?|distinctions?|distinguish|differentiate|differ|patterns?|relationship)\b")
_IN_ENGLISH = re.compile(r"\b(?:in|into|to) english\b")
_SENTENCE_END = re.compile(r"[.?!]+[\"'`”]*(?:\s|$)")


def _fold(text: str) -> str:
    """``text.fold`` but for the white space, for the text of a row, which is normalised already."""
    return unicodedata.normalize("NFC", text.casefold())


def _spaced(folded: str) -> str:
    """The words and numbers of a folded text, one space apart and one at each end, so that ``in`` compares whole words."""
    return f" {' '.join(_TOKEN.findall(folded))} "


def _key(folded: str, spaced: str) -> str:
    """The same for texts that differ only in white space and punctuation; a text of nothing else is its own key."""
    if _NUMBER.search(folded):
        marked = _BETWEEN_NUMBERS.sub(lambda match: f" _{ord(match[1])}_ ", folded)
        return " ".join(_PUNCTUATION.sub(" ", marked).split())
    return " ".join(spaced.replace("-", " ").replace("'", " ").split()) or folded


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@lru_cache(maxsize=50_000)
def _form_key(form: str) -> str:
    return _spaced(fold(form)).strip()


@lru_cache(maxsize=50_000)
def _stripped(form: str) -> str:
    """A folded form without its diacritics."""
    return unicodedata.normalize("NFC", _MARKS.sub("", unicodedata.normalize("NFD", form)))


def _row_forms(row: "Row") -> list[str]:
    """The forms that the row is about, folded, each once: its lexemes and the form that a planted row asks for."""
    planted = planted_form(row)
    forms = [*row.lexemes, planted] if planted else row.lexemes
    return list(dict.fromkeys(key for form in forms if (key := _form_key(str(form)))))


def _present(forms: list[str], spaced: str) -> list[str]:
    """Those of ``forms`` that stand in ``spaced`` as whole words, in the order of ``forms``."""
    if len(forms) * len(spaced) < 1_000_000:
        return [form for form in forms if f" {form} " in spaced]
    # A long text with many forms: its runs of words are looked up instead, so that the cost stays that of the text.
    words = spaced.split()
    runs = set()
    for width in {form.count(" ") + 1 for form in forms}:
        if width <= 8:
            runs.update(" ".join(words[at : at + width]) for at in range(len(words) - width + 1))
    return [form for form in forms if form in runs]


@lru_cache(maxsize=50_000)
def _gloss_words(quoted: str) -> tuple[str, ...]:
    """The words of a quoted gloss that say something: *to gather* and *gather* are one gloss."""
    words = _TOKEN.findall(_fold(quoted))
    return tuple(word for word in words if word not in _GLOSS_STOPWORDS) or tuple(words)


# Any quotation marks, for a key that two wordings of one fact share; what counts as a quote is ``quoted_forms``'s to say.
_ROUGHLY_QUOTED = re.compile(r"[\"`“]([^\"`“”\n]+)[\"`”]|(?<!\w)'([^'\"`“\n]+)'(?!\w)")


def _rough_quotes(folded: str, forms: Sequence[str]) -> frozenset[str]:
    """About what ``_quotes`` finds, in a folded text and at a tenth of its cost."""
    glosses = {" ".join(_gloss_words(double or single)) for double, single in _ROUGHLY_QUOTED.findall(folded)}
    # A marked letter makes it a form or an affix, whatever the row calls it.
    return frozenset(gloss for gloss in glosses.difference(forms) if gloss and gloss.isascii())


def _quotes(row: "Row", forms: Sequence[str]) -> dict[str, None]:
    """What the row quotes besides its forms, as the words that count, in order of appearance."""
    found: dict[str, None] = {}
    own = set(forms)
    for message in [*row.prompt, *row.completion]:
        for quoted in quoted_forms(str(message["content"])[:MAX_CHARACTERS]):
            gloss = " ".join(_gloss_words(quoted))
            if gloss and _form_key(quoted) not in own:
                found[gloss] = None
    return found


@dataclass(slots=True)
class _Texts:
    """One row, folded. ``question`` (the last user turn), ``prompt`` (all turns) and ``answer`` are spaced words."""

    question: str
    prompt: str
    answer: str
    prompt_key: bytes
    answer_key: bytes
    folded: str

    @classmethod
    def of(cls, row: "Row") -> "_Texts":
        turns = [(message["role"], _fold(str(message["content"]))) for message in row.prompt]
        spaced = [_spaced(text) for _, text in turns]
        question = next(
            text for (role, _), text in zip(reversed(turns), reversed(spaced), strict=True) if role == "user"
        )
        answer_folded = _fold("\n".join(str(message["content"]) for message in row.completion))
        answer = _spaced(answer_folded)
        prompt_key = "\n".join(f"{role} {_key(text, words)}" for (role, text), words in zip(turns, spaced, strict=True))
        quoted = [text for _, text in turns] + [answer_folded]
        return cls(
            question,
            question if len(turns) == 1 else f" {' '.join(text.strip() for text in spaced)} ",
            answer,
            _digest(prompt_key),
            _digest(_key(answer_folded, answer)),
            "\n".join(quoted)[:MAX_CHARACTERS],
        )

    def shingled(self) -> str:
        """The text that near duplicates are compared by: at least one shingle long, at most MAX_CHARACTERS."""
        return (self.prompt[:MAX_CHARACTERS] + self.answer[1:MAX_CHARACTERS]).ljust(SHINGLE)


def bands(threshold: float) -> tuple[int, int]:
    """(bands, rows of a band) of PERMUTATIONS MinHash values: the fewest bands that find nearly all pairs as alike as
    ``threshold``, see ``candidate_probability``."""
    for rows in (32, 16, 8, 4, 2):
        if candidate_probability(threshold, PERMUTATIONS // rows, rows) >= _MIN_CANDIDATE_PROBABILITY:
            return PERMUTATIONS // rows, rows
    return PERMUTATIONS, 1


def candidate_probability(similarity: float, num_bands: int, band_rows: int) -> float:
    """The probability that two texts with that Jaccard similarity share a bucket: 1 - (1 - s^r)^b.

    Leskovec, Rajaraman and Ullman, *Mining of Massive Datasets*, ch. 3.4.2.
    """
    return 1 - (1 - similarity**band_rows) ** num_bands


class _Signatures:
    """MinHash signatures of texts that arrive one by one, computed in chunks so that the shingles are never all held."""

    def __init__(self, count: int, seed: int) -> None:
        import numpy as np

        self.values = np.zeros((count, PERMUTATIONS), dtype=np.uint32)
        self.seed = seed
        self.done = 0
        self.waiting: list[str] = []
        self.characters = 0

    def add(self, text: str) -> None:
        self.waiting.append(text)
        self.characters += len(text)
        if self.characters >= _CHUNK_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        if not self.waiting:
            return
        import numpy as np
        from rensa import RMinHash

        lengths = np.array([len(text) for text in self.waiting])
        hashes = _shingle_hashes("".join(self.waiting))
        # The shingles that begin in the last characters of a text run into the next one: they are not its own.
        inside = np.ones(len(hashes) + SHINGLE - 1, dtype=bool)
        ends = np.cumsum(lengths)
        for back in range(1, SHINGLE):
            inside[ends - back] = False
        hashes = hashes[inside[: len(hashes)]]
        offsets = np.concatenate(([0], np.cumsum(lengths - (SHINGLE - 1)))).astype(np.uint64)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, PERMUTATIONS, self.seed)
        self.values[self.done : self.done + len(lengths)] = np.array(matrix.to_rows(), dtype=np.uint32)
        self.done += len(lengths)
        self.waiting, self.characters = [], 0


def _shingle_hashes(text: str) -> "np.ndarray":
    """One 64-bit hash for each run of SHINGLE characters, ``[len(text) - SHINGLE + 1]``: a polynomial in the code
    points, mixed by the finaliser of MurmurHash3 (its low bits would follow the last characters otherwise)."""
    import numpy as np

    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    count = len(codes) - SHINGLE + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for at in range(SHINGLE):
        hashes *= np.uint64(0x9E3779B97F4A7C15)
        hashes += codes[at : at + count]
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        hashes ^= hashes >> np.uint64(33)
        hashes *= np.uint64(multiplier)
    hashes ^= hashes >> np.uint64(33)
    return hashes


def _distinct(values: "np.ndarray") -> "np.ndarray":
    """``np.unique`` by sorting: numpy's hash table is many times slower on these pairs."""
    import numpy as np

    values = np.sort(values)
    return values[np.flatnonzero(np.diff(values, prepend=-1))]


def _bucket_pairs(keys: "np.ndarray", rows: "np.ndarray", count: int) -> "np.ndarray":
    """Pairs of rows with the same key, as ``later * count + earlier``: each row with the first _FIRST rows of its
    bucket and the _LAST before it. ``rows`` is in ascending order."""
    import numpy as np

    order = np.argsort(keys, kind="stable")
    keys, rows = keys[order], rows[order]
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    sizes = np.diff(np.concatenate((starts, [len(keys)])))
    at = np.arange(len(keys))
    start = np.repeat(starts, sizes)
    place = at - start
    pairs = []
    for first in range(_FIRST):
        later = place > first
        pairs.append(rows[later] * count + rows[start[later] + first])
    for back in range(1, _LAST + 1):
        later = place >= back
        pairs.append(rows[later] * count + rows[at[later] - back])
    return _distinct(np.concatenate(pairs))


def _candidates(
    signatures: "np.ndarray",
    skeletons: "np.ndarray",
    variants: tuple["np.ndarray", "np.ndarray"],
    rows: "np.ndarray",
    threshold: float,
) -> Iterator[tuple[int, list[int]]]:
    """(row, earlier rows that may be almost the same, likeliest first), by row.

    skeletons: ``[row]``, one number for each set of forms without diacritics. variants: (row, key) of forms with one
    letter left out, as two arrays. rows: the rows to compare, ascending.
    """
    import numpy as np

    count = len(signatures)
    num_bands, band_rows = bands(threshold)
    pairs = np.empty(0, dtype=np.int64)
    for band in range(num_bands):
        keys = skeletons[rows].astype(np.uint64)
        for column in range(band * band_rows, (band + 1) * band_rows):
            keys *= np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(32)
            keys += signatures[rows, column]
        pairs = _distinct(np.concatenate((pairs, _bucket_pairs(keys, rows, count))))
    owners, keys = variants
    if len(owners):
        pairs = _distinct(np.concatenate((pairs, _bucket_pairs(keys, owners, count))))
    later, earlier = pairs // count, pairs % count
    later, earlier = later[later != earlier], earlier[later != earlier]
    if not len(later):
        return
    estimates = np.concatenate(
        [
            (signatures[later[at : at + 100_000]] == signatures[earlier[at : at + 100_000]]).mean(axis=1)
            for at in range(0, len(later), 100_000)
        ]
    )
    likely = estimates >= threshold - _ESTIMATE_SLACK
    later, earlier, estimates = later[likely], earlier[likely], estimates[likely]
    order = np.lexsort((earlier, -estimates, later))
    later, earlier = later[order], earlier[order]
    for group in np.split(np.arange(len(later)), np.flatnonzero(np.diff(later)) + 1):
        if len(group):
            yield int(later[group[0]]), earlier[group[:_MOST_CANDIDATES]].tolist()


def _letter_apart(
    bare_forms: list[str], skeletons: "np.ndarray", quotes: "np.ndarray", rows: "np.ndarray"
) -> tuple["np.ndarray", "np.ndarray"]:
    """(rows, keys): the forms of a row as they are, with each letter left out, and with each form left out: spellings one
    letter apart share a key, and so do rows one of which has one form more (the deletion neighbourhood, Mor and Fraenkel 1982; Garbe's SymSpell).

    bare_forms: ``[skeleton]``. skeletons, quotes: ``[row]``. rows: those to look at, ascending. The quotes are in the key:
    without them the words of a small lexicon, many of which are one letter apart, would share buckets. So rows that
    quote nothing are not compared in this way.
    """
    import numpy as np

    rows = rows[quotes[rows] != 0]
    rows = rows[np.argsort(quotes[rows], kind="stable")]
    keys, owners = array("q"), array("q")
    for group in np.split(rows, np.flatnonzero(np.diff(quotes[rows])) + 1):
        if len(group) < 2 or (skeletons[group] == skeletons[group[0]]).all():
            continue
        quoted = int(quotes[group[0]])
        seen: dict[int, int] = defaultdict(int)
        for row, skeleton in zip(group.tolist(), skeletons[group].tolist(), strict=True):
            seen[skeleton] += 1
            if seen[skeleton] > _FIRST + _LAST:
                continue
            bare = bare_forms[skeleton]
            forms = bare.split("|")
            near = {bare, *(bare[:at] + bare[at + 1 :] for at in range(len(bare)))}
            near.update("|".join(forms[:at] + forms[at + 1 :]) for at in range(len(forms)))
            keys.extend(hash((text, quoted)) for text in near)
            owners.extend([row] * len(near))
    owners, keys = np.frombuffer(owners, dtype=np.int64), np.frombuffer(keys, dtype=np.int64)
    order = np.argsort(owners, kind="stable")
    return owners[order], keys[order]


@dataclass
class _Compared:
    """What is compared of one row once it is a candidate."""

    forms: frozenset[str]
    words: frozenset[str]
    quotes: frozenset[str]
    numbers: frozenset[str]
    shingles: frozenset[str]

    @classmethod
    def of(cls, row: "Row") -> "_Compared":
        forms = _row_forms(row)
        text = _Texts.of(row).shingled()
        return cls(
            frozenset(forms),
            frozenset(text.split()),
            frozenset(_quotes(row, forms)),
            frozenset(_NUMBER.findall(text)),
            frozenset(text[at : at + SHINGLE] for at in range(len(text) - SHINGLE + 1)),
        )


def _one_edit(one: str, other: str) -> bool:
    from rapidfuzz.distance import OSA

    return OSA.distance(one, other, score_cutoff=1) <= 1


def _same_forms(one: "_Compared", other: "_Compared") -> bool:
    """Whether two rows are about the same forms: all but one of each are equal, or equal without diacritics, and that
    one is in the words of the other row, or a letter apart from one of them. (An affix, or a misspelt English word, may
    count as a form in one row and not in the other.)"""
    if one.forms == other.forms:
        return True
    bare, other_bare = {_stripped(form) for form in one.forms}, {_stripped(form) for form in other.forms}
    for only, there in ((bare - other_bare, other), (other_bare - bare, one)):
        if len(only) > 1:
            return False
        for form in only:
            words = [_stripped(word) for word in [*there.forms, *there.words]]
            if not any(_one_edit(form, word) for word in words):
                return False
    return True


def _same_quotes(one: frozenset[str], other: frozenset[str]) -> bool:
    """Whether two rows may be quoting the same. One may leave out what the other quotes. What one quotes instead of the
    other is the same only if it is a typing mistake: a letter apart, and not English on one side."""
    only, other_only = sorted(one - other), sorted(other - one)
    if not only or not other_only:
        return True
    if len(only) != len(other_only):
        return False
    for left, right in zip(only, other_only, strict=True):
        words, other_words = left.split(), right.split()
        if not _one_edit(left, right) or all(map(is_listed_english, {*words} ^ {*other_words})):
            return False
    return True


def _similarity(one: _Compared, other: _Compared, threshold: float) -> float:
    """The Jaccard similarity of the shingles, or 0 where the rows are about different things or below ``threshold``."""
    small, large = sorted((len(one.shingles), len(other.shingles)))
    if small < threshold * large or not _same_forms(one, other):
        return 0.0
    if one.numbers != other.numbers or not _same_quotes(one.quotes, other.quotes):
        return 0.0
    shared = len(one.shingles & other.shingles)
    similarity = shared / (len(one.shingles) + len(other.shingles) - shared)
    return similarity if similarity >= threshold else 0.0


@dataclass
class _Found:
    """The rows (by index) and details of one kind of finding."""

    details: dict[int, str] = field(default_factory=dict)

    def finding(self, kind: str, severity: str, rows: Sequence["Row"], message: str) -> Finding:
        indices = sorted(self.details)
        examples = tuple(
            {
                "id": rows[index].id,
                "question": _short(rows[index].question),
                "answer": _short(rows[index].answer),
                "detail": self.details[index],
            }
            for index in indices[:MAX_EXAMPLES]
        )
        return Finding(
            kind=kind,
            severity=severity,
            count=len(indices),
            total=len(rows),
            unit="rows",
            message=message,
            row_ids=tuple(rows[index].id for index in indices),
            details=tuple(self.details[index] for index in indices),
            examples=examples,
        )


def _short(text: str, most: int = 160) -> str:
    text = " ".join(text[: 2 * most].split())
    return text if len(text) <= most else text[: most - 3] + "..."


def _asks_for_a_form(question: str) -> bool:
    """Whether a question is worded as asking for a word of the language, not for English and not about a difference."""
    for sentence in _SENTENCE_END.split(" ".join(_fold(question).split())):
        if _ASKS_WHICH.search(sentence) and not _IN_ENGLISH.search(sentence):
            return True
        if _ASKS_HOW.search(sentence) and not (_ASKS_ENGLISH.search(sentence) or _ASKS_ABOUT.search(sentence)):
            return True
    return False


# What may stand between two forms that are offered as alternatives: X (a verb) or Y (a noun).
_OR = frozenset("or and versus vs".split())  # noqa: SIM905
_BETWEEN_OPTIONS = _OR | _GRAMMAR | frozenset("a an the is either".split())  # noqa: SIM905


_ASKS_FOR_A_PART = re.compile(r" which (?:\w+ ){0,2}(?:elements?|parts?|components?) ")


def _offered(prompt: str, in_prompt: set[str], held: str) -> bool:
    """Whether a prompt (spaced words) offers ``held`` and another of its forms as alternatives, *X or Y*, or as the
    parts of a phrase."""
    if len(in_prompt) < 2:
        return False
    if _ASKS_FOR_A_PART.search(prompt):
        return True
    places = sorted((at, form) for form in in_prompt if (at := prompt.find(f" {form} ")) >= 0)
    for (at, form), (start, following) in pairwise(places):
        between = set(prompt[at + len(form) + 1 : start + 1].split())
        if held in (form, following) and between & _OR and between <= _BETWEEN_OPTIONS:
            return True
    return False


def _given_away(row: "Row", texts: _Texts, in_answer: list[str], in_prompt: set[str]) -> tuple[list[str], bool] | None:
    """(the forms of the answer that the question gives away, whether it offers them among others); None for nothing.

    No forms: the whole answer, which has none, stands in the question.
    """
    asked = planted_form(row)
    asked = _form_key(asked) if asked else ""
    # An affix, or a word of a phrase, that the answer explains besides.
    claimed = [form for form in in_answer if not any(form != other and form in other for other in in_answer[:20])]
    words = texts.answer.split()
    if texts.answer in texts.prompt and not all(word in _STOPWORDS or word in ("no", "not", "yes") for word in words):
        # Of an answer that is more than a form, nobody offers a choice.
        bare = len(words) <= sum(form.count(" ") + 1 for form in in_answer)
        return in_answer, bare and _offered(texts.prompt, in_prompt, in_answer[0])
    if asked:
        held = [asked] if asked in in_prompt else []
    elif claimed and in_prompt.issuperset(claimed) and _asks_for_a_form(row.question[:MAX_CHARACTERS]):
        held = sorted(claimed, key=lambda form: texts.answer.index(f" {form} "))
    else:
        held = []
    return (held, _offered(texts.prompt, in_prompt, held[0])) if held else None


@dataclass
class _Claims:
    """What an answer claims beyond its question. ``glosses`` are tuples of words."""

    forms: list[str]
    glosses: list[tuple[str, ...]]
    content: frozenset[str]
    first_word: str
    text: str

    @classmethod
    def of(cls, row: "Row") -> "_Claims":
        texts, forms = _Texts.of(row), _row_forms(row)
        new = [form for form in _present(forms, texts.answer) if form not in _present(forms, texts.prompt)]
        new.sort(key=lambda form: texts.answer.index(f" {form} "))
        glosses = []
        for quoted in quoted_forms(row.answer[:MAX_CHARACTERS]):
            words = _gloss_words(quoted)
            if words and _spaced(fold(quoted)) not in texts.prompt and words not in glosses:
                glosses.append(words)
        said = [words for words in glosses if not _GRAMMAR.issuperset(words)]
        words = texts.answer.split()
        content = frozenset(word for word in words if word not in _STOPWORDS)
        return cls(new, said or glosses, content, words[0] if words else "", _short(row.answer, 60))


def _contradiction(one: _Claims, other: _Claims) -> tuple[str, str] | None:
    """The two claims that can't both be right, or None."""
    if {one.first_word, other.first_word} == {"yes", "no"}:
        return one.first_word, other.first_word
    if one.forms and other.forms:
        only = [form for form in one.forms if form not in other.forms]
        other_only = [form for form in other.forms if form not in one.forms]
        # What an answer names first is its claim; a form that it goes on to compare with is not.
        if only and other_only and one.forms[0] != other.forms[0]:
            return only[0], other_only[0]
        return None
    if one.glosses and other.glosses:
        only = [gloss for gloss in one.glosses if gloss not in other.glosses]
        other_only = [gloss for gloss in other.glosses if gloss not in one.glosses]
        if only and other_only and not _alike(one.glosses[0], other.glosses[0]):
            return " ".join(only[0]), " ".join(other_only[0])
        return None
    shared = len(one.content & other.content)
    if 2 * shared < min(len(one.content), len(other.content)):
        return one.text, other.text
    return None


def _alike(gloss: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether one gloss has all words of the other: *gather* and *gather something*."""
    return set(gloss) <= set(other) or set(other) <= set(gloss)


def _contradictions(rows: Sequence["Row"], questions: Iterable[list[int]], answer_keys: list[bytes]) -> _Found:
    """``questions``: the rows of each question that is asked more than once."""
    found = _Found()
    for members in questions:
        by_answer: dict[bytes, list[int]] = defaultdict(list)
        for index in members:
            by_answer[answer_keys[index]].append(index)
        if len(by_answer) == 1:
            continue
        compared: list[tuple[int, _Claims]] = []
        details: dict[int, str] = {}
        for indices in by_answer.values():
            index = indices[0]
            claims = _Claims.of(rows[index])
            for earlier, earlier_claims in compared:
                if pair := _contradiction(claims, earlier_claims):
                    details[index] = f"against {rows[earlier].id}: {pair[0]} / {pair[1]}"
                    details.setdefault(earlier, f"against {rows[index].id}: {pair[1]} / {pair[0]}")
                    break
            if len(compared) < _CLAIM_SETS:
                compared.append((index, claims))
        if details:
            for indices in by_answer.values():
                detail = details.get(indices[0], "")
                found.details.update(dict.fromkeys(indices, detail))
    return found


def _near_duplicates(
    rows: Sequence["Row"], candidates: Iterator[tuple[int, list[int]]], threshold: float
) -> tuple[_Found, list[int]]:
    """The near duplicates, and the sizes of the clusters that they form with the rows that they are like."""
    found = _Found()
    compared = lru_cache(maxsize=4000)(lambda index: _Compared.of(rows[index]))
    leader: dict[int, int] = {}
    for index, earlier_rows in candidates:
        for earlier in earlier_rows:
            similarity = _similarity(compared(index), compared(earlier), threshold)
            if similarity:
                found.details[index] = f"{similarity:.2f} like {rows[earlier].id}"
                leader[index] = leader.get(earlier, earlier)
                break
    sizes: dict[int, int] = defaultdict(lambda: 1)
    for first in leader.values():
        sizes[first] += 1
    return found, list(sizes.values())


def _share(count: int, total: int) -> dict:
    return {"count": count, "share": round(count / total, 6) if total else None}


def find(rows: Sequence["Row"], *, threshold: float = 0.8, seed: int = 0) -> Section:
    """The repeats among ``rows``, which have their lexemes (``lexemes.annotate``).

    ``threshold`` is the Jaccard similarity of the shingle sets of two rows, from which on they are near duplicates;
    ``seed`` draws the permutations. Raises StoneyError for a threshold outside (0, 1].
    """
    import numpy as np

    if not 0 < threshold <= 1:
        raise StoneyError(f"repeats: threshold is {threshold}; give a similarity above 0 and up to 1, such as 0.8")

    exact, echoes_question, gives_answer, offers_answer, echo = (_Found() for _ in range(5))
    echoed = dict.fromkeys(("all", "some", "none", "no_form_in_answer"), 0)
    first_with: dict[bytes, int] = {}  # by question and answer
    first_asking: dict[bytes, int] = {}
    asked_again: dict[int, list[int]] = {}  # first row -> all rows of its question
    answer_keys: list[bytes] = []
    signatures = _Signatures(len(rows), seed)
    bare_forms: dict[str, int] = {}
    skeletons = np.zeros(len(rows), dtype=np.int64)
    quotes = np.zeros(len(rows), dtype=np.int64)  # 0: not to be compared by letters
    distinct = np.ones(len(rows), dtype=bool)

    for index, row in enumerate(rows):
        texts = _Texts.of(row)
        asking = first_asking.setdefault(texts.prompt_key, index)
        if asking != index:
            asked_again.setdefault(asking, [asking]).append(index)
        answer_keys.append(texts.answer_key)
        first = first_with.setdefault(texts.prompt_key + texts.answer_key, index)
        if first != index:
            exact.details[index] = f"same as {rows[first].id}"
            distinct[index] = False
        elif not (texts.prompt.strip() or texts.answer.strip()):
            distinct[index] = False  # nothing to compare

        forms = _row_forms(row)
        in_answer, in_prompt = _present(forms, texts.answer), set(_present(forms, texts.prompt))
        held = sum(form in in_prompt for form in in_answer)
        if not in_answer:
            echoed["no_form_in_answer"] += 1
        elif held == len(in_answer):
            echoed["all"] += 1
            echo.details[index] = ", ".join(in_answer[:3])
        else:
            echoed["some" if held else "none"] += 1
        if texts.question.count(" ") > MIN_QUESTION_WORDS and texts.question in texts.answer:
            echoes_question.details[index] = ""
        if given := _given_away(row, texts, in_answer, in_prompt):
            shown = ", ".join(given[0][:3]) or _short(row.answer, 60)
            if given[1]:
                offers_answer.details[index] = f"offered among others: {shown}"
            else:
                gives_answer.details[index] = f"given: {shown}"

        signatures.add(texts.shingled())
        glosses = _rough_quotes(texts.folded, forms)
        bare = "|".join(sorted({_stripped(form) for form in forms}))
        # Without forms, what is quoted tells the rows of a template apart.
        skeleton = bare or "\n".join(("", *sorted(glosses)))
        skeletons[index] = bare_forms.setdefault(skeleton, len(bare_forms))
        if bare and glosses and len(bare) <= _MAX_SKELETON:
            quotes[index] = hash(glosses) or 1
    signatures.flush()

    compared = np.flatnonzero(distinct)
    candidates = _candidates(
        signatures.values, skeletons, _letter_apart(list(bare_forms), skeletons, quotes, compared), compared, threshold
    )
    near, cluster_sizes = _near_duplicates(rows, candidates, threshold)
    contradictions = _contradictions(rows, asked_again.values(), answer_keys)

    other_answers = sum(len({answer_keys[index] for index in members}) > 1 for members in asked_again.values())
    num_bands, band_rows = bands(threshold)
    figures = {
        "rows": len(rows),
        "exact_duplicates": _share(len(exact.details), len(rows)),
        "near_duplicates": {
            **_share(len(near.details), len(rows)),
            "clusters": len(cluster_sizes),
            "largest_cluster": max(cluster_sizes, default=0),
            "threshold": threshold,
            "shingle_characters": SHINGLE,
            "characters_compared": MAX_CHARACTERS,
            "permutations": PERMUTATIONS,
            "bands": num_bands,
            "rows_of_a_band": band_rows,
            "candidate_probability": {
                f"{similarity:g}": round(candidate_probability(similarity, num_bands, band_rows), 6)
                for similarity in sorted({threshold, 0.9})
            },
        },
        "questions": {
            "different": len(first_asking),
            "asked_more_than_once": len(asked_again),
            "always_with_the_same_answer": len(asked_again) - other_answers,
            "with_other_answers": other_answers,
        },
        "contradictions": _share(len(contradictions.details), len(rows)),
        "answer_repeats_question": _share(len(echoes_question.details), len(rows)),
        "question_gives_answer": _share(len(gives_answer.details), len(rows)),
        "question_offers_answer": _share(len(offers_answer.details), len(rows)),
        "forms_of_the_answer_in_the_question": {name: _share(count, len(rows)) for name, count in echoed.items()},
    }
    with_form = len(rows) - echoed["no_form_in_answer"]
    findings = [
        exact.finding(
            "exact_duplicates",
            FAILURE,
            rows,
            "question and answer equal an earlier row's but for case, white space and punctuation: "
            "the fact counts twice; drop the later rows",
        ),
        near.finding(
            "near_duplicates",
            FAILURE,
            rows,
            f"almost an earlier row about the same forms (Jaccard similarity of {SHINGLE}-character shingles >= {threshold:g}; "
            f"{len(cluster_sizes)} clusters, the largest of {max(cluster_sizes, default=0)} rows): "
            "the fact counts twice; drop the later rows or keep them in one split",
        ),
        contradictions.finding(
            "contradictions",
            FAILURE,
            rows,
            "the same question has answers that claim different things: at most one can be learned; "
            "find out which is right",
        ),
        echoes_question.finding(
            "answer_repeats_question",
            FAILURE,
            rows,
            "the answer contains the whole question: a model learns to repeat what it is asked; cut it from the answer",
        ),
        gives_answer.finding(
            "question_gives_answer",
            FAILURE,
            rows,
            "the question holds the answer that it asks for: copying it earns the reward; reword the question, "
            "or leave these rows out of reward training",
        ),
        offers_answer.finding(
            "question_offers_answer",
            NOTE,
            rows,
            "multiple choice: the question offers the form that it asks for among others, so a reward that counts forms "
            "pays for naming all of them; reward the right one only, or leave these rows out of reward training",
        ),
        echo.finding(
            "echo_earns_forms",
            NOTE,
            rows,
            f"every form of the answer stands in the question ({len(echo.details)} of the {with_form} rows whose answer has "
            "a form): a reward that counts forms pays for echoing the question; reward only forms that it does not hold",
        ),
    ]
    return Section(NAME, figures, [finding for finding in findings if finding.count])
