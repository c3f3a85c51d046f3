"""attnfuse.integrations.torch, and the torch ecosystem around the operators (docs/integrations_torch.md)."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import varlen
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import attnfuse
from attnfuse import AuxRequest, Source, flops
from attnfuse.backends import aten, triton
from attnfuse.integrations import flash_attention
from attnfuse.integrations import torch as integration
from attnfuse.integrations.torch import jagged_attention, patch_sdpa, replace_attention
from attnfuse.nn import MultiheadAttention
from attnfuse.testing import difference, size

TORCHS_OWN = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch):
    """How often the CPU backend ran: {"forward": n, "backward": n}."""
    counted = {"forward": 0, "backward": 0}

    def count(name):
        original = getattr(aten, name)

        def wrapped(*args):
            counted[name] += 1
            return original(*args)

        monkeypatch.setattr(aten, name, wrapped)

    count("forward")
    count("backward")
    return counted


def assert_within_budget(ours, theirs, exact, dtype):
    """error(ours) <= 2 error(theirs, in the same dtype) + one rounding, both against float64."""
    budget = 2 * difference(theirs.double(), exact) + torch.finfo(dtype).eps * size(exact)
    assert difference(ours.double(), exact) <= budget


def qkv(*shape, dtype=torch.float32, grad=True):
    return [torch.randn(*shape, dtype=dtype, requires_grad=grad) for _ in range(3)]


# torch.nn.attention's registry of flash attention implementations


def test_importing_registers_a_name_and_activates_nothing():
    assert "attnfuse" in torch.nn.attention.list_flash_attention_impls()
    assert torch.nn.attention.current_flash_attention_impl() is None


def test_activation_puts_all_five_kernels_in_place_and_restoring_takes_them_out():
    names = list(flash_attention.FlashAttention().operators())
    assert len(names) == 5

    def ours():
        return ["flash_attention.py" in torch._C._dispatch_dump(f"aten::{name}") for name in names]

    assert ours() == [False] * 5
    torch.nn.attention.activate_flash_attention_impl("attnfuse")
    try:
        assert torch.nn.attention.current_flash_attention_impl() == "attnfuse"
        assert ours() == [True] * 5
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert ours() == [False] * 5


def test_activation_needs_a_gpu_backend(monkeypatch):
    monkeypatch.setattr(triton, "available", lambda: "triton is not installed")
    monkeypatch.setattr("attnfuse.backends.cuda.available", lambda: "the extension is not built")
    with pytest.raises(RuntimeError, match=r"cuda: the extension is not built; triton: triton is not installed"):
        torch.nn.attention.activate_flash_attention_impl("attnfuse")


@pytest.mark.parametrize("name", list(flash_attention.FlashAttention().operators()))
def test_each_operators_signature_is_torchs_schema(name):
    function = flash_attention.FlashAttention().operators()[name]
    function = flash_attention.FlashAttention().flash_forward if name.endswith("inplace") else function
    schema = getattr(torch.ops.aten, name).default._schema.arguments
    schema = schema[1:] if name.endswith("inplace") else schema  # `out` comes first there, the rest is flash_forward's
    ours = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    takes_others = len(ours) < len(inspect.signature(function).parameters)
    theirs = [(x.name, x.kwarg_only) for x in schema]
    found = [(p.name, p.kind is p.KEYWORD_ONLY) for p in ours]
    assert found == theirs[: len(found)]
    # What a newer torch adds is refused by name, unless it is None.
    rest = schema[len(found) :]
    assert not rest or (takes_others and all(x.kwarg_only and x.default_value is None for x in rest))


@pytest.fixture
def on_cpu():
    """This package's five operators as the CPU kernels, where torch has none: its autograd formulas then call them."""
    handle = flash_attention.put_in_place(flash_attention.FlashAttention("triton"), "CPU")
    yield
    handle.remove()
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_dot_product_flash_attention", "CPU")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, heads, causal", [(9, 4, False), (9, 4, True), (6, 2, True), (9, 2, False)])
def test_sdpas_flash_operator_with_torchs_own_autograd(on_cpu, rows, heads, causal, dtype):
    query = torch.randn(2, rows, 4, 16, dtype=dtype).transpose(1, 2)  # (B, N, H, D) in memory
    key, value = (torch.randn(2, heads, 9, 16, dtype=dtype) for _ in range(2))
    grad = torch.randn(2, 4, rows, 16)

    def run(function, dtype):
        tensors = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        out = function(*tensors)
        return [out, *torch.autograd.grad(out, tensors, grad.to(dtype))]

    def flash(q, k, v):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=0.3)
        assert lse.shape == q.shape[:3] and lse.dtype == torch.float32
        return out

    def sdpa(q, k, v):
        mask = torch.ones(rows, 9, dtype=torch.bool).tril(9 - rows) if causal else None  # aligned to the lower right
        return TORCHS_OWN(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)

    ours, theirs, exact = run(flash, dtype), run(sdpa, dtype), run(sdpa, torch.float64)
    assert ours[0].stride() == query.stride()
    for a, b, c in zip(ours, theirs, exact):
        assert_within_budget(a, b, c, dtype)


