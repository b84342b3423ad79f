"""The convolutions of the checklist: lengths, contracts of encoder and decoder, the preset with its literal layers."""

import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder.convolution import CharacterEncoder, VectorDecoder, convolution_pair
from tokenkit.tokenizers.autoencoder.layers import Conv1DLayer, Deconv1DLayer
from tokenkit.tokenizers.autoencoder.lengths import literal_length, start_length
from tokenkit.tokenizers.autoencoder.network import (
    END,
    PRESETS,
    AutoEncoder,
    ConvolutionConfig,
    NetworkConfig,
    chunks_of,
    symbols_of,
)

LITERAL = (64, 256, [128, 256, 256], [3, 3, 3], [1, 2, 2])
DECODER = (256, [256, 256, 128, 256], [3, 3, 3, 3], [2, 2, 1, 1])
TEXTS = ["hello", "hello!", "world", "", "x" * 40, "\0\1\x1b", "naïve", "日本語", "é" * 20, "\ud800", "a b\nc\r\t"]
few = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def encoder():
    encoder = CharacterEncoder(*LITERAL)
    encoder.initialize_weights(seed=0)
    return encoder


@pytest.fixture(scope="module")
def decoder():
    decoder = VectorDecoder(*DECODER)
    decoder.initialize_weights(seed=0)
    return decoder


@pytest.mark.parametrize(("stride", "length"), [(1, 10), (2, 5)])
def test_lengths_of_a_convolution(stride, length):
    layer = Conv1DLayer(4, 6, 3, stride, 1)
    assert layer(torch.randn(10, 4)).shape == (length, 6)
    assert layer(torch.randn(2, 10, 4)).shape == (2, length, 6)
    assert layer.output_length(10) == length


def test_length_of_a_transposed_convolution():
    layer = Deconv1DLayer(4, 6, 3, 2, 1)
    assert layer(torch.randn(5, 4)).shape == (9, 6)
    assert layer.output_length(5) == 9
    assert Deconv1DLayer(4, 6, 4, 2, 1)(torch.randn(3, 5, 4)).shape == (3, 10, 6)


stacks = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5), st.integers(1, 3)), min_size=1, max_size=4)


@few
@given(stack=stacks, length=st.integers(1, 33))
def test_every_stack_reads_and_gives_all_positions(stack, length):
    channels, wider, strides = map(list, zip(*stack))
    kernels = [stride + extra for stride, extra in zip(strides, wider)]
    encoder = CharacterEncoder(4, None, channels, kernels, strides, length, pooling="flatten")
    assert encoder(symbols_of([b"a", b""], length)).shape == (2, encoder.width)
    decoder = VectorDecoder(encoder.width, channels, kernels, strides, length)
    assert decoder(torch.randn(2, encoder.width)).shape == (2, length, 257)
    assert decoder.features(torch.randn(2, encoder.width)).ndim == 2


def test_the_literal_decoder_would_lose_three_positions():
    assert start_length(16, DECODER[3]) == 4
    assert literal_length(16, *DECODER[2:]) == 13
    decoder = VectorDecoder(*DECODER)
    assert (decoder.literal_length, decoder.output_length) == (13, 16)
    first = torch.autograd.functional.jacobian(lambda v: decoder(v)[0, :, 0], torch.randn(1, 256))
    assert (first.abs().sum((1, 2)) > 0).all()  # every position depends on the numbers, the last ones too


def test_numbers_of_a_text(encoder):
    found = encoder.encode("hello")
    assert found.shape == (1, 256)
    assert torch.isfinite(found).all()
    assert torch.equal(found, encoder.encode("hello"))
    assert torch.equal(found, encoder.encode(b"hello"))
    assert torch.equal(encoder.encode(""), torch.zeros(1, 256))
    assert torch.equal(encoder.encode("a" * 16), encoder.encode("a" * 99))
    distinct = {tuple(row) for row in encoder.encode_batch(TEXTS).tolist()}
    assert len(distinct) == len(TEXTS)
    every = encoder.encode_batch([bytes([byte]) for byte in range(256)])
    assert len({tuple(row) for row in every.tolist()}) == 256


