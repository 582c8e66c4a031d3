"""The processes that `torchrun` starts, one for each GPU. Without it there is one."""
import os
import sys

import torch
import torch.distributed as distributed

from support.common import UserError, show


def processes():
    """(rank, number) of the processes that `torchrun` started, (0, 1) without it. Raises UserError:
    the environment has some of torchrun's variables and not others."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    there = [name for name in names[:3] if name in os.environ]
    if not there:
        return 0, 1
    numbers = [os.environ.get(name, "") for name in names[:3]]
    whole = all(number.isdecimal() for number in numbers) and all(map(os.environ.get, names))
    if not whole:
        raise UserError(f"the environment has {', '.join(there)}, which torchrun sets, but not all "
                        f"of {', '.join(names)}: unset them, or start with torchrun")
    return int(numbers[0]), int(numbers[1])


def say(text):
    """Prints, once for all processes."""
    if processes()[0] == 0:
        show(text)


def average(tensors):
    """Averages tensors over all processes, in place and in one message."""
    size = processes()[1]
    if size == 1:
        return
    message = torch.cat([t.flatten().float() for t in tensors])
    distributed.all_reduce(message)
    for t, mean in zip(tensors, (message / size).split([t.numel() for t in tensors])):
        t.copy_(mean.view_as(t))


def join_processes():
    if processes()[1] > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend)


def leave_processes():
    """All is written by now. At an ordinary end a thread of gloo's sometimes aborts the process."""
    if processes()[1] > 1:
        distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)
