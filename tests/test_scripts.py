"""The command lines of the stage scripts: quick, import-free, spelled alike, and as the documents say."""

import argparse
import importlib.util
import itertools
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from stoney_rl import cli

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in REPOSITORY.glob("*.py"))
HEAVY = ("torch", "transformers", "datasets", "pandas", "numpy", "trl", "peft", "wandb", "matplotlib", "sklearn")
# Spellings of other projects for what these scripts call by one name, on the right.
OTHER_SPELLINGS = {
    "model_name": "model",
    "model_name_or_path": "model",
    "base_model": "model",
    "dataset_name": "dataset",
    "data": "dataset",
    "data_path": "dataset",
    "out": "output_dir",
    "output": "output_dir",
    "out_dir": "output_dir",
    "outdir": "output_dir",
    "save_dir": "output_dir",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "bs": "batch_size",
    "random_seed": "seed",
    "force": "overwrite",
    "max_tokens": "max_new_tokens",
    "lora_r": "lora_rank",
    "rank": "lora_rank",
    "precision": "dtype",
    "torch_dtype": "dtype",
    "project": "wandb_project",
    "n": "num_samples",
    "limit": "num_samples",
}
# Flags that two scripts share and that mean another thing in each.
NOT_SHARED = {"help", "config", "revision", "resume", "batch_size", "top_k"}  # top_k: of sampling, of heads


