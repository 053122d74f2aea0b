"""Other people's libraries, one file each; nothing here is imported by ``import int8compile``."""
