"""The images, read and not built: no Docker daemon is needed."""

import re
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from deploy.config import PROJECT
from deploy.environment import commit
from tests.dockerfiles import instructions, last, problems, travels, variables

DOCKER = PROJECT / "deploy" / "docker"
KINDS = ("cpu", "cuda")


def dockerfile(kind: str) -> str:
    """Its text."""
    return (DOCKER / f"Dockerfile.{kind}").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_keeps_the_projects_rules(kind: str) -> None:
    assert problems(dockerfile(kind), PROJECT) == []


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("python:3.11.14-slim-bookworm\n", "python:latest\n", "no fixed version"),
        ("USER 10001:10001", "USER root", "not root's"),
        ("USER 10001:10001", "USER 0", "not root's"),
        ("COPY models ", "COPY weights ", "not in the checkout"),
        ("COPY models ", "COPY docs ", "holds it back"),
        ("COPY models ", "ADD models ", "use COPY"),
        ("pip install -c constraints.txt -e", "pip install -e", "without constraints.txt"),
        ("ARG REVISION=unknown", "ARG HF_TOKEN", "does not belong"),
        ("--no-install-recommends ", "", "recommends"),
        ("python -m venv /opt/venv\n", "wget -q -O- https://example.com/x.sh | sh\n", "nothing checks"),
    ],
)
def test_a_planted_mistake_is_found(before: str, after: str, told: str) -> None:
    text = dockerfile("cpu")
    assert before in text
    assert [found for found in problems(text.replace(before, after), PROJECT) if told in found]


def test_both_images_are_one_but_for_torch_and_the_gpu() -> None:
    cpu, cuda = (instructions(dockerfile(kind)) for kind in KINDS)
    assert len(cpu) == len(cuda)
    differing = {word for one, other in zip(cpu, cuda, strict=True) if one != other for word in (one[0], other[0])}
    assert differing == {"ARG", "LABEL", "ENV"}
    indexes = [variables(found)["TORCH_INDEX"] for found in (cpu, cuda)]
    assert indexes[0] == "https://download.pytorch.org/whl/cpu"
    assert re.fullmatch(r"https://download\.pytorch\.org/whl/cu\d{3}", indexes[1])


def test_the_locked_set_is_installed_with_extras_that_exist() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = dockerfile("cpu")
    extras = re.search(r'-e "\.\[([\w,]+)\]"', text)
    assert extras and set(extras[1].split(",")) <= set(project["optional-dependencies"])
    constraints = (PROJECT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert len([line for line in constraints if line.startswith("torch==")]) == 1, "what the torch step greps for"
    for kind in KINDS:
        assert f'image.version="{project["version"]}"' in last(instructions(dockerfile(kind)), "LABEL")


def test_every_package_of_the_project_is_copied() -> None:
    packages = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    copied = {rest.split()[0] for word, rest in instructions(dockerfile("cpu")) if word == "COPY"}
    assert {package.partition(".")[0] for package in packages} <= copied


def test_only_what_an_image_needs_travels_to_the_builder() -> None:
    ignore = (PROJECT / ".dockerignore").read_text(encoding="utf-8")
    sent = [path.name for path in PROJECT.iterdir() if travels(path.name, ignore)]
    assert sorted(sent) == sorted(
        [
            "LICENSE",
            "README.md",
            "constraints.txt",
            "pyproject.toml",
            "common",
            "deploy",
            "learner",
            "models",
            "reward_servers",
            "rollout_workers",
        ]
    )
    kept = [
        ".git/config",
        ".env",
        "deploy/.env",
        "deploy/.env.local",
        "deploy/key.pem",
        "common/__pycache__/x.pyc",
        "runs/a/config.json",
        "token",
    ]
    assert not [path for path in kept if travels(path, ignore)]
    assert travels("deploy/recipes/tiny-geneval.toml", ignore) and travels("models/tiny-sd3/model_index.json", ignore)


def test_the_default_command_is_the_smoke_test_and_exists() -> None:
    from deploy.cli import app

    found = instructions(dockerfile("cuda"))
    assert last(found, "ENTRYPOINT") == '["tini", "--", "flowfleet"]'
    assert last(found, "CMD") == '["doctor", "--quick"]'
    command = get_command(app)
    doctor = command.commands["doctor"]  # type: ignore[attr-defined]
    assert "--quick" in [option for parameter in doctor.params for option in parameter.opts]


def test_an_image_says_what_it_was_built_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert variables(instructions(dockerfile("cpu")))["FLOWFLEET_COMMIT"] == "${REVISION}"
    monkeypatch.setattr("deploy.environment.PROJECT", tmp_path)  # an installation without git's folder
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("FLOWFLEET_COMMIT", "0123abcd")
    assert commit() == "0123abcd"
    monkeypatch.delenv("FLOWFLEET_COMMIT")
    assert commit() == "unknown"
