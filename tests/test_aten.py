"""What the CPU backend promises beside the numbers: absent keys are not read, nothing is quadratic or concatenated."""

import pytest
import torch
from inside import Inside

import attnfuse
from attnfuse import AuxRequest, Source
from attnfuse.backends import aten


class Watch(Inside):
    """Records the key columns that reach torch's flash kernels, the largest tensor made, and each operator's name."""

    def __init__(self):
        super().__init__()
        self.columns, self.largest, self.names = 0, 0, set()

    def saw(self, func, args, made):
        self.names.add(func.overloadpacket.__name__)
        if func is aten._flash:
            self.columns += args[1].shape[0] * args[1].shape[2]
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())


def heads(*shape):
    return torch.randn(shape[0], 2, shape[1], 16, requires_grad=True)


def test_a_source_present_in_two_of_eight_samples_costs_two():
    q, k = heads(8, 128), heads(8, 1024)
    present = torch.tensor([0, 1, 0, 0, 0, 1, 0, 0]).bool()
    with Watch() as watch:
        attnfuse.multi_source_attention(q, [Source(k, k, present=present)])
    assert watch.columns == 2 * 1024


def test_padding_is_not_read():
    q, k = heads(3, 256), heads(3, 1024)
    with Watch() as watch:
        attnfuse.attention(q, k, k, key_mask=torch.tensor([1024, 300, 20]))
    assert watch.columns == 1024 + 300 + 20


def test_short_padded_sources_take_one_call():
    q, k = heads(8, 4), heads(8, 12)
    with Watch() as watch:
        attnfuse.attention(q, k, k, key_mask=torch.arange(1, 9))
    assert watch.columns == 8 * 8


@pytest.mark.parametrize("aux", [None, AuxRequest(True, True)], ids=["out", "aux"])
def test_nothing_is_quadratic_and_no_source_is_concatenated(aux):
    q, k1, k2 = heads(1, 2048), heads(1, 2048), heads(1, 1000)
    sources = [Source(k1, k1, mask=torch.tensor([1500])), Source(k2, k2, bias=0.5)]
    with Watch() as watch:
        result = attnfuse.multi_source_attention(q, sources, return_aux=aux)
        loss = result.sum() if aux is None else result[0].sum() + sum(x.sum() for x in result[1])
        loss.backward()
    # The largest thing made is a (B, H, N, D + 2) copy, far from a (N, N) matrix of any head.
    assert watch.largest <= 2 * 2048 * 18 < 2048 * 1500
    if aux is None:
        assert "cat" not in watch.names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_float32_detour_of_the_backward_agrees(dtype, monkeypatch):
    inputs = [torch.randn(2, 2, 40, 16, dtype=dtype, requires_grad=True) for _ in range(3)]
    grads = []
    for detour in (True, False):
        monkeypatch.setattr(aten, "_wants_float32", lambda _, detour=detour: detour)
        out = attnfuse.attention(*inputs, is_causal=True)
        grads.append(torch.autograd.grad(out.float().square().sum(), inputs))
    eps = torch.finfo(dtype).eps
    for one, other in zip(*grads):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=4 * eps, atol=4 * eps * float(other.abs().max()))
