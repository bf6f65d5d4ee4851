"""From what was measured of each model to what a person reads: averages with intervals, differences, and plain sentences.

results, arrays = summarise(models, plan, floors, tokenizer, title="...", about={...}, checkpoints=[...])
report.write("report.html", results, arrays)
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from stoney_rl.interp import report, significance, tracer, trust
from stoney_rl.interp.analysis import Measured
from stoney_rl.interp.circuit import REGIONS
from stoney_rl.interp.plan import Plan
from stoney_rl.interp.words import Word, split_words, token_labels

NOT_OF_PAIRS = ("entropy", "sink", "previous_token", "induction", "duplicate_token")
ON_PROMPTS = ("entropy", "sink")
TRACED = 8  # steps of a trace that the page shows: patterns of all heads take half a megabyte each
CURVES = (
    ("answer_log_prob", "log-probability of the right answers", "nats a token"),
    ("median_depth", "depth at which answers are settled", "layers"),
    ("mean_entropy", "attention entropy, mean of heads", "share"),
    ("max_induction", "induction, strongest head", "mean attention"),
    ("max_previous_token", "previous token, strongest head", "mean attention"),
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Models = Mapping[str, Mapping[str, Measured]]  # model -> task -> measured; the analysed model first


def summarise(
    models: Models,
    plan: Plan,
    floors: Measured,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    title: str,
    about: Mapping[str, str],
    checkpoints: Sequence[Mapping],
) -> tuple[dict, dict[str, np.ndarray]]:
    """What ``report.write`` takes. ``about`` and ``checkpoints`` (its 'models') go in as they are."""
    from stoney_rl.interp.findings import findings

    words = split_words(tokenizer, plan.text)
    shape = next(iter(models.values()))["trust"].facts["shape"]
    labels = [word.label for word in words]
    results = {
        "title": title,
        "findings": findings(models, plan, floors),
        "about": dict(about),
        "models": list(checkpoints),
        **shape,
        "trust": trust_panel(models),
        "measures": measures(models, plan, floors),
        "neurons": neuron_cards(models, plan),
        "paths": paths(models, plan),
    }
    arrays = {
        f"patterns/sample/{name}": tasks["attention"].arrays["patterns"]
        for name, tasks in models.items()
        if "attention" in tasks
    }
    if arrays:
        results["texts"] = [{"name": "sample", "tokens": token_labels(tokenizer, plan.text), "words": _spans(words)}]
    view = lens_view(models, labels, tokenizer.decode(plan.text), shape["layers"])
    return results | ({"lens": view} if view else {}), arrays


def measures(models: Models, plan: Plan, floors: Measured) -> list[dict]:
    """The layer-by-head grids of the report, with intervals, q, findings, and paired differences to the first model."""
    found = []
    for key in NOT_OF_PAIRS:
        clusters = _prompt_clusters(plan) if key in ON_PROMPTS else None
        values = {name: tasks["attention"].arrays[key] for name, tasks in models.items() if "attention" in tasks}
        found += _grid(key, values, clusters, plan.seed)
    for family, pairs in plan.families.items():
        clusters = [pair.cluster for pair in pairs]
        for task, key in (("attribution", "attribution"), ("patching", "attribution_patching")):
            floor = floors.facts.get(f"{family}/{task}", 0.0)
            values = {
                name: tasks[task].arrays[f"{family}/heads"]
                for name, tasks in models.items()
                if task in tasks and f"{family}/heads" in tasks[task].arrays
            }
            found += _grid(key, values, clusters, plan.seed, floor=floor, family=family)
        values = {
            name: tasks["residual"].arrays[f"{family}/residual"]
            for name, tasks in models.items()
            if "residual" in tasks
        }
        clusters = [pairs[index].cluster for index in plan.halves(family)[1]]
        found += _grid("residual", values, clusters, plan.seed, family=family, columns=REGIONS)
    return found


_OWN = {  # measures that report.MEASURES does not know, or that are given in logits here
    "attribution_patching": {"unit": "logits, answer minus wrong"},
    "residual": {
        "name": "residual stream",
        "unit": "logits, answer minus wrong",
        "scale": "diverging",
        "tells": "Where the answer's information stands before each layer: what comes back when the stream is the clean "
        "prompt's at the words that differ between the prompts, elsewhere, or at the last token.",
        "cannot": "Which head or MLP moved it.",
    },
}


def _grid(
    key: str,
    values: Mapping[str, np.ndarray],
    clusters: Sequence | None,
    seed: int,
    *,
    floor: float = 0.0,
    family: str | None = None,
    columns: Sequence[str] | None = None,
) -> list[dict]:
    """One measure of the report; none where no model has it. ``values`` [example, layer, column]."""
    scored = {name: array for name, array in values.items() if array.size}
    if not scored:
        return []
    # A pair may lack a region.
    whole = np.all([np.isfinite(array).all(axis=(1, 2)) for array in scored.values()], axis=0)
    if not whole.any():
        return []
    scored = {name: array[whole] for name, array in scored.items()}
    n = int(whole.sum())
    clusters = None if clusters is None else [cluster for cluster, kept in zip(clusters, whole, strict=True) if kept]
    clusters = list(range(n)) if clusters is None else clusters
    known = report.MEASURES.get(key, {}) | _OWN.get(key, {})
    name = known["name"] if family is None else f"{known['name']} ({family})"
    # Attention is positive by its nature: whether a mean of it is above zero is no question.
    is_effect = known["scale"] == "diverging"
    measure = known | {"key": key if family is None else f"{key}/{family}", "name": name, "n": n}
    if columns is not None:
        measure["columns"] = list(columns)
    effects = {name: significance.effects(array, clusters, seed=seed, floor=floor) for name, array in scored.items()}
    measure["values"] = {name: _entry(effect, is_effect) for name, effect in effects.items()}
    first = next(iter(scored))
    measure["differences"] = [
        {"of": [first, other]}
        | _entry(significance.difference(scored[other], scored[first], clusters, seed=seed), True)
        for other in list(scored)[1:]
    ]
    return [measure]


def _entry(effect: significance.Effects, is_effect: bool) -> dict:
    entry = {"mean": effect.mean}
    if effect.low is not None:
        entry |= {"low": effect.low, "high": effect.high}
        if is_effect:
            entry |= {"q": effect.q, "found": effect.found}
    return entry


def _prompt_clusters(plan: Plan) -> list[str]:
    """Of the prompts in the order in which ``analysis.measure_attention`` keeps them."""
    return [pair.cluster for pairs in plan.families.values() for pair in pairs]


def trust_panel(models: Models) -> list[dict]:
    """The invariants with their values for each model, as report.SCHEMA has them."""
    measured = {name: tasks["trust"].facts["values"] for name, tasks in models.items()}
    return [
        {
            "name": invariant.name,
            "meaning": invariant.meaning,
            "holds": "at most",
            "limit": max(tasks["trust"].facts["limits"][key] for tasks in models.values()),
            "values": {name: values[key] for name, values in measured.items()},
        }
        for key, invariant in trust.INVARIANTS.items()
        if any(values[key] is not None for values in measured.values())
    ]


def lens_view(models: Models, words: Sequence[str], prompt: str, layers: int) -> dict | None:
    """What each layer would say at the end of each word of the sample text."""
    values: dict[str, dict] = {}
    for name, tasks in models.items():
        for task, kind in (("lens", "plain"), ("tuned_lens", "tuned")):
            if task in tasks:
                arrays = tasks[task].arrays
                values.setdefault(name, {})[kind] = {
                    "top": tasks[task].facts["top"],
                    "probability": arrays["text/probability"],
                    "kl": arrays["text/kl"],
                }
    rows = ["embedding", *(f"layer {layer}" for layer in range(layers))]
    return {"prompt": prompt, "rows": rows, "positions": list(words), "values": values} if values else None


def neuron_cards(models: Models, plan: Plan) -> list[dict]:
    """The neurons that write most of the first family's answer, with where else they fire."""
    cards = []
    for name, tasks in models.items():
        facts = tasks["neurons"].facts if "neurons" in tasks else {}
        for card in facts.get("examples", ()):
            layer, neuron = card["neuron"]
            family, place = next(
                (family, chosen.index([layer, neuron]))
                for family, chosen in facts["chosen"].items()
                if [layer, neuron] in chosen
            )
            mean = tasks["neurons"].arrays[f"{family}/attribution"][:, place].mean()
            why = (
                f"writes {mean:+.2f} logits towards the answer of {family} pairs it was not chosen on; "
                f"positive at {card['positive']:.0%} of tokens, {card['mean']:+.3f} on average"
            )
            cards.append({"model": name, "layer": layer, "neuron": neuron, "why": why, "examples": card["examples"]})
    return cards


