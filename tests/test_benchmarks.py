"""The benchmarks: how times, memory and arithmetic are taken, and a run of both on tiny models."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest
import tiny
from complete import only_complete

from benchmarks import compare, evaluate, interp, matmul, measure, scaling, sft, survival
from stoney_rl.errors import StoneyError

REPOSITORY = Path(__file__).resolve().parent.parent
PLANTED = REPOSITORY / "data" / "planted" / "rows.jsonl"

# Three updates of 0.2 s after half a second of 'loading', another bar in between, and 0.3 s of 'saving', at whose
# beginning the process grows by 200 MB.
TRAINER = """
import sys, time
def bar(name, done, total):
    sys.stderr.write(f"\\r{name}{100 * done // total:3d}%|###   | {done}/{total} [00:00<00:00,  5.00it/s]"); sys.stderr.flush()
bar("Tokenizing: ", 3, 3)
time.sleep(0.5)
bar("", 0, 3)
for step in range(1, 4):
    time.sleep(0.2)
    sys.stderr.write("\\rloss 1.0\\n")
    bar("", step, 3)
time.sleep(0.15)
saved = bytearray(b"x") * 200_000_000
time.sleep(0.15)
"""


def run(code: str, updates: int = 3) -> measure.Run:
    seen = []
    done = measure.run_training([sys.executable, "-c", code], updates=updates, env={}, progress=seen.append)
    assert seen == list(range(updates + 1))
    return done


def test_times_are_those_of_the_progress_bar():
    done = run(TRAINER)
    assert done.updates[0] >= 0.5
    # Three sleeps of 0.2 s, without the loading before and the saving after; a busy machine may delay a reading.
    assert 0.4 < done.training_seconds < done.seconds - 0.5
    assert len(done.update_seconds) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak so far")
def test_peak_memory_of_training_leaves_out_what_comes_after():
    done = run(TRAINER.replace("0.15", "1"))
    assert done.peak_bytes > 200_000_000
    assert 1_000_000 < done.peak_training_bytes < done.peak_bytes - 100_000_000


def test_memory_is_that_of_the_process_that_trains_behind_a_launcher():
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {TRAINER!r}])"
    assert run(launcher).peak_bytes > 200_000_000


def test_a_command_that_fails_shows_the_end_of_its_output():
    code = "import sys; print('first'); print('CUDA is on fire', file=sys.stderr); sys.exit(3)"
    with pytest.raises(StoneyError, match=r"code 3[\s\S]*CUDA is on fire"):
        measure.run_training([sys.executable, "-c", code], updates=3, env={}, progress=print)


def test_a_bar_of_another_length_is_not_taken_for_training():
    with pytest.raises(StoneyError, match="update 0 of 4"):
        measure.run_training([sys.executable, "-c", TRAINER], updates=4, env={}, progress=print)


def test_a_terminated_benchmark_leaves_neither_rows_nor_processes(tmp_path):
    trainer = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import sys, tempfile\nfrom benchmarks import measure\n"
        f"with measure.ending_tidily(), tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):\n"
        f"    measure.run_training([sys.executable, '-c', {trainer!r}], updates=1, env={{}}, progress=print)\n"
    )
    benchmark = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    try:
        wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        assert len(list(tmp_path.iterdir())) == 2  # the note of the process, the folder of the rows
        benchmark.terminate()
        assert benchmark.wait(timeout=30) == 128 + signal.SIGTERM
    finally:
        benchmark.kill()
    assert [path.name for path in tmp_path.iterdir()] == ["pid"]
    trainer = int((tmp_path / "pid").read_text())
    wait_until(lambda: not is_running(trainer))


def is_running(pid):
    """Also a process that ended counts, until the system has let go of it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.05)


