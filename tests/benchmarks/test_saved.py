import torch
from benchmarks.saved import saved_bytes
from torch import nn

FLOAT = 4


def test_a_linear_layer_keeps_its_input_and_not_its_weight():
    layer = nn.Linear(3, 5)
    x = torch.randn(7, 3)
    assert saved_bytes(lambda: layer(x)) == 0  # all that it keeps was there
    assert saved_bytes(lambda: layer(x * 2)) == 7 * 3 * FLOAT


def test_a_storage_counts_once_and_whole():
    weight = torch.randn(6, requires_grad=True)

    def forward() -> torch.Tensor:
        x = torch.ones(6) * 2
        return (x * weight).sum() + (x[:3] * weight[:3]).sum()

    assert saved_bytes(forward) == 6 * FLOAT


def test_what_a_function_saves_counts():
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(torch.zeros(10))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    x = torch.ones(2, requires_grad=True)
    assert saved_bytes(lambda: Keeps.apply(x)) == 10 * FLOAT


def test_nothing_is_kept_where_nothing_needs_a_gradient():
    assert saved_bytes(lambda: nn.ReLU()(torch.randn(4) * 2)) == 0
