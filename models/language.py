"""LanguageModel: learns to predict the next token."""

from torch import Tensor

from models.task import Task


class LanguageModel(Task):
    """Trains a net that is called as `net(tokens, targets=targets) -> loss`.

    A batch is int64 tokens [batch, time + 1]: every token but the last is input, every token but the first a target.
    """

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        # Samples are of one length, so that the mean over samples is the mean over tokens.
        self.log("val/loss", self._loss(batch), batch_size=len(batch), on_step=False, on_epoch=True, sync_dist=True)

    def _loss(self, batch: Tensor) -> Tensor:
        return self.net(batch[:, :-1], targets=batch[:, 1:])
