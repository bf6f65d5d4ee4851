"""Section "split": the lexeme-disjoint split, its certificate, and what each part of it misses of the whole."""

from collections import Counter
from collections.abc import Mapping, Sequence

from stoney_rl.data import Row
from stoney_rl.inspection.findings import FAILURE, NOTE, Finding, Section
from stoney_rl.split import Split
from stoney_rl.text import fold

# Metadata with at most this many values says what kind a row is (a rule, a template, a source language).
MAX_KINDS = 20
# Fewer unseen test rows than this can't show a difference of 10 points: the 95 % interval of a share is wider.
MIN_UNSEEN = 100
# A part of which at least this many are expected lacks them by chance in fewer than 5 % of splits (Poisson, e^-3).
MIN_EXPECTED = 3


def find(split: Split, rows: Sequence[Row], pos_of: Mapping[str, str]) -> Section:
    """Counts, overlaps and gaps of ``split``, which was made of ``rows``. ``pos_of``: part of speech by folded form.

    figures["parts"]: for train, validation and test: rows, forms, and what is in the whole but not in the part:
    ``letters`` (of forms), ``initials`` (letters that begin a word), ``parts_of_speech``, ``kinds`` ("column=value").
    Of validation and test, only what is missing in spite of an expected count of ``MIN_EXPECTED`` in the part.
    """
    certificate = split.certificate
    whole = _traits(rows, pos_of)
    columns = _kind_columns(rows)
    whole["kinds"] = _kinds(rows, columns)
    parts = {}
    for name in ("train", "validation", "test"):
        part = getattr(split, name)
        has = _traits(part, pos_of) | {"kinds": _kinds(part, columns)}
        unseen = [row for row in part if split.seen.get(row.id) is False]
        parts[name] = {
            "rows": len(part),
            "seen": sum(split.seen.get(row.id) is True for row in part),
            "unseen": len(unseen),
            "forms": len({fold(form) for row in part for form in row.lexemes}),
            "answer_characters": round(sum(len(row.answer) for row in part) / len(part), 1) if part else None,
            "misses": {
                key: sorted(
                    trait
                    for trait, count in whole[key].items()
                    if trait not in has[key] and (name == "train" or count * len(part) >= MIN_EXPECTED * len(rows))
                )
                for key in whole
            },
        }
    figures = {"certificate": certificate, "parts": parts, "dropped": len(split.dropped)}
    findings = []
    unseen = parts["test"]["unseen"]
    if unseen < MIN_UNSEEN:
        findings.append(
            Finding(
                kind="small_test_split",
                severity=NOTE,
                count=unseen,
                total=len(rows),
                unit="rows",
                message=f"only {unseen} unseen test rows: an interval on a share is about ±{_half_width(unseen):.0%} wide; raise "
                "--test_fraction or say how little the numbers can show",
            )
        )
    missed = {name: part["misses"] for name, part in parts.items() if any(part["misses"].values())}
    in_train = missed.get("train", {})
    if any(in_train.values()):
        listed = "; ".join(
            f"{key.replace('_', ' ')}: {', '.join(map(str, found))}" for key, found in in_train.items() if found
        )
        findings.append(
            Finding(
                kind="untrained_traits",
                severity=NOTE,
                count=sum(map(len, in_train.values())),
                total=sum(map(len, whole.values())),
                unit="traits",
                message=f"training never shows what held-out rows may ask for ({listed}); another --split_seed may",
            )
        )
    return Section("split", figures, findings)


def impossible(reason: str, rows: Sequence[Row]) -> Section:
    """The section where the rows can't be split; ``reason`` is what ``split_rows`` said."""
    finding = Finding(
        kind="no_split",
        severity=FAILURE,
        count=len(rows),
        total=len(rows),
        unit="rows",
        message=f"these rows can't be split by lexeme, so nothing can be measured on words never trained on: {reason}",
    )
    return Section("split", {"certificate": None, "parts": {}, "dropped": 0}, [finding])


def _half_width(n: int) -> float:
    """Half the width of the 95 % interval of a share of one half: 1.96 sqrt(0.25 / n) (normal approximation)."""
    return 1.96 * (0.25 / max(1, n)) ** 0.5


def _traits(rows: Sequence[Row], pos_of: Mapping[str, str]) -> dict[str, Counter]:
    forms = {fold(form) for row in rows for form in row.lexemes}
    letters = Counter(letter for form in forms for letter in form if letter.isalpha())
    initials = Counter(word[0] for form in forms for word in form.split() if word[0].isalpha())
    return {
        "letters": letters,
        "initials": initials,
        "parts_of_speech": Counter(pos_of[form] for form in forms if form in pos_of),
    }


def _kind_columns(rows: Sequence[Row]) -> list[str]:
    """Metadata columns that sort the rows into few kinds."""
    values: dict[str, set] = {}
    for row in rows:
        for key, value in row.metadata.items():
            if isinstance(value, str | bool) and len(values.setdefault(key, set())) <= MAX_KINDS:
                values[key].add(value)
    return sorted(key for key, found in values.items() if 1 < len(found) <= MAX_KINDS)


def _kinds(rows: Sequence[Row], columns: list[str]) -> Counter:
    return Counter(
        f"{key}={row.metadata[key]}" for row in rows for key in columns if isinstance(row.metadata.get(key), str | bool)
    )
