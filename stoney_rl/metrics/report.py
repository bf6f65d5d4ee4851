"""From predictions to what a person reads: scores with intervals, paired comparisons, tables, a picture, a verdict.

A prediction row is a dict: ``id``, ``prompt`` (string or chat messages), ``reference``, ``prediction`` (None if the
model gave none), ``seen`` (True, False or None: did the row's lexemes occur in training rows), ``forms`` (the word
forms asked for, a list or None) and ``lexemes`` (what the row is about; rows that share one are resampled together).
"""

import hashlib
import json
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from stoney_rl import terminal
from stoney_rl.errors import StoneyError
from stoney_rl.metrics import chrf, exact, forms, intervals
from stoney_rl.metrics.retrieval import question_of
from stoney_rl.text import fold, normalize

GROUPS = ("all", "seen", "unseen")
METRICS = ("chrf", "exact", "form")
METRIC_NAMES = {"chrf": "chrF++", "exact": "exact match", "form": "form accuracy"}
METRIC_MEANING = {
    "chrf": "overlap of letters and words with the expected answer, 0-100",
    "exact": "share of answers that are the expected answer to the letter, 0-1",
    "form": "share of the asked word forms that the answer contains, 0-1",
}
# Full score of each metric, and how many decimals carry information at the sizes of test set seen here.
METRIC_TOP = {"chrf": 100.0, "exact": 1.0, "form": 1.0}
METRIC_DIGITS = {"chrf": 1, "exact": 2, "form": 2}
GROUP_PHRASE = {
    "all": "On all test rows",
    "seen": "On lexemes that training rows also mention",
    "unseen": "On lexemes never trained on",
}

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), told apart with any colour vision; hatches for print.
_COLOURS = ("#0072B2", "#E69F00", "#999999", "#009E73", "#CC79A7", "#56B4E9")
_HATCHES = ("", "//", "..", "\\\\", "xx", "--")


def score(rows: Sequence[dict], *, seed: int, resamples: int = intervals.RESAMPLES) -> dict:
    """Score one system's prediction rows, for all rows and for the seen and unseen ones apart.

    Returns {"n", "seed", "resamples", "confidence", "rows_sha256", "suspicious", "group_sizes": {group: rows},
    "groups": {group: {metric: {"value", "low", "high", "n", "unscored", "units", "signature"}}}}. chrF++ is 0-100,
    exact match and form accuracy 0-1; value is None where no row can be scored. A row without a prediction or with an
    empty reference is unscored by every metric, a row that asks for no form by form accuracy; an empty prediction is an
    answer and scores 0. ``rows_sha256`` covers ids, prompts and references, not predictions. Raises StoneyError for
    rows that lack a field, ids that repeat, or no row at all.
    """
    scored = _Scored(rows)
    results = {
        "n": len(rows),
        "seed": seed,
        "resamples": resamples,
        "confidence": intervals.CONFIDENCE,
        "rows_sha256": rows_sha256(rows),
        "suspicious": scored.suspicious,
        "group_sizes": {group: len(_members(rows, group)) for group in GROUPS},
        "groups": {},
    }
    for group in GROUPS:
        members = _members(rows, group)
        labels = [scored.clusters[row] for row in members]
        table = {}
        for metric in METRICS:
            usable = [row for row in members if scored.values[metric][row] is not None]
            if metric == "chrf":
                labels_used = [scored.clusters[row] for row in usable]
                interval = intervals.chrf_interval(
                    [scored.counts[row] for row in usable], seed=seed, resamples=resamples, clusters=labels_used
                )
            else:
                interval = intervals.mean_interval(
                    [scored.values[metric][row] for row in members],
                    seed=seed,
                    resamples=resamples,
                    clusters=labels,
                    bounds=(0.0, 1.0),
                )
            table[metric] = {
                "value": interval.value if interval else None,
                "low": interval.low if interval else None,
                "high": interval.high if interval else None,
                "n": len(usable),
                "unscored": len(members) - len(usable),
                "units": interval.units if interval else 0,
                "signature": signature(metric, seed=seed, resamples=resamples),
            }
        results["groups"][group] = table
    return results


