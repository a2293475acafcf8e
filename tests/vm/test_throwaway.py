"""A throwaway machine: a stock kernel, the command's output and status, and this machine as it was."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from lab.qemu import kernels, throwaway
from lab.qemu.kernels import Kernel
from lab.topology import LabError

# Each write is tried in another way; what comes out is what each said.
COMMAND = """
uname -r
for module in wireguard ip_vs dummy; do modprobe "$module" && echo "has $module"; done
echo changed > '{file}' && echo "sees $(cat '{file}')"
mkdir /run/host && mount -t virtiofs host /run/host && {{
    echo changed > '/run/host{file}' || rm -f '/run/host{file}' || echo 'host is read-only'
    mount -o remount,rw /run/host; echo changed > '/run/host{file}' || echo 'host stays read-only'
}}
echo error >&2
exit 7
"""


class Seen(NamedTuple):
    status: int
    output: str
    kernel: Kernel
    file: Path
    """One of ours, not below /tmp: that is the machine's own."""
    directory: Path
    """Where the machine's own directory is made."""
    mounts: str


def mounts() -> str:
    return Path("/proc/self/mounts").read_text()


def left(seen: Seen) -> list[str]:
    """Return what is left of the machine: directories with their sockets, processes that name one."""
    found = [str(path) for path in seen.directory.iterdir()]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # ended meanwhile
            if str(seen.directory) in (line := path.read_text(errors="replace")):
                found.append(line)
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """Boot once and return what the tests look at."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("no QEMU (`scripts/setup vm`)")
    kernel, directory, before = kernels.prepare("stable", print), tmp_path_factory.mktemp("vm"), mounts()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/var/tmp") as outside:
        patch.setattr(tempfile, "tempdir", str(directory))
        file = Path(outside) / "file"
        file.write_text("as it was")
        status, output = throwaway.run(COMMAND.format(file=file), kernel, memory_mb=512, seconds=120)
        yield Seen(status, output, kernel, file, directory, before)


def test_it_runs_the_kernel_asked_for_with_its_modules(seen: Seen) -> None:
    lines = seen.output.splitlines()
    assert lines[0] == seen.kernel.release
    assert [line for line in lines if line.startswith("has ")] == ["has wireguard", "has ip_vs", "has dummy"]


def test_exit_status_and_both_outputs_are_passed_on(seen: Seen) -> None:
    assert seen.status == 7
    assert seen.output.splitlines()[-1] == "error"


def test_what_it_writes_it_sees_itself_and_nobody_else(seen: Seen) -> None:
    assert "sees changed" in seen.output
    assert seen.file.read_text() == "as it was"


def test_it_cannot_change_our_files_by_the_share_either(seen: Seen) -> None:
    assert "host is read-only" in seen.output
    assert "host stays read-only" in seen.output


def test_nothing_of_it_is_left(seen: Seen) -> None:
    assert left(seen) == []
    assert mounts() == seen.mounts


def test_one_that_does_not_end_in_time_is_ended_and_leaves_nothing(seen: Seen) -> None:
    with pytest.raises(LabError, match="had not ended after 1 s"):
        throwaway.run("sleep 1000", seen.kernel, memory_mb=256, seconds=1)
    assert left(seen) == []
