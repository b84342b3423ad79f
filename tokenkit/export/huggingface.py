"""A folder that stock transformers loads: safetensors, configuration, tokenizer. It appears whole or not at all."""

import copy
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.processors import Sequence, TemplateProcessing
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from tokenkit.config import UserError
from tokenkit.export.verify import verify_huggingface
from tokenkit.models.generate import empty_ids
from tokenkit.models.load import input_matrix, quiet, stock_ids
from tokenkit.models.lora import adapters, merge_lora
from tokenkit.tokenizers.base import Tokenizer

SHARD_BYTES = 5_000_000_000
TEXTS = [
    "Hello, world!",
    "  two spaces,\n\n\ttab 12345",
    "Grüße aus Łódź, 東京 и Москва 🙂👩\u200d👧",
    "def f(x):\n    return x",
]


def export_huggingface(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    extra_files: dict[str, str] = {},  # noqa: B006 (read only)
) -> Path:
    """The new folder, reloaded and compared before it takes its name. Adapters are merged into a copy.

    A stock `tokenizer(text)` puts `tokenizer.start_id()` first, as training did: where the tokenizer's own
    post-processor adds nothing, the exported one is given a template that does.
    """
    rows = len(input_matrix(model))
    refuse_existing(folder)
    if rows < tokenizer.vocab_size:
        raise UserError(f"export: {rows} embedding rows for {tokenizer.vocab_size} token ids; transfer the model first")
    for name in extra_files:
        if Path(name).name != name:
            raise UserError(f"extra file {name!r}: write a plain file name")
    with drafted(folder) as draft:
        _write_model(model, tokenizer, draft, dtype, max_shard_bytes)
        write_tokenizer(tokenizer, draft)
        for name, text in extra_files.items():
            (draft / name).write_text(text, "utf-8")
        verify_huggingface(draft, model, tokenizer, TEXTS)
    return folder


def refuse_existing(folder: Path) -> None:
    """UserError where something has the name of a folder that is to be new."""
    if folder.exists():
        raise UserError(f"{folder}: exists already; write the name of a new folder, or move this one away")


@contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name when the block has ended well, and is gone otherwise."""
    refuse_existing(folder)
    draft = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    draft.mkdir(parents=True)
    try:
        yield draft
        os.rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_model(
    model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype | None, max_shard_bytes: int
) -> None:
    if adapters(model) or dtype not in (None, model.dtype):
        model = copy.deepcopy(model)
        merge_lora(model)
        model.to(dtype or model.dtype)  # pyrefly: ignore [bad-argument-type] (a decorator hides the signature)
    with quiet():
        model.save_pretrained(folder, max_shard_size=max_shard_bytes)
    write_settings(model, copy.deepcopy(model.config), tokenizer, folder)


def write_settings(model: PreTrainedModel, config: PreTrainedConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `config` with the tokenizer's ids, and the model's settings of generation with them."""
    generation = copy.deepcopy(model.generation_config)
    ids = {**stock_ids(tokenizer), "eos_token_id": _stops(generation, tokenizer)}
    for part in (config, config.get_text_config(), generation):
        for name, value in ids.items():
            setattr(part, name, value)
    rows = len(input_matrix(model))
    config.get_text_config().vocab_size = rows
    # Rows without a token would decode to nothing: stock generation must not choose them either.
    generation.suppress_tokens = sorted({*empty_ids(tokenizer, rows), *(generation.suppress_tokens or ())}) or None
    config.save_pretrained(folder)
    generation.save_pretrained(folder)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a tokenizer whose stock call puts the start id first, as training did."""
    tokenizer.save(folder)
    _add_start(folder, tokenizer)


def _stops(generation: GenerationConfig, tokenizer: Tokenizer) -> int | list[int] | None:
    """The model's own list of ends where it contains the tokenizer's end, else the tokenizer's alone."""
    declared = generation.eos_token_id
    return declared if isinstance(declared, list) and tokenizer.eos_id in declared else tokenizer.eos_id


def _add_start(folder: Path, tokenizer: Tokenizer) -> None:
    start = tokenizer.start_id()
    with quiet():
        stock: Any = AutoTokenizer.from_pretrained(folder)
    if stock("a")["input_ids"][:1] == [start]:
        return
    path = folder / "tokenizer.json"
    rust = RustTokenizer.from_file(str(path))
    literal = rust.id_to_token(start)
    template = TemplateProcessing(
        single=[literal, "$A"], pair=[literal, "$A", literal, "$B:1"], special_tokens=[(literal, start)]
    )
    rust.post_processor = template if rust.post_processor is None else Sequence([rust.post_processor, template])
    rust.save(str(path))
