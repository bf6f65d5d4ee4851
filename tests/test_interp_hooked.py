"""What is hooked is the checkpoint and nothing else: one test for each way in which it silently was not."""

import copy
import json
import socket

import pytest
import tiny
import torch

from stoney_rl import checkpoints
from stoney_rl.errors import StoneyError
from stoney_rl.interp.hooked import Batch, hook_model, left_padded, load_hooked, random_hooked

POST_NORM = ("gemma2", "gemma3")


def random_batch(rows: int = 3, length: int = 11, seed: int = 0) -> Batch:
    ids = torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(seed))
    return Batch(ids, torch.ones_like(ids))


@pytest.fixture(scope="session", params=tiny.ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="session")
def plain(architecture):
    return tiny.model(architecture)


@pytest.fixture(scope="session")
def hooked(plain, architecture):
    return hook_model(plain, tiny.tokenizer(), architecture)


@pytest.fixture(scope="session")
def llama():
    return hook_model(tiny.model("llama"), tiny.tokenizer(), "llama")


def plain_logits(model, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits


# Faithful


def test_logits_are_the_models_own(plain, hooked):
    batch = random_batch()
    assert (hooked.run(batch).logits - plain_logits(plain, batch)).abs().max() < 1e-5
    assert hooked.fidelity.hooked < 1e-5 and hooked.fidelity.scale > 0.1


def test_the_model_that_is_given_stays_as_it_was(architecture):
    model = tiny.model(architecture).train()
    model.model.layers[0].register_forward_hook(hook := lambda *_: None)
    names = list(model.state_dict())
    values = {name: value.clone() for name, value in model.state_dict().items()}
    attention, config = model.config._attn_implementation, model.config.to_dict()
    torch.manual_seed(3)
    generator = torch.random.get_rng_state()
    opened = hook_model(model, tiny.tokenizer())
    opened.gradients(random_batch(), lambda logits: logits.sum(), at=["blocks.0.attn.hook_z"])
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert list(model.state_dict()) == names
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == attention and model.config.to_dict() == config
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    hooks = [list(module._forward_hooks.values()) for module in model.modules() if module._forward_hooks]
    assert hooks == [[hook]] and not any(module._backward_hooks for module in model.modules())


def test_an_adapter_is_merged(architecture):
    model = tiny.with_adapter(architecture)
    batch = random_batch()
    expected = plain_logits(model, batch)
    opened = hook_model(model, tiny.tokenizer())
    assert (opened.run(batch).logits - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
    assert opened.fidelity.merged is not None and opened.fidelity.merged < 1e-5 * max(1, opened.fidelity.scale)
    assert (expected - plain_logits(tiny.model(architecture), batch)).abs().max() > 0.05  # the adapter matters
    assert (plain_logits(model, batch) - expected).abs().max() == 0  # and is still there, unmerged
    assert any("lora_" in name for name in model.state_dict())


def test_an_adapter_that_was_not_merged_is_refused(architecture, monkeypatch):
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.get_base_model(), raising=False)
    with pytest.raises(StoneyError, match="not merged"):
        hook_model(tiny.with_adapter(architecture), tiny.tokenizer())


def test_a_hooked_model_that_computes_something_else_is_refused(monkeypatch):
    """As an unmerged adapter does on a fused projection: the bridge shows the base model."""
    from transformer_lens.model_bridge import TransformerBridge

    boot = TransformerBridge.boot_transformers
    other = tiny.model("llama", seed=5)
    monkeypatch.setattr(
        TransformerBridge,
        "boot_transformers",
        lambda name, hf_model, **options: boot(name, hf_model=copy.deepcopy(other), **options),
    )
    with pytest.raises(StoneyError, match="differ from the checkpoint's by"):
        hook_model(tiny.model("llama"), tiny.tokenizer())


def stamped(directory, model):
    """A merged checkpoint directory that records what its weights compute."""
    model.save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    stage = {"stage": "sft", "fingerprint": checkpoints.fingerprint(model)}
    (directory / checkpoints.STAGE_FILE).write_text(json.dumps(stage))
    return directory


def test_the_base_in_place_of_the_tuned_checkpoint_is_refused(tmp_path):
    tuned = stamped(tmp_path / "tuned", tiny.model("llama", seed=1))
    assert load_hooked(str(tuned)).fidelity.recorded < 1e-5
    tiny.model("llama", seed=0).save_pretrained(tuned)
    with pytest.raises(StoneyError, match="its weights or its base model were changed"):
        load_hooked(str(tuned))


def test_opens_an_adapter_directory_on_its_base(tmp_path):
    base = tiny.checkpoint(tmp_path / "base", "phi3")
    model = tiny.with_adapter("phi3")
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    batch = random_batch()
    opened = load_hooked(str(tmp_path / "adapter"))
    assert (opened.run(batch).logits - plain_logits(model, batch)).abs().max() < 1e-5


def test_opens_without_a_network(tmp_path, monkeypatch):
    directory = tiny.checkpoint(tmp_path / "model")
    tried = []

    def refuse(*arguments):
        tried.append(arguments)
        raise OSError("no network")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_hooked(str(directory)).run(random_batch())
    assert tried == []


def test_an_architecture_that_transformer_lens_does_not_know_is_one_clear_line(monkeypatch):
    model = tiny.model("llama")
    model.config.architectures, model.config.model_type = ["UnheardOfForCausalLM"], "unheard_of"
    with pytest.raises(StoneyError, match="TransformerLens does not open 'unheard_of' models"):
        hook_model(model, tiny.tokenizer())


def test_half_precision_is_faithful_within_its_own_rounding():
    opened = hook_model(tiny.model("llama").to(torch.bfloat16), tiny.tokenizer())
    assert opened.dtype == torch.bfloat16 and opened.run(random_batch()).logits.dtype == torch.bfloat16


# Tokens and masks


def test_left_padding_changes_nothing(hooked):
    rows = [random_batch(1, length, seed=length).ids[0].tolist() for length in (4, 9, 13)]
    name = "blocks.1.hook_resid_post"
    together = hooked.run(left_padded(rows, hooked.pad_token_id), read=[name])
    for index, row in enumerate(rows):
        alone = hooked.run(left_padded([row], hooked.pad_token_id), read=[name])
        assert (together.logits[index, -len(row) :] - alone.logits[0]).abs().max() < 1e-5 * max(
            1, hooked.fidelity.scale
        )
        assert (together[name][index, -len(row) :] - alone[name][0]).abs().max() < 1e-4


def test_no_token_is_put_in_front(llama):
    """The bridge would add its tokenizer's BOS to a string; there is no way in for a string."""
    batch = random_batch(2, 7)
    assert llama.run(batch, read=["hook_embed"])["hook_embed"].shape == (2, 7, 32)
    with pytest.raises(AttributeError):
        llama.run("a string")


@pytest.mark.parametrize("rows", [[], [[1, 2], []]])
def test_an_empty_row_is_refused(rows):
    with pytest.raises(StoneyError, match="at least one"):
        left_padded(rows, 0)


# Hooks: they exist, they fire, they leave no trace


def test_an_unknown_hook_is_named_with_the_nearest(llama):
    with pytest.raises(StoneyError, match=r"'blocks.0.hook_resid_pots' \(did you mean blocks.0.hook_resid_post\?\)"):
        llama.run(random_batch(), read=["blocks.0.hook_resid_post", "blocks.0.hook_resid_pots"])
    with pytest.raises(StoneyError, match="no hook is called 'blocks.9.hook_out'"):
        llama.run(random_batch(), edit={"blocks.9.hook_out": torch.zeros_like})
    with pytest.raises(StoneyError, match="no hook is called"):
        llama.gradients(random_batch(), torch.sum, at=["blocks.0.hook_z"])
    with pytest.raises(StoneyError, match="no hook is called"):
        llama.run(random_batch(), read=[lambda name: True])  # the bridge passes a filter by in silence
    for misspelt in ({"fwd_hook": []}, {"names_filter": None}, {"atention_mask": None}):
        with pytest.raises(TypeError):
            llama.run(random_batch(), **misspelt)


@pytest.mark.parametrize(
    "name", ["blocks.0.attn.hook_hidden_states", "rotary_emb.hook_out", "hook_pos_embed", "blocks.0.attn.hook_result"]
)
def test_a_hook_that_never_fires_is_refused(llama, name):
    assert name in llama.hooks
    for call in ({"read": [name]}, {"edit": {name: torch.zeros_like}}):
        with pytest.raises(StoneyError, match="not fire"):
            llama.run(random_batch(), **call)
    with pytest.raises(StoneyError, match="not fire"):
        llama.gradients(random_batch(), torch.sum, at=[name])


def test_rotated_queries_never_fire_on_phi3():
    phi3 = hook_model(tiny.model("phi3"), tiny.tokenizer())
    with pytest.raises(StoneyError, match="blocks.0.attn.hook_rot_q"):
        phi3.run(random_batch(), read=["blocks.0.attn.hook_rot_q"])


def test_an_edit_in_place_is_refused(llama):
    with pytest.raises(StoneyError, match="in place"):
        llama.run(random_batch(), edit={"blocks.1.hook_resid_pre": lambda residual: residual.zero_()})


def test_an_edit_leaves_what_was_read_before_it(llama):
    batch = random_batch()
    before = llama.run(batch, read=["blocks.0.hook_resid_post"])
    run = llama.run(
        batch, read=["blocks.0.hook_resid_post"], edit={"blocks.1.hook_resid_pre": lambda residual: residual * 0}
    )
    assert torch.equal(run["blocks.0.hook_resid_post"], before["blocks.0.hook_resid_post"])
    assert not torch.equal(run.logits, before.logits)


def test_what_is_read_at_an_edited_hook_is_the_edit(llama):
    run = llama.run(random_batch(), read=["blocks.0.attn.hook_z"], edit={"blocks.0.attn.hook_z": torch.zeros_like})
    assert run["blocks.0.attn.hook_z"].abs().max() == 0


@pytest.mark.parametrize("edit", [lambda value: None, lambda value: value[:, :1], lambda value: 0.0])
def test_an_edit_must_return_a_tensor_of_the_same_shape(llama, edit):
    with pytest.raises(StoneyError, match="must return a tensor of shape"):
        llama.run(random_batch(), edit={"blocks.0.hook_mlp_out": edit})


def test_an_edit_reaches_the_logits(hooked):
    """Zeroing what every block writes leaves the embedding: the logits of an empty model."""
    batch = random_batch()
    names = [f"blocks.{layer}.hook_{part}_out" for layer in range(2) for part in ("attn", "mlp")]
    run = hooked.run(batch, read=["blocks.0.hook_resid_pre"], edit=dict.fromkeys(names, torch.zeros_like))
    cap = hooked.bridge.cfg.output_logits_soft_cap
    expected = hooked.unembed(run["blocks.0.hook_resid_pre"])
    expected = cap * torch.tanh(expected / cap) if cap > 0 else expected
    assert (run.logits - expected).abs().max() < 1e-5


def test_nothing_stays_behind(llama):
    batch = random_batch()
    before = llama.run(batch).logits
    llama.run(batch, edit={"blocks.0.hook_mlp_out": torch.zeros_like})
    llama.gradients(batch, torch.sum, at=["blocks.0.hook_mlp_out"], edit={"blocks.0.attn.hook_z": torch.zeros_like})
    with pytest.raises(ZeroDivisionError):
        llama.run(batch, edit={"blocks.0.hook_mlp_out": lambda value: 1 / 0})
    with pytest.raises(StoneyError):
        llama.run(batch, edit={"blocks.0.hook_mlp_out": lambda value: None})
    assert torch.equal(llama.run(batch).logits, before)
    points = llama.bridge.hook_dict.values()
    assert not any(point.fwd_hooks or point.bwd_hooks for point in points)


def test_only_what_is_read_is_kept_and_it_can_be_reduced_at_once(llama):
    run = llama.run(random_batch(), read={"blocks.1.attn.hook_pattern": lambda pattern: pattern.sum(-1)})
    assert list(run.activations) == ["blocks.1.attn.hook_pattern"]
    assert run["blocks.1.attn.hook_pattern"].shape == (3, 4, 11)
    assert (run["blocks.1.attn.hook_pattern"] - 1).abs().max() < 1e-6
    assert not run.logits.requires_grad


def test_stopping_at_a_layer(llama):
    batch = random_batch()
    run = llama.run(batch, read=["blocks.0.hook_resid_post"], stop_at_layer=1)
    assert run.logits is None
    whole = llama.run(batch, read=["blocks.0.hook_resid_post"])
    assert torch.equal(run["blocks.0.hook_resid_post"], whole["blocks.0.hook_resid_post"])
    with pytest.raises(StoneyError, match="did not fire"):
        llama.run(batch, read=["blocks.1.hook_resid_post"], stop_at_layer=1)


# Weights in the orientation of the formulas: fixed in TransformerLens since 3.2, kept fixed here


@pytest.mark.parametrize("head_dim", [8, 6, 16])  # o_proj of 32 -> 32, 24 -> 32 and 64 -> 32
def test_heads_add_up_to_their_attention(head_dim):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim,
    )  # fmt: skip
    model = hook_model(LlamaForCausalLM(config).eval(), tiny.tokenizer())
    assert model.d_head == head_dim and model.W_O(0).shape == (4, head_dim, 32)
    run = model.run(random_batch(), read=["blocks.1.attn.hook_z", "blocks.1.hook_attn_out"])
    heads = torch.einsum("rphd,hdm->rpm", run["blocks.1.attn.hook_z"], model.W_O(1))
    assert (heads - run["blocks.1.hook_attn_out"]).abs().max() < 1e-6