def test_the_flash_operators_backward_drops_what_its_forward_dropped(on_cpu):
    tensors = qkv(2, 2, 7, 16)
    torch.manual_seed(5)
    out = torch.ops.aten._scaled_dot_product_flash_attention(*tensors, 0.5)[0]
    torch.manual_seed(5)
    expected = attnfuse.attention(*tensors, dropout_p=0.5, backend="triton")
    torch.testing.assert_close(out, expected)
    assert not torch.equal(out, attnfuse.attention(*tensors, backend="triton"))
    grad = torch.randn_like(out)
    state = torch.random.get_rng_state()
    for a, b in zip(torch.autograd.grad(out, tensors, grad), torch.autograd.grad(expected, tensors, grad)):
        torch.testing.assert_close(a, b)
    assert torch.equal(torch.random.get_rng_state(), state), "the backward drew a seed of its own"


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 1)])
def test_torchs_varlen_attn_runs_on_the_packed_operators(on_cpu, window):
    query, key, value = (torch.randn(12, 2, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 12], [0, 7, 12]))
    if window == (-1, 0):
        cu_k = cu_q

    def run(function, dtype):
        tensors = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
        out = function(*tensors, cu_q, cu_k, 7, 7, window_size=window)
        return [out, *torch.autograd.grad(out.float().sin().sum(), tensors)]

    reference = partial(attnfuse.varlen_attention, backend="reference")
    ours = run(varlen.varlen_attn, torch.bfloat16)
    for a, b, c in zip(ours, run(reference, torch.bfloat16), run(reference, torch.float64)):
        assert_within_budget(a, b, c, torch.bfloat16)


def test_the_operator_that_writes_in_place(on_cpu):
    q, k, v = (torch.randn(2, 5, 2, 16) for _ in range(3))
    out = torch.full_like(q, float("nan"))
    arguments = (q, k, v, None, None, 5, 5, 0.0, True, False)
    lse = torch.ops.aten._flash_attention_forward_no_dropout_inplace(out, *arguments)
    expected, expected_lse, *_ = torch.ops.aten._flash_attention_forward(*arguments)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    theirs = TORCHS_OWN(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
    torch.testing.assert_close(expected, theirs)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"return_debug_mask": True}, "does not serve return_debug_mask, got True"),
        ({"block_table": torch.zeros(1)}, "does not serve block_table"),
        ({"num_splits": 4}, "does not serve num_splits, got 4"),
        ({"seqused_k": torch.zeros(2)}, "does not serve seqused_k without cum_seq_q"),
        ({"cum_seq_q": torch.tensor([0, 5]), "dropout_p": 0.1}, "does not serve dropout_p with packed sequences"),
    ],
)
def test_what_the_flash_operators_do_not_serve_is_named(change, words):
    x = torch.randn(2, 5, 2, 16)
    given = {
        "query": x, "key": x, "value": x, "cum_seq_q": None, "cum_seq_k": None, "max_q": 5, "max_k": 5,
        "dropout_p": 0.0, "is_causal": False, "return_debug_mask": False, "block_table": None, "num_splits": 1,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=words):
        flash_attention.FlashAttention("triton").flash_forward(**(given | change))


def test_a_call_only_the_reference_could_run_is_refused():
    x = torch.randn(1, 1, 3, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"no kernel with a backward for this call: .*triton: .*float64"):
        flash_attention.FlashAttention("reference").sdpa_forward(x, x, x)


@pytest.mark.cuda
def test_sdpa_on_a_gpu_runs_these_kernels_once_activated(monkeypatch):
    ran = []
    original = flash_attention.FlashAttention._module
    monkeypatch.setattr(flash_attention.FlashAttention, "_module", lambda self, p: ran.append(p) or original(self, p))
    tensors = [x.cuda().bfloat16().requires_grad_() for x in qkv(2, 4, 64, 64, grad=False)]
    torch.nn.attention.activate_flash_attention_impl("attnfuse")
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(*tensors, is_causal=True)
            torch.autograd.grad(out.sum(), tensors)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert len(ran) == 2
    exact = TORCHS_OWN(*(x.double() for x in tensors), is_causal=True)
    assert_within_budget(out, TORCHS_OWN(*tensors, is_causal=True), exact, torch.bfloat16)


# patch_sdpa


