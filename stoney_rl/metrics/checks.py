"""Argument checks that the metrics share: a swapped, shifted or nested list must not become a number."""

from collections.abc import Sequence

from stoney_rl.errors import StoneyError
from stoney_rl.text import normalize

# What normalize() does, as it stands in every signature: NFC, one apostrophe, no invisible controls, case kept.
NORM_SIGNATURE = "norm:nfc+apostrophe"


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Raise StoneyError unless ``texts`` is a non-empty list or tuple of strings, one for each row."""
    if isinstance(texts, str) or not isinstance(texts, (list, tuple)):
        raise StoneyError(f"{name}: expected a list of strings, one for each row, got {type(texts).__name__}")
    if not texts:
        raise StoneyError(f"{name}: the list is empty; there is nothing to score: check the split or the filter")
    for index, text in enumerate(texts):
        if isinstance(text, (list, tuple)):
            raise StoneyError(
                f"{name}[{index}]: expected a string, got a list of {len(text)}; "
                "pass one reference a row as a flat list, not sacreBLEU's list of reference streams"
            )
        if not isinstance(text, str):
            raise StoneyError(f"{name}[{index}]: expected a string, got {type(text).__name__}; leave unscored rows out")


def check_column(name: str, texts: Sequence[str], size: int | None = None) -> None:
    """Raise StoneyError unless ``texts`` passes ``check_texts`` and has ``size`` entries, one for each prediction."""
    check_texts(name, texts)
    if size is not None and len(texts) != size:
        raise StoneyError(
            f"{size} predictions but {len(texts)} {name}: expected one for each prediction, in the same order"
        )


def check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Raise StoneyError unless both are flat lists of strings of one length and no reference is blank."""
    check_texts("predictions", predictions)
    check_texts("references", references)
    if len(predictions) != len(references):
        raise StoneyError(
            f"{len(predictions)} predictions but {len(references)} references: expected one reference for each "
            "prediction, in the same order"
        )
    for index, reference in enumerate(references):
        if not normalize(reference):
            raise StoneyError(
                f"references[{index}] is empty: nothing to score the prediction against; leave the row out and count it"
            )
