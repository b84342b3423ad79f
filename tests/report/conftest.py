"""A made-up but realistic run folder: two targets, five curves, 150 chunks."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

PROSE = (
    "The old lighthouse keeper climbed the spiral stairs every evening, counting each step aloud so that the storm "
    "would not make him forget. Below, the harbour lights trembled on the water;\n\tfishing boats knocked softly "
    "against the quay. “Another quiet night,” he wrote in the log, and underlined it twice. Grüße aus Köln, déjà vu, "
    "東京 and 🎉 are harder for a small vocabulary.\nfor i in range(10): print(i ** 2)\n"
)
BARS = {
    "unigram 32k": {"zero_shot": ("zero-shot FVT", 3.412), "clm": ("CLM", 1.431), "alm": ("ALM", 1.187)},
    "bytes": {"zero_shot": ("zero-shot FVT", 5.902), "clm": ("CLM", 1.904), "alm": ("ALM", 1.322)},
}


def made_up_chunks(count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Chunks of whole words, the teacher's tokens long and the student's short."""
    words = [word if index == 0 else " " + word for index, word in enumerate(PROSE.split(" "))]
    chunks = []
    for index in range(count):
        text = words[index % len(words)]
        teacher = -rng.expovariate(0.5)
        cut = max(1, len(text) // 2)
        pieces = [text[:cut], text[cut:]] if len(text) > 6 else [text]
        threes = [text[i : i + 3] for i in range(0, len(text), 3)]
        chunk = {"text": text, "teacher_tokens": pieces, "student_tokens": threes}
        scored = {"teacher_logp": teacher, "student_logp": min(-0.001, teacher + rng.gauss(-0.3, 1.2))}
        chunks.append(chunk | (scored if index % 29 else {"teacher_logp": None, "student_logp": None}))
    chunks[40] |= {"text": "x" * 150, "teacher_tokens": ["x" * 150], "student_tokens": ["x" * 75] * 2}
    return chunks


def write_metrics(path: Path, steps: int, start: float, end: float, rng: random.Random) -> None:
    """A noisy falling loss with an evaluation every tenth of the run, and a last line that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        level = end + (start - end) * math.exp(-6 * step / steps)
        lines.append({"step": step, "loss": level * math.exp(rng.gauss(0, 0.07)), "lr": 1e-4, "tokens": step * 8192})
        if step % (steps // 10) == 0:
            lines.append({"step": step, "bits_per_byte": 0.9 + level / 4})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9999, "lo', "utf-8")


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder; its `report.json` is complete, the page is not written yet."""
    folder, rng = tmp_path_factory.mktemp("run"), random.Random(0)
    bars = []
    for group, trained in BARS.items():
        bars.append({"group": group, "label": "Qwen3-0.6B", "kind": "teacher", "bits_per_byte": 1.043, "sd": None})
        for kind, (label, value) in trained.items():
            sd = None if kind == "zero_shot" else value / 40
            bars.append({"group": group, "label": label, "kind": kind, "bits_per_byte": value, "sd": sd})
    curves = []
    for label, kind, steps, end in (
        ("unigram · CLM", "clm", 1500, 2.6),
        ("unigram · ALM", "alm", 1500, 0.7),
        ("bytes · CLM", "clm", 1500, 3.3),
        ("bytes · ALM", "alm", 1500, 1.1),
        ("bytes · ALM, frozen body", "trained", 900, 1.9),
    ):
        path = f"{label.replace(' · ', '/').replace(', ', '-').replace(' ', '-')}/metrics.jsonl".lower()
        write_metrics(folder / path, steps, 9.0, end, rng)
        curves.append({"label": label, "kind": kind, "metrics": path})
    aligned = {"teacher_name": "Qwen3 BPE, 151k", "student_name": "unigram, 32k", "chunks": made_up_chunks(150, rng)}
    outputs = [{"label": label, "text": PROSE[:n]} for label, n in (("teacher", 240), ("ALM", 180), ("CLM", 300))]
    facts = {
        "student": "Qwen3-0.6B, 596 M parameters",
        "hardware": "2 × H200, bf16",
        "time": "41 min",
        "seed": "17",
        "digest": "0f" * 60,
    }
    report = {
        "title": "Qwen3-0.6B under two new tokenizers",
        "subtitle": "Zero-shot transfer, then 1500 steps of each objective",
        "version": "0.1.0",
        "bars": bars,
        "curves": curves,
        "aligned": [aligned | {"title": "Held-out prose and code"}],
        "samples": [
            {"prompt": "The old lighthouse", "outputs": outputs},
            {"prompt": "2 + 2 =", "outputs": outputs[:2]},
        ],
        "facts": [{"name": name, "value": value} for name, value in facts.items()],
        "run": "task: distil\nlosses:\n  alm: {temperature: 5}\nstudent: " + "folder/" * 40 + "\n",
    }
    (folder / "report.json").write_text(json.dumps(report), "utf-8")
    return folder
