"""What runs the step of a search: the same cost and gradient, computed in the way that is fastest here."""

from invlib.search.engines import memory
from invlib.search.engines.batched import part_of_many
from invlib.search.engines.selection import Engine, build, choose

__all__ = ["Engine", "build", "choose", "memory", "part_of_many"]
