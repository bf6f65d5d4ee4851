"""Prompt pairs from files and from a lexicon. The words are the planted language's: invented."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from test_interp_words import sentencepiece

from stoney_rl import planted
from stoney_rl.data import load_rows
from stoney_rl.errors import StoneyError
from stoney_rl.interp.pairs import (
    ENGLISH,
    FAMILIES,
    UnfitPairError,
    batched,
    build,
    differences,
    make_pair,
    over_pairs,
    parts_at_whole_characters,
    read_pairs,
    swapped,
)
from stoney_rl.lexicon import LexiconEntry, read_lexicon
from stoney_rl.prompts import encode_example, encode_prompt, end_of_turn_ids

PLANTED = Path(__file__).parents[1] / "data" / "planted"
FROM_LEXICON = tuple(FAMILIES)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="session")
def merging():
    """Byte-level BPE learnt from the planted rows: 'I', 'you' and 'they' are a token each, letters are split."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    rows = load_rows(PLANTED / "rows.jsonl").rows[:300]
    fast.train_from_iterator((row.prompt[0]["content"] for row in rows), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = tiny.CHATML
    return wrapped


@pytest.fixture(scope="session")
def lexicon():
    return read_lexicon(PLANTED / "lexicon.jsonl")[: 7 * 20]  # twenty verbs, each bare and under six rules


def text(tokenizer, ids):
    return tokenizer.decode(list(ids))


# One pair


def test_text_pair_by_hand(tokenizer):
    pair = make_pair(tokenizer, "ab", "cd", "xy", "xz", chat=False)
    assert text(tokenizer, pair.clean) == "abx"
    assert text(tokenizer, pair.corrupt) == "cdx"
    assert text(tokenizer, [pair.answer]) == "y"
    assert text(tokenizer, [pair.wrong]) == "z"
    assert pair.texts == ("ab", "cd", "xy", "xz")
    assert pair.cluster == "xy|xz"


@pytest.mark.parametrize(("chat", "end"), [(True, "<|im_end|>"), (False, "<|im_end|>")])
def test_an_answer_that_begins_like_the_whole_other_is_scored_at_its_end(tokenizer, chat, end):
    pair = make_pair(tokenizer, "What is a?", "What is b?", "tâ", "tâlo", chat=chat)
    assert text(tokenizer, pair.clean).endswith("tâ")
    assert text(tokenizer, [pair.answer]) == end
    assert text(tokenizer, [pair.wrong]) == "l"


def test_a_chat_pair_is_what_training_shows_the_model(tokenizer):
    pair = make_pair(tokenizer, "Say a.", "Say b.", '"liẖtâlo".', '"liẖtâve".')
    ends = end_of_turn_ids(tokenizer)
    for prompt, answer, ids, scored in (
        ("Say a.", '"liẖtâlo".', pair.clean, pair.answer),
        ("Say b.", '"liẖtâve".', pair.corrupt, pair.wrong),
    ):
        message = [{"role": "user", "content": prompt}]
        trained = encode_example(tokenizer, message, answer, ends)["input_ids"]
        assert tuple(trained[: len(ids) + 1]) == (*ids, scored)
        assert list(ids[: len(encode_prompt(tokenizer, message))]) == encode_prompt(tokenizer, message)
    assert text(tokenizer, pair.clean).endswith('assistant\n"liẖtâ')


def test_text_pairs_begin_with_the_bos_that_the_tokenizer_writes():
    with_bos = tiny.tokenizer(bos=True)
    pair = make_pair(with_bos, "ab", "cd", "x", "y", chat=False)
    assert list(pair.clean) == with_bos("ab")["input_ids"]
    assert pair.clean[0] == with_bos.bos_token_id
    assert pair.clean.count(with_bos.bos_token_id) == 1


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (("abc", "ab", "x", "y"), "the clean prompt has 3 tokens, the corrupt one 2"),
        (("ab", "ab", "x", "y"), "are the same"),
        (("ab", "cd", "x", "x"), "the answers are the same tokens"),
    ],
)
def test_texts_that_fit_no_pair_are_refused_with_the_reason(tokenizer, texts, reason):
    with pytest.raises(UnfitPairError, match=reason):
        make_pair(tokenizer, *texts, chat=False)


