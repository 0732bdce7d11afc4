"""A watch reward that fails for some images, for a run whose failures are to be seen."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def picky(image: NDArray[np.uint8], prompt: str, metadata: Any) -> float:
    """Brightness in [0, 1]; raises for about one image in four, told by its pixels."""
    if int(image.sum()) % 4 == 0:
        raise ValueError("refused on purpose")
    return float(image.mean()) / 255
