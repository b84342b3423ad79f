"""New tokens per second of `tokenkit.models.generate.write` beside transformers' `generate`, one thread, CPU time.

Both get the same ids of the same model in one process, with their own key-value cache, and write 64 tokens (no end of
text before that); tokenkit also makes the texts. The ids of greedy runs are asserted to be equal. Medians of ratios
over interleaved repeats; above 1 tokenkit is faster. `--draft FOLDER` shows instead what a draft brings the demo
teacher, and what it itself would: `overlap` is the share of guesses that the rule of 2211.17192 would take.
Usage: python benchmarks/generation_speed.py [--tokens 64] [--repeats 7] [--draft FOLDER]
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from alignment_throughput import SHARED
from transformers import GenerationConfig, PreTrainedModel

from tokenkit.config import build
from tokenkit.models.generate import WritingConfig, write
from tokenkit.models.load import load_model
from tokenkit.models.sample import empty_ids
from tokenkit.models.speculative import Draft, Tally
from tokenkit.tokenizers.load import load_tokenizer

MODELS = {
    "stories260K": SHARED / "data/weights/stories260K",
    "demo_teacher": Path(__file__).parents[1] / "tokenkit/assets/demo_teacher",
}
TEXTS = {
    "stories260K": SHARED / "data/corpora/tinystories/valid.txt",
    "demo_teacher": Path(argparse.__file__),
}
DRAWS = {
    "greedy": {},
    "greedy, penalties": {"repetition_penalty": 1.1, "no_repeat_ngram": 4},
    "temperature 0.8": {"temperature": 0.8},
    "top-k 40, top-p 0.9": {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
}
LENGTHS = {"1": [32], "8": [32] * 8, "8 unequal": [4, 60, 12, 33, 48, 7, 20, 25]}


class Bench:
    """A model, its tokenizer, and a text to cut prompts from."""

    def __init__(self, name: str, tokens: int) -> None:
        self.model, self.tokenizer = load_model(str(MODELS[name])), load_tokenizer(str(MODELS[name]))
        self.ids = self.tokenizer.encode(TEXTS[name].read_text("utf-8")[:20_000]).ids.tolist()
        self.tokens = tokens

    def prompts(self, lengths: list[int]) -> list[list[int]]:
        start = self.tokenizer.start_id()
        return [[start, *self.ids[200 * row : 200 * row + length - 1]] for row, length in enumerate(lengths)]

    def ours(self, prompts: list[list[int]], how: dict) -> list[list[int]]:
        keys = {"max_new_tokens": self.tokens, "min_new_tokens": self.tokens, **how}
        found = write(self.model, self.tokenizer, prompts, build(WritingConfig, keys), batch_size=len(prompts))
        return [one.ids for one in found]

    def theirs(self, prompts: list[list[int]], how: dict) -> list[list[int]]:
        sampled = "temperature" in how
        pad = self.tokenizer.start_id()
        settings = GenerationConfig(
            max_new_tokens=self.tokens,
            min_new_tokens=self.tokens,
            do_sample=sampled,
            temperature=how.get("temperature"),
            top_k=how.get("top_k", 0) if sampled else None,
            top_p=how.get("top_p", 1.0) if sampled else None,
            repetition_penalty=how.get("repetition_penalty", 1.0),
            no_repeat_ngram_size=how.get("no_repeat_ngram", 0),
            eos_token_id=self.tokenizer.eos_id,
            pad_token_id=pad,
            suppress_tokens=empty_ids(self.tokenizer, self.model.config.vocab_size) or None,
        )
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
        output = self.model.generate(  # pyrefly: ignore [not-callable] (nn.Module's __getattr__ hides the method)
            ids, attention_mask=mask, generation_config=settings
        )
        return output[:, longest:].tolist()


def ratio(mine: Callable[[], object], other: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median, least and largest of the other's CPU time over mine, taken in turns."""
    found = []
    for _ in range(repeats):
        seconds = []
        for job in (mine, other):
            start = time.process_time()
            job()
            seconds.append(time.process_time() - start)
        found.append(seconds[1] / seconds[0])
    return statistics.median(found), min(found), max(found)


def compare(tokens: int, repeats: int) -> None:
    print(f"{'model':14}{'prompts':11}{'draw':22}{'ratio':>7}{'least':>7}{'most':>7}")
    for name in MODELS:
        bench = Bench(name, tokens)
        for lengths, draw in product(LENGTHS, DRAWS):
            prompts, how = bench.prompts(LENGTHS[lengths]), DRAWS[draw]
            mine, other = bench.ours(prompts, how), bench.theirs(prompts, how)
            if draw == "greedy" or (draw == "greedy, penalties" and "unequal" not in lengths):  # it penalises padding
                assert mine == other, f"{name}, {lengths}, {draw}: other ids"
            found = ratio(partial(bench.ours, prompts, how), partial(bench.theirs, prompts, how), repeats)
            print(f"{name:14}{lengths:11}{draw:22}{found[0]:7.2f}{found[1]:7.2f}{found[2]:7.2f}", flush=True)


@torch.no_grad()
def overlap(bench: Bench, draft: PreTrainedModel, rows: list[list[int]], temperature: float) -> float:
    """Mean of sum(min(p, q)) over the new tokens, p and q the distributions that both models draw from."""
    found = []
    for row in rows:
        ids = torch.tensor([row])
        p, q = (
            (model(ids).logits[0, -bench.tokens - 1 : -1] / temperature).softmax(-1) for model in (bench.model, draft)
        )
        found.append(torch.minimum(p, q).sum(-1).mean())
    return float(torch.stack(found).mean())


def drafted(folder: str, tokens: int, repeats: int) -> None:
    bench = Bench("demo_teacher", tokens)
    prompts = bench.prompts([32] * 8)
    print(f"{'draft':10}{'guesses':>8}{'draw':>17}{'stand':>8}{'overlap':>9}{'per pass':>10}{'speed':>7}")
    for name, model in (("trained", load_model(folder)), ("itself", bench.model)):
        for guesses, how in product((2, 4), ({}, {"temperature": 0.8})):
            keys = {"max_new_tokens": tokens, "min_new_tokens": tokens, **how}
            options: dict[str, Any] = {"model": bench.model, "tokenizer": bench.tokenizer, "prompts": prompts}
            options["config"], tally = build(WritingConfig, keys), Tally()
            alone = [one.ids for one in write(**options, batch_size=1)]
            assert alone == [one.ids for one in write(**options, draft=Draft(model, guesses), tally=tally)]
            texts = [[*prompt, *ids] for prompt, ids in zip(prompts, alone, strict=True)]
            share = f"{overlap(bench, model, texts, how['temperature']):.1%}" if how else ""
            jobs = partial(write, **options, draft=Draft(model, guesses)), partial(write, **options, batch_size=1)
            speed = ratio(*jobs, repeats)[0]
            draw = f"temperature {how['temperature']}" if how else "greedy"
            brought = f"{tally.acceptance:8.1%}{share:>9}{tally.tokens_per_call:10.2f}{speed:7.2f}"
            print(f"{name:10}{guesses:8}{draw:>17}{brought}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--draft", metavar="FOLDER")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.draft:
        drafted(arguments.draft, arguments.tokens, arguments.repeats)
    else:
        compare(arguments.tokens, arguments.repeats)
