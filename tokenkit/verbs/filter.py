"""`tokenkit filter`: the documents of a source that read like text, and a report of why the others do not."""

import gzip
import json
from pathlib import Path
from typing import Any

from tokenkit.config import Config, UserError, dump_yaml, resolved
from tokenkit.data.quality import QualityConfig, QualityFilter
from tokenkit.data.source import SourceConfig, describe, is_dataset, read_documents, read_rows, source_files
from tokenkit.export.huggingface import drafted
from tokenkit.train.folder import RUN_FILE, write_json, write_text
from tokenkit.version import __version__

KEPT, REPORT = "kept.jsonl.gz", "report.json"


class FilterRun(Config):
    """A run file of `tokenkit filter`."""

    output: Path
    """Folder for kept.jsonl.gz, report.json and run.yaml; as `data.source.path` of another run it is read as text."""
    source: SourceConfig
    """Where the documents come from. Of JSON lines and datasets the other keys of a row are kept with its text."""
    quality: QualityConfig = QualityConfig()


def filter_source(run: FilterRun) -> dict[str, Any]:
    """Writes the output folder, whole or not at all; what the command prints."""
    with drafted(run.output) as folder:
        judge, sizes = QualityFilter(run.quality), {True: 0, False: 0}
        with (folder / KEPT).open("wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as file:
            for row in _rows(run.source):
                text = row[run.source.field]
                kept = not judge(text)
                sizes[kept] += len(text.encode())
                if kept:
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        found = {
            "source": describe(run.source),
            "documents": judge.documents,
            "kept": judge.kept,
            "bytes": sum(sizes.values()),
            "kept_bytes": sizes[True],
            **judge.counts(),
        }
        rules = {rule.name: rule.bounds() for rule in run.quality.rules()}
        write_json(folder / REPORT, {**found, "rules": rules, "tokenkit": __version__})
        write_text(folder / RUN_FILE, dump_yaml(resolved(run)))
    return {"output": str(run.output), **found}


def _rows(source: SourceConfig) -> list[dict[str, Any]]:
    """The rows of JSON lines or of a dataset as they are, other documents as rows of their own."""
    lines = source.path is not None and all(".jsonl" in path.suffixes for path in source_files(source))
    if not (lines or is_dataset(source)) or source.max_bytes is not None:
        return [{source.field: text} for text in read_documents(source)]
    found = []
    for place, row in read_rows(source, source.field):
        if not isinstance(row[source.field], str):
            raise UserError(f"{place}: no text under {source.field!r}; set source.field")
        if row[source.field].strip():
            found.append(row)
    return found
