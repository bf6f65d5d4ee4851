import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from stoney_rl import planted
from stoney_rl.data import load_rows
from stoney_rl.errors import StoneyError
from stoney_rl.lexemes import contains_form, target_forms
from stoney_rl.planted import CITATION, RULES, TEMPLATES, PlantedLanguage, inflect, is_root, segments, uninflect
from stoney_rl.text import fold, normalize, words

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "data" / "planted"

# Worked out by hand from the grammar: tâlo has an oral onset, mîva and nûẖofe begin with a nasal.
GOLDEN = [
    ("tâlo", "citation", "tâlo", "tâlo"),
    ("tâlo", "first_person", "liẖtâlo", "liẖ-tâlo"),
    ("tâlo", "second_person", "vuẖtâlo", "vuẖ-tâlo"),
    ("tâlo", "plural", "tâloṯel", "tâlo-ṯel"),
    ("tâlo", "negation", "tâloẖov", "tâlo-ẖov"),
    ("tâlo", "causative", "tâloṯul", "tâlo-ṯul"),
    ("tâlo", "reduplication", "tâtâlo", "tâ~tâlo"),
    ("mîva", "first_person", "lîẖmîva", "lîẖ-mîva"),
    ("mîva", "second_person", "vûẖmîva", "vûẖ-mîva"),
    ("mîva", "plural", "mîvaṯel", "mîva-ṯel"),
    ("mîva", "reduplication", "mîmîva", "mî~mîva"),
    ("nûẖofe", "first_person", "lîẖnûẖofe", "lîẖ-nûẖofe"),
    ("nûẖofe", "negation", "nûẖofeẖov", "nûẖofe-ẖov"),
    ("ṯâgiva", "second_person", "vuẖṯâgiva", "vuẖ-ṯâgiva"),
    ("ṯâgiva", "reduplication", "ṯâṯâgiva", "ṯâ~ṯâgiva"),
    ("ẖûfi", "causative", "ẖûfiṯul", "ẖûfi-ṯul"),
    # A nasal inside the root does not spread: only the onset does.
    ("lâmu", "first_person", "liẖlâmu", "liẖ-lâmu"),
]


@pytest.fixture(scope="module")
def large() -> PlantedLanguage:
    return PlantedLanguage(seed=3, num_lexemes=1000)


@pytest.fixture(scope="module")
def small() -> PlantedLanguage:
    return PlantedLanguage(seed=0, num_lexemes=110)


@pytest.mark.parametrize(("stem", "rule", "form", "segmentation"), GOLDEN)
def test_golden_forms(stem, rule, form, segmentation):
    assert is_root(stem)
    assert inflect(stem, rule) == form
    assert ("~" if rule == "reduplication" else "-").join(segments(stem, rule)) == segmentation
    assert uninflect(form, rule) == stem
    assert [r for r in (CITATION, *RULES) if uninflect(form, r) is not None] == [rule]


def test_golden_table_covers_every_rule_and_both_sandhi_cases():
    assert {rule for _, rule, _, _ in GOLDEN} == {CITATION, *RULES}
    sandhi = {(rule, planted.has_sandhi(stem, rule)) for stem, rule, _, _ in GOLDEN}
    assert {(rule, nasal) for rule in planted.PREFIXES for nasal in (True, False)} <= sandhi
    assert not any(nasal for rule, nasal in sandhi if rule not in planted.PREFIXES)


@pytest.mark.parametrize(
    ("form", "rule"),
    [
        ("lîẖtâlo", "first_person"),  # nasal prefix on an oral root
        ("liẖmîva", "first_person"),  # oral prefix on a nasal root
        ("lihtâlo", "first_person"),  # line below lost
        ("liẖtalo", "first_person"),  # nasal lost in the root
        ("liẖliẖtâlo", "first_person"),  # prefix twice
        ("liẖ", "first_person"),  # no root
        ("vuẖtâlo", "first_person"),  # the other person
        ("tâloṯul", "plural"),
        ("tâloẖo", "negation"),
        ("tatâlo", "reduplication"),
        ("lotâlo", "reduplication"),  # the last syllable copied
        ("tâtâtâlo", "reduplication"),
        ("", "citation"),
        ("tâko", "citation"),  # none of f l v
    ],
)
def test_wrong_forms_have_no_analysis(form, rule):
    assert uninflect(form, rule) is None


