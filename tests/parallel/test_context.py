"""Real processes on gloo: attention over a sequence split over ranks gives what one process gives on the whole."""

from __future__ import annotations

import itertools
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor, distributed
from torch.utils.checkpoint import checkpoint

from genscale.models.attention import attend
from genscale.models.flex import _mask_function
from genscale.models.mask import AttentionMask
from genscale.parallel import ring
from genscale.parallel.context import Portions, RowsOfMask, context_attend
from genscale.runtime.errors import UserError

TOKENS, BATCH, HEADS, KEY_VALUE_HEADS, WIDTH, SCALE = 48, 2, 4, 2, 8, 0.3
SIZES = (2, 3, 4)
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.03}
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 21 + [2] * 18, [3] * 30 + [0] * 13 + [1] * 5])  # 1 fills a chunk of 6 alone
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 7},
    "wide window": {"window": 31},
    "window of one": {"window": 1},
    "bidirectional window": {"causal": False, "window": 7},
    "documents": {"documents": DOCUMENTS},
    "bidirectional documents": {"causal": False, "documents": DOCUMENTS},
    "documents and window": {"documents": DOCUMENTS, "window": 5},
    "padding": {"start": torch.tensor([0, 11])},
}
CASES: dict[str, dict[str, Any]] = {}
for _name, _mask in MASKS.items():
    CASES[_name] = {"mask": _mask}
    CASES[f"{_name}, soft cap"] = {"mask": _mask, "soft_cap": 0.7}
    CASES[f"{_name}, tiles"] = {"mask": _mask, "tile": 4}
    CASES[f"{_name}, soft cap, tiles"] = {"mask": _mask, "soft_cap": 0.7, "tile": 4}
for _name in ("causal", "bidirectional", "documents and window"):
    CASES[f"{_name}, float32"] = {"mask": MASKS[_name], "dtype": torch.float32}
    CASES[f"{_name}, bfloat16"] = {"mask": MASKS[_name], "dtype": torch.bfloat16}
    CASES[f"{_name}, soft cap, float32"] = {"mask": MASKS[_name], "dtype": torch.float32, "soft_cap": 0.7}
    CASES[f"{_name}, soft cap, bfloat16"] = {"mask": MASKS[_name], "dtype": torch.bfloat16, "soft_cap": 0.7}
CASES["one head to each key"] = {"mask": {}, "heads": KEY_VALUE_HEADS}
CASES["recompute"] = {"mask": {}, "recompute": True}
# Queries, keys and values keep the precision that they come in.
CASES["autocast"] = {"mask": {}, "dtype": torch.float32, "autocast": True}
METHODS = {
    "ring": {"method": "ring"},
    "all_gather": {"method": "all_gather"},
    # Nothing is dropped at this rate, but the kernels are those that can drop, as on an accelerator.
    "all_gather, attend": {"method": "all_gather", "dropout": 1e-15},
}


def inputs(dtype: torch.dtype = torch.float64, heads: int = HEADS) -> list[Tensor]:
    """Queries, keys, values and the gradient of the loss by the output, of the whole sequence."""
    draws = torch.Generator().manual_seed(1)
    shapes = [(BATCH, n, TOKENS, WIDTH) for n in (heads, KEY_VALUE_HEADS, KEY_VALUE_HEADS, heads)]
    return [torch.randn(shape, dtype=torch.float64, generator=draws).to(dtype) for shape in shapes]


def attention(
    attend: Any, x: list[Tensor], mask: dict, soft_cap: float | None, recompute: bool, autocast: bool
) -> list[Tensor]:
    """Output and gradients of queries, keys and values."""
    q, k, v, slope = x
    q, k, v = (part.clone().requires_grad_() for part in (q, k, v))
    arguments = (q, k, v, AttentionMask(TOKENS, TOKENS, **mask), SCALE, soft_cap)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = checkpoint(attend, *arguments, use_reentrant=False) if recompute else attend(*arguments)
        gradients = torch.autograd.grad(y, (q, k, v), slope)
    return [y.detach(), *gradients]


def runs(method: str, case: dict[str, Any]) -> bool:
    """torch's own kernel casts under autocast; tiles are not its matter."""
    return "attend" not in method or not ("autocast" in case or "tile" in case)


