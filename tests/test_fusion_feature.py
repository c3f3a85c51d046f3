"""Feature-level fusion: what each module computes, and the failures of other libraries that it must not repeat."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from inside import Inside

from attnfuse.fusion.feature import FiLM, GatedMultimodalUnit, SumFusion
from attnfuse.fusion.pool import AttentionPoolFusion
from attnfuse.fusion.tensor import LowRankTensorFusion, TensorFusion

B, E = 4, 8
DIMS = {"text": 6, "image": 5, "audio": 3}
NAMES = list(DIMS)
PRESENT = torch.tensor([[True, True, True], [True, True, False], [False, True, False], [False, False, False]])

BUILD = {
    "sum": lambda: SumFusion(DIMS, E),
    "sum-mean": lambda: SumFusion(DIMS, E, reduction="mean"),
    "gated": lambda: GatedMultimodalUnit(DIMS, E),
    "tensor": lambda: TensorFusion(DIMS),
    "tensor-projected": lambda: TensorFusion(DIMS, E),
    "low-rank": lambda: LowRankTensorFusion(DIMS, E, 3),
    "pool": lambda: AttentionPoolFusion(DIMS, E, 2),
    "pool-many": lambda: AttentionPoolFusion(DIMS, E, 4, 3, num_kv_heads=2, qk_norm=True),
}
every = pytest.mark.parametrize("case", BUILD)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def stirred(module):
    """Zero biases and equal gates would let mistakes pass."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def make(case):
    return stirred(BUILD[case]())


def make_inputs(batch=B):
    """text and audio are tokens, image is one vector."""
    return {
        "text": torch.randn(batch, 7, 6), "image": torch.randn(batch, 5), "audio": torch.randn(batch, 9, 3)
    }  # fmt: skip


def pooled(inputs):
    return {name: x.mean(1) if x.dim() == 3 else x for name, x in inputs.items()}


def loss_of(output):
    """A loss that reads everything the module returns."""
    parts = [output.fused, *output.per_modality.values()]
    if output.source_mass is not None:
        parts.append(output.source_mass)
    return sum((part * torch.linspace(-1, 2, part.numel()).view(part.shape)).sum() for part in parts)


# every module


@every
def test_a_missing_key_is_an_absent_modality_and_not_an_error(case):
    """The fusion modules of TorchMultimodal index the dict by the names they were built with: a sample without
    audio is a KeyError there. Here it is the same as audio that `present` calls absent, whatever it holds."""
    module, inputs = make(case), make_inputs()
    missing = module({name: inputs[name] for name in ("image", "text")})
    for poison in (0.0, math.nan, math.inf):
        absent = inputs | {"audio": torch.full_like(inputs["audio"], poison).requires_grad_()}
        output = module(absent, present={"audio": torch.zeros(B, dtype=torch.bool)})
        for actual, expected in zip(output, missing):
            if not isinstance(actual, dict):
                torch.testing.assert_close(actual, expected)
        assert not output.per_modality["audio"].any()
        module.zero_grad()
        loss_of(output).backward()
        assert not absent["audio"].grad.any()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert ".audio." not in name or not parameter.grad.any(), name
    assert not torch.allclose(module(inputs).fused, missing.fused, atol=1e-4)


@every
def test_padding_and_absence_leave_what_the_rest_of_the_sample_makes(case):
    """GroundingDINO's bi-attention subtracts a maximum over the batch, so that samples influence one another.
    Here a sample by itself, cut to its real tokens and modalities, is what it was in the batch."""
    module, inputs = make(case), make_inputs()
    lengths = torch.tensor([7, 3, 1, 0])
    text = inputs["text"].masked_fill(torch.arange(7)[:, None] >= lengths[:, None, None], math.nan).requires_grad_()
    output = module(inputs | {"text": text}, {"text": lengths}, PRESENT)
    loss_of(output).backward()
    assert text.grad.isfinite().all() and text.grad[0].any() and not text.grad[2:].any()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    for b in range(B):
        alone = {name: inputs[name][b : b + 1] for s, name in enumerate(NAMES) if PRESENT[b, s]}
        if "text" in alone:
            alone["text"] = alone["text"][:, : lengths[b]]
        torch.testing.assert_close(module(alone, present=PRESENT[b : b + 1]).fused, output.fused[b : b + 1])


