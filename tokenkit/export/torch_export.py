"""A model as a program of `torch.export`: one .pt2 file that needs torch and none of the model's Python code.

`torch.export.load(path).module()(input_ids, attention_mask, position_ids, past)` gives the logits and the new cache,
with the shapes of `tokenkit.export.traced`; `past` is a list of (key, value).
"""

import json
import uuid
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.export.graph_verify import Call, verify_graph
from tokenkit.export.huggingface import TEXTS, refuse_existing
from tokenkit.export.quieted import clears_up, quieted
from tokenkit.export.traced import Signature, graph_model, signature_of, trace
from tokenkit.export.verify import ExportError
from tokenkit.tokenizers.base import Tokenizer


def export_torch(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    length: int | None = None,
) -> dict[str, Any]:
    """Writes the file, loaded again and compared before it has a name; its figures. Nothing in it is pickled.

    With a `length` everything has a fixed shape: one row of so many tokens, padded on the left, and no cache.
    """
    refuse_existing(path)
    if path.suffix != ".pt2":
        raise UserError(f"{path}: write a file name that ends in .pt2")
    traced = graph_model(model, tokenizer.vocab_size, dtype)
    signature = signature_of(traced, cached=length is None, length=length)
    draft = path.with_name(f"{path.stem}.tmp-{uuid.uuid4().hex[:8]}.pt2")
    path.parent.mkdir(parents=True, exist_ok=True)
    with clears_up():
        try:
            program = trace(traced, signature)
            program.example_inputs = None  # they would be pickled
            with quieted():
                torch.export.save(program, draft)
            _refuse_pickles(draft)
            rows = [[tokenizer.start_id(), *tokenizer.encode(text).ids.tolist()] for text in TEXTS]
            figures = verify_graph(program_call(draft, signature), signature, model, tokenizer, rows, path.name)
            draft.rename(path)
        finally:
            draft.unlink(missing_ok=True)
    return {"dtype": str(dtype).removeprefix("torch."), "bytes": path.stat().st_size, **figures}


def _refuse_pickles(path: Path) -> None:
    """ExportError where loading the file would unpickle anything: then it holds more than JSON and plain numbers."""
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            if part.filename.endswith("_config.json"):
                found = json.loads(archive.read(part))["config"].values()
                pickled = any(entry["use_pickle"] for entry in found)
            else:
                pickled = "/sample_inputs/" in part.filename and part.file_size > 0
            if pickled:
                raise ExportError(f"{path.name}: {part.filename} holds pickled objects")


def program_call(path: Path, signature: Signature) -> Call:
    """The file as a function of named tensors, computed by torch."""
    with quieted():
        module = torch.export.load(path).module()

    def call(given: dict[str, Tensor]) -> list[Tensor]:
        ids, mask, positions, *states = (given[name] for name in signature.inputs)
        past = list(zip(states[::2], states[1::2], strict=True))
        with torch.no_grad():
            return tree_leaves(module(ids, mask, positions, past))

    return call
