"""The pictures of an inspection: one PNG a question, the same bytes for the same figures."""

import warnings
from itertools import pairwise
from pathlib import Path

from stoney_rl.inspection.findings import FAILURE

# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), told apart with any colour vision.
BLUE, ORANGE, GREY, GREEN, RED = "#0072B2", "#E69F00", "#999999", "#009E73", "#D55E00"

RARE = 0.001  # share of all places under which a letter is not drawn: mostly faults of writing

# name -> what a reader sees there, for the report.
CAPTIONS = {
    "findings": "Share of the rows that each finding concerns; orange ones would spoil training or a claim.",
    "lengths": "Length of the rows. The last bar holds everything longer.",
    "words": "What a word costs: tokens for each distinct word, encoded as inside a sentence.",
    "lexicon": "In how many rows a form is mentioned, and the parts of speech that the rows state.",
    "letters": "How often each letter begins a word, and how often it stands inside one. A gap is a letter that is common "
    "inside words and begins none.",
    "split": "Rows of each part of the split. Unseen rows are about words that no training row mentions.",
}


def draw(summary: dict, directory: Path) -> list[str]:
    """Write the pictures of a ``report.summarise`` into the existing ``directory``; returns their names, in order."""
    drawn = []
    for name, (size, plot) in _PLOTS.items():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # a script that the plain font lacks
            if plot(figure, summary):
                figure.savefig(directory / f"{name}.png", format="png", metadata={"Software": None})
                drawn.append(name)
    return drawn


def _clean(panel, axis: str = "y") -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_axisbelow(True)
    panel.grid(axis=axis, lw=0.4, color="#cccccc")


def _findings(figure, summary: dict) -> bool:
    found = [finding for finding in summary["findings"] if finding["unit"] == "rows" and finding["count"]]
    if not found:
        return False
    panel = figure.subplots()
    names = [finding["kind"].replace("_", " ") for finding in found]
    shares = [100 * finding["count"] / finding["total"] for finding in found]
    colours = [ORANGE if finding["severity"] == FAILURE else GREY for finding in found]
    bars = panel.barh(names, shares, color=colours)
    panel.bar_label(bars, [f"{share:.1f} %" for share in shares], padding=3, fontsize=9)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.15 * max(shares))
    panel.set_xlabel("% of rows")
    _clean(panel, "x")
    return True


def _lengths(figure, summary: dict) -> bool:
    lengths = summary["sections"]["lengths"]
    drawn = [("question", "characters"), ("answer", "characters")]
    spreads = [(f"{part}, {unit}", lengths[part][unit]) for part, unit in drawn]
    if lengths["tokens"]:
        spreads.append(("whole row, tokens", lengths["tokens"]["row"]))
    panels = figure.subplots(1, len(spreads), squeeze=False)[0]
    for panel, (title, spread) in zip(panels, spreads, strict=True):
        edges, counts = spread["histogram"]["edges"], spread["histogram"]["counts"]
        widths = [after - before for before, after in pairwise(edges)]
        panel.bar(edges[:-1], counts, widths, align="edge", color=BLUE, edgecolor="white", lw=0.3)
        panel.set_title(title, fontsize=10)
        panel.set_ylabel("rows" if panel is panels[0] else "")
        if title.endswith("tokens"):
            limit = lengths["max_length"]
            if limit <= 1.6 * edges[-1]:
                panel.axvline(limit, color=RED, lw=1.3)
            note = f"--max_length {limit}\ncuts {lengths['tokens']['rows_cut']:,} rows"
            panel.text(0.97, 0.95, note, ha="right", va="top", fontsize=8, color=RED, transform=panel.transAxes)
        _clean(panel)
    return True


def _words(figure, summary: dict) -> bool:
    words = summary["sections"]["lengths"]["words"]
    if not words:
        return False
    names = {"language": "the language", "language_marked": "… with a marked letter", "english": "English around it"}
    shown = {name: words[key] for key, name in names.items() if words[key]["types"]}
    if not shown:
        return False
    panel = figure.subplots()
    values = [cost["tokens_a_word"] for cost in shown.values()]
    colours = [GREEN if name.startswith("English") else BLUE for name in shown]
    bars = panel.barh(list(shown), values, color=colours)
    labels = [
        f"{cost['tokens_a_word']:.2f}  ({cost['one_token']:.1%} are one token, n = {cost['types']:,})"
        for cost in shown.values()
    ]
    panel.bar_label(bars, labels, padding=4, fontsize=9)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.75 * max(values))
    panel.set_xlabel("tokens a word")
    _clean(panel, "x")
    return True