def score_rows(rows: Sequence[dict]) -> list[dict]:
    """Each row's own scores: {"id", "chrf" (sentence chrF++, 0-100), "exact", "form"}, None where unscored."""
    scored = _Scored(rows)
    return [
        {"id": row["id"], **{metric: scored.values[metric][index] for metric in METRICS}}
        for index, row in enumerate(rows)
    ]


def compare(
    rows_a: Sequence[dict],
    rows_b: Sequence[dict],
    *,
    seed: int,
    resamples: int = intervals.RESAMPLES,
    names: tuple[str, str] = ("base", "tuned"),
) -> dict:
    """System b minus system a on the same rows, paired, for each group and metric.

    Returns {"a", "b" (the names), "n", "seed", "resamples", "confidence", "rows_sha256", "groups": {group: {metric:
    {"difference", "low", "high", "p", "n", "unscored", "units", "conclusive", "signature"}}}}; difference is None where
    no row is scored for both. ``conclusive``: the 95 % interval excludes zero and rests on at least
    ``intervals.MIN_UNITS`` units. Nine intervals at 95 % are not one: choose the metric and the group that decide
    before you look. Rows are matched by id; raises StoneyError if ids, prompts, references, asked forms or seen differ.
    """
    rows_b = _aligned(rows_a, rows_b, names)
    a, b = _Scored(rows_a), _Scored(rows_b)
    results = {
        "a": names[0],
        "b": names[1],
        "n": len(rows_a),
        "seed": seed,
        "resamples": resamples,
        "confidence": intervals.CONFIDENCE,
        "rows_sha256": rows_sha256(rows_a),
        "groups": {},
    }
    for group in GROUPS:
        members = _members(rows_a, group)
        table = {}
        for metric in METRICS:
            values_a, values_b = a.values[metric], b.values[metric]
            usable = [row for row in members if values_a[row] is not None and values_b[row] is not None]
            common = {"seed": seed, "resamples": resamples, "clusters": [a.clusters[row] for row in usable]}
            if metric == "chrf":
                found = intervals.chrf_difference(
                    [a.counts[row] for row in usable], [b.counts[row] for row in usable], **common
                )
            else:
                found = intervals.mean_difference(
                    [values_a[row] for row in usable], [values_b[row] for row in usable], bounds=(0.0, 1.0), **common
                )
            table[metric] = {
                "difference": found.value if found else None,
                "low": found.low if found else None,
                "high": found.high if found else None,
                "p": found.p if found else None,
                "n": len(usable),
                "unscored": len(members) - len(usable),
                "units": found.units if found else 0,
                "conclusive": found.conclusive if found else False,
                "signature": signature(metric, seed=seed, resamples=resamples, paired=True),
            }
        results["groups"][group] = table
    return results


def verdict(comparison: dict, *, group: str = "unseen", metric: str = "chrf") -> str:
    """One sentence in plain words on what ``compare`` found for one group and metric; doubtful results say so."""
    found = comparison["groups"][group][metric]
    a, b = comparison["a"], comparison["b"]
    where, name = GROUP_PHRASE[group], METRIC_NAMES[metric]
    if found["difference"] is None:
        return f"{where}, no row could be scored for {name}: nothing can be said about {b} against {a}."
    digits = METRIC_DIGITS[metric]
    confidence = f"{100 * comparison['confidence']:g}%"
    n = f"n = {found['n']}"
    if found["units"] < found["n"]:
        n += f" in {found['units']} lexeme groups"
    if found["unscored"]:
        n += f", {found['unscored']} unscored"
    unit = f"{name} points" if metric == "chrf" else f"in {name}"
    if found["low"] is None:
        return (
            f"{where}, there are too few rows to compare {b} with {a} (difference {found['difference']:+.{digits}f} "
            f"{unit}, {n}): nothing is shown."
        )
    low, high = found["low"], found["high"]
    if found["conclusive"]:
        better = found["difference"] > 0
        if not better:
            low, high = -high, -low
        return (
            f"{where}, {b} is {'better' if better else 'worse'} than {a} by "
            f"{abs(found['difference']):.{digits}f} {unit} ({confidence} interval {low:.{digits}f} to "
            f"{high:.{digits}f}, {n}): the difference is not chance."
        )
    start = (
        f"{where}, {b} differs from {a} by {found['difference']:+.{digits}f} {unit} "
        f"({confidence} interval {low:+.{digits}f} to {high:+.{digits}f}, {n})"
    )
    if low > 0 or high < 0:
        return (
            f"{start}, but that rests on {found['units']} independent lexeme groups and at least "
            f"{intervals.MIN_UNITS} are needed: inconclusive."
        )
    return f"{start}: it may be chance, neither is shown to be better. More test rows would narrow the interval."


