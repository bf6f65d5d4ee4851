"""Train a reward model on preference pairs: one number for how good an answer is.

    python train_reward_model.py --model stoney_lora_merged --dataset prepared --bootstrap
    python train_reward_model.py --model stoney_lora_merged --dataset judgements.jsonl --lexicon prepared
    python train_reward_model.py --config my_run.yaml --resume

Reads: a language model (hub id or folder) and --dataset: preference pairs (prompt, chosen, rejected on each line; see
stoney_rl/rewards/preferences.py), or with --bootstrap rows or a prepared directory, of which pairs are made: the gold
answer or an honest rewording against a corruption of it. Test pairs are about lexemes, or without a lexicon prompts, that
were never trained on.
Writes --output_dir: a complete reward-model directory (LoRA and the score head merged in fp32), with results.json,
results.png and the scores of the test pairs. The reward is in [-1, 1]. While it runs, its checkpoints are in
<output_dir>.partial/; after a kill, --resume continues from the last one.
Exit codes: 0 done, 2 bad input, 75 stopped by SIGTERM and saved (--resume goes on),
130 interrupted.
"""

import argparse
import gc
import json
import math
import os
import random
import shutil
import statistics
import time
from pathlib import Path

from stoney_rl import artifacts, checkpoints, cli, distributed, prepared, runs, tracking
from stoney_rl.errors import StoneyError
from stoney_rl.models import DEFAULT_MODEL, find_model, resolve_unpublished

