"""Does GRPO teach, and does a bad reward show? An invented language, a tiny model, three seeds, one command.

    python benchmarks/planted_grpo.py --output_dir planted_grpo

1. tiny_planted.py makes the language, one base model, and for each seed an SFT parent.
2. train_grpo.py trains each parent on the default composite reward. Parent and policy then answer every row of the test
   split, whose lexemes neither was trained on: reward and form accuracy, with paired bootstrap intervals by lexeme.
3. From the first seed's parent: a reward that pays nothing, and one that pays for length, which train_grpo.py refuses,
   and which it is then forced to take.

The settings below were chosen on validation rows (seeds 0 and 1). Every stage's command is printed; what is there already
is kept: after an interruption the same command continues. About a quarter of an hour on one CPU core.
Writes --output and beside it a picture. Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: its own folder would hide the standard library's `inspect`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


import argparse
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from itertools import cycle
from typing import TYPE_CHECKING

from benchmarks import tiny_planted
from stoney_rl import checkpoints, cli
from stoney_rl.errors import StoneyError

if TYPE_CHECKING:
    from stoney_rl.policy import HeldOut

# The rate decays because at a constant one the last updates lost again what earlier ones had gained (validation, seed 0:
# form accuracy 0.77 after 175 updates, 0.73 after 200).
# kl_penalty 0 as in DAPO (arXiv 2503.14476): the parent is no place to stay near, and nothing else is to be kept.
GRPO = {
    "batch_size": 128,
    "group_size": 8,
    "micro_batch_size": 128,
    "max_steps": 200,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "kl_penalty": 0,
    "lora_rank": 16,
    "lora_alpha": 32,
    "max_completion_length": 24,
    "eval_prompts": 240,
    "eval_steps": 25,
}
ZERO = {"reward": "tests.planted_rewards:zero", "max_steps": 10}
LENGTH = {"reward": "tests.planted_rewards:length", "max_steps": 50}
MEASURES = {"reward": "reward", "form_accuracy": "form accuracy"}
POOLED = "pooled"
# Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--output_dir", required=True, help="directory of the language and of every model")
    parser.add_argument("--output", default="results/grpo-planted.json", help="file of the results")
    parser.add_argument("--seeds", type=cli.non_negative_int, nargs="+", default=[0, 1, 2], help="of SFT and GRPO")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    output = Path(args.output)
    if output.suffix != ".json" or output.is_dir():
        raise StoneyError(f"--output {output}: expected the name of a .json file")
    if len(set(args.seeds)) < len(args.seeds):
        raise StoneyError(f"--seeds {' '.join(map(str, args.seeds))}: expected different ones")

    directory = tiny_planted.make_world(args.output_dir)
    parents = {seed: tiny_planted.make_parent(directory, seed) for seed in args.seeds}
    policies = {seed: train(parent, directory / f"grpo_{seed}", seed) for seed, parent in parents.items()}
    first = args.seeds[0]
    zero = train(parents[first], directory / "grpo_zero", first, "--allow_broken_reward", **ZERO)
    refused = refusal(parents[first], directory / "grpo_refused", first, **LENGTH)
    forced = train(parents[first], directory / "grpo_forced", first, "--allow_broken_reward", **LENGTH)

    held_outs = {seed: measure(directory, parents[seed], policies[seed], seed) for seed in args.seeds}
    results = checkpoints.describe_stage(
        "benchmark-planted-grpo",
        arguments=vars(args),
        language="planted: invented, nobody's language",
        data={"prepared": checkpoints.read_stage(directory / "prepared")["data"], "rows": "test split"},
        base=checkpoints.read_stage(directory / "base")["training"],
        settings={"sft": tiny_planted.SFT, "grpo": GRPO, "chosen_on": "validation rows, seeds 0 and 1"},
        commands=[
            checkpoints.read_stage(made)["command"] for made in (*parents.values(), *policies.values(), zero, forced)
        ],
        test={str(seed): held_out.compare(seed=seed) for seed, held_out in held_outs.items()}
        | {POOLED: pool(list(held_outs.values()))},
        validation={str(seed): curve(policy) for seed, policy in policies.items()},
        sampled={str(seed): sampled(policy) for seed, policy in policies.items()},
        zero_reward={
            "weights_identical": same_weights(parents[first], zero),
            "report": (zero / "report.txt").read_text(encoding="utf-8").splitlines(),
        },
        length_reward={
            "refused": refused,
            "forced": (forced / "report.txt").read_text(encoding="utf-8").splitlines(),
        },
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    plot(results, output.with_suffix(".png"))
    checkpoints.write_json(output, results)
    print(f"\n{as_text(results)}\n\n{output}, {output.with_suffix('.png')}")


def grpo_command(parent: Path, output: Path, seed: int, *switches: str, **changes: object) -> tuple[list, dict]:
    """(words, flags) of train_grpo.py with the settings above and ``changes``, as ``tiny_planted.start`` takes them."""
    words = [tiny_planted.ROOT / "train_grpo.py", "--resume", "--no-gradient_checkpointing", *switches]
    flags = GRPO | {"lora_path": parent, "output_dir": output, "seed": seed, "dtype": "fp32"} | changes
    return words, flags | {"wandb_mode": "disabled"}


def train(parent: Path, output: Path, seed: int, *switches: str, **changes: object) -> Path:
    """Train ``parent`` into the merged directory ``output``, which is returned."""
    words, flags = grpo_command(parent, output, seed, *switches, **changes)
    tiny_planted.run(*words, **flags)
    return output


def refusal(parent: Path, output: Path, seed: int, **changes: object) -> list[str]:
    """What train_grpo.py says against its reward. Raises ``StoneyError`` if it does not refuse it with exit code 2."""
    words, flags = grpo_command(parent, output, seed, **changes)
    shown, done = tiny_planted.start(words, flags, stderr=subprocess.PIPE, text=True)
    print(done.stderr, file=sys.stderr, end="")
    said = [line.partition("error: ")[2] for line in done.stderr.splitlines() if "error: " in line]
    if done.returncode != 2 or not said:
        raise StoneyError(f"expected a refusal with exit code 2, got {done.returncode} from: {shown}")
    return said


def measure(directory: Path, parent: Path, trained: Path, seed: int) -> "HeldOut":
    """Greedy answers of ``parent`` (as step 0) and of ``trained`` to the unseen test rows, paid by the composite."""
    from stoney_rl import policy, prepared
    from stoney_rl.rewards.composite import Composite, Task
    from stoney_rl.rewards.knowledge import load_knowledge
    from stoney_rl.rewards.plugins import COMPOSITE, Plugin, scorer

    _, split = prepared.read(directory / "prepared")
    rows = [row for row in split.test if not split.seen[row.id]]
    score = scorer([Plugin(COMPOSITE, 1.0, None)], Composite(load_knowledge(directory / "prepared")))
    path = directory / f"test_{seed}.jsonl"
    path.unlink(missing_ok=True)
    print(f"\nseed {seed}: {len(rows)} test rows, answered by parent and policy", flush=True)
    asked = iter((parent, trained))
    held_out = policy.HeldOut(
        rows,
        [Task.of(row) for row in rows],
        score,
        lambda: greedy_answers(next(asked), [row.prompt for row in rows]),
        path,
    )
    for step in (0, checkpoints.read_stage(trained)["training"]["steps"]):
        held_out.measure(step)
    return held_out


def greedy_answers(directory: Path, questions: Sequence[list[dict]]) -> list[tuple[str, int, bool]]:
    """(text, tokens, truncated) of the greedy answer to each question (chat messages)."""
    import torch

    from stoney_rl import generation, models, prompts

    source = models.find_model(str(directory))
    tokenizer = models.load_tokenizer(source)
    found = generation.generate(
        models.load_model(source, torch.float32).eval(),
        tokenizer,
        [prompts.encode_prompt(tokenizer, question) for question in questions],
        ends=prompts.end_of_turn_ids(tokenizer),
        max_new_tokens=GRPO["max_completion_length"],
        batch_size=128,
    )
    done = sorted((answer for batch in found for answer in batch), key=lambda answer: answer.index)
    return [(answer.text, answer.tokens, answer.truncated) for answer in done]


def pool(held_outs: "Sequence[HeldOut]") -> dict:
    """The comparisons of all seeds as one. A lexeme's rows are drawn together, over all seeds."""
    from stoney_rl.metrics import intervals
    from stoney_rl.metrics.report import lexeme_clusters

    rows = [row for held_out in held_outs for row in held_out.rows]
    clusters = lexeme_clusters([row.lexemes for row in rows])
    before, after = ([held_out.measurements[at] for held_out in held_outs] for at in (0, -1))
    measures = {}
    for name, values in (("reward", "rewards"), ("form_accuracy", "forms")):
        first, last = ([value for one in side for value in getattr(one, values)] for side in (before, after))
        measures[name] = {
            "before": statistics.fmean(value for value in first if value is not None),
            "after": statistics.fmean(value for value in last if value is not None),
            "difference": asdict(intervals.mean_difference(first, last, seed=0, clusters=clusters)),
        }
    return {"n": len(rows), "clusters": len(set(clusters)), "seeds": len(held_outs), "measures": measures}


