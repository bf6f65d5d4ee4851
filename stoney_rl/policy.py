"""What GRPO did to the policy, by measures that it was not paid for: held-out answers before, during and after training.

The reward is what was optimised, so its rise proves nothing. Form accuracy and chrF++ of greedy answers to held-out
prompts are not in it as such, and neither are length, truncation, and how often one answer serves for all. ``signs`` says
where the reward rose and the answers did not get better.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from stoney_rl import records
from stoney_rl.data import Row
from stoney_rl.metrics import chrf, intervals
from stoney_rl.metrics.report import lexeme_clusters
from stoney_rl.rewards import terms
from stoney_rl.rewards.completions import parse
from stoney_rl.rewards.composite import Task
from stoney_rl.text import fold

HELD_OUT_FILE = "held_out.jsonl"
CLEAN = "✓ no sign that the reward was gamed"
COLLAPSED = 0.25  # of the prompts get one and the same answer
TRUNCATED_RISE = 0.25
LENGTH_FACTOR = 2.0
MATERIAL = {"form accuracy": 0.0, "chrF++": 1.0}  # a rise of less, or one that may be chance, is none
NAMES = {"reward": "reward", "form_accuracy": "form accuracy", "chrf": "chrF++"}


@dataclass(frozen=True)
class Measurement:
    """Greedy answers to the held-out prompts after ``step`` updates, one value a row; None: nothing to score."""

    step: int
    answers: list[str]
    rewards: list[float | None]
    forms: list[float | None]
    tokens: list[int]
    truncated: list[bool]

    def summary(self) -> dict[str, float]:
        """Means over the rows that could be scored, by the names that are logged."""
        means = {"reward": _mean(self.rewards), "form_accuracy": _mean(self.forms)}
        means |= {"tokens": _mean(self.tokens), "truncated": _mean(self.truncated)}
        means["most_common_answer"] = most_common(self.answers)[1]
        return {name: value for name, value in means.items() if value is not None}


@dataclass
class HeldOut:
    """Measures a policy on ``rows``, and keeps what it found in ``path``.

    ``answer``: () -> [(text, tokens, truncated)] of the policy as it is now.
    """

    rows: Sequence[Row]
    tasks: Sequence[Task]
    scorer: Callable
    answer: Callable[[], list[tuple[str, int, bool]]]
    path: Path
    measurements: list[Measurement] = field(default_factory=list)

    def resume(self, step: int) -> None:
        """Take up the measurements up to ``step`` that an earlier process made."""
        self.measurements = [Measurement(**line) for line in records.keep_steps(self.path, step)]

    def measure(self, step: int) -> Measurement:
        """The policy's answers now, scored; kept in ``measurements``, and not made twice for one step."""
        if self.measurements and self.measurements[-1].step == step:
            return self.measurements[-1]
        texts, tokens, truncated = map(list, zip(*self.answer(), strict=True))
        scores = self.scorer(self.tasks, texts)
        answers = [parse(text).answer for text in texts]
        forms = terms.hit(answers, [task.wanted for task in self.tasks])
        found = Measurement(step, texts, [score["total"] for score in scores], forms, tokens, truncated)
        self.measurements.append(found)
        records.append(self.path, [asdict(found)])
        return found

    def compare(self, *, seed: int) -> dict:
        """The last measurement against the first, row by row, with the signs that the reward was gamed."""
        first, last = self.measurements[0], self.measurements[-1]
        clusters = lexeme_clusters([row.lexemes for row in self.rows])
        options = {"seed": seed, "clusters": clusters}
        references = [task.reference for task in self.tasks]
        counts = [
            chrf.statistics(predictions=[parse(text).answer for text in one.answers], references=references)
            for one in (first, last)
        ]
        found = {
            "reward": intervals.mean_difference(first.rewards, last.rewards, **options),
            "form_accuracy": intervals.mean_difference(first.forms, last.forms, bounds=(0, 1), **options),
            "chrf": intervals.chrf_difference(*counts, **options),
        }
        values = {
            "reward": (_mean(first.rewards), _mean(last.rewards)),
            "form_accuracy": (_mean(first.forms), _mean(last.forms)),
            "chrf": tuple(float(chrf.score_from_counts(one.sum(axis=0))) for one in counts),
        }
        return {
            "n": len(self.rows),
            "clusters": len(set(clusters)),
            "steps": [first.step, last.step],
            "measures": {
                name: {
                    "before": values[name][0],
                    "after": values[name][1],
                    "difference": asdict(difference) if difference is not None else None,
                }
                for name, difference in found.items()
            },
            "before": first.summary(),
            "after": last.summary(),
            "signs": signs(first, last, found, references),
            "chrf_signature": chrf.signature(),
        }


