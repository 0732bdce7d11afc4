"""What cannot be trained together is refused before anything starts: the reason and the remedy, in words."""

from dataclasses import dataclass

import pytest

from common.errors import ConfigError
from deploy.config import load_config
from deploy.plan import describe

NFT, GRPO = "tiny-geneval", "tiny-geneval-grpo"
SDE = ["rollout.kernel=flow_sde", "rollout.noise_level=0.7", "rollout.window.kind=first", "rollout.snapshot=live"]
TRAJECTORY = ("grpo", "guard", "dppo", "tempflow", "dance")
CLIPPED = ("grpo", "guard", "tempflow", "dance")


@dataclass(frozen=True, slots=True, kw_only=True)
class Clash:
    """Settings that do not fit, and what the refusal says."""

    recipe: str
    sets: tuple[str, ...]
    reason: str
    remedy: str


def objective(name: str, **keys: object) -> str:
    """A --set that chooses an objective."""
    table = ", ".join(f"{key} = {value}" for key, value in keys.items())
    return f'learner.objective={{name = "{name}"{", " if table else ""}{table}}}'


def refusal(recipe: str, sets: tuple[str, ...]) -> str:
    """The one line that the refused configuration ends with."""
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, list(sets))
    return str(caught.value)


CLASHES: dict[str, Clash] = {
    **{
        f"{name} without stochastic steps": Clash(
            recipe=NFT, sets=(objective(name), "rollout.snapshot=live"),
            reason=f"objective {name} trains on stochastic steps, and rollout.kernel='ode' or window.kind='none' makes none",
            remedy="choose flow_sde with a window, or an objective of clean latents",
        )
        for name in TRAJECTORY
    },
    "a window of no steps": Clash(
        recipe=GRPO, sets=("rollout.window.kind=none",), reason="window.kind='none' makes none", remedy="choose flow_sde with a window",
    ),
    "noise of level 0": Clash(
        recipe=GRPO, sets=("rollout.noise_level=0",), reason="objective grpo needs rollout.noise_level > 0", remedy="for flow_sde is 0.7",
    ),
    **{
        f"the last step of {kernel} in a {kind} window": Clash(
            recipe=GRPO, sets=(f"rollout.kernel={kernel}", f"rollout.window.kind={kind}"),
            reason=f"the {kernel} kernel has no noise at the last step, so it cannot be trained",
            remedy="use window.kind='drop_last' or end the window before it",
        )
        for kind in ("all", "random", "sliding")
        for kernel in ("cps", "dpm_sde")
    },
    "a KL under cps": Clash(
        recipe=GRPO, sets=("rollout.kernel=cps", "learner.objective.kl_beta=0.1"),
        reason="cps has no Gaussian KL", remedy="set learner.objective.kl_beta=0",
    ),
    "guard on cps": Clash(
        recipe=GRPO, sets=("rollout.kernel=cps", objective("guard")), reason="objective guard", remedy="set rollout.kernel to flow_sde",
    ),
    "tempflow on cps": Clash(
        recipe=GRPO, sets=("rollout.kernel=cps", objective("tempflow")), reason="objective tempflow", remedy="set rollout.kernel to flow_sde",
    ),
    "a window for each group": Clash(
        recipe=GRPO, sets=("rollout.window.shared=false",),
        reason="inflates the groups' spread and collapses training", remedy="leave shared out, or set window.kind='random'",
    ),
    **{
        f"a clip range of summed log-probs in {name}": Clash(
            recipe=GRPO, sets=(objective(name, clip_range=0.2),),
            reason=f"objective {name} clips ratios of mean log-probs, and learner.objective.clip_range=0.2 is the scale of a sum",
            remedy="at most 0.05, the published values are 1e-5 to 1e-3 (guard: 2e-6)",
        )
        for name in CLIPPED
    },
    "a limit of dppo that is of a sum": Clash(
        recipe=GRPO, sets=(objective("dppo", kl_limit=0.66),), reason="learner.objective.kl_limit=0.66 is the scale of a sum", remedy="at most 0.05",
    ),
    "a rollout snapshot that nobody keeps": Clash(
        recipe=GRPO, sets=("rollout.snapshot=behavior",),
        reason="rollout.snapshot='behavior', and objective grpo keeps live, ema", remedy="name one of them",
    ),
    "an evaluation snapshot that nobody keeps": Clash(
        recipe=NFT, sets=("evaluation.snapshot=ema_ref",),
        reason="evaluation.snapshot='ema_ref', and objective nft keeps live, ema, behavior", remedy="name one of them",
    ),
    "nft that samples with the live weights": Clash(
        recipe=NFT, sets=("rollout.snapshot=live",),
        reason="objective nft samples with its behavior snapshot", remedy="set rollout.snapshot='behavior'",
    ),
    "split groups in dgpo": Clash(
        recipe=NFT, sets=(objective("dgpo"), "rollout.snapshot=live", "learner.micro_batch=8"),
        reason="objective dgpo couples the members of a group, and learner.micro_batch=8 is less than rollout.group_size=16",
        remedy="raise micro_batch to it",
    ),
    "a split pair in dpo": Clash(
        recipe=NFT, sets=(objective("dpo"), "rollout.snapshot=live", "learner.advantage.kind=pair", "learner.micro_batch=1"),
        reason="objective dpo couples the two of a pair", remedy="raise it to 2 or more",
    ),
    "dpo on whole groups": Clash(
        recipe=NFT, sets=(objective("dpo"), "rollout.snapshot=live"),
        reason="objective dpo trains on the best and the worst of each group", remedy="set learner.advantage.kind='pair'",
    ),
    "sft on whole groups": Clash(
        recipe=NFT, sets=(objective("sft"), "rollout.snapshot=live"), reason="bad ones too", remedy="set learner.advantage.kind='best'",
    ),
    "dgpo on single images": Clash(
        recipe=NFT, sets=(objective("dgpo"), "rollout.snapshot=live", "learner.advantage.kind=best"),
        reason="learner.advantage.kind='best' leaves one", remedy="set it to 'group_std'",
    ),
    "awm that nothing bounds": Clash(
        recipe=NFT, sets=(objective("awm", ema_kl_beta=0, kl_beta=0), "rollout.snapshot=live"),
        reason="has nothing that bounds an update", remedy="set learner.objective.ema_kl_beta",
    ),
    "dance that must train the last step": Clash(
        recipe=GRPO, sets=(objective("dance", step_fraction=1.0), "rollout.window.kind=all"),
        reason="objective dance never trains the last step", remedy="set rollout.window.kind='drop_last'",
    ),
    "a guided KL without weight": Clash(
        recipe=NFT, sets=("learner.objective.kl_beta=0.0",), reason="guides a KL whose weight is 0", remedy="set kl_beta, or leave it out",
    ),
    "more sigmas than there are": Clash(
        recipe=NFT, sets=("learner.objective.timesteps_per_sample=6",), reason="exceeds the 5 sigmas to draw from", remedy="lower it",
    ),
    "more than the group": Clash(
        recipe=GRPO, sets=("learner.advantage.subset=18",), reason="subset=18 exceeds rollout.group_size=16", remedy="lower it",
    ),
    "half a subset": Clash(
        recipe=GRPO, sets=("learner.advantage.subset=3",), reason="subset=3 is odd", remedy="make it even, or 0 for all",
    ),
}  # fmt: skip


