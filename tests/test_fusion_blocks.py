"""The blocks on token tensors: Flamingo's resampler and gated layer, MM-DiT, decoupled cross-attention."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnfuse import AuxRequest
from attnfuse.fusion.adapter import DecoupledCrossAttention
from attnfuse.fusion.flamingo import GatedCrossAttentionBlock, PerceiverResampler
from attnfuse.fusion.mmdit import JointAttention, MMDiTBlock

B = 3
NAN = math.nan


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def stirred(module):
    """Every parameter moved: gates and modulations that start at 0 would let mistakes pass."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def loss_of(*tensors):
    return sum((x * torch.linspace(-1, 2, x.numel()).view(x.shape)).sum() for x in tensors)


# What open_flamingo's modules save for dim 12, dim_visual 10, 3 heads of 4, 5 latents, 2 layers.
RESAMPLER_KEYS = {
    "latents": (5, 12),
    "frame_embs": (3, 12),
    "media_time_embs": (4, 1, 12),
    **{
        f"layers.{i}.{name}": shape
        for i in range(2)
        for name, shape in {
            "0.norm_media.weight": (12,),
            "0.norm_media.bias": (12,),
            "0.norm_latents.weight": (12,),
            "0.norm_latents.bias": (12,),
            "0.to_q.weight": (12, 12),
            "0.to_kv.weight": (24, 12),
            "0.to_out.weight": (12, 12),
            "1.0.weight": (12,),
            "1.0.bias": (12,),
            "1.1.weight": (48, 12),
            "1.3.weight": (12, 48),
        }.items()
    },
    "norm.weight": (12,),
    "norm.bias": (12,),
}
GATED_KEYS = {
    "attn_gate": (1,),
    "ff_gate": (1,),
    "attn.norm.weight": (12,),
    "attn.norm.bias": (12,),
    "attn.to_q.weight": (12, 12),
    "attn.to_kv.weight": (24, 10),
    "attn.to_out.weight": (12, 12),
    "ff.0.weight": (12,),
    "ff.0.bias": (12,),
    "ff.1.weight": (48, 12),
    "ff.3.weight": (12, 48),
}


def random_state(keys):
    """A state_dict such as open_flamingo's module of these sizes would save."""
    return {name: 0.5 * torch.randn(shape) + (name.endswith("norm.weight")) for name, shape in keys.items()}


def resampler():
    return PerceiverResampler(
        dim=12, depth=2, dim_head=4, heads=3, num_latents=5, max_num_media=4, max_num_frames=3
    )


def gated(**options):
    return stirred(GatedCrossAttentionBlock(dim=12, dim_visual=10, dim_head=4, heads=3, **options))


# The formulas again, plainly: einsum, concatenation, and the same parameter names.


def plain_attention(q, k, v, heads, mask=None):
    """q (B, N, H·D), k and v (B, M, H·D); mask (B, N, M). Rows that see nothing give 0."""
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    z = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        z = z.masked_fill(~mask[:, None], -torch.inf)
    p = torch.nan_to_num(z.softmax(-1))
    return torch.einsum("bhij,bjhd->bihd", p, v).flatten(2)


def plain_norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def plain_ff(state, name, x):
    x = plain_norm(state, f"{name}.0", x)
    return F.gelu(x @ state[f"{name}.1.weight"].T) @ state[f"{name}.3.weight"].T


def plain_resampler(state, x, heads):
    batch, media, frames, tokens, dim = x.shape
    if "frame_embs" in state:
        x = x + state["frame_embs"][None, None, :frames, None]
    x = x.reshape(batch, media, frames * tokens, dim)
    if "media_time_embs" in state:
        x = x + state["media_time_embs"][None, :media]
    out = []
    for t in range(media):
        latents = state["latents"].expand(batch, -1, -1)
        for i in range(2):
            at = f"layers.{i}.0"
            normed = plain_norm(state, f"{at}.norm_latents", latents)
            both = torch.cat([plain_norm(state, f"{at}.norm_media", x[:, t]), normed], 1)
            k, v = (both @ state[f"{at}.to_kv.weight"].T).chunk(2, -1)
            attended = plain_attention(normed @ state[f"{at}.to_q.weight"].T, k, v, heads)
            latents = latents + attended @ state[f"{at}.to_out.weight"].T
            latents = latents + plain_ff(state, f"layers.{i}.1", latents)
        out.append(plain_norm(state, "norm", latents))
    return torch.stack(out, 1)


