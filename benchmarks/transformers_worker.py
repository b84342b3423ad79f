"""Greedy continuations by stock transformers: what an application does with a folder of `format=huggingface`.

One thread, one prompt at a time. PROMPTS.json is a list of texts. OUT.json: {"texts": continuations without the prompt,
"ids": their tokens without the end, "load_s": seconds, imports included,
"generate_s": seconds, "tokens": how many were generated}.
Usage: python transformers_worker.py FOLDER PROMPTS.json MAX_NEW OUT.json
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

BEGIN = time.perf_counter()  # loading begins with the libraries

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def continuation(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """The text of ids behind a prompt; alone they would lose a space at their start."""
    before, whole = (tokenizer.decode(row, skip_special_tokens=True) for row in (prompt, prompt + ids))
    return whole[len(before) :]


def main(folder: str, prompts: list[str], most: int) -> dict[str, object]:
    """What the folder says after every prompt."""
    torch.set_num_threads(1)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    loaded = time.perf_counter()
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends} - {None}
    read, rows = [], []
    for prompt in prompts:
        given = tokenizer(prompt, return_tensors="pt")
        ids, mask = given["input_ids"], given["attention_mask"]
        output = model.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False)
        read.append(ids[0].tolist())
        rows.append(output[0, ids.shape[1] :].tolist())
    generated = time.perf_counter()
    kept = [[i for i in row if i not in ends] for row in rows]
    return {
        "texts": [continuation(tokenizer, ids, row) for ids, row in zip(read, kept, strict=True)],
        "ids": kept,
        "load_s": loaded - BEGIN,
        "generate_s": generated - loaded,
        "tokens": sum(map(len, rows)),
    }


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[2]).read_text("utf-8"))
    said = main(sys.argv[1], asked, int(sys.argv[3]))
    Path(sys.argv[4]).write_text(json.dumps(said, ensure_ascii=False), "utf-8")
