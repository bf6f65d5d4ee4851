"""Shared prompts against rows written out: the same log-probabilities, gradients and draws."""

import functools

import pytest
import tiny
import torch
from transformers import GenerationConfig

from stoney_rl import prefix

PAD, END, TEMPERATURE = 0, 2, 0.7
PROMPTS = [[11, 12, 13, 14, 15], [21, 22], [31, 32, 33, 34]]


@functools.cache
def model(architecture, *, adapted=False, attention=None):
    """A tiny model, ready for packed rows; ``adapted``: with an adapter that changes what it computes."""
    found = tiny.model(architecture)
    if attention:
        found.set_attn_implementation(attention)
    prefix.score_packed(found, TEMPERATURE)
    if not adapted:
        return found
    from peft import LoraConfig, get_peft_model

    found = get_peft_model(found, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")).eval()
    torch.manual_seed(1)
    for name, weight in found.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return found


def written_out(members=(0, 1, 0, 2, 0, 1), lengths=(3, 4, 4, 1, 2, 4), seed=0):
    """(input_ids, attention_mask) [row, 5 + 4]: row i has the prompt ``members[i]`` and ``lengths[i]`` random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids, mask = (torch.zeros(len(members), 9, dtype=torch.int64) for _ in range(2))
    for row, (member, length) in enumerate(zip(members, lengths, strict=True)):
        prompt = PROMPTS[member]
        ids[row, 5 - len(prompt) : 5] = torch.tensor(prompt)
        ids[row, 5 : 5 + length] = torch.randint(3, 259, (length,), generator=generator)
        mask[row, 5 - len(prompt) : 5 + length] = 1
    return ids, mask


def by_rows(model, ids, mask, temperature=TEMPERATURE):
    """Log-probabilities and entropies [row, 4] of the completions, 0 where masked: the plain way."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 4:-1]
    distribution = (logits.float() / temperature).log_softmax(-1)
    log_probs = distribution.gather(-1, ids[:, 5:, None]).squeeze(-1)
    entropies = -(distribution.exp() * distribution).sum(-1)
    return log_probs * mask[:, 5:], entropies * mask[:, 5:]


def shared(model, ids, mask):
    return prefix.log_probs(model, prefix.pack(ids, mask, 4), (len(ids), 4))


def gradients(model, loss):
    """Of every trainable weight that the loss depends on."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {name: grad for name, grad in zip(weights, found, strict=True) if grad is not None}


SHARING = [name for name in tiny.ARCHITECTURES if name != "gemma2"]


def test_who_can_share():
    """Gemma 2 caps its logits after the LM head; flash attention takes no mask."""
    assert [name for name in tiny.ARCHITECTURES if prefix.can_share(model(name))] == SHARING
    assert prefix.can_share(model("llama", attention="eager"))
    flash = tiny.model()
    flash.config._attn_implementation = "flash_attention_2"
    assert not prefix.can_share(flash)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("architecture", SHARING)
def test_log_probabilities_and_gradients_are_those_of_separate_rows(architecture, adapted):
    policy = model(architecture, adapted=adapted)
    ids, mask = written_out()
    (log_probs, entropies), expected = shared(policy, ids, mask), by_rows(policy, ids, mask)
    torch.testing.assert_close(log_probs, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies, expected[1], rtol=0, atol=1e-5)
    factors = torch.linspace(-1, 1, log_probs.numel()).view(log_probs.shape)
    found, wanted = (gradients(policy, (factors * values).sum()) for values in (log_probs, expected[0]))
    assert found.keys() == wanted.keys() and len(found) > 8
    for name in found:
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-5 * max(scale, 1))


def test_eager_attention_adds_its_mask():
    ids, mask = written_out()
    policy = model("llama", attention="eager")
    torch.testing.assert_close(shared(policy, ids, mask)[0], by_rows(policy, ids, mask)[0], rtol=0, atol=1e-5)


def test_the_temperature_counts():
    ids, mask = written_out()
    found = shared(model("llama"), ids, mask)[0]
    assert (found - by_rows(model("llama"), ids, mask, temperature=1.0)[0]).abs().max() > 1e-3


def test_a_completion_does_not_see_another():
    """Rows 0, 2 and 4 share a prompt: the numbers of 0 and 4 stay when 2 becomes another text, or a shorter one."""
    ids, mask = written_out()
    before = shared(model("llama"), ids, mask)[0]
    other = ids.clone()
    other[2, 5:9] = torch.tensor([201, 202, 203, 204])
    shorter = mask.clone()
    shorter[2, 6:] = 0
    for now in (shared(model("llama"), other, mask)[0], shared(model("llama"), ids, shorter)[0]):
        rest = [0, 1, 3, 4, 5]
        torch.testing.assert_close(now[rest], before[rest], rtol=0, atol=1e-6)
        assert (now[2] - before[2]).abs().max() > 1e-3


def test_nor_is_it_taught_by_another():
    """The gradient of row 0's log-probability is the same, whatever row 2 says."""
    ids, mask = written_out()
    other = ids.clone()
    other[2, 5:9] = torch.tensor([201, 202, 203, 204])
    policy = model("llama", adapted=True)
    one, two = (gradients(policy, shared(policy, given, mask)[0][0].sum()) for given in (ids, other))
    assert max(float(grad.abs().max()) for grad in one.values()) > 1e-3
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-6)


