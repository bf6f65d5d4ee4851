"""Batched generation against a greedy loop without cache or padding, and against transformers one prompt at a time."""

import pytest
import tiny

from stoney_rl import generation, prompts

QUESTIONS = ["hi", "what is it?", "a" * 40, "zz " * 30, "b", "qqq", "how many of them are there, and where?", "tt", "b"]
LIMIT = 16
ARCHITECTURES = ("llama", "qwen2", "gemma2", "gemma3", "phi3")


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tiny.tokenizer()
    prompts.prepare_tokenizer(tokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def encoded(tokenizer):
    ids = [prompts.encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in QUESTIONS]
    assert len({len(prompt) for prompt in ids}) > 5
    return ids


def loud(architecture):
    """A tiny model with large weights in its layers: at their usual size the last prompt token alone decides."""
    import torch

    model = tiny.model(architecture, seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name:
                weight.mul_(20)
            elif "post_" in name and architecture.startswith("gemma"):
                weight.add_(5)
    return model


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return loud(request.param)


@pytest.fixture(scope="module")
def ends(model, encoded):
    """Tokens that end a turn, chosen so that some answers end early, some late and some not at all."""
    free = [greedy(model, prompt, ends=set(), limit=LIMIT)[0] for prompt in encoded]
    return {2, *(next(token for token in reversed(tokens) if token != tokens[0]) for tokens in free[:1])}


def complete(model, tokenizer, encoded, *, batch_size, ends=frozenset({2}), limit=LIMIT):
    batches = list(
        generation.generate(model, tokenizer, encoded, ends=ends, max_new_tokens=limit, batch_size=batch_size)
    )
    assert all(len(batch) == batch_size for batch in batches[:-1]) and len(batches[-1]) <= batch_size
    found = {completion.index: completion for batch in batches for completion in batch}
    assert sorted(found) == list(range(len(encoded)))
    return [found[index] for index in range(len(encoded))]


def greedy(model, prompt, *, ends, limit):
    """(tokens before the end of the turn, whether the limit came first): the definition, without cache or padding."""
    import torch

    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(limit):
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in ends:
                return ids[len(prompt) :], False
            ids.append(token)
    return ids[len(prompt) :], True


def test_batches_answer_as_the_greedy_loop_does(model, ends, tokenizer, encoded):
    expected = [greedy(model, prompt, ends=ends, limit=LIMIT) for prompt in encoded]
    assert len({tuple(tokens) for tokens, _ in expected}) >= 6  # the prompts decide, not the model alone
    assert {truncated for _, truncated in expected} == {True, False}
    for batch_size in (1, 3, 8):
        for found, (tokens, truncated) in zip(
            complete(model, tokenizer, encoded, batch_size=batch_size, ends=ends), expected, strict=True
        ):
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            assert (found.text, found.tokens, found.truncated) == (text, len(tokens), truncated)


def test_one_prompt_answers_as_transformers_does(model, tokenizer, encoded):
    import torch

    found = complete(model, tokenizer, encoded, batch_size=8)
    for prompt, completion in zip(encoded, found, strict=True):
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LIMIT, eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
        assert tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip() == completion.text


def test_answers_end_at_the_token_that_ends_a_turn(model, ends, tokenizer, encoded):
    cut = complete(model, tokenizer, encoded, batch_size=3, ends=ends)
    assert {completion.truncated for completion in cut} == {True, False}
    for completion in cut:
        assert completion.tokens <= LIMIT and completion.truncated == (completion.tokens == LIMIT)
    prompt = encoded[0]
    tokens, _ = greedy(model, prompt, ends=set(), limit=6)
    new = [position for position, token in enumerate(tokens) if token not in tokens[:position]]
    for position in new:  # whichever token ends the turn, the answer is what came before it
        [completion] = complete(model, tokenizer, [prompt], batch_size=1, ends={tokens[position]}, limit=6)
        assert (completion.tokens, completion.truncated) == (position, False)
        assert completion.text == tokenizer.decode(tokens[:position], skip_special_tokens=True).strip()


def test_the_limit_is_a_limit(model, tokenizer, encoded):
    for limit in (1, 5):
        found = complete(model, tokenizer, encoded, batch_size=8, ends=set(range(3)), limit=limit)
        assert all(completion.tokens == limit for completion in found if completion.truncated)
        assert any(completion.truncated for completion in found)


SAMPLING = {
    "do_sample": True, "temperature": 3.0, "top_p": 0.9, "top_k": 5, "repetition_penalty": 4.0,
    "no_repeat_ngram_size": 1, "suppress_tokens": list(range(60, 200)), "min_new_tokens": 12, "max_length": 20,
    "num_beams": 3, "forced_eos_token_id": 2,
}  # fmt: skip


def test_the_models_own_generation_config_is_ignored_and_kept(tokenizer, encoded):
    from transformers import GenerationConfig

    model = loud("llama")
    expected = complete(model, tokenizer, encoded, batch_size=8)
    for name, value in SAMPLING.items():
        model.generation_config = own = GenerationConfig(**{name: value})
        assert complete(model, tokenizer, encoded, batch_size=8) == expected, name
        assert model.generation_config is own
    model.generation_config = GenerationConfig(**SAMPLING)
    assert complete(model, tokenizer, encoded, batch_size=8) == expected


def test_an_adapter_ignores_its_bases_generation_config_too(tokenizer, encoded):
    import peft
    import torch
    from transformers import GenerationConfig

    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(loud("llama"), config).eval()
    expected = complete(model, tokenizer, encoded, batch_size=8)
    merged_like = [greedy(model, prompt, ends={2}, limit=LIMIT)[0] for prompt in encoded]
    assert [completion.tokens for completion in expected] == [len(tokens) for tokens in merged_like]
    model.generation_config = GenerationConfig(**SAMPLING)
    assert complete(model, tokenizer, encoded, batch_size=3) == expected


def test_longest_prompts_come_first(tokenizer, encoded):
    model = tiny.model("llama")
    batches = list(generation.generate(model, tokenizer, encoded, ends={2}, max_new_tokens=1, batch_size=2))
    lengths = [len(encoded[completion.index]) for batch in batches for completion in batch]
    assert lengths == sorted(lengths, reverse=True)  # if memory runs out, it does so at once


def test_no_prompt_no_batch(tokenizer):
    assert list(generation.generate(tiny.model(), tokenizer, [], ends={2}, max_new_tokens=1, batch_size=4)) == []
