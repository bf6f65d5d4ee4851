"""What is measured to compare families of prompts within a model, and one checkpoint with the next.

    plan = make_plan(pools, scores, texts, FULL, batch_size=16, seed=0)
    found = analysis.measure_model(folder / "sft", tasks_of(plan, is_main=True), plan, open_sft, table=TASKS)
    change = measure_change(folder / "base-sft", plan, open_plain, open_hooked, "base", "sft")     # names of models

Of each model, in this order: decision (when.py), localise (localise.py, on one half of the couples), copying and spans
(where.py), guesses, cost and assembly (when.py), and of the model that is asked about also knock-outs, true patching (on the other
half) and the tuned lens. Of two checkpoints, the earlier and the later: weights, representations, the mean difference (changes.py), and closure.

Numbers of every example go to disk task by task (analysis.py): a comparison that was stopped goes on where it was.
"""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp import changes, closure, localise, significance, tasks, tuned_lens, when, where
from stoney_rl.interp.analysis import Measured, kept
from stoney_rl.interp.hooked import Batch, HookedModel, by_length, left_padded
from stoney_rl.interp.localise import COMPONENTS, NEURONS, PartSet
from stoney_rl.interp.pairs import PromptPair
from stoney_rl.interp.tasks import ALIGNED, CONTROLS, FAMILIES, Family, listed_facts

NOT_LOCALISED = ("lexicon_shuffled",)  # its prompts are the lexicon's: what it is for is the accuracy
FEWEST = 8  # couples: four in each half, which overlap parts in two again
KINDS = {"components": COMPONENTS, "neurons": NEURONS}
FLOOR_COUPLES = 12
FLOOR_TASKS = ("decision", "localise")
CLOSURE_SIZES, CLOSURE_DRAWS = (1, 4), 4


@dataclass(frozen=True)
class Settings:
    """How much is measured. ``couples`` a family; of the choosing half at most ``localised`` couples are attributed, of the
    reporting half at most ``reported`` are knocked out; ``draws`` random sets beside each set, each in ``few`` pairs of each family;
    ``patched`` single parts in earnest; ``words`` whose assembly is probed; ``closed`` examples, half to choose parts on; ``texts`` for representations; tasks that are ``left_out``."""

    couples: int = 100
    localised: int = 16
    reported: int = 16
    draws: int = 100
    few: int = 4
    patched: int = 5
    words: int = 120
    closed: int = 24
    texts: int = 64
    left_out: tuple[str, ...] = ()


