"""A completion taken apart: what was reasoned, and what is the answer. Only the answer earns what an answer earns."""

import re
from dataclasses import dataclass

from stoney_rl.text import normalize

OPEN, CLOSE = "<think>", "</think>"
# NUL and the other C0 controls but tab and line ends: no keyboard types them, and some readers end a text there. Lone
# surrogates are no text at all: no file and no encoder takes them.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class Completion:
    """``reasoning``: the trace, None if there is none. ``answer``: '' if there is none. Both normalised."""

    reasoning: str | None
    answer: str


def parse(text: str) -> Completion:
    """The trace inside ``<think>...</think>`` and the answer after it.

    A trace that was opened in the prompt may have its closing tag alone. Without an answer are: a trace that is never
    closed, and any text with control characters or lone surrogates in it.
    """
    if _CONTROL.search(text):
        return Completion(None, "")
    # First, so that NFD is read as NFC is: they differ on whether ">" before U+0338 ends a tag.
    text = normalize(text)
    before, closing, after = text.rpartition(CLOSE)
    if OPEN in after:  # and not closed again
        before, closing, after = text, CLOSE, ""
    if not closing:
        return Completion(None, text)
    return Completion(normalize(before.replace(OPEN, " ").replace(CLOSE, " ")), normalize(after))
