"""The pictures of a comparison, one PNG a question, the same bytes for the same figures: draw(results, directory).

overlap       shared parts of every two families, between chance and what one family's own pairs share
needed        the matrix: what each family loses without each set of parts
depth         log-probability of the answer and entropy, layer by layer
pivot         English meaning and answer among the guesses, layer by layer
assembly      words told from scrambled doubles, layer by layer
copying       which heads look at what is copied
change-<n>-<a>-<b>  what training changed, layer by layer, and which parts of it bring back the behaviour
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stoney_rl.interp.plots import BLUE, DIVERGING, GREY, clean, new_figure
from stoney_rl.interp.verdicts import NAMES
from stoney_rl.metrics import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's, told apart with any colour vision; controls are dashed.
COLOURS = {
    "lexicon": "#D55E00", "english": "#0072B2", "french": "#009E73", "arithmetic": "#CC79A7",
    "english_split": "#56B4E9", "lexicon_scrambled": "#E69F00", "lexicon_shuffled": "#999999",
}  # fmt: skip
SHORT = NAMES | {
    "lexicon": "lexicon",
    "english_split": "English, cut",
    "lexicon_scrambled": "lexicon, scrambled",
    "lexicon_shuffled": "lexicon, shuffled",
}


def draw(results: Mapping, directory: str | Path) -> dict[str, Path]:
    """Write the pictures for which there are numbers into the existing ``directory``: name -> path, in the sections' order."""
    drawn = {}
    for name, figure in _figures(results):
        file_name = re.sub(r"[^\w.-]+", "_", name)
        drawn[name] = picture.save(figure, Path(directory) / f"{file_name}.png")
    return drawn


def _figures(results: Mapping) -> Iterator[tuple[str, "Figure"]]:
    makers = {
        "overlap": _overlap,
        "needed": _needed,
        "depth": _depth,
        "pivot": _pivot,
        "assembly": _assembly,
        "copying": _copying,
    }
    for section in results["sections"]:
        key = section["key"]
        make = _change if key.startswith("change-") else makers.get(key)
        figure = make(section["numbers"]) if make else None
        if figure is not None:
            yield key, figure


def _overlap(numbers: Mapping) -> "Figure":
    """A dot for what is shared, a grey line from chance to the ceiling."""
    figure = new_figure(8.5, 0.24 * max(map(len, numbers.values())) * len(numbers) + 1.6)
    panels = figure.subplots(
        len(numbers), 1, squeeze=False, height_ratios=[max(2, len(pairs)) for pairs in numbers.values()]
    )[:, 0]
    for panel, (title, pairs) in zip(panels, numbers.items(), strict=True):
        for row, (_, one) in enumerate(pairs.items()):
            panel.plot(
                [one["chance"], one["ceiling"]],
                [row, row],
                color="#cccccc",
                lw=6,
                solid_capstyle="butt",
                label=None if row else "chance to same family, other pairs",
            )
            panel.plot(one["halves"], row, "o", color=BLUE, ms=5, label=None if row else "halves of the two families")
            panel.plot(one["share"], row, "|", color="black", ms=9, label=None if row else "all pairs")
        panel.set_yticks(
            range(len(pairs)), [" – ".join(SHORT.get(name, name) for name in key.split("/")) for key in pairs]
        )
        panel.invert_yaxis()
        panel.set_xlim(0, 1)
        model, _, kind = title.rpartition("/")
        panel.set_title(f"{model}: strongest {'heads and MLPs' if kind == 'components' else 'neurons'}", fontsize=9)
        clean(panel, axis="x")
    panels[0].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    panels[-1].set_xlabel("share that both have", fontsize=8)
    return figure


