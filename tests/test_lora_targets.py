"""'all-linear' is every linear layer but the LM head, and merging the adapter changes nothing."""

import shutil

import pytest
import tiny

from stoney_rl import checkpoints, corpus, models

SEPARATE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FUSED = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
# By hand, from each architecture's paper or code: attention and feed-forward; norms and embeddings are not linear.
EXPECTED = {
    "llama": SEPARATE,
    "qwen2": SEPARATE,
    "qwen3": SEPARATE,
    "mistral": SEPARATE,
    "phi3": FUSED,
    "gemma": SEPARATE,
    "gemma2": SEPARATE,
    "gemma3": SEPARATE,
}
LAYERS = 2
EMBEDDINGS = ("lm_head.weight", "model.embed_tokens.weight")


def build(architecture, tied):
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny.model(architecture, layers=LAYERS).config
    config.tie_word_embeddings = tied
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def adapted(model, **options):
    """``model`` with a random adapter, every matrix nonzero."""
    import torch
    from peft import LoraConfig, get_peft_model

    options = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, "init_lora_weights": False} | options
    torch.manual_seed(2)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).eval()


def adapted_layers(model):
    return {name.removesuffix(".lora_A.default") for name, _ in model.base_model.model.named_modules() if
            name.endswith(".lora_A.default")}  # fmt: skip


def test_every_tiny_architecture_is_listed():
    assert set(EXPECTED) == set(tiny.ARCHITECTURES)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", EXPECTED)
def test_all_linear_and_nothing_else(architecture, tied):
    model = build(architecture, tied)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    layers = adapted_layers(adapted(model))
    expected = {
        f"model.layers.{layer}.{'self_attn' if name in {'q_proj', 'k_proj', 'v_proj', 'o_proj', 'qkv_proj'} else 'mlp'}.{name}"
        for layer in range(LAYERS)
        for name in EXPECTED[architecture]
    }
    assert layers == expected


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", EXPECTED)
def test_merged_equals_adapter(architecture, tied, tmp_path):
    merged_equals_adapter(tmp_path, build(architecture, tied))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"target_modules": ["q_proj"]}], ids=str)
def test_merged_equals_adapter_of_another_kind(options, tmp_path):
    merged_equals_adapter(tmp_path, build("llama", True), **options)


def merged_equals_adapter(tmp_path, model, **options):
    import torch

    from stoney_rl import training

    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    model.save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.name_or_path = str(base)
    model = adapted(model, **options)
    model.save_pretrained(adapter)
    tiny.tokenizer().save_pretrained(adapter)
    checkpoints.write_json(adapter / corpus.SPLIT_FILE, {})
    training.check_saved_adapter(model, adapter)

    ids = torch.randint(0, 259, (3, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(ids).logits
        with model.disable_adapter():
            unadapted = model(ids).logits
    told = training.save_merged(adapter, merged, {"stage": "sft"}, dtype=torch.float32)
    assert 0 <= told <= 1e-5

    # In bf16 too, the files hold what was merged: save_merged compares the logits bit by bit.
    training.save_merged(adapter, tmp_path / "merged in bf16", {"stage": "sft"}, dtype=torch.bfloat16)

    shutil.move(adapter, tmp_path / "gone")  # merged stands alone
    shutil.move(base, tmp_path / "gone too")
    loaded = models.load_model(models.find_model(str(merged)), torch.float32)
    with torch.no_grad():
        logits = loaded(ids).logits
    scale = expected.abs().max().clamp(min=1)
    assert (logits - expected).abs().max() / scale < 1e-5
    assert (logits - unadapted).abs().max() > 0.01  # the adapter does something
    after = loaded.state_dict()
    assert after.keys() == before.keys()
    for name in EMBEDDINGS:
        assert torch.equal(after[name], before[name])
    assert (
        checkpoints.check_fingerprint(merged, loaded)["sha256"]
        == checkpoints.read_stage(merged)["fingerprint"]["sha256"]
    )
