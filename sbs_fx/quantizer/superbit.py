"""The super-bit quantiser: one float tensor, every bitwidth, decisions that gradients can move.

In: a weight or an activation. Out: the same tensor on the grid of the bitwidth that is fixed or that the gates choose.
Source: Single-path Bit Sharing (arXiv 2101.04935), its nested chain z_2 + g_4(eps_4 + g_8 eps_8).
Holds: every value is an integer level times `scale()`; open at float precision the very same tensor comes back; what is
kept for the backward pass is the input, the ranges and a few numbers per gate, and no tensor per candidate.

One *range* v serves all bitwidths: s_b = 2v/(2^b - 1) on a signed grid, whose outer levels are +-1, +-7, +-127 at 2, 4
and 8 bits with a half step to spare at either end, and s_b = v/(2^b - 1) on an unsigned one, with levels 0 to 3, 15,
255. An affine grid has the steps of the signed one and all 2^b levels, of which a share `below` lies under zero; zero
is one of them. z_b is x rounded on the grid of b, whatever the coarser candidates are. Where each bitwidth divides the
next, as in 2, 4, 8, the step sizes nest (s_4 = s_2/5, s_8 = s_4/17) and that is the paper's z_2 plus rounded residuals,
ties apart; on an affine grid but for the place of zero, which each bitwidth rounds by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sbs_fx.plan.bits import BITS, FLOAT_BITS
from sbs_fx.plan.errors import InputError, PolicyError
from sbs_fx.quantizer.grid import Grid, Level, Sides, level

Bounds = tuple[Any, Any, Any]  # low, high, divisor: three numbers, or three tensors that broadcast over the input
SEARCHING = -1  # how a searching quantiser is written in a state dict
LEAST_RANGE = 2.0**-40  # reason: a channel of zeros has range 0; below this, a range acts as if it were this wide


def _encode(x: Tensor, scale: Tensor, low: Any, high: Any) -> Tensor:
    """clamp(round(x * (1/s)), low, high), as the static graph does it. A new tensor; what is in between is not kept
    (reason: on a CPU, fresh memory costs more than the arithmetic)."""
    code = (x * (1 / scale)).round_()
    if isinstance(high, Tensor):
        return torch.minimum(torch.maximum(code, low), high)
    return code.clamp_(low, high)


def _rounded(x: Tensor, width: Tensor, low: Any, high: Any, divisor: Any) -> Tensor:
    """x on one grid, a new tensor."""
    scale = width / divisor
    return _encode(x, scale, low, high).mul_(scale)


def _chain(x: Tensor, width: Tensor, levels: Sequence[Level]) -> Iterator[Tensor]:
    """z_b1, z_b2, ...: x on the grid of each bitwidth, one at a time."""
    for each in levels:
        yield _rounded(x, width, *each)


def _chosen(opened: Tensor, levels: Sequence[Level]) -> Bounds:
    """Low, high and divisor of the last level that every gate before it lets through; each of shape (), or a number
    where gates can be looked at for nothing (reason: an eager step is 3 to 7 % faster with bounds that are numbers).
    A gate behind the last level leads to float and does not count."""
    opened = opened[: len(levels) - 1]
    if opened.device.type == "cpu" and not torch.compiler.is_compiling():
        return levels[[*opened.tolist(), False].index(False)]
    chosen: list[Any] = [float(number) for number in levels[0]]
    passed: Any = True
    for gate, level_ in zip(opened, levels[1:], strict=True):
        passed = gate & passed
        chosen = [torch.where(passed, float(new), old) for new, old in zip(level_, chosen, strict=True)]
    return tuple(torch.as_tensor(number) for number in chosen)  # type: ignore[return-value]


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _ranges(x: Tensor, range_: Tensor) -> tuple[Tensor, Tensor]:
    """Input and range in the precision that rounding is done in."""
    return x.to(_precision(x)), range_.to(_precision(x)).clamp_min(LEAST_RANGE)


def _straight_through(
    grad: Tensor, y: Tensor, x: Tensor, width: Tensor, inside: Tensor, ctx: Any, unrounded: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to input and range; y is used up. Rounding counts as the identity, so y = v * (clip(x/v) + constant):
    to x, 1 inside the range; to v, (y - x)/v inside and y/v outside, that of learned step sizes (arXiv 1902.08153).

    `unrounded`, of shape (), is the share of the output that is x itself, of gradient 1 to x and 0 to v; y is then the
    rest of the output.
    """
    grad_x = grad_range = None
    if unrounded is not None:
        inside = inside * (1 - unrounded)
    if ctx.needs_input_grad[0]:
        grad_x = (grad * (inside if unrounded is None else inside + unrounded)).to(ctx.input_dtype)
    if ctx.needs_input_grad[1]:
        moved = y.sub_(x * inside).div_(width).mul_(grad)
        grad_range = moved.sum_to_size(width.shape).to(ctx.range_dtype)
    return grad_x, grad_range