def run_rank(folder: str) -> None:
    """All cases on this rank; what it found goes into a file."""
    distributed.init_process_group("gloo")
    group, rank, size = distributed.group.WORLD, distributed.get_rank(), distributed.get_world_size()
    assert group is not None
    portions = Portions(TOKENS, size, rank)
    found: dict[Any, Any] = {}
    for (name, case), (method, options) in itertools.product(CASES.items(), METHODS.items()):
        if not runs(method, case):
            continue
        ring.TILE = case.get("tile", 256)
        x = [portions.take(part, 2) for part in inputs(case.get("dtype", torch.float64), case.get("heads", HEADS))]
        attend_here = partial(context_attend, portions=Portions(TOKENS, size, rank), group=group, **options)
        settings = [case.get(key) or False for key in ("recompute", "autocast")]
        found[name, method] = attention(attend_here, x, case["mask"], case.get("soft_cap"), *settings)
    found["split and join"] = split_and_join(portions, group, rank)
    torch.save(found, Path(folder) / f"{rank}.pt")
    for method in ("ring", "all_gather"):
        q, k, v, _ = [portions.take(part, 2).requires_grad_() for part in inputs()]
        y = context_attend(q, k, v, AttentionMask(TOKENS, TOKENS), SCALE, portions=portions, group=group, method=method)
        with pytest.raises(RuntimeError, match="once"):
            torch.autograd.grad(y.sum(), q, create_graph=True)
    distributed.destroy_process_group()


