"""What training needs of a device's memory, foreseen from a model's config alone, and what is free there.

The peak of LoRA fine-tuning on one device, in bytes:

    weights + adapter + buckets + max(kept + head, backward)

    weights    b N             b: 4 (fp32), 2 (bf16, fp16); 4 bits: 0.5 and 0.127 / 8 for the scales of the blocks (NF4
                               with double quantisation, arXiv 2305.14314, section 3), the linear layers only
    adapter    a (1 + 1 + 2)   the a trained weights, their gradients and AdamW's two moments (arXiv 1412.6980), in fp32;
                               bf16 with 4-bit weights, as TRL does
    buckets    4 a             DDP only: the gradients again, in the buffers that are sent (arXiv 2006.15704)
    kept       k(1) + (L - 1) (k(2) - k(1))     what the forward pass keeps for the backward pass, L layers
    backward   the same of the largest moment of the backward pass
    head       see ``head_bytes``: the logits of a chunk of tokens

k(1) and k(2) are counted, not estimated: a model of one and of two layers runs forward and backward on tensors that
have a shape and a dtype but no content, and every storage that is made and freed on the way is added up. So whatever the
architecture, PEFT and autocast do is in it: rows of a fused projection, the fp32 copies that a normalisation takes, the
scores of eager attention (quadratic in the length; the fused kernels have none), the bf16 copy that autocast makes of each
fp32 weight and that lives until the backward pass has used it, which without gradient checkpointing is half of the weights
again. A Llama layer of width d and MLP width m with bf16 weights comes to about 28 d + 8 m bytes a token, most of them
inputs of the adapters; with checkpointing to 2 d.

Sharding over n devices: FSDP and ZeRO-3 divide weights and adapter by n and gather two layers at a time (the one that
computes and the one that is fetched); ZeRO-2 divides gradients and moments (arXiv 1910.02054, sections 5 and 7).

Not in it: what the process holds before a model is there, which is gone from the free memory already (on a CPU Python
and the libraries, about 0.55 GiB by benchmarks/memory.py; on a GPU the CUDA context, about 0.5 GiB), and free blocks that
are too small (``MARGIN``).

Importing this module loads no torch.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from stoney_rl.errors import StoneyError

if TYPE_CHECKING:
    import argparse

    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from stoney_rl.preflight import BatchPlan

FP32 = 4  # bytes
ADAM = 4  # a trained weight, its gradient and two moments
NF4 = (4 + 0.127) / 8  # bytes a weight; the second term: QLoRA, arXiv 2305.14314, section 3
# Free blocks between the used ones: what is wanted must fit this much over. benchmarks/memory.py measures it.
MARGIN = 1.1
# TRL 1.16 scores tokens in tiles of so many tokens and words (trl/kernels/chunked_logprob.py).
TILE_TOKENS, TILE_WORDS = 4096, 32768
SHARDINGS = ("ddp", "fsdp", "zero2", "zero3")
_MIB = 2**20
_GIB = 2**30

# Shapes of published models, from their config.json: what to propose, and to foresee without a network. Largest first.
SHAPES = {
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", 152064, 28, 3584, 18944, 28, 4, False),
    "microsoft/Phi-3-mini-4k-instruct": ("phi3", 32064, 32, 3072, 8192, 32, 32, False),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", 151936, 28, 1536, 8960, 12, 2, True),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", 151936, 24, 896, 4864, 14, 2, True),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", 49152, 30, 576, 1536, 9, 3, True),
}


def shape(name: str) -> "PretrainedConfig":
    """The config of a model of ``SHAPES``, without a network: its sizes alone."""
    from transformers import AutoConfig

    kind, vocabulary, layers, width, mlp, heads, kv_heads, tied = SHAPES[name]
    return AutoConfig.for_model(
        kind, vocab_size=vocabulary, num_hidden_layers=layers, hidden_size=width, intermediate_size=mlp,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied, max_position_embeddings=4096,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes expected on one device. ``peak``: what is always there, and the larger of sampling and learning."""

    weights: int
    adapter: int
    learning: int
    sampling: int = 0
    buckets: int = 0

    @property
    def peak(self) -> int:
        return self.weights + self.adapter + self.buckets + max(self.sampling, self.learning)

    def __str__(self) -> str:
        parts = [name for name in ("weights", "adapter", "buckets", "sampling", "learning") if getattr(self, name)]
        listed = ", ".join(f"{name} {getattr(self, name) / _MIB:,.0f}" for name in parts)
        return f"about {self.peak / _MIB:,.0f} MiB a device ({listed})"


