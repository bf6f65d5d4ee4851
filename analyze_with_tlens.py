"""Look inside a checkpoint with TransformerLens: which heads, neurons and paths do the work, and can it be believed?

    python analyze_with_tlens.py --model_path stoney_lora_merged --compare checkpoints/smollm2-135m --lexicon prepared
    python analyze_with_tlens.py --model_path stoney_rl_grpo --compare base checkpoints/smollm2-135m \\
        --families lookup lookup_english --num_pairs 24 --tasks attention patching lens
    python analyze_with_tlens.py --model_path demo/planted_merged --compare base --lexicon data/planted/lexicon.jsonl --families affix
    python analyze_with_tlens.py --model_path stoney_lora_merged --pairs pairs.jsonl --sample_text "What does it mean?"

Reads: checkpoint directories (adapter or merged) or hub ids; prompt pairs from a file, or built from a lexicon without the
words that any of the models was trained on. README-TLens.md explains pairs, tasks and pictures.
Writes --output_dir: report.html (one file, needs no network), results.json, summary.txt, PNGs, and measured/ with the values
of every pair. An analysis that was stopped goes on where it was; a finished one is shown again.
Exit codes: 0 done, 1 an invariant does not hold, so that figures can't be believed, 2 bad input, 130 interrupted.
"""

import argparse
import functools
import shlex
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from stoney_rl import artifacts, checkpoints, cli, runs, tracking
from stoney_rl.errors import StoneyError
from stoney_rl.interp import opening
from stoney_rl.models import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stoney_rl.interp.hooked import HookedModel
    from stoney_rl.interp.plan import Plan

RESULTS_FILE, SUMMARY_FILE, REPORT_FILE = "results.json", "summary.txt", "report.html"
STAGE, TRACE_FILE = "analysis", "trace.jsonl"
WIDTH = 100  # of summary.txt
FEW = 20  # clusters of a family: half of them must be as many as an interval takes
EXIT_NOT_TO_BE_BELIEVED = 1
TASKS = ("attention", "attribution", "lens", "tuned_lens", "residual", "patching", "ablation", "neurons", "circuit")
FAMILIES = ("lookup", "lookup_form", "lookup_english", "recall", "affix")
# Arguments that change no number.
NOT_IDENTITY = {"overwrite", "config", "output_dir", "batch_size", "model_path", "compare", "trace"}
MAX_SHOWN_TOKENS = 120  # of the sample text: a pattern is drawn for every head


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model_path", help="checkpoint directory (adapter or merged) or hub id")
    parser.add_argument("--compare", nargs="+", default=[], metavar="CHECKPOINT",
                        help="measure these too, on the same pairs; 'base': what the model was trained from")  # fmt: skip
    parser.add_argument("--output_dir", help="default: analysis/<model>")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results in the output directory")

    asked = parser.add_argument_group("what is asked")
    asked.add_argument(
        "--pairs", metavar="FILE", help="prompt pairs, JSON lines (README-TLens.md); default: built from the lexicon"
    )
    asked.add_argument(
        "--lexicon", help="lexicon file or prepared directory; default: the one that the model was trained on"
    )
    asked.add_argument(
        "--families",
        nargs="+",
        choices=FAMILIES,
        help="of built pairs; default: affix where the lexicon has stems, else lookup",
    )
    asked.add_argument(
        "--num_pairs", type=cli.positive_int, default=24, help="built pairs a family; each of two words of its own"
    )
    asked.add_argument("--include_trained", action="store_true", help="also words that a model was trained on")
    asked.add_argument(
        "--sample_text", help="text whose attention and lens are drawn; default: the first pair's prompt"
    )

    measured = parser.add_argument_group("what is measured")
    measured.add_argument(
        "--tasks", nargs="+", choices=["all", *TASKS], default=["all"], help="ablation includes patching"
    )
    measured.add_argument(
        "--layers", type=layer_range, metavar="A-B", help="layers in which heads and neurons are chosen; default: all"
    )
    measured.add_argument(
        "--heads",
        nargs="+",
        type=head_name,
        default=[],
        metavar="LAYER.HEAD",
        help="heads to test besides the strongest",
    )
    measured.add_argument(
        "--top_k", type=cli.positive_int, default=10, help="heads and neurons that are tested and shown"
    )
    measured.add_argument("--random_models", type=cli.non_negative_int, default=2,
                          help="models with random weights, whose largest effect is the floor of a finding; 0: none")  # fmt: skip
    measured.add_argument(
        "--batch_size", type=cli.positive_int, default=16, help="prompts at a time; changes memory, not numbers"
    )
    measured.add_argument(
        "--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="half precision doubts small effects"
    )
    measured.add_argument("--device", help="cuda, cpu, ...; default: a GPU if there is one")
    measured.add_argument("--seed", type=cli.non_negative_int, default=0, help="pairs, halves, random heads, resamples")
    measured.add_argument(
        "--trace",
        metavar="DIR",
        help="directory of a run trained with --trace_every, for the slider; default: the model's own",
    )
    cli.add_tracking_flags(parser, {"model_path": artifacts.ANY_MODEL, "lexicon": artifacts.ROWS})
    return parser


