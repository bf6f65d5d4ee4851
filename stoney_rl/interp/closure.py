"""Which parts of the weights carry what training changed in a behaviour: moved from one checkpoint into the other.

    names = "checkpoints/smollm2-135m", "stoney_lora_merged"
    base, sft = (load_model(find_model(name), torch.float32) for name in names)
    known = answer_log_probability(examples, tokenizer.pad_token_id)        # a behaviour: nats a token of the answer
    one, other = halves(clusters, seed=0)
    found = closure(base, sft, known, one, other, clusters, sizes=(1, 2, 4, 8), draws=10, seed=0)
    found.points[0].parts, found.points[0].recovered                        # (("mlp", 7),) and its share of the gap
    with moved(base, sft, [("mlp", 7)]): known(base, other)                 # base with that part of sft

    # The floor: two seeds of one training differ too; what of their gap do the best parts carry?
    closure(sft_seed_0, sft_seed_1, known, one, other, clusters, sizes=(1, 2, 4, 8), draws=10, seed=0)

1. Parts are the attention and the MLP of each layer, and the rest: embeddings, norms, unembedding.
2. A behaviour is a function of a plain transformers model (no hooks, no adapter) and of numbers of examples, that gives
   one value an example, higher is better. The gap is the later model's mean minus the earlier's.
3. Parts are ranked on one half of the examples by integrated gradients along the straight line between the weights:
   sum of (W' - W) . mean of dm/dW (Sundararajan et al., 1703.01365, with weights for inputs). Over all parts these add
   up to the gap.
4. On the other half the best parts of the later model are moved into the earlier one. Recovered is what the behaviour
   gains, as a share of the gap, beside random sets of as many attentions and MLPs. The reverse: what the later model
   loses when these parts are set back; with it, parts that others can stand in for are told from those that are needed.
   Moving parts of weights between checkpoints: Panigrahi et al., 2302.06600 (grafting).

Parts act together: shares of single parts need not add up to 1. Identical checkpoints have a gap of exactly 0.
"""

import contextlib
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from stoney_rl import checkpoints
from stoney_rl.errors import StoneyError
from stoney_rl.interp.hooked import Batch, by_length, left_padded
from stoney_rl.interp.pairs import PromptPair, batched
from stoney_rl.interp.patching import mean_gap
from stoney_rl.metrics.intervals import Interval, statistic_interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Points on the path between two checkpoints. Where every matrix of SmolLM2 changes by 10 % of its norm, 2 or 3 points
# miss 0.1 % of the gap, as does the midpoint rule with 12; by 2 %, still less. ``completeness`` tells if it takes more.
STEPS = 3
ROWS_PER_GRADIENT = 4  # the gradient of all weights takes twice as long a row with one row at a time

Part = tuple[str, int | None]  # ("attention", layer), ("mlp", layer), or REST
REST: Part = ("rest", None)
_KINDS = {"self_attn": "attention", "attn": "attention", "attention": "attention", "mlp": "mlp"}
BLOCK = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.(\w+)\.")

# (model, numbers of examples) -> their values, float32 [example], with a gradient where gradients are on.
Behaviour = Callable[["PreTrainedModel", Sequence[int]], torch.Tensor]


# Parts, and moving them


def parts_of(model: "PreTrainedModel") -> dict[Part, list[str]]:
    """The parts in the order of layers, REST last, each with the names of its parameters.

    Raises ``StoneyError`` for an architecture whose attentions and MLPs have names that are not known here.
    """
    found: dict[Part, list[str]] = {}
    for name, _ in model.named_parameters():
        found.setdefault(part_of(name), []).append(name)
    layers = {kind: [layer for other, layer in found if other == kind] for kind in ("attention", "mlp")}
    if not layers["attention"] or set(layers["attention"]) != set(layers["mlp"]):
        raise StoneyError(f"{type(model).__name__}: which weights are attentions and which MLPs is not known")
    return {part: found[part] for part in sorted(found, key=lambda part: (part == REST, part[1] or 0, part[0]))}


def part_of(name: str) -> Part:
    block = BLOCK.search(name)
    return (_KINDS[block[2]], int(block[1])) if block and block[2] in _KINDS else REST


