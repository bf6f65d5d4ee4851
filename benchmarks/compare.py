"""Comparing families of prompts: what it costs as families, pairs and layers grow, and beside one part at a time.

    python benchmarks/compare.py
    python benchmarks/compare.py --model_path stoney_lora_merged --num_pairs 16 --sample 60

Each of these runs in a process of its own, after a first pass that is not counted; loading is outside.
1. Growth, on models of the checkpoint's width with random weights: localisation (localise.attribute_parts of every family),
   the matrix (localise.matrix: every family's set, and random sets, in every family) and a model's tasks of
   compare_reasoning.py, with one of the numbers of families, pairs and layers changed at a time, and at last all three in the
   middle. The exponent is the slope of log seconds over log number. Left out are the tasks whose cost depends on layers alone
   (words put together, tuned lens). The matrix has families x families cells, so 2 is its exponent in families.
2. The effect of every head and MLP on the same pairs: attribution, and the plain way, the true effect of one part after the
   other by TransformerLens's run_with_hooks on all pairs at once. That is done for --sample parts drawn at random, and
   its time extrapolated to all. Then the strongest 5 % are tested on other pairs, on both sides one after the other.
3. One row of the matrix in passes that mix sets and families, and the same with a pass of its own for each set in each family.
4. A pass with the logits of the last position, and with those of all.

Ratios are of processor time, which other processes on the machine disturb little; wall time stands beside it.
Writes --output, without any text of a pair. Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: its own folder would hide the standard library's `inspect`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import contextlib
import functools
import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

from benchmarks import measure
from benchmarks.interp import opened
from stoney_rl import checkpoints, cli
from stoney_rl.errors import StoneyError
from stoney_rl.models import find_model

FAMILIES = ("lexicon", "english", "arithmetic", "french")
FEW = 4  # pairs of each family that a random set is measured in, as compare_reasoning.py does
ROWS = 8  # in a pass while growth is measured: the smallest number of pairs fills one
AXES = ("families", "pairs", "layers")
WHAT = ("localisation", "matrix", "tasks")
NO_PLAN = ("assembly", "tuned")  # tasks of a fixed number of words and texts


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model_path", default="checkpoints/smollm2-135m", help="checkpoint directory or hub id")
    parser.add_argument("--lexicon", default="data/planted/lexicon.jsonl", help="lexicon that pairs are built from")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES),
                        help="growth: the first two, the first three, ...; all else is measured on the first two")  # fmt: skip
    parser.add_argument("--pairs", type=cli.positive_int, nargs="+", default=[8, 16, 32], help="growth: of each family")
    parser.add_argument("--layers", type=cli.positive_int, nargs="+", default=[4, 8, 16], help="growth: of the model")
    parser.add_argument("--num_pairs", type=cli.positive_int, default=8, help="pairs beside the plain way")
    parser.add_argument("--sample", type=cli.positive_int, default=30, help="parts that the plain way is timed on")
    parser.add_argument("--random_sets", type=cli.positive_int, default=10, help="beside each set of the matrix")
    parser.add_argument("--output", default="results/benchmark-compare.json", help="file of the results")
    parser.add_argument("--threads", type=cli.positive_int, default=measure.usable_cores(), help="torch threads")
    parser.add_argument("--seed", type=cli.non_negative_int, default=0, help="pairs, parts, random sets, weights")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = cli.parse_args(parser, argv)
    find_model(args.model_path)
    if not Path(args.lexicon).is_file():
        raise StoneyError(f"--lexicon {args.lexicon}: no such file; name a lexicon.jsonl")
    if Path(args.output).is_dir():
        raise StoneyError(f"--output {args.output}: a directory; name a file")
    if len(set(args.families)) < 2 or min(args.pairs) < 8 or any(number % 4 for number in args.pairs):
        parser.error("expected two --families or more, and --pairs of 8 or more that 4 divides: couples, in two halves")
    machine = measure.machine(args.threads)
    print(f"{machine['cpu']}, {machine['cores']} cores, torch threads {args.threads}")
    notice = measure.load_notice(machine["load"], machine["cores"])
    if notice:
        print(notice)
    families = list(dict.fromkeys(args.families))
    couples = max(*args.pairs, 2 * args.num_pairs)
    pools = measure.in_process(choose_pairs, args.model_path, args.lexicon, families, couples, args.seed)

    plans = plans_of([*range(2, len(families) + 1)], sorted(set(args.pairs)), sorted(set(args.layers)))
    costs = measure.in_process(measure_growth, args.model_path, pools, plans, args.random_sets, args.threads, args.seed)
    growth = growth_of(plans, costs)
    print(growth_table(plans, costs, growth))

    one, other = families[:2]
    pairs = pools[one].pairs[::2]
    shared = (args.model_path, pairs[: args.num_pairs], pairs[args.num_pairs : 2 * args.num_pairs], args.threads)
    ours = measure.in_process(localise_parts, *shared)
    plain = measure.in_process(patch_parts, *shared, args.sample, args.seed)
    beside = compared(ours, plain)
    print(beside_table(beside))
    reporting = {name: pools[name].pairs[: args.num_pairs] for name in (one, other)}
    rows = measure.in_process(mix_rows, args.model_path, reporting, args.random_sets, args.threads, args.seed)
    logits = measure.in_process(keep_logits, args.model_path, reporting[one], args.threads)
    print(ratio_line("a row of the matrix, sets mixed in a pass", rows), ratio_line("logits of the last position", logits), sep="\n")  # fmt: skip
    if notice:
        print(notice)
    report = checkpoints.describe_stage(
        "benchmark-compare",
        arguments=vars(args),
        seed=args.seed,
        machine=machine,
        packages={name: version(name) for name in ("transformer-lens", "scikit-learn", "scipy")},
        lexicon_sha256=hashlib.sha256(Path(args.lexicon).read_bytes()).hexdigest(),
        n=args.num_pairs,
        tokens=[len(pair.clean) for pair in shared[1]],
        growth={"plans": [plan | {"cost": cost} for plan, cost in zip(plans, costs, strict=True)], **growth},
        beside=beside,
        mixed_rows=rows,
        last_logits=logits,
    )
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_json(Path(args.output), report)
    print(f"{args.output}: the same, with every time, versions and machine")


def choose_pairs(model_name: str, lexicon: str, families: list[str], couples: int, seed: int) -> dict:
    """``couples`` couples of each family (tasks.Family), as they come. Raises ``StoneyError`` for a family that has fewer."""
    from stoney_rl import models
    from stoney_rl.interp import tasks
    from stoney_rl.lexicon import read_lexicon

    tokenizer = models.load_tokenizer(find_model(model_name))
    pools = tasks.build_pools(families, tokenizer, read_lexicon(lexicon), couples=couples, seed=seed)
    for name, pool in pools.items():
        if len(pool.pairs) < 2 * couples:
            raise StoneyError(
                f"{name}: {len(pool.pairs)} pairs can be made, {2 * couples} are asked for; ask for fewer"
            )
    return {name: pool.couples(range(couples)) for name, pool in pools.items()}


# 1. Growth


def plans_of(families: list[int], pairs: list[int], layers: list[int]) -> list[dict[str, int]]:
    """Numbers of families, pairs and layers: one changed at a time, the others at their smallest; then all in the middle."""
    values = dict(zip(AXES, (families, pairs, layers), strict=True))
    smallest = {axis: numbers[0] for axis, numbers in values.items()}
    plans = [smallest, *(smallest | {axis: number} for axis, numbers in values.items() for number in numbers[1:])]
    middle = {axis: numbers[len(numbers) // 2] for axis, numbers in values.items()}
    return plans + [middle] * (middle not in plans)


def measure_growth(
    model_name: str, pools: dict, plans: list[dict], draws: int, threads: int, seed: int
) -> list[dict[str, dict]]:
    """Of each plan the time of each of WHAT, and of each task; the smallest plan is run once before, uncounted."""
    import torch

    torch.set_num_threads(threads)
    shaped = functools.cache(lambda layers: random_model(model_name, layers, seed))
    cost_of(shaped(plans[0]["layers"]), pools, plans[0], draws, seed)
    return [cost_of(shaped(plan["layers"]), pools, plan, draws, seed) for plan in plans]


def random_model(model_name: str, layers: int, seed: int):
    """Hooked, of the checkpoint's shape but for the number of layers, with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from stoney_rl import models
    from stoney_rl.interp.hooked import hook_model

    source = find_model(model_name)
    config = AutoConfig.from_pretrained(source.name)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * layers)[:layers]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return hook_model(model, models.load_tokenizer(source), f"random, {layers} layers")


