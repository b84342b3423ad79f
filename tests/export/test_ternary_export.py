"""Packed ternary folders answer in stock transformers as the training forward does; golden bytes; what is refused."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tokenkit.config import UserError
from tokenkit.export.forced import forced_ternary
from tokenkit.export.huggingface import TEXTS
from tokenkit.export.ternary import export_latent, export_ternary
from tokenkit.export.ternary_layout import stock_layout
from tokenkit.export.ternary_verify import stored_tensors, verify_stock
from tokenkit.export.trits import pack_trits, unpack_trits
from tokenkit.export.unpacked import export_unpacked
from tokenkit.export.verify import ExportError, logits_of
from tokenkit.models.bitlinear import ternary_layers
from tokenkit.models.load import load_model
from tokenkit.models.ternary import TernaryConfig, attach_ternary, set_strength
from tokenkit.models.ternary_saved import reattach_ternary
from tokenkit.tokenizers.load import load_tokenizer

BYTE = load_tokenizer("byte")
EIGHT_ROWS = [[-1, 0, 1], [0, 1, -1], [1, 1, 0], [0, 0, 0], [1, -1, 0], [-1, -1, -1], [1, 1, 1], [0, 1, 0]]


def test_the_golden_bytes():
    four = torch.tensor([[1, 0, 0, -1], [1, 1, -1, 0], [-1, 0, 1, -1], [0, 0, -1, 1]], dtype=torch.int8)
    assert pack_trits(four, "x").tolist() == [[74, 89, 33, 132]]
    eight = torch.tensor(EIGHT_ROWS, dtype=torch.int8)
    assert pack_trits(eight, "x").tolist() == [[168, 137, 150], [69, 134, 68]]


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**31))
def test_packing_is_undone_and_leaves_its_input_alone(quarter, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    trits = torch.randint(-1, 2, (4 * quarter, columns), generator=generator, dtype=torch.int8)
    before = trits.clone()
    packed = pack_trits(trits, "x")
    assert (packed.shape, packed.dtype) == ((quarter, columns), torch.uint8)
    assert torch.equal(unpack_trits(packed), trits)
    assert torch.equal(trits, before)
    slow = sum((trits[r + i * quarter, 0].item() + 1) << (2 * i) for i in range(4) for r in [0])
    assert packed[0, 0].item() == slow


def test_rows_that_do_not_divide_by_four_name_their_layer():
    with pytest.raises(UserError, match=r"mlp\.up: 6 output features.*divisible by 4"):
        pack_trits(torch.zeros(6, 3, dtype=torch.int8), "mlp.up")


CASES = [
    ("llama", "none", {"tie_word_embeddings": True}, "llama"),
    ("llama", "o_down", {}, "bitnet"),
    ("llama", "every", {}, "llama"),
    ("qwen2", "none", {}, "qwen2"),
    ("qwen2", "o_down", {"tie_word_embeddings": True}, "bitnet"),
    ("qwen3", "every", {"head_dim": 16}, "qwen3"),
]


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
@pytest.mark.parametrize(("family", "sub_norm", "options", "model_type"), CASES)
def test_stock_transformers_answers_as_training_did(
    ternary_model, tmp_path, family, sub_norm, options, model_type, linear_class
):
    model = ternary_model(family, sub_norm, **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if family == "qwen2" and linear_class == "autobitlinear":
        with pytest.raises(UserError, match=r"q_proj: has a bias.*linear_class=bitlinear"):
            export_ternary(model, BYTE, tmp_path / "out", linear_class=linear_class)
        return
    figures = export_ternary(model, BYTE, tmp_path / "out", linear_class=linear_class, dtype=torch.float32)
    assert max(figures["typical_difference"], figures["layer_difference"]) <= 1e-6
    # 1e-4; elsewhere an activation lay between two of its 256 levels, and if it was one of bos, every row reads it
    assert figures["close_positions"] >= (0.95 if family != "qwen3" else 0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    settings = json.loads((tmp_path / "out/config.json").read_text())
    assert settings["model_type"] == figures["model_type"] == model_type
    assert settings["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    stored = dict(stored_tensors(tmp_path / "out"))
    assert ("lm_head.weight" in stored) is not options.get("tie_word_embeddings", False)
    for name, layer in ternary_layers(model).items():
        rows, columns = layer.weight.shape
        assert stored[f"{name}.weight"].nbytes == rows * columns // 4
        gamma = layer.trits()[1]
        wanted = 1 / gamma if linear_class == "bitlinear" else gamma
        assert stored[f"{name}.weight_scale"].tolist() == [wanted.item()]


def test_in_bfloat16_the_layout_is_still_compared_to_the_last_digits(ternary_model, tmp_path):
    model = ternary_model("llama", "o_down")
    embeddings = model.get_input_embeddings().weight.detach().clone()
    figures = export_ternary(model, BYTE, tmp_path / "out")
    assert figures["typical_difference"] <= 1e-6
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    stored = dict(stored_tensors(tmp_path / "out"))
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float32


def test_weights_in_several_files(ternary_model, tmp_path):
    export_ternary(ternary_model(), BYTE, tmp_path / "out", max_shard_bytes=8000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 3
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)


def test_layers_left_out_stay_as_they_are(ternary_model, tmp_path):
    model = ternary_model(skip=("*.layers.0.*", "k_proj"))
    export_ternary(model, BYTE, tmp_path / "out", dtype=torch.float32)
    stored = dict(stored_tensors(tmp_path / "out"))
    kept = model.state_dict()["model.layers.1.self_attn.k_proj.weight"]
    assert torch.equal(stored["model.layers.1.self_attn.k_proj.weight"], kept)
    assert stored["model.layers.1.self_attn.q_proj.weight"].dtype == torch.uint8


@pytest.mark.parametrize("wrong", ["scale", "trit"])
def test_a_folder_that_answers_differently_is_refused(ternary_model, tmp_path, monkeypatch, wrong):
    model = ternary_model()
    export_ternary(model, BYTE, tmp_path / "out", dtype=torch.float32)
    path = tmp_path / "out/model.safetensors"
    weights = load_file(path)
    for name in ternary_layers(model):
        if wrong == "scale":
            weights[f"{name}.weight_scale"] = weights[f"{name}.weight_scale"].reciprocal()
        else:
            weights[f"{name}.weight"] = weights[f"{name}.weight"].roll(1, 0)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match="q_proj gives other outputs after reloading"):
        verify_stock(tmp_path / "out", model, stock_layout(model), BYTE, TEXTS)
    monkeypatch.setattr("tokenkit.export.ternary_verify.CLOSE_SHARE", 0.0)
    with pytest.raises(ExportError, match="logits differ"):
        verify_stock(tmp_path / "out", model, stock_layout(model), BYTE, TEXTS)


def test_a_failed_verification_leaves_nothing(ternary_model, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise ExportError("no")

    monkeypatch.setattr("tokenkit.export.ternary.verify_stock", refuse)
    model = ternary_model()
    embeddings = model.get_input_embeddings().weight.detach().clone()
    with pytest.raises(ExportError, match="no"):
        export_ternary(model, BYTE, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(model.get_input_embeddings().weight, embeddings)


def test_what_has_no_place_in_transformers_is_refused(dense_model, ternary_model, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"no layer of this model was trained ternary.*force_ptq=true"):
        export_ternary(dense_model(), BYTE, out)
    model = ternary_model()
    set_strength(model, 0.5)
    with pytest.raises(UserError, match=r"strength is 0\.5.*warmup_steps"):
        export_ternary(model, BYTE, out)
    wide = ternary_model("llama", "o_down", head_dim=16)
    with pytest.raises(UserError, match="4 heads of 16 are not the width 32"):
        export_ternary(wide, BYTE, out)
    with pytest.raises(UserError, match="MLP biases or sliding windows"):
        export_ternary(ternary_model("llama", "o_down", mlp_bias=True), BYTE, out)
    without = dense_model()
    attach_ternary(without, TernaryConfig(sub_norm="none", activation_bits=None))
    with pytest.raises(UserError, match="8-bit activations"):
        export_ternary(without, BYTE, out)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2))
    attach_ternary(gpt2, TernaryConfig(sub_norm="none"))
    with pytest.raises(UserError, match=r"no nn.Linear of this shape in transformers' gpt2"):
        export_ternary(gpt2, BYTE, out)
    median = dense_model()
    attach_ternary(median, TernaryConfig(sub_norm="none", scale="median"))
    with pytest.raises(UserError, match="scale is the median"):
        export_latent(median, BYTE, out)
    assert list(tmp_path.iterdir()) == []
    assert export_ternary(median, BYTE, out)["close_positions"] >= 0.95


@pytest.mark.parametrize(("family", "sub_norm", "options", "model_type"), [CASES[0], CASES[2], CASES[4]])
def test_latent_weights_come_back_for_training(ternary_model, tmp_path, family, sub_norm, options, model_type):
    model = ternary_model(family, sub_norm, **options)
    figures = export_latent(model, BYTE, tmp_path / "out")
    assert figures["typical_difference"] <= 1e-6
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["quantization_config"]["quantization_mode"]) == (model_type, "online")
    again = load_model(str(tmp_path / "out"))
    names = reattach_ternary(again, config)
    assert names == list(ternary_layers(model)) == list(ternary_layers(again))
    for name, layer in ternary_layers(again).items():
        assert torch.equal(layer.weight, ternary_layers(model)[name].weight)
        assert layer.weight.requires_grad
    ids = [256, *b"hello there"]
    assert torch.equal(logits_of(again, ids), logits_of(model, ids)) or sub_norm != "none"
    assert (logits_of(again, ids) - logits_of(model, ids)).abs().median() <= 1e-5
    again(torch.tensor([ids])).logits.sum().backward()
    assert all(layer.weight.grad is not None for layer in ternary_layers(again).values())
    assert export_ternary(again, BYTE, tmp_path / "packed")["model_type"] == model_type
    again.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())


def test_other_folders_get_no_ternary_layers(ternary_model, dense_model, tmp_path):
    model = dense_model()
    assert reattach_ternary(model, model.config.to_dict()) == []
    export_ternary(ternary_model(), BYTE, tmp_path / "out")
    packed = json.loads((tmp_path / "out/config.json").read_text())
    with pytest.raises(UserError, match="nothing left to train"):
        reattach_ternary(model, packed)


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_unpacked_it_is_the_scale_times_the_trits(ternary_model, tmp_path, linear_class):
    model = ternary_model("qwen2" if linear_class == "bitlinear" else "llama", "o_down")
    export_ternary(model, BYTE, tmp_path / "packed", linear_class=linear_class, max_shard_bytes=8000)
    export_unpacked(tmp_path / "packed", tmp_path / "dense", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for name, layer in ternary_layers(model).items():
        trits, gamma = layer.trits()
        module = dense.get_submodule(name)
        assert type(module) is nn.Linear
        torch.testing.assert_close(module.weight, trits * gamma, rtol=1e-6, atol=0)
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert (tmp_path / "dense/tokenizer.json").read_bytes() == (tmp_path / "packed/tokenizer.json").read_bytes()


def test_only_packed_folders_are_unpacked(ternary_model, model_folder, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        export_unpacked(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="not a packed ternary model"):
        export_unpacked(Path(model_folder), tmp_path / "out")
    export_ternary(ternary_model("llama", "every"), BYTE, tmp_path / "every")
    with pytest.raises(UserError, match="norm inside every ternary layer"):
        export_unpacked(tmp_path / "every", tmp_path / "out")


def test_rounding_without_training_is_measured(dense_model):
    model = dense_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rounded, damage = forced_ternary(model, BYTE, ["hello there", "a cat"])
    assert len(ternary_layers(rounded)) == 14
    assert not ternary_layers(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    ids = [256, *b"hello there"]
    rows = [logits_of(one, ids).double().log_softmax(-1) for one in (model, rounded)]
    one = (rows[0].exp() * (rows[0] - rows[1])).sum().item()
    assert damage["tokens"] == 18
    assert 0 < one < damage["kl_nats_per_token"] * 18
    assert damage["bits_per_byte_before"] != damage["bits_per_byte_after"]
