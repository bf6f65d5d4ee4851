"""The page of errors: complete, self-contained, and safe whatever an answer holds. All words are of the planted language."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from stoney_rl.errors import StoneyError
from stoney_rl.lexicon import LexiconEntry
from stoney_rl.metrics import error_page, errors

ATTESTED = errors.Attested.of(
    [
        LexiconEntry("tâlo", stem="tâlo", segmentation="tâlo", pos=(("verb", 1),)),
        LexiconEntry("tâloṯel", stem="tâlo", segmentation="tâlo-ṯel", pos=(("verb", 1),)),
        LexiconEntry("mîva"),
    ]
)
HOSTILE = "</script><script>document.title='changed'</script><img src=x onerror=alert(1)> <b>\u2028 & \"'"


def row(number, prediction, *forms, seen=False):
    reference = " ".join(forms) or "to gather"
    return {
        "id": f"row-{number}", "prompt": f"Question {number}?", "reference": reference, "prediction": prediction,
        "seen": seen, "forms": list(forms) or None, "lexemes": ["tâlo"], "truncated": False,
    }  # fmt: skip


BASE = [row(1, HOSTILE, "tâloṯel"), row(2, None, "tâlo"), row(3, "to gather"), row(4, "mîve", "tâlo", seen=True)]
TUNED = [
    row(1, "taloṯel", "tâloṯel"),
    row(2, "tâlo", "tâlo"),
    row(3, "?"),
    row(4, "tâlо", "tâlo", seen=True),  # Cyrillic о
]


def classified(**answers):
    return answers, {name: errors.classify(rows, ATTESTED) for name, rows in answers.items()}


class Page(HTMLParser):
    """The elements of a page, the addresses they point to, and the texts of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.scripts, self.title = [], [], {}, ""
        self.inside = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.addresses += [attributes[key] for key in ("src", "href", "action") if key in attributes]
        self.inside = attributes.get("id", "") if tag == "script" else tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, text):
        if self.inside == "title":
            self.title += text
        elif self.inside is not None:
            self.scripts[self.inside] = self.scripts.get(self.inside, "") + text


def test_every_row_of_every_model_is_in_the_page():
    answers, found = classified(base=BASE, grpo=TUNED)
    data = json.loads(Page(error_page.render(answers, found, title="t")).scripts["data"])
    assert data["systems"] == ["base", "grpo"]
    assert data["rows"][3] == {
        "id": "row-4", "asked": "Question 4?", "expected": "tâlo", "seen": "seen", "pos": "verb", "kind": "form wanted",
    }  # fmt: skip
    base, grpo = data["answers"]
    assert [one["label"] for one in base] == ["invented form", "unscored", "no form asked", "invented form"]
    assert [one["label"] for one in grpo] == ["diacritic only", "hit", "no form asked", "look-alike letter"]
    assert (base[0]["text"], base[1]["text"]) == (HOSTILE, None)
    assert (grpo[0]["wanted"], grpo[0]["given"]) == ("tâloṯel", "taloṯel")
    assert base[3]["near"] == [{"given": "mîve", "form": "mîva", "edits": 1}]
    assert "near" not in grpo[0] and "wanted" not in grpo[1]


def test_hostile_text_stays_text_and_nothing_is_fetched():
    answers, found = classified(**{"<i>base</i>": BASE})
    text = error_page.render(answers, found, title="<script>alert(2)</script>")
    page = Page(text)
    assert page.tags.count("script") == 3 and not {"img", "b", "i", "link", "iframe"} & set(page.tags)
    assert page.title == "<script>alert(2)</script>"
    assert page.addresses == []
    assert not re.search(r"https?:|url\(|@import|\bfetch\(|XMLHttpRequest|innerHTML|\u2028", text)


def test_the_table_counts_what_occurs():
    _, found = classified(base=BASE, grpo=TUNED)
    lines = error_page._class_rows(found)
    assert [(line["answer"], line["base"], line["grpo"]) for line in lines] == [
        ("hit", 0, 1),
        ("diacritic only", 0, 1),
        ("look-alike letter", 0, 1),
        ("invented form", 2, 0),
        ("no form asked", 1, 1),
        ("unscored", 1, 0),
    ]


def test_the_page_has_the_look_of_the_inspection():
    from stoney_rl.inspection.html import TEMPLATE

    style = error_page.house_style()
    assert "--ink" in style and "prefers-color-scheme" in style and style in TEMPLATE.read_text(encoding="utf-8")


def test_mismatched_systems_are_refused():
    answers, found = classified(base=BASE, grpo=TUNED)
    with pytest.raises(StoneyError, match="no system"):
        error_page.render({}, {}, title="t")
    with pytest.raises(StoneyError, match="'grpo' are not those of 'base'"):
        error_page.render(answers | {"grpo": TUNED[:2]}, found, title="t")
    with pytest.raises(StoneyError, match="'grpo' are not those of 'base'"):
        error_page.render(answers, {"base": found["base"]}, title="t")


def test_the_file_is_whole_or_not_there(tmp_path):
    answers, found = classified(base=BASE)
    path = error_page.write(tmp_path / "errors.html", answers, found, title="t")
    assert path.read_text(encoding="utf-8") == error_page.render(answers, found, title="t")
    assert [one.name for one in tmp_path.iterdir()] == ["errors.html"]
    with pytest.raises(StoneyError, match="can't write .*choose a folder that exists"):
        error_page.write(tmp_path / "missing" / "errors.html", answers, found, title="t")


SETTINGS = [
    {},
    {"label": "", "system": "base"},
    {"search": "taloṯel"},
    {"search": "taloṯel", "exact": True},
    {"label": "look-alike letter"},
    {"label": "diacritic only"},
    {"search": "onerror"},
    {"label": "", "seen": "seen"},
]
TRY = """
const shown = [];
for (const setting of SETTINGS) {
  element.label.value = "*";
  for (const key of ["search", "system", "seen", "pos", "kind"]) element[key].value = "";
  element.exact.checked = Boolean(setting.exact);
  for (const key in setting) if (key !== "exact") element[key].value = setting[key];
  choose();
  shown.push([element.shown.textContent, ...[...element.answers.children].map(card => card.outerHTML)]);
}
const result = document.createElement("pre");
result.id = "result";
result.textContent = JSON.stringify(shown);
document.body.append(result);
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the chromium browser")
def test_search_filters_and_marks_in_a_browser(tmp_path):
    """The page's script in place of whose last call each of ``SETTINGS`` is tried."""
    answers, found = classified(base=BASE, grpo=TUNED)
    text = error_page.render(answers, found, title="t")
    assert text.count("\nchoose();\n") == 1
    path = tmp_path / "page.html"
    path.write_text(text.replace("\nchoose();\n", TRY.replace("SETTINGS", json.dumps(SETTINGS))), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()]
    document = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    result = re.search('<pre id="result">(.*?)</pre>', document, re.DOTALL)[1]
    shown = [cards for _, *cards in json.loads(html.unescape(result))]
    assert [len(cards) for cards in shown] == [4, 4, 2, 1, 1, 1, 1, 2]
    assert [counter for counter, *_ in json.loads(html.unescape(result))] == [
        f"{len(cards)} of 8 answers" for cards in shown
    ]
    [look_alike], [diacritic], [hostile] = shown[4:7]
    assert re.findall("<mark[^>]*>(.)</mark>", look_alike) == ["o", "о"] and "о is U+043E" in look_alike
    assert re.findall("<mark[^>]*>(.)</mark>", diacritic) == ["â", "a"]
    assert "&lt;img src=x" in hostile and "<img" not in hostile and "<mark" not in hostile
