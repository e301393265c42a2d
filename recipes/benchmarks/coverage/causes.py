"""What reasons and errors on many models have in common."""

import re


def cause_of(reason: str) -> str:
    """Return the first thing that stands in the way of a block's site, or what was looked for if there is none."""
    looked_for, _, obstacles = reason.partition("; ")
    return anonymous((obstacles or looked_for).partition("; ")[0])


def anonymous(text: str) -> str:
    """Return what texts on many models have in common: no paths, no numbers."""
    return re.sub(r"\d+", "N", re.sub(r"'\w+(\.\w+)+' ?", "", text))
