"""From what was measured to what may be said: sections of question, answer, table and limits, each number beside its floors.

    results = summarise(plan, measured, floor, changes, main="sft", twin=None, balance=rows, about={...}, checkpoints=[...])
    report.write("report.html", page(results, pictures))

A difference of families is taken couple by couple, as the n-th couple of each was matched to the n-th of the reference.
Intervals are 95 %, by cluster (significance.py). What was not found stands with the effect that would have been: 80 % power, two-sided
5 %, from the standard error that was seen.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import numpy as np

from stoney_rl.interp import changes as training
from stoney_rl.interp import localise, significance
from stoney_rl.interp.analysis import Measured
from stoney_rl.interp.compare import KINDS, Plan, losses_of, sets_of, values_of
from stoney_rl.interp.opening import RANDOM
from stoney_rl.interp.tasks import ALIGNED, BALANCED, CONTROLS, FAMILIES, UNBALANCED

Models = Mapping[str, Mapping[str, Measured]]
Changes = Mapping[tuple[str, str], Mapping[str, Measured]]

NAMES = {
    "lexicon": "words of the lexicon",
    "english": "English",
    "french": "French",
    "arithmetic": "arithmetic",
    "english_split": "English cut into more tokens",
    "lexicon_scrambled": "scrambled words of the lexicon",
    "lexicon_shuffled": "words of the lexicon with shuffled meanings",
}
MATCHED = (*FAMILIES, *CONTROLS)  # to the reference, couple by couple; a user's own families are not
# The most that an interaction can be: forgetting costs half the gap, and each set at most its own family's.
MOST = 1.0
NAMED = 5  # heads and tokens that a sentence names
HALVINGS = {"components": 200, "neurons": 40}


def summarise(
    plan: Plan,
    measured: Models,
    floor: Mapping[str, Measured] | None,
    changes: Changes,
    *,
    main: str,
    twin: str | None,
    balance: Sequence[Mapping],
    about: Mapping[str, str],
    checkpoints: Sequence[Mapping],
) -> dict:
    """results.json: title, findings, about, models, and sections with their numbers."""
    own = measured[main]
    kinds = [(main, "components"), (main, "neurons"), *((name, "components") for name in measured if name != main)]
    overlaps = {(model, kind): _overlaps(plan, measured[model]["localise"], kind) for model, kind in kinds}
    asked = [name for name in plan.localised if name not in CONTROLS]  # of all models
    seeds = {name: _between_seeds(measured, main, twin, name) if twin else 0.0 for name in asked}
    sections = [
        fairness(plan, measured, floor, balance),
        shared_parts(plan, overlaps, sets_of(own["localise"], plan.localised, "components"), floor, main),
        needed_parts(plan, own),
        tokens_or_language(overlaps[main, "components"]),
        depth(plan, measured, main),
        pivot(plan, own),
        assembly(plan, own, floor),
        copying(plan, own),
        cost(plan, measured, main),
        *(
            change(plan, measured, floor, changes, pair, number=number, seeds=seeds, is_floor=twin in pair)
            for number, pair in enumerate(changes, start=1)
        ),
    ]
    sections = [section for section in sections if section]
    return {
        "title": f"How {main} reasons: {', '.join(NAMES.get(name, name) for name in plan.families if name not in CONTROLS)}",
        "findings": [line for section in sections for line in section["answer"]],
        "about": dict(about),
        "models": list(checkpoints),
        "reference": plan.reference,
        "sections": sections,
    }


# Sections: key, question, answer (sentences), tables, numbers (for pictures), tells, cannot, source; None where nothing was
# measured for one


def fairness(plan: Plan, measured: Models, floor: Mapping[str, Measured] | None, balance: Sequence[Mapping]) -> dict:
    rows, numbers = [], {}
    models = dict(measured) | ({RANDOM: floor} if floor else {})
    for name in plan.families:
        cells = []
        for model, tasks in models.items():
            found = None
            if _has(tasks, name):
                right = _couples(_right(tasks["decision"], name))  # of the floor only the first couples
                found = _share_of(right, _couple_clusters(plan.families[name].pairs)[: len(right)])
            numbers[f"{model}/{name}"] = found
            cells.append(_percent(found))
        rows.append([_label(name), *cells])
    off = [
        f"{_label(row['family'])} in {_words(key)} ({shift:+.2f})"
        for row in balance
        for key, shift in row["smd"].items()
        if shift is not None and abs(shift) > UNBALANCED
    ]
    pairs = " and ".join(str(n) for n in sorted({len(family.pairs) for family in plan.families.values()}))
    matched = [_label(name) for name in plan.families if name in MATCHED and name not in (plan.reference, *ALIGNED)]
    aligned = [_label(name) for name in plan.families if name in ALIGNED]
    own = [_label(name) for name in plan.families if name not in MATCHED]
    answer = [
        f"Fair? {_count(len(plan.families), 'family', 'families')} of {pairs} pairs."
        + (
            f" Each couple of {_listed(matched)} is matched to one of {_label(plan.reference)} on tokens, entropy and accuracy."
            if matched
            else ""
        )
        + (f" {_listed(aligned)[:1].upper()}{_listed(aligned)[1:]} have the lexicon's own prompts." if aligned else "")
        + (f" Not matched, as they are your own: {_listed(own)}." if own else "")
        + (
            f" More than {UNBALANCED} standard deviations apart remain: {'; '.join(off)}."
            if off
            else f" No family is off by more than {UNBALANCED} standard deviations."
            if balance[1:]
            else ""
        )
        + f" Right answers of {next(iter(measured))}: "
        + ", ".join(f"{_label(name)} {_percent(numbers[f'{next(iter(measured))}/{name}'])}" for name in plan.families)
        + "."
    ]
    covariates = ("tokens", "value_tokens", "entropy", "right")
    table = [
        [
            _label(row["family"]),
            row["pairs"],
            *(
                f"{row[key]:.2f} ({'–' if row['smd'][key] is None else format(row['smd'][key], '+.2f')})"
                for key in covariates
            ),
        ]
        for row in balance
    ]
    return _section(
        "fairness", "Is the comparison fair?", answer,
        tables=[
            _table("The match, by the main model; in brackets the distance to the reference in standard deviations "
                   f"(up to {BALANCED}: balanced; above {UNBALANCED}: not)", ["family", "pairs", *map(_words, covariates)], table),
            _table("Right answers: the answer is likelier than the wrong one", ["family", *models], rows),
        ],
        numbers={"right": numbers, "balance": list(balance)},
        tells="whether families differ in length, difficulty or accuracy as well as in what is asked.",
        cannot="that the model does the same thing in all of them. Natural English words are one token: that can't be matched, and is what the control english_split is for.",
        source="Matching after Stuart (1010.5586). AlKhamissi et al. (2411.02280) contrast sentences with lists of non-words, which differ in meaning and in tokens; ours differ in the family alone.",
    )  # fmt: skip


def shared_parts(
    plan: Plan,
    overlaps: Mapping,
    strongest: Mapping[str, localise.PartSet],
    floor: Mapping[str, Measured] | None,
    main: str,
) -> dict | None:
    """Overlap of the strongest parts, (model, kind) -> that of every two families; the main model's ``strongest`` themselves."""
    names, numbers, tables, answer = plan.localised, {}, [], []
    if len(names) < 2:
        return None
    for (model, kind), found in overlaps.items():
        if not found:  # of neurons, where all but one family are controls
            continue
        numbers[f"{model}/{kind}"] = {f"{a}/{b}": asdict(one) for (a, b), one in found.items()}
        base = _floor_overlap(plan, floor, kind) if model == main else {}
        rows = [
            [
                f"{_label(a)}, {_label(b)}", f"{one.share:.2f} {_bounds(*one.share_interval or (None, None))}", f"{one.chance:.2f}", f"{one.p:.2g}",
                f"{one.halves:.2f}", f"{one.ceiling:.2f}", f"{one.missing:+.2f} {_bounds(*one.missing_interval or (None, None))}", f"{one.correlation:.2f}",
                f"{base[a, b]:.2f}" if (a, b) in base else "–",
            ]
            for (a, b), one in found.items()
        ]  # fmt: skip
        k = next(iter(found.values())).k
        tables.append(_table(
            f"{model}: share of the {k} strongest {'heads and MLPs' if kind == 'components' else 'neurons'} that two families have in common; in brackets how far other couples would move it",
            ["families", "shared", "chance", "p", "halves of the two", "halves of one", "missing to that", "correlation of all", RANDOM], rows,
        ))  # fmt: skip
        if model == main:
            answer += _overlap_sentence(plan, found, kind, k)
    tables.append(_table(f"{main}: the strongest heads and MLPs, by layer", ["family", "parts"],
                         [[_label(name), _part_names(parts, len(parts))] for name, parts in strongest.items()]))  # fmt: skip
    return _section(
        "overlap", "Do they use the same parts?", answer, tables=tables, numbers=numbers,
        tells="whether the parts that matter most for one family matter most for another: between what chance gives and what other pairs of one family give.",
        cannot="that shared parts do the same, or that parts which aren't shared are needed: for that, the next section. 'Missing' compares halves of the pairs, as a half is a noisier sample than the whole.",
        source=f"Top 1 % of units as AlKhamissi et al. (2411.02280, figure 2) and LAPE (2402.16438); they choose by activation, we by effect on the answer (attribution patching, integrated gradients, {localise.STEPS} steps), and put the ceiling beside it, which they lack. n = {len(plan.choosing(names[0])) // 2} couples a family.",
    )  # fmt: skip


