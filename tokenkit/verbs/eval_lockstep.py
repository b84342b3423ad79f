"""`tokenkit eval-lockstep`: several models as one, over shared tokens, mapped tokens or bytes."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from rich.table import Table

from tokenkit.align.vocabulary import load_mined
from tokenkit.config import Config, UserError
from tokenkit.data.source import SourceConfig, describe, read_documents
from tokenkit.eval.bits_per_byte import EvalConfig
from tokenkit.eval.byte_ensemble import room
from tokenkit.eval.combine import Combination, How
from tokenkit.eval.ensemble import Ensemble, Member
from tokenkit.eval.harness import HarnessConfig, Subject, benchmark
from tokenkit.eval.lockstep import ByteLockstep, Lockstep, TokenLockstep, drawn_at
from tokenkit.eval.next_byte import ByteModel, CoverConfig
from tokenkit.eval.vocabulary_union import mined_slots, shared_slots
from tokenkit.models.factorised_view import factorised_of
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
    context_bytes: int | None = Field(None, ge=2)
    """Bytes that the models see at most (mode byte); null: 512, or as many as each of them has positions for."""
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
    harness: HarnessConfig | None = None
    """Tasks of lm-evaluation-harness for the ensemble as it is. Needs the package lm-eval."""
    output: Path | None = None
    """Where the figures are written as JSON; standard output has them in any case."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _whole(self) -> "EvalLockstepRun":
        if self.source is None and not self.prompts and self.harness is None:
            raise UserError("eval-lockstep: nothing to do; write a source to score or prompts to continue")
        if self.harness is not None and self.harness.apply_chat_template:
            raise UserError("harness.apply_chat_template: members have templates of their own; write false")
        Combination(self.combine, len(self.models), self.weights)
        wanted = len(self.models) - 1 if self.mode == "mined" else 0
        if len(self.mappings) != wanted:
            raise UserError(
                f"mappings: {len(self.mappings)} folders, where mode={self.mode} of {len(self.models)} models takes "
                f"{wanted}; make them with tokenkit mined-mapping"
            )
        return self


def eval_lockstep(run: EvalLockstepRun) -> dict[str, Any]:
    """The figures of every member and of the ensemble, the continuations of the prompts, and the harness's rows."""
    documents = None if run.source is None else read_documents(run.source)
    members = [_member(choice, pick_device(run.device)) for choice in run.models]
    combine = Combination(run.combine, len(members), run.weights)
    lockstep = _of_bytes(run, members, combine) if run.mode == "byte" else _of_tokens(run, members, combine)
    figures: dict[str, Any] = {"mode": run.mode, "combine": run.combine, "weights": combine.weights}
    if documents is not None and run.source is not None:
        found = lockstep.figures(documents)
        pairs = zip(run.models, found["members"], strict=True)
        found["members"] = [{"model": choice.source, **member} for choice, member in pairs]
        figures |= {"text": describe(run.source), **found}
    if run.prompts:
        options = {"count": run.max_new_tokens, "seed": run.seed, "stop": run.stop}
        figures["continuations"] = lockstep.write(
            _prompts(run, members), drawn_at(run.temperature, run.top_p), **options
        )
    if run.harness is not None:
        figures["benchmarks"] = _benchmarks(run, run.harness, lockstep)
    if run.output:
        write_json(run.output, figures)
    return figures


def _member(choice: ModelChoice, device: str) -> Member:
    model, tokenizer = load_pair(choice, device, codes=True)
    require_lossless(tokenizer, "one of an ensemble")
    if factorised_of(model) is not None:
        raise UserError(f"{choice.source}: open codes have no list of tokens; take the compact form of the tokenizer")
    return Member(ModelView(model.eval()), tokenizer)


def _of_tokens(run: EvalLockstepRun, members: Sequence[Member], combine: Combination) -> TokenLockstep:
    sides = [member.tokenizer for member in members]
    about = sides, [member.view.vocab_rows for member in members], [member.ends for member in members]
    if run.mode == "mined":
        maps = [load_mined(folder, side, sides[0]) for folder, side in zip(run.mappings, sides[1:], strict=True)]
        slots = mined_slots(*about, maps)
    else:
        slots = shared_slots(*about)
    ensemble = Ensemble(members, slots, combine, mapped=run.mode == "mined")
    # where nothing is scored the source is not asked for anything
    reading = EvalConfig(source=run.source or SourceConfig(stdlib="held_out"), context_tokens=run.context_tokens)
    return TokenLockstep(ensemble, reading)


def _of_bytes(run: EvalLockstepRun, members: Sequence[Member], combine: Combination) -> ByteLockstep:
    models = [
        ByteModel(member.view.model, member.tokenizer, run.covers, choice.source)
        for choice, member in zip(run.models, members, strict=True)
    ]
    return ByteLockstep(models, combine, room(models, 512) if run.context_bytes is None else run.context_bytes)


def _benchmarks(run: EvalLockstepRun, harness: HarnessConfig, lockstep: Lockstep) -> list[dict[str, Any]]:
    """The harness's figures of the ensemble; nothing is taken from a cache."""
    from tokenkit.eval.lm_eval_lockstep import LockstepBackend  # imports lm_eval

    backend = LockstepBackend(lockstep, harness, device=pick_device(run.device), seed=run.seed)
    options = {"limit": harness.limit, "num_fewshot": harness.num_fewshot}
    return [asdict(row) for row in benchmark(backend, Subject("ensemble"), harness.tasks, **options)]


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


def lockstep_table(figures: dict[str, Any]) -> Table:
    """Members and ensemble, a row each."""
    table = Table()
    for name in ("model", "weight", "bits per byte"):
        table.add_column(name, justify="left" if name == "model" else "right", overflow="fold")
    for member, weight in zip(figures["members"], figures["weights"], strict=True):
        table.add_row(member["model"], f"{weight:.3f}", f"{member['bits_per_byte']:.4f}")
    table.add_row(f"all, {figures['combine']}, {figures['mode']}", "1.000", f"{figures['bits_per_byte']:.4f}")
    return table