def test_useful_arithmetic_by_hand():
    load = sft.Workload(
        rows=1, tokens=10, answer_tokens=4, squared_tokens=100, longest=10, data_sha256="", linear_weights=1000,
        adapter_weights=100, head_weights=500, layers=2, attention_width=8, hidden=8, intermediate=16, autocast="fp32",
    )  # fmt: skip
    # (4 x 1000 + 6 x 100) x 10  +  4 x 500 x 4  +  12 x 2 x 8 x 100
    assert load.useful_flops == 46_000 + 8_000 + 19_200


def test_weights_and_tokens_are_counted_by_hand(tmp_path):
    model = tiny.checkpoint(tmp_path / "model")
    arguments = ["--model", str(model), "--dataset", str(PLANTED), "--steps", "5", "--lora_rank", "4"]
    load = sft.prepare(vars(sft.build_parser().parse_args(arguments)), tmp_path)
    # A layer of width 32: query and output 32 x 32, key and value (2 of 4 heads) 32 x 16, MLP 3 x 32 x 64.
    assert load.linear_weights == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert load.adapter_weights == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
    assert load.head_weights == 259 * 32
    assert (load.layers, load.attention_width) == (2, 32)
    rows = [json.loads(line) for line in (tmp_path / "trl" / "train.jsonl").read_text().splitlines()]
    assert load.rows == len(rows) <= 40
    # The byte-level tokenizer: a token a byte, and one that ends the turn.
    assert load.answer_tokens == sum(len(row["completion"][0]["content"].encode()) + 1 for row in rows)


@pytest.mark.parametrize("wanted", [24, 40, 160])
def test_rows_fill_the_updates_but_not_more(tmp_path, wanted):
    from stoney_rl import corpus, data

    rows = data.load_rows(PLANTED).rows
    chosen = sft.choose_rows(rows, wanted, tmp_path / "rows.jsonl")
    assert 0.9 * wanted <= len(chosen.split.train) <= wanted
    again = corpus.prepare(tmp_path / "rows.jsonl")  # what train_lora.py makes of the file
    assert [row.id for row in again.split.train] == [row.id for row in chosen.split.train]


@pytest.mark.parametrize(("wanted", "message"), [(4000, "too few"), (8, "--steps")])
def test_too_many_or_too_few_rows_are_refused(tmp_path, wanted, message):
    from stoney_rl import data

    with pytest.raises(StoneyError, match=message):
        sft.choose_rows(data.load_rows(PLANTED).rows, wanted, tmp_path / "rows.jsonl")


def test_tokens_that_the_trainer_did_not_see_are_an_error(tmp_path):
    load = sft.Workload(10, 100, 30, 1000, 12, "", 1, 1, 1, 1, 1, 1, 1, "fp32")

    def log(tokens):
        state = {
            "global_step": 1,
            "log_history": [{"loss": 2.0, "num_tokens": 60.0}, {"loss": 1.0, "num_tokens": tokens}],
        }
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))
        return state

    log(100.0)
    assert sft.read_log(tmp_path, sft.OURS_FAST, load) == {"loss": 1.5, "trainer_tokens": 100}
    log(110.0)  # one newline a row behind the end of the turn
    assert sft.read_log(tmp_path, sft.TRL_DEFAULT, load)["trainer_tokens"] == 110
    with pytest.raises(StoneyError, match="110 tokens"):
        sft.read_log(tmp_path, sft.OURS_DEFAULT, load)
    log(90.0)
    with pytest.raises(StoneyError, match="90 tokens"):
        sft.read_log(tmp_path, sft.TRL_DEFAULT, load)


def test_matmul_rates_are_positive_and_of_every_shape():
    rates = matmul.rates({"small": (64, 32, 16)}, threads=1, seconds=0.01)
    assert set(rates) == {"fp32", "bf16"}
    assert all(rate["small"] > 0 for rate in rates.values())


