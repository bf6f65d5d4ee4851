"""Left-out initial letters: found where they are, not where they aren't. All forms are of the invented language, but
for word lists of natural languages (pyspellchecker) and the rows under real_data."""

import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import betabinom

from benchmarks import coverage as benchmark
from stoney_rl.data import load_rows
from stoney_rl.inspection import coverage
from stoney_rl.inspection.findings import FAILURE, NOTE
from stoney_rl.lexemes import annotate
from stoney_rl.planted import CONSONANTS, NASAL_VOWELS, VOWELS, PlantedLanguage
from stoney_rl.text import fold

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = Path(os.environ.get("STONEY_REAL_DATA") or ROOT.parent / "shared" / "data")
STEMS = PlantedLanguage(0, 1000).stems


def by_letter(section):
    return {row["letter"]: row for row in section.figures["letters"]}


def gaps(section):
    return {row["letter"] for row in section.figures["letters"] if row["verdict"].startswith("gap")}


def find(words):
    return coverage.find(Counter(words))


def test_counts_by_hand():
    section = coverage.find({"tâlo": 3, "mîva tâlo": 1, "falo-mîva": 1, "t'ela": 12})
    figures = section.figures
    # First words tâlo, mîva, falo, t'ela (read as tela); later words tâlo and mîva; all words, each once: four.
    assert (figures["forms"], figures["mentions"], figures["words"], figures["first_words"]) == (4, 17, 4, 4)
    assert figures["forms_by_number_of_words"] == {"1": 2, "2": 2}
    assert figures["words_by_length"] == {"4": 4}
    assert figures["forms_by_rows"] == {"1": 2, "2": 0, "3-5": 1, "6-10": 0, ">10": 1}
    assert figures["forms_in_one_row_share"] == 2 / 4
    assert figures["good_turing_new_mentions"] == 2 / 17
    letters = by_letter(section)
    assert {key: letters["t"][key] for key in ("initial", "later", "inside")} == {"initial": 2, "later": 1, "inside": 0}
    assert {key: letters["l"][key] for key in ("initial", "later", "inside")} == {"initial": 0, "later": 0, "inside": 3}
    assert letters["m"]["later"] == 1
    assert figures["letters"][0]["letter"] == "a"  # the most frequent: five of them
    assert section.findings == []


@pytest.mark.parametrize("forms", [{}, {"...": 2}, {"a": 1}])
def test_data_without_words_or_letters(forms):
    section = coverage.find(forms)
    assert section.findings == []
    assert section.figures["first_words"] == len(forms.keys() & {"a"})


def test_vowels_are_found_although_a_consonant_is_the_most_frequent_letter():
    # The greedy algorithm begins with l, the most frequent letter. With many other consonants l is then alone among the
    # vowels; with few the two sides are swapped.
    rng = random.Random(0)
    for consonants in ("bdfghjkmnpstvwyzllllllll", "bdgkmnllllll"):
        words = {"".join(rng.choice(consonants) + rng.choice("aeiou") for _ in range(3)) for _ in range(1000)}
        assert Counter("".join(words)).most_common(1)[0][0] == "l"
        assert set(find(words).figures["vowels"]) == set("aeiou")
    assert set(find(STEMS).figures["vowels"]) == set(NASAL_VOWELS + VOWELS)


def test_digraphs_are_one_letter():
    # ẖ only follows ṯ, while ṯ also stands alone; so ṯẖ is a letter, and ẖ is none.
    words = [word.replace("t", "ṯẖ") for word in STEMS if "ẖ" not in word]
    section = find(words)
    assert section.figures["digraphs"] == ["ṯẖ"]
    assert "ẖ" not in by_letter(section)
    assert by_letter(section)["ṯẖ"]["initial"] == sum(word.startswith("ṯẖ") for word in words)
    assert section.findings == []
    assert gaps(find(word for word in words if not word.startswith("ṯẖ"))) == {"ṯẖ"}