def signs(first: Measurement, last: Measurement, found: dict, references: Sequence[str]) -> list[str]:
    """Sentences, each a sign that the reward was gamed, or that the policy broke."""
    said = []
    rise, others = found["reward"], {"form accuracy": found["form_accuracy"], "chrF++": found["chrf"]}
    measured = {name: other for name, other in others.items() if other is not None}
    better = [name for name, other in measured.items() if _is_rise(other) and other.value >= MATERIAL[name]]
    if _rose(rise) and not better:
        shown = " and ".join(f"{name} ({other.value:+.2f})" for name, other in measured.items())
        said.append(
            f"the reward rose by {rise.value:.3f}, and {shown} did not clearly rise with it: what is paid is not what is wanted"
        )
    unscored = sum(value is None for value in last.rewards)
    if unscored > sum(value is None for value in first.rewards):
        said.append(f"the reward could not score {unscored} of {len(last.rewards)} answers, more than before")
    answer, share = most_common(last.answers)
    if share >= COLLAPSED and share > 1.5 * max(most_common(first.answers)[1], most_common(references)[1]):
        said.append(f"{share:.0%} of the prompts get one answer: {_short(answer)!r}")
    longer = max(_mean(last.tokens), 1) / max(_mean(first.tokens), 1)  # an empty answer has 0 tokens
    cut = _mean(last.truncated) - _mean(first.truncated)
    if not 1 / LENGTH_FACTOR <= longer <= LENGTH_FACTOR:
        said.append(
            f"answers are {longer:.1f} times as long: {_mean(first.tokens):.0f} and {_mean(last.tokens):.0f} tokens"
        )
    if cut >= TRUNCATED_RISE:
        said.append(f"{_mean(last.truncated):.0%} of the answers never end, {_mean(first.truncated):.0%} before")
    return said


def _is_rise(found: intervals.Difference) -> bool:
    return found.value > 0 and (found.low is None or found.low > 0)


def _rose(rise: intervals.Difference | None) -> bool:
    """Whether the reward is above what it was. Where every row rose by the same there is no interval, and no doubt."""
    return bool(rise and _is_rise(rise) and rise.units >= intervals.MIN_UNITS)


def most_common(answers: Sequence[str]) -> tuple[str, float]:
    """The most frequent answer, folded, and its share."""
    answer, count = Counter(fold(answer) for answer in answers).most_common(1)[0]
    return answer, count / len(answers)


def as_text(comparison: dict) -> str:
    """The comparison in lines: each measure with its interval, what else changed, then what looks like gaming."""
    lines = [f"greedy answers to {comparison['n']} held-out prompts ({comparison['clusters']} lexeme groups), "
             f"after {comparison['steps'][0]} and {comparison['steps'][1]} updates:"]  # fmt: skip
    for name, found in comparison["measures"].items():
        if found["before"] is None and found["after"] is None:
            continue  # no held-out row asks for a form
        before, after = (_number(found[when], name) for when in ("before", "after"))
        lines.append(f"  {NAMES[name]:<18} {before:>8} -> {after:>8}   {_change(found['difference'], name)}".rstrip())
    others = {"tokens": "tokens an answer", "truncated": "cut at the limit", "most_common_answer": "most common answer"}
    for name, label in others.items():
        before, after = (comparison[when][name] for when in ("before", "after"))
        shown = [f"{value:.1f}" if name == "tokens" else f"{value:.0%}" for value in (before, after)]
        lines.append(f"  {label:<18} {shown[0]:>8} -> {shown[1]:>8}")
    few = comparison["clusters"] < intervals.MIN_UNITS
    none = "too few held-out prompts to tell whether the reward was gamed" if few else CLEAN
    lines += [f"✗ sign of gaming or collapse: {sign}" for sign in comparison["signs"]] or [none]
    return "\n".join(lines)


def _number(value: float | None, name: str, sign: str = "") -> str:
    digits = 3 if name == "reward" else 2
    return "unscored" if value is None else f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def _change(difference: dict | None, name: str) -> str:
    if difference is None:
        return ""
    n = f"n = {difference['n']}"
    value = _number(difference["value"], name, "+")
    if difference["units"] < intervals.MIN_UNITS:
        return f"{value} (too few to tell, {n})"
    if difference["low"] is None:
        return f"{value} (every row alike, {n})"
    return f"{value} [{_number(difference['low'], name, '+')}, {_number(difference['high'], name, '+')}] {n}"


def plot(metrics: Sequence[dict], measurements: Sequence[Measurement], path: Path, *, title: str) -> None:
    """Reward, held-out measures, groups and policy over the updates, as one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    ((reward, quality), (groups, drift)) = figure.subplots(2, 2, sharex=True)
    figure.suptitle(title)

    def line(axes, name: str, label: str, **style: str) -> None:
        points = [(entry["step"], entry[name]) for entry in metrics if entry.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, **style)

    def held_out(axes, name: str, label: str) -> None:
        points = [(one.step, one.summary()[name]) for one in measurements if name in one.summary()]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=label, markersize=5)

    line(reward, "reward", "sampled, training prompts")
    held_out(reward, "reward", "greedy, held-out prompts")
    held_out(quality, "form_accuracy", "form accuracy, held-out")
    line(quality, "terms/hit/mean", "form accuracy, sampled")
    line(quality, "terms/R_lex/mean", "R_lex, sampled")
    line(groups, "zero_spread", "groups without spread")
    line(groups, "completions/clipped_ratio", "truncated")
    held_out(groups, "most_common_answer", "most common answer")
    line(drift, "entropy", "entropy (left)")
    divergence = drift.twinx() if any(entry.get("kl") is not None for entry in metrics) else None
    if divergence:
        line(divergence, "kl", "KL to the start (right)", color="C1")
        divergence.set_ylabel("nats a token")
    for axes, name, heading in (
        (reward, "reward", "What is paid"),
        (quality, "share", "What is wanted"),
        (groups, "share", "Groups and answers"),
        (drift, "nats a token", "The policy"),
    ):
        axes.set_title(heading, fontsize=10)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        if name == "share":
            axes.set_ylim(-0.03, 1.03)
        lines = [*axes.lines, *(divergence.lines if divergence and axes is drift else ())]
        if lines:
            axes.legend(handles=lines, fontsize=8)
    for axes in (groups, drift):
        axes.set_xlabel("updates")
    figure.savefig(path, dpi=130)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
