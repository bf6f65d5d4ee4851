"""The inspection of the orthography. All forms are invented, but for the letters and words of other languages.

Code points that could be taken for others are spelled out.
"""

import json
import os
import random
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoney_rl.data import Row, RowSet, load_rows
from stoney_rl.inspection.findings import FAILURE, NOTE
from stoney_rl.inspection.orthography import find
from stoney_rl.lexemes import annotate
from stoney_rl.planted import PlantedLanguage
from stoney_rl.planted_prose import prose_rows

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = Path(os.environ.get("STONEY_REAL_DATA") or ROOT.parent / "shared" / "data")


def row(question, answer="It is a verb.", lexemes=(), row_id="r"):
    return Row(
        row_id,
        "test:1",
        [{"role": "user", "content": question}],
        [{"role": "assistant", "content": answer}],
        list(lexemes),
        {},
    )


def inspect(rows, irregular=None, **more):
    rows = [replace(item, id=str(number)) for number, item in enumerate(rows)]
    rowset = RowSet(rows, [], "", [], "test", irregular=irregular or {})
    return find(rowset, annotate(rows), **more)


def findings(section):
    return {finding.kind: finding for finding in section.findings}


# Twenty rows that use each of these forms: an inventory to compare with.
FORMS = ("tâlo", "mîva", "vûda", "luẖe", "maṯo")
REGULAR = [row(f'What is "{form}"?', f"Say '{other}'.") for form in FORMS for other in FORMS * 4]


def test_letters_counted_by_hand():
    rows = [
        row('What is "tâlo"?', "`Tâlo ṯe`", ["tâlo", "tâlo ṯe"]),
        row("An égal tâ.", "q\u0331a", ["tâ", "q\u0331a"]),
    ]
    section = find(RowSet(rows, [], "", [], "test"), rows)
    letters = {item["letter"]: item for item in section.figures["letters"]}
    # Forms, each once: tâlo, tâlo ṯe, tâ, q̱a.
    assert letters["t"] == {
        "letter": "t",
        "code_points": "U+0074",
        "name": "LATIN SMALL LETTER T",
        "in_forms": 3,
        "form_initial": 3,
        "in_prose": 1,  # 'what'; the forms of a row are no prose of it
        "rows": 2,
    }
    assert letters["â"]["in_forms"] == 3 and letters["â"]["in_prose"] == 0
    assert letters["ṯ"] == letters["ṯ"] | {"code_points": "U+1E6F", "in_forms": 1, "form_initial": 0, "rows": 1}
    assert letters["q\u0331"] == letters["q\u0331"] | {"code_points": "U+0071 U+0331", "in_forms": 1, "form_initial": 1}
    assert "q" not in letters
    assert letters["é"] == letters["é"] | {"in_forms": 0, "in_prose": 1, "rows": 0}
    counts = [item["in_forms"] for item in section.figures["letters"]]
    assert counts == sorted(counts, reverse=True)
    # t 3, â 3, l 2, o 2, e 1, a 1 of one or two bytes, ṯ and q̱ of three: 9 + 6 + 6 bytes in 14 letters.
    assert section.figures["utf8_bytes_per_letter"]["in_forms"] == round((9 + 3 * 2 + 2 * 3) / 14, 4)


