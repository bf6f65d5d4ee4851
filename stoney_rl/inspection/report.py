"""From sections to what a person reads: report.json, report.txt, report.html, findings.jsonl, plots and W&B."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stoney_rl import checkpoints, terminal
from stoney_rl.data import Quarantined, Row, RowSet, dataset_sha256, write_quarantine
from stoney_rl.inspection.coverage import FINE, GAP, GAP_ELSEWHERE, RARE, UNTESTED
from stoney_rl.inspection.findings import FAILURE, NOTE, Section
from stoney_rl.lexicon import LEXICON_FILE, LexiconEntry, write_lexicon

VERDICTS = (GAP_ELSEWHERE, GAP, RARE, FINE, UNTESTED)
FINDINGS_FILE = "findings.jsonl"
TABLE_ROWS = 10  # lexicon entries in the terminal
TRACKED_ROWS = 2000  # lexicon entries in a W&B table


def leave_out(
    rowset: RowSet, rows: Sequence[Row], sections: Sequence[Section], kinds: Sequence[str]
) -> tuple[RowSet, list[Row]]:
    """``rowset`` and its annotated ``rows`` without those that a finding of ``kinds`` names; they are quarantined."""
    reasons: dict[str, str] = {}
    for section in sections:
        for finding in section.findings:
            if finding.kind in kinds:
                for row_id, detail in zip(finding.row_ids, finding.details, strict=True):
                    reasons.setdefault(row_id, f"{finding.kind}: {detail}" if detail else finding.kind)
    if not reasons:
        return rowset, list(rows)
    out = []
    for row in rowset.rows:
        if row.id in reasons:
            file, _, line = row.source.rpartition(":")
            out.append(Quarantined(file, int(line) if line.isdigit() else 0, reasons[row.id], row.question[:200]))
    kept = [row for row in rowset.rows if row.id not in reasons]
    return (
        replace(rowset, rows=kept, quarantine=[*rowset.quarantine, *out], sha256=dataset_sha256(kept)),
        [row for row in rows if row.id not in reasons],
    )


def summarise(rowset: RowSet, sections: Sequence[Section], *, arguments: dict, kept: int | None = None) -> dict:
    """The content of report.json: nothing in it depends on the time, the machine or the place of the output.

    ``rowset``: the source; ``kept``: how many of its rows --drop left, None for all.
    """
    findings = [finding for section in sections for finding in section.findings]
    findings.sort(
        key=lambda finding: (finding.severity != FAILURE, -finding.count / max(1, finding.total), finding.kind)
    )
    return {
        "dataset": {
            "source": rowset.source,
            "revision": rowset.revision,
            "sha256": rowset.sha256,
            "rows": len(rowset.rows),
            "left_out": 0 if kept is None else len(rowset.rows) - kept,
            "quarantined": len(rowset.quarantine),
            "notes": rowset.notes,
        },
        "arguments": {key: value for key, value in arguments.items() if key != "output_dir"},
        "findings": [finding.summary() for finding in findings],
        "sections": {section.name: section.figures for section in sections},
    }


def as_text(summary: dict, entries: Sequence[LexiconEntry], *, width: int = 100) -> str:
    """What is printed: the findings, worst first, then each section in a few lines."""
    dataset = summary["dataset"]
    out = ["", f"{dataset['source']}: {dataset['rows']:,} rows, data {dataset['sha256'][:12]}"]
    if dataset["left_out"]:
        kinds = ", ".join(summary["arguments"]["drop"])
        out.append(f"{dataset['left_out']:,} of them are left out of the prepared rows (--drop {kinds}).")
    out.append("")
    for severity, mark, title in ((FAILURE, "✗", "would spoil training or a claim"), (NOTE, "·", "worth knowing")):
        found = [finding for finding in summary["findings"] if finding["severity"] == severity]
        if found or severity == FAILURE:
            out.append(f"{title.capitalize()}:" if found else f"✓ Nothing was found that {title}.")
        for finding in found:
            count = f"{finding['count']:,} of {finding['total']:,} {finding['unit']}"
            out.append(f"  {mark} {finding['kind']}: {count}")
            out += [f"      {line}" for line in terminal.wrap(finding["message"], width - 6)]
        out.append("")
    for name, lines in sentences(summary).items():
        out.append(name.capitalize())
        for line in lines:
            out += [f"  {wrapped}" for wrapped in terminal.wrap(line, width - 2)]
        if name == "lexicon" and entries:
            out += ["", *(f"  {line}" for line in _lexicon_table(entries, width - 2)), ""]
        if name == "split" and summary["sections"]["split"]["parts"]:
            header, *cells = split_rows(summary)
            out += ["", *(f"  {line}" for line in terminal.grid(header, cells, rules=len(cells)))]
    return "\n".join(out).rstrip()


def sentences(summary: dict) -> dict[str, list[str]]:
    """Section -> what its figures say, in sentences."""
    sections = summary["sections"]
    schema, repeats, lengths, letters = (sections[name] for name in ("schema", "repeats", "lengths", "orthography"))
    lexicon, coverage, split = (sections[name] for name in ("lexicon", "coverage", "split"))
    said: dict[str, list[str]] = {}

    columns = ", ".join(
        f"{column['column']} {column['rows'] / schema['rows']:.0%}" for column in schema["metadata"][:8]
    )
    said["rows"] = [
        f"{len(schema['files'])} file(s), {schema['rows']:,} rows, {schema['rows_without_lexemes']:,} of them without a form "
        f"of the language; metadata: {columns or 'none'}."
    ]
    asked, echo = repeats["questions"], repeats["forms_of_the_answer_in_the_question"]
    said["repeats"] = [
        f"{asked['different']:,} different questions; {asked['asked_more_than_once']:,} are asked more than once, "
        f"{asked['with_other_answers']:,} of them with other answers.",
        f"Of the answers' forms, the question holds all in {_percent(echo['all'])} of the rows, some in {_percent(echo['some'])}, "
        f"none in {_percent(echo['none'])}; {_percent(echo['no_form_in_answer'])} of the answers have no form.",
    ]
    question, answer = (lengths[part]["characters"]["percentiles"] for part in ("question", "answer"))
    said["lengths"] = [
        f"Characters: questions {question['50']:.0f} (median), {question['95']:.0f} (95 %), {question['100']:.0f} (longest); "
        f"answers {answer['50']:.0f}, {answer['95']:.0f}, {answer['100']:.0f}."
    ]
    if tokens := lengths["tokens"]:
        row = tokens["row"]["percentiles"]
        said["lengths"].append(
            f"Tokens a row ({lengths['tokenizer']}): {row['50']:.0f}, {row['95']:.0f}, {row['100']:.0f}; {tokens['total']:,} in all, "
            f"{tokens['answer_share']:.0%} of them trained on. --max_length {lengths['max_length']} cuts {tokens['rows_cut']:,} rows: "
            f"{tokens['answers_cut']:,} answers lose their end, {tokens['answers_lost']:,} are lost whole."
        )
        words = lengths["words"]
        cost = [words[key]["tokens_a_word"] for key in ("language", "language_marked", "english")]
        if all(cost):
            said["lengths"].append(
                f"A word of the language takes {cost[0]:.2f} tokens ({cost[1]:.2f} with a marked letter), an English one "
                f"{cost[2]:.2f} ({words['rows_sampled']:,} rows, distinct words)."
            )
        if lengths["letters_split"]:
            said["lengths"].append(
                f"Letters that the tokenizer splits into bytes: {' '.join(lengths['letters_split'])}."
            )
    else:
        said["lengths"].append(f"{lengths['no_tokens'][:1].upper()}{lengths['no_tokens'][1:]}.")
    inventory = [letter["letter"] for letter in letters["letters"] if letter["in_forms"]]
    said["orthography"] = [
        f"{len(inventory)} letters in the language's forms, by count: {' '.join(inventory)}.",
        f"{len(letters['diacritic_groups']):,} groups of forms differ only in diacritics.",
    ]
    said["lexicon"] = [
        f"{lexicon['forms']:,} forms, {lexicon['with_gloss']:,} with a gloss, {lexicon['with_pos']:,} with a part of speech; "
        f"{lexicon['hapax']:,} are mentioned in one row only."
    ]
    letters_of = {
        verdict: [row["letter"] for row in coverage["letters"] if row["verdict"] == verdict] for verdict in VERDICTS
    }
    gaps, rare = letters_of[GAP] + letters_of[GAP_ELSEWHERE], letters_of[RARE]
    begin = [row for row in coverage["letters"] if row["initial"]]
    hidden = [row["letter"] for row in begin if not (row["noticeable"] or row["noticeable_headwords"])]
    half_seen = [row["letter"] for row in begin if row["noticeable_headwords"] and not row["noticeable"]]
    tested = sum(row["verdict"] != UNTESTED for row in coverage["letters"])
    words = f"{coverage['first_words']:,} distinct first words"
    if not tested:
        said["coverage"] = [f"{words}: too few to test whether words that begin with one letter were left out."]
    elif gaps:
        said["coverage"] = [f"{words}, {tested} letters tested: words that begin with {' '.join(gaps)} are missing."]
    else:
        said["coverage"] = [f"{words}, {tested} letters tested: no letter is missing at the beginning of words."]
        if hidden:
            said["coverage"].append(f"The test would not notice the loss of words that begin with {' '.join(hidden)}.")
        if half_seen:
            said["coverage"].append(
                f"Of {' '.join(half_seen)} it would notice that forms were left out which begin with it, but not, in so few "
                "forms, that every row was left out which mentions such a word."
            )
    if rare:
        said["coverage"].append(
            f"Letters that begin hardly any word, perhaps by a rule of the spelling: {' '.join(rare)}."
        )
    if coverage["good_turing_new_mentions"] is not None:
        said["coverage"].append(
            f"{coverage['forms_in_one_row_share']:.0%} of the forms are in one row only; of the forms that fresh rows mention, "
            f"at least {coverage['good_turing_new_mentions']:.0%} would be new (Good-Turing)."
        )
    if certificate := split["certificate"]:
        zero = not any(certificate["overlaps"].values())
        said["split"] = [
            f"By lexeme, seed {certificate['seed']}: overlaps between training and unseen rows "
            f"{'all zero' if zero else 'NOT ZERO'}; {split['dropped']:,} rows are in no split, because they mention a "
            "held-out form beside others."
        ]
        for name, part in split["parts"].items():
            missed = [
                f"{key.replace('_', ' ')} {', '.join(values)}" for key, values in part["misses"].items() if values
            ]
            if missed:
                said["split"].append(f"{name} misses: {_short('; '.join(missed))}.")
    else:
        said["split"] = ["The rows can't be split by lexeme."]
    return said


def split_rows(summary: dict) -> list[list[str]]:
    """A header, and one line for each part of the split."""
    parts = summary["sections"]["split"]["parts"]
    return [["part", "rows", "unseen", "seen", "forms", "characters an answer"]] + [
        [
            name,
            *(f"{part[key]:,}" for key in ("rows", "unseen", "seen", "forms")),
            str(part["answer_characters"] or "-"),
        ]
        for name, part in parts.items()
    ]


def _percent(share: dict) -> str:
    return f"{share['share']:.0%}"


def _short(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _lexicon_table(entries: Sequence[LexiconEntry], width: int) -> list[str]:
    most = sorted(entries, key=lambda entry: (-entry.count, entry.form))[:TABLE_ROWS]
    cells = [[entry.form, *gloss_and_pos(entry), str(entry.count), entry.sources[0]] for entry in most]
    room = max(12, (width - 8) // 3)
    cells = [[terminal.cut(cell, room, 1)[0] for cell in line] for line in cells]
    return terminal.grid(["form", "gloss", "part of speech", "rows", "first in"], cells, rules=len(cells))


def gloss_and_pos(entry: LexiconEntry) -> tuple[str, str]:
    glosses = "; ".join(gloss for gloss, _ in entry.glosses[:3])
    return glosses, "; ".join(pos for pos, _ in entry.pos[:2])


def write(
    directory: Path,
    summary: dict,
    text: str,
    sections: Sequence[Section],
    entries: Sequence[LexiconEntry],
    rowset: RowSet,
) -> None:
    """Write report.json, .txt and .html, findings.jsonl, lexicon.jsonl, quarantine.jsonl and plots/ into ``directory``."""
    from stoney_rl.inspection import html, plots

    checkpoints.write_json(directory / "report.json", summary)
    (directory / "report.txt").write_text(text.lstrip("\n") + "\n", encoding="utf-8")
    with (directory / FINDINGS_FILE).open("w", encoding="utf-8") as out:
        for section in sections:
            for finding in section.findings:
                for row_id, detail in zip(finding.row_ids, finding.details, strict=True):
                    line = {"kind": finding.kind, "severity": finding.severity, "id": row_id, "detail": detail}
                    out.write(json.dumps(line, ensure_ascii=False) + "\n")
    write_lexicon(directory / LEXICON_FILE, entries)
    write_quarantine(directory / "quarantine.jsonl", rowset.quarantine)
    (directory / "plots").mkdir()
    drawn = plots.draw(summary, directory / "plots")
    page = html.render(summary, entries, {name: directory / "plots" / f"{name}.png" for name in drawn})
    (directory / "report.html").write_text(page, encoding="utf-8")


def track(tracker: object, directory: Path, summary: dict, entries: Sequence[LexiconEntry]) -> None:
    """Send the findings, the lexicon's head, the pictures and the report to W&B."""
    findings = summary["findings"]
    tracker.log({f"findings/{finding['kind']}": finding["count"] for finding in findings})
    columns = ["kind", "severity", "count", "total", "unit", "message"]
    tracker.table("findings", columns, [[finding[key] for key in columns] for finding in findings])
    most = sorted(entries, key=lambda entry: (-entry.count, entry.form))[:TRACKED_ROWS]
    tracker.table(
        "lexicon",
        ["form", "gloss", "part of speech", "rows", "sources"],
        [[entry.form, *gloss_and_pos(entry), entry.count, ", ".join(entry.sources[:5])] for entry in most],
    )
    for path in sorted((directory / "plots").glob("*.png")):
        tracker.image(f"plots/{path.stem}", path)
    tracker.html("report", directory / "report.html")