def paths(models: Models, plan: Plan) -> list[dict]:
    """The circuits as graphs, with their faithfulness beside random circuits; of models that tell the prompts apart."""
    found = [
        _path(name, family, plan, tasks["circuit"])
        for name, tasks in models.items()
        if "circuit" in tasks
        for family in plan.families
    ]
    return [path for path in found if path]


def _path(name: str, family: str, plan: Plan, measured: Measured) -> dict | None:
    facts, arrays = measured.facts[family], measured.of(family)
    reporting = plan.halves(family)[1]
    found = faithfulness(arrays, [plan.families[family][index].cluster for index in reporting], plan.seed)
    if found is None:
        return None
    values = np.nanmean(arrays["values"], axis=0)
    scale = values[-1]  # the logits' own value is the whole difference
    example = plan.families[family][reporting[0]]
    nodes = []
    for node, value in zip(facts["nodes"], values, strict=True):
        label = {"head": f"{node['layer']}.{node['head']}", "mlp": f"MLP {node['layer']}"}.get(
            node["kind"], node["kind"]
        )
        nodes.append(
            {
                "id": f"{label}@{node['region']}",
                "label": label,
                "kind": node["kind"],
                "layer": node["layer"] or 0,
                "position": REGIONS.index(node["region"]),
                "value": value / scale,
            }
        )
    edges = [
        {"from": nodes[sender]["id"], "to": nodes[receiver]["id"], "value": value / scale}
        for (sender, receiver), value in zip(facts["edges"], arrays["edges"].mean(axis=0), strict=True)
    ]
    return {
        "name": f"{family}: {name}",
        "model": name,
        "n": len(reporting),
        "clean": example.texts[0],
        "corrupt": example.texts[1],
        "answer": example.texts[2],
        "wrong": example.texts[3],
        "positions": list(REGIONS),
        "nodes": nodes,
        "edges": edges,
        "faithfulness": {"sizes": facts["sizes"]} | found,
    }


