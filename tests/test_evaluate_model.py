"""evaluate_model.py from the command line to the files, on tiny checkpoints and an invented language."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny
from test_comet import HELLO, HUB_ID, STUB

import evaluate_model
from stoney_rl import checkpoints, corpus, data, generation, lexemes, lexicon, models, planted, predictions
from stoney_rl.errors import StoneyError
from stoney_rl.metrics import comet, pass_at_k, suite
from stoney_rl.rewards.knowledge import Knowledge
from stoney_rl.text import normalize

REPOSITORY = Path(__file__).resolve().parent.parent
QUICK = ["--wandb_mode", "disabled", "--resamples", "1000", "--max_new_tokens", "6", "--batch_size", "4"]
GROUPS = {"all", "seen", "unseen"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An invented language's rows, a base model, an adapter on it and the merged model, as training leaves them.

    The adapter's weights are random: what is tested here is the evaluation, not the training.
    """
    import peft
    import torch

    root = tmp_path_factory.mktemp("world")
    rows = planted.PlantedLanguage(seed=5, num_lexemes=60).rows(rules_per_lexeme=2, templates_per_fact=2)
    source = data.write_jsonl(root / "rows.jsonl", rows)
    prepared = corpus.prepare(source, split_seed=1, test_fraction=0.1)
    base, adapter, merged = root / "base", root / "tuned_ckpt", root / "tuned_merged"
    tiny.tokenizer().save_pretrained(base)
    model = tiny.model()
    with torch.no_grad():  # at the usual size of random weights, a tiny model says the same to every prompt
        for name, weight in model.named_parameters():
            weight.mul_(20 if weight.dim() > 1 and "embed" not in name else 1)
    model.save_pretrained(base)
    model = models.load_model(models.find_model(str(base)), torch.float32)
    write_stage(base, checkpoints.describe_stage("base", arguments={}, fingerprint=checkpoints.fingerprint(model)))
    torch.manual_seed(7)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model, lora).eval()
    model.save_pretrained(adapter)
    stage = checkpoints.describe_stage(
        "sft", arguments={}, parent={"path": str(base)}, base_model=str(base), data=prepared.describe()
    )
    write_stage(adapter, stage | {"fingerprint": checkpoints.fingerprint(model)}, prepared)
    model = model.merge_and_unload()
    model.save_pretrained(merged)
    write_stage(merged, stage | {"fingerprint": checkpoints.fingerprint(model)}, prepared)
    for directory in (adapter, merged):
        tiny.tokenizer().save_pretrained(directory)
    return types.SimpleNamespace(
        root=root, rows=rows, source=source, prepared=prepared, base=base, adapter=adapter, merged=merged
    )


