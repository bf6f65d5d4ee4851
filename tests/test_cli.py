"""Command lines: --config underneath the command line, one-line errors, exit codes."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stoney_rl import cli
from stoney_rl.errors import StoneyError

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def parser():
    parser = cli.make_parser("Doc.\n\n    kept line")
    parser.add_argument("--batch_size", "--per_device_train_batch_size", dest="batch_size", type=cli.positive_int)
    parser.add_argument("--rate", type=cli.positive_float, default=0.5, help="the rate")
    parser.add_argument("--share", type=cli.fraction)
    parser.add_argument("--seed", type=cli.non_negative_int, default=0)
    parser.add_argument("--names", nargs="+", default=["all"])
    parser.add_argument("--add", action="append")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--grouped", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--mode", choices=["on", "away"])
    return parser


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return ["--config", str(path)]

    return write


def refusal(parser, argv, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.parse_args(parser, argv)
    assert ended.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_config_sets_every_kind_of_flag(parser, config):
    argv = config(
        "batch_size: 8\nrate: 1e-4\nshare: 0.25\nseed: 3\nnames: [q, k]\nadd: [x, y]\nfast: true\n"
        "grouped: false\nmode: away\n"
    )
    args = vars(cli.parse_args(parser, argv))
    assert {key: args[key] for key in args if key != "config"} == {
        "batch_size": 8,
        "rate": 1e-4,  # YAML 1.1 reads 1e-4 as text
        "share": 0.25,
        "seed": 3,
        "names": ["q", "k"],
        "add": ["x", "y"],
        "fast": True,
        "grouped": False,
        "mode": "away",
    }


def test_config_may_spell_a_flag_by_its_alias(parser, config):
    assert cli.parse_args(parser, config("per_device_train_batch_size: 8")).batch_size == 8


@pytest.mark.parametrize(
    ("yaml", "argv", "name", "expected"),
    [
        ("rate: 0.1", ["--rate", "0.9"], "rate", 0.9),
        ("rate: 0.1", ["--rate=0.9"], "rate", 0.9),
        ("batch_size: 2", ["--per_device_train_batch_size", "5"], "batch_size", 5),
        ("names: [a, b]", ["--names", "c"], "names", ["c"]),
        ("add: [a]", ["--add", "b"], "add", ["b"]),
        ("grouped: true", ["--no-grouped"], "grouped", False),
        ("grouped: false", ["--grouped"], "grouped", True),
        ("rate:", [], "rate", 0.5),
        ("", [], "rate", 0.5),
    ],
)
def test_command_line_wins(parser, config, yaml, argv, name, expected):
    assert getattr(cli.parse_args(parser, config(yaml) + argv), name) == expected


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("batchsize: 8", "unknown key 'batchsize' (did you mean 'batch_size'?)"),
        ("no-grouped: true", "unknown key 'no-grouped'"),
        ("config: other.yaml", "unknown key 'config'"),
        ("help: true", "unknown key 'help'"),
        ("7: 8", "unknown key 7"),
        ("batch_size: eight", "--batch_size"),
        ("batch_size: 0", "expected an integer of at least 1, got 0"),
        ("batch_size: 1.5", "--batch_size"),
        ("batch_size: [1, 2]", "batch_size: expected one value, got [1, 2]"),
        ("rate: {a: 1}", "rate: expected one value, got {'a': 1}"),
        ("rate: true", "rate: expected one value, got True"),
        ("fast: 'yes'", "fast: expected true or false, got 'yes'"),
        ("grouped: 1", "grouped: expected true or false, got 1"),
        ("mode: sideways", "invalid choice: 'sideways'"),
        ("- a", "expected 'flag: value' lines, found a list"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_config_is_refused(parser, config, capsys, yaml, said):
    assert said in refusal(parser, config(yaml), capsys)


def test_missing_config_names_the_file(parser, capsys, tmp_path):
    said = refusal(parser, ["--config", str(tmp_path / "none.yaml")], capsys)
    assert "none.yaml: No such file or directory" in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--batch", "8"], "unrecognized arguments: --batch 8"),  # an abbreviation
        (["--nope"], "unrecognized arguments: --nope"),
        (["--batch_size", "-1"], "expected an integer of at least 1, got -1"),
        (["--seed", "-1"], "expected an integer of at least 0, got -1"),
        (["--rate", "0"], "expected a number above 0, got 0"),
        (["--rate", "inf"], "expected a number above 0, got inf"),
        (["--rate", "nan"], "expected a number above 0, got nan"),
        (["--share", "1.5"], "expected a number from 0 to 1, got 1.5"),
        (["--share", "nan"], "expected a number from 0 to 1, got nan"),
    ],
)
def test_bad_command_line_is_refused(parser, capsys, argv, said):
    assert said in refusal(parser, argv, capsys)


def test_help_keeps_the_docstring_and_shows_defaults(parser):
    text = parser.format_help()
    assert "    kept line" in text
    assert "the rate (default: 0.5)" in text


def test_training_flags_have_the_stage_s_defaults():
    parser = cli.make_parser("Doc.")
    cli.add_model_flags(parser, "owner/name")
    cli.add_resume_flags(parser)
    cli.add_epoch_flags(parser, epochs=2.0, over="the prompts")
    cli.add_lora_flags(parser, all_linear="them all")
    cli.add_optimisation_flags(parser, learning_rate=1e-6, lr_scheduler_type="constant", warmup_ratio=0.1)
    cli.add_hardware_flags(parser)
    cli.add_saving_flags(parser, held_out="rewards")
    args = parser.parse_args([])
    assert (args.model, args.num_train_epochs, args.learning_rate) == ("owner/name", 2.0, 1e-6)
    assert (args.lr_scheduler_type, args.warmup_ratio) == ("constant", 0.1)
    text = " ".join(parser.format_help().split())
    for said in ("passes over the prompts (default: 2.0)", "all-linear finds them all", "between held-out rewards; 0:"):
        assert said in text


def test_problems_are_told_together():
    problems = cli.Problems()
    problems.raise_if_any()
    problems.add("first")
    problems.add("second")
    with pytest.raises(StoneyError) as error:
        problems.raise_if_any()
    assert str(error.value) == "first\nsecond"


ENDINGS = {
    "StoneyError('rows.jsonl: bad\\nand more')": (2, "script.py: error: rows.jsonl: bad\nscript.py: error: and more\n"),
    "OSError(28, 'No space left on device', '/out/a.npz')": (
        2,
        "script.py: error: /out/a.npz: No space left on device; make room and start again: what was finished is kept\n",
    ),
    "KeyboardInterrupt": (130, "\nscript.py: interrupted\n"),
}


@pytest.mark.parametrize("raised", ENDINGS)
def test_run_turns_errors_into_exit_codes(raised, monkeypatch, capsys):
    def main():
        raise eval(raised)

    monkeypatch.setattr(sys, "argv", ["/somewhere/script.py"])
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    assert (ended.value.code, capsys.readouterr().err) == ENDINGS[raised]


def test_run_hides_no_other_error():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0)


def test_run_is_silent_when_the_reader_goes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from stoney_rl import cli\ncli.run(lambda: [print('x' * 999) for _ in range(9999)] and None)\n")
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} {script} | head -1"], env=env, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
