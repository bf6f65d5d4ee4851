"""The planted GRPO experiment at toy size: its base model, what it measures, what it refuses, what it writes.

All words are invented.
"""

import json
import shutil
import subprocess
from itertools import islice

import pytest
import tiny

from benchmarks import planted_grpo, tiny_planted
from stoney_rl import checkpoints, corpus, data, models, planted, policy, prepared, records
from stoney_rl.errors import StoneyError
from stoney_rl.rewards.composite import Task

TOY = {
    "NUM_LEXEMES": 12,
    "LAYERS": 1,
    "WIDTH": 32,
    "BASE_ACCURACY": 0.0,
    "BASE_BATCH": 2,
    "EVAL_ROWS": 4,
    "EVAL_STEPS": 2,
}


@pytest.fixture(scope="module", autouse=True)
def toy():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TOY.items():
            patch.setattr(tiny_planted, name, value)
        yield patch


@pytest.fixture(scope="module")
def world(toy, tmp_path_factory):
    """base/ after two updates, and prepared/ with the language's rows."""
    directory = tmp_path_factory.mktemp("world")
    tiny_planted.make_base(directory / "base")
    rows = planted.PlantedLanguage(0, 20).rows(rules_per_lexeme=3, templates_per_fact=1)
    data.write_jsonl(directory / "rows.jsonl", rows)
    made = corpus.prepare(directory / "rows.jsonl", test_fraction=0.3, validation_fraction=0.1)
    with checkpoints.staged(directory / "prepared") as work:
        prepared.write(work, made.rowset, made.split)
        planted.write_lexicon(work / "lexicon.jsonl", planted.PlantedLanguage(0, 20).lexicon())
        stage = {"stage": prepared.STAGE, "data": made.describe(), "files": prepared.file_hashes(work)}
        checkpoints.write_json(work / checkpoints.STAGE_FILE, stage)
    return directory


