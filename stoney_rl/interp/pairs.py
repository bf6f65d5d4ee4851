"""Prompt pairs: two prompts of equal length that ask for different answers, scored at the first token that differs.

    found = read_pairs("pairs.jsonl", tokenizer)                              # a file of the user's own
    found = build(read_lexicon("lexicon.jsonl"), tokenizer, "lookup", n=64, seed=0)
    print(found.describe())                                                   # how many, what was left out, and why

A Stoney word takes several tokens and two words often begin alike, so a pair is never scored on 'the answer token'. The
tokens that both answers begin with are put behind both prompts; what follows is where the answers part, and there

    difference = logit[answer] - logit[wrong]

is positive for a model that knows the clean prompt's answer, and negative on the corrupt prompt for one that knows that.

A file of pairs holds one JSON object a line: ``clean``, ``corrupt`` (prompts), ``answer``, ``wrong``; also ``family``,
``cluster`` (texts) and ``chat``: true for user messages, which the model's chat template wraps (the default), false for
text as it is. The families that ``build`` makes of a lexicon:

lookup          a small dictionary of two words, as text; one of them is looked up: reading from the context
lookup_form     the same from meaning to word: the beginning of a word of the language must be copied
lookup_english  'lookup' with English words: beside it, 'lookup' shows what the language costs (and what knowing the
                words helps: English could be answered without the dictionary)
recall          a chat question for one word's meaning, without help: knowledge of the lexicon
affix           a chat question for a form of a verb, "I run" or "you run": knowledge of an affix, or of the form
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stoney_rl import planted, reading
from stoney_rl.errors import StoneyError
from stoney_rl.interp.hooked import Batch, by_length, left_padded
from stoney_rl.interp.words import is_whole, split_words, token_bytes
from stoney_rl.lexicon import LexiconEntry
from stoney_rl.prompts import encode_example, end_of_turn_ids
from stoney_rl.text import fold, normalize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# (prompt, answer) -> token ids of the prompt, and of the answer and what ends it
_Encoder = Callable[[str, str], tuple[list[int], list[int]]]

NAMED = 5  # bad lines that an error names
TRIED = 8  # partners that are tried for one whose answer parts at a whole character


@dataclass(frozen=True)
class PromptPair:
    """``clean`` and ``corrupt``: token ids, as many of the one as of the other, up to the scored token.

    ``answer``: the id that the clean prompt asks for; ``wrong``: the one that the corrupt prompt asks for. ``cluster``:
    pairs that share it depend on one another (a lexeme). ``texts``: clean prompt, corrupt prompt, answer, wrong answer,
    for people. ``answer_ids``, ``wrong_ids``: the whole answers and what ends them, as they stand behind the prompts;
    empty where only the scored tokens are known.
    """

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answer: int
    wrong: int
    cluster: str
    family: str
    texts: tuple[str, str, str, str]
    answer_ids: tuple[int, ...] = ()
    wrong_ids: tuple[int, ...] = ()

    @property
    def shared(self) -> int:
        """How many tokens both answers begin with; they are the last ones of ``clean`` and of ``corrupt``."""
        return _parted(self.answer_ids, self.wrong_ids) if self.answer_ids and self.wrong_ids else 0

    @property
    def prompt(self) -> tuple[int, ...]:
        """The clean prompt alone, without any token of an answer."""
        return self.clean[: len(self.clean) - self.shared]


@dataclass(frozen=True)
class PairBatch:
    """Pairs as tensors. The rows of ``clean`` and ``corrupt`` fit each other position by position."""

    clean: Batch
    corrupt: Batch
    answer: torch.Tensor  # int64 [pair]
    wrong: torch.Tensor

    def __len__(self) -> int:
        return len(self.answer)

    def difference(self, logits: torch.Tensor) -> torch.Tensor:
        """logit[answer] - logit[wrong] at the last position, float32 [pair], from logits [pair, position, vocabulary]."""
        last = logits[:, -1].float()
        rows = torch.arange(len(self), device=last.device)
        return last[rows, self.answer.to(last.device)] - last[rows, self.wrong.to(last.device)]


def batched(pairs: Sequence[PromptPair], size: int, pad_token_id: int) -> list[tuple[list[int], PairBatch]]:
    """Batches of at most ``size`` pairs of similar length, each with the pairs' positions in ``pairs``."""
    chunks = by_length([len(pair.clean) for pair in pairs], size)
    return [(chunk, _as_batch([pairs[index] for index in chunk], pad_token_id)) for chunk in chunks]


