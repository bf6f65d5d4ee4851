"""LoRA fine-tuning on a CPU: train_lora.py beside TRL's own command line, `trl sft`, on the same rows.

    python benchmarks/sft.py
    python benchmarks/sft.py --steps 40 --repeats 5 --attn_implementation eager
    python benchmarks/sft.py --model stoney_lora_merged --dataset rows.jsonl --max_length 512

Each variant is a process of its own, in turn, --repeats times: one epoch over the same rows with the same batch
size, length, adapter, learning rate and seed, with the loss on the answer alone. Time is taken from transformers'
progress bar, from the moment training begins to the last update, so imports, loading, saving and merging are outside
of it; the whole process is reported beside it. Memory is resident memory of the training process.

Useful arithmetic of LoRA training on rows of s tokens with a answer tokens each, in floating-point operations:

    (4 N + 6 A) sum(s)  +  4 V d sum(a)  +  12 L D sum(s^2)

N: weights of the linear layers that are applied to every token, A: of the adapters, V d: of the LM head, L: layers,
D: width of attention (heads x head size). A weight costs 2 operations a token forward and 2 for the gradient of its
input; a trained weight 2 more for its own gradient, which frozen weights do without, hence 4 N in place of the usual
6 N (arXiv 2001.08361, section 2.1). The term of attention is that of PaLM, appendix B (arXiv 2204.02311).
Activations that are computed again under gradient checkpointing, padding, and the head on prompt tokens are not
useful and not counted.

Writes --output. Rows are held in a temporary folder while it runs; no row's text is in the result.
Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: its own folder would hide the standard library's `inspect`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


import argparse
import json
import os
import statistics
import sysconfig
import tempfile
from dataclasses import asdict, dataclass

from benchmarks import matmul, measure
from stoney_rl import checkpoints, cli
from stoney_rl.errors import StoneyError
from stoney_rl.models import find_model

ROOT = Path(__file__).resolve().parent.parent
TRL_DEFAULT, TRL_OURS = "trl sft", "trl sft, our settings"
OURS_DEFAULT, OURS_FAST = "train_lora.py", "train_lora.py --no-gradient_checkpointing"
VARIANTS = (TRL_DEFAULT, TRL_OURS, OURS_DEFAULT, OURS_FAST)


@dataclass(frozen=True)
class Workload:
    """What every variant trains on. ``tokens``: prompt and answer; ``answer_tokens``: those with a label.

    ``linear_weights``: N of the module's formula, ``adapter_weights``: A, ``head_weights``: V d, ``layers``: L,
    ``attention_width``: D. ``autocast``: the dtype of the matrix products that train_lora.py chooses here.
    """

    rows: int
    tokens: int
    answer_tokens: int
    squared_tokens: int
    longest: int
    data_sha256: str
    linear_weights: int
    adapter_weights: int
    head_weights: int
    layers: int
    attention_width: int
    hidden: int
    intermediate: int
    autocast: str

    @property
    def useful_flops(self) -> float:
        """Floating-point operations of one epoch, by the formula at the top of this file."""
        return (
            (4 * self.linear_weights + 6 * self.adapter_weights) * self.tokens
            + 4 * self.head_weights * self.answer_tokens
            + 12 * self.layers * self.attention_width * self.squared_tokens
        )


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--model", default="checkpoints/smollm2-135m", help="folder of a base or merged model")
    parser.add_argument("--dataset", default="data/planted/rows.jsonl", help="file or folder of rows")
    parser.add_argument("--output", default="results/benchmark-sft.json", help="file of the results")
    parser.add_argument("--repeats", type=cli.positive_int, default=3, help="runs of each variant, in turn")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT",
        help=f"any of {', '.join(map(repr, VARIANTS))}",
    )  # fmt: skip
    parser.add_argument("--threads", type=cli.positive_int, default=measure.usable_cores(), help="of torch, every run")
    same = parser.add_argument_group("the same for every variant")
    same.add_argument("--steps", type=cli.positive_int, default=12, help="updates at most; as many rows are taken")
    same.add_argument("--batch_size", type=cli.positive_int, default=8, help="rows at a time")
    same.add_argument("--gradient_accumulation_steps", type=cli.positive_int, default=1, help="batches an update")
    same.add_argument("--max_length", type=cli.positive_int, default=512, help="tokens a row; longer rows are cut")
    same.add_argument("--lora_rank", type=cli.positive_int, default=16, help="on all linear layers")
    same.add_argument("--lora_alpha", type=cli.positive_int, default=32, help="scale: alpha / rank")
    same.add_argument("--attn_implementation", help="sdpa, eager, ...; default: each one's own (sdpa)")
    same.add_argument("--learning_rate", type=cli.positive_float, default=2e-4, help="peak learning rate")
    same.add_argument("--seed", type=cli.non_negative_int, default=0, help="choice and order of rows, adapter")
    parser.add_argument("--dtype", choices=["auto", "bf16", "fp32"], default="auto",
                        help="of train_lora.py and of trl sft with its settings; trl sft's own default is bf16")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    trl = find_trl(args)
    from tqdm import tqdm

    machine = measure.machine(args.threads)
    print(f"{machine['cpu']}, {machine['cores']} cores, torch threads {args.threads}")
    notice = measure.load_notice(machine["load"], machine["cores"])
    if notice:
        print(notice)

    with measure.ending_tidily(), tempfile.TemporaryDirectory(prefix="stoney-benchmark-") as folder:
        work = Path(folder)
        print("choosing rows and counting tokens ...")
        load: Workload = measure.in_process(prepare, vars(args), work)
        updates = -(-load.rows // (args.batch_size * args.gradient_accumulation_steps))
        print(
            f"{load.rows} rows, {load.tokens} tokens, {load.answer_tokens} of them answer; {updates} updates; "
            f"{load.useful_flops / load.tokens / 1e9:.2f} GFLOP a token"
        )
        commands = {name: command(name, args, load, work, trl) for name in args.variants}
        layer = (args.batch_size * round(load.tokens / load.rows), load.hidden, load.intermediate)
        shapes = {"layer": layer, "square": (matmul.SQUARE,) * 3}
        rates, runs = [], {name: [] for name in args.variants}
        for repeat in range(args.repeats):
            rates.append(measure.in_process(matmul.rates, shapes, args.threads))
            for name in args.variants:
                with tqdm(total=updates, desc=f"{repeat + 1}/{args.repeats} {name}", unit="update") as bar:
                    run = measure.run_training(
                        commands[name],
                        updates=updates,
                        env=environment(args.threads, work),
                        progress=lambda done, bar=bar: bar.update(done - bar.n),
                    )
                runs[name].append({"run": run, **read_log(output_directory(name, work), name, load)})

    ceiling = {
        dtype: {shape: statistics.median(rate[dtype][shape] for rate in rates) for shape in shapes}
        for dtype in rates[0]
    }
    results = {name: summarise(name, entries, load, args, ceiling) for name, entries in runs.items()}
    for name, entry in results.items():
        entry["command"] = readable(commands[name], work)
    report = checkpoints.describe_stage(
        "benchmark-sft",
        arguments=vars(args),
        seed=args.seed,
        machine=machine,
        workload=asdict(load) | {"updates": updates, "useful_flops": load.useful_flops},
        matmul_gflops={"shapes": shapes, "median": ceiling, "each": rates},
        results=results,
    )
    print(table(results, ceiling, shapes))
    if notice:
        print(notice)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_json(Path(args.output), report)
    print(f"{args.output}: the same, with every run, versions and machine")


def find_trl(args: argparse.Namespace) -> Path:
    """TRL's program. Raises ``StoneyError`` if it or the model is missing, or the result has no place to go."""
    source = find_model(args.model)
    if source.kind == "adapter":
        raise StoneyError(f"--model {args.model}: an adapter; name its merged directory")
    trl = Path(sysconfig.get_path("scripts")) / "trl"
    if not trl.exists():
        raise StoneyError(f"{trl}: no such program; install the requirements with: make setup")
    if Path(args.output).is_dir():
        raise StoneyError(f"--output {args.output}: a directory; name a file")
    return trl


