"""What the subject warns of while it is judged; a warning is the cause of no other check's failure.

No body runs: the harness has noted the warnings that came out of the subject in all checks of a
function, and judges these at the end of the run. See `harness.settings.subject_warnings`.
"""

from __future__ import annotations

import pytest

FUNCTIONS = {
    "_state_dict_utils": (
        "_TensorInfo",
        "_all_gather_sharded_tensor",
        "_broadcast_state_dict",
        "_broadcast_tensors",
        "_check_state_dict_similarity",
        "_copy_state_dict",
        "_create_cpu_state_dict",
        "_distribute_state_dict",
        "_distribute_tensors",
        "_flatten_state_dict",
        "_gather_state_dict",
        "CompanionMismatch",
        "_identity_func",
        "_iterate_state_dict",
        "_offload_state_dict_to_cpu",
        "_set_element",
        "_traverse_state_dict",
        "_unflatten_state_dict",
    ),
    "tensor.parallel._data_parallel_utils": (
        "_flatten_tensor",
        "_unflatten_tensor",
        "sync_grad_hook",
    ),
    "tensor.parallel.ddp": (
        "_get_submodule_n_params",
        "_localize_dtensor",
        "_pre_dp_module_transform",
        "_reconstruct_dtensor",
        "_update_module_param",
    ),
    "tensor.parallel.fsdp": (
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
    ),
}
NAMES = [f"{module}.{name}" for module, names in FUNCTIONS.items() for name in names]


@pytest.mark.warns_of_nothing
@pytest.mark.law("isolation")
@pytest.mark.should("a warning tells the user something; only a run with -W error ends by it")
class TestWarnings:
    @pytest.mark.parametrize(
        "function", [pytest.param(name, marks=pytest.mark.judges(name)) for name in NAMES]
    )
    def test_calls_warn_of_nothing(self, function: str) -> None:
        """No call lets a warning out: a program that runs with warnings as errors goes on."""

    def test_the_import_warns_of_nothing(self) -> None:
        """Importing the subject lets no warning out."""
