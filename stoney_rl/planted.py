"""The planted language: a small invented language with a generator, a dictionary and an exact morphology oracle.

It is nobody's language. Roots and affixes are made up and only the habits are Siouan-like: agglutination, person
prefixes, reduplication, nasal vowels written â î û, letters with a line below (ṯ ẖ). It stands in for language data
that a project may not ship, and because every truth about it is known it answers 'did the model learn the rule, or
memorise the row': a rule carries over to stems that no training row mentions, a memorised row does not.

Roots are C N (C V){1,2}: the first vowel is nasal, the others are not, so reduplication copies 'up to the first nasal
vowel'. Each root holds one of f, l, v, which Stoney words do not use, and a nasal vowel, which English words do not
use, so a form is never a word of either. Rules, each taking one stem to one form (tâlo, mîva):

    first_person    liẖ-      "I gather"                      liẖtâlo   lîẖmîva
    second_person   vuẖ-      "you gather"                    vuẖtâlo   vûẖmîva
    plural          -ṯel      "they gather"                   tâloṯel   mîvaṯel
    negation        -ẖov      "not to gather"                 tâloẖov   mîvaẖov
    causative       -ṯul      "to make someone gather"        tâloṯul   mîvaṯul
    reduplication   CN~       "to gather again and again"     tâtâlo    mîmîva

The harder part is sandhi: a prefix vowel is nasal before a root that begins with m or n (ẖ lets the nasality through).

Write rows.jsonl (training rows, a known source of ``data.load_rows``) and lexicon.jsonl (every form and its gloss):

    python -m stoney_rl.planted --output_dir data/planted --num_lexemes 165 --rules_per_lexeme 2 --seed 0
"""

import argparse
import json
import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from stoney_rl.cli import Problems, fraction, make_parser, parse_args, positive_int, run
from stoney_rl.data import Row, write_jsonl, write_lines
from stoney_rl.errors import StoneyError
from stoney_rl.text import fold

LANGUAGE = "planted (invented)"

NASAL_VOWELS = "âîû"
VOWELS = "aeiou"
NASAL_ONSETS = "mn"
FOREIGN = "flv"  # not used by Stoney words: a root that holds one of them can't be one
CONSONANTS = "bdfghjklmnpstvwyzṯẖ"
# Onsets of roots are drawn from here: m and n count double, so that about a fifth of the lexemes shows the sandhi.
_ONSETS = CONSONANTS + NASAL_ONSETS
_ROOT = re.compile(f"[{CONSONANTS}][{NASAL_VOWELS}](?:[{CONSONANTS}][{VOWELS}]){{1,2}}")
_NASALISE = str.maketrans("iu", "îû")

PREFIXES = {"first_person": "liẖ", "second_person": "vuẖ"}
SUFFIXES = {"plural": "ṯel", "negation": "ẖov", "causative": "ṯul"}
CITATION = "citation"
REDUPLICATION = "reduplication"
LOOKUP = "lookup"

# rule -> what its form means; the order is the order of every listing.
MEANINGS = {
    "first_person": "I {verb}",
    "second_person": "you {verb}",
    "plural": "they {verb}",
    "negation": "not to {verb}",
    "causative": "to make someone {verb}",
    "reduplication": "to {verb} again and again",
}
RULES = tuple(MEANINGS)

