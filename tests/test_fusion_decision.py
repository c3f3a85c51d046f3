"""Decision-level fusion beyond LateFusion, and the training aids: the presence contract and each formula by hand."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Dirichlet, Normal, kl_divergence

from attnfuse.fusion.decision import LateFusion, StackingFusion
from attnfuse.fusion.evidential import EvidentialFusion, evidential_loss
from attnfuse.fusion.experts import ProductOfExperts
from attnfuse.fusion.feature import ConcatFusion
from attnfuse.fusion.model import MultimodalTransformer
from attnfuse.fusion.training import OGMGE, MissingModalityToken, ModalityDropout

B, C = 4, 6
NAMES = ["text", "image", "audio"]
PRESENT = torch.tensor([[True, True, True], [True, True, False], [False, True, False], [False, False, False]])


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


# All of them take (B, 6): six classes, or three means and three log variances.
BUILD = {
    "stacking": lambda: StackingFusion(NAMES, C),
    "stacking-hidden": lambda: StackingFusion(NAMES, C, hidden=8),
    "experts": lambda: ProductOfExperts(NAMES, C // 2),
    "experts-no-prior": lambda: ProductOfExperts(NAMES, C // 2, prior=False),
    "evidential": lambda: EvidentialFusion(C, names=NAMES),
    "evidential-relu": lambda: EvidentialFusion(C, names=NAMES, evidence="relu"),
}
every = pytest.mark.parametrize("case", BUILD)


def make(case):
    module = BUILD[case]()
    with torch.no_grad():  # zero biases and equal slots would let mistakes pass
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def make_inputs(batch=B):
    return {name: torch.randn(batch, C) for name in NAMES}


def tensors(output):
    """Every tensor of a FusionOutput."""
    flat = [x for x in (output.fused, output.logits, output.uncertainty) if x is not None]
    return flat + list(output.per_modality.values())


def loss_of(output):
    return sum((x * torch.linspace(-1, 2, x.numel()).view(x.shape)).sum() for x in tensors(output))


# the contract


@every
def test_every_modality_matters_and_only_in_its_own_sample(case):
    module, inputs = make(case), make_inputs()
    base = module(inputs)
    assert list(base.per_modality) == NAMES and base.source_mass is None
    for name in NAMES:
        x = inputs[name].clone()
        x[0] = 2 - x[0]
        changed = module(inputs | {name: x})
        assert not torch.allclose(tensors(changed)[0][0], tensors(base)[0][0], atol=1e-3)
        for new, old in zip(tensors(changed), tensors(base)):
            torch.testing.assert_close(new[1:], old[1:])


@every
def test_absence_has_one_meaning_whichever_way_it_is_said(case):
    module, inputs = make(case), make_inputs()
    missing = module({name: inputs[name] for name in ("audio", "image")})
    for present in (torch.tensor([[False, True, True]]).expand(B, 3), {"text": torch.zeros(B, dtype=torch.bool)}):
        output = module(inputs, present=present)
        torch.testing.assert_close(output, missing)
        assert (output.per_modality["text"] == 0).all()


@every
@pytest.mark.parametrize("poison", [math.nan, math.inf, -1e30])
def test_what_an_absent_input_holds_reaches_nothing(case, poison):
    module, inputs = make(case), make_inputs()
    seen = []
    for fill in (0.0, poison):
        module.zero_grad()
        gone = dict(zip(NAMES, ~PRESENT.T[..., None]))
        leaves = {name: x.masked_fill(gone[name], fill).requires_grad_() for name, x in inputs.items()}
        output = module(leaves, present=PRESENT)
        loss_of(output).backward()
        seen.append([tensors(output), [x.grad for x in leaves.values()], [p.grad for p in module.parameters()]])
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=0)
    for s, x in enumerate(leaves.values()):
        assert x.grad.isfinite().all() and (x.grad[~PRESENT[:, s]] == 0).all()
        assert (x.grad[PRESENT[:, s]] != 0).any()


@every
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_all_absent_gives_the_neutral_output(case):
    module = make(case)
    nobody = torch.zeros(B, 3, dtype=torch.bool)
    leaves = {name: torch.full((B, C), math.nan, requires_grad=True) for name in NAMES}
    with torch.autograd.detect_anomaly(check_nan=True):  # not even a gradient on the way may be NaN
        output = module(leaves, present=nobody)
        loss_of(output).backward()
    assert all(x.isfinite().all() for x in tensors(output))
    assert all((x.grad == 0).all() for x in leaves.values())
    assert all(p.grad.isfinite().all() for p in module.parameters())
    torch.testing.assert_close(module({}, present=nobody), output)
    if case.startswith("experts"):
        assert (output.fused == 0).all() and (output.uncertainty == 1).all()
    elif case.startswith("evidential"):
        assert (output.fused == 1).all() and (output.uncertainty - 1).abs().max() < 1e-6
        torch.testing.assert_close(output.logits, torch.full((B, C), -math.log(C)))
    else:
        prior = module.head(module.bias).log_softmax(-1)
        torch.testing.assert_close(output.logits, prior.expand(B, C))


@every
def test_a_sample_alone_equals_itself_in_a_batch(case):
    module, inputs = make(case), make_inputs()
    together = module(inputs, present=PRESENT)
    for b in range(B):
        alone = {name: x[b : b + 1] for s, (name, x) in enumerate(inputs.items()) if PRESENT[b, s]}
        for one, all_of_them in zip(tensors(module(alone, present=PRESENT[b : b + 1])), tensors(together)):
            torch.testing.assert_close(one, all_of_them[b : b + 1])


@every
def test_autocast_and_bfloat16_stay_within_the_budget(case):
    module, inputs = make(case), make_inputs()
    exact = copy.deepcopy(module).double()({n: x.double() for n, x in inputs.items()}, present=PRESENT)
    low = copy.deepcopy(module).bfloat16()({n: x.bfloat16() for n, x in inputs.items()}, present=PRESENT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(inputs | {"text": inputs["text"].requires_grad_()}, present=PRESENT)
    loss_of(output).backward()
    for x, reference, budget in zip(tensors(output), tensors(exact), tensors(low)):
        assert x.dtype == torch.float32
        allowed = 2 * (budget - reference).abs().max() + torch.finfo(torch.bfloat16).eps * reference.abs().max()
        assert (x - reference).abs().max() <= allowed


@every
def test_compiles_in_one_graph(case):
    module, inputs = make(case), make_inputs()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs, present=PRESENT), module(inputs, present=PRESENT))


@every
def test_a_prediction_has_no_tokens_to_mask(case):
    with pytest.raises(ValueError, match=r"mask\['text'\] was given for a vector"):
        make(case)(make_inputs(), mask={"text": torch.ones(B, C, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"inputs\['text'\] must have shape \(B, 6\), got \(4, 2, 6\)"):
        make(case)({"text": torch.randn(B, 2, C)})


# stacking


@pytest.mark.parametrize("hidden", [None, 8])
def test_stacking_is_one_classifier_over_all_log_probabilities_and_flags(hidden):
    module, inputs = make("stacking" if hidden is None else "stacking-hidden"), make_inputs()
    flags = PRESENT.float()
    features = [F.log_softmax(inputs[n], -1) * flags[:, s, None] for s, n in enumerate(NAMES)]
    weights = [module.slots[n].weight for n in NAMES] + [module.slots[n].bias[:, None] for n in NAMES]
    score = F.linear(torch.cat([*features, flags], 1), torch.cat(weights, 1), module.bias)
    expected = module.head(score).log_softmax(-1)
    torch.testing.assert_close(module(inputs, present=PRESENT).logits, expected)


def test_stacking_starts_as_the_mean_of_log_probabilities():
    inputs = make_inputs()
    mean = torch.stack([F.log_softmax(x, -1) for x in inputs.values()]).mean(0)
    torch.testing.assert_close(BUILD["stacking"]()(inputs).logits, mean.log_softmax(-1))


def test_stacking_trains_and_saves_every_slot():
    """Fusion modules of other libraries keep their factors in a plain list: never trained, never saved."""
    module, inputs = make("stacking"), make_inputs()
    del inputs["audio"]
    module(inputs).logits[:, 0].sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad == 0).all()) is ("audio" in name), name
    other = BUILD["stacking"]()
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(inputs), module(inputs), rtol=0, atol=0)


def test_stacking_learns_whom_to_believe_where_a_fixed_rule_cannot():
    """One modality names the wrong class with great confidence: the product follows it, a learned rule reads it."""
    target = torch.randint(C, (128,))
    right = 2.0 * F.one_hot(target, C) + torch.randn(128, C)
    inputs = {"text": right, "image": 9.0 * F.one_hot((target + 1) % C, C)}
    module = StackingFusion(["text", "image"], C)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        F.nll_loss(module(inputs).logits, target).backward()
        optimizer.step()

    def accuracy(model):
        return (model(inputs).logits.argmax(1) == target).float().mean()

    assert accuracy(LateFusion(["text", "image"], C, "product")) < 0.1
    assert accuracy(module) > 0.95


# product of experts


def test_experts_multiply_their_densities():
    """The log density of the product differs from the sum of the experts' by a constant."""
    inputs = {name: torch.randn(1, 2, dtype=torch.float64) for name in NAMES}
    grid = torch.linspace(-3, 3, 41, dtype=torch.float64)[:, None]
    for prior in (True, False):
        mean, logvar = ProductOfExperts(NAMES, 1, prior=prior).posterior(inputs)
        total = sum(Normal(x[:, :1], (x[:, 1:] / 2).exp()).log_prob(grid) for x in inputs.values())
        total = total + (Normal(0.0, 1.0).log_prob(grid) if prior else 0.0)
        gap = Normal(mean, (logvar / 2).exp()).log_prob(grid) - total
        assert (gap - gap[0]).abs().max() < 1e-10