def write_stage(directory, stage, prepared=None):
    checkpoints.write_json(directory / checkpoints.STAGE_FILE, stage)
    if prepared:
        checkpoints.write_json(directory / corpus.SPLIT_FILE, prepared.training_record())


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No W&B setting of this machine, and an empty working directory."""
    for name in list(os.environ):
        if name.startswith("WANDB"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def evaluate(model, *argv, output="out"):
    """Run the script; return its results and its predictions by id."""
    evaluate_model.main(["--model_path", str(model), "--output_dir", str(output), *QUICK, *map(str, argv)])
    return read(output)


def read(output):
    results = json.loads((Path(output) / "results.json").read_text(encoding="utf-8"))
    return results, predictions.read(Path(output) / "predictions.jsonl")


def scores_of(results):
    """The scores without what may differ between two runs of the same thing."""
    return {name: system["groups"] for name, system in results["systems"].items()}, results["comparison"]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """One whole evaluation of the merged model beside its base and the memoriser."""
    output = tmp_path_factory.mktemp("finished") / "out"
    with contextlib.chdir(output.parent):
        results, records = evaluate(world.merged, "--baseline", "base", "--baseline", "retrieval", output=output)
    return types.SimpleNamespace(output=output, results=results, records=records)


@pytest.fixture
def generated(monkeypatch):
    """The prompts that are generated for, as text, and the names of the models that are loaded."""
    seen = types.SimpleNamespace(prompts=[], models=[])
    generate, load = generation.generate, models.load_model

    def counted(model, tokenizer, prompts, **options):
        seen.prompts += [tokenizer.decode(prompt) for prompt in prompts]
        return generate(model, tokenizer, prompts, **options)

    def named(source, *rest, **options):
        seen.models.append(Path(source.name).name)
        return load(source, *rest, **options)

    monkeypatch.setattr(generation, "generate", counted)
    monkeypatch.setattr(models, "load_model", named)
    return seen


def fixed_answers(monkeypatch, answer_of):
    """Generation that answers each question with ``answer_of[question]``, last row first."""

    def generate(model, tokenizer, prompts, **_):
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        questions = [next(question for question in answer_of if f"\n{question}<|im_end|>" in text) for text in texts]
        for index in reversed(range(len(prompts))):
            yield [generation.Completion(index, answer_of[questions[index]], 3, truncated=False)]

    monkeypatch.setattr(generation, "generate", generate)


# What is written.


def test_the_files_of_an_evaluation(world, finished):
    written = {str(path.relative_to(finished.output)) for path in finished.output.rglob("*") if path.is_file()}
    assert written == {
        *(
            "results.json",
            "predictions.jsonl",
            "lexicon.jsonl",
            "identity.json",
            "tracking.json",
            "summary.txt",
            "errors.html",
        ),
        *("results.png", "comparison.png"),
        *("baselines/base/predictions.jsonl", "baselines/retrieval/predictions.jsonl"),
    }
    assert not finished.output.with_name("out.partial").exists()
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in finished.output.glob("*.png"))

    lines = (finished.output / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    rows = {row.id: row for row in world.prepared.split.test}
    assert len(lines) == len(rows) == len(finished.records)
    for line in map(json.loads, lines):
        row = rows[line["id"]]
        assert (line["prompt"], line["reference"]) == (row.question, row.answer)
        assert line["seen"] == world.prepared.split.seen[row.id]
        assert (line["forms"], line["lexemes"]) == ([row.metadata["form"]], row.lexemes)
        assert isinstance(line["prediction"], str) and line["prediction"] != row.answer
    assert len({line["prediction"] for line in finished.records.values()}) > 10  # the model answers by its prompt


def test_no_number_without_its_signature(world, finished):
    results, certificate = finished.results, world.prepared.split.certificate
    assert results["stage"] == "evaluation" and results["seed"] == 0
    assert results["n"] == len(world.prepared.split.test)
    assert results["data"]["sha256"] == world.prepared.rowset.sha256
    assert results["data"]["certificate"] == json.loads(json.dumps(certificate))
    assert not any(results["data"]["certificate"]["overlaps"].values())
    assert results["training_rows_scored"] == 0
    assert list(results["systems"]) == ["tuned_merged", "base", "retrieval"]
    assert results["versions"]["torch"] and results["lineage"][0].startswith(f"{world.merged}: sft")
    for system in results["systems"].values():
        assert (system["n"], system["seed"], system["resamples"]) == (results["n"], 0, 1000)
        assert system["groups"].keys() == GROUPS
        sizes = system["group_sizes"]
        assert sizes["seen"] > 0 and sizes["unseen"] > 0 and sizes["seen"] + sizes["unseen"] == sizes["all"]
        for group, metrics in system["groups"].items():
            assert metrics.keys() == suite.STRING_METRICS.keys()
            for name, entry in metrics.items():
                assert entry["n"] + entry["unscored"] == sizes[group]
                assert name not in ("chrf", "exact", "form") or entry["n"] == sizes[group]
                assert entry["n"] == 0 or entry["low"] is None or entry["low"] <= entry["value"] <= entry["high"]
                assert "bs:1000|seed:0" in entry["signature"]
                assert ("chrF2++" in entry["signature"]) == (name == "chrf")
    compared = results["comparison"]
    assert compared["systems"] == ["base", "retrieval", "tuned_merged"] and compared["tests"] == 3 * 2 * 3
    assert list(compared["signatures"]) == ["chrf", "exact", "form"]
    assert results["errors"]["tuned_merged"]["asked"] == results["n"]


def test_the_summary_is_what_a_person_reads(finished, capsys):
    text = (finished.output / "summary.txt").read_text(encoding="utf-8")
    for words in ("tuned_merged", "base", "retrieval: no model;", "chrF++", "form accuracy", "unseen", "seed 0"):
        assert words in text
    assert re.search(r"^Unseen words: tuned_merged is (not shown to be )?(better|worse)", text, re.MULTILINE)
    assert text.rfind("Seen words: tuned_merged is worse than retrieval (chrF++") > text.rfind("chrF2++|")
    assert "words: retrieval is" not in text  # what a pair of baselines is to each other is in the table alone
    assert "answers lack a form they were asked for" in text
    assert "were trained on" not in text
    truncated = sum(record["truncated"] for record in finished.records.values())
    assert truncated and f"tuned_merged {truncated}" in text and "--max_new_tokens" in text


def test_nothing_that_is_evaluated_was_trained_on(world, finished):
    trained = {row.question for row in world.prepared.split.train}
    mentioned = [turn["content"] for row in world.prepared.split.train for turn in [*row.prompt, *row.completion]]
    for record in finished.records.values():
        assert record["prompt"] not in trained
        if not record["seen"]:
            assert not any(lexemes.contains_form(t, f) for t in mentioned for f in record["lexemes"] + record["forms"])


# Models and baselines.


def test_the_memoriser_answers_from_the_training_rows_alone(world, finished):
    answers = {row.answer for row in world.prepared.split.train}
    records = predictions.read(finished.output / "baselines/retrieval/predictions.jsonl")
    assert records.keys() == finished.records.keys()
    assert all(record["prediction"] in answers for record in records.values())
    unseen = finished.results["systems"]["retrieval"]["groups"]["unseen"]
    assert unseen["form"]["value"] == unseen["exact"]["value"] == 0  # by construction: no training row holds the form


def test_an_adapter_answers_as_its_merged_model(world, finished, generated):
    results, records = evaluate(world.adapter)
    assert {i: r["prediction"] for i, r in records.items()} == {i: r["prediction"] for i, r in finished.records.items()}
    assert list(results["systems"]) == ["tuned_ckpt"] and generated.models == ["tuned_ckpt"]


def test_another_checkpoint_and_an_earlier_evaluation_as_baselines(world, finished, generated):
    before = predictions.read(finished.output / "baselines/base/predictions.jsonl")
    results, _ = evaluate(world.merged, "--baseline", world.base, "--baseline", finished.output)
    assert generated.models == ["tuned_merged", "base"]  # the earlier evaluation loads nothing
    assert list(results["systems"]) == ["tuned_merged", "base", "out"]
    assert results["systems"]["out"] == results["systems"]["tuned_merged"]
    assert results["systems"]["out"] == finished.results["systems"]["tuned_merged"]
    assert results["systems"]["base"] == finished.results["systems"]["base"]
    assert predictions.read(Path("out/baselines/base/predictions.jsonl")) == before
    same = [one for one in results["comparison"]["differences"] if one["a"] == "out" and one["b"] == "tuned_merged"]
    assert len(same) == 6 and all(one["difference"] == 0 and one["shown"] is None for one in same)


def test_a_base_model_is_evaluated_on_rows_that_are_named(world):
    results, records = evaluate(world.base, "--dataset", world.source, "--split_seed", 1, "--num_samples", 8)
    assert len(records) == results["n"] == 8 and results["training_rows_scored"] is None
    assert records.keys() <= {row.id for row in world.prepared.split.test}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--baseline", "{merged}"], "a second system called tuned_merged"),
        (["--baseline", "retrieval", "--baseline", "retrieval"], "a second system called retrieval"),
        (["--baseline", "nowhere"], "nowhere: no such checkpoint directory"),
        (["--baseline", "broken"], "--baseline broken: has results.json but no predictions.jsonl"),
        (["--baseline", "{finished}", "--split", "validation"], "no answer to .* of these .* rows"),
        (["--resamples", "99"], "--resamples 99: expected at least 100"),
        (["--temperature", "0.5"], "--temperature: greedy answers have none; it goes with --num_generations"),
        (["--comet_model", "nowhere"], "--comet_model: goes with --run_comet"),
        (["--run_comet", "--comet_model", "nowhere"], "--comet_model COMET nowhere: no such file or folder"),
        (["--mauve_featurizer", "{base}"], "--mauve_featurizer: goes with --run_mauve"),
        (["--run_mauve", "--mauve_featurizer", "{adapter}"], "tuned_ckpt: an adapter; MAUVE's features need a whole"),
        (["--lexicon", "nowhere.jsonl"], "--lexicon nowhere.jsonl: no such file"),
        (["--split_seed", "3"], "--split_seed 3: .* was trained with 1; leave the flag out"),
        (["--dataset", "nothing.jsonl"], "nothing.jsonl"),
        (["--overwrite", "--output_dir", "{base}"], "--overwrite: .* is not an evaluation"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_generated(world, finished, generated, argv, words):
    Path("broken").mkdir()
    Path("broken/results.json").write_text("{}")
    places = {"merged": world.merged, "adapter": world.adapter, "base": world.base, "finished": finished.output}
    argv = [part.format(**places) for part in argv]
    with pytest.raises(StoneyError, match=words):
        evaluate(world.merged, *argv)
    assert generated.models == [] and not Path("out").exists()
    assert (world.base / "model.safetensors").exists()


def test_base_of_a_base_is_refused(world):
    with pytest.raises(StoneyError, match=r"--baseline base: .*base does not say what it was trained from"):
        evaluate(world.base, "--dataset", world.source, "--baseline", "base")


def test_an_earlier_evaluation_of_other_questions_is_refused(world, finished, generated):
    Path("earlier").mkdir()
    Path("earlier/results.json").write_text("{}")
    records = [dict(record) for record in finished.records.values()]
    records[3]["reference"] = "something else"
    predictions.append(Path("earlier/predictions.jsonl"), records)
    with pytest.raises(StoneyError, match=f"earlier: row {records[3]['id']} has another prompt or reference"):
        evaluate(world.merged, "--baseline", "earlier")
    assert generated.models == []


def test_a_baseline_that_was_trained_on_the_rows_is_refused(world, tmp_path, generated):
    other = corpus.prepare(world.source, split_seed=2)
    write_stage(tiny.checkpoint(tmp_path / "other"), {"stage": "sft", "data": other.describe()}, other)
    with pytest.raises(StoneyError, match=r"--baseline other: was trained on .* of these rows"):
        evaluate(world.merged, "--baseline", "other")
    assert generated.models == []


def test_weights_that_are_not_those_of_the_stage_are_refused(world, tmp_path):
    shutil.copytree(world.merged, tmp_path / "changed")
    tiny.model(seed=3).save_pretrained(tmp_path / "changed")
    with pytest.raises(StoneyError, match="changed: its logits differ"):
        evaluate(tmp_path / "changed")


# Finished and interrupted runs.


def test_a_finished_run_is_shown_again_and_loads_nothing(world, finished, generated, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.output.rglob("*")}
    results, _ = evaluate(world.merged, "--baseline", "base", "--baseline", "retrieval", output=finished.output)
    assert generated.models == generated.prompts == []
    out = capsys.readouterr().out
    assert (finished.output / "summary.txt").read_text(encoding="utf-8") in out and "already" in out
    assert results == finished.results
    assert {path: path.stat().st_mtime_ns for path in finished.output.rglob("*")} == before


@pytest.mark.parametrize(
    "argv",
    [
        ["--seed", "1"],
        ["--max_new_tokens", "7"],
        ["--num_samples", "5"],
        ["--num_generations", "2"],
        ["--split", "validation"],
        [],
    ],
)
def test_another_setting_needs_overwrite(world, finished, generated, argv):
    baselines = ["--baseline", "base", "--baseline", "retrieval"] if argv else ["--baseline", "retrieval"]
    with pytest.raises(StoneyError, match=r"out: .*--overwrite"):
        evaluate(world.merged, *baselines, *argv, output=finished.output)
    assert generated.models == [] and read(finished.output) == (finished.results, finished.records)


def test_overwrite_replaces_an_evaluation(world, generated):
    first, _ = evaluate(world.merged, "--num_samples", 6)
    again, records = evaluate(world.merged, "--num_samples", 5, "--overwrite")
    assert (first["n"], again["n"], len(records)) == (6, 5, 5)
    assert len(generated.prompts) == 11
    assert not list(Path().glob(".*"))  # the older one is gone


class Stop(Exception):
    pass


def stop_after(monkeypatch, batches):
    append, calls = predictions.append, []

    def stopping(path, records):
        append(path, records)
        calls.append(len(records))
        if len(calls) == batches:
            with path.open("a", encoding="utf-8") as file:
                file.write('{"id": "planted-5-0003", "prompt": "What is')  # as a kill leaves it
            raise Stop

    monkeypatch.setattr(predictions, "append", stopping)


@pytest.mark.parametrize("batches", [1, 3])
def test_an_interrupted_run_continues(world, finished, generated, monkeypatch, capsys, batches):
    argv = ["--baseline", "base", "--baseline", "retrieval"]
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, batches)
        evaluate(world.merged, *argv)
    assert not Path("out").exists()
    generated.prompts.clear()
    # Another batch size is allowed: it is what one changes after memory ran out.
    results, records = evaluate(world.merged, *argv, "--batch_size", 3)
    n = results["n"]
    assert len(generated.prompts) == n - 4 * batches + n  # the model's rest, and the base
    assert f"tuned_merged: {4 * batches} answers are there already, {n - 4 * batches} to go" in capsys.readouterr().out
    assert records == finished.records
    assert scores_of(results) == scores_of(finished.results)
    assert not Path("out.partial").exists()


def test_an_interruption_in_the_baseline_keeps_the_models_answers(world, finished, generated, monkeypatch):
    batches = -(-finished.results["n"] // 4) + 1
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, batches)
        evaluate(world.merged, "--baseline", "base", "--baseline", "retrieval")
    generated.models.clear()
    results, _ = evaluate(world.merged, "--baseline", "base", "--baseline", "retrieval")
    assert generated.models == ["base"] and scores_of(results) == scores_of(finished.results)


def test_an_unfinished_run_with_other_settings_needs_overwrite(world, monkeypatch, generated):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 1)
        evaluate(world.merged)
    generated.prompts.clear()
    with pytest.raises(StoneyError, match=r"out\.partial: .*--seed.*--overwrite"):
        evaluate(world.merged, "--seed", 1)
    assert generated.prompts == []
    _, records = evaluate(world.merged, "--seed", 1, "--num_samples", 5, "--overwrite")
    assert len(records) == 5 == len(generated.prompts)


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
import evaluate_model
from stoney_rl import predictions
append = predictions.append
def kill(path, records):
    append(path, records)
    with open(path, "a") as file:
        file.write('{{"id": "planted')
    os.kill(os.getpid(), signal.SIGKILL)
predictions.append = kill
evaluate_model.main({argv!r})
"""