# Every wording names stem and gloss, so that a stem never met before can be inflected; none holds the form asked for.
# The wordings differ in order and in one word ('if'), less than two facts about one stem do: looking up the training
# row with the most words in common finds the same fact, if a training row asks it. That is the memoriser to beat.
TEMPLATES = {
    "verb_what": 'The invented verb "{stem}" means "{gloss}". What is the form for "{meaning}"?',
    "what_verb": 'What is the form for "{meaning}"? The invented verb "{stem}" means "{gloss}".',
    "if_what": 'If the invented verb "{stem}" means "{gloss}", what is the form for "{meaning}"?',
    "what_if": 'What is the form for "{meaning}", if the invented verb "{stem}" means "{gloss}"?',
    "verb_what_invented": 'The verb "{stem}" means "{gloss}". What is the invented form for "{meaning}"?',
    "what_invented_if": 'What is the invented form for "{meaning}", if the verb "{stem}" means "{gloss}"?',
}
LOOKUP_TEMPLATES = {
    "lookup_what": 'What is the invented word for "{gloss}"?',
    "lookup_say": 'How do you say "{gloss}" in the invented language?',
    "lookup_verb": 'Which invented verb means "{gloss}"?',
    "lookup_give": 'Invented language: give the word for "{gloss}".',
    "lookup_call": 'In the invented language, what is "{gloss}"?',
    "lookup_translate": 'Translate "{gloss}" into the invented language.',
}
ANSWER = '"{form}".'

# English for the glosses, in bare infinitives that are the same after 'I', 'you' and 'they'.
_VERBS = """
agree aim answer appear arrive ask awaken bake bathe begin bend blink blush boast bow breathe camp cheer chew clap
climb collapse complain continue cook cough crawl creep cross crouch cry dance dig dine disagree disappear dive doze
draw dream drift drink drum eat enter escape exhale explore fail faint fall fast fidget fight fish flee float fly
forage forgive freeze frown gasp gather gaze giggle glare glide glow grieve grin groan grow growl grumble guess
hesitate hiccup hide hike hope howl hum hunt hurry inhale jog joke joust juggle jump kneel knit knock labor land
laugh lean leap learn leave lie limp linger listen march mourn move mumble nap nod obey paddle paint panic pant pause
plan play plow point ponder pout practice prepare promise protest quarrel quit race reach read rejoice relax rest
retreat return ride rise roam row run rush sail scold scowl scream search sew shiver shout shrug sigh sing sink
sit skate skip sleep slide slip slouch smile smirk snarl sneeze sniff snore soar speak spin spit splash sprint squint
stagger stand stare stay steer step stretch stroll struggle study stumble stutter succeed sulk surrender swallow sway
sweat swim think tiptoe travel tremble trip trot twitch vanish vote wade wait wake walk wander wave weave weep whisper
whistle wiggle win wink wonder work worry wrestle write yawn yell
"""
_VERBS_WITH_OBJECTS = [
    (
        "bring share sell store taste cook serve",
        "bread soup fish meat rice corn berries beans eggs honey mushrooms roots",
    ),
    (
        "carry stack hide trade sort find weigh",
        "wood stones bark hay reeds wool leather clay sand shells feathers bones",
    ),
    ("make mend paint buy lose borrow clean", "baskets boats ropes tents drums knives nets blankets shoes pots sleds"),
    ("feed chase watch follow lead call count", "horses dogs goats geese sheep ducks rabbits cows turtles crows"),
    ("hear remember forget teach learn repeat", "stories songs names riddles jokes rules words"),
    (
        "greet help thank visit meet praise warn",
        "children strangers neighbors travelers guests friends hunters sailors",
    ),
]
_ADJUNCTS = [
    *("at dawn", "at night", "in winter", "in summer", "by the river", "in the forest", "near the lake", "on the hill"),
    *(
        "in the rain",
        "in the snow",
        "at home",
        "in secret",
        "in the morning",
        "in the evening",
        "every day",
        "together",
    ),
]


def is_root(text: str) -> bool:
    """Whether ``text`` (NFC, lower case) is shaped like a root; it need not be a lexeme of any language."""
    return _ROOT.fullmatch(text) is not None and not set(text).isdisjoint(FOREIGN)


