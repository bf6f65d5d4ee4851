"""The adversary: rewards that pay for nothing are caught, the composite is not. All words of the language are invented."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from complete import also_complete

import inspect_hf_dataset
import probe_rewards
from stoney_rl import lexemes
from stoney_rl.data import Row, load_rows, write_jsonl
from stoney_rl.errors import StoneyError
from stoney_rl.lexicon import build_lexicon, write_lexicon
from stoney_rl.planted import PlantedLanguage
from stoney_rl.planted_prose import prose_rows
from stoney_rl.rewards import terms
from stoney_rl.rewards.composite import Composite
from stoney_rl.rewards.probe import probe
from stoney_rl.rewards.similarity import load_encoder

ROOT = Path(__file__).resolve().parents[1]
QUIET = ["--wandb_mode", "disabled"]
PLANTED = ["--dataset", str(ROOT / "data/planted/rows.jsonl"), "--lexicon", str(ROOT / "data/planted/lexicon.jsonl")]

# Five failures that were published, as plug-ins, and a few functions with other faults.
PLUGINS = '''
from collections import Counter

import numpy as np

from stoney_rl.lexemes import contains_form
from stoney_rl.text import normalize


def texts(completions):
    return [completion[0]["content"] for completion in completions]


def affixes(completions, affixes, **kwargs):
    """Share of the required affixes that the answer has; an empty list of them is 1.0."""
    return [sum(a in t for a in need) / len(need) if need else 1.0 for t, need in zip(texts(completions), affixes)]


def hint_echo(completions, reference, **kwargs):
    """Whether the answer stands in the completion; it stands in the prompt, too."""
    return [float(gold in text) for text, gold in zip(texts(completions), reference)]


def letters(completions, reference, **kwargs):
    """F1 of two bags of characters."""
    scores = []
    for text, gold in zip(texts(completions), reference):
        common = sum((Counter(text) & Counter(gold)).values())
        scores.append(2 * common / max(1, len(text) + len(gold)))
    return scores


def short_enough(completions, **kwargs):
    """A length term that no completion is long enough for."""
    return [1.0 if len(text) < 100_000 else 0.0 for text in texts(completions)]


def unreadable(completions, reference, wanted, **kwargs):
    """Right or wrong; where the reference has no letter to compare, right."""
    return [
        float(all(form in text for form in forms)) if any(c.isalpha() for c in gold) else 1.0
        for text, gold, forms in zip(texts(completions), reference, wanted)
    ]


def form_accuracy(completions, wanted, **kwargs):
    """Whether a short answer has the form: plain, and nothing is wrong with it."""
    return [
        float(len(normalize(text)) < 60 and all(contains_form(text, form) for form in forms)) if forms else None
        for text, forms in zip(texts(completions), wanted)
    ]


def form_in_text(completions, wanted, **kwargs):
    """The same without normalising, and with parts of words."""
    return [float(len(text) < 60 and all(form in text for form in forms)) if forms else None
            for text, forms in zip(texts(completions), wanted)]


def sometimes(completions, wanted, **kwargs):
    return [None if len(text) % 2 else float(any(form in text for form in forms))
            for text, forms in zip(texts(completions), wanted)]


def never(completions, **kwargs):
    return [None for _ in completions]


def arrays(completions, wanted, **kwargs):
    found = [any(form in text for form in forms) for text, forms in zip(texts(completions), wanted)]
    return np.array(found, dtype=np.float32)


def raises(completions, **kwargs):
    raise RuntimeError("first line\\nsecond line")


def too_few(completions, **kwargs):
    return [1.0] * (len(completions) - 1)


def words(completions, **kwargs):
    return ["good"] * len(completions)


def not_a_number(completions, **kwargs):
    return [0.5] * (len(completions) - 1) + [float("nan")]


def infinite(completions, **kwargs):
    return [float("-inf")] * len(completions)


def none_at_all(completions, **kwargs):
    return None


async def later(completions, **kwargs):
    return [1.0] * len(completions)


def needs_a_column(completions, difficulty, **kwargs):
    return [1.0] * len(completions)


def no_keywords(completions):
    return [1.0] * len(completions)


number = 1
'''


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Where the plug-ins are: the scripts find modules in the folder that they are started in."""
    place = tmp_path_factory.mktemp("plugins")
    (place / "published.py").write_text(PLUGINS, encoding="utf-8")
    (place / "broken_module.py").write_text("def f(:\n", encoding="utf-8")
    (place / "failing_module.py").write_text("raise ValueError('no\\nluck')\n", encoding="utf-8")
    before, path = Path.cwd(), list(sys.path)
    os.chdir(place)
    yield place
    os.chdir(before)
    sys.path[:] = path
    for name in ("published", "failing_module"):
        sys.modules.pop(name, None)


