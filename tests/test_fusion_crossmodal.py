"""CrossmodalTransformer, CoAttentionBlock and QFormer: what each computes, and the pains they must not have."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from attnfuse.fusion.crossmodal import CoAttentionBlock, CrossmodalTransformer
from attnfuse.fusion.qformer import QFormer
from attnfuse.nn.modalities import gather_modalities
from attnfuse.nn.transformer import CrossBranch

B, E, HEADS = 3, 16, 4
DIMS = {"text": 6, "image": 10, "audio": 4}
LENGTHS = {"text": 7, "image": 5, "audio": 9}
NAMES = list(DIMS)

FUSION = {
    "crossmodal": lambda: CrossmodalTransformer(DIMS, E, HEADS, 2, max_lengths={"text": 12}),
    "crossmodal-pairwise": lambda: CrossmodalTransformer(DIMS, E, HEADS, 1, pairwise=True, num_self_layers=2),
    "qformer": lambda: QFormer(DIMS, E, HEADS, 3, num_queries=5),
}
CO_ATTENTION = {
    "vilbert": lambda: CoAttentionBlock(8, 12, HEADS),
    "lxmert": lambda: CoAttentionBlock(8, 12, HEADS, self_attention=True),
}
every_fusion = pytest.mark.parametrize("case", FUSION)
every_co_attention = pytest.mark.parametrize("case", CO_ATTENTION)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def shaken(module):
    """Zero biases and unit norms would let mistakes pass."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def make(case):
    return shaken((FUSION | CO_ATTENTION)[case]())


def make_inputs(batch=B):
    return {name: torch.randn(batch, LENGTHS[name], dim) for name, dim in DIMS.items()}


def make_pair(batch=B):
    return torch.randn(batch, 6, 8), torch.randn(batch, 9, 12)


def weighted(*tensors):
    """A scalar that no two entries enter alike."""
    return sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in tensors)


def loss_of(output):
    return weighted(output.fused, output.source_mass, *output.per_modality.values())


def gradients(module):
    return [p.grad for p in module.parameters()]


def split(x, heads=HEADS):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def by_hand(branch, x, contexts):
    """A cross branch with the concatenation it avoids; no masks, everybody present."""
    heads = branch.attn.heads.query
    query = split(branch.attn.query.proj(branch.norm(x)), heads)
    keys, values = [], []
    for name, y in contexts.items():
        key, value = branch.attn.key_value[name].proj(branch.source_norms[name](y)).chunk(2, -1)
        keys.append(split(key, heads))
        values.append(split(value, heads))
    out = F.scaled_dot_product_attention(query, torch.cat(keys, 2), torch.cat(values, 2))
    return x + branch.attn.out_proj(out.transpose(1, 2).flatten(2))


# what each module computes


def test_cross_branch_is_attention_over_the_concatenation_and_adds_nothing_where_nobody_is():
    branch = shaken(CrossBranch(E, HEADS, DIMS))
    x, inputs = torch.randn(B, 5, E), make_inputs()
    out, mass = branch(x, gather_modalities(inputs, DIMS), return_mass=True)
    torch.testing.assert_close(out, by_hand(branch, x, inputs))
    torch.testing.assert_close(mass.sum(1), torch.ones(B))
    assert (mass > 0).all() and branch(x, gather_modalities(inputs, DIMS))[1] is None

    present = torch.tensor([[True, True, True], [False, True, False], [False, False, False]])
    out, mass = branch(x, gather_modalities(inputs, DIMS, present=present), return_mass=True)
    assert torch.equal(out[2], x[2]) and (mass[2] == 0).all()  # not even the bias of the output projection
    assert torch.equal(mass[1], torch.tensor([0.0, 1.0, 0.0]))
    branch.zero_grad()
    out[2].sum().backward()
    assert all(grad is None or (grad == 0).all() for grad in gradients(branch))


