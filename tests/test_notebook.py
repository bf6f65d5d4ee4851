"""The Colab notebook: sound as a file, its commands those of the scripts, and the whole of it run on a tiny model."""

import ast
import itertools
import json
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
import tiny
from complete import only_complete
from test_scripts import assert_parses

from stoney_rl import tracking

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOK = REPOSITORY / "notebooks/stoney_rl_colab.ipynb"
STAGES = [
    "prepare_base_model",
    "inspect_hf_dataset",
    "train_lora",
    "evaluate_model",
    "train_grpo",
    "analyze_with_tlens",
]
PATH = f"{Path(sys.executable).parent}:/usr/bin:/bin"
COLAB = "colab"  # the tag of cells that need Google's machine


def read() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


def tagged(cell: nbformat.NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def cell(name: str) -> nbformat.NotebookNode:
    return next(each for each in read().cells if each.id == name)


def code_cells() -> list[nbformat.NotebookNode]:
    """Those that run anywhere."""
    return [each for each in read().cells if each.cell_type == "code" and not tagged(each, COLAB)]


def parameters(**changed: object) -> dict:
    """What the parameter cell sets, and the helper cell makes of it."""
    names: dict = {}
    exec(cell("parameters").source, names)
    names.update(changed)
    names["lexicon"] = f"--lexicon {names['LEXICON']}" if names["LEXICON"] else ""
    return names


def commands(names: dict) -> list[list[str]]:
    """The command of every call of ``run``, as tokens, with ``names`` filled in."""
    calls = [
        node
        for each in code_cells()
        for node in ast.walk(ast.parse(each.source))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "run"
    ]
    return [shlex.split(eval(compile(ast.Expression(call.args[0]), "cell", "eval"), names)) for call in calls]


def test_the_file_is_sound_and_holds_no_outputs():
    notebook = read()
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    ids = [each.id for each in notebook.cells]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-z-]+", name) for name in ids)
    for each in notebook.cells:
        if each.cell_type == "code":
            assert each.outputs == [] and each.execution_count is None, each.id
    assert [each.id for each in notebook.cells if tagged(each, "parameters")] == ["parameters"]


def test_holds_no_secret():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert tracking.redact(text, {}) == text
    assert not re.search(r"\b[0-9a-f]{32,}\b", text)  # the shape of a W&B key of old


def test_every_step_is_explained_before_it_runs():
    cells = read().cells
    for before, each in itertools.pairwise(cells):
        if each.cell_type == "code" and "run(f" in each.source:
            assert before.cell_type == "markdown" and before.source.startswith("## ") and "Look " in before.source


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"DATASET": "HarleyCooper/StoneyNakoda45k", "LEXICON": "", "BASE_MODEL": "Qwen/Qwen3-0.6B", "DTYPE": "auto"},
    ],
    ids=["as it stands", "other rows and another model"],
)
def test_its_commands_parse(changed):
    names = parameters(**changed)
    found = commands(names)
    assert [tokens[:2] for tokens in found] == [["python", f"{stage}.py"] for stage in STAGES]
    parsed = dict(zip(STAGES, (assert_parses(tokens[1:]) for tokens in found), strict=True))
    assert parsed["inspect_hf_dataset"].dataset == names["DATASET"]
    assert parsed["prepare_base_model"].source == names["BASE_MODEL"]
    assert parsed["train_lora"].dtype == parsed["evaluate_model"].dtype == parsed["train_grpo"].dtype == names["DTYPE"]
    assert parsed["train_lora"].resume and parsed["train_grpo"].resume  # a disconnected machine goes on
    assert parsed["analyze_with_tlens"].lexicon == (names["LEXICON"] or None)


def test_the_files_it_names_are_there():
    names = parameters()
    assert (REPOSITORY / names["DATASET"]).is_file() and (REPOSITORY / names["LEXICON"]).is_file()


def test_what_needs_google_is_marked():
    for each in code_cells():
        assert "google.colab" not in each.source and not each.source.startswith(("!", "%")), each.id
    assert sum(tagged(each, COLAB) for each in read().cells) == 5


def test_the_install_keeps_the_pins_but_those_of_cuda(tmp_path):
    source = cell("install").source.removeprefix("%%bash\n")
    assert subprocess.run(["bash", "-n"], input=source, text=True).returncode == 0
    before_pip = source[: source.index("pip install")].replace("/tmp/", f"{tmp_path}/")
    env = {"PATH": "/usr/bin:/bin", "UV_SYSTEM_PYTHON": "true", "UV_CONSTRAINT": "nowhere"}
    done = subprocess.run(
        ["bash", "-c", before_pip + "env"], cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True
    )
    assert "UV_" not in done.stdout
    kept = (tmp_path / "constraints.txt").read_text().splitlines()
    locked = (REPOSITORY / "requirements.lock").read_text().splitlines()
    dropped = set(locked) - set(kept)
    assert dropped and all(re.match(r"(cuda|nvidia|triton)", line) for line in dropped)
    assert "torch==2.13.0" in kept and not any(line.startswith(("cuda", "nvidia", "triton")) for line in kept)
    assert re.search(r"uv==\d+\.\d+\.\d+\b", source)


