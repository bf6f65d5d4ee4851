"""Instructions.txt: every command says how it was tested, its numbers are the formula's, its messages are the code's.

That its commands parse is in test_scripts.py, as for every document.
"""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stoney_rl import memory

REPOSITORY = Path(__file__).resolve().parent.parent
TEXT = (REPOSITORY / "Instructions.txt").read_text(encoding="utf-8")
MARKS = ("# ran, tiny", "# ran, stub", "# ran, H200", "# ran", "# (not run here)")
MODELS = {name.split("/")[1].removesuffix("-Instruct").removesuffix("-4k-instruct"): name for name in memory.SHAPES}
MIB, GIB = 2**20, 2**30
CONTEXT = 0.8 * GIB  # of CUDA, as the chapter says


def chapter(number: int) -> str:
    return re.search(rf"^{number}  [A-Z].*?(?=^{number + 1}  [A-Z]|\Z)", TEXT, re.MULTILINE | re.DOTALL)[0]


def commands() -> list[str]:
    """The commands: lines indented by four, of which those that end in a backslash go on; not ~/.ssh/config."""
    joined = re.sub(r"\\\n +", "", TEXT)
    return [
        line.strip() for line in joined.splitlines() if re.match(r" {4}[a-zA-Z.]\S* ", line) and not is_no_command(line)
    ]


def is_no_command(line: str) -> bool:
    return line.strip() == "Host gpu" or line.strip().startswith("weights + adapter")


def test_it_is_plain_text_for_a_terminal():
    assert TEXT.isascii()
    assert [line for line in TEXT.splitlines() if len(line) > 100 or line != line.rstrip()] == []


def test_every_command_says_how_far_it_was_tested_and_every_mark_is_used():
    unmarked = [command for command in commands() if not command.endswith(MARKS)]
    assert unmarked == [] and len(commands()) > 50
    used = {next(mark for mark in MARKS if command.endswith(mark)) for command in commands()}
    legend = TEXT[: TEXT.index("Capital letters")]
    assert used == set(MARKS) == {mark for mark in MARKS if re.search(rf"^  {re.escape(mark)}  ", legend, re.MULTILINE)}


def test_the_contents_are_the_chapters():
    listed = dict(re.findall(r"(\d+)  (\S.*?)(?=  +\d|$)", TEXT[: TEXT.index("\n1  ")], re.MULTILINE))
    titles = dict(re.findall(r"^(\d+)  ([A-Z].*)\n-{5,}$", TEXT, re.MULTILINE))
    assert list(titles) == [str(number) for number in range(1, 16)]
    assert {number: title.lower() for number, title in listed.items()} == {
        number: title.lower() for number, title in titles.items()
    }


def test_files_that_it_names_are_there():
    made = {"gpu.log", "table.csv", "summary.txt", "plot.png", "stage.json", "nf4.py", "convert_hf_to_gguf.py"}
    named = set(re.findall(r"[\w./-]+\.(?:py|sh|yaml|txt|csv|png|json|log|example)\b", TEXT))
    assert {"runs/gpu.sh", "sweep.yaml", "requirements-gpu.txt", ".env.example"} <= named
    assert [name for name in named if Path(name).name not in made and not (REPOSITORY / name).exists()] == []


# Messages


def written_texts() -> list[str]:
    """Every string of the code, an f-string cut where a value stands; and the container's script."""
    files = [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("stoney_rl/**/*.py")]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [*strings, (REPOSITORY / "docker-entrypoint.sh").read_text(encoding="utf-8")]


def test_the_messages_that_it_explains_are_in_the_code():
    ours, others = chapter(15).split("Words of others.")
    lines = [line for line in ours.splitlines() if line.startswith('  "')]
    messages = [message for line in lines for message in re.findall(r'"([^"]+)"', line)]
    texts = written_texts()
    assert [message for message in messages if not any(message in text for text in texts)] == []
    assert len(messages) > 20 and "CUDA out of memory" in others


# Memory


def number(text: str) -> float:
    return float(text.replace(",", ""))


def rows_of_the_table() -> list[list[str]]:
    return [
        re.split(r" {2,}", line.strip()) for line in chapter(5).splitlines() if re.match(r"  \S+-\S+B? .*\d$", line)
    ]


def test_the_table_is_whole():
    rows = rows_of_the_table()
    assert {row[0] for row in rows} == set(MODELS) and len(rows) == 9
    assert all(len(row) == 9 for row in rows)


@pytest.mark.parametrize("row", rows_of_the_table(), ids=lambda row: f"{row[0]}-{row[2]}")
def test_the_table_is_what_the_formula_gives(row):
    name, batch, precision, predicted, measured, card, ram, merged, checkpoint = row
    config = memory.shape(MODELS[name])
    half = memory.Setup(
        batch_size=int(batch), length=512, weights=torch.bfloat16, autocast=torch.bfloat16, device="cuda"
    )
    found = memory.sft_memory(
        config, replace(half, load_in_4bit=precision == "4bit", gradient_checkpointing="kept" not in precision)
    )
    assert number(predicted) == pytest.approx(found.peak / MIB, abs=1)
    assert measured == "-" or number(measured) == pytest.approx(found.peak / MIB, rel=0.2)
    # A card holds its nominal gigabytes, of 10^9 bytes at worst.
    assert memory.MARGIN * found.peak + CONTEXT < number(card) * 1e9
    assert number(ram) == pytest.approx(memory.merge_bytes(config) / GIB, abs=0.06)
    assert number(merged) == pytest.approx(2 * memory.number_of_weights(config) / GIB, abs=0.06)
    assert number(checkpoint) == pytest.approx(3 / memory.ADAM * found.adapter / MIB, abs=1)  # without the gradients


def test_what_sharding_saves_is_what_the_formula_gives():
    stated = re.search(
        r"gives ([\d.]+) GiB a\s+device.*?, ([\d.]+) with --fsdp or zero3, but ([\d.]+)", chapter(7), re.DOTALL
    )
    config = memory.shape(MODELS["Qwen2.5-7B"])
    one = memory.Setup(batch_size=4, length=512, weights=torch.bfloat16, autocast=torch.bfloat16, device="cuda")
    for text, shardings in zip(stated.groups(), (["ddp"], ["fsdp", "zero3"], ["zero2"]), strict=True):
        for sharding in shardings:
            peak = memory.sft_memory(config, replace(one, devices=4, sharding=sharding)).peak
            assert number(text) == pytest.approx(peak / GIB, abs=0.06)
