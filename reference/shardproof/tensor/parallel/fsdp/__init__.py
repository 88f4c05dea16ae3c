"""FSDP1 over tensor parallelism: what FSDP asks of a tensor that is a DTensor already.

``DTensorExtensions`` is what FSDP calls. While training it hands FSDP the local tensors and takes
them back; in a state dict it cuts them (``chunk_*``) and, on loading, puts them together again.

- ``boxes``: the offset and size of each shard of a 1-D DTensor, and the metadata that say so.
- ``root_mesh``: FSDP's dimensions of the root mesh, and the placements of a chunk.
- ``gather_routes``: which ranks hold the elements that one rank gathers.
- ``sharded_tensor_chunks``: FSDP's chunks as ShardedTensors.
- ``dtensor_chunks``: FSDP's chunks as DTensors over the root mesh.
- ``dtensor_gather``: from such chunks back to the local tensors of tensor parallelism.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

# The package has to come first: it imports torch's twin of this module, which needs its parts.
import torch.distributed.fsdp
from torch import distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._common_utils import _set_fsdp_flattened
from torch.distributed.fsdp._fsdp_extensions import FSDPExtensions
from torch.distributed.tensor import DTensor

from shardproof._core.tensors.subclasses import has_own_operations
from shardproof.tensor.parallel._data_parallel_utils import _flatten_tensor, unflatten_eagerly
from shardproof.tensor.parallel.fsdp.boxes import (
    _create_shard_md_from_dt,
    _create_sharded_tensor_md_from_dt,
    _get_box,
    _get_box_for,
    _get_dt_pg,
    _get_local_box,
)
from shardproof.tensor.parallel.fsdp.dtensor_chunks import _chunk_dtensor
from shardproof.tensor.parallel.fsdp.dtensor_gather import _all_gather_dtensor
from shardproof.tensor.parallel.fsdp.sharded_tensor_chunks import (
    _chunk_tensor,
    _pre_load_state_dict,
    _rewrite_spec_if_needed,
)

__all__ = [
    "DTensorExtensions",
    "_all_gather_dtensor",
    "_chunk_dtensor",
    "_chunk_tensor",
    "_create_shard_md_from_dt",
    "_create_sharded_tensor_md_from_dt",
    "_get_box",
    "_get_box_for",
    "_get_dt_pg",
    "_get_local_box",
    "_pre_load_state_dict",
    "_rewrite_spec_if_needed",
]


class DTensorExtensions(FSDPExtensions):
    """What FSDP1 does with the DTensors of tensor parallelism, and with plain tensors beside them.

    Attributes:
        compute_stream: the stream of forward and backward; FSDP sets it. Without it the current
            stream is used.
        device_handle: the device module, for example ``torch.cuda``.

    Args:
        device_handle: as above; a module without streams will do.

    """

    def __init__(self, device_handle: Any) -> None:
        super().__init__()
        self.compute_stream: Any = None
        self.device_handle = device_handle

    def pre_flatten_transform(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any | None]:
        """The tensor that FSDP flattens, and what describes the DTensor around it.

        Args:
            tensor: a parameter.

        Returns:
            As ``_flatten_tensor``. The local tensor of a Parameter is a Parameter: from any other
            tensor FSDP makes one that trains, frozen or not (``use_orig_params``).

        Local: no collective runs.

        """
        local, extension = _flatten_tensor(tensor)
        if extension is not None and isinstance(tensor, nn.Parameter):
            if has_own_operations(local):
                local._is_param = True
            else:
                local = nn.Parameter(local, requires_grad=tensor.requires_grad)
            # FSDP keeps it among the module's parameters, and the state-dict functions find there
            # of which DTensor it holds a piece.
            local._st_info = extension  # type: ignore[attr-defined]
        return local, extension

    # Backward hooks and streams are nothing that the compiler could trace.
    @torch.compiler.disable
    def post_unflatten_transform(self, tensor: torch.Tensor, param_extension: Any) -> torch.Tensor:
        """The DTensor that the model computes with, marked as flattened by FSDP.

        Args:
            tensor: a local tensor, a view of FSDP's flat one.
            param_extension: what :meth:`pre_flatten_transform` gave.

        Returns:
            As ``_unflatten_tensor``, made on the compute stream.

        Raises:
            ValueError: ``tensor`` has not the shape that the extension gives to this rank.

        Local: no collective runs.

        """
        with self._on_compute_stream():
            result = unflatten_eagerly(
                tensor, param_extension, self.device_handle, self.compute_stream
            )
            _set_fsdp_flattened(result)
            return result

    def _on_compute_stream(self) -> AbstractContextManager[Any]:
        enter = getattr(self.device_handle, "stream", None)
        if enter is None or self.compute_stream is None:
            return nullcontext()
        found: AbstractContextManager[Any] = enter(self.compute_stream)
        return found

    def chunk_tensor(
        self,
        tensor: torch.Tensor,
        rank: int,
        world_size: int,
        num_devices_per_node: int,
        pg: dist.ProcessGroup,
        device: torch.device | None = None,  # noqa: ARG002
    ) -> torch.Tensor:
        """As :func:`_chunk_tensor`; the chunk stays on the device of ``tensor``."""
        return _chunk_tensor(tensor, rank, world_size, num_devices_per_node, pg)

    def chunk_dtensor(
        self, tensor: torch.Tensor, rank: int, device_mesh: DeviceMesh
    ) -> torch.Tensor:
        """As :func:`_chunk_dtensor`."""
        return _chunk_dtensor(tensor, rank, device_mesh)

    def pre_load_state_dict_transform(
        self, tensor: torch.Tensor
    ) -> tuple[torch.Tensor, list[Shard]]:
        """As :func:`_pre_load_state_dict`."""
        return _pre_load_state_dict(tensor)

    def all_gather_dtensor(self, tensor: DTensor, parent_mesh: DeviceMesh | None) -> torch.Tensor:
        """As :func:`_all_gather_dtensor`."""
        return _all_gather_dtensor(tensor, parent_mesh)
