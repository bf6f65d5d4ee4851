"""A W&B sweep file read and run without W&B: its parameters, the trials drawn from them, their commands and results.

What each key means is W&B's (https://docs.wandb.ai/models/sweeps/sweep-config-keys); grids and random draws are
scikit-learn's, distributions scipy's. Importing this module loads neither.
"""

import argparse
import difflib
import functools
import importlib.util
import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stoney_rl import checkpoints, cli, tracking
from stoney_rl.errors import StoneyError

METHODS = ("grid", "random")
# What a file may say at its top, and what it may say there that is for W&B alone.
_KEYS = ("program", "method", "metric", "parameters", "command", "run_cap", "early_terminate")
_FOR_WANDB = ("name", "description", "project", "entity")
_PARAMETER_KEYS = ("value", "values", "probabilities", "distribution", "min", "max", "q", "mu", "sigma")
# The keys that a distribution must have. Some have a q_ twin, which is rounded to multiples of q.
_NEEDED = {
    "constant": ("value",),
    "categorical": ("values",),
    "categorical_w_probabilities": ("values", "probabilities"),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "log_uniform": ("min", "max"),
    "log_uniform_values": ("min", "max"),
    "normal": (),
    "log_normal": (),
}
_QUANTISED = ("uniform", "log_uniform", "log_uniform_values", "normal", "log_normal")
_NEEDED |= {f"q_{name}": _NEEDED[name] for name in _QUANTISED}
_MACROS = ("env", "interpreter", "program", "args", "args_no_equals", "args_no_boolean_flags", "args_json")
_DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")
_DRAWS_A_TRIAL = 100  # before a space counts as exhausted


@dataclass(frozen=True)
class Sweep:
    """A sweep file that was found to be sound. ``parameters``: name -> its entry, each with a ``distribution``."""

    path: str
    program: str
    method: str
    metric: str
    minimize: bool
    parameters: dict[str, dict]
    command: tuple[str, ...]
    run_cap: int | None
    early_terminate: bool

    def varied(self) -> list[str]:
        """The parameters that are not the same in every trial."""
        return [name for name, entry in self.parameters.items() if entry["distribution"] != "constant"]

    def better(self, one: float, other: float) -> bool:
        return one < other if self.minimize else one > other


def read_sweep(path: str, *, method: str | None = None) -> Sweep:
    """Read a sweep file; ``method`` replaces the file's own. Raises ``StoneyError`` with everything that is wrong in it."""
    content = _load(path) | ({"method": method} if method else {})
    problems = cli.Problems()
    for key in content:
        if key not in _KEYS + _FOR_WANDB:
            problems.add(f"{path}: unknown key {key!r}{_near(key, _KEYS)}; known: {', '.join(_KEYS + _FOR_WANDB)}")

    def checked(check: Callable, value: object, name: str = "") -> Any:
        try:
            return check(value)
        except ValueError as error:
            problems.add(f"{path}: {name}{error}")

    found = {key: checked(check, content.get(key)) for key, check in _CHECKS.items()}
    entries = checked(_check_parameters, content.get("parameters")) or {}
    on_a_grid = functools.partial(_check_parameter, grid=found["method"] == "grid")
    parameters = {str(name): checked(on_a_grid, entry, f"{name}: ") for name, entry in entries.items()}
    problems.raise_if_any()
    metric = found.pop("metric")
    return Sweep(
        path=path,
        metric=metric["name"],
        minimize=metric.get("goal") != "maximize",
        parameters=parameters,
        early_terminate="early_terminate" in content,
        **found,
    )


def _check_method(method: object) -> str:
    if method == "bayes":
        raise ValueError("method bayes needs W&B's server (wandb sweep); --method random runs it here")
    if method not in METHODS:
        raise ValueError(f"method {method!r}: expected grid, random or bayes")
    return method


def _check_program(program: object) -> str:
    if not isinstance(program, str) or not Path(program).is_file():
        raise ValueError(f"program {program!r}: no such file here; name a training script, such as train_lora.py")
    return program


def _check_metric(metric: object) -> dict:
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str) or set(metric) - {"name", "goal"}:
        raise ValueError(f"metric {metric!r}: expected a name, such as eval/loss, and a goal")
    if metric.get("goal", "minimize") not in ("minimize", "maximize"):
        raise ValueError(f"metric: goal {metric['goal']!r}: expected minimize or maximize")
    return metric


def _check_run_cap(number: object) -> int | None:
    if number is not None and (not _is_int(number) or number < 1):
        raise ValueError(f"run_cap {number!r}: expected an integer of at least 1")
    return number


