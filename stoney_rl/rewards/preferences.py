"""Preference pairs: two answers to one prompt, the better one first. Read from files, or made from gold answers.

A file of pairs (.jsonl, or any other kind that ``reading`` knows) has one on each line:

    {"prompt": "...", "chosen": "...", "rejected": "...", "kind": "wrong affix", "annotator": "...", "comment": "..."}

``prompt``, ``chosen`` and ``rejected`` are text or chat messages; where ``chosen`` and ``rejected`` are whole
conversations, ``prompt`` may be left out. ``kind`` (what is wrong with the rejected answer), ``id``, ``lexemes`` and
whatever else is there may be left out too and is kept. A line that is no pair is set aside with its number and reason.

Files are split by prompt; with a lexicon, or ``lexemes`` of their own, by lexeme, as rows are (``split``). ``bootstrap`` makes pairs from rows that
are split already. Either way no training pair, on either of its sides, mentions a form that an unseen test pair is
about; the certificate counts that.
"""

import hashlib
import json
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from stoney_rl import corpus, reading
from stoney_rl.corpus import Corpus, row_hash
from stoney_rl.data import Quarantined, Row, RowSet, dataset_sha256
from stoney_rl.errors import StoneyError
from stoney_rl.lexemes import contains_form, quoted_forms
from stoney_rl.rewards import attacks
from stoney_rl.rewards.attacks import Attack, Ground
from stoney_rl.rewards.composite import Task
from stoney_rl.rewards.knowledge import Knowledge, is_of_the_language
from stoney_rl.split import Split, certify, mention_key, row_forms
from stoney_rl.text import fold, normalize, words

COLUMNS = ("prompt", "chosen", "rejected")
MIN_PROMPTS = 10  # for a split by prompt
UNNAMED = "unnamed"  # the kind of a pair that does not say
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Pair:
    """``row``: the prompt, the chosen answer as its completion, and the rest. ``kind``: what is wrong with ``rejected``."""

    id: str
    row: Row
    rejected: str
    kind: str = UNNAMED

    @property
    def chosen(self) -> str:
        return self.row.answer

    def to_dict(self) -> dict:
        """The pair as a line of a file that ``load_pairs`` reads."""
        return {
            **self.row.metadata,
            "id": self.id,
            "prompt": self.row.prompt,
            "chosen": self.chosen,
            "rejected": self.rejected,
            "kind": self.kind,
            "lexemes": self.row.lexemes,
        }


@dataclass(frozen=True)
class PairFile:
    """What ``load_pairs`` read; ``files`` and ``quarantine`` as in ``data.RowSet``."""

    pairs: list[Pair]
    quarantine: list[Quarantined]
    files: list[dict]
    source: str


