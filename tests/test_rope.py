"""The fused norm and rotation of query and key: kernels against the error budget, tables, modules, machine code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F

import attnfuse
from attnfuse import rope
from attnfuse.nn.heads import HeadNorm
from attnfuse.nn.rope import QKNormRope, RotaryEmbedding
from attnfuse.rope import norm_rope, qk_norm_rope
from attnfuse.testing import difference, size

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("query", "key", "q_weight", "k_weight")

# D, R, B, N, Hq, Hkv; tables (N, R/2) or by sample; interleaved; heads or positions first in memory
CASES = {
    "16": (16, 16, 2, 21, 4, 2, False, False, False),
    "40-partial": (40, 20, 3, 13, 3, 1, True, False, True),
    "40-interleaved": (40, 40, 1, 19, 4, 4, False, True, True),
    "64-interleaved": (64, 64, 2, 9, 6, 2, True, True, True),
    "64-partial-interleaved": (64, 16, 2, 9, 6, 2, False, True, False),
    "96": (96, 96, 1, 11, 5, 5, True, False, True),
    "128": (128, 128, 2, 33, 4, 1, False, False, True),
    "128-partial": (128, 64, 1, 7, 2, 2, True, False, False),
    "256": (256, 256, 1, 5, 4, 2, False, False, True),
    "256-interleaved": (256, 128, 2, 3, 2, 1, True, True, True),
    "one-token": (64, 64, 3, 1, 8, 2, True, False, True),
    "norm-only": (72, 0, 2, 7, 4, 2, False, False, True),
    "odd": (33, 22, 2, 7, 3, 3, False, False, True),
    "odd-interleaved": (33, 2, 2, 7, 3, 3, True, True, False),
    "one-element": (1, 0, 2, 3, 3, 1, False, False, True),
}


@pytest.fixture(autouse=True)
def on_device():
    """Tensors are made where the kernels run."""
    if DEVICE == "cuda":
        torch.set_default_device(DEVICE)
    yield
    if DEVICE == "cuda":
        torch.set_default_device(None)


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def drawn(name: str, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor | None], list[torch.Tensor], bool]:
    """The tensors of a case, views of one packed projection; what arrives in the backward; interleaved."""
    dim, rotated, batch, rows, heads, kv_heads, by_sample, interleaved, rows_first = CASES[name]
    generator = torch.Generator("cpu").manual_seed(len(name) + dim)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype).to(DEVICE)

    if rows_first:
        packed = numbers(batch, rows, heads + 2 * kv_heads, dim).transpose(1, 2)
    else:
        packed = numbers(batch, heads + 2 * kv_heads, rows, dim)
    query, key, _ = packed.split((heads, kv_heads, kv_heads), 1)
    cos, sin = None, None
    if rotated:
        shape = (batch, rows) if by_sample else (rows,)
        cos, sin = RotaryEmbedding(rotated)(torch.randint(0, 5000, shape, generator=generator, device="cpu").to(DEVICE))
    tensors = {"query": query, "key": key, "q_weight": numbers(dim), "k_weight": numbers(dim), "cos": cos, "sin": sin}
    return tensors, [numbers(*query.shape), numbers(*key.shape)], interleaved


def run(tensors, arriving, interleaved, backend, *, wide=False, eps=1e-6):
    """Both results and every gradient; `wide` takes the inputs to float64."""
    given = {name: x if x is None else x.detach() for name, x in tensors.items()}
    if wide:
        given = {name: x if x is None else x.double() for name, x in given.items()}
        arriving = [x.double() for x in arriving]
    learned = {name: given[name].requires_grad_() for name in NAMES if given[name] is not None}
    outs = qk_norm_rope(**given, interleaved=interleaved, backend=backend, eps=eps)
    grads = torch.autograd.grad(outs, list(learned.values()), [g.to(y.dtype) for g, y in zip(arriving, outs)])
    found = dict(zip(("out_query", "out_key"), outs)) | {f"d{name}": g for name, g in zip(learned, grads)}
    return {name: x.detach() for name, x in found.items()}


def over_budget(ours, low, exact) -> list[str]:
    """What of `ours` is beyond twice the error of `low` and the rounding of its own dtype."""
    told = []
    for name, x in ours.items():
        truth = exact[name]
        budget = 2 * difference(low[name].double(), truth) + torch.finfo(x.dtype).eps * size(truth)
        error = difference(x.double(), truth)
        if not error <= budget:
            told.append(f"{name}: error {error:.3g} over the budget {budget:.3g}")
    return told


def judged(tensors, arriving, interleaved, backend="triton") -> list[str]:
    exact = run(tensors, arriving, interleaved, "reference", wide=True)
    low = run(tensors, arriving, interleaved, "reference")
    return over_budget(run(tensors, arriving, interleaved, backend), low, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_triton_within_the_budget(name, dtype, poisoned):
    pytest.importorskip("triton")
    assert judged(*drawn(name, dtype)) == []


@pytest.mark.parametrize(
    "left_out", [("q_weight", "k_weight"), ("cos", "sin"), ("k_weight",), ("q_weight", "cos", "sin")]
)
def test_triton_with_parts_left_out(left_out, poisoned):
    pytest.importorskip("triton")
    tensors, *rest = drawn("64-partial-interleaved", torch.bfloat16)
    assert judged(tensors | dict.fromkeys(left_out), *rest) == []


def test_memory_is_poisoned(poisoned):
    assert torch.empty_permuted((2, 3, 4, 5), (0, 2, 1, 3)).isnan().all()
    assert torch.ones(2, 2).new_empty((3, 4)).isnan().all()


@pytest.mark.parametrize("fault", ["sign", "pairs", "weights", "eps", "tables", "rows"])
def test_the_budget_notices_a_fault(fault):
    """A budget that any answer meets would prove nothing."""
    tensors, arriving, interleaved = drawn("64-interleaved", torch.bfloat16)
    tensors["query"], tensors["key"] = tensors["query"] * 0.01, tensors["key"] * 0.01
    exact = run(tensors, arriving, interleaved, "reference", wide=True)
    low = run(tensors, arriving, interleaved, "reference")
    wrong, eps = dict(tensors), 1e-6
    if fault == "sign":
        wrong["sin"] = -tensors["sin"]
    elif fault == "pairs":
        interleaved = not interleaved
    elif fault == "weights":
        wrong["q_weight"], wrong["k_weight"] = tensors["k_weight"], tensors["q_weight"]
    elif fault == "eps":
        eps = 5e-6
    elif fault == "tables":
        wrong["cos"], wrong["sin"] = tensors["cos"][:1], tensors["sin"][:1]
    else:
        wrong["query"] = tensors["query"].flip(2)
    assert over_budget(run(wrong, arriving, interleaved, "reference", eps=eps), low, exact)


def test_reference_is_rms_norm_and_complex_rotation():
    """RoFormer's rotation as complex multiplication, interleaved pairs being real and imaginary part."""
    x, weight = torch.randn(2, 3, 5, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    angle = torch.randn(5, 6, dtype=torch.float64)
    out = norm_rope(x, weight, angle.cos(), angle.sin(), 1e-6, True, x.dtype)
    normed = F.rms_norm(x, (16,), weight, 1e-6)
    turned = torch.view_as_complex(normed[..., :12].unflatten(-1, (6, 2)).contiguous()) * torch.polar(
        torch.ones_like(angle), angle
    )
    torch.testing.assert_close(out[..., :12], torch.view_as_real(turned).flatten(-2))
    torch.testing.assert_close(out[..., 12:], normed[..., 12:])


def test_reference_is_llamas_rotation():
    """The half-split layout as Llama's code has it: x cos + rotate_half(x) sin, with tables repeated."""
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    angle = torch.randn(2, 5, 8, dtype=torch.float64)
    out = norm_rope(x, None, angle.cos(), angle.sin(), 1e-6, False, x.dtype)
    full = angle.repeat(1, 1, 2)[:, None]
    half = torch.roll(x, 8, -1) * torch.tensor([-1.0] * 8 + [1.0] * 8)
    torch.testing.assert_close(out, x * full.cos() + half * full.sin())


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_gradients(interleaved):
    q = torch.randn(2, 3, 2, 6, dtype=torch.float64).transpose(1, 2).requires_grad_()
    k = torch.randn(2, 1, 3, 6, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    cos, sin = (table.double() for table in RotaryEmbedding(4)(3))

    def function(q, k, q_weight, k_weight):
        return qk_norm_rope(q, k, q_weight, k_weight, cos, sin, interleaved=interleaved)

    assert torch.autograd.gradcheck(function, (q, k, *weights))
    assert torch.autograd.gradgradcheck(function, (q, k, *weights))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name", ["64-interleaved", "128-partial", "40-partial"])
def test_memory_order_is_kept(name, backend):
    """Views of one packed projection go in, and what comes out can be merged into (B, N, H D) without a copy."""
    tensors, arriving, interleaved = drawn(name, torch.float32)
    found = run(tensors, arriving, interleaved, backend)
    rows_first = CASES[name][-1]
    # Where autograd puts a gradient of the reference is its own affair.
    for part in ("out_query", "out_key", "dquery", "dkey")[: 2 if backend == "reference" else 4]:
        x = found[part].transpose(1, 2) if rows_first else found[part]
        assert x.is_contiguous(), part


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_any_strides(backend):
    """Expanded samples, reversed dimensions, a last dimension that is not contiguous, tables of a wider table."""
    torch.manual_seed(0)
    rotary = RotaryEmbedding(8)
    wide = [torch.cat((table, table), -1) for table in rotary(6)]
    cos, sin = (table[1:, :4] for table in wide)
    weight = torch.randn(16)[::2]
    given = [
        (torch.randn(1, 2, 5, 8).expand(3, -1, -1, -1), torch.randn(5, 8, 1, 3).permute(3, 2, 0, 1)),
        (torch.randn(5, 2, 3, 8).permute(2, 1, 0, 3), torch.randn(3, 4, 5, 16)[..., ::2]),
    ]
    for q, k in given:
        cos, sin = cos.transpose(-1, -2).contiguous().transpose(-1, -2), sin.contiguous()
        out = qk_norm_rope(q, k, weight, weight, cos, sin, backend=backend)
        dense = [x.contiguous() for x in (q, k, weight, weight, cos, sin)]
        torch.testing.assert_close(out, qk_norm_rope(*dense, backend="reference"))


@pytest.mark.parametrize("batch, rows", [(0, 4), (2, 0)])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_nothing_to_do(batch, rows, backend):
    q, k = torch.randn(batch, 4, rows, 8, requires_grad=True), torch.randn(batch, 2, rows, 8)
    weight = torch.ones(8, requires_grad=True)
    out = qk_norm_rope(q, k, weight, weight, *RotaryEmbedding(8)(rows), backend=backend)
    assert [x.shape for x in out] == [q.shape, k.shape]
    (out[0].sum() + out[1].sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(8))
    same = qk_norm_rope(q, k, backend=backend)
    assert same[0] is q and same[1] is k


def test_many_tiles_to_a_program_give_the_same(monkeypatch):
    """A program that takes several tiles, the last of which do not exist, adds up what one to a tile does."""
    kernels = pytest.importorskip("attnfuse.triton_kernels.qk_norm_rope")
    tensors, arriving, interleaved = drawn("128", torch.float32)
    one = run(tensors, arriving, interleaved, "triton")
    monkeypatch.setattr(kernels, "PROGRAMS", 7)
    several = run(tensors, arriving, interleaved, "triton")
    exact = run(tensors, arriving, interleaved, "reference", wide=True)
    low = run(tensors, arriving, interleaved, "reference")
    assert over_budget(several, low, exact) == []
    for name in ("out_query", "out_key", "dquery", "dkey"):
        assert torch.equal(one[name], several[name])
    again = run(tensors, arriving, interleaved, "triton")
    assert all(torch.equal(several[name], again[name]) for name in again)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_rows_do_not_mix(backend):
    """A token alone is what it is in its batch, bit for bit, and NaN in one row stays there."""
    tensors, _, interleaved = drawn("64-interleaved", torch.bfloat16)
    together = qk_norm_rope(**tensors, interleaved=interleaved, backend=backend)
    alone = {name: x[1:, 4:5] if x.dim() == 3 else x[1:, :, 4:5] if x.dim() == 4 else x for name, x in tensors.items()}
    for whole, one in zip(together, qk_norm_rope(**alone, interleaved=interleaved, backend=backend)):
        assert torch.equal(whole[1:, :, 4:5], one)
    tensors["query"] = tensors["query"].clone()
    tensors["query"][0, 2, 3] = float("nan")
    spoiled, key = qk_norm_rope(**tensors, interleaved=interleaved, backend=backend)
    assert spoiled[0, 2, 3].isnan().all()
    assert int(spoiled.isnan().sum()) == spoiled.shape[-1]
    assert torch.equal(key, together[1])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_autocast(backend):
    """Under autocast the result has its dtype, whatever mixture goes in, and what is float32 is not rounded first."""
    tensors, arriving, interleaved = drawn("40-partial", torch.float32)
    exact = run(tensors, arriving, interleaved, "reference", wide=True)
    halved = tensors | {name: tensors[name].bfloat16() for name in ("query", "key")}
    low = run(halved | {name: tensors[name].bfloat16() for name in NAMES[2:]}, arriving, interleaved, "reference")
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = run(tensors, arriving, interleaved, backend)
        assert qk_norm_rope(**halved | {"key": tensors["key"]}, backend=backend)[0].dtype == torch.bfloat16
        assert [x.dtype for x in qk_norm_rope(tensors["query"], tensors["key"])] == [torch.bfloat16] * 2
    assert ours["out_query"].dtype == ours["out_key"].dtype == torch.bfloat16
    assert all(ours[f"d{name}"].dtype == torch.float32 for name in NAMES)
    assert over_budget(ours, low, exact) == []
    if backend == "reference" or DEVICE == "cuda":  # Triton's interpreter cuts bfloat16 off instead of rounding it
        rounded_once = exact["out_query"].bfloat16().double()
        budget = 1.001 * difference(rounded_once, exact["out_query"])
        assert difference(ours["out_query"].double(), exact["out_query"]) <= budget
    with torch.autocast(DEVICE, torch.bfloat16):
        wide = qk_norm_rope(**{name: x.double() for name, x in tensors.items()}, interleaved=interleaved)
    assert wide[0].dtype == torch.float64


@pytest.mark.parametrize("wanted", [("query",), ("key",), ("q_weight",), ("k_weight", "query"), NAMES])
@pytest.mark.parametrize("through", [(0,), (1,), (0, 1)])
def test_gradients_only_where_they_are_asked_for(wanted, through):
    tensors, arriving, _ = drawn("128-partial", torch.float32)

    def gradients(backend):
        given = {name: x.detach() for name, x in tensors.items()}
        inputs = [given[name].requires_grad_() for name in wanted]
        outs = qk_norm_rope(**given, backend=backend)
        loss = sum((outs[n] * arriving[n]).sum() for n in through)
        if not loss.requires_grad:
            return [None] * len(inputs)
        return torch.autograd.grad(loss, inputs, allow_unused=True)

    for ours, theirs in zip(gradients("triton"), gradients("reference")):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_expanded_gradients():
    """`out.sum()` sends back one number expanded over everything."""
    tensors, _, _ = drawn("16", torch.float32)
    grads = []
    for backend in ("triton", "reference"):
        q = tensors["query"].detach().requires_grad_()
        out, _ = qk_norm_rope(**tensors | {"query": q}, backend=backend)
        grads.append(torch.autograd.grad(out.sum(), q)[0])
    torch.testing.assert_close(*grads)


def test_a_rotation_alone_keeps_its_input_not_alive():
    """The gradient of a rotation needs the tables only: query and key may go once attention has the rotated ones."""
    pytest.importorskip("triton")
    cos, sin = RotaryEmbedding(8)(3)
    for weight, lives in ((None, False), (torch.ones(8), True)):
        leaf = torch.randn(1, 2, 3, 8, requires_grad=True)
        q = leaf + 1
        watch = weakref.ref(q)
        out = qk_norm_rope(q, q, weight, weight, cos, sin, backend="triton")
        del q
        assert (watch() is not None) == lives
        out[0].sum().backward()


@pytest.mark.parametrize("shape", [(3, 1, 2, 16), (1, 3, 2, 16), (1, 2, 3, 16)], ids=["sample", "head", "row"])
def test_rows_beyond_32_bits(shape, tmp_path):
    """What begins 2^31 elements behind the first is found, though its stride has 31 bits: offsets are 64-bit."""
    if DEVICE == "cuda" or sys.platform == "win32":
        pytest.skip("made of a sparse file, which is the host's")
    far = 2**30 + 64
    held = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * far + 64, dtype=torch.bfloat16)
    q = held.as_strided(shape, [far if size == 3 else 16 for size in shape[:3]] + [1])
    q.copy_(torch.randn(shape))
    out, _ = qk_norm_rope(q, q, torch.ones(16), None, backend="triton")
    torch.testing.assert_close(out, qk_norm_rope(q, q, torch.ones(16), None, backend="reference")[0])


def call(q, k, weight, cos, sin, backend="triton", interleaved=False):
    out = qk_norm_rope(q.transpose(1, 2), k, weight, None, cos, sin, backend=backend, interleaved=interleaved)
    return out[0].sin().sum() + out[1].square().sum()


def inputs(rows=5):
    torch.manual_seed(0)
    q = torch.randn(2, rows, 4, 8, requires_grad=True)
    k = torch.randn(2, 2, rows, 8, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    return [q, k, weight], list(RotaryEmbedding(6)(rows))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiled_equals_eager(backend):
    learned, tables = inputs()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=backend == "triton"):
        eager, traced = call(*learned, *tables, backend), compiled(*learned, *tables, backend)
    torch.testing.assert_close(traced, eager)
    for a, b in zip(torch.autograd.grad(traced, learned), torch.autograd.grad(eager, learned)):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()


def test_a_new_length_does_not_recompile_forever():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    for rows in (5, 7, 9, 12):
        learned, tables = inputs(rows)
        torch.testing.assert_close(compiled(*learned, *tables), call(*learned, *tables))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("interleaved", [False, True])
def test_opcheck(interleaved):
    (q, k, weight), tables = inputs()
    arguments = (q.transpose(1, 2), k, weight, None, *tables, 1e-6, interleaved, torch.float32)
    torch.library.opcheck(torch.ops.attnfuse.qk_norm_rope.default, arguments)
    weight = weight.detach().to(torch.bfloat16 if interleaved else torch.float32)
    rest = (weight, None, *tables, 1e-6, interleaved, torch.float32, [0, 2, 1, 3], torch.float32, [0, 1, 2, 3])
    grads = [torch.randn(2, heads, 5, 8) for heads in (4, 2)]
    backward = torch.ops.attnfuse.qk_norm_rope_backward.default
    q = q.detach().transpose(1, 2)
    torch.library.opcheck(backward, (*grads, q, None, *rest, [True, True, True, False]))
    torch.library.opcheck(backward, (grads[0], None, q, None, *rest, [False, False, True, False]))


def test_a_cpu_takes_the_reference(monkeypatch):
    (q, k, weight), tables = inputs()
    q, k, weight, *tables = (x.detach().cpu() for x in (q, k, weight, *tables))
    expected = call(q, k, weight, *tables, "reference")
    monkeypatch.setattr(rope, "_forward", lambda *arguments: pytest.fail("the Triton kernel was run"))
    torch.testing.assert_close(call(q, k, weight, *tables, None), expected)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot serve this call: .*TRITON_INTERPRET=1 is not set"):
        call(q, k, weight, *tables, "triton")


Q, K, W, T = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 3, 8), torch.ones(8), torch.ones(3, 4)
BAD = [
    ((1, K), {}, TypeError, "query must be a torch.Tensor, got int"),
    ((Q[0], K), {}, ValueError, r"query must be 4-D \(B, H, N, D\), got shape \(4, 3, 8\)"),
    ((Q, K.long()), {}, TypeError, "key must be float16, bfloat16, float32 or float64, got torch.int64"),
    ((Q, K.half()), {}, TypeError, "key must have the query's dtype torch.float32, got torch.float16"),
    ((Q, K[:, :, :2]), {}, ValueError, r"key must have the query's batch, length and head dim, got \(2, 2, 2, 8\)"),
    ((Q, K[:, :0]), {}, ValueError, r"key must have at least one head, got shape \(2, 0, 3, 8\)"),
    ((Q, K.to("meta")), {}, ValueError, "key must be on the query's device cpu, got meta"),
    ((torch.zeros(1, 1, 1, 257),) * 2, {}, ValueError, "query's head dim must be 1 to 256, got 257"),
    ((Q, K, 1.0), {}, TypeError, "q_weight must be a torch.Tensor or None, got float"),
    ((Q, K, W, W[:4]), {}, ValueError, r"k_weight must have shape \(8,\), got \(4,\)"),
    ((Q, K, W.long()), {}, TypeError, "q_weight must be float16, bfloat16, float32 or float64, got torch.int64"),
    ((Q, K, W.to("meta")), {}, ValueError, "q_weight must be on the query's device cpu, got meta"),
    ((Q, K, W, W, T), {}, ValueError, "sin must be given with the other table, or both left out, got None"),
    ((Q, K, W, W, None, T), {}, ValueError, "cos must be given with the other table, or both left out, got None"),
    ((Q, K, W, W, T, 1), {}, TypeError, "sin must be a torch.Tensor or None, got int"),
    ((Q, K, W, W, T.bfloat16(), T), {}, TypeError, "cos must be float32, got torch.bfloat16"),
    ((Q, K, W, W, T[:2], T), {}, ValueError, r"cos must have shape \(3, R/2\) or \(2, 3, R/2\).* got \(2, 4\)"),
    ((Q, K, W, W, torch.ones(3, 8), T), {}, ValueError, r"with R at most 8, got \(3, 8\)"),
    ((Q, K, W, W, T.expand(3, 3, 4), T), {}, ValueError, r"got \(3, 3, 4\)"),
    ((Q, K, W, W, T, T[:, :2]), {}, ValueError, r"sin must have cos's shape \(3, 4\), got \(3, 2\)"),
    ((Q, K, W, W, T, T.to("meta")), {}, ValueError, "sin must be on the query's device cpu, got meta"),
    ((Q, K, W, W, T.clone().requires_grad_(), T), {}, ValueError, r"cos must not require a gradient.* cos.detach\(\)"),
    ((Q, K), {"eps": 0.0}, ValueError, "eps must be a positive number, got 0.0"),
    ((Q, K), {"interleaved": "half"}, TypeError, "interleaved must be True or False, got 'half'"),
    ((Q, K), {"backend": "aten"}, ValueError, "backend must be 'triton', 'reference' or None, got 'aten'"),
    ((Q.double(), K.double()), {"backend": "triton"}, RuntimeError, "float64 is not served"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, options, kind, words", BAD, ids=range(len(BAD)))
def test_bad_arguments_are_told(arguments, options, kind, words):
    with pytest.raises(kind, match=words):
        qk_norm_rope(*arguments, **options)


def test_tables_that_require_a_gradient_are_fine_where_none_is_recorded():
    with torch.no_grad():
        qk_norm_rope(Q, K, None, None, T.clone().requires_grad_(), T)


def test_tables_are_the_papers():
    cos, sin = RotaryEmbedding(8, base=100.0)(torch.tensor([0, 3]))
    angle = 3 * 100.0 ** (-torch.arange(4).double() / 4)
    torch.testing.assert_close(cos, torch.stack((torch.ones(4), angle.cos().float())))
    torch.testing.assert_close(sin, torch.stack((torch.zeros(4), angle.sin().float())))
    assert torch.equal(RotaryEmbedding(8)(5)[0], RotaryEmbedding(8)(torch.arange(5))[0])
    assert RotaryEmbedding(8)(torch.zeros(2, 5))[1].shape == (2, 5, 4)


def test_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).unbind(0)
    scores = []
    for shift in (0, 11, 4096):
        at, there = ([t.double() for t in RotaryEmbedding(16)(torch.tensor([p + shift]))] for p in (7, 3))
        turned = norm_rope(q, None, *at, 1e-6, False, q.dtype), norm_rope(k, None, *there, 1e-6, False, q.dtype)
        scores.append((turned[0] * turned[1]).sum())
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), rtol=0, atol=1e-5)


