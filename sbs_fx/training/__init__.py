"""Training of gated graphs: one loop for search and fine-tuning, its settings, checkpoints and progress."""

from sbs_fx.training.checkpoints import Checkpoints
from sbs_fx.training.evaluation import evaluate
from sbs_fx.training.loop import fine_tune, train
from sbs_fx.training.progress import Progress
from sbs_fx.training.settings import Training
from sbs_fx.training.stage import TrainingStage

__all__ = ["Checkpoints", "Progress", "TrainingStage", "Training", "evaluate", "fine_tune", "train"]
