"""A tiny parent for GRPO: a base model that has begun to learn an invented language, and its SFT checkpoint.

    python benchmarks/tiny_planted.py --output_dir tiny
    python train_grpo.py --lora_path tiny/sft_0_merged

The planted language is invented; no word of it belongs to anybody's language. Half a million weights are enough to
learn its rules, so that GRPO can be shown to work, or not to, in minutes on one CPU core.

Writes, below --output_dir:
    planted/      rows and lexicon of the language that SFT and GRPO are about
    base/         a Llama from scratch: all weights trained on rows of other planted languages, which have the same rules
                  and none of the stems
    prepared/     the rows inspected and split by lexeme
    sft_SEED_ckpt/, sft_SEED_merged/    the LoRA adapter and the merged model: the parent for GRPO

Everything but base/ is made by the stage scripts, whose commands are printed. What is there already is kept: after an
interruption the same command continues.
Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: its own folder would hide the standard library's `inspect`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


import argparse
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING

from stoney_rl import checkpoints, cli
from stoney_rl.errors import StoneyError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from stoney_rl.data import Row

ROOT = Path(__file__).resolve().parent.parent
# There is one language and one base; a seed is that of SFT and of what follows it.
LANGUAGE_SEED = 0
NUM_LEXEMES = 800  # enough for 480 test rows about stems never seen
TEST_FRACTION, VALIDATION_FRACTION = 0.2, 0.1
LAYERS, WIDTH, HEADS = 2, 128, 4
# The base is done when it has half learnt the rules: what is always right or always wrong leaves GRPO nothing to choose.
BASE_ACCURACY, MAX_BASE_STEPS = 0.6, 1500
BASE_BATCH, BASE_LEARNING_RATE = 32, 3e-3
EVAL_ROWS, EVAL_STEPS = 256, 10
# One pass over the 1,680 training rows.
SFT = {"max_steps": 105, "batch_size": 16, "learning_rate": 1e-3, "lora_rank": 16, "lora_alpha": 32}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--output_dir", required=True, help="directory for the directories above")
    parser.add_argument("--seed", type=cli.non_negative_int, default=0, help="of SFT: adapter and order of rows")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = cli.parse_args(build_parser(), argv)
    output = make_world(args.output_dir)
    make_parent(output, args.seed)


def make_world(directory: str) -> Path:
    """The language, the base model and the prepared rows below ``directory``, which is returned."""
    output = Path(directory)
    if output.exists() and not output.is_dir():
        raise StoneyError(f"--output_dir: {output} is a file; choose a directory")
    run(
        "-m", "stoney_rl.planted", output_dir=output / "planted", num_lexemes=NUM_LEXEMES, rules_per_lexeme=3,
        templates_per_fact=1, seed=LANGUAGE_SEED,
    )  # fmt: skip
    make_base(output / "base")
    run(
        ROOT / "inspect_hf_dataset.py", dataset=output / "planted" / "rows.jsonl", output_dir=output / "prepared",
        tokenizer=output / "base", test_fraction=TEST_FRACTION, validation_fraction=VALIDATION_FRACTION,
        wandb_mode="disabled",
    )  # fmt: skip
    return output


def make_parent(output: Path, seed: int) -> Path:
    """The SFT parent of ``seed``: its merged directory, which is returned, and its adapter's."""
    merged = output / f"sft_{seed}_merged"
    run(
        ROOT / "train_lora.py", "--no-gradient_checkpointing", "--resume", model=output / "base",
        dataset=output / "prepared", output_dir=output / f"sft_{seed}_ckpt", merged_dir=merged, seed=seed,
        gradient_accumulation_steps=1, dtype="fp32", wandb_mode="disabled", **SFT,
    )  # fmt: skip
    return merged


def run(*words: object, **flags: object) -> None:
    """Print a Python command and run it. Raises ``StoneyError`` if it fails; what was wrong it has said itself."""
    shown, done = start(words, flags)
    if done.returncode:
        raise StoneyError(f"exit code {done.returncode} of: {shown}")


