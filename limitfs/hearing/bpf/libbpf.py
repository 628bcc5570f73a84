"""The part of libbpf that is needed here, through ctypes; https://docs.kernel.org/bpf/libbpf/.

The library of the system is used (libbpf.so.1, 1.0 or later), loaded when it is first needed. Everything here
runs on the event loop and takes micro- to milliseconds, apart from `Links.destroy`, which may take half a second
for some kinds of programs and is meant for a thread.
"""

import ctypes
import errno
import mmap
import os
import resource
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

BPF_ANY, BPF_NOEXIST, BPF_EXIST = 0, 1, 2
_KIND_TYPEDEF, _KIND_FUNC = 8, 12

_pointer, _int, _uint, _size = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_size_t
_text = ctypes.c_char_p

_PRINT = ctypes.CFUNCTYPE(_int, _int, _text, _pointer)
_SAMPLE = ctypes.CFUNCTYPE(_int, _pointer, _pointer, _size)

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    # name: (result, arguments…)
    "libbpf_set_print": (_pointer, _PRINT),
    "btf__load_vmlinux_btf": (_pointer,),
    "btf__find_by_name_kind": (_int, _pointer, _text, _uint),
    "bpf_object__open_file": (_pointer, _text, _pointer),
    "bpf_object__load": (_int, _pointer),
    "bpf_object__close": (None, _pointer),
    "bpf_object__next_program": (_pointer, _pointer, _pointer),
    "bpf_object__find_map_by_name": (_pointer, _pointer, _text),
    "bpf_program__name": (_text, _pointer),
    "bpf_program__section_name": (_text, _pointer),
    "bpf_program__set_autoload": (_int, _pointer, ctypes.c_bool),
    "bpf_program__fd": (_int, _pointer),
    "bpf_program__attach": (_pointer, _pointer),
    "bpf_program__attach_kprobe": (_pointer, _pointer, ctypes.c_bool, _text),
    "bpf_program__attach_iter": (_pointer, _pointer, _pointer),
    "bpf_link__destroy": (_int, _pointer),
    "bpf_link__fd": (_int, _pointer),
    "bpf_iter_create": (_int, _int),
    "bpf_map__fd": (_int, _pointer),
    "bpf_map_update_elem": (_int, _int, _pointer, _pointer, ctypes.c_uint64),
    "bpf_map_lookup_elem": (_int, _int, _pointer, _pointer),
    "bpf_map_delete_elem": (_int, _int, _pointer),
    "bpf_map_get_next_key": (_int, _int, _pointer, _pointer),
    "bpf_map_lookup_batch": (_int, _int, _pointer, _pointer, _pointer, _pointer, _pointer, _pointer),
    "bpf_prog_test_run_opts": (_int, _int, _pointer),
    "ring_buffer__new": (_pointer, _int, _SAMPLE, _pointer, _pointer),
    "ring_buffer__epoll_fd": (_int, _pointer),
    "ring_buffer__consume": (_int, _pointer),
    "ring_buffer__free": (None, _pointer),
}


class BpfError(OSError):
    """The kernel or libbpf refused; `strerror` holds the last line that libbpf said, if any."""


class _TestRun(ctypes.Structure):
    """struct bpf_test_run_opts of bpf.h."""

    _fields_ = (
        ("sz", _size),
        ("data_in", _pointer),
        ("data_out", _pointer),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", _pointer),
        ("ctx_out", _pointer),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", _int),
        ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    )


class _IterInfo(ctypes.Structure):
    """union bpf_iter_link_info of bpf.h, for tasks; kernels before 6.1 pass it over."""

    _fields_ = (("tid", ctypes.c_uint32), ("pid", ctypes.c_uint32), ("pid_fd", ctypes.c_uint32), ("rest", _uint))


class _IterOptions(ctypes.Structure):
    """struct bpf_iter_attach_opts of libbpf.h."""

    _fields_ = (("sz", _size), ("link_info", _pointer), ("link_info_len", ctypes.c_uint32))


_VERIFIER_LOG = 65536
"""Bytes of the verifier's log that are kept; what it dislikes is at the end."""