def over_pairs(
    pairs: Sequence[PromptPair],
    size: int,
    pad_token_id: int,
    measure: Callable[[list[int], PairBatch], dict[str, torch.Tensor]],
    what: str = "pairs",
) -> dict[str, torch.Tensor]:
    """What ``measure`` gives for each batch of at most ``size`` pairs, put together: [pair, ...] in the order of
    ``pairs``.

    ``measure``: the pairs' positions in ``pairs`` and their batch -> tensors [pair, ...]; they are taken to the CPU.
    ``what``: on the progress bar. Raises ``StoneyError`` without a pair.
    """
    from tqdm import tqdm

    if not pairs:
        raise StoneyError(f"{what}: no prompt pair was given")
    batches = tqdm(batched(pairs, size, pad_token_id), desc=what, unit="batch", delay=3)
    parts = [(rows, measure(rows, batch)) for rows, batch in batches]
    order = torch.tensor([row for rows, _ in parts for row in rows]).argsort()
    return {key: torch.cat([found[key].cpu() for _, found in parts])[order] for key in parts[0][1]}


def _as_batch(pairs: Sequence[PromptPair], pad_token_id: int) -> PairBatch:
    return PairBatch(
        left_padded([pair.clean for pair in pairs], pad_token_id),
        left_padded([pair.corrupt for pair in pairs], pad_token_id),
        torch.tensor([pair.answer for pair in pairs]),
        torch.tensor([pair.wrong for pair in pairs]),
    )


class UnfitPairError(StoneyError):
    """The texts are a pair, but not under this tokenizer; the message is the reason."""


@dataclass(frozen=True)
class PairSet:
    """``pairs``; ``whole``: how many of them are scored at two tokens that are whole characters, neither half a letter;
    ``skipped``: what was left out and why, each reason with its count or its line."""

    pairs: tuple[PromptPair, ...]
    whole: int
    skipped: tuple[str, ...] = ()

    def describe(self) -> str:
        families = ", ".join(f"{count} {name}" for name, count in Counter(pair.family for pair in self.pairs).items())
        lines = [f"{len(self.pairs)} prompt pairs ({families}); {self.whole} part at whole characters"]
        return "\n".join([*lines, *(f"  left out: {reason}" for reason in self.skipped)])


def make_pair(
    tokenizer: "PreTrainedTokenizerBase",
    clean: str,
    corrupt: str,
    answer: str,
    wrong: str,
    *,
    family: str = "pairs",
    cluster: str | None = None,
    chat: bool = True,
) -> PromptPair:
    """The pair of these texts, up to the first token at which the answers part.

    Where one answer begins like the whole other, that token ends the turn (without ``chat``: the text). ``cluster``: the
    two answers in alphabetical order, unless given. Raises ``UnfitPairError`` if the prompts differ in their number of
    tokens, are the same, or lead to other tokens for the same answer.
    """
    encode = _chat_encoder(tokenizer) if chat else text_encoder(tokenizer)
    clean_ids, answer_ids = encode(clean, answer)
    corrupt_ids, wrong_ids = encode(corrupt, wrong)
    if encode(clean, wrong)[1] != wrong_ids or encode(corrupt, answer)[1] != answer_ids:
        raise UnfitPairError("an answer has other tokens behind the clean prompt than behind the corrupt one")
    return pair_of_ids(
        clean_ids, corrupt_ids, answer_ids, wrong_ids,
        family=family, cluster=cluster or "|".join(sorted((answer, wrong))), texts=(clean, corrupt, answer, wrong),
    )  # fmt: skip


