"""Cross-entropy range setting: the range of the logits that keeps what their softmax says.

Where the last layer's output goes into a softmax, its values do not matter alike: the largest logits decide, and one
that is 15 below them may lie anywhere. So the range is chosen not by the error of the logits but by the cross-entropy
of their distributions (Nagel et al., 2021, section 3.1, "Cross entropy"):

    ``argmin_{range} H(softmax(v), softmax(v_hat(range)))``    ``H(p, q) = -sum_c p_c log q_c``, in nats

with ``v`` the FP32 logits of one sample, ``v_hat`` the same on the grid, and the mean over samples. It is the
divergence ``KL(p || q)`` plus the entropy of ``p``, which no range changes. Labels are not needed.

This needs whole rows of logits, which no histogram has: :class:`LogitRows` keeps a bounded sample of them.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_quantdebug.encoding import encoding_from_range
from lightning_quantdebug.errors import CalibrationError
from lightning_quantdebug.fake_quantize import fake_quantize
from lightning_quantdebug.range_setting import OF_HISTOGRAM, search_ranges
from lightning_quantdebug.target import QuantSpec

MOST_ROWS = 4096
"""At 4 bits the ends found for different samples of 4096 rows spread by 2 % of the range, of 256 rows by 4 %."""

MOST_VALUES = 2**19
"""Rows are fewer where they are long. An asymmetric search makes 511 passes over them: 5 s for 524 rows of 1000."""


class LogitRows:
    """A sample of the rows of logits seen, in bounded memory.

    Kept are the rows whose hash is least, so that the sample depends neither on the order of the rows nor on how they
    were cut into batches, and samples of several processes merge without loss (a bottom-k sketch: Cohen and Kaplan,
    2007). Rows with NaN or infinity are left out.

    Args:
        most_rows: Rows that are kept at the most.
        most_values: Logits that are kept at the most, of all rows together; one row is always kept.

    Attributes:
        count: Rows seen, but for those left out.

    Examples:
        >>> rows = LogitRows(most_rows=2)
        >>> rows.add(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        >>> rows.count, tuple(rows.logits.shape)
        (3, (2, 2))
    """

    def __init__(self, most_rows: int = MOST_ROWS, most_values: int = MOST_VALUES) -> None:
        """Begin with nothing seen."""
        self.count = 0
        self._most_rows = most_rows
        self._most_values = most_values
        self._hashes: NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)
        self._rows: NDArray[np.float32] = np.zeros((0, 0), dtype=np.float32)

    @property
    def logits(self) -> Tensor:
        """The rows kept, float32, shape ``(N, C)``, in an order of their own."""
        return torch.from_numpy(self._rows.copy())

    def add(self, logits: Tensor) -> None:
        """Take in one batch.

        Args:
            logits: Shape ``(N, C)``, floating-point.

        Raises:
            CalibrationError: If these are no logits: not two axes, not floating-point, fewer than two classes, or
                another number of classes than before.
        """
        if logits.ndim != 2 or not logits.is_floating_point() or logits.shape[1] < 2:
            raise CalibrationError(
                "Logits must be floating-point of shape (N, C) with two classes or more, got "
                f"{str(logits.dtype).removeprefix('torch.')} of shape {tuple(logits.shape)}."
            )
        rows = logits.detach().float().cpu()
        self._take(rows[rows.isfinite().all(1)].numpy())

    def merge(self, other: LogitRows) -> None:
        """Take in all that ``other`` has seen, as if it had been added here.

        Raises:
            CalibrationError: If the rows have another number of classes.
        """
        dropped = other.count - len(other._rows)
        self._take(other._rows)
        self.count += dropped

    def _take(self, rows: NDArray[np.float32]) -> None:
        """Keep the rows of least hash among those kept and ``rows``."""
        if not len(rows):
            return
        if self.count and rows.shape[1] != self._rows.shape[1]:
            raise CalibrationError(
                f"All rows of logits must have the same number of classes, got {rows.shape[1]} after "
                f"{self._rows.shape[1]}."
            )
        self.count += len(rows)
        hashes = np.array(
            [int.from_bytes(blake2b(row.tobytes(), digest_size=8).digest(), "little") for row in rows], dtype=np.uint64
        )
        hashes = np.concatenate([self._hashes, hashes])
        least = np.argsort(hashes, kind="stable")[: max(1, min(self._most_rows, self._most_values // rows.shape[1]))]
        self._hashes = hashes[least]
        self._rows = np.concatenate([self._rows, rows])[least] if self._rows.size else rows[least]


def softmax_cross_entropy(logits: Tensor, quantized: Tensor) -> float:
    """Mean cross-entropy of the distributions that two tensors of logits stand for.

    Args:
        logits: ``v``, shape ``(N, C)``.
        quantized: ``v_hat``, of the same shape.

    Returns:
        The mean of ``H(softmax(v), softmax(v_hat))`` over rows, in nats.

    Source: Nagel et al., 2021, section 3.1, "Cross entropy".

    Examples:
        >>> logits = torch.tensor([[0.0, 0.0]])
        >>> round(softmax_cross_entropy(logits, logits), 4)  # the entropy of a fair coin, log 2
        0.6931
    """
    return _mean_cross_entropy(logits.double().softmax(1), quantized)


def _mean_cross_entropy(probabilities: Tensor, quantized: Tensor) -> float:
    """Mean of ``H(p, softmax(v_hat))``, with ``p`` known."""
    # log sum exp v - sum_c p_c v_c, as the p of a row add up to 1. In float64: at 8 bits ranges differ by 1e-5 nats.
    values = quantized.double()
    values -= values.amax(1, keepdim=True)
    expected = (probabilities * values).sum(1)
    return float((values.exp_().sum(1).log_() - expected).mean())


def range_from_logits(logits: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The range with the least cross-entropy between the softmax of logits and that of the quantized logits.

    Both ends are searched at once on an asymmetric grid, the one end on a symmetric grid, as in
    :mod:`lightning_quantdebug.range_setting`.

    Args:
        logits: FP32 logits, shape ``(N, C)``, all finite, with ``N`` of at least 1.
        spec: The grid, with one encoding per tensor.

    Returns:
        ``range_min`` and ``range_max``, float32, shape ``()``, for
        :func:`lightning_quantdebug.encoding.encoding_from_range`.

    Raises:
        CalibrationError: If there is no row.

    Source: Nagel et al., 2021, section 3.1, "Cross entropy".

    Examples:
        >>> logits = torch.tensor([[8.0, 7.0, -40.0], [6.0, 8.0, -90.0]])  # only the first two matter
        >>> low, high = range_from_logits(logits, QuantSpec(4))
        >>> bool(low > -20), bool(high > 7)
        (True, True)
    """
    if not logits.shape[0]:
        raise CalibrationError(
            "Cross-entropy range setting must have logits without NaN or infinity, got none. Calibrate on batches that "
            "reach the output."
        )
    logits = logits.detach().float().cpu()
    probabilities = logits.double().softmax(1)

    def errors(ranges: Tensor) -> Tensor:
        """The cross-entropy in each of ``M`` ranges, shape ``(1, M, 2)``: ``(1, M)``."""
        encodings = (encoding_from_range(low, high, spec) for low, high in ranges[0])
        found = [_mean_cross_entropy(probabilities, fake_quantize(logits, encoding)) for encoding in encodings]
        return torch.tensor([found], dtype=torch.float64)

    low, high = logits.aminmax()
    best = search_ranges(low[None], high[None], spec, OF_HISTOGRAM[spec.symmetric], errors)
    return best[0][0], best[1][0]