def test_a_killed_run_continues(world, finished, generated):
    argv = ["--model_path", str(world.merged), "--output_dir", "out", *QUICK]
    argv += ["--baseline", "base", "--baseline", "retrieval"]
    script = KILLED.format(path=[str(REPOSITORY)], argv=argv)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert Path("out.partial/predictions.jsonl").read_text().endswith('\n{"id": "planted')
    results, records = evaluate(world.merged, "--baseline", "base", "--baseline", "retrieval")
    assert len(generated.prompts) == 2 * results["n"] - 4
    assert records == finished.records and scores_of(results) == scores_of(finished.results)


def test_answers_with_any_character_survive_the_file(world, monkeypatch):
    """U+2028, U+0085 and others end a line for str.splitlines, but not in JSON lines."""
    odd = 'a\u2028b\u2029c\x85d\x1ce\x0bf\x0cg\rh\ni\tj"k\\l\ufffd\U0001f600 â\u0302'
    fixed_answers(monkeypatch, {row.question: odd for row in world.rows})
    _, records = evaluate(world.merged, "--num_samples", 5)
    assert {record["prediction"] for record in records.values()} == {odd}


# Splits and samples.


@pytest.mark.parametrize("split", ["train", "all"])
def test_training_rows_are_called_memory(world, capsys, split):
    results, records = evaluate(world.merged, "--split", split, "--max_new_tokens", 1, "--batch_size", 64)
    trained = {row.id for row in world.prepared.split.train}
    assert results["training_rows_scored"] == len(trained & records.keys()) == len(trained) > 0
    assert results["identity"]["arguments"]["split"] == split
    summary = Path("out/summary.txt").read_text(encoding="utf-8")
    line = f"--split {split}: {len(trained)} of these rows were trained on. The numbers show memory, not ability."
    assert line in summary and line in capsys.readouterr().out
    assert all(records[row_id]["seen"] for row_id in trained)


