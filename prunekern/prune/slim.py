"""``nn.MultiheadAttention`` with fewer or narrower heads, which torch's own class has no words for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunekern.graph.labels import Labels


class SlimMultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention whose heads together may be narrower than the embedding.

    Arguments, results and the names in its state dict are those of nn.MultiheadAttention, of which instances are
    made by ``slim``. inner: the widths of all heads of queries, keys and values; num_heads: how many heads remain;
    scale: that of the original, 1/sqrt(its head's width).

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.
    """

    inner: tuple[int, int, int]
    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
                need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
                is_causal: bool = False) -> tuple[Tensor, Tensor | None]:
        """query [N, L, E], key and value [N, S, E] where ``batch_first``, else [L, N, E]; without N: unbatched.

        Returns the output in the layout of the query and, where asked, the weights [N, L, S], or [N, H, L, S]
        where they are not averaged. Raises RuntimeError where ``is_causal`` comes without its mask.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._heads(query, key, value)
        hinted = is_causal and key_padding_mask is None and not need_weights     # where torch heeds the hint alone
        mask = None if hinted else self._mask(attn_mask, key_padding_mask, q, k.shape[2] - key.shape[1])
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q * self.scale @ k.transpose(-2, -1)
            weights = functional.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            out = functional.scaled_dot_product_attention(q, k, v, mask, dropout, hinted, scale=self.scale)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return (out.squeeze(0) if not batched else out if self.batch_first else out.transpose(0, 1)), weights

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Projected inputs [N, H, length, width], with the extra keys and values that torch's class knows."""
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(self.inner)
        packed = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if self.in_proj_weight is None else (
            self.in_proj_weight.split(self.inner))
        q, k, v = map(functional.linear, (query, key, value), packed, biases)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat((x, one.expand(len(x), -1, -1)), 1) for x, one in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
        return [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v)]

    def _mask(self, attention: Tensor | None, padding: Tensor | None, q: Tensor, extra: int) -> Tensor | None:
        """Both masks as one to add to the scores [N, H, L, S]; the extra keys are never masked."""
        masks = []
        if attention is not None:
            masks.append(attention.unflatten(0, (len(q), -1)) if attention.dim() == 3 else attention[None, None])
        if padding is not None:
            masks.append(padding[:, None, None])
        total: Tensor | None = None
        for mask in masks:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
            total = mask if total is None else total + mask
        return total if total is None or not extra else functional.pad(total, (0, extra))


def slim(sliced: nn.Module, labels: Labels, keep: Tensor) -> None:
    """Turn the attention modules of a sliced copy that lost heads, or width in them, into slim ones, in place."""
    for path, module in sliced.named_modules():
        if type(module) is nn.MultiheadAttention:
            alive = [_alive(labels, f"{path}.{name}".lstrip("."), keep) for name in _projections(module)]
            rows = [part for mask in alive for part in (mask.chunk(3) if len(alive) == 1 else (mask,))]
            if not all(bool(part.all()) for part in rows):
                _switch(module, rows)
    for encoder in sliced.modules():          # its fast path packs padded batches for torch's own attention only
        if isinstance(encoder, nn.TransformerEncoder) and any(
                isinstance(part, SlimMultiheadAttention) for part in encoder.modules()):
            encoder.use_nested_tensor = False


def _projections(module: nn.MultiheadAttention) -> tuple[str, ...]:
    separate = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return separate if module.in_proj_weight is None else ("in_proj_weight",)


def _alive(labels: Labels, name: str, keep: Tensor) -> Tensor:
    name = labels.graph.tied.get(name, name)
    index = labels.axes.get((name, 0))
    return torch.ones(labels.graph.tensors[name].shape[0], dtype=torch.bool) if index is None else keep[index]


def _switch(module: nn.MultiheadAttention, rows: list[Tensor]) -> None:
    module.scale = module.head_dim ** -0.5
    inner = tuple(int(part.sum()) for part in rows)
    module.inner = inner  # type: ignore[assignment]
    module.num_heads = int(rows[2].view(-1, module.head_dim).any(1).sum())
    module.head_dim = inner[0] // module.num_heads
    module._qkv_same_embed_dim = False        # torch's fast paths read the packed weight as they know it
    module.__class__ = SlimMultiheadAttention