@contextlib.contextmanager
def moved(earlier: "PreTrainedModel", later: "PreTrainedModel", parts: Iterable[Part]) -> Iterator["PreTrainedModel"]:
    """``earlier`` with the weights of ``parts`` taken from ``later``, until the block is left, by whatever way.

    Its parameters point to the later model's tensors meanwhile: no copy is made, and afterwards they are the very
    tensors that they were. Raises ``StoneyError`` as ``weight_changes``, and for a part that the model lacks.
    """
    weights, names = matching(earlier, later), parts_of(earlier)
    parts = list(parts)
    if unknown := [part for part in parts if part not in names]:
        raise StoneyError(f"no part is called {unknown[0]}; expected such as {next(iter(names))} or {REST}")
    with _weights(earlier, {name: weights[name][1] for part in parts for name in names[part]}):
        yield earlier


@contextlib.contextmanager
def _weights(model: "PreTrainedModel", tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.nn.Parameter]]:
    """The parameters named in ``tensors``, which hold these tensors until the block is left."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in tensors}
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = tensors[name]
        yield parameters
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


def matching(earlier: "PreTrainedModel", later: "PreTrainedModel") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each parameter of both models, detached; refuses models that can't be compared weight by weight."""
    for which, model in (("earlier", earlier), ("later", later)):
        _refuse_unfit(model, which)
    a, b = (dict(model.named_parameters()) for model in (earlier, later))
    if different := sorted(a.keys() ^ b.keys()):
        raise StoneyError(
            f"the models are not of one architecture: only the {'earlier' if different[0] in a else 'later'} one has "
            f"{different[0]} (one of them may have untied its embeddings)"
        )
    for name, weight in a.items():
        one, other = ((tuple(w.shape), w.dtype, w.device) for w in (weight, b[name]))
        if one != other:
            raise StoneyError(
                f"{name}: {_described(*one)} earlier, {_described(*other)} later; expected the same of both"
            )
    return {name: (weight.detach(), b[name].detach()) for name, weight in a.items()}


def _described(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    return f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} on {device}"


def _refuse_unfit(model: "PreTrainedModel", which: str) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise StoneyError(f"the {which} model has an adapter that is not merged: give model.merge_and_unload()")
    if model.training:
        raise StoneyError(f"the {which} model is in training mode, where dropout is at work: call model.eval()")
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise StoneyError(f"the {which} model's weights are quantised: load it in bf16 or fp32")


# Behaviours


def answer_log_probability(
    examples: Sequence[tuple[Sequence[int], Sequence[int]]],
    pad_token_id: int,
    *,
    lengths: Sequence[float] | None = None,
    batch_size: int = 16,
) -> Behaviour:
    """Log-probability of each example's answer, teacher-forced, in nats a token of it, or a unit of ``lengths``.

    ``examples``: (token ids, labels) as ``prompts.encode_example`` gives them: labels -100 on the prompt. ``lengths``:
    one an example, such as the bytes of its answer. Raises ``StoneyError`` for an example without answer or prompt.
    """
    for place, (ids, labels) in enumerate(examples):
        if len(ids) != len(labels) or not labels or labels[0] != -100 or labels[-1] == -100:
            raise StoneyError(f"example {place}: expected a prompt, labelled -100, then an answer of one token or more")
    counts = [sum(label != -100 for label in labels) for _, labels in examples] if lengths is None else lengths
    if len(counts) != len(examples) or not all(count > 0 for count in counts):
        raise StoneyError(f"lengths: {len(counts)} for {len(examples)} examples; expected one above 0 for each")

    def behaviour(model: "PreTrainedModel", rows: Sequence[int]) -> torch.Tensor:
        values: list[torch.Tensor | None] = [None] * len(rows)
        for places in by_length([len(examples[row][0]) for row in rows], batch_size):
            ids, labels = zip(*(examples[rows[place]] for place in places), strict=True)
            targets = left_padded(labels, -100).ids.to(model.device)
            first = int((targets != -100).any(0).nonzero()[0])
            targets = targets[:, first:]
            logits = _last_logits(model, left_padded(ids, pad_token_id), targets.shape[1] + 1)[:, :-1]
            in_answer = targets != -100
            found = torch.zeros(targets.shape, device=model.device).masked_scatter(
                in_answer,
                -torch.nn.functional.cross_entropy(logits[in_answer].float(), targets[in_answer], reduction="none"),
            )
            for place, total in zip(places, found.sum(1), strict=True):
                values[place] = total / counts[rows[place]]
        return torch.stack(values)

    return behaviour


