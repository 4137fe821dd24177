from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-public-api", action="store_true", help="list the public names anew: nothing is compared")
