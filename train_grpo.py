"""GRPO: sample groups of answers, pay them by a reward that was attacked first, and follow what paid more.

    python train_grpo.py --lora_path stoney_lora_merged --batch_size 64 --group_size 16
    python train_grpo.py --lora_path stoney_lora_merged --dataset prepared --kl_penalty 0.04 --num_episodes 16000
    python train_grpo.py --lora_path stoney_lora_merged --reward_model stoney_reward_model --reward composite=0.5
    python train_grpo.py --config my_run.yaml --resume

Reads: --lora_path (a merged model or an adapter of train_lora.py), and its rows, split as its training split them: the
training rows are the prompts, the validation rows are measured, the test rows are left to evaluate_model.py. The lexicon
is the prepared directory's, or --lexicon, or made of the rows. The reward is probed before anything is trained
(probe_rewards.py shows the whole table); a reward that can be gamed is refused.
Writes: --output_dir (default stoney_rl_grpo/: the model, merged in fp32) and --adapter_dir (default
stoney_rl_grpo_ckpt/: the adapter, rollouts.jsonl with every completion and what each term gave it, metrics.jsonl), with
report.json, report.txt and report.png. With --trace_every, also <adapter_dir>/trace.jsonl and trace/: what attention
heads, lens and neurons did while it trained. While it runs, checkpoints are in <adapter_dir>.partial/; after a kill,
--resume continues from the last one.
Exit codes: 0 done, 2 bad input or a reward that can be gamed, 75 stopped by SIGTERM and saved (--resume goes on),
130 interrupted.
"""

import argparse
import gc
import math
import os
import random
import time
from pathlib import Path

from stoney_rl import artifacts, checkpoints, cli, distributed, runs, tracking
from stoney_rl.errors import StoneyError
from stoney_rl.models import find_model, resolve_unpublished
from stoney_rl.rewards.flags import add_reward_flags, check_reward_flags

DEFAULT_DATASET = "HarleyCooper/StoneyNakoda45k"
# Arguments that change nothing in the result: they may differ between a run and its --resume.
NOT_IDENTITY = {"resume", "overwrite", "config", "save_steps", "save_total_limit", "logging_steps", "table_steps",
                "trace_every", "multi_gpu", "num_gpus", "max_restarts", "save_on_each_node", "output_dir", "adapter_dir", "preflight_prompts", "probe_samples",
                "allow_broken_reward"}  # fmt: skip
