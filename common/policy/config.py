"""What to load and what to train of it."""

from typing import Final, Literal, Self

from pydantic import Field, model_validator

from common.config import StrictModel

SD3_ATTENTION = (
    "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
    "attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v",
)  # fmt: skip
"""The attention projections of SD3's blocks; FLUX's double blocks have the same names, and its single blocks the q, k and v."""


class LoraConfig(StrictModel):
    """The trained low-rank update; always float32."""

    rank: int = Field(32, ge=1)
    alpha: int = Field(64, ge=1)
    targets: tuple[str, ...] = SD3_ATTENTION  # module name endings inside the transformer
    init: Literal["gaussian", "default"] = "gaussian"  # of A; B is always 0, so a fresh adapter changes nothing


DRAWN_BY: Final = ("height", "width", "max_sequence_length", "embedded_guidance", "grid_shift")
"""Keys of ModelConfig that say how images are drawn: two evaluations that differ in one do not compare."""


class ModelConfig(StrictModel):
    """A diffusers pipeline directory, what it is told beside the prompt, and what of it is trained."""

    family: Literal["sd3", "flux"] = "sd3"
    path: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the frozen base
    device: str = "cpu"
    max_sequence_length: int = Field(0, ge=0)  # T5 tokens; 0 without T5
    embedded_guidance: float = Field(0.0, ge=0)  # what a distilled FLUX is told (FLUX.1-dev: 3.5), in the same forward; 0: none
    grid_shift: float = Field(0.0, ge=0)  # in place of the scheduler's (DanceGRPO and MixGRPO on FLUX: 3); 0: the scheduler's
    gradient_checkpointing: bool = False  # a backward makes each block's activations again: less memory for one more forward
    height: int = Field(64, ge=8)
    width: int = Field(64, ge=8)
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _check_guidance(self) -> Self:
        if self.family != "flux" and self.embedded_guidance > 0:
            raise ValueError(f"embedded_guidance is FLUX's, and family is {self.family}; set it to 0, or family = flux")
        return self