def test_a_training_row_in_the_test_split_is_refused(world, monkeypatch, generated):
    split = world.prepared.split
    broken = dataclasses.replace(split, test=[*split.test, split.train[0]])
    monkeypatch.setattr(corpus, "split_rows", lambda *_, **__: broken)
    with pytest.raises(StoneyError, match="1 of the test rows were trained on"):
        evaluate(world.merged)
    assert generated.models == []


def test_a_sample_is_stratified_and_goes_by_the_seed(world, finished, capsys):
    results, records = evaluate(world.merged, "--num_samples", 10, output="a")
    whole = finished.results["systems"]["tuned_merged"]["group_sizes"]
    unseen = sum(not record["seen"] for record in records.values())
    assert unseen == round(10 * whole["unseen"] / whole["all"]) and len(records) == results["n"] == 10
    assert all(records[row_id] == finished.records[row_id] for row_id in records)
    _, again = evaluate(world.merged, "--num_samples", 10, output="b")
    _, other = evaluate(world.merged, "--num_samples", 10, "--seed", 1, output="c")
    assert again == records and other.keys() != records.keys()
    capsys.readouterr()
    _, every = evaluate(world.merged, "--num_samples", 400, output="d")
    assert every == finished.records and "all of them are used" in capsys.readouterr().out


