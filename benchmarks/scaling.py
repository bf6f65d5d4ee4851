"""One process, two processes and two nodes: do they train the same model, and how much faster?

    python benchmarks/scaling.py
    python benchmarks/scaling.py --steps 8 --global_batch_size 16 --model checkpoints/smollm2-135m

The same rows, seed and rows an update, on CPUs over gloo with one thread a process: train_lora.py alone, torchrun with
two processes, and two torchrun agents with one process each on loopback. Compared are the losses, update by update, and
the merged weights. Efficiency is the time of one process, divided by twice that of two: 1 would be perfect.
Writes --output. Exit codes: 0 the same within 1e-4, 1 not, 2 bad input.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: its own folder would hide the standard library's `inspect`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


import argparse
import json
import os
import tempfile

from benchmarks.survival import Run, differences, one_process, static_nodes, two_processes
from stoney_rl import checkpoints, cli
from stoney_rl.errors import StoneyError

TOLERANCE = 1e-4


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model", default="checkpoints/smollm2-135m", help="folder of a base or merged model")
    parser.add_argument("--dataset", default="data/planted/rows.jsonl", help="file or folder of rows")
    parser.add_argument("--steps", type=cli.positive_int, default=5, help="updates of each run")
    parser.add_argument("--global_batch_size", type=cli.positive_int, default=8, help="rows an update; a multiple of 8")
    parser.add_argument("--output", default="results/benchmark-scaling.json", help="file of the results")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = cli.parse_args(build_parser(), argv)
    if args.global_batch_size % 8:
        raise StoneyError(
            f"--global_batch_size {args.global_batch_size}: two processes take 4 rows each; a multiple of 8"
        )
    for flag in ("model", "dataset"):
        if not Path(getattr(args, flag)).exists():
            raise StoneyError(f"--{flag} {getattr(args, flag)}: not there; see python {Path(sys.argv[0]).name} --help")
    arguments = (
        *("--model", str(Path(args.model).resolve()), "--dataset", str(Path(args.dataset).resolve())),
        *("--global_batch_size", str(args.global_batch_size), "--no-gradient_checkpointing"),
    )
    with tempfile.TemporaryDirectory() as directory:
        runs = {}
        for name, launchers in LAUNCHERS.items():
            runs[name] = run = Run(Path(directory) / name.replace(" ", "-"), args.steps, arguments)
            run.folder.mkdir()
            for launcher in launchers():
                run.start(*launcher)
            if any(run.end()):
                raise StoneyError(f"{name}: the run failed: {run.printed(0)[-2000:]}")
        alone = runs["one process"]
        rows = [compare(name, run, alone) for name, run in runs.items()]
    print(f"{'':16}{'seconds':>9}{'speed-up':>10}{'efficiency':>12}{'loss differs by':>17}{'weights by':>12}")
    for row in rows:
        print(f"{row['name']:16}{row['seconds']:9.1f}{row['speedup']:10.2f}{row['efficiency']:12.2f}"
              f"{row['loss_difference']:17.1g}{row['weight_difference']:12.1g}")  # fmt: skip
    checkpoints.write_json(
        Path(args.output),
        {"command": " ".join(["python benchmarks/scaling.py", *(sys.argv[1:] if argv is None else argv)]), "seed": 0,
         "arguments": vars(args), "load": os.getloadavg()[0], "threads_a_process": 1, "tolerance": TOLERANCE,
         "machine": f"{os.cpu_count()} CPU cores, gloo", "runs": rows},
    )  # fmt: skip
    return 0 if all(max(row["loss_difference"], row["weight_difference"]) < TOLERANCE for row in rows) else 1


def nodes() -> list[list[str]]:
    node = static_nodes()
    return [node(0), node(1)]


LAUNCHERS = {
    "one process": lambda: [one_process()],
    "two processes": lambda: [two_processes()],
    "two nodes": nodes,
}


def compare(name: str, run: Run, alone: Run) -> dict:
    """Times of the training alone, without loading and merging, and the differences from one process."""
    seconds = [
        json.loads((each.folder / "run_ckpt" / "stage.json").read_text(encoding="utf-8"))["training"]["seconds"]
        for each in (run, alone)
    ]
    loss, weights = differences(run.folder, alone.folder)
    processes = 1 if run is alone else 2
    return {
        "name": name,
        "processes": processes,
        "seconds": seconds[0],
        "speedup": seconds[1] / seconds[0],
        "efficiency": seconds[1] / seconds[0] / processes,
        "loss_difference": loss,
        "weight_difference": weights,
    }


if __name__ == "__main__":
    cli.run(main)
