"""Does a latency model predict what random plans take?

`python benchmarks/latency_model.py --model resnet18 --backend openvino --policies 30 --out FILE` measures the model (or
reads it from the cache), draws plans of random channel counts and of 2, 4 or 8 bits a tensor, and prints the mean
relative error of the predicted times and their rank correlation (Spearman) with the measured ones. A plan is timed in
turn with the dense network, and its ratio to that is what counts. Random weights.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from scipy.stats import spearmanr

from sbs_fx.export.latency import Latency, beside, latency_model, random_bits, random_counts, slim_runner
from sbs_fx.passes import channel_groups, cost_model, trace
from sbs_fx.plan import Plan


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--policies", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(options.model).eval()
    inputs = (torch.randn(2, *model.pretrained_cfg["input_size"]),)
    batch = (inputs[0][:1],)
    graph = trace(model, inputs)
    groups = channel_groups(graph)
    plain, settings = cost_model(graph, groups), Latency(backend=options.backend)
    found = latency_model(graph, groups, plain, inputs, settings)
    cost, draw, rows = cost_model(graph, groups, found), random.Random(7), []
    dense = slim_runner(graph, groups, plain, {}, inputs, batch, settings)
    for _ in range(options.policies):
        counts = random_counts(groups, draw)
        bits = random_bits(plain, draw, (2, 4, 8))
        kept = {name: range(count) for name, count in counts.items()}
        run = slim_runner(graph, groups, plain, counts, inputs, batch, settings, bits)
        measured = beside(run, dense, batch, settings)[0] * found.dense_seconds
        predicted = cost.price(Plan(kept, bits["weights"], bits["activations"]), ["latency"])["latency"]
        rows.append({"measured": measured, "predicted": predicted})
        print(rows[-1], flush=True)
    measured, predicted = (np.array([row[key] for row in rows]) for key in ("measured", "predicted"))
    result = {
        "model": options.model,
        "backend": options.backend,
        "mean_error": float(np.abs(predicted / measured - 1).mean()),
        "rank_correlation": float(spearmanr(predicted, measured)[0]),
        "fit_error": found.error,
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print({key: value for key, value in result.items() if key != "rows"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
