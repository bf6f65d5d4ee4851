"""Models in which it is known which heads and neurons two families of prompts go through: apart, or shared.

A family is a table: a prompt 'x y =' has one answer, drawn at random for every x and y of the family's own symbols. The
last position sees only '=', so heads must bring x and y there; the answer is no sum of what x and y say by themselves,
so neurons must take part. While a family's rows are trained, what the heads and neurons outside its set write has no
gradient and is left out at random, for every row anew: the family learns to go through its set and to bear anything
from the others. Heads 0 and 1 share keys and values (grouped queries), so do 4 and 5: sets are made of whole groups.
"""

from dataclasses import dataclass

import numpy as np
import torch
from make_induction_model import new_tokenizer

from stoney_rl.interp.hooked import HookedModel, hook_model
from stoney_rl.interp.localise import PartSet
from stoney_rl.interp.pairs import PromptPair, swapped

LAYERS, HEADS, NEURONS = 2, 8, 256
SYMBOLS, ANSWERS = 10, 8  # of each family
EQUALS = 2 + 2 * (SYMBOLS + ANSWERS)  # the tokens before it: two special ones, and the two families'
STEPS, ROWS, LEARNING_RATE = 700, 128, 5e-3

ONE = (range(2), range(64))  # heads and neurons of every layer
OTHER = (range(4, 6), range(128, 192))


@dataclass(frozen=True)
class Planted:
    """``pairs``: 50 couples of each family, no prompt in two. ``sets``: what each family was trained through."""

    model: HookedModel
    pairs: dict[str, list[PromptPair]]
    sets: dict[str, PartSet]
    accuracy: dict[str, float]


def planted(seed: int, *, shared: bool) -> Planted:
    """A model trained on families 'one' and 'other', through the same parts or through different ones."""
    rng = np.random.default_rng(seed)
    tables = {name: _table(number, rng) for number, name in enumerate(("one", "other"))}
    parts = {"one": ONE, "other": ONE if shared else OTHER}
    model = _trained(tables, parts, seed)
    accuracy = {name: _accuracy(model, *table) for name, table in tables.items()}
    pairs = {name: _couples(name, *table, rng) for name, table in tables.items()}
    sets = {name: _part_set(*chosen) for name, chosen in parts.items()}
    return Planted(hook_model(model, new_tokenizer(), "planted"), pairs, sets, accuracy)


def _table(number: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [entry, 3] and answers [entry], token ids."""
    first = 2 + number * (SYMBOLS + ANSWERS)
    x, y = np.indices((SYMBOLS, SYMBOLS)).reshape(2, -1) + first
    prompts = np.stack([x, y, np.full_like(x, EQUALS)], axis=1)
    answers = first + SYMBOLS + rng.permutation(len(x)) % ANSWERS
    return torch.from_numpy(prompts), torch.from_numpy(answers)


def _trained(tables: dict, parts: dict, seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

    config = LlamaConfig(
        vocab_size=66, hidden_size=64, intermediate_size=NEURONS, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2, max_position_embeddings=32, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).train()
    ids, answers = (torch.cat(column) for column in zip(*tables.values(), strict=True))
    family = torch.arange(len(tables)).repeat_interleave(len(ids) // len(tables))
    heads = _allowed([chosen[0] for chosen in parts.values()], HEADS)
    neurons = _allowed([chosen[1] for chosen in parts.values()], NEURONS)
    rows: dict[str, torch.Tensor] = {}  # of the present step
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(_through(heads, 64 // HEADS, rows))
        layer.mlp.down_proj.register_forward_hook(_through(neurons, 1, rows))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, STEPS // 20, STEPS)
    for _ in range(STEPS):
        chosen = torch.randint(len(ids), (ROWS,))
        rows["family"] = family[chosen]
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids[chosen]).logits[:, -1], answers[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for layer in model.model.layers:
        layer.self_attn.o_proj._forward_hooks.clear()
        layer.mlp.down_proj._forward_hooks.clear()
    return model.eval()


def _allowed(chosen: list[range], n: int) -> torch.Tensor:
    """Whether a part belongs to a family's set, float [family, part]."""
    return torch.stack([torch.tensor([float(part in parts) for part in range(n)]) for parts in chosen])


def _through(allowed: torch.Tensor, width: int, rows: dict):
    """A forward hook of a linear module whose input is made of parts of ``width`` numbers."""

    def hook(module: torch.nn.Linear, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        own = allowed[rows["family"]]
        others = (1 - own) * torch.randint(2, own.shape)
        own, others = (mask.repeat_interleave(width, 1)[:, None] for mask in (own, others))
        weight = module.weight
        return inputs[0] * own @ weight.T + (inputs[0] * others @ weight.T).detach()

    return hook


def _accuracy(model, prompts: torch.Tensor, answers: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(input_ids=prompts).logits[:, -1].argmax(-1) == answers).float().mean())


def _couples(name: str, prompts: torch.Tensor, answers: torch.Tensor, rng: np.random.Generator) -> list[PromptPair]:
    """Entries two by two, in random order, where their answers differ; both directions."""
    order = rng.permutation(len(prompts)).tolist()
    pairs = []
    while order:
        one = order.pop()
        fits = [other for other in order if answers[other] != answers[one]]
        if not fits:
            break
        order.remove(other := fits[0])
        clean, corrupt = tuple(prompts[one].tolist()), tuple(prompts[other].tolist())
        pair = PromptPair(
            clean, corrupt, int(answers[one]), int(answers[other]), f"{name} {one} {other}", name, ("", "", "", "")
        )
        pairs += [pair, swapped(pair)]
    return pairs


def _part_set(heads: range, neurons: range) -> PartSet:
    layers = range(LAYERS)
    return PartSet(
        heads=tuple((layer, head) for layer in layers for head in heads),
        neurons=tuple((layer, neuron) for layer in layers for neuron in neurons),
    )