def test_a_single_expert_without_prior_is_returned_as_it_is():
    mean, logvar = torch.randn(B, 3), torch.randn(B, 3)
    module = ProductOfExperts(NAMES, 3, prior=False)
    torch.testing.assert_close(module.posterior({"image": (mean, logvar)}), (mean, logvar))
    output = module({"image": (mean, logvar)})
    torch.testing.assert_close(output.uncertainty, logvar.exp().mean(1))
    torch.testing.assert_close(output.per_modality["image"], mean)


def test_experts_take_a_pair_or_one_tensor():
    module, inputs = BUILD["experts"](), make_inputs()
    pairs = {name: tuple(x.chunk(2, 1)) for name, x in inputs.items()}
    torch.testing.assert_close(module(pairs, present=PRESENT), module(inputs, present=PRESENT), rtol=0, atol=0)


def test_each_expert_makes_the_product_surer():
    module, inputs = BUILD["experts"](), make_inputs()
    certain = [module({n: inputs[n] for n in NAMES[:k]}, present=torch.ones(B, 3, dtype=torch.bool)) for k in range(4)]
    for less, more in itertools.pairwise(certain):
        assert (more.uncertainty < less.uncertainty).all()


@pytest.mark.parametrize("logvar", [-300.0, 300.0])
@pytest.mark.parametrize("prior", [True, False])
def test_extreme_precisions_do_not_overflow(logvar, prior):
    """exp(-logvar) is infinite at -300 in float32, and inf / inf is NaN: log precisions have neither."""
    x = torch.tensor([[1.0, logvar]], requires_grad=True)
    y = torch.tensor([[3.0, logvar]], requires_grad=True)
    mean, log_variance = ProductOfExperts(["a", "b"], 1, prior=prior).posterior({"a": x, "b": y})
    (mean + log_variance).sum().backward()
    sure = 0.0 if prior and logvar > 0 else 2.0
    torch.testing.assert_close(mean, torch.tensor([[sure]]))
    torch.testing.assert_close(
        log_variance, torch.tensor([[0.0 if prior and logvar > 0 else logvar - math.log(2)]])
    )
    assert x.grad.isfinite().all() and y.grad.isfinite().all()


