"""Finding, checking and loading models: hub ids, local folders, merged checkpoints and adapters."""

import difflib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stoney_rl.checkpoints import locate, read_stage
from stoney_rl.errors import StoneyError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
# Ids that older notes name and that were never published, with the model that stands in for them.
UNPUBLISHED = {"deepseek-ai/DeepSeek-R1-Zero-7B": DEFAULT_MODEL}
# Directories that the pipeline's documents name, and the command that makes each.
MADE_BY = {
    "checkpoints/smollm2-135m": "python prepare_base_model.py",
    "stoney_lora_ckpt": "python train_lora.py",
    "stoney_lora_merged": "python train_lora.py",
    "stoney_lora_phi3_local_ckpt": "python train_lora_local.py",
    "stoney_lora_phi3_local_merged": "python train_lora_local.py",
    "stoney_reward_model": "python train_reward_model.py",
    "stoney_rl_grpo": "python train_grpo.py --lora_path stoney_lora_merged",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_HUB_TIMEOUT = 10  # seconds for the first answer of the hub


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from. ``kind``: 'model' (a folder with full weights), 'adapter' (a LoRA folder), or 'hub'."""

    kind: str
    name: str
    base: str | None = None  # of an adapter: the model it goes on
    revision: str | None = None  # of a hub id: the model's own, or an adapter's base

    @property
    def tokenizer_name(self) -> str:
        return self.name


def resolve_unpublished(name: str) -> tuple[str, str | None]:
    """The id to use for ``name``, and a line for the user where that is another model than the one asked for."""
    if name in UNPUBLISHED:
        return UNPUBLISHED[name], f"{name} was never published; using {UNPUBLISHED[name]}"
    return name, None


def find_model(name: str, *, revision: str | None = None) -> ModelSource:
    """Classify ``name`` and check that it is complete, without loading weights.

    Raises ``StoneyError`` for a folder that lacks files (named), for a path that does not exist (with what is near
    and which command makes it), for a ``revision`` of a folder, and for a hub id that is missing, gated or out of reach
    and not cached.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise StoneyError(f"revision {revision!r} was given, but {name} is local; leave the revision out")
        return _find_local(path)
    if path.exists():
        if path.suffix == ".gguf":
            raise StoneyError(
                f"{name}: a .gguf file; make a checkpoint of it first: python prepare_base_model.py --source {name}"
            )
        raise StoneyError(f"{name}: a file; expected a checkpoint directory or a hub id such as owner/name")
    if _HUB_ID.fullmatch(name) and str(path) not in MADE_BY and not path.parent.is_dir():
        return _find_on_hub(name, revision)
    raise StoneyError(_missing(path))


def _missing(path: Path) -> str:
    message = f"{path}: no such checkpoint directory"
    if path.parent.is_dir():
        folders = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
        close = difflib.get_close_matches(path.name, folders, n=1)
        if close:
            message += f" (did you mean {path.parent / close[0]}?)"
    if path.with_name(path.name + ".partial").is_dir():
        message += f"; {path}.partial holds an unfinished run: finish it with --resume"
    command = MADE_BY.get(str(path)) or MADE_BY.get(path.name)
    return message + (f"; make it with: {command}" if command else "")


def _find_local(path: Path) -> ModelSource:
    names = {entry.name for entry in path.iterdir()}
    if (read_stage(path) or {}).get("stage") == "reward":
        raise StoneyError(f"{path}: a reward model, which scores answers and writes none; give a language model")
    if "adapter_config.json" in names:
        if not names & {"adapter_model.safetensors", "adapter_model.bin"}:
            raise StoneyError(f"{path}: adapter_config.json without adapter_model.safetensors; make the adapter again")
        try:
            config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
            base = config["base_model_name_or_path"]
        except (ValueError, KeyError, OSError) as error:
            raise StoneyError(f"{path}/adapter_config.json: names no base model ({error!r})") from error
        if not base:
            raise StoneyError(
                f"{path}/adapter_config.json: base_model_name_or_path is empty; name the base model there"
            )
        return ModelSource("adapter", str(path), base=locate(base, path), revision=config.get("revision"))
    missing = [] if "config.json" in names else ["config.json"]
    if not names.intersection(_WEIGHTS) and not any(re.fullmatch(r"model-\d+-of-\d+\.safetensors", n) for n in names):
        missing.append("model.safetensors")
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model"}:
        missing.append("tokenizer.json")
    if missing:
        hint = MADE_BY.get(path.name)
        raise StoneyError(
            f"{path}: not a complete checkpoint directory, {', '.join(missing)} missing"
            + (f"; make it with: {hint}" if hint else "")
        )
    _check_shards(path)
    return ModelSource("model", str(path))


def _check_shards(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise StoneyError(f"{index}: not a readable shard index ({error!r}); get the model again") from error
        absent = sorted(shard for shard in shards if not (path / shard).exists())
        if absent:
            raise StoneyError(f"{path}: {len(absent)} of {len(shards)} weight shards missing, such as {absent[0]}")


def _find_on_hub(name: str, revision: str | None) -> ModelSource:
    import httpx2
    from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

    def cached() -> bool:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)

    source = ModelSource("hub", name, revision=revision)
    if constants.HF_HUB_OFFLINE:
        if cached():
            return source
        raise StoneyError(
            f"{name}: HF_HUB_OFFLINE is set and the model is not in the local cache; unset it or download"
        )
    try:
        info = HfApi().model_info(name, revision=revision, timeout=_HUB_TIMEOUT)
    except errors.GatedRepoError as error:
        raise StoneyError(
            f"{name}: gated; accept its terms on its hub page, then put a token into HF_TOKEN (see .env.example)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise StoneyError(f"{name}: the hub has no revision {revision!r} of it") from error
    except errors.RepositoryNotFoundError as error:
        raise StoneyError(
            f"{name}: no such folder here and no such public model on the hub; check the spelling, "
            "or set HF_TOKEN if it is private"
        ) from error
    except (errors.HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        if cached():
            # Without this every later request would retry for half a minute before it looks into the cache.
            constants.HF_HUB_OFFLINE = True
            print(f"{name}: the hub does not answer ({type(error).__name__}); using the copy in the local cache")
            return source
        raise StoneyError(
            f"{name}: no such folder here, and the hub does not answer ({type(error).__name__}); "
            "check the path, or the network, or make a local base with: python prepare_base_model.py"
        ) from error
    if info.gated and not cached():
        try:
            HfApi().auth_check(name)
        except errors.HfHubHTTPError as error:
            raise StoneyError(
                f"{name}: gated; accept its terms on its hub page, then put a token into HF_TOKEN (see .env.example)"
            ) from error
    return source


@dataclass(frozen=True)
class Precision:
    """``weights``: dtype of the frozen base. ``autocast``: 'bf16', 'fp16' or None, the dtype of the matrix products."""

    weights: "torch.dtype"
    autocast: str | None

    def __str__(self) -> str:
        return f"weights {str(self.weights).removeprefix('torch.')}, matrix products {self.autocast or 'fp32'}"


def choose_precision(dtype: str) -> Precision:
    """Precision for training. ``dtype``: 'auto', 'bf16', 'fp16' or 'fp32'.

    'auto' goes by the hardware: bf16 on a GPU or CPU with bf16 instructions, fp16 on older GPUs, else fp32. A GPU
    holds the frozen weights in that dtype too (half the memory); a CPU keeps them in fp32, which costs no speed.
    The adapter is always trained in fp32. Raises ``StoneyError`` where the device cannot compute in ``dtype``.
    """
    import torch

    if torch.cuda.is_available():
        if dtype == "auto":
            dtype = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        weights = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
        return Precision(weights, None if dtype == "fp32" else dtype)
    if dtype == "fp16":
        raise StoneyError("--dtype fp16: needs a GPU; on a CPU use auto, bf16 or fp32")
    if dtype == "auto":
        capability = torch.backends.cpu.get_cpu_capability()
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        dtype = "bf16" if native and capability.startswith("AVX512") else "fp32"
    return Precision(torch.float32, "bf16" if dtype == "bf16" else None)


def inference_dtype(dtype: str) -> "torch.dtype":
    """dtype for generation and logits. 'auto': bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU."""
    import torch

    if dtype == "auto":
        if not torch.cuda.is_available():
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]


def device() -> "torch.device":
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(source: ModelSource) -> "PreTrainedTokenizerBase":
    """The source's tokenizer as saved; ``prompts.prepare_tokenizer`` completes it. An adapter's own comes first."""
    from transformers import AutoTokenizer

    name = source.name
    if source.kind == "adapter" and not (Path(name) / "tokenizer_config.json").exists():
        name = source.base
    try:
        return AutoTokenizer.from_pretrained(name, revision=source.revision)
    except (OSError, ValueError, KeyError) as error:
        raise StoneyError(f"{name}: its tokenizer cannot be loaded: {_first_line(error)}") from error


def load_model(
    source: ModelSource,
    dtype: "torch.dtype",
    *,
    quantize_4bit: bool = False,
    attn_implementation: str | None = None,
) -> "PreTrainedModel":
    """The model in evaluation mode on the CPU (4-bit: on the GPU). An adapter is loaded on its base, unmerged.

    Raises ``StoneyError`` if the weights cannot be read or are those of another architecture.
    """
    from transformers import AutoModelForCausalLM

    name = source.base if source.kind == "adapter" else source.name
    options: dict = {"dtype": dtype, "revision": source.revision}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    if quantize_4bit:
        options["quantization_config"] = _four_bit(dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    except Exception as error:  # safetensors, transformers and torch each raise their own on a damaged file
        raise StoneyError(f"{name}: the model cannot be loaded: {_first_line(error)}") from error
    if source.kind == "adapter":
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, source.name)
        except Exception as error:  # as above
            raise StoneyError(f"{source.name}: does not fit its base {name}: {_first_line(error)}") from error
    return model.eval()


def check_4bit() -> None:
    """Raise ``StoneyError`` unless 4-bit loading can work here."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise StoneyError(
            "--load_in_4bit: bitsandbytes is not installed; pip install bitsandbytes, or leave the flag out"
        )


def _four_bit(dtype: "torch.dtype") -> object:
    from transformers import BitsAndBytesConfig

    # NF4 with double quantisation: the settings of the QLoRA paper, https://arxiv.org/abs/2305.14314
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
