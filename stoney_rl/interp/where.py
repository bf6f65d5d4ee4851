"""Where heads look when the answer is due: at the next token, or at the whole word; how far back, and how evenly.

    found = copying(model, pairs)                          # found.difference [pair, layer, head, route]
    found.measured                                         # pairs behind each route's numbers
    attention_span(model, pairs)["last_distance"]          # [pair, layer, head]

1. An occurrence: a place in the clean prompt at which the answer's words stand as whole words, in the answer's tokens.
2. Token copying: attention of the last position to the token of each occurrence that comes next in the answer (the
   token an induction head looks at, arXiv 2209.11895). Concept copying: to the last token of each occurrence, where a
   word is put together (Feucht et al., arXiv 2504.03022, section 3).
3. The same to the wrong answer's occurrences; the difference is what the head does about the answer, not about words at
   such places. A head that looks at everything evenly has 0.
4. Span: of the last position and on average over all, mean distance in tokens, attention to the first token (sink), and
   entropy over its largest value: see attention.

What ours does otherwise than Feucht et al.: they repeat random tokens with an entity in them, always ask at the token
before it, and weight attention by the size of the values; ours are the pairs' own prompts and plain attention, as the
wrong answer's places stand beside (a head that looks there without moving anything does so at both). And where both
answers begin alike, a part of the answer already stands at the prompt's end: ``started`` tells how many tokens, and the
token route is then helped by them. In a word of two or three tokens the routes lie close together. Attention shows
where a head looks, not what that does: ablate the heads that it points at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stoney_rl.interp.attention import MEASURES, each_layer, pattern_scores
from stoney_rl.interp.hooked import HookedModel
from stoney_rl.interp.pairs import PairBatch, PromptPair, over_pairs
from stoney_rl.interp.words import split_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 16
ROUTES = ("token", "concept")
SPANS = ("distance", "sink", "entropy")


@dataclass(frozen=True)
class Copying:
    """``attention`` float32 [pair, layer, head, route, word]: of the last position to all occurrences together; routes
    as ROUTES, words: the answer and the wrong one. ``occurrences`` int64 [pair, word]. ``started`` int64 [pair]: tokens
    of the answer that the prompt ends with.

    NaN: a word that does not occur (or whose tokens aren't known), or has no such token left; for the concept route
    also both words where one of them has no token behind the next one: there the routes are one.
    """

    attention: torch.Tensor
    occurrences: torch.Tensor
    started: torch.Tensor

    @property
    def difference(self) -> torch.Tensor:
        """Attention to the answer's occurrences less that to the wrong one's, float32 [pair, layer, head, route].

        NaN where either is, and where the two do not occur equally often: then there is nothing equal to compare with.
        """
        answer, wrong = self.attention.unbind(-1)
        alike = self.occurrences[:, 0] == self.occurrences[:, 1]
        return torch.where(alike[:, None, None, None], answer - wrong, float("nan"))

    @property
    def measured(self) -> dict[str, int]:
        """How many pairs have a ``difference``, by route; the others are not 0 but unknown."""
        counts = (~self.difference.isnan()).flatten(1, 2).all(1).sum(0)
        return dict(zip(ROUTES, counts.tolist(), strict=True))


def copying(model: HookedModel, pairs: Sequence[PromptPair], *, batch_size: int = BATCH) -> Copying:
    """Attention to what can be copied, for every head, from one pass over the clean prompts.

    For pairs that hold their answers' tokens (``make_pair``'s do); others count as having no occurrence. Raises
    ``StoneyError`` without a pair, and for a tokenizer whose tokens can't be traced to bytes.
    """
    places = [_places(model.tokenizer, pair) for pair in pairs]

    def measure(rows: list[int], batch: PairBatch) -> dict[str, torch.Tensor]:
        width = batch.clean.ids.shape[1]
        weights = torch.full((len(rows), len(ROUTES) * 2, width), float("nan"))
        for at, row in enumerate(rows):
            offset = width - len(pairs[row].clean)
            for key, positions in enumerate(places[row].keys):
                if positions:
                    weights[at, key] = 0
                    weights[at, key, [offset + position for position in positions]] = 1
        weights = weights.to(model.device)
        attention = each_layer(
            model, batch.clean, range(model.n_layers), lambda pattern: pattern[:, :, -1].float() @ weights.mT
        )
        return {"attention": attention.unflatten(-1, (len(ROUTES), 2))}

    found = over_pairs(pairs, batch_size, model.pad_token_id, measure, f"{model.name}: copying")
    occurrences = torch.tensor([place.occurrences for place in places])
    return Copying(found["attention"], occurrences, torch.tensor([pair.shared for pair in pairs]))


def attention_span(
    model: HookedModel, pairs: Sequence[PromptPair], *, batch_size: int = BATCH
) -> dict[str, torch.Tensor]:
    """How far and how evenly every head looks on the clean prompts, float32 [pair, layer, head] each, from one pass.

    'last_' and 'mean_' with each of SPANS: of the last position, and the mean over all. distance: in tokens, mean over
    what is looked at; sink: attention to the first token; entropy: over log of the number of tokens to look at, 0 to 1.
    They grow with the prompt: compare families of equal length. Raises ``StoneyError`` without a pair.
    """
    columns = [MEASURES.index(name) for name in SPANS]

    def measure(rows: list[int], batch: PairBatch) -> dict[str, torch.Tensor]:
        clean = batch.clean.to(model.device)
        last = torch.zeros_like(clean.mask)
        last[:, -1] = 1
        scores = {"last": pattern_scores(clean, last), "mean": pattern_scores(clean)}
        found = each_layer(
            model,
            clean,
            range(model.n_layers),
            lambda pattern: torch.stack([one(pattern) for one in scores.values()], -1),
        )[..., columns, :]
        return {
            f"{which}_{name}": found[..., at, among]
            for at, name in enumerate(SPANS)
            for among, which in enumerate(scores)
        }

    return over_pairs(pairs, batch_size, model.pad_token_id, measure, f"{model.name}: attention span")


@dataclass(frozen=True)
class _Places:
    """``keys``: positions in the clean prompt, without padding, for (token, answer), (token, wrong), (concept, answer),
    (concept, wrong); empty where not measured. ``occurrences``: of the answer and of the wrong one."""

    keys: tuple[list[int], list[int], list[int], list[int]]
    occurrences: tuple[int, int]


def _places(tokenizer: "PreTrainedTokenizerBase", pair: PromptPair) -> _Places:
    spans = {(word.start, word.end) for word in split_words(tokenizer, pair.prompt)}
    starts, ends = {start for start, _ in spans}, {end for _, end in spans}
    token, concept, counts, parts = [], [], [], True
    for ids in (pair.answer_ids[:-1], pair.wrong_ids[:-1]):
        first, last = _words_span(tokenizer, ids)
        size, following = last - first, pair.shared - first  # the scored token's place among the words' tokens
        found = [
            at
            for at in range(len(pair.prompt) - size + 1)
            if size and at in starts and at + size in ends and pair.prompt[at : at + size] == ids[first:last]
        ]
        is_inside = 0 <= following < size
        parts &= is_inside and following < size - 1
        token.append([at + following for at in found if is_inside])
        concept.append([at + size - 1 for at in found])
        counts.append(len(found))
    if not parts:
        concept = [[], []]
    return _Places((*token, *concept), tuple(counts))


def _words_span(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> tuple[int, int]:
    """From the first to behind the last token of the words and numbers in ``ids``: no quotes, stops and line ends.

    A space right before belongs to them, as it does where a tokenizer glues it to the word.
    """
    found = split_words(tokenizer, ids) if ids else []
    words = [at for at, word in enumerate(found) if word.kind in ("word", "number")]
    if not words:
        return 0, 0
    first = words[0] - (words[0] > 0 and found[words[0] - 1].kind == "space")
    return found[first].start, found[words[-1]].end
