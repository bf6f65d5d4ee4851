"""Words from tokens. The words that are no English are the planted language's, or made up here: invented."""

import itertools
import unicodedata
from functools import cache
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from stoney_rl.errors import StoneyError
from stoney_rl.interp.words import is_whole, lexicon_words, split_words, token_bytes, token_labels, tokens_per_word
from stoney_rl.prompts import encode_prompt

SMOLLM2 = Path(__file__).parents[1] / "checkpoints" / "smollm2-135m"
PLANTED = "liẖwûsilo wûsiloṯel tâloṯul vûẖmîva nâkeẖov mûvo " * 3


def sentencepiece(*, prefix: bool):
    """Letters, '▁' and byte tokens, as Gemma has them; with ``prefix`` a '▁' in front of the text, as in Llama 2."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghiklmnostuvwâ",
        "si",
        "▁w",
    ]
    fast = Tokenizer(
        models.BPE(
            {t: i for i, t in enumerate(tokens)}, [("s", "i"), ("▁", "w")], byte_fallback=True, unk_token="<unk>"
        )
    )
    start = [normalizers.Prepend("▁")] if prefix else []
    fast.normalizer = normalizers.Sequence([*start, normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def merging():
    """Byte-level BPE without any split beforehand: its tokens run across letters, spaces and parts of characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["</s>"],
        show_progress=False,
    )
    fast.train_from_iterator([PLANTED, PLANTED.replace(" ", '". "'), unicodedata.normalize("NFD", PLANTED)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>")


@cache
def tokenizers():
    found = {
        "bytes": tiny.tokenizer(),
        "merging": merging(),
        "sentencepiece": sentencepiece(prefix=False),
        "sentencepiece with a prefix": sentencepiece(prefix=True),
    }
    if SMOLLM2.exists():
        from stoney_rl.models import find_model, load_tokenizer

        found["SmolLM2"] = load_tokenizer(find_model(str(SMOLLM2)))
    return found


def shown(tokenizer, text, lexicon=frozenset()):
    return [(word.text, word.kind) for word in split_words(tokenizer, ids_of(tokenizer, text), lexicon)]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


TEXTS = st.lists(
    st.one_of(
        st.sampled_from(["liẖ", "wûsilo", "ṯel", "tâlo", "e-echu", "dada's", "dada’s", "say ", "24", "\n\n", "  ", '".', "👨‍👩‍👧", "☺️"]),
        st.text("aeistâîûẖṯšžéAÂẔ \n\t\"'’`.,?!-–…()0123\u0331\u0302\u200d😀", max_size=6),
    ),
    max_size=8,
).map("".join)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, form=st.sampled_from(["NFC", "NFD"]))
def test_words_are_the_text_and_cover_each_token_once(text, form):
    text = unicodedata.normalize(form, text)
    for name, tokenizer in tokenizers().items():
        ids = ids_of(tokenizer, text)
        words = split_words(tokenizer, ids)
        joined = "".join(word.text for word in words)
        assert joined == tokenizer.decode(ids, clean_up_tokenization_spaces=False), name
        assert joined.removeprefix(" " if name.endswith("prefix") else "") == text, name
        assert [0, *(word.end for word in words)] == [*(word.start for word in words), len(ids)], name
        assert all(word.start < word.end for word in words), name
        assert "\ufffd" not in joined, name


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, data=st.data())
def test_any_cut_of_a_row_still_gives_what_the_tokenizer_decodes(text, data):
    """A row cut in the middle of a character: the words are those of its tokens, all the same."""
    for name, tokenizer in tokenizers().items():
        ids = ids_of(tokenizer, text)
        ids = ids[data.draw(st.integers(0, len(ids))) :][: data.draw(st.integers(0, len(ids)))]
        words = split_words(tokenizer, ids)
        assert [index for word in words for index in range(*word.span)] == list(range(len(ids))), name
        whole = b"".join(token_bytes(tokenizer, ids)).decode(errors="ignore")
        assert "".join(word.text for word in words).replace("\ufffd", "") == whole, name


@pytest.mark.parametrize("name", ["bytes", "sentencepiece", "sentencepiece with a prefix", "SmolLM2"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("word", ["liẖwûsilo", "ṯâlo", "wû-wûsilo", "vûẖ'mîva"])
def test_a_quoted_form_is_exactly_one_word(name, form, word):
    if name not in tokenizers():
        pytest.skip("needs checkpoints/smollm2-135m (python prepare_base_model.py)")
    tokenizer = tokenizers()[name]
    word = unicodedata.normalize(form, word)
    words = shown(tokenizer, f'What does "{word}" mean?', lexicon_words([word]))
    assert (word, "lexicon") in words
    assert [text.strip() for text, kind in words if kind == "word"] == ["What", "does", "mean"]


def test_spans_of_a_byte_tokenizer_by_hand():
    tokenizer = tiny.tokenizer()
    words = split_words(tokenizer, ids_of(tokenizer, 'a "ẖû".\n'))
    assert [(word.text, word.span, word.kind) for word in words] == [
        ("a", (0, 1), "word"),
        (" ", (1, 2), "space"),
        ('"', (2, 3), "punctuation"),
        ("ẖû", (3, 8), "word"),  # three bytes and two
        ('"', (8, 9), "punctuation"),
        (".", (9, 10), "punctuation"),
        ("\n", (10, 11), "space"),
    ]
    assert [word.label for word in words] == ["a", "·", '"', "ẖû", '"', ".", "⏎"]


def test_a_token_is_never_cut_though_it_runs_across_words():
    tokenizer = merging()
    ids = ids_of(tokenizer, PLANTED + "ẗḧẖṯ")
    words = split_words(tokenizer, ids)
    assert any(" " in word.text.strip() for word in words), "the fixture must hold tokens that run across words"
    pieces = token_bytes(tokenizer, ids)
    assert not all(map(is_whole, pieces)), "and tokens that are parts of a letter"
    assert all(b"".join(pieces[word.start : word.end]).decode() == word.text for word in words)


def test_the_markers_of_a_chat_are_special_and_their_text_is_not():
    tokenizer = tiny.tokenizer()
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "Hi <|im_end|> 5"}])
    words = split_words(tokenizer, ids)
    assert [word.text for word in words if word.kind == "special"] == [
        "<|im_start|>", "<|im_end|>", "<|im_end|>", "<|im_start|>",
    ]  # fmt: skip
    assert [word.text for word in words if word.kind == "number"] == ["5"]
    assert [tokenizer.decode(ids[word.start : word.end]) for word in words] == [word.text for word in words]
    assert words[-1].end == len(ids)


