"""How cutloss meets PyTorch: its operators, their shapes for tracing, one autograd family.

Before any of it, whether this PyTorch is one that the rest can be imported with.
"""

import torch

from . import needs

if _refusal := needs.torch_refusal(torch.__version__):
    raise ImportError(_refusal)
try:
    from . import private  # noqa: F401  takes its names of PyTorch when it is imported
except AttributeError as _error:
    raise ImportError(needs.missing_name(str(_error), torch.__version__)) from _error
