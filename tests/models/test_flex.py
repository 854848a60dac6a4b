"""FlexAttention against the CPU's attention: uncompiled here, compiled with gradients where there is an accelerator."""

import pytest
import torch

from genscale.models.attention import attend
from genscale.models.flex import flex_attend
from genscale.models.mask import AttentionMask

CASES = {
    "window": {"window": 40},
    "documents": {"documents": torch.arange(300).expand(2, 300) // 70},
    "both ways": {"window": 40, "causal": False},
    "padding": {"start": torch.tensor([0, 33])},
}


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_masks_and_soft_cap_mean_the_same_to_flex_attention(case, cap):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 300, 16) for heads in (4, 2, 2))
    mask = AttentionMask(300, 300, **CASES[case])
    expected = attend(q, k, v, mask, 0.25, cap)
    torch.testing.assert_close(flex_attend(q, k, v, mask, 0.25, cap), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_flex_attention_on_an_accelerator_gives_the_cpus_values_and_gradients(case, cap):
    device = torch.accelerator.current_accelerator()
    torch.manual_seed(0)
    on_cpu = [torch.randn(2, heads, 300, 16, requires_grad=True) for heads in (4, 2, 2)]
    there = [x.detach().to(device).requires_grad_() for x in on_cpu]
    options = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in CASES[case].items()}
    expected = attend(*on_cpu, AttentionMask(300, 300, **CASES[case]), 0.25, cap)
    found = flex_attend(*there, AttentionMask(300, 300, **options, device=device), 0.25, cap)
    torch.testing.assert_close(found.cpu(), expected, atol=5e-3, rtol=1e-2)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, on_cpu, upstream)
    gradients = torch.autograd.grad(found, there, upstream.to(device))
    torch.testing.assert_close([x.cpu() for x in gradients], list(wanted), atol=2e-2, rtol=2e-2)
