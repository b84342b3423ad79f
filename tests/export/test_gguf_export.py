"""GGUF files hold the trits, the scales and the tokenizer; what llama.cpp would compute otherwise is refused."""

import os
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tokenkit.config import UserError
from tokenkit.export.gguf_file import export_gguf
from tokenkit.export.gguf_names import interleaved, llama3_factors
from tokenkit.export.gguf_tokenizer import gguf_vocabulary
from tokenkit.export.verify import ExportError
from tokenkit.models.bitlinear import ternary_layers
from tokenkit.models.ternary import TernaryConfig, attach_ternary
from tokenkit.tokenizers.formats import read_format
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.load import load_tokenizer

WIDE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 352}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": ("llama", "none", {"attention_bias": True, "rope_parameters": LLAMA3}),
    "qwen2": ("qwen2", "none", {"tie_word_embeddings": True}),
    "bitnet": ("llama", "o_down", {"tie_word_embeddings": True}),
}


def read(path: Path) -> tuple[dict[str, object], dict[str, gguf.ReaderTensor]]:
    """Keys and tensors, by the reference reader."""
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


def numbers(tensor: gguf.ReaderTensor) -> np.ndarray:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
@pytest.mark.parametrize("arch", MODELS)
def test_ternary_blocks_are_the_trits_times_the_scale_in_float16(ternary_model, bpe, tmp_path, arch, kind):
    family, sub_norm, options = MODELS[arch]
    model = ternary_model(family, sub_norm, **WIDE, **options)
    figures = export_gguf(model, bpe, tmp_path / "x.gguf", type=kind)
    keys, tensors = read(tmp_path / "x.gguf")
    assert figures["architecture"] == keys["general.architecture"] == arch
    for ours, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        for block in range(2):
            trits, gamma = ternary_layers(model)[f"model.layers.{block}.{ours}"].trits()
            tensor = tensors[f"blk.{block}.{theirs}.weight"]
            assert tensor.tensor_type.name == kind.upper()
            wanted = trits.numpy() * np.float32(np.float16(gamma.item()))
            assert np.array_equal(numbers(tensor), wanted)
    weights = sum(layer.weight.numel() for layer in ternary_layers(model).values())
    assert figures["ternary_bytes"] * 8 / weights == (1.6875 if kind == "tq1_0" else 2.0625)
    assert tensors["token_embd.weight"].tensor_type.name == "Q8_0"
    assert ("output.weight" in tensors) is not options.get("tie_word_embeddings", False)
    assert (keys[f"{arch}.block_count"], keys[f"{arch}.attention.head_count_kv"]) == (2, 2)
    assert keys[f"{arch}.rope.freq_base"] == 10000.0
    assert keys[f"{arch}.attention.layer_norm_rms_epsilon"] == np.float32(1e-6)


