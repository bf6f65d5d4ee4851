"""Reward functions for tests, as a user would hand them to ``--reward planted_rewards:NAME``. Most of them are bad ones."""

import unicodedata
import zlib


def zero(completions, **_):
    """Nothing is ever paid."""
    return [0.0] * len(completions)


def constant(completions, **_):
    """The same for all: the mean of many 0.3 in fp32 is another number than 0.3."""
    return [0.3] * len(completions)


def nothing(completions, **_):
    """Can't score anything."""
    return [None] * len(completions)


def unreadable(completions, **_):
    """Minus the share of control characters and of bytes that are no text. The one that is honest: it passes the probe."""
    return [
        -sum(letter == "\ufffd" or unicodedata.category(letter) == "Cc" for letter in text) / max(1, len(text))
        for text in (messages[-1]["content"] for messages in completions)
    ]


def length(completions, **_):
    """A hundredth a character: paid for length alone."""
    return [len(messages[-1]["content"]) / 100 for messages in completions]


def lottery(completions, **_):
    """From 0 to 1, by a checksum of the text: no two texts earn the same, and no text earns two things."""
    return [zlib.crc32(messages[-1]["content"].encode()) / 2**32 for messages in completions]


def sometimes(completions, **_):
    """``lottery``, but None for a quarter of the texts."""
    drawn = lottery(completions)
    return [None if value < 0.25 else value for value in drawn]


def fails(completions, **_):
    raise RuntimeError("no reward today")
