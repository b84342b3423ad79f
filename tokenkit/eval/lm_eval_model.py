"""A model of ours as lm-evaluation-harness sees one. Imports that package, so it is imported only where it is used.

Gao+ 2024, "A framework for few-shot language model evaluation". What is asked are strings; the answers equal those of
the harness's own class for transformers on a folder that both can read (`benchmarks/lm_eval_parity.py`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs

from tokenkit.config import UserError
from tokenkit.eval.continuations import scores
from tokenkit.eval.pairs import Pairs, begins_texts
from tokenkit.models.generate import generate
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.chat import render

POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")  # what config.json calls them, by family
LONGEST = 2048  # tokens a model reads whose configuration names no length
CACHED = 4  # so many tokens in a cache take no more memory than one that is read
NEW_TOKENS = 256  # that are generated at most where a task names no number
DRAWN = {  # options of generation: the harness's name, and ours
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram",
}
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "length_penalty": 1.0}


@dataclass(frozen=True)
class HowRead:
    """What the answers hang on beside model and tokenizer."""

    add_bos: bool | None = True
    """The start token stands first; None: where the tokenizer's own files put it."""
    max_length: int | None = None
    """Tokens read at most; None: as many as the model has positions."""
    batch_tokens: int = 4096
    chat: bool = False
    """Special tokens in prompts are special tokens."""
    seed: int = 0


class TokenkitLM(LM):
    """Answers the harness's three questions with a model and tokenizer of ours."""

    def __init__(self, view: ModelView, tokenizer: Tokenizer, how: HowRead = HowRead()) -> None:
        super().__init__()
        self.view, self.text_tokenizer, self.how = view, tokenizer, how
        self._device = view.model.device
        begin = begins_texts(tokenizer) if how.add_bos is None else how.add_bos
        self.positions = how.max_length or positions_of(view)
        self.pairs = Pairs(tokenizer, self.positions, begin=begin, special=how.chat)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """In nats, and whether greedy generation would write the continuation."""
        encoded = self.pairs.encode([_two(request) for request in requests])
        asked = [self.pairs.cut(pair, _name(request)) for pair, request in zip(encoded, requests, strict=True)]
        found = scores(self.view, asked, batch_tokens=self.how.batch_tokens)
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of whole texts, in nats: every token scored once, in windows of what the model reads."""
        asked, owners = [], []
        for number, request in enumerate(requests):
            windows = self.pairs.windows(request.args[0])
            asked += [self.pairs.cut(window, _name(request)) for window in windows]
            owners += [number] * len(windows)
        totals = [0.0] * len(requests)
        for owner, (logp, _) in zip(owners, scores(self.view, asked, batch_tokens=self.how.batch_tokens), strict=True):
            totals[owner] += logp
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Continuations up to the first stop string, which is left out."""
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            _, options = request.args
            alike.setdefault(json.dumps(options, sort_keys=True, default=str), []).append(number)
        prompts = self.pairs.prompts([request.args[0] for request in requests])
        found: dict[int, str] = {}
        for numbers in alike.values():
            options = self._options(requests[numbers[0]])
            room = self.positions - options["max_new_tokens"]
            if room < 1:
                raise UserError(
                    f"{_name(requests[numbers[0]])}: {options['max_new_tokens']} new tokens leave no room for a prompt "
                    f"in {self.positions}; write eval.harness.generation={{max_gen_toks: ...}} with less"
                )
            some = {number: prompts[number][-room:] for number in numbers}
            found |= self._generated(some, options)
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, found[number])
        return [found[number] for number in range(len(requests))]

    def _generated(self, prompts: dict[int, list[int]], options: dict[str, Any]) -> dict[int, str]:
        order = sorted(prompts, key=lambda number: -len(prompts[number]))
        longest = len(prompts[order[0]]) + options["max_new_tokens"]
        rows = [prompts[number] for number in order]
        batch_size = max(1, CACHED * self.how.batch_tokens // longest)
        texts = generate(
            self.view.model, self.text_tokenizer, rows, seed=self.how.seed, batch_size=batch_size, **options
        )
        return {n: self._trimmed(text, options["stop"]) for n, text in zip(order, texts, strict=True)}

    def _trimmed(self, text: str, stops: Sequence[str]) -> str:
        """As the harness trims: cut at every stop, without the space that such tokenizers put before a text."""
        for stop in stops:
            text = text.split(stop)[0]
        return text[1:] if self._adds_space and text[:1] == " " else text

    @property
    def _adds_space(self) -> bool:
        spelled = self.text_tokenizer.token_bytes
        return b"".join(spelled[i] for i in self.text_tokenizer.encode("a").ids.tolist())[:1] == b" "

    def _options(self, request: Instance) -> dict[str, Any]:
        """What a request asks of generation, in our words; UserError for what there is no word for."""
        _, given = request.args
        asked: dict[str, Any] = dict(normalize_gen_kwargs(given, NEW_TOKENS))
        stops = [stop for stop in asked.pop("until") if stop]
        sampled = asked.pop("do_sample")
        warmth = asked.pop("temperature", None)
        temperature = (1.0 if warmth is None else float(warmth)) if sampled else 0.0
        options = {"max_new_tokens": asked.pop("max_gen_toks"), "temperature": temperature, "stop": stops}
        for name, value in asked.items():
            if name in DRAWN:
                options[DRAWN[name]] = value
            elif NEUTRAL.get(name, value) != value or name not in NEUTRAL:
                known = ", ".join(["until", "do_sample", "temperature", "max_gen_toks", *DRAWN])
                raise UserError(f"{_name(request)}: generation option {name}={value!r}; there are {known}")
        return options

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the tokenizer's family writes it, up to where the assistant answers or goes on."""
        pieces = render(self.text_tokenizer, chat_history, prompt=add_generation_prompt)
        if not add_generation_prompt:  # the last message is begun, not ended
            while pieces and pieces[-1].template:
                pieces.pop()
        return "".join(piece.text for piece in pieces)

    @property
    def tokenizer_name(self) -> str:
        """What tells tokenizers apart in the harness's own cache of requests."""
        return self.text_tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's own template; empty where its family's roles render a conversation."""
        return (self.text_tokenizer.chat_template or "") if chat_template else None


def positions_of(view: ModelView) -> int:
    """Tokens that a model reads at most."""
    config = view.model.config.get_text_config().to_dict()
    found = next((config[key] for key in POSITIONS if config.get(key) is not None), LONGEST)
    return int(found)


def _two(request: Instance) -> tuple[str, str]:
    context, continuation = request.args
    return context, continuation


def _name(request: Instance) -> str:
    return f"task {request.task_name}"
