"""The interpretability report: the contract, and the page in a real browser. All words are of the planted (invented) language;
all numbers are random or made up."""

import base64
import json
import re
import shutil
import zlib
from copy import deepcopy
from html.parser import HTMLParser

import numpy as np
import pytest

from stoney_rl.errors import StoneyError
from stoney_rl.interp import plots, report

HOSTILE = "</script><img src=x onerror=alert(1)> <!-- \"q\" & 'a' \u2028"
MODELS = ("base", "sft", "grpo")
WORDS = [
    ("The", ["The"]), ("verb", [" verb"]), ('"', [' "']), ("wûsilo", ["w", "û", "silo"]), ('"', ['"']), ("means", [" means"]),
    ("run", [" run"]), (HOSTILE, [HOSTILE]), ("so", [" so"]), ("liẖwûsilo", ["li", "ẖ (1/2)", "ẖ (2/2)", "w", "û", "silo"]),
]  # fmt: skip


def text(name):
    tokens, words = [], []
    for word, pieces in WORDS:
        words.append({"text": word, "start": len(tokens), "end": len(tokens) + len(pieces)})
        tokens += pieces
    return {"name": name, "tokens": tokens, "words": words}


def attention(rng, *shape):
    """Random causal patterns [..., query, key], most weight on the first token, as trained heads have it."""
    size = shape[-1]
    weights = np.exp(2 * rng.normal(size=(*shape, size))) * np.tri(size)
    weights[..., 0] += size
    return weights / weights.sum(-1, keepdims=True)


def grid(rng, shape, *, sign=False):
    mean = rng.normal(size=shape) if sign else rng.random(shape)
    q = rng.random(shape)
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "q": q, "found": q < 0.1}


def path(rng, layers, model):
    curve = 1 / (1 + np.exp(-np.arange(-3, 3)))
    chance = curve / 3
    nodes = [
        ("embed", "embedding", -1, 1),
        ("0.1", "head", 0, 1),
        ("MLP 0", "mlp", 0, 1),
        ("1.0", "head", 1, 1),
        ("1.2", "head", 1, 2),
        ("1.3", "head", 1, 2),
        ("MLP 1", "mlp", 1, 2),
        ("logits", "logits", layers, 2),
    ]
    nodes = [
        {"id": label, "label": label, "kind": kind, "layer": layer, "position": position, "value": value}
        for (label, kind, layer, position), value in zip(nodes, rng.normal(size=8), strict=True)
    ]
    edges = [
        ("embed", "0.1"),
        ("embed", "MLP 0"),
        ("0.1", "MLP 0"),
        ("0.1", "1.2"),
        ("MLP 0", "1.3"),
        ("0.1", "1.0"),
        ("1.2", "MLP 1"),
        ("MLP 1", "logits"),
        ("1.3", "logits"),
    ]
    return {
        "name": "affix", "model": model, "n": 24, "clean": "you run", "corrupt": "I run", "answer": "vuẖwûsilo", "wrong": "liẖwûsilo",
        "positions": ["elsewhere", "wûsilo", "last"], "nodes": nodes,
        "edges": [{"from": a, "to": b, "value": value} for (a, b), value in zip(edges, rng.normal(size=9), strict=True)],
        "faithfulness": {
            "sizes": [0, 1, 2, 4, 8, 16], "circuit": curve, "circuit_low": curve - 0.05, "circuit_high": curve + 0.05,
            "random": chance, "random_low": chance - 0.1, "random_high": chance + 0.1,
        },
    }  # fmt: skip


