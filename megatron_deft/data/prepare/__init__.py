"""One module per data set: each writes train and test files that `megatron-deft train` reads."""
