"""torch.nn.MultiheadAttention, computed by attnfuse."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnfuse.functional import multi_source_attention
from attnfuse.nn.heads import merge_heads, split_heads
from attnfuse.problem import AuxRequest, Source


class MultiheadAttention(nn.MultiheadAttention):
    """Drop-in for `torch.nn.MultiheadAttention`: same arguments, parameters, initialisation and state_dict.

        out = Wo · softmax(q·kᵀ / sqrt(D) + masks) · v, one attention call over the projected q, k, v

    Masks keep torch's polarity: in a bool `key_padding_mask` or `attn_mask`, True = ignore; a float mask is
    added to the logits. Where torch raises, the error is torch's. One argument more, keyword-only: `backend`.

    What differs, on purpose:
    - A query that sees no key gets attention output 0, so the result is out_proj's bias; torch gives NaN.
    - `need_weights=True` returns the average over heads (B, L, S) head by head from the log-sum-exp: no
      (B, H, L, S) tensor exists, in the backward pass either. The weights are those before dropout.
      `average_attn_weights=False` returns (B, H, L, S), as asked.
    - `is_causal=True` is trusted as torch's documentation says: it replaces `attn_mask`, with and without
      weights, and `key_padding_mask` still applies.
    - `add_bias_kv` and `add_zero_attn` are one-key sources of their own, nothing is concatenated to the keys.
    - torch's inference fast paths are never taken, also when the module sits in a TransformerEncoderLayer:
      they read the parameters and would go past this class.

    As in torch, the padded tokens pass through the input projection: their values must be finite if the
    gradient of the projection is to be.

    forward(query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
            average_attn_weights=True, is_causal=False) -> (output, weights or None), shapes as in torch:
    query (L, B, E), or (B, L, E) with batch_first, or (L, E); nested tensors for padded self-attention.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self._set_up(backend)

    @staticmethod
    def adopt(module: nn.MultiheadAttention, backend: str | None = None) -> MultiheadAttention:
        """A plain nn.MultiheadAttention changed to this class in place: parameters and hooks stay its own."""
        if type(module) is not nn.MultiheadAttention:
            raise TypeError(f"module must be a plain nn.MultiheadAttention, got {type(module).__name__}")
        module.__class__ = MultiheadAttention
        assert isinstance(module, MultiheadAttention)
        module._set_up(backend)
        return module

    def _set_up(self, backend: str | None) -> None:
        self.backend = backend
        # nn.TransformerEncoderLayer skips its fused kernel, which never calls self_attn, if any submodule has
        # a hook: the one condition that can hold here without misreporting how the weights are laid out.
        self.register_forward_pre_hook(_keep_encoder_layer_from_fusing)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested:
            return self._forward_nested(query, key, value, key_padding_mask, attn_mask, need_weights)
        batched = F._mha_shape_check(  # type: ignore[attr-defined]  # torch's own words for every wrong rank
            query, key, value, key_padding_mask, attn_mask, self.num_heads
        )
        batch_dim = 0 if self.batch_first and batched else 1
        if not batched:
            query, key, value = _unsqueeze_each_once((query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        self._check(query, key, value, attn_mask, is_causal)

        q, k, v = (self._to_heads(x, batch_dim) for x in self._in_projection(query, key, value))
        _check_masks(attn_mask, key_padding_mask, q, k)
        mask = _merge_masks(None if is_causal else attn_mask, key_padding_mask, self.num_heads)
        sources = [Source(k, v, mask=mask, is_causal=is_causal), *self._extra_sources(q)]
        result = multi_source_attention(
            q,
            sources,
            dropout_p=self.dropout if self.training else 0.0,
            return_aux=AuxRequest(lse=True) if need_weights else None,
            backend=self.backend,
        )
        out, aux = result if need_weights else (result, None)
        merged = merge_heads(out)
        output = self.out_proj(merged if batch_dim == 0 else merged.transpose(0, 1))
        weights = None
        if aux is not None:
            weights = attention_weights(q, sources, aux.lse, average=average_attn_weights)
        if batched:
            return output, weights
        return output.squeeze(1), None if weights is None else weights.squeeze(0)

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> None:
        """What torch.nn.functional.multi_head_attention_forward checks, in its order and words."""
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. "
                "You may use the Transformer module method "
                "`generate_square_subsequent_mask` to create this mask."
            )
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(
                f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}"
            )
        if not self._qkv_same_embed_dim:
            if key.shape[:2] != value.shape[:2]:
                raise AssertionError(
                    f"key's sequence and batch dims {key.shape[:2]} do not match value's {value.shape[:2]}"
                )
        elif key.shape != value.shape:
            raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")

    def _in_projection(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The packed weights in as few products as the inputs allow; the results are views of them."""
        bias = self.in_proj_bias
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            q, k, v = (
                F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)
            )
            return q, k, v
        weight, size = self.in_proj_weight, self.embed_dim
        if query is key and key is value:
            q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
            return q, k, v
        q = F.linear(query, weight[:size], None if bias is None else bias[:size])
        if key is value:
            k, v = F.linear(key, weight[size:], None if bias is None else bias[size:]).chunk(2, dim=-1)
            return q, k, v
        k = F.linear(key, weight[size : 2 * size], None if bias is None else bias[size : 2 * size])
        v = F.linear(value, weight[2 * size :], None if bias is None else bias[2 * size :])
        return q, k, v

    def _to_heads(self, x: Tensor, batch_dim: int) -> Tensor:
        """(B, N, E) or (N, B, E) -> (B, H, N, D), a view."""
        heads = split_heads(x, self.num_heads)
        return heads.transpose(1, 2) if batch_dim == 0 else heads.permute(1, 2, 0, 3)

    def _extra_sources(self, q: Tensor) -> list[Source]:
        """The learned and the zero key, each a source of length 1 that every query sees, in torch's order."""
        batch, heads, _, dim = q.shape
        pairs = []
        if self.bias_k is not None and self.bias_v is not None:
            pairs.append((self.bias_k.view(1, heads, 1, dim), self.bias_v.view(1, heads, 1, dim)))
        if self.add_zero_attn:
            zero = q.new_zeros(1, heads, 1, dim)
            pairs.append((zero, zero))
        shape = (batch, heads, 1, dim)
        return [Source(k.to(q.dtype).expand(shape), v.to(q.dtype).expand(shape)) for k, v in pairs]

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention over a nested tensor, which is what nn.TransformerEncoder turns padding into."""
        if query is not key or key is not value:
            raise AssertionError("MultiheadAttention takes NestedTensor only for self-attention")
        if key_padding_mask is not None or attn_mask is not None:
            raise AssertionError(
                "MultiheadAttention takes no mask with NestedTensor: its lengths are the mask"
            )
        if need_weights or not self.batch_first:
            raise AssertionError(
                "MultiheadAttention takes NestedTensor with batch_first and need_weights=False"
            )
        if query.layout is not torch.strided:
            raise AssertionError(f"MultiheadAttention takes strided NestedTensor only, got {query.layout}")
        lengths = [x.shape[0] for x in query.unbind()]
        padded = query.to_padded_tensor(0.0)
        positions = torch.arange(padded.shape[1], device=padded.device)
        padding = positions >= torch.tensor(lengths, device=padded.device)[:, None]
        out, _ = self.forward(padded, padded, padded, padding, need_weights=False)
        rows = [out[b, :n] for b, n in enumerate(lengths)]
        return torch.nested.as_nested_tensor(rows, layout=torch.strided), None


def attention_weights(query: Tensor, sources: list[Source], lse: Tensor, *, average: bool) -> Tensor:
    """exp(z - lse) for every source, columns side by side in the order of the sources.

    query (B, H, L, D), lse (B, H, L) of the joint softmax -> (B, L, S) averaged over heads, or (B, H, L, S).
    Differentiable; a row with lse -inf has weights 0. In averaging, heads are computed one at a time and, if
    gradients are wanted, computed again in the backward pass, so no per-head matrix outlives its turn.
    """
    heads = query.shape[1]
    # torch's softmax autocasts to float32 on a GPU, but not on a CPU: callers get the dtype they know
    widened = query.is_cuda and torch.is_autocast_enabled("cuda")
    dtype = torch.float32 if widened else query.dtype
    columns = []
    for source in sources:
        if not average:
            columns.append(_weights_of_heads(query, source, lse, slice(None)))
            continue
        turns = (
            checkpoint(
                _weights_of_heads,
                query,
                source,
                lse,
                slice(h, h + 1),
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for h in range(heads)
        )
        columns.append((sum(turns, start=query.new_zeros(())) / heads).squeeze(1))
    weights = columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)
    return weights.to(dtype)


def _weights_of_heads(query: Tensor, source: Source, lse: Tensor, heads: slice) -> Tensor:
    """(B, h, L, S): softmax weights of some heads over one source."""
    query, key, lse = query[:, heads], source.key[:, heads], lse[:, heads]
    mask = source.mask
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        if mask is not None and mask.dim() == 2:
            # the kernel never reads a masked key, and a NaN there would come through the product's gradient
            key = key.masked_fill(~mask[:, None, :, None], 0.0)
            mask = mask[:, None, None, :]
        z = query.to(dtype) @ key.to(dtype).transpose(-1, -2) / query.shape[-1] ** 0.5
        if source.is_causal:
            z = z.masked_fill(~torch.ones(z.shape[-2:], dtype=torch.bool, device=z.device).tril(), -torch.inf)
        if mask is not None:
            mask = mask[:, heads] if mask.shape[1] > 1 else mask
            z = z.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else z + mask
        return torch.exp(z - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])


def _check_masks(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> None:
    """torch's checks of mask types and shapes, in torch's words."""
    for name, mask in (("key_padding_mask", padding), ("attn_mask", attn_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(f"only bool and floating types of {name} are supported")
    batch, heads, length, _ = q.shape
    source = k.shape[2]
    if attn_mask is not None:
        rank, given = attn_mask.dim(), attn_mask.shape
        expected = (length, source) if rank == 2 else (batch * heads, length, source)
        if given != expected:
            raise RuntimeError(f"The shape of the {rank}D attn_mask is {given}, but should be {expected}.")
    if padding is not None:
        for dim, size in enumerate((batch, source)):
            if padding.shape[dim] != size:
                raise AssertionError(
                    f"Expected key_padded_mask.shape[{dim}] to be {size}, but got {padding.shape[dim]}"
                )


def _merge_masks(attn_mask: Tensor | None, padding: Tensor | None, heads: int) -> Tensor | None:
    """torch's two masks (bool True = ignore) as one of attnfuse's (bool True = attend), or additive."""
    if attn_mask is None:
        if padding is None:
            return None
        return ~padding if padding.dtype == torch.bool else padding[:, None, None, :]
    if attn_mask.dim() == 2:
        mask = attn_mask[None, None]
    else:
        mask = attn_mask.view(attn_mask.shape[0] // heads, heads, *attn_mask.shape[1:])
    if padding is not None:
        per_key = padding[:, None, None, :]
        if mask.dtype == torch.bool and per_key.dtype == torch.bool:
            mask = mask | per_key
        elif mask.dtype == torch.bool:
            mask = per_key.masked_fill(mask, -torch.inf)
        elif per_key.dtype == torch.bool:
            mask = mask.masked_fill(per_key, -torch.inf)
        else:
            mask = mask + per_key
    return ~mask if mask.dtype == torch.bool else mask


def _unsqueeze_each_once(tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Add the batch dimension and keep "query is key is value": self-attention then projects only once."""
    done = {id(x): x.unsqueeze(1) for x in tensors}
    query, key, value = (done[id(x)] for x in tensors)
    return query, key, value


def _keep_encoder_layer_from_fusing(module: nn.Module, args: Any) -> None:
    """A forward pre-hook that does nothing; that it is registered is its effect."""