# evidential


def dempster(first, second):
    """The rule of Han et al., 2021, on (belief, uncertainty)."""
    (b1, u1), (b2, u2) = first, second
    conflict = b1.sum(-1, keepdim=True) * b2.sum(-1, keepdim=True) - (b1 * b2).sum(-1, keepdim=True)
    belief = (b1 * b2 + b1 * u2 + b2 * u1) / (1 - conflict)
    return belief, u1 * u2 / (1 - conflict)


def test_evidence_is_combined_by_dempsters_rule():
    inputs = {name: x.double() * 3 for name, x in make_inputs().items()}
    output = EvidentialFusion(C)(inputs)
    opinions = []
    for name in NAMES:
        alpha = 1 + F.softplus(inputs[name])
        torch.testing.assert_close(1 + output.per_modality[name], alpha)
        strength = alpha.sum(-1, keepdim=True)
        opinions.append(((alpha - 1) / strength, C / strength))
    belief, uncertainty = dempster(dempster(opinions[0], opinions[1]), opinions[2])
    alpha = 1 + belief * C / uncertainty
    torch.testing.assert_close(output.fused, alpha)
    torch.testing.assert_close(output.uncertainty, uncertainty.squeeze(-1))
    torch.testing.assert_close(output.uncertainty, C / alpha.sum(-1))
    torch.testing.assert_close(output.logits.exp(), alpha / alpha.sum(-1, keepdim=True))


def test_one_modality_is_fused_to_itself():
    output = EvidentialFusion(C)({"text": make_inputs()["text"]})
    torch.testing.assert_close(output.fused, 1 + output.per_modality["text"])


def test_evidence_only_ever_grows():
    """A limit of Dempster's rule that the docstring states: contradiction does not raise the uncertainty."""
    sure = 20.0 * F.one_hot(torch.tensor([0]), C)
    agree = EvidentialFusion(C)({"text": sure, "image": sure}).uncertainty
    contradict = EvidentialFusion(C)({"text": sure, "image": sure.roll(1, 1)}).uncertainty
    alone = EvidentialFusion(C)({"text": sure}).uncertainty
    assert agree < contradict < alone


