"""diffusers' transformers with their native attention and with attnfuse: outputs and gradients against float64.

    python bench/diffusers_parity.py --write docs/diffusers_parity.md

Every model is tiny, its weights random. Errors are root mean square differences to the same model in float64 with
native attention; the budget is the package's: twice native's error in the same dtype, and one rounding.
"""

from __future__ import annotations

import argparse
import copy
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

import attnfuse
from attnfuse import functional
from attnfuse.integrations.diffusers import register
from attnfuse.testing import difference, size

B = 2


@dataclass(frozen=True)
class Model:
    """A diffusers class, its tiny configuration, and inputs: by name, tensors in float64 or anything else.

    attentions: how many attention calls one forward makes; route: "dispatcher" or the processor that serves it.
    """

    name: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    attentions: int
    route: str = "dispatcher"

    def build(self) -> torch.nn.Module:
        torch.manual_seed(0)
        model = getattr(diffusers, self.name)(**self.config).double()
        # Some start their gates and output layers at zero: what is behind those would be compared to itself.
        with torch.no_grad():
            for p in model.parameters():
                if not p.any():
                    p.normal_(std=0.1)
        return model


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def padded(*lengths: int, longest: int) -> Tensor:
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


def timestep() -> Tensor:
    return torch.tensor([3.0, 700.0])


