"""attnfuse.nn: the drop-in against torch.nn.MultiheadAttention, the layers against plain formulas."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnfuse.nn as an
from attnfuse.nn import layers, multihead
from attnfuse.problem import AuxRequest, Source

B, L, S, E, H = 3, 5, 7, 8, 2
KDIM, VDIM = 6, 10


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pair(**options):
    """torch's module and ours, built from the same seed."""
    torch.manual_seed(7)
    theirs = nn.MultiheadAttention(E, H, **options)
    torch.manual_seed(7)
    ours = an.MultiheadAttention(E, H, **options)
    return theirs, ours


def make_masks(kind, length, source, dtype=torch.bool):
    """(key_padding_mask, attn_mask) with no fully masked row."""
    padding = torch.zeros(B, source, dtype=torch.bool)
    padding[0, 2:] = padding[1, -1] = True
    attn2 = torch.rand(length, source) < 0.3
    attn2[:, 0] = False
    attn3 = torch.rand(B * H, length, source) < 0.3
    attn3[:, :, 0] = False

    def additive(mask):
        return torch.randn(mask.shape).masked_fill(mask, -math.inf)

    return {
        "none": (None, None),
        "padding": (padding, None),
        "float padding": (additive(padding), None),
        "2d": (None, attn2),
        "float 3d": (None, additive(attn3)),
        "padding + 3d": (padding, attn3),
        "float padding + float 2d": (additive(padding), additive(attn2)),
        "padding + float 2d": (padding, additive(attn2)),
    }[kind]


MASKS = [
    "none", "padding", "float padding", "2d", "float 3d", "padding + 3d", "float padding + float 2d",
    "padding + float 2d",
]  # fmt: skip


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_matches_torch_in_outputs_weights_and_gradients(masks, average):
    flags = itertools.product([False, True], repeat=5)
    for batch_first, bias, add_bias_kv, add_zero_attn, own_dims in flags:
        dims = {"kdim": KDIM, "vdim": VDIM} if own_dims else {}
        theirs, ours = pair(
            batch_first=batch_first, bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, **dims
        )
        padding, attn_mask = make_masks(masks, L, S)
        shapes = [(L, E), (S, KDIM if own_dims else E), (S, VDIM if own_dims else E)]
        inputs = [torch.randn(B, n, d) if batch_first else torch.randn(n, B, d) for n, d in shapes]
        compare(theirs, ours, inputs, padding, attn_mask, average)


def compare(theirs, ours, inputs, padding, attn_mask, average=True):
    """Outputs, weights, and the gradients of a loss on both, of inputs, parameters and float masks."""
    seen = []
    for module in (theirs, ours):
        module.zero_grad()
        leaves = [x.clone().requires_grad_() for x in inputs]
        mask = attn_mask
        if mask is not None and mask.is_floating_point():
            mask = mask.clone().requires_grad_()
            leaves.append(mask)
        out, weights = module(*leaves[:3], padding, attn_mask=mask, average_attn_weights=average)
        torch.manual_seed(3)
        (out * torch.randn(out.shape)).sum().add((weights * torch.randn(weights.shape)).sum()).backward()
        gradients = {name: p.grad for name, p in module.named_parameters()}
        only_out, no_weights = module(*inputs, padding, attn_mask=attn_mask, need_weights=False)
        assert no_weights is None
        seen.append([out, weights, only_out, *(x.grad for x in leaves), gradients])
    torch.testing.assert_close(seen[1], seen[0])


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_self_attention_and_shared_key_value_match_torch(masks):
    """The cases where one or two of the three projections are saved."""
    for batch_first, inputs in itertools.product([False, True], ["xxx", "xyy"]):
        theirs, ours = pair(batch_first=batch_first)
        tensors = {name: torch.randn(B, S, E) if batch_first else torch.randn(S, B, E) for name in "xy"}
        padding, attn_mask = make_masks(masks, S, S)
        results = []
        for module in (theirs, ours):
            leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
            out, weights = module(*(leaves[name] for name in inputs), padding, attn_mask=attn_mask)
            out.square().sum().backward()
            used = [leaves[name].grad for name in sorted(set(inputs))]
            results.append([out, weights, used, module.in_proj_weight.grad])
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_inputs_match_torch(batch_first):
    theirs, ours = pair(batch_first=batch_first, add_bias_kv=True)
    q, kv = torch.randn(L, E), torch.randn(S, E)
    padding = torch.tensor([False] * 5 + [True] * 2)
    for mask in (None, torch.rand(L, S) < 0.2, torch.rand(H, L, S) < 0.2):
        for average in (True, False):
            expected = theirs(q, kv, kv, padding, attn_mask=mask, average_attn_weights=average)
            actual = ours(q, kv, kv, padding, attn_mask=mask, average_attn_weights=average)
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_causal_hint_matches_torch(need_weights, padded):
    theirs, ours = pair(batch_first=True)
    x = torch.randn(B, S, E)
    causal = nn.Transformer.generate_square_subsequent_mask(S)
    padding = torch.zeros(B, S)
    padding[1, 4:] = -math.inf
    options = {
        "key_padding_mask": padding if padded else None,
        "attn_mask": causal, "is_causal": True, "need_weights": need_weights,
    }  # fmt: skip
    torch.testing.assert_close(ours(x, x, x, **options), theirs(x, x, x, **options))


