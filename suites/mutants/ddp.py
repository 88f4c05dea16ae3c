"""Faults of the reference for DDP over tensor parallelism, listed as catalog.py takes them."""

from __future__ import annotations

FAULTS: tuple[tuple[str, str, str, str, str, str], ...] = (
    (
        "update_moves_to_the_end",
        "replaced parameters move to the end of the order",
        "ddp.py",
        "        owner._parameters[name] = tensor",
        "        owner._parameters.pop(name)\n        owner._parameters[name] = tensor",
        "update_module_param",
    ),
    (
        "path_leaf_unchecked",
        "a path to a parameter that does not exist is taken",
        "ddp.py",
        "if not name or not hasattr(owner, name):",
        "if not name:",
        "get_submodule_n_params",
    ),
    (
        "localize_unties",
        "tied parameters come apart",
        "ddp.py",
        "_localized.record(owner, name, *made[id(held)])",
        "_localized.record(owner, name, *_localized.localized(held))",
        "localize_dtensor",
    ),
    (
        "localize_trains_frozen",
        "a frozen weight starts to train",
        "_localized.py",
        "requires_grad=whole.requires_grad)",
        "requires_grad=plain.is_floating_point())",
        "pre_dp_module_transform_training",
    ),
    (
        "localize_ignores_nothing",
        "parameters that another part manages are localized all the same",
        "ddp.py",
        "elif id(held) not in left_out:",
        "else:",
        "localize_dtensor",
    ),
    (
        "new_parameters_each_forward",
        "the optimizer holds Parameters that the module has dropped",
        "ddp.py",
        "slots[name], entry.inside = entry.local, None",
        "slots[name], entry.inside = type(entry.local)(entry.local.detach()), None",
        "pre_dp_module_transform",
    ),
    (
        "reconstruct_half_way",
        "after an error some parameters are DTensors",
        "ddp.py",
        "            found.append((slots, name, entry, held))\n",
        (
            "            found.append((slots, name, entry, held))\n"
            "            slots[name] = built[id(held)]\n"
        ),
        "reconstruct_dtensor",
    ),
    (
        "failure_leaves_dtensors",
        "after an exception in forward the module holds DTensors",
        "_localized.py",
        "        module._forward_hooks_always_called[self._number] = True\n",
        "",
        "pre_dp_module_transform",
    ),
    (
        "inner_forward_decides",
        "a module that calls itself ends its outer forward with local tensors",
        "ddp.py",
        "self._depth = self._depth + 1 if _is_running(module) else 1",
        "self._depth = 1",
        "pre_dp_module_transform_manners",
    ),
    (
        "transform_adds_hooks",
        "a second transform adds hooks",
        "ddp.py",
        '    """\n    _localize_dtensor(module)\n',
        (
            '    """\n    _localize_dtensor(module)\n'
            "    module.register_forward_hook(_localize_dtensor)\n"
        ),
        "pre_dp_module_transform_manners",
    ),
    (
        "buffers_stay_dtensors",
        "DDP meets a DTensor among the buffers",
        "ddp.py",
        "tables: tuple[Any, Any] = owner._parameters, owner._buffers",
        "tables: tuple[Any, ...] = (owner._parameters,)",
        "pre_dp_module_transform_ddp",
    ),
    (
        "state_dict_of_shards",
        "the state dict holds this rank's shards as if they were the whole",
        "_localized.py",
        "            state_dict[key] = as_dtensor(value, entry, key)",
        "            state_dict[key] = value",
        "pre_dp_module_transform_state",
    ),
    (
        "full_tensor_taken_for_shard",
        "a full tensor is taken for this rank's shard",
        "_localized.py",
        "            state_dict[key] = local_part(value, entry.spec)\n            continue\n",
        "            continue\n",
        "pre_dp_module_transform_state",
    ),
    (
        "copies_share_records",
        "a copy and its original change each other's parameters",
        "_localized.py",
        "return Localized(copy.deepcopy(self.local, memo), self.spec)",
        "return self",
        "pre_dp_module_transform_changes",
    ),
)
