"""int8 and int4 folders: what stock transformers reads is what was rounded, near the original, or nothing is there."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel

from tokenkit.config import UserError
from tokenkit.export import quantized, quantized_verify
from tokenkit.export.nibbles import dequantise_groups, pack_nibbles, quantise_groups
from tokenkit.export.quantized import export_quantized, quantised_layers
from tokenkit.export.verify import ExportError
from tokenkit.models.ternary import TernaryConfig, attach_ternary
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.verbs.model import ModelChoice, load_pair

IDS = torch.arange(3, 40)[None]
TEXTS = ["the cat sat on a mat and then ran home to see who had been eating"]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def names_in(folder: Path) -> dict[str, str]:
    """Every stored tensor's number format."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return found


def test_nibbles_lie_as_the_layout_says() -> None:
    codes = torch.tensor([[-8, -7, 0, 7, 1, 2, 3, -1, 5]], dtype=torch.int8)
    first, second = pack_nibbles(codes)[0].tolist()
    assert f"{first & 0xFFFFFFFF:08x}" == "7ba9f810"  # code + 8, the first in the lowest bits
    assert second == 13  # a last word is filled up with zero bits


@pytest.mark.parametrize("group_size", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_is_the_nearest_level_and_no_worse_than_the_plain_scale(group_size: int, dtype: torch.dtype) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    codes, scale = quantise_groups(weight, group_size, dtype)
    assert (scale.dtype, scale.shape) == (dtype, (24, 64 // group_size))
    levels = torch.arange(-8, 8.0)[:, None, None, None] * scale.float()[None, ..., None]
    errors = (levels - weight.unflatten(-1, (-1, group_size))).abs()
    chosen = (dequantise_groups(codes, scale.float()) - weight).unflatten(-1, (-1, group_size)).abs()
    torch.testing.assert_close(chosen, errors.amin(0), atol=1e-6, rtol=0)
    plain = weight.unflatten(-1, (-1, group_size)).abs().amax(-1, keepdim=True) / 7
    simple = (weight.unflatten(-1, (-1, group_size)) / plain).round() * plain - weight.unflatten(-1, (-1, group_size))
    assert chosen.square().sum() <= simple.square().sum()


def test_compressed_tensors_unpacks_what_we_pack() -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-8, 8, (6, 40), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    assert torch.equal(compressors.unpack_from_int32(pack_nibbles(codes), 4, codes.shape), codes)
    assert torch.equal(compressors.pack_to_int32(codes, 4), pack_nibbles(codes))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_int8_is_what_torchao_makes_and_is_read_so(dense_model, family: str, tied: bool, tmp_path: Path) -> None:
    model, tokenizer = dense_model(family, tie_word_embeddings=tied), load_tokenizer("byte")
    before = logits(model)
    figures = export_quantized(
        model, tokenizer, tmp_path / "out", scheme="int8", documents=TEXTS, max_shard_bytes=20_000
    )
    assert torch.equal(logits(model), before)  # the model in memory is left alone
    assert (figures["quantized_layers"], figures["logit_difference"]) == (14, 0.0)
    assert 0 < figures["kl_nats_per_token"] < 0.01
    assert figures["same_first_choice"] > 0.9
    assert figures["bytes"] < figures["bytes_unquantized"]
    stored = names_in(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert sum(kind == "I8" for name, kind in stored.items() if name.endswith("qdata")) == 14
    assert ("lm_head.weight" in stored) is not tied
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    weight = stock.model.layers[0].mlp.up_proj.weight
    original = model.model.layers[0].mlp.up_proj.weight
    assert (type(weight).__name__, weight.qdata.dtype) == ("Int8Tensor", torch.int8)
    step = original.abs().amax(1, keepdim=True) / 127
    assert ((weight.dequantize() - original).abs() <= 0.51 * step).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_is_half_a_byte_a_weight(dense_model, dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model, tokenizer = dense_model(), load_tokenizer("byte")
    figures = export_quantized(
        model, tokenizer, tmp_path / "out", scheme="int4", skip=["*.1.self_attn.*"], dtype=dtype, documents=TEXTS,
        max_rise=1.0,
    )  # fmt: skip
    assert figures["quantized_layers"] == 10
    stored = names_in(tmp_path / "out")
    packed = [name for name in stored if name.endswith("weight_packed")]
    assert (len(packed), {stored[name] for name in packed}) == (10, {"I32"})
    assert stored["model.layers.1.self_attn.q_proj.weight"] == {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.0.mlp.down_proj.weight_packed").shape == (32, 64 // 8)
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert {"lm_head", "model.layers.1.self_attn.q_proj"} <= {*settings["ignore"]}


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_read_here_it_is_an_ordinary_model_again(dense_model, scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model, tokenizer = dense_model(), load_tokenizer("byte")
    export_quantized(model, tokenizer, tmp_path / "out", scheme=scheme, documents=TEXTS, max_rise=1.0)
    stock = quantized_verify.load_stock(tmp_path / "out", "cpu")
    again, _ = load_pair(ModelChoice(source=str(tmp_path / "out")), "cpu")
    torch.testing.assert_close(logits(again), logits(stock), atol=1e-5, rtol=1e-5)
    again(IDS, labels=IDS).loss.backward()
    assert again.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    again.save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(plain), logits(again))


def gone(tmp_path: Path) -> bool:
    return list(tmp_path.iterdir()) == []


def test_a_rise_that_is_not_allowed_is_refused_and_leaves_nothing(dense_model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"where max_rise allows -?100\.0%; write max_rise="):
        export_quantized(
            dense_model(), load_tokenizer("byte"), tmp_path / "out", scheme="int8", documents=TEXTS, max_rise=-1.0
        )
    assert gone(tmp_path)


def test_a_folder_that_answers_otherwise_leaves_nothing(dense_model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(quantized_verify, "load_stock", lambda folder, device: dense_model(hidden_size=64))
    with pytest.raises(ExportError, match="logits differ"):
        export_quantized(dense_model(), load_tokenizer("byte"), tmp_path / "out", scheme="int8", documents=TEXTS)
    assert gone(tmp_path)


def test_an_interruption_leaves_nothing(dense_model, tmp_path: Path, monkeypatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantized, "verify_quantized", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_quantized(dense_model(), load_tokenizer("byte"), tmp_path / "out", scheme="int8", documents=TEXTS)
    assert gone(tmp_path)


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("int4", {"group_size": 48}, r"self_attn\.q_proj: 32 columns are no multiple of group_size 48"),
        ("int4", {"group_size": 20}, "group_size: 20, where a multiple of 8"),
        ("int8", {"skip": ["w_proj"]}, r"'w_proj' is no linear layer here; known: down_proj, gate_proj"),
        ("int8", {"skip": ["*"]}, "no linear layer to quantise"),
        ("int4_tiled", {}, "needs device=cuda and dtype=bfloat16"),
    ],
)
def test_what_cannot_be_is_said(dense_model, scheme: str, options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        export_quantized(dense_model(), load_tokenizer("byte"), tmp_path / "out", scheme=scheme, **options)
    assert gone(tmp_path)


def test_models_without_such_layers_are_named(dense_model) -> None:
    with pytest.raises(UserError, match="gpt2 has no linear layer to quantise"):
        quantised_layers(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9)), [])
    model = dense_model()
    attach_ternary(model, TernaryConfig(calibrate=False))
    with pytest.raises(UserError, match="the model is ternary"):
        quantised_layers(model, [])
