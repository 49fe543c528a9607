r"""Held-out perplexity over a whole split, with windows that overlap by a stride.

.. math::
  \mathrm{PPL} = \exp\Bigl(
  -\frac{1}{N} \sum_{i=1}^{N} \log p(x_i \mid x_{s(i)}, \dots, x_{i-1})\Bigr)

Every token of the text is scored once, in the window that starts at :math:`s(i)`: the first window
scores all that it has, and each further one its last `stride` tokens, which so have at least
`seq_len - stride` tokens of context. Separators are context, and are not scored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments.errors import UserError
from experiments.token_cache import TokenStream


class Windows(NamedTuple):
    """Overlapping windows of a split, in batches.

    Attributes:
      tokens: Token ids, int32 of shape (m, b, t + 1); 0 behind the end of the text.
      weights: 1 for the targets `tokens[..., 1:]` that this window scores and 0 for the others,
        float32 of shape (m, b, t). Windows that fill up the last batch have no 1.
    """

    tokens: np.ndarray
    weights: np.ndarray


class Perplexity(NamedTuple):
    """What a model scores on a split.

    Attributes:
      loss: Mean cross-entropy in nats per token.
      perplexity: Its exponential; infinite where the loss is not finite.
      tokens: Number of tokens scored.
    """

    loss: float
    perplexity: float
    tokens: int


def strided_windows(stream: TokenStream, *, seq_len: int, stride: int, batch_size: int) -> Windows:
    """Cuts a split into overlapping windows that score each of its tokens once.

    Args:
      stream: The documents of the split; context reaches across their borders.
      seq_len: Number of predicted tokens t per window.
      stride: Distance of the windows, 1 ... t: a smaller one gives more context, and takes longer.
      batch_size: Number of windows b that the model sees at once.

    Returns:
      The windows.

    Example:
      >>> stream = TokenStream(np.array([0, 11, 12, 13, 14, 15]), np.array([0]))
      >>> windows = strided_windows(stream, seq_len=3, stride=1, batch_size=3)
      >>> windows.tokens[0].tolist()
      [[0, 11, 12, 13], [11, 12, 13, 14], [12, 13, 14, 15]]
      >>> windows.weights[0].astype(int).tolist()
      [[1, 1, 1], [0, 0, 1], [0, 0, 1]]
    """
    if not 1 <= stride <= seq_len:
        raise UserError(f"stride {stride}: must be in 1 ... {seq_len}, the length of a window")
    tokens, separators = stream
    last = len(tokens) - 1
    count = 1 + max(math.ceil((last - seq_len) / stride), 0)
    ends = seq_len + stride * np.arange(count)  # The last target of each window.
    scored = np.concatenate([[0], ends[:-1]])  # Up to here, earlier windows have scored.
    # The last window is moved back to the end of the text, and has more context for that.
    starts = np.clip(ends, None, last) - seq_len
    places = np.maximum(starts, 0)[:, None] + np.arange(seq_len + 1)

    is_target = (places > scored[:, None]) & (places <= last)
    is_target &= ~np.isin(places, separators)
    windows = np.where(places <= last, tokens[np.minimum(places, last)], 0)
    fill = ((0, -count % batch_size), (0, 0))
    return Windows(
        np.pad(windows, fill).astype(np.int32).reshape(-1, batch_size, seq_len + 1),
        np.pad(is_target[:, 1:], fill).astype(np.float32).reshape(-1, batch_size, seq_len),
    )


def strided_perplexity(
    score: Callable[[np.ndarray, np.ndarray], tuple[jax.Array, jax.Array]], windows: Windows
) -> Perplexity:
    """Perplexity of a model over a whole split.

    Args:
      score: Function of tokens (b, t + 1) and weights (b, t) that returns the weighted sum of the
        cross-entropies in nats, and the sum of the weights.
      windows: From `strided_windows`.

    Returns:
      Loss and perplexity per token.
    """
    nats, count = 0.0, 0.0
    scores = itertools.starmap(score, zip(*windows, strict=True))
    # Pairs: the next batch is started before one is waited for.
    for (batch_nats, batch_count), _ in tqdm(
        itertools.pairwise(itertools.chain(scores, [None])),
        desc="scoring the held-out text",
        total=len(windows.tokens),
        unit="batch",
        delay=1,
        leave=False,
    ):
        nats += float(batch_nats)
        count += float(batch_count)
    loss = nats / count
    # exp(700) is near the largest float.
    return Perplexity(loss, math.exp(loss) if loss < 700 else math.inf, round(count))
