"""What R_sem asks about meaning: any encoder on the hub or in a folder, mean-pooled, or COMET.

A similarity is a function (questions, answers, references) -> one number in [0, 1] a row.
"""

import atexit
from collections.abc import Callable

from stoney_rl.errors import StoneyError
from stoney_rl.metrics.comet import CometScorer
from stoney_rl.text import normalize

BATCH, MAX_TOKENS = 64, 256

Similarity = Callable[[list[str], list[str], list[str]], list[float]]


def load_similarity(encoder: str | None, comet_model: str | None) -> Similarity | None:
    """The similarity that ``--encoder`` or ``--comet_model`` names, None without either.

    COMET's worker lives until this process ends. Raises ``StoneyError`` if the model can't be loaded.
    """
    if encoder:
        return encoder_similarity(load_encoder(encoder))
    if comet_model:
        scorer = CometScorer(comet_model)
        scorer.__enter__()
        atexit.register(scorer.__exit__, None)
        return comet_similarity(scorer)
    return None


def load_encoder(name: str) -> Callable[[list[str]], object]:
    """texts -> float32 array [text, dimension], rows of length 1: the mean of the last hidden states (Reimers and
    Gurevych 2019, arXiv 1908.10084). Raises ``StoneyError`` if it can't be loaded."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoneyError(
            f"--encoder {name}: can't be loaded ({first}); give a folder or hub id of an encoder"
        ) from error

    @torch.no_grad()
    def encode(texts: list[str]):
        vectors = []
        for start in range(0, len(texts), BATCH):
            inputs = tokenizer(
                texts[start : start + BATCH], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            )
            mask = inputs["attention_mask"][:, :, None]
            hidden = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1).clamp(min=1)
            vectors.append(torch.nn.functional.normalize(hidden.float(), dim=-1))
        return torch.cat(vectors).numpy()

    return encode


def encoder_similarity(encode: Callable[[list[str]], object]) -> Similarity:
    """The cosine of the vectors of answer and reference, negative ones as 0; the question is not looked at.

    ``encode``: texts -> float array [text, dimension], rows of length 1.
    """

    def similarity(questions: list[str], answers: list[str], references: list[str]) -> list[float]:
        cosines = (encode([answer or " " for answer in answers]) * encode(references)).sum(axis=1)
        return [
            float(min(1.0, max(0.0, cosine))) if answer else 0.0
            for answer, cosine in zip(answers, cosines, strict=True)
        ]

    return similarity


def comet_similarity(scorer: CometScorer) -> Similarity:
    """COMET's scores, those beyond [0, 1] cut off.

    The question is COMET's source. An answer without text is 0 and never sent: COMET gives it a score in the middle, which
    would pay for silence. ``scorer`` is one whose ``with`` block is open; what it raises passes through.
    """

    def similarity(questions: list[str], answers: list[str], references: list[str]) -> list[float]:
        values = [0.0] * len(answers)
        rows = [row for row, answer in enumerate(answers) if normalize(answer)]
        if rows:
            columns = ([column[row] for row in rows] for column in (questions, answers, references))
            for row, score in zip(rows, scorer.score(*columns), strict=True):
                values[row] = min(1.0, max(0.0, score))
        return values

    return similarity
