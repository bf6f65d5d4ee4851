"""What a fault costs a run: workers, nodes and disks are killed under training, and what comes out is compared.

    python benchmarks/survival.py
    python benchmarks/survival.py --faults "a killed worker" --steps 60

Each fault hits a training of a tiny model (one layer, random weights) by train_distributed.py or train_lora.py, on CPUs
over gloo; nodes are torchrun agents on this machine. The same run without a fault is the measure: what comes out must
have its loss curve and its weights, and no more than one save interval may have been trained twice.
Writes --output. Exit codes: 0 all of it survived, 1 something did not, 2 bad input.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: its own folder would hide the standard library's `inspect`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


import argparse
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from stoney_rl import checkpoints, cli, distributed
from stoney_rl.errors import StoneyError

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
SAVE_STEPS, FAULT_STEP = 10, 36  # every fault comes between two checkpoints
TINY = (
    *("--model", "base", "--dataset", "rows.jsonl", "--test_fraction", "0.2", "--validation_fraction", "0.1"),
    *("--global_batch_size", "16", "--learning_rate", "1e-3", "--lora_rank", "4"),
)
SAME = ("--eval_steps", "0", "--dtype", "fp32", "--output_dir", "run_ckpt", "--wandb_mode", "disabled")
PATIENCE = 240  # seconds that any part of a fault may take


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT",
                        help=f"any of: {'; '.join(FAULTS)}")  # fmt: skip
    parser.add_argument("--steps", type=cli.positive_int, default=100, help="updates of each run")
    parser.add_argument("--output", default="results/survival.json", help="file of the results")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = cli.parse_args(build_parser(), argv)
    if args.steps <= FAULT_STEP + SAVE_STEPS:
        raise StoneyError(
            f"--steps {args.steps}: the faults come at update {FAULT_STEP}; give more than {FAULT_STEP + SAVE_STEPS}"
        )
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        undisturbed = prepare(Path(directory), args.steps)
        for name in args.faults:
            rows.append(measure(name, undisturbed))
            print(f"{'✓' if rows[-1]['same_result'] else '✗'} {name}: {rows[-1]['lost']}", flush=True)
    checkpoints.write_json(
        Path(args.output),
        {"command": f"python benchmarks/survival.py --steps {args.steps}", "seed": 0, "updates": args.steps,
         "save_steps": SAVE_STEPS, "machine": f"{os.cpu_count()} CPU cores, gloo", "faults": rows},
    )  # fmt: skip
    return 0 if all(row["same_result"] for row in rows) else 1


@dataclass
class Run:
    """A training in a folder of its own. ``agents``: the processes started so far; ``logs``: what each printed."""

    folder: Path
    steps: int
    arguments: tuple[str, ...] = TINY
    agents: list[subprocess.Popen] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)

    def start(
        self, *launcher: str, folder: Path | None = None, more: tuple[str, ...] = (), **options
    ) -> subprocess.Popen:
        """Start ``launcher`` with the run's arguments; from ``folder`` if given: a node with a disk of its own."""
        self.logs.append(self.folder / f"agent-{len(self.agents)}.log")
        argv = [*self.arguments, "--max_steps", str(self.steps), "--save_steps", str(SAVE_STEPS), *SAME, *more]
        with self.logs[-1].open("w") as log:
            agent = subprocess.Popen(
                [*launcher, *argv], cwd=folder or self.folder, stdout=log, stderr=log, env=environment(), **options
            )
        self.agents.append(agent)
        return agent

    def wait_for(self, step: int) -> None:
        """Wait until update ``step`` is done."""
        wait_until(lambda: self.last_seen() >= step, self)

    def last_seen(self) -> int:
        """The last update that any process has shown."""
        seen = [
            int(step)
            for at in range(len(self.logs))
            for step in re.findall(rf"(\d+)/{self.steps} \[", self.printed(at))
        ]
        return max(seen, default=0)

    def end(self) -> list[int]:
        """Wait for every process that was started; their exit codes."""
        return [agent.wait(PATIENCE) for agent in self.agents]

    def printed(self, agent: int = -1) -> str:
        return self.logs[agent].read_text(encoding="utf-8", errors="replace")

    def trained_twice(self) -> int:
        """Updates that were trained again: the last one seen before each restart, less the one that was resumed from."""
        seen, twice = 0, 0
        printed = "\n".join(self.printed(at) for at in range(len(self.logs)))
        resumed = r"--resume: (?:continuing after \S+checkpoint-(\d+)|nothing yet)"
        for token in re.finditer(rf"(\d+)/{self.steps} \[|{resumed}", printed):
            if token[1]:
                seen = int(token[1])
            elif seen:
                twice, seen = twice + max(0, seen - int(token[2] or 0)), 0
        return twice


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "TORCHELASTIC", "RANK"))}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    # As Instructions.txt says wherever torchrun may restart: torch 2.13 shares one store between the rounds of a launch.
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", distributed.OWN_STORE: "1"}


