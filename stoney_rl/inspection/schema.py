"""Section "schema": what the source holds: files, rows, turns, metadata, and what could not be read."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from stoney_rl.data import Row, RowSet
from stoney_rl.inspection.findings import FAILURE, MAX_EXAMPLES, NOTE, Finding, Section

# More distinct values than this are counted, not listed: the column is an identifier or free text.
MAX_VALUES = 20
SHOWN_LINES = 20


def find(rowset: RowSet, rows: Sequence[Row]) -> Section:
    """Files, turns, metadata coverage and quarantine of ``rowset``; ``rows`` are its rows with lexemes.

    figures["metadata"]: a list of {column, rows, missing, empty, types, distinct, values}: ``rows`` have the column,
    ``missing`` do not (or hold null), ``empty`` hold "", [] or {}; ``values`` are counted where there are few.
    """
    reasons: dict[str, list[str]] = defaultdict(list)
    for bad in rowset.quarantine:
        reasons[bad.reason.split(": ")[0]].append(f"{bad.source}:{bad.line}")
    figures = {
        "rows": len(rows),
        "files": rowset.files,
        "turns": dict(sorted(Counter(len(row.prompt) + 1 for row in rows).items())),
        "system_messages": len({row.metadata["system"] for row in rows if isinstance(row.metadata.get("system"), str)}),
        "rows_without_lexemes": sum(not row.lexemes for row in rows),
        "renamed_ids": sum("original_id" in row.metadata for row in rows),
        "metadata": _metadata(rows),
        "quarantined": {
            reason: {"rows": len(lines), "lines": lines[:SHOWN_LINES]}
            for reason, lines in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
        },
    }
    findings = []
    if rowset.quarantine:
        kinds = ", ".join(f"{reason} {len(lines):,}" for reason, lines in reasons.items())
        findings.append(
            Finding(
                kind="quarantined_rows",
                severity=FAILURE,
                count=len(rowset.quarantine),
                total=len(rows) + len(rowset.quarantine),
                unit="rows",
                message=f"rows that can't be read ({kinds}); they are left out: quarantine.jsonl says where and why",
                examples=tuple(
                    {"where": f"{bad.source}:{bad.line}", "reason": bad.reason, "text": bad.text}
                    for bad in rowset.quarantine[:MAX_EXAMPLES]
                ),
            )
        )
    without = [row for row in rows if not row.lexemes]
    if without:
        findings.append(
            Finding(
                kind="rows_without_forms",
                severity=NOTE,
                count=len(without),
                total=len(rows),
                unit="rows",
                message="rows in which no form of the language was found; they can be trained on, never held out",
                row_ids=tuple(row.id for row in without),
                details=("",) * len(without),
                examples=tuple(
                    {"id": row.id, "question": row.question, "answer": row.answer} for row in without[:MAX_EXAMPLES]
                ),
            )
        )
    return Section("schema", figures, findings)


def _metadata(rows: Sequence[Row]) -> list[dict]:
    present: Counter[str] = Counter()
    empty: Counter[str] = Counter()
    types: dict[str, Counter[str]] = defaultdict(Counter)
    values: dict[str, Counter] = defaultdict(Counter)
    hashes: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        for key, value in row.metadata.items():
            if value is None or key == "original_id":
                continue
            present[key] += 1
            types[key][type(value).__name__] += 1
            empty[key] += value in ("", [], {})
            shown = value if isinstance(value, str | int | float | bool) else repr(value)
            hashes[key].add(hash((type(value).__name__, repr(value))))  # 1, 1.0 and True are three values
            if len(values[key]) <= MAX_VALUES:  # one more than is shown: then it is known to be too many
                values[key][str(shown)] += 1
    return [
        {
            "column": key,
            "rows": count,
            "missing": len(rows) - count,
            "empty": empty[key],
            "types": dict(sorted(types[key].items())),
            "distinct": len(hashes[key]),
            "values": dict(values[key].most_common()) if len(hashes[key]) <= MAX_VALUES else None,
        }
        for key, count in sorted(present.items(), key=lambda item: (-item[1], item[0]))
    ]
