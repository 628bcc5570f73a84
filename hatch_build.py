"""Compile the kernel programs into the package where clang is there; a package without them works, less surely."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROGRAMS = Path(__file__).parent / "limitfs" / "hearing" / "bpf"


class KernelPrograms(BuildHookInterface[Any]):
    """Runs limitfs/hearing/bpf/build.py before the wheel is put together."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build in the source tree, where an editable install finds them too."""
        del version
        if _load(PROGRAMS / "build.py").build():
            # What the compiler makes fits every machine of this kind, and no other kind.
            build_data["artifacts"] += ["limitfs/hearing/bpf/*.bpf.o"]


def _load(path: Path) -> ModuleType:
    """The module, without the package around it, whose requirements are not here yet."""
    spec = importlib.util.spec_from_file_location("build_programs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
