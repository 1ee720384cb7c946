"""Published circuits as data, and circuits from files, to compare with."""
