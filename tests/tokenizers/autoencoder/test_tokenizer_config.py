"""The JSON of the checklist: every field with its default, old names, values that must agree, one-line errors."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from tokenkit.config import UserError, build, resolved
from tokenkit.tokenizers.autoencoder.config import Preset, TokenizerConfig, load_config
from tokenkit.tokenizers.autoencoder.network import PRESETS, AutoEncoder
from tokenkit.tokenizers.autoencoder.quantizer import KAPPA
from tokenkit.tokenizers.json_config import read_config
from tokenkit.tokenizers.word_config import WordConfig, WordCorpusConfig

CONFIGS = Path(__file__).parents[3] / "configs"
LITERAL = CONFIGS / "autoencoder_tokenizer_compat.json"


def literal(**changes):
    """The checklist's configuration with sections changed."""
    values = json.loads(LITERAL.read_text("utf-8"))
    for section, keys in changes.items():
        values[section] |= keys
    return values


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("autoencoder*.json")), ids=lambda path: path.stem)
def test_a_configuration_is_the_same_after_it_is_saved(path, tmp_path):
    config = load_config(path)
    config.save(tmp_path / "saved.json")
    assert load_config(tmp_path / "saved.json") == config
    assert build(TokenizerConfig, resolved(config)) == config
    assert [saved.name for saved in tmp_path.iterdir()] == ["saved.json"]
    AutoEncoder(config.network())


def test_the_defaults_are_those_of_the_checklist():
    config = load_config(LITERAL)
    assert (config.preset, config.chunker) == ("compat", "fixed:16")
    assert config.network() == PRESETS["compat"]
    bare = build(TokenizerConfig, {"architecture": {}})
    assert bare == config
    spelled = literal()
    assert {name: keys for name, keys in bare.model_dump(mode="json").items() if name in spelled} == spelled


def test_nothing_at_all_is_the_recommended_network():
    assert TokenizerConfig().network() == PRESETS["small"]
    recommended = load_config(CONFIGS / "autoencoder_tokenizer_config.json")
    same = {"training", "performance"}  # what is recommended there differs from what the checklist says
    assert recommended.model_dump(exclude=same) == TokenizerConfig().model_dump(exclude=same)
    assert TokenizerConfig().special_tokens.first_regular_id == 64
    assert set(get_args(Preset)) == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_network(preset):
    assert build(TokenizerConfig, {"preset": preset}).network() == PRESETS[preset]


def test_old_names():
    sizes = {"d_char": 32, "d_latent": 256, "max_chunk_size": 12, "char_vocab_size": 256}
    decoder = {"char_vocab_size": 256, "output_length": 12}
    config = build(TokenizerConfig, {"type": "autoencoder", "encoder": sizes, "decoder": decoder})
    shape = config.network().convolution
    assert (config.tokenizer_type, config.decoder.output_vocab_size) == ("autoencoder", 256)
    assert (shape.d_char, shape.d_latent, config.network().max_bytes) == (32, 256, 12)
    assert config.decoder.d_latent == 256