def _inside(x: Tensor, width: Tensor, sides: Sides) -> Tensor:
    """1 where x is within its range, else 0, in x's dtype: products with booleans are slow."""
    return ((x <= width * sides[1]) & (x >= width * sides[0])).to(x.dtype)


class _Fixed(torch.autograd.Function):
    """Plain quantiser of given bounds, numbers or tensors; keeps its input and its range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, range_: Tensor, low: Any, high: Any, divisor: Any, sides: Sides) -> Tensor:
        bounds = (low, high, divisor)
        ctx.save_for_backward(x, range_, *(b for b in bounds if isinstance(b, Tensor)))
        ctx.bounds = None if isinstance(high, Tensor) else bounds
        ctx.sides = sides
        ctx.input_dtype, ctx.range_dtype = x.dtype, range_.dtype
        value, width = _ranges(x, range_)
        return _rounded(value, width, *bounds).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved_x, range_, *tensors = ctx.saved_tensors
        low, high, divisor = ctx.bounds or tensors
        x, width = _ranges(saved_x, range_)
        y = _rounded(x, width, low, high, divisor)
        inside = _inside(x, width, ctx.sides)
        if isinstance(high, Tensor) and high.ndim:
            inside = inside * (high > 0)  # a pruned channel is zero whatever its input
        return *_straight_through(grad.to(x.dtype), y, x, width, inside, ctx), None, None, None, None


class _Search(torch.autograd.Function):
    """The whole chain with its gates. Keeps the input, the ranges and one norm and one threshold a gate.

    There are as many gates as levels if the last gate leads to float, else one less.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, range_: Tensor, threshold: Tensor, levels: Sequence[Level], sides: Sides, shared: bool
    ) -> Any:
        value, width = _ranges(x, range_)
        clipped = value.clamp(width * sides[0], width * sides[1])
        norms = threshold.new_empty(threshold.shape)
        for index, z in enumerate(_chain(value, width, levels[: len(norms)])):
            steps = z.sub_(clipped).mul_(levels[index].divisor / width)
            norms[index] = _mean(steps.square_(), shared).sqrt().to(norms.dtype)
        opened = norms > threshold
        y = _rounded(value, width, *_chosen(opened, levels))
        if len(opened) == len(levels):
            y = torch.where(opened.all(), value, y)
        ctx.save_for_backward(x, range_, threshold, norms)
        ctx.levels, ctx.sides = levels, sides
        ctx.input_dtype, ctx.range_dtype = x.dtype, range_.dtype
        ctx.mark_non_differentiable(norms)
        return y.to(x.dtype), norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        saved_x, range_, threshold, norms = ctx.saved_tensors
        x, width = _ranges(saved_x, range_)
        grad = grad.to(x.dtype)
        opened = norms > threshold
        offsets = []  # <grad, eps_b>, one number a gate
        previous: Any = None
        for z in _chain(x, width, ctx.levels):
            if previous is not None:
                offsets.append(-previous.sub_(z).mul_(grad).sum())
            previous = z
        y, unrounded = _rounded(x, width, *_chosen(opened, ctx.levels)), None
        if len(opened) == len(ctx.levels):
            offsets.append((x - previous).mul_(grad).sum())
            unrounded = opened.all().to(x.dtype)
            y.mul_(1 - unrounded)
        grad_x, grad_range = _straight_through(grad, y, x, width, _inside(x, width, ctx.sides), ctx, unrounded)
        # dy/dg_j = (product of the gates before it) * (eps_j + g_{j+1}(eps_{j+1} + ...))
        gates = opened.to(x.dtype)
        grad_threshold = torch.zeros_like(threshold)
        after = torch.zeros((), dtype=x.dtype, device=x.device)
        slope = _slope(norms, threshold)
        for index in reversed(range(len(offsets))):
            after = offsets[index] + (gates[index + 1] * after if index + 1 < len(offsets) else 0)
            grad_threshold[index] = -slope[index] * gates[:index].prod() * after
        return grad_x, grad_range, grad_threshold, None, None, None


