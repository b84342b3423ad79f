"""`tokenkit mined-mapping`: what it writes can be read again for this pair only, and mistakes are one line."""

import numpy as np
import pytest
import yaml

from tokenkit.align.vocabulary import load_mined
from tokenkit.tokenizers.bytelevel import ByteTokenizer
from tokenkit.tokenizers.load import load_tokenizer


@pytest.mark.parametrize("kind", ["mined", "exact", "prefix"])
def test_a_map_on_disk(tokenkit, model_folder, tmp_path, kind):
    words = (f"teacher={model_folder}", "student=byte", f"output={tmp_path / 'maps'}", f"kind={kind}", "workers=1")
    code, out, error = tokenkit("mined-mapping", *words)
    assert code == 0, error
    teacher = load_tokenizer(str(model_folder))
    found = load_mined(tmp_path / "maps", teacher, ByteTokenizer(), kind)
    told = yaml.safe_load(out)
    assert told["mapped"] == int((found.teacher_id >= 0).sum())
    assert told["equal"] == int((found.distance == 0).sum()) >= 256  # a byte-level BPE holds every byte
    assert [teacher.token_bytes[index] for index in found.teacher_id[:256]] == [bytes([byte]) for byte in range(256)]
    code, again, _ = tokenkit("mined-mapping", *words, "format=npy")
    assert (code, again) == (0, out)
    names = {f"{kind}_mapping.safetensors", f"{kind}_mapping.npy", f"{kind}_distances.json"}
    assert {path.name for path in (tmp_path / "maps").iterdir()} == names
    assert np.array_equal(np.load(tmp_path / "maps" / f"{kind}_mapping.npy"), found.teacher_id)


def test_mistakes(tokenkit, model_folder, tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    right = {"teacher": model_folder, "student": "byte", "output": tmp_path / "maps"}
    for change, message in (
        ({"kind": "mine"}, "kind"),
        ({"student": tmp_path / "no"}, "no such"),
        ({"output": tmp_path / "file"}, "is a file; write the name of a folder"),
        ({"workers": -1}, "workers"),
    ):
        code, out, error = tokenkit("mined-mapping", *(f"{key}={value}" for key, value in (right | change).items()))
        assert (code, out) == (2, "")
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "maps").exists()


def test_a_dry_run_writes_nothing(tokenkit, model_folder, tmp_path):
    code, out, _ = tokenkit(
        "mined-mapping", f"teacher={model_folder}", "student=byte", f"output={tmp_path / 'maps'}", "--dry-run"
    )
    assert code == 0
    assert yaml.safe_load(out)["kind"] == "mined"
    assert not (tmp_path / "maps").exists()
