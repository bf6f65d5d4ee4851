"""Ways to earn a reward without answering, beside honest answers, for every task of a dataset.

Each attack is a function (task, ground) -> text, or None where it can't be made. None of them needs a model. ``GOLD``,
``HONEST`` and ``MISS`` are what they are measured against: the reference; a right answer in other words; a wrong but
attested form in a normal sentence.
"""

import random
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from stoney_rl.lexemes import contains_form
from stoney_rl.rewards.composite import Task
from stoney_rl.rewards.knowledge import Knowledge, is_of_the_language
from stoney_rl.rewards.terms import ATTEMPT_WORDS
from stoney_rl.text import fold, normalize, words

LONG = 10_000  # characters
HEDGED = 5  # alternatives beside the wanted form: those that a verb of the planted language has
FIRST_LETTERS = 2  # that forms share which look like alternatives, where the lexicon gives no stem
FLUENT = (
    "That is a very good question. The language has a rich tradition, and its speakers choose their words with great "
    "care, so the best answer depends on the situation and on who is speaking."
)
CONSTANT = "The word is used in everyday speech."
_SPRINKLED = "\u0302\u0331\u0304\u0308"  # circumflex, macron below, macron, diaeresis


@dataclass(frozen=True)
class Ground:
    """What an adversary knows: all tasks of the dataset, the lexicon, and a source of chance."""

    tasks: Sequence[Task]
    knowledge: Knowledge
    rng: random.Random

    # Walks through the whole lexicon, once for all tasks.
    @cached_property
    def stems(self) -> list[str]:
        """Every stem once, in order."""
        return sorted(set(self.knowledge.stems.values()))

    @cached_property
    def words(self) -> list[str]:
        """The forms of one word that are not all ASCII."""
        return [form for form in self.knowledge.forms if " " not in form and not form.isascii()]

    @cached_property
    def kin(self) -> dict[str, list[str]]:
        """The forms by ``family``."""
        groups = defaultdict(list)
        for form in self.knowledge.forms:
            groups[self.family(form)].append(form)
        return dict(groups)

    def family(self, form: str) -> str:
        """The stem that the lexicon gives the form, else its first letters."""
        key = fold(form)
        return self.knowledge.stems.get(key) or key[:FIRST_LETTERS]


Attack = Callable[[Task, Ground], str | None]


def gold(task: Task, ground: Ground) -> str:
    """The reference itself."""
    return task.reference


def honest(task: Task, ground: Ground) -> str | None:
    """A right answer in other words: the wanted forms in a sentence of its own, or the reference's sentences turned round."""
    if task.wanted:
        return said(task.wanted)
    sentences = [part for part in normalize(task.reference).replace("? ", ". ").split(". ") if part.strip()]
    if len(sentences) > 1:
        return ". ".join([*sentences[1:], sentences[0]]).rstrip(".") + "."
    clauses = normalize(task.reference).rstrip(".").split(", ")
    return "In short: " + ", ".join(clauses) + "."


def said(forms: Sequence[str]) -> str:
    """An answer in the adversary's own words."""
    return "For this one says " + ", ".join(f'"{form}"' for form in forms) + "."


def honest_with_a_trace(task: Task, ground: Ground) -> str:
    """The honest answer after a short trace that arrives at it."""
    answer = honest(task, ground)
    return f"<think>I look for what is asked. That leads to this: {answer}</think>{answer}"


def miss(task: Task, ground: Ground) -> str | None:
    """An honest miss: another attested form in the sentence of the honest answer."""
    wrong = _other_form(task, ground)
    return said([wrong]) if task.wanted and wrong else None


def _other_form(task: Task, ground: Ground) -> str | None:
    """An attested form that the task does not want and that no text of it holds."""
    forms = ground.knowledge.forms
    for _ in range(50 if forms else 0):
        form = ground.rng.choice(forms)
        if len(words(form)) <= ATTEMPT_WORDS and _is_another(form, task):
            return form
    return None


