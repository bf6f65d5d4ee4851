"""Several processes, on one machine or many: launching them, and what they must agree on.

torchrun starts the processes and says in the environment who they are; accelerate connects them (NCCL between GPUs,
gloo between CPUs). Importing this module loads no torch.
"""

import functools
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoney_rl.errors import Preempted, StoneyError

if TYPE_CHECKING:
    import argparse

    from stoney_rl import cli

ZERO_STAGES = {"zero2": 2, "zero3": 3}
# Seconds. How long processes wait for one another: the slowest thing that one does alone is to merge a large model.
PATIENCE = 7200
# How long torchrun waits for its workers to save after a SIGTERM, before it kills them (its own default is 30).
SHUTDOWN_SECONDS = 120
# torch 2.13 lets all rounds of a launch share one store: after a restart processes find the addresses of the dead there.
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def world_size() -> int:
    """The number of processes: torchrun's, or 1."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main() -> bool:
    """Whether this process writes and prints: rank 0 under torchrun, or the only one."""
    return (os.environ.get("RANK") or "0") == "0"


def who() -> str:
    """'rank 3 of 8 on host node-2' under torchrun, '' for a process of its own: what an error is signed with."""
    if "RANK" not in os.environ:
        return ""
    return f"rank {os.environ['RANK']} of {world_size()} on {socket.gethostname()}"


def is_restarted() -> bool:
    """Whether torchrun has started these processes again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0


