"""The inspection stage from its command line: reports, prepared directories, exit codes. All words are invented."""

import json
import re
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import hub_stub
import pytest
import tiny

import inspect_hf_dataset
from stoney_rl import corpus, prepared
from stoney_rl.errors import StoneyError
from stoney_rl.planted import PlantedLanguage
from stoney_rl.planted_prose import prose_rows

MAX_LENGTH = 250  # tokens, which are bytes here: some rows are longer
REPOSITORY = Path(__file__).resolve().parent.parent
QUIET = ["--wandb_mode", "disabled", "--max_length", str(MAX_LENGTH)]
ROWS = 240
HINTED = 17  # gives its answer away
LEAK = "question_gives_answer"


def records() -> list[dict]:
    """Clean prose rows, then one fault of each of a few kinds at known lines."""
    rows, _ = prose_rows(PlantedLanguage(3, 80), ROWS, 3)
    found = [{"question": row.question, "answer": row.answer, "pair_id": n} for n, row in enumerate(rows)]
    found[HINTED]["question"] += f" Answer with these words: {found[HINTED]['answer']}"
    found.append(found[4] | {"pair_id": ROWS})  # an exact copy
    found.append({"question": "No answer here", "pair_id": ROWS + 1})
    found[9] = {key: unicodedata.normalize("NFD", str(value)) for key, value in found[9].items()}
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inspected(tmp_path_factory, source, tokenizer):
    """A prepared directory, and what its report says."""
    output = tmp_path_factory.mktemp("out") / "prepared"
    argv = ["--dataset", str(source), "--tokenizer", str(tokenizer), "--output_dir", str(output), *QUIET]
    assert inspect_hf_dataset.main(argv) == 0
    return output


def report_of(output):
    return json.loads((output / "report.json").read_text(encoding="utf-8"))


