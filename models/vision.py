"""ImageClassifier: learns to name what is in an image."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.task import Task


class ImageClassifier(Task):
    """Trains a net that is called as `net(images) -> logits [batch, class]`.

    A batch is (images [batch, channel, height, width], int64 labels [batch]).
    """

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return _loss(self.net(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self.net(images)
        values = {"val/loss": _loss(logits, labels), "val/accuracy": (logits.argmax(-1) == labels).float().mean()}
        self.log_dict(values, batch_size=len(labels), on_step=False, on_epoch=True, sync_dist=True)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats, in float32 or wider."""
    return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