def pair_of_ids(
    clean_ids: Sequence[int],
    corrupt_ids: Sequence[int],
    answer_ids: Sequence[int],
    wrong_ids: Sequence[int],
    *,
    family: str,
    cluster: str,
    texts: tuple[str, str, str, str],
) -> PromptPair:
    """``make_pair`` of token ids: of both prompts, and of both answers up to and with what ends them."""
    if len(clean_ids) != len(corrupt_ids):
        raise UnfitPairError(f"the clean prompt has {len(clean_ids)} tokens, the corrupt one {len(corrupt_ids)}")
    if list(clean_ids) == list(corrupt_ids):
        raise UnfitPairError("the clean and the corrupt prompt are the same")
    if list(answer_ids) == list(wrong_ids):
        raise UnfitPairError("the answers are the same tokens")
    parted = _parted(answer_ids, wrong_ids)
    shared = answer_ids[:parted]
    return PromptPair(
        clean=(*clean_ids, *shared),
        corrupt=(*corrupt_ids, *shared),
        answer=answer_ids[parted],
        wrong=wrong_ids[parted],
        cluster=cluster,
        family=family,
        texts=texts,
        answer_ids=tuple(answer_ids),
        wrong_ids=tuple(wrong_ids),
    )


def _parted(answer_ids: Sequence[int], wrong_ids: Sequence[int]) -> int:
    """The first place at which two answers differ."""
    return next(at for at, (one, other) in enumerate(zip(answer_ids, wrong_ids, strict=False)) if one != other)


def swapped(pair: PromptPair) -> PromptPair:
    """The same pair with the corrupt prompt as the clean one."""
    clean, corrupt, answer, wrong = pair.texts
    return replace(
        pair, clean=pair.corrupt, corrupt=pair.clean, answer=pair.wrong, wrong=pair.answer,
        texts=(corrupt, clean, wrong, answer), answer_ids=pair.wrong_ids, wrong_ids=pair.answer_ids,
    )  # fmt: skip


def _chat_encoder(tokenizer: "PreTrainedTokenizerBase") -> _Encoder:
    """Tokens of the prompt, and of the answer with the token that ends its turn, as training has them."""
    ends = end_of_turn_ids(tokenizer)

    def encode(prompt: str, answer: str) -> tuple[list[int], list[int]]:
        example = encode_example(tokenizer, [{"role": "user", "content": prompt}], answer, ends)
        start = example["labels"].count(-100)
        return example["input_ids"][:start], example["input_ids"][start:]

    return encode


def text_encoder(tokenizer: "PreTrainedTokenizerBase") -> _Encoder:
    """The same for text as it is: the tokenizer's own BOS in front, its end-of-sequence token behind."""

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    has_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    front = [tokenizer.bos_token_id] * has_bos

    def encode(prompt: str, answer: str) -> tuple[list[int], list[int]]:
        ids, whole = tokens(prompt), tokens(prompt + answer)
        # Where a token merged across the boundary: keep what the model is asked with.
        rest = whole[len(ids) :] if whole[: len(ids)] == ids else tokens(answer)
        return front + ids, [*rest, tokenizer.eos_token_id]

    return encode


def parts_at_whole_characters(tokenizer: "PreTrainedTokenizerBase", pair: PromptPair) -> bool:
    """Whether both tokens at which the answers part are whole characters; inside one, neither could be."""
    return all(map(is_whole, token_bytes(tokenizer, (pair.answer, pair.wrong))))


@dataclass(frozen=True)
class Difference:
    """Tokens ``start`` to ``end`` (half-open): ``clean`` stands there in the one prompt, ``corrupt`` in the other."""

    start: int
    end: int
    clean: str
    corrupt: str


