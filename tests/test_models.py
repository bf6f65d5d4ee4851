"""Finding and loading models: what is incomplete or absent is named, with the command that makes it."""

import json
import socket
import types

import pytest
import tiny

from stoney_rl import models
from stoney_rl.errors import StoneyError


def refusal(name, **options):
    with pytest.raises(StoneyError) as error:
        models.find_model(str(name), **options)
    return str(error.value)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("models") / "base", layers=1)


@pytest.fixture(scope="session")
def adapter(base):
    """A random LoRA adapter beside its base."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = tiny.model(layers=1)
    model.name_or_path = str(base)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    model.save_pretrained(base.parent / "adapter")
    return base.parent / "adapter"


@pytest.fixture
def folder(tmp_path):
    def make(name, **files):
        directory = tmp_path / name
        directory.mkdir()
        for file, text in files.items():
            (directory / file.replace("__", ".")).write_text(text)
        return directory

    return make


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# Names.


def test_the_unpublished_id_stands_for_the_published_one(no_network):
    name, notice = models.resolve_unpublished("deepseek-ai/DeepSeek-R1-Zero-7B")
    assert name == models.DEFAULT_MODEL == "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    assert (
        notice == "deepseek-ai/DeepSeek-R1-Zero-7B was never published; using deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
    )
    assert models.resolve_unpublished("deepseek-ai/DeepSeek-R1-Zero") == ("deepseek-ai/DeepSeek-R1-Zero", None)


# Folders.


def test_a_model_and_an_adapter_are_told_apart(base, adapter, no_network):
    assert models.find_model(str(base)) == models.ModelSource("model", str(base))
    assert models.find_model(str(adapter)) == models.ModelSource("adapter", str(adapter), base=str(base))


def test_an_adapter_keeps_its_base_s_revision(adapter, tmp_path):
    import shutil

    copy = shutil.copytree(adapter, tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "o/n", "revision": "v1"}))
    assert models.find_model(str(copy)) == models.ModelSource("adapter", str(copy), base="o/n", revision="v1")


def test_missing_files_are_named(folder):
    said = refusal(folder("stoney_lora_merged", config__json="{}"))
    assert "not a complete checkpoint directory, model.safetensors, tokenizer.json missing" in said
    assert said.endswith("make it with: python train_lora.py")
    assert "config.json, model.safetensors, tokenizer.json missing" in refusal(folder("empty"))
    weights = folder("weights", model__safetensors="", tokenizer__json="{}")
    assert "config.json missing" in refusal(weights)


def test_missing_shards_are_counted(folder):
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    files = {"config__json": "{}", "tokenizer__json": "{}", "model__safetensors__index__json": index}
    said = refusal(folder("sharded", **files, **{"model-1__safetensors": ""}))
    assert "1 of 2 weight shards missing, such as model-2.safetensors" in said
    said = refusal(folder("broken", **files | {"model__safetensors__index__json": "{"}))
    assert "not a readable shard index" in said


def test_broken_adapters_are_named(folder):
    assert "without adapter_model.safetensors" in refusal(folder("a", adapter_config__json="{}"))
    files = {"adapter_model__safetensors": ""}
    assert "names no base model" in refusal(folder("b", adapter_config__json="{}", **files))
    assert "names no base model" in refusal(folder("c", adapter_config__json="{", **files))
    empty = json.dumps({"base_model_name_or_path": None})
    assert "base_model_name_or_path is empty" in refusal(folder("d", adapter_config__json=empty, **files))


def test_a_folder_has_no_revisions(base):
    assert refusal(base, revision="v1").endswith(f"'v1' was given, but {base} is local; leave the revision out")


def test_files_are_not_checkpoints(folder):
    directory = folder("files", model__gguf="", rows__jsonl="")
    gguf = directory / "model.gguf"
    assert refusal(gguf).endswith(f"python prepare_base_model.py --source {gguf}")
    assert "expected a checkpoint directory or a hub id" in refusal(directory / "rows.jsonl")


def test_an_absent_path_names_what_is_near_and_what_makes_it(folder, monkeypatch, no_network):
    here = folder("stoney_lora_marged").parent
    monkeypatch.chdir(here)
    assert refusal("stoney_lora_merged") == (
        "stoney_lora_merged: no such checkpoint directory (did you mean stoney_lora_marged?); "
        "make it with: python train_lora.py"
    )
    said = refusal(here / "stoney_lora_merge")
    assert f"did you mean {here / 'stoney_lora_marged'}?" in said
    assert refusal("checkpoints/smollm2-135m").endswith("make it with: python prepare_base_model.py")
    folder("run_ckpt.partial")
    assert "run_ckpt.partial holds an unfinished run: finish it with --resume" in refusal("run_ckpt")
    assert refusal("nothing-like-it") == "nothing-like-it: no such checkpoint directory"


# The hub, which is never there in a test.


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Sets what the hub answers."""
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def answer(result):
        def model_info(self, name, **options):
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(HfApi, "model_info", model_info)

    return answer


