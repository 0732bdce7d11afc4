"""What every objective promises, run on each one as its tiny recipe sets it up, and on every kernel that it takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from common.types import Manifest, RolloutGroup, SamplerSpec
from deploy.config import PROJECT, RunConfig, load_config, recipe_names, run_facts
from learner.config import LearnerConfig
from learner.objectives.registry import OBJECTIVES, settings_type
from learner.objectives.settings import BACKWARD_FORWARDS
from learner.update import Learner, make_learner
from rollout_workers.windows import make_window_plan
from tests.learner_fakes import manifest_of, sample_groups, sampler_spec, score_by_latents
from tests.learner_policies import StubPolicy, mixture_policy
from tests.mixture import near_target
from tests.resume_check import check_resume, flat

MAX_LINES = 150
GROUPS, GROUP_SIZE = 4, 8
RUN_SEED = 5
NOISY = ("flow_sde", "dance_sde", "cps", "dpm_sde")
ALL = pytest.mark.parametrize("name", sorted(OBJECTIVES))


@cache
def tiny_recipes() -> dict[str, RunConfig]:
    """Objective -> the first tiny recipe that trains with it."""
    found: dict[str, RunConfig] = {}
    for recipe in recipe_names():
        if recipe.startswith("tiny-geneval"):
            config = load_config(recipe, [])
            found.setdefault(config.learner.objective.name, config)
    return found


def kernels_of(name: str) -> list[str]:
    """Those that it can be trained on: an objective over clean latents samples as its recipe says, whatever the kernel."""
    facts = run_facts(tiny_recipes()[name])
    if not facts.window:
        return [facts.kernel]
    return [kernel for kernel in NOISY if not tiny_recipes()[name].learner.objective.problems(replace(facts, kernel=kernel))]


EACH = pytest.mark.parametrize(("name", "kernel"), [(name, kernel) for name in sorted(OBJECTIVES) for kernel in kernels_of(name)])


def test_the_kernels_that_are_tried_are_all_but_where_a_refusal_stands() -> None:
    tried = {name: kernels_of(name) for name in OBJECTIVES}
    gaussian = [kernel for kernel in NOISY if kernel != "cps"]
    assert tried["grpo"] == tried["dppo"] == tried["dance"] == list(NOISY)
    assert tried["guard"] == tried["tempflow"] == gaussian
    assert all(kernels == ["ode"] for name, kernels in tried.items() if name not in ("grpo", "dppo", "dance", "guard", "tempflow"))


def spec_of(config: RunConfig, kernel: str) -> SamplerSpec:
    """How the recipe samples, on that kernel, in the two-dimensional world."""
    rollout = config.rollout
    window = make_window_plan(rollout.window, rollout.num_steps, config.run.seed).steps(0)
    return sampler_spec(
        kernel=kernel, num_steps=rollout.num_steps, window=window, noise_level=rollout.noise_level, snapshot=rollout.snapshot,
        shared_init=rollout.shared_init,
    )  # fmt: skip


def small(config: RunConfig, **changes: Any) -> LearnerConfig:
    """The recipe's learner on a few groups, at a constant rate."""
    facts = {
        "groups_per_update": GROUPS, "optimizer_steps": 2, "micro_batch": GROUPS * GROUP_SIZE, "learning_rate": 1e-3, "warmup_steps": 0,
        "decay_steps": 0, "weight_decay": 0.0, "anchor": "behavior",
    }  # fmt: skip
    return config.learner.model_copy(update=facts | changes)


def learner_of(name: str, **changes: Any) -> Learner:
    """A learner of two-dimensional latents."""
    return make_learner(mixture_policy(), small(tiny_recipes()[name], **changes), {"r": 1.0}, RUN_SEED)


def batch_for(
    learner: Learner, name: str, update: int, reward: Any = near_target, *, kernel: str | None = None
) -> tuple[Manifest, list[RolloutGroup]]:
    """An update's groups, sampled with the snapshot that the recipe names, on its kernel or another."""
    spec = spec_of(tiny_recipes()[name], kernel or tiny_recipes()[name].rollout.kernel)
    numbers = range((update - 1) * GROUPS, update * GROUPS)
    with learner.policy.using(learner.snapshot_state(spec.snapshot)):
        groups = sample_groups(learner.policy, numbers, GROUP_SIZE, spec, version=update - 1, run_seed=RUN_SEED)
    return manifest_of(update, groups, score_by_latents(groups, reward)), groups


