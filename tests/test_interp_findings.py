"""Sentences and grids claim what the numbers carry: signs, gates, order, and the ground truth found end to end."""

import numpy as np
import pytest
import tiny
import torch
from prompt_pairs import induction_pairs, random_pairs

from stoney_rl.interp import analysis, findings, summary
from stoney_rl.interp.analysis import Measured
from stoney_rl.interp.hooked import load_hooked
from stoney_rl.interp.plan import Plan


def plan_of(n: int, **options) -> Plan:
    pairs = random_pairs([6 + number % 4 for number in range(n)])
    return Plan({"random": pairs}, [5, 6, 7], [[5, 6, 7]], **options)


def measured(plan: Plan, gap: float, head: float = 0.0, seed: int = 0) -> dict[str, Measured]:
    """A model whose pairs differ by about ``gap`` logits and of whose four heads (0, 1) carries about ``head`` of them."""
    draw = np.random.default_rng(seed)
    n = len(plan.families["random"])
    reporting = plan.halves("random")[1]
    clean = gap / 2 + 0.1 * draw.normal(size=n)
    heads = 0.01 * draw.normal(size=(n, 2, 2))
    heads[:, 0, 1] += head
    arrays = {"clean": clean, "corrupt": -clean, "heads": heads, "top": heads[reporting][:, [0, 1], [1, 0]]}
    return {
        "trust": Measured({"values": {"heads": 1e-7}, "failed": [], "limits": {"heads": 1e-4}}),
        "patching": Measured(
            {"top": {"random": [[0, 1], [1, 0]]}}, {f"random/{key}": value for key, value in arrays.items()}
        ),
    }


def said(models, plan) -> str:
    return "\n".join(findings.findings(models, plan, Measured({"random/patching": 0.001})))


def test_a_head_that_carries_the_difference_is_told_with_its_effect():
    text = said({"tuned": measured(plan := plan_of(24), 4.0, 1.5)}, plan)
    assert "Behaviour: it prefers the asked answer on both prompts in 100%" in text
    assert "Heads: by the estimate 1 of 4 carry some of it" in text and "1 of them 5% or more" in text
    assert "bring back (layer.head, logits) 0.1 +1.5" in text


@pytest.mark.parametrize(
    ("n", "gap", "sentence"),
    [
        (24, 0.0, "That is no more than chance, so there is nothing to trace."),
        (24, -4.0, "It prefers the wrong answers, so there is no path to a right one to trace."),
        (6, 4.0, "Whether that is more than chance can't be said (6 clusters: too few"),
    ],
)
def test_where_nothing_is_to_be_traced_the_reason_is_told_and_no_head(n, gap, sentence):
    text = said({"model": measured(plan := plan_of(n), gap, 1.5)}, plan)
    assert sentence in text and "Heads:" not in text and "Circuit:" not in text


def test_differences_are_the_first_model_minus_the_other():
    plan = plan_of(24)
    models = {"tuned": measured(plan, 6.0, 2.0, seed=1), "base": measured(plan, 4.0, 0.5, seed=2)}
    text = said(models, plan)
    assert "tuned minus base, random. The difference of the prompts: +2" in text
    assert "1 of 4 heads differ in their part in it (q <= 0.05), most of all 0.1 +1.5" in text
    grid = next(
        each for each in summary.measures(models, plan, Measured()) if each["key"] == "attribution_patching/random"
    )
    (difference,) = grid["differences"]
    assert difference["of"] == ["tuned", "base"] and difference["mean"][0, 1] == pytest.approx(1.5, abs=0.02)
    assert difference["found"].tolist() == [[False, True], [False, False]]
    assert grid["values"]["tuned"]["mean"][0, 1] == pytest.approx(2.0, abs=0.01)


def test_the_floor_of_random_models_bars_a_finding():
    plan = plan_of(24)
    models = {"tuned": measured(plan, 6.0, 2.0)}
    grids = {
        floor: summary.measures(models, plan, Measured({"random/patching": floor}))[0]["values"]["tuned"]["found"]
        for floor in (0.1, 3.0)
    }
    assert grids[0.1][0, 1] and not grids[3.0].any()


