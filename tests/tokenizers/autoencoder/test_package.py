"""A folder gives the tokenizer that was saved or one line that says why not; a compact one knows nothing of torch."""

import json
import multiprocessing
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tokenkit.config import UserError
from tokenkit.tokenizers.autoencoder.package import (
    CONFIG,
    FINGERPRINT,
    PINS,
    WARM,
    WEIGHTS,
    Package,
    fingerprint_of,
    is_package,
)
from tokenkit.tokenizers.autoencoder.pins import MAGIC, PinTable
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer, save_with_fast
from tokenkit.tokenizers.load import load_tokenizer

TEXT = "the cat 中文 qzx été\r\n😀 \0\0\0"


@pytest.fixture
def folder(make_folder, tmp_path) -> Path:
    return shutil.copytree(make_folder("open"), tmp_path / "open")


def one_line(folder: Path, part: str) -> None:
    with pytest.raises(UserError) as caught:
        Package.load(folder).codec()
    assert part in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["compact", "open"])
def test_what_is_saved_is_loaded(make_package, make_folder, tmp_path, kind):
    saved = Package.load(make_folder(kind))
    assert is_package(make_folder(kind))
    assert saved.config == make_package(kind).config
    assert saved.pins == make_package(kind).pins
    wanted = make_package(kind).codec().encode(TEXT)
    assert saved.codec().encode(TEXT) == wanted
    fingerprint = saved.save(tmp_path / "again")
    assert fingerprint == fingerprint_of(make_folder(kind)) == (tmp_path / "again" / FINGERPRINT).read_text().strip()
    assert Package.load(tmp_path / "again").codec().encode(TEXT) == wanted
    assert not list((tmp_path / "again").glob(".*"))


def test_an_open_package_has_a_compact_form(make_folder, make_package):
    codec = Package.load(make_folder("open"), "compact").codec("compact")
    assert codec.layout.num_codes == 0
    assert codec.encode(TEXT) == make_package("compact").codec().encode(TEXT)


@pytest.mark.parametrize(
    "changes", [{"chunker": "word"}, {"max_chunk": 8}, {"first_regular_id": 32}, {"names": ("<|tool|>",)}]
)
def test_a_fingerprint_is_of_all_that_decides_ids(make_package, tmp_path, changes):
    plain = make_package("compact").save(tmp_path / "plain")
    assert make_package("compact").save(tmp_path / "same") == plain
    assert make_package("compact", **changes).save(tmp_path / "other") != plain


@pytest.mark.parametrize("name", [CONFIG, PINS, WEIGHTS])
def test_a_changed_file_is_noticed(folder, name):
    data = bytearray((folder / name).read_bytes())
    if name == CONFIG:
        (folder / name).write_text((folder / name).read_text().replace('"joined"', '"word"'))
    else:
        data[-40] ^= 1
        (folder / name).write_bytes(data)
    one_line(folder, "changed since")
    (folder / FINGERPRINT).write_text(fingerprint_of(folder))
    if name == PINS:
        one_line(folder, "not a whole table")


@pytest.mark.parametrize("name", [CONFIG, PINS, FINGERPRINT, WEIGHTS])
@pytest.mark.parametrize("content", [None, b"", b"\x80\x04K\x01.", b"{}", b"[1]"])
def test_damaged_files_are_one_line(folder, name, content):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        Package.load(folder)
    assert "\n" not in str(caught.value)
    if name == CONFIG:
        return
    (folder / FINGERPRINT).write_text(fingerprint_of(folder) + "\n")  # somebody sealed the damage
    if name != FINGERPRINT:
        one_line(folder, str(folder))


def test_a_table_that_lies_about_its_size_is_one_line(make_package, tmp_path):
    import hashlib

    for head in (struct.pack("<IH", 1 << 31, 0), struct.pack("<IH", 3, 0), struct.pack("<IH", 0, 65535)):
        body = MAGIC + head + struct.pack("<256Q", *[0] * 256) + b"\xff" * 9
        (tmp_path / PINS).write_bytes(body + hashlib.sha256(body).digest())
        with pytest.raises(UserError, match="contradicts itself"):
            PinTable.load(tmp_path / PINS)


def test_unknown_settings_are_named(folder):
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | {"chuncker": "word"}))
    one_line_message = "did you mean 'chunker'"
    with pytest.raises(UserError, match=one_line_message):
        Package.load(folder)
    (folder / CONFIG).write_text(json.dumps(values | {"arithmetic": 99}))
    (folder / FINGERPRINT).write_text(fingerprint_of(folder))
    one_line(folder, "arithmetic 99")


