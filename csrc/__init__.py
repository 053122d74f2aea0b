"""Native sources, compiled at first use; see ``int8compile/native/``."""
