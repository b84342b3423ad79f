"""The guide's commands: for each the verb that does it here, and the table of its keys."""

from tokenkit.verbs import run_schema
from tokenkit.verbs.guide import data_keys, defaults, loss_keys, other_keys, side_keys, train_keys
from tokenkit.verbs.guide.keys import Guide

DISTILL = Guide(
    "cross_tokenizer_distill",
    "distill",
    lambda: run_schema("distill"),
    (*side_keys.KEYS, *train_keys.KEYS, *loss_keys.KEYS, *data_keys.KEYS),
    {**side_keys.SECTIONS, **train_keys.SECTIONS, **data_keys.SECTIONS, **loss_keys.SECTIONS},
    defaults.distillation,
    switches=("dry_run", "resume", "quiet"),
)
GUIDES = {guide.script: guide for guide in (DISTILL, *other_keys.guides())}
"""By the name of the script."""
