"""One benchmark for a language, English, another language and arithmetic: what differs between its families is what is asked.

    pools = build_pools(["lexicon", "english", "english_split", "arithmetic"], tokenizer, entries, couples=100, seed=0)
    scored = {name: score(model, pool.pairs, batch_size=16) for name, pool in pools.items()}
    families = match(pools, scored, couples=100, reference="lexicon")
    print(balance(families, chosen_scores, reference="lexicon"))

1. Every prompt has one form, lines "key = value" of which the last lacks its value:

       lexicon      dog = wûsilo          an English meaning and a word of the lexicon (this one is invented)
       english      couch = sofa          a word and another that says the same
       french       dog = chien           an English meaning and a French word
       arithmetic   12 + 7 = 19           two numbers and their sum

   In the first three the asked line stands further up: the value is looked up there. Sums are not to be found above.
2. Pairs come in couples: a prompt that asks for a, and the same that asks for b. The lines a and b stand twice, in the order
   a b b a, which favours neither; other lines, between them, make a
   lexicon's prompts about LENGTH tokens long where its words allow that, and those of other families as long as the lexicon's.
3. Controls: english_split: English whose values are cut into as many tokens as the lexicon's words have; lexicon_scrambled: the
   same prompts as the lexicon's with the letters of its words in another order, in as many tokens; lexicon_shuffled: the same with the words'
   meanings dealt out anew. What a family shows and its control shows too is no property of the language.
4. More couples are made than needed. One couple is chosen for each of the reference family, so that tokens, entropy of
   the answer, accuracy and, where it can be chosen, tokens of the value are alike: optimal matching (Rosenbaum 1989) of standardised distances.
   ``balance`` shows how far that went: standardised mean differences, of which less than 0.1 is usually called
   balanced and more than 0.25 not (Stuart 2010, 1010.5586; Austin 2009).

The first tokens of both answers are scored (pairs.py). No form of the lexicon may be one that a model was trained on: it is for
the caller to pass such entries.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import regex
import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp.hooked import HookedModel
from stoney_rl.interp.pairs import PromptPair, UnfitPairError, batched, pair_of_ids, swapped, text_encoder
from stoney_rl.lexicon import LexiconEntry
from stoney_rl.text import fold

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAMILIES = ("lexicon", "english", "french", "arithmetic")
CONTROLS = ("english_split", "lexicon_scrambled", "lexicon_shuffled")
ALIGNED = (
    "lexicon_scrambled",
    "lexicon_shuffled",
)  # controls that have a couple for each of the lexicon's, by its cluster
MEANING_IS_KEY = ("lexicon", *ALIGNED, "french", "english", "english_split")
WORDLISTS = Path(__file__).parent / "wordlists"

POOL = 1.3  # couples that are made for each that is wanted, where words last
LENGTH = 46  # tokens of a prompt, about: five lines of words of five tokens
# Tokens of a value and words of a key at most: longer ones make prompts long, so they are taken where shorter ones are too few.
LIMITS = ((8, 2), (12, 4))
LARGEST = 30  # operand of a sum
MOST_LINES = 24  # that are drawn for a prompt, besides the couple's own
TRIES = 200  # orders of a word's letters, cuts of a word

BALANCED, UNBALANCED = 0.1, 0.25
COVARIATES = ("tokens", "entropy", "right", "value_tokens")


@dataclass(frozen=True)
class Fact:
    """A line "key = value". ``lexeme``: facts with the same one depend on one another. ``cut``: token ids in the place of the
    value's own, where it is cut on purpose."""

    key: str
    value: str
    lexeme: str
    cut: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Family:
    """``pairs``: couples, each pair followed by its ``swapped`` one; ``answer_ids`` of each: the value's tokens and one that ends it.
    ``meanings``: of each pair's value in English, where it is a word. ``skipped``: why there are no more couples, with counts."""

    name: str
    pairs: tuple[PromptPair, ...]
    meanings: tuple[str | None, ...]
    skipped: tuple[str, ...] = ()

    @property
    def clusters(self) -> list[str]:
        return [pair.cluster for pair in self.pairs]

    def describe(self) -> str:
        return "\n".join(
            [f"{self.name}: {len(self.pairs)} pairs can be asked", *(f"  {reason}" for reason in self.skipped)]
        )

    def couples(self, places: Sequence[int]) -> "Family":
        """The couples at ``places``, counted in couples, in that order."""
        rows = [row for place in places for row in (2 * place, 2 * place + 1)]
        pairs, meanings = (tuple(field[row] for row in rows) for field in (self.pairs, self.meanings))
        return replace(self, pairs=pairs, meanings=meanings)


