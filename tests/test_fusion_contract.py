"""The contract every fusion module keeps, whatever it computes: presence, padding, gradients, saving, compiling.

The modules are in the table `fusion_modules.CASES`; what each one computes is tested in files of its own.
"""

from __future__ import annotations

import copy
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from fusion_modules import (
    CASES,
    DIMS,
    LISTED,
    B,
    C,
    Case,
    loss_of,
    make,
    make_inputs,
    presence,
    public,
    result,
    tensors,
)
from inside import Inside
from torch import Tensor, nn

import attnfuse.fusion as af
from attnfuse.fusion import FusionOutput
from attnfuse.nn.modalities import gather_modalities

every = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_with_tokens = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in CASES.items() if case.tokens]
)
# Compiling is slow: one case for each class, the last.
every_class = pytest.mark.parametrize(
    "case", {case.name: pytest.param(case, id=name) for name, case in CASES.items()}.values()
)


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


def poisoned(case: Case, inputs: dict[str, Tensor], present: Tensor, poison: float) -> dict[str, Tensor]:
    """The inputs as leaves, with `poison` wherever a sample lacks the modality."""
    leaves = {}
    for name, x in inputs.items():
        if name in case.dims:
            gone = ~present[:, case.names.index(name)].view(-1, *(1,) * (x.dim() - 1))
            x = x.masked_fill(gone, poison)
        leaves[name] = x.clone().requires_grad_()
    return leaves


def without(case: Case, inputs: dict[str, Tensor], name: str):
    """The arguments of a call in which `name` is missing and the others come in another order.

    `present` is given only where the batch would be unknown.
    """
    rest = {other: x for other, x in reversed(inputs.items()) if other != name}
    return (rest,) if rest else (rest, None, torch.ones(B, len(case.dims), dtype=torch.bool))


def finite(gradients) -> bool:
    return all(g is None or bool(g.isfinite().all()) for g in gradients)


# the table


@pytest.mark.parametrize("name", LISTED)
def test_every_module_is_there_and_has_a_case(name):
    """A module that could not be imported would otherwise only be missing from the other tests."""
    assert issubclass(public(name), nn.Module) and name in af.__all__
    assert any(case.name == name for case in CASES.values())


@pytest.mark.parametrize("name", ["ModalityDropout", "OGMGE", "evidential_loss", "source_balance_loss"])
def test_training_aids_are_exported(name):
    assert callable(getattr(af, name)) and name in af.__all__


def test_every_exported_module_has_a_case():
    exported = {name for name in af.__all__ if isinstance(getattr(af, name), type)}
    modules = {name for name in exported if issubclass(getattr(af, name), nn.Module)}
    assert modules - {case.name for case in CASES.values()} <= {"ModalityDropout"}  # it takes no inputs


@every
def test_present_modalities_matter_and_fields_have_their_shapes(case):
    """The other tests compare outputs; this one makes sure there is something to compare."""
    module, inputs = make(case), make_inputs(case)
    base = module(inputs)
    assert result(base).shape == (B, *case.size)
    assert base.per_modality is None or list(base.per_modality) == case.names
    assert base.uncertainty is None or base.uncertainty.shape == (B,)
    assert base.source_mass is None or base.source_mass.shape == (B, len(case.dims))
    for s, name in enumerate(case.names):
        x = inputs[name].clone()
        x[0] = -3 * x[0]
        changed = result(module(inputs | {name: x}))
        if not case.flat:
            assert not torch.allclose(changed[0], result(base)[0], atol=1e-3)
        torch.testing.assert_close(changed[1:], result(base)[1:])
        less = module(*without(case, inputs, name))
        assert not torch.allclose(result(less), result(base), atol=1e-4)
        if base.source_mass is not None:
            assert (base.source_mass[:, s] > 0).all() and (less.source_mass[:, s] == 0).all()
            others = torch.full((B,), len(case.dims) - 1.0)
            expected = case.masses(others) if len(case.dims) > 1 else others
            torch.testing.assert_close(less.source_mass.sum(1), expected)


# absence


