"""Models of the tests' own have the same references under every engine."""

from tests.agreement.conftest import references as references
