"""Peak memory of fine-tuning: what stoney_rl.memory predicts beside what is measured, with tokens a second.

    python benchmarks/memory.py
    python benchmarks/memory.py --cases phi3 7b smollm2 --steps 10 --time_limit 60

Models have the shapes of published ones and random weights, rows are random token ids: no network, no checkpoint. Each case
is a process of its own that trains --steps updates with train_lora.py's trainer (LoRA rank 16 on all linear layers, AdamW)
and then says what it took:

- CPU: peak resident memory, less the peak of the same process after a training run of a tiny model, which is what Python and
  the libraries take. A case 'merge' saves a model and an adapter and merges them in fp32, as the last step of a run does.
- GPU: the peak that torch allocated, and what it reserved for that; utilisation as the driver samples it, where it tells.

Tokens a second leave out the first update. 'of matmul': the arithmetic that training needs, (4 N + 6 A) tokens for N linear
and A adapter weights, 4 V d tokens for the head and 12 L D sum(s^2) for attention (see benchmarks/sft.py for the sources), a
second, over what a plain matrix product reached in the same process. What checkpointing computes again is not counted.

Without --cases: all that suit the device, the most important first. Writes --output after each case; cases of another
device that are in the file stay there. Without a GPU the GPU cases are listed as predicted and not measured.
Exit codes: 0 done (a case that failed or ran out of time is in the table as such), 2 bad input, 130 interrupted.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: its own folder would hide the standard library's `inspect`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


import argparse
import importlib.util
import json
import os
import re
import subprocess
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata

from benchmarks import measure
from stoney_rl import checkpoints, cli
from stoney_rl.errors import StoneyError

_MIB = 2**20
MARK = "measured: "  # what a case's process prints before its result


@dataclass(frozen=True)
class Case:
    """``model``: a name in ``shapes()``. ``length``: tokens of the longest row of each batch."""

    model: str
    batch_size: int
    length: int
    gradient_checkpointing: bool = True
    load_in_4bit: bool = False
    merge: bool = False


CPU = {
    "smollm2": Case("smollm2", 2, 256),
    "smollm2-kept": Case("smollm2", 2, 256, gradient_checkpointing=False),
    "0.5b": Case("0.5b", 2, 256),
    "0.5b-kept": Case("0.5b", 2, 256, gradient_checkpointing=False),
    "1b": Case("1b", 2, 128),
    "1b-kept": Case("1b", 2, 128, gradient_checkpointing=False),
    "smollm2-merge": Case("smollm2", 1, 1, merge=True),
    "0.5b-merge": Case("0.5b", 1, 1, merge=True),
}
GPU = {
    "phi3": Case("phi3", 2, 512),
    "7b": Case("7b", 4, 512),
    "smollm2": Case("smollm2", 4, 512),
    "7b-4bit": Case("7b", 4, 512, load_in_4bit=True),
    "phi3-4bit": Case("phi3", 2, 512, load_in_4bit=True),
    "7b-kept": Case("7b", 4, 512, gradient_checkpointing=False),
    "smollm2-kept": Case("smollm2", 4, 512, gradient_checkpointing=False),
    "phi3-kept": Case("phi3", 2, 512, gradient_checkpointing=False),
    "0.5b": Case("0.5b", 8, 512),
}


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    names = sorted(CPU | GPU)
    parser.add_argument("--cases", nargs="+", choices=names, metavar="CASE", help=f"any of {', '.join(names)}")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the GPU if there is one"
    )
    parser.add_argument("--steps", type=cli.positive_int, default=3, help="updates of each case")
    parser.add_argument("--time_limit", type=cli.positive_float, default=240.0, help="seconds a case, loading included")
    parser.add_argument("--seed", type=cli.non_negative_int, default=0, help="weights and rows")
    parser.add_argument("--output", default="results/benchmark-memory.json", help="file of the results")
    parser.add_argument("--measure", metavar="JSON", help=argparse.SUPPRESS)  # one case, in this process
    return parser


def main(argv: list[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    if args.measure:
        print(MARK + json.dumps(run_case(**json.loads(args.measure))), flush=True)
        return
    if args.steps < 2:
        raise StoneyError("--steps 1: AdamW's moments are there after the first update; give at least 2")
    output = Path(args.output)
    if not output.resolve().parent.is_dir():
        raise StoneyError(f"--output {output}: there is no folder {output.parent}")
    machine = measure.in_process(describe_machine)  # torch must not be loaded here: a child's peak would count it
    device = machine["device"] if args.device == "auto" else args.device
    if device == "cuda" and machine["device"] != "cuda":
        raise StoneyError("--device cuda: torch sees no GPU here; leave the flag out to measure on the CPU")
    known = GPU if device == "cuda" else CPU
    unknown = [name for name in args.cases or [] if name not in known]
    if unknown:
        raise StoneyError(f"--cases {' '.join(unknown)}: not on a {device}; there: {', '.join(known)}")

    print(machine["name"])
    old = read(output)
    others = [result for result in old if result["device"] != device or result["case"] not in (args.cases or known)]
    results: list[dict] = []
    with measure.ending_tidily():
        for name in args.cases or known:
            print(f"{name} ...", flush=True)
            result = {"case": name, "device": device, "machine": machine["name"], **asdict(known[name])}
            results.append(result | measure_case(known[name], device, args))
            write(output, others + results, args)
            print("  " + said(results[-1]), flush=True)
        if device == "cpu" and not args.cases:
            others = [result for result in others if result.get("measured_bytes")]
            done = {result["case"] for result in others if result["device"] == "cuda"}
            missing = {name: case for name, case in GPU.items() if name not in done}
            for name, predicted in measure.in_process(predict_on_gpu, missing).items():
                others.append(
                    {"case": name, "device": "cuda", **asdict(GPU[name]), **predicted, "failed": "not measured: no GPU"}
                )
            write(output, others + results, args)
    print(f"\n{table(others + results)}\n\n{output}")


def read(output: Path) -> list[dict]:
    try:
        return json.loads(output.read_text(encoding="utf-8"))["results"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise StoneyError(f"--output {output}: no results of this benchmark ({error!r}); name another file") from error


def write(output: Path, results: list[dict], args: argparse.Namespace) -> None:
    names = ("torch", "transformers", "peft", "trl", "accelerate")
    content = {
        "command": " ".join(["python benchmarks/memory.py", *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": args.seed,
        "steps": args.steps,
        "versions": {name: metadata.version(name) for name in names},
        "results": results,
    }
    checkpoints.write_json(output, content)


def measure_case(case: Case, device: str, args: argparse.Namespace) -> dict:
    """The result of the case's own process, or what became of it: 'failed' and the end of its output."""
    given = {"case": asdict(case), "device": device, "steps": args.steps, "seed": args.seed}
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", json.dumps(given)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.time_limit, env=environment)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {args.time_limit:g} s"}
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not found:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        return {"failed": f"exit code {done.returncode}: {lines[-1][:300] if lines else 'no output; is memory full?'}"}
    return json.loads(found[-1].removeprefix(MARK))


