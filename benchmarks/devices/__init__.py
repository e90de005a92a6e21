"""What a device allows: the sum of memory, ceilings, projections, and the baseline beside it."""