# Making pools of couples


def build_pools(
    families: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    entries: Sequence[LexiconEntry],
    *,
    couples: int,
    seed: int,
) -> dict[str, Family]:
    """Couples of each family (names of FAMILIES and CONTROLS), of the lexicon's at most as many as its words give.

    Same arguments, same couples. Raises ``StoneyError`` for a name that is none, and for a family without any couple.
    """
    unknown = [name for name in families if name not in (*FAMILIES, *CONTROLS)]
    if unknown:
        raise StoneyError(f"no family is called {unknown[0]!r}; there are {', '.join((*FAMILIES, *CONTROLS))}")
    wanted = round(POOL * couples)
    for limits in LIMITS:
        facts = lexicon_facts(entries, tokenizer, seed, limits)
        if len(facts) > 2 * wanted:
            break
    # The lexicon decides how long prompts are and into how many tokens words are cut; without one, what is usual.
    sizes, lengths = [_size(tokenizer, fact.value) for fact in facts] or [5], [LENGTH]
    if any(name.startswith("lexicon") for name in families):
        lengths = [
            len(pair.clean) for pair in _dictionary_family("lexicon", facts, tokenizer, wanted, seed, [LENGTH]).pairs
        ]
    makers: dict[str, Callable[[], Sequence[Fact]]] = {
        "lexicon": lambda: facts,
        "lexicon_scrambled": lambda: _scrambled_facts(facts, tokenizer, seed),
        "lexicon_shuffled": lambda: _shuffled_facts(facts, tokenizer, seed),
        "english": lambda: listed_facts("english"),
        "french": lambda: listed_facts("french"),
        "english_split": lambda: _cut_facts(listed_facts("english"), tokenizer, sizes, seed),
    }
    return {
        name: _arithmetic_family(tokenizer, wanted, seed, lengths)
        if name == "arithmetic"
        else _dictionary_family(
            name, makers[name](), tokenizer, wanted, seed, [LENGTH] if name.startswith("lexicon") else lengths
        )
        for name in families
    }


def lexicon_facts(
    entries: Sequence[LexiconEntry],
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    limits: tuple[int, int] = LIMITS[0],
) -> list[Fact]:
    """Meaning and form of each lexeme's first entry within ``limits`` (tokens of the form, words of the meaning) whose letters
    can be scrambled, so that the control has the same prompts; each meaning once."""
    rng = random.Random(f"lexicon {seed}")
    forms = {fold(entry.form) for entry in entries}
    found: dict[str, Fact] = {}
    taken: set[str] = set()  # keys
    for entry in entries:
        if not entry.glosses:
            continue
        key, value = entry.glosses[0][0].removeprefix("to "), entry.form
        lexeme = fold(entry.stem or entry.form)
        plain = (
            regex.fullmatch(r"\p{L}[\p{L}' -]*", key)
            and len(key.split()) <= limits[1]
            and not regex.search(r"[\n=]", value)
        )
        if not plain or lexeme in found or fold(key) in taken:
            continue
        if _size(tokenizer, value) <= limits[0] and scrambled(value, tokenizer, rng, forms):
            found[lexeme] = Fact(key, value, lexeme)
            taken.add(fold(key))
    return list(found.values())


def listed_facts(language: str) -> list[Fact]:
    """The words of ``wordlists/<language>.txt``: English words with a synonym, or English words in French."""
    lines = (WORDLISTS / f"{language}.txt").read_text(encoding="utf-8").splitlines()
    return [Fact(key, value, f"{key} {value}") for key, value in (line.split(": ") for line in lines)]


