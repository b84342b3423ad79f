"""Teacher logits through a token map of least edit distances. MinED: Wan+ 2024, 2401.10491; as in 2503.20083.

After a chunk that is one token on both sides, the student learns the teacher's next-token distribution, its ids
translated; inside all other chunks it learns the text. Teacher logits that several student tokens share count once for
each of them, as published.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenkit.losses import loss
from tokenkit.losses.divergences import Temperature, divergence
from tokenkit.losses.uld import learnt_after
from tokenkit.quantities import at_chunk_ends, at_least_float32
from tokenkit.scores import token_scores_of_logits


def mined_units(
    student_chunk: Int[Tensor, "B T"],
    student_chunk_end: Int[Tensor, "B C"],
    student_chunk_tokens: Int[Tensor, "B C"],
    student_label_mask: Bool[Tensor, "B T"],
    student_token_mask: Bool[Tensor, "B T"],
    teacher_chunk_end: Int[Tensor, "B C"],
    teacher_chunk_tokens: Int[Tensor, "B C"],
    teacher_label_mask: Bool[Tensor, "B S"],
    teacher_token_mask: Bool[Tensor, "B S"],
) -> Bool[Tensor, "B CT"]:
    """First the chunks of one token on each side that something learnt follows, then positions inside other chunks."""
    single = (student_chunk_tokens == 1) & (teacher_chunk_tokens == 1)
    compared = single & learnt_after(student_label_mask, student_token_mask, student_chunk_end)
    compared = compared & learnt_after(teacher_label_mask, teacher_token_mask, teacher_chunk_end)
    inside_single = single.gather(1, student_chunk.clamp_min(0)) if single.shape[1] else student_chunk >= 0
    return torch.cat([compared, (student_chunk >= 0) & ~inside_single], 1)


@loss(per="chunk", units=mined_units)
def mined(
    student_logits: Float[Tensor, "B T V"],
    student_labels: Int[Tensor, "B T"],
    student_chunk_end: Int[Tensor, "B C"],
    teacher_chunk_logits: Float[Tensor, "B C W"],
    mined_ids: Int[Tensor, "V"],
    *,
    temperature: Temperature = 2.0,
) -> Float[Tensor, "B CT"]:
    """KL(teacher through the map || student) at the ends of chunks, then -log q of the label; both at a temperature."""
    mapped = teacher_chunk_logits[..., mined_ids.clamp_min(0)].masked_fill(mined_ids < 0, -torch.inf)
    own = at_least_float32(student_logits) / temperature
    translated = divergence("kl", mapped / temperature, at_chunk_ends(own, student_chunk_end))
    return torch.cat([translated, -token_scores_of_logits(own, student_labels)[0]], 1)
