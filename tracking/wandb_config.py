"""What a user may say of W&B in conf/logger; apart from the logger itself, so that reading it imports no Lightning."""

from typing import Literal, final

from pydantic import BaseModel, ConfigDict


@final
class WandbConfig(BaseModel):
    """`auto` is online where an API key is found (or WANDB_MODE says so), else offline; `disabled` makes no run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    project: str = "concord"
    entity: str | None = None
    group: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    tags: tuple[str, ...] = ()
