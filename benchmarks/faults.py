"""Known faults in clean rows: what share of them the inspection finds, and what it finds where there is nothing.

    python benchmarks/faults.py --num_rows 2000 --seeds 0 1 2 3 4

The rows are English prose about the planted (invented) language, clean by construction. One kind of fault at a time is
put into --share of them, the records are written to a file and read as a stage reads them, and the sections of
`stoney_rl.inspection` look for it. Precision is the share of the rows found that are planted, recall the share of the
planted rows that are found. For a kind that concerns two rows (duplicates, contradictions) the planted row is the copy;
a finding that names the copy, its original or both counts once. The rows as they are show what each kind finds where
nothing was planted.

For `initial_letter_gap` letters are counted, not rows: each letter that begins enough words is left out in turn, about
18 a seed. Much fewer than 2000 rows have too few words to tell a gap from chance.

Writes --output, without the text of any row.
Exit codes: 0 done, 1 a bound is missed (--bound, or a finding in clean rows), 2 bad input, 130 interrupted.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: its own folder would hide the standard library's `inspect`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import random
import re
import statistics
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stoney_rl import checkpoints, cli, lexemes
from stoney_rl.data import Row, RowSet
from stoney_rl.errors import StoneyError
from stoney_rl.inspection.findings import Finding, Section
from stoney_rl.planted import PlantedLanguage
from stoney_rl.planted_prose import PARTS_OF_SPEECH, prose_rows
from stoney_rl.text import fold, words

GAP = "initial_letter_gap"
# Different words that begin with a letter, at least, and their share of all words: leaving out fewer is no gap that
# anyone could see. Vowels begin fewer in the planted language, where they begin adverbs only.
MIN_WORDS, MIN_SHARE = 20, 0.015

Record = dict[str, str]


@dataclass(frozen=True)
class Planted:
    """Records of a .jsonl file (id, question, answer), text as it would be typed, and what is wrong with them.

    truth: ids of the faulty rows, of a pair the later one; for ``initial_letter_gap`` the letter that begins no word.
    original_of: id of a copy -> id of the row it was made of.
    """

    records: list[Record]
    truth: frozenset[str]
    original_of: dict[str, str] = field(default_factory=dict)


def records_of(rows: Sequence[Row]) -> list[Record]:
    return [{"id": row.id, "question": row.question, "answer": row.answer} for row in rows]


def plant(rows: Sequence[Row], kind: str, share: float, seed: int) -> Planted:
    """``rows`` with faults of one ``kind`` in ``share`` of them (at least one), the same for the same seed.

    ``initial_letter_gap`` has no share: every row that mentions a word with the initial ``gap_letters(rows)[seed]`` is
    left out, counted on from the first letter again where ``seed`` is larger.
    Raises ``StoneyError`` for an unknown kind, or if too few rows can have the fault.
    """
    rng = random.Random(f"faults {kind} {seed}")
    rows = lexemes.annotate(list(rows))
    wanted = max(1, round(share * len(rows)))
    if kind == GAP:
        return _leave_out(rows, seed)
    if kind in _COPIES:
        return _with_copies(rows, _COPIES[kind](rows, rng), wanted, rng)
    if kind not in _CHANGES:
        raise StoneyError(f"faults: unknown kind {kind!r}; kinds are {', '.join(KINDS)}")
    change = _CHANGES[kind](rows, rng)
    records = records_of(rows)
    truth = set()
    for index in rng.sample(range(len(rows)), len(rows)):
        if len(truth) == wanted:
            break
        if changed := change(rows[index]):
            question, answer = changed
            records[index] |= {"question": question, "answer": answer}
            truth.add(rows[index].id)
    _check_count(kind, len(truth), wanted)
    return Planted(records, frozenset(truth))


def _check_count(kind: str, found: int, wanted: int) -> None:
    if found < wanted:
        raise StoneyError(
            f"faults: only {found} rows can have {kind}, wanted {wanted}; give more rows or a lower share"
        )


# A change takes a row to its faulty (question, answer), or to None where the row can't have the fault.
Change = Callable[[Row], tuple[str, str] | None]


def _with_copies(rows: Sequence[Row], change: Change, wanted: int, rng: random.Random) -> Planted:
    """Each faulty copy stands anywhere behind its original."""
    records = records_of(rows)
    behind: dict[int, list[Record]] = {}
    original_of = {}
    for index in rng.sample(range(len(rows)), len(rows)):
        if len(original_of) == wanted:
            break
        if changed := change(rows[index]):
            copy = f"{rows[index].id}-copy"
            original_of[copy] = rows[index].id
            record = {"id": copy, "question": changed[0], "answer": changed[1]}
            behind.setdefault(rng.randrange(index, len(rows)), []).append(record)
    _check_count("a copy", len(original_of), wanted)
    with_copies = [entry for index, record in enumerate(records) for entry in [record, *behind.get(index, [])]]
    return Planted(with_copies, frozenset(original_of), original_of)


def _words_of(row: Row) -> set[str]:
    return {word for form in row.lexemes for word in words(fold(form))}


def gap_letters(rows: Sequence[Row]) -> list[str]:
    """The letters, sorted, that begin enough words to be missed, and without which most of the rows are left.

    ``rows`` have their lexemes. Raises ``StoneyError`` if there is no such letter.
    """
    words_of = [_words_of(row) for row in rows]
    different = set().union(*words_of)
    sizes = Counter(word[0] for word in different)
    rows_with = Counter(letter for found in words_of for letter in {word[0] for word in found})
    least = max(MIN_WORDS, MIN_SHARE * len(different))
    letters = [letter for letter in sorted(sizes) if sizes[letter] >= least and rows_with[letter] < len(rows) / 2]
    if not letters:
        raise StoneyError(f"faults: no letter begins {MIN_WORDS} different words; give more rows")
    return letters


def _leave_out(rows: Sequence[Row], number: int) -> Planted:
    letters = gap_letters(rows)
    letter = letters[number % len(letters)]
    kept = [row for row in rows if not any(word.startswith(letter) for word in _words_of(row))]
    return Planted(records_of(kept), frozenset(letter))


# Repeats


def _hints(rows: Sequence[Row], rng: random.Random) -> Change:
    with_form = (
        lambda question, form: f'{question} (Hint: it is "{form}".)',
        lambda question, form: f"Remember the word {form}, it will be needed. {question}",
        lambda question, form: f'The answer is "{form}". {question}',
        lambda question, form: f"{question} Tip: `{form}`.",
        lambda question, form: f"{question} It begins like this: '{form}' ...",
        lambda question, form: f'{question[:-1]}, that is to say "{form}"{question[-1]}',
    )
    with_answer = (
        lambda question, answer: f"{question} {answer}",
        lambda question, answer: f"Context: {answer}\nQuestion: {question}",
        lambda question, answer: f"{answer} {question}",
        lambda question, answer: f"{question} (Solution: {answer})",
    )

    def change(row: Row) -> tuple[str, str]:
        targets = lexemes.target_forms(row)
        if targets and rng.random() < 0.9:
            return rng.choice(with_form)(row.question, targets[0]), row.answer
        return rng.choice(with_answer)(row.question, row.answer), row.answer

    return change


def _echoes(rows: Sequence[Row], rng: random.Random) -> Change:
    styles = (
        lambda question, answer: f"{question} {answer}",
        lambda question, answer: f"You asked: {question} {answer}",
        lambda question, answer: f"{answer} That answers the question: {question}",
        lambda question, answer: f"Question: {question}\nAnswer: {answer}",
        lambda question, answer: f"{question[:-1].lower()}: {answer}",
        lambda question, answer: question,
    )
    return lambda row: (row.question, rng.choice(styles)(row.question, row.answer))


def _exact_copies(rows: Sequence[Row], rng: random.Random) -> Change:
    def spaced(text: str) -> str:
        return re.sub(" ", lambda _: rng.choice((" ", "  ", "\t", "\n", " ")), text) + rng.choice(("", " ", "\n"))

    def quotes(text: str) -> str:
        return text.replace("`", "'") if "`" in text else text.replace('"', "`")

    def unpunctuated(text: str) -> str:
        return re.sub(r"[.?!]$", rng.choice(("", "!", " ...")), text.replace(", ", " - ", 1))

    styles = (str, str.lower, str.upper, spaced, quotes, unpunctuated, lambda text: unpunctuated(spaced(text.lower())))

    def change(row: Row) -> tuple[str, str]:
        style = rng.choice(styles)
        return style(row.question), style(row.answer)

    return change


_QUOTED = re.compile(r"""(?<!\w)(["'`])(?=\S).+?\1(?!\w)""")
_PROSE_WORD = re.compile(r"(?<![\w'-])[A-Za-z]{3,}(?![\w'-])")
_GRAMMAR = frozenset(word for pos in PARTS_OF_SPEECH for word in pos.split())
_FILLERS = ("really", "also", "just", "indeed", "simply", "now", "then", "actually", "perhaps", "usually")


def _prose_words(text: str) -> list[re.Match]:
    """The English words outside of quotes; words of a class (active, verb) are not among them: they make a claim."""
    outside = _QUOTED.sub(lambda match: "\n" * len(match.group()), text)
    return [match for match in _PROSE_WORD.finditer(outside) if match.group() not in _GRAMMAR]


def _edits(rows: Sequence[Row], rng: random.Random) -> Change:
    """Copies with one to three small edits of the English prose; forms, glosses and classes stay."""
    vocabulary = sorted({match.group().lower() for row in rows for match in _prose_words(row.question + row.answer)})

    def edit(text: str) -> str:
        places = _prose_words(text)
        if not places:
            return text
        place = rng.choice(places)
        word = place.group()
        kind = rng.choice(("replace", "replace", "typo", "add", "drop"))
        if kind == "replace":
            word = rng.choice([other for other in vocabulary if other != word.lower()])
        elif kind == "typo":
            at = rng.randrange(len(word) - 1)
            swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
            word = swapped if swapped.lower() != word.lower() else word[:at] + word[at + 1 :]
        elif kind == "add":
            word = f"{rng.choice(_FILLERS)} {word}"
        else:
            word = ""
        return f"{text[: place.start()]}{word}{text[place.end() :]}".replace("  ", " ").strip()

    def change(row: Row) -> tuple[str, str]:
        texts = [row.question, row.answer]
        for _ in range(rng.randint(1, 3)):
            side = rng.randrange(2)
            texts[side] = edit(texts[side])
        if rng.random() < 0.3:
            texts[1] = texts[1].rstrip(".") + rng.choice(("", "!", ";"))
        if [words(fold(text)) for text in texts] == [words(fold(text)) for text in (row.question, row.answer)]:
            return None  # only the punctuation has changed
        return texts[0], texts[1]

    return change


def _glosses(row: Row) -> list[str]:
    """What the answer quotes and is neither a form nor a class nor an affix."""
    forms = {fold(form) for form in row.lexemes}
    quoted = dict.fromkeys(lexemes.quoted_forms(row.answer))
    return [text for text in quoted if fold(text) not in forms and text not in PARTS_OF_SPEECH and "-" not in text]


def _other_claims(rows: Sequence[Row], rng: random.Random) -> Change:
    """The same question with an answer that names the form, or the gloss, of another row in place of its own."""
    forms = sorted({form for row in rows for form in row.lexemes if " " not in form})
    phrases = sorted({form for row in rows for form in row.lexemes if " " in form})
    glosses = sorted({gloss for row in rows for gloss in _glosses(row)})

    def change(row: Row) -> tuple[str, str] | None:
        targets = lexemes.target_forms(row)
        asked = [gloss for gloss in _glosses(row) if not lexemes.contains_form(row.question, gloss)]
        if targets:
            old, pool = targets[0], phrases if " " in targets[0] else forms
        elif asked:
            old, pool = asked[0], glosses
        else:
            return None
        said = f"{row.question} {row.answer}"
        new = next(
            (text for text in rng.sample(pool, min(9, len(pool))) if not lexemes.contains_form(said, text)), None
        )
        if new is None:
            return None
        answer = re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", lambda _: new, row.answer)
        question = row.question if rng.random() < 0.7 else row.question.rstrip("?.") + rng.choice(("", "?!", " ?"))
        return question, answer

    return change


# Orthography


def _in_one_text(row: Row, rng: random.Random, damage: Callable[[str], str]) -> tuple[str, str] | None:
    """``damage`` done to the question, the answer or both; None if it changes neither."""
    texts = row.question, row.answer
    damaged = damage(row.question), damage(row.answer)
    changed = rng.choice(((damaged[0], texts[1]), (texts[0], damaged[1]), damaged))
    if changed == texts:  # a question without a form has nothing to damage
        changed = damaged
    return changed if changed != texts else None


def _in_one_form(row: Row, rng: random.Random, damage: Callable[[str], str]) -> tuple[str, str] | None:
    """``damage`` done to one form of the row, where it stands first or wherever it stands; None if it changes nothing."""
    form = rng.choice(row.lexemes) if row.lexemes else ""
    damaged = damage(form)
    if not form or damaged == form:
        return None
    pattern = re.compile(rf"(?<!\w){re.escape(form)}(?!\w)")
    if rng.random() < 0.5:
        changed = tuple(pattern.sub(lambda _: damaged, text) for text in (row.question, row.answer))
    elif pattern.search(row.answer) and (rng.random() < 0.5 or not pattern.search(row.question)):
        changed = (row.question, pattern.sub(lambda _: damaged, row.answer, count=1))
    else:
        changed = (pattern.sub(lambda _: damaged, row.question, count=1), row.answer)
    return changed if changed != (row.question, row.answer) else None


def _decomposed(rows: Sequence[Row], rng: random.Random) -> Change:
    """NFD of a text, or one letter of one form with a combining mark, as h and U+0331 for ẖ."""

    def one_letter(form: str) -> str:
        places = [at for at, letter in enumerate(form) if unicodedata.decomposition(letter)]
        at = rng.choice(places) if places else 0
        return form[:at] + unicodedata.normalize("NFD", form[at]) + form[at + 1 :] if places else form

    def change(row: Row) -> tuple[str, str] | None:
        if rng.random() < 0.5:
            return _in_one_text(row, rng, lambda text: unicodedata.normalize("NFD", text))
        return _in_one_form(row, rng, one_letter)

    return change


# For each letter what looks like it: Cyrillic, Greek, other marks, other constructions of the same mark.
_LOOK_ALIKES = {
    "a": "а", "e": "е", "o": "оο", "p": "р", "s": "ѕ", "i": "іıι", "j": "ј", "h": "һ", "v": "ν", "u": "υ", "k": "к",
    "y": "у", "â": ("ã", "ā", "ǎ"), "î": ("ĩ", "ī", "ǐ"), "û": ("ũ", "ū", "ǔ"), "ẖ": ("ħ", "h\u0332"),
    "ṯ": ("ŧ", "t\u0332"),
}  # fmt: skip


def _look_alikes(rows: Sequence[Row], rng: random.Random) -> Change:
    def one_letter(form: str) -> str:
        places = [at for at, letter in enumerate(form) if letter in _LOOK_ALIKES]
        if not places:
            return form
        at = rng.choice(places)
        return form[:at] + rng.choice(_LOOK_ALIKES[form[at]]) + form[at + 1 :]

    return lambda row: _in_one_form(row, rng, one_letter)


def _mojibake(rows: Sequence[Row], rng: random.Random) -> Change:
    """UTF-8 that was read as Latin-1, which makes controls of some bytes, or as Windows-1252."""

    def change(row: Row) -> tuple[str, str] | None:
        wrong = rng.choice(("latin-1", "windows-1252"))
        return _in_one_text(row, rng, lambda text: text.encode().decode(wrong))

    return change


def _invisible(rows: Sequence[Row], rng: random.Random) -> Change:
    """A zero width space, soft hyphen, byte order mark or C1 control, inside a form or anywhere in a text."""

    def insert(text: str) -> str:
        at = rng.randrange(len(text) + 1)
        return text[:at] + rng.choice("\u200b\u00ad\ufeff\x80\x92") + text[at:]

    def change(row: Row) -> tuple[str, str] | None:
        return (_in_one_form if rng.random() < 0.5 else _in_one_text)(row, rng, insert)

    return change


def _apostrophes(rows: Sequence[Row], rng: random.Random) -> Change:
    """Another mark than U+0027 inside an English word; where the row has none, in a remark that is added."""
    inner = re.compile(r"(?<=\w)'(?=\w)")

    def change(row: Row) -> tuple[str, str]:
        mark = rng.choice("\u2019\u02bc\u2018\u00b4\u2032")
        question, answer = row.question, row.answer
        if not inner.search(question + answer):
            remark = rng.choice(("That's the entry.", "It doesn't change.", "Here's no exception.", "They're common."))
            answer = f"{answer} {remark}"
        return inner.sub(mark, question), inner.sub(mark, answer)

    return change


_COPIES = {"exact_duplicates": _exact_copies, "near_duplicates": _edits, "contradictions": _other_claims}
_CHANGES = {
    "question_gives_answer": _hints,
    "answer_repeats_question": _echoes,
    "not_nfc": _decomposed,
    "look_alikes": _look_alikes,
    "mojibake": _mojibake,
    "invisible_characters": _invisible,
    "apostrophe_variants": _apostrophes,
}
KINDS = (*_COPIES, *_CHANGES, GAP)


def find(
    records: Sequence[Record], names: Sequence[str] = ("repeats", "orthography", "coverage")
) -> dict[str, set[str]]:
    """Kind -> ids of the rows that the sections named find (letters, for ``initial_letter_gap``), without empty kinds.

    The records go through a file and the reader, as in every stage: what it repairs, it must have noticed.
    """
    from stoney_rl import data

    with tempfile.TemporaryDirectory(prefix="stoney-faults-") as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        rowset = data.load_rows(path)
        if rowset.quarantine:
            raise StoneyError(f"faults: {len(rowset.quarantine)} rows were not read: {rowset.quarantine[0].reason}")
        rowset.rows = lexemes.annotate(rowset.rows)
        sections = [_SECTIONS[name](rowset) for name in names]
    found = {}
    for section in sections:
        for finding in section.findings:
            found[finding.kind] = _letters(finding) if finding.kind == GAP else set(finding.row_ids)
    return {kind: names for kind, names in found.items() if names}


def _repeats(rowset: RowSet) -> Section:
    from stoney_rl.inspection import repeats

    return repeats.find(rowset.rows)


def _orthography(rowset: RowSet) -> Section:
    from stoney_rl.inspection import orthography

    return orthography.find(rowset, rowset.rows)


def _coverage(rowset: RowSet) -> Section:
    from stoney_rl.inspection import coverage

    return coverage.find(Counter(form for row in rowset.rows for form in {fold(form) for form in row.lexemes}))


def _letters(finding: Finding) -> set[str]:
    return {example["letter"] for example in finding.examples}


_SECTIONS = {"repeats": _repeats, "orthography": _orthography, "coverage": _coverage}


def section_of(kind: str) -> str:
    if kind == GAP:
        return "coverage"
    repeats = (*_COPIES, "question_gives_answer", "answer_repeats_question")
    return "repeats" if kind in repeats else "orthography"


@dataclass(frozen=True)
class Score:
    """planted, found, right: numbers of rows (letters); missed and wrong: their ids, sorted."""

    planted: int
    found: int
    right: int
    missed: tuple[str, ...]
    wrong: tuple[str, ...]

    @property
    def precision(self) -> float:
        """0 where nothing is found: nothing was said that could be right."""
        return self.right / self.found if self.found else 0.0

    @property
    def recall(self) -> float:
        return self.right / self.planted


def score(planted: Planted, found: set[str]) -> Score:
    """Rows found against rows planted; an original that is found stands for its copy."""
    copy_of = {original: copy for copy, original in planted.original_of.items()}
    named = {copy_of.get(row_id, row_id) for row_id in found}
    right = named & planted.truth
    missed, wrong = tuple(sorted(planted.truth - named)), tuple(sorted(named - planted.truth))
    return Score(len(planted.truth), len(named), len(right), missed, wrong)


def measure(num_rows: int, share: float, seed: int, kinds: Sequence[str] = KINDS) -> tuple[dict[str, Score], dict]:
    """The score of each kind on prose of the language of that seed, and the number of clean rows (letters) that each
    kind finds."""
    rows, _ = prose_rows(PlantedLanguage(seed, max(40, num_rows // 2)), num_rows, seed)
    rows = lexemes.annotate(rows)
    sections = sorted({section_of(kind) for kind in kinds})
    clean = {kind: len(names) for kind, names in find(records_of(rows), sections).items() if kind in kinds}
    scores = {}
    for kind in kinds:
        seeds = range(len(gap_letters(rows))) if kind == GAP else [seed]
        runs = []
        for number in seeds:
            planted = plant(rows, kind, share, number)
            runs.append(score(planted, find(planted.records, [section_of(kind)]).get(kind, set())))
        scores[kind] = together(runs)
    return scores, clean


def together(runs: Sequence[Score]) -> Score:
    return Score(
        *(sum(getattr(run, key) for run in runs) for key in ("planted", "found", "right")),
        *(tuple(name for run in runs for name in getattr(run, key)) for key in ("missed", "wrong")),
    )


def summarise(scores: dict[str, list[Score]], clean: list[dict], bound: float) -> dict[str, dict]:
    """One entry a kind, of its scores for each seed. ``passed``: precision and recall reach ``bound`` in the worst seed,
    and nothing is found in clean rows."""
    results = {}
    for kind, runs in scores.items():
        precisions, recalls = [run.precision for run in runs], [run.recall for run in runs]
        whole = together(runs)
        false_findings = sum(found.get(kind, 0) for found in clean)
        results[kind] = {
            "planted": whole.planted,
            "found": whole.found,
            "right": whole.right,
            "precision": {"worst": min(precisions), "mean": statistics.fmean(precisions)},
            "recall": {"worst": min(recalls), "mean": statistics.fmean(recalls)},
            "found_in_clean_rows": false_findings,
            "passed": min(precisions + recalls) >= bound and not false_findings,
        }
    return results


def table(results: dict[str, dict]) -> str:
    lines = ["", f"{'':24} {'planted':>7} {'found':>6}  {'precision':>13}  {'recall':>13}  in clean rows"]
    lines.append(f"{'':24} {'':7} {'':6}  {'worst':>6} {'mean':>6}  {'worst':>6} {'mean':>6}")
    for kind, entry in results.items():
        numbers = "  ".join(f"{entry[key]['worst']:6.3f} {entry[key]['mean']:6.3f}" for key in ("precision", "recall"))
        lines.append(
            f"{kind:24} {entry['planted']:7} {entry['found']:6}  {numbers}  {entry['found_in_clean_rows']:13}"
            f"{'' if entry['passed'] else '  missed'}"
        )
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--num_rows", type=cli.positive_int, default=2000, help="clean rows a seed")
    parser.add_argument("--seeds", type=cli.non_negative_int, nargs="+", default=[0, 1, 2, 3, 4], help="languages")
    parser.add_argument("--share", type=cli.fraction, default=0.05, help="of the rows that get a fault")
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS), help="of faults", metavar="KIND")
    parser.add_argument("--bound", type=cli.fraction, default=0.95, help="least precision and recall of each kind")
    parser.add_argument("--output", default="results/inspect-faults.json", help="file of the results")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = cli.parse_args(build_parser(), argv)
    if Path(args.output).is_dir():
        raise StoneyError(f"--output {args.output}: a directory; name a file")
    from tqdm import tqdm

    scores: dict[str, list[Score]] = {kind: [] for kind in args.kinds}
    clean, runs = [], []
    for seed in tqdm(dict.fromkeys(args.seeds), desc="seeds", unit="seed"):
        of_seed, found = measure(args.num_rows, args.share, seed, args.kinds)
        clean.append(found)
        for kind, run in of_seed.items():
            scores[kind].append(run)
            runs.append({"kind": kind, "seed": seed, "planted": run.planted, "found": run.found, "right": run.right})
    results = summarise(scores, clean, args.bound)
    print(table(results))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    report = checkpoints.describe_stage(
        "inspect-faults",
        arguments=vars(args),
        seed=args.seeds[0],
        n=args.num_rows * len(clean),
        results=results,
        runs=runs,
    )
    checkpoints.write_json(Path(args.output), report)
    print(f"{args.output}: the same, with every run and versions")
    return 0 if all(entry["passed"] for entry in results.values()) else 1


if __name__ == "__main__":
    cli.run(main)
