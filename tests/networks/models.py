"""Random networks for the property tests: hypothesis draws a recipe, and the recipe builds the network.

A `Recipe` is plain data: image size, stem, blocks with their options, head, seed. It prints as the Python expression
that makes it again, and `build` always gives the same network: in eval mode, in plain torch, exportable with a dynamic
batch, with every parameter and batch-norm statistic drawn from the seed (layer scales of 1e-6 and zero gammas hide
errors) and activations near 1 (saturated softmax and sigmoid hide them too).

`SMALLEST` holds one minimal network per kind of block and per choice of each of its options, to reproduce a failure
without hypothesis. To add a kind of block, write a `Block` with the `block` decorator in one of the block files; the
strategy and `SMALLEST` find it in the table `BLOCKS`. To pass a found failure on, paste the printed recipe after
`from tests.networks.models import Recipe, step`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import tests.networks.channel_blocks
import tests.networks.conv_blocks
import tests.networks.token_blocks  # noqa: F401  # reason: importing a block file enters its blocks in BLOCKS
from tests.networks.blocks import BLOCKS, Block, Choice, State, ToImage, ToTokens, conv_norm_act, pointwise

INPUT_CHANNELS = 3
CLASSES = 5
STEMS = ("patch", "conv", "strided")
HEADS = ("pool", "flatten", "norm", "conv", "features")
KINDS = ("conv", "linear", "residual", *BLOCKS)  # reason: hypothesis shrinks towards the front


@dataclass(frozen=True, repr=False)
class Step:
    """One block of a recipe: a kind in BLOCKS and a choice for each of its options, in the table's order."""

    kind: str
    options: tuple[tuple[str, Choice], ...]

    def __repr__(self) -> str:
        defaults = {name: choices[0] for name, choices in BLOCKS[self.kind].options.items()}
        shown = [f"{name}={value!r}" for name, value in self.options if value != defaults[name]]
        return f"step({', '.join([repr(self.kind), *shown])})"


def step(kind: str, **options: Choice) -> Step:
    """A block with the simplest choice for every option that is not given."""
    if kind not in BLOCKS:
        raise ValueError(f"unknown kind of block {kind!r}; known: {', '.join(BLOCKS)}")
    known = BLOCKS[kind].options
    for name, value in options.items():
        if name not in known or value not in known[name]:
            raise ValueError(f"{kind!r} has no option {name}={value!r}; it has {known}")
    return Step(kind, tuple((name, options.get(name, choices[0])) for name, choices in known.items()))


@dataclass(frozen=True)
class Recipe:
    """A network as data. `channels` is the width after the stem, a multiple of 4."""

    blocks: tuple[Step, ...] = ()
    height: int = 8
    width: int = 8
    channels: int = 8
    stem: str = "patch"
    head: str = "pool"
    seed: int = 0

    def build(self) -> nn.Module:
        """The network (B, 3, height, width) -> (B, 5), or (B, ...) features without a head; leaves torch's random
        state as it was."""
        with torch.random.fork_rng(devices=[]):
            network = Network(self)
        randomise(network, self.seed)
        return network.eval()

    def example(self, batch: int = 2, seed: int = 0) -> Tensor:
        """Standard normal images (batch, 3, height, width), the same for the same arguments."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, INPUT_CHANNELS, self.height, self.width, generator=generator)


class Stem(Block):
    """(B, 3, H, W) -> image: 2 x 2 patches, or a 3 x 3 convolution with batch norm and ReLU of stride 1 or 2."""

    def __init__(self, recipe: Recipe) -> None:
        stride = 1 if recipe.stem == "conv" else 2
        rounded = 0 if recipe.stem == "patch" else stride - 1
        height, width = (recipe.height + rounded) // stride, (recipe.width + rounded) // stride
        super().__init__(State("image", recipe.channels, height, width))
        if recipe.stem == "patch":
            self.layer: nn.Module = nn.Conv2d(INPUT_CHANNELS, recipe.channels, 2, 2)
        else:
            self.layer = conv_norm_act(INPUT_CHANNELS, recipe.channels, 3, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Head(nn.Module):
    """Image or tokens -> (B, 5); "features" gives back what it gets. Class tokens, if there are any, are put beside
    the mean of the other tokens ("pool", "conv") or added to it ("norm")."""

    def __init__(self, state: State, kind: str) -> None:
        super().__init__()
        self.state, self.kind = state, kind
        c = state.channels
        pooled = 2 * c if state.prefix and kind != "norm" else c
        if kind == "norm":
            self.norm = nn.LayerNorm(c)
            self.hidden = nn.Linear(c, c + 2)
            self.classify: nn.Module = nn.Linear(c + 2, CLASSES)
        elif kind == "flatten":
            self.classify = nn.Linear(c * state.tokens, CLASSES)
        elif kind == "conv" and state.space == "image":
            self.classify = nn.Sequential(pointwise(c, CLASSES), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        elif kind != "features":
            self.classify = nn.Linear(pooled, CLASSES)

    def pool(self, x: Tensor) -> Tensor:
        if self.state.space == "image":
            return F.adaptive_avg_pool2d(x, 1).flatten(1)
        mean = x[:, self.state.prefix :].mean(dim=1)
        if not self.state.prefix:
            return mean
        return x[:, 0] + mean if self.kind == "norm" else torch.cat([x[:, 0], mean], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "features":
            return x
        if self.kind == "norm":
            return self.classify(torch.tanh(self.hidden(self.norm(self.pool(x)))))
        if self.kind == "flatten":
            return self.classify(x.flatten(1))
        if self.kind == "conv" and self.state.space == "image":
            return self.classify(x)
        return self.classify(self.pool(x))


class Network(nn.Module):
    """Stem, blocks with a change between image and tokens where the next block needs one, head."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.stem = Stem(recipe)
        self.blocks = nn.ModuleList()
        state = self.stem.out
        for one in recipe.blocks:
            kind = BLOCKS[one.kind]
            if kind.space != state.space:
                state = self.append(ToTokens(state) if kind.space == "tokens" else ToImage(state))
            state = self.append(kind.make(state, **dict(one.options)))
        self.head = Head(state, recipe.head)

    def append(self, layer: Block) -> State:
        self.blocks.append(layer)
        return layer.out

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.blocks:
            x = layer(x)
        return self.head(x)


