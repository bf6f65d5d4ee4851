"""Are the words of the data a fair sample by initial letter, or are all words that begin with one letter left out?

A letter that is common inside words and begins none is a hole in the data, or a rule of the language: native Basque
words don't begin with *r*, nor German ones with *ß*. The other letters of the same language tell how much
such shares differ there, so each letter is tested against them:

1. Words are the distinct first words of the forms (a phrase is one form) and the distinct later words of phrases; a
   hyphen separates words, an apostrophe is passed over. Each counts once, however many forms or rows have it.
2. A letter that follows, or is followed by, one other letter in 95 % of its places is half of a digraph, and the two
   count as one letter.
3. Vowels and consonants are told apart by Sukhotin's algorithm (1962; in English: Guy, Cryptologia 15, 1991): vowels
   and consonants tend to alternate. Single letters then change sides while that makes for more alternation, and the
   smaller side is the vowels: the greedy algorithm takes the most common letter for a vowel, which may be a consonant.
   A marked letter goes with its base letter.
4. Places: of a vowel, all but the end of a word; of a consonant, those before a vowel, because endings and codas differ
   more between letters. x of the n places of a letter are initial. Among the letters of a class the shares follow a beta distribution
   (beta-binomial: Skellam 1948), whose mean and spread are integrated over, given the common letters of the class
   without the tested one. Rare letters (English *x*, German *ß*) and marked ones (Portuguese *ç*) don't shape it: many
   of them have a rule of their own.
   p is the probability of x or fewer initial places.
5. Direct evidence: the same test, x of the n words that begin with the letter being first words and the rest later words
   of phrases. Spelling rules forbid both alike; who leaves headwords out keeps the phrases that contain them.
   The same beta-binomial, not Fisher's exact test, because letters do differ by position (nouns first, particles last).
6. Holm's correction (1979) over all tests of the data set.

A gap is a letter with corrected p below 0.05 (a letter with a diacritic: 0.001, unless by 5) and hardly any initial place: two, or 1 % of those expected if that is
more, so that a few misspelt or misextracted forms don't hide it. A rule of spelling as strong as that, in a language
with no other such rule, can't be told from a hole except by 5, and the message says which evidence there is. Two holes
of one class hide each other: a language with one such letter may have another.
Words count as independent, which the forms derived from one stem are not: with few stems, a letter that none of them
happens to begin with may be reported. How often all of this is right: ``benchmarks/coverage.py``.

The share of mentions that would be new in fresh data is n1/N, forms in one row by all mentions (Good, Biometrika 40,
1953). It takes mentions for independent draws, which rows made from templates are not: take it as a lower bound.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from stoney_rl.inspection.findings import FAILURE, MAX_EXAMPLES, NOTE, Finding, Section
from stoney_rl.text import words

# Corrected p of a gap. In ten natural languages about half of the marked consonants (ñ ç š ž ņ ļ ...) begin hardly any
# word by rule, of the common unmarked ones only the Basque r, so a marked letter takes more evidence.
ALPHA, ALPHA_MARKED = 0.05, 0.001
HINT = 0.01  # uncorrected p from which a letter that begins no word is noted
MIN_EXPECTED_SHARE = 0.01  # of the words: a letter that should begin fewer is not tested
TESTED, COMMON = 0.02, 0.05  # places by words: from here on a letter is tested; shapes the distribution of its class
MIN_OTHERS = 4  # letters that shape it, at least
STRAY, STRAY_SHARE = 2, 0.01  # initial places that a gap may have: the larger of a number and a share of the expected
MIN_LATER = 3  # later words with the letter, at least, for the direct evidence
DIGRAPH, MIN_DIGRAPH = 0.95, 20  # share of a letter's places beside one other letter; their number
MAX_LETTERS = 200  # a script with more has syllables or words for letters, and no letter is common

VOWEL, CONSONANT = "vowel", "consonant"
GAP_ELSEWHERE, GAP, RARE, FINE, UNTESTED = "gap, words begin with it elsewhere", "gap", "rare", "fine", "not tested"

_LETTER = r"[^\W\d_][\u0300-\u036f]*"
_ROWS = (("1", 1), ("2", 2), ("3-5", 5), ("6-10", 10))


def find(forms: Mapping[str, int]) -> Section:
    """Section ``coverage``: initial letters, forms by number of words and of rows, Good-Turing.

    ``forms``: each folded form of the language (``text.fold``) and the number of rows that mention it.
    Finding ``initial_letter_gap`` (failure) lists every letter that begins no word although it should, by a test of
    significance; ``never_initial`` (note) those for which the test, uncorrected, gives a hint. Figures under
    ``letters`` are per letter, most frequent first: distinct words that begin with it (``initial``; ``later`` in
    phrases), its places ``inside`` words, how many initial places were ``expected``, p, corrected p, class, verdict, and
    whether a gap would be noticed if all rows with words that begin with it were left out (``noticeable``), or only the
    forms that begin with it, so that phrases still contain such words (``noticeable_headwords``): small data hides gaps.
    """
    split = [parts for parts in ([w for word in words(form) for w in word.split("-")] for form in forms) if parts]
    first = dict.fromkeys(parts[0] for parts in split)
    later = dict.fromkeys(word for parts in split for word in parts[1:])
    spelling = _Spelling.of(first, later)
    letters = _letters(spelling)

    mentions = sum(forms.values())
    once = sum(rows == 1 for rows in forms.values())
    figures = {
        "forms": len(forms),
        "mentions": mentions,
        "words": len(first | later),
        "first_words": len(first),
        "forms_by_number_of_words": _counts(map(len, split)),
        "words_by_length": _counts(spelling.lengths.elements()),
        "forms_by_rows": _by_rows(forms.values()),
        "forms_in_one_row": once,
        "forms_in_one_row_share": once / len(forms) if forms else None,
        "good_turing_new_mentions": once / mentions if mentions else None,
        "vowels": [row["letter"] for row in letters if row["class"] == VOWEL],
        "digraphs": list(spelling.digraphs),
        "alpha": ALPHA,
        "alpha_marked": ALPHA_MARKED,
        "letters": letters,
    }
    return Section("coverage", figures, _findings(letters, len(first)))


def _counts(values: Iterable[int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def _by_rows(values: Iterable[int]) -> dict[str, int]:
    """Zipf's curve in five numbers: how many forms are in 1, 2, 3-5, 6-10, more rows."""
    counts = dict.fromkeys([name for name, _ in _ROWS] + [">10"], 0)
    for rows in values:
        counts[next((name for name, most in _ROWS if rows <= most), ">10")] += 1
    return counts


