"""One text in two tokenisations, chunk by chunk, with the log-probability each model gives it."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from tokenkit.align.spans import align
from tokenkit.models.view import ModelView
from tokenkit.tokenizers.base import Encoding, Tokenizer, framed


@dataclass(frozen=True)
class ScoredChunk:
    """A piece of text that both tokenisations cut at both ends; log-probabilities in nats, given all before it."""

    text: str
    teacher_tokens: list[str]
    student_tokens: list[str]
    teacher_logp: float
    student_logp: float


def score_chunks(
    text: str, teacher: ModelView, teacher_tokenizer: Tokenizer, student: ModelView, student_tokenizer: Tokenizer
) -> list[ScoredChunk]:
    """Every chunk of a text that fits both models' context."""
    ours = framed(student_tokenizer.encode(text), student_tokenizer.start_id())
    theirs = framed(teacher_tokenizer.encode(text), teacher_tokenizer.start_id())
    student_logp, teacher_logp = _logp(student, ours), _logp(teacher, theirs)
    data = text.encode()
    chunks = []
    for t0, t1, s0, s1 in align(theirs, ours).spans.tolist():
        if theirs.special[t0]:
            continue
        chunks.append(
            ScoredChunk(
                _shown(data[theirs.starts[t0] : theirs.ends[t1 - 1]]),
                [_shown(data[theirs.starts[i] : theirs.ends[i]]) for i in range(t0, t1)],
                [_shown(data[ours.starts[i] : ours.ends[i]]) for i in range(s0, s1)],
                float(teacher_logp[t0:t1].sum()),
                float(student_logp[s0:s1].sum()),
            )
        )
    return chunks


@torch.no_grad()
def _logp(view: ModelView, encoding: Encoding) -> Float[ndarray, "T"]:
    """Log-probability of each token given those before; 0 for the first, which is given."""
    ids = torch.from_numpy(encoding.ids.astype(np.int64)).to(view.model.device).unsqueeze(0)
    labels = torch.full_like(ids, -1)
    labels[:, :-1] = ids[:, 1:]
    found = view.leaves({"label_logp"}, ids, labels)["label_logp"][0, :-1]
    return np.concatenate([[0.0], found.double().cpu().numpy()])


def _shown(piece: bytes) -> str:
    """The piece as text; bytes that are no whole character as escapes."""
    return piece.decode("utf-8", errors="backslashreplace")