def streams_by_hand(module, inputs):
    embedded = {name: module.embed[name](x) for name, x in inputs.items()}
    streams = {}
    for target, stream in module.streams.items():
        results = []
        for route in stream.routes.values():
            x = embedded[target]
            for layer in route.layers:
                x = layer.mlp(by_hand(layer.cross, x, {name: embedded[name] for name in route.sources}))
            results.append(x)
        x = torch.stack(results).mean(0)
        for block in stream.own:
            (x,) = block([x])
        streams[target] = stream.norm(x)
    return streams


@pytest.mark.parametrize("case", ["crossmodal", "crossmodal-pairwise"])
def test_crossmodal_streams_read_all_others_as_they_came_in(case):
    module, inputs = make(case), make_inputs()
    reads = {target: [route.sources for route in s.routes.values()] for target, s in module.streams.items()}
    assert reads["image"] == ([("text",), ("audio",)] if "pairwise" in case else [("text", "audio")])
    output = module(inputs)
    torch.testing.assert_close(output.per_modality, streams_by_hand(module, inputs))


def test_with_two_modalities_the_pairwise_form_is_the_same_module():
    dims = {"text": 6, "audio": 4}
    one, other = (CrossmodalTransformer(dims, E, HEADS, 2, pairwise=flag) for flag in (False, True))
    other.load_state_dict(one.state_dict())
    inputs = {name: make_inputs()[name] for name in dims}
    torch.testing.assert_close(other(inputs).fused, one(inputs).fused, rtol=0, atol=0)


def test_pairwise_averages_over_the_partners_that_are_there():
    """An absent partner must not leave a hole: with one left, the stream is that partner's result alone."""
    module, inputs = make("crossmodal-pairwise"), make_inputs()
    present = torch.tensor([[True, True, False]]).expand(B, 3)
    route = module.streams["text"].routes["image"]
    embedded = {name: module.embed[name](inputs[name]) for name in ("text", "image")}
    x = embedded["text"]
    for layer in route.layers:
        x = layer.mlp(by_hand(layer.cross, x, {"image": embedded["image"]}))
    for block in module.streams["text"].own:
        (x,) = block([x])
    actual = module(inputs, present=present).per_modality["text"]
    torch.testing.assert_close(actual, module.streams["text"].norm(x))


@pytest.mark.parametrize("case", ["crossmodal", "crossmodal-pairwise"])
def test_a_modality_with_nobody_to_read_skips_the_layers_that_read(case):
    module, inputs = make(case), make_inputs()
    output = module({"text": inputs["text"]})
    (x,) = [module.embed["text"](inputs["text"])]
    for block in module.streams["text"].own:
        (x,) = block([x])
    torch.testing.assert_close(output.per_modality["text"], module.streams["text"].norm(x))
    assert torch.equal(output.source_mass, torch.tensor([[1.0, 0.0, 0.0]]).expand(B, 3))
    loss_of(output).backward()
    for name, parameter in module.named_parameters():
        if ".routes." in name:
            assert parameter.grad is not None and (parameter.grad == 0).all(), name


def test_crossmodal_of_one_modality_is_a_transformer_over_it():
    module = CrossmodalTransformer({"text": 6}, E, HEADS, 2)
    output = module({"text": make_inputs()["text"]})
    assert output.fused.shape == (B, E) and torch.equal(output.source_mass, torch.ones(B, 1))


def test_crossmodal_all_absent_is_the_normed_query():
    module = make("crossmodal")
    output = module({}, present=torch.zeros(B, 3, dtype=torch.bool))
    torch.testing.assert_close(output.fused, module.fused_norm(module.query).expand(B, -1))
    assert (output.source_mass == 0).all()


def test_qformer_by_hand():
    module, inputs = make("qformer"), make_inputs()
    tokens = {name: module.embed[name](x) for name, x in inputs.items()}
    x = module.query.expand(B, -1, -1)
    for layer in module.layers:
        x = layer.own(x)
        if layer.cross is not None:
            x = by_hand(layer.cross, x, tokens)
        x = layer.mlp(x)
    output = module(inputs)
    torch.testing.assert_close(module.queries(inputs), module.norm(x))
    torch.testing.assert_close(output.fused, module.norm(x).mean(1))
    torch.testing.assert_close(output.per_modality, tokens)