def test_neurons_add_up_to_their_mlp_and_post_norm_models_say_that_theirs_do_not(hooked, architecture):
    run = hooked.run(random_batch(), read=["blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out"])
    difference = (run["blocks.0.mlp.hook_post"] @ hooked.W_out(0) - run["blocks.0.hook_mlp_out"]).abs().max()
    assert hooked.post_norm == (architecture in POST_NORM)
    assert (difference > 0.1) if hooked.post_norm else (difference < 1e-6)


def test_keys_and_values_have_their_own_heads(llama):
    names = ["blocks.0.attn.hook_q", "blocks.0.attn.hook_k", "blocks.0.attn.hook_v"]
    run = llama.run(random_batch(), read=names)
    assert [run[name].shape[2] for name in names] == [4, 2, 2] and llama.n_key_value_heads == 2


def test_the_final_norm_weight_is_the_factor_that_is_applied(hooked):
    with torch.no_grad():
        hooked.bridge.ln_final.weight.add_(0.1 * torch.arange(32))
    try:
        residual = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        sigma = (residual.pow(2).mean(-1, keepdim=True) + hooked.bridge.cfg.eps).sqrt()
        expected = (residual / sigma * hooked.final_norm_weight) @ hooked.W_U
        assert (hooked.unembed(residual) - expected).abs().max() < 1e-4
    finally:
        with torch.no_grad():
            hooked.bridge.ln_final.weight.sub_(0.1 * torch.arange(32))


