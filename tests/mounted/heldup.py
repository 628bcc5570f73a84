"""limitfs under a kernel that takes its time to set a limit on a cgroup: as long as the file HOLD exists.

`python heldup.py HOLD python -m limitfs …`; see `test_slow_limits.py`.
"""

import os
import runpy
import sys
import time
from functools import wraps

from limitfs.resources import limits

_really = limits.put


@wraps(_really)
def _put(*what: object) -> None:
    while os.path.exists(HOLD):
        time.sleep(0.01)
    _really(*what)  # type: ignore[arg-type]


HOLD = sys.argv[1]
limits.put = _put
sys.argv = sys.argv[4:]
runpy.run_module("limitfs", run_name="__main__", alter_sys=True)
