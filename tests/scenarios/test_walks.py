"""The pages of docs/walks: how they are filled, and that they are what their commands print."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "walks"

PAGE = """\
# A page

```console iptables
$ one | grep 'a b'
old
$ two
```

<!-- table -->
old
<!-- end -->

```sh
$ not ours
```

```console nftables
$ one | grep 'a b'
```
"""
FILLED = """\
# A page

```console iptables
$ one | grep 'a b'
  first
second
$ two
new
```

<!-- table -->
| rows |
<!-- end -->

```sh
$ not ours
```

```console nftables
$ one | grep 'a b'
other
```
"""
ASKED = (("iptables", "one | grep 'a b'"), ("iptables", "two"), ("nftables", "one | grep 'a b'"))
PRINTED = dict(zip(ASKED, ("  first\nsecond  \n", "new\n", "\nother\n\n"), strict=True))


@pytest.fixture(scope="module")
def walks() -> ModuleType:
    loader = SourceFileLoader("walks", str(SCRIPT))
    spec = importlib.util.spec_from_loader("walks", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_a_pages_commands_are_those_of_its_console_blocks(walks: ModuleType) -> None:
    assert walks.commands(PAGE) == ASKED


def test_outputs_and_the_table_replace_what_was_there(walks: ModuleType) -> None:
    assert walks.filled(PAGE, PRINTED, "| rows |\n") == FILLED
    assert walks.filled(FILLED, PRINTED, "| rows |\n") == FILLED


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("a rule [17 packets so far]", "a rule [… packets so far]"),
        ("accept counter packets 3 bytes 180", "accept counter packets … bytes …"),
        ("dev pwpod677ef34bb3, iifname pwpod*", "dev pwpod…, iifname pwpod*"),
        ("10.244.1.2 has 02:ac:48:ec:06:7f on eth0", "10.244.1.2 has … on eth0"),
        ('"client_port": 35818, "server_port": 80', '"client_port": …, "server_port": 80'),
        (
            "tcp      6 9 TIME_WAIT src=a dst=b sport=4782 dport=30180 src=c dst=b sport=80 dport=208 use=1",
            "tcp      6 … TIME_WAIT src=a dst=b sport=… dport=30180 src=c dst=b sport=80 dport=… use=…",
        ),
        ("target   \nDNAT  6 -- to:10.244.1.2:80", "target\nDNAT  6 -- to:10.244.1.2:80"),
        ("fd00:10:244:1::2 . tcp . 80 : 7050:2", "fd00:10:244:1::2 . tcp . 80 : 7050:2"),
    ],
)
def test_only_what_is_different_each_time_is_replaced(walks: ModuleType, printed: str, shown: str) -> None:
    assert walks.normalized(printed) == shown
    assert walks.normalized(shown) == shown


def test_a_pages_command_is_run_in_another_lab_than_the_default_one(walks: ModuleType) -> None:
    assert walks.in_lab("podwire lab exec node1 -- ip link | cat", "x") == (
        "podwire lab exec --name x node1 -- ip link | cat"
    )
    assert walks.in_lab("podwire trace --lab default a b", "x") == "podwire trace --lab x a b"


def test_every_page_shows_what_its_commands_print() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
