"""Runs of a prefix language model: what the loss, the evaluation and pruning count, and what is refused."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tolerances import close
from training.cli import main
from training.config import RunConfig, from_dict
from training.data import Batch, held_out_batches
from training.distill import distill
from training.evaluation import evaluate
from training.model_config import ModelConfig
from training.prune_recovery import _loss
from training.prune_text import quality
from training.run import make_model, train
from training.step import accumulate, forward
from training.tokenizer import byte_tokenizer
from transformer import Transformer, TransformerConfig
from transformer.hf import to_hugging_face

PREFIX, LENGTH = 6, 16
SIZES: dict[str, Any] = {"dim": 16, "layers": 2, "heads": 2, "feedforward": "dense", "hidden": 24}


def model(**change: Any) -> Transformer:
    config = TransformerConfig.uniform(
        vocab_size=257, dim=16, num_layers=2, num_heads=2, prefix_length=PREFIX, max_length=LENGTH
    )
    return Transformer(dataclasses.replace(config, **change), generator=torch.Generator().manual_seed(0)).double()


def batch(rows: int = 4) -> Batch:
    ids = torch.randint(257, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return Batch(ids[:, :-1], ids[:, 1:])


def nats(built: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """-log p of each token past the prefix, one by one."""
    rows = built(ids[:, :-1]).logits.log_softmax(-1)
    return torch.stack([-rows[row, t - 1, ids[row, t]] for row in range(len(ids)) for t in range(PREFIX, ids.shape[1])])


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_step_counts_the_tokens_past_the_prefix(micro_batches):
    built, given = model(), batch()
    whole = torch.cat([given.inputs, given.targets[:, -1:]], 1)
    wanted = nats(built, whole)
    assert len(wanted) == 4 * (LENGTH + 1 - PREFIX) == forward(built, given).targets
    close(forward(built, given).ce, wanted.mean())
    wanted.mean().backward()
    gradients = {name: weight.grad.clone() for name, weight in built.named_parameters()}
    built.zero_grad()
    output = accumulate(built, given, micro_batches=micro_batches)
    close(output.ce, wanted.mean().detach())
    for name, weight in built.named_parameters():
        close(weight.grad, gradients[name])


def test_an_evaluation_counts_bytes_and_nats_past_the_prefix_of_each_window():
    built, tokenizer = model().eval(), byte_tokenizer()
    tokens = (np.arange(2 * LENGTH + 1 + 9) * 7 + 65) % 250 + 1
    tokens = np.where(tokens == tokenizer.eos_id, 65, tokens)
    with torch.no_grad():
        parts = [nats(built, torch.from_numpy(tokens[at : at + LENGTH + 1])[None]) for at in (0, LENGTH, 2 * LENGTH)]
    wanted = torch.cat(parts)
    found = evaluate(built, tokens, tokenizer, length=LENGTH)
    assert found.tokens == found.bytes == len(wanted) == 2 * (LENGTH + 1 - PREFIX) + 9 + 1 - PREFIX
    close(torch.tensor(found.loss, dtype=torch.double), wanted.mean())
    close(torch.tensor(found.bits_per_byte, dtype=torch.double), wanted.mean() / math.log(2))
    masks = [window.past_prefix(PREFIX).mask for window in held_out_batches(tokens, batch=1, length=LENGTH)]
    assert [None if mask is None else int(mask.sum()) for mask in masks] == [None, None, 9], "the prefix is no padding"


def test_pruning_and_distillation_judge_by_the_same_tokens():
    built, given = model().eval(), batch()
    ids = torch.cat([given.inputs, given.targets[:, -1:]], 1)
    wanted = nats(built, ids).mean().detach()
    found = quality(built, ids, None, batch=2, progress=lambda rows: rows)
    assert found.loss == pytest.approx(wanted.item(), rel=1e-6) and found.tokens == 4 * (LENGTH + 1 - PREFIX)
    with pytest.raises(ValueError, match="windows must hold the model's prefix_length=6 tokens at least, got 5"):
        quality(built, ids[:, :PREFIX], None, batch=2, progress=lambda rows: rows)
    (told,) = distill(built, built, [given.inputs], torch.optim.SGD(built.parameters(), lr=0.0), next_token=1.0)
    assert told.next_token == pytest.approx(nats(built, given.inputs).mean().item(), rel=1e-6)


def config(folder: Path, **sections: Any) -> RunConfig:
    texts = folder / "texts"
    texts.mkdir(exist_ok=True)
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"the number is {number} and the next is {number + 1}\n" * 12)
    record = {
        "out": str(folder / "run"),
        "data": {"corpus": str(texts), "tokenizer": "bytes", "length": LENGTH, "held_out": 0.2},
        "model": SIZES | {"pattern": "prefix_lm(6)", "prefix_length": PREFIX} | sections.pop("model", {}),
        "train": {"steps": 4, "batch": 4, "eval_every": 2, "dtype": "float32"} | sections.pop("train", {}),
    }
    return from_dict(RunConfig, record | sections, where="here")


def test_a_run_trains_goes_on_and_is_pruned(tmp_path, capsys):
    file = tmp_path / "run.toml"
    written = config(tmp_path)
    outcome = train(written)
    assert outcome.step == 4 and outcome.evaluation.tokens % (LENGTH + 1 - PREFIX) <= LENGTH
    saved = Transformer.from_pretrained(outcome.checkpoint)
    assert saved.config.prefix_length == PREFIX and saved.config.layers[0].attention.pattern == "prefix_lm(6)"
    with pytest.raises(SystemExit) as ended:
        main(["prune", str(tmp_path / "run"), "--out", str(tmp_path / "pruned"), "--heads", "0.5"])
    assert ended.value.code in (0, None), capsys.readouterr()
    assert Transformer.from_pretrained(tmp_path / "pruned").config.prefix_length == PREFIX
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(tmp_path / "run"), "--prompt", "the number is", "--tokens", "3"])
    assert ended.value.code in (0, None)
    with pytest.raises(SystemExit) as ended:
        main(["generate", str(tmp_path / "run"), "--prompt", "the", "--tokens", "3"])
    assert ended.value.code not in (0, None)
    assert "the prompt must hold the prefix_length=6 tokens" in capsys.readouterr().err
    assert not file.exists() and json.loads((tmp_path / "run" / "run.json").read_text())


def test_a_causal_model_can_become_one(tmp_path):
    causal_run = train(config(tmp_path, model={"pattern": "causal()", "prefix_length": 0}))
    trained = Transformer.from_pretrained(causal_run.checkpoint)
    again = config(tmp_path, init=str(causal_run.checkpoint))
    made = make_model(again, vocab_size=trained.config.vocab_size)
    assert made.config.prefix_length == PREFIX and made.config.seen_prefix == PREFIX
    kept, found = trained.state_dict(), made.state_dict()
    assert kept.keys() == found.keys() and all(found[name].equal(kept[name]) for name in kept)


def test_settings_that_leave_nothing_to_predict_or_sample_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model.prefix_length must be below data.length=16, so that .* got 16"):
        train(config(tmp_path, model={"pattern": "causal()", "prefix_length": 16}))
    with pytest.raises(ValueError, match=r"train.prompt must have from 6 to .*at least its prefix_length"):
        train(config(tmp_path, train={"sample_every": 2, "prompt": "the"}))
    with pytest.raises(ValueError, match="or prefix_length, got 0, to the number of its first tokens"):
        train(config(tmp_path, model={"prefix_length": 0}))
    with pytest.raises(ValueError, match="prefix_length must be >= 0, got -2"):
        train(config(tmp_path, model={"pattern": "causal()", "prefix_length": -2}))


def test_no_llama_has_a_prefix(tmp_path):
    with pytest.raises(ValueError, match=r"pattern is .causal\(\) \| sinks\(6\). here"):
        to_hugging_face(model(), tmp_path)
    assert ModelConfig().prefix_length == 0


def test_distillation_compares_what_has_not_seen_the_next_token():
    causal = TransformerConfig.uniform(vocab_size=257, dim=16, num_layers=2, num_heads=2, max_length=LENGTH)
    built = model().eval()
    teacher = Transformer(causal, generator=torch.Generator().manual_seed(5)).double().eval()
    ids, rate = batch().inputs, 0.0
    with torch.no_grad():
        own, wanted = built(ids).logits.log_softmax(-1), teacher(ids).logits.log_softmax(-1)
        each = (wanted.exp() * (wanted - own)).sum(-1)
        near = built(ids).hidden[:, PREFIX - 1 :], teacher(ids).hidden[:, PREFIX - 1 :]
    optimizer = torch.optim.SGD(built.parameters(), lr=rate)
    (told,) = distill(built, teacher, [ids], optimizer, hidden=1.0)
    assert told.kl == pytest.approx(each[:, PREFIX - 1 :].mean().item(), rel=1e-6)
    assert told.hidden == pytest.approx(((near[0] - near[1]).square().sum() / near[1].square().sum()).item(), rel=1e-6)
    close(_loss(built, teacher, ids, "distill", None).detach(), each[:, PREFIX - 1 :].mean())
    (asked,) = distill(built, teacher, [ids], optimizer, next_token=1.0)
    assert asked.next_token == pytest.approx(nats(built, ids).mean().item(), rel=1e-6)
    (plain,) = distill(teacher, built, [ids], torch.optim.SGD(teacher.parameters(), lr=rate))
    reverse = (own.exp() * (own - wanted)).sum(-1).mean()
    assert plain.kl == pytest.approx(reverse.item(), rel=1e-6), "it is the student's prefix that counts"


def test_texts_are_counted_from_their_own_first_token():
    built = model(layers=model().config.layers[:0])
    ids, mask = batch().inputs, torch.stack([torch.arange(LENGTH) >= some for some in (0, 3, 6, 9)])
    keywords = {"input_ids": ids, "attention_mask": mask}
    wanted = built(ids, attention_mask=mask, labels=ids.masked_fill(~mask, -100)).loss
    (told,) = distill(built, built, [keywords], torch.optim.SGD(built.parameters(), lr=0.0), next_token=1.0)
    assert told.next_token == pytest.approx(wanted.item(), rel=1e-6)
    kept = Batch(ids, batch().targets, mask).past_prefix(PREFIX).targets != -100
    assert kept.sum(1).tolist() == [LENGTH - some - PREFIX + 1 for some in (0, 3, 6, 9)]


def test_a_causal_model_may_leave_the_prefix_out_too():
    causal = TransformerConfig.uniform(
        vocab_size=257, dim=16, num_layers=1, num_heads=2, prefix_length=PREFIX, pattern="causal()", max_length=LENGTH
    )
    built, given = Transformer(causal).double(), batch()
    wanted = nats(built, torch.cat([given.inputs, given.targets[:, -1:]], 1)).mean()
    close(forward(built, given).ce, wanted)
    close(accumulate(built, given, micro_batches=2).ce, wanted.detach())
    tokens = np.arange(LENGTH + 1) + 40
    assert evaluate(built, tokens, byte_tokenizer(), length=LENGTH).tokens == LENGTH + 1 - PREFIX


def test_a_batch_keeps_its_noise():
    keyed = batch().keyed(seed=1, step=2)
    assert keyed.past_prefix(PREFIX).noise is keyed.noise and keyed.past_prefix(1) is keyed


def test_prune_counts_the_bytes_of_what_it_predicts():
    built = model().eval()
    ids = torch.cat([batch().inputs, batch().targets[:, -1:]], 1)
    sizes = torch.arange(257)
    found = quality(built, ids, sizes, batch=2, progress=lambda rows: rows)
    nats = found.loss * found.tokens
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / int(ids[:, PREFIX:].sum()))


@pytest.mark.parametrize(
    ("words", "prefix", "seen"),
    [
        ({"prefix_length": 3, "pattern": "prefix_lm(3)"}, 3, 3),
        ({"prefix_length": 3, "pattern": "causal() & sliding_window(4)"}, 3, 0),
        ({"prefix_length": 9, "pattern": "prefix_lm(9)"}, 9, 9),
        ({"prefix_length": 0, "pattern": "causal() & sliding_window(4)"}, 0, 0),
        ({"prefix_length": 0, "pattern": "causal()", "selection": "moba", "select_block": 4}, 0, 0),
        ({"prefix_length": 0, "pattern": "prefix_lm(4)"}, 6, 6),
    ],
    ids=str,
)
def test_what_a_prefix_model_may_become(tmp_path, words, prefix, seen):
    folder = model(max_length=LENGTH).float().save_pretrained(tmp_path / "trained")
    told = []
    made = make_model(config(tmp_path, init=str(folder), model=words), vocab_size=257, report=told.append)
    assert (made.config.prefix_length, made.config.seen_prefix) == (prefix, seen)
    assert told[0].to_dict()["prefix_length"] == {"before": PREFIX, "now": prefix}
    assert (f"prefix_length {prefix}, before {PREFIX}" in told[0].lines()) == (prefix != PREFIX)
    with pytest.raises(ValueError, match="pattern 'prefix_lm\\(7\\)' sees the future"):
        make_model(config(tmp_path, init=str(folder), model={"pattern": "prefix_lm(7)"}), vocab_size=257)


def test_lengths_within_the_prefix_are_refused_wherever_they_are_given(tmp_path):
    folder = model(max_length=LENGTH).float().save_pretrained(tmp_path / "trained")
    short = config(tmp_path, init=str(folder), model={"pattern": "causal()", "prefix_length": 0})
    short = dataclasses.replace(
        short, data=dataclasses.replace(short.data, length=5), model=ModelConfig(**SIZES, pattern="prefix_lm(6)")
    )
    with pytest.raises(ValueError, match="data.length must be above prefix_length=6 of .*, got 5"):
        make_model(short, vocab_size=257)
    tokens = np.arange(40) % 250 + 1
    with pytest.raises(ValueError, match="length must be >= the model's prefix_length=6, got 5"):
        evaluate(model(), tokens, byte_tokenizer(), length=5)
    assert evaluate(model(), tokens, byte_tokenizer(), length=6).tokens > 0


def test_a_causal_model_with_a_prefix_samples_from_a_short_prompt(tmp_path):
    words = {"pattern": "causal()", "prefix_length": PREFIX}
    assert train(config(tmp_path, model=words, train={"sample_every": 2, "prompt": "the"})).step == 4
