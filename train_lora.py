"""LoRA supervised fine-tuning: teach a model to answer in and about the language.

    python train_lora.py --model checkpoints/smollm2-135m --dataset data/planted/rows.jsonl --output_dir demo_ckpt
    python train_lora.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --batch_size 4 --multi_gpu --num_gpus 4
    python train_lora.py --config my_run.yaml --resume

Reads: a base model (hub id or folder) and rows (hub id, file or folder; see README for the schemas). Splits the rows by
lexeme and trains on the training split alone, with the loss on the answer and the token that ends it.
Writes: --output_dir (default stoney_lora_ckpt/: the adapter) and --merged_dir (default stoney_lora_merged/: the model
with the adapter merged in fp32), both complete checkpoint directories, proven equal by their logits; --no-merge leaves
the second out. A run of `wandb agent` writes to sweeps/<sweep>/<run>_ckpt/ unless told otherwise. While it runs,
its checkpoints are in <output_dir>.partial/; after a kill, --resume continues from the last one. With --trace_every,
<output_dir>/trace.jsonl and trace/: what attention heads, lens and neurons did while it trained.
Exit codes: 0 done, 2 bad input, 75 stopped by SIGTERM and saved (--resume goes on),
130 interrupted.
"""

import argparse
import gc
import math
import time
from pathlib import Path

from stoney_rl import artifacts, checkpoints, cli, distributed, runs, tracking
from stoney_rl.errors import StoneyError
from stoney_rl.models import DEFAULT_MODEL, check_4bit, find_model, resolve_unpublished

DEFAULT_DATASET = "HarleyCooper/StoneyNakoda45k"
# Arguments that change nothing in the result: they may differ between a run and its --resume.
NOT_IDENTITY = {
    "resume",
    "overwrite",
    "config",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "trace_every",
    "multi_gpu",
    "num_gpus",
    "max_restarts",
    "save_on_each_node",
}


