"""How far a student's next-byte distributions are from its teacher's on held-out text, whatever their tokenizers."""

from collections.abc import Sequence

import numpy as np

from tokenkit.eval.agreement import Agreement
from tokenkit.eval.byte_ensemble import byte_distributions, byte_windows
from tokenkit.eval.next_byte import ByteModel


def byte_agreement(
    student: ByteModel, teacher: ByteModel, documents: Sequence[str], *, context_bytes: int = 512
) -> Agreement:
    """Over every byte of the documents once: KL(teacher || student) in nats per byte, over 256 bytes and the end.

    `num_tokens` counts bytes. Exact where both follow all covers; else of the distributions that the beams give.
    """
    windows = [window for document in documents for window in byte_windows(document, context_bytes)]
    kl, same, count = 0.0, 0, 0
    for place in byte_distributions([student, teacher], windows):
        q, p = place.logp
        with np.errstate(invalid="ignore"):  # what the teacher rules out adds nothing
            kl += float(np.where(p > -np.inf, np.exp(p) * (p - q), 0.0).sum())
        same += int((p.argmax(1) == q.argmax(1)).sum())
        count += len(place.wanted)
    return Agreement(kl / max(1, count), same / max(1, count), count)