def parser_of(script: str, *stage: str) -> argparse.ArgumentParser:
    spec = importlib.util.spec_from_file_location(f"_script_{Path(script).stem}", REPOSITORY / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_parser(*stage)


def run(script: str, *argv: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    clean = {"PATH": os.environ["PATH"], "HOME": str(cwd), "WANDB_MODE": "disabled", "PYTHONPATH": str(cwd), **env}
    clean["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, str(REPOSITORY / script), *argv]
    return subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=120)


def assert_refused(done: subprocess.CompletedProcess, script: str, *said: str) -> None:
    """Exit code 2, and on stderr one line for each of ``said`` and nothing else."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(said), done.stderr
    for line, words in zip(lines, said, strict=True):
        assert line.startswith(f"{script}: error: ") and re.search(words, line), line


def flags(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser._actions}


def test_there_are_scripts():
    assert {"evaluate_model.py", "prepare_base_model.py", "train_lora.py", "wandb_sample.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_quick_and_shows_the_docstrings_commands(script, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(script, "--help", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and not done.stderr
    # Of the processor, not by the clock: the machine may be busy.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    commands = [
        line.strip() for line in docstring(script).splitlines() if line.strip().startswith(("python ", "torchrun "))
    ]
    assert commands and all(f" {script}" in line for line in commands)
    assert all(command in done.stdout for command in commands)
    assert not any(tmp_path.iterdir())


def docstring(script: str) -> str:
    import ast

    return ast.get_docstring(ast.parse((REPOSITORY / script).read_text(encoding="utf-8")))


PROBE = """
import json, os, sys
before = set(sys.modules), dict(os.environ), sys.path[:]
__import__(sys.argv[1])
loaded = sorted({name.split(".")[0] for name in set(sys.modules) - before[0]} & set(json.loads(sys.argv[2])))
same = os.environ == before[1] and sys.path == before[2]
print(json.dumps({"loaded": loaded, "same": same, "files": os.listdir()}))
"""


def probe(module: str, cwd: Path) -> dict:
    env = {"PATH": os.environ["PATH"], "HOME": str(cwd), "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", PROBE, module, json.dumps(HEAVY)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert len(done.stdout.splitlines()) == 1, done.stdout  # an import prints nothing
    return json.loads(done.stdout)


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_loads_nothing_heavy_and_does_nothing(script, tmp_path):
    assert probe(Path(script).stem, tmp_path) == {"loaded": [], "same": True, "files": []}


@pytest.mark.parametrize(
    "module",
    [
        f"stoney_rl.{path.stem}"
        for path in sorted((REPOSITORY / "stoney_rl").glob("*.py"))
        if path.stem not in ("__init__", "grpo", "prefix", "training")  # they say that they load torch
    ],
)
def test_importing_the_library_loads_nothing_heavy(module, tmp_path):
    assert probe(module, tmp_path) == {"loaded": [], "same": True, "files": []}


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_are_underscored_and_spelled_as_everywhere(script):
    for dest, action in flags(parser_of(script)).items():
        for option in action.option_strings:
            assert option == "-h" or re.fullmatch(r"--(no-)?[a-z0-9]+(_[a-z0-9]+)*", option), option
        positional = (script, dest) == ("run_sweep.py", "sweep")  # as `wandb sweep` has it
        assert action.option_strings or dest == "help" or positional, f"{dest}: a positional argument"
        assert dest not in OTHER_SPELLINGS, f"--{dest}: the other scripts say --{OTHER_SPELLINGS[dest]}"


def test_flags_that_two_scripts_share_are_the_same_flag():
    first: dict[str, tuple[str, tuple]] = {}
    shared = 0
    for script in SCRIPTS:
        for dest, action in flags(parser_of(script)).items():
            if dest in NOT_SHARED or not action.option_strings:
                continue
            kind = (type(action), action.type, sorted(action.option_strings), action.nargs)
            other, expected = first.setdefault(dest, (script, kind))
            shared += other != script
            assert kind == expected, f"--{dest} of {script} and of {other}"
    assert shared > 20  # the tracking flags alone are five in each script


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_abbreviated_flag_is_an_error(script, tmp_path):
    parser = parser_of(script)
    assert not parser.allow_abbrev
    full = next(option for action in parser._actions for option in action.option_strings if len(option) > 8)
    done = run(script, f"{full[:-1]}=1", cwd=tmp_path)
    assert done.returncode == 2 and "error:" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_can_be_called_from_python(script):
    source = (REPOSITORY / script).read_text(encoding="utf-8")
    assert "def main(argv: list[str] | None = None)" in source
    assert re.search(r'\nif __name__ == "__main__":\n    cli\.run\(.*main', source)


# The documents' commands.


def commands_in(text: str) -> list[list[str]]:
    """Every 'python X.py ...' or 'torchrun ... X.py ...' of a shell script or a document, as tokens from X.py on."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for command in [line, *re.findall(r"`((?:python|torchrun) [^`]+)`", line)] if "`" in line else [line]:
            match = re.match(
                r"^\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\S*/)?(?:python3?|torchrun\b.*?) +([\w./]+\.py\b.*)", command
            )
            if match and "..." not in match[1]:
                tokens = shlex.split(re.split(r"\s(?:\|\|?|&&|;|>)\s?", match[1])[0], comments=True)
                found.append(tokens)
    return found


def documents() -> list[Path]:
    named = [
        *REPOSITORY.glob("runs/*.sh"),
        *REPOSITORY.glob("*.md"),
        *REPOSITORY.glob("*.txt"),
        REPOSITORY / "Dockerfile",
    ]
    return sorted(path for path in named if path.exists() and commands_in(path.read_text(encoding="utf-8")))


def assert_parses(tokens: list[str]) -> argparse.Namespace:
    script = REPOSITORY / tokens[0]
    assert script.is_file(), f"{tokens[0]}: no such script"
    if script.parent != REPOSITORY:
        return argparse.Namespace()  # benchmarks have their own tests
    stage = [value for flag, value in itertools.pairwise(tokens) if flag == "--stage"]
    try:
        return cli.parse_args(parser_of(script.name, *stage), tokens[1:])
    except SystemExit:
        pytest.fail(f"does not parse: python {shlex.join(tokens)}")


