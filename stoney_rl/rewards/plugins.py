"""Rewards by name: the composite, and functions of the user's own, with their weights."""

import importlib
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stoney_rl.errors import StoneyError
from stoney_rl.rewards.composite import Composite, Task

COMPOSITE = "composite"


@dataclass(frozen=True)
class Plugin:
    """One entry of --reward: ``call`` is None for the composite."""

    name: str
    weight: float
    call: Callable | None


def load_plugins(specs: Sequence[str]) -> list[Plugin]:
    """``composite``, ``package.module:function``, either with ``=WEIGHT``. Raises ``StoneyError`` for what can't be loaded."""
    plugins = []
    for spec in specs:
        name, given, number = spec.partition("=")
        try:
            weight = float(number) if given else 1.0
        except ValueError:
            weight = -1.0
        if not 0 < weight < float("inf"):
            raise StoneyError(f"--reward {spec}: the weight is {number!r}; expected a number above 0")
        plugins.append(Plugin(name, weight, None if name == COMPOSITE else _load(name)))
    names = [plugin.name for plugin in plugins]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise StoneyError(f"--reward {twice}: given twice; give it once, with its weight")
    return plugins


def _load(name: str) -> Callable:
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise StoneyError(f"--reward {name}: expected '{COMPOSITE}' or package.module:function")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # a module may fail in any way while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise StoneyError(f"--reward {name}: {module} can't be imported ({reason}); start from its folder") from error
    found = getattr(loaded, function, None)
    if found is None:
        raise StoneyError(f"--reward {name}: {module} has no function {function}")
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):
        raise StoneyError(
            f"--reward {name}: is a {type(found).__name__}; expected a function in Python with TRL's signature"
        ) from None
    if "completions" not in parameters or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise StoneyError(
            f"--reward {name}: expected TRL's signature, such as {function}(completions, reference, **kwargs): it takes "
            f"{', '.join(parameters) or 'nothing'}"
        )
    return found


def call(plugin: Plugin, tasks: Sequence[Task], texts: Sequence[str]) -> list[float | None]:
    """What a plug-in gives each text: it is called as TRL calls it, with the columns of the dataset as keywords.

    Raises ``StoneyError`` if it fails or does not give one number or None a text. NaN and infinity are no numbers: one of
    them makes the advantages of a whole group NaN.
    """
    names = dict.fromkeys(name for task in tasks for name in task.columns)
    columns = {name: [task.columns.get(name) for task in tasks] for name in names} | {
        "prompts": [task.columns.get("prompts", [{"role": "user", "content": task.question}]) for task in tasks],
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "reference": [task.reference for task in tasks],
        "wanted": [list(task.wanted) for task in tasks],
        "id": [task.id for task in tasks],
    }
    try:
        values = list(plugin.call(**columns))
    except Exception as error:
        reason = " ".join(repr(error).split())
        raise StoneyError(f"--reward {plugin.name}: failed on {len(texts)} completions: {reason}") from error
    if len(values) != len(texts):
        raise StoneyError(
            f"--reward {plugin.name}: gave {len(values)} values for {len(texts)} completions; expected one each"
        )
    for value, text in zip(values, texts, strict=True):
        if value is not None and not (isinstance(value, numbers.Real) and math.isfinite(value)):
            raise StoneyError(
                f"--reward {plugin.name}: gave {' '.join(repr(value).split())[:60]} for the completion {text[:60]!r}; "
                "expected a finite number, or None for what can't be scored"
            )
    return [None if value is None else float(value) for value in values]


def scorer(plugins: Sequence[Plugin], composite: Composite) -> Callable:
    """(tasks, texts) -> for each text a dictionary: every term's value, and ``total``, the weighted sum of the rewards.

    ``total`` is None where no reward could score the text; those that are None add nothing.
    """

    def score(tasks: Sequence[Task], texts: Sequence[str]) -> list[dict[str, float | None]]:
        lines: list[dict[str, float | None]] = [{} for _ in texts]
        sums: list[float | None] = [None] * len(texts)
        for plugin in plugins:
            if plugin.call is None:
                scores = composite.score(tasks, texts)
                values = [one.total for one in scores]
                for line, one in zip(lines, scores, strict=True):
                    line.update(one.values)
            else:
                values = call(plugin, tasks, texts)
                for line, value in zip(lines, values, strict=True):
                    line[plugin.name] = value
            for at, value in enumerate(values):
                if value is not None:
                    sums[at] = (sums[at] or 0.0) + plugin.weight * value
        for line, total in zip(lines, sums, strict=True):
            line["total"] = total
        return lines

    return score