def _needed(numbers: Mapping) -> "Figure":
    tables = {
        title: numbers[task]["cells"]
        for task, title in (("knockout", "heads and MLPs"), ("knockout_neurons", "neurons"))
        if task in numbers
    }
    sizes = [len({key.split("/")[0] for key in cells}) for cells in tables.values()]
    figure = new_figure(0.95 * sum(sizes) + 3.5, 0.6 * max(sizes) + 2.2)
    panels = figure.subplots(1, len(tables), squeeze=False, width_ratios=sizes)[0]
    for panel, (title, cells) in zip(panels, tables.items(), strict=True):
        names = list(dict.fromkeys(key.split("/")[0] for key in cells))
        grid = np.array(
            [[np.nan if cells[f"{a}/{b}"] is None else cells[f"{a}/{b}"]["loss"] for b in names] for a in names]
        )
        most = max(0.5, float(np.nanmax(np.abs(grid), initial=0)))
        image = panel.imshow(grid, cmap=DIVERGING, vmin=-most, vmax=most)
        for row, a in enumerate(names):
            for column, b in enumerate(names):
                cell = cells[f"{a}/{b}"]
                text = (
                    "no gap"
                    if cell is None
                    else f"{cell['loss']:+.2f}{'*' if cell['found'] else ''}\n({cell['random']:+.2f})"
                )
                dark = cell is not None and abs(cell["loss"]) > 0.6 * most
                panel.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        labels = [SHORT.get(name, name) for name in names]
        panel.set_xticks(range(len(names)), labels, rotation=35, ha="right", fontsize=7)
        panel.set_yticks(range(len(names)), labels, fontsize=7)
        panel.set_xlabel("measured", fontsize=8)
        panel.set_title(f"without the {title} of the row", fontsize=9)
        panel.tick_params(length=0)
    panels[0].set_ylabel("taken away", fontsize=8)
    figure.colorbar(image, ax=list(panels), shrink=0.7, label="share of the gap lost")
    figure.suptitle("* more than random sets like it (mean of these in brackets)", fontsize=8)
    return figure


