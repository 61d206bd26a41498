"""A method is a composition: one value on each axis. Nothing here is specific to one paper; `presets.py` names the
papers.

y = W x + bias + scale * sum_i g_i z_i b_i,   z_i = a_i . x,   g = normalise(select(score(z)))
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from mora_jax.errors import MoraError
from mora_jax.methods.boundaries import BOUNDARIES
from mora_jax.methods.gates import NORMALISERS, SCORES, SELECTORS
from mora_jax.methods.initializers import INITIALIZERS
from mora_jax.ops.gated_projection import THRESHOLD_MODES, kernels, platform

EXPERTS = {
    "none": "no experts: the frozen model",
    "rank1": "rank-1 experts, keys and values trained",
}
KERNELS = ("auto", "xla", "pallas")

# The axes whose value is a name, with the table that knows the names.
NAMED_AXES: Mapping[str, Mapping] = {
    "experts": EXPERTS,
    "score": SCORES,
    "select": SELECTORS,
    "normalise": NORMALISERS,
    "boundary": BOUNDARIES,
    "init": INITIALIZERS,
    "threshold_mode": dict.fromkeys(THRESHOLD_MODES),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """The static description of what is learned and kept. Hashable, so a jitted function can close over it."""

    name: str
    experts: str
    rank: int  # fresh experts per task and site
    score: str
    select: str
    normalise: str
    top_k: int  # used by select=top_k
    temperature: float  # tau, used by the softmaxes
    threshold: float  # delta of Eq. 8, at inference only; 0 = off
    threshold_mode: str
    scale: float  # of an expert's contribution, for its whole life
    boundary: str
    init: str
    targets: tuple[str, ...]  # regexes on site kinds such as attn/q
    capacity_bucket: int  # bank rows are allocated in multiples of this
    implementation: str | None = None  # of the gated projection; None = best for the platform

    @property
    def trains(self) -> bool:
        return self.experts != "none"

    @property
    def has_gates(self) -> bool:
        """Whether experts compete; without that every expert is always on and there is nothing to report."""
        return self.trains and self.score != "constant"

    @property
    def portable(self) -> Method:
        """The same, for arrays that the compiler cuts over a mesh on its own: with a kernel it cannot do that."""
        return dataclasses.replace(self, implementation="xla")

    def adapts(self, site: str) -> bool:
        return self.trains and any(re.fullmatch(pattern, site) for pattern in self.targets)

    def live_after(self, task: int) -> int:
        """Frozen experts per site once task `task` (0-based) has been frozen; 0 for task = -1."""
        return BOUNDARIES[self.boundary].blocks(task) * self.rank if self.trains else 0

    def origins(self, task: int) -> list[tuple[int, ...]]:
        """For every block of `rank` experts in the bank after task `task`: the tasks that trained it."""
        blocks = BOUNDARIES[self.boundary].blocks
        return [tuple(t for t in range(task + 1) if blocks(t) == block + 1) for block in range(blocks(task))]

    def capacity(self, task: int) -> int:
        """Bank rows to allocate while task `task` is taught: enough for its own freeze, in whole buckets."""
        rows = max(1, self.live_after(task))
        return -(-rows // self.capacity_bucket) * self.capacity_bucket


def from_config(config: Mapping, kernel: str = "auto") -> Method:
    """The method a validated `config.method` describes. Raises MoraError with the key and the legal values."""
    values = {field.name: config[field.name] for field in dataclasses.fields(Method) if field.name in config}
    targets = values["targets"]
    names = targets.split(",") if isinstance(targets, str) else targets
    values["targets"] = tuple(name.strip() for name in names if name.strip())
    method = Method(**values, implementation=_implementation(kernel))
    _check(method)
    return method


def _implementation(kernel: str) -> str | None:
    """The name by which the op knows a value of `config.kernel`; None = best for the platform."""
    if kernel not in KERNELS:
        raise MoraError(f"kernel={kernel!r} is unknown; legal: {', '.join(KERNELS)}")
    if kernel != "pallas":
        return None if kernel == "auto" else kernel
    known = kernels()
    if platform() not in known:
        raise MoraError(
            f"kernel='pallas': there is no kernel for platform {platform()!r}, only for {', '.join(sorted(known))}; "
            "legal here: auto, xla"
        )
    return known[platform()]


def _check(method: Method) -> None:
    for axis, table in NAMED_AXES.items():
        value = getattr(method, axis)
        if value not in table:
            raise MoraError(f"method.{axis}={value!r} is unknown; known: {', '.join(table)}")
    for key in ("rank", "top_k", "capacity_bucket"):
        if getattr(method, key) < 1:
            raise MoraError(f"method.{key}={getattr(method, key)} must be at least 1")
    if not 0 < method.temperature < math.inf:
        raise MoraError(f"method.temperature={method.temperature} must be greater than 0")
    if not math.isfinite(method.scale):
        raise MoraError(f"method.scale={method.scale} must be finite")
    if not 0 <= method.threshold <= 1:
        raise MoraError(f"method.threshold={method.threshold} must lie in 0..1 (0 switches it off)")
    if method.threshold > 0 and not method.has_gates and method.trains:
        raise MoraError(
            f"method.threshold={method.threshold} contradicts method.score='constant': "
            "a constant score has nothing to compare; set method.threshold=0"
        )
    if method.trains and not method.targets:
        raise MoraError("method.targets is empty; name site kinds, for example attn/q,attn/v or attn/.*")
    for pattern in method.targets:
        try:
            re.compile(pattern)
        except re.error as problem:
            raise MoraError(f"method.targets holds {pattern!r}, which is not a regular expression: {problem}") from None