def test_a_word_of_the_lexicon_is_one_however_it_is_spelled():
    lexicon = lexicon_words(["wûsilo", "tâlo mîva"])
    tokenizer = tiny.tokenizer()
    text = unicodedata.normalize("NFD", "Wûsilo") + " mîva wusilo runs"
    kinds = {text: kind for text, kind in shown(tokenizer, text, lexicon) if kind != "space"}
    assert list(kinds.values()) == ["lexicon", "lexicon", "word", "word"]


def test_emoji_with_modifiers_are_one_word():
    assert shown(tiny.tokenizer(), "👨‍👩‍👧☺️") == [("👨‍👩‍👧", "punctuation"), ("☺️", "punctuation")]


def test_labels_say_which_part_of_a_letter_a_token_is():
    tokenizer = tiny.tokenizer()
    assert token_labels(tokenizer, ids_of(tokenizer, "aẖ û")) == [
        "a", "ẖ(1/3)", "ẖ(2/3)", "ẖ(3/3)", "·", "û(1/2)", "û(2/2)",
    ]  # fmt: skip
    assert token_labels(tokenizer, ids_of(tokenizer, "h\u0331\n")) == ["h", "◌\u0331(1/2)", "◌\u0331(2/2)", "⏎"]
    assert token_labels(tokenizer, ids_of(tokenizer, "ẖ")[:2]) == ["<E1>", "<BA>"]  # the letter is not complete
    assert token_labels(tokenizer, ids_of(tokenizer, "\u200d"))[0] == "<U+200D>(1/3)"
    assert token_labels(sentencepiece(prefix=True), ids_of(sentencepiece(prefix=True), "wẖ")) == [
        "·w", "ẖ(1/3)", "ẖ(2/3)", "ẖ(3/3)",
    ]  # fmt: skip
    assert token_labels(tokenizer, []) == split_words(tokenizer, []) == []


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_labels_name_each_letter_as_often_as_the_text_holds_it(text):
    for name, tokenizer in tokenizers().items():
        labels = token_labels(tokenizer, ids_of(tokenizer, text))
        assert len(labels) == len(ids_of(tokenizer, text)), name
        whole = "".join(labels)
        for letter in "ẖṯûâ":
            assert whole.count(letter) - sum(whole.count(f"{letter}({part}/") for part in (2, 3)) == text.count(
                letter
            ), name


@pytest.mark.skipif(not SMOLLM2.exists(), reason="needs checkpoints/smollm2-135m (python prepare_base_model.py)")
def test_smollm2_splits_inside_a_letter_and_the_words_do_not():
    tokenizer = tokenizers()["SmolLM2"]
    ids = ids_of(tokenizer, 'It is "liẖwûsilo".')
    assert token_labels(tokenizer, ids) == ["It", "·is", '·"', "li", "ẖ(1/2)", "ẖ(2/2)", "w", "û", "sil", "o", '".']
    assert [word.text for word in split_words(tokenizer, ids)] == ["It", " is", ' "', "liẖwûsilo", '".']


def test_tokens_of_a_word_are_counted_apart_for_the_lexicon():
    tokenizer = tiny.tokenizer()
    words = split_words(tokenizer, ids_of(tokenizer, 'say "ẖû" or "tâlo" 12'), lexicon_words(["ẖû", "tâlo"]))
    assert tokens_per_word(words) == {"lexicon": [5, 5], "word": [3, 2]}
    assert tokens_per_word(itertools.chain(words, words))["word"] == [3, 2, 3, 2]


def test_an_id_beyond_the_tokenizer_is_shown_as_such():
    """A model's embedding may be larger than its tokenizer's vocabulary."""
    tokenizer = tiny.tokenizer()
    assert token_labels(tokenizer, [5000]) == ["[5000]"]
    assert [word.text for word in split_words(tokenizer, [5000])] == ["[5000]"]


def test_tokens_that_are_no_bytes_are_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    whole = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, "[UNK]")))
    with pytest.raises(StoneyError, match="neither byte-level BPE nor sentencepiece"):
        split_words(whole, [0, 1])