@pytest.mark.parametrize("clash", CLASHES.values(), ids=CLASHES)
def test_what_does_not_fit_is_refused_with_its_reason_and_remedy(clash: Clash) -> None:
    said = refusal(clash.recipe, clash.sets)
    assert clash.reason in said
    assert clash.remedy in said.partition(clash.reason)[2]


FITTING: dict[str, tuple[str, tuple[str, ...]]] = {
    "cps up to the step before the last": (GRPO, ("rollout.kernel=cps", "rollout.window.kind=drop_last")),
    "guard on dpm_sde, whose log-prob is a Gaussian's": (
        GRPO, ("rollout.kernel=dpm_sde", "rollout.window.kind=drop_last", objective("guard")),
    ),
    "a KL on dpm_sde": (GRPO, ("rollout.kernel=dpm_sde", "rollout.window.kind=drop_last", "learner.objective.kl_beta=0.01")),
    "cps with a window that ends before the last": (
        GRPO, ("rollout.kernel=cps", "rollout.window.kind=sliding", "rollout.window.stop=5"),
    ),
    "guard on the constant-noise kernel": (GRPO, ("rollout.kernel=dance_sde", objective("guard"))),
    "the largest clip range": (GRPO, ("learner.objective.clip_range=0.05",)),
    "one shared window, said aloud": (GRPO, ("rollout.window.shared=true",)),
    "rollouts from the ema": (GRPO, ("rollout.snapshot=ema",)),
    "evaluation of nft's behavior": (NFT, ("evaluation.snapshot=behavior",)),
    "awm sampling from its reference": (NFT, (objective("awm"), "rollout.snapshot=ema_ref")),
    "whole groups of dgpo in one forward": (NFT, (objective("dgpo"), "rollout.snapshot=live", "learner.micro_batch=16")),
    "clean latents of an SDE": (NFT, (objective("awm"), *SDE)),
    "awm's range of ratios that are no log-prob means": (NFT, (objective("awm", clip_range=1.0), "rollout.snapshot=live")),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "sets"), FITTING.values(), ids=FITTING)
def test_what_lies_just_inside_the_rules_is_accepted(recipe: str, sets: tuple[str, ...]) -> None:
    load_config(recipe, list(sets))


def test_all_problems_are_told_at_once() -> None:
    said = refusal(GRPO, ("rollout.kernel=cps", "rollout.window.kind=all", "learner.objective.clip_range=0.2", "evaluation.snapshot=gone"))
    assert all(words in said for words in ("no noise at the last step", "scale of a sum", "evaluation.snapshot='gone'"))


@pytest.mark.parametrize("name", ["nft", "awm"])
def test_guided_sampling_for_an_unguided_loss_is_warned_of_and_allowed(name: str) -> None:
    sets = [] if name == "nft" else [objective(name), "rollout.snapshot=live"]
    plain, guided = (describe(load_config(NFT, [*sets, f"rollout.guidance_scale={scale}"]), local=False) for scale in (1.0, 4.5))
    words = f"warning: objective {name} fits the unguided velocity to images that rollout.guidance_scale=4.5 made"
    assert not any("guidance_scale=" in line for line in plain if line.startswith("warning"))
    assert any(line.startswith(words) and line.endswith("set rollout.guidance_scale=1") for line in guided)