def hub_error(kind, status):
    import httpx2
    from huggingface_hub import errors

    response = httpx2.Response(status, request=httpx2.Request("GET", "https://hub.invalid"))
    return getattr(errors, kind)("told", response=response)


def test_a_hub_id_is_asked_for_and_its_revision_kept(hub):
    hub(types.SimpleNamespace(gated=False))
    source = models.find_model("owner/name", revision="v1")
    assert source == models.ModelSource("hub", "owner/name", revision="v1")


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [
        ("GatedRepoError", 403, "gated; accept its terms"),
        ("RepositoryNotFoundError", 401, "no such public model on the hub"),
        ("RevisionNotFoundError", 404, "no revision 'v1'"),
        ("HfHubHTTPError", 500, "the hub does not answer"),
    ],
)
def test_the_hub_s_refusals(hub, kind, status, said):
    hub(hub_error(kind, status))
    assert said in refusal("owner/name", revision="v1")


def test_no_network_says_what_to_do(hub):
    hub(OSError("unreachable"))
    said = refusal("owner/name")
    assert "the hub does not answer (OSError)" in said and "python prepare_base_model.py" in said


def test_offline_asks_nobody(hub, monkeypatch, no_network):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal("owner/name")


# Loading.


def test_load_tokenizer_prefers_the_adapter_s_own(base, adapter):
    assert models.load_tokenizer(models.find_model(str(adapter))).chat_template == tiny.CHATML
    with pytest.raises(StoneyError, match="its tokenizer cannot be loaded"):
        models.load_tokenizer(models.ModelSource("model", str(base.parent)))


def test_load_model_gives_what_was_saved(base):
    import torch

    loaded = models.load_model(models.find_model(str(base)), torch.float32)
    expected = tiny.model(layers=1).state_dict()
    assert not loaded.training and loaded.dtype == torch.float32
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert models.load_model(models.find_model(str(base)), torch.bfloat16).dtype == torch.bfloat16


def test_an_adapter_is_loaded_on_its_base(adapter):
    import torch
    from peft import PeftModel

    loaded = models.load_model(models.find_model(str(adapter)), torch.float32)
    ids = torch.arange(8)[None]
    assert isinstance(loaded, PeftModel) and not loaded.training
    assert not torch.allclose(loaded(ids).logits, tiny.model(layers=1)(ids).logits, atol=1e-3)


def test_damaged_weights_are_refused(base, tmp_path):
    import shutil

    import torch

    copy = shutil.copytree(base, tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(StoneyError, match="copy: the model cannot be loaded"):
        models.load_model(models.find_model(str(copy)), torch.float32)


def test_an_adapter_on_another_base_is_refused(adapter, tmp_path):
    import torch

    wide = tiny.checkpoint(tmp_path / "wide", layers=1, width=64)
    source = models.ModelSource("adapter", str(adapter), base=str(wide))
    with pytest.raises(StoneyError, match="adapter: does not fit its base .*wide"):
        models.load_model(source, torch.float32)


# Precision, on a CPU.


@pytest.fixture
def cpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def has_bf16(answer):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: answer)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512" if answer else "AVX2")

    return has_bf16


@pytest.mark.parametrize(
    ("dtype", "bf16", "autocast"),
    [("auto", True, "bf16"), ("auto", False, None), ("fp32", True, None), ("bf16", False, "bf16")],
)
def test_precision_on_a_cpu(cpu, dtype, bf16, autocast):
    import torch

    cpu(bf16)
    assert models.choose_precision(dtype) == models.Precision(torch.float32, autocast)
    assert str(models.Precision(torch.float32, autocast)) == f"weights float32, matrix products {autocast or 'fp32'}"


@pytest.mark.parametrize("dtype", ["fp16"])
def test_fp16_needs_a_gpu(cpu, dtype):
    cpu(True)
    with pytest.raises(StoneyError, match="--dtype fp16: needs a GPU"):
        models.choose_precision(dtype)


@pytest.mark.parametrize(
    ("dtype", "bf16", "weights", "autocast"),
    [
        ("auto", True, "bfloat16", "bf16"),
        ("auto", False, "float16", "fp16"),
        ("fp32", True, "float32", None),
        ("fp16", True, "float16", "fp16"),
    ],
)
def test_precision_on_a_gpu(monkeypatch, dtype, bf16, weights, autocast):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    assert models.choose_precision(dtype) == models.Precision(getattr(torch, weights), autocast)
    expected = {"auto": torch.bfloat16 if bf16 else torch.float16, "fp32": torch.float32, "fp16": torch.float16}
    assert models.inference_dtype(dtype) == expected[dtype]


def test_4bit_without_bitsandbytes_is_refused(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StoneyError, match="bitsandbytes is not installed"):
        models.check_4bit()
