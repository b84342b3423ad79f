"""Made-up but realistic parts of run folders, and whole ones to be compared."""

import json
import math
import random
from pathlib import Path
from typing import Any

from tokenkit.config import dump_yaml

PROSE = (
    "The old lighthouse keeper climbed the spiral stairs every evening, counting each step aloud so that the storm "
    "would not make him forget. Below, the harbour lights trembled on the water;\n\tfishing boats knocked softly "
    "against the quay. “Another quiet night,” he wrote in the log, and underlined it twice. Grüße aus Köln, déjà vu, "
    "東京 and 🎉 are harder for a small vocabulary.\nfor i in range(10): print(i ** 2)\n"
)


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
        lines.append(
            {"step": step, "loss": level * math.exp(rng.gauss(0, 0.07)), "time/step": 0.25, "tokens": step * 8192}
        )
        if step % (steps // 10) == 0:
            lines.append({"step": step, "bits_per_byte": 0.9 + level / 4})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9999, "lo', "utf-8")


def write_run(
    folder: Path, loss: str, after: float, *, text: str = "ab", prompt: str = "The old", target: str = "bytes"
) -> Path:
    """A folder as a distilling run leaves it, without its model."""
    rng = random.Random(len(folder.name))
    write_metrics(folder / "metrics.jsonl", 100, 9.0, after, rng)
    aligned = {"title": "held out", "teacher_name": "BPE", "student_name": target, "chunks": made_up_chunks(60, rng)}
    wrote = [{"label": "teacher", "text": "keeper of it"}, {"label": loss, "text": f"{loss} wrote this"}]
    kinds = {"teacher": ("teacher", 1.0), "zero_shot": ("zero-shot fvt", 4.0), "trained": (loss, after)}
    report = {
        "title": f"teacher → {target}",
        "version": "0.1.0",
        "bars": [
            {"group": target, "label": label, "kind": kind, "bits_per_byte": value}
            for kind, (label, value) in kinds.items()
        ],
        "curves": [{"label": loss, "kind": "trained", "metrics": "metrics.jsonl"}],
        "aligned": [aligned],
        "samples": [{"prompt": prompt, "outputs": wrote}],
    }
    rows = [{"task": "arc_easy", "metric": "acc", "value": after / 10}, {"task": "own", "metric": "x", "value": None}]
    made = {"verb": "distill", "made_with": [{"device": "CPU", "version": "0.1.0"}]}
    files = {
        "report": report,
        "results": {"losses": [loss], "steps": 100, "bytes": 204800, "benchmarks": {"trained": rows}},
        "provenance": made | {"data": {"held_out_bytes": 12288, "held_out_sha256": text * 32}},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
    values = {"output": str(folder), "losses": {loss: {"weight": 1.0, "schedule": None}}, "train": {"steps": 100}}
    (folder / "run.yaml").write_text(dump_yaml(values | {"eval": {"source": {"path": "held.txt"}}}), "utf-8")
    return folder