def test_analyse_knows_only_its_lexicon(small):
    stem = small.stems[0]
    form = inflect(stem, "plural")
    assert small.analyse(form) == [(stem, "plural")]
    assert small.analyse(stem) == [(stem, CITATION)]
    assert small.is_attested(form)
    outsider = next(s for s in PlantedLanguage(7, 50).stems if s not in small.gloss_of)
    assert is_root(outsider)
    assert small.analyse(outsider) == small.analyse(inflect(outsider, "plural")) == []
    for text in ("", " ", "gather", form + form, f"{form} {form}", form[::-1], form[:-1], planted.SUFFIXES["plural"]):
        assert not small.is_attested(text), text


def test_analyse_compares_normalised_but_keeps_diacritics(small):
    stem = next(s for s in small.stems if s[0] == "ṯ")
    form = inflect(stem, "first_person")
    decomposed = unicodedata.normalize("NFD", form)
    assert decomposed != form
    assert small.analyse(decomposed) == small.analyse(form.upper()) == [(stem, "first_person")]
    stripped = "".join(c for c in decomposed if not unicodedata.combining(c))
    assert not small.is_attested(stripped)


def test_inverse_of_inflect_is_identity_on_a_thousand_stems(large):
    assert len(large.stems) == len(set(large.stems)) == 1000
    for stem in large.stems:
        for rule in (CITATION, *RULES):
            assert large.analyse(large.inflect(stem, rule)) == [(stem, rule)]


def test_no_form_is_ambiguous_and_no_stem_hides_in_another_stems_form(large):
    entries = large.lexicon()
    assert len(entries) == 1000 * (1 + len(RULES))
    assert len({entry.form for entry in entries}) == len(entries)
    stems = set(large.stems)
    for entry in entries:
        form = entry.form
        parts = {form[i:j] for i in range(len(form)) for j in range(i + 1, len(form) + 1)}
        assert parts & stems == {entry.stem}


def test_lexicon_entries_are_true(small):
    by_key = {(entry.stem, entry.rule): entry for entry in small.lexicon()}
    stem = small.stems[4]
    verb = small.gloss_of[stem].removeprefix("to ")
    assert by_key[stem, CITATION].gloss == f"to {verb}"
    assert by_key[stem, "first_person"].gloss == f"I {verb}"
    assert by_key[stem, "second_person"].gloss == f"you {verb}"
    assert by_key[stem, "plural"].gloss == f"they {verb}"
    assert by_key[stem, "negation"].gloss == f"not to {verb}"
    assert by_key[stem, "causative"].gloss == f"to make someone {verb}"
    assert by_key[stem, "reduplication"].gloss == f"to {verb} again and again"
    assert len({entry.gloss for entry in by_key.values()}) == len(by_key)
    for entry in by_key.values():
        assert entry.segmentation.replace("-", "").replace("~", "") == entry.form
        assert entry.pos == "verb"
        assert words(entry.form) == [entry.form]


def test_alphabet_nfc_and_glosses(large):
    forms = [entry.form for entry in large.lexicon()]
    assert all(normalize(form) == form == form.lower() for form in forms)
    assert set("âîûṯẖ") <= set("".join(large.stems))
    assert all(set(stem) & set("flv") and set(stem) & set("âîû") for stem in large.stems)
    glosses = [gloss for tier in planted.all_glosses() for gloss in tier]
    assert len(set(glosses)) == len(glosses) > 10_000
    assert all(gloss.startswith("to ") and gloss.isascii() and gloss == gloss.lower() for gloss in glosses)
    verbs = planted._VERBS.split() + [v for verbs, _ in planted._VERBS_WITH_OBJECTS for v in verbs.split()]
    exceptions = {"bring", "sing", "feed", "succeed", "cross", "guess"}
    assert not [verb for verb in verbs if verb.endswith(("ing", "ed", "s")) and verb not in exceptions]


def test_a_larger_language_begins_with_the_smaller_one(small):
    larger = PlantedLanguage(seed=0, num_lexemes=400)
    assert list(larger.gloss_of.items())[:110] == list(small.gloss_of.items())
    lengths = [len(gloss.split()) for gloss in larger.gloss_of.values()]
    assert lengths == sorted(lengths) and lengths[:110] == [2] * 110 and lengths[-1] == 3
    other = PlantedLanguage(seed=1, num_lexemes=110)
    assert len(set(other.stems) & set(small.stems)) < 20
    assert list(other.gloss_of.values()) != list(small.gloss_of.values())