def segments(stem: str, rule: str) -> tuple[str, ...]:
    """The morphs of the form, in order; joined, they are the form. Raises ``StoneyError`` for an unknown rule."""
    if rule == CITATION:
        return (stem,)
    if rule in PREFIXES:
        prefix = PREFIXES[rule]
        return (prefix.translate(_NASALISE) if stem[0] in NASAL_ONSETS else prefix, stem)
    if rule in SUFFIXES:
        return (stem, SUFFIXES[rule])
    if rule == REDUPLICATION:
        return (stem[:2], stem)
    raise StoneyError(f"planted language: unknown rule {rule!r}; rules are {', '.join((CITATION, *RULES))}")


def inflect(stem: str, rule: str) -> str:
    """The form of ``stem`` under ``rule``, for any root: ``inflect("mîva", "first_person")`` is ``"lîẖmîva"``."""
    return "".join(segments(stem, rule))


def has_sandhi(stem: str, rule: str) -> bool:
    """Whether nasality spreads into the prefix of this form: the harder cases of the two person rules."""
    return rule in PREFIXES and stem[0] in NASAL_ONSETS


def uninflect(form: str, rule: str) -> str | None:
    """The root that ``rule`` takes to ``form``, or None: the grammar alone, without a lexicon.

    A prefix whose vowel has the wrong nasality is no analysis.
    """
    root = None
    if rule == CITATION:
        root = form
    elif rule in PREFIXES:
        for prefix, nasal in ((PREFIXES[rule], False), (PREFIXES[rule].translate(_NASALISE), True)):
            rest = form.removeprefix(prefix)
            if rest and rest != form and (rest[0] in NASAL_ONSETS) == nasal:
                root = rest
    elif rule in SUFFIXES:
        root = form.removesuffix(SUFFIXES[rule]) if form.endswith(SUFFIXES[rule]) else None
    elif rule == REDUPLICATION:
        root = form[2:] if form[:2] == form[2:4] else None
    else:
        raise StoneyError(f"planted language: unknown rule {rule!r}; rules are {', '.join((CITATION, *RULES))}")
    return root if root is not None and is_root(root) else None


@dataclass(frozen=True)
class Entry:
    """One line of the lexicon: a form, what it means, how it is built (``segmentation``: liẖ-tâlo, tâ~tâlo)."""

    form: str
    gloss: str
    pos: str
    stem: str
    rule: str
    segmentation: str


