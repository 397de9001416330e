"""A zoo of posteriors with exact answers: programs, guides that are right or wrong in a known way, and the truth."""

from .blocks import Hard, Linear, Normals
from .guides import GUIDES, make_guide
from .kinds import KINDS, Kind, make_kind
from .truths import USES, Truth, truth

__all__ = ["GUIDES", "KINDS", "USES", "Hard", "Kind", "Linear", "Normals", "Truth", "make_guide", "make_kind", "truth"]
