"""How a reward is served: address, token, limits."""

import ipaddress
from typing import Self

from pydantic import Field, model_validator

from common.config import StrictModel
from reward_servers.wire.messages import WireLimits


class ServeSettings(StrictModel):
    """`flowfleet reward serve`. Sizes are in bytes, durations in seconds."""

    host: str = "127.0.0.1"
    port: int = Field(0, ge=0, le=65535)  # 0 = a free one
    token_file: str = ""  # empty = no token, which only loopback may
    max_items: int = Field(64, ge=1)  # images a request
    max_body_bytes: int = Field(64 << 20, ge=1)
    max_pixels: int = Field(1 << 22, ge=1)  # of one image
    max_total_pixels: int = Field(1 << 25, ge=1)  # of a request's images together
    max_pending: int = Field(128, ge=1)  # requests read, waiting or being scored
    max_pending_bytes: int = Field(512 << 20, ge=1)  # of their bodies together
    deadline_s: float = Field(120.0, gt=0)  # from a request's head to its answer
    grace_s: float = Field(5.0, ge=0)  # what requests under way get at the end
    micro_batch: int = Field(16, ge=1)  # images a scorer call

    @model_validator(mode="after")
    def _needs_a_token_outside(self) -> Self:
        if not self.token_file and not self.is_loopback:
            raise ValueError(
                f"host {self.host!r} is reached from elsewhere and token_file is empty; name a token_file or serve on 127.0.0.1"
            )
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def limits(self) -> WireLimits:
        """The limits as a client is told them."""
        return WireLimits(
            max_items=self.max_items, max_body_bytes=self.max_body_bytes, max_pixels=self.max_pixels, max_total_pixels=self.max_total_pixels
        )
