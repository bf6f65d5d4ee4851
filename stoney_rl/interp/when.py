"""When a model has its answer: layer by layer, what it would say, at what price, in which language, about which word.

    found = decision(model, pairs)                         # found.difference, found.answer_depth [pair]
    price = cost(model, pairs)                             # price.nats / price.bytes [pair]
    meanings = [first_tokens(tokenizer, ["dog"]), ...]     # of each pair, what its answer means in English
    said = guesses(model, pairs, meanings, ["wûsilo", ...], seed=0)          # invented forms
    doubles = [scrambled_before_end(tokenizer, form, random.Random(form)) or form for form in forms]
    built = word_assembly(model, forms, doubles, seed=0)                     # a form without a double is left out

1. Decision: logit lens (or tuned lens, arXiv 2303.08112) of the clean prompt's last token at every layer:
   log-probability of both answers, entropy, and the first layer from which on the answer, or the top token, stays (see
   lens).
2. Cost: the sum of -log p over the whole answer's tokens, each given the clean prompt and the true tokens before, over
   the UTF-8 bytes of its text. How a tokenizer cuts the answer is in the sum, where it belongs, and not in what it is
   divided by. The token that ends the answer is no text and doesn't count. A pair's ratio is for comparing pairs; the
   cost of a family is the sum of nats over the sum of bytes.
3. Guesses (Wendler et al., arXiv 2402.10588, figure 2): before the answer's first token, the lens's probability of the
   tokens that the answer's English meaning may begin with, of the answer's own first token, and of the meanings of
   other prompts (the control) and of the prompt's other meaning (the rival). Also how many of its ten likeliest tokens
   are English words, and how many are pieces of the language's words.
4. Assembly (Kaplan et al., arXiv 2410.05864, figure 2): from which layer on a probe tells real words of three or more
   tokens from their doubles (the same letters in another order, as many tokens) at the word's last token, and in its
   middle. Control labels and folds by lexeme: see probes (Hewitt and Liang, arXiv 1909.03368).

What can't be concluded:
- Guesses: in a lookup the English key stands in the prompt right before the answer, and any model may repeat it. The
  rival stands there too, but is not what is asked for: in lookups of invented words SmolLM2's lens gave the meaning
  0.03 at layer 24 of 30, the control 0 and the rival 0.03, so that it repeated keys and translated nothing. The key
  that is asked for is nearer than the rival's, though; what that alone gives, English lookups show (key and answer
  English, the key as 'meaning'). Only what is above the rival, by more than there, can be read as passing through
  English. Wendler et al. leave out words that contain their English translation, and sum over all prefixes of a word
  that are tokens; here it is the tokens that it does begin with, so that a lone letter does not count for every word.
  The plain lens reads early layers badly: in SmolLM2 the lens is sure of some other token up to layer 24 of 30, so
  little probability there is no evidence of none; a tuned lens reads more.
- 'English' tokens are ASCII words with their space: other languages in that alphabet and names in code are among them.
- Assembly: doubles that end in other tokens are told apart by spelling alone, at layer 0; ``scrambled_before_end``
  makes doubles of which that is not so. Above layer 0, a model with random weights tells many from their doubles too:
  it mixes the letters before, and words share affixes (one form a lexeme has less of that). Only what a trained model
  has above a random one is put together by what it learnt. A probe finds what is there to be read, not what the model
  reads. Kaplan et al. shuffle tokens, not letters, and ask the nearest neighbours in place of a straight cut.
- Cost: a family's answers must have about as many bytes, as a line's end or a quote is nearly free and shares in them.
"""

import random
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import regex
import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp.hooked import HookedModel, by_length, left_padded
from stoney_rl.interp.lens import (
    CHUNK,
    answer_depth,
    log_probabilities,
    logit_lens,
    residual_streams,
    settled_depth,
)
from stoney_rl.interp.pairs import PairBatch, PromptPair, over_pairs, text_encoder
from stoney_rl.interp.probes import probe
from stoney_rl.interp.words import token_bytes
from stoney_rl.text import fold

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stoney_rl.interp.tuned_lens import TunedLens

BATCH = 16  # pairs a pass: as fast a pair as more on a CPU, and half as slow as one
TOP = 10  # likeliest tokens that are sorted by language
CONTROLS = 4  # other meanings for each pair: their mean is the control
CONTEXT = "A word:"  # what stands before a form in ``word_assembly``
TRIED = 100  # orders of a form's letters
PLACES = ("last", "middle")  # the tokens of a form that are probed

