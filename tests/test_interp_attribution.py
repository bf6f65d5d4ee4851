"""Direct logit attribution: the parts sum to the whole, in every architecture, and to what TransformerLens finds."""

import functools

import pytest
import tiny
import torch

from stoney_rl.errors import StoneyError
from stoney_rl.interp import attribution
from stoney_rl.interp.hooked import HookedModel, hook_model, left_padded

TOLERANCE = 1e-4  # of the largest logit difference, attention or MLP of the batch
POST_NORM = ("gemma2", "gemma3")
PLAIN = [architecture for architecture in tiny.ARCHITECTURES if architecture not in POST_NORM]
ROWS = [[5, 6, 7, 8, 9, 250], [17, 30], [201, 77, 41, 11]]  # of three lengths: two are padded
ANSWER, WRONG = torch.tensor([11, 12, 13]), torch.tensor([100, 101, 42])


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Norm weights and biases as no initialisation leaves them, so that dropping one is seen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model


def llama(**options: object) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def biased() -> torch.nn.Module:
    """Biases wherever the architecture allows one, and behind the unembedding."""
    model = llama(attention_bias=True, mlp_bias=True)
    model.lm_head = torch.nn.Linear(32, 259)
    return model


MODELS = {
    **{name: functools.partial(tiny.model, name) for name in tiny.ARCHITECTURES},
    "tied": lambda: llama(tie_word_embeddings=True),
    "untied": lambda: llama(tie_word_embeddings=False),
    "rectangular o_proj": lambda: llama(head_dim=12),
    "large eps": lambda: llama(rms_norm_eps=0.5),
    "biases": biased,
}


@functools.cache
def opened(name: str) -> HookedModel:
    return hook_model(randomized(MODELS[name]()), tiny.tokenizer(), name)


@pytest.fixture
def batch():
    return left_padded(ROWS, 0)


@pytest.mark.parametrize("name", MODELS)
def test_components_sum_to_the_models_own_logit_difference(name, batch):
    model = opened(name)
    parts = attribution.component_attribution(model, batch, ANSWER, WRONG)
    expected = _uncapped_logits(model, batch)
    rows = torch.arange(len(ROWS))
    expected = expected[rows, ANSWER] - expected[rows, WRONG]
    scale = float(expected.abs().max())
    assert scale > 1e-3  # the sum of nothing would fit a difference of nothing
    assert torch.allclose(parts.difference, expected, atol=TOLERANCE * scale, rtol=0)
    assert torch.allclose(parts.total, expected, atol=TOLERANCE * scale, rtol=0)
    assert parts.attention.shape == parts.mlp.shape == (3, 2)
    assert parts.bias.abs().max() > 0.01 if name == "biases" else not parts.bias.any()


def _uncapped_logits(model: HookedModel, batch) -> torch.Tensor:
    """The model's logits at the last position, [row, vocabulary]; Gemma 2's soft cap c tanh(x / c) is undone."""
    logits = model.run(batch).logits[:, -1]
    return 30 * torch.atanh(logits / 30) if model.name == "gemma2" else logits


