"""How well `stoney_rl.inspection.coverage` finds a left-out initial letter, and how often it cries wolf.

    python benchmarks/coverage.py
    python benchmarks/coverage.py --seeds 2 --languages en eu --sizes 2000

Planted language: lexicons of --planted_sizes forms, one for each of ten seeds (stems alone, and stems with their
derived forms, of which a prefix hides the stem's initial). Natural languages: samples of --sizes words, --seeds of
each, from the 20,000 most frequent words of pyspellchecker's lists. 'Clean' is the list as it is: every letter reported
is a false alarm, also where no word of the language begins with it by rule. 'Left out': all words that begin with one
letter are removed (of the planted language, all rows that mention one), for each letter that begins at least 1 % of the
words; recall counts letters reported, 'others' further letters reported beside them. 'With strays', of the planted
language: two of the removed words stay, as if misspelt or badly extracted. 'Noticed' of 'noticeable': the letters found among those for which the
section on the whole list says that a gap would be noticed.

Writes --output. Exit codes: 0 done, 2 bad input, 130 interrupted.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: its own folder would hide the standard library's `inspect`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


import argparse
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

from benchmarks import measure
from stoney_rl import checkpoints, cli
from stoney_rl.errors import StoneyError
from stoney_rl.inspection import coverage

LANGUAGES = ("en", "es", "fr", "pt", "de", "it", "nl", "ru", "eu", "lv")
MOST_FREQUENT = 20_000
KINDS = ("stems", "forms")
RULES_AND_STEM = 7  # forms of one stem of the planted language


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--languages", nargs="*", default=list(LANGUAGES), help="of pyspellchecker, also: ar fa")
    parser.add_argument("--sizes", type=cli.positive_int, nargs="*", default=[500, 2000, 10_000], help="words a sample")
    parser.add_argument("--seeds", type=cli.positive_int, default=20, help="samples of each size")
    parser.add_argument(
        "--planted_sizes", type=cli.positive_int, nargs="*", default=[300, 1000, 5000], help="forms a planted lexicon"
    )
    parser.add_argument("--planted_seeds", type=cli.positive_int, default=10, help="planted lexicons of each size")
    parser.add_argument("--workers", type=cli.positive_int, default=measure.usable_cores(), help="processes")
    parser.add_argument("--output", default="results/inspect-coverage.json", help="file of the results")
    return parser


def main(argv: list[str] | None = None) -> None:
    from tqdm import tqdm

    args = cli.parse_args(build_parser(), argv)
    if Path(args.output).is_dir():
        raise StoneyError(f"--output {args.output}: a directory; name a file")
    for language in args.languages:
        frequent_words(language)
    jobs = [(f"planted, {kind}", size, args.planted_seeds) for kind in KINDS for size in args.planted_sizes]
    jobs += [(language, size, args.seeds) for language in args.languages for size in args.sizes]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        results = list(tqdm(pool.map(try_all, *zip(*jobs, strict=True)), total=len(jobs), unit="row"))
    print(table(results))
    report = checkpoints.describe_stage(
        "benchmark-inspect-coverage", arguments=vars(args), seed=0, machine=measure.machine(1), results=results
    )
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_json(Path(args.output), report)
    print(f"{args.output}: the same, with the letters, versions and machine")


@cache
def frequent_words(language: str) -> list[str]:
    """The most frequent words of a pyspellchecker list, two letters or more. Raises ``StoneyError`` for an unknown one.

    Words of one frequency are in random order: in alphabetical order, the end of the list would leave letters out.
    """
    import random

    from spellchecker import SpellChecker

    try:
        frequency = SpellChecker(language=language, distance=1).word_frequency.dictionary
    except (ValueError, OSError):
        raise StoneyError(f"pyspellchecker has no word list for {language!r}; --languages takes its codes") from None
    words = sorted(word for word in frequency if len(word) > 1 and word.isalpha())
    random.Random(0).shuffle(words)
    words.sort(key=lambda word: -frequency[word])
    return words[:MOST_FREQUENT]


def samples(name: str, size: int, seeds: int) -> list[list[tuple[str, ...]]]:
    """For each seed, rows: the words that each mentions."""
    import random

    from stoney_rl.planted import PlantedLanguage

    if not name.startswith("planted"):
        words = frequent_words(name)
        return [[(word,) for word in random.Random(seed).sample(words, min(size, len(words)))] for seed in range(seeds)]
    if name.endswith("stems"):
        return [[(stem,) for stem in PlantedLanguage(seed, size).stems] for seed in range(seeds)]
    stems = max(1, round(size / RULES_AND_STEM))
    return [[(entry.stem, entry.form) for entry in PlantedLanguage(seed, stems).lexicon()] for seed in range(seeds)]


def find(rows: list[tuple[str, ...]]) -> tuple[set[str], set[str]]:
    """The letters reported as gaps, and those whose gap would be noticed."""
    letters = coverage.find(Counter(word for row in rows for word in set(row))).figures["letters"]
    gaps = {row["letter"][0] for row in letters if row["verdict"] in (coverage.GAP, coverage.GAP_ELSEWHERE)}
    return gaps, {row["letter"][0] for row in letters if row["noticeable"]}


def try_all(name: str, size: int, seeds: int) -> dict:
    """Counts over ``seeds`` samples; letters with the number of samples in which they were missed or reported."""
    result = {"data": name, "words": size, "clean": 0, "clean_with_alarm": 0, "left_out": 0, "found": 0}
    result |= {"others": 0, "noticeable": 0, "noticed": 0}
    if name.startswith("planted"):
        result["found_with_strays"] = 0
    alarms, missed, other_letters = Counter(), Counter(), Counter()
    for rows in samples(name, size, seeds):
        gaps, noticeable = find(rows)
        result["clean"] += 1
        result["clean_with_alarm"] += bool(gaps)
        alarms.update(gaps)
        words = {word for row in rows for word in row}
        initials = Counter(word[0] for word in words)
        for letter in sorted(initials):
            if initials[letter] < 0.01 * len(words):
                continue
            kept = [row for row in rows if not any(word[0] == letter for word in row)]
            reported, _ = find(kept)
            result["left_out"] += 1
            result["found"] += letter in reported
            if name.startswith("planted"):
                strays = [(word,) for word in sorted(words) if word[0] == letter][:2]
                result["found_with_strays"] += letter in find(kept + strays)[0]
            result["others"] += len(reported - {letter})
            other_letters.update(reported - {letter})
            result["noticeable"] += letter in noticeable
            result["noticed"] += letter in noticeable and letter in reported
            missed[letter] += letter not in reported
    for key, counts in (("alarms", alarms), ("missed", missed), ("other_letters", other_letters)):
        result[key] = {letter: count for letter, count in sorted(counts.items()) if count}
    return result


def table(results: list[dict]) -> str:
    lines = ["", f"{'data':15} {'words':>6} {'clean':>6} {'alarms':>7} {'left out':>9} {'recall':>7} {'strays':>7}"]
    lines[-1] += f" {'others':>7} {'noticed':>12}  false alarms, letters"
    for row in results:
        n = max(1, row["left_out"])
        noticed = f"{row['noticed']} of {row['noticeable']}"
        strays = f"{row['found_with_strays'] / n:.3f}" if "found_with_strays" in row else ""
        letters = " ".join(f"{letter}:{count}" for letter, count in row["alarms"].items())
        lines.append(
            f"{row['data']:15} {row['words']:6} {row['clean']:6} {row['clean_with_alarm']:7} {row['left_out']:9} "
            f"{row['found'] / n:7.3f} {strays:>7} {row['others']:7} {noticed:>12}  {letters}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
