"""A file is written whole or not at all."""

import pytest

from tokenkit.config import UserError
from tokenkit.tokenizers.whole_file import write_whole


def test_a_file_and_its_folder(tmp_path):
    path = tmp_path / "new" / "file.bin"
    for data in (b"", b"\0\xff"):
        write_whole(path, data)
        assert path.read_bytes() == data
    assert [*path.parent.iterdir()] == [path]


def test_a_failure_leaves_what_was_there(tmp_path):
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    (tmp_path / "file").write_bytes(b"old")
    for path in (tmp_path / "taken", tmp_path / "file" / "below.bin"):
        with pytest.raises(UserError, match="cannot be written"):
            write_whole(path, b"new")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["file", "taken"]
    assert (tmp_path / "file").read_bytes() == b"old"
