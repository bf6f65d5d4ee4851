"""COMET through its worker: the protocol against stub workers, the scores against COMET itself.

The real ones need the COMET environment and are skipped without it: `make comet`, then `pytest tests/test_comet.py`
(about a minute; `-m "not slow"` leaves them out). They build small checkpoints with random weights, in comet_checkpoint.py.
All words of the language are invented.
"""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import hub_stub
import pytest

from stoney_rl.errors import StoneyError
from stoney_rl.metrics import comet
from stoney_rl.metrics.comet import PYTHON, WORKER, CometScorer
from stoney_rl.rewards.similarity import comet_similarity

ROOT = Path(__file__).resolve().parents[1]
HUB_ID = "Unbabel/wmt22-comet-da"
SLEEP = "time.sleep(60)"
HELLO = {
    "protocol": comet.PROTOCOL,
    "comet": comet.COMET_VERSION,
    "model": HUB_ID,
    "sha256": "0123456789abcdef" * 4,
    "references": "required",
    "device": "cpu",
}
# A worker that writes down its process id and what it is sent. It scores by length: 1 for a letter of the source, 100 of
# the hypothesis, 10000 of the reference.
STUB = """#!{python}
import json, os, signal, sys, time
here = os.path.dirname(os.path.abspath(__file__))
open(os.path.join(here, "pid"), "w").write(str(os.getpid()))
def say(message):
    print(message if isinstance(message, str) else json.dumps(message), flush=True)
{start}
say({hello!r})
for line in sys.stdin:
    open(os.path.join(here, "received"), "a").write(line)
    request = json.loads(line)
    columns = [request["sources"], request["hypotheses"], request["references"] or [""] * len(request["sources"])]
    scores = [float(len(s) + 100 * len(h) + 10000 * len(r)) for s, h, r in zip(*columns)]
    answer = {{"id": request["id"], "scores": scores}}
    {fault}
    say(answer)
open(os.path.join(here, "ended"), "w").write("by itself")
"""


@pytest.fixture
def stub(tmp_path):
    """Makes a worker that stands in for the COMET environment's python, whatever its arguments."""

    def make(fault: str = "", start: str = "", **hello: object) -> Path:
        path = tmp_path / "python"
        path.write_text(STUB.format(python=sys.executable, start=start, hello={**HELLO, **hello}, fault=fault))
        path.chmod(0o755)
        return path

    return make


def received(python: Path) -> list[dict]:
    path = python.with_name("received")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_gone(python: Path) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(int(python.with_name("pid").read_text()), 0)


# -- the client, against stubs


def test_every_row_gets_the_score_of_its_own_three_texts(stub):
    python = stub()
    sources = ["s" * (1 + row % 7) for row in range(300)]
    hypotheses = ["h" * (row % 11) for row in range(300)]
    references = ["r" * (1 + row % 5) for row in range(300)]
    with CometScorer(HUB_ID, python=python, batch_size=4) as scorer:
        scores = scorer.score(sources, hypotheses, references)
        again = scorer.score(sources[:1], hypotheses[:1], references[:1])
    assert scores == [(1 + row % 7) + 100 * (row % 11) + 10000 * (1 + row % 5) for row in range(300)]
    assert again == scores[:1]
    requests = received(python)  # all of one process: a second one would have ended this one's file of requests
    assert [(request["id"], len(request["sources"])) for request in requests] == [(1, 128), (2, 128), (3, 44), (4, 1)]
    assert {request["batch"] for request in requests} == {4}


def test_texts_are_normalised(stub):
    python = stub()
    with CometScorer(HUB_ID, python=python) as scorer:
        scorer.score(["it’s"], [unicodedata.normalize("NFD", "ṯâ ẖî")], [" ṯâ\u200b "])
    (request,) = received(python)
    assert [request[name] for name in ("sources", "hypotheses", "references")] == [["it's"], ["ṯâ ẖî"], ["ṯâ"]]


@pytest.mark.parametrize(
    ("use", "references", "sent"),
    [
        ("required", ["r"], ["r"]),
        ("optional", ["r"], ["r"]),
        ("optional", None, None),
        ("unused", ["r"], None),
        ("unused", None, None),
    ],
)
def test_references_go_to_the_models_that_use_them(stub, use, references, sent):
    python = stub(references=use)
    with CometScorer(HUB_ID, python=python) as scorer:
        scorer.score(["s"], ["h"], references)
        assert scorer.references == use
    assert received(python)[0]["references"] == sent


