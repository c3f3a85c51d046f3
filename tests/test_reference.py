"""The oracle: gradients by finite differences, twice and forward; Philox against its published vectors."""

import pytest
import torch

from attnfuse import reference, testing
from attnfuse.problem import Problem

CASES = {str(c): c for c in testing.cases()}
SMALL = [
    "plain-one-query", "sources-empty-source", "masks-float-keys", "bias-source-bias", "softcap-softcap", "sinks-sinks",
    "sinks-dead-rows", "alibi-alibi", "dropout-masked", "presence-all-absent", "gqa-gqa",
]  # fmt: skip


def as_function(name):
    """The case's forward as a function of its float tensors, in float64, lse only where a row is live."""
    problem = testing.build(CASES[name], torch.float64, poison=False)
    tensors = problem.tensors()
    places = [n for n, x in enumerate(tensors) if x is not None and x.is_floating_point()]
    # An entry of -inf has no finite difference.
    places = [n for n in places if bool(torch.isfinite(tensors[n]).all())]
    live = testing.live_rows(problem)

    def forward(*given):
        filled = list(tensors)
        for place, x in zip(places, given):
            filled[place] = x
        again = Problem.rebuilt(filled, problem.layout(), problem.scale, problem.softcap, problem.dropout_p, True)
        out, lse, mass = reference.forward(again)
        return out, lse[live], mass

    return forward, [tensors[n].clone().requires_grad_() for n in places]


@pytest.mark.parametrize("name", SMALL)
def test_gradcheck(name):
    forward, inputs = as_function(name)
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["plain-one-query", "sinks-sinks", "presence-all-absent"])
def test_double_backward_and_forward_mode(name):
    forward, inputs = as_function(name)
    assert torch.autograd.gradgradcheck(forward, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(
        forward, inputs, fast_mode=True, check_forward_ad=True, check_backward_ad=False
    )


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        # kat_vectors of Random123 1.14 (Salmon et al.), philox4x32 with 10 rounds
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_known_answers(counter, key, words):
    found = reference.philox(*(torch.tensor(k) for k in key), [torch.tensor(c) for c in counter])
    assert " ".join(f"{int(word):08x}" for word in found) == words


def test_dropout_keeps_the_asked_share():
    problem = testing.build(CASES["dropout-plain"], torch.float32)
    problem.query = torch.randn(8, 8, 64, 16)
    problem.sources[0].key = torch.randn(8, 8, 512, 16)
    kept = reference.philox_keep(problem, problem.sources[0]).double().mean()
    # 2 million draws: five standard deviations are 0.0016
    assert abs(kept - 0.7) < 0.002
