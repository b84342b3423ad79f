"""`tokenkit filter`: the documents of a source that read like text, and a report of why the others do not."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenkit.align.bias import write_whole
from tokenkit.config import Config, resolved
from tokenkit.data.quality import QualityConfig, QualityFilter
from tokenkit.data.source import SourceConfig, describe, read_documents, read_rows, source_files
from tokenkit.train.folder import RunFolder, write_json
from tokenkit.version import __version__

KEPT, REPORT = "kept.jsonl.gz", "report.json"


class FilterRun(Config):
    """A run file of `tokenkit filter`."""

    output: Path
    """Folder for kept.jsonl.gz and report.json."""
    source: SourceConfig
    """Where the documents come from. Of JSON lines and datasets the other keys of a row are kept with its text."""
    quality: QualityConfig = QualityConfig()


def filter_source(run: FilterRun) -> dict[str, Any]:
    """Writes the output folder; what the command prints."""
    rows = _rows(run.source)
    folder = RunFolder(run.output)
    folder.claim(resolved(run), resume=False)
    judge, sizes = QualityFilter(run.quality), {True: 0, False: 0}

    def write(path: Path) -> None:
        with path.open("wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as file:
            for row in rows:
                text = row[run.source.field]
                kept = not judge(text)
                sizes[kept] += len(text.encode())
                if kept:
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    write_whole(run.output / KEPT, write)
    about = {"source": describe(run.source), "documents": judge.documents, "kept": judge.kept}
    counts = {"bytes": sum(sizes.values()), "kept_bytes": sizes[True], **judge.counts()}
    bounds = {rule.name: _bounds(rule) for rule in run.quality.rules()}
    write_json(run.output / REPORT, {**about, **counts, "rules": bounds, "tokenkit": __version__})
    return {"output": str(run.output), **about, **counts}


def _rows(source: SourceConfig) -> Iterator[dict[str, Any]]:
    """The rows of JSON lines or of a dataset as they are, other documents as rows of their own; UserError at once."""
    whole = source.hub is not None or (
        source.path is not None and all(".jsonl" in p.suffixes for p in source_files(source))
    )
    if whole and source.max_bytes is None:
        found = (row for _, row in read_rows(source, source.field))
    else:
        found = ({source.field: text} for text in read_documents(source))
    return (row for row in found if row[source.field].strip())


def _bounds(rule: Any) -> dict[str, float]:
    return {
        key: value
        for key, value in (("at_least", rule.least), ("at_most", rule.most), ("below", rule.below))
        if abs(value) != float("inf")
    }
