"""Reading the same data again leaves nothing new on the disk, whichever way it lies there."""

import json
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict

from tokenkit.config import UserError, build
from tokenkit.data.batch import Batches
from tokenkit.data.corpus import DataConfig, read_texts, read_training_rows
from tokenkit.data.source import SourceConfig, read_documents, read_rows


def files_in(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder that the datasets package caches in."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", folder)
    return folder


@pytest.fixture
def texts(tmp_path) -> Path:
    folder, rows = tmp_path / "texts", {"text": [f"text {i} of some words" for i in range(30)]}
    Dataset.from_dict(rows).to_parquet(folder / "parquet" / "train.parquet")
    Dataset.from_dict(rows).save_to_disk(folder / "saved")
    DatasetDict({"train": Dataset.from_dict(rows), "test": Dataset.from_dict({"text": ["held out"]})}).save_to_disk(
        folder / "splits"
    )
    (folder / "lines").mkdir()
    (folder / "lines" / "train.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in rows["text"]), "utf-8"
    )
    return folder


@pytest.mark.parametrize(
    ("key", "name", "written"),
    [
        ("path", "parquet", False),
        ("path", "lines", False),
        ("saved", "saved", False),
        ("saved", "splits", False),
        ("hub", "parquet", True),
        ("hub", "lines", True),
    ],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["held", "streaming"])
def test_three_runs_leave_what_the_first_one_left(bpe, texts, cache, key, name, written, streaming):
    data = build(DataConfig, {"source": {key: str(texts / name)}, "streaming": streaming, "packing": True})
    left, before = [], files_in(texts)
    for _ in range(3):
        batches = Batches(read_training_rows(data), bpe, None, batch_size=4, seed=0, pack_bytes=data.pack_bytes)
        for step in range(3):
            batches.at(step)
        assert len(read_texts(data)) == 30
        left.append({name: size for name, size in files_in(cache).items() if not name.endswith(".lock")})
    assert left[0] == left[1] == left[2]
    assert bool(left[0]) == (written and not streaming)  # held, a hub dataset is kept as Arrow, once
    assert files_in(texts) == before


def test_a_saved_dataset_has_splits_and_rows(texts):
    assert read_documents(SourceConfig(saved=str(texts / "splits"), split="test")) == ["held out"]
    place, row = next(read_rows(SourceConfig(saved=str(texts / "saved")), "text"))
    assert place == f"{texts / 'saved'}, row 0"
    assert row == {"text": "text 0 of some words"}
    with pytest.raises(UserError, match=r"splits: no split 'dev'; it has train, test; set source.split"):
        read_documents(SourceConfig(saved=str(texts / "splits"), split="dev"))
    with pytest.raises(UserError, match=r"saved: no column 'words'; it has text; set source.field"):
        read_documents(SourceConfig(saved=str(texts / "saved"), field="words"))
    with pytest.raises(UserError, match="lines: cannot be loaded as a dataset"):
        read_documents(SourceConfig(saved=str(texts / "lines")))
