"""`circuitfind --processes N VERB ...`: N processes that do the verb together, started by torch's own launcher.

`torchrun --nproc-per-node N -m -- circuitfind VERB ...` does the same, on several machines, too, and adds a report of
its own when a process fails.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

FAILED = 1


def launch(processes: int, words: Sequence[str]) -> int:
    """Run the command line in several processes, and return the first exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.ERROR)  # the processes report errors themselves
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        1,
        1,
        processes,
        run_id="circuitfind",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "circuitfind", *words)
    except ChildFailedError as error:
        # the launcher may kill the first process after another one failed and the first has reported it
        codes = (failure.exitcode for _, failure in sorted(error.failures.items()))
        return next((code for code in codes if code > 0), FAILED)
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        logging.disable(logging.NOTSET)
    return 0