def test_on_other_rows_the_trained_ones_are_left_out(world, tmp_path, capsys):
    news = planted.PlantedLanguage(seed=9, num_lexemes=12).rows(rules_per_lexeme=3, templates_per_fact=2)
    old = [dataclasses.replace(row, id=f"old-{i}") for i, row in enumerate(world.rows)]
    other = data.write_jsonl(tmp_path / "other.jsonl", [*old, *news])
    results, records = evaluate(world.merged, "--dataset", other, "--test_fraction", 0.2, "--max_new_tokens", 2)
    trained = world.prepared.split.train
    assert not {row.question for row in trained} & {record["prompt"] for record in records.values()}
    stems = {row.lexemes[0] for row in trained}
    assert all(record["seen"] == (record["lexemes"][0] in stems) for record in records.values())
    assert {record["seen"] for record in records.values()} == {True, False}
    assert results["training_rows_scored"] == 0 and results["data"]["source"] == str(other)
    out = capsys.readouterr().out
    assert "not the rows" in out and "rows were trained on and are left out" in out


# The score, end to end.


def test_fixed_answers_get_the_scores_worked_out_elsewhere(world, monkeypatch):
    """A third of the answers is right, a third holds the form and half a sentence more, a third is cut short.

    The expected chrF++ is sacreBLEU's own; exact match and form accuracy are counted here. chrF++ weighs recall, so it
    is not symmetric, and neither is form accuracy: predictions and references that change places change every group.
    """
    from sacrebleu.metrics import CHRF

    rows = world.prepared.split.test
    answers = {}
    for index, row in enumerate(rows):
        form = row.metadata["form"]
        longer = f"{form} is what one would say of it, or so it seems."
        answers[row.question] = [row.answer, longer, form[:2]][index % 3]
    fixed_answers(monkeypatch, answers)
    results, records = evaluate(world.merged)
    assert {record["prompt"]: record["prediction"] for record in records.values()} == answers
    assert all(record["reference"] == row.answer for row in rows for record in [records[row.id]])

    groups = {
        "all": rows,
        "seen": [row for row in rows if world.prepared.split.seen[row.id]],
        "unseen": [row for row in rows if not world.prepared.split.seen[row.id]],
    }
    chrf = CHRF(word_order=2)
    for group, members in groups.items():
        found = results["systems"]["tuned_merged"]["groups"][group]
        said, expected = [answers[row.question] for row in members], [row.answer for row in members]
        score = chrf.corpus_score(said, [expected]).score
        swapped = chrf.corpus_score(expected, [said]).score
        assert abs(score - swapped) > 2
        assert found["chrf"]["value"] == pytest.approx(score, abs=1e-9)
        kinds = [rows.index(row) % 3 for row in members]
        assert found["exact"]["value"] == pytest.approx(kinds.count(0) / len(kinds))
        assert found["form"]["value"] == pytest.approx((kinds.count(0) + kinds.count(1)) / len(kinds))
        assert found["form"]["value"] > found["exact"]["value"] > 0


