"""Rows that are not trained keep their bits; in a prefix only its part is trained, at a learning rate of its own."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedModel

from tokenkit.config import UserError, build
from tokenkit.models.load import head_matrix, input_matrix, output_head
from tokenkit.models.lora import attach_lora
from tokenkit.train.optimizer import learning_rate_factor
from tokenkit.train.schema import LoopConfig, PrefixConfig, TrainConfig
from tokenkit.train.trained import Trained, check_prefix, rate_at

VOCAB = 24
NEW = torch.arange(VOCAB) % 3 == 1
IDS = torch.arange(VOCAB)[None]


def tiny(**options: object) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes, **options))


def with_bias() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return PhiForCausalLM(PhiConfig(vocab_size=VOCAB, **sizes))


def run(model: PreTrainedModel, trained: Trained, steps: range, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Steps with momentum and weight decay, as the loop takes them."""
    if optimizer is None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for step in steps:
        optimizer.zero_grad(set_to_none=True)
        model(IDS, labels=IDS).loss.backward()
        trained.gradients_ready(step)
        optimizer.step()
        trained.stepped()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().view(torch.int32)


@pytest.mark.parametrize("make", [tiny, lambda: tiny(tie_word_embeddings=True), with_bias], ids=["two", "tied", "bias"])
def test_old_rows_keep_their_bits_under_momentum_and_weight_decay(make) -> None:
    model = make()
    with torch.no_grad():
        input_matrix(model)[0, 0] = -0.0  # adding 0 would change these bits
    tables = [input_matrix(model), head_matrix(model), output_head(model).bias]
    tables = [table for table in tables if table is not None]
    before = [bits(table) for table in tables]
    run(model, Trained(model, embeddings="new_rows", new_rows=NEW), range(20))
    for table, old in zip(tables, before):
        assert torch.equal(bits(table)[~NEW], old[~NEW])
        moved = (bits(table)[NEW] != old[NEW]).reshape(int(NEW.sum()), -1).any(1)
        assert moved.all()
    moved_body = dict(model.base_model.layers.named_parameters())
    assert not any(torch.equal(moved_body[name], p) for name, p in make().base_model.layers.named_parameters())


def test_old_rows_have_no_part_in_the_norm_of_the_gradients() -> None:
    model = tiny()
    model.requires_grad_(False)
    for table in (input_matrix(model), head_matrix(model)):
        table.requires_grad_(True)
    model(IDS, labels=IDS).loss.backward()
    expected = torch.cat([table.grad[NEW].flatten() for table in (input_matrix(model), head_matrix(model))]).norm()
    assert nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]) > 1.1 * expected
    Trained(model, embeddings="new_rows", new_rows=NEW).gradients_ready(0)
    found = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected)


PREFIXES = {  # trainable, layers -> what of a body of three layers is trained
    ("embeddings", 0): (),
    ("none", 2): ("model.layers.0.", "model.layers.1."),
    ("non_overlapping_embeddings", 1): ("model.layers.0.",),
}


@pytest.mark.parametrize(("trainable", "layers"), PREFIXES)
def test_in_a_prefix_only_its_part_moves_and_then_everything(trainable: str, layers: int) -> None:
    model = tiny()
    before = {name: bits(p) for name, p in model.named_parameters()}
    prefix = PrefixConfig(steps=3, learning_rate=1.0, trainable=trainable, layers=layers)
    trained = Trained(model, prefix=prefix, new_rows=NEW)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    run(model, trained, range(3), optimizer)
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    for name, parameter in model.named_parameters():
        same = torch.equal(bits(parameter), before[name])
        if name in tables and trainable == "non_overlapping_embeddings":
            assert torch.equal(bits(parameter)[~NEW], before[name][~NEW])
            assert not (bits(parameter) == before[name])[NEW].all(1).any()
        elif name in tables:
            assert same == (trainable == "none")
        else:
            assert same != name.startswith(PREFIXES[trainable, layers] or ("nothing",)), name
        if same:
            assert parameter not in optimizer.state
    run(model, trained, range(3, 5), optimizer)
    assert not any(torch.equal(bits(p), before[name]) for name, p in model.named_parameters())
    if trainable == "non_overlapping_embeddings":
        assert not (bits(input_matrix(model)) == before["model.embed_tokens.weight"]).all(1).any()


def test_a_prefix_of_adapters_trains_those_of_its_layers() -> None:
    model = tiny()
    attach_lora(model, rank=2, alpha=2)
    prefix = PrefixConfig(steps=2, learning_rate=1.0, trainable="none", layers=1)
    model(IDS, labels=IDS).loss.backward()
    Trained(model, prefix=prefix).gradients_ready(1)
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name in model.state_dict() if ".layers.0." in name and ".lora_" in name}


