"""Which of several systems is better, and how sure is that? Base, SFT and GRPO side by side, on the same rows.

    scores = suite.score_rows(suite.STRING_METRICS, rows, knowledge)
    compared = compare([table("base", rows, scores), table("sft", ...), table("grpo", ...)], seed=0)
    print(as_text(compared))

1. Every pair of systems is compared by every metric, on unseen and on seen rows: the difference, its 95 % interval by
   paired bootstrap (``intervals.statistic_difference``) and a p value by approximate randomisation
   (``intervals.randomisation_p``). Both draw lexeme clusters, not rows, because rows of one lexeme depend on each other.
2. Of twenty tests at 5 % one comes out by chance, so a difference is called shown only if its p stays at 0.05 or below
   after Holm's correction over all tests of the table (``intervals.holm``), and if it rests on ``intervals.MIN_UNITS`` clusters.
   The intervals are not corrected: one that excludes zero may belong to a difference that is not shown.
3. Beside each difference stands the smallest that this n could have shown (``intervals.detectable_difference``, power
   80 %, at the first and strictest step of Holm's correction). 'Not shown' says nothing about smaller ones.

chrF++ and BLEU are computed from summed counts, as sacreBLEU does; every other metric is the mean of its row values. The
numbers cover the choice of test rows. They do not cover another training seed.
"""

import shutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from stoney_rl import terminal
from stoney_rl.errors import StoneyError
from stoney_rl.metrics import bleu, chrf, intervals, picture, report
from stoney_rl.text import normalize

if TYPE_CHECKING:
    from stoney_rl.metrics.score import Score

ALPHA = 0.05
GROUPS = {"unseen": "unseen words", "seen": "seen words", "all": "all rows"}
PANELS = 4  # of a plot, side by side
COUNTED = {"chrf": chrf, "bleu": bleu}  # scores of summed counts


@dataclass(frozen=True)
class Column:
    """One metric of one system: ``score`` maps the summed ``statistics`` (one list of k numbers a row) to its value.

    statistics: None for a row that can't be scored. scale: (worst, best) value; a metric whose best is the lower one is
    better when it falls.
    """

    statistics: Sequence[Sequence[float] | None]
    score: Callable
    scale: tuple[float, float]
    signature: str


@dataclass(frozen=True)
class Table:
    """The scores of one system row by row, all columns in the order of ``ids``; made by ``table``.

    scores: those of all metrics, also of the ones that have no column.
    """

    name: str
    ids: Sequence[Hashable]
    seen: Sequence[bool | None]
    clusters: Sequence[int]
    rows_sha256: str
    columns: dict[str, Column]
    scores: Mapping[str, "Score"]


def table(name: str, rows: Sequence[dict], scores: Mapping[str, "Score"]) -> Table:
    """The table of a system from its prediction rows (``predictions.record``) and their scores (``suite.score_rows``).

    A metric of the set as a whole (MAUVE) has no row values and no column: no test on rows can compare it. Raises
    ``StoneyError`` if there is no row, for rows that ``report.check_rows`` refuses, or if a score has not one value for each.
    """
    if not rows:
        raise StoneyError(f"comparison: {name!r} has no rows; check that the split is not empty")
    report.check_rows(rows)
    columns = {}
    for metric, score in scores.items():
        if not score.rows:
            continue
        if len(score.rows) != len(rows):
            raise StoneyError(f"comparison: {name!r} has {len(score.rows)} values of {metric} for {len(rows)} rows")
        counted = COUNTED.get(metric)
        statistics = _counts(counted, rows) if counted else [None if v is None else (v, 1.0) for v in score.rows]
        columns[metric] = Column(
            statistics, counted.score_from_counts if counted else _mean, score.scale, score.signature
        )
    return Table(
        name,
        [row["id"] for row in rows],
        [row["seen"] for row in rows],
        report.lexeme_clusters([row.get("lexemes") for row in rows]),
        report.rows_sha256(rows),
        columns,
        scores,
    )