def _overlaps(plan: Plan, measured: Measured, kind: str) -> dict:
    names = [name for name in plan.localised if f"{name}/heads" in measured.arrays]
    return {
        (a, b): localise.overlap(
            values_of(measured, a), _couple_clusters(plan.choosing(a)), values_of(measured, b), _couple_clusters(plan.choosing(b)),
            KINDS[kind], halvings=HALVINGS[kind], seed=plan.seed,
        )
        for a, b in combinations(names, 2)
        if kind == "components" or not {a, b} & set(CONTROLS)
    }  # fmt: skip


def _floor_overlap(plan: Plan, floor: Mapping[str, Measured] | None, kind: str) -> dict:
    if not floor:
        return {}
    names = [name for name in plan.localised if f"{name}/heads" in floor["localise"].arrays]
    sets = {name: set(localise.strongest(values_of(floor["localise"], name), KINDS[kind])) for name in names}
    return {(a, b): len(sets[a] & sets[b]) / len(sets[a]) for a, b in combinations(names, 2)}


def _overlap_sentence(plan: Plan, found: Mapping, kind: str, k: int) -> list[str]:
    """One sentence; none where the reference is compared with controls alone."""
    what = "heads and MLPs" if kind == "components" else "neurons"
    parts = []
    for (a, b), one in found.items():
        if plan.reference in (a, b) and not {a, b} & set(CONTROLS):
            other = b if a == plan.reference else a
            verdict = (
                "no interval with so few couples" if one.missing_interval is None
                else "fewer than pairs of one family share with each other" if one.missing_interval[0] > 0
                else "as many as pairs of one family share with each other, within the interval"
            )  # fmt: skip
            parts.append(
                f"{one.share * k:.0f} with {_label(other)} (chance {one.chance * k:.1f}; {verdict}: {one.missing:+.0%} {_bounds(*one.missing_interval or (None, None), '.0%')} missing)"
            )
    if not parts:
        return []
    return [f"Same {what}? Of the {k} strongest for {_label(plan.reference)}, it shares {'; '.join(parts)}."]