class PlantedLanguage:
    """A lexicon of ``num_lexemes`` invented verbs, the same for the same seed on every machine.

    A larger language of the same seed begins with the lexemes of a smaller one. No two (stem, rule) pairs share a
    form, and no stem occurs inside a form of another stem. Raises ``StoneyError`` if ``num_lexemes`` is below 1 or
    above the number of distinct English glosses (``len(all_glosses())``, more than ten thousand).
    """

    def __init__(self, seed: int = 0, num_lexemes: int = 110) -> None:
        glosses = _shuffled_glosses(seed)
        if not 1 <= num_lexemes <= len(glosses):
            raise StoneyError(f"planted language: num_lexemes is {num_lexemes}; expected 1 to {len(glosses)}")
        self.seed = seed
        self.gloss_of = dict(zip(_roots(seed, num_lexemes), glosses, strict=False))

    @property
    def stems(self) -> list[str]:
        """The citation forms, in the order of the lexicon."""
        return list(self.gloss_of)

    def inflect(self, stem: str, rule: str) -> str:
        """The form of a stem of this lexicon. Raises ``StoneyError`` for an unknown stem or rule."""
        if stem not in self.gloss_of:
            raise StoneyError(f"planted language (seed {self.seed}): {stem!r} is no stem of its lexicon")
        return inflect(stem, rule)

    def meaning(self, stem: str, rule: str) -> str:
        """The English of a form: 'to gather' for the citation, 'I gather', 'not to gather', ... for the rules."""
        self.inflect(stem, rule)
        gloss = self.gloss_of[stem]
        return gloss if rule == CITATION else MEANINGS[rule].format(verb=gloss.removeprefix("to "))

    def analyse(self, form: str) -> list[tuple[str, str]]:
        """Every (stem, rule) of this lexicon with that form: one pair, or none for what the language does not have.

        The form is compared normalised and case-folded, diacritics kept; 'citation' is the bare stem.
        """
        form = fold(form)
        found = ((uninflect(form, rule), rule) for rule in (CITATION, *RULES))
        return [(stem, rule) for stem, rule in found if stem in self.gloss_of]

    def is_attested(self, form: str) -> bool:
        """Whether the language has the form: a stem of the lexicon, bare or under one rule."""
        return bool(self.analyse(form))

    def lexicon(self) -> list[Entry]:
        """Every form of the language: for each stem its citation, then each rule's form."""
        entries = []
        for stem in self.gloss_of:
            for rule in (CITATION, *RULES):
                morphs = segments(stem, rule)
                segmentation = ("~" if rule == REDUPLICATION else "-").join(morphs)
                entries.append(Entry("".join(morphs), self.meaning(stem, rule), "verb", stem, rule, segmentation))
        return entries

    def rows(
        self, *, rules_per_lexeme: int = 3, templates_per_fact: int = 3, lookup_fraction: float = 0.0
    ) -> list[Row]:
        """Question rows, shuffled: ``rules_per_lexeme`` facts a lexeme, each in ``templates_per_fact`` wordings.

        A fact is a (stem, rule) pair; each rule gets the same number of facts, give or take one, and facts that are
        left out allow 'known stem, untaught rule' to be asked. ``lookup_fraction`` of the lexemes also get
        'What is the invented word for "to gather"?' rows (rule 'lookup'), which can only be memorised.
        Raises ``StoneyError`` for numbers out of range.
        """
        problems = Problems()
        if not 1 <= rules_per_lexeme <= len(RULES):
            problems.add(f"rules_per_lexeme is {rules_per_lexeme}; expected 1 to {len(RULES)}")
        if not 1 <= templates_per_fact <= len(TEMPLATES):
            problems.add(f"templates_per_fact is {templates_per_fact}; expected 1 to {len(TEMPLATES)}")
        if not 0 <= lookup_fraction <= 1:
            problems.add(f"lookup_fraction is {lookup_fraction}; expected 0 to 1")
        problems.raise_if_any()

        rng = random.Random(f"planted rows {self.seed}")
        asked: list[tuple[str, str, str]] = []  # (stem, rule, template)
        facts_of_rule = dict.fromkeys(RULES, 0)
        for stem in self.gloss_of:
            tie_break = {rule: rng.random() for rule in RULES}
            for rule in sorted(RULES, key=lambda r: (facts_of_rule[r], tie_break[r]))[:rules_per_lexeme]:
                facts_of_rule[rule] += 1
                asked += [(stem, rule, name) for name in rng.sample(sorted(TEMPLATES), templates_per_fact)]
        for stem in rng.sample(self.stems, round(lookup_fraction * len(self.gloss_of))):
            asked += [(stem, LOOKUP, name) for name in rng.sample(sorted(LOOKUP_TEMPLATES), templates_per_fact)]
        rng.shuffle(asked)
        index = {stem: number for number, stem in enumerate(self.gloss_of)}
        return [
            self._row(f"planted-{self.seed}-{index[stem]:04d}-{rule}-{name}", f"rows.jsonl:{line}", stem, rule, name)
            for line, (stem, rule, name) in enumerate(asked, start=1)
        ]

    def _row(self, row_id: str, source: str, stem: str, rule: str, template: str) -> Row:
        gloss = self.gloss_of[stem]
        if rule == LOOKUP:
            form, question = stem, LOOKUP_TEMPLATES[template].format(gloss=gloss)
        else:
            form = inflect(stem, rule)
            question = TEMPLATES[template].format(stem=stem, gloss=gloss, meaning=self.meaning(stem, rule))
        return Row(
            id=row_id,
            source=source,
            prompt=[{"role": "user", "content": question}],
            completion=[{"role": "assistant", "content": ANSWER.format(form=form)}],
            lexemes=[stem],
            metadata={
                "language": LANGUAGE,
                "form": form,
                "stem": stem,
                "gloss": gloss,
                "rule": rule,
                "template": template,
                "sandhi": has_sandhi(stem, rule),
            },
        )


