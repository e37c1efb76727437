"""CPU time of a process, as the latch-up detector takes it."""

from __future__ import annotations

import os
import time

from node.power.cpu_share import CpuShare, process_cpu_s


def test_the_kernel_tells_the_time_of_this_process_and_of_none_that_is_not():
    before = process_cpu_s(os.getpid())
    assert before is not None
    while time.process_time() < before + 0.02:
        pass
    after = process_cpu_s(os.getpid())
    assert after is not None
    assert after > before
    assert process_cpu_s(2**22 - 3) is None


def test_shares_are_differences_and_another_process_begins_anew():
    now, used = [0.0], {1: 5.0, 2: 0.0}
    share = CpuShare(clock=lambda: now[0], cpu_s=used.get)
    assert share.sample(1) is None
    now[0], used[1] = 2.0, 8.0
    assert share.sample(1) == 1.5
    now[0] = 3.0
    assert share.sample(1) == 0.0
    assert share.sample(2) is None
    now[0], used[2] = 4.0, -1.0
    assert share.sample(2) is None, "its clock went back: another process has its number"
    assert share.sample(None) == 0.0
    assert share.sample(9) == 0.0