def test_packed_by_hand():
    ids = torch.tensor([[0, 5, 6, 7, 8], [1, 2, 3, 4, 0], [0, 5, 6, 9, 0], [0, 5, 6, 9, 9]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0, 1, 1, 0, 0]])
    packed = prefix.pack(ids, mask, 2)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 4, 0]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 3, 0]]
    assert packed.allowed.squeeze(1).int().tolist() == [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]],
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]],
    ]
    assert packed.picks.tolist() == [1, 2, 1, 7]  # 6 predicts 7 and 9, 7 predicts 8; 3 predicts 4
    assert packed.targets.tolist() == [7, 8, 9, 4]
    assert [place.tolist() for place in packed.places] == [[0, 0, 2, 1], [0, 1, 0, 0]]


def test_padding_is_not_taken_for_the_prompt():
    """A prompt may begin with the padding token: it is the mask that tells."""
    ids = torch.tensor([[0, 0, 5, 7], [0, 0, 5, 8]])
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]])
    assert prefix.pack(ids, mask, 1).input_ids.tolist() == [[0, 5, 7], [5, 8, 0]]


def test_rows_masked_whole_are_left_out():
    ids, mask = written_out()
    mask[[0, 3], 5:] = 0
    packed = prefix.pack(ids, mask, 4)
    assert sorted(set(packed.places[0].tolist())) == [1, 2, 4, 5]
    assert len(packed.input_ids) == 2  # row 3 was the only one of its prompt
    found = shared(model("llama"), ids, mask)[0]
    assert found[[0, 3]].eq(0).all()
    torch.testing.assert_close(found, by_rows(model("llama"), ids, mask)[0], rtol=0, atol=1e-5)
    mask[:, 5:] = 0
    assert prefix.pack(ids, mask, 4) is None


def windowed():
    """A model whose layers look back at the last six tokens alone; large weights, so that what is seen counts."""
    found = tiny.model("gemma3")
    with torch.no_grad():
        for weight in found.parameters():
            if weight.dim() == 2:
                weight *= 10
    found.config.sliding_window = 6
    for layer in found.model.layers:
        if hasattr(layer.self_attn, "sliding_window"):
            layer.self_attn.sliding_window = 6
    return found


def test_how_far_every_layer_looks_back():
    """A mask of one's own takes the place of a layer's sliding window, so longer rows must not be packed."""
    assert prefix.reach(model("llama")) == float("inf") and prefix.reach(model("gemma3")) == 4096
    assert prefix.reach(windowed()) == 6


# Sampling.

CONFIG = {"max_new_tokens": 6, "eos_token_id": [END], "pad_token_id": PAD, "do_sample": True, "top_k": 0}


def drawn_as_by_generate(policy, prompts, **options):
    """The tokens that both ways draw with one seed, after a check that they are the same."""
    config = GenerationConfig(**CONFIG | options)
    ids, mask = prefix._left_padded(prompts, PAD)
    torch.manual_seed(5)
    with torch.no_grad():
        expected = policy.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.size(1) :]
    torch.manual_seed(5)
    found = prefix.sample(policy, prompts, config, pad=PAD)
    assert found.tolist() == expected.tolist()
    return found


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_samples_are_those_of_generate(architecture, adapted):
    """Prompts of different lengths, unequal numbers of copies, in no order."""
    prompts = [PROMPTS[member] for member in (0, 1, 0, 2, 0, 1, 1, 1)]
    found = drawn_as_by_generate(model(architecture, adapted=adapted), prompts)
    assert len({tuple(tokens) for tokens in found.tolist()}) == 8


def test_the_adapter_is_in_what_is_drawn():
    one, other = (prefix.sample(model("llama", adapted=adapted), PROMPTS, GenerationConfig(**CONFIG | {"do_sample": False}),
                                pad=PAD) for adapted in (False, True))  # fmt: skip
    assert not one.equal(other)


def test_a_sliding_window_slides_over_shared_prompts_too():
    drawn_as_by_generate(windowed(), [PROMPTS[0], PROMPTS[1], PROMPTS[0]])


@pytest.mark.parametrize("prompts", [[[7]], [[7], [7], [8]], [[7], PROMPTS[0], [7]]])
def test_prompts_of_one_token(prompts):
    drawn_as_by_generate(model("llama", adapted=True), prompts)


@pytest.mark.parametrize("options", [{"temperature": 0.5, "top_p": 0.8}, {"top_k": 3}, {"repetition_penalty": 1.5}])
def test_sampling_options_count(options):
    drawn_as_by_generate(model("llama", adapted=True), [PROMPTS[0], PROMPTS[1], PROMPTS[0]], **options)


def test_what_follows_the_end_is_padding():
    """Half of the vocabulary ends a completion here, so that many end early."""
    found = drawn_as_by_generate(model("llama"), PROMPTS * 4, eos_token_id=list(range(2, 130)))
    for tokens in found.tolist():
        ends = [at for at, token in enumerate(tokens) if 2 <= token < 130]
        assert not ends or set(tokens[ends[0] + 1 :]) <= {PAD}
    assert found.eq(PAD).any()
