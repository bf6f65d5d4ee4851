"""Small COMET checkpoints with random weights, and what COMET itself says of some texts: the oracle of test_comet.py.

    .venv-comet/bin/python -I tests/comet_checkpoint.py FOLDER < TEXTS.json

Reads {"sources": [...], "hypotheses": [...], "references": [...]}. Writes FOLDER/encoder (a sentencepiece XLM-R tokenizer
trained on these texts, two layers of width 32) and, for each of ``KINDS``, FOLDER/<kind>/ as COMET publishes one:
hparams.yaml and checkpoints/model.ckpt. Writes FOLDER/oracle.json: <kind> -> scores of ``model.predict``, called on the
loaded checkpoint with the texts of one row at a time, in the places that COMET's documentation gives them. Two that can't be
loaded, too: FOLDER/partial lacks the last layers' weights, FOLDER/headless names an encoder that is not there.
"""

import io
import json
import sys
from pathlib import Path

KINDS = {
    "regression": {"class_identifier": "regression_metric"},  # as wmt22-comet-da: source, hypothesis and reference
    "kiwi": {"class_identifier": "unified_metric", "input_segments": ["mt", "src"]},  # as wmt22-cometkiwi-da
    "unified": {
        "class_identifier": "unified_metric",
        "input_segments": ["mt", "src", "ref"],
    },  # with reference or without
}
SPREAD = 20.0  # times the last layer's weights, so that scores differ in the first digits and some are outside [0, 1]


def main() -> None:
    import torch
    from comet.models import load_from_checkpoint

    folder = Path(sys.argv[1]).resolve()
    texts = json.load(sys.stdin)
    torch.manual_seed(0)
    build_encoder(folder / "encoder", [text for column in texts.values() for text in column])
    columns = (texts["sources"], texts["hypotheses"], texts["references"])
    rows = [dict(zip(("src", "mt", "ref"), row, strict=True)) for row in zip(*columns, strict=True)]
    bare = [{"src": row["src"], "mt": row["mt"]} for row in rows]
    oracle = {}
    for kind, hparams in KINDS.items():
        built = build_model(encoder=folder / "encoder", **hparams)
        save(folder / kind, built.state_dict(), dict(built.hparams))
        model = load_from_checkpoint(str(checkpoint(folder / kind)))
        oracle[kind] = predict(model, bare if kind == "kiwi" else rows)
        if kind == "unified":
            oracle["unified, no reference"] = predict(model, bare)
    rest = {key: value for key, value in built.state_dict().items() if not key.startswith("estimator")}
    save(folder / "partial", rest, dict(built.hparams))
    save(folder / "headless", built.state_dict(), {**built.hparams, "pretrained_model": "owner/encoder"})
    (folder / "oracle.json").write_text(json.dumps(oracle), encoding="utf-8")


def build_encoder(folder: Path, texts: list[str]) -> None:
    import sentencepiece
    from transformers import XLMRobertaConfig, XLMRobertaModel, XLMRobertaTokenizer, XLMRobertaTokenizerFast

    folder.mkdir(parents=True)
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=trained, vocab_size=120, hard_vocab_limit=False, minloglevel=2
    )
    (folder / "sentencepiece.bpe.model").write_bytes(trained.getvalue())
    slow = XLMRobertaTokenizer(vocab_file=str(folder / "sentencepiece.bpe.model"))
    tokenizer = XLMRobertaTokenizerFast(vocab_file=str(folder / "sentencepiece.bpe.model"))
    tokenizer.save_pretrained(folder)
    config = XLMRobertaConfig(
        vocab_size=len(slow),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=130,
        initializer_range=0.5,
        pad_token_id=slow.pad_token_id,
    )
    XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(folder)


def build_model(class_identifier: str, encoder: Path, **hparams: object):
    import torch
    from comet.models import str2model

    model = str2model[class_identifier](
        encoder_model="XLM-RoBERTa", pretrained_model=str(encoder), hidden_sizes=[24], **hparams
    )
    with torch.no_grad():
        list(model.estimator.parameters())[-2].mul_(SPREAD)
    return model


def save(folder: Path, state_dict: dict, hparams: dict) -> None:
    import pytorch_lightning
    import torch
    import yaml

    (folder / "checkpoints").mkdir(parents=True)
    saved = {"state_dict": state_dict, "hyper_parameters": hparams}
    torch.save({**saved, "pytorch-lightning_version": pytorch_lightning.__version__}, checkpoint(folder))
    (folder / "hparams.yaml").write_text(yaml.safe_dump(hparams), encoding="utf-8")


def checkpoint(folder: Path) -> Path:
    return folder / "checkpoints" / "model.ckpt"


def predict(model, rows: list[dict[str, str]]) -> list[float]:
    return [model.predict([row], batch_size=1, gpus=0, progress_bar=False)["scores"][0] for row in rows]


if __name__ == "__main__":
    main()