def test_lists_that_do_not_fit_are_not_sent(stub):
    python = stub()
    with CometScorer(HUB_ID, python=python) as scorer:
        for columns, message in [
            ((["s"], ["h"], None), "got none"),
            ((["s", "s"], ["h"], ["r"]), "2 sources but 1 hypotheses"),
            ((["s"], ["h"], ["r", "r"]), "1 predictions but 2 references"),
            ((["s"], ["h"], [" "]), r"references\[0\] is empty"),
            (("s", "h", "r"), "expected a list of strings"),
            (([], [], []), "the list is empty"),
        ]:
            with pytest.raises(StoneyError, match=message):
                scorer.score(*columns)
        assert scorer.score(["s"], ["h"], ["r"]) == [10101.0]
    assert len(received(python)) == 1


def test_signature(stub):
    with CometScorer(HUB_ID, python=stub()) as scorer:
        assert scorer.signature == (
            "COMET|version:2.2.7|model:Unbabel/wmt22-comet-da|sha256:0123456789abcdef|refs:required|norm:nfc+apostrophe"
        )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", r"was killed \(SIGKILL\); was there memory enough\?"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"was killed \(SIGSEGV\)$"),
        ("sys.stderr.write('chatter\\nout of luck\\n'); sys.exit(3)", "ended with exit code 3: out of luck$"),
        ("sys.stdout.write('{'); sys.exit(0)", "ended with exit code 0$"),
        ("answer = 'Predicting: 100%'", "wrote 'Predicting: 100%.n' where a JSON object was expected"),
        ("answer = '[1.0]'", "where a JSON object was expected"),
        ("os.write(1, b'\\xff\\xfe\\n')", "where a JSON object was expected"),
        ("answer['id'] += 1", "answered request 2 where it was sent 1"),
        ("answer['scores'].append(0.5)", "gave something else than 1 scores for 1 rows"),
        ("del answer['scores']", "gave something else than 1 scores for 1 rows"),
        ("answer['scores'] = [float('nan')]", "gave nan as a score, for 'h'"),
        ("answer['scores'] = ['0.5']", "gave '0.5' as a score"),
        ("answer['scores'] = [None]", "gave None as a score"),
    ],
)
def test_a_worker_that_fails_is_one_line_and_is_ended(stub, fault, message):
    python = stub(fault)
    with CometScorer(HUB_ID, python=python) as scorer:
        with pytest.raises(StoneyError, match=message) as raised:
            scorer.score(["s"], ["h"], ["r"])
        assert str(raised.value).startswith(f"COMET {HUB_ID}: the worker ") and "\n" not in str(raised.value)
        assert_gone(python)
        with pytest.raises(StoneyError, match="the worker has ended"):
            scorer.score(["s"], ["h"], ["r"])


def test_a_worker_that_died_between_two_requests(stub):
    python = stub()
    with CometScorer(HUB_ID, python=python) as scorer:
        scorer.score(["s"], ["h"], ["r"])
        os.kill(int(python.with_name("pid").read_text()), 9)
        with pytest.raises(StoneyError, match="was killed"):
            scorer.score(["s"], ["h" * 1_000_000], ["r"])


@pytest.mark.parametrize(
    ("fault", "start", "text"),
    [
        (SLEEP, "", "h"),
        ("os.system('sleep 60')", "", "h"),  # a child that holds the pipe open
        ("while True: sys.stdout.write('x')", "", "h"),
        ("", SLEEP, "h"),
        ("", f"say({HELLO!r}); {SLEEP}", "h" * 1_000_000),  # more than a pipe takes, and nobody reads it
    ],
)
def test_a_worker_that_hangs(stub, fault, start, text):
    python = stub(fault, start)
    timeouts = {"start_timeout": 0.5, "timeout": 60} if start == SLEEP else {"start_timeout": 60, "timeout": 0.5}
    with (
        pytest.raises(StoneyError, match="gave no answer for 0.5 s; set a longer (start_)?timeout"),
        CometScorer(HUB_ID, python=python, **timeouts) as scorer,
    ):
        began = time.monotonic()
        scorer.score(["s"], [text], ["r"])
    assert start == SLEEP or time.monotonic() - began < 5
    assert_gone(python)


