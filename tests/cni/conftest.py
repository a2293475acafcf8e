"""Say what differs, when an assertion in the helper fails, as pytest does in tests."""

import pytest

pytest.register_assert_rewrite("tests.cni.world")
