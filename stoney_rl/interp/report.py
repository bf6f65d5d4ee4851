"""report.html: what was seen inside one or several models, to click through; one file that needs no network.

    report.write("report.html", results, {"patterns/sample/base": patterns})    # and results.json beside it

1. ``results`` is plain JSON (NumPy arrays and scalars are taken too; NaN becomes None: not scored). ``SCHEMA`` is the
   contract: each key with its unit and, in brackets, its axes. Axes of one name have one length. A key with a question mark
   may be missing; a section that is missing is left out of the page, which says so.
2. ``arrays`` are the attention patterns, float in [0, 1], rows that sum to 1, causal:
       patterns/<text>/<model>   [layer, head, query, key]         for the tokens of the text of that name
       trace/<text>              [step, layer, head, query, key]   the same while the model trained
   The page holds the causal half of each, as round(255 * sqrt(p)) in one byte, deflated: a weight is off by at most 0.004
   near 1 and by 0.0002 near 0.002.
3. Patterns are drawn by CircuitsVis, whose script is put into the page; everything else by report.js. A policy in the page
   forbids the browser to fetch anything at all.
"""

import base64
import importlib.metadata
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from stoney_rl.data import write_lines
from stoney_rl.errors import StoneyError

FOLDER = Path(__file__).parent
MAX_BYTES = 10_000_000

# Kinds of value: text; number (None: not scored); count (a whole number); flag (true or false).
_GRID = {  # one value a head, or whatever the columns are; an average over the examples
    "mean": "[layer, column] number",
    "low?": "[layer, column] number",  # 95 % interval
    "high?": "[layer, column] number",
    "q?": "[layer, column] number",  # corrected for many tests
    "found?": "[layer, column] flag",  # significant, and above the floor that random models set
}
_TEXT = {
    "name": "text",
    "tokens": "[token] text",  # as they are shown: half a character as 'ẖ (1/3)'
    "words?": [
        {"text": "text", "start": "count", "end": "count"}
    ],  # tokens start to end - 1; every token once, in order
}
SCHEMA = {
    "title": "text",
    "findings": "[paragraph] text",
    "about?": {"<any>": "text"},  # data, hash, seed, n, command, versions
    "models": [{"name": "text", "checkpoint": "text", "lineage?": "text"}],
    "layers": "count",
    "heads": "count",
    "comparison?": [  # questions with their answers, of compare_reasoning.py
        {
            "key": "text",
            "question": "text",
            "answer": "[sentence] text",
            "figures": [{"name": "text", "data": "text"}],  # PNG in base64
            "tables": [{"caption": "text", "columns": "[column] text", "rows": "[row, column] text"}],
            "tells": "text",
            "cannot": "text",
            "source": "text",  # the paper whose figure or table it follows, and what is done otherwise
        }
    ],
    "trust?": [
        {
            "name": "text",
            "meaning": "text",
            "holds": ("at most", "at least"),
            "limit": "number",
            "values": {"<model>": "number"},  # None: not measured
        }
    ],
    "texts?": [_TEXT],
    "measures?": [
        {
            "key": "text",  # of MEASURES; any other key brings its own name, unit, scale, tells and cannot
            "n": "count",  # examples
            "name?": "text",
            "unit?": "text",
            "scale?": ("sequential", "diverging"),
            "tells?": "text",
            "cannot?": "text",
            "columns?": "[column] text",  # where they aren't heads: words, or attention and MLP
            "values": {"<model>": _GRID},
            "differences?": [{"of": "[two] text"} | _GRID],  # paired, of the first model minus the second
        }
    ],
    "lens?": {
        "prompt?": "text",
        "rows": "[row] text",  # embedding, 0, 1, ...
        "positions": "[position] text",
        "values": {
            "<model>": {
                "<any>": {  # plain, tuned
                    "top": "[row, position] text",
                    "probability": "[row, position] number",  # of the top token
                    "kl?": "[row, position] number",  # to the last row, nats
                }
            }
        },
    },
    "neurons?": [
        {
            "model": "text",
            "layer": "count",
            "neuron": "count",
            "why": "text",
            "examples": [{"kind": ("top", "random"), "words": "[word] text", "values": "[word] number"}],
        }
    ],
    "paths?": [
        {
            "name": "text",
            "model": "text",
            "n": "count",  # pairs that the faithfulness was measured on
            "clean": "text",
            "corrupt": "text",
            "answer": "text",
            "wrong": "text",
            "positions": "[position] text",  # columns of the drawing, in the order of the prompt
            "nodes": [
                {
                    "id": "text",
                    "label": "text",
                    "kind": ("embedding", "head", "mlp", "logits"),
                    "layer?": "count",  # of a head or MLP
                    "position": "count",  # of positions
                    "value": "number",  # share of the clean-corrupt difference
                }
            ],
            "edges": [{"from": "text", "to": "text", "value": "number"}],
            "faithfulness?": {
                "sizes": "[size] count",
                "circuit": "[size] number",
                "circuit_low?": "[size] number",
                "circuit_high?": "[size] number",
                "random": "[size] number",
                "random_low?": "[size] number",
                "random_high?": "[size] number",
            },
        }
    ],
    "trace?": {
        "model": "text",
        "steps": "[step] count",  # updates
        "measures": [{"key": "text", "values": "[step, layer, head] number"}],
        "curves?": [{"name": "text", "unit": "text", "values": "[step] number"}],
        "texts?": [_TEXT],
    },
}

