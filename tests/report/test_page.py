"""The page of a report needs nothing but itself, shows what strangers wrote as text, stays small and quick, and works.

What a browser does is tested in a headless Chromium, where there is one.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sbs_fx.report import Report
from sbs_fx.report.card import card
from sbs_fx.report.node_data import node_data
from sbs_fx.report.page import Extras, curves, page
from tests.report.browser import Browser
from tests.report.pages import HOSTILE, WITH_BROWSER, compressed, layer, panels, shown


def floating() -> Report:
    """What `inspect` gives: nothing was planned or measured."""
    report = compressed(3)
    assert report.cost.reference is not None
    empty: dict[str, Any] = dict.fromkeys(("limits", "tensors", "stages", "warnings"), ())
    plain = {
        "method": None,
        "accuracy": None,
        "cost": report.cost.reference,
        "command": "",
        "seconds": {},
        "versions": {},
    }
    return report.model_copy(update={**empty, **plain})


def data_of(text: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    return json.loads(found[1])


# -- text --------------------------------------------------------------------------------------------------------------


def test_the_page_refers_to_nothing() -> None:
    text = page(compressed(4))
    assert "http://" not in text
    assert "https://" not in text
    assert not re.findall(r"<link|<img|@import|url\(|\bsrc\s*=|importScripts|fetch\(", text)
    assert set(re.findall(r'href="([^"]*)"', text)) == set()
    assert "default-src 'none'" in text
    assert "{{" not in text.replace("${{", "")


def test_hostile_names_are_data() -> None:
    report = compressed(2, HOSTILE).model_copy(update={"model": HOSTILE, "notes": (HOSTILE,)})
    text = page(report, Extras(run={"model": HOSTILE}, labels=(HOSTILE, "")))
    assert text.count("<script") == 2
    assert text.count("</script>") == 2
    assert "<img" not in text
    assert "<!--" not in text
    assert data_of(text)["reports"][0]["notes"] == [HOSTILE]


def test_what_is_no_number_is_none() -> None:
    report = compressed(2)
    rows = (report.tensors[0].model_copy(update={"spread": float("inf")}), report.tensors[1])
    step = {"stage": "search", "step": 1, "steps": 1, "epoch": 0, "epochs": 1, "rate": 0.1, "seconds": 1.0}
    metrics = [{**step, "loss": float("nan"), "accuracy": None, "validation": None, "measures": {}}]
    data = data_of(page(report.model_copy(update={"tensors": rows}), Extras(metrics=metrics)))
    assert data["reports"][0]["tensors"][0]["spread"] is None
    assert data["metrics"][0]["loss"] is None


def test_curves_are_thinned_to_means() -> None:
    step = {"stage": "search", "steps": 1000, "epoch": 0, "epochs": 1, "rate": 0.1, "seconds": 1.0}
    rows = [
        {**step, "step": i + 1, "loss": float(i), "accuracy": None, "validation": 50.0 if i == 500 else None}
        | {"measures": {"bops": 0.1, "weight_bits": {8: 1}, "budget": {"bops": 0.05}}}
        for i in range(1000)
    ]
    points = curves(rows)
    assert len(points) <= 400
    assert points[-1]["step"] == 1000
    assert [p["validation"] for p in points if p["validation"]] == [50.0]
    assert points[0]["loss"] == sum(range(points[0]["step"])) / points[0]["step"]
    assert points[0]["measures"] == {"bops": 0.1, "budget": {"bops": 0.05}}


def test_a_thousand_layers_are_small() -> None:
    text = page(compressed(1000))
    assert len(data_of(text)["reports"][0]["layers"]) == 1000
    assert len(text.encode()) < 3e6


def test_a_page_is_saved_with_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": 1, "model": "a net", "method": "two_stage"}')
    (tmp_path / "sensitivity.json").write_text(
        '{"rows": [{"kind": "weight", "name": "a", "choices": [2], "losses": [0.5]}]}'
    )
    compressed(2).save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<title>a net: report</title>" in text
    assert data_of(text)["sensitivity"][0]["losses"] == [0.5]
    compressed(2).save(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == text, "equal reports give equal pages"


def test_the_card_has_metadata_that_a_hub_reads() -> None:
    report = compressed(2).model_copy(update={"data": HOSTILE, "weights": "a | b"})
    text = card(report, {"model": HOSTILE})
    assert text.startswith("---\nlibrary_name: sbs-fx\n")
    assert "<script" not in text.partition("\n---\n")[2].replace("\\<", "")
    assert "| accuracy % | 91.00 | 90.25 | -0.75 |" in text
    hub = pytest.importorskip("huggingface_hub", reason="reads the metadata as a hub does")
    data = hub.ModelCard(text).data
    assert data.library_name == "sbs-fx"
    (result,) = data.eval_results
    assert (result.metric_value, result.dataset_name) == (90.25, HOSTILE)
    assert "model-index" not in card(floating(), {})


def test_node_data_names_nodes_of_the_graph() -> None:
    report = compressed(4)
    values = {name: json.loads(text) for name, text in node_data(report).items()}
    assert values.keys() == {"bits", "kept", "sqnr"}
    assert values["bits"]["results"]["conv2d_2"] == {"value": 8.0}
    assert values["kept"]["results"]["conv2d_1"] == {"value": 31 / 32}
    assert [stop["stop"] for stop in values["bits"]["gradient"]] == [0, 1]
    names = {step.name for step in report.steps}
    assert all(part["results"].keys() <= names for part in values.values())
    assert node_data(floating()).keys() == {"bits", "kept"}


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def first_layer(browser: Browser) -> str:
    return str(browser.value("document.querySelector('#layers tbody td').textContent"))


@WITH_BROWSER
def test_panels_that_have_nothing_to_say_are_left_out(browser: Browser, tmp_path: Path) -> None:
    shown(browser, tmp_path, page(floating()))
    assert panels(browser) == {"summary", "strip", "layers", "graph", "groups"}
    shown(browser, tmp_path, page(compressed(8)))
    assert panels(browser) == {
        *("summary", "warnings", "strip", "layers", "graph", "stages", "precision", "groups", "made"),
    }
    head = browser.value("document.getElementById('head').innerText")
    assert "4.90 % reached, met" in head
    assert "20.00 % reached, not met" in head


@WITH_BROWSER
def test_hostile_names_are_shown_as_text(browser: Browser, tmp_path: Path) -> None:
    report = compressed(2, HOSTILE).model_copy(update={"model": HOSTILE, "notes": (HOSTILE,), "command": HOSTILE})
    shown(browser, tmp_path, page(report))
    browser.value("document.querySelector('.line').click()")
    assert browser.value("document.querySelector('h1').textContent") == HOSTILE
    assert browser.value("window.hacked") is None
    assert browser.value("document.querySelectorAll('img').length") == 0
    assert browser.errors == []


@WITH_BROWSER
def test_tables_sort_filter_and_are_taken_away(browser: Browser, tmp_path: Path) -> None:
    shown(browser, tmp_path, page(compressed(200)))
    assert first_layer(browser).startswith("blocks.0.conv")
    click = "[...document.querySelectorAll('#layers th button')].find((b) => b.textContent === 'BOPs').click()"
    browser.value(click)
    assert first_layer(browser).startswith("blocks.199.conv")
    assert browser.value("document.querySelectorAll('#layers [aria-sort=descending]').length") == 1
    browser.value(click)
    assert first_layer(browser).startswith("blocks.0.conv")
    assert browser.value("document.querySelectorAll('#layers tbody tr').length") == 100
    browser.value("document.querySelector('#layers .more').click()")
    assert browser.value("document.querySelectorAll('#layers tbody tr').length") == 200
    browser.value("document.querySelector('#layers input').focus()")
    browser.call("Input.insertText", text="blocks.17")
    assert browser.value("document.querySelectorAll('#layers tbody tr').length") == 11
    browser.value("URL.createObjectURL = (blob) => ((window.taken = blob), 'blob:none')")
    browser.value("[...document.querySelectorAll('#layers .tools button')].at(-1).click()")
    lines = browser.value("window.taken.text()").splitlines()
    assert len(lines) == 12
    assert lines[0].startswith("layer,kind,w (bits),a (bits),channels,of,MACs,BOPs,share (%)")
    assert lines[1].startswith("blocks.17.conv (conv2d_17),conv,4,4,31,32,18000,")


@WITH_BROWSER
def test_the_graph_folds_and_tells(browser: Browser, tmp_path: Path) -> None:
    shown(browser, tmp_path, page(compressed(1000)))
    lines = "document.querySelectorAll('.space .line').length"
    assert browser.value(lines) == 3, "the input, the folded blocks, and the addition after them"
    button = "[...document.querySelectorAll('#graph button')].find((b) => b.textContent === '{}').click()"
    begin = time.perf_counter()
    browser.value(button.format("expand all"))
    assert time.perf_counter() - begin < 10, "a few hundred milliseconds on an idle machine"
    assert browser.value("document.querySelector('.space').clientHeight") > 26 * 5000
    assert browser.value(lines) < 100, "rows in view alone are drawn"
    assert browser.value("document.querySelectorAll('.arcs .skip').length") > 3
    browser.value(button.format("collapse all"))
    assert browser.value(lines) == 3
    browser.value("[...document.querySelectorAll('#layers tbody tr')][50].click()")
    details = browser.value("document.querySelector('.details').innerText")
    for expected in ("conv2d_50", "blocks.50.conv", "net.py:7", "N × 32 × 8 × 8", "blocks.0.conv.weight:0", "48.0 dB"):
        assert expected in details
    assert browser.value("document.querySelector('.line.selected .label').textContent") == "conv"
    browser.value("document.querySelector('#groups tbody tr').click()")
    assert browser.value("document.querySelectorAll('.line.member').length") > 3
    assert "in 4" in browser.value("document.querySelector('#graph .count').textContent")
    assert browser.errors == []


@WITH_BROWSER
def test_keys_move_and_themes_change(browser: Browser, tmp_path: Path) -> None:
    shown(browser, tmp_path, page(compressed(8)), theme="dark")
    browser.value("document.querySelector('.strip-scroll').focus()")
    browser.press("ArrowRight")
    assert browser.value("document.querySelector('.says b').textContent") == "blocks.1.conv (conv2d_1)"
    browser.press("Enter")
    assert "conv2d_1" in browser.value("document.querySelector('.details h3').textContent")
    browser.value("document.querySelector('.graph-view').focus()")
    browser.press("ArrowDown")
    assert "norm_1" in browser.value("document.querySelector('.details h3').textContent")
    browser.press("ArrowLeft")
    assert browser.value("document.querySelector('.line.selected .label').textContent") == "1"
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = browser.value(colour)
    browser.value("document.getElementById('theme').click()")
    light = browser.value(colour)
    assert light != dark
    browser.value("document.getElementById('theme').click()")
    assert browser.value(colour) == dark
    browser.value("(document.querySelector('#strip select').value = 'sqnr')")
    browser.value("document.querySelector('#strip select').dispatchEvent(new Event('change'))")
    assert "dB" in browser.value("document.querySelector('#strip .legend').textContent")
    assert browser.errors == []


@WITH_BROWSER
def test_training_losses_and_a_difference_are_drawn(browser: Browser, tmp_path: Path) -> None:
    step = {"stage": "search", "steps": 9, "epoch": 0, "epochs": 1, "rate": 0.1, "seconds": 1.0, "validation": None}
    more = {"measures": {"bops": 0.06, "budget": {"bops": 0.05}}}
    metrics = [{**step, **more, "step": i, "loss": 2.0 - i / 9, "accuracy": 10.0 * i} for i in range(1, 10)]
    rows = [{"kind": "weight", "name": "a", "choices": [2, 32], "losses": [0.5, 0.0]}]
    rows.append(
        {"kind": "channels", "name": "g", "choices": list(range(1, 33)), "losses": [1 / n for n in range(1, 33)]}
    )
    shown(browser, tmp_path, page(compressed(8), Extras({"model": "net"}, {"rows": rows}, metrics)))
    assert {"training", "losses"} <= panels(browser)
    assert browser.value("document.querySelectorAll('#training figure').length") == 4
    assert browser.value("document.querySelectorAll('#losses table').length") == 2
    other = compressed(8).model_copy(update={"layers": tuple(layer(i, 4) for i in range(8))})
    shown(browser, tmp_path, page(compressed(8), Extras(against=other, labels=("old", "new"))))
    assert panels(browser) == {"summary", "strip", "layers", "graph", "stages"}
    rows = "[...document.querySelectorAll('#graph .line .bits')].map((cell) => cell.textContent).join(' ')"
    assert "4" in browser.value(rows), "the second one's bits"
    assert "32" not in browser.value(rows)
    browser.value("document.querySelector('#graph .pick button').click()")
    assert browser.value("document.querySelectorAll('#graph [aria-pressed=true]').length") == 1
    assert "float" in browser.value(rows) or "2/2" in browser.value(rows), "and the first one's"
    assert browser.value("document.querySelector('h1').textContent") == "old and new"
    assert browser.value("document.querySelectorAll('.stages').length") == 2
    assert "+300.0" in browser.value("document.querySelector('#layers tbody tr').textContent"), "2/2 to 4/4 bits"


@WITH_BROWSER
def test_a_thousand_layers_open_quickly_and_narrowly(browser: Browser, tmp_path: Path) -> None:
    """Two seconds are what a person should wait at most; ten allow for a machine that does other things too."""
    text = page(compressed(1000))
    spent = shown(browser, tmp_path, text)
    print(f"1,000 layers, 4,001 steps, {len(text) / 1e6:.2f} MB: open after {spent:.2f} s")  # noqa: T201
    assert spent < 10
    shown(browser, tmp_path, text, width=390)
    assert browser.value("document.documentElement.scrollWidth") <= 390