def test_any_evidence_gives_finite_predictions():
    """The product of 1e15 in eight modalities is beyond float32: probabilities and uncertainty are not."""
    inputs = {f"m{s}": torch.tensor([[1e15, 0.0, -1e15]], requires_grad=True) for s in range(8)}
    output = EvidentialFusion(3)(inputs)
    (output.logits[:, 0].sum() + output.uncertainty.sum()).backward()
    assert output.logits.isfinite().all() and output.logits[0, 0] == 0 and output.uncertainty.isfinite().all()
    assert all(x.grad.isfinite().all() for x in inputs.values())


def test_little_evidence_is_not_rounded_away():
    logits = torch.full((1, 1000), -12.0)
    alpha = EvidentialFusion(1000)({"text": logits}).fused
    expected = 1 + F.softplus(logits.double())
    assert (alpha - expected).abs().max() <= 2 * torch.finfo(torch.float32).eps


def test_names_come_from_the_inputs_unless_they_are_given():
    inputs, module = make_inputs(), EvidentialFusion(C)
    torch.testing.assert_close(module(inputs, present=PRESENT), BUILD["evidential"]()(inputs, present=PRESENT))
    del inputs["audio"]
    with pytest.raises(ValueError, match=r"present must have shape .* with columns \['text', 'image'\]"):
        module(inputs, present=PRESENT)
    output = module(inputs, present={"audio": PRESENT[:, 0]})
    assert list(output.per_modality) == NAMES and (output.per_modality["audio"] == 0).all()
    torch.testing.assert_close(output.fused, module(inputs).fused)
    nothing = module({}, present=PRESENT)
    assert (nothing.fused == 1).all() and nothing.uncertainty.shape == (B,)


# evidential_loss


def alphas(scale=3.0):
    return 1 + scale * torch.rand(5, C, dtype=torch.float64), torch.tensor([0, 1, 2, 5, 3])


def test_the_mse_is_the_expected_square_under_the_dirichlet():
    alpha, target = alphas()
    y, dirichlet = F.one_hot(target, C), Dirichlet(alpha)
    expected = ((y - dirichlet.mean).square() + dirichlet.variance).sum(-1)
    torch.testing.assert_close(evidential_loss(alpha, target, 0, reduction="none"), expected)


def test_the_digamma_loss_is_the_expected_cross_entropy_under_the_dirichlet():
    alpha, target = alphas()
    samples = -Dirichlet(alpha).sample((20000,))[:, torch.arange(5), target].log()
    error = samples.std(0) / 20000**0.5
    actual = evidential_loss(alpha, target, 0, method="digamma", reduction="none")
    assert ((actual - samples.mean(0)).abs() < 5 * error).all()


def test_the_penalty_is_the_kl_to_uniform_of_what_misleads_and_is_annealed():
    alpha, target = alphas()
    y = F.one_hot(target, C)
    kl = kl_divergence(Dirichlet(y + (1 - y) * alpha), Dirichlet(torch.ones_like(alpha)))
    fit = evidential_loss(alpha, target, 0, reduction="none")
    for epoch, share in ((0, 0.0), (3, 0.3), (10, 1.0), (25, 1.0), (None, 1.0)):
        loss = evidential_loss(alpha, target, epoch, reduction="none")
        torch.testing.assert_close(loss - fit, share * kl)
    torch.testing.assert_close(evidential_loss(alpha, target), (fit + kl).mean())
    torch.testing.assert_close(evidential_loss(alpha, target, reduction="sum"), (fit + kl).sum())


@pytest.mark.parametrize("method", ["mse", "digamma"])
def test_evidential_loss_has_the_right_gradient_and_no_nan(method):
    alpha, target = alphas()
    alpha.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: evidential_loss(a, target, 4, method=method), alpha)
    for value in (1.0, 1e6):
        extreme = torch.full((5, C), value, requires_grad=True)
        evidential_loss(extreme, target, method=method).backward()
        assert extreme.grad.isfinite().all()
    assert evidential_loss(torch.ones(0, C), target[:0], method=method) == 0


def test_no_gradient_reaches_a_modality_through_samples_that_lack_it():
    logits = {name: x.requires_grad_() for name, x in make_inputs().items()}
    out = BUILD["evidential"]()(logits, present=PRESENT)
    target = torch.tensor([0, 1, 2, 3])
    alone = [evidential_loss(1 + evidence, target) for evidence in out.per_modality.values()]
    (evidential_loss(out.fused, target) + sum(alone)).backward()
    for s, x in enumerate(logits.values()):
        assert (x.grad[~PRESENT[:, s]] == 0).all() and (x.grad[PRESENT[:, s]] != 0).all()


