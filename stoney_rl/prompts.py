"""The one prompt format: how chat messages become token ids, for training, generation and interpretation alike."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from stoney_rl.errors import StoneyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# For models without a chat template of their own: plain turns, ended by the tokenizer's end-of-sequence token.
PLAIN_TEMPLATE = (
    "{{ bos }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
# Stands for the answer while a template is rendered; no template changes plain letters.
_ANSWER_MARK = "STONEYRLANSWERMARK"
# Tokens that some tokenizer families reserve for padding, or that can never end a turn; then any other named 'pad'.
_PAD_CANDIDATES = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<|padding|>", "<unk>")


def prepare_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Give the tokenizer what training needs, in place; return a line for each change made.

    A chat template where it has none, and a padding token that is not the one that ends a turn: otherwise every
    label mask by token id would also hide the end of the answer. Raises ``StoneyError`` without an end-of-sequence
    token.
    """
    changes = []
    if tokenizer.eos_token_id is None:
        raise StoneyError(f"{tokenizer.name_or_path}: its tokenizer has no end-of-sequence token; choose another model")
    if not tokenizer.chat_template:
        bos = tokenizer.bos_token if _adds_bos(tokenizer) else ""
        tokenizer.chat_template = PLAIN_TEMPLATE.replace("{{ bos }}", bos)
        changes.append("chat template: the model has none, plain 'User: ... Assistant: ...' turns are used")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in end_of_turn_ids(tokenizer):
        tokenizer.pad_token = _choose_pad_token(tokenizer)
        changes.append(f"padding token: {tokenizer.pad_token!r}, so that it is not the token that ends a turn")
    return changes


def _adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _choose_pad_token(tokenizer: "PreTrainedTokenizerBase") -> str:
    vocabulary = tokenizer.get_vocab()
    ends = end_of_turn_ids(tokenizer)
    # DeepSeek-R1-Distill-Qwen pads with its end-of-sequence token and has no unknown token, only <|fim_pad|> and the like.
    named = sorted(token for token in tokenizer.get_added_vocab() if "pad" in token.lower())
    for token in (*_PAD_CANDIDATES, *named, tokenizer.unk_token, *tokenizer.all_special_tokens):
        if token in vocabulary and vocabulary[token] not in ends and token != tokenizer.bos_token:
            return token
    raise StoneyError(
        f"{tokenizer.name_or_path}: no token can serve as padding apart from the one that ends a turn; "
        "add a padding token to the tokenizer"
    )


def end_of_turn_ids(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Ids of the tokens that end an assistant turn: end-of-sequence, and what the chat template closes a turn with."""
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        _, suffix = _render(tokenizer, [{"role": "user", "content": "Hello"}])
        closing = tokenizer(suffix.strip(), add_special_tokens=False)["input_ids"][:1]
        ends.update(token for token in closing if token in tokenizer.all_special_ids or _is_added(tokenizer, token))
    return ends


def _is_added(tokenizer: "PreTrainedTokenizerBase", token_id: int) -> bool:
    return token_id in getattr(tokenizer, "added_tokens_decoder", {})


def _render(tokenizer: "PreTrainedTokenizerBase", prompt: list[dict]) -> tuple[str, str]:
    """The rendered text before and after the answer."""
    messages = [*prompt, {"role": "assistant", "content": _ANSWER_MARK}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # jinja2 raises its own types; templates raise on roles they refuse
        raise StoneyError(f"{tokenizer.name_or_path}: its chat template refuses the messages: {error}") from error
    before, mark, after = text.partition(_ANSWER_MARK)
    if not mark:
        raise StoneyError(f"{tokenizer.name_or_path}: its chat template drops the assistant's answer; choose another")
    return before, after


def render_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: list[dict]) -> str:
    """The text that stands before the answer: the same in training and in generation.

    It is cut from a rendering that contains an answer, not asked for with ``add_generation_prompt``: some templates
    open a reasoning block there that no training answer ever stood behind.
    """
    return _render(tokenizer, prompt)[0]


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: list[dict]) -> list[int]:
    """Token ids of the prompt, ready for generation. The template writes the only BOS."""
    return tokenizer(render_prompt(tokenizer, prompt), add_special_tokens=False)["input_ids"]


def encode_example(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: list[dict],
    answer: str,
    ends: set[int],
) -> dict[str, list[int]]:
    """Token ids and labels of one training example.

    Labels are -100 (ignored by the loss) on the prompt, and the token itself on the answer and on the one token that
    ends the turn. What a template writes after that token (SmolLM2: a newline) is left out.
    ``ends`` is ``end_of_turn_ids(tokenizer)``, passed in because it is the same for every example.
    """
    before, after = _render(tokenizer, prompt)
    prompt_ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    ids = tokenizer(before + answer + after, add_special_tokens=False)["input_ids"]
    if ids[: len(prompt_ids)] != prompt_ids:  # a token merged across the boundary: keep what generation will see
        ids = prompt_ids + tokenizer(answer + after, add_special_tokens=False)["input_ids"]
    closing = len(tokenizer(after, add_special_tokens=False)["input_ids"])
    for position in range(max(len(prompt_ids), len(ids) - closing), len(ids)):
        if ids[position] in ends:
            ids = ids[: position + 1]
            break
    else:  # the template writes no such token; what it writes may have merged with the answer's last one
        ids = tokenizer(before + answer, add_special_tokens=False)["input_ids"]
        if ids[: len(prompt_ids)] != prompt_ids:
            ids = prompt_ids + tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids = [*ids, tokenizer.eos_token_id]
    return {"input_ids": ids, "labels": [-100] * len(prompt_ids) + ids[len(prompt_ids) :]}


def count_tokens(
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[tuple[list[dict], str]],
    ends: set[int],
    *,
    batch: int = 1024,
) -> Iterator[tuple[int, int]]:
    """(tokens of the prompt, tokens of the whole example) of each (prompt, answer), as ``encode_example`` has them.

    Tokenized in batches: several times faster than one example after another.
    """
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        rendered = [_render(tokenizer, prompt) for prompt, _ in part]
        before = [text for text, _ in rendered]
        whole = [text + answer + after for (text, after), (_, answer) in zip(rendered, part, strict=True)]
        closings = {after: len(_ids(tokenizer, [after])[0]) for after in {after for _, after in rendered}}
        for (prompt, answer), (_, after), prompt_ids, ids in zip(
            part, rendered, _ids(tokenizer, before), _ids(tokenizer, whole), strict=True
        ):
            first = max(len(prompt_ids), len(ids) - closings[after])
            end = next((at for at in range(first, len(ids)) if ids[at] in ends), None)
            if end is None or ids[: len(prompt_ids)] != prompt_ids:
                end = len(encode_example(tokenizer, prompt, answer, ends)["input_ids"]) - 1
            yield len(prompt_ids), end + 1


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.padding is None and backend.truncation is None:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]


def show_example(tokenizer: "PreTrainedTokenizerBase", example: dict[str, list[int]]) -> str:
    """The example as text, with the tokens that are trained between ⟦ and ⟧."""
    start = next((i for i, label in enumerate(example["labels"]) if label != -100), len(example["labels"]))
    prompt = tokenizer.decode(example["input_ids"][:start])
    trained = tokenizer.decode(example["input_ids"][start:])
    return f"{prompt}⟦{trained}⟧"
