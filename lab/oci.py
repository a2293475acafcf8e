"""A container image made here: a static busybox that serves HTTP and says whom it saw."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shutil
import tarfile
from pathlib import Path

from lab.topology import LabError

NAME = "localhost/podwire-test:1"
PORT = 8080
COMMAND = ["/bin/busybox", "httpd", "-f", "-p", f"[::]:{PORT}", "-h", "/www"]

# httpd runs this for "/". The answer is the echo server's of the lab, so that its probes can be used.
SAY = """\
#!/bin/sh
printf 'Content-Type: application/json\\r\\n\\r\\n{"name": "%s", "client_address": "%s"}' \
    "$(hostname)" "$REMOTE_ADDR"
"""
APPLETS = ("sh", "hostname", "printf", "sleep", "wget", "nc", "ip")
DIRECTORIES = ("bin", "dev", "etc", "proc", "run", "sys", "tmp", "www", "www/cgi-bin")
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def write(target: Path) -> Path:
    """Write the image as `docker save` would; containerd and podman read that."""
    layer = _layer()
    config = {
        "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {"Entrypoint": COMMAND, "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        "history": [{"created": "1970-01-01T00:00:00Z"}],
    }
    manifest = [{"Config": "config.json", "RepoTags": [NAME], "Layers": ["layer.tar"]}]
    with tarfile.open(target, "w") as archive:
        _add(archive, "config.json", json.dumps(config).encode())
        _add(archive, "layer.tar", layer)
        _add(archive, "manifest.json", json.dumps(manifest).encode())
    return target


def _busybox() -> Path:
    """Return the program of Debian's busybox-static."""
    found = shutil.which("busybox", path="/usr/bin:/bin:/usr/sbin:/sbin")
    if found is None:
        raise LabError("busybox is missing: `apt-get install busybox-static`")
    return Path(found)


def _layer() -> bytes:
    """Return the only layer as a tar file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in DIRECTORIES:
            directory = tarfile.TarInfo(name)
            directory.type, directory.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(directory)
        _add(archive, "bin/busybox", _busybox().read_bytes(), 0o755)
        for applet in APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(link)
        _add(archive, "www/cgi-bin/index.cgi", SAY.encode(), 0o755)
    return out.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), mode
    archive.addfile(entry, io.BytesIO(content))