_ENGLISH_WORD = regex.compile(rb" [A-Za-z]{3,}")


# Decision


@dataclass(frozen=True)
class Decision:
    """On the CPU. ``answer``, ``wrong`` (log-probabilities) and ``entropy`` in nats, float32 [pair, layer + 1], layer 0
    being the embedding and the last one the model's output. [pair]: ``is_top``, whether the answer is the likeliest of
    all tokens; ``answer_depth`` and ``settled_depth`` in layers, see lens (NaN: the answer is not the likelier one at
    the end)."""

    answer: torch.Tensor
    wrong: torch.Tensor
    entropy: torch.Tensor
    is_top: torch.Tensor
    answer_depth: torch.Tensor
    settled_depth: torch.Tensor

    @property
    def difference(self) -> torch.Tensor:
        """m, logit[answer] - logit[wrong] of the output, [pair]."""
        return (self.answer - self.wrong)[:, -1]

    @property
    def is_likelier(self) -> torch.Tensor:
        """Whether the answer is the likelier of the two at the end, bool [pair]."""
        return self.difference > 0

    @property
    def n_layers(self) -> int:
        """What a depth is divided by to compare models of different depths."""
        return self.answer.shape[1] - 1


def decision(
    model: HookedModel, pairs: Sequence[PromptPair], *, batch_size: int = BATCH, tuned: "TunedLens | None" = None
) -> Decision:
    """What the lens says about the answer at the last token of the clean prompts; ``tuned`` translates first.

    Raises ``StoneyError`` without a pair, and for a tuned lens of another model.
    """

    def measure(rows: list[int], batch: PairBatch) -> dict[str, torch.Tensor]:
        targets = torch.stack([batch.answer, batch.wrong], 1)
        reading = logit_lens(model, batch.clean, targets=targets, top_k=1, tuned=tuned, ranks=False)
        return {
            "answer": reading.target_log_probabilities[:, :, 0, 0],
            "wrong": reading.target_log_probabilities[:, :, 0, 1],
            "entropy": reading.entropy[:, :, 0],
            "is_top": reading.top_ids[:, -1, 0, 0] == batch.answer,
            "answer_depth": answer_depth(reading)[:, 0],
            "settled_depth": settled_depth(reading)[:, 0],
        }

    return Decision(**over_pairs(pairs, batch_size, model.pad_token_id, measure, f"{model.name}: decision"))


# Cost


@dataclass(frozen=True)
class Cost:
    """``nats``: of the whole answer given the clean prompt, float32 [pair]; NaN where a pair does not hold it.
    ``bytes``: of its text in UTF-8, ``tokens``: in which it was scored; int64 [pair], 0 where it isn't held."""

    nats: torch.Tensor
    bytes: torch.Tensor
    tokens: torch.Tensor

    @property
    def nats_per_byte(self) -> torch.Tensor:
        return self.nats / self.bytes

    @property
    def bits_per_byte(self) -> torch.Tensor:
        return self.nats_per_byte / np.log(2)


def cost(model: HookedModel, pairs: Sequence[PromptPair], *, batch_size: int = BATCH) -> Cost:
    """Teacher-forced cost of the pairs' answers, which pairs of ``make_pair`` hold; see the module's docstring."""
    answers = [pair.answer_ids[:-1] if pair.texts[2] else () for pair in pairs]  # without what ends them
    # The last token of an answer is only predicted; nothing follows from it.
    inputs = [(*pair.prompt, *answer[:-1]) for pair, answer in zip(pairs, answers, strict=True)]
    known = [row for row, answer in enumerate(answers) if answer]
    nats = torch.full((len(pairs),), float("nan"))
    for chunk in by_length([len(inputs[row]) for row in known], batch_size):
        rows = [known[index] for index in chunk]
        nats[rows] = _nats(model, [inputs[row] for row in rows], [answers[row] for row in rows])
    tokens = torch.tensor([len(answer) for answer in answers])
    size = torch.tensor([len(pair.texts[2].encode()) for pair in pairs]) * (tokens > 0)
    return Cost(nats, size, tokens)