def test_a_request_that_fails_leaves_the_worker_alive(stub):
    python = stub("if request['id'] == 1: answer = {'id': 1, 'error': 'OutOfMemoryError: CUDA out of memory'}")
    with CometScorer(HUB_ID, python=python) as scorer:
        with pytest.raises(StoneyError, match=f"^COMET {HUB_ID}: OutOfMemoryError: CUDA out of memory$"):
            scorer.score(["s"], ["h"], ["r"])
        assert scorer.score(["s"], ["h"], ["r"]) == [10101.0]


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        ({"protocol": 2}, "speaks protocol 2, not 1"),
        ({"comet": "2.1.0"}, "has unbabel-comet 2.1.0, whose scores may differ; 2.2.7 comes with: make comet"),
        ({"error": "gated: accept its terms"}, f"^COMET {HUB_ID}: gated: accept its terms$"),
        ({"references": "maybe"}, "did not say how it uses references"),
        ({"sha256": None}, "or which weights it has"),
    ],
)
def test_a_worker_that_is_not_the_one_expected(stub, hello, message):
    python = stub(**hello)
    with pytest.raises(StoneyError, match=message), CometScorer(HUB_ID, python=python):
        pass
    assert_gone(python)


def test_a_worker_that_can_not_start(stub):
    python = stub(start="raise ImportError('no numpy')")
    with (
        pytest.raises(StoneyError, match="ended with exit code 1: ImportError: no numpy"),
        CometScorer(HUB_ID, python=python),
    ):
        pass


def test_the_worker_ends_by_itself_with_the_block(stub):
    python = stub()
    with CometScorer(HUB_ID, python=python):
        pass
    assert python.with_name("ended").read_text() == "by itself"
    assert_gone(python)


def test_an_exception_in_the_block_ends_the_worker_at_once_and_passes(stub):
    python = stub()
    with pytest.raises(KeyboardInterrupt), CometScorer(HUB_ID, python=python):
        raise KeyboardInterrupt
    assert not python.with_name("ended").exists()
    assert_gone(python)


def test_without_the_environment(tmp_path):
    with pytest.raises(StoneyError, match=f"{tmp_path}/none.*make comet"):
        CometScorer(HUB_ID, python=tmp_path / "none")
    with (
        pytest.raises(StoneyError, match=f"{tmp_path} can't be run .*make comet"),
        CometScorer(HUB_ID, python=tmp_path),
    ):
        pass


def test_models_that_are_not_there(stub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "bare/checkpoints"):
        Path(folder).mkdir(parents=True)
    Path("bare/checkpoints/model.ckpt").touch()
    python = stub()
    for model, message in [
        ("empty", "no checkpoints/model.ckpt in it"),
        ("bare", f"no {tmp_path}/bare/hparams.yaml"),
        ("bare/checkpoints/model.ckpt", f"no {tmp_path}/bare/hparams.yaml"),
        ("bare/checkpoints/modle.ckpt", "no such file or folder"),
        ("wmt22-comet-da", "a hub id such as Unbabel/wmt22-comet-da"),
    ]:
        with pytest.raises(StoneyError, match=f"^COMET {model}: .*{message}"):
            CometScorer(model, python=python)
    Path("bare/hparams.yaml").touch()
    assert comet.find_checkpoint("bare") == comet.find_checkpoint("bare/checkpoints/model.ckpt")
    assert comet.find_checkpoint("bare") == f"{tmp_path}/bare/checkpoints/model.ckpt"
    assert comet.find_checkpoint(HUB_ID) == HUB_ID


# -- R_sem


class Scripted:
    """A scorer that says what it is told, and keeps what it was asked."""

    def __init__(self, *scores: float) -> None:
        self.scores, self.asked = list(scores), []

    def score(self, *columns: list[str]) -> list[float]:
        self.asked.append(columns)
        return self.scores


def test_similarity_is_cut_to_the_range_of_a_reward_and_silence_earns_nothing():
    scorer = Scripted(1.2, 0.25, -0.5)
    values = comet_similarity(scorer)(
        ["q1", "q2", "q3", "q4", "q5"], ["a1", "", "a3", "\u200b ", "a5"], ["r1", "r2", "r3", "r4", "r5"]
    )
    assert values == [1.0, 0.0, 0.25, 0.0, 0.0]
    assert scorer.asked == [(["q1", "q3", "q5"], ["a1", "a3", "a5"], ["r1", "r3", "r5"])]


def test_similarity_of_silence_alone_asks_nothing():
    scorer = Scripted()
    assert comet_similarity(scorer)(["q"], [" "], ["r"]) == [0.0]
    assert scorer.asked == []


# -- what the two sides and the pins say of each other


