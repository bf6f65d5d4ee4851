"""Comparisons: values by hand, against sacreBLEU's own command, and by simulation. All words are of the planted language."""

import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from stoney_rl import planted
from stoney_rl.errors import StoneyError
from stoney_rl.metrics import bleu, chrf, comparison, intervals, suite
from stoney_rl.metrics.score import Score, row_mean

STEMS = planted.PlantedLanguage(0, 110).stems
FORMS = [planted.inflect(stem, rule) for stem in STEMS for rule in planted.RULES]


def mean(sums):
    return sums[..., 0] / sums[..., 1]


def values(numbers):
    return [(number, 1.0) for number in numbers]


def answers(share, *, seed, n=400):
    """Sentences of five forms and, as a system that is right in ``share`` of the words would give them, their answers."""
    rng, sentences = np.random.default_rng(7), np.random.default_rng(seed)
    references = [list(rng.choice(FORMS, size=5)) for _ in range(n)]
    given = [[w if sentences.random() < share else str(sentences.choice(FORMS)) for w in line] for line in references]
    return [" ".join(line) for line in given], [" ".join(line) for line in references]


def rows(share, *, seed, n=60):
    predictions, references = answers(share, seed=seed, n=n)
    return [
        {"id": i, "prompt": f"Question {i}?", "reference": reference, "prediction": prediction, "seen": i % 3 == 0,
         "forms": reference.split(), "lexemes": [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}"]}
        for i, (prediction, reference) in enumerate(zip(predictions, references, strict=True))
    ]  # fmt: skip


METRICS = {name: suite.STRING_METRICS[name] for name in ("chrf", "exact", "form")}


def table(name, lines, metrics=METRICS):
    return comparison.table(name, lines, suite.score_rows(metrics, lines))


def found(compared, group, metric, a, b):
    [one] = [
        one for one in compared["differences"]
        if (one["group"], one["metric"], one["a"], one["b"]) == (group, metric, a, b)
    ]  # fmt: skip
    return one


# Approximate randomisation.


def test_randomisation_is_the_exact_test_where_that_can_be_counted():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=10), rng.normal(0.5, 1, size=10)
    signs = np.array(list(itertools.product([1, -1], repeat=10)))
    exact = (np.abs(signs @ (b - a)) >= abs((b - a).sum()) - 1e-12).mean()
    assert intervals.randomisation_p(values(a), values(b), mean, seed=0) == pytest.approx(exact, abs=0.015)
    # Clusters of two are swapped together: 2^5 ways.
    signs = np.repeat(np.array(list(itertools.product([1, -1], repeat=5))), 2, axis=1)
    exact = (np.abs(signs @ (b - a)) >= abs((b - a).sum()) - 1e-12).mean()
    clusters = [i // 2 for i in range(10)]
    p = intervals.randomisation_p(values(a), values(b), mean, seed=0, clusters=clusters)
    assert p == pytest.approx(exact, abs=0.015)


def test_randomisation_by_hand():
    # Five rows, all from wrong to right: of 2^5 swaps, two give so large a difference.
    p = intervals.randomisation_p(values([0.0] * 5), values([1.0] * 5), mean, seed=0)
    assert p == pytest.approx(2 / 32, abs=0.01)
    assert intervals.randomisation_p(values([0.3] * 5), values([0.3] * 5), mean, seed=0) == 1.0
    assert intervals.randomisation_p([], [], mean, seed=0) is None


def test_trials_in_blocks_are_the_same_trials(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = values(rng.normal(size=30)), values(rng.normal(0.3, 1, size=30))
    whole = intervals.randomisation_p(a, b, mean, seed=3, trials=1000)
    monkeypatch.setattr(intervals, "_DRAWS", 210)
    assert intervals.randomisation_p(a, b, mean, seed=3, trials=1000) == whole


@pytest.fixture(scope="module")
def pairs():
    first, references = answers(0.50, seed=1)
    second, _ = answers(0.55, seed=2)
    return first, second, references


@pytest.mark.parametrize(("test", "kind"), [("ar", "json"), ("bs", "text")])
def test_equal_to_sacrebleus_command_line(pairs, tmp_path, test, kind):
    """400 pairs: scores, signatures and p are those that the command prints (it can't print a bootstrap as JSON)."""
    for name, lines in zip(("first", "second", "references"), pairs, strict=True):
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [
        *(sys.executable, "-m", "sacrebleu", "references", "-i", "first", "second", "-m", "bleu", "chrf"),
        *(
            "--chrf-word-order",
            "2",
            f"--paired-{test}",
            f"--paired-{test}-n",
            "300",
            "-f",
            kind,
            "-w",
            "10",
            "--no-color",
        ),
    ]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    first, second, references = pairs
    ours = comparison.sacrebleu_test({"first": first, "second": second}, references, test=test, samples=300)
    scored = {metric: list(found["systems"].values()) for metric, found in ours.items()}
    if kind == "json":
        theirs = [[system["BLEU"], system["chrF2++"]] for system in json.loads(printed)]
        shown = [[(one["score"], one["p_value"]) for one in system] for system in theirs]
        assert shown == [[(one["score"], one["p"]) for one in system] for system in zip(*scored.values(), strict=True)]
    else:
        for baseline, system in scored.values():
            assert f"{baseline['score']:.10f}" in printed and f"{system['score']:.10f}" in printed
            assert f"(p = {system['p']:.4f})" in printed
        for found in ours.values():
            assert set(found["signature"].split("|")) <= set(re.split(r"[|\s]+", printed))
    assert all(f"{test}:300|seed:12345" in found["signature"] for found in ours.values())


@pytest.mark.parametrize("metric", [bleu, chrf])
def test_rows_without_clusters_have_sacrebleus_p(pairs, metric):
    first, second, references = pairs
    a, b = (metric.statistics(predictions=texts, references=references) for texts in (first, second))
    theirs = comparison.sacrebleu_test({"first": first, "second": second}, references, test="ar", samples=500)
    name = "BLEU" if metric is bleu else "chrF2++"
    p = intervals.randomisation_p(a, b, metric.score_from_counts, seed=12345, trials=500)
    assert 1 / 501 < p < 1
    assert p == theirs[name]["systems"]["second"]["p"]


def test_equal_systems_are_rejected_one_time_in_twenty():
    """1,000 comparisons of two systems that differ by chance alone, 40 lexemes of three rows that go together."""
    rng = np.random.default_rng(0)
    clusters = [i // 3 for i in range(120)]
    rejected = {"clusters": 0, "rows": 0}
    for seed in range(1000):
        differences = np.repeat(rng.normal(size=40), 3) + 0.3 * rng.normal(size=120)
        a, b = values(np.zeros(120)), values(differences)
        rejected["clusters"] += intervals.randomisation_p(a, b, mean, seed=seed, trials=199, clusters=clusters) <= 0.05
        rejected["rows"] += intervals.randomisation_p(a, b, mean, seed=seed, trials=199) <= 0.05
    assert 0.035 <= rejected["clusters"] / 1000 <= 0.065
    assert rejected["rows"] / 1000 > 0.2, "rows of one lexeme taken as independent claim too much"


def test_holm_by_hand():
    # In order 0.005 x 4, 0.01 x 3, 0.03 x 2; then 0.04 x 1, but not below the one before.
    assert intervals.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert intervals.holm([0.9, 0.6]) == [1.0, 1.0]
    assert intervals.holm([]) == []


# The smallest difference that could have been shown.


def test_detectable_difference_is_blooms_formula_for_normal_differences():
    from scipy.stats import norm, t

    differences = np.random.default_rng(0).normal(size=200)
    expected = (t.ppf(0.975, 199) + norm.ppf(0.8)) * differences.std(ddof=1) / 200**0.5
    args = (values(np.zeros(200)), values(differences), mean)
    assert intervals.detectable_difference(*args, seed=0) == pytest.approx(expected, rel=0.04)
    shifted = intervals.detectable_difference(values(np.zeros(200)), values(differences + 5), mean, seed=0)
    assert shifted == pytest.approx(intervals.detectable_difference(*args, seed=0)), "whatever difference was seen"


def test_a_difference_of_that_size_is_found_four_times_in_five():
    rng = np.random.default_rng(1)
    clusters = [i // 2 for i in range(160)]

    def differences(shift):
        return np.repeat(rng.exponential(size=80) - 1, 2) + rng.normal(size=160) + shift

    size = np.mean(
        [
            intervals.detectable_difference(
                values(np.zeros(160)), values(differences(0)), mean, seed=seed, clusters=clusters, simulations=500
            )
            for seed in range(10)
        ]
    )
    power = np.mean(
        [
            intervals.randomisation_p(
                values(np.zeros(160)), values(differences(size)), mean, seed=seed, trials=199, clusters=clusters
            )
            <= 0.05
            for seed in range(400)
        ]
    )
    assert 0.72 <= power <= 0.88


def test_detectable_difference_of_chrf_shrinks_with_the_root_of_n(pairs):
    first, second, references = pairs
    a, b = (chrf.statistics(predictions=texts, references=references) for texts in (first, second))
    small = intervals.detectable_difference(a[:100], b[:100], chrf.score_from_counts, seed=0)
    large = intervals.detectable_difference(a, b, chrf.score_from_counts, seed=0)
    assert small / large == pytest.approx(2, rel=0.2)


def test_without_spread_or_rows_no_difference_is_called_detectable():
    assert intervals.detectable_difference(values([0.5] * 30), values([0.5] * 30), mean, seed=0) is None
    assert intervals.detectable_difference(values(range(9)), values([0] * 9), mean, seed=0) is None


def test_coverage_of_a_clustered_difference():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        sizes = rng.integers(1, 5, size=50)
        clusters = np.repeat(np.arange(50), sizes)
        differences = np.repeat(rng.exponential(size=50), sizes) + rng.normal(size=len(clusters))  # of mean 1
        one = intervals.statistic_difference(
            values(np.zeros(len(clusters))),
            values(differences),
            mean,
            seed=seed,
            resamples=400,
            clusters=list(clusters),
        )
        covered += one.low <= 1 <= one.high
    assert 0.91 <= covered / 300 <= 0.98


# The table.


def test_identical_systems_differ_by_exactly_nothing():
    lines = rows(0.5, seed=1)
    compared = comparison.compare([table("sft", lines), table("again", lines)], seed=0, trials=200)
    assert len(compared["differences"]) == compared["tests"] == 6
    for one in compared["differences"]:
        assert (one["difference"], one["p"], one["p_bootstrap"], one["p_holm"]) == (0.0, 1.0, 1.0, 1.0)
        assert (one["shown"], one["detectable"]) == (None, None)
    assert "again is not shown to be better or worse than sft by any metric." in comparison.as_text(compared)


@pytest.fixture(scope="module")
def three():
    """base and sft far apart, sft and grpo alike."""
    made = {name: rows(share, seed=seed) for name, share, seed in (("base", 0.1, 1), ("sft", 0.6, 2), ("grpo", 0.6, 3))}
    return comparison.compare([table(name, lines) for name, lines in made.items()], seed=0, trials=2000)


def test_a_known_difference_is_shown_and_a_chance_one_is_not(three):
    assert three["systems"] == ["base", "sft", "grpo"]
    assert three["tests"] == 2 * 3 * 3
    form = found(three, "unseen", "form", "base", "sft")
    assert form["shown"] == "better" and form["low"] < 0.5 < form["high"]
    assert form["n"] == 40 and form["units"] == 40
    assert found(three, "unseen", "chrf", "base", "grpo")["shown"] == "better"
    assert found(three, "unseen", "form", "sft", "grpo")["shown"] is None
    assert found(three, "unseen", "form", "sft", "grpo")["detectable"] > 0.05
    made = [[line for line in rows(0.6, seed=seed) if not line["seen"]] for seed in (2, 3)]
    counts = [
        chrf.statistics(
            predictions=[line["prediction"] for line in one], references=[line["reference"] for line in one]
        )
        for one in made
    ]
    expected = intervals.detectable_difference(*counts, chrf.score_from_counts, seed=0, alpha=0.05 / 18)
    assert found(three, "unseen", "chrf", "sft", "grpo")["detectable"] == pytest.approx(expected)
    ordered = sorted(three["differences"], key=lambda one: one["p"])
    assert ordered[0]["p_holm"] == pytest.approx(min(1, 18 * ordered[0]["p"]))


def test_the_scores_are_those_of_the_metrics(three):
    lines = [line for line in rows(0.6, seed=2) if not line["seen"]]
    scores = suite.score_rows(METRICS, lines)
    for metric, score in scores.items():
        [one] = [
            one for one in three["scores"]
            if (one["group"], one["metric"], one["system"]) == ("unseen", metric, "sft")
        ]  # fmt: skip
        assert one["value"] == pytest.approx(score.value, abs=1e-9)
        assert one["low"] <= one["value"] <= one["high"]
    assert three["signatures"]["chrf"] == f"{chrf.signature()}|ar:2000|by:lexeme|holm:18|bs:2000|seed:0"


def test_the_text_says_which_is_better_and_how_sure_that_is(three):
    text = comparison.as_text(three, width=400)
    first, *_ = text.split("\n")
    form = found(three, "unseen", "form", "base", "sft")
    assert first.startswith("Unseen words: sft is better than base (chrF++ +")
    assert f"form accuracy {form['difference']:+.3f}" in first
    assert "Were they equally good, at most 1 such comparison in" in first
    assert "Unseen words: grpo is not shown to be better or worse than sft by any metric. 40 rows" in text
    assert "corrected for the 18 tests of this table" in text and chrf.signature() in text
    assert all(len(line) <= 60 for line in comparison.as_text(three, width=60).split("\n")[:6])


def test_where_less_is_better_a_fall_is_an_improvement():
    lines = rows(0.5, seed=1)
    rates = {"base": [0.8, 0.7] * 30, "sft": [0.2, 0.3] * 30}
    made = [
        comparison.table(name, lines, {"diacritic_error_rate": row_mean(rate, "s", scale=(1.0, 0.0))})
        for name, rate in rates.items()
    ]
    compared = comparison.compare(made, seed=0, trials=500, groups=["all"])
    [one] = compared["differences"]
    assert (one["difference"], one["shown"]) == (pytest.approx(-0.5), "better")
    assert "diacritic error rate ↓ -0.500" in comparison.as_text(compared)


def test_what_is_unscored_is_left_out_of_both_and_counted():
    lines = rows(0.5, seed=1)
    half = [None if i % 2 else 1.0 for i in range(60)]
    rest = [0.0 if i < 30 else None for i in range(60)]
    made = [comparison.table(name, lines, {"m": row_mean(v, "s")}) for name, v in (("a", half), ("b", rest))]
    compared = comparison.compare(made, seed=0, trials=200, groups=["all"])
    [one] = compared["differences"]
    assert (one["n"], one["unscored"], one["difference"]) == (15, 45, -1.0)
    assert [(score["n"], score["unscored"]) for score in compared["scores"]] == [(30, 30), (30, 30)]
    nothing = comparison.table("c", lines, {"m": row_mean([None] * 60, "s")})
    compared = comparison.compare([made[0], nothing], seed=0, trials=200, groups=["all"])
    assert compared["tests"] == 0 and compared["differences"][0]["p"] is None
    assert "c can't be compared with a" in comparison.as_text(compared)


def test_few_lexemes_show_nothing():
    lines = [line | {"lexemes": [f"w{chr(97 + i % 8)}"]} for i, line in enumerate(rows(0.5, seed=1))]
    made = [
        comparison.table(name, lines, {"m": row_mean([v] * 59 + [0.5], "s")}) for name, v in (("a", 0.0), ("b", 1.0))
    ]
    [one] = comparison.compare(made, seed=0, groups=["all"])["differences"]
    assert one["units"] == 8 and one["p_holm"] < 0.05
    assert one["shown"] is None and one["detectable"] is None


def test_a_nominal_scale_and_a_metric_of_the_whole_set():
    lines = rows(0.5, seed=1)
    comet = row_mean([1.2] * 60, "comet")  # beyond its nominal scale
    mauve = Score(0.4, (), 60, 0, "mauve")
    made = [comparison.table(name, lines, {"comet": comet, "mauve": mauve}) for name in ("a", "b")]
    compared = comparison.compare(made, seed=0, trials=200)
    assert list(compared["scales"]) == ["comet"]
    first = compared["scores"][0]
    assert (first["value"], first["low"], first["high"]) == (pytest.approx(1.2), None, None)


def test_the_plot_is_one_picture(three, tmp_path):
    path = comparison.plot(three, tmp_path / "compare.png", title="invented words")
    assert path.read_bytes().startswith(b"\x89PNG") and [one.name for one in tmp_path.iterdir()] == ["compare.png"]
    with pytest.raises(StoneyError, match="choose a folder that exists"):
        comparison.plot(three, tmp_path / "missing" / "compare.png", title="t")


def test_bad_input_is_refused():
    lines = rows(0.5, seed=1)
    one = table("a", lines)
    with pytest.raises(StoneyError, match="1 system; expected two or more"):
        comparison.compare([one], seed=0)
    with pytest.raises(StoneyError, match="no group new; expected unseen, seen, all"):
        comparison.compare([one, table("b", lines)], seed=0, groups=["new"])
    with pytest.raises(StoneyError, match="two systems have one name"):
        comparison.compare([one, one], seed=0)
    with pytest.raises(StoneyError, match="'b' was not asked the rows of 'a' in the same order"):
        comparison.compare([one, table("b", lines[::-1])], seed=0)
    with pytest.raises(StoneyError, match="chrf, form: not scored for both 'a' and 'b'"):
        comparison.compare([one, table("b", lines, {"exact": METRICS["exact"]})], seed=0)
    with pytest.raises(StoneyError, match="'a' has no rows"):
        comparison.table("a", [], {})
    with pytest.raises(StoneyError, match="'a' has 1 values of m for 60 rows"):
        comparison.table("a", lines, {"m": row_mean([1.0], "s")})
    with pytest.raises(StoneyError, match="3 rows against 2"):
        intervals.randomisation_p(values(range(3)), values(range(2)), mean, seed=0)