def _is_another(form: str, task: Task) -> bool:
    """Whether the form is neither wanted nor in a text of the task. One without a word of its own that looks like the
    language's is no attempt that anybody could see."""
    return any(map(is_of_the_language, words(fold(form)))) and not any(
        contains_form(text, form) or contains_form(form, want)
        for text in (task.question, task.reference)
        for want in task.wanted or ("",)
    )


def empty(task: Task, ground: Ground) -> str:
    return ""


def whitespace(task: Task, ground: Ground) -> str:
    return " \n\t \u00a0 "


def prompt_echo(task: Task, ground: Ground) -> str:
    return task.question


def question_forms(task: Task, ground: Ground) -> str | None:
    """The forms that the question names, copied."""
    found = dict.fromkeys(word for word in words(task.question) if is_of_the_language(fold(word)))
    return "The answer is " + ", ".join(f'"{word}"' for word in found) + "." if found else None


def shuffled(task: Task, ground: Ground) -> str:
    letters = list(task.reference)
    ground.rng.shuffle(letters)
    return "".join(letters)


def reversed_letters(task: Task, ground: Ground) -> str:
    return task.reference[::-1]


def stripped_diacritics(task: Task, ground: Ground) -> str | None:
    bare = "".join(c for c in unicodedata.normalize("NFD", task.reference) if not unicodedata.combining(c))
    unchanged = [form for form in task.wanted if contains_form(bare, form)]
    return bare if bare != normalize(task.reference) and not unchanged else None


def sprinkled_diacritics(task: Task, ground: Ground) -> str | None:
    """Diacritics at random on the letters of the wanted forms."""
    text = task.reference
    for form in task.wanted:
        changed = "".join(
            c + ground.rng.choice(_SPRINKLED) if c.isalpha() and ground.rng.random() < 0.5 else c for c in form
        )
        changed = changed if changed != form else form + ground.rng.choice(_SPRINKLED)
        text = text.replace(form, unicodedata.normalize("NFC", changed))
    return text if task.wanted and not any(contains_form(text, form) for form in task.wanted) else None


def affix_on_wrong_stem(task: Task, ground: Ground) -> str | None:
    """The wanted form's affixes on a stem of another form."""
    key = fold(task.wanted[0]) if task.wanted else ""
    segments, stem = ground.knowledge.segments.get(key, ()), ground.knowledge.stems.get(key)
    stems = ground.stems
    if len(segments) < 2 or len(stems) < 2:
        return None
    at = ground.rng.randrange(len(stems) - 1)  # of the others
    wrong = stems[at + (at >= bisect_left(stems, stem))]
    return _instead_of_the_first(task, "".join(wrong if morph == stem else morph for morph in segments))


def stem_without_affix(task: Task, ground: Ground) -> str | None:
    key = fold(task.wanted[0]) if task.wanted else ""
    stem = ground.knowledge.stems.get(key)
    return _instead_of_the_first(task, stem) if stem and stem != key else None


def _instead_of_the_first(task: Task, made: str) -> str | None:
    """The reference with ``made`` for the first wanted form; None if a wanted form is left, which earns its share."""
    text = task.reference.replace(task.wanted[0], made)
    return None if any(contains_form(text, form) for form in task.wanted) else text


def every_word(task: Task, ground: Ground) -> str | None:
    """The lexicon listed, up to 500 forms, the wanted ones among them."""
    forms = [*task.wanted, *ground.knowledge.forms[:500]]
    return ", ".join(f'"{form}"' for form in forms) + "." if ground.knowledge.forms else None


def alternatives(task: Task, ground: Ground) -> list[str]:
    """Up to ``HEDGED`` other forms of the first wanted form's family, at random: of its stem, or where the lexicon gives
    none, forms that begin alike."""
    kin = ground.kin.get(ground.family(task.wanted[0]), []) if task.wanted else []
    drawn = ground.rng.sample(kin, min(4 * HEDGED, len(kin)))  # of which some will be wanted or asked about
    return [form for form in drawn if _is_another(form, task)][:HEDGED]


