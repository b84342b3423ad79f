"""What `tokenkit doctor` says of twelve real pairs, as a Markdown table. Needs the shared data folder; seconds.

Usage: python benchmarks/doctor_table.py
"""

import os
from pathlib import Path

from tokenkit.align.doctor import Diagnosis, diagnose
from tokenkit.losses import LOSSES
from tokenkit.tokenizers.base import Tokenizer
from tokenkit.tokenizers.load import load_tokenizer
from tokenkit.transfer import INITIALIZERS

SHARED = Path(os.environ.get("TOKENKIT_SHARED", Path(__file__).parents[2] / "shared"))
PAIRS = (
    ("llama2", "qwen2"),
    ("qwen2", "llama2"),
    ("gpt2", "llama3"),
    ("llama3", "qwen2"),
    ("smollm2", "llama3"),
    ("gemma3", "llama3"),
    ("mistral_v1", "mistral_tekken"),
    ("deepseek_v3", "qwen2"),
    ("gpt2", "focus_de_bpe_50k"),
    ("gpt2", "bert_base_uncased"),
    ("t5_small", "gemma3"),
    ("llama3", "byte"),
)
HEAD = "| from | to | same tokens | of running text | tokens | numbers | indentation | begin of text | other warnings |"
TOPICS = ("digits", "indentation", "begin of text")
MARKS = {"ok": "–", "note": "note", "warning": "**warning**"}


def line(found: Diagnosis) -> str:
    """One row: overlap in the vocabulary and in running text, length, three topics, and every topic with a warning."""
    overlap, levels = found.finding("overlap").numbers, [MARKS[found.finding(topic).level] for topic in TOPICS]
    warned = [finding.topic for finding in found.findings if finding.level == "warning"]
    cells = [
        found.facts.source.name,
        found.facts.target.name,
        f"{100 * overlap['share_of_target']:.1f} %",
        f"{100 * overlap['share_of_running_text']:.1f} %",
        f"{found.facts.running.ratio:.2f}",
        *levels,
        ", ".join(topic for topic in warned if topic not in TOPICS) or "–",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the table."""
    loaded: dict[str, Tokenizer] = {}
    for name in (name for pair in PAIRS for name in pair):
        if name not in loaded:
            loaded[name] = load_tokenizer(name if name == "byte" else str(SHARED / "data/tokenizers" / name))
    print(f"{HEAD}\n|---|---|---:|---:|---:|---|---|---|---|")
    for source, target in PAIRS:
        print(line(diagnose(loaded[source], loaded[target], initializers=INITIALIZERS, losses=LOSSES)), flush=True)


if __name__ == "__main__":
    main()
