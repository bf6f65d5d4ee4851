"""What an inspection found: one ``Section`` a question, with its figures and the findings that follow from them."""

from dataclasses import asdict, dataclass, field

# A failure would spoil a training run or a claim, and ``--strict`` ends with exit code 1 because of it; a note is
# worth knowing, or is repaired when rows are read.
FAILURE, NOTE = "failure", "note"
MAX_EXAMPLES = 5  # in the report; findings.jsonl has every row

# Kinds of severity failure, each of which ``--allow`` can let pass.
FAILURES = (
    "quarantined_rows",
    "exact_duplicates",
    "near_duplicates",
    "contradictions",
    "answer_repeats_question",
    "question_gives_answer",
    "cut_answers",
    "mojibake",
    "look_alikes",
    "initial_letter_gap",
    "no_split",
)
# Kinds whose rows ``--drop`` can leave out of a prepared directory.
DROPPABLE = (
    "exact_duplicates",
    "near_duplicates",
    "contradictions",
    "answer_repeats_question",
    "question_gives_answer",
    "question_offers_answer",
    "echo_earns_forms",
    "cut_answers",
    "mojibake",
    "look_alikes",
)


@dataclass(frozen=True)
class Finding:
    """One kind of fault and everything that has it.

    kind: its name in reports, ``--allow`` and ``--drop``, such as ``near_duplicates``. count, total: how many of how
    many ``unit`` ("rows", "forms", "letters", "characters") have it. message: one line: what, why it matters, what to
    do. row_ids: the rows concerned, all of them, in source order, each once (empty where the unit is not rows).
    details: what is wrong with each of ``row_ids``, in the same order ("" where there is no more to say).
    examples: a few for a person to look at, plain dictionaries of short texts with the same keys.
    """

    kind: str
    severity: str
    count: int
    total: int
    unit: str
    message: str
    row_ids: tuple[str, ...] = ()
    details: tuple[str, ...] = ()
    examples: tuple[dict, ...] = ()

    def summary(self) -> dict:
        """For report.json: everything but the rows, which findings.jsonl lists."""
        return {key: value for key, value in asdict(self).items() if key not in ("row_ids", "details")}


@dataclass
class Section:
    """The answer to one question: ``figures`` is JSON-able and does not depend on time or machine."""

    name: str
    figures: dict
    findings: list[Finding] = field(default_factory=list)