def test_a_stem_has_the_same_tokens_in_every_form():
    tokenizer = tiny_planted.make_tokenizer()

    def tokens(text):
        return tokenizer.tokenize(f'"{text}".')[1:-1]

    for stem in planted.PlantedLanguage(0, 40).stems:
        assert len(tokens(stem)) == len(stem) / 2
        for rule in planted.RULES:
            form = tokens(planted.inflect(stem, rule))
            assert any(form[at : at + len(stem) // 2] == tokens(stem) for at in range(3)), (stem, rule)
    for text in ("tâloṯel", "Grüße, naïve ẖ \n 語", planted.TEMPLATES["verb_what"]):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_base_never_meets_a_stem_it_is_asked_about(monkeypatch):
    """Ten languages of 200 stems: by chance some would be those of another."""
    monkeypatch.setattr(tiny_planted, "NUM_LEXEMES", 200)
    held_out, training = tiny_planted.base_rows()
    ours = set(planted.PlantedLanguage(tiny_planted.LANGUAGE_SEED, 200).stems)
    tested = {stem for row in held_out for stem in row.lexemes}
    trained = {stem for row in islice(training, 12_000) for stem in row.lexemes}
    assert len(held_out) == TOY["EVAL_ROWS"] and len(trained) > 1900
    assert not trained & ours and not trained & tested


def test_the_base_is_made_once(world, monkeypatch, capsys):
    stage = checkpoints.read_stage(world / "base")
    assert stage["training"] == {"steps": 2, "accuracy": 0.0, "held_out_rows": 4}
    model = models.load_model(models.find_model(str(world / "base")), "float32")
    checkpoints.check_fingerprint(world / "base", model)
    monkeypatch.setattr(tiny_planted, "train", lambda *_: pytest.fail("trained again"))
    tiny_planted.make_base(world / "base")
    assert "made already" in capsys.readouterr().out
    monkeypatch.setattr(tiny_planted, "BASE_ACCURACY", 0.5)
    with pytest.raises(StoneyError, match="exists already"):
        tiny_planted.make_base(world / "base")


def test_a_base_that_does_not_learn_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_planted, "BASE_ACCURACY", 0.9)
    monkeypatch.setattr(tiny_planted, "MAX_BASE_STEPS", 2)
    with pytest.raises(StoneyError, match="0.00 of its forms are right after 2 steps"):
        tiny_planted.make_base(tmp_path / "base")
    assert not list(tmp_path.iterdir())


def test_a_command_that_fails_is_named(capfd):
    with pytest.raises(StoneyError, match=r"exit code 2 of: python train_grpo.py --group_size 1 --lora_path 'no such'"):
        tiny_planted.run(tiny_planted.ROOT / "train_grpo.py", group_size=1, lora_path="no such")
    printed = capfd.readouterr()
    assert "$ python train_grpo.py --group_size 1" in printed.out and "a group of one" in printed.err


def test_greedy_answers_are_those_of_one_question_at_a_time(tmp_path):
    """In the order of the questions, whatever the order in which they were answered."""
    model = tiny.checkpoint(tmp_path / "model")
    questions = sorted((row.prompt for row in tiny_planted.language_rows(5)[:6]), key=lambda prompt: len(str(prompt)))
    together = planted_grpo.greedy_answers(model, questions)
    assert together == [planted_grpo.greedy_answers(model, [question])[0] for question in questions]
    assert len({text for text, *_ in together}) > 1
    assert all(tokens <= planted_grpo.GRPO["max_completion_length"] for _, tokens, _ in together)


def test_the_test_split_is_measured(world, monkeypatch, tmp_path):
    """The parent is always wrong and the policy always right; both answer the test rows, but for one that was 'seen'."""
    asked = {}
    _, split = prepared.read(world / "prepared")
    split.seen[split.test[0].id] = True
    monkeypatch.setattr(prepared, "read", lambda _: (None, split))
    gold = {json.dumps(row.prompt): row.answer for row in data.load_rows(str(world / "rows.jsonl")).rows}

    def greedy(directory, questions):
        asked[directory.name] = questions
        right = directory.name == "policy"
        return [(gold[json.dumps(question)] if right else "no", 3, False) for question in questions]

    monkeypatch.setattr(planted_grpo, "greedy_answers", greedy)
    (tmp_path / "policy").mkdir()
    checkpoints.write_json(tmp_path / "policy" / checkpoints.STAGE_FILE, {"training": {"steps": 7}})
    for _ in range(2):  # again, as after an interruption
        held_out = planted_grpo.measure(world, world / "base", tmp_path / "policy", 3)
    comparison = held_out.compare(seed=0)
    assert comparison["steps"] == [0, 7] and (comparison["n"], comparison["clusters"]) == (17, 6)
    assert asked["base"] == asked["policy"] == [row.prompt for row in split.test[1:]]
    form, reward = (comparison["measures"][name] for name in ("form_accuracy", "reward"))
    assert (form["before"], form["after"]) == (0.0, 1.0)
    assert reward["after"] == pytest.approx(1.0) and reward["before"] <= 0.0
    assert len(records.read(world / "test_3.jsonl")) == 2


def held_out(rewards, forms):
    """Twelve rows about six stems, with (before, after) of each reward and form."""
    rows = planted.PlantedLanguage(0, 6).rows(rules_per_lexeme=2, templates_per_fact=1)
    found = policy.HeldOut(rows, [Task.of(row) for row in rows], None, None, None)
    for step in (0, 1):
        values = ([pair[step] for pair in pairs] for pairs in (rewards, forms))
        found.measurements.append(policy.Measurement(step, [""] * 12, *values, [1] * 12, [False] * 12))
    return found


def test_pooled_by_hand():
    """Seed one gains in 6 of its 12 rows and seed two in 3: 9 of 24. Six stems, whatever the number of seeds."""
    one = held_out([(0.0, 1.0)] * 6 + [(0.5, 0.5)] * 6, [(0, 1)] * 6 + [(1, 1)] * 6)
    two = held_out([(0.0, 1.0)] * 3 + [(None, 1.0)] * 9, [(0, 1)] * 3 + [(0, 0)] * 9)
    found = planted_grpo.pool([one, two])
    assert (found["n"], found["clusters"], found["seeds"]) == (24, 6, 2)
    form, reward = found["measures"]["form_accuracy"], found["measures"]["reward"]
    assert (form["before"], form["after"], form["difference"]["value"]) == (6 / 24, 15 / 24, pytest.approx(9 / 24))
    assert form["difference"]["units"] == 6 and form["difference"]["n"] == 24
    assert reward["difference"]["n"] == 15 and reward["difference"]["value"] == pytest.approx(9 / 15)


def test_the_same_weights_to_the_bit(world, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(world / "base", tmp_path / "other")
    assert planted_grpo.same_weights(world / "base", tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    name = "model.norm.weight"
    for changed in (weights | {name: weights[name].nextafter(weights[name] + 1)}, {name: weights[name]}):
        save_file(changed, tmp_path / "other" / "model.safetensors")
        assert not planted_grpo.same_weights(world / "base", tmp_path / "other")


@pytest.mark.parametrize("code, said", [(0, ""), (1, "it.py: error: no"), (2, "Traceback")])
def test_what_is_no_refusal_is_an_error(code, said, monkeypatch, tmp_path):
    monkeypatch.setattr(
        tiny_planted, "start", lambda *_, **__: ("python it", subprocess.CompletedProcess([], code, stderr=said))
    )
    with pytest.raises(StoneyError, match=f"expected a refusal with exit code 2, got {code} from: python it"):
        planted_grpo.refusal(tmp_path, tmp_path / "out", 0, reward="x:y")


def test_a_refusal_is_what_was_said(monkeypatch, tmp_path):
    ended = subprocess.CompletedProcess([], 2, stderr="loading\ntrain_grpo.py: error: it can be gamed\n")
    monkeypatch.setattr(tiny_planted, "start", lambda *_, **__: ("python it", ended))
    assert planted_grpo.refusal(tmp_path, tmp_path / "out", 0) == ["it can be gamed"]


def results():
    def found(low, high):
        difference = {"value": 0.25, "low": low, "high": high}
        measures = {name: {"before": 0.25, "after": 0.5, "difference": difference} for name in planted_grpo.MEASURES}
        return {"n": 12, "clusters": 4, "measures": measures}

    points = [{"step": step, "reward": 0.1 * step, "form_accuracy": 0.2 * step} for step in range(3)]
    return {
        "test": {"0": found(0.1, 0.4), "1": found(None, None), "pooled": found(0.1, 0.4)},
        "validation": {"0": points, "1": points},
        "zero_reward": {"weights_identical": True, "report": ["greedy answers", "✗ the policy did not move"]},
        "length_reward": {"refused": ["it can be gamed"], "forced": ["✗ sign of gaming: longer"]},
    }


def test_text_and_picture(tmp_path):
    lines = planted_grpo.as_text(results()).splitlines()
    line = "seed 0 reward 0.250 -> 0.500 +0.250 [+0.100, +0.400] n = 12, 4 lexeme groups"
    assert " ".join(lines[1].split()) == line
    assert "+0.250 (no interval)" in lines[3] and lines[5].startswith("  pooled  reward")
    for said in ("identical to the parent's", "did not move", "it can be gamed", "sign of gaming: longer"):
        assert said in "\n".join(lines)
    planted_grpo.plot(results(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--output", "results"], "--output results: expected the name of a .json file"),
        (["--seeds", "1", "1"], "--seeds 1 1: expected different ones"),
        (["--output_dir", __file__], "is a file; choose a directory"),
    ],
)
def test_bad_arguments(argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoneyError, match=said):
        planted_grpo.main(["--output_dir", "out", *argv])
    assert not list(tmp_path.iterdir())