def test_evidential_fusion_learns_to_doubt_the_modality_that_knows_nothing():
    target = torch.randint(3, (256,))
    inputs = {"text": 3.0 * F.one_hot(target, 3) + 0.3 * torch.randn(256, 3), "image": torch.randn(256, 3)}
    heads = nn.ModuleDict({name: nn.Linear(3, 3) for name in inputs})
    fusion, optimizer = EvidentialFusion(3), torch.optim.Adam(heads.parameters(), lr=0.1)
    for epoch in range(80):
        optimizer.zero_grad()
        out = fusion({name: heads[name](x) for name, x in inputs.items()})
        loss = evidential_loss(out.fused, target, epoch)
        (loss + sum(evidential_loss(1 + e, target, epoch) for e in out.per_modality.values())).backward()
        optimizer.step()
    out = fusion({name: heads[name](x) for name, x in inputs.items()})
    text, image = (3 / (3 + out.per_modality[name].sum(-1)).mean() for name in inputs)
    assert (out.logits.argmax(1) == target).float().mean() > 0.98
    assert text < 0.4 and image > 0.8 and out.uncertainty.mean() < 0.4


# missing-modality tokens

DIMS = {"text": 6, "image": 10, "audio": 4}


def features():
    return {"text": torch.randn(B, 5, 6), "image": torch.randn(B, 10), "audio": torch.randn(B, 3, 4)}


def test_tokens_stand_where_a_modality_is_absent_and_nowhere_else():
    module, inputs = MissingModalityToken(DIMS), features()
    filled, mask, present = module(inputs, None, PRESENT)
    assert present.all() and present.shape == (B, 3) and list(filled) == list(DIMS)
    for s, name in enumerate(DIMS):
        here, token = PRESENT[:, s], module.tokens[name].weight
        assert filled[name].shape == inputs[name].shape
        torch.testing.assert_close(filled[name][here], inputs[name][here], rtol=0, atol=0)
        if name == "image":
            assert mask[name] is None
            torch.testing.assert_close(filled[name][~here], token.expand(int((~here).sum()), -1), rtol=0, atol=0)
        else:
            assert (filled[name][~here][:, 0] == token).all() and (filled[name][~here][:, 1:] == 0).all()
            assert mask[name][here].all() and mask[name][~here].sum(1).eq(1).all() and mask[name][:, 0].all()


def test_token_masks_keep_the_padding_and_make_room_for_more_tokens():
    module, inputs = MissingModalityToken(DIMS, {"text": 2, "image": 3, "audio": 4}), features()
    lengths = torch.tensor([5, 2, 0, 1])  # the third sample says it is absent by having no real token
    del inputs["audio"]
    filled, mask, _ = module(inputs, {"text": lengths}, {"image": PRESENT[:, 0]})
    assert mask["text"].sum(1).tolist() == [5, 2, 2, 1]
    torch.testing.assert_close(filled["text"][2, :2], module.tokens["text"].weight)
    assert filled["image"].shape == (B, 3, 10) and mask["image"].sum(1).tolist() == [1, 1, 3, 3]
    assert filled["audio"].shape == (B, 4, 4) and mask["audio"].all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_token_learns_only_from_samples_that_lack_the_modality(poison):
    module, inputs = MissingModalityToken(DIMS), features()
    inputs["audio"] = inputs["audio"].masked_fill(~PRESENT[:, 2, None, None], poison).requires_grad_()
    filled, _, _ = module(inputs, None, {"audio": PRESENT[:, 2]})
    weight = torch.arange(1.0, B + 1)[:, None, None]
    sum((x * weight.view(-1, *(1,) * (x.dim() - 1))).sum() for x in filled.values()).backward()
    torch.testing.assert_close(module.tokens["audio"].weight.grad, torch.full((1, 4), 2.0 + 3.0 + 4.0))
    assert (module.tokens["text"].weight.grad == 0).all() and (module.tokens["image"].weight.grad == 0).all()
    assert (inputs["audio"].grad[1:] == 0).all() and (inputs["audio"].grad[0] == 1).all()


