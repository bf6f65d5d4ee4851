"""GRPO on a CPU: train_grpo.py beside TRL's own command line, `trl grpo`, with the same reward, model and sizes.

    python benchmarks/grpo.py
    python benchmarks/grpo.py --steps 6 --repeats 3 --batch_size 64 --group_size 16
    python benchmarks/grpo.py --scoring_only

Each variant is a process of its own, in turn, --repeats times: the same rows, completions a step, groups, lengths,
adapter, KL weight, learning rate and temperature, paid by the composite reward of stoney_rl/rewards. Seconds a step are
taken from transformers' progress bar. The two sides draw different completions, so tokens a completion are given too.
Memory is resident memory of the training process up to the last update.

Then the reward alone: the composite on 1,024 completions against a lexicon of 45,000 forms of the planted language, and
its share of a step of that size.

Writes --output. Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: its own folder would hide the standard library's `inspect`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import asdict

from benchmarks import measure
from benchmarks.sft import environment, find_trl, flags, megabytes, readable
from stoney_rl import checkpoints, cli
from stoney_rl.errors import StoneyError

ROOT = Path(__file__).resolve().parent.parent
TRL, TRL_FAST, OURS = "trl grpo", "trl grpo, no checkpointing", "train_grpo.py"
VARIANTS = (TRL, TRL_FAST, OURS)
FORMS, COMPLETIONS = 45_000, 1024


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model", default="checkpoints/smollm2-135m", help="folder of a base or merged model")
    parser.add_argument("--dataset", default="data/planted/rows.jsonl", help="file or folder of rows")
    parser.add_argument("--lexicon", default="data/planted/lexicon.jsonl", help="lexicon file of the reward")
    parser.add_argument("--output", default="results/benchmark-grpo.json", help="file of the results")
    parser.add_argument("--repeats", type=cli.positive_int, default=1, help="runs of each variant, in turn")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[TRL, OURS], metavar="VARIANT",
                        help=f"any of {', '.join(map(repr, VARIANTS))}")  # fmt: skip
    parser.add_argument("--scoring_only", action="store_true", help="measure the reward alone")
    parser.add_argument("--threads", type=cli.positive_int, default=measure.usable_cores(), help="of torch, every run")
    same = parser.add_argument_group("the same for every variant")
    same.add_argument("--steps", type=cli.positive_int, default=4, help="updates")
    same.add_argument("--batch_size", type=cli.positive_int, default=64, help="completions a step")
    same.add_argument("--group_size", type=cli.positive_int, default=16, help="completions of one prompt")
    same.add_argument("--micro_batch_size", type=cli.positive_int, default=16, help="completions at a time")
    same.add_argument("--max_completion_length", type=cli.positive_int, default=32, help="tokens")
    same.add_argument("--kl_penalty", type=float, default=0.04, help="weight of the KL term")
    same.add_argument("--lora_rank", type=cli.positive_int, default=16, help="on all linear layers")
    same.add_argument("--learning_rate", type=cli.positive_float, default=2e-5, help="constant")
    same.add_argument("--seed", type=cli.non_negative_int, default=0, help="order of the prompts, sampling, adapter")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    trl = find_trl(args)
    machine = measure.machine(args.threads)
    print(f"{machine['cpu']}, {machine['cores']} cores, torch threads {args.threads}")
    notice = measure.load_notice(machine["load"], machine["cores"])
    if notice:
        print(notice)

    results = {} if args.scoring_only else train(args, trl)
    scoring = measure.in_process(score_many, args.seed)
    step = results.get(OURS, {}).get("step_seconds")
    if step is not None:
        scoring["share_of_a_step"] = scoring["seconds"] / (step * scoring["completions"] / args.batch_size)
    print(table(results, scoring))
    if notice:
        print(notice)
    report = checkpoints.describe_stage(
        "benchmark-grpo", arguments=vars(args), seed=args.seed, machine=machine, results=results, scoring=scoring
    )
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_json(Path(args.output), report)
    print(f"{args.output}: the same, with every run, versions and machine")


def train(args: argparse.Namespace, trl: Path) -> dict:
    """Run every variant and sum up what it took."""
    from tqdm import tqdm

    with measure.ending_tidily(), tempfile.TemporaryDirectory(prefix="stoney-benchmark-") as folder:
        work = Path(folder)
        measure.in_process(prepare, vars(args), work)
        commands = {name: command(name, args, work, trl) for name in args.variants}
        env = environment(args.threads, work) | {
            "PYTHONPATH": str(ROOT),
            "STONEY_BENCHMARK_LEXICON": str(Path(args.lexicon).resolve()),
        }
        runs: dict[str, list] = {name: [] for name in args.variants}
        for repeat in range(args.repeats):
            for name in args.variants:
                with tqdm(total=args.steps, desc=f"{repeat + 1}/{args.repeats} {name}", unit="step") as bar:
                    run = measure.run_training(
                        commands[name],
                        updates=args.steps,
                        env=env,
                        progress=lambda done, bar=bar: bar.update(done - bar.n),
                    )
                runs[name].append({"run": run, **read_log(output_directory(name, work), name)})
        results = {name: summarise(entries) for name, entries in runs.items()}
        for name, entry in results.items():
            entry["command"] = readable(commands[name], work)
        return results


def prepare(args: dict, work: Path) -> None:
    """Write the training rows of train_grpo.py's split for `trl grpo`. Runs in a process of its own."""
    from stoney_rl import corpus

    rows = corpus.prepare(args["dataset"]).split.train
    (work / "trl").mkdir()
    lines = [json.dumps({"prompt": row.prompt, "row": json.dumps(row.to_dict())}) + "\n" for row in rows]
    (work / "trl" / "train.jsonl").write_text("".join(lines), encoding="utf-8")


