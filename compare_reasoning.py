"""How does reasoning about a language differ from arithmetic and from English, and what did training change inside?

    python compare_reasoning.py --model_path stoney_rl_grpo --compare checkpoints/smollm2-135m stoney_lora_merged
    python compare_reasoning.py --model_path stoney_lora_merged --compare base --seed_twin stoney_lora_merged_seed1
    python compare_reasoning.py --model_path stoney_lora_merged --compare base --quick
    python compare_reasoning.py --model_path demo/planted_merged --compare base --lexicon data/planted/lexicon.jsonl
    python compare_reasoning.py --model_path checkpoints/smollm2-135m --families english french arithmetic --controls english_split

Families of prompts of one form ("key = value" lines) are matched on length, accuracy and entropy; controls differ from them in one thing.
Parts are chosen on one half of the pairs and tested on the other, beside random parts and a model with random weights.
Reads: checkpoint directories (adapter or merged) or hub ids, --compare in the order of training, --model_path last; a lexicon,
without the words that any of the models was trained on; families of your own from a file of pairs (README-TLens.md).
Writes --output_dir: summary.txt (plain sentences), report.html (one file, needs no network), results.json, PNGs, and measured/ with
the values of every pair. A comparison that was stopped goes on where it was; a finished one is shown again.
Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

import argparse
import functools
import itertools
import random
import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from stoney_rl import artifacts, checkpoints, cli, runs, tracking
from stoney_rl.errors import StoneyError
from stoney_rl.interp import opening

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stoney_rl.data import Row
    from stoney_rl.interp.compare import Plan, Settings
    from stoney_rl.interp.tasks import Family
    from stoney_rl.models import ModelSource

STAGE = "comparison"
SUMMARY_FILE, REPORT_FILE, RESULTS_FILE = "summary.txt", "report.html", "results.json"
WIDTH = 100  # of summary.txt
FAMILIES = ("lexicon", "english", "french", "arithmetic")
CONTROLS = ("english_split", "lexicon_scrambled", "lexicon_shuffled")
FEWEST_PAIRS = 16  # a family: eight couples, four in each half
MAX_TEXT = 120  # tokens of a held-out row
TEXTS = 64  # held-out rows
# Arguments that change no number, or that stand in the identity by what they say: models, prompts, settings.
NOT_IDENTITY = {
    "overwrite", "config", "output_dir", "device", "batch_size", "model_path", "compare", "seed_twin", "lexicon", "pairs_file",
    "include_trained", "families", "controls", "quick", "num_pairs", "random_sets", "random_set_pairs",
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--model_path", help="checkpoint directory (adapter or merged) or hub id: the model that is asked about"
    )
    parser.add_argument("--compare", nargs="+", default=[], metavar="CHECKPOINT",
                        help="what it was trained from, in the order of training; 'base': what the model was trained from")  # fmt: skip
    parser.add_argument(
        "--seed_twin",
        metavar="CHECKPOINT",
        help="the same training with another seed: the floor of what training changed",
    )
    parser.add_argument("--output_dir", help="default: comparison/<model>")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results in the output directory")

    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--families", nargs="+", choices=FAMILIES, help="default: all; with --quick all but french")
    asked.add_argument(
        "--controls", nargs="*", choices=CONTROLS, help="default: those of the families; with --quick english_split"
    )
    asked.add_argument(
        "--pairs_file", metavar="FILE", help="families of your own: prompt pairs, JSON lines, each with a 'family'"
    )
    asked.add_argument(
        "--lexicon", help="lexicon file or prepared directory; default: the one that the model was trained on"
    )
    asked.add_argument(
        "--num_pairs", type=cli.positive_int, help="pairs a family, two a couple; default 200, with --quick 40"
    )
    asked.add_argument("--include_trained", action="store_true", help="also words that a model was trained on")

    measured = parser.add_argument_group("what is measured")
    measured.add_argument(
        "--quick",
        action="store_true",
        help="a look in a few minutes: heads and MLPs alone, fewer pairs, wide intervals; no random model unless asked for",
    )
    measured.add_argument(
        "--random_sets",
        type=cli.positive_int,
        help="random sets of parts beside each set; default 100, with --quick 10",
    )
    measured.add_argument("--random_set_pairs", type=cli.positive_int,
                          help="pairs of each family that a random set is measured in; more: their scatter is less; default 4, with --quick 1")  # fmt: skip
    measured.add_argument("--random_model", action=argparse.BooleanOptionalAction,
                          help="measure a model with random weights too, as a floor; default: but with --quick")  # fmt: skip
    measured.add_argument("--batch_size", type=cli.positive_int, default=16, help="prompts at a time")
    measured.add_argument(
        "--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="half precision doubts small effects"
    )
    measured.add_argument("--device", help="cuda, cpu, ...; default: a GPU if there is one")
    measured.add_argument("--seed", type=cli.non_negative_int, default=0, help="pairs, halves, random sets, resamples")
    cli.add_tracking_flags(parser, {"model_path": artifacts.ANY_MODEL, "lexicon": artifacts.ROWS})
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = cli.parse_stage(parser, argv)
    if not args.model_path:
        parser.error("the following arguments are required: --model_path")
    if args.num_pairs and (args.num_pairs < FEWEST_PAIRS or args.num_pairs % 2):
        parser.error(
            f"--num_pairs {args.num_pairs}: expected an even number, {FEWEST_PAIRS} or more: couples, in halves of halves"
        )
    tracking.load_env()

    args.families = args.families or [name for name in FAMILIES if not args.quick or name != "french"]
    args.random_model = not args.quick if args.random_model is None else args.random_model

    # 1. The models: the one that is asked about first, then what it came from, then its twin.
    given = [("--model_path", args.model_path), *(("--compare", name) for name in args.compare)]
    sources = opening.find_models([*given, *([("--seed_twin", args.seed_twin)] if args.seed_twin else [])])
    main_name, *others = sources
    twin = others.pop() if args.seed_twin else None
    chain = [*others, main_name]
    opening.check_device(args.device)
    opening.check_shapes(sources)
    opening.show(sources)

    # 2. What they are asked: more couples than needed, of which the main model's answers choose those that fit each other.
    from stoney_rl.interp import analysis, compare, compare_plots, hooked, localise, report, tasks, verdicts
    from stoney_rl.models import load_model, load_tokenizer

    tokenizers = {name: load_tokenizer(source) for name, source in sources.items()}
    opening.check_vocabularies(tokenizers)
    settings = settings_of(args)
    rows, dataset = opening.held_out(sources[main_name].name)
    pools = make_pools(args, sources, tokenizers[main_name], settings, dataset)
    compare.check_sizes(pools)
    texts = texts_of(rows, tokenizers[main_name])
    output = Path(args.output_dir or Path("comparison") / main_name)
    identity = runs.identify(
        vars(args),
        NOT_IDENTITY,
        models=opening.identities(sources),
        **{
            "the order of the models": [chain, twin],
            "the prompts": compare.sha256(pools, texts[0]),
            "how much is measured": asdict(settings),
        },
    )
    opening.stage_at(output, STAGE, "is not a comparison", overwrite=args.overwrite)
    if runs.is_finished([output], identity, overwrite=args.overwrite):
        missing = [name for name in (SUMMARY_FILE, REPORT_FILE, RESULTS_FILE) if not (output / name).exists()]
        if not missing:
            print((output / SUMMARY_FILE).read_text(encoding="utf-8"))
            print(f"{output}/: compared with these settings already (--overwrite compares again)")
            return
        print(f"{output}/: {', '.join(missing)} missing; written again, from what is in {runs.MEASURED}/")
        runs.reopen(output)

    @functools.lru_cache(maxsize=2)  # two are needed at once, where one is compared with the next
    def open_hooked(name: str):
        return opening.open_hooked(sources[name], args.dtype, args.device)

    @functools.lru_cache(maxsize=2)
    def open_plain(name: str):
        return load_model(sources[name], opening.torch_dtype(args.dtype)).to(opening.device_of(args.device))

    localise.refuse_post_norm(open_hooked(main_name))
    partial = runs.open_partial(output, identity, resume=not args.overwrite, overwrite=args.overwrite)
    model, *rest = (source.name for source in sources.values())
    tracker = runs.start_tracking(
        "compare_reasoning", args, partial, model=model, data=opening.trained_on(model), also=rest
    )
    started = time.monotonic()

    folder = partial / runs.MEASURED
    scores = analysis.kept(folder, "pools", lambda: compare.score_pools(open_hooked(main_name), pools, args.batch_size))
    plan = compare.make_plan(pools, scores, texts, settings, args.batch_size, args.seed)
    compare.check_chosen(folder, plan)
    print(tasks.describe(compare.balance_of(plan, pools, scores)))

    # 3. One model at a time, one task at a time; what was measured before a stop is not measured again.
    measured = {}
    for name in sources:
        asked = plan if name == main_name else plan.without_controls()
        wanted = compare.tasks_of(plan, is_main=name == main_name)
        measured[name] = analysis.measure_model(
            folder / "models" / name, wanted, asked, functools.partial(open_hooked, name), table=compare.TASKS
        )
    floor = None
    if args.random_model:
        open_random = functools.cache(lambda: hooked.random_hooked(open_hooked(main_name), args.seed))
        floor = {}
        for few, wanted in compare.floor_tasks(plan):
            floor |= analysis.measure_model(folder / opening.RANDOM, wanted, few, open_random, table=compare.TASKS)
    open_hooked.cache_clear()
    changes = {
        pair: compare.measure_change(folder / "changes", plan, open_plain, open_hooked, *pair)
        for pair in [*itertools.pairwise(chain), *([(main_name, twin)] if twin else [])]
    }

    # 4. What a person reads.
    results = verdicts.summarise(
        plan,
        measured,
        floor,
        changes,
        main=main_name,
        twin=twin,
        balance=compare.balance_of(plan, pools, scores),
        about=about(args, plan, started),
        checkpoints=opening.rows_of_page(sources),
    )
    pictures = compare_plots.draw(results, partial)
    report.write_page(partial / REPORT_FILE, verdicts.page(results, pictures))
    text = "\n\n".join(textwrap.fill(line, WIDTH) for line in results["findings"])
    (partial / SUMMARY_FILE).write_text(text + "\n", encoding="utf-8")
    checkpoints.write_json(partial / RESULTS_FILE, report.plain(results))
    checkpoints.write_json(
        partial / checkpoints.STAGE_FILE,
        checkpoints.describe_stage(
            STAGE, arguments=vars(args), seed=args.seed, identity=identity, wandb=tracker.record
        ),
    )
    checkpoints.publish(partial, output)
    print(text)
    print(f"\n{output}/: {REPORT_FILE} (open it in a browser), {RESULTS_FILE}, {len(pictures)} pictures")

    # 5. The same to W&B.
    tracker.html("report", output / REPORT_FILE)
    for name, path in pictures.items():
        tracker.image(name, output / path.name)
    tracker.table("findings", ["finding"], [[line] for line in results["findings"]])
    tracker.artifact(output.name, "comparison", str(output))
    tracker.finish()


def settings_of(args: argparse.Namespace) -> "Settings":
    from stoney_rl.interp import compare

    settings = compare.QUICK if args.quick else compare.FULL
    couples = args.num_pairs // 2 if args.num_pairs else settings.couples
    draws, few = args.random_sets or settings.draws, args.random_set_pairs or settings.few
    return replace(settings, couples=couples, draws=draws, few=few)


def make_pools(
    args: argparse.Namespace,
    sources: "dict[str, ModelSource]",
    tokenizer: "PreTrainedTokenizerBase",
    settings: "Settings",
    dataset: str | None,
) -> "dict[str, Family]":
    """Couples of every family, more than will be asked; says what they are, and what was left out. ``dataset``: where the
    lexicon is looked for, unless one is given."""
    from stoney_rl.interp import pairs, plan, tasks

    own = {}
    if args.pairs_file:
        read = pairs.read_pairs(args.pairs_file, tokenizer)
        own = plan.by_family(read.pairs)
        print(*(f"{args.pairs_file}: {reason}" for reason in read.skipped), sep="\n", end="\n" if read.skipped else "")
    controls = args.controls
    if controls is None:
        controls = [name for name in CONTROLS if name.partition("_")[0] in args.families]
        controls = [name for name in controls if not args.quick or name == "english_split"]
    lacking = [name for name in controls if name.partition("_")[0] not in args.families]
    if lacking:
        raise StoneyError(
            f"--controls {lacking[0]}: belongs to the family {lacking[0].partition('_')[0]}, which --families lacks"
        )
    entries, unused = [], [flag for flag in ("lexicon", "include_trained") if getattr(args, flag)]
    if "lexicon" not in args.families and unused:
        print(f"--families without lexicon: {' and '.join('--' + flag for flag in unused)} change nothing")
    if "lexicon" in args.families:
        names = [source.name for source in sources.values()]
        entries = plan.find_lexicon(args.lexicon, dataset)
        if not args.include_trained:
            entries, left_out = plan.untrained(entries, names)
            print(f"lexicon: {len(entries):,} entries, without {left_out:,} that a model's training record names")
    pools = tasks.build_pools([*args.families, *controls], tokenizer, entries, couples=settings.couples, seed=args.seed)
    for family, members in own.items():
        if family in pools or family in (*FAMILIES, *CONTROLS):
            raise StoneyError(
                f"{args.pairs_file}: the family {family!r} has the name of one that is built; choose another"
            )
        pools[family] = tasks.own_family(family, members)
    for name, family in pools.items():
        print(family.describe())
        if name in own and len(family.pairs) > 2 * settings.couples:
            print(f"  the first {2 * settings.couples} of them are asked; --num_pairs asks more")
    return pools


def texts_of(rows: "Sequence[Row]", tokenizer: "PreTrainedTokenizerBase") -> tuple[list, list, list]:
    """Of at most TEXTS held-out rows: token ids, (ids, labels), and a cluster each, their lexemes."""
    from stoney_rl.prompts import encode_example, end_of_turn_ids

    rows, ends, found = list(rows), end_of_turn_ids(tokenizer), []
    random.Random(0).shuffle(rows)
    for row in rows:
        example = encode_example(tokenizer, list(row.prompt), row.completion[0]["content"], ends)
        ids, labels = example["input_ids"][:MAX_TEXT], example["labels"][:MAX_TEXT]
        if any(label != -100 for label in labels):
            found.append((ids, (ids, labels), " ".join(sorted(row.lexemes)) or row.id))
        if len(found) == TEXTS:
            break
    what = f"{len(found)} held-out rows" if found else "none; the prompts of the pairs serve instead"
    print(f"other texts: {what}")
    ids, examples, clusters = ([entry[place] for entry in found] for place in range(3))
    return ids, examples, clusters


def about(args: argparse.Namespace, plan: "Plan", started: float) -> dict[str, str]:
    """What the report says of where its numbers come from."""
    import os
    from importlib.metadata import version

    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seed": str(args.seed),
        "pairs": ", ".join(f"{len(family.pairs)} {name}" for name, family in plan.families.items()),
        "other texts": f"{len(plan.texts)} held-out rows",
        "time": f"{(time.monotonic() - started) / 60:.0f} minutes in this start, {os.cpu_count()} processors, on {opening.device_of(args.device)}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("transformer-lens", "transformers", "torch")),
    }


if __name__ == "__main__":
    cli.run(main)