def randomise(model: nn.Module, seed: int) -> None:
    """Draws every parameter and batch-norm statistic in place, by its name and number of dimensions.

    Weights of two or more dimensions: normal with the variance 1.4 / fan_in that keeps activations near 1 between the
    gain of linear and of ReLU networks; biases: 0.2 * normal; embeddings, tokens and tables: 0.5 * normal; scales
    (norm weights, layer scales, PReLU slopes): uniform in 0.5..1.5, a quarter of them negative; running means:
    0.3 * normal; running variances: uniform in 0.5..1.5. Raises ValueError for a name that fits none of these.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            normal = torch.randn(parameter.shape, generator=generator)
            uniform = torch.rand(parameter.shape, generator=generator)
            sign = torch.where(torch.rand(parameter.shape, generator=generator) < 0.25, -1.0, 1.0)
            leaf = name.rpartition(".")[2]
            if leaf.startswith("bias"):
                parameter.copy_(0.2 * normal)
            elif leaf.startswith("weight") and parameter.ndim >= 2:
                parameter.copy_(normal * (1.4 / parameter[0].numel()) ** 0.5)
            elif leaf in ("embed", "token", "table"):
                parameter.copy_(0.5 * normal)
            elif leaf in ("weight", "scale", "gain", "v", "temperature"):
                parameter.copy_((0.5 + uniform) * sign)
            else:
                raise ValueError(f"parameter {name!r} {tuple(parameter.shape)}: no rule; name it as randomise expects")
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


# Strategies


@st.composite
def steps(draw: st.DrawFn, kinds: Sequence[str] | None = None) -> Step:
    """One block of any kind, or of the given ones."""
    kind = draw(st.sampled_from(tuple(kinds or KINDS)))
    return step(kind, **{name: draw(st.sampled_from(choices)) for name, choices in BLOCKS[kind].options.items()})


def networks(
    max_blocks: int = 6, kinds: Sequence[str] | None = None, heads: Sequence[str] = HEADS
) -> st.SearchStrategy[Recipe]:
    """Recipes of at most `max_blocks` blocks; shrinks to fewer, simpler blocks on an 8 x 8 image."""
    side = st.sampled_from((8, 9, 10, 11, 12))
    return st.builds(
        Recipe,
        blocks=st.lists(steps(kinds), max_size=max_blocks).map(tuple),
        height=side,
        width=side,
        channels=st.sampled_from((8, 4, 12, 16)),
        stem=st.sampled_from(STEMS),
        head=st.sampled_from(tuple(heads)),
        seed=st.integers(0, 2**16),
    )


# Minimal networks by name


def smallest_recipes() -> dict[str, Recipe]:
    """Per kind one recipe of that block alone, "conv", and one for each other choice, "conv-stride=2"; per head one
    for images and one for tokens; and the few traps that need two blocks."""
    found: dict[str, Recipe] = {}
    for name, kind in BLOCKS.items():
        found[name] = Recipe((step(name),))
        for option, choices in kind.options.items():
            for value in choices[1:]:
                found[f"{name}-{option}={value}"] = Recipe((step(name, **{option: value}),))
    for head in HEADS:
        found[f"head={head}"] = Recipe((step("conv"),), head=head)
        found[f"tokens-head={head}"] = Recipe((step("linear"),), head=head)
    found["class-token-head"] = Recipe((step("class_token", position=True), step("attention")), head="norm")
    found["class-token-dropped"] = Recipe((step("class_token"), step("linear"), step("conv")))
    found["class-token-relative"] = Recipe((step("class_token"), step("relative_attention")))
    found["zero-pad-after-zero-pad"] = Recipe((step("residual", shortcut="zero_pad"),) * 2, height=12, width=10)
    found["split-of-concat"] = Recipe((step("dense", growth="3 5"), step("split"), step("gated_conv", how="chunk")))
    found["grouped-of-shuffled"] = Recipe((step("shuffle"), step("conv", groups=4), step("squeeze_excite")))
    found["tokens-and-back"] = Recipe((step("conv"), step("attention"), step("depthwise", multiplier=2), step("mlp")))
    found["odd-sizes"] = Recipe((step("window_attention", shift=1), step("patch_merging")), height=11, width=9)
    found["gated-attention-features"] = Recipe((step("grouped_attention"), step("gated_mlp")), head="features")
    return found


SMALLEST_RECIPES: dict[str, Recipe] = smallest_recipes()
SMALLEST: dict[str, Callable[[], nn.Module]] = {name: recipe.build for name, recipe in SMALLEST_RECIPES.items()}


def example(name: str, batch: int = 2) -> Tensor:
    """Images for the network `SMALLEST[name]()`."""
    return SMALLEST_RECIPES[name].example(batch)
