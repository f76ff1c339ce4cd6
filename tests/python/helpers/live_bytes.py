"""The most bytes that tensors of a call hold at a time: what it makes, not what it is given."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Of results of operators; what an operator holds while it runs is not seen."""

    def __init__(self):
        super().__init__()
        self.live = self.most = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for t in tree_leaves((args, kwargs or {})):
            self._see(t, given=True)
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            self._see(t, given=False)
        return result

    def _see(self, t, given):
        if not isinstance(t, torch.Tensor) or t.untyped_storage()._cdata in self._known:
            return
        storage = t.untyped_storage()
        key, size = storage._cdata, 0 if given else storage.nbytes()
        self._known.add(key)
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key, size):
        self._known.discard(key)
        self.live -= size
