"""Two processes that share every parameter: the same steps, the same answer to overflow, the same saved state."""

import math
import os
from multiprocessing import get_context

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tokenkit.config import UserError
from tokenkit.train.optimizer import build_optimizer, parameter_groups
from tokenkit.train.optimizer_state import optimizer_tensors, put_optimizer
from tokenkit.train.parameter_kinds import parameter_kinds
from tokenkit.train.scaler import Guard
from tokenkit.train.schema import OptimizerConfig

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=40, hidden_size=24, intermediate_size=36, num_hidden_layers=1, num_attention_heads=2, head_dim=12
)
NAMES = ("adamw", "lion", "muon")


def whole(tensor):
    """All of a tensor, sharded or not."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


class Run:
    """A tiny model, sharded or not, whose gradients are those of the whole batch in either case."""

    def __init__(self, name, sharded, seed=0):
        torch.manual_seed(seed)
        self.model = LlamaForCausalLM(CONFIG)
        if sharded:
            mesh = init_device_mesh("cpu", (2,))
            fully_shard(self.model.model.layers[0], mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.parameters = dict(self.model.named_parameters())
        self.kinds = parameter_kinds(self.parameters, [self.model])
        self.config = OptimizerConfig(name=name, learning_rate=3e-3, weight_decay=0.1)
        self.optimizer = build_optimizer(self.parameters, self.config, self.kinds)
        self.guard = Guard(CPU, scaling=True)

    def go(self, steps, overflow=(), rank=0):
        """In a step of `overflow` one process alone sees an infinity."""
        for step in steps:
            ids = torch.randint(0, 40, (4, 8), generator=torch.Generator().manual_seed(step))
            loss = self.model(input_ids=ids, labels=ids).loss
            self.optimizer.zero_grad()
            self.guard.scaled(loss).backward()
            if step in overflow and rank == 0:
                gradient = self.parameters["lm_head.weight"].grad
                (gradient.to_local() if isinstance(gradient, DTensor) else gradient)[0, 0] = math.inf
            self.guard.unscale(self.parameters.values())
            norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), 1.0)
            self.guard.step(self.optimizer, step, loss.detach(), norm)

    def found(self):
        model = {f"model/{name}": whole(p) for name, p in self.parameters.items()}
        state = {f"optimizer/{n}": whole(t) for n, t in optimizer_tensors(self.parameters, self.optimizer).items()}
        return model | state | {f"guard/{n}": whole(t) for n, t in self.guard.state().items()}


def work(rank, folder):
    """One of the two; leaves behind what came out, and after another optimizer went on from the saved state."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in NAMES:
        run = Run(name, sharded=True)
        assert all(isinstance(p, DTensor) for p in run.parameters.values())
        run.go(range(4), overflow=(2,), rank=rank)
        save_file({k: t.clone() for k, t in run.found().items()}, folder / f"{name}-half-{rank}")
        half = load_file(folder / f"{name}-half-{rank}")
        other = Run(name, sharded=True, seed=1)
        with torch.no_grad():
            for key, parameter in other.parameters.items():
                mesh, placements = parameter.device_mesh, parameter.placements
                parameter.copy_(distribute_tensor(half[f"model/{key}"], mesh, placements, src_data_rank=None))
        own = {key.removeprefix("optimizer/"): t for key, t in half.items() if key.startswith("optimizer/")}
        put_optimizer(other.parameters, other.optimizer, own)
        other.guard.load_state(run.guard.state())
        run.go(range(4, 6))
        other.go(range(4, 6))
        for kind, ended in (("whole", run), ("resumed", other)):
            save_file({k: t.clone() for k, t in ended.found().items()}, folder / f"{name}-{kind}-{rank}")
    refused = []
    for name in ("soap", "adamw_8bit"):
        try:
            Run(name, sharded=True)
        except UserError as error:
            refused.append(str(error))
    torch.distributed.destroy_process_group()
    (folder / f"refused-{rank}").write_text("\n".join(refused))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    pytest.importorskip("pytorch_optimizer")
    folder = tmp_path_factory.mktemp("sharded")
    context = get_context("fork")
    processes = [context.Process(target=work, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_sharded_steps_are_those_of_one_process_and_both_leave_out_the_same(results, name):
    alone = Run(name, sharded=False)
    alone.go(range(4), overflow=(2,))
    halves = [load_file(results / f"{name}-half-{rank}") for rank in range(2)]
    expected = alone.found()
    assert expected.keys() == halves[0].keys()
    for key, tensor in expected.items():
        assert torch.equal(halves[0][key], halves[1][key])
        if not key.endswith(":int"):
            assert torch.allclose(halves[0][key], tensor, atol=2e-3 if name == "muon" else 1e-5), key
    assert halves[0]["guard/skipped"] == 1
    assert halves[0]["guard/scale"] == 2.0**15


@pytest.mark.parametrize("name", NAMES)
def test_sharded_state_resumes_bit_for_bit(results, name):
    whole, resumed = (load_file(results / f"{name}-{kind}-0") for kind in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_what_needs_whole_matrices_says_so(results):
    lines = (results / "refused-0").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [f"train.optimizer.name: {n}" for n in ("soap", "adamw_8bit")]
    assert all("write adamw, lion or muon" in line for line in lines)


def test_parameters_on_different_sets_of_processes_are_grouped_apart(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        meshes = [init_device_mesh("cpu", (1,), mesh_dim_names=(name,)) for name in ("data", "model")]
        parameters = {
            f"{n}.{m}": torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
            for n, mesh in enumerate(meshes)
            for m in range(2)
        } | {"whole": torch.nn.Parameter(torch.ones(4, 4))}
        groups = parameter_groups(parameters, OptimizerConfig(weight_decay=0.1))
        sets = [{name for name, p in parameters.items() if any(p is q for q in g["params"])} for g in groups]
        assert sets == [{"0.0", "0.1"}, {"1.0", "1.1"}, {"whole"}]
        optimizer = build_optimizer(parameters, OptimizerConfig())
        sum(p.sum() if not isinstance(p, DTensor) else p.to_local().sum() for p in parameters.values()).backward()
        optimizer.step()
        assert all((whole(p) < 1).all() for p in parameters.values())
    finally:
        torch.distributed.destroy_process_group()
