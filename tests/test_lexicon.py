"""The lexicon of a dataset. All language forms are invented, but for the rows under real_data."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stoney_rl.data import Row, load_rows
from stoney_rl.errors import StoneyError
from stoney_rl.glosses import content_words, extract_facts
from stoney_rl.inspection.meanings import conflicting_entries, find, have_conflict
from stoney_rl.lexemes import annotate
from stoney_rl.lexicon import LexiconEntry, build_lexicon, read_lexicon, write_lexicon
from stoney_rl.planted import PlantedLanguage
from stoney_rl.text import fold

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = Path(os.environ.get("STONEY_REAL_DATA") or ROOT.parent / "shared" / "data")
benchmark = importlib.import_module("benchmarks.lexicon")


def row(question, answer, *lexemes, source="rows.jsonl:1", **metadata):
    return Row(
        id=source,
        source=source,
        prompt=[{"role": "user", "content": question}],
        completion=[{"role": "assistant", "content": answer}],
        lexemes=list(lexemes),
        metadata=metadata,
    )


def glosses(question, answer, *lexemes):
    return list(extract_facts(row(question, answer, *lexemes)).glosses)


def pos(question, answer, *lexemes):
    return list(extract_facts(row(question, answer, *lexemes)).pos)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('"tâlo" means "to gather".', [("tâlo", "to gather")]),
        ("`tâlo-` directly translates to 'to gather.'", [("tâlo", "to gather")]),
        ('The term tâlo specifically refers to the "gathering of wood".', [("tâlo", "gathering of wood")]),
        ('"tâlo" ("to gather") and "mîva" (to sleep) differ.', [("tâlo", "to gather"), ("mîva", "to sleep")]),
        ("The terms for 'to gather' (`tâlo`) and 'to sleep' (`mîva`).", [("tâlo", "to gather"), ("mîva", "to sleep")]),
        ("`tâlo` is an active transitive verb meaning 'to gather', not to keep.", [("tâlo", "to gather")]),
        ("`tâlo`, an alienable noun meaning 'basket', is old.", [("tâlo", "basket")]),
        ("This differs from `tâlo`, which means 'basket'.", [("tâlo", "basket")]),
        ("The English word for `tâlo` is 'basket'.", [("tâlo", "basket")]),
        ("'Basket' is expressed as `tâlo`.", [("tâlo", "Basket")]),
        ("The invented word for 'basket' is `tâlo`.", [("tâlo", "basket")]),
        ("To say 'to gather', you would use `tâlo`.", [("tâlo", "to gather")]),
        ("For a child that 'gathers wood' at home, use the verb `tâlo`.", [("tâlo", "gathers wood")]),
        ("Use `tâlo` for 'to gather' and `mîva` for 'to sleep'.", [("tâlo", "to gather"), ("mîva", "to sleep")]),
        ("Both `tâlo` and `mîva` mean 'to gather'.", [("tâlo", "to gather"), ("mîva", "to gather")]),
        (
            'The terms "tâlo," "mîva," and "lôva" refer to "wood," "fish," and "rain," respectively.',
            [("tâlo", "wood"), ("mîva", "fish"), ("lôva", "rain")],
        ),
        # which gloss belongs to which form is not plain
        ('The terms "tâlo" and "mîva" refer to "wood" and "fish".', []),
        # the sentence after, if one form can be meant
        ('You would use `tâlo`. This verb means "to gather".', [("tâlo", "to gather")]),
        ('`tâlo` and `mîva` are common. This verb means "to gather".', []),
        # without quotes, up to the comma or the end of the sentence
        ('"tâlo" means to gather.', [("tâlo", "to gather")]),
        ('"tâlo" means to gather wood, not to burn it.', [("tâlo", "to gather wood")]),
        ('"tâlo" means that somebody gathers wood.', []),
        ('"tâlo" means it is used with an object.', []),
        # a verb in the singular takes the form before it
        ("Compared to `tâlo`, `mîva` means 'fish'.", [("mîva", "fish")]),
        ("First comes `tâlo`, `mîva` means 'fish'.", [("mîva", "fish")]),
        ("`mîva` differs from `tâlo`, which means 'fish'.", [("tâlo", "fish")]),
        # no statement of a meaning
        ('"tâlo" does not mean "to gather".', []),
        ('"tâlo" suggests the idea of "warmth".', []),
        ('The suffix in "tâlo" means "again".', []),
        ('"tâlo" is a "transitive" form.', []),
        ('"Tâlo" (capitalized) is a name.', []),
        ('"tâlo" (general term, literally) is old.', []),
    ],
)
def test_glosses(answer, expected):
    forms = [form for form in ("tâlo", "mîva", "lôva") if form in answer.casefold()]
    assert glosses("What is there to say?", answer, *forms) == expected


def test_question_and_answer_together():
    ask = 'How do you say "to gather" in the invented language?'
    assert glosses(ask, "You would use `tâlo`.", "tâlo") == [("tâlo", "to gather")]
    # the answer's own gloss is better than the question's; two new forms or two glosses are not plain
    assert glosses(ask, "`tâlo` means 'to collect'.", "tâlo") == [("tâlo", "to collect")]
    assert glosses(ask, "Perhaps `tâlo` beside `mîva`.", "tâlo", "mîva") == []
    assert glosses('How do you say "to gather" as opposed to "to sleep"?', "`tâlo`.", "tâlo") == []
    assert glosses("What does `tâlo` mean?", "It means to gather.", "tâlo") == [("tâlo", "to gather")]
    assert glosses("What does `tâlo` mean?", "'Basket'. It is a noun.", "tâlo") == [("tâlo", "Basket")]
    # a question whether it is one or the other states nothing
    assert glosses("Should one choose `tâlo` or `mîva` for 'rain'?", "That depends.", "tâlo", "mîva") == []


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("`tâlo` is classified as an alienable noun.", [("tâlo", "alienable noun")]),
        ('"tâlo" (an adverb) stands first.', [("tâlo", "adverb")]),
        ("Both `tâlo` and `mîva` are classified as 'stative verbs'.", [("tâlo", "stative verb"), ("mîva", "stative verb")]),
        ("Use the Transitive Verb `tâlo`.", [("tâlo", "transitive verb")]),
        ("`tâlo` ('to gather') is a verb phrase, while `mîva` is an adverb.", [("tâlo", "verb phrase"), ("mîva", "adverb")]),
        ("As an inalienable noun, `tâlo` has an owner.", [("tâlo", "inalienable noun")]),
        ("The 'alienable noun' classification for `tâlo` is old.", [("tâlo", "alienable noun")]),
        ("You would use `tâlo`. This stative verb means 'to be warm'.", [("tâlo", "stative verb")]),
        ("Unlike `tâlo`, a noun needs no object.", []),
        ("`tâlo` is not an adverb.", []),
        ("A verb needs an object. `tâlo` has none.", []),
    ],
)  # fmt: skip
def test_parts_of_speech(answer, expected):
    forms = [form for form in ("tâlo", "mîva") if form in answer]
    assert pos("What is there to say?", answer, *forms) == expected


def test_ascii_form_is_not_looked_for_in_prose():
    """A form that looks like an English word counts only as the row quotes it."""
    facts = extract_facts(row("How is `do` used?", "`do` means 'basket'. How do you do (to sleep)?", "do"))
    assert facts.glosses == (("do", "basket"),)


def test_build_lexicon_counts_rows_and_ranks():
    rows = [
        row("q", '"Tâlo" means "to gather". "tâlo" means "To gather".', "Tâlo", source="a:1"),
        row("q", '"tâlo" is a verb meaning "to collect".', "tâlo", source="a:2"),
        row("q", '"tâlo" means "to gather".', "tâlo", source="a:3"),
        row("q", "`mîva` is mentioned.", "mîva", source="a:3b"),
    ]
    assert build_lexicon(rows) == [
        LexiconEntry("mîva", count=1, sources=("a:3b",)),
        LexiconEntry("tâlo", (("to gather", 2), ("to collect", 1)), (("verb", 1),), 3, ("a:1", "a:2", "a:3")),
    ]
    assert build_lexicon([]) == []


def test_planted_rows_give_the_planted_lexicon():
    """The metadata's gloss is the stem's; the form that is asked for has the gloss of the question."""
    language = PlantedLanguage(seed=3, num_lexemes=40)
    truth = {entry.form: entry.gloss for entry in language.lexicon()}
    entries = build_lexicon(language.rows(rules_per_lexeme=3, templates_per_fact=6, lookup_fraction=0.5))
    assert len(entries) == 40 + 40 * 3  # each stem, and each form asked for
    for entry in entries:
        assert [gloss for gloss, _ in entry.glosses] == [truth[entry.form]], entry
        assert not entry.pos or entry.pos[0][0] == "verb"


def test_metadata_of_other_sources():
    facts = extract_facts(row("q", "`tâlo`.", "tâlo", gloss="to gather", pos="Stative Verbs"))
    assert (facts.glosses, facts.pos) == ((("tâlo", "to gather"),), (("tâlo", "stative verb"),))
    # whose gloss it is can't be told, or it is not a text
    assert extract_facts(row("q", "`tâlo`, `mîva`.", "tâlo", "mîva", gloss="to gather")).glosses == ()
    assert extract_facts(row("q", "`tâlo`.", "tâlo", gloss=["to gather"])).glosses == ()


def test_written_and_read_back(tmp_path):
    entries = [
        LexiconEntry("tâlo", (("to gather", 2), ("to collect", 1)), (("verb", 1),), 3, ("a:1", "a:2", "a:3")),
        LexiconEntry("zûẖ", count=1, sources=("a:4",), stem="zû", segmentation="zû-ẖ"),
    ]
    path = write_lexicon(tmp_path / "new" / "lexicon.jsonl", entries)
    assert read_lexicon(path) == entries
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert list(lines[0]) == ["form", "gloss", "pos", "count", "glosses", "parts_of_speech", "sources"]
    assert (lines[0]["gloss"], lines[1]["gloss"], lines[1]["pos"]) == ("to gather", None, None)
    assert sorted(file.name for file in path.parent.iterdir()) == ["lexicon.jsonl"]
    with pytest.raises(StoneyError, match="can't be written"):
        write_lexicon(path / "below", entries)


def test_other_lexicons_are_read(tmp_path):
    planted = read_lexicon(ROOT / "data" / "planted" / "lexicon.jsonl")
    assert planted[1] == LexiconEntry(
        "liẖwûsilo", (("I run", 0),), (("verb", 0),), stem="wûsilo", segmentation="liẖ-wûsilo"
    )
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '\ufeff{"form": "ta\u0302lo", "gloss": "to gather"}\n\n{"form": "Tâlo", "gloss": "basket", "note": 1}\n',
        encoding="utf-8",
    )
    assert read_lexicon(path) == [LexiconEntry("tâlo", (("to gather", 0), ("basket", 0)))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ('["tâlo"]', "is not an object"),
        ('{"gloss": "to gather"}', "has no form"),
        ('{"form": " "}', "has no form"),
        ('{"form": 3}', "form is not a text"),
        ('{"form": "mîva", "gloss": ["to gather"]}', "gloss is not a text"),
        ('{"form": "mîva", "count": -1}', "count is not a number of rows"),
        ('{"form": "mîva", "glosses": [["to gather", 1]]}', "glosses is not a list of"),
        ('{"form": "mîva", "sources": "a:1"}', "sources is not a list"),
    ],
)
def test_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "lexicon.jsonl"
    path.write_text(f'{{"form": "tâlo"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(StoneyError, match=message) as caught:
        read_lexicon(path)
    assert str(caught.value).startswith(f"{path} line 2") and "\n" not in str(caught.value)


def test_files_that_are_no_lexicon(tmp_path):
    with pytest.raises(StoneyError, match="can't be read"):
        read_lexicon(tmp_path / "absent.jsonl")
    for content, message in ((b"", "has no entry"), (b'{"form": "t\xe2lo"}', "not UTF-8")):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(StoneyError, match=message):
            read_lexicon(tmp_path / "file")


def test_content_words_and_conflicts():
    assert content_words("to be gathering the baskets") == content_words("gather a basket") == {"gather", "basket"}
    assert content_words("to be") == {"to", "be"}
    assert not have_conflict(["to gather wood", "to gather"])
    assert not have_conflict(["to run", "running fast", "to be fast"])  # through the second
    assert have_conflict(["to gather", "a basket"])
    assert not have_conflict([])


def test_section():
    entries = [
        LexiconEntry("lôva", (("rain", 1), ("a basket", 1)), (("noun", 2),), 2, ("a:1", "a:2")),
        LexiconEntry("mîva", count=1, sources=("a:2",)),
        LexiconEntry("tâlo", (("to gather", 2), ("gathering", 1)), (("verb", 1), ("adverb", 1)), 3, ("a:1", "a:2", "a:3")),
    ]  # fmt: skip
    rows = [row("q", "a", source=f"a:{number}") for number in range(1, 6)]
    found = find(entries, rows)
    assert found.name == "lexicon"
    assert found.figures == {
        "forms": 3,
        "with_gloss": 2,
        "without_gloss": 1,
        "with_pos": 2,
        "by_pos": {"noun": 1, "verb": 1},
        "hapax": 1,
        "rows_per_form": {"mean": 2.0, "median": 2, "most": 3},
        "rows": 5,
        "rows_with_form": 3,
        "conflicting_glosses": 1,
    }
    (finding,) = found.findings
    assert (finding.kind, finding.severity, finding.count, finding.total, finding.unit) == (
        *("conflicting_glosses", "note", 1, 3, "forms"),
    )
    assert finding.examples == ({"form": "lôva", "glosses": "rain; a basket", "sources": "a:1, a:2"},)
    assert conflicting_entries(entries) == entries[:1]
    json.dumps(found.figures)
    assert find([], []).findings == [] and find([], []).figures["forms"] == 0


def test_the_order_of_hashes_does_not_matter():
    program = (
        "from stoney_rl.lexicon import *; from stoney_rl.planted import PlantedLanguage; import hashlib;"
        "print(hashlib.sha256(repr(build_lexicon(PlantedLanguage(1, 30).rows())).encode()).hexdigest())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


@pytest.mark.parametrize(
    "text",
    ['"tâlo" ' * 2000, '"tâlo" means ' * 1500, "for the " * 3000 + '"tâlo"', "(" * 5000 + "tâlo", '"a" or ' * 2000 + "`tâlo`"],
)  # fmt: skip
def test_time_does_not_explode(text):
    started = time.process_time()
    extract_facts(row(text, text, "tâlo"))
    assert time.process_time() - started < 5


def test_prose_of_the_planted_language():
    """Precision and recall against what the rows state. The truth omits 'the adverb F', so that POS has no bound."""
    prose = pytest.importorskip("stoney_rl.planted_prose")
    rows, stated = prose.prose_rows(PlantedLanguage(7, 300), 400, 7)
    truth = {one.id: [] for one in rows}
    for fact in stated:
        truth[fact.row_id].append((fact.form, fact.gloss, fact.pos))
    scores = benchmark.evaluate_extraction({one.id: extract_facts(one) for one in annotate(rows)}, truth)
    assert scores["forms"]["precision"] > 0.95 and scores["forms"]["recall"] > 0.99
    assert scores["glosses"]["precision"] > 0.98 and scores["glosses"]["recall"] > 0.95
    assert scores["pos"]["recall"] > 0.95


def test_evaluate_extraction_by_hand():
    predicted = {
        "a": extract_facts(row("q", '"tâlo" is a verb meaning "to gather". "mîva" means "rain".', "tâlo", "mîva")),
        "unlabelled": extract_facts(row("q", '"tâlo" means "fish".', "tâlo")),
    }
    truth = {"a": [("tâlo", "gather wood", "Verb"), ("lôva", "fish", None), ("mîva", None, "noun")], "b": []}
    scores = benchmark.evaluate_extraction(predicted, truth)
    assert [scores[kind]["found"] for kind in ("forms", "glosses", "pos")] == [2, 2, 1]
    assert (scores["forms"]["precision"], scores["forms"]["recall"]) == (1.0, 2 / 3)
    assert (scores["glosses"]["precision"], scores["glosses"]["recall"]) == (0.5, 0.5)
    assert (scores["pos"]["precision"], scores["pos"]["recall"]) == (1.0, 0.5)
    assert scores["forms"]["f1"] == pytest.approx(0.8)
    empty = benchmark.evaluate_extraction({}, {"a": []})["forms"]
    assert (empty["precision"], empty["recall"], empty["f1"], empty["recall_interval"]) == (None, None, None, None)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("To gather.", "gather", True),
        ("the basket", "a basket", True),
        ("to gather", "to gather wood", True),
        ("to gather", "to burn", False),
        ("to gather wood", "to burn wood", False),
    ],
)
def test_same_gloss(one, other, same):
    assert benchmark.same_gloss(one, other) is benchmark.same_gloss(other, one) is same


def test_benchmark_writes_numbers_only(tmp_path, capsys):
    pytest.importorskip("stoney_rl.planted_prose")
    rows, labels, output = tmp_path / "rows.jsonl", tmp_path / "labels.jsonl", tmp_path / "out" / "lexicon.json"
    rows.write_text('{"question": "What does `tâlo` mean?", "answer": "It means \'to gather\'."}\n', encoding="utf-8")
    labels.write_text('{"source": "rows.jsonl:1", "forms": [{"form": "tâlo", "gloss": "to gather"}]}', encoding="utf-8")
    benchmark.main(["--num_rows", "20", "--num_lexemes", "60", "--output", str(output)])
    benchmark.main(["--dataset", str(rows), "--labels", str(labels), "--output", str(output)])
    text = output.read_text(encoding="utf-8")
    report = json.loads(text)
    assert report["planted"]["n"] == 20 and report["labels"]["n"] == 1
    assert report["labels"]["results"]["glosses"]["f1"] == 1.0
    assert "tâlo" not in text and "gather" not in text and str(tmp_path) not in text
    assert "glosses" in capsys.readouterr().out


def test_benchmark_refuses(tmp_path):
    labels = tmp_path / "labels.jsonl"
    labels.write_text('{"source": "rows.jsonl:1"}\n', encoding="utf-8")
    with pytest.raises(StoneyError, match="line 1"):
        benchmark.main(["--dataset", "x", "--labels", str(labels), "--output", str(tmp_path / "o.json")])
    with pytest.raises(StoneyError, match="belong together"):
        benchmark.main(["--labels", str(labels)])
    labels.write_text('{"source": "rows.jsonl:9", "forms": []}\n', encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "q", "answer": "a"}\n', encoding="utf-8")
    with pytest.raises(StoneyError, match="1 sources are not in"):
        benchmark.main(["--dataset", str(rows), "--labels", str(labels), "--output", str(tmp_path / "o.json")])


@pytest.mark.real_data
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no real rows here")
def test_real_rows(tmp_path):
    rows = annotate(load_rows(REAL_DATA).rows)
    entries = build_lexicon(rows)
    figures = find(entries, rows).figures
    assert figures["with_gloss"] > 0.8 * figures["forms"]
    assert figures["rows_with_form"] > 0.97 * len(rows)
    keys = [fold(entry.form) for entry in entries]
    assert keys == sorted(set(keys))
    assert read_lexicon(write_lexicon(tmp_path / "lexicon.jsonl", entries)) == entries
    forms = set(keys)
    assert not any(fold(gloss) in forms and not gloss.isascii() for entry in entries for gloss, _ in entry.glosses)


def test_veiled_labels_score_as_plain_ones(tmp_path):
    """No word stands in them, and every comparison comes out as with the words themselves."""
    plain = {
        "a": [("tâlo", "to gather", "verb"), ("mîva", "a heavy rain", "Nouns"), ("dovi", None, None)],
        "b": [("zûfi", "running water", None)],
    }
    found = {
        "a": extract_facts(
            row("q", '"Tâlo" is a verb meaning "gathers". "mîva", a noun, means "rain".', "Tâlo", "mîva")
        ),
        "b": extract_facts(row("q", '"zûfi" means "fire".', "zûfi")),
    }
    benchmark.write_veiled(tmp_path / "veiled.jsonl", plain)
    text = (tmp_path / "veiled.jsonl").read_text(encoding="utf-8")
    assert not any(word in text for word in ("tâlo", "mîva", "dovi", "gather", "rain", "heavy", "water"))
    labels, are_veiled = benchmark.read_labels(tmp_path / "veiled.jsonl")
    assert are_veiled
    veiled = {key: benchmark.veiled_facts(facts) for key, facts in found.items()}
    scores = benchmark.evaluate_extraction(found, plain)
    assert benchmark.evaluate_extraction(veiled, labels) == scores
    assert (scores["glosses"]["found_right"], scores["glosses"]["found"], scores["glosses"]["stated"]) == (2, 3, 3)