def planted_rows(number):
    return load_rows(ROOT / "data/planted/rows.jsonl").rows[:number]


def changed(row: Row, *, question=None, **metadata) -> Row:
    prompt = [{"role": "user", "content": question or row.question}]
    return Row(row.id, row.source, prompt, row.completion, row.lexemes, row.metadata | metadata)


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    """Flags for 150 rows of prose, 71 of which want no form, and their lexicon."""
    place = tmp_path_factory.mktemp("prose")
    rows = lexemes.annotate(prose_rows(PlantedLanguage(0, 120), 150)[0])
    write_jsonl(place / "rows.jsonl", rows)
    write_lexicon(place / "lexicon.jsonl", build_lexicon(rows))
    return ["--dataset", str(place / "rows.jsonl"), "--lexicon", str(place / "lexicon.jsonl"), "--num_samples", "150"]


def run(*argv, capsys) -> tuple[int, str, list[str]]:
    """(exit code, what was printed, the problems in it)."""
    code = probe_rewards.main([*argv, *QUIET])
    out = capsys.readouterr().out
    return code, out, [line for line in out.splitlines() if line.startswith("✗")]


# -- what was published


def test_an_empty_list_of_affixes_that_pays_is_caught(tmp_path, capsys):
    # As published: of 10,576 rows 10,062 needed no affix, 95 %.
    rows = [
        changed(row, affixes=[] if n % 20 else [row.metadata["form"].replace(row.metadata["stem"], "")])
        for n, row in enumerate(planted_rows(100))
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    argv = ["--dataset", str(path), *PLANTED[2:], "--reward", "published:affixes"]
    code, _, problems = run(*argv, capsys=capsys)
    assert code == 1
    free = "earns as much as an honest answer on 95 of 100 rows: they pay for nothing"
    assert f"✗ null policy 'says nothing' {free}" in problems
    assert f"✗ null policy 'always the same' {free}" in problems
    assert any("a reference that can't be read" in line for line in problems)


def test_an_answer_that_the_prompt_holds_is_caught(tmp_path, capsys):
    rows = [changed(row, question=f"{row.question} Hint: {row.answer}") for row in planted_rows(60)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    code, out, problems = run("--dataset", str(path), *PLANTED[2:], "--reward", "published:hint_echo", capsys=capsys)
    assert code == 1
    assert any("null policy 'echoes the prompt' earns 1.000" in line for line in problems)
    assert "60 of 60 prompts give the answer or a wanted form away (such as planted-" in out


def test_echoing_a_hint_earns_less_than_an_answer_by_default(tmp_path, capsys):
    """The composite takes off what an echo is like; the hint is still named."""
    rows = [changed(row, question=f"{row.question} Hint: {row.answer}") for row in planted_rows(60)]
    rows = [Row(row.id, row.source, row.prompt, row.completion, row.lexemes, {}) for row in rows]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    _, out, problems = run("--dataset", str(path), *PLANTED[2:], capsys=capsys)
    assert "60 of 60 prompts give" in out
    assert not any("echo" in line for line in problems)


def test_a_bag_of_letters_is_caught(capsys):
    code, _, problems = run("--reward", "published:letters", capsys=capsys)
    assert code == 1
    for attack in ("reference reversed", "reference shuffled"):
        assert any(f"attack '{attack}' earns more than an honest answer on 100%" in line for line in problems)


def test_a_length_term_that_is_constant_is_caught(capsys):
    argv = ["--reward", "composite", "--reward", "published:short_enough=0.2"]
    code, out, problems = run(*argv, capsys=capsys)
    assert code == 1
    assert problems == ["✗ term published:short_enough is 1 for every text: it is dead, and only moves the baseline"]
    assert re.search(r"published:short_enough +dead +1\.000 +1\.000 +1\.000 +0%", out)
    code, _, problems = run("--reward", "published:short_enough", capsys=capsys)
    assert code == 1
    assert any("null policy 'says nothing' earns 1.000" in line for line in problems)


def test_a_reference_that_cannot_be_read_and_pays_is_caught(capsys):
    code, _, problems = run("--reward", "published:unreadable", capsys=capsys)
    assert code == 1
    assert "✗ a reference that can't be read ('???') pays 1.000 for any answer; it should be None" in problems


def test_a_reward_without_these_failures_passes(capsys):
    """So that the replicas are not caught for being simple."""
    code, _, problems = run("--reward", "published:form_accuracy", capsys=capsys)
    assert (code, problems) == (0, [])
    code, _, problems = run("--reward", "published:form_in_text", capsys=capsys)
    assert code == 1
    assert "✗ the gold answer in NFD earns something else than in NFC on 100 of 100 rows" in problems


# -- the composite, whole and sabotaged


def test_the_default_passes_on_the_planted_sample(capsys):
    code, out, problems = run(capsys=capsys)
    assert (code, problems) == (0, [])
    assert "✓ No attack beats an honest answer and no null policy earns one's reward, on 100 rows." in out
    assert "rows.jsonl: 990 rows" in out and "1,155 forms, 1,155 with a segmentation" in out
    assert "term R_sem could not be scored for any text: it is off" in out
    assert re.search(r"^gold +100 +1\.000 +- +- *$", out, re.MULTILINE)
    assert re.search(r"^R_sem +off +- +- +- +100%$", out, re.MULTILINE)


def test_the_default_passes_on_a_prepared_directory(tmp_path, capsys):
    rows, _ = prose_rows(PlantedLanguage(3, 80), 120, 3)
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    argv = ["--dataset", str(source), "--tokenizer", str(tmp_path / "tokenizer"), "--max_length", "600", *QUIET]
    assert inspect_hf_dataset.main([*argv, "--output_dir", str(tmp_path / "prepared")]) == 0
    code, out, problems = run(
        "--dataset", str(tmp_path / "prepared"), "--results_file", str(tmp_path / "probe.json"), capsys=capsys
    )
    assert (code, problems) == (0, [])
    assert "rows ask for no form that their question lacks" in out
    train = len(load_rows(tmp_path / "prepared" / "train.parquet").rows)
    assert f"prepared: {train} rows" in out  # the held-out rows stay out


def test_the_default_passes_on_prose(prose, capsys):
    code, _, problems = run(*prose, capsys=capsys)
    assert (code, problems) == (0, [])


TOTAL = Composite._total
SABOTAGE = {
    "no gate on the wanted forms": (
        Composite,
        "_total",
        lambda self, v: TOTAL(self, v | ({} if v["hit"] is None else {"hit": 1.0, "precision": 1.0})),
        "attack 'diacritics sprinkled' earns more than an honest miss",
    ),
    "a precision that sees no alternatives": (
        terms,
        "precision",
        lambda answers, references, wanted, allowed, knowledge: terms.hit(answers, wanted),
        "naming several forms, the right one among them, earns more than guessing one of them",
    ),
    "no penalty for invented forms": (
        Composite,
        "_total",
        lambda self, v: TOTAL(self, v | {"P_hall": None}),
        "attack 'diacritics stripped' earns more than an honest answer",
    ),
    "no length term": (
        Composite,
        "_total",
        lambda self, v: TOTAL(self, v | {"R_brev": 1.0}),
        "attack 'gold, padded' earns more than an honest answer",
    ),
    "a length term that is added": (
        Composite,
        "_total",
        lambda self, v: None if TOTAL(self, v) is None else TOTAL(self, v | {"R_brev": 1.0}) + 0.1 * v["R_brev"],
        "attack 'gold, padded' earns more than an honest answer",
    ),
    "a penalty that sees nothing": (
        terms,
        "hallucination",
        lambda answers, allowed, knowledge: [0.0] * len(answers),
        "term P_hall is 0 for every text: it is dead",
    ),
    "an empty list of affixes that pays": (
        terms,
        "morphology",
        lambda answers, wanted, knowledge: [1.0] * len(answers),
        "term R_morph is 1 for every text: it is dead",
    ),
}


@pytest.mark.parametrize("what", [*list(SABOTAGE)[:2], *map(also_complete, list(SABOTAGE)[2:])])
def test_a_sabotaged_composite_is_caught(prose, what, monkeypatch, capsys):
    where, name, broken, expected = SABOTAGE[what]
    monkeypatch.setattr(where, name, broken)
    code, _, problems = run(*prose, capsys=capsys)
    assert code == 1
    assert any(expected in line for line in problems)


# -- rewards that misbehave


def test_none_now_and_then_is_counted(capsys, tmp_path):
    output = tmp_path / "probe.json"
    code, out, _ = run("--reward", "published:sometimes", "--results_file", str(output), capsys=capsys)
    lines = {line["name"]: line for line in json.loads(output.read_text(encoding="utf-8"))["lines"]}
    assert code in (0, 1)
    assert 0 < lines["gold"]["unscored"] < lines["gold"]["rows"] == 100
    assert lines["ten thousand characters"] | {"rows": 100, "unscored": 0} == lines["ten thousand characters"]
    assert re.search(r"^published:sometimes +alive .* [1-9]\d?%$", out, re.MULTILINE)


def test_none_always_is_a_problem(capsys):
    code, out, problems = run("--reward", "published:never", capsys=capsys)
    assert code == 1
    assert "✗ no gold answer could be scored: the reward is None for every one" in problems
    assert "term published:never could not be scored for any text: it is off" in out


def test_numbers_of_other_libraries_are_numbers(capsys):
    run("--reward", "published:arrays", "--num_samples", "10", capsys=capsys)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"failed on \d+ completions: RuntimeError\('first line\\nsecond line'\)"),
        ("too_few", r"gave 99 values for 100 completions"),
        ("words", r"gave 'good' for the completion"),
        ("not_a_number", r"gave nan for the completion .*finite number, or None"),
        ("infinite", r"gave -inf for the completion"),
        ("none_at_all", r"failed on 100 completions: TypeError"),
        ("later", r"failed on 100 completions: TypeError"),
        ("needs_a_column", r"failed on 100 completions: .*difficulty"),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_rewards_that_misbehave(name, message):
    with pytest.raises(StoneyError, match=f"--reward published:{name}: {message}") as caught:
        probe_rewards.main(["--reward", f"published:{name}", *QUIET])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("published", "expected 'composite' or package.module:function"),
        ("published:", "expected 'composite' or package.module:function"),
        (":f", "expected 'composite' or package.module:function"),
        ("nowhere:f", "nowhere can't be imported .ModuleNotFoundError"),
        ("broken_module:f", "broken_module can't be imported .SyntaxError"),
        ("failing_module:f", "failing_module can't be imported .ValueError: no luck"),
        ("published:absent", "published has no function absent"),
        ("published:number", "is a int; expected a function"),
        ("published:no_keywords", "expected TRL's signature.* it takes completions"),
        ("json:dumps", "expected TRL's signature"),
        ("composite=0", "expected a number above 0"),
        ("composite=-1", "expected a number above 0"),
        ("composite=nan", "expected a number above 0"),
        ("composite=much", "expected a number above 0"),
    ],
)
def test_rewards_that_cannot_be_loaded(spec, message):
    with pytest.raises(StoneyError, match=message) as caught:
        probe_rewards.main(["--reward", spec, *QUIET])
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"--reward {spec.split('=')[0]}")


