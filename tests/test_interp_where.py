"""Heads that copy, and how far heads look: golden values on patterns written by hand, the heads of the copying model.

All words that aren't English are invented.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from prompt_pairs import induction_pairs, random_pairs

from stoney_rl.errors import StoneyError
from stoney_rl.interp.attention import attention_patterns, entropy
from stoney_rl.interp.hooked import left_padded, load_hooked, random_hooked
from stoney_rl.interp.pairs import PromptPair, make_pair
from stoney_rl.interp.where import SPANS, attention_span, copying

FIXTURE = Path(__file__).parent / "induction"
TOKENIZER = tiny.tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny.lively("llama")


class WrittenByHand:
    """Stands in for a hooked model of one layer; its heads' last positions look where ``looks`` says, padding aside.

    ``looks``: for each head, a list of positions from the end between which attention is shared; None: all of them.
    """

    n_layers, device, pad_token_id, name, tokenizer = 1, torch.device("cpu"), 0, "by hand", TOKENIZER

    def __init__(self, looks):
        self.looks = looks

    def run(self, batch, read, stop_at_layer):
        width = batch.ids.shape[1]
        pattern = torch.zeros(len(batch), len(self.looks), width, width)
        for row, mask in enumerate(batch.mask):
            for head, looks in enumerate(self.looks):
                keys = (
                    [width - at for at in range(1, int(mask.sum()) + 1)]
                    if looks is None
                    else [width + at for at in looks]
                )
                pattern[row, head, -1, keys] = 1 / len(keys)
        return {hook: function(pattern) for hook, function in read.items()}


def lookup(answer: str, wrong: str, *, lines: str = "key: {a}\nkay: {w}\n", ends: str = "\n") -> PromptPair:
    """'key: ANSWER\nkay: WRONG\nkey:' asks for ' ANSWER'; one token a letter."""
    context = lines.format(a=answer, w=wrong)
    return make_pair(
        TOKENIZER, context + "key:", context + "kay:", f" {answer}{ends}", f" {wrong}{ends}", chat=False, family="f"
    )


def from_end(pair: PromptPair, letter: str, times: int = 1) -> list[int]:
    """The places of a letter in the clean prompt, counted from its end; it must stand there ``times`` times."""
    (token,) = TOKENIZER(letter)["input_ids"]
    found = [at - len(pair.clean) for at, one in enumerate(pair.clean) if one == token]
    assert len(found) == times
    return found


# Copying


def test_heads_that_copy_the_token_the_word_or_something_else():
    """Answer 'vûrs', wrong 'xûzg', whose space stands in the prompts: next is v, the word's last token is s."""
    pair = lookup("vûrs", "xûzg")
    assert pair.shared == 1
    v, s, x, g, r = (from_end(pair, letter) for letter in "vsxgr")
    found = copying(WrittenByHand([v, s, x, g, r, None, [*v, *s]]), [pair])
    expected = [[1, 0], [0, 1], [-1, 0], [0, -1], [0, 0], [0, 0], [0.5, 0.5]]
    assert found.attention.shape == (1, 1, 7, 2, 2) and found.difference.shape == (1, 1, 7, 2)
    assert torch.allclose(found.difference[0, 0], torch.tensor(expected), atol=1e-6)
    assert found.attention[0, 0, 5].flatten().tolist() == pytest.approx([1 / len(pair.clean)] * 4)
    assert found.occurrences.tolist() == [[1, 1]] and found.started.tolist() == [1]
    assert found.measured == {"token": 1, "concept": 1}


def test_next_is_what_follows_the_part_that_has_begun():
    """Both begin with 'ko', which stands in the prompt: next is v, and not the word's first token k."""
    pair = lookup("kovrs", "koxzg")
    v, x, s, k = (from_end(pair, letter, times) for letter, times in (("v", 1), ("x", 1), ("s", 1), ("k", 6)))
    found = copying(WrittenByHand([v, x, s, k]), [pair])
    assert torch.allclose(found.difference[0, 0], torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, 0]]))
    assert found.started.tolist() == [3]


