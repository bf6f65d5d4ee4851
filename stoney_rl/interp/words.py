"""The words of a text, put together again from the tokens that a model reads.

    ids = encode_prompt(tokenizer, [{"role": "user", "content": 'What does "wûsilo" mean?'}])     # an invented word
    for word in split_words(tokenizer, ids, lexicon_words(["wûsilo"])):
        word.kind, word.label, ids[word.start : word.end]          # 'lexicon', 'wûsilo', its five tokens

A Stoney word takes five tokens, and byte-level tokenizers split even inside a letter, so tokens are no unit to read.

1. Each token gives its bytes: byte-level BPE through the alphabet of GPT-2, sentencepiece through '▁' and '<0xE1>'.
2. Between special tokens, the bytes are decoded and the text is cut: a word (letters with their marks, joined inside by
   apostrophes and hyphens), a number, or one other character (quotes, punctuation, a space, an emoji with its modifiers).
3. A cut stands where a token ends; elsewhere its two sides stay together. So a space that the tokenizer glues to the
   next word belongs to that word, and '".' as one token is one piece of punctuation.

Each token thus belongs to exactly one word, and the words' texts in a row are the text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING

import regex

from stoney_rl.errors import StoneyError
from stoney_rl.text import APOSTROPHES, fold, words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("special", "lexicon", "word", "number", "punctuation", "space")

# A byte that is no part of a character decodes to one of U+DC80 to U+DCFF (Python's surrogateescape).
_PIECE = regex.compile(
    rf"[\udc80-\udcff]+|\p{{L}}\p{{M}}*(?:['{APOSTROPHES}-]?\p{{L}}\p{{M}}*)*|\p{{N}}+|\s|\X", regex.VERSION1
)
_VISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"})


@dataclass(frozen=True)
class Word:
    """Tokens ``start`` to ``end`` (half-open) and their ``text``, with the space that its first token may begin with.

    ``kind``: 'special' (one token: a chat marker, BOS, ...), 'lexicon' (a word of the lexicon that the caller gave),
    'word' (any other with a letter), 'number', 'punctuation', 'space'. A character that the tokens leave incomplete is
    U+FFFD in ``text``.
    """

    text: str
    start: int
    end: int
    kind: str

    @property
    def span(self) -> tuple[int, int]:
        return self.start, self.end

    @property
    def label(self) -> str:
        """What to print: the text without space around it; a word of space alone as signs (· ⏎ ⇥)."""
        return self.text.strip() or self.text.translate(_VISIBLE)


def split_words(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], lexicon: frozenset[str] = frozenset()
) -> list[Word]:
    """The words of the token ids of one row (no padding), in order; their spans cover each token once.

    ``lexicon``: from ``lexicon_words``. The texts joined are what the tokenizer decodes ``ids`` to (special tokens as
    they are spelled), with the space that a sentencepiece tokenizer puts in front of a text. Raises ``StoneyError`` for
    a tokenizer whose tokens can't be traced back to bytes.
    """
    ids = [int(one) for one in ids]
    pieces = token_bytes(tokenizer, ids)
    special = _special_ids(tokenizer)
    found: list[Word] = []
    for is_special, run in groupby(range(len(ids)), key=lambda index: ids[index] in special):
        run = list(run)
        if is_special:
            found += [Word(pieces[index].decode(errors="replace"), index, index + 1, "special") for index in run]
        else:
            found += _words_of_run(pieces[run[0] : run[-1] + 1], run[0], lexicon)
    return found


def lexicon_words(forms: Iterable[str]) -> frozenset[str]:
    """The words of a lexicon's forms, folded: what ``split_words`` calls 'lexicon'. Phrases give each of their words."""
    return frozenset(fold(word) for form in forms for word in words(form))