@pytest.mark.parametrize(("every", "reading"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])])
def test_qformer_reads_in_every_nth_layer(every, reading):
    module = QFormer(DIMS, E, HEADS, 5, num_queries=2, cross_attention_every=every)
    assert [depth for depth, layer in enumerate(module.layers) if layer.cross is not None] == reading


def test_qformer_queries_are_told_apart_and_number_32_by_default():
    module = QFormer(DIMS, E, HEADS, 2)
    queries = module.queries(make_inputs())
    assert queries.shape == (B, 32, E)
    assert (queries.std(1) > 1e-3).all()


def test_qformer_queries_keep_the_presence_contract():
    module, inputs = make("qformer"), make_inputs()
    present = torch.tensor([[True, True, True], [True, False, True], [False, False, False]])
    poisoned = inputs | {"image": inputs["image"].index_fill(0, torch.tensor([1, 2]), math.nan)}
    queries = module.queries(poisoned, present=present)
    torch.testing.assert_close(queries, module.queries(inputs, present=present), rtol=0, atol=0)
    nobody = module.queries({}, present=torch.zeros(1, 3, dtype=torch.bool))
    torch.testing.assert_close(queries[2:], nobody)


@every_co_attention
def test_co_attention_by_hand_from_the_same_incoming_values(case):
    module, (a, b) = make(case), make_pair()
    expected = []
    for block, x, partner, y in ((module.block_a, a, "b", b), (module.block_b, b, "a", a)):
        x = by_hand(block.cross, x, {partner: y})
        if case == "lxmert":
            x = block.own(x)
        expected.append(block.mlp(x))
    out_a, out_b = module(a, b)
    torch.testing.assert_close((out_a, out_b), tuple(expected))
    one_after_the_other = by_hand(module.block_b.cross, b, {"a": out_a})
    assert not torch.allclose(one_after_the_other, by_hand(module.block_b.cross, b, {"a": a}), atol=1e-3)


def test_co_attention_takes_a_head_dim_where_the_heads_do_not_divide_a_width():
    with pytest.raises(ValueError, match="embed_dim must be divisible by num_heads"):
        CoAttentionBlock(8, 10, 4)
    out_a, out_b = CoAttentionBlock(8, 10, 4, head_dim=4)(torch.randn(2, 3, 8), torch.randn(2, 5, 10))
    assert out_a.shape == (2, 3, 8) and out_b.shape == (2, 5, 10)


# the presence contract of the block on token tensors


@every_co_attention
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_co_attention_with_an_absent_partner(case):
    """Samples: both here, b absent, a absent, neither. b's column is padded in the first sample."""
    module, (a, b) = make(case), make_pair(4)
    here_a, here_b = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    real_b = torch.arange(9) < torch.tensor([4, 9, 9, 9])[:, None]
    seen = []
    for poison in (0.0, math.nan, math.inf, 1e30):
        module.zero_grad()
        leaf_a = a.masked_fill(~here_a[:, None, None], poison).requires_grad_()
        visible_b = real_b & here_b[:, None]
        leaf_b = b.masked_fill(~visible_b[..., None], poison).requires_grad_()
        with torch.autograd.detect_anomaly(check_nan=True):
            out_a, out_b = module(leaf_a, leaf_b, None, real_b, here_a, here_b)
            weighted(out_a, out_b).backward()
        seen.append([out_a, out_b, leaf_a.grad, leaf_b.grad, *gradients(module)])
        torch.testing.assert_close(seen[-1], seen[0], rtol=0, atol=0)
    assert (out_a[~here_a] == 0).all() and (out_b[~visible_b] == 0).all()
    assert (leaf_a.grad[~here_a] == 0).all() and (leaf_b.grad[~visible_b] == 0).all()

    alone = a[1:2]
    if case == "lxmert":
        alone = module.block_a.own(alone)
    torch.testing.assert_close(out_a[1:2], module.block_a.mlp(alone))  # the cross branch adds nothing
    alone_a, alone_b = module(a[:1], b[:1, :4])
    torch.testing.assert_close((out_a[:1], out_b[:1, :4]), (alone_a, alone_b))


