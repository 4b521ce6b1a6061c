"""A channel is a value: types of dimensions, the rules that unify them, groups, slimming."""