def _check_command(command: object) -> tuple[str, ...]:
    if command is None:
        return _DEFAULT_COMMAND
    parts = command.split() if isinstance(command, str) else command
    if not isinstance(parts, list) or "${program}" not in parts:
        raise ValueError(f"command {command!r}: expected a list with ${{program}} in it")
    for part in map(str, parts):
        if part.startswith("${") and not part.startswith("${envvar:") and part[2:-1] not in _MACROS:
            raise ValueError(f"command: {part} is not known here; known: {', '.join(_MACROS)}, envvar:NAME")
    return tuple(map(str, parts))


def _check_parameters(parameters: object) -> dict:
    if not isinstance(parameters, dict) or not parameters:
        raise ValueError("no parameters; expected a name and its value, values or min and max for each")
    return parameters


_CHECKS = {
    "program": _check_program,
    "method": _check_method,
    "metric": _check_metric,
    "run_cap": _check_run_cap,
    "command": _check_command,
}


def _load(path: str) -> dict:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise StoneyError(f"{path}: {error.strerror}; expected a W&B sweep file, such as sweep.yaml") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StoneyError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise StoneyError(f"{path}: expected 'key: value' lines, found a {type(content).__name__}")
    return content


# Parameters


def _check_parameter(entry: object, *, grid: bool) -> dict:
    """``entry`` with its distribution filled in, as W&B does. Raises ``ValueError``, with what is wrong, if it is unsound."""
    if not isinstance(entry, dict):
        raise ValueError(f"expected value, values or min and max, found {entry!r}")
    if "parameters" in entry:
        raise ValueError("nested parameters; a flag has one value, so name each flag at the top")
    unknown = [key for key in entry if key not in _PARAMETER_KEYS]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}{_near(unknown[0], _PARAMETER_KEYS)}")
    if "distribution" not in entry:
        entry = entry | {"distribution": _infer_distribution(entry)}
    kind = entry["distribution"]
    if not isinstance(kind, str) or kind not in _NEEDED:
        raise ValueError(f"distribution {kind!r} is not known here; known: {', '.join(_NEEDED)}")
    missing = [key for key in _NEEDED[kind] if key not in entry]
    if missing:
        raise ValueError(f"distribution {kind} needs {' and '.join(missing)}")
    _check_values(entry)
    _check_numbers(entry)
    if grid and kind not in ("constant", "categorical", "int_uniform", "q_uniform"):
        raise ValueError(f"a grid can't hold {kind}; give values, or use method random")
    if grid and "probabilities" in entry:
        raise ValueError("a grid has no use for probabilities; leave them out, or use method random")
    return entry


def _infer_distribution(entry: dict) -> str:
    if "value" in entry:
        return "constant"
    if "values" in entry:
        return "categorical"
    bounds = [entry.get("min"), entry.get("max")]
    if all(map(_is_int, bounds)):
        return "int_uniform"
    if all(isinstance(bound, float) for bound in bounds):
        return "uniform"
    if None in bounds:
        raise ValueError("expected value, values, or min and max")
    hint = "; YAML reads 1e-4 as text, write 1.0e-4" if any(isinstance(bound, str) for bound in bounds) else ""
    raise ValueError(
        f"min {bounds[0]!r} and max {bounds[1]!r}: expected two integers or two numbers with a point{hint}"
    )


def _check_values(entry: dict) -> None:
    values = entry.get("values", [entry["value"]] if "value" in entry else None)
    if values is None:
        return
    if not isinstance(values, list) or not values:
        raise ValueError(f"values: expected a list, found {values!r}")
    for value in values:
        if value is None or isinstance(value, list | dict):
            raise ValueError(f"{value!r} can't be the value of a flag; give a number, a text, true or false")
    chances = entry.get("probabilities")
    if chances is None:
        return
    if not isinstance(chances, list) or not all(_is_number(chance) and chance >= 0 for chance in chances):
        raise ValueError(f"probabilities: expected a list of numbers from 0 to 1, found {chances!r}")
    if len(chances) != len(values) or not math.isclose(sum(chances), 1, abs_tol=1e-6):
        raise ValueError(
            f"probabilities: {len(chances)} that sum to {sum(chances):g} for {len(values)} values; expected 1"
        )


