"""attnfuse.fusion: what each of the first modules computes. The contract they share: test_fusion_contract.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from fusion_modules import CASES, DIMS, NAMES, PRESENT, B, C, E
from fusion_modules import make as make_case
from fusion_modules import make_inputs as make_case_inputs

import attnfuse.fusion as af


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """These tensors are so small that a second thread costs more than it does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(case):
    return make_case(CASES[case])


def make_inputs(case):
    return make_case_inputs(CASES[case])


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
    module, inputs = make(f"late-{method}"), make_inputs("late-mean")
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
