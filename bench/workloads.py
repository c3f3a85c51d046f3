"""The attention problems that are timed, each named after the model it comes from.

A workload is every query stream attending to every source. Widths are those of the published configurations named in
`source`; where a model leaves a length open (resolution, seconds, frames), the source says which was taken.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# A scaled workload keeps at least this many samples where samples differ from each other.
UNEQUAL_SAMPLES = 4


@dataclass(frozen=True)
class Workload:
    """One attention problem.

    queries: rows of each query stream; keys: columns of each source. fill: the mean share of the first source's columns
    that a sample has (the rest is padding). absent: whether every second sample lacks the first source.
    scale: what `scaled` made smaller, "1" if nothing.
    """

    name: str
    group: str
    source: str
    batch: int
    heads: int
    kv_heads: int
    dim: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    causal: bool = False
    fill: float = 1.0
    absent: bool = False
    quick: bool = False
    scale: str = "1"

    @property
    def shape(self) -> str:
        """Such as "B2 H24/8 Q4096+512 K4096+512 D64 causal"."""
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        lengths = [f"{letter}{'+'.join(map(str, x))}" for letter, x in (("Q", self.queries), ("K", self.keys))]
        said = [f"B{self.batch}", f"H{heads}", *lengths, f"D{self.dim}"]
        said += ["causal"] if self.causal else []
        said += [f"fill {self.fill:.0%}"] if self.fill < 1 else []
        return " ".join(said + (["first source in half"] if self.absent else []))

    @property
    def unequal(self) -> bool:
        """Whether samples see different columns."""
        return self.fill < 1 or self.absent

    def lengths(self) -> list[int]:
        """How many of the first source's columns each sample has; one has them all, and the mean is about `fill`.

        The mean of x^p over [0, 1] is 1 / (p + 1), so p = 1 / fill - 1. The order is drawn, not sorted.
        """
        longest = self.keys[0]
        if self.fill >= 1:
            found = [longest] * self.batch
        else:
            power = 1 / self.fill - 1
            found = [max(1, round(longest * ((n + 0.5) / self.batch) ** power)) for n in range(self.batch)]
            found[-1] = longest
            random.Random(0).shuffle(found)
        return [0 if self.absent and n % 2 == 0 else length for n, length in enumerate(found)]

    def pairs(self) -> int:
        """How many (row, column) pairs are seen, over the whole batch and all query heads."""
        rows = sum(self.queries)
        if self.causal:
            (n,), (m,) = self.queries, self.keys
            seen = sum(min(i + 1, m) for i in range(n)) * self.batch
        else:
            seen = rows * (sum(self.lengths()) + self.batch * sum(self.keys[1:]))
        return seen * self.heads

    def flops(self, pass_: str) -> float:
        """Floating-point operations: 2 products of 2 D a pair forward, 5 backward."""
        forward = 4.0 * self.pairs() * self.dim
        return forward * {"forward": 1.0, "backward": 2.5, "both": 3.5}[pass_]

    def bytes(self, pass_: str, itemsize: int) -> float:
        """What no implementation can do without moving: each tensor that is seen read once, each result written once.

        forward reads q, k, v and writes out; backward reads q, k, v, out, dout and writes dq, dk, dv.
        """
        rows = self.batch * self.heads * sum(self.queries)
        columns = self.kv_heads * (sum(self.lengths()) + self.batch * sum(self.keys[1:]))
        forward = 2 * rows + 2 * columns
        backward = 4 * rows + 4 * columns
        numbers = {"forward": forward, "backward": backward, "both": forward + backward}[pass_]
        return float(numbers * self.dim * itemsize)


def scaled(workload: Workload, gflop: float) -> Workload:
    """`workload` made smaller until its float32 forward has at most `gflop` billion operations and an eighth the bytes.

        (Eight operations a byte is about what the cores of a CPU and its memory do in the same time.) Heads are halved
    first (query and key heads together, down to 2 or an odd number of key heads), then the batch (down to 1, or to 4
    where samples differ), then every length over 128. Head dim, masks and the share of key heads stay, and `scale` says
    what was done.
    """
    made = {"batch": 1, "heads": 1, "lengths over 128": 1}
    while workload.flops("forward") > gflop * 1e9 or workload.bytes("forward", 4) > gflop * 1e9 / 8:
        if workload.kv_heads % 2 == 0 and workload.heads > 2:
            step = {"heads": workload.heads // 2, "kv_heads": workload.kv_heads // 2}
            made["heads"] *= 2
        elif workload.batch > (UNEQUAL_SAMPLES if workload.unequal else 1):
            step = {"batch": workload.batch // 2}
            made["batch"] *= 2
        else:
            shorter = [
                tuple(-(-n // 2) if n > 128 else n for n in lengths) for lengths in (workload.queries, workload.keys)
            ]
            if tuple(shorter) == (workload.queries, workload.keys):
                break
            workload = replace(workload, queries=shorter[0], keys=shorter[1])
            made["lengths over 128"] *= 2
            continue
        workload = replace(workload, **step)  # type: ignore[arg-type]
    said = ", ".join(f"{name} 1/{by}" for name, by in made.items() if by > 1)
    return replace(workload, scale=said or "1")


@dataclass
class Inputs:
    """A workload's tensors, each (B, N, H, D) in memory and seen as (B, H, N, D), as projections leave them.

    lengths (B,) int32 and present (B,) bool speak of the first source; None where every sample has all of it.
    """

    workload: Workload
    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    grads: list[Tensor]
    lengths: Tensor | None
    present: Tensor | None

    def tensors(self) -> list[Tensor]:
        """What is differentiated: queries, keys, values."""
        return [*self.queries, *self.keys, *self.values]

    def names(self) -> list[str]:
        """A name for each of `tensors()`."""
        many = [("query", self.queries), ("key", self.keys), ("value", self.values)]
        return [f"{name}{n}" for name, held in many for n in range(len(held))]

    def seen(self) -> Tensor | None:
        """(B, all columns) bool: what a sample sees of the concatenated sources; None where it is everything."""
        if self.lengths is None and self.present is None:
            return None
        device = self.keys[0].device
        first = torch.arange(self.workload.keys[0], device=device) < torch.tensor(
            self.workload.lengths(), device=device
        ).unsqueeze(1)
        rest = torch.ones(self.workload.batch, sum(self.workload.keys[1:]), dtype=torch.bool, device=device)
        return torch.cat([first, rest], 1)


def make_inputs(workload: Workload, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Standard normal queries, keys, values and output gradients; the padding holds numbers too."""
    generator = torch.Generator(device).manual_seed(seed)

    def numbers(heads: int, length: int) -> Tensor:
        shape = (workload.batch, length, heads, workload.dim)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype).transpose(1, 2)

    w = workload
    present = torch.tensor([n % 2 == 1 for n in range(w.batch)], device=device) if w.absent else None
    lengths = torch.tensor([max(n, 1) for n in w.lengths()], dtype=torch.int32, device=device) if w.fill < 1 else None
    return Inputs(
        w,
        [numbers(w.heads, n).requires_grad_() for n in w.queries],
        [numbers(w.kv_heads, n).requires_grad_() for n in w.keys],
        [numbers(w.kv_heads, n).requires_grad_() for n in w.keys],
        [numbers(w.heads, n) for n in w.queries],
        lengths,
        present,
    )


