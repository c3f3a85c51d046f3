"""The conformance cases and the error budget: what the tests and `attnfuse check` both hold every backend to.

    error(backend) <= 2 error(reference in the same dtype) + eps(dtype) |x|

Both errors are the root mean square difference to the reference in float64 on the same inputs, for out, lse, mass and
every gradient; |x| is the root mean square of the quantity. The backend's inputs hold NaN wherever the contract says
that nothing is read, the oracle's hold 0 there. The oracle itself is held to torch's attention in float64 wherever
torch can express the case, so that a fault in it cannot widen the budget unseen.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, functional, reference
from .problem import BoundSource, Problem

NAN = float("nan")


@dataclass(frozen=True)
class SourceCase:
    """One source of a case. mask: four letters, "1" for a broadcast size, else anything, then bool or float."""

    length: int
    lengths: tuple[int, ...] | None = None
    holes: bool = False
    hole_tiles: bool = False  # with holes: the first 64 keys all masked, the next 64 all kept
    mask: str | None = None  # such as "bool b1ij" or "float 11ij"
    present: tuple[bool, ...] | None = None
    bias: bool = False
    causal: bool = False
    offset: int = 0
    offsets: tuple[int, ...] | None = None
    window: tuple[int, int] = (-1, -1)


@dataclass(frozen=True)
class Case:
    """One problem of the contract, by its numbers. aux: lse and mass carry gradients too."""

    family: str
    name: str
    sources: tuple[SourceCase, ...]
    batch: int = 2
    heads: int = 2
    kv_heads: int = 2
    rows: int = 21
    dim: int = 16
    value_dim: int | None = None
    scale: float | None = None
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    dropout_p: float = 0.0
    aux: bool = False
    rows_first: bool = False  # (B, N, H, D) in memory

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"


def cases() -> list[Case]:
    """Every conformance case."""
    one = SourceCase
    plain = Case("plain", "square", (one(21),))
    two = (one(19), one(34))
    long = Case("long", "", (), batch=1, heads=1, kv_heads=1, rows=150, dim=40)
    return [
        plain,
        replace(plain, name="cross", sources=(one(50),), rows=7),
        replace(plain, name="one-query", sources=(one(37),), rows=1),
        replace(plain, name="one-key", sources=(one(1),)),
        replace(plain, name="scale", scale=0.7),
        replace(plain, name="negative-scale", scale=-0.25),
        replace(plain, name="rows-first", rows_first=True, sources=(one(40),)),
        Case("sources", "two", two),
        Case("sources", "two-aux", two, aux=True),
        Case("sources", "three-aux", (one(5), one(33), one(17)), aux=True, batch=1),
        Case("sources", "empty-source", (one(18), one(0), one(3)), aux=True),
        Case("sources", "rows-first", two, rows_first=True, aux=True),
        Case("lengths", "padded", (one(40, lengths=(40, 23)),)),
        Case("lengths", "zero-length", (one(24, lengths=(0, 9)),), aux=True),
        Case("lengths", "two-sources", (one(33, lengths=(0, 20)), one(20, lengths=(7, 20))), aux=True, batch=2),
        Case("lengths", "causal", (one(30, lengths=(30, 11), causal=True),), aux=True),
        Case("holes", "holes", (one(40, holes=True),), aux=True),
        Case("holes", "causal", (one(40, holes=True, causal=True),)),
        Case("holes", "with-lengths", (one(40, holes=True, lengths=(40, 17)), one(9)), aux=True),
        Case("masks", "bool-full", (one(35, mask="bool bhij"),), aux=True),
        Case("masks", "bool-heads", (one(35, mask="bool 1h1j"), one(8))),
        Case("masks", "bool-pairs-causal", (one(35, mask="bool 11ij", causal=True),)),
        Case("masks", "float-full", (one(35, mask="float bhij"),), aux=True),
        Case("masks", "float-pairs", (one(35, mask="float 11ij"),)),
        Case("masks", "float-keys", (one(35, mask="float b11j"), one(20)), aux=True),
        Case("masks", "float-rows", (one(35, mask="float bhi1"),), aux=True),
        Case("masks", "float-gqa", (one(20, mask="float bhij"),), heads=4),
        Case("presence", "absent", (one(20, present=(False, True)), one(30)), aux=True),
        Case("presence", "all-absent", (one(20, present=(False, True)), one(9, present=(False, True))), aux=True),
        Case("presence", "two-of-four", (one(40, present=(False, True, False, True)), one(12)), batch=4),
        Case("bias", "source-bias", (one(20, bias=True), one(30, bias=True)), aux=True),
        Case("bias", "gqa", (one(20, bias=True), one(30, bias=True, present=(True, False))), heads=4, aux=True),
        Case("causal", "square", (one(21, causal=True),)),
        Case("causal", "wide", (one(50, causal=True),), aux=True),
        Case("causal", "tall", (one(9, causal=True),), rows=40),
        Case("causal", "lower-right", (one(37, causal=True, offset=16),)),
        Case("causal", "lower-right-dead-rows", (one(15, causal=True, offset=-6),), aux=True),
        Case("causal", "offset-by-sample", (one(37, causal=True, offsets=(16, -4)),)),
        Case("causal", "one-causal-source", (one(21, causal=True), one(13)), aux=True),
        Case("window", "both", (one(50, window=(6, 9)),), rows=45, aux=True),
        Case("window", "left", (one(40, window=(5, -1)),), rows=40),
        Case("window", "right", (one(40, window=(-1, 3)),), rows=40),
        Case("window", "causal", (one(40, window=(7, -1), causal=True),), rows=40),
        Case("window", "beyond", (one(10, window=(2, 2)), one(6)), rows=40, aux=True),
        Case("window", "dead-rows", (one(10, window=(2, 2)),), rows=40),
        Case("softcap", "softcap", (one(33),), softcap=2.0, aux=True),
        Case("softcap", "wide", (one(33, causal=True),), softcap=50.0),
        Case("sinks", "sinks", (one(33),), sinks=True, aux=True),
        Case("sinks", "dead-rows", (one(20, lengths=(0, 11)), one(4, present=(False, True))), sinks=True, aux=True),
        Case("alibi", "alibi", (one(33),), alibi=True, aux=True),
        Case("alibi", "causal", (one(33, causal=True),), alibi=True, rows=33),
        Case("gqa", "gqa", (one(33),), heads=4, kv_heads=2, aux=True),
        Case("gqa", "mqa", (one(33, causal=True), one(7)), heads=3, kv_heads=1, rows_first=True),
        Case("head_dim", "8", (one(20),), dim=8),
        Case("head_dim", "40-24", (one(20),), dim=40, value_dim=24, aux=True),
        Case("head_dim", "24-80", (one(20), one(5)), dim=24, value_dim=80),
        Case("head_dim", "33-50", (one(20), one(9)), dim=33, value_dim=50, aux=True),
        Case("head_dim", "96", (one(20),), dim=96),
        Case("head_dim", "128", (one(20, causal=True),), dim=128),
        Case("head_dim", "256-192", (one(20),), dim=256, value_dim=192),
        Case("dropout", "plain", (one(33),), dropout_p=0.3),
        Case("dropout", "two-sources", two, dropout_p=0.2, heads=4, aux=True),
        Case("dropout", "masked", (one(33, lengths=(33, 20), causal=True),), dropout_p=0.5),
        # Longer than a tile of any kernel in rows and columns, so that walks over tiles and sources are taken.
        replace(long, name="one-source", sources=(one(200),)),
        replace(long, name="three-sources", aux=True,
                sources=(one(150, bias=True), one(70, lengths=(3,)), one(130, bias=True))),
        replace(long, name="causal-window", sources=(one(190, causal=True, window=(70, -1)), one(66)), aux=True),
        replace(long, name="left-window", sources=(one(140, window=(70, -1)),)),
        replace(long, name="lower-right", sources=(one(200, causal=True, offset=60),), sinks=True, rows_first=True),
        replace(long, name="hole-tiles", sources=(one(200, holes=True, hole_tiles=True), one(70)), softcap=5.0),
        replace(long, name="head-dim-128", sources=(one(140, window=(90, 10)), one(70, bias=True)), dim=128, aux=True),
        replace(long, name="head-dim-256", sources=(one(100), one(40)), dim=256, value_dim=200, aux=True),
        replace(long, name="gqa", sources=(one(130, present=(True,)), one(70, present=(False,))), heads=2, aux=True),
        Case("everything", "together",
             (one(33, lengths=(33, 20), bias=True, causal=True, offset=5, window=(20, -1)),
              one(20, holes=True, present=(True, False), bias=True),
              one(17, mask="float bhij", bias=True)),
             heads=4, rows=33, dim=24, softcap=20.0, sinks=True, alibi=True, dropout_p=0.1, aux=True, rows_first=True),
    ]  # fmt: skip


@dataclass
class Result:
    """One quantity of one case against its budget; error and budget are absolute."""

    case: Case
    quantity: str
    error: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget  # False for a NaN error


def build(case: Case, dtype: torch.dtype, device: str = "cpu", poison: bool = True) -> Problem:
    """The case's problem in `dtype`; numbers depend on the case alone. With `poison`, NaN where nothing is read."""
    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def numbers(*shape: int, kind: torch.dtype = dtype, low: torch.dtype = dtype) -> Tensor:
        # Rounded to the dtype under test by `round_to` in run(); drawn in float64, so that every dtype sees the same.
        x = torch.randn(*shape, generator=generator, dtype=torch.float64)
        if len(shape) == 4 and case.rows_first:
            x = torch.randn(shape[0], shape[2], shape[1], shape[3], generator=generator, dtype=torch.float64)
            x = x.transpose(1, 2)
        return x.to(kind).to(device)

    def given(values: tuple[int, ...] | tuple[bool, ...] | None, kind: torch.dtype) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=kind, device=device)

    value_dim = case.dim if case.value_dim is None else case.value_dim
    kv_heads = min(case.kv_heads, case.heads)
    full = {"b": case.batch, "h": case.heads, "i": case.rows}
    query = numbers(case.batch, case.heads, case.rows, case.dim)
    bound, column = [], 0
    for spec in case.sources:
        source = BoundSource(
            numbers(case.batch, kv_heads, spec.length, case.dim),
            numbers(case.batch, kv_heads, spec.length, value_dim),
            lengths=given(spec.lengths, torch.int32),
            present=given(spec.present, torch.bool),
            offsets=given(spec.offsets, torch.int32),
            causal=spec.causal,
            offset=spec.offset,
            window_left=spec.window[0],
            window_right=spec.window[1],
            column=column,
        )
        column += spec.length
        if spec.bias:
            source.bias = numbers(case.batch, case.heads, kind=wide)
        if spec.holes:
            kept = torch.rand(case.batch, spec.length, generator=generator) < 0.6
            kept[0, :2] = False  # a causal row before the first kept key sees nothing
            if spec.hole_tiles:
                kept[:, :64] = False
                kept[:, 64:128] = True
            source.key_mask = kept.to(device)
        if spec.mask is not None:
            kind, letters = spec.mask.split()
            shape = [1 if c == "1" else full.get(c, spec.length) for c in letters]
            seen = torch.rand(*shape, generator=generator) < 0.7
            if shape[3] > 1:
                seen[..., -1] = False  # a column no row sees, to be poisoned
            if shape[2] > 1:
                seen[..., 3, :] = False  # a row that sees nothing
            if kind == "bool":
                source.attn_mask = seen.to(device)
            else:
                entries = torch.randn(*shape, generator=generator, dtype=torch.float64)
                source.attn_mask = torch.where(seen, entries, float("-inf")).to(wide).to(device)
        bound.append(source)
    problem = Problem(
        query,
        bound,
        case.dim**-0.5 if case.scale is None else case.scale,
        case.softcap,
        case.dropout_p,
        numbers(case.heads, kind=wide).abs().expand(case.batch, -1) * 0.3 if case.alibi else None,
        numbers(case.heads, kind=wide) if case.sinks else None,
        torch.tensor(20260 + case.rows, device=device) if case.dropout_p else None,
        case.aux,
    )
    poisoned = NAN if poison else 0.0
    for source in bound:
        unread = ~seen_columns(problem, source)
        source.key = source.key.masked_fill(unread[..., None], poisoned)
        source.value = source.value.masked_fill(unread[..., None], poisoned)
    problem.query = problem.query.masked_fill(~live_rows(problem)[..., None], poisoned)
    return problem


