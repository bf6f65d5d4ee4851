"""Look inside a model as it stands, in the middle of training, and leave it exactly as it was.

    probe = make_probe(examples, tokenizer, seed=0)
    neurons = choose_neurons(model, probe, seed=0)
    found = trace(model, probe, [(layer, index) for layer, index, _ in neurons])     # what is in it: see ``trace``

1. The probe is fixed by the seed: a few short texts with their answers, and random tokens written twice.
2. A trace is two forward passes of the decoder itself, adapter and all, in evaluation mode, with eager attention, which
   hands out its weights. Plain PyTorch hooks copy and reduce: TransformerLens would change the model.
3. Afterwards hooks, training flags and attention kernel are what they were, and no random number was drawn.
4. The measures are those of ``attention`` and ``lens``.
"""

import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stoney_rl.errors import StoneyError
from stoney_rl.interp import attention, lens
from stoney_rl.interp.hooked import Batch, left_padded

TEXTS, SHOWN = 4, 2  # texts of the probe; of the first two, patterns and neurons are kept token by token
ANSWER_TOKENS = 4  # of each answer, read through the lens: with a large vocabulary the head is what costs
REPEATED_ROWS, REPEATED_TOKENS = 4, 25
NEURONS = 8  # with the largest effect; as many random ones beside them
# What the last layer's lens may differ by from the model's own log-probabilities, in nats: full and half precision.
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.1


@dataclass(frozen=True)
class Probe:
    """What every trace looks at.

    texts: token ids of prompt and answer. starts: where each answer begins. repeated: random tokens written twice, int64
    [row, token].
    """

    texts: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    repeated: torch.Tensor

    def answer_tokens(self) -> list[tuple[int, int]]:
        """(text, position) of each token that is read through the lens: the first ``ANSWER_TOKENS`` of each answer."""
        return [
            (number, position)
            for number, (text, start) in enumerate(zip(self.texts, self.starts, strict=True))
            for position in range(start, min(start + ANSWER_TOKENS, len(text)))
        ]


def make_probe(examples: Sequence[dict], tokenizer: PreTrainedTokenizerBase, seed: int) -> Probe:
    """Draw ``TEXTS`` of the shorter half of ``examples``, which are as ``prompts.encode_example`` makes them.

    The repeated tokens are those of ``attention.repeated_random_tokens``. Raises ``StoneyError`` without examples.
    """
    if not examples:
        raise StoneyError("--trace_every: no held-out row to look at; hold rows out, or leave it out")
    shortest = sorted(examples, key=lambda example: len(example["input_ids"]))
    candidates = shortest[: max(TEXTS, len(shortest) // 2)]
    chosen = random.Random(seed).sample(candidates, min(TEXTS, len(candidates)))
    starts = [next(at for at, label in enumerate(example["labels"]) if label != -100) for example in chosen]
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ordinary = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - special))
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(ordinary), generator=generator)[:REPEATED_TOKENS] for _ in range(REPEATED_ROWS)]
    repeated = ordinary[torch.stack(orders)].repeat(1, 2)
    return Probe(tuple(tuple(example["input_ids"]) for example in chosen), tuple(starts), repeated)


# A trace


def trace(model: torch.nn.Module, probe: Probe, neurons: Sequence[tuple[int, int]] = ()) -> dict[str, np.ndarray]:
    """What ``model``, with or without an adapter, does on ``probe``; the model is left as it was.

    entropy, sink: float32 [text, layer, head]; previous_token, induction: float32 [row, layer, head], on the repeated
    tokens; see ``attention.head_scores``. log_prob: float32 [answer token, layer], nats, by the logit lens at layers 0 (the
    embedding) to n (the model's own); depth: float32 [answer token]; see ``lens.settled_depth``. For the first ``SHOWN``
    texts pattern_<text>: float16 [layer, head, query, key], and activation_<text>: float32 [neuron, token], of
    ``neurons`` (layer, index) in their order. Raises ``StoneyError`` as ``check`` does for unknown parts.
    """
    parts = _parts(model)
    with _undisturbed(parts.model), torch.no_grad():
        return _read_texts(parts, probe, neurons) | _read_repeated(parts, probe)


