"""Who draws the sequences: this package's sampler, or vLLM where it is installed. Both are given ids and return ids."""

import importlib
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from transformers import PreTrainedModel

from tokenkit.config import UserError
from tokenkit.models.sample import Drawing, Sampled, Until, check_positions, sample, sequence_key

MAX_PHASES = 8
NEVER = -100.0  # the least bias that vLLM takes


@runtime_checkable
class Engine(Protocol):
    """Draws one continuation per prompt; what it draws for a number does not depend on the other numbers."""

    name: str

    def check(self, prompt_tokens: int) -> None:
        """UserError where sequences after prompts of that length do not fit the model."""
        ...

    def draw(
        self, prompts: Sequence[list[int]], numbers: Sequence[int], *, stream: int = 0, until: Until | None = None
    ) -> list[Sampled]:
        """The continuations; `stream` tells apart what one sequence draws for several ends."""
        ...


class BuiltinEngine:
    """The model's own forward passes, on any device."""

    name = "builtin"

    def __init__(self, model: PreTrainedModel, drawing: Drawing, *, seed: int, batch_size: int):
        self.model, self.drawing, self.seed, self.batch_size = model, drawing, seed, batch_size

    def check(self, prompt_tokens: int) -> None:
        """UserError where the model has not so many positions."""
        check_positions(self.model, prompt_tokens + self.drawing.max_new_tokens)

    def draw(
        self, prompts: Sequence[list[int]], numbers: Sequence[int], *, stream: int = 0, until: Until | None = None
    ) -> list[Sampled]:
        """The same ids for a number in any batch."""
        keys = [sequence_key(self.seed, number, stream) for number in numbers]
        return sample(self.model, prompts, self.drawing, keys, batch_size=self.batch_size, until=until)


class VllmEngine:
    """vLLM: many sequences at once on a GPU, seeded per sequence, in as many requests as there are temperatures.

    Its requests have one temperature each (logits processors per request are gone since its first version of the new
    engine), so a schedule is drawn stretch by stretch: one token at 10, then the prompt with that token at 0.5.
    """

    def __init__(self, source: str, revision: str | None, drawing: Drawing, *, seed: int):
        self.phases = drawing.temperature.phases(drawing.max_new_tokens)
        if len(self.phases) > MAX_PHASES:
            raise UserError(
                f"engine: vllm draws a sequence at one temperature at a time, and {drawing.temperature!r} has "
                f"{len(self.phases)}; write kind=first_then, or engine=builtin"
            )
        try:
            self.vllm: Any = importlib.import_module("vllm")
        except ImportError:
            raise UserError("engine: vllm is not installed; pip install vllm, or write engine=builtin") from None
        self.name = f"vllm {self.vllm.__version__}"
        self.drawing, self.seed = drawing, seed
        self.model = self.vllm.LLM(model=source, revision=revision, skip_tokenizer_init=True, seed=seed)

    def check(self, prompt_tokens: int) -> None:
        """UserError where vLLM was started for shorter sequences than that."""
        length, longest = prompt_tokens + self.drawing.max_new_tokens, self.model.llm_engine.model_config.max_model_len
        if length > longest:
            raise UserError(
                f"max_new_tokens: {length} tokens with the prompt, but the engine reads {longest}; write less"
            )

    def draw(
        self, prompts: Sequence[list[int]], numbers: Sequence[int], *, stream: int = 0, until: Until | None = None
    ) -> list[Sampled]:
        """The same ids for a number as far as vLLM keeps to its seeds."""
        rows: list[list[int]] = [[] for _ in prompts]
        said: list[list[float]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        for phase in range(len(self.phases)):
            requests = [{"prompt_token_ids": [*prompts[row], *rows[row]]} for row in active]
            settings = [self._settings(phase, numbers[row], stream) for row in active]
            for row, output in zip(active, self.model.generate(requests, settings, use_tqdm=False), strict=True):
                ids, logps = _of(output.outputs[0])
                rows[row] += ids
                said[row] += logps
            active = [row for row in active if not self._over(rows[row], phase, until)]
        return [self._sampled(ids, logps, until) for ids, logps in zip(rows, said, strict=True)]

    def _settings(self, phase: int, number: int, stream: int) -> Any:
        first, end, temperature = self.phases[phase]
        config, drawing = self.drawing.config, self.drawing
        seed = np.random.SeedSequence([self.seed, number, stream, phase]).generate_state(1)[0]
        return self.vllm.SamplingParams(
            temperature=temperature,
            top_k=config.top_k or 0,
            top_p=config.top_p,
            min_p=config.min_p,
            max_tokens=end - first,
            min_tokens=min(max(0, drawing.min_new_tokens - first), end - first),
            stop_token_ids=sorted(drawing.stop_ids),
            ignore_eos=True,  # what ends a text is said by its ids alone
            logit_bias=dict.fromkeys(drawing.forbidden, NEVER) or None,
            logprobs=0,  # of the drawn token, before temperature
            detokenize=False,
            seed=int(seed),
        )

    def _over(self, ids: list[int], phase: int, until: Until | None) -> bool:
        ended = bool(ids) and ids[-1] in self.drawing.stop_ids
        return ended or len(ids) < self.phases[phase][1] or (until is not None and until(ids))

    def _sampled(self, ids: list[int], logps: list[float], until: Until | None) -> Sampled:
        if until is not None:
            length = next((n for n in range(1, len(ids) + 1) if until(ids[:n])), len(ids))
            ids, logps = ids[:length], logps[:length]
        return Sampled(ids, math.fsum(logps), bool(ids) and ids[-1] in self.drawing.stop_ids)


def _of(completion: Any) -> tuple[list[int], list[float]]:
    ids = list(completion.token_ids)
    return ids, [place[i].logprob for i, place in zip(ids, completion.logprobs, strict=True)]