def test_what_a_network_is_made_of():
    values = {"fsq": {"levels": [7, 5, 5], "temperature": 2.0}, "network": {"hidden": 64, "groups": 4}}
    config = build(TokenizerConfig, values)
    network = config.network()
    assert (config.fsq.num_dimensions, config.fsq.total_vocab_size, config.fsq.vocab_size) == (3, 175, 175)
    assert network.levels == (7, 5, 5)
    assert network.kappa == pytest.approx(KAPPA / 2)
    assert (network.hidden, network.groups, network.byte_width) == (64, 4, 32)
    mended = build(TokenizerConfig, {"preset": "compat", "network": {"mode": "M", "convolution": {"normalise": True}}})
    assert mended.network().convolution.normalise
    assert mended.network().convolution.channels == (128, 256, 256)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"trainning": {}}, ["trainning: unknown key", "did you mean 'training'"]),
        ({"encoder": {"conv_chanels": [1]}}, ["encoder.conv_chanels", "did you mean 'conv_channels'"]),
        ({"network": {"hiden": 3}}, ["network.hiden", "did you mean 'hidden'"]),
        ({"network": {"groups": 1}}, ["network.min_groups: 2 of 1 groups"]),
        ({"preset": "tiny"}, ["preset", "'small'", "'tiny'"]),
        ({"chunker": "wrod"}, ["chunker 'wrod'", "word"]),
        ({"type": "bpe"}, ["tokenizer_type", "'autoencoder'", "'bpe'"]),
        ({"type": "autoencoder", "tokenizer_type": "word"}, ["type: 'autoencoder'", "'word'", "keep one"]),
        ({"fsq": {"num_dimensions": 7}}, ["fsq.num_dimensions: 7", "make 8"]),
        ({"fsq": {"levels": [8, 5], "total_vocab_size": 41}}, ["fsq.total_vocab_size: 41", "make 40"]),
        ({"fsq": {"levels": [8, 5], "vocab_size": 41}}, ["fsq.vocab_size: 41 of 40"]),
        ({"fsq": {"levels": [8, 1]}}, ["fsq.levels", "at least 2"]),
        ({"fsq": {"levels": []}}, ["fsq.levels", "at least 2"]),
        ({"fsq": {"levels": "many"}}, ["fsq.levels", "'many'"]),
        ({"fsq": {"temperature": 0}}, ["fsq.temperature", "greater than 0"]),
        ({"encoder": {"strides": [1, 2]}}, ["encoder: ", "3 channels", "2 strides", "equal length"]),
        ({"decoder": {"kernel_sizes": [3]}}, ["decoder: ", "4 channels", "1 kernel_sizes", "equal length"]),
        ({"architecture": {"max_chunk_size": 20}, "decoder": {"output_length": 16}}, ["16 positions", "is 20"]),
        ({"architecture": {"d_latent": 16}, "decoder": {"d_latent": 8}}, ["decoder.d_latent: 8", "is 16"]),
        ({"architecture": {"d_char": 64}, "encoder": {"d_char": 32}}, ["encoder.d_char: 32", "is 64", "keep one"]),
        ({"architecture": {"char_vocab_size": 300}}, ["architecture.char_vocab_size", "256", "300"]),
        ({"preset": "small", "encoder": {}}, ["encoder", "preset small has no convolutions"]),
        ({"preset": "small", "architecture": {"d_char": 32}}, ["architecture.d_char: 32", "preset small"]),
        ({"special_tokens": {"pad_id": 9}}, ["special_tokens.pad_id", "9"]),
        ({"special_tokens": {"first_regular_id": 6}}, ["first_regular_id: 6", "write 4, or 7 or more"]),
        ({"training": {"validation_split": 1.5}}, ["training.validation_split", "less than 1", "1.5"]),
        ({"training": 3}, ["training", "3"]),
    ],
)
def test_mistakes_are_one_line(values, parts, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values), "utf-8")
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [("{", "not JSON"), ("[]", "holds a list"), ('{"version": "1", "version": "2"}', "'version' stands twice")],
)
def test_files_that_hold_something_else(text, part, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text, "utf-8")
    with pytest.raises(UserError, match=part):
        load_config(path)
    with pytest.raises(UserError, match="no configuration"):
        load_config(tmp_path / "none.json")


def test_a_configuration_needs_no_torch():
    code = (
        "import sys; from tokenkit.tokenizers.autoencoder.config import load_config; "
        f"load_config({str(LITERAL)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_word_configurations(tmp_path):
    word = read_config(WordConfig, CONFIGS / "word_tokenizer_config.json")
    assert word == WordConfig()
    assert build(WordConfig, resolved(word)) == word
    corpus = WordCorpusConfig()
    assert build(WordCorpusConfig, resolved(corpus)) == corpus
    assert (corpus.word().vocab_size, corpus.word().min_frequency) == (50_000, 10)
    with pytest.raises(UserError, match="did you mean 'lowercase'"):
        build(WordConfig, {"normalization": {"lower_case": True}})
    with pytest.raises(UserError, match="stands twice"):
        build(WordConfig, {"special_tokens": {"pad": "<unk>"}})
