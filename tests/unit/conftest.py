"""Quick compilation for all tests of this folder, and a way to switch the check of annotations off."""

import jaxtyping
import pytest
from toys import quick_compile as quick_compile


@pytest.fixture
def without_shape_hook():
    """What a user sees: in production nothing checks the annotations before the function's own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
