"""`--fake rollout=1.0s,learner=1.0s,reward=0.3s`: fake engines for every role, from the command line."""

import re
from dataclasses import dataclass

from common.errors import ConfigError
from common.fakes import FakeSpec

_ROLES = ("rollout", "learner", "reward")
_RANGE = re.compile(r"(\d+(?:\.\d+)?)s(?:\.\.(\d+(?:\.\d+)?)s)?")
_RULE = "write --fake rollout=1.0s,learner=1.0s,reward=0.3s; a role whose slots differ takes a range: rollout=0.2s..2.6s"


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeEngines:
    """One FakeSpec a role; fake engines replace all three, since they share fake weights and images."""

    rollout: FakeSpec
    learner: FakeSpec
    reward: FakeSpec

    def describe(self) -> str:
        """One line for the plan."""
        parts = ", ".join(f"{role} {_text(spec)}" for role, spec in zip(_ROLES, (self.rollout, self.learner, self.reward), strict=True))
        return f"fake engines ({parts} a unit of work): they sleep; no model is loaded, nothing is learned"


def parse_fakes(text: str) -> FakeEngines:
    """Return the engines that the option names.

    Raises:
        ConfigError: a part that is not role=seconds, an unknown, repeated or missing role, a range that is none.
    """
    specs: dict[str, FakeSpec] = {}
    for part in text.split(","):
        role, separator, value = (word.strip() for word in part.partition("="))
        if not separator or role not in _ROLES:
            raise ConfigError(f"--fake: {part.strip()!r} is not ROLE=SECONDS of a role among {', '.join(_ROLES)}; {_RULE}")
        if role in specs:
            raise ConfigError(f"--fake: {role} stands twice; keep one")
        specs[role] = _parse_spec(role, value)
    missing = [role for role in _ROLES if role not in specs]
    if missing:
        raise ConfigError(f"--fake: {', '.join(missing)} is missing; fake engines replace all three roles; {_RULE}")
    return FakeEngines(rollout=specs["rollout"], learner=specs["learner"], reward=specs["reward"])


def _parse_spec(role: str, value: str) -> FakeSpec:
    found = _RANGE.fullmatch(value)
    if found is None:
        raise ConfigError(f"--fake: {role}={value!r} is not a duration in seconds, such as 0.5s; {_RULE}")
    least_s = float(found[1])
    most_s = float(found[2]) if found[2] else least_s
    if most_s < least_s or (most_s > least_s and least_s == 0):
        raise ConfigError(f"--fake: {role}={value} is no range; it must rise and start above 0s; {_RULE}")
    return FakeSpec(least_s=least_s, most_s=most_s)


def _text(spec: FakeSpec) -> str:
    return f"{spec.least_s:g} s" if spec.least_s == spec.most_s else f"{spec.least_s:g} to {spec.most_s:g} s"
