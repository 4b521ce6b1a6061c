"""Tasks other than classification: what a segmenter and a detector lose, with targets and without.

`python benchmarks/tasks.py --out FILE` trains a small U-Net and a detector of centres on scenes of handwritten digits
(`--pictures` a .npy of images (n, height, width, 3) puts real pictures behind them), and compresses each with `auto` at
the bit operations of 4-bit weights and 8-bit activations: at once, and with two epochs of fine-tuning, with targets and
with images alone. The table gives the metric on 500 other scenes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _scenes import SIZE, Detector, Scenes, Segmenter, boxes_of, detection_loss
from torch import Tensor, nn
from torch.nn import functional as F

import sbs_fx
from sbs_fx import Task
from sbs_fx.passes import channel_groups, cost_model, trace
from sbs_fx.search import Space, TwoStage
from sbs_fx.training import evaluate

SEARCH = TwoStage(images=256, judged=64)  # a quarter of the images of a search: the networks are small
TASKS = {
    "segmentation": (Segmenter, Task("segmentation")),
    "detection": (Detector, Task("detection", loss=detection_loss, predictions=boxes_of)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, help="a .npy of uint8 images, (n, height, width, 3)")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(TASKS), help="by comma")
    parser.add_argument("--scenes", type=int, default=4000, help="to train on")
    parser.add_argument("--epochs", type=int, default=15, help="of training the float network")
    options = parser.parse_args()
    behind = None if options.pictures is None else _pictures(options.pictures)
    rows: list[dict[str, Any]] = []
    for name in options.tasks:
        make, task = TASKS[name]
        boxes = name == "detection"
        train, test = (
            Scenes(*which, boxes=boxes, behind=behind) for which in (("train", options.scenes), ("test", 500))
        )
        torch.manual_seed(0)
        model = _trained(make(), train, task, options.epochs)
        images = train.images[:2]
        before = evaluate(model, test, task=task)
        share = _share(model, images)
        print(f"{name}: float {before:.2f}, budget {share:.4f} of the BOPs", flush=True)
        for targets, epochs in ((True, 0), (False, 0), (True, 2), (False, 2)):
            data: Any = train if targets else [x for x, _ in train]
            begun = time.perf_counter()
            config = sbs_fx.Config(epochs=epochs, two_stage=SEARCH)
            result = sbs_fx.compress(model, images, task=task, budget=share, data=data, config=config)
            row = {
                "task": name,
                "targets": targets,
                "epochs": epochs,
                "method": result.policy.method,
                "float": before,
                "compressed": evaluate(result.model, test, task=task),
                "bops_share": result.cost.bops / result.baseline_cost.bops,
                "seconds": time.perf_counter() - begun,
            }
            rows.append(row)
            print(
                f"  targets {targets!s:5}  epochs {epochs}  {row['compressed']:.2f}  {row['seconds']:.0f} s", flush=True
            )
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(_table(rows))
    return 0


def _pictures(path: Path) -> Tensor:
    pictures = torch.from_numpy(np.load(path)).permute(0, 3, 1, 2).float()
    pictures = F.interpolate(pictures, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    return (pictures - pictures.mean()) / pictures.std()


def _trained(model: nn.Module, train: Scenes, task: Task, epochs: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs=epochs, steps_per_epoch=len(train))
    model.train()
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(epoch)
        losses = []
        for rows in torch.randperm(len(train.images), generator=generator).split(train.batch):
            targets: Any = [train.targets[i] for i in rows] if train.boxes else train.masks[rows]
            loss = task.loss_of(model(train.images[rows]), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        print(f"  epoch {epoch}: {sum(losses) / len(losses):.4f}", flush=True)
    return model.eval()


def _share(model: nn.Module, images: Tensor) -> float:
    """Of the float model's BOPs: 4-bit weights and 8-bit activations, first and last layers at 8 and 8."""
    graph = trace(model, images)
    groups = channel_groups(graph)
    cost = cost_model(graph, groups)
    return cost.evaluate(Space(groups, cost).plan(4, 8)).bops / cost.reference.bops


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| task | targets | epochs | method | float | compressed | points | BOPs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['task']} | {'yes' if r['targets'] else 'none'} | {r['epochs']} | {r['method']} | {r['float']:.2f} | "
            f"{r['compressed']:.2f} | {r['compressed'] - r['float']:+.2f} | {100 * r['bops_share']:.2f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
