"""`tokenkit mined-mapping`: for every token of the student's vocabulary the nearest one of the teacher's."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tokenkit.align.vocabulary import MapKind, map_vocabulary, save_map, save_map_npy
from tokenkit.config import Config, UserError
from tokenkit.tokenizers.load import load_tokenizer


class MinedMappingRun(Config):
    """A run file of `tokenkit mined-mapping`."""

    output: Path
    """The folder that gets {kind}_mapping.safetensors; other files in it are left alone."""
    teacher: str
    """A folder, a tokenizer.json, a hub id, or `byte`."""
    student: str
    kind: MapKind = "mined"
    """mined: least edit distance; exact: equal bytes; prefix: the longest token that the student's begins with."""
    format: Literal["safetensors", "npy"] = "safetensors"
    """npy: {kind}_mapping.npy and {kind}_distances.json as well, for other programs."""
    workers: int = Field(0, ge=0)
    """Threads; 0 is one per core."""


def mined_mapping(run: MinedMappingRun) -> dict[str, Any]:
    """Writes the map; how many tokens have a counterpart, and how far off it is."""
    teacher, student = load_tokenizer(run.teacher), load_tokenizer(run.student)
    if run.output.exists() and not run.output.is_dir():
        raise UserError(f"output: {run.output} is a file; write the name of a folder")
    found = map_vocabulary(run.kind, student, teacher, workers=run.workers)
    run.output.mkdir(parents=True, exist_ok=True)
    path = save_map(run.output, found, run.kind, student, teacher)
    if run.format == "npy":
        save_map_npy(run.output, found, run.kind, student)
    return found.describe() | {"file": str(path)}