def split_and_join(portions: Portions, group: Any, rank: int) -> dict[str, Tensor]:
    """The loss of rank r is (r + 1) * (places of the joined squares), on a tensor that all have whole."""
    whole = torch.arange(TOKENS * 3.0, dtype=torch.float64).view(1, TOKENS, 3).requires_grad_()
    part = portions.split(whole, group)
    joined = portions.join(part * part, group)
    places = torch.arange(1.0, TOKENS + 1)[:, None]
    (gradient,) = torch.autograd.grad((joined * places).sum() * (rank + 1), whole)
    other_dim = portions.join(part.detach().transpose(1, 2), group, dim=-1).transpose(1, 2)
    return {"whole": whole.detach(), "joined": joined.detach(), "gradient": gradient, "other": other_dim}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each rank of a number of them found, as a list; started once for each number."""

    @cache
    def run(size: int) -> list[dict[Any, Any]]:
        folder = tmp_path_factory.mktemp(f"on-{size}")
        program = f"import runpy; runpy.run_path({__file__!r})['run_rank']({str(folder)!r})"
        ended = Ranks(program, size).end(seconds=120)
        assert [rank.code for rank in ended.values()] == [0] * size, [rank.printed for rank in ended.values()]
        return [torch.load(folder / f"{rank}.pt") for rank in range(size)]

    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", SIZES)
def test_ranks_give_the_output_and_gradients_of_one_process(found: Any, size: int, method: str) -> None:
    for name, case in CASES.items():
        if not runs(method, case):
            continue
        dtype = case.get("dtype", torch.float64)
        limit = LIMITS[dtype]
        # The truth for low precision is the formula in a higher one, on the same rounded numbers.
        exact = {torch.bfloat16: torch.float32}.get(dtype, dtype)
        x = [part.to(exact) for part in inputs(dtype, case.get("heads", HEADS))]
        wanted = attention(attend, x, case["mask"], case.get("soft_cap"), False, False)
        for what, right, *parts in zip("yqkv", wanted, *(ranks[name, method] for ranks in found(size)), strict=True):
            whole = torch.empty_like(right, dtype=dtype)
            for rank, part in enumerate(parts):
                assert part.dtype == dtype
                whole[:, :, Portions(TOKENS, size, 0).of(rank)] = part
            error = (whole.to(exact) - right).abs().max() / right.abs().max().clamp(min=1)
            assert error < limit, (name, what, error)


@pytest.mark.parametrize("size", SIZES)
def test_join_is_the_whole_and_its_gradient_the_sum_over_ranks(found: Any, size: int) -> None:
    places, ranks = torch.arange(1.0, TOKENS + 1)[:, None], [rank["split and join"] for rank in found(size)]
    for rank, result in enumerate(ranks):
        whole = result["whole"]
        torch.testing.assert_close(result["joined"], whole * whole, atol=0, rtol=0)
        torch.testing.assert_close(result["other"], whole, atol=0, rtol=0)
        expected = torch.zeros_like(whole)
        here = Portions(TOKENS, size, rank).here()
        expected[:, here] = (2 * whole * places * sum(range(1, size + 1)))[:, here]
        torch.testing.assert_close(result["gradient"], expected, atol=0, rtol=1e-14)


def test_portions_share_every_token_once_and_take_is_in_their_order() -> None:
    portions = [Portions(24, 3, rank) for rank in range(3)]
    assert portions[0].here().tolist() == [0, 1, 2, 3, 20, 21, 22, 23]
    assert portions[0].of(2).tolist() == portions[2].here().tolist() == [8, 9, 10, 11, 12, 13, 14, 15]
    assert sorted(torch.cat([p.here() for p in portions]).tolist()) == list(range(24))
    x = torch.randn(2, 5, 24)
    for p in portions:
        assert torch.equal(p.take(x, dim=-1), x[:, :, p.here()])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("method", ["ring", "all_gather"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_computes_equally_many_scores_and_none_that_causality_hides(
    method: Any, ranks: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "TILE", 5)  # ragged
    mask, chunk = AttentionMask(ranks * 24, ranks * 24), 12
    work = [[scores(step) for step in Portions(ranks * 24, ranks, r).plan(mask, method, fused)] for r in range(ranks)]
    assert all(steps == work[0] for steps in work)
    triangle = chunk * chunk if fused else 5 * 5 + 5 * 10 + 2 * 12
    first = 2 * triangle + chunk * chunk
    assert work[0] == ([first] + [2 * chunk * chunk] * (ranks - 1) if method == "ring" else [sum(work[0])])
    assert sum(work[0]) == first + 2 * chunk * chunk * (ranks - 1)


def scores(blocks: list[ring.Block]) -> int:
    return sum((q.stop - q.start) * (k.stop - k.start) for q, k, *_ in blocks)


def test_blocks_that_a_window_or_other_documents_hide_are_skipped() -> None:
    def work(**mask: Any) -> int:
        whole = AttentionMask(64, 64, **mask)
        return sum(scores(step) for rank in range(4) for step in Portions(64, 4, rank).plan(whole, "ring", True))

    assert work(causal=False) == 64 * 64
    assert work(window=3) == 8 * 8 * 8 + 7 * 8 * 2  # each chunk of 8, and the last two keys of the one before
    assert work(causal=False, documents=torch.arange(64)[None] // 16) == 64 * 16
    assert work(causal=True, documents=torch.arange(64)[None] // 8) == 8 * 8 * 8
    one_wide = Portions(64, 4, 1).plan(AttentionMask(64, 64, causal=False), "all_gather", True)
    assert [len(step) for step in one_wide] == [2]  # all keys at once, for each of its chunks


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_rows_of_a_mask_are_right_for_every_kernel(mask: dict[str, Any]) -> None:
    """FlexAttention, which a CPU does not run backward, reads the rule of one query and one key."""
    whole = AttentionMask(TOKENS, TOKENS, **mask)
    for rows in (range(0, 8), range(16, 24), range(40, 48)):
        part = RowsOfMask(whole, rows)
        columns = slice(part.columns.start, part.columns.stop)
        seen = whole.visible()[:, :, rows.start : rows.stop]
        assert torch.equal(part.visible(), seen[..., columns])
        assert seen.sum() == part.visible().sum()  # none is left out
        queries, keys = torch.arange(part.queries)[:, None], torch.arange(part.keys)
        for b in range(len(seen)):
            rule = _mask_function(part)(torch.tensor(b), torch.tensor(0), queries, keys)
            assert torch.equal(rule.expand(part.queries, part.keys), part.visible()[b, 0])
        assert not part.triangular or rows.start == 0


@pytest.mark.parametrize("tokens", [0, 3, 30])
def test_a_length_that_does_not_split_evenly_is_the_users_mistake(tokens: int) -> None:
    with pytest.raises(UserError, match=f"a sequence of {tokens} tokens .* 4 ranks.* multiple of 8"):
        Portions(tokens, ranks=4, rank=0)


def test_what_cannot_be_computed_is_refused_before_any_message() -> None:
    here: dict[str, Any] = {"portions": Portions(TOKENS, 2, 0), "group": None}
    q, k, v, _ = (x[:, :, : TOKENS // 2] for x in inputs())
    with pytest.raises(ValueError, match="no dropout"):
        context_attend(q, k, v, AttentionMask(TOKENS, TOKENS), SCALE, dropout=0.1, method="ring", **here)
    for mask in (AttentionMask(TOKENS // 2, TOKENS), AttentionMask(TOKENS // 2, TOKENS // 2)):
        with pytest.raises(ValueError, match=f"do not make a sequence of {TOKENS}"):
            context_attend(q, k, v, mask, SCALE, method="ring", **here)
    with pytest.raises(ValueError, match="do not make"):
        context_attend(q[:, :, 1:], k, v, AttentionMask(TOKENS, TOKENS), SCALE, method="ring", **here)