def recorded(main: Callable[[], Any]) -> Callable[[], Any]:
    """``main``, whose exception under torchrun is shown in torchrun's summary, for the rank that failed first."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return main
    from torch.distributed.elastic.multiprocessing.errors import record

    told: list[Exception] = []

    def guarded() -> Any:
        try:
            return main()
        except (StoneyError, Preempted) as error:  # a line of their own, no traceback
            told.append(error)

    def run() -> Any:
        code = record(guarded)()
        if told:
            raise told[0]
        return code

    return run


def check_flags(args: "argparse.Namespace", problems: "cli.Problems") -> None:
    """Add to ``problems`` what is wrong with the flags of ``cli.add_parallel_flags``."""
    for flag in ("num_gpus", "max_restarts"):
        if getattr(args, flag) is not None and not args.multi_gpu:
            problems.add(f"--{flag}: only with --multi_gpu (torchrun has a flag of its own for it)")
    if args.fsdp and args.deepspeed:
        problems.add("--fsdp and --deepspeed: two ways to shard one model; give only one")
    if (args.fsdp or args.deepspeed) and "RANK" not in os.environ and not args.multi_gpu:
        problems.add("--fsdp and --deepspeed shard a model over several processes; add --multi_gpu, or use torchrun")
    if args.deepspeed:
        from importlib.util import find_spec

        if find_spec("deepspeed") is None:
            problems.add("--deepspeed: deepspeed is not installed; pip install deepspeed, or use --fsdp")
        if args.deepspeed not in ZERO_STAGES and not Path(args.deepspeed).is_file():
            problems.add(f"--deepspeed {args.deepspeed}: expected {' or '.join(ZERO_STAGES)}, or a JSON file")


def trainer_options(args: "argparse.Namespace", partial: Path) -> dict:
    """The keywords of transformers' TrainingArguments that say how processes work together on the run in ``partial``."""
    options: dict = {
        "ddp_timeout": PATIENCE,
        "ddp_find_unused_parameters": False,  # every weight of an adapter is used in every step
        "save_on_each_node": args.save_on_each_node and not shares_disk(partial),
    }
    if args.fsdp:
        options |= {"fsdp": True, "fsdp_config": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_offload": False}}
    if args.deepspeed in ZERO_STAGES:
        options["deepspeed"] = {
            "zero_optimization": {"stage": ZERO_STAGES[args.deepspeed], "overlap_comm": True},
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto"},
            "gradient_clipping": "auto",
            "gradient_accumulation_steps": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "train_batch_size": "auto",
        }
    elif args.deepspeed:
        options["deepspeed"] = args.deepspeed
    return options


def is_to_be_launched(args: "argparse.Namespace") -> bool:
    """Whether this process is to start others by torchrun (--multi_gpu), and is not one of them."""
    return args.multi_gpu and "RANK" not in os.environ


def relaunch_on_gpus(script: str, args: "argparse.Namespace", argv: list[str] | None) -> int:
    """Run ``script`` with ``argv`` (default: this process's) through torchrun, one process a GPU; the exit code of it all.

    Raises ``StoneyError`` if there are fewer GPUs than asked for, saying how many there are.
    """
    import torch

    available = torch.cuda.device_count()
    if not available or (args.num_gpus or 0) > available:
        asked = f"{args.num_gpus} GPUs asked for" if args.num_gpus else "GPUs asked for"
        remedy = f"use --num_gpus {available}" if available else "leave out --multi_gpu to train on the CPU"
        raise StoneyError(f"--multi_gpu: {asked}, {available} found on this machine; {remedy}")
    restarts = 3 if args.max_restarts is None else args.max_restarts
    argv = sys.argv[1:] if argv is None else argv
    return launch([script, *argv], processes=args.num_gpus or available, max_restarts=restarts)


def launch(command: list[str], *, processes: int, max_restarts: int) -> int:
    """torchrun in this process, on this machine: ``processes`` workers, started again from the last checkpoint.

    The exit code is the workers': 'resume me' if any says so, else bad input, else 1.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from stoney_rl import cli

    os.environ.setdefault(OWN_STORE, "1")
    options = ["--standalone", f"--nproc_per_node={processes}", f"--max-restarts={max_restarts}",
               f"--shutdown-timeout={SHUTDOWN_SECONDS}"]  # fmt: skip
    sys.stdout.flush()
    try:
        run.run(run.parse_args([*options, *command]))
    except SignalException as signalled:
        return cli.EXIT_INTERRUPTED if signalled.sigval == signal.SIGINT else cli.EXIT_RESUME
    except ChildFailedError as failed:
        codes = {failure.exitcode for failure in failed.failures.values()}
        print(failed, file=sys.stderr)
        return next((code for code in (cli.EXIT_RESUME, cli.EXIT_BAD_INPUT) if code in codes), 1)
    return 0


def connect(args: "argparse.Namespace") -> None:
    """Join the other processes, if there are any; a process of its own keeps to one GPU, as TRL refuses DataParallel.

    Once joined, this process gets a SIGTERM when its torchrun agent dies, on which training saves and ends: an orphan must
    not go on writing beside its successor.
    Raises ``StoneyError`` where ``args`` asks for sharding and there is no GPU.
    """
    if "RANK" not in os.environ:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
        return
    import ctypes

    import torch
    from accelerate import PartialState

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=PATIENCE))
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) and os.environ.get(OWN_STORE) != "1" and is_main():
        print(
            f"torchrun may restart this run, and a restart may hang (torch 2.13): export {OWN_STORE}=1 before torchrun"
        )
    if (args.fsdp or args.deepspeed) and not torch.cuda.is_available():
        raise StoneyError("--fsdp and --deepspeed: accelerate shards models over GPUs only, and there is none here")


def leave(code: int | None) -> None:
    """Part from the other processes before this one ends with ``code``: connections that are torn down with the
    interpreter can abort it, and then the code is lost. After a failure NCCL is left alone, which would wait for the rest,
    and processes other than the main one, which has W&B's run to end, end here: taking connections down can abort them too
    where the other side has gone.
    """
    if "RANK" not in os.environ or "torch" not in sys.modules:
        return
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        return
    if code and not is_main():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if not code or distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


def on_main(call: Callable[[], Any]) -> Any:
    """What ``call`` returns on rank 0, on every rank. If it raises there, the others end too, and leave it the word."""
    if world_size() == 1:
        return call()
    from accelerate.utils import broadcast_object_list

    from stoney_rl import cli

    outcome: list = [None, None]
    error = None
    if is_main():
        try:
            outcome[0] = call()
        except (StoneyError, OSError) as raised:
            error, outcome[1] = raised, str(raised)
    broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1] is not None:
        sys.exit(cli.EXIT_BAD_INPUT)
    return outcome[0]


def check_same(**values: object) -> None:
    """Raise ``StoneyError`` unless every process has the same ``values``: nodes may hold different files by one name."""
    if world_size() == 1:
        return
    from accelerate.utils import gather_object

    everyone = gather_object([(who(), values)])
    for name, mine in everyone[0][1].items():
        other = next((rank for rank, theirs in everyone if theirs[name] != mine), None)
        if other is not None:
            raise StoneyError(
                f"{name}: {other} has another one than {everyone[0][0]}; copy the same files to every node"
            )


@functools.cache
def shares_disk(place: Path) -> bool:
    """Whether this process sees the directory ``place`` of rank 0. The first call is for all processes at once."""
    if world_size() == 1:
        return True
    mark = place / f".seen-{on_main(lambda: secrets.token_hex(8))}"
    on_main(mark.touch)
    sees = mark.exists()
    wait_for_everyone()
    on_main(mark.unlink)
    return sees


def share_checkpoint(partial: Path) -> Path | None:
    """The newest whole checkpoint that any node holds below ``partial``, on every node; None if there is none.

    Nodes need no common disk: a node that lacks the checkpoint is sent its files. It is put there whole or not at all.
    """
    from stoney_rl import runs

    mine = runs.last_checkpoint(partial)
    if world_size() == 1:
        return mine
    from accelerate.utils import broadcast_object_list, gather_object

    steps = gather_object([runs.step_of(mine) if mine else -1])
    newest = max(steps)
    if newest < 0:
        return None
    target = partial / f"checkpoint-{newest}"
    absent = gather_object([not target.is_dir()])
    if any(absent):
        owner = steps.index(newest)
        names = [None]
        if int(os.environ["RANK"]) == owner:
            names = [sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())]
        broadcast_object_list(names, from_process=owner)
        writes = os.environ["LOCAL_RANK"] == "0" and not target.is_dir()
        work = partial / f".arriving-{newest}"
        if writes:
            shutil.rmtree(work, ignore_errors=True)
        for name in names[0]:
            content = [(target / name).read_bytes() if int(os.environ["RANK"]) == owner else None]
            broadcast_object_list(content, from_process=owner)
            if writes:
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                (work / name).write_bytes(content[0])
        if writes:
            os.rename(work, target)
        wait_for_everyone()  # nobody reads before all is written
    return target


def wait_for_everyone() -> None:
    """Every process waits here for the others."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
