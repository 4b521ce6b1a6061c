"""What a person may want to look at in a compressed model, each with what to do.

In: the rows of a report. Out: warnings, by rule and place. Holds: nothing is changed; equal reports warn alike.
"""

from __future__ import annotations

from collections.abc import Iterator

from sbs_fx.report.data import ReportData, Warned

_SPREAD = 1000.0  # between the channels of one tensor that share one range
_NOISY = 10.0  # dB
_CLIPPED = 0.01  # of a tensor's values
_MULTIPLE = 8  # channels that integer kernels take at a time
_EIGHT = 8


def warnings_of(report: ReportData) -> tuple[Warned, ...]:
    """All that the rules find: of tensors, of channel groups, of layers."""
    return (*_tensors(report), *_channels(report), *_layers(report))


def _tensors(report: ReportData) -> Iterator[Warned]:
    for row in report.tensors:
        if row.spread > _SPREAD:
            yield Warned(
                rule="channel ranges",
                where=row.name,
                text=f"channels range {row.spread:,.0f} to 1 within one tensor of {row.bits} bits, so that the small "
                f"ones are lost; leave it in float: Keep({row.reader!r}, activation_bits=32), --keep {row.reader}=8/32",
            )
        if row.bits >= _EIGHT and row.sqnr is not None and row.sqnr < _NOISY:
            yield Warned(
                rule="noise",
                where=row.name,
                text=f"rounding to {row.bits} bits leaves {row.sqnr:.1f} dB of signal over noise; leave it in "
                f"float: Keep({row.reader!r}, activation_bits=32), or --keep {row.reader}=8/32",
            )
        if row.clipped > _CLIPPED:
            yield Warned(
                rule="clipped",
                where=row.name,
                text=f"{row.clipped:.1%} of its values lie beyond the grid; try ranges='minmax', or more bits",
            )
        if row.dead:
            yield Warned(
                rule="dead channels",
                where=row.name,
                text=f"{row.dead} of {row.channels} channels were zero on every input that was looked at; they can be "
                "pruned (no prune=False, round_to=1)",
            )


def _channels(report: ReportData) -> Iterator[Warned]:
    for row in report.groups:
        if row.kept < row.size and row.kept % _MULTIPLE and row.size % _MULTIPLE == 0:
            yield Warned(
                rule="multiples",
                where=row.name,
                text=f"{row.kept} channels stay, no multiple of {_MULTIPLE}, which kernels compute as if they were "
                f"{-(-row.kept // _MULTIPLE) * _MULTIPLE}; round_to={_MULTIPLE} keeps those",
            )


def _layers(report: ReportData) -> Iterator[Warned]:
    weighted = [row for row in report.layers if row.channels is not None]
    places = {step.name: i for i, step in enumerate(report.steps)}
    last = max(weighted, key=lambda row: places.get(row.node, -1), default=None)
    if report.method is not None and last is not None and min(last.weight_bits, last.activation_bits) < _EIGHT:
        yield Warned(
            rule="head",
            where=last.name,
            text=f"the last layer has {last.weight_bits:g} bits of weights and {last.activation_bits:g} of input; 8 "
            "cost little there (constraints, or --keep)",
        )
    quantised = any(row.bops < row.bops_before for row in report.layers)
    for row in report.layers if quantised else ():
        if row.kind == "float" or max(row.weight_bits, row.activation_bits) > _EIGHT:
            yield Warned(
                rule="float island",
                where=row.name,
                text=f"computed in float: {row.bops / max(1, report.cost.bops):.1%} of the BOPs that are left",
            )