@every
def test_absence_has_one_meaning_whichever_way_it_is_said(case):
    module, inputs = make(case), make_inputs(case)
    name, everybody = case.names[0], torch.ones(B, len(case.dims), dtype=torch.bool)
    missing = module(*without(case, inputs, name))
    gone, others = torch.zeros(B, dtype=torch.bool), everybody.clone()
    others[:, 0] = False
    said = [{"present": others}, {"present": {name: gone}}]
    if name in case.tokens:
        said += [
            {"mask": {name: torch.zeros(B, case.tokens[name], dtype=torch.bool)}},
            {"mask": {name: gone.long()}, "present": everybody},
        ]
    for how in said:
        output = module(inputs, **how)
        torch.testing.assert_close(result(output), result(missing))
        torch.testing.assert_close(output.uncertainty, missing.uncertainty)
        torch.testing.assert_close(output.source_mass, missing.source_mass)
        assert output.per_modality is None or (output.per_modality[name] == 0).all()


@every
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_what_an_absent_input_holds_reaches_nothing(case, poison):
    module, inputs, present = make(case), make_inputs(case), presence(case)
    seen = []
    for fill in (0.0, poison):
        module.zero_grad()
        leaves = poisoned(case, inputs, present, fill)
        output = module(leaves, present=present)
        loss_of(output).backward()
        seen.append([tensors(output), [x.grad for x in leaves.values()], [p.grad for p in module.parameters()]])
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=0)
    assert finite(x.grad for x in leaves.values()) and finite(p.grad for p in module.parameters())
    for s, name in enumerate(case.names):
        gradient = leaves[name].grad
        assert (gradient[~present[:, s]] == 0).all()
        assert (gradient[present[:, s]] != 0).any()


@every
def test_parameters_of_a_modality_that_nobody_has_get_gradient_zero(case):
    """Zero, and neither NaN nor None: an optimizer with momentum and DistributedDataParallel both see it."""
    module, inputs, last = make(case), make_inputs(case), case.names[-1]
    gone = torch.zeros(B, dtype=torch.bool)
    nan = inputs | {last: torch.full_like(inputs[last], math.nan)}
    less, *rest = without(case, inputs, last)
    for given, how in ((nan, (None, {last: gone})), (less, rest)):
        leaves = {name: x.clone().requires_grad_() for name, x in given.items()}  # some modules have no parameters
        module.zero_grad()
        loss = loss_of(module(leaves, *how))
        if not loss.requires_grad:
            continue
        loss.backward()
        met = set()
        for name, parameter in module.named_parameters():
            zero = parameter.grad is not None and bool((parameter.grad == 0).all())
            still = [part for part in case.still if part in name]
            moves = [part for part in case.moves if part in name and "position" not in name and not still]
            met |= {*still, *moves}
            assert zero if still else not (moves and zero), name
            assert finite([parameter.grad]), name
        unmatched = {*case.still, *case.moves} - met - {".audio.", ".image."}
        assert not unmatched, f"no parameter is called {unmatched}"


@every
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_all_absent_gives_the_neutral_output(case):
    module, inputs = make(case), make_inputs(case)
    nobody = torch.zeros(B, len(case.dims), dtype=torch.bool)
    leaves = poisoned(case, inputs, nobody, math.nan)
    with torch.autograd.detect_anomaly(check_nan=True):  # not even a gradient on the way may be NaN
        output = module(leaves, present=nobody)
        loss = loss_of(output)
        if loss.requires_grad:
            loss.backward()
    assert all(x.isfinite().all() for x in tensors(output))
    assert output.source_mass is None or (output.source_mass == 0).all()
    assert all((x.grad == 0).all() for name, x in leaves.items() if name in case.dims and x.grad is not None)
    assert finite(p.grad for p in module.parameters())
    scores = getattr(module, "scores", None)  # of LateFusion: nobody's weights are asked for
    assert scores is None or (scores.grad == 0).all()
    anchors = {name: leaves[name] for name in case.anchors}
    torch.testing.assert_close(result(module(anchors, present=nobody)), result(output))
    if not case.anchors:
        torch.testing.assert_close(result(output), result(output)[:1].expand(B, *case.size))
    if case.neutral is not None:
        torch.testing.assert_close(result(output), case.neutral(module, inputs).expand(B, *case.size))


# padding and batches