def _depth(numbers: Mapping) -> "Figure":
    curves = numbers["curves"]
    figure = new_figure(3.6 * len(curves) + 1.8, 5)
    grid = figure.subplots(2, len(curves), squeeze=False, sharex=True, sharey="row")
    for column, (model, families) in enumerate(curves.items()):
        for name, one in families.items():
            for row, key in enumerate(("answer", "entropy")):
                grid[row, column].plot(one[key], label=SHORT.get(name, name), **_style(name))
        grid[0, column].set_title(model, fontsize=9)
        grid[1, column].set_xlabel("layer", fontsize=8)
    for panel in grid.ravel():
        clean(panel)
    grid[0, 0].set_ylabel("log-probability of the answer, nats", fontsize=8)
    grid[1, 0].set_ylabel("entropy, nats", fontsize=8)
    lines, names = grid[0, 0].get_legend_handles_labels()  # controls are the main model's alone
    grid[0, -1].legend(lines, names, frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle("logit lens at the last token", fontsize=9)
    return figure


def _pivot(numbers: Mapping) -> "Figure":
    curves = numbers["curves"]
    figure = new_figure(10, 3)
    panels = figure.subplots(1, 3)
    titles = ("English meaning, above the other word's", "first token of the answer", "English words among ten guesses")
    for name, one in curves.items():
        for panel, values in zip(panels, (one["meaning"], one["answer"], np.asarray(one["kinds"])[:, 0]), strict=True):
            panel.plot(values, label=SHORT.get(name, name), **_style(name))
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("layer", fontsize=8)
        clean(panel)
    panels[0].set_ylabel("probability", fontsize=8)
    panels[2].set_ylabel("share", fontsize=8)
    panels[2].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _assembly(numbers: Mapping) -> "Figure":
    curves = numbers["curves"]
    figure = new_figure(3.6 * len(curves) + 1.8, 3)
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for panel, (name, one) in zip(panels, curves.items(), strict=True):
        correct, control = np.asarray(one["correct"]), np.asarray(one["control"])
        panel.plot(one["layers"], correct[:, 0], color=BLUE, label="last token")
        panel.plot(one["layers"], correct[:, 1], color=BLUE, ls="--", label="middle token")
        if "random" in one and len(np.asarray(one["random"])) == len(one["layers"]):
            panel.plot(one["layers"], np.asarray(one["random"])[:, 0], color=GREY, label="last token, random weights")
        panel.plot(one["layers"], control[:, 0], color=GREY, ls=":", label="control labels")
        panel.axhline(0.5, color="black", lw=0.6)
        panel.set_title(f"{SHORT.get(name, name)}: word or scrambled? (n = {one['n']})", fontsize=9)
        panel.set_xlabel("layer", fontsize=8)
        clean(panel)
    panels[0].set_ylabel("accuracy", fontsize=8)
    panels[-1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _copying(numbers: Mapping) -> "Figure | None":
    grids = [
        (name, route, one[route])
        for name, one in numbers["profiles"].items()
        for route in ("token", "concept")
        if one[route] is not None
    ]
    if not grids:
        return None
    most = max(float(np.nanmax(np.abs(grid))) for *_, grid in grids)
    columns = np.shape(grids[0][2])[1]
    figure = new_figure(len(grids) * max(1.2, 0.11 * columns) + 1.5, max(2.6, 0.1 * len(grids[0][2]) + 1.2))
    panels = figure.subplots(1, len(grids), squeeze=False, sharey=True)[0]
    for panel, (name, route, grid) in zip(panels, grids, strict=True):
        image = panel.imshow(grid, cmap=DIVERGING, vmin=-most, vmax=most, aspect="auto")
        panel.set_title(f"{SHORT.get(name, name)}\n{'next token' if route == 'token' else 'end of word'}", fontsize=7)
        panel.set_xlabel("head", fontsize=7)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.tick_params(labelsize=6, length=2)
    panels[0].set_ylabel("layer", fontsize=8)
    figure.colorbar(image, ax=list(panels), shrink=0.7, label="attention to the answer, less to the wrong one")
    return figure


def _change(numbers: Mapping) -> "Figure":
    figure = new_figure(11, 3)
    weights, representation, *closures = figure.subplots(1, 2 + max(1, len(numbers["closure"])))
    layers = sorted(numbers["by_layer"], key=int)
    weights.bar(
        [int(layer) for layer in layers], [numbers["by_layer"][layer]["relative"] or 0 for layer in layers], color=BLUE
    )
    weights.set_title("relative change of weights", fontsize=9)
    mean = np.asarray(numbers["representation"]["mean"])
    representation.plot(mean, color=BLUE)
    if numbers["representation"]["low"] is not None:
        low, high = (np.asarray(numbers["representation"][key], dtype=float) for key in ("low", "high"))
        representation.fill_between(range(len(mean)), low, high, color=BLUE, alpha=0.2, lw=0)
    representation.set_title("1 − CKA of representations", fontsize=9)
    for panel in (weights, representation):
        panel.set_xlabel("layer", fontsize=8)
        clean(panel)
    for panel, (name, one) in zip(closures, numbers["closure"].items(), strict=False):
        _closure(panel, name, one)
    return figure


def _closure(panel: "Axes", name: str, one: Mapping) -> None:
    what = "held-out answers" if name == "answers" else SHORT.get(name, name)
    panel.set_title(f"moved parts: {what}", fontsize=9)
    clean(panel)
    if not one["points"]:
        panel.text(0.5, 0.5, "no gap to recover", ha="center", va="center", fontsize=8, transform=panel.transAxes)
        panel.set_xticks([])
        panel.set_yticks([])
        return
    places = range(len(one["points"]))
    panel.plot(places, [point["recovered"] for point in one["points"]], "o-", color=BLUE, ms=3, label="best parts")
    if all(point["low"] is not None for point in one["points"]):
        panel.fill_between(
            places,
            [point["low"] for point in one["points"]],
            [point["high"] for point in one["points"]],
            color=BLUE,
            alpha=0.2,
            lw=0,
        )
    panel.plot(places, [point["random"] for point in one["points"]], "--", color=GREY, label="random parts")
    panel.axhline(1, color="black", lw=0.6)
    panel.set_xticks(places, [point["size"] for point in one["points"]])
    panel.set_xlabel("attentions and MLPs moved", fontsize=8)
    panel.set_ylabel("share of the gap", fontsize=8)
    panel.legend(frameon=False, fontsize=7)


def _style(name: str) -> dict:
    is_control = "_" in name and name in NAMES
    return {"color": COLOURS.get(name, "black"), "ls": "--" if is_control else "-", "lw": 1.3}