def test_same_initialisation_and_state_dict_both_ways():
    for options in ({}, {"bias": False}, {"kdim": KDIM, "vdim": VDIM}, {"add_bias_kv": True}):
        theirs, ours = pair(**options)
        assert list(theirs.state_dict()) == list(ours.state_dict())
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
        with torch.no_grad():
            for parameter in ours.parameters():
                parameter.normal_()
        theirs.load_state_dict(ours.state_dict())
        ours.load_state_dict(theirs.state_dict())
        for name, parameter in theirs.named_parameters():
            assert torch.equal(parameter, ours.get_parameter(name))


def test_a_row_that_sees_no_key_gives_the_output_bias_where_torch_gives_nan():
    theirs, ours = pair(batch_first=True)
    nn.init.normal_(ours.out_proj.bias)
    x = torch.randn(B, S, E, requires_grad=True)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1] = True
    assert theirs(x, x, x, padding)[0][1].isnan().all()
    out, weights = ours(x, x, x, padding)
    torch.testing.assert_close(out[1], ours.out_proj.bias.expand(S, E))
    assert (weights[1] == 0).all()
    (out.square().sum() + weights.square().sum()).backward()
    assert x.grad.isfinite().all() and (x.grad[1] == 0).all() and (x.grad[0] != 0).any()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


def test_nan_in_padded_keys_reaches_neither_output_nor_weights_nor_the_querys_gradient():
    _, ours = pair(batch_first=True)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0, 2:] = padding[1] = True
    kv = torch.randn(B, S, E)
    seen = []
    for fill in (0.0, math.nan):
        query = torch.ones(B, L, E, requires_grad=True)
        out, weights = ours(query, *(2 * [kv.masked_fill(padding[..., None], fill)]), padding)
        (out.square().sum() + weights.square().sum()).backward()
        seen.append([out, weights, query.grad])
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=0)
    assert (weights[padding[:, None].expand_as(weights)] == 0).all()


@pytest.mark.parametrize("unbatched", [False, True])
def test_inputs_that_are_one_tensor_are_projected_once(unbatched, monkeypatch):
    seen = []
    real = multihead.multi_source_attention
    monkeypatch.setattr(multihead, "multi_source_attention", lambda *a, **k: seen.append(a) or real(*a, **k))
    _, ours = pair()
    x, y = (torch.randn((L, E) if unbatched else (L, B, E)) for _ in range(2))
    for inputs, products in (((x, x, x), 1), ((x, y, y), 2), ((x, y, x), 3)):
        ours(*inputs)
        query, (source,) = seen.pop()
        parts = (query, source.key, source.value)
        assert len({part.untyped_storage().data_ptr() for part in parts}) == products


def test_weights_agree_with_the_output_for_bias_and_zero_keys():
    """Columns in torch's order: keys, then the learned key, then the zero key."""
    _, ours = pair(batch_first=True, add_bias_kv=True, add_zero_attn=True)
    x = torch.randn(B, S, E)
    _, weights = ours(x, x, x, average_attn_weights=False)
    assert weights.shape == (B, H, S, S + 2)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, S))