def test_the_two_sides_agree_and_share_no_code():
    tree = ast.parse(WORKER.read_text(encoding="utf-8"))
    (protocol,) = [
        node.value.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "PROTOCOL"
    ]
    assert protocol == comet.PROTOCOL
    modules = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert not [name for name in modules if name.startswith("stoney_rl")]
    documented = (WORKER.parent / "COMET.md").read_text(encoding="utf-8")
    assert f'"protocol": {comet.PROTOCOL}' in documented and comet.COMET_VERSION in documented


def test_the_environment_is_pinned_exactly():
    lines = (ROOT / "requirements-comet.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9._-]+==[\w.]+( ; .+)?", pin) for pin in pins)
    assert {f"unbabel-comet=={comet.COMET_VERSION}", "sentencepiece==0.2.1", "setuptools==80.10.2"} <= set(pins)
    # The same torch as the rest of the project, and no CUDA packages beside a CPU build of it.
    assert set(pins) & set((ROOT / "requirements.txt").read_text(encoding="utf-8").split()) >= {"torch==2.13.0"}
    assert not [pin for pin in pins if pin.startswith(("nvidia", "cuda", "triton"))]
    made = subprocess.run(
        ["make", "-n", "-W", "requirements-comet.txt", "comet", "TORCH_INDEX=INDEX"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "-r requirements-comet.txt" in made and "--index-url INDEX -c requirements-comet.txt torch" in made


def test_only_answers_reach_the_workers_output():
    code = (
        f"import runpy, os, sys; worker = runpy.run_path({str(WORKER)!r}); requests, answers = worker['take_pipes']();"
        "print('noise'); sys.stdout.flush(); os.system('echo more noise; cat'); sys.stdin.read();"
        "answers.write(requests.read().upper()); answers.flush()"
    )
    done = subprocess.run([sys.executable, "-c", code], input="request\n", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "REQUEST\n", "noise\nmore noise\n")


# -- COMET itself

real = pytest.mark.skipif(not os.access(PYTHON, os.X_OK), reason="no COMET environment here: make comet")
TEXTS = {
    "sources": [
        'What is the form for "they arrive", if the invented verb "pîlali" means "to arrive"?',
        'What is the form for "you paddle"?',
        "How is it said?",
        'Translate "to labor".',
        "And then?",
    ],
    "hypotheses": ['"pîlaliṯel".', "vuẖkûlale", "", "nîlawiṯul nîlawi", "The form is kûlale, I think. " * 12],
    "references": ['The form is "pîlaliṯel".', '"vuẖkûlale".', "It is said so.", '"nîlawi".', '"kûlale"'],
}
SWAPS = {
    "regression": [("sources", "hypotheses"), ("sources", "references"), ("hypotheses", "references")],
    "kiwi": [("sources", "hypotheses")],
    "unified": [("sources", "hypotheses"), ("sources", "references"), ("hypotheses", "references")],
}
CLOSE = 1e-4  # scores of these checkpoints go from about -5 to 5; padding to another length changes their sixth digit


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """The folder that tests/comet_checkpoint.py fills."""
    folder = tmp_path_factory.mktemp("comet")
    subprocess.run(
        [PYTHON, "-I", ROOT / "tests" / "comet_checkpoint.py", folder],
        input=json.dumps(TEXTS), text=True, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def oracle(checkpoints):
    return json.loads((checkpoints / "oracle.json").read_text(encoding="utf-8"))


@real
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["regression", "kiwi", "unified"])
def test_scores_are_comets_own(checkpoints, oracle, kind):
    with CometScorer(str(checkpoints / kind), batch_size=2) as scorer:
        assert scorer.score(**TEXTS) == pytest.approx(oracle[kind], abs=CLOSE)
        assert scorer.references == {"regression": "required", "kiwi": "unused", "unified": "optional"}[kind]
        if kind != "regression":
            bare = oracle["kiwi" if kind == "kiwi" else "unified, no reference"]
            assert scorer.score(TEXTS["sources"], TEXTS["hypotheses"]) == pytest.approx(bare, abs=CLOSE)
        # A text in another's place is another score, so that the oracle tells which is which.
        for one, other in SWAPS[kind]:
            swapped = {**TEXTS, one: TEXTS[other], other: TEXTS[one]}
            swapped["references"] = [text or "nothing" for text in swapped["references"]]
            wrong = scorer.score(**swapped)
            assert all(abs(score - right) > 100 * CLOSE for score, right in zip(wrong[:2], oracle[kind], strict=False))
        rewards = comet_similarity(scorer)(*TEXTS.values())
    expected = [min(1, max(0, score)) for score in oracle[kind]]
    expected[TEXTS["hypotheses"].index("")] = 0.0
    assert rewards == pytest.approx(expected, abs=CLOSE)


@real
@pytest.mark.slow
def test_the_worker_by_hand_answers_bad_requests_and_ends_with_its_input(checkpoints):
    path = checkpoints / "regression" / "checkpoints" / "model.ckpt"
    good = {"id": 7, **TEXTS, "batch": 8}
    lines = ["no json", json.dumps({"id": 5}), json.dumps({**good, "id": 6, "sources": ["s"]}), json.dumps(good)]
    done = subprocess.run(
        [PYTHON, "-I", WORKER, "--model", path], input="\n".join(lines), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0
    hello, *answers = map(json.loads, done.stdout.splitlines())
    assert (hello["protocol"], hello["comet"], hello["references"]) == (comet.PROTOCOL, comet.COMET_VERSION, "required")
    assert [answer["id"] for answer in answers] == [None, 5, 6, 7]
    assert ["error" in answer for answer in answers] == [True, True, True, False]
    assert len(answers[3]["scores"]) == len(TEXTS["sources"])


LOAD = """
import json, os, runpy, sys
worker = runpy.run_path(sys.argv[1])
_, answers = worker["take_pipes"]()
for name in sys.argv[2:]:
    try:
        told = worker["load"](name)[1]
    except Exception as error:
        told = {"error": worker["one_line"](error)}
    answers.write(json.dumps(told) + "\\n")
"""


def load(names: list[object], env: dict[str, str]) -> list[dict]:
    done = subprocess.run(
        [PYTHON, "-I", "-c", LOAD, WORKER, *names], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


class ModelHandler(hub_stub._Handler):
    """The hub's address of a model's file has no kind in front, where the stand-in, made for datasets, expects one."""

    def do_GET(self) -> None:
        if not self.path.startswith("/api/"):
            self.path = "/models" + self.path
        super().do_GET()


@real
@pytest.mark.slow
def test_models_of_the_hub_and_models_that_can_not_be_loaded(checkpoints, tmp_path):
    content = (checkpoints / "regression" / "checkpoints" / "model.ckpt").read_bytes()
    repository = {
        "checkpoints/model.ckpt": content,
        "hparams.yaml": (checkpoints / "regression" / "hparams.yaml").read_bytes(),
    }
    damaged = {
        "torn": content[: len(content) // 2],
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 2323\n",
        "empty": b"",
    }
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
    names = ["owner/comet", "owner/gated", "owner/other", "owner/none"]
    files = [tmp_path / name for name in damaged]
    files += [checkpoints / kind / "checkpoints" / "model.ckpt" for kind in ("partial", "headless")]
    with hub_stub.serve({names[0]: repository, names[1]: repository, names[2]: {"config.json": b"{}"}}) as hub:
        hub.RequestHandlerClass = ModelHandler
        hub.faults["owner/gated"] = hub_stub.Fault(
            "all", status=403, code="GatedRepo", message="Access to model is restricted"
        )
        env = hub_stub.environment(tmp_path / "home", hub.url)
        found, *refused = load([*names, *files], env)
        hub.asked.clear()
        cached, unknown = load(["owner/comet", "owner/gated"], {**env, "HF_HUB_OFFLINE": "1"})
        assert hub.asked == []
    assert "error" not in found, found
    assert found["sha256"] == hashlib.sha256(content).hexdigest() and found["model"] == "owner/comet"
    assert cached == found
    assert unknown == {"error": "not in the hub's cache, and HF_HUB_OFFLINE forbids to download it"}
    expected = [
        f"^gated: accept its terms at {hub.url}/owner/gated and set HF_TOKEN",
        "^not a COMET model, or only half of it is in the cache: no checkpoints/model.ckpt in",
        f"^not on the hub, or private: look at {hub.url}/owner/none",
        "torn is no COMET checkpoint, or damaged",
        "pointer is no COMET checkpoint, or damaged",
        "empty is no COMET checkpoint, or damaged",
        "partial/checkpoints/model.ckpt lacks 4 of the model's weights",
        "^the tokenizer and configuration of its encoder, pretrained_model in .*headless/hparams.yaml, can't be loaded",
    ]
    for message, answer in zip(expected, refused, strict=True):
        assert re.search(message, answer["error"]), answer