def start(
    words: Sequence[object], flags: Mapping[str, object], **options: object
) -> tuple[str, subprocess.CompletedProcess]:
    """(the command as it is printed, how it ended) of Python with ``words`` and ``--flag value`` for each of ``flags``.

    ``options`` are those of ``subprocess.run``.
    """
    line = [str(token) for token in (*words, *(part for key, value in flags.items() for part in (f"--{key}", value)))]
    shown = f"python {shlex.join(line)}".replace(f"{ROOT}/", "")
    print(f"\n$ {shown}", flush=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return shown, subprocess.run([sys.executable, *line], env=environment, **options)


def make_base(directory: Path) -> None:
    """Train the base model from scratch and save it as a checkpoint directory, unless it is there."""
    made_with = {"seed": LANGUAGE_SEED, "base_accuracy": BASE_ACCURACY}
    stage = checkpoints.read_stage(directory) if directory.is_dir() else None
    if stage and stage.get("arguments") == made_with:
        print(f"\n{directory}: made already")
        return

    from transformers import set_seed

    print(f"\n{directory}: from scratch, until {BASE_ACCURACY:.0%} of the held-out forms are right", flush=True)
    with checkpoints.staged(directory) as work:
        tokenizer = make_tokenizer()
        set_seed(LANGUAGE_SEED)
        model = make_model(tokenizer)
        print(f"{sum(weight.numel() for weight in model.parameters()):,} weights, {len(tokenizer):,} tokens")
        reached = train(model, tokenizer)
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        stage = checkpoints.describe_stage(
            "base",
            arguments=made_with,
            seed=LANGUAGE_SEED,
            training=reached,
            fingerprint=checkpoints.fingerprint(model),
        )
        checkpoints.write_json(work / checkpoints.STAGE_FILE, stage)


def language_rows(seed: int) -> "list[Row]":
    """One question about every form of the planted language of ``seed``, shuffled."""
    from stoney_rl.planted import RULES, PlantedLanguage

    return PlantedLanguage(seed, NUM_LEXEMES).rows(rules_per_lexeme=len(RULES), templates_per_fact=1)


def base_rows() -> "tuple[list[Row], Iterator[Row]]":
    """Held-out rows of another planted language, and rows without end of further ones to train the base on.

    No training row is about a stem of the held-out rows or of the language that SFT and GRPO are about.
    """
    others = (1_000_000 * number + LANGUAGE_SEED for number in count(1))
    held_out = language_rows(next(others))[:EVAL_ROWS]
    taken = {stem for row in (*language_rows(LANGUAGE_SEED), *held_out) for stem in row.lexemes}
    return held_out, (row for other in others for row in language_rows(other) if taken.isdisjoint(row.lexemes))


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """One token for each English word that the questions are made of, and one for each consonant with its vowel.

    Stems and affixes thus have the same tokens in every form, two or three a stem: copying a stem letter by letter takes
    a model of this size far longer to learn, and not with every seed. Byte-level underneath: any text comes back
    unchanged.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from stoney_rl.planted import CONSONANTS, MEANINGS, NASAL_VOWELS, TEMPLATES, VOWELS, all_glosses

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain, with_object, _ = all_glosses()
    blank = dict.fromkeys(("stem", "gloss", "meaning", "verb"), "a")  # a letter, which has its token anyway
    frames = [text.format(**blank) for text in (*TEMPLATES.values(), *MEANINGS.values())]
    texts = [*frames, *plain, *with_object, "user", "assistant"]
    english = [piece for text in texts for piece, _ in byte_level.pre_tokenize_str(text)]

    def as_bytes(text: str) -> str:
        return byte_level.pre_tokenize_str(text)[0][0]

    letters = [as_bytes(letter) for letter in CONSONANTS + NASAL_VOWELS + VOWELS]
    merges = [(letter[:at], letter[at]) for letter in letters for at in range(1, len(letter))]
    merges += [(as_bytes(consonant), as_bytes(vowel)) for consonant in CONSONANTS for vowel in NASAL_VOWELS + VOWELS]
    tokens = dict.fromkeys(
        [PAD, START, END, *sorted(byte_level.alphabet()), *("".join(pair) for pair in merges), *english]
    )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    # ignore_merges: a word of the vocabulary is one token though nothing is merged into it.
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    fast.pre_tokenizer = byte_level
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([PAD, START, END])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: "PreTrainedTokenizerFast") -> "LlamaForCausalLM":
    """A Llama with random fp32 weights over the tokenizer's vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast") -> dict:
    """Train every weight on rows without end until ``BASE_ACCURACY`` is reached; the loss is on the questions too.

    A number of steps would not do: how soon copying a stem is learnt depends on the seed.
    Returns the steps and the accuracy: the share of held-out rows whose answer is right token by token.
    Raises ``StoneyError`` if it is not reached in ``MAX_BASE_STEPS``.
    """
    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from stoney_rl import prompts

    ends = prompts.end_of_turn_ids(tokenizer)
    held_out, training_rows = base_rows()

    def encode(row: "Row") -> dict:
        return prompts.encode_example(tokenizer, row.prompt, row.answer, ends)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[dict]:
            examples = map(encode, training_rows)
            return (example | {"labels": example["input_ids"]} for example in examples)

    class StopWhenReached(TrainerCallback):
        def on_evaluate(self, _args, _state, control, metrics, **_):
            control.should_training_stop |= metrics["eval_accuracy"] >= BASE_ACCURACY

    def accuracy(prediction):  # predictions and label_ids [row, token]; a token is predicted at the place before it
        labels = prediction.label_ids[:, 1:]
        right = (prediction.predictions[:, :-1] == labels) | (labels == -100)
        return {"accuracy": right.all(axis=1).mean().item()}

    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=scratch,
                max_steps=MAX_BASE_STEPS,
                per_device_train_batch_size=BASE_BATCH,
                per_device_eval_batch_size=EVAL_ROWS,
                learning_rate=BASE_LEARNING_RATE,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=50,
                adam_beta2=0.98,
                eval_strategy="steps",
                eval_steps=EVAL_STEPS,
                logging_steps=EVAL_STEPS,
                save_strategy="no",
                report_to="none",
                seed=LANGUAGE_SEED,
                use_cpu=True,
                dataloader_pin_memory=False,
            ),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            train_dataset=Stream(),
            eval_dataset=[encode(row) for row in held_out],
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=lambda logits, _labels: logits.argmax(dim=-1),
            callbacks=[StopWhenReached()],
        )
        trainer.train()
    steps = trainer.state.global_step
    reached = next(log["eval_accuracy"] for log in reversed(trainer.state.log_history) if "eval_accuracy" in log)
    if reached < BASE_ACCURACY:
        raise StoneyError(f"base model: {reached:.2f} of its forms are right after {steps} steps; raise MAX_BASE_STEPS")
    return {"steps": steps, "accuracy": reached, "held_out_rows": len(held_out)}


if __name__ == "__main__":
    cli.run(main)
