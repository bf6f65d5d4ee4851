"""Direct logit attribution: which parts of a model write its preference for one token over another.

    parts = component_attribution(model, pairs.clean, pairs.answer, pairs.wrong)
    parts.attention                                                                 # [row, layer], in logits
    heads = head_attribution(model, pairs.clean, pairs.answer, pairs.wrong)         # [row, layer, head]
    neuron_attribution(model, pairs.clean, pairs.answer, pairs.wrong, [3])          # [row, layer, neuron]

1. The residual stream at a row's last position is a sum: the embedding, and what each attention and each MLP added.
2. The final RMS norm divides it by a number, sigma = sqrt(mean(x^2) + eps), and multiplies each coordinate by a weight;
   the unembedding is linear. With sigma as it was in this pass, a difference of logits is a sum too:

       logit[answer] - logit[wrong] = sum of (part . direction) / sigma + b_U[answer] - b_U[wrong]
       direction = final_norm_weight * (W_U[:, answer] - W_U[:, wrong])

3. An attention is the sum of what its heads write (z W_O), an MLP of what its neurons write (activation x W_out); plus,
   in a model that has one, a bias that belongs to none of them.
4. ``completeness`` measures whether these sums hold in the very model that is analysed.

Elhage et al. 2021, 'A Mathematical Framework for Transformer Circuits'; differences of logits: Wang et al., arXiv
2211.00593. Only the direct path is counted: what a head does by changing what later layers read is not in its number.
The logits are those before any soft cap. The weights are used raw: no second copy of the model with folded norms.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp.hooked import Batch, HookedModel

# From an activation at the last position, [row, ...], to its dot product with the direction, [row] or [row, part].
Projection = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Components:
    """float32 on the CPU, in logits; ``embedding``, ``attention``, ``mlp`` and ``bias`` add up to ``difference``.

    ``embedding`` [row]; ``attention`` and ``mlp`` [row, layer]; ``bias`` [row]: b_U[answer] - b_U[wrong], 0 in most
    models; ``difference`` [row]: the model's own logit[answer] - logit[wrong], before any soft cap; ``sigma`` [row]:
    what the final norm divided by.
    """

    embedding: torch.Tensor
    attention: torch.Tensor
    mlp: torch.Tensor
    bias: torch.Tensor
    difference: torch.Tensor
    sigma: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        return self.embedding + self.attention.sum(1) + self.mlp.sum(1) + self.bias


@dataclass(frozen=True)
class Completeness:
    """Largest absolute error of a sum over a batch, as a share of the largest absolute value of what it should give.

    ``components``: all components against the model's logit difference. ``heads``, ``neurons``: a layer's heads
    (neurons) and bias against its attention (MLP), over all layers; None in a post-norm model. fp32 gives about 1e-6;
    above 1e-4 in fp32, the attribution of this model is not to be believed.
    """

    components: float
    heads: float | None
    neurons: float | None


def component_attribution(model: HookedModel, batch: Batch, answer: torch.Tensor, wrong: torch.Tensor) -> Components:
    """What embedding, attentions and MLPs contribute to logit[answer] - logit[wrong] at the last position.

    ``answer``, ``wrong``: token ids, int64 [row]. Formula and source: see the module. Raises ``StoneyError`` for ids that
    don't fit the batch or the vocabulary, and for a model whose final norm is not an RMS norm.
    """
    direction = _direction(model, batch, answer, wrong)
    answer, wrong = answer.to(model.device), wrong.to(model.device)
    rows = torch.arange(len(batch), device=model.device)
    attention = [f"blocks.{layer}.hook_attn_out" for layer in range(model.n_layers)]
    mlp = [f"blocks.{layer}.hook_mlp_out" for layer in range(model.n_layers)]
    embedding, sigma, logits = "blocks.0.hook_resid_pre", "ln_final.hook_scale", "unembed.hook_out"
    read = dict.fromkeys([embedding, *attention, *mlp], lambda written: _dot(written[:, -1], direction))
    read[sigma] = lambda scale: scale[:, -1, 0].float()
    read[logits] = lambda found: found[rows, -1, answer].float() - found[rows, -1, wrong].float()
    run = model.run(batch, read=read)
    return Components(
        embedding=(run[embedding] / run[sigma]).cpu(),
        attention=torch.stack([run[hook] / run[sigma] for hook in attention], dim=1).cpu(),
        mlp=torch.stack([run[hook] / run[sigma] for hook in mlp], dim=1).cpu(),
        bias=(model.bridge.b_U[answer] - model.bridge.b_U[wrong]).float().cpu(),
        difference=run[logits].cpu(),
        sigma=run[sigma].cpu(),
    )


def head_attribution(model: HookedModel, batch: Batch, answer: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
    """What each query head contributes to logit[answer] - logit[wrong]: float32 [row, layer, head], in logits.

    A layer's heads add up to ``Components.attention``, less the share of a bias b_O where there is one. Raises
    ``StoneyError`` as ``component_attribution``, and for a post-norm model (Gemma 2 and 3).
    """
    _require_sums_of_parts(model)
    direction = _direction(model, batch, answer, wrong)

    def projection(layer: int) -> Projection:
        return lambda z: torch.einsum("rhe,hed,rd->rh", z.float(), model.W_O(layer).float(), direction)

    return _by_layer(model, batch, {f"blocks.{n}.attn.hook_z": projection(n) for n in range(model.n_layers)})


def neuron_attribution(
    model: HookedModel, batch: Batch, answer: torch.Tensor, wrong: torch.Tensor, layers: Sequence[int] | None = None
) -> torch.Tensor:
    """What each MLP neuron contributes to logit[answer] - logit[wrong]: float32 [row, layer, d_mlp], in logits.

    ``layers``: those to return, in that order; None: all (n_layers x d_mlp values a row). A layer's neurons add up to ``Components.mlp``, less the share of a bias.
    Raises ``StoneyError`` as ``head_attribution``, and for a layer that does not exist.
    """
    _require_sums_of_parts(model)
    layers = range(model.n_layers) if layers is None else layers
    if not layers or not all(0 <= layer < model.n_layers for layer in layers):
        raise StoneyError(f"{model.name}: layers {list(layers)}: give one or more of 0..{model.n_layers - 1}")
    direction = _direction(model, batch, answer, wrong)

    def projection(layer: int) -> Projection:
        return lambda activation: activation.float() * (direction @ model.W_out(layer).float().T)

    return _by_layer(model, batch, {f"blocks.{n}.mlp.hook_post": projection(n) for n in layers})


def completeness(model: HookedModel, batch: Batch, answer: torch.Tensor, wrong: torch.Tensor) -> Completeness:
    """How far the sums of parts are from the wholes on this batch; three forward passes, one in a post-norm model.

    Raises ``StoneyError`` as ``component_attribution``.
    """
    parts = component_attribution(model, batch, answer, wrong)
    components = _relative_error(parts.total, parts.difference)
    if model.post_norm:
        return Completeness(components, heads=None, neurons=None)
    per_logit = _direction(model, batch, answer, wrong).cpu() / parts.sigma[:, None]
    heads = head_attribution(model, batch, answer, wrong).sum(-1)
    neurons = neuron_attribution(model, batch, answer, wrong).sum(-1)
    blocks = model.bridge.blocks
    heads += torch.stack([_dot(_bias(block.attn, "b_O", model), per_logit) for block in blocks], dim=1)
    neurons += torch.stack([_dot(_bias(block.mlp, "b_out", model), per_logit) for block in blocks], dim=1)
    return Completeness(
        components, heads=_relative_error(heads, parts.attention), neurons=_relative_error(neurons, parts.mlp)
    )


def _direction(model: HookedModel, batch: Batch, answer: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
    """final_norm_weight * (W_U[:, answer] - W_U[:, wrong]), float32 [row, d_model]."""
    if model.bridge.cfg.normalization_type != "RMS":
        kind = model.bridge.cfg.normalization_type
        raise StoneyError(f"{model.name}: its final norm is {kind!r}; direct logit attribution is for RMS norms")
    for name, ids in (("answer", answer), ("wrong", wrong)):
        if ids.shape != (len(batch),) or not bool(((ids >= 0) & (ids < model.d_vocab)).all()):
            raise StoneyError(
                f"{name}: expected one token id below {model.d_vocab} for each of {len(batch)} rows, got {ids.tolist()}"
            )
    difference = model.W_U[:, answer.to(model.device)].float() - model.W_U[:, wrong.to(model.device)].float()
    return model.final_norm_weight.float() * difference.T


def _by_layer(model: HookedModel, batch: Batch, projections: dict[str, Projection]) -> torch.Tensor:
    """Each hook's projection at the last position, over sigma: float32 [row, hook, part] on the CPU."""
    sigma = "ln_final.hook_scale"
    read = {hook: lambda activation, hook=hook: projections[hook](activation[:, -1]) for hook in projections}
    run = model.run(batch, read=read | {sigma: lambda scale: scale[:, -1].float()})
    return torch.stack([run[hook] / run[sigma] for hook in projections], dim=1).cpu()


def _require_sums_of_parts(model: HookedModel) -> None:
    if model.post_norm:
        raise StoneyError(
            f"{model.name}: a norm stands behind its attention and MLP, so that heads and neurons don't add up to what "
            "their layer writes; use component_attribution"
        )


def _dot(vectors: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    return (vectors.float() * direction).sum(-1)


def _bias(module: torch.nn.Module, name: str, model: HookedModel) -> torch.Tensor:
    bias = getattr(module, name, None)
    return torch.zeros(model.d_model) if bias is None else bias.detach().cpu()


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
