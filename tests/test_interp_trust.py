"""The trust panel sees what it is there to see: each identity holds on a right model and fails on the mistake it is for."""

import pytest
import tiny
import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp import attention, lens, trust
from stoney_rl.interp.hooked import HookedModel, hook_model
from stoney_rl.interp.pairs import PromptPair


def random_pairs(number: int = 4, seed: int = 0) -> list[PromptPair]:
    """Prompts of random tokens that differ in one place."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for index in range(number):
        clean = torch.randint(3, 259, (9 + index,), generator=generator).tolist()
        corrupt = [*clean[:3], 3 + (clean[3] + 40) % 250, *clean[4:]]
        pairs.append(PromptPair(tuple(clean), tuple(corrupt), 7 + index, 90 + index, str(index), "random", ("",) * 4))
    return pairs


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def model(request):
    """With norm weights that are not all 1, as after training."""
    plain = tiny.model(request.param)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return hook_model(plain, tiny.tokenizer(), request.param)


def test_everything_holds(model):
    values = trust.measure(model, random_pairs())
    assert set(values) == set(trust.INVARIANTS)
    assert trust.failed(values, model.dtype) == []
    not_applicable = {"merged", "recorded"} | ({"heads", "neurons"} if model.post_norm else set())
    assert {key for key, value in values.items() if value is None} == not_applicable


@pytest.fixture(scope="module")
def llama():
    plain = tiny.model("llama")
    torch.manual_seed(0)
    with torch.no_grad():
        plain.model.norm.weight.add_(0.3 * torch.randn(32))
    return hook_model(plain, tiny.tokenizer(), "llama")


def broken(model: HookedModel, monkeypatch, key: str) -> bool:
    """Whether exactly the panel's ``key`` is among what fails."""
    lines = trust.failed(trust.measure(model, random_pairs()), model.dtype)
    return any(line.startswith(trust.INVARIANTS[key].name) for line in lines)


def test_a_transposed_output_projection_is_seen(llama, monkeypatch):
    right = HookedModel.W_O
    monkeypatch.setattr(
        HookedModel, "W_O", lambda self, layer: right(self, layer).flatten(0, 1).T.reshape(4, 8, 32).contiguous()
    )
    assert broken(llama, monkeypatch, "heads")


def test_a_dropped_norm_weight_is_seen(llama, monkeypatch):
    monkeypatch.setattr(HookedModel, "final_norm_weight", property(lambda self: torch.ones(32)))
    assert broken(llama, monkeypatch, "components")


def test_a_transposed_mlp_is_seen(llama, monkeypatch):
    right = HookedModel.W_out
    monkeypatch.setattr(HookedModel, "W_out", lambda self, layer: right(self, layer).flip(0))
    assert broken(llama, monkeypatch, "neurons")


def test_attention_that_loses_something_is_seen(llama, monkeypatch):
    right = attention.attention_patterns
    monkeypatch.setattr(attention, "attention_patterns", lambda *arguments: 0.999 * right(*arguments))
    assert broken(llama, monkeypatch, "attention")


def test_a_lens_that_forgets_the_norm_is_seen(llama, monkeypatch):
    monkeypatch.setattr(lens, "log_probabilities", lambda model, stream: (stream @ model.W_U).log_softmax(-1))
    assert broken(llama, monkeypatch, "lens")


def test_a_hook_that_changes_the_model_is_seen(llama, monkeypatch):
    right = trust._gradients

    def leave_something(model, pairs):
        with torch.no_grad():
            model.bridge.ln_final.weight.mul_(1.01)
        return right(model, pairs)

    before = llama.bridge.ln_final.weight.detach().clone()
    monkeypatch.setattr(trust, "_gradients", leave_something)
    try:
        assert broken(llama, monkeypatch, "left_behind")
    finally:
        with torch.no_grad():
            llama.bridge.ln_final.weight.copy_(before)


def test_masks_that_are_dropped_are_seen(llama, monkeypatch):
    right = HookedModel._forward

    def unmasked(self, batch, *rest):
        return right(self, type(batch)(batch.ids, torch.ones_like(batch.mask)), *rest)

    monkeypatch.setattr(HookedModel, "_forward", unmasked)
    assert broken(llama, monkeypatch, "padding")


def test_hooks_that_write_elsewhere_than_they_read_are_seen(llama, monkeypatch):
    right = HookedModel.run

    def shifted(self, batch, *, read=(), edit=None, **options):
        moved = {hook: (lambda value, f=function: f(value).roll(1, 1)) for hook, function in (edit or {}).items()}
        return right(self, batch, read=read, edit=moved, **options)

    monkeypatch.setattr(HookedModel, "run", shifted)
    assert broken(llama, monkeypatch, "write_back") and broken(llama, monkeypatch, "replace_all")


def test_a_value_that_is_no_number_does_not_hold():
    assert trust.failed({"heads": float("nan"), "merged": None}, torch.float32) == [
        "heads = their attention: nan, at most 0.0001 is right"
    ]


def test_half_precision_is_judged_by_its_own_rounding_and_exact_identities_by_none():
    assert trust.INVARIANTS["heads"].limit_in(torch.bfloat16) == pytest.approx(0.1)
    assert trust.INVARIANTS["write_back"].limit_in(torch.bfloat16) == 0


def test_without_pairs_nothing_is_measured(llama):
    with pytest.raises(StoneyError, match="at least one"):
        trust.measure(llama, [])
