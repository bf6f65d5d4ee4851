"""Tiny models for tests: built from a config in milliseconds, random weights, a byte-level tokenizer, no network."""

import shutil
from pathlib import Path

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma2", "gemma3")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tokenizer(chat_template: str | None = CHATML, *, bos: bool = False, pad: str | None = "<|im_end|>"):
    """256 byte tokens and three special ones. As in SmolLM2, padding is the token that ends a turn, by default."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(special)
    if bos:
        fast.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", vocabulary["<|im_start|>"])]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token=pad,
    )
    wrapped.chat_template = chat_template
    return wrapped


def model(architecture: str = "llama", *, seed: int = 0, layers: int = 2, width: int = 32):
    """A random fp32 causal language model of ``architecture`` over the tokenizer's 259 tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    config = AutoConfig.for_model(
        name,
        vocab_size=259,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def checkpoint(directory: Path, architecture: str = "llama", **options) -> Path:
    """A complete checkpoint directory with such a model and tokenizer."""
    directory = Path(directory)
    model(architecture, **options).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def checkpoints(folder: Path) -> Path:
    """``folder`` with 'tuned' and 'base', two models of one family, and 'twin', a copy of 'tuned'."""
    for name, seed in (("tuned", 1), ("base", 0)):
        checkpoint(folder / name, seed=seed)
    shutil.copytree(folder / "tuned", folder / "twin")
    return folder


def with_adapter(architecture: str = "llama", **options):
    """Such a model with a LoRA adapter that changes it a lot: its B matrices are random, not zero."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(model(architecture), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return adapted.eval()


def lively(architecture: str):
    """Hooked, with random weights large enough for attention to choose and for heads and MLPs to matter."""
    import torch

    from stoney_rl.interp.hooked import hook_model

    loud = model(architecture)
    with torch.no_grad():
        for parameter in loud.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return hook_model(loud, tokenizer(), architecture)
