"""Faults to plant in csrc, one at a time: each must be caught by the conformance cases under emulation.

A fault replaces one piece of text in one file; planting.py builds them and runs the trials on each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from attnfuse import testing


class Fault(NamedTuple):
    name: str
    file: str  # in csrc
    old: str  # stands there exactly once
    new: str


_FWD, _DQ, _DKDV, _ROWS = (f"sm80/attn_{name}.cuh" for name in ("fwd", "bwd_dq", "bwd_dkdv", "bwd_rows"))
_TILE, _MASKS, _LOGITS = "sm80/tile.cuh", "core/masks.cuh", "core/logits.cuh"
_FRAGMENT, _SOFTMAX = "core/fragment.cuh", "core/softmax.cuh"
_KEYS, _SUMS = "core/key_tiles.cuh", "core/row_sums.cuh"

FAULTS = [
    # waits and barriers
    Fault("K is used one group too early", _FWD,
          "cp_async_wait<0>();\n        barrier();  // K is there", "cp_async_wait<1>();\n        barrier();  // K is there"),
    Fault("V is used one group too early", _FWD,
          "cp_async_wait<0>();\n        barrier();  // V is there", "cp_async_wait<1>();\n        barrier();  // V is there"),
    Fault("no wait for K", _FWD, "cp_async_wait<0>();\n        barrier();  // K is there", "barrier();  // K is there"),
    Fault("no barrier before K is read", _FWD, "barrier();  // K is there", "// K is there"),
    Fault("no barrier before V is read", _FWD, "barrier();  // V is there", "// V is there"),
    Fault("dq: K and V are used one group too early", _DQ, "cp_async_wait<0>();", "cp_async_wait<1>();"),
    Fault("dq: no barrier before K and V are read", _DQ, "barrier();  // K and V are there", ""),
    Fault("dq: no barrier before K and V are overwritten", _DQ, "barrier();  // nobody reads K and V any more", ""),
    Fault("dkdv: rows are used one group too early", _DKDV, "cp_async_wait<0>();", "cp_async_wait<1>();"),
    Fault("dkdv: no barrier before rows are read", _DKDV, "barrier();  // the tile is there", "// the tile is there"),
    Fault("dkdv: no barrier before ds is read", _DKDV, "barrier();  // ds is there", ""),
    Fault("dkdv: no barrier before K is overwritten", _DKDV, "barrier();  // nobody reads K any more", ""),
    Fault("dkdv: the next rows land where the present ones stand", _DKDV,
          "load_rows(next, stages + (stage_index ^ 1)", "load_rows(next, stages + stage_index"),
    Fault("the store does not wait for the warp's fragments", _TILE,
          "    warp_sync();\n    T* base", "    T* base"),
    # fragments
    Fault("left operand: rows of one matrix twice", _TILE,
          "chunk_address<K_DIM>(a, a_row + lane % 16, lane / 16)", "chunk_address<K_DIM>(a, a_row + lane % 8, lane / 16)"),
    Fault("left operand: the chunks swapped", _TILE, "a_row + lane % 16, lane / 16)", "a_row + lane % 16, 1 - lane / 16)"),
    Fault("right operand: chunk from the wrong lanes", _TILE, "lane / 16 * 8, lane / 8 % 2);", "lane / 16 * 8, lane / 16);"),
    Fault("V is not transposed", _TILE,
          "ldmatrix_x4_trans(right,", "ldmatrix_x4(right,"),
    Fault("mma: halves of the right operand swapped", _TILE,
          "mma_m16n8k16<T>(acc[m][n], left[m], right[0], right[1]);", "mma_m16n8k16<T>(acc[m][n], left[m], right[1], right[0]);"),
    Fault("mma: one column tile twice", _TILE,
          "mma_m16n8k16<T>(acc[m][n + 1], a[m][k], right[2], right[3]);", "mma_m16n8k16<T>(acc[m][n + 1], a[m][k], right[0], right[1]);"),
    Fault("packed pairs in the wrong rows", _FRAGMENT,
          "packed[n / 2][1] = pack<T>(x[n][2], x[n][3]);", "packed[n / 2][1] = pack<T>(x[n][0], x[n][1]);"),
    Fault("ds is read untransposed", _TILE, "a_column / 8 + lane / 8 % 2);", "a_column / 8 + lane / 16);"),
    Fault("a chunk in the wrong place of its group", _TILE, "(chunk ^ (chunks % kGroup * 16))", "(chunk + (chunks % kGroup * 16))"),
    Fault("a reduction over two lanes of four", _FRAGMENT,
          "    x += shuffle_xor(x, 1);\n    return x + shuffle_xor(x, 2);", "    return x + shuffle_xor(x, 1);"),
    Fault("a maximum over two lanes of four", _FRAGMENT, "return maximum(x, shuffle_xor(x, 2));", "return x;"),
    # strides and edges
    Fault("the head's stride for the batch's", _TILE, "stride_by(b, x.batch) + stride_by(h", "stride_by(b, x.head) + stride_by(h"),
    Fault("a row too many is stored", _TILE, "            if (first + row < limit && chunk * 8 < dim) {", "            if (first + row <= limit && chunk * 8 < dim) {"),
    Fault("what is right of an odd head dim is not zero", _TILE, "reads && d + e < dim ?", "reads ?"),
    Fault("masked rows are read", _TILE, "const bool reads = d < dim && valid(row);", "const bool reads = d < dim;"),
    Fault("GQA: the key heads in the wrong order", _FWD,
          "const int key_head = h / p.shape.group;", "const int key_head = h % p.shape.key_heads;"),
    Fault("the next K of the wrong source", _FWD, "keys, p.sources[tile.source].key,", "keys, p.sources[0].key,"),
    Fault("dkdv: the wrong query head", _DKDV, "const int h = key_head * p.shape.group + tile.head;", "const int h = key_head * p.shape.group;"),
    Fault("dkdv: the delta of the wrong source", _DKDV, "p.delta + mine.source * p.delta_source + at", "p.delta + at"),
    Fault("dq: the delta of the wrong source", _DQ, "p.delta + tile.source * p.delta_source", "p.delta + 0 * p.delta_source"),
    Fault("dkdv: dQ of the wrong rows", _DKDV, "tile.start + row, 8 * chunk)", "tile.start, 8 * chunk)"),
    # masks
    Fault("causal lets one column more through", _MASKS,
          "return seen & between(own - s.left, own + s.right + 1);", "return seen & between(own - s.left, own + s.right + 2);"),
    Fault("the window's left side is one short", _MASKS,
          "return seen & between(own - s.left, own + s.right + 1);", "return seen & between(own - s.left + 1, own + s.right + 1);"),
    Fault("dkdv: causal lets one row more through", _MASKS,
          "return between(own - s.right, own + s.left + 1);", "return between(own - s.right - 1, own + s.left + 1);"),
    Fault("the last column is never visited", _MASKS, "end = least(last + offset + s.right + 1, source_length(s, b));", "end = least(last + offset + s.right + 1, source_length(s, b) - 1);"),
    Fault("a causal tile passes for a full one", _MASKS, "start + COLUMNS <= first + offset + s.right + 1;", "start + COLUMNS <= last + offset + s.right + 1;"),
    Fault("dkdv: a causal tile passes for a full one", _MASKS, "return start >= last - offset - s.right", "return start >= first - offset - s.right"),
    Fault("dkdv: a window's last tile passes for a full one", _MASKS, "least(first - offset + s.left + 1, rows)", "least(last - offset + s.left + 1, rows)"),
    Fault("dkdv: keys that no row sees are read", _KEYS, "& between(begin - start, end - start);", "& below(source_length(source, tile.b) - start);"),
    Fault("holes beyond the first 32 columns are ignored", _MASKS, "kept |= Word{ballot(keeps)} << part;", "kept |= part == 0 ? Word{ballot(keeps)} : ~Word{0} << part;"),
    Fault("presence is ignored", _MASKS, "load_global(source.present + stride_by(b, 1)) == 0", "false"),
    Fault("dead rows count as live", _ROWS, "load_global(lse + i) != -infinity();", "load_global(lse + i) != infinity();"),
    Fault("the upper half of the live rows is lost", _ROWS, "lower | upper << 32", "lower | lower << 32"),
    # numbers
    Fault("the output is not rescaled", _FWD, "if (ballot(shrink != 1.0f) != 0) {", "if (false) {"),
    Fault("the sum is not rescaled", _SOFTMAX, "            sum[m][r] *= shrink;\n", ""),
    Fault("rows that saw nothing subtract -inf", _SOFTMAX, "const float from = now == -infinity() ? 0.0f : now;", "const float from = now;"),
    Fault("finished sources are not rescaled", _SOFTMAX,
          "multiply_add(finished_sum, exp2_approx(finished_largest - largest[m][r]), own)", "finished_sum + own"),
    Fault("a source's sum runs on into the next", _SOFTMAX, "        sum[m][r] = 0.0f;\n        if (holds", "        if (holds"),
    Fault("the sink does not join the denominator", _SOFTMAX, "sum = multiply_add(sum, shrink, exp2_approx(sink - now));", "sum = sum * shrink;"),
    Fault("mass of sources never visited", _FWD, "    clear_mass<kM>(outputs);\n", ""),
    Fault("the bias in natural units", _LOGITS, "stride_by(h, source.bias_head)) * kLog2e;", "stride_by(h, source.bias_head));"),
    Fault("no gradient through the softcap", _LOGITS, "dx[n][c] * multiply_add(-t, t, 1.0f)", "dx[n][c]"),
    Fault("delta without the mass", _ROWS, "delta = multiply_add(mass_gradient, load_global(p.mass", "delta = multiply_add(0.0f, load_global(p.mass"),
    Fault("delta without the gradient of lse", _ROWS, "delta -= load_global(p.grad_lse + at);", ""),
    Fault("delta summed over half a warp", _FRAGMENT, "for (int mask = 16; mask > 0; mask /= 2)", "for (int mask = 8; mask > 0; mask /= 2)"),
    Fault("dQ is not cleared first", _ROWS, "    if (p.dq_sum != nullptr) {\n        float* sum", "    if (false) {\n        float* sum"),
    Fault("dQ is stored instead of added", _DKDV, "add_global(sum + n * 128 + c * 32, dq[0][n][c]);", "store_global(sum + n * 128 + c * 32, dq[0][n][c]);"),
    Fault("dK is not scaled", _DKDV, "dk[0][n][c] *= p.shape.scale;", ""),
    Fault("dq: the sums of one source run on into the next", _SUMS, "            dz[r] = 0.0f;\n", ""),
]  # fmt: skip


def served() -> list[testing.Case]:
    """The cases that run at head dim 64, those that cross tiles first: they catch the most."""
    cases = [c for c in testing.cases() if max(c.dim, c.value_dim or 0) <= 64]
    return sorted(cases, key=lambda c: c.family != "long")


def trials() -> Iterator[tuple[str, Callable[[], list[testing.Result]]]]:
    for case in served():
        if testing.serves(case, "cuda", torch.bfloat16) is not None:
            continue
        for is_deterministic in (False, True):
            torch.use_deterministic_algorithms(is_deterministic)
            yield str(case), partial(testing.judge, case, "cuda", torch.bfloat16)