def findings_of(output) -> dict[str, list[str]]:
    """Finding -> the ids of its rows."""
    found: dict[str, list[str]] = {}
    for line in (output / "findings.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        found.setdefault(entry["kind"], []).append(entry["id"])
    return found


def test_the_planted_faults_are_found_and_nothing_else(inspected):
    found = findings_of(inspected)
    assert found["exact_duplicates"] == [f"rows-{ROWS}"]
    assert found[LEAK] == [f"rows-{HINTED}"]
    assert len(found["not_nfc"]) == 1
    failures = {entry["kind"] for entry in report_of(inspected)["findings"] if entry["severity"] == "failure"}
    assert failures == {"exact_duplicates", LEAK, "quarantined_rows", "cut_answers"}
    quarantine = [json.loads(line) for line in (inspected / "quarantine.jsonl").read_text().splitlines()]
    assert [(bad["source"], bad["line"]) for bad in quarantine] == [("rows.jsonl", ROWS + 2)]


def test_token_counts_are_those_of_the_bytes(inspected, source):
    """One token a byte, so the length of a row can be counted by hand: its texts, and 55 bytes and tokens of the format."""
    lengths = report_of(inspected)["sections"]["lengths"]
    rows = corpus.prepare(inspected).rowset.rows
    texts = [len(row.question.encode()) + len(row.answer.encode()) for row in rows]
    # <|im_start|>user\n ... <|im_end|>\n<|im_start|>assistant\n ... <|im_end|>: four special tokens, 5 + 1 + 10 bytes.
    assert lengths["tokens"]["total"] == sum(texts) + len(rows) * (4 + 5 + 1 + 10)
    assert lengths["tokens"]["rows_cut"] == sum(text + 20 > MAX_LENGTH for text in texts)
    assert lengths["answer"]["bytes"]["percentiles"]["100"] == max(len(row.answer.encode()) for row in rows)
    assert lengths["letters_split"].get("ẖ") == 3


def test_the_prepared_directory_is_the_contract(inspected):
    names = {path.relative_to(inspected).as_posix() for path in inspected.rglob("*") if path.is_file()}
    plots = {f"plots/{name}.png" for name in ("findings", "lengths", "words", "lexicon", "letters", "split")}
    assert names == plots | {
        *("train.parquet", "validation.parquet", "test.parquet", "dropped.jsonl", "certificate.json", "lexicon.jsonl"),
        *("quarantine.jsonl", "findings.jsonl", "report.json", "report.html", "report.txt", "stage.json"),
    }
    assert prepared.is_prepared(inspected)
    certificate = json.loads((inspected / "certificate.json").read_text())
    assert not any(certificate["overlaps"].values()) and certificate["counts"]["test"]["unseen"] > 10
    lexicon = [json.loads(line) for line in (inspected / "lexicon.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lexicon) == report_of(inspected)["sections"]["lexicon"]["forms"] > 100
    assert {"form", "gloss", "pos", "count", "sources"} <= lexicon[0].keys()


def test_the_page_needs_no_network_and_holds_everything(inspected):
    page = (inspected / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)|url\(|@import|fetch\(|XMLHttp", page)
    assert page.count("data:image/png;base64,") == 6
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert len(data) == report_of(inspected)["sections"]["lexicon"]["forms"]
    assert "question gives answer" in page


def test_a_row_can_not_write_into_the_page(tmp_path, tokenizer):
    rows = records()[:60]
    rows[3]["answer"] = 'The word "tâ</script><script>alert(1)</script>lo" means "to <b>gather</b>".'
    rows[3]["topic"] = "<img src=x onerror=alert(1)>"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    inspect_hf_dataset.main(
        ["--dataset", str(path), "--tokenizer", str(tokenizer), "--output_dir", str(tmp_path / "p"), *QUIET]
    )
    page = (tmp_path / "p" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "<img src=x" not in page and "<b>gather" not in page


def test_the_same_source_seed_and_arguments_give_the_same_bytes(tmp_path, inspected, source, tokenizer):
    output = tmp_path / "again"
    argv = ["--dataset", str(source), "--tokenizer", str(tokenizer), "--output_dir", str(output), *QUIET]
    assert inspect_hf_dataset.main(argv) == 0
    assert prepared.file_hashes(output) == prepared.file_hashes(inspected)
    first, second = (json.loads((folder / "stage.json").read_text()) for folder in (inspected, output))
    for stage in (first, second):
        for key in ("created", "command"):
            del stage[key]
        del stage["arguments"]["output_dir"], stage["identity"]["arguments"]["output_dir"]
        del stage["wandb"]
    assert first == second


def test_strict_fails_on_failures_that_are_not_allowed(inspected, source, tokenizer, capsys):
    argv = ["--dataset", str(source), "--tokenizer", str(tokenizer), "--output_dir", str(inspected), *QUIET]
    assert inspect_hf_dataset.main([*argv, "--strict"]) == 1
    assert "inspected with these settings already" in capsys.readouterr().out
    allowed = ["exact_duplicates", LEAK, "quarantined_rows", "cut_answers"]
    allow = [token for kind in allowed for token in ("--allow", kind)]
    assert inspect_hf_dataset.main([*argv, "--strict", *allow]) == 0
    assert inspect_hf_dataset.main([*argv, "--strict", *allow[2:]]) == 1
    assert inspect_hf_dataset.main(argv) == 0


def test_dropped_rows_are_in_no_split_and_in_the_quarantine(tmp_path, source, tokenizer):
    output = tmp_path / "prepared"
    argv = ["--dataset", str(source), "--tokenizer", str(tokenizer), "--output_dir", str(output), *QUIET]
    assert inspect_hf_dataset.main([*argv, "--drop", "exact_duplicates", "--drop", LEAK]) == 0
    made = corpus.prepare(output)
    ids = {row.id for row in made.rowset.rows}
    assert len(ids) == ROWS - 1 and not ids & {f"rows-{ROWS}", f"rows-{HINTED}"}
    quarantine = [json.loads(line) for line in (output / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {(bad["line"], bad["reason"].split(":")[0]) for bad in quarantine} == {
        (ROWS + 2, "missing column"),
        (ROWS + 1, "exact_duplicates"),
        (HINTED + 1, LEAK),
    }


def test_without_output_dir_there_is_a_report_and_no_rows(tmp_path, source, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--dataset", str(source), "--tokenizer", str(tokenizer), *QUIET]
    assert inspect_hf_dataset.main(argv) == 0
    output = tmp_path / "inspection" / inspect_hf_dataset.report_name(str(source))
    assert (output / "report.html").exists() and not list(output.glob("*.parquet"))
    assert not prepared.is_prepared(output)
    assert inspect_hf_dataset.main([*argv, "--max_length", "700"]) == 0  # a report of ours is replaced without asking
    assert report_of(output)["sections"]["lengths"]["max_length"] == 700


def test_a_prepared_directory_can_be_inspected_again(tmp_path, inspected, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inspect_hf_dataset.main(["--dataset", str(inspected), "--tokenizer", str(tokenizer), *QUIET]) == 0
    again = report_of(tmp_path / "inspection" / inspect_hf_dataset.report_name(str(inspected)))["sections"]
    before = report_of(inspected)["sections"]
    assert again["split"]["certificate"] == before["split"]["certificate"]
    assert again["lexicon"]["forms"] == before["lexicon"]["forms"]


def test_rows_that_can_not_be_split_are_reported_but_not_prepared(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in records()[:12]), encoding="utf-8")
    argv = ["--dataset", str(path), "--tokenizer", str(tokenizer), *QUIET]
    assert inspect_hf_dataset.main(argv) == 0
    found = report_of(tmp_path / "inspection" / inspect_hf_dataset.report_name(str(path)))["findings"]
    assert any(entry["kind"] == "no_split" and "too few" in entry["message"] for entry in found)
    with pytest.raises(StoneyError, match="12 rows are too few"):
        inspect_hf_dataset.main([*argv, "--output_dir", "prepared"])
    assert not (tmp_path / "prepared").exists()


def test_without_a_tokenizer_the_rest_is_reported(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inspect_hf_dataset, "DEFAULT_MODEL", "no/such-folder/here")
    assert inspect_hf_dataset.main(["--dataset", str(source), *QUIET]) == 0
    output = tmp_path / "inspection" / inspect_hf_dataset.report_name(str(source))
    assert report_of(output)["sections"]["lengths"]["tokens"] is None
    assert "name a tokenizer with --tokenizer" in " ".join((output / "report.txt").read_text().split())


def test_a_failure_leaves_nothing_behind(tmp_path, source, tokenizer, monkeypatch):
    from stoney_rl.inspection import plots

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots, "draw", fail)
    output = tmp_path / "prepared"
    with pytest.raises(OSError, match="No space"):
        inspect_hf_dataset.main(
            ["--dataset", str(source), "--tokenizer", str(tokenizer), "--output_dir", str(output), *QUIET]
        )
    assert list(tmp_path.iterdir()) == []


def test_every_problem_of_the_arguments_at_once(tmp_path, source):
    with pytest.raises(StoneyError) as caught:
        inspect_hf_dataset.main(["--dataset", str(source), "--allow", "no_split", "--drop", "look_alikes", *QUIET])
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["--drop", "--allow"]


def test_only_its_own_directories_are_replaced(tmp_path, inspected, source):
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    argv = ["--dataset", str(source), *QUIET]
    with pytest.raises(StoneyError, match="was not made by this script"):
        inspect_hf_dataset.main([*argv, "--output_dir", str(other), "--overwrite"])
    assert (other / "thesis.tex").exists()
    with pytest.raises(StoneyError, match="holds the dataset"):
        inspect_hf_dataset.main([*argv, "--output_dir", str(source.parent), "--overwrite"])
    with pytest.raises(StoneyError, match="is prepared already"):
        inspect_hf_dataset.main(["--dataset", str(inspected), "--output_dir", str(tmp_path / "x"), *QUIET])


def test_another_run_in_its_place_is_refused(inspected, source, tokenizer):
    argv = ["--dataset", str(source), "--tokenizer", str(tokenizer), "--output_dir", str(inspected), *QUIET]
    with pytest.raises(StoneyError, match="holds another run"):
        inspect_hf_dataset.main([*argv, "--max_length", "700"])


def test_two_sources_of_one_name_have_two_reports():
    name = inspect_hf_dataset.report_name
    assert name("a/rows.csv") != name("b/rows.csv")
    assert name("owner/rows") == "owner-rows" and name("../..") == "dataset"
    assert len(name("x" * 500 + "/rows.csv")) < 120 and name("x" * 500 + "/rows.csv").endswith("rows.csv")


def test_what_is_dropped_no_longer_fails(tmp_path, source, tokenizer):
    argv = ["--dataset", str(source), "--tokenizer", str(tokenizer), "--output_dir", str(tmp_path / "p"), *QUIET]
    argv += ["--strict", "--drop", "exact_duplicates", "--drop", LEAK, "--drop", "cut_answers"]
    assert inspect_hf_dataset.main(argv) == 1  # the unreadable row
    assert inspect_hf_dataset.main([*argv, "--allow", "quarantined_rows"]) == 0
    assert "left out of the prepared rows" in (tmp_path / "p" / "report.txt").read_text(encoding="utf-8")
    assert report_of(tmp_path / "p")["dataset"]["rows"] == ROWS + 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--output_dir", ""], "--output_dir: is empty"),
        (["--test_fraction", "1"], "--test_fraction 1: expected a share above 0 and below 1"),
        (["--validation_fraction", "0"], "--validation_fraction 0: expected a share"),
        (["--near_duplicate_threshold", "0"], "--near_duplicate_threshold 0: "),
    ],
)
def test_arguments_that_can_not_work(source, argv, said):
    with pytest.raises(StoneyError, match=said):
        inspect_hf_dataset.main(["--dataset", str(source), *argv, *QUIET])


def test_an_output_inside_the_dataset_is_refused_and_never_read(tmp_path, tokenizer):
    from stoney_rl.data import load_rows

    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records()[:80]), encoding="utf-8")
    argv = ["--dataset", str(folder), "--tokenizer", str(tokenizer), *QUIET]
    with pytest.raises(StoneyError, match="lies in the dataset"):
        inspect_hf_dataset.main([*argv, "--output_dir", str(folder / "prepared")])
    assert inspect_hf_dataset.main([*argv, "--output_dir", str(tmp_path / "prepared")]) == 0
    (tmp_path / "prepared").rename(folder / "prepared")  # moved there by hand
    assert len(load_rows(folder).rows) == 80


def test_a_row_of_a_million_characters_costs_little(tmp_path, tokenizer):
    """A run of 200,000 words of the language is a text, not a form; nothing grows with its square."""
    rows = records()[:60]
    rows.append({"question": 'What does "tâlo" mean? ' + "bla tâlo " * 100_000, "answer": "x" * 200_000})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    started = time.process_time()
    argv = ["--dataset", str(path), "--tokenizer", str(tokenizer), "--output_dir", str(tmp_path / "p"), *QUIET]
    assert inspect_hf_dataset.main(argv) == 0
    assert time.process_time() - started < 40
    forms = [json.loads(line)["form"] for line in (tmp_path / "p" / "lexicon.jsonl").read_text().splitlines()]
    assert max(map(len, forms)) < 200


def test_without_arguments_the_project_s_dataset_is_fetched_and_then_cached(tmp_path, tokenizer):
    """Two files with different columns, as the public repository has; then the hub is gone, and the cache is used."""
    rows = [{key: row[key] for key in ("question", "answer", "pair_id")} for row in records()[:80]]
    chats = [
        {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
        for row in records()[80:160]
    ]
    files = {
        name: "".join(json.dumps(row) + "\n" for row in part).encode()
        for name, part in (("qa/pairs.jsonl", rows), ("chat/train.jsonl", chats))
    }
    command = [sys.executable, str(REPOSITORY / "inspect_hf_dataset.py"), "--tokenizer", str(tokenizer), *QUIET]
    with hub_stub.serve({inspect_hf_dataset.DEFAULT_DATASET: files}) as hub:
        first = run(command, tmp_path, hub.url)
    assert first.returncode == 0 and "160 rows from HarleyCooper/StoneyNakoda45k (" in first.stdout, first.stderr
    again = run([*command, "--max_length", "300"], tmp_path, "http://127.0.0.1:9")
    assert again.returncode == 0 and "can't be reached; this is the cached copy" in again.stdout, again.stderr
    nothing = run(command, tmp_path / "elsewhere", "http://127.0.0.1:9")
    assert nothing.returncode == 2 and len(nothing.stderr.splitlines()) == 1 and "no cached copy" in nothing.stderr


def run(command, home, endpoint):
    home.mkdir(exist_ok=True)
    environment = hub_stub.environment(home, endpoint)
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=120)