# Every metric, and more of them later.


@pytest.fixture
def comet_worker(tmp_path, monkeypatch):
    """Puts a stub in the place of COMET's environment: it scores by the lengths of source, answer and reference."""

    def install(fault: str = "") -> Path:
        path = tmp_path / "comet_python"
        path.write_text(STUB.format(python=sys.executable, start="", hello=HELLO, fault=fault))
        path.chmod(0o755)
        monkeypatch.setattr(comet, "PYTHON", path)
        return path

    return install


@pytest.fixture(scope="module")
def known(world):
    """The lexicon of the world's language."""
    path = world.root / "lexicon.jsonl"
    planted.write_lexicon(path, planted.PlantedLanguage(5, 60).lexicon())
    return path


def test_everything_at_once(world, known, generated, comet_worker):
    comet_worker()
    argv = ["--baseline", "base", "--baseline", "retrieval", "--lexicon", known, "--num_samples", 16]
    argv += ["--num_generations", 3, "--run_comet", "--run_mauve", "--validate_metrics"]
    results, records = evaluate(world.merged, *argv)
    assert generated.models == ["tuned_merged", "base", "base"]  # the last time for MAUVE's features
    assert len(generated.prompts) == 2 * 16 * (1 + 3)  # greedy and sampled in one pass
    found = results["systems"]["tuned_merged"]["groups"]
    assert found["all"].keys() == {*suite.STRING_METRICS, "comet", "mauve", "pass@1", "pass@2", "pass@3"}
    rows = list(records.values())

    lengths = [
        sum(w * len(normalize(row[key])) for w, key in ((1, "prompt"), (100, "prediction"), (10000, "reference")))
        for row in rows
        if row["seen"] is False
    ]
    assert found["unseen"]["comet"]["value"] == pytest.approx(sum(lengths) / len(lengths))
    assert f"model:{HUB_ID}|sha256:{HELLO['sha256'][:16]}" in found["all"]["comet"]["signature"]
    assert found["all"]["mauve"]["value"] is None
    assert results["systems"]["base"]["notes"]["mauve"] == "withheld: 16 texts are too few for 50 buckets"

    knowledge = Knowledge.of(lexicon.read_lexicon(known))
    by_hand = suite.score_rows(suite.STRING_METRICS, rows, knowledge)
    for name, score in by_hand.items():
        assert found["all"][name]["value"] == pytest.approx(score.value), name
        assert (found["all"][name]["n"], found["all"][name]["unscored"]) == (score.n, score.unscored), name
    assert found["all"]["pass@2"]["value"] == pytest.approx(pass_at_k.scores(rows)["pass@2"].value)
    assert results["systems"]["retrieval"]["groups"]["all"].keys().isdisjoint({"pass@1", "pass@2", "pass@3"})

    assert results["validity"]["metrics"].keys() == {*suite.STRING_METRICS, "comet", "mauve"}
    assert results["validity"]["metrics"]["form"]["kinds"]["letters"]["verdict"] in ("falls", "saturates")
    for name, counted in results["errors"].items():
        assert counted["asked"] == sum(counted["classes"].values()) + counted["hits"] == 16, name
    assert results["unavailable"] == {}
    page, text = (Path("out", name).read_text(encoding="utf-8") for name in ("errors.html", "summary.txt"))
    assert all(row["id"] in page for row in rows)
    for words in ("COMET", "MAUVE", "pass@3", "withheld: 16 texts are too few", "Gold answers broken on purpose"):
        assert words in text
    assert Path("out/validation.png").read_bytes().startswith(b"\x89PNG")
    assert evaluate_model.main(["--verify", "out/results.json"]) == 0


def test_what_is_tracked(world, known, monkeypatch):
    from stoney_rl import tracking

    sent: dict[str, list] = {}
    for kind in ("log", "table", "image", "html", "artifact"):

        def send(self, *given, kind=kind, **_):
            sent.setdefault(kind, []).append(given)

        monkeypatch.setattr(tracking.Tracker, kind, send)
    _, records = evaluate(world.merged, "--baseline", "retrieval", "--lexicon", known, "--num_samples", 8)
    numbers = {key for (metrics,) in sent["log"] for key in metrics}
    assert {"tuned_merged/unseen/chrf", "retrieval/all/hallucinated_form_rate"} <= numbers
    tables = {key: (columns, list(lines)) for key, columns, lines in sent["table"]}
    columns, lines = tables.pop("predictions")
    assert columns == ["id", "seen", "prompt", "reference", "tuned_merged", "retrieval"]
    assert {line[0]: line[4] for line in lines} == {i: row["prediction"] for i, row in records.items()}
    assert tables.keys() == {"errors/tuned_merged", "errors/retrieval"}
    assert [key for key, _ in sent["image"]] == ["comparison", "results"]
    assert [key for key, _ in sent["html"]] == ["errors"] and sent["artifact"][0][:2] == ("out", "evaluation")