def prepare(args: dict, work: Path) -> Workload:
    """Choose the rows, write them for both sides, count tokens and weights. Runs in a process of its own.

    ``work``/rows.jsonl is for train_lora.py, which splits it; ``work``/trl/train.jsonl holds that split's training
    rows, in the same order. They are as many as fill the updates asked for, or a few less: the split decides.
    """
    import random

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from stoney_rl import data, models, prompts

    rows = data.load_rows(args["dataset"]).rows
    random.Random(args["seed"]).shuffle(rows)
    wanted = args["steps"] * args["batch_size"] * args["gradient_accumulation_steps"]
    chosen = choose_rows(rows, wanted, work / "rows.jsonl")
    (work / "trl").mkdir()
    lines = [json.dumps({"prompt": row.prompt, "completion": row.completion}) + "\n" for row in chosen.split.train]
    (work / "trl" / "train.jsonl").write_text("".join(lines), encoding="utf-8")

    source = find_model(args["model"])
    tokenizer = models.load_tokenizer(source)
    prompts.prepare_tokenizer(tokenizer)
    ends = prompts.end_of_turn_ids(tokenizer)
    counts = []
    for row in chosen.split.train:
        labels = prompts.encode_example(tokenizer, row.prompt, row.answer, ends)["labels"][: args["max_length"]]
        counts.append((len(labels), sum(label != -100 for label in labels)))
    if not all(answer for _, answer in counts):
        raise StoneyError(f"--max_length {args['max_length']}: a row has no answer within it; raise it")

    config = AutoConfig.from_pretrained(args["model"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    text = config.get_text_config()
    heads = text.num_attention_heads
    return Workload(
        rows=len(counts),
        tokens=sum(length for length, _ in counts),
        answer_tokens=sum(answer for _, answer in counts),
        squared_tokens=sum(length**2 for length, _ in counts),
        longest=max(length for length, _ in counts),
        data_sha256=chosen.rowset.sha256,
        linear_weights=sum(layer.weight.numel() for layer in linear),
        adapter_weights=sum(args["lora_rank"] * sum(layer.weight.shape) for layer in linear),
        head_weights=head.weight.numel(),
        layers=text.num_hidden_layers,
        attention_width=heads * (getattr(text, "head_dim", None) or text.hidden_size // heads),
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        autocast=cpu_autocast(args["dtype"]),
    )


def choose_rows(rows: list, wanted: int, path: Path) -> object:
    """Write as many of ``rows`` to ``path`` as give ``wanted`` training rows after train_lora.py's split, or just less.

    Returns the ``corpus.Corpus`` that train_lora.py will make of the file. Raises ``StoneyError`` for too few rows.
    """
    from stoney_rl import corpus
    from stoney_rl.split import MIN_ROWS

    if wanted < MIN_ROWS:
        raise StoneyError(f"--steps: {wanted} rows in all, and the split needs {MIN_ROWS}; raise it or --batch_size")

    def prepared(number: int) -> object:
        path.write_text(
            "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows[:number]), encoding="utf-8"
        )
        return corpus.prepare(path)

    # The training split grows with the file, but not row by row: step towards the number, then take what fits.
    number, found = wanted, {}
    while number not in found and len(found) < 12 and MIN_ROWS <= number <= len(rows):
        found[number] = len(prepared(number).split.train)
        number += wanted - found[number]
    fitting = {number: training for number, training in found.items() if training <= wanted}
    if not fitting or (number > len(rows) and max(fitting.values()) < 0.9 * wanted):
        raise StoneyError(
            f"--dataset: {len(rows)} rows are too few for {wanted} training rows; lower --steps or --batch_size"
        )
    return prepared(max(fitting, key=lambda number: (fitting[number], -number)))


def cpu_autocast(dtype: str) -> str:
    """What train_lora.py --dtype computes matrix products in on this CPU: 'bf16' or 'fp32'."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as every variant runs; this process is the worker's own
    from stoney_rl import models

    return models.choose_precision(dtype).autocast or "fp32"


def output_directory(variant: str, work: Path) -> Path:
    return work / f"out-{VARIANTS.index(variant)}"


def command(variant: str, args: argparse.Namespace, load: Workload, work: Path, trl: Path) -> list[str]:
    """The command line of ``variant``. Both sides: one epoch, a loss record for each update, no evaluation, one save."""
    output = output_directory(variant, work)
    shared = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "max_length": args.max_length,
        "lora_alpha": args.lora_alpha,
        "lora_dropout": 0,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_steps": 1_000_000,  # the last update is always saved
        "seed": args.seed,
        "output_dir": output,
    } | ({"attn_implementation": args.attn_implementation} if args.attn_implementation else {})
    if variant in (OURS_DEFAULT, OURS_FAST):
        own = {
            "model": args.model,
            "dataset": work / "rows.jsonl",
            "merged_dir": f"{output}-merged",
            "lora_rank": args.lora_rank,
            "eval_steps": 0,
            "dtype": args.dtype,
            "wandb_mode": "disabled",
        }
        extra = ["--overwrite"] + (["--no-gradient_checkpointing"] if variant == OURS_FAST else [])
        return [sys.executable, str(ROOT / "train_lora.py"), *flags(own | shared), *extra]
    own = {
        "model_name_or_path": args.model,
        "dataset_name": work / "trl",
        "lora_r": args.lora_rank,
        "lora_target_modules": "all-linear",
        "warmup_steps": 0.03,
        "data_seed": args.seed,
        "completion_only_loss": True,
        "use_cpu": True,
        "report_to": "none",
    }
    if variant == TRL_OURS:
        own |= {
            "gradient_checkpointing": False,
            "train_sampling_strategy": "group_by_length",
            "bf16": load.autocast == "bf16",
        }
    return [str(trl), "sft", *flags(own | shared), "--use_peft"]


def flags(values: dict) -> list[str]:
    return [token for key, value in values.items() for token in (f"--{key}", str(value))]


def readable(command: list[str], work: Path) -> list[str]:
    """The command as a person would type it: programs by their names, the temporary folder as WORK."""
    places = {str(work): "WORK", f"{ROOT}/": "", f"{Path(command[0]).parent}/": ""}
    for place, name in places.items():
        command = [token.replace(place, name) for token in command]
    return command


def environment(threads: int, work: Path) -> dict[str, str]:
    """For both sides: the same threads (`trl sft` alone would take one), no GPU, no hub, caches in ``work``."""
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(work / "datasets"),
        "WANDB_MODE": "disabled",
    }


def read_log(output: Path, variant: str, load: Workload) -> dict:
    """The trainer's own record: losses, and the tokens it counted, which must be those that are reported."""
    states = [json.loads(path.read_text(encoding="utf-8")) for path in output.rglob("trainer_state.json")]
    if not states:
        raise StoneyError(f"{variant}: wrote no trainer_state.json into {output}; was it interrupted?")
    records = max(states, key=lambda state: state["global_step"])["log_history"]
    losses = [record["loss"] for record in records if "loss" in record]
    counted = round(max(record.get("num_tokens", 0) for record in records))
    # TRL also trains on what the chat template writes after the end of the turn (SmolLM2: a newline).
    if not load.tokens <= counted <= load.tokens + 4 * load.rows or (
        variant in (OURS_DEFAULT, OURS_FAST) and counted != load.tokens
    ):
        raise StoneyError(f"{variant}: trained on {counted} tokens, {load.tokens} were counted; not the same rows")
    return {"loss": statistics.fmean(losses), "trainer_tokens": counted}


def summarise(name: str, entries: list[dict], load: Workload, args: argparse.Namespace, ceiling: dict) -> dict:
    """Medians over the repeats, and every run beneath them."""
    runs: list[measure.Run] = [entry["run"] for entry in entries]
    seconds = statistics.median(run.training_seconds for run in runs)
    dtype = "bf16" if name == TRL_DEFAULT else load.autocast
    gflops = load.useful_flops / seconds / 1e9
    in_training = [run.peak_training_bytes for run in runs if run.peak_training_bytes is not None]
    return {
        "answer_tokens_per_second": load.answer_tokens / seconds,
        "tokens_per_second": load.tokens / seconds,
        "training_seconds": seconds,
        "training_seconds_range": [min(r.training_seconds for r in runs), max(r.training_seconds for r in runs)],
        "update_seconds": statistics.median(second for run in runs for second in run.update_seconds),
        "first_update_seconds": statistics.median(run.update_seconds[0] for run in runs),
        "process_seconds": statistics.median(run.seconds for run in runs),
        "peak_training_bytes": max(in_training, default=None),
        "peak_bytes": max(run.peak_bytes for run in runs),
        "dtype": dtype,
        "useful_gflops": gflops,
        "share_of_matmul": {shape: gflops / rate for shape, rate in ceiling[dtype].items()},
        "loss": statistics.fmean(entry["loss"] for entry in entries),
        "runs": [asdict(entry.pop("run")) | entry for entry in entries],
    }


def table(results: dict, ceiling: dict, shapes: dict) -> str:
    first = next(iter(results))
    width = max(map(len, results))
    lines = [
        "",
        f"{'':{width}}  answer tok/s  all tok/s  speed  s an update  training s (range)  whole run s  mean loss",
    ]
    for name, entry in results.items():
        spread = "{:.1f}-{:.1f}".format(*entry["training_seconds_range"])
        lines.append(
            f"{name:{width}}  {entry['answer_tokens_per_second']:12.1f}  {entry['tokens_per_second']:9.1f}  "
            f"{results[first]['training_seconds'] / entry['training_seconds']:4.2f}x  {entry['update_seconds']:11.2f}  "
            f"{spread:>18}  {entry['process_seconds']:11.1f}  {entry['loss']:9.3f}"
        )
    lines += [
        "",
        f"{'':{width}}  peak MB: training  whole run  dtype  useful GFLOP/s  of the layer's product  of a square",
    ]
    for name, entry in results.items():
        lines.append(
            f"{name:{width}}  {megabytes(entry['peak_training_bytes']):>17}  {megabytes(entry['peak_bytes']):>9}  "
            f"{entry['dtype']:>5}  {entry['useful_gflops']:14.1f}  {entry['share_of_matmul']['layer']:22.0%}  "
            f"{entry['share_of_matmul']['square']:11.0%}"
        )
    lines += ["", f"speed: training time of {first} / training time. Plain matrix products on this machine:"]
    for shape, sizes in shapes.items():
        by_dtype = ", ".join(f"{dtype} {rates[shape]:.0f}" for dtype, rates in ceiling.items())
        lines.append(f"  {shape:6}  {' x '.join(map(str, sizes)):>18}  {by_dtype} GFLOP/s")
    return "\n".join(lines)


def megabytes(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e6:.0f}"


if __name__ == "__main__":
    cli.run(main)