_said: deque[str] = deque(maxlen=20)
_libc = ctypes.CDLL(None)


def _on_print(level: int, form: bytes, arguments: int) -> int:
    if level > 0:  # LIBBPF_INFO, LIBBPF_DEBUG
        return 0
    # A va_list is passed as a pointer on all 64-bit machines that have BPF, so it can be handed on.
    buffer = ctypes.create_string_buffer(_VERIFIER_LOG)
    _libc.vsnprintf(buffer, _size(len(buffer)), form, _pointer(arguments))
    _said.append(buffer.value.decode(errors="replace").strip())
    return 0


_print = _PRINT(_on_print)  # kept: libbpf holds no reference


@cache
def shared_library() -> ctypes.CDLL:
    """The library, with its prints kept and its signatures set.

    Raises:
        BpfError: it is not installed, or is too old.
    """
    try:
        found = ctypes.CDLL("libbpf.so.1", use_errno=True)
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise BpfError(0, f"libbpf.so.1 is not here ({error}): install libbpf1 (Debian) or libbpf") from error
    found.libbpf_set_print(_print)
    _unlock_memory()
    return found


def _unlock_memory() -> None:
    """Before Linux 5.11 maps count against RLIMIT_MEMLOCK; without the privilege, try with what there is."""
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (ValueError, OSError):
        soft_is_hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft_is_hard, soft_is_hard))


def said() -> list[str]:
    """What libbpf said of late, newest last."""
    return list(_said)


def _error(what: str, code: int | None = None) -> BpfError:
    number = abs(code) if code else ctypes.get_errno()
    said = next((line for line in reversed(_said) if line), "")
    return BpfError(number, f"{what}: {os.strerror(number)}" + (f" ({said})" if said else ""))


@cache
def _kernel_types() -> int | None:
    return shared_library().btf__load_vmlinux_btf() or None


def kernel_has(section: str) -> bool:
    """Whether what a program of `section` (`fentry/fd_install`, `tp_btf/sys_exit`) hooks is in the kernel's BTF.

    A program for kprobes names no function; whether there is one is told by attaching.
    """
    kind, _, name = section.lstrip("?").partition("/")
    types = _kernel_types()
    if types is None:
        return False
    if kind == "tp_btf":
        return bool(
            shared_library().btf__find_by_name_kind(types, f"btf_trace_{name}".encode(), _KIND_TYPEDEF) > 0
        )
    if kind in ("fentry", "fexit"):
        return bool(shared_library().btf__find_by_name_kind(types, name.encode(), _KIND_FUNC) > 0)
    if kind == "kprobe":
        return os.path.exists("/sys/bus/event_source/devices/kprobe")
    return True


def detaches_quickly(section: str) -> bool:
    """Whether detaching a program of `section` takes less than a millisecond: that of a tracepoint."""
    return section.lstrip("?").startswith("tp_btf/")


