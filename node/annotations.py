"""What this node's Node object is to say where there is no API to write it to: in a file, for whoever keeps
the folder of manifests.

    STATE_DIR/annotations.json   {"metadata": {"name": "node1", "annotations": {"podwire.io/…": "…"}}}
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec

from node.wireguard_keys import put

log = logging.getLogger("podwire.node")

FILE = "annotations.json"


class AnnotationFile:
    """Keeps the file; used by one thread, but for `problems`, which are sentences."""

    def __init__(self, directory: Path, node: str) -> None:
        self._path = directory / FILE
        self._node = node
        self._kept: Mapping[str, str] | None = None
        self.problems: tuple[str, ...] = ()

    def keep(self, wanted: Mapping[str, str | None], lacking: str) -> None:
        """Write what is wanted (None: not there); nothing: that is not known yet.

        `lacking` is what the Node object in the folder lacks.
        """
        if not wanted:
            return
        annotations = {key: value for key, value in wanted.items() if value is not None}
        try:
            self._write(annotations)
        except OSError as error:
            self.problems = (f"{self._path} cannot be written: {error.strerror}",)
            return
        where = f"its manifest is to have the annotations in {self._path}"
        self.problems = (f"node {self._node}: {where}: {lacking} differs",) if lacking and annotations else ()

    def _write(self, annotations: Mapping[str, str]) -> None:
        if annotations == self._kept:
            return
        if annotations:
            document = {"metadata": {"name": self._node, "annotations": annotations}}
            put(self._path, msgspec.json.encode(document) + b"\n")
            log.info("wrote %s", self._path)
        else:
            self._path.unlink(missing_ok=True)
        self._kept = annotations
