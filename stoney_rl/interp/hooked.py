"""A checkpoint with every activation within reach: TransformerLens's bridge, with its traps closed.

    model = load_hooked("stoney_lora_merged")            # a merged checkpoint, an adapter or a hub id
    batch = left_padded([ids_a, ids_b], model.pad_token_id)
    run = model.run(batch, read=["blocks.3.attn.hook_pattern"], edit={"blocks.2.hook_mlp_out": torch.zeros_like})
    run.logits, run["blocks.3.attn.hook_pattern"]

1. What is opened is a copy: the bridge renames parameters, leaves hooks, forces eager attention and draws random numbers.
2. An adapter is merged into the copy. On a fused projection (Phi-3) the bridge would show the base model, silently.
3. The copy's logits are compared with the checkpoint's own, and with the ones that were recorded when it was saved.
4. Only token ids and masks go in: the bridge's own tokenizer puts a BOS in front.
5. Each hook that is named must exist and must fire; an edit returns a new tensor. The bridge passes over a wrong name, and
   an edit in place also changes what was read before it.
6. Only what is read is kept.
"""

import copy
import difflib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from stoney_rl import checkpoints
from stoney_rl.errors import StoneyError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What the hooked model's logits may differ by from the checkpoint's, as a share of its largest logit. fp32: rounding of
# another order of sums; the half precisions have 8 and 11 bits.
TOLERANCE = dict.fromkeys((torch.float32, torch.float64), checkpoints.LOGIT_TOLERANCE) | {
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}

Edit = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """Token ids and attention mask, both int64 [row, position]; the rows end at the last position."""

    ids: torch.Tensor
    mask: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.ids.to(device), self.mask.to(device))


def left_padded(sequences: Sequence[Sequence[int]], pad_token_id: int) -> Batch:
    """Rows of token ids as one batch, padded at the start, so that every row's last token is at position -1."""
    if not sequences or not all(len(row) for row in sequences):
        raise StoneyError("a batch needs at least one row, and every row at least one token")
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.as_tensor(sequence, dtype=torch.int64)
        mask[row, width - len(sequence) :] = 1
    return Batch(ids, mask)


def by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The places of rows of these ``lengths``, shortest first, in batches of at most ``size``: little is padded."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]


@dataclass(frozen=True)
class Run:
    """What a forward pass gave. ``logits`` [row, position, vocabulary]; None if it stopped at a layer."""

    logits: torch.Tensor | None
    activations: dict[str, torch.Tensor] = field(default_factory=dict)

    def __getitem__(self, hook: str) -> torch.Tensor:
        return self.activations[hook]


@dataclass(frozen=True)
class Gradients:
    """A scalar metric [], and at each hook the activation and d metric / d activation, both in the hook's shape."""

    metric: torch.Tensor
    activations: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Fidelity:
    """Largest absolute difference of logits on the probe batch, in logits; ``scale`` is the largest logit there.

    hooked: the hooked model against the checkpoint as transformers runs it. merged: the merged copy against the
    unmerged adapter; None where there was nothing to merge. recorded: against what stage.json recorded at saving; None
    where it records none, or another dtype.
    """

    scale: float
    hooked: float
    merged: float | None = None
    recorded: float | None = None


