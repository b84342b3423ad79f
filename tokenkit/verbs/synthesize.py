"""`tokenkit synthesize`: a teacher writes texts, or questions and answers, for students to be taught on."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from transformers import AutoConfig

from tokenkit.config import Config, UserError, resolved
from tokenkit.data.pairs_written import PairConfig, PairWriter, check_words, completed, needs_text
from tokenkit.data.source import SourceConfig, describe, read_documents
from tokenkit.data.synthetic import Row, SyntheticWriter, finish_set, read_metadata, text_of
from tokenkit.models.engines import BuiltinEngine, Engine, VllmEngine
from tokenkit.models.load import head_matrix
from tokenkit.models.sample import Sampled, SamplingConfig, drawing_of
from tokenkit.report.progress import progress
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.chat import end_of_turn_ids
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.tokenizers.spec import TokenizerSpec
from tokenkit.train.folder import RunFolder
from tokenkit.verbs.device import pick_device
from tokenkit.verbs.model import ModelChoice, load_pair
from tokenkit.verbs.record import teacher_identity
from tokenkit.version import __version__

MAY_CHANGE = ("output", "samples", "batch_size", "device")


class SynthesizeRun(Config):
    """A run file of `tokenkit synthesize`."""

    output: Path
    """Folder for the shards and metadata.json; as `data.source.path` of another run it is read as any text."""
    teacher: ModelChoice
    samples: int = Field(ge=1)
    """Rows that are written: exactly so many. A finished set can be continued with more."""
    mode: Literal["sequences", "prompts", "instruct", "qa"] = "sequences"
    """Texts from the start token alone; texts that go on from those of `prompts`; or conversations."""
    prompts: SourceConfig | None = None
    """Texts that the teacher goes on with, or is asked about; taken in turn, again from the first if need be."""
    prompt_tokens: int | None = Field(None, ge=1)
    """Tokens of such a text at most; equally long ones are read together."""
    pairs: PairConfig = PairConfig()
    """Of `instruct` and `qa`: how a question and its answer are asked for."""
    sampling: SamplingConfig = SamplingConfig()
    dedupe: bool = False
    """A text that is there already is drawn again."""
    seed: int = Field(0, ge=0)
    engine: Literal["builtin", "vllm"] = "builtin"
    batch_size: int = Field(16, ge=1)
    """Sequences that the builtin engine draws together; the texts do not depend on it."""
    shard_rows: int = Field(1024, ge=1)
    """Rows per file; an interrupted run loses at most so many."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _fits(self) -> "SynthesizeRun":
        if self.mode in ("instruct", "qa"):
            check_words(completed(self.pairs, self.mode))
            needed = needs_text(completed(self.pairs, self.mode))
        else:
            needed = self.mode == "prompts"
            if self.pairs != PairConfig():
                raise UserError(f"pairs: means nothing to mode={self.mode}; write mode=instruct, or leave it out")
        if needed != (self.prompts is not None):
            what = "needs texts; write prompts={path: ...}" if needed else "reads none; leave prompts out"
            raise UserError(f"prompts: mode={self.mode} {what}")
        return self


def synthesize(run: SynthesizeRun, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Writes the output folder; what the command prints."""
    texts = read_documents(run.prompts) if run.prompts else []
    engine, tokenizer = _engine(run)
    given = [tokenizer.encode(text).ids.tolist()[: run.prompt_tokens] for text in texts]
    engine.check(1 + max(map(len, given), default=0))
    folder = RunFolder(run.output)
    folder.claim(resolved(run), resume=resume, may_change=MAY_CHANGE)
    writer = SyntheticWriter(run.output, run.samples, run.shard_rows, run.dedupe)
    with progress("synthesizing", run.samples, quiet=quiet) as advance:
        advance(writer.count)
        while numbers := writer.wanted():
            before = writer.count
            writer.add(_rows(run, engine, tokenizer, given, numbers))
            advance(writer.count - before)
    found = finish_set(run.output, _about(run, engine, tokenizer), tokenizer)
    if found["rows"] != run.samples or read_metadata(run.output) != found:
        raise UserError(
            f"{run.output}: holds {found['rows']:,} rows where {run.samples:,} were written; was it changed?"
        )
    return {"output": str(run.output), **{key: value for key, value in found.items() if key != "shards"}}


def _engine(run: SynthesizeRun) -> tuple[Engine, Tokenizer]:
    choice, chat = run.teacher, run.mode in ("instruct", "qa") and run.pairs.chat
    if run.engine == "vllm":
        if choice.quantize is not None:
            raise UserError(f"teacher.quantize: {choice.quantize}, but vllm loads the folder itself; leave it out")
        tokenizer = load_tokenizer(choice.tokenizer or TokenizerSpec(name=choice.source), revision=choice.revision)
        config = AutoConfig.from_pretrained(choice.source, revision=choice.revision)
        rows = config.get_text_config().vocab_size
        ends = end_of_turn_ids(tokenizer) if chat else []
        drawing = drawing_of(run.sampling, tokenizer, rows, ends)
        return VllmEngine(choice.source, choice.revision, drawing, seed=run.seed), tokenizer
    model, tokenizer = load_pair(choice, pick_device(run.device), teacher=True)
    ends = end_of_turn_ids(tokenizer) if chat else []
    drawing = drawing_of(run.sampling, tokenizer, len(head_matrix(model)), ends)
    return BuiltinEngine(model, drawing, seed=run.seed, batch_size=run.batch_size), tokenizer


def _rows(
    run: SynthesizeRun, engine: Engine, tokenizer: Tokenizer, given: list[list[int]], numbers: range
) -> list[Row | None]:
    """What the sequences of these numbers gave; None where nothing was written."""
    mine = [given[number % len(given)] if given else [] for number in numbers]
    if run.mode in ("instruct", "qa"):
        writer = PairWriter(engine, tokenizer, completed(run.pairs, run.mode))
        return writer.rows([text_of(tokenizer, ids) for ids in mine], numbers)
    prompts = [[tokenizer.start_id(), *ids] for ids in mine]
    found = engine.draw(prompts, numbers)
    return [_text_row(tokenizer, prompt, one) for prompt, one in zip(prompts, found, strict=True)]


def _text_row(tokenizer: Tokenizer, prompt: list[int], found: Sampled) -> Row:
    ids = [*prompt, *found.ids]
    about = {"ids": ids, "given": len(prompt), "ended": found.ended, "logp": found.logp}
    return {"text": text_of(tokenizer, ids), **about}


def _about(run: SynthesizeRun, engine: Engine, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the set was drawn from and how."""
    sampling = run.sampling
    return {
        "teacher": run.teacher.source,
        "revision": run.teacher.revision,
        **{key.replace(" ", "_"): value for key, value in teacher_identity(run.teacher).items()},
        "tokenizer": tokenizer.fingerprint,
        "mode": run.mode,
        "prompts": describe(run.prompts) if run.prompts else None,
        "temperature": repr(sampling.temperature.over(sampling.max_new_tokens)),
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "max_new_tokens": sampling.max_new_tokens,
        "min_new_tokens": sampling.min_new_tokens,
        "end_of_text": sampling.end_of_text,
        "seed": run.seed,
        "dedupe": run.dedupe,
        "engine": engine.name,
        "tokenkit": __version__,
    }