def check(model: torch.nn.Module, probe: Probe) -> None:
    """Raise ``StoneyError`` unless ``model`` is built of the parts that a trace reads, and computes nothing behind them.

    Decoder layers of attention and MLP, a final norm and an LM head, whose log-probabilities are the model's own.
    """
    parts = _parts(model)
    batch = left_padded(probe.texts[:1], 0).to(parts.device)
    streams: dict[int, torch.Tensor] = {}
    with _undisturbed(parts.model), torch.no_grad():
        _run(parts, batch, residual=streams.__setitem__)
        read = parts.log_probs(streams[len(parts.layers)])
        # The class's forward: trainers give the instance another, which scores some tokens only.
        own = type(parts.model).forward(parts.model, input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    difference = float((read - own.logits.float().log_softmax(-1)).abs().max())
    if not difference <= (HALF_TOLERANCE if own.logits.dtype.itemsize == 2 else TOLERANCE):
        raise StoneyError(
            f"--trace_every: {type(parts.model).__name__} computes more than norm and LM head behind its layers: what a "
            f"trace would show differs from its log-probabilities by {difference:.2g}; leave it out"
        )


def _read_texts(parts: "_Parts", probe: Probe, neurons: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
    batch = left_padded(probe.texts, 0).to(parts.device)
    width = batch.ids.size(1)
    first = [width - len(text) for text in probe.texts]
    shown = range(min(SHOWN, len(probe.texts)))
    answers = probe.answer_tokens()
    rows = [text for text, _ in answers]
    before = [first[text] + position - 1 for text, position in answers]
    targets = torch.tensor([[probe.texts[text][position]] for text, position in answers], device=parts.device)
    scores = attention.pattern_scores(batch)
    found: dict[str, list] = {name: [] for name in ("scores", "log_prob", "top")}
    patterns: list[list] = [[] for _ in shown]
    activations: list[dict] = [{} for _ in shown]

    def read_attention(layer: int, pattern: torch.Tensor) -> None:
        found["scores"].append(scores(pattern))
        for text in shown:
            patterns[text].append(pattern[text, :, first[text] :, first[text] :].half())

    def read_residual(layer: int, stream: torch.Tensor) -> None:
        log_probs = parts.log_probs(stream[rows, before])
        found["log_prob"].append(log_probs.gather(1, targets).squeeze(1))
        found["top"].append(log_probs.argmax(1))

    def read_neurons(layer: int, activation: torch.Tensor) -> None:
        for text in shown:
            for at, index in neurons:
                if at == layer:
                    activations[text][at, index] = activation[text, first[text] :, index].float()

    _run(parts, batch, attention=read_attention, residual=read_residual, neurons=read_neurons)
    arrays = {name: torch.stack(values, dim=1) for name, values in found.items()}
    arrays |= _named(arrays.pop("scores"), ("entropy", "sink"))
    top = arrays.pop("top")
    arrays["depth"] = lens.first_lasting(top == top[:, -1:])
    for text in shown:
        arrays[f"pattern_{text}"] = torch.stack(patterns[text])
        if neurons:
            arrays[f"activation_{text}"] = torch.stack([activations[text][neuron] for neuron in neurons])
    return {name: values.cpu().numpy() for name, values in arrays.items()}


def _read_repeated(parts: "_Parts", probe: Probe) -> dict[str, np.ndarray]:
    batch = Batch(probe.repeated, torch.ones_like(probe.repeated)).to(parts.device)
    scores = attention.pattern_scores(batch)
    found = []
    _run(parts, batch, attention=lambda layer, pattern: found.append(scores(pattern)))
    named = _named(torch.stack(found, dim=1), ("previous_token", "induction"))
    return {name: values.cpu().numpy() for name, values in named.items()}


def _named(scores: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Those of ``attention.MEASURES``, [row, layer, head] each, from all [row, layer, head, measure]."""
    return {name: scores[..., attention.MEASURES.index(name)] for name in names}


# The neurons to follow


def choose_neurons(model: torch.nn.Module, probe: Probe, seed: int) -> list[tuple[int, int, str]]:
    """The ``NEURONS`` neurons (layer, index, "top") that matter most to the probe's answers, and as many "random" ones.

    What counts is |sum over positions of a . d log p(answer) / d a|, averaged over texts: the first-order effect of taking
    the activation a away (arXiv 2310.10348). In order of layer and index. No parameter gets a gradient.
    """
    parts = _parts(model)
    with _undisturbed(parts.model), torch.enable_grad():
        effects = sum(
            _neuron_effects(parts, text, start) for text, start in zip(probe.texts, probe.starts, strict=True)
        )
    ranked = effects.flatten().argsort(descending=True, stable=True).tolist()
    drawn = random.Random(seed).sample(ranked[NEURONS:], min(NEURONS, len(ranked[NEURONS:])))
    why = dict.fromkeys(drawn, "random") | dict.fromkeys(ranked[:NEURONS], "top")
    return [(*divmod(at, effects.size(1)), why[at]) for at in sorted(why)]


def _neuron_effects(parts: "_Parts", text: tuple[int, ...], start: int) -> torch.Tensor:
    """|sum over positions of a . d log p / d a|, float32 [layer, neuron], for the tokens that the lens reads."""
    activations: list[torch.Tensor] = []
    leaves: list[torch.Tensor] = []
    streams: dict[int, torch.Tensor] = {}

    def add_leaf(layer: int, activation: torch.Tensor) -> torch.Tensor:
        activations.append(activation.detach())
        leaves.append(torch.zeros_like(activation, requires_grad=True))
        return activation + leaves[-1]

    batch = left_padded([text], 0).to(parts.device)
    _run(parts, batch, neurons=add_leaf, residual=streams.__setitem__)
    answer = batch.ids[0, start : start + ANSWER_TOKENS]
    log_probs = parts.log_probs(streams[len(parts.layers)][0, start - 1 : start - 1 + len(answer)])
    gradients = torch.autograd.grad(log_probs.gather(1, answer[:, None]).sum(), leaves)
    pairs = zip(activations, gradients, strict=True)
    return torch.stack([(one.float() * other.float()).sum((0, 1)).abs().cpu() for one, other in pairs])


# The model


@dataclass(frozen=True)
class _Parts:
    """The modules of a causal language model that a trace reads."""

    model: PreTrainedModel
    decoder: torch.nn.Module
    layers: list[torch.nn.Module]
    norm: torch.nn.Module
    head: torch.nn.Module

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def log_probs(self, stream: torch.Tensor) -> torch.Tensor:
        """log softmax(unembed(final_norm(.))), float32 [..., vocabulary], soft cap included, of ``stream`` [..., width]."""
        logits = self.head(self.norm(stream).to(self.head.weight.dtype)).float()
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return (torch.tanh(logits / cap) * cap if cap else logits).log_softmax(-1)


def _parts(model: torch.nn.Module) -> _Parts:
    try:
        while not isinstance(model, PreTrainedModel):
            model = model.get_base_model() if isinstance(model, PeftModel) else model.module  # a wrapper of accelerate
        decoder = model.base_model
        parts = _Parts(model, decoder, list(decoder.layers), decoder.norm, model.get_output_embeddings())
        _ = parts.device, [(layer.self_attn, layer.mlp.down_proj) for layer in parts.layers]
    except AttributeError as error:
        raise StoneyError(
            f"--trace_every: {type(model).__name__} is not built of the parts that a trace reads ({error}); leave it out"
        ) from error
    return parts


@contextlib.contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and eager attention inside; each module's own mode and the model's own kernel again outside."""
    training = [module for module in model.modules() if module.training]
    kernel = model.config._attn_implementation
    try:
        for module in training:
            module.training = False
        model.config._attn_implementation = "eager"
        yield
    finally:
        model.config._attn_implementation = kernel
        for module in training:
            module.training = True


Reader = Callable[[int, torch.Tensor], torch.Tensor | None]  # layer, activation -> its replacement, or None


def _run(
    parts: _Parts,
    batch: Batch,
    *,
    attention: Reader | None = None,
    residual: Reader | None = None,
    neurons: Reader | None = None,
) -> None:
    """A forward pass of the decoder for its readers.

    attention: of each layer the pattern [row, head, query, key]. residual: layers 0 to n, the stream [row, position,
    width] that enters layer 0, 1, ... and leaves the last. neurons: of each layer the activations [row, position, neuron],
    which it may replace.
    """

    def on_attention(layer: int, module: torch.nn.Module, args: tuple, output: tuple) -> None:
        attention(layer, output[1].float())

    def on_input(module: torch.nn.Module, args: tuple) -> None:
        residual(0, args[0])

    def on_output(layer: int, module: torch.nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        residual(layer + 1, output if isinstance(output, torch.Tensor) else output[0])

    def on_neurons(layer: int, module: torch.nn.Module, args: tuple) -> torch.Tensor | None:
        return neurons(layer, args[0])

    handles = [parts.layers[0].register_forward_pre_hook(on_input)] if residual else []
    for number, layer in enumerate(parts.layers):
        if attention:
            handles.append(layer.self_attn.register_forward_hook(functools.partial(on_attention, number)))
        if residual:
            handles.append(layer.register_forward_hook(functools.partial(on_output, number)))
        if neurons:
            handles.append(layer.mlp.down_proj.register_forward_pre_hook(functools.partial(on_neurons, number)))
    positions = (batch.mask.cumsum(1) - 1).clamp(min=0)
    try:
        parts.decoder(input_ids=batch.ids, attention_mask=batch.mask, position_ids=positions, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
