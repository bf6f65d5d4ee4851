"""What a person reads about prediction rows: tables with intervals, examples side by side, a picture.

A prediction row is a dict: ``id``, ``prompt`` (string or chat messages), ``reference``, ``prediction`` (None if the
model gave none), ``seen`` (True, False or None: did the row's lexemes occur in training rows), ``forms`` (the word
forms asked for, a list or None) and ``lexemes`` (what the row is about; rows that share one are resampled together).
The numbers come from ``comparison.score``.
"""

import hashlib
import json
import re
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from stoney_rl import terminal
from stoney_rl.errors import StoneyError
from stoney_rl.metrics import forms, picture
from stoney_rl.metrics.retrieval import question_of
from stoney_rl.text import fold, normalize

GROUPS = ("all", "seen", "unseen")
HEADLINE = ("chrf", "exact", "form")  # what is drawn, and what differences are tested on: few tests show more
METRIC_NAMES = {
    "chrf": "chrF++",
    "bleu": "BLEU",
    "exact": "exact match",
    "form": "form accuracy",
    "comet": "COMET",
    "mauve": "MAUVE",
}
METRIC_MEANING = {
    "chrf": "overlap of letters and words with the expected answer, 0-100",
    "bleu": "overlap of runs of words with the expected answer, 0-100",
    "exact": "share of answers that are the expected answer to the letter, 0-1",
    "form": "share of the asked word forms that the answer contains, 0-1",
    "diacritic_error_rate": "share of marked letters with wrong marks, where the letters are right, 0-1",
    "morphology_error_rate": "share of needed affixes that are wrong or missing, 0-1",
    "hallucinated_form_rate": "share of the answer's words of the language that nothing attests, 0-1",
    "comet": "meaning kept, as guessed by a model that has not learned this language, about 0-1",
    "mauve": "likeness of all answers, as a set, to the expected ones, 0-1",
}

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), told apart with any colour vision; hatches for print.
_COLOURS = ("#0072B2", "#E69F00", "#999999", "#009E73", "#CC79A7", "#56B4E9")
_HATCHES = ("", "//", "..", "\\\\", "xx", "--")


def metric_name(metric: str, scale: Sequence[float]) -> str:
    """What a person calls the metric; ↓ where the best of its ``scale`` (worst, best) is the lower one."""
    return _plain_name(metric) + ("" if scale[1] > scale[0] else " ↓")


def metric_table(results: dict[str, dict], *, width: int | None = None) -> str:
    """A terminal table of scores: systems as columns, metric and group as rows, '0.44 [0.31, 0.57]'.

    ``results``: system name -> ``comparison.score`` of it, all on the same rows. Where ``width`` (the terminal's) is too
    narrow, intervals go under the values. Every metric's note and signature follow.
    """
    if not results:
        raise StoneyError("metric table: no results; pass at least one system's scores")
    first = next(iter(results.values()))
    for name, result in results.items():
        if result["rows_sha256"] != first["rows_sha256"]:
            raise StoneyError(
                f"metric table: {name!r} was scored on other rows than {next(iter(results))!r}; score both on one split"
            )
    width = width or shutil.get_terminal_size((100, 24)).columns
    metrics = _entries(results)
    cells = [
        [
            metric_name(metric, next(iter(found.values()))["scale"]) if index == 0 else "",
            group,
            *(_range(entry[key] for entry in found.values()) for key in ("n", "units")),
            *(_cell(found.get(name)) for name in results),
        ]
        for metric, groups in metrics.items()
        for index, (group, found) in enumerate(groups.items())
    ]
    starts = [position for position, line in enumerate(cells) if line[0]][1:]
    lines = _table(["metric", "rows", "n", "lexemes", *results], cells, starts, width)
    # Signatures stay on one line each, whatever the width: they are copied, not read.
    signatures = [next(iter(groups["all"].values()))["signature"] for groups in metrics.values()]
    wrapped = [line for note in _table_notes(results, metrics) for line in terminal.wrap(note, width, "  ")]
    return "\n".join([*lines, "", *wrapped, *signatures])


def _entries(results: dict[str, dict]) -> dict[str, dict[str, dict[str, dict]]]:
    """metric -> group -> system -> its entry, for what is there: not every metric has every group, or every system."""
    found: dict = {}
    for name, result in results.items():
        for group, metrics in result["groups"].items():
            for metric, entry in metrics.items():
                found.setdefault(metric, {}).setdefault(group, {})[name] = entry
    return found