def test_patch_serves_within_the_block_alone(calls):
    tensors = qkv(2, 2, 5, 8)
    mask = torch.rand(5, 5) < 0.5

    def run():
        masked = F.scaled_dot_product_attention(*tensors, mask)
        return masked, F.scaled_dot_product_attention(*tensors, is_causal=True)

    expected = run()
    assert calls["forward"] == 0
    with patch_sdpa() as patch:
        found = run()
    assert calls["forward"] == patch.served == 2 and not patch.passed
    torch.testing.assert_close(found, expected)
    assert F.scaled_dot_product_attention is TORCHS_OWN


def test_patch_is_taken_back_after_an_exception():
    with pytest.raises(KeyError), patch_sdpa():
        raise KeyError
    assert F.scaled_dot_product_attention is TORCHS_OWN
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_innermost_patch_serves(calls):
    x = qkv(1, 1, 3, 8, grad=False)
    with patch_sdpa() as outer:
        with patch_sdpa(backend="reference") as inner:
            F.scaled_dot_product_attention(*x)
        assert (outer.served, inner.served, calls["forward"]) == (0, 1, 0)
        F.scaled_dot_product_attention(*x)
    assert (outer.served, inner.served, calls["forward"]) == (1, 1, 1)


def test_patches_of_two_threads_may_end_in_any_order():
    """B enters after A and leaves after it: what A's exit restored must not be undone by B's."""
    x = qkv(1, 1, 3, 8, grad=False)
    entered, a_is_out = threading.Event(), threading.Event()
    seen = {}

    def b():
        with patch_sdpa(backend="reference") as patch:
            entered.set()
            a_is_out.wait(60)
            F.scaled_dot_product_attention(*x)
            seen["b"] = patch.served

    thread = threading.Thread(target=b)
    with patch_sdpa():
        thread.start()
        entered.wait(60)
    assert F.scaled_dot_product_attention is not TORCHS_OWN
    a_is_out.set()
    thread.join()
    assert seen == {"b": 1}
    assert F.scaled_dot_product_attention is TORCHS_OWN


