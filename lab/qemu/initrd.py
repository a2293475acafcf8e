"""The initrd of a kernel: busybox, the modules that the root file system needs, and `boot/init`.

One initrd has two ways in, and a probe; words on the kernel's command line choose (boot/init has them).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lab.qemu import cache

BOOT = Path(__file__).parent / "boot"
BUSYBOX = Path("/bin/busybox")
MACHINE = ("virtio_pci", "virtio_blk", "ext4", "virtio_net")
"""Modules of a lab's machine. The others that it needs, udev loads from the disk of modules."""
JOB = ("virtio_pci", "virtio_blk", "ext4", "virtiofs", "overlay")
"""Modules of a throwaway machine."""
KEY = cache.digest((BOOT / "init").read_bytes(), *MACHINE, "/", *JOB)
"""What an initrd is made of, apart from the kernel."""


def make(tree: Path, release: str, target: Path) -> None:
    """Write the initrd of the kernel whose modules are below `tree`; raise LabError when one is missing."""
    cache.need_file(BUSYBOX, "busybox-static")
    content = target.with_name("initrd.tree")
    for directory in ("bin", "modules", "proc", "sys", "dev", "host", "root", "overlay"):
        (content / directory).mkdir(parents=True)
    shutil.copy2(BUSYBOX, content / "bin/busybox")
    shutil.copy2(BOOT / "init", content / "init")
    (content / "init").chmod(0o755)
    for name, modules in (("machine", MACHINE), ("job", JOB)):
        files = _files(tree, release, modules)
        for file in files:
            shutil.copy(file, content / "modules" / file.name)
        (content / "modules" / name).write_text("".join(f"{file.name}\n" for file in files))
    # Not compressed: unpacking costs an emulated processor more than loading a few megabytes does.
    archive = 'find . | busybox cpio -o -H newc -F "$0" 2>/dev/null'
    cache.find("busybox")
    cache.run(["sh", "-c", archive, target], cwd=content)
    shutil.rmtree(content)


def _files(tree: Path, release: str, modules: tuple[str, ...]) -> list[Path]:
    """Return the files of modules and all they depend on, in the order to load them."""
    found: dict[Path, None] = {}
    for module in modules:
        lines = cache.run(["modprobe", "-d", tree, "-S", release, "--show-depends", module]).splitlines()
        # Lines are `insmod PATH` or, for what is part of the kernel, `builtin NAME`.
        found.update((Path(line.split()[1]), None) for line in lines if line.startswith("insmod"))
    return list(found)
