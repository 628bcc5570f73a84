import mmap, os
from test_bpf_kit import Alarmed, loaded, settle
from test_bpf_rss import MAPPED, MEMORY, PAGE, resident
from kernelkit import turned, want
from limitfs.hearing.bpf.source import BpfRss
from limitfs.resources import procfs
def test_x(helper):
    with turned() as reactor, loaded(BpfRss, reactor) as source:
        eng = source.engine
        orig = eng._receive
        child = helper(MAPPED)
        child.do("for _ in range(100): excursion(200)")
        r0 = resident(child)
        level = (r0 + 250) * PAGE
        heard = Alarmed(level=level)
        import ctypes
        from limitfs.hearing.bpf.layout import Record
        def rec(data):
            r = Record.from_buffer_copy(data)
            print("record", {f[0]: str(getattr(r, f[0])) for f in r._fields_})
            orig(data)
        eng._receive = rec
        armed = source.arm(want(MEMORY, procfs.identify(child.pid), f">= {level}"), heard)
        settle(reactor)
        print("armed", r0, resident(child), level // PAGE, heard.readings)
        for i in range(10):
            child.do("for _ in range(100): excursion(200)")
            q = reactor.quiet(0.2)
            print(i, q, resident(child), heard.readings[-1][1] / PAGE, heard.total)
        armed.disarm()
    assert 0
