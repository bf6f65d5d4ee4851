"""Several processes make the updates of one, agree on what they need, and end in a way that can be taken up again."""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny
from complete import only_complete

from benchmarks import survival
from stoney_rl import cli, distributed
from stoney_rl.errors import StoneyError

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, warm_python):
    """A run in one process: 42 rows, 16 an update, so that the last update of an epoch has ten."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(survival, "PYTHON", warm_python)
        yield survival.prepare(tmp_path_factory.mktemp("runs"), steps=50)


def state(folder):
    return json.loads((folder / "run_ckpt" / "trainer_state.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one_and_a_killed_worker_costs_one_interval(undisturbed):
    row = survival.measure("a killed worker", undisturbed)
    assert row["same_result"], row
    assert 0 < row["updates_trained_twice"] <= survival.SAVE_STEPS
    printed = (undisturbed.folder.parent / "a-killed-worker" / "agent-0.log").read_text(encoding="utf-8")
    assert "batch: 4 a device x 2 device(s) x 2 accumulated = 16 rows an update; 50 updates" in printed
    assert printed.count("rows: 42 to train on") == 2  # rank 0 alone speaks, once an attempt


@pytest.mark.slow
def test_a_terminated_process_saves_says_so_and_goes_on_from_that_step(undisturbed):
    row = survival.measure("SIGTERM to a process", undisturbed)
    assert row["same_result"] and row["updates_trained_twice"] == 0, row


@only_complete
@pytest.mark.slow
def test_a_full_disk_leaves_no_half_checkpoint(undisturbed):
    assert survival.measure("a full disk", undisturbed)["same_result"]


# Two processes on one machine, without torchrun: what they say to each other.

PAIR = """
import json, os, sys
from pathlib import Path
from stoney_rl import cli, distributed
import argparse

def main():
    distributed.connect(argparse.Namespace(fsdp=False, deepspeed=None))
    rank = int(os.environ["RANK"])
    {body}

