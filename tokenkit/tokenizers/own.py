"""A tokenizer of the user's own: a Python class or function in a file, held to what every tokenizer is held to."""

import hashlib
import inspect
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tokenkit.config import UserError
from tokenkit.tokenizers.base import TEXT_SEGMENT, Encoding, Tokenizer, framed, utf8

PROBES = (
    "",
    "The cat sat on the mat, and the other cat sat there too.",
    " two  spaces,\n\nthree lines\r\n\tand a tab ",
    "été à la crème; Größe über alles; 12 and 345 and 6789!",
    "def f(x):\n    return x + 1  # the end\n",
    "中文字 हिन्दी ไทย العربية 👩‍👩‍👧😀 \0",
    "<s></s><unk><|endoftext|> user",
)
COLUMNS = attrgetter("ids", "starts", "ends", "special", "segment")


class OwnTokenizer:
    """A table of tokens and a function from text to ids: give the table, write `pieces`, and inherit the rest.

    `save` is refused: no tokenizer.json says what `pieces` does. Such a tokenizer reads (align, doctor, statistics, a
    teacher, bits per byte); a student's or target's needs a `save` that writes what `AutoTokenizer` loads.
    """

    def __init__(
        self, tokens: Sequence[bytes], *, bos: str | None = "<s>", eos: str | None = "</s>", pad: str | None = None
    ) -> None:
        """`tokens` are the bytes of ids 0, 1, ...; the literals of bos, eos and pad get the ids behind them."""
        self.name = type(self).__name__
        literals = [literal for literal in dict.fromkeys((bos, eos, pad)) if literal is not None]
        self.special_tokens = {literal: len(tokens) + place for place, literal in enumerate(literals)}
        self.special_ids = frozenset(self.special_tokens.values())
        self.bos_id, self.eos_id, self.pad_id = (
            None if role is None else self.special_tokens[role] for role in (bos, eos, pad)
        )
        self.token_bytes = [*map(bytes, tokens), *(b"" for _ in literals)]
        self.vocab_size = len(self.token_bytes)
        self.config: dict[str, Any] = {}
        self.added_tokens: list[dict[str, Any]] = []
        self.chat_template: str | None = None
        self.changes: tuple[str, ...] = ()
        self.lossless = True

    def pieces(self, text: str) -> Iterable[int]:
        """The ids of a text, whose bytes one after the other are those of the text."""
        raise UserError(f"{type(self).__name__}: does not say how it cuts; give it a method pieces(self, text) -> ids")

    @property
    def fingerprint(self) -> str:
        """sha256 over the table, the special tokens and the source of the class."""
        parts = [repr(self.token_bytes), repr(self.special_tokens), inspect.getsource(type(self))]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def start_id(self) -> int:
        """The id that begins every document: bos, else eos."""
        for index in (self.bos_id, self.eos_id):
            if index is not None:
                return index
        raise UserError(f"{self.name}: has neither bos nor eos; give one to OwnTokenizer.__init__")

    def encode(self, text: str, *, special: bool = False) -> Encoding:
        """Ids and byte spans; UserError where the ids do not spell the text."""
        ids, data = [*map(int, self.pieces(text))], utf8(text, self.name)
        if b"".join(self.token_bytes[index] for index in ids) != data:
            raise UserError(f"{self.name}: the ids of {text[:40]!r} do not spell it; `pieces` has to cover every byte")
        ends = np.cumsum([len(self.token_bytes[index]) for index in ids], dtype=np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if ids else ends
        flat, segment = np.zeros(len(ids), np.bool_), np.full(len(ids), TEXT_SEGMENT, np.int32)
        encoding = Encoding(np.asarray(ids, np.int32), starts, ends, flat, segment)
        return framed(encoding, self.bos_id) if special else encoding

    def encode_batch(self, texts: list[str], *, special: bool = False, continued: bool = False) -> list[Encoding]:
        """One encoding per text; a continued text is spelled like any other."""
        return [self.encode(text, special=special) for text in texts]

    def decode(self, ids: list[int]) -> str:
        """The text of the ids without specials; incomplete characters become U+FFFD."""
        return b"".join(self.token_bytes[index] for index in ids).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        """Refused: the class has to say how `AutoTokenizer` gets the same ids."""
        raise UserError(
            f"{self.name}: a Python tokenizer that cannot be written to {folder}; give its class a save(folder) that "
            "writes a tokenizer.json, or use it for a teacher"
        )

    def __reduce__(self) -> Any:
        """Another process reads the file again."""
        return (load_own, (self.name,))


def is_own(name: str) -> bool:
    """Whether the name of a tokenizer is `FILE.py:NAME`."""
    home, colon, attribute = name.rpartition(":")
    return bool(colon) and home.endswith(".py") and attribute.isidentifier()


def load_own(name: str) -> Any:
    """What `FILE.py:NAME` makes, called without arguments, once it has passed the checks. This runs the file."""
    home, _, attribute = name.rpartition(":")
    path = Path(home).expanduser()
    made = vars(_module(path, name)).get(attribute)
    if not callable(made):
        raise UserError(f"tokenizer {name!r}: the file holds no class or function {attribute!r}; write one")
    try:
        tokenizer = made()
    except Exception as error:  # whatever the user's code raises is the user's to mend
        raise UserError(f"tokenizer {name!r}, line {_line(error, path)}: {_said(error)}") from None
    if not isinstance(tokenizer, Tokenizer):
        missing = sorted(key for key in _members() if key not in dir(tokenizer))
        raise UserError(
            f"tokenizer {name!r}: {attribute}() lacks {', '.join(missing)} of the Tokenizer protocol; "
            "derive it from tokenkit.tokenizers.own.OwnTokenizer"
        )
    tokenizer.name = name
    try:
        problem = contract_problem(tokenizer)
    except UserError as error:
        problem = str(error)
    except Exception as error:
        raise UserError(f"tokenizer {name!r}, line {_line(error, path)}: {_said(error)}") from None
    if problem:
        raise UserError(f"tokenizer {name!r}: {problem}")
    return tokenizer


def contract_problem(tokenizer: Tokenizer, probes: Sequence[str] = PROBES) -> str | None:
    """What keeps a tokenizer from being used, seen on a handful of texts; None where nothing does."""
    if len(tokenizer.token_bytes) != tokenizer.vocab_size:
        return f"token_bytes has {len(tokenizer.token_bytes)} entries for a vocab_size of {tokenizer.vocab_size}"
    if any(tokenizer.token_bytes[index] for index in tokenizer.special_ids):
        return "a special token has bytes; its entry of token_bytes has to be b''"
    if len(tokenizer.fingerprint) != 64 or tokenizer.fingerprint != tokenizer.fingerprint:
        return "fingerprint has to be a sha256 in hexadecimal, the same every time"
    for text, batched in zip(probes, tokenizer.encode_batch([*probes]), strict=True):
        encoding = tokenizer.encode(text)
        problem = _text_problem(tokenizer, text, encoding)
        if problem is None and not all(map(np.array_equal, COLUMNS(batched), COLUMNS(encoding))):
            problem = "encode_batch does not give what encode gives"
        if problem:
            return f"{problem} (text {text[:40]!r})"
    return None


def _text_problem(tokenizer: Tokenizer, text: str, encoding: Encoding) -> str | None:
    """What is wrong with the encoding of one text."""
    length, ids = len(text.encode()), encoding.ids.tolist()
    if any(not 0 <= index < tokenizer.vocab_size for index in ids):
        return "an id is outside 0..vocab_size - 1"
    if not tokenizer.special_ids.isdisjoint(ids) or encoding.special.any():
        return "running text became a special token; those are added by special=True alone"
    starts, ends = encoding.starts, encoding.ends
    whole = not length if not ids else (starts[0], ends[-1]) == (0, length)
    if not whole or (ends < starts).any() or (starts[1:] != ends[:-1]).any():
        return "the byte spans do not tile the text: each begins where the one before ends"
    if tokenizer.lossless and tokenizer.decode(ids) != text:
        return "decode(encode(text)) is not the text; say in `changes` what is lost, with lossless = False"
    return None


def require_kept(tokenizer: Tokenizer, load: Callable[[str], Tokenizer]) -> None:
    """UserError where a tokenizer of the user's own does not come back, with the same ids, from what `save` writes.

    `load` is the factory. Others are not looked at: the package has tests for them.
    """
    if not is_own(tokenizer.name):
        return
    with tempfile.TemporaryDirectory(prefix="own-tokenizer-") as scratch:
        tokenizer.save(Path(scratch))
        again = load(scratch)
        for text in PROBES:
            if again.encode(text).ids.tolist() != tokenizer.encode(text).ids.tolist():
                raise UserError(
                    f"tokenizer {tokenizer.name!r}: what save() wrote gives other ids for {text[:40]!r}; a student's "
                    "tokenizer has to load without your code"
                )


def _module(path: Path, name: str) -> ModuleType:
    try:
        source = path.read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"tokenizer {name!r}: no such file; paths start at the working directory") from None
    except (OSError, UnicodeDecodeError):
        raise UserError(f"tokenizer {name!r}: not a Python file; write FILE.py:CLASS") from None
    module = ModuleType(f"tokenkit_own_{path.stem}_{hashlib.sha256(source.encode()).hexdigest()[:8]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where `inspect` looks for the source of a class
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except SyntaxError as error:
        raise UserError(f"tokenizer {name!r}, line {error.lineno}: not valid Python: {error.msg}") from None
    except Exception as error:
        raise UserError(f"tokenizer {name!r}, line {_line(error, path)}: {_said(error)}") from None
    return module


def _members() -> set[str]:
    """The public names of the protocol."""
    return {*Tokenizer.__annotations__, *(key for key in vars(Tokenizer) if not key.startswith("_"))}


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _line(error: Exception, path: Path) -> int:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return frames[-1].lineno or 1 if frames else 1
