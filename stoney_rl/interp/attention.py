"""Where heads look: attention patterns, by token and by word, and what they are the pattern of.

    report = head_scores(model, batch)                          # every measure of every head, one forward pass
    report["induction"]                                         # [row, layer, head]
    by_word(attention_patterns(model, batch)[0], spans)         # [layer, head, word, word]

1. Run the model once. In the hook of each layer's pattern A [row, head, query, key], which is then forgotten:
2. All measures but one are a weighted sum of A: attention to the keys that a measure asks for, averaged over the
   queries that have such a key. The weights [row, measure, query, key] are the same for all heads: one matrix product.
3. Entropy is not linear, and is taken from A itself.
4. Where a row has no query to average over, the score is NaN: not measured, which is something else than 0.

Padding counts neither as query nor as key.
"""

from collections.abc import Iterable, Sequence

import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp.hooked import Batch, Edit, HookedModel

# What head_scores gives, each [row, layer, head].
MEASURES = ("entropy", "sink", "previous_token", "induction", "duplicate_token", "distance")


def head_scores(model: HookedModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Every measure in ``MEASURES`` for every head, float32 [row, layer, head] each, from one forward pass.

    entropy: see ``entropy``. The others are means over queries: sink: attention to the first token; previous_token: to
    the token before; duplicate_token: to earlier occurrences of the query's token; induction: to the tokens that followed
    those; distance: tokens between the query and what it looks at. The meaning of each is that of Olsson et al. 2022
    (2209.11895); sink: Xiao et al. 2023 (2309.17453). Induction and duplicate tokens say something about a head where
    the text repeats itself at random: give ``repeated_random_tokens``. NaN where no query of the row has such a key.
    """
    batch = batch.to(model.device)
    scores = each_layer(model, batch, range(model.n_layers), pattern_scores(batch))
    return dict(zip(MEASURES, scores.unbind(-1), strict=True))


def pattern_scores(batch: Batch, queries: torch.Tensor | None = None) -> Edit:
    """What makes of a layer's pattern [row, head, query, key] of ``batch`` its scores [row, head, measure], as
    MEASURES.

    ``queries``: those to average over, bool [row, query]; all by default.
    """
    asked = batch.mask if queries is None else queries.to(batch.mask)
    weights = torch.stack([_mean_weights(keys * asked[:, :, None]) for keys in _keys(batch)], dim=1).flatten(2).mT

    def scores(pattern: torch.Tensor) -> torch.Tensor:
        linear = pattern.float().flatten(2) @ weights
        return torch.cat([entropy(pattern, batch.mask, asked).unsqueeze(-1), linear], dim=-1)

    return scores


def attention_patterns(model: HookedModel, batch: Batch, layers: Iterable[int] | None = None) -> torch.Tensor:
    """Attention of each query to each key, float32 [row, layer, head, query, key]; 0 where either is padding.

    ``layers``: which, in which order; all by default. Grows with the square of the length: 30 layers of 9 heads take
    283 MB a row of 512 tokens.
    """
    real = _real(batch).to(model.device)

    def keep(pattern: torch.Tensor) -> torch.Tensor:
        return torch.where(real[:, None], pattern.float(), 0.0)

    return each_layer(model, batch, range(model.n_layers) if layers is None else layers, keep)


def by_word(patterns: torch.Tensor, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    """One row's attention between words, [..., word, word], from ``patterns`` [..., query, key].

    A word's tokens are averaged as queries and summed as keys, so that each word still spends an attention of 1.
    ``spans``: each word's tokens as positions (first, last + 1) in the pattern, in order. Raises ``StoneyError`` if
    they leave a token out or count one twice (padding in front is left out, and only that): attention would be lost.
    """
    length = patterns.shape[-1]
    bounds = [spans[0][0] if spans else length, *(end for _, end in spans)]
    adjacent = all(start == before < end for before, (start, end) in zip(bounds, spans, strict=False))
    if not spans or not adjacent or bounds[0] < 0 or bounds[-1] != length:
        raise StoneyError(f"word spans must follow each other without a gap up to token {length}, got {list(spans)}")
    if patterns[..., : bounds[0]].any():
        raise StoneyError(
            f"the first word span starts at token {bounds[0]}, but tokens before it take part in attention"
        )
    positions = torch.arange(length)
    member = torch.stack([(start <= positions) & (positions < end) for start, end in spans]).to(patterns)
    return (member / member.sum(-1, keepdim=True)) @ patterns @ member.T


def entropy(pattern: torch.Tensor, mask: torch.Tensor, queries: torch.Tensor | None = None) -> torch.Tensor:
    """How evenly heads look, float32 [row, head]: mean over queries of H / log n, H = -sum over keys of A log A.

    n is the number of tokens up to the query, so that 1 is an even look at all of them and 0 a look at one; the first
    token, with nothing to choose from, is left out. ``pattern`` [row, head, query, key], ``mask`` [row, position]. In a
    layer with a sliding window n still counts all tokens, so beyond the window even attention stays below 1.
    ``queries`` [row, query]: those to average over; all by default.
    """
    choices = mask.cumsum(-1) * mask
    asked = (choices > 1).float() * (1 if queries is None else queries)
    weights = asked / asked.sum(-1, keepdim=True) / choices.clamp(min=2).log()
    return torch.einsum("rhq,rq->rh", torch.special.entr(pattern.float()).sum(-1), weights)


def repeated_random_tokens(model: HookedModel, n: int, length: int, seed: int) -> Batch:
    """n rows of ``length`` random tokens, written twice, int64 [n, 2 length]: what only induction can predict.

    A row's tokens differ from one another and are drawn from the ordinary ones (neither special nor added to the
    vocabulary), so that each token of the second half has one earlier occurrence. No BOS in front. Raises
    ``StoneyError`` if the vocabulary or the model's context is too small.
    """
    special = {*model.tokenizer.all_special_ids, *model.tokenizer.get_added_vocab().values()}
    ordinary = torch.tensor(sorted(set(model.tokenizer.get_vocab().values()) - special))
    ordinary = ordinary[ordinary < model.d_vocab]
    longest = min(len(ordinary), model.bridge.cfg.n_ctx // 2)
    if n < 1 or not 2 <= length <= longest:
        raise StoneyError(
            f"{model.name}: repeated tokens take at least 1 row of 2 to {longest} tokens, got {n} of {length}"
        )
    generator = torch.Generator().manual_seed(seed)
    rows = torch.stack([ordinary[torch.randperm(len(ordinary), generator=generator)[:length]] for _ in range(n)])
    ids = rows.repeat(1, 2)
    return Batch(ids, torch.ones_like(ids))


def copy_accuracy(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Share of the second half that the model predicts, float32 [row], from its second token on, as the first comes as
    a surprise. ``logits`` [row, position, vocabulary] of ``repeated_random_tokens``."""
    length = batch.ids.shape[1] // 2
    targets = batch.ids[:, length + 1 :].to(logits.device)
    return (logits[:, length:-1].argmax(-1) == targets).float().mean(-1).cpu()


