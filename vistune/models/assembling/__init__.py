"""Parts read from where they lie and joined to a stage-0 folder, in the way of each family."""
