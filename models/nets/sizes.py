"""What sizes of nets must be, in the words of the config. Imports no torch: it is asked before a run starts, too."""

from collections.abc import Collection

from models.refused import RefusedError


def check_counts(**counts: int) -> None:
    """Refuse a size of a net that is not a positive integer, with a RefusedError that names the config key."""
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise RefusedError(f"model.net.{name}={value} is no size; give a positive integer.")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Refuse a word that is not among `choices`, with a RefusedError that names the config key."""
    if value not in choices:
        raise RefusedError(f"model.net.{name}={value} is unknown; choose {' or '.join(choices)}.")


def check_heads(*, hidden_size: int, num_heads: int, num_kv_heads: int) -> None:
    """Refuse numbers of heads that do not divide, with a RefusedError that lists those that do."""
    check_counts(hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads)
    if hidden_size % num_heads:
        raise RefusedError(
            f"model.net.num_heads={num_heads} does not divide model.net.hidden_size={hidden_size}; "
            f"choose one of {divisors(hidden_size)}."
        )
    if num_heads % num_kv_heads:
        raise RefusedError(
            f"model.net.num_kv_heads={num_kv_heads} does not divide model.net.num_heads={num_heads}; "
            f"choose one of {divisors(num_heads)}."
        )


def divisors(number: int) -> str:
    """The divisors of a positive number, listed for a message."""
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)
