"""Orthogonal wavelets by name: most filters are computed from what defines them (Daubechies 1992, chapters 6 and 8)."""

from __future__ import annotations

import math

import numpy as np

_SYMLETS = {2: 0, 3: 0, 4: 2, 5: 2, 6: 3, 7: 4, 8: 10, 9: 6, 10: 11}
"""Order -> which roots of the Daubechies wavelet are moved out of the unit circle, one bit for each conjugate pair."""

_COIFLETS: dict[int, tuple[float, ...]] = {
    1: (
        -0.05142972847076845, 0.23892972847076846, 0.6028594569415369,
        0.2721405430584631, -0.05142972847076845, -0.011070271529231544,
    ),
    2: (
        0.011587596738716868, -0.029320137983468563, -0.04763959031100813, 0.2730210465347666,
        0.5746823938568638, 0.2948671936956192, -0.05408560709171143, -0.042026480460771606,
        0.016744410163279506, 0.003967883612962012, -0.0012892033561406595, -0.0005095053991076441,
    ),
    3: (
        -0.0026824186709220686, 0.005503126707831385, 0.016583560479170346, -0.046507764478726975,
        -0.043220763560211914, 0.28650333527364746, 0.56128525687033, 0.30298357177282415, -0.050770140754888865,
        -0.05819625076158553, 0.024434094321166958, 0.011229240962037866, -0.006369601011048823, -0.0018204589155662422,
        0.0007902051009575939, 0.000329665173793183, -5.019277455327665e-05, -2.4465734255308132e-05,
    ),
    4: (
        0.0006309612114309468, -0.0011522251437699736, -0.005194525163470323, 0.01136093089978195,
        0.01894506104561664, -0.05171984370581528, -0.03448614047094481, 0.30227251053656845, 0.5545479062408811,
        0.30791766802517506, -0.0435250092812657, -0.064887950971431, 0.01988077364815952, 0.017638947871261697,
        -0.007366054847173364, -0.002312432307658842, 0.0014260063442333715, 0.00046669846355373536,
        -0.0001270007842387334, -0.0001130536369789105, 3.048364879677801e-05, 1.2667448089330081e-05,
        -1.5849265807568937e-06, -1.1239480882815428e-06,
    ),
}  # fmt: skip
"""Order -> filter, of sum 1; but the fourth is as PEFT has it, which is not quite orthogonal, for files that use it."""

NAMES = (
    *(f"db{order}" for order in range(1, 11)),
    *(f"sym{order}" for order in _SYMLETS),
    *(f"coif{order}" for order in _COIFLETS),
)


def synthesis(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The filters of length 2 order that put together a signal from its smooth part, and from its details.

    Args:
        name: One of `NAMES`.
    """
    family = name.rstrip("0123456789")
    order = int(name.removeprefix(family))
    if family == "coif":
        smooth = math.sqrt(2) * np.array(_COIFLETS[order])
    else:
        smooth = _daubechies(order, _SYMLETS[order] if family == "sym" else 0)
    details = smooth[::-1] * (-1.0) ** np.arange(len(smooth))
    return tuple(smooth.tolist()), tuple(details.tolist())


def _daubechies(order: int, outside: int) -> np.ndarray:
    """The filter with `order` vanishing moments whose roots lie in the unit circle, but for the groups of `outside`.

    Its roots z have `z + 1 / z = 2 - 4 y`, y a root of `sum_k C(order - 1 + k, k) y^k`; and -1 is one `order` times.
    """
    roots = np.roots([math.comb(order - 1 + k, k) for k in reversed(range(order))])
    groups = []
    for y in roots[roots.imag >= -1e-12]:
        half = 1 - 2 * y
        z = half + np.sqrt(half * half - 1 + 0j)
        z = z if abs(z) < 1 else 1 / z
        groups.append([z] if abs(y.imag) < 1e-12 else [z, z.conjugate()])
    groups.sort(key=lambda group: (len(group), group[0].real))
    chosen = [1 / z if outside >> i & 1 else z for i, group in enumerate(groups) for z in group]
    filtered = np.poly([-1.0] * order + chosen).real
    return filtered * math.sqrt(2) / filtered.sum()
