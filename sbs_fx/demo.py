"""`python -m sbs_fx.demo`: a small model trained on real scans of digits, compressed, saved, and run again afresh.

In: nothing; scikit-learn ships the data. Out: `policy.json`, `model.pt2` and the report in `--out`, a table on stdout,
and exit code 0 only if at most 1/30 of the BOPs are left and held-out accuracy fell by at most one point. The saved
file is read in a process of its own, with torch alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from sbs_fx.models import SMALL_MODEL

if TYPE_CHECKING:
    from sbs_fx.data.datasets import Batches

IMAGE_SIZE = 32
LEAST_RATIO = 30.0
MOST_POINTS = 1.0
SEED = 0
TRAIN_EPOCHS = 12
TRAIN_RATE = 4e-3
SEARCH_EPOCHS = 2
TUNE_EPOCHS = 8
TUNE_RATE = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sbs_fx.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="out", help="directory for policy.json, model.pt2 and the report")
    parser.add_argument("--evaluate", metavar="FILE", help="print the accuracy of a saved model, nothing else")
    options = parser.parse_args()
    if options.evaluate:
        print(evaluate_file(options.evaluate))
        return 0
    return run(options.out)


def run(directory: str) -> int:
    """The demo; 0 if both goals are met."""
    from rich.console import Console

    import sbs_fx
    from sbs_fx.report.text import closing_table
    from sbs_fx.search import Search
    from sbs_fx.training import evaluate

    torch.set_num_threads(1)  # reason: layers this small gain nothing from a second, and sums keep their order
    begun = time.perf_counter()
    model = train_model()
    print(f"trained {SMALL_MODEL} on scans of digits in {time.perf_counter() - begun:.0f} s", flush=True)
    begun = time.perf_counter()
    result = sbs_fx.compress(
        model,
        torch.zeros(2, 1, IMAGE_SIZE, IMAGE_SIZE),
        budget=sbs_fx.Budget(bops=1 / LEAST_RATIO),
        data=digits("train", augment=True),
        method="sbs",
        config=sbs_fx.Config(
            methods={"search": Search(epochs=SEARCH_EPOCHS)}, epochs=TUNE_EPOCHS, learning_rate=TUNE_RATE, seed=SEED
        ),
        progress=lambda stage, share: print(f"  {stage}", flush=True),
    )
    print(f"compressed in {time.perf_counter() - begun:.0f} s")
    result.save(directory)
    path = os.path.join(directory, "model.pt2")
    before, after = evaluate(model, digits("test")), evaluate_afresh(path)
    result.report = result.report.with_accuracy(before, after)
    for name in ("report.txt", "report.json", "report.html"):
        result.report.save(os.path.join(directory, name))
    Console().print(closing_table(result.report))
    ratio = result.baseline_cost.bops / result.cost.bops
    met = ratio >= LEAST_RATIO and before - after <= MOST_POINTS
    print(
        f"{ratio:.1f} times fewer BOPs (goal: {LEAST_RATIO:g}), accuracy {after - before:+.2f} points (goal: "
        f"-{MOST_POINTS:g} at most): {'met' if met else 'MISSED'}. Files are in {directory}"
    )
    return 0 if met else 1


def digits(split: str, augment: bool = False) -> Batches:
    """Scans of digits, (images (batch, 1, 32, 32), labels); the same ones each time."""
    from sbs_fx.data.datasets import open_data

    return open_data(
        "digits",
        split=split,
        image_size=IMAGE_SIZE,
        channels=1,
        mean=(0.5,),
        std=(0.5,),
        shuffle=split == "train",
        augment=augment,
        seed=SEED,
    )


def train_model() -> nn.Module:
    """The float model: AdamW, rate rising and falling once, always the same weights on the same machine."""
    from sbs_fx.models import create_model

    torch.manual_seed(SEED)
    model = create_model(SMALL_MODEL, pretrained=False, in_chans=1, num_classes=10).train()
    data = digits("train", augment=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAIN_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TRAIN_RATE, total_steps=TRAIN_EPOCHS * len(data))
    for _ in range(TRAIN_EPOCHS):
        for images, labels in data:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def evaluate_afresh(path: str) -> float:
    """Held-out accuracy in percent of a saved model, in a process of its own."""
    command = [sys.executable, "-m", "sbs_fx.demo", "--evaluate", path]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def evaluate_file(path: str) -> float:
    """Held-out accuracy in percent of a saved model, read with torch alone."""
    import torch.ao.quantization.fx._decomposed  # reason: registers the quantised operators

    model = torch.export.load(path).module()
    right = total = 0
    with torch.no_grad():
        for images, labels in digits("test"):
            right += int((model(images).argmax(1) == labels).sum())
            total += len(labels)
    return 100 * right / total


if __name__ == "__main__":
    sys.exit(main())
