"""The 8-bit encoder: exact sums, near the floats, another fingerprint, and just as lossless."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tokenkit.tokenizers.autoencoder.int8 import EXACT_WIDTH, Int8Linear, with_int8_encoder
from tokenkit.tokenizers.autoencoder.network import AutoEncoder, NetworkConfig
from tokenkit.tokenizers.autoencoder.pins import PinTable
from tokenkit.tokenizers.autoencoder.tokenizer import package_of


@pytest.mark.parametrize("rows", [1, 2, 17, 300])
@pytest.mark.parametrize("width", [2, 24, 129, 768])
def test_products_are_those_of_integers(rows, width):
    torch.manual_seed(rows * width)
    layer, x = Int8Linear(nn.Linear(width, 33)), torch.randn(rows, width)
    steps = x.abs().amax(1, keepdim=True) / 127
    sums = (x / steps).round().double() @ layer.weight.double().t()
    assert torch.equal(layer(x), sums.float() * steps * layer.scale + layer.bias)


def test_it_is_near_the_layer_of_floats():
    torch.manual_seed(0)
    linear, x = nn.Linear(384, 64), torch.randn(100, 384)
    assert (Int8Linear(linear)(x) - linear(x)).abs().max() < 0.05 * linear(x).abs().max()


def test_rows_do_not_depend_on_their_neighbours():
    torch.manual_seed(0)
    layer, x = Int8Linear(nn.Linear(50, 20)), torch.randn(64, 50)
    assert torch.equal(torch.cat([layer(row.unsqueeze(0)) for row in x]), layer(x))


def test_too_wide_a_layer_is_refused():
    network = AutoEncoder(NetworkConfig(max_bytes=4, hidden=EXACT_WIDTH + 8, byte_width=4, encoder_blocks=1))
    with pytest.raises(ValueError, match="is the most"):
        with_int8_encoder(network)


def test_its_ids_are_its_own_and_every_string_comes_back(tmp_path):
    torch.manual_seed(0)
    network = AutoEncoder(NetworkConfig(max_bytes=4, hidden=32, byte_width=8)).eval()
    plain = package_of(network, PinTable((b"ab",), (3,)), kind="open")
    other = replace(plain, config=plain.config.model_copy(update={"engine": "int8"}))
    assert plain.save(tmp_path / "float32") != other.save(tmp_path / "int8")
    codec = other.codec()
    for data in (b"", b"abab", bytes(range(256)), b"hello world"):
        assert codec.decode_bytes(codec.encode_bytes(data)) == data