def scrambled(
    form: str, tokenizer: "PreTrainedTokenizerBase", rng: random.Random, forms: set[str] = frozenset()
) -> str | None:
    """The letters of ``form`` in another order that takes as many tokens and is none of ``forms`` (folded); None if none is found.

    Letters keep their marks (grapheme clusters); a capital stays in front.
    """
    letters = regex.findall(r"\X", form.lower())
    size, capital = _size(tokenizer, form), form[:1].isupper()
    for _ in range(TRIES):
        rng.shuffle(letters)
        other = "".join(letters)
        other = other[:1].upper() + other[1:] if capital else other
        if fold(other) != fold(form) and fold(other) not in forms and _size(tokenizer, other) == size:
            return other
    return None


def cut_into(tokenizer: "PreTrainedTokenizerBase", text: str, size: int, rng: random.Random) -> tuple[int, ...] | None:
    """``text`` as exactly ``size`` tokens of the vocabulary, the cut drawn evenly among all there are; None if there is none.

    Other than BPE-dropout (Provilkov et al. 1910.13267), it gives the number of tokens that is asked for.
    """
    spelled = "".join(tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"]))
    vocabulary = tokenizer.get_vocab()
    n = len(spelled)
    ways = [[0] * (n + 1) for _ in range(size + 1)]  # ways[k][i]: cuts of the first i letters into k tokens
    ways[0][0] = 1
    for k in range(1, size + 1):
        for end in range(1, n + 1):
            ways[k][end] = sum(ways[k - 1][start] for start in range(end) if spelled[start:end] in vocabulary)
    if not ways[size][n]:
        return None
    tokens, end = [], n
    for k in range(size, 0, -1):
        starts = [start for start in range(end) if ways[k - 1][start] and spelled[start:end] in vocabulary]
        start = rng.choices(starts, weights=[ways[k - 1][start] for start in starts])[0]
        tokens.append(vocabulary[spelled[start:end]])
        end = start
    return tuple(reversed(tokens))


def _scrambled_facts(facts: Sequence[Fact], tokenizer: "PreTrainedTokenizerBase", seed: int) -> list[Fact]:
    rng, forms = random.Random(f"scrambled {seed}"), {fold(fact.value) for fact in facts}
    doubles = [scrambled(fact.value, tokenizer, rng, forms) for fact in facts]
    return [replace(fact, value=double or fact.value) for fact, double in zip(facts, doubles, strict=True)]


def _shuffled_facts(facts: Sequence[Fact], tokenizer: "PreTrainedTokenizerBase", seed: int) -> list[Fact]:
    """The values dealt out anew among those of as many tokens, none to its own key."""
    rng, by_size = random.Random(f"shuffled {seed}"), defaultdict(list)
    for place, fact in enumerate(facts):
        by_size[_size(tokenizer, fact.value)].append(place)
    values = {}
    for places in by_size.values():
        rng.shuffle(places)
        values |= {place: facts[other].value for place, other in zip(places, [*places[1:], places[0]], strict=True)}
    return [replace(fact, value=values[place]) for place, fact in enumerate(facts)]


def _cut_facts(
    facts: Sequence[Fact], tokenizer: "PreTrainedTokenizerBase", sizes: Sequence[int], seed: int
) -> list[Fact]:
    """The facts whose values can be cut into a number of tokens drawn from ``sizes``. Raises ``StoneyError`` if none can."""
    rng = random.Random(f"cut {seed}")
    cuts = [cut_into(tokenizer, f" {fact.value}", min(rng.choice(sizes), len(fact.value)), rng) for fact in facts]
    if not any(cuts):
        raise StoneyError(
            f"english_split: no English word can be cut into {min(sizes)} to {max(sizes)} tokens of this vocabulary; "
            "leave it out (--controls without it)"
        )
    return [replace(fact, cut=cut) for fact, cut in zip(facts, cuts, strict=True) if cut]


def _dictionary_family(
    name: str,
    facts: Sequence[Fact],
    tokenizer: "PreTrainedTokenizerBase",
    wanted: int,
    seed: int,
    lengths: Sequence[int],
) -> Family:
    """Couples of two facts each, no fact in two; the other lines of a prompt may stand in several. ``lengths``: in tokens, of
    which a couple's is drawn."""
    # Aligned families draw the same, as their keys and the tokens of their values are the same.
    rng, left_out = random.Random(f"couples {name.split('_')[0]} {seed}"), Counter()
    by_size: dict[int, list[Fact]] = defaultdict(list)
    for fact in rng.sample(list(facts), len(facts)):
        by_size[len(tokenizer(f"\n{fact.key} =", add_special_tokens=False)["input_ids"])].append(fact)
    candidates = [pair for _, group in sorted(by_size.items()) for pair in zip(group[::2], group[1::2], strict=False)]
    rng.shuffle(candidates)
    couples: list[_Couple] = []
    for a, b in candidates:
        others = rng.sample(list(facts), min(len(facts), MOST_LINES))
        places = [rng.random() for _ in others]
        if len(couples) == wanted:
            break
        own = {a.key, b.key, a.value, b.value}
        fillers = [
            (fact, place) for fact, place in zip(others, places, strict=True) if not {fact.key, fact.value} & own
        ]

        def make(n: int, a: Fact = a, b: Fact = b, fillers: Sequence = fillers) -> _Couple:
            rows = [a, b, b, a]
            for fact, place in fillers[:n]:
                rows.insert(round(place * len(rows)), fact)
            return _couple(name, tokenizer, rows, a, b)

        _add(couples, left_out, make, len(fillers), rng.choice(lengths))
    return _family(name, couples, wanted, left_out)


def _arithmetic_family(tokenizer: "PreTrainedTokenizerBase", wanted: int, seed: int, lengths: Sequence[int]) -> Family:
    """Couples of two sums that share the first number; no sum is asked for twice, none has a line with either answer."""
    rng, left_out = random.Random(f"couples arithmetic {seed}"), Counter()
    couples: list[_Couple] = []
    asked: set[tuple[int, int]] = set()
    for _ in range(20 * wanted):
        first, *seconds = rng.choices(range(LARGEST + 1), k=3)
        sums = {(first, second) for second in seconds}
        if len(couples) == wanted:
            break
        if len(sums) < 2 or asked & sums:
            continue
        a, b = (_sum(numbers) for numbers in sorted(sums))
        others = [_sum(rng.choices(range(LARGEST + 1), k=2)) for _ in range(MOST_LINES)]
        rows = [fact for fact in others if fact.value not in (a.value, b.value)]
        make = partial(_sums_couple, tokenizer, rows, a, b)
        if _add(couples, left_out, make, len(rows), rng.choice(lengths)):
            asked |= sums
    return _family("arithmetic", couples, wanted, left_out)


def _sums_couple(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Fact], a: Fact, b: Fact, n: int) -> "_Couple":
    return _couple("arithmetic", tokenizer, rows[:n], a, b)