def test_plugins_see_what_trl_would_give_them():
    seen = {}

    def look(**columns):
        seen.update(columns)
        return [0.0] * len(columns["completions"])

    from stoney_rl.rewards.composite import Task
    from stoney_rl.rewards.plugins import Plugin, call

    row = planted_rows(1)[0]
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes?"}, *row.prompt]
    other = Row(row.id, row.source, turns, row.completion, row.lexemes, row.metadata | {"affixes": ["x"]})
    call(Plugin("look", 1.0, look), [Task.of(row), Task.of(other)], ["a", "b"])
    assert seen["prompts"] == [row.prompt, turns]
    assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in ("a", "b")]
    assert seen["reference"] == [row.answer] * 2 and seen["wanted"] == [[row.metadata["form"]]] * 2
    assert seen["rule"] == [row.metadata["rule"]] * 2  # the dataset's own columns
    assert seen["affixes"] == [None, ["x"]]  # a row that lacks one
    assert seen["id"] == [row.id] * 2


# -- weights


def test_weights_of_rewards(tmp_path, capsys):
    """0.5 of the composite and 2 of another, on the same texts."""
    means = {}
    for name, specs in {
        "composite": ["composite"],
        "other": ["published:form_accuracy"],
        "both": ["composite=0.5", "published:form_accuracy=2"],
    }.items():
        output = tmp_path / f"{name}.json"
        argv = [part for spec in specs for part in ("--reward", spec)]
        run(*argv, "--num_samples", "20", "--results_file", str(output), capsys=capsys)
        means[name] = {line["name"]: line["mean"] for line in json.loads(output.read_text(encoding="utf-8"))["lines"]}
    for line, mean in means["both"].items():
        assert mean == pytest.approx(0.5 * means["composite"][line] + 2 * means["other"][line])
    assert means["both"]["gold"] == pytest.approx(2.5)


