"""Command lines that behave the same in every stage: flags, ``--config`` YAML, one-line errors, exit codes."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from stoney_rl import distributed
from stoney_rl.errors import Preempted, StoneyError

EXIT_BAD_INPUT = 2
EXIT_RESUME = 75  # EX_TEMPFAIL of sysexits.h, 'try again': saved, and --resume goes on
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's line breaks and adds '(default: ...)', but not to flags without one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, False, argparse.SUPPRESS) or "default" in (action.help or ""):
            return action.help or ""
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the page of usage in front of it."""

    artifact_inputs: Mapping[str, Sequence[str]] = {}

    def error(self, message: str) -> None:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message} (--help lists the flags)\n")


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help text is the script's docstring; abbreviated flags are errors."""
    parser = _Parser(description=doc, formatter_class=_HelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="YAML file that sets any flag below; the command line wins"
    )
    return parser


def add_tracking_flags(parser: argparse.ArgumentParser, inputs: Mapping[str, Sequence[str]] | None = None) -> None:
    """Weights & Biases flags, the same in every stage (see ``tracking.start``).

    ``inputs``: the types of artifact that may stand in for a flag, by its name; ``parse_stage`` fetches them.
    """
    group = parser.add_argument_group("tracking (Weights & Biases)")
    group.add_argument(
        "--wandb_mode",
        choices=["online", "offline", "disabled"],
        help="default: WANDB_MODE; otherwise online if a key is found, else offline",
    )
    group.add_argument("--wandb_project", help="default: WANDB_PROJECT, else stoney-rl")
    group.add_argument("--wandb_entity", help="user or team; default: WANDB_ENTITY, else your account's own")
    group.add_argument(
        "--wandb_group", help="groups the runs of one pipeline; default: WANDB_RUN_GROUP, else the parent's"
    )
    group.add_argument("--wandb_name", help="run name; default: the output directory's name")
    if inputs:
        parser.artifact_inputs = inputs
        group.add_argument(
            "--wandb_artifact",
            nargs="+",
            metavar="NAME",
            help="inputs from W&B, by type: "
            + "; ".join(f"{' or '.join(types)} as --{flag}" for flag, types in inputs.items())
            + ". name:alias, name:v3 or entity/project/name:alias",
        )


def add_split_flags(group: argparse._ArgumentGroup, default: str) -> None:
    """Flags of the lexeme-disjoint split, the same in every stage; ``default`` is whose values count first."""
    group.add_argument(
        "--test_fraction", type=fraction, help=f"rows held out as unseen lexemes; default: {default}, else 0.1"
    )
    group.add_argument(
        "--validation_fraction", type=fraction, help=f"the same, for the held-out loss; default: {default}, else 0.05"
    )
    group.add_argument(
        "--split_seed", type=non_negative_int, help=f"seed of the split by lexeme; default: {default}, else 0"
    )


def add_model_flags(group: argparse._ArgumentGroup, default: str) -> None:
    """Flags of the model that a training stage starts from; ``default`` is a hub id or folder."""
    group.add_argument("--model", default=default, help="hub id, or folder of a base or merged model")
    group.add_argument("--revision", help="hub revision of the model")


def add_resume_flags(group: argparse._ArgumentGroup) -> None:
    """What to do about an earlier run in the same place (see ``runs.begin``)."""
    group.add_argument("--resume", action="store_true", help="continue an unfinished run, or start if there is none")
    group.add_argument("--overwrite", action="store_true", help="replace existing output and unfinished runs")


def add_epoch_flags(group: argparse._ArgumentGroup, *, epochs: float, over: str) -> None:
    """The length of training; ``epochs`` is the default, ``over`` says what an epoch passes over."""
    group.add_argument("--num_train_epochs", type=positive_float, default=epochs, help=f"passes over {over}")
    group.add_argument("--max_steps", type=positive_int, help="updates; overrides --num_train_epochs")


