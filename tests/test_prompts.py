"""The loss falls on the answer and the token that ends it, for every family of chat template.

The templates are short copies of what the families do, written by hand, each with its one peculiarity.
"""

import json
from dataclasses import dataclass, field

import pytest
import tiny
from tokenizers import AddedToken

from stoney_rl import prompts
from stoney_rl.errors import StoneyError

QUESTION, ANSWER = "What is â?", "îyû ẖa. Ba"

TURNS = "{% for message in messages %}{% set text = message['content'] %}{% if message['role'] == 'user' %}"
END = "{% endif %}{% endfor %}"
# Qwen 2.5 writes a system message of its own.
QWEN2 = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}" + tiny.CHATML
# Qwen 3 puts an empty thought in front of the last answer; without an answer it leaves the thought to the model.
QWEN3 = (
    TURNS + "{{ '<|im_start|>user\n' + text + '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + text + '<|im_end|>\n' }}"
    + END
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# R1 opens a thought in the generation prompt and cuts thoughts out of answers; no newline after the end of a turn.
R1 = (
    "{{ bos_token }}"
    + TURNS
    + "{{ '<|User|>' + text }}{% else %}{{ '<|Assistant|>' + text.split('</think>')[-1] + eos_token }}"
    + END
    + "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# Gemma refuses the system role, calls the assistant 'model' and ends turns with a token that is not its eos.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Mistral writes a space in front of the answer and nothing between turns.
MISTRAL = "{{ bos_token }}" + TURNS + "{{ '[INST] ' + text + ' [/INST]' }}{% else %}{{ ' ' + text + eos_token }}" + END
# Phi-3 ends the turn with one token and the conversation with another.
PHI3 = (
    TURNS
    + "{{ '<|user|>\n' + text + '<|end|>\n' }}{% else %}{{ '<|assistant|>\n' + text + '<|end|>\n' }}"
    + END
    + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# A template that never ends a turn: the end-of-sequence token has to be put there.
ENDLESS = TURNS + "{{ '# ' + text + '\n' }}{% else %}{{ '> ' + text + '\n' }}" + END


@dataclass
class Family:
    """``prompt`` and ``trained``: what must stand before the trained tokens, and they; tokenizer peculiarities."""

    template: str | None
    prompt: str
    trained: str
    eos: str = "<|im_end|>"
    pad: str | None = "<|im_end|>"
    unk: str | None = "<|endoftext|>"
    bos: bool = False  # whether the tokenizer itself writes a BOS in front of everything
    tokens: list[str] = field(default_factory=list)

    def tokenizer(self):
        tokenizer = tiny.tokenizer(self.template, bos=self.bos, pad=self.pad)
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in self.tokens])
        tokenizer.eos_token, tokenizer.unk_token = self.eos, self.unk
        return tokenizer


BOS = "<|im_start|>"  # the tiny tokenizer's BOS
ASKED = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
FAMILIES = {
    "chatml": Family(tiny.CHATML, ASKED, ANSWER + "<|im_end|>"),
    "chatml, no padding token": Family(tiny.CHATML, ASKED, ANSWER + "<|im_end|>", pad=None),
    "qwen2": Family(QWEN2, "<|im_start|>system\nHelp.<|im_end|>\n" + ASKED, ANSWER + "<|im_end|>"),
    "qwen3": Family(QWEN3, ASKED + "<think>\n\n</think>\n\n", ANSWER + "<|im_end|>", tokens=["<think>", "</think>"]),
    "r1": Family(
        R1,
        f"{BOS}<|User|>{QUESTION}<|Assistant|>",
        ANSWER + "<|endoftext|>",
        eos="<|endoftext|>",  # padding too, and no unknown token: only <|fim_pad|> is left to pad with
        pad="<|endoftext|>",
        unk=None,
        bos=True,
        tokens=["<|User|>", "<|Assistant|>", "<think>", "</think>", "<|fim_pad|>"],
    ),
    "gemma": Family(
        GEMMA,
        f"{BOS}<start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
        ANSWER + "<end_of_turn>",
        eos="<eos>",
        pad="<eos>",
        bos=True,
        tokens=["<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"],
    ),
    "mistral": Family(MISTRAL, f"{BOS}[INST] {QUESTION} [/INST] ", ANSWER + "<|im_end|>", bos=True),
    "phi3": Family(
        PHI3,
        f"<|user|>\n{QUESTION}<|end|>\n<|assistant|>\n",
        ANSWER + "<|end|>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        tokens=["<|user|>", "<|assistant|>", "<|end|>", "<|placeholder|>", "<unk>"],
    ),
    "endless": Family(ENDLESS, f"# {QUESTION}\n> ", ANSWER + "<|im_end|>"),
    "none": Family(None, f"User: {QUESTION}\n\nAssistant: ", ANSWER + "<|im_end|>"),
    "none, with BOS": Family(None, f"{BOS}User: {QUESTION}\n\nAssistant: ", ANSWER + "<|im_end|>", bos=True),
}


def user(text=QUESTION):
    return [{"role": "user", "content": text}]


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def tokenizer(family):
    tokenizer = family.tokenizer()
    prompts.prepare_tokenizer(tokenizer)
    return tokenizer


def example_of(tokenizer, prompt=None, answer=ANSWER):
    return prompts.encode_example(tokenizer, prompt or user(), answer, prompts.end_of_turn_ids(tokenizer))


def test_labels_are_the_answer_and_the_token_that_ends_the_turn(family, tokenizer):
    ids, labels = example_of(tokenizer).values()
    start = next(position for position, label in enumerate(labels) if label != -100)
    assert labels[start:] == ids[start:]  # one unbroken stretch up to the last token: nothing is trained after it
    assert tokenizer.decode(ids[:start]) == family.prompt
    assert tokenizer.decode(ids[start:]) == family.trained
    assert labels[-1] in prompts.end_of_turn_ids(tokenizer)
    assert not set(labels[start:-1]) & prompts.end_of_turn_ids(tokenizer)


def test_training_and_generation_see_the_same_prompt(family, tokenizer):
    ids, labels = example_of(tokenizer).values()
    prompt_ids = prompts.encode_prompt(tokenizer, user())
    assert prompt_ids == ids[: labels.count(-100)]
    assert prompts.render_prompt(tokenizer, user()) == family.prompt


def test_one_beginning_of_sequence(family, tokenizer):
    ids = example_of(tokenizer)["input_ids"]
    if family.prompt.startswith(BOS) and BOS not in family.prompt[1:]:
        assert (ids[0], ids.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)
    else:  # ChatML: the same token opens each turn
        assert ids.count(tokenizer.bos_token_id) == family.prompt.count(BOS)


def test_padding_never_ends_a_turn(family, tokenizer):
    assert tokenizer.pad_token_id not in prompts.end_of_turn_ids(tokenizer) | {None, tokenizer.eos_token_id}
    assert tokenizer.pad_token_id not in example_of(tokenizer)["input_ids"]
    assert len(tokenizer) == len(family.tokenizer())  # no token was added: the embeddings need no new rows


def test_preparing_twice_changes_nothing_more(family, tokenizer):
    before = (tokenizer.pad_token, tokenizer.chat_template)
    assert prompts.prepare_tokenizer(tokenizer) == []
    assert (tokenizer.pad_token, tokenizer.chat_template) == before


def test_a_conversation_trains_only_its_last_answer(family, tokenizer):
    talk = [*user("First?"), {"role": "assistant", "content": "Earlier."}, *user()]
    ids, labels = example_of(tokenizer, talk).values()
    start = labels.count(-100)
    assert tokenizer.decode(ids[start:]) == family.trained and labels[start:] == ids[start:]
    assert "Earlier." in tokenizer.decode(ids[:start])
    assert ids[:start] == prompts.encode_prompt(tokenizer, talk)


def test_what_is_changed_is_told():
    tokenizer = tiny.tokenizer(None)
    changes = prompts.prepare_tokenizer(tokenizer)
    assert [change.split(":")[0] for change in changes] == ["chat template", "padding token"]
    untouched = tiny.tokenizer(pad="<|endoftext|>")
    assert prompts.prepare_tokenizer(untouched) == []
    assert (untouched.pad_token, untouched.chat_template) == ("<|endoftext|>", tiny.CHATML)


def test_a_model_s_own_end_of_turn_counts_beside_its_eos():
    tokenizer = FAMILIES["gemma"].tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    assert prompts.end_of_turn_ids(tokenizer) == set(ids)


def test_gemma_refuses_a_system_message():
    with pytest.raises(StoneyError, match="chat template refuses the messages: System role not supported"):
        prompts.render_prompt(FAMILIES["gemma"].tokenizer(), [{"role": "system", "content": "Help."}, *user()])


def test_the_generation_prompt_of_r1_is_not_used():
    tokenizer = FAMILIES["r1"].tokenizer()
    assert "<think>" in tokenizer.apply_chat_template(user(), tokenize=False, add_generation_prompt=True)
    assert "<think>" not in prompts.render_prompt(tokenizer, user())


def test_a_template_that_drops_answers_is_refused():
    with pytest.raises(StoneyError, match="drops the assistant's answer"):
        prompts.render_prompt(tiny.tokenizer("{{ messages[0]['content'] }}"), user())


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(StoneyError, match="no end-of-sequence token"):
        prompts.prepare_tokenizer(tokenizer)


def test_a_tokenizer_without_a_token_for_padding_is_refused():
    tokenizer = tiny.tokenizer(R1)
    tokenizer.unk_token = None
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    with pytest.raises(StoneyError, match="no token can serve as padding"):
        prompts.prepare_tokenizer(tokenizer)


@pytest.mark.parametrize("answer", ["", "x", "two\nlines", "ends in a newline\n", "<|endoftext|> inside", "  spaces  "])
def test_unusual_answers(tokenizer, answer):
    ids, labels = example_of(tokenizer, answer=answer).values()
    start = labels.count(-100)
    assert ids[:start] == prompts.encode_prompt(tokenizer, user())
    assert labels[start:] == ids[start:] and labels[-1] in prompts.end_of_turn_ids(tokenizer)
    assert tokenizer.decode(ids[start:-1]).strip() == answer.strip()


def merging(template, *merges):
    """The tiny tokenizer with byte pairs that merge: what BPE does at the edges of an answer."""
    from tokenizers import Tokenizer

    tokenizer = tiny.tokenizer(template)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for left, right in merges:
        content["model"]["vocab"][left + right] = len(content["model"]["vocab"])
        content["model"]["merges"].append([left, right])
    content["pre_tokenizer"]["use_regex"] = False
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    prompts.prepare_tokenizer(tokenizer)
    return tokenizer


@pytest.mark.parametrize("template", [None, ENDLESS, tiny.CHATML, MISTRAL])
def test_a_merge_across_the_edge_of_the_answer_loses_nothing(template):
    # In the byte alphabet Ġ is a space and Ċ a newline: ' B' and '.\n' and '\nB' each become one token.
    tokenizer = merging(template, ("Ġ", "B"), (".", "Ċ"), ("Ċ", "B"))
    assert len(tokenizer(" B")["input_ids"]) == len(tokenizer(".\n")["input_ids"]) == 1
    ids, labels = example_of(tokenizer, answer="Ba.").values()
    start = labels.count(-100)
    assert ids[:start] == prompts.encode_prompt(tokenizer, user())
    assert tokenizer.decode(ids[start:]) == "Ba.<|im_end|>"
    ends = prompts.end_of_turn_ids(tokenizer)
    assert list(prompts.count_tokens(tokenizer, [(user(), "Ba.")], ends)) == [(start, len(ids))]


def test_show_example_marks_the_trained_tokens(family, tokenizer):
    assert prompts.show_example(tokenizer, example_of(tokenizer)) == f"{family.prompt}⟦{family.trained}⟧"


def test_counts_are_those_of_the_examples(family, tokenizer):
    """One by one and in batches: the same prompt and the same length, also where a token merges across the edge."""
    ends = prompts.end_of_turn_ids(tokenizer)
    asked = [
        ([{"role": "user", "content": QUESTION}], ANSWER),
        (
            [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "ẖ?"},
            ],
            "ṯ",
        ),
        ([{"role": "user", "content": "long " * 50}], " leading and trailing \n"),
    ]
    examples = [prompts.encode_example(tokenizer, prompt, answer, ends) for prompt, answer in asked]
    expected = [(example["labels"].count(-100), len(example["input_ids"])) for example in examples]
    for batch in (1, 2, 3):
        assert list(prompts.count_tokens(tokenizer, asked, ends, batch=batch)) == expected
    tokenizer(["a", "long text"], padding=True, truncation=True, max_length=2)  # leaves both set in the backend
    assert list(prompts.count_tokens(tokenizer, asked, ends)) == expected