def test_a_space_that_is_a_token_of_its_own_is_what_comes_next():
    """Nothing of ' vûrs' stands in the prompt, as the other answer has a tab before it: next is the space before v."""
    text = "key: vûrs\nkay:\txûzg\n"
    pair = make_pair(TOKENIZER, f"{text}key:", f"{text}kay:", " vûrs\n", "\txûzg\n", chat=False)
    v, x, s = (from_end(pair, letter) for letter in "vxs")
    found = copying(WrittenByHand([[v[0] - 1], [x[0] - 1], s, v]), [pair])
    assert torch.allclose(found.difference[0, 0], torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, 0]]))


def test_all_occurrences_count_and_only_whole_words():
    """'vors' three times, and inside 'vorst', 'avors' and 'vors-ek', which are other words."""
    lines = "key: {a}\nkay: {w}\nkay: {w}\nkey: {a} vorst\nkay: {w}\nkey: {a} avors vors-ek\n"
    pair = lookup("vors", "xuzg", lines=lines)
    v = from_end(pair, "v", 6)
    found = copying(WrittenByHand([v]), [pair])
    assert found.occurrences.tolist() == [[3, 3]]
    assert found.difference[0, 0, 0].tolist() == pytest.approx([0.5, 0])


def test_a_padded_batch_equals_each_pair_alone(model):
    pairs = [lookup("vûrs", "xûzg"), lookup("vûrsilo na", "xûzg"), lookup("ab", "cde"), lookup("pqr", "pqs")]
    together = copying(model, pairs)
    alone = [copying(model, [pair]) for pair in pairs]
    assert together.attention.shape == (4, model.n_layers, model.n_heads, 2, 2)
    for row, one in enumerate(alone):
        assert torch.allclose(together.attention[row], one.attention[0], atol=1e-5, equal_nan=True)
    assert together.occurrences.tolist() == [one.occurrences[0].tolist() for one in alone]


def test_attention_is_that_of_the_last_position(model):
    """By hand from the patterns, head by head, where v and s of 'vûrs' stand."""
    pair = lookup("vûrs", "xûzg")
    last = attention_patterns(model, left_padded([pair.clean], 0))[0, :, :, -1]
    places = torch.tensor([[from_end(pair, letter)[0] for letter in both] for both in ("vx", "sg")])
    assert torch.allclose(copying(model, [pair]).attention[0], last[..., places], atol=1e-6)


@pytest.mark.parametrize(
    ("pair", "token", "concept"),
    [
        (lookup("vûrs", "xûzg", lines="keys and kays\n"), False, False),  # neither stands there
        (lookup("vûrs", "xûzg", lines="key: {a}\nkay: {w}\nkay: {w}\n"), False, False),  # not equally often
        (lookup("vûrs", "xûzg", lines="key: {a}\n"), False, False),  # nothing to compare with
        (lookup("v", "x"), True, False),  # the next token is the word's last
        (lookup("vûrs", "x"), True, False),  # the wrong word's is
        (lookup("x", "vûrs"), True, False),
        (lookup("vûr", "vûs"), True, False),  # all but the last stand in the prompt
        (lookup("vûr", "vûrs"), False, False),  # all of it does: what comes next is a line's end
        (lookup("vûrs", "xûzg", ends=" .\n"), True, True),
        # Words of the clean prompt; in the corrupt one they are parts of another.
        (make_pair(TOKENIZER, "a vors xuzg:", "a vorsyxuzg:", " vors", " xuzg", chat=False), True, True),
        (replace(lookup("vûrs", "xûzg"), answer_ids=(), wrong_ids=()), False, False),
    ],
)
def test_what_can_not_be_measured_is_nan_and_counted(pair, token, concept):
    found = copying(WrittenByHand([None, [-3]]), [pair, lookup("vûrs", "xûzg")])
    assert (~found.difference[0].isnan()).all(1).all(0).tolist() == [token, concept]
    assert found.measured == {"token": 1 + token, "concept": 1 + concept}


