"""What is left of a trained ImageNet network without training it again, by method and plan.

`python benchmarks/imagenet.py --data-dir DIR --weights FILE --out FILE` takes EfficientNet-Lite0 (`--model`: another
name of timm, such as the transformer that `vit.py` trains; `--pretrained`: its published weights, where there is a
network) and pictures, {train,test}_images.npy, uint8 (N, H, W, 3), with labels as {train,test}_imagenet.npy in DIR.
Each row is a process of its own: top-1, how often the prediction is the float network's, KL divergence from it in nats,
slope of its logits against the float ones (each less its image's mean), seconds of CPU and peak memory of the
compression. `--rows` picks some. Other tools calibrate on the same pictures; what is not installed is "not run".
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import sbs_fx
from sbs_fx import Budget, Config
from sbs_fx.calibration.reconstruction import Reconstruction
from sbs_fx.models import input_config
from sbs_fx.passes import channel_groups, cost_model, trace
from sbs_fx.search.space import Space, SpaceSettings


class Row(NamedTuple):
    """`bits`: weights, activations; the plan itself for uniform, its price for another method. `macs`: a limit."""

    method: str
    bits: tuple[int, int] | None
    data: bool = True
    macs: float | None = None


ROWS = {
    "W8A8": Row("uniform", (8, 8)),
    "W4A8": Row("uniform", (4, 8)),
    "W4A4": Row("uniform", (4, 4)),
    "W3A3": Row("uniform", (3, 3)),
    "W8A8, no data": Row("uniform", (8, 8), data=False),
    "opq at W4A8's price, no data": Row("opq", (4, 8), data=False),
    "opq at W4A4's price, no data": Row("opq", (4, 4), data=False),
    "two_stage at W4A4's price": Row("two_stage", (4, 4)),
    "pruned to 0.8 of the MACs": Row("two_stage", None, macs=0.8),
    "pruned to 0.7 of the MACs": Row("two_stage", None, macs=0.7),
}
PEERS = ("torchao", "nncf")


def main() -> int:
    options = _options()
    if options.data_dir is None or not (options.weights or options.pretrained):
        print("not run: needs --data-dir and --weights or --pretrained")
        return 0
    if options.row is not None:
        print(json.dumps(_peer(options) if options.row in PEERS else _row(options)))
        return 0
    rows = []
    for name in options.rows or (*ROWS, *PEERS):
        done = subprocess.run([sys.executable, *sys.argv, "--row", name], capture_output=True, text=True)
        row = {"row": name, **(json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {})}
        if done.returncode:
            row["failed"] = done.stderr.strip().splitlines()[-1][:300]
        rows.append(row)
        print(row, flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _row(options: argparse.Namespace) -> dict[str, Any]:
    row, net = ROWS[options.row], _network(options)
    pictures = _pictures(options, "train", net)
    inputs = torch.randn(2, *pictures.shape[1:])
    settings: dict[str, Any] = {"quantise": row.bits is not None}
    if row.bits is not None and min(row.bits) not in (2, 4, 8):
        settings["candidates"] = tuple(sorted({*row.bits, 8}))
    budget = Budget(macs=row.macs) if row.bits is None else _price(net, inputs, row.bits, settings)
    data = list(pictures.split(32)) if row.data else None
    # reason: by default it reads no more than 256 pictures of this size
    config = Config(**settings, reconstruction=Reconstruction(images=options.images))
    since = time.process_time()
    result = sbs_fx.compress(net, inputs, budget=budget, method=row.method, data=data, config=config)
    spent = time.process_time() - since
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes, on Linux
    return {
        **_measured(options, net, result.model),
        "bops": result.cost.bops / result.baseline_cost.bops,
        "macs": result.cost.macs / result.baseline_cost.macs,
        "cpu_seconds": spent,
        "gigabytes": memory,
    }


def _peer(options: argparse.Namespace) -> dict[str, Any]:
    from _peers import nncf_int8, torchao_int8

    net, since = _network(options), time.process_time()
    make = torchao_int8 if options.row == "torchao" else nncf_int8
    try:
        model = make(net, list(_pictures(options, "train", net).split(32)))
    except ImportError as error:
        return {"not_run": str(error)}
    return {**_measured(options, net, model), "cpu_seconds": time.process_time() - since}


def _price(net: nn.Module, inputs: Tensor, bits: tuple[int, int], settings: dict[str, Any]) -> Budget:
    graph = trace(net, inputs)
    groups = channel_groups(graph)
    cost = cost_model(graph, groups)
    plan = Space(groups, cost, SpaceSettings(**settings)).plan(*bits)
    return Budget(bops=cost.evaluate(plan).bops / cost.reference.bops * (1 + 1e-9))


def _network(options: argparse.Namespace) -> nn.Module:
    net = timm.create_model(options.model, pretrained=options.pretrained, **json.loads(options.model_args)).eval()
    if options.weights:
        net.load_state_dict({k: v.float() for k, v in load_file(options.weights).items()}, strict=False)
    return net


def _pictures(options: argparse.Namespace, split: str, net: nn.Module) -> Tensor:
    """Normalised, (N, 3, H, W): the calibration pictures of "train", drawn by the seed; the first ones of "test"."""
    images = np.load(options.data_dir / f"{split}_images.npy", mmap_mode="r")
    if split == "train":
        images = images[np.sort(np.random.RandomState(options.seed).permutation(len(images))[: options.images])]
        images = images[np.random.RandomState(options.seed + 1).permutation(len(images))]
    pixels = torch.from_numpy(np.array(images[: options.test if split == "test" else None])).permute(0, 3, 1, 2) / 255
    card = input_config(net)
    mean, std = (torch.tensor(card[key]).view(3, 1, 1) for key in ("mean", "std"))
    return ((pixels - mean) / std).contiguous()


def _measured(options: argparse.Namespace, net: nn.Module, model: Any) -> dict[str, Any]:
    labels = torch.from_numpy(np.load(options.data_dir / f"test_{options.labels}.npy").astype(np.int64))[: options.test]
    batches = _pictures(options, "test", net).split(50)
    with torch.no_grad():
        real, given = (torch.cat([torch.as_tensor(f(x)) for x in batches]) for f in (net, model))
    a, b = (y - y.mean(1, keepdim=True) for y in (real, given))
    return {
        "float": 100 * (real.argmax(1) == labels).double().mean().item(),
        "top1": 100 * (given.argmax(1) == labels).double().mean().item(),
        "same": 100 * (given.argmax(1) == real.argmax(1)).double().mean().item(),
        "kl": F.kl_div(given.log_softmax(1), real.log_softmax(1), log_target=True, reduction="batchmean").item(),
        "slope": ((a * b).sum() / (a * a).sum()).item(),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--model-args", default="{}", help="of timm's create_model, JSON")
    parser.add_argument("--labels", default="imagenet", help="which labels, test_LABELS.npy")
    parser.add_argument("--weights", help="safetensors of the model's state dict")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--images", type=int, default=256, help="for calibration")
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", nargs="*")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("imagenet.json"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
