from collections.abc import Iterator

import pytest

from tests.playbook import open_books


@pytest.fixture(autouse=True)
def every_book_is_read_to_its_end() -> Iterator[None]:
    """A story that ends with commands nobody expected has not been told right."""
    open_books()
    yield
    for book in open_books():
        book.done()