cli.run(main)
"""


def pair(folder, body, *, apart=False):
    """Run ``body`` in two connected processes, in two folders if ``apart``; [(exit code, output)] by rank."""
    port = survival.free_port()
    processes = []
    for rank in (0, 1):
        place = folder / f"node-{rank}" if apart else folder
        place.mkdir(exist_ok=True)
        known = {"RANK": rank, "LOCAL_RANK": 0 if apart else rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port, "PYTHONPATH": REPOSITORY}  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", PAIR.format(body=body)],
                cwd=place, env=os.environ | {name: str(value) for name, value in known.items()}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    printed = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, printed, strict=True)]


@pytest.mark.slow
def test_nodes_without_a_common_disk_get_the_newest_checkpoint_of_any(tmp_path):
    """Rank 0 has step 10, rank 1 has step 20, in two files, one of them in a folder."""
    for rank, step in ((0, 10), (1, 20)):
        checkpoint = tmp_path / f"node-{rank}" / "run.partial" / f"checkpoint-{step}"
        (checkpoint / "deep").mkdir(parents=True)
        (checkpoint / "weights").write_bytes(bytes(range(256)) * step)
        (checkpoint / "deep" / "state").write_text(f"of {step}")
    body = """
    place = Path("run.partial")
    print(distributed.shares_disk(place), distributed.share_checkpoint(place))"""
    ended = pair(tmp_path, body, apart=True)
    assert [code for code, _ in ended] == [0, 0], ended
    assert "True run.partial/checkpoint-20" in ended[0][1] and "False run.partial/checkpoint-20" in ended[1][1]
    sent = tmp_path / "node-0" / "run.partial" / "checkpoint-20"
    assert (sent / "weights").read_bytes() == bytes(range(256)) * 20
    assert (sent / "deep" / "state").read_text() == "of 20"
    assert sorted(path.name for path in sent.parent.iterdir()) == ["checkpoint-10", "checkpoint-20"]


@pytest.mark.slow
def test_what_differs_between_nodes_and_what_rank_0_refuses_ends_all_of_them(tmp_path):
    body = """
    distributed.check_same(dataset="same", model="same")
    assert distributed.on_main(lambda: rank + 5) == 5
    distributed.check_same(dataset="same", model=f"of {rank}")"""
    for code, text in pair(tmp_path, body):
        assert code == cli.EXIT_BAD_INPUT
        assert "model: rank 1 of 2 on" in text and "copy the same files to every node" in text
        assert "Traceback" not in text
    body = """
    from stoney_rl.errors import StoneyError
    def refuse():
        raise StoneyError("no such thing")
    distributed.on_main(refuse)"""
    ended = pair(tmp_path, body)
    assert [code for code, _ in ended] == [2, 2]
    assert "rank 0 of 2 on" in ended[0][1] and "no such thing" in ended[0][1]
    assert ended[1][1] == ""  # rank 0 has said it


# The same rows in every update, however many processes share them


@pytest.mark.parametrize("strategy", ["group_by_length", "random", "sequential"])
@pytest.mark.parametrize(("world_size", "batch", "accumulation"), [(2, 4, 2), (4, 2, 2), (2, 8, 1), (8, 1, 2)])
def test_updates_are_made_of_the_same_rows_on_any_number_of_processes(strategy, world_size, batch, accumulation):
    """accelerate gives process p the batches p, p + world size, ... of what the sampler yields: here done by hand."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    from stoney_rl import training

    number = 42
    lengths = [1 + 7 * row % 30 for row in range(number)]

    def updates(world_size, batch, accumulation):
        rows = {"input_ids": [[0] * length for length in lengths] + [[0]] * (world_size > 1)}
        args = types.SimpleNamespace(
            data_seed=3, train_batch_size=batch, gradient_accumulation_steps=accumulation, world_size=world_size,
            train_sampling_strategy=strategy,
        )  # fmt: skip
        trainer = types.SimpleNamespace(args=args, state=types.SimpleNamespace(epoch=1.0), num_rows=number)
        order = training._Order(trainer, rows)
        batches = BatchSampler(order, batch, drop_last=False)
        shards = [list(batches)]
        if world_size > 1:
            shards = [list(BatchSamplerShard(batches, world_size, rank)) for rank in range(world_size)]
        assert len({len(shard) for shard in shards}) == 1  # nobody waits for a batch that never comes
        steps = range(0, len(shards[0]), accumulation)
        return [
            sorted(row for shard in shards for taken in shard[at : at + accumulation] for row in taken if row != number)
            for at in steps
        ]

    alone, shared = updates(1, 16, 1), updates(world_size, batch, accumulation)
    assert shared == alone and sorted(row for update in shared for row in update) == list(range(number))


def test_the_held_out_loss_is_the_mean_over_answer_tokens_however_they_are_batched(tmp_path):
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig

    from stoney_rl import prompts, training

    tokenizer = tiny.tokenizer()
    prompts.prepare_tokenizer(tokenizer)
    ends = prompts.end_of_turn_ids(tokenizer)
    rows = [
        prompts.encode_example(tokenizer, [{"role": "user", "content": "a" * (1 + row)}], "b" * (1 + 5 * row), ends)
        for row in range(7)
    ]
    found = {}
    for size in (1, 3, 7):
        model = tiny.model(layers=1)
        trainer = training.AnswerTrainer(
            model=model,
            args=SFTConfig(output_dir=str(tmp_path), max_length=None, per_device_eval_batch_size=size, report_to="none",
                           use_cpu=True, bf16=False),
            train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"),
        )  # fmt: skip
        found[size] = trainer.evaluate()["eval_loss"]
    model, total, count = tiny.model(layers=1), 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        asked = labels[1:] != -100
        total -= log_probs[asked].gather(1, labels[1:][asked][:, None]).sum().item()
        count += int(asked.sum())
    assert all(loss == pytest.approx(total / count, abs=1e-5) for loss in found.values()), found


# torchrun's part


