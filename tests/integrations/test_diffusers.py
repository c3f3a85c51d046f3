"""attnfuse.integrations.diffusers against the real library, on tiny models with random weights."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnfuse import functional

pytest.importorskip("diffusers", reason="diffusers is not installed: attnfuse[diffusers] was not tested")

import diffusers
from diffusers.models import attention_dispatch, attention_processor
from diffusers.models.attention_processor import Attention

from attnfuse.integrations import diffusers as integration

diffusers.utils.logging.set_verbosity_error()


def load_parity():
    """bench/diffusers_parity.py: the models, and how they are compared, are those of the table in docs/."""
    path = Path(__file__).parents[2] / "bench" / "diffusers_parity.py"
    spec = importlib.util.spec_from_file_location("diffusers_parity", path)
    module = sys.modules["diffusers_parity"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


parity = load_parity()
MODELS = {spec.name: spec for spec in parity.MODELS}


@pytest.fixture(autouse=True)
def _registered():
    """The name is known, and diffusers' process-wide choice of backend is as it was afterwards."""
    torch.manual_seed(0)
    integration.register()
    registry = attention_dispatch._AttentionBackendRegistry
    before = registry._active_backend
    yield
    registry.set_active_backend(before)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_within_the_budget_and_attnfuse_ran(name):
    for row in parity.compare(MODELS[name]):
        assert row.calls == row.spec.attentions
        assert row.passed, f"{row.dtype}: out {row.forward}, gradient of {row.worst} {row.backward}"


def test_registering_twice_and_resetting():
    integration.register()
    names = [member.value for member in attention_dispatch.AttentionBackendName]
    assert names.count("attnfuse") == 1
    spec = MODELS["FluxTransformer2DModel"]
    model = spec.build()
    model.set_attention_backend("attnfuse")
    with parity.counted() as calls:
        parity.run(model, spec, torch.float32)
    assert calls == [2]
    model.reset_attention_backend()
    attention_dispatch._AttentionBackendRegistry.set_active_backend(attention_dispatch.AttentionBackendName.NATIVE)
    with parity.counted() as calls:
        parity.run(model, spec, torch.float32)
    assert calls == [0]


def test_diffusers_own_context_manager_takes_the_name():
    spec = MODELS["QwenImageTransformer2DModel"]
    with attention_dispatch.attention_backend("attnfuse"), parity.counted() as calls:
        parity.run(spec.build(), spec, torch.float32)
    assert calls == [2]


def test_own_processors_come_and_go_with_the_backend():
    model = MODELS["SD3Transformer2DModel"].build()
    before = {name: type(p) for name, p in model.attn_processors.items()}
    keys = list(model.state_dict())
    model.set_attention_backend("attnfuse")
    model.set_attention_backend("attnfuse")
    assert {type(p) for p in model.attn_processors.values()} == {integration.JointAttnProcessor}
    assert list(copy.deepcopy(model).state_dict()) == keys
    model.set_attention_backend("native")
    assert {name: type(p) for name, p in model.attn_processors.items()} == before


def test_set_attn_processor_alone_and_nothing_is_concatenated(monkeypatch):
    spec = MODELS["SD3Transformer2DModel"]
    model = spec.build()
    expected = parity.run(model, spec, torch.float64)
    model.set_attn_processor(integration.JointAttnProcessor())
    lengths = []
    original = functional._run

    def noted(problem, backend):
        lengths.append([source.key.shape[2] for source in problem.sources])
        return original(problem, backend)

    monkeypatch.setattr(functional, "_run", noted)
    found = parity.run(model, spec, torch.float64)
    assert lengths == [[16, 7], [16, 7], [16], [16, 7], [16, 7]]
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, msg=lambda text, name=name: f"{name}: {text}")


def test_a_model_with_an_unknown_processor_is_refused_and_left_as_it_was():
    model = MODELS["SD3Transformer2DModel"].build()
    model.fuse_qkv_projections()
    before = {name: type(p) for name, p in model.attn_processors.items()}
    with pytest.raises(
        ValueError, match="SD3Transformer2DModel computes attention in FusedJointAttnProcessor2_0, past the dispatcher"
    ):
        model.set_attention_backend("attnfuse")
    assert {name: type(p) for name, p in model.attn_processors.items()} == before


def test_a_model_without_attention_is_refused():
    model = diffusers.AutoencoderTiny(encoder_block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(4, 4, 4, 4))
    with pytest.raises(ValueError, match="AutoencoderTiny has no attention: attnfuse cannot be its backend"):
        model.set_attention_backend("attnfuse")


def test_an_untested_version_is_refused(monkeypatch):
    monkeypatch.setattr(diffusers, "__version__", "0.99.1")
    with pytest.raises(RuntimeError, match=r"attnfuse was tested with diffusers 0\.42, got 0\.99\.1"):
        integration.register()
    integration.register(allow_untested=True)


