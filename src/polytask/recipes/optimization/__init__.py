"""Systems whose point is the optimizer or the balancing of gradients."""