def test_positions_stay_sharp_in_a_16_bit_model():
    """`model.to(torch.bfloat16)` also casts float buffers: frequencies kept in one would move every far token."""
    rotary = RotaryEmbedding(64)
    before = rotary(torch.tensor([1_000_000]))
    model = torch.nn.Sequential(rotary).to(torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        after = model[0](torch.tensor([1_000_000]))
    angle = 1_000_000 * 10000.0 ** (-torch.arange(32).double() / 32)
    for table, same, truth in zip(before, after, (angle.cos(), angle.sin())):
        assert torch.equal(table, same) and same.dtype == torch.float32
        assert float((table[0].double() - truth).abs().max()) < 1e-7
    assert not rotary.state_dict()


def test_axes_turn_their_own_share():
    rotary = RotaryEmbedding(16, axes=(4, 6, 6))
    positions = torch.randint(0, 50, (2, 5, 3))
    cos, sin = rotary(positions)
    assert cos.shape == sin.shape == (2, 5, 8)
    for axis, share in enumerate(((0, 2, 4), (2, 5, 6), (5, 8, 6))):
        begin, end, dim = share
        torch.testing.assert_close(cos[..., begin:end], RotaryEmbedding(dim)(positions[..., axis])[0])
        torch.testing.assert_close(sin[..., begin:end], RotaryEmbedding(dim)(positions[..., axis])[1])


@pytest.mark.parametrize("make, kind, words", [
    (lambda: RotaryEmbedding(7), ValueError, "dim must be even and at least 2, got 7"),
    (lambda: RotaryEmbedding(8, base=0), ValueError, "base must be positive, got 0"),
    (lambda: RotaryEmbedding(8, axes=(4, 2)), ValueError, r"axes must be even .* add up to dim=8, got \(4, 2\)"),
    (lambda: RotaryEmbedding(8)("3"), TypeError, "positions must be a torch.Tensor or a number, got str"),
    (lambda: RotaryEmbedding(8)(torch.zeros(1, 2, 3)), ValueError, r"shape \(N,\) or \(B, N\), got \(1, 2, 3\)"),
    (lambda: RotaryEmbedding(8, axes=(4, 4))(torch.zeros(3)), ValueError, r"shape \(N, 2\) or \(B, N, 2\), got \(3,\)"),
    (lambda: RotaryEmbedding(8, axes=(4, 4))(3), ValueError, "must be a tensor .* with several axes, got a number"),
    (lambda: QKNormRope(0), ValueError, "head_dim must be positive, got 0"),
])  # fmt: skip
def test_bad_modules_are_told(make, kind, words):
    with pytest.raises(kind, match=words):
        make()


def test_module_is_head_norm_and_rotation():
    module, norm, rotary = QKNormRope(16), HeadNorm(16), RotaryEmbedding(16)
    assert sorted(module.state_dict()) == ["k_weight", "q_weight"]
    with torch.no_grad():
        module.q_weight.uniform_()
        norm.weight.copy_(module.q_weight)
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    out, key = module(q, k, *rotary(5))
    torch.testing.assert_close(out, norm_rope(norm(q), None, *rotary(5), 1e-6, False, q.dtype))
    attended = attnfuse.attention(out, key, key, enable_gqa=True)
    attended.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    bare = QKNormRope(16, qk_norm=False)
    assert not list(bare.parameters())
    assert torch.equal(bare(q, k)[0], q)
    assert repr(module) == "QKNormRope(16, eps=1e-06, interleaved=False)"


# Compiling needs a process of its own: the tests around this one may run with TRITON_INTERPRET=1, which is read once.
SCRIPT = """
import json, math, re
import torch, triton
from triton.runtime.jit import MockTensor
from attnfuse.machine.flow import loops
from attnfuse.machine.sass import functions
from attnfuse.machine.triton_code import stand_in
from attnfuse.triton_kernels import qk_norm_rope as kernels

def reading(arch, name, dtype, dim, half, interleaved):
    # 2 samples of 4096 tokens, 32 query and 8 key heads, heads innermost
    f32 = MockTensor(torch.float32)
    backward = name == "bwd"
    block, half_pad, tail_pad = kernels.blocks(half, dim - 2 * half, dtype.itemsize)
    table = kernels.Rows(f32, 0, half, 0) if half else None
    parts = []
    for heads in (32, 8):
        rows = kernels.Rows(MockTensor(dtype), 4096 * heads * dim, heads * dim, dim)
        tiles = 4096 * heads // block
        parts.append(kernels.Part(rows, rows, rows if backward else None, f32, f32 if backward else None, table, table,
                                  heads, 4096 * heads, tiles, 2 * tiles, 1024 if backward else 2 * tiles))
    triton.runtime.driver.set_active(stand_in(arch))
    kernel = kernels.qk_norm_rope_bwd if backward else kernels.qk_norm_rope_fwd
    compiled = kernel.warmup(
        *parts, 1e-6, *([99, True, True] if backward else []), grid=(1,), HALF=half, HALF_PAD=half_pad,
        TAIL=dim - 2 * half, TAIL_PAD=tail_pad, BLOCK=block, ALIGN=math.gcd(16, dim), TABLE_ALIGN=math.gcd(16, half),
        INTERLEAVED=interleaved, num_warps=kernels.WARPS,
    )
    (function,) = functions(compiled.asm["cubin"])
    names = [x.name for x in function.code]
    return {
        "registers": function.registers, "local": function.local, "shared": compiled.metadata.shared,
        "loop_local": max((loop.local for loop in loops(function.code)), default=0),
        "atomics": sum(name.startswith(("ATOM", "RED.")) for name in names),
        "narrow": sum(re.fullmatch("(LDG|STG)[.]E([.]U16)?", name) is not None for name in names),
        "wide": names.count("STG.E.128"),
    }

if __name__ == "__main__":
    found = {}
    for arch in (80, 90, 100, 120):
        for name in ("fwd", "bwd"):
            for case in ((128, 64, False), (64, 32, True)):
                found[f"sm_{arch} {name} bf16 {case}"] = reading(arch, name, torch.bfloat16, *case)
    for name in ("fwd", "bwd"):
        for case in ((40, 20, False), (256, 128, False), (128, 32, True), (96, 0, False)):
            found[f"sm_90 {name} bf16 {case}"] = reading(90, name, torch.bfloat16, *case)
        for case in ((128, 64, False), (40, 20, True)):
            found[f"sm_90 {name} fp32 {case}"] = reading(90, name, torch.float32, *case)
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def readings(tmp_path_factory):
    pytest.importorskip("triton")
    script = tmp_path_factory.mktemp("rope") / "read_rope.py"
    script.write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels_compile_and_spill_nothing(readings):
    assert len(readings) == 28
    assert [name for name, r in readings.items() if r["local"] or r["loop_local"]] == []
    assert all(0 < r["registers"] <= 128 for r in readings.values())
    assert all(r["shared"] <= 4096 for r in readings.values())


def test_weight_gradients_take_no_atomics(readings):
    assert [name for name, r in readings.items() if r["atomics"]] == []


def test_rows_are_read_and_written_in_full_width(readings):
    """16 bytes at a time; all that is narrower in the forward is at most the weights, for the query and for the key."""
    forward = {name: r for name, r in readings.items() if " fwd " in name}
    assert [name for name, r in forward.items() if not r["wide"] and "(40, 20, False)" not in name] == []
    assert [name for name, r in forward.items() if r["narrow"] > 4] == []
    assert all(readings[f"sm_{arch} fwd bf16 (128, 64, False)"]["shared"] == 0 for arch in (80, 90, 100, 120))