def pair_difference(pairs: Sequence[PromptPair], pad_token_id: int, *, batch_size: int = 16) -> Behaviour:
    """logit[answer] - logit[wrong] behind each pair's clean prompt, logits."""

    def behaviour(model: "PreTrainedModel", rows: Sequence[int]) -> torch.Tensor:
        values: list[torch.Tensor | None] = [None] * len(rows)
        for places, batch in batched([pairs[row] for row in rows], batch_size, pad_token_id):
            for place, value in zip(places, batch.difference(_last_logits(model, batch.clean, 1)), strict=True):
                values[place] = value
        return torch.stack(values)

    return behaviour


def _last_logits(model: "PreTrainedModel", batch: Batch, keep: int) -> torch.Tensor:
    """Logits at the last ``keep`` positions, [row, position, vocabulary]; the others are not computed if possible."""
    batch = batch.to(model.device)
    few = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, **few).logits[:, -keep:]


# Causal closure


@dataclass(frozen=True)
class Attribution:
    """``values`` [example, part]: what a part's change of weights gives the behaviour; ``gap`` [example]: later minus
    earlier. Both float64, in the behaviour's unit."""

    parts: tuple[Part, ...]
    values: np.ndarray
    gap: np.ndarray

    @property
    def completeness(self) -> float | None:
        """Sum of all values over sum of the gaps: 1 for an exact integral. None without a gap."""
        return float(self.values.sum() / self.gap.sum()) if self.gap.sum() else None


def weight_attribution(
    earlier: "PreTrainedModel",
    later: "PreTrainedModel",
    behaviour: Behaviour,
    rows: Sequence[int],
    *,
    steps: int = STEPS,
    rows_per_gradient: int = 1,
) -> Attribution:
    """Integrated gradients of the examples ``rows`` along the straight line of weights, summed over each part.

    Gauss-Legendre with ``steps`` points, a forward and backward pass an example at each. ``rows_per_gradient``:
    examples that share a pass; each then has the mean of its group. Needs room for another copy of the weights that
    changed, and one of gradients. Raises ``StoneyError`` as ``weight_changes``, for values that are not finite, and for
    a behaviour without gradients.
    """
    weights, parts = matching(earlier, later), parts_of(earlier)
    changed = {name: pair for name, pair in weights.items() if not torch.equal(*pair)}
    place_of = {name: place for place, part in enumerate(parts) for name in parts[part]}
    values = np.zeros((len(rows), len(parts)))
    gap = _measured(later, behaviour, rows) - _measured(earlier, behaviour, rows)
    points, shares = np.polynomial.legendre.leggauss(steps)
    for point, share in zip((points + 1) / 2, shares / 2, strict=True) if changed else ():
        between = {name: torch.lerp(*pair, float(point)) for name, pair in changed.items()}
        with _weights(earlier, between) as leaves, _gradients_for(earlier, leaves), torch.enable_grad():
            for start in range(0, len(rows), rows_per_gradient):
                group = slice(start, start + rows_per_gradient)
                total = behaviour(earlier, rows[group]).sum()
                if not total.requires_grad:
                    raise StoneyError("the behaviour gives no gradient; it must not turn gradients off itself")
                gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
                for name, gradient in zip(leaves, gradients, strict=True):
                    if gradient is not None:
                        before, after = changed[name]
                        product = float(((after - before) * gradient).sum())
                        values[group, place_of[name]] += share * product / len(rows[group])
    return Attribution(tuple(parts), values, gap)