REPORT_FILES = ("report.json", "report.txt", "report.png")
LOSSES = ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    paths = parser.add_argument_group("input and output")
    paths.add_argument("--lora_path", default="stoney_lora_merged", help="merged model or adapter to start from")
    paths.add_argument("--dataset", help="hub id, file or folder of rows; default: what the model was trained on")
    paths.add_argument("--dataset_revision", help="hub revision of the dataset")
    paths.add_argument("--output_dir", default="stoney_rl_grpo", help="the trained model's directory, merged")
    paths.add_argument("--adapter_dir", help="default: the output directory's name with _ckpt behind it")
    cli.add_resume_flags(paths)

    reward = parser.add_argument_group("reward")
    add_reward_flags(reward)
    reward.add_argument(
        "--probe_samples", type=cli.positive_int, default=50, help="rows on which the reward is attacked"
    )
    reward.add_argument("--allow_broken_reward", action="store_true", help="train on a reward that can be gamed")

    sampling = parser.add_argument_group("groups and sampling")
    sampling.add_argument("--batch_size", type=cli.positive_int, default=64,
                          help="completions a step, over all devices and accumulation; a multiple of --group_size")  # fmt: skip
    sampling.add_argument("--group_size", type=cli.positive_int, default=16, help="completions of one prompt")
    sampling.add_argument("--micro_batch_size", type=cli.positive_int,
                          help="completions a device learns from at a time; default: 16 at most, whole groups")  # fmt: skip
    sampling.add_argument("--num_episodes", type=cli.positive_int, default=16_000,
                          help="completions sampled in all: an episode is one; updates are this / --batch_size")  # fmt: skip
    sampling.add_argument("--max_steps", type=cli.positive_int, help="updates; overrides --num_episodes")
    sampling.add_argument(
        "--max_prompt_length", type=cli.positive_int, default=512, help="tokens; longer ones are left out"
    )
    sampling.add_argument("--max_completion_length", type=cli.positive_int, default=128, help="tokens a completion")
    sampling.add_argument("--temperature", type=cli.positive_float, default=1.0, help="of sampling")
    sampling.add_argument("--top_p", type=cli.fraction, default=1.0, help="nucleus sampling; 1: off")
    sampling.add_argument("--top_k", type=cli.non_negative_int, default=0, help="0: off")
    sampling.add_argument("--repetition_penalty", type=cli.positive_float, default=1.0, help="1: off")
    sampling.add_argument("--use_vllm", action="store_true", help="sample with vLLM (needs a GPU and vllm installed)")
    sampling.add_argument("--vllm_mode", choices=["colocate", "server"], default="colocate", help="see TRL's docs")
    sampling.add_argument(
        "--vllm_gpu_memory_utilization", type=cli.fraction, default=0.3, help="share for colocated vLLM"
    )

    loss = parser.add_argument_group("objective")
    loss.add_argument("--kl_penalty", type=float, default=0.04,
                      help="weight of the KL to the start (arXiv 2402.03300: 0.04); 0: no reference model")  # fmt: skip
    loss.add_argument("--loss_type", choices=LOSSES, default="dapo", help="how token losses are averaged")
    loss.add_argument("--scale_rewards", choices=["group", "batch", "none"], default="group",
                      help="divide advantages by this standard deviation (none: arXiv 2503.20783)")  # fmt: skip
    loss.add_argument("--multi_objective_aggregation", choices=["sum_then_normalize", "normalize_then_sum"],
                      default="sum_then_normalize", help="normalize_then_sum: each --reward by itself (GDPO)")  # fmt: skip
    loss.add_argument("--importance_sampling_level", choices=["token", "sequence"], default="token",
                      help="sequence: GSPO (arXiv 2507.18071)")  # fmt: skip
    loss.add_argument("--num_iterations", type=cli.positive_int, default=1, help="updates on each step's completions")
    loss.add_argument(
        "--epsilon", type=cli.positive_float, default=0.2, help="clipping of the probability ratio below 1"
    )
    loss.add_argument("--epsilon_high", type=cli.positive_float, default=0.28, help="and above (arXiv 2503.14476)")
    loss.add_argument("--mask_truncated_completions", action="store_true", help="learn nothing from answers cut off")

    cli.add_lora_flags(parser.add_argument_group("adapter"), all_linear="every linear layer but the LM head")
    optim = parser.add_argument_group("optimisation")
    cli.add_optimisation_flags(optim, learning_rate=2e-5, lr_scheduler_type="constant_with_warmup", warmup_ratio=0.03)
    optim.add_argument("--seed", type=cli.non_negative_int, default=0, help="adapter, order of prompts, sampling")
    cli.add_split_flags(parser.add_argument_group("data"), "the model's training's own")

    compute = parser.add_argument_group("hardware")
    cli.add_hardware_flags(compute)
    cli.add_parallel_flags(compute)

    steps = parser.add_argument_group("preflight, logging, evaluation and saving")
    steps.add_argument("--preflight_prompts", type=cli.non_negative_int, default=8,
                       help="prompts sampled before training, to say what will happen; 0: none")  # fmt: skip
    steps.add_argument(
        "--table_steps", type=cli.positive_int, help="updates between tables of completions; default: a tenth"
    )
    steps.add_argument("--eval_prompts", type=cli.positive_int, default=64, help="held-out prompts that are measured")
    cli.add_saving_flags(steps, held_out="rewards")
    cli.add_trace_flag(steps)
    cli.add_tracking_flags(
        parser,
        {"lora_path": artifacts.ANY_MODEL, "dataset": artifacts.ROWS, "reward_model": artifacts.REWARD_MODELS},
    )
    return parser


