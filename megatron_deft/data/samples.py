"""What a training sample is: as text, then as tokens. Every room of `data` speaks in these."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORE = -100  # the label of a position that is not trained, as in torch's cross_entropy


@dataclass(frozen=True)
class Rendered:
    """One sample as text: `pieces` joined are the whole text; `weights[i]` is for `pieces[i]`.

    A weight is what each token of the piece counts for in the loss: 0 is not trained, 1 is usual.
    """

    pieces: tuple[str, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Encoded:
    """One sample as tokens: `tokens` int32 [n], `weights` float32 [n].

    weights[i]: what predicting tokens[i] counts for in the loss; 0 where it is not trained. That of
    the first token is never used, since nothing predicts it.
    """

    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]