def metric_table(results: dict[str, dict], *, comparisons: Sequence[dict] = (), width: int | None = None) -> str:
    """A terminal table of ``score`` results: systems as columns, metric and group as rows, '0.44 [0.31, 0.57]'.

    ``results``: system name -> ``score`` of it, all on the same rows; ``comparisons``: ``compare`` results, a column
    each, '*' where conclusive. Where ``width`` (the terminal's) is too narrow, intervals go under the values and
    comparisons under the scores.
    """
    if not results:
        raise StoneyError("metric table: no results; pass at least one system's score()")
    first = next(iter(results.values()))
    for name, result in [*results.items(), *((f"{c['b']} - {c['a']}", c) for c in comparisons)]:
        if result["rows_sha256"] != first["rows_sha256"]:
            raise StoneyError(
                f"metric table: {name!r} was scored on other rows than {next(iter(results))!r}; score both on one split"
            )
    width = width or shutil.get_terminal_size((100, 24)).columns
    columns = {name: _column(result, "value") for name, result in results.items()}
    differences = {f"{c['b']} − {c['a']}": _column(c, "difference", sign="+") for c in comparisons}
    labels = {
        "metric": [METRIC_NAMES[metric] if group == GROUPS[0] else "" for metric in METRICS for group in GROUPS],
        "rows": [group for _ in METRICS for group in GROUPS],
        **{
            name: [
                str(min(result["groups"][group][metric][key] for result in results.values()))
                for metric in METRICS
                for group in GROUPS
            ]
            for name, key in (("n", "n"), ("lexemes", "units"))
        },
    }
    one_table = _table({**labels, **columns, **differences}, width)
    if differences and any(terminal.display_width(line) > width for line in one_table):
        lines = [*_table({**labels, **columns}, width), "", *_table({**labels, **differences}, width)]
    else:
        lines = one_table
    notes = [f"{METRIC_NAMES[metric]}: {METRIC_MEANING[metric]}." for metric in METRICS]
    notes.append("seen: training rows mention a word that the row is about; unseen: none does.")
    notes.append(
        "n: rows scored. lexemes: groups of rows that share no word; only these are independent of each other."
    )
    notes.append(
        f"[a, b]: {100 * first['confidence']:g}% interval over the choice of test rows ({first['resamples']:,} "
        f"resamples by lexeme, seed {first['seed']}); another training seed is not covered."
    )
    if comparisons:
        notes.append(f"*: the interval excludes zero and rests on at least {intervals.MIN_UNITS} lexeme groups.")
    notes += [
        f"{name}: {entry['unscored']} of {entry['n'] + entry['unscored']} rows unscored for {METRIC_NAMES[metric]}."
        for name, result in results.items()
        for metric, entry in result["groups"]["all"].items()
        if entry["unscored"]
    ]
    notes += [
        f"{name}: every prediction equals its reference. Perfect, or were the references passed as predictions?"
        for name, result in results.items()
        if result["suspicious"]
    ]
    # Signatures stay on one line each, whatever the width: they are copied, not read.
    signatures = [metric["signature"] for metric in first["groups"]["all"].values()]
    wrapped = [line for note in notes for line in terminal.wrap(note, width, "  ")]
    return "\n".join([*lines, "", *wrapped, *signatures])


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
    marks = {name: [_mark(values) for values in score_rows(aligned[name])] for name in names}
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
        raise StoneyError("plot: no results; pass at least one system's score()")
    groups = [group for group in ("seen", "unseen") if _group_size(results, group)] or ["all"]
    figure = Figure(figsize=(3.9 * len(METRICS), 4.3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(METRICS))
    bar = 0.8 / len(results)
    for panel, metric in zip(panels, METRICS, strict=True):
        top = METRIC_TOP[metric]
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
                text = f"{entry['value']:.{METRIC_DIGITS[metric]}f}"
                panel.text(x, tip + 0.015 * top, text, ha="center", va="bottom", fontsize=8)
        panel.set_ylim(0, 1.12 * top)
        panel.set_yticks([top * step / 5 for step in range(6)])
        counts = [_n_range([result["groups"][group][metric]["n"] for result in results.values()]) for group in groups]
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
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png", metadata={"Software": None})
        partial.replace(path)
    except OSError as error:
        raise StoneyError(f"plot: can't write {path}: {error.strerror}; choose a folder that exists") from error
    return path


def signature(metric: str, *, seed: int, resamples: int, paired: bool = False) -> str:
    """What a number of ``metric`` depends on besides the rows: versions, normaliser, interval method, seed."""
    own = {"chrf": chrf.signature, "exact": lambda: exact.SIGNATURE, "form": lambda: forms.SIGNATURE}[metric]()
    method = "paired-bootstrap" if paired else "bootstrap"
    return f"{own}|ci:{method}-expanded-percentile|by:lexeme|bs:{resamples}|seed:{seed}"


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


class _Scored:
    """Checked rows with their per-row values, chrF++ counts (None where unscored) and cluster labels."""

    def __init__(self, rows: Sequence[dict]):
        _check_rows(rows)
        usable = [i for i, row in enumerate(rows) if row["prediction"] is not None and normalize(row["reference"])]
        predictions = [rows[i]["prediction"] for i in usable]
        references = [rows[i]["reference"] for i in usable]
        self.clusters = lexeme_clusters([row.get("lexemes") for row in rows])
        self.values: dict[str, list] = {metric: [None] * len(rows) for metric in METRICS}
        self.counts: list = [None] * len(rows)
        self.suspicious = False
        if not usable:
            return
        counts = chrf.statistics(predictions=predictions, references=references)
        exact_values = exact.exact_match(predictions=predictions, references=references)
        form_values = forms.form_accuracy(predictions=predictions, targets=[rows[i].get("forms") for i in usable])
        sentence = chrf.score_from_counts(counts).tolist()
        for position, row in enumerate(usable):
            self.counts[row] = counts[position]
            self.values["chrf"][row] = sentence[position]
            self.values["exact"][row] = exact_values[position]
            self.values["form"][row] = form_values[position]
        self.suspicious = all(exact_values)


def _check_rows(rows):
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
    _check_rows(rows_a)
    _check_rows(rows_b)
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


def _members(rows, group):
    return [index for index, row in enumerate(rows) if group == "all" or row["seen"] is (group == "seen")]


def _group_size(results, group):
    return max(result["group_sizes"][group] for result in results.values())


def _n_range(counts):
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"


def _mark(values):
    """✓, ~, ✗ or ? for one row of ``score_rows``."""
    value = values["exact"] if values["form"] is None else values["form"]
    if value is None:
        return "?"
    return "✓" if value == 1 else "✗" if value == 0 else "~"


def _cell(value, entry, metric, sign=""):
    if value is None:
        return "-"
    spec = f"{sign}.{METRIC_DIGITS[metric]}f"
    if entry["low"] is None:
        return f"{value:{spec}} [too few rows]"
    return f"{value:{spec}} [{entry['low']:{spec}}, {entry['high']:{spec}}]"


def _column(result, key, sign=""):
    """One system's (or one comparison's) cells, metric by metric and group by group."""
    entries = [(metric, result["groups"][group][metric]) for metric in METRICS for group in GROUPS]
    return [
        _cell(entry[key], entry, metric, sign) + (" *" if entry.get("conclusive") else "") for metric, entry in entries
    ]


def _table(columns, width):
    """Lines of a table with intervals beside the values, or under them where ``width`` is too narrow."""
    cells = [list(line) for line in zip(*columns.values(), strict=True)]
    lines = terminal.grid(list(columns), cells, rules=len(GROUPS))
    if max(map(terminal.display_width, lines)) <= width:
        return lines
    return terminal.grid(list(columns), [part for line in cells for part in _two_lines(line)], rules=2 * len(GROUPS))


def _two_lines(cells):
    """One table line as two: the values, and under them the intervals."""
    parts = [cell.partition(" [") for cell in cells]
    return [[head for head, _, _ in parts], [f"[{tail}" if tail else "" for _, _, tail in parts]]