def _sum(numbers: Sequence[int]) -> Fact:
    one, other = numbers
    return Fact(f"{one} + {other}", str(one + other), f"{one}+{other}")


# A couple: its first pair, and both values' meanings
_Couple = tuple[PromptPair, tuple[str | None, str | None]]


def _add(couples: list[_Couple], left_out: Counter, make: Callable[[int], _Couple], most: int, length: int) -> bool:
    """Add what ``make`` gives with the number of other lines, up to ``most``, that comes closest to ``length`` tokens."""
    best = None
    try:
        for n in range(most + 1):
            made = make(n)
            distance = abs(len(made[0].prompt) - length)
            if best and distance >= best[0]:
                break
            best = distance, made
    except UnfitPairError as problem:
        left_out[str(problem)] += 1
        return False
    couples.append(best[1])
    return True


def _couple(name: str, tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Fact], a: Fact, b: Fact) -> _Couple:
    encode = text_encoder(tokenizer)
    above = "".join(f"{fact.key} = {fact.value}\n" for fact in rows)
    prompts = [f"{above}{fact.key} =" for fact in (a, b)]
    ids, answers = [], []
    for prompt, fact in zip(prompts, (a, b), strict=True):
        front, answer = encode(prompt, f" {fact.value}\n")
        word = encode(prompt, f" {fact.value}")[1][:-1]
        ids.append(front)
        answers.append(answer[: len(word) + 1])
    for fact in (*rows, a, b):
        if fact.cut:
            natural = tuple(tokenizer(f" {fact.value}", add_special_tokens=False)["input_ids"])
            ids, answers = ([_replaced(one, natural, fact.cut) for one in both] for both in (ids, answers))
    texts = (*prompts, f" {a.value}", f" {b.value}")
    pair = pair_of_ids(*ids, *answers, family=name, cluster="|".join(sorted({a.lexeme, b.lexeme})), texts=texts)
    return pair, ((a.key, b.key) if name in MEANING_IS_KEY else (None, None))