# Gradients


def test_gradients_match_finite_differences(architecture):
    hooked = hook_model(tiny.model(architecture).double(), tiny.tokenizer())
    batch, name = random_batch(2, 6), "blocks.0.attn.hook_z"

    def metric(logits):
        return (logits[:, -1, 7] - logits[:, -1, 9]).sum()

    found = hooked.gradients(batch, metric, at=[name])
    plain = hooked.run(batch, read=[name])
    assert torch.equal(found.activations[name], plain[name]) and found.metric == metric(plain.logits)
    direction = torch.randn(plain[name].shape, generator=torch.Generator().manual_seed(0)).double()
    step = 1e-3  # softmax and norms round to float32 inside
    moved = [metric(hooked.run(batch, edit={name: lambda z, s=s: z + s * direction}).logits) for s in (step, -step)]
    numeric = (moved[0] - moved[1]) / (2 * step)
    assert abs(numeric - (found.gradients[name] * direction).sum()) < 2e-3 * abs(numeric)
    assert all(parameter.grad is None for parameter in hooked.bridge.parameters())


def test_a_gradient_is_taken_at_the_edited_activation(llama):
    batch, name = random_batch(), "blocks.0.hook_mlp_out"
    target = torch.ones(3, 11, 32)
    found = llama.gradients(batch, lambda logits: logits[:, -1].sum(), at=[name], edit={name: lambda value: target})
    assert torch.equal(found.activations[name], target)


