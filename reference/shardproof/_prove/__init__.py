"""Whether a job's checkpoints are whole: save, spoil, load and compare, over every road of torch.

Its oracle is an inventory of local bytes, and arithmetic on placements. It uses nothing of the code
that it judges: neither the reference nor torch's state dict utilities.

The modules, in reading order:

- ``run``: prove(), from the arguments to the proof.
- ``exchange``: messages between ranks without collectives; who is missing is named.
- ``reach``: tensors in containers, unregistered modules and objects that attributes hold.
- ``models``: the model as it is given: one, or the stages of a pipeline.
- ``modules``: the tensors of a model by their own names, whatever wraps it.
- ``optimizers``: the optimizers, their wrappers, and what lies beside their state.
- ``extra``: extra states of modules, told and changed.
- ``leaves``: from a tensor of any class to the plain tensors with its bits.
- ``placements``: which elements of a whole tensor a rank holds.
- ``digests``: of bits, computed where the tensor lies; those of shards add up.
- ``inventory``: every tensor of model and optimizer on this rank.
- ``claims``: what ranks say that they hold, compared.
- ``reclaim``: claims of plain tensors that a state dict knows as DTensors.
- ``coverage``: what no state dict holds.
- ``room``: whether there is room for the snapshot and the files.
- ``snapshot``: a copy of the job that puts everything back.
- ``spoil``: other bits in every live tensor, before a load.
- ``roads``: torch's public ways to save and load.
- ``groups``: spare connections, so that a road that hangs leaves the job's unhurt.
- ``travel``: one road, there and back.
- ``alike``: whether ranks have the same state dict to gather.
- ``saved``: what was saved, before it is loaded.
- ``compare``: what came back, against the snapshot.
- ``other_mesh``: the files read on another mesh.
- ``step``: one more step of training, with and without the round trip.
- ``known_losses``: which defect of torch a loss is.
- ``findings``: one sentence about one tensor.
- ``described``: the job in a sentence, and its tensors as a list.
- ``proof``: the table, JSON, and what is required.
- ``page``: a proof as HTML.
- ``peaks``: how much memory a phase takes.
- ``command``: the command line.
"""

from shardproof._prove.exchange import RankLostError
from shardproof._prove.proof import NotWholeError, Proof
from shardproof._prove.room import NoRoomError
from shardproof._prove.run import WrongUseError, prove

__all__ = ["NoRoomError", "NotWholeError", "Proof", "RankLostError", "WrongUseError", "prove"]