def test_replicas_in_threads_are_served_too():
    """nn.DataParallel runs each replica in a thread of its own."""
    layer = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(8, 5, 16)
    expected = layer(x, x, x, need_weights=False)[0]
    results = {}

    def run(n, module):
        part = x[2 * n : 2 * n + 2]
        for _ in range(20):
            results[n] = module(part, part, part, need_weights=False)[0]

    def together(modules):
        results.clear()
        threads = [threading.Thread(target=run, args=(n, m)) for n, m in enumerate(modules)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        torch.testing.assert_close(torch.cat([results[n] for n in range(4)]), expected)

    with patch_sdpa() as patch:
        together([copy.deepcopy(layer) for _ in range(4)])
    assert patch.served == 80
    replace_attention(layer)
    together([layer] * 4)


def test_somebody_elses_patch_on_top_stays(monkeypatch):
    x = qkv(1, 1, 3, 8, grad=False)
    with patch_sdpa() as patch:
        beneath = F.scaled_dot_product_attention
        theirs = lambda *args: beneath(*args) * 2  # noqa: E731
        monkeypatch.setattr(F, "scaled_dot_product_attention", theirs)
        F.scaled_dot_product_attention(*x)
    assert F.scaled_dot_product_attention is theirs
    assert patch.served == 1
    torch.testing.assert_close(theirs(*x), 2 * TORCHS_OWN(*x))
    assert patch.served == 1 and torch.backends.mha.get_fastpath_enabled()
    monkeypatch.setattr(F, "scaled_dot_product_attention", beneath)  # they take theirs back: ours still lies beneath
    torch.testing.assert_close(F.scaled_dot_product_attention(*x), TORCHS_OWN(*x))
    with patch_sdpa() as patch:
        F.scaled_dot_product_attention(*x)
    assert patch.served == 1 and F.scaled_dot_product_attention is TORCHS_OWN


@pytest.mark.parametrize(
    "change",
    [
        {"key": torch.randn(2, 2, 5, 7)},
        {"query": torch.randn(5)},
        {"value": torch.randn(2, 2, 5, 8, dtype=torch.float64)},
        {"attn_mask": torch.ones(5, 5, dtype=torch.int64)},
    ],
    ids=lambda change: "-".join(change),
)
def test_errors_are_torchs_in_type_and_words(change):
    given = dict(zip(("query", "key", "value"), qkv(2, 2, 5, 8))) | change
    with pytest.raises(Exception) as theirs:
        F.scaled_dot_product_attention(**given)
    with patch_sdpa(), pytest.raises(Exception) as ours:
        F.scaled_dot_product_attention(**given)
    assert ours.type is theirs.type
    assert str(theirs.value).splitlines()[0] in str(ours.value)


def test_a_call_that_is_not_served_raises_or_is_passed_on_as_asked():
    x = qkv(1, 1, 3, 300, grad=False)
    with patch_sdpa(), pytest.raises(ValueError, match="query's head dim must be 1 to 256, got 300"):
        F.scaled_dot_product_attention(*x)
    with patch_sdpa(unsupported="torch") as patch:
        torch.testing.assert_close(F.scaled_dot_product_attention(*x), TORCHS_OWN(*x))
        F.scaled_dot_product_attention(*qkv(1, 1, 3, 8))
    assert patch.served == 1
    assert list(patch.passed.values()) == [1] and "head dim" in next(iter(patch.passed))
    with pytest.raises(ValueError, match="unsupported must be 'raise' or 'torch', got 'ignore'"):
        patch_sdpa(unsupported="ignore").__enter__()


class Wrapped(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_tensor_subclasses_are_refused_by_name():
    x = torch.randn(1, 1, 3, 8)
    with patch_sdpa(), pytest.raises(TypeError, match="key must be a plain tensor, got the subclass Wrapped"):
        F.scaled_dot_product_attention(x, x.as_subclass(Wrapped), x)


def test_torchs_modules_are_reached_past_their_fused_inference_paths(calls):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        expected = model(x)
        assert calls["forward"] == 0
        with patch_sdpa() as patch:
            found = model(x)
    assert patch.served == calls["forward"] == 2
    torch.testing.assert_close(found, expected)


def test_patch_under_autocast_takes_its_dtype():
    x = qkv(2, 2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.scaled_dot_product_attention(*x)
        with patch_sdpa() as patch:
            found = F.scaled_dot_product_attention(*x)
    assert patch.served == 1 and found.dtype == expected.dtype == torch.bfloat16
    assert_within_budget(found, expected, TORCHS_OWN(*(t.double() for t in x)), torch.bfloat16)


def test_compiled_code_follows_the_patch(calls):
    """Code compiled before, inside and after a block runs what the block says at that moment."""
    compiled = torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 2, 5, 8)
    compiled(x)
    assert calls["forward"] == 0
    with patch_sdpa():
        torch.testing.assert_close(compiled(x), TORCHS_OWN(x, x, x))
        assert calls["forward"] == 1
    compiled(x)
    assert calls["forward"] == 1


# replace_attention


def transformer():
    return nn.Transformer(16, 2, 1, 2, 32, dropout=0.0, batch_first=True)


def test_replacing_keeps_outputs_gradients_parameters_and_names(calls):
    model = transformer()
    source, target = torch.randn(2, 5, 16), torch.randn(2, 6, 16)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    padding = torch.arange(5) >= torch.tensor([[5], [3]])

    def run():
        out = model(source, target, tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding)
        grads = torch.autograd.grad(out.square().sum(), list(model.parameters()))
        return out, *grads

    before, parameters, keys = run(), list(model.parameters()), list(model.state_dict())
    modules = list(model.modules())
    assert calls["forward"] == 0
    report = replace_attention(model)
    assert report.replaced == [
        "encoder.layers.0.self_attn",
        "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn",
        "decoder.layers.1.self_attn", "decoder.layers.1.multihead_attn",
    ]  # fmt: skip
    assert report.left == {}
    assert all(a is b for a, b in zip(model.parameters(), parameters)) and list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.modules(), modules))
    torch.testing.assert_close(run(), before)
    assert calls["forward"] == calls["backward"] == 5
    model.load_state_dict(transformer().state_dict())


def test_a_replaced_encoder_skips_the_fused_path_and_serves_its_nested_tensors(calls):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, padding = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [3], [1]])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        replace_attention(model)
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), expected)
    assert calls["forward"] == 2


def test_an_optimizer_and_hooks_from_before_go_on():
    layer = nn.MultiheadAttention(16, 2)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    seen = []
    layer.register_forward_hook(lambda *args: seen.append(1))
    layer.in_proj_bias.requires_grad_(False)
    assert replace_attention(layer).replaced == [""]
    x = torch.randn(3, 2, 16)
    before = layer.in_proj_weight.clone()
    layer(x, x, x)[0].sum().backward()
    optimizer.step()
    assert seen == [1] and layer.in_proj_bias.grad is None
    assert not torch.equal(layer.in_proj_weight, before)


class OwnAttention(nn.Module):
    pass


class Subclass(nn.MultiheadAttention):
    pass