@dataclass(frozen=True)
class PairSet:
    """Pairs to train on, to watch the loss on, and to test on.

    ``seen``: pair id -> does training mention its forms too; empty where the split is by prompt alone. ``corpus``: the
    rows behind the pairs and their split, with the certificate. ``notes``: what the user should know.
    """

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]
    seen: dict[str, bool]
    corpus: Corpus
    notes: list[str] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        """SHA-256 of all pairs in order, split by split."""
        digest = hashlib.sha256()
        for pair in [*self.train, *self.validation, *self.test]:
            digest.update(json.dumps(pair.to_dict(), ensure_ascii=False, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()

    @property
    def by_lexeme(self) -> bool:
        return bool(self.seen)

    def describe(self) -> dict:
        """The ``data`` entry of ``stage.json``."""
        return self.corpus.describe() | {
            "pairs": {name: len(getattr(self, name)) for name in SPLITS},
            "pairs_sha256": self.sha256,
            "split_by": "lexeme" if self.by_lexeme else "prompt",
        }


# Reading.


class _BadPairError(Exception):
    """One line is no pair; the message is the quarantine reason."""


def load_pairs(source: str | Path) -> PairFile:
    """The pairs of a file or of every data file in a folder; lines that are none are in ``quarantine``.

    Raises ``StoneyError`` if there is no such file, if it can't be read, or if it holds not one pair.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise StoneyError(
            f"{source} does not exist; expected a file or folder of preference pairs, or with --bootstrap of rows"
        )
    if path.is_file() and not reading.is_data_name(path.name):
        raise StoneyError(f"{source} is of no kind that can be read; expected {' '.join(reading.DATA_EXTENSIONS)}")
    pairs: list[Pair] = []
    quarantine: list[Quarantined] = []
    files: list[dict] = []
    ids: Counter[str] = Counter()
    for file in reading.files_in(path) if path.is_dir() else reading.files_at(path, reading.printable(path.name)):
        before = len(pairs), len(quarantine)
        try:
            for record in reading.read_records(file):
                try:
                    if record.problem:
                        raise _BadPairError(record.problem)
                    pair = _to_pair(record.value, f"{file.name}:{record.line}")
                except _BadPairError as problem:
                    text = record.text if isinstance(record.text, str) else record.text()
                    shown = text[:200].rstrip("\r\n").encode("utf-8", "backslashreplace").decode()
                    quarantine.append(Quarantined(file.name, record.line, str(problem), shown))
                    continue
                ids[pair.id] += 1
                name = pair.id if ids[pair.id] == 1 else f"{pair.id}#{ids[pair.id]}"
                pairs.append(replace(pair, id=name, row=replace(pair.row, id=name)))
            with file.path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except reading.file_errors() as error:
            raise StoneyError(
                f"{file.name} can't be read: {reading.plain(error)}; check that it is whole, or fetch it again"
            ) from None
        counts = {"rows": len(pairs) - before[0], "quarantined": len(quarantine) - before[1]}
        files.append({"path": file.name, "sha256": digest, "split": None, **counts})
    if not pairs:
        first = f"; the first of {len(quarantine):,} bad lines: {_place(quarantine[0])}" if quarantine else ""
        raise StoneyError(
            f"{source} has no preference pair{first}; expected prompt, chosen and rejected on each line; "
            "rows of questions and answers need --bootstrap"
        )
    return PairFile(pairs, quarantine, files, str(source))


def _place(bad: Quarantined) -> str:
    return f"{bad.source} line {bad.line}: {bad.reason}"


def _to_pair(value: object, where: str) -> Pair:
    """The pair on one line. Raises ``_BadPairError``."""
    if not isinstance(value, dict):
        raise _BadPairError("not an object: expected prompt, chosen and rejected")
    for name in ("chosen", "rejected"):
        if name not in value:
            found = reading.printable(", ".join(map(str, value)))[:100] or "nothing"
            raise _BadPairError(f"missing column: {name} (found {found})")
    if not isinstance(value.get("kind"), str | int | None):
        raise _BadPairError("kind is not text: expected a short name for what is wrong with the rejected answer")
    given = [value["prompt"]] if value.get("prompt") not in (None, "", []) else []
    whole = {name: _is_conversation(value[name]) for name in ("chosen", "rejected")}
    prompts = given + [value[name][:-1] for name in whole if whole[name]]
    if not prompts:
        raise _BadPairError("prompt is missing: expected text, messages, or whole conversations on both sides")
    chosen, rejected = (
        _row(value, where, name, prompts[0], value[name][-1:] if whole[name] else value[name]) for name in whole
    )
    if any(_row(value, where, "chosen", prompt, chosen.answer).prompt != chosen.prompt for prompt in prompts[1:]):
        raise _BadPairError("prompts differ: chosen and rejected must answer the same turns")
    if chosen.answer == rejected.answer:
        raise _BadPairError("chosen and rejected are the same: there is nothing to prefer")
    kind = normalize(str(value.get("kind") or "")) or UNNAMED
    return Pair(chosen.id, chosen, rejected.answer, kind)


def _is_conversation(answer: object) -> bool:
    return isinstance(answer, list) and any(
        isinstance(turn, dict) and turn.get("role") != "assistant" for turn in answer
    )


def _row(value: dict, where: str, name: str, prompt: object, answer: object) -> Row:
    """``prompt`` and one of its answers as a row, checked and normalised as rows are."""
    given = value.get("id")
    named = isinstance(given, str | int) and not isinstance(given, bool) and str(given).strip()
    extra = {key: item for key, item in value.items() if key not in (*COLUMNS, "kind", "id", "lexemes")}
    row = {"id": str(given).strip() if named else where, "source": where, "prompt": prompt, "completion": answer}
    try:
        return Row.from_dict({**row, "lexemes": value.get("lexemes"), "metadata": extra})
    except StoneyError as error:
        reason = str(error).removeprefix("not a row: ").rpartition("; expected the keys")[0]
        raise _BadPairError(reason.replace("completion", name, 1)) from None


def describe(file: PairFile) -> str:
    """One sentence on what was read, what was set aside and where, and on pairs that contradict each other."""
    text = f"{len(file.pairs):,} preference pairs from {file.source}"
    if file.quarantine:
        text += f"; {len(file.quarantine):,} lines are none, the first: {_place(file.quarantine[0])}"
    orders = {(row_hash(pair.row), pair.chosen, pair.rejected) for pair in file.pairs}
    against = sum((prompt, rejected, chosen) in orders for prompt, chosen, rejected in orders) // 2
    return text + (f"; {against:,} are contradicted by another pair." if against else ".")


# Splitting.


def split_pairs(
    file: PairFile,
    knowledge: Knowledge | None = None,
    *,
    split_seed: int = corpus.SPLIT_DEFAULTS["split_seed"],
    test_fraction: float = corpus.SPLIT_DEFAULTS["test_fraction"],
    validation_fraction: float = corpus.SPLIT_DEFAULTS["validation_fraction"],
) -> PairSet:
    """Split pairs by lexeme (forms of ``knowledge``, or the pairs' own ``lexemes``), or by prompt without either.

    Raises ``StoneyError`` if there are too few, if no lexeme can be held out, or if the lexicon knows none of them.
    """
    pairs = file.pairs
    if knowledge is not None:
        find = _FormFinder(knowledge.forms)
        pairs = [
            pair if pair.row.lexemes else replace(pair, row=replace(pair.row, lexemes=find(_text(pair.row))))
            for pair in pairs
        ]
        if not any(pair.row.lexemes for pair in pairs):
            raise StoneyError("--lexicon: none of its forms stands in the pairs; leave it out to split by prompt")
    rows = [_both_sides(pair.row, [pair]) for pair in pairs]
    sha256 = dataset_sha256(rows)
    asked = {"split_seed": split_seed, "test_fraction": test_fraction, "validation_fraction": validation_fraction}
    if any(pair.row.lexemes for pair in pairs):
        split = corpus.split_as(rows, sha256, **asked)
    else:
        split = _split_by_prompt(rows, sha256, **asked)
    by_id = {pair.id: pair for pair in pairs}
    parts = {name: [by_id[row.id] for row in getattr(split, name)] for name in SPLITS}
    rowset = RowSet(rows, file.quarantine, sha256, file.files, file.source)
    notes = [f"{len(split.dropped):,} pairs mention a held-out form beside others and are left out."] * bool(
        split.dropped
    )
    return PairSet(**parts, seen=split.seen, corpus=Corpus(rowset, split), notes=notes)


def _text(row: Row) -> str:
    return "\n".join(turn["content"] for turn in [*row.prompt, *row.completion])


def _both_sides(row: Row, pairs: Sequence[Pair]) -> Row:
    """``row`` with every answer of ``pairs`` in its completion: what it mentions is what either side mentions."""
    answers = dict.fromkeys(text for pair in pairs for text in (pair.chosen, pair.rejected))
    return replace(row, completion=[{"role": "assistant", "content": "\n".join(answers)}])


def _split_by_prompt(
    rows: list[Row], sha256: str, *, split_seed: int, test_fraction: float, validation_fraction: float
) -> Split:
    """Whole prompts, in an order drawn from the seed, to test, then to validation, the rest to training."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row_hash(row)].append(row)
    if len(groups) < MIN_PROMPTS:
        raise StoneyError(f"{len(groups)} prompts are too few for a split; give pairs on at least {MIN_PROMPTS}")
    drawn = sorted(groups, key=lambda key: hashlib.sha256(f"{split_seed}\0{key}".encode()).digest())
    parts: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for key in drawn:
        name = next(
            (
                name
                for name, share in (("test", test_fraction), ("validation", validation_fraction))
                if len(parts[name]) < max(1, round(share * len(rows)))
            ),
            "train",
        )
        parts[name] += groups[key]
    if not parts["train"]:
        raise StoneyError("nothing is left to train on; give smaller fractions or more pairs")
    place = {row.id: at for at, row in enumerate(rows)}
    for part in parts.values():
        part.sort(key=lambda row: place[row.id])
    prompts = [{row_hash(row) for row in part} for part in parts.values()]
    certificate = {
        "split_by": "prompt",
        "seed": split_seed,
        "test_fraction": test_fraction,
        "validation_fraction": validation_fraction,
        "data_sha256": sha256,
        "rows": len(rows),
        "counts": {name: len(part) for name, part in parts.items()},
        "overlaps": {"prompts_in_two_splits": sum(map(len, prompts)) - len(set().union(*prompts))},
    }
    return Split(**parts, dropped=[], seen={}, certificate=certificate)


class _FormFinder:
    """Finds the forms of a lexicon in a text: as whole words, and only those that don't look English."""

    def __init__(self, forms: Iterable[str]) -> None:
        self.forms = {mention_key(form): form for form in forms if any(map(is_of_the_language, words(fold(form))))}
        self.forms.pop("", None)
        self.longest = _longest(frozenset(self.forms))

    def __call__(self, text: str) -> list[str]:
        return list(dict.fromkeys(self.forms[key] for key in _runs(text, self.longest) if key in self.forms))


def _runs(text: str, longest: int) -> Iterable[str]:
    """Every run of up to ``longest`` words of ``text``, as the split compares forms."""
    found = mention_key(text).split()
    return (" ".join(found[at : at + size]) for at in range(len(found)) for size in range(1, longest + 1))


# Corruptions: attacks on the chosen answer, whichever wording that has, so that style does not tell the sides apart.


def _swapped(task: Task, form: str | None) -> str | None:
    """The reference with ``form`` in the place of the wanted one."""
    return task.reference.replace(task.wanted[0], form) if task.wanted and form else None


def one_diacritic(task: Task, ground: Ground) -> str | None:
    """One letter of the wanted form with its diacritic lost, or with one that it should not have."""
    if not task.wanted:
        return None
    letters = list(unicodedata.normalize("NFC", task.wanted[0]))
    bare = {at: unicodedata.normalize("NFD", letter)[0] for at, letter in enumerate(letters) if letter.isalpha()}
    marked = [at for at, letter in bare.items() if letter != letters[at]]
    if marked:
        at = ground.rng.choice(marked)
        letters[at] = bare[at]
    else:
        at = ground.rng.choice(list(bare))
        letters[at] = unicodedata.normalize("NFC", letters[at] + "\u0302")
    return _swapped(task, "".join(letters))


@dataclass(frozen=True)
class _Ground(Ground):
    families: Mapping[str, list[str]]  # stem -> the lexicon's forms of it


def another_affix(task: Task, ground: _Ground) -> str | None:
    """Another form of the wanted form's own stem."""
    key = fold(task.wanted[0]) if task.wanted else ""
    siblings = [form for form in ground.families.get(ground.knowledge.stems.get(key), ()) if fold(form) != key]
    return _swapped(task, ground.rng.choice(siblings)) if siblings else None


def _form_of(attack: Attack) -> Attack:
    """An attack that quotes a wrong form, with that form put into the reference's own sentence."""

    def corrupt(task: Task, ground: Ground) -> str | None:
        quoted = quoted_forms(attack(task, ground) or "")
        return _swapped(task, quoted[0]) if quoted else None

    return corrupt


def repeated(task: Task, ground: Ground) -> str:
    return " ".join([task.reference] * ground.rng.randint(2, 5))


def rambling(task: Task, ground: Ground) -> str:
    return task.reference + " And so on, as has been said." * ground.rng.randint(1, 6)


def cut_short(task: Task, ground: Ground) -> str:
    """The beginning of the reference: without it the better answer would mostly be the shorter one."""
    text = task.reference
    return text[: ground.rng.randint(len(text) // 4 + 1, len(text) // 2 + 1)]


def fluent(task: Task, ground: Ground) -> str:
    """Fluent English without a form. The same few texts in every split: accuracy on them is memory."""
    return ground.rng.choice((attacks.FLUENT, attacks.CONSTANT))


# From near the right answer to far from it.
CORRUPTIONS: dict[str, Attack] = {
    "one diacritic": one_diacritic,
    "diacritics stripped": attacks.stripped_diacritics,
    "diacritics sprinkled": attacks.sprinkled_diacritics,
    "right stem, another affix": another_affix,
    "right stem, no affix": attacks.stem_without_affix,
    "right affix, wrong stem": attacks.affix_on_wrong_stem,
    "another form": _form_of(attacks.miss),
    "invented form": _form_of(attacks.invented_form),
    "another row's gold": attacks.another_gold,
    "right, repeated": repeated,
    "right, then rambling": rambling,
    "cut short": cut_short,
    "prompt echoed": attacks.prompt_echo,
    "fluent English": fluent,
    "shuffled": attacks.shuffled,
}
KEEP_THE_FORM = {"right, repeated", "right, then rambling"}
# Among wrong answers an honest miss, another attested form in the same sentence, is better than these.
GRADED = {
    f"a miss over {kind}": kind
    for kind in (
        "one diacritic",
        "diacritics stripped",
        "diacritics sprinkled",
        "invented form",
        "prompt echoed",
        "fluent English",
        "shuffled",
    )
}
KINDS = (*CORRUPTIONS, *GRADED)


def bootstrap(rows: Corpus, knowledge: Knowledge, *, pairs_per_row: int = 4, seed: int = 0) -> PairSet:
    """Pairs from rows: chosen is the gold answer or an honest rewording of it, rejected a corruption of that text; or, of
    the kinds ``GRADED``, chosen is an honest miss.

    Each row gets up to ``pairs_per_row`` of ``KINDS``, those first that have been used least. What stands in
    corruptions of one split (other rows' answers, forms of the lexicon) is taken from that split alone. Raises
    ``StoneyError`` where a split has no row.
    """
    split = rows.split
    held = {
        name: frozenset().union(*(row_forms(row) for row in getattr(split, name) if split.seen.get(row.id) is False))
        for name in ("validation", "test")
    }
    training = _about(knowledge, held["validation"] | held["test"], inside=False)
    parts: dict[str, list[Pair]] = {}
    sides: dict[str, list[Row]] = {}
    for name in SPLITS:
        unseen = [row for row in getattr(split, name) if split.seen.get(row.id) is False]
        others = [row for row in getattr(split, name) if split.seen.get(row.id) is not False]
        about = _about(knowledge, held[name], inside=True) if unseen else knowledge
        barred = {"train": held["validation"] | held["test"], "validation": held["test"]}.get(name, frozenset())
        options = {"pairs_per_row": pairs_per_row, "seed": seed, "barred": barred}
        by_row: dict[str, list[Pair]] = defaultdict(list)
        for pair in _corrupt(unseen, about, **options) + _corrupt(others, training, **options):
            by_row[pair.row.id].append(pair)
        if not by_row:
            raise StoneyError(f"{rows.rowset.source}: no pair can be made for the {name} split; give more rows")
        parts[name] = [pair for row in getattr(split, name) for pair in by_row[row.id]]
        sides[name] = [_both_sides(row, by_row[row.id]) for row in getattr(split, name) if by_row[row.id]]
    proof = certify(sides["train"], sides["validation"], sides["test"], split.seen)
    seen = {pair.id: split.seen[pair.row.id] for name in ("validation", "test") for pair in parts[name]}
    of_pairs = Split(**sides, dropped=split.dropped, seen=split.seen, certificate=split.certificate | proof)
    return PairSet(**parts, seen=seen, corpus=Corpus(rows.rowset, of_pairs))


def _corrupt(
    rows: Sequence[Row], knowledge: Knowledge, *, pairs_per_row: int, seed: int, barred: frozenset[str]
) -> list[Pair]:
    """The pairs of ``rows``, none of which mentions a form of ``barred``."""
    tasks = [Task.of(row) for row in rows]
    used: Counter[str] = Counter()
    families: dict[str, list[str]] = defaultdict(list)
    for form in knowledge.forms:
        if stem := knowledge.stems.get(fold(form)):
            families[stem].append(form)
    pairs = []
    for row, task in zip(rows, tasks, strict=True):
        rng = random.Random(f"pairs {seed} {row.id}")
        ground = _Ground(tasks, knowledge, rng, families)
        wordings = [task.reference]
        reworded = attacks.honest(task, ground)
        if reworded and fold(reworded) != fold(task.reference):
            wordings.append(reworded)
        turn = rng.randrange(2)
        made = 0
        for kind in sorted(KINDS, key=lambda kind: (used[kind], rng.random())):
            right = replace(task, reference=normalize(wordings[turn % len(wordings)]))
            chosen = _rejected("another form", right, ground) if kind in GRADED else right.reference
            rejected = _rejected(GRADED.get(kind, kind), right, ground)
            if not chosen or not rejected or fold(chosen) == fold(rejected):
                continue
            if _mentions(f"{chosen}\n{rejected}", barred):
                continue
            answered = replace(row, completion=[{"role": "assistant", "content": chosen}])
            pairs.append(Pair(f"{row.id}~{kind}", answered, rejected, kind))
            used[kind] += 1
            turn += 1
            made += 1
            if made == pairs_per_row:
                break
    return pairs


def _rejected(kind: str, task: Task, ground: Ground) -> str | None:
    """The corrupted answer; None where it can't be made, is no worse than the chosen one, or says nothing."""
    text = normalize(CORRUPTIONS[kind](task, ground) or "")
    if not words(text) or fold(text) == fold(task.reference):
        return None
    if kind not in KEEP_THE_FORM and task.wanted and all(contains_form(text, form) for form in task.wanted):
        return None
    return text


def _about(knowledge: Knowledge, held: frozenset[str], *, inside: bool) -> Knowledge:
    """``knowledge`` with only the forms that mention one of ``held`` or are built on it, or only the others."""

    def is_held(form: str) -> bool:
        return mention_key(knowledge.stems.get(fold(form), "")) in held or _mentions(form, held)

    forms = tuple(form for form in knowledge.forms if is_held(form) == inside)
    keys = set(map(fold, forms))
    stems = {key: stem for key, stem in knowledge.stems.items() if key in keys}
    return replace(knowledge, forms=forms, stems=stems)


def _mentions(text: str, forms: frozenset[str]) -> bool:
    return any(run in forms for run in _runs(text, _longest(forms)))


@lru_cache(maxsize=8)
def _longest(forms: frozenset[str]) -> int:
    """The number of words of the longest form."""
    return max((form.count(" ") + 1 for form in forms), default=0)


def kinds_of(pairs: Iterable[Pair]) -> list[str]:
    """The kinds that ``pairs`` have, those of ``KINDS`` first and in their order."""
    there = dict.fromkeys(pair.kind for pair in pairs)
    return [kind for kind in KINDS if kind in there] + [kind for kind in there if kind not in KINDS]