def parse_shape(text: str) -> Workload:
    """A workload from "b=2,h=16,kv=4,q=256,k=4096+256,d=64,causal,fill=50,absent"; raises ValueError.

    kv is h, and k is q, unless given; several sources are joined by +. A "q" of several lengths is joint attention.
    """
    known = {"b": "batch", "h": "heads", "kv": "kv_heads", "q": "queries", "k": "keys", "d": "dim", "fill": "fill"}
    given: dict[str, tuple[int, ...]] = {}
    flags = set()
    for part in filter(None, (part.strip() for part in text.lower().split(","))):
        name, _, value = part.partition("=")
        if name in ("causal", "absent") and not value:
            flags.add(name)
        elif name in known and all(x.isdecimal() and int(x) > 0 for x in value.split("+")):
            given[name] = tuple(int(x) for x in value.split("+"))
        else:
            raise ValueError(f"--shape must hold {', '.join(known)} as name=number, causal or absent, got {part!r}")
    missing = {"b", "h", "q", "d"} - given.keys()
    if missing:
        raise ValueError(f"--shape must give b, h, q and d, got {text!r} without {', '.join(sorted(missing))}")
    many = [name for name in ("b", "h", "kv", "d", "fill") if len(given.get(name, (0,))) > 1]
    if many:
        raise ValueError(f"--shape takes several lengths for q and k only, got several for {', '.join(many)}")
    keys = given.get("k", given["q"])
    queries, fill = given["q"], given.get("fill", (100,))[0]
    if len(queries) > 1 and queries != keys:
        raise ValueError(f"--shape with several q is joint attention: k must be left out or the same, got {text!r}")
    if "causal" in flags and (len(keys) > 1 or len(queries) > 1 or fill < 100 or "absent" in flags):
        raise ValueError(f"--shape: causal goes with one whole source only, got {text!r}")
    if "absent" in flags and (len(keys) == 1 or len(queries) > 1):
        raise ValueError(f"--shape: absent needs one q and a second source that is there, got {text!r}")
    if fill > 100:
        raise ValueError(f"--shape: fill is a percentage, got {fill}")
    heads = given["h"][0]
    kv_heads = given.get("kv", (heads,))[0]
    if heads % kv_heads:
        raise ValueError(f"--shape: h must be a multiple of kv, got h={heads} and kv={kv_heads}")
    workload = Workload(
        "shape", "shape", "--shape", given["b"][0], heads, kv_heads, given["d"][0], queries, keys,
        causal="causal" in flags, fill=fill / 100, absent="absent" in flags,
    )  # fmt: skip
    return replace(workload, name=workload.shape.replace(" ", "-"))


