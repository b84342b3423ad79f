"""`tokenkit generate`: what a model folder writes."""

from typing import Literal

from pydantic import Field

from tokenkit.config import Config, UserError
from tokenkit.models.generate import generate
from tokenkit.tokenizers.chat import encode_pieces, end_of_turn_ids
from tokenkit.tokenizers.prompts import PromptMode, prompt_pieces
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.model import ModelChoice, load_pair


class GenerateRun(Config):
    """A run file of `tokenkit generate`."""

    model: ModelChoice
    prompts: list[str]
    mode: PromptMode | None = None
    """How a prompt is framed: asked as a user of the model's family, or as it is between bos and eos. None: after the
    start token."""
    placeholders: bool = False
    """Prompts are in the neutral form, with `<|<eot>|>` and its like for the roles of the family. Needs a mode."""
    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0)
    """0 takes the likeliest token."""
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"


def continue_prompts(run: GenerateRun) -> list[str]:
    """Each prompt with its continuation; asked as a user, the answer alone."""
    if run.placeholders and run.mode is None:
        raise UserError("generate: placeholders need a mode; write mode=direct_encode_no_force_eos")
    model, tokenizer = load_pair(run.model, pick_device(run.device), codes=True)
    options = run.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed"})
    if run.mode is None:
        texts = generate(model, tokenizer, run.prompts, **options)
        return [prompt + text for prompt, text in zip(run.prompts, texts, strict=True)]
    framed = [prompt_pieces(tokenizer, prompt, run.mode, placeholders=run.placeholders) for prompt in run.prompts]
    rows = [encode_pieces(tokenizer, pieces).encoding.ids.tolist() for pieces in framed]
    texts = generate(model, tokenizer, rows, stop_ids=end_of_turn_ids(tokenizer), **options)
    return texts if run.mode == "surround_instruct" else [p + text for p, text in zip(run.prompts, texts, strict=True)]
