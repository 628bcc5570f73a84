"""Compile the kernel programs: `python -m limitfs.hearing.bpf.build [--out DIR]`.

The objects are CO-RE: they fit every kernel that has BTF, so they are built once, by whoever builds the package,
and only libbpf is needed where they run. Needs clang (11 or later, with the BPF target) and the headers of
libbpf (libbpf-dev) and the kernel (linux-libc-dev). See https://docs.kernel.org/bpf/libbpf/.
"""

import argparse
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parent
NAMES = ("fds", "rss", "tasks")

# As bpf_tracing.h calls the registers of each machine.
_TARGETS = {"x86_64": "x86", "aarch64": "arm64", "riscv64": "riscv", "ppc64le": "powerpc", "s390x": "s390"}


def build(out: Path = SOURCES) -> bool:
    """Compile every program into `out`; say on standard error what is missing.

    Returns:
        False where clang or a header is absent, or a program does not compile; nothing is raised, as the
        package works without, less surely.
    """
    out.mkdir(parents=True, exist_ok=True)
    done = [compile_program(SOURCES / f"{name}.bpf.c", out) for name in NAMES]  # all of them, whichever fails
    return all(done)


def compile_program(source: Path, out: Path) -> bool:
    """Compile `source`, a .bpf.c, into a .bpf.o in `out`; as `build`."""
    clang = shutil.which("clang")
    if clang is None:
        return _complain("clang is not here: install clang (and llvm), or hear by sampling only")
    target = out / source.with_suffix(".o").name
    done = _run([clang, *_flags(), "-c", str(source), "-o", str(target)])
    strip = shutil.which("llvm-strip")
    # Only the DWARF goes; BTF stays. Without the tool the object is larger, and works as well.
    return done and (strip is None or _run([strip, "-g", str(target)]))


def _flags() -> Iterator[str]:
    yield from ("-O2", "-g", "-Wall", "-Wno-unused-function", "-target", "bpf")
    yield "-mcpu=v3"  # atomic compare-and-swap
    yield f"-D__TARGET_ARCH_{_TARGETS.get(platform.machine(), platform.machine())}"
    multiarch = sysconfig.get_config_var("MULTIARCH") or f"{platform.machine()}-linux-gnu"
    yield f"-I/usr/include/{multiarch}"
    # The same object wherever it is built.
    yield f"-ffile-prefix-map={SOURCES}=."
    yield f"-fdebug-compilation-dir={SOURCES}"


def _run(command: list[str]) -> bool:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return _complain(f"{command[0]}: {error}")
    if done.returncode == 0:
        return True
    hint = ""
    if "file not found" in done.stderr:
        hint = "\nheaders are missing: install libbpf-dev and linux-libc-dev"
    return _complain(f"{' '.join(command)}:\n{done.stderr}{hint}")


def _complain(message: str) -> bool:
    print(f"limitfs: no kernel programs: {message}", file=sys.stderr)
    return False


def main() -> int:
    """Exit status 1 where nothing could be built."""
    parser = argparse.ArgumentParser("python -m limitfs.hearing.bpf.build", description="Compile the programs.")
    parser.add_argument("--out", type=Path, default=SOURCES, help="where the .bpf.o files go")
    return 0 if build(parser.parse_args().out) else 1


if __name__ == "__main__":
    sys.exit(main())