def _table_notes(results: dict[str, dict], metrics: dict) -> list[str]:
    first = next(iter(results.values()))
    notes = [
        f"{metric_name(metric, next(iter(groups['all'].values()))['scale'])}: {METRIC_MEANING[metric]}."
        for metric, groups in metrics.items()
        if metric in METRIC_MEANING
    ]
    if any(metric.startswith("pass@") for metric in metrics):
        notes.append("pass@k: share of rows that at least one of k sampled answers has all asked forms of, 0-1.")
    if any("↓" in note for note in notes):
        notes.append("↓: lower is better.")
    notes.append("seen: training rows mention a word that the row is about; unseen: none does.")
    notes.append(
        "n: rows scored. lexemes: groups of rows that share no word; only these are independent of each other."
    )
    notes.append(
        f"[a, b]: {100 * first['confidence']:g}% interval over the choice of test rows ({first['resamples']:,} "
        f"resamples by lexeme, seed {first['seed']}); another training seed is not covered."
    )
    if any(entry.get("spread") for groups in metrics.values() for entry in groups["all"].values()):
        notes.append("{a, b}: the least and the greatest value over the metric's own seeds; no interval.")
    shared: dict[tuple[str, str], list[str]] = {}
    for name, result in results.items():
        for metric, note in result["notes"].items():
            shared.setdefault((metric, note), []).append(name)
    notes += [f"{_plain_name(metric)}, {', '.join(names)}: {note}." for (metric, note), names in shared.items()]
    for name, result in results.items():
        entries = result["groups"]["all"]
        unscored = [f"{_plain_name(metric)} {one['unscored']}" for metric, one in entries.items() if one["unscored"]]
        if unscored:
            notes.append(f"{name}: rows without a score, of {result['n']}: {', '.join(unscored)}.")
        if entries.get("exact", {}).get("value") == 1:
            notes.append(
                f"{name}: every prediction equals its reference. Perfect, or were the references passed as predictions?"
            )
    return notes


