"""Section "lengths": characters, bytes and tokens of the rows, what a length limit would cut, and what a word costs.

Tokens are counted as training counts them: prompt format, chat template and end of turn included (``prompts``).
Tokens a word: words of the language (in its forms) against English words (of the prose around them), each encoded
after a space, as inside a sentence; once for each distinct word, and weighted by occurrences.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stoney_rl.data import Row
from stoney_rl.inspection.findings import FAILURE, NOTE, Finding, Section
from stoney_rl.lexemes import planted_form
from stoney_rl.text import fold, words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
# Words of the prose are counted on this many rows, evenly spaced over the source.
WORD_SAMPLE = 5000
MAX_WORD = 40  # characters; longer ones are no words, and one of them would move the mean
BINS = 40


def find(
    rows: Sequence[Row], max_length: int, tokenizer: "PreTrainedTokenizerBase | None" = None, missing: str = ""
) -> Section:
    """Lengths of ``rows`` (with lexemes). Without a ``tokenizer`` the token figures are None; ``missing`` says why.

    ``tokenizer`` is one that ``prompts.prepare_tokenizer`` has completed.
    """
    figures: dict = {
        part: {
            "characters": _spread([len(text) for text in texts]),
            "bytes": _spread([len(text.encode()) for text in texts]),
        }
        for part, texts in (("question", [row.question for row in rows]), ("answer", [row.answer for row in rows]))
    }
    figures |= {
        "max_length": max_length,
        "tokenizer": getattr(tokenizer, "name_or_path", None),
        "no_tokens": missing or None,
    }
    figures |= {"tokens": None, "words": None, "letters_split": None}
    if tokenizer is None:
        return Section("lengths", figures)

    from stoney_rl import prompts

    ends = prompts.end_of_turn_ids(tokenizer)
    counts = list(prompts.count_tokens(tokenizer, [(row.prompt, row.answer) for row in rows], ends))
    whole = [total for _, total in counts]
    cut = [at for at, total in enumerate(whole) if total > max_length]
    lost = [at for at in cut if counts[at][0] >= max_length]
    figures["tokens"] = {
        "prompt": _spread([prompt for prompt, _ in counts]),
        "answer": _spread([total - prompt for prompt, total in counts]),
        "row": _spread(whole),
        "total": sum(whole),
        "answer_share": sum(total - prompt for prompt, total in counts) / sum(whole),
        "rows_cut": len(cut),
        "answers_cut": len(cut) - len(lost),
        "answers_lost": len(lost),
        "max_length_for_all": max(whole),
    }
    figures["words"] = _tokens_a_word(tokenizer, rows)
    figures["letters_split"] = _split_letters(tokenizer, rows)
    findings = []
    if cut:
        findings.append(
            Finding(
                kind="cut_answers",
                severity=FAILURE,
                count=len(cut),
                total=len(rows),
                unit="rows",
                message=f"rows longer than --max_length {max_length}: training would cut the end of {len(cut) - len(lost):,} "
                f"answers and leave out {len(lost):,} rows whole; {max(whole):,} tokens would hold every row",
                row_ids=tuple(rows[at].id for at in cut),
                details=tuple(f"{counts[at][0]} prompt + {counts[at][1] - counts[at][0]} answer tokens" for at in cut),
            )
        )
    ratio = figures["words"]["ratio"]
    if ratio and ratio >= 2:
        findings.append(
            Finding(
                kind="costly_words",
                severity=NOTE,
                count=figures["words"]["language"]["types"],
                total=figures["words"]["language"]["types"],
                unit="words",
                message=f"a word of the language takes {figures['words']['language']['tokens_a_word']:.1f} tokens, an English "
                f"one {figures['words']['english']['tokens_a_word']:.1f} ({ratio:.1f} times): forms are spelled, not known; "
                "compare models with tokens a word matched, and leave room in --max_new_tokens",
            )
        )
    return Section("lengths", figures, findings)


def _spread(values: list[int]) -> dict:
    """{mean, percentiles {"0": ..., "100": ...}, histogram {edges [bins + 1], counts [bins]}} of ``values``."""
    import numpy

    array = numpy.asarray(values)
    # The histogram ends at the 99.5th percentile: one very long row would leave nothing to see.
    high = max(1, int(numpy.percentile(array, 99.5)))
    low = int(array.min())
    counts, edges = numpy.histogram(numpy.minimum(array, high), bins=min(BINS, max(1, high - low)))
    return {
        "mean": round(float(array.mean()), 2),
        "percentiles": {str(p): float(numpy.percentile(array, p)) for p in PERCENTILES},
        "histogram": {"edges": [round(float(edge), 3) for edge in edges], "counts": counts.tolist()},
    }


def _tokens_a_word(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row]) -> dict:
    """Tokens a word of the language and of English; ``ratio``: the one by the other, both over distinct words."""
    step = -(-len(rows) // WORD_SAMPLE)
    sample = rows[::step]
    language: Counter[str] = Counter()
    english: Counter[str] = Counter()
    for row in sample:
        own = {word for form in [*row.lexemes, planted_form(row) or ""] for word in words(fold(form))}
        for word in words(fold(f"{row.question}\n{row.answer}")):
            if len(word) > MAX_WORD:
                continue
            if word in own:
                language[word] += 1
            elif word.isascii():  # affixes and other pieces of the language are neither
                english[word] += 1
    marked = Counter({word: count for word, count in language.items() if not word.isascii()})
    measured = {
        name: _cost(tokenizer, counts)
        for name, counts in (("language", language), ("language_marked", marked), ("english", english))
    }
    both = [measured[name]["tokens_a_word"] for name in ("language", "english")]
    return {"rows_sampled": len(sample), **measured, "ratio": round(both[0] / both[1], 3) if all(both) else None}


def _cost(tokenizer: "PreTrainedTokenizerBase", counts: Counter) -> dict:
    if not counts:
        return {"types": 0, "occurrences": 0, "tokens_a_word": None, "tokens_an_occurrence": None, "one_token": None}
    distinct = sorted(counts)
    ids = tokenizer([f" {word}" for word in distinct], add_special_tokens=False)["input_ids"]
    tokens = [len(found) for found in ids]
    occurrences = sum(counts.values())
    weighted = sum(number * counts[word] for word, number in zip(distinct, tokens, strict=True))
    return {
        "types": len(distinct),
        "occurrences": occurrences,
        "tokens_a_word": round(sum(tokens) / len(tokens), 3),
        "tokens_an_occurrence": round(weighted / occurrences, 3),
        "one_token": round(sum(number == 1 for number in tokens) / len(tokens), 4),
    }


def _split_letters(tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row]) -> dict[str, int]:
    """Letters of the forms that take more than one token by themselves, with that number: bytes, not letters, are seen."""
    letters = sorted({letter for row in rows for form in row.lexemes for letter in fold(form) if not letter.isascii()})
    ids = tokenizer(letters, add_special_tokens=False)["input_ids"] if letters else []
    return {letter: len(found) for letter, found in zip(letters, ids, strict=True) if len(found) > 1}