def test_p_is_the_beta_binomial_tail_averaged_over_mean_and_spread():
    counts = {
        letter: (x, y) for letter, x, y in zip("abcdef", (2, 30, 25, 40, 28, 31), (60, 50, 60, 70, 55, 44), strict=True)
    }
    (test,) = coverage._tail_tests(counts, set(counts), ["a"])
    # By simulation: weights of 20,000 random (mean, spread) by the likelihood of the other five letters.
    rng = np.random.default_rng(0)
    mean, spread = rng.uniform(0.001, 0.993, 20_000), np.exp(rng.uniform(np.log(0.5), np.log(2000), 20_000))
    a, b = mean * spread, (1 - mean) * spread
    weights = np.prod([betabinom.pmf(x, x + y, a, b) for letter, (x, y) in counts.items() if letter != "a"], axis=0)
    weights /= weights.sum()
    assert test.p == pytest.approx(weights @ betabinom.cdf(2, 62, a, b), rel=0.15)
    assert test.p_if_none == pytest.approx(weights @ betabinom.pmf(0, 60, a, b), rel=0.25)
    assert test.expected == pytest.approx(62 * weights @ mean, rel=0.02)


def test_too_few_letters_give_no_test():
    assert coverage._tail_tests(dict.fromkeys("abcd", (5, 5)), set("abcd"), list("abcd")) == []


def test_holm_by_hand():
    # 0.01 * 4; then max(0.04, 0.02 * 3); then 0.03 * 2; then max(0.06, 0.04)
    assert coverage._holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_planted_letter_left_out_is_found_and_nothing_else():
    stems = PlantedLanguage(1, 1000).stems
    assert find(stems).findings == []
    for letter in CONSONANTS[::2]:
        section = find(stem for stem in stems if stem[0] != letter)
        assert gaps(section) == {letter}
        (finding,) = section.findings
        assert (finding.kind, finding.severity, finding.count, finding.unit) == (
            "initial_letter_gap",
            FAILURE,
            1,
            "letters",
        )
        assert f"begins with {letter} (0 words" in finding.message
        assert "rule of spelling" in finding.message
        assert finding.examples[0]["letter"] == letter


def test_two_stray_words_do_not_hide_a_gap_but_many_do():
    without = [stem for stem in STEMS if stem[0] != "b"]
    assert gaps(find([*without, "bâla", "bîfo"])) == {"b"}
    assert gaps(find([*without, *(stem for stem in STEMS if stem[0] == "b")][: len(without) + 12])) == set()


def test_a_letter_with_too_little_data_is_not_reported():
    few = PlantedLanguage(0, 80).stems
    section = find(stem for stem in few if stem[0] != "b")
    assert gaps(section) == set()
    assert not by_letter(section)["b"]["noticeable"]
    enough = by_letter(find(STEMS))
    assert all(enough[letter]["noticeable"] for letter in CONSONANTS)
    assert not any(row["noticeable_headwords"] for row in enough.values())  # there are no phrases


def test_words_that_begin_with_the_letter_inside_phrases_are_evidence_of_their_own():
    rng = random.Random(0)
    phrases = [f"{rng.choice(STEMS)} {stem}" for stem in STEMS]
    assert find(phrases).findings == []
    assert by_letter(find(phrases))["b"]["noticeable_headwords"]
    section = find(phrase for phrase in phrases if phrase[0] != "b")
    assert by_letter(section)["b"]["verdict"] == coverage.GAP_ELSEWHERE
    assert by_letter(section)["b"]["later"] > 20
    assert "later words of phrases do begin with it" in section.findings[0].message


def test_a_rule_that_other_letters_follow_too_is_no_gap():
    # No vowel begins a word of the planted language; nor does half of the consonants here.
    words = [stem for stem in STEMS if stem[0] in "bdfghjklmn"]
    assert find(words).findings == []


def test_a_letter_that_only_ends_words_is_no_gap():
    # Vowels begin half of the words here, and a third of the words end in y, which is found nowhere else.
    rng = random.Random(0)
    words = ["".join(rng.choice("bdfgklmnpstv") + rng.choice("aeiou") for _ in range(3))[n % 2 :] for n in range(1500)]
    section = find(word[:-1] + "y" if rng.random() < 1 / 3 else word for word in words)
    assert set(section.figures["vowels"]) == set("aeiouy")
    assert all(by_letter(section)[letter]["noticeable"] for letter in "aeiou")
    assert section.findings == []