def examples_table(
    systems: dict[str, Sequence[dict]], *, n: int = 10, seed: int = 0, width: int | None = None, max_lines: int = 3
) -> str:
    """Examples side by side: what was asked, what was expected, what each system said, with a mark for each answer.

    ``systems``: name -> prediction rows, matched by id. Examples are drawn at random with ``seed``, half of them
    unseen where there are as many, never picked by their scores. ✓ every asked form is there (or, where no form is
    asked, the answer is the expected one); ~ some of them; ✗ none; ? unscored. Texts are cut after ``max_lines`` lines.
    """
    import numpy as np

    if not systems:
        raise StoneyError("examples table: no systems; pass name -> prediction rows")
    width = max(40, width or shutil.get_terminal_size((100, 24)).columns)
    names = list(systems)
    rows = list(systems[names[0]])
    aligned = {name: _aligned(rows, systems[name], (names[0], name)) for name in names}
    marks = {name: _marks(aligned[name]) for name in names}
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(rows)).tolist()
    unseen = [row for row in order if rows[row]["seen"] is False]
    others = [row for row in order if rows[row]["seen"] is not False]
    take = min(len(unseen), max(n - n // 2, n - len(others)))
    chosen = unseen[:take] + others[: n - take]

    label_width = max(terminal.display_width(label) for label in ["expected", *names]) + 1
    indent = 4
    room = width - indent - label_width - 2
    lines = [
        f"{len(chosen)} of {len(rows)} test rows, drawn at random (seed {seed}).",
        *terminal.wrap("✓ all that was asked for is there, ~ some of it, ✗ none of it, ? can't be scored", width, "  "),
    ]
    for position, row in enumerate(chosen, 1):
        seen = {True: "its words were in training", False: "its words were never trained on"}.get(rows[row]["seen"], "")
        lines += ["", f"{position:>2}. {seen}".rstrip()]
        entries = [("asked", " ", question_of(rows[row]["prompt"])), ("expected", " ", rows[row]["reference"])]
        entries += [(name, marks[name][row], aligned[name][row]["prediction"]) for name in names]
        for label, mark, text in entries:
            text = "(no answer)" if text is None else normalize(text) or "(empty)"
            for index, piece in enumerate(terminal.cut(text, room, max_lines)):
                head = terminal.pad(label, label_width) + mark if index == 0 else " " * (label_width + 1)
                lines.append(f"{' ' * indent}{head} {piece}")
    return "\n".join(lines)


def plot(results: dict[str, dict], path: str | Path, *, title: str | None = None) -> Path:
    """Write one PNG: a panel for each metric, bars with 95 % intervals by system, for seen and unseen rows.

    ``results`` as in ``metric_table``. The file appears whole or not at all. Returns its path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not results:
        raise StoneyError("plot: no results; pass at least one system's scores")
    groups = [group for group in ("seen", "unseen") if _group_size(results, group)] or ["all"]
    figure = Figure(figsize=(3.9 * len(HEADLINE), 4.3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(HEADLINE))
    bar = 0.8 / len(results)
    for panel, metric in zip(panels, HEADLINE, strict=True):
        top = max(next(iter(results.values()))["groups"]["all"][metric]["scale"])
        for index, (name, result) in enumerate(results.items()):
            colour, hatch = _COLOURS[index % len(_COLOURS)], _HATCHES[index % len(_HATCHES)]
            for position, group in enumerate(groups):
                entry = result["groups"][group][metric]
                x = position - 0.4 + bar * (index + 0.5)
                label = name if position == 0 else None
                height = entry["value"] or 0
                panel.bar(x, height, bar * 0.9, color=colour, hatch=hatch, edgecolor="white", label=label)
                if entry["value"] is None:
                    panel.text(x, 0.02 * top, "no rows", rotation=90, ha="center", va="bottom", fontsize=8)
                    continue
                tip = entry["value"]
                if entry["low"] is not None:
                    below, above = max(0, tip - entry["low"]), max(0, entry["high"] - tip)
                    panel.errorbar(x, tip, yerr=[[below], [above]], fmt="none", ecolor="black", capsize=3, lw=1.1)
                    tip = max(tip, entry["high"])
                text = _number(entry["value"], entry["scale"])
                panel.text(x, tip + 0.015 * top, text, ha="center", va="bottom", fontsize=8)
        panel.set_ylim(0, 1.12 * top)
        panel.set_yticks([top * step / 5 for step in range(6)])
        counts = [_range(result["groups"][group][metric]["n"] for result in results.values()) for group in groups]
        panel.set_xticks(
            range(len(groups)), [f"{group} words\nn = {n}" for group, n in zip(groups, counts, strict=True)]
        )
        panel.set_xlim(-0.5, len(groups) - 0.5)
        panel.set_title(METRIC_NAMES[metric], fontsize=11)
        panel.set_xlabel("\n".join(textwrap.wrap(METRIC_MEANING[metric], 38)), fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
        panel.grid(axis="y", lw=0.4, color="#cccccc")
    figure.suptitle(title or "Scores with 95% intervals over the choice of test rows", fontsize=12)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return picture.save(figure, path)


def rows_sha256(rows: Sequence[dict]) -> str:
    """SHA-256 over what the systems were asked: ids, prompts, references, sorted by id. Predictions are not in it."""
    asked = sorted([str(row["id"]), row["prompt"], row["reference"]] for row in rows)
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def lexeme_clusters(lexemes: Sequence[Sequence[str] | None]) -> list[int]:
    """A label for each row: rows that share a lexeme, directly or through other rows, have the same one.

    Labels are the index of the cluster's first row; a row without lexemes is its own cluster. Forms are compared
    folded (``text.fold``).
    """
    parent = list(range(len(lexemes)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[str, int] = {}
    for row, mentioned in enumerate(lexemes):
        for lexeme in filter(None, map(fold, mentioned or [])):
            older, newer = sorted([root(first.setdefault(lexeme, row)), root(row)])
            parent[newer] = older
    return [root(row) for row in range(len(lexemes))]


def check_rows(rows: Sequence[dict]) -> None:
    """Raise ``StoneyError`` unless ``rows`` are prediction rows as above, at least one, with ids that do not repeat."""
    if isinstance(rows, (str, dict)) or not rows:
        raise StoneyError(
            "predictions: expected a list of rows with at least one row; check that the split is not empty"
        )
    seen_ids = set()
    for index, row in enumerate(rows):
        missing = [key for key in ("id", "prompt", "reference", "prediction", "seen") if key not in row]
        if missing:
            raise StoneyError(f"predictions[{index}]: no {', '.join(missing)}; every row needs it")
        name = f"predictions[{index}] (id {row['id']!r})"
        if row["id"] in seen_ids:
            raise StoneyError(f"{name}: the id is there twice; expected one prediction for each row")
        seen_ids.add(row["id"])
        if not isinstance(row["reference"], str):
            raise StoneyError(f"{name}: reference: expected a string, got {type(row['reference']).__name__}")
        if row["prediction"] is not None and not isinstance(row["prediction"], str):
            raise StoneyError(f"{name}: prediction: expected a string or None, got {type(row['prediction']).__name__}")
        if not (row["seen"] is None or isinstance(row["seen"], bool)):
            raise StoneyError(f"{name}: seen: expected true, false or null, got {row['seen']!r}")
        forms.check_forms(f"{name}: forms", row.get("forms"))
        lexemes = row.get("lexemes") or []
        if not isinstance(lexemes, (list, tuple)) or not all(isinstance(lexeme, str) for lexeme in lexemes):
            raise StoneyError(f"{name}: lexemes: expected a list of strings, got {str(lexemes)[:60]!r}")


def _aligned(rows_a, rows_b, names):
    """``rows_b`` in the order of ``rows_a``; StoneyError unless both are predictions for the very same rows."""
    check_rows(rows_a)
    check_rows(rows_b)
    by_id = {row["id"]: row for row in rows_b}
    only_a = [row["id"] for row in rows_a if row["id"] not in by_id]
    only_b = sorted(set(map(str, by_id)) - {str(row["id"]) for row in rows_a})
    for name, other, ids in ((names[0], names[1], only_a), (names[1], names[0], only_b)):
        if ids:
            raise StoneyError(
                f"{len(ids)} rows of {name!r} have no prediction of {other!r} (first id: {ids[0]!r}): "
                "expected predictions for the same test rows; evaluate both on one split"
            )
    for row in rows_a:
        other = by_id[row["id"]]
        for key in ("prompt", "reference", "seen", "forms"):
            if row.get(key) != other.get(key):
                raise StoneyError(
                    f"row {row['id']!r}: {key} differs between {names[0]!r} and {names[1]!r}: the two were not asked "
                    "the same; evaluate both on one split"
                )
    return [by_id[row["id"]] for row in rows_a]


def _plain_name(metric):
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def _group_size(results, group):
    return max(result["group_sizes"][group] for result in results.values())


def _range(counts):
    found = sorted(set(counts))
    return f"{found[0]}" if len(found) == 1 else f"{found[0]}-{found[-1]}"


def _marks(rows):
    """✓, ~, ✗ or ? for each row: by its share of the asked forms or, where none is asked, by exact match."""
    from stoney_rl.metrics import suite

    scores = suite.score_rows({name: suite.STRING_METRICS[name] for name in ("exact", "form")}, rows)
    return [_mark(*values) for values in zip(scores["exact"].rows, scores["form"].rows, strict=True)]


def _mark(exact, form):
    value = exact if form is None else form
    if value is None:
        return "?"
    return "✓" if value == 1 else "✗" if value == 0 else "~"


def _number(value, scale):
    """``value`` with the decimals that carry information at the sizes of test set seen here."""
    return f"{value:.{1 if abs(scale[1] - scale[0]) > 10 else 2}f}"


def _cell(entry):
    if entry is None or entry["value"] is None:
        return "-"
    value, *ends = (
        None if number is None else _number(number, entry["scale"])
        for number in (entry["value"], *(entry.get("spread") or (entry["low"], entry["high"])))
    )
    if entry.get("spread"):
        return f"{value} {{{ends[0]}, {ends[1]}}}"
    return f"{value} [{ends[0]}, {ends[1]}]" if ends[0] else f"{value} [too few rows]"


def _table(header, cells, starts, width):
    """Lines of a table with a rule before each line of ``starts``; intervals beside the values, or under them where
    ``width`` is too narrow."""
    lines = _ruled(header, cells, starts)
    if max(map(terminal.display_width, lines)) <= width:
        return lines
    return _ruled(header, [part for line in cells for part in _two_lines(line)], [2 * start for start in starts])


def _ruled(header, cells, starts):
    first, rule, *lines = terminal.grid(header, cells, rules=len(cells))
    ruled = [part for index, line in enumerate(lines) for part in ([rule, line] if index in starts else [line])]
    return [first, rule, *ruled]


def _two_lines(cells):
    """One table line as two: the values, and under them the intervals."""
    parts = [re.match(r"(.*?)(?: ([\[{].*))?$", cell).groups("") for cell in cells]
    return [[head for head, _ in parts], [tail for _, tail in parts]]
