"""The image and compose.yaml, tried with a real engine: what a user types, and what comes back.

`SHARDPROOF_BASE_IMAGE` names the base to build on, `SHARDPROOF_CUDA_IMAGE` an image already built
with CUDA; `DOCKER_HOST` is Docker's own. Without an engine these tests are preconditions: not run,
and said so.
"""
