"""Tokenizers that are no tokenizer.json, read into one: tiktoken, Tekken, sentencepiece, GGUF and slow folders."""

from pathlib import Path

from tokenkit.config import UserError
from tokenkit.tokenizers.formats.definition import Parsed, parse_json, read_bytes, refuse_pattern
from tokenkit.tokenizers.formats.gguf import MAGIC
from tokenkit.tokenizers.formats.llama_cpp import read_gguf
from tokenkit.tokenizers.formats.sentencepiece import is_sentencepiece, read_sentencepiece
from tokenkit.tokenizers.formats.slow import MERGES, is_vocabulary, read_vocabulary, read_words
from tokenkit.tokenizers.formats.tekken import is_tekken, read_tekken
from tokenkit.tokenizers.formats.tiktoken import is_tiktoken, read_tiktoken

HEAD_BYTES = 8192  # longer than the first line of any tiktoken file
# In a folder without tokenizer.json, the first of these that is there is the tokenizer.
FOLDER = (
    "tekken.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "*.model*",
    "*.gguf",
)
FOLDER += ("vocab.json", "encoder.json", "vocab.txt")
SUFFIXES = (".tiktoken", ".model", ".spm", ".gguf", ".bpe")  # of files that can be nothing but one of these formats


def read_format(path: Path, pattern: str | None = None) -> Parsed | None:
    """The tokenizer.json of a file or folder, and its role tokens and chat template; None for other formats.

    The content decides, not the name. `pattern` says how text is split where the file does not: the name of a family or
    a regular expression.
    """
    path = Path(path)
    if path.is_dir():
        found = next((file for name in FOLDER for file in sorted(path.glob(name)) if file.is_file()), None)
        return None if found is None else read_format(found, pattern)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    name = str(path)
    if head.startswith(b"PK"):
        raise UserError(f"{name}: a zip archive; unpack it and write the tokenizer's file")
    if head.startswith(MAGIC):
        return read_gguf(path, name, pattern)
    if is_tiktoken(head):
        return read_tiktoken(read_bytes(path), name, pattern)
    if path.name == "vocab.txt":
        refuse_pattern(pattern, name)
        return read_words(path)
    if path.name in MERGES.values() and not head.lstrip().startswith(b"{"):
        return _beside(path, pattern)
    if is_sentencepiece(head):
        refuse_pattern(pattern, name)
        return read_sentencepiece(read_bytes(path), name)
    if head.lstrip().startswith(b"{") and path.suffix != ".xz":
        return _read_json_format(path, pattern)
    if path.suffix in SUFFIXES:
        what = "an empty file" if not head else "neither a sentencepiece model nor a tiktoken nor a GGUF file"
        raise UserError(f"{name}: {what}; fetch the file again")
    return None


def _beside(path: Path, pattern: str | None) -> Parsed | None:
    """Merges stand for the folder's byte-level vocabulary."""
    name = next(vocabulary for vocabulary, merges in MERGES.items() if merges == path.name)
    if not path.with_name(name).is_file():
        raise UserError(f"{path}: merges without their vocabulary; put {name} beside it")
    return read_format(path.with_name(name), pattern)


def _read_json_format(path: Path, pattern: str | None) -> Parsed | None:
    value = parse_json(read_bytes(path), path)
    if is_tekken(value):
        return read_tekken(value, str(path), pattern)
    return read_vocabulary(path, value, pattern) if is_vocabulary(value) else None