@every_with_tokens
@pytest.mark.parametrize("shortest", [1, 0])
def test_padding_is_as_if_it_were_not_there(case, shortest):
    module, inputs = make(case), make_inputs(case)
    lengths = {name: torch.tensor([n, 3, shortest, n - 2]) for name, n in case.tokens.items()}
    real = {name: torch.arange(n) < lengths[name][:, None] for name, n in case.tokens.items()}
    leaves = {
        name: x.masked_fill(~real[name][..., None], math.nan).requires_grad_() if name in real else x
        for name, x in inputs.items()
    }
    by_length = module(leaves, lengths)
    by_mask = module(leaves, real | {name: None for name in case.dims if name not in real})
    torch.testing.assert_close(tensors(by_length), tensors(by_mask), rtol=0, atol=0)
    loss_of(by_length).backward()
    for name, keep in real.items():
        assert (leaves[name].grad[~keep] == 0).all() and leaves[name].grad.isfinite().all()
    assert finite(p.grad for p in module.parameters())
    for b in range(B):
        short = {name: x[b : b + 1] for name, x in inputs.items()}
        for name in real:
            short[name] = short[name][:, : lengths[name][b]]
        alone = module(short)
        torch.testing.assert_close(result(by_length)[b : b + 1], result(alone))
        for name, x in (alone.per_modality or {}).items():
            padded = by_length.per_modality[name]
            if name in real and padded.shape[:2] == real[name].shape:  # a token for each that came in
                torch.testing.assert_close(padded[b, : x.shape[1]], x[0])
                assert (padded[b, x.shape[1] :] == 0).all()


@every
def test_a_sample_alone_equals_itself_in_a_batch(case):
    module, inputs, present = make(case).train(), make_inputs(case), presence(case)
    together = module(inputs, present=present)
    for b in range(B):
        here = {name for name, is_here in zip(case.dims, present[b].tolist(), strict=True) if is_here}
        alone = {name: x[b : b + 1] for name, x in inputs.items() if name in here or name in case.anchors}
        output = module(alone, present=present[b : b + 1])
        torch.testing.assert_close(result(output), result(together)[b : b + 1])
        for mine, ours in ((output.source_mass, together.source_mass), (output.uncertainty, together.uncertainty)):
            assert (mine is None) == (ours is None)
            assert mine is None or torch.allclose(mine, ours[b : b + 1], atol=1e-6)


# saving, training, using


def leaves_of(loss: Tensor) -> list[Tensor]:
    """Every tensor that a gradient of `loss` arrives at."""
    found, seen, todo = [], set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [parent for parent, _ in node.next_functions]
    return found


def test_a_parameter_in_a_plain_list_would_be_noticed():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.factors = [nn.Parameter(torch.randn(3))]

        def forward(self, x):
            return (x * self.factors[0]).sum()

    module = Hidden()
    (leaf,) = leaves_of(module(torch.randn(3)))
    assert leaf is module.factors[0] and not list(module.parameters())


@every
def test_all_that_trains_is_a_parameter_and_is_saved(case):
    """Factors kept in a plain list get gradients, and yet are never trained, moved to a device or saved.

    The low-rank tensor fusions of two widely used libraries do that. So this follows the graph to every tensor
    that a gradient arrives at, and asks whether the module knows it.
    """
    module, inputs = make(case), make_inputs(case)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    loss = loss_of(module(leaves, present=presence(case)))
    known = {id(p) for p in module.parameters()} | {id(x) for x in leaves.values()}
    assert all(id(leaf) in known for leaf in leaves_of(loss))
    loss.backward()
    saved = module.state_dict()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    if before:
        torch.optim.SGD(module.parameters(), lr=0.1).step()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert not torch.equal(parameter, before[name]), f"{name} did not train"
        assert saved[name].data_ptr() == parameter.data_ptr(), f"{name} is saved as something else"


