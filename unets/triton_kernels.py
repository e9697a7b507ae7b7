"""The Triton operators behind :mod:`unets.fused_norms`, with their backward passes.

All tensors are rows of channels, x of shape [B, P, C] and contiguous (a channels_last picture has
P = H * W). With mean m and deviation 1/r of each group, the result is act(a * x + b), where for
each picture and channel

    a = r * weight * (1 + scale)        b = (bias - m * r * weight) * (1 + scale) + shift

so each pass needs only two sums over P: of x and x² in the forward pass, and of g and g x in the
backward pass, with the gradient g = dy * act'(a x + b). An offset c, the bias of the convolution
that produced x, turns x into x + c throughout; it costs no pass, as it enters the sums, a and b.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, CHANNELS = 32, 64
"""The size of one program's tile."""

SUMMED_ROWS, SUMMED_GRADIENT_ROWS = 128, 64
"""The most rows of a summed tile in the forward and the backward pass; the latter reads two
tensors, so it holds half as many rows of each."""

ELEMENTS = 1024
"""The number of elements that one program of an addition handles."""


@triton.jit
def _activate(z, ACT: tl.constexpr):
    """Compute act(z); GELU is the exact one (Hendrycks and Gimpel 2016), z Φ(z)."""
    if ACT == "gelu":
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACT == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def _slope(z, ACT: tl.constexpr):
    """Compute act'(z); for GELU, Φ(z) + z φ(z)."""
    result = tl.full(z.shape, 1.0, tl.float32)
    if ACT == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        result = 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACT == "silu":
        s = tl.sigmoid(z)
        result = s * (1 + z * (1 - s))
    return result


@triton.jit
def _load_pair(ptr, n, c, here, C):
    """Load both rows of picture n from a tensor [B, 2, C], as [1, CHANNELS] each."""
    first = tl.load(ptr + n * 2 * C + c, here, other=0.0)[None, :]
    second = tl.load(ptr + n * 2 * C + C + c, here, other=0.0)[None, :]
    return first, second


@triton.jit
def _tile(step, n, c, here, P, C, ROWS: tl.constexpr):
    """Return a tile's places in picture n of a tensor [B, P, C], and which of them exist."""
    p = step * ROWS + tl.arange(0, ROWS)
    return n * P * C + p[:, None] * C + c[None, :], (p[:, None] < P) & here[None, :]


