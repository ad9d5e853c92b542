from collections.abc import Generator

import pytest

from tests.playbook import open_books


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    """A story that ends with commands nobody expected has not been told right."""
    open_books()
    yield
    for book in open_books():
        book.done()