def test_the_report_says_what_was_left_and_why():
    parametrized = nn.MultiheadAttention(16, 2)
    nn.utils.parametrize.register_parametrization(parametrized, "in_proj_weight", nn.Identity())
    model = nn.ModuleDict(
        {
            "torchs": nn.MultiheadAttention(16, 2), "wide": nn.MultiheadAttention(600, 2), "own": OwnAttention(),
            "subclass": Subclass(16, 2), "ours": MultiheadAttention(16, 2), "parametrized": parametrized,
        }
    )  # fmt: skip
    report = replace_attention(model, backend="reference")
    assert report.replaced == ["torchs"] and model["torchs"].backend == "reference"
    assert report.left == {
        "wide": "has head dim 300, attnfuse serves 1 to 256",
        "own": "is a OwnAttention, not an nn.MultiheadAttention: patch_sdpa serves what calls torch's attention "
        "function",
        "subclass": "is a Subclass, a subclass of nn.MultiheadAttention that may compute something else",
        "ours": "is attnfuse's already",
        "parametrized": "is a ParametrizedMultiheadAttention, a subclass of nn.MultiheadAttention that may compute "
        "something else",
    }
    assert type(model["wide"]) is nn.MultiheadAttention and type(model["subclass"]) is Subclass
    assert str(report).startswith("replaced 1: torchs\nleft wide: has head dim 300")


def test_adopting_anything_else_is_refused():
    with pytest.raises(TypeError, match=r"must be a plain nn\.MultiheadAttention, got Subclass"):
        MultiheadAttention.adopt(Subclass(16, 2))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_modules_can_be_copied(again, calls):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    replace_attention(model)
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        expected = model(x)
        twin = again(model)
        torch.testing.assert_close(twin(x), expected)
        assert calls["forward"] == 4
        assert all(a is not b for a, b in zip(model.parameters(), twin.parameters()))
        next(twin.parameters()).mul_(2)
        torch.testing.assert_close(model(x), expected)


# torch.compile and torch.export, of whole modules with the lengths left open


def test_a_compiled_encoder_does_not_recompile_for_each_length():
    torch._dynamo.reset()
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    replace_attention(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    parameters = list(model.parameters())
    for length in (5, 6, 7, 9, 12):
        x, padding = torch.randn(2, length, 16), torch.arange(length) >= torch.tensor([[length], [3]])
        found, expected = (run(x, src_key_padding_mask=padding) for run in (compiled, model))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            *(torch.autograd.grad(out.square().sum(), parameters) for out in (found, expected))
        )
    assert counter.frame_count == 2  # the first length, then any


def test_export_keeps_the_lengths_open_and_survives_a_file():
    model = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True).eval()
    replace_attention(model)
    rows, columns = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("columns", min=2, max=64)
    example = (torch.randn(2, 5, 16), torch.randn(2, 7, 16))
    program = torch.export.export(model, example, dynamic_shapes=({1: rows}, {1: columns}))
    assert "attnfuse.forward" in program.graph_module.print_readable(print_output=False)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n, m in ((5, 7), (3, 11)):
        given = torch.randn(2, n, 16), torch.randn(2, m, 16)
        torch.testing.assert_close(loaded(*given), model(*given))


# activation checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_computes_again_and_drops_the_same(reentrant, calls):
    tensors = qkv(2, 2, 5, 8)

    def block(q, k, v):
        hidden = attnfuse.attention(q, k, v, dropout_p=0.4, backend="triton")
        return attnfuse.attention(hidden, k, v)

    torch.manual_seed(3)
    expected = torch.autograd.grad(block(*tensors).square().sum(), tensors)
    before = calls["forward"]
    torch.manual_seed(3)
    leaves = [x.detach().requires_grad_() for x in tensors]
    checkpoint(block, *leaves, use_reentrant=reentrant).square().sum().backward()
    assert calls["forward"] - before == 2
    torch.testing.assert_close([x.grad for x in leaves], list(expected))


@pytest.mark.parametrize("policy, forwards", [(CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.MUST_RECOMPUTE, 2)])
def test_selective_checkpointing_can_keep_the_attention_and_recompute_the_rest(policy, forwards, calls):
    tensors = qkv(2, 2, 5, 8)

    def block(q, k, v):
        return attnfuse.attention(q.sin(), k.cos(), v).tanh()

    def choose(context, op, *args, **kwargs):
        return policy if op is torch.ops.attnfuse.forward.default else CheckpointPolicy.PREFER_RECOMPUTE

    expected = torch.autograd.grad(block(*tensors).sum(), tensors)
    calls["forward"] = 0
    contexts = partial(create_selective_checkpoint_contexts, choose)
    out = checkpoint(block, *tensors, use_reentrant=False, context_fn=contexts)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), tensors), expected)
    assert calls["forward"] == forwards


# FlopCounterMode, fake tensors


def test_flops_are_counted_as_torch_counts_its_own():
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 16)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    wide = [(2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 16)]
    forward = sdpa_flop_count(*wide)
    for backend in ("aten", "triton"):
        with FlopCounterMode(display=False) as counter:
            out = attnfuse.attention(*tensors, enable_gqa=True, backend=backend)
        assert counter.get_total_flops() == forward
        with FlopCounterMode(display=False) as counter:
            attnfuse.attention(*tensors, enable_gqa=True, backend=backend)
            out = attnfuse.multi_source_attention(q, [Source(k, v), Source(k, v)], enable_gqa=True, backend=backend)
            out.sum().backward()
        backward = sdpa_backward_flop_count((2, 4, 5, 16), *wide)
        assert counter.get_total_flops() == 3 * forward + 2 * backward