@triton.jit(do_not_specialize=["P", "blocks", "STEPS"])
def _sums(
    x_ptr,
    dy_ptr,
    ab_ptr,
    out_ptr,
    P,
    C,
    blocks,
    ACT: tl.constexpr,
    GRADIENT: tl.constexpr,
    STEPS,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sum x and x², or g and g x, over a block of rows, into out [B, blocks, 2, C]."""
    n = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    here = c < C
    first = tl.zeros((CHANNELS,), tl.float32)
    second = tl.zeros((CHANNELS,), tl.float32)
    if GRADIENT:
        a, b = _load_pair(ab_ptr, n, c, here, C)
    for step in range(STEPS):
        at, inside = _tile(block * STEPS + step, n, c, here, P, C, ROWS)
        x = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
        if GRADIENT:
            g = tl.load(dy_ptr + at, inside, other=0.0).to(tl.float32) * _slope(a * x + b, ACT)
            first += tl.sum(g, 0)
            second += tl.sum(g * x, 0)
        else:
            first += tl.sum(x, 0)
            second += tl.sum(x * x, 0)
    out = out_ptr + (n * blocks + block) * 2 * C
    tl.store(out + c, first, here)
    tl.store(out + C + c, second, here)


@triton.jit
def _sum_blocks(sums_ptr, n, c, here, C, blocks, BLOCK: tl.constexpr):
    """Add up both sums of a picture's channels c over all blocks of rows."""
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    for block in range(blocks):
        at = sums_ptr + (n * blocks + block) * 2 * C + c
        first += tl.load(at, here, other=0.0)
        second += tl.load(at + C, here, other=0.0)
    return first, second


@triton.jit(do_not_specialize=["P", "blocks", "WIDTH", "stride"])
def _coefficients(
    sums_ptr,
    weight_ptr,
    bias_ptr,
    offset_ptr,
    scale_ptr,
    shift_ptr,
    stride,
    stats_ptr,
    ab_ptr,
    P,
    C,
    blocks,
    eps,
    WIDTH,
    OFFSET: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the mean and 1 / deviation of a picture's group to stats, and its a and b to ab."""
    n, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    here = lane < WIDTH
    c = group * WIDTH + lane
    first, second = _sum_blocks(sums_ptr, n, c, here, C, blocks, BLOCK)
    offset = tl.zeros((BLOCK,), tl.float32)
    if OFFSET:
        offset = tl.load(offset_ptr + c, here, other=0.0).to(tl.float32)
        second += offset * (2 * first + P * offset)
        first += P * offset
    mean = tl.sum(first, 0) / (P * WIDTH)
    # rounding can make the difference negative
    variance = tl.maximum(tl.sum(second, 0) / (P * WIDTH) - mean * mean, 0.0)
    r = 1 / tl.sqrt(variance + eps)
    stats = stats_ptr + (n * tl.num_programs(1) + group) * 2
    tl.store(stats, mean)
    tl.store(stats + 1, r)
    a = r * tl.load(weight_ptr + c, here, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + c, here, other=0.0).to(tl.float32) - mean * a
    if SCALED:
        grow = 1 + tl.load(scale_ptr + n * stride + c, here, other=0.0).to(tl.float32)
        a *= grow
        b = b * grow + tl.load(shift_ptr + n * stride + c, here, other=0.0).to(tl.float32)
    tl.store(ab_ptr + n * 2 * C + c, a, here)
    tl.store(ab_ptr + n * 2 * C + C + c, b + a * offset, here)


@triton.jit(do_not_specialize=["P", "blocks", "WIDTH"])
def _gradient_coefficients(
    sums_ptr,
    stats_ptr,
    ab_ptr,
    weight_ptr,
    bias_ptr,
    offset_ptr,
    de_ptr,
    dscale_ptr,
    dshift_ptr,
    P,
    C,
    blocks,
    WIDTH,
    OFFSET: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write d and e of dx = a g + d x + e for a picture's group, and scale and shift gradients."""
    n, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    here = lane < WIDTH
    c = group * WIDTH + lane
    sum_g, sum_gx = _sum_blocks(sums_ptr, n, c, here, C, blocks, BLOCK)
    offset = tl.zeros((BLOCK,), tl.float32)
    if OFFSET:
        offset = tl.load(offset_ptr + c, here, other=0.0).to(tl.float32)
        sum_gx += offset * sum_g
    stats = stats_ptr + (n * tl.num_programs(1) + group) * 2
    mean, r = tl.load(stats), tl.load(stats + 1)
    a = tl.load(ab_ptr + n * 2 * C + c, here, other=0.0)
    centred = r * (sum_gx - mean * sum_g)  # the sum of g times the normalised x
    mean_g = tl.sum(a * sum_g, 0) / (P * WIDTH)
    mean_gx = tl.sum(a * centred, 0) / (P * WIDTH)
    d = tl.full((BLOCK,), 1.0, tl.float32) * (-r * mean_gx)
    tl.store(de_ptr + n * 2 * C + c, d, here)
    tl.store(de_ptr + n * 2 * C + C + c, d * (offset - mean) - mean_g, here)
    if SCALED:
        weight = tl.load(weight_ptr + c, here, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + c, here, other=0.0).to(tl.float32)
        dscale = weight * centred + bias * sum_g
        tl.store(dscale_ptr + n * C + c, dscale.to(dscale_ptr.dtype.element_ty), here)
        tl.store(dshift_ptr + n * C + c, sum_g.to(dshift_ptr.dtype.element_ty), here)


@triton.jit(do_not_specialize=["P", "STEPS"])
def _apply(
    x_ptr,
    dy_ptr,
    ab_ptr,
    de_ptr,
    out_ptr,
    P,
    C,
    ACT: tl.constexpr,
    GRADIENT: tl.constexpr,
    STEPS,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Compute act(a * x + b), or the gradient a g + d x + e."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    here = c < C
    a, b = _load_pair(ab_ptr, n, c, here, C)
    if GRADIENT:
        d, e = _load_pair(de_ptr, n, c, here, C)
    for step in range(STEPS):
        at, inside = _tile(tl.program_id(1) * STEPS + step, n, c, here, P, C, ROWS)
        x = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
        if GRADIENT:
            g = tl.load(dy_ptr + at, inside, other=0.0).to(tl.float32) * _slope(a * x + b, ACT)
            out = a * g + d * x + e
        else:
            out = _activate(a * x + b, ACT)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), inside)


def _lanes(width: int) -> int:
    """Return the lanes for a group's channels, at least 256 to compile for few numbers of lanes."""
    return max(256, triton.next_power_of_2(width))


def _grid(x: Tensor, tile_rows: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Plan a pass over x in tiles of at most ``tile_rows``: the grid, and the kernel's settings."""
    pictures, rows, channels = x.shape
    columns = triton.cdiv(channels, CHANNELS)
    tile_rows = min(tile_rows, max(ROWS, triton.next_power_of_2(rows)))
    # enough programs to fill a GPU, few enough that summing up their sums stays cheap
    steps = max(1, min(8, pictures * triton.cdiv(rows, tile_rows) * columns // 1024))
    blocks = triton.cdiv(rows, tile_rows * steps)
    return (pictures, blocks, columns), {"STEPS": steps, "ROWS": tile_rows, "CHANNELS": CHANNELS}


def _sum(x: Tensor, dy: Tensor, ab: Tensor, activation: str, gradient: bool) -> Tensor:
    """Compute both sums of each block of rows, [B, blocks, 2, C]."""
    pictures, rows, channels = x.shape
    grid, tile = _grid(x, SUMMED_GRADIENT_ROWS if gradient else SUMMED_ROWS)
    sums = torch.empty(pictures, grid[1], 2, channels, dtype=torch.float32, device=x.device)
    _sums[grid](x, dy, ab, sums, rows, channels, grid[1], activation, GRADIENT=gradient, **tile)
    return sums


@torch.library.custom_op("unets::norm_act", mutates_args=())
def norm_act_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    offset: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result [B, P, C], and stats [B, groups, 2] and ab [B, 2, C] for backward."""
    x = x.contiguous()
    pictures, rows, channels = x.shape
    y, stats, ab = _allocate_results(x, groups)
    sums = _sum(x, x, ab, "identity", gradient=False)
    width = channels // groups
    scaled = scale is not None and shift is not None
    if scaled and (scale.stride() != shift.stride() or scale.stride(1) != 1):
        scale, shift = scale.contiguous(), shift.contiguous()
    _coefficients[(pictures, groups)](
        # an unread tensor stands in for each missing one, as a kernel takes all its arguments
        *(sums, weight, bias, bias if offset is None else offset),
        *((scale, shift, scale.stride(0)) if scaled else (weight, weight, 0)),
        *(stats, ab, rows, channels, sums.shape[1], eps, width),
        OFFSET=offset is not None,
        SCALED=scaled,
        BLOCK=_lanes(width),
    )
    grid, tile = _grid(x, ROWS)
    _apply[grid](x, x, ab, ab, y, rows, channels, activation, GRADIENT=False, **tile)
    return y, stats, ab


def _allocate_results(x: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    pictures, _, channels = x.shape
    new = {"dtype": torch.float32, "device": x.device}
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty(pictures, groups, 2, **new),
        torch.empty(pictures, 2, channels, **new),
    )


@norm_act_rows.register_fake
def _(x, weight, bias, offset, scale, shift, groups, eps, activation):
    return _allocate_results(x, groups)


@torch.library.custom_op("unets::norm_act_backward", mutates_args=())
def norm_act_rows_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    offset: Tensor | None,
    scaled: bool,
    stats: Tensor,
    ab: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, scale and shift; the last two are empty without a scale."""
    dy, x = dy.contiguous(), x.contiguous()
    pictures, rows, channels = x.shape
    groups = stats.shape[1]
    dx, dscale, dshift = _allocate_gradients(x, scaled)
    sums = _sum(x, dy, ab, activation, gradient=True)
    de = torch.empty_like(ab)
    width = channels // groups
    _gradient_coefficients[(pictures, groups)](
        *(sums, stats, ab, weight, bias, bias if offset is None else offset),
        *(de, dscale, dshift, rows, channels, sums.shape[1], width),
        OFFSET=offset is not None,
        SCALED=scaled,
        BLOCK=_lanes(width),
    )
    grid, tile = _grid(x, ROWS)
    _apply[grid](x, dy, ab, de, dx, rows, channels, activation, GRADIENT=True, **tile)
    return dx, dscale, dshift


def _allocate_gradients(x: Tensor, scaled: bool) -> tuple[Tensor, Tensor, Tensor]:
    size = (x.shape[0], x.shape[2] if scaled else 0)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, x.new_empty(size), x.new_empty(size)


@norm_act_rows_backward.register_fake
def _(dy, x, weight, bias, offset, scaled, stats, ab, activation):
    return _allocate_gradients(x, scaled)


def _keep(ctx, inputs, output):
    x, weight, bias, offset, scale, _, _, _, ctx.activation = inputs
    ctx.scaled = scale is not None
    ctx.set_materialize_grads(False)  # the statistics get no gradients
    ctx.save_for_backward(x, weight, bias, offset, *output[1:])


def _backward(ctx, dy, dstats, dab):
    x, weight, bias, offset, stats, ab = ctx.saved_tensors
    dx, dscale, dshift = norm_act_rows_backward(
        dy, x, weight, bias, offset, ctx.scaled, stats, ab, ctx.activation
    )
    if not ctx.scaled:
        dscale = dshift = None
    return dx, None, None, None, dscale, dshift, None, None, None


norm_act_rows.register_autograd(_backward, setup_context=_keep)


@triton.jit(do_not_specialize=["total"])
def _add(x_ptr, h_ptr, bias_ptr, y_ptr, factor, total, C, BLOCK: tl.constexpr):
    """Compute y = (x + h + bias) * factor for one block of elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    x = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + at, inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + at % C, inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, ((x + h + bias) * factor).to(y_ptr.dtype.element_ty), inside)


@torch.library.custom_op("unets::add_rows", mutates_args=())
def add_rows(x: Tensor, h: Tensor, bias: Tensor, factor: float) -> Tensor:
    """Compute (x + h + bias) * factor; x and h [B, P, C], bias [C]."""
    x, h = x.contiguous(), h.contiguous()
    y = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), ELEMENTS),)
    _add[grid](x, h, bias, y, factor, x.numel(), x.shape[-1], BLOCK=ELEMENTS)
    return y


@add_rows.register_fake
def _(x, h, bias, factor):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_factor(ctx, inputs, output):
    ctx.factor = inputs[-1]


def _backward_add(ctx, dy):
    dx = dy if ctx.factor == 1 else dy * ctx.factor
    return dx, dx, None, None


add_rows.register_autograd(_backward_add, setup_context=_keep_factor)