def faithfulness(arrays: Mapping[str, np.ndarray], clusters: Sequence, seed: int) -> dict | None:
    """Mean share of the model's difference that each circuit keeps, and random ones, with intervals (the difference itself
    taken as it is); None unless the reporting pairs show that there is a difference to keep."""
    differences = arrays["full"] - arrays["empty"]
    if not tells_apart(significance.effects(differences[:, None], clusters, seed=seed)):
        return None
    shares = (arrays["circuit"] - arrays["empty"][:, None]) / differences.mean()
    random = ((arrays["random"] - arrays["empty"][:, None, None]) / differences.mean()).mean(axis=-1)
    found: dict[str, np.ndarray] = {}
    for key, values in (("circuit", shares), ("random", random)):
        effect = significance.effects(values, clusters, seed=seed)
        found |= {key: effect.mean, f"{key}_low": effect.low, f"{key}_high": effect.high}
    return found


def tells_apart(gap: significance.Effects) -> bool:
    """Whether a model tells clean from corrupt prompts: their difference [1] is above zero by more than chance."""
    return bool(gap.found[0] and gap.mean[0] > 0)


def trace_view(
    model: str, found: tracer.Trace, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[dict, dict[str, np.ndarray]]:
    """report.SCHEMA's 'trace' and its arrays, from what ``tracer.read`` gives; at most TRACED steps, evenly spaced."""
    kept = np.unique(np.linspace(0, len(found.steps) - 1, TRACED).round().astype(int))
    grids = [{"key": name, "values": found[name].mean(axis=1)[kept]} for name in tracer.MEASURES]
    curves = [
        {"name": name, "unit": unit, "values": [found.lines[step].get(key) for step in kept]}
        for key, name, unit in CURVES
    ]
    ids = found.probe["texts"][0]["ids"]
    text = {"name": "watched", "tokens": token_labels(tokenizer, ids), "words": _spans(split_words(tokenizer, ids))}
    steps = [found.steps[step] for step in kept]
    view = {"model": model, "steps": steps, "measures": grids, "curves": curves, "texts": [text]}
    return view, {"trace/watched": found["pattern_0"][kept]}


def _spans(words: Sequence[Word]) -> list[dict]:
    return [{"text": word.label, "start": word.start, "end": word.end} for word in words]