@dataclass
class _Spelling:
    """Pairs of letters that follow each other, in distinct words; the second of a pair is "" at the end of a word."""

    initial: Counter  # the first pair of first words
    later: Counter  # the first pair of later words
    starts: Counter  # the first pair of all words, each word once
    inside: Counter  # the other pairs of all words
    lengths: Counter  # letters of words, digraphs as one
    digraphs: tuple[str, ...] = ()

    @classmethod
    def of(cls, first: Mapping[str, None], later: Mapping[str, None], digraphs: tuple[str, ...] = ()) -> "_Spelling":
        letter = re.compile("|".join([*map(re.escape, digraphs), _LETTER]))
        spelling = cls(Counter(), Counter(), Counter(), Counter(), Counter(), digraphs)
        for word in first | later:
            units = letter.findall(word)
            spelling.lengths[len(units)] += 1
            pairs = list(zip(units, [*units[1:], ""], strict=True))
            spelling.starts[pairs[0]] += 1
            spelling.inside.update(pairs[1:])
            if word in first:
                spelling.initial[pairs[0]] += 1
            if word in later:
                spelling.later[pairs[0]] += 1
        found = () if digraphs else spelling.find_digraphs()
        return cls.of(first, later, found) if found else spelling

    def find_digraphs(self) -> tuple[str, ...]:
        places = _sum_by(self.starts, 0) + _sum_by(self.inside, 0)
        pairs = self.starts + self.inside
        return tuple(
            sorted(
                before + after
                for (before, after), count in pairs.items()
                if after and before != after and count >= max(MIN_DIGRAPH, DIGRAPH * min(places[before], places[after]))
            )
        )


def _sum_by(pairs: Counter, index: int, keep=lambda pair: True) -> Counter:
    sums: Counter = Counter()
    for pair, count in pairs.items():
        if keep(pair):
            sums[pair[index]] += count
    return sums