def test_a_counter_opened_before_the_first_call_counts_it_too(monkeypatch):
    """The formulas are registered with the first call under a counter, which has copied its table by then."""
    registry = sys.modules["torch.utils.flop_counter"].flop_registry
    for op in (torch.ops.attnfuse.forward, torch.ops.attnfuse.backward):
        monkeypatch.delitem(registry, op, raising=False)
    x = qkv(1, 2, 3, 8)
    with FlopCounterMode(display=False) as counter:
        attnfuse.attention(*x)
    assert counter.get_total_flops() == sdpa_flop_count(*[(1, 2, 3, 8)] * 3)
    assert registry[torch.ops.attnfuse.forward].__wrapped__ is flops.forward_flops


def test_fake_tensors_tell_shapes_and_read_no_numbers():
    with torch._subclasses.FakeTensorMode():
        q, k, v = qkv(2, 4, 5, 8)
        lengths = torch.tensor([5, 2])
        out, aux = attnfuse.attention(q, k, v, key_mask=lengths, return_aux=AuxRequest(lse=True))
        out.sum().backward()
        tokens = [x.flatten(0, 1)[:, :2] for x in (q, k, v)]
        packed = attnfuse.varlen_attention(*tokens, torch.tensor([0, 3, 8]), None, 5, 5)
    assert out.shape == q.grad.shape == q.shape
    assert aux.lse.shape == (2, 4, 5) and packed.shape == (8, 2, 8)


# torch.func

V, B, H, N = 3, 2, 2, 3  # the mapped dimension, then the problem's
NAMES = ("q", "k", "v", "bias", "mask", "lengths")


def several(q, k, v, bias, mask, lengths, backend):
    sources = [Source(k, v, mask=lengths, bias=bias), Source(k * 2, v, mask=mask)]
    out, aux = attnfuse.multi_source_attention(
        q, sources, enable_gqa=True, return_aux=AuxRequest(True, True), backend=backend
    )
    return out, aux.lse, aux.source_mass


def inputs_of_several(mapped):
    """query, key, value, bias, a float mask with a batch of 1, lengths; `mapped` names those that carry V in front."""
    shapes = [(B, H, N, 8), (B, 1, 6, 8), (B, 1, 6, 8), (B, H), (1, H, N, 6)]
    tensors = [torch.randn(*((V,) if n in mapped else ()), *shape) for n, shape in zip(NAMES, shapes)]
    lengths = torch.randint(0, 7, (V, B) if "lengths" in mapped else (B,))
    return [*tensors, lengths], tuple(0 if n in mapped else None for n in NAMES)


# The CPU backend has no gradient for a float mask; the interpreter that runs the other one on a CPU is slow.
MAPPED = [
    (("q", "k", "v"), "aten"), (("q", "lengths"), "aten"), (("bias",), "aten"), (NAMES, "aten"),
    (("k", "mask"), "triton"),
]  # fmt: skip


@pytest.mark.parametrize("mapped, backend", MAPPED)
def test_vmap_is_a_loop_in_one_call(mapped, backend, monkeypatch):
    given, dims = inputs_of_several(mapped)
    function = partial(several, backend=backend)
    each = [[x if d is None else x[n] for x, d in zip(given, dims)] for n in range(V)]
    expected = [torch.stack(x) for x in zip(*(function(*one) for one in each))]
    module = {"aten": aten, "triton": triton}[backend]
    ran, forward = [], module.forward
    monkeypatch.setattr(module, "forward", lambda problem: ran.append(1) or forward(problem))
    torch.testing.assert_close(list(torch.func.vmap(function, dims)(*given)), expected)
    assert len(ran) == 1


@pytest.mark.parametrize("mapped, backend", MAPPED)
def test_per_sample_gradients_and_gradients_of_a_map(mapped, backend):
    """vmap over grad, and grad over vmap, of every input that has a gradient, mapped or shared."""
    given, dims = inputs_of_several(mapped)
    count = 4 if backend == "aten" else 5
    argnums = tuple(range(count))

    def loss(*tensors):
        out, lse, mass = several(*tensors, backend)
        return out.sin().sum() + lse.masked_fill(lse == float("-inf"), 0.0).sum() + mass.square().sum()

    each = [[x if d is None else x[n] for x, d in zip(given, dims)] for n in range(V)]
    leaves = [[x.clone().requires_grad_() for x in one[:count]] for one in each]
    grads = [torch.autograd.grad(loss(*x, *one[count:]), x) for x, one in zip(leaves, each)]
    expected = [torch.stack(x) for x in zip(*grads)]
    found = torch.func.vmap(torch.func.grad(loss, argnums), dims)(*given)
    torch.testing.assert_close(list(found), expected)

    mapped_loss = torch.func.vmap(loss, dims)
    found = torch.func.grad(lambda *t: mapped_loss(*t, *given[count:]).sum(), argnums)(*given[:count])
    summed = [x if d == 0 else x.sum(0) for x, d in zip(expected, dims)]
    torch.testing.assert_close(list(found), summed)