def differences(tokenizer: "PreTrainedTokenizerBase", pair: PromptPair) -> list[Difference]:
    """Where the prompts of a pair differ, in whole words of both, in order."""
    clean, corrupt = (split_words(tokenizer, ids) for ids in (pair.clean, pair.corrupt))
    ends = sorted({word.end for word in clean} & {word.end for word in corrupt})
    found = []
    for start, end in zip([0, *ends], ends, strict=False):
        if pair.clean[start:end] != pair.corrupt[start:end]:
            texts = ("".join(w.text for w in words if start <= w.start < end) for words in (clean, corrupt))
            found.append(Difference(start, end, *texts))
    return found


# A file of pairs


def read_pairs(path: str | Path, tokenizer: "PreTrainedTokenizerBase") -> PairSet:
    """The pairs of a file (see the module's docstring), in its order.

    Raises ``StoneyError`` for lines that are no pair (the first few are named, with the reason) and if no pair is left.
    Pairs that do not fit this tokenizer are left out: ``skipped`` has a line for each.
    """
    pairs, skipped, bad = [], [], []
    for record in _records(path):
        try:
            values = _values(record)
        except ValueError as problem:
            bad.append(f"line {record.line}: {problem}")
            continue
        try:
            pairs.append(make_pair(tokenizer, **values))
        except UnfitPairError as problem:
            skipped.append(f"line {record.line}: {problem}")
    if bad:
        more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise StoneyError(f"{path}: {len(bad)} lines are no prompt pair: {'; '.join(bad[:NAMED])}{more}")
    return _pair_set(tokenizer, pairs, skipped, str(path))


def _records(path: str | Path) -> Iterator[reading.Record]:
    file = Path(path).expanduser()
    if not file.exists() or not reading.is_data_name(file.name):
        problem = "is of no kind that can be read" if file.exists() else "does not exist"
        raise StoneyError(
            f'{path} {problem}; expected JSON lines such as {{"clean": ..., "corrupt": ..., "answer": ..., "wrong": ...}}'
        )
    try:
        for part in reading.files_at(file, reading.printable(file.name)):
            yield from reading.read_records(part)
    except reading.file_errors() as error:
        raise StoneyError(f"{path} can't be read: {reading.plain(error)}; check that it is whole") from None


def _values(record: reading.Record) -> dict:
    """What ``make_pair`` takes. Raises ``ValueError`` with the reason."""
    value = record.value
    if record.problem or not isinstance(value, dict):
        raise ValueError(record.problem or "not an object")
    for key in ("clean", "corrupt", "answer", "wrong"):
        if key not in value:
            raise ValueError(f"{key} is missing")
    chat = value.get("chat", True)
    if not isinstance(chat, bool):
        raise ValueError("chat is neither true nor false")
    texts = {}
    for key in ("clean", "corrupt", "answer", "wrong", "family", "cluster"):
        if key in value:
            if not isinstance(value[key], str) or not value[key].strip():
                raise ValueError(f"{key} is not a text")
            texts[key] = normalize(value[key]) if chat else _normalize_inside(value[key])
    if unknown := sorted(set(value) - set(texts) - {"chat"}):
        raise ValueError(f"unknown key {reading.printable(unknown[0])!r}")
    if texts["answer"] == texts["wrong"]:
        raise ValueError("answer and wrong are the same")
    return texts | {"chat": chat}


def _normalize_inside(text: str) -> str:
    """Normalised, with the space at its edges kept: it matters where no template stands around the text."""
    bare = text.strip()
    before, _, after = text.partition(bare)
    return before + normalize(bare) + after


def _pair_set(
    tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[PromptPair], skipped: Sequence[str], where: str
) -> PairSet:
    if not pairs:
        reasons = "; ".join(skipped[:NAMED]) or "it holds none"
        raise StoneyError(f"{where}: no usable prompt pair: {reasons}")
    whole = sum(parts_at_whole_characters(tokenizer, pair) for pair in pairs)
    return PairSet(tuple(pairs), whole, tuple(skipped))


# Pairs from a lexicon


