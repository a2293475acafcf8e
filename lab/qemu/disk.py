"""Disk images made of a tree of files, by mke2fs alone: nothing is mounted, no loop device is taken."""

from __future__ import annotations

from pathlib import Path

from lab.qemu import cache

# What kernels before 5.15 do not know, and mke2fs might choose. Tables are written now: a machine that found
# them unwritten would do it, in the background of its every boot.
FEATURES = "^orphan_file,^metadata_csum_seed"
EXTENDED = "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0"
FREE_INODES = 100_000
JOURNAL_MB = 16


def make_ext4(disk: Path, tree: Path, label: str, size_mb: int | None = None) -> None:
    """Make a sparse ext4 image with the files of a tree: of that size to write to, or else one to read.

    One that is only read is as large as its files need, and has no journal.
    """
    files = len(cache.run(["find", tree]).splitlines())
    if size_mb is None:
        used = int(cache.run(["du", "--summarize", "--block-size=1M", tree]).split()[0])
        size, inodes = used * 5 // 4 + 8, files + 64
        journal = ["-O", f"{FEATURES},^has_journal"]
    else:
        size, inodes = size_mb, files + FREE_INODES
        journal = ["-O", FEATURES, "-J", f"size={JOURNAL_MB}"]
    with disk.open("wb") as file:
        file.truncate(size << 20)
    sizes = ["-m", "0", "-N", str(inodes)]
    cache.run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-L", label, *journal, *sizes, "-E", EXTENDED, "-d", tree, disk]
    )