def output_directory(variant: str, work: Path) -> Path:
    return work / f"out-{VARIANTS.index(variant)}"


def command(variant: str, args: argparse.Namespace, work: Path, trl: Path) -> list[str]:
    """The command line of ``variant``. Both sides: a log record for each update, no evaluation, one save."""
    output = output_directory(variant, work)
    shared = {
        "max_steps": args.steps,
        "max_completion_length": args.max_completion_length,
        "temperature": 1.0,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "constant",
        "lora_alpha": 32,
        "logging_steps": 1,
        "save_steps": 1_000_000,  # the last update is always saved
        "seed": args.seed,
        "output_dir": output,
    }
    if variant == OURS:
        own = {
            "lora_path": args.model,
            "dataset": args.dataset,
            "lexicon": args.lexicon,
            "adapter_dir": f"{output}-adapter",
            "batch_size": args.batch_size,
            "group_size": args.group_size,
            "micro_batch_size": args.micro_batch_size,
            "kl_penalty": args.kl_penalty,
            "lora_rank": args.lora_rank,
            "eval_steps": 0,
            "eval_prompts": 1,
            "preflight_prompts": 0,
            "wandb_mode": "disabled",
        }
        return [sys.executable, str(ROOT / "train_grpo.py"), *flags(own | shared), "--overwrite"]
    own = {
        "model_name_or_path": args.model,
        "dataset_name": work / "trl",
        "reward_funcs": "benchmarks.composite_reward.composite",
        "per_device_train_batch_size": args.micro_batch_size,
        "gradient_accumulation_steps": args.batch_size // args.micro_batch_size,
        "num_generations": args.group_size,
        "beta": args.kl_penalty,
        "epsilon_high": 0.28,
        "lora_r": args.lora_rank,
        "lora_target_modules": "all-linear",
        "use_cpu": True,
        "dtype": "float32",
        "gradient_checkpointing": variant == TRL,
        "report_to": "none",
    }
    return [str(trl), "grpo", *flags(own | shared), "--use_peft"]


def read_log(output: Path, variant: str) -> dict:
    """The trainer's own record: tokens a completion and the reward, each the mean over the steps."""
    states = [json.loads(path.read_text(encoding="utf-8")) for path in output.parent.rglob("trainer_state.json")
              if output.name in str(path)]  # fmt: skip
    if not states:
        raise StoneyError(f"{variant}: wrote no trainer_state.json into {output}; was it interrupted?")
    logs = [entry for entry in max(states, key=lambda state: state["global_step"])["log_history"] if "reward" in entry]
    return {
        "tokens_a_completion": statistics.fmean(entry["completions/mean_length"] for entry in logs),
        "reward": statistics.fmean(entry["reward"] for entry in logs),
    }


def summarise(entries: list[dict]) -> dict:
    """Medians over the repeats, and every run beneath them."""
    runs: list[measure.Run] = [entry["run"] for entry in entries]
    in_training = [run.peak_training_bytes for run in runs if run.peak_training_bytes is not None]
    return {
        "step_seconds": statistics.median(second for run in runs for second in run.update_seconds),
        "training_seconds": statistics.median(run.training_seconds for run in runs),
        "process_seconds": statistics.median(run.seconds for run in runs),
        "peak_training_bytes": max(in_training, default=None),
        "peak_bytes": max(run.peak_bytes for run in runs),
        "tokens_a_completion": statistics.fmean(entry["tokens_a_completion"] for entry in entries),
        "reward": statistics.fmean(entry["reward"] for entry in entries),
        "runs": [asdict(entry.pop("run")) | entry for entry in entries],
    }


def score_many(seed: int) -> dict:
    """Seconds in which the default composite scores ``COMPLETIONS`` completions of 64 tasks against ``FORMS`` forms."""
    from stoney_rl.lexicon import LexiconEntry
    from stoney_rl.planted import PlantedLanguage
    from stoney_rl.rewards.composite import Composite, Task
    from stoney_rl.rewards.knowledge import Knowledge

    entries = PlantedLanguage(seed, FORMS // 7 + 1).lexicon()[:FORMS]
    knowledge = Knowledge.of(LexiconEntry(one.form, stem=one.stem, segmentation=one.segmentation) for one in entries)
    group = [task for task in map(Task.of, PlantedLanguage(seed, 120).rows()[:64]) for _ in range(COMPLETIONS // 64)]
    rng = random.Random(seed)
    texts = [f"{rng.choice(knowledge.forms)}: {task.reference[rng.randrange(20) :]}" for task in group]
    started = time.perf_counter()
    Composite(knowledge).score(group, texts)
    return {"seconds": time.perf_counter() - started, "completions": len(texts), "forms": len(knowledge.forms)}


def table(results: dict, scoring: dict) -> str:
    lines = []
    if results:
        first, width = next(iter(results)), max(map(len, results))
        lines += ["", f"{'':{width}}  s a step  speed  peak MB: training  whole run  tokens a completion  mean reward"]
        for name, entry in results.items():
            lines.append(
                f"{name:{width}}  {entry['step_seconds']:8.2f}  {results[first]['step_seconds'] / entry['step_seconds']:4.2f}x  "
                f"{megabytes(entry['peak_training_bytes']):>17}  {megabytes(entry['peak_bytes']):>9}  "
                f"{entry['tokens_a_completion']:19.1f}  {entry['reward']:11.3f}"
            )
    share = scoring.get("share_of_a_step")
    lines.append(
        f"\ncomposite: {scoring['completions']:,} completions against {scoring['forms']:,} forms in "
        f"{scoring['seconds']:.2f} s" + (f", {share:.2%} of a step of that size" if share is not None else "")
    )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
