"""Does a trained network stay the same on every backend?

`python benchmarks/backends.py --data-dir DIR --weights FILE --images 2000 --out FILE` takes the CIFAR-10 ResNet-20 of
parameter-free shortcuts at one bitwidth each, with float scales and in exact mode, through torch eager, torch's
compiler, ONNX Runtime, OpenVINO and ExecuTorch: top-1 accuracy, agreement with eager, and, layer by layer with the same
codes fed to both, the share of codes that differ and by how much. The same call again goes on with what is there.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from _cifar_models import cifar10, cifar10_parser, padded_resnet20
from torch import Tensor, fx

import sbs_fx
from sbs_fx.export import runner
from sbs_fx.export.onnx import onnx_model, run_onnx
from sbs_fx.export.openvino import openvino_model, run_openvino
from sbs_fx.export.runtime import flat
from sbs_fx.passes.dialects import quantizers
from sbs_fx.passes.graph import copy_graph
from sbs_fx.plan.errors import BackendError

PLANS = [(8, 1 / 16), (4, 1 / 60), (2, 1 / 150)]  # bits and the budget that they alone meet
BACKENDS = ("inductor", "onnxruntime", "openvino", "executorch")
LAYERWISE = ("onnxruntime", "openvino")
LAYER_IMAGES = 64


def main() -> int:
    options = cifar10_parser(__doc__ or "").parse_args()
    if options.data_dir is None or options.weights is None:
        print("not run: needs --data-dir and --weights")
        return 0
    net = padded_resnet20(options.weights)
    test = list(cifar10(options.data_dir, "test", 250))[: -(-options.images // 250)]
    train = list(cifar10(options.data_dir, "train", 128))[:4]
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    for bits, budget in PLANS:
        for exact in (False, True):
            if any(row["bits"] == bits and row["exact"] == exact for row in rows):
                continue
            config = sbs_fx.Config(weight_bits=bits, activation_bits=bits, exact=exact)
            inputs = torch.randn(2, 3, 32, 32)
            result = sbs_fx.compress(net, inputs, budget=budget, data=train, method="uniform", config=config)
            rows += measure(result.model, test, {"bits": bits, "exact": exact})
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print("| bits | scales | backend | top-1 % | same top-1 % | codes off, worst layer | steps |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        scales = "powers of two" if r["exact"] else "float"
        codes = f"{r['worst_layer']:.1e} | {r['steps']:.0f}" if "steps" in r else " | "
        print(f"| {r['bits']} | {scales} | {r['backend']} | {r['accuracy']:.2f} | {r['agreement']:.2f} | {codes} |")
    return 0


def measure(static: fx.GraphModule, test: list[Any], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per backend."""
    labels = torch.cat([y for _, y in test])
    eager, rows = None, []
    for backend in ("eager", *BACKENDS):
        try:
            run = runner(static, (test[0][0],), backend, threads=1)
        except BackendError as error:
            print(f"{facts} refused: {error}", flush=True)
            continue
        found = torch.cat([flat(run(images))[0].argmax(1) for images, _ in test])
        eager = found if eager is None else eager
        row = {**facts, "backend": backend, "accuracy": 100 * float((found == labels).double().mean())}
        row["agreement"] = 100 * float((found == eager).double().mean())
        if backend in LAYERWISE:
            row |= layers(static, test[0][0][:LAYER_IMAGES], backend)
        rows.append(row)
        print(row, flush=True)
    return rows


def layers(static: fx.GraphModule, images: Tensor, backend: str) -> dict[str, float]:
    """Each quantised tensor computed by a backend from eager's own codes, one that only additions read together with
    them: the worst share that differs, the largest difference in steps, and the share over all."""
    values: dict[str, Tensor] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            values[n.name] = super().run_node(n)
            return values[n.name]

    with torch.no_grad():
        Keep(static).run(images)
    shares, steps, wrong, total = [], [0.0], 0, 0
    for _, last in quantizers(static.graph):
        if _is_inner(last):
            continue
        part, names = alone(static, last.name)
        if not names:
            continue
        inputs = tuple(values[name] for name in names)
        if backend == "onnxruntime":
            run = run_onnx(onnx_model(part, inputs).SerializeToString(), part, threads=1)
        else:
            run = run_openvino(openvino_model(part, inputs), part, inputs, threads=1)
        off = ((flat(run(*inputs))[0] - values[last.name]) / last.args[1]).abs().round()
        shares.append(float((off > 0).double().mean()))
        steps.append(float(off.max()))
        wrong, total = wrong + int((off > 0).sum()), total + off.numel()
    return {"worst_layer": max(shares), "steps": max(steps), "all_layers": wrong / total}


def alone(static: fx.GraphModule, name: str) -> tuple[fx.GraphModule, list[str]]:
    """What computes one quantised tensor from the quantised tensors before it, as a graph of its own, and the names of
    those."""
    part = copy_graph(static)
    graph = part.graph
    graph._codegen = fx.graph.CodeGen()
    target = next(node for node in graph.nodes if node.name == name)
    sources = {}
    for first, last in list(quantizers(graph)):
        if last is not target and not _is_inner(last):
            with graph.inserting_before(next(iter(graph.nodes))):
                entry = graph.placeholder(f"{last.name}_in")
            first.replace_input_with(first.args[0], entry)
            sources[entry] = last.name
    graph.output_node().args = (target,)
    graph.eliminate_dead_code()
    for node in list(graph.find_nodes(op="placeholder")):
        if not node.users:
            graph.erase_node(node)
    part.recompile()
    return part.eval(), [sources[node] for node in graph.find_nodes(op="placeholder") if node in sources]


def _is_inner(last: fx.Node) -> bool:
    """Whether only additions read a quantised tensor: backends fuse what makes it, it and them."""
    return all(user.target is torch.ops.aten.add.Tensor for user in last.users)


if __name__ == "__main__":
    sys.exit(main())
