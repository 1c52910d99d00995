"""Rate-distortion curves: points of (bytes, PSNR in dB), how to read between them, and how much cheaper one curve is than another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float]  # bytes, dB
Values = NDArray[np.float64]


@dataclass(frozen=True)
class BdRate:
    """Bytes of a curve over those of a reference at equal PSNR, less 1, in percent; and the dB over which that is the mean."""

    percent: float
    low: float
    high: float


def bd_rate(reference: Sequence[Point], curve: Sequence[Point], low: float, high: float) -> BdRate:
    """Compare two curves as Bjontegaard does (VCEG-M33), the logarithm of the rate interpolated as a monotone piecewise cubic of the PSNR.

    Args:
        reference, curve: In any order; points that another one beats in both bytes and PSNR do not count.
        low, high: Compare from here to there, in dB, as far as both curves reach.

    Returns:
        The difference, and the interval that both curves cover.

    Raises:
        ValueError: They have no interval in common.
    """
    both = [_columns(points) for points in (reference, curve)]
    low, high = max(low, *(psnr[0] for _, psnr in both)), min(high, *(psnr[-1] for _, psnr in both))
    if not low < high:
        raise ValueError(f"curves: expected a PSNR that both reach, got an interval of {low:.2f} to {high:.2f} dB")
    base, other = (integral(psnr, np.log(size), low, high) for size, psnr in both)
    return BdRate(100 * float(np.expm1((other - base) / (high - low))), float(low), float(high))


def size_at(curve: Sequence[Point], psnr: float) -> float | None:
    """Bytes at which a curve reaches a PSNR; None beyond its ends."""
    sizes, values = _columns(curve)
    return float(np.exp(interpolated(values, np.log(sizes), np.array([psnr]))[0])) if values[0] <= psnr <= values[-1] else None


def psnr_at(curve: Sequence[Point], size: float) -> float | None:
    """PSNR in dB that a curve reaches in so many bytes; None beyond its ends."""
    sizes, values = _columns(curve)
    return float(interpolated(np.log(sizes), values, np.log([size]))[0]) if sizes[0] <= size <= sizes[-1] else None


def front(curve: Sequence[Point]) -> list[Point]:
    """The points that no other one beats, both columns rising."""
    kept: list[Point] = []
    for size, psnr in sorted(curve, key=lambda point: (point[0], -point[1])):
        if not kept or psnr > kept[-1][1]:
            kept.append((size, psnr))
    return kept


def _columns(curve: Sequence[Point]) -> tuple[Values, Values]:
    points = np.array(front(curve), np.float64).reshape(-1, 2)
    if len(points) < 2:
        raise ValueError(f"curve: expected at least 2 points that differ in bytes and PSNR, got {len(points)}")
    return points[:, 0], points[:, 1]


def integral(x: Values, y: Values, low: float, high: float) -> float:
    """Integral of the interpolated curve; both limits within x. Simpson's rule is exact for the cubics between the knots."""
    ends = np.concatenate([[low], x[(x > low) & (x < high)], [high]])
    middle = (ends[1:] + ends[:-1]) / 2
    at_ends, at_middle = interpolated(x, y, ends), interpolated(x, y, middle)
    return float(((at_ends[1:] + at_ends[:-1] + 4 * at_middle) / 6 * np.diff(ends)).sum())


def interpolated(x: Values, y: Values, at: Values) -> Values:
    """Monotone piecewise cubic through points (Fritsch and Butland's slopes, known as PCHIP).

    Args:
        x: Rising, `(n,)` with n >= 2.
        y: Any, `(n,)`.
        at: Where to evaluate, within x.
    """
    slope = _slopes(x, y)
    k = np.clip(np.searchsorted(x, at, side="right") - 1, 0, len(x) - 2)
    h = (x[1:] - x[:-1])[k]
    t = (at - x[k]) / h
    value: Values = (1 + 2 * t) * (1 - t) ** 2 * y[k] + t**2 * (3 - 2 * t) * y[k + 1] + h * t * (1 - t) * ((1 - t) * slope[k] - t * slope[k + 1])
    return value


def _slopes(x: Values, y: Values) -> Values:
    """Slope at each point: a weighted harmonic mean of its neighbours' secants, 0 at an extremum."""
    h = np.diff(x)
    secant = np.diff(y) / h
    if len(x) == 2:
        return np.repeat(secant, 2)
    before, after = secant[:-1], secant[1:]
    first, second = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        inner = np.where(before * after > 0, (first + second) / (first / before + second / after), 0.0)
    return np.concatenate([[_end_slope(h[0], h[1], before[0], secant[1])], inner, [_end_slope(h[-1], h[-2], secant[-1], secant[-2])]])


def _end_slope(h0: float, h1: float, secant0: float, secant1: float) -> float:
    """Three-point slope at an end, bent so that the curve stays monotone."""
    slope = ((2 * h0 + h1) * secant0 - h0 * secant1) / (h0 + h1)
    if slope * secant0 <= 0:
        return 0.0
    if secant0 * secant1 <= 0 and abs(slope) > 3 * abs(secant0):
        return 3 * secant0
    return float(slope)
