"""Rows of English prose about the planted (invented) language, in the manner of generated dictionary questions.

Their text is all there is to know: no row names its lexemes, so what a reader makes of them (forms, glosses, parts of
speech) can be compared with what they state, which is known exactly.

    rows, stated = prose_rows(PlantedLanguage(0, 400), count=1000)

A row asks how to say something, what a form means, how two forms differ, which of two fits, which class a form has,
what a stem becomes, which stem two forms share, or what a phrase of two words says. Three quarters of the lexemes stay
verbs with the glosses of ``planted``; the others are nouns ("a place to gather"). Phrases begin with an adverb
(âfelo, afelâ): roots begin with consonants, adverbs with vowels, so each letter begins some word.

The rows are clean: each question is asked once, no two rows are about the same forms in the same way, no question holds
the form it asks for, and a form has the same gloss and part of speech wherever it stands.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from string import Formatter

from stoney_rl.data import Row
from stoney_rl.errors import StoneyError
from stoney_rl.planted import (
    CITATION,
    CONSONANTS,
    FOREIGN,
    NASAL_VOWELS,
    REDUPLICATION,
    RULES,
    VOWELS,
    PlantedLanguage,
    all_glosses,
    segments,
)

TRANSITIVE, INTRANSITIVE, STATIVE = "active transitive verb", "active intransitive verb", "stative verb"
CAUSATIVE = "causative verb"
ALIENABLE, INALIENABLE = "alienable noun", "inalienable noun"
ADVERB, VERB_PHRASE, NOUN_PHRASE = "adverb", "verb phrase", "noun phrase"
PARTS_OF_SPEECH = (
    *(TRANSITIVE, INTRANSITIVE, STATIVE, CAUSATIVE),
    *(ALIENABLE, INALIENABLE, ADVERB, VERB_PHRASE, NOUN_PHRASE),
)


@dataclass(frozen=True, slots=True)
class Stated:
    """What one row states about one form: ``gloss`` and ``pos`` are None where the row does not say."""

    row_id: str
    form: str
    gloss: str | None
    pos: str | None


@dataclass(frozen=True, slots=True)
class _Item:
    form: str
    gloss: str
    pos: str
    stem: str = ""
    rule: str = CITATION


# In templates {f} is a quoted form, {g} its quoted gloss, {p} its part of speech, {ap} the same with an article, {qp}
# in quotes; {f2}, {g2}, ... belong to the second form. {x} and {y} are the first two forms in either order, both of
# which the answer names too; {affix} is the affix of the first, {L} the language.
_SCENES = """
At a language circle,
During a long car ride,
In a letter to a cousin,
On a poster for the classroom,
While labeling a drawing,
While reading an old notebook,
Around the evening fire,
In a play that children perform,
At a market stall,
After a workshop for beginners,
In a song that the class composes,
For a radio greeting,
While sorting flash cards,
When teaching a younger brother,
In a conversation with a grandmother,
For the caption of a photograph,
While preparing a short speech,
In a game of riddles,
When answering a text message,
For a sign beside the trail,
On the first page of a workbook,
In a recorded interview,
While checking a glossary,
For a crossword puzzle,
At the end of a lesson,
Before a visit to relatives,
In a bedtime story,
While translating a comic strip,
During a canoe trip,
In a quiz between two teams,
"""
_STORIES = """
A learner has lost the page of the dictionary.
Two friends disagree about a word.
A teacher writes an exercise on the board.
A traveler wants to be understood by the host.
A child keeps asking about one particular expression.
An editor checks the proofs of a small dictionary.
A singer is looking for a line that fits the melody.
A student has mixed up two cards of the vocabulary box.
A grandfather corrects the homework with a smile.
A storyteller pauses and searches for the right expression.
A visitor has written something on the back of an envelope.
A class prepares a small exhibition about words.
A nurse would like to speak a little with a patient.
A volunteer enters new words into a list.
A neighbor has heard something through the open window.
A young hunter repeats what the others have said.
An actor learns a part for the village play.
A linguist goes through field notes from last summer.
"""
_LANGUAGES = ("the invented language", "this invented language", "the invented tongue", "our invented language")

_INTO_QUESTIONS = """
how would you say {g} in {L}?
what is the invented word for {g}?
which invented term would you choose in order to express {g}?
how is {g} rendered in {L}?
what would a speaker of {L} use for {g}?
which expression of {L} carries the meaning {g}?
suppose that somebody needs the idea {g}. What does the invented dictionary offer?
could you translate {g} into {L}?
the blank on the page stands for {g}. Which invented form belongs there?
what do speakers of {L} say when they mean {g}?
if {g} is the thought to be put into words, which invented form does that?
name the form that corresponds to {g} in {L}, please.
"""
_INTO_ANSWERS = """
To say {g} you would use {f}.
You would use {f}, {ap} that means {g}.
The fitting form is {f}. This {p} specifically means {g}.
{f} is the invented word here; it translates to {g}.
One says {f}, which the dictionary lists as {ap} for {g}.
The invented term is {f} ({g}).
Speakers would choose {f}. It is classified as {ap}.
Such a thought is expressed with {f}, and the entry gives {g} as its meaning.
{f} would be the natural choice: {ap} with the meaning {g}.
In this case {f} fits, because it is defined as {g}.
The entry {f} answers this. It is {ap} and stands for {g}.
It is {f}. The glossary marks this form as {qp} and explains it as {g}.
"""
_MEANING_QUESTIONS = """
what does {f} mean?
how would you translate {f} into English?
what is the English meaning of the invented form {f}?
which idea does {f} express in {L}?
somebody uses the word {f}. What should the listener understand?
if you came across {f} in {L}, how would you explain it?
how would an English gloss for {f} read?
which English wording comes closest to {f}?
please explain the invented expression {f} to a beginner.
what would you write next to {f} in an English glossary?
the word {f} is underlined twice. What does it say in plain English?
how does {L} intend {f} to be understood?
"""
_MEANING_ANSWERS = """
{f} means {g}.
{f} translates to {g}. The entry calls it {ap}.
In English, {f} is {g}.
{f} is {ap} meaning {g}.
The English for {f} is {g}, according to the invented dictionary.
A good gloss for {f} would be {g}.
{f} ({g}) is listed as {qp} in the glossary.
It means {g}. The form {f} is classified as {ap}.
An English speaker would say {g} where the invented language has {f}.
{f} is {ap}. It is used for {g}.
{f} can be understood as {g}.
The invented form {f} is defined as {g} and belongs to the entries marked {qp}.
"""
_CLASS_QUESTIONS = """
to which word class does {f} belong?
what part of speech is {f} in {L}, and what is it good for?
how does the invented dictionary classify {f}?
the entry {f} is glossed as {g}. Which grammatical label does it carry?
{f} is said to mean {g}. What kind of word is it?
which grammatical category would you note beside {f}?
what does the grammar of {L} call a form such as {f}?
consider {f} with the gloss {g}. How would a grammarian describe its class?
the label of {f} has faded. Which part of speech stood there?
"""
_CLASS_ANSWERS = """
{f} is classified as {ap}. Its meaning is {g}.
The dictionary lists {f} as {qp}, with the gloss {g}.
{f} ({g}) belongs to the forms with the label {qp}.
Grammatically, {f} is {ap}; in English it is {g}.
It is {ap}. The form {f} stands for {g}.
One would call {f} {ap}, since it expresses {g}.
{f} carries the label {qp} and is translated as {g}.
As the word for {g}, {f} counts as {ap}.
"""
_BUILD_QUESTIONS = """
the invented stem {f2} means {g2}. How would you express {g}?
starting from {f2} ({g2}), which form of {L} says {g}?
if {f2} stands for {g2}, what would {g} be in {L}?
{f2} is {ap2} for {g2}. Which form is built from it to say {g}?
a pupil knows only {f2}, {g2}. Help with the form that means {g}.
how does the stem {f2} ({g2}) change when a speaker of {L} wants to say {g}?
take the verb {f2}, which is glossed {g2}, and derive the invented form for {g}.
from {f2} meaning {g2} one can derive {g}. What does the result look like?
"""
_BUILD_ANSWERS = """
The form is {f}, {ap} that means {g}.
You would build {f}. It translates to {g}.
{f} means {g}.
The stem becomes {f} ({g}).
The result is {f}, and {g} is its meaning.
Speakers of the invented language would say {f} for {g}.
{f} is what one gets, {ap} with the gloss {g}.
From this stem comes {f}, listed as {qp} and understood as {g}.
"""
_RULE_NOTES = {
    "first_person": """
