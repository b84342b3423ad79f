"""A checkpoint on disk: rows as safetensors gives them, tables by whatever name they have, damage in one line."""

import json
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError
from tokenkit.models.tensor_files import copy_file, copy_range, read_header, write_tensors
from tokenkit.transfer.shards import FileRows, local_folder, open_checkpoint, runs, same_bytes

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def saved(folder: Path, rows: int = 50, shard: str = "1GB", **options: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=rows, **SIZES, **options))
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_are_those_that_safetensors_gives(tmp_path: Path, dtype: torch.dtype) -> None:
    matrix = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    vector = torch.arange(40).to(dtype)
    save_file({"other": torch.ones(3), "m": matrix, "v": vector}, tmp_path / "a.safetensors")
    entries = {entry.name: entry for entry in read_header(tmp_path / "a.safetensors").entries}
    rows = FileRows(entries["m"])
    assert (rows.shape, rows.dtype) == ((40, 6), dtype)
    for ids in ([], [3], [0, 1, 2], [39, 0, 39, 7], list(range(40))):
        wanted = np.array(ids, np.int64)
        assert torch.equal(rows.raw(wanted), matrix[torch.from_numpy(wanted)])
        assert rows.gather(wanted).dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(FileRows(entries["v"]).raw(np.array([5, 1]))[:, 0], vector[[5, 1]])


@given(st.sets(st.integers(0, 60)))
def test_runs_cover_ascending_ids_without_gaps(chosen: set[int]) -> None:
    ids = np.array(sorted(chosen), np.int64)
    found = [ids[first:last].tolist() for first, last in runs(ids)]
    assert [i for part in found for i in part] == ids.tolist()
    assert all(part == list(range(part[0], part[-1] + 1)) for part in found)
    assert all(a[-1] + 1 < b[0] for a, b in pairwise(found))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["1GB", "4KB"])
def test_tables_of_a_saved_model(tmp_path: Path, tied: bool, shard: str) -> None:
    model = saved(tmp_path, shard=shard, tie_word_embeddings=tied)
    checkpoint = open_checkpoint(tmp_path)
    assert (len(checkpoint.files) > 1) == (shard == "4KB")
    tables = checkpoint.tables
    assert (tables.input, tables.head) == ("model.embed_tokens.weight", None if tied else "lm_head.weight")
    assert (tables.tied, tables.bias, tables.twins) == (tied, None, ())
    every = np.arange(50)
    assert torch.equal(checkpoint.rows(tables.input).raw(every), model.get_input_embeddings().weight)
    assert torch.equal(checkpoint.rows(tables.head or tables.input).raw(every), model.lm_head.weight)


def rewritten(folder: Path, change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_head_stored_twice_is_a_twin_and_another_one_is_a_head(tmp_path: Path) -> None:
    saved(tmp_path, tie_word_embeddings=True)
    name = "model.embed_tokens.weight"
    rewritten(tmp_path, lambda t: t | {"lm_head.weight": t[name] + 0})
    tables = open_checkpoint(tmp_path).tables
    assert (tables.input, tables.head, tables.twins) == (name, None, ("lm_head.weight",))
    rewritten(tmp_path, lambda t: t | {"lm_head.weight": t[name] + 1})
    tables = open_checkpoint(tmp_path).tables
    assert (tables.input, tables.head, tables.twins) == (name, "lm_head.weight", ())
    rewritten(
        tmp_path, lambda t: {("lm_head.weight" if k == name else k): v for k, v in t.items() if k != "lm_head.weight"}
    )
    tables = open_checkpoint(tmp_path).tables  # the one matrix bears the head's name
    assert (tables.input, tables.head, tables.input_name) == ("lm_head.weight", None, name)


def test_names_without_the_prefix_of_the_body_and_of_a_nested_model(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    rewritten(tmp_path / "a", lambda t: {k.removeprefix("model."): v for k, v in t.items()})
    assert open_checkpoint(tmp_path / "a").tables.input == "embed_tokens.weight"
    text = {**SIZES, "vocab_size": 50, "num_key_value_heads": 1, "head_dim": 8}
    vision = {**SIZES, "image_size": 28, "patch_size": 14}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, image_token_index=5))
    model.save_pretrained(tmp_path / "b")
    checkpoint = open_checkpoint(tmp_path / "b")
    rows = checkpoint.rows(checkpoint.tables.input).raw(np.arange(50))
    assert torch.equal(rows, model.get_input_embeddings().weight)
    assert checkpoint.tables.tied