def add_lora_flags(group: argparse._ArgumentGroup, *, all_linear: str) -> None:
    """Flags of a LoRA adapter (arXiv 2106.09685); ``all_linear`` says what that target is for the stage's model."""
    group.add_argument("--lora_rank", type=positive_int, default=16, help="rank of the update matrices")
    group.add_argument("--lora_alpha", type=positive_float, default=32, help="scale: alpha / rank")
    group.add_argument(
        "--lora_target_modules", nargs="+", default=["all-linear"], help=f"module names; all-linear finds {all_linear}"
    )


def add_optimisation_flags(
    group: argparse._ArgumentGroup, *, learning_rate: float, lr_scheduler_type: str, warmup_ratio: float
) -> None:
    """Flags of the optimizer and its schedule; the keywords are the stage's defaults."""
    group.add_argument("--learning_rate", type=positive_float, default=learning_rate, help="peak learning rate")
    group.add_argument(
        "--lr_scheduler_type", default=lr_scheduler_type, help="linear, cosine, constant_with_warmup, ..."
    )
    group.add_argument(
        "--warmup_ratio", type=fraction, default=warmup_ratio, help="share of the updates with a rising rate"
    )
    group.add_argument("--weight_decay", type=float, default=0.0, help="AdamW's weight decay")
    group.add_argument("--max_grad_norm", type=positive_float, default=1.0, help="gradient clipping")
    group.add_argument("--optim", default="adamw_torch", help="any optimizer name of transformers")


def add_hardware_flags(group: argparse._ArgumentGroup) -> None:
    """Precision, memory and attention kernels of a training stage (see ``models.choose_precision``)."""
    group.add_argument(
        "--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="auto: by the hardware"
    )
    group.add_argument(
        "--gradient_checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="recompute activations: a third slower, a fraction of the memory",
    )
    group.add_argument("--attn_implementation", help="sdpa (default), eager, flash_attention_2, ...")


def add_parallel_flags(group: argparse._ArgumentGroup) -> None:
    """How several processes share the work (see ``distributed``)."""
    group.add_argument("--multi_gpu", action="store_true", help="one process a GPU of this machine, through torchrun")
    group.add_argument("--num_gpus", type=positive_int, help="with --multi_gpu; default: all")
    group.add_argument(
        "--max_restarts", type=non_negative_int,
        help="with --multi_gpu: how often a failed run is taken up again from its last checkpoint; default: 3",
    )  # fmt: skip
    group.add_argument("--fsdp", action="store_true", help="shard the model over the processes (PyTorch's FSDP)")
    group.add_argument("--deepspeed", metavar="ZERO", help="zero2, zero3 or a DeepSpeed JSON file: shard with ZeRO")
    group.add_argument(
        "--save_on_each_node", action="store_true", help="checkpoints on every node: the run outlives the loss of any"
    )


def add_saving_flags(group: argparse._ArgumentGroup, *, held_out: str) -> None:
    """How often to log, evaluate and save, in updates; ``held_out`` names what is measured, in the plural."""
    group.add_argument("--logging_steps", type=positive_int, default=1, help="updates between loss records")
    group.add_argument(
        "--eval_steps",
        type=non_negative_int,
        help=f"updates between held-out {held_out}; 0: never; default: a fifth",
    )
    group.add_argument(
        "--save_steps", type=positive_int, help="updates between checkpoints; default: a tenth of the run"
    )
    group.add_argument("--save_total_limit", type=positive_int, default=2, help="checkpoints kept")


def add_trace_flag(group: argparse._ArgumentGroup) -> None:
    """Whether to look inside the model while it trains (see ``interp.tracer``)."""
    group.add_argument(
        "--trace_every",
        type=non_negative_int,
        nargs="?",
        const=25,
        default=0,
        metavar="N",
        help="watch attention heads, lens and neurons: updates between traces, 25 without a number, 0: off; also at the "
        "start and the end",
    )


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text}")
    return value


def non_negative_int(text: str) -> int:
    """argparse type: an integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text}")
    return value


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def fraction(text: str) -> float:
    """argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")
    return value


