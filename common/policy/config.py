"""What to load and what to train of it."""

from typing import Literal

from pydantic import Field

from common.config import StrictModel

SD3_ATTENTION = (
    "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
    "attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v",
)  # fmt: skip


class LoraConfig(StrictModel):
    """The trained low-rank update; always float32."""

    rank: int = Field(32, ge=1)
    alpha: int = Field(64, ge=1)
    targets: tuple[str, ...] = SD3_ATTENTION  # module name endings inside the transformer
    init: Literal["gaussian", "default"] = "gaussian"  # of A; B is always 0, so a fresh adapter changes nothing


class ModelConfig(StrictModel):
    """A diffusers pipeline directory and how its text is padded."""

    family: Literal["sd3"] = "sd3"
    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the frozen base
    device: str = "cpu"
    max_sequence_length: int = Field(0, ge=0)  # T5 tokens; 0 without T5
    height: int = Field(64, ge=8)
    width: int = Field(64, ge=8)
    lora: LoraConfig = LoraConfig()