def test_what_cannot_be_is_refused() -> None:
    new = {"embeddings": "new_rows"}
    with pytest.raises(UserError, match=r"train\.embeddings: new_rows, but the run has no target_tokenizer"):
        Trained(tiny(), **new)
    with pytest.raises(UserError, match=r"train\.embeddings: new_rows, but the old tokenizer has every token"):
        Trained(tiny(), **new, new_rows=torch.zeros(VOCAB, dtype=torch.bool))
    prefix = {"steps": 2, "learning_rate": 1.0}
    with pytest.raises(UserError, match=r"trainable: non_overlapping_embeddings, but the run has no target_tok"):
        Trained(tiny(), prefix=PrefixConfig(**prefix))
    with pytest.raises(UserError, match=r"train\.prefix\.layers: 4 of 3 layers; write 0 to 3"):
        Trained(tiny(), prefix=PrefixConfig(**prefix, trainable="none", layers=4))
    with pytest.raises(UserError, match=r"train\.prefix: trains nothing"):
        Trained(tiny(), prefix=PrefixConfig(**prefix, trainable="none"))
    with pytest.raises(UserError, match=r"train\.embeddings=none trains no table"):
        Trained(tiny(), embeddings="none", prefix=PrefixConfig(**prefix, trainable="embeddings"))
    whole = {"steps": 5, "prefix": {**prefix, "steps": 5}}
    with pytest.raises(UserError, match=r"train\.prefix\.steps: 5 of 5 train\.steps"):
        check_prefix(build(TrainConfig, whole))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd", "one_cycle"])
def test_the_learning_rate_of_a_prefix_and_what_follows(schedule: str) -> None:
    optimizer = {"learning_rate": 0.1, "schedule": schedule, "warmup_ratio": 0.25, "lr_min_ratio": 0.1}
    prefix = {"steps": 4, "learning_rate": 0.4, "trainable": "embeddings"}
    config = build(TrainConfig, {"steps": 24, "optimizer": optimizer, "prefix": prefix})
    rates = [rate_at(step, config) for step in range(24)]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    plain = build(LoopConfig, {"steps": 20, "optimizer": optimizer})
    assert rates[4:] == [rate_at(step, plain) for step in range(20)]
    assert rates[4:] == [0.1 * learning_rate_factor(s, steps=20, config=plain.optimizer) for s in range(20)]


@pytest.fixture
def mesh(tmp_path: Path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_tables_that_are_spread_over_processes(mesh) -> None:
    model, plain = tiny(), tiny()
    for name in ("model.embed_tokens", "lm_head"):
        module = model.get_submodule(name)
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(0)]))
    rows = {"embeddings": "new_rows", "new_rows": NEW}
    spread, alone = Trained(model, **rows), Trained(plain, **rows)
    tables = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    assert len(tables) == 2
    for one, trained, names in ((model, spread, tables), (plain, alone, tables)):
        parameters = dict(one.named_parameters())
        optimizer = torch.optim.AdamW([parameters[name] for name in names], lr=1e-2, weight_decay=0.1)
        for step in range(3):
            for number, name in enumerate(names):
                torch.manual_seed(10 * step + number)
                gradient = torch.randn(VOCAB, 16)
                own = parameters[name]
                own.grad = distribute_tensor(gradient, mesh, [Shard(0)]) if isinstance(own, DTensor) else gradient
            trained.gradients_ready(step)
            optimizer.step()
            trained.stepped()
    for name, table in tables.items():
        assert torch.equal(table.full_tensor(), plain.get_parameter(name))
        assert torch.equal(table.full_tensor()[~NEW], tiny().get_parameter(name)[~NEW])


SPREAD = """
import os, torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from tests.train.test_trained import IDS, NEW, run, tiny
from tokenkit.train.trained import Trained
torch.distributed.init_process_group("gloo")
model = tiny(tie_word_embeddings=True)
mesh = init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
run(model, Trained(model, embeddings="new_rows", new_rows=NEW), range(3))
table = model.model.embed_tokens.weight.full_tensor()
assert torch.equal(table[~NEW], tiny(tie_word_embeddings=True).model.embed_tokens.weight[~NEW])
assert not torch.equal(table[NEW], tiny(tie_word_embeddings=True).model.embed_tokens.weight[NEW])
torch.distributed.destroy_process_group()
print("kept")
"""


@pytest.mark.slow
def test_two_processes_that_share_the_parameters(tmp_path: Path) -> None:
    import subprocess
    import sys

    (tmp_path / "spread.py").write_text(SPREAD)
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", tmp_path / "spread.py"],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("kept") == 2
