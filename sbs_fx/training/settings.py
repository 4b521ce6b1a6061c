"""`Training`: how a gated graph is trained, by search and fine-tuning alike."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sbs_fx.plan import Settings


class Training(Settings):
    """Settings of a training run; what it trains, for how many epochs and at which rate is said elsewhere.

    Attributes:
        optimizer: name of a timm optimiser; "sgd" is Nesterov's.
        momentum, weight_decay: of it; decay is for parameters of two or more dimensions.
        schedule: timm's "cosine", or "multistep" with `milestones`, or "constant"; after a linear rise over the share
            `warmup` of the steps.
        milestones: shares of the epochs after which the rate is divided by ten.
        range_lr: highest rate of the quantisers' ranges, relative to the size of each; 0 keeps them.
        clip: largest norm of the gradient of all weights together; 0: no clipping.
        label_smoothing, mixup, cutmix: as in timm.
        distillation: weight of KL(float model || graph) of the class probabilities, beside the cross-entropy.
        sharpness: radius rho of sharpness-aware steps (arXiv 2010.01412), 0: plain steps.
        ema: decay of the average of weights that is the result, 0: the last weights are.
        frozen_norm_epochs: in so many last epochs batch norms use and keep their statistics, as they will when folded.
        norm_batches: batches from which batch-norm statistics are estimated anew at the end; 0: none.
        patience: epochs without a better validation accuracy before training stops, the best state being kept.
        precision: "bf16" computes under autocast; weights stay in float32.
        channels_last: memory format of images and convolutions.
        compiled: train through `torch.compile`; a minute or more to begin with, then faster steps.
        checkpoint_every: steps between checkpoints; there is one at each epoch's end besides.

    >>> sbs_fx.Config(training=Training(ema=0.9), epochs=2).training.ema
    0.9
    """

    optimizer: str = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    schedule: Literal["cosine", "multistep", "constant"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1)
    milestones: tuple[float, ...] = (0.4, 0.6)
    range_lr: float = Field(default=1e-3, ge=0, allow_inf_nan=False)
    clip: float = Field(default=5.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    distillation: float = Field(default=1.0, ge=0)
    sharpness: float = Field(default=0.0, ge=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    frozen_norm_epochs: int = Field(default=0, ge=0)
    norm_batches: int = Field(default=0, ge=0)
    patience: int | None = Field(default=None, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    compiled: bool = False
    checkpoint_every: int = Field(default=500, ge=1)
