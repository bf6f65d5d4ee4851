"""The checkpoints that the interpretability stages are given: found, checked against one another, opened. Imports no torch."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stoney_rl import checkpoints, runs
from stoney_rl.errors import StoneyError
from stoney_rl.metrics.systems import base_of, describe, short_name
from stoney_rl.models import ModelSource, find_model, resolve_unpublished

if TYPE_CHECKING:
    import torch

    from stoney_rl.data import Row
    from stoney_rl.interp.hooked import HookedModel


RANDOM = "random weights"  # what tables call the floor
# What two models must have alike: in words, and in a config.
SHAPE = {
    "as architecture": "model_type", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "numbers in a stream": "hidden_size", "neurons a layer": "intermediate_size",
}  # fmt: skip


def find_models(given: Iterable[tuple[str, str]]) -> dict[str, ModelSource]:
    """The models by the name that tables use, from (flag, path or hub id); 'base': what the first one was trained from.

    Raises ``StoneyError`` for a name that is there twice, and where the first does not say what it was trained from.
    """
    sources: dict[str, ModelSource] = {}
    for flag, asked in given:
        path, notice = resolve_unpublished(asked)
        if notice:
            print(notice)
        if asked == "base" and sources:
            first = next(iter(sources.values()))
            path = base_of(first)
            if path is None:
                raise StoneyError(f"{flag} base: {first.name} does not say what it was trained from; name the model")
        name = short_name(path)
        if name == RANDOM:
            raise StoneyError(f"{flag} {asked}: {RANDOM!r} is what the floor is called; rename the folder")
        if name in sources:
            raise StoneyError(f"{flag} {asked}: a second model called {name}; give each folder its own name")
        sources[name] = find_model(path)
    return sources


def show(sources: Mapping[str, ModelSource]) -> None:
    """Print each model with its lineage."""
    for name, source in sources.items():
        print(f"{name}:", *(f"  {line}" for line in checkpoints.lineage(Path(source.name))), sep="\n")


def identities(sources: Mapping[str, ModelSource]) -> list[dict]:
    """What makes the models the same ones, for ``runs.identify``."""
    return [describe(source) | {"weights": checkpoints.weights_id(source.name)} for source in sources.values()]


def rows_of_page(sources: Mapping[str, ModelSource]) -> list[dict]:
    """The models as ``report.SCHEMA`` has them."""
    return [
        {"name": name, "checkpoint": source.name, "lineage": " <- ".join(checkpoints.lineage(Path(source.name)))}
        for name, source in sources.items()
    ]


def trained_on(name: str) -> dict | None:
    """The data that the checkpoint directory says it was trained on."""
    return (checkpoints.read_stage(Path(name)) or {}).get("data") if Path(name).is_dir() else None


def held_out(name: str) -> tuple[list["Row"], str | None]:
    """The rows that the model's training held out, and the dataset they come of; none, and why, where they can't be read."""
    from stoney_rl import corpus

    if not corpus.training_record(name):
        return [], None
    try:
        found = corpus.held_out(name, "test", dataset=None, default_dataset="")
    except StoneyError as error:
        print(f"the rows that {name} was not trained on can't be read ({error})")
        return [], None
    return found.rows, found.corpus.rowset.source


def stage_at(output: Path, stage: str, refusal: str, *, overwrite: bool) -> dict:
    """What stage.json of the output directory says, {} if there is none. Raises ``StoneyError``, with the
    ``refusal`` in it, where ``overwrite`` would replace what is of another ``stage``."""
    if output.exists() and not output.is_dir():
        raise StoneyError(f"--output_dir {output}: a file; name a directory")
    earlier = (checkpoints.read_stage(output) or {}) if output.is_dir() else {}
    names = {path.name for path in output.iterdir()} if output.exists() else set()
    lost_record = not earlier and {runs.IDENTITY_FILE, runs.MEASURED} <= names
    if overwrite and names and earlier.get("stage") != stage and not lost_record:
        raise StoneyError(f"--overwrite: {output} {refusal}; choose another --output_dir")
    return earlier


def check_device(device: str | None) -> None:
    """Raise ``StoneyError`` for a device that torch does not know or that is not here."""
    if device:
        import torch

        try:
            if torch.empty(1, device=device).is_meta:
                raise StoneyError("--device meta: holds no numbers; name cpu, cuda or another device")
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise StoneyError(f"--device {device}: {str(error).splitlines()[0][:120]}") from error


def check_vocabularies(tokenizers: Mapping) -> None:
    """Raise ``StoneyError`` unless all tokenizers give the same ids: the models could not be asked the same otherwise."""
    (main_name, tokenizer), *others = tokenizers.items()
    for name, other in others:
        if other.get_vocab() != tokenizer.get_vocab():
            raise StoneyError(f"{name} has another vocabulary than {main_name}; compare models of one family")


def torch_dtype(name: str) -> "torch.dtype":
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def device_of(device: str | None) -> str:
    """The device asked for, else a GPU if there is one."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def check_shapes(sources: Mapping[str, ModelSource]) -> None:
    """Raise ``StoneyError`` unless all models have as many layers and heads, as wide: head 3.1 of one is not that of another otherwise.
    Only configs are read."""
    from stoney_rl.memory import read_config

    shapes = {}
    for name, source in sources.items():
        config = read_config(source.base or source.name, source.revision).get_text_config()
        shapes[name] = {what: getattr(config, key, None) for what, key in SHAPE.items()}
    (first, expected), *others = shapes.items()
    for name, shape in others:
        for what, size in shape.items():
            if size != expected[what]:
                raise StoneyError(f"{name} has {size} {what}, {first} {expected[what]}; compare models of one shape")


def open_hooked(source: ModelSource, dtype: str, device: str | None) -> "HookedModel":
    """The model, hooked, on the device."""
    from stoney_rl.interp.hooked import load_hooked

    return load_hooked(
        source.name,
        revision=source.revision if source.kind == "hub" else None,
        dtype=torch_dtype(dtype),
        device=device_of(device),
    )
