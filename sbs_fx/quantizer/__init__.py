"""The mathematics of gates: grids, the super-bit quantiser, the channel gate, ranges."""
