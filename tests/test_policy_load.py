"""A model directory that cannot be read is refused in one line that names the place: never a traceback, never noise for weights."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from common.errors import ModelError
from common.policy.model_files import count_tensors
from tests.policy_cases import policy_of

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def cut(name: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: len(content) // 2])

    return damage


def removed(name: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(text)


def one_tensor_gone(root: Path) -> None:
    tensors = load_file(root / TRANSFORMER)
    tensors.pop("transformer_blocks.1.attn.to_q.weight")
    save_file(tensors, root / TRANSFORMER)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123456\n"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "index cut": (cut("model_index.json"), "model_index.json"),
    "transformer folder missing": (removed("transformer"), "transformer"),
    "transformer weights missing": (removed(TRANSFORMER), "transformer"),
    "transformer weights cut": (cut(TRANSFORMER), TRANSFORMER),
    "transformer weights a pointer": (written(TRANSFORMER, POINTER), TRANSFORMER),
    "transformer tensor missing": (one_tensor_gone, "transformer"),
    "vae weights cut": (cut("vae/diffusion_pytorch_model.safetensors"), "vae/diffusion_pytorch_model.safetensors"),
    "vae config cut": (cut("vae/config.json"), "vae/config.json"),
    "text encoder cut": (cut("text_encoder_2/model.safetensors"), "text_encoder_2/model.safetensors"),
    "tokenizer cut": (cut("tokenizer/tokenizer.json"), "tokenizer/tokenizer.json"),
    "tokenizer without words": (removed("tokenizer/tokenizer.json"), "tokenizer"),
    "scheduler missing": (removed("scheduler/scheduler_config.json"), "scheduler"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_directory_is_refused_in_one_line_that_names_the_place(tiny_sd3_dir: Path, tmp_path: Path, name: str) -> None:
    damage, place = DAMAGES[name]
    root = tmp_path / "model"
    shutil.copytree(tiny_sd3_dir, root)
    damage(root)
    with pytest.raises(ModelError) as caught:
        policy_of(root)
    message = str(caught.value)
    assert str(root) in message
    assert place in message.replace(str(root), "", 1)
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_an_undamaged_copy_loads(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    """Else the test above would pass for the wrong reason."""
    assert policy_of(Path(shutil.copytree(tiny_sd3_dir, tmp_path / "model"))).num_adapter_modules == 15


def test_weights_that_pickle_are_not_read(tiny_sd3_dir: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny_sd3_dir, tmp_path / "model"))
    (root / TRANSFORMER).rename(root / "transformer/diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        policy_of(root)


def test_tensors_are_counted_from_the_header_alone(tiny_sd3_dir: Path) -> None:
    assert count_tensors(tiny_sd3_dir / TRANSFORMER) == len(load_file(tiny_sd3_dir / TRANSFORMER))