@every
def test_state_dict_carries_everything(case):
    module, inputs = make(case), make_inputs(case)
    torch.manual_seed(1)
    other = case.build()
    missing = other.load_state_dict(module.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    torch.testing.assert_close(tensors(other(inputs)), tensors(module(inputs)), rtol=0, atol=0)


class Classifier(nn.Module):
    """A fusion module with what it needs around it to be trained."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(
            {name: nn.Linear(DIMS[name], dim) for name, dim in case.dims.items()} if case.logits_in else {}
        )
        self.fusion = case.build()
        size = math.prod(case.size)
        self.head = nn.Identity() if case.logits_in and size == C else nn.Linear(size, C)

    def forward(self, inputs: dict[str, Tensor], present: Tensor) -> Tensor:
        if self.heads:
            inputs = {name: self.heads[name](x) for name, x in inputs.items()}
        output = self.fusion(inputs, present=present)
        return self.head((result(output) if output.logits is None else output.logits).flatten(1))


@every
def test_training_with_dropped_modalities_lowers_the_loss(case):
    samples = 32
    inputs = {name: torch.randn(samples, *shape) for name, shape in case.anchors.items()}
    for name, dim in (DIMS if case.logits_in else case.dims).items():
        # one token is enough, and a vector is one token, but blocks take only tokens
        inputs[name] = torch.randn(samples, 1, dim) if name in case.tokens else torch.randn(samples, dim)
    first = case.names[0]
    target = inputs[first].view(samples, -1)[:, :C].argmax(1)
    model, drop = Classifier(case), af.ModalityDropout(0.3)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    everyone = torch.ones(samples, len(case.dims), dtype=torch.bool)

    def loss(present):
        return F.cross_entropy(model(inputs, present), target)

    before = loss(everyone).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss(drop(everyone)).backward()
        optimizer.step()
    assert loss(everyone).item() < 0.8 * before


@every
def test_a_module_can_be_used_twice_before_backward_and_keeps_nothing(case):
    """Weight sharing, two views of one sample, gradient checkpointing: all call a module again."""
    module, inputs, present = make(case), make_inputs(case), presence(case)
    twin, other = copy.deepcopy(module), make_inputs(case, 2)
    state = {name: x.clone() for name, x in module.state_dict().items()}
    first = module(inputs, present=present)
    second = module(other)
    torch.testing.assert_close(tensors(module(inputs, present=present)), tensors(first), rtol=0, atol=0)
    torch.testing.assert_close(tensors(second), tensors(twin(other)), rtol=0, atol=0)
    torch.testing.assert_close(dict(module.state_dict()), state, rtol=0, atol=0)
    if not state:
        return
    (loss_of(first) + loss_of(second)).backward()
    loss_of(twin(inputs, present=present)).backward()
    loss_of(twin(other)).backward()
    torch.testing.assert_close([p.grad for p in module.parameters()], [p.grad for p in twin.parameters()])


# bad calls


def bad_calls():
    good = make_inputs(CASES["concat"], 2)
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
        (TypeError, r"present\['text'\] must be a bool", (good,), {"present": {"text": boolean[:, 0].long()}}),
        (ValueError, r"present\['text'\] must have shape \(2,\)", (good,), {"present": {"text": boolean}}),
    ]


@pytest.mark.parametrize("number", range(len(bad_calls())))
def test_a_bad_call_gets_one_sentence_naming_the_argument(number):
    error, message, arguments, options = bad_calls()[number]
    for case in CASES.values():
        if case.dims == DIMS and not case.anchors:
            with pytest.raises(error, match=message) as raised:
                case.build()(*arguments, **options)
            assert "\n" not in str(raised.value)


# precision and compiling


@every
def test_autocast_stays_within_twice_the_error_of_bfloat16(case):
    module, inputs, present = make(case), make_inputs(case), presence(case)

    def run(dtype):
        cast = {name: x.to(dtype) for name, x in inputs.items()}
        return result(copy.deepcopy(module).to(dtype)(cast, present=present)).double()

    exact, low = run(torch.float64), run(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module({name: x.requires_grad_() for name, x in inputs.items()}, present=present)
    loss_of(output).backward()
    assert all(x.isfinite().all() for x in tensors(output))
    assert finite(p.grad for p in module.parameters()) and finite(x.grad for x in inputs.values())
    budget = 2 * (low - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (result(output).double() - exact).abs().max() <= budget


def compiled(module: nn.Module, backend: str) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(module, backend=backend, fullgraph=True)


@every_class
def test_compiled_without_graph_breaks_equals_eager(case):
    module, inputs, present = make(case), make_inputs(case), presence(case)
    mask = {name: torch.tensor([n, 3, 1, n - 2]) for name, n in case.tokens.items()}
    seen = []
    for call in (module, compiled(module, "aot_eager")):
        module.zero_grad()
        leaves = poisoned(case, inputs, present, math.nan)
        output = call(leaves, mask or None, present)
        loss_of(output).backward()
        seen.append([tensors(output), [x.grad for x in leaves.values()], [p.grad for p in module.parameters()]])
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++: torch's inductor makes C++ of a module for the CPU")
def test_compiled_to_machine_code_equals_eager():
    """One module, forward only, because the C++ compiler takes long; the test above has every backward."""
    case = CASES["pool"]
    module, inputs, present = make(case), make_inputs(case), presence(case)
    leaves = poisoned(case, inputs, present, math.nan)
    with torch.no_grad():
        actual = tensors(compiled(module, "inductor")(leaves, {"text": torch.tensor([7, 3, 1, 5])}, present))
        expected = tensors(module(leaves, {"text": torch.tensor([7, 3, 1, 5])}, present))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# nothing is concatenated


class JoinWatch(Inside):
    """Notes every concatenation and stack of floating-point tensors, however it is spelled in Python.

    Heads (B, H, N, D) that are copied piece by piece into one buffer count as well: that is a concatenation too.
    """

    JOINS = (torch.ops.aten.cat.default, torch.ops.aten.stack.default)

    def __init__(self) -> None:
        super().__init__()
        self.ranks: set[int] = set()
        self.pieces: dict[int, list[Tensor]] = {}  # the tensors too, so that no address is used again

    def saw(self, func, args, made):
        if func in self.JOINS and len(args[0]) > 1:
            first = args[0][0]
            # a column (..., 1) is a statistic of each row, such as a mass, and no key
            if first.is_floating_point() and first.shape[-1] != 1:
                self.ranks.add(first.dim())
        if func is torch.ops.aten.copy_.default and args[0].is_floating_point() and args[0].dim() == 4:
            buffer = args[0].untyped_storage()
            if args[0].nbytes < buffer.nbytes():
                pieces = self.pieces.setdefault(buffer.data_ptr(), [])
                pieces.append(args[0])
                if len({piece.storage_offset() for piece in pieces}) > 1:
                    self.ranks.add(4)


# What may be joined, by class or case: the highest rank, and why it is no keys or values of several sources.
JOINS: dict[str, tuple[int, str]] = {
    "ConcatFusion": (2, "the contributions (B, E) of the modalities, to add them up"),
    "SumFusion": (2, "the contributions (B, E) of the modalities, to add them up"),
    "GatedMultimodalUnit": (2, "pooled vectors (B, E) and their gates: feature level, no attention"),
    "LowRankTensorFusion": (2, "factors (B, rank * E) of pooled vectors, to multiply them: no attention"),
    "cross-per-source": (3, "the log-sum-exp (B, H, Nq) of each source's own softmax, to add them up"),
    "decoupled": (3, "the log-sum-exp (B, H, Nq) of each source's own softmax, to add them up"),
    "crossmodal-pairwise": (3, "what one target read from each partner, to average it"),
    "BottleneckFusion": (3, "the modalities' updates of the bottleneck, to average them; and pooled vectors"),
    "LateFusion": (2, "predictions (B, C): decision level, no attention"),
    "StackingFusion": (2, "predictions (B, C): decision level, no attention"),
    "ProductOfExperts": (2, "means and log variances (B, D): decision level, no attention"),
    "EvidentialFusion": (2, "evidence (B, C): decision level, no attention"),
    "MissingModalityToken": (2, "in the ConcatFusion that the test puts after it"),
    "CoAttentionBlock": (2, "in the test's adapter: pooled streams side by side"),
    "JointAttention": (2, "in the test's adapter: pooled streams side by side"),
    "MMDiTBlock": (2, "in the test's adapter: pooled streams side by side"),
}


def joined(case: Case) -> set[int]:
    module, inputs = make(case), make_inputs(case)
    with JoinWatch() as watch:
        module(inputs)
        module(inputs, present=presence(case))
    return watch.ranks


@pytest.mark.parametrize("name", CASES)
def test_sources_are_never_concatenated(name):
    """A copy of every key and value for each attention call is what a list of sources is there to avoid."""
    case = CASES[name]
    highest, _ = JOINS.get(name, JOINS.get(case.name, (0, "")))
    assert max(joined(case), default=0) <= highest


@pytest.mark.parametrize("name", JOINS)
def test_every_exception_is_used(name):
    highest = max(max(joined(case), default=0) for key, case in CASES.items() if name in (key, case.name))
    assert highest == JOINS[name][0], "the exception is wider than what it is for"


@pytest.mark.parametrize("join", [torch.cat, torch.concat, torch.stack, torch.hstack, lambda x: torch.vstack(x)])
def test_the_watch_sees_every_spelling(join):
    tokens = [torch.randn(2, 3, 4), torch.randn(2, 3, 4)]
    with JoinWatch() as watch:
        join(tokens)
    assert watch.ranks == {3}


def test_the_watch_sees_keys_copied_into_one_buffer():
    keys = [torch.randn(2, 4, 3, 8), torch.randn(2, 4, 5, 8)]
    with JoinWatch() as watch:
        together = torch.empty(2, 4, 8, 8)
        together[:, :, :3] = keys[0]
        assert not watch.ranks
        together[:, :, 3:] = keys[1]
    assert watch.ranks == {4}


def test_the_watch_looks_inside_attention():
    """The einsum reference is the one backend that may concatenate: it is written to be read."""
    module, inputs = af.MultimodalTransformer(DIMS, 16, 4, 1, backend="reference"), make_inputs(CASES["transformer"])
    with JoinWatch() as watch:
        module(inputs)
    assert 4 in watch.ranks


# the tests above can fail


class Flawed(nn.Module):
    """A sum of projected modalities with one mistake that fusion modules in use make, or none."""

    def __init__(self, flaw: str = "") -> None:
        super().__init__()
        self.flaw, self.last = flaw, 0.0
        proj = {name: nn.Linear(dim, 16, bias=flaw == "counts absent") for name, dim in DIMS.items()}
        self.proj = nn.ModuleDict(proj)
        self.hidden = [nn.Parameter(torch.ones(16))] if flaw == "trains in secret" else []
        self.register_buffer("scale", torch.rand(16) + 0.5, persistent=flaw != "is not saved")

    def forward(self, inputs, mask=None, present=None):
        if self.flaw == "wants every key":
            inputs = {name: inputs[name] for name in DIMS}
        views = gather_modalities(inputs, DIMS, mask, present)
        if self.flaw == "multiplies by 0":
            pooled = {name: view.present[:, None] * self._read(inputs.get(name), view) for name, view in views.items()}
        elif self.flaw == "counts padding":
            pooled = {name: view.tokens.sum(1) / max(1, view.tokens.shape[1]) for name, view in views.items()}
        else:
            pooled = {name: view.pooled() for name, view in views.items()}
        fused = sum(self.proj[name](x) for name, x in pooled.items()) * self.scale
        for factor in self.hidden:
            fused = fused * factor
        if self.flaw == "looks around":
            fused = fused - fused.detach().max()
        elif self.flaw == "remembers":
            fused, self.last = fused + self.last, fused.detach()[:1]
        elif self.flaw == "divides":
            fused = fused * torch.nan_to_num(1 / torch.stack([v.present for v in views.values()], 1).sum(1))[:, None]
            fused = torch.where(fused.abs().sum(1, keepdim=True) > 0, fused / fused.norm(dim=1, keepdim=True), 0.0)
        elif self.flaw == "asks a tensor":
            fused = fused * 2 if fused.sum() > 0 else fused
        elif self.flaw == "concatenates":
            fused = fused + 0 * torch.cat([x.view(len(x), -1, 2) for x in pooled.values()], 1).sum((1, 2))[:, None]
        return FusionOutput(fused=fused)

    @staticmethod
    def _read(x, view):
        return view.pooled() if x is None else x.view(len(x), -1, x.shape[-1]).mean(1)


def never_concatenates(case):
    assert not any(rank > 2 for rank in joined(case))


def poisoned_with_nan(case):
    test_what_an_absent_input_holds_reaches_nothing(case, math.nan)


def padded(case):
    test_padding_is_as_if_it_were_not_there(case, 1)


NOTICED_BY = {
    "wants every key": test_present_modalities_matter_and_fields_have_their_shapes,
    "multiplies by 0": poisoned_with_nan,
    "counts absent": test_all_absent_gives_the_neutral_output,
    "divides": test_all_absent_gives_the_neutral_output,
    "counts padding": padded,
    "looks around": test_a_sample_alone_equals_itself_in_a_batch,
    "trains in secret": test_all_that_trains_is_a_parameter_and_is_saved,
    "is not saved": test_state_dict_carries_everything,
    "remembers": test_a_module_can_be_used_twice_before_backward_and_keeps_nothing,
    "asks a tensor": test_compiled_without_graph_breaks_equals_eager,
    "concatenates": never_concatenates,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected")
@pytest.mark.parametrize("flaw", NOTICED_BY)
def test_a_flaw_is_noticed(flaw):
    """By the test named, which the same module without the flaw passes."""
    notices = NOTICED_BY[flaw]
    zero = lambda module, inputs: torch.zeros(16)  # noqa: E731
    notices(Case("Flawed", Flawed, neutral=zero))
    with pytest.raises((AssertionError, KeyError, RuntimeError)):
        notices(Case("Flawed", lambda: Flawed(flaw), neutral=zero))
