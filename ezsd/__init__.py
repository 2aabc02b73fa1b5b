"""Zero-shot detection by efficient feature distillation.

```python
import ezsd

model = ezsd.load("runs/a")
model("photo.jpg", ["cat", "red ball"])
store = ezsd.Store("cache/coco")
```

The names below are loaded when they are first used: `import ezsd` by itself loads nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ezsd.cache import Store
    from ezsd.errors import EzsdError
    from ezsd.pipeline.data.region_dataset import RegionDataset
    from ezsd.pipeline.inference.detect import load
    from ezsd.pipeline.inference.export import export

__all__ = ["EzsdError", "RegionDataset", "Store", "export", "load"]

_HOMES = {
    "EzsdError": "ezsd.errors",
    "RegionDataset": "ezsd.pipeline.data.region_dataset",
    "Store": "ezsd.cache",
    "export": "ezsd.pipeline.inference.export",
    "load": "ezsd.pipeline.inference.detect",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'ezsd' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
