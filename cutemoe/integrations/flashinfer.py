"""FlashInfer's calls on cutemoe: change the import, and nothing else.

```python
from cutemoe.integrations.flashinfer import gated_delta_rule_mtp  # was: from flashinfer.gdn_decode
```

Signatures and documented meanings are FlashInfer's; where its kernels do something else than its
documentation says, the documentation holds here, and `flashinfer_gdn` says where. FlashInfer itself
is not needed. A name is imported when it is first used.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cutemoe.integrations.flashinfer_gdn import (
        gated_delta_rule_decode,
        gated_delta_rule_decode_pretranspose,
        gated_delta_rule_mtp,
    )

_FOLDER = "cutemoe.integrations"
_NAMES = {
    "gated_delta_rule_decode": "flashinfer_gdn",
    "gated_delta_rule_decode_pretranspose": "flashinfer_gdn",
    "gated_delta_rule_mtp": "flashinfer_gdn",
    "B12xMoEWrapper": "flashinfer_moe",
    "b12x_fused_moe": "flashinfer_moe",
}
_PRESENT = {m for m in set(_NAMES.values()) if importlib.util.find_spec(f"{_FOLDER}.{m}")}

__all__ = [
    "gated_delta_rule_decode",
    "gated_delta_rule_decode_pretranspose",
    "gated_delta_rule_mtp",
]
_LATER = [n for n, m in _NAMES.items() if m in _PRESENT and n not in __all__]
__all__ += _LATER  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if _NAMES.get(name) in _PRESENT:
        return getattr(importlib.import_module(f"{_FOLDER}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
