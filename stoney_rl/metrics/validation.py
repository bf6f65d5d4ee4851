"""Can a metric be trusted on these rows? Gold is broken in graded steps, and a metric that is any good must follow.

1. ``corruption`` breaks a share of the letters, diacritics, affixes, words or whole answers of the gold answers.
2. Each metric scores the broken answers against the gold ones, as if a system had given them. Its value at a level is the
   mean of its row values; for a metric of the whole set (MAUVE) its own value.
3. A metric passes a kind of error if it ends worse than it started, by more than chance (95 % interval of the paired bootstrap
   over rows, by lexeme; for MAUVE the spread over its seeds) and by at least ``MIN_FALL`` of the way from the start to the
   metric's worst value, and if no step gets better by more than chance.
4. Where a share ``SATURATED`` of the whole fall comes with the first step, the metric tells right from wrong but not bad from
   worse: that is said, too.

A metric is called once on gold and four times for each kind: 21 times in all. Many comparisons of one set of rows are a
screening, not a proof. A metric that passes has seen these errors; whether it agrees with speakers, only speakers can say.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from stoney_rl import terminal
from stoney_rl.errors import StoneyError
from stoney_rl.metrics import corruption, intervals, picture
from stoney_rl.metrics.report import lexeme_clusters
from stoney_rl.metrics.score import Score
from stoney_rl.metrics.suite import Gold, Metric
from stoney_rl.rewards.knowledge import Knowledge
from stoney_rl.text import normalize

if TYPE_CHECKING:
    from tqdm import tqdm

LEVELS = (0.0, 0.1, 0.25, 0.5, 1.0)
MIN_FALL = 0.1
SATURATED = 0.9
RESAMPLES = 1000

FALLS, SATURATES, FLAT, IMPROVES, UNSCORED, ABSENT = "falls", "saturates", "flat", "improves", "unscored", "absent"
PASSING = (FALLS, SATURATES)
MARKS = {FALLS: "✓", SATURATES: "~", FLAT: "✗", IMPROVES: "✗", UNSCORED: "?", ABSENT: "-"}
MEANING = {
    "✓": "gets worse step by step, as it should",
    "~": "gets worse, but at once: it can't tell bad from worse",
    "✗": "does not get worse: don't read it for this kind of error",
    "?": "has no value once the errors are there",
    "-": "the gold answers have nothing of this kind to break",
}

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), told apart with any colour vision.
_STYLES = (("#0072B2", "o"), ("#E69F00", "s"), ("#009E73", "D"), ("#CC79A7", "^"), ("#D55E00", "v"))

# (metric, kind of error) -> why it can't see it; '*' is any kind. Shown where the rows bear it out.
REASONS = {
    ("chrf", "diacritics"): "few letters of these answers bear a mark",
    ("bleu", "diacritics"): "few words of these answers bear a mark",
    ("exact", "*"): "one wrong letter makes the whole answer wrong",
    ("bleu", "*"): "it compares whole words: one wrong letter makes the word wrong",
    ("form", "*"): "it compares whole forms: one wrong letter makes the form wrong",
    ("diacritic_error_rate", "*"): "it judges marks only on forms whose base letters are right",
    ("morphology_error_rate", "*"): "it judges only forms that the lexicon segments",
    ("hallucinated_form_rate", "affixes"): "another affix on a known stem is often an attested form",
    ("hallucinated_form_rate", "words"): "the words that are put in are attested, only wrong here",
    ("hallucinated_form_rate", "answers"): "another row's answer holds attested forms, only wrong here",
    ("mauve", "answers"): "it compares sets of answers, and does not notice which row an answer belongs to",
    ("mauve", "words"): "it compares sets of answers, and the words are those of the set",
    ("comet", "*"): "its model has not been trained on this language",
}


def validate(
    metrics: Mapping[str, Metric],
    rows: Sequence[Mapping],
    knowledge: Knowledge | None = None,
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> dict:
    """What each metric (``suite``) makes of gold answers with known errors; ``rows`` as ``report`` says.

    Of a row only ``prompt``, ``reference``, ``forms`` and ``lexemes`` are read; rows with a blank reference are left out and
    counted. Returns, ready for JSON, {"n", "left_out", "seed", "resamples", "levels", "units": {kind: letters, affixes ... that
    could be broken}, "metrics": {name: {"signature", "scale", "seconds_per_1000", "kinds": {kind: {"verdict", "reason",
    "values", "low", "high", "n"}}}}}; the last four are lists, one entry a level, None where there is no value.
    Raises StoneyError for no metric, or no row with a reference.
    """
    from tqdm import tqdm

    kept = [row for row in rows if normalize(row["reference"])]
    if not metrics or not kept:
        raise StoneyError(
            "metric validation: expected at least one metric and one row with a reference; check the split"
        )
    gold = Gold.of(kept, knowledge)
    bootstrap = {
        "seed": seed,
        "resamples": resamples,
        "clusters": lexeme_clusters([row.get("lexemes") for row in kept]),
    }
    broken = {
        kind: corruption.corrupt(gold.references, kind, seed=seed, knowledge=knowledge) for kind in corruption.KINDS
    }
    answers = {kind: [one.at(level) for level in LEVELS[1:]] for kind, one in broken.items() if one.units}
    calls = len(metrics) * (1 + sum(map(len, answers.values())))
    with tqdm(total=calls, desc="metric validation", unit="call", delay=2, leave=False) as bar:
        found = {name: _screen(name, metric, gold, answers, bootstrap, bar) for name, metric in metrics.items()}
    return {
        "n": len(kept),
        "left_out": len(rows) - len(kept),
        "seed": seed,
        "resamples": resamples,
        "levels": list(LEVELS),
        "units": {kind: one.units for kind, one in broken.items()},
        "metrics": found,
    }


def _screen(
    name: str, metric: Metric, gold: Gold, answers: dict[str, list[list[str]]], bootstrap: dict, bar: "tqdm"
) -> dict:
    """What one metric makes of ``answers``: kind -> the broken answers of each level above 0."""

    def score(texts: Sequence[str]) -> Score:
        bar.update()
        return metric(texts, gold)

    started = time.perf_counter()
    start = score(gold.references)
    scores = {kind: [start, *map(score, levels)] for kind, levels in answers.items()}
    rows = len(gold.references) * (1 + sum(map(len, answers.values())))
    absent = {"verdict": ABSENT, "reason": MEANING[MARKS[ABSENT]], "values": [], "low": [], "high": [], "n": []}
    return {
        "signature": start.signature,
        "scale": list(start.scale),
        "seconds_per_1000": 1000 * (time.perf_counter() - started) / rows,
        "kinds": {
            kind: _judge(name, kind, scores[kind], bootstrap) if kind in scores else absent for kind in corruption.KINDS
        },
    }


def _judge(name: str, kind: str, scores: Sequence[Score], bootstrap: dict) -> dict:
    """The verdict on one metric and one kind of error from its score at each of ``LEVELS``."""
    bounds = _bounds(scores)
    levels = [_interval(score, bounds, bootstrap) for score in scores]
    found = {key: [level and level[index] for level in levels] for index, key in enumerate(("values", "low", "high"))}
    verdict, why = _verdict(scores, bounds, bootstrap)
    known = None if why == scores[0].note else REASONS.get((name, kind)) or REASONS.get((name, "*"))
    reason = "" if verdict == FALLS else "; ".join(filter(None, (why, known)))
    return {"verdict": verdict, "reason": reason, **found, "n": [score.n for score in scores]}


def _verdict(scores: Sequence[Score], bounds: tuple[float, float], bootstrap: dict) -> tuple[str, str]:
    """The verdict and what it rests on."""
    whole = _fall(scores[0], scores[-1], bounds, bootstrap)
    if whole is None:
        return UNSCORED, scores[0].note or "too few rows have a value both before and after"
    fall, low, _ = whole
    for (before, after), (score, later) in zip(pairwise(LEVELS), pairwise(scores), strict=True):
        step = _fall(score, later, bounds, bootstrap)
        if step and step[2] < 0:
            return IMPROVES, f"it gets better from {before:.0%} to {after:.0%} broken, by {-step[0]:.3g}"
    worst = scores[0].scale[0]
    start = _interval(scores[0], bounds, bootstrap)[0]
    if low <= 0:
        return FLAT, f"from gold to all broken it gets worse by {fall:.3g}, which may be chance"
    if fall < MIN_FALL * abs(worst - start):
        return (
            FLAT,
            f"it gets worse by {fall:.3g} only, of the {abs(worst - start):.3g} that are left to its worst value",
        )
    first = _fall(scores[0], scores[1], bounds, bootstrap)
    if first and first[0] >= SATURATED * fall:
        return SATURATES, f"{first[0] / fall:.0%} of the fall comes with the first {LEVELS[1]:.0%}"
    return FALLS, ""


def _fall(before: Score, after: Score, bounds: tuple[float, float], bootstrap: dict) -> tuple | None:
    """(how much worse ``after`` is than ``before``, low, high); None where too few rows have a value in both."""
    worst, best = before.scale
    sign = 1 if best > worst else -1
    if not before.rows:
        if before.value is None or after.value is None:
            return None
        (a_low, a_high), (b_low, b_high) = before.spread, after.spread
        ends = sorted((sign * (a_low - b_high), sign * (a_high - b_low)))
        return sign * (before.value - after.value), *ends
    found = intervals.mean_difference(
        [value and sign * value for value in after.rows],
        [value and sign * value for value in before.rows],
        bounds=tuple(sorted(sign * bound for bound in bounds)),
        **bootstrap,
    )
    return (found.value, found.low, found.high) if found and found.units >= intervals.MIN_UNITS else None


def _interval(score: Score, bounds: tuple[float, float], bootstrap: dict) -> tuple | None:
    """(value, low, high) at one level, None if unscored: of the row mean, or of the spread over seeds."""
    if not score.rows:
        return None if score.value is None else (score.value, *score.spread)
    found = intervals.mean_interval(score.rows, bounds=bounds, **bootstrap)
    return found and (found.value, found.low, found.high)


def _bounds(scores: Sequence[Score]) -> tuple[float, float]:
    """The least and greatest value that a row can have: the metric's scale, or beyond it where a row is (COMET)."""
    values = [value for score in scores for value in score.rows if value is not None]
    return min([*scores[0].scale, *values]), max([*scores[0].scale, *values])