def needed_parts(plan: Plan, own: Mapping[str, Measured]) -> dict | None:
    """The matrix and its interactions."""
    if "knockout" not in own:
        return None
    numbers, tables, answer, reported = {}, [], [], len(plan.reporting(plan.localised[0]))
    for task, what in (("knockout", "heads and MLPs"), ("knockout_neurons", "neurons")):
        if task not in own:
            continue
        losses = losses_of(own[task], plan)
        cells, crossed = localise.cells(losses, seed=plan.seed), localise.interactions(losses, seed=plan.seed)
        numbers[task] = {
            "cells": {f"{a}/{b}": None if one is None else asdict(one) for (a, b), one in cells.items()},
            "interactions": {f"{a}/{b}": None if one is None else asdict(one) for (a, b), one in crossed.items()},
        }
        names = list(losses.own)
        tables.append(_table(
            f"Without the {what} of the row: share of the column's logit gap that is lost (random sets like them); {_starred(cells, plan)}",
            ["without those of", *map(_label, names)],
            [[_label(a), *(_cell(cells[a, b]) for b in names)] for a in names],
        ))  # fmt: skip
        tables.append(_table(
            f"Interaction ({what}): what each loses more without its own than without the other's, and the sum of both", ["families", "first, second", "interaction", "q", f"floor: random sets, 95 %; {localise.SMALLEST} at least", "found", "would have been seen"],
            [[f"{_label(a)}, {_label(b)}", *(["", "no gap", "", "", "", ""] if one is None else [
                f"{one.a:+.2f}, {one.b:+.2f}", f"{one.value:+.3f} {_bounds(one.low, one.high)}", _number(one.q), f"{one.floor:.3f}", "yes" if one.found else "no", _number(one.detectable)])]
             for (a, b), one in crossed.items()],
        ))  # fmt: skip
        left_out = _part_names(own[task].facts["common"])
        answer.append(
            _interaction_sentence(plan, crossed, what)
            + (f" Left out, as all families' strongest have them: {left_out}." if left_out else "")
        )
    if "patching" in own:
        agreement = {}
        for name in plan.localised:
            arrays = own["patching"].of(name)
            agreement[name] = localise.rank_agreement(arrays["estimate"], arrays["true"])
        numbers["agreement"] = agreement
        answer[0] += (
            " The estimate ranks single parts as true patching on other pairs does at "
            + ", ".join(f"{value:.2f} ({_label(name)})" for name, value in agreement.items() if value is not None)
            + " (Spearman)."
        )
    return _section(
        "needed", "Do they need different parts?", answer, tables=tables, numbers=numbers,
        tells="by real interventions on pairs that parts were not chosen on, whether a family loses more without its own parts than without another's. 0.5 is all that forgetting can cost.",
        cannot="that parts are for nothing else: only these families were asked. Parts that stand in for one another hide; a group is taken away to limit that.",
        source=f"The matrix follows AlKhamissi et al. (2411.02280, figure 3) and LAPE (2402.16438, figure 4), with {plan.settings.draws} random sets of as many heads and neurons in the same layers and as many MLPs in any, each in {min(plan.settings.few, reported)} pairs of each family, which makes the comparison cautious. n = {reported} pairs a family.",
    )  # fmt: skip


def _part_names(parts: Sequence[Sequence], most: int = NAMED) -> str:
    named = [
        f"MLP {layer}" if kind == "mlps" else f"{kind.removesuffix('s')} {layer}.{index}"
        for kind, layer, index in parts
    ]
    more = f" and {len(named) - most} more" if len(named) > most else ""
    return ", ".join(named[:most]) + more


def _interaction_sentence(plan: Plan, crossed: Mapping, what: str) -> str:
    named = {key: one for key, one in crossed.items() if one is not None and plan.reference in key}
    found = [_crossed(key, one, plan) for key, one in named.items() if one.found]
    not_found = [_crossed(key, one, plan) for key, one in named.items() if not one.found]
    sentence = f"Different {what}? "
    sentence += f"Each loses more without its own than without the other's: {'; '.join(found)}. " if found else ""
    if not_found:
        sentence += f"Not found beyond what random sets show: {'; '.join(not_found)}. "
    lacking = [key for key, one in crossed.items() if one is None and plan.reference in key]
    if lacking:
        sentence += f"Not asked, as one of the two has no gap to lose: {', '.join(' and '.join(map(_label, key)) for key in lacking)}. "
    return sentence.strip()


def _crossed(key: tuple[str, str], one: localise.Interaction, plan: Plan) -> str:
    other = key[1] if key[0] == plan.reference else key[0]
    seen = "" if one.found or one.detectable is None else f", {one.detectable:.2f} would have been seen"
    if seen and one.detectable > MOST:
        seen += ", which is more than there can be: these random sets are too few or seen in too few pairs to decide"
    return f"{_label(plan.reference)} against {_label(other)} {one.value:+.2f} {_bounds(one.low, one.high)} of the gap (random sets up to {one.floor:.2f}{seen})"


def tokens_or_language(found: Mapping) -> dict | None:
    """Whether what sets the lexicon apart from English follows the number of tokens; ``found``: overlaps of heads and MLPs."""
    pairs = [
        ("lexicon", "english"),
        ("lexicon", "english_split"),
        ("english", "english_split"),
        ("lexicon", "lexicon_scrambled"),
    ]
    one = {key: found.get(key) or found.get(key[::-1]) for key in pairs}
    one = {key: each for key, each in one.items() if each is not None}
    if not set(pairs[:3]) <= one.keys():
        return None
    natural, cut, both, scrambled = (one.get(key) for key in pairs)
    moved = ""
    if natural.missing_interval and cut.missing_interval:
        apart = cut.missing_interval[1] < natural.missing_interval[0]
        moved = (
            f": cut English is nearer to the lexicon, so the difference goes with the tokens; nothing more is found, where {cut.missing_interval[1]:.0%} may be left"
            if apart and cut.missing_interval[0] <= 1e-6
            else f": cut English is nearer to the lexicon, so a part of the difference goes with the tokens; {cut.missing:.0%} is left" if apart
            else f": {'nearer, but ' if cut.missing < natural.missing else ''}not apart by more than these pairs can show"
        )  # fmt: skip
    sentence = (
        f"Tokens or language? Of the strongest heads and MLPs {_label('lexicon')} and English share {natural.share:.0%} (to what pairs of one family share, "
        f"{_missing(natural)} missing), the lexicon and English cut into as many tokens {cut.share:.0%} ({_missing(cut)} missing){moved}. "
        f"English and cut English share {both.share:.0%}."
    )
    if scrambled is not None:
        is_same = scrambled.missing_interval is not None and scrambled.missing_interval[0] <= 0
        sentence += (
            f" With the letters of its words scrambled the lexicon keeps {scrambled.share:.0%} of them ({_missing(scrambled)} missing)"
            + (": which parts are used does not show that they are words of the language." if is_same else ".")
        )
    table = [
        [f"{_label(a)}, {_label(b)}", f"{each.share:.2f}", f"{each.missing:+.2f} {_bounds(*each.missing_interval or (None, None))}", f"{each.correlation:.2f}"]
        for (a, b), each in one.items()
    ]  # fmt: skip
    return _section(
        "control", "Is it the tokens or the language?", [sentence],
        tables=[_table("Shared heads and MLPs, with the controls", ["families", "shared", "missing to the same family", "correlation"], table)],
        numbers={f"{a}/{b}": asdict(each) for (a, b), each in one.items()},
        tells="whether a difference between a language and English remains when English words are cut into as many tokens, and whether it needs real words at all.",
        cannot="what a tokenizer that knew the language would give: cut English words are English words that the model has never seen cut so. And cut words are harder: where natural English is easier than the lexicon (first section), tokens and difficulty change together.",
        source="The control is ours; that work on language-specific parts rarely has it is why (2402.16438, 2411.04986 compare languages in their own tokens).",
    )  # fmt: skip


