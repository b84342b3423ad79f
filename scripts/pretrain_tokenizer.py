"""Trains the auto-encoder of a learned tokenizer as a JSON configuration says.

    python scripts/pretrain_tokenizer.py --config configs/autoencoder_tokenizer_config.json --steps 1000 \
        --checkpoint-dir checkpoints/
    python scripts/pretrain_tokenizer.py --config ... --resume checkpoints/checkpoint_step_1000.bin --steps 2000

`--steps` may grow from call to call: schedules are laid out over `training.max_steps`, so 1000 steps and 1000 more are
the same as 2000. `--fine-tune` begins a new run from the weights of `--resume`.
"""

import argparse
import json
import sys
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE")
    parser.add_argument("--steps", type=int, help="optimizer steps; by default training.max_steps")
    parser.add_argument("--checkpoint-dir", type=Path, metavar="DIR", help="by default that of --resume or of the file")
    parser.add_argument("--checkpoint-interval", type=int, help="steps between checkpoints")
    parser.add_argument("--eval-interval", type=int, help="steps between evaluations")
    parser.add_argument("--resume", type=Path, metavar="CKPT", help="the checkpoint to go on from")
    parser.add_argument("--fine-tune", action="store_true", help="only its weights: a new run, in a new folder")
    parser.add_argument("--allow-config-change", action="store_true", help="go on under another configuration")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


def main(given: argparse.Namespace) -> None:
    from tokenkit.config import UserError
    from tokenkit.tokenizers.autoencoder.config import load_config
    from tokenkit.verbs.tokenizer.checklist import checklist_run
    from tokenkit.verbs.tokenizer.pretrain import pretrain_tokenizer

    if given.fine_tune and (given.resume is None or given.checkpoint_dir is None):
        raise UserError("--fine-tune: needs --resume CKPT, whose weights it begins with, and a new --checkpoint-dir")
    folder = given.checkpoint_dir or (given.resume.parent if given.resume else None)
    run = checklist_run(
        load_config(given.config),
        steps=given.steps,
        checkpoint_dir=folder,
        checkpoint_interval=given.checkpoint_interval,
        eval_interval=given.eval_interval,
        seed=given.seed,
        init=given.resume if given.fine_tune else None,
    )
    results = pretrain_tokenizer(
        run,
        resume_from=None if given.fine_tune else given.resume,
        allow_config_change=given.allow_config_change,
        quiet=given.quiet,
        tell=lambda line: print(line, file=sys.stderr),
    )
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    given = arguments()
    from tokenkit.cli_shared import run_script

    run_script("pretrain_tokenizer", lambda: main(given))