def score(one: Table, *, seed: int, resamples: int = intervals.RESAMPLES) -> dict:
    """The scores of one system with intervals, for all rows and for the seen and unseen ones apart.

    Returns {"n", "seed", "resamples", "confidence", "rows_sha256", "group_sizes": {group: rows}, "notes": {metric: what to
    know before reading it}, "groups": {group: {metric: {"value", "low", "high", "n", "unscored", "units", "scale",
    "signature"}}}}. A metric of the set as a whole stands under "all" alone, with the "spread" over its own seeds in place
    of an interval. value is None where no row can be scored.
    """
    drawn = {"seed": seed, "resamples": resamples}
    groups = {group: {metric: _entry(one, group, metric, **drawn) for metric in one.columns} for group in report.GROUPS}
    for metric, found in one.scores.items():
        if metric not in one.columns:
            groups["all"][metric] = {
                **{key: getattr(found, key) for key in ("value", "n", "unscored")},
                **{"low": None, "high": None, "units": 0, "spread": found.spread and list(found.spread)},
                **{"scale": list(found.scale), "signature": found.signature},
            }
    return {
        "n": len(one.ids),
        **drawn,
        "confidence": intervals.CONFIDENCE,
        "rows_sha256": one.rows_sha256,
        "group_sizes": {group: len(_members(one, group)) for group in report.GROUPS},
        "notes": {metric: found.note for metric, found in one.scores.items() if found.note},
        "groups": groups,
    }


def compare(
    results: Sequence[Table],
    *,
    seed: int,
    groups: Sequence[str] | None = None,
    resamples: int = intervals.RESAMPLES,
    trials: int = intervals.TRIALS,
) -> dict:
    """Every system of ``results`` (in the order in which they were trained) and every pair of them.

    ``groups``: of ``GROUPS``; by default unseen and seen, as far as there are rows, else all. Returns {"systems", "seed",
    "resamples", "trials", "alpha", "confidence", "power", "rows_sha256", "tests" (their number), "signatures": {metric},
    "scores": [{"group", "metric", "system", "value", "low", "high", "n", "unscored", "units"}],
    "differences": [{"group", "metric", "a", "b", "difference" (b - a), "low", "high", "p_bootstrap", "p", "p_holm",
    "shown" (of b: "better", "worse" or None), "detectable", "n", "unscored", "units"}]}. What can't be computed is None, and
    no test. Raises ``StoneyError`` for an unknown group, fewer than two systems, names that repeat, or systems that were not asked the
    same rows or not scored by the same metrics.
    """
    _check(results)
    unknown = sorted(set(groups or ()) - set(GROUPS))
    if unknown:
        raise StoneyError(f"comparison: no group {', '.join(unknown)}; expected {', '.join(GROUPS)}")
    first = results[0]
    groups = groups or [group for group in ("unseen", "seen") if _members(first, group)] or ["all"]
    drawn = {"seed": seed, "resamples": resamples}
    cells = [(group, metric) for group in groups for metric in first.columns]
    scores = [_score(one, group, metric, **drawn) for group, metric in cells for one in results]
    differences = [
        _difference(a, b, group, metric, trials=trials, **drawn)
        for group, metric in cells
        for a, b in combinations(results, 2)
    ]
    tested = _correct(differences, {one.name: one for one in results}, seed)
    return {
        "systems": [one.name for one in results],
        **drawn,
        "trials": trials,
        "alpha": ALPHA,
        "confidence": intervals.CONFIDENCE,
        "power": intervals.POWER,
        "rows_sha256": first.rows_sha256,
        "tests": tested,
        "signatures": {
            metric: f"{column.signature}|ar:{trials}|by:lexeme|holm:{tested}|bs:{resamples}|seed:{seed}"
            for metric, column in first.columns.items()
        },
        "scales": {metric: list(column.scale) for metric, column in first.columns.items()},
        "scores": scores,
        "differences": differences,
    }


def as_text(compared: dict, *, width: int | None = None) -> str:
    """What a person reads: a sentence for each pair and group, the scores, the differences, and what the columns mean.

    ``width``: of the sentences, by default the terminal's; the tables are as wide as they are.
    """
    scores = "\n".join(_score_lines(compared))
    return "\n\n".join([verdicts(compared, width=width), scores, difference_table(compared, width=width)])


def verdicts(compared: dict, *, about: str | None = None, width: int | None = None) -> str:
    """A sentence for each pair and group: by which metrics one system is better, and how sure that is.

    ``about``: only for the pairs that this system is one of.
    """
    return "\n".join(_wrapped(_verdicts(compared, about), width))


def difference_table(compared: dict, *, width: int | None = None) -> str:
    """The table of differences, and what its columns mean."""
    # Signatures stay on one line each: they are copied, not read.
    notes = [*_wrapped(_notes(compared), width), *compared["signatures"].values()]
    return "\n".join([*_difference_lines(compared), "", *notes])