@ALL
def test_it_stands_in_one_short_file_under_its_name_with_a_recipe_that_agrees_with_it(name: str) -> None:
    module = OBJECTIVES[name].partition(":")[0]
    path = Path(PROJECT, *module.split(".")).with_suffix(".py")
    assert len(path.read_text().splitlines()) <= MAX_LINES
    assert settings_type(name)(name=name).name == name  # every other key has a default
    config = tiny_recipes()[name]  # parsed: so no problem
    assert config.learner.objective.problems(run_facts(config)) == []
    assert config.images_per_update == 192


@EACH
def test_an_update_is_a_function_of_its_files_and_seed_alone(name: str, kernel: str) -> None:
    first, second = learner_of(name), learner_of(name)
    torch.manual_seed(1)
    first.update(*batch_for(first, name, 1, kernel=kernel))
    torch.manual_seed(2)
    torch.rand(100)
    second.update(*batch_for(second, name, 1, kernel=kernel))
    assert torch.equal(flat(first.live), flat(second.live))
    assert not torch.equal(flat(first.live), flat(learner_of(name).live))  # it does learn


@EACH
def test_the_cut_into_micro_batches_does_not_change_the_gradient(name: str, kernel: str) -> None:
    gradients = []
    for micro_batch in (GROUPS * GROUP_SIZE, GROUP_SIZE):
        learner = learner_of(name, micro_batch=micro_batch, optimizer_steps=1, max_grad_norm=1e9)
        parameters = learner.policy.adapter_parameters()
        learner.optimizer = torch.optim.SGD(parameters, lr=0.0)  # type: ignore[assignment]
        found: list[torch.Tensor] = []
        learner.optimizer.register_step_pre_hook(
            lambda *_, found=found, parameters=parameters: found.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
        )
        learner.update(*batch_for(learner, name, 1, kernel=kernel))
        gradients.extend(found)
    whole, cut = gradients
    assert float((cut - whole).norm() / whole.norm()) < 1e-6  # O8


@EACH
def test_a_constant_reward_moves_nothing(name: str, kernel: str) -> None:
    learner = learner_of(name)
    before = flat(learner.live).clone()
    learner.update(*batch_for(learner, name, 1, reward=lambda clean: 0.25, kernel=kernel))
    assert torch.equal(flat(learner.live), before)  # O11: flat groups are masked


@EACH
def test_six_updates_equal_three_saved_loaded_elsewhere_and_three_more(name: str, kernel: str) -> None:
    check_resume(lambda: learner_of(name), lambda learner, update: batch_for(learner, name, update, kernel=kernel), updates=6, cut=3)


class CountingPolicy:
    """What an update's velocities cost, in no-grad forwards of one latent."""

    def __init__(self, policy: StubPolicy) -> None:
        self.policy, self.cost = policy, 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count every velocity of the policy inside."""
        velocity = self.policy.velocity

        def counting(latents: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            guided = 2.0 if options.get("guidance_scale", 1.0) > 1 else 1.0
            self.cost += len(latents) * (BACKWARD_FORWARDS if torch.is_grad_enabled() else guided)
            return velocity(latents, *arguments, **options)

        self.policy.velocity = counting  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.policy.velocity = velocity  # type: ignore[method-assign]


@ALL
def test_its_cost_is_what_it_says(name: str) -> None:
    config = tiny_recipes()[name]
    learner = learner_of(name)
    learner.update(*batch_for(learner, name, 1))  # the first update of a process asks the gates too
    batch = batch_for(learner, name, 2)
    assert isinstance(learner.policy, StubPolicy)
    counter = CountingPolicy(learner.policy)
    with counter.counted():
        result = learner.update(*batch)
    facts = replace(run_facts(config), recomputes=False)
    assert counter.cost == pytest.approx(config.learner.objective.forwards(facts) * result.metrics["num_samples"], rel=1e-6)
    trained = config.learner.advantage.num_trained(GROUP_SIZE) * int((~result.batch.flat).sum())
    assert result.metrics["num_samples"] == trained  # what the plan multiplies by
    assert all(value == value and abs(value) < float("inf") for value in result.metrics.values())
    assert torch.equal(flat(learner.policy.read_adapter()), flat(mixture_policy().read_adapter()))  # the policy is left as it was found
