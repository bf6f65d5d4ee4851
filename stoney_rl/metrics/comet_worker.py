"""COMET behind a pipe: one JSON object a line in, one a line out. Runs in the COMET environment; COMET.md has the protocol.

    .venv-comet/bin/python -I stoney_rl/metrics/comet_worker.py --model Unbabel/wmt22-comet-da

Imports nothing of stoney_rl. ``-I`` keeps this folder off the import path, where comet.py would hide the package.
"""

import argparse
import hashlib
import json
import os
import pickle
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROTOCOL = 1
MAX_ERROR = 300  # characters; transformers and torch write pages


class CannotLoad(Exception):
    """The model can't be loaded; the message says to a person why, and what to do."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a COMET .ckpt file or hub id")
    name = parser.parse_args().model
    requests, answers = take_pipes()

    def answer(message: dict) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        model, hello = load(name)
    except Exception as error:
        answer({"protocol": PROTOCOL, "error": one_line(error)})
        raise
    answer(hello)
    for line in requests:
        number = None
        try:
            request = json.loads(line)
            number = request["id"]
            answer({"id": number, "scores": score(model, hello["device"], request)})
        except Exception as error:  # whatever it is, the next request may be a better one
            answer({"id": number, "error": one_line(error)})
    return 0


def take_pipes():
    """Standard input and output for the protocol alone; whatever else reads gets nothing, whatever prints goes to stderr."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return requests, answers


def one_line(error: Exception) -> str:
    kind = "" if isinstance(error, CannotLoad) else f"{type(error).__name__}: "
    return kind + " ".join(str(error).split())[:MAX_ERROR]


def load(name: str):
    """The model, and the line that introduces it. What is raised is for a person to read."""
    try:
        comet_version = version("unbabel-comet")
    except PackageNotFoundError:
        raise CannotLoad(f"unbabel-comet is not installed beside {sys.executable}; run `make comet`") from None
    path = Path(name) if Path(name).is_file() else download(name)
    import torch
    from comet.models import load_from_checkpoint

    stored = stored_weights(path)
    try:
        model = load_from_checkpoint(str(path))
    except OSError as error:
        raise CannotLoad(
            f"the tokenizer and configuration of its encoder, pretrained_model in {path.parents[1] / 'hparams.yaml'}, "
            f"can't be loaded; {one_line(error)}"
        ) from error
    # COMET loads with strict=False: what the file lacks would be random weights, and scores all the same.
    missing = [key for key, _ in model.named_parameters() if key not in stored]
    if missing:
        raise CannotLoad(f"{path} lacks {len(missing)} of the model's weights ({missing[0]}, ...)")
    return model, {
        "protocol": PROTOCOL,
        "comet": comet_version,
        "model": name,
        "sha256": sha256(path),
        "references": use_of_references(model),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def download(name: str) -> Path:
    """The .ckpt file of a hub id, from the cache where it is there. With HF_HUB_OFFLINE nothing is fetched.

    Not COMET's own ``download_model``: that one asks a second server, offline or not, and calls every failure 'not supported'.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    page = f"{constants.ENDPOINT}/{name}"
    try:
        folder = Path(snapshot_download(name))
    except GatedRepoError as error:
        raise CannotLoad(f"gated: accept its terms at {page} and set HF_TOKEN to a token of that account") from error
    except RepositoryNotFoundError as error:
        raise CannotLoad(f"not on the hub, or private: look at {page} and at HF_TOKEN") from error
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise CannotLoad("not in the hub's cache, and HF_HUB_OFFLINE forbids to download it") from error
        raise CannotLoad("not in the hub's cache, and the hub can't be reached") from error
    except HfHubHTTPError as error:
        raise CannotLoad(f"the hub refuses it ({one_line(error)})") from error
    path = folder / "checkpoints" / "model.ckpt"
    if not path.is_file():
        raise CannotLoad(
            f"not a COMET model, or only half of it is in the cache: no checkpoints/model.ckpt in {folder}"
        )
    return path


def stored_weights(path: Path) -> set[str]:
    """The names of the weights in a .ckpt file. Only plain tensors are unpickled, never code."""
    import torch

    try:
        return set(torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)["state_dict"])
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise CannotLoad(f"{path} is no COMET checkpoint, or damaged ({type(error).__name__}); get it again") from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def use_of_references(model) -> str:
    """'required', 'optional' or 'unused', from what the model was trained on."""
    if model.requires_references():
        return "required"
    return "optional" if "ref" in model.hparams.get("input_segments", []) else "unused"


def score(model, device: str, request: dict) -> list[float]:
    """One score a row from ``model.predict``. Raises ``ValueError`` for columns of different lengths."""
    columns = {"src": request["sources"], "mt": request["hypotheses"]}
    if request["references"] is not None:
        columns["ref"] = request["references"]
    rows = [dict(zip(columns, texts, strict=True)) for texts in zip(*columns.values(), strict=True)]
    gpus = 1 if device == "cuda" else 0
    # No worker processes: tokenizing is quick, and each would hold the pipes open.
    done = model.predict(rows, batch_size=request["batch"], gpus=gpus, num_workers=0, progress_bar=False)
    return [float(value) for value in done["scores"]]


if __name__ == "__main__":
    sys.exit(main())