@pytest.mark.parametrize("pooling", ["global_avg", "flatten", "attention"])
@pytest.mark.parametrize("normalise", [False, True])
def test_a_batch_is_its_texts_one_by_one(pooling, normalise):
    encoder = CharacterEncoder(16, 24, [32, 32], [3, 3], [2, 1], pooling=pooling, normalise=normalise)
    encoder.initialize_weights(seed=1)
    alone = torch.cat([encoder.encode(text) for text in TEXTS])
    assert torch.allclose(encoder.encode_batch(TEXTS), alone, atol=1e-6)
    assert encoder.encode_batch([]).shape == (0, 24)


def test_weights_of_a_seed():
    encoder = CharacterEncoder(*LITERAL)
    state = torch.random.get_rng_state()
    encoder.initialize_weights(seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    first = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    encoder.initialize_weights(seed=3)
    assert all(torch.equal(tensor, first[name]) for name, tensor in encoder.state_dict().items())
    weight = encoder.layers[1].inner.weight
    assert encoder.table.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert weight.std().item() == pytest.approx((2 / (128 * 3)) ** 0.5, rel=0.05)
    assert not encoder.layers[1].inner.bias.any()


def test_distributions_of_a_decoder(decoder):
    latents = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    probabilities = decoder.decode(latents[0])
    assert probabilities.shape == (16, 257)
    assert torch.allclose(probabilities.sum(-1), torch.ones(16), atol=1e-5)
    assert torch.allclose(decoder.decode_batch(latents)[0], probabilities, atol=1e-6)
    with pytest.raises(ValueError, match="decode_batch"):
        decoder.decode(latents)


def test_how_sure_a_decoder_is(decoder):
    latent = torch.randn(1, 256, generator=torch.Generator().manual_seed(1))
    probabilities, metrics = decoder.decode_with_metrics(latent)
    best = [max(row) for row in probabilities.tolist()]
    assert metrics.confidences == pytest.approx(best)
    assert metrics.minimum_confidence == pytest.approx(min(best))
    assert metrics.average_confidence == pytest.approx(sum(best) / 16)
    assert metrics.low_confidence_positions == sum(value < 0.5 for value in best)
    decoder.decode(latent)
    assert decoder.get_last_metrics() == metrics


def test_text_of_an_untrained_pair(encoder, decoder):
    for text in TEXTS:
        shown = decoder.decode_to_text(5 * encoder.encode(text))
        assert shown.encode().decode() == shown
        assert not any(unicodedata.category(char) == "Cc" and char not in "\t\n\r" for char in shown)


def test_no_byte_is_filtered(decoder):
    chunks = [bytes([byte, 255 - byte]) for byte in range(256)] + [b"", bytes(range(240, 256))]
    wanted = torch.nn.functional.one_hot(symbols_of(chunks, 16), 257).float()
    speaks = VectorDecoder(*DECODER)
    for chunk, logits in zip(chunks, wanted):
        speaks.forward = lambda values, logits=logits: logits.unsqueeze(0)
        assert speaks.decode_bytes(torch.zeros(256)) == chunk
        assert speaks.decode_to_text(torch.zeros(256), raw=True) == chunk.decode("utf-8", "replace")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Conv1DLayer(3, 4, 3, 2, 1),
        lambda: Deconv1DLayer(3, 4, 3, 2, 1, 1),
        lambda: CharacterEncoder(8, 6, (4, 5), (3, 3), (1, 2), pooling="attention", normalise=True),
        lambda: VectorDecoder(6, (4, 5), (4, 3), (2, 1), 8, activation="gelu"),
    ],
)
def test_what_is_saved_is_loaded(tmp_path, make):
    module, path = make(), tmp_path / "module.bin"
    module.save(path)
    again = type(module).load(path)
    assert again.options == module.options
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in module.state_dict().items())
    other = VectorDecoder if isinstance(module, Conv1DLayer) else Conv1DLayer
    with pytest.raises(UserError, match=f"not a {other.__name__}"):
        other.load(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="not a saved"):
        type(module).load(path)


