"""Run a W&B sweep file without an account: one training after the other, a table, a picture, the best run's command.

    python run_sweep.py sweep.yaml
    python run_sweep.py sweep.yaml --num_runs 8 --seed 1 --output_dir sweeps/quick
    python run_sweep.py my_grid.yaml --method grid --keep all

Reads: the file that `wandb sweep` takes, with method grid or random; each parameter is a flag of its program.
Writes: --output_dir (default sweeps/<name of the file>/): trials.jsonl, table.csv, summary.txt (best first), plot.png (the
metric by each parameter); for each trial its log and its curve, and the best one's model (--keep all: every model).
The same command goes on after an interruption: finished trials stay as they are, an unfinished one continues from its last
checkpoint, failed ones are tried again. A larger --num_runs adds trials.
Exit codes: 0 done, 2 bad input or no trial with a result, 130 or 143 interrupted.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from stoney_rl import checkpoints, cli, records, runs, sweep, sweep_report
from stoney_rl.errors import StoneyError

SWEEP_FILE = "sweep.json"
TRIALS_FILE = "trials.jsonl"
STOP_SECONDS = 60.0  # for a trial that is told to end to write down what it has


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("sweep", nargs="?", default="sweep.yaml", help="the sweep file")
    parser.add_argument("--method", choices=sweep.METHODS, help="default: the file's")
    parser.add_argument(
        "--num_runs", type=cli.positive_int, help="trials; default: the file's run_cap, or a whole grid"
    )
    parser.add_argument(
        "--seed", type=cli.non_negative_int, default=0, help="of the random draws; a trial's own is a parameter"
    )
    parser.add_argument("--output_dir", help="default: sweeps/<name of the file>")
    parser.add_argument("--keep", choices=["best", "all"], default="best", help="whose model stays on the disk")
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier sweep in the output directory")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    plan = sweep.read_sweep(args.sweep, method=args.method)
    output = Path(args.output_dir or Path("sweeps", Path(args.sweep).stem))

    # 1. What to run, and what was run already.
    drawn = sweep.trials(plan, args.num_runs, seed=args.seed)
    commands = sweep.commands(plan, drawn, sys.executable)
    open_output(output, plan, args)
    done = {record["trial"]: record for record in records.read(output / TRIALS_FILE) if record["trial"] <= len(drawn)}
    best = sweep.best(plan, done.values())
    finished = {number for number, record in done.items() if record["state"] == "finished"}
    print(
        f"{args.sweep}: {len(drawn)} trials of {plan.program}, {'lowest' if plan.minimize else 'highest'} {plan.metric} wins"
        + (f"; {len(finished)} are finished already" if finished else "")
    )
    if len(drawn) < (args.num_runs or plan.run_cap or 0):
        print(f"there are no more than {len(drawn)} different trials")
    if plan.early_terminate:
        print("early_terminate is for W&B's server; here every trial runs to its end")

    # 2. Run it.
    from tqdm import tqdm

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    tidy(output, plan, done, args.keep)
    with tqdm(total=len(drawn), unit="trial", initial=len(finished)) as bar:
        for number in range(1, len(drawn) + 1):
            if number in finished:
                continue
            parameters = drawn[number - 1]
            varied = " ".join(f"{name}={sweep_report.short(parameters[name])}" for name in plan.varied())
            tqdm.write(f"trial {number}: {varied} (log: {trial_path(output, number, '.log')})")
            record = {"trial": number, "parameters": parameters} | run_trial(output, number, commands[number - 1])
            records.append(output / TRIALS_FILE, [record])
            done[number] = record
            best = sweep.best(plan, done.values())
            tqdm.write(
                f"trial {number}: {sweep_report.outcome(plan, record)}"
                + (", the best so far" if record is best else "")
            )
            tidy(output, plan, done, args.keep)
            bar.update()

    # 3. Say what came out.
    summary = sweep_report.as_text(plan, done, commands, wanted=len(drawn))
    checkpoints.write_text(output / "summary.txt", summary)
    sweep_report.plot(plan, done, output / "plot.png")
    print("\n" + summary)
    if best is None:
        raise StoneyError(f"{output}: no trial ended with a finite {plan.metric}; their logs are there")
    model = trial_path(output, best["trial"])
    print(f"{output}/: table.csv, summary.txt, plot.png" + (f"; the best model is {model}" if model.exists() else ""))


def open_output(output: Path, plan: sweep.Sweep, args: argparse.Namespace) -> None:
    """Make the directory, or go on in it. Raises ``StoneyError`` if it holds another sweep, or something else."""
    identity = {
        "program": plan.program,
        "method": plan.method,
        "seed": args.seed if plan.method == "random" else None,
        "command": list(plan.command),
        "parameters": plan.parameters,
    }
    if output.exists() and not output.is_dir():
        raise StoneyError(f"--output_dir: {output} is a file; choose a directory")
    if output.exists() and any(output.iterdir()):
        if not (output / SWEEP_FILE).is_file():
            raise StoneyError(f"--output_dir: {output} holds something else than a sweep; choose another directory")
        runs.hold(output)
        try:
            before = json.loads((output / SWEEP_FILE).read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        differing = [key for key in identity if before.get(key) != identity[key]]
        if differing and not args.overwrite:
            raise StoneyError(
                f"{output}: holds another sweep ({', '.join(differing)} differ); choose another --output_dir, or --overwrite "
                "to delete it"
            )
        if args.overwrite:
            shutil.rmtree(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        runs.hold(output)
        checkpoints.write_json(output / SWEEP_FILE, identity)
    except OSError as error:
        raise StoneyError(f"--output_dir: cannot write {output} ({error.strerror}); choose another") from error
    for stale in output.glob(".*.deleted"):  # a kill came in the middle of a deletion
        shutil.rmtree(stale)


def trial_path(output: Path, number: int, suffix: str = "") -> Path:
    """What belongs to a trial: its --output_dir, or with ``suffix`` a file beside it."""
    return output / f"trial-{number:03d}{suffix}"


def run_trial(output: Path, number: int, command: list[str]) -> dict:
    """Run a trial to its end: state 'finished' or 'failed', results, error, seconds.

    Whatever interrupts this script ends the trial first, and is raised.
    """
    model, log = trial_path(output, number), trial_path(output, number, ".log")
    command = [*command, "--output_dir", str(model)] + ([] if "--resume" in command else ["--resume"])
    environment = {"WANDB_RUN_GROUP": f"sweep-{output.name}", **os.environ, "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    with log.open("ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        begun = file.tell()
        # In a process group of its own: Ctrl-C reaches this script alone, which then ends the trial in its own way.
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment, process_group=0
        )
        try:
            code = child.wait()
        except BaseException:
            stop(child)
            raise
    ended = {"state": "finished", "results": {}, "error": None, "seconds": round(time.monotonic() - started, 1)}
    if code == 0:
        return ended | {"results": sweep.results(model)}
    said = last_error(log, begun) if code > 0 else f"killed by {signal.Signals(-code).name}"
    return ended | {"state": "failed", "error": said}


def stop(child: subprocess.Popen) -> None:
    """End a trial and the processes that it started: politely, then not."""
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(child.pid, number)
            child.wait(seconds)
            return
        except ProcessLookupError:
            return
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C waits no longer
            continue


def last_error(log: Path, begun: int) -> str:
    """What a failed trial said last, from byte ``begun`` of its log: the last line that tells of an error, else the last."""
    text = log.read_bytes()[begun:].decode("utf-8", errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    telling = [line for line in lines if re.search(r"error|exception|killed", line, re.IGNORECASE)]
    return (telling or lines or ["it said nothing"])[-1]


def tidy(output: Path, plan: sweep.Sweep, done: dict[int, dict], keep: str) -> None:
    """Write the table and, to ``keep`` the 'best' model, delete those of the other finished trials; their curves stay."""
    from tqdm import tqdm

    checkpoints.write_text(output / "table.csv", sweep_report.as_csv(plan, done))
    best = sweep.best(plan, done.values())
    if keep == "all" or best is None:
        return
    for number, record in sorted(done.items()):
        if record is best or record["state"] != "finished":
            continue
        curve = trial_path(output, number, ".trainer_state.json")
        if trial_path(output, number).exists() and not curve.exists():
            sweep.curve(trial_path(output, number)).replace(curve)
        for model in sorted(path for path in output.glob(f"trial-{number:03d}*") if path.is_dir()):
            doomed = model.rename(model.with_name(f".{model.name}.deleted"))  # what has its own name is whole
            shutil.rmtree(doomed)
            tqdm.write(f"{model}: deleted, trial {best['trial']} is better (--keep all keeps every model)")


if __name__ == "__main__":
    cli.run(main)