@dataclass(frozen=True)
class Setup:
    """How a model is to be fine-tuned, as far as memory depends on it.

    ``length``: tokens a row. ``weights``: dtype of the frozen weights; ``autocast``: of the matrix products, or None.
    ``device``: 'cpu' or 'cuda'. ``lora``: arguments of PEFT's ``LoraConfig``. ``sharding``: one of ``SHARDINGS``, over
    ``devices``.
    """

    batch_size: int
    length: int
    weights: "torch.dtype"
    autocast: "torch.dtype | None"
    device: str
    load_in_4bit: bool = False
    gradient_checkpointing: bool = True
    attn_implementation: str | None = None
    lora: dict = field(default_factory=lambda: {"r": 16, "target_modules": "all-linear"})
    devices: int = 1
    sharding: str = "ddp"


def setup(args: "argparse.Namespace", *, devices: int = 1, length: int | None = None) -> Setup:
    """What ``train_lora.py`` will do with ``args``; ``length`` is that of the longest row, --max_length at most."""
    import torch

    from stoney_rl import models

    precision = models.choose_precision(args.dtype)
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}
    modules = args.lora_target_modules
    return Setup(
        batch_size=args.batch_size,
        length=length or args.max_length,
        weights=precision.weights,
        autocast=named[precision.autocast],
        device=models.device().type,
        load_in_4bit=args.load_in_4bit,
        gradient_checkpointing=args.gradient_checkpointing,
        attn_implementation=args.attn_implementation,
        lora={
            "r": args.lora_rank,
            "lora_dropout": args.lora_dropout,
            "use_dora": args.use_dora,
            "target_modules": "all-linear" if modules == ["all-linear"] else modules,
        },
        devices=devices,
        sharding="fsdp" if args.fsdp else args.deepspeed if args.deepspeed in SHARDINGS else "ddp",
    )


