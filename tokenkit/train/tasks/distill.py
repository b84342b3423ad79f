"""Text in, named tensors out: a student reads its tokens, and a teacher reads the same text in its own."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.functional import pad

from tokenkit.align.boundary import boundary_tokens
from tokenkit.config import UserError
from tokenkit.data.batch import NO_LABEL, Batch
from tokenkit.data.packing import POSITIONS, SLOT, pack, unpack, unpack_maps
from tokenkit.losses import LOSSES
from tokenkit.losses.chunked import divergence_scores
from tokenkit.models.hypernet import Hypernet, made_tables, put_rows
from tokenkit.models.paired import Paired
from tokenkit.models.projectors import Projectors, logits_under, no_later
from tokenkit.models.ternary import TernaryConfig, set_strength, strength_at
from tokenkit.models.view import ModelView
from tokenkit.objective import Objective
from tokenkit.quantities import SIDES
from tokenkit.scores import UNREAD
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.train.balance import last_layer
from tokenkit.train.scaler import Precision, autocast
from tokenkit.train.trained import Trained

DUAL = {"dual_student_logits", "dual_teacher_logits"}
TOP = "teacher_top_ids"


class TextTask:
    """A language model trained on text, alone or under a teacher."""

    def __init__(
        self,
        objective: Objective,
        student: ModelView,
        student_tokenizer: Tokenizer,
        teacher: ModelView | None = None,
        teacher_tokenizer: Tokenizer | None = None,
        *,
        precision: Precision = "float32",
        pair: Mapping[str, Tensor] = MappingProxyType({}),
        teacher_width: int | None = None,
        seed: int = 0,
        ternary: TernaryConfig | None = None,
        hypernet: Hypernet | None = None,
        trained: Trained | None = None,
    ):
        """With a `hypernet` the student's tables are what that makes of its matrices, a row of each.

        `trained` says which gradients count; None: all.
        """
        self._rows = common_rows(objective, student, student_tokenizer, teacher)
        if teacher is not None and self._rows is not None:
            teacher = teacher.limited(self._rows)
        self.objective, self.student, self.teacher = objective, student, teacher
        self.ternary, self.step, self.hypernet, self.trained = ternary, 0, hypernet, trained
        student.alike = objective.scores_alike
        self.device = student.model.device
        self.precision = precision
        self.pair = {name: tensor.to(self.device) for name, tensor in pair.items()}
        self.projectors = _projectors(objective, student, teacher, teacher_width, seed)
        self._sets = {"student": token_sets(student, student_tokenizer)}
        if teacher is not None and teacher_tokenizer is not None:
            self._sets["teacher"] = token_sets(teacher, teacher_tokenizer)
        self._make_tables(False)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are learnt, by name; a tied one once."""
        own = {name: p for name, p in self.student.model.named_parameters() if p.requires_grad}
        maker = {} if self.hypernet is None else dict(self.hypernet.named_parameters())
        learnt = {f"hypernet.{name}": p for name, p in maker.items() if p.requires_grad}
        return {**own, **learnt, **self.projectors.named()}

    def modules(self) -> list[nn.Module]:
        """What the trained parameters are part of."""
        return [self.student.model, self.projectors, *([] if self.hypernet is None else [self.hypernet])]

    def last_layer(self) -> list[nn.Parameter]:
        """What is trained in the last of the student's layers."""
        return last_layer(self.student.model)

    def train_mode(self, on: bool) -> None:
        """Dropout on or off in the student; a teacher that shares its body runs without in any case."""
        self.student.model.train(on)
        self._make_tables(False)

    def materialise(self) -> None:
        """Puts the rows that a hypernetwork makes into the student's own matrices; it is not there from then on."""
        if self.hypernet is not None:
            put_rows(self.student.model, self.hypernet)
            self.hypernet, self.student.tables = None, {}

    def _make_tables(self, learning: bool) -> None:
        """The student's tables as the hypernetwork makes them now: with gradients, or to measure."""
        hypernet = self.hypernet
        if hypernet is not None:
            with torch.set_grad_enabled(learning):
                self.student.tables = self.student.whole(lambda: made_tables(self.student.model, hypernet))

    def gradients_ready(self, step: int) -> None:
        """What is not trained at this step has no gradient from here on."""
        if self.trained is not None:
            self.trained.gradients_ready(step)

    def stepped(self, step: int, steps: int) -> None:
        """Matrices that become ternary are a little more so at the next step; untrained rows are put back."""
        self.step = step
        if self.trained is not None:
            self.trained.stepped()
        if self.ternary is not None:
            set_strength(self.student.model, strength_at(self.ternary, step))

    def state(self) -> dict[str, Tensor]:
        """What maps that are learnt along remember (running statistics), and how far a warm-up has come."""
        step = {"step": torch.tensor(self.step)} if self.ternary is not None else {}
        return self.projectors.memory() | step

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts it back."""
        self.projectors.recall(tensors)
        if "step" in tensors:
            self.stepped(int(tensors["step"]), 0)

    def teacher_tensors(self, batch: Batch) -> dict[str, Tensor]:
        """What the losses ask of the teacher, without gradients."""
        needs = self.objective.needs("teacher")
        if self.teacher is None or not needs:
            return {}
        teacher, top_k = self.teacher, self.objective.option(TOP, "top_k")
        training = teacher.model.training
        teacher.model.eval()
        with torch.no_grad(), self._autocast():
            found = teacher.whole(lambda: self._leaves(teacher, "teacher", needs, batch, top_k=top_k))
        teacher.model.train(training)
        return found

    def student_tensors(
        self, batch: Batch, teacher: Mapping[str, Tensor], means: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the losses ask of the student and of what is learnt beside it."""
        return self.student.whole(lambda: self._asked(batch, teacher, means))

    def _asked(self, batch: Batch, teacher: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        known = {**batch.tensors, **teacher}
        with self._autocast():
            needs = self.objective.needs("student")
            self._make_tables(torch.is_grad_enabled())
            found = self._leaves(self.student, "student", needs, batch, top_ids=known.get(TOP))
            return found | self._learned({**known, **found}, means)

    def _leaves(self, view: ModelView, side: str, needs: set[str], batch: Batch, **top: Any) -> dict[str, Tensor]:
        inputs, labels = batch.tensors[f"{side}_inputs"], _marked(batch.tensors, side)
        if "eos_logp" in needs and not self._sets[side]["eos_logp"].any():
            raise UserError(
                f"losses.alm.boundary: the {side}'s tokenizer has no end-of-text token; write boundary=space"
            )
        slot, positions = (batch.tensors.get(f"{side}_{name}") for name in (SLOT, POSITIONS))
        if slot is None or positions is None:
            leaves = view.leaves(needs, inputs, labels, self._sets[side], **top)
        else:
            leaves = _packed_leaves(view, needs, inputs, labels, self._sets[side], (slot, positions), top)
        if self._rows is not None and "logits" in leaves:
            leaves["logits"] = leaves["logits"][..., : self._rows]
        return {f"{side}_{name}": tensor for name, tensor in leaves.items()}

    def _learned(self, known: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        wanted, found = self.objective.by_task(), {}
        for paired in self.projectors.paired.values():
            found |= paired(known)
        if "student_divergence" in wanted:
            found["student_divergence"] = self._divergence(known)
        if "student_projected_hidden" in wanted:
            found["student_projected_hidden"] = self.projectors.hidden(known["student_hidden"])
        if wanted & DUAL and self.teacher is not None:
            moments = means[LOSSES["dskd"].step_mean_name]
            deviations = (moments[:, 1] - moments[:, 0].square()).clamp_min(0).sqrt()
            causal = self.objective.option("dual_student_logits", "causal")
            states = [known[f"{side}_{name}"] for side in SIDES for name in ("hidden", "embeds", "token_mask")]
            seen = _no_later(known) if causal else None
            to_student, to_teacher = self.projectors.dual(*states, deviations, seen)
            found["dual_student_logits"] = logits_under(self.student, to_student)
            found["dual_teacher_logits"] = logits_under(self.teacher, to_teacher)
        return found

    def _divergence(self, known: Mapping[str, Tensor]) -> Tensor:
        if self.teacher is None:
            raise UserError("losses.chunked_divergence: needs the teacher's head, which is in no record; use top_k_kl")
        options = next(term.options for term in self.objective.terms if term.loss.name == "chunked_divergence")
        student = self.student if self._rows is None else self.student.limited(self._rows)
        return divergence_scores(
            known["student_hidden"],
            student.head(),
            student.form(),
            known["teacher_hidden"],
            self.teacher.head(),
            self.teacher.form(),
            **{name: options[name] for name in ("kind", "beta", "temperature", "chunk")},
            counted=known["student_label_mask"],
        )

    def _autocast(self) -> AbstractContextManager:
        return autocast(self.device, self.precision)


def _marked(tensors: Mapping[str, Tensor], side: str) -> Tensor:
    """Labels, with a mark of their own behind a row's last token: no score of anything there is read."""
    follows = tensors[f"{side}_token_mask"]
    return tensors[f"{side}_labels"].masked_fill(~(follows | pad(follows[:, :-1], (1, 0))), UNREAD)


def _packed_leaves(
    view: ModelView,
    needs: set[str],
    inputs: Tensor,
    labels: Tensor,
    sets: Mapping[str, Tensor],
    packing: tuple[Tensor, Tensor],
    top: Mapping[str, Any],
) -> dict[str, Tensor]:
    """The leaves of rows that the model reads several at a time, a row each again."""
    slot, positions = packing
    top = {name: pack(some, *packing, 0) if isinstance(some, Tensor) else some for name, some in top.items()}
    ids, wanted = pack(inputs, *packing, 0), pack(labels, *packing, NO_LABEL)
    leaves = view.leaves(needs, ids, wanted, sets, positions=positions, **top)
    return {name: (unpack_maps if name == "attentions" else unpack)(leaf, slot) for name, leaf in leaves.items()}


def _projectors(
    objective: Objective, student: ModelView, teacher: ModelView | None, teacher_width: int | None, seed: int
) -> Projectors:
    """Freshly drawn from the run's seed, whatever was drawn before."""
    width = teacher_width if teacher is None else teacher.head().shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        terms = [term for term in objective.terms if term.loss.paired]
        other = width or 0 if teacher is None else teacher
        paired = {term.loss.name: Paired(term.loss, term.options, student, other) for term in terms}
        made = Projectors(objective.by_task(), student, width or 0, paired)
    return made.to(student.model.device, student.head().dtype)


def common_rows(
    objective: Objective, student: ModelView, tokenizer: Tokenizer, teacher: ModelView | None
) -> int | None:
    """Logits that both heads have where they are compared entry by entry; heads of one vocabulary may be padded.

    None where every logit is one of both. UserError where a head lacks ids of the tokenizer.
    """
    single = [term.loss.name for term in objective.terms if term.loss.one_vocabulary]
    if teacher is None or not single or student.vocab_rows == teacher.vocab_rows:
        return None
    rows = min(student.vocab_rows, teacher.vocab_rows)
    if rows < tokenizer.vocab_size:
        raise UserError(
            f"losses.{single[0]}: the student's head has {student.vocab_rows:,} rows and the teacher's "
            f"{teacher.vocab_rows:,} for {tokenizer.vocab_size:,} ids of a tokenizer; take models with a row for each"
        )
    return rows


def _no_later(known: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    student, teacher = (
        (known[f"{side}_chunk_end"], known[f"{side}_token_mask"].shape[1]) for side in ("student", "teacher")
    )
    return no_later(*student, *teacher), no_later(*teacher, *student)


def token_sets(view: ModelView, tokenizer: Tokenizer) -> dict[str, Bool[Tensor, "V"]]:
    """Rows of a model's head by the leaf that is the log of their mass."""
    return {"boundary_logp": boundary_mask(view, tokenizer), "eos_logp": eos_mask(view, tokenizer)}


def eos_mask(view: ModelView, tokenizer: Tokenizer) -> Bool[Tensor, "V"]:
    """The row of a model's head that is its tokenizer's end of text; none where it has no such token."""
    mask = torch.zeros(view.vocab_rows, dtype=torch.bool)
    if tokenizer.eos_id is not None:
        mask[tokenizer.eos_id] = True
    return mask.to(view.model.device)


def boundary_mask(view: ModelView, tokenizer: Tokenizer) -> Bool[Tensor, "V"]:
    """Which rows of a model's head are boundary tokens of its tokenizer; rows beyond the tokenizer are not."""
    mask = torch.zeros(view.vocab_rows, dtype=torch.bool)
    mask[: tokenizer.vocab_size] = torch.from_numpy(boundary_tokens(tokenizer))[: view.vocab_rows]
    return mask.to(view.model.device)
