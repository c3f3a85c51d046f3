"""No row without this: the results of the very call that is timed, against the reference in float64.

    error(call) <= 2 error(reference in the same dtype) + eps(dtype) |x|

is the budget of attnfuse.testing, over out and every gradient. Where the reference for the whole workload is too much,
some (sample, key head) pairs are drawn and checked whole, rows in chunks, with every gradient summed over the chunks;
everything else must at least be finite. A key head brings all query heads that share it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnfuse import reference
from attnfuse.bench.workloads import Inputs
from attnfuse.problem import Source, bind
from attnfuse.testing import difference, size

# What a key and its value cost the reference beside its pairs (casts, two gradients), in rows.
ROWS_WORTH = 64
CHUNK = 2**21  # entries of one (rows, columns) matrix of the reference at a time


@dataclass
class Verdict:
    """worst: error / budget of the quantity `where`; over 1 is a failure. coverage: such as "4 of 64 heads"."""

    coverage: str
    worst: float = 0.0
    where: str = ""
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures


class Oracle:
    """The reference's results for the heads that are checked, computed once and held against every peer."""

    def __init__(self, inputs: Inputs, entries: float) -> None:
        """entries: about how many (row, column) pairs the reference may look at; one head is always checked."""
        w = inputs.workload
        self.inputs = inputs
        every = [(b, g) for b in range(w.batch) for g in range(w.kv_heads)]
        group = w.heads // w.kv_heads
        cost = group * (sum(w.queries) + ROWS_WORTH) * sum(w.keys)
        count = max(1, min(len(every), int(entries // cost)))
        self.heads = every if count == len(every) else sorted(random.Random(0).sample(every, count))
        self.coverage = f"{len(self.heads) * group} of {w.batch * w.heads} heads"
        self.exact = self._results(torch.float64, rounded=False)
        self.low = self._results(inputs.queries[0].dtype, rounded=True)

    def judge(self, outs: Sequence[Tensor], grads: Sequence[Tensor] | None) -> Verdict:
        """Hold outs (one for each query stream) and, if given, the gradients of `inputs.tensors()` to the budget."""
        w, dtype = self.inputs.workload, self.inputs.queries[0].dtype
        verdict = Verdict(self.coverage)
        expected = [(w.batch, w.heads, n, w.dim) for n in w.queries]
        if [tuple(out.shape) for out in outs] != expected:
            verdict.failures.append(f"out has shapes {[tuple(out.shape) for out in outs]}, wanted {expected}")
            return verdict
        given = dict(zip(self._out_names(), outs))
        if grads is not None:
            given |= dict(zip((f"d{name}" for name in self.inputs.names()), grads))
        floor = max(size(x) for name, x in self.exact.items() if name[0] == "d")
        for name, x in given.items():
            if not bool(torch.isfinite(x).all()):
                verdict.failures.append(f"{name} is not finite")
                continue
            truth = self.exact[name]
            least = floor if name[0] == "d" else 0.0
            budget = 2 * difference(self.low[name], truth) + torch.finfo(dtype).eps * max(size(truth), least)
            error = difference(self._chosen(name, x), truth)
            if error > verdict.worst * budget or not verdict.where:
                verdict.worst, verdict.where = error / budget, name
            if not error <= budget:
                verdict.failures.append(f"{name} is off by {error:.3g}, budget {budget:.3g}")
        return verdict

    def _out_names(self) -> list[str]:
        return [f"out{n}" for n in range(len(self.inputs.queries))]

    def _slice(self, name: str, x: Tensor, b: int, g: int) -> Tensor:
        """One sample's part of x that belongs to key head g, (1, heads, N, D)."""
        group = self.inputs.workload.heads // self.inputs.workload.kv_heads
        of_queries = "key" not in name and "value" not in name
        return x[b : b + 1, g * group : (g + 1) * group] if of_queries else x[b : b + 1, g : g + 1]

    def _chosen(self, name: str, x: Tensor) -> Tensor:
        """The checked heads of x, (heads, N, D) in float64."""
        return torch.cat([self._slice(name, x.detach(), b, g)[0] for b, g in self.heads]).double()

    def _results(self, dtype: torch.dtype, rounded: bool) -> dict[str, Tensor]:
        """out and every gradient of the checked heads, each (heads, N, D) in float64."""
        parts: dict[str, list[Tensor]] = {}
        for b, g in self.heads:
            for name, x in self._head(b, g, dtype, rounded).items():
                parts.setdefault(name, []).append(x[0])
        return {name: torch.cat(held) for name, held in parts.items()}

    def _head(self, b: int, g: int, dtype: torch.dtype, rounded: bool) -> dict[str, Tensor]:
        inputs, w = self.inputs, self.inputs.workload

        def leaf(name: str, x: Tensor) -> Tensor:
            return self._slice(name, x.detach(), b, g).to(dtype).requires_grad_()

        keys = [leaf("key", x) for x in inputs.keys]
        values = [leaf("value", x) for x in inputs.values]
        sums = [torch.zeros_like(x, dtype=torch.float64) for x in (*keys, *values)]
        found: dict[str, Tensor] = {}
        for n, whole in enumerate(inputs.queries):
            query, grad = leaf("query", whole), self._slice("out", inputs.grads[n], b, g).to(dtype)
            step = max(1, CHUNK // (query.shape[1] * sum(w.keys)))
            outs, dqueries = [], []
            for start in range(0, query.shape[2], step):
                rows = query[:, :, start : start + step]
                problem = bind(rows, self._sources(keys, values, b), enable_gqa=True)
                problem.sources[0].offset = start  # where the chunk's first row stands, for causal
                out, _, _ = reference.forward(problem, rounded=rounded)
                arriving = grad[:, :, start : start + step]
                dquery, *rest = torch.autograd.grad(out, [rows, *keys, *values], arriving)
                outs.append(out.detach().double())
                dqueries.append(dquery.double())
                for total, part in zip(sums, rest):
                    total += part
            found[f"out{n}"], found[f"dquery{n}"] = torch.cat(outs, 2), torch.cat(dqueries, 2)
        found |= {f"dkey{s}": x for s, x in enumerate(sums[: len(keys)])}
        found |= {f"dvalue{s}": x for s, x in enumerate(sums[len(keys) :])}
        return found

    def _sources(self, keys: list[Tensor], values: list[Tensor], b: int) -> list[Source]:
        sources = [Source(k, v) for k, v in zip(keys, values)]
        sources[0].is_causal = self.inputs.workload.causal
        if self.inputs.lengths is not None:
            sources[0].mask = self.inputs.lengths[b : b + 1]
        if self.inputs.present is not None:
            sources[0].present = self.inputs.present[b : b + 1]
        return sources