def said(result: dict) -> str:
    if "failed" in result:
        return result["failed"]
    speed = f"; {result['tokens_a_second']:,.0f} tokens/s" if result.get("tokens_a_second") else ""
    return (
        f"predicted {result['predicted_bytes'] / _MIB:,.0f} MiB, measured {result['measured_bytes'] / _MIB:,.0f} MiB, "
        f"ratio {result['ratio']:.2f}{speed}"
    )


def table(results: list[dict]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| device | case | batch x tokens | checkpointing | predicted MiB | measured MiB | ratio | tokens/s | of matmul | GPU busy |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        share, busy = (f"{result[key]:.0%}" if result.get(key) else "" for key in ("of_matmul", "utilisation"))
        shown = [
            result["device"],
            result["case"],
            "merge" if result["merge"] else f"{result['batch_size']} x {result['length']}",
            "on" if result["gradient_checkpointing"] and not result["merge"] else "",
            f"{result['predicted_bytes'] / _MIB:,.0f}" if "predicted_bytes" in result else "",
            f"{result['measured_bytes'] / _MIB:,.0f}" if "measured_bytes" in result else result["failed"],
            f"{result['ratio']:.2f}" if "ratio" in result else "",
            f"{result['tokens_a_second']:,.0f}" if result.get("tokens_a_second") else "",
            share,
            busy,
        ]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


# What follows runs in processes of their own.


def describe_machine() -> dict:
    import torch

    if torch.cuda.is_available():
        return {"device": "cuda", "name": f"{torch.cuda.get_device_name()}, torch {torch.__version__}"}
    machine = measure.machine(torch.get_num_threads())
    return {"device": "cpu", "name": f"{machine['cpu']}, {machine['torch_threads']} of {machine['cores']} cores"}


def config_of(name: str) -> object:
    """The config of a case's model; 'tiny' is what the memory of the libraries is measured with."""
    from transformers import AutoConfig

    from stoney_rl import memory

    if name == "1b":  # Llama-3.2-1B but for its vocabulary, whose logits would be most of what is measured
        return AutoConfig.for_model(
            "llama", vocab_size=32000, num_hidden_layers=16, hidden_size=2048, intermediate_size=8192,
            num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True, max_position_embeddings=4096,
        )  # fmt: skip
    if name == "tiny":
        return AutoConfig.for_model(
            "llama", vocab_size=256, num_hidden_layers=1, hidden_size=32, intermediate_size=64, num_attention_heads=2,
            num_key_value_heads=2,
        )  # fmt: skip
    return memory.shape(
        {
            "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
            "phi3": "microsoft/Phi-3-mini-4k-instruct",
            "7b": "Qwen/Qwen2.5-7B-Instruct",
        }[name]
    )


def predict_on_gpu(cases: dict[str, Case]) -> dict[str, dict]:
    """What the prediction says for a GPU with bf16, whatever this machine has."""
    import torch

    return {name: predict(case, "cuda", torch.bfloat16, torch.bfloat16) for name, case in cases.items()}


def predict(case: Case, device: str, weights: object, autocast: object) -> dict:
    from stoney_rl import memory

    if case.merge:
        return {"predicted_bytes": memory.merge_bytes(config_of(case.model))}
    setup = memory.Setup(
        batch_size=case.batch_size,
        length=case.length,
        weights=weights,
        autocast=autocast,
        device=device,
        load_in_4bit=case.load_in_4bit,
        gradient_checkpointing=case.gradient_checkpointing,
    )
    found = memory.sft_memory(config_of(case.model), setup)
    return {"predicted_bytes": found.peak, "predicted_parts": asdict(found)}


def run_case(case: dict, device: str, steps: int, seed: int) -> dict:
    """Predict, then train or merge, in this process."""
    import torch

    from stoney_rl import models

    case = Case(**case)
    if case.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise StoneyError("bitsandbytes is not installed")
    precision = models.choose_precision("auto")
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}[precision.autocast]
    predicted = predict(case, device, precision.weights, autocast)
    torch.manual_seed(seed)
    tiny = Case("tiny", 2, 16, case.gradient_checkpointing, merge=case.merge)
    work = merge if case.merge else train
    work(tiny, device, precision, 2)
    before = measure.peak_bytes()
    if device == "cuda":
        torch.cuda.empty_cache()
    result = work(case, device, precision, steps)
    if device == "cpu":
        peak = measure.peak_bytes()
        result = {"measured_bytes": peak - before, "libraries_bytes": before, "resident_bytes": peak} | result
    return predicted | result | {"ratio": predicted["predicted_bytes"] / result["measured_bytes"]}