def test_vmap_over_another_dimension_and_of_a_vmap(calls):
    q, k = torch.randn(B, H, 2, N, V, 8), torch.randn(B, H, N, V, 8)
    inner = torch.func.vmap(attnfuse.attention, (2, None, None))
    found = torch.func.vmap(inner, (4, 3, 3))(q, k, k)
    assert calls["forward"] == 1
    expected = torch.stack([
        torch.stack([attnfuse.attention(q[:, :, m, :, n], k[:, :, :, n], k[:, :, :, n]) for m in range(2)])
        for n in range(V)
    ])  # fmt: skip
    torch.testing.assert_close(found, expected)


def test_mapped_sinks_have_a_gradient_for_each():
    tensors, sinks = qkv(B, H, N, 8, grad=False), torch.randn(V, H)

    def loss(sinks, scale):
        return attnfuse.attention(tensors[0] * scale, *tensors[1:], sinks=sinks).sin().sum()

    leaves = [x.clone().requires_grad_() for x in sinks]
    expected = torch.stack([torch.autograd.grad(loss(x, 1.0), x)[0] for x in leaves])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss), (0, None))(sinks, 1.0), expected)
    # shared sinks, mapped queries: each element has its own gradient of them too
    scales = torch.tensor([1.0, 2.0, 0.5])
    leaf = sinks[0].clone().requires_grad_()
    expected = torch.stack([torch.autograd.grad(loss(leaf, s), leaf)[0] for s in scales])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss), (None, 0))(sinks[0], scales), expected)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmapped_dropout_obeys_its_randomness(randomness):
    x = torch.randn(1, 2, 6, 8)
    mapped = torch.func.vmap(
        lambda x: attnfuse.attention(x, x, x, dropout_p=0.5, backend="triton"), randomness=randomness
    )
    out = mapped(x.expand(2, *x.shape))
    assert torch.equal(out[0], out[1]) == (randomness == "same")


