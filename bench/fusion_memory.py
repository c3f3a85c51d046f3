"""Peak memory of fusion blocks against the same blocks written by concatenating and slicing, with the same weights.

    python bench/fusion_memory.py [--length 2048] [--json]

mmdit       MMDiTBlock, two streams of N tokens, B2 width 256, 8 heads of 32
bottleneck  BottleneckFusion, two modalities of N tokens, B2 width 256, 8 heads of 32, 4 bottlenecks, 4 layers

Each figure is how far what torch's allocator holds rises over building the block and its inputs and one forward and
backward (float32, CPU). The concatenated forms call F.scaled_dot_product_attention; results and gradients must agree
first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnfuse.bench.measure import peak_bytes
from attnfuse.fusion import BottleneckFusion
from attnfuse.fusion.mmdit import MMDiTBlock

BATCH, DIM, HEADS = 2, 256, 8
Run = Callable[[Any, list[Tensor]], list[Tensor]]


def mmdit() -> nn.Module:
    block = MMDiTBlock((DIM, DIM), DIM // HEADS, HEADS, DIM)
    for parameter in block.parameters():  # a new block is the identity
        nn.init.normal_(parameter, std=0.05)
    return block


def bottleneck() -> nn.Module:
    return BottleneckFusion({"a": DIM, "b": DIM}, DIM, HEADS, 4)


def mmdit_sources(block: Any, inputs: list[Tensor]) -> list[Tensor]:
    return list(block(inputs, time_cond=inputs[0][:, 0]))


def mmdit_concatenated(block: Any, inputs: list[Tensor]) -> list[Tensor]:
    cond = F.silu(inputs[0][:, 0])
    modulations = [linear(cond)[:, None].chunk(6, dim=-1) for linear in block.to_cond]
    parts = []
    for x, norm, to_qkv, m in zip(inputs, block.attn_layernorms, block.joint_attn.to_qkv, modulations):
        qkv = to_qkv(torch.addcmul(m[0], norm(x), 1 + m[1])).unflatten(-1, (3, HEADS, -1))
        parts.append([y.transpose(1, 2) for y in qkv.unbind(2)])
    query, key, value = (torch.cat(part, 2) for part in zip(*parts))
    del parts, qkv
    out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    results = []
    for s, piece in enumerate(out.split([x.shape[1] for x in inputs], 1)):
        m = modulations[s]
        x = torch.addcmul(inputs[s], m[2], block.joint_attn.to_out[s](piece))
        hidden = torch.addcmul(m[3], block.ff_layernorms[s](x), 1 + m[4])
        results.append(torch.addcmul(x, m[5], block.feedforwards[s](hidden)))
    return results


def bottleneck_sources(module: Any, inputs: list[Tensor]) -> list[Tensor]:
    return [module(dict(zip("ab", inputs))).fused]


def bottleneck_concatenated(module: Any, inputs: list[Tensor]) -> list[Tensor]:
    streams = {name: module.embed[name](x) for name, x in zip("ab", inputs)}
    shared = module.bottleneck.expand(BATCH, -1, -1)
    count = shared.shape[1]
    for blocks in zip(*module.layers.values()):
        updates = []
        for name, block in zip("ab", blocks):
            x = torch.cat([streams[name], shared], 1)
            out = F.scaled_dot_product_attention(*block.attn.project(block.norm1(x)))
            x = x + block.attn.out_proj(out.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
            streams[name] = x[:, :-count]
            updates.append(x[:, -count:])
        shared = torch.stack(updates).mean(0)
    return [torch.stack([module.norms[name](x).mean(1) for name, x in streams.items()]).mean(0)]


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Run]]] = {
    "mmdit": (mmdit, {"sources": mmdit_sources, "concatenated": mmdit_concatenated}),
    "bottleneck": (bottleneck, {"sources": bottleneck_sources, "concatenated": bottleneck_concatenated}),
}


def both_passes(case: str, form: str, length: int) -> list[Tensor]:
    """Results, then the gradients of inputs and parameters."""
    torch.manual_seed(0)
    module = CASES[case][0]()
    inputs = [torch.randn(BATCH, length, DIM, requires_grad=True) for _ in range(2)]
    results = CASES[case][1][form](module, inputs)
    torch.stack([x.square().mean() for x in results]).sum().backward()
    return [x.detach() for x in results] + [x.grad for x in (*inputs, *module.parameters()) if x.grad is not None]


def peak_megabytes(case: str, form: str, length: int) -> float:
    """Megabytes by which what torch's allocator holds rises over one forward and backward."""
    return peak_bytes(lambda: both_passes(case, form, length), "cpu") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of fusion blocks against their concatenated forms.")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each stream")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of lines")
    args = parser.parse_args()
    rows = []
    for case, (_, forms) in CASES.items():
        torch.testing.assert_close(*(both_passes(case, form, 100) for form in forms))
        rises = {form: peak_megabytes(case, form, args.length) for form in forms}
        ratio = rises["sources"] / rises["concatenated"]
        rows.append({"case": case, "length": args.length, **{f"{k}_mb": v for k, v in rises.items()}, "ratio": ratio})
        if not args.json:
            figures = "  ".join(f"{form} {rise:.0f} MB" for form, rise in rises.items())
            print(f"{case:12} N {args.length}  {figures}  ratio {ratio:.3f}", flush=True)
    if args.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