def test_weights_of_terms(tmp_path, capsys):
    output = tmp_path / "new" / "probe.json"
    argv = ["--reward_weights", "P_hall=0.8", "R_lex=0", "--num_samples", "20", "--results_file", str(output)]
    code, _, _ = run(*argv, capsys=capsys)
    result = json.loads(output.read_text(encoding="utf-8"))
    lines = {line["name"]: line["mean"] for line in result["lines"]}
    assert code == 0
    assert lines["invented form"] == pytest.approx(-0.8)
    assert lines["honest answer"] == pytest.approx(1)  # likeness no longer counts
    assert lines["honest miss"] == pytest.approx(0.3 * 0.1 / 0.4)
    assert (result["stage"], result["seed"], result["problems"], result["tasks"]) == ("probe", 0, [], 20)
    assert result["arguments"]["reward_weights"] == ["P_hall=0.8", "R_lex=0"]
    assert {term["term"]: term["state"] for term in result["terms"]}["R_sem"] == "off"


# -- from the command line


def script(*argv, **env):
    command = [sys.executable, str(ROOT / "probe_rewards.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=120)


def test_every_problem_of_the_flags_at_once(folder):
    (folder / "rows.jsonl").write_text("", encoding="utf-8")
    done = script(
        *("--reward_weights", "R_dict", "R_lex=x", "R_morph=-1", "R_cot=1", "R_cot=2", "R_lexx=1"),
        *("--reward", "nowhere:f", "--reward", "published:absent", "--reward", "composite=0"),
        *("--dataset", "rows.jsonl", "--null_model", "checkpoints/none", "--encoder", "./none", "--results_file", "."),
    )
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert all(line.startswith("probe_rewards.py: error: ") for line in lines)
    for part in (
        *(
            "--reward_weights R_dict:",
            "--reward_weights R_lex=x:",
            "--reward_weights R_cot: given twice",
            "no term R_lexx",
        ),
        *("nowhere can't be imported", "has no function absent", "expected a number above 0"),
        *("--dataset rows.jsonl: no prepared directory", "--null_model", "--encoder", "--results_file '.'"),
    ):
        assert sum(part in line for line in lines) == 1, part
    assert len(lines) == 11


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--reward_weights", "R_morph=-1"], "at least 0"),
        (
            ["--reward_weights", "R_lex=0", "R_sem=0", "R_dict=0", "R_morph=0"],
            "one of R_lex, R_sem, R_dict, R_morph above 0",
        ),
        (["--reward", "composite", "--reward", "composite=2"], "given twice"),
        (
            ["--reward", "published:letters", "--reward_weights", "R_lex=1"],
            "--reward_weights: belongs to the composite",
        ),
        (["--dataset", "absent.jsonl", *PLANTED[2:]], "absent.jsonl"),
        ([*PLANTED[:2], "--lexicon", "absent.jsonl"], "absent.jsonl can't be read"),
        (["--results_file", "published.py/probe.json"], "lies below a file"),
    ],
)
def test_bad_flags(argv, message):
    with pytest.raises(StoneyError, match=re.escape(message)) as caught:
        probe_rewards.main([*argv, *QUIET])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "argv", [["--num_samples", "0"], ["--seed", "-1"], ["--rewards", "composite"], ["--batch_size", "x"]]
)
def test_bad_flags_of_argparse(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        probe_rewards.main(argv)
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_rows_that_cannot_be_read_are_an_error(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "tâlo?"}\n', encoding="utf-8")
    with pytest.raises(StoneyError) as caught:
        probe_rewards.main(["--dataset", str(tmp_path / "rows.jsonl"), *PLANTED[2:], *QUIET])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [1, 2])
