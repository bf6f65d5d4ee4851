"""report.html: one page that needs no network, with every picture and the whole lexicon inside."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from stoney_rl.inspection import plots, report
from stoney_rl.lexicon import LexiconEntry

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MAX_SOURCES = 5  # shown beside a form; lexicon.jsonl has all
MAX_GROUPS = 200  # rows of a table in the page; report.json has all


def render(summary: dict, entries: Sequence[LexiconEntry], pictures: Mapping[str, Path]) -> str:
    """The page for a ``report.summarise``; ``pictures``: the PNG of each name of ``plots.CAPTIONS``, where drawn."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    sections = summary["sections"]

    def picture(name: str) -> Markup:
        if name not in pictures:
            return Markup()
        data = base64.b64encode(pictures[name].read_bytes()).decode()
        caption = plots.CAPTIONS[name]
        return Markup('<img src="data:image/png;base64,{}" alt="{}"><p class="soft">{}</p>').format(
            data, caption, caption
        )

    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        dataset=summary["dataset"],
        findings=summary["findings"],
        lines=report.sentences(summary),
        tiles=_tiles(sections),
        table=_table,
        picture=picture,
        file_rows=[file | {"sha256": file["sha256"][:12]} for file in sections["schema"]["files"]],
        quarantine_rows=[
            {"reason": reason, "rows": found["rows"], "where": _some(found["lines"], found["rows"])}
            for reason, found in sections["schema"]["quarantined"].items()
        ],
        metadata_rows=[_metadata_row(column) for column in sections["schema"]["metadata"]],
        length_rows=_length_rows(sections["lengths"]),
        letter_rows=sections["orthography"]["letters"],
        diacritic_rows=[_group_row(group) for group in sections["orthography"]["diacritic_groups"][:MAX_GROUPS]],
        coverage_rows=sections["coverage"]["letters"],
        split_rows=_as_dicts(report.split_rows(summary)),
        overlap_rows=[
            {"overlap": name.replace("_", " "), "rows": count}
            for name, count in ((sections["split"]["certificate"] or {}).get("overlaps") or {}).items()
        ],
        argument_rows=[
            {"argument": f"--{key}", "value": value}
            for key, value in summary["arguments"].items()
            if value not in (None, [])
        ],
        lexicon_json=script_json([_lexicon_row(entry) for entry in entries]),
    )


def script_json(value: object) -> object:
    """JSON that can't close the script element it stands in, nor open a comment."""
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _lexicon_row(entry: LexiconEntry) -> list:
    glosses, pos = report.gloss_and_pos(entry)
    return [entry.form, glosses, pos, entry.count, _some(entry.sources[:MAX_SOURCES], len(entry.sources))]


def _some(shown: Sequence[str], number: int) -> str:
    more = number - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")


def _table(rows: Sequence[Mapping]) -> object:
    """An HTML table with the keys of the first row as its header; numbers to the right."""
    from markupsafe import Markup

    if not rows:
        return Markup('<p class="soft">none</p>')
    keys = list(rows[0])
    head = Markup().join(Markup("<th>{}</th>").format(key.replace("_", " ")) for key in keys)
    body = Markup().join(
        Markup("<tr>{}</tr>").format(Markup().join(_cell(row.get(key)) for key in keys)) for row in rows
    )
    return Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(head, body)


def _cell(value: object) -> object:
    from markupsafe import Markup

    if value is None:
        return Markup("<td></td>")
    if isinstance(value, bool) or not isinstance(value, int | float):
        shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        return Markup("<td>{}</td>").format(shown)
    return Markup('<td class="n">{}</td>').format(f"{value:,}" if isinstance(value, int) else f"{value:.3g}")


def _tiles(sections: dict) -> list[tuple[str, str]]:
    lexicon, split, lengths = sections["lexicon"], sections["split"], sections["lengths"]
    tiles = [
        (f"{sections['schema']['rows']:,}", "rows"),
        (f"{lexicon['forms']:,}", "forms of the language"),
        (f"{lexicon['with_gloss']:,}", "with a gloss"),
    ]
    if lengths["words"] and lengths["words"]["language"]["tokens_a_word"]:
        tiles.append((f"{lengths['words']['language']['tokens_a_word']:.1f}", "tokens a word of the language"))
    if split["parts"]:
        tiles.append((f"{split['parts']['test']['unseen']:,}", "unseen test rows"))
    return tiles


def _metadata_row(column: dict) -> dict:
    values = column["values"] or {}
    shown = ", ".join(f"{value} {count:,}" for value, count in list(values.items())[:8])
    types = ", ".join(column["types"])
    return {key: column[key] for key in ("column", "rows", "missing", "empty", "distinct")} | {
        "types": types,
        "values": shown,
    }


def _group_row(group: dict) -> dict:
    forms = [
        f"{form['form']} ({form['rows']:,}{', ' + form['gloss'] if form['gloss'] else ''})" for form in group["forms"]
    ]
    return {"forms (rows, gloss)": "; ".join(forms), "reading": group["reading"]}


def _length_rows(lengths: dict) -> list[dict]:
    spreads = {
        f"{part}, {unit}": lengths[part][unit] for part in ("question", "answer") for unit in ("characters", "bytes")
    }
    if lengths["tokens"]:
        spreads |= {f"{part}, tokens": lengths["tokens"][part] for part in ("prompt", "answer", "row")}
    return [
        {"length": name, "mean": spread["mean"]}
        | {f"{percentile} %": round(value) for percentile, value in spread["percentiles"].items()}
        for name, spread in spreads.items()
    ]


def _as_dicts(rows: list[list[str]]) -> list[dict]:
    header, *cells = rows
    return [dict(zip(header, line, strict=True)) for line in cells]
