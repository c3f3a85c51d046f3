"""Tiny random models of transformers, one for each way in which a model asks for attention.

Each function builds its model from a configuration alone, with padding in its batch, and says at which positions its
outputs mean something. Weights are drawn anew so that attention is peaked and nothing is vacuous: gates that start at
zero (Mllama, Idefics) are open, biases, norms and sinks are not what they start as.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor, nn

WORDS = 90  # ids below are text; models with images or sound take theirs from above
IMAGE, AUDIO, VIDEO, START, END = 91, 92, 93, 94, 95
VOCABULARY = 99
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 12,
    "patch_size": 4,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


class Tiny(NamedTuple):
    """A model, its keyword arguments, and for each output path the positions (bool) that count; None = all."""

    model: Any
    inputs: dict[str, Any]
    valid: dict[str, Tensor | None]


def build(name: str, seed: int = 0) -> Tiny:
    """The model of that name, in float32 and evaluation mode, with weights that depend on `seed` alone."""
    torch.manual_seed(seed)
    tiny = MODELS[name]()
    redraw(tiny.model)
    return tiny._replace(model=tiny.model.eval())


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """Weights of unit gain, gates open, everything else stirred."""
    for name, parameter in model.named_parameters():
        if ("gate" in name and parameter.numel() == 1) or "alpha" in name:
            parameter.fill_(0.8)
        elif parameter.dim() < 2:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        else:
            parameter.normal_(0.0, 1.3 * parameter[0].numel() ** -0.5)


def words(*shape: int, low: int = 4) -> Tensor:
    return torch.randint(low, WORDS, shape)


def padded(rows: int, columns: int, missing: int, side: str = "right") -> Tensor:
    """(rows, columns) int64: the last row lacks `missing` tokens at one side, the first none."""
    mask = torch.ones(rows, columns, dtype=torch.int64)
    if side == "right":
        mask[-1, columns - missing :] = 0
    else:
        mask[-1, :missing] = 0
    return mask


def with_media(
    media: int, count: int, columns: int = 14, missing: int = 3, side: str = "left", first: int = 5
) -> tuple[Tensor, Tensor]:
    """Two rows: `first`, `count` media tokens, text; the second row padded. Ids and mask (2, columns).

    Padding to the right of a causal decoder is seen by nobody; to the left it is.
    """
    ids = words(2, columns)
    ids[:, 0] = first
    ids[:, 1 : 1 + count] = media
    mask = padded(2, columns, missing, side)
    if side == "left":
        ids[1] = ids[1].roll(missing)
    return ids.masked_fill(mask == 0, 0), mask


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape)


def clip() -> Tiny:
    text = TEXT | {"pad_token_id": 0, "eos_token_id": 3, "projection_dim": 16}
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
    ids, mask = words(2, 9), padded(2, 9, 3)
    ids[0, 8] = ids[1, 5] = 3
    return Tiny(
        model,
        {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2, 3, 12, 12)},
        {"text_model_output.last_hidden_state": mask.bool(), "vision_model_output.last_hidden_state": None,
         "logits_per_image": None},
    )  # fmt: skip


def siglip() -> Tiny:
    model = hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=VISION))
    mask = padded(2, 9, 3)
    return Tiny(
        model,
        {"input_ids": words(2, 9), "attention_mask": mask, "pixel_values": pixels(2, 3, 12, 12)},
        {"text_model_output.last_hidden_state": mask.bool(), "vision_model_output.last_hidden_state": None,
         "image_embeds": None},
    )  # fmt: skip


def whisper() -> Tiny:
    config = hf.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=8, encoder_layers=2, encoder_attention_heads=4, decoder_layers=2,
        decoder_attention_heads=4, decoder_ffn_dim=48, encoder_ffn_dim=48, d_model=32, max_source_positions=20,
        max_target_positions=40, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    mask = padded(2, 9, 3)
    return Tiny(
        hf.WhisperForConditionalGeneration(config),
        {"input_features": pixels(2, 8, 40), "decoder_input_ids": words(2, 9), "decoder_attention_mask": mask},
        {"logits": mask.bool(), "encoder_last_hidden_state": None},
    )


def qwen2_audio() -> Tiny:
    audio = {
        "num_mel_bins": 8, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "d_model": 32,
        "max_source_positions": 20,
    }  # fmt: skip
    config = hf.Qwen2AudioConfig(
        audio_config=audio, text_config=TEXT | {"model_type": "qwen2"}, audio_token_index=AUDIO
    )
    heard = padded(2, 40, 8)
    ids, mask = with_media(AUDIO, 10, 18, side="right")
    # 40 frames are 20 after the convolution and 10 after pooling; 32 are 8
    ids[1, 9:11] = words(2)
    return Tiny(
        hf.Qwen2AudioForConditionalGeneration(config),
        {"input_ids": ids, "attention_mask": mask, "input_features": pixels(2, 8, 40),
         "feature_attention_mask": heard},
        {"logits": mask.bool()},
    )  # fmt: skip


def llava() -> Tiny:
    config = hf.LlavaConfig(
        vision_config=VISION | {"model_type": "clip_vision_model", "projection_dim": 16},
        text_config=TEXT | {"model_type": "llama"}, image_token_index=IMAGE, image_seq_length=9,
    )  # fmt: skip
    ids, mask = with_media(IMAGE, 9)
    return Tiny(
        hf.LlavaForConditionalGeneration(config),
        {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2, 3, 12, 12)},
        {"logits": mask.bool()},
    )


def mllama() -> Tiny:
    vision = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4,
        "intermediate_size": 32, "vision_output_dim": 32, "image_size": 12, "patch_size": 4, "max_num_tiles": 2,
        "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }  # fmt: skip
    text = TEXT | {
        "num_hidden_layers": 3, "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    ids, mask = with_media(IMAGE, 1)
    seen = torch.zeros(2, 14, 1, 2, dtype=torch.int64)
    seen[0, 1:] = 1
    seen[1, 4:, :, 0] = 1  # from its image's token on; it has one tile
    return Tiny(
        hf.MllamaForConditionalGeneration(
            hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
        ),
        {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2, 1, 2, 3, 12, 12),
         "aspect_ratio_ids": torch.tensor([[2], [1]]), "aspect_ratio_mask": torch.tensor([[[1, 1]], [[1, 0]]]),
         "cross_attention_mask": seen},
        {"logits": mask.bool()},
    )  # fmt: skip


def idefics() -> Tiny:
    config = hf.IdeficsConfig(
        **(TEXT | {"num_key_value_heads": None}), additional_vocab_size=0, cross_layer_interval=1,
        freeze_text_layers=False, freeze_vision_layers=False,
        vision_config={"embed_dim": 32, "image_size": 12, "intermediate_size": 48, "patch_size": 4,
                       "num_hidden_layers": 2, "num_attention_heads": 4},
        use_resampler=True, perceiver_config={"resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4,
                                              "resampler_head_dim": 8},
    )  # fmt: skip
    mask = padded(2, 10, 3)
    seen = torch.ones(2, 10, 2, dtype=torch.int64)
    seen[:, :4, 1] = 0
    return Tiny(
        hf.IdeficsForVisionText2Text(config),
        {"input_ids": words(2, 10), "attention_mask": mask, "pixel_values": pixels(2, 2, 3, 12, 12),
         "image_attention_mask": seen},
        {"logits": mask.bool()},
    )  # fmt: skip


def idefics2() -> Tiny:
    config = hf.Idefics2Config(
        image_token_id=IMAGE, vision_config=VISION,
        perceiver_config={"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4,
                          "resampler_head_dim": 8, "num_key_value_heads": 2},
        text_config=TEXT | {"model_type": "mistral", "sliding_window": 6},
    )  # fmt: skip
    ids, mask = with_media(IMAGE, 4)
    seen = torch.ones(2, 1, 12, 12, dtype=torch.bool)
    seen[1, :, 8:] = False
    return Tiny(
        hf.Idefics2ForConditionalGeneration(config),
        {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2, 1, 3, 12, 12),
         "pixel_attention_mask": seen},
        {"logits": mask.bool()},
    )  # fmt: skip


def qwen2_vl() -> Tiny:
    config = hf.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": MROPE, "use_sliding_window": True, "sliding_window": 6,
                            "max_window_layers": 1},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4,
                       "mlp_ratio": 2},
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    ids, mask = with_media(IMAGE, 4, first=START)
    kinds = (ids == IMAGE).to(torch.int64)
    return Tiny(
        hf.Qwen2VLForConditionalGeneration(config),
        {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(32, 3 * 2 * 4 * 4),
         "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]), "mm_token_type_ids": kinds},
        {"logits": mask.bool()},
    )  # fmt: skip


def qwen2_5_omni() -> Tiny:
    audio = {
        "num_mel_bins": 8, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "d_model": 32,
        "max_source_positions": 20, "n_window": 10, "output_dim": 32,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4, "window_size": 16,
        "out_hidden_size": 32, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = hf.Qwen2_5OmniThinkerConfig(
        audio_config=audio, vision_config=vision, text_config=TEXT | {"rope_parameters": MROPE},
        audio_token_index=AUDIO, image_token_index=IMAGE, video_token_index=VIDEO, vision_start_token_id=START,
        vision_end_token_id=END, audio_start_token_id=96, audio_end_token_id=97,
    )  # fmt: skip
    model = hf.Qwen2_5OmniThinkerForConditionalGeneration(config)
    ids, mask = with_media(IMAGE, 4, 24, side="right", first=START)
    ids[:, 5] = END
    ids[:, 6] = 96
    ids[:, 7:17] = AUDIO  # 40 frames are 10 tokens, 32 are 8
    ids[:, 17] = 97
    ids[1, 15:17] = torch.tensor([97, 7])
    ids[1, 17] = 8
    heard = padded(2, 40, 8)
    return Tiny(
        model,
        {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(32, 3 * 2 * 4 * 4),
         "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]), "input_features": pixels(2, 8, 40),
         "feature_attention_mask": heard},
        {"logits": mask.bool()},
    )  # fmt: skip


def _blip(config: Any, model: Any) -> Any:
    qformer = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 32, "cross_attention_frequency": 2,
        "encoder_hidden_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    text = {
        "model_type": "opt", "vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "dropout": 0.0,
    }  # fmt: skip
    return model(
        config(
            vision_config=VISION, qformer_config=qformer, text_config=text, num_query_tokens=4,
            image_token_index=IMAGE, image_text_hidden_size=16,
        )
    )  # fmt: skip


def blip_2() -> Tiny:
    ids, mask = with_media(IMAGE, 4)
    return Tiny(
        _blip(hf.Blip2Config, hf.Blip2ForConditionalGeneration),
        {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2, 3, 12, 12)},
        {"logits": mask.bool()},
    )


def instructblip() -> Tiny:
    ids, mask = with_media(IMAGE, 4)
    return Tiny(
        _blip(hf.InstructBlipConfig, hf.InstructBlipForConditionalGeneration),
        {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2, 3, 12, 12),
         "qformer_input_ids": words(2, 6), "qformer_attention_mask": padded(2, 6, 2)},
        {"logits": mask.bool()},
    )  # fmt: skip


GEMMA: dict[str, Any] = TEXT | {
    "head_dim": 8, "query_pre_attn_scalar": 5, "sliding_window": 5, "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


def gemma2() -> Tiny:
    config = hf.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=5.0)
    mask = padded(2, 13, 4, "left")
    return Tiny(
        hf.Gemma2ForCausalLM(config), {"input_ids": words(2, 13), "attention_mask": mask}, {"logits": mask.bool()}
    )


def gemma3() -> Tiny:
    config = hf.Gemma3Config(
        text_config=GEMMA, vision_config=VISION | {"image_size": 16, "vision_use_head": False},
        mm_tokens_per_image=4, boi_token_index=START, eoi_token_index=END, image_token_index=IMAGE,
    )  # fmt: skip
    ids, mask = with_media(IMAGE, 4)
    return Tiny(
        hf.Gemma3ForConditionalGeneration(config),
        {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2, 3, 16, 16),
         "token_type_ids": (ids == IMAGE).to(torch.int64)},
        {"logits": mask.bool()},
    )  # fmt: skip


def t5gemma() -> Tiny:
    part = GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": None}
    config = hf.T5GemmaConfig(encoder=part, decoder=part, vocab_size=VOCABULARY, pad_token_id=0)
    mask, given = padded(2, 11, 3), padded(2, 9, 2)
    return Tiny(
        hf.T5GemmaForConditionalGeneration(config),
        {"input_ids": words(2, 11), "attention_mask": mask, "decoder_input_ids": words(2, 9),
         "decoder_attention_mask": given},
        {"logits": given.bool(), "encoder_last_hidden_state": mask.bool()},
    )  # fmt: skip


def t5gemma2() -> Tiny:
    encoder = {
        "text_config": GEMMA, "vision_config": VISION | {"image_size": 16, "vision_use_head": False},
        "mm_tokens_per_image": 4, "boi_token_index": START, "eoi_token_index": END, "image_token_index": IMAGE,
    }  # fmt: skip
    config = hf.T5Gemma2Config(encoder=encoder, decoder=GEMMA, image_token_index=IMAGE, eoi_token_index=END)
    ids, mask = with_media(IMAGE, 4)
    given = padded(2, 9, 2)
    return Tiny(
        hf.T5Gemma2ForConditionalGeneration(config),
        {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2, 3, 16, 16),
         "decoder_input_ids": words(2, 9), "decoder_attention_mask": given},
        {"logits": given.bool(), "encoder_last_hidden_state": mask.bool()},
    )  # fmt: skip


def gpt_oss() -> Tiny:
    # Every expert is taken, so that no rounding can change which one is.
    config = hf.GptOssConfig(
        **TEXT, head_dim=8, sliding_window=5, num_local_experts=2, num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = hf.GptOssForCausalLM(config)
    model.set_experts_implementation("eager")  # torch's grouped products have no float64
    mask = padded(2, 13, 4, "left")
    return Tiny(model, {"input_ids": words(2, 13), "attention_mask": mask}, {"logits": mask.bool()})


def udop() -> Tiny:
    config = hf.UdopConfig(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
        dropout_rate=0.0, image_size=12, patch_size=4, decoder_start_token_id=0, max_2d_position_embeddings=32,
    )  # fmt: skip
    mask, given = padded(2, 8, 3), padded(2, 6, 2)
    corners = torch.rand(2, 8, 2) * 0.5
    boxes = torch.cat([corners, corners + torch.rand(2, 8, 2) * 0.5], -1)
    return Tiny(
        hf.UdopForConditionalGeneration(config),
        {"input_ids": words(2, 8), "attention_mask": mask, "bbox": boxes, "pixel_values": pixels(2, 3, 12, 12),
         "decoder_input_ids": words(2, 6), "decoder_attention_mask": given},
        {"logits": given.bool()},
    )  # fmt: skip


def florence2() -> Tiny:
    vision = {
        "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
        "patch_prenorm": [False, True], "embed_dim": [8, 16], "num_heads": [2, 4], "num_groups": [2, 2],
        "window_size": 4, "drop_path_rate": 0.0, "projection_dim": 32, "max_position_embeddings": 10,
        "max_temporal_embeddings": 4,
    }  # fmt: skip
    text = {
        "model_type": "bart", "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dropout": 0.0,
        "decoder_start_token_id": 2,
    }  # fmt: skip
    config = hf.Florence2Config(vision_config=vision, text_config=text, image_token_id=IMAGE)
    # 32 x 32 pixels are 8 x 8 then 4 x 4 patches, and one more token that is their mean
    ids, mask = with_media(IMAGE, 17, 26, side="right")
    given = padded(2, 7, 2)
    return Tiny(
        hf.Florence2ForConditionalGeneration(config),
        {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2, 3, 32, 32),
         "decoder_input_ids": words(2, 7), "decoder_attention_mask": given},
        {"logits": given.bool()},
    )  # fmt: skip


def kosmos2() -> Tiny:
    text = {
        "vocab_size": VOCABULARY, "max_position_embeddings": 64, "embed_dim": 32, "layers": 2, "ffn_dim": 48,
        "attention_heads": 4, "dropout": 0.0, "attention_dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1,
    }  # fmt: skip
    config = hf.Kosmos2Config(text_config=text, vision_config=VISION, latent_query_num=4)
    ids, mask = with_media(IMAGE, 4, 12)
    here = (ids == IMAGE).to(torch.int64)
    return Tiny(
        hf.Kosmos2ForConditionalGeneration(config),
        {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(2, 3, 12, 12),
         "image_embeds_position_mask": here},
        {"logits": mask.bool()},
    )  # fmt: skip


MODELS: dict[str, Callable[[], Tiny]] = {
    "CLIP": clip, "Siglip": siglip, "Whisper": whisper, "Qwen2-Audio": qwen2_audio, "LLaVA": llava, "Mllama": mllama,
    "Idefics": idefics, "Idefics2": idefics2, "Qwen2-VL": qwen2_vl, "Qwen2.5-Omni": qwen2_5_omni, "BLIP-2": blip_2,
    "InstructBLIP": instructblip, "Gemma2": gemma2, "Gemma3": gemma3, "T5Gemma": t5gemma, "T5Gemma2": t5gemma2,
    "GPT-OSS": gpt_oss, "UDOP": udop, "Florence2": florence2, "Kosmos2": kosmos2,
}  # fmt: skip