# Arguments that change nothing in the result: they may differ between a run and its --resume.
NOT_IDENTITY = {"resume", "overwrite", "config", "save_steps", "save_total_limit", "logging_steps"}
PREDICTIONS_FILE, RESULTS_FILE, PLOT_FILE = "predictions.jsonl", "results.json", "results.png"
SCALE_PAIRS = 256  # training pairs whose scores give the reward's mean and scale


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    paths = parser.add_argument_group("input and output")
    cli.add_model_flags(paths, DEFAULT_MODEL)
    paths.add_argument(
        "--dataset", help="file or folder of preference pairs; with --bootstrap rows or a prepared directory"
    )
    paths.add_argument("--dataset_revision", help="hub revision of the dataset, with --bootstrap")
    paths.add_argument("--output_dir", default="stoney_reward_model", help="the reward model's directory")
    cli.add_resume_flags(paths)

    data = parser.add_argument_group("pairs")
    data.add_argument("--bootstrap", action="store_true", help="make pairs from gold answers and corruptions of them")
    data.add_argument("--pairs_per_row", type=cli.positive_int, default=4, help="with --bootstrap: corruptions a row")
    data.add_argument("--lexicon", help="lexicon file or prepared directory; default: the prepared directory's own; "
                      "with it pairs of a file are split by lexeme")  # fmt: skip
    cli.add_split_flags(data, "the prepared dataset's own")
    data.add_argument("--max_length", type=cli.positive_int, default=512, help="tokens an answer with its prompt; pairs "
                      "with a longer one are left out, and such an answer earns -1 later")  # fmt: skip
    data.add_argument("--max_eval_pairs", type=cli.positive_int, default=200, help="pairs for the held-out loss")

    batch = parser.add_argument_group("batch and length of training")
    batch.add_argument("--batch_size", type=cli.positive_int, default=8, help="pairs a step before accumulation")
    batch.add_argument("--gradient_accumulation_steps", type=cli.positive_int, help="default: 1")
    cli.add_epoch_flags(batch, epochs=1.0, over="the training pairs")

    lora = parser.add_argument_group("adapter")
    cli.add_lora_flags(lora, all_linear="every linear layer; the score head is trained whole")

    optim = parser.add_argument_group("optimisation")
    cli.add_optimisation_flags(optim, learning_rate=2e-4, lr_scheduler_type="cosine", warmup_ratio=0.03)
    optim.add_argument("--center_rewards_coefficient", type=cli.fraction, default=0.01,
                       help="pull of the two scores' sum towards 0 (arXiv 2312.09244, eq. 2)")  # fmt: skip
    optim.add_argument(
        "--seed", type=cli.non_negative_int, default=0, help="pairs made, head, adapter, order, bootstrap"
    )

    compute = parser.add_argument_group("hardware")
    cli.add_hardware_flags(compute)

    steps = parser.add_argument_group("logging, evaluation and saving")
    cli.add_saving_flags(steps, held_out="losses")
    steps.add_argument("--resamples", type=cli.positive_int, default=2000, help="bootstrap resamples of the test pairs")
    cli.add_tracking_flags(parser, {"model": artifacts.WHOLE_MODELS, "dataset": artifacts.ROWS})
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raise ``StoneyError`` with every problem that can be seen without loading anything."""
    problems = cli.Problems()
    inputs = {"--model": args.model, "--dataset": args.dataset, "--lexicon": args.lexicon}
    runs.check_outputs({"--output_dir": args.output_dir}, inputs, problems)
    if not args.dataset:
        problems.add("--dataset: give preference pairs, or rows or a prepared directory with --bootstrap")
    elif prepared.is_prepared(args.dataset):
        if not args.bootstrap:
            problems.add(f"--dataset: {args.dataset} is a prepared directory of rows; --bootstrap makes pairs of them")
    elif args.bootstrap and not args.lexicon:
        problems.add(
            f"--bootstrap: {args.dataset} has no lexicon: give one with --lexicon, or make both with: "
            f"python inspect_hf_dataset.py --dataset {args.dataset} --output_dir prepared"
        )
    if args.dataset_revision and not args.bootstrap:
        problems.add("--dataset_revision: only with --bootstrap; files of pairs are local")
    if args.test_fraction == 0 or args.validation_fraction == 0:
        problems.add(
            "--test_fraction and --validation_fraction: must be above 0; a run without held-out pairs proves nothing"
        )
    if args.resamples < 100:
        problems.add(f"--resamples {args.resamples}: expected at least 100; 1,000 to 2,000 are usual")
    if distributed.world_size() > 1:
        problems.add("this stage runs as one process on one GPU; start it without torchrun")
    problems.raise_if_any()


def main(argv: list[str] | None = None) -> None:
    args = cli.parse_stage(build_parser(), argv)
    check_args(args)
    tracking.load_env()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # TRL refuses DataParallel

    # 1. What is there: the model, the pairs, an earlier run.
    from stoney_rl.rewards import reward_model

    model_name, notice = resolve_unpublished(args.model)
    if notice:
        print(notice)
    if reward_model.is_reward_model(model_name):
        raise StoneyError(f"{args.model}: a reward model already; start from a language model")
    source = find_model(model_name, revision=args.revision)
    if source.kind == "adapter":
        raise StoneyError(f"{args.model}: an adapter; train on its merged directory instead")
    pairs = read_pairs(args)
    vars(args).update(pairs.corpus.split_arguments)
    output = Path(args.output_dir)
    identity = runs.identify(vars(args), NOT_IDENTITY, model=source.name, pairs_sha256=pairs.sha256)
    partial = runs.begin([output], identity, resume=args.resume, overwrite=args.overwrite)
    if partial is None:
        return
    last_checkpoint = runs.last_checkpoint(partial)

    # 2. Model, tokenizer, tokens.
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import set_seed
    from trl import RewardConfig

    from stoney_rl import corpus, data, models, prompts, training

    precision = models.choose_precision(args.dtype)
    tokenizer = models.load_tokenizer(source)
    for change in prompts.prepare_tokenizer(tokenizer):
        print(change)
    reader = reward_model.RewardModel(None, tokenizer, max_length=args.max_length)
    train_set, held_out, test_set = (encode(part, reader) for part in (pairs.train, pairs.validation, pairs.test))
    for name, part, tokens in (("train", pairs.train, train_set), ("test", pairs.test, test_set)):
        print(
            f"{name}: {len(tokens)} pairs; {len(part) - len(tokens)} longer than {args.max_length} tokens and left out"
        )
        if not tokens:
            raise StoneyError(f"--max_length {args.max_length}: no pair of the {name} split is within it; raise it")
    held_out = draw(held_out, args.max_eval_pairs, args.seed)
    accumulation = args.gradient_accumulation_steps or 1
    total_steps = args.max_steps or math.ceil(
        math.ceil(len(train_set) / (args.batch_size * accumulation)) * args.num_train_epochs
    )
    eval_steps = max(1, total_steps // 5) if args.eval_steps is None else args.eval_steps
    print(f"batch: {args.batch_size} x {accumulation} accumulated pairs an update; {total_steps} updates")
    print(f"device: {models.device()}, {precision}")
    try:
        config = RewardConfig(
            output_dir=str(partial),
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=args.num_train_epochs,
            max_steps=args.max_steps or -1,
            max_length=None,  # left out above, where it is counted
            learning_rate=args.learning_rate,
            lr_scheduler_type=args.lr_scheduler_type,
            warmup_steps=args.warmup_ratio,  # below 1: a share of all steps
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm,
            optim=args.optim,
            center_rewards_coefficient=args.center_rewards_coefficient or None,
            bf16=precision.autocast == "bf16",
            fp16=precision.autocast == "fp16",
            gradient_checkpointing=args.gradient_checkpointing,
            logging_steps=args.logging_steps,
            eval_strategy="steps" if held_out and eval_steps else "no",
            eval_steps=eval_steps or None,
            save_strategy="steps",
            save_steps=args.save_steps or max(1, total_steps // 10),
            save_total_limit=args.save_total_limit,
            seed=args.seed,
            data_seed=args.seed,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
        )
    except ValueError as error:  # such as an unknown --lr_scheduler_type or --optim
        raise StoneyError(f"training arguments: {error}") from error
    parent_fingerprint = checkpoints.check_fingerprint(Path(source.name), models.load_model(source, precision.weights))
    gc.collect()  # the language model; its weights are loaded again under another head
    set_seed(args.seed)
    model = reward_model.load_scorer(source, precision.weights, attn_implementation=args.attn_implementation)
    model.score.float()
    tracker = runs.start_tracking("train_reward_model", args, partial, model=source.name, data=pairs.describe())

    # 3. Train.
    trainer = reward_model.pair_trainer()(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(train_set),
        eval_dataset=Dataset.from_list(held_out) if held_out and eval_steps else None,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="SEQ_CLS",  # trains and saves the score head too
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            target_modules=training.target_modules(model, args.lora_target_modules),
        ),
        callbacks=[tracker.callback()],
    )
    training.quiet_progress(trainer)
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=str(last_checkpoint) if last_checkpoint else None)
    seconds = time.monotonic() - started
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    steps = trainer.state.global_step

    # 4. Save, prove that it is what was trained, and measure what was saved.
    trainer.save_state()
    trainer.save_model(str(partial))
    training.check_saved_adapter(trainer.model, partial)
    del trainer, model
    gc.collect()
    with checkpoints.staged(output, overwrite=True) as work:
        adapter = models.ModelSource("adapter", str(partial), base=source.name, revision=source.revision)
        merged, fingerprint, difference = reward_model.save_merged(adapter, work, tokenizer)
        scorer = reward_model.RewardModel(
            merged.to(models.device()), tokenizer, max_length=args.max_length, batch_size=args.batch_size
        )
        sample = draw(train_set, SCALE_PAIRS, args.seed)
        sides = ("chosen_ids", "rejected_ids")
        spread = scorer.scores([one[side] for one in sample for side in sides], progress="scale")
        scorer.mean, scorer.scale = statistics.fmean(spread), statistics.pstdev(spread)
        if not scorer.scale > 0:
            raise StoneyError(f"{output}: every answer scores {scorer.mean:.3g}: nothing was learned; train longer")
        chosen, rejected = (scorer.scores([one[side] for one in test_set], progress="test") for side in sides)
        tested = [pairs.test[one["index"]] for one in test_set]
        groups = measure(tested, chosen, rejected, pairs.seen, args)
        headline = next(iter(groups))
        results = {"headline": headline, "groups": groups, "pairs_sha256": pairs.sha256}
        checkpoints.write_json(
            work / checkpoints.STAGE_FILE,
            checkpoints.describe_stage(
                reward_model.STAGE,
                arguments=vars(args),
                seed=args.seed,
                parent={"path": source.name, "fingerprint": parent_fingerprint["sha256"]},
                base_model=source.name,
                data=pairs.describe(),
                precision=str(precision),
                training={"steps": steps, "eval_loss": losses[-1] if losses else None, "seconds": round(seconds, 1)},
                reward={
                    "mean": scorer.mean,
                    "scale": scorer.scale,
                    "pairs": len(sample),
                    "max_length": args.max_length,
                    "formula": "tanh((score - mean) / scale)",
                },
                accuracy=groups[headline]["accuracy"],
                kind="reward model",
                fingerprint=fingerprint,
                wandb=tracker.record,
                identity=identity,
            ),
        )
        checkpoints.write_json(
            work / RESULTS_FILE,
            checkpoints.describe_stage("reward evaluation", arguments=vars(args), seed=args.seed, **results),
        )
        with (work / PREDICTIONS_FILE).open("w", encoding="utf-8") as lines:
            for pair, high, low in zip(tested, chosen, rejected, strict=True):
                scored = {"seen": pairs.seen.get(pair.id), "score_chosen": high, "score_rejected": low}
                lines.write(json.dumps(pair.to_dict() | scored, ensure_ascii=False) + "\n")
        shown = [
            at for at, pair in enumerate(tested) if headline == "all" or pairs.seen[pair.id] == (headline == "seen")
        ]
        reward_model.plot(
            groups[headline],
            *([scorer.squash(side[at]) for at in shown] for side in (chosen, rejected)),
            work / PLOT_FILE,
            title=f"{output.name}: {reward_model.GROUP_NAMES[headline]}, n = {len(shown)} pairs",
        )
        checkpoints.write_json(work / corpus.SPLIT_FILE, pairs.corpus.training_record())
        data.write_quarantine(work / "quarantine.jsonl", pairs.corpus.rowset.quarantine)
        shutil.copy(partial / "trainer_state.json", work)
    shutil.rmtree(partial)
    print("\n" + reward_model.summary(groups, headline) + "\n")
    print(f"{output}: reward model, {steps} updates; its scores equal the adapter's within {difference:.1g}")
    tracker.log({f"{group}/accuracy": found["accuracy"]["value"] for group, found in groups.items()})
    tracker.log({f"{headline}/ece": groups[headline]["calibration"]["ece"]})
    columns = ["kind", "n", "accuracy", "low", "high"]
    kinds = groups[headline]["kinds"].items()
    tracker.table("kinds", columns, [[kind, e["n"], e["value"], e["low"], e["high"]] for kind, e in kinds])
    tracker.image("results", output / PLOT_FILE)
    tracker.artifact(output.name, "reward_model", str(output), exclude=(PREDICTIONS_FILE, "quarantine.jsonl"))
    tracker.finish()


def read_pairs(args: argparse.Namespace) -> "preferences.PairSet":  # noqa: F821
    """The pairs of --dataset, split; with --bootstrap made from its rows. Says what was read."""
    from stoney_rl import corpus, data
    from stoney_rl.rewards import preferences
    from stoney_rl.rewards.knowledge import load_knowledge

    asked = {key: getattr(args, key) for key in corpus.SPLIT_DEFAULTS}
    if args.bootstrap:
        rows = corpus.prepare(args.dataset, revision=args.dataset_revision, **asked)
        print(data.describe(rows.rowset))
        knowledge = load_knowledge(args.lexicon or args.dataset)
        pairs = preferences.bootstrap(rows, knowledge, pairs_per_row=args.pairs_per_row, seed=args.seed)
    else:
        file = preferences.load_pairs(args.dataset)
        print(preferences.describe(file))
        knowledge = load_knowledge(args.lexicon) if args.lexicon else None
        given = {key: value for key, value in asked.items() if value is not None}
        pairs = preferences.split_pairs(file, knowledge, **given)
    by = "lexeme" if pairs.by_lexeme else "prompt"
    print(f"pairs, split by {by}: {len(pairs.train)} to train on, {len(pairs.validation)} for the held-out loss, "
          f"{len(pairs.test)} to test on", *pairs.notes, sep="\n")  # fmt: skip
    return pairs


def encode(pairs: list, reader: object) -> list[dict]:
    """``index`` and token ids of both sides of the pairs that are within the reader's ``max_length``."""
    from tqdm import tqdm

    encoded = []
    for index, pair in enumerate(tqdm(pairs, desc="tokens", unit="pair", leave=False)):
        sides = [reader.encode(pair.row.prompt, answer) for answer in (pair.chosen, pair.rejected)]
        if max(map(len, sides)) <= reader.max_length:
            encoded.append({"index": index, "chosen_ids": sides[0], "rejected_ids": sides[1]})
    return encoded


def draw(items: list, number: int, seed: int) -> list:
    """``number`` of the items at random, in their order; all of them if there are no more."""
    if len(items) <= number:
        return items
    return [items[at] for at in sorted(random.Random(seed).sample(range(len(items)), number))]


def measure(tested: list, chosen: list, rejected: list, seen: dict, args: argparse.Namespace) -> dict[str, dict]:
    """``reward_model.measure`` of the unseen, the seen and all test pairs; of all only where no lexemes are known."""
    from stoney_rl.rewards import reward_model

    members = {name: [at for at, pair in enumerate(tested) if seen.get(pair.id) is flag]
               for name, flag in (("unseen", False), ("seen", True))}  # fmt: skip
    members["all"] = list(range(len(tested)))
    return {
        name: reward_model.measure(
            *([side[at] for at in rows] for side in (tested, chosen, rejected)),
            seed=args.seed,
            resamples=args.resamples,
        )
        for name, rows in members.items()
        if rows
    }


if __name__ == "__main__":
    cli.run(main)