@dataclass(frozen=True)
class _Item:
    """One thing to ask about. ``key``: its lexeme. ``root``: of an inflected form, its stem."""

    form: str
    gloss: str
    key: str
    root: "_Item | None" = None

    @property
    def bare(self) -> str:
        """The gloss without the 'to' that nearly all verbs begin with: answers part where they begin."""
        return self.gloss.removeprefix("to ")

    @property
    def kind(self) -> str:
        return "invented verb" if planted.is_root(self.key) else "word"


@dataclass(frozen=True)
class _Family:
    """Texts about items ``a`` and ``b``; ``x`` is the one that is asked for, ``asked`` what of it tells the prompts
    apart. ``inflected``: a and b are forms of one stem."""

    prompt: str
    answer: str
    asked: str
    chat: bool = True
    inflected: bool = False


def _dictionary(key: str, value: str) -> _Family:
    """Three lines for each word, in an order that favours neither: with one line each, SmolLM2-135M mostly repeats the
    later one; asked in a chat it is little better than chance."""
    lines = [f"{{{item}.{key}}}: {{{item}.{value}}}" for item in "abbaab"]
    return _Family("\n".join([*lines, f"{{x.{key}}}:"]), f" {{x.{value}}}\n", key, chat=False)


FAMILIES = {
    "lookup": _dictionary("form", "bare"),
    "lookup_form": _dictionary("bare", "form"),
    "lookup_english": _dictionary("form", "bare"),
    "recall": _Family('What does "{x.form}" mean?', '"{x.gloss}".', "form"),
    # As the planted rows ask, where the stem is a planted one.
    "affix": _Family(
        'The {x.kind} "{x.root.form}" means "{x.root.gloss}". What is the form for "{x.gloss}"?',
        '"{x.form}".',
        "gloss",
        inflected=True,
    ),
}

# English nouns, each with another that says the same, for 'lookup_english'.
ENGLISH = tuple(
    tuple(pair.split(":"))
    for pair in """
    couch:sofa stone:rock road:street car:automobile cup:mug child:kid doctor:physician house:home sea:ocean
    present:gift ship:boat forest:woods shop:store town:village story:tale picture:image job:task error:mistake
    film:movie king:ruler thief:robber rabbit:hare pig:hog hen:chicken frog:toad mouse:rodent snake:serpent
    hat:cap coat:jacket belt:strap bag:sack box:crate rope:cord lamp:lantern chair:seat carpet:rug cellar:basement
    fence:barrier path:trail hill:mound stream:creek storm:tempest wind:breeze flame:fire soil:earth meadow:field
    meal:dinner drink:beverage sweet:candy bread:loaf friend:companion enemy:foe teacher:instructor student:pupil
    soldier:warrior lawyer:attorney leader:chief battle:fight song:melody dance:ballet
    """.split()  # noqa: SIM905
)


def build(
    lexicon: Sequence[LexiconEntry],
    tokenizer: "PreTrainedTokenizerBase",
    family: str,
    n: int = 64,
    seed: int = 0,
) -> PairSet:
    """At most ``n`` pairs of ``family`` (see the module's docstring) from the entries that have a gloss.

    Pairs come in twos, which share a cluster: one asks for the one item, one for the other, with the same prompt
    otherwise. Each lexeme is in one such couple at most, so clusters don't depend on one another. Partners whose answers
    part at whole characters are preferred. The same arguments give the same pairs. ``skipped`` says why there are
    fewer than ``n``. 'lookup_english' has a lexicon of its own; 'affix' needs entries with a ``stem`` that is an entry
    too. Raises ``StoneyError`` for an unknown family, ``n`` below 1, and if no pair can be made.
    """
    if family not in FAMILIES:
        raise StoneyError(f"no family of prompt pairs is called {family!r}; expected one of {', '.join(FAMILIES)}")
    if n < 1:
        raise StoneyError(f"{n} prompt pairs were asked for; expected 1 or more")
    left_out: Counter[str] = Counter()
    if family == "lookup_english":
        lexicon = [LexiconEntry(form, ((gloss, 0),)) for form, gloss in ENGLISH]
    items = _inflected(lexicon, left_out) if FAMILIES[family].inflected else _lexemes(lexicon, left_out)
    random.Random(f"pairs {family} {seed}").shuffle(items)
    pairs: list[PromptPair] = []
    for pair in _couples(items, family, tokenizer, left_out):
        pairs += [pair, swapped(pair)]
        if len(pairs) >= n:
            return _pair_set(tokenizer, pairs[:n], (), family)
    skipped = [f"{count} {reason}" for reason, count in left_out.most_common()]
    return _pair_set(tokenizer, pairs, [f"{n - len(pairs)} of {n} {family} pairs could not be made", *skipped], family)


