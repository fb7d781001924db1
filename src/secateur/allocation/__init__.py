"""Rules that divide a sparsity among the matrices of a model; one file each."""