def token_bytes(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[bytes]:
    """The UTF-8 bytes that each token stands for, which may be part of a character.

    An id that the tokenizer does not know (a padded vocabulary has some) gives b'[id]'. Raises ``StoneyError`` for a
    tokenizer that is neither byte-level nor sentencepiece.
    """
    if _has_token(tokenizer, "▁"):
        to_bytes = _sentencepiece_bytes
    elif _has_token(tokenizer, "Ġ"):
        to_bytes = _byte_level_bytes
    else:
        raise StoneyError(
            f"{tokenizer.name_or_path}: its tokenizer is neither byte-level BPE nor sentencepiece, so its tokens can't "
            "be put together to words"
        )
    tokens = ((one, tokenizer.convert_ids_to_tokens(one)) for one in map(int, ids))
    return [to_bytes(token) if token is not None else f"[{one}]".encode() for one, token in tokens]


def token_labels(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """What to print for each token: spaces as signs (·tâ), and for part of a character which part: ẖ(1/3), ẖ(2/3), ...

    A combining mark stands on ◌; a byte that is part of no character is given in hex: <E1>.
    """
    pieces = token_bytes(tokenizer, ids)
    owner = [index for index, piece in enumerate(pieces) for _ in piece]  # the token that each byte comes from
    labels = [""] * len(pieces)
    at = 0
    for character in b"".join(pieces).decode(errors="surrogateescape"):
        size = _size(character)
        holders = sorted(set(owner[at : at + size]))
        for part, holder in enumerate(holders, start=1):
            labels[holder] += _shown(character) + (f"({part}/{len(holders)})" if len(holders) > 1 else "")
        at += size
    return labels


def tokens_per_word(found: Iterable[Word]) -> dict[str, list[int]]:
    """How many tokens each 'lexicon' word and each other 'word' takes: the tokenization confound, in numbers."""
    counts: dict[str, list[int]] = {"lexicon": [], "word": []}
    for word in found:
        if word.kind in counts:
            counts[word.kind].append(word.end - word.start)
    return counts


def is_whole(piece: bytes) -> bool:
    """Whether a token's bytes are whole characters."""
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def _words_of_run(pieces: Sequence[bytes], offset: int, lexicon: frozenset[str]) -> list[Word]:
    """Words of tokens none of which is special; ``offset``: the first token's position in the row."""
    token_at = {end: index for index, end in enumerate(accumulate(map(len, pieces)), start=1)}
    cuts = accumulate(_size(piece) for piece in _PIECE.findall(b"".join(pieces).decode(errors="surrogateescape")))
    ends = [token_at[cut] for cut in cuts if cut in token_at] or [len(pieces)]
    found = []
    for start, end in pairwise([0, *ends]):
        text = b"".join(pieces[start:end]).decode(errors="replace")
        found.append(Word(text, offset + start, offset + end, _kind(text, lexicon)))
    return found


def _kind(text: str, lexicon: frozenset[str]) -> str:
    bare = text.strip()
    if not bare:
        return "space"
    if any(map(str.isalpha, bare)):
        return "lexicon" if fold(bare) in lexicon else "word"
    return "number" if any(map(str.isnumeric, bare)) else "punctuation"


def _size(text: str) -> int:
    return len(text.encode(errors="surrogateescape"))


def _shown(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"<{ord(character) - 0xDC00:02X}>"
    if regex.match(r"\p{M}", character):
        return "◌" + character
    shown = character.translate(_VISIBLE)
    return shown if shown.isprintable() else f"<U+{ord(character):04X}>"


def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}


def _has_token(tokenizer: "PreTrainedTokenizerBase", token: str) -> bool:
    index = tokenizer.convert_tokens_to_ids(token)  # the unknown token's id, or None, where there is no such token
    return index is not None and tokenizer.convert_ids_to_tokens(index) == token


def _sentencepiece_bytes(token: str) -> bytes:
    if byte := regex.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(byte[1], 16)])
    return token.replace("▁", " ").encode()


def _byte_level_bytes(token: str) -> bytes:
    alphabet = _alphabet()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()  # an added token, which is spelled as it is


@cache
def _alphabet() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
