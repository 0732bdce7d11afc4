"""Which prompt a group number draws: an epoch's shuffle, a pure function of the number."""

from collections.abc import Sequence

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
    """number -> Prompt with the tags in turn: any T numbers in a row draw one prompt of each of the T tags.

    Within a tag every epoch visits every prompt once. For prompt files whose tasks differ in size.
    """

    def __init__(self, prompts: Sequence[Prompt], run_seed: int) -> None:
        tags = sorted({prompt.tag for prompt in prompts})
        self._orders = [
            PromptOrder([prompt for prompt in prompts if prompt.tag == tag], derive_seed(run_seed, "tag", tag)) for tag in tags
        ]  # fmt: skip
        if not self._orders:
            raise DataError("prompts: the training file holds none; a run needs at least one prompt; add some")

    def __call__(self, number: int) -> Prompt:
        """The prompt of a group number."""
        position, tag = divmod(number, len(self._orders))
        return self._orders[tag](position)
