"""Greedy continuations by onnxruntime alone: what an application does with a folder of `tokenkit export format=onnx`.

Reads FOLDER/model.onnx, tokenizer.json and generation_config.json with onnxruntime, numpy and tokenizers, one thread,
one prompt at a time. PROMPTS.json is a list of texts. OUT.json: {"texts": continuations without the prompt, "ids":
their tokens without the end, "load_s": seconds, imports included,
"generate_s": seconds, "tokens": how many were generated}.
Usage: python onnx_worker.py FOLDER PROMPTS.json MAX_NEW OUT.json
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

BEGIN = time.perf_counter()  # loading begins with the libraries

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402


def load(folder: Path) -> tuple[onnxruntime.InferenceSession, Tokenizer, set[int], list[int]]:
    """The session, the tokenizer, ids that end a text, and ids that are never taken."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    settings = json.loads((folder / "generation_config.json").read_text("utf-8"))
    ends = settings.get("eos_token_id")
    ends = set(ends) if isinstance(ends, list) else {ends} - {None}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return session, tokenizer, ends, settings.get("suppress_tokens") or []


def empty_cache(session: onnxruntime.InferenceSession) -> dict[str, np.ndarray]:
    """Past keys and values of no tokens, for a batch of one."""
    found = {}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            shape = [size if isinstance(size, int) else int(axis == 0) for axis, size in enumerate(value.shape)]
            found[value.name] = np.zeros(shape, np.float16 if "float16" in value.type else np.float32)
    return found


def greedy(
    session: onnxruntime.InferenceSession, prompt: list[int], ends: set[int], never: list[int], most: int
) -> list[int]:
    """The ids that follow a prompt; the last one is an end where one was reached."""
    outputs = [value.name for value in session.get_outputs()]
    cache, ids, read, taken = empty_cache(session), prompt, 0, []
    while len(taken) < most:
        given = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, read + len(ids)), np.int64),
            "position_ids": np.arange(read, read + len(ids), dtype=np.int64)[None],
            **cache,
        }
        found: dict[str, Any] = dict(zip(outputs, session.run(outputs, given), strict=True))
        logits = found.pop("logits")[0, -1]
        logits[never] = -np.inf
        cache = {name.replace("present", "past_key_values"): value for name, value in found.items()}
        read += len(ids)
        ids = [int(logits.argmax())]
        taken += ids
        if ids[0] in ends:
            break
    return taken


def continuation(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    """The text of ids behind a prompt; alone they would lose a space at their start."""
    return tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)) :]


def main(folder: Path, prompts: list[str], most: int) -> dict[str, object]:
    """What the folder says after every prompt."""
    session, tokenizer, ends, never = load(folder)
    loaded = time.perf_counter()
    read = [tokenizer.encode(prompt).ids for prompt in prompts]
    rows = [greedy(session, ids, ends, never, most) for ids in read]
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
    said = main(Path(sys.argv[1]), asked, int(sys.argv[3]))
    Path(sys.argv[4]).write_text(json.dumps(said, ensure_ascii=False), "utf-8")