def test_a_network_of_another_shape_is_one_line(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if name != "missing"}, folder / WEIGHTS)
    (folder / FINGERPRINT).write_text(fingerprint_of(folder))
    one_line(folder, "not the weights of this network")


def test_a_compact_package_has_no_codes_to_open(make_folder):
    with pytest.raises(UserError, match="no auto-encoder"):
        Package.load(make_folder("compact"), "open")


def test_warm_chunks_are_kept_and_change_nothing(make_package, tmp_path):
    package = make_package("compact")
    codec = package.codec()
    warm = {chunk: codec.spell(chunk) for chunk in codec.split("the cat été\udcff  \n 中文")}
    warmed = type(package)(package.config, package.pins, warm=warm)
    assert warmed.save(tmp_path) == package.save(tmp_path / "plain")  # ids are the same, and so is the fingerprint
    loaded = Package.load(tmp_path)
    assert loaded.warm == warm
    assert loaded.codec().encode(TEXT) == codec.encode(TEXT)
    content = (tmp_path / WARM).read_bytes()
    half, wrong = content[: len(content) // 2], bytes([*content[:-3], content[-3] ^ 1, *content[-2:]])
    for damaged in (half, wrong):
        (tmp_path / WARM).write_bytes(damaged)
        with pytest.raises(UserError, match=WARM):
            Package.load(tmp_path)
    (tmp_path / WARM).write_bytes(content)
    package.save(tmp_path)  # without warm chunks
    assert Package.load(tmp_path).warm == {}
    make_package("compact", "word").save(tmp_path)
    (tmp_path / WARM).write_bytes(content)
    with pytest.raises(UserError, match=WARM):
        Package.load(tmp_path)


def run_alone(code: str, *arguments: object) -> str:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True, text=True, env=environment
    ).stdout


def test_a_compact_tokenizer_needs_no_torch(make_folder):
    code = """
import sys
from pathlib import Path
def peak():  # not that of getrusage, which a process inherits
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
from tokenkit.tokenizers.autoencoder.tokenizer import AutoEncoderTokenizer
tokenizer = AutoEncoderTokenizer.load(sys.argv[1])
assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
stream = tokenizer.encode_stream()
assert stream.feed("the") + stream.flush() == tokenizer.encode("the", False)
import tokenkit
house = tokenkit.load_tokenizer(sys.argv[1])
assert house.decode(house.encode("the cat").ids.tolist()) == "the cat"
assert not {"torch", "transformers"} & set(sys.modules), "torch was imported"
print(peak() - before)
"""
    kilobytes = int(run_alone(code, make_folder("compact")))
    assert kilobytes < 64_000, f"{kilobytes} KB over a bare Python"


@pytest.mark.parametrize("kind", ["compact", "open"])
def test_tokenizers_can_be_sent(make_folder, kind):
    house = load_tokenizer(str(make_folder(kind)))
    listed = AutoEncoderTokenizer.load(make_folder(kind))
    wanted = house.encode(TEXT).ids.tolist()
    assert listed.encode(TEXT, add_special_tokens=False) == wanted
    for tokenizer in (house, listed):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.codec.cache.statistics()["recent"] == 0
        assert copy.codec.encode(TEXT) == wanted
        assert copy.codec.decode(wanted) == TEXT
    assert pickle.loads(pickle.dumps(house)).fingerprint == house.fingerprint


def test_a_tokenizer_is_not_sent_into_another_folder(make_package, tmp_path):
    save_with_fast(make_package("compact"), tmp_path)
    sent = pickle.dumps(load_tokenizer(str(tmp_path)))
    save_with_fast(make_package("compact", "word"), tmp_path)
    with pytest.raises(UserError, match="another tokenizer"):
        pickle.loads(sent)


def ids_there(tokenizer, queue) -> None:
    queue.put(tokenizer.codec.encode(TEXT))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("kind", ["compact", "open"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_another_process_gives_the_same_ids(make_folder, kind, method):
    context = multiprocessing.get_context(method)
    tokenizer = load_tokenizer(str(make_folder(kind)))
    wanted = tokenizer.codec.encode(TEXT)
    queue = context.Queue()
    process = context.Process(target=ids_there, args=(tokenizer, queue))
    process.start()
    assert queue.get(timeout=60) == wanted
    process.join(60)
    assert process.exitcode == 0
