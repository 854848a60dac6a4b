"""What a network costs, against counting by hand and against a real pass."""

import torch
from torch import nn
from torch.nn import functional as F

from genscale.objectives.network_cost import cost


class Small(nn.Module):
    """A convolution, attention over its pixels and a linear layer."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.linear = nn.Linear(8, 16, bias=False)

    def forward(self, x):
        tokens = F.silu(self.convolution(x)).flatten(2).mT  # (batch, 16 pixels, 8)
        tokens = F.scaled_dot_product_attention(tokens[:, None], tokens[:, None], tokens[:, None])[:, 0]
        return self.linear(tokens)


def test_flops_are_those_of_convolutions_attention_and_products():
    counted = cost(Small, lambda: {"x": torch.zeros(1, 3, 4, 4)})
    convolution = 2 * 16 * 8 * 3 * 9
    attention = 2 * 2 * 16 * 16 * 8
    linear = 2 * 16 * 8 * 16
    assert counted.flops == convolution + attention + linear


def test_twice_the_batch_costs_twice_as_much():
    one, two = (cost(Small, lambda size=size: {"x": torch.zeros(size, 3, 4, 4)}) for size in (1, 2))
    assert two.flops == 2 * one.flops
    assert two.kept_elements == 2 * one.kept_elements


def test_what_is_kept_is_counted_once_and_without_parameters():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            hidden = torch.sigmoid(self.linear(x))  # keeps x and its own output
            picked = hidden.clamp(min=0.2)  # keeps its input again, the same storage
            return picked[:, torch.tensor([1, 0, 3])]  # keeps the index, in 8 bytes each

    counted = cost(Chain, lambda: {"x": torch.zeros(5, 4)})
    assert counted.kept_elements == 5 * 4 + 5 * 4
    assert counted.kept_bytes == 3 * 8


def test_counting_leaves_no_data_behind():
    class Huge(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2**20, 2**20, bias=False)  # 4 TiB

        def forward(self, x):
            return self.linear(x)

    assert cost(Huge, lambda: {"x": torch.zeros(1, 2**20)}).flops == 2 * 2**40