class Map:
    """A hash map whose keys and values are ctypes structures or integers."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._library = shared_library()

    def update(self, key: Any, value: Any, flags: int = BPF_ANY) -> bool:
        """Store; False where BPF_NOEXIST finds the key there, or BPF_EXIST does not.

        Raises:
            BpfError: the map is full (E2BIG), or there is no memory.
        """
        code = self._library.bpf_map_update_elem(self._fd, ctypes.byref(key), ctypes.byref(value), flags)
        if code == 0:
            return True
        if (flags, ctypes.get_errno()) in ((BPF_NOEXIST, errno.EEXIST), (BPF_EXIST, errno.ENOENT)):
            return False
        raise _error("a map takes no more", code)

    def lookup(self, key: Any, value: Any) -> bool:
        """Fill in `value`; False where there is no such key."""
        code = self._library.bpf_map_lookup_elem(self._fd, ctypes.byref(key), ctypes.byref(value))
        return bool(code == 0)

    def delete(self, key: Any) -> None:
        """Remove; harmless where there is no such key."""
        self._library.bpf_map_delete_elem(self._fd, ctypes.byref(key))

    def keys(self, key_type: Any) -> list[Any]:
        """All keys now; what comes and goes meanwhile may be in it or not."""
        found: list[Any] = []
        before, key = None, key_type()
        while self._library.bpf_map_get_next_key(self._fd, before, ctypes.byref(key)) == 0:
            found.append(key)
            before, key = ctypes.byref(key), key_type()
        return found

    def slices(self, key_type: Any, value_type: Any, size: int) -> Iterator[list[tuple[Any, Any]]]:
        """All (key, value), up to `size` at once; what stays all the while is met once.

        Raises:
            BpfError: the kernel does not give them.
        """
        before, after = None, ctypes.c_uint32()
        code = 0
        while code == 0:
            keys, values, count = (key_type * size)(), (value_type * size)(), ctypes.c_uint32(size)
            code = self._library.bpf_map_lookup_batch(
                self._fd, before, ctypes.byref(after), keys, values, ctypes.byref(count), None
            )
            if code and ctypes.get_errno() != errno.ENOENT:  # ENOENT: these were the last
                raise _error("a map cannot be read", code)
            yield [(keys[index], values[index]) for index in range(count.value)]
            before = ctypes.byref(after)

    def clear(self, key_type: Any) -> None:
        """Remove all that is there now."""
        for key in self.keys(key_type):
            self.delete(key)


class Links:
    """Attached programs by name; detached by `destroy`."""

    def __init__(self) -> None:
        self._links: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._links

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._links))

    def __len__(self) -> int:
        return len(self._links)

    def add(self, name: str, link: int) -> None:
        self._links[name] = link

    def take_back(self, others: "Links", names: set[str]) -> None:
        """Have those of `others` that are still attached, which another thread may be detaching."""
        for name in names:
            link = others._links.pop(name, None)
            if link is not None:
                self._links[name] = link

    def destroy(self) -> None:
        """Detach all that are not taken back; may take half a second for each (fexit), and may run in a thread."""
        while True:
            try:
                _name, link = self._links.popitem()
            except KeyError:
                return
            shared_library().bpf_link__destroy(link)


class Object:
    """One object file: opened, then loaded with some of its programs.

    Args:
        path: of the .bpf.o.

    Raises:
        BpfError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._library = shared_library()
        self._object = self._library.bpf_object__open_file(str(path).encode(), None)
        if not self._object:
            raise _error(f"cannot open {path}")
        self._programs = dict(self._find_programs())
        self._maps: dict[str, Map] = {}

    def close(self) -> None:
        """Unload; links and rings must be gone before."""
        if self._object:
            self._library.bpf_object__close(self._object)
            self._object = None

    def sections(self) -> dict[str, str]:
        """The section of each program by its name."""
        return {
            name: self._library.bpf_program__section_name(program).decode()
            for name, program in self._programs.items()
        }

    def load(self, names: set[str]) -> None:
        """Load the programs `names` and the maps.

        Raises:
            BpfError: the kernel refuses one of them.
        """
        for name, program in self._programs.items():
            self._library.bpf_program__set_autoload(program, name in names)
        code = self._library.bpf_object__load(self._object)
        if code:
            raise _error("the kernel refuses to load", code)

    def attach(self, name: str, links: Links) -> None:
        """Attach a loaded program; `name@function` attaches it as a kprobe, `name@%function` at the return.

        Raises:
            BpfError: the kernel has not what it hooks, or refuses.
        """
        program, _, function = name.partition("@")
        if function:
            link = self._library.bpf_program__attach_kprobe(
                self._programs[program], function.startswith("%"), function.lstrip("%").encode()
            )
        else:
            link = self._library.bpf_program__attach(self._programs[program])
        if not link:
            raise _error(f"cannot attach {name}")
        links.add(name, link)

    def map(self, name: str) -> Map:
        """The map `name` of a loaded object."""
        if name not in self._maps:
            self._maps[name] = Map(self.map_fd(name))
        return self._maps[name]

    def map_fd(self, name: str) -> int:
        """The descriptor of the map `name`; the object keeps it."""
        return int(self._library.bpf_map__fd(self._find_map(name)))

    def variables(self, layout: Any) -> Any:
        """The global variables of a loaded object, in the kernel's own memory (.bss), as `layout`.

        Raises:
            BpfError: there are none.
        """
        try:
            # Stays mapped as long as anybody holds the structure.
            return layout.from_buffer(mmap.mmap(self.map_fd(".bss"), ctypes.sizeof(layout), mmap.MAP_SHARED))
        except (OSError, ValueError) as error:
            raise BpfError(getattr(error, "errno", 0), f"cannot map the variables: {error}") from error

    def run(self, name: str, argument: Any) -> None:
        """Run a program of section "syscall" with `argument`, which it may change.

        Raises:
            BpfError: it cannot be run here.
        """
        options = _TestRun(sz=ctypes.sizeof(_TestRun))
        options.ctx_in = ctypes.addressof(argument)
        options.ctx_size_in = ctypes.sizeof(argument)
        fd = self._library.bpf_program__fd(self._programs[name])
        code = self._library.bpf_prog_test_run_opts(fd, ctypes.byref(options))
        if code:
            raise _error(f"cannot run {name}", code)

    def iterate(self, name: str, pid: int) -> None:
        """Run a program of section "iter/task" for each thread of a process; before Linux 6.1, for every task.

        Raises:
            BpfError: it cannot be run here.
        """
        info = _IterInfo(pid=pid)
        options = _IterOptions(ctypes.sizeof(_IterOptions), ctypes.addressof(info), ctypes.sizeof(info))
        link = self._library.bpf_program__attach_iter(self._programs[name], ctypes.byref(options))
        if not link:
            raise _error(f"cannot attach {name}")
        try:
            fd = self._library.bpf_iter_create(self._library.bpf_link__fd(link))
            if fd < 0:
                raise _error(f"cannot run {name}", fd)
            _read_out(fd)
        finally:
            self._library.bpf_link__destroy(link)

    def _find_programs(self) -> Iterator[tuple[str, int]]:
        program = self._library.bpf_object__next_program(self._object, None)
        while program:
            yield self._library.bpf_program__name(program).decode(), program
            program = self._library.bpf_object__next_program(self._object, program)

    def _find_map(self, name: str) -> int:
        found = self._library.bpf_object__find_map_by_name(self._object, name.encode())
        if not found:
            raise _error(f"no map {name}")
        return int(found)


