"""Tokenizers of one's own: a class or function in a file, the checks it has to pass, where it can stand."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from tokenkit.align.spans import align
from tokenkit.config import UserError, build
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.own import PROBES, require_kept
from tokenkit.verbs.distill import DistillRun
from tokenkit.verbs.prepare import prepare
from tokenkit.verbs.transfer import TransferRun, transfer

EXAMPLE = Path(__file__).parents[2] / "examples/my_tokenizer.py"
BYTES = """
from tokenkit.tokenizers.own import OwnTokenizer

class Mine(OwnTokenizer):
    def __init__(self):
        super().__init__([bytes([byte]) for byte in range(256)])
    def pieces(self, text):
        return text.encode()
"""


def written(folder: Path, text: str) -> str:
    (folder / "mine.py").write_text(text, "utf-8")
    return f"{folder}/mine.py:Mine"


def test_a_class_of_the_examples_is_a_tokenizer_and_aligns():
    tokenizer = load_tokenizer(f"{EXAMPLE}:Endings")
    assert isinstance(tokenizer, Tokenizer)
    encoding = tokenizer.encode("the kind walking", special=True)
    spelled = [tokenizer.token_bytes[index] for index in encoding.ids]
    assert spelled == [b"", b"the", b" kind", b" walk", b"ing"]
    assert encoding.starts.tolist() == [0, 0, 3, 8, 13]
    assert encoding.segment.tolist() == [0, 1, 1, 1, 1]
    found = align(tokenizer.encode("the kind"), load_tokenizer("byte").encode("the kind"))
    assert found.spans.tolist() == [[0, 1, 0, 3], [1, 2, 3, 8]]


def test_another_process_gets_the_same(tmp_path):
    tokenizer = load_tokenizer(written(tmp_path, BYTES))
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.fingerprint == tokenizer.fingerprint
    assert np.array_equal(again.encode("é").ids, [195, 169])


def test_another_source_is_another_fingerprint(tmp_path):
    first = load_tokenizer(written(tmp_path, BYTES)).fingerprint
    second = load_tokenizer(written(tmp_path, BYTES.replace("return text", "return  text"))).fingerprint
    assert first != second


def test_a_function_whose_tokenizer_can_be_saved_is_a_target(tmp_path, model_folder):
    name = f"{EXAMPLE}:numbers_apart"
    run = {"output": str(tmp_path / "moved"), "model": {"source": str(model_folder)}, "target_tokenizer": name}
    transfer(build(TransferRun, run))
    kept, own = load_tokenizer(str(tmp_path / "moved")), load_tokenizer(name)
    assert [kept.encode(text).ids.tolist() for text in PROBES] == [own.encode(text).ids.tolist() for text in PROBES]


def test_one_that_cannot_be_saved_is_refused_as_a_student_before_any_training(tmp_path, model_folder, corpus):
    run = {"output": str(tmp_path / "out"), "model": {"source": str(model_folder)}, "losses": {"clm": {}}}
    run |= {"target_tokenizer": f"{EXAMPLE}:Endings", "data": {"source": {"path": str(corpus)}}, "train": {"steps": 1}}
    with pytest.raises(UserError, match="a Python tokenizer that cannot be written"):
        prepare(build(DistillRun, run | {"eval": {"source": {"path": str(corpus)}}}))


def test_a_save_that_writes_another_tokenizer_is_found_out(tmp_path):
    save = "    def save(self, folder):\n        ByteTokenizer().save(folder)\n"
    other = BYTES.replace("return text.encode()", "return (256 + byte for byte in text.encode())")
    other = other.replace("__([bytes([byte]) for byte in range(256)])", "__([bytes([b % 256]) for b in range(512)])")
    head = "from tokenkit.tokenizers.bytelevel import ByteTokenizer\n"
    tokenizer = load_tokenizer(written(tmp_path, head + other + save))
    with pytest.raises(UserError, match=r"what save.. wrote gives other ids for 'The cat"):
        require_kept(tokenizer, load_tokenizer)
    require_kept(load_tokenizer(written(tmp_path, head + BYTES + save)), load_tokenizer)


WRONG = {
    "no Python": ("def", "line 1: not valid Python"),
    "nothing of that name": ("Yours = 1", "holds no class or function 'Mine'"),
    "raises": ("def Mine():\n    return 1 / 0", "line 2: division by zero"),
    "no tokenizer": ("class Mine:\n    name = ''", "lacks added_tokens, bos_id, changes"),
    "does not spell": (BYTES.replace("text.encode()", "text.strip().encode()"), "do not spell it"),
    "raises on a text": (BYTES.replace("text.encode()", "text.encode('ascii')"), "line 8: 'ascii' codec"),
    "special in text": (
        BYTES + "    def encode(self, text, special=False):\n        return super().encode(text, special=True)\n",
        "running text became a special token",
    ),
    "fingerprint": (
        BYTES + "    @property\n    def fingerprint(self):\n        return 'a'\n",
        "fingerprint has to be a sha256",
    ),
    "decodes otherwise": (
        BYTES + "    def decode(self, ids):\n        return super().decode(ids).lower()\n",
        "decode.encode.text.. is not the text",
    ),
    "spans": (
        BYTES + "    def encode(self, text, special=False):\n        found = super().encode(text)\n"
        "        return type(found)(found.ids, found.starts, found.ends + 1, found.special, found.segment)\n",
        "do not tile the text",
    ),
    "batch": (
        BYTES + "    def encode_batch(self, texts, special=False, continued=False):\n"
        "        return [self.encode(text[:3]) for text in texts]\n",
        "encode_batch does not give what encode gives",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_breaks_the_contract_is_refused_in_one_line(tmp_path, case):
    source, message = WRONG[case]
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(written(tmp_path, source))
    assert "\n" not in str(caught.value)


def test_no_such_file_and_no_keys(tmp_path):
    with pytest.raises(UserError, match="no such file; paths start at the working directory"):
        load_tokenizer(f"{tmp_path}/none.py:Mine")
    with pytest.raises(UserError, match="a Python tokenizer is what its code says; leave the keys out"):
        load_tokenizer(f"{EXAMPLE}:Endings:target=Qwen2")