def test_rows_say_what_their_metadata_says(small):
    rows = small.rows()
    assert len(rows) == 110 * 3 * 3
    assert len({row.id for row in rows}) == len(rows)
    assert len({row.metadata["stem"] for row in rows[:10]}) > 5, "a prefix of the rows should be a fair sample"
    assert [row.source for row in rows] == [f"rows.jsonl:{line}" for line in range(1, len(rows) + 1)]
    for row in rows:
        meta = row.metadata
        assert meta["language"] == "planted (invented)"
        assert row.lexemes == [meta["stem"]]
        assert small.analyse(meta["form"]) == [(meta["stem"], meta["rule"])]
        assert row.answer == f'"{meta["form"]}".'
        assert target_forms(row) == [meta["form"]]
        assert "invented" in row.question
        assert f'"{meta["stem"]}"' in row.question and f'"{meta["gloss"]}"' in row.question
        assert f'"{small.meaning(meta["stem"], meta["rule"])}"' in row.question
        assert meta["sandhi"] == (meta["form"][:2] in ("lî", "vû") and meta["rule"] in planted.PREFIXES)


def test_the_form_asked_for_is_never_in_the_prompt(small):
    rows = small.rows(rules_per_lexeme=6, templates_per_fact=6, lookup_fraction=1.0)
    assert len(rows) == 110 * 7 * 6
    for row in rows:
        assert row.metadata["form"] not in row.question
        assert not contains_form(row.question, row.metadata["form"])


def test_each_fact_is_asked_in_several_wordings_and_each_rule_equally_often(small):
    rows = small.rows()
    wordings: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        wordings.setdefault((row.metadata["stem"], row.metadata["rule"]), set()).add(row.question)
    assert {len(questions) for questions in wordings.values()} == {3}
    facts = [sum(rule == r for _, r in wordings) for rule in RULES]
    assert facts == [55] * 6
    assert {row.metadata["template"] for row in rows} == set(TEMPLATES)
    uneven = small.rows(rules_per_lexeme=1, templates_per_fact=1)
    counts = [sum(row.metadata["rule"] == rule for row in uneven) for rule in RULES]
    assert sum(counts) == 110 and max(counts) - min(counts) == 1
    assert sum(row.metadata["sandhi"] for row in rows) >= 30


def test_training_text_never_mentions_a_held_out_stem(small):
    held_out = set(small.stems[:20])
    rows = small.rows(rules_per_lexeme=6, templates_per_fact=3)
    train = [row for row in rows if row.lexemes[0] not in held_out]
    assert len(train) == 90 * 6 * 3
    text = "\n".join(f"{row.question}\n{row.answer}" for row in train)
    assert not [stem for stem in held_out if stem in text]


def _copy_nearest(train, row) -> str:
    """The answer of the training row whose question shares the most words with this one (Jaccard)."""
    asked = set(words(fold(row.question)))
    overlap = [(len(asked & bag) / len(asked | bag), answer) for bag, answer in train]
    return max(overlap, key=lambda pair: pair[0])[1]


def test_memorising_rows_wins_on_seen_facts_and_fails_on_unseen_stems(small):
    rows = small.rows()
    unseen = [row for row in rows if row.lexemes[0] in small.stems[:12]]
    known = [row for row in rows if row.lexemes[0] not in small.stems[:12]]
    asked: dict[tuple[str, str], list] = {}
    for row in known:
        asked.setdefault((row.metadata["stem"], row.metadata["rule"]), []).append(row)
    seen = [fact[0] for fact in asked.values()][:100]
    train = [(set(words(fold(row.question))), row.answer) for row in known if row not in seen]
    assert sum(_copy_nearest(train, row) == row.answer for row in seen) == 100
    assert sum(_copy_nearest(train, row) == row.answer for row in unseen) == 0
    # The rules do carry over: what the grammar says of an unseen stem is the answer.
    assert all(f'"{inflect(row.lexemes[0], row.metadata["rule"])}".' == row.answer for row in unseen)