def test_averaged_weights_never_hold_a_per_head_matrix():
    heads, n = 8, 64
    q, k = (torch.randn(1, heads, n, 4, requires_grad=True) for _ in range(2))
    lse = torch.logsumexp(q @ k.mT / 2, -1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        weights = multihead.attention_weights(q, [Source(k, k)], lse, average=True)
    torch.testing.assert_close(weights, torch.softmax(q @ k.mT / 2, -1).mean(1))
    assert max(saved) < n * n  # not even one head's matrix waits for the backward pass
    (gradient,) = torch.autograd.grad(weights.square().sum(), q)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_dropout_acts_in_training_only():
    _, ours = pair(batch_first=True, dropout=0.5)
    x = torch.randn(B, S, E)
    ours.eval()
    assert torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])
    ours.train()
    first, weights = ours(x, x, x)
    assert not torch.equal(first, ours(x, x, x)[0])
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, S))


def bad_calls():
    x = torch.randn(B, S, E)
    boolean = torch.zeros
    return [
        ((x, x[0], x), {}),
        ((x[0], x, x), {}),
        ((x[None], x, x), {}),
        ((x[..., :6], x, x), {}),
        ((x[0], x[0], x[0, :1]), {}),
        ((x, x, x), {"is_causal": True}),
        ((x, x, x), {"key_padding_mask": boolean(B, S, dtype=torch.long)}),
        ((x, x, x), {"attn_mask": boolean(S, S, dtype=torch.long)}),
        ((x, x, x), {"key_padding_mask": boolean(S, dtype=torch.bool)}),
        ((x, x, x), {"key_padding_mask": boolean(B, L, dtype=torch.bool)}),
        ((x, x, x), {"key_padding_mask": boolean(L, S, dtype=torch.bool)}),
        ((x, x, x), {"attn_mask": boolean(L, S, dtype=torch.bool)}),
        ((x, x, x), {"attn_mask": boolean(B, S, S, dtype=torch.bool)}),
        ((x, x, x), {"attn_mask": boolean(S, dtype=torch.bool)}),
        ((x[0], x[0], x[0]), {"attn_mask": boolean(B * H, S, S, dtype=torch.bool)}),
    ]


@pytest.mark.parametrize("case", range(len(bad_calls())))
def test_errors_are_torchs(case):
    arguments, options = bad_calls()[case]
    theirs, ours = pair(batch_first=True)
    with pytest.raises(Exception) as expected:
        theirs(*arguments, **options)
    with pytest.raises(type(expected.value)) as actual:
        ours(*arguments, **options)
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("options", [{"embed_dim": 8, "num_heads": 3}, {"embed_dim": 0, "num_heads": 1}])
def test_constructor_errors_are_torchs(options):
    with pytest.raises(Exception) as expected:
        nn.MultiheadAttention(**options)
    with pytest.raises(type(expected.value), match=str(expected.value)):
        an.MultiheadAttention(**options)