@pytest.mark.parametrize("build", [lambda: ConcatFusion(DIMS, 8), lambda: MultimodalTransformer(DIMS, 8, 2, 1)])
def test_tokens_go_into_any_fusion_module(build):
    """Fusion modules of other libraries raise when a key is missing: here it may be missing, and learned as well."""
    fusion, token = build(), MissingModalityToken(DIMS)
    inputs = {name: x.masked_fill(~PRESENT[:, s].view(-1, *(1,) * (x.dim() - 1)), math.nan)
              for s, (name, x) in enumerate(features().items())}  # fmt: skip
    del inputs["image"]
    out = fusion(*token(inputs, None, PRESENT)).fused
    out.square().sum().backward()
    for parameter in token.parameters():
        assert parameter.grad.isfinite().all() and (parameter.grad != 0).any()
    for b in range(B):  # and alone as in the batch
        alone = {name: x[b : b + 1] for name, x in inputs.items()}
        torch.testing.assert_close(fusion(*token(alone, None, PRESENT[b : b + 1])).fused, out[b : b + 1])
    with torch.no_grad():
        for parameter in token.parameters():
            parameter.add_(1.0)
    assert not torch.allclose(fusion(*token(inputs, None, PRESENT)).fused[3], out[3])


def test_tokens_stay_vectors_for_modules_that_take_only_those():
    token = MissingModalityToken(dict.fromkeys(NAMES, C))
    inputs = make_inputs()
    del inputs["image"]
    out = LateFusion(NAMES, C)(*token(inputs, None, PRESENT))
    logits = torch.stack([inputs["text"][1], *(token.tokens[n].weight[0] for n in ("image", "audio"))])
    torch.testing.assert_close(out.logits[1].exp(), logits.softmax(-1).mean(0))


def test_tokens_compile_in_one_graph_and_travel_in_the_state_dict():
    module, inputs = MissingModalityToken(DIMS, 2), features()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs, None, PRESENT), module(inputs, None, PRESENT))
    other = MissingModalityToken(DIMS, 2)
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(inputs, None, PRESENT), module(inputs, None, PRESENT), rtol=0, atol=0)


def test_modality_dropout_trains_tokens_on_data_that_lacks_nothing():
    module, drop = MissingModalityToken(DIMS), ModalityDropout(0.5)
    filled, _, _ = module(features(), None, drop(torch.ones(B, 3, dtype=torch.bool)))
    sum(x.sum() for x in filled.values()).backward()
    assert any((p.grad != 0).any() for p in module.parameters())


# OGM-GE


def two_encoders(names=("image", "audio")):
    return {name: nn.Linear(5, C) for name in names}


def backward(encoders, batch=8):
    logits = {name: encoder(torch.randn(batch, 5)) for name, encoder in encoders.items()}
    sum(x.square().mean() for x in logits.values()).backward()
    return logits


def test_the_modality_ahead_is_slowed_by_the_papers_coefficient():
    encoders = two_encoders()
    backward(encoders)
    before = {name: copy.deepcopy([p.grad for p in e.parameters()]) for name, e in encoders.items()}
    target = torch.randint(C, (8,))
    logits = {"image": torch.randn(8, C) + 3 * F.one_hot(target, C), "audio": torch.randn(8, C)}
    k = OGMGE(encoders, alpha=0.3, noise=False)(logits, target)
    score = {n: x.softmax(-1)[torch.arange(8), target].sum() for n, x in logits.items()}
    expected = 1 - torch.tanh(0.3 * score["image"] / score["audio"])
    torch.testing.assert_close(k, {"image": expected, "audio": torch.tensor(1.0)})
    assert expected < 0.9
    for name, encoder in encoders.items():
        for parameter, grad in zip(encoder.parameters(), before[name]):
            torch.testing.assert_close(parameter.grad, grad * k[name])


def test_a_modality_is_compared_with_the_others_on_the_samples_they_share():
    """A microphone that is on only for the easy samples looks strong; on those samples the camera is stronger."""
    easy = torch.arange(8) < 4
    target = torch.zeros(8, dtype=torch.long)
    right = F.one_hot(target, C)
    logits = {"image": torch.where(easy[:, None], 4.0, 0.0) * right, "audio": 3.0 * right}
    score = {name: x.softmax(-1)[:, 0] for name, x in logits.items()}
    assert score["audio"][:4].mean() > score["image"].mean()
    present = torch.stack([torch.ones(8, dtype=torch.bool), easy], 1)
    k = OGMGE(two_encoders(), noise=False)(logits, target, present)
    ratio = score["image"][:4].sum() / score["audio"][:4].sum()
    torch.testing.assert_close(k, {"image": 1 - torch.tanh(0.5 * ratio), "audio": torch.tensor(1.0)})