def _lexicon(figure, summary: dict) -> bool:
    lexicon, coverage = summary["sections"]["lexicon"], summary["sections"]["coverage"]
    if not lexicon["forms"]:
        return False
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    rows = coverage["forms_by_rows"]
    bars = left.bar(list(rows), list(rows.values()), color=BLUE)
    left.bar_label(bars, [f"{count:,}" for count in rows.values()], fontsize=8, padding=2)
    left.set_xlabel("rows that mention the form")
    left.set_ylabel("forms")
    _clean(left)
    by_pos = sorted(lexicon["by_pos"].items(), key=lambda item: (-item[1], item[0]))
    shown = dict(by_pos[:10])
    if len(by_pos) > 10:
        shown["others"] = sum(count for _, count in by_pos[10:])
    shown["not stated"] = lexicon["forms"] - lexicon["with_pos"]
    colours = [GREY if name in ("others", "not stated") else BLUE for name in shown]
    bars = right.barh(list(shown), list(shown.values()), color=colours)
    right.bar_label(bars, [f"{count:,}" for count in shown.values()], fontsize=8, padding=3)
    right.invert_yaxis()
    right.set_xlim(0, 1.12 * max(shown.values()))
    right.set_xlabel("forms")
    _clean(right, "x")
    return True


def _letters(figure, summary: dict) -> bool:
    letters = summary["sections"]["coverage"]["letters"]
    places = sum(letter["initial"] + letter["inside"] for letter in letters)
    letters = [letter for letter in letters if letter["initial"] + letter["inside"] >= RARE * places]
    if not letters:
        return False
    panel = figure.subplots()
    initial, inside = (sum(letter[key] for letter in letters) or 1 for key in ("initial", "inside"))
    places = range(len(letters))
    flagged = {letter["letter"] for letter in letters if letter["verdict"].startswith("gap")}
    first = [100 * letter["initial"] / initial for letter in letters]
    within = [100 * letter["inside"] / inside for letter in letters]
    panel.bar([at - 0.2 for at in places], first, 0.4, color=BLUE, label="begins a word")
    panel.bar([at + 0.2 for at in places], within, 0.4, color=GREY, label="inside a word")
    for at, letter in enumerate(letters):
        if letter["letter"] in flagged:
            panel.annotate("gap", (at, max(first[at], within[at])), ha="center", va="bottom", color=RED, fontsize=10)
    panel.set_xticks(list(places), [letter["letter"] for letter in letters], fontsize=11)
    for tick, letter in zip(panel.get_xticklabels(), letters, strict=True):
        if letter["letter"] in flagged:
            tick.set_color(RED)
            tick.set_fontweight("bold")
    panel.set_ylabel("% of letters")
    panel.margins(x=0.01)
    panel.legend(frameon=False)
    _clean(panel)
    return True


def _split(figure, summary: dict) -> bool:
    split = summary["sections"]["split"]
    if not split["parts"]:
        return False
    panel = figure.subplots()
    names = list(split["parts"])
    unseen = [part["unseen"] for part in split["parts"].values()]
    seen = [part["seen"] for part in split["parts"].values()]
    rest = [part["rows"] - part["seen"] - part["unseen"] for part in split["parts"].values()]
    left = [0] * len(names)
    for label, counts, colour in (("training", rest, GREY), ("unseen", unseen, BLUE), ("seen", seen, ORANGE)):
        bars = panel.barh(names, counts, left=left, color=colour, label=label)
        panel.bar_label(bars, [f"{count:,}" if count else "" for count in counts], label_type="center", fontsize=9)
        left = [before + count for before, count in zip(left, counts, strict=True)]
    if split["dropped"]:
        bars = panel.barh(
            ["in none"], [split["dropped"]], color="#dddddd", label="mention a held-out form beside others"
        )
        panel.bar_label(bars, [f"{split['dropped']:,}"], label_type="center", fontsize=9)
    panel.invert_yaxis()
    panel.set_xlabel("rows")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _clean(panel, "x")
    return True


_PLOTS = {
    "findings": ((7.5, 3.2), _findings),
    "lengths": ((10, 3), _lengths),
    "words": ((7.5, 2.1), _words),
    "lexicon": ((10, 3.4), _lexicon),
    "letters": ((10, 3.4), _letters),
    "split": ((8, 2.7), _split),
}