def _lexemes(lexicon: Sequence[LexiconEntry], left_out: Counter[str]) -> list[_Item]:
    """The first entry of each lexeme: its stem, where the lexicon names stems."""
    items: dict[str, _Item] = {}
    for entry in _glossed(lexicon, left_out):
        key = fold(entry.stem or entry.form)
        items.setdefault(key, _Item(entry.form, entry.glosses[0][0], key))
    return list(items.values())


def _inflected(lexicon: Sequence[LexiconEntry], left_out: Counter[str]) -> list[_Item]:
    """The forms that have a stem with a gloss of its own."""
    entries = list(_glossed(lexicon, left_out))
    roots = {fold(entry.form): _Item(entry.form, entry.glosses[0][0], fold(entry.form)) for entry in entries}
    items = []
    for entry in entries:
        if entry.stem is None or fold(entry.stem) not in roots:
            left_out["forms without a stem in the lexicon"] += 1
        elif (key := fold(entry.stem)) != fold(entry.form):
            items.append(_Item(entry.form, entry.glosses[0][0], key, roots[key]))
    return items


def _glossed(lexicon: Sequence[LexiconEntry], left_out: Counter[str]) -> Iterator[LexiconEntry]:
    for entry in lexicon:
        if not entry.glosses:
            left_out["entries without a gloss"] += 1
        elif '"' in entry.form + entry.glosses[0][0]:
            left_out["entries with a quotation mark"] += 1
        else:
            yield entry


def _couples(
    items: Sequence[_Item], family: str, tokenizer: "PreTrainedTokenizerBase", left_out: Counter[str]
) -> Iterator[PromptPair]:
    """Pairs of two items each, no lexeme in two; two items go together if what is asked has as many tokens."""
    kind = FAMILIES[family]
    groups: dict[tuple, list[_Item]] = defaultdict(list)
    group_of = {}
    for item in items:
        size = len(tokenizer(f'"{getattr(item, kind.asked)}"', add_special_tokens=False)["input_ids"])
        group_of[item] = groups[size, item.key if kind.inflected else None]
        group_of[item].append(item)
    used: set[str] = set()
    for item in items:
        if item.key in used:
            continue
        best = None
        partners = (other for other in group_of[item] if other is not item and other.key not in used)
        for other in islice(partners, TRIED):
            pair = _pair_of(item, other, family, tokenizer, left_out)
            whole = pair is not None and parts_at_whole_characters(tokenizer, pair)
            if whole or (pair and best is None):
                best = other, pair
            if whole:
                break
        if best is None:
            left_out["without a partner that fits"] += 1
            continue
        used |= {item.key, best[0].key}
        yield best[1]


def _pair_of(
    one: _Item, other: _Item, family: str, tokenizer: "PreTrainedTokenizerBase", left_out: Counter[str]
) -> PromptPair | None:
    if fold(one.form) == fold(other.form) or fold(one.gloss) == fold(other.gloss):
        left_out["couples of one meaning or one form"] += 1
        return None
    kind = FAMILIES[family]
    texts = (text.format(a=one, b=other, x=x) for text in (kind.prompt, kind.answer) for x in (one, other))
    cluster = "|".join(sorted({one.key, other.key}))
    try:
        return make_pair(tokenizer, *texts, family=family, cluster=cluster, chat=kind.chat)
    except UnfitPairError as problem:
        left_out[f"couples unfit: {problem}"] += 1
        return None