def cost_of(model, pools: dict, plan: dict[str, int], draws: int, seed: int) -> dict[str, dict]:
    from stoney_rl.interp import compare, localise
    from stoney_rl.interp.analysis import measure_model

    names = list(pools)[: plan["families"]]
    families = {name: pools[name].couples(range(plan["pairs"] // 2)) for name in names}
    # A pair and its swapped one are attributed together: as many couples as pairs.
    choosing = {name: pools[name].pairs[: 2 * plan["pairs"] : 2] for name in names}
    asked = compare.Plan(
        families, names[0], [], [], [], batch_size=ROWS, seed=seed,
        settings=compare.Settings(plan["pairs"] // 2, plan["pairs"], plan["pairs"], draws, FEW, 3, left_out=NO_PLAN),
    )  # fmt: skip

    def localised() -> dict:
        return {name: localise.attribute_parts(model, pairs, batch_size=ROWS) for name, pairs in choosing.items()}

    values, localisation = timed(localised)
    sets = {name: localise.strongest(found) for name, found in values.items()}
    stand_in = localise.stand_in(model, choosing, batch_size=ROWS)
    reporting = {name: family.pairs for name, family in families.items()}
    _, matrix = timed(
        lambda: localise.matrix(model, reporting, sets, stand_in, draws=draws, few=FEW, batch_size=ROWS, seed=seed)
    )
    own = {}

    def task(name: str, measure_task: Callable, *given: object) -> object:
        found, own[name] = timed(lambda: measure_task(*given))
        return found

    table = {name: functools.partial(task, name, function) for name, function in compare.TASKS.items()}
    wanted = compare.tasks_of(asked, is_main=True)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        measure_model(Path(folder), wanted, asked, lambda: model, table=table)
    total = {key: sum(each[key] for each in own.values()) for key in ("seconds", "cpu_seconds")}
    # Rows of the matrix: each set in all pairs, each random set in a few, of every family.
    cells = len(names) ** 2 * (plan["pairs"] + draws * min(FEW, plan["pairs"]))
    return {
        "localisation": localisation,
        "matrix": matrix | {"rows": cells, "cpu_seconds_a_row": matrix["cpu_seconds"] / cells},
        "tasks": total | {"each": own},
    }


def growth_of(plans: Sequence[dict[str, int]], costs: Sequence[dict[str, dict]]) -> dict[str, dict]:
    """exponents: of each of WHAT the slope of log seconds over the log of each axis; in_the_middle: the cost of the last
    plan over the smallest one's, beside the same ratio of families x pairs x layers (None if the last plan is on an axis)."""
    import numpy as np

    smallest, last = plans[0], plans[-1]
    exponents, middle = {}, {}
    for what in WHAT:
        seconds = [cost[what]["cpu_seconds"] for cost in costs]
        exponents[what] = {}
        for axis in AXES:
            line = [
                (plan[axis], each)
                for plan, each in zip(plans, seconds, strict=True)
                if all(plan[other] == smallest[other] for other in AXES if other != axis)
            ]
            slope = np.polyfit(*np.log(line).T, 1)[0] if len(line) > 1 else None
            exponents[what][axis] = None if slope is None else float(slope)
        middle[what] = seconds[-1] / seconds[0]
    off_axis = sum(last[axis] != smallest[axis] for axis in AXES) > 1
    product = math.prod(last[axis] / smallest[axis] for axis in AXES)
    return {"exponents": exponents, "in_the_middle": {"product": product, **middle} if off_axis else None}


# 2. Beside the plain way


def localise_parts(model_name: str, pairs: Sequence, others: Sequence, threads: int) -> dict:
    """Attribution of all heads and MLPs, the same with all neurons, and the strongest tested on other pairs."""
    from stoney_rl.interp.localise import (
        COMPONENTS,
        attribute_parts,
        of_parts,
        rank_agreement,
        strongest,
        true_patching,
    )

    model, _ = opened(model_name, pairs, threads)
    values, components = timed(lambda: attribute_parts(model, pairs, kinds=COMPONENTS))
    _, everything = timed(lambda: attribute_parts(model, pairs))
    chosen = strongest(values)
    truth, test = timed(lambda: true_patching(model, others, chosen))
    return {
        "components": components | {"peak_bytes": measure.peak_bytes()},
        "with_neurons": everything | {"neurons": model.n_layers * model.d_mlp},
        "test": test | {"parts": len(chosen), "rank_agreement": rank_agreement(of_parts(values, chosen), truth)},
        "values": {kind: table.mean(0).tolist() for kind, table in values.items()},
    }


def patch_parts(model_name: str, pairs: Sequence, others: Sequence, threads: int, sample: int, seed: int) -> dict:
    """The plain way for ``sample`` parts, on all pairs in one batch: two passes at first, then one for each part."""
    import random

    model, batch = opened(model_name, pairs, threads)
    parts = [("heads", layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]
    parts += [("mlps", layer, 0) for layer in range(model.n_layers)]
    chosen = random.Random(seed).sample(parts, min(sample, len(parts)))
    (cache, corrupt), start = timed(lambda: plain_start(model.bridge, batch))
    effects, each = [], []
    for part in chosen:
        effect, cost = timed(lambda part=part: plain_effect(model.bridge, batch, cache, part) - corrupt)
        effects.append(effect.mean().item())
        each.append(cost)
    return {
        "of": len(parts), "parts": [list(part) for part in chosen], "effects": effects, "start": start,
        "each": {key: [cost[key] for cost in each] for key in each[0]}, "peak_bytes": measure.peak_bytes(),
    }  # fmt: skip


def plain_start(bridge, batch) -> tuple:
    """Activations of the clean prompts, and the corrupt prompts' logit difference."""
    import torch

    def is_part(name: str) -> bool:
        return name.endswith(("attn.hook_z", "hook_mlp_out"))

    with torch.no_grad():
        _, cache = bridge.run_with_cache(batch.clean.ids, names_filter=is_part, attention_mask=batch.clean.mask)
        return cache, batch.difference(bridge(batch.corrupt.ids, attention_mask=batch.corrupt.mask))


def plain_effect(bridge, batch, cache, part: tuple[str, int, int]):
    """The logit difference of the corrupt prompts with one part's clean activation, as one would write it by hand."""
    import torch

    kind, layer, index = part
    hook_name = f"blocks.{layer}.{'attn.hook_z' if kind == 'heads' else 'hook_mlp_out'}"

    def put_clean(activation, hook):
        if kind == "mlps":
            return cache[hook_name]
        activation = activation.clone()
        activation[:, :, index] = cache[hook_name][:, :, index]
        return activation

    with torch.no_grad():
        logits = bridge.run_with_hooks(
            batch.corrupt.ids, fwd_hooks=[(hook_name, put_clean)], attention_mask=batch.corrupt.mask
        )
    return batch.difference(logits)


def compared(ours: dict, plain: dict) -> dict:
    """Both sides, with the plain one extrapolated to all parts, the ratios of processor time and the rank agreement."""
    from scipy.stats import spearmanr

    a_part = {key: sum(costs) / len(costs) for key, costs in plain["each"].items()}
    every = {key: plain["start"][key] + plain["of"] * a_part[key] for key in a_part}
    tested = {key: plain["start"][key] + ours["test"]["parts"] * a_part[key] for key in a_part}
    estimates = [
        ours["values"][kind][layer] if kind == "mlps" else ours["values"][kind][layer][index]
        for kind, layer, index in plain["parts"]
    ]
    both = ours["components"]["cpu_seconds"] + ours["test"]["cpu_seconds"]
    rank = spearmanr(estimates, plain["effects"]).statistic if len(estimates) > 2 else math.nan
    return {
        "ours": ours,
        "plain": plain | {"every_part": every, "test": tested},
        "times_faster": every["cpu_seconds"] / ours["components"]["cpu_seconds"],
        "times_faster_with_test": (every["cpu_seconds"] + tested["cpu_seconds"]) / both,
        "rank_agreement": None if math.isnan(rank) else float(rank),
    }


# 3. and 4. What makes a pass cheap


def mix_rows(model_name: str, families: dict, draws: int, threads: int, seed: int) -> dict:
    """A row of the matrix in mixed passes, and a pass for each set in each family; both with the passes without a set."""
    import torch

    from stoney_rl.interp import localise
    from stoney_rl.interp.ablation import ablate
    from stoney_rl.interp.pairs import batched

    pairs = [pair for family in families.values() for pair in family]
    model, _ = opened(model_name, pairs, threads)
    name = next(iter(families))
    parts = localise.strongest(localise.attribute_parts(model, families[name], kinds=localise.COMPONENTS))
    stand_in = localise.stand_in(model, families)
    losses, mixed = timed(
        lambda: localise.matrix(model, families, {name: parts}, stand_in, draws=draws, few=FEW, seed=seed)
    )

    def m_of(some: Sequence, edit: dict | None = None) -> torch.Tensor:
        found = torch.empty(len(some))
        for rows, batch in batched(some, localise.ROWS_PER_PASS, model.pad_token_id):
            found[rows] = batch.difference(model.run(batch.clean, edit=edit, last=True).logits)
        return found

    def one_at_a_time() -> float:
        """The largest difference to the mixed passes, logits."""
        worst = 0.0
        for measured, family in families.items():
            clean = m_of(family)
            drawn = losses.drawn[measured]
            for number, chosen in enumerate([parts, *losses.random_sets[name]]):
                edit = ablate(stand_in, heads=chosen.heads, mlps=chosen.mlps, neurons=chosen.neurons)
                rows = list(range(len(family))) if number == 0 else drawn[number - 1].tolist()
                lost = clean[rows] - m_of([family[row] for row in rows], edit)
                theirs = losses.own[name][measured] if number == 0 else losses.random[name][measured][number - 1]
                worst = max(worst, float((lost - theirs).abs().max()))
        return worst

    worst, single = timed(one_at_a_time)
    typical = float(losses.own[name][name].abs().mean())
    return {
        "fast": mixed, "slow": single, "times_faster": single["cpu_seconds"] / mixed["cpu_seconds"],
        "largest_difference": worst, "typical_loss": typical, "sets": 1 + draws, "families": len(families),
    }  # fmt: skip


def keep_logits(model_name: str, pairs: Sequence, threads: int, turns: int = 3) -> dict:
    """The same pass in turn with the logits of the last position and with those of all positions."""
    model, batch = opened(model_name, pairs, threads)
    costs = {
        last: [timed(lambda last=last: model.run(batch.clean, last=last))[1] for _ in range(turns)]
        for last in (True, False)
    }
    fast, slow = (
        {key: sorted(cost[key] for cost in costs[last])[turns // 2] for key in ("seconds", "cpu_seconds")}
        for last in (True, False)
    )
    return {"fast": fast, "slow": slow, "times_faster": slow["cpu_seconds"] / fast["cpu_seconds"]}


def timed(function: Callable) -> tuple[object, dict[str, float]]:
    """What ``function`` returns, and its seconds."""
    started, cpu = time.perf_counter(), time.process_time()
    found = function()
    return found, {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}


# Tables


def growth_table(plans: Sequence[dict], costs: Sequence[dict], growth: dict) -> str:
    lines = ["", f"{'families':>8} {'pairs':>6} {'layers':>6}" + "".join(f" {what:>13}" for what in WHAT) + "  CPU s"]
    for plan, cost in zip(plans, costs, strict=True):
        numbers = f"{plan['families']:8d} {plan['pairs']:6d} {plan['layers']:6d}"
        lines.append(numbers + "".join(f" {cost[what]['cpu_seconds']:13.2f}" for what in WHAT))
    for axis in AXES:
        found = [growth["exponents"][what][axis] for what in WHAT]
        shown = ("-" if slope is None else f"{slope:.2f}" for slope in found)
        lines.append(f"{f'exponent in {axis}':22}" + "".join(f" {text:>13}" for text in shown))
    if growth["in_the_middle"]:
        middle = growth["in_the_middle"]
        lines.append(f"{'last over first':22}" + "".join(f" {f'{middle[what]:.1f}x':>13}" for what in WHAT)
                     + f"  families x pairs x layers: {middle['product']:.1f}x")  # fmt: skip
    return "\n".join(lines)


def beside_table(beside: dict) -> str:
    ours, plain = beside["ours"], beside["plain"]
    rank = beside["rank_agreement"]
    return "\n".join([
        "",
        f"{plain['of']} heads and MLPs: one at a time {plain['every_part']['cpu_seconds']:.1f} CPU s (extrapolated from "
        f"{len(plain['parts'])}), attribution {ours['components']['cpu_seconds']:.1f}: {beside['times_faster']:.1f}x",
        f"with the strongest {ours['test']['parts']} tested on other pairs: {beside['times_faster_with_test']:.1f}x",
        f"with {ours['with_neurons']['neurons']:,} neurons too: attribution {ours['with_neurons']['cpu_seconds']:.1f} CPU s",
        f"rank agreement with the truth: {'-' if rank is None else f'{rank:.2f}'} of the sampled parts",
    ])  # fmt: skip


def ratio_line(what: str, found: dict) -> str:
    slow, fast = (found[side]["cpu_seconds"] for side in ("slow", "fast"))
    return f"{what}: {fast:.2f} CPU s beside {slow:.2f}: {found['times_faster']:.2f}x"


if __name__ == "__main__":
    cli.run(main)
