"""The flags that say what the reward is, the same in every stage that pays one; read and checked without torch."""

import argparse
from collections.abc import Callable

from stoney_rl import cli
from stoney_rl.errors import StoneyError


def add_reward_flags(group: argparse._ActionsContainer) -> None:
    """``--lexicon --reward --reward_model --reward_model_weight --reward_weights --encoder --comet_model``."""
    group.add_argument("--lexicon", help="lexicon file; default: the prepared directory's own")
    group.add_argument("--reward", action="append", default=[], metavar="NAME[=WEIGHT]",
                       help="repeatable: composite, or package.module:function with TRL's signature; default: composite")  # fmt: skip
    group.add_argument(
        "--reward_model", metavar="DIR", help="directory of train_reward_model.py, as a reward of its own"
    )
    group.add_argument("--reward_model_weight", type=cli.positive_float, default=1.0, help="its weight")
    group.add_argument(
        "--reward_weights",
        nargs="+",
        default=[],
        metavar="TERM=WEIGHT",
        help="of the composite's terms; default: see stoney_rl/rewards/README.md",
    )
    group.add_argument("--encoder", help="sentence encoder for R_sem: folder or hub id; without one it is off")
    group.add_argument("--comet_model", help="or a COMET model for R_sem: folder, file or hub id (needs make comet)")


def check_reward_flags(args: argparse.Namespace, problems: cli.Problems) -> tuple[list, dict[str, float]]:
    """(plug-ins of ``--reward``, weight of each term of the composite); what is wrong goes to ``problems``.

    Without ``--reward`` the composite is the only plug-in, or with ``--reward_model`` there is none. The reward model, the
    encoder and COMET are looked up, not loaded. A missing lexicon is the script's to see: it depends on the rows.
    """
    from stoney_rl.models import find_model
    from stoney_rl.rewards.composite import DEFAULT_WEIGHTS, Composite
    from stoney_rl.rewards.knowledge import Knowledge
    from stoney_rl.rewards.plugins import COMPOSITE, load_plugins

    weights = DEFAULT_WEIGHTS | read_weights(args.reward_weights, problems)
    attempt(problems, Composite, Knowledge(frozenset()), weights)
    specs = args.reward or ([] if args.reward_model else [COMPOSITE])
    loaded = [attempt(problems, load_plugins, [spec]) for spec in specs]
    plugins: list = []
    if all(loaded):
        plugins = attempt(problems, load_plugins, specs) or []  # once more, all of them: none may be given twice
        if not any(plugin.name == COMPOSITE for one in loaded for plugin in one):
            for flag in ("reward_weights", "encoder", "comet_model"):
                if getattr(args, flag):
                    problems.add(
                        f"--{flag}: belongs to the composite, which is not among the rewards; add --reward {COMPOSITE}"
                    )
    if args.reward_model:
        from stoney_rl.rewards.reward_model import find_reward_model

        attempt(problems, find_reward_model, args.reward_model, flag="--reward_model ")
    if args.encoder:
        attempt(problems, find_model, args.encoder, flag="--encoder ")
    if args.comet_model:
        from stoney_rl.metrics.comet import CometScorer

        attempt(problems, CometScorer, args.comet_model, flag="--comet_model ")
    if args.encoder and args.comet_model:
        problems.add("--encoder and --comet_model: R_sem takes one of them")
    return plugins, weights


def attempt(problems: cli.Problems, call: Callable, *given, flag: str = ""):
    """What ``call(*given)`` returns, or None if it raises ``StoneyError``: its message, after ``flag``, is a problem."""
    try:
        return call(*given)
    except StoneyError as error:
        problems.add(flag + str(error))
        return None


def read_weights(pairs: list[str], problems: cli.Problems) -> dict[str, float]:
    """``TERM=WEIGHT`` pairs as a dictionary; what is none goes to ``problems``. Names are checked later."""
    weights: dict[str, float] = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        try:
            if name in weights:
                problems.add(f"--reward_weights {name}: given twice; give it once")
            weights[name] = float(number)
        except ValueError:
            problems.add(f"--reward_weights {pair}: expected TERM=WEIGHT, such as R_dict=0.3")
    return weights
