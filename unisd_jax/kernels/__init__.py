"""Fused operations on hidden states and head weights; `unisd_jax.kernels` is their one canonical import.

In a source tree the kernels lie in the folder `kernels/` beside `unisd_jax/`. That folder has no
`__init__.py`, so it never hides the PyPI package of that name. In a wheel they are subfolders of this one.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
# In site-packages a folder `kernels` would be that other package; a source tree has a pyproject.toml too.
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root / "kernels"))

from unisd_jax.kernels.fused_linear_jsd import (  # noqa: E402
    Layout,
    TokenScores,
    fused_linear_jsd,
    fused_linear_jsd_jacobians,
    fused_linear_jsd_loss,
    fused_linear_jsd_value_and_grad,
)
from unisd_jax.kernels.fused_linear_logprob import LogprobScores, fused_linear_logprob  # noqa: E402

__all__ = [
    "Layout",
    "LogprobScores",
    "TokenScores",
    "fused_linear_jsd",
    "fused_linear_jsd_jacobians",
    "fused_linear_jsd_loss",
    "fused_linear_jsd_value_and_grad",
    "fused_linear_logprob",
]
