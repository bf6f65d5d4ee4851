"""MAUVE (Pillutla et al. 2021, https://arxiv.org/abs/2102.01454): are the answers, as a set, distributed like the gold ones?

1. Every text becomes the vector that a language model gives it (``load_featurizer``).
2. Both sets of vectors are clustered together by k-means; each set becomes a histogram over the clusters.
3. MAUVE is the area under the divergence curve of the two histograms: 1 for the same, near 0 for disjoint ones. The mauve-text
   package computes steps 2 and 3; k-means starts at random, so they run once for each of ``SEEDS``.
4. Null check: the gold texts are cut into two random halves, ``SPLITS`` times, and MAUVE of one half against the other is
   what two samples of one distribution get. Its mean is below 1 by the bias of a sample of this size (of half this size,
   so the check errs on the safe side). At least ``SOUND``: the value is reported. Below it: reported, marked as biased.
   Below ``USABLE``, or with fewer texts than buckets: withheld.

The package's own number of buckets is a tenth of the texts. Gold against gold then gives the same 0.9 to 0.98 for 40 texts as
for 400, and the null check could not tell them apart. So the number is fixed here: values of different sample sizes can be
compared, and the check fails where the texts are too few to fill the buckets.

MAUVE compares sets: it does not notice that two rows have each other's answers.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoney_rl import models
from stoney_rl.errors import StoneyError
from stoney_rl.metrics.checks import NORM_SIGNATURE, check_pairs
from stoney_rl.metrics.score import Score
from stoney_rl.text import normalize

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEEDS = (0, 1, 2, 3, 4)
BUCKETS = 50
SPLITS = 10
SOUND, USABLE = 0.95, 0.8
BATCH, MAX_TOKENS = 32, 256


@dataclass(frozen=True)
class Featurizer:
    """``encode``: texts -> float32 array [text, dimension]. ``label``: which model and which of its states, for signatures."""

    label: str
    encode: "Callable[[Sequence[str]], np.ndarray]"


def mauve(
    *,
    predictions: Sequence[str],
    references: Sequence[str],
    featurizer: Featurizer,
    null: Sequence[float] | None = None,
) -> Score:
    """MAUVE in [0, 1], the mean over ``SEEDS``, with its spread over them and the null check in ``note``.

    ``value`` is None where it is withheld. ``null``: the ``null_values`` of the references, if they are known already: they are
    two thirds of the work. Raises StoneyError as ``chrf.chrf`` does.
    """
    check_pairs(predictions, references)
    gold = featurizer.encode([normalize(text) for text in references])
    null = null_values(gold) if null is None else null
    values = []
    if null and _mean(null) >= USABLE:
        answers = featurizer.encode([normalize(text) for text in predictions])
        values = [_one_value(answers, gold, seed) for seed in SEEDS]
    return Score(
        value=_mean(values) if values else None,
        rows=(),
        n=len(predictions),
        unscored=0,
        signature=signature(featurizer),
        note=_note(null, len(references)),
        spread=(min(values), max(values)) if values else None,
    )


def null_values(gold: "np.ndarray") -> list[float]:
    """MAUVE of ``SPLITS`` random halves of ``gold`` [text, dimension] against the other halves; [] for too few texts."""
    import numpy as np

    half = len(gold) // 2
    if 2 * half < BUCKETS:
        return []
    order = [np.random.default_rng(seed).permutation(len(gold)) for seed in range(SPLITS)]
    return [_one_value(gold[rows[:half]], gold[rows[half : 2 * half]], seed) for seed, rows in enumerate(order)]


def signature(featurizer: Featurizer) -> str:
    """What a MAUVE value depends on besides the texts; other settings are the package's defaults."""
    from importlib.metadata import version

    return (
        f"MAUVE|features:{featurizer.label}|buckets:{BUCKETS}|seeds:{len(SEEDS)}|null:{SPLITS}-half-splits"
        f"|version:{version('mauve-text')}|{NORM_SIGNATURE}"
    )