def test_every_argument_of_the_dispatcher_is_named():
    """It drops, without a word, what a backend's signature does not name."""
    supported = attention_dispatch._AttentionBackendRegistry._supported_arg_names
    native = supported[attention_dispatch.AttentionBackendName.NATIVE]
    assert supported[attention_dispatch.AttentionBackendName("attnfuse")] == native


@pytest.mark.parametrize("shape", [(2, 7), (5, 7), (2, 1, 5, 7), (2, 3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_dispatched_masks_scale_and_heads(shape, dtype):
    """As diffusers' native backend takes them, the lse besides."""
    q, k, v = (torch.randn(2, n, 3, 8) for n in (5, 7, 7))
    mask = torch.rand(shape) < 0.7
    mask[..., 0] = True
    mask = mask if dtype is torch.bool else torch.randn(shape).masked_fill(~mask, float("-inf"))
    expected = attention_dispatch._native_attention(q, k, v, mask, scale=0.3)
    out, lse = integration.dispatched_attention(q, k, v, mask, scale=0.3, return_lse=True)
    torch.testing.assert_close(out, expected)
    z = 0.3 * torch.einsum("bihd,bjhd->bhij", q, k)
    wide = mask[:, None, None] if shape == (2, 7) else mask
    z = z.masked_fill(~wide, float("-inf")) if dtype is torch.bool else z + wide
    torch.testing.assert_close(lse, z.logsumexp(-1).transpose(1, 2))
    shared = (q, k[:, :, :1], v[:, :, :1])
    grouped = integration.dispatched_attention(*shared, enable_gqa=True)
    torch.testing.assert_close(grouped, attention_dispatch._native_attention(*shared, enable_gqa=True))
    with pytest.raises(ValueError, match="_parallel_config must be None"):
        integration.dispatched_attention(q, k, v, _parallel_config=object())


def pixels():
    """A U-Net's attention over (B, C, H, W), with everything AttnProcessor2_0 knows."""
    return Attention(
        16, heads=2, dim_head=8, norm_num_groups=4, residual_connection=True, rescale_output_factor=1.5, bias=True
    )


def cross():
    norms = {"cross_attention_norm": "layer_norm", "qk_norm": "layer_norm"}
    return Attention(16, cross_attention_dim=12, heads=2, dim_head=8, **norms)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("build", [pixels, cross])
def test_attn_processor(build, masked):
    attn = build()
    tokens = torch.randn(2, 16, 4, 4) if build is pixels else torch.randn(2, 5, 16)
    context = None if build is pixels else torch.randn(2, 7, 12)
    mask = None
    if masked:
        columns = 16 if build is pixels else 7
        mask = torch.zeros(2, 1, columns).masked_fill(torch.arange(columns) > columns // 2, -10000.0)
    expected = attn(tokens, context, mask)
    attn.set_processor(integration.AttnProcessor())
    with parity.counted() as calls:
        torch.testing.assert_close(attn(tokens, context, mask), expected)
    assert calls == [1]


def test_ip_adapter_is_one_call_over_its_sources():
    attn = Attention(16, cross_attention_dim=12, heads=2, dim_head=8)
    theirs = attention_processor.IPAdapterAttnProcessor2_0(16, 12, num_tokens=(4, 3), scale=[0.7, 0.0])
    attn.set_processor(theirs)
    tokens, text, prompts = torch.randn(2, 5, 16), torch.randn(2, 7, 12), [torch.randn(2, n, 12) for n in (4, 3)]

    class Model(diffusers.ModelMixin):
        def __init__(self):
            super().__init__()
            self.attn = attn

    model = Model()
    keys = list(model.state_dict())
    for scale in ([0.7, 0.0], [0.3, 1.2]):
        theirs.scale = scale
        expected = attn(tokens, (text, prompts))
        model.set_attention_backend("attnfuse")
        assert attn.processor is theirs and type(theirs) is integration.IPAdapterAttnProcessor
        assert list(model.state_dict()) == keys
        with parity.counted() as calls:
            torch.testing.assert_close(attn(tokens, (text, prompts)), expected)
        assert calls == [3]  # each source is softmaxed alone
        with pytest.raises(ValueError, match="ip_adapter_masks must be None"):
            attn(tokens, (text, prompts), ip_adapter_masks=[None])
        model.reset_attention_backend()
        assert type(theirs) is attention_processor.IPAdapterAttnProcessor2_0


@pytest.mark.parametrize("processor", [integration.JointAttnProcessor, integration.CogVideoXAttnProcessor])
def test_streams_take_no_mask(processor):
    x = torch.randn(1, 2, 16)
    with pytest.raises(ValueError, match="attention_mask must be None"):
        processor()(Attention(16, heads=2, dim_head=8), x, x, attention_mask=torch.ones(1, 2))


def test_the_core_imports_no_diffusers():
    code = "import sys, attnfuse, attnfuse.nn, attnfuse.fusion; print([n for n in sys.modules if 'diffusers' in n])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