def test_lookup_rows_hold_no_hint(small):
    rows = [row for row in small.rows(lookup_fraction=0.1) if row.metadata["rule"] == "lookup"]
    assert len(rows) == 11 * 3
    assert not any(row.metadata["rule"] == "lookup" for row in small.rows())
    for row in rows:
        stem = row.lexemes[0]
        assert row.answer == f'"{stem}".' and row.metadata["form"] == stem
        assert f'"{small.gloss_of[stem]}"' in row.question and "invented" in fold(row.question)
        assert row.question.isascii() and not set(words(row.question)) & set(small.stems)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: PlantedLanguage(0, 0), "num_lexemes is 0; expected 1 to"),
        (lambda: PlantedLanguage(0, 10**6), "num_lexemes is 1000000; expected 1 to"),
        (lambda: inflect("tâlo", "dual"), "unknown rule 'dual'"),
        (lambda: uninflect("tâlo", "dual"), "unknown rule 'dual'"),
        (lambda: PlantedLanguage(0, 5).inflect("gather", "plural"), "'gather' is no stem"),
        (lambda: PlantedLanguage(0, 5).rows(rules_per_lexeme=7), "rules_per_lexeme is 7; expected 1 to 6"),
        (lambda: PlantedLanguage(0, 5).rows(templates_per_fact=0), "templates_per_fact is 0; expected 1 to 6"),
        (lambda: PlantedLanguage(0, 5).rows(lookup_fraction=1.5), "lookup_fraction is 1.5; expected 0 to 1"),
    ],
)
def test_bad_arguments_raise_one_line(call, expected):
    with pytest.raises(StoneyError) as caught:
        call()
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def _make(output_dir: Path, *flags: str, hash_seed: str = "0") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "stoney_rl.planted", "--output_dir", str(output_dir), *flags]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_committed_sample_is_what_its_command_makes(tmp_path):
    assert (
        "python -m stoney_rl.planted --output_dir data/planted --num_lexemes 165 --rules_per_lexeme 2 --seed 0"
        in planted.__doc__
    )
    assert "python -m stoney_rl.planted --output_dir data/planted --num_lexemes 165 --rules_per_lexeme 2 --seed 0" in (
        SAMPLE / "README.md"
    ).read_text(encoding="utf-8")
    done = _make(tmp_path / "a" / "b", "--num_lexemes", "165", "--rules_per_lexeme", "2", "--seed", "0", hash_seed="1")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["lexicon.jsonl", "rows.jsonl"]
    for name in ("rows.jsonl", "lexicon.jsonl"):
        assert (tmp_path / "a" / "b" / name).read_bytes() == (SAMPLE / name).read_bytes(), name
    assert (SAMPLE / "rows.jsonl").stat().st_size < 500_000


def test_bytes_do_not_depend_on_the_hash_seed_but_on_the_seed(tmp_path):
    flags = ["--num_lexemes", "12", "--lookup_fraction", "0.5"]
    for name, seed, hash_seed in (("a", "5", "1"), ("b", "5", "2"), ("c", "6", "1")):
        assert _make(tmp_path / name, *flags, "--seed", seed, hash_seed=hash_seed).returncode == 0
    for name in ("rows.jsonl", "lexicon.jsonl"):
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b != c


def test_the_sample_is_a_source_that_loads_whole():
    rowset = load_rows(SAMPLE)
    assert rowset.quarantine == []
    assert [file["path"] for file in rowset.files] == ["rows.jsonl"]
    language = PlantedLanguage(seed=0, num_lexemes=165)
    assert rowset.rows == language.rows(rules_per_lexeme=2)
    lexicon = [json.loads(line) for line in (SAMPLE / "lexicon.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["form"] for entry in lexicon] == [entry.form for entry in language.lexicon()]


def test_command_line_errors_are_one_line_with_code_2(tmp_path):
    (tmp_path / "file").write_text("")
    blocked = _make(tmp_path / "file" / "below", "--num_lexemes", "5")
    too_many = _make(tmp_path / "new", "--num_lexemes", "1000000")
    for done, expected in ((blocked, "can't be written"), (too_many, "num_lexemes is 1000000")):
        assert done.returncode == 2 and expected in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.real_data
def test_no_planted_form_is_a_word_of_the_real_rows(large):
    folder = Path(os.environ.get("STONEY_REAL_DATA") or ROOT.parent / "shared" / "data")
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        pytest.skip(f"no real rows in {folder}; set STONEY_REAL_DATA")
    real = {word.casefold() for path in files for word in words(json.dumps(_load(path), ensure_ascii=False))}
    assert len(real) > 1000
    assert not real & {entry.form for entry in large.lexicon()}
    affixes = {*planted.PREFIXES.values(), *planted.SUFFIXES.values(), "lîẖ", "vûẖ"}
    assert not real & affixes
    # Why it holds: no real word with a letter of its own uses f, l or v.
    marked = {word for word in real if set(word) & set("âîûôṯẖ")}
    assert len(marked) > 100
    assert not [word for word in marked if set(word) & set(planted.FOREIGN)]


def _load(path: Path) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
