"""Puts the native engine's library into the wheel; without a compiler the wheel is pure Python.

An editable install gets none: there the library is compiled from the sources as they are.
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeLibrary(BuildHookInterface):
    """Compiles ``generating/native.cpp`` into the directory that becomes ``octavo/generating``."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the library to ``build_data``, and the platform it runs on to the wheel's name."""
        if version != "standard":
            return
        source = Path(self.root) / "src/octavo/generating/native_build.py"
        spec = importlib.util.spec_from_file_location("native_build", source)
        assert spec is not None
        assert spec.loader is not None
        native_build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native_build)
        name = f"_native-{native_build.source_key()}.so"
        path = Path(self.directory) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Where it will run the compiler's own libraries may be older.
        static = ("-static-libstdc++", "-static-libgcc") if sys.platform == "linux" else ()
        try:
            native_build.compile_library(native_build.find_compiler(), path, *static)
        except native_build.NoLibraryError as reason:
            self.app.display_warning(f"a wheel without the native engine: {reason}")
            return
        build_data["force_include"][str(path)] = f"octavo/generating/{name}"
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
        self.library = path

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Leave nothing beside the wheel."""
        if library := getattr(self, "library", None):
            library.unlink()