MODELS = [
    Model(
        "FluxTransformer2DModel",
        {
            "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 32,
            "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8],
        },
        lambda: {
            "hidden_states": randn(B, 16, 4), "encoder_hidden_states": randn(B, 6, 32),
            "pooled_projections": randn(B, 32), "timestep": timestep() / 1000,
            "img_ids": torch.cartesian_prod(*(torch.arange(n) for n in (1, 4, 4))).double(),
            "txt_ids": torch.zeros(6, 3, dtype=torch.float64),
        },
        attentions=2,
    ),
    Model(
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 3, "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4),
        },
        lambda: {
            "hidden_states": randn(B, 16, 16), "encoder_hidden_states": randn(B, 7, 16),
            "encoder_hidden_states_mask": padded(7, 4, longest=7), "timestep": timestep() / 1000,
            "img_shapes": [(1, 4, 4)] * B,
        },
        attentions=2,
    ),
    Model(
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
            "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1,
            "guidance_embeds": True, "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
        },
        lambda: {
            "hidden_states": randn(B, 4, 2, 4, 4), "encoder_hidden_states": randn(B, 8, 16),
            "encoder_attention_mask": padded(8, 5, longest=8), "pooled_projections": randn(B, 8),
            "timestep": timestep().long(), "guidance": torch.full((B,), 6.0, dtype=torch.float64),
        },
        attentions=3,
    ),
    Model(
        "WanTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
            "freq_dim": 32, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True, "rope_max_seq_len": 32,
            "image_dim": 16, "added_kv_proj_dim": 24,
        },
        lambda: {
            "hidden_states": randn(B, 4, 2, 4, 4), "encoder_hidden_states": randn(B, 512, 16),
            "encoder_hidden_states_image": randn(B, 5, 16), "timestep": timestep().long(),
        },
        attentions=6,
    ),
    Model(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
            "cross_attention_dim": 16, "num_layers": 1, "caption_channels": 16,
        },
        lambda: {
            "hidden_states": randn(B, 32, 4), "encoder_hidden_states": randn(B, 8, 16),
            "encoder_attention_mask": padded(8, 3, longest=8), "timestep": timestep().long(),
            "num_frames": 2, "height": 4, "width": 4,
        },
        attentions=2,
    ),
    Model(
        "LTX2VideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
            "cross_attention_dim": 16, "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8, "num_layers": 1, "caption_channels": 16,
            "rope_double_precision": False,
        },
        lambda: {
            "hidden_states": randn(B, 32, 4), "audio_hidden_states": randn(B, 5, 4),
            "encoder_hidden_states": randn(B, 8, 16), "audio_encoder_hidden_states": randn(B, 8, 16),
            "encoder_attention_mask": padded(8, 3, longest=8), "audio_encoder_attention_mask": padded(8, 3, longest=8),
            "timestep": timestep().long(), "num_frames": 2, "height": 4, "width": 4, "audio_num_frames": 5,
        },
        attentions=6,
    ),
    Model(
        "SD3Transformer2DModel",
        {
            "sample_size": 8, "patch_size": 1, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32,
            "pooled_projection_dim": 64, "out_channels": 4, "pos_embed_max_size": 8, "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        lambda: {
            "hidden_states": randn(B, 4, 4, 4), "encoder_hidden_states": randn(B, 7, 32),
            "pooled_projections": randn(B, 64), "timestep": timestep(),
        },
        attentions=5,
        route="JointAttnProcessor",
    ),
    Model(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
            "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32,
            "out_channels": 4, "pos_embed_max_size": 64,
        },
        lambda: {
            "hidden_states": randn(B, 4, 8, 8), "encoder_hidden_states": randn(B, 7, 32), "timestep": timestep() / 1000,
        },
        attentions=3,
        route="JointAttnProcessor",
    ),
    Model(
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 2,
            "text_embed_dim": 8, "num_layers": 1, "sample_width": 8, "sample_height": 8, "sample_frames": 5,
            "max_text_seq_length": 8, "use_rotary_positional_embeddings": True,
        },
        lambda: {
            "hidden_states": randn(B, 2, 4, 8, 8), "encoder_hidden_states": randn(B, 8, 8),
            "timestep": timestep().long(),
            "image_rotary_emb": tuple(f(torch.arange(256).view(32, 8) / 40.0) for f in (torch.cos, torch.sin)),
        },
        attentions=2,
        route="CogVideoXAttnProcessor",
    ),
    Model(
        "PixArtTransformer2DModel",
        {
            "sample_size": 8, "num_layers": 1, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 3,
            "caption_channels": 32, "in_channels": 4, "cross_attention_dim": 24, "out_channels": 8,
            "use_additional_conditions": False,
        },
        lambda: {
            "hidden_states": randn(B, 4, 8, 8), "encoder_hidden_states": randn(B, 8, 32),
            "encoder_attention_mask": padded(8, 3, longest=8), "timestep": timestep().long(),
            "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
        },
        attentions=2,
        route="AttnProcessor",
    ),
    Model(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 24, "num_layers": 1,
            "num_refiner_layers": 1, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2,
            "scaling_factor": 1.0, "axes_dim_rope": (4, 2, 2), "axes_lens": (64, 64, 64), "cap_feat_dim": 32,
        },
        lambda: {
            "hidden_states": randn(B, 4, 8, 8), "encoder_hidden_states": randn(B, 8, 32),
            "encoder_attention_mask": padded(8, 5, longest=8), "timestep": timestep() / 1000,
        },
        attentions=3,
        route="Lumina2AttnProcessor",
    ),
]  # fmt: skip


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts the attention calls attnfuse runs, one for each query."""
    calls, original = [0], functional._run

    def run(*args: Any) -> Any:
        calls[0] += 1
        return original(*args)

    functional._run = run  # type: ignore[assignment]
    try:
        yield calls
    finally:
        functional._run = original


def run(model: torch.nn.Module, spec: Model, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs, and gradients of every float input and parameter, in float64."""
    torch.manual_seed(1)
    model = copy.deepcopy(model).to(dtype)
    given = spec.inputs()
    leaves = {
        name: x.to(dtype).requires_grad_()
        for name, x in given.items()
        if isinstance(x, Tensor) and x.dtype == torch.float64
    }
    outputs = [x for x in model(**(given | leaves), return_dict=False) if x is not None]
    generator = torch.Generator().manual_seed(2)
    arriving = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    wanted = leaves | dict(model.named_parameters())
    grads = torch.autograd.grad(outputs, list(wanted.values()), arriving, allow_unused=True)
    found = {f"out {n}": x.detach().double() for n, x in enumerate(outputs)}
    # An output that nothing reads gives no gradient where streams are apart, and one of 0 where they are concatenated.
    return found | {
        f"d {name}": torch.zeros_like(x).double() if g is None else g.double()
        for (name, x), g in zip(wanted.items(), grads)
    }


