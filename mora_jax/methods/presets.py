"""The table of named methods. A row is a few values on the axes of `method.py`; a new method is a new row.

Sources: `mora` arXiv 2506.21035 (hyper-parameters: the published TRACE run, with alpha / r = 2 as scale);
`seq_lora` and `inc_lora` are the two LoRA baselines of arXiv 2310.14152 (one LoRA trained on; a new one per task).
"""

from __future__ import annotations

from mora_jax.errors import unknown

_LORA = {
    "experts": "rank1",
    "rank": 8,
    "score": "constant",
    "select": "all",
    "normalise": "none",
    "top_k": 8,
    "temperature": 1.0,
    "threshold": 0.0,
    "threshold_mode": "absolute",
    "scale": 2.0,
    "init": "kaiming",
}

PRESETS: dict[str, dict] = {
    "mora": {
        **_LORA,
        "score": "self",
        "select": "top_k",
        "normalise": "softmax",
        "temperature": 0.03,
        "threshold": 0.2,
        "boundary": "append",
    },
    "inc_lora": {**_LORA, "boundary": "append"},
    "seq_lora": {**_LORA, "boundary": "continue"},
    "zero_shot": {**_LORA, "experts": "none", "boundary": "append"},
}


def preset(name: str) -> dict:
    """The axis values of a named method. Raises MoraError with the known names."""
    if name not in PRESETS:
        raise unknown("method", name, PRESETS)
    return PRESETS[name] | {"name": name}
