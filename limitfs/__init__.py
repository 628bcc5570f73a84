"""limitfs: resource thresholds as files."""

__version__ = "0.1.0"
