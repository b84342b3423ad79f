"""A made-up but realistic run folder: two targets, five curves, 150 chunks; runs to be compared; a browser."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Browser
from run_folders import PROSE, made_up_chunks, write_metrics, write_run

BARS = {
    "unigram 32k": {"zero_shot": ("zero-shot FVT", 3.412), "clm": ("CLM", 1.431), "alm": ("ALM", 1.187)},
    "bytes": {"zero_shot": ("zero-shot FVT", 5.902), "clm": ("CLM", 1.904), "alm": ("ALM", 1.322)},
}


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


@pytest.fixture(scope="session")
def three_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three finished runs on one held-out text, two of them of the same name in different folders."""
    base = tmp_path_factory.mktemp("runs")
    return [
        write_run(base / "unigram/alm", "alm", 1.5, target="unigram"),
        write_run(base / "bytes/alm", "alm", 2.0),
        write_run(base / "bytes/clm", "clm", 2.5),
    ]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not binary:
        pytest.skip("no chromium on PATH")
    browser = Browser(binary, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()