def _check_numbers(entry: dict) -> None:
    for key in ("min", "max", "q", "mu", "sigma"):
        if key in entry and not _is_number(entry[key]):
            hint = "; YAML reads 1e-4 as text, write 1.0e-4" if isinstance(entry[key], str) else ""
            raise ValueError(f"{key} {entry[key]!r}: expected a number{hint}")
    if any(entry.get(key, 1) <= 0 for key in ("q", "sigma")):
        raise ValueError("q and sigma must be above 0")
    if "min" in entry and "max" in entry and entry["min"] >= entry["max"]:
        raise ValueError(f"min {entry['min']} is not below max {entry['max']}")
    kind = entry["distribution"]
    if kind == "int_uniform" and not (_is_int(entry["min"]) and _is_int(entry["max"])):
        raise ValueError("int_uniform: min and max must be integers")
    if kind.endswith("log_uniform") and max(abs(entry["min"]), abs(entry["max"])) > 700:
        raise ValueError(f"{kind}: min and max are exponents of e, 700 at most; log_uniform_values takes the values")
    if kind.endswith("log_uniform_values") and entry["min"] <= 0:
        raise ValueError(f"{kind}: min must be above 0")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _near(name: object, names: tuple[str, ...] | list[str]) -> str:
    close = difflib.get_close_matches(str(name), names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# Trials


def trials(sweep: Sweep, number: int | None, *, seed: int) -> list[dict]:
    """The parameters of each trial, in order: the first ``number`` of the grid, or ``number`` different random draws.

    ``number`` None: ``run_cap``, or all of a grid. More trials of the same sweep and seed begin with the same ones. Fewer
    come back where there are not so many. Raises ``StoneyError`` for random draws without a number.
    """
    from sklearn.model_selection import ParameterGrid, ParameterSampler

    number = number or sweep.run_cap
    if sweep.method == "grid":
        grid = ParameterGrid({name: _grid_values(entry) for name, entry in sweep.parameters.items()})
        return [_in_order(sweep, found) for found in itertools.islice(grid, number)]
    if number is None:
        raise StoneyError(f"{sweep.path}: random search has no end; give a run_cap there, or --num_runs")
    # As distributions, not lists: from lists alone the sampler draws so that more trials would not begin with the same.
    space = {name: _distribution(entry) for name, entry in sweep.parameters.items()}
    drawn = ParameterSampler(space, n_iter=_DRAWS_A_TRIAL * number, random_state=seed)
    different: dict[str, dict] = {}
    for found in drawn:
        different.setdefault(json.dumps(found, sort_keys=True), _in_order(sweep, found))
        if len(different) == number:
            break
    return list(different.values())


def _in_order(sweep: Sweep, found: dict) -> dict:
    return {name: found[name] for name in sweep.parameters}


def _grid_values(entry: dict) -> list:
    if entry["distribution"] == "constant":
        return [entry["value"]]
    if entry["distribution"] == "categorical":
        return list(dict.fromkeys(entry["values"]))
    if entry["distribution"] == "int_uniform":
        return list(range(entry["min"], entry["max"] + 1))
    import numpy as np

    return np.arange(entry["min"], entry["max"], entry.get("q", 1)).tolist()  # without max, as W&B has it


def _distribution(entry: dict) -> SimpleNamespace:
    """What scikit-learn's sampler takes for a distribution: an object with ``rvs``; its draws are plain Python values."""
    from scipy import stats

    kind, low, high = entry["distribution"], entry.get("min"), entry.get("max")
    mean, deviation = entry.get("mu", 0), entry.get("sigma", 1)
    if "value" in entry or "values" in entry:
        values = entry.get("values", [entry.get("value")])
        chances = entry.get("probabilities")
        return SimpleNamespace(rvs=lambda random_state: values[random_state.choice(len(values), p=chances)])
    if kind == "int_uniform":
        frozen = stats.randint(low, high + 1)
    elif kind.endswith("log_uniform_values"):
        frozen = stats.loguniform(low, high)
    elif kind.endswith("log_uniform"):  # the bounds are exponents
        frozen = stats.loguniform(math.exp(low), math.exp(high))
    elif kind.endswith("uniform"):
        frozen = stats.uniform(low, high - low)
    elif kind.endswith("log_normal"):
        frozen = stats.lognorm(s=deviation, scale=math.exp(mean))
    else:
        frozen = stats.norm(mean, deviation)
    step = entry.get("q", 1) if kind.startswith("q_") else None

    def rvs(random_state: object) -> int | float:
        drawn = frozen.rvs(random_state=random_state)
        if step is not None:
            drawn = round(float(drawn) / step) * step
        return int(drawn) if kind == "int_uniform" else type(step or 0.0)(drawn)

    return SimpleNamespace(rvs=rvs)


# Commands


def load_parser(program: str) -> argparse.ArgumentParser:
    """The parser of a stage script. Raises ``StoneyError`` if the file is none."""
    text = Path(program).read_text(encoding="utf-8", errors="replace")
    if "def build_parser(" not in text:  # importing it might start the training
        raise StoneyError(f"{program}: not a stage script, it has no build_parser()")
    spec = importlib.util.spec_from_file_location(Path(program).stem, program)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.build_parser()
    except Exception as error:  # whatever the script does
        raise StoneyError(f"{program}: can't be loaded ({' '.join(str(error).split())})") from error


def commands(sweep: Sweep, drawn: list[dict], interpreter: str) -> list[list[str]]:
    """The command of each trial as ``wandb agent`` would start it, ``interpreter`` for ${interpreter}, without ${env}.

    Raises ``StoneyError`` for a parameter that is no flag of the program, or a value that the program would refuse or take
    for something else.
    """
    from wandb.sdk.launch.sweeps import utils

    parser = load_parser(sweep.program)
    flags = {option: action for action in parser._actions for option in action.option_strings}
    for name in sweep.parameters:
        if f"--{name}" not in flags:
            near = _near(f"--{name}", list(flags)).replace("'--", "'")
            raise StoneyError(f"{sweep.path}: {name}: {sweep.program} has no flag --{name}{near}")
        if flags[f"--{name}"].dest in ("output_dir", "resume", "overwrite"):
            raise StoneyError(f"{sweep.path}: {name}: each trial gets its own; leave it out")
        if name in ("help", "config"):
            raise StoneyError(f"{sweep.path}: {name}: is no hyperparameter; name the flags themselves")

    def refuse(message: str) -> None:
        hint = (
            " (flags without a value need ${args_no_boolean_flags} in command)" if "ignored explicit" in message else ""
        )
        raise StoneyError(f"{sweep.path}: {sweep.program} would refuse it: {message}{hint}")

    parser.error = refuse
    made = []
    for parameters in drawn:
        forms = utils.create_sweep_command_args(
            {"args": {name: {"value": value} for name, value in parameters.items()}}
        )
        forms |= {"env": [], "interpreter": [interpreter], "program": [sweep.program]}
        command = []
        for part in utils.create_sweep_command(list(sweep.command)):
            command += forms[part[2:-1]] if part.startswith("${") else [part]
        arguments = command[command.index(sweep.program) + 1 :]
        parsed = parser.parse_args(arguments)
        for name, value in parameters.items():
            action = flags[f"--{name}"]
            if isinstance(value, bool) and getattr(parsed, action.dest) != (value ^ name.startswith("no-")):
                raise StoneyError(
                    f"{sweep.path}: {name}: {str(value).lower()} does not reach {sweep.program}, which W&B gives no flag "
                    f"for it; name the opposite flag, no-{name}, with the value true"
                )
        made.append(command)
    return made


# Results


def curve(output: Path) -> Path:
    """The file that holds all that a finished stage logged; train_grpo.py keeps it beside its model, with the adapter.

    Raises ``StoneyError`` if there is none.
    """
    for directory in (output, output.with_name(f"{output.name}_ckpt")):
        if (directory / "trainer_state.json").is_file():
            return directory / "trainer_state.json"
    raise StoneyError(f"{output}: no trainer_state.json; a sweep needs a program that trains")


def results(output: Path) -> dict[str, float | None]:
    """What a finished stage's charts end with, by chart name: the last value logged, as in W&B's summary.

    'eval/loss' is that of the model which is kept. None: not finite, training diverged. Raises as ``curve``.
    """
    history = json.loads(curve(output).read_text(encoding="utf-8"))["log_history"]
    charts = {tracking.chart_name(name): value for row in history for name, value in row.items()}
    kept = ((checkpoints.read_stage(output) or {}).get("training") or {}).get("eval_loss")
    if kept is not None:
        charts["eval/loss"] = kept
    numbers = {name: value for name, value in charts.items() if isinstance(value, int | float)}
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}


def best(plan: Sweep, done: Iterable[dict]) -> dict | None:
    """The record of the best finished trial, the first among equals; None if no trial ended with a finite metric.

    Raises ``StoneyError`` if a trial finished without the metric being logged.
    """
    found = None
    for record in done:
        if record["state"] != "finished":
            continue
        if plan.metric not in record["results"]:
            raise StoneyError(
                f"{plan.path}: metric {plan.metric!r} was never logged by trial {record['trial']}; logged: "
                f"{', '.join(record['results'])}. Correct the name and run this again: finished trials are kept"
            )
        value = record["results"][plan.metric]
        if value is not None and (found is None or plan.better(value, found["results"][plan.metric])):
            found = record
    return found
