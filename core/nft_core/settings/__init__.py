"""A run's settings: declared in groups, written as TOML tables, and read by the code under flat names."""

from .files import RECORD, parse_assignment, read_tables, read_toml, to_toml
from .groups import GROUP_OF, GROUPS, Attention
from .settings import Settings, for_evaluation, make_settings, nearest_divisor

__all__ = [
    "GROUPS",
    "GROUP_OF",
    "RECORD",
    "Attention",
    "Settings",
    "for_evaluation",
    "make_settings",
    "nearest_divisor",
    "parse_assignment",
    "read_tables",
    "read_toml",
    "to_toml",
]