@pytest.mark.parametrize(
    ("word", "shown", "read_as"),
    [
        ("t\u00e2l\u043e", "U+043E, CYRILLIC SMALL LETTER O) for o", "tâlo"),
        ("t\u00e2l\u03bf", "U+03BF, GREEK SMALL LETTER OMICRON) for o", "tâlo"),
        ("t\u00e2l0", "U+0030, DIGIT ZERO) for o", "tâlo"),
        ("t\u00e21o", "U+0031, DIGIT ONE) for l", "tâlo"),
        ("t\u00e2\uff4co", "FULLWIDTH LATIN SMALL LETTER L) for l", "tâlo"),
        ("t\u0430\u0302lo", "U+0430 U+0302, CYRILLIC SMALL LETTER A + COMBINING CIRCUMFLEX ACCENT) for â", "tâlo"),
        ("m\u0131\u0302va", "LATIN SMALL LETTER DOTLESS I + COMBINING CIRCUMFLEX ACCENT) for î", "mîva"),
        ("m\u00eev\u0251", "LATIN SMALL LETTER ALPHA) for a", "mîva"),
        ("m\u0129va", "LATIN SMALL LETTER I WITH TILDE) for î", "mîva"),
        ("m\u012bva", "LATIN SMALL LETTER I WITH MACRON) for î", "mîva"),
        ("m\u01d0va", "LATIN SMALL LETTER I WITH CARON) for î", "mîva"),
        ("lu\u0127e", "LATIN SMALL LETTER H WITH STROKE) for ẖ", "luẖe"),
        ("luh\u0332e", "U+0068 U+0332, LATIN SMALL LETTER H + COMBINING LOW LINE) for ẖ", "luẖe"),
        ("ma\u0167o", "LATIN SMALL LETTER T WITH STROKE) for ṯ", "maṯo"),
        ("\uff54\u00e2lo", "FULLWIDTH LATIN SMALL LETTER T) for t", "tâlo"),  # not in UTS #39
        ("m\u0430\u1e6f\u043e", "U+0430, CYRILLIC SMALL LETTER A) for a", "maṯo"),
        # of no form of the data: mixed scripts and one shape, which need no other evidence
        ("l\u00fb\u03bae", "GREEK SMALL LETTER KAPPA) for k", "lûke"),
        ("voh\u0332a", "LATIN SMALL LETTER H + COMBINING LOW LINE) for ẖ", "voẖa"),
        ("t\u00e2l\u0435", "U+0435, CYRILLIC SMALL LETTER IE) for e", "tâle"),
    ],
)
def test_look_alikes(word, shown, read_as):
    rows = [*REGULAR, *[row('What is "kova"?')] * 20]
    section = inspect([*rows, row(f'What is "{word}"?')])
    found = findings(section)["look_alikes"]
    assert (found.severity, found.count, found.total, found.unit) == (FAILURE, 1, len(rows) + 1, "rows")
    assert found.row_ids == (str(len(rows)),)
    assert shown in found.details[0] and f'in "{word}"' in found.details[0]
    assert found.examples[0]["read_as"] == read_as
    assert {item["words"] for item in section.figures["look_alikes"]} == {1}
    assert "diacritic_pairs" not in findings(section)  # said once


@pytest.mark.parametrize(
    "word", ["'T\u0101lo'", "T\u0101lo", "(t\u0101lo)", "“t\u0101lo”", "t\u0101lo.", "`t\u0101lo-`"]
)
def test_look_alikes_are_found_beside_anything(word):
    assert findings(inspect([*REGULAR, row(f"Explain {word}")]))["look_alikes"].count == 1


@pytest.mark.parametrize(
    "text",
    [
        "The 1st, 2nd and 10th x1 of B12 in H2O, COVID19, l10n",
        "On 2010-01-01 at 10:01, 101a Main Road",
        "The senses t\u00e2lo1 and t\u00e2lo2",
        "A caf\u00e9 in Qu\u00e9bec, na\u00efve and cr\u00eape",
        "A word of M\u0101ori and one of P\u0101li",
        "Greek \u03bb\u03cc\u03b3\u03bf\u03c2 and \u03bf\u03bd, Russian \u0441\u043b\u043e\u0432\u043e and \u0441\u0430\u0440\u0430",
        "The o\ufb03ce \ufb01sh, in English",
        "An English p\u0430ge",
        "The number b" + "10" * 40,  # of 2 ** 40 readings few are tried
    ],
)
def test_what_is_no_look_alike(text):
    assert "look_alikes" not in findings(inspect([*REGULAR * 10, row(text)]))


