"""Looks at the checkpoints of a learned tokenizer, keeps the best, drops old ones.

    python scripts/manage_checkpoints.py --dir checkpoints/ --list
    python scripts/manage_checkpoints.py --compare checkpoints/checkpoint_step_1000.bin checkpoints/checkpoint_best.bin
    python scripts/manage_checkpoints.py --dir checkpoints/ --select-best --output models/tokenizer_final
    python scripts/manage_checkpoints.py --dir checkpoints/ --archive --output archive/best
    python scripts/manage_checkpoints.py --dir checkpoints/ --clean --keep 5

Steps are compared as numbers. The best and the final checkpoint are never dropped, and not counted by --keep.
"""

import argparse
import json
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where the checkpoints are")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--list", action="store_const", const="list", dest="action", help="every file, one a line")
    what.add_argument("--compare", nargs=2, type=Path, metavar="CKPT", help="two files, figures beside each other")
    what.add_argument("--select-best", action="store_const", const="select-best", dest="action")
    what.add_argument("--archive", action="store_const", const="archive", dest="action", help="the best, with sums")
    what.add_argument("--clean", action="store_const", const="clean", dest="action", help="drop old step files")
    parser.add_argument("--output", type=Path, metavar="MODEL", help="a new folder, or a new .bin file of weights")
    parser.add_argument("--pins", type=Path, metavar="DIR", help="a tokenizer whose pins the selected one takes")
    parser.add_argument("--keep", type=int, default=5, metavar="N", help="step files that --clean leaves")
    return parser.parse_args()


def main(given: argparse.Namespace) -> None:
    from tokenkit.config import build
    from tokenkit.verbs.tokenizer.manage_checkpoints import (
        TokenizerCheckpointsRun,
        checkpoint_lines,
        manage_checkpoints,
    )

    values = {"action": given.action or "compare", "folder": given.dir, "checkpoints": given.compare or ()}
    values |= {"output": given.output, "pins": given.pins, "keep": given.keep}
    found = manage_checkpoints(build(TokenizerCheckpointsRun, values))
    if "checkpoints" in found:
        print("\n".join(checkpoint_lines(found["checkpoints"])))
    else:
        print(json.dumps(found, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    given = arguments()
    from tokenkit.cli_shared import run_script

    run_script("manage_checkpoints", lambda: main(given))
