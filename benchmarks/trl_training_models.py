"""The models of the comparison with TRL, with random weights: a student, a teacher of its tokenizer, and another one.

Usage: python -m benchmarks.trl_training_models {small,large} FOLDER
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.alignment_throughput import SHARED, read_texts
from tokenkit.data.example import Window, cut
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.train import train_tokenizer

DEMO = "tokenkit/assets/demo_teacher"
SETTINGS = {  # hidden, intermediate, layers, heads; the student's and the other teacher's tokenizer
    "small": ((256, 704, 4, 4), DEMO, None),
    "large": ((256, 688, 8, 4), "gpt2", "smollm2"),
}
"""`small` is the shape of the embedded model, with vocabularies of 4,096 ids; those of `large` are about 50,000."""
SIDES = ("student", "teacher", "other")
ROWS, WINDOW_BYTES = 64, 512


def make_models(setting: str, folder: Path) -> None:
    """Writes `student`, `teacher` (the student's tokenizer) and `other`, each a folder that transformers reads."""
    shape, own, other = SETTINGS[setting]
    torch.manual_seed(0)
    for side, source in zip(SIDES, (own, own, other), strict=True):
        tokenizer = _tokenizer(source)
        tokenizer.save(folder / side)
        _model(shape, tokenizer).save_pretrained(folder / side)


def windows() -> list[Window]:
    """Rows of web text, each a document of its own that an end token closes."""
    texts = [window.text for window in cut(read_texts(120), WINDOW_BYTES) if len(window.text.encode()) > 400]
    return [Window(row, 0, text, True) for row, text in enumerate(texts[:ROWS])]


def _tokenizer(source: str | None) -> Tokenizer:
    """One by its name; None: a byte-level BPE of the size of the embedded one, learnt from web text."""
    if source is None:
        return train_tokenizer(read_texts(1000), "bpe", 4096)
    return load_tokenizer(source if source == DEMO else str(SHARED / "data/tokenizers" / source))


def _model(shape: tuple[int, int, int, int], tokenizer: Tokenizer) -> LlamaForCausalLM:
    hidden, intermediate, layers, heads = shape
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.start_id(),
        eos_token_id=tokenizer.eos_id,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


if __name__ == "__main__":
    make_models(sys.argv[1], Path(sys.argv[2]))