@pytest.mark.parametrize(("kind", "error"), [("f32", 0), ("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 2**-7)])
def test_other_types_hold_dense_and_ternary_models(dense_model, ternary_model, bpe, tmp_path, kind, error):
    for name, model in (("dense", dense_model("qwen2", **WIDE)), ("ternary", ternary_model("qwen2", **WIDE))):
        export_gguf(model, bpe, tmp_path / f"{name}.gguf", type=kind)
        _, tensors = read(tmp_path / f"{name}.gguf")
        weight = model.get_submodule("model.layers.1.mlp.up_proj").weight.detach()
        if name == "ternary":
            trits, gamma = ternary_layers(model)["model.layers.1.mlp.up_proj"].trits()
            weight = trits * gamma
        tensor = tensors["blk.1.ffn_up.weight"]
        assert tensor.tensor_type.name == kind.upper()
        assert np.abs(numbers(tensor) - weight.numpy()).max() <= error * weight.abs().max().item()
        assert tensors["output_norm.weight"].tensor_type.name == "F32"
        embeddings = model.get_input_embeddings().weight.detach().numpy()
        assert np.abs(numbers(tensors["token_embd.weight"]) - embeddings).max() <= error * np.abs(embeddings).max()


def test_without_8_bit_activations_too(dense_model, bpe, tmp_path):
    model = dense_model()
    attach_ternary(model, TernaryConfig(sub_norm="none", activation_bits=None))
    assert export_gguf(model, bpe, tmp_path / "x.gguf", type="f16")["architecture"] == "llama"


def test_rows_of_queries_are_put_where_llama_cpp_turns_neighbours(ternary_model, bpe, tmp_path):
    """Turning the halves of a head, then interleaving, is interleaving, then turning neighbours."""
    generator = torch.Generator().manual_seed(0)
    x, angles = torch.randn(2 * 8, generator=generator), torch.randn(4, generator=generator)
    numbers_of = torch.polar(torch.ones(4), angles)  # a turn is a product of complex numbers
    halves, pairs = x.view(2, 2, 4), interleaved(x, 2).view(2, 4, 2)
    turned = torch.complex(halves[:, 0], halves[:, 1]) * numbers_of
    again = torch.complex(pairs[..., 0], pairs[..., 1]) * numbers_of
    by_halves = torch.stack([turned.real, turned.imag], 1).flatten()
    torch.testing.assert_close(torch.view_as_real(again).flatten(), interleaved(by_halves, 2))
    model = ternary_model("llama", attention_bias=True, **WIDE)
    export_gguf(model, bpe, tmp_path / "x.gguf", type="f32")
    _, tensors = read(tmp_path / "x.gguf")
    layer = ternary_layers(model)["model.layers.0.self_attn.k_proj"]
    trits, gamma = layer.trits()
    order = [head * 64 + half * 32 + i for head in range(2) for i in range(32) for half in range(2)]
    assert np.array_equal(numbers(tensors["blk.0.attn_k.weight"]), (trits * gamma).numpy()[order])
    assert np.array_equal(numbers(tensors["blk.0.attn_k.bias"]), layer.bias.detach().numpy()[order])


def test_llama3_factors_are_those_of_transformers():
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, rope_parameters=LLAMA3)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(plain / llama3_factors(LLAMA3, 64), wanted)
    assert len(set(llama3_factors(LLAMA3, 64).tolist())) > 3


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_our_own_reader_gets_the_tokenizer_back(request, dense_model, tmp_path, documents, name):
    tokenizer = request.getfixturevalue(name)
    figures = export_gguf(dense_model(vocab_size=400), tokenizer, tmp_path / "x.gguf", type="f16")
    keys, _ = read(tmp_path / "x.gguf")
    assert keys["tokenizer.ggml.model"] == {"bpe": "gpt2", "unigram": "t5"}[name]
    assert keys["tokenizer.ggml.bos_token_id"] == tokenizer.start_id()
    assert keys["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id
    assert keys["tokenizer.ggml.add_bos_token"] is True
    types = keys["tokenizer.ggml.token_type"]
    assert len(types) == len(keys["tokenizer.ggml.tokens"]) == 400
    assert types[tokenizer.eos_id] == 3
    assert set(types[tokenizer.vocab_size :]) == {5}
    assert bool(figures["notes"]) is (name == "unigram")
    again = HFTokenizer(*read_format(tmp_path / "x.gguf", None), "again")
    for text in [*documents[:5], "Größe 日本 12345\n\n  x"]:
        assert again.encode(text).ids.tolist() == tokenizer.encode(text).ids.tolist()


def test_a_chat_template_travels(dense_model, bpe, tmp_path):
    chat = HFTokenizer(bpe.definition, {**bpe.config, "chat_template": "{{ messages }}"}, "chat")
    export_gguf(dense_model(), chat, tmp_path / "x.gguf", type="f16")
    assert read(tmp_path / "x.gguf")[0]["tokenizer.chat_template"] == "{{ messages }}"


def test_a_regular_expression_in_other_words_is_known_by_what_it_cuts(bpe):
    definition = bpe.definition
    split = definition["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"\p{N}{1,3}", r"\p{N}\p{N}?\p{N}?")
    assert gguf_vocabulary(HFTokenizer(definition, bpe.config), 320).pre == "dbrx"
    split["pattern"]["Regex"] = r"\S+|\s+"
    with pytest.raises(UserError, match=r"cuts text by a rule that is none of llama\.cpp's"):
        gguf_vocabulary(HFTokenizer(definition, bpe.config), 320)


def test_rows_that_cannot_be_cut_into_blocks_stay_f16_and_are_counted(dense_model, bpe, tmp_path):
    figures = export_gguf(dense_model(intermediate_size=40), bpe, tmp_path / "x.gguf", type="q8_0")
    _, tensors = read(tmp_path / "x.gguf")
    assert tensors["blk.0.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.F16
    assert tensors["blk.0.ffn_up.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert figures["notes"] == ["f16, as their rows do not divide by 32: 2 matrices"]


def test_bytes_have_a_merge_that_never_applies(dense_model, tmp_path):
    tokenizer = load_tokenizer("byte")
    figures = export_gguf(dense_model(), tokenizer, tmp_path / "x.gguf", type="f32")
    assert (figures["tokenizer"], figures["pre"]) == ("gpt2", "gpt-2")
    again = HFTokenizer(*read_format(tmp_path / "x.gguf", None), "x")
    for text in ("\x00\x00a", "naïve 日本 🙂", "␀␀ ␀"):
        assert again.encode(text).ids.tolist() == list(text.encode())


def test_a_learned_tokenizer_is_refused_in_its_own_words(dense_model, compact_folder, tmp_path):
    tokenizer = load_tokenizer(str(compact_folder))
    with pytest.raises(UserError, match="a Unigram tokenizer over bytes; GGUF has Unigrams of characters"):
        export_gguf(dense_model(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "x.gguf", type="f32")


def test_matrices_of_gpt2_are_turned_and_qwen3_keeps_its_norms(dense_model, bpe, tmp_path):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 320, "tie_word_embeddings": True}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=bpe.bos_id, eos_token_id=bpe.eos_id))
    export_gguf(gpt2, bpe, tmp_path / "gpt2.gguf", type="f32")
    keys, tensors = read(tmp_path / "gpt2.gguf")
    turned = gpt2.transformer.h[1].attn.c_attn.weight.detach().numpy().T
    assert np.array_equal(numbers(tensors["blk.1.attn_qkv.weight"]), turned)
    assert keys["gpt2.feed_forward_length"] == 128
    assert keys["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert not [name for name in keys if "rope" in name]
    qwen3 = dense_model("qwen3", head_dim=16)
    assert export_gguf(qwen3, bpe, tmp_path / "qwen3.gguf", type="f16")["architecture"] == "qwen3"
    keys, tensors = read(tmp_path / "qwen3.gguf")
    assert keys["qwen3.attention.key_length"] == 16
    found = numbers(tensors["blk.0.attn_q.weight"])
    assert np.allclose(found, qwen3.model.layers[0].self_attn.q_proj.weight.detach().numpy(), atol=1e-3)
    assert "blk.1.attn_k_norm.weight" in tensors


def test_mistakes_are_one_line_each(dense_model, ternary_model, bpe, tmp_path):
    path = tmp_path / "x.gguf"
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    cases = [
        (dense_model(), {"type": "tq2_0"}, "trained ternary; write type=q8_0, or force_ptq=true"),
        (
            ternary_model(),
            {"type": "tq2_0"},
            r"attn_q\.weight: rows of 32, and tq2_0 needs a multiple of 256",
        ),
        (ternary_model("llama", "every"), {"type": "f16"}, "norm inside every ternary layer"),
        (ternary_model("llama", "o_down"), {"type": "f16"}, "output head of its own"),
        (ternary_model("qwen2", "o_down", tie_word_embeddings=True), {"type": "f16"}, "attention biases"),
        (dense_model(hidden_act="gelu"), {"type": "f16"}, "hidden_act gelu"),
        (dense_model(rope_parameters=dynamic), {"type": "f16"}, "dynamic"),
    ]
    for model, options, message in cases:
        with pytest.raises(UserError, match=message):
            export_gguf(model, bpe, path, **options)
    with pytest.raises(UserError, match=r"ends in \.gguf"):
        export_gguf(dense_model(), bpe, tmp_path / "x", type="f16")
    path.touch()
    with pytest.raises(UserError, match="exists already"):
        export_gguf(dense_model(), bpe, path, type="f16")
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]
    assert path.stat().st_size == 0


def test_a_file_that_reads_differently_is_refused(dense_model, bpe, tmp_path, monkeypatch):
    encoded = gguf.quants.quantize
    monkeypatch.setattr("gguf.quants.quantize", lambda data, kind: encoded(data * 1.01, kind))
    with pytest.raises(ExportError, match="is not the same after reading it again"):
        export_gguf(dense_model(), bpe, tmp_path / "x.gguf", type="q8_0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama2", "llama3", "qwen2", "smollm2", "mistral_tekken", "t5_small"])
def test_real_tokenizers_are_read_back(dense_model, shared, tmp_path, name):
    tokenizer = load_tokenizer(str(shared / "data/tokenizers" / name))
    model = dense_model(vocab_size=tokenizer.vocab_size, num_hidden_layers=1)
    assert export_gguf(model, tokenizer, tmp_path / "x.gguf", type="f16")["texts"] >= 8


@pytest.mark.slow
def test_llama_cpp_answers_as_training_did(tmp_path):
    """Needs node and the folder in which `npm install node-llama-cpp` was run, in TOKENKIT_NODE_LLAMA_CPP."""
    if "TOKENKIT_NODE_LLAMA_CPP" not in os.environ:
        pytest.skip("no TOKENKIT_NODE_LLAMA_CPP (a folder with node_modules/node-llama-cpp)")
    script = Path(__file__).parents[2] / "benchmarks/ternary_llama_cpp.py"
    command = [os.sys.executable, str(script), "--steps", "40", "--generated", "0", "--check"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
