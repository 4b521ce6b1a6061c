"""sbs-fx: prune and quantise vision models together, under a budget that is met."""