@pytest.mark.parametrize("script", ["sft.py", "evaluate.py", "matmul.py", "interp.py", "compare.py"])
def test_help_is_quick_and_loads_nothing_heavy(script, tmp_path):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['{script}', '--help']\n"
        f"sys.path[0] = {str(REPOSITORY / 'benchmarks')!r}\n"  # as python benchmarks/<script> sets it
        f"try: runpy.run_path({str(REPOSITORY / 'benchmarks' / script)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'trl', 'peft', 'pandas', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not any(path.endswith('benchmarks') for path in sys.path), 'hides the package evaluate'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout or script == "matmul.py"


@pytest.mark.parametrize("benchmark", [sft, evaluate])
def test_a_missing_checkpoint_names_the_command_that_makes_it(benchmark, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoneyError, match=r"python prepare_base_model\.py"):
        benchmark.main([])


def test_identical_answers_by_hand():
    expected = [("mî", 2), ("ta", 1), ("", 0)]
    assert evaluate.identical([{"answers": expected}], expected) == 3
    other = [("mî", 3), ("ta", 1), ("", 0)]  # another number of tokens; a side that tells none can't differ in it
    assert evaluate.identical([{"answers": expected}, {"answers": other}], expected) == 2
    assert evaluate.identical([{"answers": [("mî", None), ("to", None), ("", None)]}], expected) == 2


# lm-evaluation-harness as far as the benchmark uses it: prompts as text, left-padded in the order given. Its second
# answer has a letter too many.
LM_EVAL = {
    "lm_eval/__init__.py": "",
    "lm_eval/api/__init__.py": "",
    "lm_eval/models/__init__.py": "",
    "lm_eval/api/instance.py": """
class Instance:
    def __init__(self, request_type, doc, arguments, idx):
        assert request_type == "generate_until"
        self.args = arguments
""",
    "lm_eval/models/huggingface.py": """
import transformers
print("libraries print where they like")
class HFLM:
    def __init__(self, pretrained, peft, tokenizer, revision, device, dtype, batch_size, add_bos_token):
        assert (peft, revision, dtype, batch_size, add_bos_token) == (None, "main", "float32", 4, False)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(pretrained).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer, padding_side="left")
    def tok_encode(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
    def tok_decode(self, tokens, skip_special_tokens=True):
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
    def generate_until(self, requests):
        texts, options = [request.args[0] for request in requests], requests[0].args[1]
        assert options.pop("until") == ["<|im_end|>"]
        inputs = self.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        output = self.model.generate(
            **inputs, max_new_tokens=options.pop("max_gen_toks"), pad_token_id=2, **options
        )[:, inputs["input_ids"].shape[1] :]
        answers = [self.tok_decode(line) for line in output]
        return [text + "x" * (index == 1) for index, text in enumerate(answers)]
""",
}


@pytest.fixture
def environment(tmp_path):
    """A function that makes the environment of a stub of lm-eval and tells its Python."""

    def make(files: dict[str, str], **versions: str) -> str:
        venv.create(tmp_path / "venv", symlinks=True)
        packages = tmp_path / "venv" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        for name, text in files.items():
            (packages / name).parent.mkdir(parents=True, exist_ok=True)
            (packages / name).write_text(text)
        for name, number in versions.items():
            (packages / f"{name}-{number}.dist-info").mkdir()
            metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n"
            (packages / f"{name}-{number}.dist-info" / "METADATA").write_text(metadata)
        (packages / "project.pth").write_text(sysconfig.get_path("purelib"))  # torch and the rest
        return str(tmp_path / "venv" / "bin" / "python")

    return make


def evaluate_tiny(tmp_path, *arguments):
    model, output = tiny.checkpoint(tmp_path / "model"), tmp_path / "new" / "evaluate.json"
    evaluate.main(
        ["--model", str(model), "--dataset", str(PLANTED), "--output", str(output), "--num_samples", "6",
         "--max_new_tokens", "5", "--batch_sizes", "4", "--repeats", "1", "--threads", "1", *arguments]
    )  # fmt: skip
    return json.loads(output.read_text())