def _missing(one: localise.Overlap) -> str:
    return f"{one.missing:.0%} {_bounds(*one.missing_interval or (None, None), '.0%')}".strip()


def depth(plan: Plan, measured: Models, main: str) -> dict:
    """Depth of the answer by each lens that was read, differences to the reference couple by couple."""
    own, numbers, tables, answer = measured[main], {}, [], []
    for task, lens in (("decision", "logit lens"), ("tuned", "tuned lens")):
        if task not in own:
            continue
        arrays = own[task].arrays
        layers = arrays[f"{plan.reference}/answer"].shape[1] - 1
        reference = _couples(arrays[f"{plan.reference}/answer_depth"])
        numbers[task], rows, parts = {}, [], []
        for name in plan.families:
            if f"{name}/answer_depth" not in arrays:
                continue
            values = _couples(arrays[f"{name}/answer_depth"])
            asked = plan.families[name].pairs if task == "decision" else plan.reporting(name)
            found = _mean(values, plan.seed, _couple_clusters(asked))
            shift = _paired(values, reference, plan.seed) if name != plan.reference and name in MATCHED else None
            numbers[task][name] = {"depth": found, "to_reference": shift}
            known = f"{np.isfinite(values).sum()} of {len(values)}"
            rows.append([_label(name), _value(found, ".1f"), _value(shift, "+.1f"), _detected(shift), known])
            if shift is not None and name not in CONTROLS:
                parts.append(f"{_label(name)} {_value(found, '.1f')} ({_value(shift, '+.1f')}{_unseen(shift, '.1f')})")
        first = _value(numbers[task][plan.reference]["depth"], ".1f")
        answer.append(
            f"When? By the {lens} the answer stays ahead from layer {first} of {layers} on for {_label(plan.reference)}; "
            f"{'; '.join(parts) or 'no other family was matched'} (in brackets: how much later than the reference, couple by couple)."
        )
        tables.append(_table(
            f"{lens}: first layer from which on the answer is likelier than the wrong one, mean over couples that end right",
            ["family", "layer", "to the reference", "would have been seen", "couples"], rows,
        ))  # fmt: skip
    if "tuned" in own:
        fit = {key: np.mean(own["tuned"].facts["fit"][key]) for key in ("tuned_kl", "plain_kl")}
        answer[-1] += (
            f" On held-out tokens the tuned lens is {fit['tuned_kl']:.2f} nats from the output (mean over layers), the logit "
            f"lens {fit['plain_kl']:.2f}."
        )
    curves = {
        model: {
            name: {key: tasks["decision"].arrays[f"{name}/{key}"].mean(0) for key in ("answer", "entropy")}
            for name in plan.families
            if _has(tasks, name)
        }
        for model, tasks in measured.items()
    }
    return _section(
        "depth", "At which layer is the answer decided?", answer, tables=tables,
        numbers={"depth": numbers, "curves": curves},
        tells="from which layer on the output, read early, prefers the right answer.",
        cannot="that the layers before do not know it: they may hold it in a form that the lens does not read. A tuned lens "
        "reads more, and may read what the model doesn't use.",
        source="Logit lens as Wendler et al. (2402.10588, figure 2); tuned lens Belrose et al. (2303.08112). We ask where the "
        "right of two matched answers wins, not which language a token belongs to.",
    )  # fmt: skip