def test_a_pair_without_a_value_is_left_out_and_not_taken_for_zero():
    plan = plan_of(24)
    models = {"tuned": measured(plan, 6.0, 2.0)}
    models["tuned"]["patching"].arrays["random/heads"][0] = np.nan
    (grid,) = summary.measures(models, plan, Measured())
    assert grid["n"] == 23 and grid["values"]["tuned"]["mean"][0, 1] == pytest.approx(2.0, abs=0.02)


def test_a_circuit_of_nothing_is_not_told():
    draw = np.random.default_rng(0)
    arrays = {"full": draw.normal(size=12), "empty": draw.normal(size=12)}
    arrays |= {"circuit": draw.normal(size=(12, 3)), "random": draw.normal(size=(12, 3, 2))}
    clusters = list(range(12))
    assert summary.faithfulness(arrays, clusters, seed=0) is None
    arrays["full"] = arrays["empty"] + 5
    arrays["circuit"] = arrays["empty"][:, None] + np.array([0.0, 2.5, 5.0])
    found = summary.faithfulness(arrays, clusters, seed=0)
    assert found["circuit"].tolist() == pytest.approx([0, 0.5, 1])


# Order: values stand where their pairs stand, though batches are made by length


def test_values_are_those_of_their_own_pair(tmp_path):
    model = load_hooked(str(tiny.checkpoint(tmp_path / "model")))
    plan = plan_of(7, batch_size=3)
    found = analysis.measure_attribution(model, plan, {}).arrays
    scores = analysis.measure_attention(model, plan, {}).arrays["entropy"]
    for index, pair in enumerate(plan.families["random"]):
        alone = Plan({"random": [pair, pair]}, [5, 6], [[5, 6]])
        assert found["random/clean"][index] == pytest.approx(
            analysis.measure_attribution(model, alone, {}).arrays["random/clean"][0], abs=1e-5
        )
        assert scores[index] == pytest.approx(
            analysis.measure_attention(model, alone, {}).arrays["entropy"][0], abs=1e-5
        )


def test_a_tuned_lens_is_fitted_to_other_texts_and_says_how_well(tmp_path):
    model = load_hooked(str(tiny.checkpoint(tmp_path / "model")))
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 259, (40,), generator=generator).tolist() for _ in range(16)]
    plan = Plan({"random": random_pairs([6, 7, 8, 9])}, [5, 6, 7], texts, rows=16)
    found = analysis.measure_tuned_lens(model, plan, {})
    sentence = findings._fit(found.facts["fit"])
    assert found.arrays["random/kl"].shape == (4, 3) and "of held-out rows" in sentence and "worse in" in sentence


# The ground truth


def test_the_heads_of_the_known_model_are_found_from_its_prompts_alone(tmp_path):
    """tests/induction copies: head 0.0 looks one token back, the heads of layer 1 find what followed."""
    model = load_hooked("tests/induction")
    pairs = induction_pairs(24, 12, vocabulary=range(2, model.d_vocab))
    plan = Plan({"copying": pairs}, [5, 6, 7], [[5, 6, 7]], top_k=5, random_models=2)
    tasks = ["patching", "ablation"]
    done = analysis.measure_model(tmp_path / "model", tasks, plan, lambda: model)
    floors = analysis.measure_floor(tmp_path, tasks, plan, lambda: model)
    assert {tuple(head) for head in done["patching"].facts["top"]["copying"]} == {
        (0, 0),
        (1, 0),
        (1, 1),
        (1, 2),
        (1, 3),
    }
    (grid,) = summary.measures({"model": done}, plan, floors)
    assert grid["values"]["model"]["found"].tolist() == [[True, False, False, False], [True] * 4]
    trusted = done | {"trust": Measured({"values": {}, "failed": [], "limits": {}})}
    text = "\n".join(findings.findings({"model": trusted}, plan, floors))
    assert "Heads: by the estimate 5 of 8 carry some of it" in text and "5 of them 5% or more" in text
    assert floors.facts["copying/patching"] > 0
