"""`tokenkit eval-lockstep`: several models as one, over shared tokens, mapped tokens or bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from rich.table import Table

from tokenkit.align.vocabulary import load_mined
from tokenkit.config import Config, UserError
from tokenkit.data.source import SourceConfig, describe, read_documents
from tokenkit.eval.bits_per_byte import EvalConfig, bits_per_byte
from tokenkit.eval.byte_ensemble import continue_bytes, score_bytes
from tokenkit.eval.combine import Combination, How
from tokenkit.eval.ensemble import Ensemble, Member
from tokenkit.eval.next_byte import END, ByteModel, CoverConfig
from tokenkit.eval.vocabulary_union import mined_slots, shared_slots
from tokenkit.models.factorised_view import factorised_of
from tokenkit.models.sample import DrawConfig, Drawing
from tokenkit.models.temperature import TemperatureConfig
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.base import require_lossless
from tokenkit.tokenizers.chat import encode_pieces
from tokenkit.tokenizers.prompts import PromptMode, prompt_pieces
from tokenkit.train.folder import write_json
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.model import ModelChoice, load_pair


class EvalLockstepRun(Config):
    """A run file of `tokenkit eval-lockstep`."""

    models: list[ModelChoice] = Field(min_length=1)
    """With `mode: mined` the first is the pivot: the others are read through its tokens."""
    mode: Literal["tokens", "mined", "byte"] = "tokens"
    """tokens: the spellings that all vocabularies have, for models transferred to one tokenizer. mined: token maps.
    byte: exact for any tokenizers, a step per byte."""
    combine: How = "mean_prob"
    """mean_prob: the mean of probabilities; mean_logp: of log-probabilities, scaled to sum to 1."""
    weights: list[float] | None = None
    """One per model, 1 together; equal ones by default."""
    mappings: list[Path] = []
    """With `mode: mined`, for each model but the first a folder that `tokenkit mined-mapping` wrote, with that model as
    teacher and the first as student."""
    source: SourceConfig | None = None
    """Text whose bits per byte are counted."""
    context_tokens: int = Field(512, ge=2)
    """Tokens that the models see at most (modes tokens and mined)."""
    context_bytes: int = Field(512, ge=2)
    """Bytes that the models see at most (mode byte); no more than the positions of any of them."""
    covers: CoverConfig = CoverConfig()
    """Which spellings are followed (mode byte)."""
    prompts: list[str] = []
    """Texts that the ensemble continues."""
    prompt_mode: PromptMode | None = None
    """How a prompt is framed, in each model's own way; null: after the start token."""
    max_new_tokens: int = Field(64, ge=1)
    """With `mode: byte` bytes."""
    temperature: float = Field(0.0, ge=0)
    """0 takes the likeliest."""
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = 0
    stop: list[str] = []
    """Strings that end a continuation and are no part of it."""
    output: Path | None = None
    """Where the figures are written as JSON; standard output has them in any case."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _whole(self) -> "EvalLockstepRun":
        if self.source is None and not self.prompts:
            raise UserError("eval-lockstep: nothing to do; write a source to score or prompts to continue")
        Combination(self.combine, len(self.models), self.weights)
        wanted = len(self.models) - 1 if self.mode == "mined" else 0
        if len(self.mappings) != wanted:
            raise UserError(
                f"mappings: {len(self.mappings)} folders, where mode={self.mode} of {len(self.models)} models takes "
                f"{wanted}; make them with tokenkit mined-mapping"
            )
        return self


def eval_lockstep(run: EvalLockstepRun) -> dict[str, Any]:
    """The figures of every member and of the ensemble, and the continuations of the prompts."""
    documents = None if run.source is None else read_documents(run.source)
    members = [_member(choice, pick_device(run.device)) for choice in run.models]
    combine = Combination(run.combine, len(members), run.weights)
    figures: dict[str, Any] = {"mode": run.mode, "combine": run.combine, "weights": combine.weights}
    figures |= (
        _of_bytes(run, members, combine, documents)
        if run.mode == "byte"
        else _of_tokens(run, members, combine, documents)
    )
    if run.source is not None:
        figures["text"] = describe(run.source)
    if run.output:
        write_json(run.output, figures)
    return figures


def _member(choice: ModelChoice, device: str) -> Member:
    model, tokenizer = load_pair(choice, device, codes=True)
    require_lossless(tokenizer, "one of an ensemble")
    if factorised_of(model) is not None:
        raise UserError(f"{choice.source}: open codes have no list of tokens; take the compact form of the tokenizer")
    return Member(ModelView(model.eval()), tokenizer)


def _of_tokens(
    run: EvalLockstepRun, members: Sequence[Member], combine: Combination, documents: list[str] | None
) -> dict[str, Any]:
    sides = [member.tokenizer for member in members]
    about = sides, [member.view.vocab_rows for member in members], [member.ends for member in members]
    mapped = run.mode == "mined"
    if mapped:
        maps = [load_mined(folder, side, sides[0]) for folder, side in zip(run.mappings, sides[1:], strict=True)]
        slots = mined_slots(*about, maps)
    else:
        slots = shared_slots(*about)
    ensemble = Ensemble(members, slots, combine, mapped=mapped)
    figures: dict[str, Any] = {"slots": len(slots.spelled)}
    if documents is not None:
        assert run.source is not None, "documents come from a source"
        config = EvalConfig(source=run.source, context_tokens=run.context_tokens)
        joint = ensemble.bits_per_byte(documents, config)
        figures["members"] = [
            {"model": choice.source, "bits_per_byte": found.value, "tokens": found.num_tokens}
            for choice, member in zip(run.models, members, strict=True)
            for found in [bits_per_byte(member.view, member.tokenizer, documents, context_tokens=run.context_tokens)]
        ]
        figures |= {"bits_per_byte": joint.value, "bytes": joint.num_bytes, "tokens": joint.num_tokens}
    if run.prompts:
        options = {"seed": run.seed, "stop": run.stop}
        texts = ensemble.continued(_prompts(run, members), _drawing(run, slots.end, slots.silent()), **options)
        figures["continuations"] = texts
    return figures


def _of_bytes(
    run: EvalLockstepRun, members: Sequence[Member], combine: Combination, documents: list[str] | None
) -> dict[str, Any]:
    models = [
        ByteModel(member.view.model, member.tokenizer, run.covers, choice.source)
        for choice, member in zip(run.models, members, strict=True)
    ]
    figures: dict[str, Any] = {"covers": run.covers.model_dump()}
    if documents is not None:
        joint, own = score_bytes(models, combine, documents, context_bytes=run.context_bytes)
        figures["members"] = [
            {"model": choice.source, "bits_per_byte": found.bits_per_byte, "dropped": found.dropped}
            for choice, found in zip(run.models, own, strict=True)
        ]
        figures |= {"bits_per_byte": joint.bits_per_byte, "bytes": joint.num_bytes}
    if run.prompts:
        options = {"seed": run.seed, "stop": run.stop}
        figures["continuations"] = continue_bytes(
            models, combine, _prompts(run, members), _drawing(run, END, ()), **options
        )
    return figures


def _prompts(run: EvalLockstepRun, members: Sequence[Member]) -> "Sequence[str | list[list[int]]]":
    """As they are, or as ids of each model in its own frame."""
    mode = run.prompt_mode
    if mode is None:
        return run.prompts
    sides = [member.tokenizer for member in members]
    return [
        [encode_pieces(side, prompt_pieces(side, prompt, mode)).encoding.ids.tolist() for side in sides]
        for prompt in run.prompts
    ]


def _drawing(run: EvalLockstepRun, end: int, silent: tuple[int, ...]) -> Drawing:
    config = DrawConfig(temperature=TemperatureConfig(start=run.temperature), top_p=run.top_p)
    temperature = config.temperature.over(run.max_new_tokens)
    return Drawing(config, temperature, run.max_new_tokens, 0, frozenset({end}), silent)


def lockstep_table(figures: dict[str, Any]) -> Table:
    """Members and ensemble, a row each."""
    table = Table()
    for name in ("model", "weight", "bits per byte"):
        table.add_column(name, justify="left" if name == "model" else "right", overflow="fold")
    for member, weight in zip(figures["members"], figures["weights"], strict=True):
        table.add_row(member["model"], f"{weight:.3f}", f"{member['bits_per_byte']:.4f}")
    table.add_row(f"all, {figures['combine']}, {figures['mode']}", "1.000", f"{figures['bits_per_byte']:.4f}")
    return table