_PATCHED = "share of the clean-corrupt difference"
# What is known of each measure of heads: name, unit, scale, what a picture of it tells and what it can't.
MEASURES = {
    key: dict(zip(("name", "unit", "scale", "tells", "cannot"), entry, strict=True))
    for key, entry in {
        "entropy": (
            "attention entropy", "share of the largest possible, 0-1", "sequential",
            "How widely a head spreads its attention: 0 looks at one token, 1 at all tokens alike.",
            "Whether the head matters: a head can look sharply at something that nothing later uses.",
        ),
        "sink": (
            "attention to the first token", "mean attention, 0-1", "sequential",
            "Where heads rest that have nothing to do: many trained heads put most of their attention on the first token.",
            "A high value is no importance of the first word; it mostly means 'off'.",
        ),
        "previous_token": (
            "previous-token score", "mean attention, 0-1", "sequential",
            "Heads that look one token back, from which words are put together and induction is built.",
            "Measured on random tokens: on real text the same head may do something else.",
        ),
        "induction": (
            "induction score", "mean attention, 0-1", "sequential",
            "Heads that find the last time this token occurred and look at what came next: copying from the prompt.",
            "That an answer was copied: a high score shows the ability, not its use.",
        ),
        "duplicate_token": (
            "duplicate-token score", "mean attention, 0-1", "sequential",
            "Heads that look at an earlier copy of the same token.",
            "What the head does with it.",
        ),
        "attribution": (
            "direct attribution", "logits, answer minus wrong", "diverging",
            "What each head itself writes towards the answer (positive) or the wrong one (negative).",
            "Work that other heads use further up; a head may matter and write nothing about the answer itself.",
        ),
        "patching": (
            "patching effect", _PATCHED, "diverging",
            "How much of the answer comes back when only this head gets its activation from the clean prompt: a cause.",
            "Redundancy: where two heads do one job, either alone shows little.",
        ),
        "attribution_patching": (
            "attribution patching", _PATCHED, "diverging",
            "An estimate of the patching effect of every head at once, from gradients along the path.",
            "It is an approximation; where it counts, compare it with the patching effect.",
        ),
        "ablation": (
            "ablation effect", "logits, change when the head is taken away", "diverging",
            "What is lost (negative) without this head's own information: how far the model needs it.",
            "Heads that stand in for one another: taken away one at a time, each seems useless.",
        ),
    }.items()
}  # fmt: skip


def write(path: str | Path, results: Mapping, arrays: Mapping[str, np.ndarray] | None = None) -> Path:
    """Write the page to ``path`` and ``results`` to results.json beside it; see the module's docstring for both.

    Returns ``path``. Raises ``StoneyError`` if something does not fit the contract, if the page would be over 10 MB, or
    if it can't be written; then neither file is there.
    """
    path = Path(path)
    page = _page(results, arrays or {})
    write_lines(path.with_name("results.json"), [json.dumps(plain(results), ensure_ascii=False, indent=1).encode()])
    return write_lines(path, [page])


def write_page(path: str | Path, results: Mapping) -> Path:
    """``write`` without results.json, for results whose page shows a part of them. Raises as ``write``."""
    return write_lines(Path(path), [_page(results, {})])


def _page(results: Mapping, arrays: Mapping[str, np.ndarray]) -> bytes:
    page = render(results, arrays).encode()
    if len(page) > MAX_BYTES:
        raise StoneyError(
            f"report: the page would be {len(page) / 1e6:.1f} MB, and 10 MB is the limit; give fewer or shorter texts, "
            "fewer models or fewer traced steps"
        )
    return page