def seen_columns(problem: Problem, source: BoundSource) -> Tensor:
    """(B, Hkv, Ns) bool: columns that some row of some head of the group sees."""
    return reference.visible(problem, source).any(2).unflatten(1, (-1, problem.group)).any(2)


def live_rows(problem: Problem) -> Tensor:
    """(B, Hq, Nq) bool: rows that see a key at all."""
    return torch.stack([reference.visible(problem, source).any(-1) for source in problem.sources]).any(0)


def run(
    case: Case, backend: str, dtype: torch.dtype, device: str = "cpu", *, oracle: bool = False, gradients: bool = True
) -> dict[str, Tensor]:
    """out, lse, mass and every gradient of a case, in float64; `oracle` takes the rounded inputs to float64.

    Without `gradients` only the forward pass is run.
    """
    problem = build(case, dtype, device, poison=not oracle)
    live = live_rows(problem)
    if oracle:
        tensors = [x.double() if x is not None and x.is_floating_point() else x for x in problem.tensors()]
        problem = Problem.rebuilt(
            tensors, problem.layout(), problem.scale, problem.softcap, problem.dropout_p, problem.want_mass
        )
    names = {"query": problem.query, "alibi_slopes": problem.alibi_slopes, "sinks": problem.sinks}
    for s, source in enumerate(problem.sources):
        for field in ("key", "value", "attn_mask", "bias"):
            names[f"{field}{s}"] = getattr(source, field)
    wanted = {name: x for name, x in names.items() if gradients and x is not None and x.is_floating_point()}
    if backend == "aten":
        wanted = {name: x for name, x in wanted.items() if not name.startswith("attn_mask")}
    for x in wanted.values():
        x.requires_grad_()
    if backend == "rounded":
        out, lse, mass = reference.forward(problem, rounded=True)
    else:
        out, lse, mass = functional._run(problem, backend)

    generator = torch.Generator().manual_seed(zlib.crc32(str(case).encode()) + 1)

    def arriving(x: Tensor) -> Tensor:
        g = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype if x is out else x.dtype)
        return g.to(device=device, dtype=x.dtype)

    results, arrivals = [out], [arriving(out)]
    if oracle:
        arrivals = [arrivals[0].to(dtype).double()]
    # A dead row's gradient is never read either.
    arrivals[0] = arrivals[0].masked_fill(~live[..., None], 0.0 if oracle else NAN)
    if case.aux:
        results += [lse, mass]
        arrivals += [arriving(lse).float().to(lse.dtype), arriving(mass).float().to(mass.dtype)]
    found = {"out": out, "lse": lse}
    if case.aux:
        found["mass"] = mass
    inputs = list(wanted.values())
    grads = torch.autograd.grad(results, inputs, arrivals, allow_unused=True) if out.requires_grad else []
    for (name, x), grad in zip(wanted.items(), grads):
        found[f"d{name}"] = torch.zeros_like(x) if grad is None else grad
    return {name: x.detach().double().cpu() for name, x in found.items()}


