"""What a report holds: the closed schema of `report.json`, written by a run and read by the page."""

import json
import textwrap
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, field_validator

from tokenkit.config import Config, UserError, build

REPORT = "report.json"
Kind = Literal["teacher", "zero_shot", "clm", "alm", "trained"]


class Bar(Config):
    """Bits per byte of one model on the held-out text of its group (the target)."""

    group: str
    label: str
    kind: Kind
    bits_per_byte: Annotated[float, Field(gt=0)]
    sd: Annotated[float, Field(ge=0)] | None = None


class Curve(Config):
    """One training run, and where its metrics lie inside the run folder."""

    label: str
    kind: Kind
    metrics: str

    @field_validator("metrics")
    @classmethod
    def _inside_the_folder(cls, value: str) -> str:
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts or "\0" in value:
            raise UserError(f"curves: metrics {value!r} lies outside the run folder; write a path relative to it")
        return value


class Chunk(Config):
    """Text that both tokenisations cut at both ends, with each side's natural log-probability of it."""

    text: str
    teacher_tokens: tuple[str, ...]
    student_tokens: tuple[str, ...]
    teacher_logp: float | None = None
    student_logp: float | None = None


class Aligned(Config):
    """One text in both tokenisations."""

    title: str
    teacher_name: str
    student_name: str
    chunks: tuple[Chunk, ...]


class Output(Config):
    """What one model wrote."""

    label: str
    text: str


class Sample(Config):
    """One prompt and what each model made of it."""

    prompt: str
    outputs: tuple[Output, ...]


class Fact(Config):
    """One line of the header."""

    name: str
    value: str


class Report(Config):
    """The whole of `report.json`."""

    title: str
    subtitle: str = ""
    version: str
    bars: tuple[Bar, ...] = ()
    curves: tuple[Curve, ...] = ()
    aligned: tuple[Aligned, ...] = ()
    samples: tuple[Sample, ...] = ()
    facts: tuple[Fact, ...] = ()
    run: str = ""
    """The resolved run file, as YAML."""


def read_report(folder: Path) -> Report:
    """The checked content of `folder/report.json`."""
    path = folder / REPORT
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the folder of a finished run") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # both not UTF-8 and not JSON
        raise UserError(f"{path}: damaged, not JSON ({error}); write the report again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, where an object is expected; write the report again")
    try:
        return build(Report, values)
    except UserError as error:  # a wrong value may be a whole list of chunks
        raise UserError(f"{path}: {textwrap.shorten(str(error), 300, placeholder=' …')}") from None