def example(layers=2, heads=4, steps=5):
    """Results with every section, and their arrays."""
    rng = np.random.default_rng(0)
    shape, size = (layers, heads), len(text("sample")["tokens"])
    rows = ["embedding", *map(str, range(layers))]
    positions = [word for word, _ in WORDS]

    def lens(kind):
        return {
            "top": [[f"{rng.choice(['wû', 'li', 'run', HOSTILE])}" for _ in positions] for _ in rows],
            "probability": rng.random((len(rows), len(positions))),
            "kl": 5 * rng.random((len(rows), len(positions)))
            if kind == "plain"
            else rng.random((len(rows), len(positions))),
        }

    results = {
        "title": "What SFT and GRPO changed: affixes of the planted language",
        "findings": [
            f"Made-up numbers for a test of the page. Two heads of layer 1 copy the stem; {HOSTILE}.",
            "No head of the base model does so, and none of a random model of its shape.",
        ],
        "about": {"Data": "data/planted, the invented language", "Pairs": "48, of 24 lexemes", "Seed": "0"},
        "models": [{"name": name, "checkpoint": f"checkpoints/{name}", "lineage": " → ".join(MODELS[: n + 1])} for n, name in enumerate(MODELS)],
        "layers": layers, "heads": heads,
        "trust": [
            {"name": "Same logits", "meaning": "The hooked model computes what the checkpoint computes; share of the largest logit.", "holds": "at most", "limit": 1e-4, "values": {"base": 2.1e-6, "sft": 2.4e-6, "grpo": 3e-3}},
            {"name": "Patching rank correlation", "meaning": "Attribution patching orders heads as true patching does.", "holds": "at least", "limit": 0.8, "values": {"base": 0.91, "sft": 0.93, "grpo": None}},
        ],
        "texts": [text("sample"), text("second")],
        "measures": [
            {"key": "entropy", "n": 48, "values": {name: grid(rng, shape) for name in MODELS}},
            {"key": "patching", "n": 48, "values": {name: grid(rng, shape, sign=True) for name in MODELS},
             "differences": [{"of": ["sft", "base"]} | grid(rng, shape, sign=True)]},
            {"key": "patching_words", "name": "patching by word", "unit": "share", "scale": "diverging", "tells": "where.", "cannot": "why.", "n": 48,
             "columns": positions, "values": {"sft": {"mean": rng.normal(size=(layers, len(positions)))}}},
        ],
        "lens": {"prompt": HOSTILE, "rows": rows, "positions": positions, "values": {name: {"plain": lens("plain"), "tuned": lens("tuned")} for name in MODELS}},
        "neurons": [
            {"model": "sft", "layer": 1, "neuron": number, "why": "highest attribution on one half of the pairs",
             "examples": [{"kind": kind, "words": positions, "values": rng.normal(size=len(WORDS)) * (3 if kind == "top" else 1)} for kind in ("top", "random") for _ in range(3)]}
            for number in (17, 5)
        ],
        "paths": [path(rng, layers, "base"), path(rng, layers, "sft")],
        "trace": {
            "model": "sft", "steps": [10 * step for step in range(steps)],
            "measures": [{"key": "induction", "values": np.linspace(0, 1, steps)[:, None, None] * rng.random((1, *shape))}, {"key": "sink", "values": rng.random((steps, *shape))}],
            "curves": [{"name": "lens depth", "unit": "layer", "values": np.linspace(layers, 1, steps)}],
            "texts": [text("probe")],
        },
    }  # fmt: skip
    arrays = {
        f"patterns/{name}/{model}": attention(rng, *shape, size) for name in ("sample", "second") for model in MODELS
    }
    arrays["trace/probe"] = attention(rng, steps, *shape, size)
    return results, arrays


def changed(mutate):
    results, arrays = example()
    mutate(results, arrays)
    return results, arrays


# The contract


def test_results_json_is_what_was_given(tmp_path):
    results, arrays = example()
    results["measures"][0]["values"]["base"]["mean"][1, 2] = np.nan
    path = report.write(tmp_path / "report.html", results, arrays)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["report.html", "results.json"] and path.is_file()
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert written == report.plain(results)
    assert written["measures"][0]["values"]["base"]["mean"][1][2] is None
    assert written["measures"][0]["values"]["sft"]["mean"][1][3] == pytest.approx(
        results["measures"][0]["values"]["sft"]["mean"][1, 3], rel=1e-5
    )


def unpacked(text):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)


