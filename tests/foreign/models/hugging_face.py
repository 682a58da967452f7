"""transformers' and peft's models, each in an ordinary LightningModule: nothing is told to strategies but a plan."""

from typing import Any

import lightning.pytorch as pl
import peft
import torch
import transformers
from torch import Tensor

from models.plan import ParallelPlan

SPACE = 32  # in bytes


class Causal(pl.LightningModule):
    """Any of transformers' language models, by the name of its class, built in `__init__` as their examples do.

    padded: no token up to a sample's first space is a target, as a collator for fine-tuning has it.
    """

    plan = ParallelPlan(blocks=("model.layers.*",))

    def __init__(self, name: str, lr: float, padded: bool = False, **config: Any) -> None:
        super().__init__()
        self.lr, self.padded = lr, padded
        self.net = self.make_net(name, config)

    def make_net(self, name: str, config: dict[str, Any]) -> Any:
        kind = getattr(transformers, name)
        return kind(kind.config_class(**config))

    def loss(self, batch: Any) -> Tensor:
        labels = batch.clone()
        if self.padded:
            labels[(batch == SPACE).cumsum(1) == 0] = -100
        return self.net(input_ids=batch, labels=labels).loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=len(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((one for one in self.parameters() if one.requires_grad), lr=self.lr)


class GPT2(Causal):
    plan = ParallelPlan(blocks=("transformer.h.*",), tied=(("transformer.wte.weight", "lm_head.weight"),))


class Qwen2(Causal):
    plan = ParallelPlan(blocks=("model.layers.*",), tied=(("model.embed_tokens.weight", "lm_head.weight"),))


class OnMeta(Causal):
    """The same, on the meta device in `configure_model`, as Concord's README has it."""

    def make_net(self, name: str, config: dict[str, Any]) -> Any:
        self.made_of = name, config
        return None

    def configure_model(self) -> None:
        if self.net is None:
            with torch.device("meta"):
                self.net = super().make_net(*self.made_of)


class Lora(Causal):
    """A frozen Llama, of whose attention peft trains small additions."""

    plan = ParallelPlan(blocks=("base_model.model.model.layers.*",))

    def make_net(self, name: str, config: dict[str, Any]) -> Any:
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
        return peft.get_peft_model(super().make_net(name, config), lora)


class Bert(Causal):
    """Learns to fill in what is masked, an eighth of the tokens, drawn anew in each step."""

    plan = ParallelPlan(blocks=("bert.encoder.layer.*",))

    def loss(self, batch: Any) -> Tensor:
        masked = torch.rand(batch.shape, device=batch.device) < 1 / 8
        return self.net(input_ids=batch.masked_fill(masked, 0), labels=batch.masked_fill(~masked, -100)).loss


class Images(Causal):
    """transformers' ViT on digits of 8 x 8."""

    plan = ParallelPlan(blocks=("vit.layers.*",))

    def loss(self, batch: Any) -> Tensor:
        images, labels = batch
        return self.net(pixel_values=images, labels=labels).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=len(batch[1]), sync_dist=True)


class Clip(Images):
    """Digits and their names, told apart from the others of the batch: what is computed depends on how it is cut."""

    plan = ParallelPlan(blocks=("text_model.encoder.layers.*", "vision_model.encoder.layers.*"))

    def loss(self, batch: Any) -> Tensor:
        images, labels = batch
        words = torch.stack([torch.ones_like(labels), labels + 3, torch.full_like(labels, 2)], 1)
        return self.net(input_ids=words, pixel_values=images, return_loss=True).loss