def test_a_letter_in_regular_use_is_none():
    # ī beside î, in a fifth of the rows; then in one of twenty, but always in the same words.
    often = [row(f'What is "t\u012bl{vowel}"?') for vowel in "aeiou" * 5]
    assert "look_alikes" not in findings(inspect([*REGULAR, *often]))
    # An orthography may take a letter of another script, even one that looks like one of its own.
    assert "look_alikes" not in findings(inspect([*REGULAR, *[row('What is "t\u00fbl\u043e"?')] * 10]))
    assert "look_alikes" in findings(inspect([*REGULAR, *[row('What is "t\u00fbl\u043e"?')] * 3]))
    # ... but not in data so small that one row is a large share of those with the letter.
    assert "look_alikes" in findings(
        inspect([row(f'What is "t\u00fbl{v}"?') for v in "oa"] + [row('What is "t\u00fbl\u043e"?')])
    )
    rarely = [row('What is "t\u012bla"?')] * 5
    assert "look_alikes" not in findings(inspect([*REGULAR, *rarely]))
    # ... even if one other word has it by mistake, or one of its words is once written with î.
    slip = row('What is "m\u012bva"?')
    assert "look_alikes" not in findings(inspect([*REGULAR * 2, *rarely[:4], slip]))
    assert "look_alikes" in findings(inspect([*REGULAR * 2, slip]))
    assert "look_alikes" not in findings(inspect([*REGULAR * 2, *rarely[:4], row('What is "t\u00eela"?')]))
    # One that is used once and never with the other letter could be either; 1 of 36 rows is too many for a slip.
    assert "look_alikes" not in findings(inspect([*REGULAR, row('What is "t\u012bla"?')]))
    assert "look_alikes" in findings(inspect([*REGULAR * 5, row('What is "t\u012bla"?')]))


# The letters of nine orthographies, in words that use them as they are used there.
ORTHOGRAPHIES = {
    "French": "être même forêt île âme hôpital où là été père mère cœur sœur maïs naïf août dîner gâteau ça leçon",
    "German": "schön größe straße müde häuser über weiß fuß tür ähnlich öl küche bär grün heiß",
    "Turkish": "ışık ırmak kapı yazı güneş şimdi çok ağaç dağ göz kız kâğıt hâlâ rüzgâr İzmir İstanbul iyi bir için",
    "Czech": "dům kůň řeka dítě město ještě čtyři šest žena ďábel ťuká ňadra být svět něco růže",
    "Romanian": "și în să fără înainte pământ cuvânt câine pâine mână lână țară apă fată român împărat",
    "Portuguese": "mãe não irmã pão ângela âmbar distância relâmpago câmara ê você três avô põe coração",
    "Vietnamese": "sẽ cũng rõ ngõ nghĩa giữ vẽ dễ lễ mẫu sẵn ngã đã kể tế quế lũ ấy ước được những người là của và không",
    "Lakota": "wičháša šúŋka tȟatȟáŋka čhaŋ pȟahíŋ kȟáta ǧí wóǧa ȟé žilá miní wakȟáŋ hoǧáŋ šla",
    "Yoruba": "ọ̀rọ̀ ẹ̀kọ́ ilé ọmọ ọkùnrin ìyá òṣùpá ṣe ṣùgbọ́n wọ́n jẹ sọ gbọ́ fẹ́ lọ",
    "Guarani": "peẽ mitã ñande tetã porã michĩ pytã morotĩ hũ tĩ kũ sỹ hyvĩ g\u0303uahẽ ag\u0303a mba'e",
}


@pytest.mark.parametrize("language", ORTHOGRAPHIES)
@pytest.mark.parametrize("count", [200, 2000])
def test_other_orthographies_are_left_alone(language, count):
    words = ORTHOGRAPHIES[language].split()
    weights = [1 / rank for rank in range(2, len(words) + 2)]  # Zipf: most of them are rare
    rng = random.Random(f"{language} {count}")
    rows = []
    for _ in range(count):
        first, second, third = rng.choices(words, weights, k=3)
        rows.append(row(f'What does "{first}" mean?', f"Compare `{second}` and '{third}', both in the dictionary."))
    found = findings(inspect(rows))
    assert not found.keys() & {"look_alikes", "mojibake"}


def as_latin_1(text):
    return text.encode().decode("latin-1")


def as_windows_1252(text):
    import ftfy.bad_codecs

    ftfy.bad_codecs.ok()
    return text.encode().decode("sloppy-windows-1252")


