"""The path of information: what must hold exactly, and a circuit that is known because the model was made to have it."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from prompt_pairs import induction_pairs, one_batch, random_pairs
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

from stoney_rl.errors import StoneyError
from stoney_rl.interp import circuit
from stoney_rl.interp.attention import head_scores, repeated_random_tokens
from stoney_rl.interp.circuit import (
    REGIONS,
    Faithfulness,
    Node,
    circuit_mask,
    circuit_runs,
    default_sizes,
    edge_values,
    find_path,
    node_values,
    random_mask,
    regions,
)
from stoney_rl.interp.hooked import HookedModel, hook_model, load_hooked

INDUCTION = Path(__file__).with_name("induction")


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def model(request) -> HookedModel:
    return tiny.lively(request.param)


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    return tiny.lively("llama")


@pytest.fixture(scope="module")
def induction() -> HookedModel:
    return load_hooked(str(INDUCTION))


@pytest.fixture(scope="module")
def path(induction):
    pairs = induction_pairs(32, 12, vocabulary=range(2, induction.d_vocab))
    return find_path(induction, pairs[:16], pairs[16:], draws=20)


def known_heads(model: HookedModel) -> tuple[int, list[int]]:
    """The previous-token head of layer 0 and the induction heads of layer 1, by what they look at."""
    scores = head_scores(model, repeated_random_tokens(model, 16, 20, 0))
    previous, looking = scores["previous_token"].mean(0), scores["induction"].mean(0)
    assert (previous > 0.5).sum() == 1
    return int(previous[0].argmax()), (looking[1] > 0.4).nonzero().flatten().tolist()


def every_node(shape: torch.Size) -> list[Node]:
    return [circuit._node(index, shape) for index in range(shape.numel())]


def shape_of(model: HookedModel) -> torch.Size:
    return torch.Size([model.n_layers, len(REGIONS), model.n_heads + 1])


# Regions


def test_positions_are_told_apart():
    pairs = one_batch(random_pairs([6, 8]))
    differs = pairs.clean.ids != pairs.corrupt.ids
    found = regions(pairs)
    assert found[0, :2].tolist() == [-1, -1] and found[:, -1].tolist() == [2, 2]
    assert torch.equal(found == 0, differs) and differs.sum(1).tolist() == [2, 2]
    assert (found[~differs][:-1] != 0).all()


def test_a_word_differs_as_a_whole_but_the_last_token_is_the_last():
    (pair,) = random_pairs([8])
    pair = replace(pair, clean=(9, 1, 2, 3, 4, 5, 6, 7), corrupt=(9, 1, 8, 3, 4, 5, 8, 7))
    assert regions(one_batch([pair])).tolist() == [[1, 1, 0, 1, 1, 1, 0, 2]]
    spans = [[(0, 1), (1, 4), (4, 6), (6, 8)]]
    assert regions(one_batch([pair]), spans).tolist() == [[1, 0, 0, 0, 1, 1, 0, 2]]


# Circuits


def test_a_full_circuit_is_exactly_the_model_and_an_empty_one_exactly_the_corrupt_run(model):
    other, *rest = random_pairs([5, 7, 9])
    other = replace(other, corrupt=(*other.corrupt[:-1], 5))  # the last token's own embedding reaches the answer
    pairs = one_batch([other, *rest])
    shape = shape_of(model)
    masks = [torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)]
    full, empty, circuits = circuit_runs(model, pairs, regions(pairs), masks=masks)
    assert torch.equal(circuits[:, 1], full) and torch.equal(circuits[:, 0], empty)
    assert not torch.isclose(full, empty, atol=1e-3).any()
    result = Faithfulness([0, shape.numel()], circuits, circuits[..., None], full, empty)
    if result.share() is not None:
        assert result.share().tolist() == [0.0, 1.0]


def test_what_is_outside_of_a_circuit_is_what_transformer_lens_patches(model):
    from transformer_lens.patching import get_act_patch_attn_head_out_all_pos

    pairs = one_batch(random_pairs([6, 6]))
    _, cache = model.bridge.run_with_cache(pairs.corrupt.ids)
    expected = get_act_patch_attn_head_out_all_pos(
        model.bridge, pairs.clean.ids, cache, pairs.difference, reduce="none"
    )
    masks = []
    for layer in range(model.n_layers):
        for head in range(model.n_heads):
            masks.append(torch.ones(shape_of(model), dtype=torch.bool))
            masks[-1][layer, :, head] = False
    _, _, circuits = circuit_runs(model, pairs, regions(pairs), masks=masks)
    assert torch.allclose(circuits, expected.values.flatten(0, 1).T, atol=1e-5)


def test_a_node_is_a_region_of_a_head(llama):
    pairs = one_batch(random_pairs([6, 8]))
    groups = regions(pairs)
    mask = torch.ones(shape_of(llama), dtype=torch.bool)
    mask[0, REGIONS.index("elsewhere"), 2] = mask[1, REGIONS.index("last"), -1] = False
    corrupt = llama.run(pairs.corrupt, read=["blocks.0.attn.hook_z", "blocks.1.hook_mlp_out"])

    def head(z):
        z = z.clone()
        z[:, :, 2] = torch.where((groups == 1)[..., None], corrupt["blocks.0.attn.hook_z"][:, :, 2], z[:, :, 2])
        return z

    def mlp(out):
        return torch.cat([out[:, :-1], corrupt["blocks.1.hook_mlp_out"][:, -1:]], 1)

    edits = {"blocks.0.attn.hook_z": head, "blocks.1.hook_mlp_out": mlp}
    expected = pairs.difference(llama.run(pairs.clean, edit=edits).logits)
    _, _, circuits = circuit_runs(llama, pairs, groups, masks=[mask])
    assert torch.equal(circuits[:, 0], expected)


def test_a_circuit_holds_the_first_of_the_ranking_and_a_random_one_as_many_of_each_layer_and_kind():
    shape = torch.Size([5, 3, 9])
    generator = torch.Generator().manual_seed(0)
    ranking = torch.randperm(shape.numel(), generator=generator)
    for size in default_sizes(shape.numel()):
        mask = circuit_mask(ranking, size, shape)
        assert mask.flatten().nonzero().flatten().tolist() == sorted(ranking[:size].tolist())
        other = random_mask(mask, generator)
        assert torch.equal(other[..., :-1].sum((1, 2)), mask[..., :-1].sum((1, 2)))
        assert torch.equal(other[..., -1].sum(1), mask[..., -1].sum(1))
    mask = circuit_mask(ranking, 40, shape)
    drawn = torch.stack([random_mask(mask, generator) for _ in range(300)]).float().mean(0)
    expected = mask[..., :-1].float().mean((1, 2))[:, None, None].expand(5, 3, 8)
    assert (drawn[..., :-1] - expected).abs().max() < 0.15  # every head of a layer, in every region, as often


def test_sizes():
    assert default_sizes(8) == [0, 1, 2, 4, 8] and default_sizes(9) == [0, 1, 2, 4, 8, 9] and default_sizes(1) == [0, 1]


def test_faithfulness_is_a_share_of_means():
    full, empty = torch.tensor([5.0, 3.0]), torch.tensor([1.0, 1.0])  # gaps 4 and 2
    runs = torch.tensor([[1.0, 3.0, 5.0], [1.0, 4.0, 3.0]])
    random = torch.stack([empty[:, None].expand(2, 3), runs], -1)
    result = Faithfulness([0, 4, 9], runs, random, full, empty)
    assert result.share().tolist() == [0.0, pytest.approx(5 / 6), 1.0]
    assert result.random_share().tolist() == [[0.0, 0.0], [0.0, pytest.approx(5 / 6)], [0.0, 1.0]]
    assert (result.smallest(0.8), result.smallest(0.9), result.smallest(1.1)) == (4, 9, None)
    nothing = Faithfulness([0, 4, 9], runs, random, empty, full)
    assert nothing.share() is None and nothing.random_share() is None and nothing.smallest(0.8) is None


# Edges


def test_the_edges_of_a_sender_add_up_to_its_value(model):
    pairs = one_batch(random_pairs([5, 7, 9]))
    groups = regions(pairs)
    if model.post_norm:
        with pytest.raises(StoneyError, match="a norm stands behind attention"):
            edge_values(model, pairs, groups, nodes=[])
        return
    _, embedding, values = node_values(model, pairs, groups, steps=3)
    nodes = [Node("embedding", "differing"), *every_node(values.shape[1:]), Node("logits", "last")]
    table = edge_values(model, pairs, groups, nodes=nodes, steps=3)
    sums = torch.cat([embedding[:, :1], values.flatten(1)], 1)
    assert torch.allclose(table.sum(2)[:, :-1], sums, atol=1e-5 * float(sums.abs().max()))
    assert sums.abs().max() > 0.01 and not table[:, -1].any()
    for sender, receiver in (table != 0).any(0).nonzero().tolist():
        first, second = nodes[sender], nodes[receiver]
        assert first.kind == "embedding" or second.kind == "logits" or (
            first.layer < second.layer or (first.layer == second.layer and (first.kind, second.kind) == ("head", "mlp"))
        )  # fmt: skip


def test_edges_are_those_of_transformer_lens(monkeypatch):
    from transformers import AutoModelForCausalLM

    config = tiny.model().config
    config.num_key_value_heads = config.num_attention_heads  # it refuses grouped queries
    torch.manual_seed(0)
    several = hook_model(AutoModelForCausalLM.from_config(config).eval(), tiny.tokenizer())
    pairs = one_batch(random_pairs([6]))
    nodes = every_node(shape_of(several))
    monkeypatch.setattr(circuit, "midpoints", lambda steps: [0.0])
    groups = regions(pairs)
    table = edge_values(several, pairs, groups, nodes=[*nodes, Node("logits", "last")], steps=1)[0]
    several.bridge.requires_grad_(True)  # what it takes gradients through
    result = attribution_patch(
        several.bridge, pairs.clean.ids, pairs.corrupt.ids, lambda logits: pairs.difference(logits).sum(),
        EdgeAttributionConfig(granularity="edge"),
    )  # fmt: skip

    # Its readers are queries, keys and values at a position; its edges are summed over regions of the sender and over
    # all positions and all three of a reader, so ours are summed over the receiver's regions.
    expected: dict[tuple, float] = {}
    for (writer, reader), value in result.edge_scores.items():
        if writer.kind == "embed":
            continue
        kinds = {"attn_head_out": "head", "mlp_out": "mlp", "mlp_in": "mlp", "logits": "logits"}
        sender = (kinds[writer.kind], writer.layer, writer.head, int(groups[0, writer.position]))
        to = kinds.get(reader.kind, "head")
        receiver = (to, None if to == "logits" else reader.layer, reader.head)
        expected[sender, receiver] = expected.get((sender, receiver), 0) + value
    ours: dict[tuple, float] = {}
    for i, sender in enumerate(nodes):
        for j, receiver in enumerate([*nodes, Node("logits", "last")]):
            key = (
                (sender.kind, sender.layer, sender.head, REGIONS.index(sender.region)),
                (receiver.kind, receiver.layer, receiver.head),
            )
            ours[key] = ours.get(key, 0) + float(table[i, j])
    assert len(expected) > 100
    largest = max(map(abs, expected.values()))
    for key, value in ours.items():
        assert value == pytest.approx(expected.get(key, 0.0), abs=1e-4 * largest)


def test_a_padded_batch_is_each_pair_alone(llama):
    together = random_pairs([5, 7, 9])
    nodes = [Node("embedding", "differing"), *every_node(shape_of(llama)), Node("logits", "last")]
    masks = [
        circuit_mask(torch.randperm(30, generator=torch.Generator().manual_seed(seed)), 15, shape_of(llama))
        for seed in (0, 1)
    ]

    def measured(pairs):
        batch = one_batch(pairs)
        groups = regions(batch)
        return (
            *node_values(llama, batch, groups, steps=2),
            *circuit_runs(llama, batch, groups, masks=masks),
            edge_values(llama, batch, groups, nodes=nodes, steps=2),
        )

    many = measured(together)
    for row, pair in enumerate(together):
        for all_rows, one in zip(many, measured([pair]), strict=True):
            assert torch.allclose(all_rows[row], one[0], atol=1e-4, rtol=1e-4, equal_nan=True)


# The whole


def test_the_known_circuit_is_found(induction, path):
    """Layer 0's previous-token head at what follows A and C, and layer 1's induction heads at the last token."""
    previous, looking = known_heads(induction)
    strength = path.values.mean(0).abs()
    heads = [path.nodes[index] for index in strength.argsort(descending=True) if path.nodes[index].kind == "head"]
    assert heads[0] == Node("head", "elsewhere", 0, previous)
    lookers = [Node("head", "last", 1, head) for head in looking]
    assert lookers and set(lookers) <= set(heads[: 2 + induction.n_heads])
    between = {
        (path.nodes[sender], path.nodes[receiver]): float(value.mean())
        for (sender, receiver), value in path.edges.items()
        if path.nodes[sender].kind == path.nodes[receiver].kind == "head"
    }
    total = sum(map(abs, between.values()))
    assert all(between[heads[0], looker] > 0.05 * total for looker in lookers)
    assert sum(between[heads[0], looker] for looker in lookers) > 0.5 * total


def test_the_known_circuit_is_faithful_and_random_ones_are_not(path):
    result = path.faithfulness
    share, random = result.share(), result.random_share()
    assert result.sizes == [0, 1, 2, 4, 8, 16, 30] and share[0] == 0 and share[-1] == 1
    assert result.smallest(0.8) <= 8
    at = result.sizes.index(8)
    assert share[at] > random[at].max() + 0.3


def test_a_path_is_in_order_and_its_values_are_the_attributions(induction):
    pairs = induction_pairs(6, 10, vocabulary=range(2, induction.d_vocab))
    path = find_path(induction, pairs[:4], pairs[4:], drawn=10, sizes=[3], draws=2, steps=3, batch_size=2)
    assert len(path.nodes) == 1 + 10 + 1 and path.nodes[-1] == Node("logits", "last")
    assert all(
        (a.layer, REGIONS.index(a.region)) <= (b.layer, REGIONS.index(b.region)) for a, b in pairwise(path.nodes[1:-1])
    )
    assert path.faithfulness.circuit.shape == (2, 1) and path.faithfulness.random.shape == (2, 1, 2)
    for row, pair in enumerate(pairs[:4]):
        batch = one_batch([pair])
        gap, embedding, values = node_values(induction, batch, regions(batch), steps=3)
        expected = [
            values[0, node.layer, REGIONS.index(node.region), -1 if node.head is None else node.head]
            for node in path.nodes[1:-1]
        ]
        assert torch.allclose(path.values[row], torch.stack([embedding[0, 0], *expected, gap[0]]), atol=1e-4)
    strongest = path.values[:, 1:-1].mean(0).abs().min()
    everything = torch.stack(
        [node_values(induction, one_batch([p]), regions(one_batch([p])), steps=3)[2][0] for p in pairs[:4]]
    )
    assert (everything.mean(0).abs() > strongest + 1e-4).sum() <= 9


def test_a_cluster_in_both_halves_is_refused(llama):
    pairs = random_pairs([5, 6])
    with pytest.raises(StoneyError, match=r"1 clusters have pairs in both halves \(1, "):
        find_path(llama, pairs, pairs[1:])


def test_a_path_has_no_edges_where_heads_do_not_add_up():
    gemma = tiny.lively("gemma2")
    pairs = random_pairs([5, 6])
    path = find_path(gemma, pairs[:1], pairs[1:], draws=1, steps=2)
    assert path.edges is None and torch.equal(path.faithfulness.circuit[:, -1], path.faithfulness.full)