def plain_gated(state, x, media, heads, mask):
    """mask (B, N, T·n): which media tokens each text token sees."""
    k, v = (media.flatten(1, 2) @ state["attn.to_kv.weight"].T).chunk(2, -1)
    q = plain_norm(state, "attn.norm", x) @ state["attn.to_q.weight"].T
    x = x + plain_attention(q, k, v, heads, mask) @ state["attn.to_out.weight"].T * state["attn_gate"].tanh()
    return x + plain_ff(state, "ff", x) * state["ff_gate"].tanh()


LOCATIONS = torch.tensor([[0, 1, 0, 0, 1, 0, 0], [1, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0]], dtype=torch.bool)


def times_mask(locations, media, tokens, immediate, rows):
    time = locations.cumsum(1) if rows is None else locations.sum(1, keepdim=True).expand(-1, rows)
    column = torch.arange(1, media + 1).repeat_interleave(tokens)
    return time[..., None] == column if immediate else time[..., None] >= column


# Flamingo


def test_open_flamingo_state_dicts_load_strictly_and_nothing_else_is_saved():
    for module, keys in ((resampler(), RESAMPLER_KEYS), (gated(), GATED_KEYS)):
        assert {name: tuple(x.shape) for name, x in module.state_dict().items()} == keys
        module.load_state_dict(random_state(keys), strict=True)
    assert not {"frame_embs", "media_time_embs"} & PerceiverResampler(dim=8).state_dict().keys()
    fresh = GatedCrossAttentionBlock(dim=12, dim_visual=10)
    x = torch.randn(B, 4, 12)
    assert torch.equal(fresh(x, torch.randn(B, 2, 5, 10)), x)  # closed gates: the language model is untouched


@pytest.mark.parametrize("tables", [True, False])
def test_resampler_is_open_flamingos_formula(tables):
    module = resampler() if tables else PerceiverResampler(dim=12, depth=2, dim_head=4, heads=3, num_latents=5)
    state = random_state({name: RESAMPLER_KEYS[name] for name in module.state_dict()})
    module.load_state_dict(state, strict=True)
    x = torch.randn(B, 4, 2, 6, 12, requires_grad=True)
    out, expected = module(x), plain_resampler(state, x, heads=3)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    grads = (torch.autograd.grad(loss_of(y), x)[0] for y in (out, expected))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_gated_block_is_open_flamingos_formula(immediate, cached):
    module = gated(only_attend_immediate_media=immediate)
    state = random_state(GATED_KEYS)
    module.load_state_dict(state, strict=True)
    x, media = torch.randn(B, 4 if cached else 7, 12), torch.randn(B, 2, 5, 10)
    mask = times_mask(LOCATIONS, 2, 5, immediate, 4 if cached else None)
    out = module(x, media, LOCATIONS, cached)
    torch.testing.assert_close(out, plain_gated(state, x, media, 3, mask), rtol=1e-5, atol=1e-5)
    everything = torch.ones_like(mask)
    expected = plain_gated(state, x, media, 3, everything)
    torch.testing.assert_close(module(x, media), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out, expected, atol=1e-3)