def test_co_attention_says_absence_in_one_of_three_ways():
    module, (a, b) = make("lxmert"), make_pair()
    expected, _ = module(a, b[:, :0])
    gone = torch.zeros(B, dtype=torch.bool)
    for how in ({"present_b": gone}, {"mask_b": gone.long()}, {"mask_b": gone[:, None].expand(B, 9)}):
        torch.testing.assert_close(module(a, b, **how)[0], expected)


def bad_co_attention_calls():
    a, b, here = torch.randn(2, 6, 8), torch.randn(2, 9, 12), torch.ones(2, dtype=torch.bool)
    return [
        (TypeError, "a must be a floating-point tensor, got list", ([1.0], b), {}),
        (TypeError, "b must be a floating-point tensor, got torch.int64", (a, b.long()), {}),
        (ValueError, r"a must have shape \(B, N, 8\), got \(2, 9, 12\)", (b, a), {}),
        (ValueError, r"b must have shape \(B, N, 12\), got \(2, 12\)", (a, b[:, 0]), {}),
        (ValueError, "b has batch size 1, a has 2", (a, b[:1]), {}),
        (ValueError, r"mask_a must have shape \(2, 6\)", (a, b), {"mask_a": torch.ones(2, 9).bool()}),
        (TypeError, "mask_b must be bool", (a, b), {"mask_b": torch.ones(2, 9)}),
        (TypeError, "present_a must be a bool tensor, got torch.int64", (a, b), {"present_a": here.long()}),
        (ValueError, r"present_b must have shape \(2,\), got \(1,\)", (a, b), {"present_b": here[:1]}),
    ]


@pytest.mark.parametrize("number", range(len(bad_co_attention_calls())))
def test_a_bad_co_attention_call_names_the_argument(number):
    error, message, arguments, options = bad_co_attention_calls()[number]
    with pytest.raises(error, match=message):
        make("vilbert")(*arguments, **options)


@pytest.mark.parametrize(("message", "build"), [
    ("num_layers must be positive, got 0", lambda: CrossmodalTransformer(DIMS, E, HEADS, 0)),
    ("num_self_layers must not be negative", lambda: CrossmodalTransformer(DIMS, E, HEADS, 1, num_self_layers=-1)),
    ("dims must name at least one", lambda: CrossmodalTransformer({}, E, HEADS, 1)),
    ("num_layers must be positive, got 0", lambda: QFormer(DIMS, E, HEADS, 0)),
    ("num_queries must be positive, got 0", lambda: QFormer(DIMS, E, HEADS, 1, 0)),
    ("cross_attention_every must be positive", lambda: QFormer(DIMS, E, HEADS, 1, cross_attention_every=0)),
    ("max_lengths has unknown", lambda: QFormer(DIMS, E, HEADS, 1, max_lengths={"smell": 3})),
    ("dim_b must be positive, got 0", lambda: CoAttentionBlock(8, 0, HEADS)),
    ("dropout must be", lambda: CoAttentionBlock(8, 12, HEADS, dropout=1.0)),
])  # fmt: skip
def test_a_bad_constructor_argument_is_named(message, build):
    with pytest.raises(ValueError, match=message):
        build()


# pains of other libraries


def naive_attention(query, key, value, visible, fill):
    """softmax with the masked logits set to `fill`; visible (B, N)."""
    logits = (query @ key.mT).masked_fill(~visible[:, None], fill)
    return logits.softmax(-1) @ value


