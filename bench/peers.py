"""What is measured: attnfuse, and what a user would call in its place.

A peer takes a workload's tensors as they are, (B, N, H, D) in memory, and gives one out for each query stream. What a
model makes once for all its layers (a mask, a block mask, the index of what is not padding) is made before the clock
starts; what each layer has to do (concatenating, slicing, packing) is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnfuse
from attnfuse import Source, Stream, dispatch
from attnfuse.backends import triton
from attnfuse.bench.workloads import Inputs, Workload

Call = Callable[[], list[Tensor]]
ONE_PASS = "attnfuse-triton-onepass"


@dataclass(frozen=True)
class Peer:
    """why_not(workload, device): the reason it cannot run, or None; prepare(inputs): the call that is timed."""

    name: str
    package: str
    why_not: Callable[[Workload, str], str | None]
    prepare: Callable[[Inputs], Call]

    def version(self) -> str:
        if self.package == "attnfuse":
            return attnfuse.__version__
        try:
            return version(self.package)
        except PackageNotFoundError:
            return "unknown"


def peers() -> dict[str, Peer]:
    """Every peer by its name; whether it can run is for its `why_not` to say."""
    found = [_attnfuse("attnfuse", None), *(_attnfuse(f"attnfuse-{name}", name) for name in ("cuda", "triton"))]
    found.append(_one_pass())
    found.append(Peer("torch", "torch", lambda workload, device: None, lambda inputs: _sdpa(inputs, None)))
    paths = {
        "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
    }  # fmt: skip
    found += [_torch_path(name, path) for name, path in paths.items()]
    found += [
        Peer("torch-varlen", "torch", _why_not_torch_varlen, lambda inputs: _packed(inputs, _torch_varlen)),
        Peer("flex", "torch", lambda workload, device: None, _flex),
        Peer("flash-attn", "flash-attn", _why_not_module("flash_attn"),
             lambda inputs: _flash_attn(inputs, "flash_attn")),
        Peer("flash-attn-3", "flash-attn-3", _why_not_module("flash_attn_interface"),
             lambda inputs: _flash_attn(inputs, "flash_attn_interface")),
        Peer("xformers", "xformers", _why_not_xformers, _xformers),
    ]  # fmt: skip
    return {peer.name: peer for peer in found}


def default_peers(device: str, quick: bool) -> list[str]:
    """Who is measured when nobody is named.

    On a CPU FlexAttention is left out: compiling it anew for each shape takes longer than everything else together.
    """
    if device == "cpu":
        return ["attnfuse", "torch", "torch-math"]
    quick_ones = ["attnfuse", "torch", "torch-flash", "torch-cudnn"]
    return quick_ones if quick else [name for name in peers() if name not in ("torch-math", ONE_PASS)]


def _attnfuse(name: str, backend: str | None) -> Peer:
    def why_not(workload: Workload, device: str) -> str | None:
        if backend is None:
            return None
        reason: str | None = dispatch.load(backend).available()
        return reason

    def prepare(inputs: Inputs) -> Call:
        w = inputs.workload
        shared: dict[str, Any] = {"enable_gqa": w.heads != w.kv_heads, "backend": backend}

        def alone() -> list[Tensor]:
            q, k, v = inputs.queries[0], inputs.keys[0], inputs.values[0]
            return [attnfuse.attention(q, k, v, is_causal=w.causal, key_mask=inputs.lengths, **shared)]

        def several() -> list[Tensor]:
            given = [Source(k, v) for k, v in zip(inputs.keys, inputs.values)]
            given[0].mask, given[0].present = inputs.lengths, inputs.present
            return [attnfuse.multi_source_attention(inputs.queries[0], given, **shared)]

        def joint() -> list[Tensor]:
            given = [Stream(*qkv) for qkv in zip(inputs.queries, inputs.keys, inputs.values)]
            found: list[Tensor] = attnfuse.joint_attention(given, **shared)
            return found

        return joint if len(w.queries) > 1 else several if len(w.keys) > 1 else alone

    return Peer(name, "attnfuse", why_not, prepare)


def _one_pass() -> Peer:
    """The Triton backend with its plain backward in one pass, for a GPU to say what `tuning.ONE_PASS` should hold."""
    plain = _attnfuse(ONE_PASS, "triton")

    def prepare(inputs: Inputs) -> Call:
        module = ModuleType(ONE_PASS)
        for name in ("available", "rejects", "describe", "forward"):
            setattr(module, name, getattr(triton, name))
        setattr(module, "backward", partial(triton.backward, one_pass=True))  # noqa: B010  (mypy: no such attribute)
        dispatch.BACKENDS[ONE_PASS] = module
        return _attnfuse(ONE_PASS, ONE_PASS).prepare(inputs)

    return Peer(ONE_PASS, "attnfuse", plain.why_not, prepare)


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts one after another along their length; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _sliced(out: Tensor, workload: Workload) -> list[Tensor]:
    return [out] if len(workload.queries) == 1 else list(out.split(workload.queries, 2))


def _sdpa(inputs: Inputs, path: SDPBackend | None) -> Call:
    w = inputs.workload
    seen = inputs.seen()
    mask = None if seen is None else seen[:, None, None]

    def call() -> list[Tensor]:
        q, k, v = _joined(inputs.queries), _joined(inputs.keys), _joined(inputs.values)
        with nullcontext() if path is None else sdpa_kernel(path):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=w.causal, enable_gqa=w.heads != w.kv_heads
            )
        return _sliced(out, w)

    return call


def _torch_path(name: str, path: SDPBackend) -> Peer:
    def why_not(workload: Workload, device: str) -> str | None:
        if name == "math":
            # z, p and their gradients, in float32
            quadratic = workload.batch * workload.heads * sum(workload.queries) * sum(workload.keys) * 16
            if quadratic > 8 * 2**30:
                return f"it would hold {quadratic / 2**30:.0f} GiB of (Nq, Ns) matrices"
        if device == "cpu" and name in ("cudnn", "efficient"):
            return f"torch's {name} path runs on a GPU only"
        return None

    return Peer(f"torch-{name}", "torch", why_not, lambda inputs: _sdpa(inputs, path))


def _flex(inputs: Inputs) -> Call:
    """FlexAttention, compiled for the very shape, with a block mask for what is not seen."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    w, seen, device = inputs.workload, inputs.seen(), inputs.keys[0].device
    block_mask = None
    if w.causal:
        block_mask = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, sum(w.queries), sum(w.keys), device=device
        )
    elif seen is not None:
        block_mask = create_block_mask(
            lambda b, h, i, j: seen[b, j], w.batch, None, sum(w.queries), sum(w.keys), device=device
        )
    torch._dynamo.reset()  # or the limit on recompilations would end this after a few shapes
    compiled = torch.compile(flex_attention, dynamic=False)

    def call() -> list[Tensor]:
        q, k, v = _joined(inputs.queries), _joined(inputs.keys), _joined(inputs.values)
        out = compiled(q, k, v, block_mask=block_mask, enable_gqa=w.heads != w.kv_heads)
        return _sliced(out, w)  # type: ignore[arg-type]

    return call


