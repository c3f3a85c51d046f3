"""Layers with rotary positions: norm and rotation of query and key are one pass, and give what two steps give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import attnfuse.nn as an
from attnfuse.fusion import JointAttention, MMDiTBlock
from attnfuse.fusion import mmdit as mmdit_module
from attnfuse.nn import layers
from attnfuse.nn.heads import HeadNorm

B, N, E, H = 2, 7, 32, 4
D = E // H

OPTIONS = {
    "norm": {"qk_norm": True},
    "rope": {"rope": an.RotaryEmbedding(D)},
    "norm-rope": {"qk_norm": True, "rope": an.RotaryEmbedding(D)},
    "norm-rope-gqa-interleaved": {
        "qk_norm": True,
        "rope": an.RotaryEmbedding(D),
        "rope_interleaved": True,
        "num_kv_heads": 2,
    },
    "norm-part-of-a-head": {"qk_norm": True, "rope": an.RotaryEmbedding(4, base=100.0), "bias": False},
    "axes": {"qk_norm": True, "rope": an.RotaryEmbedding(D, axes=(4, 2, 2))},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(name: str) -> tuple[an.SelfAttention, Tensor, Tensor | None]:
    """A layer with norms that are not all one, its tokens, and positions that are not 0, 1, 2, ..."""
    layer = an.SelfAttention(E, H, **OPTIONS[name])
    with torch.no_grad():
        for norm in (layer.q_norm, layer.k_norm):
            for weight in norm.parameters():
                weight.uniform_(0.5, 1.5)
    rope = layer.rope
    shape = (B, N) if rope is None or len(rope.axes) == 1 else (B, N, len(rope.axes))
    return layer, torch.randn(B, N, E), None if rope is None else torch.randint(50, shape)


def rotated(x: Tensor, rope: an.RotaryEmbedding, positions: Tensor, interleaved: bool) -> Tensor:
    """x (B, N, H, D) with its pairs turned as complex numbers, in x's precision."""
    cos, sin = (table[..., None, :].to(x.dtype) for table in rope(positions))
    half = cos.shape[-1]
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (
        slice(half), slice(half, 2 * half))  # fmt: skip
    out = x.clone()
    turned = torch.complex(x[..., first].contiguous(), x[..., second].contiguous()) * torch.complex(cos, sin)
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


def two_steps(layer: an.SelfAttention, x: Tensor, positions: Tensor | None) -> Tensor:
    """What `layer` computes, by its norm modules and a rotation after them."""
    hq, hk, _ = layer.heads
    q, k, v = layer.qkv_proj(x).unflatten(-1, (hq + 2 * hk, D)).split_with_sizes((hq, hk, hk), 2)
    q, k = layer.q_norm(q), layer.k_norm(k)
    if positions is not None:
        q, k = (rotated(y, layer.rope, positions, layer.rope_interleaved) for y in (q, k))
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return layer.out_proj(out.transpose(1, 2).flatten(2))


