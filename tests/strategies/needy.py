"""A strategy that needs a part of the plan, as sharding ones do; it trains like one process."""

from pydantic.dataclasses import dataclass

from strategies.replicate import Single
from strategies.spec import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NeedsTensor(Single):
    @property
    def cuts_at(self) -> frozenset[str]:
        return frozenset({"tensor"})