FLUX = "FLUX.1-dev: 24 heads of 128 (its transformer/config.json), 512 text tokens, 1024 x 1024 as 64 x 64 patches"
SD3 = "SD3 medium: 24 heads of 64, 64 x 64 patches (its transformer/config.json), 77 CLIP + 256 T5 tokens"
IDEFICS2 = "Idefics2 perceiver: 64 latents, 16 heads of 96 over 4 key heads (Idefics2PerceiverConfig)"
QFORMER = "BLIP-2 Q-Former: 32 queries, 12 heads of 64 (its config.json), 257 tokens a frame"
MBT = "MBT: 4 bottleneck tokens, 12 heads of 64 (scenic mbt config; arXiv 2107.00135), 196 video tokens a frame"
VJEPA2 = "V-JEPA 2 attentive pooler: 1 query, 16 heads of 64 (VJEPA2Config); 256 tokens a pair of frames at 256 x 256"
WHISPER = "Whisper large-v3 decoder: 20 heads of 64, 448 text positions over 1500 audio positions (its config.json)"
LLAMA = (
    "Llama-3.2-11B-Vision cross-attention: 32 heads of 128 over 8 key heads; 4 tiles of 40 x 40 patches + 1 "
    "(its config.json: image_size 560, patch_size 14, max_num_tiles 4)"
)
LLAVA = "LLaVA-1.5-7B: 32 heads of 128 (Vicuna-7B), 576 image tokens (24 x 24 patches)"
LTX2 = (
    "LTX-2: audio-video cross-attention in 32 heads of 64 (its transformer config); 121 frames of 512 x 768 are "
    "16 x 16 x 24 video tokens, 5 s are 126 audio tokens"
)
SELF = "plain self-attention, 16384 tokens in all and width 2048, as FlashAttention's tables have it (arXiv 2307.08691)"
PADDED = "a padded batch of 8: encoder with 16 heads of 64 (BERT-large, ViT-L), lengths spread about the mean fill"
ABSENT = "a 4096-token source (video) that half of the samples lack, and a 256-token one (text); 8 heads of 64"


