"""docs/guide_keys.md, from the tables: every key of the guide's commands, the key here, and what is not the same."""

from tokenkit.verbs.guide.commands import GUIDES
from tokenkit.verbs.guide.keys import Guide, Key

SHORT = 20  # so many rows are shown twice
HEAD = """# The guide's commands and keys

Written by `make docs` from the tables in `tokenkit/verbs/guide`; do not edit.

The commands of the older toolkit's user guide are files under `scripts/`. Each takes the guide's keys and, beside
them, every key of the verb that it stands for, on the command line and in files:

<!-- run: train.steps=1 data.source.max_bytes=20000 data.window_bytes=64 eval.source.max_bytes=300 -->
<!-- run: train.steps=1 data.source.max_bytes=20000 data.window_bytes=64 eval.source.max_bytes=300 output=outputs/b -->
<!-- run: train.steps=1 data.source.max_bytes=20000 data.window_bytes=64 eval.source.max_bytes=300 output=outputs/c -->
```sh
python scripts/cross_tokenizer_distill.py dtype=bfloat16 optimizer.use_fused_adam=true use_flash_attention=true
python scripts/cross_tokenizer_distill.py CONFIG.yaml steps=10 train.log_every=1
python scripts/cross_tokenizer_distill.py --config CONFIG.yaml --overrides steps=10 +student.tokenizer_name=FOLDER
```

`--dry-run` prints the run in our form, `--resume` continues one. Of two keys that say the same thing the later one
counts. Each key that is called something else here is told once, and each that changes nothing, with the reason. What
is not known is an error with what was probably meant, of the guide's keys and of ours. Numbers such as `1e-5` are
numbers.

Where `model` (our key) is not written, `cross_tokenizer_distill.py` fills in what the original does: 5,000 steps, two
fifths of them warm-up, a learning rate of 1e-5 that falls on a line, weight decay 0.01, seed 1234, bfloat16, LoRA of
rank 64, 512 tokens (2,048 bytes) a row. Its losses are then `sft` and `alm_unconstrained`, which the original's
documents recommend; `alm_unbiased` needs the bias of the pair. Without a student the embedded model is moved to its
Unigram tokenizer (4 rows of 512 bytes, learning rate 1e-3); without data the text is that of Python's standard
library. A student that is the folder of a run keeps the teacher of that run, so that the guide's second stage learns
from the model that the first one began with.
"""


def guide_page() -> str:
    """The whole page."""
    parts = [HEAD]
    parts += [_chapter(guide) for guide in GUIDES.values()]
    return "\n".join(parts)


def _chapter(guide: Guide) -> str:
    base = " ".join(f"{key}={value}" for key, value in guide.base.items())
    title = f"## scripts/{guide.script}.py\n\n`tokenkit {guide.verb}{' ' + base if base else ''}`"
    table = "| the guide's key | here | what is not the same |\n|---|---|---|"
    first = next(iter(GUIDES.values()))
    shared = set() if guide is first else {key.name for key in guide.keys if first.named.get(key.name) == key}
    many = len(shared) > SHORT
    rows = [_row(key) for key in sorted(guide.keys, key=lambda key: key.name) if not many or key.name not in shared]
    others = f"{len(shared)} keys mean what they do in {first.script}.py. The others:\n\n" if many else ""
    return "\n".join([f"{title}\n\n{others}{table}", *rows]) + "\n"


def _row(key: Key) -> str:
    if key.to:
        here = f"`{key.to}`"
    else:
        here = "an error" if key.refused else "no effect"
    values = ", ".join(f"{word} is {_shown(value)}" for word, value in key.values.items() if word != _shown(value))
    about = "; ".join(part for part in (values, key.note) if part).replace("|", "\\|")
    return f"| `{key.name}` | {here} | {about} |"


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return repr(value) if isinstance(value, str) and "\n" in value else str(value)
