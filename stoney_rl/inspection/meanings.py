"""Section "lexicon": the lexicon in figures, and the forms whose glosses have nothing in common."""

from collections import Counter
from collections.abc import Iterable, Sequence

from stoney_rl.data import Row
from stoney_rl.glosses import content_words, fold
from stoney_rl.inspection.findings import MAX_EXAMPLES, NOTE, Finding, Section
from stoney_rl.lexicon import LexiconEntry


def have_conflict(glosses: Sequence[str]) -> bool:
    """Whether the glosses fall into groups without a content word in common: two meanings, or an error."""
    groups: list[set[str]] = []
    for gloss in glosses:
        merged = set(content_words(gloss))
        apart = []
        for group in groups:
            if merged & group:
                merged |= group
            else:
                apart.append(group)
        groups = [*apart, merged]
    return len(groups) > 1


def conflicting_entries(entries: Iterable[LexiconEntry]) -> list[LexiconEntry]:
    """The entries whose glosses have no content word in common, most attested first."""
    found = [entry for entry in entries if have_conflict([gloss for gloss, _ in entry.glosses])]
    return sorted(found, key=lambda entry: (-entry.count, fold(entry.form)))


def _some(sources: Sequence[str], most: int = 10) -> str:
    left = len(sources) - most
    return ", ".join(sources[:most]) + (f" and {left:,} more" if left > 0 else "")


def find(entries: Sequence[LexiconEntry], rows: Sequence[Row]) -> Section:
    """The lexicon in figures, and the forms whose glosses have nothing in common.

    Figures: forms; of those with_gloss, without_gloss, with_pos; by_pos (forms whose most frequent label it is);
    hapax (forms that one row mentions); rows_per_form (mean, median, most); rows_with_form of rows.
    """
    counts = sorted(entry.count for entry in entries)
    middle = len(counts) // 2
    median = None if not counts else counts[middle] if len(counts) % 2 else (counts[middle - 1] + counts[middle]) / 2
    by_pos = Counter(entry.pos[0][0] for entry in entries if entry.pos)
    with_gloss = sum(bool(entry.glosses) for entry in entries)
    conflicts = conflicting_entries(entries)
    figures = {
        "forms": len(entries),
        "with_gloss": with_gloss,
        "without_gloss": len(entries) - with_gloss,
        "with_pos": by_pos.total(),
        "by_pos": dict(sorted(by_pos.items(), key=lambda item: (-item[1], item[0]))),
        "hapax": sum(count == 1 for count in counts),
        "rows_per_form": {
            "mean": round(sum(counts) / len(counts), 4) if counts else None,
            "median": median,
            "most": counts[-1] if counts else None,
        },
        "rows": len(rows),
        "rows_with_form": len({source for entry in entries for source in entry.sources}),
        "conflicting_glosses": len(conflicts),
    }
    found = Section("lexicon", figures)
    if conflicts:
        found.findings.append(
            Finding(
                kind="conflicting_glosses",
                severity=NOTE,
                count=len(conflicts),
                total=len(entries),
                unit="forms",
                message=(
                    "forms with glosses that share no content word: homonyms, synonyms in English, or errors; "
                    "a person who knows the language decides"
                ),
                examples=tuple(
                    {
                        "form": entry.form,
                        "glosses": "; ".join(gloss for gloss, _ in entry.glosses),
                        "sources": _some(entry.sources),
                    }
                    for entry in conflicts[:MAX_EXAMPLES]
                ),
            )
        )
    return found