def judge(
    case: Case, backend: str, dtype: torch.dtype, device: str = "cpu", *, gradients: bool = True
) -> list[Result]:
    """Every quantity of `case` as `backend` computes it, against the error budget."""
    exact = run(case, "reference", dtype, device, oracle=True, gradients=gradients)
    # A gradient may be 0 by cancellation alone; what was cancelled is as large as the case's other gradients. Those of
    # bias, sinks and slopes are sums over rows, too large to measure the others by.
    sizes = {name: size(x) for name, x in exact.items() if name[0] == "d"}
    summed = tuple(name for name in sizes if name.startswith(("dbias", "dsinks", "dalibi_slopes")))
    single = max((x for name, x in sizes.items() if name not in summed), default=0.0)
    floors = {name: max(sizes.values()) if name in summed else single for name in sizes}
    low = run(case, "rounded", dtype, device, gradients=gradients)
    ours = run(case, backend, dtype, device, gradients=gradients)
    results = []
    for quantity, x in ours.items():
        # A gradient, float32 ones too, goes through delta = dout . out, and out is rounded to the dtype.
        eps = torch.finfo(torch.float32 if quantity in ("lse", "mass") else dtype).eps
        truth = exact[quantity]
        budget = 2 * difference(low[quantity], truth) + eps * max(size(truth), floors.get(quantity, 0.0))
        results.append(Result(case, quantity, difference(x, truth), budget))
    return results + anchor(case, dtype, exact["out"])