@pytest.mark.parametrize("wrong", [as_latin_1, as_windows_1252])
@pytest.mark.parametrize("form", ["tâlo", "mîva", "vûda", "luẖe", "maṯo", "rôna", "“talo”", "don’t", "café"])
def test_mojibake(tmp_path, wrong, form):
    # So many rows that the ã of a misread î would be a look-alike of â.
    rows = [{"question": item.question, "answer": item.answer} for item in [*REGULAR * 5, row('What is "rôna"?')]]
    rows.append({"question": f"What is {wrong(form)} here?", "answer": "A word, and mîva."})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    rowset = load_rows(path)
    section = find(rowset, annotate(rowset.rows))
    found = findings(section)["mojibake"]
    assert (found.severity, found.row_ids) == (FAILURE, (f"rows.jsonl:{len(rows)}",))
    if form == "don’t" and wrong is as_latin_1:  # â and two controls, which reading removed
        assert "U+0080, U+0099" in found.details[0]
    elif form != "“talo”":
        assert found.details[0].endswith(f" is {form}")
        assert found.examples[0]["should_be"] == form
    assert "look_alikes" not in findings(section) and not section.figures["look_alikes"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "", " ", "“", "'", '"', "(", "`", "-"]),
            st.text(alphabet="âîûôṯẖtalohm'", min_size=1, max_size=8),
            st.sampled_from([str, str.capitalize, str.upper]),
            st.sampled_from([" ", "” ", "' ", '", ', ".) ", "`: ", "\u00a0", "…\n", "–", "!"]),
        ),
        max_size=12,
    )
)
def test_the_letters_of_the_language_are_no_mojibake(words):
    text = "".join(f" {before}{case(word)}{after}" for before, word, case, after in words)
    assert "mojibake" not in findings(inspect([*REGULAR[:5], row(f"So {text}.")]))


def test_capitals_in_quotes_are_no_mojibake():
    assert "mojibake" not in findings(inspect([*REGULAR, row("'IRM\u00c3' and 'AMANH\u00c3' in Portuguese")]))


def test_a_file_that_is_mojibake_throughout():
    found = findings(inspect([row(as_windows_1252(item.question), as_windows_1252(item.answer)) for item in REGULAR]))
    assert found["mojibake"].count == len(REGULAR)
    assert "look_alikes" not in found


def test_irregular_characters_are_noted():
    rows = [row("It's tâlo"), row("mîva"), row("dada'vi means it's so", lexemes=["dada'vi"]), row("nothing")]
    irregular = {
        "0": ("apostrophe U+2019", "not NFC"),
        "1": ("invisible U+00AD", "invisible U+200B", "line end"),
        "2": ("apostrophe U+02BC", "apostrophe U+2019"),
        "gone": ("not NFC",),  # a row that was left out
    }
    section = inspect(rows, irregular)
    found = findings(section)
    assert {kind: (item.severity, item.row_ids, item.details) for kind, item in found.items()} == {
        "not_nfc": (NOTE, ("0",), ("",)),
        "invisible_characters": (NOTE, ("1",), ("U+00AD, U+200B",)),
        "apostrophe_variants": (
            NOTE,
            ("0", "2"),
            ("U+2019; in English only", "U+02BC, U+2019; the row's forms with an apostrophe: dada'vi"),
        ),
    }
    assert "(U+02BC in 1, U+2019 in 2)" in found["apostrophe_variants"].message
    assert "1 of the rows have a form" in found["apostrophe_variants"].message
    assert section.figures["irregular"] == {
        "apostrophe U+02BC": 1,
        "apostrophe U+2019": 2,
        "invisible U+00AD": 1,
        "invisible U+200B": 1,
        "line end": 1,
        "not NFC": 1,
    }