def pivot(plan: Plan, own: Mapping[str, Measured]) -> dict | None:
    """Probability of the English meaning above the other asked word's, by layer; the language's families less the English one."""
    if "guesses" not in own:
        return None
    task = own["tuned"] if "tuned" in own else own["guesses"]
    curves, rows, numbers, parts = {}, [], {}, []
    english = _above(task, "english")
    if english is None:
        return None
    for name in plan.localised:
        above = _above(task, name)
        if above is None:
            continue
        curves[name] = {
            "meaning": np.nanmean(above, 0),
            "answer": np.nanmean(task.arrays[f"{name}/probability"][..., 1], 0),
            "kinds": task.arrays[f"{name}/kinds"].mean(0),
        }
        # Fixed beforehand, as a peak that is looked for is found: the second half of the layers without the last.
        layers = slice(above.shape[1] // 2, above.shape[1] - 1)
        couples = _couples(above[:, layers].mean(1))
        layer = int(np.nanmean(above, 0)[:-1].argmax())
        peak, beyond = _mean(couples, plan.seed, _couple_clusters(plan.reporting(name))), None
        if name != "english" and name in MATCHED:
            beyond = _paired(couples, _couples(english[:, layers].mean(1)), plan.seed)
        numbers[name] = {"strongest_layer": layer, "mean": peak, "beyond": beyond}
        rows.append(
            [
                _label(name),
                layer,
                _value(peak, ".3f"),
                "" if beyond is None else _value(beyond, "+.3f"),
                "" if beyond is None else _number(beyond["detectable"]),
            ]
        )
        if name != "english" and name not in CONTROLS:
            more = "" if beyond is None else f", {_value(beyond, '+.3f')} beyond English{_unseen(beyond, '.3f')}"
            parts.append(
                f"{_label(name)}: in the second half of the layers the English meaning's probability less that of the prompt's other word is {_value(peak, '+.3f')}{more}"
            )
    if not curves:
        return None
    return _section(
        "pivot", "Does the answer pass through English?", [f"Through English? {'; '.join(parts)}. In these prompts the English word stands right before the answer, so only what English itself does not show counts."],
        tables=[_table("English meaning among the guesses, mean over the second half of the layers", ["family", "strongest at layer", "probability above the other word's", "beyond English", "would have been seen"], rows)],
        numbers={"peaks": numbers, "curves": curves},
        tells="whether, before it writes a word of the language, the model holds its English meaning likely at middle layers, more than an English prompt makes it.",
        cannot="more than that: the mean holds layers in which the English family says its own answer, so a passage of a few layers shows in the picture alone, without an interval; repetition of the word in the prompt looks the same, and what the lens can't read is not seen.",
        source="Wendler et al. (2402.10588, figures 2 to 4): they use prompts without the English word and one-token words; with five tokens a word that can't be had, so the English family is the control. Semantic hub: 2411.04986, figure 2.",
    )  # fmt: skip


def _above(task: Measured, name: str) -> np.ndarray | None:
    """The meaning's probability less its rival's [pair, layer + 1]; None where no pair has both."""
    found = task.arrays.get(f"{name}/probability")
    above = None if found is None else found[..., 0] - found[..., 3]
    return above if above is not None and np.isfinite(above).all(1).sum() >= 4 else None


def assembly(plan: Plan, own: Mapping[str, Measured], floor: Mapping[str, Measured] | None) -> dict | None:
    if "assembly" not in own or not own["assembly"].arrays:
        return None
    rows, numbers, parts = [], {}, []
    for name in [key.partition("/")[0] for key in own["assembly"].arrays if key.endswith("/correct")]:
        facts, arrays = own["assembly"].facts[name], own["assembly"].of(name)
        random = (
            floor["assembly"].of(name)
            if floor and "assembly" in floor and f"{name}/correct" in floor["assembly"].arrays
            else None
        )
        selectivity = arrays["correct"] - arrays["control"]
        effects = significance.effects(arrays["correct"] - arrays["correct"][:, :1], facts["clusters"], seed=plan.seed)
        curve = {
            "layers": facts["layers"],
            "correct": arrays["correct"].mean(0),
            "control": arrays["control"].mean(0),
            "n": len(facts["clusters"]),
        }
        if random is not None:
            curve["random"] = random["correct"].mean(0)
        numbers[name] = curve
        best = int(curve["correct"][:, 0].argmax())
        for place, label in enumerate(("last token", "middle token")):
            at = int(curve["correct"][:, place].argmax())
            rows.append([
                _label(name), label, facts["layers"][at], f"{curve['correct'][at, place]:.2f}", f"{curve['correct'][0, place]:.2f}", f"{selectivity.mean(0)[at, place]:+.2f}",
                "–" if random is None else f"{curve['random'][:, place].max():.2f}",
            ])  # fmt: skip
        gain = _entry(effects, (best, 0))
        beside = "" if random is None else f"; a model with random weights reaches {curve['random'][:, 0].max():.0%}"
        parts.append(
            f"at a word's last token a probe tells {curve['n']} {_label(name)} from their scrambled doubles best at layer {facts['layers'][best]}, {curve['correct'][best, 0]:.0%} right "
            f"({gain} beyond the token's own spelling; in the middle of the word {curve['correct'][:, 1].max():.0%} at most{beside})"
        )
    return _section(
        "assembly", "Where are words put together?", [f"Words? {'; '.join(parts)}. The best of the layers looks a little better than it is."],
        tables=[_table("A word or its scrambled double? Accuracy of a probe (chance 0.5)", ["words", "at", "best layer", "right", "right at the embedding", "above control labels", "random weights, best"], rows)],
        numbers={"curves": numbers},
        tells="from which layer on the last token of a word carries that this is a word, which its letters alone don't show.",
        cannot="that the model uses it, or knows what the word means.",
        source="Kaplan et al. (2410.05864, figure 2), with control labels (1909.03368), folds by lexeme and a model with random weights, which mixes letters too.",
    )  # fmt: skip


def copying(plan: Plan, own: Mapping[str, Measured]) -> dict:
    """Heads that look at what is to be copied: by token, by word; how alike families are; spans and sinks."""
    rows, numbers = {}, {}
    names = [name for name in plan.localised if own["copying"].facts["measured"][name]["token"]]
    profiles = {}
    for name in names:
        values = own["copying"].arrays[f"{name}/copying"]
        profiles[name] = np.nanmean(values[..., 0], 0)
        measured = own["copying"].facts["measured"][name]
        cells = []
        for route in (0, 1):
            kept = np.isfinite(values[..., route]).all((1, 2))
            if kept.sum() < 2:
                cells += ["–", "–"]
                continue
            mean = values[kept][..., route].mean(0)
            place = np.unravel_index(mean.argmax(), mean.shape)
            cells += [f"{place[0]}.{place[1]} ({mean.max():.2f})", int((mean > 0.1).sum())]
        rows[name] = [_label(name), *cells, f"{measured['token']}, {measured['concept']}"]
        numbers[name] = {
            "token": profiles[name],
            "concept": np.nanmean(values[..., 1], 0) if measured["concept"] else None,
        }
    alike = {
        (a, b): float(np.corrcoef(profiles[a].ravel(), profiles[b].ravel())[0, 1]) for a, b in combinations(names, 2)
    }
    spans = {}
    span_rows = []
    for name in plan.localised:
        arrays = own["copying"].of(name)
        spans[name] = {
            key: _mean(_couples(arrays[key].mean((1, 2))), plan.seed, _couple_clusters(plan.reporting(name)))
            for key in ("distance", "sink", "entropy")
        }
        span_rows.append([_label(name), *(_value(spans[name][key], ".2f") for key in ("distance", "sink", "entropy"))])
    others = [
        f"{_label(b if a == plan.reference else a)} {value:.2f}"
        for (a, b), value in alike.items()
        if plan.reference in (a, b)
    ]
    where = ""
    if others:
        _, token, tokens, word, words, _ = rows[plan.reference]
        where = (
            f"Copying? for {_label(plan.reference)} head {token} looks most at the token that comes next, {tokens} heads above 0.1; at the end of the word {word}, {words} heads. "
            f"Which heads do so correlates with {', '.join(others)}. "
        )
    reach = ", ".join(
        f"{_label(name)} {_value(spans[name]['sink'], '.2f')}" for name in plan.localised if name not in CONTROLS
    )
    return _section(
        "copying", "Are answers copied, token by token or as words?", [f"{where}Attention that rests on the first token (mean of heads): {reach}."],
        tables=[
            _table("Heads that look at the answer above, less at the wrong one (attention of the last token)", ["family", "most, next token", "heads > 0.1", "most, end of the word", "heads > 0.1", "pairs (token, word)"], list(rows.values())),
            _table("Where the last token looks, mean of heads", ["family", "distance, tokens", "on the first token", "entropy, 0 to 1"], span_rows),
        ],
        numbers={"profiles": numbers, "alike": {f"{a}/{b}": value for (a, b), value in alike.items()}, "spans": spans},
        tells="which heads look at the word that is to be given, at its next token or its end, and whether they are the same for another family.",
        cannot="that looking is copying; the section before last has the interventions. In arithmetic there is nothing above to copy, so it has no such number.",
        source="Feucht et al. (2504.03022) for the two routes, on repeated random tokens; ours on the families' own prompts, the wrong answer's places beside. Sinks: 2309.17453.",
    )  # fmt: skip


def cost(plan: Plan, measured: Models, main: str) -> dict | None:
    if "cost" not in measured[main]:
        return None
    rows, numbers = [], {}
    for name in plan.families:
        cells = []
        for model, tasks in measured.items():
            if not _has(tasks, name):
                cells.append("–")
                continue
            arrays = tasks["cost"].of(name)
            known = np.isfinite(arrays["nats"])
            rate = float(arrays["nats"][known].sum() / arrays["bytes"][known].sum()) if known.any() else None
            numbers[f"{model}/{name}"] = rate
            cells.append(_number(rate))
        rows.append([_label(name), *cells])
    answer = [
        f"Price of a right answer in {main}, nats a byte: "
        + ", ".join(f"{_label(name)} {_number(numbers[f'{main}/{name}'])}" for name in plan.families)
        + "."
    ]
    return _section(
        "cost", "What does a whole answer cost?", answer, tables=[_table("Nats a byte of the whole answer, given the prompt", ["family", *measured], rows)], numbers=numbers,
        tells="how surprising a right answer is, in a unit that does not depend on how a word is cut into tokens.",
        cannot="why. Short answers pay for their first letter alone; compare families with answers of like length.",
        source="Bits a byte are usual where tokenizers differ (for instance 2101.00027).",
    )  # fmt: skip


def change(
    plan: Plan,
    measured: Models,
    floor: Mapping[str, Measured] | None,
    changes: Changes,
    pair: tuple[str, str],
    *,
    number: int,
    seeds: Mapping[str, float],
    is_floor: bool,
) -> dict:
    """What training changed from the first to the second of ``pair``; of a twin: how far two seeds of one training differ. ``seeds``: of
    each family what a head's effect must change by (``_between_seeds``)."""
    earlier, later = pair
    found, numbers, tables, answer = changes[pair], {}, [], []
    weights = found["weights"].facts
    changed = [one for one in weights["weights"] if one["change"]]
    by_module, by_layer = weights["module"], {key: value for key, value in weights["layer"].items() if key != "None"}
    numbers |= {"by_module": by_module, "by_layer": by_layer}
    cka = significance.effects(
        found["representation"].arrays["change"],
        list(range(len(found["representation"].arrays["change"]))),
        seed=plan.seed,
    )
    numbers["representation"] = {"mean": cka.mean, "low": cka.low, "high": cka.high}
    what = f"{later} against {earlier}" + (" (two seeds of one training: the floor)" if is_floor else "")
    if not changed:
        answer.append(f"Changed, {what}: no weight; nothing else can differ.")
    else:
        modules = sorted(by_module, key=lambda name: -by_module[name]["share"])[:3]
        ranks = [one["effective_rank"] for one in changed if one["effective_rank"] is not None]
        layer = int(np.argmax(cka.mean))
        text = found["difference"].facts
        most = int(np.argmax(text["size"]))
        shares = ", ".join(f"{by_module[name]['share']:.0%} of the squared change in {name}" for name in modules)
        answer.append(
            f"Changed, {what}: {len(changed)} of {len(weights['weights'])} weights, {shares}; "
            f"effective rank {np.median(ranks):.1f} (median). Representations differ most behind layer {layer}: 1 - CKA {_entry(cka, (layer,), '.4f')}. "
            f"The mean difference is largest behind layer {most}, {text['size'][most]:.1%} of the stream's size (halves of the texts alone: {text['floor_size'][most]:.1%}), "
            f"its tokens agree between halves of the texts at {text['agreement'][most]:.0%} (floor {text['floor_agreement'][most]:.0%})."
        )
        tables.append(_table("Weights by module", ["module", "share of the squared change", "relative change", "effective rank"], [
            [name, f"{one['share']:.1%}", _number(one["relative"]), _number(one["effective_rank"])] for name, one in by_module.items()]))  # fmt: skip
        tables.append(_table("Tokens that the mean difference raises and lowers, by layer", ["behind layer", "size", "agreement (floor)", "raised", "lowered"], [
            [row, f"{text['size'][row]:.2%}", f"{text['agreement'][row]:.0%} ({text['floor_agreement'][row]:.0%})", " ".join(map(repr, text["up"][row][:NAMED])), " ".join(map(repr, text["down"][row][:NAMED]))]
            for row in range(0, len(text["size"]), max(1, len(text["size"]) // 6))]))  # fmt: skip
    units = {
        name: _units(plan, measured, floor, pair, name, 0.0 if is_floor else least) for name, least in seeds.items()
    }
    numbers["units"] = units
    answer.append(f"Heads, {what}: " + "; ".join(_unit_sentence(name, one) for name, one in units.items()) + ".")
    numbers["behaviour"] = {}
    for name in units:
        before, after = (_couples(_m(measured[model]["decision"], name)) for model in pair)
        numbers["behaviour"][name] = _paired(after, before, plan.seed, _couple_clusters(plan.families[name].pairs))
    closure = found["closure"].facts
    numbers["closure"] = closure
    for name, one in closure.items():
        answer.append(_closure_sentence(name, one, what))
        if one["points"]:
            tables.append(_table(
                f"Moving parts of {later} into {earlier}: share of the gap in {_behaviour(name)} that comes back", ["parts", "best", "random sets: mean", "most", "p", "lost when taken back"],
                [[point["size"], f"{point['recovered']:.2f} {_bounds(point['low'], point['high'])}", f"{point['random']:.2f}", f"{point['random_high']:.2f}", _number(point["p"]), f"{point['lost']:.2f}"] for point in one["points"]],
            ))  # fmt: skip
    tables.append(_table("Logit difference of the families, later minus earlier", ["family", "change", "would have been seen"],
                         [[_label(name), _value(one, "+.2f"), _number(one["detectable"])] for name, one in numbers["behaviour"].items()]))  # fmt: skip
    return _section(
        f"change-{number}-{earlier}-{later}", f"What changed from {earlier} to {later}?" if not is_floor else f"How far do two seeds differ: {earlier}, {later}?", answer, tables=tables, numbers=numbers,
        tells="where weights, representations and effects differ between two checkpoints, and which parts of the weights carry what the later one does better.",
        cannot="what another seed would give, unless a twin is compared: read each number beside the twin's. CKA is led by a few huge directions; a small number is not no change.",
        source="Mean differences: Minder et al. (2510.13900); moving weights: Panigrahi et al. (2302.06600); CKA: 1905.00414; effective rank: Roy and Vetterli 2007.",
    )  # fmt: skip


def _between_seeds(measured: Models, main: str, twin: str, name: str) -> float:
    """The largest difference of a head's mean effect between two seeds of one training, logits."""
    one, other = (values_of(measured[model]["localise"], name)["heads"].mean(0) for model in (main, twin))
    return float((one - other).abs().max())


def _units(
    plan: Plan,
    measured: Models,
    floor: Mapping[str, Measured] | None,
    pair: tuple[str, str],
    name: str,
    seed_floor: float,
) -> dict:
    before, after = (values_of(measured[model]["localise"], name) for model in pair)
    clusters = _couple_clusters(plan.choosing(name))
    least = significance.random_floor([floor["localise"].arrays[f"{name}/heads"]]) if floor else 0.0
    heads = training.unit_changes(
        before["heads"].numpy(), after["heads"].numpy(), clusters, seed=plan.seed, floor=least, seed_floor=seed_floor
    )
    neurons = training.top_shared(before["neurons"], after["neurons"], clusters, seed=plan.seed)
    parts = [set(localise.strongest(values, KINDS["components"])) for values in (before, after)]
    kinds = {
        key: [f"{layer}.{head}" for layer, head in np.argwhere(getattr(heads, key)).tolist()]
        for key in ("gained", "lost", "kept", "turned", "undecided")
    }
    order = np.argsort(-np.abs(heads.difference.mean), axis=None)[:NAMED]
    largest = [
        {
            "head": f"{layer}.{head}",
            "difference": float(heads.difference.mean[layer, head]),
            "found": bool(heads.difference.found[layer, head]),
        }
        for layer, head in zip(*np.unravel_index(order, heads.difference.mean.shape), strict=True)
    ]
    means = [values["heads"].numpy().mean(0).ravel() for values in (before, after)]
    return {
        "heads": kinds, "changed": int(heads.difference.found.sum()), "largest": largest, "n": len(clusters),
        "correlation": float(np.corrcoef(*means)[0, 1]) if all(mean.std() for mean in means) else None,
        "neurons_shared": neurons.shared / neurons.count, "components_shared": len(parts[0] & parts[1]) / len(parts[0]),
        "seen": heads.difference.q is not None,
    }  # fmt: skip


def _unit_sentence(name: str, one: Mapping) -> str:
    if not one["seen"]:
        return f"{_label(name)}, too few couples ({one['n']}) to tell heads that changed"
    heads = one["heads"]
    changed = (
        f"{one['changed']} of them differ in their part"
        if one["changed"]
        else "none differs in its part by more than chance"
    )
    named = (
        f" (gained {', '.join(heads['gained'][:NAMED]) or 'none'}; lost {', '.join(heads['lost'][:NAMED]) or 'none'})"
        if one["changed"]
        else ""
    )
    alike = "" if one["correlation"] is None else f", profiles correlate at {one['correlation']:.2f}"
    return f"{_label(name)}, {changed}{named}{alike}, {one['components_shared']:.0%} of the strongest parts and {one['neurons_shared']:.0%} of the strongest neurons stay"


def _behaviour(name: str) -> str:
    return "the log-probability of held-out answers" if name == "answers" else f"the logit difference of {_label(name)}"


def _closure_sentence(name: str, one: Mapping, what: str) -> str:
    unit = "nats a token" if name == "answers" else "logits"
    if not one["points"]:
        return f"Moved, {what}: {_behaviour(name)} shows no gap to recover ({one['note']}; n = {one['n']})."
    *steps, _ = one["points"]  # the last is all parts, which bring back everything
    told = "; ".join(
        f"the best {point['size']} {point['recovered']:.0%} {_bounds(point['low'], point['high'], '.0%')} (random {point['random']:.0%})"
        for point in steps
    )
    return (
        f"Moved, {what}: of the gap in {_behaviour(name)} ({one['gap']:+.3f} {unit}, n = {one['n']}) parts of the later weights bring back, "
        f"of {len(one['ranking'])} attentions and MLPs, {told}."
    )


# The page


def page(results: Mapping, pictures: Mapping[str, Path]) -> dict:
    """What ``report.write`` takes: the sections, with the pictures of their names as data."""
    sections = []
    for section in results["sections"]:
        kept = {key: section[key] for key in ("key", "question", "answer", "tables", "tells", "cannot", "source")}
        figures = [
            {"name": name, "data": base64.b64encode(path.read_bytes()).decode()}
            for name, path in pictures.items()
            if name == section["key"] or name.startswith(f"{section['key']}.")
        ]
        sections.append(kept | {"figures": figures})
    return {key: results[key] for key in ("title", "findings", "about", "models")} | {
        "layers": 0,
        "heads": 0,
        "comparison": sections,
    }


# Numbers


def _section(
    key: str, question: str, answer: list[str], *, tables, numbers, tells: str, cannot: str, source: str
) -> dict:
    return {
        "key": key,
        "question": question,
        "answer": answer,
        "tables": tables,
        "numbers": numbers,
        "tells": tells,
        "cannot": cannot,
        "source": source,
    }


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence]) -> dict:
    return {"caption": caption, "columns": list(columns), "rows": [[str(cell) for cell in row] for row in rows]}


def _count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _starred(cells: Mapping, plan: Plan) -> str:
    """What the star of a cell says, and what it takes: no p is below 1 / (sets + 1)."""
    tested = sum(cell is not None for cell in cells.values())
    least = int(np.ceil(tested / (plan.settings.draws + 1) / significance.LEVEL))
    takes = f"takes {least} of {tested} cells at the least p" if least <= tested else "can't be reached"
    return f"* more than random sets, q <= {significance.LEVEL}, which with {plan.settings.draws} sets {takes}"


def _label(name: str) -> str:
    return NAMES.get(name, name)


def _words(covariate: str) -> str:
    return {
        "tokens": "tokens",
        "entropy": "entropy of the answer, nats",
        "right": "right",
        "value_tokens": "tokens of the value",
    }[covariate]


def _couples(values: np.ndarray) -> np.ndarray:
    """Means of each couple, [couple, ...], from pairs; of one that has a value, that."""
    pairs = np.asarray(values, dtype=np.float64).reshape(-1, 2, *np.shape(values)[1:])
    known = np.isfinite(pairs)
    with np.errstate(invalid="ignore"):
        return np.where(known, pairs, 0).sum(1) / np.where(known.sum(1) > 0, known.sum(1), np.nan)


def _couple_clusters(pairs: Sequence) -> list[str]:
    return [pair.cluster for pair in pairs[::2]]


def _m(decision: Measured, name: str) -> np.ndarray:
    return (decision.arrays[f"{name}/answer"] - decision.arrays[f"{name}/wrong"])[:, -1]


def _has(tasks: Mapping[str, Measured], name: str) -> bool:
    """Whether the model was asked this family; controls are for the main one."""
    return f"{name}/answer" in tasks["decision"].arrays


def _right(decision: Measured, name: str) -> np.ndarray:
    return (_m(decision, name) > 0).astype(np.float64)


def _mean(values: np.ndarray, seed: int, clusters: Sequence | None = None) -> dict | None:
    """value, low, high, n, detectable of the values that are known, one a couple. None without any.

    ``clusters``: a label for each; by default each couple is its own, as those are that ``tasks`` builds.
    """
    values = np.asarray(values, dtype=np.float64)
    known = np.isfinite(values)
    labels = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    values, labels = values[known], labels[known].tolist()
    if not len(values):
        return None
    found = significance.effects(values[:, None], labels, seed=seed)
    low, high = (
        None if bound is None or not np.isfinite(bound[0]) else float(bound[0]) for bound in (found.low, found.high)
    )
    return {
        "value": float(values.mean()),
        "low": low,
        "high": high,
        "n": len(values),
        "detectable": _detectable(values, labels),
    }


def _detectable(values: np.ndarray, clusters: Sequence) -> float | None:
    """The mean that so many clusters of values of this spread would show with 80 % power at 5 %, two-sided."""
    from scipy.stats import t

    _, places = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sums = np.bincount(places, values - values.mean())
    n = len(sums)
    if n < 2 or not values.std():
        return None
    error = np.sqrt((sums**2).sum() * n / (n - 1)) / len(values)
    return float((t.ppf(localise.POWER, n - 1) + t.isf(significance.LEVEL / 2, n - 1)) * error)


def _share_of(right: np.ndarray, clusters: Sequence) -> dict:
    """``_mean`` of shares of right answers, each cluster one trial: Wilson's score interval (1927), which also near 0 and 1 is one."""
    from scipy.stats import norm

    p, n, z = float(right.mean()), len(set(clusters)), norm.isf(significance.LEVEL / 2)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return {"value": p, "low": float(centre - half), "high": float(centre + half), "n": len(right)}


def _paired(values: np.ndarray, reference: np.ndarray, seed: int, clusters: Sequence | None = None) -> dict | None:
    """``_mean`` of the differences, n-th couple less n-th couple."""
    n = min(len(values), len(reference))
    return _mean(values[:n] - reference[:n], seed, clusters)


def _value(found: Mapping | None, form: str) -> str:
    return (
        "–"
        if found is None
        else f"{format(found['value'], form)} {_bounds(found['low'], found['high'], form.lstrip('+'))}".strip()
    )


def _percent(found: Mapping | None) -> str:
    return _value(found, ".0%")


def _bounds(low: float | None, high: float | None, form: str = ".2f") -> str:
    """An interval as text, no -0 in it; nothing if there is none. With one bound alone it has no other end."""
    low, high = (
        None if bound is None or not np.isfinite(bound) else format(bound, f"z{form}") for bound in (low, high)
    )
    return "" if low is None and high is None else f"[{low or '−∞'}, {high or '∞'}]"


def _detected(found: Mapping | None) -> str:
    return "" if found is None else _number(found["detectable"])


def _unseen(found: Mapping, form: str) -> str:
    """What a null would have shown, where the interval holds 0."""
    low, high = found["low"], found["high"]
    is_null = (low, high) != (None, None) and (low is None or low <= 0) and (high is None or high >= 0)
    return f"; {format(found['detectable'], form)} would have been seen" if is_null and found["detectable"] else ""


def _entry(effects: significance.Effects, place: tuple, form: str = "+.2f") -> str:
    bounds = "" if effects.low is None else f" {_bounds(effects.low[place], effects.high[place], form.lstrip('+'))}"
    return f"{format(effects.mean[place], form)}{bounds}"


def _cell(cell: localise.Cell | None) -> str:
    return "no gap" if cell is None else f"{cell.loss:+.2f}{'*' if cell.found else ''} ({cell.random:+.2f})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