def _mean(x: Tensor, shared: bool) -> Tensor:
    """Of all elements; over all processes if the tensor is spread over them."""
    mean = x.mean()
    if shared:
        torch.distributed.all_reduce(mean)
        mean = mean / torch.distributed.get_world_size()
    return mean


def _slope(norms: Tensor, threshold: Tensor) -> Tensor:
    return torch.sigmoid(norms - threshold) * torch.sigmoid(threshold - norms)


def hard_gate(norms: Tensor, threshold: Tensor) -> Tensor:
    """1[norm > alpha] forward; backward the gradient of sigmoid(norm - alpha) to alpha alone (arXiv 2101.04935)."""
    soft = torch.sigmoid(norms.detach() - threshold)
    return (norms > threshold).to(soft.dtype) + (soft - soft.detach())


class SuperBitQuantizer(nn.Module):
    """Fake quantisation of one weight or activation at any of the candidate bitwidths.

    | state                 | set by                    | forward gives                                               |
    |-----------------------|---------------------------|-------------------------------------------------------------|
    | open, the first state | `fix(32)`                 | its input, the same object                                  |
    | fixed                 | `fix(4)`                  | clamp(round(x * (1/s)), low, high) * s                      |
    | fixed per channel     | `fix([0, 2, 8, 4])`       | the same, channel by channel; zeros where there are 0 bits  |
    | searching             | `search()`                | z_2 + g_4(eps_4 + g_8 eps_8), gates by their thresholds     |

    A gate is open if the root mean square of the residual z - z_b over the whole tensor, in steps of the coarser grid,
    is above its threshold; z is x cut off at the range. The paper names no norm and no start; this one grows neither
    with the tensor nor with the step nor with outliers (evenly spread residuals give 0.29 for every gate), and
    thresholds start at 0, so that all gates are open. Rounding is done in float32 (float64 for float64 input); the
    output has x's dtype. With 32 as last candidate, the last offset is x - z_b: all gates open, x passes as it is, with
    gradient 1 and none to the range.

    Args:
        channels: number of ranges, one per coordinate of `channel_dim`; None for one range per tensor.
        channel_dim: dimension that carries them.
        signed: levels on both sides of zero, else from zero up.
        affine: with signed, of a whole tensor: as many levels on either side as its ends ask for.
        candidates: what a search chooses from: some of 2, 3, 4, 5, 6, 8, ascending, and 32 as the last one or not.
            `fix` takes any of them all.

    Attributes:
        range: what x is clipped to, in units of x; shape () or (channels,); initially 1. Of an affine grid, half the
            distance of its ends.
        below: of an affine grid, the share that lies under zero; else None.
        threshold: of the gates, shape (len(candidates) - 1,).
        across_processes: each process sees a part of x, and gates are decided over all of it.
        frozen: while searching, decide by the norms of the last forward that was not frozen; thresholds get no gradient
            from the output, and a step costs what it costs at fixed bits.

    Raises:
        PolicyError: candidates or bits that are not such. InputError: an input with other channels.
    """

    norms: Tensor
    channel_bits: Tensor | None

    def __init__(
        self,
        *,
        channels: int | None = None,
        channel_dim: int = 0,
        signed: bool = True,
        affine: bool = False,
        candidates: Sequence[int] = (2, 4, 8),
    ) -> None:
        super().__init__()
        chosen = set(candidates)
        if list(candidates) != sorted(chosen) or not chosen & set(BITS) or not chosen <= {*BITS, FLOAT_BITS}:
            raise PolicyError(
                f"candidates {tuple(candidates)}; expected some of {BITS}, ascending, with or without {FLOAT_BITS} last"
            )
        self.channels, self.channel_dim, self.signed = channels, channel_dim, signed
        self.below: float | None = 0.5 if affine and signed else None
        self.candidates = tuple(candidates)
        self.range = nn.Parameter(torch.ones(() if channels is None else channels))
        self.threshold = nn.Parameter(torch.zeros(len(self.candidates) - 1))
        self.register_buffer("norms", torch.full((len(self.candidates) - 1,), torch.inf), persistent=False)
        self.register_buffer("channel_bits", None, persistent=False)
        self._bits: int | None = FLOAT_BITS
        self.across_processes = False
        self.frozen = False

    @property
    def options(self) -> dict[str, Any]:
        """To make another of the same kind."""
        kind = {"channels": self.channels, "channel_dim": self.channel_dim, "signed": self.signed}
        return {**kind, "affine": self.below is not None, "candidates": self.candidates}

    @property
    def bits(self) -> int | Tensor | None:
        """32 if open, a bitwidth or a tensor (channels,) of them if fixed, None if searching."""
        return self._bits if self.channel_bits is None else self.channel_bits

    @property
    def is_float(self) -> bool:
        """Whether values pass as they are."""
        return self.channel_bits is None and self._bits == FLOAT_BITS

    def fix(self, bits: int | Sequence[int] | Tensor) -> None:
        """Fix the gates at one bitwidth (32 opens them at float precision), or at one per channel (0 prunes it)."""
        if isinstance(bits, Tensor):
            bits = bits.tolist()
        if isinstance(bits, int):
            if bits not in (*BITS, FLOAT_BITS):
                raise PolicyError(f"cannot fix {bits} bits; expected one of {(*BITS, FLOAT_BITS)}")
            self._bits, self.channel_bits = bits, None
            return
        allowed = {0, *BITS}
        if self.channels is None or len(bits) != self.channels or not set(bits) <= allowed:
            raise PolicyError(f"cannot fix bits {list(bits)}; expected {self.channels} values of {sorted(allowed)}")
        self._bits, self.channel_bits = None, torch.tensor(bits, dtype=torch.int64, device=self.range.device)

    def search(self) -> None:
        """Let the thresholds decide from now on."""
        self._bits, self.channel_bits = None, None

    def gates(self) -> tuple[Tensor, ...]:
        """0 or 1 for every candidate after the first, from the norms of the last forward while searching."""
        return tuple((self.norms > self.threshold.detach()).to(self.threshold.dtype))

    def decided_bits(self) -> int:
        """The candidate that `gates` amounts to: a gate behind a closed one does not count."""
        closed = [index for index, gate in enumerate(self.gates()) if not gate]
        return self.candidates[closed[0] if closed else -1]

    def expected_bits(self) -> Tensor:
        """Bits as a scalar tensor for a cost, differentiable in the thresholds while searching: 2 + g_4(2 + 4 g_8) for
        candidates 2, 4, 8. A constant (the mean over channels) otherwise."""
        if self._bits is not None:
            return torch.full((), float(self._bits), dtype=self.range.dtype, device=self.range.device)
        if self.channel_bits is not None:
            return self.channel_bits.to(self.range.dtype).mean()
        gates = hard_gate(self.norms, self.threshold)
        more = torch.zeros((), dtype=gates.dtype, device=gates.device)
        for index in reversed(range(len(gates))):
            more = gates[index] * (self.candidates[index + 1] - self.candidates[index] + more)
        return self.candidates[0] + more

    def scale(self) -> Tensor:
        """Step size at the fixed bits, shape () or (channels,). A value is its code times this."""
        return self.range.detach().clamp_min(LEAST_RANGE) / self._bounds(self.range.dtype)[2]

    @torch.no_grad()
    def codes(self, x: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
        """Integer levels of x at the fixed bits, of x's shape; a few rows at a time, which takes little memory."""
        low, high, divisor = (self._along(bound, x) for bound in self._bounds(_precision(x)))
        value, width = _ranges(x, self._along(self.range, x))
        result, rows = torch.empty(x.shape, dtype=dtype, device=x.device), max(1, (1 << 18) // max(1, x[:1].numel()))
        whole = torch.broadcast_tensors(result, value, width / divisor, *map(torch.as_tensor, (low, high)))
        for piece, *arguments in zip(*(tensor.split(rows) for tensor in whole), strict=True):
            piece.copy_(_encode(*arguments))
        return result

    @torch.no_grad()
    def set_ends(self, low: float, high: float) -> None:
        """Of an affine grid: its outermost levels, low <= 0 <= high, as near as zero on the grid allows."""
        self.below = -low / (high - low)
        self.range.fill_((high - low) / 2)

    @property
    def grid(self) -> Grid:
        """Range and share below zero, to be put into a quantiser of the same kind with `use`."""
        return Grid(self.range.detach().clone(), self.below)

    @torch.no_grad()
    def use(self, grid: Grid) -> None:
        self.range.copy_(grid.range)
        self.below = grid.below

    def forward(self, x: Tensor) -> Tensor:
        """x on its grid, of x's shape and dtype; see the table above."""
        if self.is_float:
            return x
        range_ = self._along(self.range, x)
        if self.bits is None:
            levels = self._levels()
            if self.frozen:
                opened = self.norms > self.threshold.detach()
                y = _Fixed.apply(x, range_, *_chosen(opened, levels), self._sides())
                return torch.where(opened.all(), x, y) if len(opened) == len(levels) else y
            y, norms = _Search.apply(x, range_, self.threshold, levels, self._sides(), self.across_processes)
            self.norms.copy_(norms)
            return y
        bounds = tuple(self._along(bound, x) for bound in self._bounds(_precision(x)))
        return _Fixed.apply(x, range_, *bounds, self._sides())

    def _levels(self) -> tuple[Level, ...]:
        """The grids of the candidates below float."""
        return tuple(level(bits, self.signed, self.below) for bits in self.candidates if bits != FLOAT_BITS)

    def _bounds(self, dtype: torch.dtype) -> Bounds:
        """Low, high and divisor: numbers, or tensors (channels,) of this dtype if bits differ by channel."""
        if self.channel_bits is not None:
            table = [level(bits, self.signed) for bits in range(max(BITS) + 1)]
            chosen = torch.tensor(table, dtype=dtype, device=self.range.device)[self.channel_bits]
            return chosen[:, 0], chosen[:, 1], chosen[:, 2]
        if self._bits in (None, FLOAT_BITS):
            state = "searching" if self._bits is None else "open at float precision"
            raise PolicyError(f"a quantiser that is {state} has no scale; call fix with one of {BITS} first")
        return level(self._bits, self.signed, self.below)

    def _sides(self) -> Sides:
        return (-1.0 if self.signed else 0.0, 1.0) if self.below is None else (-2 * self.below, 2 - 2 * self.below)

    def _along(self, values: Any, x: Tensor) -> Any:
        """Per-channel values in the shape that broadcasts over x; anything else as it is."""
        if not isinstance(values, Tensor) or self.channels is None:
            return values
        if not -x.ndim <= self.channel_dim < x.ndim or x.shape[self.channel_dim] != self.channels:
            expected = f"{self.channels} channels in dimension {self.channel_dim}"
            raise InputError(f"input of shape {tuple(x.shape)} for a quantiser of {expected}")
        shape = [1] * x.ndim
        shape[self.channel_dim] = self.channels
        return values.view(shape)

    def get_extra_state(self) -> Tensor:
        """The bits, and the share of an affine grid below zero, as a tensor: a state dict is stored without pickle."""
        if self.channel_bits is not None:
            return self.channel_bits.clone()
        bits = SEARCHING if self._bits is None else self._bits
        return torch.tensor(bits) if self.below is None else torch.tensor([bits, self.below], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        if state.is_floating_point():
            self.below = float(state[1])
            state = state[0].to(torch.int64)
        self.search() if state.ndim == 0 and state == SEARCHING else self.fix(state)

    def extra_repr(self) -> str:
        bits = "searching" if self.bits is None else self._bits or "per channel"
        return f"channels={self.channels}, signed={self.signed}, candidates={self.candidates}, bits={bits}"
