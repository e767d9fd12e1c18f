"""Read weights out of torch's files (`.pt`, `.bin`, `.ckpt`, TorchScript archives) without running anything in them.

A pickle is a program. `pickle_check` first reads it as data: each operation and each name that it asks for must be on a
list. Then torch's own `weights_only` reader makes the tensors, and every class of a pickled model becomes an inert stub
that holds attributes and nothing else (`objects`). TorchScript archives are read by an unpickler that knows tensors and
stubs only (`script`); the code in them is not even looked at.
"""

from .reader import PICKLE_MARK, ZIP_MARK, read_torch_file

__all__ = ["PICKLE_MARK", "ZIP_MARK", "read_torch_file"]
