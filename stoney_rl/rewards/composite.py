"""The composite reward: one number a completion from the terms, in [-w_hall, 1].

    R = B * H * (w_lex R_lex + w_sem R_sem + w_cot G R_cot + w_morph R_morph) / W  +  w_dict R_dict / W  -  w_hall P_hall

B is R_brev. H is min(precision, recall)^2 of the wanted forms (1 for a row that asks for no form). Recall, so that an answer
without the right form earns nothing for likeness to the reference: a sentence copied around a wrong form would be worth
more than an honest miss. Precision, so that naming several forms, the right one among them, earns no more than guessing
one of them does on average. R_dict is multiplied by B too once a wanted form is there. G is R_lex for a row that asks for no
form, else 1: any trace in front of any answer would be paid for otherwise. W is the sum of the weights of the terms that
could be scored, so that a term that is None leaves the others their share. Where none but R_cot and P_hall could be scored,
nothing says what the answer is worth, and R is None.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from stoney_rl.data import Row
from stoney_rl.errors import StoneyError
from stoney_rl.lexemes import target_forms
from stoney_rl.rewards import terms
from stoney_rl.rewards.completions import parse
from stoney_rl.rewards.knowledge import Knowledge, language_words

TERMS = ("R_lex", "R_sem", "R_cot", "R_dict", "R_morph", "P_hall")
JUDGES = ("R_lex", "R_sem", "R_dict", "R_morph")  # what can tell a right answer from a wrong one
DEFAULT_WEIGHTS = {"R_lex": 0.3, "R_sem": 0.2, "R_cot": 0.1, "R_dict": 0.3, "R_morph": 0.1, "P_hall": 0.3}


@dataclass(frozen=True)
class Task:
    """What one row asks: ``question`` is the last user turn, ``reference`` the gold answer.

    ``wanted``: forms asked for. ``allowed``: folded words of the language that the question or the reference has.
    ``columns``: what else the row has, for plug-ins: its whole prompt, its lexemes and its metadata.
    """

    id: str
    question: str
    reference: str
    wanted: tuple[str, ...]
    allowed: frozenset[str]
    columns: Mapping[str, object] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, row: Row) -> "Task":
        asked = "\n".join(turn["content"] for turn in row.prompt)
        allowed = frozenset([*language_words(asked), *language_words(row.answer)])
        columns = {**row.metadata, "lexemes": row.lexemes, "prompts": row.prompt}
        return cls(row.id, row.question, row.answer, tuple(target_forms(row)), allowed, columns)


@dataclass(frozen=True)
class Score:
    """``total`` and the value of each term by name (None: could not be scored), with ``R_brev``, and ``hit`` and ``precision``
    of the wanted forms."""

    total: float | None
    values: dict[str, float | None]


@dataclass
class Composite:
    """The reward of completions. ``unscored`` counts, over its lifetime, how often each term and ``total`` were None.

    Raises ``StoneyError`` for weights that are no reward: unknown terms, numbers below 0, nothing that judges the answer.
    """

    knowledge: Knowledge
    weights: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    similarity: Callable[[list[str], list[str], list[str]], list[float]] | None = None
    unscored: Counter = field(default_factory=Counter)
    scored: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(TERMS))
        if unknown:
            raise StoneyError(f"reward weights: no term {', '.join(unknown)}; expected {', '.join(TERMS)}")
        bad = [name for name, weight in self.weights.items() if not 0 <= weight < float("inf")]
        if bad or not any(self.weights.get(name, 0) for name in JUDGES):
            raise StoneyError(
                f"reward weights {dict(self.weights)}: expected numbers of at least 0, and one of {', '.join(JUDGES)} above 0"
            )

    def score(self, tasks: Sequence[Task], texts: Sequence[str]) -> list[Score]:
        """The score of each completion text for its task. Raises ``StoneyError`` for lists of different lengths."""
        if len(tasks) != len(texts):
            raise StoneyError(f"{len(texts)} completions for {len(tasks)} tasks: expected one each, in the same order")
        parsed = [parse(text) for text in texts]
        answers = [completion.answer for completion in parsed]
        references, questions = [task.reference for task in tasks], [task.question for task in tasks]
        wanted, allowed = [task.wanted for task in tasks], [task.allowed for task in tasks]
        columns = {
            "R_lex": terms.lexical(answers, references, questions),
            "R_sem": terms.semantic(answers, references, questions, self.similarity),
            "R_cot": terms.reasoning([one.reasoning for one in parsed], answers, allowed, self.knowledge),
            "R_dict": terms.dictionary(answers, references, wanted, allowed, self.knowledge),
            "R_morph": terms.morphology(answers, wanted, self.knowledge),
            "P_hall": terms.hallucination(answers, allowed, self.knowledge),
            "R_brev": terms.brevity(answers, references),
            "hit": terms.hit(answers, wanted),
            "precision": terms.precision(answers, references, wanted, allowed, self.knowledge),
        }
        self.scored += len(texts)
        for name in TERMS:
            self.unscored[name] += sum(value is None for value in columns[name])
        lines = [dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True)]
        scores = [Score(self._total(values), values) for values in lines]
        self.unscored["total"] += sum(score.total is None for score in scores)
        return scores

    def _total(self, values: Mapping[str, float | None]) -> float | None:
        def weighted(*names: str) -> float:
            return sum(self.weights.get(name, 0) * values[name] for name in names if values[name] is not None)

        if not any(self.weights.get(name, 0) and values[name] is not None for name in JUDGES):
            return None
        scored = [name for name in TERMS if name.startswith("R_") and values[name] is not None]
        whole = sum(self.weights.get(name, 0) for name in scored)
        right, exact, length = values["hit"], values["precision"], values["R_brev"]
        asked = right is not None
        trace = weighted("R_cot") * (1.0 if asked else values["R_lex"] or 0.0)
        likeness = weighted("R_lex", "R_sem", "R_morph") + trace
        if asked:
            likeness *= min(right, exact) ** 2
        anchor = weighted("R_dict") * (length if right else 1.0)
        return (length * likeness + anchor) / whole - weighted("P_hall")
