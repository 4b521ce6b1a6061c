"""From a gated graph to a static one."""
