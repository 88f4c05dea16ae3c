"""Faults in what is said of wrong input, alike on every rank. Fields as in copies.py.

Each raises where it should, and nothing hangs; but who gets the error learns nothing from it.
"""

from __future__ import annotations

_SHARED = "        return kinds[self.kind](self.message)\n"

FAULTS: tuple[tuple[str, ...], ...] = (
    (
        "refusal_without_words",
        "every rank raises, and none names the leaf",
        "_core/comms/agreement.py",
        _SHARED,
        '        return kinds[self.kind]("failed")\n',
        "gather_state_dict_laws",
        "broadcast_state_dict_laws",
    ),
    (
        "refusal_is_a_warning",
        "a warning is raised on every rank instead of an error",
        "_core/comms/agreement.py",
        _SHARED,
        "        return FutureWarning(self.message)\n",
        "gather_state_dict_laws",
        "broadcast_state_dict_laws",
    ),
    (
        "refusal_is_an_accident",
        "every rank ends in an error of the implementation's own making",
        "_core/comms/agreement.py",
        _SHARED,
        "        return TypeError(\"'NoneType' object is not subscriptable\")\n",
        "gather_state_dict_laws",
        "broadcast_state_dict_laws",
    ),
    (
        "refusal_is_a_lost_key",
        "a shape that does not fit is told as a key that is not there",
        "_core/loading/targets.py",
        '            raise type(error)(f"{key!r}: {error}") from None\n',
        "            raise KeyError(key) from None\n",
        "distribute_state_dict",
    ),
)
