"""LoRA fine-tuning of Phi-3-mini on one machine: train_lora.py with a preset, and a look at the memory first.

    python train_lora_local.py
    python train_lora_local.py --load_in_4bit --max_length 256
    python train_lora_local.py --model checkpoints/smollm2-135m --dataset data/planted/rows.jsonl --overwrite

The preset: rank 16, alpha 32, batches of 2 rows with 8 accumulated, 512 tokens a row; the Docker image runs this. Every value
is a flag, and the flags are those of train_lora.py, whose code trains.
Before anything but the model's config is downloaded, it says which device will train, what is free there, what the run will
need, and whether that fits. Where it does not, it ends with what would: --ignore_memory goes on all the same. On a CPU it
says, once the rows are counted, how long the run will take.
Reads and writes what train_lora.py does; by default stoney_lora_phi3_local_ckpt/ and stoney_lora_phi3_local_merged/.
Exit codes: 0 done, 2 bad input or too little memory, 75 stopped by SIGTERM and saved (--resume goes on),
130 interrupted.
"""

import argparse
import os

import train_lora
from stoney_rl import cli, distributed, tracking
from stoney_rl.errors import StoneyError
from stoney_rl.models import find_model, resolve_unpublished

PRESET = {
    "model": "microsoft/Phi-3-mini-4k-instruct",
    "output_dir": "stoney_lora_phi3_local_ckpt",
    "lora_rank": 16,
    "lora_alpha": 32,
    "batch_size": 2,
    "max_length": 512,
}
ACCUMULATION = 8


def build_parser() -> argparse.ArgumentParser:
    parser = train_lora.build_parser(__doc__, accumulation=ACCUMULATION)
    parser.set_defaults(**PRESET)
    parser.add_argument("--ignore_memory", action="store_true", help="train though the memory will not be enough")
    return parser


def main(argv: list[str] | None = None) -> int | None:
    args = cli.parse_stage(build_parser(), argv)
    if not (args.global_batch_size or args.gradient_accumulation_steps):
        args.gradient_accumulation_steps = ACCUMULATION
    train_lora.check_args(args)
    ignore_memory = vars(args).pop("ignore_memory")  # changes nothing in the result
    tracking.load_env()  # a token for the hub
    if distributed.is_to_be_launched(args):
        return distributed.relaunch_on_gpus(__file__, args, argv)
    if "RANK" not in os.environ:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # before the GPU is asked for its memory
    if distributed.is_main():
        check_memory(args, ignore_memory=ignore_memory)
    train_lora.train(args)
    return None


def check_memory(args: argparse.Namespace, *, ignore_memory: bool) -> None:
    """Print what the run needs beside what is free. Raises ``StoneyError`` with the ways out where it is too little."""
    source = find_model(resolve_unpublished(args.model)[0], revision=args.revision)
    from stoney_rl import memory

    config = memory.read_config(source.base or source.name, source.revision)
    world_size = distributed.world_size()
    setup = memory.setup(args, devices=world_size)
    needed = memory.sft_memory(config, setup)
    print(memory.verdict(needed, setup), flush=True)
    if memory.fits(needed.peak) or ignore_memory:
        return
    accumulation = train_lora.accumulation_steps(args, world_size)
    raise StoneyError(
        "\n".join(
            [
                f"{args.model}: will not fit here ({memory.amount(needed.peak)} predicted, "
                f"{memory.amount(memory.free_memory())} free); any of these lines is a way out:",
                *memory.proposals(config, setup, accumulation),
                "--ignore_memory: go on all the same",
            ]
        )
    )


if __name__ == "__main__":
    cli.run(main)