def namespace(**values):
    return types.SimpleNamespace(
        **{"multi_gpu": False, "num_gpus": None, "max_restarts": None, "fsdp": False, "deepspeed": None} | values
    )


def test_more_gpus_than_there_are_is_refused_with_their_number(monkeypatch):
    import torch

    for available, number, said in [
        (2, 4, "4 GPUs asked for, 2 found on this machine; use --num_gpus 2"),
        (0, 4, "4 GPUs asked for, 0 found on this machine; leave out --multi_gpu"),
        (0, None, "GPUs asked for, 0 found on this machine; leave out --multi_gpu"),
    ]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda available=available: available)
        with pytest.raises(StoneyError, match=said):
            distributed.relaunch_on_gpus("x.py", namespace(multi_gpu=True, num_gpus=number), [])


def test_torchrun_is_given_one_worker_a_gpu_and_the_stages_own_flags(monkeypatch):
    import torch
    from torch.distributed import run

    given = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(run, "run", given.append)
    assert distributed.relaunch_on_gpus("a.py", namespace(multi_gpu=True), ["--lora_path", "x", "--multi_gpu"]) == 0
    assert distributed.relaunch_on_gpus("b.py", namespace(multi_gpu=True, num_gpus=3, max_restarts=0), []) == 0
    assert [(told.nproc_per_node, told.max_restarts, told.standalone) for told in given] == [
        ("4", 3, True),
        ("3", 0, True),
    ]
    assert [told.training_script for told in given] == ["a.py", "b.py"]
    assert given[0].training_script_args == ["--lora_path", "x", "--multi_gpu"]


def test_the_exit_code_is_what_the_workers_say(monkeypatch):
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def ends_with(error):
        def run_(_):
            raise error

        monkeypatch.setattr(run, "run", run_)
        return distributed.launch(["x.py"], processes=2, max_restarts=0)

    def failed(*codes):
        failures = {rank: ProcessFailure(rank, 100 + rank, code, "none") for rank, code in enumerate(codes)}
        return ChildFailedError("train_distributed.py", failures)

    assert ends_with(failed(1, -9)) == 1
    assert ends_with(failed(1, 2)) == cli.EXIT_BAD_INPUT
    assert ends_with(failed(-15, 75)) == cli.EXIT_RESUME
    assert ends_with(SignalException("got", sigval=signal.SIGTERM)) == cli.EXIT_RESUME
    assert ends_with(SignalException("got", sigval=signal.SIGINT)) == cli.EXIT_INTERRUPTED


def test_flags_that_need_several_processes_are_refused_in_one(monkeypatch):
    def said(**values):
        problems = cli.Problems()
        distributed.check_flags(namespace(**values), problems)
        return " ".join(problems.messages)

    monkeypatch.delenv("RANK", raising=False)
    assert said() == ""
    assert "--num_gpus: only with --multi_gpu" in said(num_gpus=2)
    assert "--max_restarts: only with --multi_gpu" in said(max_restarts=0)
    assert "shard a model over several processes" in said(fsdp=True)
    assert "give only one" in said(fsdp=True, deepspeed="zero2", multi_gpu=True)
    assert "deepspeed is not installed" in said(deepspeed="zero2", multi_gpu=True)
    assert "expected zero2 or zero3, or a JSON file" in said(deepspeed="zero9", multi_gpu=True)
    monkeypatch.setenv("RANK", "0")
    assert said(fsdp=True) == ""


def test_the_stage_decides_the_flags(capsys):
    import train_distributed

    assert train_distributed.build_parser("grpo").parse_args(["--lora_path", "x"]).lora_path == "x"
    assert train_distributed.build_parser().parse_args(["--model", "x"]).model == "x"
    for argv in (["--lora_path", "x"], ["--stage", "grpo", "--model", "x"], ["--stage", "evaluate"]):
        with pytest.raises(SystemExit) as ended:
            train_distributed.main(argv)
        assert ended.value.code == cli.EXIT_BAD_INPUT
    assert "--stage: invalid choice: 'evaluate'" in capsys.readouterr().err