def test_arithmetic_has_nothing_to_copy(model):
    pair = make_pair(TOKENIZER, "3+4:", "3+5:", " 7", " 8", chat=False)
    found = copying(model, [pair])
    assert found.attention.isnan().all() and found.measured == {"token": 0, "concept": 0}


def spaced():
    """Every token is a word of one sign with a space in front, so that the copying model's symbols are words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "Ġ": 1} | {
        f"Ġ{chr(code)}": code - 0x41 + 2 for code in (*range(0x41, 0x5B), *range(0x61, 0x7B))
    }
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="Ġ"))
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", unk_token="Ġ")


@pytest.mark.parametrize("seed", range(3))
def test_the_copying_models_heads_are_found_and_in_random_models_there_are_none(seed):
    """Layer 1 copies, by the token; a symbol is one token, so the concept route is not there to be measured."""
    model = load_hooked(str(FIXTURE))
    tokenizer = spaced()
    ids = [*range(2, 28), *range(34, 60)]
    pairs = [
        replace(pair, answer_ids=(pair.answer, 0), wrong_ids=(pair.wrong, 0))
        for pair in induction_pairs(24, 10, vocabulary=ids, seed=seed)
    ]
    fresh = random_hooked(model, seed)
    model.tokenizer = fresh.tokenizer = tokenizer
    found = copying(model, pairs)
    assert found.measured == {"token": 24, "concept": 0}
    by_head = found.difference[..., 0].mean(0)
    assert by_head[1].max() > 0.6 and by_head[0].abs().max() < 0.1
    assert copying(fresh, pairs).difference[..., 0].mean(0).abs().max() < 0.1


def test_no_pairs_are_refused(model):
    for measure in (copying, attention_span):
        with pytest.raises(StoneyError, match="no prompt pair"):
            measure(model, [])


# Span


def test_spans_by_hand():
    """Five tokens: at itself, at the first, at both; distances 0, 4, 2; H / log 5 of the last is log 2 / log 5."""
    pair = random_pairs((5,))[0]
    found = attention_span(WrittenByHand([[-1], [-5], [-1, -5], None]), [pair])
    assert found["last_distance"].flatten().tolist() == pytest.approx([0, 4, 2, 2])
    assert found["last_sink"].flatten().tolist() == pytest.approx([0, 1, 0.5, 0.2])
    assert found["last_entropy"].flatten().tolist() == pytest.approx([0, 0, 0.4306766, 1], abs=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_spans_from_the_patterns_pair_by_pair(architecture):
    model, pairs = tiny.lively(architecture), random_pairs((9, 5, 12))
    found = attention_span(model, pairs, batch_size=2)
    assert sorted(found) == sorted(f"{which}_{name}" for which in ("last", "mean") for name in SPANS)
    for row, pair in enumerate(pairs):
        size = len(pair.clean)
        pattern = attention_patterns(model, left_padded([pair.clean], 0))[0]
        position = torch.arange(size)
        distance = (pattern * (position[:, None] - position)).sum(-1)
        choices = (position[1:] + 1).log()
        expected = {
            "last_distance": distance[..., -1],
            "mean_distance": distance[..., 1:].mean(-1),
            "last_sink": pattern[..., -1, 0],
            "mean_sink": pattern[..., 1:, 0].mean(-1),
            "last_entropy": torch.special.entr(pattern[..., -1, :]).sum(-1) / choices[-1],
            "mean_entropy": (torch.special.entr(pattern[..., 1:, :]).sum(-1) / choices).mean(-1),
        }
        for name, value in expected.items():
            assert torch.allclose(found[name][row], value, atol=1e-5), name


def test_the_query_that_is_asked_is_the_one_that_counts():
    pattern = torch.tensor([[1, 0, 0], [0.75, 0.25, 0], [0.5, 0.5, 0]])[None, None]
    last = entropy(pattern, torch.ones(1, 3), torch.tensor([[0, 0, 1]]))
    assert last.item() == pytest.approx(0.6309298)