def test_functional_call_and_jacrev_of_a_module():
    model = MultiheadAttention(8, 2, batch_first=True)
    parameters = dict(model.named_parameters())
    x = torch.randn(4, 3, 8)

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],) * 3, {"need_weights": False})[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for n in range(4):
        expected = torch.autograd.grad(loss(parameters, x[n]), list(parameters.values()))
        torch.testing.assert_close([g[n] for g in found.values()], list(expected))

    q, k, v = qkv(1, 1, 2, 4, grad=False)
    theirs = torch.func.jacrev(lambda q: TORCHS_OWN(q, k, v))(q)
    torch.testing.assert_close(torch.func.jacrev(lambda q: attnfuse.attention(q, k, v))(q), theirs)


def test_forward_mode_is_the_references():
    q, k, v = (x.double() for x in qkv(1, 2, 4, 8, grad=False))
    tangent = torch.randn_like(q)

    def run(q, backend=None):
        return attnfuse.attention(q, k, v, is_causal=True, backend=backend)

    out, moved = torch.func.jvp(partial(run, backend="reference"), (q,), (tangent,))
    h = 1e-6
    torch.testing.assert_close(moved, (run(q + h * tangent) - run(q - h * tangent)) / (2 * h), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(out, run(q))
    hessian = torch.func.jacfwd(torch.func.grad(lambda q: run(q, "reference").sum()))(q)
    assert hessian.shape == (*q.shape, *q.shape)


@pytest.mark.parametrize("backend", ["aten", "triton"])
def test_forward_mode_elsewhere_is_refused_and_never_dropped(backend):
    """The Triton backend used to take a dual tensor and give back a result without its tangent."""
    q, k, v = qkv(1, 2, 4, 8, grad=False)
    run = partial(attnfuse.attention, key=k, value=v, backend=backend)
    sentence = f"backend '{backend}' has no forward-mode AD .*: pass backend='reference'"
    with pytest.raises(NotImplementedError, match=sentence):
        torch.func.jvp(run, (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        for x in (q, q.clone().requires_grad_()):
            with pytest.raises(NotImplementedError, match=sentence):
                run(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        torch.testing.assert_close(run(q), TORCHS_OWN(q, k, v))  # nothing dual in it
    with pytest.raises(NotImplementedError, match="has no second derivative: pass backend='reference'"):
        torch.func.grad(lambda q: torch.func.grad(lambda q: run(q).sum())(q).sum())(q)


# nested tensors


def nested(lengths, heads=2, grad=True):
    parts = [torch.randn(n, heads, 8) for n in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=grad)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_jagged_tensors(causal, patched, calls):
    q, k, v = (nested((3, 5, 1)) for _ in range(3))
    if causal:  # torch asks for the same lengths object
        again = torch.nested.nested_tensor_from_jagged
        k, v = (again(x.values().detach(), q.offsets()).requires_grad_() for x in (k, v))
    rows_first = [x.transpose(1, 2) for x in (q, k, v)]
    if patched:
        with patch_sdpa() as patch:
            out = F.scaled_dot_product_attention(*rows_first, is_causal=causal)
        assert patch.served == 1
    else:
        out = jagged_attention(*rows_first, is_causal=causal)
    assert calls["forward"] == 1 and out.shape == rows_first[0].shape
    grads = torch.autograd.grad(out.transpose(1, 2).values().sin().sum(), (q, k, v))
    for n in range(3):
        parts = [x.unbind()[n].detach().transpose(0, 1)[None].requires_grad_() for x in (q, k, v)]
        expected = TORCHS_OWN(*parts, is_causal=causal)
        torch.testing.assert_close(out.unbind()[n], expected[0])
        for grad, part in zip(grads, torch.autograd.grad(expected.sin().sum(), parts)):
            torch.testing.assert_close(grad.unbind()[n], part[0].transpose(0, 1))


def test_jagged_cross_attention_with_shared_heads():
    q, k, v = nested((3, 5), heads=4), nested((2, 6)), nested((2, 6))
    out = jagged_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True)
    for n in range(2):
        parts = [x.unbind()[n].transpose(0, 1)[None] for x in (q, k, v)]
        torch.testing.assert_close(out.unbind()[n], TORCHS_OWN(*parts, enable_gqa=True)[0])


def test_jagged_attention_refuses():
    rows_first, short = nested((3, 5)), nested((4, 4)).transpose(1, 2)
    good = rows_first.transpose(1, 2)
    dense = torch.randn(2, 2, 3, 8)
    with pytest.raises(TypeError, match=r"query must be a nested tensor of layout torch\.jagged, got Tensor"):
        jagged_attention(dense, dense, dense)
    with pytest.raises(ValueError, match=r"query must be \(B, H, j, D\) with j the ragged dimension"):
        jagged_attention(rows_first, rows_first, rows_first)
    with pytest.raises(ValueError, match="value must be ragged as key is"):
        jagged_attention(good, good, short)
    with pytest.raises(ValueError, match="needs query and key ragged alike"):
        jagged_attention(good, short, short, is_causal=True)


def test_strided_nested_tensors_and_masks_on_nested_ones_are_refused_under_a_patch():
    strided = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 5, 8)], layout=torch.strided)
    jagged = nested((3, 5)).transpose(1, 2)
    with patch_sdpa():
        with pytest.raises(TypeError, match=r"got a nested tensor of layout torch\.strided"):
            F.scaled_dot_product_attention(strided, strided, strided)
        with pytest.raises(ValueError, match="attn_mask must be None with nested tensors"):
            F.scaled_dot_product_attention(jagged, jagged, jagged, attn_mask=torch.ones(1))


# two processes: DDP, FSDP2, context parallelism


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each check of ranks.py reported on both ranks."""
    file = tmp_path_factory.mktemp("ranks") / "store"
    script = Path(__file__).with_name("ranks.py")
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), file], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(2)
    ]
    try:
        logs = [rank.communicate(timeout=900)[0].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(logs)
    return [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(2)]


RANK_CHECKS = ["ddp", "fsdp2", "plain", "causal", "masked", "uneven causal", "empty shard", "disagreement"]


@pytest.mark.parametrize("check", RANK_CHECKS)
def test_two_processes_equal_one(check, two_ranks):
    for rank, report in enumerate(two_ranks):
        assert list(report) == RANK_CHECKS
        assert report[check] == "passed", f"rank {rank}: {report[check]}"


def test_context_parallelism_says_what_it_needs():
    x = torch.randn(1, 1, 3, 8)
    with pytest.raises(RuntimeError, match="call init_process_group first"):
        integration.context_parallel_attention(x, x, x)


# streams


@pytest.mark.cuda
def test_calls_run_on_the_current_stream():
    """A call on a side stream must wait for what that stream wrote, not for the default one."""
    q, k, v = (x.cuda() for x in qkv(2, 4, 256, 64, grad=False))
    expected = attnfuse.attention(q, k, v)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(q)
        torch.cuda._sleep(50_000_000)
        late.copy_(q)
        out = attnfuse.attention(late, k, v)
    stream.synchronize()
    torch.testing.assert_close(out, expected)