The prefix {affix} marks the speaker as the one who acts.
Here {affix} in front of the stem refers to the speaker.
The beginning {affix} plays the part of the English pronoun for oneself.
""",
    "second_person": """
The prefix {affix} marks the person spoken to.
Here {affix} in front of the stem refers to the listener.
The beginning {affix} addresses the other person directly.
""",
    "plural": """
The suffix {affix} shows that several people are meant.
The ending {affix} turns it into something that a group does.
Behind the stem, the suffix {affix} stands for more than one person.
""",
    "negation": """
The suffix {affix} turns the statement into its opposite.
The ending {affix} denies what the stem says.
Behind the stem, the suffix {affix} works like an English negation.
""",
    "causative": """
The suffix {affix} adds somebody who brings the action about.
The ending {affix} makes a causative out of the plain stem.
Behind the stem, the suffix {affix} says that one person causes it in another.
""",
    REDUPLICATION: """
The first syllable of the stem is repeated, which shows repetition.
Doubling the beginning of the stem expresses that it happens more than once.
The copy of the first syllable makes the action go on.
""",
}
_DIFFERENCE_QUESTIONS = """
what is the difference between {f} and {f2}?
how do {f} and {f2} differ in meaning?
compare the invented words {f} and {f2}. What sets them apart?
both {f} and {f2} are in the glossary of {L}. How would you keep them apart?
somebody confuses {f} with {f2}. What would you explain?
{f} ({g}) and {f2} ({g2}) stand on the same page. Which grammatical difference do you notice?
why can't {f} be replaced by {f2} in {L}?
in which respect are {f} and {f2} unlike each other?
"""
_DIFFERENCE_ANSWERS = """
{f} means {g}, whereas {f2} means {g2}.
While {f} is {ap} for {g}, {f2} is {ap2} for {g2}.
{f} translates to {g}. In contrast, {f2} is {ap2} meaning {g2}.
The first, {f}, is used for {g}; the second, {f2}, for {g2}.
{f} ({g}) is classified as {ap}, but {f2} ({g2}) is listed as {qp2}.
One says {f} for {g} and {f2} for {g2}.
{f} is {ap} with the gloss {g}, and {f2} refers to {g2}.
With {f} a speaker says {g}. With {f2}, on the other hand, the meaning is {g2}.
"""
_CHOICE_QUESTIONS = """
somebody would like to express {g}. Which fits better, {x} or {y}?
which of the two invented words, {x} or {y}, suits the idea {g}?
should a speaker of {L} choose {x} or {y} for {g}?
between {x} and {y}, which one says {g}?
the cards show {x} and {y}. Which card belongs to {g}?
is {x} or is {y} the better match for {g}?
one of {x} and {y} stands for {g} in {L}. Which one is it?
the picture shows {g}. Would you write {x} or {y} below it?
"""
_CHOICE_ANSWERS = """
{f} is the right choice, because this {p} means {g}; {f2} would mean {g2}.
It has to be {f}, {ap} meaning {g}. The other word, {f2}, is {ap2}.
The better match is {f} ({g}), since {f2} translates to {g2}.
{f} fits, as it is defined as {g}. {f2} is something else: {g2}.
Take {f}. It stands for {g}, while {f2} is {ap2} for {g2}.
Of the two, {f} expresses {g}. The form {f2} is reserved for {g2}.
One would pick {f} here; {f2} is used for {g2} and would mislead the listener.
"""
_PATTERN_QUESTIONS = """
{f} means {g} and {f2} means {g2}. Which stem do they share?
compare {f} ({g}) with {f2} ({g2}). On which invented stem are they built?
the forms {f} and {f2} look alike. Which word of {L} is hidden in them?
{f} stands for {g} and {f2} for {g2}. What is the plain verb behind them?
take away what was added to {f} and {f2}. Which verb of {L} is left?
which entry should one look up in order to understand both {f} and {f2}?
"""
_PATTERN_ANSWERS = """
Both are built on {f3}, {ap3} that means {g3}.
They share {f3} ({g3}).
The common stem is {f3}. It is classified as {ap3} and means {g3}.
Behind them stands {f3}, which translates to {g3}.
One finds {f3} in each, listed as {qp3} with the meaning {g3}.
What remains is {f3}, the invented word for {g3}.
"""
_PHRASE_MEANING_QUESTIONS = """
how would you translate the phrase {f} into English?
what does the invented phrase {f} say as a whole?
two words stand side by side: {f}. What do they say together?
somebody calls out {f}. What would that be in English?
how should the expression {f} be read by a learner of {L}?
which English sentence part corresponds to the phrase {f}?
"""
_PHRASE_MEANING_ANSWERS = """
The phrase {f} translates to {g}.
{f} is {ap} meaning {g}. In it, the adverb {f2} means {g2}.
Together the words {f} say {g}, with {f2} as the adverb.
{f} can be rendered as {g}; the second word, {f3}, means {g3}.
As {ap}, {f} expresses {g}.
It is {g} in English. The phrase {f} consists of {f2} ({g2}) and {f3} ({g3}).
"""
_PHRASE_INTO_QUESTIONS = """
which phrase of {L} would you use for {g}?
how could one put {g} into two invented words?
what is the full phrase for {g} in {L}?
a line of the poem reads {g}. How does it sound in {L}?
which two words does a speaker of {L} join to say {g}?
the task is to write {g} as an invented phrase. What is the solution?
"""
_PHRASE_INTO_ANSWERS = """
To express {g} you would use the phrase {f}.
The phrase is {f}, {ap} for {g}. Its first word, {f2}, means {g2}.
One would say {f}, which is understood as {g}.
{f} is the invented phrase for {g}. The adverb comes first.
The two words are {f} ({g}), classified as {ap}.
{f} says exactly that: it translates to {g}.
"""
_PHRASE_BUILD_QUESTIONS = """
the adverb {f2} means {g2}, and {f3} means {g3}. How would you say {g}?
given {f3} ({g3}) and the adverb {f2} ({g2}), which phrase of {L} expresses {g}?
{f3} is {ap3} for {g3}; the word {f2} adds {g2}. Which phrase results for {g}?
knowing {f2} ({g2}) as well as {f3} ({g3}), how do you put {g} into {L}?
"""
_PHRASE_BUILD_ANSWERS = """
You would say {f}, with the adverb in front.
The phrase {f} means {g}.
Put the adverb first: {f} is {ap} that means {g}.
The words join to {f} ({g}).
The result is the phrase {f}, which translates to {g}.
"""

_GENERAL_NOTES = """
The invented dictionary gives exactly this pairing.
The entry has no other sense.
Learners usually meet it in the first lessons.
It is used in speech and in writing alike.
No other entry of the glossary covers this meaning.
The spelling follows the usual rules of the invented language.
The nasal vowel has to be pronounced clearly.
In a sentence it keeps this shape.
The translation is taken from the glossary as it stands.
A native speaker would recognize it at once, if there were one.
It works in formal and in friendly conversation.
The diacritics matter, because without them it would be another word.
Such entries are best learned together with an example.
This holds for every dialect that its inventors have described.
"""
_CLASS_NOTES = {
    TRANSITIVE: """
