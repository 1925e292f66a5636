"""Whether objects of Python are still what a caller found them to be, without running Python for each of them."""

from __future__ import annotations

from ... import _C

unchanged = _C.unchanged
"""``unchanged(own, calls, empty, entries)`` says whether no call returns anything true, no object in `empty` is true,
and every three of `entries`, a dictionary, a key and a value, say what the dictionary holds: this very object, or
nothing under that key for ``...``. None stands for the dictionary `own`. With the key None the value may be how many
entries a dictionary has. In the place of a dictionary there may also be a list, with a tuple of what it holds as the
value, or another object, with its type.
"""
