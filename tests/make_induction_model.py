"""Make the model whose heads are known: two layers that learn to copy random sequences, in a few minutes on a CPU.

    OMP_NUM_THREADS=2 PYTHONPATH=. python tests/make_induction_model.py --output_dir tests/induction --overwrite

Each training row is a random sequence of distinct symbols, of random length, written twice; the loss counts where the
symbol can be known, which is from the second symbol of the second copy on. Two layers do that in one way (Elhage et al.
2021, transformer-circuits.pub/2021/framework): a head of layer 0 brings each symbol its predecessor, heads of layer 1
look for the symbol whose predecessor is the present one. In layer 0 only head 0 can write, so it has to be that head.
Writes a complete checkpoint, with the accuracy, the scores of all heads and the fingerprint in stage.json.
"""

import argparse
from pathlib import Path

from stoney_rl import cli
from stoney_rl.checkpoints import describe_stage, fingerprint, staged, write_json

SYMBOLS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
SPECIAL = ("<pad>", "<unk>")
LENGTHS = range(8, 33)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the directory if it exists")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="at its peak; warms up, then falls to 0")
    return parser


def new_tokenizer():
    """One token a symbol, symbols parted by spaces; ids 0 and 1 are special."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *SYMBOLS])}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", unk_token="<unk>")


def new_model(seed: int):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(SYMBOLS), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def cut_off(model) -> None:
    """Zero what heads 1 to 3 of layer 0 write, so that it is known which head brings the predecessor. Without that,
    several heads share the job and hide one another when one is ablated (seen with seeds 0 to 3)."""
    import torch

    with torch.no_grad():
        attention = model.model.layers[0].self_attn
        attention.o_proj.weight[:, attention.head_dim :] = 0


def repeated_rows(n: int, length: int, generator):
    """n rows of ``length`` distinct symbols, written twice: token ids, int64 [n, 2 length]."""
    import torch

    order = torch.rand(n, len(SYMBOLS), generator=generator).argsort(dim=1)[:, :length]
    return (order + len(SPECIAL)).repeat(1, 2)


def train(model, args: argparse.Namespace) -> None:
    import torch
    from transformers import get_cosine_schedule_with_warmup

    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    model.train()
    cut_off(model)
    for step in range(args.steps):
        length = LENGTHS[int(torch.randint(len(LENGTHS), (), generator=generator))]
        ids = repeated_rows(args.batch_size, length, generator)
        logits = model(input_ids=ids).logits[:, length:-1]
        targets = ids[:, length + 1 :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        cut_off(model)
        optimizer.zero_grad()
        if step % 100 == 0 or step == args.steps - 1:
            accuracy = (logits.argmax(-1) == targets).float().mean()
            print(f"step {step:4d}  length {length:2d}  loss {loss:.4f}  accuracy {accuracy:.3f}", flush=True)
    model.eval()


def measure(model, tokenizer, seed: int) -> dict:
    """Accuracy on rows not trained on, and for each head its scores and the accuracy left when it is mean-ablated."""
    from stoney_rl.interp.ablation import ablate, effects, means
    from stoney_rl.interp.attention import copy_accuracy, head_scores, repeated_random_tokens
    from stoney_rl.interp.hooked import hook_model

    hooked = hook_model(model, tokenizer)
    rows, others = (repeated_random_tokens(hooked, 64, 24, seed + offset) for offset in (1_000_000, 2_000_000))
    scores = {name: value.mean(0) for name, value in head_scores(hooked, rows).items()}
    heads = [(layer, head) for layer in range(hooked.n_layers) for head in range(hooked.n_heads)]
    reference = means(hooked, others)
    lost = effects(
        hooked, rows, lambda logits: copy_accuracy(logits, rows), [ablate(reference, heads=[head]) for head in heads]
    ).mean(0)
    return {
        "rows": len(rows),
        "length": 24,
        "accuracy": round(float(copy_accuracy(hooked.run(rows).logits, rows).mean()), 4),
        "heads": {
            f"{layer}.{head}": {
                "previous_token": round(float(scores["previous_token"][layer, head]), 4),
                "induction": round(float(scores["induction"][layer, head]), 4),
                "accuracy_lost_without": round(-float(change), 4),
            }
            for (layer, head), change in zip(heads, lost, strict=True)
        },
    }


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    with staged(args.output_dir, overwrite=args.overwrite) as directory:
        model, tokenizer = new_model(args.seed), new_tokenizer()
        train(model, args)
        found = measure(model, tokenizer, args.seed)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        stage = describe_stage(
            "induction", arguments=arguments, seed=args.seed, fingerprint=fingerprint(model), measured=found
        )
        write_json(directory / "stage.json", stage)
    print(f"accuracy {found['accuracy']} on {found['rows']} rows of 2 x {found['length']} symbols")
    for head, values in found["heads"].items():
        print(f"head {head}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))


if __name__ == "__main__":
    cli.run(main)