As {ap}, it takes an object.
Being {ap}, it says what somebody does to something.
Its class requires that something undergoes the action.
The object that it needs is often named before it.
""",
    INTRANSITIVE: """
As {ap}, it needs no object.
Being {ap}, it says what somebody does without acting on anything else.
Its class leaves no room for an object.
The subject alone is involved in the action.
""",
    STATIVE: """
As {ap}, it describes a condition rather than a deed.
Being {ap}, it tells how somebody is.
Its class covers conditions that last for a while.
It presents the situation as a state.
""",
    CAUSATIVE: """
As {ap}, it involves two participants.
Being {ap}, it names the one who brings something about.
Its class always speaks of somebody who causes the event.
Somebody else carries out what is caused.
""",
    ALIENABLE: """
As {ap}, it can be owned and given away.
Being {ap}, it may stand without an owner.
Its class contains things that change hands.
The owner can be left unmentioned.
""",
    INALIENABLE: """
As {ap}, it always belongs to somebody.
Being {ap}, it can't be separated from its owner.
Its class contains what is a part of a person.
The owner is understood even where nobody is named.
""",
    ADVERB: """
As {ap}, it tells in which manner something happens.
Being {ap}, it stands before the word that it modifies.
Its class never changes its form.
It needs another word to lean on.
""",
    VERB_PHRASE: """