def anchor(case: Case, dtype: torch.dtype, exact: Tensor) -> list[Result]:
    """The oracle's out against torch's own attention in float64, for cases that torch can express."""
    source = case.sources[0] if len(case.sources) == 1 else None
    beyond = case.softcap or case.sinks or case.alibi or case.dropout_p
    if source is None or beyond or source.bias or (source.mask or "").startswith("float"):
        return []
    problem = build(case, dtype, poison=False)
    (bound,) = problem.sources
    seen = reference.visible(problem, bound)
    q, k, v = (x.double() for x in (problem.query, bound.key, bound.value))
    theirs = F.scaled_dot_product_attention(q, k, v, seen, scale=problem.scale, enable_gqa=problem.group > 1)
    theirs = theirs.where(seen.any(-1)[..., None], torch.zeros((), dtype=torch.float64))
    # Both sum at most a few hundred products of order 1 in float64.
    return [Result(case, "out of the oracle", difference(exact, theirs), 1e-12)]


def difference(a: Tensor, b: Tensor) -> float:
    """The root mean square of a - b, where equal infinities differ by 0 and any NaN gives NaN."""
    return float(torch.where(a == b, 0.0, a - b).square().mean().sqrt()) if a.numel() else 0.0


def size(x: Tensor) -> float:
    """The root mean square of x's finite entries."""
    return float(torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0).square().mean().sqrt()) if x.numel() else 0.0


def serves(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> str | None:
    """Why `backend` cannot run `case`, or None."""
    problem = build(case, dtype, device)
    module = dispatch.load(backend)
    reason: str | None = module.available() or module.rejects(problem)
    return reason


def families() -> Iterator[tuple[str, list[Case]]]:
    """The cases, family by family."""
    grouped: dict[str, list[Case]] = {}
    for case in cases():
        grouped.setdefault(case.family, []).append(case)
    yield from grouped.items()
