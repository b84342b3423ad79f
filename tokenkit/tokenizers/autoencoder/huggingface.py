"""A learned tokenizer as a Python tokenizer of transformers, codes included: what no tokenizer.json can hold."""

import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer
from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy
from transformers.utils.chat_template_utils import encode_marked_chat

from tokenkit.config import UserError, build
from tokenkit.tokenizers.autoencoder.character_spans import RowSpans, Span
from tokenkit.tokenizers.autoencoder.codec import Codec
from tokenkit.tokenizers.autoencoder.fast import CHAT_TEMPLATE, ROLE_TOKENS
from tokenkit.tokenizers.autoencoder.ids import SPECIALS, UNK, IdLayout
from tokenkit.tokenizers.autoencoder.model_inputs import (
    EncodedText,
    encode_parts,
    given_ids,
    parts_of,
    rows_of,
    without_spans,
)
from tokenkit.tokenizers.autoencoder.network import NetworkConfig
from tokenkit.tokenizers.autoencoder.package import (
    CONFIG,
    FINGERPRINT,
    PACKAGE_FILES,
    PINS,
    WARM,
    WEIGHTS,
    Package,
    PackageConfig,
    fingerprint_of,
    read_config,
)
from tokenkit.tokenizers.autoencoder.pins import PinTable
from tokenkit.tokenizers.autoencoder.stream import DecodeStream, EncodeStream
from tokenkit.tokenizers.autoencoder.surfaces import Vocabulary
from tokenkit.tokenizers.whole_file import write_whole

CODE_FILE = "fsq_tokenizer.py"
CODE = '''"""The tokenizer of this folder, for `AutoTokenizer.from_pretrained(..., trust_remote_code=True)`."""

try:
    from tokenkit.tokenizers.autoencoder.huggingface import FSQTokenizer
except ImportError as error:
    raise ImportError("FSQTokenizer needs tokenkit: pip install tokenkit-torch") from error

__all__ = ["FSQTokenizer"]
'''
PATTERNS = {(False, False): "none", (True, False): "bos", (False, True): "eos", (True, True): "bos_eos"}


