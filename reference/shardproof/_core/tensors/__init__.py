"""One tensor, on one rank: what it is, which memory it shares, and copies of its values.

- ``subclasses``: tensor subclasses that implement operations themselves, or refuse them.
- ``properties``: kind, shape and dtype, and whether a tensor has memory of the usual kind.
- ``prefault``: page faults of new host memory, taken in one call.
- ``inference_mode``: results that can be trained and written, made under inference mode.
- ``values``: new memory, and copies bit for bit.
- ``ties``: which tensors share memory.
- ``overlapping_copies``: copies of tensors that share memory, which share it in the same way.
- ``pinned_copy``: copies between a GPU and the CPU, through page-locked memory.
"""
