"""Fixtures for every test: where the shared real data lies, and small deterministic things made on the spot."""

import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
