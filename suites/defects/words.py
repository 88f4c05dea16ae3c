"""The words that describe a defect: severities and their rules, roads, and who mends it."""

from __future__ import annotations

SEVERITIES = {
    "corrupts": (
        "What is in a result, in the model or in what the caller passed is wrong, and no error "
        "says so at the call. A result that shares memory with live tensors counts, because later "
        "writes reach it; so does a target that a failed call has half written."
    ),
    "loses": (
        "Something that was handed in is missing from the result, and no error says so: a "
        "parameter, a key, an update, a tie, a dtype, a placement, the type of a container."
    ),
    "hangs": (
        "A rank waits for another one that never comes, until the timeout of the collective or for "
        "ever."
    ),
    "crashes": "A process ends by a signal, or Gloo ends it for bytes that do not fit.",
    "refuses": (
        "A legal call raises an exception; or an illegal one raises an exception that does not say "
        "which input is wrong."
    ),
    "leaks": (
        "Memory, a graph, a hook or a mesh is kept alive after the call; the results are right."
    ),
    "slow": "More collectives, bytes or memory than the ranks need; the results are right.",
}
"""Worst first. Each word with its rule: a defect has a word where some call shows it."""

IN_WORDS = {
    "corrupts": ("corrupts data silently", "corrupt data silently"),
    "loses": ("loses data silently", "lose data silently"),
    "hangs": ("hangs", "hang"),
    "crashes": ("ends a process", "end a process"),
    "refuses": ("refuses what is legal", "refuse what is legal"),
    "leaks": ("leaks", "leak"),
    "slow": ("is slow", "are slow"),
}
"""For a sentence: of one defect, of several."""

FOR_A_CHOICE = ("refuses", "leaks", "slow")
"""The words for a defect that only SHOULD checks meet: it breaks this project's choice alone."""

ROADS = {
    "tp-ddp": "train: tensor parallelism inside DistributedDataParallel",
    "tp-replicate": "train: tensor parallelism inside replicate()",
    "tp-fsdp1": "train: tensor parallelism inside FullyShardedDataParallel (FSDP1)",
    "tp-hsdp": "train: tensor parallelism inside FSDP1 with replicas (HSDP)",
    "tp-fully-shard": "train: tensor parallelism inside fully_shard()",
    "model-get-sharded": "save: get_model_state_dict()",
    "model-get-full": "save: get_model_state_dict(full_state_dict=True)",
    "model-get-cpu": "save: get_model_state_dict(cpu_offload=True), full or sharded",
    "model-set-full": "load: set_model_state_dict(full_state_dict=True), on every rank",
    "model-set-broadcast": "load: set_model_state_dict() or set_state_dict(), "
    "with broadcast_from_rank0=True",
    "optim-get": "save: get_optimizer_state_dict(), full or sharded",
    "optim-set-sharded": "load: set_optimizer_state_dict()",
    "optim-set-full": "load: set_optimizer_state_dict(full_state_dict=True)",
    "optim-set-broadcast": "load: set_optimizer_state_dict(broadcast_from_rank0=True)",
    "optim-flat": "save and load: flatten_optimizer_state_dict=True",
    "dcp-save": "save: torch.distributed.checkpoint.save()",
    "dcp-load": "load: torch.distributed.checkpoint.load()",
    "async-save": "save: torch.distributed.checkpoint.async_save(), and staging in general",
    "flatten": "nested state dicts that are flattened, and unflattened",
    "sharded-tensor": "state dicts that hold ShardedTensors",
    "tables": "embedding tables that are sharded with LocalShardsWrapper",
    "simulated": "simulated ranks: LocalTensorMode, or ranks as threads",
    "direct": "none of torch's own: calls of the private functions themselves",
}
"""The ways that people train and save, by which they meet a defect."""

OWNERS = {
    "the set": "the private functions that this project judges",
    "torch's callers": "torch's code around them, which no implementation of them can mend",
}

MENDERS = {
    "install": "shardproof.install()",
    "install(callers=True)": "shardproof.install(callers=True)",
    "nobody": "nobody yet",
}
"""Who mends a defect, beside a later torch (`torch >= 2.14`)."""
