"""How to load an exported LoRA: the code of each format, as it stands in the card and as the tests run it."""

from typing import Final

from common.policy.index import PIPELINES
from deploy.config import RunConfig
from deploy.lora.kohya import KOHYA_WEIGHTS
from deploy.model_card.sources import BaseFacts

_SEED: Final = 0
_SCHEDULER: Final = """\
pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(  # the grid that the run sampled with
    pipe.scheduler.config, use_dynamic_shifting=False, shift={shift}
)"""
_KOHYA: Final = """\
from safetensors.torch import load_file

lora = load_file({file!r})  # run it in the directory of this file
changes = {{}}  # the checkpoint's module, "_" for "." -> what is added to its weight
for name in sorted(key.removesuffix(".alpha") for key in lora if key.endswith(".alpha")):
    down, up = lora[name + ".lora_down.weight"], lora[name + ".lora_up.weight"]
    changes[name.removeprefix("lora_unet_")] = lora[name + ".alpha"] / down.shape[0] * (up @ down)
"""


def load_code(fmt: str, config: RunConfig, base: BaseFacts, prompt: str) -> str:
    """Return a Python program that loads the LoRA and draws one image; it is run in the export's directory.

    Args:
        fmt: peft, diffusers or kohya (which only shows what the tensors mean: diffusers reads no such SD3 file).
        config: the run's; images are drawn as its frozen evaluation draws them.
        base: where the base model is loaded from.
        prompt: what to draw.
    """
    if fmt == "kohya":
        return _KOHYA.format(file=KOHYA_WEIGHTS)
    load = 'PeftModel.from_pretrained(pipe.transformer, ".")  # changes pipe.transformer in place; "." is the directory of this file'
    pipeline = PIPELINES[config.model.family]
    shift = config.model.grid_shift
    imports = ["import torch", f"from diffusers import {'FlowMatchEulerDiscreteScheduler, ' if shift else ''}{pipeline}"]
    if fmt == "peft":
        imports.append("from peft import PeftModel")
    else:
        load = 'pipe.load_lora_weights(".")  # the directory of this file'
    evaluation, model = config.evaluation, config.model
    return "\n".join(
        [
            *imports, "", f"pipe = {pipeline}.from_pretrained({_base_arguments(config, base)})", *([_SCHEDULER.format(shift=shift)] if shift else []), load,
            "image = pipe(",
            f"    {prompt!r}, num_inference_steps={evaluation.num_steps}, {_guidance(config)},",
            f"    height={model.height}, width={model.width}, max_sequence_length={model.max_sequence_length},",
            f"    generator=torch.Generator().manual_seed({_SEED}),",
            ").images[0]",
        ]
    )  # fmt: skip


def _guidance(config: RunConfig) -> str:
    """The keyword of classifier-free guidance; FLUX has another one for it, since guidance_scale is what a distilled model is told."""
    scale, told = config.evaluation.guidance_scale, config.model.embedded_guidance
    if config.model.family != "flux":
        return f"guidance_scale={scale}"
    return f"guidance_scale={told}" + (f', negative_prompt="", true_cfg_scale={scale}' if scale > 1 else "")


def _base_arguments(config: RunConfig, base: BaseFacts) -> str:
    arguments = [repr(base.hub_id or base.path)]
    if base.revision:
        arguments.append(f"revision={base.revision!r}")
    if config.model.family == "sd3" and config.model.max_sequence_length == 0:  # a base without T5
        arguments.append("text_encoder_3=None, tokenizer_3=None")
    if config.model.dtype != "float32":
        arguments.append(f"torch_dtype=torch.{config.model.dtype}")
    return ", ".join(arguments)