def read_config(name: str, revision: str | None = None) -> "PretrainedConfig":
    """The config of a folder or hub id, a few kB. Raises ``StoneyError`` if it can't be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise StoneyError(f"{name}: its config.json cannot be read: {' '.join(str(error).split())[:300]}") from error


def sft_memory(config: "PretrainedConfig", setup: Setup) -> Memory:
    """The peak of fine-tuning a model with this config, by the formula at the top of this module. No weights are read.

    Raises ``StoneyError`` for an architecture that transformers or PEFT can't build from its config.
    """
    config = config.get_text_config()
    try:
        one, two = (_count(config, setup, layers) for layers in (1, 2))
    except Exception as error:  # every architecture raises its own
        raise StoneyError(
            f"{config.model_type}: its memory can't be foreseen ({' '.join(str(error).split())[:200]})"
        ) from error
    more = config.num_hidden_layers - 1
    weights, adapter, kept, largest = (a + more * (b - a) for a, b in zip(one, two, strict=True))
    learning = max(kept + head_bytes(config, setup), largest)
    n = setup.devices if setup.sharding != "ddp" else 1
    if setup.sharding in ("fsdp", "zero3") and n > 1:
        gathered = 2 * (two[0] - one[0])
        return Memory(weights // n + gathered, ADAM * adapter // n, learning)
    if setup.sharding == "zero2" and n > 1:
        return Memory(weights, adapter + (ADAM - 1) * adapter // n, learning)
    return Memory(weights, ADAM * adapter, learning, buckets=adapter if setup.devices > 1 else 0)


def frozen_bytes(model: "PreTrainedModel", setup: Setup) -> int:
    """Bytes of the frozen weights of ``model``, which may be on the meta device. 4 bits: of linear layers but the head."""
    packed = {id(layer.weight) for layer in linear_layers(model)}
    return sum(
        int(weight.numel() * (NF4 if setup.load_in_4bit and id(weight) in packed else setup.weights.itemsize))
        for weight in model.parameters()
        if not weight.requires_grad
    )


def linear_layers(model: "PreTrainedModel") -> "list[torch.nn.Linear]":
    """The linear layers but for the LM head."""
    import torch

    head = model.get_output_embeddings()
    return [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer is not head]


def trained_bytes(model: "PreTrainedModel") -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad)


def head_bytes(config: "PretrainedConfig", setup: Setup) -> int:
    """The largest moment of the LM head, forward and backward, if every token of a batch has a label.

    On a CPU ``training.score_tokens`` does ``HEAD_CHUNK`` tokens at a time: counted as the layers are. On a GPU TRL 1.16
    writes the logits of ``TILE_TOKENS`` tokens and ``TILE_WORDS`` words into one buffer, and sums the gradient of the
    hidden states in fp32 beside them and their copy: c min(n, 4096) min(V, 32768) + (2 c + 4) n d, where c is the
    size of an element, n tokens, V words, d width; and c min(V, 32768) d for a copy of the head in other precision.
    """
    tokens = setup.batch_size * (setup.length - 1)
    if setup.device == "cpu":
        return _run_head(config, setup, tokens)
    element = (setup.autocast or setup.weights).itemsize
    words, width = min(config.vocab_size, TILE_WORDS), config.hidden_size
    copied = 0 if setup.weights == (setup.autocast or setup.weights) else element * words * width
    return element * min(tokens, TILE_TOKENS) * words + (2 * element + FP32) * tokens * width + copied


def merge_bytes(config: "PretrainedConfig") -> int:
    """RAM that must be free for the merge in fp32 at the end, which is on the CPU whatever trained.

    4 bytes a weight, and the update of the largest linear layer twice (the product of its factors, and that scaled). On a
    CPU training needs more; on a GPU it is what the run takes of the machine's memory at most. Pages of the mapped weight
    files are resident beside it, until the system wants them back.
    """
    largest = max((layer.weight.numel() for layer in linear_layers(bare(config.get_text_config(), 1))), default=0)
    return FP32 * (number_of_weights(config) + 2 * largest)


def number_of_weights(config: "PretrainedConfig") -> int:
    config = config.get_text_config()
    one, two = (sum(weight.numel() for weight in bare(config, layers).parameters()) for layers in (1, 2))
    return one + (config.num_hidden_layers - 1) * (two - one)


def expected_memory(
    model: "PreTrainedModel",
    plan: "BatchPlan",
    *,
    group_size: int,
    prompt_tokens: int,
    completion_tokens: int,
    shares_prefixes: bool,
    gradient_checkpointing: bool,
) -> Memory:
    """What a GRPO step will need for prompts and completions of these lengths; an estimate, from the model's shape.

    Weights and adapter as above. Sampling: the key-value cache, and four copies of a step's logits. Learning: activations
    of one micro-batch (with checkpointing one hidden state a layer, and one layer's own), and three copies of a chunk of
    logits.
    """
    from stoney_rl.training import HEAD_CHUNK

    config = model.config.get_text_config()
    width, layers = config.hidden_size, config.num_hidden_layers
    head_width = getattr(config, "head_dim", None) or width // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    local = plan.per_device * plan.accumulation
    cache = 2 * layers * heads * head_width * model.dtype.itemsize * local * (prompt_tokens + completion_tokens)
    prompts = max(1, plan.per_device // group_size) if shares_prefixes else plan.per_device
    tokens = prompts * prompt_tokens + plan.per_device * completion_tokens
    a_layer = tokens * (16 * width + 6 * config.intermediate_size) * FP32
    kept = layers * tokens * width * FP32 + a_layer if gradient_checkpointing else layers * a_layer
    chunk = min(HEAD_CHUNK, plan.per_device * completion_tokens)
    return Memory(
        weights=sum(
            weight.numel() * weight.element_size() for weight in model.parameters() if not weight.requires_grad
        ),
        adapter=ADAM * trained_bytes(model),
        sampling=cache + 4 * local * config.vocab_size * FP32,
        learning=kept + 3 * chunk * config.vocab_size * FP32,
    )


# What is there, and what to do where it is not enough.


def free_memory() -> int:
    """Bytes that are free on the GPU, or available on a machine without one."""
    import psutil
    import torch

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def device_line() -> str:
    """The device that will train, its free and its total memory: for the start of a container, or of a run."""
    import psutil
    import torch

    if torch.cuda.is_available():
        name, (free, total) = f"GPU {torch.cuda.get_device_name()}", torch.cuda.mem_get_info()
    else:
        name, memory = f"CPU, {torch.get_num_threads()} threads", psutil.virtual_memory()
        free, total = memory.available, memory.total
    return f"{name}: {amount(free)} of {amount(total)} free"


def fits(peak: int) -> bool:
    """Whether ``peak`` bytes will be found now, with ``MARGIN`` for the gaps between them."""
    return peak * MARGIN <= free_memory()


def amount(size: int) -> str:
    """Bytes as '850 MiB' or '12.3 GiB'."""
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / _MIB:.0f} MiB"


def verdict(memory: Memory, setup: Setup) -> str:
    """One line: the device, what is free there, the predicted peak of a batch of longest rows and whether it fits."""
    listed = ", ".join(
        f"{name} {amount(value)}"
        for name, value in (
            ("weights", memory.weights),
            ("adapter and optimizer", memory.adapter + memory.buckets),
            ("activations", memory.learning),
        )
    )
    said = "fits" if fits(memory.peak) else "will not fit"
    batch = f"{setup.batch_size} x {setup.length} tokens"
    return f"{device_line()}; predicted peak with {batch} {amount(memory.peak)} ({listed}): {said}"


def merge_line(config: "PretrainedConfig") -> str:
    """One line: the RAM that merging takes, whatever device trains, and whether it is there."""
    import psutil

    needed, free = merge_bytes(config), psutil.virtual_memory().available
    line = f"merging in fp32 at the end takes {amount(needed)} of RAM"
    return line if needed <= free else f"{line}, and {amount(free)} are available: the merge may be killed"


def proposals(config: "PretrainedConfig", setup: Setup, accumulation: int) -> Iterator[str]:
    """What to change so that the run would fit, one line each, with the flags and the peak that they would have.

    First each change alone, where it is enough; if none is, the changes one on top of the other; last a smaller model.
    """
    changes = _changes(setup, accumulation)
    alone = [(flags, sft_memory(config, changed).peak) for flags, changed in changes]
    fitting = [(flags, peak) for flags, peak in alone if fits(peak)]
    if not fitting and changes:
        together = replace(
            setup, **{name: value for _, changed in changes for name, value in vars(changed).items() if value != getattr(setup, name)}
        )  # fmt: skip
        fitting = [(" ".join(flags for flags, _ in changes), sft_memory(config, together).peak)]
    for flags, peak in fitting:
        yield f"{flags}: predicted peak {amount(peak)}" + ("" if fits(peak) else ", still too much")
    yield _smaller_model(config, setup)


def _changes(setup: Setup, accumulation: int) -> list[tuple[str, Setup]]:
    """Single changes that need less memory: their flags, and the setup with them."""
    import importlib.util

    changes = []
    if setup.device == "cuda" and not setup.load_in_4bit:
        install = "" if importlib.util.find_spec("bitsandbytes") else " (after: pip install bitsandbytes)"
        changes.append((f"--load_in_4bit{install}", replace(setup, load_in_4bit=True)))
    if not setup.gradient_checkpointing:
        changes.append(("--gradient_checkpointing", replace(setup, gradient_checkpointing=True)))
    if setup.length > 256:
        changes.append(("--max_length 256", replace(setup, length=256)))
    if setup.batch_size > 1:
        flags = f"--batch_size 1 --gradient_accumulation_steps {accumulation * setup.batch_size}"
        changes.append((flags, replace(setup, batch_size=1)))
    return changes


def _smaller_model(config: "PretrainedConfig", setup: Setup) -> str:
    size = number_of_weights(config)
    smaller = [name for name in SHAPES if number_of_weights(shape(name)) < size] or [list(SHAPES)[-1]]
    setup = replace(setup, lora=setup.lora | {"target_modules": "all-linear"})  # names differ between architectures
    peaks = {name: sft_memory(shape(name), setup).peak for name in smaller}
    name = next((name for name, peak in peaks.items() if fits(peak)), smaller[-1])
    return f"--model {name}: predicted peak {amount(peaks[name])}" + ("" if fits(peaks[name]) else ", still too much")  # fmt: skip


# Counting.


def bare(
    config: "PretrainedConfig",
    layers: int,
    *,
    device: str = "meta",
    dtype: "torch.dtype | None" = None,
    attn_implementation: str | None = None,
    **changes: object,
) -> "PreTrainedModel":
    """A model with this config but for ``layers`` and ``changes``; on the meta device a shape without content."""
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    vars(config).update(changes, num_hidden_layers=layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)


def adapted(
    config: "PretrainedConfig", setup: Setup, layers: int, *, device: str = "meta", **changes: object
) -> "PreTrainedModel":
    """As ``bare``, with its adapter, ready to train."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = bare(
        config, layers, device=device, attn_implementation=setup.attn_implementation, dtype=setup.weights, **changes
    )
    with torch.device(device):
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **setup.lora))
    if setup.load_in_4bit:
        for weight in model.parameters():  # as TRL does with a quantized base
            if weight.requires_grad:
                weight.data = weight.data.to(torch.bfloat16)
    if setup.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model.train()


