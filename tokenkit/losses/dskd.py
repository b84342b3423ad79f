"""Dual-space distillation: each model's hidden states read by the other's head. Zhang+ 2024, 2406.17328 (DSKD).

The teacher's states, brought into the student's space by attention and learnt maps, must predict the text under the
student's head; where they do, the student learns from what they predict. The student's states, brought into the
teacher's space, learn what the teacher predicts.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenkit.losses import Units, loss
from tokenkit.losses.divergences import Divergence, Share, Temperature
from tokenkit.losses.divergences import divergence as divergence_of
from tokenkit.quantities import at_least_float32, next_inputs
from tokenkit.scores import token_scores_of_logits


def dskd_units(
    dual_student_logits: Float[Tensor, "B T V"],
    student_labels: Int[Tensor, "B T"],
    student_label_mask: Bool[Tensor, "B T"],
    teacher_label_mask: Bool[Tensor, "B S"],
) -> Units:
    """Three means: the student's scored positions; those whose label the teacher's states predict; the teacher's."""
    right = student_label_mask & (dual_student_logits.argmax(-1) == student_labels)
    parts = (student_label_mask, right, teacher_label_mask)
    counted = torch.cat(parts, 1).float()
    numbers = [torch.full((mask.shape[1],), i, device=mask.device) for i, mask in enumerate(parts)]
    return Units(counted, counted, torch.cat(numbers))


def teacher_moments(
    teacher_hidden: Float[Tensor, "B S E"],
    teacher_embeds: Float[Tensor, "B S E"],
    teacher_token_mask: Bool[Tensor, "B S"],
) -> tuple[Float[Tensor, "3 2"], Float[Tensor, ""]]:
    """Mean and mean square, over channels, of inputs, hidden states and next inputs, summed over positions."""
    following = next_inputs(teacher_embeds)
    states = (torch.cat([teacher_embeds, following], -1), teacher_hidden, following)
    found = []
    for state in states:
        state = at_least_float32(state)
        moments = torch.stack([state.mean(-1), state.square().mean(-1)], -1)
        found.append(torch.where(teacher_token_mask.unsqueeze(-1), moments, 0).sum((0, 1)))
    return torch.stack(found), teacher_token_mask.sum().to(found[0].dtype)


@loss(per="token", units=dskd_units, step_mean=teacher_moments)
def dskd(
    student_logits: Float[Tensor, "B T V"],
    student_labels: Int[Tensor, "B T"],
    dual_student_logits: Float[Tensor, "B T V"],
    teacher_logits: Float[Tensor, "B S W"],
    dual_teacher_logits: Float[Tensor, "B S W"],
    *,
    divergence: Divergence = "skewed_reverse_kl",
    temperature: Temperature = 2.0,
    teacher_temperature: Temperature = 1.0,
    skew: Share = 0.1,
    adaptive_alpha: Share = 0.5,
    causal: bool = False,
) -> Float[Tensor, "B TTS"]:
    """Cross-entropy of the text, divergence from the teacher's states, KL of the student's states; in nats.

    Side by side, as `dskd_units` counts them. `causal` is for the attention: no look at later text.
    """
    options = {"skew": skew, "adaptive_alpha": adaptive_alpha}
    text = -token_scores_of_logits(at_least_float32(dual_student_logits), student_labels)[0]
    target = dual_student_logits.detach() / (temperature * teacher_temperature)
    to_student = divergence_of(divergence, target, student_logits / temperature, **options)
    to_teacher = divergence_of("kl", teacher_logits / temperature, dual_teacher_logits / temperature)
    return torch.cat([text, to_student, to_teacher], 1)