@only_complete
@pytest.mark.slow
def test_evaluate_end_to_end(tmp_path, capsys, environment):
    python = environment(LM_EVAL, lm_eval="0.4.13")
    report = evaluate_tiny(tmp_path, "--lm_eval_python", python)
    results = report["results"]
    assert list(results) == ["one by one", "batches of 4", "lm-eval, 4"]
    for entry in results.values():
        assert entry["of"] == 6
        assert entry["peak_bytes"] > 100_000_000  # torch alone
        assert entry["samples_per_second"] == pytest.approx(6 / entry["seconds"])
    assert [entry["identical"] for entry in results.values()] == [6, 6, 5]
    assert results["lm-eval, 4"]["identical_to_ours"] == 5
    assert results["lm-eval, 4"]["tokens_per_second"] is None
    assert results["batches of 4"]["speed_over_lm_eval_each"] == [
        pytest.approx(results["lm-eval, 4"]["seconds"] / results["batches of 4"]["seconds"])
    ]
    assert report["lm_eval_versions"]["lm_eval"] == "0.4.13"
    printed = capsys.readouterr().out
    assert "6 of 6" in printed
    assert "5 of 6 (5 as ours)" in printed


@pytest.mark.slow
@pytest.mark.skipif(not (REPOSITORY / ".venv-lm-eval").exists(), reason="benchmarks/README.md makes it")
def test_lm_eval_itself_gives_the_same_answers(tmp_path):
    report = evaluate_tiny(tmp_path, "--lm_eval_python", str(REPOSITORY / ".venv-lm-eval" / "bin" / "python"))
    assert report["results"]["lm-eval, 4"]["identical_to_ours"] == 6


def test_other_token_ids_and_a_failure_of_lm_eval_are_errors(tmp_path, environment, capfd):
    backend = "lm_eval/models/huggingface.py"
    doubled = LM_EVAL[backend].replace("return self.tokenizer(text", "return 2 * self.tokenizer(text")
    python = environment(LM_EVAL | {backend: doubled})
    model = tiny.checkpoint(tmp_path / "model")
    question = [{"role": "user", "content": "What is stone?"}]
    with pytest.raises(StoneyError, match="1/1 lm-eval, 4: failed with code 1"):
        evaluate.answer_lm_eval("1/1 lm-eval, 4", python, str(model), [question], 4, 5, 1)
    assert "other token ids of 1 of 1 prompts" in capfd.readouterr().err


def test_an_environment_without_lm_eval_or_with_other_libraries_is_refused(tmp_path, environment):
    with pytest.raises(StoneyError, match=r"can't be run \(No such file.*pip install -c requirements.txt 'lm-eval"):
        evaluate.check_lm_eval(str(tmp_path / "python"))
    with pytest.raises(StoneyError, match="has no lm-eval.*python -m venv"):
        evaluate.check_lm_eval(sys.executable)
    python = environment({}, lm_eval="0.4.13", transformers="4.1.0")
    with pytest.raises(StoneyError, match=r"transformers 4\.1\.0, but 5.* here"):
        evaluate.check_lm_eval(python)


@only_complete
@pytest.mark.slow
def test_sft_end_to_end(tmp_path, capsys):
    model, output = tiny.checkpoint(tmp_path / "model"), tmp_path / "sft.json"
    sft.main(
        ["--model", str(model), "--dataset", str(PLANTED), "--output", str(output), "--steps", "5", "--repeats", "1",
         "--threads", "1", "--dtype", "fp32", "--variants", sft.TRL_OURS, sft.OURS_FAST]
    )  # fmt: skip
    text = output.read_text()
    report = json.loads(text)
    trl, ours = report["results"][sft.TRL_OURS], report["results"][sft.OURS_FAST]
    load = report["workload"]
    assert load["updates"] == 5
    for entry in (trl, ours):
        assert entry["answer_tokens_per_second"] == pytest.approx(load["answer_tokens"] / entry["training_seconds"])
        assert len(entry["runs"][0]["updates"]) == 6
        assert entry["peak_bytes"] > 100_000_000
    assert ours["runs"][0]["trainer_tokens"] == load["tokens"]
    assert trl["runs"][0]["trainer_tokens"] == load["tokens"] + load["rows"]  # the newline behind each turn
    # The same rows from the same weights: a random model's loss is about log(259) in both.
    assert ours["loss"] == pytest.approx(trl["loss"], rel=0.02)
    assert "stoney-benchmark-" not in text  # where the rows were kept
    assert "speed" in capsys.readouterr().out