def test_three_modalities_are_compared_with_the_mean_of_the_others():
    names, target = ("text", "image", "audio"), torch.randint(C, (8,))
    logits = {name: torch.randn(8, C) for name in names}
    logits["text"] = logits["text"] + 2 * F.one_hot(target, C)
    present = torch.rand(8, 3) < 0.7
    k = OGMGE(two_encoders(names), alpha=0.2, noise=False)(logits, target, present)
    score = torch.stack([logits[n].softmax(-1)[torch.arange(8), target] for n in names], 1)
    for s, name in enumerate(names):
        mine = theirs = 0.0
        for b in range(8):
            others = [score[b, t] for t in range(3) if t != s and present[b, t]]
            if present[b, s] and others:
                mine, theirs = mine + score[b, s], theirs + sum(others) / len(others)
        rho = mine / theirs
        torch.testing.assert_close(k[name], 1 - torch.tanh(0.2 * rho) if rho > 1 else torch.tensor(1.0))
    assert k["text"] < 1


def test_absent_and_unlabelled_samples_do_not_count():
    target = torch.tensor([0, 1, 2, 3, -100, -100, 0, 1])
    logits = {name: torch.randn(8, C) for name in ("image", "audio")}
    kept = {name: x[:4] for name, x in logits.items()}
    present = torch.ones(8, 2, dtype=torch.bool)
    present[6:, 1] = False
    logits["audio"][6:] = math.nan
    encoders = two_encoders()
    torch.testing.assert_close(
        OGMGE(encoders, noise=False)(logits, target, present), OGMGE(encoders, noise=False)(kept, target[:4])
    )


def test_nobody_to_compare_with_changes_nothing():
    encoders = two_encoders()
    logits, target = backward(encoders), torch.zeros(8, dtype=torch.long)
    before = copy.deepcopy([p.grad for e in encoders.values() for p in e.parameters()])
    gone = torch.zeros(8, 2, dtype=torch.bool)
    balance = OGMGE(encoders, noise=False)
    for given, present in ((logits, gone), ({"image": logits["image"]}, None), ({}, gone)):
        assert all(k == 1 for k in balance(given, target, present).values())
    torch.testing.assert_close([p.grad for e in encoders.values() for p in e.parameters()], before, rtol=0, atol=0)


def test_noise_is_as_large_as_the_gradient_was_and_repeats_with_its_seed():
    encoders = {"image": nn.Linear(100, 200), "audio": nn.Linear(100, 200)}
    target = torch.zeros(8, dtype=torch.long)
    logits = {"image": 4.0 * F.one_hot(target, C), "audio": torch.zeros(8, C)}
    results = []
    for seed in (1, 1, 2):
        for encoder in encoders.values():
            for parameter in encoder.parameters():
                parameter.grad = torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
        encoders["audio"].bias.grad = None  # nothing to modulate
        encoders["audio"].weight.grad.zero_()  # a modality that nobody had: gradient 0, and it stays 0
        k = OGMGE(encoders, generator=torch.Generator().manual_seed(seed))(logits, target)
        results.append(encoders["image"].weight.grad.clone())
        assert (encoders["audio"].weight.grad == 0).all() and encoders["audio"].bias.grad is None
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    clean = torch.linspace(-1, 1, 20000).view(200, 100)
    noise = results[0] - k["image"] * clean
    assert abs(noise.mean()) < 5 * clean.std() / 20000**0.5
    assert abs(noise.std() / clean.std() - 1) < 0.03


def test_a_single_number_parameter_gets_no_nan():
    """The sample standard deviation of one number is NaN, and would wipe out a gate or a temperature."""
    encoders = {"image": nn.Linear(1, 1, bias=False), "audio": nn.Linear(1, 1, bias=False)}
    for encoder in encoders.values():
        encoder.weight.grad = torch.ones(1, 1)
    OGMGE(encoders)({name: torch.randn(2, C) for name in encoders}, torch.tensor([0, 1]))
    assert all(encoder.weight.grad.isfinite().all() for encoder in encoders.values())


def test_modulation_leaves_the_slow_modality_time_to_learn():
    """Two modalities say the same, one ten times louder: left alone it satisfies the loss and the other stays raw."""
    target = torch.randint(2, (128,))
    signal = (2.0 * target - 1)[:, None] + 0.5 * torch.randn(128, 1)
    inputs = {"image": 3 * signal, "audio": 0.3 * signal}
    learned = {}
    for modulated in (False, True):
        torch.manual_seed(1)
        encoders = {name: nn.Linear(1, 2) for name in inputs}
        optimizer = torch.optim.SGD([p for e in encoders.values() for p in e.parameters()], lr=0.1)
        balance = OGMGE(encoders, alpha=1.0, noise=False)
        for _ in range(100):
            optimizer.zero_grad()
            logits = {name: encoders[name](x) for name, x in inputs.items()}
            F.cross_entropy(sum(logits.values()), target).backward()
            if modulated:
                balance(logits, target)
            optimizer.step()
        learned[modulated] = F.cross_entropy(encoders["audio"](inputs["audio"]), target).item()
    assert learned[True] < learned[False]