@pytest.mark.parametrize("name", [name for name in MODELS if name not in POST_NORM])
def test_heads_sum_to_their_attention_and_neurons_to_their_mlp(name, batch):
    model = opened(name)
    parts = attribution.component_attribution(model, batch, ANSWER, WRONG)
    heads = attribution.head_attribution(model, batch, ANSWER, WRONG)
    neurons = attribution.neuron_attribution(model, batch, ANSWER, WRONG)
    assert heads.shape == (3, 2, 4)
    assert neurons.shape == (3, 2, 64)
    if name == "biases":
        direction = attribution._direction(model, batch, ANSWER, WRONG) / parts.sigma[:, None]
        heads = heads.sum(-1) + torch.stack([direction @ block.attn.b_O for block in model.bridge.blocks], 1)
        neurons = neurons.sum(-1) + torch.stack([direction @ block.mlp.b_out for block in model.bridge.blocks], 1)
    else:
        heads, neurons = heads.sum(-1), neurons.sum(-1)
    assert torch.allclose(heads, parts.attention, rtol=0, atol=TOLERANCE * float(parts.attention.abs().max()))
    assert torch.allclose(neurons, parts.mlp, rtol=0, atol=TOLERANCE * float(parts.mlp.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_completeness_is_small_in_every_architecture(name, batch):
    found = attribution.completeness(opened(name), batch, ANSWER, WRONG)
    assert found.components < TOLERANCE
    if name in POST_NORM:
        assert found.heads is None
        assert found.neurons is None
    else:
        assert max(found.heads, found.neurons) < TOLERANCE


@pytest.mark.parametrize("hook", ["hook_attn_out", "attn.hook_z", "mlp.hook_post"])
def test_completeness_sees_a_part_that_is_not_what_the_layer_wrote(hook, batch, monkeypatch):
    """What is read is not what the model computed with: each of the three errors has something to measure."""
    model = opened("llama")
    honest = model.run

    def run(batch, *, read):
        name = f"blocks.1.{hook}"
        changed = {name: lambda found: read[name](1.01 * found)} if name in read else {}
        return honest(batch, read={**read, **changed})

    monkeypatch.setattr(model, "run", run)
    found = attribution.completeness(model, batch, ANSWER, WRONG)
    error = {"hook_attn_out": found.components, "attn.hook_z": found.heads, "mlp.hook_post": found.neurons}[hook]
    assert error > 10 * TOLERANCE


@pytest.mark.parametrize("name", [*PLAIN, "untied", "rectangular o_proj", "large eps"])
def test_transformer_lens_finds_the_same_on_folded_weights(name):
    """direct_logit_attribution on a model whose final norm was folded into W_U, one row at a time."""
    from transformer_lens.tools.analysis import direct_logit_attribution

    folded = hook_model(randomized(MODELS[name]()), tiny.tokenizer(), name).bridge
    folded.enable_compatibility_mode(
        disable_warnings=True, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    for row, answer, wrong in zip(ROWS, ANSWER.tolist(), WRONG.tolist(), strict=True):
        batch, ids = left_padded([row], 0), (torch.tensor([answer]), torch.tensor([wrong]))
        parts = attribution.component_attribution(opened(name), batch, *ids)
        heads = attribution.head_attribution(opened(name), batch, *ids)
        by_component = direct_logit_attribution(folded, batch.ids, answer, wrong, unit="component")
        by_head = direct_logit_attribution(folded, batch.ids, answer, wrong, unit="head")
        theirs = dict(zip(by_component.labels, by_component.attribution[:, 0], strict=True))
        theirs |= dict(zip(by_head.labels, by_head.attribution[:, 0], strict=True))
        ours = {"embed": parts.embedding[0]}
        for layer in range(2):
            ours |= {f"{layer}_attn_out": parts.attention[0, layer], f"{layer}_mlp_out": parts.mlp[0, layer]}
            ours |= {f"L{layer}H{head}": heads[0, layer, head] for head in range(4)}
        scale = max(abs(float(value)) for value in ours.values())
        for label, value in ours.items():
            assert float(theirs[label].detach()) == pytest.approx(float(value), abs=TOLERANCE * scale), label


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma"])
def test_a_padded_batch_gives_what_each_row_gives_alone(name, batch):
    model = opened(name)
    together = _everything(model, batch, ANSWER, WRONG)
    for index, row in enumerate(ROWS):
        alone = _everything(model, left_padded([row], 0), ANSWER[index : index + 1], WRONG[index : index + 1])
        for ours, theirs in zip(together, alone, strict=True):
            assert torch.allclose(ours[index], theirs[0], atol=1e-5)


def _everything(model, batch, answer, wrong) -> list[torch.Tensor]:
    parts = attribution.component_attribution(model, batch, answer, wrong)
    heads = attribution.head_attribution(model, batch, answer, wrong)
    return [*vars(parts).values(), heads, attribution.neuron_attribution(model, batch, answer, wrong)]


def test_sigma_is_the_root_mean_square_with_the_models_eps(batch):
    model = opened("large eps")
    residual = model.run(batch, read=["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"][:, -1]
    sigma = (residual.pow(2).mean(-1) + 0.5).sqrt()
    assert torch.allclose(attribution.component_attribution(model, batch, ANSWER, WRONG).sigma, sigma, atol=1e-6)


def test_attribution_worked_out_by_hand(batch):
    """One head and one neuron are made to write a known vector; everything else writes nothing.

    Direction: norm weight 2 at coordinate 0 times W_U[0, answer] - W_U[0, wrong] = 3 - 1: 4 per unit of coordinate 0.
    Embedding: 1 at coordinate 1 for every token. Attention: the value of each token is 1 at coordinate 0 of key-value
    head 1 (whatever is attended to), and o_proj takes it from query head 3 to 0.5 at coordinate 0.
    """
    source = llama(tie_word_embeddings=False)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.zero_()
        source.model.embed_tokens.weight[:, 1] = 1.0
        source.model.layers[0].input_layernorm.weight.fill_(1.0)
        # After the norm, coordinate 1 is 1 / sqrt(1 / 32).
        source.model.layers[0].self_attn.v_proj.weight[8, 1] = (1 / 32) ** 0.5
        source.model.layers[0].self_attn.o_proj.weight[0, 3 * 8] = 0.5
        source.model.norm.weight[0] = 2.0
        source.lm_head.weight[ANSWER, 0] = 3.0
        source.lm_head.weight[WRONG, 0] = 1.0
    model = hook_model(source, tiny.tokenizer())
    sigma = ((1 + 0.5**2) / 32) ** 0.5
    expected = torch.zeros(3, 2, 4)
    expected[:, 0, 3] = 0.5 * 4 / sigma
    assert torch.allclose(attribution.head_attribution(model, batch, ANSWER, WRONG), expected, rtol=1e-4)
    parts = attribution.component_attribution(model, batch, ANSWER, WRONG)
    assert torch.allclose(parts.difference, expected.sum((1, 2)), rtol=1e-4)
    assert not parts.embedding.any()
    assert not parts.mlp.any()


def test_chosen_layers_of_neurons_are_those_of_all(batch):
    model = opened("llama")
    every = attribution.neuron_attribution(model, batch, ANSWER, WRONG)
    assert torch.equal(attribution.neuron_attribution(model, batch, ANSWER, WRONG, [1]), every[:, 1:])
    for layers in ([2], [-1], []):
        with pytest.raises(StoneyError, match=r"0\.\.1"):
            attribution.neuron_attribution(model, batch, ANSWER, WRONG, layers)


@pytest.mark.parametrize("name", POST_NORM)
@pytest.mark.parametrize("measure", [attribution.head_attribution, attribution.neuron_attribution])
def test_heads_and_neurons_of_post_norm_models_are_refused(name, measure, batch):
    with pytest.raises(StoneyError, match="use component_attribution") as refusal:
        measure(opened(name), batch, ANSWER, WRONG)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("answer", "wrong", "complaint"),
    [
        (torch.tensor([1, 2]), WRONG, "answer: expected one token id below 259 for each of 3 rows"),
        (ANSWER, torch.tensor([1, 2, 259]), "wrong: expected"),
        (torch.tensor([1, 2, -1]), WRONG, "answer: expected"),
    ],
)
def test_ids_that_fit_neither_batch_nor_vocabulary_are_refused(answer, wrong, complaint, batch):
    with pytest.raises(StoneyError, match=complaint):
        attribution.component_attribution(opened("llama"), batch, answer, wrong)


def test_a_model_with_layer_norms_is_refused(batch):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt2", vocab_size=259, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    model = hook_model(AutoModelForCausalLM.from_config(config), tiny.tokenizer(), "gpt2")
    with pytest.raises(StoneyError, match="RMS norms"):
        attribution.component_attribution(model, batch, ANSWER, WRONG)
