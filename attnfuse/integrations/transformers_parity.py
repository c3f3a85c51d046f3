"""Eager attention against attnfuse in real transformers models, forward, backward and with a cache.

    python -m attnfuse.integrations.transformers_parity [--models Gemma2 CLIP] [--write docs/transformers_parity.md]

For each tiny model, in float32 and bfloat16:

    error(attnfuse) <= 2 error(eager) + eps(dtype)

Both errors are the root mean square difference to the same model run in float64 with eager attention, on the weights
and inputs rounded to the dtype, relative to the root mean square of the quantity, and taken over several draws of
weights and inputs: in one draw a single rounding that many layers amplify may decide alone. Quantities are every
output at its valid positions, the gradients of every float input, of the attention's own parameters and of all other
parameters, and the logits of a generation that is forced to the same tokens, with a growing and with a static cache.
"""

from __future__ import annotations

import argparse
import collections
import copy
import math
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .. import __version__, dispatch
from ..cli import table
from . import transformers as integration
from .transformers_models import MODELS, Tiny, build, words

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STEPS = 6
# Models that generate here, and the caches that each of them has in transformers.
GENERATES = {
    "Whisper": ("dynamic", "static"), "Qwen2-Audio": ("dynamic", "static"), "LLaVA": ("dynamic", "static"),
    "Mllama": ("dynamic",), "Qwen2-VL": ("dynamic", "static"), "Gemma2": ("dynamic", "static"),
    "Gemma3": ("dynamic", "static"), "T5Gemma": ("dynamic", "static"), "GPT-OSS": ("dynamic", "static"),
    "UDOP": ("dynamic",), "Florence2": ("dynamic", "static"), "Kosmos2": ("dynamic",),
}  # fmt: skip


class Widened(TorchFunctionMode):
    """float64 wherever a model's code says float32 (softmax, norms, rotary tables) or says nothing."""

    def __enter__(self) -> Any:
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch.set_default_dtype(self.default)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args, kwargs = pytree.tree_map(lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {}))
        return func(*args, **kwargs)


@dataclass
class Quantity:
    """One quantity of one model against its budget; both relative to its size."""

    name: str
    error: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget  # False for a NaN error


@dataclass
class Result:
    """One model in one dtype. calls: attention calls of attnfuse by the backend that served them."""

    model: str
    dtype: str
    quantities: list[Quantity]
    calls: collections.Counter[str] = field(default_factory=collections.Counter)

    @property
    def passed(self) -> bool:
        return bool(self.calls) and all(quantity.passed for quantity in self.quantities)

    @property
    def worst(self) -> Quantity:
        """The quantity closest to its budget or furthest beyond it."""
        return max(self.quantities, key=lambda q: float("inf") if q.error != q.error else q.error / q.budget)


@contextmanager
def recorded() -> Iterator[collections.Counter[str]]:
    """Counts the calls that attnfuse serves meanwhile, by backend."""
    calls: collections.Counter[str] = collections.Counter()
    choose = dispatch.choose

    def counted(problem: Any, backend: str | None) -> str:
        name = choose(problem, backend)
        calls[name] += 1
        return name

    dispatch.choose = counted
    try:
        yield calls
    finally:
        dispatch.choose = choose


def compare(
    name: str, dtype: torch.dtype, seed: int = 0, draws: int = 1, caches: tuple[str, ...] | None = None
) -> Result:
    """The named model in `dtype` with eager and with attnfuse, each against eager in float64.

    draws: of weights and inputs, with seeds from `seed` on. caches: which caches the first draw generates with; None
    takes all that the model has.
    """
    caches = GENERATES.get(name, ()) if caches is None else caches
    squares: dict[str, list[tuple[float, float]]] = {}
    calls: collections.Counter[str] = collections.Counter()
    for draw in range(draws):
        for key, errors in _relative_errors(name, dtype, seed + draw, () if draw else caches, calls).items():
            squares.setdefault(key, []).append(errors)
    quantities = []
    for key, pairs in squares.items():
        ours, eager = (math.sqrt(sum(error[n] ** 2 for error in pairs) / len(pairs)) for n in (0, 1))
        quantities.append(Quantity(key, ours, 2 * eager + torch.finfo(dtype).eps))
    return Result(name, str(dtype).removeprefix("torch."), quantities, calls)


def _relative_errors(
    name: str, dtype: torch.dtype, seed: int, caches: tuple[str, ...], calls: collections.Counter[str]
) -> dict[str, tuple[float, float]]:
    """(attnfuse's, eager's) relative error of every quantity of one draw; `calls` counts on."""
    tiny = build(name, seed)
    model = tiny.model.to(dtype)

    def run(implementation: str, model: Any, kind: torch.dtype) -> dict[str, Tensor]:
        model.set_attn_implementation(implementation)
        # bbox is a position, which a model turns into an index: rounding it would change the problem.
        inputs = {
            key: x.to(dtype).to(kind) if isinstance(x, Tensor) and x.is_floating_point() and key != "bbox" else x
            for key, x in tiny.inputs.items()
        }
        with Widened() if kind == torch.float64 else nullcontext():
            found = forward_backward(tiny._replace(model=model, inputs=inputs), seed)
            for cache in caches:
                found[f"logits, {cache} cache"] = generate(tiny._replace(model=model, inputs=inputs), cache, seed)
        return {key: x.double() for key, x in found.items()}

    truth = run("eager", copy.deepcopy(model).double(), torch.float64)
    eager = run("eager", model, dtype)
    with recorded() as served:
        ours = run(integration.NAME, model, dtype)
    calls.update(served)
    return {
        key: (rms(ours[key] - true) / rms(true), rms(eager[key] - true) / rms(true)) for key, true in truth.items()
    }


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def forward_backward(tiny: Tiny, seed: int) -> dict[str, Tensor]:
    """Outputs at valid positions and gradients of a random linear function of them, all detached."""
    model, inputs = tiny.model, dict(tiny.inputs)
    model.zero_grad(set_to_none=True)
    floats = [key for key, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point() and key != "bbox"]
    for key in floats:
        inputs[key] = inputs[key].detach().clone().requires_grad_()
    result = model(**inputs)
    generator = torch.Generator().manual_seed(seed)
    found, loss = {}, torch.zeros((), dtype=torch.float64)
    for path, valid in tiny.valid.items():
        out = attrgetter(path)(result)
        out = out if valid is None else out[valid]
        found[path] = out.detach()
        # In units of the output's own size, so that each output has its say in the gradients.
        arriving = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        loss = loss + (out.double() * arriving).sum() / out.numel() ** 0.5
    loss.backward()
    for key in floats:
        grad = inputs[key].grad
        if grad is not None:
            found[f"gradient of {key}"] = grad
    groups: dict[str, list[Tensor]] = {"gradients in attention": [], "other gradients": []}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        groups["gradients in attention" if re.search("att", name, re.I) else "other gradients"].append(grad.flatten())
    return found | {key: torch.cat(grads).detach() for key, grads in groups.items()}