def plot(compared: dict, path: str | Path, *, title: str) -> Path:
    """Write one PNG: a panel for each metric, the systems below each other, their scores with 95 % intervals by group.

    The file appears whole or not at all. Returns its path; raises ``StoneyError`` if it can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    systems, metrics = compared["systems"], list(compared["scales"])
    groups = list(dict.fromkeys(one["group"] for one in compared["scores"]))
    columns = min(PANELS, len(metrics))
    lines = -(-len(metrics) // columns)
    size = (2.6 * columns + 1, lines * (0.45 * len(systems) + 0.9) + 0.9)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for panel, metric in zip(panels, metrics, strict=False):
        for place, group in enumerate(groups):
            offset = 0.22 * (place - (len(groups) - 1) / 2)
            _draw_scores(panel, compared, group, metric, offset, filled=place == 0)
        panel.set_title(_name(compared, metric), fontsize=10)
        panel.set_yticks(range(len(systems)), systems)
        panel.set_ylim(len(systems) - 0.5, -0.5)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", lw=0.4, color="#cccccc")
    for panel in panels[len(metrics) :]:
        panel.set_visible(False)
    figure.suptitle(title, fontsize=12)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return picture.save(figure, path)


def sacrebleu_test(
    answers: Mapping[str, Sequence[str]], references: Sequence[str], *, test: str, samples: int = 0
) -> dict:
    """sacreBLEU's own paired test of BLEU and chrF++, each system against the first, rows taken as independent.

    ``answers``: name -> answers, in the order of ``references``. ``test``: "ar" (approximate randomisation) or "bs"
    (paired bootstrap), with sacreBLEU's number of ``samples`` (0) and its seed, so that the numbers are those that its
    command line prints. Returns {"BLEU" and "chrF2++": {"signature", "systems": {name: {"score", "p"}}}}, p None for the first.
    """
    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.significance import PairedTest

    named = [(name, [normalize(text) for text in texts]) for name, texts in answers.items()]
    metrics = {"BLEU": BLEU(), "chrF2++": CHRF(word_order=chrf.WORD_ORDER)}
    asked = [[normalize(text) for text in references]]
    signatures, found = PairedTest(named, metrics, references=asked, test_type=test, n_samples=samples)()
    return {
        metric: {
            "signature": str(signature),
            "systems": {
                name: {"score": result.score, "p": result.p_value}
                for name, result in zip(answers, found[metric], strict=True)
            },
        }
        for metric, signature in signatures.items()
    }


def _check(results: Sequence[Table]) -> None:
    if len(results) < 2:
        raise StoneyError(f"comparison: {len(results)} system; expected two or more")
    first, *others = results
    if len({one.name for one in results}) < len(results):
        raise StoneyError("comparison: two systems have one name; give each its own")
    for one in others:
        if one.rows_sha256 != first.rows_sha256 or list(one.ids) != list(first.ids):
            raise StoneyError(
                f"comparison: {one.name!r} was not asked the rows of {first.name!r} in the same order; evaluate both on one split"
            )
        if one.columns.keys() != first.columns.keys():
            missing = ", ".join(sorted(one.columns.keys() ^ first.columns.keys()))
            raise StoneyError(f"comparison: {missing}: not scored for both {first.name!r} and {one.name!r}; score both")


def _counts(metric, rows: Sequence[dict]) -> list:
    """Each row's n-gram counts; None without a prediction or a reference."""
    usable = [i for i, row in enumerate(rows) if row["prediction"] is not None and normalize(row["reference"])]
    found: list = [None] * len(rows)
    if usable:
        counts = metric.statistics(
            predictions=[rows[i]["prediction"] for i in usable], references=[rows[i]["reference"] for i in usable]
        )
        for i, line in zip(usable, counts.tolist(), strict=True):
            found[i] = line
    return found


def _mean(sums):
    return sums[..., 0] / sums[..., 1]


def _members(one: Table, group: str) -> list[int]:
    return [i for i, seen in enumerate(one.seen) if group == "all" or seen is (group == "seen")]


def _paired(a: Table, b: Table, group: str, metric: str) -> tuple[tuple[list, list], list[int]]:
    """The statistics of both systems and the clusters, for the rows of ``group`` that both have scored."""
    first, second = a.columns[metric].statistics, b.columns[metric].statistics
    usable = [i for i in _members(a, group) if first[i] is not None and second[i] is not None]
    return ([first[i] for i in usable], [second[i] for i in usable]), [a.clusters[i] for i in usable]


def _bounds(column: Column, *statistics) -> tuple[float, float] | None:
    """The ends of the scale, unless it is nominal (a COMET model's) and a row lies beyond them."""
    low, high = sorted(column.scale)
    values = [line[0] for rows in statistics for line in rows] if column.score is _mean else []
    return (low, high) if all(low <= value <= high for value in values) else None


