"""A cost is a polynomial in kept channels and bitwidths."""
