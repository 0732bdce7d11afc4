"""Kohya's names: a list by hand, diffusers' own converter as the judge of what they mean, and a way back without loss."""

from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

from common.errors import ConfigError, ModelError
from common.policy.adapters import write_adapter_bytes
from common.policy.config import SD3_ATTENTION, LoraConfig, ModelConfig
from common.types import SnapshotInfo
from deploy.lora.export import export_adapter
from deploy.lora.files import is_lora, read_lora
from deploy.lora.kohya import KOHYA_WEIGHTS, KohyaLora, from_kohya, to_kohya
from tests.export_runs import trained_state

RANK, ALPHA, WIDTH = 2, 6, 4
MODEL = ModelConfig(path="base", lora=LoraConfig(rank=RANK, alpha=ALPHA))
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED = {"net.0.proj": (4 * WIDTH, WIDTH), "net.2": (WIDTH, 4 * WIDTH)}


def state_of(modules: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """A random adapter: module -> (out, in)."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for module, (rows, columns) in modules.items():
        state[f"{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
        state[f"{module}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator)
    return state


def whole_adapter() -> dict[str, torch.Tensor]:
    """Every module that has a name, in two blocks, as SD3.5-M has them: attn2 in the first; the last has no context output."""
    modules: dict[str, tuple[int, int]] = {}
    for block, last in ((0, False), (1, True)):
        own = [f"attn.{name}" for name in ATTENTION if not (last and name == "to_add_out")]
        own += [f"attn2.{name}" for name in ATTENTION[:4]] if not last else []
        modules |= {f"transformer_blocks.{block}.{name}": (WIDTH, WIDTH) for name in own}
        for stream in ("ff",) if last else ("ff", "ff_context"):
            modules |= {f"transformer_blocks.{block}.{stream}.{name}": shape for name, shape in FEED.items()}
    return state_of(modules)


def empty_checkpoint() -> dict[str, torch.Tensor]:
    """The original SD3 checkpoint's names, all weights 0: two blocks of width 4, attn2 in the first."""
    names = {
        "pos_embed": (1, 4, WIDTH), "x_embedder.proj.weight": (WIDTH, 1, 1, 1), "x_embedder.proj.bias": (WIDTH,),
        "context_embedder.weight": (WIDTH, WIDTH), "context_embedder.bias": (WIDTH,), "final_layer.linear.weight": (1, WIDTH),
        "final_layer.linear.bias": (1,), "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
        "final_layer.adaLN_modulation.1.bias": (2 * WIDTH,),
    }  # fmt: skip
    for embedder in ("t_embedder", "y_embedder"):
        names |= {f"{embedder}.mlp.{layer}.{end}": (WIDTH, WIDTH) for layer in (0, 2) for end in ("weight", "bias")}
    for block, last in ((0, False), (1, True)):
        layers = {"x_block.attn.qkv": (3 * WIDTH, WIDTH), "context_block.attn.qkv": (3 * WIDTH, WIDTH), "x_block.attn.proj": (WIDTH, WIDTH),
                  "x_block.mlp.fc1": (4 * WIDTH, WIDTH), "x_block.mlp.fc2": (WIDTH, 4 * WIDTH), "x_block.adaLN_modulation.1": (6 * WIDTH, WIDTH),
                  "context_block.adaLN_modulation.1": (6 * WIDTH, WIDTH)}  # fmt: skip
        if not last:
            layers |= {"context_block.attn.proj": (WIDTH, WIDTH), "context_block.mlp.fc1": (4 * WIDTH, WIDTH),
                       "context_block.mlp.fc2": (WIDTH, 4 * WIDTH), "x_block.attn2.qkv": (3 * WIDTH, WIDTH), "x_block.attn2.proj": (WIDTH, WIDTH)}  # fmt: skip
        for layer, shape in layers.items():
            names |= {f"joint_blocks.{block}.{layer}.weight": shape, f"joint_blocks.{block}.{layer}.bias": shape[:1]}
    return {name: torch.zeros(shape) for name, shape in names.items()}


def applied(lora: KohyaLora, checkpoint: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rule of every reader of such files: the name is the module's with "_" for ".", the scale alpha over the down's rows."""
    found = {"lora_unet_" + name.removesuffix(".weight").replace(".", "_"): name for name in checkpoint if name.endswith(".weight")}
    keys = sorted({key.partition(".")[0] for key in lora.tensors})
    assert set(keys) <= found.keys()
    for key in keys:
        down, up = lora.tensors[key + ".lora_down.weight"], lora.tensors[key + ".lora_up.weight"]
        checkpoint[found[key]] = checkpoint[found[key]] + float(lora.tensors[key + ".alpha"]) / down.shape[0] * (up @ down)
    return checkpoint


def test_the_keys_of_a_block_are_those_of_the_reference_list() -> None:
    modules = {f"transformer_blocks.7.attn.{name}": (WIDTH, WIDTH) for name in ATTENTION}
    modules |= {f"transformer_blocks.7.ff.{name}": shape for name, shape in FEED.items()}
    found = to_kohya(state_of(modules), MODEL).tensors
    names = [
        "lora_unet_joint_blocks_7_x_block_attn_qkv", "lora_unet_joint_blocks_7_x_block_attn_proj",
        "lora_unet_joint_blocks_7_context_block_attn_qkv", "lora_unet_joint_blocks_7_context_block_attn_proj",
        "lora_unet_joint_blocks_7_x_block_mlp_fc1", "lora_unet_joint_blocks_7_x_block_mlp_fc2",
    ]  # fmt: skip
    assert set(found) == {f"{name}.{end}" for name in names for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    qkv, plain = names[0], names[1]
    assert found[qkv + ".lora_down.weight"].shape == (3 * RANK, WIDTH)
    assert found[qkv + ".lora_up.weight"].shape == (3 * WIDTH, 3 * RANK)
    assert (float(found[qkv + ".alpha"]), float(found[plain + ".alpha"])) == (3.0 * ALPHA, float(ALPHA))  # over 3 r and over r rows


def test_applied_to_the_original_checkpoint_it_is_the_trained_change_by_diffusers_own_converter() -> None:
    state = whole_adapter()
    converted = convert_sd3_transformer_checkpoint_to_diffusers(applied(to_kohya(state, MODEL), empty_checkpoint()))
    modules = {name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")}
    assert len(modules) == 8 + 7 + 4 + 6
    for module in modules:
        change = ALPHA / RANK * state[module + ".lora_B.weight"] @ state[module + ".lora_A.weight"]
        # float32 sums over r in the one product, over 3 r with zeros between in the other
        torch.testing.assert_close(converted.pop(module + ".weight"), change, atol=1e-5, rtol=0)
    assert all(not tensor.any() for tensor in converted.values())  # and nothing else changed


def test_where_only_q_and_v_have_a_lora_k_stays_as_it_is() -> None:
    state = state_of({f"transformer_blocks.0.attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_v")})
    lora = to_kohya(state, MODEL)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(applied(lora, empty_checkpoint()))
    assert not converted["transformer_blocks.0.attn.to_k.weight"].any()
    for name in ("to_q", "to_v"):
        module = f"transformer_blocks.0.attn.{name}"
        change = ALPHA / RANK * state[module + ".lora_B.weight"] @ state[module + ".lora_A.weight"]
        torch.testing.assert_close(converted[module + ".weight"], change, atol=1e-5, rtol=0)
    back, _ = from_kohya(lora, "a test")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_a_kohya_file_reads_back_as_the_peft_export_bit_for_bit(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    model = ModelConfig(path=str(tiny_sd3_dir), lora=LoraConfig(rank=4, alpha=10, targets=(*SD3_ATTENTION, "ff.net.0.proj", "ff.net.2")))
    state = trained_state(model)
    content, _ = write_adapter_bytes({"ema": state}, {"ema": SnapshotInfo(num_modules=1, canary=0.1)}, incarnation=1, version=1)
    read = {}
    for fmt in ("peft", "kohya"):
        out = export_adapter(content, "ema", model, tmp_path / fmt, fmt)
        assert is_lora(out)
        read[fmt] = read_lora(out, tiny_sd3_dir)
    assert not any("base_model.model." in key for key in load_file(tmp_path / "kohya" / KOHYA_WEIGHTS))
    assert (read["kohya"].config.rank, read["kohya"].config.alpha) == (4, 10)
    assert read["kohya"].config == read["peft"].config
    assert read["kohya"].state.keys() == read["peft"].state.keys() == state.keys()
    assert all(torch.equal(read["kohya"].state[name], read["peft"].state[name]) for name in state)


@pytest.mark.parametrize("module", ["transformer_blocks.0.norm1.linear", "proj_out", "context_embedder"])
def test_a_module_without_a_settled_name_is_refused_with_its_name(module: str) -> None:
    with pytest.raises(ConfigError, match=f"{module} has no settled name.*--format diffusers"):
        to_kohya(state_of({module: (WIDTH, WIDTH)}), MODEL)


def test_another_family_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sd3 only, and this run's model\.family is flux"):
        to_kohya(whole_adapter(), MODEL.model_copy(update={"family": "flux"}))


def test_a_file_of_another_program_and_a_changed_one_are_refused(tmp_path: Path) -> None:
    lora = to_kohya(whole_adapter(), MODEL)
    with pytest.raises(ModelError, match="was not written by `flowfleet export"):
        from_kohya(KohyaLora(tensors=lora.tensors, header={}), "a.safetensors")
    key = "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight"
    changed = {**lora.tensors, key: lora.tensors[key] + 1.0}  # no longer on the diagonal: q would see k's directions
    save_file(changed, tmp_path / KOHYA_WEIGHTS, metadata=dict(lora.header))
    with pytest.raises(ModelError, match="changed since"):
        read_lora(tmp_path, tmp_path)
