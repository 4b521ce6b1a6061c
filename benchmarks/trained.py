"""Does a trained network survive the way to the static graph?

`python benchmarks/trained.py --data-dir DIR --weights FILE --out FILE` takes the CIFAR-10 ResNet-20 with parameter-free
shortcuts (safetensors; images and labels as {train,test}_{images,labels}.npy in DIR) through `compress` at several
budgets, data-free and calibrated on 512 training images, without any training, and prints top-1 accuracy of the float
network, of the gated and of the static graph, and how often the two agree.
"""

from __future__ import annotations

import json
import sys

import torch
from _cifar_models import cifar10, cifar10_parser, padded_resnet20

import sbs_fx

PLANS = [  # (budget in BOPs, weight bits, activation bits)
    (1 / 16, 8, 8),
    (0.05, 8, 8),
    (1 / 30, 4, 8),
    (1 / 60, 4, 4),
]


def predictions(module: torch.nn.Module, data: list) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([module(images).argmax(1) for images, _ in data])


def main() -> int:
    parser = cifar10_parser(__doc__ or "")
    options = parser.parse_args()
    if options.data_dir is None or options.weights is None:
        print("not run: needs --data-dir and --weights")
        return 0
    net = padded_resnet20(options.weights)
    test = list(cifar10(options.data_dir, "test", 500))[: options.images // 500]
    train = list(cifar10(options.data_dir, "train", 128))[:4]
    labels = torch.cat([y for _, y in test])
    accuracy = lambda p: 100 * (p == labels).double().mean().item()  # noqa: E731
    rows = [{"plan": "float", "accuracy": accuracy(predictions(net, test)), "images": len(labels)}]
    for bops, weight_bits, activation_bits in PLANS:
        for name, data in (("data-free", None), ("512 images", train)):
            config = sbs_fx.Config(weight_bits=weight_bits, activation_bits=activation_bits)
            result = sbs_fx.compress(net, torch.randn(2, 3, 32, 32), budget=bops, data=data, config=config)
            static, gated = predictions(result.model, test), predictions(result.gated, test)
            rows.append(
                {
                    "plan": f"W{weight_bits}A{activation_bits}",
                    "ranges": name,
                    "bops_ratio": result.baseline_cost.bops / result.cost.bops,
                    "macs_kept": result.cost.macs / result.baseline_cost.macs,
                    "accuracy": accuracy(static),
                    "gated_accuracy": accuracy(gated),
                    "agreement": 100 * (static == gated).double().mean().item(),
                }
            )
            print(rows[-1], flush=True)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(
        "\n| plan | ranges | BOPs | MACs kept | top-1 static | top-1 gated | agreement |\n|---|---|---|---|---|---|---|"
    )
    print(f"| float | | 1x | 100 % | {rows[0]['accuracy']:.2f} | | |")
    for r in rows[1:]:
        print(
            f"| {r['plan']} | {r['ranges']} | {r['bops_ratio']:.1f}x | {100 * r['macs_kept']:.0f} % | "
            f"{r['accuracy']:.2f} | {r['gated_accuracy']:.2f} | {r['agreement']:.2f} % |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
