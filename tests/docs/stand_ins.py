"""What the pages speak of and the reader has: models, tokenizers, texts, run files, all tiny."""

import json
import shutil
from pathlib import Path

from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.docs.snippets import ROOT
from tokenkit.config import dump_yaml
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.word import WordTokenizer, write_vocabulary

MODELS = (
    "FOLDER",
    "FOLDER_OR_HUB_ID",
    "WHAT_IT_WAS",
    "my_model",
    "small_model",
    "large_model",
    "outputs/english_bpe/model",
    "outputs/english_unigram/model",
)
BPE = ("path/to/gpt2", "path/to/qwen2", "outputs/english_bpe/tokenizer")
UNIGRAM = ("my_tokenizer", "path/to/llama3", "path/to/tokenizer", "outputs/english_unigram/tokenizer")
LINKED = ("tokenkit", "runs", "scripts", "configs", "examples", "constraints.txt", "pyproject.toml", "benchmarks")
CHAT = {
    "messages": [
        {"role": "user", "content": "Where is the cat?"},
        {"role": "assistant", "content": "The cat sat on a mat."},
    ]
}
GUIDE = {
    "student": {"pretrained_model_name_or_path": "FOLDER"},
    "target_tokenizer_name": "byte",
    "ppl_eval_data": "held_out.txt",
}
MINIMAL = {  # what a run file of the verb needs at least; a yaml block of a page is laid over it
    "distill": {
        "output": "outputs/from_block",
        "model": {"source": "FOLDER"},
        "target_tokenizer": "byte",
        "losses": {"alm": {}},
        "data": {"source": {"path": "texts.txt"}},
        "train": {"steps": 2},
        "eval": {"source": {"path": "held_out.txt", "max_bytes": 300}},
    },
    "transfer": {"output": "outputs/from_block", "model": {"source": "FOLDER"}, "target_tokenizer": "byte"},
    "eval": {"model": {"source": "FOLDER"}, "eval": {"source": {"path": "held_out.txt", "max_bytes": 300}}},
    "synthesize": {"output": "outputs/from_block", "teacher": {"source": "FOLDER"}, "samples": 2},
}
MINIMAL["search"] = {"output": "outputs/from_block", "base": MINIMAL["distill"]}
CHOICES = ("losses", "source", "mixture")  # sections that a block replaces whole


def make_stand_ins(folder: Path, model: Path, bpe, unigram, documents: list[str]) -> Path:
    """A folder with everything that pages name before they have made it."""
    folder.mkdir()
    for name in MODELS:
        shutil.copytree(model, folder / name)
    for names, tokenizer in ((BPE, bpe), (UNIGRAM, unigram)):
        for name in names:
            (folder / name).mkdir(parents=True)
            tokenizer.save(folder / name)
    for name, kind, tokenizer in (("A", "Qwen2", "path/to/gpt2"), ("B", "Llama3", "path/to/llama3")):
        load_tokenizer(f"{folder / tokenizer}:target={kind}").save(folder / name)
    _write_adapter(folder)
    _write_texts(folder, documents)
    return folder


def _write_adapter(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "FOLDER")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder / "ADAPTER")


def _write_texts(folder: Path, documents: list[str]) -> None:
    def rows(name: str, values: list) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")

    for name in ("texts.txt", "TEXT"):
        (folder / name).write_text("\n\n".join(documents), "utf-8")
    (folder / "held_out.txt").write_text("\n\n".join(documents[-4:]), "utf-8")
    for name in ("texts.jsonl", "code.jsonl", "passages.jsonl", "outputs/transfer_corpora/english/train.jsonl"):
        rows(name, [{"text": text} for text in documents])
    rows("outputs/transfer_corpora/english/test.jsonl", [{"text": text} for text in documents[-4:]])
    rows("rows.jsonl", [CHAT] * 8)
    question = {"context": "the cat sat on a", "choices": [" mat", " fish"], "answer": 0}
    rows("questions.jsonl", [question] * 4)
    saved = Dataset.from_list([{"text": text} for text in documents])
    DatasetDict({"train": saved}).save_to_disk(folder / "folder")
    (folder / "CONFIG.yaml").write_text(dump_yaml(GUIDE), "utf-8")
    write_vocabulary(folder / "vocab.tsv", WordTokenizer.train(documents))
    for name in ("run.yaml", "RUN.YAML"):
        (folder / name).write_text(dump_yaml(MINIMAL["distill"] | {"output": "out"}), "utf-8")


def lay_out(stand_ins: Path, folder: Path, shared: Path | None) -> Path:
    """A page's own folder: the stand-ins, links to the parts of the repository, the shared data beside it."""
    work = folder / "work"
    shutil.copytree(stand_ins, work)
    for name in LINKED:
        (work / name).symlink_to(ROOT / name)
    if shared is not None:
        (folder / "shared").symlink_to(shared)
    return work


def laid_over(base: dict, block: dict) -> dict:
    """The keys of a block over a run file; of a loss, and of where text comes from, only the block's remain."""
    made = dict(base)
    for key, value in block.items():
        inside = made.get(key)
        if key not in CHOICES and isinstance(inside, dict) and isinstance(value, dict):
            made[key] = laid_over(inside, value)
        else:
            made[key] = value
    if "mixture" in block:
        made.pop("source", None)
    return made