def tokenizer() -> object:
    """Stands in for the model's, which the trainer wants for its padding token alone."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


def lora() -> object:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")


def random_model(case: Case, device: str, dtype: object) -> object:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_of(case.model), dtype=dtype)
    if case.load_in_4bit:
        quantize(model)
    return model


def quantize(model: object) -> None:
    """Replace the linear layers but for the head by 4-bit ones, with the settings of ``models.load_model``, in place."""
    import bitsandbytes as bnb

    from stoney_rl.memory import linear_layers

    chosen = set(map(id, linear_layers(model)))
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if id(layer) not in chosen:
                continue
            packed = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=layer.weight.dtype,
                compress_statistics=True, quant_type="nf4", device="meta",
            )  # fmt: skip
            packed.weight = bnb.nn.Params4bit(
                layer.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
            ).to(layer.weight.device)
            packed.bias = layer.bias
            setattr(parent, name, packed)
    model.is_loaded_in_4bit = True  # by which PEFT and TRL know


def train(case: Case, device: str, precision: object, steps: int) -> dict:
    """Some updates with the trainer of train_lora.py: seconds, tokens, memory on a GPU."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig

    from stoney_rl import training

    model = random_model(case, device, precision.weights)
    # One row of full length and the others a little shorter: there is padding, and so an attention mask.
    lengths = [case.length - number % case.batch_size for number in range(case.batch_size * steps)]
    ids = [torch.randint(2, model.config.vocab_size, (length,)).tolist() for length in lengths]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory(prefix="stoney-benchmark-") as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=case.batch_size,
            max_steps=steps,
            max_length=None,
            bf16=precision.autocast == "bf16",
            fp16=precision.autocast == "fp16",
            gradient_checkpointing=case.gradient_checkpointing,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
            dataloader_pin_memory=device == "cuda",
        )
        trainer = training.AnswerTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in ids]),
            processing_class=tokenizer(),
            peft_config=lora(),
            callbacks=[Clock()],
        )
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        busy, stop = [], threading.Event()
        sampler = threading.Thread(target=sample_utilisation, args=(busy, stop), daemon=True)
        if device == "cuda":
            sampler.start()
        trainer.train()
        stop.set()
    if case.model == "tiny":
        return {}
    result: dict = {}
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        result = {
            "measured_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "context_bytes": total - free - torch.cuda.memory_reserved(),
            "utilisation": sum(busy) / len(busy) / 100 if busy else None,
        }
    seconds = times[-1] - times[0]
    tokens = sum(lengths[case.batch_size :])
    needed = useful_flops(trainer.model, lengths[case.batch_size :])
    return result | {
        "tokens_a_second": tokens / seconds,
        "seconds_an_update": seconds / (steps - 1),
        "of_matmul": needed / seconds / matmul_rate(device, precision),
    }