def workloads() -> list[Workload]:
    """Every workload, in the order of what a GPU run would want to know first."""
    found = []
    for length, quick in ((4096, True), (16384, True), (65536, False)):
        k = f"{length // 1024}k"
        frames = length // 256
        found += [
            Workload(f"perceiver-{k}", "few-query", IDEFICS2, 4, 16, 4, 96, (64,), (length, 64), quick=quick),
            Workload(f"qformer-{k}", "few-query", QFORMER, 4, 12, 12, 64, (32,), (257 * frames,), quick=length == 4096),
            Workload(f"mbt-{k}", "few-query", MBT, 4, 12, 12, 64, (4,), (196 * frames, 4), quick=length == 16384),
            Workload(f"attention-pool-{k}", "few-query", VJEPA2, 4, 16, 16, 64, (1,), (length,), quick=length == 16384),
        ]
    found += [
        Workload("absent-half", "absent", ABSENT, 8, 8, 8, 64, (256,), (4096, 256), absent=True, quick=True),
        Workload("absent-none", "absent", ABSENT, 8, 8, 8, 64, (256,), (4096, 256), quick=True),
    ]
    for fill in (25, 50, 75):
        found.append(
            Workload(f"padded-{fill}", "padded", PADDED, 8, 16, 16, 64, (2048,), (2048,), fill=fill / 100, quick=True)
        )
    found += [
        Workload("flux-1024px", "joint", FLUX, 1, 24, 24, 128, (512, 4096), (512, 4096), quick=True),
        Workload("sd3-1024px", "joint", SD3, 2, 24, 24, 64, (333, 4096), (333, 4096), quick=True),
        Workload("whisper-train", "cross", WHISPER, 8, 20, 20, 64, (448,), (1500,), quick=True),
        Workload("whisper-step", "cross", WHISPER, 8, 20, 20, 64, (1,), (1500,)),
        Workload("llama-vision", "cross", LLAMA, 2, 32, 8, 128, (512,), (6404,), quick=True),
        Workload("ltx2-audio-to-video", "cross", LTX2, 1, 32, 32, 64, (6144,), (126,), quick=True),
        Workload("ltx2-video-to-audio", "cross", LTX2, 1, 32, 32, 64, (126,), (6144,)),
        Workload("llava-prefill", "llava", f"{LLAVA}, 64 text tokens", 8, 32, 32, 128, (640,), (640,), causal=True),
        Workload("llava-next-prefill", "llava", f"{LLAVA}, 5 tiles, 192 text tokens", 1, 32, 32, 128, (3072,), (3072,),
                 causal=True, quick=True),
    ]  # fmt: skip
    for dim in (64, 128, 256):
        for length in (512, 1024, 2048, 4096, 8192, 16384):
            for causal in (False, True):
                name = f"self-d{dim}-{length}{'-causal' if causal else ''}"
                quick = length == 2048 and dim < 256
                heads, batch = 2048 // dim, 16384 // length
                found.append(
                    Workload(name, "self", SELF, batch, heads, heads, dim, (length,), (length,), causal, quick=quick)
                )
    return found


def select(names: Sequence[str], quick: bool) -> list[Workload]:
    """The workloads with these names or groups, all if none are named; raises ValueError for a name not known."""
    known = workloads()
    if not names:
        return [w for w in known if w.quick or not quick]
    for name in names:
        if not any(name in (w.name, w.group) for w in known):
            groups = dict.fromkeys(w.group for w in known)
            raise ValueError(f"--workload must be a group ({', '.join(groups)}) or a name of --list, got {name!r}")
    return [w for w in known if w.name in names or w.group in names]
