"""Cross entropy from hidden states against whole logits in fp64, on one process and with a split vocabulary."""

from __future__ import annotations

import multiprocessing
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genscale.objectives import cross_entropy as row_wise
from genscale.objectives import linear_cross_entropy as module
from genscale.objectives.cross_entropy import cross_entropy
from genscale.objectives.linear_cross_entropy import linear_cross_entropy

VOCABULARY, WIDTH, TOKENS = 37, 8, (3, 11)


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCABULARY - 2, TOKENS, generator=generator)
    weights = torch.rand(TOKENS, generator=generator) * (torch.rand(TOKENS, generator=generator) < 0.7)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, weights


def reference(hidden, weight, targets, weights, smoothing, z_loss, soft_cap, known) -> tuple[Tensor, ...]:
    """The three sums by torch's own cross entropy of whole logits."""
    logits = F.linear(hidden, weight)
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    logits = logits[..., :known].flatten(0, 1)
    factors = torch.ones(targets.numel()) if weights is None else weights.flatten()
    squared = logits.logsumexp(1) ** 2
    smoothed = F.cross_entropy(logits, targets.flatten(), reduction="none", label_smoothing=smoothing)
    plain = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return tuple((factors * values).sum() for values in (smoothed + z_loss * squared, plain, squared))


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 1e-2},
    "soft_cap": {"soft_cap": 3.0},
    "known": {"known": VOCABULARY - 2},
    "all": {"label_smoothing": 0.1, "z_loss": 1e-2, "soft_cap": 5.0, "known": VOCABULARY - 1},
}


