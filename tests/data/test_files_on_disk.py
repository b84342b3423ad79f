"""Parquet files as a source, and what reading leaves on the disk: nothing more the second time than the first."""

import tempfile

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from tokenkit.config import UserError, build
from tokenkit.data.corpus import DataConfig
from tokenkit.data.example import cut
from tokenkit.data.messages import read_dialogues
from tokenkit.data.source import SourceConfig, read_documents
from tokenkit.verbs.distill import distill
from tokenkit.verbs.distill_run import DistillRun


def write_parquet(path, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    return path


def test_parquet_is_read_like_json_lines_in_the_same_order(tmp_path, documents):
    path = write_parquet(tmp_path / "a.parquet", [{"id": i, "text": text} for i, text in enumerate(documents)])
    assert read_documents(SourceConfig(path=str(path))) == documents
    write_parquet(tmp_path / "b.parquet", [{"text": "last"}])
    (tmp_path / "c.txt").write_text("plain", "utf-8")
    assert read_documents(SourceConfig(path=str(tmp_path))) == [*documents, "last", "plain"]
    assert read_documents(SourceConfig(path=str(tmp_path / "*.parquet"), max_bytes=10)) == [documents[0][:10]]


def test_conversations_in_parquet(tmp_path):
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    path = write_parquet(tmp_path / "chat.parquet", [{"messages": messages}] * 3)
    found = read_dialogues(SourceConfig(path=str(path)))
    assert len(found) == 3
    assert [message["content"] for message in found[2].messages] == ["the cat", "sat"]


def test_what_is_no_parquet_or_has_no_text_is_one_line(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_text("no table", "utf-8")
    with pytest.raises(UserError, match="not readable as Parquet") as told:
        read_documents(SourceConfig(path=str(path)))
    assert "\n" not in str(told.value)
    write_parquet(path, [{"body": "a"}])
    with pytest.raises(UserError, match="row 0: no text under 'text'; its keys are body"):
        read_documents(SourceConfig(path=str(path)))


@pytest.mark.parametrize("limits", [{}, {"max_bytes": 100}])
def test_half_a_surrogate_pair_is_one_line(tmp_path, limits):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "a\\ud83d"}\n', "utf-8")
    with pytest.raises(UserError, match=r"half a surrogate pair, .* at character 1 of a text; read the text as UTF-8"):
        cut(read_documents(SourceConfig(path=str(path), **limits)), 512)
    path.write_text('{"messages": [{"role": "assistant", "content": "a\\ud83d"}]}\n', "utf-8")
    with pytest.raises(UserError, match="line 1: message 0: half a surrogate pair"):
        read_dialogues(SourceConfig(path=str(path)))


def test_a_glob_of_texts_leaves_folders_out(tmp_path):
    (tmp_path / "a.txt").write_text("plain", "utf-8")
    (tmp_path / "b").mkdir()
    assert read_documents(SourceConfig(path=str(tmp_path / "*"))) == ["plain"]


def test_windows_hold_a_character_at_least():
    """A window of no bytes would never end, and one of three could end inside a character."""
    source = {"source": {"path": "x.txt"}}
    for size in (-1, 0, 3):
        with pytest.raises(UserError, match=r"window_bytes: .*greater than or equal to 4"):
            build(DataConfig, source | {"window_bytes": size})
    text = "a\U0001f600é😀b c"
    size = build(DataConfig, source | {"window_bytes": 4}).window_bytes
    assert "".join(one.text for one in cut([text], size)) == text
    with pytest.raises(UserError, match=r"max_bytes: .*greater than or equal to 1"):
        build(DataConfig, {"source": {"path": "x.txt", "max_bytes": 0}})


@pytest.mark.parametrize("kind", ["path", "hub"])
def test_identical_runs_leave_no_more_files(tmp_path, monkeypatch, documents, model_folder, kind):
    """Neither among the caches of `datasets` nor among temporary files, after the first of three."""
    folders = [tmp_path / name for name in ("cache", "temporary")]
    source = tmp_path / "source"
    for folder in (*folders, source):
        folder.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folders[0])
    monkeypatch.setattr(tempfile, "tempdir", str(folders[1]))
    monkeypatch.setenv("TMPDIR", str(folders[1]))
    write_parquet(source / "train.parquet", [{"text": text} for text in documents])
    read = {"hub": str(source)} if kind == "hub" else {"path": str(source / "train.parquet")}

    def used():
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        return len(files), sum(path.stat().st_size for path in files)

    after = []
    for number in range(3):
        values = {
            "output": tmp_path / f"out{number}",
            "model": {"source": str(model_folder)},
            "target_tokenizer": "byte",
            "losses": {"alm": {}},
            "data": {"source": read, "window_bytes": 80},
            "train": {"steps": 1, "batch_size": 2, "mode": "embeddings"},
            "eval": {"source": {**read, "max_bytes": 200}, "context_tokens": 64},
        }
        distill(build(DistillRun, values), quiet=True)
        after.append(used())
    assert after[1] == after[2] == after[0]
    assert (after[0][0] > 0) == (kind == "hub")  # files of a folder are cached nowhere
