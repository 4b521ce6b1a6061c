"""One small network per operator and per way of calling it; test_rules.py compares masked with slim on each.

A network is a convolution that makes 12 channels on 6 x 6 pixels, the function, and a linear layer on all it gives. An
entry of `CASES`, to which indexing.py adds, is a function, the shapes of its parameters, and whether channels of the
convolution can be removed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS, SIDE = 12, 6
Function = Callable[[nn.ParameterDict, Tensor], Tensor]


class Single(nn.Module):
    """Stem, a function with parameters of the given shapes, flatten, linear: (B, 3, 6, 6) -> (B, 5)."""

    def __init__(self, function: Function, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.p = nn.ParameterDict({name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})
        self.function = function
        with torch.no_grad():
            features = function(self.p, self.stem(torch.randn(2, 3, SIDE, SIDE))).flatten(1).shape[1]
        self.head = nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.p, self.stem(x)).flatten(1))


CASES: dict[str, tuple[Function, dict[str, tuple[int, ...]], bool]] = {}


def case(free: bool = True, name: str | None = None, **shapes: tuple[int, ...]) -> Callable[[Function], Function]:
    """Enter a function of (parameters, (B, 12, 6, 6)); `free`: whether channels of the stem can be removed."""

    def enter(function: Function) -> Function:
        CASES[name or function.__name__] = (function, shapes, free)
        return function

    return enter


def both(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x.flatten(1), y.flatten(1)], dim=1)


def enter_short_ones() -> None:
    rows = (2, 3)
    free: dict[str, Function] = {
        # reductions over space, over channels, over both
        **{
            f"{name}_over_{over}": (lambda p, y, f=f, dims=dims: both(y, f(y, dims).reshape(y.shape[0], -1)))
            for over, dims in (("space", rows), ("channels", (1,)), ("all", (1, 2, 3)))
            for name, f in {
                "sum": lambda y, k: y.sum(k),
                "mean": lambda y, k: y.mean(k, keepdim=True),
                "amax": lambda y, k: y.amax(k),
                "amin": lambda y, k: y.amin(k, keepdim=True),
                "logsumexp": lambda y, k: torch.logsumexp(y, k),
                "norm_1": lambda y, k: torch.linalg.vector_norm(y, 1, k),
                "norm_2": lambda y, k: torch.linalg.vector_norm(y, dim=k),
                "var": lambda y, k: y.var(k),
                "var_biased": lambda y, k: y.var(k, unbiased=False, keepdim=True),
                "std": lambda y, k: y.std(k, correction=0),
                "var_mean": lambda y, k: torch.cat(torch.var_mean(y, k), -1),
                "std_mean": lambda y, k: torch.cat(torch.std_mean(y, k, correction=2), -1),
            }.items()
        },
        "sum_of_everything": lambda p, y: y * y.sum() / 100,
        "mean_of_everything": lambda p, y: y + y.mean(),
        "norm_of_order_minus_inf": lambda p, y: both(y, torch.linalg.vector_norm(y + 9, -float("inf"), 1)),
        "norm_of_order_0": lambda p, y: both(y, torch.linalg.vector_norm(F.relu(y), 0, 1)),
        "norm_of_negative_order": lambda p, y: both(y, torch.linalg.vector_norm(y + 9, -2, 1)),
        "norm_of_order_inf": lambda p, y: both(y, torch.linalg.vector_norm(y, float("inf"), 1)),
        "softmax_over_channels": lambda p, y: y * y.softmax(1),
        "log_softmax_over_channels": lambda p, y: y.log_softmax(1),
        "softmax_over_space": lambda p, y: y * y.flatten(2).softmax(-1).unflatten(2, (SIDE, SIDE)),
        "normalize": lambda p, y: F.normalize(y, dim=1),
        **{
            f"{name}_over_{over}": (lambda p, y, f=f, k=k: both(y, f(y, k).to(y.dtype).reshape(y.shape[0], -1)))
            for over, k in (("rows", 2), ("channels_again", 1))
            for name, f in {
                "prod": lambda y, k: (1 + y / 4).prod(k),
                "any": lambda y, k: (y > 1).any(k),
                "all": lambda y, k: (y > -1).all(k),
                "any_of_several": lambda y, k: (y > 1).any((k, 3)),
                "all_of_several": lambda y, k: (y > -1).all((k, 3)),
                "nansum": lambda y, k: y.nansum(k),
                "count_nonzero": lambda y, k: F.relu(y).count_nonzero(k),
            }.items()
        },
        "extremes_of_everything": lambda p, y: (
            y * y.max() + y.min() + (y > 1).any() * (y > -9).all() + (1 + y / 99).prod()
        ),
        "medians_over_space": lambda p, y: both(
            y.flatten(2).median(2).values + y.flatten(2).nanmedian(2).values, y.flatten(2).kthvalue(3).values
        ),
        "max_over_space": lambda p, y: both(y, y.flatten(2).max(2).values),
        # norms without parameters, or over several dimensions
        "layer_norm_over_all": lambda p, y: F.layer_norm(y, y.shape[1:]),
        "layer_norm_bare": lambda p, y: F.layer_norm(y.mT.transpose(1, 3), (CHANNELS,)),
        "instance_norm": lambda p, y: F.instance_norm(y),
        "group_norm_bare": lambda p, y: F.group_norm(y, 3),
        "rms_norm_over_all": lambda p, y: F.rms_norm(y, y.shape[1:]),
        # views
        "unflatten": lambda p, y: y.unflatten(1, (3, 4)).sum(1),
        "unflatten_2": lambda p, y: y.unflatten(1, (3, -1)).mean(2),
        "movedim": lambda p, y: y.movedim(1, -1).movedim((1, 2), (3, 1)),
        "swapaxes": lambda p, y: y.swapaxes(1, 3),
        "transposes": lambda p, y: y.mT.flatten(0, 2).t().t().swapdims(0, 1).mT.reshape(y.shape),
        "squeeze_and_unsqueeze": lambda p, y: y.unsqueeze(2).squeeze(2).unsqueeze(-1).squeeze(),
        "expand_as": lambda p, y: y.mean(rows, keepdim=True).expand_as(y) * y,
        "view_as": lambda p, y: y.flatten(2).view_as(y),
        "broadcast_to": lambda p, y: y[:, :1].broadcast_to(y.shape) + y,
        "channel_shuffle": lambda p, y: F.channel_shuffle(y, 3),
        "pixel_shuffle": lambda p, y: F.pixel_shuffle(y, 2),
        "pixel_unshuffle": lambda p, y: F.pixel_unshuffle(y, 2),
        "repeat": lambda p, y: y.repeat(1, 2, 1, 1),
        "repeat_batchwise": lambda p, y: y.mean(1, keepdim=True).repeat(1, CHANNELS, 1, 2)[..., :SIDE] + y,
        "tile": lambda p, y: y.tile(2, 1, 1),
        "repeat_interleave": lambda p, y: y.repeat_interleave(2, dim=1),
        # parts
        "narrow": lambda p, y: y.narrow(1, 2, 7),
        "slice_from_the_end": lambda p, y: y[:, -5:],
        "slice_to_the_end_but": lambda p, y: y[:, 1:-2],
        "every_third": lambda p, y: y[:, 1::3],
        "split_unevenly": lambda p, y: torch.cat([b * 2 for b in y.split([3, 7, 2], 1)][::-1], 1),
        "split_by_size": lambda p, y: torch.cat([b * 2 for b in y.split(5, 1)][::-1], 1),
        "tensor_split": lambda p, y: torch.cat(y.tensor_split(5, 1)[::-1], 1),
        "stack_and_unbind": lambda p, y: torch.stack([y, 2 * y], 1).unbind(1)[1] + torch.stack([y, y], -1).sum(-1),
        "glu": lambda p, y: F.glu(y, 1),
        "pad_channels": lambda p, y: F.pad(y, (1, 1, 0, 0, 2, 3)),
        "pad_space": lambda p, y: F.pad(y, (1, 1, 0, 2), mode="reflect") + F.pad(y, (1, 1, 2, 0), value=0.5),
        "replicate": lambda p, y: F.pad(y, (1, 2, 0, 0), mode="replicate"),
        "cat_with_zeros": lambda p, y: torch.cat([y, y.new_zeros(y.shape[0], 4, SIDE, SIDE)], 1),
        "cat_with_ones_and_add": lambda p, y: torch.cat([y, torch.ones_like(y)], 1) + y.repeat(1, 2, 1, 1),
        # across channels, in an adapter
        "flip_channels": lambda p, y: y.flip(1) * y,
        "flip_channels_and_space": lambda p, y: y.flip((1, 3)) * y,
        "roll_channels": lambda p, y: y.roll(2, 1) * y,
        "roll_channels_and_space": lambda p, y: y.roll((2, 1), (1, 3)) * y,
        "cumsum": lambda p, y: y.cumsum(1),
        "cumprod": lambda p, y: torch.cumprod(1 + y / 4, 1),
        "cumsum_over_space": lambda p, y: y.cumsum(2),
        # element by element
        "where": lambda p, y: torch.where(y > 0, y, y.mean(1, keepdim=True)),
        "masked_fill": lambda p, y: y.masked_fill(y < 0, -1.0),
        "clamp": lambda p, y: (
            y.clamp(-1, 1) + y.clip(-0.5, y.exp().mean()).nan_to_num() + y.clamp_min(0).minimum(y.sigmoid())
        ),
        "lerp": lambda p, y: torch.lerp(y, y.square(), 0.3) + torch.lerp(y, y.exp(), y.sigmoid()),
        "addcmul": lambda p, y: torch.addcmul(y, y, y.sigmoid(), value=0.5) + torch.addcdiv(y, y, y.exp()),
        "maximum": lambda p, y: (
            y.maximum(y.sin()) + torch.maximum(y, -y) + torch.min(y, y.cos()) + y.reshape_as(y).contiguous()
        ),
        "deviation_of_everything": lambda p, y: y / y.std() + y.var(),
        "remainders": lambda p, y: y.fmod(0.7) + torch.atan2(y, y.cos()) + y.pow(2) + y.to(torch.float64).to(y.dtype),
        "floor_divide": lambda p, y: y + torch.floor_divide(y, 0.3),
        "activations": lambda p, y: F.celu(y) + F.selu(y) + F.mish(y) + F.softplus(y) + F.logsigmoid(y) + F.elu(y),
        "more_activations": lambda p, y: (
            F.hardtanh(y) + F.leaky_relu(y) + F.hardswish(y) + F.relu6(y) + F.tanhshrink(y)
        ),
        # space
        "max_pool_with_indices": lambda p, y: F.max_pool2d(y, 2, return_indices=True)[0],
        "adaptive_max_pool": lambda p, y: F.adaptive_max_pool2d(y, 3),
        "pools_1d": lambda p, y: F.max_pool1d(y.flatten(2), 3) + F.avg_pool1d(y.flatten(2), 3),
        "adaptive_1d": lambda p, y: F.adaptive_avg_pool1d(y.flatten(2), 4) + F.adaptive_max_pool1d(y.flatten(2), 4),
        "pools_3d": lambda p, y: (
            F.avg_pool3d(y[:, :, None].repeat(1, 1, 2, 1, 1), 2) + F.max_pool3d(y[:, :, None].repeat(1, 1, 2, 1, 1), 2)
        ),
        "upsample": lambda p, y: F.interpolate(y, scale_factor=2, mode="bicubic") + F.interpolate(y, size=12),
        "upsample_1d": lambda p, y: F.interpolate(y.flatten(2), scale_factor=2, mode="linear"),
        "unfold": lambda p, y: F.unfold(y, 3, stride=3),
        "fold": lambda p, y: F.fold(F.unfold(y, 3, stride=3), (SIDE, SIDE), 3, stride=3),
        "windows": lambda p, y: y.unfold(2, 3, 3).unfold(3, 2, 2).mean((2, 3)),
        "grid_sample": lambda p, y: F.grid_sample(y, y.mean(1)[:, None, :, :2].tanh(), align_corners=False),
        "more_resizing": lambda p, y: both(
            F.interpolate(y[:, :, None], scale_factor=2, mode="trilinear")
            + F.adaptive_avg_pool3d(y[:, :, None], 12)[:, :, :2],
            F.interpolate(y.flatten(2), size=9) + F.interpolate(y.flatten(2), size=9, mode="nearest-exact"),
        ),
        "antialiased": lambda p, y: (
            F.interpolate(y, size=4, mode="bilinear", antialias=True)
            + F.interpolate(y, size=4, mode="bicubic", antialias=True)
            + F.interpolate(y, size=4, mode="nearest-exact")
        ),
        "padding_of_lines": lambda p, y: (
            F.pad(y.flatten(2), (1, 2), mode="reflect") + F.pad(y.flatten(2), (3, 0), mode="replicate")
        ),
        # made in the graph
        "created": lambda p, y: (
            y
            + torch.full((1, CHANNELS, 1, 1), 0.3) * y.new_ones(CHANNELS, 1, 1)
            + y.new_full((1, 1), 2.0)
            + torch.full_like(y, 0.1) * torch.ones(CHANNELS, SIDE, SIDE)
        ),
        "positions": lambda p, y: (
            y.flatten(2)
            * torch.cat(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")).flatten()[:36].to(y)
            + torch.linspace(0, 1, 36).type_as(y) * F.one_hot(torch.arange(36) % 3, 4)[:, 1].to(y.dtype)
        ),
        # products of activations
        "bmm": lambda p, y: y.flatten(2).mT.bmm(y.flatten(2)) / 9,
        "gram_matrix": lambda p, y: (y.flatten(2) @ y.flatten(2).mT) @ y.flatten(2) / 99,
        "baddbmm": lambda p, y: torch.baddbmm(y.flatten(2), y.flatten(2), y[:, :1].flatten(2).mT @ y[:, :1].flatten(2)),
        "product_with_a_table": lambda p, y: (
            y.sigmoid().flatten(2).mT @ torch.linspace(-1, 1, 132).view(12, 11).to(y.dtype)
        ),
        "einsum_outer": lambda p, y: torch.einsum("bchw,bdhw->bcd", y, y.exp()),
    }
    for name, function in free.items():
        CASES[name] = (function, {}, True)
    pinned: dict[str, Function] = {
        "select_a_channel": lambda p, y: y * y[:, 3:4] + y.select(1, 2)[:, None],
        "unbind_channels": lambda p, y: sum(k * part for k, part in enumerate(y.unbind(1))),  # type: ignore[misc]
        "max_over_channels": lambda p, y: y.max(1).values,
        "gather": lambda p, y: y.gather(1, (y[:, :3] > 0).long() + 2),
        "min_and_argmin": lambda p, y: y.min(1).values + y.argmin(1) + y.flatten(2).triu().sum(1).unflatten(1, (6, 6)),
        "argmax": lambda p, y: y * y.argmax(1, keepdim=True),
        "topk": lambda p, y: y.topk(4, dim=1).values,
        "index_by_list": lambda p, y: y[:, [3, 1, 1, 5]],
        "sort": lambda p, y: y.sort(1).values,
        "reflect_channels": lambda p, y: F.pad(y.flatten(2).mT, (1, 1), mode="reflect"),
        "pool_channels": lambda p, y: F.avg_pool1d(y.flatten(2).mT, 2),
        "windows_of_channels": lambda p, y: y.unfold(1, 4, 2),
        "triangle": lambda p, y: y.flatten(2).tril(),
        "strided_unevenly": lambda p, y: y[:, 1::5],
        "two_flips": lambda p, y: (y.flatten(2).mT @ y.flatten(2))[:, None].expand(-1, 2, -1, -1),
    }
    for name, function in pinned.items():
        CASES[name] = (function, {}, name in ("two_flips",))


enter_short_ones()


@case(scale=(12,), shift=(12, 1, 1))
def parameters_along_channels(p: nn.ParameterDict, y: Tensor) -> Tensor:
    return y * p["scale"].view(1, -1, 1, 1) + p["shift"] * p["shift"].sigmoid().mean()


@case(table=(20, 12))
def a_table_by_index(p: nn.ParameterDict, y: Tensor) -> Tensor:
    rows = p["table"][torch.arange(36) % 20] + F.embedding(torch.arange(36) % 7, p["table"])
    return y.flatten(2).mT * rows


@case(table=(20, 12))
def a_table_by_index_select(p: nn.ParameterDict, y: Tensor) -> Tensor:
    return y.flatten(2).mT + p["table"].index_select(0, torch.arange(36) % 20)


@case(weight=(12, 1, 3), narrow=(1, 1, 1))
def convolutions_1d(p: nn.ParameterDict, y: Tensor) -> Tensor:
    y = F.conv1d(y.flatten(2), p["weight"], padding=1, groups=12)
    return F.conv1d(y.mT.reshape(-1, 1, 12), p["narrow"]).reshape(y.shape[0], 36, 12)


@case(weight=(8, 12, 2, 2, 2), up=(8, 4, 2, 2, 2))
def convolutions_3d(p: nn.ParameterDict, y: Tensor) -> Tensor:
    y = F.conv3d(y[:, :, None].expand(-1, -1, 3, -1, -1), p["weight"])
    return F.conv_transpose3d(y, p["up"], groups=2)


@case(weight=(12, 2, 3), bias=(6,))
def transposed_1d(p: nn.ParameterDict, y: Tensor) -> Tensor:
    return F.conv_transpose1d(y.flatten(2), p["weight"], p["bias"], stride=2, groups=3)


@case(weight=(12, 3, 2, 2), bias=(6,))
def transposed_2d(p: nn.ParameterDict, y: Tensor) -> Tensor:
    return F.conv_transpose2d(torch.sigmoid(y), p["weight"], p["bias"], groups=2)


@case(weight=(24, 4, 3, 3), slope=(24,))
def grouped_with_prelu(p: nn.ParameterDict, y: Tensor) -> Tensor:
    return F.prelu(F.conv2d(y, p["weight"], padding="same", groups=3), p["slope"])


@case(slope=(1,))
def one_slope(p: nn.ParameterDict, y: Tensor) -> Tensor:
    return F.prelu(y, p["slope"])


@case(weight=(8, 12), bias=(8,), vector=(8,))
def plain_products(p: nn.ParameterDict, y: Tensor) -> Tensor:
    flat = torch.addmm(p["bias"], y.mean((2, 3)), p["weight"].t())
    return both(flat @ p["vector"][:, None], flat.mv(p["vector"])[:, None] * p["vector"].dot(p["vector"]))


@case(left=(12, 7), right=(7, 12))
def a_weight_of_two_factors(p: nn.ParameterDict, y: Tensor) -> Tensor:
    return F.linear(y.permute(0, 2, 3, 1), p["left"] @ p["right"] / 4)


@case(vector=(36,))
def product_with_a_vector(p: nn.ParameterDict, y: Tensor) -> Tensor:
    return y.flatten(2) @ p["vector"]


@case()
def einsum_over_channels(p: nn.ParameterDict, y: Tensor) -> Tensor:
    y = y.flatten(2)
    return torch.einsum("bnd,bde->bne", torch.einsum("bcn,bcd->bnd", y.sigmoid(), y.exp()) / 99, y.mT.softmax(1))


@case(weight=(10, 12))
def einsum_with_a_weight(p: nn.ParameterDict, y: Tensor) -> Tensor:
    return torch.einsum("bchw,dc->bdhw", y, p["weight"])


@case(bias=(3, 36, 36), weight=(36, 12))
def attention_with_a_bias(p: nn.ParameterDict, y: Tensor) -> Tensor:
    q, k, v = F.linear(y.flatten(2).mT, p["weight"]).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=p["bias"])


@case(weight=(40, 12))
def causal_attention_of_uneven_widths(p: nn.ParameterDict, y: Tensor) -> Tensor:
    q, k, v = F.linear(y.flatten(2).mT, p["weight"]).unflatten(-1, (2, 20)).transpose(1, 2).split([6, 6, 8], -1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


@case(weight=(24, 12))
def grouped_queries(p: nn.ParameterDict, y: Tensor) -> Tensor:
    q, k, v = F.linear(y.flatten(2).mT, p["weight"]).split([16, 4, 4], -1)
    q, k, v = (t.unflatten(-1, (-1, 2)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


@case(weight=(8, 12, 3, 3))
def weight_standardised_every_way(p: nn.ParameterDict, y: Tensor) -> Tensor:
    w = p["weight"]
    w = w - w.mean((1, 2, 3), keepdim=True)
    w = w / (w.std((1, 2, 3), keepdim=True) + 1e-3) + F.normalize(w, dim=1) + w / w.amax(1, keepdim=True).exp()
    return F.conv2d(y, w * w.norm() / (w.flatten(1).norm(dim=1) + 1e-3)[:, None, None, None])


@case(token=(1, 1, 12), free=True)
def a_token_written_into_place(p: nn.ParameterDict, y: Tensor) -> Tensor:
    z = y.new_zeros(y.shape[0], 37, 14)
    z[:, :1, 1:13] = p["token"]
    z[:, 1:, 1:13] = y.flatten(2).mT
    return z


@case()
def channels_written_into_others(p: nn.ParameterDict, y: Tensor) -> Tensor:
    z = y.clone()
    z[:, 2:6] = y[:, 6:10].sigmoid()
    z[..., 0] = 1.0
    return z


@case(weight=(12,), token=(36,))
def products_with_a_vector(p: nn.ParameterDict, y: Tensor) -> Tensor:
    pixels = y.flatten(2).mT
    return both(F.linear(pixels, p["weight"]), both(pixels @ p["weight"].exp(), y.flatten(2) @ p["token"]))


@case(weight=(7, 12))
def composites_of_what_has_rules(p: nn.ParameterDict, y: Tensor) -> Tensor:
    """None of these has a rule; some are made of others that have none either."""
    alike = F.cosine_similarity(y, y.flip(2).exp(), dim=1)[:, None]
    apart = F.pairwise_distance(y, y.sigmoid())[..., None]
    steps = torch.diff(y, dim=3)
    mixed = torch.inner(y.permute(0, 2, 3, 1), p["weight"]).permute(0, 3, 1, 2)
    return both(y * alike + apart, both(steps, mixed))