def render(results: Mapping, arrays: Mapping[str, np.ndarray]) -> str:
    """The page as text. Raises ``StoneyError`` if something does not fit the contract."""
    import jinja2
    from markupsafe import Markup

    from stoney_rl.inspection import html
    from stoney_rl.metrics import error_page

    results = plain(results)
    check(results)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    data = results | {"patterns": _packed(results, arrays)}
    data["measures"] = [described(measure) for measure in results.get("measures", ())]
    if "trace" in results:
        data["trace"] = results["trace"] | {"measures": [described(each) for each in results["trace"]["measures"]]}
    return environment.from_string((FOLDER / "report.html.jinja").read_text(encoding="utf-8")).render(
        results=results,
        models=[model["name"] for model in results["models"]],
        has=[name.removesuffix("?") for name in SCHEMA if results.get(name.removesuffix("?"))],
        trust=[_verdict(each) for each in results.get("trust", ())],
        style=Markup(error_page.house_style() + (FOLDER / "report.css").read_text(encoding="utf-8")),
        data=html.script_json(data),
        circuitsvis=Markup(_circuitsvis()) if data["patterns"] else None,
        script=Markup((FOLDER / "report.js").read_text(encoding="utf-8")),
    )


def described(measure: Mapping) -> dict:
    """A measure with its name, unit, scale, tells and cannot: its own, or else those of ``MEASURES``."""
    return MEASURES.get(measure["key"], {}) | dict(measure)


def plain(value: object) -> object:
    """``value`` as JSON has it: NumPy's arrays and scalars as lists and numbers of 6 digits, what is not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value


def _verdict(invariant: Mapping) -> dict:
    """The invariant with its result for each model: True, False, or None where it was not measured."""
    limit, at_most = invariant["limit"], invariant["holds"] == "at most"
    return dict(invariant) | {
        "passed": {
            model: None if value is None else (value <= limit if at_most else value >= limit)
            for model, value in invariant["values"].items()
        }
    }


# The contract


def check(results: Mapping) -> None:
    """Raise ``StoneyError`` if plain ``results`` do not fit ``SCHEMA``, naming the place and what was expected."""
    names = [model.get("name") for model in results.get("models") or () if isinstance(model, dict)]
    sizes = {"layer": results.get("layers"), "head": results.get("heads"), "two": 2}
    _fit("results", results, SCHEMA, sizes, names)
    for number, measure in enumerate(results.get("measures", ())):
        _require_description(f"results.measures[{number}]", measure)
    for number, measure in enumerate(results.get("trace", {}).get("measures", ())):
        _require_description(f"results.trace.measures[{number}]", measure)
    for number, text in enumerate(results.get("texts", []) + results.get("trace", {}).get("texts", [])):
        _require_words(f"text {number} ({text['name']})", text)
    for number, path in enumerate(results.get("paths", ())):
        _require_graph(f"results.paths[{number}]", path)


def _fit(where: str, value: object, schema: object, sizes: dict, models: list[str]) -> None:
    """``sizes``: the length of each axis that is known here; one that isn't gets the length that is met first."""
    if isinstance(schema, str):
        axes, kind = re.fullmatch(r"(?:\[(.*)\] )?(\w+)", schema).groups()
        _fit_array(where, value, axes.split(", ") if axes else [], kind, sizes)
    elif isinstance(schema, tuple):
        _expect(value in schema, where, " or ".join(map(repr, schema)), value)
    elif isinstance(schema, list):
        _expect(isinstance(value, list), where, "a list", value)
        for number, each in enumerate(value):
            _fit(f"{where}[{number}]", each, schema[0], sizes, models)
    elif next(iter(schema)) in ("<model>", "<any>"):
        _expect(isinstance(value, dict), where, "an object", value)
        for key, each in value.items():
            _expect("<model>" not in schema or key in models, where, f"models among {', '.join(models)}", key)
            _fit(f"{where}.{key}", each, next(iter(schema.values())), sizes, models)
    else:
        _expect(isinstance(value, dict), where, "an object", value)
        sizes = dict(sizes)  # an axis is known in the object that first has it, and inside
        if "columns?" in schema and "columns" not in value:
            sizes["column"] = sizes["head"]
        allowed = [key.removesuffix("?") for key in schema]
        for key in value:
            _expect(key in allowed, where, f"only the keys {', '.join(allowed)}", key)
        for key, part in schema.items():
            if key.endswith("?") and key[:-1] not in value:
                continue
            _expect(key.removesuffix("?") in value, where, f"the key {key}", sorted(value))
            _fit(f"{where}.{key.removesuffix('?')}", value[key.removesuffix("?")], part, sizes, models)


_KINDS = {
    "text": lambda value: isinstance(value, str),
    "number": lambda value: value is None or (isinstance(value, int | float) and not isinstance(value, bool)),
    "count": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "flag": lambda value: isinstance(value, bool),
}