def _vowels(pairs: Counter) -> set[str]:
    """The letters that Sukhotin's algorithm, improved by single changes of side, takes for vowels."""
    import numpy as np

    letters = sorted({letter for pair in pairs for letter in pair if letter})
    base = {letter: unicodedata.normalize("NFD", letter)[0] for letter in letters}
    bases = sorted(set(base.values()))
    index = {letter: number for number, letter in enumerate(bases)}
    beside = np.zeros((len(bases), len(bases)))
    for (a, b), count in pairs.items():
        if b and base[a] != base[b]:
            beside[index[base[a]], index[base[b]]] += count
            beside[index[base[b]], index[base[a]]] += count

    side = -np.ones(len(bases))  # 1 vowel, -1 consonant
    sums = beside.sum(axis=1)
    while len(bases):
        best = int(np.where(side < 0, sums, 0).argmax())
        if side[best] > 0 or sums[best] <= 0:
            break
        side[best] = 1
        sums = sums - 2 * beside[:, best]
    # Each change makes more neighbours differ, so this ends.
    while len(bases):
        alike = side * (beside @ side)
        worst = int(alike.argmax())
        if alike[worst] <= 0:
            break
        side[worst] *= -1
    frequent = beside.sum(axis=1) >= 0.01 * beside.sum()
    if side[frequent].sum() > 0:
        side = -side
    return {letter for letter in letters if side[index[base[letter]]] > 0}


def _letters(spelling: _Spelling) -> list[dict]:
    initial, later = _sum_by(spelling.initial, 0), _sum_by(spelling.later, 0)
    inside = _sum_by(spelling.inside, 0)
    total = initial + later + inside
    listed = sorted(total, key=lambda letter: (-total[letter], letter))[:MAX_LETTERS]
    known = {*listed, ""}
    vowels = _vowels(
        Counter({pair: n for pair, n in (spelling.starts + spelling.inside).items() if known.issuperset(pair)})
    )

    def open_place(pair: tuple[str, str]) -> bool:
        return pair[1] != "" and (pair[0] in vowels or pair[1] in vowels)

    number = sum(spelling.initial.values())
    x_open, y_open = _sum_by(spelling.initial, 0, open_place), _sum_by(spelling.inside, 0, open_place)
    tests = []
    for members in ([letter for letter in listed if letter in vowels], [x for x in listed if x not in vowels]):
        places = {letter: (x_open[letter], y_open[letter]) for letter in members}
        common = {x for x in members if sum(places[x]) >= COMMON * number and not _marked(x)}
        tested = [letter for letter in members if sum(places[letter]) >= max(1, TESTED * number)]
        for test in _tail_tests(places, common, tested):
            if test.expected >= MIN_EXPECTED_SHARE * number:
                tests.append((GAP, test))
    words_of = {letter: (initial[letter], later[letter]) for letter in listed}
    common = {letter for letter in listed if sum(words_of[letter]) >= MIN_DIGRAPH}
    tested = [letter for letter in listed if later[letter] >= MIN_LATER]
    tests += [(GAP_ELSEWHERE, test) for test in _tail_tests(words_of, common, tested)]

    corrected = _holm([test.p for _, test in tests])
    results: dict[str, tuple] = {}  # of a letter, what tells most: a gap by direct evidence, a gap, a hint
    noticeable = {kind: set() for kind in (GAP, GAP_ELSEWHERE)}
    for kind, test in tests:
        if test.p_if_none * len(tests) < (ALPHA if kind == GAP_ELSEWHERE else _alpha(test.letter)):
            noticeable[kind].add(test.letter)
    order = (GAP_ELSEWHERE, GAP, RARE, FINE)
    for (kind, test), p in zip(tests, corrected, strict=True):
        few = initial[test.letter] <= max(STRAY, STRAY_SHARE * test.expected)
        alpha = ALPHA if kind == GAP_ELSEWHERE else _alpha(test.letter)
        verdict = FINE if not few else kind if p < alpha else RARE if test.p < HINT else FINE
        before = results.get(test.letter)
        if before is None or order.index(verdict) < order.index(before[0]):
            results[test.letter] = (verdict, test, p)
    rows = []
    for letter in listed:
        row = {"letter": letter, "initial": initial[letter], "later": later[letter], "inside": inside[letter]}
        row |= {"expected": None, "p": None, "p_corrected": None}
        row |= {"class": VOWEL if letter in vowels else CONSONANT, "verdict": UNTESTED}
        if letter in results:
            verdict, test, p = results[letter]
            row |= {"expected": test.expected, "p": test.p, "p_corrected": p, "verdict": verdict}
        row |= {"noticeable": letter in noticeable[GAP]}
        rows.append(row | {"noticeable_headwords": letter in noticeable[GAP_ELSEWHERE]})
    return rows


def _marked(letter: str) -> bool:
    """Whether a letter, or the first of a digraph, has a diacritic."""
    return any(map(unicodedata.combining, unicodedata.normalize("NFD", letter)[1:2]))


def _alpha(letter: str) -> float:
    return ALPHA_MARKED if _marked(letter) else ALPHA