def curve(trained: Path) -> list[dict]:
    """Held-out reward and form accuracy by update, as train_grpo.py measured them on the validation rows."""
    from stoney_rl import policy, records

    lines = records.read(trained.with_name(f"{trained.name}_ckpt") / policy.HELD_OUT_FILE)
    return [{"step": line["step"]} | policy.Measurement(**line).summary() for line in lines]


def sampled(trained: Path) -> dict[str, dict[str, float]]:
    """Means over the first and the last ten updates, of completions to training prompts."""
    from stoney_rl import grpo, records

    lines = records.read(trained.with_name(f"{trained.name}_ckpt") / grpo.METRICS_FILE)
    names = {"reward": "reward", "form_accuracy": "terms/hit/mean", "groups_without_spread": "zero_spread"}
    return {
        part: {name: statistics.fmean(line[key] for line in chosen) for name, key in names.items()}
        for part, chosen in (("first_ten", lines[:10]), ("last_ten", lines[-10:]))
    }


def same_weights(one: Path, other: Path) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    import torch
    from safetensors.torch import load_file

    first, second = (load_file(directory / "model.safetensors") for directory in (one, other))
    return first.keys() == second.keys() and all(
        torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first
    )


def as_text(results: dict) -> str:
    lines = ["test rows about stems never trained on; greedy answers of the SFT parent and of the policy:"]
    for seed, found in results["test"].items():
        for name, label in MEASURES.items():
            one = found["measures"][name]
            lines.append(
                f"  {named(seed):<7} {label:<13} {one['before']:5.3f} -> {one['after']:5.3f}   "
                f"{interval(one['difference'])}   n = {found['n']}, {found['clusters']} lexeme groups"
            )
    same = "identical to" if results["zero_reward"]["weights_identical"] else "not those of"
    lines += [f"a reward that pays nothing: weights {same} the parent's"]
    lines += [f"  {line}" for line in results["zero_reward"]["report"] if line.startswith(("✗", "✓"))]
    lines += ["a reward that pays for length: refused", *(f"  {line}" for line in results["length_reward"]["refused"])]
    lines += ["  forced:", *(f"  {line}" for line in results["length_reward"]["forced"])]
    return "\n".join(lines)


