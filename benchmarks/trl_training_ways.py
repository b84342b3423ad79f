"""Ways of training that `benchmarks.trl_training` compares: TRL's and tokenkit's, over the rows of the same steps."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from benchmarks.trl_training_models import windows
from tokenkit.data.batch import Batches
from tokenkit.data.pair import Pair
from tokenkit.models.load import load_model
from tokenkit.models.view import ModelView
from tokenkit.objective import LossesConfig, Objective
from tokenkit.tokenizers.base import framed
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.train.audit import peak_bytes, reset_peaks, resident_bytes
from tokenkit.train.folder import RunFolder
from tokenkit.train.loop import train
from tokenkit.train.schema import LoopConfig
from tokenkit.train.tasks.distill import TextTask

BATCH_ROWS, WARMUP = 4, 1
LEARNING_RATE, MAX_GRAD_NORM = 1e-4, 1.0
OURS = {  # the losses of a run file, and the folder of the teacher
    "CLM": ({"clm": {}}, None),
    "JSD": ({"jsd": {}}, "teacher"),
    "JSD, some positions at a time": ({"chunked_divergence": {"kind": "jsd"}}, "teacher"),
    "ALM": ({"alm": {}}, "other"),
    "ULD": ({"uld": {}}, "other"),
    "GOLD": ({"gold": {}}, "other"),
}
KINDS = {"sft": (SFTTrainer, SFTConfig), "gkd": (GKDTrainer, GKDConfig), "gold": (GOLDTrainer, GOLDConfig)}
TRLS = {
    "SFTTrainer": ("sft", None, {}),
    "GKDTrainer": ("gkd", "teacher", {"lmbda": 0.0, "seq_kd": False, "beta": 0.5, "temperature": 1.0}),
    "GOLDTrainer, ULD": ("gold", "other", {"lmbda": 0.0, "use_uld_loss": True}),
    "GOLDTrainer, hybrid": ("gold", "other", {"lmbda": 0.0, "use_uld_loss": True, "uld_use_hybrid_loss": True}),
}
WAYS = [*OURS, *TRLS]
GROUPS = (
    ("CLM", "SFTTrainer"),
    ("JSD", "GKDTrainer"),
    ("JSD, some positions at a time", "GKDTrainer"),
    ("ULD", "GOLDTrainer, ULD"),
    ("GOLD", "GOLDTrainer, hybrid"),
    ("ALM", "GOLDTrainer, ULD"),
    ("ALM", "GOLDTrainer, hybrid"),
)


class Measurement:
    """Processor time between two moments, and memory since the models were loaded."""

    def __init__(self) -> None:
        self.began = self.ended = self.loaded = 0.0

    def models_loaded(self) -> None:
        reset_peaks(torch.device("cpu"))
        self.loaded = resident_bytes()

    def begin(self) -> None:
        self.began = time.process_time()

    def end(self) -> None:
        self.ended = time.process_time()


def run_round(way: str, folder: Path, steps: int) -> dict[str, float]:
    """CPU seconds of a step after the first ones, and the most bytes that training took beyond the loaded models."""
    measured = Measurement()
    (tokenkit_round if way in OURS else trl_round)(way, folder, steps, measured)
    return {"seconds": (measured.ended - measured.began) / steps, "bytes": peak_bytes() - measured.loaded}


def tokenkit_round(way: str, folder: Path, steps: int, measured: Measurement) -> None:
    """The loop of every training verb over a task of theirs; nothing is saved."""

    losses, other = OURS[way]
    objective = Objective.of(LossesConfig.model_validate(losses))
    student, tokenizer = ModelView(load_model(str(folder / "student"))), load_tokenizer(str(folder / "student"))
    teacher = ModelView(load_model(str(folder / other))) if other else None
    its = load_tokenizer(str(folder / other)) if other else None
    pair = {}
    if teacher is not None and its is not None:
        pair = Pair(tokenizer, its, student.vocab_rows, teacher.vocab_rows).tensors(objective.pair_needs())
    task = TextTask(objective, student, tokenizer, teacher, its, pair=pair)
    batches = Batches(windows(), tokenizer, its, batch_size=BATCH_ROWS, seed=0)
    optimizer = {"learning_rate": LEARNING_RATE, "schedule": "constant", "max_grad_norm": MAX_GRAD_NORM}
    config = LoopConfig.model_validate(
        {"steps": WARMUP + steps, "batch_size": BATCH_ROWS, "optimizer": optimizer, "device": "cpu", "log_every": 10**6}
    )
    measured.models_loaded()
    with tempfile.TemporaryDirectory() as output:
        run = RunFolder(Path(output))
        train(task, _Clocked(batches, measured), config, run, dict, checkpoints=_Unsaved(measured), quiet=True)


class _Clocked:
    """Batches that begin to count at the first step after the warm-up."""

    def __init__(self, batches, measured):
        self.batches, self.measured = batches, measured
        self.place, self.state, self.load_state = batches.place, batches.state, batches.load_state

    def at(self, step, *shares):
        if step == WARMUP:
            self.measured.begin()
        return self.batches.at(step, *shares)


class _Unsaved:
    """Checkpoints that are not written; the last one is the end of the last step."""

    def __init__(self, measured):
        self.clock = measured

    def load(self, training):
        return None

    def save(self, training, progress, keep, last):
        self.clock.end()

    def measured(self, training, progress, improved):
        pass

    def newest(self):
        return None


def trl_round(way: str, folder: Path, steps: int, measured: Measurement) -> None:
    """TRL's trainer over the rows of the same steps, in their order."""

    kind, other, options = TRLS[way]
    trainer_class, config_class = KINDS[kind]
    model = AutoModelForCausalLM.from_pretrained(folder / "student", dtype="float32")
    teacher = AutoModelForCausalLM.from_pretrained(folder / other, dtype="float32") if other else None
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == WARMUP:
                measured.begin()
            if state.global_step == WARMUP + steps:
                measured.end()

    class InOrder(trainer_class):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset if dataset is None else dataset)

    if kind == "gold":
        options = options | {"teacher_tokenizer_name_or_path": str(folder / other)}
    with tempfile.TemporaryDirectory() as output:
        config = config_class(
            output_dir=output,
            max_steps=WARMUP + steps,
            per_device_train_batch_size=BATCH_ROWS,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            packing=False,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        rows = _rows(folder, kind, WARMUP + steps)
        arguments = {} if teacher is None else {"teacher_model": teacher}
        if kind == "gkd":
            arguments["data_collator"] = _collate_ids(tokenizer.pad_token_id)
        trainer = InOrder(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
            **arguments,
        )
        measured.models_loaded()
        trainer.train()


def _rows(folder: Path, kind: str, steps: int) -> list[dict]:
    """The rows of tokenkit's steps: their ids with the start and the end token, or the text behind a start token."""

    tokenizer = load_tokenizer(str(folder / "student"))
    order = Batches(windows(), tokenizer, None, batch_size=BATCH_ROWS, seed=0)
    texts = [order.windows[row].text for step in range(steps) for row in order.rows(step)]
    if kind == "gold":
        return [{"prompt": "<|endoftext|>", "completion": text} for text in texts]
    ids = [framed(tokenizer.encode(text), tokenizer.start_id(), tokenizer.eos_id).ids.tolist() for text in texts]
    return [{"input_ids": row} for row in ids]


def _collate_ids(pad_id: int) -> Callable[[list[dict]], dict]:
    """Ids that are ready, for a trainer that would otherwise read chat messages at every step."""

    def collate(rows: list[dict]) -> dict:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        inputs = pad_sequence(ids, batch_first=True, padding_value=pad_id)
        labels = pad_sequence(ids, batch_first=True, padding_value=-100)
        return {
            "input_ids": inputs,
            "attention_mask": (labels != -100).long(),
            "labels": labels,
            "prompts": inputs[:, :1],
            "prompt_attention_mask": torch.ones_like(inputs[:, :1]),
        }

    return collate
