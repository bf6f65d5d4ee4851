"""What is measured of one model, task by task: numbers for every example, on disk, before anything is averaged.

    measured = measure_model(folder, ordered(["attention", "patching"]), plan, lambda: load_hooked("stoney_lora_merged"))
    measured["patching"].arrays["lookup/heads"]                # [pair, layer, head]

A task returns facts (JSON) and arrays; both are kept in the folder, so that an analysis that was stopped goes on with the
next task. Heads and neurons are chosen on one half of each family's pairs and reported on the other.
"""

import json
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from stoney_rl import checkpoints
from stoney_rl.interp import (
    ablation,
    attention,
    attribution,
    circuit,
    lens,
    neurons,
    patching,
    significance,
    trust,
    tuned_lens,
)
from stoney_rl.interp.hooked import Batch, HookedModel, by_length, left_padded, random_hooked
from stoney_rl.interp.pairs import PairBatch, batched, over_pairs
from stoney_rl.interp.plan import Plan
from stoney_rl.interp.words import split_words

RANDOM_ROWS, RANDOM_LENGTH = 16, 32  # repeated random tokens: rows, tokens before they repeat
DRAWS = 10  # groups of random heads beside each group that is ablated
ON_TEXT = ("entropy", "sink", "distance")  # measured on the prompts; the other scores on random tokens