def parse_args(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse ``argv`` with ``--config`` applied underneath it.

    The YAML's keys become flags in front of the command line, so each value passes the same type check and a
    flag given on the command line wins. Unknown keys and values of the wrong shape end the program with code 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    config_path = finder.parse_known_args(argv)[0].config
    if config_path is None:
        return parser.parse_args(argv)
    flags = {
        flag.removeprefix("--"): action
        for action in parser._actions
        for flag in action.option_strings
        if flag.startswith("--") and flag.removeprefix("--no-") != action.dest
    }
    given = {token.split("=", 1)[0] for token in argv if token.startswith("--")}
    tokens: list[str] = []
    for key, value in _read_yaml(parser, config_path).items():
        action = flags.get(str(key))
        if action is None or key in ("config", "help"):
            near = _nearest(str(key), [name for name in flags if name not in ("config", "help")])
            parser.error(f"{config_path}: unknown key {key!r}{near}; keys are the flags of --help without the dashes")
        if given.isdisjoint(action.option_strings):
            tokens += _as_tokens(parser, config_path, action, value)
    return parser.parse_args(tokens + argv)


def parse_stage(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """``parse_args``, with the directories of ``--wandb_artifact`` in the flags that they stand in for.

    Raises ``StoneyError`` for an artifact that can't be had.
    """
    args = parse_args(parser, argv)
    if getattr(args, "wandb_artifact", None):
        from stoney_rl import artifacts

        defaults = {flag: parser.get_default(flag) for flag in parser.artifact_inputs}
        artifacts.take(args, parser.artifact_inputs, defaults)
    return args


def _read_yaml(parser: argparse.ArgumentParser, path: str) -> dict:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"--config {path}: {error.strerror}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config {path}: not valid YAML: {' '.join(str(error).split())}")
    if content is None:
        return {}
    if not isinstance(content, dict):
        parser.error(f"--config {path}: expected 'flag: value' lines, found a {type(content).__name__}")
    return content


def _as_tokens(parser: argparse.ArgumentParser, path: str, action: argparse.Action, value: object) -> list[str]:
    flag = action.option_strings[0]
    if value is None:
        return []
    if isinstance(action, argparse.BooleanOptionalAction | argparse._StoreTrueAction):
        if not isinstance(value, bool):
            parser.error(f"{path}: {action.dest}: expected true or false, got {value!r}")
        if value:
            return [flag]
        return [action.option_strings[1]] if isinstance(action, argparse.BooleanOptionalAction) else []
    many = action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction)
    if isinstance(value, dict | bool) or (isinstance(value, list) and not many):
        parser.error(f"{path}: {action.dest}: expected one value, got {value!r}")
    values = [str(item) for item in value] if isinstance(value, list) else [str(value)]
    if action.nargs in ("+", "*"):
        return [flag, *values]
    return [f"{flag}={item}" for item in values]


def _nearest(name: str, names: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


class Problems:
    """Collects everything that is wrong with the arguments, so that a user hears of all of it at once."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        self.messages.append(message)

    def raise_if_any(self) -> None:
        """Raise ``StoneyError`` with every collected problem, one a line."""
        if self.messages:
            raise StoneyError("\n".join(self.messages))


def run(main: Callable[[], int | None]) -> None:
    """Run a script's ``main`` as the process: one line for bad input, no traceback, exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    name = ": ".join(filter(None, [Path(sys.argv[0]).name, distributed.who()]))
    try:
        code = distributed.recorded(main)()
    except Preempted as stop:
        print(f"{name}: {stop}", file=sys.stderr)
        code = EXIT_RESUME
    except StoneyError as error:
        for line in str(error).splitlines():
            print(f"{name}: error: {line}", file=sys.stderr)
        code = EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(
            f"{name}: error: {place}{error.strerror}; make room and start again: what was finished is kept",
            file=sys.stderr,
        )
        code = EXIT_BAD_INPUT
    distributed.leave(code)
    sys.exit(code)