def check_args(args: argparse.Namespace, devices: int) -> tuple:
    """Complete ``args``; the rewards, the composite's weights and the plan of a step.

    Raises ``StoneyError`` with every problem that can be seen without loading anything.
    """
    from stoney_rl.preflight import plan_batch

    problems = cli.Problems()
    rewards, weights = check_reward_flags(args, problems)
    args.adapter_dir = args.adapter_dir or args.output_dir.rstrip("/") + "_ckpt"
    outputs = {"--output_dir": args.output_dir, "--adapter_dir": args.adapter_dir}
    inputs = {"--lora_path": args.lora_path, "--dataset": args.dataset, "--lexicon": args.lexicon,
              "--reward_model": args.reward_model}  # fmt: skip
    runs.check_outputs(outputs, inputs, problems)
    plan = None
    try:
        plan = plan_batch(args.batch_size, args.group_size, devices, args.micro_batch_size)
    except StoneyError as error:
        problems.add(str(error))
    if not 0 <= args.kl_penalty < math.inf:
        problems.add(f"--kl_penalty {args.kl_penalty}: expected a number of at least 0")
    if not args.top_p:
        problems.add("--top_p 0: leaves no token to draw; 1 switches it off")
    if args.temperature < 0.01:
        problems.add(f"--temperature {args.temperature}: below 0.01 nothing is drawn, the likeliest token is taken")
    distributed.check_flags(args, problems)
    if args.fsdp or args.deepspeed not in (None, "zero2"):
        problems.add("--fsdp and --deepspeed: sampling needs the whole model on every device; GRPO takes zero2 alone")
    for flag in ("num_iterations", "logging_steps"):
        if args.save_steps and args.save_steps % getattr(args, flag):
            problems.add(f"--save_steps {args.save_steps}: must be a multiple of --{flag} {getattr(args, flag)}, or a "
                         "resumed run would sample in another place, or average over other updates")  # fmt: skip
    if args.validation_fraction == 0:
        problems.add("--validation_fraction: must be above 0; a run without held-out prompts proves nothing")
    if args.use_vllm:
        from importlib.util import find_spec

        if find_spec("vllm") is None:
            problems.add("--use_vllm: vllm is not installed; pip install vllm on a machine with a GPU, or leave it out")
    problems.raise_if_any()
    return rewards, weights, plan