FULL = Settings()
QUICK = Settings(
    couples=20, localised=10, reported=10, draws=10, few=1, closed=20, texts=24,
    left_out=("guesses", "cost", "assembly", "knockout_neurons", "patching", "tuned"),
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What all models are asked. ``families``, of which ``reference`` is the one that others are matched to. ``texts``: token ids of other texts
    (held-out rows, or none), with a cluster for each; ``examples``: the same as (ids, labels), to score answers."""

    families: dict[str, Family]
    reference: str
    texts: list[list[int]]
    text_clusters: list[str]
    examples: list[tuple[list[int], list[int]]]
    settings: Settings = FULL
    batch_size: int = 16
    seed: int = 0

    @property
    def localised(self) -> list[str]:
        return [name for name in self.families if name not in NOT_LOCALISED]

    def choosing(self, family: str) -> list[PromptPair]:
        """The couples that parts are chosen on, at most ``settings.localised`` of one half."""
        return self._half(family, 0, self.settings.localised)

    def reporting(self, family: str) -> list[PromptPair]:
        """The couples that they are reported on, at most ``settings.reported`` of the other half."""
        return self._half(family, 1, self.settings.reported)

    def _half(self, family: str, which: int, couples: int) -> list[PromptPair]:
        found = self.families[family]
        rows = significance.halves(found.clusters, self.seed)[which]
        wanted = list(dict.fromkeys(found.clusters[row] for row in rows))[:couples]
        return [pair for pair in found.pairs if pair.cluster in set(wanted)]

    def without_controls(self) -> "Plan":
        """For the models that the main one is compared with: controls are about families, not about checkpoints."""
        kept = {name: family for name, family in self.families.items() if name not in CONTROLS}
        return replace(self, families=kept)

    def only(self, couples: int) -> "Plan":
        """So many couples of each family without controls, for a model whose figures serve as a floor."""
        kept = self.without_controls()
        families = {
            name: family.couples(range(min(couples, len(family.pairs) // 2))) for name, family in kept.families.items()
        }
        return replace(kept, families=families, settings=replace(self.settings, localised=couples))


def score_pools(model: HookedModel, pools: Mapping[str, Family], batch_size: int) -> Measured:
    """``tasks.score`` of every pair of every pool, <family>/<score> [pair]."""
    return Measured(
        arrays={
            f"{name}/{key}": values
            for name, pool in pools.items()
            for key, values in tasks.score(model, pool.pairs, batch_size=batch_size).items()
        }
    )


def make_plan(
    pools: Mapping[str, Family],
    scores: Measured,
    texts: tuple[list, list, list],
    settings: Settings,
    batch_size: int,
    seed: int,
) -> Plan:
    """The couples that fit each other, by what the main model says to all of them; families of a user's own as they are."""
    reference = "lexicon" if "lexicon" in pools else next(iter(pools))
    built = {name: pool for name, pool in pools.items() if name in (*FAMILIES, *CONTROLS)} or dict(pools)
    chosen = tasks.match(
        built, {name: scores.of(name) for name in built}, couples=settings.couples, reference=reference
    )
    families = {
        name: pool.couples(chosen.get(name, range(min(settings.couples, len(pool.pairs) // 2))))
        for name, pool in pools.items()
    }
    check_sizes(families)
    ids, examples, clusters = texts
    return Plan(families, reference, ids, clusters, examples, settings, batch_size, seed)


def check_sizes(families: Mapping[str, Family]) -> None:
    """Raise ``StoneyError`` for a family with too few couples."""
    for name, family in families.items():
        if len(set(family.clusters)) < FEWEST:
            raise StoneyError(
                f"{name}: couples of {len(set(family.clusters))} clusters; {FEWEST} at least are needed, to choose parts on one half and report on the other"
            )


def check_chosen(folder: Path, plan: Plan) -> None:
    """Raise ``StoneyError`` if what ``folder`` holds was measured on other couples of the same pools: by another version of this
    code."""
    chosen = Measured({"sha256": sha256(plan.families, ())})
    if kept(folder, "couples", lambda: chosen).facts != chosen.facts:
        raise StoneyError(f"{folder}: measured by another version, which chose other couples; --overwrite starts again")


def balance_of(plan: Plan, pools: Mapping[str, Family], scores: Measured) -> list[dict]:
    """``tasks.balance`` of the chosen couples, by the main model's scores."""
    own = {}
    for name, family in plan.families.items():
        place = {pair: row for row, pair in enumerate(pools[name].pairs)}
        rows = [place[pair] for pair in family.pairs]
        own[name] = {key: values[rows] for key, values in scores.of(name).items()}
    return tasks.balance(plan.families, own, reference=plan.reference)


def sha256(pools: Mapping[str, Family], texts: Sequence[Sequence[int]]) -> str:
    """Of everything that may be asked: two comparisons with the same one can be compared."""
    asked = [
        {name: [[pair.clean, pair.answer, pair.wrong] for pair in pool.pairs] for name, pool in pools.items()},
        list(texts),
    ]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


# One model


def measure_decision(model: HookedModel, plan: Plan, done: dict[str, Measured]) -> Measured:
    """Of each family and pair: answer, wrong (log-probabilities), entropy [pair, layer + 1], is_top, answer_depth, settled_depth [pair]."""
    return Measured(
        arrays=_decisions(model, plan, {name: family.pairs for name, family in plan.families.items()}, None)
    )


def _decisions(
    model: HookedModel,
    plan: Plan,
    asked: Mapping[str, Sequence[PromptPair]],
    tuned: tuned_lens.TunedLens | None,
) -> dict[str, np.ndarray]:
    arrays = {}
    for name, pairs in asked.items():
        found = when.decision(model, pairs, batch_size=plan.batch_size, tuned=tuned)
        arrays |= {f"{name}/{key}": getattr(found, key).numpy() for key in found.__dataclass_fields__}
    return arrays


def measure_localise(model: HookedModel, plan: Plan, done: dict[str, Measured]) -> Measured:
    """Of each family, on the choosing half: heads [couple, layer, head], mlps [couple, layer], neurons [couple, layer, neuron]
    (float16), logits; a couple's two pairs have the same."""
    arrays = {}
    for name in plan.localised:
        found = localise.attribute_parts(model, plan.choosing(name)[::2], batch_size=plan.batch_size)
        arrays |= {f"{name}/{kind}": values.numpy() for kind, values in found.items()}
        arrays[f"{name}/neurons"] = arrays[f"{name}/neurons"].astype(np.float16)
    return Measured(arrays=arrays)


def sets_of(measured: Measured, names: Sequence[str], kind: str, without: PartSet | None = None) -> dict[str, PartSet]:
    """Each family's strongest parts, from what ``measure_localise`` gave."""
    return {name: localise.strongest(values_of(measured, name), KINDS[kind], without=without) for name in names}


def values_of(measured: Measured, family: str) -> dict[str, torch.Tensor]:
    return {
        kind: torch.from_numpy(measured.arrays[f"{family}/{kind}"].astype(np.float32))
        for kind in (*COMPONENTS, *NEURONS)
    }


def measure_knockout(model: HookedModel, plan: Plan, done: dict[str, Measured]) -> Measured:
    """Controls that have the lexicon's own prompts are left out."""
    return _knocked_out(model, plan, done, "components", knocked_out(plan, "knockout"))


def measure_knockout_neurons(model: HookedModel, plan: Plan, done: dict[str, Measured]) -> Measured:
    """Controls are left out, as heads and MLPs are asked about them."""
    return _knocked_out(model, plan, done, "neurons", knocked_out(plan, "knockout_neurons"))


def _knocked_out(
    model: HookedModel, plan: Plan, done: dict[str, Measured], kind: str, names: Sequence[str]
) -> Measured:
    """own/<A>/<B> [pair of B], random/<A>/<B> [set, pair], clean/<B>, corrupt/<B> [pair]; facts: the sets."""
    reporting = {name: plan.reporting(name) for name in names}
    everyones = localise.common(sets_of(done["localise"], names, kind).values())
    sets = sets_of(done["localise"], names, kind, without=everyones)
    stand_in = localise.stand_in(model, {name: plan.choosing(name) for name in names}, batch_size=plan.batch_size)
    losses = localise.matrix(
        model, reporting, sets, stand_in, without=everyones,
        draws=plan.settings.draws, few=plan.settings.few, batch_size=plan.batch_size, seed=plan.seed,
    )  # fmt: skip
    arrays = {f"clean/{name}": losses.clean[name].numpy() for name in names}
    arrays |= {f"corrupt/{name}": losses.corrupt[name].numpy() for name in names}
    for which, table in (("own", losses.own), ("random", losses.random)):
        arrays |= {f"{which}/{a}/{b}": table[a][b].numpy() for a in names for b in names}
    facts = {name: [list(part) for part in parts] for name, parts in sets.items()}
    return Measured({"sets": facts, "common": [list(part) for part in everyones]}, arrays)


def losses_of(measured: Measured, plan: Plan) -> localise.Losses:
    """``localise.Losses`` again, from what is on disk; without the random sets themselves."""
    sets, arrays = measured.facts["sets"], measured.arrays
    tables = {
        which: {a: {b: torch.from_numpy(arrays[f"{which}/{a}/{b}"]) for b in sets} for a in sets}
        for which in ("own", "random")
    }
    return localise.Losses(
        tables["own"],
        tables["random"],
        {},
        {name: torch.from_numpy(arrays[f"clean/{name}"]) for name in sets},
        {name: torch.from_numpy(arrays[f"corrupt/{name}"]) for name in sets},
        {name: [pair.cluster for pair in plan.reporting(name)] for name in sets},
        {name: localise.part_set(tuple(part) for part in parts) for name, parts in sets.items()},
        {},
    )


def measure_patching(model: HookedModel, plan: Plan, done: dict[str, Measured]) -> Measured:
    """Of each family's strongest heads and MLPs, on the first of each reporting couple: the true effect [couple, part] and its estimate on
    the choosing half [couple, part]; logits. Facts: which parts."""
    arrays, chosen = {}, {}
    for name in plan.localised:
        values = values_of(done["localise"], name)
        share = plan.settings.patched / (model.n_layers * (model.n_heads + 1))
        parts = localise.strongest(values, COMPONENTS, min(1.0, share))
        truth = localise.true_patching(model, plan.reporting(name)[::2], parts, batch_size=plan.batch_size)
        arrays |= {f"{name}/true": truth.numpy(), f"{name}/estimate": localise.of_parts(values, parts).numpy()}
        chosen[name] = [list(part) for part in parts]
    return Measured({"parts": chosen}, arrays)


def measure_copying(model: HookedModel, plan: Plan, done: dict[str, Measured]) -> Measured:
    """On the reporting half: difference [pair, layer, head, route] (where.py), and where the last position looks: distance, sink, entropy
    [pair, layer, head]. Facts: pairs behind each route."""
    arrays, facts = {}, {}
    for name in plan.localised:
        pairs = plan.reporting(name)
        found = where.copying(model, pairs, batch_size=plan.batch_size)
        arrays[f"{name}/copying"], facts[name] = found.difference.numpy(), found.measured
        spans = where.attention_span(model, pairs, batch_size=plan.batch_size)
        arrays |= {f"{name}/{key}": spans[f"last_{key}"].numpy() for key in where.SPANS}
    return Measured({"measured": facts}, arrays)


def measure_guesses(model: HookedModel, plan: Plan, done: dict[str, Measured]) -> Measured:
    return _guessed(model, plan, None)


def _guessed(model: HookedModel, plan: Plan, tuned: tuned_lens.TunedLens | None) -> Measured:
    """Of families whose answers are words: probability [pair, layer + 1, 4], kinds [pair, layer + 1, 3] (when.guesses), on the reporting half. Facts: chance."""
    arrays, facts = {}, {}
    for name in plan.localised:
        known = dict(zip(plan.families[name].pairs, plan.families[name].meanings, strict=True))
        pairs = plan.reporting(name)
        if not any(known[pair] for pair in pairs):
            continue
        meanings = [when.first_tokens(model.tokenizer, [known[pair]]) if known[pair] else () for pair in pairs]
        forms = sorted({pair.texts[2].strip() for pair in plan.families[name].pairs})
        found = when.guesses(model, pairs, meanings, forms, seed=plan.seed, batch_size=plan.batch_size, tuned=tuned)
        arrays |= {f"{name}/probability": found.probability.numpy(), f"{name}/kinds": found.kinds.numpy()}
        facts[name] = {"chance": found.chance.tolist(), "not_measured": found.not_measured}
    return Measured(facts, arrays)


def measure_cost(model: HookedModel, plan: Plan, done: dict[str, Measured]) -> Measured:
    """Of each family, on the reporting half: nats and bytes of the whole answer [pair]."""
    arrays = {}
    for name in plan.families:
        found = when.cost(model, plan.reporting(name), batch_size=plan.batch_size)
        arrays |= {f"{name}/nats": found.nats.numpy(), f"{name}/bytes": found.bytes.numpy()}
    return Measured(arrays=arrays)


def measure_assembly(model: HookedModel, plan: Plan, done: dict[str, Measured]) -> Measured:
    """Of the families with words of several tokens: correct, control [word, layer, place] (when.word_assembly). Facts: layers, clusters, left out."""
    arrays, facts = {}, {}
    words = {
        name: [pair.texts[2].strip() for pair in plan.families[name].pairs]
        for name in ("lexicon", "french")
        if name in plan.families
    }
    if "french" in words:
        words["french"] = [fact.value for fact in listed_facts("french")]
    for name, forms in words.items():
        forms = list(dict.fromkeys(forms))
        doubles = [
            when.scrambled_before_end(model.tokenizer, form, random.Random(f"{form} {plan.seed}")) for form in forms
        ]
        fit = [
            place
            for place, (form, double) in enumerate(zip(forms, doubles, strict=True))
            if double and _long(model, form)
        ]
        fit = fit[: plan.settings.words]
        if len(fit) < 2 * significance.MIN_UNITS:
            facts[name] = {"why_not": f"{len(fit)} words of three tokens or more with a double"}
            continue
        layers = [*range(0, model.n_layers, max(1, model.n_layers // 10)), model.n_layers]
        found = when.word_assembly(
            model, [forms[place] for place in fit], [doubles[place] for place in fit], layers=layers, seed=plan.seed
        )
        arrays |= {f"{name}/correct": found.correct, f"{name}/control": found.control_correct}
        facts[name] = {
            "layers": found.layers,
            "clusters": [str(one) for one in found.clusters],
            "left_out": found.left_out,
        }
    return Measured(facts, arrays)


def _long(model: HookedModel, form: str) -> bool:
    return len(model.tokenizer(f" {form}", add_special_tokens=False)["input_ids"]) >= 3


def measure_tuned(model: HookedModel, plan: Plan, done: dict[str, Measured]) -> Measured:
    """decision and guesses again, on the reporting half, with a tuned lens fitted to half of the texts. Facts: how well it fits the other half."""
    half = len(plan.texts) // 2
    train, held_out = (_batches(model, texts, plan.batch_size) for texts in (plan.texts[half:], plan.texts[:half]))
    tuned = tuned_lens.fit_tuned_lens(model, train, held_out, steps=100, tokens=2048, seed=plan.seed)
    guessed = _guessed(model, plan, tuned)
    fit = {
        "plain_kl": tuned.fit.plain_kl,
        "tuned_kl": tuned.fit.tuned_kl,
        "tokens": tuned.fit.tokens,
        "held_out_tokens": tuned.fit.held_out_tokens,
    }
    return Measured(
        guessed.facts | {"fit": fit},
        guessed.arrays | _decisions(model, plan, {name: plan.reporting(name) for name in plan.localised}, tuned),
    )


def _batches(model: HookedModel, texts: Sequence[Sequence[int]], size: int) -> list[Batch]:
    return [
        left_padded([texts[row] for row in rows], model.pad_token_id) for rows in by_length(list(map(len, texts)), size)
    ]


TASKS = {
    "decision": measure_decision,
    "localise": measure_localise,
    "copying": measure_copying,
    "guesses": measure_guesses,
    "cost": measure_cost,
    "assembly": measure_assembly,
    "knockout": measure_knockout,
    "knockout_neurons": measure_knockout_neurons,
    "patching": measure_patching,
    "tuned": measure_tuned,
}
SPARED = {"knockout": ALIGNED, "knockout_neurons": CONTROLS}  # families that are not knocked out
MAIN_ONLY = ("copying", "guesses", "knockout", "knockout_neurons", "patching", "tuned")


def tasks_of(plan: Plan, *, is_main: bool) -> list[str]:
    """The tasks of the model that is asked about, or of another one."""
    left_out = {*plan.settings.left_out, *(() if is_main else MAIN_ONLY)}
    left_out |= {task for task in SPARED if len(knocked_out(plan, task)) < 2}  # nothing to compare
    left_out |= {"tuned"} if len(plan.texts) < 8 else set()
    return [name for name in TASKS if name not in left_out]


def knocked_out(plan: Plan, task: str) -> list[str]:
    """The families whose parts a task of SPARED takes away."""
    return [name for name in plan.localised if name not in SPARED[task]]


def floor_tasks(plan: Plan) -> list[tuple[Plan, Sequence[str]]]:
    """What a model with random weights is asked: few couples, and all words whose assembly is probed."""
    probed = [] if "assembly" in plan.settings.left_out else [(plan.without_controls(), ("assembly",))]
    return [(plan.only(FLOOR_COUPLES), FLOOR_TASKS), *probed]


# Two checkpoints


def measure_change(
    folder: Path,
    plan: Plan,
    open_plain: Callable[[str], "object"],
    open_hooked: Callable[[str], HookedModel],
    earlier: str,
    later: str,
) -> dict[str, Measured]:
    """What training changed from ``earlier`` to ``later``: tasks weights, representation, difference, closure, on disk as a model's
    are, in ``folder``/<earlier>/<later>."""
    done = {}
    for name, measure in CHANGES.items():
        opened = open_plain if name in ("weights", "closure") else open_hooked
        done[name] = kept(
            folder / earlier / later,
            name,
            lambda measure=measure, opened=opened: measure(opened(earlier), opened(later), plan),
            of=f"{earlier} to {later}",
        )
    return done


def measure_weights(earlier, later, plan: Plan) -> Measured:
    """Facts: of each weight what changes.WeightChange says. Arrays: singular values [weight, 64], 0 where there are fewer."""
    found = changes.weight_changes(earlier, later)
    spectra = np.zeros((len(found), changes.KEPT))
    for row, one in zip(spectra, found, strict=True):
        row[: len(one.singular_values)] = one.singular_values
    keys = (
        "name",
        "layer",
        "module",
        "size",
        "change",
        "relative",
        "spectral",
        "rank",
        "stable_rank",
        "effective_rank",
    )
    facts = {
        by: {str(key): vars(group) for key, group in changes.grouped(found, by).items()} for by in ("module", "layer")
    }
    return Measured(
        facts | {"weights": [{key: getattr(one, key) for key in keys} for one in found]}, {"spectra": spectra}
    )


def measure_representation(earlier: HookedModel, later: HookedModel, plan: Plan) -> Measured:
    """change: 1 - CKA as pseudo-values [cluster, layer], over the held-out texts, else the prompts of all families."""
    batches, clusters = _texts(earlier, plan)
    return Measured(
        arrays={"change": changes.representation_changes(earlier, later, batches, clusters, seed=plan.seed)}
    )


def measure_difference(earlier: HookedModel, later: HookedModel, plan: Plan) -> Measured:
    """consistency [text, layer]. Facts: size, agreement and their floors by layer, decoded tokens."""
    batches, clusters = _texts(earlier, plan)
    found = changes.mean_difference(earlier, later, batches)
    decoded = changes.decode(found, later, seed=plan.seed)
    scored = found.scored.numpy()
    facts = {
        key: np.asarray(getattr(decoded, key)).tolist()
        for key in ("size", "agreement", "floor_size", "floor_agreement")
    }
    for key in ("up", "down", "floor_up", "floor_down"):
        facts[key] = [
            [later.tokenizer.decode([token]) if token >= 0 else "" for token in row]
            for row in getattr(decoded, key).tolist()
        ]
    kept = [cluster for cluster, is_scored in zip(clusters, scored, strict=True) if is_scored]
    return Measured(facts | {"clusters": kept}, {"consistency": found.consistency().numpy()})


def _texts(model: HookedModel, plan: Plan) -> tuple[list[Batch], list[str]]:
    """Batches in the order of the clusters that are returned."""
    texts, clusters = plan.texts[: plan.settings.texts], plan.text_clusters[: plan.settings.texts]
    if len(set(clusters)) < 2 * significance.MIN_UNITS:
        pairs = [pair for name in plan.localised for pair in plan.reporting(name)]
        texts, clusters = [list(pair.clean) for pair in pairs], [pair.cluster for pair in pairs]
    order = [row for rows in by_length(list(map(len, texts)), plan.batch_size) for row in rows]
    return _batches(model, texts, plan.batch_size), [clusters[row] for row in order]


def measure_closure(earlier, later, plan: Plan) -> Measured:
    """Of each behaviour: facts (gap, ranking, and for each size the shares that the best and random parts bring back), arrays earlier, later [example].

    Behaviours: answers, the log-probability of held-out answers (nats a token), and the reference family's m (logits).
    """
    pad = getattr(earlier.config, "pad_token_id", None) or 0
    reporting = plan.families[plan.reference].pairs[: 2 * plan.settings.closed]
    behaviours = {
        plan.reference: (closure.pair_difference(reporting[::2], pad), [pair.cluster for pair in reporting[::2]])
    }
    if len(plan.examples) >= 2 * significance.MIN_UNITS:
        examples = plan.examples[: plan.settings.closed]
        behaviours = {
            "answers": (closure.answer_log_probability(examples, pad), plan.text_clusters[: len(examples)])
        } | behaviours
    facts, arrays = {}, {}
    for name, (behaviour, clusters) in behaviours.items():
        choosing, reporting_rows = significance.halves(clusters, plan.seed)
        parts = len(closure.parts_of(earlier))
        sizes = sorted({min(size, parts) for size in (*CLOSURE_SIZES, parts)})
        found = closure.closure(
            earlier, later, behaviour, choosing, reporting_rows, clusters,
            sizes=sizes, draws=CLOSURE_DRAWS, seed=plan.seed,
        )  # fmt: skip
        facts[name] = {
            "gap": found.gap, "note": found.note, "n": len(reporting_rows), "ranking": [list(part) for part in found.ranking],
            "completeness": found.attribution.completeness,
            "points": [
                {
                    "size": len(point.parts), "recovered": point.recovered.value, "low": point.recovered.low, "high": point.recovered.high,
                    "lost": point.lost.value, "random": float(np.mean(point.random_recovered)), "random_high": float(np.max(point.random_recovered)),
                    "p": point.p,
                }
                for point in found.points
            ],
        }  # fmt: skip
        arrays |= {f"{name}/earlier": found.earlier, f"{name}/later": found.later}
    return Measured(facts, arrays)


CHANGES = {
    "weights": measure_weights,
    "representation": measure_representation,
    "difference": measure_difference,
    "closure": measure_closure,
}
