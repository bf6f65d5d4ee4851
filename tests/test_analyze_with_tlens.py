"""analyze_with_tlens.py as a user runs it, on tiny models: what it writes, what it says again, what it refuses."""

import json
import shutil

import pytest
import tiny
import torch

import analyze_with_tlens
from stoney_rl import checkpoints, corpus, runs
from stoney_rl.errors import StoneyError
from stoney_rl.interp import analysis, hooked, plan, report
from stoney_rl.lexicon import LexiconEntry

LEXICON = "data/planted/lexicon.jsonl"  # an invented language


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Two models of one family and one of another vocabulary."""
    return tiny.checkpoints(tmp_path_factory.mktemp("models"))


def arguments(models, output, *more, model="tuned", compare=("base",)):
    given = ["--model_path", str(models / model), "--output_dir", str(output), "--lexicon", LEXICON]
    given += ["--families", "lookup", "--num_pairs", "24", "--random_models", "1", "--top_k", "3"]
    given += ["--sample_text", "What does it mean?", *more]
    return given + (["--compare", *(str(models / name) for name in compare)] if compare else [])


@pytest.fixture(scope="session")
def analysed(models, tmp_path_factory):
    output = tmp_path_factory.mktemp("analysis") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        assert analyze_with_tlens.main(arguments(models, output)) == 0
    return output


def test_writes_a_report_with_everything_in_it(analysed):
    names = {path.name for path in analysed.iterdir()}
    assert {"report.html", "results.json", "summary.txt", "stage.json", "measured"} <= names
    assert any(name.startswith("heads-attribution_patching") for name in names)
    assert (analysed / "report.html").stat().st_size < report.MAX_BYTES
    results = json.loads((analysed / "results.json").read_text())
    report.check(results)
    assert [model["name"] for model in results["models"]] == ["tuned", "base"]
    assert {measure["key"] for measure in results["measures"]} >= {
        "entropy", "sink", "previous_token", "induction", "attribution/lookup", "attribution_patching/lookup",
    }  # fmt: skip
    assert all(
        value <= each["limit"] for each in results["trust"] for value in each["values"].values() if value is not None
    )
    assert results["lens"]["values"].keys() == {"tuned", "base"}
    assert set(results["lens"]["values"]["base"]) == {"plain"}  # no held-out rows to fit a tuned one to
    assert len(results["neurons"]) == 6 and "paths" in results
    assert "checks of the hooks, sums and patches hold for tuned and base" in (analysed / "summary.txt").read_text()


def test_values_of_every_pair_are_kept(analysed):
    kept = analysis.read_task(analysed / runs.MEASURED / "tuned", "patching")
    assert kept.arrays["lookup/heads"].shape == (24, 2, 4)
    assert kept.arrays["lookup/top"].shape == (12, len(kept.facts["top"]["lookup"]))


def test_a_finished_analysis_is_shown_again(analysed, models, monkeypatch, capsys):
    monkeypatch.setattr(hooked, "load_hooked", lambda *_, **__: pytest.fail("opened a model"))
    assert analyze_with_tlens.main(arguments(models, analysed)) == 0
    assert "analysed with these settings already" in capsys.readouterr().out


def test_a_stopped_analysis_goes_on_where_it_was_and_comes_to_the_same(analysed, models, tmp_path, monkeypatch):
    output = tmp_path / "out"
    shutil.copytree(analysed, runs.partial_directory(output))
    left = runs.partial_directory(output)
    identity = json.loads((left / "stage.json").read_text())["identity"]
    checkpoints.write_json(left / runs.IDENTITY_FILE, identity)
    for name in ("report.html", "results.json", "stage.json"):
        (left / name).unlink()
    (left / runs.MEASURED / "base" / "circuit.json").unlink()
    done = []
    for name, task in list(analysis.TASKS.items()):
        monkeypatch.setitem(
            analysis.TASKS, name, lambda *given, name=name, task=task: done.append(name) or task(*given)
        )
    assert analyze_with_tlens.main(arguments(models, output)) == 0
    assert done == ["circuit"]
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (analysed, output))
    assert first.pop("about") and second.pop("about")
    assert first == second


def test_page_pictures_and_tables_go_to_wandb_with_the_lineage(models, tmp_path, monkeypatch):
    sent = []

    class Recorder:
        run_id, group, record = "run", "group", {"run_id": "run"}

        def __getattr__(self, kind):
            return lambda *given, **_: sent.append((kind, *given))

    monkeypatch.setattr(analyze_with_tlens.tracking, "start_stage", lambda *_, **__: Recorder())
    output = tmp_path / "out"
    assert analyze_with_tlens.main(arguments(models, output, "--tasks", "attention", compare=())) == 0
    kinds = [kind for kind, *_ in sent]
    assert kinds[-1] == "finish" and "image" in kinds
    assert ("html", "report", output / "report.html") in sent
    assert ("artifact", "out", "analysis", str(output)) in sent
    tables = {given[0]: given[2] for kind, *given in sent if kind == "table"}
    assert len(tables["trust"]) >= 10 and "checks of the hooks" in tables["findings"][0][0]


def test_identical_checkpoints_differ_by_nothing(models, tmp_path):
    output = tmp_path / "out"
    given = arguments(models, output, "--tasks", "attention", "patching", compare=("twin",))
    assert analyze_with_tlens.main(given) == 0
    results = json.loads((output / "results.json").read_text())
    for measure in results["measures"]:
        (difference,) = measure["differences"]
        assert difference["of"] == ["tuned", "twin"]
        assert all(value == 0 for row in difference["mean"] for value in row)
        assert not any(found for row in difference.get("found", []) for found in row)


def test_a_broken_invariant_is_said_and_is_the_exit_code(models, tmp_path, monkeypatch, capsys):
    right = hooked.HookedModel.W_O
    monkeypatch.setattr(
        hooked.HookedModel, "W_O", lambda self, layer: right(self, layer).flatten(0, 1).T.reshape(4, 8, 32).contiguous()
    )
    given = arguments(models, tmp_path / "out", "--tasks", "attribution", compare=())
    assert analyze_with_tlens.main(given) == 1
    assert "DO NOT BELIEVE THE FIGURES OF tuned (heads = their attention" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--heads", "0.1", "7.3"], "--heads 7.3: .* has layers 0 to 1, heads 0 to 3"),
        (["--layers", "1-2"], "--layers 1-2: .* has layers 0 to 1"),
        (["--trace", "nowhere"], "--trace nowhere: no trace.jsonl there"),
        (["--lexicon", "nowhere.jsonl"], "--lexicon nowhere.jsonl: no such file"),
        (["--sample_text", "a" * 500], "--sample_text: 500 tokens; expected 2 to 120"),
        (["--pairs", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--families", "affix"], "affix: no usable prompt pair"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(models, tmp_path, more, message):
    with pytest.raises(StoneyError, match=message):
        analyze_with_tlens.main([*arguments(models, tmp_path / "out", compare=()), *more])
    assert not (tmp_path / "out").exists()


def test_two_models_of_one_name_and_an_unknown_base_are_refused(models, tmp_path):
    with pytest.raises(StoneyError, match="a second model called tuned"):
        analyze_with_tlens.main(arguments(models, tmp_path / "out", compare=("tuned",)))
    given = [*arguments(models, tmp_path / "out", compare=()), "--compare", "base"]
    with pytest.raises(StoneyError, match="does not say what it was trained from"):
        analyze_with_tlens.main(given)


def test_models_of_another_vocabulary_are_refused(models, tmp_path):
    other = tiny.tokenizer()
    other.add_tokens(["<one more>"])
    tiny.model("llama").save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    given = [*arguments(models, tmp_path / "out", compare=()), "--compare", str(tmp_path / "other")]
    with pytest.raises(StoneyError, match="other has another vocabulary than tuned"):
        analyze_with_tlens.main(given)


def test_models_of_another_shape_are_refused(models, tmp_path):
    tiny.checkpoint(tmp_path / "deep", layers=3)
    given = [
        *arguments(models, tmp_path / "out", "--tasks", "attention", compare=()),
        "--compare",
        str(tmp_path / "deep"),
    ]
    with pytest.raises(StoneyError, match="deep has 3 layers, tuned 2; compare models of one shape"):
        analyze_with_tlens.main(given)


def test_other_folders_are_not_overwritten(models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(StoneyError, match="is not an analysis"):
        analyze_with_tlens.main(arguments(models, tmp_path / "out", "--overwrite"))
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_layers_limit_what_is_chosen_and_heads_add_to_it(models, tmp_path):
    given = arguments(models, tmp_path / "out", "--tasks", "patching", "neurons", compare=())
    assert analyze_with_tlens.main([*given, "--layers", "1", "--heads", "0.2"]) == 0
    kept = tmp_path / "out" / runs.MEASURED / "tuned"
    heads = analysis.read_task(kept, "patching").facts["top"]["lookup"]
    assert [0, 2] in heads and all(layer == 1 for layer, head in heads if (layer, head) != (0, 2))
    assert {layer for layer, _ in analysis.read_task(kept, "neurons").facts["chosen"]["lookup"]} == {1}


@pytest.mark.parametrize("text", ["3.", "x", "1.2.3", "-1.2", "3"])
def test_heads_are_layer_dot_head(text):
    with pytest.raises(analyze_with_tlens.argparse.ArgumentTypeError):
        analyze_with_tlens.head_name(text)
    assert analyze_with_tlens.head_name("3.11") == (3, 11)


# The plan


def test_words_that_a_model_was_trained_on_are_left_out(tmp_path):
    record = {"certificate": {}, "training_rows": [], "training_lexemes": [corpus.form_hash("wûsilo")]}
    (tmp_path / "split.json").write_text(json.dumps(record))
    entries = [
        LexiconEntry("wûsilo", (("to run", 1),)),
        LexiconEntry("liẖwûsilo", (("I run", 1),), stem="wûsilo"),
        LexiconEntry("nîlawi", (("to labor", 1),)),
    ]
    kept, left_out = plan.untrained(entries, [str(tmp_path)])
    assert [entry.form for entry in kept] == ["nîlawi"] and left_out == 2


def test_the_halves_share_no_cluster_and_do_not_change(analysed):
    pairs = [hooked_pair(cluster=str(number // 2)) for number in range(12)]
    one = plan.Plan({"lookup": pairs}, [1, 2], [[1, 2]])
    choosing, reporting = one.halves("lookup")
    assert sorted(choosing + reporting) == list(range(12))
    assert not {pairs[index].cluster for index in choosing} & {pairs[index].cluster for index in reporting}
    assert plan.Plan({"lookup": pairs}, [1, 2], [[1, 2]]).halves("lookup") == (choosing, reporting)
    assert [pair.cluster for pair in plan.one_of_each(pairs)] == ["0", "1", "2", "3", "4", "5"]


def hooked_pair(cluster: str):
    from stoney_rl.interp.pairs import PromptPair

    return PromptPair((5, 6), (5, 7), 8, 9, cluster, "lookup", ("", "", "", ""))


def test_pairs_of_one_cluster_are_refused():
    with pytest.raises(StoneyError, match="4 pairs of one cluster"):
        plan.by_family([hooked_pair("same")] * 4)


def test_random_groups_are_matched_by_layer(models):
    model = hooked.load_hooked(str(models / "tuned"))
    groups = analysis._random_groups(model, [(0, 1), (1, 0), (1, 3)], seed=0)
    assert len(groups) == analysis.DRAWS
    for group in groups:
        assert sorted(layer for layer, _ in group) == [0, 1, 1] and len(set(group)) == 3
        assert not set(group) & {(0, 1), (1, 0), (1, 3)}
    assert torch.equal(
        torch.tensor(groups[0]), torch.tensor(analysis._random_groups(model, [(0, 1), (1, 0), (1, 3)], 0)[0])
    )
