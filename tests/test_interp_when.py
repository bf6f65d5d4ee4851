"""Decision, cost, guesses and word assembly: exact where the truth is known, found where it was planted, nowhere else.

All words that aren't English are invented.
"""

import math
import random
from dataclasses import replace
from unittest.mock import Mock

import pytest
import tiny
import torch
from prompt_pairs import random_pairs

from stoney_rl.errors import StoneyError
from stoney_rl.interp import when
from stoney_rl.interp.hooked import hook_model, left_padded
from stoney_rl.interp.pairs import PromptPair, make_pair
from stoney_rl.interp.when import cost, decision, first_tokens, guesses, scrambled_before_end, word_assembly

TOKENIZER = tiny.tokenizer()
LENGTHS = (9, 5, 12, 7, 5)
LAYERS = 4


@pytest.fixture(scope="module")
def model():
    return tiny.lively("llama")


def lookups(*couples, chat=False):
    """A pair for each (key, answer, wrong): a text that asks for the answer."""
    return [
        make_pair(TOKENIZER, f"{key} ab:", f"{key} cd:", answer, wrong, cluster=key, chat=chat)
        for key, answer, wrong in couples
    ]


def silent(*, layers: int = LAYERS):
    """A model whose embedding, attention and MLPs write nothing, so that its output is even."""
    source = tiny.model("llama", layers=layers)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if "norm" not in name:
                parameter.zero_()
    source.lm_head.weight = torch.nn.Parameter(torch.zeros(259, 32))  # untied
    return source


# Decision


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma2"])
def test_the_last_layer_is_the_models_output_pair_by_pair(architecture):
    """In batches, in the pairs' order: the same as each prompt alone, without a hook."""
    model = tiny.lively(architecture)
    pairs = random_pairs(LENGTHS)
    found = decision(model, pairs, batch_size=2)
    assert found.answer.shape == found.wrong.shape == found.entropy.shape == (5, model.n_layers + 1)
    assert found.n_layers == model.n_layers
    for row, pair in enumerate(pairs):
        logits = model.run(left_padded([pair.clean], 0)).logits[0, -1]
        p = logits.log_softmax(-1)
        assert found.answer[row, -1] == pytest.approx(p[pair.answer].item(), abs=1e-4)
        assert found.difference[row] == pytest.approx((logits[pair.answer] - logits[pair.wrong]).item(), abs=1e-4)
        assert found.entropy[row, -1] == pytest.approx(-(p.exp() * p).sum().item(), abs=1e-4)
        assert found.is_likelier[row] == (logits[pair.answer] > logits[pair.wrong])
        assert found.is_top[row] == (logits.argmax() == pair.answer)
        assert found.answer_depth[row].isnan() == (not found.is_likelier[row])


def test_an_even_model_has_decided_nothing():
    """Entropy log 259 at every layer; equal answers are not likelier, and never decided."""
    found = decision(hook_model(silent(), TOKENIZER), random_pairs(LENGTHS))
    assert torch.allclose(found.entropy, torch.tensor(math.log(259)))
    assert not found.is_likelier.any() and not found.is_top.any() and found.answer_depth.isnan().all()


def test_depth_is_where_the_answer_was_written():
    model, pairs = speaks_in_between(*range(8)), planted_pairs()
    found = decision(model, pairs, batch_size=3)
    assert found.answer_depth.tolist() == found.settled_depth.tolist() == [3] * 8
    assert found.is_top.all() and found.is_likelier.all()


def test_no_pairs_are_refused(model):
    with pytest.raises(StoneyError, match="decision: no prompt pair"):
        decision(model, [])


# Cost


