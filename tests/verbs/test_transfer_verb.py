"""`tokenkit transfer`: whole or not at all, there and back, and what it says of a mistake."""

import errno
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError, build
from tokenkit.models import tensor_files
from tokenkit.tokenizers.hf import HFTokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.train import train_tokenizer
from tokenkit.verbs.model import ModelChoice, load_pair
from tokenkit.verbs.transfer import TransferRun, donor_rows, reverse_words
from tokenkit.verbs.transfer_streamed import kept_template

SIZE = 310
TEXT = "the cat sat on a mat"


@pytest.fixture(scope="module")
def target(tmp_path_factory, documents) -> Path:
    folder = tmp_path_factory.mktemp("target")
    train_tokenizer(documents, "unigram", SIZE).save(folder)
    return folder


@pytest.fixture
def move(tokenkit, model_folder, target):
    """Transfers to a folder: what was printed."""

    def run(output: Path, *words: object) -> dict:
        code, out, error = tokenkit(
            "transfer", f"model.source={model_folder}", f"target_tokenizer={target}", f"output={output}", *words
        )
        assert code == 0, error
        assert all(len(line) <= 80 for line in out.splitlines() if "/" not in line)
        return yaml.safe_load(out)

    return run


def logits(folder: Path) -> torch.Tensor:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    with torch.no_grad():
        return model.eval()(tokenizer(TEXT, return_tensors="pt")["input_ids"]).logits


def one_line(result, *parts) -> None:
    code, out, error = result
    assert (code, out) == (2, ""), error
    assert error.count("\n") == 1, error
    for part in parts:
        assert str(part) in error


