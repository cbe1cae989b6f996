"""A process that has imported everything, and forks a command line for each line of its input: an array of arguments.

It prints the child's number, and its exit code when it has ended. Run as a script by tests that kill commands often: an
import of torch each time would take longer than what is tested.
"""

from __future__ import annotations

import json
import os
import sys

import torch

import lowmem_flux2.generating
import lowmem_flux2.runtime.batch_run  # noqa: F401
from lowmem_flux2 import cli

if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.nice(5)  # who is to kill it must not be late
            os.dup2(2, 1)  # the other end reads nothing but numbers
            sys.argv = ["lowmem-flux2", *json.loads(line)]
            try:
                cli.main()
            except SystemExit as stopped:
                os._exit(int(stopped.code or 0))
            finally:
                os._exit(70)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
