"""The SFT and GRPO stages in several processes: what torchrun starts, on one machine or on many.

    torchrun --nproc_per_node=4 --nnodes=2 --node_rank=0 --master_addr=IP --master_port=1234 train_distributed.py
    torchrun --standalone --nproc_per_node=4 --max-restarts=3 train_distributed.py --stage sft --global_batch_size 64
    torchrun --standalone --nproc_per_node=4 train_distributed.py --stage grpo --lora_path stoney_lora_merged
    torchrun --nnodes=1:2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=IP:1234 train_distributed.py --resume

Every flag but --stage is the stage's own (train_lora.py, train_grpo.py), and so is everything else: what is read, what
is written, and how a run goes on with --resume. Rank 0 alone writes and tracks; the rows are shared out so that N processes make the same updates as one does with the same
--global_batch_size. GPUs talk through NCCL, CPUs through gloo; --fsdp and --deepspeed shard the model itself.
When torchrun starts failed workers again (--max-restarts; export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for that), they go on
from the last checkpoint without being told.
Exit codes of a worker: 0 done, 2 bad input, 75 stopped by SIGTERM and saved: start again with --resume.
"""

import argparse
import importlib

from stoney_rl import cli
from stoney_rl.errors import StoneyError

STAGES = {"sft": "train_lora", "grpo": "train_grpo"}


def build_parser(stage: str = "sft") -> argparse.ArgumentParser:
    """The parser of ``stage``, with --stage and this script's description."""
    parser = importlib.import_module(STAGES[stage]).build_parser()
    parser.description = __doc__
    parser.add_argument("--stage", choices=STAGES, default="sft", help="sft: train_lora.py, grpo: train_grpo.py")
    return parser


def main(argv: list[str] | None = None) -> int | None:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--stage", default="sft")
    chosen, of_stage = finder.parse_known_args(argv)
    stage = chosen.stage if chosen.stage in STAGES else "sft"  # the whole parser says what is wrong with another
    if cli.parse_args(build_parser(stage), argv).stage != stage:
        raise StoneyError("--config: stage is there; give --stage on the command line, as it decides the other flags")
    return importlib.import_module(STAGES[stage]).main(of_stage)


if __name__ == "__main__":
    cli.run(main)