def says(probabilities: dict[str, float]):
    """A model whose next token has these probabilities, whatever stands before; the rest is spread over all others."""
    source = silent()
    ids = {TOKENIZER(text)["input_ids"][0]: value for text, value in probabilities.items()}
    left = (1 - sum(ids.values())) / (259 - len(ids))
    p = torch.tensor([ids.get(token, left) for token in range(259)])
    with torch.no_grad():
        source.model.embed_tokens.weight[:, 0] = 1.0
        source.lm_head.weight[:, 0] = p.log() / math.sqrt(32)  # what the final norm makes of (1, 0, ..., 0)
    return hook_model(source, TOKENIZER)


@pytest.mark.parametrize("chat", [False, True])
def test_cost_by_hand(chat):
    """p(a) = 1/2, p(b) = 1/4, p(c) = 1/8: 'aab' costs 4 log 2 over 3 bytes; what ends the answer costs nothing."""
    model = says({"a": 0.5, "b": 0.25, "c": 0.125})
    found = cost(model, lookups(("k", "aab", "ccab"), ("lll", "ccab", "cb"), chat=chat), batch_size=1)
    assert found.nats.tolist() == pytest.approx([4 * math.log(2), 9 * math.log(2)], rel=1e-3)
    assert found.bytes.tolist() == found.tokens.tolist() == [3, 4]
    assert found.nats_per_byte.tolist() == pytest.approx([4 / 3 * math.log(2), 9 / 4 * math.log(2)], rel=1e-3)
    assert found.bits_per_byte.tolist() == pytest.approx([4 / 3, 9 / 4], rel=1e-3)


def test_bytes_are_those_of_the_text_however_it_is_cut():
    """'wûsilo' has 7 bytes, in as many tokens; the same text in two tokens costs two tokens, over 7 bytes."""
    model = hook_model(silent(), TOKENIZER)
    (whole,) = lookups(("k", "wûsilo", "tâlo"))
    end = whole.answer_ids[-1]
    cut = PromptPair(whole.clean, whole.corrupt, 70, 71, "k", "f", whole.texts, (70, 90, end), (71, 90, end))
    found = cost(model, [cut, whole])
    assert found.bytes.tolist() == [7, 7] and found.tokens.tolist() == [2, 7]
    assert found.nats_per_byte.tolist() == pytest.approx([2 * math.log(259) / 7, math.log(259)])


