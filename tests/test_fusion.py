"""attnfuse.fusion: the presence contract, the same for every module, and what each module computes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnfuse.fusion as af

B, C, E = 4, 5, 16
DIMS = {"text": 6, "image": 10, "audio": 4}
NAMES = list(DIMS)
LENGTHS = {"text": 7, "audio": 9}  # image is one vector


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


BUILD = {
    "concat": lambda: af.ConcatFusion(DIMS, E),
    "transformer": lambda: af.MultimodalTransformer(DIMS, E, 4, 2, max_lengths={"text": 12}),
    "transformer-gqa-qknorm": lambda: af.MultimodalTransformer(DIMS, E, 4, 1, num_kv_heads=2, qk_norm=True),
    "bottleneck": lambda: af.BottleneckFusion(DIMS, E, 4, 3, num_bottlenecks=2, fusion_layer=1),
    **{
        f"late-{m}": lambda m=m: af.LateFusion(NAMES, C, m)
        for m in ("mean", "weighted", "product", "max", "vote")
    },
}
TOKENS = [name for name in BUILD if not name.startswith("late")]
every = pytest.mark.parametrize("case", BUILD)
every_with_tokens = pytest.mark.parametrize("case", TOKENS)


def make(case):
    module = BUILD[case]()
    with torch.no_grad():  # zero biases and equal scores would let mistakes pass
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def make_inputs(case, batch=B):
    if case.startswith("late"):
        return {name: torch.randn(batch, C) for name in NAMES}
    return {
        name: torch.randn(batch, LENGTHS[name], dim) if name in LENGTHS else torch.randn(batch, dim)
        for name, dim in DIMS.items()
    }


def result(output):
    return output.logits if output.fused is None else output.fused


def loss_of(output):
    """A loss that reads everything the module returns."""
    parts = [result(output), *output.per_modality.values()]
    if output.source_mass is not None:
        parts.append(output.source_mass)
    return sum((part * torch.linspace(-1, 2, part.numel()).view(part.shape)).sum() for part in parts)


PRESENT = torch.tensor([[True, True, True], [True, True, False], [False, True, False], [False, False, False]])


def poisoned(inputs, present, poison):
    """The inputs as leaves, with `poison` wherever a sample lacks the modality."""
    leaves = {}
    for s, (name, x) in enumerate(inputs.items()):
        gone = ~present[:, s].view(-1, *(1,) * (x.dim() - 1))
        leaves[name] = x.masked_fill(gone, poison).requires_grad_()
    return leaves


# the contract


@every
def test_present_modalities_matter_and_fields_have_their_shapes(case):
    """The other tests compare outputs; this one makes sure there is something to compare."""
    module, inputs = make(case), make_inputs(case)
    base = module(inputs)
    assert result(base).shape == (B, C if case.startswith("late") else E)
    assert list(base.per_modality) == NAMES
    for s, name in enumerate(NAMES):
        x = inputs[name].clone()
        x[0] = -3 * x[0]
        changed = result(module(inputs | {name: x}))
        if case not in ("late-max", "late-vote"):
            assert not torch.allclose(changed[0], result(base)[0], atol=1e-3)
        torch.testing.assert_close(changed[1:], result(base)[1:])
        without = module({other: inputs[other] for other in NAMES if other != name})
        assert not torch.allclose(result(without), result(base), atol=1e-4)
        if base.source_mass is not None:
            assert (base.source_mass[:, s] > 0).all() and (without.source_mass[:, s] == 0).all()
            torch.testing.assert_close(without.source_mass.sum(1), torch.ones(B))


@every
def test_absence_has_one_meaning_whichever_way_it_is_said(case):
    module, inputs = make(case), make_inputs(case)
    missing = module({name: inputs[name] for name in ("audio", "image")})
    gone = torch.zeros(B, dtype=torch.bool)
    said = [
        {"present": torch.tensor([[False, True, True]]).expand(B, 3)},
        {"present": {"text": gone}},
    ]
    if case in TOKENS:
        said += [
            {"mask": {"text": torch.zeros(B, 7, dtype=torch.bool)}},
            {"mask": {"text": gone.long()}, "present": torch.ones(B, 3, dtype=torch.bool)},
        ]
    for how in said:
        output = module(inputs, **how)
        torch.testing.assert_close(result(output), result(missing))
        torch.testing.assert_close(output.source_mass, missing.source_mass)
        assert (output.per_modality["text"] == 0).all()


@every
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_what_an_absent_input_holds_reaches_nothing(case, poison):
    module, inputs = make(case), make_inputs(case)
    seen = []
    for fill in (0.0, poison):
        module.zero_grad()
        leaves = poisoned(inputs, PRESENT, fill)
        output = module(leaves, present=PRESENT)
        loss_of(output).backward()
        seen.append([result(output), output.source_mass, output.per_modality])
        seen[-1] += [[x.grad for x in leaves.values()], [p.grad for p in module.parameters()]]
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=0)
    for s, x in enumerate(leaves.values()):
        assert x.grad.isfinite().all()
        assert (x.grad[~PRESENT[:, s]] == 0).all()
        assert (x.grad[PRESENT[:, s]] != 0).any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@every
def test_parameters_of_a_modality_that_nobody_has_get_gradient_zero(case):
    module = make(case)
    gone = torch.zeros(B, dtype=torch.bool)
    nan = {"audio": torch.full_like(make_inputs(case)["audio"], math.nan)}
    for inputs, present in ((make_inputs(case) | nan, {"audio": gone}), (make_inputs(case), None)):
        if present is None:
            del inputs["audio"]
        inputs["text"].requires_grad_()  # some methods have no parameters
        module.zero_grad()
        loss_of(module(inputs, present=present)).backward()
        named = dict(module.named_parameters())
        for name, parameter in named.items():
            zero = parameter.grad is not None and bool((parameter.grad == 0).all())
            if ".audio." in name:
                assert zero, name
            elif ".image." in name and "position" not in name:
                assert not zero, name


def neutral(case, module):
    """What the docstrings promise when all is absent; None where it is only promised to be one constant."""
    if case.startswith("late"):
        return torch.full((C,), -math.log(C))
    return {"concat": getattr(module, "bias", None), "bottleneck": torch.zeros(E)}.get(case)


@every
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_all_absent_gives_the_neutral_output(case):
    module, inputs = make(case), make_inputs(case)
    nobody = torch.zeros(B, 3, dtype=torch.bool)
    leaves = poisoned(inputs, nobody, math.nan)
    with torch.autograd.detect_anomaly(check_nan=True):  # not even a gradient on the way may be NaN
        output = module(leaves, present=nobody)
        loss_of(output).backward()
    assert result(output).isfinite().all()
    torch.testing.assert_close(result(output), result(output)[:1].expand(B, -1))
    assert output.source_mass is None or (output.source_mass == 0).all()
    assert all((x.grad == 0).all() for x in leaves.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    assert case != "late-weighted" or (module.scores.grad == 0).all()
    torch.testing.assert_close(result(module({}, present=nobody)), result(output))
    expected = neutral(case, module)
    if expected is not None:
        torch.testing.assert_close(result(output), expected.expand(B, -1))


@every_with_tokens
def test_padding_is_as_if_it_were_not_there(case):
    module, inputs = make(case), make_inputs(case)
    lengths = torch.tensor([7, 3, 1, 5])
    real = torch.arange(7) < lengths[:, None]
    text = inputs["text"].masked_fill(~real[..., None], math.nan).requires_grad_()
    by_length = module(inputs | {"text": text}, {"text": lengths})
    by_mask = module(inputs | {"text": text}, {"text": real, "image": None})
    torch.testing.assert_close(by_length, by_mask, rtol=0, atol=0)
    loss_of(by_length).backward()
    assert (text.grad[~real] == 0).all() and text.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    for b, n in enumerate(lengths.tolist()):
        short = {name: x[b : b + 1] for name, x in inputs.items()}
        short["text"] = short["text"][:, :n]
        torch.testing.assert_close(by_length.fused[b : b + 1], module(short).fused)


@every
def test_a_sample_alone_equals_itself_in_a_batch(case):
    module, inputs = make(case).train(), make_inputs(case)
    together = result(module(inputs, present=PRESENT))
    for b in range(B):
        alone = {name: x[b : b + 1] for s, (name, x) in enumerate(inputs.items()) if PRESENT[b, s]}
        actual = result(module(alone, present=PRESENT[b : b + 1]))
        torch.testing.assert_close(actual, together[b : b + 1])


@every
def test_state_dict_carries_everything(case):
    module, other, inputs = make(case), BUILD[case](), make_inputs(case)
    missing = other.load_state_dict(module.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    torch.testing.assert_close(result(other(inputs)), result(module(inputs)), rtol=0, atol=0)


class Classifier(nn.Module):
    """A fusion module with what it needs around it to be trained."""

    def __init__(self, case):
        super().__init__()
        self.late = case.startswith("late")
        self.fusion = BUILD[case]()
        self.heads = nn.ModuleDict(
            {name: nn.Linear(dim, C) for name, dim in DIMS.items()} if self.late else {}
        )
        self.head = None if self.late else nn.Linear(E, C)

    def forward(self, inputs, present):
        if self.late:
            inputs = {name: self.heads[name](x) for name, x in inputs.items()}
            return self.fusion(inputs, present=present).logits
        return self.head(self.fusion(inputs, present=present).fused)


@every
def test_training_with_dropped_modalities_lowers_the_loss(case):
    inputs = {name: torch.randn(32, dim) for name, dim in DIMS.items()}
    target = inputs["text"][:, :C].argmax(1)
    model, drop = Classifier(case), af.ModalityDropout(0.3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    everyone = torch.ones(32, 3, dtype=torch.bool)

    def loss(present):
        return F.cross_entropy(model(inputs, present), target)

    before = loss(everyone).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss(drop(everyone)).backward()
        optimizer.step()
    assert loss(everyone).item() < 0.8 * before


@every
def test_autocast_stays_within_twice_the_error_of_bfloat16(case):
    module, inputs = make(case), make_inputs(case)
    exact = result(
        copy.deepcopy(module).double()({n: x.double() for n, x in inputs.items()}, present=PRESENT)
    )
    low = result(
        copy.deepcopy(module).bfloat16()({n: x.bfloat16() for n, x in inputs.items()}, present=PRESENT)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(inputs | {"text": inputs["text"].requires_grad_()}, present=PRESENT)
    loss_of(output).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    budget = 2 * (low.double() - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (result(output).double() - exact).abs().max() <= budget


def bad_calls():
    good = make_inputs("concat", 2)
    boolean = torch.ones(2, 3, dtype=torch.bool)
    return [
        (TypeError, r"inputs must be a dict", ([good["text"]],), {}),
        (ValueError, r"inputs has unknown modalities \['smell'\]", (good | {"smell": good["text"]},), {}),
        (TypeError, r"inputs\['text'\] must be a tensor", ({"text": [1.0]},), {}),
        (TypeError, r"inputs\['text'\] must have a floating", ({"text": good["text"].long()},), {}),
        (ValueError, r"inputs\['text'\] must have shape", ({"text": torch.randn(2, 7, 5)},), {}),
        (ValueError, r"inputs\['text'\] must have shape", ({"text": torch.randn(2, 7, 6, 6)},), {}),
        (ValueError, r"inputs\['audio'\] has batch size 3", (good | {"audio": torch.randn(3, 9, 4)},), {}),
        (ValueError, r"inputs is empty and present is not given", ({},), {}),
        (TypeError, r"mask must be a dict", (good,), {"mask": boolean}),
        (ValueError, r"mask has unknown modalities", (good,), {"mask": {"smell": boolean}}),
        (ValueError, r"mask\['image'\] was given for a vector", (good,), {"mask": {"image": boolean}}),
        (ValueError, r"mask\['text'\] must have shape \(2, 7\)", (good,), {"mask": {"text": boolean}}),
        (ValueError, r"mask\['text'\] holds lengths", (good,), {"mask": {"text": boolean.long()}}),
        (TypeError, r"mask\['text'\] must be bool", (good,), {"mask": {"text": torch.ones(2, 7)}}),
        (TypeError, r"present must have dtype torch.bool", (good,), {"present": boolean.float()}),
        (ValueError, r"present must have shape \(B, S\) = \(2, 3\)", (good,), {"present": boolean[:, :2]}),
        (TypeError, r"present must be a \(B, S\) bool tensor", (good,), {"present": [True]}),
        (ValueError, r"present has unknown modalities", (good,), {"present": {"smell": boolean[:, 0]}}),
        (
            TypeError,
            r"present\['text'\] must be a bool tensor",
            (good,),
            {"present": {"text": boolean[:, 0].long()}},
        ),
        (ValueError, r"present\['text'\] must have shape \(2,\)", (good,), {"present": {"text": boolean}}),
    ]


@pytest.mark.parametrize("number", range(len(bad_calls())))
def test_a_bad_call_gets_one_sentence_naming_the_argument(number):
    error, message, arguments, options = bad_calls()[number]
    for case in ("concat", "bottleneck"):
        with pytest.raises(error, match=message) as raised:
            make(case)(*arguments, **options)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("error", "message", "build"), [
    (ValueError, "dims must name at least one", lambda: af.ConcatFusion({}, 4)),
    (TypeError, "dims must be a dict", lambda: af.ConcatFusion(["text"], 4)),
    (ValueError, "modality name 'a.b'", lambda: af.ConcatFusion({"a.b": 3}, 4)),
    (ValueError, "modality name 'values'", lambda: af.ConcatFusion({"values": 3}, 4)),
    (ValueError, r"dims\['text'\] must be positive", lambda: af.ConcatFusion({"text": 0}, 4)),
    (ValueError, "out_dim must be positive", lambda: af.ConcatFusion(DIMS, 0)),
    (ValueError, "num_layers must be positive", lambda: af.MultimodalTransformer(DIMS, 8, 2, 0)),
    (ValueError, "max_lengths has unknown", lambda: af.BottleneckFusion(DIMS, 8, 2, 1, max_lengths={"x": 3})),
    (ValueError, "fusion_layer must be in 0..num_layers-1", lambda: af.BottleneckFusion(DIMS, 8, 2, 2, 4, 2)),
    (ValueError, "num_bottlenecks must be positive", lambda: af.BottleneckFusion(DIMS, 8, 2, 2, 0)),
    (ValueError, "method must be one of", lambda: af.LateFusion(NAMES, C, "median")),
    (ValueError, "modalities must not repeat", lambda: af.LateFusion(["a", "a"], C)),
    (TypeError, "modalities must be a sequence", lambda: af.LateFusion("text", C)),
    (ValueError, "p must be", lambda: af.ModalityDropout(1.5)),
])  # fmt: skip
def test_a_bad_constructor_argument_is_named(error, message, build):
    with pytest.raises(error, match=message):
        build()


# each module's own promise


def test_concat_fusion_is_a_linear_layer_on_the_concatenation():
    module, inputs = make("concat"), make_inputs("concat")
    pooled = [x.mean(1) if x.dim() == 3 else x for x in inputs.values()]
    weight = torch.cat([module.slots[name].weight for name in NAMES], 1)
    torch.testing.assert_close(module(inputs).fused, F.linear(torch.cat(pooled, 1), weight, module.bias))


def test_transformer_lets_modalities_read_one_another_and_knows_positions():
    module, inputs = make("transformer"), make_inputs("transformer")
    base = module(inputs)
    other = module(inputs | {"image": torch.randn(B, 10)})
    assert not torch.allclose(base.per_modality["text"], other.per_modality["text"], atol=1e-3)
    backwards = {"text": inputs["text"].flip(1)}  # has positions
    assert not torch.allclose(module(inputs | backwards).fused, base.fused, atol=1e-4)
    backwards = {"audio": inputs["audio"].flip(1)}  # is a set
    torch.testing.assert_close(module(inputs | backwards).fused, base.fused)
    with pytest.raises(ValueError, match=r"inputs\['text'\] has 13 tokens, max_lengths allows 12"):
        module({"text": torch.randn(B, 13, 6)})


def test_bottleneck_is_the_only_way_between_modalities():
    """The first layer with a bottleneck reads a constant; what it wrote is read one layer later."""
    for fusion_layer, crosses in ((2, False), (1, True)):
        torch.manual_seed(1)
        module = af.BottleneckFusion(DIMS, E, 4, 3, num_bottlenecks=2, fusion_layer=fusion_layer)
        inputs = make_inputs("bottleneck")
        base = module(inputs).per_modality["text"]
        other = module(inputs | {"image": torch.randn(B, 10)}).per_modality["text"]
        assert torch.equal(base, other) is not crosses


def test_bottleneck_layer_is_the_mean_of_the_present_modalities_updates():
    """One fused layer by hand, with the concatenation the module avoids."""
    module, inputs = make("bottleneck"), make_inputs("bottleneck")
    present = torch.tensor([[True, True, False]]).expand(B, 3)
    streams = {
        n: module.embed[n](x if x.dim() == 3 else x[:, None]) for n, x in inputs.items() if n != "audio"
    }
    bottleneck = module.bottleneck.expand(B, -1, -1)
    for depth in range(3):
        blocks = {n: module.layers[n][depth] for n in streams}
        if depth == 0:
            streams = {n: blocks[n]([x])[0] for n, x in streams.items()}
            continue
        wide = {n: blocks[n]([torch.cat([x, bottleneck], 1)])[0] for n, x in streams.items()}
        streams = {n: x[:, :-2] for n, x in wide.items()}
        bottleneck = torch.stack([x[:, -2:] for x in wide.values()]).mean(0)
    expected = torch.stack([module.norms[n](x).mean(1) for n, x in streams.items()]).mean(0)
    torch.testing.assert_close(module(inputs, present=present).fused, expected)


@pytest.mark.parametrize("method", ["mean", "weighted", "product", "max", "vote"])
def test_late_fusion_rules(method):
    module, inputs = make(f"late-{method}"), make_inputs("late")
    output = module(inputs, present=PRESENT)
    torch.testing.assert_close(output.logits.exp().sum(1), torch.ones(B))
    for b, here in enumerate(PRESENT.tolist()[:3]):
        names = [name for name, is_here in zip(NAMES, here, strict=True) if is_here]
        p = torch.stack([inputs[name][b].softmax(-1) for name in names])
        if method == "weighted":
            w = module.scores.detach()[PRESENT[b]].softmax(0)
            expected = (w[:, None] * p).sum(0)
        elif method == "vote":
            expected = F.one_hot(p.argmax(1), C).sum(0) + p.mean(0)
        else:
            expected = {"mean": p.sum(0), "product": p.prod(0), "max": p.amax(0)}[method]
        torch.testing.assert_close(output.logits[b].exp(), expected / expected.sum())


def test_a_vote_is_won_by_number_and_a_tie_by_confidence():
    vote = af.LateFusion(NAMES, 3, "vote")
    sure, unsure = torch.tensor([[9.0, 0, 0]]), torch.tensor([[0, 0.2, 0.0]])
    assert vote({"text": sure, "image": unsure, "audio": unsure}).logits.argmax() == 1
    assert vote({"text": sure, "image": unsure}).logits.argmax() == 0


def test_late_fusion_survives_certainty():
    certain = {"text": torch.tensor([[1e4, 0, 0]]), "image": torch.tensor([[0, 1e4, 0]])}
    for method in ("mean", "weighted", "product", "max", "vote"):
        leaves = {name: x.clone().requires_grad_() for name, x in certain.items()}
        logits = af.LateFusion(NAMES, 3, method)(leaves).logits
        F.nll_loss(logits, torch.tensor([2])).backward()
        assert logits.isfinite().all() and all(x.grad.isfinite().all() for x in leaves.values()), method


# training aids


def test_modality_dropout_rates_and_identity_in_eval():
    everyone = torch.ones(20000, 3, dtype=torch.bool)
    drop = af.ModalityDropout([0.1, 0.5, 0.0], keep_at_least_one=False)
    rate = 1 - drop(everyone).float().mean(0)
    assert (rate - torch.tensor([0.1, 0.5, 0.0])).abs().max() < 0.02 and rate[2] == 0
    assert torch.equal(drop.eval()(everyone), everyone)
    some = torch.rand(500, 3) < 0.5
    assert not (af.ModalityDropout(0.3)(some) & ~some).any()


def test_modality_dropout_keeps_one_of_those_there():
    some = torch.rand(3000, 3) < 0.6
    kept = af.ModalityDropout(1.0)(some)
    assert not (kept & ~some).any()
    assert torch.equal(kept.sum(1), some.any(1).long())
    survivors = kept[some.all(1)].float().mean(0)
    assert (survivors - 1 / 3).abs().max() < 0.08
    assert not af.ModalityDropout(1.0, keep_at_least_one=False)(some).any()


def test_modality_dropout_is_reproducible_and_checks_its_input():
    everyone, drop = torch.ones(50, 3, dtype=torch.bool), af.ModalityDropout(0.5)
    first, second = (drop(everyone, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, drop(everyone))
    with pytest.raises(TypeError, match="present must be a bool tensor"):
        drop(everyone.float())
    with pytest.raises(ValueError, match="present has 3 modalities, p was given for 2"):
        af.ModalityDropout([0.1, 0.2])(everyone)


def test_balance_loss_is_zero_at_balance_and_grows_with_neglect():
    uniform = torch.full((6, 3), 1 / 3)
    assert af.source_balance_loss(uniform).abs() < 1e-6
    neglect = [torch.tensor([[1 - 2 * x, x, x]]).expand(6, 3) for x in (0.3, 0.1, 0.01, 0.0)]
    losses = [af.source_balance_loss(mass).item() for mass in neglect]
    assert losses == sorted(set(losses)) and math.isfinite(losses[-1])
    taking_turns = torch.eye(3).repeat(2, 1)  # every sample leans on one, the batch on all
    assert af.source_balance_loss(taking_turns).abs() < 1e-6
    per_head = torch.rand(6, 2, 5, 3).softmax(-1)
    averaged = af.source_balance_loss(per_head.mean((1, 2)))
    torch.testing.assert_close(af.source_balance_loss(per_head), averaged)


def test_balance_loss_asks_nothing_of_the_absent():
    fair = PRESENT.float() / PRESENT.sum(1, keepdim=True).clamp_min(1)
    assert af.source_balance_loss(fair, PRESENT).abs() < 1e-6
    assert af.source_balance_loss(fair) > 0.01
    nobody = torch.zeros(2, 3, requires_grad=True)
    loss = af.source_balance_loss(nobody, torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.abs() < 1e-6 and nobody.grad.isfinite().all()
    with pytest.raises(ValueError, match="present must have shape"):
        af.source_balance_loss(fair, PRESENT[:, :2])
    with pytest.raises(TypeError, match="mass must be"):
        af.source_balance_loss(PRESENT)


def test_balance_loss_pulls_an_ignored_modality_back():
    """Through the mass of a real module: the gradient is the kernel's."""
    module, inputs = make("transformer"), make_inputs("transformer")
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    start = module(inputs).source_mass.mean(0)
    ignored = start.argmin()
    for _ in range(15):
        optimizer.zero_grad()
        af.source_balance_loss(module(inputs).source_mass).backward()
        optimizer.step()
    end = module(inputs).source_mass.mean(0)
    assert end[ignored] > start[ignored]
    assert af.source_balance_loss(end[None]) < 0.5 * af.source_balance_loss(start[None])
