"""`tokenkit generate`: what a model folder writes."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from transformers import PreTrainedModel

from tokenkit.align.bias import write_whole_with
from tokenkit.config import UserError
from tokenkit.models.factorised_view import factorised_of
from tokenkit.models.generate import WritingConfig, Written, stream, write
from tokenkit.models.speculative import Draft, Tally
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.chat import encode_pieces, end_of_turn_ids
from tokenkit.tokenizers.prompts import PromptMode, prompt_pieces
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.model import ModelChoice, load_pair


class GenerateRun(WritingConfig):
    """A run file of `tokenkit generate`."""

    model: ModelChoice
    prompts: list[str] = []
    prompts_file: Path | None = None
    """More prompts: a text file, one a line."""
    mode: PromptMode | None = None
    """How a prompt is framed: asked as a user of the model's family, or as it is between bos and eos. None: after the
    start token."""
    placeholders: bool = False
    """Prompts are in the neutral form, with `<|<eot>|>` and its like for the roles of the family. Needs a mode."""
    seed: int = 0
    """With the number of a prompt it decides what is drawn, whatever the batch."""
    batch_size: int = Field(16, ge=1)
    """Prompts that are continued together."""
    stream: bool = False
    """Print the text of the one prompt as it is written."""
    draft: ModelChoice | None = None
    """A smaller model with the same tokenizer that guesses tokens; the text is the same, and one prompt at a time."""
    draft_tokens: int = Field(4, ge=1)
    """Tokens that are guessed at a time."""
    output: Path | None = None
    """A JSON Lines file: prompt, text, ids, logp (at temperature 1, in nats) and what ended it, for each prompt."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Generation:
    """A run that is ready: prompts, how what is printed of each begins, options of `write`, what a draft brought."""

    prompts: list[str]
    shown: list[str]
    task: dict[str, Any]
    tally: Tally

    def texts(self, output: Path | None = None) -> list[str]:
        """Each prompt with its continuation; asked as a user, the answer alone. An output file gets all of it."""
        found = write(**self.task, scored=output is not None)
        if output is not None:
            lines = [_line(prompt, one) for prompt, one in zip(self.prompts, found, strict=True)]
            write_whole_with(output, lambda path: path.write_text("".join(lines), "utf-8"))
        return [shown + one.text for shown, one in zip(self.shown, found, strict=True)]

    def pieces(self) -> Iterator[str]:
        """The one text, as it is written."""
        if self.shown[0]:
            yield self.shown[0]
        yield from (piece for _, piece in stream(**self.task))

    def drafting(self) -> str | None:
        """What the draft brought, in a line."""
        tally = self.tally
        if not tally.calls:
            return None
        return f"draft: {tally.acceptance:.1%} of its guesses stand, {tally.tokens_per_call:.2f} tokens for each pass"


def prepared(run: GenerateRun) -> Generation:
    """Loads what a run needs; UserError where its keys do not fit together."""
    prompts = _prompts(run)
    if run.placeholders and run.mode is None:
        raise UserError("generate: placeholders need a mode; write mode=direct_encode_no_force_eos")
    if run.stream and (len(prompts) != 1 or run.output is not None):
        raise UserError(f"stream: {len(prompts)} prompts; give one, and no output, or leave stream out")
    if run.output is not None and not run.output.parent.is_dir():
        raise UserError(f"output: {run.output.parent} is no folder; make it, or write another name")
    device = pick_device(run.device)
    model, tokenizer = load_pair(run.model, device, codes=True)
    tally = Tally()
    task: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "config": run, "seed": run.seed}
    task |= {"batch_size": run.batch_size, "draft": _draft(run, model, tokenizer, device), "tally": tally}
    if run.mode is None:
        return Generation(prompts, prompts, task | {"prompts": prompts}, tally)
    framed = [prompt_pieces(tokenizer, prompt, run.mode, placeholders=run.placeholders) for prompt in prompts]
    rows = [encode_pieces(tokenizer, pieces).encoding.ids.tolist() for pieces in framed]
    shown = [""] * len(prompts) if run.mode == "surround_instruct" else prompts
    return Generation(prompts, shown, task | {"prompts": rows, "stop_ids": end_of_turn_ids(tokenizer)}, tally)


def _prompts(run: GenerateRun) -> list[str]:
    lines: list[str] = []
    if run.prompts_file is not None:
        if not run.prompts_file.is_file():
            raise UserError(f"prompts_file: {run.prompts_file} is no file; write one of a prompt a line")
        lines = run.prompts_file.read_text("utf-8").splitlines()
    if not run.prompts and not lines:
        raise UserError('prompts: none; write prompts=["Once upon a time"], or prompts_file=FILE')
    return [*run.prompts, *lines]


def _draft(run: GenerateRun, model: PreTrainedModel, tokenizer: Tokenizer, device: str) -> Draft | None:
    if run.draft is None:
        return None
    if factorised_of(model) is not None:
        raise UserError("draft: the model reads open codes, which no draft can guess; leave draft out")
    draft, other = load_pair(run.draft, device)
    if other.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"draft: {run.draft.source} has another tokenizer than {run.model.source}; give it this one: tokenkit "
            f"transfer model.source={run.draft.source} target_tokenizer={run.model.source} output=FOLDER"
        )
    return Draft(draft, run.draft_tokens)


def _line(prompt: str, one: Written) -> str:
    logp = None if math.isnan(one.logp) else one.logp
    row = {"prompt": prompt, "text": one.text, "ids": one.ids, "logp": logp, "ended": one.ended}
    return json.dumps(row, ensure_ascii=False) + "\n"
