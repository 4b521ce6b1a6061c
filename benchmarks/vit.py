"""A vision transformer with weights of a real training, for `imagenet.py`.

`python benchmarks/vit.py --data-dir DIR --weights FILE` trains timm's `vit_tiny_patch16_224` with patches of 8 pixels
and 128 channels on CIFAR-10 ({train,test}_{images,labels}.npy in DIR: uint8 (N, 32, 32, 3), labels 0 to 9) and writes
its state dict as safetensors. `imagenet.py --data-dir DIR --model vit_tiny_patch16_224 --weights FILE --model-args ARGS
--labels labels` then compresses it, with the ARGS that this script prints.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

ARGS = {"img_size": 32, "patch_size": 8, "num_classes": 10, "depth": 6, "embed_dim": 128, "num_heads": 4}


def main() -> int:
    options = _options()
    if options.data_dir is None:
        print("not run: needs --data-dir")
        return 0
    torch.manual_seed(options.seed)
    net = timm.create_model("vit_tiny_patch16_224", **ARGS)
    (images, labels), (test_images, test_labels) = (_pictures(options.data_dir, split) for split in ("train", "test"))
    steps = options.epochs * (len(images) // options.batch)
    optimiser = torch.optim.AdamW(net.parameters(), lr=options.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, options.lr, total_steps=steps, pct_start=0.1)
    for epoch in range(options.epochs):
        since, total = time.perf_counter(), 0.0
        for index in torch.randperm(len(images)).split(options.batch)[: len(images) // options.batch]:
            loss = F.cross_entropy(net(_varied(images[index])), labels[index], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}, loss {total / (len(images) // options.batch):.3f}, ", end="")
        print(f"{time.perf_counter() - since:.0f} s", flush=True)
    right = _right(net.eval(), test_images, test_labels)
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, options.weights)
    print(f"top-1 {right:.2f} on {len(test_images)} test images; --model-args '{json.dumps(ARGS)}'")
    return 0


def _pictures(directory: Path, split: str) -> tuple[Tensor, Tensor]:
    """Normalised as timm's card of the model has it, (N, 3, 32, 32)."""
    images = torch.from_numpy(np.load(directory / f"{split}_images.npy")).permute(0, 3, 1, 2)
    labels = torch.from_numpy(np.load(directory / f"{split}_labels.npy").astype(np.int64))
    return (images.float() / 127.5 - 1).contiguous(), labels


def _varied(images: Tensor) -> Tensor:
    """Crops of the picture with a border of 4, by the batch in 8 parts; half of the batch flipped."""
    padded = F.pad(images, (4, 4, 4, 4))
    parts = []
    for part in padded.chunk(8):
        top, left = torch.randint(0, 9, (2,)).tolist()
        parts.append(part[:, :, top : top + 32, left : left + 32])
    cropped = torch.cat(parts)
    return torch.where(torch.rand(len(cropped), 1, 1, 1) < 0.5, cropped, cropped.flip(3))


@torch.no_grad()
def _right(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    predictions = torch.cat([net(x).argmax(1) for x in images.split(500)])
    return 100 * (predictions == labels).double().mean().item()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--weights", type=Path, default=Path("vit.safetensors"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="unused; there is no table")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