def test_cost_is_the_loss_of_the_answer(model):
    """Row by row with torch's cross entropy, where answers begin alike and prompts and answers have many lengths."""
    pairs = lookups(("key", "abcd", "abd"), ("k", "x", "yz"), ("another", "nâdaga to", "nâdu"), ("so", "abc", "abcd"))
    assert [pair.shared for pair in pairs] == [2, 0, 4, 3]
    found = cost(model, pairs, batch_size=2)
    for row, pair in enumerate(pairs):
        prompt, answer = TOKENIZER(pair.texts[0])["input_ids"], TOKENIZER(pair.texts[2])["input_ids"]
        logits = model.run(left_padded([prompt + answer], 0)).logits[0, len(prompt) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        assert found.nats[row] == pytest.approx(loss.item(), rel=1e-4)


def test_a_pair_without_its_whole_answer_has_no_cost(model):
    (known,) = lookups(("k", "ab", "cd"))
    found = cost(model, [*random_pairs((5,)), known])
    assert found.nats_per_byte.isnan().tolist() == [True, False]
    assert found.bytes.tolist() == found.tokens.tolist() == [0, 2]


# Guesses

ITEMS = range(8)
KEYS, MEANINGS, ANSWERS, OTHERS = range(20, 28), range(40, 48), range(60, 68), range(80, 88)


def speaks_in_between(*items: int, reads: bool = True):
    """A model that says item i's meaning from layer 1 on and its answer at layer 3, the last, for ``items``; others get
    no meaning. The prompt ends with the item's key; other tokens embed nothing.

    Coordinate i is the key's, 8 + i what layer number 1 makes of it, 16 + i what layer number 3 does, much larger.
    """
    source = silent(layers=3)
    with torch.no_grad():
        for i in ITEMS:
            source.model.embed_tokens.weight[KEYS[i], i] = 1.0
            for layer, written, amount in ((0, 8 + i, 10.0 if i in items else 0.0), (2, 16 + i, 1e4)):
                attention = source.model.layers[layer].self_attn
                attention.v_proj.weight[i, i] = 1.0
                attention.o_proj.weight[written, i] = amount * reads
            source.lm_head.weight[MEANINGS[i], 8 + i] = source.lm_head.weight[ANSWERS[i], 16 + i] = 5.0
    return hook_model(source, TOKENIZER, "planted")


def planted_pairs():
    return [
        PromptPair((5, 6, 7, KEYS[i]), (5, 6, 7, KEYS[i - 1]), ANSWERS[i], OTHERS[i], str(i), "f", ("",) * 4)
        for i in ITEMS
    ]


@pytest.mark.parametrize("seed", range(3))
def test_a_meaning_on_the_way_is_found_at_its_layers(seed):
    meanings = [(token,) for token in MEANINGS]
    found = guesses(speaks_in_between(*ITEMS), planted_pairs(), meanings, [], seed=seed, batch_size=3)
    meaning, answer, control, rival = found.probability.unbind(-1)
    assert found.not_measured == 0 and found.probability.shape == (8, 4, 4) and rival.isnan().all()
    assert (meaning[:, 1:3] > 0.95).all() and (meaning[:, [0, 3]] < 0.01).all()
    assert (answer[:, 3] > 0.95).all() and (answer[:, :3] < 0.01).all()
    assert (control < 0.01).all() and (found.above_control[:, 1:3] > 0.95).all()


def test_a_meaning_that_is_not_there_is_not_found():
    """Items 0 to 3 pass through their meaning, 4 to 7 don't; an even model has nothing above the control."""
    meanings, pairs = [(token,) for token in MEANINGS], planted_pairs()
    found = guesses(speaks_in_between(0, 1, 2, 3), pairs, meanings, [], seed=0)
    assert (found.above_control[:4, 1] > 0.95).all() and (found.above_control[4:].abs() < 0.01).all()
    even = guesses(hook_model(silent(), TOKENIZER), pairs, meanings, [], seed=0)
    assert torch.allclose(even.probability[..., :3], torch.tensor(1 / 259))
    assert torch.allclose(even.above_control, torch.tensor(0.0), atol=1e-6)


def test_probabilities_of_several_tokens_add_up_and_controls_are_averaged(model):
    """Against the output's softmax; the control from the four others, which all fit, two tokens each."""
    pairs = random_pairs((6, 6, 6, 6, 6), vocabulary=range(10, 100))
    meanings = [(100 + 2 * row, 101 + 2 * row) for row in range(5)]
    found = guesses(model, pairs, meanings, [], seed=0)
    for row, pair in enumerate(pairs):
        p = model.run(left_padded([pair.clean], 0)).logits[0, -1].softmax(-1)
        others = sum(p[list(meanings[other])].sum() for other in range(5) if other != row)
        expected = [p[list(meanings[row])].sum(), p[pair.answer], others / 4]
        assert found.probability[row, -1, :3].tolist() == pytest.approx([one.item() for one in expected], abs=1e-6)


def test_the_rival_is_the_other_meaning_of_the_pair_and_may_stand_in_the_prompt(model):
    """Both pairs are one couple; all meanings' tokens stand in both prompts, so there is no control."""
    one, other, *_ = random_pairs((6,) * 3, vocabulary=range(10, 60))
    seen = (200, 201, 202, 203)
    couple = [
        replace(pair, clean=(*seen, *pair.clean), corrupt=(*seen, *pair.corrupt), cluster="c") for pair in (one, other)
    ]
    found = guesses(model, couple, [(200, 201), (202, 203)], [], seed=0)
    p = model.run(left_padded([pair.clean for pair in couple], 0)).logits[:, -1].softmax(-1)
    expected = [p[0, 202] + p[0, 203], p[1, 200] + p[1, 201]]
    assert torch.allclose(found.probability[:, -1, 3], torch.stack(expected), atol=1e-6)
    own = torch.stack([p[0, 200] + p[0, 201], p[1, 202] + p[1, 203]])
    assert torch.allclose(found.above_rival[:, -1], own - torch.stack(expected), atol=1e-6)
    assert found.above_control.isnan().all()


def test_what_no_control_fits_is_not_measured(model):
    """Pair 0: no meaning. 1: it may begin as the answer does. 2: no other has two tokens. 3 and 4: one cluster. 5 and 6
    stand in each other's prompts. 7: fits 3 and 4, and they it."""
    pairs = random_pairs((6,) * 8, vocabulary=range(10, 60))
    answers = [pair.answer for pair in pairs]
    in_prompt = [[], [], [], [], [], [204], [203], []]
    pairs = [
        PromptPair(
            (*extra, *pair.clean), (*extra, *pair.corrupt), pair.answer, pair.wrong,
            "same" if row in (3, 4) else str(row), "f", ("",) * 4,
        )
        for row, (pair, extra) in enumerate(zip(pairs, in_prompt, strict=True))
    ]  # fmt: skip
    alone = [(), (answers[1],), (200, 201), (202,), (205,), (), (), ()]
    found = guesses(model, pairs, alone, [], seed=0)
    assert found.not_measured == 8
    assert found.probability[..., 0].isnan().all(1).tolist() == [True, True, False, False, False, True, True, True]
    assert not found.probability[..., 1].isnan().any()
    each_other = [(), (), (), (), (), (203,), (204,), ()]
    assert guesses(model, pairs, each_other, [], seed=0).not_measured == 8
    with_seven = [(), (), (), (202,), (205,), (), (), (206,)]
    measured = ~guesses(model, pairs, with_seven, [], seed=0).above_control[:, 0].isnan()
    assert measured.tolist() == [False, False, False, True, True, False, False, True]


def test_a_comparison_shares_no_token_with_meaning_or_answer(model):
    """The only other meaning of two tokens holds one of the pair's own; then one of its answer's."""
    pairs = random_pairs((6, 6), vocabulary=range(10, 60))
    for meanings in ([(200, 201), (201, 202)], [(200, 201), (pairs[0].answer, 202)]):
        for cluster in ("0", "1"):  # as rival, as control
            couple = [pairs[0], replace(pairs[1], cluster=cluster)]
            found = guesses(model, couple, meanings, [], seed=0).probability[0, -1]
            assert found.isnan().tolist() == [False, False, True, True]


def test_guesses_come_before_the_first_token_of_the_answer(model):
    """Both answers begin with 'nâ', three tokens, which stand in the scored prompts and not in what is asked here."""
    (pair,) = lookups(("key", "nâdaga", "nâkeo"))
    found = guesses(model, [pair], [()], [], seed=0)
    logits = model.run(left_padded([TOKENIZER("key ab:")["input_ids"]], 0)).logits[0, -1]
    assert pair.shared == 3
    assert found.probability[0, -1, 1] == pytest.approx(logits.softmax(-1)[pair.answer_ids[0]].item(), abs=1e-6)


def test_kinds_of_the_likeliest_tokens(monkeypatch):
    """A vocabulary with ' the', ' cat' and ' not' as tokens; the form is made of 'n' and ' not'."""
    spelled = dict(enumerate([b" the", b" cat", b" not", b"the", b" no", b" n0t", b"n", b"x"]))
    monkeypatch.setattr(when, "token_bytes", lambda tokenizer, ids: [spelled.get(one, b"?") for one in ids])
    monkeypatch.setattr(when, "TOP", 4)
    source = silent()
    with torch.no_grad():
        source.model.embed_tokens.weight[:, 0] = 1.0
        source.lm_head.weight[[0, 2, 6, 7], 0] = 1.0  # ' the', ' not', 'n', 'x' are the four likeliest
    model = hook_model(source, TOKENIZER)
    model.tokenizer = Mock(
        pad_token_id=0, side_effect=lambda text, **_: {"input_ids": [6, 2] if text == "form" else [2]}
    )
    found = guesses(model, random_pairs((5, 6)), [(), ()], ["form"], seed=0)
    assert torch.equal(found.kinds, torch.tensor([0.25, 0.25, 0.25]).expand(2, LAYERS + 1, 3))
    assert found.chance.tolist() == pytest.approx([2 / 259, 1 / 259, 1 / 259])


def test_first_tokens_are_of_all_four_spellings():
    by_letter = {letter: TOKENIZER(letter)["input_ids"][0] for letter in "dDcC "}
    assert first_tokens(TOKENIZER, ["dog"]) == tuple(sorted(by_letter[letter] for letter in "dD "))
    assert first_tokens(TOKENIZER, ["dog", "cat"]) == tuple(sorted(by_letter.values()))
    assert first_tokens(TOKENIZER, []) == ()


def test_meanings_that_do_not_fit_are_refused(model):
    with pytest.raises(StoneyError, match="1 meanings for 2 pairs"):
        guesses(model, random_pairs((5, 6)), [()], [], seed=0)


# Assembly


def scrambled_words(n: int, seed: int):
    """n random words of five to seven letters, none twice, and each with its letters in another order."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("aeiouptkms", k=draw.choice((5, 6, 7)))) for _ in range(n)]
    doubles = []
    for word in words:
        double = word
        while double == word and len(set(word)) > 1:
            double = "".join(draw.sample(word, len(word)))
        doubles.append(double)
    return words, doubles


class Knowing:
    """The model, but from ``layer`` on the stream of each of ``words``'s ``place`` token says that it is one."""

    def __init__(self, model, words, layer, from_end):
        self.model, self.layer, self.from_end = model, layer, from_end
        self.ids = {tuple(TOKENIZER(f"{when.CONTEXT} {word}")["input_ids"]) for word in words}
        self.direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(9))

    def __getattr__(self, name):
        return getattr(self.model, name)

    def run(self, batch, **options):
        rows = [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(batch.ids, batch.mask, strict=True)]
        added = torch.zeros(*batch.ids.shape, self.model.d_model)
        for row, ids in enumerate(rows):
            size = len(ids) - len(TOKENIZER(when.CONTEXT)["input_ids"])
            if ids in self.ids:
                added[row, self.from_end(size)] = self.direction
        edit = {f"blocks.{self.layer}.hook_resid_pre": lambda stream: stream + added}
        return self.model.run(batch, edit=edit, **options)


