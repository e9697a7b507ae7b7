"""IF's ResNet and attention blocks with fewer passes over memory, in diffusers' own modules.

Modules, their names and their parameters stay what they are; only their forward passes change.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from unets.norms import norm_act

NAMES: dict[type[nn.Module], str] = {nn.GELU: "gelu", nn.SiLU: "silu"}
"""The activations of IF's blocks, as :func:`unets.norms.norm_act` names them."""


class FusedResnetBlock2D(ResnetBlock2D):  # type: ignore[misc]  # diffusers is untyped
    """A ResNet block whose norms, scale and shift, and activations are one operation each."""

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        """[B, C, H, W] and time embeddings [B, D] to [B, C', H', W']."""
        activation = NAMES[type(self.nonlinearity)]
        hidden = norm_act(input_tensor, self.norm1, activation)
        resample = self.upsample or self.downsample
        if resample is not None:
            input_tensor, hidden = resample(input_tensor), resample(hidden)
        hidden = self.conv1(hidden)
        temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        scale, shift = temb.chunk(2, dim=1)
        hidden = norm_act(hidden, self.norm2, activation, scale, shift)
        hidden = self.conv2(self.dropout(hidden))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        result = input_tensor + hidden
        return result if self.output_scale_factor == 1 else result / self.output_scale_factor


class RowAttention:
    """Attention with added text keys and values on channels_last pictures, without copying them.

    What ``AttnAddedKVProcessor2_0`` of diffusers computes.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Pictures [B, C, H, W] and text [B, T, D] to [B, C, H, W]."""
        rows = norm_act(hidden_states, attn.group_norm).flatten(2).transpose(1, 2)
        text = encoder_hidden_states
        if text is None:
            text = hidden_states.flatten(2).transpose(1, 2)
        elif attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        mask = attn.prepare_attention_mask(attention_mask, rows.shape[1], len(rows), out_dim=4)

        def heads(projected: Tensor) -> Tensor:
            return projected.view(*projected.shape[:2], attn.heads, -1).transpose(1, 2)

        query = heads(attn.to_q(rows))
        key, value = attn.add_k_proj(text), attn.add_v_proj(text)
        if not attn.only_cross_attention:
            key = torch.cat([key, attn.to_k(rows)], dim=1)
            value = torch.cat([value, attn.to_v(rows)], dim=1)
        attended = F.scaled_dot_product_attention(query, heads(key), heads(value), attn_mask=mask)
        result = attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))
        return result.transpose(1, 2).view(hidden_states.shape) + hidden_states


def fuse_blocks(unet: UNet2DConditionModel) -> None:
    """Give a UNet's blocks their fused forward passes, where they are IF's kind, in place."""
    for block in unet.modules():
        if (
            type(block) is ResnetBlock2D
            and block.time_embedding_norm == "scale_shift"
            and type(block.nonlinearity) in NAMES
        ):
            block.__class__ = FusedResnetBlock2D
    attentions = [m for m in unet.modules() if isinstance(m, Attention)]
    if attentions and all(m.added_kv_proj_dim is not None for m in attentions):
        unet.set_attn_processor(RowAttention())
