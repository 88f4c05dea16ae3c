"""Linux, sockets and devices: what the other packages stand on.

processes     what Linux tells of processes, and how to end them
channel       messages between the parent and a rank: JSON frames over a socket pair
pipes         output into a pipe whose reader has gone, as with `| head`
stacks        Python stacks of ranks that do not answer
devices       the accelerators of this machine
torchrun_env  what torchrun's variables say: which node of how many
warm          the parent that ranks are forked from: modules imported, one thread, no CUDA
"""