def named(seed: str) -> str:
    return seed if seed == POOLED else f"seed {seed}"


def interval(difference: dict) -> str:
    if difference["low"] is None:
        return f"{difference['value']:+.3f} (no interval)"
    return f"{difference['value']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"


def plot(results: dict, path: Path) -> None:
    """Above, the validation rows over the updates; below, the differences on the test rows with 95 % intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    above, below = figure.subplots(2, 2, height_ratios=(3, 2))
    figure.suptitle("GRPO on an invented language: greedy answers about stems never trained on, 95 % intervals")
    colours = dict(zip(results["validation"], cycle(COLOURS), strict=False))
    for axes, (name, label) in zip(above, MEASURES.items(), strict=True):
        for seed, points in results["validation"].items():
            values = [point[name] for point in points]
            axes.plot([point["step"] for point in points], values, "o-", color=colours[seed], label=f"seed {seed}")
        axes.set(xlabel="updates", ylabel=f"{label}, validation rows")
        axes.grid(alpha=0.3)
        axes.legend()
    for axes, (name, label) in zip(below, MEASURES.items(), strict=True):
        for place, (seed, found) in enumerate(results["test"].items()):
            one = found["measures"][name]["difference"]
            ends = [one["value"] if one[end] is None else one[end] for end in ("low", "high")]
            axes.plot(ends, [place, place], color=colours.get(seed, "black"), linewidth=2)
            axes.plot(one["value"], place, "o", color=colours.get(seed, "black"))
        names = [f"{named(seed)}, n = {found['n']:,}" for seed, found in results["test"].items()]
        axes.set_yticks(range(len(names)), names)
        axes.margins(y=0.15)
        axes.invert_yaxis()
        axes.axvline(0, color="grey", linewidth=1)
        axes.grid(alpha=0.3, axis="x")
        axes.set_xlabel(f"gain in {label} over the SFT parent, test rows")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    cli.run(main)
