"""Bytes between ranks. Nothing here knows of state dicts.

- ``collectives``: collectives on bytes, over one process group or one mesh dimension after another.
- ``agreement``: ranks agree on what they are about to do, or all raise the same error.
- ``buckets``: how small tensors share collectives, and large ones are cut.
"""