def build_parser(doc: str = __doc__, *, accumulation: int = 4) -> argparse.ArgumentParser:
    """``accumulation``: what the help names as the default (see ``accumulation_steps``)."""
    parser = cli.make_parser(doc)
    paths = parser.add_argument_group("input and output")
    cli.add_model_flags(paths, DEFAULT_MODEL)
    paths.add_argument("--dataset", default=DEFAULT_DATASET, help="hub id, file or folder of rows")
    paths.add_argument("--dataset_revision", help="hub revision of the dataset")
    paths.add_argument("--output_dir", default=runs.default_output("stoney_lora_ckpt"), help="the adapter's directory")
    paths.add_argument("--merged_dir", help="default: the output directory's name with _ckpt replaced by _merged")
    paths.add_argument(
        "--merge",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="save the merged model too; other stages can also start from the adapter",
    )
    cli.add_resume_flags(paths)

    data = parser.add_argument_group("data")
    cli.add_split_flags(data, "the prepared dataset's own")
    data.add_argument("--max_length", type=cli.positive_int, default=512, help="tokens a row; longer rows are cut")
    data.add_argument("--max_eval_rows", type=cli.positive_int, default=200, help="rows for the held-out loss")

    batch = parser.add_argument_group("batch and length of training")
    batch.add_argument(
        "--batch_size", "--per_device_train_batch_size", dest="batch_size", type=cli.positive_int, default=4,
        help="rows a device and step before accumulation",
    )  # fmt: skip
    batch.add_argument(
        "--gradient_accumulation_steps",
        type=cli.positive_int,
        help=f"default: {accumulation}, or from --global_batch_size",
    )
    batch.add_argument(
        "--global_batch_size", type=cli.positive_int, help="rows an update over all devices; sets accumulation"
    )
    batch.add_argument("--per_device_eval_batch_size", type=cli.positive_int, help="default: --batch_size")
    cli.add_epoch_flags(batch, epochs=3.0, over="the training split")

    lora = parser.add_argument_group("adapter")
    cli.add_lora_flags(lora, all_linear="every linear layer but the LM head, fused projections too")
    lora.add_argument("--lora_dropout", type=cli.fraction, default=0.0, help="dropout on the adapter's input")
    lora.add_argument("--use_rslora", action="store_true", help="scale by alpha / sqrt(rank) (arXiv 2312.03732)")
    lora.add_argument("--use_dora", action="store_true", help="weight-decomposed update (arXiv 2402.09353)")

    optim = parser.add_argument_group("optimisation")
    cli.add_optimisation_flags(optim, learning_rate=2e-4, lr_scheduler_type="cosine", warmup_ratio=0.03)
    optim.add_argument("--neftune_noise_alpha", type=cli.positive_float, help="embedding noise (arXiv 2310.05914)")
    optim.add_argument("--seed", type=cli.non_negative_int, default=0, help="adapter initialisation and order of rows")

    compute = parser.add_argument_group("hardware")
    cli.add_hardware_flags(compute)
    compute.add_argument("--merged_dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
                         help="dtype in which the merged model is saved; auto: as the weights were loaded")  # fmt: skip
    compute.add_argument("--group_by_length", action=argparse.BooleanOptionalAction, default=True,
                         help="batches of rows of like length: less padding")  # fmt: skip
    compute.add_argument(
        "--load_in_4bit", action="store_true", help="QLoRA: NF4 base weights (needs bitsandbytes and a GPU)"
    )
    cli.add_parallel_flags(compute)

    steps = parser.add_argument_group("logging, evaluation and saving")
    cli.add_saving_flags(steps, held_out="losses")
    steps.add_argument("--early_stopping_patience", type=cli.positive_int,
                       help="stop after this many held-out losses without a new best, and keep the best")  # fmt: skip
    cli.add_trace_flag(steps)
    cli.add_tracking_flags(parser, {"model": artifacts.WHOLE_MODELS, "dataset": artifacts.ROWS})
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Complete ``args`` and raise ``StoneyError`` with every problem that can be seen without loading anything."""
    problems = cli.Problems()
    if args.merged_dir and not args.merge:
        problems.add("--merged_dir: only with --merge")
    if args.merged_dir is None and args.merge:
        args.merged_dir = args.output_dir.rstrip("/").removesuffix("_ckpt") + "_merged"
    outputs = {"--output_dir": args.output_dir} | ({"--merged_dir": args.merged_dir} if args.merge else {})
    runs.check_outputs(outputs, {"--model": args.model, "--dataset": args.dataset}, problems)
    if args.global_batch_size and args.gradient_accumulation_steps:
        problems.add("--global_batch_size and --gradient_accumulation_steps: one sets the other; give only one")
    elif not args.multi_gpu:
        try:
            accumulation_steps(args, distributed.world_size())
        except StoneyError as error:
            problems.add(str(error))
    distributed.check_flags(args, problems)
    if args.early_stopping_patience and args.eval_steps == 0:
        problems.add("--early_stopping_patience: needs the held-out loss; leave out --eval_steps 0")
    if args.test_fraction == 0 or args.validation_fraction == 0:
        problems.add(
            "--test_fraction and --validation_fraction: must be above 0; a run without held-out rows proves nothing"
        )
    if args.load_in_4bit:
        try:
            check_4bit()
        except StoneyError as error:
            problems.add(str(error))
    problems.raise_if_any()


def main(argv: list[str] | None = None) -> int | None:
    args = cli.parse_stage(build_parser(), argv)
    check_args(args)
    if distributed.is_to_be_launched(args):
        return distributed.relaunch_on_gpus(__file__, args, argv)
    train(args)
    return None


def train(args: argparse.Namespace) -> None:
    """The stage, with arguments that ``check_args`` has completed."""
    tracking.load_env()
    distributed.connect(args)
    world_size = distributed.world_size()
    say = print if distributed.is_main() else (lambda *_: None)

    # 1. What is there: the model, the rows, an earlier run.
    model_name, notice = resolve_unpublished(args.model)
    if notice:
        say(notice)
    source = find_model(model_name, revision=args.revision)
    if source.kind == "adapter":
        raise StoneyError(f"{args.model}: an adapter; train on its merged directory instead")

    from stoney_rl import corpus, data

    rows = corpus.prepare(
        args.dataset,
        revision=args.dataset_revision,
        split_seed=args.split_seed,
        test_fraction=args.test_fraction,
        validation_fraction=args.validation_fraction,
    )
    vars(args).update(rows.split_arguments)
    say(data.describe(rows.rowset))
    output, merged = Path(args.output_dir), Path(args.merged_dir) if args.merge else None
    accumulation = accumulation_steps(args, world_size)
    rows_an_update = args.batch_size * world_size * accumulation
    identity = runs.identify(
        vars(args), NOT_IDENTITY, model=source.name, data_sha256=rows.rowset.sha256, rows_an_update=rows_an_update
    )
    partial = runs.begin(
        [output, *([merged] if merged else [])], identity, resume=args.resume, overwrite=args.overwrite
    )
    if partial is None:
        return
    last_checkpoint = runs.last_checkpoint(partial)

    # 2. Model, tokenizer, tokens.
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import EarlyStoppingCallback, set_seed
    from trl import SFTConfig

    from stoney_rl import models, preflight, prompts, training

    precision = models.choose_precision(args.dtype)
    tokenizer = models.load_tokenizer(source)
    for change in prompts.prepare_tokenizer(tokenizer):
        say(change)
    ends = prompts.end_of_turn_ids(tokenizer)
    train_set, train_cuts = encode(rows.split.train, tokenizer, ends, args.max_length)
    held_out, _ = encode(rows.split.validation[: args.max_eval_rows], tokenizer, ends, args.max_length)
    if not train_set:
        raise StoneyError(f"--max_length {args.max_length}: no row has an answer within it; raise it")
    steps_an_epoch = math.ceil(len(train_set) / rows_an_update)
    total_steps = args.max_steps or math.ceil(steps_an_epoch * args.num_train_epochs)
    eval_steps = max(1, total_steps // 5) if args.eval_steps is None else args.eval_steps
    save_steps = args.save_steps or max(1, total_steps // 10)
    if args.early_stopping_patience:
        save_steps = eval_steps  # the best model can only be kept where it was saved
    say(f"rows: {len(train_set)} to train on, {len(held_out)} for the held-out loss; {train_cuts}")
    say(
        f"batch: {args.batch_size} a device x {world_size} device(s) x {accumulation} accumulated = "
        f"{rows_an_update} rows an update; {total_steps} updates"
    )
    say(
        f"device: {models.device()}, {precision}, gradient checkpointing {'on' if args.gradient_checkpointing else 'off'}"
    )
    if distributed.is_main():
        for line in preflight.foresee_sft(
            args, source, train_set, updates=total_steps, accumulation=accumulation, devices=world_size
        ):
            say(line)
    say("one example, trained tokens between ⟦ and ⟧:\n" + prompts.show_example(tokenizer, train_set[0]) + "\n")

    try:
        config = SFTConfig(
            output_dir=str(partial),
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.per_device_eval_batch_size or args.batch_size,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=args.num_train_epochs,
            max_steps=args.max_steps or -1,
            max_length=None,  # cut above, where it is counted
            learning_rate=args.learning_rate,
            lr_scheduler_type=args.lr_scheduler_type,
            warmup_steps=args.warmup_ratio,  # below 1: a share of all steps
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm,
            optim=args.optim,
            neftune_noise_alpha=args.neftune_noise_alpha,
            bf16=precision.autocast == "bf16",
            fp16=precision.autocast == "fp16",
            gradient_checkpointing=args.gradient_checkpointing,
            train_sampling_strategy="group_by_length" if args.group_by_length else "random",
            logging_steps=args.logging_steps,
            eval_strategy="steps" if held_out and eval_steps else "no",
            eval_steps=eval_steps or None,
            save_strategy="steps",
            save_steps=save_steps,
            save_total_limit=args.save_total_limit,
            restore_callback_states_from_checkpoint=True,  # the patience that is left
            load_best_model_at_end=bool(args.early_stopping_patience),
            metric_for_best_model="eval_loss" if args.early_stopping_patience else None,
            greater_is_better=False if args.early_stopping_patience else None,
            seed=args.seed,
            data_seed=args.seed,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            **distributed.trainer_options(args, partial),
        )
    except ValueError as error:  # such as an unknown --lr_scheduler_type or --optim
        raise StoneyError(f"training arguments: {error}") from error
    set_seed(args.seed)
    model = models.load_model(
        source, precision.weights, quantize_4bit=args.load_in_4bit, attn_implementation=args.attn_implementation
    )
    parent_fingerprint = checkpoints.check_fingerprint(Path(source.name), model)
    distributed.check_same(model=parent_fingerprint["sha256"], dataset=rows.rowset.sha256)
    tracker = runs.start_tracking("train_lora", args, partial, model=source.name, data=rows.describe())

    # 3. Train.
    trainer = training.AnswerTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(train_set),
        eval_dataset=Dataset.from_list(held_out) if held_out else None,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=training.target_modules(model, args.lora_target_modules),
            use_rslora=args.use_rslora,
            use_dora=args.use_dora,
            revision=source.revision,
        ),
        callbacks=[tracker.callback()]
        + ([EarlyStoppingCallback(args.early_stopping_patience)] if args.early_stopping_patience else []),
    )
    training.quiet_progress(trainer)
    if args.trace_every:
        from stoney_rl.interp import tracer

        tracer.watch(trainer, held_out, partial, every=args.trace_every, seed=args.seed, tracker=tracker)
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=str(last_checkpoint) if last_checkpoint else None)
    seconds = time.monotonic() - started
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    final_loss = (min(losses) if args.early_stopping_patience else losses[-1]) if losses else None

    # 4. Save the adapter and, unless told otherwise, the merged model, and prove that they are what was trained.
    trainer.save_model(str(partial))  # every process: a sharded model is gathered
    gathered = training.gathered_weights(trainer)
    if trainer.is_world_process_zero():
        trainer.save_state()
        training.check_saved_adapter(trainer.model, partial, gathered)
        stage = checkpoints.describe_stage(
            "sft",
            arguments=vars(args),
            seed=args.seed,
            parent={"path": source.name, "fingerprint": parent_fingerprint["sha256"]},
            base_model=source.name,
            data=rows.describe(),
            precision=str(precision),
            training={"steps": trainer.state.global_step, "eval_loss": final_loss, "seconds": round(seconds, 1)},
            wandb=tracker.record,
            identity=identity,
        )
        checkpoints.write_json(partial / corpus.SPLIT_FILE, rows.training_record())
        data.write_quarantine(partial / "quarantine.jsonl", rows.rowset.quarantine)
        del trainer, model, gathered
        gc.collect()  # the patched forward holds the model in a cycle; the merge loads the base again, in fp32
        if merged:
            difference = training.save_merged(partial, merged, stage, dtype=merged_dtype(args, precision))
            print(f"{merged}: merged in fp32; its logits equal the adapter's within {difference:.1g}")
        else:
            training.record_adapter(partial, stage)
        checkpoints.publish(partial, output)
        print(
            f"{output}: adapter, {stage['training']['steps']} updates"
            + (f", held-out loss {final_loss:.3f}" if final_loss is not None else "")
        )
        if final_loss is not None:  # a sweep judges a run by its summary: here that of the model which is kept
            tracker.summary({"eval/loss": final_loss})
        tracker.artifact(output.name, "adapter", str(output), exclude=("checkpoint-*", "quarantine.jsonl", "trace"))
        if merged:
            tracker.artifact(merged.name, "model", str(merged))
        tracker.finish()
    runs.end(partial)


def accumulation_steps(args: argparse.Namespace, world_size: int) -> int:
    """Batches accumulated before an update. Raises ``StoneyError`` if --global_batch_size can't be met exactly."""
    if not args.global_batch_size:
        return args.gradient_accumulation_steps or 4
    at_once = args.batch_size * world_size
    if args.global_batch_size % at_once:
        below = args.global_batch_size // at_once * at_once
        raise StoneyError(
            f"--global_batch_size {args.global_batch_size}: not a multiple of {args.batch_size} rows x {world_size} "
            f"device(s); nearest: {' or '.join(str(n) for n in (below, below + at_once) if n)}"
        )
    return args.global_batch_size // at_once


def encode(rows: list, tokenizer: object, ends: set[int], max_length: int) -> tuple[list[dict], str]:
    """Token ids and labels of ``rows``, cut to ``max_length`` tokens, and a sentence that counts the cuts.

    A row whose answer would be cut away whole is left out.
    """
    from tqdm import tqdm

    from stoney_rl import prompts

    examples, cut, dropped = [], 0, 0
    for row in tqdm(rows, desc="tokens", unit="row", leave=False):
        example = prompts.encode_example(tokenizer, row.prompt, row.answer, ends)
        cut += len(example["input_ids"]) > max_length
        example = {key: values[:max_length] for key, values in example.items()}
        if any(label != -100 for label in example["labels"]):
            examples.append(example)
        else:
            dropped += 1
    return examples, f"{cut} longer than {max_length} tokens and cut, {dropped} of them left out"


def merged_dtype(args: argparse.Namespace, precision: object) -> object:
    import torch

    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return named.get(args.merged_dtype, precision.weights)


if __name__ == "__main__":
    cli.run(main)
