"""Faults of memory: a call needs another model besides its result. Fields as in copies.py."""

from __future__ import annotations

FAULTS: tuple[tuple[str, ...], ...] = (
    (
        "bucket_as_large_as_the_model",
        "what travels together is held together, however much it is",
        "_core/comms/buckets.py",
        "        self.width = max(share, _WIDEST)\n",
        "        self.width = 1 << 40\n",
        "memory",
    ),
    (
        "gathered_where_nobody_asked",
        "a rank that wants no result has it nevertheless, until the call returns",
        "_state_dict_utils/gather.py",
        "    destinations = find_destinations(ranks_only, pg, found)\n",
        "    destinations = None\n",
        "memory",
    ),
    (
        "backend_copies_whole_tensors",
        "a large tensor is held twice: the backend receives it into memory of its own",
        "_core/comms/collectives.py",
        '_COPYING = {"gloo"}',
        "_COPYING: set[str] = set()",
        "memory",
    ),
    (
        "sent_from_a_copy",
        "a large tensor is copied before it is sent: whole, whatever each rank receives of it",
        "_core/loading/transport.py",
        "            data = self.wholes[key].view(-1).view(torch.uint8)\n",
        "            data = self.wholes[key].clone().view(-1).view(torch.uint8)\n",
        "memory",
    ),
    (
        "cut_from_copies",
        "each full tensor is copied before its shard is cut from it, and all copies stay",
        "_state_dict_utils/distribute.py",
        "where, alike, layout), full\n",
        "where, alike, layout), full.clone()\n",
        "memory",
    ),
    (
        "copied_by_way_of_copies",
        "the values are copied once more on their way into the target",
        "_core/copies/copy_into.py",
        "copy_across_devices(targets, sources, non_blocking)",
        "copy_across_devices(targets, [s.clone() for s in sources], non_blocking)",
        "memory",
    ),
)

ON_A_DEVICE: tuple[tuple[str, ...], ...] = (
    (
        "scatter_room_uncounted",
        "Gloo takes as much of the device as is scattered, for a large tensor all of it",
        "_core/comms/collectives.py",
        '_DESCRIBING = {"gloo"}',
        "_DESCRIBING: set[str] = set()",
        "memory",
    ),
)
"""Faults that show where tensors lie on another device than the CPU."""
