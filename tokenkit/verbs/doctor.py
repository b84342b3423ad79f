"""`tokenkit doctor`: what to expect of a pair of tokenizers before any hour is spent."""

import json
import math
from pathlib import Path
from typing import Any

from tokenkit.align.doctor import Diagnosis, diagnose
from tokenkit.align.doctor_facts import ModelFacts
from tokenkit.config import Config, UserError
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.losses import LOSSES
from tokenkit.models.tensor_files import Entry, read_header
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.transfer import INITIALIZERS

CORPUS_BYTES = 4_000_000  # read where the corpus names no max_bytes: enough for every ratio, seconds of work


class DoctorRun(Config):
    """A run file of `tokenkit doctor`."""

    source: str
    """The tokenizer that the model has: a folder, a tokenizer.json, a hub id, or `byte`."""
    target: str
    """The tokenizer that it is to have."""
    model: Path | None = None
    """A folder of config.json and safetensors, of which only the headers are read."""
    corpus: SourceConfig | None = None
    """Text to measure on; its first 4 MB where it names no `max_bytes`."""


def doctor(run: DoctorRun) -> Diagnosis:
    """What was found of the pair."""
    model = None if run.model is None else read_model_facts(run.model)
    documents = None
    if run.corpus is not None:
        limit = CORPUS_BYTES if run.corpus.max_bytes is None else run.corpus.max_bytes
        documents = read_documents(run.corpus.model_copy(update={"max_bytes": limit}))
    return diagnose(
        load_tokenizer(run.source),
        load_tokenizer(run.target),
        corpus=documents,
        model=model,
        initializers=INITIALIZERS,
        losses=LOSSES,
    )


def read_model_facts(folder: Path) -> ModelFacts:
    """Sizes of a model, from config.json and the headers of its safetensors; no weight is read."""
    config = _read_config(folder)
    entries = _entries(folder)
    shapes = {name: entry.shape for name, entry in entries.items()}
    shape = (config.get("vocab_size"), config.get("hidden_size", config.get("n_embd")))
    if shape not in shapes.values():  # the configuration speaks of other sizes; no table is longer than that of tokens
        flat = [one for name, one in shapes.items() if len(one) == 2 and ("emb" in name or "wte" in name)]
        if not flat:
            raise UserError(f"{folder}: no matrix of {shape[0]} rows in the weights; is it a language model?")
        shape = max(flat)
    tables = [name for name, one in shapes.items() if one == shape]
    rows, width = shapes[tables[0]]
    total = sum(map(math.prod, shapes.values()))
    if config.get("tie_word_embeddings") and len(tables) == 2:  # stored twice, one matrix all the same
        total -= rows * width
        tables = tables[:1]
    size = entries[tables[0]].itemsize
    return ModelFacts(folder.name, rows, width, min(len(tables), 2), size, total)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"model {str(folder)!r}: no config.json there; write the folder of a Hugging Face model"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'}: holds no object; write the folder of a Hugging Face model")
    inner = config.get("text_config")
    return config | inner if isinstance(inner, dict) else config


def _entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of the folder by its name."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"model {str(folder)!r}: no *.safetensors inside; write the folder of a Hugging Face model")
    return {entry.name: entry for path in files for entry in read_header(path).entries}
