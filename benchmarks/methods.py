"""All methods on one trained network at equal budgets, without training and with a little of it.

`python benchmarks/methods.py --out DIR --data-dir DIR --weights FILE` takes the CIFAR-10 ResNet-20 with parameter-free
shortcuts (safetensors; images and labels as {train,test}_{images,labels}.npy); `--model digits` trains the demo network
on scikit-learn's digits instead. Budgets are what uniform 8-, 6- and 4-bit networks cost, first and last layer 8/8.
Beside the methods stands the plain uniform network of each budget, nothing pruned, and at 8 bits the post-training int8
of those of NNCF, torchao and ONNX Runtime that are installed, on the same images. Points are kept in DIR/MODEL, so the
same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _cifar_models import cifar10, padded_resnet20
from _peers import onnxruntime_static, openvino_nncf, torchao_pt2e
from _rows import even_plan, uniform_network
from torch import Tensor, nn

import sbs_fx
from sbs_fx import demo
from sbs_fx.passes import channel_groups, cost_model, trace
from sbs_fx.search import Search
from sbs_fx.search.registry import methods
from sbs_fx.training import Training, evaluate, fine_tune

BITS = (8, 6, 4)
PEERS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "NNCF": lambda model, x: openvino_nncf(model, x, threads=1),
    "torchao PT2E": torchao_pt2e,
    "onnxruntime static": lambda model, x: onnxruntime_static(model, x, threads=1),
}
PEER_IMAGES = 500


def main() -> int:
    options = _options()
    torch.set_num_threads(options.threads)
    model, example, train, test = _digits() if options.model == "digits" else _cifar(options)
    graph = trace(model, example)
    cost = cost_model(graph, channel_groups(graph))
    config = sbs_fx.Config(
        search=Search(epochs=options.search_epochs),
        training=Training(norm_batches=10, precision=options.precision),
        learning_rate=options.lr,
    )
    directory = options.out / options.model
    budgets, rows = [], []
    for bits in options.bits:
        budgets.append(cost.price(even_plan(cost, bits, bits))["bops"] / cost.reference.bops)
        rows.append(_uniform(model, example, train, test, bits, config, options.epochs))
        print(rows[-1], flush=True)
        if bits == 8:
            rows += [_peer(name, model, train, test, rows[-1]["bops_ratio"]) for name in PEERS]
    found = sbs_fx.compare(
        model,
        train,
        budgets,
        methods=options.methods,
        example_inputs=example,
        validation=test,
        epochs=options.epochs,
        config=config,
        output_dir=directory,
        progress=lambda stage, _: print(stage, flush=True),
    )
    print(found)
    rows += [
        {"bits": bits, **p.model_dump()}
        for bits, share in zip(options.bits, budgets, strict=True)
        for p in found.points
        if p.budget == {"bops": share}
    ]
    result = {"model": options.model, "float_accuracy": found.float_accuracy, "epochs": options.epochs, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.model}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(_table(result))
    return 0


def _uniform(
    model: nn.Module, example: torch.Tensor, train: Any, test: Any, bits: int, config: sbs_fx.Config, epochs: int
) -> dict[str, Any]:
    """The network of one bitwidth, per-channel ranges of least error."""
    gated, spent = uniform_network(model, example, train, bits)
    row = {"bits": bits, "method": "plain uniform", "outcome": "ok", "accuracy": evaluate(gated, test)}
    if epochs:
        fine_tune(gated, train, epochs=epochs, lr=config.learning_rate, settings=config.training, teacher=model)
        row["tuned_accuracy"] = evaluate(gated, test)
    return row | {"bops_ratio": spent.reference.bops / spent.bops, "macs_share": 1.0}


def _peer(name: str, model: nn.Module, train: Any, test: Any, ratio: float) -> dict[str, Any]:
    """Accuracy of a tool's own int8 network; BOPs as those of the plain uniform one, all layers being int8."""
    images, labels = (torch.cat(parts) for parts in zip(*test, strict=True))
    size = min(PEER_IMAGES, len(images))
    seen: list[Tensor] = []
    for batch, _ in train:
        seen.append(batch)
        if sum(map(len, seen)) >= size:
            break
    row = {"bits": 8, "method": name, "bops_ratio": ratio, "macs_share": 1.0}
    try:
        run = PEERS[name](model, torch.cat(seen)[:size].contiguous())
    except ImportError as error:
        return row | {"outcome": f"not installed: {error}"}
    right = count = 0
    for x, y in zip(images.split(size), labels.split(size), strict=True):
        if len(x) == size:  # reason: these networks take one batch size
            found = run(x.contiguous())
            found = torch.as_tensor(found[0] if isinstance(found, (list, tuple)) else found)
            right, count = right + int((found.argmax(1) == y).sum()), count + size
    print(row := row | {"outcome": "ok", "accuracy": 100 * right / count}, flush=True)
    return row


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"| budget | method | BOPs ratio | MACs left | top-1 % | after {result['epochs']} epochs | policy after |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(result["rows"], key=lambda r: -r["bits"]):
        if row["outcome"] != "ok":
            lines.append(f"| {row['bits']} bits | {row['method']} | {row['outcome'].split(':')[0]} | | | | |")
            continue
        tuned, seconds = row.get("tuned_accuracy"), row.get("seconds")
        lines.append(
            f"| {row['bits']} bits | {row['method']} | {row['bops_ratio']:.1f}x | {100 * row['macs_share']:.0f} % | "
            f"{row['accuracy']:.2f} | {'' if tuned is None else f'{tuned:.2f}'} | "
            f"{'' if seconds is None else f'{seconds:.0f} s'} |"
        )
    return "\n".join(lines)


def _digits() -> tuple[nn.Module, torch.Tensor, Any, Any]:
    example = torch.zeros(2, 1, demo.IMAGE_SIZE, demo.IMAGE_SIZE)
    return demo.train_model(), example, demo.digits("train", augment=True), demo.digits("test")


def _cifar(options: argparse.Namespace) -> tuple[nn.Module, torch.Tensor, Any, Any]:
    if options.data_dir is None or options.weights is None:
        print("not run: needs --data-dir and --weights")
        raise SystemExit(0)
    train = cifar10(options.data_dir, "train", 128, shuffle=True)
    test = list(cifar10(options.data_dir, "test", 500))
    return padded_resnet20(options.weights), torch.randn(2, 3, 32, 32), train, test


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=("cifar10", "digits"), default="cifar10")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=[*methods()])
    parser.add_argument("--bits", type=lambda text: [int(b) for b in text.split(",")], default=list(BITS))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--search-epochs", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
