"""The prepared dataset directory: what is written comes back, and what was changed since is refused. Words are invented."""

import json

import pytest

from stoney_rl import checkpoints, corpus, prepared
from stoney_rl.data import load_rows, write_jsonl
from stoney_rl.errors import StoneyError
from stoney_rl.planted import PlantedLanguage


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rows = PlantedLanguage(0, 30).rows(rules_per_lexeme=2, templates_per_fact=2)
    return write_jsonl(tmp_path_factory.mktemp("source") / "rows.jsonl", rows)


def make(directory, source, **split):
    """A prepared directory of ``source``, as the stage makes it but without its report."""
    made = corpus.prepare(source, **split)
    with checkpoints.staged(directory) as work:
        prepared.write(work, made.rowset, made.split)
        stage = {"stage": prepared.STAGE, "data": made.describe(), "files": prepared.file_hashes(work)}
        checkpoints.write_json(work / checkpoints.STAGE_FILE, stage)
    return made


def test_the_split_comes_back_as_it_was_made(tmp_path, source):
    made = make(tmp_path / "prepared", source, split_seed=3, test_fraction=0.2)
    back = corpus.prepare(tmp_path / "prepared")
    assert back.split == made.split
    assert back.rowset.sha256 == made.rowset.sha256
    assert back.split_arguments == {"split_seed": 3, "test_fraction": 0.2, "validation_fraction": 0.05}
    assert sorted(row.id for row in back.rowset.rows) == sorted(row.id for row in made.rowset.rows)
    assert back.describe()["source"] == str(tmp_path / "prepared")


def test_any_metadata_and_several_turns_come_back(tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Do you know the invented words?"},
                {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": f'What does "{stem}" mean?'},
                {"role": "assistant", "content": "To gather."},
            ],
            "tags": [1, None, {"deep": ["x", 2.5, True]}],
            "when": None if n % 2 else "2026-01-01",
        }
        for n, stem in enumerate(PlantedLanguage(0, 40).stems)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    made = make(tmp_path / "prepared", path)
    assert corpus.prepare(tmp_path / "prepared").split == made.split


def test_the_same_rows_give_the_same_bytes(tmp_path, source):
    for name in ("a", "b"):
        make(tmp_path / name, source)
    assert prepared.file_hashes(tmp_path / "a") == prepared.file_hashes(tmp_path / "b")
    make(tmp_path / "c", source, split_seed=1)
    assert prepared.file_hashes(tmp_path / "a") != prepared.file_hashes(tmp_path / "c")


def test_seed_and_fractions_that_contradict_it_are_refused(tmp_path, source):
    make(tmp_path / "prepared", source, split_seed=3)
    assert corpus.prepare(tmp_path / "prepared", split_seed=3, test_fraction=0.1).split.certificate["seed"] == 3
    with pytest.raises(StoneyError, match=r"--split_seed 4: .*prepared with 3; leave the flag out"):
        corpus.prepare(tmp_path / "prepared", split_seed=4)
    with pytest.raises(StoneyError, match="revision 'v1' was given, but .* is local"):
        corpus.prepare(tmp_path / "prepared", revision="v1")


@pytest.mark.parametrize("name", ["train.parquet", "test.parquet", "certificate.json", "dropped.jsonl"])
def test_a_changed_or_missing_file_is_refused(tmp_path, source, name):
    make(tmp_path / "prepared", source)
    path = tmp_path / "prepared" / name
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(
        StoneyError, match=f"{name}: not what was written .* python inspect_hf_dataset.py .*--overwrite"
    ):
        corpus.prepare(tmp_path / "prepared")
    path.unlink()
    with pytest.raises(StoneyError, match=f"{name} is missing"):
        corpus.prepare(tmp_path / "prepared")


def test_datasets_reads_its_splits(tmp_path, source, monkeypatch):
    datasets = pytest.importorskip("datasets")
    made = make(tmp_path / "prepared", source)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    loaded = datasets.load_dataset(str(tmp_path / "prepared"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(loaded[name]) for name in loaded} == {
        name: len(getattr(made.split, name)) for name in ("train", "validation", "test")
    }
    first = made.split.test[0]
    assert loaded["test"][0]["prompt"] == first.prompt and loaded["test"][0]["completion"] == first.completion


def test_one_of_its_files_is_a_source_too(tmp_path, source):
    made = make(tmp_path / "prepared", source)
    rowset = load_rows(tmp_path / "prepared" / "test.parquet")
    assert rowset.rows == made.split.test and not rowset.quarantine


def test_a_model_trained_on_the_source_recognises_the_prepared_rows(tmp_path, source):
    made = make(tmp_path / "prepared", source)
    back = corpus.prepare(tmp_path / "prepared")
    assert back.training_record() == made.training_record()