def test_a_few_rows_are_enough(number, tmp_path, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", planted_rows(number))
    (tmp_path / "lexicon.jsonl").write_text('{"form": "tâlo"}\n', encoding="utf-8")
    code, out, problems = run("--dataset", str(path), "--lexicon", str(tmp_path / "lexicon.jsonl"), capsys=capsys)
    assert (code, problems) == (0, [])
    assert f"{number} rows" in out


def test_the_same_seed_gives_the_same_result_in_another_process(tmp_path):
    results = []
    for number, seed in (("1", "7"), ("2", "7"), ("3", "8")):
        output = tmp_path / f"{number}.json"
        argv = ["--num_samples", "25", "--seed", seed, "--results_file", str(output), *QUIET]
        done = script(*argv, PYTHONHASHSEED=number)
        assert done.returncode == 0, done.stderr
        result = json.loads(output.read_text(encoding="utf-8"))
        results.append({key: result[key] for key in ("tasks", "lines", "terms", "notes", "problems")})
    assert results[0] == results[1] != results[2]


def test_exit_code_of_a_reward_that_can_be_gamed():
    done = script("--reward", "published:letters", "--num_samples", "10", *QUIET)
    assert done.returncode == 1
    assert "reference reversed" in done.stdout and "Traceback" not in done.stderr


def test_help_is_quick():
    code = (
        "import sys, probe_rewards; probe_rewards.build_parser(); print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n"


def test_the_flags_of_the_reward_are_checked_without_torch():
    code = (
        "import argparse, sys; from stoney_rl import cli; from stoney_rl.rewards import flags\n"
        "parser = argparse.ArgumentParser(); flags.add_reward_flags(parser); problems = cli.Problems()\n"
        "args = parser.parse_args(['--reward', 'composite=0.5', '--reward_weights', 'R_dict=0.5', '--encoder', 'nowhere/none',\n"
        "                          '--reward_model', 'nowhere'])\n"
        "plugins, weights = flags.check_reward_flags(args, problems)\n"
        "print(plugins[0].weight, weights['R_dict'], weights['R_lex'], len(problems.messages), 'torch' in sys.modules)"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, env=env)
    assert done.stdout == "0.5 0.5 0.3 2 False\n", done.stderr


# -- models


def test_a_base_model_is_a_null_policy(tmp_path, capsys):
    tiny.checkpoint(tmp_path / "base")
    output = tmp_path / "probe.json"
    argv = ["--null_model", str(tmp_path / "base"), "--num_samples", "6", "--max_new_tokens", "8", "--batch_size", "4"]
    code, out, problems = run(*argv, "--results_file", str(output), capsys=capsys)
    lines = json.loads(output.read_text(encoding="utf-8"))["lines"]
    (line,) = [line for line in lines if line["name"] == "base"]
    assert (code, problems) == (0, [])
    assert (line["kind"], line["rows"], line["unscored"]) == ("null policy", 6, 0)
    assert line["mean"] <= 0.1  # random letters
    assert re.search(r"^base +6 ", out, re.MULTILINE)


def test_a_model_that_answers_already_is_said(capsys):
    """A policy that gives the gold answer leaves nothing to learn."""
    from stoney_rl.rewards.composite import Task
    from stoney_rl.rewards.knowledge import load_knowledge
    from stoney_rl.rewards.plugins import load_plugins, scorer

    knowledge = load_knowledge(ROOT / "data/planted/lexicon.jsonl")
    tasks = [Task.of(row) for row in planted_rows(8)]
    score = scorer(load_plugins(["composite"]), Composite(knowledge))
    report = probe(score, tasks, knowledge, policies={"knows": [task.reference for task in tasks]})
    assert [problem for problem in report.problems if "null policy 'knows' earns 1.000" in problem]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A RoBERTa of one layer, random."""
    import torch
    from transformers import RobertaConfig, RobertaModel

    place = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(**sizes, intermediate_size=32, max_position_embeddings=300, pad_token_id=2)
    RobertaModel(config).save_pretrained(place)
    tiny.tokenizer().save_pretrained(place)
    return place


def test_an_encoder_scores_meaning(encoder, tmp_path, capsys):
    output = tmp_path / "probe.json"
    code, out, _ = run("--encoder", str(encoder), "--num_samples", "8", "--results_file", str(output), capsys=capsys)
    (term,) = [t for t in json.loads(output.read_text(encoding="utf-8"))["terms"] if t["term"] == "R_sem"]
    assert term["state"] == "alive" and term["gold"] == pytest.approx(1) and 0 <= term["honest"] < 1
    assert "R_sem could not be scored" not in out
    assert code in (0, 1)  # a random encoder may well be fooled


def test_vectors_of_the_encoder(encoder):
    """The mean over a text's own tokens, of length 1: padding and neighbours in the batch change nothing."""
    encode = load_encoder(str(encoder))
    texts = ["tâlo", "a much longer text about mîva " * 20, " ", "tâlo"]
    together = encode(texts)
    assert together.shape == (4, 16) and together.dtype.name == "float32"
    assert (together**2).sum(axis=1) == pytest.approx([1.0] * 4, abs=1e-5)
    for text, vector in zip(texts, together, strict=True):
        assert encode([text])[0] == pytest.approx(vector, abs=1e-5)
    assert together[0] == pytest.approx(together[3], abs=1e-6)
    assert encode(["x"] * 130).shape == (130, 16)  # more than one batch


def test_an_encoder_that_cannot_be_loaded(encoder, tmp_path):
    import shutil

    with pytest.raises(StoneyError, match="--encoder"):
        probe_rewards.main(["--encoder", str(tmp_path / "none"), *QUIET])
    damaged = shutil.copytree(encoder, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(StoneyError, match="--encoder .*damaged: can't be loaded") as caught:
        probe_rewards.main(["--encoder", str(damaged), *QUIET])
    assert "\n" not in str(caught.value)