def neutral(case, module):
    """What the docstrings promise when all is absent."""
    if case == "tensor":
        return F.one_hot(torch.tensor(0), module.out_dim).float()
    if case == "tensor-projected":
        return module.proj.bias + module.proj.weight[:, 0]
    if case == "low-rank":
        return module.bias + module.weight.sum(0)
    if case.startswith("pool"):
        return module.norm(module.attention.out_proj.bias)
    return torch.zeros(E)


@every
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_all_absent_gives_the_neutral_output(case):
    """nn.MultiheadAttention answers a row without any key with NaN, and so does a softmax over no gates."""
    module = make(case)
    nobody = torch.zeros(B, 3, dtype=torch.bool)
    inputs = {name: torch.full_like(x, math.nan).requires_grad_() for name, x in make_inputs().items()}
    with torch.autograd.detect_anomaly(check_nan=True):  # not even a gradient on the way may be NaN
        output = module(inputs, present=nobody)
        loss_of(output).backward()
    torch.testing.assert_close(output.fused, neutral(case, module).expand(B, -1))
    torch.testing.assert_close(module({}, present=nobody).fused, output.fused)
    assert output.source_mass is None or not output.source_mass.any()
    assert not any(x.grad.any() for x in inputs.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@every
def test_autocast_stays_within_twice_the_error_of_bfloat16(case):
    module, inputs = make(case), make_inputs()
    low = {name: x.bfloat16() for name, x in inputs.items()}
    exact = copy.deepcopy(module).double()({name: x.double() for name, x in inputs.items()}, present=PRESENT).fused
    plain = copy.deepcopy(module).bfloat16()(low, present=PRESENT).fused
    assert plain.dtype == torch.bfloat16  # what the next layer of a bfloat16 model takes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(inputs | {"text": inputs["text"].requires_grad_()}, present=PRESENT)
    budget = 2 * (plain.double() - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (output.fused.double() - exact).abs().max() <= budget
    loss_of(output).backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@every
def test_compiles_without_a_graph_break(case):
    torch.compiler.reset()
    module, inputs = make(case), make_inputs()
    masks = {"text": torch.tensor([7, 3, 1, 5])}
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    eager = module(inputs, masks, PRESENT)
    traced = compiled(inputs, masks, PRESENT)
    torch.testing.assert_close(traced.fused, eager.fused)
    torch.testing.assert_close(traced.source_mass, eager.source_mass)
    parameters = list(module.parameters())
    if parameters:
        grads = (torch.autograd.grad(loss_of(output), parameters) for output in (traced, eager))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("error", "message", "build"), [
    (ValueError, "reduction must be 'sum' or 'mean', got 'max'", lambda: SumFusion(DIMS, E, reduction="max")),
    (ValueError, "out_dim must be positive, got 0", lambda: SumFusion(DIMS, 0)),
    (ValueError, "out_dim must be positive, got -1", lambda: GatedMultimodalUnit(DIMS, -1)),
    (ValueError, "out_dim must be positive or None, got 0", lambda: TensorFusion(DIMS, 0)),
    (ValueError, "out_dim must be positive, got 0", lambda: LowRankTensorFusion(DIMS, 0, 2)),
    (ValueError, "rank must be positive, got 0", lambda: LowRankTensorFusion(DIMS, E, 0)),
    (ValueError, "num_queries must be positive, got 0", lambda: AttentionPoolFusion(DIMS, E, 2, 0)),
    (ValueError, "embed_dim must be divisible by num_heads", lambda: AttentionPoolFusion(DIMS, E, 3)),
    (TypeError, "dims must be a dict", lambda: TensorFusion([6, 5])),
    (ValueError, "dim must be positive, got 0", lambda: FiLM(0, 3)),
    (ValueError, "cond_dim must be positive, got 0", lambda: FiLM(3, 0)),
])  # fmt: skip
def test_a_bad_constructor_argument_is_named(error, message, build):
    with pytest.raises(error, match=message):
        build()


# what each one computes


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_sum_fusion_adds_up_who_is_there_with_their_biases(reduction):
    module, inputs = stirred(SumFusion(DIMS, E, reduction=reduction)), make_inputs()
    output = module(inputs, present=PRESENT)
    parts = torch.stack([module.proj[name](x) for name, x in pooled(inputs).items()], 1)
    for b in range(B - 1):
        here = parts[b, PRESENT[b]]
        torch.testing.assert_close(output.fused[b], here.sum(0) if reduction == "sum" else here.mean(0))
    assert not output.fused[-1].any()


def test_the_gates_of_two_modalities_are_the_papers_sigmoid():
    """h = z * tanh(W_1 x_1) + (1 - z) * tanh(W_2 x_2) with z = sigmoid(W_z [x_1, x_2])."""
    dims = {"text": 6, "image": 5}
    module, inputs = stirred(GatedMultimodalUnit(dims, E)), make_inputs()
    del inputs["audio"]
    x = pooled(inputs)
    weight = torch.cat([module.gates.slots[name].weight for name in dims], 1)
    bias = module.gates.bias
    z = torch.sigmoid(F.linear(torch.cat(list(x.values()), 1), weight[:E] - weight[E:], bias[:E] - bias[E:]))
    text, image = (torch.tanh(module.hidden[name](x[name])) for name in dims)
    output = module(inputs)
    torch.testing.assert_close(output.fused, z * text + (1 - z) * image)
    torch.testing.assert_close(output.source_mass, torch.stack([z.mean(1), 1 - z.mean(1)], 1))
    torch.testing.assert_close(output.per_modality, {"text": text, "image": image})


def test_gates_are_shared_by_the_present_only():
    module, inputs = make("gated"), make_inputs()
    output = module(inputs, present=PRESENT)
    torch.testing.assert_close(output.source_mass.sum(1), PRESENT.any(1).float())
    assert torch.equal(output.source_mass > 0, PRESENT)
    alone = torch.tanh(module.hidden["image"](inputs["image"]))[2]  # the only one there: no gate holds it back
    torch.testing.assert_close(output.fused[2], alone)


def test_the_shares_of_the_gates_can_be_trained():
    module, inputs = make("gated"), make_inputs()
    module(inputs).source_mass[:, 0].sum().backward()
    assert module.gates.slots["audio"].weight.grad.any()


def test_tensor_fusion_is_the_outer_product_and_an_absent_modality_its_one():
    module, inputs = TensorFusion(DIMS), make_inputs()
    assert module.out_dim == 7 * 6 * 4 and not list(module.parameters())
    x = pooled(inputs)
    fused = module(inputs, present=PRESENT).fused
    for b in range(B):
        parts = [
            torch.tensor([1.0, *(x[name][b] if PRESENT[b, s] else torch.zeros(dim)).tolist()])
            for s, (name, dim) in enumerate(DIMS.items())
        ]
        torch.testing.assert_close(fused[b], torch.einsum("i,j,k->ijk", *parts).flatten())
    # without audio, what is left is the fusion of the other two
    two = TensorFusion({"text": 6, "image": 5})({name: inputs[name] for name in ("text", "image")}).fused
    torch.testing.assert_close(module(inputs, present=PRESENT).fused[1].view(7, 6, 4)[..., 0].flatten(), two[1])


def test_low_rank_fusion_is_tensor_fusion_with_a_weight_of_low_rank():
    """Also where modalities are absent: both then have a 1 in their place."""
    rank = 3
    low, full, inputs = stirred(LowRankTensorFusion(DIMS, E, rank)), TensorFusion(DIMS, E), make_inputs()
    factors = [F.pad(low.factors[name].weight.view(rank, E, dim), (1, 0), value=1.0) for name, dim in DIMS.items()]
    with torch.no_grad():
        full.proj.weight.copy_(torch.einsum("re,rei,rej,rek->eijk", low.weight, *factors).flatten(1))
        full.proj.bias.copy_(low.bias)
    output = low(inputs, present=PRESENT)
    torch.testing.assert_close(output.fused, full(inputs, present=PRESENT).fused)
    # one modality alone: the constant and its own part
    alone = low({"image": inputs["image"]})
    torch.testing.assert_close(alone.fused, low.bias + low.weight.sum(0) + alone.per_modality["image"])


def test_the_factors_of_low_rank_fusion_are_trained_moved_and_saved():
    """MultiBench's LowRankTensorFusion, and PyKale's after it, keep the factors in a plain Python list. nn.Module
    does not look into lists: the optimizer never sees them, .to() leaves them behind and state_dict does not hold
    them. Training goes on around factors that stay as they were drawn, a loaded checkpoint meets others, drawn
    anew, and nothing raises."""
    module, inputs = LowRankTensorFusion(DIMS, E, 2), make_inputs()
    assert {f"factors.{name}.weight" for name in NAMES} <= set(module.state_dict())
    before = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(inputs).fused.square().sum().backward()
    optimizer.step()
    for name, value in module.state_dict().items():
        assert not torch.equal(value, before[name]), f"{name} was not trained"
    restored = LowRankTensorFusion(DIMS, E, 2)
    restored.load_state_dict(module.state_dict())
    assert torch.equal(restored(inputs).fused, module(inputs).fused)
    wide = module.double()({name: x.double() for name, x in inputs.items()}).fused
    assert wide.dtype == torch.float64


def test_low_rank_fusion_learns_a_product_that_no_sum_can():
    """The target is the product of one feature of each modality; it is 0 on average for either of them alone."""
    dims = {"a": 2, "b": 2}
    x = {name: torch.randn(256, 2) for name in dims}
    target = (x["a"][:, :1] * x["b"][:, :1]).detach()
    errors = {}
    for name, module in (("low-rank", LowRankTensorFusion(dims, 1, 4)), ("sum", SumFusion(dims, 1))):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for _ in range(150):
            optimizer.zero_grad()
            error = F.mse_loss(module(x).fused, target)
            error.backward()
            optimizer.step()
        errors[name] = error.item() / target.var().item()
    assert errors["low-rank"] < 0.05 < 0.8 < errors["sum"]


# pooling by attention


def test_attention_pool_is_attention_over_all_tokens_at_once():
    """By hand, with the concatenation that the module avoids."""
    module, inputs = stirred(AttentionPoolFusion(DIMS, E, 2, 3)), make_inputs()
    lengths = torch.tensor([7, 3, 1, 5])
    output = module(inputs, {"text": lengths})
    attention, keys, values, seen = module.attention, [], [], []
    for name, x in inputs.items():
        tokens = module.embed[name](x if x.dim() == 3 else x[:, None])
        key, value = attention.key_value[name](tokens)
        keys.append(key)
        values.append(value)
        limit = lengths if name == "text" else torch.full((B,), tokens.shape[1])
        seen.append(torch.arange(tokens.shape[1]) < limit[:, None])
    query = attention.query(module.queries.expand(B, -1, -1))
    logits = query @ torch.cat(keys, 2).mT / (E // 2) ** 0.5
    p = logits.masked_fill(~torch.cat(seen, 1)[:, None, None], -math.inf).softmax(-1)
    read = attention.out_proj((p @ torch.cat(values, 2)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output.fused, module.norm(read).mean(1))
    shares = [part.sum(-1).mean((1, 2)) for part in p.split([7, 1, 9], -1)]
    torch.testing.assert_close(output.source_mass, torch.stack(shares, 1))


def test_fused_has_one_size_whatever_the_number_of_queries():
    inputs = make_inputs()
    for queries in (1, 2, 5):
        output = AttentionPoolFusion(DIMS, E, 2, queries)(inputs, present=PRESENT)
        assert output.fused.shape == (B, E)
        assert {name: x.shape for name, x in output.per_modality.items()} == {
            "text": (B, 7, E), "image": (B, 1, E), "audio": (B, 9, E)
        }  # fmt: skip
        torch.testing.assert_close(output.source_mass.sum(1), PRESENT.any(1).float())


def test_queries_read_different_things():
    module, inputs = make("pool-many"), make_inputs()
    read = module.attention(module.queries.expand(B, -1, -1), module(inputs).per_modality)
    assert not torch.allclose(read[:, 0], read[:, 1], atol=1e-3)


class Concatenations(Inside):
    """Shapes of everything that is concatenated, forward and backward."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def saw(self, func, args, made):
        if func.overloadpacket in (torch.ops.aten.cat, torch.ops.aten.stack):
            self.shapes.append(tuple(made.shape))


def test_attention_pool_never_lays_the_modalities_end_to_end():
    """Perceiver, Flamingo and MM-DiT concatenate keys and values of all modalities before they attend: a copy of
    everything, at the length of all together. Here no tensor of that length is ever made."""
    module, inputs = make("pool-many"), make_inputs()
    together = 7 + 1 + 9
    with Concatenations() as seen:
        loss_of(module(inputs, present=PRESENT)).backward()
    assert not [shape for shape in seen.shapes if together in shape]
    with Concatenations() as seen:  # the watch does see one
        torch.cat([inputs["text"][..., :3], torch.randn(B, 1, 3), inputs["audio"]], 1)
    assert seen.shapes == [(B, together, 3)]


# FiLM


@pytest.mark.parametrize("shape", [(B, 5), (B, 7, 5), (B, 3, 4, 5)])
def test_film_scales_and_shifts_features(shape):
    film, x, cond = stirred(FiLM(5, 3)), torch.randn(shape), torch.randn(B, 3)
    out = film(x, cond)
    assert out.shape == x.shape
    for b in range(B):
        gamma, beta = film.proj(cond[b]).chunk(2)
        torch.testing.assert_close(out[b], (1 + gamma) * x[b] + beta)
        torch.testing.assert_close(film(x[b : b + 1], cond[b : b + 1]), out[b : b + 1])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_film_without_a_condition_is_the_identity(poison):
    """In Hugging Face's Evolla, features that are absent still move the output of its cross-attention. A condition
    that is absent must leave x alone, with its bias as well as with whatever it holds."""
    film, x = stirred(FiLM(5, 3)), torch.randn(B, 7, 5)
    here = torch.tensor([True, False, True, False])
    seen = []
    for fill in (0.0, poison):
        film.zero_grad()
        torch.manual_seed(1)
        cond = torch.randn(B, 3).masked_fill(~here[:, None], fill).requires_grad_()
        out = film(x, cond, here)
        out.square().sum().backward()
        assert torch.equal(out[~here], x[~here]) and not torch.isclose(out[here], x[here]).all()
        assert not cond.grad[~here].any() and cond.grad[here].any()
        seen.append([out, cond.grad, film.proj.weight.grad, film.proj.bias.grad])
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=0)
    film.zero_grad()
    nobody = film(x, None)
    assert torch.equal(nobody, x)
    nobody.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in film.parameters())


def test_film_pools_the_real_tokens_of_its_condition():
    film, x, tokens = stirred(FiLM(5, 3)), torch.randn(B, 7, 5), torch.randn(B, 4, 3)
    lengths = torch.tensor([4, 2, 1, 0])
    real = torch.arange(4) < lengths[:, None]
    padded = tokens.masked_fill(~real[..., None], math.nan)
    out = film(x, padded, mask=lengths)
    torch.testing.assert_close(film(x, padded, mask=real), out, rtol=0, atol=0)
    for b, n in enumerate(lengths.tolist()[:3]):
        torch.testing.assert_close(film(x[b : b + 1], tokens[b : b + 1, :n].mean(1)), out[b : b + 1])
    assert torch.equal(out[3], x[3])
    assert torch.equal(film(x, padded, torch.zeros(B, dtype=torch.bool), lengths), x)


def test_film_under_autocast_and_compile():
    film, x, cond = stirred(FiLM(5, 3)), torch.randn(B, 7, 5), torch.randn(B, 3)
    here = torch.tensor([True, False, True, False])
    exact = copy.deepcopy(film).double()(x.double(), cond.double(), here)
    plain = copy.deepcopy(film).bfloat16()(x.bfloat16(), cond.bfloat16(), here)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = film(x, cond, here)
    assert plain.dtype == torch.bfloat16 and out.dtype == torch.float32
    assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max()
    torch.compiler.reset()
    compiled = torch.compile(film, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, cond, here), film(x, cond, here))


@pytest.mark.parametrize(("error", "message", "arguments"), [
    (TypeError, "x must be a floating-point tensor, got torch.int64", (torch.ones(2, 5).long(), torch.ones(2, 3))),
    (ValueError, r"x must have shape \(B, ..., 5\), got \(2, 4\)", (torch.ones(2, 4), torch.ones(2, 3))),
    (TypeError, "cond must be a floating-point tensor or None, got list", (torch.ones(2, 5), [1.0])),
    (ValueError, r"cond must have shape \(2, 3\) or \(2, N, 3\), got \(1, 3\)", (torch.ones(2, 5), torch.ones(1, 3))),
    (TypeError, "present must be a bool tensor, got torch.float32", (torch.ones(2, 5), None, torch.ones(2))),
    (ValueError, r"present must have shape \(2,\), got \(3,\)", (torch.ones(2, 5), None, torch.ones(3).bool())),
    (
        ValueError,
        "mask was given for a vector cond",
        (torch.ones(2, 5), torch.ones(2, 3), None, torch.ones(2).long()),
    ),
    (
        ValueError,
        r"mask must have shape \(2, 4\), got \(2, 5\)",
        (torch.ones(2, 5), torch.ones(2, 4, 3), None, torch.ones(2, 5).bool()),
    ),
])  # fmt: skip
def test_film_names_a_bad_argument(error, message, arguments):
    with pytest.raises(error, match=message):
        FiLM(5, 3)(*arguments)
