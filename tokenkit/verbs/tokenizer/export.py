"""`tokenkit tokenizer export`: a folder that transformers loads, believed only after another process has loaded it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenkit.config import Config, UserError
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.tokenizers.autoencoder.fast import fast_config, fast_definition
from tokenkit.tokenizers.autoencoder.package import Kind, Package
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer
from tokenkit.tokenizers.hf import HFTokenizer

VERIFIED_CHARACTERS = 4_000_000  # of the corpus
TEXTS = (
    "Hello, world!",
    "  two spaces,\r\n\n\ttab 12345 x_1 don't",
    "Grüße aus Łódź, 東京 и Москва 🙂👩\u200d👧 e\u0301",
    "def f(x):\n    return x\n",
    "<|bos|><|user|><0x41>\0\ufeff",
    "",
)
PROCESS = """
import json, sys
where, into, kind = sys.argv[1:]
if kind == "compact":
    sys.modules["tokenkit"] = None  # whoever loads this has no tokenkit
from pathlib import Path
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=kind == "open")
texts = json.loads(Path(into, "texts.json").read_text("utf-8"))
options = {"add_special_tokens": False, "split_special_tokens": True}
ids = tokenizer(texts, **options)["input_ids"]
back = [tokenizer.decode(one) for one in ids]
found = {"ids": ids, "back": back, "framed": tokenizer("a")["input_ids"], "size": len(tokenizer)}
Path(into, "found.json").write_text(json.dumps(found), "utf-8")
"""


class TokenizerExportRun(Config):
    """A run file of `tokenkit tokenizer export`."""

    model: Path
    """The folder of a learned tokenizer, or a checkpoint."""
    output: Path
    """A new folder."""
    kind: Kind = "compact"
    """compact: tokenizer.json, for anybody; open: codes too, for transformers with trust_remote_code and tokenkit."""
    corpus: SourceConfig | None = None
    """Text on which the written tokenizer must give the same ids, besides a few lines of ours."""


def export_tokenizer(run: TokenizerExportRun) -> dict[str, Any]:
    """Writes, loads in a process of its own, compares, and only then names the folder; what was compared."""
    if run.output.exists():
        raise UserError(f"{run.output}: exists; nothing is overwritten, choose a new output")
    texts = _texts(run.corpus)
    tokenizer = AutoEncoderTokenizer.load(run.model, run.kind)
    draft = run.output.with_name(f".{run.output.name}.{os.getpid()}.tmp")
    try:
        if run.kind == "compact":
            _write_compact(tokenizer.package, draft, run.output.name)
        else:
            _write_open(tokenizer.package, draft)
        found = _verify(draft, run.kind, tokenizer, texts)
        draft.rename(run.output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return {"output": str(run.output), "kind": run.kind, **found}


def _texts(corpus: SourceConfig | None) -> list[str]:
    texts, left = [*TEXTS], VERIFIED_CHARACTERS
    for text in read_documents(corpus) if corpus else ():
        if left > 0:
            texts.append(text[:left])
            left -= len(text)
    return texts


def _write_compact(package: Package, folder: Path, name: str) -> None:
    HFTokenizer(fast_definition(package.codec("compact")), fast_config(), name).save(folder)


def _write_open(package: Package, folder: Path) -> None:
    from tokenkit.tokenizers.autoencoder.huggingface import FSQTokenizer

    config = package.config.model_copy(update={"kind": "open"})
    replace(package, config=config, warm={}).save(folder)
    FSQTokenizer(folder).save_pretrained(folder)


def _verify(folder: Path, kind: Kind, tokenizer: AutoEncoderTokenizer, texts: Sequence[str]) -> dict[str, int]:
    from tokenkit.export.verify import ExportError

    expected = tokenizer.codec.encode_batch(texts)
    found = _loaded_elsewhere(folder, kind, texts)
    for text, ids, given, back in zip(texts, expected, found["ids"], found["back"]):
        if given != ids:
            raise ExportError(f"{folder.name}: {text[:80]!r} becomes {given[:20]} after reloading, not {ids[:20]}")
        if back != text:
            raise ExportError(f"{folder.name}: {text[:80]!r} comes back as {back[:80]!r}")
    framed = [tokenizer.get_bos_token(), *tokenizer.encode("a", add_special_tokens=False)]
    if found["framed"] != framed or found["size"] != tokenizer.vocab_size:
        raise ExportError(f"{folder.name}: {found['size']} ids and {found['framed']} for 'a', not {framed}")
    return {"texts": len(texts), "tokens": sum(map(len, expected)), "vocab_size": tokenizer.vocab_size}


def _loaded_elsewhere(folder: Path, kind: Kind, texts: Sequence[str]) -> dict[str, Any]:
    """What a process that has only just begun makes of the folder and the texts."""
    from tokenkit.export.verify import ExportError

    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "texts.json").write_text(json.dumps(texts), "utf-8")
        ours = str(Path(__file__).parents[3])
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": scratch,
            "PYTHONPATH": os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")])),
        }
        command = [sys.executable, "-c", PROCESS, str(folder.resolve()), scratch, kind]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=scratch)
        if done.returncode != 0:
            reason = (done.stderr.strip() or "no message").splitlines()[-1]
            raise ExportError(f"{folder.name}: cannot be loaded by transformers ({reason})")
        return json.loads(Path(scratch, "found.json").read_text("utf-8"))