@pytest.mark.parametrize("fault", ["missing", "os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(60)"])
def test_without_comet_the_other_metrics_come_out(world, finished, generated, comet_worker, monkeypatch, capsys, fault):
    comet_worker(fault)
    if fault == "missing":
        monkeypatch.setattr(comet, "PYTHON", Path("nowhere/python"))
    shutil.copytree(finished.output, "out")
    argv = ["--baseline", "base", "--baseline", "retrieval"]
    asked = [*argv, "--run_comet", "--comet_timeout", 1]
    results, _ = evaluate(world.merged, *asked)
    words = {"missing": "its environment is missing", "time.sleep(60)": "no answer for 1 s"}.get(fault, "was killed")
    assert words in results["unavailable"]["comet"]
    assert scores_of(results) == scores_of(finished.results)
    summary = Path("out/summary.txt").read_text(encoding="utf-8")
    assert "COMET is not in these numbers" in summary and words in " ".join(summary.split())
    assert "the other metrics" in capsys.readouterr().out

    comet_worker()  # once it works, the same command adds it
    again, _ = evaluate(world.merged, *asked)
    assert again["unavailable"] == {} and again["systems"]["base"]["groups"]["unseen"]["comet"]["n"] > 0
    assert generated.models == generated.prompts == []


def test_what_failed_may_be_left_out_later(world, monkeypatch, generated):
    monkeypatch.setattr(comet, "PYTHON", Path("nowhere/python"))
    failed, _ = evaluate(world.merged, "--num_samples", 4, "--run_comet")
    without, _ = evaluate(world.merged, "--num_samples", 4)
    assert failed["unavailable"].keys() == {"comet"} and without["unavailable"] == {}
    assert len(generated.prompts) == 4


def test_more_metrics_later_generate_nothing_again(world, finished, known, generated):
    shutil.copytree(finished.output, "out")
    argv = ["--baseline", "base", "--baseline", "retrieval"]
    results, records = evaluate(world.merged, *argv, "--run_mauve", "--resamples", 200, "--lexicon", known)
    assert generated.prompts == [] and generated.models == ["base"]  # for MAUVE's features
    assert records == finished.records and results["seconds"] == finished.results["seconds"]
    found, before = (one["systems"]["base"]["groups"]["all"] for one in (results, finished.results))
    assert "mauve" in found and found["chrf"]["value"] == before["chrf"]["value"]
    assert before["morphology_error_rate"]["n"] == 0 < found["morphology_error_rate"]["n"]  # the lexicon segments
    assert results["systems"]["base"]["resamples"] == 200
    generated.models.clear()
    with pytest.raises(StoneyError, match="out: was scored with --run_mauve; give that again to keep it, or"):
        evaluate(world.merged, *argv)
    assert generated.models == [] and read("out") == (results, records)


def test_where_the_lexicon_comes_from(world, known, capsys):
    evaluate(world.merged, "--num_samples", 4)
    said = capsys.readouterr().out
    n = len(world.prepared.split.train)
    assert re.search(rf"lexicon: \d+ forms that the {n} training rows mention; --lexicon gives a better one", said)
    evaluate(world.merged, "--num_samples", 4, "--lexicon", known, output="other")
    assert f"lexicon: {known}, " in capsys.readouterr().out
    assert lexicon.read_lexicon("other/lexicon.jsonl") == lexicon.read_lexicon(known)


def test_a_grpo_checkpoint_beside_its_parents(world, generated, capsys):
    shutil.copytree(world.merged, "grpo")
    stage = checkpoints.read_stage(world.merged) | {"stage": "grpo", "base_model": str(world.merged)}
    write_stage(Path("grpo"), stage | {"parent": {"path": str(world.merged)}})
    argv = ["--num_samples", 400, "--baseline", world.base, "--baseline", "base", "--run_mauve"]
    results, _ = evaluate("grpo", *argv)
    assert results["comparison"]["systems"] == ["base", "tuned_merged", "grpo"]
    assert generated.models == ["grpo", "base", "tuned_merged", "base"]
    assert results["training_rows_scored"] == 0 and results["n"] == len(world.prepared.split.test)
    assert f"--run_mauve: features of {world.base}" in capsys.readouterr().out


# Several samples a prompt.


@pytest.fixture(scope="module")
def sampled(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("sampled") / "out"
    return evaluate(world.merged, "--num_samples", 6, "--num_generations", 3, output=output)[1]


def test_samples_change_no_greedy_answer_and_depend_on_no_batch(world, finished, sampled):
    for row_id, row in sampled.items():
        assert {key: value for key, value in row.items() if key != "samples"} == finished.records[row_id]
        assert row["samples"]["temperature"] == 0.8 and len(row["samples"]["texts"]) == 3
    drawn = [text for row in sampled.values() for text in row["samples"]["texts"]]
    assert len(set(drawn)) > 12
    _, other = evaluate(world.merged, "--num_samples", 6, "--num_generations", 3, "--batch_size", 7)
    assert other == sampled
    _, cold = evaluate(world.merged, "--num_samples", 6, "--num_generations", 3, "--temperature", 1e-6, output="cold")
    assert all(text == row["prediction"] for row in cold.values() for text in row["samples"]["texts"])


def test_an_interrupted_run_of_samples_continues(world, sampled, monkeypatch):
    argv = ["--num_samples", 6, "--num_generations", 3, "--batch_size", 5]
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 2)
        evaluate(world.merged, *argv)
    assert 0 < len(predictions.read(Path("out.partial/predictions.jsonl"))) < 6
    assert evaluate(world.merged, *argv)[1] == sampled


