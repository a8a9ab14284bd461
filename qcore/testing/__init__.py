"""The conformance suite: what every kernel has to do, run by vendors in their own tests and by `qcore verify`.

A vendor's whole test file:

    import pytest
    from qcore.testing.suite import *
    from qcore.testing.capabilities import Capabilities

    @pytest.fixture(scope="session")
    def vendor() -> Capabilities:
        return Capabilities("mychip")

docs/plugins.md tells the rest.
"""