@pytest.mark.parametrize("immediate", [True, False])
def test_a_token_before_any_medium_reads_none(immediate):
    """open_flamingo masks with the smallest finite number, so a row that may see nothing averages everything:
    with only_attend_immediate_media=False a token before the first medium read media from the future, and with
    True a token after more markers than media read all of them. A row that sees nothing gives 0 here."""
    module = gated(only_attend_immediate_media=immediate)
    x, media = torch.randn(1, 5, 12), torch.randn(1, 2, 4, 10)
    locations = torch.tensor([[False, True, False, True, True]])
    out, aux = module(x, media, locations, return_aux=AuxRequest(source_mass=True))
    by_hand = x[:, :1] + module.ff_gate.tanh() * module.ff(x[:, :1])
    torch.testing.assert_close(out[:, :1], by_hand)
    mass = aux.source_mass[0].mean(0)
    sums = [0, 1, 1, 1, 0] if immediate else [0, 1, 1, 1, 1]
    torch.testing.assert_close(mass.sum(1), torch.tensor(sums).float())
    assert (mass[1:3, 1] == 0).all() and (immediate or (mass[4] > 0).all())
    other = module(x, torch.randn(1, 2, 4, 10), locations)
    assert torch.equal(other[:, 0], out[:, 0]) and not torch.allclose(other[:, 1], out[:, 1])


@pytest.mark.parametrize("immediate", [True, False])
def test_a_sample_without_media_keeps_its_text(immediate):
    module = gated(only_attend_immediate_media=immediate)
    x, media = torch.randn(B, 7, 12), torch.randn(B, 2, 5, 10)
    present = torch.tensor([[True, False], [False, False], [True, True]])
    poisoned = media.masked_fill(~present[..., None, None], NAN).requires_grad_()
    out = module(x, poisoned, LOCATIONS, present=present)
    assert torch.equal(out[1], x[1]) and not torch.allclose(out[0], x[0])
    loss_of(out).backward()
    assert (poisoned.grad[~present] == 0).all() and (poisoned.grad[2] != 0).any()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    for text_only in (None, torch.zeros(B, 0, 5, 10), torch.zeros(B, 2, 0, 10)):
        module.zero_grad()
        out = module(x, text_only, LOCATIONS)
        assert torch.equal(out, x)
        loss_of(out).backward()
        assert all(p.grad is not None and (p.grad == 0).all() for p in module.parameters())
    assert torch.equal(module(x, media, LOCATIONS, present=torch.zeros(B, dtype=torch.bool)), x)
    # an absent medium is as if the sequence had a marker for nothing
    mask = times_mask(LOCATIONS, 2, 5, immediate, None) & present.repeat_interleave(5, 1)[:, None]
    expected = plain_gated(module.state_dict(), x, media, 3, mask)
    actual = module(x, poisoned, LOCATIONS, present=present)
    torch.testing.assert_close(actual[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-5)


def test_media_padding_is_as_if_it_were_not_there():
    real = torch.rand(B, 2, 5) < 0.6
    real[:, :, 0], real[1, 1] = True, False
    module, x, media = gated(), torch.randn(B, 7, 12), torch.randn(B, 2, 5, 10)
    mask = times_mask(LOCATIONS, 2, 5, True, None) & real.flatten(1)[:, None]
    poisoned = media.masked_fill(~real[..., None], NAN).requires_grad_()
    out = module(x, poisoned, LOCATIONS, mask=real)
    torch.testing.assert_close(out, plain_gated(module.state_dict(), x, media, 3, mask), rtol=1e-5, atol=1e-5)
    loss_of(out).backward()
    assert (poisoned.grad[~real] == 0).all() and poisoned.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())

    module, x = stirred(resampler()), torch.randn(B, 2, 3, 4, 12)
    real = torch.ones(B, 2, 3, 4, dtype=torch.bool)
    real[0, 0, 2:], real[1, 1] = False, False
    present = torch.tensor([[True, True], [True, True], [False, True]])
    poisoned = x.masked_fill(~(real & present[..., None, None])[..., None], NAN).requires_grad_()
    out = module(poisoned, real, present)
    torch.testing.assert_close(out[0, 0], module(x[:1, :1, :2])[0, 0])
    torch.testing.assert_close(out[0, 1], module(x)[0, 1])
    assert (out[1, 1] == 0).all() and (out[2, 0] == 0).all()
    loss_of(out).backward()
    assert poisoned.grad.isfinite().all() and (poisoned.grad[2, 0] == 0).all()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    module.zero_grad()
    nothing = module(torch.zeros(B, 2, 0, 4, 12))
    assert nothing.shape == (B, 2, 5, 12) and (nothing == 0).all()
    loss_of(nothing).backward()
    assert all((p.grad == 0).all() for p in module.parameters())


