"""One rank under the watchdog, without DeepSpeed: ``watched_rank.py FAULT``. The highest rank has the fault."""

import ctypes
import os
import signal
import sys
import time

import torch.distributed as dist

from moe_scale.errors import DivergedError
from moe_scale.parallel import watchdog


def no_words(_: str) -> None:
    raise OSError("the disk is gone")


if __name__ == "__main__":
    fault, faulty_rank = sys.argv[1], int(sys.argv[2])
    watchdog.BEAT_S, watchdog.SETTLE_S = 0.2, 1.0
    watchdog.SILENT_HOST_S = 6
    dist.init_process_group("gloo")
    faulty = dist.get_rank() == faulty_rank
    with watchdog.Watchdog(hang_s=4.0 if fault in ("stuck", "frozen", "slow") else 1000.0) as watched:
        if fault == "killed":
            watched.last_words = (lambda _: time.sleep(1000)) if faulty_rank else no_words
        if fault == "slow":
            watched.at(0, "preparing the data", timed=False)
            time.sleep(8 if faulty else 0)
            dist.barrier()
            watched.at(0, "evaluation")
            for _ in range(3):  # together longer than hang_s, each part shorter
                time.sleep(2)
                watched.progressed()
        for step in range(1, 6):
            watched.at(step, "forward")
            if step == 3 and faulty:
                if fault == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif fault == "frozen":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif fault == "stuck":
                    time.sleep(1000)
                elif fault == "busy":
                    ctypes.PyDLL(None).sleep(5)  # no other thread of Python runs meanwhile
                elif fault == "failed":
                    raise ValueError("a mistake of one rank")
            if step == 3 and fault == "diverged":
                raise DivergedError("on all ranks")
            if step == 3 and fault == "mistake":
                raise ValueError("a mistake of all ranks")
            dist.barrier()
        if fault == "late" and faulty:
            time.sleep(5)  # the others are done
    dist.barrier()
    dist.destroy_process_group()
    print("the end")