def wait_until(done: Callable[[], bool], run: Run) -> None:
    """Raises ``StoneyError`` with the last lines of the run if it takes longer than ``PATIENCE`` or all has ended."""
    began = time.monotonic()
    while not done():
        if time.monotonic() - began > PATIENCE or all(agent.poll() is not None for agent in run.agents):
            if done():
                return
            raise StoneyError(f"the run did not get there: {run.printed()[-2000:]}")
        time.sleep(0.02)


# Launchers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def one_process() -> list[str]:
    return [PYTHON, str(ROOT / "train_lora.py"), "--batch_size", "4"]


def two_processes(*options: str) -> list[str]:
    launcher = ["torchrun", "--standalone", "--nproc_per_node=2", *options]
    return [*launcher, str(ROOT / "train_distributed.py"), "--batch_size", "4"]


def nodes(*options: str) -> Callable[[int], list[str]]:
    """The command of each of two nodes with one process; ``{rank}`` in an option becomes the node's."""

    def node(rank: int) -> list[str]:
        launcher = ["torchrun", "--nnodes=2", "--nproc_per_node=1", *(option.format(rank=rank) for option in options)]
        return [*launcher, str(ROOT / "train_distributed.py"), "--batch_size", "4"]

    return node


def static_nodes() -> Callable[[int], list[str]]:
    return nodes("--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={free_port()}")


def elastic_nodes() -> Callable[[int], list[str]]:
    endpoint = f"--rdzv_endpoint=127.0.0.1:{free_port()}"
    return nodes("--max-restarts=3", "--rdzv_backend=c10d", "--rdzv_id=survival", endpoint)


def worker(agent: subprocess.Popen, rank: int) -> int:
    """The process number of ``agent``'s worker of that rank."""
    import psutil

    for child in psutil.Process(agent.pid).children():
        with contextlib.suppress(psutil.Error):
            if child.environ().get("RANK") == str(rank):
                return child.pid
    raise StoneyError(f"no worker of rank {rank} is running")


# Faults: each says by which command, and leaves a run that has ended.


def killed_worker(run: Run) -> str:
    agent = run.start(*two_processes("--max-restarts=3"))
    run.wait_for(FAULT_STEP)
    os.kill(worker(agent, 1), signal.SIGKILL)
    run.end()
    return "kill -KILL <worker of rank 1>; torchrun --max-restarts=3"


def stopped(run: Run, launcher: list[str], number: signal.Signals) -> int:
    """Send a signal to what ``launcher`` starts, wait for its end, start it again with --resume; the first exit code."""
    agent = run.start(*launcher)
    run.wait_for(FAULT_STEP)
    agent.send_signal(number)
    run.end()
    run.start(*launcher, "--resume")
    run.end()
    return agent.returncode


def killed_process(run: Run) -> str:
    stopped(run, one_process(), signal.SIGKILL)
    return "kill -KILL <train_lora.py>; again with --resume"


def terminated_process(run: Run) -> str:
    code = stopped(run, one_process(), signal.SIGTERM)
    if code != cli.EXIT_RESUME:
        raise StoneyError(f"exit code {code} after a SIGTERM, expected {cli.EXIT_RESUME}")
    return f"kill -TERM <train_lora.py>: exit code {cli.EXIT_RESUME}; again with --resume"


def terminated_launcher(run: Run) -> str:
    stopped(run, two_processes(), signal.SIGTERM)
    return "kill -TERM <torchrun>; again with --resume"


def killed_agent(run: Run) -> str:
    node = elastic_nodes()
    run.start(*node(0), "--resume")
    second = run.start(*node(1), "--resume")
    run.wait_for(FAULT_STEP)
    second.kill()
    run.start(*node(1), "--resume")  # the node comes back; the other one waits for it
    run.end()
    return "kill -KILL <torchrun of node 1>, started again; --rdzv_backend=c10d --max-restarts=3"


def lost_master(run: Run) -> str:
    node = static_nodes()
    first = run.start(*node(0))
    run.start(*node(1))
    run.wait_for(FAULT_STEP)
    master = worker(first, 0)
    first.kill()
    os.kill(master, signal.SIGKILL)
    run.end()
    node = static_nodes()
    for rank in (0, 1):
        run.start(*node(rank), "--resume")
    run.end()
    return "kill -KILL <torchrun of node 0> <its worker>; both nodes again with --resume"


def lost_disk(run: Run) -> str:
    disks = [run.folder, run.folder / "node-1"]
    shutil.copytree(run.folder / "base", disks[1] / "base")
    shutil.copy(run.folder / "rows.jsonl", disks[1])
    node = static_nodes()
    agents = [run.start(*node(rank), folder=disks[rank], more=("--save_on_each_node",)) for rank in (0, 1)]
    run.wait_for(FAULT_STEP)
    victims = [agents[0].pid, worker(agents[0], 0)]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    run.end()
    shutil.rmtree(disks[0] / "run_ckpt.partial")
    node = static_nodes()
    for rank in (0, 1):
        run.start(*node(rank), "--resume", folder=disks[rank], more=("--save_on_each_node",))
    run.end()
    return "kill -KILL <all of node 0>, its checkpoints deleted, no disk shared; --save_on_each_node, both again with --resume"


