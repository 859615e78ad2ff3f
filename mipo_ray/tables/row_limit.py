"""How long a row of a table may be that others wrote."""

from __future__ import annotations

from mipo_ray.errors import UserError

# Bytes of a row, decompressed. The longest window of any model (10 million tokens of 4 to 5 bytes) stays below it, and
# with it a picture beside a prompt; and a program that reads rows of this size needs no more than some hundred MiB.
LONGEST_ROW = 64 * 1024**2
# Values of a row, those in its lists and mappings among them. Python takes up to a hundred bytes for one of which a
# file has a bit or less: one of 1 KB can hold fifty million.
MOST_VALUES = 2_000_000


def too_long(where: str, longest: int, found: str = "more") -> UserError:
    """The error for a row of more than `longest` bytes; `found`: how many it has, where that is known."""
    return UserError(
        f"{where}: expected a row of at most {longest:,} bytes ({longest / 1024**2:g} MiB), found {found}; "
        "split it, or leave it out"
    )


def too_many(where: str, found: str = "more") -> UserError:
    """The error for a row of more than `MOST_VALUES` values; `found`: how many it has, where that is known."""
    return UserError(
        f"{where}: expected a row of at most {MOST_VALUES:,} values, those in its lists and mappings among them, found "
        f"{found}; leave out what is not needed"
    )