# MM-DiT

DIMS = (8, 12, 6)
LENGTHS = (5, 9, 4)


def streams(batch=B):
    return [torch.randn(batch, n, dim) for n, dim in zip(LENGTHS, DIMS)]


def mmdit(**options):
    return stirred(MMDiTBlock(DIMS, 4, 2, 7, **options))


def plain_joint(state, tokens, heads, qk_norm, prefix="", visible=None):
    """Joint attention by concatenating, with lucidrains/mmdit's parameter names."""
    parts = []
    for s, x in enumerate(tokens):
        q, k, v = (x @ state[f"{prefix}to_qkv.{s}.weight"].T).unflatten(-1, (3, heads, -1)).unbind(2)
        if qk_norm:
            q, k = (
                F.normalize(y, dim=-1) * y.shape[-1] ** 0.5 * state[f"{prefix}{name}_rmsnorms.{s}.gamma"][:, 0]
                for name, y in (("q", q), ("k", k))
            )
        parts.append([y.flatten(2) for y in (q, k, v)])
    q, k, v = (torch.cat(y, 1) for y in zip(*parts))
    mask = None if visible is None else torch.cat(visible, 1)[:, None].expand(-1, q.shape[1], -1)
    out = plain_attention(q, k, v, heads, mask).split([x.shape[1] for x in tokens], 1)
    return [y @ state[f"{prefix}to_out.{s}.weight"].T for s, y in enumerate(out)]