@dataclass
class Row:
    """One model in one dtype: the worst quantity forward and backward, as (error, native's error, budget)."""

    spec: Model
    dtype: torch.dtype
    calls: int
    forward: tuple[float, float, float]
    backward: tuple[float, float, float]
    worst: str

    @property
    def passed(self) -> bool:
        within = all(error <= budget for error, _, budget in (self.forward, self.backward))
        return within and self.calls == self.spec.attentions


def compare(spec: Model, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> list[Row]:
    """Every quantity of `spec` within its budget, or not, for each dtype."""
    native: Any = spec.build()
    ours = copy.deepcopy(native)
    native.set_attention_backend("native")
    exact = run(native, spec, torch.float64)
    low = {dtype: run(native, spec, dtype) for dtype in dtypes}
    ours.set_attention_backend("attnfuse")
    rows = []
    try:
        for dtype in dtypes:
            with counted() as calls:
                found = run(ours, spec, dtype)
            assert found.keys() == exact.keys() == low[dtype].keys()
            # A gradient may be 0 by cancellation alone; what was cancelled is as large as the model's other gradients.
            floor = max(size(x) for name, x in exact.items() if name.startswith("d "))
            judged = {}
            for name, truth in exact.items():
                theirs = difference(low[dtype][name], truth)
                rounding = torch.finfo(dtype).eps * max(size(truth), floor * name.startswith("d "))
                judged[name] = (difference(found[name], truth), theirs, 2 * theirs + rounding)
            worst = {
                kind: max((n for n in judged if n.startswith(kind)), key=lambda n: judged[n][0] / judged[n][2])
                for kind in ("out ", "d ")
            }
            rows.append(Row(spec, dtype, calls[0], judged[worst["out "]], judged[worst["d "]], worst["d "]))
    finally:
        ours.set_attention_backend("native")
    return rows


def table(rows: list[Row]) -> str:
    lines = [
        "# diffusers: native attention and attnfuse",
        "",
        f"diffusers {diffusers.__version__}, torch {torch.__version__}, attnfuse {attnfuse.__version__}, "
        f"Python {platform.python_version()}, CPU. Written by",
        "",
        "    python bench/diffusers_parity.py --write docs/diffusers_parity.md",
        "",
        "Tiny models with random weights; gradients of every float input and every parameter. An error is the root",
        "mean square difference to the same model in float64 with native attention. Budget: twice native's error in",
        "the same dtype, and one rounding. Each row shows the output and the gradient that come closest to their",
        "budgets; all the others are further from theirs. Calls: how many attentions attnfuse ran in one forward pass,",
        "out of how many the model has (joint attention is one for each stream). On a CPU attnfuse runs torch's own",
        "flash kernel once a source, so a plain call may give native's very numbers.",
        "",
        "| model | served by | dtype | calls | out | native's | budget | gradient | native's | budget | closest | |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = " | ".join(f"{x:.2e}" for x in (*row.forward, *row.backward))
        dtype = str(row.dtype).removeprefix("torch.")
        lines.append(
            f"| {row.spec.name} | {row.spec.route} | {dtype} | {row.calls} of {row.spec.attentions} | {numbers} | "
            f"{row.worst.removeprefix('d ')} | {'within' if row.passed else 'NOT WITHIN'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the file to write; printed if not given")
    parser.add_argument("--model", help="only models whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    register()
    rows = []
    chosen = [spec for spec in MODELS if arguments.model is None or arguments.model.lower() in spec.name.lower()]
    for n, spec in enumerate(chosen):
        rows += compare(spec)
        state = "within" if all(row.passed for row in rows[-2:]) else "NOT WITHIN"
        print(f"[{n + 1}/{len(chosen)}] {spec.name}: {state}", flush=True)
    if arguments.write is None:
        print(table(rows))
    else:
        arguments.write.write_text(table(rows))
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