def outcome(call, layer: nn.Module, x: Tensor, positions: Tensor | None) -> list[Tensor]:
    """The output, and the gradients of the tokens and of every parameter."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = call(layer, x, positions)
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters())]


def within_budget(actual: list[Tensor], low: list[Tensor], exact: list[Tensor]) -> None:
    for a, t, e in zip(actual, low, exact, strict=True):
        assert a.dtype == t.dtype
        budget = 2 * (t.double() - e).abs().max() + torch.finfo(a.dtype).eps * e.abs().max()
        assert (a.double() - e).abs().max() <= budget


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", OPTIONS)
def test_one_pass_gives_what_norm_then_rotation_gives(name, backend, monkeypatch):
    layer, x, positions = make(name)
    fused = layers.qk_norm_rope
    monkeypatch.setattr(layers, "qk_norm_rope", lambda *a, **k: fused(*a, **k | {"backend": backend}))
    exact = outcome(two_steps, copy.deepcopy(layer).double(), x.double(), positions)
    low = outcome(two_steps, layer, x, positions)
    actual = outcome(lambda module, y, where: module(y, positions=where), layer, x, positions)
    within_budget(actual, low, exact)


@pytest.mark.parametrize("name", OPTIONS)
def test_query_and_key_share_one_call_and_no_norm_runs_beside_it(name, monkeypatch):
    layer, x, positions = make(name)
    calls = []
    fused = layers.qk_norm_rope
    monkeypatch.setattr(layers, "qk_norm_rope", lambda *a, **k: calls.append(a) or fused(*a, **k))
    monkeypatch.setattr(HeadNorm, "forward", lambda self, y: pytest.fail("a norm of its own"))
    layer(x, positions=positions)
    assert len(calls) == 1
    bare = an.SelfAttention(E, H)
    bare(x)
    assert len(calls) == 1, "without norm and rotation there is nothing to call"


def test_weights_of_layers_saved_before_there_was_a_rope_load():
    saved = {
        "qkv_proj.weight": torch.randn(3 * E, E),
        "qkv_proj.bias": torch.randn(3 * E),
        "q_norm.weight": torch.rand(D),
        "k_norm.weight": torch.rand(D),
        "out_proj.weight": torch.randn(E, E),
        "out_proj.bias": torch.randn(E),
    }
    layer = an.SelfAttention(E, H, qk_norm=True, rope=an.RotaryEmbedding(D))
    layer.load_state_dict(saved)
    assert {name: x.shape for name, x in layer.state_dict().items()} == {name: x.shape for name, x in saved.items()}
    assert torch.equal(layer.k_norm.weight, saved["k_norm.weight"])


@pytest.mark.parametrize("name", OPTIONS)
def test_autocast_returns_the_autocast_dtype_within_the_budget(name):
    layer, x, positions = make(name)
    exact = two_steps(copy.deepcopy(layer).double(), x.double(), positions)
    low = two_steps(copy.deepcopy(layer).bfloat16(), x.bfloat16(), positions) if positions is None else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = layer.project(x, positions)
        out = layer(x, positions=positions)
    assert [part.dtype for part in parts] == 3 * [torch.bfloat16], "attention in float32 would undo the autocast"
    assert out.dtype == torch.bfloat16
    if low is None:  # complex numbers have no 16-bit form: round the result of the norm instead
        rounded = copy.deepcopy(layer).bfloat16().float()
        low = two_steps(rounded, x.bfloat16().float(), positions).bfloat16()
    within_budget([out], [low], [exact])


def test_positions_count_from_zero_and_only_their_distance_matters():
    layer, x, _ = make("norm-rope")
    plain = layer(x)
    torch.testing.assert_close(layer(x, positions=torch.arange(N)), plain, rtol=0, atol=0)
    torch.testing.assert_close(layer(x, positions=torch.arange(N) + 1000), plain)
    assert not torch.allclose(layer(x, positions=2 * torch.arange(N)), plain, atol=1e-3)
    # the same tokens in another order, with their positions, are the same tokens
    order = torch.randperm(N)
    torch.testing.assert_close(layer(x[:, order], positions=order), plain[:, order])


def test_joint_block_numbers_its_streams_as_it_is_told():
    """Two streams whose positions go on are one sequence; by default each of them counts from 0."""
    block = an.JointBlock(E, H, num_kv_heads=2, qk_norm=True, rope=an.RotaryEmbedding(D))
    a, b = torch.randn(B, 4, E), torch.randn(B, 6, E)
    (together,) = block([torch.cat([a, b], 1)])
    outs = block([a, b], positions=[None, torch.arange(4, 10)])
    torch.testing.assert_close(torch.cat(outs, 1), together)
    overlapping = block([a, b])
    assert not torch.allclose(torch.cat(overlapping, 1), together, atol=1e-3)
    torch.testing.assert_close(overlapping, block([a, b], positions=[torch.arange(4), torch.arange(6)]))


def test_streams_of_mmdit_are_rotated_after_their_norms(monkeypatch):
    """Text at one place, an image by row and column, as in FLUX; the order of streams and rows says nothing."""
    rope = an.RotaryEmbedding(8, axes=(4, 4))
    text, image = torch.randn(B, 3, 8), torch.randn(B, 4, 12)
    grid = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    where = [torch.zeros(3, 2, dtype=torch.long), grid]
    layer = JointAttention((8, 12), 8, 2, qk_rmsnorm=True, rope=rope, rope_interleaved=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    outs = layer((text, image), positions=where)

    parts = []
    for s, (x, positions) in enumerate(zip((text, image), where, strict=True)):
        q, k, v = layer.to_qkv[s](x).unflatten(-1, (3, 2, 8)).unbind(2)
        q, k = layer.q_rmsnorms[s](q), layer.k_rmsnorms[s](k)
        parts.append([*(rotated(y, rope, positions, True) for y in (q, k)), v])
    q, k, v = (torch.cat(x, 1).transpose(1, 2) for x in zip(*parts, strict=True))
    joined = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).split([3, 4], 1)
    for out, project, x in zip(outs, layer.to_out, joined, strict=True):
        torch.testing.assert_close(out, project(x))
    assert not torch.allclose(layer((text, image), positions=[where[0], 3 * grid])[1], outs[1], atol=1e-4)

    block = MMDiTBlock((8, 12), 8, 2, rope=rope)
    seen = []
    fused = mmdit_module.qk_norm_rope
    monkeypatch.setattr(mmdit_module, "qk_norm_rope", lambda *a, **k: seen.append(a[0].dtype) or fused(*a, **k))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block((text, image), positions=where)
    assert seen == 2 * [torch.bfloat16]
    assert not any("rope" in name for name in block.state_dict())


def test_compiles_into_one_graph():
    layer, x, positions = make("norm-rope-gqa-interleaved")
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    call = lambda module, y, where: module(y, positions=where)  # noqa: E731
    expected = outcome(call, layer, x, positions)
    torch.testing.assert_close(outcome(lambda _, y, where: compiled(y, positions=where), layer, x, positions), expected)


@pytest.mark.parametrize("backend", ["reference", None])
def test_a_named_reference_is_reference_all_the_way(backend, monkeypatch):
    """Only the reference can be differentiated twice, so a layer that asks for it must not get a kernel before it."""
    asked = []
    fused = layers.qk_norm_rope
    monkeypatch.setattr(layers, "qk_norm_rope", lambda *a, **k: asked.append(k["backend"]) or fused(*a, **k))
    an.SelfAttention(E, H, qk_norm=True, backend=backend)(torch.randn(B, N, E))
    assert asked == [backend]


@pytest.mark.parametrize(("kind", "message", "build"), [
    (TypeError, "rope must be a RotaryEmbedding or None, got int", lambda: an.SelfAttention(E, H, rope=8)),
    (ValueError, "rope must rotate at most the 8 elements of a head, got dim=16",
     lambda: an.SelfAttention(E, H, rope=an.RotaryEmbedding(16))),
    (ValueError, "positions must be None where rope was not given",
     lambda: an.SelfAttention(E, H)(torch.randn(B, N, E), positions=torch.arange(N))),
    (ValueError, "positions must have one entry for each of 7 tokens, got",
     lambda: an.SelfAttention(E, H, rope=an.RotaryEmbedding(8))(torch.randn(B, N, E), positions=torch.arange(5))),
    (ValueError, r"positions must be a tensor \(..., 2\)",
     lambda: an.SelfAttention(E, H, rope=an.RotaryEmbedding(8, axes=(4, 4)))(torch.randn(B, N, E))),
    (ValueError, "positions must have one entry per stream, got 1 for 2",
     lambda: an.JointBlock(E, H, rope=an.RotaryEmbedding(8))([torch.randn(B, N, E)] * 2, positions=[None])),
    (ValueError, r"positions\[1\] must be None where rope was not given",
     lambda: JointAttention((8, 8), 4, 2)([torch.randn(B, N, 8)] * 2, positions=[None, torch.arange(N)])),
    (ValueError, "positions must have one entry per stream, got 1 for 2",
     lambda: JointAttention((8, 8), 4, 2, rope=an.RotaryEmbedding(4))([torch.randn(B, N, 8)] * 2, positions=[None])),
])  # fmt: skip
def test_bad_arguments_are_named(kind, message, build):
    with pytest.raises(kind, match=message):
        build()