def load_featurizer(name: str, *, batch_size: int = BATCH, max_tokens: int = MAX_TOKENS) -> Featurizer:
    """The features of the model in folder (or hub id) ``name``, from its last layer.

    A causal language model gives the state of the last token, which alone has seen the whole text, as in the paper; any
    other model the mean over the tokens. Texts are cut after ``max_tokens`` tokens and each is encoded once, however often
    it comes. Use one model for all systems that are compared, and none of those systems. Raises StoneyError if the model
    can't be loaded or is an adapter.
    """
    import torch

    tokenizer, model, causal = _load_backbone(name)
    known: dict[str, np.ndarray] = {}

    @torch.inference_mode()
    def features(batch: list[str]) -> "np.ndarray":
        # A causal model without a start token has no token, and so no state, for an empty answer.
        inputs = tokenizer(
            [text or " " for text in batch], padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
        ).to(model.device)
        states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"]
        if causal:
            return states[torch.arange(len(batch)), mask.sum(1) - 1].cpu().numpy()
        return ((states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)).cpu().numpy()

    def encode(texts: Sequence[str]) -> "np.ndarray":
        import numpy as np
        from tqdm import tqdm

        # Texts of like length share a batch, so that little is spent on padding; always the same batches.
        new = sorted(set(texts).difference(known), key=lambda text: (len(text), text))
        for start in tqdm(range(0, len(new), batch_size), desc="MAUVE features", unit="batch", delay=2):
            batch = new[start : start + batch_size]
            known.update(zip(batch, features(batch), strict=True))
        return np.stack([known[text] for text in texts])

    folder = name.rstrip("/").rpartition("/")[2]
    return Featurizer(f"{folder}:{_sha256(model)[:12]}:{'last' if causal else 'mean'}", encode)


def _load_backbone(name: str) -> "tuple[PreTrainedTokenizerBase, PreTrainedModel, bool]":
    """The tokenizer, padding on the right; the model without a head, in fp32; and whether it is a causal language model."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel

    source = models.find_model(name)
    if source.kind == "adapter":
        raise StoneyError(
            f"{name}: an adapter; MAUVE's features need a whole model: give the merged checkpoint or its base"
        )
    tokenizer = models.load_tokenizer(source)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        architectures = AutoConfig.from_pretrained(name).architectures or []
        causal = any(architecture.endswith("ForCausalLM") for architecture in architectures)
        # A causal model is loaded whole: its backbone alone would complain about the head that it lacks.
        model = models.load_model(source, torch.float32).base_model if causal else AutoModel.from_pretrained(name)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise StoneyError(f"{name}: can't be loaded as a source of features ({first})") from error
    return tokenizer, model.float().eval().to(models.device()), causal


def _sha256(model: "PreTrainedModel") -> str:
    """A hash of the weights in fp32, the same on every machine: two folders may have one name."""
    digest = hashlib.sha256()
    for _, weights in sorted(model.state_dict().items()):
        digest.update(weights.cpu().contiguous().numpy())
    return digest.hexdigest()


def _one_value(p: "np.ndarray", q: "np.ndarray", seed: int) -> float:
    from mauve import compute_mauve

    with _without_faiss_warnings():
        return float(compute_mauve(p_features=p, q_features=q, num_buckets=BUCKETS, seed=seed).mauve)


@contextlib.contextmanager
def _without_faiss_warnings() -> Iterator[None]:
    """Hide what faiss's C++ writes for fewer than 39 points a bucket, once a call; the null check measures what it fears."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _note(null: Sequence[float], n: int) -> str:
    if not null:
        return f"withheld: {n} texts are too few for {BUCKETS} buckets"
    found = (
        f"gold against gold gives {_mean(null):.2f} (n = {n // 2} a side, {min(null):.2f} to {max(null):.2f}), not 1"
    )
    if _mean(null) < USABLE:
        return f"withheld: {found}: too few texts"
    if _mean(null) < SOUND:
        return f"biased: {found}; compare systems on these same rows only"
    return f"null check passed: {found}"