@contextlib.contextmanager
def _gradients_for(model: "PreTrainedModel", leaves: Mapping[str, torch.nn.Parameter]) -> Iterator[None]:
    """Only ``leaves`` get gradients; afterwards the parameters require them as before."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in leaves)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def _measured(model: "PreTrainedModel", behaviour: Behaviour, rows: Sequence[int]) -> np.ndarray:
    """Float64 [example], without gradients. Refuses values that are no numbers."""
    # Even without gradients torch chooses another order of sums for weights that require them.
    with torch.no_grad(), _gradients_for(model, {}):
        values = behaviour(model, rows).double().cpu().numpy()
    if values.shape != (len(rows),) or not np.isfinite(values).all():
        raise StoneyError(
            f"the behaviour of {len(rows)} examples must be as many finite numbers, got shape {values.shape}"
        )
    return values


@dataclass(frozen=True)
class Point:
    """The behaviour with the ``parts`` that were chosen, in the order of their attribution, and with random ones.

    ``moved`` [example], ``random_moved`` [draw, example]: of the earlier model with the later's parts; ``removed``
    [example], ``random_removed`` [reverse draw, example]: of the later model with the earlier's parts. ``recovered``,
    ``lost``: the share of the gap that moving them gives and removing them takes, with intervals by cluster;
    ``random_recovered`` [draw], ``random_lost``: of each random set. ``beyond``: ``recovered`` minus the mean of the
    random sets. ``p``: (1 + random sets that recover as much) / (1 + draws). ``beyond`` and ``p`` are None where no
    other set can be drawn.
    """

    parts: tuple[Part, ...]
    moved: np.ndarray
    random_moved: np.ndarray
    removed: np.ndarray
    random_removed: np.ndarray
    recovered: Interval
    random_recovered: np.ndarray
    lost: Interval
    random_lost: np.ndarray
    beyond: Interval | None
    p: float | None


@dataclass(frozen=True)
class Closure:
    """``earlier``, ``later``: the behaviour [example] of the reporting examples; ``gap``: mean of later minus earlier,
    and whether there is one to recover: None where it isn't beyond twice its standard error over clusters, and then
    there are no points and ``note`` says so. ``attribution``: of the choosing examples, grouped ``ROWS_PER_GRADIENT``
    at a time. ``ranking``: all parts, those that move the behaviour most towards the later model first."""

    earlier: np.ndarray
    later: np.ndarray
    gap: float | None
    attribution: Attribution
    ranking: tuple[Part, ...]
    points: tuple[Point, ...]
    seed: int
    note: str = ""


def closure(
    earlier: "PreTrainedModel",
    later: "PreTrainedModel",
    behaviour: Behaviour,
    choosing: Sequence[int],
    reporting: Sequence[int],
    clusters: Sequence[Hashable],
    *,
    sizes: Sequence[int],
    draws: int,
    seed: int,
    reverse_draws: int = 0,
    steps: int = STEPS,
) -> Closure:
    """How much of what training changed in the behaviour the best parts of each of ``sizes`` carry; see the module.

    ``choosing``, ``reporting``: numbers of examples, without one in common (``significance.halves`` keeps clusters
    apart); ``clusters``: a label for each example that there is. A size costs 2 + ``draws`` + ``reverse_draws`` passes
    over the reporting examples; equal sets are run once. Raises ``StoneyError`` as ``weight_attribution``, for a size
    that is not from 1 to the number of parts, and examples that are in both halves.
    """
    from tqdm import tqdm

    choosing, reporting = [int(row) for row in choosing], [int(row) for row in reporting]
    parts = list(parts_of(earlier))
    _check_whole(earlier, later, parts)
    if both := {clusters[row] for row in choosing} & {clusters[row] for row in reporting}:
        raise StoneyError(
            f"closure: {len(both)} clusters are in both halves, such as {next(iter(both))!r}; part them first"
        )
    if wrong := [size for size in sizes if not 1 <= size <= len(parts)]:
        raise StoneyError(f"closure: size {wrong[0]}, expected from 1 to {len(parts)}, the number of parts")
    attribution = weight_attribution(
        earlier, later, behaviour, choosing, steps=steps, rows_per_gradient=ROWS_PER_GRADIENT
    )
    own, target = (_measured(model, behaviour, reporting) for model in (earlier, later))
    labels = [clusters[row] for row in reporting]
    gap = _gap(own, target, labels)
    towards = np.sign(attribution.gap.sum()) * attribution.values.sum(axis=0)
    order = np.argsort(-towards, kind="stable")
    ranking = tuple(attribution.parts[place] for place in order)
    if gap is None:
        note = f"the behaviour differs by {(target - own).mean():.3g} on average, not beyond twice the standard error"
        return Closure(own, target, None, attribution, ranking, (), seed, note)
    rng = np.random.default_rng(seed)
    chosen = [ranking[:size] for size in sizes]
    drawn = [[_random_set(parts, best, rng) for _ in range(max(draws, reverse_draws))] for best in chosen]
    to_move = {frozenset(one) for best, others in zip(chosen, drawn, strict=True) for one in [best, *others[:draws]]}
    to_remove = {
        frozenset(one) for best, others in zip(chosen, drawn, strict=True) for one in [best, *others[:reverse_draws]]
    }
    with tqdm(total=len(to_move) + len(to_remove), desc="closure", unit="set", delay=2) as bar:
        moving = _with_parts(earlier, later, behaviour, reporting, to_move, bar)
        removing = _with_parts(later, earlier, behaviour, reporting, to_remove, bar)

    def point(best: tuple[Part, ...], others: list[tuple[Part, ...]]) -> Point:
        gain = moving[frozenset(best)] - own
        loss = target - removing[frozenset(best)]
        random_moved = np.array([moving[frozenset(other)] for other in others[:draws]]).reshape(-1, len(own))
        random_removed = np.array([removing[frozenset(other)] for other in others[:reverse_draws]]).reshape(
            -1, len(own)
        )
        recovered = _share(gain, target - own, labels, seed)
        random_recovered = (random_moved - own).mean(axis=1) / (target - own).mean()
        comparable = len(random_moved) and _sets_like(parts, best) > 1
        return Point(
            parts=best,
            moved=moving[frozenset(best)],
            random_moved=random_moved,
            removed=removing[frozenset(best)],
            random_removed=random_removed,
            recovered=recovered,
            random_recovered=random_recovered,
            lost=_share(loss, target - own, labels, seed),
            random_lost=(target - random_removed).mean(axis=1) / (target - own).mean(),
            beyond=_share(gain - (random_moved - own).mean(0), target - own, labels, seed) if comparable else None,
            p=float(1 + (random_recovered >= recovered.value).sum()) / (1 + draws) if comparable else None,
        )

    points = tuple(map(point, chosen, drawn))
    return Closure(own, target, gap, attribution, ranking, points, seed)


def _check_whole(earlier: "PreTrainedModel", later: "PreTrainedModel", parts: Sequence[Part]) -> None:
    """With all parts moved the earlier model must be the later one; not so with another config (rotary base, ...)."""
    expected = checkpoints.probe_logits(later)
    with moved(earlier, later, parts):
        difference = float((checkpoints.probe_logits(earlier) - expected).abs().max())
    if not difference <= 1e-4 * max(1.0, float(expected.abs().max())):
        raise StoneyError(
            f"with all weights of the later model the earlier one gives logits that differ by {difference:.3g}: "
            "compare their config.json, and how they were opened"
        )


def _gap(earlier: np.ndarray, later: np.ndarray, clusters: Sequence[Hashable]) -> float | None:
    """Mean of later - earlier, of either sign; None if it isn't beyond twice its standard error over clusters."""
    names = {label: place for place, label in enumerate(dict.fromkeys(clusters))}
    totals = np.zeros((2, len(names)))
    for total, values in zip(totals, (earlier, later), strict=True):
        np.add.at(total, [names[label] for label in clusters], values * len(names) / len(values))
    before, after = torch.from_numpy(totals)
    gap, fall = mean_gap(after, before), mean_gap(before, after)
    return gap if fall is None else -fall