def as_text(report: dict, *, width: int | None = None) -> str:
    """The report for a terminal: a mark for each metric and kind with the values from gold to all broken, then the reasons."""
    width = width or shutil.get_terminal_size((100, 24)).columns
    kinds = list(report["units"])
    cells = [
        [name, *(_cell(found["kinds"][kind]) for kind in kinds), f"{found['seconds_per_1000']:.2g} s"]
        for name, found in report["metrics"].items()
    ]
    lines = terminal.grid(["metric", *kinds, "per 1,000"], cells, rules=len(cells))
    broken = ", ".join(f"{count:,} {kind}" for kind, count in report["units"].items())
    notes = [
        f"Gold answers broken on purpose, n = {report['n']}, seed {report['seed']}; to break: {broken}. a → b: with "
        "nothing and with everything broken.",
        *(
            f"{mark} {meaning}"
            for mark, meaning in MEANING.items()
            if any(mark in cell for row in cells for cell in row)
        ),
    ]
    if report["left_out"]:
        notes.append(f"{report['left_out']} rows without a reference were left out.")
    for name, found in report["metrics"].items():
        notes += [
            f"{MARKS[one['verdict']]} {name}, {kind}: {one['reason']}."
            for kind, one in found["kinds"].items()
            if one["verdict"] not in (FALLS, ABSENT)
        ]
    wrapped = [line for note in notes for line in terminal.wrap(note, width, "  ")]
    return "\n".join([*lines, "", *wrapped, *(found["signature"] for found in report["metrics"].values())])