def test_a_hint_is_a_note():
    # Few words, and a letter with a diacritic, which takes more evidence.
    section = find(stem for stem in PlantedLanguage(0, 400).stems if stem[0] != "ṯ")
    assert coverage.ALPHA_MARKED < by_letter(section)["ṯ"]["p_corrected"] < coverage.ALPHA
    (finding,) = section.findings
    assert (finding.kind, finding.severity) == ("never_initial", NOTE)
    assert "ask someone who knows the language" in finding.message


def test_order_of_the_forms_does_not_matter():
    stems = [stem for stem in STEMS if stem[0] != "w"]
    assert find(stems) == find(reversed(stems))


@pytest.mark.parametrize("language", ["en", "fr", "ru", "eu", "lv"])
def test_natural_languages_without_a_gap(language):
    # Among them letters that begin no word by rule: x, ç, ъ, ы, ь, ņ, the Basque r.
    for size in (500, 2000):
        (rows,) = benchmark.samples(language, size, 1)
        assert benchmark.find(rows)[0] == set()


def test_natural_language_with_a_gap():
    # The other consonants tell, not rare or marked ones such as ç, which begin hardly any word by rule.
    (rows,) = benchmark.samples("pt", 10_000, 1)
    assert benchmark.find(rows)[0] == set()
    for letter in "mn":
        assert benchmark.find([row for row in rows if row[0][0] != letter])[0] == {letter}


def test_benchmark_counts_what_it_finds(monkeypatch):
    monkeypatch.setattr(benchmark, "samples", lambda *_: [[("tâlo",), ("tâlo", "bîfa"), ("mîva",)]])
    reports = iter(
        [(set(), {"b", "m"}), ({"b"}, set()), (set(), set()), ({"t"}, set()), ({"b", "t"}, set())]
        + [(set(), set())] * 2
    )
    seen = []
    monkeypatch.setattr(benchmark, "find", lambda rows: seen.append(rows) or next(reports))
    result = benchmark.try_all("planted, stems", 3, 1)
    # Without b, the row that mentions tâlo too goes; then its word comes back as a stray.
    assert seen[1:3] == [[("tâlo",), ("mîva",)], [("tâlo",), ("mîva",), ("bîfa",)]]
    assert seen[5] == [("mîva",)]
    counted = ("clean", "clean_with_alarm", "left_out", "found", "found_with_strays", "others", "noticeable", "noticed")
    assert [result[key] for key in counted] == [1, 0, 3, 1, 0, 1, 2, 1]
    assert (result["missed"], result["other_letters"]) == ({"m": 1, "t": 1}, {"t": 1})
    assert "planted, stems       3      1       0         3   0.333   0.000       1       1 of 2" in benchmark.table(
        [result]
    )


@pytest.mark.real_data
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real rows are not here")
def test_real_rows_have_no_gap_that_their_phrases_would_give_away():
    rows = [{fold(lexeme) for lexeme in row.lexemes} for row in annotate(load_rows(REAL_DATA).rows)]
    section = coverage.find(Counter(form for forms in rows for form in forms))
    assert set(section.figures["vowels"]) == set("aeiouâîû")
    assert section.figures["digraphs"] == ["ch", "ṯẖ"]
    assert section.findings == []
    # Phrases would give away who left out the forms that begin with a letter, nothing who left out every row with one.
    assert not any(row["noticeable"] for row in section.figures["letters"])
    letters = [row["letter"] for row in section.figures["letters"] if row["noticeable_headwords"]]
    assert len(letters) >= 18
    for letter in letters[::6]:
        kept = [form for forms in rows for form in forms if not form.startswith(letter)]
        assert by_letter(find(kept))[letter]["verdict"] == coverage.GAP_ELSEWHERE
