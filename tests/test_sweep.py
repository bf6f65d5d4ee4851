"""What a sweep file means: refusals, distributions, which trials are drawn, and the commands that they become."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import yaml

from stoney_rl import checkpoints, sweep
from stoney_rl.errors import StoneyError

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAM = """
from stoney_rl import cli
def build_parser():
    parser = cli.make_parser(__doc__)
    parser.add_argument("--rate", type=cli.positive_float)
    parser.add_argument("--rank", type=cli.positive_int)
    parser.add_argument("--kind", choices=["a", "b"])
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--safe", action=cli.argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output_dir")
    parser.add_argument("--resume", action="store_true")
    return parser
"""
NO_BOOLEANS = ["${env}", "${interpreter}", "${program}", "${args_no_boolean_flags}"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "stage.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)


def write(parameters=None, **keys):
    """sweep.yaml with these parameters; a key that is None is left out."""
    content = {"program": "stage.py", "method": "random", "metric": {"name": "eval/loss"}, "run_cap": 5}
    content |= {"parameters": {"rate": {"values": [0.1, 0.2]}} if parameters is None else parameters} | keys
    Path("sweep.yaml").write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
    return "sweep.yaml"


def read(parameters=None, *, method=None, **keys):
    return sweep.read_sweep(write(parameters, **keys), method=method)


def refusal(parameters=None, *, method=None, **keys):
    with pytest.raises(StoneyError) as error:
        read(parameters, method=method, **keys)
    return str(error.value)


# What is refused


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"methd": "grid"}, "unknown key 'methd' (did you mean 'method'?)"),
        ({"method": "bayes"}, "method bayes needs W&B's server (wandb sweep); --method random runs it here"),
        ({"method": "best"}, "method 'best': expected grid, random or bayes"),
        ({"program": "stge.py"}, "program 'stge.py': no such file here"),
        ({"program": None}, "program None: no such file here"),
        ({"metric": None}, "metric None: expected a name"),
        ({"metric": {"goal": "minimize"}}, "expected a name, such as eval/loss, and a goal"),
        ({"metric": {"name": "x", "target": 1}}, "expected a name, such as eval/loss, and a goal"),
        ({"metric": {"name": "x", "goal": "minimise"}}, "goal 'minimise': expected minimize or maximize"),
        ({"run_cap": 0}, "run_cap 0: expected an integer of at least 1"),
        ({"command": ["python", "stage.py"]}, "expected a list with ${program} in it"),
        ({"command": ["${program}", "${args_json_file}"]}, "${args_json_file} is not known here; known: env,"),
        ({"parameters": {}}, "no parameters"),
    ],
)
def test_a_wrong_file_is_refused(keys, said):
    assert said in refusal(**keys)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (0.1, "expected value, values or min and max, found 0.1"),
        ({}, "expected value, values, or min and max"),
        ({"parameters": {"a": {"value": 1}}}, "nested parameters"),
        ({"vlues": [1]}, "unknown key 'vlues' (did you mean 'values'?)"),
        ({"values": []}, "values: expected a list, found []"),
        ({"values": 3}, "values: expected a list, found 3"),
        ({"values": [1, None]}, "None can't be the value of a flag"),
        ({"value": [1, 2]}, "[1, 2] can't be the value of a flag"),
        ({"values": [1, 2], "probabilities": [0.5, 0.6]}, "2 that sum to 1.1 for 2 values; expected 1"),
        ({"values": [1, 2], "probabilities": [1.0]}, "1 that sum to 1 for 2 values"),
        ({"values": [1, 2], "probabilities": [1.5, -0.5]}, "expected a list of numbers from 0 to 1"),
        ({"min": 1, "max": 2.0}, "expected two integers or two numbers with a point"),
        ({"min": "1e-4", "max": 0.1}, "YAML reads 1e-4 as text, write 1.0e-4"),
        ({"distribution": "uniform", "min": "1e-4", "max": 0.1}, "YAML reads 1e-4 as text, write 1.0e-4"),
        ({"min": 2.0, "max": 1.0}, "min 2.0 is not below max 1.0"),
        ({"distribution": "uniform", "min": 1.0}, "distribution uniform needs max"),
        ({"distribution": "log_uniform_values", "min": 0, "max": 1}, "min must be above 0"),
        ({"distribution": "int_uniform", "min": 0.5, "max": 2}, "int_uniform: min and max must be integers"),
        ({"distribution": "q_normal", "q": 0}, "q and sigma must be above 0"),
        ({"distribution": "beta"}, "distribution 'beta' is not known here; known: constant, categorical"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(entry, said):
    message = refusal({"rank": {"value": 1}, "rate": entry})
    assert message.startswith("sweep.yaml: rate: ") and said in message and "\n" not in message


def test_everything_wrong_is_said_at_once():
    assert len(refusal({"rate": {}}, program="no.py", run_cap=-1).splitlines()) == 3


@pytest.mark.parametrize("entry", [{"min": 0.1, "max": 0.2}, {"distribution": "normal"}])
def test_a_grid_needs_lists(entry):
    assert "a grid can't hold" in refusal({"rate": entry}, method="grid")
    assert read({"rate": entry}).method == "random"


def test_a_method_given_replaces_the_files():
    assert read(method="random", **{"run_cap": 3}).method == "random"
    write(method="bayes")
    assert sweep.read_sweep("sweep.yaml", method="random").method == "random"


# Distributions


def draws(entry, number=4000, seed=0):
    """Independent draws of one parameter."""
    import numpy as np

    plan = read({"rate": entry})
    distribution = sweep._distribution(plan.parameters["rate"])
    generator = np.random.RandomState(seed)
    return [distribution.rvs(random_state=generator) for _ in range(number)]


@pytest.mark.parametrize(
    ("entry", "cdf"),
    [
        ({"min": -1.0, "max": 3.0}, lambda x: (x + 1) / 4),
        ({"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1}, lambda x: (math.log10(x) + 4) / 3),
        ({"distribution": "log_uniform", "min": -2, "max": 2}, lambda x: (math.log(x) + 2) / 4),
        ({"distribution": "normal", "mu": 5, "sigma": 2}, lambda x: (1 + math.erf((x - 5) / 2 / math.sqrt(2))) / 2),
        ({"distribution": "normal"}, lambda x: (1 + math.erf(x / math.sqrt(2))) / 2),
        ({"distribution": "log_normal", "mu": 1, "sigma": 0.5},
         lambda x: (1 + math.erf((math.log(x) - 1) / 0.5 / math.sqrt(2))) / 2),
    ],
    ids=lambda value: value.get("distribution", "uniform") if isinstance(value, dict) else "",
)  # fmt: skip
def test_draws_follow_the_distribution(entry, cdf):
    drawn = sorted(draws(entry))
    # Kolmogorov's statistic, against a cumulative distribution function worked out by hand: 1.95 / sqrt(n) at p = 0.001.
    distance = max(abs(cdf(value) - (at + 0.5) / len(drawn)) for at, value in enumerate(drawn))
    assert distance < 1.95 / math.sqrt(len(drawn))
    assert all(type(value) is float for value in drawn)


def test_integers_reach_both_ends():
    drawn = Counter(draws({"min": 3, "max": 6}))
    assert set(drawn) == {3, 4, 5, 6} and all(abs(count - 1000) < 150 for count in drawn.values())
    assert all(type(value) is int for value in drawn)


def test_choices_follow_their_probabilities():
    drawn = Counter(draws({"values": ["a", "b", "c"], "probabilities": [0.7, 0.3, 0.0]}))
    assert abs(drawn["a"] / 4000 - 0.7) < 0.04 and drawn["c"] == 0
    assert abs(Counter(draws({"values": [True, False]}))[True] / 4000 - 0.5) < 0.04


def test_quantised_draws_are_multiples():
    drawn = Counter(draws({"distribution": "q_uniform", "min": 0.0, "max": 10.0, "q": 5}))
    # 0 from [0, 2.5), 5 from [2.5, 7.5), 10 from [7.5, 10]
    assert set(drawn) == {0, 5, 10} and abs(drawn[5] / 4000 - 0.5) < 0.04 and all(type(v) is int for v in drawn)
    logarithmic = draws({"distribution": "q_log_uniform_values", "min": 0.1, "max": 1.0, "q": 0.25})
    assert set(logarithmic) <= {0.0, 0.25, 0.5, 0.75, 1.0} and len(set(logarithmic)) == 5


# Trials


def test_a_grid_is_every_combination_once():
    parameters = {"rank": {"min": 1, "max": 3}, "rate": {"values": [0.1, 0.2, 0.1]}, "kind": {"value": "a"},
                  "other": {"distribution": "q_uniform", "min": 0, "max": 4, "q": 2}}  # fmt: skip
    drawn = sweep.trials(read(parameters, method="grid", run_cap=None), None, seed=0)
    expected = {(rank, rate, "a", q) for rank, rate, q in itertools.product((1, 2, 3), (0.1, 0.2), (0, 2))}
    assert len(drawn) == 12 and {tuple(trial.values()) for trial in drawn} == expected
    assert all(list(trial) == list(parameters) for trial in drawn)
    assert sweep.trials(read(parameters, method="grid", run_cap=4), None, seed=0) == drawn[:4]
    assert sweep.trials(read(parameters, method="grid", run_cap=4), 5, seed=1) == drawn[:5]


@pytest.mark.parametrize(
    "parameters",
    [
        {"rate": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1.0}, "rank": {"values": [4, 8]}},
        {"rank": {"values": [1, 2, 3, 4, 5]}, "kind": {"values": ["a", "b"]}, "rate": {"value": 0.5}},  # lists alone
    ],
)
def test_more_random_trials_begin_with_the_same_ones(parameters):
    plan = read(parameters)
    many = sweep.trials(plan, 8, seed=3)
    assert sweep.trials(plan, None, seed=3) == many[:5]  # run_cap
    assert sweep.trials(plan, 8, seed=4) != many
    assert len({json.dumps(trial) for trial in many}) == 8


def test_a_small_space_ends():
    drawn = sweep.trials(read({"kind": {"values": ["a", "b"]}, "fast": {"values": [True, False]}}), 50, seed=0)
    assert {tuple(trial.values()) for trial in drawn} == set(itertools.product("ab", (True, False))) and len(drawn) == 4


def test_random_search_needs_an_end():
    with pytest.raises(StoneyError, match="random search has no end; give a run_cap there, or --num_runs"):
        sweep.trials(read(run_cap=None), None, seed=0)


# Commands


def commands(parameters, **keys):
    plan = read({name: {"value": value} for name, value in parameters.items()}, **keys)
    return sweep.commands(plan, [parameters], "my-python")[0]


def test_the_command_is_as_the_agent_would_start_it(monkeypatch):
    monkeypatch.setenv("RANKS", "2")
    given = {"rate": 1e-5, "fast": True, "kind": "a"}
    assert commands({"rate": 0.1}) == ["my-python", "stage.py", "--rate=0.1"]
    assert commands(given, command=NO_BOOLEANS) == ["my-python", "stage.py", "--rate=1e-05", "--fast", "--kind=a"]
    assert commands({**given, "fast": False}, command=NO_BOOLEANS)[2:] == ["--rate=1e-05", "--kind=a"]
    launcher = ["torchrun", "--nproc=${envvar:RANKS}", "${program}", "${args_no_equals}", "--fast"]
    assert commands({"rank": 8}, command=launcher) == ["torchrun", "--nproc=2", "stage.py", "--rank", "8", "--fast"]


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"rnk": 3}, r"rnk: stage.py has no flag --rnk \(did you mean 'rank'\?\)"),
        ({"rank": 0.5}, "stage.py would refuse it: argument --rank: invalid positive_int value: '0.5'"),
        ({"rate": -1}, "argument --rate: expected a number above 0, got -1"),
        ({"kind": "c"}, "argument --kind: invalid choice: 'c'"),
        ({"fast": True}, r"ignored explicit argument 'True' \(flags without a value need \$\{args_no_boolean_flags\}"),
        ({"output_dir": "x"}, "output_dir: each trial gets its own"),
    ],
)
def test_what_the_program_would_refuse_is_refused_before_it_starts(parameters, said):
    with pytest.raises(StoneyError, match=said):
        commands(parameters)


def test_a_false_that_would_not_arrive_is_refused():
    with pytest.raises(StoneyError, match="safe: false does not reach stage.py.*no-safe, with the value true"):
        commands({"safe": False}, command=NO_BOOLEANS)
    assert commands({"no-safe": True}, command=NO_BOOLEANS)[2:] == ["--no-safe"]


def test_a_program_that_is_no_stage_is_not_even_imported():
    Path("other.py").write_text("open('trained', 'w')")
    with pytest.raises(StoneyError, match="other.py: not a stage script"):
        commands({"rate": 1.0}, program="other.py")
    assert not Path("trained").exists()


# The project's own file


def test_sweep_yaml_is_sound(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    plan = sweep.read_sweep("sweep.yaml")
    drawn = sweep.trials(plan, None, seed=0)
    assert len(drawn) == plan.run_cap == 20 and (plan.metric, plan.minimize) == ("eval/loss", True)
    parser = sweep.load_parser("train_lora.py")
    for parameters, command in zip(drawn, sweep.commands(plan, drawn, "python"), strict=True):
        args = parser.parse_args(command[2:])
        assert {name: getattr(args, name) for name in parameters} == parameters
        assert args.resume and not args.merge
        assert args.global_batch_size % args.batch_size == 0
    content = yaml.safe_load(Path("sweep.yaml").read_text(encoding="utf-8"))
    assert content["project"] == "stoney-rl"  # as in the documented `wandb agent TEAM/stoney-rl/ID`


# Results


def stage(directory, history, **training):
    directory.mkdir()
    (directory / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    checkpoints.write_json(directory / "stage.json", {"stage": "sft", "training": training})
    return directory


def test_results_are_the_last_values_by_chart_name(tmp_path):
    history = [{"loss": 3.0, "step": 1}, {"eval_loss": 2.0, "step": 1}, {"loss": 1.5, "step": 2}, {"eval_loss": 2.5}]
    found = sweep.results(stage(tmp_path / "a", history))
    assert found == {"train/loss": 1.5, "eval/loss": 2.5, "train/step": 2}
    kept = sweep.results(
        stage(tmp_path / "b", history, eval_loss=2.0)
    )  # of the checkpoint that early stopping went back to
    assert kept["eval/loss"] == 2.0
    assert sweep.results(stage(tmp_path / "c", [{"eval_loss": math.nan, "loss": 1.0}])) == {
        "eval/loss": None,
        "train/loss": 1.0,
    }
    (tmp_path / "d").mkdir()
    stage(tmp_path / "d_ckpt", [{"reward": 0.5}])  # train_grpo.py: the curve is with the adapter
    assert sweep.results(tmp_path / "d") == {"train/reward": 0.5}
    with pytest.raises(StoneyError, match="no trainer_state.json"):
        sweep.results(tmp_path)


def record(trial, value, state="finished"):
    return {"trial": trial, "state": state, "results": {"eval/loss": value} if state == "finished" else {}}


def test_the_best_is_the_first_of_the_lowest_or_highest():
    done = [record(1, None), record(2, 3.0), record(3, 1.0), record(4, 1.0), record(5, 9.0), record(6, 0, "failed")]
    assert sweep.best(read(), done)["trial"] == 3
    assert sweep.best(read(metric={"name": "eval/loss", "goal": "maximize"}), done)["trial"] == 5
    assert sweep.best(read(), [done[0], done[5]]) is None
    with pytest.raises(StoneyError, match="metric 'eval_loss' was never logged by trial 1; logged: eval/loss"):
        sweep.best(read(metric={"name": "eval_loss"}), done)