def hedge(task: Task, ground: Ground) -> str | None:
    """The wanted forms and the alternatives in one answer."""
    others = alternatives(task, ground)
    return said([*task.wanted, *others]) if others else None


def gold_in_the_reasoning(task: Task, ground: Ground) -> str | None:
    """The gold answer stuffed in the trace, and a wrong final answer."""
    wrong = _other_form(task, ground)
    return f'<think>{task.reference} {task.reference}</think>"{wrong}".' if wrong else None


def gold_repeated(task: Task, ground: Ground) -> str:
    return " ".join([task.reference] * 20)


def fluent_english(task: Task, ground: Ground) -> str:
    return FLUENT


def invented_form(task: Task, ground: Ground) -> str | None:
    """A plausible form that nothing attests: two lexicon words cut and joined."""
    for _ in range(50 if len(ground.words) > 1 else 0):
        first, second = ground.rng.sample(ground.words, 2)
        made = first[: (len(first) + 1) // 2] + second[len(second) // 2 :]
        if fold(made) not in ground.knowledge.attested and fold(made) not in task.allowed:
            return said([made]) if is_of_the_language(fold(made)) else None
    return None


def another_gold(task: Task, ground: Ground) -> str | None:
    """The gold answer of another row that asks for something else."""
    for _ in range(50):
        other = ground.rng.choice(ground.tasks)
        same = fold(other.reference) == fold(task.reference)
        if not same and not any(contains_form(other.reference, form) for form in task.wanted):
            return other.reference
    return None


def padded(task: Task, ground: Ground) -> str:
    """The right answer, then filler up to the limit of a completion, and three times as much as the answer."""
    filler = " And so on, as has been said."
    return task.reference + filler * max(60, 3 * len(task.reference) // len(filler) + 1)


def idle_trace(task: Task, ground: Ground) -> str:
    """A trace that says nothing, and an answer to no question."""
    return f"<think>I look for what is asked.</think>{CONSTANT}"


def unclosed_trace(task: Task, ground: Ground) -> str:
    return f"<think>I have to find the form. {task.reference}"


def ten_thousand_characters(task: Task, ground: Ground) -> str:
    return ("word " * LONG)[:LONG]


def control_characters(task: Task, ground: Ground) -> str:
    return "\x00" + "\x1b[2K".join(task.reference.split(" ")) + "\x07\x00"


REFERENCES: dict[str, Attack] = {
    "gold": gold,
    "honest answer": honest,
    "the same with a trace": honest_with_a_trace,
    "honest miss": miss,
}
ATTACKS: dict[str, Attack] = {
    "empty": empty,
    "whitespace": whitespace,
    "prompt echoed": prompt_echo,
    "question's forms copied": question_forms,
    "reference shuffled": shuffled,
    "reference reversed": reversed_letters,
    "diacritics stripped": stripped_diacritics,
    "diacritics sprinkled": sprinkled_diacritics,
    "right affix, wrong stem": affix_on_wrong_stem,
    "right stem, no affix": stem_without_affix,
    "every lexicon word": every_word,
    "alternatives listed": hedge,
    "gold in the reasoning only": gold_in_the_reasoning,
    "gold twenty times": gold_repeated,
    "fluent English": fluent_english,
    "invented form": invented_form,
    "another row's gold": another_gold,
    "gold, padded": padded,
    "any answer after a trace": idle_trace,
    "trace never closed": unclosed_trace,
    "ten thousand characters": ten_thousand_characters,
    "control characters": control_characters,
}
# What a policy earns that has learned nothing: its mean must stay below an honest answer's.
NULL_POLICIES: dict[str, Attack] = {
    "says nothing": empty,
    "always the same": lambda task, ground: CONSTANT,
    "always the same, after a trace": idle_trace,
    "echoes the prompt": prompt_echo,
}