class Forced(hf.LogitsProcessor):  # type: ignore[misc]
    """Lets a generation take no token but the given ones (B, steps)."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.start = tokens, -1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.start < 0:
            self.start = input_ids.shape[1]
        step = input_ids.shape[1] - self.start
        return torch.full_like(scores, float("-inf")).scatter(1, self.tokens[:, step : step + 1], 0.0)


@torch.no_grad()
def generate(tiny: Tiny, cache: str, seed: int) -> Tensor:
    """(steps, B, vocabulary): the raw logits of a generation forced to tokens that depend on `seed` alone."""
    torch.manual_seed(seed)
    tokens = words(2, STEPS)
    inputs = {key: x for key, x in tiny.inputs.items() if not key.startswith("decoder_")}
    output = tiny.model.generate(
        **inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, output_logits=True,
        return_dict_in_generate=True, logits_processor=hf.LogitsProcessorList([Forced(tokens)]),
        cache_implementation=None if cache == "dynamic" else cache,
    )  # fmt: skip
    return torch.stack(output.logits)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help="all if left out"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="which dtypes")
    parser.add_argument("--backend", choices=dispatch.BACKENDS, help="attnfuse backend; its own choice if left out")
    parser.add_argument("--draws", type=int, default=8, help="of weights and inputs, for each row")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the table to a Markdown file")


COLUMNS = ("model", "dtype", "quantities", "worst", "relative error", "of budget", "attention calls", "result")


def cells(result: Result) -> tuple[str, ...]:
    """One row of the table."""
    worst = result.worst
    served = ", ".join(f"{count} {backend}" for backend, count in sorted(result.calls.items())) or "none"
    return (
        result.model, result.dtype, str(len(result.quantities)), worst.name, f"{worst.error:.1e}",
        f"{worst.error / worst.budget:.2f}", served, "pass" if result.passed else "FAIL",
    )  # fmt: skip


def document(results: list[Result], draws: int, command: str) -> str:
    """The table as Markdown, with what it was made with."""
    versions = (
        f"attnfuse {__version__}, transformers {hf.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
    passed = sum(result.passed for result in results)
    lines = [
        "# Parity with eager attention in transformers",
        "",
        f"    {command}",
        "",
        f"{versions}; run on a CPU. {passed} of {len(results)} rows pass.",
        "",
        "Each row is a tiny random model with padding in its batch. Quantities are the outputs at valid positions,",
        "the gradients of float inputs, of the parameters in attention and of all others, and, where the model",
        f"generates, the logits of {STEPS} decoding steps with each cache. A quantity passes when its error is at most",
        "twice eager's own in the same dtype plus one rounding. Both errors are against eager in float64, relative to",
        f"the quantity's root mean square, over {draws} draws of weights and inputs. The worst quantity is the one",
        "nearest its budget. Attention calls are those attnfuse served in the row, with the backend that served them.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(cells(result)) + " |" for result in results),
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None, report: Callable[[str], None] = print) -> int:
    """Run the comparison; 0 if every row passes."""
    parser = argparse.ArgumentParser(
        prog="python -m attnfuse.integrations.transformers_parity",
        description="Compare attnfuse with eager attention in tiny transformers models.",
    )
    add_arguments(parser)
    args = parser.parse_args(arguments)
    hf.logging.set_verbosity_error()
    torch.set_num_threads(1)  # the models are tiny: threads would wait for each other
    integration.register(args.backend)
    results = []
    plan = [(name, dtype) for name in args.models for dtype in args.dtype]
    for number, (name, dtype) in enumerate(plan, 1):
        result = compare(name, DTYPES[dtype], draws=args.draws)
        results.append(result)
        report(f"[{number}/{len(plan)}] " + "  ".join(cells(result)))
    table.show(COLUMNS, [cells(r) for r in results], ["" if r.passed else "red" for r in results])
    if args.write is not None:
        given = sys.argv[1:] if arguments is None else arguments
        args.write.write_text(document(results, args.draws, " ".join([parser.prog, *given])))
    failed = [result for result in results if not result.passed]
    for result in failed:
        for quantity in result.quantities:
            if not quantity.passed:
                report(
                    f"{result.model} {result.dtype}: {quantity.name}: error {quantity.error:.2e} is beyond its budget, "
                    f"{quantity.budget:.2e}"
                )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
