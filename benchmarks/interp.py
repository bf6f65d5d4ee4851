"""Looking inside: attribution patching beside patching head by head, and one attention report beside a figure a head.

    python benchmarks/interp.py
    python benchmarks/interp.py --model_path stoney_lora_merged --num_pairs 16 --steps 10

Two comparisons, each side in a process of its own, after a first pass that is not counted; loading is outside.
1. The effect of every head on the same prompt pairs: stoney_rl.interp.patching.attribute, with each number of --steps, and
   TransformerLens's own get_act_patch_attn_head_out_all_pos, which runs all pairs as one batch once a head and is the
   truth. The pairs are built from the lexicon (words of an invented language by default), all of one length, as the
   helper takes no mask. Reports time, rank correlation of the mean effects of all heads, and peak memory.
2. Attention on one prompt: a report with a pattern of every head to click and a grid for each measure of heads
   (stoney_rl.interp.attention, report), and the plain way: one forward pass, then a loop that draws each head's pattern with
   matplotlib's imshow, tokens on both axes, and saves it as a PNG.

Ratios are of processor time, which other processes on the machine disturb little; wall time stands beside it.
Writes --output, without any text of a pair. Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: its own folder would hide the standard library's `inspect`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version

from benchmarks import measure
from stoney_rl import checkpoints, cli
from stoney_rl.errors import StoneyError
from stoney_rl.models import find_model

FAMILIES = ("lookup", "lookup_form", "lookup_english", "recall", "affix")
CANDIDATES = 8  # pairs that are built for each that is wanted, so that enough have one length


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model_path", default="checkpoints/smollm2-135m", help="checkpoint directory or hub id")
    parser.add_argument("--lexicon", default="data/planted/lexicon.jsonl", help="lexicon that pairs are built from")
    parser.add_argument("--family", choices=FAMILIES, default="lookup", help="kind of pairs")
    parser.add_argument("--num_pairs", type=cli.positive_int, default=4, help="pairs, all of one length")
    parser.add_argument("--steps", type=cli.positive_int, nargs="+", default=[5, 10], help="of integrated gradients")
    parser.add_argument("--output", default="results/benchmark-interp.json", help="file of the results")
    parser.add_argument("--threads", type=cli.positive_int, default=measure.usable_cores(), help="torch threads")
    parser.add_argument("--seed", type=cli.non_negative_int, default=0, help="choice of pairs")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    find_model(args.model_path)
    if not Path(args.lexicon).is_file():
        raise StoneyError(f"--lexicon {args.lexicon}: no such file; name a lexicon.jsonl")
    if Path(args.output).is_dir():
        raise StoneyError(f"--output {args.output}: a directory; name a file")
    machine = measure.machine(args.threads)
    print(f"{machine['cpu']}, {machine['cores']} cores, torch threads {args.threads}")
    notice = measure.load_notice(machine["load"], machine["cores"])
    if notice:
        print(notice)
    pairs = measure.in_process(choose_pairs, args.model_path, args.lexicon, args.family, args.num_pairs, args.seed)
    print(f"{len(pairs)} pairs of {len(pairs[0].clean)} tokens")

    shared = (args.model_path, pairs, args.threads)
    estimates = measure.in_process(estimate_heads, *shared, list(dict.fromkeys(args.steps)))
    truth = measure.in_process(patch_heads, *shared)
    heads = {"one by one (TransformerLens)": truth} | {
        f"attribution, {steps} steps": compared(found, truth) for steps, found in estimates.items()
    }
    print(heads_table(heads))
    attention = {
        "one figure a head (matplotlib)": measure.in_process(draw_heads, *shared),
        "report of all heads": measure.in_process(write_report, *shared),
    }
    print(attention_table(attention))
    if notice:
        print(notice)
    report = checkpoints.describe_stage(
        "benchmark-interp",
        arguments=vars(args),
        seed=args.seed,
        machine=machine,
        packages={name: version(name) for name in ("transformer-lens", "matplotlib", "circuitsvis")},
        lexicon_sha256=hashlib.sha256(Path(args.lexicon).read_bytes()).hexdigest(),
        n=len(pairs),
        tokens=len(pairs[0].clean),
        heads=heads,
        attention=attention,
    )
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_json(Path(args.output), report)
    print(f"{args.output}: the same, with the effect of every head, versions and machine")


def choose_pairs(model_name: str, lexicon: str, family: str, number: int, seed: int) -> list:
    """``number`` pairs of the commonest length. Raises ``StoneyError`` if no length has as many."""
    from stoney_rl import models
    from stoney_rl.interp.pairs import build
    from stoney_rl.lexicon import read_lexicon

    tokenizer = models.load_tokenizer(find_model(model_name))
    built = build(read_lexicon(lexicon), tokenizer, family, n=CANDIDATES * number, seed=seed).pairs
    length, count = Counter(len(pair.clean) for pair in built).most_common(1)[0]
    if count < number:
        raise StoneyError(
            f"--num_pairs {number}: of {len(built)} {family} pairs no more than {count} have one length; ask for {count}"
        )
    return [pair for pair in built if len(pair.clean) == length][:number]


def estimate_heads(model_name: str, pairs: list, threads: int, steps: list[int]) -> dict[int, dict]:
    """Attribution patching of all heads, by number of steps."""
    from stoney_rl.interp import patching

    model, batch = opened(model_name, pairs, threads)
    return {
        each: timed(lambda each=each: patching.attribute(model, batch, ["head"], steps=each)["head"].values)
        for each in steps
    }


def patch_heads(model_name: str, pairs: list, threads: int) -> dict:
    """Activation patching of one head after the other, by TransformerLens's helper; with the two runs that it needs."""
    from transformer_lens.patching import get_act_patch_attn_head_out_all_pos

    model, batch = opened(model_name, pairs, threads)

    def patch() -> object:
        _, cache = model.bridge.run_with_cache(batch.clean.ids, names_filter=lambda name: name.endswith("attn.hook_z"))
        found = get_act_patch_attn_head_out_all_pos(
            model.bridge, batch.corrupt.ids, cache, batch.difference, reduce="none", baseline=True
        )
        return found.effect().movedim(-1, 0)

    return timed(patch)


