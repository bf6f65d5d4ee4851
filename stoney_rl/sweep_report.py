"""What a sweep found: a table of its trials, the best one's command, a picture of the metric by each parameter."""

import csv
import io
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stoney_rl import sweep, terminal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#999999"  # Okabe and Ito, https://jfly.uni-koeln.de/color/
_PANELS_A_ROW = 3
# Flags of a trial that say what to leave behind, not what to train.
_HOUSEKEEPING = ("--no-merge", "--resume", "--overwrite")


def outcome(plan: sweep.Sweep, record: dict) -> str:
    """How a trial ended, in a few words."""
    if record["state"] == "failed":
        return f"failed: {record['error']}"
    value = record["results"][plan.metric]
    return "diverged" if value is None else f"{plan.metric} {short(value)}"


def as_csv(plan: sweep.Sweep, done: Mapping[int, dict]) -> str:
    """All trials that were run, in their order, with every parameter in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", plan.metric, "seconds", *plan.parameters, "error"])
    for number, record in sorted(done.items()):
        parameters = [record["parameters"][name] for name in plan.parameters]
        value = record["results"].get(plan.metric)
        writer.writerow([number, record["state"], value, record["seconds"], *parameters, record["error"]])
    return text.getvalue()


def as_text(plan: sweep.Sweep, done: Mapping[int, dict], commands: list[list[str]], *, wanted: int) -> str:
    """The trials from best to worst with the parameters that vary, and how to train the best one again."""
    states = Counter(record["state"] for record in done.values())
    lines = [
        f"{plan.path}: {plan.method} search over {', '.join(plan.varied()) or 'nothing'}; {plan.metric}, "
        f"{'lower' if plan.minimize else 'higher'} is better",
        f"{len(done)} of {wanted} trials: {states['finished']} finished, {states['failed']} failed",
        "",
        *_table(plan, done),
    ]
    errors = Counter(record["error"] for record in done.values() if record["error"])
    lines += ["", *(f"{count} failed: {error}" for error, count in errors.most_common())] if errors else []
    best = sweep.best(plan, done.values())
    if best is not None:
        command = [part for part in commands[best["trial"] - 1][1:] if part not in _HOUSEKEEPING]
        lines += [
            "",
            f"Best: trial {best['trial']}, {outcome(plan, best)}. To train it again:",
            f"python {shlex.join(command)}",
            "",
            "One seed a trial: a lead that another seed would turn round is luck, and the best of many looks better than it",
            "is. Measure it on the test split.",
        ]
    return "\n".join(lines) + "\n"


def _table(plan: sweep.Sweep, done: Mapping[int, dict]) -> list[str]:
    def rank(record: dict) -> tuple[bool, float]:
        value = record["results"].get(plan.metric)
        return value is None, 0.0 if value is None else value if plan.minimize else -value

    cells = [
        [
            str(record["trial"]),
            *([short(record["parameters"][name]) for name in plan.varied()]),
            f"{record['seconds']:.0f}",
            "failed" if record["state"] == "failed" else outcome(plan, record).removeprefix(f"{plan.metric} "),
        ]
        for record in sorted(done.values(), key=rank)
    ]
    return terminal.grid(["trial", *plan.varied(), "seconds", plan.metric], cells, rules=len(cells) + 1)


def short(value: object) -> str:
    """A parameter or metric to four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(plan: sweep.Sweep, done: Mapping[int, dict], path: Path) -> None:
    """The metric of every trial by each parameter that varies, as one PNG; a row of crosses: trials without a value."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from stoney_rl.metrics import picture

    names = plan.varied() or list(plan.parameters)[:1]
    columns = min(len(names), _PANELS_A_ROW)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows + 0.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    best = sweep.best(plan, done.values())
    for axes, name in zip(panels, names, strict=False):
        _panel(axes, plan, name, list(done.values()), best)
    for axes in panels[::columns]:
        axes.set_ylabel(plan.metric)
    for axes in panels[len(names) :]:
        axes.remove()
    lost = sum(record["results"].get(plan.metric) is None for record in done.values())
    title = f"{plan.metric} of {len(done) - lost} trials, {'lower' if plan.minimize else 'higher'} is better"
    title += f"; ★ trial {best['trial']}" if best else ""
    figure.suptitle(title + (f"; × {lost} failed or diverged" if lost else ""), fontsize=11)
    picture.save(figure, path)


def _panel(axes: "Axes", plan: sweep.Sweep, name: str, done: list[dict], best: dict | None) -> None:
    from matplotlib.ticker import LogLocator

    entry = plan.parameters[name]
    listed = "values" in entry or "value" in entry
    if listed:
        places = sorted({record["parameters"][name] for record in done}, key=lambda value: (str(type(value)), value))
        axes.set_xticks(range(len(places)), [short(place) for place in places])
        axes.set_xlim(-0.5, len(places) - 0.5)
    elif "log" in entry["distribution"]:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.tick_params(axis="x", labelsize=8)
    for record in done:
        at = record["parameters"][name]
        at = places.index(at) if listed else at
        value = record["results"].get(plan.metric)
        if value is None:
            axes.plot(at, 0.97, "x", color=_GREY, transform=axes.get_xaxis_transform(), markersize=6)
        elif record is best:
            axes.plot(at, value, "*", color=_ORANGE, markersize=15, zorder=3)
        else:
            axes.plot(at, value, "o", color=_BLUE, alpha=0.7, markersize=6)
    axes.set_xlabel(name)
    axes.grid(alpha=0.3)