@every_fusion
def test_an_all_padded_source_gives_no_nan(case):
    """nn.MultiheadAttention returns NaN for a sample whose key_padding_mask hides every key (when it computes
    weights, its default): a softmax over nothing but -inf. One empty sample then ruins the whole batch's
    gradients. Here the empty sample reads nothing, and the rest is as if it were alone.
    """
    q, kv = torch.randn(2, 4, 8), torch.randn(2, 5, 8)
    visible = torch.tensor([[True] * 5, [False] * 5])
    assert naive_attention(q, kv, kv, visible, -math.inf)[1].isnan().all()

    module, inputs = make(case), make_inputs()
    lengths = {name: torch.tensor([length, 0, 0]) for name, length in LENGTHS.items()}
    lengths["text"] = torch.tensor([7, 7, 0])
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    output = module(inputs, lengths)
    loss_of(output).backward()
    assert output.fused.isfinite().all() and all(grad.isfinite().all() for grad in gradients(module))
    assert all(x.grad.isfinite().all() for x in inputs.values())
    first = module({name: x[:1] for name, x in inputs.items()})
    torch.testing.assert_close(output.fused[:1], first.fused)


@every_fusion
@pytest.mark.parametrize("absent", [["image"], ["image", "audio"], NAMES])
def test_what_is_absent_moves_nothing(case, absent):
    """Evolla's cross-attention in Hugging Face transformers fills masked logits with the smallest finite
    number, so a sample with no features at all attends to them evenly, and what the absent features hold
    moves the output. It also skips the layer only if the whole batch has nothing, so whether an empty sample
    passes through the MLP depends on its neighbours.
    """
    q, kv, gone = torch.randn(1, 4, 8), torch.randn(1, 5, 8), torch.zeros(1, 5, dtype=torch.bool)
    smallest = torch.finfo(q.dtype).min
    before, after = (naive_attention(q, x, x, gone, smallest) for x in (kv, 2 * kv))
    assert (before - after).abs().max() > 0.1

    module, inputs = make(case), make_inputs()
    present = torch.ones(B, 3, dtype=torch.bool)
    present[1, [NAMES.index(name) for name in absent]] = False
    other = {name: x.clone() for name, x in inputs.items()}
    for name in absent:
        other[name][1] = 100 * torch.randn_like(other[name][1])
    base, moved = module(inputs, present=present), module(other, present=present)
    torch.testing.assert_close(moved, base, rtol=0, atol=0)
    alone = module({name: x[1:2] for name, x in inputs.items()}, present=present[1:2])
    torch.testing.assert_close(alone.fused, base.fused[1:2])


def batch_wide_max_attention(query, key, value):
    """Bi-attention as GroundingDINO has it: shifted by the largest logit of the batch, then clamped."""
    logits = query @ key.mT
    return (logits - logits.max()).clamp(min=-50000).softmax(-1) @ value


def test_huge_logits_in_one_sample_leave_the_others_alone():
    """GroundingDINO's bi-attention subtracts the maximum over the whole batch before it clamps and softmaxes:
    beside a sample with large logits, all others are pushed into the clamp, and their attention turns even.
    Which samples share a batch then decides what each comes out as.
    """
    q, k = torch.randn(2, 4, 8), torch.randn(2, 5, 8)
    q[1] *= 1e4
    k[1] *= 1e4
    alone, together = batch_wide_max_attention(q[:1], k[:1], k[:1]), batch_wide_max_attention(q, k, k)
    assert (alone - together[:1]).abs().max() > 0.1

    module = make("vilbert").double()
    loud = 0  # a feature that the first sample does not use and that the logits weigh enormously
    with torch.no_grad():
        for block in (module.block_a, module.block_b):
            for norm in (block.cross.norm, *block.cross.source_norms.values()):
                norm.bias.zero_()
            block.cross.attn.query.proj.weight[:, loud] = 1e5
            for projection in block.cross.attn.key_value.values():
                projection.proj.weight[:, loud] = 1e5
    a, b = (x.double() for x in make_pair(2))
    for x in (a, b):
        x[0] -= x[0].mean(-1, keepdim=True)
        x[0, :, loud + 1] += x[0, :, loud]
        x[0, :, loud] = 0.0
        x[0] = x[0].mul(2**10).round().div(2**10)  # dyadic, so that the mean the norm takes off is exactly 0
        x[0, :, -1] = -x[0, :, :-1].sum(-1)
        x[1, :, loud] = 10.0
    a, b = a.requires_grad_(), b.requires_grad_()
    views = gather_modalities({"b": b}, {"b": 12})
    cross = module.block_a.cross
    key, _ = cross.attn.key_value["b"](cross.source_norms["b"](views["b"].tokens))
    logits = cross.attn.query(cross.norm(a)) @ key.mT
    assert logits[0].abs().max() < 100 and logits[1].abs().max() > 1e9

    together = module(a, b)
    weighted(*(x[0] for x in together)).backward()
    grads_together = a.grad[0].clone(), b.grad[0].clone()
    assert (a.grad[1] == 0).all() and (b.grad[1] == 0).all() and together[0].isfinite().all()
    a.grad = b.grad = None
    alone = module(a[:1], b[:1])
    weighted(*(x[0] for x in alone)).backward()
    torch.testing.assert_close([x[0] for x in together], [x[0] for x in alone])
    torch.testing.assert_close(grads_together, (a.grad[0], b.grad[0]))


