"""The tuned lens: a logit lens whose layers are first translated into the last one's terms.

    tuned = fit_tuned_lens(model, train, held_out)                # batches of text; a few minutes for SmolLM2 on a CPU
    tuned.fit.plain_kl, tuned.fit.tuned_kl                        # held out, in nats, of each layer
    reading = logit_lens(model, batch, tuned=tuned)
    save_tuned_lens(tuned, "lens"); load_tuned_lens("lens", model)

1. The residual streams h_l of some tokens are computed once, h_n being what the final norm reads.
2. Belrose et al., arXiv 2303.08112: in the place of h_l stands h_l + h_l W_l + b_l, for l < n. W_l and b_l start at 0, the
   plain lens, and minimise the mean KL(p || lens_l), p being the model's output. Layers don't depend on each other.
3. A step looks at a part of the vocabulary: what p holds likely, and ids drawn at random. Both distributions are taken
   given that part; that KL is 0 wherever the whole one is, and costs a sixteenth for SmolLM2.
4. How good it is, is measured on tokens of other texts and over the whole vocabulary, beside the plain lens.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from stoney_rl import checkpoints
from stoney_rl.errors import StoneyError
from stoney_rl.interp.hooked import Batch, HookedModel
from stoney_rl.interp.lens import CHUNK, kl_divergence, log_probabilities, residual_streams

TRANSLATORS, DESCRIPTION = "translators.safetensors", "lens.json"

# A fingerprint of the same model may differ by this share of its largest logit: another BLAS sums in another order.
FINGERPRINT_TOLERANCE = 100 * checkpoints.LOGIT_TOLERANCE

# Tokens a step; ids of each that are likeliest; and Adam's rate times d_model, which falls to 0 over the fit: a step
# moves each coordinate by about RATE of its size at most, whatever the width.
BATCH, LIKELY, RATE = 64, 16, 0.3


@dataclass(frozen=True)
class TunedFit:
    """How a tuned lens was fit, and how well: mean KL(p || lens) in nats a layer over the same held-out tokens."""

    tokens: int
    held_out_tokens: int
    steps: int
    seed: int
    plain_kl: list[float]
    tuned_kl: list[float]


@dataclass(frozen=True)
class TunedLens:
    """``weight`` [layer, d_model, d_model], ``bias`` [layer, d_model], for all layers but the last, whose lens is exact.

    ``fingerprint``: of the model it was fit to, see ``checkpoints.fingerprint``.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    fingerprint: dict
    fit: TunedFit

    def translate(self, stream: torch.Tensor, layer: int) -> torch.Tensor:
        """``stream`` [..., d_model] of ``layer``, as the final layer would write it."""
        if layer == len(self.weight):
            return stream
        weight, bias = self.weight[layer].to(stream), self.bias[layer].to(stream)
        return stream + stream @ weight + bias


