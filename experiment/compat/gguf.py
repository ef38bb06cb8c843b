"""Private interfaces of gguf."""

from typing import Any

import numpy as np
from gguf import GGUFReader


class BoundedReader(GGUFReader):
    """Rejects a file that claims to hold more than it does: gguf treats missing data as an empty array, and tries to
    allocate 2^60 values."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends early")
        return super()._get(offset, dtype, count, override_order)