def swapped(model):
    """A copy of the model with every attention replaced, in place, after it was built."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.MultiheadAttention:
                ours = an.MultiheadAttention(E, H, batch_first=child.batch_first)
                ours.load_state_dict(child.state_dict())
                setattr(parent, name, ours.train(child.training))
    return model


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_inside_a_transformer_encoder_the_fast_path_does_not_go_past_us(grad, nested, monkeypatch):
    layer = nn.TransformerEncoderLayer(E, H, 16, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    ours = swapped(theirs)
    calls = []
    real = multihead.multi_source_attention
    monkeypatch.setattr(multihead, "multi_source_attention", lambda *a, **k: calls.append(1) or real(*a, **k))
    x = torch.randn(B, S, E)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, 4:] = True
    for mask in (None, padding):
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's own: nested tensors are a prototype
            expected, actual = (m(x, src_key_padding_mask=mask) for m in (theirs, ours))
        real_rows = ~padding if mask is not None else torch.ones(B, S, dtype=torch.bool)
        torch.testing.assert_close(actual[real_rows], expected[real_rows])
    assert len(calls) == 2 * 2
    padding[2] = True
    with torch.set_grad_enabled(grad):
        assert ours(x, src_key_padding_mask=padding).isfinite().all()


def test_inside_a_transformer_decoder():
    theirs = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 16, batch_first=True), 2).eval()
    ours = swapped(theirs)
    x, memory = torch.randn(B, L, E), torch.randn(B, S, E)
    options = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(L), "tgt_is_causal": True}
    torch.testing.assert_close(ours(x, memory, **options), theirs(x, memory, **options))


def test_autocast_stays_within_twice_torchs_error():
    theirs, ours = pair(batch_first=True, add_bias_kv=True)
    x = torch.randn(B, 64, E)
    exact = copy.deepcopy(theirs).double()(x.double(), x.double(), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, actual = theirs(x, x, x), ours(x, x, x)
    for a, t, e in zip(actual, low, exact, strict=True):
        assert a.dtype == t.dtype
        budget = 2 * (t.double() - e).abs().max() + torch.finfo(a.dtype).eps * e.abs().max()
        assert (a.double() - e).abs().max() <= budget


# the layers


def plain(q, k, v, mask=None, **options):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, mask, **options).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("options", [
    {}, {"num_kv_heads": 2}, {"head_dim": 6, "bias": False}, {"qk_norm": True}, {"is_causal": True},
])  # fmt: skip
def test_self_attention_is_the_formula(options):
    layer = an.SelfAttention(16, 4, **options)
    x = torch.randn(B, S, 16)
    q, k, v = layer.project(x)
    if options.get("qk_norm"):
        torch.testing.assert_close(q.square().mean(-1), torch.ones(B, 4, S), rtol=1e-3, atol=1e-3)
    expected = layer.out_proj(plain(q, k, v, is_causal=options.get("is_causal", False)))
    torch.testing.assert_close(layer(x), expected)


def test_self_attention_window_and_softcap():
    x = torch.randn(B, S, E)
    layer = an.SelfAttention(E, H, window=(1, 0), softcap=2.0)
    q, k, v = layer.project(x)
    z = 2.0 * torch.tanh(q @ k.mT / math.sqrt(E // H) / 2.0)
    i, j = torch.arange(S)[:, None], torch.arange(S)
    z = z.masked_fill((j < i - 1) | (j > i), -math.inf)
    expected = layer.out_proj((z.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)


def test_self_attention_never_sees_padding():
    layer = an.SelfAttention(E, H, qk_norm=True)
    x = torch.randn(B, S, E)
    lengths = torch.tensor([S, 3, 0])
    real = torch.arange(S) < lengths[:, None]
    poisoned = x.masked_fill(~real[..., None], math.nan).requires_grad_()
    out = layer(poisoned, lengths)
    torch.testing.assert_close(out, layer(poisoned, real), rtol=0, atol=0)
    torch.testing.assert_close(out[1, :3], layer(x[1:2, :3])[0])
    out.square().sum().backward()
    assert out.isfinite().all() and (poisoned.grad[~real] == 0).all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_cross_attention_presence_mask_and_aux():
    layer = an.CrossAttention(E, H, kv_dim=KDIM, num_kv_heads=1)
    query, context = torch.randn(B, L, E), torch.randn(B, S, KDIM)
    present = torch.tensor([True, False, True])
    poisoned = context.clone()
    poisoned[1] = math.nan
    poisoned[2, 3:] = math.inf
    poisoned.requires_grad_()
    lengths = torch.tensor([S, S, 3])
    out, aux = layer(query, poisoned, lengths, present, AuxRequest(lse=True, source_mass=True))
    k, v = layer.key_value(context)
    expected = layer.out_proj(plain(layer.query(query), k, v))
    torch.testing.assert_close(out[0], expected[0])
    torch.testing.assert_close(out[1], layer.out_proj.bias.expand(L, E))
    torch.testing.assert_close(out[2:], layer(query[2:], context[2:, :3]))
    assert (aux.lse[1] == -math.inf).all()
    torch.testing.assert_close(aux.source_mass[..., 0], present[:, None, None].float().expand(B, H, L))
    out.square().sum().backward()
    assert (poisoned.grad[1] == 0).all() and all(p.grad.isfinite().all() for p in layer.parameters())


KV_DIMS = {"text": 6, "image": 10, "audio": 4}


def kv_inputs():
    return {"text": torch.randn(B, S, 6), "image": torch.randn(B, 9, 10), "audio": torch.randn(B, 4)}


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1, "qk_norm": True}])
def test_multi_source_is_attention_over_the_concatenation(options):
    layer = an.MultiSourceCrossAttention(E, H, KV_DIMS, **options)
    query, sources = torch.randn(B, L, E), kv_inputs()
    pairs = [layer.key_value[n](x if x.dim() == 3 else x[:, None]) for n, x in sources.items()]
    for head in (layer.query(query), pairs[0][0]):
        is_normed = torch.allclose(head.square().mean(-1), torch.ones(()), atol=1e-3)
        assert is_normed is options.get("qk_norm", False)
    keys, values = (torch.cat(parts, 2) for parts in zip(*pairs, strict=True))
    expected = layer.out_proj(plain(layer.query(query), keys, values))
    out, aux = layer(query, sources, return_aux=AuxRequest(source_mass=True))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(aux.source_mass.sum(-1), torch.ones(B, H, L))


def test_multi_source_absence_in_every_form():
    layer = an.MultiSourceCrossAttention(E, H, KV_DIMS)
    query, sources = torch.randn(B, L, E), kv_inputs()
    two = {name: sources[name] for name in ("audio", "text")}
    expected, aux = layer(query, two, return_aux=AuxRequest(source_mass=True))
    assert aux.source_mass.shape == (B, H, L, 3) and (aux.source_mass[..., 1] == 0).all()
    gone = torch.tensor([[True, False, True]]).expand(B, 3)
    poisoned = sources | {"image": torch.full_like(sources["image"], math.nan)}
    for call in (
        {"present": gone},
        {"present": {"image": gone[:, 1]}},
        {"mask": {"image": torch.zeros(B, dtype=torch.long)}},
    ):
        torch.testing.assert_close(layer(query, poisoned, **call), expected)
    torch.testing.assert_close(layer(query, {}), layer.out_proj.bias.expand(B, L, E))


def test_multi_source_per_source_sums_each_attention():
    layer = an.MultiSourceCrossAttention(E, H, KV_DIMS, normalization="per_source")
    with torch.no_grad():
        layer.source_weights.copy_(torch.tensor([1.0, 0.5, 2.0]))
    query, sources = torch.randn(B, L, E), kv_inputs()
    total = 0.0
    for weight, (name, x) in zip((1.0, 0.5, 2.0), sources.items(), strict=True):
        k, v = layer.key_value[name](x if x.dim() == 3 else x[:, None])
        total = total + weight * plain(layer.query(query), k, v)
    out = layer(query, sources)
    torch.testing.assert_close(out, layer.out_proj(total))
    out.sum().backward()
    assert (layer.source_weights.grad != 0).all()


def test_the_kernel_gets_views_and_no_copies(monkeypatch):
    seen = []
    real = layers.multi_source_attention
    monkeypatch.setattr(layers, "multi_source_attention", lambda *a, **k: seen.append(a) or real(*a, **k))
    an.SelfAttention(E, H)(torch.randn(B, S, E))
    an.MultiSourceCrossAttention(E, H, KV_DIMS)(torch.randn(B, L, E), kv_inputs())
    for query, sources in seen:
        assert query.stride(-1) == 1 and query.stride(1) == E // H
        for source in sources:
            assert source.key.stride(-1) == source.value.stride(-1) == 1
            assert source.key.untyped_storage().data_ptr() == source.value.untyped_storage().data_ptr()
    assert len(seen) == 2 and len(seen[1][1]) == 3


def test_joint_block_on_streams_is_the_block_on_their_concatenation():
    block = an.JointBlock(E, H, num_kv_heads=1, qk_norm=True)
    a, b = torch.randn(B, 4, E), torch.randn(B, 6, E)
    outs = block([a, b])
    (together,) = block([torch.cat([a, b], 1)])
    torch.testing.assert_close(torch.cat(outs, 1), together)
    (alone,) = block([a])
    hidden = block([a, b], present=[None, torch.zeros(B, dtype=torch.bool)])
    torch.testing.assert_close(hidden[0], alone)


@pytest.mark.parametrize(("build", "message"), [
    (lambda: an.SelfAttention(8, 3), "embed_dim must be divisible by num_heads"),
    (lambda: an.SelfAttention(8, 4, num_kv_heads=3), "num_heads must be divisible by num_kv_heads"),
    (lambda: an.CrossAttention(8, 2, dropout=1.5), "dropout must be"),
    (lambda: an.MultiSourceCrossAttention(8, 2, {}), "kv_dims must name at least one"),
    (lambda: an.MultiSourceCrossAttention(8, 2, KV_DIMS, normalization="x"), "normalization must be"),
    (lambda: an.SelfAttention(8, 2)(torch.randn(2, 8)), "x must have shape"),
    (lambda: an.CrossAttention(8, 2)(torch.randn(2, 3, 8), torch.randn(3, 3, 8)), "context has batch size 3"),
    (lambda: an.JointBlock(8, 2)([torch.randn(2, 3, 8)], masks=[]), "masks must have one entry per stream"),
])  # fmt: skip
def test_errors_name_the_argument(build, message):
    with pytest.raises(ValueError, match=message):
        build()
