"""The path of information for prompt pairs: which heads and MLPs carry the answer, at which words, and who feeds whom.

    path = find_path(model, choosing, reporting)            # two halves of the pairs, no cluster in both
    path.faithfulness.share()                               # [size]: how much of the model's answer so few nodes keep
    path.faithfulness.smallest(0.8)                         # nodes that it takes
    path.nodes, path.values, path.edges                     # a small graph, to draw

1. Positions fall into regions: where the prompts of a pair differ, the last token, elsewhere.
2. A node is a head or an MLP in a region. Its value is its attribution (patching.attribute) on the choosing pairs;
   nodes are ranked by the size of the mean.
3. The circuit of k nodes is run in earnest on the reporting pairs: the clean prompt, with each head and MLP outside of
   it set to what it is on the corrupt prompt. The embeddings are the input of every circuit but the empty one.
   faithfulness = (m_C - m_none) / (m_all - m_none) (arXiv 2304.14997, 2504.13151); m_all: nothing replaced; m_none:
   everything, which is the corrupt run.
4. Beside it stand random circuits with as many heads and MLPs in each layer.
5. An edge is what a sender's change does through one receiver alone, to first order (EAP, arXiv 2310.10348; along the
   path of inputs, 2403.17806): a_clean - a_corrupt, as written to the residual stream, times the gradient at the
   receiver's input that comes through this receiver: through the queries of its region, and keys and values anywhere.
   Over all receivers, the logits among them, the edges of a sender add up to its value.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp.hooked import Edit, HookedModel, Run
from stoney_rl.interp.pairs import PairBatch, PromptPair, batched
from stoney_rl.interp.patching import SITES, STEPS, attribute, mean_gap, midpoints

REGIONS = ("differing", "elsewhere", "last")
Spans = Callable[[PromptPair], Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class Node:
    """``kind``: embedding, head, mlp or logits; ``region``: one of REGIONS; ``layer`` and ``head`` where it has one."""

    kind: str
    region: str
    layer: int | None = None
    head: int | None = None


@dataclass(frozen=True)
class Faithfulness:
    """m of circuits, logits: ``circuit`` [pair, size], ``random`` [pair, size, draw], ``full`` and ``empty`` [pair]."""

    sizes: list[int]
    circuit: torch.Tensor
    random: torch.Tensor
    full: torch.Tensor
    empty: torch.Tensor

    def share(self) -> torch.Tensor | None:
        """(m_C - m_none) / (m_all - m_none), each a mean over pairs [size]; None without a gap (``mean_gap``)."""
        gap = mean_gap(self.full, self.empty)
        return None if gap is None else _share(self.circuit - self.empty[:, None], gap)

    def random_share(self) -> torch.Tensor | None:
        """The same for the random circuits [size, draw]."""
        gap = mean_gap(self.full, self.empty)
        return None if gap is None else _share(self.random - self.empty[:, None, None], gap)

    def smallest(self, threshold: float) -> int | None:
        """The first size whose faithfulness is at least ``threshold``; None if there is none."""
        share = self.share()
        reached = [] if share is None else (share >= threshold).nonzero().flatten().tolist()
        return self.sizes[reached[0]] if reached else None


@dataclass(frozen=True)
class Path:
    """``nodes``: the embeddings that differ, the strongest nodes in order of layer and region, the logits.

    ``values`` [pair, node]: attributions on the choosing pairs, logits; NaN where a pair lacks the region. The logits'
    own is the whole gap. ``edges``: (sender, receiver), as indices of nodes, -> [pair], logits; without those that are
    0 in every pair. None for models with a norm behind attention and MLP, where heads don't add up.
    ``faithfulness``: on the reporting pairs.
    """

    nodes: list[Node]
    values: torch.Tensor
    edges: dict[tuple[int, int], torch.Tensor] | None
    faithfulness: Faithfulness


def find_path(
    model: HookedModel,
    choosing: Sequence[PromptPair],
    reporting: Sequence[PromptPair],
    *,
    spans: Spans | None = None,
    drawn: int = 16,
    sizes: Sequence[int] | None = None,
    draws: int = 5,
    seed: int = 0,
    steps: int = STEPS,
    batch_size: int = 16,
) -> Path:
    """All of the module's list.

    ``spans``: a pair's words as token ranges (start, end), so that a word in which prompts differ counts as a whole;
    without it, tokens. ``drawn``: nodes of the graph. ``sizes``: of circuits; by default none, powers of two, all.
    ``draws``: random circuits a size. Raises ``StoneyError`` if a cluster has pairs in both halves.
    """
    shared = {pair.cluster for pair in choosing} & {pair.cluster for pair in reporting}
    if shared:
        raise StoneyError(f"{len(shared)} clusters have pairs in both halves ({min(shared)}, ...); split by cluster")

    def over_batches(pairs: Sequence[PromptPair], function: Callable) -> tuple[torch.Tensor, ...]:
        return _over_batches(pairs, batch_size, model.pad_token_id, spans, function)

    gap, embedding, values = over_batches(choosing, lambda *batch: node_values(model, *batch, steps=steps))
    ranking = values.nanmean(0).nan_to_num().abs().flatten().argsort(descending=True, stable=True)
    sizes = default_sizes(len(ranking)) if sizes is None else sorted(set(sizes))
    masks = [circuit_mask(ranking, size, values.shape[1:]) for size in sizes]
    generator = torch.Generator().manual_seed(seed)
    random_masks = [random_mask(mask, generator) for mask in masks for _ in range(draws)]
    full, empty, circuits = over_batches(
        reporting, lambda *batch: circuit_runs(model, *batch, masks=[*masks, *random_masks])
    )

    chosen = ranking[:drawn].sort().values
    inputs = embedding.nan_to_num().any(0).nonzero().flatten()
    nodes = [
        *(Node("embedding", REGIONS[region]) for region in inputs),
        *(_node(int(index), values.shape[1:]) for index in chosen),
        Node("logits", "last"),
    ]
    edges = None
    if not model.post_norm:
        (table,) = over_batches(choosing, lambda *batch: (edge_values(model, *batch, nodes=nodes, steps=steps),))
        edges = {tuple(index): table[:, *index] for index in table.any(0).nonzero().tolist()}
    return Path(
        nodes,
        torch.cat([embedding[:, inputs], values.flatten(1)[:, chosen], gap[:, None]], dim=1),
        edges,
        Faithfulness(
            sizes,
            circuits[:, : len(masks)],
            circuits[:, len(masks) :].unflatten(1, (len(masks), draws)),
            full,
            empty,
        ),
    )


def regions(pairs: PairBatch, spans: Sequence[Sequence[tuple[int, int]]] | None = None) -> torch.Tensor:
    """The region of each position, index of REGIONS, int64 [pair, position]; -1 for padding.

    ``spans``: for each pair the token ranges (start, end) of its words, counted from the prompt's own first token; a
    word that differs in one token then differs as a whole. The last token is 'last' in any case.
    """
    differs = pairs.clean.ids != pairs.corrupt.ids
    for row, words in enumerate(spans or ()):
        padding = int((pairs.clean.mask[row] == 0).sum())
        for start, end in words:
            word = differs[row, padding + start : padding + end]
            word |= word.any()
    found = torch.where(differs, 0, 1)
    found[:, -1] = 2
    return found.masked_fill(pairs.clean.mask == 0, -1)


def node_values(
    model: HookedModel, pairs: PairBatch, groups: torch.Tensor, *, steps: int = STEPS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gap m_clean - m_corrupt [pair]; attributions of the embeddings [pair, region] and of all nodes [pair, layer,
    region, unit]: the heads, then the MLP. Logits; NaN where a pair lacks the region. ``groups``: ``regions(pairs)``.
    """
    effects = attribute(model, pairs, ["embedding", "head", "mlp_out"], groups=groups, steps=steps)
    heads, mlps = effects["head"].values, effects["mlp_out"].values[..., None]
    return (
        effects["head"].clean - effects["head"].corrupt,
        effects["embedding"].values[:, 0],
        torch.cat([heads, mlps], -1),
    )