# interp.py


@only_complete
def test_attribution_is_compared_with_patching_on_the_same_pairs(tmp_path, capsys):
    model, output = tiny.checkpoint(tmp_path / "model"), tmp_path / "out.json"
    interp.main(["--model_path", str(model), "--num_pairs", "2", "--threads", "1", "--output", str(output)])
    found = json.loads(output.read_text())
    truth, *estimates = found["heads"].values()
    assert len(truth["values"]) == 2 and len(estimates) == 2  # pairs; numbers of steps
    for estimate in estimates:
        assert estimate["rank_correlation"] > 0.8
        assert estimate["times_faster"] == pytest.approx(truth["cpu_seconds"] / estimate["cpu_seconds"])
    one_by_one, report = found["attention"].values()
    assert one_by_one["files"] == 2 * 4 and report["files"] == 2  # heads; page and results.json
    assert "one by one (TransformerLens)" in capsys.readouterr().out


def test_what_interp_compares_must_be_there(tmp_path):
    given = ["--model_path", str(tiny.checkpoint(tmp_path / "model"))]
    for more, message in (
        (["--lexicon", "nowhere.jsonl"], "--lexicon nowhere.jsonl: no such file"),
        (["--output", str(tmp_path)], "a directory; name a file"),
    ):
        with pytest.raises(StoneyError, match=message):
            interp.main([*given, *more])


# compare.py


def test_random_sets_are_measured_in_as_many_pairs_as_in_the_stage():
    from stoney_rl.interp.compare import FULL

    assert FULL.few == compare.FEW


def test_growth_by_hand():
    plans = compare.plans_of([2, 3, 4], [8, 16], [4])
    assert [tuple(plan.values()) for plan in plans] == [(2, 8, 4), (3, 8, 4), (4, 8, 4), (2, 16, 4), (3, 16, 4)]
    costs = [
        {
            "localisation": {"cpu_seconds": plan["families"] * plan["pairs"]},
            "matrix": {"cpu_seconds": plan["families"] ** 2},
            "tasks": {"cpu_seconds": 5.0},
        }
        for plan in plans
    ]
    growth = compare.growth_of(plans, costs)
    # The plan in the middle lies on no axis and takes no part: it would bend every slope.
    assert growth["exponents"]["localisation"] == {
        "families": pytest.approx(1),
        "pairs": pytest.approx(1),
        "layers": None,
    }
    assert growth["exponents"]["matrix"] == {"families": pytest.approx(2), "pairs": pytest.approx(0), "layers": None}
    # families x pairs x layers: 3 x 16 x 4 over 2 x 8 x 4
    assert growth["in_the_middle"] == {"product": 3.0, "localisation": 3.0, "matrix": 2.25, "tasks": 1.0}
    assert compare.growth_of(plans[:4], costs[:4])["in_the_middle"] is None


