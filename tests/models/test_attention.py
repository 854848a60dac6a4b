"""Attention's kernels against the formula in float64, with every kind of mask."""

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from genscale.models import attention, blockwise
from genscale.models.attention import Attention, attend
from genscale.models.mask import AttentionMask


def may_see(query, key, causal, window, documents, batch):
    if causal and key > query:
        return False
    if window is not None and abs(query - key) >= window:
        return False
    return documents is None or bool(documents[batch, query] == documents[batch, key])


def reference(q, k, v, causal, window, documents, scale, cap):
    """Each query by itself, in a loop."""
    output = torch.zeros_like(q)
    groups = q.shape[1] // k.shape[1]
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        keys = [j for j in range(k.shape[2]) if may_see(i, j, causal, window, documents, b)]
        scores = k[b, h // groups, keys] @ q[b, h, i] * scale
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        output[b, h, i] = torch.softmax(scores, 0) @ v[b, h // groups, keys]
    return output


def inputs(heads=4, key_value_heads=2, length=21, dtype=torch.float64):
    torch.manual_seed(1)
    return [torch.randn(2, h, length, 6, dtype=dtype) for h in (heads, key_value_heads, key_value_heads)]


DOCUMENTS = torch.tensor([[0] * 4 + [1] * 10 + [2] * 7, [0] * 15 + [1] * 6])


@pytest.mark.parametrize("kernel", ["blockwise", "scaled_dot_product", "math"])
@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_every_mask_and_kernel_equals_the_formula(monkeypatch, kernel, cap, documents, window, causal):
    monkeypatch.setattr(blockwise, "block_of", lambda queries: 8)  # ragged: 8, 8, 5
    monkeypatch.setattr(attention, "blocks_pay", lambda *_: kernel == "blockwise")
    q, k, v = (x.requires_grad_() for x in inputs())
    mask = AttentionMask(21, 21, causal, window, documents)
    with sdpa_kernel(SDPBackend.MATH if kernel == "math" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        y = attend(q, k, v, mask, 0.3, cap)
    expected = reference(q, k, v, causal, window, documents, 0.3, cap)
    torch.testing.assert_close(y, expected, atol=1e-9, rtol=1e-9)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, (q, k, v), upstream)
    wanted = torch.autograd.grad(expected, (q, k, v), upstream)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)


def test_blockwise_is_what_a_cpu_runs_and_its_blocks_do_not_show():
    q, k, v = (x.requires_grad_() for x in inputs(length=300, dtype=torch.float32))  # ragged blocks
    mask = AttentionMask(300, 300)
    y = attend(q, k, v, mask, 6**-0.5)
    assert type(y.grad_fn).__name__ == "_BlockwiseBackward"
    repeated = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(q, *repeated, is_causal=True)
    torch.testing.assert_close(y, expected, atol=2e-6, rtol=1e-5)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, (q, k, v), upstream)
    wanted = torch.autograd.grad(expected, (q, k, v), upstream)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_math_kernel_on_request_can_be_differentiated_twice(monkeypatch):
    monkeypatch.setattr(blockwise, "SHORTEST_IN_FULL_PRECISION", 0)
    q, k, v = (x.requires_grad_() for x in inputs(length=5))
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda *x: attend(*x, AttentionMask(5, 5), 0.4), (q, k, v))
    penalised = attend(q, k, v, AttentionMask(5, 5), 0.4).sum()
    with pytest.raises(RuntimeError, match="differentiates once"):
        torch.autograd.grad(penalised, q, create_graph=True)


def test_dropout_on_probabilities_is_right_in_value_and_gradient(monkeypatch):
    monkeypatch.setattr(blockwise, "SHORTEST_IN_FULL_PRECISION", 0)
    q, k, v = (x.requires_grad_() for x in inputs(heads=2, length=12))
    mask = AttentionMask(12, 12)

    def forward(*x):
        torch.manual_seed(5)
        return attend(*x, mask, 0.4, dropout=0.3)

    assert torch.autograd.gradcheck(forward, (q, k, v))
    torch.manual_seed(0)
    with torch.no_grad():
        mean = sum(attend(q, k, v, mask, 0.4, dropout=0.3) for _ in range(3000)) / 3000
        assert not torch.equal(forward(q, k, v), attend(q, k, v, mask, 0.4))
        torch.testing.assert_close(mean, attend(q, k, v, mask, 0.4), atol=0.12, rtol=0)


def test_grouped_queries_equal_repeated_heads():
    torch.manual_seed(0)
    grouped = Attention(24, heads=6, key_value_heads=2, head_width=4, query_key_norm=True, query_key_value_bias=True)
    full = Attention(24, heads=6, head_width=4, query_key_norm=True, query_key_value_bias=True)
    state = grouped.state_dict()
    for part in ("key", "value"):
        for kind in ("weight", "bias"):
            rows = state[f"{part}.{kind}"].unflatten(0, (2, 4))
            state[f"{part}.{kind}"] = rows.repeat_interleave(3, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    x, mask = torch.randn(2, 9, 24), AttentionMask(9, 9)
    torch.testing.assert_close(grouped(x, mask), full(x, mask), atol=1e-6, rtol=1e-5)


def test_query_scale_replaces_the_head_width():
    torch.manual_seed(0)
    plain, scaled = Attention(16, heads=2), Attention(16, heads=2, query_scale=32.0)
    scaled.load_state_dict(plain.state_dict())
    plain.query.weight.data.mul_((8 / 32) ** 0.5)
    x = torch.randn(1, 5, 16)
    torch.testing.assert_close(plain(x), scaled(x), atol=1e-6, rtol=1e-5)


def test_without_a_mask_every_token_sees_every_other_in_any_order():
    layer, x = Attention(16, heads=2), torch.randn(2, 7, 16)
    order = torch.randperm(7)
    torch.testing.assert_close(layer(x)[:, order], layer(x[:, order]), atol=1e-6, rtol=1e-5)