class HookedModel:
    """See the module's docstring. Made by ``load_hooked`` or ``hook_model``; in evaluation mode, always.

    ``name``; ``tokenizer``; ``fidelity``; ``n_layers``, ``n_heads`` (query heads), ``n_key_value_heads``, ``d_model``,
    ``d_head``, ``d_mlp``, ``d_vocab``; ``post_norm``: whether a norm stands behind attention and MLP (Gemma 2 and 3),
    so that heads and neurons don't add up to what their layer writes.
    """

    def __init__(
        self, bridge: "TransformerBridge", tokenizer: "PreTrainedTokenizerBase", name: str, fidelity: Fidelity
    ) -> None:
        self.bridge, self.tokenizer, self.name, self.fidelity = bridge, tokenizer, name, fidelity
        config = bridge.cfg
        self.n_layers, self.n_heads = config.n_layers, config.n_heads
        self.n_key_value_heads = config.n_key_value_heads or config.n_heads
        self.d_model, self.d_head, self.d_mlp, self.d_vocab = (
            config.d_model, config.d_head, config.d_mlp, config.d_vocab,
        )  # fmt: skip
        self.post_norm = hasattr(bridge.blocks[0], "ln1_post")

    @property
    def device(self) -> torch.device:
        return next(self.bridge.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.bridge.parameters()).dtype

    @property
    def pad_token_id(self) -> int:
        """An id to pad with; which one does not matter, as padding is masked."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    # Forward passes

    def run(
        self,
        batch: Batch,
        *,
        read: Iterable[str] | Mapping[str, Edit] = (),
        edit: Mapping[str, Edit] | None = None,
        stop_at_layer: int | None = None,
        last: bool = False,
    ) -> Run:
        """One forward pass without gradients; keeps the activations in ``read``, as they are after the edits.

        ``read`` as a mapping, hook name -> function: what the function makes of the activation is kept in its place, so
        that a pass over long rows need not hold what is only summed up. ``edit``: hook name -> a function from the activation to its replacement, of the same shape. ``stop_at_layer``:
        the first layer that is not computed (saves time; no logits then). ``last``: logits of the last position alone,
        [row, 1, vocabulary]; the others are a quarter of SmolLM2's pass. Raises ``StoneyError`` for a hook that does
        not exist (with the nearest name), one that does not fire in this model, and an edit that works in place, returns
        nothing or another shape.
        """
        read = dict(read) if isinstance(read, Mapping) else dict.fromkeys(read, _as_it_is)
        edit = dict(edit or {})
        self._require(*read, *edit)
        kept: dict[str, torch.Tensor] = {}
        fired: set[str] = set()
        hooks = [(name, _editor(name, function, fired)) for name, function in edit.items()]
        hooks += [(name, _reader(name, function, kept)) for name, function in read.items()]
        with torch.no_grad():
            out = self._forward(batch, hooks, stop_at_layer, last)
        self._require_fired([name for name in edit if name not in fired] + [name for name in read if name not in kept])
        return Run(None if stop_at_layer is not None else out, kept)

    def gradients(
        self,
        batch: Batch,
        metric: Callable[[torch.Tensor], torch.Tensor],
        *,
        at: Iterable[str],
        edit: Mapping[str, Edit] | None = None,
        last: bool = False,
    ) -> Gradients:
        """``metric(logits)``, a scalar, with its gradient at the hooks ``at``; no parameter gets a gradient.

        Edits come first: a gradient is taken at the replaced activation. Rows don't see each other, so the sum of a
        metric over rows gives every row its own gradient. ``last`` as in ``run``. Raises ``StoneyError`` as ``run``, and where the metric does
        not depend on a hook.
        """
        at, edit = list(dict.fromkeys(at)), dict(edit or {})
        self._require(*at, *edit)
        kept: dict[str, torch.Tensor] = {}
        leaves: dict[str, torch.Tensor] = {}
        fired: set[str] = set()
        hooks = [(name, _editor(name, function, fired)) for name, function in edit.items()]
        hooks += [(name, _leaf(name, kept, leaves)) for name in at]
        with torch.enable_grad():
            value = metric(self._forward(batch, hooks, None, last))
            self._require_fired(
                [name for name in edit if name not in fired] + [name for name in at if name not in leaves]
            )
            try:
                found = torch.autograd.grad(value, [leaves[name] for name in at])
            except RuntimeError as error:
                if "unused" not in str(error) and "does not require grad" not in str(error):
                    raise
                raise StoneyError(f"{self.name}: the metric does not depend on one of {', '.join(at)}") from error
        return Gradients(value.detach(), kept, dict(zip(at, found, strict=True)))

    def _forward(self, batch: Batch, hooks: list, stop_at_layer: int | None, last: bool) -> torch.Tensor:
        batch, fewer = batch.to(self.device), {"logits_to_keep": 1} if last else {}
        try:
            return self.bridge.run_with_hooks(
                batch.ids, fwd_hooks=hooks, attention_mask=batch.mask, stop_at_layer=stop_at_layer, **fewer
            )
        except ValueError as error:
            if not str(error).startswith("Cannot add hook"):
                raise
            raise StoneyError(f"{self.name}: a hook that does not fire in this pass: {error}") from error

    def _require(self, *names: str) -> None:
        known = self.bridge.hook_dict
        for name in names:
            if not isinstance(name, str) or name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise StoneyError(f"{self.name}: no hook is called {name!r}{hint}; model.hooks lists them")

    def _require_fired(self, silent: list[str]) -> None:
        if silent:
            raise StoneyError(
                f"{self.name}: {', '.join(silent)}: exists but did not fire in this pass "
                "(past stop_at_layer, or never computed in this architecture)"
            )

    @property
    def hooks(self) -> list[str]:
        """Every hook name; some never fire in some architectures, which ``run`` tells."""
        return list(self.bridge.hook_dict)

    # Weights, in the orientation of the formulas

    def W_O(self, layer: int) -> torch.Tensor:
        """Output projection of each query head, [head, d_head, d_model]."""
        return self.bridge.blocks[layer].attn.W_O.detach()

    def W_out(self, layer: int) -> torch.Tensor:
        """What each neuron writes, [d_mlp, d_model]."""
        return self.bridge.blocks[layer].mlp.W_out.detach()

    @property
    def W_U(self) -> torch.Tensor:
        """Unembedding, [d_model, d_vocab]."""
        return self.bridge.W_U.detach()

    @property
    def final_norm_weight(self) -> torch.Tensor:
        """The factor of each coordinate in the final RMS norm, [d_model]: 1 + weight in Gemma, weight elsewhere."""
        weight = self.bridge.ln_final.weight.detach()
        return 1 + weight if self.bridge.cfg.rmsnorm_uses_offset else weight

    def unembed(self, residual: torch.Tensor) -> torch.Tensor:
        """Logits before any soft cap, [..., d_vocab], of residual vectors [..., d_model]: norm and unembedding."""
        with torch.no_grad():
            return self.bridge.unembed(self.bridge.ln_final(residual))


def _as_it_is(activation: torch.Tensor) -> torch.Tensor:
    return activation


def _reader(name: str, function: Edit, kept: dict[str, torch.Tensor]) -> Callable:
    def hook(activation: torch.Tensor, hook: object) -> None:
        kept[name] = function(activation.detach())

    return hook


def _editor(name: str, function: Edit, fired: set[str]) -> Callable:
    def hook(activation: torch.Tensor, hook: object) -> torch.Tensor:
        version = activation._version
        replaced = function(activation)
        if activation._version != version:
            raise StoneyError(f"{name}: the edit changed its input in place; return a new tensor (clone it first)")
        if not isinstance(replaced, torch.Tensor) or replaced.shape != activation.shape:
            got = tuple(replaced.shape) if isinstance(replaced, torch.Tensor) else type(replaced).__name__
            raise StoneyError(f"{name}: the edit must return a tensor of shape {tuple(activation.shape)}, got {got}")
        fired.add(name)
        return replaced.to(activation.dtype)

    return hook


def _leaf(name: str, kept: dict[str, torch.Tensor], leaves: dict[str, torch.Tensor]) -> Callable:
    def hook(activation: torch.Tensor, hook: object) -> torch.Tensor:
        kept[name] = activation.detach()
        leaves[name] = torch.zeros_like(activation, requires_grad=True)
        return activation + leaves[name]

    return hook


# Opening


def load_hooked(
    name: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32, device: str | None = None
) -> HookedModel:
    """Open a checkpoint directory (adapter or merged) or a hub id; prove that what is hooked is what was saved.

    Raises ``StoneyError`` as ``models.find_model`` and ``models.load_model`` do, if the weights are not those that
    stage.json recorded, and if the hooked model's logits differ from the checkpoint's.
    """
    from stoney_rl.models import find_model, load_model, load_tokenizer

    source = find_model(name, revision=revision)
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype, attn_implementation="eager")
    checkpoints.check_fingerprint(source.name, model)
    if device:
        model = model.to(device)
    recorded = (checkpoints.read_stage(source.name) or {}).get("fingerprint") if source.kind != "hub" else None
    return _open(model, tokenizer, name, recorded)


def hook_model(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", name: str = "model") -> HookedModel:
    """The same for a model in memory, with or without a LoRA adapter. The model itself is left as it is.

    Needs memory for a second copy. Raises ``StoneyError`` if the copy's logits differ.
    """
    duplicate = copy.deepcopy(model).eval()
    duplicate.zero_grad(set_to_none=True)
    return _open(duplicate, tokenizer, name, None)


def random_hooked(model: HookedModel, seed: int) -> HookedModel:
    """A model of the same shape with random weights, as its architecture initialises them: what no training gives."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.bridge.original_model.config)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        fresh = AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval().to(model.device)
    return _open(fresh, model.tokenizer, f"random-{seed}", None)


