"""MAUVE: equal to its package, honest about small samples, features that padding and batches don't change."""

import numpy as np
import pytest
import tiny

from stoney_rl.errors import StoneyError
from stoney_rl.metrics import mauve
from stoney_rl.metrics.mauve import Featurizer
from stoney_rl.metrics.suite import Gold, mauve_metric

TOPICS = np.random.default_rng(7).normal(size=(30, 16))


def encode(texts):
    """Stand-in features of texts such as "12 5": near topic 12 of 30; the rest of the text makes the noise."""
    rows = []
    for text in texts:
        topic, rest = map(int, text.split())
        rows.append(TOPICS[topic] + 0.5 * np.random.default_rng([topic, rest]).normal(size=16))
    return np.array(rows, dtype=np.float32)


FAKE = Featurizer("fake", encode)


def texts(n, seed, topics=range(30)):
    rng = np.random.default_rng(seed)
    return [f"{rng.choice(list(topics))} {rng.integers(1 << 30)}" for _ in range(n)]


def score(predictions, references):
    return mauve.mauve(predictions=predictions, references=references, featurizer=FAKE)


@pytest.fixture(scope="module")
def gold():
    return texts(1200, seed=1)


def test_equals_the_package_for_each_seed(gold):
    from mauve import compute_mauve

    answers, gold = texts(600, seed=2, topics=range(20)), gold[:600]
    options = {"p_features": encode(answers), "q_features": encode(gold), "num_buckets": mauve.BUCKETS}
    values = [compute_mauve(**options, seed=seed).mauve for seed in mauve.SEEDS]
    found = score(answers, gold)
    assert found.value == pytest.approx(np.mean(values), abs=1e-12)
    assert found.spread == (min(values), max(values))
    assert found.spread[0] < found.spread[1], "k-means seeds differ, and the spread says by how much"
    assert (found.n, found.rows, found.unscored) == (600, (), 0)
    assert (
        found.signature
        == "MAUVE|features:fake|buckets:50|seeds:5|null:10-half-splits|version:0.4.0|norm:nfc+apostrophe"
    )


def test_like_gold_far_from_gold_and_in_another_order(gold):
    metric, references = mauve_metric(FAKE), Gold(references=gold)
    same = metric(texts(1200, seed=3), references)
    assert same.value > 0.95
    assert same.note.startswith("null check passed: gold against gold gives 0.9")
    assert metric(texts(1200, seed=4, topics=range(3)), references).value < 0.1
    half = metric(texts(1200, seed=5, topics=range(15)), references).value
    assert 0.1 < half < 0.95
    shuffled = [gold[i] for i in np.random.default_rng(0).permutation(len(gold))]
    assert metric(shuffled, references).value == pytest.approx(1, abs=1e-6), (
        "MAUVE does not see which row an answer is of"
    )


def test_null_check_by_sample_size(gold):
    means = {n: np.mean(mauve.null_values(encode(gold[:n]))) for n in (60, 150, 500, 1200)}
    assert sorted(means.values()) == list(means.values()), "the bias shrinks as texts are added"
    assert means[150] < mauve.USABLE < means[500] < mauve.SOUND < means[1200]