def _read_out(fd: int) -> None:
    """Read to the end; the kernel wants a pause after a million tasks."""
    try:
        while True:
            try:
                if not os.read(fd, mmap.PAGESIZE):
                    return
            except BlockingIOError:
                continue
    except OSError as error:
        raise BpfError(error.errno, f"an iterator failed: {error.strerror}") from error
    finally:
        os.close(fd)


class Ring:
    """A ring buffer; `fd` is readable while there is something in it.

    Args:
        map_fd: of the map.
        receive: called by `drain` with each record.
    """

    def __init__(self, map_fd: int, receive: Callable[[bytes], None]) -> None:
        self._library = shared_library()
        self._left = 0
        # The two positions have a page each, see Documentation/bpf/ringbuf.rst.
        pages = mmap.mmap(map_fd, 2 * mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ)
        self._positions = memoryview(pages).cast("L")

        def sample(_context: int | None, data: int, size: int) -> int:
            receive(ctypes.string_at(data, size))
            self._left -= 1
            # Less than 0 ends `drain`; this record is consumed all the same.
            return 0 if self._left else -1

        self._sample = _SAMPLE(sample)  # libbpf keeps no reference
        self._ring = self._library.ring_buffer__new(map_fd, self._sample, None, None)
        if not self._ring:
            raise _error("no ring buffer")
        self.fd = int(self._library.ring_buffer__epoll_fd(self._ring))

    def drain(self, most: int) -> None:
        """Take what is there, up to `most` records, so that a busy kernel cannot keep the caller for good."""
        self._left = most
        self._library.ring_buffer__consume(self._ring)

    @property
    def taken(self) -> int:
        """The position up to which it was drained."""
        return self._positions[0]

    @property
    def filled(self) -> int:
        """The position up to which there are records, some of which may be written just now."""
        return self._positions[mmap.PAGESIZE // self._positions.itemsize]

    def close(self) -> None:
        if self._ring:
            self._library.ring_buffer__free(self._ring)
            self._ring = None
            self._positions.release()
