"""README-TLens.md says what the code does: its commands, flags, Python, tables and messages. Words are invented ones."""

import ast
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from test_scripts import assert_parses, commands_in, flags, parser_of

import analyze_with_tlens
import compare_reasoning
from stoney_rl.interp import analysis, hooked, live, pairs, plan, report, tracer, trust
from stoney_rl.lexicon import read_lexicon
from stoney_rl.prompts import encode_example, end_of_turn_ids

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = (REPOSITORY / "README-TLens.md").read_text(encoding="utf-8")
LEXICON = REPOSITORY / "data/planted/lexicon.jsonl"  # an invented language


def section(title: str) -> str:
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]


def rows(text: str) -> list[list[str]]:
    """The cells of a section's tables, without heads and rules."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rules = [number for number, line in enumerate(lines) if set(line) <= set("| -")]
    left = [line for number, line in enumerate(lines) if number not in rules and number + 1 not in rules]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in left]


def quoted(text: str) -> list[str]:
    """What stands in single backticks; blocks of code would shift the pairs."""
    return re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def model(checkpoint):
    return hooked.load_hooked(str(checkpoint))


# Commands and flags


def test_every_command_parses():
    commands = commands_in(PAGE)
    assert {"analyze_with_tlens.py", "train_lora.py"} <= {tokens[0] for tokens in commands}
    for tokens in commands:
        assert_parses(tokens)


def test_every_flag_exists():
    scripts = ("analyze_with_tlens.py", "compare_reasoning.py", "train_lora.py", "train_grpo.py")
    known = {
        name for script in scripts for action in flags(parser_of(script)).values() for name in action.option_strings
    }
    named = {flag for code in quoted(PAGE) for flag in re.findall(r"--\w+", code)}
    assert len(named) > 10 and named <= known


def test_tasks_and_families_are_those_of_the_script():
    assert [quoted(row[0])[0] for row in rows(section("Tasks"))] == list(analyze_with_tlens.TASKS)
    assert [quoted(row[0])[0] for row in rows(section("Prompt pairs"))] == list(analyze_with_tlens.FAMILIES)
    built = [row[0] for row in rows(section("Comparing families and checkpoints")) if row[0].startswith("`")]
    assert [quoted(name)[0] for name in built] == [*compare_reasoning.FAMILIES, *compare_reasoning.CONTROLS]


# Python


def test_the_ten_lines_run(checkpoint, capsys):
    code = blocks("python")[0]
    named = "checkpoints/smollm2-135m"
    assert code.count(named) == 1 and len(code.split("\n\n")[-1].strip().splitlines()) <= 10
    exec(compile(code.replace(named, str(checkpoint)), "README-TLens.md", "exec"), {})
    values = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert len(set(values)) == 4


def test_hooks_have_the_shapes_of_the_table(model):
    batch = hooked.left_padded([[5, 6, 7], [8, 9]], model.pad_token_id)
    axes = {"row": 2, "position": 3, "query": 3, "key": 3, "d_model": 32, "d_head": 8, "d_mlp": 64}
    for names, shape, _ in rows(section("From Python, in ten lines")):
        first, *others = quoted(names)
        stem = first.rpartition("_" if others and others[0].startswith("_") else ".")[0]
        hooks = [
            first,
            *(each if each.startswith("blocks") else stem + "." * (each[0] != "_") + each for each in others),
        ]
        read = model.run(batch, read=[hook.replace(".L.", ".1.") for hook in hooks])
        for hook, activation in read.activations.items():
            heads = model.n_key_value_heads if hook.endswith(("_k", "_v")) else model.n_heads
            assert list(activation.shape) == [
                (axes | {"head": heads})[axis] for axis in shape.strip("[]").split(", ")
            ], hook


@pytest.fixture(scope="module")
def measured(model, tmp_path_factory):
    """Every task on a tiny model, in the folder that the page reads from."""
    folder = tmp_path_factory.mktemp("measured")
    built = plan.build_families(read_lexicon(LEXICON), model.tokenizer, ["lookup"], 6, seed=0)[0].pairs
    found = [replace(pair, family="affix") for pair in built]  # glosses of affixes differ in bytes, this model's tokens
    texts = [list(pair.clean) for pair in found[:4]]
    asked = plan.Plan(plan.by_family(found), list(model.tokenizer("What is it?")["input_ids"]), texts, top_k=3)
    tasks = analysis.ordered(analyze_with_tlens.TASKS)
    place = folder / "analysis/planted_merged/measured/planted_merged"
    return folder, analysis.measure_model(place, tasks, asked, lambda: model)


def test_measured_values_are_read_as_shown(measured, monkeypatch, capsys):
    folder, tasks = measured
    monkeypatch.chdir(folder)
    exec(compile(blocks("python")[1], "README-TLens.md", "exec"), {})
    assert str(tasks["patching"].facts["top"]["affix"]) in capsys.readouterr().out


def test_arrays_are_those_of_the_table(measured):
    _, tasks = measured
    told = {}
    for names, arrays in (row for row in rows(section("Reading the results")) if len(row) == 2):
        told |= dict.fromkeys(set(quoted(names)) & set(tasks), axes_in(arrays))
    assert told == {
        name: {key.removeprefix("affix/"): value.ndim for key, value in task.arrays.items()}
        for name, task in tasks.items()
    }


def axes_in(text: str) -> dict[str, int]:
    """How many axes each `array` has: those in the brackets that come next."""
    found, waiting = {}, []
    for name, axes in re.findall(r"`([^`]+)`|\[([^]]+)\]", text):
        waiting += [name] * bool(name)
        if axes:
            found |= dict.fromkeys(waiting, axes.count(",") + 1)
            waiting = []
    return found


def test_a_trace_is_read_as_shown(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "traced_ckpt").mkdir()
    tokenizer = tiny.tokenizer()
    question = [{"role": "user", "content": "What is it?"}]
    probe = live.make_probe(
        [encode_example(tokenizer, question, "It is.", end_of_turn_ids(tokenizer))], tokenizer, seed=0
    )
    trainer = SimpleNamespace(model=tiny.model(), is_fsdp_enabled=False, is_deepspeed_enabled=False)
    watch = tracer.Tracer(trainer, probe, Path("traced_ckpt"), every=25, seed=0)
    for step, call in ((0, watch.on_train_begin), (25, watch.on_step_end)):
        call(None, SimpleNamespace(is_world_process_zero=True, global_step=step), None)
    exec(compile(blocks("python")[2], "README-TLens.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[0, 25] [")


# Pairs


def test_the_line_of_a_pairs_file_is_a_pair(tmp_path):
    (line,) = blocks("json")
    (tmp_path / "pairs.jsonl").write_text(line, encoding="utf-8")
    (pair,) = pairs.read_pairs(tmp_path / "pairs.jsonl", tiny.tokenizer()).pairs
    assert pair.cluster == "hot-big" and pair.family == "opposites"


def test_the_invented_pair_is_one_of_the_lexicon():
    glosses = {entry.form: entry.glosses[0][0] for entry in read_lexicon(LEXICON)}
    asked = re.findall(r'form for "([^"]+)"\?\s+-> "([^"]+)"\.', section("Prompt pairs"))
    assert len(asked) == 2 and all(glosses[form] == gloss for gloss, form in asked)


# What the page says of the report


def test_sections_and_checks_are_those_of_the_report():
    template = (REPOSITORY / "stoney_rl/interp/report.html.jinja").read_text(encoding="utf-8")
    titles = json.loads(re.search(r"set titles = (\{.*?\})", template)[1]).values()
    told = [row[0] for row in rows(section("Reading the results"))]
    assert told[: len(titles)] == list(titles)
    checks = [name for row in rows(section("Can these figures be believed?")) for name in row[0].split("; ")]
    assert checks == [invariant.name for invariant in trust.INVARIANTS.values()]


def test_messages_are_those_of_the_code():
    sources = [*(REPOSITORY / "stoney_rl/interp").glob("*.py"), REPOSITORY / "stoney_rl/checkpoints.py"]
    sources.append(REPOSITORY / "analyze_with_tlens.py")
    texts = [text for path in sources for text in strings(ast.parse(path.read_text(encoding="utf-8")))]
    messages = [quoted(row[0])[0] for row in rows(section("Troubleshooting"))]
    assert len(messages) > 15
    for message in messages:
        assert any(message in text for text in texts), message


def strings(tree: ast.AST) -> list[str]:
    """Every text of a module, with … for what is filled in."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_links_lead_somewhere_and_pictures_are_small():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if not link.startswith("http")]
    assert links
    for link in links:
        path = REPOSITORY / link
        assert path.is_file(), link
        assert path.suffix != ".png" or path.stat().st_size < 300_000, link


def test_no_placeholder_is_left():
    assert "{{" not in PAGE and report.MAX_BYTES == 10_000_000  # 'over 10 MB'
