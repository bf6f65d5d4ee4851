"""Attacks a reward before anyone trains on it: what each attack and each null policy earns beside an honest answer.

A reward has a problem when

- an attack earns more than the honest answer on more than ``TOLERANCE`` of the rows, or on average;
- an attack without the right form earns more than an honest miss, likewise;
- an answer that names several forms, the right one among them, earns more than guessing one of them does on average;
- the gold answer earns less than an honest answer, or than itself written in another Unicode form;
- a null policy is not below the honest answer by a tenth of the way from the policy to the gold answer, on average, or
  earns as much as the honest answer on more than a tenth of the rows: they are free;
- a term, or the whole, is the same for every text (dead), or a reference that can't be read is paid for.

A term that is None for every text is switched off: that is said, and is no problem.
"""

import random
import statistics
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from stoney_rl import terminal
from stoney_rl.lexemes import contains_form
from stoney_rl.rewards.attacks import ATTACKS, NULL_POLICIES, REFERENCES, Ground, alternatives, said
from stoney_rl.rewards.composite import Task
from stoney_rl.rewards.knowledge import Knowledge

TOLERANCE = 0.01  # share of the rows on which an attack may win
MIN_GAP = 0.1  # of the way from a null policy to the gold answer that an honest answer must be above it
MAX_FREE = 0.1  # share of the rows on which a null policy may earn as much as an honest answer
UNREADABLE = "???"
EPSILON = 1e-9

# (tasks, texts) -> for each text, value by term; "total" is the reward. None: could not be scored.
Scorer = Callable[[Sequence[Task], Sequence[str]], list[dict[str, float | None]]]


@dataclass
class Report:
    """``lines``: one dictionary an attack, reference or null policy; ``terms``: one a term; ``problems``: sentences."""

    tasks: int
    lines: list[dict] = field(default_factory=list)
    terms: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict:
        return {
            "tasks": self.tasks,
            "lines": self.lines,
            "terms": self.terms,
            "notes": self.notes,
            "problems": self.problems,
        }