def test_the_command_finder_finds_commands():
    text = "python a.py --x 1 \\\n    --y 'b c'  # why\n$ python b.py || [ $? -eq 3 ]\nrun `python c.py --z`\nA=1 python d.py\n"
    assert commands_in(text) == [["a.py", "--x", "1", "--y", "b c"], ["b.py"], ["c.py", "--z"], ["d.py"]]
    assert commands_in("  torchrun --nnodes=2 --rdzv_id=a e.py --f 1\n") == [["e.py", "--f", "1"]]
    assert commands_in("python e.py ...\npython -m stoney_rl.planted\n") == []


def test_the_issues_commands_parse():
    args = assert_parses(
        shlex.split("train_lora.py --model deepseek-ai/DeepSeek-R1-Zero-7B --batch_size 4 --multi_gpu --num_gpus 4")
    )
    assert (args.model, args.batch_size, args.multi_gpu, args.num_gpus) == (
        "deepseek-ai/DeepSeek-R1-Zero-7B", 4, True, 4,
    )  # fmt: skip
    args = assert_parses(shlex.split("evaluate_model.py --model_path stoney_rl_grpo --num_samples 400"))
    assert (args.model_path, args.num_samples) == ("stoney_rl_grpo", 400)


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_documented_commands_parse(document):
    for tokens in commands_in(document.read_text(encoding="utf-8")):
        assert_parses(tokens)


@pytest.mark.parametrize("script", SCRIPTS)
def test_docstring_commands_parse(script):
    commands = commands_in(docstring(script))
    assert commands
    for tokens in commands:
        if "my_run.yaml" in tokens:
            tokens = [token for token in tokens if token not in ("--config", "my_run.yaml")]
        assert_parses(tokens)


@pytest.mark.parametrize("script", sorted(REPOSITORY.glob("runs/*.sh")), ids=lambda path: path.name)
def test_the_runs_are_sound_shell_scripts(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text and os.access(script, os.X_OK)
    assert any("python train_lora.py" in line for line in text.splitlines())


# Bad input: exit code 2, one line for each problem, no traceback, nothing written.


@pytest.fixture
def folder(tmp_path):
    """A working directory with some wrong things in it. Python finds a torch there that refuses to be imported."""
    (tmp_path / "torch.py").write_text("raise AssertionError('torch was imported before the arguments were checked')")
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half/config.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "not.zip").write_text("x")
    (tmp_path / "unknown_key.yaml").write_text("sede: 3\nwandb_mode: offline\n")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: }\n")
    return tmp_path


REQUIRED = {"evaluate_model.py": ["--model_path", "empty"]}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--no_such_flag"], "unrecognized arguments: --no_such_flag"),
        (["--wandb_mode", "sometimes"], "wandb_mode"),
        (["--config", "missing.yaml"], r"--config missing.yaml: No such file"),
        (["--config", "unknown_key.yaml"], "unknown_key.yaml: unknown key 'sede'"),
        (["--config", "list.yaml"], "list.yaml: expected 'flag: value' lines"),
        (["--config", "broken.yaml"], "broken.yaml: not valid YAML"),
    ],
)
def test_bad_flags_of_every_script(script, argv, said, folder):
    if argv[0] == "--wandb_mode" and "wandb_mode" not in flags(parser_of(script)):
        pytest.skip("has no tracking flags")
    assert_refused(run(script, *REQUIRED.get(script, []), *argv, cwd=folder), script, said)