def _replaced(ids: Sequence[int], old: tuple[int, ...], new: tuple[int, ...]) -> list[int]:
    """``ids`` with every run of ``old`` replaced."""
    found, at = [], 0
    while at < len(ids):
        here = tuple(ids[at : at + len(old)]) == old
        found += new if here else [ids[at]]
        at += len(old) if here else 1
    return found


def _family(name: str, couples: Sequence[_Couple], wanted: int, left_out: Counter) -> Family:
    if not couples:
        reasons = (
            "; ".join(f"{count} {reason}" for reason, count in left_out.most_common(3))
            or f"too few words of at most {LIMITS[-1][0]} tokens with a meaning of at most {LIMITS[-1][1]} words"
        )
        raise StoneyError(f"{name}: no couple of prompts can be made ({reasons})")
    pairs, meanings = [], []
    for pair, known in couples:
        pairs += [pair, swapped(pair)]
        meanings += known
    skipped = [f"{count} couples unfit: {reason}" for reason, count in left_out.most_common()]
    if len(couples) < wanted:
        skipped.insert(0, f"{len(couples)} couples, {wanted} were looked for")
    return Family(name, tuple(pairs), tuple(meanings), tuple(skipped))


def _size(tokenizer: "PreTrainedTokenizerBase", value: str) -> int:
    return len(tokenizer(f" {value}", add_special_tokens=False)["input_ids"])


def own_family(name: str, pairs: Sequence[PromptPair]) -> Family:
    """A family of a user's own pairs: each becomes a couple with its swapped pair."""
    couples = [one for pair in pairs for one in (pair, swapped(pair))]
    return Family(name, tuple(couples), (None,) * len(couples))


# Scoring, matching


def score(model: HookedModel, pairs: Sequence[PromptPair], *, batch_size: int) -> dict[str, np.ndarray]:
    """Of each clean prompt, float32 [pair]: m (logit of the answer minus of the wrong one), right (1 where m > 0, 0.5 where 0),
    top (whether no token is likelier), entropy of the next token (nats)."""
    found = {key: np.zeros(len(pairs), dtype=np.float32) for key in ("m", "right", "top", "entropy")}
    for rows, batch in batched(pairs, batch_size, model.pad_token_id):
        logits = model.run(batch.clean, last=True).logits
        log_probabilities = logits[:, -1].float().log_softmax(-1)
        m = batch.difference(logits)
        values = {
            "m": m,
            "right": (m > 0).float() + 0.5 * (m == 0).float(),
            "top": (log_probabilities.argmax(-1).cpu() == batch.answer).float(),
            "entropy": torch.special.entr(log_probabilities.exp()).sum(-1),
        }
        for key, value in values.items():
            found[key][rows] = value.cpu().numpy()
    return found