def test_a_failing_step_stops_the_notebook(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(REPOSITORY / "notebooks")  # the code is found from a folder below it
    for name in ("WANDB_DIR", "PYTHONUNBUFFERED"):
        monkeypatch.setenv(name, "")  # set by the cell, and taken back after this test
    monkeypatch.setenv("PATH", PATH)
    names = parameters(RESULTS=str(tmp_path / "out"))
    exec(cell("helpers").source, names)
    with pytest.raises(RuntimeError, match="train_lora.py ended with exit code 2"):
        names["run"]("python train_lora.py --batch_size 0")
    assert "at least 1, got 0" in capfd.readouterr().out
    names["run"]("""python -c 'print("ṯ" * 30_000)'""")
    assert capfd.readouterr().out == "ṯ" * 30_000 + "\n"  # no letter is lost where a block of output ends


def test_says_where_the_code_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="run the cells of the set-up first"):
        exec(cell("helpers").source, parameters(RESULTS=str(tmp_path / "out")))


# The whole of it.


@pytest.fixture(scope="session")
def executed(tmp_path_factory, warm_python) -> tuple[Path, nbformat.NotebookNode]:
    """The results' folder and the notebook with its outputs: a tiny model, 300 rows, a step or two of each stage."""
    from nbclient import NotebookClient

    folder = tmp_path_factory.mktemp("notebook")
    rows = (REPOSITORY / "data/planted/rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:300]
    (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    changed = {
        "DATASET": str(folder / "rows.jsonl"),
        "LEXICON": "",  # the pairs of the planted lexicon's affixes need another tokenizer than the tiny one
        "BASE_MODEL": str(tiny.checkpoint(folder / "tiny")),
        "SFT_STEPS": 2,
        "TEST_ROWS": 4,
        "ANSWER_TOKENS": 8,
        "GRPO_STEPS": 1,
        "PROMPT_PAIRS": 4,
        "RESULTS": str(folder / "results"),
    }
    notebook = read()
    notebook.cells = [each for each in notebook.cells if not tagged(each, COLAB)]
    given = next(each for each in notebook.cells if each.id == "parameters")
    given.source += "".join(f"\n{name} = {value!r}" for name, value in changed.items())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "PATH": f"{warm_python.parent}:{PATH}",
            "WANDB_MODE": "disabled",
            "HF_HUB_OFFLINE": "1",
            "IPYTHONDIR": str(folder / "ipython"),
            "JUPYTER_RUNTIME_DIR": str(folder / "jupyter"),
        }.items():
            patch.setenv(name, value)
        client = NotebookClient(notebook, timeout=600, kernel_name="python3",
                                resources={"metadata": {"path": str(REPOSITORY)}})  # fmt: skip
        client.execute()
    return folder / "results", notebook


def outputs(executed, name: str) -> list[nbformat.NotebookNode]:
    return next(each for each in executed[1].cells if each.id == name).outputs


@only_complete
@pytest.mark.slow
def test_every_stage_leaves_its_output(executed):
    results, _ = executed
    for name, stage in {
        "base": "base",
        "prepared": "dataset",
        "sft_ckpt": "sft",
        "sft_merged": "sft",
        "grpo_ckpt": "grpo",
        "grpo": "grpo",
    }.items():
        assert json.loads((results / name / "stage.json").read_text())["stage"] == stage
    assert json.loads((results / "sft_merged/stage.json").read_text())["training"]["steps"] == 2
    assert json.loads((results / "grpo/stage.json").read_text())["training"]["steps"] == 1
    assert len((results / "evaluation/predictions.jsonl").read_text().splitlines()) == 4
    models = json.loads((results / "analysis/results.json").read_text())["models"]
    assert [model["name"] for model in models] == ["sft_merged", "base"]
    assert not list(results.glob("*.partial"))


@only_complete
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pictures", "pages"),
    [("inspect", 2, 1), ("evaluate", 2, 1), ("grpo", 1, 0), ("analysis", 1, 1)],
)
def test_pictures_and_pages_are_shown(executed, name, pictures, pages):
    shown = [output.data for output in outputs(executed, name) if output.output_type == "display_data"]
    assert sum("image/png" in data for data in shown) == pictures
    assert sum("<iframe srcdoc=" in data.get("text/html", "") for data in shown) == pages
    assert not any(output.get("name") == "stderr" for output in outputs(executed, name))


@only_complete
@pytest.mark.slow
def test_what_the_steps_print_is_seen(executed):
    printed = {
        name: "".join(output.text for output in outputs(executed, name) if output.output_type == "stream")
        for name in ("base", "inspect", "sft", "evaluate", "grpo", "analysis")
    }
    assert "What is the capital of France?" in printed["base"]
    assert "2 updates" in printed["sft"] and "held-out loss" in printed["sft"]
    assert "retrieval" in printed["evaluate"]
    assert "have no spread" in printed["grpo"]
    assert "report.html" in printed["analysis"]


@only_complete
@pytest.mark.slow
def test_the_pack_leaves_out_the_full_models_alone(executed):
    results, _ = executed
    with zipfile.ZipFile(results.with_suffix(".zip")) as archive:
        names = set(archive.namelist())
    assert {"analysis/report.html", "evaluation/results.json", "sft_ckpt/adapter_model.safetensors"} <= names
    assert {"grpo_ckpt/adapter_model.safetensors", "prepared/train.parquet", "sft_merged/stage.json"} <= names
    files = {str(path.relative_to(results)) for path in results.rglob("*") if path.is_file()}
    left_out = files - names
    assert {"base/model.safetensors", "sft_merged/model.safetensors", "grpo/model.safetensors"} <= left_out
    assert all(name.endswith("/model.safetensors") or "/checkpoint-" in name for name in left_out)