def test_the_plain_way_is_extrapolated_and_ranked_by_hand():
    def cost(cpu, wall):
        return {"cpu_seconds": cpu, "seconds": wall}

    ours = {
        "components": cost(4.0, 1.0),
        "test": cost(6.0, 1.0) | {"parts": 3},
        "values": {"heads": [[0.1, 0.9], [0.2, 0.3]], "mlps": [0.5, 0.0]},
    }
    plain = {
        "of": 6,
        "parts": [["heads", 0, 1], ["mlps", 0, 0], ["heads", 1, 0]],
        "effects": [8.0, 3.0, 4.0],  # estimates 0.9, 0.5, 0.2
        "start": cost(2.0, 1.0),
        "each": {"cpu_seconds": [1.0, 2.0, 6.0], "seconds": [1.0, 1.0, 1.0]},
    }
    found = compare.compared(ours, plain)
    assert found["plain"]["every_part"] == cost(2 + 6 * 3.0, 1 + 6 * 1.0)
    assert found["plain"]["test"] == cost(2 + 3 * 3.0, 1 + 3 * 1.0)
    assert found["times_faster"] == 20 / 4
    assert found["times_faster_with_test"] == (20 + 11) / (4 + 6)
    assert found["rank_agreement"] == pytest.approx(0.5)


def test_the_plain_way_finds_what_true_patching_finds():
    import torch
    from prompt_pairs import one_batch, random_pairs

    from stoney_rl.interp.localise import part_set, true_patching

    model, pairs = tiny.lively("llama"), random_pairs([9, 9, 12])
    parts = [("heads", 0, 1), ("heads", 1, 3), ("mlps", 0, 0)]
    batch = one_batch(pairs)
    cache, corrupt = compare.plain_start(model.bridge, batch)
    plain = torch.stack([compare.plain_effect(model.bridge, batch, cache, part) - corrupt for part in parts], 1)
    expected = true_patching(model, pairs, part_set(parts))
    assert expected.abs().min() > 1e-3
    assert torch.allclose(plain, expected, atol=1e-4)


def test_mixed_passes_and_a_pass_a_set_give_the_same(monkeypatch):
    from prompt_pairs import random_pairs

    model = tiny.lively("llama")
    monkeypatch.setattr(compare, "opened", lambda *_: (model, None))
    families = {name: random_pairs([9, 9, 12, 12], seed=seed) for seed, name in enumerate(("one", "other"))}
    found = compare.mix_rows("", families, 3, 1, 0)
    assert found["largest_difference"] < 1e-4
    assert found["typical_loss"] > 0.01
    assert (found["sets"], found["families"]) == (4, 2)
    assert found["times_faster"] == found["slow"]["cpu_seconds"] / found["fast"]["cpu_seconds"]


@only_complete
def test_families_are_compared_at_every_size(tmp_path, capsys):
    model, output = tiny.checkpoint(tmp_path / "model"), tmp_path / "out.json"
    compare.main(
        ["--model_path", str(model), "--families", "english", "arithmetic", "french", "--pairs", "8", "12",
         "--layers", "1", "2", "--num_pairs", "4", "--sample", "8", "--random_sets", "3", "--threads", "1",
         "--output", str(output)]
    )  # fmt: skip
    text = output.read_text()
    report = json.loads(text)
    plans = report["growth"]["plans"]
    # The smallest, one more of each, and all three in the middle (of two numbers the larger).
    sizes = [(plan["families"], plan["pairs"], plan["layers"]) for plan in plans]
    assert sizes == [(2, 8, 1), (3, 8, 1), (2, 12, 1), (2, 8, 2), (3, 12, 2)]
    for plan, (families, pairs, _) in zip(plans, sizes, strict=True):
        assert plan["cost"]["matrix"]["rows"] == families**2 * (pairs + 3 * compare.FEW)
        each = plan["cost"]["tasks"]["each"]
        assert {"decision", "localise", "knockout", "knockout_neurons", "patching"} <= set(each)
        assert plan["cost"]["tasks"]["cpu_seconds"] == pytest.approx(sum(one["cpu_seconds"] for one in each.values()))
    beside = report["beside"]
    assert (beside["plain"]["of"], len(beside["plain"]["effects"])) == (2 * 4 + 2, 8)
    assert beside["rank_agreement"] > 0.8
    assert report["mixed_rows"]["largest_difference"] < 1e-4
    assert report["mixed_rows"]["sets"] == 4
    assert report["n"] == 4 and len(report["tokens"]) == 4
    assert "sofa" not in text  # a word of the English prompts
    assert "exponent in families" in capsys.readouterr().out