def test_a_copy_of_a_file_is_that_file_and_holes_stay_holes(tmp_path: Path) -> None:
    old, new, part = tmp_path / "old", tmp_path / "new", tmp_path / "part"
    with old.open("wb") as file:
        file.write(b"begin")
        file.seek(40 << 20)
        file.write(b"middle" * 1000)
        file.truncate(90 << 20)
    copy_file(old, new)
    assert new.stat().st_size == 90 << 20
    assert new.stat().st_blocks * 512 < 1 << 20
    assert new.read_bytes() == old.read_bytes()
    with old.open("rb") as a, part.open("wb") as b:
        copy_range(a.fileno(), b.fileno(), (40 << 20) + 3, 10, 50)
    assert part.read_bytes() == bytes(10) + (b"middle" * 20)[3:53]


def test_written_files_are_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 4), "a": torch.arange(5, dtype=torch.int16), "none": torch.zeros(0, 2)}
    save_file(tensors, tmp_path / "old.safetensors", {"format": "pt", "é": "ü"})
    header = read_header(tmp_path / "old.safetensors")
    write_tensors(tmp_path / "new.safetensors", [(e.name, e) for e in header.entries], header.metadata)
    found = load_file(tmp_path / "new.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    again = read_header(tmp_path / "new.safetensors")
    assert again.metadata == header.metadata
    assert all(same_bytes(a, b) for a, b in zip(header.entries, again.entries, strict=True))


def header_of(**tensors: object) -> bytes:
    raw = json.dumps(tensors).encode()
    return struct.pack("<Q", len(raw)) + raw


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x05\x00",
        struct.pack("<Q", 10**9) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        header_of(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}) + bytes(4),
        header_of(a={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),
        header_of(a={"dtype": "F32", "shape": [1]}) + bytes(4),
        header_of(a={"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}),
    ],
)
def test_damaged_headers_are_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"not a safetensors file \(.*\); fetch it again") as error:
        read_header(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        local_folder(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"no config\.json inside"):
        open_checkpoint(tmp_path)
    saved(tmp_path, shard="4KB")
    (tmp_path / "model-00002-of-00016.safetensors").unlink(missing_ok=True)
    lost = sorted(tmp_path.glob("*.safetensors"))[3]
    lost.unlink()
    with pytest.raises(UserError, match=r"no model-.*\.safetensors inside; take a complete checkpoint"):
        open_checkpoint(tmp_path)
    saved(tmp_path / "b")
    rewritten(tmp_path / "b", lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"})
    with pytest.raises(UserError, match="no output matrix"):
        _ = open_checkpoint(tmp_path / "b").tables
    saved(tmp_path / "c")
    config = json.loads((tmp_path / "c/config.json").read_text())
    (tmp_path / "c/config.json").write_text(json.dumps(config | {"vocab_size": 51}))
    with pytest.raises(UserError, match=r"is \(50, 16\), and config.json says \(51, 16\)"):
        _ = open_checkpoint(tmp_path / "c").tables
    save_file({"m": torch.zeros(2, 2, dtype=torch.int8)}, tmp_path / "q.safetensors")
    with pytest.raises(UserError, match="take the model before it was quantised"):
        FileRows(read_header(tmp_path / "q.safetensors").entries[0])