def _count(config: "PretrainedConfig", setup: Setup, layers: int) -> tuple[int, int, int, int]:
    """Bytes with so many layers: frozen weights, trained weights, what the forward pass keeps, and the largest moment of
    it and the backward pass."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from stoney_rl import training  # noqa: F401  silences a warning about checkpointing

    model = adapted(config, setup, layers)
    weights, adapter = frozen_bytes(model, setup), trained_bytes(model)
    with FakeTensorMode():
        _materialize(model)
        ids = torch.zeros(setup.batch_size, setup.length, dtype=torch.long)
        with _live_bytes() as live:
            with torch.autocast("cpu", dtype=setup.autocast, enabled=setup.autocast is not None):
                backbone = model.get_base_model().base_model
                hidden = backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
            kept = live.now
            hidden.backward(torch.empty_like(hidden))
    # A 4-bit weight is unpacked when it is used.
    unpacked = max(layer.weight.numel() for layer in linear_layers(model)) * 2 if setup.load_in_4bit else 0
    return weights, adapter, kept, live.peak + unpacked


def _run_head(config: "PretrainedConfig", setup: Setup, tokens: int) -> int:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from stoney_rl.training import score_tokens

    with FakeTensorMode():
        head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=setup.weights)
        head.requires_grad_(False)
        hidden = torch.empty(tokens, config.hidden_size, dtype=setup.weights, requires_grad=True)
        with _live_bytes() as live:
            with torch.autocast("cpu", dtype=setup.autocast, enabled=setup.autocast is not None):
                trained = hidden * 1  # the rows with a label, picked out of all
                log_probs, *_ = score_tokens(head, trained, torch.zeros(tokens, dtype=torch.long))
            log_probs.sum().backward()
    return live.peak


def _materialize(model: "PreTrainedModel") -> None:
    """Under ``FakeTensorMode``: give a model on the meta device tensors that say they are on the CPU, where autocast is.

    Trained weights get gradients, so that the memory of gradients is not counted twice.
    """
    import torch

    made: dict[int, torch.nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            if id(weight) not in made:
                empty = torch.empty(weight.shape, dtype=weight.dtype)
                made[id(weight)] = torch.nn.Parameter(empty, requires_grad=weight.requires_grad)
                if weight.requires_grad:
                    made[id(weight)].grad = torch.empty_like(empty)
            module._parameters[name] = made[id(weight)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _live_bytes() -> Callable:
    """A context in which the storages of new tensors are added up: ``now``, and ``peak`` so far, in bytes."""
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    class Live(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.now = self.peak = 0
            self.sizes: dict[int, int] = {}

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            for tensor in filter(torch.is_tensor, tree_iter((args, kwargs))):  # what was there before
                self.sizes.setdefault(tensor.untyped_storage()._cdata, 0)
            result = function(*args, **kwargs)
            for tensor in filter(torch.is_tensor, tree_iter(result)):
                self.add(tensor.untyped_storage())
            return result

        def add(self, storage) -> None:
            if storage._cdata in self.sizes:
                return
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage._cdata)

        def free(self, key: int) -> None:
            self.now -= self.sizes.pop(key)

    return Live()