As {ap}, it can form a sentence by itself.
Being {ap}, it keeps the order of manner and action.
The order of its two words is fixed.
The second word carries the action.
""",
    NOUN_PHRASE: """
As {ap}, it names something rather than an action.
Being {ap}, it can be the subject of a sentence.
The order of its two words is fixed.
The second word names the thing.
""",
}

_ADVERBS = """
quickly slowly quietly loudly gently bravely carefully proudly sadly happily eagerly patiently secretly openly calmly
gracefully rarely suddenly politely greedily nervously cheerfully honestly wisely neatly lazily firmly softly warmly
coldly often badly seriously quite differently
"""
_DEGREES = ("", "very ", "rather ", "too ", "less ", "unusually ")
_ALIENABLE_HEADS = ("a place to ", "a tool to ", "a song to ", "a path to ", "a house to ")
_INALIENABLE_HEADS = ("a wish to ", "an urge to ", "a need to ", "a hand to ")

# (form, gloss) quotes; the same row may use one pair in its question and another in its answer.
_QUOTES = [('"', '"'), ('"', '"'), ('"', "'"), ("`", '"'), ("`", '"'), ("`", "'"), ("`", "`"), ("'", "'"), ("'", '"')]
_BARE = ("", '"')  # forms without quotes, as a few generated rows have them


@cache
def _lines(text: str) -> tuple[str, ...]:
    return tuple(text.strip().splitlines())


@dataclass(frozen=True)
class _Kind:
    """A kind of question. share: how often it is asked, relative to the others."""

    share: int
    questions: tuple[str, ...]
    answers: tuple[str, ...]


_KINDS = {
    "into": _Kind(21, _lines(_INTO_QUESTIONS), _lines(_INTO_ANSWERS)),
    "meaning": _Kind(19, _lines(_MEANING_QUESTIONS), _lines(_MEANING_ANSWERS)),
    "class": _Kind(8, _lines(_CLASS_QUESTIONS), _lines(_CLASS_ANSWERS)),
    "build": _Kind(12, _lines(_BUILD_QUESTIONS), _lines(_BUILD_ANSWERS)),
    "difference": _Kind(10, _lines(_DIFFERENCE_QUESTIONS), _lines(_DIFFERENCE_ANSWERS)),
    "choice": _Kind(8, _lines(_CHOICE_QUESTIONS), _lines(_CHOICE_ANSWERS)),
    "pattern": _Kind(4, _lines(_PATTERN_QUESTIONS), _lines(_PATTERN_ANSWERS)),
    "phrase meaning": _Kind(6, _lines(_PHRASE_MEANING_QUESTIONS), _lines(_PHRASE_MEANING_ANSWERS)),
    "phrase into": _Kind(8, _lines(_PHRASE_INTO_QUESTIONS), _lines(_PHRASE_INTO_ANSWERS)),
    "phrase build": _Kind(4, _lines(_PHRASE_BUILD_QUESTIONS), _lines(_PHRASE_BUILD_ANSWERS)),
}


def prose_rows(language: PlantedLanguage, count: int, seed: int = 0) -> tuple[list[Row], list[Stated]]:
    """``count`` rows about ``language``, and what each of them states, in the order of the rows.

    The rows have no lexemes and no metadata but ``pair_id``. A larger ``count`` begins with the rows of a smaller one.
    Raises ``StoneyError`` if the language has too few forms for that many different questions.
    """
    rng = random.Random(f"planted prose {language.seed} {seed}")
    draws = _draws(language, rng)
    left = {name: kind.share for name, kind in _KINDS.items()}
    rows: list[Row] = []
    stated: list[Stated] = []
    while len(rows) < count:
        if not left:
            raise StoneyError(
                f"planted prose: {len(language.gloss_of)} lexemes give {len(rows)} different questions, asked for "
                f"{count}; ask for fewer, or use a language with more lexemes"
            )
        name = rng.choices(list(left), list(left.values()))[0]
        items = next(draws[name], None)
        if items is None:
            del left[name]
            continue
        number = len(rows)
        row_id = f"prose-{seed}-{number}"
        question, answer, told = _texts(_KINDS[name], items, rng)
        rows.append(
            Row(
                id=row_id,
                source=f"prose.jsonl:{number + 1}",
                prompt=[{"role": "user", "content": question}],
                completion=[{"role": "assistant", "content": answer}],
                lexemes=[],
                metadata={"pair_id": number},
            )
        )
        stated += [Stated(row_id, item.form, gloss, pos) for item, gloss, pos in told]
    return rows, stated


def _draws(language: PlantedLanguage, rng: random.Random) -> dict[str, Iterator[tuple[_Item, ...]]]:
    """For each kind of question an iterator of the forms to ask about, none of them twice."""
    items = {(item.stem, item.rule): item for item in _words_of(language)}
    verbs = [stem for stem, rule in items if rule == RULES[0]]
    adverbs = _adverbs(language)
    singles = [*items.values(), *adverbs]
    rng.shuffle(singles)
    inflected = [item for item in items.values() if item.rule != CITATION]
    rng.shuffle(inflected)
    middle = len(singles) // 2

    def pair() -> tuple[_Item, _Item]:
        """Two forms of one stem, or forms of two stems that are made alike."""
        first = rng.choice(list_of_items)
        if first.rule != CITATION and rng.random() < 0.4:
            return first, items[first.stem, rng.choice([rule for rule in (CITATION, *RULES) if rule != first.rule])]
        if first.rule != CITATION:
            return first, items[rng.choice(verbs), first.rule]
        return first, items[rng.choice(stems), CITATION]

    def pattern() -> tuple[_Item, _Item, _Item]:
        stem = rng.choice(verbs)
        first, second = rng.sample(RULES, 2)
        return items[stem, first], items[stem, second], items[stem, CITATION]

    def phrase() -> tuple[_Item, _Item, _Item]:
        adverb, word = rng.choice(adverbs), rng.choice(list_of_items)
        pos = NOUN_PHRASE if word.pos in (ALIENABLE, INALIENABLE) else VERB_PHRASE
        return _Item(f"{adverb.form} {word.form}", f"{word.gloss} {adverb.gloss}", pos), adverb, word

    list_of_items, stems = list(items.values()), list(language.gloss_of)
    pairs: set[frozenset[str]] = set()
    phrases: set[frozenset[str]] = set()
    number_of_phrases = len(adverbs) * len(list_of_items)
    return {
        # Different ends of one order: a form comes up in two kinds of questions only when many rows are asked for.
        "into": ((item,) for item in singles),
        "meaning": ((item,) for item in reversed(singles)),
        "class": ((item,) for item in [*singles[middle:], *singles[:middle]]),
        "build": ((item, items[item.stem, CITATION]) for item in inflected),
        "difference": _distinct(pair, pairs, len(list_of_items) * min(len(stems), 50) // 8),
        "choice": _distinct(pair, pairs, len(list_of_items) * min(len(stems), 50) // 8),
        "pattern": _distinct(pattern, set(), len(verbs) * 15 // 2),
        "phrase meaning": _distinct(phrase, phrases, number_of_phrases // 2),
        "phrase into": _distinct(phrase, phrases, number_of_phrases // 2),
        "phrase build": _distinct(phrase, phrases, number_of_phrases // 2),
    }


def _distinct(draw: Callable[[], tuple[_Item, ...]], seen: set[frozenset[str]], most: int) -> Iterator:
    """What ``draw`` gives, without sets of forms that were ``seen``, which grows to ``most`` sets."""
    while len(seen) < most:
        items = draw()
        forms = frozenset(item.form for item in items)
        if len(forms) == len(items) and forms not in seen:
            seen.add(forms)
            yield items


def _words_of(language: PlantedLanguage) -> Iterator[_Item]:
    """Every single word but the adverbs: all forms of the verbs, the nouns in their one form."""
    with_object = set(all_glosses()[1])
    for stem, gloss in language.gloss_of.items():
        # The class follows from the stem alone, so that it does not depend on the size of the lexicon.
        number = int.from_bytes(hashlib.blake2b(stem.encode(), digest_size=8).digest(), "big")
        verb = gloss.removeprefix("to ")
        if number % 8 == 0:
            yield _Item(stem, _ALIENABLE_HEADS[number // 8 % len(_ALIENABLE_HEADS)] + verb, ALIENABLE, stem)
        elif number % 8 == 1:
            yield _Item(stem, _INALIENABLE_HEADS[number // 8 % len(_INALIENABLE_HEADS)] + verb, INALIENABLE, stem)
        else:
            transitive = " ".join(gloss.split()[:3]) in with_object
            pos = TRANSITIVE if transitive else (INTRANSITIVE, STATIVE)[number // 8 % 2]
            for rule in (CITATION, *RULES):
                yield _Item(
                    "".join(segments(stem, rule)),
                    language.meaning(stem, rule),
                    CAUSATIVE if rule == "causative" else pos,
                    stem,
                    rule,
                )


def _adverbs(language: PlantedLanguage) -> list[_Item]:
    """Vowel-initial words, two or more for each vowel: no root begins with a vowel, and none fits inside of them."""
    rng = random.Random(f"planted adverbs {language.seed}")
    glosses = [degree + adverb for degree in _DEGREES for adverb in _ADVERBS.split()]
    vowels = NASAL_VOWELS + VOWELS
    forms: dict[str, None] = {}
    while len(forms) < min(len(glosses), max(3 * len(vowels), len(language.gloss_of) // 8)):
        first = vowels[len(forms) % len(vowels)]
        last = rng.choice(VOWELS if first in NASAL_VOWELS else NASAL_VOWELS)
        form = first + rng.choice(CONSONANTS) + rng.choice(VOWELS) + rng.choice(CONSONANTS) + last
        if not set(form).isdisjoint(FOREIGN):
            forms[form] = None
    return [_Item(form, gloss, ADVERB) for form, gloss in zip(forms, glosses, strict=False)]


def _texts(
    kind: _Kind, items: tuple[_Item, ...], rng: random.Random
) -> tuple[str, str, list[tuple[_Item, str | None, str | None]]]:
    """The question, the answer, and what both state: (item, gloss or None, part of speech or None)."""
    question = rng.choice(kind.questions)
    scene = rng.random()
    if scene < 0.55:
        question = f"{rng.choice(_lines(_SCENES))} {question}"
    elif scene < 0.8:
        question = f"{rng.choice(_lines(_STORIES))} {_capital(question)}"
    else:
        question = _capital(question)

    sentences = [rng.choice(kind.answers)]
    if kind is _KINDS["build"]:
        sentences.append(rng.choice(_lines(_RULE_NOTES[items[0].rule])))
    elif kind not in (_KINDS["difference"], _KINDS["choice"], _KINDS["pattern"]) and rng.random() < 0.6:
        sentences.append(rng.choice(_lines(_CLASS_NOTES[items[0].pos])))
    if len(sentences) == 1 or rng.random() < 0.25:
        sentences.append(rng.choice(_lines(_GENERAL_NOTES)))
    answer = " ".join(sentences)

    bare = rng.random() < 0.05 and not any(" " in item.form for item in items)
    quotes = _BARE if bare else rng.choice(_QUOTES)
    language, in_order = rng.choice(_LANGUAGES), rng.random() < 0.5
    asked = question.format_map(_values(items, quotes, language, in_order))
    if not bare and rng.random() < 0.3:
        quotes = rng.choice(_QUOTES)
    # An American comma or full stop stands inside of the closing quote.
    inside = quotes[1] == '"' and rng.random() < 0.35
    told = answer.format_map(_values(items, quotes, language, in_order))
    if inside:
        told = told.replace('",', ',"').replace('".', '."')

    used = _fields(question) | _fields(answer)
    statements = []
    for number, item in enumerate(items, start=1):
        suffix = "" if number == 1 else str(number)
        if "f" + suffix in used:
            gloss = item.gloss if "g" + suffix in used else None
            pos = item.pos if not used.isdisjoint({"p" + suffix, "ap" + suffix, "qp" + suffix}) else None
            statements.append((item, gloss, pos))
    return asked, told, statements


def _values(items: tuple[_Item, ...], quotes: tuple[str, str], language: str, in_order: bool) -> dict[str, str]:
    form_quote, gloss_quote = quotes
    values = {"L": language}
    for number, item in enumerate(items, start=1):
        suffix = "" if number == 1 else str(number)
        values["f" + suffix] = f"{form_quote}{item.form}{form_quote}"
        values["g" + suffix] = f"{gloss_quote}{item.gloss}{gloss_quote}"
        values["p" + suffix] = item.pos
        values["ap" + suffix] = f"{'an' if item.pos[0] in VOWELS else 'a'} {item.pos}"
        values["qp" + suffix] = f"{gloss_quote}{item.pos}{gloss_quote}"
    if len(items) > 1:
        values["x"], values["y"] = (values["f"], values["f2"]) if in_order else (values["f2"], values["f"])
    first = items[0]
    if first.rule not in (CITATION, REDUPLICATION):
        morphs = segments(first.stem, first.rule)
        affix = f"-{morphs[1]}" if morphs[0] == first.stem else f"{morphs[0]}-"
        values["affix"] = f'"{affix}"'
    return values


@cache
def _fields(template: str) -> frozenset[str]:
    return frozenset(name for _, name, _, _ in Formatter().parse(template) if name)


def _capital(template: str) -> str:
    """``template`` as the beginning of a sentence; a form keeps its letters."""
    return template[0].upper() + template[1:]