def _share(part: np.ndarray, whole: np.ndarray, clusters: Sequence[Hashable], seed: int) -> Interval:
    """Sum of ``part`` over sum of ``whole``, both [example]."""
    return statistic_interval(
        np.stack([part, whole], axis=1), lambda sums: sums[..., 0] / sums[..., 1], seed=seed, clusters=clusters
    )


def _with_parts(
    model: "PreTrainedModel",
    source: "PreTrainedModel",
    behaviour: Behaviour,
    rows: Sequence[int],
    sets: Iterable[frozenset[Part]],
    bar,
) -> dict[frozenset[Part], np.ndarray]:
    found = {}
    for parts in sets:
        with moved(model, source, parts):
            found[parts] = _measured(model, behaviour, rows)
        bar.update()
    return found


def _random_set(parts: Sequence[Part], like: Sequence[Part], rng: np.random.Generator) -> tuple[Part, ...]:
    """As many of each kind as in ``like``."""
    drawn: list[Part] = []
    for kind, count in Counter(kind for kind, _ in like).items():
        members = [part for part in parts if part[0] == kind]
        drawn += [members[place] for place in rng.choice(len(members), count, replace=False)]
    return tuple(drawn)


def _sets_like(parts: Sequence[Part], like: Sequence[Part]) -> int:
    """How many sets ``_random_set`` can draw."""
    there = Counter(kind for kind, _ in parts)
    return math.prod(math.comb(there[kind], count) for kind, count in Counter(kind for kind, _ in like).items())