def default_sizes(n: int) -> list[int]:
    """0, powers of two, ``n``."""
    return [0, *(2**power for power in range(n.bit_length()) if 2**power < n), n]


def circuit_mask(ranking: torch.Tensor, size: int, shape: torch.Size) -> torch.Tensor:
    """Whether a node belongs to the circuit of the first ``size`` of ``ranking``, bool [layer, region, unit]."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[ranking[:size]] = True
    return mask


def random_mask(mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random circuit with as many heads and as many MLPs as ``mask`` in each layer, bool [layer, region, unit]."""

    def shuffled(cells: torch.Tensor) -> torch.Tensor:
        order = torch.randperm(cells.numel(), generator=generator)
        return cells.flatten()[order].view_as(cells)

    return torch.stack([torch.cat([shuffled(layer[:, :-1]), shuffled(layer[:, -1:])], -1) for layer in mask])


def circuit_runs(
    model: HookedModel, pairs: PairBatch, groups: torch.Tensor, *, masks: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """m of the clean run [pair], of the corrupt run [pair], and of each circuit [pair, mask], in true runs, logits.

    ``masks``: bool [layer, region, unit], as ``circuit_mask`` makes them.
    """
    corrupt = model.run(pairs.corrupt, read=[SITES["embedding"], *_node_hooks(model)])
    found = []
    for mask in masks:
        edits = dict(_outside(model, mask, groups.clamp(min=0), corrupt))
        found.append(pairs.difference(model.run(pairs.clean, edit=edits).logits).cpu())
    clean = pairs.difference(model.run(pairs.clean).logits).cpu()
    return clean, pairs.difference(corrupt.logits).cpu(), torch.stack(found, 1)


def edge_values(
    model: HookedModel, pairs: PairBatch, groups: torch.Tensor, *, nodes: Sequence[Node], steps: int = STEPS
) -> torch.Tensor:
    """Edges between ``nodes``, logits, float32 [pair, sender, receiver]; 0 where the sender is not before the receiver.

    Raises ``StoneyError`` for models with a norm behind attention and MLP: their heads don't add up in the residual.
    """
    if model.post_norm:
        raise StoneyError(f"{model.name}: a norm stands behind attention and MLP, so edges between heads don't exist")
    written = [SITES["embedding"], *_node_hooks(model)]
    clean, corrupt = model.run(pairs.clean, read=written), model.run(pairs.corrupt, read=written)
    senders = [_written(model, node, clean, corrupt, groups) for node in nodes]
    table = torch.zeros(len(pairs), len(nodes), len(nodes))
    for alpha in midpoints(steps):
        embedding = torch.lerp(corrupt[SITES["embedding"]], clean[SITES["embedding"]], alpha)
        through = _gradients_through(model, pairs, groups, nodes, embedding)
        for receiver, gradient in through.items():
            for sender, change in enumerate(senders):
                if change is not None and _stage(nodes[sender]) < _stage(nodes[receiver]):
                    table[:, sender, receiver] += (change * gradient).sum((1, 2)).float().cpu() / steps
    return table


def _gradients_through(
    model: HookedModel, pairs: PairBatch, groups: torch.Tensor, nodes: Sequence[Node], embedding: torch.Tensor
) -> dict[int, torch.Tensor]:
    """For each receiver among ``nodes``: dm/d(its input) through this node alone [pair, position, d_model].

    One forward pass; the whole backward pass gives dm/d(output) of the nodes, and a short one, inside each receiver,
    leads from its output to its input. That needs the graph, so it happens while the metric is computed.
    """
    receivers = {index: _ports(model, node) for index, node in enumerate(nodes) if node.kind != "embedding"}
    tensors: dict[str, torch.Tensor] = {}
    found: dict[int, torch.Tensor] = {}

    def keep(hook: str) -> Edit:
        return lambda activation: tensors.setdefault(hook, activation)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        m = pairs.difference(logits).sum()
        outputs = list(dict.fromkeys(output for _, output in receivers.values()))
        gradients = dict(
            zip(outputs, torch.autograd.grad(m, [tensors[o] for o in outputs], retain_graph=True), strict=True)
        )
        for index, (entry, output) in receivers.items():
            here = _inside(nodes[index], gradients[output], groups)
            found[index] = (
                here
                if entry == output
                else torch.autograd.grad(tensors[output], tensors[entry], here, retain_graph=True)[0]
            )
        return m

    edits = {hook: keep(hook) for ports in receivers.values() for hook in ports}
    edits[SITES["embedding"]] = lambda _: tensors.setdefault(SITES["embedding"], embedding.clone().requires_grad_())
    model.gradients(pairs.corrupt, metric, at=[SITES["embedding"]], edit=edits)
    return found


def _share(recovered: torch.Tensor, gap: float) -> torch.Tensor:
    """Mean over pairs as a share of ``gap``; in double precision on the way, so that all of it is exactly 1."""
    return (recovered.double().mean(0) / gap).float()


def _ports(model: HookedModel, node: Node) -> tuple[str, str]:
    """The hooks between which a receiver stands. The logits are read off the last residual stream directly."""
    if node.kind == "head":
        return SITES["resid_pre"].format(node.layer), SITES["head"].format(node.layer)
    if node.kind == "mlp":
        return f"blocks.{node.layer}.hook_resid_mid", SITES["mlp_out"].format(node.layer)
    final = f"blocks.{model.n_layers - 1}.hook_resid_post"
    return final, final


def _inside(node: Node, activation: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """The part of an activation that is the node's own, zeros elsewhere; the logits' is all of it."""
    if node.kind == "logits":
        return activation
    where = (groups == REGIONS.index(node.region)).to(activation.device)[..., None]
    if node.kind == "head":
        heads = torch.arange(activation.shape[2], device=activation.device) == node.head
        where = (where & heads)[..., None]
    return torch.where(where, activation, 0)


def _written(model: HookedModel, node: Node, clean: Run, corrupt: Run, groups: torch.Tensor) -> torch.Tensor | None:
    """What a node writes to the residual stream, clean minus corrupt [pair, position, d_model]; None for the logits."""
    if node.kind == "logits":
        return None
    hook = SITES["embedding"] if node.kind == "embedding" else _ports(model, node)[1]
    change = _inside(node, clean[hook] - corrupt[hook], groups)
    return change[:, :, node.head] @ model.W_O(node.layer)[node.head] if node.kind == "head" else change


def _outside(model: HookedModel, mask: torch.Tensor, groups: torch.Tensor, corrupt: Run) -> Iterator[tuple[str, Edit]]:
    """Edits that set all outside of a circuit to its corrupt value."""

    def replaced(hook: str, kept: torch.Tensor) -> tuple[str, Edit]:
        kept = kept.to(model.device)
        return hook, lambda activation: torch.where(kept, activation, corrupt[hook])

    if not mask.any():
        yield SITES["embedding"], lambda _: corrupt[SITES["embedding"]]
    for layer in range(model.n_layers):
        kept = mask[layer][groups]  # [pair, position, unit]
        if not kept.all():
            yield replaced(SITES["head"].format(layer), kept[..., :-1, None])
            yield replaced(SITES["mlp_out"].format(layer), kept[..., -1:])


def _node_hooks(model: HookedModel) -> list[str]:
    return [SITES[site].format(layer) for site in ("head", "mlp_out") for layer in range(model.n_layers)]


def _node(index: int, shape: torch.Size) -> Node:
    """The node at a flat index of [layer, region, unit]."""
    layer, region, unit = (int(part) for part in torch.unravel_index(torch.tensor(index), shape))
    is_mlp = unit == shape[-1] - 1
    return Node("mlp" if is_mlp else "head", REGIONS[region], layer, None if is_mlp else unit)


def _stage(node: Node) -> float:
    """When a node is computed: a layer's heads come before its MLP."""
    if node.layer is None:
        return -1 if node.kind == "embedding" else float("inf")
    return 2 * node.layer + (node.kind == "mlp")


def _over_batches(
    pairs: Sequence[PromptPair], size: int, pad_token_id: int, spans: Spans | None, function: Callable
) -> tuple[torch.Tensor, ...]:
    """``function(batch, regions)`` on batches of pairs of similar length; its tensors joined, in the order of ``pairs``."""
    order, parts = [], []
    for indices, batch in batched(pairs, size, pad_token_id):
        words = [spans(pairs[index]) for index in indices] if spans else None
        parts.append(function(batch, regions(batch, words)))
        order += indices
    back = torch.tensor(order).argsort()
    return tuple(torch.cat(column)[back] for column in zip(*parts, strict=True))
