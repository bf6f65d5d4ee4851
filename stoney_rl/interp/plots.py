"""The pictures of an interpretability report, for a paper and for W&B: one PNG a question, the same bytes for the same figures.

    plots.draw(results, arrays, directory)      # what report.write takes

heads-<measure>     a value for each layer and head, all models on one scale, measured differences beside them; a dot: found
attention-<text>-<model>   every head's pattern on one sheet
lens-<model>        the top token after each layer
path-<name>-<model> faithfulness of the circuit beside random circuits of its size
training            what the tracer saw
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stoney_rl.interp import report
from stoney_rl.metrics import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEQUENTIAL, DIVERGING = "Blues", "PuOr"  # told apart with any colour vision; pale is nothing in both
BLUE, GREY = "#0072B2", "#767676"


def draw(results: Mapping, arrays: Mapping[str, np.ndarray], directory: str | Path) -> dict[str, Path]:
    """Write the pictures for which there are results into the existing ``directory``: name -> path, in a fixed order.

    Raises ``StoneyError`` if ``results`` do not fit ``report.SCHEMA``, or if a picture can't be written.
    """
    results = report.plain(results)
    report.check(results)
    drawn = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a script that the plain font lacks
        for name, figure in _figures(results, arrays):
            name = re.sub(r"[^\w.-]+", "_", name)
            drawn[name] = picture.save(figure, Path(directory) / f"{name}.png")
    return drawn


def _figures(results: Mapping, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, "Figure"]]:
    for measure in map(report.described, results.get("measures", ())):
        if measure["values"]:
            yield f"heads-{measure['key']}", _heads(measure)
    for text in results.get("texts", ()):
        for model in (model["name"] for model in results["models"]):
            if (name := f"patterns/{text['name']}/{model}") in arrays:
                yield f"attention-{text['name']}-{model}", _sheet(arrays[name], f"{model}: {text['name']}")
    for model, kinds in results.get("lens", {}).get("values", {}).items():
        if kinds:
            yield f"lens-{model}", _lens(results["lens"], model, kinds)
    for path in results.get("paths", ()):
        if "faithfulness" in path:
            yield f"path-{path['name']}-{path['model']}", _faithfulness(path)
    if "trace" in results:
        yield "training", _training(results["trace"])


def new_figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _heads(measure: Mapping) -> "Figure":
    """Models side by side on one scale; differences, which are smaller, on a scale of their own."""
    grids = list(measure["values"].items())
    differences = [(" − ".join(each["of"]), each) for each in measure.get("differences", ())]
    rows, columns = np.shape(grids[0][1]["mean"])
    width = max(1.7, 0.16 * columns + 0.5)
    figure = new_figure((len(grids) + len(differences)) * width + 1.6, max(2.6, 0.15 * rows + 1.2))
    figure.suptitle(f"{measure['name']} ({measure['unit']}; n = {measure['n']})", fontsize=9)
    panels = figure.subplots(1, len(grids) + len(differences), squeeze=False, sharey=True)[0]
    groups = [(grids, panels[: len(grids)], measure["scale"]), (differences, panels[len(grids) :], "diverging")]
    for shown, group, scale in groups:
        if shown:
            images = _on_one_scale(group, [(title, _numbers(grid["mean"])) for title, grid in shown], scale)
            for panel, (_, grid) in zip(group, shown, strict=True):
                where = np.argwhere(np.array(grid.get("found", False)))
                if where.size:
                    panel.plot(where[:, 1], where[:, 0], ".", color="white", mec="black", mew=0.6, ms=5)
            figure.colorbar(images, ax=list(group), shrink=0.7, aspect=30)
    for panel in panels:
        panel.set_xlabel("" if "columns" in measure else "head", fontsize=8)
        if "columns" in measure:
            panel.set_xticks(range(columns), map(_short, measure["columns"]), rotation=90, parse_math=False)
    panels[0].set_ylabel("layer", fontsize=8)
    return figure


def _on_one_scale(panels, grids: list[tuple[str, np.ndarray]], scale: str):
    """Draw each grid; returns the last image, for the colour bar."""
    most = max((np.nanmax(np.abs(grid), initial=0) for _, grid in grids), default=0) or 1.0
    diverging = scale == "diverging" or any(np.nanmin(grid, initial=0) < 0 for _, grid in grids)
    for panel, (title, grid) in zip(panels, grids, strict=True):
        image = panel.imshow(
            grid, cmap=DIVERGING if diverging else SEQUENTIAL, vmin=-most if diverging else 0, vmax=most, aspect="auto"
        )
        panel.set_facecolor("#dddddd")  # not scored
        panel.set_title(title, fontsize=8)
        panel.tick_params(labelsize=7, length=2)
    return image


def _sheet(patterns: np.ndarray, title: str) -> "Figure":
    """All patterns [layer, head, query, key] as one image: a figure for each head would take minutes."""
    layers, heads, size, _ = np.shape(patterns)
    framed = np.full((layers, heads, size + 1, size + 1), np.nan)
    framed[..., :size, :size] = np.where(np.tri(size, dtype=bool), patterns, np.nan)
    figure = new_figure(max(3.0, 0.75 * heads + 0.6), max(2.0, 0.75 * layers + 0.6))
    panel = figure.subplots()
    panel.imshow(np.sqrt(framed.swapaxes(1, 2).reshape(layers * (size + 1), -1)), cmap="Blues", vmin=0, vmax=1)
    panel.set_title(f"{title} (square root of attention)", fontsize=9)
    panel.set_xticks((np.arange(heads) + 0.5) * (size + 1), range(heads))
    panel.set_yticks((np.arange(layers) + 0.5) * (size + 1), range(layers))
    panel.set_xlabel("head")
    panel.set_ylabel("layer")
    panel.tick_params(length=0, labelsize=7)
    panel.spines[:].set_visible(False)
    return figure


def _lens(lens: Mapping, model: str, kinds: Mapping) -> "Figure":
    rows, positions = lens["rows"], lens["positions"]
    figure = new_figure(len(kinds) * (0.55 * len(positions) + 1) + 1, 0.2 * len(rows) + 1.2)
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for panel, (kind, read) in zip(panels, kinds.items(), strict=True):
        image = panel.imshow(_numbers(read["probability"]), cmap="Blues", vmin=0, vmax=1.6, aspect="auto")
        for row, line in enumerate(read["top"]):
            for column, token in enumerate(line):
                panel.text(column, row, _short(token), ha="center", va="center", fontsize=6, parse_math=False)
        panel.set_title(f"{model}, {kind} lens", fontsize=9)
        panel.set_xticks(range(len(positions)), map(_short, positions), rotation=90, parse_math=False)
        panel.set_yticks(range(len(rows)), rows)
        panel.tick_params(labelsize=7, length=0)
    bar = figure.colorbar(image, ax=list(panels), shrink=0.6, label="probability of the top token")
    bar.ax.set_ylim(0, 1)  # the colours stop short of the dark ones, on which black text can't be read
    return figure


def _short(token: str) -> str:
    return (token.strip() or "␣")[:9]


def _faithfulness(path: Mapping) -> "Figure":
    curves = path["faithfulness"]
    figure = new_figure(5, 3.2)
    panel = figure.subplots()
    places = range(len(curves["sizes"]))  # sizes double: one step each
    for name, label, colour, style in (
        ("circuit", "this circuit", BLUE, "-"),
        ("random", "random circuits", GREY, "--"),
    ):
        panel.plot(places, _numbers(curves[name]), style, color=colour, label=label)
        if f"{name}_low" in curves and f"{name}_high" in curves:
            low, high = _numbers(curves[f"{name}_low"]), _numbers(curves[f"{name}_high"])
            panel.fill_between(places, low, high, color=colour, alpha=0.2, lw=0)
    panel.axhline(0.8, color=GREY, lw=0.8, ls=":")
    panel.set_xticks(places, curves["sizes"])
    panel.set_xlabel("nodes kept")
    panel.set_ylabel("faithfulness")
    panel.set_title(f"{path['model']}, {path['name']} (n = {path['n']} pairs)", fontsize=9)
    panel.legend(frameon=False, fontsize=8, loc="upper left")
    clean(panel)
    return figure


def _training(trace: Mapping) -> "Figure":
    """For each measure the heads that end highest over the rest, then the curves."""
    measures, curves = list(map(report.described, trace["measures"])), trace.get("curves", [])
    figure = new_figure(5, 2.3 * (len(measures) + len(curves)))
    panels = figure.subplots(len(measures) + len(curves), 1, squeeze=False, sharex=True)[:, 0]
    for panel, measure in zip(panels, measures, strict=False):
        values = _numbers(measure["values"])
        panel.plot(trace["steps"], values.reshape(len(values), -1), color=GREY, lw=0.5, alpha=0.4)
        order = np.argsort(-np.abs(np.nan_to_num(values[-1])).ravel())[:3]
        for layer, head in zip(*np.unravel_index(order, values[-1].shape), strict=True):
            panel.plot(trace["steps"], values[:, layer, head], lw=1.8, label=f"{layer}.{head}")
        panel.legend(
            frameon=False, fontsize=7, title="head", title_fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5)
        )
        panel.set_title(f"{measure['name']} ({measure['unit']})", fontsize=8)
        clean(panel)
    for panel, curve in zip(panels[len(measures) :], curves, strict=True):
        panel.plot(trace["steps"], _numbers(curve["values"]), color=BLUE)
        panel.set_title(f"{curve['name']} ({curve['unit']})", fontsize=8)
        clean(panel)
    panels[-1].set_xlabel("update")
    return figure


def _numbers(nested: list) -> np.ndarray:
    return np.array(nested, dtype=float)  # None becomes NaN


def clean(panel: "Axes", axis: str = "y") -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis=axis, lw=0.4, color="#cccccc")
    panel.tick_params(labelsize=7)
