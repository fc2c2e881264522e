"""`plan` as it is typed: meshes that the trainer takes, tables for 80 columns, and a command that starts the run."""

import io
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
from rich.console import Console

from tests.training.planned import built_model
from training.cli import TrainArguments
from training.config import DataConfig, DistributedConfig, RunConfig, TrainConfig, load_config
from training.distributed.fitting import check_model
from training.model_config import ModelConfig
from training.planning import Mesh, count_model, meshes
from training.planning.command import PlanArguments, accepted, number, plan_command

EXAMPLE = Path("examples/configs/stdlib-moe.toml")


def told(arguments, width=80):
    """What a terminal of that width, or a pipe, shows."""
    shown = io.StringIO()
    plan_command(arguments, Console(file=shown, width=width, soft_wrap=True))
    return shown.getvalue()


def takes(model, mesh):
    try:
        check_model(model, expert_parallel=mesh.expert, tensor_parallel=1, shard=mesh.shard)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("experts, gpus", [(6, 4), (6, 8), (8, 6), (12, 8), (60, 8), (10, 16), (4, 4), (7, 1)])
def test_meshes_are_those_that_the_trainer_takes(experts, gpus):
    config = RunConfig(data=DataConfig(length=16), model=ModelConfig(dim=32, layers=2, hidden=16, num_experts=experts))
    with torch.device("meta"):
        model = built_model(config, 100)
    every = [Mesh(size, shard) for size in range(1, gpus + 1) if gpus % size == 0 for shard in ("none", "fsdp")]
    wanted = [mesh for mesh in every if takes(model, mesh) and (gpus > 1 or mesh.shard == "none")]
    assert meshes(count_model(config, vocab_size=100), gpus) == wanted


def test_a_model_without_experts_has_no_mesh_of_experts():
    config = RunConfig(data=DataConfig(length=16), model=ModelConfig(dim=32, layers=1, feedforward="dense"))
    assert [str(mesh) for mesh in meshes(count_model(config, vocab_size=100), 4)] == [
        "expert_parallel=1, shard=none", "expert_parallel=1, shard=fsdp"]  # fmt: skip


def test_memories_are_planned_for_one_rank():
    model = ModelConfig(dim=32, layers=1, feedforward="product_key")
    counts = count_model(RunConfig(data=DataConfig(length=16), model=model), vocab_size=100)
    assert len(meshes(counts, 1)) == 1
    with pytest.raises(ValueError, match="gpus must be 1 for memories"):
        meshes(counts, 2)


def test_what_the_config_asks_for_leaves_meshes_out():
    config = load_config(EXAMPLE)
    counts = count_model(config)
    compressed = replace(config, distributed=DistributedConfig(compression="topk"))
    assert {mesh.shard for mesh in accepted(compressed, counts, 4)} == {"none", "fsdp"}
    penalised = replace(config.sparsify, method="variational", fisher_penalty=0.1)
    assert accepted(replace(config, sparsify=penalised), counts, 4) == [Mesh(1, "none")]
    own_momentum = replace(config, distributed=DistributedConfig(compression="dgc"))
    assert accepted(own_momentum, counts, 1) == [Mesh(1, "none")]
    with pytest.raises(ValueError, match="with distributed.compression='dgc'"):
        accepted(own_momentum, counts, 4)


@pytest.mark.parametrize("gpus, nodes", [(4, 1), (8, 1), (16, 2), (64, 8)])
def test_the_command_starts_every_process(gpus, nodes):
    """The words that torchrun and the trainer read, and the mesh, batch and number of processes that they come to."""
    lines = told(PlanArguments(EXAMPLE, gpus=gpus, batch=2 * gpus)).splitlines()
    (line,) = [line for line in lines if line.strip().startswith("torchrun")]
    words = shlex.split(line)
    here = int(words[words.index("--nproc-per-node") + 1])
    assert here * nodes == gpus
    if nodes > 1:
        assert int(words[words.index("--nnodes") + 1]) == nodes
        assert words[words.index("--rdzv-backend") + 1] == "c10d" and "$HOST:29500" in words
        assert f"on each of the {nodes} nodes" in told(PlanArguments(EXAMPLE, gpus=gpus, batch=2 * gpus))
    else:
        assert "--standalone" in words and "--nnodes" not in words
    after = words[words.index("train") + 1 :]
    run = tyro.cli(TrainArguments, args=after[1:], default=TrainArguments(run=load_config(Path(after[0])))).run
    best = plan_command(PlanArguments(EXAMPLE, gpus=gpus, batch=2 * gpus), Console(quiet=True))[0]
    assert (run.distributed.expert_parallel, run.distributed.shard) == (best.mesh.expert, best.mesh.shard)
    assert run.train.batch == 2 * gpus and run.distributed.tensor_parallel == 1