@every_fusion
def test_keys_are_never_concatenated(case, monkeypatch):
    """Perceiver, Flamingo and MM-DiT implementations copy every source's keys and values into one tensor. (A
    backend may widen the last dimension, which joins no tokens.)
    """
    joined, cat = [], torch.cat

    def watched(tensors, dim=0, **options):
        joined.append(dim % tensors[0].dim() != tensors[0].dim() - 1)
        return cat(tensors, dim, **options)

    module, inputs = make(case), make_inputs()
    monkeypatch.setattr(torch, "cat", watched)
    monkeypatch.setattr(torch, "concat", watched)
    loss_of(module(inputs, {"text": torch.tensor([7, 3, 0])})).backward()
    assert not any(joined)


# in use


SMALL = {"text": 6, "audio": 4}  # compiling takes its time
COMPILED = {
    "crossmodal": lambda: CrossmodalTransformer(SMALL, E, HEADS, 1),
    "qformer": lambda: QFormer(SMALL, E, HEADS, 1, num_queries=3),
    "co-attention": lambda: CoAttentionBlock(8, 12, HEADS, self_attention=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPILED)
def test_compiles_into_one_graph(case):
    module = shaken(COMPILED[case]())
    if case == "co-attention":
        arguments = (*make_pair(), None, torch.tensor([9, 4, 0]), torch.tensor([True, False, True]))
    else:
        inputs = {name: make_inputs()[name] for name in SMALL}
        present = torch.tensor([[True, True], [True, False], [False, False]])
        arguments = (inputs, {"text": torch.tensor([7, 3, 5])}, present)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    seen = []
    for call in (module, compiled):
        module.zero_grad()
        output = call(*arguments)
        total = weighted(*output) if case == "co-attention" else loss_of(output)
        total.backward()
        seen.append([output, [grad.clone() for grad in gradients(module)]])
    torch.testing.assert_close(seen[1], seen[0])


@every_co_attention
def test_co_attention_under_autocast_stays_within_twice_the_error_of_bfloat16(case):
    module, (a, b) = make(case), make_pair()
    rest = (None, torch.tensor([9, 4, 0]), torch.tensor([True, True, False]))
    exact = copy.deepcopy(module).double()(a.double(), b.double(), *rest)
    low = copy.deepcopy(module).bfloat16()(a.bfloat16(), b.bfloat16(), *rest)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(a, b, *rest)
    weighted(*output).backward()
    assert all(grad.isfinite().all() for grad in gradients(module))
    for actual, lower, true in zip(output, low, exact, strict=True):
        budget = 2 * (lower.double() - true).abs().max() + torch.finfo(torch.bfloat16).eps * true.abs().max()
        assert (actual.double() - true).abs().max() <= budget


def test_dropout_is_of_training_only():
    a, b = make_pair()
    module = CoAttentionBlock(8, 12, HEADS, dropout=0.5, self_attention=True)
    assert not torch.equal(module(a, b)[0], module(a, b)[0])
    module.eval()
    assert torch.equal(module(a, b)[0], module(a, b)[0])