def test_every_sample_has_a_seed_of_its_own():
    seeds = [predictions._sample_seed(seed, row, n) for seed in (0, 1) for row in ("a", "b") for n in (0, 1, 2)]
    assert seeds[::3] == [None] * 4 and len({*seeds} - {None}) == 8


def test_samples_are_drawn_from_the_softmax():
    import torch

    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    lines = logits.repeat(20_001, 1)
    noise = generation._GumbelNoise([*range(20_000), None], temperature=0.7)
    drawn = noise(None, lines)
    shares = torch.bincount(drawn[:-1].argmax(dim=1), minlength=4) / 20_000
    assert shares.tolist() == pytest.approx(torch.softmax(logits / 0.7, dim=0).tolist(), abs=0.012)
    assert torch.equal(drawn[-1], logits) and torch.equal(lines[0], logits)  # greedy lines as they were


# The same numbers again.


@pytest.fixture
def copied(finished):
    shutil.copytree(finished.output, "out")
    return Path("out")


def verify(capsys, output="out"):
    capsys.readouterr()
    code = evaluate_model.main(["--verify", str(Path(output) / "results.json")])
    return code, capsys.readouterr().out


def test_verify_makes_the_same_numbers_and_answers(copied, generated, capsys):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    code, said = verify(capsys)
    assert code == 0 and "out/results.json: equal" in said and "not checked" not in said
    assert generated.models == ["tuned_merged", "base"]
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


def tamper(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    checkpoints.write_json(path, content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda r: r["systems"]["base"]["groups"]["seen"]["chrf"].update(value=0.123),
            "systems.base.groups.seen.chrf.value: recorded 0.123, now",
        ),
        (
            lambda r: r["comparison"]["differences"][3].update(p_holm=0.01),
            "comparison.differences[3].p_holm: recorded 0.01",
        ),
        (lambda r: r["errors"]["retrieval"].update(misses=0), "errors.retrieval.misses: recorded 0, now"),
        (lambda r: r["systems"].pop("retrieval"), "systems.retrieval: recorded null"),
    ],
)
def test_verify_finds_a_changed_number(copied, capsys, change, words):
    tamper(copied / "results.json", change)
    code, said = verify(capsys)
    assert code == 1 and f"✗ {words}" in said and "differences: 1 (" in said


def test_verify_finds_a_changed_answer(copied, capsys):
    path = copied / "baselines/base/predictions.jsonl"
    rows = list(predictions.read(path).values())
    rows[0]["prediction"] = rows[0]["reference"]
    predictions.write(path, rows)
    code, said = verify(capsys)
    assert code == 1
    assert "✗ baselines/base/predictions.jsonl: not the file that was scored" in said
    assert "✗ systems.base.groups.all.chrf.value: recorded" in said
    n = len(rows)
    assert f"base: 1 of {n} rows are answered otherwise now, such as {rows[0]['id']}" in " ".join(said.split())


def test_verify_finds_another_model_behind_the_same_record(copied, world, capsys, monkeypatch):
    fixed_answers(monkeypatch, {row.question: "liẖtâlo" for row in world.rows})
    code, said = verify(capsys)
    assert code == 1 and re.search(r"✗ tuned_merged: (\d+) of \1 rows are answered otherwise now", said)


def test_verify_says_what_it_can_not_check(copied, capsys, generated):
    tamper(copied / "results.json", lambda r: r["arguments"].update(model_path="gone", dataset="gone.jsonl"))
    code, said = verify(capsys)
    assert code == 0 and "not checked: whether the systems answer so again: the rows can't be read" in said
    assert generated.models == []


def test_verify_of_a_checkpoint_that_was_trained_again(copied, capsys, generated):
    tamper(copied / "results.json", lambda r: r["identity"]["systems"]["base"].update(fingerprint="0" * 64))
    code, said = verify(capsys)
    assert code == 0 and re.search(r"not checked: whether base answers so again: .*another checkpoint", said)
    assert generated.models == ["tuned_merged"]


@pytest.mark.parametrize("content", ["", "[]", "{}", None])
def test_verify_refuses_what_is_no_evaluation(content):
    if content is not None:
        Path("results.json").write_text(content)
    with pytest.raises(StoneyError, match=r"--verify results.json: (not readable|no results.json of an evaluation)"):
        evaluate_model.main(["--verify", "results.json"])


def test_verify_without_predictions(copied):
    (copied / "predictions.jsonl").unlink()
    with pytest.raises(StoneyError, match="predictions.jsonl is missing beside it"):
        evaluate_model.main(["--verify", str(copied / "results.json")])
