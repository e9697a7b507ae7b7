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

from unets.frozen import FrozenConv2d
from unets.fused_norms import add, norm_act
from unets.lora_layers import AdaptedConv2d

NAMES: dict[type[nn.Module], str] = {nn.GELU: "gelu", nn.SiLU: "silu"}
"""The activations of IF's blocks, as :func:`unets.fused_norms.norm_act` names them."""


WIDE = torch.int64
"""What a strided copy moves at a time."""


class FusedGroupNorm(nn.GroupNorm):
    """A frozen group norm of pictures, which stay channels_last."""

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, C, H, W], normalised."""
        return norm_act(inputs, self)


def convolved(layer: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """A convolution of pictures, and its bias where that is still to be added."""
    if isinstance(layer, FrozenConv2d):
        return layer.without_bias(inputs), layer.bias
    if isinstance(layer, AdaptedConv2d):
        return layer.without_bias(inputs)
    return layer(inputs), None


def with_dense_gradient(result: Tensor) -> Tensor:
    """A block's result, whose gradient reaches the block in one piece.

    Of a tensor that was concatenated with another, the gradient is a part of a larger one, which
    each of the operations that it passes on its way would copy anew.
    """
    if result.requires_grad and not torch.compiler.is_compiling():
        result.register_hook(_dense)
    return result


def _dense(gradient: Tensor) -> Tensor:
    """A gradient of pictures [B, C, H, W] or rows [B, T, C], its channels and pixels in a row."""
    rows = gradient.movedim(1, -1) if gradient.dim() == 4 else gradient
    if rows.is_contiguous():
        return gradient
    wide = WIDE.itemsize // rows.dtype.itemsize
    places = (rows.shape[-1], rows.storage_offset(), *rows.stride()[:-1])
    if rows.stride(-1) == 1 and not any(place % wide for place in places):
        dense = rows.view(WIDE).contiguous().view(rows.dtype)  # several channels at a time
    else:
        dense = rows.contiguous()
    return dense.movedim(-1, 1) if gradient.dim() == 4 else dense


class FusedResnetBlock2D(ResnetBlock2D):  # type: ignore[misc]  # diffusers is untyped
    """A ResNet block whose norms, scale and shift, and activations are one operation each."""

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        """[B, C, H, W] and time embeddings [B, D] to [B, C', H', W']."""
        activation = NAMES[type(self.nonlinearity)]
        hidden = norm_act(input_tensor, self.norm1, activation)
        resample = self.upsample or self.downsample
        if resample is not None:
            input_tensor, hidden = resample(input_tensor), resample(hidden)
        hidden, bias = convolved(self.conv1, hidden)
        temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        scale, shift = temb.chunk(2, dim=1)
        hidden = norm_act(hidden, self.norm2, activation, scale, shift, offset=bias)
        hidden, bias = convolved(self.conv2, self.dropout(hidden))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return with_dense_gradient(add(input_tensor, hidden, bias, 1 / self.output_scale_factor))


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
            text = norm_act(text.transpose(1, 2), attn.norm_cross).transpose(1, 2)
        mask = attn.prepare_attention_mask(attention_mask, rows.shape[1], len(rows), out_dim=4)

        def heads(projected: Tensor) -> Tensor:
            return projected.view(*projected.shape[:2], attn.heads, -1).transpose(1, 2)

        def joined(text_proj: nn.Module, row_proj: nn.Module) -> Tensor:
            of_text = text_proj(text)
            if attn.only_cross_attention:
                return heads(of_text)
            parts = [with_dense_gradient(of_text), with_dense_gradient(row_proj(rows))]
            return heads(torch.cat(parts, dim=1))

        query = heads(attn.to_q(rows))
        key = joined(attn.add_k_proj, attn.to_k)
        value = joined(attn.add_v_proj, attn.to_v)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        result = attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))
        result = result.transpose(1, 2).view(hidden_states.shape) + hidden_states
        return with_dense_gradient(result)


def fuse_blocks(unet: UNet2DConditionModel) -> None:
    """Give a UNet's blocks their fused forward passes, where they are IF's kind, in place."""
    for block in unet.modules():
        if (
            type(block) is ResnetBlock2D
            and block.time_embedding_norm == "scale_shift"
            and type(block.nonlinearity) in NAMES
        ):
            block.__class__ = FusedResnetBlock2D
    if type(unet.conv_norm_out) is nn.GroupNorm:
        unet.conv_norm_out.__class__ = FusedGroupNorm
    attentions = [m for m in unet.modules() if isinstance(m, Attention)]
    if attentions and all(
        m.added_kv_proj_dim is not None and isinstance(m.norm_cross, nn.GroupNorm | None)
        for m in attentions
    ):
        unet.set_attn_processor(RowAttention())
