"""Fixtures for every test: where the shared real data lies, and small deterministic things made on the spot."""

import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.data.chunks import count_chunks
from tokenkit.tokenizers.autoencoder.chunkers import make_chunker
from tokenkit.tokenizers.autoencoder.network import AutoEncoder, NetworkConfig, scored_positions, symbols_of
from tokenkit.tokenizers.autoencoder.selection import select_pins
from tokenkit.tokenizers.autoencoder.tokenizer import package_of, save_with_fast
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.train import train_tokenizer

TEXT = "the cat sat on a mat and then ran home to see who had been eating all of its small green fish"
WORDS = TEXT.split()


def make_documents(count: int, words: int = 60) -> list[str]:
    """Little texts with structure to learn, the same every time."""
    generator = torch.Generator().manual_seed(count)
    rows = torch.randint(0, len(WORDS), (count, words), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row) + ".\n" for row in rows]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real tokenizers, corpora and golden vectors that lies beside the project, if it does."""
    folder = Path(os.environ.get("TOKENKIT_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip("no shared data beside the project (set TOKENKIT_SHARED to its folder)")
    return folder


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents(40)


@pytest.fixture(scope="session")
def bpe(documents) -> HFTokenizer:
    return train_tokenizer(documents, "bpe", 320)


@pytest.fixture(scope="session")
def unigram(documents) -> HFTokenizer:
    return train_tokenizer(documents, "unigram", 330)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, documents) -> Path:
    """The documents as a text file, one paragraph each."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n\n".join(documents), "utf-8")
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, bpe) -> Path:
    """A tiny random Llama with tied embeddings and its byte-level BPE, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=bpe.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=bpe.bos_id,
        eos_token_id=bpe.eos_id,
        attention_dropout=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    bpe.save(folder)
    return folder


STRINGS = [f"{space}{word}" for word in sorted(set(WORDS)) for space in ("", " ")] + ["qzx", "жук", "zzz", "vwx"]


@pytest.fixture(scope="session")
def tiny_network() -> AutoEncoder:
    """An auto-encoder of up to 8 bytes that has been taught a few strings in seconds."""
    symbols = symbols_of([string.encode()[:8] for string in STRINGS], 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoEncoder(NetworkConfig(max_bytes=8, levels=(4, 4, 3), hidden=48, byte_width=12, decoder_blocks=1))
        network.scale_latents(symbols)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
        for _ in range(400):
            logits, _, _ = network(symbols, torch.randint(2, 4, (len(symbols),)))
            scored = scored_positions(symbols)
            optimizer.zero_grad()
            functional.cross_entropy(logits[scored], symbols[scored]).backward()
            optimizer.step()
    return network.eval().requires_grad_(False)


def learned_folder(folder: Path, network: AutoEncoder, documents: list[str], kind: str, size: int = 60) -> Path:
    """A learned tokenizer with pins of the documents and the network, compact or open."""
    counts = count_chunks(documents, make_chunker("word"))
    save_with_fast(package_of(network, select_pins(counts, size), kind=kind), folder)
    return folder


@pytest.fixture(scope="session")
def compact_folder(tmp_path_factory, tiny_network, documents) -> Path:
    return learned_folder(tmp_path_factory.mktemp("learned") / "compact", tiny_network, documents, "compact")


@pytest.fixture(scope="session")
def open_folder(tmp_path_factory, tiny_network, documents) -> Path:
    """Few pins and 48 codes, so that there are ids of every kind in a text."""
    return learned_folder(tmp_path_factory.mktemp("learned") / "open", tiny_network, documents, "open", 12)