def test_torchrun_knows_every_word_before_the_trainers():
    from torch.distributed.run import get_args_parser

    lines = told(PlanArguments(EXAMPLE, gpus=16, batch=16)).splitlines()
    (line,) = [line for line in lines if line.strip().startswith("torchrun")]
    parsed = get_args_parser().parse_args(shlex.split(line)[1:])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_backend) == ("2", "8", "c10d")
    assert parsed.module and parsed.training_script == "training" and parsed.training_script_args[0] == "train"


@pytest.mark.parametrize("gpus, batch", [(8, 64), (512, 4096)])
def test_tables_are_readable_in_a_pipe(gpus, batch):
    """Every number whole and no line of 80 columns, but for the command, which is one to be copied."""
    text = told(PlanArguments(EXAMPLE, gpus=gpus, batch=batch, bandwidth=0.05))
    assert "…" not in text
    lines = [line for line in text.splitlines() if not line.strip().startswith("torchrun")]
    assert max(map(len, lines)) < 80
    assert text == told(PlanArguments(EXAMPLE, gpus=gpus, batch=batch, bandwidth=0.05), width=30)
    heads = [line.split() for line in lines if line.split()[:2] == ["EP", "shard"]]
    assert [len(head) for head in heads] == [12, 10, 7]  # "GB sent", "ms a step" and "of peak" are several words
    for kind in ("dispatch", "combine", "experts", "dense", "gathers"):
        assert kind in heads[1] and kind in heads[2]


def test_cells_are_short():
    assert [number(value) for value in (0, 0.00123, 1.2345, 99.94, 1234.5)] == ["0", "0.00123", "1.23", "99.9", "1234"]


def test_json_lines_tell_each_collective_and_the_command(capsys):
    found = plan_command(PlanArguments(EXAMPLE, gpus=4, batch=16, as_json=True), Console())
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(found)
    for line, one in zip(lines, found, strict=True):
        assert line["memory_total"] == sum(line["memory"].values()) == one.memory_total
        for kind in ("gradients", "expert gradients", "weights", "dispatch", "combine"):
            assert line["sent"][kind] == one.sent[kind] and line["seconds"][kind] == one.seconds[kind]
        assert line["mesh"] == {"expert": one.mesh.expert, "shard": one.mesh.shard}
        assert f"--expert-parallel {one.mesh.expert} --shard {one.mesh.shard}" in line["command"]


def test_micro_batches_take_whole_sequences(tmp_path):
    config = tmp_path / "a b.toml"
    config.write_text(EXAMPLE.read_text().replace("[train]", "[train]\naccumulation = 4"))
    with pytest.raises(ValueError, match="batch must be a multiple of gpus=4 x train.accumulation=4, got 24"):
        plan_command(PlanArguments(config, gpus=4, batch=24), Console(quiet=True))
    assert "a b.toml'" in told(PlanArguments(config, gpus=4, batch=32)).splitlines()[-1]
    assert TrainConfig().accumulation == 1


def test_a_run_in_float64_is_not_planned(tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(EXAMPLE.read_text().replace("[train]", '[train]\ndtype = "float64"'))
    with pytest.raises(ValueError, match="train.dtype must be auto, float32 or bfloat16 for a plan, got 'float64'"):
        plan_command(PlanArguments(config, gpus=4, batch=16), Console(quiet=True))


def test_compression_is_told(tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(EXAMPLE.read_text() + '\n[distributed]\ncompression = "topk"\n')
    text = told(PlanArguments(config, gpus=4, batch=16))
    assert "gradients are counted dense" in text and "fsdp" in text
