"""Diffusers' default padding at the price of one token.

Without a T5 encoder the SD3 pipeline appends `max_sequence_length` zero vectors to the text. They have no positions, so
they stay identical through every block, and n identical keys weigh in a softmax as one key with log(n) added to its
score. One zero token with that bias is therefore exactly n of them; with a very low bias it is none.
"""

import math
from typing import Any, Final

import torch
from diffusers.models.attention_processor import Attention
from torch.nn import functional

ABSENT: Final = -1e4
"""Bias of a key that nobody sees."""


def pad_bias(is_padded: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return the extra token's key bias [B]: log(num_tokens) where a sample is padded, else ABSENT.

    Args:
        is_padded: [B] bool.
        num_tokens: how many zero tokens the one stands for.
    """
    return torch.where(is_padded, math.log(num_tokens), ABSENT)


def append_zero_token(embeds: torch.Tensor) -> torch.Tensor:
    """Append one zero token to text embeddings: [B, n, d] -> [B, n + 1, d]."""
    return functional.pad(embeds, (0, 0, 0, 1))


def _heads(attention: Attention, states: torch.Tensor) -> torch.Tensor:
    batch, length, width = states.shape
    return states.view(batch, length, attention.heads, width // attention.heads).transpose(1, 2)


class BiasedJointAttention:
    """SD3's joint attention with a bias on the last text token's key."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        last_key_bias: torch.Tensor,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend over image and text tokens together.

        Args:
            attn: the block's attention layer.
            hidden_states: image tokens [B, m, d].
            encoder_hidden_states: text tokens [B, n, d], the zero token last.
            last_key_bias: [B] added to every query's score of that token.

        Returns:
            Image tokens [B, m, d] and text tokens [B, n, d].
        """
        text, length = encoder_hidden_states, hidden_states.shape[1]
        query, key, value = (_heads(attn, layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        text_layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_query, text_key, text_value = (_heads(attn, layer(text)) for layer in text_layers)
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
            text_query, text_key = attn.norm_added_q(text_query), attn.norm_added_k(text_key)
        queries, keys = torch.cat([query, text_query], dim=2), torch.cat([key, text_key], dim=2)
        bias = functional.pad(last_key_bias[:, None, None, None], (keys.shape[2] - 1, 0)).to(queries.dtype)
        mixed = functional.scaled_dot_product_attention(
            queries, keys, torch.cat([value, text_value], dim=2), attn_mask=bias.expand(-1, -1, queries.shape[2], -1)
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        image, text = mixed[:, :length], mixed[:, length:]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image)), text
