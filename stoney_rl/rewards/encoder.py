"""The sentence encoder of R_sem: any encoder on the hub or in a folder, mean-pooled."""

from collections.abc import Callable

from stoney_rl.errors import StoneyError

BATCH, MAX_TOKENS = 64, 256


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