BAD_INPUT = [
    ("evaluate_model.py", [], ["required: --model_path"]),
    ("evaluate_model.py", ["--model_path", "empty"], ["empty: not a complete checkpoint.*config.json, model.safetens"]),
    ("evaluate_model.py", ["--model_path", "half"], ["half: not a complete checkpoint.*model.safetensors"]),
    ("evaluate_model.py", ["--model_path", "file"], ["file: a file; expected a checkpoint directory"]),
    ("evaluate_model.py", ["--model_path", "emty"], [r"emty: no such checkpoint.*did you mean empty"]),
    ("evaluate_model.py", ["--model_path", "model.gguf"], ["python prepare_base_model.py --source model.gguf"]),
    ("evaluate_model.py", ["--model_path", "stoney_lora_merged"], ["make it with: python train_lora.py"]),
    ("evaluate_model.py", ["--model_path", "empty", "--num_samples", "0"], ["--num_samples: .*at least 1, got 0"]),
    ("evaluate_model.py", ["--model_path", "empty", "--num_samples", "ten"], ["--num_samples: .*'ten'"]),
    ("evaluate_model.py", ["--model_path", "empty", "--split", "dev"], ["--split: invalid choice: 'dev'"]),
    ("evaluate_model.py", ["--model_path", "empty", "--test_fraction", "2"], ["--test_fraction: .*from 0 to 1, got 2"]),
    ("prepare_base_model.py", ["--source", "empty"], ["--output_dir: needed with --source"]),
    ("prepare_base_model.py", ["--source", "empty", "--output_dir", "out"], ["empty: not a complete checkpoint"]),
    (
        "prepare_base_model.py",
        ["--source", "nothing", "--output_dir", "out"],
        ["nothing: no such checkpoint directory"],
    ),
    ("prepare_base_model.py", ["--source", "no.gguf", "--output_dir", "out"], ["no.gguf: no such file"]),
    (
        "prepare_base_model.py",
        ["--source", "not.zip", "--output_dir", "out"],
        ["not.zip: cannot be read as an archive"],
    ),
    ("prepare_base_model.py", ["--source", "file", "--output_dir", "empty"], ["empty exists already.*--overwrite"]),
    (
        "prepare_base_model.py",
        ["--source", "model.gguf", "--output_dir", "out", "--sha256", "0" * 64],
        ["model.gguf: SHA-256 is [0-9a-f]{64}, expected 0{64}"],
    ),
    ("train_lora.py", ["--model", "empty"], ["empty: not a complete checkpoint"]),
    (
        "train_lora.py",
        ["--model", "empty", "--num_gpus", "2", "--output_dir", "file", "--test_fraction", "0"],
        ["--output_dir: file is a file", "--num_gpus: only with --multi_gpu", "--test_fraction and --valid"],
    ),
    ("train_lora.py", ["--batch_size", "0"], ["--batch_size.*at least 1, got 0"]),
    ("train_lora.py", ["--no-merge", "--merged_dir", "m"], ["--merged_dir: only with --merge"]),
    ("run_sweep.py", [], ["sweep.yaml: No such file or directory; expected a W&B sweep file"]),
    ("run_sweep.py", ["list.yaml"], ["list.yaml: expected 'key: value' lines, found a list"]),
    ("run_sweep.py", ["broken.yaml"], ["broken.yaml: not valid YAML"]),
    ("run_sweep.py", ["--method", "bayes"], ["--method: invalid choice: 'bayes'"]),
    ("wandb_sample.py", ["--timeout", "0"], ["--timeout: expected a number above 0, got 0"]),
]


@pytest.mark.parametrize(
    ("script", "argv", "said"), BAD_INPUT, ids=lambda value: value if isinstance(value, str) else " ".join(value)[:40]
)
def test_bad_input_gets_one_line_a_problem(script, argv, said, folder):
    before = sorted(folder.rglob("*"))
    assert_refused(run(script, *argv, cwd=folder), script, *said)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("script", ["evaluate_model.py", "train_lora.py"])
def test_a_hub_out_of_reach_gets_one_line(script, folder):
    flag = {"evaluate_model.py": "--model_path"}.get(script, "--model")
    done = run(script, flag, "owner/name", cwd=folder, HF_ENDPOINT="http://127.0.0.1:9")
    assert_refused(done, script, "owner/name: no such folder here, and the hub does not answer")


def test_a_bad_dataset_is_refused_before_torch_is_loaded(folder):
    (folder / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):  # looks complete; the weights are not read yet
        (folder / "model" / name).write_text("{}")
    for script, flag in (("evaluate_model.py", "--model_path"), ("train_lora.py", "--model")):
        done = run(script, flag, "model", "--dataset", "file", cwd=folder)
        assert_refused(done, script, "^.*error: file is of no kind that can be read")
