"""What the models of an analysis are asked, all alike: prompt pairs by family, a sample text, other texts."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoney_rl import corpus, prepared
from stoney_rl.errors import StoneyError
from stoney_rl.interp import significance
from stoney_rl.interp.pairs import PairSet, PromptPair, build, parts_at_whole_characters
from stoney_rl.lexicon import LexiconEntry, lexicon_path, read_lexicon
from stoney_rl.prompts import encode_example, end_of_turn_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stoney_rl.data import Row

TEXTS = 64  # rows that neurons are looked up in, and that a tuned lens is fitted to


@dataclass(frozen=True)
class Plan:
    """``families``: prompt pairs by family. ``text``: token ids of the sample text. ``texts``: token ids of other texts,
    for examples of neurons and the tuned lens. ``rows``: how many held-out rows those come of; 0: they are the pairs' own
    prompts. ``layers``: the first and last in which heads and neurons are chosen; None:
    all. ``heads``: (layer, head) that are tested whatever their rank. ``top_k``: heads and neurons that are.
    ``random_models``: of the same shape, for the floor.
    """

    families: dict[str, list[PromptPair]]
    text: list[int]
    texts: list[list[int]]
    rows: int = 0
    layers: tuple[int, int] | None = None
    heads: tuple[tuple[int, int], ...] = ()
    top_k: int = 10
    random_models: int = 2
    batch_size: int = 16
    seed: int = 0

    def chosen_layers(self, n_layers: int) -> range:
        """The layers in which heads and neurons are chosen."""
        first, last = self.layers or (0, n_layers - 1)
        return range(first, last + 1)

    def halves(self, family: str) -> tuple[list[int], list[int]]:
        """Indices of the family's pairs on which is chosen, and of those on which is reported; no cluster in both."""
        choosing, reporting = significance.halves([pair.cluster for pair in self.families[family]], self.seed)
        return choosing.tolist(), reporting.tolist()

    def sha256(self) -> str:
        """Of everything that is asked: two analyses with the same one can be compared."""
        asked = [
            {
                family: [[pair.clean, pair.corrupt, pair.answer, pair.wrong, pair.cluster] for pair in pairs]
                for family, pairs in self.families.items()
            },
            self.text,
            self.texts,
        ]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def by_family(pairs: Sequence[PromptPair]) -> dict[str, list[PromptPair]]:
    """Raises ``StoneyError`` for a family whose pairs share one cluster, as nothing could be chosen apart from reporting,
    and for a name that can't be part of an array's."""
    families: dict[str, list[PromptPair]] = {}
    for pair in pairs:
        families.setdefault(pair.family, []).append(pair)
    for family, members in families.items():
        if "/" in family or family == "text":
            raise StoneyError(f"family {family!r}: choose a name without '/', and not 'text'")
        if len({pair.cluster for pair in members}) < 2:
            raise StoneyError(
                f"{family}: {len(members)} pairs of one cluster; two at least are needed, one half to choose heads on and one to report on"
            )
    return families


def one_of_each(pairs: Sequence[PromptPair]) -> list[PromptPair]:
    """The first pair of every other cluster and the second of the others: as many clusters as pairs."""
    clusters: dict[str, list[PromptPair]] = {}
    for pair in pairs:
        clusters.setdefault(pair.cluster, []).append(pair)
    return [members[number % len(members)] for number, members in enumerate(clusters.values())]


def untrained(entries: Sequence[LexiconEntry], checkpoints: Sequence[str]) -> tuple[list[LexiconEntry], int]:
    """The entries that none of the checkpoints was trained on, by their training records, and how many were left out."""
    known = {form for name in checkpoints for form in (corpus.training_record(name) or {}).get("training_lexemes", ())}
    kept = [
        entry for entry in entries if not {corpus.form_hash(form) for form in (entry.form, entry.stem) if form} & known
    ]
    return kept, len(entries) - len(kept)


def find_lexicon(path: str | None, dataset: str | None) -> list[LexiconEntry]:
    """The entries of ``path``, else of the prepared ``dataset``. Raises ``StoneyError`` if there is none."""
    if path is None and not (dataset and prepared.is_prepared(dataset)):
        raise StoneyError(
            "no lexicon to build prompt pairs from: the model names no prepared dataset that is here; "
            "give --lexicon FILE (a lexicon, or a directory that inspect_hf_dataset.py prepared), or pairs of your own"
        )
    found = lexicon_path(path or dataset)
    if not found.exists():
        lacking = "no such file" if str(found) == str(path) else f"no {found.name} in it"
        raise StoneyError(f"--lexicon {path}: {lacking}; inspect_hf_dataset.py --output_dir writes one")
    return read_lexicon(found)


def build_families(
    entries: Sequence[LexiconEntry],
    tokenizer: "PreTrainedTokenizerBase",
    families: Sequence[str] | None,
    number: int,
    seed: int,
) -> list[PairSet]:
    """``number`` pairs of each family, of as many clusters; by default affix where entries have stems, else lookup."""
    families = families or (["affix"] if any(entry.stem for entry in entries) else ["lookup"])
    found = []
    for family in families:
        built = build(entries, tokenizer, family, n=2 * number, seed=seed)
        pairs = one_of_each(built.pairs)[:number]
        whole = sum(parts_at_whole_characters(tokenizer, pair) for pair in pairs)
        skipped = built.skipped if len(pairs) < number else ()
        found.append(PairSet(tuple(pairs), whole, skipped))
    return found


def row_texts(rows: Sequence["Row"], tokenizer: "PreTrainedTokenizerBase", longest: int = 200) -> list[list[int]]:
    """Prompt and answer of the first rows as token ids, none longer than ``longest``."""
    ends = end_of_turn_ids(tokenizer)
    texts = [
        encode_example(tokenizer, list(row.prompt), row.completion[0]["content"], ends)["input_ids"]
        for row in rows[:TEXTS]
    ]
    return [ids[:longest] for ids in texts]
