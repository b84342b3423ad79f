"""Estimates for devices and processes that are not here: shares, traffic, and the page that the script writes."""

import os
import runpy
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.verbs.estimate_shape import SHAPE
from tokenkit.models.devices import LINKS, SHEETS
from tokenkit.models.memory import Shared, Side, parameter_bytes, step_spent, without_memory
from tokenkit.models.view import ModelView
from tokenkit.verbs.estimate_shared import Layout, Traffic, gathered_bytes, layer_bytes, table_bytes, traffic

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("TOKENKIT_SHARED", ROOT.parent / "shared"))


def model():
    with without_memory("cpu"):
        return LlamaForCausalLM(SHAPE).train()


def spent(shared, half=None):
    with without_memory("cpu"):
        side = Side(ModelView(LlamaForCausalLM(SHAPE).train()), 2, 16, frozenset({"label_logp"}))
        return step_spent(side, None, half=half, microbatches=1, width=64, shared=shared)


def test_copies_in_half_precision_are_those_of_all_matrices_and_shared_along_model():
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    head = 512 * 64
    assert spent(Shared()).copied_bytes == 0
    alone, four = (spent(shared, torch.bfloat16).copied_bytes for shared in (Shared(), Shared(4, 4)))
    assert alone - four == pytest.approx(2 * matrices * 3 / 4)
    assert four in (2 * matrices / 4, 2 * matrices / 4 + 2 * head)


def test_gradients_are_held_by_all_processes_together():
    alone, eight = spent(Shared()), spent(Shared(8))
    assert eight.peak_bytes < alone.peak_bytes
    assert eight.kept_bytes == alone.kept_bytes
    assert eight.flops == alone.flops


def test_matrices_of_a_layer_are_shared_along_model_and_the_head_is_not():
    alone, four = spent(Shared()), spent(Shared(4, 4))
    head = 2 * 4 * 2 * 16 * 64 * 512
    assert four.flops - head == pytest.approx((alone.flops - head) / 4)
    assert four.kept_bytes < alone.kept_bytes


def test_what_travels_in_a_step():
    one = model()
    layers, tables = layer_bytes(one), table_bytes(one)
    assert layers + tables == parameter_bytes(one)
    assert tables == 2 * 512 * 64 * 4
    layout = Layout(data=4, model=1, accumulation=2, shared_body=False, checkpointing=False)
    found = traffic(one, [one], layout, 1.0, 1.0)
    assert found.layers == 2 * (3 + 1) * layers * 3 / 4  # gathered twice and added up once; once more for the teacher
    assert found.tables == 2 * 3 * tables * 3 / 4
    assert found.states == 0
    assert traffic(one, [one], Layout(1, 1, 2, False, False), 1.0, 1.0) == Traffic()
    across = traffic(one, [], Layout(1, 4, 1, False, False), 1000.0, 0.0)
    assert across.layers == 0
    assert across.states == 2 * 3 / 4 * 2 * (2 + 5) * 1000  # o and down forwards; q, k, v, gate and up backwards


def test_links_of_a_host_and_between_hosts():
    sheet = SHEETS["h100"]
    sent = Traffic(layers=sheet.link * LINKS)
    assert sent.seconds(sheet, Layout(8, 1, 1, False, False)) == pytest.approx(1)
    assert sent.seconds(sheet, Layout(16, 1, 1, False, False)) == pytest.approx(sheet.link / (8 * sheet.network))
    assert sent.seconds(sheet, Layout(2, 8, 1, False, False)) == pytest.approx(sheet.link / sheet.network)


def test_layers_and_tables_that_are_whole_for_a_while():
    one = model()
    assert gathered_bytes(one, Layout(1, 1, 1, False, False)) == (0, 0)
    during, ended = gathered_bytes(one, Layout(2, 1, 1, False, False))
    assert during == table_bytes(one) + 3 * (layer_bytes(one) // 2)
    assert ended == 3 * table_bytes(one) + layer_bytes(one) // 2


def test_a_device_that_is_not_known_and_one_that_nothing_is_asked_of(tokenkit, tmp_path):
    words = [
        f"output={tmp_path / 'out'}",
        "model.source=tokenkit/assets/demo_teacher",
        "losses={clm: {}}",
        "data.source.stdlib=train",
        "train.steps=1",
        "eval.source.stdlib=held_out",
    ]
    for more, said in (
        (["--dry-run", "--on", "abacus"], "--on: 'abacus' is no device whose data sheet is known here; write one of"),
        (["--on", "h100"], "--on, --price: say what a run would take"),
        (["--dry-run", "--price", "2"], "--price: 2, but no device is named"),
    ):
        code, _, err = tokenkit("distill", *words, *more)
        assert code == 2
        assert said in err
        assert len(err.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_page_says_what_the_estimate_says_now(tmp_path):
    if not (SHARED / "data").is_dir():
        pytest.skip("the shared tokenizers are not here")
    script = runpy.run_path(str(ROOT / "scripts" / "write_scale.py"))
    row = next(row for row in script["ROWS"] if row[0] == "7B, full, bytes, one GPU")
    script["write_shape"]("7b", tmp_path)
    page = script["PAGE"].read_text("utf-8")
    for line in script["estimated"](row, tmp_path):
        assert line in page