Measure = Callable[[PairBatch], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Measured:
    facts: dict = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def of(self, family: str) -> dict[str, np.ndarray]:
        """The arrays of one family, without its name in front."""
        own = f"{family}/"
        return {key.removeprefix(own): array for key, array in self.arrays.items() if key.startswith(own)}


def ordered(tasks: Iterable[str]) -> list[str]:
    """The tasks in the order of TASKS, with those that they build on."""
    wanted = set(tasks)
    return [name for name in TASKS if name in wanted or any(REQUIRES.get(other) == name for other in wanted)]


def measure_model(
    folder: Path,
    tasks: Sequence[str],
    plan: Plan,
    open_model: Callable[[], HookedModel],
    table: Mapping[str, Callable] | None = None,
) -> dict[str, Measured]:
    """The result of each task: read from ``folder`` if it is there, else measured and written there.

    ``open_model`` is called for each task that is not there; let it keep the model. ``table``: what measures a task of
    that name, (model, plan, what was measured before) -> ``Measured``; TASKS, unless given.
    """
    done: dict[str, Measured] = {}
    for name in tasks:
        task = (table or TASKS)[name]
        done[name] = kept(folder, name, lambda task=task: task(open_model(), plan, done))
    return done


def kept(folder: Path, name: str, measure: Callable[[], Measured], of: str | None = None) -> Measured:
    """What ``measure`` gave when it was called for this ``folder`` and ``name``; it is called now if it never was. ``of``: what to say
    it is of, in place of the folder's name."""
    found = read_task(folder, name)
    if found is None:
        started = time.monotonic()
        found = write_task(folder, name, measure())
        print(f"{of or folder.name}: {name} ({time.monotonic() - started:.0f} s)", flush=True)
    return found


def write_task(folder: Path, name: str, measured: Measured) -> Measured:
    """Write arrays, then facts: a task whose facts are there is whole. Returns what ``read_task`` will."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{name}.partial.npz"
    np.savez_compressed(unfinished, **measured.arrays)
    unfinished.replace(folder / f"{name}.npz")
    checkpoints.write_json(folder / f"{name}.json", measured.facts)
    return read_task(folder, name)


def read_task(folder: Path, name: str) -> Measured | None:
    """What ``write_task`` wrote; None, with a line to the user where files are damaged, if there is nothing whole."""
    if not (folder / f"{name}.json").exists():
        return None
    try:
        with np.load(folder / f"{name}.npz") as arrays:
            return Measured(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), dict(arrays))
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        print(f"{folder / name}: damaged ({type(error).__name__}); measured again")
        return None


# Tasks


def measure_trust(model: HookedModel, plan: Plan, done: dict[str, Measured]) -> Measured:
    pairs = next(iter(plan.families.values()))
    values = trust.measure(model, pairs)
    shape = {"layers": model.n_layers, "heads": model.n_heads}
    limits = {key: invariant.limit_in(model.dtype) for key, invariant in trust.INVARIANTS.items()}
    return Measured({"values": values, "limits": limits, "failed": trust.failed(values, model.dtype), "shape": shape})


def measure_attention(model: HookedModel, plan: Plan, done: dict[str, Measured]) -> Measured:
    """patterns [layer, head, query, key] of the sample text; each head score [row, layer, head]; copying accuracy [row]."""
    text = left_padded([plan.text], model.pad_token_id)
    arrays = {"patterns": attention.attention_patterns(model, text)[0].half().numpy()}
    prompts = [pair.clean for pairs in plan.families.values() for pair in pairs]
    parts = [(rows, attention.head_scores(model, batch)) for rows, batch in _batches(model, prompts, plan)]
    order = np.argsort([row for rows, _ in parts for row in rows])
    arrays |= {name: torch.cat([scores[name] for _, scores in parts]).numpy()[order] for name in ON_TEXT}
    repeated = attention.repeated_random_tokens(model, RANDOM_ROWS, RANDOM_LENGTH, plan.seed)
    found = attention.head_scores(model, repeated)
    arrays |= {name: values.numpy() for name, values in found.items() if name not in ON_TEXT}
    arrays["copying"] = attention.copy_accuracy(model.run(repeated).logits, repeated).numpy()
    return Measured(arrays=arrays)


def measure_attribution(model: HookedModel, plan: Plan, done: dict[str, Measured]) -> Measured:
    """By family, logits: clean, corrupt [pair], the pairs' differences; components [pair, layer, 2] (attention, MLP) and
    heads [pair, layer, head], on the clean prompts."""

    def measure(batch: PairBatch) -> dict[str, torch.Tensor]:
        parts = attribution.component_attribution(model, batch.clean, batch.answer, batch.wrong)
        return _direct(model, batch) | {
            "clean": batch.difference(model.run(batch.clean).logits),
            "corrupt": batch.difference(model.run(batch.corrupt).logits),
            "components": torch.stack([parts.attention, parts.mlp], -1),
        }

    return Measured(arrays=_by_family(model, plan, measure, "direct attribution"))


def _direct(model: HookedModel, batch: PairBatch) -> dict[str, torch.Tensor]:
    if model.post_norm:
        return {}
    return {"heads": attribution.head_attribution(model, batch.clean, batch.answer, batch.wrong)}


def measure_lens(model: HookedModel, plan: Plan, done: dict[str, Measured]) -> Measured:
    return _read_lens(model, plan, None)


def measure_tuned_lens(model: HookedModel, plan: Plan, done: dict[str, Measured]) -> Measured:
    """As the lens; facts: how well it fits texts that it was not fitted to."""
    half = len(plan.texts) // 2
    train, held_out = (
        [batch for _, batch in _batches(model, texts, plan)] for texts in (plan.texts[half:], plan.texts[:half])
    )
    tuned = tuned_lens.fit_tuned_lens(model, train, held_out, seed=plan.seed)
    read = _read_lens(model, plan, tuned)
    return Measured(read.facts | {"fit": asdict(tuned.fit)}, read.arrays)


def _read_lens(model: HookedModel, plan: Plan, tuned: tuned_lens.TunedLens | None) -> Measured:
    """By family, at the last token: answer, wrong (log-probabilities, nats), entropy, kl [pair, layer + 1]; depth of the
    answer and of the top token [pair]. Facts: what the lens reads at the words' ends of the sample text."""

    def measure(batch: PairBatch) -> dict[str, torch.Tensor]:
        targets = torch.stack([batch.answer, batch.wrong], 1)
        reading = lens.logit_lens(model, batch.clean, targets=targets, tuned=tuned)
        return {
            "answer": reading.target_log_probabilities[:, :, 0, 0],
            "wrong": reading.target_log_probabilities[:, :, 0, 1],
            "entropy": reading.entropy[:, :, 0],
            "kl": reading.kl[:, :, 0],
            "answer_depth": lens.answer_depth(reading)[:, 0],
            "settled_depth": lens.settled_depth(reading)[:, 0],
        }

    arrays = _by_family(model, plan, measure, "tuned lens" if tuned else "lens")
    text = left_padded([plan.text], model.pad_token_id)
    ends = [word.end - 1 for word in split_words(model.tokenizer, plan.text)]
    reading = lens.logit_lens(model, text, positions=ends, top_k=1, tuned=tuned)
    top = [[model.tokenizer.decode([token]) for token in row] for row in reading.top_ids[0, :, :, 0].tolist()]
    arrays |= {"text/probability": reading.top_probabilities[0, :, :, 0].numpy(), "text/kl": reading.kl[0].numpy()}
    return Measured({"top": top}, arrays)


def measure_patching(model: HookedModel, plan: Plan, done: dict[str, Measured]) -> Measured:
    """By family, in logits: heads, mlps [pair, layer, ...] by attribution patching; on the reporting pairs, by true runs: top
    [pair, head], the heads that the other half chose. Facts: which heads."""
    arrays = _by_family(model, plan, lambda batch: _estimated(model, batch), "attribution patching")
    chosen = {}
    for family in plan.families:
        choosing, reporting = plan.halves(family)
        heads = chosen[family] = choose_heads(arrays[f"{family}/heads"][choosing], plan)

        def true_runs(batch: PairBatch, heads: list = heads) -> dict[str, torch.Tensor]:
            clean = model.run(batch.clean, read=[f"blocks.{layer}.attn.hook_z" for layer in range(model.n_layers)])
            edits = [ablation.ablate(clean.activations, heads=[head]) for head in heads]
            return {"top": ablation.effects(model, batch.corrupt, batch.difference, edits)}

        arrays |= _over_pairs(model, plan, family, reporting, true_runs, "activation patching")
    return Measured({"top": chosen}, arrays)


def _estimated(model: HookedModel, batch: PairBatch) -> dict[str, torch.Tensor]:
    found = patching.attribute(model, batch, ["head", "mlp_out"])
    heads, mlps = found["head"], found["mlp_out"]
    return {"clean": heads.clean, "corrupt": heads.corrupt, "heads": heads.values, "mlps": mlps.values}


def choose_heads(values: np.ndarray, plan: Plan) -> list[tuple[int, int]]:
    """Those whose mean of ``values`` [pair, layer, head] is largest, either way, in the plan's layers; and its own heads."""
    mean = np.abs(np.nanmean(values, axis=0))
    others = np.setdiff1d(np.arange(len(mean)), plan.chosen_layers(len(mean)))
    mean[others] = -1
    order = np.argsort(-mean, axis=None, kind="stable")[: min(plan.top_k, (mean >= 0).sum())]
    strongest = [(int(layer), int(head)) for layer, head in zip(*np.unravel_index(order, mean.shape), strict=True)]
    return list(dict.fromkeys([*strongest, *plan.heads]))


def measure_residual(model: HookedModel, plan: Plan, done: dict[str, Measured]) -> Measured:
    """By family, on the reporting pairs: residual [pair, layer, region], logits that come back when the stream before the
    layer is the clean prompt's there. True runs, as an estimate along the path of inputs adds up over the embeddings only."""

    def measure(batch: PairBatch) -> dict[str, torch.Tensor]:
        return {"residual": patching.patch(model, batch, "resid_pre", groups=circuit.regions(batch)).values}

    arrays: dict[str, np.ndarray] = {}
    for family in plan.families:
        arrays |= _over_pairs(model, plan, family, plan.halves(family)[1], measure, "residual stream")
    return Measured(arrays=arrays)


def measure_ablation(model: HookedModel, plan: Plan, done: dict[str, Measured]) -> Measured:
    """By family, on the reporting pairs: change of the clean prompt's logit difference without each of the heads chosen
    by patching [pair, head], without all of them [pair], and without as many random heads of the same layers [pair, draw]."""
    arrays = {}
    for family, pairs in plan.families.items():
        choosing, reporting = plan.halves(family)
        reference = left_padded([pairs[index].clean for index in choosing], model.pad_token_id)
        stand_in = ablation.means(model, reference, kinds=["heads"])
        heads = [tuple(head) for head in done["patching"].facts["top"][family]]
        groups = [heads, *_random_groups(model, heads, plan.seed)]
        edits = [ablation.ablate(stand_in, heads=group) for group in [*([head] for head in heads), *groups]]

        def measure(batch: PairBatch, edits: list = edits, n: int = len(heads)) -> dict[str, torch.Tensor]:
            changes = ablation.effects(model, batch.clean, batch.difference, edits)
            return {"single": changes[:, :n], "group": changes[:, n], "random": changes[:, n + 1 :]}

        arrays |= _over_pairs(model, plan, family, reporting, measure, "ablation")
    return Measured(arrays=arrays)


def _random_groups(model: HookedModel, heads: Sequence[tuple[int, int]], seed: int) -> list[list[tuple[int, int]]]:
    """DRAWS groups with as many heads of each layer as ``heads`` has, none of those where the layer has enough others."""
    generator = np.random.default_rng(seed)
    groups = []
    for _ in range(DRAWS):
        group = []
        for layer in sorted({layer for layer, _ in heads}):
            taken = {head for other, head in heads if other == layer}
            free = [head for head in range(model.n_heads) if head not in taken]
            pool = free if len(free) >= len(taken) else list(range(model.n_heads))
            group += [(layer, int(head)) for head in generator.choice(pool, size=len(taken), replace=False)]
        groups.append(group)
    return groups


def measure_neurons(model: HookedModel, plan: Plan, done: dict[str, Measured]) -> Measured:
    """By family: attribution [pair, neuron] on the reporting pairs of the neurons that the other half chose. Facts: where
    those of the first family fire in the other texts, top and random examples."""
    if model.post_norm:
        return Measured({"why_not": "a norm stands behind each MLP, so what one neuron writes is not defined"})
    arrays, chosen = {}, {}
    for family, pairs in plan.families.items():
        choosing, reporting = plan.halves(family)
        batches = [
            batch for _, batch in batched([pairs[index] for index in choosing], plan.batch_size, model.pad_token_id)
        ]
        found = chosen[family] = neurons.choose_by_attribution(
            model, batches, plan.top_k, plan.chosen_layers(model.n_layers)
        )
        arrays |= _over_pairs(
            model, plan, family, reporting,
            lambda batch, found=found: {"attribution": neurons.attribution_of(model, batch, found)}, "neurons",
        )  # fmt: skip
    shown = list(dict.fromkeys(neuron for found in chosen.values() for neuron in found))[: plan.top_k]
    texts = [batch for _, batch in _batches(model, plan.texts, plan)]
    records = neurons.neuron_records(model, texts, shown, k=5, seed=plan.seed)
    examples = [_shown(model, record) for record in records]
    return Measured({"chosen": chosen, "examples": examples}, arrays)


def _shown(model: HookedModel, record: neurons.NeuronRecord) -> dict:
    return {
        "neuron": record.neuron,
        "mean": record.mean,
        "positive": record.positive,
        "examples": [
            {"kind": kind, "words": labels, "values": values}
            for kind in ("top", "random")
            for labels, values in (_words_with_values(model, example) for example in getattr(record, kind))
        ],
    }


def measure_circuit(model: HookedModel, plan: Plan, done: dict[str, Measured]) -> Measured:
    """By family: the graph (facts) and the circuits' logit differences: circuit [pair, size], random [pair, size, draw],
    full, empty [pair]; values [pair, node] and edges [pair, edge] on the choosing pairs."""
    facts, arrays = {}, {}
    for family, pairs in plan.families.items():
        choosing, reporting = ([pairs[index] for index in half] for half in plan.halves(family))
        path = circuit.find_path(
            model, choosing, reporting, drawn=plan.top_k, draws=3, seed=plan.seed, batch_size=plan.batch_size,
            spans=lambda pair: [word.span for word in split_words(model.tokenizer, pair.clean)],
        )  # fmt: skip
        edges = path.edges or {}
        facts[family] = {
            "nodes": [asdict(node) for node in path.nodes],
            "edges": [list(edge) for edge in edges],
            "sizes": list(path.faithfulness.sizes),
        }
        found = {name: getattr(path.faithfulness, name) for name in ("circuit", "random", "full", "empty")}
        found["values"] = path.values
        found["edges"] = torch.stack(list(edges.values()), 1) if edges else torch.zeros(len(choosing), 0)
        arrays |= {f"{family}/{name}": value.numpy() for name, value in found.items()}
    return Measured(facts, arrays)


Task = Callable[[HookedModel, Plan, dict[str, Measured]], Measured]

TASKS: dict[str, Task] = {
    "trust": measure_trust,
    "attention": measure_attention,
    "attribution": measure_attribution,
    "lens": measure_lens,
    "tuned_lens": measure_tuned_lens,
    "residual": measure_residual,
    "patching": measure_patching,
    "ablation": measure_ablation,
    "neurons": measure_neurons,
    "circuit": measure_circuit,
}
REQUIRES = {"ablation": "patching"}


def measure_floor(folder: Path, tasks: Iterable[str], plan: Plan, open_model: Callable[[], HookedModel]) -> Measured:
    """The largest |mean| of any head in models of the same shape with random weights: 'family/task' -> logits; kept in
    ``folder`` like a task."""
    found = read_task(folder, "floor")
    if found is None:
        found = _floor(open_model(), plan, tasks)
        found = write_task(folder, "floor", found)
    return found


def _floor(model: HookedModel, plan: Plan, tasks: Iterable[str]) -> Measured:
    measures = {"attribution": _direct, "patching": _estimated}
    facts: dict[str, float] = {}
    for number in range(plan.random_models):
        twin = random_hooked(model, seed=plan.seed + number)
        for task in measures.keys() & set(tasks):
            arrays = _by_family(twin, plan, partial(measures[task], twin), f"random model {number + 1}: {task}")
            for family in plan.families:
                if f"{family}/heads" in arrays:
                    floor = significance.random_floor([arrays[f"{family}/heads"]])
                    facts[f"{family}/{task}"] = max(facts.get(f"{family}/{task}", 0.0), floor)
    return Measured(facts)


# Shared


def _batches(model: HookedModel, rows: Sequence[Sequence[int]], plan: Plan) -> list[tuple[list[int], Batch]]:
    """Batches of rows of similar length, each with the rows' places in ``rows``."""
    chunks = by_length([len(row) for row in rows], plan.batch_size)
    return [(chunk, left_padded([rows[index] for index in chunk], model.pad_token_id)) for chunk in chunks]


def _by_family(model: HookedModel, plan: Plan, measure: Measure, what: str) -> dict[str, np.ndarray]:
    """'family/key' -> what ``measure`` gives under that key for the family's pairs, [pair, ...]."""
    arrays: dict[str, np.ndarray] = {}
    for family, pairs in plan.families.items():
        arrays |= _over_pairs(model, plan, family, range(len(pairs)), measure, what)
    return arrays


def _over_pairs(
    model: HookedModel, plan: Plan, family: str, indices: Sequence[int], measure: Measure, what: str
) -> dict[str, np.ndarray]:
    """The same for the pairs ``indices`` of one family, in that order."""
    pairs = [plan.families[family][index] for index in indices]
    what = f"{model.name}: {family}: {what}"
    found = over_pairs(pairs, plan.batch_size, model.pad_token_id, lambda rows, batch: measure(batch), what)
    return {f"{family}/{key}": values.float().numpy() for key, values in found.items()}


def _words_with_values(model: HookedModel, example: neurons.Example) -> tuple[list[str], list[float]]:
    """The words around an example, each with the neuron's largest amount in it, signed."""
    words = split_words(model.tokenizer, example.tokens)
    return [word.label for word in words], [max(example.values[word.start : word.end], key=abs) for word in words]