def test_a_prompt_never_swallows_the_beginning_of_an_answer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["</s>", "Ġ", *"xybta", "ta", "yt", "ytb"])}
    rules = [("y", "t"), ("yt", "b"), ("t", "a")]
    merging = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, rules)), eos_token="</s>")
    # Where the prompt's last token would grow, the answer keeps the tokens that it has by itself: the same behind both.
    pair = make_pair(merging, "x", "y", "ta", "b", chat=False)
    assert pair.clean == (vocabulary["x"],)
    assert pair.corrupt == (vocabulary["y"],)
    assert (pair.answer, pair.wrong) == (vocabulary["ta"], vocabulary["b"])


def test_an_answer_whose_tokens_hang_on_the_prompt_is_refused():
    """'i' merges with the 's' of the one prompt; alone it has a '▁' in front, which it has not behind the other."""
    with pytest.raises(UnfitPairError, match="an answer has other tokens behind the clean prompt"):
        make_pair(sentencepiece(prefix=True), "as", "ad", "i", "o", chat=False)


def test_swapping_asks_for_the_other_answer(tokenizer):
    pair = make_pair(tokenizer, "ab", "cd", "xy", "xz", chat=False)
    assert swapped(pair) == make_pair(tokenizer, "cd", "ab", "xz", "xy", chat=False)
    assert swapped(swapped(pair)) == pair


@pytest.mark.parametrize(
    ("answer", "wrong", "whole"),
    [
        ("tâ", "ta", False),
        ("ta", "tâ", False),
        ("ta", "to", True),
        ("ẖ", "ṯ", False),
        ("ẖt", "ẖk", True),
        ("ẖ", "t", False),
    ],
)
def test_parting_inside_a_letter_is_told(tokenizer, answer, wrong, whole):
    assert parts_at_whole_characters(tokenizer, make_pair(tokenizer, "a", "b", answer, wrong)) is whole


def test_differences_are_whole_words(tokenizer):
    pair = make_pair(tokenizer, 'Is "tâlo" big now?', 'Is "tâve" big new?', "yes", "no")
    found = differences(tokenizer, pair)
    assert [(one.clean, one.corrupt) for one in found] == [("tâlo", "tâve"), ("now", "new")]
    assert text(tokenizer, pair.clean[found[0].start : found[0].end]) == "tâlo"


# Batches


def test_batches_keep_rows_aligned_and_name_each_pair_once(tokenizer):
    pairs = [make_pair(tokenizer, "a" * n, "b" * n, "x", "y", chat=False) for n in (5, 2, 9, 3, 7)]
    batches = batched(pairs, 2, pad_token_id=0)
    assert sorted(index for indices, _ in batches for index in indices) == [0, 1, 2, 3, 4]
    for indices, batch in batches:
        for row, index in enumerate(indices):
            ids, mask = batch.clean.ids[row], batch.clean.mask[row]
            assert tuple(ids[mask.bool()].tolist()) == pairs[index].clean
            assert torch.equal(mask, batch.corrupt.mask[row])
            assert mask[-1] == 1


def test_difference_reads_the_last_position(tokenizer):
    pairs = [make_pair(tokenizer, "a", "b", "x", "y", chat=False), make_pair(tokenizer, "a", "b", "u", "v", chat=False)]
    ((_, batch),) = batched(pairs, 2, pad_token_id=0)
    logits = torch.full((2, 1, 300), 50.0)
    logits = torch.cat([logits, torch.zeros(2, 1, 300)], dim=1)
    logits[0, -1, pairs[0].answer], logits[0, -1, pairs[0].wrong] = 3.0, 1.0
    logits[1, -1, pairs[1].answer], logits[1, -1, pairs[1].wrong] = -1.0, 4.0
    assert batch.difference(logits).tolist() == [2.0, -5.0]


# Files


def written(tmp_path, *lines):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


GOOD = {"clean": "Say a.", "corrupt": "Say b.", "answer": "tâlo", "wrong": "mîva"}


