"""`reconstruct_without_data`: layers refitted on pictures that nobody took.

In: a gated graph (slim, bits fixed, calibrated) and the float graph it came from, whose batch norms hold statistics of
real images. Out: the gated graph, its layers refitted, in place. Batch norms say what channels look like on real
images, made-up pictures how neighbouring places and channels go together: while layers are refitted, both networks
normalise with the pictures' own statistics, so that what each layer reads has the means and deviations it has in use
(as arXiv 1906.04721 has ranges); afterwards the statistics are the trained ones, moved by what rounding moves on the
pictures (`NormShift`).

Ours. A mobile network on 200 ImageNet pictures (float 79.5 %), no data, with what is here and without it:

    uniform W8A8   78.5 %, KL 0.009   76.0 %, 0.014      `opq` at W4A8's bit operations   75.0 %, 0.16   73.5 %, 0.43
    uniform W4A8   76.5 %, KL 0.23    18.0 %, 3.9        `opq` at W4A4's                  58.0 %, 0.98   51.0 %, 1.24

Uniform W4A8 with the damping of real pictures: 63.0 %.
Holds: a block that did not come nearer to the float one on the pictures stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.calibration.norm_shift import NormShift, statistics_of, write
from sbs_fx.calibration.reconstruction import Reconstructed, Reconstruction, reconstruct
from sbs_fx.calibration.synthetic import bounds_of, pictures
from sbs_fx.passes import ChannelGroups
from sbs_fx.passes.channels.slim import Slices
from sbs_fx.passes.folding import has_statistics
from sbs_fx.passes.graph import attribute, copy_graph

_DAMPING = 1.0  # made-up pictures tell little of how channels go together: no refit is to go far from the weight
_LEAST_VARIANCE = 1e-6  # of the trained one; a channel with less tells nothing


@torch.no_grad()
def reconstruct_without_data(
    gated: fx.GraphModule,
    teacher: fx.GraphModule,
    *,
    inputs: Sequence[Tensor],
    groups: ChannelGroups,
    kept: Mapping[str, Sequence[int]],
    settings: Reconstruction,
    step: Callable[[int, int], None] | None = None,
) -> list[Reconstructed]:
    """Reconstruct in place, with the arguments of `reconstruct`; a network without batch norms is left as it is."""
    names = [name for pair in statistics_of(gated) for name in pair]
    if not names:
        return []
    images = pictures(inputs, bounds_of(teacher))
    settled = copy_graph(teacher)
    _Settled(settled).run(*images)
    if not all(bool(torch.isfinite(attribute(settled, name)).all()) for name in names):
        return []
    index = Slices(groups, kept)
    before = {name: attribute(gated, name).clone() for name in names}
    trained, own = ({name: index.tensor(graph, name) for name in names} for graph in (teacher, settled))
    write(gated, trained)
    shift = NormShift(gated, [images], own)
    write(gated, own)
    settings = settings.model_copy(update={"damping": max(_DAMPING, settings.damping)})
    options: dict[str, Any] = {"inputs": inputs, "groups": groups, "kept": kept, "settings": settings, "step": step}
    rows = reconstruct(gated, settled, [images], **options)
    if any(row.after < row.before for row in rows):
        write(gated, trained)
        shift.apply()
    else:
        write(gated, before)
    return rows


class _Settled(fx.Interpreter):
    """Runs a float graph on one batch, whose statistics its batch norms take over."""

    def run_node(self, n: fx.Node) -> Any:
        if has_statistics(n):
            x, mean, variance = (self.env[n.args[i]] for i in (0, 3, 4))  # type: ignore[index]
            dims = [dim for dim in range(x.ndim) if dim != 1]
            new = x.var(dims, unbiased=False)
            usable = new > _LEAST_VARIANCE * variance
            mean.copy_(torch.where(usable, x.mean(dims), mean))
            variance.copy_(torch.where(usable, new, variance))
        return super().run_node(n)
