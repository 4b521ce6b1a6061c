"""Reports without a model, and their pages in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sbs_fx.plan import Cost
from sbs_fx.plan.cost import LayerCost
from sbs_fx.report import GroupRow, LayerRow, PinRow, Report
from sbs_fx.report.data import LimitRow, StageRow, StepRow, TensorRow, Warned
from tests.report.browser import Browser, chromium

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\"'&<!--"
WITH_BROWSER = pytest.mark.skipif(chromium() is None, reason="no chromium, chromium-browser or google-chrome is here")


def layer(i: int, bits: int) -> LayerRow:
    return LayerRow(
        name=f"blocks.{i}.conv (conv2d_{i})",
        kind="conv",
        macs=1000 * (i + 1),
        bops=1000 * (i + 1) * bits * bits,
        weight_bits=bits,
        activation_bits=bits,
        params=64,
        channels=32 - i % 16,
        channels_before=32,
        node=f"conv2d_{i}",
        stored_bits=64 * bits,
        macs_before=1000 * (i + 1),
        bops_before=1024 * 1000 * (i + 1),
    )


def compressed(count: int, name: str = "blocks.0.conv.weight:0") -> Report:
    """A report on `count` residual blocks of four steps each, in several bitwidths, without a model."""
    widths = [(2, 4, 8, 32)[i % 4] for i in range(count)]
    layers = [layer(i, bits) for i, bits in enumerate(widths)]
    steps = [StepRow(name="x", operator="input", shape=(0, 3, 8, 8), pinned=("model input",))]
    for i in range(count):
        first = len(steps)
        where = {"module": f"blocks.{i}", "source": "net.py:7", "shape": (0, 32, 8, 8), "groups": (name,)}
        steps += [
            StepRow(
                name=f"conv2d_{i}", operator="conv2d", reads=(first - 1,), **{**where, "module": f"blocks.{i}.conv"}
            ),
            StepRow(name=f"norm_{i}", operator="batch_norm", reads=(first,), **{**where, "module": f"blocks.{i}.norm"}),
            StepRow(name=f"relu_{i}", operator="relu", reads=(first + 1,), **where),
            StepRow(name=f"add_{i}", operator="add", reads=(first + 2, first - 1), **{**where, "module": ""}),
        ]
    tensors = [
        TensorRow(
            name="x" if i == 0 else f"add_{i - 1}",
            reader=f"conv2d_{i}",
            bits=bits,
            low=-1.0,
            high=2.5,
            step=0.1,
            sqnr=6.0 * bits if bits < 32 else None,
            clipped=0.001,
            spread=20.0,
            dead=0,
            channels=32,
        )
        for i, bits in enumerate(widths)
    ]
    costs = [
        LayerCost(
            **row.model_dump(
                include={"name", "kind", "macs", "bops", "weight_bits", "activation_bits", "params", "stored_bits"}
            )
        )
        for row in layers
    ]
    floats = [
        c.model_copy(update={"bops": 1024 * c.macs, "stored_bits": 32 * c.params, "weight_bits": 32.0}) for c in costs
    ]
    return Report(
        method="two_stage",
        cost=Cost(layers=tuple(costs), reference=Cost(layers=tuple(floats))),
        layers=tuple(sorted(layers, key=lambda row: -row.bops)),
        groups=(GroupRow(name=name, size=32, kept=24, members=3 * count, primary=True),),
        pins=(PinRow(cause="model input", channels=3, sides=("blocks.0.conv: in",)),),
        unknown_operators={},
        prunable_share=1.0,
        accuracy=(91.0, 90.25),
        model="Net",
        limits=(LimitRow(measure="bops", limit=0.05, reached=0.049), LimitRow(measure="size", limit=0.1, reached=0.2)),
        steps=tuple(steps),
        tensors=tuple(tensors),
        stages=(
            StageRow(name="quantised", divergence=0.2, same=0.9),
            StageRow(name="static", divergence=0.1, same=0.95),
        ),
        warnings=(Warned(rule="noise", where="add_1", text="leave it in float"),),
        seconds={"search": 1.5},
        versions={"python": "3.11"},
        command="sbs-fx compress net",
    )


def shown(browser: Browser, directory: Path, text: str, **options: Any) -> float:
    path = directory / "report.html"
    path.write_text(text)
    spent = browser.open(path, **options)
    assert browser.errors == []
    assert browser.requests == [path.resolve().as_uri()]
    return spent


def panels(browser: Browser) -> set[str]:
    return set(browser.value("[...document.querySelectorAll('section')].map((panel) => panel.id)"))
