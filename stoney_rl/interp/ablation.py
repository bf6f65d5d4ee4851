"""What a model loses without some of its parts: heads, MLPs and neurons, alone or in groups.

    reference = means(model, other_batch)          # or zeros(model), or draws(model, other_batch, batch, seed)
    without = ablate(reference, heads=[(0, 1), (3, 2)], mlps=[5])
    effects(model, batch, metric, [without])                  # [row, edit]

1. Choose what stands in for a part's activation: its mean over a reference batch, what it was at random tokens of that
   batch (resample), or zero. Zero is the crudest: a part may write a constant that everything behind it relies on.
2. An ablation is an edit dict for ``HookedModel.run``: the named parts' activations are replaced, all others kept as
   they are. Edits compose, in any order; an empty one changes nothing.
3. The effect is the metric with the edit minus the metric without, row by row.

Parts that do the same job hide one another: a head whose ablation costs nothing may still do the work. Ablate groups.
After Wang et al. 2022 (2211.00593, mean), Chan et al. 2022 (causal scrubbing, resample), Olsson et al. 2022
(2209.11895, zero). Heads are ablated at z, before the output projection. In post-norm models
(Gemma 2 and 3) that is still an exact intervention, though what the part wrote is not a term of the residual stream.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp.hooked import Batch, Edit, HookedModel

# Where each kind of part is replaced. Per position: z [head, d_head], MLP output [d_model], neurons [d_mlp].
HOOKS = {"heads": "attn.hook_z", "mlps": "hook_mlp_out", "neurons": "mlp.hook_post"}

Replacement = dict[str, torch.Tensor]  # hook -> what stands in, broadcast to the activation [row, position, ...]
Edits = dict[str, Edit]


def zeros(model: HookedModel, kinds: Iterable[str] = ("heads", "mlps")) -> Replacement:
    """Zero for every part of the given ``kinds`` (keys of ``HOOKS``)."""
    shapes = {"heads": (model.n_heads, model.d_head), "mlps": (model.d_model,), "neurons": (model.d_mlp,)}
    return {
        _hook(kind, layer): torch.zeros(shapes[kind], device=model.device)
        for kind in kinds
        for layer in range(model.n_layers)
    }


def means(model: HookedModel, reference: Batch, kinds: Iterable[str] = ("heads", "mlps")) -> Replacement:
    """Mean activation of every part over the tokens of ``reference``; padding does not count."""
    real = reference.mask.bool().to(model.device)
    return _read(model, reference, kinds, lambda activation: activation[real].float().mean(0))


def draws(
    model: HookedModel, reference: Batch, batch: Batch, seed: int, kinds: Iterable[str] = ("heads", "mlps")
) -> Replacement:
    """For each row and position of ``batch``, the activations at a random token of ``reference`` (never padding).

    All parts get theirs from the same token, so that a group is replaced by what it jointly was. [row, position, ...]
    for every part: memory grows with ``batch``. A draw is one sample; average effects over several seeds.
    """
    real = reference.mask.bool().to(model.device)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(int(real.sum()), batch.ids.shape, generator=generator).to(model.device)
    return _read(model, reference, kinds, lambda activation: activation[real][chosen])


def ablate(
    replacement: Replacement,
    *,
    heads: Iterable[tuple[int, int]] = (),
    mlps: Iterable[int] = (),
    neurons: Iterable[tuple[int, int]] = (),
) -> Edits:
    """Edits that put ``replacement`` in the place of heads (layer, head), MLPs (layer), neurons (layer, neuron).

    Raises ``StoneyError`` for a part that the model lacks, or of a kind that ``replacement`` was not made for.
    """
    chosen: dict[str, set[int]] = {}
    for kind, parts in (("heads", heads), ("neurons", neurons)):
        for layer, index in parts:
            chosen.setdefault(_hook(kind, layer), set()).add(index)
    edits = {hook: _replace(hook, replacement, indices) for hook, indices in chosen.items()}
    return edits | {_hook("mlps", layer): _replace(_hook("mlps", layer), replacement, None) for layer in mlps}


def compose(*edits: Mapping[str, Edit]) -> Edits:
    """One edit dict that does what all of them do; at a hook that several name, in the given order."""
    hooks = dict.fromkeys(hook for edit in edits for hook in edit)
    return {hook: _in_turn([edit[hook] for edit in edits if hook in edit]) for hook in hooks}


def effects(
    model: HookedModel,
    batch: Batch,
    metric: Callable[[torch.Tensor], torch.Tensor],
    edits: Sequence[Mapping[str, Edit]],
) -> torch.Tensor:
    """What each edit does to a metric: metric(edited) - metric(unedited), float32 [row, edit].

    ``metric``: logits [row, position, vocabulary] -> [row]. One forward pass an edit, and one without.
    """
    clean = metric(model.run(batch).logits).float().cpu()
    changed = [metric(model.run(batch, edit=edit).logits).float().cpu() for edit in edits]
    return torch.stack([edited - clean for edited in changed], dim=1)


def _hook(kind: str, layer: int) -> str:
    if kind not in HOOKS:
        raise StoneyError(f"no kind of part is called {kind!r}; known are {', '.join(HOOKS)}")
    return f"blocks.{layer}.{HOOKS[kind]}"


def _read(model: HookedModel, reference: Batch, kinds: Iterable[str], function: Edit) -> Replacement:
    hooks = [_hook(kind, layer) for kind in kinds for layer in range(model.n_layers)]
    return model.run(reference, read=dict.fromkeys(hooks, function)).activations


def _replace(hook: str, replacement: Replacement, indices: set[int] | None) -> Edit:
    """Replace heads or neurons ``indices``, or, for None, the whole activation."""
    if hook not in replacement:
        raise StoneyError(f"nothing stands in for {hook}; the replacement was made for {_listed(replacement)}")
    value = replacement[hook]
    chosen = torch.tensor(True) if indices is None else _chosen(hook, value, indices)
    chosen = chosen.to(value.device)
    return lambda activation: torch.where(chosen, value.to(activation.dtype), activation)


def _chosen(hook: str, value: torch.Tensor, indices: set[int]) -> torch.Tensor:
    """Which of the parts at ``hook``, as a mask that broadcasts over ``value``: [head, 1], or [neuron]."""
    per_part = (1,) if hook.endswith(HOOKS["heads"]) else ()
    n = value.shape[-1 - len(per_part)]
    if not indices <= set(range(n)):
        raise StoneyError(f"{hook}: has parts 0 to {n - 1}, not {', '.join(map(str, sorted(indices - set(range(n)))))}")
    mask = torch.zeros(n, dtype=torch.bool)
    mask[sorted(indices)] = True
    return mask.view(n, *per_part)


def _in_turn(functions: Sequence[Edit]) -> Edit:
    def edit(activation: torch.Tensor) -> torch.Tensor:
        for function in functions:
            activation = function(activation)
        return activation

    return edit


def _listed(replacement: Replacement) -> str:
    kinds = [kind for kind in HOOKS if any(hook.endswith("." + HOOKS[kind]) for hook in replacement)]
    layers = {int(hook.split(".")[1]) for hook in replacement}
    return f"{' and '.join(kinds)} of layers 0 to {max(layers)}" if layers else "no part"