@dataclass(frozen=True)
class _Test:
    letter: str
    expected: float
    p: float
    p_if_none: float  # p that the letter would have if all its x were left out


def _tail_tests(counts: Mapping[str, tuple[int, int]], common: set[str], tested: list[str]) -> list[_Test]:
    """P(x or fewer of x + y) for each tested letter with counts (x, y), given the counts of the other common letters.

    x ~ BetaBinomial(x + y, m s, (1 - m) s); mean m uniform on (0, 1), log s uniform from s = 0.5 to 2000, on a grid.
    """
    import numpy as np
    from scipy.special import betainc, betaln, gammaln, logsumexp

    logit, log_s = np.meshgrid(np.linspace(-7, 5, 73), np.linspace(np.log(0.5), np.log(2000), 20), indexing="ij")
    mean = (1 / (1 + np.exp(-logit))).ravel()
    a, b = mean * np.exp(log_s).ravel(), (1 - mean) * np.exp(log_s).ravel()
    log_prior = np.log(mean * (1 - mean))  # uniform in m on a grid of its logit

    def log_likelihood(x: int, y: int):
        return betaln(x + a, y + b) - betaln(a, b)

    of_common = {letter: log_likelihood(*counts[letter]) for letter in sorted(common)}
    together = log_prior + sum(of_common.values())
    tests = []
    for letter in tested:
        if len(common - {letter}) < MIN_OTHERS:
            continue
        x, y = counts[letter]
        n = x + y
        log_posterior = together - of_common.get(letter, 0)
        log_posterior = log_posterior - logsumexp(log_posterior)
        posterior = np.exp(log_posterior)
        if x <= 100:
            k = np.arange(x + 1)[:, None]
            choose = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
            p = np.exp(logsumexp(choose + betaln(k + a, n - k + b) - betaln(a, b) + log_posterior))
        else:  # the binomial's own spread is then small
            p = posterior @ betainc(a, b, (x + 0.5) / (n + 1))
        if_none = float(np.exp(logsumexp(betaln(a, y + b) - betaln(a, b) + log_posterior)))
        tests.append(_Test(letter, float(n * (posterior @ mean)), min(1.0, float(p)), if_none))
    return tests


def _holm(ps: list[float]) -> list[float]:
    """Holm's step-down corrected p values, in the order of ``ps``."""
    corrected, highest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, ps[index] * (len(ps) - rank)))
        corrected[index] = highest
    return corrected


def _findings(letters: list[dict], number: int) -> list[Finding]:
    tested = sum(row["verdict"] != UNTESTED for row in letters)
    findings = []
    if gaps := [row for row in letters if row["verdict"] in (GAP, GAP_ELSEWHERE)]:
        message = (
            f"hardly any of {number:,} first words begins with "
            f"{'; '.join(map(_describe, gaps))}: such words were probably left out, so the data is no fair sample of the "
            "language and no test can ask for them; find out from its author, or name the gap in every claim"
        )
        findings.append(_finding("initial_letter_gap", FAILURE, gaps, tested, message))
    if rare := [row for row in letters if row["verdict"] == RARE]:
        message = (
            f"hardly any of {number:,} first words begins with {'; '.join(map(_describe, rare))}: chance, a rule of the "
            "spelling, or words left out; the other letters differ too much to tell; ask someone who knows the language"
        )
        findings.append(_finding("never_initial", NOTE, rare, tested, message))
    return findings


def _describe(row: dict) -> str:
    text = (
        f"{row['letter']} ({row['initial']:,} words, about {row['expected']:,.0f} expected from its {row['inside']:,} "
        f"places inside words, p {row['p']:.1g}, corrected {row['p_corrected']:.1g}"
    )
    if row["verdict"] == GAP_ELSEWHERE:
        return text + f"; {row['later']:,} later words of phrases do begin with it, so the language has such words)"
    return text + ("; a rule of spelling for this letter alone would look the same)" if row["verdict"] == GAP else ")")


def _finding(kind: str, severity: str, rows: list[dict], tested: int, message: str) -> Finding:
    keys = ("letter", "initial", "later", "inside")
    examples = tuple(
        {key: str(row[key]) for key in keys}
        | {"expected": f"{row['expected']:.1f}", "p": f"{row['p']:.2g}", "p_corrected": f"{row['p_corrected']:.2g}"}
        | {"verdict": row["verdict"]}
        for row in rows[:MAX_EXAMPLES]
    )
    return Finding(kind, severity, len(rows), tested, "letters", message, examples=examples)