def test_streamed_and_in_memory_answer_alike(move, tmp_path, model_folder):
    figures = move(tmp_path / "a")
    assert figures["rows"] == SIZE
    assert sum(figures["origins"]["input"].values()) == SIZE
    other = move(tmp_path / "b", "in_memory=true")
    assert {key: figures[key] for key in other} == other
    assert torch.equal(logits(tmp_path / "a"), logits(tmp_path / "b"))
    a, b = (load_file(tmp_path / one / "model.safetensors") for one in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    settings = [GenerationConfig.from_pretrained(tmp_path / one).to_diff_dict() for one in "ab"]
    assert settings[0].items() >= {k: v for k, v in settings[1].items() if k.endswith("_token_id")}.items()
    half = move(tmp_path / "c", "export_dtype=bfloat16")
    assert half["rows"] == SIZE
    assert {t.dtype for t in load_file(tmp_path / "c/model.safetensors").values()} == {torch.bfloat16}


def test_the_table_says_what_every_row_is_made_of(move, tmp_path, model_folder):
    figures = move(tmp_path / "a", "transfer.untie=true")
    head, *lines = (tmp_path / "a/transfer_rows.tsv").read_text("utf-8").splitlines()
    assert head.split("\t") == ["id", "token", "side", "origin", "sources"]
    cells = [line.split("\t") for line in lines]
    for side in ("input", "head"):
        rows = [row for row in cells if row[2] in (side, "both")]
        assert [int(row[0]) for row in rows] == list(range(SIZE))
        counts = {origin: sum(row[3] == origin for row in rows) for origin in {row[3] for row in rows}}
        assert counts == figures["origins"][side]
    old, new = (load_file(folder / "model.safetensors") for folder in (model_folder, tmp_path / "a"))
    for index, _, side, _, sources in cells[::7]:
        parts = [part.split(":", 2) for part in sources.split()]
        if 0 < len(parts) < 8 and side != "head":
            mean = sum(float(w) * old["model.embed_tokens.weight"][int(i)] for i, w, _ in parts)
            torch.testing.assert_close(new["model.embed_tokens.weight"][int(index)], mean, atol=1e-4, rtol=1e-3)
    move(tmp_path / "b", "rows=false")
    assert not (tmp_path / "b/transfer_rows.tsv").exists()


def test_delta_and_the_way_back(move, tokenkit, tmp_path, model_folder, target):
    whole = move(tmp_path / "whole", "keep_reverse=true")
    small = move(tmp_path / "delta", "delta=true")
    assert small["stored_rows"] < whole["rows"]
    assert not (tmp_path / "delta/config.json").exists()
    base = f"model.source={model_folder}"
    code, _, error = tokenkit("transfer", base, f"model.delta={tmp_path / 'delta'}", f"output={tmp_path / 'again'}")
    assert code == 0, error
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes(), path.name
    model, tokenizer = load_pair(ModelChoice(source=str(model_folder), delta=tmp_path / "delta"), "cpu")
    assert tokenizer.vocab_size == len(model.get_input_embeddings().weight) == SIZE
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert all(torch.equal(t, found.state_dict()[k]) for k, t in model.state_dict().items())

    code, _, error = tokenkit("transfer", "--reverse", tmp_path / "whole", tmp_path / "back")
    assert code == 0, error
    assert {path.name for path in (tmp_path / "back").iterdir()} == {path.name for path in model_folder.iterdir()}
    for path in model_folder.iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes(), path.name
    one_line(tokenkit("transfer", "--reverse", tmp_path / "back", tmp_path / "x"), "no reverse/ inside")
    wrong = (
        "transfer",
        f"model.source={tmp_path / 'whole'}",
        f"model.delta={tmp_path / 'delta'}",
        f"output={tmp_path}/x",
    )
    one_line(tokenkit(*wrong), "made for input rows")
    code, _, error = tokenkit(
        "transfer", "--reverse", tmp_path / "again", tmp_path / "y", f"reverse_from={tmp_path}/whole"
    )
    assert code == 0, error
    assert not (tmp_path / "x").exists()


def test_mistakes_are_one_line(tokenkit, tmp_path, model_folder, target):
    words = ("transfer", f"model.source={model_folder}", f"output={tmp_path / 'x'}")
    one_line(tokenkit(*words), "target_tokenizer: nothing; write the tokenizer that the model is to have")
    to = (*words, f"target_tokenizer={target}")
    one_line(tokenkit(*to, "delta=true", "in_memory=true"), "delta: true, and in_memory=true needs the whole model")
    one_line(tokenkit(*to, "export_dtype=float16", "in_memory=false"), "export_dtype=float16 needs the whole model")
    one_line(tokenkit(*to, "reverse=true"), "reverse: the model says itself")
    one_line(tokenkit("transfer", "--reverse", "a"), "1 words without =; write MODEL OUTPUT")
    cut = tmp_path / "cut"
    cut.mkdir()
    for path in model_folder.iterdir():
        data = path.read_bytes()
        (cut / path.name).write_bytes(data[:-100] if path.suffix == ".safetensors" else data)
    one_line(
        tokenkit("transfer", f"model.source={cut}", f"output={tmp_path / 'x'}", f"target_tokenizer={target}"), "cut"
    )
    assert not (tmp_path / "x").exists()
    assert reverse_words(["a", "b", "rows=false"]) == ["model.source=a", "output=b", "rows=false", "reverse=true"]


def test_a_full_disk_leaves_nothing(tokenkit, tmp_path, model_folder, target, monkeypatch):
    written = []

    def full(*arguments: object) -> int:
        written.append(arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_files.os, "pwrite", full)
    words = ("transfer", f"model.source={model_folder}", f"output={tmp_path / 'x'}", f"target_tokenizer={target}")
    one_line(tokenkit(*words), "no space left on the disk")
    assert written
    assert list(tmp_path.iterdir()) == []


SLOW = """
import sys, time
import tokenkit.transfer.stream as stream
rows = stream.row_blocks
def one_and_wait(*arguments):
    for block in rows(*arguments):
        yield block
        print("written", flush=True)
        time.sleep(600)
stream.row_blocks = one_and_wait
from tokenkit.transfer import rows as sizes
sizes.BLOCK_BYTES = 40_000
from tokenkit.cli import main
sys.argv = ["tokenkit", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_half_way_nothing_stands(tmp_path, model_folder, target, how):
    words = ("transfer", f"model.source={model_folder}", f"output={tmp_path / 'x'}", f"target_tokenizer={target}")
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "written\n"
    time.sleep(0.2)
    begun = [path.name for path in tmp_path.iterdir()]
    assert len(begun) == 1
    assert begun[0].startswith("x.tmp-")
    child.send_signal(how)
    _, error = child.communicate(timeout=60)
    assert not (tmp_path / "x").exists()
    if how == signal.SIGKILL:
        assert child.returncode == -how
    else:
        assert child.returncode == 128 + how
        assert error.splitlines()[-1] == "tokenkit: stopped; nothing was written"
        assert list(tmp_path.iterdir()) == []


def test_the_template_goes_along_where_its_tokens_do(bpe):
    def with_template(text: str | None, *specials: str) -> HFTokenizer:
        definition = bpe.definition
        size = len(definition["model"]["vocab"])
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        extra = [{"id": size + i, "content": one, **plain} for i, one in enumerate(specials)]
        definition["added_tokens"] = [*definition["added_tokens"], *extra]
        return HFTokenizer(definition, bpe.config | ({} if text is None else {"chat_template": text}))

    template = "{{ '<|turn|>' + messages[0]['content'] }}"
    source = with_template(template, "<|turn|>")
    assert kept_template(source, with_template(None, "<|turn|>")) == template
    assert kept_template(source, with_template(None, "<|other|>")) is None
    assert kept_template(source, with_template("its own", "<|turn|>")) is None
    assert kept_template(with_template(None), with_template(None)) is None


def test_a_donor_is_read_by_rows_and_may_lack_some(model_folder, target, tmp_path):
    tokenizer = load_tokenizer(str(target))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = LlamaConfig(vocab_size=SIZE - 7, **sizes)
    donor = LlamaForCausalLM(config)
    donor.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    found = donor_rows(str(tmp_path), tokenizer)
    assert found["input"].shape == found["head"].shape == (SIZE - 7, 8)
    wanted = np.array([SIZE - 8, 3])
    assert torch.equal(found["input"].gather(wanted), donor.get_input_embeddings().weight[wanted])
    assert torch.equal(found["head"].gather(wanted), donor.lm_head.weight[wanted])
    with pytest.raises(UserError, match="has another tokenizer than"):
        donor_rows(str(model_folder), tokenizer)


def test_the_schema_knows_every_initialiser_with_options(tmp_path):
    values = {"output": tmp_path, "model": {"source": "x"}, "target_tokenizer": "byte"}
    run = build(TransferRun, values | {"transfer": {"initializer": "fvt", "fvt": {"keep_norm": True}}})
    assert run.transfer.choice().options == {"fvt": {"keep_norm": True}}
    assert json.loads(run.model_dump_json())["in_memory"] is None
    assert os.fspath(run.output) == str(tmp_path)


def test_the_guides_script_is_the_verb(move, model_folder, target, tmp_path, monkeypatch):
    move(tmp_path / "a")
    words = (
        f"source_model.pretrained_model_name_or_path={model_folder}",
        f"source_model.tokenizer_name={model_folder}",
        f"target_tokenizer_name={target}",
        f"output={tmp_path / 'b'}",
        "init=fvt",
    )
    monkeypatch.setattr(sys, "argv", ["zett", *words])
    runpy.run_path(str(Path(__file__).parents[2] / "scripts/zett.py"), run_name="__main__")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
