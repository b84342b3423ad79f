"""`tokenkit transfer`, from folder to folder: new rows in, everything else as it is; deltas, and the way back."""

import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch

from tokenkit.config import UserError
from tokenkit.export.huggingface import TEXTS, drafted, write_tokenizer
from tokenkit.export.verify import compare_ids
from tokenkit.models.load import load_model
from tokenkit.report.transfer_rows import FILE, rows_table
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.transfer.apply import TransferReport
from tokenkit.transfer.delta import REVERSE, open_delta, put_on, way_back, write_delta
from tokenkit.transfer.plan import Side, TransferPlan
from tokenkit.transfer.shards import Checkpoint
from tokenkit.transfer.stream import Body, Rewrite

Streamed = tuple[Rewrite, TransferPlan, TransferReport]
Figures = dict[str, Any]

RELOAD_BYTES = 500_000_000  # of weights: a model up to this size is loaded whole before it is called done
TOKENIZER_FILES = (
    "tokenizer.json*", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "vocab.json", "merges.txt", "vocab.txt", "*.model", "*.tiktoken", "tekken.json",
)  # fmt: skip


@contextmanager
def stoppable() -> Iterator[None]:
    """A request to end is obeyed with one line, after what was begun has been taken away."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        print("tokenkit: stopped; nothing was written", file=sys.stderr)
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def kept_template(source: Tokenizer, target: Tokenizer) -> str | None:
    """The chat template of the source where the target has none, and has every special token that it speaks of."""
    template = source.chat_template
    if template is None or target.chat_template is not None:
        return None
    spoken = {literal for literal in source.special_tokens if literal in template}
    return template if spoken <= target.special_tokens.keys() else None


@dataclass(frozen=True)
class Writing:
    """What is written of a transfer."""

    body: Body = "copy"
    delta: bool = False
    keep_reverse: bool = False
    rows: bool = True


def write_streamed(made: Streamed, source: Tokenizer, target: Tokenizer, output: Path, writing: Writing) -> Figures:
    """Writes the transferred model, or its delta; what was made of what."""
    rewrite, plan, report = made
    found: Figures = asdict(report)
    if rewrite.settings.left:
        found["settings_left"] = list(rewrite.settings.left)
    with drafted(output) as draft:
        if writing.delta:
            single = np.flatnonzero(plan.lengths == 1)
            nearest = dict(zip(single.tolist(), plan.pieces[plan.offsets[:-1][single]].tolist()))
            found["stored_rows"] = write_delta(rewrite, draft, nearest)
        else:
            rewrite.write(draft, body=writing.body)
        _write_tokenizer(source, target, draft)
        if writing.rows:
            write_rows(rewrite, source, target, draft)
        if not writing.delta:
            _verify(rewrite, draft)
        if writing.keep_reverse:
            (draft / REVERSE).mkdir()
            found["reverse_rows"] = way_back(rewrite.checkpoint, draft, plan, draft / REVERSE)
            _keep_tokenizer(rewrite.checkpoint.folder, source, draft / REVERSE)
    return found


def write_rows(rewrite: Rewrite, source: Tokenizer, target: Tokenizer, folder: Path) -> None:
    """Writes the table of what each row was made of."""
    sides: tuple[Side, ...] = ("input", "head")
    makers = {side: rewrite.parts[side].maker for side in sides if side in rewrite.parts}
    with (folder / FILE).open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in rows_table(makers, source, target))


def write_with_delta(
    checkpoint: Checkpoint, source: Tokenizer, delta: Path, output: Path, body: Body
) -> dict[str, Any]:
    """Writes a base with a delta put on it."""
    target = load_tokenizer(str(delta))
    rewrite, _ = put_on(open_delta(delta), checkpoint, source, target)
    with drafted(output) as draft:
        rewrite.write(draft, body=body)
        for path in _tokenizer_files(delta):
            shutil.copyfile(path, draft / path.name)
        compare_ids(draft, target, TEXTS)
        _verify(rewrite, draft)
    return {"source": str(checkpoint.folder), "delta": str(delta), "rows": rewrite.size}


def write_reversed(checkpoint: Checkpoint, source: Tokenizer, kept: Path, output: Path, body: Body) -> Figures:
    """Writes a transferred model with the tokenizer that it had before, which a folder has kept."""
    folder = kept / REVERSE
    if not folder.is_dir():
        raise UserError(f"{kept}: no {REVERSE}/ inside; only `tokenkit transfer keep_reverse=true` keeps a way back")
    target = load_tokenizer(str(folder))
    rewrite, untouched = put_on(open_delta(folder), checkpoint, source, target, trained=True)
    with drafted(output) as draft:
        rewrite.write(draft, body=body)
        for path in _tokenizer_files(folder):
            shutil.copyfile(path, draft / path.name)
        rewrite.verify(draft)
    return {"source": str(checkpoint.folder), "rows": rewrite.size, "embeddings_untouched": untouched}


def _write_tokenizer(source: Tokenizer, target: Tokenizer, draft: Path) -> None:
    write_tokenizer(target, draft)
    template = kept_template(source, target)
    if template is not None:
        (draft / "chat_template.jinja").write_text(template, "utf-8")
    compare_ids(draft, target, TEXTS)


def _verify(rewrite: Rewrite, draft: Path) -> None:
    rewrite.verify(draft)
    if sum(path.stat().st_size for path in draft.glob("*.safetensors")) <= RELOAD_BYTES:
        model = load_model(str(draft), dtype=rewrite.parts["input"].old.dtype)
        with torch.no_grad():
            ids = torch.arange(min(8, rewrite.size))[None]
            rows = model(ids, use_cache=False).logits.shape[-1]
        if rows != rewrite.size:
            raise UserError(f"{draft}: {rows} logits per token where {rewrite.size} were to be; see to the disk")


def _keep_tokenizer(folder: Path, tokenizer: Tokenizer, into: Path) -> None:
    """The files of the tokenizer as they are, where they lie beside the model."""
    found = _tokenizer_files(folder)
    if found and load_tokenizer(str(folder)).fingerprint == tokenizer.fingerprint:
        for path in found:
            shutil.copyfile(path, into / path.name)
    else:
        tokenizer.save(into)


def _tokenizer_files(folder: Path) -> list[Path]:
    return sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})