def _entry(one: Table, group: str, metric: str, *, seed: int, resamples: int) -> dict:
    column = one.columns[metric]
    (statistics, _), clusters = _paired(one, one, group, metric)
    found = intervals.statistic_interval(
        statistics, column.score, seed=seed, resamples=resamples, clusters=clusters, bounds=_bounds(column, statistics)
    )
    return {
        **{key: getattr(found, key) if found else None for key in ("value", "low", "high")},
        "n": len(statistics),
        "unscored": len(_members(one, group)) - len(statistics),
        "units": found.units if found else 0,
        "scale": list(column.scale),
        "signature": f"{column.signature}|ci:bootstrap-expanded-percentile|by:lexeme|bs:{resamples}|seed:{seed}",
    }


def _score(one: Table, group: str, metric: str, *, seed: int, resamples: int) -> dict:
    entry = _entry(one, group, metric, seed=seed, resamples=resamples)
    kept = {key: entry[key] for key in ("value", "low", "high", "n", "unscored", "units")}
    return {"group": group, "metric": metric, "system": one.name, **kept}


def _difference(a: Table, b: Table, group: str, metric: str, *, seed: int, resamples: int, trials: int) -> dict:
    column = a.columns[metric]
    statistics, clusters = _paired(a, b, group, metric)
    found = intervals.statistic_difference(
        *statistics,
        column.score,
        seed=seed,
        resamples=resamples,
        clusters=clusters,
        bounds=_bounds(column, *statistics),
    )
    return {
        "group": group,
        "metric": metric,
        "a": a.name,
        "b": b.name,
        "difference": found.value if found else None,
        "low": found.low if found else None,
        "high": found.high if found else None,
        "p_bootstrap": found.p if found else None,
        "p": intervals.randomisation_p(*statistics, column.score, seed=seed, trials=trials, clusters=clusters),
        "p_holm": None,
        "shown": None,
        "detectable": None,
        "n": len(statistics[0]),
        "unscored": len(_members(a, group)) - len(statistics[0]),
        "units": found.units if found else 0,
    }


def _correct(differences: Sequence[dict], results: Mapping[str, Table], seed: int) -> int:
    """Fill in what depends on how many tests there are, and return their number."""
    tested = [one for one in differences if one["p"] is not None]
    for one, corrected in zip(tested, intervals.holm([one["p"] for one in tested]), strict=True):
        a, b = results[one["a"]], results[one["b"]]
        column = a.columns[one["metric"]]
        statistics, clusters = _paired(a, b, one["group"], one["metric"])
        one["p_holm"] = corrected
        one["detectable"] = intervals.detectable_difference(
            *statistics, column.score, seed=seed, alpha=ALPHA / len(tested), clusters=clusters
        )
        if corrected <= ALPHA and one["units"] >= intervals.MIN_UNITS and one["difference"]:
            one["shown"] = "better" if one["difference"] * _sign(column) > 0 else "worse"
    return len(tested)


def _sign(column: Column) -> int:
    return 1 if column.scale[1] > column.scale[0] else -1


def _wrapped(lines: Sequence[str], width: int | None) -> list[str]:
    width = width or shutil.get_terminal_size((100, 24)).columns
    return [part for line in lines for part in terminal.wrap(line, width, "  ")]


def _verdicts(compared: dict, about: str | None) -> list[str]:
    """For each pair and group one sentence: by which metrics b is better or worse than a, and how sure that is."""
    by_pair: dict[tuple, list[dict]] = {}
    for one in compared["differences"]:
        if about in (None, one["a"], one["b"]):
            by_pair.setdefault((one["group"], one["a"], one["b"]), []).append(one)
    return [
        f"{GROUPS[group].capitalize()}: {_verdict(compared, a, b, found)}" for (group, a, b), found in by_pair.items()
    ]


def _verdict(compared: dict, a: str, b: str, found: Sequence[dict]) -> str:
    tested = [one for one in found if one["p"] is not None]
    if not tested:
        return f"{b} can't be compared with {a}: no row is scored for both."
    shown = {word: [one for one in tested if one["shown"] == word] for word in ("better", "worse")}
    claims = [
        f"{word} than {a} ({', '.join(_gain(compared, one) for one in ones)})" for word, ones in shown.items() if ones
    ]
    if claims:
        odds = int(1 / max(one["p_holm"] for ones in shown.values() for one in ones))
        chance = f"Were they equally good, at most 1 such comparison in {odds:,} would come out like this."
        return f"{b} is {' and '.join(claims)}. {chance}"
    first = tested[0]
    could = _number(compared, first["metric"], first["detectable"])
    name = _name(compared, first["metric"])
    limit = "" if could == "-" else f" {first['n']} rows are enough to show a difference of about {could} in {name}."
    return f"{b} is not shown to be better or worse than {a} by any metric.{limit}"