def main(argv: list[str] | None = None) -> int | None:
    args = cli.parse_stage(build_parser(), argv)
    devices = distributed.world_size() if "RANK" in os.environ else (args.num_gpus or 1 if args.multi_gpu else 1)
    rewards, weights, plan = check_args(args, devices)
    if distributed.is_to_be_launched(args):
        return distributed.relaunch_on_gpus(__file__, args, argv)
    tracking.load_env()
    distributed.connect(args)
    say = print if distributed.is_main() else (lambda *_: None)

    # 1. What is there: the policy's start, its rows, an earlier run.
    model_name, notice = resolve_unpublished(args.lora_path)
    if notice:
        say(notice)
    start = find_model(model_name)
    for line in checkpoints.lineage(Path(start.name)):
        say(f"  {line}")

    from stoney_rl import corpus, data
    from stoney_rl.rewards.composite import Composite, Task
    from stoney_rl.rewards.plugins import Plugin, scorer
    from stoney_rl.rewards.similarity import load_similarity

    rows, _ = corpus.as_trained(
        start.name,
        dataset=args.dataset,
        default_dataset=DEFAULT_DATASET,
        revision=args.dataset_revision,
        **{key: getattr(args, key) for key in corpus.SPLIT_DEFAULTS},
    )
    vars(args).update(rows.split_arguments)
    say(data.describe(rows.rowset))
    knowledge = learn(args, rows)
    output, adapter_dir = Path(args.output_dir), Path(args.adapter_dir)
    identity = runs.identify(
        vars(args),
        NOT_IDENTITY,
        model=start.name,
        weights=[checkpoints.weights_id(name) for name in (start.name, start.base, args.reward_model) if name],
        data_sha256=rows.rowset.sha256,
        lexicon_sha256=knowledge.sha256,
    )
    partial = runs.begin([adapter_dir, output], identity, resume=args.resume, overwrite=args.overwrite)
    if partial is None:
        return None
    last_checkpoint = runs.last_checkpoint(partial)

    # 2. The reward, attacked before anyone is paid by it.
    composite = Composite(knowledge, weights, load_similarity(args.encoder, args.comet_model))
    if args.reward_model:
        from stoney_rl.rewards.reward_model import load_reward_model

        learned = load_reward_model(args.reward_model, batch_size=plan.per_device)
        rewards.append(Plugin("reward_model", args.reward_model_weight, learned.reward_model))
    score = scorer(rewards, composite)
    meaning = args.encoder or args.comet_model
    named = " + ".join(f"{plugin.weight:g} {plugin.name}" for plugin in rewards)
    say(f"reward: {named}; {len(knowledge.forms):,} forms known, {len(knowledge.segments):,} with a segmentation; "
        f"R_sem {'by ' + meaning if meaning else 'off (no --encoder, no --comet_model)'}")  # fmt: skip
    trained = (corpus.training_record(start.name) or {}).get("training_rows", ())
    held_out_rows = [row for row in rows.split.validation if corpus.row_hash(row) not in set(trained)]
    held_out_rows = random.Random(args.seed).sample(held_out_rows, min(args.eval_prompts, len(held_out_rows)))
    tasks = [Task.of(row) for row in rows.split.train]
    problems = distributed.on_main(lambda: attack(score, tasks, knowledge, args))

    # 3. Model, tokenizer, prompts.
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import GenerationConfig, set_seed
    from trl import GRPOConfig

    from stoney_rl import grpo, memory, models, policy, preflight, prompts, records, training

    precision = models.choose_precision(args.dtype)
    base = training.merged(start, output.with_name(output.name + "_parent"))
    tokenizer = models.load_tokenizer(base)
    for change in prompts.prepare_tokenizer(tokenizer):
        say(change)
    ends = sorted(prompts.end_of_turn_ids(tokenizer))
    encoded = {}

    def encode(prompt: list[dict]) -> list[int]:
        key = repr(prompt)
        if key not in encoded:
            encoded[key] = prompts.encode_prompt(tokenizer, prompt)
        return encoded[key]

    def decode(ids: list[int]) -> str:
        kept = ids[:-1] if ids and ids[-1] in ends else ids
        return tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    usable = [
        number for number, task in enumerate(tasks) if len(encode(task.columns["prompts"])) <= args.max_prompt_length
    ]
    too_long = len(tasks) - len(usable)
    gold = score([tasks[number] for number in usable], [tasks[number].reference for number in usable])
    usable = [number for number, line in zip(usable, gold, strict=True) if line["total"] is not None]
    say(f"prompts: {len(usable)} to train on; {too_long} longer than {args.max_prompt_length} tokens and "
        f"{len(tasks) - too_long - len(usable)} whose answers nothing can score are left out; "
        f"{len(held_out_rows)} held-out ones are measured")  # fmt: skip
    if len(usable) < plan.prompts:
        raise StoneyError(
            f"--batch_size {args.batch_size}: {plan.prompts} prompts a step, but only {len(usable)} to train on"
        )
    if not held_out_rows:
        raise StoneyError("--dataset: no held-out row that the model was not trained on; a run without proves nothing")
    updates = args.max_steps or math.ceil(args.num_episodes / args.batch_size) * args.num_iterations
    eval_steps = max(1, updates // 5) if args.eval_steps is None else args.eval_steps
    unit = math.lcm(args.num_iterations, args.logging_steps)
    save_steps = args.save_steps or math.ceil(max(1, updates // 10) / unit) * unit
    say(f"step: {args.batch_size} completions = {plan.prompts} prompts x {args.group_size}; {plan.per_device} at a time x "
        f"{devices} device(s) x {plan.accumulation} accumulated; {updates} updates")  # fmt: skip
    say(f"device: {models.device()}, {precision}")
    try:
        config = GRPOConfig(
            output_dir=str(partial),
            per_device_train_batch_size=plan.per_device,
            gradient_accumulation_steps=plan.accumulation,
            steps_per_generation=plan.accumulation,
            num_generations=args.group_size,
            max_completion_length=args.max_completion_length,
            max_steps=updates,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            repetition_penalty=args.repetition_penalty,
            use_vllm=args.use_vllm,
            vllm_mode=args.vllm_mode,
            vllm_gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            beta=args.kl_penalty,
            loss_type=args.loss_type,
            scale_rewards=args.scale_rewards,
            multi_objective_aggregation=args.multi_objective_aggregation,
            importance_sampling_level=args.importance_sampling_level,
            num_iterations=args.num_iterations,
            epsilon=args.epsilon,
            epsilon_high=args.epsilon_high,
            mask_truncated_completions=args.mask_truncated_completions,
            reward_weights=[plugin.weight for plugin in rewards],
            learning_rate=args.learning_rate,
            lr_scheduler_type=args.lr_scheduler_type,
            warmup_steps=math.ceil(args.warmup_ratio * updates),
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm,
            optim=args.optim,
            bf16=precision.autocast == "bf16",
            fp16=precision.autocast == "fp16",
            gradient_checkpointing=args.gradient_checkpointing,
            logging_steps=args.logging_steps,
            save_strategy="steps",
            save_steps=save_steps,
            save_total_limit=args.save_total_limit,
            seed=args.seed,
            data_seed=args.seed,
            remove_unused_columns=False,  # id and task
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            **distributed.trainer_options(args, partial),
        )
    except ValueError as error:  # such as an unknown --lr_scheduler_type or --optim
        raise StoneyError(f"training arguments: {error}") from error
    set_seed(args.seed)
    model = models.load_model(base, precision.weights, attn_implementation=args.attn_implementation)
    parent_fingerprint = checkpoints.check_fingerprint(Path(base.name), model)
    distributed.check_same(model=parent_fingerprint["sha256"], dataset=rows.rowset.sha256)
    # What the model's own says of sampling or penalties would be filled in where TRL leaves a field unset.
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    tracker = runs.start_tracking(
        "train_grpo", args, partial, model=start.name, data=rows.describe(), also=[args.reward_model]
    )

    # 4. The trainer, and what will happen.
    trainer = grpo.GroupTrainer(
        model=model,
        reward_funcs=grpo.reward_functions(rewards, composite, tasks, decode),
        args=config,
        train_dataset=Dataset.from_list(
            [{"prompt": tasks[at].columns["prompts"], "id": tasks[at].id, "task": at} for at in usable]
        ),
        processing_class=tokenizer,
        encode=encode,
        decode=decode,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            target_modules=training.target_modules(model, args.lora_target_modules),
            revision=base.revision,
        ),
        callbacks=[tracker.callback()],
    )
    training.quiet_progress(trainer)
    held_out = policy.HeldOut(
        held_out_rows,
        [Task.of(row) for row in held_out_rows],
        score,
        lambda: grpo.greedy_answers(
            trainer,
            [encode(row.prompt) for row in held_out_rows],
            max_new_tokens=args.max_completion_length,
            batch_size=plan.per_device,
        ),
        partial / policy.HELD_OUT_FILE,
    )
    trainer.add_callback(grpo.HeldOutRewards(held_out, eval_steps, tracker.log))
    trainer.add_callback(
        grpo.Record(
            trainer,
            partial,
            table_steps=args.table_steps or max(1, updates // 10),
            on_table=lambda columns, lines: tracker.table("completions", columns, lines),
        )
    )
    if args.trace_every:
        from stoney_rl.interp import tracer

        examples = [prompts.encode_example(tokenizer, row.prompt, row.answer, set(ends)) for row in held_out_rows]
        tracer.watch(trainer, examples, partial, every=args.trace_every, seed=args.seed, tracker=tracker)
    longest = max(len(encode(tasks[at].columns["prompts"])) for at in usable)
    needed = memory.expected_memory(
        trainer.model,
        plan,
        group_size=args.group_size,
        prompt_tokens=longest,
        completion_tokens=args.max_completion_length,
        shares_prefixes=trainer.shares_prefixes,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    say(f"memory: {needed}; {memory.free_memory() / 2**20:,.0f} MiB are free")
    if needed.peak > memory.free_memory():
        say("  that may not fit: try a smaller --micro_batch_size or --max_completion_length")
    if args.preflight_prompts and not last_checkpoint and distributed.is_main():
        chosen = random.Random(args.seed).sample(usable, min(args.preflight_prompts, len(usable)))
        sampled = preflight.sample_groups(
            trainer,
            [tasks[at].columns["prompts"] for at in chosen],
            [tasks[at] for at in chosen],
            score,
            args.group_size,
        )
        say(f"sampled before training: {sampled}")
        for text, earned in sampled.examples[:2]:
            shown = "".join(c if c.isprintable() else " " for c in text)
            say(f"  {'unscored' if earned is None else format(earned, '6.3f')}  {' '.join(shown.split())[:100]}")
        if sampled.silence_pays:
            say(f"  saying nothing would earn more, {sampled.silence:.3f}: what is learned first may be silence (more SFT first, or "
                "a smaller weight of P_hall)")  # fmt: skip
        if sampled.without_spread == sampled.groups:
            say("  no group can teach anything: the policy will not move while that is so (another reward, a higher "
                "--temperature, a larger --group_size, or more SFT first)")  # fmt: skip

    # 5. Train.
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=str(last_checkpoint) if last_checkpoint else None)
    seconds = time.monotonic() - started

    # 6. Save the adapter and the merged model, prove that both are the policy, and report what became of it.
    trainer.save_model(str(partial))
    gathered = training.gathered_weights(trainer)
    if trainer.is_world_process_zero():
        trainer.save_state()
        training.check_saved_adapter(trainer.model, partial, gathered)
        comparison = held_out.compare(seed=args.seed)
        metrics = records.read(partial / grpo.METRICS_FILE)
        moved = training.adapter_moved(trainer.model)
        stage = checkpoints.describe_stage(
            "grpo",
            arguments=vars(args),
            seed=args.seed,
            parent={"path": start.name, "fingerprint": parent_fingerprint["sha256"]},
            base_model=base.name,
            data=rows.describe(),
            precision=str(precision),
            training={
                "steps": trainer.state.global_step,
                "seconds": round(seconds, 1),
                "prompts_shared": trainer.shares_prefixes,
                "sharing_difference": trainer.sharing_difference,
            },
            reward={"functions": named, "weights": weights, "problems": problems},
            wandb=tracker.record,
            identity=identity,
        )
        text = f"{output.name}: {named}, seed {args.seed}, from {start.name}\n{policy.as_text(comparison)}"
        if not moved:
            text = text.removesuffix("\n" + policy.CLEAN) + "\n✗ the policy did not move: no update changed a weight"
            if all(line.get("zero_spread", 1) == 1 for line in metrics):
                text += "; in no step did the completions of any prompt earn different rewards"
        text += "".join(f"\n✗ trained on a reward that can be gamed: {problem}" for problem in problems)
        checkpoints.write_json(
            partial / "report.json",
            comparison | {"moved": moved, "reward": stage["reward"], "training": stage["training"]},
        )
        (partial / "report.txt").write_text(text + "\n", encoding="utf-8")
        policy.plot(
            metrics,
            held_out.measurements,
            partial / "report.png",
            title=f"{output.name}: {named}, {updates} updates, seed {args.seed}",
        )
        checkpoints.write_json(partial / corpus.SPLIT_FILE, rows.training_record())
        data.write_quarantine(partial / "quarantine.jsonl", rows.rowset.quarantine)
        del trainer, model, gathered
        gc.collect()
        difference = training.save_merged(
            partial, output, stage, dtype=precision.weights, also=[partial / name for name in REPORT_FILES]
        )
        checkpoints.publish(partial, adapter_dir)
        print(f"\n{text}\n\n{output}: merged in fp32; its logits equal the policy's within {difference:.1g}")
        tracker.image("report", output / "report.png")
        kept_here = ("checkpoint-*", "quarantine.jsonl", "trace")
        tracker.artifact(adapter_dir.name, "adapter", str(adapter_dir), exclude=kept_here)
        tracker.artifact(output.name, "model", str(output))
        tracker.finish()
    runs.end(partial)
    return None


def learn(args: argparse.Namespace, rows: object) -> object:
    """What is known of the language: --lexicon's, the prepared directory's, or what the rows themselves say."""
    from stoney_rl import prepared
    from stoney_rl.lexicon import build_lexicon
    from stoney_rl.rewards.knowledge import Knowledge, load_knowledge

    if args.lexicon:
        return load_knowledge(args.lexicon)
    if prepared.is_prepared(rows.rowset.source):
        return load_knowledge(rows.rowset.source)
    return Knowledge.of(build_lexicon(rows.rowset.rows))


def attack(score: object, tasks: list, knowledge: object, args: argparse.Namespace) -> list[str]:
    """The problems of the reward, on the run's own rows. Raises ``StoneyError`` if there are any, unless told to go on."""
    from stoney_rl.rewards import probe

    report = probe.probe(score, tasks, knowledge, num_samples=args.probe_samples, seed=args.seed)
    if not report.problems:
        print(f"probe: no attack beats an honest answer, no null policy earns one's reward ({report.tasks} rows)")
        return []
    listed = [f"the reward can be gamed: {problem}" for problem in report.problems]
    if not args.allow_broken_reward:
        raise StoneyError("\n".join([*listed, "see the whole table with probe_rewards.py and the same reward flags; "
                                     "--allow_broken_reward trains on it all the same"]))  # fmt: skip
    print(*(f"✗ {line}" for line in listed), "--allow_broken_reward: training on it all the same", sep="\n")
    return report.problems


if __name__ == "__main__":
    cli.run(main)