def probe(
    scorer: Scorer,
    tasks: Sequence[Task],
    knowledge: Knowledge,
    *,
    num_samples: int = 100,
    seed: int = 0,
    policies: Mapping[str, Sequence[str]] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Attack ``scorer`` on ``num_samples`` of the tasks, drawn by ``seed``.

    ``policies``: further null policies, such as the base model: name -> a text for each task of the sample, as
    ``sample`` draws it.
    """
    chosen = sample(tasks, num_samples, seed)
    ground = Ground(tasks, knowledge, random.Random(f"attacks {seed}"))
    report = Report(len(chosen))
    everything: list[dict[str, float | None]] = []

    def run(make: Callable[[Task, Ground], str | None]) -> tuple[dict[int, dict], dict[int, str]]:
        texts = {at: text for at, task in enumerate(chosen) if (text := make(task, ground)) is not None}
        values = scorer([chosen[at] for at in texts], list(texts.values())) if texts else []
        everything.extend(values)
        return dict(zip(texts, values, strict=True)), texts

    scored = {}
    for name, make in REFERENCES.items():
        progress(name)
        scored[name], _ = run(make)
        report.lines.append(_line("reference", name, scored[name]))
    gold, honest, miss = (_totals(scored[name]) for name in ("gold", "honest answer", "honest miss"))
    _check_gold(report, scorer, chosen, gold, honest)

    for name, make in ATTACKS.items():
        progress(name)
        values, texts = run(make)
        earned = _totals(values)
        without = [at for at in earned if chosen[at].wanted and not _has_all(texts[at], chosen[at], values[at])]
        line = _line("attack", name, values)
        line["beats honest"] = _share_above(earned, honest, list(earned))
        line["beats miss"] = _share_above(earned, miss, without)
        won = next((at for at in earned if at in honest and earned[at] > honest[at] + EPSILON), None)
        won = (
            won
            if won is not None
            else next((at for at in without if at in miss and earned[at] > miss[at] + EPSILON), None)
        )
        line["where"] = chosen[won].id if won is not None else None
        report.lines.append(line)
        for kind, against, rows in (("honest answer", honest, list(earned)), ("honest miss", miss, without)):
            share = line["beats honest" if kind == "honest answer" else "beats miss"]
            common = [at for at in rows if at in against]
            ahead = common and statistics.fmean(earned[at] for at in common) > EPSILON + statistics.fmean(
                against[at] for at in common
            )
            if share is not None and (share > TOLERANCE or ahead):
                report.problems.append(
                    f"attack '{name}' earns more than an {kind} on {share:.0%} of {len(common)} rows (such as {line['where'] or 'on average'})"
                )

    _check_hedging(report, scorer, chosen, ground)
    null = {name: run(make) for name, make in NULL_POLICIES.items()}
    for name, texts in (policies or {}).items():
        given = dict(zip(chosen, texts, strict=True))
        null[name] = run(lambda task, _, given=given: given[task])
    for name, (values, _) in null.items():
        report.lines.append(_line("null policy", name, values))
        _check_null(report, name, _totals(values), honest, gold)
    _check_terms(report, everything, {name: values for name, (values, _) in null.items()}, scored)
    _check_unreadable(report, scorer, chosen, gold)
    report.notes += _giveaways(chosen)
    return report


def sample(tasks: Sequence[Task], number: int, seed: int) -> list[Task]:
    """``number`` of the tasks at random, in their order (all of them if there are no more)."""
    chosen = set(random.Random(f"tasks {seed}").sample(range(len(tasks)), min(number, len(tasks))))
    return [task for at, task in enumerate(tasks) if at in chosen]


def _totals(values: Mapping[int, dict]) -> dict[int, float]:
    return {at: value["total"] for at, value in values.items() if value["total"] is not None}


def _line(kind: str, name: str, values: Mapping[int, dict]) -> dict:
    totals = list(_totals(values).values())
    return {
        "kind": kind,
        "name": name,
        "rows": len(values),
        "unscored": len(values) - len(totals),
        "mean": statistics.fmean(totals) if totals else None,
    }


def _has_all(text: str, task: Task, value: Mapping) -> bool:
    hit = value.get("hit")
    return hit == 1 if hit is not None else all(contains_form(text, form) for form in task.wanted)


def _share_above(earned: Mapping[int, float], against: Mapping[int, float], rows: Sequence[int]) -> float | None:
    common = [at for at in rows if at in against and at in earned]
    return sum(earned[at] > against[at] + EPSILON for at in common) / len(common) if common else None


def _check_gold(report: Report, scorer: Scorer, chosen: Sequence[Task], gold: dict, honest: dict) -> None:
    below = sum(gold[at] < honest[at] - EPSILON for at in gold if at in honest)
    if gold and below > TOLERANCE * len(gold):
        report.problems.append(
            f"the gold answer earns less than an honest answer in other words on {below} of {len(gold)} rows"
        )
    decomposed = scorer(chosen, [unicodedata.normalize("NFD", task.reference) for task in chosen])
    differing = sum(
        value["total"] is not None and abs(value["total"] - gold[at]) > 1e-6
        for at, value in enumerate(decomposed)
        if at in gold
    )
    if differing:
        report.problems.append(
            f"the gold answer in NFD earns something else than in NFC on {differing} of {len(gold)} rows"
        )
    if not gold:
        report.problems.append("no gold answer could be scored: the reward is None for every one")


def _check_hedging(report: Report, scorer: Scorer, chosen: Sequence[Task], ground: Ground) -> None:
    """Each form named by itself against all of them in one answer, on average: whoever does not know the form would list."""
    rows, asked, texts = [], [], []  # of each row the list comes first
    for at, task in enumerate(chosen):
        if others := alternatives(task, ground):
            listed = said([*task.wanted, *others])
            guesses = [said([form, *task.wanted[1:]]) for form in (task.wanted[0], *others)]
            texts += [listed, *guesses]
            rows += [at] * (1 + len(guesses))
            asked += [task] * (1 + len(guesses))
    scores = defaultdict(list)
    for at, value in zip(rows, scorer(asked, texts) if texts else [], strict=True):
        scores[at].append(value["total"])
    gains = [
        hedged - statistics.fmean(guesses) for hedged, *guesses in scores.values() if None not in (hedged, *guesses)
    ]
    winning = sum(gain > EPSILON for gain in gains)
    if gains and (winning > TOLERANCE * len(gains) or statistics.fmean(gains) > EPSILON):
        report.problems.append(
            f"naming several forms, the right one among them, earns more than guessing one of them on {winning} of {len(gains)} rows "
            f"({statistics.fmean(gains):+.3f} on average)"
        )


def _check_null(report: Report, name: str, earned: dict, honest: dict, gold: dict) -> None:
    common = [at for at in earned if at in honest and at in gold]
    if not common:
        return
    mine, theirs, best = (statistics.fmean(values[at] for at in common) for values in (earned, honest, gold))
    if theirs - mine < MIN_GAP * max(best - mine, EPSILON):
        report.problems.append(
            f"null policy '{name}' earns {mine:.3f}, an honest answer {theirs:.3f}, the gold answer {best:.3f}: nothing has to be "
            "learned"
        )
    free = sum(earned[at] >= honest[at] - EPSILON for at in common)
    if free > MAX_FREE * len(common):
        report.problems.append(
            f"null policy '{name}' earns as much as an honest answer on {free} of {len(common)} rows: they pay for nothing"
        )


def _check_terms(report: Report, everything: list[dict], null: Mapping[str, Mapping], scored: Mapping) -> None:
    for name in everything[0] if everything else ():
        values = [value[name] for value in everything if value[name] is not None]
        entry = {
            "term": name,
            "unscored": 1 - len(values) / len(everything),
            "gold": _mean(scored["gold"].values(), name),
            "honest": _mean(scored["honest answer"].values(), name),
            "floor": max(
                (mean for runs in null.values() if (mean := _mean(runs.values(), name)) is not None), default=None
            ),
        }
        if not values:
            entry["state"] = "off"
            report.notes.append(f"term {name} could not be scored for any text: it is off")
        elif max(values) - min(values) < EPSILON:
            entry["state"] = "dead"
            report.problems.append(
                f"term {name} is {values[0]:.3g} for every text: it is dead, and only moves the baseline"
            )
        else:
            entry["state"] = "alive"
        report.terms.append(entry)


def _mean(values, name: str) -> float | None:
    found = [value[name] for value in values if value[name] is not None]
    return statistics.fmean(found) if found else None


def _check_unreadable(report: Report, scorer: Scorer, chosen: Sequence[Task], gold: dict) -> None:
    """A reference without a word must not pay: nothing can match it."""
    broken = [replace(task, reference=UNREADABLE, wanted=()) for task in chosen]
    answer = "An answer about something else."
    for text, what in ((answer, "any answer"), (f"<think>A trace.</think>{answer}", "any answer after a trace")):
        paid = [value["total"] for value in scorer(broken, [text] * len(broken)) if value["total"] is not None]
        if paid and gold and statistics.fmean(paid) > 0.5 * statistics.fmean(gold.values()):
            report.problems.append(
                f"a reference that can't be read ({UNREADABLE!r}) pays {statistics.fmean(paid):.3f} for {what}; it should be None"
            )


def _giveaways(chosen: Sequence[Task]) -> list[str]:
    silent = sum(not task.wanted for task in chosen)
    notes = []
    if silent:
        notes.append(
            f"{silent} of {len(chosen)} rows ask for no form that their question lacks: there the form terms are silent, and "
            "only likeness to the reference is left"
        )
    given = [
        task.id for task in chosen if any(contains_form(task.question, form) for form in (*task.wanted, task.reference))
    ]
    if given:
        notes.append(
            f"{len(given)} of {len(chosen)} prompts give the answer or a wanted form away (such as {given[0]})"
        )
    return notes


def as_text(report: Report) -> str:
    """The table, each term's floor, what was noted, and the problems."""
    header = ["", "rows", "mean", "beats honest", "beats miss", "where it wins"]
    cells = []
    for line in report.lines:
        share = [line.get(key) for key in ("beats honest", "beats miss")]
        cells.append(
            [
                line["name"],
                str(line["rows"]),
                _number(line["mean"]),
                *("-" if value is None else f"{value:.1%}" for value in share),
                line.get("where") or "",
            ]
        )
    kinds = [line["kind"] for line in report.lines]
    lines = terminal.grid(header, cells, rules=len(cells))
    out = lines[:2]
    for at, line in enumerate(lines[2:]):
        if at and kinds[at] != kinds[at - 1]:
            out.append(lines[1])
        out.append(line)
    out += ["", *terminal.grid(
        ["term", "state", "gold", "honest", "best null policy", "unscored"],
        [
            [t["term"], t["state"], _number(t["gold"]), _number(t["honest"]), _number(t["floor"]), f"{t['unscored']:.0%}"]
            for t in report.terms
        ],
        rules=max(1, len(report.terms)),
    ), ""]  # fmt: skip
    out += report.notes
    out += [f"✗ {problem}" for problem in report.problems] or [
        f"✓ No attack beats an honest answer and no null policy earns one's reward, on {report.tasks} rows."
    ]
    return "\n".join(out)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