def plain_block(state, tokens, cond, heads, visible=None):
    modulation = [
        (F.silu(cond) @ state[f"to_cond.{s}.weight"].T + state[f"to_cond.{s}.bias"])[:, None].chunk(6, -1)
        for s in range(len(tokens))
    ]

    def modulated(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift

    normed = [modulated(x, m[0], m[1]) for x, m in zip(tokens, modulation)]
    attended = plain_joint(state, normed, heads, False, "joint_attn.", visible)
    results = []
    for s, (x, m) in enumerate(zip(tokens, modulation)):
        x = x + m[2] * attended[s]
        hidden = F.linear(modulated(x, m[3], m[4]), *(state[f"feedforwards.{s}.0.{y}"] for y in ("weight", "bias")))
        hidden = F.gelu(hidden, approximate="tanh")
        update = F.linear(hidden, *(state[f"feedforwards.{s}.2.{y}"] for y in ("weight", "bias")))
        results.append(x + m[5] * update)
    return results


@pytest.mark.parametrize("qk_norm", [True, False])
def test_joint_attention_is_attention_on_the_concatenation_with_mmdits_names(qk_norm):
    module = stirred(JointAttention(DIMS, 4, 2, qk_rmsnorm=qk_norm))
    keys = {f"to_{x}.{s}.weight" for x in ("qkv", "out") for s in range(3)}
    keys |= {f"{x}_rmsnorms.{s}.gamma" for x in "qk" for s in range(3) if qk_norm}
    assert module.state_dict().keys() == keys
    x = streams()
    outs, aux = module(x, return_aux=AuxRequest(source_mass=True))
    assert isinstance(outs, tuple) and [tuple(a.source_mass.shape) for a in aux] == [(B, 2, n, 3) for n in LENGTHS]
    for out, expected in zip(outs, plain_joint(module.state_dict(), x, 2, qk_norm)):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_block_is_sd3s_formula_and_a_new_one_the_identity():
    module, x, cond = mmdit(), streams(), torch.randn(B, 7)
    outs = module(modality_tokens=tuple(x), time_cond=cond)
    for out, expected in zip(outs, plain_block(module.state_dict(), x, cond, 2)):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    new = MMDiTBlock(DIMS, 4, 2, 7)
    assert all(torch.equal(out, y) for out, y in zip(new(x, time_cond=cond), x))
    plain = stirred(MMDiTBlock(DIMS, 4, 2, qk_rmsnorm=True))
    assert all(out.shape == y.shape and not torch.allclose(out, y) for out, y in zip(plain(x), x))


@pytest.mark.parametrize("poison", [NAN, math.inf, 1e30])
def test_what_is_absent_is_not_seen_and_comes_out_as_it_went_in(poison):
    present = torch.tensor([[True, True, True], [True, False, True], [False, False, False]])
    lengths = torch.tensor([4, 2, 9])
    masks = [None, lengths, None]
    visible = [present[:, s, None].expand(B, n).clone() for s, n in enumerate(LENGTHS)]
    visible[1] &= torch.arange(9) < lengths[:, None]
    module, x, cond = mmdit(), streams(), torch.randn(B, 7)
    results = []
    for fill in (0.0, poison):
        module.zero_grad()
        leaves = [y.masked_fill(~seen[..., None], fill).requires_grad_() for y, seen in zip(x, visible)]
        outs = module(leaves, masks, cond, present)
        for out, leaf, seen in zip(outs, leaves, visible):
            torch.testing.assert_close(out[~seen], leaf[~seen], rtol=0, atol=0, equal_nan=True)
        loss_of(*(out[seen] for out, seen in zip(outs, visible))).backward()
        assert all((leaf.grad[~seen] == 0).all() for leaf, seen in zip(leaves, visible))
        results.append([out[seen] for out, seen in zip(outs, visible)])
        results[-1] += [leaf.grad for leaf in leaves] + [p.grad for p in module.parameters()]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert all(x.isfinite().all() for x in results[0])
    for out, expected, seen in zip(outs, plain_block(module.state_dict(), x, cond, 2, visible), visible):
        torch.testing.assert_close(out[seen], expected[seen], rtol=1e-5, atol=1e-5)

    attention = stirred(JointAttention(DIMS, 4, 2))
    outs = attention(leaves, masks, list(present.unbind(1)))
    assert all((out[~seen] == 0).all() and out.isfinite().all() for out, seen in zip(outs, visible))


def test_a_stream_nobody_has_gives_gradient_zero_whichever_way_it_is_said():
    module, x, cond = mmdit(), streams(), torch.randn(B, 7)
    gone = torch.zeros(B, dtype=torch.bool)
    said = [
        ([x[0], torch.zeros(B, 0, 12), x[2]], None, None),
        (x, None, [None, gone, None]),
        (x, [None, gone.long(), None], None),
        (x, None, torch.tensor([[True, False, True]]).expand(B, 3)),
    ]
    outs = []
    for tokens, masks, present in said:
        module.zero_grad()
        outs.append(module(tokens, masks, cond, present))
        loss_of(*outs[-1]).backward()
        for name, parameter in module.named_parameters():
            assert (parameter.grad == 0).all() == (".1." in name), name
        torch.testing.assert_close(outs[-1][::2], outs[0][::2])
    assert outs[0][1].shape == (B, 0, 12)


# decoupled cross-attention

SOURCES = {"text": 10, "image": 6, "pose": 4}


def decoupled(**options):
    return stirred(DecoupledCrossAttention(16, 4, SOURCES, **options))


def sources(lengths):
    return {name: torch.randn(B, n, SOURCES[name]) for name, n in lengths.items()}


def one_source(module, query, name, x):
    """The share of one source, before out_proj: attention on it alone, scaled."""
    k, v = module.key_value[name].proj(x).chunk(2, -1)
    alone = plain_attention(module.query.proj(query), k, v, 4)
    return module.scales[name] * alone


@pytest.mark.parametrize("lengths", [{"text": 77, "image": 257}, {"text": 512, "image": 4, "pose": 1}, {"pose": 3}])
def test_sources_add_whatever_their_number_and_length(lengths):
    """Wan's image-to-video attention takes image and text in one tensor and splits it at a fixed 512 text
    tokens counted from the end: any other text length hands tokens of one source to the projection of the
    other, without an error. Here sources have names, and lengths need no agreement."""
    module, query, given = decoupled(scales={"image": 0.6}), torch.randn(B, 8, 16), sources(lengths)
    out = module(query, given)
    added = sum(one_source(module, query, name, x) for name, x in given.items())
    torch.testing.assert_close(out, module.out_proj(added), rtol=1e-5, atol=1e-5)


def test_the_split_at_512_is_wrong_where_the_sources_have_other_lengths():
    """The form the test above speaks of, with equal token sizes: right for 512 text tokens, wrong for 300."""
    module = stirred(DecoupledCrossAttention(16, 4, {"image": 6, "text": 6}))
    query = torch.randn(B, 8, 16)
    for length, agrees in ((512, True), (300, False)):
        image, text = torch.randn(B, 257, 6), torch.randn(B, length, 6)
        context = torch.cat([image, text], 1)
        cut = context.shape[1] - 512
        parts = {"image": context[:, :cut], "text": context[:, cut:]}
        split = module.out_proj(sum(one_source(module, query, name, x) for name, x in parts.items()))
        assert torch.allclose(module(query, {"image": image, "text": text}), split, atol=1e-5) is agrees


def test_an_absent_source_changes_nothing_of_what_the_others_add():
    module, query = decoupled(), torch.randn(B, 8, 16)
    given = sources({"text": 7, "image": 5, "pose": 3})
    present = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    leaves = {
        name: x.masked_fill(~present[:, s, None, None], NAN).requires_grad_()
        for s, (name, x) in enumerate(given.items())
    }
    out, aux = module(query, leaves, present=present, return_aux=AuxRequest(source_mass=True))
    torch.testing.assert_close(aux.source_mass.mean((1, 2)), present.float())
    torch.testing.assert_close(out[1:2], module(query[1:2], {"text": given["text"][1:2]}))
    torch.testing.assert_close(out[2], module.out_proj.bias.expand(8, -1))
    loss_of(out).backward()
    for s, x in enumerate(leaves.values()):
        assert x.grad.isfinite().all() and (x.grad[~present[:, s]] == 0).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_scales_are_fixed_or_learned_and_always_saved():
    fixed, learned = decoupled(scales={"image": 0.5}), decoupled(scales={"image": 0.5}, learn_scales=True)
    assert fixed.scales == {"text": 1.0, "image": 0.5, "pose": 1.0}
    query, given = torch.randn(B, 8, 16), sources({"text": 7, "image": 5})
    for module, trained in ((fixed, False), (learned, True)):
        loss_of(module(query, given)).backward()
        assert (module.source_weights.grad is not None) is trained
        assert "source_weights" in module.state_dict()
    assert learned.source_weights.grad[2] == 0 and (learned.source_weights.grad[:2] != 0).all()
    fixed.set_scales({"image": 0.0})
    torch.testing.assert_close(fixed(query, given), fixed(query, {"text": given["text"]}))
    other = decoupled()
    other.load_state_dict(fixed.state_dict(), strict=True)
    assert other.scales == fixed.scales


# the same promises for all


def all_blocks():
    """name -> (module, call): call(module, floats) -> list of outputs."""
    present = torch.tensor([[True, True, True], [True, False, True], [False, False, True]])
    cast = {"x": torch.randn(B, 7, 12), "media": torch.randn(B, 2, 5, 10), "raw": torch.randn(B, 2, 3, 4, 12)}
    named = cast | sources({"text": 7, "image": 5, "pose": 3}) | {"cond": torch.randn(B, 7)}
    named |= {str(s): x for s, x in enumerate(streams())} | {"query": torch.randn(B, 8, 16)}
    return {
        "resampler": (stirred(resampler()), lambda m, f, b: [m(f["raw"], present=present[b, :2])]),
        "gated": (gated(), lambda m, f, b: [m(f["x"], f["media"], LOCATIONS[b], present=present[b, :2])]),
        "joint": (
            stirred(JointAttention(DIMS, 4, 2, qk_rmsnorm=True)),
            lambda m, f, b: list(m([f["0"], f["1"], f["2"]], present=present[b])),
        ),
        "mmdit": (
            mmdit(qk_rmsnorm=True),
            lambda m, f, b: list(m([f["0"], f["1"], f["2"]], [None, None, None], f["cond"], present[b])),
        ),
        "decoupled": (
            decoupled(learn_scales=True),
            lambda m, f, b: [m(f["query"], {n: f[n] for n in SOURCES}, present=present[b])],
        ),
    }, named


every = pytest.mark.parametrize("case", ["resampler", "gated", "joint", "mmdit", "decoupled"])
ALL = slice(None)


@every
def test_a_sample_alone_equals_itself_in_a_batch(case):
    blocks, floats = all_blocks()
    module, call = blocks[case]
    together = call(module, floats, ALL)
    for b in range(B):
        here = slice(b, b + 1)
        alone = call(module, {name: x[here] for name, x in floats.items()}, here)
        torch.testing.assert_close(alone, [out[here] for out in together])


@every
def test_no_torch_cat_in_any_block(case, monkeypatch):
    """Perceiver, Flamingo and MM-DiT are written with the keys of their sources concatenated elsewhere."""
    blocks, floats = all_blocks()
    module, call = blocks[case]
    for owner, name in ((torch, "cat"), (torch, "concat"), (torch, "hstack")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("sources were concatenated"))
    loss_of(*call(module, floats, ALL)).backward()


@every
def test_compiled_equals_eager(case):
    blocks, floats = all_blocks()
    module, call = blocks[case]
    compiled = torch.compile(lambda f: call(module, f, ALL), backend="aot_eager", fullgraph=True)
    actual, expected = compiled(floats), call(module, floats, ALL)
    torch.testing.assert_close(actual, expected)
    grads = []
    for outs in (actual, expected):
        module.zero_grad()
        loss_of(*outs).backward()
        grads.append({name: p.grad for name, p in module.named_parameters()})
    torch.testing.assert_close(*grads)


@every
def test_autocast_stays_within_twice_the_error_of_bfloat16(case):
    blocks, floats = all_blocks()
    module, call = blocks[case]
    exact = call(copy.deepcopy(module).double(), {name: x.double() for name, x in floats.items()}, ALL)
    low = call(copy.deepcopy(module).bfloat16(), {name: x.bfloat16() for name, x in floats.items()}, ALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outs = call(module, floats, ALL)
    loss_of(*outs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    for out, rough, right in zip(outs, low, exact):
        budget = 2 * (rough.double() - right).abs().max() + torch.finfo(torch.bfloat16).eps * right.abs().max()
        assert (out.double() - right).abs().max() <= budget


@every
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_everything_absent_is_finite_with_finite_gradients(case):
    blocks, floats = all_blocks()
    module = blocks[case][0]
    nobody = {name: x.clone().requires_grad_() for name, x in floats.items()}
    with torch.autograd.detect_anomaly(check_nan=True):
        if case == "decoupled":
            outs = [module(nobody["query"], {}, present=torch.zeros(B, 3, dtype=torch.bool))]
            neutral = [module.out_proj.bias.expand_as(outs[0])]
        elif case == "gated":
            outs, neutral = [module(nobody["x"], nobody["media"], present=torch.zeros(B, 2).bool())], [nobody["x"]]
        elif case == "resampler":
            outs = [module(nobody["raw"], present=torch.zeros(B, dtype=torch.bool))]
            neutral = [torch.zeros_like(outs[0])]
        else:
            x = [nobody[str(s)] for s in range(3)]
            options = {"time_cond": nobody["cond"]} if case == "mmdit" else {}
            outs = list(module(x, present=torch.zeros(B, 3, dtype=torch.bool), **options))
            neutral = x if case == "mmdit" else [torch.zeros_like(y) for y in x]
        loss_of(*outs).backward()
    torch.testing.assert_close(outs, neutral)
    for name, p in module.named_parameters():
        assert p.grad.isfinite().all(), name
        assert case == "decoupled" or (p.grad == 0).all(), name


class Around(nn.Module):
    """A Flamingo in small: resampler, then the gated layer."""

    def __init__(self):
        super().__init__()
        self.resampler = PerceiverResampler(dim=10, depth=1, dim_head=4, heads=2, num_latents=3)
        self.gated = GatedCrossAttentionBlock(dim=12, dim_visual=10, dim_head=4, heads=3)

    def forward(self, x, raw, present):
        return self.gated(x, self.resampler(raw, present=present), present=present)


def test_training_opens_the_gates_and_lowers_the_loss():
    model, x, raw = Around(), torch.randn(8, 4, 12), torch.randn(8, 2, 1, 6, 10)
    present = torch.rand(8, 2) < 0.7
    target = x + raw.mean((1, 2, 3))[:, None, :1]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x, raw, present), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert model.gated.attn_gate.abs() > 1e-3 and model.resampler.latents.grad.abs().sum() > 0


def test_bad_arguments_get_one_sentence():
    x, media, raw = torch.randn(B, 7, 12), torch.randn(B, 2, 5, 10), torch.randn(B, 2, 3, 4, 12)
    block, sampler, joint, cond = gated(), resampler(), mmdit(), torch.randn(B, 7)
    tokens = streams()
    long, wrong = torch.ones(B, 7).long(), torch.ones(B, 5, dtype=torch.bool)
    for error, message, call in [
        (ValueError, r"x must have shape \(B, N, 12\)", lambda: block(x[..., :3], media)),
        (ValueError, r"media must have shape \(B, T, n, 10\) with B=3", lambda: block(x, media[:2])),
        (TypeError, "media_locations must be a bool tensor", lambda: block(x, media, long)),
        (ValueError, r"media_locations must have shape \(B, N\) = \(3, 7\)", lambda: block(x, media, wrong)),
        (TypeError, "present must be a bool tensor", lambda: block(x, media, present=long)),
        (ValueError, r"present must have shape \(3, 2\) or \(3,\)", lambda: block(x, media, present=wrong)),
        (ValueError, r"mask must have shape \(3, 2, 5\)", lambda: block(x, media, mask=wrong)),
        (ValueError, r"x must have shape \(B, T, F, v, 12\)", lambda: sampler(x)),
        (ValueError, "6 is over max_num_frames=3", lambda: sampler(torch.randn(B, 2, 6, 4, 12))),
        (ValueError, "5 is over max_num_media=4", lambda: sampler(torch.randn(B, 5, 1, 4, 12))),
        (ValueError, r"mask must have shape \(3, 2, 3, 4\)", lambda: sampler(raw, wrong)),
        (ValueError, "depth must be positive", lambda: PerceiverResampler(dim=4, depth=0)),
        (ValueError, "heads must be positive", lambda: GatedCrossAttentionBlock(dim=4, dim_visual=4, heads=0)),
        (ValueError, "modality_tokens must have one entry per stream", lambda: joint(tokens[:2], None, cond)),
        (TypeError, "modality_tokens must be a tuple or list", lambda: joint(tokens[0], None, cond)),
        (ValueError, r"modality_tokens\[1\] must have shape \(B, N, 12\)", lambda: joint([tokens[0]] * 3, None, cond)),
        (ValueError, r"modality_masks\[0\] must have shape", lambda: joint(tokens, [wrong[:, :2], None, None], cond)),
        (ValueError, r"present must have shape \(B, S\)", lambda: joint(tokens, None, cond, wrong)),
        (ValueError, r"time_cond must have shape \(3, 7\), got None", lambda: joint(tokens)),
        (ValueError, "time_cond must be None", lambda: MMDiTBlock(DIMS, 4, 2)(tokens, None, cond)),
        (ValueError, "dim_modalities must hold positive", lambda: MMDiTBlock((), 4, 2)),
        (TypeError, "dim_modalities must be a tuple", lambda: JointAttention(8)),
        (ValueError, "dim_head must be positive", lambda: JointAttention(DIMS, 0)),
        (ValueError, r"scales has unknown sources \['smell'\]", lambda: decoupled(scales={"smell": 1.0})),
        (TypeError, r"scales\['text'\] must be a number", lambda: decoupled(scales={"text": "1"})),
        (TypeError, "scales must be a dict", lambda: decoupled(scales=0.5)),
    ]:
        with pytest.raises(error, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
