"""Other layouts of a planned run: the fastest that fit."""