def test_why_the_number_of_buckets_is_fixed(gold, monkeypatch):
    """With the package's own number, a tenth of the texts, the null check finds 40 texts as good as 400."""
    for n in (40, 400):
        monkeypatch.setattr(mauve, "BUCKETS", n // 20)
        assert 0.9 < np.mean(mauve.null_values(encode(gold[:n]))) < 0.98


@pytest.mark.parametrize(
    ("n", "note"),
    [
        (20, "withheld: 20 texts are too few for 50 buckets"),
        (49, "withheld: 49 texts are too few for 50 buckets"),
        (51, "withheld: gold against gold gives 0."),
        (150, "withheld: gold against gold gives 0."),
    ],
)
def test_withheld_where_gold_does_not_resemble_gold(n, note, gold):
    found = score(gold[:n], gold[:n])
    assert (found.value, found.spread, found.n) == (None, None, n)
    assert found.note.startswith(note)
    assert "spread" not in found.as_dict("mauve")


def test_biased_in_between(gold):
    found = score(texts(500, seed=6), gold[:500])
    assert 0.5 < found.value < 1
    assert found.note.startswith("biased: gold against gold gives 0.")
    assert "(n = 250 a side" in found.note


@pytest.mark.parametrize(("null", "start"), [(0.7999, "withheld"), (0.8, "biased"), (0.9499, "biased"), (0.95, "null")])
def test_thresholds(null, start, gold, monkeypatch):
    monkeypatch.setattr(mauve, "null_values", lambda _: [null, null])
    found = score(gold[:60], gold[:60])
    assert found.note.startswith(start)
    assert (found.value is None) == (start == "withheld")


def test_in_the_suite_quietly_with_one_null_check(gold, capfd, monkeypatch):
    metric = mauve_metric(FAKE)
    first = metric(gold[:400], Gold(references=gold[400:800]))
    assert first == score(gold[:400], gold[400:800])
    nulls = []
    monkeypatch.setattr(mauve, "null_values", lambda features: nulls.append(len(features)) or [1.0])
    assert first == metric(gold[:400], Gold(references=gold[400:800])), "the null check of a gold set runs once"
    assert nulls == []
    assert metric(gold[:300], Gold(references=gold[400:700])).note.endswith("1.00 to 1.00), not 1")
    assert nulls == [300]
    assert capfd.readouterr().err == "", "faiss warns in C++ about the few points that the null check measures"
    with pytest.raises(StoneyError, match="400 predictions but 399 references"):
        metric(gold[:400], Gold(references=gold[:399]))


TEXTS = ["", "tâlo", "You say liẖtâlo.", "a " * 40, "tâlo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    import torch
    from transformers import BertConfig, BertModel

    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=259, **sizes)).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def states(path, text):
    """The last layer's states [token, dimension] of one text on its own."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    with torch.no_grad():
        return model(**tokenizer(text or " ", return_tensors="pt")).last_hidden_state[0].numpy()


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_features_are_those_of_each_text_alone(kind, folder, encoder):
    path = {"causal": folder, "encoder": encoder}[kind]
    featurizer = mauve.load_featurizer(str(path), batch_size=3)
    found = featurizer.encode(TEXTS)
    alone = [states(path, text) for text in TEXTS]
    expected = [one[-1] if kind == "causal" else one.mean(axis=0) for one in alone]
    assert found.shape == (5, 32)
    assert found == pytest.approx(np.array(expected), abs=1e-5)
    name, digest, state = featurizer.label.split(":")
    assert (name, len(digest), state) == (path.name, 12, "last" if kind == "causal" else "mean")


def test_other_weights_under_one_name_have_another_label(folder, tmp_path):
    label = mauve.load_featurizer(str(folder)).label
    assert mauve.load_featurizer(str(folder)).label == label
    other = tiny.checkpoint(tmp_path / folder.name, seed=1)
    assert mauve.load_featurizer(str(other)).label != label


def test_each_text_is_encoded_once_and_cut(folder, monkeypatch):
    from transformers import LlamaModel

    shapes, forward = [], LlamaModel.forward
    monkeypatch.setattr(
        LlamaModel,
        "forward",
        lambda self, **inputs: shapes.append(inputs["input_ids"].shape) or forward(self, **inputs),
    )
    featurizer = mauve.load_featurizer(str(folder), batch_size=4, max_tokens=20)
    first = featurizer.encode(TEXTS)
    assert [tuple(shape) for shape in shapes] == [(4, 20)], "four different texts, one batch, at most 20 tokens"
    assert (featurizer.encode(TEXTS[::-1]) == first[::-1]).all()
    assert len(shapes) == 1


def test_featurizer_refuses_adapters_and_broken_folders(folder, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(StoneyError, match="an adapter; MAUVE's features need a whole model"):
        mauve.load_featurizer(str(tmp_path))
    with pytest.raises(StoneyError, match="no such checkpoint directory"):
        mauve.load_featurizer(str(tmp_path / "nothing"))
    broken = tiny.checkpoint(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(StoneyError, match="the model cannot be loaded"):
        mauve.load_featurizer(str(broken))
    no_model = tiny.checkpoint(tmp_path / "no_model")
    (no_model / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(StoneyError, match="can't be loaded as a source of features"):
        mauve.load_featurizer(str(no_model))


def test_mauve_from_a_folder(folder):
    """A whole run on a random model: the words are invented."""
    stems = [a + b + c for a in "tmnk" for b in ("âl", "îv", "ûf") for c in ("o", "a", "e", "ite", "ulo")]
    ends = ["", "ṯel", "ẖov", "ṯul", "ka", "mi", "so", "ju", "ne", "ba", "gi", "du"]
    references = [f'"liẖ{stem}{end}".' for stem in stems for end in ends]
    found = mauve.mauve(
        predictions=["no"] * len(references), references=references, featurizer=mauve.load_featurizer(str(folder))
    )
    assert found.n == 720
    assert found.value < 0.05, found.note