def _packed(inputs: Inputs, attend: Callable[..., Tensor]) -> Call:
    """Keys and values without what is not seen, one sample after another; queries are whole."""
    w, device = inputs.workload, inputs.keys[0].device
    seen = inputs.seen()
    assert seen is not None
    kept = seen.flatten().nonzero()[:, 0]
    counts = seen.sum(1)
    ends = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    rows = sum(w.queries)
    starts = torch.arange(0, (w.batch + 1) * rows, rows, dtype=torch.int32, device=device)
    longest = int(counts.max())

    def call() -> list[Tensor]:
        q = _joined(inputs.queries).transpose(1, 2).flatten(0, 1)
        k, v = (_joined(x).transpose(1, 2).flatten(0, 1)[kept] for x in (inputs.keys, inputs.values))
        out = attend(q, k, v, starts, ends, rows, longest)
        return _sliced(out.unflatten(0, (w.batch, rows)).transpose(1, 2), w)

    return call


def _why_not_torch_varlen(workload: Workload, device: str) -> str | None:
    if device == "cpu":
        return "torch's varlen_attn runs on a GPU only"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no varlen_attn"
    if workload.heads != workload.kv_heads:
        return "torch's varlen_attn is given as many key heads as query heads here"
    return None if workload.unequal else "nothing is padded or absent: packing would change nothing"


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out: Tensor = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k)  # type: ignore[assignment]
    return out


def _why_not_module(module: str) -> Callable[[Workload, str], str | None]:
    def why_not(workload: Workload, device: str) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        return f"{module} runs on a GPU only" if device == "cpu" else None

    return why_not


def _flash_attn(inputs: Inputs, name: str) -> Call:
    module = importlib.import_module(name)
    w = inputs.workload

    def first(result: Any) -> Tensor:
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out

    if w.unequal:
        return _packed(inputs, lambda *given: first(module.flash_attn_varlen_func(*given)))

    def call() -> list[Tensor]:
        q, k, v = (_joined(x).transpose(1, 2) for x in (inputs.queries, inputs.keys, inputs.values))
        return _sliced(first(module.flash_attn_func(q, k, v, causal=w.causal)).transpose(1, 2), w)

    return call


def _why_not_xformers(workload: Workload, device: str) -> str | None:
    missing = _why_not_module("xformers")(workload, device)
    if missing is not None:
        return missing
    if workload.heads != workload.kv_heads:
        return "xFormers is given as many key heads as query heads here"
    return "xFormers is given whole sources here" if workload.unequal else None


def _xformers(inputs: Inputs) -> Call:
    ops = importlib.import_module("xformers.ops")
    w = inputs.workload
    bias = ops.LowerTriangularMask() if w.causal else None

    def call() -> list[Tensor]:
        q, k, v = (_joined(x).transpose(1, 2) for x in (inputs.queries, inputs.keys, inputs.values))
        return _sliced(ops.memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2), w)

    return call