def full_disk(run: Run) -> str:
    # Larger than any file of a checkpoint but the optimizer's, so that half a checkpoint has been written by then.
    limit = 20_000
    run.start(
        sys.executable, *one_process()[1:], preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    if run.end() != [cli.EXIT_BAD_INPUT] or "can't be written" not in run.printed():
        raise StoneyError(f"a full disk was not told: {run.printed()[-500:]}")
    left = [path.name for path in (run.folder / "run_ckpt.partial").iterdir() if path.name.startswith("checkpoint-")]
    if left:
        raise StoneyError(f"half a checkpoint: {left}")
    run.start(*one_process(), "--resume")
    run.end()
    return f"ulimit -f {limit // 512} (no file above {limit:,} bytes): exit code 2, no half checkpoint; again with --resume"


FAULTS: dict[str, Callable[[Run], str]] = {
    "a killed process": killed_process,
    "SIGTERM to a process": terminated_process,
    "a killed worker": killed_worker,
    "SIGTERM to torchrun": terminated_launcher,
    "a killed node agent": killed_agent,
    "a lost master": lost_master,
    "a lost master with its disk": lost_disk,
    "a full disk": full_disk,
}


# What came out


def prepare(folder: Path, steps: int) -> Run:
    """A tiny model, rows of the invented language, and a run on them that nothing disturbs."""
    sys.path.append(str(ROOT / "tests"))
    import tiny

    from stoney_rl import data, planted

    tiny.checkpoint(folder / "base", layers=1)
    rows = planted.PlantedLanguage(seed=0, num_lexemes=20).rows(rules_per_lexeme=3, templates_per_fact=1)
    data.write_jsonl(folder / "rows.jsonl", rows)
    run = fresh(folder / "undisturbed", folder, steps)
    run.start(*one_process())
    run.end()
    return run


def fresh(folder: Path, inputs: Path, steps: int) -> Run:
    folder.mkdir()
    shutil.copytree(inputs / "base", folder / "base")
    shutil.copy(inputs / "rows.jsonl", folder)
    return Run(folder, steps)


def measure(name: str, undisturbed: Run) -> dict:
    """Let the fault ``name`` happen to a run, and compare with the undisturbed one."""
    inputs = undisturbed.folder.parent
    run = fresh(inputs / re.sub(r"\W+", "-", name), inputs, undisturbed.steps)
    began = time.monotonic()
    with ended(run):
        command = FAULTS[name](run)
    loss, weights = differences(run.folder, undisturbed.folder)
    twice = run.trained_twice()
    left = [
        path.name for path in run.folder.rglob("*") if path.name.startswith((".saving", ".old-", ".arriving", ".run"))
    ]
    return {
        "fault": name,
        "command": command,
        "lost": f"{twice} of {run.steps} updates trained twice, nothing else"
        if max(loss, weights) < 1e-4
        else "the run",
        "updates_trained_twice": twice,
        "largest_loss_difference": loss,
        "largest_weight_difference": weights,
        "left_behind": left,
        "same_result": max(loss, weights) < 1e-4 and twice <= SAVE_STEPS and not left,
        "seconds": round(time.monotonic() - began, 1),
    }


@contextlib.contextmanager
def ended(run: Run) -> Iterator[None]:
    """No process of the run outlives this."""
    try:
        yield
    finally:
        for agent in run.agents:
            if agent.poll() is None:
                agent.terminate()


def differences(one: Path, other: Path) -> tuple[float, float]:
    """The largest absolute difference of the two runs' losses, update by update, and of their merged weights.

    Infinite where one has not ended, or has other updates.
    """
    from safetensors.torch import load_file

    if not all((folder / "run_merged").is_dir() and (folder / "run_ckpt").is_dir() for folder in (one, other)):
        return float("inf"), float("inf")
    curves = []
    for folder in (one, other):
        state = json.loads((folder / "run_ckpt" / "trainer_state.json").read_text(encoding="utf-8"))
        curves.append({log["step"]: log["loss"] for log in state["log_history"] if "loss" in log})
    first, second = (load_file(folder / "run_merged" / "model.safetensors") for folder in (one, other))
    if curves[0].keys() != curves[1].keys() or first.keys() != second.keys():
        return float("inf"), float("inf")
    return (
        max(abs(curves[0][step] - curves[1][step]) for step in curves[0]),
        max(float((first[name].float() - second[name].float()).abs().max()) for name in first),
    )


if __name__ == "__main__":
    cli.run(main)