def covariates(family: Family, scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of each couple, the mean of its two pairs, float64 [couple, covariate] in the order of COVARIATES."""
    tokens = [len(pair.clean) for pair in family.pairs]
    values = [tokens, scores["entropy"], scores["right"], [len(pair.answer_ids) - 1 for pair in family.pairs]]
    return np.array(values, dtype=np.float64).T.reshape(-1, 2, len(COVARIATES)).mean(axis=1)


def match(
    pools: Mapping[str, Family], scores: Mapping[str, Mapping[str, np.ndarray]], *, couples: int, reference: str
) -> dict[str, list[int]]:
    """For each pool the places of at most ``couples`` couples, of all as many, the n-th of each fitting the n-th of
    ``reference`` (the module's 4.).

    The reference's are its first ones that all aligned controls have too.
    """
    from scipy.optimize import linear_sum_assignment

    own = pools[reference]
    names = own.clusters[::2]
    aligned = {name: pools[name].clusters[::2] for name in ALIGNED if name in pools and reference == "lexicon"}
    kept = [place for place, name in enumerate(names) if all(name in others for others in aligned.values())]
    kept = kept[: min(couples, *(len(pool.pairs) // 2 for pool in pools.values()))]
    if not kept:
        raise StoneyError(f"{reference}: none of its couples is among those of {' and '.join(aligned)}")
    target = covariates(own, scores[reference])[kept]
    chosen = {reference: kept}
    for name, pool in pools.items():
        if name in aligned:
            chosen[name] = [aligned[name].index(names[place]) for place in kept]
        elif name != reference:
            found = covariates(pool, scores[name])
            spread = np.sqrt((target.var(axis=0) + found.var(axis=0)) / 2)
            # Where a family has no choice, as natural words in their tokens, a difference that all share only adds noise.
            free = spread > 0
            free[COVARIATES.index("value_tokens")] &= name == "english_split"
            distance = (np.abs(target[:, None] - found[None]) / np.where(spread > 0, spread, 1))[..., free].sum(-1)
            rows, columns = linear_sum_assignment(distance)
            chosen[name] = columns[np.argsort(rows)].tolist()
    return {name: chosen[name] for name in pools}


def balance(
    families: Mapping[str, Family], scores: Mapping[str, Mapping[str, np.ndarray]], *, reference: str
) -> list[dict]:
    """A row a family: name, pairs, clusters, mean of each covariate, top, and ``smd``, each covariate's difference to the
    reference in standard deviations (their pooled one; None where nothing varies)."""
    target = covariates(families[reference], scores[reference])
    rows = []
    for name, family in families.items():
        values = covariates(family, scores[name])
        spread = np.sqrt((values.var(axis=0) + target.var(axis=0)) / 2)
        shift = values.mean(axis=0) - target.mean(axis=0)
        smd = [float(d / s) if s > 0 else (0.0 if d == 0 else None) for d, s in zip(shift, spread, strict=True)]
        rows.append(
            {"family": name, "pairs": len(family.pairs), "clusters": len(set(family.clusters))}
            | dict(zip(COVARIATES, values.mean(axis=0).tolist(), strict=True))
            | {"top": float(scores[name]["top"].mean()), "smd": dict(zip(COVARIATES, smd, strict=True))}
        )
    return rows


def describe(rows: Sequence[Mapping]) -> str:
    """The table that ``balance`` gives, for a terminal: means, and in brackets the distance to the reference in standard deviations."""
    lines = ["family               pairs  tokens        entropy       right         tokens of the value"]
    for row in rows:
        cells = []
        for key, form in (("tokens", ".1f"), ("entropy", ".2f"), ("right", ".2f"), ("value_tokens", ".2f")):
            shift = row["smd"][key]
            mark = "" if shift is None or abs(shift) <= UNBALANCED else "!"
            cells.append(
                f"{format(row[key], form)} ({'-' if shift is None else format(shift, '+.2f')}){mark}".ljust(14)
            )
        lines.append(f"{row['family']:20s} {row['pairs']:5d}  {''.join(cells)}".rstrip())
    lines.append(
        f"in brackets: from the first family, in standard deviations; up to {BALANCED} is balanced, '!' marks more than {UNBALANCED}"
    )
    return "\n".join(lines)
