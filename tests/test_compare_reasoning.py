"""compare_reasoning.py as a user runs it, on tiny models: what it writes, what it says again, what it refuses."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest
import tiny

import compare_reasoning
from stoney_rl import checkpoints, runs
from stoney_rl.errors import StoneyError
from stoney_rl.interp import analysis, compare, opening, report

LEXICON = "data/planted/lexicon.jsonl"  # an invented language
SECTIONS = {"fairness", "overlap", "needed", "depth", "cost", "copying", "change-1-base-tuned", "change-2-tuned-twin"}


@pytest.fixture(autouse=True)
def untracked(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny.checkpoints(tmp_path_factory.mktemp("models"))


def arguments(models, output, *more):
    given = ["--model_path", str(models / "tuned"), "--compare", str(models / "base"), "--output_dir", str(output)]
    given += [
        "--seed_twin",
        str(models / "twin"),
        "--lexicon",
        LEXICON,
        "--num_pairs",
        "40",
        "--random_sets",
        "4",
    ]
    return [*given, "--families", "lexicon", "english", "--controls", "lexicon_scrambled", *more]


@pytest.fixture(scope="module")
def compared(models, tmp_path_factory):
    output = tmp_path_factory.mktemp("comparison") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        compare_reasoning.main(arguments(models, output))
    return output


def unfinished(compared, output):
    """The folder of a comparison that was stopped when all was measured, to become ``output``."""
    left = runs.partial_directory(output)
    shutil.copytree(compared, left)
    checkpoints.write_json(left / runs.IDENTITY_FILE, json.loads((left / "stage.json").read_text())["identity"])
    for name in ("report.html", "results.json", "stage.json"):
        (left / name).unlink()
    return left


def section(output, key):
    results = json.loads((output / "results.json").read_text())
    return next(one for one in results["sections"] if one["key"] == key)


def test_writes_a_summary_a_page_and_numbers_for_every_question(compared):
    names = {path.name for path in compared.iterdir()}
    assert {"report.html", "results.json", "summary.txt", "stage.json", "measured", "overlap.png", "depth.png"} <= names
    results = json.loads((compared / "results.json").read_text())
    assert {one["key"] for one in results["sections"]} >= SECTIONS
    assert [model["name"] for model in results["models"]] == ["tuned", "base", "twin"]
    for one in results["sections"]:
        assert one["answer"] and one["tells"] and one["cannot"] and one["source"]
        assert all(len(row) == len(table["columns"]) for table in one["tables"] for row in table["rows"])
    text = (compared / "summary.txt").read_text()
    assert "nan" not in text and "None" not in text and "{" not in text
    tables = {table["caption"]: table for table in section(compared, "overlap")["tables"]}
    strongest = dict(tables["tuned: the strongest heads and MLPs, by layer"]["rows"])
    kept = analysis.read_task(compared / runs.MEASURED / "models/tuned", "localise")
    heads = kept.arrays["english/heads"].mean(0)
    best = np.unravel_index(np.abs(heads).argmax(), heads.shape)
    assert strongest["English"] in (f"head {best[0]}.{best[1]}", *(f"MLP {layer}" for layer in range(2)))


def test_the_page_has_the_comparison_and_asks_for_nothing(compared):
    page = (compared / "report.html").read_text()
    assert len(page) < report.MAX_BYTES and 'id="comparison"' in page and 'href="#comparison"' in page
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", page)
    assert page.count("data:image/png;base64,") == len(list(compared.glob("*.png")))


def test_identical_checkpoints_differ_by_exactly_nothing(compared):
    numbers = section(compared, "change-2-tuned-twin")["numbers"]
    assert all(group["share"] == 0 and group["changed"] == 0 for group in numbers["by_layer"].values())
    assert not any(numbers["representation"]["mean"])
    assert all(one["value"] == 0 for one in numbers["behaviour"].values())
    assert all(one["gap"] is None and one["points"] == [] for one in numbers["closure"].values())
    assert all(
        unit["neurons_shared"] == unit["components_shared"] == 1 and unit["changed"] == 0
        for unit in numbers["units"].values()
    )
    kept = analysis.read_task(compared / runs.MEASURED / "changes/tuned/twin", "closure")
    assert np.array_equal(kept.arrays["lexicon/earlier"], kept.arrays["lexicon/later"])


def test_other_checkpoints_differ(compared):
    numbers = section(compared, "change-1-base-tuned")["numbers"]
    assert sum(group["changed"] for group in numbers["by_layer"].values()) > 10
    assert max(numbers["representation"]["mean"]) > 0.1


def test_parts_are_chosen_on_other_couples_than_they_are_tested_on(models):
    args = compare_reasoning.build_parser().parse_args(arguments(models, "out"))
    settings = compare_reasoning.settings_of(args)
    from stoney_rl.models import find_model, load_tokenizer

    sources = opening.find_models([("--model_path", str(models / "tuned"))])
    tokenizer = load_tokenizer(find_model(str(models / "tuned")))
    pools = compare_reasoning.make_pools(args, sources, tokenizer, settings, None)
    plan = compare.Plan(pools, "lexicon", [], [], [], settings)
    for name in plan.families:
        chosen, reported = ({pair.cluster for pair in half(name)} for half in (plan.choosing, plan.reporting))
        assert chosen and reported and not chosen & reported


def test_a_finished_comparison_is_shown_again(compared, models, monkeypatch, capsys):
    monkeypatch.setattr(opening, "open_hooked", lambda *_: pytest.fail("opened a model"))
    compare_reasoning.main(arguments(models, compared))
    assert "compared with these settings already" in capsys.readouterr().out


def test_a_stopped_comparison_goes_on_where_it_was_and_comes_to_the_same(compared, models, tmp_path, monkeypatch):
    output = tmp_path / "out"
    left = unfinished(compared, output)
    (left / runs.MEASURED / "models/base/cost.json").unlink()
    (left / runs.MEASURED / "changes/base/tuned/difference.json").unlink()
    done = []

    def noted(name, task):
        return lambda *given: done.append(name) or task(*given)

    for table in (compare.TASKS, compare.CHANGES):
        for name, task in list(table.items()):
            monkeypatch.setitem(table, name, noted(name, task))
    compare_reasoning.main(arguments(models, output))
    assert done == ["cost", "difference"]
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (compared, output))
    assert first.pop("about") and second.pop("about")
    assert first == second


def test_what_says_the_same_is_the_same_and_other_settings_are_not(compared, models, tmp_path, monkeypatch, capsys):
    shutil.copy(LEXICON, tmp_path / "copy.jsonl")
    same = [*arguments(models, compared), "--batch_size", "5", "--lexicon", str(tmp_path / "copy.jsonl")]
    compare_reasoning.main(same)
    assert "compared with these settings already" in capsys.readouterr().out
    monkeypatch.setattr(compare, "FULL", compare.replace(compare.FULL, few=compare.FULL.few + 1))
    with pytest.raises(StoneyError, match="holds another run"):
        compare_reasoning.main(arguments(models, compared))


def test_what_was_measured_on_other_couples_is_not_gone_on_with(compared, models, tmp_path):
    left = unfinished(compared, tmp_path / "out")
    checkpoints.write_json(left / runs.MEASURED / "couples.json", {"sha256": "of other ones"})
    with pytest.raises(StoneyError, match="measured by another version, which chose other couples; --overwrite"):
        compare_reasoning.main(arguments(models, tmp_path / "out"))


def test_lost_files_are_written_again_and_damaged_measurements_measured_again(compared, models, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(compared, output)
    (output / "results.json").unlink()
    cost = output / runs.MEASURED / "models/base/cost.npz"
    cost.write_bytes(cost.read_bytes()[:100])
    compare_reasoning.main(arguments(models, output))
    said = capsys.readouterr().out
    assert (
        "results.json missing; written again" in said
        and "models/base/cost: damaged (BadZipFile); measured again" in said
    )
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (compared, output))
    assert first.pop("about") and second.pop("about") and first == second
    assert not runs.partial_directory(output).exists()


@pytest.mark.parametrize("asked", [["english", "--controls"], ["lexicon", "--controls", "lexicon_scrambled"]])
def test_a_family_alone_is_not_knocked_out_nor_compared(models, tmp_path, asked):
    output = tmp_path / "out"
    given = ["--model_path", str(models / "tuned"), "--output_dir", str(output), "--lexicon", LEXICON, "--quick"]
    compare_reasoning.main([*given, "--num_pairs", "16", "--random_sets", "2", "--families", *asked])
    assert not list(output.rglob("knockout*"))
    keys = {one["key"] for one in json.loads((output / "results.json").read_text())["sections"]}
    assert "fairness" in keys and "needed" not in keys


def test_changes_never_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(
        compare, "CHANGES", {"weights": lambda one, other, plan: analysis.Measured({"of": [one, other]})}
    )
    chain = ["a-b", "a", "b-a"]
    for pair in itertools.pairwise(chain):
        found = compare.measure_change(tmp_path, None, str, str, *pair)
        assert found["weights"].facts["of"] == list(pair)


def test_what_can_not_be_compared_is_refused_before_anything_is_measured(models, tmp_path):
    deep, gemma = tiny.checkpoint(tmp_path / "deep", layers=3), tiny.checkpoint(tmp_path / "gemma", "gemma2")
    given = ["--output_dir", str(tmp_path / "out"), "--families", "english", "--controls"]
    with pytest.raises(StoneyError, match="deep has 3 layers, tuned 2; compare models of one shape"):
        compare_reasoning.main(["--model_path", str(models / "tuned"), "--compare", str(deep), *given])
    with pytest.raises(StoneyError, match="gemma: a norm stands behind attention and MLP"):
        compare_reasoning.main(["--model_path", str(gemma), *given])
    with pytest.raises(StoneyError, match="gemma has gemma2 as architecture, tuned llama"):
        compare_reasoning.main(["--model_path", str(models / "tuned"), "--compare", str(gemma), *given])
    with pytest.raises(StoneyError, match="'random weights' is what the floor is called; rename the folder"):
        compare_reasoning.main(["--model_path", str(tmp_path / "random weights"), *given])
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "gemma"}


def test_families_of_ones_own_are_compared_too(models, tmp_path):
    lines = [
        {"clean": f"day {n} = a\nday {n} =", "corrupt": f"day {n} = b\nday {n} =", "answer": " a", "wrong": " b", "family": "days", "chat": False, "cluster": str(n)}
        for n in range(10, 34)
    ]  # fmt: skip
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(json.dumps(line) for line in lines))
    output = tmp_path / "out"
    given = [
        "--model_path",
        str(models / "tuned"),
        "--output_dir",
        str(output),
        "--quick",
        "--num_pairs",
        "24",
        "--no-random_model",
    ]
    compare_reasoning.main(
        [*given, "--random_sets", "2", "--families", "english", "--controls", "--pairs_file", str(own)]
    )
    (key,) = section(output, "overlap")["numbers"]["tuned/components"]
    assert key == "english/days"


def test_the_report_and_pictures_go_to_wandb(models, compared, tmp_path, monkeypatch):
    sent = []

    class Recorder:
        run_id, group, record = "run", "group", {"run_id": "run"}

        def __getattr__(self, kind):
            return lambda *given, **_: sent.append((kind, *given))

    monkeypatch.setattr(compare_reasoning.tracking, "start_stage", lambda *_, **__: Recorder())
    output = tmp_path / "out"
    unfinished(compared, output)
    compare_reasoning.main(arguments(models, output))
    assert ("html", "report", output / "report.html") in sent
    assert ("artifact", "out", "comparison", str(output)) in sent
    assert [kind for kind, *_ in sent][-1] == "finish" and any(kind == "image" for kind, *_ in sent)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--families", "english", "--controls", "lexicon_scrambled"], "--controls lexicon_scrambled: belongs to the family lexicon"),
        (["--families", "english", "--pairs_file", "missing.jsonl"], "missing.jsonl does not exist"),
        (["--device", "cuda:9"], "--device cuda:9"),
        (["--lexicon", "missing.jsonl"], "missing.jsonl: no such file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(models, tmp_path, monkeypatch, more, expected):
    monkeypatch.chdir(tmp_path)
    given = ["--model_path", str(models / "tuned"), "--output_dir", "out", "--families", "english", "lexicon"]
    with pytest.raises(StoneyError) as problem:
        compare_reasoning.main([*given, *more])
    assert expected in str(problem.value) and "\n" not in str(problem.value)
    assert not list(tmp_path.iterdir())


def test_a_family_with_a_built_ones_name_is_refused(models, tmp_path):
    own = tmp_path / "own.jsonl"
    line = {"clean": "a =", "corrupt": "b =", "answer": " c", "wrong": " d", "family": "english", "chat": False}
    own.write_text("\n".join(json.dumps(line | {"cluster": str(n)}) for n in range(3)))
    given = ["--model_path", str(models / "tuned"), "--families", "arithmetic", "--pairs_file", str(own)]
    with pytest.raises(StoneyError, match="the family 'english' has the name of one that is built"):
        compare_reasoning.main([*given, "--output_dir", str(tmp_path / "out")])


def test_too_few_pairs_are_refused_by_the_parser(models, capsys):
    with pytest.raises(SystemExit) as stop:
        compare_reasoning.main(["--model_path", str(models / "tuned"), "--num_pairs", "4"])
    assert stop.value.code == 2 and "--num_pairs 4: expected an even number, 16 or more" in capsys.readouterr().err


def test_a_folder_that_is_no_comparison_is_not_overwritten(models, tmp_path):
    kept = tmp_path / "mine"
    kept.mkdir()
    (kept / "thesis.txt").write_text("years of work")
    with pytest.raises(StoneyError, match="is not a comparison; choose another --output_dir"):
        compare_reasoning.main(arguments(models, kept, "--overwrite"))
    assert (kept / "thesis.txt").read_text() == "years of work"
    for name in ("empty", "record lost/measured"):
        (tmp_path / name).mkdir(parents=True)
    checkpoints.write_json(tmp_path / "record lost/identity.json", {})
    assert opening.stage_at(tmp_path / "record lost", "comparison", "is not a comparison", overwrite=True) == {}
    assert opening.stage_at(tmp_path / "empty", "comparison", "is not a comparison", overwrite=True) == {}


def test_the_parser_knows_what_the_benchmark_has():
    from stoney_rl.interp import tasks

    assert (compare_reasoning.FAMILIES, compare_reasoning.CONTROLS) == (tasks.FAMILIES, tasks.CONTROLS)
    assert compare_reasoning.FEWEST_PAIRS == 2 * compare.FEWEST


def test_a_family_that_is_too_small_is_refused_before_anything_is_measured(models, tmp_path, monkeypatch):
    own = tmp_path / "own.jsonl"
    line = {"corrupt": "b =", "answer": " c", "wrong": " d", "family": "few", "chat": False}
    own.write_text("\n".join(json.dumps(line | {"clean": f"{n} =", "cluster": str(n)}) for n in range(3)))
    monkeypatch.setattr(opening, "open_hooked", lambda *_: pytest.fail("opened a model"))
    given = ["--model_path", str(models / "tuned"), "--families", "arithmetic", "--pairs_file", str(own)]
    with pytest.raises(StoneyError, match="few: couples of 3 clusters; 8 at least are needed"):
        compare_reasoning.main([*given, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