# errors


@pytest.mark.parametrize(("error", "message", "build"), [
    (TypeError, "names must be a sequence of names, got the single str", lambda: StackingFusion("text", C)),
    (TypeError, "names must be a sequence of names, got int", lambda: ProductOfExperts(3, C)),
    (ValueError, "names must not repeat", lambda: ProductOfExperts(["a", "a"], C)),
    (ValueError, "names must name at least one", lambda: StackingFusion([], C)),
    (ValueError, "num_classes must be positive, got 0", lambda: EvidentialFusion(0)),
    (TypeError, "num_classes must be an int, got list", lambda: EvidentialFusion(NAMES)),
    (ValueError, "hidden must be positive", lambda: StackingFusion(NAMES, C, 0)),
    (ValueError, "dim must be positive", lambda: ProductOfExperts(NAMES, -1)),
    (ValueError, "evidence must be one of", lambda: EvidentialFusion(C, evidence="exp")),
    (TypeError, "inputs must be a dict", lambda: ProductOfExperts(NAMES, 3)(torch.ones(2, 6))),
    (TypeError, r"inputs\['text'\] must be a pair \(mean, logvar\) or a tensor \(B, 6\), got int",
     lambda: ProductOfExperts(NAMES, 3)({"text": 3})),
    (TypeError, r"inputs\['text'\] must have a tensor as its logvar",
     lambda: ProductOfExperts(NAMES, 3)({"text": (torch.ones(2, 3), 0.0)})),
    (ValueError, r"inputs\['text'\] must have a mean of shape \(B, 3\), got \(2, 4\)",
     lambda: ProductOfExperts(NAMES, 3)({"text": (torch.ones(2, 4), torch.ones(2, 4))})),
    (ValueError, r"mean and logvar of one shape, got \(2, 3\) and \(1, 3\)",
     lambda: ProductOfExperts(NAMES, 3)({"text": (torch.ones(2, 3), torch.ones(1, 3))})),
    (ValueError, "inputs is empty and present is not given", lambda: EvidentialFusion(C)({})),
    (TypeError, "inputs must be a dict", lambda: EvidentialFusion(C)(torch.ones(2, C))),
    (ValueError, "method must be one of", lambda: evidential_loss(torch.ones(2, C), torch.ones(2), method="kl")),
    (ValueError, "reduction must be", lambda: evidential_loss(torch.ones(2, C), torch.ones(2), reduction="max")),
    (TypeError, "alpha must be a floating", lambda: evidential_loss(torch.ones(2, C).long(), torch.ones(2))),
    (ValueError, r"alpha must have shape \(B, K\)", lambda: evidential_loss(torch.ones(C), torch.ones(2))),
    (TypeError, "target must be an integer", lambda: evidential_loss(torch.ones(2, C), torch.ones(2))),
    (ValueError, r"target must have shape \(2,\)", lambda: evidential_loss(torch.ones(2, C), torch.ones(2, C).long())),
    (ValueError, "epoch must be at least 0", lambda: evidential_loss(torch.ones(2, C), torch.tensor([0, 1]), -1)),
    (ValueError, "annealing_epochs must be", lambda: evidential_loss(torch.ones(2, C), torch.tensor([0, 1]), 1, 0)),
    (ValueError, "num_tokens must be positive", lambda: MissingModalityToken(DIMS, 0)),
    (ValueError, "num_tokens must name the modalities", lambda: MissingModalityToken(DIMS, {"text": 1})),
    (ValueError, r"inputs has unknown modalities", lambda: MissingModalityToken(DIMS)({"smell": torch.ones(2, 3)})),
    (TypeError, "encoders must be a dict", lambda: OGMGE([nn.Linear(1, 1)])),
    (ValueError, "alpha must be positive", lambda: OGMGE(two_encoders(), alpha=0)),
    (ValueError, "encoders must not share parameters, got one in 'a' and 'b'",
     lambda: OGMGE(dict.fromkeys("ab", nn.Linear(1, 1)))),
    (TypeError, "logits must be a dict", lambda: OGMGE(two_encoders())(torch.ones(2, C), torch.tensor([0, 1]))),
    (ValueError, r"logits has unknown modalities \['text'\]",
     lambda: OGMGE(two_encoders())({"text": torch.ones(2, C)}, torch.tensor([0, 1]))),
    (TypeError, "target must be an integer",
     lambda: OGMGE(two_encoders())({"image": torch.ones(2, C)}, torch.ones(2))),
])  # fmt: skip
def test_a_bad_argument_is_named_in_one_sentence(error, message, build):
    with pytest.raises(error, match=message) as raised:
        build()
    assert "\n" not in str(raised.value)
