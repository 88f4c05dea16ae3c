"""Whether a job's checkpoints are whole: save, spoil, load and compare, over every road of torch.

Its oracle is an inventory of local bytes, and arithmetic on placements. It uses nothing of the code
that it judges: neither the reference nor torch's state dict utilities.

The modules, in reading order:

- ``run``: prove(), from the arguments to the proof.
- ``exchange``: messages between ranks without collectives; who is missing is named.
- ``modules``, ``leaves``, ``placements``: the tensors of a model, and what ranks claim to hold.
- ``digests``, ``inventory``, ``claims``: their bits, compared between ranks.
- ``room``, ``snapshot``, ``spoil``: the copy that puts everything back.
- ``roads``, ``groups``, ``saved``, ``travel``, ``compare``, ``other_mesh``, ``step``: round trips.
- ``coverage``: what no state dict holds.
- ``findings``, ``proof``: the answer.
- ``peaks``: what it costs.
"""

from shardproof._prove.exchange import RankLost
from shardproof._prove.proof import NotWhole, Proof
from shardproof._prove.room import NoRoom
from shardproof._prove.run import WrongUseError, prove

__all__ = ["NoRoom", "NotWhole", "Proof", "RankLost", "WrongUseError", "prove"]
