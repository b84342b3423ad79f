"""`tokenkit generate`: what a model folder writes."""

from typing import Literal

from pydantic import Field

from tokenkit.config import Config
from tokenkit.models.generate import generate
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.model import ModelChoice, load_pair


class GenerateRun(Config):
    """A run file of `tokenkit generate`."""

    model: ModelChoice
    prompts: list[str]
    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0)
    """0 takes the likeliest token."""
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"


def continue_prompts(run: GenerateRun) -> list[str]:
    """Each prompt with its continuation."""
    model, tokenizer = load_pair(run.model, pick_device(run.device))
    options = run.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed"})
    texts = generate(model, tokenizer, run.prompts, **options)
    return [prompt + text for prompt, text in zip(run.prompts, texts, strict=True)]
