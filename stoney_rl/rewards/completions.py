"""A completion taken apart: what was reasoned, and what is the answer. Only the answer earns what an answer earns."""

import re
from dataclasses import dataclass

from stoney_rl.text import normalize

OPEN, CLOSE = "<think>", "</think>"
# NUL and the other C0 controls but tab and line ends: no keyboard types them, and some readers end a text there.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Completion:
    """``reasoning``: the trace, None if there is none. ``answer``: '' if there is none. Both normalised."""

    reasoning: str | None
    answer: str


def parse(text: str) -> Completion:
    """The trace inside ``<think>...</think>`` and the answer after it.

    A trace that was opened in the prompt may have its closing tag alone. Without an answer are: a trace that is never
    closed, and any text with control characters in it.
    """
    if _CONTROL.search(text):
        return Completion(None, "")
    before, closing, after = text.rpartition(CLOSE)
    opened = after.rfind(OPEN)
    if opened >= 0:  # opened, and not closed again
        return Completion(normalize(before + after[opened + len(OPEN) :]), "")
    if not closing:
        return Completion(None, normalize(text))
    return Completion(normalize(before.replace(OPEN, " ").replace(CLOSE, " ")), normalize(after))