class FSQTokenizer(PreTrainedTokenizer):
    """Pins, codes and bytes. A text begins with bos and has no eos, unless told otherwise; both are stored.

    Tokens are added inside the block of reserved ids, so the number of ids stays. Offsets are in characters; the last
    id of a run of codes covers what the run says, those before it are empty. Decoding never cleans up.
    """

    vocab_files_names = {
        "vocab_file": CONFIG,
        "pins_file": PINS,
        "weights_file": WEIGHTS,
        "warm_file": WARM,
        "seal_file": FINGERPRINT,
    }
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"
    _auto_map = {"AutoTokenizer": (f"{CODE_FILE.removesuffix('.py')}.FSQTokenizer", None)}

    def __init__(
        self,
        vocab_file: str | Path | None = None,
        *,
        pins_file: str | None = None,
        weights_file: str | None = None,
        warm_file: str | None = None,
        seal_file: str | None = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        **kwargs: Any,
    ) -> None:
        """`vocab_file` is the settings of a package folder, or the folder; its other files lie beside it."""
        if vocab_file is None:
            raise UserError(f"FSQTokenizer: no {CONFIG} there; give the folder of a learned tokenizer")
        path = Path(vocab_file)
        self._folder = path if path.is_dir() else path.parent
        self.fingerprint = fingerprint_of(self._folder)
        self._package_config = read_config(self._folder)
        self._codec: Codec | None = None
        self._vocabulary: Vocabulary | None = None
        self.layout = _layout(self._folder, self._package_config)
        names = self.layout.special_names
        known = [*SPECIALS, *self._package_config.names][: len(names)]
        self._added_tokens_decoder = {index: _special(name) for index, name in enumerate(known)}
        given = kwargs.pop("added_tokens_decoder", {})  # what a fast tokenizer lists as added includes reserved ids
        kwargs["added_tokens_decoder"] = {i: t for i, t in given.items() if i >= len(names) or str(t) != names[i]}
        for role, literal in ROLE_TOKENS.items():
            kwargs.setdefault(role, literal)
        kwargs.setdefault("extra_special_tokens", [name for name in known if name not in ROLE_TOKENS.values()])
        kwargs.setdefault("chat_template", CHAT_TEMPLATE)
        kwargs.setdefault("special_tokens_pattern", PATTERNS[add_bos_token, add_eos_token])
        super().__init__(**kwargs)
        self.init_kwargs["special_tokens_pattern"] = self.special_tokens_pattern

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoTokenizer") -> None:
        """Nothing: `save_pretrained` always writes the file that the auto class needs."""

    def __getstate__(self) -> dict[str, Any]:
        """Everything but tables, network and caches, which another process reads from the folder."""
        return self.__dict__ | {"_codec": None, "_vocabulary": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state

    @property
    def codec(self) -> Codec:
        """Text ⇄ ids, read from the folder when it is first needed."""
        if self._codec is None:
            if fingerprint_of(self._folder) != self.fingerprint:
                raise UserError(f"{self._folder}: another tokenizer than the one that was loaded from it")
            self._codec = Package.load(self._folder).codec()
        return self._codec

    @property
    def vocabulary(self) -> Vocabulary:
        """String ⇄ id, without the tokens that were added."""
        if self._vocabulary is None:
            codes = self.codec.open_codes
            quantizer = codes.network.quantizer if codes else None
            self._vocabulary = Vocabulary(self.layout, self.codec.fixed_bytes, quantizer)
        return self._vocabulary

    @property
    def vocab_size(self) -> int:
        """Largest id + 1, tokens that were added included."""
        return self.layout.vocab_size

    def __len__(self) -> int:
        return self.layout.vocab_size

    @property
    def add_bos_token(self) -> bool:
        """Whether a text begins with bos."""
        return self.special_tokens_pattern in ("bos", "bos_eos")

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._frame(value, self.add_eos_token)

    @property
    def add_eos_token(self) -> bool:
        """Whether a text ends with eos."""
        return self.special_tokens_pattern in ("eos", "bos_eos")

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._frame(self.add_bos_token, value)

    def get_vocab(self) -> Any:
        """A mapping of every string to its id, written on demand; see `surfaces`."""
        return self.vocabulary

    def encode_untrusted(self, text: str, **options: Any) -> list[int]:
        """Ids of a text in which literals of special tokens are text."""
        return self.encode(text, split_special_tokens=True, **options)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes, without special tokens."""
        return self.codec.encode_bytes(data)

    def decode_bytes(self, token_ids: Sequence[int]) -> bytes:
        """The bytes of ids; special tokens have none."""
        return self.codec.decode_bytes([int(index) for index in token_ids])

    def encode_stream(self) -> EncodeStream:
        """For text that arrives bit by bit."""
        return EncodeStream(self.codec)

    def decode_stream(self, *, skip_prompt: bool = False) -> DecodeStream:
        """For ids that arrive one by one; `generate(streamer=...)` takes it."""
        return DecodeStream(self.codec, skip_prompt=skip_prompt)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copies the package, and writes the file that the auto class loads; their paths."""
        if filename_prefix:
            raise UserError(
                f"filename_prefix {filename_prefix!r}: the files of a package have fixed names; leave it out"
            )
        if fingerprint_of(self._folder) != self.fingerprint:
            raise UserError(f"{self._folder}: another tokenizer than the one that was loaded from it")
        folder, saved = Path(save_directory), []
        for name in PACKAGE_FILES:
            source, target = self._folder / name, folder / name
            if source.is_file():
                if not (target.exists() and target.samefile(source)):
                    shutil.copyfile(source, target)
                saved.append(str(target))
        write_whole(folder / CODE_FILE, CODE.encode())
        return (*saved, str(folder / CODE_FILE))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens; literals of special ones stand in it."""
        return self._decode(self.convert_tokens_to_ids(tokens))

    def _frame(self, bos: bool, eos: bool) -> None:
        self.special_tokens_pattern = PATTERNS[bos, eos]
        self.init_kwargs["special_tokens_pattern"] = self.special_tokens_pattern

    def _update_total_vocab_size(self) -> None:
        self.total_vocab_size = self.layout.vocab_size

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """How many of the tokens are new; each takes the first reserved id that is free."""
        added = 0
        for token in new_tokens or ():
            special = special_tokens or str(token) in self.all_special_tokens
            entry = token if isinstance(token, AddedToken) else AddedToken(token, normalized=False, special=special)
            entry.special = entry.special or special
            if entry.lstrip or entry.rstrip or entry.single_word:
                raise UserError(
                    f"token {str(token)!r}: takes white space from around it, which is lost then; leave that"
                )
            if not entry.content or entry.content in self._added_tokens_encoder:
                continue
            if entry.special and entry.content not in self.all_special_tokens:
                self._extra_special_tokens.append(entry)
            index = self._free_id(entry.content)
            self._added_tokens_decoder[index], self._added_tokens_encoder[entry.content] = entry, index
            added += 1
        self._update_trie()
        self._update_total_vocab_size()
        return added

    def _free_id(self, content: str) -> int:
        names = self.layout.special_names
        if content in names:
            return names.index(content)
        free = (index for index in range(len(SPECIALS), len(names)) if index not in self._added_tokens_decoder)
        index = next(free, None)
        if index is None:
            raise UserError(
                f"token {content!r}: no reserved id is free; make a tokenizer with a larger first_regular_id"
            )
        return index

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self.vocabulary.surface(index) for index in self.codec.encode(text)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.vocabulary.get(token, UNK)

    def _convert_id_to_token(self, index: int) -> str:
        return self.vocabulary.surface(index)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
        first = self.layout.first_regular_id
        if all(index >= first for index in ids):
            return self.codec.decode(ids)
        strings = self.codec.token_strings(ids)
        spelled = (self._literal(i, skip_special_tokens) if i < first else s for i, s in zip(ids, strings))
        return b"".join(spelled).decode("utf-8", "replace")

    def _literal(self, index: int, skip: bool) -> bytes:
        token = self._added_tokens_decoder.get(index)
        if skip and (token is None or token.special):
            return b""
        text = "\ufffd" if index == UNK else self.layout.special_names[index] if token is None else token.content
        return text.encode()

    def _encode_plus(  # pyrefly: ignore [bad-override] (it is called with names)
        self,
        text: Any,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        max_length: int | None = None,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: Any = None,
        **options: Any,
    ) -> BatchEncoding:
        rows, batched = rows_of(text, text_pair, is_split_into_words)
        texts = iter(self._encoded([one for row in rows for one in row if one is not None], options))
        options |= {"framed": add_special_tokens, "max_length": max_length, "return_tensors": return_tensors}
        pairs = [(next(texts), None if second is None else next(texts)) for _, second in rows]
        done = [self._row(first, second, options) for first, second in pairs]
        columns: Any = {key: [row[key] for row, _ in done] for key in (done[0][0] if done else ["input_ids"])}
        side = padding_side or self.padding_side
        columns = self.pad(
            columns,
            padding=padding_strategy.value,
            max_length=max_length if padding_strategy is PaddingStrategy.MAX_LENGTH else None,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=side,
            return_attention_mask=options.get("return_attention_mask"),
        )
        surfaces = self.convert_ids_to_tokens
        spans = [
            RowSpans(ids, surfaces, partial(place, len(ids), side))
            for ids, (_, place) in zip(columns["input_ids"], done)
        ]
        if options.get("return_offsets_mapping"):
            columns["offset_mapping"] = [row.offsets for row in spans]
        if options.get("return_length"):
            columns["length"] = [len(ids) for ids in columns["input_ids"]]
        values = {key: column if batched else column[0] for key, column in columns.items()}
        return BatchEncoding(values, spans, return_tensors, prepend_batch_axis=not batched)  # pyrefly: ignore [bad-argument-type] (takes any sequence)

    def _encoded(self, texts: list[Any], options: dict[str, Any]) -> list[EncodedText]:
        whole = options.get("split_special_tokens", self.split_special_tokens)
        split: Any = (lambda text: [text]) if whole else self.tokens_trie.split
        added: Any = (lambda text: None) if whole else self._added_tokens_encoder.get
        ready = [self._ready(text, options) for text in texts]
        parts = [parts_of(text, split, added) for text, ids in zip(texts, ready) if ids is None]
        encoded = iter(encode_parts(self.codec, parts))
        return [ids or next(encoded) for ids in ready]

    def _ready(self, text: Any, options: dict[str, Any]) -> EncodedText | None:
        if options.get("sanitize_control_tokens") and isinstance(text, str):  # marked by `apply_chat_template`
            return without_spans(encode_marked_chat(self, text))
        return given_ids(text)

    def _row(
        self, first: EncodedText, second: EncodedText | None, options: dict[str, Any]
    ) -> tuple[dict[str, Any], Any]:
        """The ids of a row, truncated and framed, and what places them in their texts once it is padded."""
        strategy = options.get("truncation_strategy", TruncationStrategy.DO_NOT_TRUNCATE)
        if options.get("return_overflowing_tokens") and second and strategy is TruncationStrategy.LONGEST_FIRST:
            raise ValueError("return_overflowing_tokens: of two texts, write truncation only_first or only_second")
        special = self.num_special_tokens_to_add(pair=second is not None) if options["framed"] else 0
        excess = len(first.ids) + (len(second.ids) if second else 0) + special - (options["max_length"] or 0)
        removed = max(0, excess) if strategy is not TruncationStrategy.DO_NOT_TRUNCATE and options["max_length"] else 0

        def cut(one: list[Any], other: list[Any] | None) -> Any:
            return self.truncate_sequences(one, other, removed, strategy, options.get("stride", 0))

        def frame(one: list[Any], other: list[Any] | None) -> list[Any]:
            return self.build_inputs_with_special_tokens(one, other) if options["framed"] else one + (other or [])

        def place(size: int, side: str) -> list[tuple[int, Span] | None]:
            ones = [(0, span) for span in first.spans()]
            others = [(1, span) for span in second.spans()] if second else None
            places = [spot if isinstance(spot, tuple) else None for spot in frame(*cut(ones, others)[:2])]
            filler: list[tuple[int, Span] | None] = [None] * (size - len(places))
            return filler + places if side == "left" else places + filler

        ids, pair, overflow = cut(first.ids, second.ids if second else None)
        row: dict[str, Any] = {"input_ids": frame(ids, pair)}
        self._eventual_warn_about_too_long_sequence(
            row["input_ids"], options["max_length"], options.get("verbose", True)
        )
        zeros = [0] * len(row["input_ids"])
        if options.get("return_token_type_ids"):
            row["token_type_ids"] = self.create_token_type_ids_from_sequences(ids, pair) if options["framed"] else zeros
        if options.get("return_special_tokens_mask"):
            row["special_tokens_mask"] = self.get_special_tokens_mask(ids, pair) if options["framed"] else zeros
        if options.get("return_overflowing_tokens") and not options["return_tensors"]:
            row |= {"overflowing_tokens": overflow, "num_truncated_tokens": removed}
        return row, place


def _special(literal: str) -> AddedToken:
    return AddedToken(literal, normalized=False, special=True)


def _layout(folder: Path, config: PackageConfig) -> IdLayout:
    codes = math.prod(build(NetworkConfig, config.network or {}).levels) if config.kind == "open" else 0
    return IdLayout(len(PinTable.load(folder / PINS)), codes, config.first_regular_id, config.names)