def each_layer(model: HookedModel, batch: Batch, layers: Iterable[int], function: Edit) -> torch.Tensor:
    """What ``function`` makes of the layers' patterns [row, head, query, key], on the CPU: [row, layer, ...]."""
    hooks = [f"blocks.{layer}.attn.hook_pattern" for layer in layers]
    read = dict.fromkeys(hooks, lambda pattern: function(pattern).cpu())
    run = model.run(batch, read=read, stop_at_layer=model.n_layers)  # no logits
    return torch.stack([run[hook] for hook in hooks], dim=1)


def _real(batch: Batch) -> torch.Tensor:
    """Whether query and key are both tokens of the text and the key is not after the query, bool [row, query, key]."""
    mask = batch.mask.bool()
    return (mask[:, :, None] & mask[:, None, :]).tril()


def _keys(batch: Batch) -> list[torch.Tensor]:
    """For each measure but entropy, what a unit of attention counts for, float32 [row, query, key]."""
    ids, mask = batch.ids, batch.mask.cumsum(-1) * batch.mask
    real = _real(batch).float()
    position = torch.arange(ids.shape[1], device=ids.device)
    before = real.tril(-1)
    distance = (position[:, None] - position).float()
    duplicate = before * (ids[:, :, None] == ids[:, None, :])
    follower = duplicate.roll(1, dims=-1) * real
    return [before * (mask == 1)[:, None, :], before * (distance == 1), follower, duplicate, real * distance]


def _mean_weights(keys: torch.Tensor) -> torch.Tensor:
    """Weights whose sum with a pattern is the mean, over the queries with such a key, of what they spend on them."""
    return keys / keys.any(-1).sum(-1)[:, None, None]
