"""The whole native engine under the compilers' sanitizers: races, leaks, overruns, overflows."""

import subprocess
from pathlib import Path

import pytest

from octavo.generating.native_build import find_compiler

DRIVER = Path(__file__).with_name("native_engine_driver.cpp")
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_nothing_is_found_and_nothing_depends_on_threads(tmp_path, sanitizers):
    program = tmp_path / "driver"
    flags = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-pthread", f"-fsanitize={sanitizers}"]
    build = [*find_compiler(), *flags, "-fno-sanitize-recover=all", DRIVER, "-o", program]
    subprocess.run(build, check=True, capture_output=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) == 4  # every storage
