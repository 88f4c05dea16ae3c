"""Whether a job's checkpoints are whole: save, spoil, load and compare, over every road of torch.

Its oracle is an inventory of local bytes, and arithmetic on placements. It uses nothing of the code
that it judges: neither the reference nor torch's state dict utilities.

The modules, in reading order:

- ``run``: prove(), from the arguments to the proof.
- ``exchange``: messages between ranks without collectives; who is missing is named.
- ``modules``, ``leaves``, ``placements``: the tensors of a model, and what ranks claim to hold.
- ``digests``, ``inventory``, ``claims``: their bits, compared between ranks.
- ``room``, ``snapshot``, ``spoil``: the copy that puts everything back.
- ``roads``, ``groups``, ``travel``: round trips, and over which connections.
- ``alike``, ``saved``, ``compare``, ``other_mesh``, ``step``: what a round trip is judged by.
- ``coverage``: what no state dict holds.
- ``findings``, ``known_losses``, ``proof``, ``page``: the answer.
- ``command``: the command line.
- ``peaks``: what it costs.
"""

from shardproof._prove.exchange import RankLostError
from shardproof._prove.proof import NotWholeError, Proof
from shardproof._prove.room import NoRoomError
from shardproof._prove.run import WrongUseError, prove

__all__ = ["NoRoomError", "NotWholeError", "Proof", "RankLostError", "WrongUseError", "prove"]
