"""The commands of the user guide, under `scripts/`: the command line's verbs, by the guide's names of keys."""

import sys
from collections.abc import Callable

from tokenkit.cli_shared import run_script


def run_guide(script: str, about: str | None) -> None:
    """Runs one of them with the words of the command line; a mistake is one line and exit code 2."""
    run_script(script, lambda: _run(script, sys.argv[1:], about or ""))


def _run(script: str, words: list[str], about: str) -> None:
    if {"-h", "--help"} & set(words):
        print(about.strip())
        print("\nThe guide's keys and what they are here: docs/guide_keys.md.")
        return
    from tokenkit import cli, cli_transfer
    from tokenkit.verbs.guide import GUIDES, command_of

    verbs: dict[str, Callable[..., None]] = {
        "distill": cli.distill,
        "transfer": cli_transfer.transfer,
        "train-hypernet": cli_transfer.train_hypernet,
        "tokenizer-info": cli.tokenizer_info,
        "mined-mapping": cli.mined_mapping,
        "eval": cli.evaluate,
        "eval-lockstep": cli.eval_lockstep,
        "export": cli.export,
        "merge-lora": cli.merge_lora,
    }
    guide = GUIDES[script]
    command = command_of(guide, words)
    verbs[guide.verb](command.words, **command.switches)
