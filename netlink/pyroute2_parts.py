"""The parts of pyroute2 that are used here, without the rest of it.

Importing any module of pyroute2 runs the package's `__init__`, which imports everything it has, a database
included: 100 to 150 ms and 7 MB, of a daemon that is to be ready within a second. The modules with the
message formats need none of that. So the package is put in place empty; who has imported all of it already
keeps it.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec

if "pyroute2" not in sys.modules:
    spec = find_spec("pyroute2")
    if spec is None:
        raise ModuleNotFoundError("the package pyroute2 is not there", name="pyroute2")
    sys.modules["pyroute2"] = module_from_spec(spec)  # made, and not executed

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

__all__ = ["ifaddrmsg", "ifinfmsg"]
