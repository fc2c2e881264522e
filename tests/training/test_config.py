"""Configs survive a round trip, refuse what they do not know, and every field is a flag with help."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest

from training.config import (
    RunConfig,
    from_dict,
    load_config,
    to_dict,
)
from training.model_config import LayerOverride, ModelConfig, model_config
from training.run import make_model
from transformer import DenseConfig, MoEConfig

CONFIGS = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.toml"))


def written(folder: Path, text: str) -> Path:
    file = folder / "run.toml"
    file.write_text(text)
    return file


def fields_of(record: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, kind in typing.get_type_hints(record).items():
        if dataclasses.is_dataclass(kind):
            found += fields_of(kind, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", kind))
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_example_configs_load_and_build(path: Path) -> None:
    config = load_config(path)
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config))), where="json") == config
    assert model_config(config.model, vocab_size=257, length=config.data.length).layers


def test_the_dense_twin_has_the_moe_models_active_parameters() -> None:
    named = {path.name: load_config(path) for path in CONFIGS}
    moe, dense = (make_model(named[f"stdlib-{kind}.toml"], vocab_size=512) for kind in ("moe", "dense"))
    routers = sum(p.numel() for name, p in moe.named_parameters() if ".router." in name)
    assert moe.num_parameters(active=True) - routers == dense.num_parameters()
    assert moe.num_parameters() > 1.5 * dense.num_parameters()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlearning_rate = 1.0", r"unknown key 'learning_rate' in \[optim\] of .*run\.toml"),
        ("[train]\nstep = 3", r"unknown key 'step' in \[train\] of .*: did you mean 'steps'\?"),
        ("[modle]\ndim = 3", r"unknown key 'modle' in .*: did you mean 'model'\?"),
        ("[train]\nsteps = 'many'", r"train\.steps in .* must be int, got 'many'"),
        ("[train]\ntensorboard = 1", r"train\.tensorboard in .* must be bool, got 1"),
        ("[optim]\nbetas = [0.9]", r"optim\.betas in .* must be tuple\[float, float\], got \[0\.9\]"),
        ("[optim]\nschedule = 'step'", r"optim\.schedule in .* must be one of cosine, wsd, constant, got 'step'"),
        ("model = 3", r"model in .* must be a table, got 3"),
        ("[[model.layer]]\nheads = 2", r"\[model\.layer\] of .* needs at"),
        ("[[model.layer]]\nat = 0\nhead = 2", r"unknown key 'head' in \[model\.layer\] of .*: did you mean 'heads'\?"),
        ("[train]\nsteps = 0", r"train\.steps must be positive, got 0"),
        ("[train]\nbatch = 6\naccumulation = 4", r"train\.accumulation must divide batch=6, got 4"),
        ("[model]\nmax_length = 8", r"model\.max_length must be at least data\.length=256, got 8"),
        ("[train]\nentropy = -1.0", r"train\.entropy must be at least 0 and finite, got -1\.0"),
        ("[train]\nload = inf", r"train\.load must be at least 0 and finite, got inf"),
        ("[train]\naux_scope = 'batch'", r"train\.aux_scope in .* must be one of micro_batch, sequence, global, got"),
        ("[optim]\nmemory_lr = 0.0", r"optim\.memory_lr must be positive, got 0\.0"),
        ("[train]\nstop_at = 0", r"train\.stop_at must be positive, got 0"),
        ("[train]\nthreads = 0", r"train\.threads must be positive, got 0"),
        ("[train]\nsample_every = 0", r"train\.sample_every must be positive, got 0"),
        ("[train]\neval_batches = 0", r"train\.eval_batches must be positive, got 0"),
        ("[optim]\ndecay_fraction = 0.0", r"optim\.decay_fraction must be in \(0, 1\], got 0\.0"),
        ("[optim]\nfinal = 1.5", r"optim\.final must be in \[0, 1\], got 1\.5"),
        ("[optim]\nbetas = [0.9, 1.0]", r"optim\.betas must be in \[0, 1\), got \(0\.9, 1\.0\)"),
        ("[optim]\nweight_decay = -0.1", r"optim\.weight_decay must be at least 0, got -0\.1"),
        ("[model]\nmax_length = 0", r"model\.max_length must be at least data\.length=256, got 0"),
        (
            "[optim]\nsparse_state = true",
            r"unless sparsify\.method is one of static, .* got method='magnitude', sparsity=0\.0",
        ),
        (
            '[optim]\nsparse_state = true\n[sparsify]\nmethod = "top_kast"\nsparsity = 0.5',
            "got method='top_kast', spars",
        ),
        ("[sparsify]\nsparsity = 1.0", r"sparsify\.sparsity must be in \[0, 1\), got 1\.0"),
        ("a = = 1", r"run\.toml is not valid TOML"),
    ],
)
def test_bad_configs_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(written(tmp_path, text))


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config at .*nothing\.toml"):
        load_config(tmp_path / "nothing.toml")


def test_sections_become_a_model() -> None:
    section = ModelConfig(
        dim=32,
        layers=3,
        heads=4,
        kv_heads=2,
        num_experts=4,
        hidden=16,
        layer=(LayerOverride(at=1, heads=2, feedforward="dense", hidden=64, pattern="causal() & sliding_window(4)"),),
    )
    config = model_config(section, vocab_size=300, length=128)
    first, second = config.layers[:2]
    assert (first.attention.num_heads, first.attention.num_kv_heads, first.attention.head_dim) == (4, 2, 8)
    assert first.feedforward == MoEConfig(hidden=16, num_experts=4, k=2)
    assert (second.attention.num_heads, second.attention.pattern) == (2, "causal() & sliding_window(4)")
    assert second.feedforward == DenseConfig(64)
    assert (config.vocab_size, config.max_length) == (300, 128)
    with pytest.raises(ValueError, match=r"model\.layer\.at must be in \[0, layers=3\), got 3"):
        model_config(dataclasses.replace(section, layer=(LayerOverride(at=3),)), vocab_size=300, length=128)
    with pytest.raises(ValueError, match="model.heads must divide dim=32, got 5"):
        model_config(dataclasses.replace(section, heads=5), vocab_size=300, length=128)


def test_every_field_is_a_flag_with_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from training.cli import main

    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    for name, kind in fields_of(RunConfig):
        if kind != tuple[LayerOverride, ...]:
            assert f"--{name.replace('_', '-')}" in shown, name
    assert "(default: " in shown
    assert "Peak learning rate." in shown
