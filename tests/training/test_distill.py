"""Distillation losses against loops, and a pruned model that comes closer to its parent and keeps its zeros."""

import copy
import math

import pytest
import torch

from pruning import Masks, sparsify
from pruning.recovery import add_adapters, merge_adapters
from tests.pruning.test_merge import ids, own
from tests.tolerances import close
from tests.typecheck import unchecked
from training.distill import distill, distillation_loss, hidden_loss
from transformer import DenseConfig, MoEConfig


def slow_kl(student, teacher, temperature, mask=None):
    total, count = 0.0, 0
    for b in range(student.shape[0]):
        for t in range(student.shape[1]):
            if mask is not None and not mask[b, t]:
                continue
            p, q = ([math.exp(v / temperature) for v in logits[b, t].tolist()] for logits in (teacher, student))
            p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            count += 1
    return temperature**2 * total / count


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_and_its_gradient(temperature, masked):
    student = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]) if masked else None
    loss = distillation_loss(student, teacher, temperature=temperature, mask=mask)
    assert loss.item() == pytest.approx(slow_kl(student, teacher, temperature, mask))
    loss.backward()
    # d/ds T²·KL = T·(q − p), over the number of tokens
    p, q = ((logits.detach() / temperature).softmax(-1) for logits in (teacher, student))
    weight = torch.full((2, 3), 1 / 6, dtype=torch.float64) if mask is None else mask.double() / mask.sum()
    close(student.grad, temperature * (q - p) * weight.unsqueeze(-1))
    assert teacher.grad is None


def test_equal_logits_lose_nothing_and_half_precision_is_widened():
    logits = torch.randn(2, 3, 5).bfloat16()
    loss = distillation_loss(logits, logits)
    assert loss == 0 and loss.dtype == torch.float32


def test_hidden_states_are_compared_by_their_size():
    teacher = [torch.randn(2, 3, 4), 100 * torch.randn(2, 3, 4)]
    assert hidden_loss(teacher, teacher) == 0
    close(hidden_loss([torch.zeros(2, 3, 4)] * 2, teacher), torch.tensor(1.0))
    mask = torch.tensor([[1, 0, 0], [1, 1, 0]])
    student = [state + torch.randn_like(state) for state in teacher]
    wanted = 0.0
    for own_state, state in zip(student, teacher, strict=True):
        places = [(0, 0), (1, 0), (1, 1)]
        wanted += sum((own_state[p] - state[p]).square().sum() for p in places) / sum(
            state[p].square().sum() for p in places
        )
    close(hidden_loss(student, teacher, mask=mask), wanted / 2)


def parent(feedforward):
    """Logits of some size, so that there is something to lose."""
    teacher = own(feedforward)
    with torch.no_grad():
        teacher.embedding.weight.mul_(2.5)
    return teacher


def batches(count=12):
    return [ids(seed=seed) for seed in range(count)]


@pytest.mark.parametrize("feedforward", [DenseConfig(hidden=20), MoEConfig(hidden=8, num_experts=4, k=2)])
def test_a_pruned_model_comes_closer_and_keeps_its_zeros(feedforward):
    teacher = parent(feedforward)
    student = copy.deepcopy(teacher)
    masks = sparsify(student, sparsity=0.5)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0.1)
    record = distill(
        student, teacher, batches() * 3, optimizer, temperature=2.0, next_token=0.01, hidden=0.5, masks=masks
    )
    first, last = record[0], record[-1]
    assert len(record) == 36 and last.kl < 0.8 * first.kl and last.hidden < 0.7 * first.hidden
    assert first.loss == pytest.approx(first.kl + 0.01 * first.next_token + 0.5 * first.hidden, rel=1e-5)
    assert all(p.equal(before[name]) and p.grad is None for name, p in teacher.named_parameters())
    assert all(p.requires_grad for p in teacher.parameters())
    assert Masks.of(student).zeros >= masks.zeros
    assert all(not p[~masks.kept[name]].any() for name, p in student.named_parameters() if name in masks.kept)


def test_adapters_recover_what_pruning_lost():
    teacher = parent(DenseConfig(hidden=20))
    student = copy.deepcopy(teacher)
    masks = sparsify(student, sparsity=0.5)
    adapters = add_adapters(student, masks, rank=4)
    record = distill(student, teacher, batches() * 4, torch.optim.AdamW(adapters, lr=1e-2))
    assert record[-1].kl < 0.7 * record[0].kl and record[0].hidden == record[0].next_token == 0
    expected = student(ids()).logits
    assert merge_adapters(student).zeros == masks.zeros and student(ids()).logits.equal(expected)


def test_padding_teaches_nothing_and_the_first_kl_is_the_loss():
    teacher = own(DenseConfig(hidden=20))
    student = copy.deepcopy(teacher)
    sparsify(student, sparsity=0.5)
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[2, 5:] = 0
    batch = {"input_ids": ids(), "attention_mask": mask, "labels": ids()}
    with torch.no_grad():
        logits, wanted = (model(ids(), attention_mask=mask).logits for model in (student, teacher))
    record = distill(student, teacher, [batch], torch.optim.SGD(student.parameters(), lr=0.0), next_token=1.0)
    assert record[0].kl == pytest.approx(slow_kl(logits, wanted, 1.0, mask), rel=1e-4)
    expected = student(ids(), attention_mask=mask, labels=ids()).loss
    assert record[0].next_token == pytest.approx(float(expected.detach()), rel=1e-4)


def test_hugging_face_students():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    teacher = transformers.LlamaForCausalLM(config)
    student = copy.deepcopy(teacher)
    masks = sparsify(student, sparsity=0.5)
    with torch.no_grad():
        states = [model(ids(seed=0), output_hidden_states=True).hidden_states[-1] for model in (student, teacher)]
    expected = (states[0] - states[1]).square().sum() / states[1].square().sum()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    record = distill(
        student, teacher, [{"input_ids": batch} for batch in batches()], optimizer, hidden=1.0, masks=masks
    )
    assert record[0].hidden == pytest.approx(float(expected), rel=1e-4) and teacher.training
    assert all(not p[~masks.kept[name]].any() for name, p in student.named_parameters() if name in masks.kept)


@pytest.mark.parametrize(
    "run, message",
    [
        (lambda x: distillation_loss(x, x, temperature=0.0), "temperature must be > 0, got 0.0"),
        (lambda x: distillation_loss(x, x[..., :2]), r"teacher_logits must have the student's shape \[2, 3, 4\], got"),
        (lambda x: distillation_loss(x, x, mask=torch.zeros(2, 3)), "mask must leave at least one token, got none"),
        (lambda x: hidden_loss([x], []), "must have equally many states, got 1 and 0"),
        (lambda x: hidden_loss([], []), "must have equally many states, got 0 and 0"),
        (lambda x: hidden_loss([x], [x[:1]]), "teacher must have the student's shape"),
    ],
)
def test_bad_input(run, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        run(torch.randn(2, 3, 4))


def test_a_loop_that_goes_astray_stops():
    teacher = own(DenseConfig(hidden=20))
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.norm.weight.fill_(torch.nan)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="loss of step 0 must be finite, got nan"):
        distill(student, teacher, [ids()], optimizer)
    with unchecked(), pytest.raises(ValueError, match="batches must be an iterable of batches, got one Tensor"):
        distill(student, teacher, ids(), optimizer)
