"""What was found, in sentences: how sure, against what, and what was not found.

    for line in findings(models, plan, floors): print(line)

Effects that were tested are those of pairs on which nothing was chosen, and stand beside what chance gives: random heads,
random circuits, models with random weights. How many heads carry something, and which ones training changed, is read off
the estimate of attribution patching on all pairs, and said so.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from stoney_rl.interp import significance, summary
from stoney_rl.interp.analysis import DRAWS, Measured
from stoney_rl.interp.plan import Plan
from stoney_rl.metrics.intervals import mean_interval

NAMED = 3  # heads that a sentence names
LARGE = 0.05  # of the difference: a head that a reader should look at
CIRCUIT = 0.8  # of the model's own difference: at which share the size of a circuit is told


def findings(models: summary.Models, plan: Plan, floors: Measured) -> list[str]:
    """Paragraphs: trust first, then each model and family, then the differences; each says whom and what it is about."""
    lines = [trust_sentence(models)]
    for name, tasks in models.items():
        if "attention" in tasks:
            lines.append(f"{name}. Copying: {_copying(tasks['attention'])}")
        if "tuned_lens" in tasks:
            lines.append(f"{name}. Tuned lens: {_fit(tasks['tuned_lens'].facts['fit'])}")
        for family in plan.families:
            lines += [f"{name}, {family}. {line}" for line in _of_family(tasks, family, plan, floors)]
    for family in plan.families:
        lines += _differences(models, family, plan)
    return lines


def trust_sentence(models: summary.Models) -> str:
    failed = {name: tasks["trust"].facts["failed"] for name, tasks in models.items() if tasks["trust"].facts["failed"]}
    if not failed:
        count = sum(value is not None for tasks in models.values() for value in tasks["trust"].facts["values"].values())
        return f"All {count} checks of the hooks, sums and patches hold for {_listed(models)}."
    wrong = [f"{name} ({'; '.join(lines)})" for name, lines in failed.items()]
    return f"DO NOT BELIEVE THE FIGURES OF {_listed(wrong)}."


def _of_family(tasks: Mapping[str, Measured], family: str, plan: Plan, floors: Measured) -> list[str]:
    pairs = plan.families[family]
    clusters = [pair.cluster for pair in pairs]
    reporting = plan.halves(family)[1]
    held = [clusters[index] for index in reporting]
    lines = []
    behaviour = tasks.get("attribution") or tasks.get("patching")
    if behaviour:
        clean, corrupt = (behaviour.arrays[f"{family}/{key}"] for key in ("clean", "corrupt"))
        gap = significance.effects((clean - corrupt)[:, None], clusters, seed=plan.seed)
        lines.append(_behaviour(clean, corrupt, clusters, gap, plan.seed))
        if not summary.tells_apart(gap):
            return [f"{lines[0]} {_nothing_to_trace(gap)}"]
    if "patching" in tasks:
        lines.append(_heads(tasks["patching"], family, plan, floors, clusters, held, reporting))
    if "ablation" in tasks:
        lines.append(_ablation(tasks["ablation"].arrays, family, held, plan.seed))
    if "circuit" in tasks:
        lines.append(_circuit(tasks["circuit"], family, held, plan.seed))
    for task, lens in (("lens", "logit lens"), ("tuned_lens", "tuned lens")):
        if task in tasks:
            lines.append(_depth(tasks[task].arrays, family, lens))
    return lines


def _nothing_to_trace(gap: significance.Effects) -> str:
    if gap.low is None:
        return f"Whether that is more than chance can't be said ({gap.note}), so nothing is traced."
    if gap.high[0] < 0:
        return "It prefers the wrong answers, so there is no path to a right one to trace."
    return "That is no more than chance, so there is nothing to trace."


def _behaviour(clean: np.ndarray, corrupt: np.ndarray, clusters: Sequence, gap: significance.Effects, seed: int) -> str:
    right = mean_interval(
        ((clean > 0) & (corrupt < 0)).astype(float).tolist(), seed=seed, clusters=clusters, bounds=(0, 1)
    )
    return (
        f"Behaviour: it prefers the asked answer on both prompts in {_share(right)} of {len(clean)} pairs; the prompts differ by "
        f"{_interval(gap, 0)} logits."
    )


def _heads(
    measured: Measured,
    family: str,
    plan: Plan,
    floors: Measured,
    clusters: Sequence,
    held: Sequence,
    reporting: Sequence[int],
) -> str:
    values = measured.arrays[f"{family}/heads"]
    floor = floors.facts.get(f"{family}/patching", 0.0)
    over_all = significance.effects(values, clusters, seed=plan.seed, floor=floor)
    tested = measured.facts["top"][family]
    true = significance.effects(measured.arrays[f"{family}/top"], held, seed=plan.seed)
    order = range(min(NAMED, len(tested)))  # as the other half ranked them
    named = ", ".join(f"{tested[index][0]}.{tested[index][1]} {_interval(true, index)}" for index in order)
    beside = (
        f"above those of {plan.random_models} random models (at most {floor:.2g})"
        if floor
        else "without a random floor"
    )
    gap = float((measured.arrays[f"{family}/clean"] - measured.arrays[f"{family}/corrupt"]).mean())
    large = int((over_all.found & (np.abs(over_all.mean) >= LARGE * gap)).sum())
    return (
        f"Heads: by the estimate {int(over_all.found.sum())} of {over_all.found.size} carry some of it (q <= 0.05, {beside}), {large} "
        f"of them {LARGE:.0%} or more. Patched in earnest on {len(held)} other pairs, those that seemed strongest bring back "
        f"(layer.head, logits) {named}; the estimate ranks the {len(tested)} heads that were tested as the true effect does at "
        f"{_agreement(measured, family, reporting)} (Spearman)."
    )


def _agreement(measured: Measured, family: str, reporting: Sequence[int]) -> str:
    from scipy.stats import spearmanr

    tested = measured.facts["top"][family]
    estimated = [measured.arrays[f"{family}/heads"][reporting, layer, head].mean() for layer, head in tested]
    true = measured.arrays[f"{family}/top"].mean(axis=0)
    return f"{spearmanr(estimated, true).statistic:.2f}" if len(tested) > 2 else "(too few heads)"


def _ablation(arrays: Mapping[str, np.ndarray], family: str, held: Sequence, seed: int) -> str:
    group, random = arrays[f"{family}/group"], arrays[f"{family}/random"]
    both = significance.effects(np.stack([group, random.mean(1), group - random.mean(1)], 1), held, seed=seed)
    return (
        f"Taken away: without these heads together the clean prompt's difference changes by {_interval(both, 0)} logits, without as many random "
        f"heads of the same layers ({DRAWS} draws) by {_interval(both, 1)}; the former minus the latter: {_interval(both, 2)}."
    )


def _circuit(measured: Measured, family: str, held: Sequence, seed: int) -> str:
    arrays = measured.of(family)
    found, sizes = summary.faithfulness(arrays, held, seed), measured.facts[family]["sizes"]
    if found is None:
        return "Circuit: not told, as these pairs alone do not show that it tells the two prompts apart."
    reached = [index for index, share in enumerate(found["circuit"]) if share >= CIRCUIT]
    if not reached:
        return f"Circuit: none keeps {CIRCUIT:.0%} of it."
    index = reached[0]
    low, high = found["circuit_low"][index], found["circuit_high"][index]
    return (
        f"Circuit: {sizes[index]} of {sizes[-1]} heads and MLPs, each at one kind of position, keep {found['circuit'][index]:.0%} "
        f"[{low:.0%}, {high:.0%}] of the difference; random ones of that size {found['random'][index]:.0%}."
    )


def _depth(arrays: Mapping[str, np.ndarray], family: str, lens: str) -> str:
    depth = arrays[f"{family}/answer_depth"]
    settled = depth[~np.isnan(depth)]
    layers = arrays[f"{family}/answer"].shape[1] - 1
    if not len(settled):
        return f"Depth: by the {lens} the answer is never the likelier one at the end."
    low, middle, high = np.percentile(settled, [25, 50, 75])
    wrong = (
        ""
        if len(settled) == len(depth)
        else f"; {len(depth) - len(settled)} of {len(depth)} prompts end with the wrong one"
    )
    return (
        f"Depth: by the {lens} the answer stays ahead of the wrong one from layer {middle:.0f} of {layers} on (median; quartiles "
        f"{low:.0f} and {high:.0f}{wrong})."
    )


def _copying(measured: Measured) -> str:
    arrays = measured.arrays
    parts = []
    for key, what in (("previous_token", "looking one token back"), ("induction", "induction")):
        mean = np.nanmean(arrays[key], axis=0)
        layer, head = np.unravel_index(mean.argmax(), mean.shape)
        parts.append(f"{what}: best head {layer}.{head} at {mean.max():.2f}, {int((mean > 0.4).sum())} heads above 0.4")
    copied = mean_interval(arrays["copying"].tolist(), seed=0, bounds=(0, 1))
    return f"on random tokens written twice it predicts {_share(copied)} of the second half; {'; '.join(parts)}."


def _fit(fit: Mapping) -> str:
    plain, tuned = (np.array(fit[key]) for key in ("plain_kl", "tuned_kl"))
    worse = int((tuned > plain).sum())
    return (
        f"fitted to {fit['tokens']} tokens of held-out rows; on {fit['held_out_tokens']} of others it is {tuned.mean():.2f} nats from "
        f"what the model says in the end, the plain lens {plain.mean():.2f} (KL, mean over layers; worse in {worse} of {len(plain)})."
    )


def _differences(models: summary.Models, family: str, plan: Plan) -> list[str]:
    names = [name for name, tasks in models.items() if "patching" in tasks]
    clusters = [pair.cluster for pair in plan.families[family]]
    lines = []
    for other in names[1:]:
        first = names[0]
        a, b = (models[name]["patching"].arrays for name in (other, first))
        gaps = [arrays[f"{family}/clean"] - arrays[f"{family}/corrupt"] for arrays in (a, b)]
        change = significance.difference(*(gap[:, None] for gap in gaps), clusters, seed=plan.seed)
        heads = significance.difference(a[f"{family}/heads"], b[f"{family}/heads"], clusters, seed=plan.seed)
        lines.append(
            f"{first} minus {other}, {family}. The difference of the prompts: {_interval(change, 0)} logits. "
            f"{_changed_heads(heads)}"
        )
    return lines


def _changed_heads(heads: significance.Effects) -> str:
    if heads.q is None:
        return f"Heads are not compared: {heads.note}."
    if not heads.found.any():
        width = heads.high - heads.low
        wide = (
            f" (half the median interval is {np.nanmedian(width) / 2:.2g} logits)" if np.isfinite(width).any() else ""
        )
        return f"By the estimate no head's part in it differs by more than chance{wide}."
    order = np.argsort(-np.abs(np.where(heads.found, heads.mean, 0)), axis=None)[: min(NAMED, int(heads.found.sum()))]
    places = [np.unravel_index(index, heads.mean.shape) for index in order]
    named = ", ".join(f"{layer}.{head} {_interval(heads, (layer, head))}" for layer, head in places)
    return (
        f"By the estimate {int(heads.found.sum())} of {heads.found.size} heads differ in their part in it (q <= 0.05), most of all "
        f"{named}; the largest of many look larger than they are."
    )


def _interval(effect: significance.Effects, index: int | tuple) -> str:
    if effect.low is None:
        return f"{effect.mean[index]:+.3g} (no interval: {effect.note})"
    return f"{effect.mean[index]:+.3g} [{effect.low[index]:.3g}, {effect.high[index]:.3g}]"


def _share(interval) -> str:
    if interval.low is None:
        return f"{interval.value:.0%}"
    return f"{interval.value:.0%} [{interval.low:.0%}, {interval.high:.0%}]"


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
