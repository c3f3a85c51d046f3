"""torch.compile without graph breaks, torch.export, and the operators' own checks."""

import pytest
import torch

import attnfuse
from attnfuse import AuxRequest, Source, build
from attnfuse.backends import cuda as cuda_backend

LENGTHS = torch.tensor([7, 3])
PRESENT = torch.tensor([True, False])
CU = torch.tensor([0, 3, 7])


def several(q, k, v, bias):
    sources = [Source(k, v, mask=LENGTHS, bias=bias), Source(k * 2, v, present=PRESENT)]
    out, aux = attnfuse.multi_source_attention(q, sources, enable_gqa=True, return_aux=AuxRequest(True, True))
    return out.sin().sum() + aux.source_mass.square().sum() + aux.lse.sum()


def causal(q, k, v, bias):
    return attnfuse.attention(q, k, v, is_causal=True, enable_gqa=True).sin().sum()


def windowed(q, k, v, bias):
    return attnfuse.attention(q, k, v, window=(2, 2), enable_gqa=True).sin().sum()


def triton(q, k, v, bias):
    return attnfuse.attention(q, k, v, softcap=3.0, sinks=bias, enable_gqa=True, backend="triton").sin().sum()


def cuda(q, k, v, bias):
    q, k, v = (x.bfloat16() for x in (q, k, v))
    return attnfuse.attention(q, k, v, softcap=3.0, sinks=bias, enable_gqa=True, backend="cuda").float().sin().sum()


def decoupled(q, k, v, bias):
    return attnfuse.multi_source_attention(
        q, [Source(k, v), Source(k, v)], enable_gqa=True, normalization="per_source", source_weights=bias[:2]
    ).sin().sum()  # fmt: skip


def packed(q, k, v, bias):
    x = q.flatten(1, 2)[:, :7].transpose(0, 1)
    return attnfuse.varlen_attention(x, x, x, CU, None, 4, 4, is_causal=True).sin().sum()


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), (4,)]
    return [torch.randn(*shape, generator=generator, requires_grad=True) for shape in shapes]


FUNCTIONS = [several, causal, windowed, triton, cuda, decoupled, packed]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_compiled_equals_eager(function, monkeypatch):
    if function is cuda:
        if not torch.cuda.is_available() and build.why_no_emulation() is not None:
            pytest.skip(str(build.why_no_emulation()))
        monkeypatch.setenv("ATTNFUSE_EMULATE", "1")
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    given = inputs()
    eager, traced = function(*given), compiled(*given)
    torch.testing.assert_close(traced, eager)
    for a, b in zip(
        torch.autograd.grad(traced, given, allow_unused=True), torch.autograd.grad(eager, given, allow_unused=True)
    ):
        torch.testing.assert_close(a, b)


def test_a_new_length_does_not_recompile_forever():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(causal, backend=counter, fullgraph=True, dynamic=True)
    for length in (7, 9, 11, 13, 17):
        k = torch.randn(2, 2, length, 8)
        torch.testing.assert_close(compiled(inputs()[0], k, k, None), causal(inputs()[0], k, k, None))
    assert counter.frame_count <= 2


def test_compiled_dropout_draws_as_eager_does():
    q, k, v, _ = inputs()

    def dropped(q, k, v):
        return attnfuse.attention(q, k, v, dropout_p=0.5, enable_gqa=True)

    compiled = torch.compile(dropped, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    first = compiled(q, k, v)
    torch.manual_seed(1)
    torch.testing.assert_close(first, dropped(q, k, v))


def test_autocast_when_compiled():
    compiled = torch.compile(causal, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(*inputs()), causal(*inputs()))


@pytest.mark.parametrize("backend", ["aten", "triton"])
def test_opcheck(backend):
    q, k, v, bias = inputs()
    tensors = [q, k, v, bias.expand(2, 4)]
    given = [True, False, False, False, True, True, False, True, False, False, False, False]
    scalars = ([0, 0, -1, -1], 0.3, 0.0, 0.0, True, backend)
    torch.library.opcheck(torch.ops.attnfuse.forward.default, (tensors, given, *scalars))


def test_export_round_trip():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return attnfuse.attention(q, k, v, enable_gqa=True)

    given = tuple(x.detach() for x in inputs()[:3])
    exported = torch.export.export(Model(), given)
    torch.testing.assert_close(exported.module()(*given), Model()(*given))


def test_what_the_cuda_backend_asks_of_the_machine_does_not_break_the_graph(monkeypatch):
    """On a GPU it is the first to be asked: files are looked for, an extension is imported, a card is read."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    cuda_backend._capability.cache_clear()

    def asked(x):
        reasons = (cuda_backend.available(), cuda_backend._no_extension(), cuda_backend._too_old(0))
        return x + 1, reasons

    _, reasons = torch.compile(asked, backend="eager", fullgraph=True)(torch.zeros(2))
    cuda_backend._capability.cache_clear()
    assert reasons[2] == "the CUDA kernels need compute capability 8.0, device 0 has 7.5"