def all_glosses() -> list[list[str]]:
    """Distinct English glosses in three tiers: 'to gather'; 'to carry wood'; either of them 'at dawn'."""
    plain = [f"to {verb}" for verb in _VERBS.split()]
    with_object = [
        f"to {verb} {noun}" for verbs, nouns in _VERBS_WITH_OBJECTS for verb in verbs.split() for noun in nouns.split()
    ]
    return [plain, with_object, [f"{gloss} {adjunct}" for gloss in plain + with_object for adjunct in _ADJUNCTS]]


def _shuffled_glosses(seed: int) -> list[str]:
    rng = random.Random(f"planted glosses {seed}")
    tiers = all_glosses()
    for tier in tiers:
        rng.shuffle(tier)
    return [gloss for tier in tiers for gloss in tier]


def _roots(seed: int, count: int) -> list[str]:
    """``count`` distinct roots, none of which occurs inside a form of another."""
    # str seeds are hashed with SHA-512 by random.Random, so the draw does not depend on PYTHONHASHSEED.
    rng = random.Random(f"planted roots {seed}")
    roots: dict[str, None] = {}
    inside: set[str] = set()  # every substring, long enough to be a root, of the forms so far
    while len(roots) < count:
        root = rng.choice(_ONSETS) + rng.choice(NASAL_VOWELS)
        for _ in range(rng.choice((1, 2))):
            root += rng.choice(CONSONANTS) + rng.choice(VOWELS)
        if not is_root(root) or root in inside:
            continue
        parts = {part for rule in RULES for part in _substrings(inflect(root, rule), 4, 6)}
        if parts.isdisjoint(roots):
            roots[root] = None
            inside |= parts
    return list(roots)


def _substrings(text: str, shortest: int, longest: int) -> list[str]:
    return [text[i : i + n] for n in range(shortest, longest + 1) for i in range(len(text) - n + 1)]


def write_lexicon(path: Path, entries: list[Entry]) -> None:
    """Write the entries as JSON lines, under a temporary name until the file is whole. Raises ``StoneyError``."""
    write_lines(path, (json.dumps(asdict(entry), ensure_ascii=False).encode() for entry in entries))


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    parser.add_argument("--output_dir", required=True, help="directory for rows.jsonl and lexicon.jsonl")
    parser.add_argument("--num_lexemes", type=positive_int, default=110, help="number of invented verbs")
    parser.add_argument("--seed", type=int, default=0, help="a seed is a language: roots, glosses and rows follow it")
    parser.add_argument("--rules_per_lexeme", type=positive_int, default=3, help="rules asked of each verb (1 to 6)")
    parser.add_argument("--templates_per_fact", type=positive_int, default=3, help="wordings of each question (1 to 6)")
    parser.add_argument(
        "--lookup_fraction",
        type=fraction,
        default=0.0,
        help="part of the verbs that also get dictionary questions, which can only be memorised",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = parse_args(build_parser(), argv)
    language = PlantedLanguage(args.seed, args.num_lexemes)
    rows = language.rows(
        rules_per_lexeme=args.rules_per_lexeme,
        templates_per_fact=args.templates_per_fact,
        lookup_fraction=args.lookup_fraction,
    )
    lexicon = language.lexicon()
    output_dir = Path(args.output_dir)
    write_jsonl(output_dir / "rows.jsonl", rows)
    write_lexicon(output_dir / "lexicon.jsonl", lexicon)
    print(f"{output_dir}: {len(rows)} rows about {args.num_lexemes} invented verbs, {len(lexicon)} lexicon forms")


if __name__ == "__main__":
    run(main)
