"""The public functions: what they return, what they refuse, and in which words."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import attnfuse
from attnfuse import AuxRequest, Source, Stream

B, H, N, D = 2, 4, 6, 8
BOTH = AuxRequest(lse=True, source_mass=True)


def tensors(*shapes, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, **options) for shape in shapes]


@pytest.fixture
def qkv():
    return tensors((B, H, N, D), (B, H, 9, D), (B, H, 9, D))


# What F.scaled_dot_product_attention accepts, attention accepts with the same result.
SDPA_CALLS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "bool pairs": {"attn_mask": torch.ones(N, 9).tril(2).bool()},
    "bool per sample": {"attn_mask": torch.arange(B * N * 9).view(B, 1, N, 9) % 3 > 0},
    "bool keys": {"attn_mask": (torch.arange(B * 9).view(B, 1, 1, 9) % 5 > 0)},
    "float": {"attn_mask": torch.linspace(-1, 1, H * N * 9).view(1, H, N, 9)},
}


@pytest.mark.parametrize("call", SDPA_CALLS)
def test_attention_is_sdpa(qkv, call):
    options = SDPA_CALLS[call]
    torch.testing.assert_close(
        attnfuse.attention(*qkv, **options), F.scaled_dot_product_attention(*qkv, **options)
    )


@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_causal_bias_is_a_flag(qkv, make):
    bias = make(N, 9)
    torch.testing.assert_close(attnfuse.attention(*qkv, bias), F.scaled_dot_product_attention(*qkv, bias))


@pytest.mark.parametrize(
    "shapes",
    [
        [(5, 8), (7, 8), (7, 8)],
        [(3, 5, 8), (3, 7, 8), (3, 7, 8)],
        [(2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 8)],
        [(2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)],
        [(2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)],
        [(2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 8)],
        [(0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 8)],
        [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 12)],
    ],
)
def test_attention_takes_torchs_ranks(shapes):
    given = tensors(*shapes)
    expected = F.scaled_dot_product_attention(*given)
    out, aux = attnfuse.attention(*given, return_aux=AuxRequest(lse=True))
    torch.testing.assert_close(out, expected)
    assert aux.lse.shape == expected.shape[:-1] and aux.source_mass is None


def test_a_two_dimensional_mask_means_rows_and_columns_even_where_it_could_be_keys():
    q, k, v = tensors((3, 2, 3, 8), (3, 2, 5, 8), (3, 2, 5, 8))
    mask = torch.tensor([[1, 0, 1, 0, 1], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
    torch.testing.assert_close(
        attnfuse.attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask)
    )


def test_gqa(qkv):
    q, k, v = qkv[0], qkv[1][:, :2], qkv[2][:, :2]
    torch.testing.assert_close(
        attnfuse.attention(q, k, v, enable_gqa=True), F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    )


def test_output_keeps_the_querys_memory_layout():
    q, k, v = (x.transpose(1, 2) for x in tensors((B, N, H, D), (B, 9, H, D), (B, 9, H, D)))
    for backend in ("aten", "triton"):
        out = attnfuse.multi_source_attention(q, [Source(k, v), Source(k, v)], backend=backend)
        assert out.stride() == q.stride(), backend


@pytest.mark.parametrize("backend", ["reference", "aten", "triton"])
def test_sources_equal_their_concatenation(backend):
    q, k1, v1, k2, v2 = tensors((B, H, N, D), (B, H, 5, D), (B, H, 5, D), (B, H, 20, D), (B, H, 20, D))
    out, aux = attnfuse.multi_source_attention(
        q, [Source(k1, v1), Source(k2, v2)], return_aux=BOTH, backend=backend
    )
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, torch.cat([k1, k2], 2), torch.cat([v1, v2], 2)))
    torch.testing.assert_close(aux.source_mass.sum(-1), torch.ones(B, H, N))
    z = q @ torch.cat([k1, k2], 2).mT / D**0.5
    torch.testing.assert_close(aux.source_mass[..., 0], z.softmax(-1)[..., :5].sum(-1))
    torch.testing.assert_close(aux.lse, z.logsumexp(-1))


@pytest.mark.parametrize("backend", ["reference", "aten", "triton"])
def test_per_source_normalization(backend):
    q, k1, v1, k2, v2 = tensors((B, H, N, D), (B, H, 5, D), (B, H, 5, D), (B, H, 7, D), (B, H, 7, D))
    weights = torch.tensor([1.0, 0.4], requires_grad=True)
    present = torch.tensor([True, False])
    out, aux = attnfuse.multi_source_attention(
        q, [Source(k1, v1), Source(k2, v2, present=present)], normalization="per_source", source_weights=weights,
        return_aux=BOTH, backend=backend,
    )  # fmt: skip
    first, second = F.scaled_dot_product_attention(q, k1, v1), F.scaled_dot_product_attention(q, k2, v2)
    torch.testing.assert_close(out, first + 0.4 * second * present[:, None, None, None])
    torch.testing.assert_close(aux.source_mass[..., 1], present[:, None, None].expand(B, H, N).float())
    out.sum().backward()
    torch.testing.assert_close(weights.grad, torch.stack([first.sum(), second[0].sum()]), rtol=1e-4, atol=1e-4)


def test_per_source_with_nothing_to_see_is_zero():
    q, k, v = tensors((B, H, N, D), (B, H, 5, D), (B, H, 5, D))
    absent = torch.zeros(B, dtype=torch.bool)
    q.requires_grad_()
    out, aux = attnfuse.multi_source_attention(
        q, [Source(k, v, present=absent), Source(k, v, present=absent)], normalization="per_source", return_aux=BOTH
    )
    (out.sum() + aux.source_mass.sum()).backward()
    assert not out.any() and not aux.source_mass.any() and torch.isneginf(aux.lse).all()
    assert not q.grad.any()


def test_joint_attention():
    text, image = (tensors(*[(B, H, n, D)] * 3, seed=n) for n in (5, 9))
    keep = torch.tensor([5, 2])
    outs, auxes = attnfuse.joint_attention([Stream(*text, mask=keep), Stream(*image)], return_aux=BOTH)
    mask = torch.cat([torch.arange(5) < keep[:, None], torch.ones(B, 9).bool()], 1)[:, None, None]
    full = F.scaled_dot_product_attention(*(torch.cat(pair, 2) for pair in zip(text, image)), attn_mask=mask)
    torch.testing.assert_close(torch.cat(outs, 2), full)
    assert auxes[0].source_mass.shape == (B, H, 5, 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("by_window", [False, True])
def test_varlen_attention(causal, by_window):
    lengths_q, lengths_k = [3, 0, 5], [4, 2, 9]
    q, k, v = tensors((8, H, D), (15, 2, D), (15, 2, D))
    q.requires_grad_()
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k))
    options = {"window_size": (-1, 0)} if causal and by_window else {"is_causal": causal}
    out, aux = attnfuse.varlen_attention(
        q, k, v, cu_q, cu_k, 5, 9, enable_gqa=True, return_aux=AuxRequest(lse=True), **options
    )
    expected = []
    for n in range(3):
        one = [x[c[n] : c[n + 1]].transpose(0, 1)[None] for x, c in ((q, cu_q), (k, cu_k), (v, cu_k))]
        mask = torch.ones(lengths_q[n], lengths_k[n]).tril(lengths_k[n] - lengths_q[n]).bool() if causal else None
        expected.append(F.scaled_dot_product_attention(*one, mask, enable_gqa=True)[0].transpose(0, 1))
    torch.testing.assert_close(out, torch.cat(expected))
    assert aux.lse.shape == (8, H)
    (grad,) = torch.autograd.grad(out.square().sum(), q)
    (expected_grad,) = torch.autograd.grad(torch.cat(expected).square().sum(), q)
    torch.testing.assert_close(grad, expected_grad)


def test_a_sample_alone_equals_itself_in_a_padded_batch():
    q, k, v = tensors((3, H, N, D), (3, H, 30, D), (3, H, 30, D))
    lengths = torch.tensor([30, 4, 17])
    batch = attnfuse.attention(q, k, v, key_mask=lengths)
    for b, n in enumerate(lengths.tolist()):
        alone = attnfuse.attention(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
        torch.testing.assert_close(batch[b : b + 1], alone)


def test_dropout_repeats_with_torchs_seed_and_agrees_between_backends(qkv):
    outs = []
    for backend in ("reference", "triton", "reference"):
        torch.manual_seed(3)
        outs.append(attnfuse.attention(*qkv, dropout_p=0.4, backend=backend))
    torch.testing.assert_close(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], attnfuse.attention(*qkv, dropout_p=0.4))


def test_dropout_of_everything_gives_zeros(qkv):
    """F.scaled_dot_product_attention takes a p of 1; 1 / (1 - p) must not turn its zeros into NaN."""
    q, k, v = (x.requires_grad_() for x in qkv)
    out = attnfuse.attention(q, k, v, dropout_p=1.0)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, dropout_p=1.0))
    assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), (q, k, v)))
    with pytest.raises(RuntimeError, match="dropout_p must be less than 1"):
        attnfuse.attention(q, k, v, dropout_p=1.0, backend="triton")


def test_autocast_takes_the_autocast_dtype(qkv):
    with torch.autocast("cpu", torch.bfloat16):
        assert attnfuse.attention(*qkv).dtype == torch.bfloat16
        assert attnfuse.attention(*qkv, softcap=3.0).dtype == torch.bfloat16
        assert attnfuse.multi_source_attention(qkv[0], [Source(*qkv[1:])]).dtype == torch.bfloat16
        assert attnfuse.attention(*(x.double() for x in qkv)).dtype == torch.float64


def test_explain(qkv):
    q, k, v = qkv
    told = attnfuse.explain(q, k, v)
    assert told.backend == "aten" and "aten comes first" in told.others["reference"]
    assert attnfuse.explain(q, [Source(k, v)], softcap=2.0).backend == "reference"
    assert "softcap" in attnfuse.explain(q, k, v, softcap=2.0).others["aten"]
    assert len(attnfuse.explain([Stream(q, k, v)])) == 1
    assert attnfuse.explain(q, k, v, backend="reference").backend == "reference"
    with pytest.raises(RuntimeError, match="softcap"):
        attnfuse.explain(q, k, v, softcap=2.0, backend="aten")


def test_reference_twice_differentiable_elsewhere_says_so(qkv):
    q = qkv[0].requires_grad_()
    out = attnfuse.attention(q, *qkv[1:])
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# In attention(): torch's type and torch's words where torch refuses, and in all cases the argument's name.
BAD_ATTENTION = {
    "rank": ({"query": torch.randn(8)}, RuntimeError, "query.*at least 2 dimensional"),
    "batch": ({"key": torch.randn(3, H, 9, D)}, RuntimeError, "key"),
    "heads": ({"key": torch.randn(B, 3, 9, D)}, RuntimeError, "key"),
    "head dim": ({"key": torch.randn(B, H, 9, 5)}, RuntimeError, "key.*head dim"),
    "value length": ({"value": torch.randn(B, H, 8, D)}, RuntimeError, "value"),
    "device": ({"key": torch.randn(B, H, 9, D, device="meta")}, RuntimeError, "key.*device"),
    "dtypes": ({"key": torch.randn(B, H, 9, D).double()}, RuntimeError, "key.*same dtype"),
    "all integers": ({n: torch.ones(B, H, 9, D).int() for n in ("query", "key", "value")}, Exception,
                     "query must be float16"),
    "mask shape": ({"attn_mask": torch.ones(5, 9).bool()}, RuntimeError, "attn_mask"),
    "mask dtype": ({"attn_mask": torch.ones(N, 9).int()}, RuntimeError, "attn_mask.*dtype"),
    "mask and causal": ({"attn_mask": torch.ones(N, 9).bool(), "is_causal": True}, RuntimeError, "should not be set"),
    "gqa": ({"key": torch.randn(B, 2, 9, D), "value": torch.randn(B, 2, 9, D)}, RuntimeError, "key"),
    "gqa heads": ({"key": torch.randn(B, 3, 9, D), "value": torch.randn(B, 3, 9, D), "enable_gqa": True},
                  RuntimeError, "multiple"),
    "p over 1": ({"dropout_p": 1.5}, RuntimeError, "dropout.*1.5"),
    "negative p": ({"dropout_p": -0.1}, Exception, r"dropout_p must be in \[0, 1\], got -0.1"),
    "mask rank": ({"attn_mask": torch.ones(9).bool()}, IndexError, "attn_mask must have 2 to 4"),
    "key_mask dtype": ({"key_mask": torch.ones(B, 9).int()}, TypeError, "key_mask"),
    "key_mask shape": ({"key_mask": torch.ones(B, 8).bool()}, ValueError, "key_mask"),
    "negative length": ({"key_mask": torch.tensor([3, -1])}, ValueError, "key_mask.*negative.*-1"),
    "length beyond": ({"key_mask": torch.tensor([3, 10])}, ValueError, "key_mask.*9 keys, got 10"),
    "lengths batch": ({"key_mask": torch.tensor([3, 1, 2])}, ValueError, "key_mask"),
    "window": ({"window": (1, -3)}, ValueError, "window"),
    "window form": ({"window": 3}, ValueError, "window"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap"),
    "scale": ({"scale": float("nan")}, ValueError, "scale"),
    "sinks": ({"sinks": torch.randn(3)}, ValueError, "sinks"),
    "alibi": ({"alibi_slopes": torch.randn(3)}, ValueError, "alibi_slopes"),
    "aux": ({"return_aux": True}, TypeError, "return_aux"),
    "backend": ({"backend": "cudnn"}, ValueError, "backend.*'cudnn'"),
    "backend says no": ({"backend": "aten", "softcap": 1.0}, RuntimeError, "aten.*softcap"),
    "not a tensor": ({"value": None}, TypeError, "value"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ATTENTION)
def test_attention_refuses(qkv, name):
    bad, error, words = BAD_ATTENTION[name]
    with pytest.raises(error, match=f"(?s){words}"):
        attnfuse.attention(**({"query": qkv[0], "key": qkv[1], "value": qkv[2]} | bad))


K, V = torch.randn(B, H, 9, D), torch.randn(B, H, 9, D)
BAD_SOURCES = {
    "no sources": ([], {}, ValueError, "sources"),
    "not a source": ([K], {}, TypeError, r"sources\[0\] must be an attnfuse.Source"),
    "rank": ([Source(K[0], V)], {}, ValueError, r"sources\[0\].key must be 4-D"),
    "batch": ([Source(K, V), Source(K[:1], V[:1])], {}, ValueError, r"sources\[1\].key.*batch"),
    "heads": ([Source(K[:, :2], V[:, :2])], {}, ValueError, r"sources\[0\].key has 2 heads.*enable_gqa"),
    "unequal heads": ([Source(K, V), Source(K[:, :2], V[:, :2])], {"enable_gqa": True}, ValueError, r"sources\[1\]"),
    "unequal Dv": ([Source(K, V), Source(K, V[..., :4])], {}, ValueError, r"sources\[1\].value"),
    "dtype": ([Source(K.double(), V.double())], {}, TypeError, r"sources\[0\].key.*float32.*float64"),
    "present dtype": ([Source(K, V, present=torch.ones(B))], {}, ValueError, r"sources\[0\].present"),
    "present shape": ([Source(K, V, present=torch.ones(3).bool())], {}, ValueError, r"sources\[0\].present"),
    "bias shape": ([Source(K, V, bias=torch.ones(3))], {}, ValueError, r"sources\[0\].bias"),
    "bias type": ([Source(K, V, bias="much")], {}, TypeError, r"sources\[0\].bias"),
    "negative length": ([Source(K, V, mask=torch.tensor([1, -2]))], {}, ValueError, "negative"),
    "mask shape": ([Source(K, V, mask=torch.ones(B, 3).bool())], {}, ValueError, r"sources\[0\].mask"),
    "normalization": ([Source(K, V)], {"normalization": "all"}, ValueError, "normalization"),
    "weights with joint": ([Source(K, V)], {"source_weights": [1.0]}, ValueError, "source_weights"),
    "weights count": ([Source(K, V)], {"normalization": "per_source", "source_weights": [1.0, 2.0]}, ValueError,
                      "source_weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_multi_source_attention_refuses(qkv, name):
    sources, options, error, words = BAD_SOURCES[name]
    with pytest.raises(error, match=words):
        attnfuse.multi_source_attention(qkv[0], sources, **options)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"query": torch.randn(2, 8, H, D)}, "query must be 3-D"),
        ({"cu_seq_q": torch.tensor([0, 3, 9])}, "cu_seq_q"),
        ({"cu_seq_q": torch.tensor([0.0, 8.0])}, "cu_seq_q"),
        ({"max_q": 2}, "max_q"),
        ({"cu_seq_k": torch.tensor([0, 8]), "max_k": 8}, "cu_seq_k"),
    ],
)
def test_varlen_attention_refuses(bad, words):
    x = torch.randn(8, H, D)
    cu = torch.tensor([0, 3, 8])
    given = {"query": x, "key": x, "value": x, "cu_seq_q": cu, "cu_seq_k": cu, "max_q": 5, "max_k": 5}
    with pytest.raises(ValueError, match=words):
        attnfuse.varlen_attention(**(given | bad))