def test_what_compare_compares_must_be_there(tmp_path, capsys):
    given = ["--model_path", str(tiny.checkpoint(tmp_path / "model"))]
    for more, message in (
        (["--lexicon", "nowhere.jsonl"], "--lexicon nowhere.jsonl: no such file"),
        (["--output", str(tmp_path)], "a directory; name a file"),
    ):
        with pytest.raises(StoneyError, match=message):
            compare.main([*given, *more])
    for more in (["--families", "english"], ["--pairs", "4"], ["--pairs", "10"]):
        with pytest.raises(SystemExit):
            compare.main([*given, *more])
        assert "two --families or more" in capsys.readouterr().err


# scaling.py and survival.py; whole runs are in test_distributed.py


def finished(folder, *, seconds, losses, weight=1.0):
    import torch
    from safetensors.torch import save_file

    for name in ("run_ckpt", "run_merged"):
        (folder / name).mkdir(parents=True)
    history = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    (folder / "run_ckpt" / "trainer_state.json").write_text(json.dumps({"log_history": [*history, {"step": 9}]}))
    (folder / "run_ckpt" / "stage.json").write_text(json.dumps({"training": {"seconds": seconds}}))
    save_file({"weight": torch.full((3,), weight)}, folder / "run_merged" / "model.safetensors")
    return survival.Run(folder, len(losses))


def test_efficiency_is_the_time_of_one_over_twice_that_of_two(tmp_path):
    alone = finished(tmp_path / "one", seconds=12.0, losses=[3.0, 2.0])
    both = finished(tmp_path / "two", seconds=8.0, losses=[3.0, 2.25], weight=1.5)
    row = scaling.compare("two processes", both, alone)
    assert (row["speedup"], row["efficiency"]) == (1.5, 0.75)
    assert (row["loss_difference"], row["weight_difference"]) == (0.25, 0.5)
    assert scaling.compare("one process", alone, alone)["efficiency"] == 1


def test_a_run_that_did_not_end_or_made_other_updates_is_not_the_same(tmp_path):
    whole = finished(tmp_path / "whole", seconds=1, losses=[3.0, 2.0])
    shorter = finished(tmp_path / "shorter", seconds=1, losses=[3.0])
    for other in (shorter.folder, tmp_path / "none"):
        assert survival.differences(other, whole.folder) == (float("inf"), float("inf"))


def test_updates_that_were_trained_twice_are_counted_from_what_was_printed(tmp_path):
    run = survival.Run(tmp_path, 60)
    run.logs = [tmp_path / "a", tmp_path / "b"]
    run.logs[1].touch()
    run.logs[0].write_text(
        "0/60 [\r 36/60 [00:03<\r 37/60 [\n--resume: continuing after run.partial/checkpoint-30\r31/60 ["
    )
    assert run.trained_twice() == 7 and run.last_seen() == 37
    run.logs[1].write_text("--resume: continuing after run.partial/checkpoint-31\r32/60 [")
    assert run.trained_twice() == 7  # nothing was lost the second time
    run.logs[1].write_text("--resume: nothing yet; starting\r32/60 [")
    assert run.trained_twice() == 7 + 31  # and here all of it


def test_what_scaling_and_survival_refuse(tmp_path):
    with pytest.raises(StoneyError, match="a multiple of 8"):
        scaling.main(["--global_batch_size", "12"])
    with pytest.raises(StoneyError, match="--model nowhere: not there"):
        scaling.main(["--model", "nowhere"])
    with pytest.raises(StoneyError, match="give more than 46"):
        survival.main(["--steps", "40"])