def sample_utilisation(found: list[int], stop: threading.Event) -> None:
    """Append the GPU's utilisation, percent, five times a second; nothing where the driver can't be asked."""
    import torch

    while not stop.wait(0.2):
        try:
            found.append(torch.cuda.utilization())
        except (ModuleNotFoundError, RuntimeError):
            return


def useful_flops(model: object, lengths: list[int]) -> float:
    """The arithmetic of training on rows of these lengths, all tokens with a label, by the formula at the top."""
    from stoney_rl.memory import linear_layers

    config = model.config
    adapter = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    linear = sum(layer.in_features * layer.out_features for layer in linear_layers(model)) - adapter
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)  # fmt: skip
    each_token = 4 * linear + 6 * adapter + 4 * config.vocab_size * config.hidden_size
    return each_token * sum(lengths) + 12 * config.num_hidden_layers * width * sum(length**2 for length in lengths)


def matmul_rate(device: str, precision: object) -> float:
    """Floating-point operations a second of a square product in the precision of training."""
    import torch

    size = 8192 if device == "cuda" else 1024
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, None: torch.float32}[precision.autocast]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(12):
        started = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / sorted(times)[len(times) // 2]


def merge(case: Case, device: str, precision: object, steps: int) -> dict:
    """Save a base and an adapter, forget both, and merge them as a run does."""
    import torch
    from peft import get_peft_model

    from stoney_rl import corpus, training

    with tempfile.TemporaryDirectory(prefix="stoney-benchmark-") as folder:
        base, adapter = Path(folder, "base"), Path(folder, "adapter")
        model = random_model(case, "cpu", torch.bfloat16)  # as models are published: fp32 is made of it in memory
        model.save_pretrained(base)
        for directory in (base, adapter):
            tokenizer().save_pretrained(directory)
        model.name_or_path = str(base)
        get_peft_model(model, lora()).save_pretrained(adapter)
        (adapter / corpus.SPLIT_FILE).write_text("{}")
        del model
        training.return_free_pages()
        found, stop = [anonymous_bytes()], threading.Event()
        sampler = threading.Thread(target=sample_memory, args=(found, stop), daemon=True)
        sampler.start()
        training.save_merged(adapter, Path(folder, "merged"), {}, dtype=torch.float32)
        stop.set()
        sampler.join()
    return {"measured_bytes": max(found) - found[0]}


def sample_memory(found: list[int], stop: threading.Event) -> None:
    while not stop.wait(0.005):
        found.append(anonymous_bytes())


def anonymous_bytes() -> int:
    """Resident bytes of this process that are not pages of a mapped file, which the system takes back when it needs them."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError as error:
        raise StoneyError("the merge cases read /proc, which this system does not have") from error
    return int(re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024


if __name__ == "__main__":
    cli.run(main)