def _gain(compared: dict, one: dict) -> str:
    return f"{_name(compared, one['metric'])} {_number(compared, one['metric'], one['difference'], '+')}"


def _notes(compared: dict) -> list[str]:
    return [
        f"[a, b]: {100 * compared['confidence']:g}% interval over the choice of test rows (paired bootstrap by lexeme, "
        f"{compared['resamples']:,} resamples, seed {compared['seed']}), not corrected. Another training seed is not covered.",
        f"p: approximate randomisation by lexeme, {compared['trials']:,} trials. p (Holm): corrected for the "
        f"{compared['tests']} tests of this table; up to {compared['alpha']} a difference is called better or worse.",
        "could show: the smallest true difference that a test of this n and level finds in "
        f"{100 * compared['power']:g}% of cases. n: rows scored for both. lexemes: groups of rows that share no word.",
        "↓: lower is better.",
    ]


def _score_lines(compared: dict) -> list[str]:
    systems = compared["systems"]
    by_cell: dict[tuple, dict[str, dict]] = {}
    for one in compared["scores"]:
        by_cell.setdefault((one["group"], one["metric"]), {})[one["system"]] = one
    cells = [
        [
            group,
            _name(compared, metric),
            *(_cell(compared, metric, found[name], "value") for name in systems),
            *(_range(one[key] for one in found.values()) for key in ("n", "units")),
        ]
        for (group, metric), found in by_cell.items()
    ]
    return terminal.grid(["rows", "metric", *systems, "n", "lexemes"], cells, rules=len(compared["scales"]))


def _difference_lines(compared: dict) -> list[str]:
    cells = [
        [
            one["group"],
            _name(compared, one["metric"]),
            f"{one['b']} − {one['a']}",
            _cell(compared, one["metric"], one, "difference", "+"),
            str(one["n"]),
            *(_p(one[key]) for key in ("p", "p_holm")),
            one["shown"] or "",
            _number(compared, one["metric"], one["detectable"]),
        ]
        for one in compared["differences"]
    ]
    pairs = len(compared["systems"]) * (len(compared["systems"]) - 1) // 2
    header = ["rows", "metric", "compared", "difference", "n", "p", "p (Holm)", "", "could show"]
    return terminal.grid(header, cells, rules=pairs)


def _name(compared: dict, metric: str) -> str:
    return report.metric_name(metric, compared["scales"][metric])


def _number(compared: dict, metric: str, value: float | None, sign: str = "") -> str:
    span = abs(compared["scales"][metric][1] - compared["scales"][metric][0])
    return "-" if value is None else f"{value:{sign}.{1 if span > 10 else 3}f}"


def _cell(compared: dict, metric: str, one: dict, key: str, sign: str = "") -> str:
    if one[key] is None:
        return "-"
    value, low, high = (_number(compared, metric, one[part], sign) for part in (key, "low", "high"))
    return f"{value} [{low}, {high}]" if one["low"] is not None else f"{value} [too few]"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}" if value >= 0.001 else f"{value:.0e}"


def _range(numbers) -> str:
    found = sorted(set(numbers))
    return f"{found[0]}" if len(found) == 1 else f"{found[0]}-{found[-1]}"


def _draw_scores(panel, compared: dict, group: str, metric: str, offset: float, *, filled: bool) -> None:
    scored = [
        (place + offset, one)
        for place, name in enumerate(compared["systems"])
        for one in compared["scores"]
        if (one["group"], one["metric"], one["system"]) == (group, metric, name) and one["value"] is not None
    ]
    values = [one["value"] for _, one in scored]
    ends = [[(one[key] if one[key] is not None else one["value"]) for _, one in scored] for key in ("low", "high")]
    panel.errorbar(
        values,
        [at for at, _ in scored],
        xerr=[
            [max(0, value - low) for value, low in zip(values, ends[0], strict=True)],
            [max(0, high - value) for value, high in zip(values, ends[1], strict=True)],
        ],
        fmt="o",
        color="#0072B2" if filled else "#666666",
        markerfacecolor="#0072B2" if filled else "white",
        capsize=3,
        lw=1.2,
        label=GROUPS[group],
    )
