"""LanguageModel: learns to predict the next token."""

from typing import Any

from torch import Tensor, nn

from models.nets.gpt import IGNORED
from models.refused import RefusedError
from models.task import Task


class LanguageModel(Task):
    """Trains a net that is called as `net(tokens, targets=targets) -> loss`.

    A batch is int64 tokens [batch, time + 1]: every token but the last is input, every token but the first a target.

    prompt_end: the id of a token; what stands before and at its first occurrence in a sample is a prompt, whose tokens
    are no targets, as in fine-tuning. The loss is then the mean over the targets of the global batch that count, in
    however many micro-batches it comes; a sample without this token has none. None: every token is a target.
    ValueError for what is no id.
    """

    def __init__(self, *, prompt_end: int | None = None, **parts: Any) -> None:
        super().__init__(**parts)
        if prompt_end is not None and (type(prompt_end) is not int or prompt_end < 0):
            raise RefusedError(f"model.prompt_end={prompt_end} is no token's id; give one from 0 on, or null.")
        self.prompt_end = prompt_end

    def make_net(self) -> nn.Module:
        return self._make_net() if self.prompt_end is None else self._make_net(ignores_targets=True)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self._loss(*self._split(batch))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        tokens, targets = self._split(batch)
        # Samples are of one length, so that the mean over samples is the mean over tokens, if all of them are targets.
        counted = len(batch) if self.prompt_end is None else int((targets != IGNORED).sum())
        loss = self._loss(tokens, targets)
        self.log("val/loss", loss, batch_size=counted, on_step=False, on_epoch=True, sync_dist=True)

    def _split(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        tokens, targets = batch[:, :-1], batch[:, 1:]
        if self.prompt_end is not None:
            targets = targets.masked_fill((tokens == self.prompt_end).cumsum(1) == 0, IGNORED)
        return tokens, targets

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.net(tokens, targets=targets)
