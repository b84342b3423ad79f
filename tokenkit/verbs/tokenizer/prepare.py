"""`tokenkit tokenizer prepare`: text → a folder of documents split in two, and counted chunks."""

from pathlib import Path
from typing import Any

from pydantic import model_validator

from tokenkit.config import UserError
from tokenkit.data.chunk_corpus import ChunkDataConfig, Tell, prepare_corpus


class TokenizerPrepareRun(ChunkDataConfig):
    """A run file of `tokenkit tokenizer prepare`."""

    output: Path
    """A new folder; `data.prepared` of `tokenkit tokenizer pretrain`."""

    @model_validator(mode="after")
    def _from_text(self) -> "TokenizerPrepareRun":
        if self.source is None:
            raise UserError("prepared: is what comes out; give source, the text to prepare")
        return self


def prepare(run: TokenizerPrepareRun, tell: Tell) -> dict[str, Any]:
    """Reads, splits, counts and writes; the statistics that are also in `output/statistics.json`.

    `tell` gets a line of progress every 100 files or 5 seconds.
    """
    return prepare_corpus(run, run.output, tell)