def test_a_file_is_read_in_its_order(tmp_path, tokenizer):
    raw = GOOD | {"clean": "ab ", "corrupt": "cd ", "chat": False, "family": "mine", "cluster": "one"}
    found = read_pairs(written(tmp_path, GOOD, "", raw), tokenizer)
    first, second = found.pairs
    assert first == make_pair(tokenizer, **GOOD)
    assert text(tokenizer, second.clean) == "ab "  # the space counts where no template stands around the text
    assert (second.family, second.cluster) == ("mine", "one")
    assert (found.whole, found.skipped) == (2, ())
    assert found.describe() == "2 prompt pairs (1 pairs, 1 mine); 2 part at whole characters"


def test_texts_are_normalised(tmp_path, tokenizer):
    decomposed = {key: value.replace("â", "a\u0302").replace("î", "i\u0302") for key, value in GOOD.items()}
    for chat in (True, False):
        assert read_pairs(written(tmp_path, decomposed | {"chat": chat}), tokenizer).pairs == (
            make_pair(tokenizer, **GOOD, chat=chat),
        )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({key: GOOD[key] for key in ("clean", "corrupt", "answer")}, "line 2: wrong is missing"),
        (GOOD | {"answer": 5}, "line 2: answer is not a text"),
        (GOOD | {"clean": " "}, "line 2: clean is not a text"),
        (GOOD | {"cluster": ["a"]}, "line 2: cluster is not a text"),
        (GOOD | {"chat": "no"}, "line 2: chat is neither true nor false"),
        (GOOD | {"awnser": "a"}, "line 2: unknown key 'awnser'"),
        (GOOD | {"answer": "mi\u0302va"}, "line 2: answer and wrong are the same"),
        ([1], "line 2: not an object"),
        ('{"clean": "a', "line 2: truncated JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, tokenizer, line, reason):
    path = written(tmp_path, GOOD, line)
    with pytest.raises(StoneyError, match=reason) as caught:
        read_pairs(path, tokenizer)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_of_many_bad_lines_the_first_are_named_and_all_are_counted(tmp_path, tokenizer):
    with pytest.raises(
        StoneyError, match=r"8 lines are no prompt pair: line 1: .*line 5: clean is missing; and 3 more$"
    ):
        read_pairs(written(tmp_path, *[{}] * 8), tokenizer)


def test_pairs_that_do_not_fit_are_told(tmp_path, tokenizer):
    found = read_pairs(written(tmp_path, GOOD, GOOD | {"corrupt": "Say bb."}), tokenizer)
    assert len(found.pairs) == 1
    (reason,) = found.skipped
    assert reason.startswith("line 2: the clean prompt has ")
    assert reason in found.describe()


@pytest.mark.parametrize("lines", [(), (GOOD | {"corrupt": "Say bb."},)])
def test_no_usable_pair_is_an_error(tmp_path, tokenizer, lines):
    with pytest.raises(StoneyError, match="no usable prompt pair"):
        read_pairs(written(tmp_path, *lines), tokenizer)


def test_a_file_that_is_not_there_or_of_no_kind(tmp_path, tokenizer):
    with pytest.raises(StoneyError, match="does not exist; expected JSON lines"):
        read_pairs(tmp_path / "pairs.jsonl", tokenizer)
    (tmp_path / "pairs.docx").write_text("a")
    with pytest.raises(StoneyError, match="of no kind that can be read"):
        read_pairs(tmp_path / "pairs.docx", tokenizer)


# From a lexicon


@pytest.fixture(scope="session")
def built(merging, lexicon):
    return {family: build(lexicon, merging, family, n=16, seed=3) for family in FROM_LEXICON}


@pytest.mark.parametrize("family", FROM_LEXICON)
def test_every_family_gives_aligned_pairs_both_ways(family, built, merging):
    pairs = built[family].pairs
    assert len(pairs) == 16
    assert built[family].skipped == ()
    assert built[family].whole == sum(parts_at_whole_characters(merging, pair) for pair in pairs)
    for one, other in zip(pairs[::2], pairs[1::2], strict=True):
        assert other == swapped(one)
    for pair in pairs:
        assert len(pair.clean) == len(pair.corrupt)
        assert pair.answer != pair.wrong
        assert pair.family == family
        assert len(differences(merging, pair)) == 1


@pytest.mark.parametrize("family", FROM_LEXICON)
def test_clusters_share_no_lexeme(family, built):
    clusters = list(dict.fromkeys(pair.cluster for pair in built[family].pairs))
    lexemes = [lexeme for cluster in clusters for lexeme in cluster.split("|")]
    assert len(lexemes) == len(set(lexemes))
    assert len(clusters) == 8


@pytest.mark.parametrize("family", FROM_LEXICON)
def test_the_seed_decides(family, built, merging, lexicon):
    assert build(lexicon, merging, family, n=16, seed=3) == built[family]
    assert build(lexicon, merging, family, n=16, seed=4).pairs != built[family].pairs
    assert build(lexicon, merging, family, n=5, seed=3).pairs == built[family].pairs[:5]


def test_what_is_asked_and_what_is_answered(built, lexicon):
    gloss_of = {entry.form: entry.glosses[0][0] for entry in lexicon}
    for pair in built["lookup"].pairs:
        clean, corrupt, answer, wrong = pair.texts
        *lines, asked = clean.split("\n")
        assert corrupt.split("\n")[:-1] == lines
        form, other = asked.removesuffix(":"), corrupt.split("\n")[-1].removesuffix(":")
        assert gloss_of[form] == "to " + answer.strip()
        assert gloss_of[other] == "to " + wrong.strip()
        assert lines.count(f"{form}:{answer}".strip()) == lines.count(f"{other}:{wrong}".strip()) == 3
    for pair in built["lookup_form"].pairs:
        asked = pair.texts[0].split("\n")[-1].removesuffix(":")
        assert gloss_of[pair.texts[2].strip()] == f"to {asked}"
    for pair in built["recall"].pairs:
        clean, corrupt, answer, wrong = pair.texts
        form = clean.removeprefix('What does "').removesuffix('" mean?')
        assert answer == f'"{gloss_of[form]}".'
        assert wrong.strip('".') not in clean + corrupt


def test_affix_pairs_ask_as_the_planted_rows_do(merging):
    rows = {(row.prompt[0]["content"], row.answer) for row in load_rows(PLANTED / "rows.jsonl").rows}
    pairs = build(read_lexicon(PLANTED / "lexicon.jsonl"), merging, "affix", n=100, seed=0).pairs
    questions = [(pair.texts[0], pair.texts[2]) for pair in pairs]
    assert len(set(questions) & rows) >= 10  # the rows ask two of six rules, in three of six wordings
    language = planted.PlantedLanguage(0, 165)
    for pair in pairs:
        (stem, rule), (other_stem, other_rule) = (
            language.analyse(answer.strip('".'))[0] for answer in (pair.texts[2], pair.texts[3])
        )
        assert stem == other_stem == pair.cluster
        assert rule != other_rule
        assert f'"{language.meaning(stem, rule)}"' in pair.texts[0]
        assert f'"{language.meaning(stem, other_rule)}"' in pair.texts[1]


def test_affix_pairs_of_another_lexicon_do_not_call_its_words_invented(tokenizer):
    forms = [("sun", "light", "sun"), ("suns", "a light", "sun"), ("resun", "b light", "sun")]
    entries = [LexiconEntry(form, ((gloss, 1),), stem=stem) for form, gloss, stem in forms]
    (pair, _) = build(entries, tokenizer, "affix", n=2).pairs
    assert pair.texts[0].startswith('The word "sun" means "light".')


def test_english_needs_no_lexicon_and_no_word_twice(tokenizer):
    words = [word for pair in ENGLISH for word in pair]
    assert len(words) == len(set(words))
    assert len(ENGLISH) >= 55
    assert build([], tokenizer, "lookup_english", n=8).pairs


def test_fewer_pairs_than_asked_for_say_why(tokenizer):
    entries = [
        LexiconEntry("tâlo", (("to gather", 1),)),
        LexiconEntry("mîva", (("to run", 1),)),
        LexiconEntry("kîveda", (("to jump", 1),)),  # no partner of as many letters
        LexiconEntry("bîfo"),
        LexiconEntry('sâ"lo', (("to sit", 1),)),
    ]
    found = build(entries, tokenizer, "lookup", n=10)
    assert len(found.pairs) == 2
    assert set(found.skipped) == {
        "8 of 10 lookup pairs could not be made",
        "1 without a partner that fits",
        "1 entries without a gloss",
        "1 entries with a quotation mark",
    }


def test_two_words_of_one_meaning_are_no_pair(tokenizer):
    entries = [LexiconEntry("tâlo", (("to gather", 1),)), LexiconEntry("mîva", (("To gather", 1),))]
    with pytest.raises(StoneyError, match="couples of one meaning"):
        build(entries, tokenizer, "recall", n=2)


def test_partners_that_part_at_whole_characters_are_preferred(tokenizer):
    """'tâlo' and 'tâvo' part at a letter, 'tîvo' from both inside one: it gets a partner only where it comes first."""
    entries = [LexiconEntry(form, ((gloss, 1),)) for form, gloss in (("tâlo", "a"), ("tîvo", "b"), ("tâvo", "c"))]
    found = [build(entries, tokenizer, "lookup_form", n=1, seed=seed) for seed in range(12)]
    assert {one.pairs[0].cluster for one in found if one.whole} == {"tâlo|tâvo"}
    first = [one.pairs[0].texts[2].strip() for one in found if not one.whole]
    assert set(first) == {"tîvo"}


@pytest.mark.parametrize(
    ("family", "n", "reason"),
    [
        ("lookups", 4, "no family .* 'lookups'; expected one of lookup, "),
        ("lookup", 0, "0 prompt pairs were asked for"),
    ],
)
def test_arguments_are_checked(tokenizer, lexicon, family, n, reason):
    with pytest.raises(StoneyError, match=reason):
        build(lexicon, tokenizer, family, n=n)


def test_no_pair_at_all_is_an_error_that_says_why(tokenizer):
    with pytest.raises(StoneyError, match="affix: no usable prompt pair: .*1 forms without a stem in the lexicon"):
        build([LexiconEntry("tâlo", (("to gather", 1),))], tokenizer, "affix", n=2)


@pytest.mark.parametrize("chat", [True, False])
def test_a_pair_holds_its_whole_answers(tokenizer, chat):
    """'nâda' and 'nâke' have three tokens in common; behind the bare prompt stands each answer and what ends it."""
    pair = make_pair(tokenizer, "one", "two", "nâda", "nâke", chat=chat)
    assert pair.shared == 3 and pair.clean == pair.prompt + pair.answer_ids[:3]
    assert (
        tokenizer.decode(pair.answer_ids) == "nâda<|im_end|>" and tokenizer.decode(pair.wrong_ids) == "nâke<|im_end|>"
    )
    assert (pair.answer_ids[3], pair.wrong_ids[3]) == (pair.answer, pair.wrong)
    other = swapped(pair)
    assert (other.answer_ids, other.wrong_ids) == (pair.wrong_ids, pair.answer_ids)
    assert other.prompt == pair.corrupt[:-3]


def test_measures_over_pairs_come_back_in_their_order(tokenizer):
    pairs = [make_pair(tokenizer, "x" * n, "y" * n, "a", "b", chat=False) for n in (5, 1, 4, 2, 3)]
    seen = []

    def measure(rows, batch):
        seen.append(rows)
        return {"size": batch.clean.mask.sum(-1), "row": torch.tensor(rows)}

    found = over_pairs(pairs, 2, 0, measure)
    assert found["size"].tolist() == [5, 1, 4, 2, 3] and found["row"].tolist() == [0, 1, 2, 3, 4]
    assert sorted(map(len, seen)) == [1, 2, 2]
    with pytest.raises(StoneyError, match="some measure: no prompt pair was given"):
        over_pairs([], 2, 0, measure, "some measure")