def test_a_pattern_is_packed_as_the_roots_of_its_causal_half():
    golden = unpacked(report.pack("p", np.array([[[1.0, 0.0], [0.25, 0.75]]]), (1, 2)))
    assert golden.tolist() == [255, 128, 221]  # 255, 255 * 0.5 = 127.5, 255 * 0.866 = 220.8
    patterns = attention(np.random.default_rng(1), 2, 3, 20)
    causal = patterns[..., *np.tril_indices(20)]
    error = np.abs((unpacked(report.pack("p", patterns, (2, 3, 20))).reshape(2, 3, -1) / 255.0) ** 2 - causal)
    assert error.max() <= 0.004 and error[causal < 0.002].max() <= 2e-4


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (lambda r, a: r.pop("layers"), r"results: expected the key layers"),
        (lambda r, a: r.update(lens_view={}), r"results: expected only the keys title, .*lens_view"),
        (lambda r, a: r.update(title=7), r"results.title: expected a text, got '7'"),
        (lambda r, a: r["trust"][0]["values"].update(dpo=1.0), r"trust\[0\].values: expected models among base, sft, grpo, got 'dpo'"),
        (lambda r, a: r["trust"][0].update(holds="below"), r"trust\[0\].holds: expected 'at most' or 'at least', got 'below'"),
        (lambda r, a: r["measures"][0].update(key="saliency"), r"measures\[0\]: 'saliency' is not one of entropy, .*so give its name, unit"),
        (lambda r, a: r["measures"][0]["values"].update(sft={"mean": np.ones((2, 5))}), r"values.sft.mean\[0\]: expected 4 values along the axis 'column', got '5'"),
        (lambda r, a: r["measures"][2]["values"]["sft"].update(mean=np.ones((2, 4))), r"mean\[0\]: expected 10 values along the axis 'column', got '4'"),
        (lambda r, a: r["measures"][0]["values"]["sft"].update(found=[["yes"] * 4] * 2), r"found\[0\]\[0\]: expected a flag, got 'yes'"),
        (lambda r, a: r["lens"]["values"]["sft"]["tuned"].update(top=[["a"] * 10]), r"tuned.top: expected 3 values along the axis 'row', got '1'"),
        (lambda r, a: r["texts"][0]["words"].pop(), r"text 0 \(sample\): its words must hold each of its 17 tokens once"),
        (lambda r, a: r["paths"][0]["edges"].append({"from": "0.1", "to": "9.9", "value": 1.0}), r"paths\[0\].edges: expected ends among the nodes"),
        (lambda r, a: r["paths"][0]["nodes"][0].update(position=3), r"paths\[0\].nodes: expected a position, got '3'"),
        (lambda r, a: r["trace"]["measures"][0].update(values=np.ones((4, 2, 4))), r"trace.measures\[0\].values: expected 5 values along the axis 'step', got '4'"),
        (lambda r, a: a.pop("patterns/sample/grpo"), r"the array 'patterns/sample/grpo' is missing"),
        (lambda r, a: a.update({"patterns/samples/base": a["patterns/sample/base"]}), r"'patterns/samples/base' belongs to nothing; expected patterns/sample/base"),
        (lambda r, a: a.update({"patterns/sample/base": a["patterns/sample/base"][:, :3]}), r"has shape \(2, 3, 17, 17\), expected \(2, 4, 17, 17\)"),
        (lambda r, a: a.update({"patterns/sample/base": a["patterns/sample/base"].swapaxes(2, 3)}), r"'patterns/sample/base' is no causal attention"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path, mutate, message):
    results, arrays = changed(mutate)
    with pytest.raises(StoneyError, match=message):
        report.write(tmp_path / "report.html", results, arrays)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_and_a_missing_library_are_told(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(StoneyError, match="can't be written"):
        report.write(tmp_path / "file" / "report.html", *example())

    def missing(name):
        raise report.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(report.importlib.metadata, "distribution", missing)
    with pytest.raises(StoneyError, match=r"circuitsvis is not installed; pip install -r requirements\.txt"):
        report.render(*example())


def test_the_size_of_a_full_report(tmp_path):
    """Random patterns don't deflate: real ones take less."""
    rng, size = np.random.default_rng(0), 60
    tokens = {"name": "long", "tokens": ["û"] * size}
    results = {
        "title": "t",
        "findings": [],
        "models": [{"name": name, "checkpoint": ""} for name in MODELS],
        "layers": 30,
        "heads": 9,
        "texts": [tokens],
    }
    arrays = {f"patterns/long/{name}": attention(rng, 30, 9, size) for name in MODELS}
    path = report.write(tmp_path / "report.html", results, arrays)
    assert path.stat().st_size < 3_000_000
    results["texts"] = [tokens, tokens | {"name": "longer"}]
    arrays |= {f"patterns/longer/{name}": attention(rng, 30, 9, size) for name in MODELS}
    path.unlink()
    report.MAX_BYTES, limit = 4_000_000, report.MAX_BYTES
    try:
        with pytest.raises(StoneyError, match=r"would be 4\.\d MB, .*give fewer or shorter texts"):
            report.write(path, results, arrays)
    finally:
        report.MAX_BYTES = limit
    assert not path.exists()


class Page(HTMLParser):
    """The elements of a page with their attributes, and the texts inside scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.inside, self.texts, self.visible = [], [], "", {}, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside in ("script", "style"):
            self.texts.setdefault(self.inside, []).append(data)
        else:
            self.visible += data


def test_the_page_asks_for_nothing_and_text_stays_text():
    page = Page(report.render(*example()))
    assert page.tags.count("script") == 3 and not {"img", "link", "iframe", "object", "base"} & set(page.tags)
    pointing = [
        (tag, key, value)
        for tag, key, value in page.attributes
        if key in ("src", "href", "action", "srcset", "data", "poster")
    ]
    assert pointing and all(key == "href" and value.startswith("#") for _, key, value in pointing)
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]
    policy = dict(
        pair[1:] for pair in page.attributes if pair[0] == "meta" and pair[1] == "content" and "default-src" in pair[2]
    )
    assert policy["content"].startswith("default-src 'none'; ") and "http" not in policy["content"]
    assert not re.search(r"url\(|@import|https?:", page.texts["style"][0])
    data, bundle, script = page.texts["script"]
    assert "sourceMappingURL" not in bundle and "createRoot" in bundle
    assert not re.search(r"\bfetch\(|XMLHttpRequest|innerHTML|https?:(?!//www\.w3\.org/2000/svg)|\beval\(", script)
    assert json.loads(data)["texts"][0]["words"][7]["text"] == HOSTILE and "<" not in data and "\u2028" not in data
    assert HOSTILE in page.visible  # a finding


def test_what_is_missing_is_left_out_and_told():
    results, _ = example()
    results = {key: results[key] for key in ("title", "findings", "models", "layers", "heads", "measures")}
    page = Page(report.render(results, {}))
    assert "Left out, as nothing was measured for it: trust, attention, lens, neurons, path, training." in page.visible
    assert (
        page.tags.count("section") == 1 and page.tags.count("script") == 2
    )  # no CircuitsVis where nothing is drawn by it
    assert "Left out" not in Page(report.render(*example())).visible


def test_the_trust_panel_judges_each_value():
    page = Page(report.render(*example())).visible
    assert "1 of the values below breaks the limit: grpo." in page and "1 was not measured." in page
    assert [page.count(verdict) for verdict in ("✓ holds", "✗ broken")] == [4, 1]
    limits = {"limit": 0.8, "values": {"a": 0.8, "b": 0.9, "c": 0.7, "d": None}}
    assert report._verdict(limits | {"holds": "at most"})["passed"] == {"a": True, "b": False, "c": True, "d": None}
    assert report._verdict(limits | {"holds": "at least"})["passed"] == {"a": True, "b": True, "c": False, "d": None}
    whole, _ = changed(lambda r, a: [check["values"].update(grpo=check["values"]["sft"]) for check in r["trust"]])
    assert "Every value that was measured keeps its limit." in Page(report.render(whole, example()[1])).visible


def test_every_measure_says_what_it_tells_and_cannot():
    for key, measure in report.MEASURES.items():
        assert set(measure) == {"name", "unit", "scale", "tells", "cannot"} and all(measure.values()), key
        assert measure["scale"] in ("sequential", "diverging")


def test_pictures_are_drawn_the_same_each_time(tmp_path):
    results, arrays = example()
    results["texts"][0]["name"] = "a/b"
    arrays = {name.replace("/sample/", "/a/b/"): values for name, values in arrays.items()}
    results["measures"][0]["values"]["base"]["mean"][0, 0] = np.nan
    results["lens"]["values"].pop("grpo")
    drawn = plots.draw(results, arrays, tmp_path)
    assert list(drawn) == [
        "heads-entropy", "heads-patching", "heads-patching_words",
        *(f"attention-{text}-{model}" for text in ("a_b", "second") for model in MODELS),
        "lens-base", "lens-sft", "path-affix-base", "path-affix-sft", "training",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn.values())
    first = drawn["heads-patching"].read_bytes()
    only = {key: results[key] for key in ("title", "findings", "models", "layers", "heads", "measures")}
    assert plots.draw(only, {}, tmp_path)["heads-patching"].read_bytes() == first
    with pytest.raises(StoneyError, match="can't write"):
        plots.draw(only, {}, tmp_path / "missing")


# The page in a browser

needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs the browser chromium and its chromedriver",
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium (requirements-dev.txt)")
    options = selenium.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
        "--disable-component-update", "--no-first-run", "--window-size=1400,1000", f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return report.write(tmp_path_factory.mktemp("report") / "report.html", *example()).as_uri()


class Browser:
    """What a reader does and sees. ``js``: a value of the page; ``settle``: what CircuitsVis draws is there."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get_log("browser"), driver.get_log("performance")
        driver.get(address)
        self.wait("return 'ready' in document.body.dataset")
        self.wait(
            "return !find('attention-panels') || document.querySelector('#attention-panels canvas')?.clientWidth > 100"
        )

    def js(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def wait(self, script, seconds=20):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, poll_frequency=0.05).until(
            lambda driver: driver.execute_script(script)
        )

    def click(self, selector):
        self.driver.find_element("css selector", selector).click()

    def pick(self, name, label):
        """Choose a radio button or an option of a menu by its text."""
        found = self.js(
            """const [name, label] = arguments, menu = document.querySelector(`select#${name}`);
            if (menu) { const option = [...menu.options].find(option => option.text === label); if (!option) return false;
                        menu.value = option.value; menu.selectedIndex = option.index; menu.dispatchEvent(new Event("change")); return true; }
            const choice = [...document.querySelectorAll(`input[name="${name}"]`)].find(input => input.parentElement.textContent === label);
            choice?.click(); return Boolean(choice);""",
            name, label,
        )  # fmt: skip
        assert found, (name, label)

    def texts(self, selector):
        return self.js("return [...document.querySelectorAll(arguments[0])].map(each => each.textContent)", selector)

    def cell(self, grid, row, column):
        return self.js("return document.getElementById(arguments[0]).ariaLabel", f"{grid}-{row}-{column}")

    def colours(self, selector):
        return self.js(
            "return [...document.querySelectorAll(arguments[0])].map(each => each.style.backgroundColor)", selector
        )

    def picture(self, place, *others):
        """The drawn pattern, as soon as something has been painted that is none of ``others``."""
        from selenium.webdriver.support.ui import WebDriverWait

        script = """const canvas = document.querySelector(arguments[0] + ' canvas'); if (!canvas?.width) return null;
            const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
            return pixels.some(value => value) ? canvas.toDataURL() : null;"""
        shown = lambda driver: (found := driver.execute_script(script, place)) not in (None, *others) and found  # noqa: E731
        return WebDriverWait(self.driver, 20, poll_frequency=0.05).until(shown)

    def heap(self):
        """Megabytes in use by the page."""
        self.driver.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
        return self.driver.execute_cdp_cmd("Runtime.getHeapUsage", {})["usedSize"] / 1e6


@pytest.fixture
def browser(driver, address):
    return Browser(driver, address)


@needs_browser
def test_the_browser_asks_for_nothing_and_complains_of_nothing(browser, address):
    for view in ("side by side", "minus base", "one"):
        browser.pick("view", view)
    for name in MODELS:
        browser.pick("model", name)
    browser.picture("#attention-panels")
    events = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # The browser's own start page, chrome://new-tab-page, may still be loading beside ours.
    assert [each["request"]["url"] for each in asked if each["documentURL"] == address] == [address]
    assert not [each for each in asked if not each["request"]["url"].startswith(("file:", "chrome", "data:"))]
    assert browser.driver.get_log("browser") == []
    assert browser.js("return document.querySelectorAll('img').length") == 0
    assert browser.js("return find('failure').hidden")


@needs_browser
def test_words_are_shown_letter_by_letter(browser):
    assert browser.texts("#attention-words button") == [word for word, _ in WORDS]
    browser.pick("byWord", "tokens")
    shown = browser.texts("#attention-words button")
    assert shown[3:6] == [" w".strip(), "û", "silo"] and "ẖ (1/2)" in shown and len(shown) == 17


def by_word(pattern, words):
    """Query tokens averaged, key tokens summed: the definition, with loops."""
    return np.array(
        [
            [np.mean([sum(pattern[q, k["start"] : k["end"]]) for q in range(w["start"], w["end"])]) for k in words]
            for w in words
        ]
    )


@needs_browser
def test_a_word_shows_where_each_head_looks(browser):
    results, arrays = example()
    words = results["texts"][0]["words"]
    patterns = arrays["patterns/sample/base"]
    for layer, head in ((0, 0), (1, 3)):
        weights = by_word(patterns[layer, head], words)
        best = 1 + np.argmax(weights[9, 1:9])  # from the last word: not the first word, not itself
        label = browser.cell("attention-0", layer, head)
        assert label.startswith(f"layer {layer}, head {head}, base: “{WORDS[best][0]}” ")
        assert float(label.split()[-1]) == pytest.approx(weights[9, best], abs=0.01)
    before = browser.colours("#attention-panels td")
    browser.click("#word-3")
    assert browser.colours("#attention-panels td") != before
    assert browser.texts("#attention-strongest h3") == ["base: “wûsilo” looks at"]
    assert browser.js("return [...document.querySelectorAll('[aria-pressed=true]')].map(each => each.id)") == ["word-3"]
    browser.pick("direction", "is looked at by")
    weights = by_word(patterns[1, 3], words)
    best = 4 + np.argmax(weights[4:, 3])
    assert browser.cell("attention-0", 1, 3).startswith(f"layer 1, head 3, base: “{WORDS[best][0]}” ")
    browser.pick("byWord", "tokens")  # the same word, by its last token
    assert browser.texts("[aria-pressed=true]") == ["silo"]


@needs_browser
def test_a_head_shows_its_pattern(browser):
    results, arrays = example()
    browser.click("#attention-0-1-3")
    first = browser.picture("#attention-panels")
    assert browser.texts("#attention-panels figcaption")[0].startswith("layer 1, head 3, base")
    browser.click("#attention-0-0-2")
    second = browser.picture("#attention-panels", first)
    assert browser.texts("#attention-panels figcaption")[0].startswith("layer 0, head 2, base")
    weights = by_word(arrays["patterns/sample/base"][0, 2], results["texts"][0]["words"])
    titles = browser.js("return [...document.querySelectorAll('#attention-words button')].map(each => each.title)")
    assert [float(title.split()[-1]) for title in titles] == pytest.approx(weights[9].tolist(), abs=0.01)
    browser.pick("model", "sft")
    assert browser.picture("#attention-panels", first, second)
    browser.pick("model", "base")
    browser.click("#attention-0-1-3")
    browser.wait("return true")
    assert browser.picture("#attention-panels", second) == first  # the same head again, the same picture
    browser.pick("model", "sft")
    browser.pick("view", "side by side")
    assert browser.texts("#attention-panels .panel:not([hidden]) > h3") == list(MODELS)
    browser.pick("view", "minus base")
    assert browser.texts("#attention-panels .panel:not([hidden]) > h3") == ["sft − base"]
    browser.pick("byWord", "tokens")
    sizes = browser.wait(
        "return [...document.querySelectorAll('#attention-panels .panel:not([hidden]) canvas')].map(canvas => canvas.clientWidth)"
    )
    assert len(sizes) == 1 and sizes[0] > 300  # drawn in full, in whatever order views were chosen
    browser.pick("model", "base")  # base minus base is nothing anywhere
    assert browser.cell("attention-0", 1, 1).endswith(" 0")


@needs_browser
def test_drawing_again_and_again_takes_no_more_memory(browser):
    """Thirty charts that are never let go take about 7 MB."""
    browser.picture("#attention-panels")
    before = browser.heap()
    for step in range(30):
        browser.js("set({ head: [arguments[0] % 2, arguments[0] % 4] })", step)
        browser.wait("return new Promise(done => setTimeout(() => done(true), 20))")
    assert browser.heap() - before < 1.5


@needs_browser
def test_keys_walk_the_grid_and_choose(browser):
    from selenium.webdriver.common.keys import Keys

    def press(key):
        browser.driver.switch_to.active_element.send_keys(key)
        return browser.js("return document.activeElement.id")

    browser.js("find('measure-0-0-1').focus()")
    assert [press(key) for key in (Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)] == [
        "measure-0-1-1",
        "measure-0-1-2",
        "measure-0-1-2",
    ]
    assert browser.texts("#measure-details h3") == ["layer 1, head 2"]
    assert press(Keys.ENTER) == "measure-0-1-2"  # drawn again, and the focus is where it was
    assert browser.js("return document.activeElement.ariaSelected") == "true"
    assert browser.texts("#attention-panels figcaption")[0].startswith("layer 1, head 2")
    stops = browser.js("return document.querySelectorAll('#measure-grids td[tabindex=\"0\"]').length")
    assert stops == 1  # one stop of the tabulator a grid


@needs_browser
def test_measures_models_and_differences(browser):
    results, _ = example()
    entropy, patching, words = (report.plain(measure) for measure in results["measures"])

    def number(text):
        return float(text.replace("−", "-"))

    def value(label):
        return number(re.search(r": (−?[\d.e−]+)", label)[1])

    assert value(browser.cell("measure-0", 1, 2)) == pytest.approx(entropy["values"]["base"]["mean"][1][2], rel=6e-3)
    found = browser.js("return [...document.querySelectorAll('#measure-grids td.found')].map(each => each.dataset.at)")
    assert found == [
        f"{layer},{head}" for layer in range(2) for head in range(4) if entropy["values"]["base"]["found"][layer][head]
    ]
    tells = browser.texts("#measure-tells")
    before = browser.colours("#measure-grids td")
    browser.pick("measure", "patching effect")
    assert browser.texts("#measure-tells") != tells and browser.colours("#measure-grids td") != before
    browser.pick("model", "sft")
    assert value(browser.cell("measure-0", 0, 1)) == pytest.approx(patching["values"]["sft"]["mean"][0][1], rel=6e-3)
    browser.pick("view", "minus base")  # as measured, with its interval
    measured = patching["differences"][0]
    label = browser.cell("measure-0", 1, 0)
    assert value(label) == pytest.approx(measured["mean"][1][0], rel=6e-3)
    low, high = map(number, re.search(r"\[(.*), (.*)\]", label).groups())
    assert (low, high) == pytest.approx((measured["low"][1][0], measured["high"][1][0]), rel=6e-3)
    browser.pick("model", "base")
    browser.pick("view", "minus sft")  # turned round
    label = browser.cell("measure-0", 1, 0)
    assert value(label) == pytest.approx(-measured["mean"][1][0], rel=6e-3)
    assert list(map(number, re.search(r"\[(.*), (.*)\]", label).groups())) == pytest.approx([-high, -low], rel=6e-3)
    browser.pick("model", "grpo")  # not measured: of the means, and said so
    expected = patching["values"]["grpo"]["mean"][1][0] - patching["values"]["sft"]["mean"][1][0]
    assert value(browser.cell("measure-0", 1, 0)) == pytest.approx(expected, rel=6e-3)
    assert "no interval measured" in browser.texts("#measure-details")[0]
    browser.pick("view", "one")
    browser.pick("measure", "patching by word")
    assert browser.texts("#measure-grids .panel") == ["grponot measured"]
    browser.pick("model", "sft")
    assert browser.texts("#measure-grids thead th")[1:] == words["columns"]


@needs_browser
def test_the_lens_switches(browser):
    results, _ = example()
    lens = report.plain(results["lens"])["values"]
    assert browser.texts("#lens-tables td")[:3] == lens["base"]["plain"]["top"][0][:3]
    plain = browser.colours("#lens-tables td")
    browser.pick("lens", "tuned")
    assert browser.texts("#lens-tables td")[-1] == lens["base"]["tuned"]["top"][-1][-1]
    tuned = browser.colours("#lens-tables td")
    browser.pick("shade", "KL to the last row (nats)")
    assert len({tuple(each) for each in (plain, tuned, browser.colours("#lens-tables td"))}) == 3
    browser.pick("model", "grpo")
    browser.pick("view", "minus sft")
    assert browser.texts("#lens-tables h3") == ["sft, tuned", "grpo, tuned"]
    ringed = browser.js("return [...document.querySelectorAll('#lens-tables td.found')].length")
    assert ringed == sum(
        a != b
        for one, other in zip(lens["sft"]["tuned"]["top"], lens["grpo"]["tuned"]["top"], strict=True)
        for a, b in zip(one, other, strict=True)
    )


@needs_browser
def test_neurons_and_paths_belong_to_a_model(browser):
    results, _ = example()
    assert browser.texts("#neuron-controls") == ["No neurons of base were looked at."]
    browser.pick("model", "sft")
    first = browser.texts("#neuron-examples .example")
    assert len(first) == 6 and HOSTILE in first[0]
    values = report.plain(results["neurons"][0]["examples"][0]["values"])
    peak = max(values, key=abs)
    assert float(browser.texts("#neuron-examples .peak")[0].replace("−", "-")) == pytest.approx(peak, rel=6e-3)
    assert browser.texts("#neuron-examples .example .at")[0] == WORDS[values.index(peak)][0]
    browser.pick("neuron", "layer 1, neuron 5")
    assert browser.texts("#neuron-examples .example") != first
    assert len(browser.texts("#path-graph .node")) == 8 and len(browser.texts("#path-graph .edge")) == 9
    browser.js("document.querySelector('[data-node=\"MLP 0\"]').dispatchEvent(new Event('mouseenter'))")
    lit = browser.js(
        "return [...document.querySelectorAll('.edge:not(.dim)')].map(edge => [edge.dataset.from, edge.dataset.to])"
    )
    assert lit == [["embed", "MLP 0"], ["0.1", "MLP 0"], ["MLP 0", "1.3"]]
    assert (
        browser.texts("#path-details")[0].startswith("MLP 0 at “wûsilo”:")
        and "2 edges in, 1 out" in browser.texts("#path-details")[0]
    )
    down = browser.js(
        "return [...document.querySelectorAll('.node rect')].map(rect => [rect.parentElement.dataset.node, rect.y.baseVal.value])"
    )
    height = dict(down)
    assert (
        height["embed"]
        < height["0.1"]
        < height["MLP 0"]
        < height["1.0"]
        == height["1.3"]
        < height["MLP 1"]
        < height["logits"]
    )
    assert (
        len(browser.texts("#path-faithfulness polyline")) == 2 and len(browser.texts("#path-faithfulness polygon")) == 2
    )
    browser.pick("model", "grpo")
    assert browser.texts("#path-controls") == ["No path was traced in grpo."] and not browser.texts("#path-graph .node")


@needs_browser
def test_the_slider_goes_through_training(browser):
    from selenium.webdriver.common.keys import Keys

    results, _ = example()
    values = report.plain(results["trace"]["measures"][0]["values"])
    browser.click("#trace-1-2")
    assert browser.texts("#step-shown") == ["40 of 40"]
    last, colours = browser.picture("#trace-pattern"), browser.colours("#trace-grid td")
    browser.driver.find_element("id", "step").send_keys(Keys.ARROW_LEFT)
    assert browser.texts("#step-shown") == ["30 of 40"] and browser.js("return document.activeElement.id") == "step"
    assert browser.picture("#trace-pattern", last) and browser.colours("#trace-grid td") != colours
    label = browser.cell("trace", 1, 2)
    assert "update 30: induction score" in label and float(label.split()[-1]) == pytest.approx(
        values[3][1][2], rel=6e-3
    )
    assert len(browser.texts("#trace-curves svg")) == 2
    browser.pick("traced", "attention to the first token")
    assert "attention to the first token" in browser.cell("trace", 1, 2)


CONTRAST = """
const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function rgb(colour) { context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1); return [...context.getImageData(0, 0, 1, 1).data]; }
function luminance(colour) { const [r, g, b] = rgb(colour).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; }
function behind(element) { for (let at = element; at; at = at.parentElement) { const colour = getComputedStyle(at).backgroundColor; if (rgb(colour)[3] === 255) return colour; } return "white"; }
return [...document.querySelectorAll("p, h1, h2, h3, td, th, button, legend, .choice span, .example span, figcaption, dt, dd, a, li, summary")]
  .filter(element => element.innerText?.trim() && element.checkVisibility())
  .map(element => { const [a, b] = [luminance(getComputedStyle(element).color), luminance(behind(element))].sort((x, y) => y - x); return [(a + 0.05) / (b + 0.05), element.tagName + "." + element.className + " " + element.innerText.slice(0, 30)]; })
  .sort((x, y) => x[0] - y[0])[0];
"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_and_fits_in(browser, scheme):
    """WCAG 2.1's contrast of 4.5 wherever there is text, words on coloured cells too; no scrolling sideways at 800 or 400 px."""
    browser.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.pick("model", "sft")
    assert browser.js("return matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    contrast, where = browser.js(CONTRAST)
    assert contrast >= 4.5, where
    for width in (800, 400):
        browser.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        assert browser.js("return document.documentElement.scrollWidth") <= width
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_browser
def test_a_page_of_one_model_and_one_section(driver, tmp_path):
    results, _ = example()
    results = {key: deepcopy(results[key]) for key in ("title", "findings", "models", "layers", "heads", "measures")}
    results["models"] = results["models"][1:2]
    results["measures"] = [{"key": "sink", "n": 3, "values": {"sft": {"mean": [[0.1, None, 0.3, 0.4], [0, 0, 0, 0]]}}}]
    browser = Browser(driver, report.write(tmp_path / "report.html", results).as_uri())
    assert driver.get_log("browser") == [] and not browser.texts("#models input")
    assert browser.cell("measure-0", 0, 1).endswith("not scored")
    assert browser.js("return document.querySelectorAll('td.unscored').length") == 1
