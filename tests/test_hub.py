"""Rows from the hub: the real huggingface_hub code against a server of the tests' own (``hub_stub``).

``load_in_process`` has a patience of one second and two tries; by default it is ten seconds and four.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stub import LATER, SHA, TOKEN, Fault, environment, load_in_process, serve

QA = b'{"question": "Q1", "answer": "A1", "pair_id": 1}\n{"question": 1, "answer": "x"}\n'
REPOSITORIES = {
    "owner/mixed": {
        "README.md": b"# rows",
        "qa.jsonl": QA,
        "data/test-00000-of-00001.json": b'[{"messages": [{"role": "user", "content": "Q2"}, '
        b'{"role": "assistant", "content": "A2"}]}]',
    },
    "owner/nothing": {"README.md": b"# no rows"},
    "owner/one": {"rows.jsonl": b'{"question": "Q", "answer": "A"}\n' * 50},
    "owner/private": {"rows.jsonl": b'{"question": "Q", "answer": "A"}\n'},
}
# The columns of the project's dataset on the hub: two files that were written by two programs.
TWO_SCHEMAS = {
    "a_messages.jsonl": b"".join(
        json.dumps(
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": f"What does 'mîva{n}' mean?"},
                    {"role": "assistant", "content": f"Word {n} (invented)."},
                ]
            },
            ensure_ascii=False,
        ).encode()
        + b"\n"
        for n in range(30)
    ),
    "b_qa.jsonl": b"".join(
        json.dumps(
            {
                "question": f"What is 'tâlo{n}'?",
                "answer": f"Word {n} (invented).",
                "source_language": "stoney",
                "generated_at": "2024-12-01T00:00:00",
                "pair_id": n,
            },
            ensure_ascii=False,
        ).encode()
        + b"\n"
        for n in range(40)
    ),
}
NO_COPY = "and there is no cached copy; try again with a connection, or give a local file or folder"
GONE = "http://127.0.0.1:9"


@pytest.fixture
def hub():
    with serve(REPOSITORIES) as server:
        yield server


def leftovers(home: Path) -> list[str]:
    """What a download left in the cache that is not whole, or is not to be found by its name."""
    names = [path for path in home.rglob("*") if path.name.endswith(".incomplete")]
    blobs = [path for path in home.rglob("blobs/*") if path.is_file()]
    named = {path.resolve() for path in home.rglob("snapshots/**/*") if path.is_file()}
    return sorted(
        str(path.relative_to(home)) for path in [*names, *(blob for blob in blobs if blob.resolve() not in named)]
    )


def test_download_and_cache(tmp_path, hub):
    everything, by_revision, split, address = load_in_process(
        tmp_path,
        hub.url,
        {"source": "owner/mixed"},
        {"source": "owner/mixed", "revision": SHA},
        {"source": "owner/mixed", "split": "test"},
        {"source": "https://huggingface.co/datasets/owner/mixed"},
    )
    assert everything["questions"] == ["Q2", "Q1"]
    assert everything["sources"] == ["data/test-00000-of-00001.json:1", "qa.jsonl:1"]
    assert everything["bad"] == [2]
    assert everything["revision"] == SHA
    assert everything["notes"] == []
    assert by_revision["questions"] == address["questions"] == everything["questions"]
    assert split["questions"] == ["Q2"]
    assert not any("README" in request for request in hub.asked)

    # Without the hub, the cached copy is used and said to be one.
    cached, other = load_in_process(tmp_path, GONE, {"source": "owner/mixed"}, {"source": "owner/other"})
    assert cached["questions"] == ["Q2", "Q1"]
    assert cached["notes"] == [f"owner/mixed: the hub can't be reached; this is the cached copy of commit {SHA[:12]}."]
    assert cached["notes"][0][:-1] in cached["stderr"]
    assert other["error"] == f"owner/other: the hub can't be reached, {NO_COPY}"
    assert max(cached["seconds"], other["seconds"]) < 10

    offline, absent = load_in_process(
        tmp_path, hub.url, {"source": "owner/mixed"}, {"source": "owner/one"}, HF_HUB_OFFLINE="1"
    )
    assert offline["questions"] == ["Q2", "Q1"]
    assert "HF_HUB_OFFLINE is set; this is the cached copy" in offline["notes"][0]
    assert absent["error"] == f"owner/one: HF_HUB_OFFLINE is set, {NO_COPY}"

    # A cached copy that lacks a file is not passed off as the data.
    next(tmp_path.rglob("qa.jsonl")).unlink()
    (partial,) = load_in_process(tmp_path, GONE, {"source": "owner/mixed"})
    assert "the cached copy lacks some of its files" in partial["error"]


def test_refusals(tmp_path, hub):
    hub.repositories |= {"owner/closed": hub.repositories["owner/one"], "owner/terms": hub.repositories["owner/one"]}
    hub.repositories |= {"owner/down": hub.repositories["owner/one"], "owner/files": hub.repositories["owner/one"]}
    hub.faults["owner/closed"] = Fault("all", status=401, code="GatedRepo", message="Access is restricted.")
    hub.faults["owner/terms"] = Fault("head", status=403, code="GatedRepo", message="Access is restricted.")
    hub.faults["owner/files"] = Fault("head", status=403, message="Forbidden")
    hub.faults["owner/down"] = Fault("all", status=503)
    hub.private.add("owner/private")
    results = load_in_process(
        tmp_path,
        hub.url,
        {"source": "owner/closed"},
        {"source": "owner/terms"},
        {"source": "owner/files"},
        {"source": "owner/missing"},
        {"source": "owner/private"},
        {"source": "HarleyCooper/synthetic_stony_data"},
        {"source": "owner/mixed", "revision": "v9"},
        {"source": "owner/nothing"},
        {"source": "owner/down"},
        {"source": "owner/a--b"},
    )
    closed, terms, files, missing, private, near, revision, nothing, down, odd = (each["error"] for each in results)
    for gated, name in ((closed, "owner/closed"), (terms, "owner/terms")):
        assert gated.startswith(f"{name} is gated: accept its terms at https://huggingface.co/datasets/{name}")
        assert "hf auth login" in gated
    assert files.startswith("owner/files: the hub refused access (403): log in with 'hf auth login' or set HF_TOKEN")
    for absent, name in ((missing, "owner/missing"), (private, "owner/private")):
        assert absent.startswith(f"{name} is not on the Hugging Face hub, or is private: check the spelling;")
    assert "near it: HarleyCooper/synthetic_stoney_data" in near
    assert revision.startswith("owner/mixed has no revision 'v9'; give a branch, tag or commit that it has")
    assert nothing.startswith("owner/nothing holds no data file")
    assert down == f"owner/down: the hub answered with status 503, {NO_COPY}"
    assert odd.startswith("owner/a--b is neither a local path nor a valid hub id")
    assert max(each["seconds"] for each in results) < 10
    assert leftovers(tmp_path) == []


def test_tokens(tmp_path, hub):
    hub.private.add("owner/private")
    (right,) = load_in_process(tmp_path / "right", hub.url, {"source": "owner/private"}, HF_TOKEN=TOKEN)
    assert right["questions"] == ["Q"]
    wrong, other = load_in_process(
        tmp_path / "wrong", hub.url, {"source": "owner/private"}, {"source": "owner/one"}, HF_TOKEN="hf_wrong"
    )
    for result, name in ((wrong, "owner/private"), (other, "owner/one")):
        assert result["error"] == (
            f"{name}: the hub refused access (401): log in with 'hf auth login' or set HF_TOKEN to a token that may "
            "read it"
        )
        assert result["seconds"] < 10


def test_revisions_and_splits(tmp_path, hub):
    hub.repositories["owner/mixed"][LATER] = {"train.jsonl": b'{"question": "Q3", "answer": "A3"}\n'}
    hub.branches["owner/mixed", "next"] = LATER
    main, branch, commit, split, absent = load_in_process(
        tmp_path,
        hub.url,
        {"source": "owner/mixed"},
        {"source": "owner/mixed", "revision": "next"},
        {"source": "owner/mixed", "revision": LATER},
        {"source": "owner/mixed", "revision": "next", "split": "train"},
        {"source": "owner/mixed", "revision": "next", "split": "test"},
    )
    assert (main["questions"], main["revision"]) == (["Q2", "Q1"], SHA)
    for result in (branch, commit, split):
        assert (result["questions"], result["revision"]) == (["Q3"], LATER)
    assert absent["error"].startswith("owner/mixed has no split 'test': it has train; name one that exists")
    # Each name keeps its own copy.
    calls = [{"source": "owner/mixed"}, *({"source": "owner/mixed", "revision": name} for name in ("next", LATER, SHA))]
    main, branch, commit, first = load_in_process(tmp_path, GONE, *calls)
    assert [result["revision"] for result in (main, branch, commit, first)] == [SHA, LATER, LATER, SHA]
    (other,) = load_in_process(tmp_path, GONE, {"source": "owner/mixed", "revision": "v9"})
    assert other["error"] == f"owner/mixed at revision 'v9': the hub can't be reached, {NO_COPY}"


def test_files_with_different_columns(tmp_path, hub):
    """The failure that ended the first attempt: load_dataset takes the columns of the first file for those of all."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for name, content in TWO_SCHEMAS.items():
        (folder / name).write_bytes(content)
    code = """
import datasets, sys
try:
    datasets.load_dataset(sys.argv[1])
except datasets.exceptions.DatasetGenerationError as error:  # DatasetGenerationCastError, which older ones raise, is one
    print(repr(error), repr(error.__cause__))
"""
    refused = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=environment(tmp_path / "datasets", GONE, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1"),
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 0, refused.stderr
    assert refused.stdout.startswith("DatasetGeneration")
    assert "generated_at" in refused.stdout
    assert "column names don't match" in refused.stdout

    hub.repositories["owner/two"] = {SHA: TWO_SCHEMAS}
    here, there = load_in_process(tmp_path / "home", hub.url, {"source": str(folder)}, {"source": "owner/two"})
    for result in (here, there):
        expected = [f"What does 'mîva{n}' mean?" for n in range(30)] + [f"What is 'tâlo{n}'?" for n in range(40)]
        assert result["questions"] == expected
        assert result["bad"] == []
        assert result["metadata"][0] == {"system": "Be brief."}
        assert result["metadata"][30] == {
            "source_language": "stoney",
            "generated_at": "2024-12-01T00:00:00",
            "pair_id": 0,
        }


def test_a_slow_hub_is_waited_for(tmp_path, hub):
    """The file takes three seconds, and the patience is one: it is for each piece, not for the file."""
    hub.faults["owner/one"] = Fault("file", pause=0.25, pieces=12)
    (result,) = load_in_process(tmp_path, hub.url, {"source": "owner/one"})
    assert len(result["questions"]) == 50
    assert result["notes"] == []
    assert result["seconds"] > 2.5


@pytest.mark.parametrize("fault", ["info", "tree", "head", "file", "half of the file"])
def test_a_hub_that_falls_silent_is_given_up(tmp_path, hub, fault):
    """Left to itself huggingface_hub waits for the list of files, among others, without limit."""
    stall = fault.startswith("half")
    hub.faults["owner/one"] = Fault("file" if stall else fault, silent=not stall, stall=stall)
    (result,) = load_in_process(tmp_path, hub.url, {"source": "owner/one"})
    what = "did not answer within 1 seconds" if fault == "info" else "broke off or did not answer 2 times"
    assert result["error"] == f"owner/one: the hub {what}, {NO_COPY}"
    assert result["seconds"] < 15  # two tries of a second, pauses of one and two
    assert leftovers(tmp_path) == []


# 21 MiB: huggingface_hub writes pieces of 10 MiB, and counts its tries anew after each.
LARGE = {"rows.jsonl": (b'{"question": "Q", "answer": "' + b"a" * 2**20 + b'"}\n') * 21}


@pytest.mark.parametrize("ranges", [False, True])
@pytest.mark.parametrize("size", ["small", "large"])
def test_a_hub_that_breaks_off(tmp_path, hub, size, ranges):
    name = "owner/one" if size == "small" else "owner/large"
    hub.repositories["owner/large"] = {SHA: LARGE}
    hub.faults[name] = Fault("file", cut=True, ranges=ranges)
    (result,) = load_in_process(tmp_path, hub.url, {"source": name})
    assert result["error"] == f"{name}: the hub broke off or did not answer 2 times, {NO_COPY}"
    assert result["seconds"] < 20
    assert leftovers(tmp_path) == []
    # What came is not taken for the file: not without the hub, and not with it.
    (offline,) = load_in_process(tmp_path, GONE, {"source": name})
    assert offline["error"] == f"{name}: the hub can't be reached, {NO_COPY}"
    del hub.faults[name]
    (healthy,) = load_in_process(tmp_path, hub.url, {"source": name})
    assert (len(healthy["questions"]), healthy["bad"], healthy["notes"]) == (50 if size == "small" else 21, [], [])


def test_a_hub_that_breaks_off_once(tmp_path, hub):
    hub.faults["owner/one"] = Fault("file", cut=True, times=1)
    (result,) = load_in_process(tmp_path, hub.url, {"source": "owner/one"})
    assert (len(result["questions"]), result["notes"]) == (50, [])


def test_a_hub_that_breaks_off_beside_a_cached_copy(tmp_path, hub):
    """The older commit stays what the branch stands for until all of the newer one is there."""
    load_in_process(tmp_path, hub.url, {"source": "owner/mixed"})
    newer = {**REPOSITORIES["owner/mixed"], "qa.jsonl": QA * 100, "more.jsonl": QA.replace(b"Q1", b"Q4")}
    hub.repositories["owner/mixed"][LATER] = newer
    hub.branches["owner/mixed", "main"] = LATER
    hub.faults["owner/mixed"] = Fault("file", cut=True)
    (result,) = load_in_process(tmp_path, hub.url, {"source": "owner/mixed"})
    note = f"owner/mixed: the hub broke off or did not answer 2 times; this is the cached copy of commit {SHA[:12]}."
    assert (result["questions"], result["revision"], result["notes"]) == (["Q2", "Q1"], SHA, [note])
    assert note[:-1] in result["stderr"]
    assert leftovers(tmp_path) == []
    (offline,) = load_in_process(tmp_path, GONE, {"source": "owner/mixed"})
    assert (offline["questions"], offline["revision"]) == (["Q2", "Q1"], SHA)
    del hub.faults["owner/mixed"]
    (healthy,) = load_in_process(tmp_path, hub.url, {"source": "owner/mixed"})
    assert (healthy["revision"], healthy["notes"]) == (LATER, [])
    assert healthy["questions"] == ["Q2", "Q4", *["Q1"] * 100]


@pytest.mark.parametrize("at", ["all", "info"])
@pytest.mark.parametrize("body", [b"<html>log in here</html>", b"[]", b"{}"])
def test_something_else_answers(tmp_path, hub, at, body):
    hub.faults["owner/one"] = Fault(at, body=body)
    (result,) = load_in_process(tmp_path, hub.url, {"source": "owner/one"})
    assert result["error"].startswith(
        "owner/one: what answered does not speak as the hub does (a network's login page?"
    )
    assert result["error"].endswith(NO_COPY)
    assert result["seconds"] < 10


def test_a_file_of_another_size_than_announced(tmp_path, hub):
    hub.faults["owner/one"] = Fault("file", body=b"<html>log in here</html>")
    (result,) = load_in_process(tmp_path, hub.url, {"source": "owner/one"})
    assert (
        "the download failed (Consistency check failed: file should be of size 1650 but has size 24" in result["error"]
    )
    assert "force_download" not in result["error"]
    assert leftovers(tmp_path) == []


def test_an_address_that_does_not_resolve(tmp_path):
    (result,) = load_in_process(tmp_path, "http://no-such-hub.invalid", {"source": "owner/one"})
    assert result["error"] == f"owner/one: the hub can't be reached, {NO_COPY}"
    assert result["seconds"] < 30


def test_the_limits_are_taken_back(monkeypatch):
    """Other downloads of the process, of a model for one, keep huggingface_hub's own patience."""
    from huggingface_hub import get_session

    from stoney_rl import data

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hooks = len(get_session().event_hooks["request"])
    with data._impatient_hub():
        assert len(get_session().event_hooks["request"]) == hooks + 1
    assert len(get_session().event_hooks["request"]) == hooks
    with pytest.raises(RuntimeError), data._impatient_hub():
        raise RuntimeError
    assert len(get_session().event_hooks["request"]) == hooks


def test_a_mistyped_local_path_that_looks_like_a_hub_id(tmp_path, hub):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "stoney.jsonl").write_bytes(QA)
    code = "from stoney_rl.data import load_rows\ntry:\n load_rows('data/stoney')\nexcept Exception as e: print(e)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(tmp_path / "home", hub.url),
        capture_output=True,
        text=True,
    )
    assert "nor is there a local file or folder of that name; near it: stoney.jsonl" in done.stdout