def _nats(model: HookedModel, inputs: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> torch.Tensor:
    """-log p of each row's ``answers``, of which the row's last positions are asked, summed: float32 [row]."""
    lengths = [len(answer) for answer in answers]
    width = max(lengths)
    is_asked = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    final = f"blocks.{model.n_layers - 1}.hook_resid_post"
    run = model.run(
        left_padded(inputs, model.pad_token_id),
        read={final: lambda stream: stream[:, -width:][is_asked.to(stream.device)]},
        stop_at_layer=model.n_layers,  # the whole vocabulary at every position of a prompt is much, and not asked for
    )
    targets = torch.tensor([token for answer in answers for token in answer], device=model.device)
    parts = zip(run[final].split(CHUNK), targets.split(CHUNK), strict=True)
    nats = torch.cat([-log_probabilities(model, vectors).gather(-1, ids[:, None])[:, 0] for vectors, ids in parts])
    return torch.stack([part.sum() for part in nats.cpu().split(lengths)])


# Guesses


@dataclass(frozen=True)
class Guesses:
    """``probability`` float32 [pair, layer + 1, 4]: of the meaning's first tokens together, of the answer's first
    token, and, of as many first tokens, of other prompts' meanings (control) and of the meaning that the pair's other
    prompt asks for (rival). The meaning is NaN where it is not known, or may begin as the answer does; control and
    rival there too, and where no other meaning fits.
    ``kinds`` [pair, layer + 1, 3]: shares of the ten likeliest tokens that are English words, pieces of the language's
    words, and both (which tells nothing). ``chance`` [3]: the same shares of the whole vocabulary.
    """

    probability: torch.Tensor
    kinds: torch.Tensor
    chance: torch.Tensor

    @property
    def above_control(self) -> torch.Tensor:
        """Probability of the meaning less that of the control, float32 [pair, layer + 1]."""
        return self.probability[..., 0] - self.probability[..., 2]

    @property
    def above_rival(self) -> torch.Tensor:
        """Probability of the meaning less that of the rival, float32 [pair, layer + 1]."""
        return self.probability[..., 0] - self.probability[..., 3]

    @property
    def not_measured(self) -> int:
        """How many pairs have no ``above_control``."""
        return int(self.above_control[:, -1].isnan().sum())


def first_tokens(tokenizer: "PreTrainedTokenizerBase", words: Iterable[str]) -> tuple[int, ...]:
    """The ids that these words may begin with, as they are and capitalised, with and without a space; ascending."""
    spelled = {form for word in words for form in (word, word[:1].upper() + word[1:])}
    texts = [space + form for form in spelled for space in ("", " ")]
    return tuple(sorted({tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in texts}))


def guesses(
    model: HookedModel,
    pairs: Sequence[PromptPair],
    meanings: Sequence[Sequence[int]],
    forms: Iterable[str],
    *,
    seed: int,
    batch_size: int = BATCH,
    tuned: "TunedLens | None" = None,
) -> Guesses:
    """What the model would say at each layer where the answer is about to begin, and in which language.

    ``meanings``: of each pair, the ``first_tokens`` of what its answer means; empty where that is not known. ``forms``:
    the language's words, whose tokens are looked for. The control of a pair is the mean over up to four meanings of as
    many tokens, drawn by ``seed`` from pairs of other clusters, that share no token with its meaning, its answer or its
    prompt: what stands in the prompt is raised by repetition. The rival is the same of its own cluster, where pairs
    come with their ``swapped`` ones, and stands in the prompt too. Raises ``StoneyError`` without a pair, for meanings
    that don't fit the pairs, and for a tuned lens of another model.
    """
    if len(meanings) != len(pairs):
        raise StoneyError(f"guesses: {len(meanings)} meanings for {len(pairs)} pairs; give one for each, () if unknown")
    answers = [pair.answer_ids[0] if pair.answer_ids else pair.answer for pair in pairs]
    meanings = [() if answer in meaning else tuple(meaning) for answer, meaning in zip(answers, meanings, strict=True)]
    compared = _comparisons(pairs, answers, meanings, seed)
    kinds = _kinds(model, forms)

    def measure(rows: list[int], batch: PairBatch) -> dict[str, torch.Tensor]:
        sets = [[[meanings[row]], [(answers[row],)], *compared[row]] for row in rows]
        targets, weights = _targets(sets)
        prompts = left_padded([pairs[row].prompt for row in rows], model.pad_token_id)
        reading = logit_lens(model, prompts, targets=targets, top_k=TOP, tuned=tuned, ranks=False)
        probability = torch.einsum("rlt,rtk->rlk", reading.target_log_probabilities[:, :, 0].exp(), weights)
        missing = (weights.sum(1) == 0)[:, None]
        return {
            "probability": probability.masked_fill(missing, float("nan")),
            "kinds": kinds[reading.top_ids[:, :, 0]].mean(2),
        }

    found = over_pairs(pairs, batch_size, model.pad_token_id, measure, f"{model.name}: guesses")
    return Guesses(**found, chance=kinds.mean(0))


def _comparisons(
    pairs: Sequence[PromptPair], answers: Sequence[int], meanings: Sequence[tuple[int, ...]], seed: int
) -> list[tuple[list[tuple[int, ...]], list[tuple[int, ...]]]]:
    """Of each pair, the meanings that are its control, and those that are its rivals."""
    draw = random.Random(f"guesses {seed}")
    chosen = []
    for pair, answer, meaning in zip(pairs, answers, meanings, strict=True):
        fitting = {
            (stranger.cluster == pair.cluster, other)
            for stranger, other in zip(pairs, meanings, strict=True)
            if other and len(other) == len(meaning) and not {answer, *meaning}.intersection(other)
        }
        rivals = sorted(other for is_near, other in fitting if is_near)
        strangers = sorted(
            other for is_near, other in fitting if not is_near and not set(pair.clean).intersection(other)
        )
        chosen.append((draw.sample(strangers, min(CONTROLS, len(strangers))), rivals))
    return chosen


def _targets(sets: Sequence[Sequence[Sequence[Sequence[int]]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 [row, target], and what each counts for in each of the row's kinds, float32 [row, target, kind].

    ``sets`` [row][kind]: sets of ids whose mean is wanted, each the sum over its ids. Short rows end in id 0, weight 0.
    """
    flat = [
        [(token, kind, 1 / len(several)) for kind, several in enumerate(row) for one in several for token in one]
        for row in sets
    ]
    targets = torch.zeros((len(sets), max(map(len, flat))), dtype=torch.int64)
    weights = torch.zeros((*targets.shape, len(sets[0])))
    for row, entries in enumerate(flat):
        for place, (token, kind, weight) in enumerate(entries):
            targets[row, place], weights[row, place, kind] = token, weight
    return targets, weights


def _kinds(model: HookedModel, forms: Iterable[str]) -> torch.Tensor:
    """Whether each id is an English word, a piece of ``forms``, or both: one-hot or zero, float32 [d_vocab, 3]."""
    pieces = token_bytes(model.tokenizer, range(model.d_vocab))
    english = torch.tensor([bool(_ENGLISH_WORD.fullmatch(piece)) for piece in pieces])
    texts = [space + form for form in forms for space in ("", " ")]
    ids = {token for text in texts for token in model.tokenizer(text, add_special_tokens=False)["input_ids"]}
    piece = torch.zeros(model.d_vocab, dtype=torch.bool)
    piece[sorted(ids)] = True
    return torch.stack([english & ~piece, piece & ~english, english & piece], dim=1).float()


# Assembly


@dataclass(frozen=True)
class Assembly:
    """Of each word with its double, float32 [word, layer, place], places as PLACES (last token, middle token):
    ``correct``, the share of the two that the probe tells right (chance 0.5), and ``control_correct``, the same of a
    probe that learns random labels. ``layers``: which; 0 is the embedding. ``kept``: the words' places in what was
    given, ``clusters``: their lexemes. ``left_out``: how many words had no fitting double or fewer than three
    tokens."""

    correct: np.ndarray
    control_correct: np.ndarray
    layers: tuple[int, ...]
    kept: tuple[int, ...]
    clusters: tuple[Hashable, ...]
    left_out: int

    @property
    def selectivity(self) -> np.ndarray:
        return self.correct - self.control_correct

    @property
    def above_spelling(self) -> np.ndarray:
        """``correct`` less what the token's own spelling gives, layer 0."""
        return self.correct - self.correct[:, :1]


def scrambled_before_end(tokenizer: "PreTrainedTokenizerBase", form: str, draw: random.Random) -> str | None:
    """``form`` with its letters in another order, but for those of its last token: as many tokens, the same one last.

    So the last token's own spelling tells nothing, and at layer 0 the probe of ``word_assembly`` is right half the
    time, exactly. None if a hundred orders hold no such double.
    """
    encode = text_encoder(tokenizer)
    real, letters = encode(CONTEXT, " " + form)[1][:-1], regex.findall(r"\X", form)
    end = len(token_bytes(tokenizer, real[-1:])[0])
    sizes = accumulate(len(letter.encode()) for letter in reversed(letters))
    fixed = 1 + next((at for at, size in enumerate(sizes) if size >= end), len(letters))
    loose, tail = letters[:-fixed], letters[-fixed:]
    for _ in range(TRIED):
        double = "".join([*draw.sample(loose, len(loose)), *tail])
        found = encode(CONTEXT, " " + double)[1][:-1]
        if len(found) == len(real) and found[-1] == real[-1] and fold(double) != fold(form):
            return double
    return None


def _probed(size: int) -> tuple[int, int]:
    """The last and the middle one of ``size`` tokens, counted from the first."""
    return size - 1, (size - 1) // 2


def word_assembly(
    model: HookedModel,
    words: Sequence[str],
    others: Sequence[str],
    *,
    seed: int,
    lexemes: Sequence[Hashable] | None = None,
    layers: Sequence[int] | None = None,
    batch_size: int = 64,
) -> Assembly:
    """Probe for 'a word of the language, or scrambled' at each word's last and middle token; see the module's
    docstring.

    ``others``: the words' doubles, in the words' order. ``lexemes``: what words belong to, the folded form if not
    given; no lexeme is in two folds. ``layers``: every other one and the last, if not given; 0 comes first in any case.
    The middle of n tokens is number (n - 1) // 2 from 0. Raises ``StoneyError`` for lists that don't fit, layers that
    the model hasn't, and fewer than five lexemes that can be used.
    """
    lexemes = [fold(word) for word in words] if lexemes is None else list(lexemes)
    if not len(words) == len(others) == len(lexemes):
        raise StoneyError(
            f"words: {len(words)}, doubles: {len(others)}, lexemes: {len(lexemes)}; expected one for each"
        )
    layers = sorted({0, *(layers if layers is not None else (*range(0, model.n_layers, 2), model.n_layers))})
    if not 0 <= layers[0] <= layers[-1] <= model.n_layers:
        raise StoneyError(f"layers {layers}: {model.name} has 0 (the embedding) to {model.n_layers}")
    encode = text_encoder(model.tokenizer)
    encoded = [[encode(CONTEXT, " " + form) for form in both] for both in zip(words, others, strict=True)]
    sizes = [[len(ids) - 1 for _, ids in both] for both in encoded]  # without the token that ends a text
    kept = [
        row
        for row, (one, other) in enumerate(zip(words, others, strict=True))
        if sizes[row][0] == sizes[row][1] >= 3 and fold(one) != fold(other)
    ]
    if not kept:
        raise StoneyError(
            f"words: none of {len(words)} has three tokens or more and a double of as many; nothing to probe"
        )
    rows = [encoded[row][double] for double in (0, 1) for row in kept]
    vectors = _form_vectors(model, rows, batch_size)
    labels, clusters = [1] * len(kept) + [0] * len(kept), [lexemes[row] for row in kept]
    types = [one[row] for one in (words, others) for row in kept]
    correct, control = np.empty((2, len(kept), len(layers), len(PLACES)), dtype=np.float32)
    for at, layer in enumerate(layers):
        for place in range(len(PLACES)):
            found = probe(vectors[layer, :, place], labels, clusters * 2, seed=seed, types=types)
            correct[:, at, place] = found.correct.reshape(2, -1).mean(0)
            control[:, at, place] = found.control_correct.reshape(2, -1).mean(0)
    return Assembly(correct, control, tuple(layers), tuple(kept), tuple(clusters), len(words) - len(kept))


def _form_vectors(model: HookedModel, rows: Sequence[tuple[list[int], list[int]]], batch_size: int) -> np.ndarray:
    """The residual stream at the last and the middle token of each form, float32 [layer + 1, row, place, d_model].

    ``rows``: ids of the context, and of the form with the token that ends the text, which is left out.
    """
    inputs = [[*front, *form[:-1]] for front, form in rows]
    from_end = [[at - size for at in _probed(size)] for size in (len(form) - 1 for _, form in rows)]
    vectors = np.empty((model.n_layers + 1, len(rows), len(PLACES), model.d_model), dtype=np.float32)
    for chunk in by_length([len(ids) for ids in inputs], batch_size):
        batch = left_padded([inputs[row] for row in chunk], model.pad_token_id)
        columns = torch.tensor([from_end[row] for row in chunk])
        one_each = torch.arange(len(chunk))[:, None]
        found = residual_streams(model, batch, lambda stream, at=(one_each, columns): stream[at].float().cpu())
        vectors[:, chunk] = found.numpy()
    return vectors
