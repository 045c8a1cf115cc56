"""What bounds on memory are held by: the largest tensor that was made, whatever the machine."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """Elements of the largest tensor of each dtype that an operation made; views and mapped files
    are none."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[torch.dtype] = Counter()

    @property
    def elements(self) -> int:
        return max(self.of.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ != "from_file":
            for x in tree_leaves(made):
                if isinstance(x, torch.Tensor):
                    self.of[x.dtype] = max(self.of[x.dtype], x.numel())
        return made