def test_diacritic_pairs():
    rows = [row("?", "!", ["tâlo"])] * 5 + [row("?", "!", ["Talo", "mîva"])] + [row("?", "!", ["miva"])]
    rows += [row("?", "!", ["luẖe", "vûda"]), row("?", "!", ["luhe"])]
    section = inspect(rows, glosses={"luẖe": "to swim", "luhe": "to run", "mîva": "to rest", "miva": "to rest"})
    assert section.figures["diacritic_groups"] == [
        {
            "without_diacritics": "talo",
            "rows": 6,
            "reading": "possible misspelling",
            "forms": [{"form": "tâlo", "rows": 5, "gloss": None}, {"form": "talo", "rows": 1, "gloss": None}],
        },
        {
            "without_diacritics": "luhe",
            "rows": 2,
            "reading": "possible minimal pair",
            "forms": [{"form": "luhe", "rows": 1, "gloss": "to run"}, {"form": "luẖe", "rows": 1, "gloss": "to swim"}],
        },
        {
            "without_diacritics": "miva",
            "rows": 2,
            "reading": "open",
            "forms": [{"form": "miva", "rows": 1, "gloss": "to rest"}, {"form": "mîva", "rows": 1, "gloss": "to rest"}],
        },
    ]
    (found,) = section.findings
    assert (found.kind, found.severity, found.count, found.total, found.unit) == (
        "diacritic_pairs",
        NOTE,
        6,
        7,
        "forms",
    )
    assert found.row_ids == ()


def test_capitals_are_their_letters():
    letters = inspect([row("?", "!", ["\u0130va", "H\u0331A", "STRA\u00dfE"])]).figures["letters"]
    assert {item["letter"]: item["in_forms"] for item in letters if item["in_forms"]} == {
        **{"a": 3, "s": 1, "e": 1, "i": 1, "r": 1, "t": 1, "v": 1, "\u00df": 1, "\u1e96": 1}
    }


def test_clean_prose_and_no_rows():
    rows, _ = prose_rows(PlantedLanguage(3, 200), 400, 3)
    section = inspect(rows)
    assert findings(section).keys() <= {"diacritic_pairs"}
    json.dumps(section.figures)
    empty = inspect([])
    assert empty.findings == [] and empty.figures["letters"] == []


# What a writer with another keyboard, a copied text or bad character recognition makes of a letter.
SLIPS = {
    "a": "\u0430\u0251", "o": "\u043e\u03bf0", "i": "\u0456\u0131", "l": "1", "e": "\u0435\uff45", "h": "\u04bb",
    "â": "\u00e3\u0101\u01ce", "î": "\u0129\u012b\u01d0", "û": "\u0169\u016b\u01d4", "ẖ": "\u0127", "ṯ": "\u0167",
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
def test_slips_in_a_twentieth_of_the_rows_are_found(seed):
    rows = annotate(prose_rows(PlantedLanguage(seed, 400), 800, seed)[0])
    rng = random.Random(seed)
    faulty = {}
    for item in rng.sample(rows, len(rows)):
        form = rng.choice(item.lexemes)
        at = rng.randrange(len(form))
        if form[at] in SLIPS and form in item.answer and len(faulty) < 40:
            slip = form[:at] + rng.choice(SLIPS[form[at]]) + form[at + 1 :]
            faulty[item.id] = row(item.question, item.answer.replace(form, slip))
    section = inspect([replace(faulty.get(item.id, item), lexemes=[]) for item in rows])
    planted = {str(number) for number, item in enumerate(rows) if item.id in faulty}
    found = set(findings(section)["look_alikes"].row_ids)
    assert found <= planted
    assert len(found) >= 0.95 * len(planted)


def test_the_same_whatever_the_hash_seed():
    code = (
        "import json\n"
        "from tests.test_orthography import REGULAR, inspect, row\n"
        "section = inspect([*REGULAR, row('t\\u0101l\\u043e t\\u00e2l0'), row('m\\u00c3\\u00aeva')])\n"
        "print(json.dumps([section.figures, [vars(finding) for finding in section.findings]]))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] and "look_alikes" in runs[0]


def test_import_is_light():
    code = "import sys, stoney_rl.inspection.orthography; print({'numpy', 'ftfy', 'confusable_homoglyphs'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


@pytest.mark.real_data
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no real rows here: set STONEY_REAL_DATA")
def test_real_rows():
    rowset = load_rows(REAL_DATA)
    section = find(rowset, annotate(rowset.rows))
    assert findings(section).keys() == {"diacritic_pairs"}
    beyond_ascii = {item["letter"] for item in section.figures["letters"] if not item["letter"].isascii()}
    assert beyond_ascii == {unicodedata.normalize("NFC", letter) for letter in ("â", "î", "û", "ṯ", "ẖ")}
    assert len(section.figures["diacritic_groups"]) < 20