def fit_tuned_lens(
    model: HookedModel,
    train: Iterable[Batch],
    held_out: Iterable[Batch],
    *,
    steps: int = 200,
    tokens: int = 4096,
    vocabulary: int = 2048,
    seed: int = 0,
) -> TunedLens:
    """Fit the translators on ``train``; measure them, and the logit lens, on ``held_out``. Reproducible by ``seed``.

    ``tokens``: at most so many are drawn from ``train``, an eighth of it from ``held_out``; their streams are computed
    once ((n_layers + 1) x tokens x d_model floats; SmolLM2: 290 MB). A step takes 64 of them and the KL over
    ``vocabulary`` token ids drawn at random beside the 16 likeliest of each. ``held_out`` should share no text with
    ``train``: it is for the caller to see to. Raises ``StoneyError`` if a side has no tokens.
    """
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(seed)
    streams = _token_streams(model, list(train), tokens, generator)
    unseen = _token_streams(model, list(held_out), max(1, tokens // 8), generator)
    final = streams[-1]
    likely = torch.cat([log_probabilities(model, part).topk(LIKELY).indices for part in final.split(CHUNK)])
    weight, bias, plain_kl, tuned_kl = [], [], [], []
    for layer in tqdm(range(model.n_layers), desc="tuned lens", unit="layer", delay=2):
        W, b = _fit_layer(model, streams[layer], final, likely, steps, vocabulary, generator)
        plain_kl.append(_mean_kl(model, unseen[layer], unseen[-1]))
        tuned_kl.append(_mean_kl(model, unseen[layer] + unseen[layer] @ W + b, unseen[-1]))
        weight.append(W.cpu())
        bias.append(b.cpu())
    fit = TunedFit(len(final), len(unseen[-1]), steps, seed, plain_kl, tuned_kl)
    return TunedLens(torch.stack(weight), torch.stack(bias), _fingerprint(model), fit)


def save_tuned_lens(tuned: TunedLens, directory: Path) -> None:
    """Write translators and description into a new ``directory``, whole or not at all.

    Raises ``StoneyError`` if the directory exists or can't be written.
    """
    from safetensors.torch import save_file

    with checkpoints.staged(Path(directory)) as work:
        save_file({"weight": tuned.weight, "bias": tuned.bias}, work / TRANSLATORS)
        checkpoints.write_json(work / DESCRIPTION, {"fingerprint": tuned.fingerprint, "fit": asdict(tuned.fit)})


def load_tuned_lens(directory: Path, model: HookedModel) -> TunedLens:
    """Read what ``save_tuned_lens`` wrote.

    Raises ``StoneyError`` if a file is missing or unreadable, and if the lens was fit to a model with other logits.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    directory, expected = Path(directory), _fingerprint(model)
    try:
        description = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
        tensors = load_file(directory / TRANSLATORS)
        fit, fingerprint = TunedFit(**description["fit"]), description["fingerprint"]
        tuned = TunedLens(tensors["weight"], tensors["bias"], fingerprint, fit)
        difference = checkpoints.logit_difference(fingerprint, expected)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StoneyError(
            f"{directory}: not a tuned lens ({DESCRIPTION} and {TRANSLATORS}): {error}; fit it again"
        ) from error
    if not difference <= FINGERPRINT_TOLERANCE * max(1.0, *map(abs, expected["sample"])):
        raise StoneyError(
            f"{directory}: this tuned lens was fit to another model than {model.name} (logits differ by "
            f"{difference:.2g}); fit one to this model"
        )
    return tuned


def _token_streams(
    model: HookedModel, batches: Sequence[Batch], limit: int, generator: torch.Generator
) -> torch.Tensor:
    """The streams of at most ``limit`` tokens drawn from all ``batches``, float32 [layer, token, d_model]."""
    counts = [int(batch.mask.sum()) for batch in batches]
    chosen = torch.zeros(sum(counts), dtype=torch.bool)
    chosen[torch.randperm(len(chosen), generator=generator)[:limit]] = True
    if not chosen.any():
        raise StoneyError("a tuned lens needs tokens to be fit on, and others to be measured on")
    parts = []
    for batch, drawn in zip(batches, chosen.split(counts), strict=True):
        where = batch.mask.bool().cpu()
        where[where.clone()] = drawn
        if drawn.any():
            parts.append(
                residual_streams(model, batch, lambda stream, where=where: stream[where.to(stream.device)].float())
            )
    return torch.cat(parts, dim=1)


def _fit_layer(
    model: HookedModel,
    stream: torch.Tensor,
    final: torch.Tensor,
    likely: torch.Tensor,
    steps: int,
    vocabulary: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's weight [d_model, d_model] and bias [d_model]; ``stream`` and ``final`` are [token, d_model]."""
    # The median token's size: the first token's stream is hundreds of times as long as the others' in many models.
    scale = stream.pow(2).mean(-1).sqrt().median()
    weight = torch.zeros(model.d_model, model.d_model, device=stream.device, requires_grad=True)
    bias = torch.zeros(model.d_model, device=stream.device, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=RATE / model.d_model, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        rows = torch.randint(len(stream), (BATCH,), generator=generator).to(stream.device)
        drawn = torch.randperm(model.d_vocab, generator=generator)[:vocabulary].to(stream.device)
        candidates = torch.cat([drawn, likely[rows].flatten()]).unique()
        translated = stream[rows] + stream[rows] @ weight + scale * bias
        p = _over_candidates(model, final[rows], candidates)
        q = _over_candidates(model, translated, candidates)
        optimizer.zero_grad()
        kl_divergence(p.detach(), q).mean().backward()
        optimizer.step()
        schedule.step()
    return weight.detach(), scale * bias.detach()


def _over_candidates(model: HookedModel, streams: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """As ``log_probabilities``, with a gradient, over the token ids ``candidates`` only: [vector, candidate]."""
    normed = model.bridge.ln_final(streams[None].to(model.dtype))[0]
    logits = normed @ model.W_U.T[candidates].T + model.bridge.b_U[candidates]
    return model.bridge.adapter.apply_output_logits_transform(logits).float().log_softmax(-1)


def _mean_kl(model: HookedModel, streams: torch.Tensor, final: torch.Tensor) -> float:
    """KL(p || lens) in nats, averaged over tokens; both [token, d_model]."""
    parts = zip(streams.split(CHUNK), final.split(CHUNK), strict=True)
    every = [kl_divergence(log_probabilities(model, p), log_probabilities(model, q)) for q, p in parts]
    return float(torch.cat(every).mean())


def _fingerprint(model: HookedModel) -> dict:
    return checkpoints.fingerprint(model.bridge.original_model)