def test_other_files_are_one_line(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="holds other weights"):
        CharacterEncoder.load(tmp_path / "other.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "empty.safetensors", {"kind": "CharacterEncoder", "options": "{}"})
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x04K\x01.")
    for name in ("empty.safetensors", "pickle.bin", "none.bin"):
        with pytest.raises(UserError, match="not a saved CharacterEncoder"):
            CharacterEncoder.load(tmp_path / name)


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        (([4, 4], [3], [1, 1]), "2 channels, 1 kernel_sizes and 2 strides|2 channels, 1 kernel_sizes, 2 strides"),
        (([], [], []), "no layers"),
        (([4, 0], [3, 3], [1, 1]), "numbers over 0"),
        (([4, 4], [3, 2], [1, 3]), "kernel of 2 under a stride of 3"),
    ],
)
def test_lists_that_do_not_match(lists, words):
    with pytest.raises(ValueError, match=words):
        CharacterEncoder(8, 8, *lists)
    with pytest.raises(ValueError, match=words):
        VectorDecoder(8, *lists)
    channels, kernels, strides = map(tuple, lists)
    with pytest.raises(UserError, match=words):
        ConvolutionConfig(channels=channels, kernel_sizes=kernels, strides=strides)
    with pytest.raises(UserError, match=words):
        ConvolutionConfig(deconv_channels=channels, deconv_kernel_sizes=kernels, deconv_strides=strides)
    with pytest.raises(ValueError, match="256"):
        VectorDecoder(8, [4], [3], [1], char_vocab_size=128)


def test_the_literal_preset_counts_what_the_checklist_counts():
    network = AutoEncoder(PRESETS["compat"])
    count = sum(parameter.numel() for parameter in network.parameters())
    end = 64 + 128 * 3 + 1  # its byte vector, and its output channel
    assert count == 938_504 + end + 2 * 256 + 8  # the norm before the latents, and what stands for a missing group
    assert network.logits(torch.zeros(2, 1, 8)).shape == (2, 16, 257)


MENDED = NetworkConfig(kind="convolution", max_bytes=8, groups=2)


@pytest.mark.parametrize("config", [PRESETS["compat"], MENDED], ids=["compat", "mended"])
def test_codes_do_not_depend_on_the_batch(config):
    torch.manual_seed(0)
    network = AutoEncoder(config).eval()
    chunks = [bytes([a, b])[: 1 + a % 2] for a in range(97, 123) for b in range(32, 127, 5)]
    symbols = symbols_of(chunks, config.max_bytes)
    network.scale_latents(symbols)
    with torch.no_grad():
        digits = network.digits(symbols)
        sure = network.quantizer.margin(network.latents(symbols))[0] > 1e-4
        alone = torch.cat([network.digits(row.unsqueeze(0)) for row in symbols])
    assert torch.equal(alone[sure], digits[sure])
    assert sure.float().mean() > 0.99
    for group in digits.flatten(1).T:  # P1: no collapse at the start
        assert len(group.unique()) >= 4


def test_the_mended_network_learns_what_it_reads():
    torch.manual_seed(0)
    shape = ConvolutionConfig(
        d_char=16,
        channels=(32, 32),
        kernel_sizes=(3, 3),
        strides=(1, 2),
        deconv_channels=(32, 256),
        deconv_kernel_sizes=(4, 4),
        deconv_strides=(2, 2),
    )
    network = AutoEncoder(NetworkConfig(kind="convolution", max_bytes=4, groups=2, convolution=shape))
    chunks = [b"", b"a", b"\0\xff", b"the", b"\r\n", "é".encode(), b"1234", b"four"]
    symbols = symbols_of(chunks, 4)
    network.scale_latents(symbols)
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(network(symbols)[0].flatten(0, 1), symbols.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert chunks_of(network(symbols)[0].argmax(-1)) == chunks


def test_the_pair_of_a_network():
    encoder, decoder = convolution_pair(MENDED)
    symbols = torch.full((3, 8), END)
    assert encoder(symbols).shape == (3, encoder.width)
    assert decoder(torch.zeros(3, 16)).shape == (3, 8, 257)
    with pytest.raises(UserError, match="kind convolution"):
        NetworkConfig(convolution=ConvolutionConfig())