def write_report(model_name: str, pairs: list, threads: int) -> dict:
    """The clickable page of every head's pattern and measures."""
    from stoney_rl.interp import attention, report

    model, batch = opened(model_name, pairs, threads)
    prompt = one_prompt(batch)
    tokens = model.tokenizer.convert_ids_to_tokens(prompt.ids[0].tolist())

    def write(folder: Path) -> None:
        scores = attention.head_scores(model, prompt)
        results = {
            "title": "Attention",
            "findings": [],
            "models": [{"name": "model", "checkpoint": model_name}],
            "layers": model.n_layers,
            "heads": model.n_heads,
            "texts": [{"name": "sample", "tokens": tokens}],
            "measures": [
                {"key": key, "n": 1, "values": {"model": {"mean": values[0].numpy()}}}
                for key, values in scores.items()
                if key in report.MEASURES
            ],
        }
        report.write(
            folder / "report.html",
            results,
            {"patterns/sample/model": attention.attention_patterns(model, prompt)[0].numpy()},
        )

    return timed_files(write)


def draw_heads(model_name: str, pairs: list, threads: int) -> dict:
    """The plain way: all patterns from one pass, one PNG a head."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    model, batch = opened(model_name, pairs, threads)
    prompt = one_prompt(batch)
    tokens = [ascii(token) for token in model.tokenizer.convert_ids_to_tokens(prompt.ids[0].tolist())]

    def draw(folder: Path) -> None:
        _, cache = model.bridge.run_with_cache(prompt.ids, names_filter=lambda name: name.endswith("attn.hook_pattern"))
        for layer in range(model.n_layers):
            for head in range(model.n_heads):
                figure, axes = pyplot.subplots()
                axes.imshow(cache["pattern", layer][0, head])
                axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=4)
                axes.set_yticks(range(len(tokens)), tokens, fontsize=4)
                axes.set_title(f"layer {layer}, head {head}")
                figure.savefig(folder / f"{layer}-{head}.png")
                pyplot.close(figure)

    return timed_files(draw)


def opened(model_name: str, pairs: list, threads: int) -> tuple:
    """The hooked model, and the pairs as a batch; a first pass is done."""
    import torch

    from stoney_rl.interp.hooked import load_hooked
    from stoney_rl.interp.pairs import batched

    torch.set_num_threads(threads)
    model = load_hooked(model_name)
    ((_, batch),) = batched(pairs, len(pairs), model.pad_token_id)
    model.run(batch.clean)
    return model, batch


def one_prompt(batch: object) -> object:
    from stoney_rl.interp.hooked import Batch

    return Batch(batch.clean.ids[:1], batch.clean.mask[:1])


def timed(function: Callable) -> dict:
    """What ``function`` returns [pair, layer, head] as lists, with its seconds and the peak memory of the process."""
    started, cpu = time.perf_counter(), time.process_time()
    values = function()
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": measure.peak_bytes(),
        "values": values.tolist(),
    }


def timed_files(function: Callable[[Path], None]) -> dict:
    """The same for a function that writes to a folder, with the number of files and their bytes."""
    with tempfile.TemporaryDirectory() as folder:
        started, cpu = time.perf_counter(), time.process_time()
        function(Path(folder))
        files = [path.stat().st_size for path in Path(folder).iterdir()]
        return {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
            "peak_bytes": measure.peak_bytes(),
            "files": len(files),
            "bytes": sum(files),
        }


def compared(found: dict, truth: dict) -> dict:
    """An estimate with its ratio of processor time and its rank correlations: of the means over pairs, and by pair."""
    import numpy as np
    from scipy.stats import spearmanr

    ours, theirs = (np.array(side["values"]) for side in (found, truth))
    by_pair = [float(spearmanr(a.ravel(), b.ravel()).statistic) for a, b in zip(ours, theirs, strict=True)]
    return found | {
        "times_faster": truth["cpu_seconds"] / found["cpu_seconds"],
        "rank_correlation": float(spearmanr(ours.mean(0).ravel(), theirs.mean(0).ravel()).statistic),
        "rank_correlation_by_pair": by_pair,
    }


def heads_table(sides: dict[str, dict]) -> str:
    lines = ["", f"{'effect of every head':30} {'CPU s':>8} {'s':>8} {'faster':>8} {'peak MB':>8}  rank correlation"]
    for name, side in sides.items():
        faster, rank = side.get("times_faster"), side.get("rank_correlation")
        lines.append(
            f"{name:30} {side['cpu_seconds']:8.1f} {side['seconds']:8.1f} {f'{faster:.1f}x' if faster else '':>8} "
            f"{side['peak_bytes'] / 1e6:8.0f}  {'the truth' if rank is None else f'{rank:.3f}'}"
        )
    return "\n".join(lines)


def attention_table(sides: dict[str, dict]) -> str:
    plain = next(iter(sides.values()))["cpu_seconds"]
    lines = ["", f"{'attention of every head':30} {'CPU s':>8} {'s':>8} {'faster':>8} {'peak MB':>8}  files"]
    for name, side in sides.items():
        lines.append(
            f"{name:30} {side['cpu_seconds']:8.1f} {side['seconds']:8.1f} {plain / side['cpu_seconds']:7.1f}x "
            f"{side['peak_bytes'] / 1e6:8.0f}  {side['files']}, {side['bytes'] / 1e6:.1f} MB"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
