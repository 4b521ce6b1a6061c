"""What does a search cost, beside plain training?

`python benchmarks/search_cost.py --out FILE` times a training step of the super-bit search against float training,
uniform quantisation-aware training (learned ranges, the same layers), one path a bitwidth and Bayesian Bits, and
measures the peak of memory of each. Two methods are timed in one process, in turns, and their ratio is taken turn by
turn; memory is measured in a process for each method. On a CPU always, on a GPU when there is one; eager for all
models, compiled (as `Training(compiled=True)` trains) for the first of them, unless --eager or --compiled says which.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _coverage_workers import Failed, run_tasks
from _search_cost_steps import METHODS, MODELS, Setting, measure_memory, time_pair

PAIRS = (
    ("sbs", "float"),
    ("sbs", "uniform"),
    ("multi_path", "sbs"),
    ("multi_path", "uniform"),
    ("bayesian_bits", "sbs"),
)
RESULTS = Path(__file__).parent / "results" / "search_cost.json"
# reason: glibc then keeps freed memory, as allocators made for tensors do; where it gives it back, an eager step takes
# two to three times as long, more for methods with more tensors
_KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}
# reason: and then gives a tensor's memory back when it is freed, so that the resident set is what is in use
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def main() -> int:
    options = _options()
    settings = _settings(options)
    rows: list[dict[str, Any]] = []
    for row in _rows(settings, options):
        rows.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "precision"}), flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"made_on": _machine(options), "rows": rows}, indent=1) + "\n")
    print(f"\n{_table(rows)}")
    return 1 if any("error" in row for row in rows) else 0


def _settings(options: argparse.Namespace) -> list[Setting]:
    devices = options.devices or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = []
    for device in devices:
        for model in options.models:
            eager = options.eager or not options.compiled
            compiled = options.compiled or (not options.eager and model == options.models[0])
            for mode in [False] * eager + [True] * compiled:
                found.append(Setting(model, mode, device, options.precision, options.batch, options.threads))
    return found


def _rows(settings: Sequence[Setting], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    pairs = [(setting, pair, options.repeats, options.steps) for setting in settings for pair in PAIRS]
    single = [(setting, method) for setting in settings for method in METHODS]
    os.environ |= _KEEP  # for the processes that start from now on
    for (setting, pair, *_), result in run_tasks(time_pair, pairs, jobs=1, timeout=options.timeout):
        yield {"kind": "time", **_of(setting), "pair": list(pair), **_result(result)}
    for name in _KEEP:
        del os.environ[name]
    os.environ |= _GIVE_BACK
    for (setting, method), result in run_tasks(measure_memory, single, jobs=1, timeout=options.timeout):
        yield {"kind": "memory", **_of(setting), "method": method, **_result(result)}


def _of(setting: Setting) -> dict[str, Any]:
    fields = dataclasses.asdict(setting)
    return {**fields, "batch": setting.batch or MODELS[setting.model].batch}


def _result(result: Any) -> dict[str, Any]:
    return {"error": str(result)} if isinstance(result, Failed) else result


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    cpu = next((x for x in _lines("/proc/cpuinfo") if x.startswith("model name")), platform.processor())
    return {
        "cpu": cpu.partition(":")[2].strip() or cpu,
        "threads": options.threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "timm": importlib.metadata.version("timm"),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a model, mode and device; a ratio is its median, then the lowest and the highest."""
    header = ["model", "device", "mode", "batch", *(f"{m} s" for m in METHODS), *(f"{a} / {b}" for a, b in PAIRS)]
    header += [f"{m} MB" for m in METHODS] + ["sbs / uniform MB", "multi_path / sbs MB"]
    lines = []
    keys = dict.fromkeys((r["model"], r["device"], r["compiled"], r["batch"]) for r in rows)
    for key in keys:
        mine = [r for r in rows if (r["model"], r["device"], r["compiled"], r["batch"]) == key]
        seconds: dict[str, list[float]] = {method: [] for method in METHODS}
        ratios, peaks = {}, {}
        for row in mine:
            if row["kind"] == "memory":
                peaks[row["method"]] = row.get("peak_bytes")
                continue
            ratios[tuple(row["pair"])] = _ratio(row)
            for method, value in row.get("seconds", {}).items():
                seconds[method].append(value)
        model, device, compiled, batch = key
        line = [model, device, "compiled" if compiled else "eager", str(batch)]
        line += [f"{statistics.median(values):.3f}" if values else "" for values in seconds.values()]
        line += [ratios.get(pair, "") for pair in PAIRS]
        line += [f"{peaks[m] / 1e6:.0f}" if peaks.get(m) else "" for m in METHODS]
        for a, b in (("sbs", "uniform"), ("multi_path", "sbs")):
            line.append(f"{peaks[a] / peaks[b]:.2f}" if peaks.get(a) and peaks.get(b) else "")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def _ratio(row: dict[str, Any]) -> str:
    if "error" in row:
        return row["error"]
    return f"{row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"


def _options() -> argparse.Namespace:
    def models(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in MODELS]:
            raise argparse.ArgumentTypeError(f"unknown models {unknown}; expected some of {list(MODELS)}")
        return names

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON of all rows")
    parser.add_argument("--models", type=models, default=list(MODELS), help="by comma: " + ", ".join(MODELS))
    parser.add_argument("--repeats", type=int, default=7, help="turns of a pair")
    # reason: gates of weights and of activations learn in turns, so two steps are the least that is typical
    parser.add_argument("--steps", type=int, default=2, help="steps of each method a turn, an even number")
    parser.add_argument("--eager", action="store_true", help="time eager steps")
    parser.add_argument("--compiled", action="store_true", help="time compiled steps; a graph takes minutes to compile")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, help="images a batch; default: 128 small ones, 8 large ones")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument(
        "--devices", type=lambda text: text.split(","), help="by comma; default: cpu, and cuda if there"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that a pair may take")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
