"""Do the controllers find more than chance?

`python benchmarks/ajpq.py --data-dir DIR --weights FILE --out FILE` searches bits by channel for the CIFAR-10 ResNet-20
at a fifth of its size, without any training of weights: `ajpq`; random policies, as many, with a sparsity per layer and
bits by channel drawn evenly, brought into the budget in the same way and judged by the same reward; the same without
sparsity; and `ajpq` without learning (draws around its first policy). Each keeps its best policy by reward on training
images and tells its accuracy on the test images.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _cifar_data import CifarBatches, batches
from _cifar_models import CIFAR10, cifar10, cifar10_parser, padded_resnet20

from sbs_fx.passes import channel_groups, cost_model, trace
from sbs_fx.plan import Budget
from sbs_fx.search import Ajpq, Problem
from sbs_fx.search.ajpq import Agent, Trial, channel_bits_of
from sbs_fx.search.reward import Reward
from sbs_fx.training.evaluation import evaluate


def searched(method: str, agent: Agent, reward: Reward, settings: Ajpq, seed: int) -> list[float]:
    """The best reward after each evaluation; the best trial is `agent.best`."""
    generator = torch.Generator().manual_seed(seed)
    curve: list[float] = []
    while len(curve) < settings.episodes:
        trials = []
        for _ in range(min(settings.group, settings.episodes - len(curve))):
            if method.startswith("random"):
                most = settings.most_sparse if method == "random" else 0.0
                trial = Trial(_random(agent, most, generator))
            else:
                trial = agent.play()
            trial.reward = reward(trial.bits)
            agent.take(trial)
            trials.append(trial)
            assert agent.best is not None
            curve.append(round(agent.best.reward, 4))
        if method == "ajpq":
            agent.learn(trials)
    return curve


def _random(agent: Agent, most_sparse: float, generator: torch.Generator) -> dict[str, list[int]]:
    channels = agent.channels
    plan = dict(channels.least)
    for name in channels.names:
        count = len(plan[name])
        share = most_sparse * float(torch.rand((), generator=generator))
        drawn = torch.tensor([2, 4, 8])[torch.randint(3, (count,), generator=generator)].tolist()
        for channel in channels.importance[name].argsort(stable=True)[: int(share * count)].tolist():
            drawn[channel] = 0
        plan[name] = channels.clip({**plan, name: drawn}, name)
    return channels.fill(plan)


def augmented(folder: Path) -> CifarBatches:
    """Training batches of 128, cropped and flipped."""
    train = batches(folder, "train", 128, torch.device("cpu"))
    assert train is not None
    mean, std = (torch.tensor(CIFAR10[k]).view(3, 1, 1) for k in ("mean", "std"))
    train.scale, train.shift = 1 / (255 * std), mean / std
    return train


def main() -> int:
    parser = cifar10_parser(__doc__ or "")
    parser.add_argument("--episodes", type=int, default=90)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=float, default=0.2)
    parser.add_argument("--methods", nargs="+", default=["ajpq", "random", "random bits", "no learning"])
    options = parser.parse_args()
    if options.data_dir is None or options.weights is None:
        print("not run: needs --data-dir and --weights")
        return 0
    net = padded_resnet20(options.weights)
    images = torch.randn(2, 3, 32, 32)
    graph = trace(net, images)
    groups = channel_groups(graph)
    cost = cost_model(graph, groups)
    # reason: statistics of images that are not cropped and flipped as in training cost 3 points, even at float
    train = augmented(options.data_dir)
    test = list(cifar10(options.data_dir, "test", 500))[: options.images // 500]
    settings = Ajpq(episodes=options.episodes, norm_batches=2, reward_batches=6)
    budget = Budget(size=options.size)
    rows: list[dict[str, Any]] = [{"method": "float", "accuracy": evaluate(graph, test), "images": options.images}]
    print(rows[0], flush=True)
    for seed in range(options.seeds):
        train.set_epoch(seed)
        data = list(itertools.islice(train, 8))
        for method in options.methods:
            channels = channel_bits_of(Problem.of(cost, budget, (images,), seed=seed), settings)
            reward = Reward(channels, data, settings.norm_batches, settings.reward_batches)
            agent = Agent(channels, settings, seed)
            begun = time.monotonic()
            curve = searched(method, agent, reward, settings, seed)
            assert agent.best is not None
            reward.apply(agent.best.bits)
            found: dict[str, Any] = {
                "method": method,
                "seed": seed,
                "reward": curve[-1],
                "accuracy": evaluate(reward.network, test),
                "size_asked": options.size,
                "size_ratio": cost.reference.stored_bits / cost.price(channels.plan(agent.best.bits))["size"],
                "bits": {b: sum(each.count(b) for each in agent.best.bits.values()) for b in (0, 2, 4, 8)},
                "seconds": round(time.monotonic() - begun, 1),
                "curve": curve,
            }
            rows.append(found)
            print({k: v for k, v in found.items() if k != "curve"}, flush=True)
            options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n| method | best reward | top-1 | size |\n|---|---|---|---|")
    for method in options.methods:
        same = [r for r in rows if r["method"] == method]
        reward_, top, size = (
            " / ".join(f"{r[k]:.{n}f}" for r in same) for k, n in (("reward", 4), ("accuracy", 2), ("size_ratio", 2))
        )
        print(f"| {method} | {reward_} | {top} | {size} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
