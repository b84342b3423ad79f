"""Two families of small tokenizers, trained on the spot: byte-level BPE, and spaces as marks with byte fallback."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Rust
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.load import load_tokenizer

CORPUS = [
    "the cat sat on the mat\nand the other cat sat there too\n\n",
    "def function(value):\n    return value + 1\n",
    "Größe, naïve café, 東京と京都, Москва 🙂",
] * 3


def _write(folder: Path, rust: Rust, roles: dict[str, str]) -> Tokenizer:
    folder.mkdir(parents=True)
    definition = json.loads(rust.to_str())
    definition["added_tokens"] = [t for t in definition["added_tokens"] if not t["content"].startswith("<0x")]
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (folder / "tokenizer_config.json").write_text(json.dumps({f"{role}_token": text for role, text in roles.items()}))
    return load_tokenizer(str(folder))


def byte_level(folder: Path, size: int, roles: dict[str, str], extra: tuple[str, ...] = ()) -> Tokenizer:
    """A byte-level BPE of `size` tokens, specials first."""
    rust = Rust(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    specials = list(dict.fromkeys([*roles.values(), *extra]))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    return _write(folder, rust, roles)


def marked(folder: Path, size: int) -> Tokenizer:
    """A BPE in the manner of Llama 2: a dummy prefix, marks for spaces, `<0xNN>` for bytes beside equal characters."""
    rust = Rust(models.BPE(byte_fallback=True, unk_token="<unk>"))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    rust.decoder = decoders.Sequence(steps)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    lines = [line.replace(" ", "▁") for text in CORPUS for line in text.split("\n")]
    words = [piece for line in lines for piece in line.replace("▁", "\n▁").split("\n")]
    rust.normalizer, whole = None, rust.normalizer
    rust.train_from_iterator(words, trainers.BpeTrainer(vocab_size=size, special_tokens=specials, show_progress=False))
    rust.normalizer = whole
    return _write(folder, rust, {"bos": "<s>", "eos": "</s>", "unk": "<unk>"})


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Tokenizers by name: both kinds in two sizes, one token for all roles, an extra special, and bytes."""
    folder = tmp_path_factory.mktemp("tokenizers")
    roles = {"bos": "<|b|>", "eos": "<|e|>", "pad": "<|p|>"}
    return {
        "small": byte_level(folder / "small", 300, roles),
        "large": byte_level(folder / "large", 420, roles, ("<|turn|>",)),
        "one_role": byte_level(folder / "one_role", 330, {"bos": "<|end|>", "eos": "<|end|>"}, ("<|turn|>",)),
        "marked": marked(folder / "marked", 400),
        "byte": load_tokenizer("byte"),
    }


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """The texts that they were trained on."""
    return list(CORPUS)
