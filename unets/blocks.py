"""IF's ResNet and attention blocks with fewer passes over memory, in diffusers' own modules.

Modules, their names and their parameters stay the same; only their forward passes change.
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

ACTIVATIONS: dict[type[nn.Module], str] = {nn.GELU: "gelu", nn.SiLU: "silu"}
"""The activations of IF's blocks, by their names in :func:`unets.fused_norms.norm_act`."""


class FusedGroupNorm(nn.GroupNorm):
    """A frozen group norm that keeps pictures channels_last."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise [B, C, H, W]."""
        return norm_act(inputs, self)


def convolve(layer: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """Convolve pictures; return the result and the bias still to be added, if any."""
    if isinstance(layer, FrozenConv2d | AdaptedConv2d):
        return layer.without_bias(inputs)
    return layer(inputs), None


def with_dense_gradient(result: Tensor) -> Tensor:
    """Make the gradient of a block's result contiguous before it reaches the block.

    The gradient of a tensor that was concatenated with another is a slice of a larger one, which
    every operation of the backward pass would otherwise copy again.
    """
    if result.requires_grad and not torch.compiler.is_compiling():
        result.register_hook(_make_dense)
    return result


def _make_dense(gradient: Tensor) -> Tensor:
    """Make a gradient of pictures [B, C, H, W] channels_last, or one of rows [B, T, C] dense."""
    rows = gradient.movedim(1, -1) if gradient.dim() == 4 else gradient
    if rows.is_contiguous():
        return gradient
    # a strided copy moves one element at a time; an int64 holds several channels in half precision
    wide = torch.int64.itemsize // rows.dtype.itemsize
    places = (rows.shape[-1], rows.storage_offset(), *rows.stride()[:-1])
    if rows.stride(-1) == 1 and not any(place % wide for place in places):
        dense = rows.view(torch.int64).contiguous().view(rows.dtype)
    else:
        dense = rows.contiguous()
    return dense.movedim(-1, 1) if gradient.dim() == 4 else dense


class FusedResnetBlock2D(ResnetBlock2D):  # type: ignore[misc]  # diffusers is untyped
    """A ResNet block whose norm, scale and shift, and activation are one operation."""

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        """Map pictures [B, C, H, W] and time embeddings [B, D] to [B, C', H', W']."""
        activation = ACTIVATIONS[type(self.nonlinearity)]
        hidden = norm_act(input_tensor, self.norm1, activation)
        resample = self.upsample or self.downsample
        if resample is not None:
            input_tensor, hidden = resample(input_tensor), resample(hidden)
        # a convolution's bias is added by the operation that follows, in the same pass over memory
        hidden, bias = convolve(self.conv1, hidden)
        temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        scale, shift = temb.chunk(2, dim=1)
        hidden = norm_act(hidden, self.norm2, activation, scale, shift, offset=bias)
        hidden, bias = convolve(self.conv2, self.dropout(hidden))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        return with_dense_gradient(add(input_tensor, hidden, bias, 1 / self.output_scale_factor))


class RowAttention:
    """The attention of diffusers' ``AttnAddedKVProcessor2_0``, without copying pictures.

    Rows of channels are a view of channels_last pictures; diffusers copies pictures into rows and
    back.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Map pictures [B, C, H, W] and text [B, T, D] to [B, C, H, W]."""
        rows = norm_act(hidden_states, attn.group_norm).flatten(2).transpose(1, 2)
        text = encoder_hidden_states
        if text is None:
            text = hidden_states.flatten(2).transpose(1, 2)
        elif attn.norm_cross:
            text = norm_act(text.transpose(1, 2), attn.norm_cross).transpose(1, 2)
        mask = attn.prepare_attention_mask(attention_mask, rows.shape[1], len(rows), out_dim=4)

        def split_heads(projected: Tensor) -> Tensor:
            return projected.view(*projected.shape[:2], attn.heads, -1).transpose(1, 2)

        def project(text_proj: nn.Module, row_proj: nn.Module) -> Tensor:
            of_text = text_proj(text)
            if attn.only_cross_attention:
                return split_heads(of_text)
            parts = [with_dense_gradient(of_text), with_dense_gradient(row_proj(rows))]
            return split_heads(torch.cat(parts, dim=1))

        query = split_heads(attn.to_q(rows))
        key = project(attn.add_k_proj, attn.to_k)
        value = project(attn.add_v_proj, attn.to_v)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        result = attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))
        result = result.transpose(1, 2).view(hidden_states.shape) + hidden_states
        return with_dense_gradient(result)


def fuse_blocks(unet: UNet2DConditionModel) -> None:
    """Give a UNet's blocks of IF's kind their fused forward passes, in place."""
    for block in unet.modules():
        if (
            type(block) is ResnetBlock2D
            and block.time_embedding_norm == "scale_shift"
            and type(block.nonlinearity) in ACTIVATIONS
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