def layer_range(text: str) -> tuple[int, int]:
    """argparse type: '3' or '3-7', as (3, 3) or (3, 7)."""
    first, dash, last = text.partition("-")
    try:
        found = int(first), int(last) if dash else int(first)
    except ValueError:
        found = (1, 0)
    if not 0 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"expected a layer or a range such as 3-7, got {text}")
    return found


def head_name(text: str) -> tuple[int, int]:
    """argparse type: 'layer.head', both counted from 0."""
    parts = text.split(".")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected layer.head such as 3.7, both counted from 0, got {text}")
    return int(parts[0]), int(parts[1])


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = cli.parse_stage(parser, argv)
    if not args.model_path:
        parser.error("the following arguments are required: --model_path")
    tracking.load_env()

    # 1. The models: the one that is asked about first.
    sources = opening.find_models([("--model_path", args.model_path), *(("--compare", name) for name in args.compare)])
    if args.trace and not (Path(args.trace) / TRACE_FILE).exists():
        raise StoneyError(f"--trace {args.trace}: no {TRACE_FILE} there; train with --trace_every")
    opening.check_device(args.device)
    opening.check_shapes(sources)
    opening.show(sources)

    # 2. What they are asked: pairs, a sample text, other texts; the same of all.
    from stoney_rl.interp import analysis, plots, report, summary, tracer
    from stoney_rl.models import load_tokenizer

    tokenizers = {name: load_tokenizer(source) for name, source in sources.items()}
    opening.check_vocabularies(tokenizers)
    main_name, tokenizer = next(iter(tokenizers.items()))
    plan = make_plan(args, sources, tokenizer)
    traced_in = args.trace or trace_of(sources[main_name])
    trace = tracer.read(traced_in) if traced_in else None
    asked = [task for task in TASKS if task != "tuned_lens" or plan.rows] if "all" in args.tasks else args.tasks
    tasks = analysis.ordered(["trust", *asked])
    output = Path(args.output_dir or Path("analysis") / main_name)
    identity = runs.identify(
        vars(args),
        NOT_IDENTITY,
        models=opening.identities(sources),
        asked_sha256=plan.sha256(),
    )
    earlier = opening.stage_at(output, STAGE, "is not an analysis", overwrite=args.overwrite)
    if runs.is_finished([output], identity, overwrite=args.overwrite):
        print((output / SUMMARY_FILE).read_text(encoding="utf-8"))
        print(f"{output}/: analysed with these settings already (--overwrite analyses again)")
        return earlier["exit_code"]
    partial = runs.open_partial(output, identity, resume=not args.overwrite, overwrite=args.overwrite)

    # 3. One model at a time, one task at a time; what was measured before a stop is not measured again.
    model, *others = (source.name for source in sources.values())
    tracker = runs.start_tracking(
        "analyze_with_tlens", args, partial, model=model, data=opening.trained_on(model), also=others
    )
    measured, floors = {}, None
    for name, source in sources.items():
        open_model = functools.cache(functools.partial(opened, args, name, source))
        measured[name] = analysis.measure_model(partial / runs.MEASURED / name, tasks, plan, open_model)
        floors = floors or analysis.measure_floor(partial / runs.MEASURED, tasks, plan, open_model)

    broken = any(tasks["trust"].facts["failed"] for tasks in measured.values())
    exit_code = EXIT_NOT_TO_BE_BELIEVED if broken else 0

    # 4. What a person reads.
    results, arrays = summary.summarise(
        measured,
        plan,
        floors,
        tokenizer,
        title=f"Inside {main_name}",
        about=about(args, plan),
        checkpoints=opening.rows_of_page(sources),
    )
    if trace:
        results["trace"], traced = summary.trace_view(main_name, trace, tokenizer)
        arrays |= traced
    report.write(partial / REPORT_FILE, results, arrays)
    pictures = plots.draw(results, arrays, partial)
    text = "\n\n".join(textwrap.fill(line, WIDTH) for line in results["findings"])
    (partial / SUMMARY_FILE).write_text(text + "\n", encoding="utf-8")
    checkpoints.write_json(
        partial / checkpoints.STAGE_FILE,
        checkpoints.describe_stage(
            STAGE,
            arguments=vars(args),
            seed=args.seed,
            identity=identity,
            exit_code=exit_code,
            wandb=tracker.record,
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
    tracker.table("trust", ["invariant", "limit", *sources], [
        [each["name"], each["limit"], *(each["values"][name] for name in sources)] for each in report.plain(results)["trust"]
    ])  # fmt: skip
    tracker.artifact(output.name, "analysis", str(output))
    tracker.finish()
    return exit_code


def make_plan(
    args: argparse.Namespace, sources: dict[str, ModelSource], tokenizer: "PreTrainedTokenizerBase"
) -> "Plan":
    """What is asked; says what it is, and what was left out."""
    from stoney_rl.interp import pairs, plan

    names = [source.name for source in sources.values()]
    rows, dataset = opening.held_out(names[0])
    if args.pairs:
        unused = [flag for flag in ("lexicon", "families", "include_trained") if getattr(args, flag)]
        if unused:
            print(f"--pairs: nothing is built, so {' and '.join('--' + flag for flag in unused)} change nothing")
        sets = [pairs.read_pairs(args.pairs, tokenizer)]
    else:
        entries = plan.find_lexicon(args.lexicon, dataset)
        if not args.include_trained:
            entries, left_out = plan.untrained(entries, names)
            print(f"lexicon: {len(entries):,} entries, without {left_out:,} that a model's training record names")
        sets = plan.build_families(entries, tokenizer, args.families, args.num_pairs, args.seed)
    families: dict[str, list] = {}
    for found in sets:
        print(found.describe())
        families |= plan.by_family(found.pairs)
    for family, members in families.items():
        clusters = len({pair.cluster for pair in members})
        if clusters < FEW:
            print(
                f"{family}: {clusters} clusters; with fewer than {FEW}, what is reported on half of them has no interval"
            )
    first = next(iter(families.values()))[0]
    text = tokenizer(args.sample_text)["input_ids"] if args.sample_text else list(first.clean)
    if not 2 <= len(text) <= MAX_SHOWN_TOKENS:
        what = "--sample_text" if args.sample_text else "the first pair's prompt (give a --sample_text)"
        raise StoneyError(
            f"{what}: {len(text)} tokens; expected 2 to {MAX_SHOWN_TOKENS}, as each head's pattern is drawn"
        )
    if not rows and "tuned_lens" in args.tasks:
        raise StoneyError(
            "--tasks tuned_lens: needs held-out rows to be fitted to, and the model names none that are here"
        )
    texts = plan.row_texts(rows, tokenizer) or [
        list(ids) for members in families.values() for pair in members for ids in (pair.clean, pair.corrupt)
    ]
    print(
        f"other texts, for neurons and the tuned lens: {len(texts)} {'held-out rows' if rows else 'prompts of the pairs'}"
    )
    return plan.Plan(
        families,
        text,
        texts,
        rows=len(rows),
        layers=args.layers,
        heads=tuple(args.heads),
        top_k=args.top_k,
        random_models=args.random_models,
        batch_size=args.batch_size,
        seed=args.seed,
    )


def opened(args: argparse.Namespace, name: str, source: ModelSource) -> "HookedModel":
    """The model, hooked, on the device. Raises ``StoneyError`` if --heads names one that it lacks."""
    model = opening.open_hooked(source, args.dtype, args.device)
    layers, heads = model.n_layers, model.n_heads
    lacking = " ".join(f"{layer}.{head}" for layer, head in args.heads if layer >= layers or head >= heads)
    if lacking or (args.layers and args.layers[1] >= layers):
        flag = f"--heads {lacking}" if lacking else f"--layers {args.layers[0]}-{args.layers[1]}"
        raise StoneyError(f"{flag}: {name} has layers 0 to {layers - 1}, heads 0 to {heads - 1}")
    return model


def trace_of(source: ModelSource) -> str | None:
    """The directory of the run that trained the model, if it was watched: the checkpoint itself, or the adapter it came of."""
    stage = checkpoints.read_stage(Path(source.name)) or {} if source.kind != "hub" else {}
    written = [stage.get("arguments", {}).get(key) for key in ("adapter_dir", "output_dir")]
    places = [source.name, *(checkpoints.locate(place, Path(source.name)) for place in written if place)]
    return next((place for place in places if (Path(place) / TRACE_FILE).exists()), None)


def about(args: argparse.Namespace, plan: "Plan") -> dict[str, str]:
    """What the report says of where its numbers come from."""
    from importlib.metadata import version

    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seed": str(args.seed),
        "pairs": ", ".join(f"{len(pairs)} {family}" for family, pairs in plan.families.items()),
        "asked (sha256)": plan.sha256()[:12],
        "versions": ", ".join(f"{name} {version(name)}" for name in ("transformer-lens", "transformers", "torch")),
    }


if __name__ == "__main__":
    cli.run(main)
