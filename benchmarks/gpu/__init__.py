"""What does a card tell of the kernels? `suite` runs the sections, generators of rows, each in a
process of its own; `ptxas` does without a card."""
