"""Which prompt a group number draws: an epoch's shuffle, a pure function of the number."""

from collections.abc import Mapping, Sequence

from common.errors import DataError
from common.seeding import derive_seed
from common.types import Prompt


class PromptOrder:
    """number -> Prompt: every epoch visits every prompt once, in an order that derives from (run seed, epoch)."""

    def __init__(self, prompts: Sequence[Prompt], run_seed: int) -> None:
        if not prompts:
            raise DataError("prompts: the training file holds none; a run needs at least one prompt; add some")
        self._prompts = tuple(prompts)
        self._run_seed = run_seed
        self._orders: dict[int, list[int]] = {}  # of the last epochs asked for

    def __call__(self, number: int) -> Prompt:
        """The prompt of a group number."""
        epoch, position = divmod(number, len(self._prompts))
        if epoch not in self._orders:
            seed = derive_seed(self._run_seed, "prompts", epoch)
            order = sorted(range(len(self._prompts)), key=lambda index: derive_seed(seed, index))
            self._orders = {**dict(list(self._orders.items())[-2:]), epoch: order}
        return self._prompts[self._orders[epoch][position]]


class BalancedOrder:
    """number -> Prompt with the tags in turn: a cycle of numbers draws each tag as often as its weight says.

    Within a tag every epoch visits every prompt once. For prompt files whose tasks differ in size or in difficulty (the paper
    trains GenEval on position, counting, color attribution, colors and two objects as 7 : 5 : 3 : 1 : 1).
    """

    def __init__(self, prompts: Sequence[Prompt], run_seed: int, weights: Mapping[str, int] | None = None) -> None:
        """Prepare the cycle.

        Args:
            weights: tag -> how often a cycle draws it; a tag that is absent counts 1, 0 leaves a tag out.

        Raises:
            DataError: no prompts, or a weight for a tag that no prompt has.
        """
        tags = sorted({prompt.tag for prompt in prompts})
        given = dict(weights or {})
        unknown = sorted(given.keys() - set(tags))
        if unknown:
            raise DataError(f"prompts: tag_weights names {unknown}, the training file has the tags {tags}; mend prompts.tag_weights")
        self._orders = {
            tag: PromptOrder([prompt for prompt in prompts if prompt.tag == tag], derive_seed(run_seed, "tag", tag)) for tag in tags
        }
        self._cycle = sorted(
            ((turn + 0.5) / count, tag, turn) for tag in tags for count in [given.get(tag, 1)] for turn in range(count)
        )  # spread evenly over the cycle
        if not self._cycle:
            raise DataError("prompts: nothing is left to train on; a run needs at least one prompt whose tag has a weight; add some")
        self._counts = {tag: given.get(tag, 1) for tag in tags}

    def __call__(self, number: int) -> Prompt:
        """The prompt of a group number."""
        cycle, place = divmod(number, len(self._cycle))
        _, tag, turn = self._cycle[place]
        return self._orders[tag](cycle * self._counts[tag] + turn)