def _cell(one: dict) -> str:
    if one["verdict"] == ABSENT:
        return MARKS[ABSENT]
    first, last = ("?" if value is None else f"{value:.3g}" for value in (one["values"][0], one["values"][-1]))
    return f"{MARKS[one['verdict']]} {first} → {last}"


def plot(report: dict, path: str | Path) -> Path:
    """Write one PNG: a panel for each metric, a line for each kind of error, from gold to all broken, with intervals.

    Dashed: the metric does not get worse as it should. The file appears whole or not at all. Returns its path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(4, len(report["metrics"]))
    lines = -(-len(report["metrics"]) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.9 * lines + 0.7), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel in panels[len(report["metrics"]) :]:
        panel.set_visible(False)
    for panel, (name, found) in zip(panels, report["metrics"].items(), strict=False):
        _draw(panel, found, report["levels"])
        panel.set_title(name.replace("_", " "), fontsize=10)
    for panel in panels[: len(report["metrics"])]:
        panel.set_xticks([100 * level for level in report["levels"]])
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", lw=0.4, color="#cccccc")
    figure.suptitle(
        f"Gold answers with known errors: does the metric get worse? n = {report['n']}, seed {report['seed']}\n"
        "across: % of the letters, marks, ... that were broken; dashed: fails",
        fontsize=10,
    )
    handles = [
        Line2D([], [], color=colour, marker=marker, ms=4, label=kind)
        for kind, (colour, marker) in zip(report["units"], _STYLES, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return picture.save(figure, path)


def _draw(panel, found: dict, levels: Sequence[float]) -> None:
    for one, (colour, marker) in zip(found["kinds"].values(), _STYLES, strict=True):
        columns = zip(levels, one["values"], one["low"], one["high"], strict=False)
        x, y, low, high = list(zip(*[point for point in columns if None not in point], strict=True)) or [()] * 4
        percent = [100 * level for level in x]
        style = "-" if one["verdict"] in PASSING else "--"
        panel.plot(percent, y, style, color=colour, marker=marker, ms=4, lw=1.4)
        panel.fill_between(percent, low, high, color=colour, alpha=0.15, lw=0)
    worst, best = found["scale"]
    margin = 0.05 * (best - worst)
    panel.set_ylim(worst - margin, best + margin)  # best on top, of an error rate too