def test_rows_have_gradients_of_their_own(llama):
    batch, name = random_batch(), "blocks.0.hook_resid_pre"
    together = llama.gradients(batch, lambda logits: logits[:, -1, 5].sum(), at=[name]).gradients[name]
    row = Batch(batch.ids[1:2], batch.mask[1:2])
    alone = llama.gradients(row, lambda logits: logits[:, -1, 5].sum(), at=[name]).gradients[name]
    assert (together[1] - alone[0]).abs().max() < 1e-6


def test_a_metric_that_does_not_depend_on_a_hook_is_refused(llama):
    with pytest.raises(StoneyError, match="does not depend"):
        llama.gradients(random_batch(), lambda logits: torch.ones(()), at=["blocks.0.hook_mlp_out"])


# The random twin


def test_a_random_model_has_the_shape_and_not_the_weights(hooked):
    generator = torch.random.get_rng_state()
    twin, again, other = random_hooked(hooked, 1), random_hooked(hooked, 1), random_hooked(hooked, 2)
    assert torch.equal(torch.random.get_rng_state(), generator)
    shape = ("n_layers", "n_heads", "n_key_value_heads", "d_model", "d_head", "d_mlp", "d_vocab", "post_norm")
    assert all(getattr(twin, name) == getattr(hooked, name) for name in shape)
    batch = random_batch()
    assert torch.equal(twin.run(batch).logits, again.run(batch).logits)
    assert not torch.equal(twin.run(batch).logits, other.run(batch).logits)
    assert not torch.equal(twin.run(batch).logits, hooked.run(batch).logits)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_logits_of_the_last_position_alone_are_those_of_the_whole_pass(architecture):
    model = hook_model(tiny.model(architecture), tiny.tokenizer())
    batch = left_padded([[5, 6, 7, 8], [9, 10]], 0)
    whole, last = model.run(batch).logits, model.run(batch, last=True).logits
    assert last.shape == (2, 1, 259)
    torch.testing.assert_close(last[:, 0], whole[:, -1])