def expected(case: dict[str, Any], weighted: str) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Sums and gradients in fp64."""
    hidden, weight, targets, weights = example()
    options = (case.get(key, default) for key, default in OPTIONS.items())
    sums = reference(hidden, weight, targets, of_kind(weights, weighted), *options)
    return [value.detach() for value in sums], torch.autograd.grad(3.7 * sums[0], (hidden, weight))


OPTIONS: dict[str, Any] = {"label_smoothing": 0.0, "z_loss": 0.0, "soft_cap": None, "known": None}


def of_kind(weights: Tensor, weighted: str) -> Tensor | None:
    return {"every token": None, "mask": weights > 0, "factors": weights}[weighted]


@pytest.fixture
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch)


def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, each of several blocks, the last ones ragged."""
    monkeypatch.setitem(row_wise._BLOCK, "cpu", 4 * VOCABULARY)
    monkeypatch.setitem(module._CHUNK, "cpu", 0)
    monkeypatch.setattr(module, "_FEWEST_ROWS", 10)


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("weighted", ["every token", "mask", "factors"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sums_and_gradients_equal_those_of_whole_logits(case, weighted, dtype, tolerance):
    hidden, weight, targets, weights = example(dtype)
    ours = linear_cross_entropy(hidden, weight, targets, of_kind(weights, weighted), **case)
    (3.7 * ours.total).backward()
    sums, gradients = expected(case, weighted)
    for value, expected_value in zip(ours, sums, strict=True):
        torch.testing.assert_close(value.detach().double(), expected_value, rtol=tolerance, atol=tolerance)
    for parameter, gradient in zip((hidden, weight), gradients, strict=True):
        assert parameter.grad.dtype == dtype
        torch.testing.assert_close(parameter.grad.double(), gradient, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.usefixtures("_small_pieces")
def test_only_what_is_asked_for_gets_a_gradient():
    hidden, weight, targets, _ = example()
    _, (of_hidden, of_weight) = expected({}, "every token")
    (3.7 * linear_cross_entropy(hidden, weight.detach(), targets).total).backward()
    (3.7 * linear_cross_entropy(hidden.detach(), weight, targets).total).backward()
    torch.testing.assert_close(hidden.grad, of_hidden)
    torch.testing.assert_close(weight.grad, of_weight)
    with torch.no_grad():
        sums = linear_cross_entropy(hidden, weight, targets)
    assert not sums.total.requires_grad
    torch.testing.assert_close(sums.total, expected({}, "every token")[0][0])


def test_a_second_backward_says_that_there_is_one():
    hidden, weight, targets, _ = example()
    total = linear_cross_entropy(hidden, weight, targets).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="goes backward once"):
        total.backward()


def test_a_pipeline_goes_backward_again():
    hidden, weight, targets, _ = example()
    total = linear_cross_entropy(hidden, weight, targets, again=True).total
    _, (of_hidden, of_weight) = expected({}, "every token")
    (first,) = torch.autograd.grad(3.7 * total, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(3.7 * total, weight)
    torch.testing.assert_close(first, of_hidden)
    torch.testing.assert_close(second, of_weight)


def test_no_tokens_have_no_loss():
    hidden, weight, targets, _ = example()
    sums = linear_cross_entropy(hidden[:0], weight, targets[:0])
    sums.total.backward()
    assert sums.total == 0
    assert torch.equal(weight.grad, torch.zeros_like(weight))


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *made) if made else self.elements
        return result


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_never_exist_whole(monkeypatch, precision):
    monkeypatch.setattr(module, "_FEWEST_ROWS", 16)
    monkeypatch.setitem(module._CHUNK, "cpu", 2**16)
    tokens, vocabulary, width = 4096, 2048, 8
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    with LargestTensor() as largest:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            total = linear_cross_entropy(hidden, weight, targets, None, 0.1, 1e-4, 30.0).total
        total.backward()
    assert 2**15 <= largest.elements <= 2**16  # tokens x vocabulary is 2^23


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_as_exact_as_whole_logits(dtype):
    gradients, totals = [], []
    for fused in (True, False):
        hidden, weight, targets, weights = example(torch.float32)
        with torch.autocast("cpu", dtype):
            if fused:
                total = linear_cross_entropy(hidden, weight, targets, weights, 0.1).total
            else:
                total = cross_entropy(F.linear(hidden, weight), targets, weights, 0.1).total
        (3.7 * total).backward()
        assert total.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
        gradients.append((hidden.grad, weight.grad))
        totals.append(total.item())
    assert totals[0] == pytest.approx(totals[1], rel=2**-8)
    _, exact = expected({"label_smoothing": 0.1}, "factors")
    for ours, theirs, wanted in zip(*gradients, exact, strict=True):
        error = (ours.double() - wanted).norm()
        assert error <= 1.2 * (theirs.double() - wanted).norm()
        assert error <= 2**-7 * wanted.norm()


def test_fp16_gradients_survive_under_a_loss_scale():
    """A probability of 1e-9 is below fp16, but not once the loss scale has multiplied it."""
    hidden = torch.tensor([[20.7, 0.0]], dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float16, requires_grad=True)
    (2.0**16 * linear_cross_entropy(hidden, weight, torch.tensor([0])).total).backward()
    assert hidden.grad[0, 1].item() == pytest.approx(2**16 * 1.02e-9, rel=0.05)


SPLITS = {
    "two": [19, 18],
    "two, uneven": [30, 7],
    "three": [13, 13, 11],
    "last one unknown": [20, 16, 1],
    "none": [22, 15, 0],
}


def one_rank(rank: int, rows: list[int], folder: Path, queue: Any) -> None:
    """Sums and gradients of the rank's part, for each case."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(rows))
    hidden, weight, targets, weights = example()
    first = [0, *accumulate(rows)][rank]
    part = weight.detach()[first : first + rows[rank]].clone().requires_grad_()
    answers = []
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch)
        for case in CASES.values():
            hidden.grad = part.grad = None
            split = {"group": distributed.group.WORLD, "first_row": first, "vocabulary": VOCABULARY}
            sums = linear_cross_entropy(hidden, part, targets, weights, **case, **split)
            (3.7 * sums.total).backward()
            with torch.no_grad():
                again = linear_cross_entropy(hidden, part, targets, weights, **case, **split)
            assert all(torch.equal(*pair) for pair in zip(sums, again, strict=True))
            answers.append([value.detach().numpy() for value in (*sums, hidden.grad, part.grad)])
    queue.put((rank, answers))
    distributed.destroy_process_group()


@pytest.mark.parametrize("rows", SPLITS.values(), ids=SPLITS)
def test_a_split_vocabulary_gives_what_one_process_does(rows, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=one_rank, args=(rank, rows, tmp_path, queue)) for rank in range(len(rows))]
    for process in ranks:
        process.start()
    answers = dict(queue.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(30)
    assert [process.exitcode for process in ranks] == [0] * len(rows)
    for number, case in enumerate(CASES.values()):
        parts = [[torch.from_numpy(value) for value in answers[rank][number]] for rank in range(len(rows))]
        for part in parts[1:]:
            assert all(torch.equal(*pair) for pair in zip(part[:3], parts[0][:3], strict=True)), "ranks disagree"
        sums, (of_hidden, of_weight) = expected(case, "factors")
        torch.testing.assert_close(parts[0][:3], sums, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(sum(part[3] for part in parts), of_hidden, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(torch.cat([part[4] for part in parts]), of_weight, rtol=1e-10, atol=1e-10)
