"""Run one command in a virtual machine that sees this machine's files and can change none of them.

The machine's root is an overlay: what it reads are our files, what it writes is in its memory and ends with
it. It has no network but its loopback. Two virtiofs shares go in: the files, through a view that is read-only
in a mount namespace of its own, and the job's directory, where the command's output and status come out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lab.qemu import cache
from lab.qemu.kernels import Kernel
from lab.topology import LabError

KVM = Path("/dev/kvm")
ANSWER = Path("/run/podwire-vm-accel")
"""Whether KVM boots a kernel, known until the next boot: `BOOT-ID kvm` or `BOOT-ID tcg`."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PROBE_SECONDS = 10.0
MARKER = "podwire-boot: this kernel runs"
SOCKET_SECONDS = 10.0
END_SECONDS = 5.0
VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")
CPU = {"kvm": "host", "tcg": "Nehalem"}
"""What QEMU shows as the processor: emulating the newest instructions costs more than they are worth."""

QUICK = "mitigations=off no_timer_check cryptomgr.notests norandmaps clearcpuid=cx16"
"""Kernel parameters; without random addresses what was translated for one process serves the next.

QEMU 7.2 emulates cmpxchg16b with wrong flags: Linux 6.12, which has it in its allocator, stops (a double
fault, EFLAGS full of an address). HAProxy has it, too, and no other way, so the processor must have it.
"""

START = Path(__file__).parent / "boot" / "job"
# A view of the files in which every mount is read-only, for this process alone.
READ_ONLY = """
mount --rbind "$1" "$2"
findmnt --noheadings --raw --output TARGET --submounts "$2" | while read -r mount; do
    mount -o remount,bind,ro "$(printf %b "$mount")" || exit
done || exit
shift 2
exec "$@"
"""


def run(
    command: str, kernel: Kernel, memory_mb: int = 1024, seconds: float = 600, share: Path = Path("/")
) -> tuple[int, str]:
    """Run a shell command as root in a machine of its own; return its exit status and output.

    `share` is what it has for a root file system, a whole one; /run is its own, and empty. Raises
    LabError when the machine does not start, or has not ended after so many seconds; nothing of it is left
    then either.
    """
    cache.need_root()
    accel = usable_accel(kernel)
    with tempfile.TemporaryDirectory(prefix="podwire-vm-") as name:
        directory = Path(name)
        job = directory / "job"
        job.mkdir()
        (job / "command").write_text(f"{command}\n")
        shutil.copy(START, job / "start")
        with ExitStack() as stack:
            files = [_share(stack, directory, "host", share), _share(stack, directory, "job", job)]
            words = [*_machine(kernel, accel, memory_mb), *(word for pair in files for word in pair)]
            words += ["-drive", f"file={kernel.modules},if=virtio,format=raw,readonly=on"]
            words += ["-append", _append("podwire.job"), "-serial", f"file:{directory / 'console'}"]
            ended = _wait(stack.enter_context(_process(words, directory / "qemu.log")), seconds)
        output = _text(job / "output")
        status = _text(job / "status").strip()
        if ended and status:
            return int(status), output
        seen = cache.tail(output + _text(directory / "console") + _text(directory / "qemu.log"))
        what = "ended without a status" if ended else f"had not ended after {seconds:.0f} s"
        raise LabError(f"the machine with kernel {kernel.release} {what}; what it wrote ends:\n{seen}")


def usable_accel(kernel: Kernel) -> str:
    """Return `kvm` when KVM is here and boots this kernel, else `tcg`; tried once in a boot of this machine.

    The device alone says little: there are machines that have it and whose guests stop at their first steps.
    """
    boot = BOOT_ID.read_text().strip()
    known = _text(ANSWER).split()
    if len(known) == 2 and known[0] == boot and known[1] in CPU:
        return known[1]
    accel = "kvm" if os.access(KVM, os.R_OK | os.W_OK) and _boots(kernel, "kvm") else "tcg"
    part = ANSWER.with_name(f"{ANSWER.name}.{os.getpid()}")
    part.write_text(f"{boot} {accel}\n")
    part.rename(ANSWER)
    return accel


def _boots(kernel: Kernel, accel: str) -> bool:
    """Whether a kernel gets as far as its first program within a few seconds."""
    with tempfile.TemporaryDirectory(prefix="podwire-vm-") as name:
        directory = Path(name)
        words = [*_machine(kernel, accel, 256), "-append", _append("podwire.probe")]
        words += ["-serial", f"file:{directory / 'console'}"]
        with _process(words, directory / "qemu.log") as machine:
            _wait(machine, PROBE_SECONDS)
        return MARKER in _text(directory / "console")


def _append(word: str) -> str:
    return f"console=ttyS0 quiet panic=-1 {QUICK} {word}"


def _machine(kernel: Kernel, accel: str, memory_mb: int) -> list[str]:
    """Return QEMU's command line for a machine without disks; its memory can be shared with virtiofsd."""
    options = {
        "-M": "pc,usb=off",
        "-accel": "kvm" if accel == "kvm" else "tcg,thread=multi",
        "-cpu": CPU[accel],
        "-m": str(memory_mb),
        "-object": f"memory-backend-memfd,id=memory,size={memory_mb}M,share=on",
        "-numa": "node,memdev=memory",
        "-device": "virtio-rng-pci",
        "-kernel": str(kernel.image),
        "-initrd": str(kernel.initrd),
    }
    words = [word for option in options.items() for word in option]
    return [cache.find("qemu-system-x86_64"), "-nodefaults", "-nographic", "-no-reboot", *words]


def _share(stack: ExitStack, directory: Path, tag: str, source: Path) -> list[str]:
    """Start a virtiofsd and return QEMU's options for it; only the job's files can be written."""
    cache.need_file(VIRTIOFSD, "qemu-system-common")
    socket = directory / f"{tag}.socket"
    view = directory / f"{tag}.view"
    view.mkdir()
    server: list[str | Path] = [VIRTIOFSD, f"--socket-path={socket}", "--thread-pool-size=1"]
    if tag == "job":
        server += ["-o", f"source={source}", "-o", "sandbox=chroot", "-o", "cache=none"]
    else:
        server += ["-o", f"source={view}", "-o", "sandbox=chroot", "-o", "cache=always"]
        unshare = ["unshare", "--mount", "--propagation", "private", "sh", "-c", READ_ONLY, "sh"]
        server = [*unshare, source, view, *server]
    log = directory / f"{tag}.log"
    process = stack.enter_context(_process([str(word) for word in server], log))
    deadline = time.monotonic() + SOCKET_SECONDS
    while not socket.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise LabError(f"virtiofsd did not start; it wrote:\n{cache.tail(_text(log))}")
        time.sleep(0.02)
    device = f"vhost-user-fs-pci,chardev={tag},tag={tag}"
    return ["-chardev", f"socket,id={tag},path={socket}", "-device", device]


@contextmanager
def _process(words: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that has ended afterwards, and ends with us even when we are killed."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [cache.find("setpriv"), "--pdeathsig", "KILL", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        if not _wait(process, END_SECONDS):
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for a process; return whether it has ended in time."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except FileNotFoundError:
        return ""