def _fit_array(where: str, value: object, axes: list[str], kind: str, sizes: dict) -> None:
    if not axes:
        _expect(_KINDS[kind](value), where, f"a {kind}", value)
        return
    _expect(isinstance(value, list), where, f"a list of {kind}s, one a {axes[0]}", value)
    size = sizes.setdefault(axes[0], len(value))
    _expect(len(value) == size, where, f"{size} values along the axis {axes[0]!r}", len(value))
    for number, each in enumerate(value):
        _fit_array(f"{where}[{number}]", each, axes[1:], kind, sizes)


def _expect(fine: bool, where: str, expected: str, got: object) -> None:
    if not fine:
        raise StoneyError(f"report: {where}: expected {expected}, got {str(got)[:80]!r}; report.SCHEMA is the contract")


def _require_description(where: str, measure: Mapping) -> None:
    lacking = [key for key in ("name", "unit", "scale", "tells", "cannot") if key not in described(measure)]
    if lacking:
        raise StoneyError(
            f"report: {where}: {measure['key']!r} is not one of {', '.join(MEASURES)}, so give its {', '.join(lacking)}"
        )


def _require_words(where: str, text: Mapping) -> None:
    covered = [index for word in text.get("words", ()) for index in range(word["start"], word["end"])]
    if "words" in text and covered != list(range(len(text["tokens"]))):
        raise StoneyError(
            f"report: {where}: its words must hold each of its {len(text['tokens'])} tokens once, in order"
        )


def _require_graph(where: str, path: Mapping) -> None:
    names = {node["id"] for node in path["nodes"]}
    for edge in path["edges"]:
        _expect(edge["from"] in names and edge["to"] in names, f"{where}.edges", "ends among the nodes", edge)
    for node in path["nodes"]:
        _expect("layer" in node or node["kind"] in ("embedding", "logits"), f"{where}.nodes", "the key layer", node)
        _expect(0 <= node["position"] < len(path["positions"]), f"{where}.nodes", "a position", node["position"])


# Attention patterns


def _packed(results: Mapping, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The arrays as the page holds them, each checked against what ``results`` say of its text."""
    shape = (results["layers"], results["heads"])
    expected = {
        f"patterns/{text['name']}/{model['name']}": (*shape, len(text["tokens"]))
        for text in results.get("texts", ())
        for model in results["models"]
    }
    if "trace" in results:
        steps = len(results["trace"]["steps"])
        expected |= {
            f"trace/{text['name']}": (steps, *shape, len(text["tokens"])) for text in results["trace"].get("texts", ())
        }
    for name in arrays:
        if name not in expected:
            raise StoneyError(
                f"report: the array {name!r} belongs to nothing; expected {', '.join(expected) or 'none'}"
            )
    for name in expected:
        if name not in arrays:
            raise StoneyError(f"report: the array {name!r} is missing, but results name its text and its model")
    return {name: pack(name, arrays[name], shape) for name, shape in expected.items()}


def pack(name: str, patterns: np.ndarray, shape: tuple[int, ...]) -> str:
    """Patterns [..., query, key] with ``shape`` [..., query] as base64 of their deflated causal half; see the docstring."""
    patterns = np.asarray(patterns, dtype=np.float32)
    if patterns.shape != (*shape, shape[-1]):
        raise StoneyError(f"report: the array {name!r} has shape {patterns.shape}, expected {(*shape, shape[-1])}")
    if not np.allclose(patterns.sum(-1), 1, atol=1e-2) or patterns.min() < 0 or np.triu(patterns, 1).any():
        raise StoneyError(
            f"report: the array {name!r} is no causal attention: rows of it don't sum to 1, or look ahead"
        )
    causal = patterns[(..., *np.tril_indices(shape[-1]))]
    return base64.b64encode(zlib.compress(np.rint(255 * np.sqrt(causal)).astype(np.uint8).tobytes(), 9)).decode()


def _circuitsvis() -> str:
    """CircuitsVis's own bundle, as it may stand inside a script element, without the pointer to its source map."""
    try:
        bundle = importlib.metadata.distribution("circuitsvis").locate_file("circuitsvis/dist/cdn/iife.js")
        script = Path(str(bundle)).read_text(encoding="utf-8")
    except (importlib.metadata.PackageNotFoundError, OSError) as error:
        raise StoneyError("report: circuitsvis is not installed; pip install -r requirements.txt") from error
    return re.sub(r"\n//# sourceMappingURL=.*", "", script).replace("</script", r"<\/script")