def _open(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", name: str, recorded: dict | None
) -> HookedModel:
    """Hook ``model``, which is used up."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    model.set_attn_implementation("eager")
    expected = checkpoints.probe_logits(model)
    scale = float(expected.abs().max())
    difference = None
    if hasattr(model, "merge_and_unload"):
        unmerged = expected
        model = model.merge_and_unload()
        expected = checkpoints.probe_logits(model)
        difference = float((expected - unmerged).abs().max())
    _refuse_adapters(model, name)
    if not model.config.architectures:  # the bridge picks its parts by it
        model.config.architectures = [type(model).__name__]
    devices = [model.device] if model.device.type == "cuda" else []
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices):
        tokenizer.save_pretrained(folder)  # the bridge reads it from a path, or asks a hub
        try:
            bridge = TransformerBridge.boot_transformers(
                folder, hf_model=model, tokenizer=AutoTokenizer.from_pretrained(folder), device=str(model.device),
                dtype=model.dtype,
            )  # fmt: skip
        except (ValueError, NotImplementedError) as error:
            kind = model.config.model_type
            raise StoneyError(f"{name}: TransformerLens does not open {kind!r} models: {str(error)[:200]}") from error
    bridge.eval().requires_grad_(False)
    ids = checkpoints.probe_input_ids(expected.shape[-1])
    hooked = HookedModel(bridge, tokenizer, name, Fidelity(scale, 0.0))
    logits = hooked.run(Batch(ids, torch.ones_like(ids))).logits.float().cpu()
    hooked.fidelity = Fidelity(
        scale=scale,
        hooked=float((logits - expected).abs().max()),
        merged=difference,
        recorded=_from_record(recorded, logits, str(model.dtype)),
    )
    worst = max(hooked.fidelity.hooked, hooked.fidelity.merged or 0.0)
    if not worst <= TOLERANCE[model.dtype] * max(scale, 1.0):
        raise StoneyError(
            f"{name}: the hooked model's logits differ from the checkpoint's by {worst:.3g} (largest logit {scale:.3g}); "
            "nothing measured on it would be about this checkpoint"
        )
    return hooked


def _refuse_adapters(model: "PreTrainedModel", name: str) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    left = [path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if left:
        raise StoneyError(
            f"{name}: {len(left)} adapter layers are not merged ({left[0]}, ...); the hooks would show the base model"
        )


def _from_record(recorded: dict | None, logits: torch.Tensor, dtype: str) -> float | None:
    if not recorded or recorded["dtype"] != dtype.removeprefix("torch."):
        return None
    flat = logits.flatten()
    sample = flat[:: max(1, flat.numel() // len(recorded["sample"]))][: len(recorded["sample"])]
    return float((sample - torch.tensor(recorded["sample"])).abs().max())