@pytest.fixture(scope="module")
def deep():
    return hook_model(tiny.model(layers=LAYERS), TOKENIZER)


@pytest.mark.parametrize(
    ("place", "from_end"), [("last", lambda size: -1), ("middle", lambda size: (size - 1) // 2 - size)]
)
@pytest.mark.parametrize("seed", range(3))
def test_what_was_planted_is_found_from_its_layer_on_and_at_its_token(deep, place, from_end, seed):
    words, doubles = scrambled_words(60, seed)
    model = Knowing(deep, words, 2, from_end)
    found = word_assembly(model, words, doubles, seed=seed, layers=range(LAYERS + 1), batch_size=16)
    assert found.correct.shape == (len(found.kept), 5, 2) and found.layers == (0, 1, 2, 3, 4)
    accuracy = found.correct.mean(0)
    here, there = (0, 1) if place == "last" else (1, 0)
    assert (accuracy[2:, here] > 0.9).all()
    assert abs(accuracy[:2, here].mean() - 0.5) < 0.15  # spelling alone: letters are drawn, and permuted, at random
    if place == "middle":  # later tokens read it; of the last token nothing can be read in the middle
        there = here
        assert (found.above_spelling.mean(0)[2:, here] > 0.3).all()
    else:
        assert abs(accuracy[:, there].mean() - 0.5) < 0.15
    assert abs(found.control_correct.mean() - 0.5) < 0.1
    assert (found.selectivity.mean(0)[2:, here] > 0.25).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_double_with_the_same_last_token_leaves_nothing_to_its_spelling(deep, seed):
    """Then word and double are one at layer 0: a probe is right about one of them, whatever it says."""
    words, draw = scrambled_words(20, seed)[0], random.Random(seed)
    doubles = [scrambled_before_end(TOKENIZER, word, draw) for word in words]
    for word, double in zip(words, doubles, strict=True):
        assert sorted(word) == sorted(double) and word != double and word[-1] == double[-1]
    found = word_assembly(deep, words, doubles, seed=seed)
    assert (found.correct[:, 0, 0] == 0.5).all()
    assert found.above_spelling[:, 1:, 0].any()


def test_a_double_keeps_the_tokens_it_must():
    """'û' is two tokens of one letter; of 'aab' the end is fixed and nothing is left to scramble."""
    double = scrambled_before_end(TOKENIZER, "wûtâsilû", random.Random(0))
    assert double[-1] == "û" and sorted(double) == sorted("wûtâsilû")
    assert scrambled_before_end(TOKENIZER, "aab", random.Random(0)) is None
    assert scrambled_before_end(TOKENIZER, "a", random.Random(0)) is None
    assert scrambled_before_end(TOKENIZER, "abcdef", random.Random(0)) == scrambled_before_end(
        TOKENIZER, "abcdef", random.Random(0)
    )


def test_a_double_whose_end_is_cut_otherwise_is_none():
    """'okasi' ends in the token 'si'; with o before it, 'os' and 'i' are the tokens, as many as before."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["Ġ", *"A word:okasi"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*letters, "os", "si", "<end>"]))}
    fast = Tokenizer(models.BPE(vocabulary, [("o", "s"), ("s", "i")]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    merging = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<end>")
    assert merging.tokenize(" okasi")[-1] == "si" and merging.tokenize(" kaosi")[-2:] == ["os", "i"]
    doubles = {scrambled_before_end(merging, "okasi", random.Random(seed)) for seed in range(20)}
    assert doubles == {"oaksi", "koasi", "aoksi"}


@pytest.mark.parametrize("seed", range(3))
def test_with_random_labels_nothing_is_found(deep, seed):
    words, doubles = scrambled_words(60, seed)
    model = Knowing(deep, words, 2, lambda size: -1)
    coin = random.Random(seed)
    mixed = [couple if coin.random() < 0.5 else couple[::-1] for couple in zip(words, doubles, strict=True)]
    found = word_assembly(model, *zip(*mixed, strict=True), seed=seed, lexemes=words)
    assert abs(found.correct.mean() - 0.5) < 0.1


def test_words_that_can_not_be_compared_are_counted(deep):
    """'a' has two tokens with its space, 'abc' another number than its double, 'aaa' is its own double."""
    words, doubles = scrambled_words(8, 0)
    found = word_assembly(deep, ["a", "abc", "aaa", *words], ["b", "cba s", "aaa", *doubles], seed=0)
    assert found.kept == tuple(range(3, 11)) and found.left_out == 3
    assert found.layers == (0, 2, 4) and found.clusters == tuple(words)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"others": ["cab"]}, "words: 2, doubles: 1, lexemes: 2"),
        ({"layers": [5]}, r"layers \[0, 5\]: .* has 0 \(the embedding\) to 4"),
        ({"words": ["a", "b"]}, "none of 2 has three tokens or more"),
        ({}, "the rarest in 2 clusters"),
    ],
)
def test_bad_words_are_refused(deep, changes, message):
    given = {"words": ["abc", "fgh"], "others": ["bac", "ghf"]} | changes
    with pytest.raises(StoneyError, match=message):
        word_assembly(deep, **given, seed=0)
